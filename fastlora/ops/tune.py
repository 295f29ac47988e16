"""Measure every plan and many tiles on this machine's GPU, and store the fastest for `dispatch`.

    python -m fastlora.tune --shapes 8192,4096,4096,16,0.1 32768,1024,1024,16,0 [--dtype bfloat16] [--jobs 8] [--dry-run]

A shape is M,K,N,R,p: x (M, K), weight (N, K), rank R, dropout p. Each kernel is timed alone, with a cold L2. Its search starts
from the tiles of the table, changes one setting at a time, and goes on from the fastest tiles so far; `--max-candidates` ends it.
Then each plan is timed with the best tiles of its kernels, on sm_90 and newer also with overlapping launches. Tiles with a wrong
result are not timed: results are compared with float64 by the rule of the tests. What is known after each kernel is stored in the
file of `fastlora.ops.tuning_file`; it is valid for this GPU, these versions and these kernels only. `--jobs` processes compile and
check the first candidates of every kernel before anything is timed.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastlora.errors import BackendError, ConfigError
from fastlora.kernels.config import DY_RANK, START_RANK, GemmConfig, PassConfig, Tiles
from fastlora.ops import cost, dispatch, tuning_file
from fastlora.ops.bench import Bench, Needs, Shape
from fastlora.ops.dispatch import Choice
from fastlora.ops.graph import capture

Timer = Callable[[Callable[[], object]], float]
Row = Callable[[str, float, object], None]
Config = TypeVar("Config", GemmConfig, PassConfig)
# A change must save this much to count: less is within the noise of a measurement.
_GAIN = 0.99
_DX_PLANS = ("split", "accumulate", "in_place")


def neighbours(config: Config) -> Iterator[Config]:
    """Configurations that differ from `config` in one setting, the most promising settings first; or by half the tile and twice the programs."""
    if isinstance(config, GemmConfig) and config.descriptor:
        yield replace(config, prefetch=not config.prefetch, subtiles=4)  # type: ignore[call-arg]
        # Two programs on an SM: the epilogue of one runs beside the loop of the other.
        programs = 2 * config.programs
        for stages in (3, 4):
            yield replace(  # type: ignore[call-arg]
                config, block_n=128, num_warps=4, programs=programs, num_stages=stages
            )
        yield replace(config, block_k=128, num_stages=2)
    splits = getattr(config, "splits", 0)
    changes: dict[str, list[int]] = {
        "num_warps": [4, 8],
        "block_n": [64, 128, 256, 512, 1024],
        "subtiles": [1, 2, 4],
        "block_m": [32, 64, 128, 256],
        "block_k": [32, 64, 128, 256],
        "num_stages": [2, 3, 4, 5],
        "splits": [2 * splits, splits // 2, 4 * splits, 1, 16, 32],
        "group_m": [4, 16],
    }
    for name, values in changes.items():
        if getattr(config, name, 0) > 0:  # 0: the kernel has no such block
            for value in filter(None, values):
                yield replace(config, **{name: value})  # type: ignore[arg-type]


def search(
    start: Config,
    seconds: Callable[[Config], float],
    limit: int,
    improved: Callable[[Config, float], None] = lambda config, time: None,
) -> tuple[Config, float]:
    """The fastest of at most `limit` configurations and its time: from `start` to its neighbours, and on from each faster one.

    improved: called with every new best.
    """
    best, time = start, seconds(start)
    tried = {start}
    improved(best, time)
    options = neighbours(best)
    while len(tried) < limit:
        option = next((o for o in options if o not in tried and _sensible(o)), None)
        if option is None:
            break
        tried.add(option)
        new = seconds(option)
        if new < _GAIN * time:
            best, time, options = option, new, neighbours(option)
            improved(best, time)
    return best, time


def _sensible(config: GemmConfig | PassConfig) -> bool:
    """Whether an accumulator of a tile fits its registers: at most 128 float32 per thread."""
    wide = max(config.block_n, 1)
    if isinstance(config, PassConfig):
        wide = max(config.block_n, config.block_k, config.block_r)
    return config.block_m * wide <= 128 * 32 * config.num_warps


def kernels_of(shape: Shape, plans: Sequence[str]) -> list[str]:
    """The kernels that some plan of the problem launches."""
    passes = ["x", "update"] + ["dy"] * (shape.rank <= DY_RANK)
    if "decode" in plans:  # too few rows for the tiles of the others
        return [*passes, "decode"]
    passes += ["down"] + ["start"] * (shape.rank <= START_RANK)
    return [*passes, "dx", *(plan for plan in ("split", "fused") if plan in plans)]


def tune_shape(
    bench: Bench,
    start: Choice,
    timer: Timer,
    limit: int = 30,
    keep: Callable[[tuning_file.Tuned], None] = lambda tuned: None,
    row: Row = lambda what, seconds, config: None,
) -> tuning_file.Tuned:
    """The fastest correct plans and tiles for a shape.

    start: the choice to begin from, with tiles. timer: seconds of a call. limit: how many tiles are tried for a kernel.
    keep: called with the best tiles so far after every improvement. row: called with every measurement; infinity is a failure.

    Raises: BackendError if no plan is correct.
    """
    arch = dispatch.device_architecture(bench.x.device)
    assert arch is not None and start.config is not None and start.dx_plan is not None
    plans = list(cost.forward_seconds(arch, bench.problem))
    best: Tiles = start.config
    for kernel in kernels_of(bench.shape, plans):

        def seconds(config: Any, kernel: str = kernel) -> float:
            def run() -> dict[str, Tensor]:
                return bench.run(kernel, config)

            time = timer(run) if bench.attempt(run) else math.inf
            row(f"  {kernel}", time, config)
            return time

        def improved(config: Any, time: float, kernel: str = kernel, tiles: Tiles = best) -> None:
            if math.isfinite(time):
                found = replace(tiles, **{kernel: config})
                keep(tuning_file.Tuned(start.plan, str(start.dx_plan), found))

        fastest, time = search(getattr(best, kernel), seconds, limit, improved)
        if math.isfinite(time):
            best = replace(best, **{kernel: fastest})
        row(kernel, time, fastest)
    forward = {plan: _forward_seconds(bench, plan, best, timer) for plan in plans}
    dx = {plan: _dx_seconds(bench, plan, best, timer) for plan in _DX_PLANS}
    for kind, times_of in (("y", forward), ("dx", dx)):
        for plan, time in times_of.items():
            row(f"{kind} {plan}", time, plan)
    plan, dx_plan = min(forward, key=forward.__getitem__), min(dx, key=dx.__getitem__)
    if not math.isfinite(forward[plan] + dx[dx_plan]):
        raise BackendError(f"{bench.shape}: no plan has a correct result, so nothing was stored")
    if arch.capability >= 90:
        best = _with_overlap(bench, best, plan, dx_plan, timer, row)
    tuned = tuning_file.Tuned(plan, dx_plan, best)
    keep(tuned)
    return tuned


def _with_overlap(
    bench: Bench, best: Tiles, plan: str, dx_plan: str, timer: Timer, row: Row
) -> Tiles:
    """The tiles, with overlapping launches in the chosen plans if they are correct and faster with them."""
    launches = {"split": ("down", "split"), "decode": ("decode",)}.get(plan, ())
    if launches:
        changed = {kernel: replace(getattr(best, kernel), overlap=True) for kernel in launches}
        best = _faster(best, replace(best, **changed), plan, timer, bench, _forward_seconds, row)
    if dx_plan == "split":
        changed = {kernel: replace(getattr(best, kernel), overlap=True) for kernel in ("x", "dx")}
        best = _faster(best, replace(best, **changed), dx_plan, timer, bench, _dx_seconds, row)
    return best


def _faster(
    separate: Tiles,
    overlapping: Tiles,
    plan: str,
    timer: Timer,
    bench: Bench,
    seconds: Callable[[Bench, str, Tiles, Timer], float],
    row: Row,
) -> Tiles:
    before, after = (seconds(bench, plan, tiles, timer) for tiles in (separate, overlapping))
    row(f"{plan} apart", before, plan)
    row(f"{plan} overlapping", after, plan)
    return overlapping if after < before else separate


def _print_row(name: str, seconds: float, what: object) -> None:
    print(f"{name:12s} {1e6 * seconds:9.1f} us  {what}", flush=True)


def _forward_seconds(bench: Bench, plan: str, tiles: Tiles, timer: Timer) -> float:
    """Seconds of y and S; infinity if the plan fails or is wrong."""
    choice = Choice("triton", plan, "tuning", "in_place", tiles)
    fine = bench.attempt(lambda: dict(zip(("y", "s"), bench.forward(choice), strict=True)))
    return timer(lambda: bench.forward(choice)) if fine else math.inf


def _dx_seconds(bench: Bench, dx_plan: str, tiles: Tiles, timer: Timer) -> float:
    """Seconds of dx and dA, together so that the mask is read as bits, as in training; infinity if the plan fails or is wrong."""
    choice = Choice("triton", "in_place", "tuning", dx_plan, tiles)

    def run(needs: Needs) -> list[Tensor]:
        return bench.backward(choice, bench.plain["s"], needs)

    everything = (True, True, True)
    fine = bench.attempt(lambda: dict(zip(("dx", "da", "db"), run(everything), strict=True)))
    return timer(lambda: run((True, True, False))) if fine else math.inf


def cuda_seconds(call: Callable[[], object]) -> float:
    """The median seconds of a call on a GPU, each with a cold L2. It is captured as a CUDA graph, so launches by the CPU do not count."""
    from triton.testing import do_bench

    replay = capture(call)
    return float(do_bench(replay, warmup=5, rep=25, return_mode="median")) / 1e3


_worker_bench: Bench


def _begin_worker(shape: Shape, dtype: torch.dtype, device: str) -> None:
    global _worker_bench
    _worker_bench = Bench(shape, dtype, torch.device(device))


def _check_in_worker(kernel: str, config: Any) -> None:
    _worker_bench.attempt(lambda: _worker_bench.run(kernel, config))


def compile_candidates(
    shape: Shape, dtype: torch.dtype, start: Tiles, plans: Sequence[str], limit: int, jobs: int
) -> None:
    """Compile the first candidates of every kernel in `jobs` processes, which leave them in Triton's cache."""
    context = multiprocessing.get_context("spawn")
    arguments = (shape, dtype, "cuda")
    with ProcessPoolExecutor(jobs, context, _begin_worker, arguments) as pool:
        waiting = [
            (kernel, config, pool.submit(_check_in_worker, kernel, config))
            for kernel in kernels_of(shape, plans)
            for config in (
                getattr(start, kernel),
                *islice(filter(_sensible, neighbours(getattr(start, kernel))), limit),
            )
        ]
    for kernel, config, done in waiting:
        error = done.exception()
        if error is not None and not isinstance(error, BrokenProcessPool):
            print(f"{kernel} {config} failed in its process: {error}", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastlora.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shapes", nargs="+", required=True, metavar="M,K,N,R[,p]")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    candidates_help = "tiles tried per kernel (default %(default)s)"
    parser.add_argument("--max-candidates", type=int, default=30, help=candidates_help)
    jobs_help = "processes that compile before the measurement (default: none do)"
    parser.add_argument("--jobs", type=int, default=0, help=jobs_help)
    parser.add_argument("--dry-run", action="store_true", help="print the result and store nothing")
    arguments = parser.parse_args(argv)
    try:
        shapes = [Shape.parse(text) for text in arguments.shapes]
        if arguments.max_candidates < 1:
            raise ConfigError(f"--max-candidates: expected ≥ 1, got {arguments.max_candidates}")
        if arguments.jobs < 0:
            raise ConfigError(f"--jobs: expected ≥ 0, got {arguments.jobs}")
        if not torch.cuda.is_available():
            raise BackendError("fastlora.tune measures on a CUDA device, and there is none")
        for shape in shapes:
            _tune(shape, arguments)
    except (ConfigError, BackendError) as error:
        parser.exit(2, f"fastlora.tune: {error}\n")
    return 0


def _tune(shape: Shape, arguments: argparse.Namespace) -> None:
    device = torch.device("cuda")
    bench = Bench(shape, getattr(torch, arguments.dtype), device)
    choice = dispatch.predicted_choice(device, bench.problem)
    if choice.config is None:
        raise BackendError(f"nothing to tune: {choice.reason}")
    print(f"{shape} {arguments.dtype}", flush=True)
    arch = dispatch.device_architecture(device)
    assert arch is not None
    if arguments.jobs:
        plans = list(cost.forward_seconds(arch, bench.problem))
        limit = arguments.max_candidates - 1
        compile_candidates(shape, bench.dtype, choice.config, plans, limit, arguments.jobs)
    name = torch.cuda.get_device_name(device)

    def keep(tuned: tuning_file.Tuned) -> None:
        if not arguments.dry_run:
            tuning_file.store(name, bench.problem, tuned)

    tune_shape(bench, choice, cuda_seconds, arguments.max_candidates, keep, _print_row)
    if not arguments.dry_run:
        print(f"stored in {tuning_file.path()}", flush=True)
