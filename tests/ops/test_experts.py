"""`lora_experts` and `grouped_linear` against plain torch in float64, on torch's operations."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fastlora.errors import BackendError, ConfigError
from fastlora.ops import dispatch, experts, linear, products
from fastlora.ops.dropout import cpu_mask
from fastlora.ops.experts import grouped_linear, lora_experts
from fastlora.ops.reference import LowRank, forward
from tests.support.tolerance import assert_close
from tests.support.versions import needs_torch

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
K, N, SCALING = 24, 16, -1.75
SEED = torch.tensor(-1234567890123)
CASES = {  # sizes of the groups, rows of none, rank
    "mixed": ((5, 0, 1, 9), 3, 3),
    "one group of all rows": ((0, 17, 0), 0, 4),
    "rank 1": ((4, 6), 0, 1),
    "every group is empty": ((0, 0, 0), 5, 2),
    "no row": ((0, 0), 0, 2),
    "one row each": ((1,) * 12, 2, 8),
}
NAMES = ("y", "dx", "dweight", "da", "db")


def make(case, dtype=torch.float64):
    """x, weight, A, B, dy and the offsets."""
    sizes, tail, rank = CASES[case]
    generator = torch.Generator().manual_seed(3)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    m, groups = sum(sizes) + tail, len(sizes)
    tensors = [random(m, K), random(groups, N, K) / 5, random(groups, rank, K) / 5]
    tensors += [random(groups, N, rank), random(m, N)]
    offsets = torch.tensor([0, *sizes]).cumsum(0).int()
    return [t.to(dtype) for t in tensors], offsets


def formula(x, weight, lora_a, lora_b, offsets, p=0.0, seed=None):
    """The reference for each group, with the rows of the whole mask."""
    keep = None if seed is None else cpu_mask(seed, p, *x.shape)
    y, bounds = x.new_zeros(x.shape[0], weight.shape[1]), offsets.tolist()
    parts = list(y.split(1)) if len(y) else []
    for g, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        low = LowRank(lora_a[g], lora_b[g], SCALING, p, seed)
        rows = slice(start, stop)
        own = forward(x[rows], weight[g], None, low, None if keep is None else keep[rows])[0]
        parts[rows] = own.split(1) if stop > start else []
    # Rows of no group are zeros, whatever they hold.
    return torch.cat([*parts, (x[:0] @ weight[0].T)])


def run(function, tensors, *settings, **named):
    leaves = [t.clone().requires_grad_() for t in tensors[:4]]
    y = function(*leaves, *settings, **named)
    found = torch.autograd.grad(y, leaves, tensors[4], allow_unused=True)
    return [y.detach(), *found]


def call(x, weight, lora_a, lora_b, offsets, p=0.0, seed=None, **named):
    return lora_experts(x, weight, lora_a, lora_b, offsets, SCALING, p, seed, **named)


def assert_matches(function, tensors, offsets, p):
    settings = offsets, p, SEED if p else None
    got, same = run(function, tensors, *settings), run(formula, tensors, *settings)
    exact = run(formula, [t.double() for t in tensors], *settings)
    for name, g, s, e in zip(NAMES, got, same, exact, strict=True):
        if s is None:  # no group has a row
            assert not g.any(), name
        else:
            assert_close(g, s, e, name)


@pytest.fixture(params=["slices", "few rows"])
def form(request, monkeypatch):
    """Both forms of the torch path, whatever the sizes."""
    few = request.param == "few rows"
    monkeypatch.setattr(experts, "_FEW_ROWS", 10**9 if few else 0)
    if not few:
        monkeypatch.setattr(products, "has_grouped_mm", lambda *given: False)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("case", CASES)
def test_forward_and_backward_match_the_formula(case, p, dtype):
    assert_matches(call, *make(case, dtype), p)


def test_dropout_in_blocks_matches_the_formula(monkeypatch):
    """These cases have few elements, which are otherwise not processed in blocks."""
    monkeypatch.setattr(linear, "FEW_ELEMENTS", 0)
    assert_matches(call, *make("mixed", torch.float32), 0.3)


@pytest.mark.usefixtures("form")
def test_the_mask_is_that_of_the_sorted_rows():
    """A = I and W = 0: y shows which elements were kept."""
    _, offsets = make("mixed")
    m = int(offsets[-1]) + 3
    x, weight, eye = torch.ones(m, K), torch.zeros(4, K, K), torch.eye(K).repeat(4, 1, 1)
    y = lora_experts(x, weight, eye, eye, offsets, 1.0, 0.4, SEED)
    keep = cpu_mask(SEED, 0.4, m, K)
    keep[-3:] = False
    assert torch.equal(y != 0, keep)


@pytest.mark.usefixtures("form")
def test_rows_of_no_group_are_zeros_whatever_they_hold():
    tensors, offsets = make("mixed")
    tensors[0][-3:], tensors[4][-3:] = float("nan"), float("inf")
    y, dx, *others = run(call, tensors, offsets, 0.3, SEED)
    assert not y[-3:].any() and not dx[-3:].any()
    assert all(t.isfinite().all() for t in (y, dx, *others))
    y, dx, dweight = run_base(grouped_linear, tensors, offsets)
    assert not y[-3:].any() and not dx[-3:].any() and dweight.isfinite().all()


def run_base(function, tensors, offsets):
    x, weight = (t.clone().requires_grad_() for t in tensors[:2])
    y = function(x, weight, offsets)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), tensors[4])]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_the_base_product_alone(dtype):
    tensors, offsets = make("mixed", dtype)

    def base(x, weight, offsets):
        a, b = x.new_zeros(len(weight), 1, K), x.new_zeros(len(weight), N, 1)
        return formula(x, weight, a, b, offsets)

    got, same = run_base(grouped_linear, tensors, offsets), run_base(base, tensors, offsets)
    exact = run_base(base, [t.double() for t in tensors], offsets)
    for name, g, s, e in zip(NAMES, got, same, exact, strict=False):
        assert_close(g, s, e, name)


@pytest.mark.usefixtures("form")
def test_any_strides_and_an_expanded_gradient():
    tensors, offsets = make("mixed", torch.float32)
    x, weight, a, b, dy = tensors
    dy = dy[:1].expand_as(dy)
    want = run(call, [x, weight, a, b, dy.contiguous()], offsets, 0.3, SEED)
    exact = run(call, [t.double() for t in (x, weight, a, b, dy)], offsets, 0.3, SEED)
    others = [t.mT.contiguous().mT for t in (x, weight, a, b)]
    leaves = [t.requires_grad_() for t in others]
    y = call(*leaves, offsets, 0.3, SEED)
    for g, s, e in zip([y, *torch.autograd.grad(y, leaves, dy)], want, exact, strict=True):
        assert_close(g, s, e)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("wanted", ["x", "a", "b", "weight"])
def test_each_gradient_alone(wanted):
    tensors, offsets = make("mixed", torch.float32)
    whole = run(call, tensors, offsets, 0.3, SEED)
    at = ("x", "weight", "a", "b").index(wanted)
    given = [t.clone().requires_grad_(i == at) for i, t in enumerate(tensors[:4])]
    y = call(*given, offsets, 0.3, SEED)
    assert torch.equal(y, whole[0])
    assert torch.equal(torch.autograd.grad(y, given[at], tensors[4])[0], whole[1 + at])


def test_factors_in_float32_have_gradients_in_float32():
    (x, weight, a, b, dy), offsets = make("mixed", torch.bfloat16)
    narrow = run(call, [x, weight, a, b, dy], offsets, 0.3, SEED)
    wide = run(call, [x, weight, a.float(), b.float(), dy], offsets, 0.3, SEED)
    assert [t.dtype for t in wide] == [torch.bfloat16] * 3 + [torch.float32] * 2
    assert all(torch.equal(one.to(two.dtype), two) for one, two in zip(narrow, wide, strict=True))


class Sizes(TorchDispatchMode):
    """Notes the bytes of every tensor that an operation allocates."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = [t for t in (*args, *(kwargs or {}).values()) if isinstance(t, torch.Tensor)]
        known = {t.untyped_storage().data_ptr() for t in given}
        result = function(*args, **(kwargs or {}))
        for t in result if isinstance(result, list | tuple) else [result]:
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in known:
                self.made.append(t.untyped_storage().nbytes())
        return result


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_only_what_is_needed_is_kept_and_nothing_has_the_size_of_the_weights(p, monkeypatch):
    sizes, tail, rank = (5, 0, 1, 9, 1, 1, 1, 1), 3, 4
    monkeypatch.setitem(CASES, "bank", (sizes, tail, rank))
    (x, weight, a, b, dy), offsets = make("bank", torch.float32)
    given = [x.requires_grad_(), weight, a.requires_grad_(), b.requires_grad_()]
    monkeypatch.setattr(experts, "_observed", lambda x: False)  # so that operations are seen
    kept = []
    with Sizes() as sizes:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            y = call(*given, offsets, p, SEED if p else None)
        y.backward(dy)
    own = {t.data_ptr() for t in (*given, offsets, SEED)}
    assert [t.shape for t in kept if t.data_ptr() not in own] == [(len(x), rank)]  # S
    assert len(sizes.made) > 4  # y, S, dx, dA, dB
    assert max(sizes.made) <= max(x.nbytes, y.nbytes, a.nbytes, b.nbytes) < weight[:3].nbytes


