"""Where the CPU's time of an eager call goes: fastlora, PEFT and the frozen layer, with autograd's own thread and without it.

    python benchmarks/eager_calls.py [--device cuda] [--budget-seconds 60] [--output FILE]

A layer that is called from Python runs no faster than the CPU launches its kernels. For each shape and implementation the record has the
microseconds of a forward pass and of a forward and backward pass, one after the other without waiting for the GPU; with the backward
pass in the thread of autograd, which is the default on a GPU, and in the calling thread (`torch.autograd.set_multithreading_enabled(False)`);
for fastlora also the time inside its backward function, the way to it and back, and the functions that take longest.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastlora.benchmark.cases import Case
from fastlora.benchmark.implementations import IMPLEMENTATIONS
from fastlora.benchmark.record import Budget, new_record, write
from fastlora.benchmark.workload import Workload, trainable
from fastlora.ops.linear import _LoRALinear

NAMES = ("linear", "fastlora-bf16", "peft-bf16")
CASES = (
    Case(256, 256, 256, 4, dtype="bfloat16"),
    Case(4096, 768, 768, 4, dtype="bfloat16"),
    Case(4096, 768, 768, 4, 0.1, dtype="bfloat16"),
    Case(8192, 4096, 4096, 16, 0.1, dtype="bfloat16"),
)
REHEARSAL = (Case(16, 32, 32, 4, 0.1, dtype="bfloat16"),)
FUNCTIONS = 25  # of a profile
Row = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--output", type=Path, help="JSON file for the record")
    parser.add_argument("--git-sha", help="commit to record, for sources without a git folder")
    parser.add_argument("--rehearse", action="store_true", help="one tiny shape")
    parser.add_argument("--budget-seconds", type=float, help="start no shape that would end later")
    arguments = parser.parse_args(argv)
    device, cases = torch.device(arguments.device), REHEARSAL if arguments.rehearse else CASES
    calls = 2 if arguments.rehearse else 50
    record = new_record(device, calls, [case.name for case in cases], arguments.git_sha)
    budget = Budget(arguments.budget_seconds)
    for case in cases:
        if not budget.begin_case():
            break
        work = Workload(case, device)
        for name in NAMES:
            layer = IMPLEMENTATIONS[name](case, work.frozen[0], work.lora_a, work.lora_b)
            for row in rows_of(layer, work, calls):
                record["results"].append({"case": case.name, "backend": name} | row)
                print(record["results"][-1], flush=True)
        record["not_run"].remove(case.name)
        record["seconds"][case.name] = round(budget.end_case(), 1)
        if arguments.output is not None:
            write(record, arguments.output)
    return 0


def rows_of(layer: nn.Module, work: Workload, calls: int) -> list[Row]:
    """A row for the forward pass, and one for forward and backward in each kind of thread."""
    x, dy = work.x[0].requires_grad_(), work.dy[0]
    leaves = [x, *trainable(layer)]

    def forward() -> None:
        layer(x)

    def both() -> None:
        layer(x).backward(dy)
        for leaf in leaves:
            leaf.grad = None

    rows = [{"what": "forward", "us": microseconds(forward, calls)}]
    for threads in (True, False):
        with torch.autograd.set_multithreading_enabled(threads):
            row: Row = {"what": "forward+backward", "own_thread": threads}
            row["us"] = microseconds(both, calls)
            row |= stretches(layer, x, dy, calls)
            if not threads:
                row["functions"] = slowest_functions(both, calls)
        rows.append(row)
    return rows


def microseconds(call: Callable[[], None], calls: int) -> float:
    """Of one call among many that follow each other: the least of five means."""
    means = []
    for _ in range(6):  # the first prepares
        synchronise()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        means.append(1e6 * (time.perf_counter() - begin) / calls)
    synchronise()
    return round(min(means[1:]), 1)


def stretches(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor, calls: int) -> Row:
    """Medians in microseconds: from the call of `backward` to fastlora's function, inside it, and back; empty for other layers."""
    stamps: list[float] = []
    compute = _LoRALinear._gradients

    def stamped(ctx: Any, gradient: torch.Tensor) -> Any:
        stamps.append(time.perf_counter())
        result = compute(ctx, gradient)
        stamps.append(time.perf_counter())
        return result

    setattr(_LoRALinear, "_gradients", staticmethod(stamped))  # noqa: B010
    parts = []
    try:
        for _ in range(calls):
            y = layer(x)
            synchronise()
            stamps.clear()
            begin = time.perf_counter()
            y.backward(dy)
            end = time.perf_counter()
            if stamps:
                entered, left = stamps
                parts.append((entered - begin, left - entered, end - left))
    finally:
        setattr(_LoRALinear, "_gradients", staticmethod(compute))  # noqa: B010
    names = ("us_to_function", "us_in_function", "us_back")
    medians = (statistics.median(part) for part in zip(*parts, strict=True))
    return {name: round(1e6 * one, 1) for name, one in zip(names, medians, strict=False)}


def slowest_functions(call: Callable[[], None], calls: int) -> list[list[Any]]:
    """[function, calls, microseconds in itself] for one call, of the functions that take longest under Python's profiler."""
    profile = cProfile.Profile()
    with profile:
        for _ in range(calls):
            call()
    stats: Any = pstats.Stats(profile)
    found = [
        [f"{Path(file).name}:{line} {name}", round(count / calls, 1), round(1e6 * own / calls, 1)]
        for (file, line, name), (_, count, own, _, _) in stats.stats.items()
    ]
    return sorted(found, key=lambda row: -row[2])[:FUNCTIONS]


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    raise SystemExit(main())
