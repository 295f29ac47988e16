"""The shapes that are timed, as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One linear layer: x (m, k), weight (n, k), rank, dropout probability p; float32, bias as `nn.Linear` has it."""

    m: int
    k: int
    n: int
    rank: int
    p: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.m}x{self.k}->{self.n} r{self.rank} p{self.p:g}"


CPU_CASES = (
    Case(512, 256, 768, 4),
    Case(1024, 384, 1152, 8, 0.1),
    Case(4096, 768, 768, 8),
    Case(4096, 768, 2304, 8, 0.1),
    Case(2048, 1024, 4096, 16),
)
