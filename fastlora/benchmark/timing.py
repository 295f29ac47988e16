"""Interleaved timing of all implementations, and quantiles of the samples."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import torch

from fastlora.benchmark.workload import Round
from fastlora.ops.graph import WARM_UP

SAMPLE_MS = (
    2.0  # a GPU sample lasts at least about this long, so that its first launch is negligible
)
MAX_ROUNDS = 64
OVERHEAD_CALLS = 100
Sampler = Callable[[Round, int], float]


def wall_clock(run: Round, rounds: int) -> float:
    """Milliseconds of `rounds` runs on the CPU's clock."""
    start = time.perf_counter()
    for _ in range(rounds):
        run()
    return 1e3 * (time.perf_counter() - start)


def cuda_events(run: Round, rounds: int) -> float:
    """Milliseconds of `rounds` runs between two events, starting on an idle GPU so that no earlier run overlaps."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start.record()
    for _ in range(rounds):
        run()
    end.record()
    end.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds


def sampler(device: torch.device) -> Sampler:
    return cuda_events if device.type == "cuda" else wall_clock


def interleave(
    runs: dict[str, Round], reps: int, sample: Sampler, rounds: int = 1
) -> dict[str, list[float]]:
    """`reps` samples of each run, in milliseconds per round. A repetition samples every run, in reverse order every second time.

    Three warm-up repetitions are not counted, and garbage collection is disabled.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    gc.collect()
    gc.disable()
    try:
        for repetition in range(-WARM_UP, reps):
            names = list(runs) if repetition % 2 == 0 else list(reversed(runs))
            for name in names:
                milliseconds = sample(runs[name], rounds) / rounds
                if repetition >= 0:
                    times[name].append(milliseconds)
    finally:
        gc.enable()
    return times


def rounds_for(run: Round, sample: Sampler) -> int:
    """Number of rounds of this run that last at least `SAMPLE_MS`."""
    sample(run, 1)
    return min(max(1, round(SAMPLE_MS / sample(run, 1))), MAX_ROUNDS)


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """p20, p50 and p80."""
    ordered = sorted(values)
    p20, p50, p80 = (ordered[int(q * (len(ordered) - 1))] for q in (0.2, 0.5, 0.8))
    return p20, p50, p80


def call_overhead(
    runs: dict[str, Round], reps: int, device: torch.device
) -> dict[str, list[float]]:
    """Microseconds of CPU time to issue one call of each run, without waiting for the GPU within a sample."""

    def sample(run: Round, rounds: int) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return 1e3 * wall_clock(run, rounds)

    return interleave(runs, reps, sample, OVERHEAD_CALLS)
