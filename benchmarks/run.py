"""Time `LoRALinear` against PEFT and other implementations, and write one JSON record.

    python benchmarks/run.py --device cpu [--reps 30] [--output benchmarks/results/cpu.json]
    python benchmarks/run.py --library-path ../lorafusion   # with the published libraries in that folder
    python benchmarks/run.py --device cuda [--quick]        # writes benchmarks/results/<gpu>.json and fills the tables

An implementation whose output or gradients are wrong is not timed, and the record holds the error. Every repetition runs all
implementations in turn, so that a slow phase of the machine affects all of them; ratios are of medians. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import report
import torch
from cases import CPU_CASES, CUDA_CASES
from gpu_tables import targets_table
from implementations import IMPLEMENTATIONS, PUBLISHED, add_library_paths, is_installed

from fastlora.benchmark.case_run import run_case
from fastlora.benchmark.cases import BASELINE, Case
from fastlora.benchmark.record import Budget, Record, gpu_file_name, new_record, nvidia_smi, write
from fastlora.benchmark.table import verdict

CPU_IMPLEMENTATIONS = (BASELINE, "fastlora", "peft")
QUICK_BUDGET_SECONDS = 450.0
REPS, QUICK_REPS = 30, 20


def main(argv: list[str] | None = None) -> int:
    arguments = _arguments(argv)
    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    cases = [case for case in _cases(on_gpu, arguments.quick) if arguments.only in case.name]
    add_library_paths(arguments.library_path)
    names = arguments.implementations or _default_implementations(
        on_gpu, bool(arguments.library_path)
    )
    seconds = arguments.budget_seconds
    if seconds is None and on_gpu and arguments.quick:
        seconds = QUICK_BUDGET_SECONDS
    budget = Budget(seconds)
    builders = {name: IMPLEMENTATIONS[name] for name in names}
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
        run_case(case, device, builders, arguments.reps, record)
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
        print(verdict(record))
    wrong = [a for a in record["absent"] if a["backend"].startswith("fastlora")]
    return int(any(a["kind"] != "absent" for a in wrong))


def _cases(on_gpu: bool, quick: bool) -> list[Case]:
    return [c for c in CUDA_CASES if c.quick or not quick] if on_gpu else list(CPU_CASES)


def _default_implementations(on_gpu: bool, library_path: bool) -> tuple[str, ...]:
    """Those written here, and the installed published libraries; with --library-path all of these, so that a missing one is reported."""
    ours = (
        [name for name in IMPLEMENTATIONS if name not in PUBLISHED]
        if on_gpu
        else CPU_IMPLEMENTATIONS
    )
    return (*ours, *(name for name in PUBLISHED if library_path or is_installed(name)))


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="device")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="on a GPU: run only the cases of the targets and a few others, "
        f"within {QUICK_BUDGET_SECONDS:g} seconds unless --budget-seconds is given",
    )
    parser.add_argument(
        "--reps",
        type=int,
        help=f"timed repetitions of each case and mode (default {REPS}, with --quick {QUICK_REPS})",
    )
    parser.add_argument(
        "--budget-seconds",
        type=float,
        help="start no case that is not expected to end within this time",
    )
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="run only cases whose name contains TEXT"
    )
    parser.add_argument(
        "--implementations",
        type=_implementations,
        metavar="A,B",
        help=f"implementations to time in addition to {BASELINE}, from: {', '.join(IMPLEMENTATIONS)}",
    )
    parser.add_argument(
        "--library-path",
        type=_folder,
        action="append",
        default=[],
        metavar="FOLDER",
        help=f"import {' and '.join(PUBLISHED)} from this folder; may be repeated",
    )
    parser.add_argument("--git-sha", help="commit to record, for sources without a git folder")
    parser.add_argument("--output", type=Path, help="JSON file for the record")
    arguments = parser.parse_args(argv)
    if arguments.reps is None:
        quick = arguments.quick and arguments.device == "cuda"
        arguments.reps = QUICK_REPS if quick else REPS
    return arguments


def _folder(text: str) -> Path:
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"expected a folder, got {text}")
    return Path(text)


def _implementations(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys((BASELINE, *text.split(","))))
    unknown = set(names) - set(IMPLEMENTATIONS)
    if unknown:
        raise argparse.ArgumentTypeError(
            f"expected some of {', '.join(IMPLEMENTATIONS)}, got {', '.join(sorted(unknown))}"
        )
    return names


def print_case(name: str, record: Record) -> None:
    """One line for each mode and timing."""
    lines: dict[tuple[str, str], list[str]] = {}
    for row in record["results"]:
        if row["case"] == name:
            size = row["saved_bytes"]
            saved = "" if size is None else f", saves {size / 2**20:.2f} MiB"
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
