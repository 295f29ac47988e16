"""Banks of experts through the kernels (`fastlora.ops.experts`) against float64 and in time: the stage `experts` of `gpu_proof.py`.

Timed beside each other, in bfloat16: the frozen bank, the adapted bank, and what adds ΔW to every weight in each call, as PEFT does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import proofs
import torch
from proofs import SEED, Results
from torch import Tensor

from fastlora.ops.dropout import kernel_mask
from fastlora.ops.experts import grouped_linear, lora_experts
from fastlora.ops.products import has_grouped_mm
from fastlora.ops.reference import LowRank, forward

SCALING = 2.0


@dataclass(frozen=True)
class Case:
    """Groups of these sizes, each with its own weight (n, k) and factors, and `tail` rows of no group after them."""

    sizes: tuple[int, ...]
    k: int
    n: int
    rank: int
    p: float = 0.0
    tail: int = 0

    @property
    def name(self) -> str:
        return f"{self.rows} rows of {len(self.sizes)} experts, {self.k}->{self.n} r{self.rank} p{self.p:g}"

    @property
    def rows(self) -> int:
        return sum(self.sizes) + self.tail


CASES = (
    Case((0, 5, 300, 17, 0, 64, 1, 129), 512, 768, 16, 0.1),
    Case((200, 0, 33, 7), 1023, 1025, 40, 0.1, tail=3),
    Case((1,) * 8, 1040, 528, 128),
    Case((0, 0, 0, 40), 264, 520, 4, 0.3, tail=20),
)
# gate and up, and down, of Qwen3-30B-A3B for 4096 tokens with 8 experts each.
TIMED = (Case((256,) * 128, 2048, 1536, 16), Case((256,) * 128, 768, 2048, 16))
REHEARSED = (Case((0, 5, 20, 1), 32, 48, 4, 0.3, tail=2),)


class Bank:
    """The tensors of a case, and its results by one call and by torch."""

    def __init__(self, case: Case, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def draw(*size: int, scale: float = 1.0) -> Tensor:
            return scale * torch.randn(*size, generator=generator, device=device)

        groups, k, n, r = len(case.sizes), case.k, case.n, case.rank
        self.case, self.dtype = case, dtype
        self.x, self.dy = draw(case.rows, k).to(dtype), draw(case.rows, n).to(dtype)
        self.weight = draw(groups, n, k, scale=k**-0.5).to(dtype)
        # In float32, of values that the kernels need not round.
        self.a = draw(groups, r, k, scale=k**-0.5).to(dtype).float().requires_grad_()
        self.b = draw(groups, n, r, scale=r**-0.5).to(dtype).float().requires_grad_()
        self.offsets = torch.tensor([0, *case.sizes], device=device).cumsum(0).int()
        self.seed = torch.tensor(SEED, device=device) if case.p else None

    def call(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        settings = (SCALING, self.case.p, self.seed)
        return lora_experts(x, self.weight, a, b, self.offsets, *settings, backend="triton")

    def frozen(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return grouped_linear(x, self.weight, self.offsets)

    def added(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """With W + ΔW as weights."""
        delta = SCALING * torch.bmm(b.to(x.dtype), a.to(x.dtype))
        y: Tensor = torch._grouped_mm(x, (self.weight + delta).mT, offs=self.offsets[1:])
        return y

    def by_torch(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """One expert after the other, in x's dtype."""
        case, parts = self.case, [x.new_zeros(0, self.case.n)]
        keep = kernel_mask(SEED, case.p, case.rows, case.k, device=x.device)
        for group, (start, stop) in enumerate(pairwise(self.offsets.tolist())):
            low = LowRank(a[group], b[group], SCALING, case.p, self.seed)
            weight = self.weight[group].to(x.dtype)
            parts.append(forward(x[start:stop], weight, None, low, keep[start:stop])[0])
        return torch.cat([*parts, x.new_zeros(case.tail, case.n)])

    def results(
        self, run: Callable[[Tensor, Tensor, Tensor], Tensor], dtype: torch.dtype | None
    ) -> Results:
        """y, dx, dA and dB. dtype: of everything; None: as they are."""
        given = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (self.x, self.a, self.b)]
        y = run(*given)
        made = torch.autograd.grad(y, given, self.dy.to(y.dtype))
        return {"y": y.detach(), **dict(zip(("dx", "da", "db"), made, strict=True))}

    def errors(self, eps: float) -> dict[str, float]:
        run = partial(self.results, self.call, None)
        plain, exact = (self.results(self.by_torch, dtype) for dtype in (self.dtype, torch.float64))
        # A loop over the experts waits for the offsets, which no graph can contain.
        again = proofs.repeated(run, graph=has_grouped_mm(self.x, self.weight))
        return proofs.units(run(), plain, exact, eps) | proofs.same(again)


def check(dtype: str, case: Case) -> dict[str, Any]:
    """A row with the errors of a case."""
    return proofs.check("experts", dtype, case, Bank)


def timed(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    bank = Bank(case, dtype, device)
    factors = [bank.a, bank.b]
    calls: dict[str, Callable[[], object]] = {}
    for name, run, trained in (
        ("frozen", bank.frozen, []),
        ("adapted", bank.call, factors),
        ("W + ΔW", bank.added, factors),
    ):
        given = partial(run, a=bank.a, b=bank.b)
        calls |= proofs.passes(name, given, bank.x, trained, bank.dy)
    return calls