@needs_torch((2, 7), "a transform cannot read the values of a tensor")
@pytest.mark.filterwarnings("ignore:`torch.jit.script`")  # of torch's own forward-mode rules
def test_gradients_of_gradients_functorch_and_forward_mode():
    tensors, offsets = make("mixed")
    weight, dy = tensors[1], tensors[4]
    results = []
    for function in (call, formula):
        x, a, b = (t.clone().requires_grad_() for t in (tensors[0], tensors[2], tensors[3]))

        def loss(x, a, b, function=function):
            return (function(x, weight, a, b, offsets, 0.3, SEED).square() * dy).sum()

        first = torch.autograd.grad(loss(x, a, b), (x, a, b), create_graph=True)
        again = torch.autograd.grad(sum((g**2).sum() for g in first), (x, a, b))
        plain = x.detach(), a.detach(), b.detach()
        through = torch.func.grad(loss, argnums=(0, 1, 2))(*plain)
        value, tangent = torch.func.jvp(loss, plain, plain)
        results.append([*first, *again, *through, value, tangent])
    for got, want in zip(*results, strict=True):
        assert_close(got, want, want)


def test_a_sample_of_a_batch_under_vmap():
    tensors, offsets = make("mixed")
    x, *given = tensors[:4]
    batch = torch.stack([x, x.flip(0)])
    got = torch.func.vmap(lambda x: call(x, *given, offsets, 0.3, SEED))(batch)
    want = torch.stack([call(one, *given, offsets, 0.3, SEED) for one in batch])
    assert_close(got, want, want)
    got = torch.func.vmap(lambda x: grouped_linear(x, given[0], offsets))(batch)
    want = torch.stack([grouped_linear(one, given[0], offsets) for one in batch])
    assert_close(got, want, want)


