"""The products of rows in groups (`fastlora.ops.triton.grouped`) against float64 and in time: the stage `grouped` of `gpu_proof.py`.

Timed beside each other, in bfloat16 with float32 factors: the base product of the whole batch, the low-rank products by the kernels, and
the same by a loop of torch's products over the groups, whose sizes it knows and whose factors are bfloat16 already.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import proofs
import torch
from proofs import SEED, Results
from torch import Tensor
from torch.nn import functional as F

from fastlora.ops.dropout import dropout_threshold, keep_scale, kernel_mask
from fastlora.ops.graph import capture
from fastlora.ops.triton.grouped import grouped_add_, grouped_da_dx_, grouped_ds_db, grouped_s


@dataclass(frozen=True)
class Case:
    """Groups of these sizes, with `outside` rows without a group before and after them. p: dropout of every second group."""

    sizes: tuple[int, ...]
    k: int
    n: int
    rank: int
    p: float = 0.0
    outside: int = 0

    @property
    def name(self) -> str:
        return f"{self.rows} rows in {len(self.sizes)} groups, {self.k}->{self.n} r{self.rank} p{self.p:g}"

    @property
    def rows(self) -> int:
        return sum(self.sizes) + 2 * self.outside


CASES = (
    Case((0, 5, 300, 17, 0, 64, 1, 129), 512, 768, 16, 0.1),
    Case((200, 0, 33, 7), 1023, 1025, 40, 0.1, outside=3),
    Case((1,) * 8, 1040, 528, 128),
    Case((0, 2000, 50), 264, 520, 4, 0.3, outside=20),
)
TIMED = (Case((512,) * 8, 4096, 4096, 16), Case((1,) * 64, 4096, 4096, 16))
REHEARSED = (Case((0, 5, 20, 1), 32, 48, 4, 0.3, outside=2),)


class Groups:
    """The tensors of a case, and its results by the kernels and by torch."""

    def __init__(self, case: Case, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def draw(*size: int, scale: float = 1.0) -> Tensor:
            return scale * torch.randn(*size, generator=generator, device=device)

        m, groups, r = case.rows, len(case.sizes), case.rank
        self.case, self.dtype = case, dtype
        self.x, self.dx = draw(m, case.k).to(dtype), draw(m, case.k).to(dtype)
        self.y, self.dy = draw(m, case.n).to(dtype), draw(m, case.n).to(dtype)
        self.a = draw(groups, r, case.k, scale=case.k**-0.5)
        self.b = draw(groups, case.n, r, scale=r**-0.5)
        self.ps = [case.p if g % 2 == 0 else 0.0 for g in range(groups)]
        scales = [2.0 * keep_scale(p) for p in self.ps]
        self.scale = torch.tensor(scales, device=device)
        bounds = torch.tensor([case.outside, *case.sizes]).cumsum(0)
        self.ranges = [slice(*pair) for pair in pairwise(bounds.tolist())]
        self.offsets = bounds.int().to(device)
        self.inside = torch.arange(m, device=device)
        self.inside = (self.inside >= bounds[0].item()) & (self.inside < bounds[-1].item())
        self.mask: dict[str, Any] = {}
        if case.p:
            thresholds = torch.tensor([dropout_threshold(p) for p in self.ps], device=device)
            self.mask = {"seed": torch.tensor(SEED, device=device), "thresholds": thresholds}

    def forward(self, y: Tensor) -> Tensor:
        """S; y is added to."""
        s = grouped_s(self.x, self.a, self.offsets, **self.mask)
        grouped_add_(y, s, self.b, self.scale, self.offsets)
        return s

    def backward(self, s: Tensor, dx: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dS, dA, dB; dx is added to."""
        ds, db = grouped_ds_db(self.dy, s, self.b, self.scale, self.offsets)
        assert ds is not None and db is not None
        da = grouped_da_dx_(dx, self.x, ds, self.a, self.scale, self.offsets, **self.mask)
        assert da is not None
        return ds, da, db

    def run(self) -> Results:
        """By the kernels; S and dS of the rows with a group."""
        y, dx = self.y.clone(), self.dx.clone()
        s = self.forward(y)
        ds, da, db = self.backward(s, dx)
        s, ds = s[self.inside], ds[self.inside]
        return {"s": s, "y": y, "ds": ds, "db": db, "da": da, "dx": dx}

    def expected(self, dtype: torch.dtype) -> Results:
        """By torch in `dtype`."""
        x, dy, y, dx = (t.to(dtype, copy=True) for t in (self.x, self.dy, self.y, self.dx))
        a, b = (t.to(self.dtype).to(dtype) for t in (self.a, self.b))
        s, ds = (x.new_zeros(len(x), self.case.rank) for _ in range(2))
        da, db = torch.zeros_like(a), torch.zeros_like(b)
        for g, rows in enumerate(self.ranges):
            size, scale = rows.stop - rows.start, self.scale[g].item()
            keep = kernel_mask(SEED, self.ps[g], size, self.case.k, rows.start, device=x.device)
            kept = torch.where(keep, x[rows], 0.0)
            s[rows], ds[rows] = kept @ a[g].T, dy[rows] @ b[g]
            y[rows] += scale * (s[rows] @ b[g].T)
            dx[rows] += torch.where(keep, scale * (ds[rows] @ a[g]), 0.0)
            da[g], db[g] = scale * (ds[rows].T @ kept), scale * (dy[rows].T @ s[rows])
        s, ds = s[self.inside], ds[self.inside]
        return {"s": s, "y": y, "ds": ds, "db": db, "da": da, "dx": dx}

    def errors(self, eps: float) -> dict[str, float]:
        """Of each result, of a second run, of the rows without a group, and of a graph whose offsets change."""
        got, again = self.run(), self.run()
        plain, exact = self.expected(self.dtype), self.expected(torch.float64)
        found = proofs.units(got, plain, exact, eps)
        outside = ~self.inside
        pairs = {"again": [(got[name], again[name]) for name in got]}
        pairs["outside"] = [(got["y"][outside], self.y[outside]), (got["dx"][outside], self.dx[outside])]  # fmt: skip
        if self.x.is_cuda:
            pairs["graph"] = [self._replayed()]
        return found | proofs.same(pairs)

    def _replayed(self) -> tuple[Tensor, Tensor]:
        """y of a CUDA graph that was captured under other offsets, and y of a call."""
        offsets, y = self.offsets.clone(), self.y.clone()
        self.offsets.copy_(offsets[:1].expand_as(offsets))  # every group is empty
        replay = capture(lambda: self.forward(y))
        self.offsets.copy_(offsets)
        y.copy_(self.y)
        replay()
        wanted = self.y.clone()
        self.forward(wanted)
        return y, wanted


