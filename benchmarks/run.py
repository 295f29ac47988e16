"""Time `LoRALinear` against PEFT and other ways to the same result, and write one JSON record.

    python benchmarks/run.py --device cpu [--reps 30] [--output benchmarks/results/cpu.json]
    python benchmarks/run.py --device cuda [--quick]        # writes benchmarks/results/<gpu>.json and fills the tables

Correctness comes first: a contestant whose output or gradients are wrong gets no time, and the record says so. The
contestants run interleaved, one after the other in every repetition, so that a slow spell of the machine meets all of them;
ratios are of medians. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import report
import torch
from cases import BASELINE, CPU_CASES, CUDA_CASES, FORWARD, FORWARD_BACKWARD, Case
from checks import Oracle, Wrong
from gpu_tables import targets_table
from peers import CONTESTANTS, Absent
from record import Budget, Record, gpu_file_name, new_record, nvidia_smi, write
from timing import call_overhead, capture, interleave, quantiles, rounds_for, sampler
from torch import nn
from triton.errors import TritonError
from workload import (
    Round,
    Workload,
    calls_in_round,
    copies_needed,
    peak_bytes,
    round_of,
    saved_bytes,
)

import fastlora

CPU_CONTESTANTS = (BASELINE, "fastlora", "peft")
QUICK_BUDGET_SECONDS = 450.0
# What a contestant may die of without taking the run with it: torch's and CUDA's errors are RuntimeErrors.
FAILURES = (RuntimeError, TritonError, fastlora.FastLoRAError)


class CaseRun:
    """One case: its contestants are built and checked, then timed in every mode; all of it goes into the record."""

    def __init__(self, work: Workload, names: tuple[str, ...], record: Record) -> None:
        self.work = work
        self.record = record
        self.layers: dict[str, list[nn.Module]] = {}
        self.saved: dict[str, int] = {}
        oracle = Oracle(work)
        for name in names:
            try:
                layers = [
                    CONTESTANTS[name](work.case, frozen, work.lora_a, work.lora_b)
                    for frozen in work.frozen
                ]
                oracle.check(name, layers[0])
                self.saved[name] = saved_bytes(layers[0], work.x[0])
            except (Absent, Wrong, *FAILURES) as error:
                self._absent(name, error)
            else:
                self.layers[name] = layers

    def time_all(self, reps: int) -> None:
        """Rows for every mode, run eagerly, and on a GPU also as CUDA graphs."""
        for mode in self.work.case.modes:
            runs = {name: round_of(mode, each, self.work) for name, each in self.layers.items()}
            peaks = self._keep_running(runs, lambda run: peak_bytes(run, self.work.device), mode)
            self._time({name: runs[name] for name in peaks}, mode, "eager", reps, peaks)
            if self.work.device.type == "cuda":
                graphs = self._keep_running({name: runs[name] for name in peaks}, capture, mode)
                self._time(graphs, mode, "graph", reps, peaks)

    def time_calls(self, reps: int) -> None:
        """The CPU's time to issue a call, in microseconds."""
        for mode in (FORWARD, FORWARD_BACKWARD):
            runs = {name: round_of(mode, each, self.work) for name, each in self.layers.items()}
            for name, values in call_overhead(runs, reps, self.work.device).items():
                p20, p50, p80 = (round(value, 2) for value in quantiles(values))
                row = {"case": self.work.case.name, "mode": mode, "backend": name}
                row |= {"us_p20": p20, "us_p50": p50, "us_p80": p80}
                self.record["call_overhead"].append(row)

    def _time(
        self, runs: dict[str, Round], mode: str, timing: str, reps: int, peaks: dict[str, Any]
    ) -> None:
        case, sample = self.work.case, sampler(self.work.device)
        on_gpu = self.work.device.type == "cuda"
        rounds = rounds_for(runs[BASELINE], sample) if on_gpu else 1
        calls = calls_in_round(mode, self.work)
        rows = {}
        for name, values in interleave(runs, reps, sample, rounds).items():
            p20, p50, p80 = (value / calls for value in quantiles(values))
            rows[name] = {
                "op": "lora_linear",
                "case": case.name,
                "mode": mode,
                "timing": timing,
                "backend": name,
                "ms_p20": round(p20, 6),
                "ms_p50": round(p50, 6),
                "ms_p80": round(p80, 6),
                "saved_bytes": self.saved[name] if mode == FORWARD_BACKWARD else None,
                "peak_bytes": peaks[name],
                "choice": self._choice(name),
            }
        for row in rows.values():
            row["ratio_to_linear"] = round(row["ms_p50"] / rows[BASELINE]["ms_p50"], 4)
        self.record["results"] += rows.values()
        if mode == FORWARD and "fastlora-triton" in rows:
            triton = rows["fastlora-triton"]
            eta = round(rows[BASELINE]["ms_p50"] / triton["ms_p50"], 4)
            row = {"case": case.name, "timing": timing, "eta": eta, "choice": triton["choice"]}
            self.record["eta"].append(row)

    def _choice(self, name: str) -> str | None:
        layer = self.layers[name][0]
        if not isinstance(layer, fastlora.LoRALinear):
            return None
        return str(fastlora.explain(layer, self.work.x[0]))

    def _keep_running(
        self, runs: dict[str, Round], action: Callable[[Round], Any], mode: str
    ) -> dict[str, Any]:
        """`action` of each run; one that fails goes to the absent ones of this mode."""
        done = {}
        for name, run in runs.items():
            try:
                done[name] = action(run)
            except FAILURES as error:
                self._absent(name, error, mode, "graph" if action is capture else "eager")
        return done

    def _absent(
        self, name: str, error: Exception, mode: str | None = None, timing: str | None = None
    ) -> None:
        kind = {Absent: "absent", Wrong: "wrong"}.get(type(error), type(error).__name__)
        # The first lines say what happened; a compiler's error can go on for pages.
        reason = "\n".join(str(error).splitlines()[:5])
        row = {"case": self.work.case.name, "mode": mode, "timing": timing, "backend": name}
        self.record["absent"].append({**row, "kind": kind, "reason": reason})
        if kind != "absent":
            print(f"{self.work.case.name}: {name} gets no time: {kind}: {reason}", file=sys.stderr)