def test_autocast_and_checkpointing_keep_dtypes_and_values():
    tensors, offsets = make("mixed", torch.float32)
    narrow = [t.bfloat16() for t in tensors]
    with torch.autocast("cpu", torch.bfloat16):
        got = run(call, [*tensors[:4], narrow[4]], offsets, 0.3, SEED)
        base = grouped_linear(tensors[0], tensors[1], offsets)
    want = run(call, narrow, offsets, 0.3, SEED)
    assert [t.dtype for t in got] == [torch.bfloat16] + [torch.float32] * 4
    for one, two in zip(got, want, strict=True):
        assert torch.equal(one.to(two.dtype), two)
    assert torch.equal(base, grouped_linear(*narrow[:2], offsets))

    def recomputed(*given):
        return checkpoint(call, *given, use_reentrant=False)

    for one, two in zip(
        run(recomputed, tensors, offsets, 0.3, SEED),
        run(call, tensors, offsets, 0.3, SEED),
        strict=True,
    ):
        assert torch.equal(one, two)


@pytest.mark.filterwarnings("ignore")  # torch's own compiler imports deprecated modules
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_call_is_one_graph_with_the_same_results(backend):
    tensors, offsets = make("mixed", torch.float32)
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    for one, two in zip(
        run(compiled, tensors, offsets, 0.3, SEED),
        run(call, tensors, offsets, 0.3, SEED),
        strict=True,
    ):
        assert torch.equal(one, two)
    other = torch.tensor([0, 2, 2, 10, 18], dtype=torch.int32)  # other values, the same graph
    with torch.compiler.set_stance("fail_on_recompile"):
        again = run(compiled, tensors, other, 0.3, SEED)
    for one, two in zip(again, run(call, tensors, other, 0.3, SEED), strict=True):
        assert torch.equal(one, two)
    base = torch.compile(grouped_linear, fullgraph=True, backend=backend)
    for one, two in zip(
        run_base(base, tensors, offsets), run_base(grouped_linear, tensors, offsets), strict=True
    ):
        assert torch.equal(one, two)


