"""Time forward + backward against M, N, R and the number of layers, and measure the machine's roofline.

    python benchmarks/scaling.py --output benchmarks/results/scaling-cpu.json
    python benchmarks/scaling.py --device cuda              # writes benchmarks/results/scaling-<gpu>.json

One size varies, the others stay at the base point. The roofline is measured in the same run: the best rate of a square
matrix product in the points' dtype, and the best rate of a large copy. `python benchmarks/report.py` draws the curves from the record.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import report
import torch
from torch import nn

from fastlora.benchmark.case_run import CaseRun
from fastlora.benchmark.cases import BASELINE, FORWARD_BACKWARD, Case
from fastlora.benchmark.implementations import IMPLEMENTATIONS
from fastlora.benchmark.record import Record, environment, gpu_file_name, write
from fastlora.benchmark.timing import Sampler, interleave, quantiles, rounds_for, sampler
from fastlora.benchmark.workload import (
    Round,
    Workload,
    copies_needed,
    round_of,
    torch_dtype,
    trainable,
)

TIMED = {name: IMPLEMENTATIONS[name] for name in (BASELINE, "fastlora", "peft")}
AXES = ("M", "N", "R", "layers")


@dataclass(frozen=True)
class Sweep:
    """The sizes that are timed.

    base: the point from which M, N and R vary. stack: the layer that is repeated along the axis `layers` (k == n).
    values: the values of each axis. gemms: sizes of the square matrix products that measure the peak. copied: bytes of the
    tensor whose copy measures the bandwidth.
    """

    base: Case
    stack: Case
    values: dict[str, tuple[int, ...]]
    gemms: tuple[int, ...]
    copied: int


SWEEPS = {
    "cpu": Sweep(
        Case(1024, 512, 512, 8),
        Case(256, 512, 512, 8),
        {
            "M": (1, 8, 64, 256, 1024, 4096),
            "N": (128, 256, 512, 1024, 2048),
            "R": (2, 4, 8, 16, 32, 64, 128),
            "layers": (1, 2, 4, 8, 16),
        },
        (1024, 2048),
        2**28,
    ),
    "cuda": Sweep(
        Case(8192, 4096, 4096, 16, dtype="bfloat16"),
        Case(2048, 4096, 4096, 16, dtype="bfloat16"),
        {
            "M": (1, 16, 128, 1024, 8192, 32768),
            "N": (512, 1024, 4096, 8192, 16384),
            "R": (4, 8, 16, 32, 64, 128),
            "layers": (1, 2, 4, 8, 16),
        },
        (4096, 8192),
        2**31,
    ),
}


def points(sweep: Sweep) -> list[tuple[str, int, Case, int]]:
    """(axis, value, case, number of layers) of every point."""
    fields = {"M": "m", "N": "n", "R": "rank"}

    def changed(axis: str, value: int) -> Case:
        change: dict[str, Any] = {fields[axis]: value}
        return replace(sweep.base, **change)

    return [
        (axis, value, sweep.stack, value)
        if axis == "layers"
        else (axis, value, changed(axis, value), 1)
        for axis in AXES
        for value in sweep.values[axis]
    ]


def flops(case: Case, adapted: bool) -> int:
    """FLOPs of one layer's forward + backward: the products y and dx, and with adapters S, S Bᵀ, dS, dB, dA and dS A."""
    m, k, n, r = case.m, case.k, case.n, case.rank
    return 4 * m * k * n + adapted * 6 * m * r * (k + n)


def least_bytes(case: Case, adapted: bool) -> int:
    """The minimum number of bytes that one layer's forward + backward moves.

    x, y, dy and dx once, W twice; with adapters also x again, A and B twice, their gradients once, and S three times.
    """
    m, k, n, r = case.m, case.k, case.n, case.rank
    low_rank = m * k + 3 * r * (k + n) + 3 * m * r
    return torch_dtype(case).itemsize * (2 * (m * k + n * k + m * n) + adapted * low_rank)


