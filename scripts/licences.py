"""Write docs/licences.md: every package that an installation holds, its version, and the licence that it declares.

    python scripts/licences.py [--check]

Reads the metadata of the packages in constraints.txt that are installed for the interpreter it runs under, so run it in the environment of `make test`.
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
    """The names in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line.split("==")[0] for line in lines if "==" in line and not line.startswith("#")]


def licence(name: str) -> tuple[str, str]:
    """(version, licence): the SPDX expression, else the classifiers, else the first line of the field."""
    metadata = distribution(name).metadata
    classifiers = [
        value.rpartition(" :: ")[2]
        for value in metadata.get_all("Classifier", [])
        if value.startswith("License ::") and value != "License :: OSI Approved"
    ]
    text = (metadata.get("License") or "").strip().splitlines()
    said = metadata.get("License-Expression") or ", ".join(classifiers) or (text[0] if text else "")
    return metadata["Version"], re.sub(r"\s+", " ", said).replace("|", "/")


def page() -> tuple[str, list[str]]:
    """The page, and the packages that declare no licence or are not installed."""
    rows, problems = [], []
    for name in pinned():
        try:
            version, said = licence(name)
        except PackageNotFoundError:
            problems.append(f"{name} is not installed")
            continue
        if not said:
            problems.append(f"{name} {version} declares no licence")
        rows.append(f"| {name} | {version} | {said or 'not declared'} |")
    head = [
        "# Licences of the dependencies",
        "",
        "What each package declares in its metadata, in the environment of `make test`. The library itself needs torch, numpy, safetensors and (on Linux)",
        "triton; the rest belongs to the extras, to the tests and to what they need in turn. Written by `python scripts/licences.py`.",
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
        "--check", action="store_true", help="fail if the page is not what would be written"
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