def test_the_operators_are_as_they_are_declared():
    (x, weight, a, b, dy), offsets = make("mixed", torch.float32)
    path = a, b, SCALING, 0.3, SEED, False
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.fastlora.experts_forward, (x, weight, offsets, *path), test_utils=checks
    )
    s = torch.ops.fastlora.experts_forward(x, weight, offsets, *path)[1]
    for needs in ((True,) * 4, (False, True, False, True)):
        torch.library.opcheck(
            torch.ops.fastlora.experts_backward,
            (dy, x, weight, offsets, s, *path, *needs),
            test_utils=checks,
        )


def test_the_meta_device_has_shapes_only():
    tensors, offsets = make("mixed", torch.float32)
    found = run(call, [t.to("meta") for t in tensors], offsets.to("meta"), 0.3, SEED)
    for one, two in zip(found, run(call, tensors, offsets, 0.3, SEED), strict=True):
        assert one.device.type == "meta" and one.shape == two.shape and one.dtype == two.dtype


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": lambda t: t[0]}, r"weight: expected \(G ≥ 1, N, K\), got \(16, 24\)"),
        ({"x": lambda t: t[:, 1:]}, r"x: expected \(M, K=24\), got \(18, 23\)"),
        ({"x": lambda t: t[None]}, r"x: expected \(M, K=24\), got \(1, 18, 24\)"),
        ({"x": lambda t: t.half()}, "x: expected the weight's dtype torch.float32, got torch.float16"),
        ({"x": lambda t: t.to("meta")}, "x: expected the weight's device cpu, got meta"),
        ({"a": lambda t: t[1:]}, r"lora_a: expected \(G=4, R, K=24\), got \(3, 3, 24\)"),
        ({"a": lambda t: t.to("meta")}, "lora_a: expected x's device cpu, got meta"),
        ({"b": lambda t: t[..., 1:]}, r"lora_b: expected \(G=4, N=16, R=3\), got \(4, 16, 2\)"),
        ({"offsets": lambda t: t[1:]}, r"offsets: expected \(G \+ 1 = 5,\) torch.int32, got \(4,\)"),
        ({"offsets": lambda t: t.long()}, r"got \(5,\) torch.int64"),
        ({"offsets": lambda t: t.to("meta")}, "offsets: expected x's device cpu, got meta"),
        ({"offsets": lambda t: t + 4}, "offsets: expected ascending numbers from 0 to at most 18"),
        ({"offsets": lambda t: 2 * t}, "offsets: expected ascending numbers from 0 to at most 18"),
        ({"offsets": lambda t: t[[0, 3, 1, 2, 4]]}, r"at most 18, got \[0, 6, 5, 5, 15\]"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(changes, message):
    tensors, offsets = make("mixed", torch.float32)
    given = dict(zip(("x", "weight", "a", "b"), tensors, strict=False)) | {"offsets": offsets}
    for name, change in changes.items():
        given[name] = change(given[name])
    with pytest.raises(ConfigError, match=message):
        call(*given.values())
    if "a" not in changes and "b" not in changes:
        with pytest.raises(ConfigError, match=message):
            grouped_linear(given["x"], given["weight"], given["offsets"])


def test_the_choice_and_its_reason(monkeypatch):
    tensors, offsets = make("mixed", torch.float32)
    x, weight = tensors[:2]
    assert str(dispatch.choose_experts(x, 3)).startswith(
        "torch/in_place: torch runs this on the CPU"
    )
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendError, match="cannot run: torch runs this on the CPU"):
        call(*tensors[:4], offsets, backend="triton")
    pytest.importorskip("triton.tools.tensor_descriptor", reason="the kernels need Triton 3.4")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    choice = dispatch.choose_experts(x, 128, weight=weight, backend="triton")
    assert (choice.backend, choice.plan) == ("triton", "grouped")
    for given, reason in (
        ((x, 129), "rank 129 is above 128, the highest that kernels for groups support"),
        ((x[:0], 8), "an empty tensor has nothing to launch"),
        ((x.double(), 8), "no kernel for torch.float64"),
    ):
        with pytest.raises(BackendError, match=f"cannot run: {reason}"):
            dispatch.choose_experts(*given, backend="triton")
    found = []
    torch.func.vmap(lambda x: found.append(dispatch.choose_experts(x, 3)) or x)(x[None])
    assert found[0].plan == "composed"


