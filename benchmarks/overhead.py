"""Measure the CPU time and instructions of one layer call, forward and forward + backward.

    python benchmarks/overhead.py [--reps 30] [--output benchmarks/results/overhead-cpu.json]

The layer is so small (1x64->64) that its arithmetic is negligible. Instructions are counted in user space by `perf stat` if
the machine has the counter, otherwise by Valgrind's callgrind, switched on around the calls only; the record names the counter, or
the reasons why none is available. One thread, so that waiting threads add no instructions.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from cases import CPU_CASES

from fastlora.benchmark.case_run import CaseRun
from fastlora.benchmark.cases import FORWARD, FORWARD_BACKWARD
from fastlora.benchmark.implementations import IMPLEMENTATIONS
from fastlora.benchmark.record import Record, new_record, write
from fastlora.benchmark.workload import Round, Workload, round_of

TIMED = {name: IMPLEMENTATIONS[name] for name in ("linear", "fastlora", "peft")}
CASES = tuple(case for case in CPU_CASES if case.overhead)
WARM_UP = 20
ROOT = Path(__file__).resolve().parent.parent
# Callgrind is switched on and off by C macros, so this must be compiled; outside Valgrind the functions do nothing.
MARKS = r"""
#include <valgrind/callgrind.h>
void begin(void) { CALLGRIND_START_INSTRUMENTATION; CALLGRIND_ZERO_STATS; }
void end(const char *label) { CALLGRIND_STOP_INSTRUMENTATION; CALLGRIND_DUMP_STATS_AT(label); }
"""


class NoCounter(Exception):
    """An instruction counter is unavailable; the message is the reason."""


def runs() -> Iterator[tuple[tuple[str, str, str], Round]]:
    """(case, mode, implementation), and a function that makes one such call."""
    for case in CASES:
        record = new_record(torch.device("cpu"), 1, [], "none")
        built = CaseRun(Workload(case, torch.device("cpu")), TIMED, record)
        for mode in (FORWARD, FORWARD_BACKWARD):
            for name, layers in built.layers.items():
                yield (case.name, mode, name), round_of(mode, layers, built.work)


def repeat(run: Round, calls: int) -> None:
    for _ in range(calls):
        run()


def child(calls: int, marks: Path | None, index: int | None) -> None:
    """The observed process: makes every run between callgrind's marks, or without `marks` the run `index` only."""
    library = None if marks is None else ctypes.CDLL(str(marks))
    for number, (key, run) in enumerate(runs()):
        if index not in (None, number):
            continue
        repeat(run, WARM_UP)
        if library is not None:
            library.begin()
        repeat(run, calls)
        if library is not None:
            library.end("|".join(key).encode())


def count_by_perf(calls: int) -> dict[tuple[str, ...], float]:
    """Instructions per call: the difference between a process that makes the calls and one that does not, per call."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "stat")

        def counted(*command: str) -> int:
            arguments = ["perf", "stat", "-e", "instructions:u", "-x", ",", "-o", str(file)]
            try:
                _run([*arguments, *command])
            except FileNotFoundError as error:
                raise NoCounter("perf is not installed") from error
            except subprocess.CalledProcessError as error:
                raise NoCounter(f"perf failed: {error.stderr.strip()[-200:]}") from error
            value = file.read_text().strip().splitlines()[-1].partition(",")[0]
            if not value.isdigit():
                raise NoCounter(f"perf reports instructions:u as {value}")
            return int(value)

        counted("true")  # fail early
        found: dict[tuple[str, ...], float] = {}
        for index, (key, _) in enumerate(runs()):
            none, all_ = (counted(*_child(n, "--index", str(index))) for n in (0, calls))
            found[key] = (all_ - none) / calls
        return found


def count_by_callgrind(calls: int) -> dict[tuple[str, ...], float]:
    """Instructions per call between the marks of one process under Valgrind."""
    for program in ("valgrind", "cc"):
        if shutil.which(program) is None:
            raise NoCounter(f"{program} is not installed")
    with tempfile.TemporaryDirectory() as folder:
        source, library, out = (Path(folder, name) for name in ("marks.c", "marks.so", "out"))
        source.write_text(MARKS)
        try:
            _run(["cc", "-shared", "-fPIC", "-o", str(library), str(source)])
        except subprocess.CalledProcessError as error:
            raise NoCounter(f"valgrind/callgrind.h: {error.stderr.strip()[:200]}") from error
        tool = ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={out}"]
        _run([*tool, *_child(calls, "--marks", str(library))])
        return read_callgrind(Path(folder), calls)


def read_callgrind(folder: Path, calls: int) -> dict[tuple[str, ...], float]:
    """Instructions per call of each dump in the folder, by the label of its mark."""
    found = {}
    for file in folder.glob("out.*"):
        text = file.read_text()
        label = re.search(r"^desc: Trigger: Client Request: (.+)$", text, re.MULTILINE)
        total = re.search(r"^totals: (\d+)$", text, re.MULTILINE)
        if label and total:
            found[tuple(label.group(1).split("|"))] = int(total.group(1)) / calls
    return found


def _child(calls: int, *more: str) -> list[str]:
    return [sys.executable, str(Path(__file__)), "--calls", str(calls), *more]


def _run(command: list[str]) -> None:
    environment = os.environ | {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, capture_output=True, text=True, env=environment)


COUNTERS: dict[str, Callable[[int], dict[tuple[str, ...], float]]] = {
    "perf stat -e instructions:u": count_by_perf,
    "valgrind --tool=callgrind": count_by_callgrind,
}


def count(record: Record, calls: int) -> None:
    """Add the instructions of each call to its row, from the first available counter, and record why earlier ones failed."""
    record["counter"], record["no_counter"] = None, {}
    for name, counter in COUNTERS.items():
        try:
            found = counter(calls)
        except NoCounter as error:
            record["no_counter"][name] = str(error)
            continue
        record["counter"] = name
        for row in record["call_overhead"]:
            row["instructions"] = round(found[row["case"], row["mode"], row["backend"]])
        return


def measure(reps: int) -> Record:
    """Time every case and return the record."""
    record = new_record(torch.device("cpu"), reps, [], None)
    for case in CASES:
        CaseRun(Workload(case, torch.device("cpu")), TIMED, record).time_calls(reps)
    return record


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--reps", type=int, default=30, help="timed repetitions (default: %(default)s)"
    )
    parser.add_argument(
        "--calls",
        type=int,
        default=50,
        help="calls of each run whose instructions are counted (default: %(default)s)",
    )
    parser.add_argument("--output", type=Path, help="JSON file for the record")
    parser.add_argument("--marks", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--index", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    if arguments.marks is not None or arguments.index is not None:
        child(arguments.calls, arguments.marks, arguments.index)
        return 0
    record = {"kind": "overhead", **measure(arguments.reps)}
    count(record, arguments.calls)
    if arguments.output is not None:
        write(record, arguments.output)
    for row in record["call_overhead"]:
        print(
            f"{row['case']} {row['mode']} {row['backend']}: {row['us_p50']} µs, "
            f"{row.get('instructions', 'no')} instructions"
        )
    for name, reason in record["no_counter"].items():
        print(f"not counted by {name}: {reason}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
