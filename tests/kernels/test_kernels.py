"""The Triton kernels against float64, over the table of cases, and the mask bit for bit.

Without a GPU Triton's interpreter runs them, on the tiles of an architecture with tensor descriptors (sm_90) and of one
without (sm_80), in bfloat16 with the operations of `tests/support/interpreter.py`.
"""

from dataclasses import replace
from itertools import product

import pytest
import torch
import triton
import triton.language as tl

from fastlora import lora_linear
from fastlora.kernels.backward import dy_pass, mask_pass, x_pass
from fastlora.kernels.config import ARCHITECTURES, DY_RANK, Problem, fused_rank, tiles
from fastlora.kernels.dropout import Mask, keep_bits
from fastlora.kernels.forward import decode, down_project, start
from fastlora.kernels.gemm import rank_gemm
from fastlora.kernels.reduce import sum_both, sum_partials
from fastlora.kernels.update import rank_product, rank_update_
from fastlora.ops import dispatch, reference
from fastlora.ops.dispatch import TRITON_PLANS
from fastlora.ops.dropout import dropout_threshold, kernel_mask, philox_4x32
from fastlora.ops.reference import LowRank
from fastlora.ops.triton import linear as triton_linear
from tests.support.cases import CASES, Case, Tensors, formula, make
from tests.support.tolerance import TF32_EPS, assert_close

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
HALVES = [torch.float16, torch.bfloat16]
SEED = torch.tensor(-1234567890123)
pytestmark = pytest.mark.usefixtures("bfloat16")
SHAPES = [case for case in CASES if not case.empty]
# Several tiles in every direction, several splits of every sum, and sizes that tensor descriptors support.
LARGE = [
    Case((520,), 1040, 528, 20, p=0.2),
    Case((200,), 96, 160, 4, bias=False),
    Case((130,), 1024, 136, 200, p=0.1),
]
# The smallest in which the rows are split, and then the columns of x and the ranks.
MANY_ROWS, FEW_ROWS = Case((520,), 128, 272, 4, p=0.2), Case((40,), 256, 48, 200)
# A float32 call has the same launches on both architectures (a test checks this), so it runs on one. A GPU uses its own.
LAUNCHES = (
    [(None, dtype) for dtype in (torch.float32, *HALVES)]
    if GPU
    else [*product((80, 90), HALVES), (90, torch.float32)]
)
each_launch = pytest.mark.parametrize(
    ("arch", "dtype"),
    LAUNCHES,
    indirect=["arch"],
    ids=lambda value: str(value).removeprefix("torch."),
)
on_one = pytest.mark.parametrize("arch", [None if GPU else 90], indirect=True)


@pytest.fixture(params=[80, 90] if not GPU else [None])
def arch(request, monkeypatch):
    """The table row whose tiles are used; on a GPU its own."""
    if request.param is not None:
        row = ARCHITECTURES[request.param]
        dispatch._plan.cache_clear()
        monkeypatch.setattr(dispatch, "device_architecture", lambda device: row)
        yield row
        dispatch._plan.cache_clear()
    else:
        yield dispatch.device_architecture(torch.device("cuda"))


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """New memory is filled with NaN, so that reading memory that was not written is detected."""
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def poison(tensor):
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))


def _run(function, t: Tensors, case: Case, seed=SEED) -> list[torch.Tensor]:
    """y, dx, dA, dB as if x were one batch of rows."""
    x, dy = t.x.reshape(-1, case.k).contiguous(), t.dy.reshape(-1, case.n).contiguous()
    if case.strided:  # rows that are not contiguous
        x, dy = x.T.contiguous().T, dy.T.contiguous().T
    return function(x, dy, t, seed if case.p else None)


def _by_plan(plan, case):
    def run(x, dy, t, seed):
        # Adapters of another dtype, cast inside the kernels.
        low = LowRank(t.lora_a.float(), t.lora_b.float(), t.scaling, case.p, seed)
        y, s = triton_linear._forward(x, t.weight, t.bias, *low, plan=plan)
        return [y, *triton_linear._backward(dy, x, t.weight, s, *low, True, True, True, plan=plan)]

    return run


