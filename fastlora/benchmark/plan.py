"""How long cases will take on this machine, from the speed of a matrix product, and how many repetitions fit in a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fastlora.benchmark.cases import Case
from fastlora.benchmark.timing import SAMPLE_MS, sampler
from fastlora.benchmark.workload import copies_needed, torch_dtype
from fastlora.ops.graph import WARM_UP

REPS, FEWEST_REPS = 20, 5
PLANNED = 0.8  # of the time; the rest is for imports and compilation
SIDE = {"cpu": 512, "cuda": 2048}  # of the square product that is timed
OVER_PRODUCTS = (
    1.5  # the time of an adapted layer over that of the frozen layer's products, roughly
)
Speed = Callable[[torch.dtype], float]


def seconds_per_flop(device: torch.device) -> Speed:
    """A function from a dtype to seconds per operation of a matrix product on the device; each dtype is measured once."""
    known: dict[torch.dtype, float] = {}

    def speed(dtype: torch.dtype) -> float:
        if dtype not in known:
            side, sample = SIDE[device.type], sampler(device)
            a = torch.ones(side, side, dtype=dtype, device=device)
            product = torch.empty_like(a)

            def multiply() -> None:
                torch.mm(a, a, out=product)

            fastest = min(sample(multiply, 1) for _ in range(4))
            known[dtype] = fastest / 1e3 / (2 * side**3)
        return known[dtype]

    return speed


@dataclass(frozen=True)
class Expected:
    """Seconds that a case takes: before it is timed, and for one repetition of every implementation and mode."""

    check: float
    repetition: float

    def total(self, reps: int) -> float:
        return self.check + (WARM_UP + reps) * self.repetition


def expected(case: Case, device: torch.device, implementations: int, speed: Speed) -> Expected:
    """What the products of the case need. Compilation of kernels comes on top, and is known only after a case."""
    dtype = torch_dtype(case)
    product = 2.0 * case.m * case.k * case.n
    # References in float64 and in the dtype: of the frozen layer, the adapted one, and with dropout, forward and backward.
    references = 2 * product * (2 + (case.p > 0))
    check = references * (speed(torch.float64) + speed(dtype))
    check += OVER_PRODUCTS * 2 * product * speed(dtype) * implementations
    copies, at_least, timings = 1, 0.0, 1
    if device.type == "cuda":
        copies = copies_needed(case, torch.cuda.get_device_properties(device).L2_cache_size)
        at_least, timings = SAMPLE_MS / 1e3, 2  # eager and graph
    rounds = [max(copies * work * product * speed(dtype), at_least) for work in (1, 2)]
    return Expected(check, OVER_PRODUCTS * implementations * timings * sum(rounds))


def reps_that_fit(cases: Sequence[Expected], seconds: float) -> int:
    """Repetitions, from `FEWEST_REPS` to `REPS`, with which all cases end in `PLANNED` of the time; the fewest if none does."""
    fitting = range(FEWEST_REPS, REPS + 1)
    return max(
        (n for n in fitting if sum(c.total(n) for c in cases) <= PLANNED * seconds),
        default=fitting[0],
    )
