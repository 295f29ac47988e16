"""Time `LoRALinear` against PEFT and other implementations, and write one JSON record.

    python benchmarks/run.py --device cpu [--reps 30] [--output benchmarks/results/cpu.json]
    python benchmarks/run.py --peer-path ../lorafusion      # with the published peers in that folder
    python benchmarks/run.py --device cuda [--quick]        # writes benchmarks/results/<gpu>.json and fills the tables

A contestant whose output or gradients are wrong is not timed, and the record has the error. Contestants run interleaved, one
after the other in every repetition, so that a slow phase of the machine affects all of them; ratios are of medians. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import report
import torch
from case_run import run_case
from cases import BASELINE, CPU_CASES, CUDA_CASES, FORWARD_BACKWARD, Case
from gpu_tables import targets_table
from peers import CONTESTANTS, PUBLISHED, add_peer_paths, is_installed
from record import Budget, Record, gpu_file_name, new_record, nvidia_smi, write

CPU_CONTESTANTS = (BASELINE, "fastlora", "peft")
QUICK_BUDGET_SECONDS = 450.0
REPS, QUICK_REPS = 30, 20


def main(argv: list[str] | None = None) -> int:
    arguments = _arguments(argv)
    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    cases = [case for case in _cases(on_gpu, arguments.quick) if arguments.only in case.name]
    add_peer_paths(arguments.peer_path)
    names = arguments.contestants or _default_contestants(on_gpu, bool(arguments.peer_path))
    seconds = arguments.budget_seconds
    if seconds is None and on_gpu and arguments.quick:
        seconds = QUICK_BUDGET_SECONDS
    budget = Budget(seconds)
    record = new_record(device, arguments.reps, [c.name for c in cases], arguments.git_sha)
    output = arguments.output
    if output is None and on_gpu:
        output = report.RESULTS / gpu_file_name(record["environment"]["gpu"])
    if output is not None:
        write(record, output)
    for case in cases:
        if not budget.begin_case():
            print(f"no time left for {', '.join(record['not_run'])}", file=sys.stderr)
            break
        run_case(case, device, names, arguments.reps, record)
        record["seconds"][case.name] = round(budget.end_case(), 1)
        record["not_run"].remove(case.name)
        if on_gpu:
            record["environment"]["clocks_after"] = nvidia_smi()
        if output is not None:
            write(record, output)
        print_case(case.name, record)
    if on_gpu:
        print(targets_table([record]))
        if arguments.output is None:
            report.main([])
    else:
        print(cpu_summary(record))
    wrong = [a for a in record["absent"] if a["backend"].startswith("fastlora")]
    return int(any(a["kind"] != "absent" for a in wrong))


def _cases(on_gpu: bool, quick: bool) -> list[Case]:
    return [c for c in CUDA_CASES if c.quick or not quick] if on_gpu else list(CPU_CASES)


def _default_contestants(on_gpu: bool, peer_path: bool) -> tuple[str, ...]:
    """Those written here, and the published peers: with a path all of them, so that a missing one is reported."""
    ours = [name for name in CONTESTANTS if name not in PUBLISHED] if on_gpu else CPU_CONTESTANTS
    return (*ours, *(name for name in PUBLISHED if peer_path or is_installed(name)))


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to run")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="on a GPU: the cases of the targets and a few others, "
        f"within {QUICK_BUDGET_SECONDS:g} seconds unless --budget-seconds says otherwise",
    )
    parser.add_argument(
        "--reps",
        type=int,
        help=f"counted repetitions of each case and mode (default {REPS}, in a quick run {QUICK_REPS})",
    )
    parser.add_argument(
        "--budget-seconds", type=float, help="start no case that would not end within this time"
    )
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="only cases whose name contains this"
    )
    parser.add_argument(
        "--contestants",
        type=_contestants,
        metavar="A,B",
        help=f"in addition to {BASELINE}, from: {', '.join(CONTESTANTS)}",
    )
    parser.add_argument(
        "--peer-path",
        type=_folder,
        action="append",
        default=[],
        metavar="FOLDER",
        help=f"import {' and '.join(PUBLISHED)} from here; may be given more than once",
    )
    parser.add_argument("--git-sha", help="the commit, for sources without a git folder")
    parser.add_argument("--output", type=Path, help="write the record here as JSON")
    arguments = parser.parse_args(argv)
    if arguments.reps is None:
        quick = arguments.quick and arguments.device == "cuda"
        arguments.reps = QUICK_REPS if quick else REPS
    return arguments


def _folder(text: str) -> Path:
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"expected a folder, got {text}")
    return Path(text)


def _contestants(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys((BASELINE, *text.split(","))))
    unknown = set(names) - set(CONTESTANTS)
    if unknown:
        raise argparse.ArgumentTypeError(
            f"expected some of {', '.join(CONTESTANTS)}, got {', '.join(sorted(unknown))}"
        )
    return names


def cpu_summary(record: Record) -> str:
    """PEFT's median time over fastlora's in forward + backward, case by case."""
    times = {
        (row["case"], row["backend"]): row["ms_p50"]
        for row in record["results"]
        if row["mode"] == FORWARD_BACKWARD
    }
    cases = dict.fromkeys(case for case, _ in times)
    ratios = [
        times[case, "peft"] / times[case, "fastlora"]
        for case in cases
        if {(case, "peft"), (case, "fastlora")} <= times.keys()
    ]
    if not ratios:
        return "forward+backward, PEFT / fastlora: not measured"
    each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    return f"forward+backward, PEFT / fastlora: median {statistics.median(ratios):.2f} of {each}"


def print_case(name: str, record: Record) -> None:
    """One line for each mode and timing."""
    lines: dict[tuple[str, str], list[str]] = {}
    for row in record["results"]:
        if row["case"] == name:
            kept = row["saved_bytes"]
            saved = "" if kept is None else f", keeps {kept / 2**20:.2f} MiB"
            cell = f"{row['backend']} {row['ms_p50']:.4g} ms ({row['ratio_to_linear']:.2f}x{saved})"
            lines.setdefault((row["mode"], row["timing"]), []).append(cell)
    for row in record["call_overhead"]:
        if row["case"] == name:
            cell = f"{row['backend']} {row['us_p50']:.1f} µs"
            lines.setdefault((row["mode"], "call"), []).append(cell)
    for (mode, timing), cells in lines.items():
        print(f"{name}  {mode}, {timing}:  {'  '.join(cells)}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