def _by_reference(case):
    def run(x, dy, t, seed):
        low = LowRank(t.lora_a, t.lora_b, t.scaling, case.p, seed)
        y, s = reference.forward(x, t.weight, t.bias, low)
        return [y, *reference.backward(dy, x, t.weight, low, s)]

    return run


def _runs(plan: str, case: Case, dtype: torch.dtype) -> bool:
    if plan not in ("fused", "decode"):
        return True
    fits = case.p == 0 if plan == "fused" else case.m <= 64
    return fits and case.rank <= fused_rank(dtype.itemsize, "ieee")


def _on_device(t: Tensors) -> Tensors:
    return Tensors(
        *(
            None if v is None else v.to(DEVICE)
            for v in (t.x, t.weight, t.bias, t.lora_a, t.lora_b, t.dy)
        ),
        t.scaling,
    )


def _check(
    plan: str | None,
    case: Case,
    dtype: torch.dtype,
    eps: float | None = None,
    t: Tensors | None = None,
) -> None:
    t = _on_device(make(case) if t is None else t)
    got = _run(_by_plan(plan, case), t.to(dtype), case)
    same = _run(_by_reference(case), t.to(dtype), case)
    exact = _run(_by_reference(case), t.to(torch.float64), case)
    for name, g, s, e in zip(("y", "dx", "dA", "dB"), got, same, exact, strict=True):
        # Adapter gradients have the adapters' float32, which is more exact than the product's dtype.
        assert_close(g.to(dtype), s, e, name, eps)


@each_launch
@pytest.mark.parametrize("plan", TRITON_PLANS)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_every_plan_matches_the_reference(case, plan, dtype, arch):
    if _runs(plan, case, dtype):
        _check(plan, case, dtype)


@pytest.mark.skipif(GPU, reason="a GPU is one architecture")
def test_float32_launches_the_same_on_both_architectures(monkeypatch):
    def launches(number):
        dispatch._plan.cache_clear()
        monkeypatch.setattr(dispatch, "device_architecture", lambda device: ARCHITECTURES[number])
        for case in SHAPES:
            x, weight = torch.empty(case.m, case.k), torch.empty(case.n, case.k)
            for plan in (plan for plan in TRITON_PLANS if _runs(plan, case, torch.float32)):
                for dy in (None, torch.empty(case.m, case.n)):
                    choice = dispatch.launch_choice(x, weight, case.rank, case.p > 0, plan, dy)
                    yield case, plan, choice.dx_plan, choice.config

    assert list(launches(80)) == list(launches(90))
    dispatch._plan.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("plan", TRITON_PLANS)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_many_tiles_and_splits_match_the_reference(case, plan, arch):
    if _runs(plan, case, torch.float16):
        _check(plan, case, torch.float16)


@pytest.mark.slow
@on_one
@pytest.mark.parametrize(
    ("plan", "case"),
    [("split", MANY_ROWS), ("split", FEW_ROWS), ("in_place", FEW_ROWS)],
    ids=str,
)
def test_sums_of_parts_match_the_reference_in_bfloat16(plan, case, arch):
    _check(plan, case, torch.bfloat16)


@pytest.mark.parametrize("plan", ["split", "fused"])
def test_sums_are_kept_in_float32(plan, arch):
    """Sums over K, N and M are a thousand times as large in between as at their end, which 16 bits would lose.

    Of whole numbers of four bits: float32 holds the sums over K and N exactly, in whatever order a library adds, and 16 bits do not.
    """
    t = make(Case((64,), 128, 64, 20))
    # lora_b is small: otherwise what is allowed of the low-rank product hides the base product.
    sizes = zip(
        (t.x, t.weight, t.bias, t.lora_a, t.lora_b, t.dy), (15, 15, 15, 15, 1, 15), strict=True
    )
    t = Tensors(*((v * most / 3).round().clamp(-most, most) for v, most in sizes))

    def thrice(tensor, *dims):
        for dim in dims:
            tensor = torch.cat([tensor, tensor, tensor], dim)
        return tensor

    def cancelling(tensor, dim):
        return torch.cat([1024 * tensor, -1024 * tensor, tensor], dim)

    t = Tensors(
        thrice(cancelling(t.x, 1), 0),
        thrice(t.weight, 0, 1),
        thrice(t.bias, 0),
        thrice(t.lora_a, 1),
        thrice(t.lora_b, 0),
        cancelling(cancelling(t.dy, 1), 0),
    )
    _check(plan, Case((192,), 384, 192, 20), torch.bfloat16, t=t)


