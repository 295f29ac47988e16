"""The dropout masks: definitions and statistics; every path of a call applies the same mask."""

import threading
import warnings

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastlora import LoRALinear, lora_linear
from fastlora.ops import dropout, linear
from fastlora.ops.dropout import (
    cpu_mask,
    dropout_threshold,
    keep_mask,
    keep_scale,
    kernel_mask,
    philox_4x32,
)
from tests.support.cases import Case, Member, make, run_group
from tests.support.tolerance import assert_close

SEED, P = torch.tensor(-1234567890123), 0.3
CASE = Case((2, 9), 21, 24, 4, p=P)
MASK64 = 2**64 - 1


def _philox_4x64(key: int, counter: int) -> list[int]:
    """The words of Philox-4x64-10 (Salmon et al.) in Python integers."""
    c, k = [counter, 0, 0, 0], [key, 0]
    for _ in range(10):
        a, b = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [(b >> 64) ^ c[1] ^ k[0], b & MASK64, (a >> 64) ^ c[3] ^ k[1], a & MASK64]
        k = [(k[0] + 0x9E3779B97F4A7C15) & MASK64, (k[1] + 0xBB67AE8584CAA73B) & MASK64]
    return c


@pytest.mark.parametrize("seed", [0, 1, -1, 2**62 + 12345, -(2**63), 0xDEADBEEFCAFE])
@pytest.mark.parametrize("cols", [1, 16, 37])
def test_the_mask_is_the_documented_function_of_seed_row_and_column(seed, cols):
    rows = 3
    expected = torch.empty(rows, cols, dtype=torch.bool)
    for i in range(rows):
        for j in range(cols):
            word = _philox_4x64(seed & MASK64, i * -(-cols // 16) + j // 16 + 1)[j % 16 // 4]
            expected[i, j] = (word >> 16 * (j % 4)) & 0xFFFF >= dropout_threshold(P)
    assert torch.equal(cpu_mask(torch.tensor(seed), P, rows, cols), expected)


def test_the_mask_is_the_recorded_one():
    """Equal bit for bit to earlier releases, so that a run can be repeated after an upgrade of fastlora, torch or NumPy."""
    keep = cpu_mask(SEED, 0.5, 3, 20)
    assert ["".join("01"[bit] for bit in row) for row in keep.tolist()] == GOLDEN


GOLDEN = ["11011111011010111011", "10100000010010100101", "11011001010111110101"]


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_the_mask_keeps_the_right_share_independently_of_neighbours(p):
    keep = cpu_mask(torch.tensor(3), p, 1000, 1000).double()
    # Five standard deviations of a mean of Bernoulli trials: over all, by lane of a word, by row and by column.
    deviation = (p * (1 - p)) ** 0.5
    assert abs(keep.mean().item() - (1 - p)) < 5 * deviation / 1e3
    lanes = keep[:, :992].reshape(1000, 62, 16).mean((0, 1))
    assert (lanes - (1 - p)).abs().max() < 5 * deviation / 62_000**0.5
    for line in (keep.mean(0), keep.mean(1)):
        assert (line - (1 - p)).abs().max() < 5 * deviation / 1000**0.5
    centred = keep - keep.mean()
    for shifted in (centred.roll(1, 0), *(centred.roll(lag, 1) for lag in (1, 4, 16))):
        assert abs((centred * shifted).mean().item()) < 5 * p * (1 - p) / 1e3
    other = cpu_mask(torch.tensor(4), p, 1000, 1000).double()
    assert abs((centred * (other - other.mean())).mean().item()) < 5 * p * (1 - p) / 1e3


@pytest.mark.parametrize(
    "shape", [(1, 1), (5, 8), (70, 21), (0, 8), (33, 768), (683, 768), (2500, 768), (3, 0)]
)
@pytest.mark.parametrize("lanes", [48, 10_000, 2**30])
def test_the_mask_does_not_depend_on_the_blocks(shape, lanes, monkeypatch):
    full = cpu_mask(SEED, P, *shape)
    monkeypatch.setattr(dropout, "_BLOCK_LANES", lanes)
    if lanes == 2**30:
        monkeypatch.setattr(dropout, "_idle", [dropout._Scratch(2**21)])
    assert torch.equal(cpu_mask(SEED, P, *shape), full)


def test_masks_in_use_at_the_same_time_do_not_share_buffers():
    x = torch.empty(90, 24)
    first, second = (dropout.keep_blocks(x, P, torch.tensor(seed)) for seed in (1, 2))
    for (_, one, work), (_, other, _) in zip(first, second, strict=True):
        work.fill_(float("nan"))
        assert torch.equal(one, cpu_mask(torch.tensor(1), P, 90, 24))
        assert torch.equal(other, cpu_mask(torch.tensor(2), P, 90, 24))


def test_concurrent_threads_get_the_same_masks_as_alone():
    expected = [cpu_mask(torch.tensor(s), P, 300, 96) for s in range(8)]
    wrong = []

    def work(seed):
        for _ in range(20):
            if not torch.equal(cpu_mask(torch.tensor(seed), P, 300, 96), expected[seed]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_scratch_of_a_block_has_its_shape_and_dtype(dtype):
    ((_, keep, work),) = dropout.keep_blocks(torch.empty(5, 21, dtype=dtype), P, SEED)
    assert keep.shape == (5, 21) and work.shape == (5, 21) and work.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dropped_elements_are_zero_and_kept_ones_unchanged(dtype):
    x = torch.tensor([[1.5, -2.0, 3.0, -0.0], [float("inf"), -float("inf"), float("nan"), 7.0]])
    x = torch.cat([x, x], 1).to(dtype)[:, ::2].repeat(1, 2)
    x = torch.stack([x, x], 2).view(2, -1)[:, ::2]  # not contiguous, as rows of an input may be
    keep = torch.tensor([[True, False] * 4, [False, True] * 4])
    out = torch.full(x.shape, 5.0, dtype=dtype)
    assert dropout.zero_dropped(x, keep, out) is out
    assert torch.equal(out.isnan(), x.isnan() & keep)
    expected = torch.where(keep, x, 0.0)
    assert torch.equal(out.nan_to_num(), expected.nan_to_num())
    assert not out[~keep].signbit().any()
    out = x.clone()
    assert torch.equal(dropout.zero_dropped(out, keep, out).nan_to_num(), expected.nan_to_num())


def test_the_mask_is_on_the_cpu_whatever_the_default_device(monkeypatch):
    expected = cpu_mask(SEED, P, 3, 20)
    monkeypatch.setattr(dropout, "_idle", [])
    with torch.device("meta"):
        assert torch.equal(cpu_mask(SEED, P, 3, 20), expected)


def test_the_operator_fits_into_graphs():
    operator = torch.ops.fastlora.cpu_keep.default
    results = torch.library.opcheck(operator, (SEED, P, 5, 21))
    assert set(results.values()) == {"SUCCESS"}


def _formula(x, weight, bias, lora_a, lora_b, scaling, p, seed):
    """The expected output of a layer, as torch expressions with the mask of this module."""
    rows = x.reshape(-1, x.shape[-1])
    keep = cpu_mask(seed, p, *rows.shape)
    dropped = torch.where(keep, rows, 0.0) * keep_scale(p)
    y = rows @ weight.T + bias + scaling * (dropped @ lora_a.T @ lora_b.T)
    return y.reshape(*x.shape[:-1], len(weight))


def _update(x, weight, bias, *path):
    return linear.lora_update(torch.nn.functional.linear(x, weight, bias), x, *path)


def _group(x, weight, bias, lora_a, lora_b, scaling, p, seed):
    member = Member(weight, bias, lora_a, lora_b, scaling)
    return run_group(x, [member, member._replace(scaling=0.5)], p, seed)[0]


PATHS = {"linear": lora_linear, "update": _update, "group": _group}


def _checkpointed(function, reentrant):
    def call(x, weight, bias, lora_a, lora_b, *rest):
        factors = (x, weight, bias, lora_a, lora_b)
        return checkpoint(lambda *t: function(*t, *rest), *factors, use_reentrant=reentrant)

    return call


def _compiled(function, backend):
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend=backend)


def _leaves(dtype):
    t = make(CASE).to(dtype)
    names = ("x", "weight", "bias", "lora_a", "lora_b")
    return [getattr(t, name).requires_grad_() for name in names], t.dy, t.scaling


def _first(function, dtype=torch.float32):
    """y and its gradients."""
    leaves, dy, scaling = _leaves(dtype)
    y = function(*leaves, scaling, P, SEED)
    return [y, *torch.autograd.grad(y, leaves, dy)]


def _second(function, dtype=torch.float32):
    """The gradients of the squared gradients."""
    leaves, dy, scaling = _leaves(dtype)
    y = function(*leaves, scaling, P, SEED)
    first = torch.autograd.grad((y.square() * dy).sum(), leaves, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)


def _compare(got, of):
    for one, same, exact in zip(got, of(_formula), of(_formula, torch.float64), strict=True):
        assert_close(one, same, exact)


@pytest.mark.parametrize("path", PATHS)
def test_every_path_and_its_derivatives_apply_this_mask(path):
    _compare(_first(PATHS[path]), _first)
    _compare(_second(PATHS[path]), _second)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_mask_is_the_same(path, mode):
    leaves, _, scaling = _leaves(torch.float32)
    y = PATHS[path](*leaves, scaling, P, SEED)
    with mode():
        assert torch.equal(PATHS[path](*leaves, scaling, P, SEED), y)
    # Buffers from a call in inference mode are reused by calls that train.
    assert torch.equal(PATHS[path](*leaves, scaling, P, SEED), y)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_the_mask(path, reentrant):
    function = _checkpointed(PATHS[path], reentrant)
    leaves, dy, scaling = _leaves(torch.float32)
    y = function(*leaves, scaling, P, SEED)
    y.backward(dy)
    _compare([y, *(leaf.grad for leaf in leaves)], _first)


@pytest.mark.parametrize("path", ["linear", "update"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_compiled_call_applies_the_mask_of_an_eager_one(path, backend):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own compiler imports deprecated modules
        function = _compiled(PATHS[path], backend)
        _compare(_first(function), _first)
        with torch.no_grad():
            leaves, _, scaling = _leaves(torch.float32)
            y = function(*leaves, scaling, P, SEED)
    _compare([y], lambda *a: _first(*a)[:1])


def _functorch(function, dtype=torch.float32):
    """By vmap over the samples of x: y, the gradients of x and B, and the derivative along x."""
    (x, weight, bias, a, b), dy, scaling = _leaves(dtype)

    def call(x, b):
        return function(x, weight, bias, a, b, scaling, P, SEED)

    def one(x, dy):
        y, pull = torch.func.vjp(call, x, b)
        return y, *pull(dy), torch.func.jvp(lambda x: call(x, b), (x,), (x,))[1]

    return torch.func.vmap(one)(x, dy)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")  # of torch's own forward-mode rules
@pytest.mark.parametrize("path", ["linear", "update"])
def test_functorch_applies_the_mask(path):
    leaves, dy, scaling = _leaves(torch.float64)
    x, weight, bias, a, b = leaves
    # Each sample of x is a separate call with the same seed.
    ys = [_formula(one, weight, bias, a, b, scaling, P, SEED) for one in x]
    pulled = [
        torch.autograd.grad(y, (x, b), d, retain_graph=True) for y, d in zip(ys, dy, strict=True)
    ]
    exact = [torch.stack(ys), torch.stack([g[0][i] for i, g in enumerate(pulled)]),
             torch.stack([g[1] for g in pulled]), torch.stack(ys) - bias]  # fmt: skip
    same = _functorch(_formula)
    for got, one, wide in zip(_functorch(PATHS[path]), same, exact, strict=True):
        assert_close(got, one, wide)


@pytest.mark.parametrize("path", ["linear", "update"])
def test_samples_may_have_different_masks_under_vmap(path):
    """randomness="different" draws a seed for each sample: its mask is that of a call with this seed, forward and backward."""
    (_, weight, bias, a, b), dy, scaling = _leaves(torch.float64)
    x = make(CASE).x.double()

    def one(x, dy):
        seed = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64)
        y, pull = torch.func.vjp(lambda x: PATHS[path](x, weight, bias, a, b, scaling, P, seed), x)
        return seed, y, pull(dy)[0]

    seeds, ys, dxs = torch.func.vmap(one, randomness="different")(x, dy)
    assert len(set(seeds.tolist())) == len(x) == 2
    for seed, y, dx, one_x, one_dy in zip(seeds, ys, dxs, x, dy, strict=True):
        leaf = one_x.clone().requires_grad_()
        exact = _formula(leaf, weight, bias, a, b, scaling, P, seed)
        assert_close(y, exact, exact)
        (expected,) = torch.autograd.grad(exact, leaf, one_dy)
        assert_close(dx, expected, expected)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_a_layer_trains_per_sample_under_vmap(randomness):
    """torch.func's per-sample gradients of a layer, added up over the samples of one mask, are those of the layer."""
    torch.manual_seed(0)
    layer = LoRALinear(torch.nn.Linear(21, 24), 4, dropout=P).double()
    torch.nn.init.normal_(layer.lora_B)
    parameters = {n: v.detach() for n, v in layer.named_parameters() if "lora" in n}
    x = torch.randn(3, 5, 21, dtype=torch.float64)

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    torch.manual_seed(1)
    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0), randomness=randomness)(
        parameters, x
    )
    torch.manual_seed(1)
    size = (3,) if randomness == "different" else ()
    seeds = torch.randint(-(2**63), 2**63 - 1, size, dtype=torch.int64).expand(3)
    base = layer.original_linear
    for i in range(3):
        a, b = (parameters[n].clone().requires_grad_() for n in ("lora_A", "lora_B"))
        y = _formula(x[i], base.weight, base.bias, a, b, layer.scaling, P, seeds[i])
        for name, want in zip(
            ("lora_A", "lora_B"), torch.autograd.grad(y.square().sum(), (a, b)), strict=True
        ):
            assert_close(per_sample[name][i], want, want)


# Known answers of Random123 (kat_vectors, philox4x32 7): counter, key -> words.
@pytest.mark.parametrize(
    ("counter", "seed", "words"),
    [
        ((0, 0), 0, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    ],
)
def test_philox_equals_the_published_words(counter, seed, words):
    c0, c1 = (torch.tensor([[c]]) for c in counter)
    got = philox_4x32(seed, c0, c1)
    assert tuple(int(w) & 0xFFFFFFFF for w in got) == words


def _philox_in_python_integers(seed: int, c0: int, c1: int) -> list[int]:
    counter, key = [c0, c1, 0, 0], [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    for _ in range(7):
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            (b >> 32) ^ counter[1] ^ key[0],
            b & 0xFFFFFFFF,
            (a >> 32) ^ counter[3] ^ key[1],
            a & 0xFFFFFFFF,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return counter


@pytest.mark.parametrize("seed", [0, 1, -1, 2**62 + 12345, -(2**63), 0xDEADBEEFCAFE])
def test_kernel_mask_is_the_documented_function_of_seed_row_and_column(seed):
    rows, cols, p = 3, 21, 0.3
    expected = torch.empty(rows, cols, dtype=torch.bool)
    for i in range(rows):
        for j in range(cols):
            word = _philox_in_python_integers(seed, j // 8, i + 5)[j % 4]
            lane = (word >> 16) if j % 8 >= 4 else (word & 0xFFFF)
            expected[i, j] = lane >= round(p * 65536)
    assert torch.equal(kernel_mask(seed, p, rows, cols, first_row=5), expected)
    assert torch.equal(kernel_mask(torch.tensor(seed), p, rows, cols, first_row=5), expected)


def test_kernel_mask_does_not_depend_on_how_the_rows_are_split():
    full = kernel_mask(7, 0.4, 100, 50)
    parts = [kernel_mask(7, 0.4, 25, 50, first_row=r) for r in (0, 25, 50, 75)]
    assert torch.equal(full, torch.cat(parts))


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_kernel_mask_keeps_the_right_share_independently_of_neighbours(p):
    keep = kernel_mask(3, p, 1000, 1000).double()
    # Five standard deviations of a mean of 10⁶ Bernoulli trials.
    assert abs(keep.mean().item() - (1 - p)) < 5 * (p * (1 - p) / 1e6) ** 0.5
    centred = keep - keep.mean()
    for shifted in (centred.roll(1, 0), centred.roll(1, 1), centred.roll(8, 1)):
        assert abs((centred * shifted).mean().item()) < 5 * p * (1 - p) / 1e3


def test_p_is_quantised_to_16_bits():
    assert [dropout_threshold(p) for p in (0.0, 1e-9, 0.1, 0.9999999)] == [0, 0, 6554, 65535]
    assert keep_scale(0.5) == 2.0 and keep_scale(0.1) == 65536 / (65536 - 6554)


def test_a_triton_call_on_a_cpu_keeps_what_the_kernels_keep():
    x = torch.ones(9, 21)
    kernels = keep_mask(x, P, SEED, triton=True)
    assert torch.equal(kernels, kernel_mask(SEED, P, 9, 21))
    own = keep_mask(x, P, SEED)
    assert torch.equal(own, cpu_mask(SEED, P, 9, 21)) and not torch.equal(own, kernels)
    assert keep_mask(x, P, None) is None
