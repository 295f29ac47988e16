"""`fastlora bench`: time fastlora, PEFT and the frozen layer on this machine, and print one table."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastlora.benchmark import plan, table
from fastlora.benchmark.case_run import run_case
from fastlora.benchmark.cases import BASELINE, DEFAULT_CPU, DEFAULT_CUDA, DTYPES, Case
from fastlora.benchmark.implementations import IMPLEMENTATIONS, PEFTS
from fastlora.benchmark.record import Budget, Record, new_record, nvidia_smi, write
from fastlora.errors import BackendError, CheckpointError, ConfigError
from fastlora.files import read_json_object

FORMAT = "fastlora-bench-1"  # in every file that the command writes, and nothing else is replaced
NAMES = (BASELINE, "fastlora", *PEFTS)
SECONDS = 120.0
ROWS = {"cpu": 512, "cuda": 8192}  # with --layers

ABOUT = "Time fastlora on this machine, against PEFT and the frozen layer"
TEXT = """\
Each layer's output and gradients are compared with float64 first: a wrong result gets no time. Then all implementations run in turn;
times are medians in milliseconds per call, and `PEFT / fastlora` above 1 means that fastlora is faster. PEFT is timed if it is
installed, with float32 adapters, its default, and with adapters in the model's dtype; the faster counts. On a GPU `graph` is the
GPU's work alone, replayed as a CUDA graph, and `eager` a call from Python. "saved" is what the forward pass keeps for the backward
pass, "peak" the most memory that a run allocates. Without --layers a few common layers are timed (smaller ones on a CPU). A case
that would not end within --seconds is not started, and is named. docs/benchmarks.md describes the method.

examples:
  fastlora bench
  fastlora bench --layers 4096x4096,4096x14336 --rows 8192 --rank 16 --dropout 0.1 --dtype bfloat16 --output bench.json

exit code: 0; 1 if a result was wrong or fastlora failed; 2 for an invalid argument. `python -m fastlora.bench` is the same command.
"""
HINT = """\
Where: an issue with the template "performance", in the repository that you got fastlora from. Attach the file of --output.
What the file contains: the names of the GPU and the CPU, their clocks, memory and driver; the versions of fastlora, torch, Triton, PEFT
and Python, and fastlora's commit if it runs from its sources; the date; the options of this command without the name of the
file; shapes, times, bytes, and the reason for each missing time. No name of a host or a user, and no folder of this machine."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to its parser."""
    add: Any = parser.add_argument
    add("--layers", type=_layers, metavar="KxN,…", help="in and out features of the layers to time")
    add(
        "--rows", type=_whole, help=f"rows of the input, M ({ROWS['cuda']}, on a CPU {ROWS['cpu']})"
    )
    add("--rank", type=_whole, help="rank of the adapters (16)")
    add("--dropout", type=_dropout, help="dropout probability (0; in the default list 0 and 0.1)")
    add("--dtype", choices=DTYPES, help="dtype of the model (bfloat16, on a CPU float32)")
    add("--bias", action="store_true", default=None, help="the layers of --layers have a bias")
    add("--device", choices=("cpu", "cuda"), help="device (cuda if there is one)")
    about = "time limit; a case that is expected to end later is not started (%(default)g)"
    add("--seconds", type=_seconds, default=SECONDS, help=about)
    about = "JSON file to write the record to; an existing file is replaced only if this command wrote it"
    add("--output", type=Path, metavar="FILE", help=about)
    about = "print where to send the JSON file and what it contains, and measure nothing"
    add("--upload-hint", action="store_true", help=about)


def run(arguments: argparse.Namespace) -> int:
    """Run the command. Returns the exit code.

    Raises: ConfigError for options that do not go together or an --output that is not ours; BackendError without the requested device.
    """
    if arguments.upload_hint:
        print(HINT)
        return 0
    if arguments.output is not None:
        check_output(arguments.output)
    device = _device(arguments.device)
    cases = _cases(arguments, device)
    record = measure(
        cases, device, arguments.seconds, _command(arguments, device), arguments.output
    )
    print(table.origin(record))
    if record["comparison"]:
        print(f"\n{table.table(record['comparison'])}\n")
    print(table.verdict(record))
    if record["not_run"]:
        print(
            f"not run, because of --seconds {arguments.seconds:g}: {', '.join(record['not_run'])}"
        )
    if arguments.output is not None:
        print(f"written: {arguments.output.name} (--upload-hint: where to send it)")
    return int(failed(record))