@pytest.mark.slow
@on_one
@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("subtiles", [1, 2, 4])
@pytest.mark.parametrize("plan", ["split", "fused"])
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_the_epilogue_is_right_in_strips_and_prefetched(
    case, plan, subtiles, prefetch, arch, monkeypatch
):
    """With more ranks than a block the strips load theirs in any case."""
    if not _runs(plan, case, torch.float16):
        return
    table = dispatch.tiles

    def changed(*arguments):
        found = table(*arguments)
        large = ("split", "fused", "dx")
        new = {n: replace(getattr(found, n), prefetch=prefetch, subtiles=subtiles) for n in large}
        return replace(found, **new)

    dispatch._plan.cache_clear()
    monkeypatch.setattr(dispatch, "tiles", changed)
    _check(plan, case, torch.float16)
    dispatch._plan.cache_clear()


def test_the_large_cases_cover_what_they_should():
    problem = Problem(520, 528, 1040, 20, 2, True)
    ours = tiles(ARCHITECTURES[90], problem)
    assert ours.split.descriptor and ours.split.subtiles > 1 and ours.dx.descriptor
    assert min(ours.down.splits, ours.x.splits, ours.dy.splits) > 1
    assert problem.n > ours.dy.block_n and problem.m > ours.split.block_m
    assert DY_RANK < 200, "the last case must take the products of cuBLAS for dS and dB"
    wide = tiles(ARCHITECTURES[90], Problem(130, 136, 1024, 200, 2, True))
    assert wide.split.block_r < 200, "the rank term must need more than one block of ranks"
    assert not tiles(ARCHITECTURES[80], problem).split.descriptor
    many, few = (
        tiles(ARCHITECTURES[90], Problem(c.m, c.n, c.k, c.rank, 2, c.p > 0))
        for c in (MANY_ROWS, FEW_ROWS)
    )
    assert min(many.x.splits, many.dy.splits) > 1 and many.dy.block_n < MANY_ROWS.n
    assert few.down.splits > 1 and max(few.split.block_r, few.update.block_r) < FEW_ROWS.rank


@pytest.mark.parametrize("plan", ["split", "fused"])
@pytest.mark.parametrize("descriptor", [True, False])
def test_a_persistent_program_computes_several_tiles(plan, descriptor):
    """One program for all tiles: the loop over tiles, the order of tiles, and the last tiles being partial."""
    m, k, n, r = 600, 64, 328, 8
    t = _on_device(make(Case((m,), k, n, r)))
    half = t.to(torch.float16)
    ours = tiles(ARCHITECTURES[90], Problem(m, n, k, r, 2, False, aligned=descriptor))
    config = getattr(ours, plan)
    config = replace(config, programs=1, group_m=2)
    assert -(-m // config.block_m) > 2 * config.group_m, (
        "the last group of tile rows must be a partial one"
    )
    s = (half.x.float() @ half.lora_a.float().T).half()
    arguments = {"lora_a": half.lora_a} if plan == "fused" else {}
    low = torch.empty_like(s) if plan == "fused" else s
    y = rank_gemm(half.x, half.weight, half.bias, low, half.lora_b, config, **arguments)
    wide = t.to(torch.float64)
    exact = wide.x @ wide.weight.T + wide.bias + wide.x @ wide.lora_a.T @ wide.lora_b.T
    plain = half.x @ half.weight.T + half.bias + s @ half.lora_b.T
    assert_close(y, plain, exact)
    if plan == "fused":
        assert_close(low, s, wide.x @ wide.lora_a.T)


