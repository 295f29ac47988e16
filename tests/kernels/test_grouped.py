"""The kernels of rows in groups against float64, in Triton's interpreter or on a GPU; bfloat16 as in `test_kernels.py`."""

from dataclasses import dataclass, replace
from itertools import pairwise, product

import pytest
import torch
import triton
import triton.language as tl

from fastlora.errors import BackendError, ConfigError
from fastlora.kernels import grouped, grouped_backward, recording, reduce
from fastlora.kernels.config import (
    ARCHITECTURES,
    GROUPED_RANK,
    GemmConfig,
    GroupedTiles,
    PassConfig,
    Problem,
    grouped_tiles,
)
from fastlora.kernels.grouped import block_of
from fastlora.ops import dispatch
from fastlora.ops.dropout import kernel_mask
from fastlora.ops.triton import grouped as triton_grouped
from fastlora.ops.triton.grouped import grouped_add_, grouped_da_dx_, grouped_ds_db, grouped_s
from tests.support.tolerance import assert_close

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SEED = -1234567890123
NAN = float("nan")
pytestmark = pytest.mark.usefixtures("bfloat16")


@dataclass(frozen=True)
class Case:
    """Groups of these sizes; `before` and `after` are rows without a group. thresholds: of the dropout, one for each group."""

    sizes: tuple[int, ...]
    k: int
    n: int
    rank: int
    thresholds: tuple[int, ...] = ()
    before: int = 0
    after: int = 0

    def __str__(self) -> str:
        sizes = "+".join(map(str, (self.before, *self.sizes, self.after)))
        return f"{sizes}-k{self.k}-n{self.n}-r{self.rank}{'-dropout' if self.thresholds else ''}"

    @property
    def m(self) -> int:
        return self.before + sum(self.sizes) + self.after


CASES = [
    Case((5, 0, 40, 17), 48, 40, 4, (6554, 40000, 0, 65535), before=3, after=2),
    Case((37,), 33, 31, 16, (9000,)),
    Case((1,) * 8, 64, 80, 16),
    Case((0, 33, 0), 65, 129, 40, (1, 1000, 30000), before=1),
    Case((3, 20, 1, 9, 0, 12, 2, 7), 24, 20, 64, after=5),
    Case((0, 0, 9), 16, 16, 100, (20000, 20000, 20000)),
]
# Several blocks, chunks and parts of every sum: more parts than are added at once, groups of one chunk beside longer ones.
LONG = [
    Case((20, 0, 7, 140, 16, 17), 40, 50, 4, (6554, 1, 0, 40000, 9, 20000), before=5, after=3),
    Case((40, 60), 48, 32, 40, (6554, 0)),
]
SMALL = GroupedTiles(
    down=PassConfig(16, 0, 16, 64, 4, 2, splits=3),
    up=GemmConfig(16, 32, 0, 16, 4, 2),
    dy=PassConfig(16, 32, 0, 16, 4, 2, splits=24),
    x=PassConfig(16, 0, 32, 64, 4, 2, splits=24),
)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """New memory is filled with NaN, so that reading memory that was not written is detected."""
    empty = torch.empty

    def poison(*arguments, **named):
        made = empty(*arguments, **named)
        return made.fill_(NAN) if made.is_floating_point() and not made.is_meta else made

    monkeypatch.setattr(torch, "empty", poison)


@pytest.fixture
def small(monkeypatch):
    """Small tiles, so that few rows are many blocks and chunks."""

    monkeypatch.setattr(triton_grouped, "grouped_tiles", lambda *_: SMALL)
    triton_grouped._cached_tiles.cache_clear()
    yield
    triton_grouped._cached_tiles.cache_clear()


