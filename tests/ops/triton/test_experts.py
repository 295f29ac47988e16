"""A bank of experts through the kernels against float64, in Triton's interpreter or on a GPU."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastlora.kernels import recording
from fastlora.ops import dispatch, experts, products
from fastlora.ops.dropout import kernel_mask
from fastlora.ops.experts import grouped_linear, lora_experts
from fastlora.ops.reference import LowRank, forward
from fastlora.ops.triton import experts as triton_experts
from fastlora.ops.triton import grouped as grouped_kernels
from tests.support.tolerance import assert_close

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
K, N, SCALING = 32, 48, 1.75
SEED = torch.tensor(-1234567890123, device=DEVICE)
CASES = {  # sizes of the groups, rows of none, rank, p
    "mixed": ((5, 0, 1, 18), 0, 3, 0.0),
    "masked, and rows of no group": ((5, 0, 1, 18), 3, 20, 0.3),
    "one group of all rows": ((0, 24, 0), 0, 4, 0.6),
    "rank 1, one row each": ((1,) * 12, 1, 1, 0.3),
    "dB in a pass of its own": ((7, 9), 0, 40, 0.3),
    "every group is empty": ((0, 0), 4, 2, 0.3),
}
NAMES = ("y", "dx", "dweight", "da", "db")
pytestmark = pytest.mark.usefixtures("bfloat16")


def make(case, dtype, factors=None):
    """x, weight, A, B, dy; and the offsets, p and the seed."""
    sizes, tail, rank, p = CASES[case]
    generator = torch.Generator().manual_seed(3)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    m, groups = sum(sizes) + tail, len(sizes)
    tensors = [random(m, K), random(groups, N, K) / 5, random(groups, rank, K) / 5]
    tensors += [random(groups, N, rank), random(m, N)]
    tensors = [t.to(dtype).to(DEVICE) for t in tensors]
    if factors is not None:
        tensors[2:4] = [t.to(factors) for t in tensors[2:4]]
    offsets = torch.tensor([0, *sizes]).cumsum(0).int().to(DEVICE)
    return tensors, (offsets, p, SEED if p else None)


def formula(x, weight, lora_a, lora_b, offsets, p, seed):
    bounds = offsets.tolist()
    keep = kernel_mask(SEED, p, len(x), K, device=x.device)
    parts = []
    for g, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        low = LowRank(lora_a[g], lora_b[g], SCALING, p, seed).to(x.dtype)
        parts.append(forward(x[start:stop], weight[g], None, low, keep[start:stop])[0])
    return torch.cat([*parts, x.new_zeros(len(x) - bounds[-1], N)])


def call(x, weight, lora_a, lora_b, offsets, p, seed):
    return lora_experts(x, weight, lora_a, lora_b, offsets, SCALING, p, seed, backend="triton")


def run(function, tensors, settings):
    leaves = [t.clone().requires_grad_() for t in tensors[:4]]
    y = function(*leaves, *settings)
    return [y.detach(), *torch.autograd.grad(y, leaves, tensors[4])]


def assert_matches(got, tensors, settings):
    same = run(formula, tensors, settings)
    exact = run(formula, [t.double() for t in tensors], settings)
    for name, g, s, e in zip(NAMES, got, same, exact, strict=True):
        assert_close(g, s, e, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", CASES)
def test_forward_and_backward_match_the_formula(case, dtype):
    tensors, settings = make(case, dtype)
    for _ in range(3):  # the third call repeats the second
        assert_matches(run(call, tensors, settings), tensors, settings)


def test_a_recording_serves_the_same_gradients_only():
    tensors, settings = make("mixed", torch.float32)
    wanted = run(call, tensors, settings)[1:]
    for _ in range(3):
        for trained in ([0], [2], [3], [2, 3], [0, 3], [0, 2, 3]):
            leaves = [t.clone().requires_grad_(i in trained) for i, t in enumerate(tensors[:4])]
            call(*leaves, *settings).backward(tensors[4])
            for i, leaf in enumerate(leaves):
                assert leaf.grad is None if i not in trained else torch.equal(leaf.grad, wanted[i])


def test_factors_in_float32_keep_their_dtype():
    tensors, settings = make("mixed", torch.float16, torch.float32)
    got, same = run(call, tensors, settings), run(formula, tensors, settings)
    exact = run(formula, [t.double() for t in tensors], settings)
    assert [t.dtype for t in got] == [torch.float16] * 3 + [torch.float32] * 2
    for name, g, s, e in zip(NAMES, got, same, exact, strict=True):
        assert_close(g, s, e, name, eps=torch.finfo(torch.float16).eps)


def test_a_repetition_follows_its_own_sizes_and_rows_of_no_group_are_zeros():
    tensors, settings = make("masked, and rows of no group", torch.float32)
    recorded = len(recording._recordings)
    for sizes in ((5, 0, 1, 18), (0, 20, 0, 1), (6, 6, 6, 6), (1, 0, 0, 0), (0, 0, 0, 0)):
        offsets = torch.tensor([0, *sizes], device=DEVICE).cumsum(0).int()
        rows = sum(sizes)
        x, dy = tensors[0].clone(), tensors[4].clone()
        got = run(call, tensors, (offsets, *settings[1:]))
        assert_matches(got, tensors, (offsets, *settings[1:]))
        x[rows:], dy[rows:] = float("nan"), float("nan")
        hostile = run(call, [x, *tensors[1:4], dy], (offsets, *settings[1:]))
        for name, one, other in zip(NAMES, got, hostile, strict=True):
            assert torch.equal(one, other), name
    assert len(recording._recordings) == recorded + 2  # one for each direction


def test_the_mask_is_that_of_the_sorted_rows_and_of_the_kernels():
    offsets = torch.tensor([0, 5, 5, 20], dtype=torch.int32, device=DEVICE)
    x, weight = torch.ones(22, K, device=DEVICE), torch.zeros(3, K, K, device=DEVICE)
    eye = torch.eye(K, device=DEVICE).expand(3, K, K)
    y = lora_experts(x, weight, eye, eye, offsets, 1.0, 0.4, SEED, backend="triton")
    keep = kernel_mask(SEED, 0.4, 22, K, device=x.device)
    keep[20:] = False
    assert torch.equal(y != 0, keep)


@pytest.mark.parametrize("wanted", ["x", "weight", "a", "b"])
def test_each_gradient_alone_and_any_strides(wanted):
    tensors, settings = make("masked, and rows of no group", torch.float32)
    whole = run(call, tensors, settings)
    at = ("x", "weight", "a", "b").index(wanted)
    given = [t.clone().requires_grad_(i == at) for i, t in enumerate(tensors[:4])]
    y = call(*given, *settings)
    assert torch.equal(y, whole[0])
    assert torch.equal(torch.autograd.grad(y, given[at], tensors[4])[0], whole[1 + at])
    others = [t.mT.contiguous().mT for t in tensors[:4]]
    assert_matches(run(call, [*others, tensors[4].T.contiguous().T], settings), tensors, settings)


def test_checkpointing_and_gradients_of_gradients_have_the_kernels_mask():
    tensors, settings = make("masked, and rows of no group", torch.float32)

    def recomputed(*given):
        return checkpoint(call, *given, use_reentrant=False)

    for one, other in zip(
        run(call, tensors, settings), run(recomputed, tensors, settings), strict=True
    ):
        assert torch.equal(one, other)
    found = []
    for function, dtype in (
        (call, torch.float32),
        (formula, torch.float32),
        (formula, torch.float64),
    ):
        x, weight, a, b, dy = (t.to(dtype) for t in tensors)
        x, a, b = (t.requires_grad_() for t in (x, a, b))
        y = function(x, weight, a, b, *settings)
        (dx,) = torch.autograd.grad(y, [x], dy, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), (a, b)))
    for g, s, e in zip(*found, strict=True):
        assert_close(g, s, e)


@pytest.mark.filterwarnings("ignore")  # torch's own compiler imports deprecated modules
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_call_is_one_graph_with_the_same_results(backend):
    tensors, settings = make("masked, and rows of no group", torch.float32)
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    for one, other in zip(
        run(compiled, tensors, settings), run(call, tensors, settings), strict=True
    ):
        assert torch.equal(one, other)


def test_a_recording_serves_one_precision(monkeypatch):
    tensors, settings = make("mixed", torch.float32)
    launched, kernel = [], grouped_kernels.grouped_s

    def spy(*arguments, **named):
        launched.append(dispatch.float32_precision())
        return kernel(*arguments, **named)

    monkeypatch.setattr(triton_experts, "grouped_s", spy)
    for precision in ("ieee", "tf32", "ieee", "tf32"):
        monkeypatch.setattr(dispatch, "float32_precision", lambda precision=precision: precision)
        for _ in range(3):
            run(call, tensors, settings)
    assert launched == ["ieee"] * 2 + ["tf32"] * 2  # the third call repeats the second
    assert len(recording._recordings) == 4


class Call:
    """`torch._grouped_mm` as it is on a GPU: rows after the last offset are undefined."""

    def __init__(self):
        self.count = 0

    def __call__(self, x, weight, *, offs):
        self.count += 1
        y = x.new_full((len(x), weight.shape[2]), float("nan"))
        bounds = [0, *offs.tolist()]
        for g, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
            y[start:stop] = x[start:stop] @ weight[g]
        return y


def test_the_grouped_product_of_torch_gives_the_same(monkeypatch):
    tensors, settings = make("masked, and rows of no group", torch.float32)
    product = Call()
    monkeypatch.setattr(products, "has_grouped_mm", lambda *given: True)
    monkeypatch.setattr(torch, "_grouped_mm", product)
    for _ in range(3):
        assert_matches(run(call, tensors, settings), tensors, settings)
    assert product.count == 6
    x, weight, *_, dy = tensors
    x, weight = x.requires_grad_(), weight.requires_grad_()
    y = grouped_linear(x, weight, settings[0])
    y.backward(dy)
    assert product.count == 8
    monkeypatch.setattr(experts, "groups_of", lambda *_: pytest.fail("the offsets are waited for"))
    again = grouped_linear(x, weight.detach(), settings[0])
    again.backward(dy)
    assert product.count == 10 and torch.equal(again, y)
    want = run(formula, tensors, (settings[0], 0.0, None))
    assert not y[-3:].any() and not x.grad[-3:].any() and y.shape == want[0].shape