def peaks(sweep: Sweep, device: torch.device) -> dict[str, float]:
    """The machine's peaks. gflops: of the fastest square matrix product. gbps: of the fastest copy, bytes read plus written."""
    sample, dtype = sampler(device), torch_dtype(sweep.base)
    source = torch.ones(sweep.copied // 4, device=device)
    target = torch.empty_like(source)
    copy = _best(lambda: target.copy_(source), sample)
    rates = []
    for size in sweep.gemms:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        rates.append(2 * size**3 / _best(lambda a=a, b=b: torch.mm(a, b), sample))
    return {"gflops": round(max(rates) / 1e6, 1), "gbps": round(2 * sweep.copied / copy / 1e6, 2)}


def _best(run: Any, sample: Sampler) -> float:
    """Milliseconds of the fastest of twelve runs."""
    return min(sample(run, 1) for _ in range(12))


def stack_round(layers: list[nn.Module], work: Workload) -> Round:
    """Forward + backward of the layers one after the other."""
    model = nn.Sequential(*layers)
    leaves = [work.x[0], *trainable(model)]

    def run() -> None:
        torch.autograd.grad(model(work.x[0]), leaves, work.dy[0])

    return run


def run_point(
    axis: str, value: int, case: Case, layers: int, device: torch.device, reps: int, record: Record
) -> None:
    """Check the implementations and add a row for each."""
    on_gpu = device.type == "cuda"
    copies = layers
    if on_gpu and axis != "layers":
        copies = copies_needed(case, torch.cuda.get_device_properties(device).L2_cache_size)
    work = Workload(case, device, copies)
    built = CaseRun(work, TIMED, record)
    if axis == "layers":
        runs = {name: stack_round(each, work) for name, each in built.layers.items()}
    else:
        runs = {name: round_of(FORWARD_BACKWARD, each, work) for name, each in built.layers.items()}
    sample, calls = sampler(device), 1 if axis == "layers" else copies
    rounds = rounds_for(runs[BASELINE], sample)
    for name, values in interleave(runs, reps, sample, rounds).items():
        p20, p50, p80 = (round(v / calls, 6) for v in quantiles(values))
        adapted = name != BASELINE
        record["points"].append(
            {"axis": axis, "value": value, "case": case.name, "layers": layers, "backend": name}
            | {"ms_p20": p20, "ms_p50": p50, "ms_p80": p80}
            | {"flops": layers * flops(case, adapted), "bytes": layers * least_bytes(case, adapted)}
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=list(SWEEPS), default="cpu", help="device")
    parser.add_argument(
        "--reps", type=int, default=15, help="timed repetitions (default: %(default)s)"
    )
    parser.add_argument("--axis", choices=AXES, help="run this axis only")
    parser.add_argument("--git-sha", help="commit to record, for sources without a git folder")
    parser.add_argument("--output", type=Path, help="JSON file for the record")
    arguments = parser.parse_args(argv)
    device, sweep = torch.device(arguments.device), SWEEPS[arguments.device]
    facts = environment(device, arguments.reps, arguments.git_sha)
    record: Record = {"kind": "scaling", "environment": facts, "absent": [], "points": []}
    record["peaks"] = peaks(sweep, device)
    output = arguments.output
    if output is None and device.type == "cuda":
        output = report.RESULTS / f"scaling-{gpu_file_name(facts['gpu'])}"
    for axis, value, case, layers in points(sweep):
        if arguments.axis in (None, axis):
            run_point(axis, value, case, layers, device, arguments.reps, record)
            times = [
                row for row in record["points"] if (row["axis"], row["value"]) == (axis, value)
            ]
            cells = ", ".join(f"{row['backend']} {row['ms_p50']:.4g} ms" for row in times)
            print(f"{axis} {value}: {cells}", flush=True)
    print(f"peaks: {record['peaks']}")
    if output is not None:
        write(record, output)
    return int(any(absent["backend"] == "fastlora" for absent in record["absent"]))


if __name__ == "__main__":
    raise SystemExit(main())