def test_one_product_for_each_group_that_has_rows(monkeypatch):
    """No group without rows is multiplied, and without a gradient of the weights none is computed."""
    monkeypatch.setattr(experts, "_FEW_ROWS", 0)
    monkeypatch.setattr(products, "has_grouped_mm", lambda *given: False)
    tensors, offsets = make("mixed", torch.float32)
    calls, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *given, **named: calls.append(1) or mm(*given, **named))
    x, a, b = (tensors[at].requires_grad_() for at in (0, 2, 3))
    y = call(x, tensors[1], a, b, offsets)
    assert len(calls) == 3
    torch.autograd.grad(y, (x, a, b), tensors[4])
    assert len(calls) == 6
    want = F.linear(x[:5], tensors[1][0]) + SCALING * (x[:5] @ a[0].T @ b[0].T)
    assert_close(y[:5], want, want.double())


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="torch has no grouped product on a CPU")
def test_few_rows_are_one_operation_for_all_groups_if_they_are_aligned(monkeypatch):
    calls, product = [], torch._grouped_mm

    def counted(x, other, *, offs):
        calls.append(tuple(other.shape))
        return product(x, other, offs=offs)

    monkeypatch.setattr(torch, "_grouped_mm", counted)
    tensors, offsets = make("one row each", torch.float32)
    run(call, tensors, offsets, 0.3, SEED)
    base, update, m = [(12, K, N), (12, N, K)], [(12, K, 8), (12, 8, N)], len(tensors[0])
    assert calls[:3] == [base[0], *update]
    assert sorted(calls[3:]) == sorted([base[1], (m, 8), (12, N, 8), (m, K), (12, 8, K)])
    calls.clear()
    run(call, make("mixed", torch.float32)[0], make("mixed")[1])  # 3 ranks of 4 bytes
    assert calls == [(4, K, N), (4, N, K)]
    calls.clear()
    run(call, *make("one row each"))  # float64
    weight = torch.zeros(12, N, K + 1)[..., 1:]
    call(tensors[0], weight, *tensors[2:4], offsets)
    assert calls == update
    calls.clear()
    monkeypatch.setattr(experts, "_FEW_ROWS", 1)  # more than one row for each group
    call(*tensors[:4], offsets)
    assert calls == base[:1]
