"""Test the library under the oldest and the newest versions that pyproject.toml allows, and some between, and write docs/compatibility.md.

    python scripts/compatibility.py --oldest_python python3.10 --middle_python python3.12 --newest_python python3.13

Needs Python 3.11 or newer. Each row of the table gets a virtual environment under --folder, about 6 GB because PyPI's torch requires
the CUDA libraries; an existing one is updated. The medical application is not tested; its packages are pinned for make demo and make test.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import tomllib

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "compatibility.md"
SHOWN = ("torch", "triton", "numpy", "safetensors", "peft", "transformers")
# Those of the GPU machine whose records are in benchmarks/results/, but for NumPy, which Triton 3.6's interpreter needs older.
MIDDLE = {"torch": "2.11.0", "triton": "3.6.0", "numpy": "2.3.5"}
TOOLS = ("pytest", "pytest-xdist", "hypothesis", "setuptools", "transformers")


def requirements(row: str) -> list[str]:
    """The requirements to install for a row of the table: the library, YAML and PEFT, and the packages that the tests need."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["yaml"]]
    wanted += [line for line in extras["dev"] if line.startswith("peft")]
    pairs = [re.match(r"([\w-]+)>=([\w.]+)", line) for line in wanted]
    found = [(pair[1], pair[2]) for pair in pairs if pair is not None]
    versions = {"oldest": dict(found), "middle": MIDDLE, "newest": {}}[row]
    named = [f"{name}=={versions[name]}" if name in versions else name for name, _ in found]
    return named + list(TOOLS)


def excluded() -> list[str]:
    """The test files that need the medical application or check this repository's documents."""
    other = re.compile(
        r"fastlora\.medical|support\.(hostile|layouts|tiny_run|endurance)|import endurance|nibabel"
    )
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    pages = ("test_docs.py", "test_layout.py", "test_packaging.py")
    found = [file for file in files if file.name in pages or other.search(file.read_text())]
    return [str(file.relative_to(ROOT)) for file in found]


def environment(folder: Path, python: str, row: str) -> Path:
    """Create the environment if it is missing, install the requirements, and return its interpreter."""
    interpreter = folder / "bin" / "python"
    if not interpreter.exists():
        subprocess.run([python, "-m", "venv", str(folder)], check=True)
    pip = [str(interpreter), "-m", "pip", "install", "--quiet", "--upgrade"]
    subprocess.run([*pip, *requirements(row)], check=True)
    return interpreter


def versions(interpreter: Path) -> dict[str, str]:
    """The versions of Python and of the packages in the table."""
    program = (
        "import json, platform; from importlib.metadata import version; "
        f"print(json.dumps({{'python': platform.python_version(), **{{n: version(n) for n in {SHOWN!r}}}}}))"
    )
    out = subprocess.run(
        [str(interpreter), "-c", program], check=True, capture_output=True, text=True
    )
    found: dict[str, str] = json.loads(out.stdout)
    return found


def run_tests(interpreter: Path, report: Path, jobs: int) -> tuple[dict[str, int], list[str]]:
    """Run the tests in `jobs` processes; return how many passed, failed and were skipped, and the names of those that failed.

    Raises: SystemExit if pytest wrote no result.
    """
    command = [str(interpreter), "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"]
    command += ["-n", str(jobs), *(f"--ignore={file}" for file in excluded())]
    surroundings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    report.unlink(missing_ok=True)  # from an earlier run
    subprocess.run([*command, f"--junitxml={report}"], cwd=ROOT, env=surroundings, check=False)
    suite = ElementTree.parse(report).getroot().find("testsuite") if report.is_file() else None
    if suite is None:
        raise SystemExit(f"{interpreter}: pytest ended without a result")
    count = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    passed = count["tests"] - failed - count["skipped"]
    names = [
        f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return {"passed": passed, "failed": failed, "skipped": count["skipped"]}, names


def page(rows: Sequence[dict[str, str | int]], failed: dict[str, list[str]]) -> str:
    """The text of docs/compatibility.md. failed: the names of the failed tests, by row."""
    failures = [
        f"- {row}: {', '.join(map('`{}`'.format, names)) or 'none'}"
        for row, names in failed.items()
    ]
    head = ["", "Python", *SHOWN, "passed", "failed", "skipped"]
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    lines += ["| " + " | ".join(str(value) for value in row.values()) + " |" for row in rows]
    return "\n".join(
        [
            "# Compatibility",
            "",
            "Test results of the library without its medical application under the oldest and the newest versions of its dependencies, and some between, on a CPU.",
            "All other results in this repository were obtained with the versions of `constraints.txt` (`make test`).",
            "",
            *lines,
            "",
            f"`python scripts/compatibility.py`, {datetime.date.today()}, {platform.system()} {platform.machine()}. Newest: the versions that pip installs without a version constraint; oldest: the lower bounds in `pyproject.toml`; middle: the torch and Triton of the H100 that made records.",
            "",
            "Failed:",
            "",
            *failures,
            "",
            'The section "Other versions" of [design.md](design.md) gives the reasons.',
            "",
            "- The kernels need Triton 3.4. With an older version the library can be imported, runs torch on every device, and `explain` gives the reason; the",
            "  test files of the kernels (named in `tests/conftest.py`) are then not collected and not counted.",
            "- Tests that an old torch cannot pass are skipped with the reason (`tests/support/versions.py`), and so are tests of packages that are not installed",
            "  here (ONNX, bitsandbytes, torchao, diffusers, accelerate's trainer).",
            "",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run both rows and write the page; returns 1 if a test failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--oldest_python", default="python3.10", help="default: %(default)s")
    parser.add_argument("--middle_python", default="python3.12", help="default: %(default)s")
    parser.add_argument("--newest_python", default="python3.13", help="default: %(default)s")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument(
        "--folder",
        type=Path,
        default=ROOT / "build" / "compatibility",
        help="folder of the environments and results (default: %(default)s)",
    )
    arguments = parser.parse_args(argv)
    rows: list[dict[str, str | int]] = []
    failed: dict[str, list[str]] = {}
    for name in ("oldest", "middle", "newest"):
        python = getattr(arguments, f"{name}_python")
        interpreter = environment(arguments.folder / name, python, name)
        counts, failed[name] = run_tests(
            interpreter, arguments.folder / f"{name}.xml", arguments.jobs
        )
        rows.append({"": name, **versions(interpreter), **counts})
        print(rows[-1], flush=True)
    PAGE.write_text(page(rows, failed), encoding="utf-8")
    return int(any(row["failed"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
