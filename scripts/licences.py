"""Write docs/licences.md: the version and the declared licence of every dependency.

    python scripts/licences.py [--check]

Reads the metadata of the installed packages of constraints.txt, so run it in the environment of `make test`.
"""

from __future__ import annotations

import argparse
import re
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "licences.md"


def pinned() -> list[str]:
    """The names of the packages in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line.split("==")[0] for line in lines if "==" in line and not line.startswith("#")]


def licence(name: str) -> tuple[str, str]:
    """Version and licence: the SPDX expression, else the classifiers, else the first line of the licence field.

    Raises: PackageNotFoundError if the package is not installed.
    """
    metadata = distribution(name).metadata
    classifiers = [
        value.rpartition(" :: ")[2]
        for value in metadata.get_all("Classifier", [])
        if value.startswith("License ::") and value != "License :: OSI Approved"
    ]
    text = (metadata.get("License") or "").strip().splitlines()
    declared = (
        metadata.get("License-Expression") or ", ".join(classifiers) or (text[0] if text else "")
    )
    return metadata["Version"], re.sub(r"\s+", " ", declared).replace("|", "/")


def page() -> tuple[str, list[str]]:
    """The text of the page, and a message for each package that declares no licence or is not installed."""
    rows, problems = [], []
    for name in pinned():
        try:
            version, declared = licence(name)
        except PackageNotFoundError:
            problems.append(f"{name} is not installed")
            continue
        if not declared:
            problems.append(f"{name} {version} declares no licence")
        rows.append(f"| {name} | {version} | {declared or 'not declared'} |")
    head = [
        "# Licences of the dependencies",
        "",
        "What each package declares in its metadata, in the environment of `make test`. The library itself needs torch, numpy, safetensors and (on Linux)",
        "triton; the other packages are needed by the extras and the tests, directly or indirectly. Written by `python scripts/licences.py`.",
        "",
        "| package | version | licence |",
        "| --- | --- | --- |",
    ]
    notes = (
        ["", "Without a declaration or not installed: " + "; ".join(problems) + "."]
        if problems
        else []
    )
    return "\n".join([*head, *rows, *notes]) + "\n", problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing, exit 1 if the page is not up to date"
    )
    arguments = parser.parse_args()
    text, problems = page()
    for problem in problems:
        print(problem, file=sys.stderr)
    if arguments.check:
        return int(PAGE.read_text() != text)
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