def run_case(
    case: Case, device: torch.device, names: tuple[str, ...], reps: int, record: Record
) -> None:
    """Run one case and add what it gives to the record."""
    on_gpu = device.type == "cuda"
    tf32_before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = case.dtype == "tf32"
    copies = 1
    if on_gpu and not case.overhead:
        copies = copies_needed(case, torch.cuda.get_device_properties(device).L2_cache_size)
    run = CaseRun(Workload(case, device, copies), names, record)
    if case.overhead:
        run.time_calls(reps)
    else:
        run.time_all(reps)
    torch.backends.cuda.matmul.allow_tf32 = tf32_before
    if on_gpu:
        del run
        torch.compiler.reset()  # each case compiles for its own shape; nothing is left for the next
        torch.cuda.empty_cache()


def main(argv: list[str] | None = None) -> int:
    arguments = _arguments(argv)
    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    cases = [case for case in _cases(on_gpu, arguments.quick) if arguments.only in case.name]
    names = arguments.contestants or (tuple(CONTESTANTS) if on_gpu else CPU_CONTESTANTS)
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
        budget.end_case()
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
        default=30,
        help="counted repetitions of each case and mode (default 30)",
    )
    parser.add_argument(
        "--budget-seconds", type=float, help="begin no case that would not end within this time"
    )
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="only cases whose name contains this"
    )
    parser.add_argument(
        "--contestants",
        type=_contestants,
        metavar="A,B",
        help=f"beside {BASELINE}, from: {', '.join(CONTESTANTS)}",
    )
    parser.add_argument("--git-sha", help="the commit, where git cannot be asked for it")
    parser.add_argument("--output", type=Path, help="write the record here as JSON")
    return parser.parse_args(argv)


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