class Batch:
    """Tensors of a case. x, dy and the outputs have NaN in the rows without a group of what is only read."""

    def __init__(self, case: Case, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).bfloat16().float().to(DEVICE)

        m, k, n, r, groups = case.m, case.k, case.n, case.rank, len(case.sizes)
        self.case, self.dtype = case, dtype
        self.x, self.dy, self.y, self.dx = (
            draw(m, columns).to(dtype) for columns in (k, n, n, k)
        )  # fmt: skip
        self.a, self.b = draw(groups, r, k), draw(groups, n, r)
        for g in range(groups):  # smaller ranks than the largest, filled with zeros
            self.a[g, r - g % 3 :] = 0
            self.b[g, :, r - g % 3 :] = 0
        self.scale = torch.linspace(0.5, 2, groups).to(DEVICE)
        bounds = torch.tensor([case.before, *case.sizes]).cumsum(0)
        self.rows = [slice(*pair) for pair in pairwise(bounds.tolist())]
        self.offsets = bounds.int().to(DEVICE)
        self.mask = {}
        if case.thresholds:
            thresholds = torch.tensor(case.thresholds).to(DEVICE)
            self.mask = {"seed": torch.tensor(SEED, device=DEVICE), "thresholds": thresholds}
        self.outside = torch.ones(m, dtype=torch.bool)
        for rows in self.rows:
            self.outside[rows] = False
        self.x[self.outside], self.dy[self.outside] = NAN, NAN

    def keep(self, group: int) -> torch.Tensor:
        rows, columns = self.rows[group], self.case.k
        p = self.case.thresholds[group] / 65536 if self.case.thresholds else 0
        count = rows.stop - rows.start
        return kernel_mask(SEED, p, count, columns, first_row=rows.start).to(DEVICE)

    def run(self) -> dict[str, torch.Tensor]:
        """By the kernels, rows of S and dS without a group set to 0."""
        y, dx = self.y.clone(), self.dx.clone()
        s = grouped_s(self.x, self.a, self.offsets, **self.mask)
        assert grouped_add_(y, s, self.b, self.scale, self.offsets) is y
        ds, db = grouped_ds_db(self.dy, s, self.b, self.scale, self.offsets)
        da = grouped_da_dx_(dx, self.x, ds, self.a, self.scale, self.offsets, **self.mask)
        s[self.outside], ds[self.outside] = 0, 0
        return {"s": s, "y": y, "ds": ds, "db": db, "da": da, "dx": dx}

    def expected(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """By torch in `dtype`, from the values that the kernels multiply."""
        x, dy, y, dx = (t.to(dtype, copy=True) for t in (self.x, self.dy, self.y, self.dx))
        a, b = (t.to(self.dtype).to(dtype) for t in (self.a, self.b))
        s, ds = x.new_zeros(self.case.m, self.case.rank), x.new_zeros(self.case.m, self.case.rank)
        da, db = torch.zeros_like(a), torch.zeros_like(b)
        for g, rows in enumerate(self.rows):
            keep, scale = self.keep(g), self.scale[g].item()
            kept = torch.where(keep, x[rows], 0.0)
            s[rows], ds[rows] = kept @ a[g].T, dy[rows] @ b[g]
            y[rows] += scale * (s[rows] @ b[g].T)
            dx[rows] += torch.where(keep, scale * (ds[rows] @ a[g]), 0.0)
            da[g], db[g] = scale * (ds[rows].T @ kept), scale * (dy[rows].T @ s[rows])
        return {"s": s, "y": y, "ds": ds, "db": db, "da": da, "dx": dx}


def _check(batch: Batch) -> None:
    got, same, exact = batch.run(), batch.expected(batch.dtype), batch.expected(torch.float64)
    for name, result in got.items():
        # The factors are float32, and so are their gradients.
        wanted = torch.float32 if name in ("da", "db") else batch.dtype
        assert result.dtype == wanted and result.is_contiguous()
        assert_close(result.to(batch.dtype), same[name], exact[name], name)
        if name in ("y", "dx"):
            before = batch.y if name == "y" else batch.dx
            assert torch.equal(result[batch.outside], before[batch.outside])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_result_matches_the_reference(case, dtype):
    _check(Batch(case, dtype))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "dtype"),
    [(LONG[0], torch.float16), (LONG[1], torch.float32)],
    ids=str,
)
def test_long_groups_match_the_reference(case, dtype, small):
    _check(Batch(case, dtype))