def check(dtype: str, case: Case) -> dict[str, Any]:
    """A row with the errors of a case."""
    return proofs.check("grouped", dtype, case, Groups)


def timed(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    given = Groups(case, dtype, device)
    dropped = Groups(replace(case, p=0.1), dtype, device)
    weight = torch.randn(case.n, case.k, device=device).to(dtype)
    y, dx, s = given.y.clone(), given.dx.clone(), given.forward(given.y.clone())
    ds, _, _ = given.backward(s, dx.clone())
    a, b, scales = given.a.to(dtype), given.b.to(dtype), given.scale.tolist()
    offsets, scale = given.offsets, given.scale

    def grouped_forward() -> Tensor:
        y = F.linear(given.x, weight)
        given.forward(y)
        return y

    def loop_forward() -> Tensor:
        y = F.linear(given.x, weight)
        s = torch.empty(len(y), case.rank, dtype=dtype, device=device)
        for g, rows in enumerate(given.ranges):
            torch.mm(given.x[rows], a[g].T, out=s[rows])
            y[rows].addmm_(s[rows], b[g].T, alpha=scales[g])
        return y

    def loop_backward() -> tuple[Tensor, Tensor]:
        da, db = torch.empty_like(a), torch.empty_like(b)
        for g, rows in enumerate(given.ranges):
            ds = (given.dy[rows] @ b[g]).mul_(scales[g])
            torch.mm(given.dy[rows].T, scales[g] * s[rows], out=db[g])
            torch.mm(ds.T, given.x[rows], out=da[g])
            dx[rows].addmm_(ds, a[g])
        return da, db

    return {
        "linear": lambda: F.linear(given.x, weight),
        "linear, then grouped": grouped_forward,
        "linear, then a loop": loop_forward,
        "grouped S": lambda: grouped_s(given.x, given.a, offsets),
        "grouped S, dropout": lambda: grouped_s(dropped.x, dropped.a, offsets, **dropped.mask),
        "grouped y": lambda: grouped_add_(y, s, given.b, scale, offsets),
        "grouped dS, dB": lambda: grouped_ds_db(given.dy, s, given.b, scale, offsets),
        "grouped dA, dx": lambda: grouped_da_dx_(dx, given.x, ds, given.a, scale, offsets),
        "grouped dA, dx, dropout": lambda: grouped_da_dx_(
            dx, dropped.x, ds, dropped.a, scale, offsets, **dropped.mask
        ),
        "grouped backward": lambda: given.backward(s, dx)[1:],
        "loop backward": loop_backward,
        "copy of x": lambda: dx.copy_(given.x),
    }