def _ones(*shape):
    return torch.ones(*shape, device=DEVICE)


# The random number of element (3, 1), in the low half of a word: under this p it equals the threshold, so the element is kept.
EXACT = int(philox_4x32(SEED, torch.tensor(0), torch.tensor(3))[1] & 0xFFFF) / 65536


@pytest.mark.parametrize("p", [0.1, 0.5, EXACT])
def test_every_kernel_with_dropout_uses_the_references_bits(p):
    """With operands of ones and unit matrices the products equal the mask."""
    m, k = 70, 64
    row = ARCHITECTURES[90]
    seed, threshold = SEED.to(DEVICE), dropout_threshold(p)
    keep = kernel_mask(SEED, p, m, k).float().to(DEVICE)
    assert p != EXACT or (keep[3, 1] == 1 and not kernel_mask(SEED, p + 2**-16, m, k)[3, 1])
    mask = Mask(seed, threshold)
    ours = tiles(row, Problem(m, k, k, k, 4, True))
    assert torch.equal(
        down_project(_ones(m, k), torch.eye(k, device=DEVICE), ours.down, mask=mask), keep
    )
    same = torch.eye(k, device=DEVICE)
    for part in start(_ones(m, k), same, same, None, ours.start, mask=mask):
        assert torch.equal(part, keep)
    zero = torch.zeros(k, k, device=DEVICE)
    few, unit = keep[:33].half(), torch.eye(k, dtype=torch.float16, device=DEVICE)
    small = tiles(row, Problem(33, k, k, k, 2, True)).decode
    y, s = decode(_ones(33, k).half(), zero.half(), None, unit, unit, small, mask=mask)
    assert torch.equal(s, few) and torch.equal(y, few)
    rows = tiles(row, Problem(m, k, k, m, 4, True))
    bits = mask_pass(m, k, mask)
    assert torch.equal(_unpack(bits, k).float(), keep)
    # All groups of a tile, a part of them, several blocks of groups, a pass of its own, several tiles, and more tiles than the groups need.
    for n, columns in ((8, k), (8, 20), (8, 504), (8, 520), (300, 520), (300, 128)):
        one_rank = tiles(row, Problem(m, n, columns, 1, 4, True)).dy
        named = {"scale": 1.0, "mask": mask, "columns": columns}
        *_, beside = dy_pass(_ones(m, n), _ones(n, 1), _ones(m, 1), one_rank, **named)
        wanted = kernel_mask(SEED, p, m, columns).to(DEVICE)
        for found in (beside, mask_pass(m, columns, mask)):
            assert found.shape == (m, -(-columns // 8))
            assert torch.equal(_unpack(found, 8 * found.shape[1])[:, :columns], wanted)
    da, dx = x_pass(_ones(m, k), torch.eye(m, device=DEVICE), torch.float32, rows.x, bits=bits)
    assert torch.equal(da.sum(0), keep) and dx is None
    low, up = _ones(m, 1), _ones(k, 1)
    half = tiles(row, Problem(m, k, k, k, 2, True))
    assert half.dx.descriptor
    base = torch.zeros(m, k, device=DEVICE)
    assert torch.equal(rank_update_(base, low, up, ours.update, bits=bits), keep)
    assert torch.equal(rank_product(low, up, None, ours.update, bits=bits), keep)
    _, dx = x_pass(_ones(m, k), low, torch.float32, rows.x, bits=bits, lora_a=up.T)
    assert torch.equal(dx, keep)
    dx = rank_gemm(torch.zeros(m, k, device=DEVICE), zero, None, low, up, ours.dx, bits=bits)
    assert torch.equal(dx, keep)
    blank = torch.zeros(m, k, dtype=torch.float16, device=DEVICE)
    dx = rank_gemm(blank, zero.half(), None, low.half(), up, half.dx, bits=bits)
    assert torch.equal(dx.float(), keep)


@on_one
@pytest.mark.parametrize("plan", ["split", "accumulate", "in_place", "decode"])
def test_a_factor_beyond_float16_makes_no_nan(plan, arch):
    """With p' = 1 - 2^-16 the factor is 65,536: S and dS are stored without it, so nothing overflows where nothing is kept."""
    case = Case((40,), 32, 48, 4, p=1 - 2**-16)
    assert not kernel_mask(SEED, case.p, 40, 32).any()
    t = _on_device(make(case)).to(torch.float16)
    y, dx, da, db = _run(_by_plan(plan, case), t, case)
    wide = t.to(torch.float64)
    assert_close(y, t.x @ t.weight.T + t.bias, wide.x @ wide.weight.T + wide.bias)
    assert_close(dx, t.dy @ t.weight, wide.dy @ wide.weight)
    assert da.eq(0).all() and db.eq(0).all()


def test_a_threshold_of_zero_keeps_all():
    mask = Mask(SEED.to(DEVICE), 0)
    assert not mask.drops and mask_pass(4, 16, mask) is None
    config = tiles(ARCHITECTURES[90], Problem(33, 16, 16, 16, 4, True)).down
    x, unit = _ones(33, 16), torch.eye(16, device=DEVICE)
    assert torch.equal(down_project(x, unit, config, mask=mask), x)


@triton.jit
def _write_bits(
    out_ptr,
    seed_ptr,
    threshold,
    first_row,
    first_group,
    BLOCK_M: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    o_row, o_group = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_G)
    bits = keep_bits(tl.load(seed_ptr), threshold, first_row + o_row, first_group + o_group)
    tl.store(out_ptr + o_row[:, None] * BLOCK_G + o_group[None, :], bits)


def _unpack(bits, columns):
    return (
        ((bits[:, :, None] >> torch.arange(8, device=bits.device)) & 1)
        .reshape(len(bits), columns)
        .bool()
    )


@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
@pytest.mark.parametrize("seed", [0, -1, 2**62 + 99, -(2**63)])
def test_the_mask_is_the_references_bit_for_bit(seed, p):
    rows, groups, first_row, first_group = 16, 4, 37, 3
    out = torch.empty(rows, groups, dtype=torch.int32, device=DEVICE)
    threshold = dropout_threshold(p)
    key = torch.tensor(seed, device=DEVICE)
    _write_bits[(1,)](out, key, threshold, first_row, first_group, rows, groups)
    full = kernel_mask(seed, p, rows, 8 * (first_group + groups), first_row)
    assert torch.equal(_unpack(out.cpu(), 8 * groups), full[:, 8 * first_group :])


def test_a_dropped_element_is_zero_even_if_it_was_infinite():
    seed, p = SEED.to(DEVICE), 0.5
    config = tiles(ARCHITECTURES[90], Problem(32, 16, 16, 16, 4, True)).down
    assert config.block_m == 32, (
        "a full tile: a row past the end repeats row 0 under another mask, and is not stored"
    )
    keep = kernel_mask(SEED, p, 32, 16).to(DEVICE)
    x = torch.where(keep, 1.0, float("inf"))
    threshold = dropout_threshold(p)
    mask = Mask(seed, threshold)
    s = down_project(x, torch.eye(16, device=DEVICE), config, mask=mask)
    assert torch.equal(s, keep.float())
    rows = tiles(ARCHITECTURES[90], Problem(32, 16, 16, 32, 4, True)).x
    bits = mask_pass(32, 16, mask)
    da, _ = x_pass(x, torch.eye(32, device=DEVICE), torch.float32, rows, bits=bits)
    assert torch.equal(da.sum(0), keep.float())


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("plan", TRITON_PLANS)
def test_an_infinity_stays_in_its_row_and_column(plan, arch):
    """In float16 one row of S overflows, and one of B: the ranks that fill a block must not multiply them by 0."""
    row, column = 7, 5
    t = _on_device(make(Case((40,), 48, 32, 8)))
    t.x[row], t.lora_a[0], t.lora_b[:, 0] = 300.0, 300.0, 1.0
    half, wide = t.to(torch.float16), t.to(torch.float64)
    t.lora_b[column, 0] = 1e6
    low = LowRank(t.lora_a, t.lora_b, t.scaling)
    y, s = triton_linear._forward(half.x, half.weight, half.bias, *low, plan=plan)
    assert s[row, 0] == float("inf") and torch.isfinite(s[:row]).all()
    others = [n for n in range(32) if n != column]
    assert (y[row, others] == float("inf")).all()
    finite = y[[m for m in range(40) if m != row]][:, others]
    same, exact = (
        reference.forward(v.x, v.weight, v.bias, LowRank(v.lora_a, v.lora_b, t.scaling))[0]
        for v in (half, wide)
    )
    same, exact = (v[[m for m in range(40) if m != row]][:, others] for v in (same, exact))
    assert_close(finite, same, exact)


@pytest.mark.parametrize("splits", [(5, 70), (1, 5), (5, 1), (2, 32)])
def test_two_sums_in_one_launch_are_the_separate_sums(splits):
    parts = [torch.randn(n, 37, w, device=DEVICE) for n, w in zip(splits, (70, 9), strict=True)]
    dtypes = (torch.float32, torch.float16)
    for got, part, dtype in zip(sum_both(*parts, dtypes), parts, dtypes, strict=True):
        assert_close(got, part.sum(0).to(dtype), part.double().sum(0))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("splits", [1, 5, 32, 70])
def test_partial_sums_are_sums(splits, dtype):
    # Sums that float32 represents exactly, and that 16 bits would lose beside the first part.
    part = torch.randint(-256, 256, (splits, 37, 70), device=DEVICE) / 64
    part[0] += 4096
    part[-1] -= 4096
    got = sum_partials(part, dtype)
    assert_close(got, part.sum(0).to(dtype), part.double().sum(0))
    assert torch.equal(got, sum_partials(part, dtype))


@on_one
@pytest.mark.parametrize("plan", TRITON_PLANS)
def test_every_operand_may_be_strided(plan, arch):
    """Weight and adapters stored by columns, a bias with a stride, an x with a row pitch: views as in real models."""
    case = Case((40,), 48, 32, 8)
    t = _on_device(make(case))
    straight = _run(_by_plan(plan, case), t, case)
    t.weight, t.lora_a, t.lora_b = (v.T.contiguous().T for v in (t.weight, t.lora_a, t.lora_b))
    t.bias = torch.stack([t.bias, -t.bias], 1)[:, 0]
    wide = torch.cat([t.x, t.x], 1)

    def run(x, dy, t, seed):
        return _by_plan(plan, case)(wide[:, : case.k], dy, t, seed)

    exact = _run(_by_reference(case), t.to(torch.float64), case)
    for g, s, e in zip(_run(run, t, case), straight, exact, strict=True):
        assert_close(g, s, e)


@on_one
@pytest.mark.parametrize("plan", TRITON_PLANS)
@pytest.mark.parametrize("layout", ["by columns", "at an odd address"])
def test_adapters_may_have_any_layout_beside_aligned_matrices(plan, layout, arch):
    """Tensor descriptors read x and the weight; A and B may be views, as under FSDP."""
    case = Case((40,), 64, 96, 8)
    t = _on_device(make(case)).to(torch.float16)
    a, b = t.lora_a, t.lora_b
    if layout == "by columns":
        a, b = (v.T.contiguous().T for v in (a, b))
    else:
        a, b = (torch.cat([v.new_zeros(1), v.flatten()])[1:].view(v.shape) for v in (a, b))

    def run(a, b):
        low = LowRank(a, b, t.scaling)
        y, s = triton_linear._forward(t.x, t.weight, t.bias, *low, plan=plan)
        needs = (True, True, True)
        return [y, *triton_linear._backward(t.dy, t.x, t.weight, s, *low, *needs, plan=plan)]

    wide = t.to(torch.float64)
    low = LowRank(wide.lora_a, wide.lora_b, t.scaling)
    y, s = reference.forward(wide.x, wide.weight, wide.bias, low)
    exact = [y, *reference.backward(wide.dy, wide.x, wide.weight, low, s)]
    for one, other, e in zip(run(a, b), run(t.lora_a, t.lora_b), exact, strict=True):
        assert_close(one, other, e)


@on_one
@pytest.mark.parametrize("rows", [40, 520], ids=["one part", "several parts"])
def test_each_adapter_gradient_has_its_adapters_dtype(rows, arch):
    case = Case((rows,), 48, 32, 8)
    t = _on_device(make(case)).to(torch.float16)
    low = LowRank(t.lora_a.float(), t.lora_b, t.scaling)
    choice = dispatch.launch_choice(t.x, t.weight, 8, False, "split", t.dy)
    assert (min(choice.config.x.splits, choice.config.dy.splits) > 1) == (rows == 520)
    _, s = triton_linear._forward(t.x, t.weight, t.bias, *low, plan="split")
    found = triton_linear._backward(t.dy, t.x, t.weight, s, *low, True, True, True, plan="split")
    assert [g.dtype for g in found] == [torch.float16, torch.float32, torch.float16]


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("rank", [16, 17, 32, 33, 64])
def test_float32_is_correct_at_every_rank_under_the_chosen_plan(rank, precision, arch, monkeypatch):
    monkeypatch.setattr(dispatch, "float32_precision", lambda: precision)
    case = Case((40,), 16, 16, rank)
    if precision == "ieee" or not GPU:  # the interpreter's products are exact
        _check(None, case, torch.float32)
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # of the plain result
    try:
        _check(None, case, torch.float32, TF32_EPS)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("number", ARCHITECTURES)
def test_the_inner_dimension_of_every_product_has_at_least_16_elements(number):
    """A compiler refuses fewer; the interpreter does not. Every other block is 16 or more by its rule."""
    row = ARCHITECTURES[number]
    for itemsize, precision in ((2, "ieee"), (4, "ieee"), (4, "tf32")):
        for m, n, k, rank in product((1, 33, 64, 4096), (8, 4096), (8, 4096), (1, 33, 64, 256)):
            for dropout, aligned in product((True, False), repeat=2):
                q = Problem(m, n, k, rank, itemsize, dropout, precision, aligned)
                t = tiles(row, q)
                inner = [c.block_k for c in (t.fused, t.split, t.dx, t.down, t.decode)]
                inner += [t.dy.block_m, t.dy.block_n, t.x.block_m]
                inner += [c.block_r for c in (t.fused, t.split, t.dx, t.update, t.decode)]
                assert min(inner) >= 16, (q, t)


@pytest.mark.parametrize("number", ARCHITECTURES)
def test_a_tile_of_b_is_narrower_the_more_ranks_it_has(number):
    """`start` loads it in float32, and several are in flight: at most 16 KiB, or the least width."""
    for itemsize, rank, aligned in product((2, 4), (1, 16, 33, 64, 256), (True, False)):
        q = Problem(4096, 4096, 4096, rank, itemsize, False, aligned=aligned)
        config = tiles(ARCHITECTURES[number], q).start
        assert config.block_n == 32 or 4 * config.block_r * config.block_n <= 16_384, (q, config)


def test_kernels_refuse_ranks_that_their_tiles_do_not_support():
    config = tiles(ARCHITECTURES[90], Problem(16, 16, 16, 32, 4, False)).fused
    x, low = torch.zeros(16, 16, device=DEVICE), torch.zeros(16, 32, device=DEVICE)
    with pytest.raises(ValueError, match="lora_a: expected at most 16 ranks, got 32"):
        rank_gemm(x, x, None, low, low, config, lora_a=low.T.contiguous())
    ours = tiles(ARCHITECTURES[90], Problem(16, 16, 16, 64, 4, False))
    wide = torch.zeros(16, 64, device=DEVICE)
    with pytest.raises(
        ValueError, match=r"expected at most \(16, 16\) rows and ranks, got \(16, 64\)"
    ):
        decode(x, x, None, wide.T.contiguous(), wide, ours.decode)
    with pytest.raises(ValueError, match="lora_a: expected at most 16 ranks, got 32"):
        start(x, low.T.contiguous(), low, None, replace(ours.start, block_r=16))
    with pytest.raises(ValueError, match="s: expected at most 32 ranks, got 64"):
        dy_pass(x, wide, wide, ours.dy, scale=1.0)


@pytest.mark.slow
def test_two_runs_agree_bit_for_bit(arch):
    case = Case((260,), 1040, 528, 4, p=0.2)
    t = _on_device(make(case)).to(torch.float16)
    first, second = (_run(_by_plan("split", case), t, case) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@on_one
@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)]
)
def test_only_what_is_needed_is_computed(needs, arch, monkeypatch):
    case = SHAPES[1]
    t = _on_device(make(case))
    launched = []
    for name in ("dy_pass", "x_pass", "rank_gemm", "rank_update_"):
        function = getattr(triton_linear, name)

        def spy(*args, _name=name, _function=function, **named):
            launched.append((_name, named))
            return _function(*args, **named)

        monkeypatch.setattr(triton_linear, name, spy)
    low = LowRank(t.lora_a, t.lora_b, 1.0, case.p, SEED)
    _, s = triton_linear._forward(t.x, t.weight, t.bias, *low)
    arguments = (t.dy, t.x, t.weight, s, *low)
    everything = triton_linear._backward(*arguments, True, True, True, "split")
    launched.clear()
    some = triton_linear._backward(*arguments, *needs, "split")
    assert len(some) == sum(needs)
    for one, other in zip(
        some, [g for g, n in zip(everything, needs, strict=True) if n], strict=True
    ):
        assert torch.equal(one, other)
    names = [name for name, _ in launched]
    assert ("rank_gemm" in names) == needs[0] and ("x_pass" in names) == needs[1]
    (of_dy,) = [named for name, named in launched if name == "dy_pass"]
    assert of_dy["needs_db"] == needs[2] and of_dy["needs_ds"] == (needs[0] or needs[1])