def measure(
    cases: list[Case], device: torch.device, seconds: float, command: str, output: Path | None
) -> Record:
    """The record of all cases that end in time; `output` is written after each.

    Raises: ConfigError if no case ends in time.
    """
    builders = {name: IMPLEMENTATIONS[name] for name in NAMES}
    budget, speed = Budget(seconds), plan.seconds_per_flop(device)
    timed = len(builders) - (cases[0].dtype in ("float32", "tf32"))  # PEFT's two are one
    expected = [plan.expected(case, device, timed, speed) for case in cases]
    reps = plan.reps_that_fit(expected, seconds)
    shortest = min(each.total(reps) for each in expected)
    if shortest >= seconds:
        raise ConfigError(
            f"--seconds: no case ends within {seconds:g} s, the shortest takes about {shortest:.0f} s; use fewer --rows or more --seconds"
        )
    record = new_record(device, reps, [case.name for case in cases], None, command)
    record = {"format": FORMAT, **record, "comparison": []}
    for number, (case, each) in enumerate(zip(cases, expected, strict=True), 1):
        if not budget.begin_case(each.total(reps)):
            continue
        print(f"{number}/{len(cases)}: {case.name}", file=sys.stderr, flush=True)
        run_case(case, device, builders, reps, record)
        record["seconds"][case.name] = round(budget.end_case(), 1)
        record["not_run"].remove(case.name)
        record["comparison"] = table.comparison(record)
        if device.type == "cuda":
            record["environment"]["clocks_after"] = nvidia_smi()
        if output is not None:
            write(record, output)
    return record


def failed(record: Record) -> bool:
    """Whether a result was wrong, or fastlora did not run for another reason than memory."""
    kinds = [(row["backend"], row["kind"]) for row in record["absent"]]
    return any(
        kind == "wrong" or (name == "fastlora" and kind not in ("absent", "OutOfMemoryError"))
        for name, kind in kinds
    )


def check_output(path: Path) -> None:
    """Raises: ConfigError if a record cannot be written there, or if that would replace a file of another kind."""
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError(f"--output: expected a file in an existing, writable folder, got {path}")
    if not path.exists() and not path.is_symlink():
        return
    try:
        ours = read_json_object(path).get("format") == FORMAT
    except CheckpointError:
        ours = False
    if not ours:
        raise ConfigError(f"--output: {path} was not written by this command and is not replaced")


def _device(name: str | None) -> torch.device:
    if not torch.cuda.is_available():
        if name == "cuda":
            raise BackendError("--device: expected cpu, got cuda: there is no CUDA device")
        if name is None:
            print("no CUDA device: measuring the CPU", file=sys.stderr)
        name = "cpu"
    return torch.device(name or "cuda")


def _cases(arguments: argparse.Namespace, device: torch.device) -> list[Case]:
    """The cases of --layers or the default ones, with the other options applied."""
    if arguments.bias and arguments.layers is None:
        raise ConfigError("--bias: expected --layers with it; the default layers have their own")
    if arguments.dtype == "tf32" and device.type == "cpu":
        raise ConfigError("--dtype: expected float32, bfloat16 or float16 on a CPU, got tf32")
    on_gpu = device.type == "cuda"
    dtype = arguments.dtype
    if dtype is None and on_gpu:
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if native else "float16"
    if arguments.layers is None:
        cases = list(DEFAULT_CUDA if on_gpu else DEFAULT_CPU)
    else:
        rows = ROWS[device.type]
        cases = [Case(rows, k, n, 16, bias=bool(arguments.bias)) for k, n in arguments.layers]
    given = {"m": arguments.rows, "rank": arguments.rank, "p": arguments.dropout, "dtype": dtype}
    given = {name: value for name, value in given.items() if value is not None}
    return list(dict.fromkeys(replace(case, **given) for case in cases))


def _command(arguments: argparse.Namespace, device: torch.device) -> str:
    """The command that repeats the run. It does not name the output: a path can tell who ran it."""
    words = ["python", "-m", "fastlora.bench", "--device", device.type]
    if arguments.layers is not None:
        words += ["--layers", ",".join(f"{k}x{n}" for k, n in arguments.layers)]
    for name in ("rows", "rank", "dropout", "dtype", "seconds"):
        value = getattr(arguments, name)
        if value is not None:
            words += [f"--{name}", f"{value:g}" if isinstance(value, float) else str(value)]
    return " ".join(words + ["--bias"] * bool(arguments.bias))


def _layers(text: str) -> list[tuple[int, int]]:
    found = [re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", part) for part in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(
            f"expected in and out features as 4096x4096,4096x14336, got {text!r}"
        )
    return [(int(match[1]), int(match[2])) for match in found if match is not None]


def _whole(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"expected a whole number ≥ 1, got {text!r}")
    return int(text)


def _dropout(text: str) -> float:
    value = _float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected 0 ≤ p < 1, got {text!r}")
    return value


def _seconds(text: str) -> float:
    value = _float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of seconds > 0, got {text!r}")
    return value


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
