"""`lora_linear_mixed` and `lora_update_mixed` against plain torch in float64: rows of different adapters, and sums of several."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastlora.errors import ConfigError
from fastlora.ops import linear, mixed
from fastlora.ops.dropout import cpu_mask, kernel_mask
from fastlora.ops.mixed import Segment, lora_linear_mixed, lora_update_mixed, neighbours
from fastlora.ops.reference import LowRank, apply_dropout
from tests.support.tolerance import assert_close

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
K, N = 24, 20
ONE, OTHER = torch.tensor(-1234567890123), torch.tensor(77)
# rank, scaling, p, seed
MIXED = [(3, 0.7, 0.0, None), (5, 1.5, 0.3, ONE), (1, -0.4, 0.6, ONE)]
SUMMED = [(3, 0.7, 0.3, ONE), (5, 1.5, 0.3, OTHER), (1, -0.4, 0.0, None)]
CASES = {
    "mixed": (
        MIXED,
        [Segment(0, 4, 1), Segment(4, 8, 0), Segment(12, 20, 2), Segment(20, 24, 1)],
    ),
    "summed": (SUMMED, [Segment(0, 24, at) for at in range(3)]),
    "one for all rows": (MIXED[1:2], [Segment(0, 24, 0)]),
    "no row": (MIXED[:1], [Segment(24, 24, 0)]),
    "no segment": (MIXED[:1], []),
}


def make(adapters, shape=(6, 4), dtype=torch.float64):
    """x, weight, bias, dy, and A and B of each adapter."""
    generator = torch.Generator().manual_seed(3)

    def random(*sizes):
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    x, weight, bias = random(*shape, K), random(N, K) / 5, random(N)
    factors = [t for rank, *_ in adapters for t in (random(rank, K) / 5, random(N, rank))]
    return [t.to(dtype) for t in (x, weight, bias, random(*shape, N), *factors)]


def lows_of(adapters, factors):
    return [
        LowRank(factors[2 * at], factors[2 * at + 1], scaling, p, seed)
        for at, (_, scaling, p, seed) in enumerate(adapters)
    ]


def formula(x: Tensor, weight, bias, lows, segments, base=None):
    """Every row apart: the mask is that of the whole x."""
    flat = x.reshape(-1, K)
    y = F.linear(flat, weight, bias) if base is None else base.reshape(-1, N)
    parts = list(y.unbind())
    for start, stop, at in segments:
        low = lows[at]
        whole = None if low.seed is None else cpu_mask(low.seed, low.p, *flat.shape)
        s = apply_dropout(flat, low, whole) @ low.a.T
        for row in range(start, stop):
            parts[row] = parts[row] + low.scaling * (s[row] @ low.b.T)
    return torch.stack(parts).view(*x.shape[:-1], N)


def run(function, adapters, segments, tensors):
    leaves = [t.clone().requires_grad_() for t in (*tensors[:3], *tensors[4:])]
    y = function(*leaves[:3], lows_of(adapters, leaves[3:]), segments)
    found = torch.autograd.grad(y, leaves, tensors[3], allow_unused=True)
    return [y, *found]


def assert_matches(name, dtype, shape=(6, 4)):
    adapters, segments = CASES[name]
    tensors = make(adapters, shape, dtype)
    got = run(lora_linear_mixed, adapters, segments, tensors)
    same = run(formula, adapters, segments, tensors)
    exact = run(formula, adapters, segments, [t.double() for t in tensors])
    names = ["y", "dx", "dW", "dbias"] + [f"d{f}{at}" for at in range(len(adapters)) for f in "AB"]
    for what, g, s, e in zip(names, got, same, exact, strict=True):
        if s is None:  # an adapter of no row
            assert g is None or not g.any(), what
        else:
            assert_close(g, s, e, what)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward_match_the_formula(name, dtype):
    assert_matches(name, dtype)


@pytest.mark.parametrize("shape", [(24,), (2, 3, 4)], ids=str)
def test_leading_dimensions_are_rows(shape):
    assert_matches("mixed", torch.float32, shape)


@pytest.mark.parametrize("name", ["mixed", "summed"])
def test_dropout_in_blocks_matches_the_formula(name, monkeypatch):
    """These cases have few elements, which are otherwise not processed in blocks."""
    monkeypatch.setattr(linear, "FEW_ELEMENTS", 0)
    assert_matches(name, torch.float32)


def test_the_mask_of_a_part_is_that_of_its_rows():
    for mask in (kernel_mask, cpu_mask):
        whole = mask(ONE, 0.4, 9, 37)
        assert torch.equal(mask(ONE, 0.4, 4, 37, 5), whole[5:])
        assert not torch.equal(whole[:4], whole[5:])


@pytest.mark.parametrize("name", ["mixed", "summed"])
def test_an_update_of_another_modules_output(name):
    adapters, segments = CASES[name]
    x, _, _, dy, *factors = make(adapters)
    y = make(adapters, (6, 4))[3].flip(0)
    found = []
    for function in (lora_update_mixed, lambda y, x, *rest: formula(x, None, None, *rest, base=y)):
        leaves = [t.clone().requires_grad_() for t in (y, x, *factors)]
        z = function(leaves[0], leaves[1], lows_of(adapters, leaves[2:]), segments)
        found.append([z, *torch.autograd.grad(z, leaves, dy)])
    for got, want in zip(*found, strict=True):
        assert_close(got, want, want)
    kept = y.clone()
    with torch.no_grad():
        lora_update_mixed(y, x, lows_of(adapters, factors), segments)
    assert torch.equal(y, kept)  # which belongs to the caller


def test_gradients_of_gradients_and_functorch():
    adapters, segments = CASES["mixed"]
    x, weight, bias, dy, *factors = make(adapters)
    results = []
    for function in (lora_linear_mixed, formula):
        leaves = [t.clone().requires_grad_() for t in (x, *factors)]

        def loss(x, *factors, function=function):
            y = function(x, weight, bias, lows_of(adapters, factors), segments)
            return (y.square() * dy).sum()  # the sine of a large sum would multiply its rounding

        first = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
        again = torch.autograd.grad(sum((g**2).sum() for g in first), leaves)
        through = torch.func.grad(loss, argnums=(0, 1, 2))(x, *factors)
        results.append([*first, *again, *through])
    for got, want in zip(*results, strict=True):
        assert_close(got, want, want)


def test_only_what_is_needed_is_kept_and_computed():
    adapters, segments = CASES["mixed"]
    x, weight, bias, dy, *factors = make(adapters)
    a, b = factors[0].requires_grad_(), factors[3].requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = lora_linear_mixed(x, weight, bias, lows_of(adapters, factors), segments)
    y.backward(dy)
    own = {t.data_ptr() for t in (x, weight, ONE, *factors)}
    fresh = [t for t in kept if t.data_ptr() not in own]
    # S of each segment; no mask, no dropped x, no gathered rows.
    assert sorted(t.shape for t in fresh) == [(4, 3), (4, 5), (4, 5), (8, 1)]
    assert a.grad is not None and b.grad is not None
    assert all(t.grad is None for t in (factors[1], factors[2], factors[4], factors[5]))
    with torch.no_grad():
        z = lora_linear_mixed(x, weight, bias, lows_of(adapters, factors), segments)
    assert torch.equal(z, y) and not z.requires_grad


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_few_rows_of_alike_adapters_are_two_batched_products(dtype, monkeypatch):
    adapters = [(3, 0.7, 0.3, None), (3, 0.7, 0.0, None)]
    x, weight, bias, _, *factors = make(adapters, dtype=dtype)
    segments = [Segment(4, 10, 1), Segment(10, 16, 0), Segment(16, 22, 1)]
    products, bmm = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *given: products.append(1) or bmm(*given))

    def call(function, *given):
        lows, *rest = given
        return function(x, weight, bias, lows, *rest)

    lows = lows_of(adapters, factors)
    exact = formula(
        *(t.double() for t in (x, weight, bias)),
        lows_of(adapters, [t.double() for t in factors]),
        segments,
    )
    with torch.no_grad():
        assert_close(call(lora_linear_mixed, lows, segments), call(formula, lows, segments), exact)
        assert products == [1]
        lows[0].b.fill_(float("inf"))  # reaches no row of another adapter
        got = call(lora_linear_mixed, lows, segments).view(24, N)
        assert (
            got[[*range(10), *range(16, 24)]].isfinite().all() and not got[10:16].isfinite().any()
        )
        # One longer than the others, a gap, another scaling or rank, a seed, many rows, a sum.
        others = [
            (lows, [Segment(0, 6, 0), Segment(6, 13, 1)]),
            (lows, [Segment(0, 6, 0), Segment(7, 13, 1)]),
            ([lows[0], lows[1]._replace(scaling=0.5)], segments),
            ([lows[0], lows[1]._replace(a=lows[1].a[:2], b=lows[1].b[:, :2])], segments),
            ([lows[0], lows[1]._replace(seed=ONE, p=0.5)], segments),
            (lows, [Segment(0, 6, 0), Segment(0, 6, 1)]),
        ]
        for given in others:
            call(lora_linear_mixed, *given)
        monkeypatch.setattr(mixed, "_FEW_ROWS", 5)
        call(lora_linear_mixed, lows, segments)
    call(lora_linear_mixed, lows, segments)  # saves S of each segment
    assert len(products) == 2


def test_autocast_and_checkpointing_keep_dtypes_and_values():
    adapters, segments = CASES["mixed"]
    tensors = make(adapters, dtype=torch.float32)
    narrow = [t.bfloat16() for t in tensors]
    with torch.autocast("cpu", torch.bfloat16):
        got = run(lora_linear_mixed, adapters, segments, [*tensors[:3], narrow[3], *tensors[4:]])
    same = run(formula, adapters, segments, narrow)
    exact = run(formula, adapters, segments, [t.double() for t in narrow])
    assert [t.dtype for t in got] == [torch.bfloat16] + [torch.float32] * (len(got) - 1)
    for g, s, e in zip(got, same, exact, strict=True):
        assert_close(g.to(s.dtype), s, e)

    def recomputed(*arguments):
        return checkpoint(lora_linear_mixed, *arguments, use_reentrant=False)

    for one, other in zip(
        run(recomputed, adapters, segments, tensors),
        run(lora_linear_mixed, adapters, segments, tensors),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_a_weight_that_is_computed_again():
    adapters, segments = CASES["mixed"]
    x, weight, _, dy, *factors = make(adapters)
    calls = []

    def again():
        calls.append(1)
        return weight.clone()

    results = []
    for options in ({}, {"recompute": again}):
        leaves = [t.clone().requires_grad_() for t in (x, *factors)]
        lows = lows_of(adapters, leaves[1:])
        y = lora_linear_mixed(leaves[0], weight, None, lows, segments, **options)
        results.append([y, *torch.autograd.grad(y, leaves, dy)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    assert len(calls) == 1
    with pytest.raises(ConfigError, match="weight: expected no requires_grad, since recompute"):
        lora_linear_mixed(
            x, weight.requires_grad_(), None, lows_of(adapters, factors), segments, recompute=again
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, b: (a[:, 1:], b), r"lora_a: expected \(R, K=24\), got \(5, 23\)"),
        (lambda a, b: (a, b[:, 1:]), r"lora_b: expected \(N=20, R=5\), got \(20, 4\)"),
        (lambda a, b: (a.to("meta"), b), "lora_a: expected x's device cpu, got meta"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(change, message):
    adapters, segments = CASES["mixed"]
    x, weight, bias, _, *factors = make(adapters)
    lows = lows_of(adapters, factors)
    a, b = change(lows[1].a, lows[1].b)
    lows[1] = lows[1]._replace(a=a, b=b)
    with pytest.raises(ConfigError, match=message):
        lora_linear_mixed(x, weight, bias, lows, segments)


def test_neighbours_of_one_adapter_are_one_run():
    samples = ["a", "a", None, "b", "other", "a", "b", "b"]
    assert neighbours(samples, ["b", "a"]) == [(0, 2, 1), (3, 4, 0), (5, 6, 1), (6, 8, 0)]
    assert neighbours(["a", None, "a"], ["a"]) == [(0, 1, 0), (2, 3, 0)]
    assert neighbours([None, "other"], ["a"]) == [] == neighbours([], ["a"])