@on_one
def test_an_expanded_dy_is_read_without_a_copy(arch):
    case = Case((40,), 48, 32, 8)
    t = _on_device(make(case))
    dy = t.dy[:1].expand(40, 32)
    s = t.x @ t.lora_a.T

    low = LowRank(t.lora_a, t.lora_b, 1.0)

    def run(dy):
        return triton_linear._backward(dy, t.x, t.weight, s, *low, True, True, True, "split")

    wide = t.to(torch.float64)
    exact = reference.backward(dy.double(), wide.x, wide.weight, low.to(torch.float64), s.double())
    for one, other, e in zip(run(dy), run(dy.contiguous()), exact, strict=True):
        assert_close(one, other, e)


def test_dy_pass_omits_what_is_not_needed():
    config = tiles(ARCHITECTURES[90], Problem(20, 24, 16, 4, 4, False)).dy
    dy, b, s = torch.randn(20, 24), torch.randn(24, 4), torch.randn(20, 4)
    dy, b, s = dy.to(DEVICE), b.to(DEVICE), s.to(DEVICE)
    assert dy_pass(dy, b, s, config, scale=1.0, needs_ds=False)[0] is None
    assert dy_pass(dy, b, s, config, scale=1.0, needs_db=False)[1] is None


@each_launch
@pytest.mark.parametrize("case", CASES, ids=str)
def test_lora_linear_through_autograd_matches_the_reference(case, dtype, arch):
    t = _on_device(make(case))

    def run(t, function, **named):
        x, a, b = (v.detach().requires_grad_() for v in (t.x, t.lora_a, t.lora_b))
        y = function(x, t.weight, t.bias, a, b, t.scaling, case.p, SEED, **named)
        return [y, *torch.autograd.grad(y, (x, a, b), t.dy)]

    # An empty tensor launches nothing, so forcing Triton on it is refused.
    got = run(t.to(dtype), lora_linear, backend="auto" if case.empty else "triton")
    same, exact = (run(t.to(d), formula, triton=True) for d in (dtype, torch.float64))
    for name, g, s, e in zip(("y", "dx", "dA", "dB"), got, same, exact, strict=True):
        assert_close(g, s, e, name)
