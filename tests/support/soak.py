"""The long reliability tests, with a table of what was tested, how often, and what failed: `make soak`.

    python -m tests.support.soak [--scale 1.0] [--only REGEX] [--write docs/reliability.md]

The exit code is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # before the kernels are imported

import torch

from tests.support import endurance, hostile, parity

PACKAGES = ("torch", "triton", "numpy", "safetensors", "nibabel", "hypothesis")


@dataclass
class Line:
    """One line of the table."""

    part: str
    what: str
    tried: int
    unit: str
    seconds: float
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        failed = f"{len(self.failures)}: {self.failures[0]}" if self.failures else "none"
        amount, time_taken = f"{self.tried:,} {self.unit}", f"{self.seconds:.0f} s"
        return f"| {self.part} | {self.what} | {amount} | {time_taken} | {failed} |"


def cases(check: Callable[[int], None], count: int) -> tuple[int, list[str]]:
    """Run the check with `count` seeds; return how many ran, and the failures."""
    failures = []
    for number in range(count):
        try:
            check(number)
        except AssertionError as error:
            failures.append(str(error).splitlines()[0])
    return count, failures


def fuzz(reader: hostile.Reader, folder: Path, inputs: int) -> tuple[int, list[str]]:
    """Fuzz one reader; return how many files it read, and the failures."""
    tried = [0]
    read = reader.read

    def counted(path: Path) -> object:
        tried[0] += 1
        return read(path)

    try:
        hostile.fuzz(replace(reader, read=counted), folder, inputs)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # any other error is a failure of the reader
        # Hypothesis adds the smallest failing input as a note.
        notes = "; ".join(getattr(error, "__notes__", []))
        return tried[0], [" ".join(f"{error!r} {notes}".split())]
    return tried[0], []


def parts(
    folder: Path, scale: float
) -> list[tuple[str, str, str, Callable[[], tuple[int, list[str]]]]]:
    """(part, what, unit, run) of every line; `run` returns how many were tried, and the failures."""

    def n(count: int) -> int:
        return max(1, round(count * scale))

    def kills() -> tuple[int, list[str]]:
        return n(60), endurance.kill_runs(folder / "kills", n(60))[1]

    lines = [
        (
            "faults",
            "SIGKILL at a random moment of a training run, resumed until it ends",
            "kills",
            kills,
        ),
        (
            "faults",
            "the same run twice, under 1 and under 2 threads",
            "runs",
            lambda: (4, endurance.repeated_runs(folder / "threads", (1, 2))),
        ),
        (
            "numerics",
            "layer calls against float64: shapes, strides, dtypes, ranks, dropout, autocast, grad modes",
            "calls",
            lambda: cases(parity.check_call, n(6_000)),
        ),
        (
            "numerics",
            "Triton kernels, interpreted, against float64",
            "calls",
            lambda: cases(parity.check_kernels, n(400)),
        ),
        (
            "numerics",
            "inf, nan, subnormal, 1e30, zeros, against the plain formula",
            "calls",
            lambda: cases(parity.check_extreme, n(5_000)),
        ),
        (
            "numerics",
            "gradcheck in float64",
            "calls",
            lambda: cases(parity.check_gradients, n(200)),
        ),
        (
            "numerics",
            "dropout masks under 1 and 2 threads",
            "calls",
            lambda: (n(300), endurance.repeated_calls(n(300))),
        ),
    ]
    for dtype in (torch.float32, torch.bfloat16):
        lines.append(
            (
                "numerics",
                f"merge, use the adapters again, merge again, {str(dtype)[6:]}",
                "rounds",
                lambda dtype=dtype: (n(1_000), endurance.merge_rounds(n(1_000), dtype)),
            )
        )
    lines += [
        (
            "leaks",
            "training steps with dropout: live tensors, resident memory",
            "steps",
            lambda: (n(2_000), endurance.training_steps(n(2_000))),
        ),
        (
            "leaks",
            "inject, backward pass, merge: adapters freed, memory, open files",
            "rounds",
            lambda: (n(500), endurance.injections(n(500))),
        ),
        (
            "leaks",
            "save, load, refuse damaged files: open files",
            "rounds",
            lambda: (n(2_000), endurance.file_rounds(folder, n(2_000))),
        ),
    ]
    for name, reader in hostile.readers(folder).items():
        lines.append(
            ("hostile files", name, "files", lambda reader=reader: fuzz(reader, folder, n(3_400)))
        )
    return lines


def report(lines: list[Line], command: str, seconds: float) -> str:
    """The table with its command, date and versions."""
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    files = sum(line.tried for line in lines if line.part == "hostile files")
    failures = sum(len(line.failures) for line in lines)
    return "\n".join(
        [
            "| part | what | tried | time | failures |",
            "| --- | --- | --- | --- | --- |",
            *map(str, lines),
            "",
            f"Hostile files: {files:,}. Failures: {failures or 'none'}. Peak memory: {peak_mib():,.0f} MiB.",
            "",
            f"`{command}`, {datetime.date.today()}, {seconds / 60:.0f} minutes on {os.cpu_count()} CPU cores; "
            f"Python {platform.python_version()}, {versions}, {platform.system()} {platform.machine()}.",
        ]
    )


def peak_mib() -> float:
    """The largest resident memory of this process so far."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def write(page: Path, table: str) -> None:
    """Write the table between the two markers of the page.

    Raises: SystemExit if a marker is missing.
    """
    before, start, rest = page.read_text().partition("<!-- soak -->\n")
    _, end, after = rest.partition("<!-- end of soak -->")
    if not (start and end):
        raise SystemExit(f"{page}: expected the markers <!-- soak --> and <!-- end of soak -->")
    page.write_text(f"{before}{start}{table}\n{end}{after}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--scale", type=float, default=1.0, help="multiply every count by this (default: 1)"
    )
    parser.add_argument("--only", default="", metavar="REGEX", help="run only the lines that match")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write the table into this page")
    arguments = parser.parse_args()
    began, lines = time.perf_counter(), []
    with tempfile.TemporaryDirectory(prefix="soak-") as folder, open(os.devnull, "w") as nowhere:
        with redirect_stdout(nowhere):
            work = parts(Path(folder), arguments.scale)
        for part, what, unit, run in work:
            if not re.search(arguments.only, f"{part}: {what}"):
                continue
            start = time.perf_counter()
            with redirect_stdout(nowhere):
                tried, failures = run()
            lines.append(Line(part, what, tried, unit, time.perf_counter() - start, failures))
            print(lines[-1], flush=True)
    command = " ".join(["python -m tests.support.soak", *sys.argv[1:]])
    table = report(lines, command, time.perf_counter() - began)
    print(f"\n{table}")
    if arguments.write:
        write(arguments.write, table)
    return int(any(line.failures for line in lines))


if __name__ == "__main__":
    sys.exit(main())
