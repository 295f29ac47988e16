"""Rows of different adapters through the kernels against float64, in Triton's interpreter or on a GPU."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastlora import BackendError, explain, use_adapter, use_adapters
from fastlora.kernels import recording
from fastlora.ops import dispatch, mixed
from fastlora.ops.dropout import kernel_mask
from fastlora.ops.mixed import Segment, lora_linear_mixed, lora_update_mixed
from fastlora.ops.reference import LowRank, apply_dropout
from fastlora.ops.triton import mixed as triton_mixed
from tests.support.tolerance import assert_close

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
K, N, M = 32, 48, 24
SEED = torch.tensor(-1234567890123, device=DEVICE)
ADAPTERS = [(3, 0.7, 0.0, None), (20, 1.5, 0.3, SEED), (1, -0.4, 0.6, SEED)]
CASES = {  # rank, scaling, p, seed of each adapter; the rows of each segment
    "mixed": (ADAPTERS, [(0, 4, 1), (4, 8, 0), (12, 20, 2), (20, 24, 1)]),
    "one rank": ([(4, 0.7, 0.0, None), (4, 2.0, 0.0, None)], [(0, 8, 1), (8, 16, 0), (16, 24, 1)]),
    "one row each": (ADAPTERS[:1] * 3, [(at, at + 1, at % 3) for at in range(M)]),
    "first and last rows of the base": (ADAPTERS, [(3, 9, 2), (9, 17, 0)]),
    "no row of one": (ADAPTERS, [(0, 12, 0), (12, 12, 1), (12, 24, 2)]),
}
pytestmark = pytest.mark.usefixtures("bfloat16")


def make(adapters, dtype, factors=None):
    """x, weight, bias, dy, and A and B of each adapter."""
    generator = torch.Generator().manual_seed(3)

    def random(*sizes):
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    tensors = [random(3, 8, K), random(N, K) / 5, random(N), random(3, 8, N)]
    low = [t for rank, *_ in adapters for t in (random(rank, K) / 5, random(N, rank))]
    return [t.to(dtype).to(DEVICE) for t in tensors] + [
        t.to(factors or dtype).to(DEVICE) for t in low
    ]


def lows_of(adapters, factors):
    return [
        LowRank(factors[2 * at], factors[2 * at + 1], scaling, p, seed)
        for at, (_, scaling, p, seed) in enumerate(adapters)
    ]


def formula(x, weight, bias, lows, segments, **_):
    flat = x.reshape(-1, K)
    parts = list(torch.nn.functional.linear(flat, weight, bias).unbind())
    for start, stop, at in segments:
        low = lows[at].to(x.dtype)
        keep = None if low.seed is None else kernel_mask(low.seed, low.p, M, K, device=x.device)
        s = apply_dropout(flat, low, keep) @ low.a.T
        for row in range(start, stop):
            parts[row] = parts[row] + low.scaling * (s[row] @ low.b.T)
    return torch.stack(parts).view(*x.shape[:-1], N)


def run(function, case, tensors, **options):
    adapters, segments = CASES[case]
    leaves = [t.clone().requires_grad_() for t in (*tensors[:3], *tensors[4:])]
    segments = [Segment(*one) for one in segments]
    y = function(*leaves[:3], lows_of(adapters, leaves[3:]), segments, **options)
    found = torch.autograd.grad(y, leaves, tensors[3], allow_unused=True)
    return [y.detach(), *found]


def exactly(case, tensors):
    return run(formula, case, [t.double() for t in tensors])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", CASES)
def test_forward_and_backward_match_the_formula(case, dtype):
    tensors = make(CASES[case][0], dtype)
    exact, same = exactly(case, tensors), run(formula, case, tensors)
    for _ in range(3):  # the third call repeats the second
        got = run(lora_linear_mixed, case, tensors, backend="triton")
        for g, s, e in zip(got, same, exact, strict=True):
            if e is None:  # of an adapter that no row has
                assert g is None or not g.any()
            else:
                assert_close(g, s, e)


def test_factors_in_float32_keep_their_dtype_and_a_repetition_follows_its_own_rows():
    case = "mixed"
    tensors = make(ADAPTERS, torch.float16, torch.float32)
    exact = exactly(case, tensors)
    wide = run(formula, case, tensors)
    got = run(lora_linear_mixed, case, tensors, backend="triton")
    assert [t.dtype for t in got] == [torch.float16] * 4 + [torch.float32] * 6
    for g, s, e in zip(got, wide, exact, strict=True):
        assert_close(g, s.to(g.dtype), e, eps=torch.finfo(torch.float16).eps)
    x, weight, bias, _, *factors = tensors
    lows = lows_of(ADAPTERS, factors)
    recorded = len(recording._recordings)
    with torch.no_grad():
        for shift in range(4):  # other rows, of as many groups
            segments = [Segment(shift, 9 + shift, 2), Segment(9 + shift, 17, 0)]
            y = lora_linear_mixed(x, weight, bias, lows, segments, backend="triton")
            low64 = lows_of(ADAPTERS, [t.double() for t in factors])
            want = formula(x.double(), weight.double(), bias.double(), low64, segments)
            assert_close(y, formula(x, weight, bias, lows, segments), want)
    assert len(recording._recordings) == recorded + 1


def test_a_recording_serves_one_precision(monkeypatch):
    tensors, launched = make(ADAPTERS, torch.float32), []
    kernel = triton_mixed.grouped_s

    def spy(*arguments, **named):
        launched.append(dispatch.float32_precision())
        return kernel(*arguments, **named)

    monkeypatch.setattr(triton_mixed, "grouped_s", spy)
    for precision in ("ieee", "tf32", "ieee", "tf32"):
        monkeypatch.setattr(dispatch, "float32_precision", lambda precision=precision: precision)
        for _ in range(3):
            run(lora_linear_mixed, "mixed", tensors, backend="triton")
    assert launched == ["ieee"] * 2 + ["tf32"] * 2  # the third call repeats the second
    assert len(recording._recordings) == 4


def test_an_update_of_another_modules_output_and_only_what_is_needed():
    adapters, segments = ADAPTERS, [Segment(*one) for one in CASES["mixed"][1]]
    x, weight, bias, dy, *factors = make(adapters, torch.float32)
    base = torch.nn.functional.linear(x, weight, bias).detach()
    a = factors[0].requires_grad_()
    y = lora_update_mixed(base, x, lows_of(adapters, factors), segments, backend="triton")
    whole = lora_linear_mixed(
        x, weight, bias, lows_of(adapters, factors), segments, backend="triton"
    )
    assert torch.equal(y, whole) and y.data_ptr() != base.data_ptr()
    (da,) = torch.autograd.grad(y, [a], dy)
    exact = exactly("mixed", [t.detach() for t in (x, weight, bias, dy, *factors)])
    same = run(formula, "mixed", [t.detach() for t in (x, weight, bias, dy, *factors)])
    assert_close(da, same[4], exact[4])
    x.requires_grad_()
    (dx,) = torch.autograd.grad(
        lora_update_mixed(base, x, lows_of(adapters, factors), segments, backend="triton"), [x], dy
    )
    only_base = dy.double() @ weight.double()
    assert_close(dx, same[1] - (dy @ weight), exact[1] - only_base)


def test_a_gradient_does_not_keep_the_memory_of_many_groups():
    adapters = [(4, 0.7, 0.0, None)] * 3
    segments = [Segment(at, at + 1, at % 2 + 1 if at else 0) for at in range(M)]
    tensors = make(adapters, torch.float32)
    factors = [t.requires_grad_() for t in tensors[4:]]
    y = lora_linear_mixed(*tensors[:3], lows_of(adapters, factors), segments, backend="triton")
    gradients = torch.autograd.grad(y, factors, tensors[3])
    assert [g.untyped_storage().nbytes() for g in gradients] == [g.nbytes for g in gradients]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    y = formula(*exact[:3], lows_of(adapters, exact[4:]), segments)
    want = torch.autograd.grad(y, exact[4:], exact[3])
    for got, one in zip(gradients, want, strict=True):
        assert_close(got, one.to(got.dtype), one)


def test_checkpointing_and_gradients_of_gradients_have_the_kernels_mask():
    tensors = make(ADAPTERS, torch.float32)

    def recomputed(*given, **options):
        return checkpoint(lora_linear_mixed, *given, use_reentrant=False, **options)

    got, again = (
        run(function, "mixed", tensors, backend="triton")
        for function in (lora_linear_mixed, recomputed)
    )
    for one, other in zip(got, again, strict=True):
        assert torch.equal(one, other)
    segments = [Segment(*one) for one in CASES["mixed"][1]]
    found = []
    for function, dtype in (
        (lora_linear_mixed, torch.float32),
        (formula, torch.float32),
        (formula, torch.float64),
    ):
        x, weight, bias, dy, *factors = (t.to(dtype) for t in tensors)
        x.requires_grad_()
        lows = lows_of(ADAPTERS, [f.requires_grad_() for f in factors])
        y = function(x, weight, bias, lows, segments, backend="triton")
        (dx,) = torch.autograd.grad(y, [x], dy, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), factors[2:4]))
    for g, s, e in zip(*found, strict=True):
        assert_close(g, s, e)


def test_what_kernels_cannot_compute_is_refused_if_they_are_forced(monkeypatch):
    x, weight, bias, _, *factors = make(ADAPTERS, torch.float32)
    lows = lows_of(ADAPTERS, factors)

    def call(lows, segments, x=x, **options):
        return lora_linear_mixed(x, weight, bias, lows, segments, **options)

    both = [Segment(0, M, 0), Segment(0, M, 1)]
    with pytest.raises(BackendError, match="no kernel for the sum of several adapters"):
        call(lows, both, backend="triton")
    other = [lows[1], lows[2]._replace(seed=SEED + 1)]
    parts = [Segment(0, 4, 0), Segment(4, 8, 1)]
    with pytest.raises(BackendError, match="the adapters have seeds of their own"):
        call(other, parts, backend="triton")
    monkeypatch.setattr(triton_mixed, "HIGHEST_RANK", 8)
    with pytest.raises(BackendError, match="rank 20 is above 8, the highest that kernels"):
        call(lows, parts, backend="triton")
    calls = []
    monkeypatch.setattr(triton_mixed, "mixed_forward", lambda *given: calls.append(given))
    monkeypatch.setattr(mixed, "resolve", lambda backend: "torch")
    call(lows, parts, backend="triton")
    assert calls == []


def test_a_model_runs_the_kernels_for_samples_and_reports_it():
    from tests.model.test_several_adapters import IDS, NAMES, net

    model = net(torch.float32, backend="triton").to(DEVICE)
    exact = net(torch.float64, backend="torch").to(DEVICE)
    plain = net(torch.float32, backend="torch").to(DEVICE)
    x = torch.randn(6, 16)
    with use_adapters(model, NAMES), use_adapters(exact, NAMES), use_adapters(plain, NAMES):
        assert_close(
            model.up(x.to(DEVICE)), plain.up(x.to(DEVICE)), exact.up(x.double().to(DEVICE))
        )
        row = {row.path: row for row in explain(model, rows=6).rows}["up.adapter_a"]
        assert row.reason == "triton/operator: 2 adapters, for one sample each, on one base product"
        assert_close(model(IDS.to(DEVICE)), plain(IDS.to(DEVICE)), exact(IDS.to(DEVICE)))
    with (
        use_adapter(model, ["a", "c"]),
        pytest.raises(BackendError, match="no kernel for the sum of several adapters"),
    ):
        model.up(x.to(DEVICE))