def test_the_long_cases_have_what_they_should():
    case = LONG[0]
    for config in (SMALL.dy, SMALL.x):
        chunk = -(-case.m // config.splits // 16) * 16
        chunks = [-(-size // chunk) for size in case.sizes]
        assert max(chunks) > grouped_backward._PARTS and 1 in chunks and 0 in chunks and 2 in chunks
    assert case.rank <= SMALL.dy.block_r < LONG[1].rank <= SMALL.x.block_r
    assert SMALL.up.block_r < LONG[1].rank


def test_one_group_of_all_rows_is_divided(monkeypatch):
    """By the tiles of the table: the chunks do not depend on the sizes."""
    monkeypatch.setattr(
        dispatch, "device_architecture", lambda device: replace(ARCHITECTURES[90], sms=3)
    )
    _check(Batch(Case((0, 560, 0), 32, 16, 4, (0, 9000, 0)), torch.float16))


@pytest.mark.parametrize("number", ARCHITECTURES)
def test_chunks_fill_the_gpu_and_blocks_fit_small_groups(number):
    arch = ARCHITECTURES[number]
    for itemsize, rank in product((2, 4), (4, 64)):
        one = grouped_tiles(arch, Problem(8192, 4096, 4096, rank, itemsize, False), 1)
        for config in (one.dy, one.x):
            width = config.block_n or config.block_k
            assert config.splits * (4096 // width) >= arch.sms
        many = grouped_tiles(arch, Problem(64, 4096, 4096, rank, itemsize, False), 64)
        assert {c.block_m for c in (many.down, many.up, many.dy, many.x)} == {16}
        for config in (one, many):
            for part in (config.down, config.up, config.x):
                assert min(part.block_r, part.block_m) >= 16
            assert max(config.down.block_r, config.x.block_r) >= rank


@triton.jit
def _blocks_kernel(offsets_ptr, out_ptr, M, G, size):
    group, begin, end, first = block_of(offsets_ptr, M, G, tl.program_id(0), size)
    out_ptr += 4 * tl.program_id(0)
    tl.store(out_ptr, group)
    tl.store(out_ptr + 1, begin)
    tl.store(out_ptr + 2, end)
    tl.store(out_ptr + 3, first)


@pytest.mark.parametrize(
    "sizes", [(0,), (7,), (0, 0, 0), (1, 1, 1, 1, 1), (16, 0, 33, 15, 0, 17), (2, 50, 3, 48, 1)]
)
@pytest.mark.parametrize("before", [0, 5, 31])
def test_blocks_cover_each_row_once(sizes, before):
    size, m = 16, before + sum(sizes) + 4
    offsets = torch.tensor([before, *sizes], device=DEVICE).cumsum(0).int()
    bounds = offsets.tolist()
    count = m // size + len(sizes)
    found = torch.zeros(count, 4, dtype=torch.int32, device=DEVICE)
    _blocks_kernel[(count,)](offsets, found, m, len(sizes), size)
    covered, firsts, parts = [], [], []
    for group, begin, end, first in found.tolist():
        if first < end or first == begin:
            assert (begin, end) == (bounds[group], bounds[group + 1])
            rows = range(first, min(first + size, end))
            covered += rows
            firsts += [group] if first == begin else []
            if end - begin > size and rows:
                parts.append(2 * (first // size) + (first == begin))
    assert covered == list(range(before, bounds[-1])), "each row of a group once, in order"
    assert firsts == [*range(len(sizes))], "each group has a first block, an empty one too"
    assert len({*parts}) == len(parts) and all(p < 2 * -(-m // size) for p in parts)


@pytest.mark.parametrize(
    ("dtype", "integers"), [(torch.float32, torch.int64), (torch.float16, torch.int32)], ids=str
)
def test_the_mask_is_the_references_bit_for_bit(dtype, integers, small):
    """With operands of ones and unit matrices the products equal the mask, of the batch's rows and under each group's threshold."""
    case = Case((21, 0, 14), 32, 32, 32, (9000, 5, 0), before=3)
    batch = Batch(case)
    keep = torch.cat([batch.keep(g) for g in range(3)]).float()
    assert 0 < keep[:21].mean() < 1 and keep[21:].eq(1).all()
    mask = batch.mask | {"thresholds": batch.mask["thresholds"].to(integers)}
    ones, rows = torch.ones(case.m, 32, device=DEVICE), slice(3, None)
    unit = torch.eye(32, device=DEVICE).expand(3, 32, 32)
    scale = torch.ones(3, device=DEVICE)
    x = ones.to(dtype)
    assert torch.equal(grouped_s(x, unit, batch.offsets, **mask)[rows].float(), keep)
    low = torch.zeros(case.m, 32, dtype=dtype, device=DEVICE)
    low[:, 0] = 1
    up, dx = torch.ones(3, 32, 32, device=DEVICE), torch.zeros_like(x)
    da = grouped_da_dx_(dx, x, low, up, scale, batch.offsets, **mask)
    assert torch.equal(dx[rows].float(), keep) and dx[:3].eq(0).all()
    assert torch.equal(da[:, 0], torch.stack([batch.keep(g).float().sum(0) for g in range(3)]))
    dx.zero_()
    named = mask | {"needs_da": False}
    assert grouped_da_dx_(dx, x, low, up, scale, batch.offsets, **named) is None
    assert torch.equal(dx[rows].float(), keep)


def test_a_dropped_element_is_zero_even_if_it_was_infinite():
    batch = Batch(Case((16,), 16, 16, 16, (30000,)), torch.float16)
    keep = batch.keep(0)
    x = torch.where(keep, 1.0, float("inf")).half()
    unit = torch.eye(16, device=DEVICE)[None]
    s = grouped_s(x, unit, batch.offsets, **batch.mask)
    assert torch.equal(s, keep.half())
    scale, dx = torch.ones(1, device=DEVICE), torch.zeros_like(x)
    da = grouped_da_dx_(dx, x, unit[0].half(), unit, scale, batch.offsets, **batch.mask)
    assert torch.equal(da[0], keep.float()) and torch.isfinite(dx).all()


def test_sums_are_kept_in_float32(small):
    """Sums over K, N and M are a thousand times as large in between as at their end, which 16 bits would lose."""
    batch = Batch(Case((120, 60), 96, 96, 4), torch.bfloat16)

    def cancelling(t, dim):
        part = t.narrow(dim, 0, t.shape[dim] // 3)
        return torch.cat([1024 * part, -1024 * part, part], dim)

    batch.x = cancelling(batch.x, 1)
    batch.dy = cancelling(batch.dy, 1)
    batch.a, batch.b = (torch.cat([t.narrow(d, 0, 32)] * 3, d) for t, d in ((batch.a, 2), (batch.b, 1)))  # fmt: skip
    for rows in batch.rows:
        batch.x[rows], batch.dy[rows] = (
            torch.cat([t[rows][: len(t[rows]) // 3]] * 3) for t in (batch.x, batch.dy)
        )  # fmt: skip
        third = len(batch.x[rows]) // 3
        sign = torch.tensor([1.0] * third + [-1.0] * third + [2.0**-10] * third, device=DEVICE)
        batch.dy[rows] *= sign[:, None]
    _check(batch)


def test_a_factor_beyond_float16_makes_no_nan():
    batch = Batch(Case((20,), 32, 32, 4, (65535,)), torch.float16)
    assert not batch.keep(0).any()
    batch.scale = torch.tensor([131072.0], device=DEVICE)
    got = batch.run()
    assert torch.equal(got["y"], batch.y) and torch.equal(got["dx"], batch.dx)
    assert got["da"].eq(0).all() and got["db"].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("rank", [4, 40])
def test_gradients_of_empty_groups_are_zero(dtype, rank, small):
    batch = Batch(Case((0, 0, 0), 16, 24, rank, (1, 2, 3), before=100, after=20), dtype)
    got = batch.run()
    assert got["da"].eq(0).all() and got["db"].eq(0).all()
    assert torch.equal(got["y"], batch.y) and torch.equal(got["dx"], batch.dx)


@pytest.mark.parametrize(
    ("sizes", "before"), [((0, 0), 0), ((), 0), ((), 4)], ids=["no rows", "nothing", "no groups"]
)
def test_nothing_to_launch(sizes, before, monkeypatch):
    monkeypatch.setattr(grouped, "launch", None)
    monkeypatch.setattr(grouped_backward, "launch", None)
    batch = Batch(Case(sizes, 16, 24, 4, before=before))
    got = batch.run()
    assert torch.equal(got["y"], batch.y) and torch.equal(got["dx"], batch.dx)
    assert got["da"].shape == batch.a.shape and got["db"].shape == batch.b.shape
    assert got["da"].eq(0).all() and got["db"].eq(0).all()
    assert got["s"].shape == got["ds"].shape == (before, 4)


def test_operands_may_be_strided():
    """Rows with a pitch, by columns and repeated, factors by columns: the results are those of plain tensors, and a pitch stays as it is."""
    case = Case((9, 0, 30), 48, 40, 8, (9000, 1, 0), before=2, after=1)
    batch, plain = Batch(case), Batch(case)
    batch.dy = plain.dy = plain.dy[5:6].expand(case.m, case.n)
    batch.x = batch.x.T.contiguous().T
    batch.a, batch.b = (t.mT.contiguous().mT for t in (batch.a, batch.b))
    wide_y, wide_dx = (torch.cat([t, t], 1) for t in (plain.y, plain.dx))
    y, dx = wide_y[:, : case.n], wide_dx[:, case.k :]
    got, exact = plain.run(), plain.expected(torch.float64)
    s = grouped_s(batch.x, batch.a, batch.offsets, **batch.mask)
    grouped_add_(y, s, batch.b, batch.scale, batch.offsets)
    ds, db = grouped_ds_db(batch.dy, s, batch.b, batch.scale, batch.offsets)
    da = grouped_da_dx_(dx, batch.x, ds, batch.a, batch.scale, batch.offsets, **batch.mask)
    for name, result in {"y": y, "dx": dx, "da": da, "db": db}.items():
        assert_close(result, got[name], exact[name], name)
    assert torch.equal(wide_y[:, case.n :], plain.y) and torch.equal(wide_dx[:, : case.k], plain.dx)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("rank", [4, 40])
def test_only_what_is_needed_is_computed(rank, dtype, monkeypatch):
    batch = Batch(Case((9, 20), 48, 40, rank, (9000, 0)), dtype)
    everything = batch.run()
    launched = []
    for module in (grouped, grouped_backward):
        function = module.launch

        def spy(kernel, grid, _function=function, **named):
            launched.append({n: v for n, v in named.items() if n.startswith("NEEDS")})
            _function(kernel, grid, **named)

        monkeypatch.setattr(module, "launch", spy)
    s, ds = everything["s"], everything["ds"]
    arguments = batch.dy, s, batch.b, batch.scale, batch.offsets
    got, none = grouped_ds_db(*arguments, needs_db=False)
    assert none is None and torch.equal(got, ds)
    none, got = grouped_ds_db(*arguments, needs_ds=False)
    assert none is None and torch.equal(got, everything["db"])
    assert len(launched) == 2
    assert rank == 40 or launched == [
        {"NEEDS_DS": True, "NEEDS_DB": False},
        {"NEEDS_DS": False, "NEEDS_DB": True},
    ]
    assert grouped_ds_db(*arguments, needs_ds=False, needs_db=False) == (None, None)
    assert len(launched) == 2
    arguments = batch.x, ds, batch.a, batch.scale, batch.offsets
    got = grouped_da_dx_(None, *arguments, **batch.mask)
    assert len(launched) == 3 and torch.equal(got, everything["da"])
    dx = batch.dx.clone()
    batch.x.fill_(NAN)  # not read
    assert grouped_da_dx_(dx, *arguments, **batch.mask, needs_da=False) is None
    assert len(launched) == 4 and torch.equal(dx, everything["dx"])
    assert grouped_da_dx_(None, *arguments, **batch.mask, needs_da=False) is None
    assert len(launched) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_each_gradient_has_its_factors_dtype(dtype):
    batch = Batch(Case((9, 20), 48, 40, 8), torch.float16)
    batch.a, batch.b = batch.a.to(dtype), batch.b.bfloat16()
    got = batch.run()
    assert (got["da"].dtype, got["db"].dtype) == (dtype, torch.bfloat16)
    assert got["s"].dtype == got["ds"].dtype == torch.float16


def test_two_runs_agree_bit_for_bit(small):
    batch = Batch(Case((60, 9, 30), 32, 32, 4, (9000, 0, 5)), torch.float16)
    first, second = batch.run(), batch.run()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_second_call_follows_the_offsets_on_the_device():
    """Neither the launches nor anything that was kept depend on the values of the offsets, which are never copied to the host."""
    one = Case((5, 0, 40, 17), 48, 40, 8, (6554, 40000, 0, 1), before=3, after=2)
    other = replace(one, sizes=(0, 50, 0, 12))
    first, second = Batch(one), Batch(other)
    first.run()
    first.offsets.copy_(second.offsets)
    for name in ("x", "dy", "y", "dx"):
        getattr(first, name).copy_(getattr(second, name))
    got, want = first.run(), second.run()
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_a_pass_may_be_repeated():
    """`recording.repeat` takes the steps of an earlier call with other tensors, whose groups have other sizes."""
    cases = [Case((a, 0, b), 32, 24, 4, (9000, 1, 0)) for a, b in ((3, 6), (9, 0), (1, 8), (4, 5))]
    prepared = []
    for case in cases:
        batch = Batch(case)
        y, dx = batch.y.clone(), batch.dx.clone()
        tensors = batch.x, batch.dy, y, dx, batch.a, batch.b, batch.scale, batch.offsets
        tensors += tuple(batch.mask.values())

        def run(batch=batch, y=y, dx=dx):
            prepared.append(batch.case)
            s = grouped_s(batch.x, batch.a, batch.offsets, **batch.mask)
            grouped_add_(y, s, batch.b, batch.scale, batch.offsets)
            ds, db = grouped_ds_db(batch.dy, s, batch.b, batch.scale, batch.offsets)
            arguments = batch.x, ds, batch.a, batch.scale, batch.offsets
            return s, ds, db, grouped_da_dx_(dx, *arguments, **batch.mask)

        s, ds, db, da = recording.repeat((Case,), "grouped", tensors, run)
        got = {"s": s, "ds": ds, "db": db, "da": da, "y": y, "dx": dx}
        want = batch.run()
        assert all(torch.equal(got[name], want[name]) for name in want)
    assert prepared == cases[:2], "the first two calls are seen and recorded"


def test_no_value_is_read_by_the_host(monkeypatch):
    """On tensors without values; a launch has a program for each block that M and G allow."""
    grids = {}
    for module in (grouped, grouped_backward, reduce):
        monkeypatch.setattr(
            module, "launch", lambda kernel, grid, **_: grids.setdefault(kernel.fn.__name__, grid)
        )
    monkeypatch.setattr(dispatch, "device_architecture", lambda device: ARCHITECTURES[90])
    m, k, n, groups = 4096, 512, 1024, 8

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(*shape, dtype=dtype, device="meta")

    x, dy, a, b = empty(m, k), empty(m, n), empty(groups, 16, k), empty(groups, n, 16)
    offsets, scale = empty(groups + 1, dtype=torch.int32), empty(groups, dtype=torch.float32)
    mask = {"seed": empty((), dtype=torch.int64), "thresholds": offsets[1:]}
    s = grouped_s(x, a, offsets, **mask)
    grouped_add_(dy, s, b, scale, offsets)
    ds, db = grouped_ds_db(dy, s, b, scale, offsets)
    da = grouped_da_dx_(x.clone(), x, ds, a, scale, offsets, **mask)
    assert (s.shape, ds.shape, da.shape, db.shape) == (s.shape, s.shape, a.shape, b.shape)
    tiles = grouped_tiles(ARCHITECTURES[90], Problem(m, n, n, 16, 2, False), groups)
    assert grids["_group_down_kernel"] == (m // tiles.down.block_m + groups, 1)
    assert grids["_group_up_kernel"] == (m // tiles.up.block_m + groups, n // tiles.up.block_n)


X, A, OFFSETS = torch.zeros(6, 16), torch.zeros(2, 4, 16), torch.zeros(3, dtype=torch.int32)
B, S, SCALE = torch.zeros(2, 16, 4), torch.zeros(6, 4), torch.zeros(2)
KEY, THRESHOLDS = torch.tensor(0), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: grouped_s(X[0], A, OFFSETS), r"x: expected two dim.*, got \(16,\)"),
        (lambda: grouped_s(X.double(), A, OFFSETS), "x: .*got .*float64"),
        (lambda: grouped_s(X, A[0], OFFSETS), r"a: expected \(G, R, 16\) .*got \(4, 16\)"),
        (lambda: grouped_s(X, A[..., 1:], OFFSETS), r"a: expected \(G, R, 16\) .*got \(2, 4, 15\)"),
        (lambda: grouped_s(X, A.int(), OFFSETS), "a: .*floating point, on .*got .*int32"),
        (lambda: grouped_s(X, A[:, :0], OFFSETS), "a: .*of 1 to 128 ranks.*got"),
        (lambda: grouped_s(X, A.to("meta"), OFFSETS), "a: .*on cpu, got .*meta"),
        (lambda: grouped_s(X, torch.zeros(2, GROUPED_RANK + 1, 16), OFFSETS), "a: .*128 ranks"),
        (lambda: grouped_s(X, A, OFFSETS[1:]), r"offsets: expected \(3,\) torch.int32 on cpu.*, got \(2,\)"),
        (lambda: grouped_s(X, A, OFFSETS.long()), "offsets: .*got .*int64"),
        (lambda: grouped_s(X, A, torch.zeros(6, dtype=torch.int32)[::2]), "offsets: .*contiguous"),
        (lambda: grouped_s(X, A, OFFSETS, seed=KEY), "seed, thresholds: expected both or neither"),
        (lambda: grouped_s(X, A, OFFSETS, seed=KEY.int(), thresholds=THRESHOLDS), "seed: .*int32"),
        (lambda: grouped_s(X, A, OFFSETS, seed=KEY, thresholds=SCALE), "thresholds: .*float32"),
        (lambda: grouped_add_(X.T.contiguous().T, S, B, SCALE, OFFSETS), r"y: .*contiguous rows.*\(1, 6\)"),
        (lambda: grouped_add_(torch.zeros(6, 32)[:, ::2], S, B, SCALE, OFFSETS), r"y: .*\(32, 2\)"),
        (lambda: grouped_add_(X[:1].expand(6, 16), S, B, SCALE, OFFSETS), "y: .*do not overlap"),
        (lambda: grouped_add_(X, S.half(), B, SCALE, OFFSETS), r"s: expected \(6, 4\) .*float16"),
        (lambda: grouped_add_(X, S[:5], B, SCALE, OFFSETS), r"s: expected \(6, 4\).*got \(5, 4\)"),
        (lambda: grouped_add_(X, S.T.contiguous().T, B, SCALE, OFFSETS), "s: .*contiguous, got"),
        (lambda: grouped_add_(X, S, A, SCALE, OFFSETS), r"b: expected \(G, 16, R\).*got \(2, 4, 16\)"),
        (lambda: grouped_add_(X, S, B, SCALE.double(), OFFSETS), "scale: .*float64"),
        (lambda: grouped_add_(X.long(), S, B, SCALE, OFFSETS), "y: expected two dim.*int64"),
        (lambda: grouped_ds_db(X[:, :0], S, B, SCALE, OFFSETS), r"dy: .*1 or more columns.*\(6, 0\)"),
        (lambda: grouped_ds_db(X, S, B, SCALE[:1], OFFSETS), r"scale: expected \(2,\).*got \(1,\)"),
        (lambda: grouped_da_dx_(X[:5], X, S, A, SCALE, OFFSETS), r"dx: expected \(6, 16\).*as x, got \(5"),
        (lambda: grouped_da_dx_(X.half(), X, S, A, SCALE, OFFSETS), "dx: .*as x, got .*float16"),
        (lambda: grouped_da_dx_(None, X, S[:, :3], A, SCALE, OFFSETS), "ds: .*got"),
    ],
)  # fmt: skip
@pytest.mark.skipif(GPU, reason="tensors on the CPU")
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


def test_a_device_without_kernels_is_refused(monkeypatch):
    monkeypatch.setattr(dispatch, "device_architecture", lambda device: None)
    with pytest.raises(BackendError, match=f"no kernel was compiled for the GPU of {DEVICE}"):
        Batch(CASES[0]).run()


def test_kernels_refuse_ranks_that_their_tiles_do_not_support():
    batch = Batch(Case((9,), 16, 16, 64))
    tiles = replace(SMALL.x, block_r=32)
    scale, offsets, low = batch.scale, batch.offsets, torch.zeros(9, 64, device=DEVICE)
    with pytest.raises(ValueError, match="ds: expected at most 32 ranks, got 64"):
        grouped_backward.group_x(batch.x, low, scale, offsets, torch.float32, tiles)
    with pytest.raises(ValueError, match="b: expected at most 32 ranks, got 64"):
        grouped_backward.group_dy(batch.dy, batch.b, low, scale, offsets, tiles)
    with pytest.raises(ValueError, match="a: expected at most 32 ranks, got 64"):
        grouped.group_down(batch.x, batch.a, offsets, tiles)


@pytest.mark.gpu
def test_offsets_beyond_2_to_the_31():
    """x with more elements than an int32 counts, in two groups; the second one's rows lie beyond."""
    m, k, r = 33_000, 65_600, 4
    assert (m - 100) * k > 2**31
    x = torch.zeros(m, k, dtype=torch.float16, device=DEVICE)
    x[-100:].normal_()
    a, b = torch.randn(2, r, k, device=DEVICE) / 256, torch.zeros(2, k, r, device=DEVICE)
    b[1] = 1
    offsets = torch.tensor([0, m - 100, m], dtype=torch.int32, device=DEVICE)
    scale = torch.ones(2, device=DEVICE)
    s = grouped_s(x, a, offsets)
    last, factor = x[-100:].clone(), a[1].half()
    exact = last.double() @ factor.double().T
    assert_close(s[-100:], last @ factor.T, exact)
    assert s[:-100].eq(0).all()
    y = grouped_add_(x, s, b, scale, offsets)[-100:, :1]
    same = last[:, :1] + s[-100:].sum(1, keepdim=True)
    assert_close(y, same, last[:, :1].double() + exact.sum(1, keepdim=True))
