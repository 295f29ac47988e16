"""The preprocessing cache: its entries, and their index `manifest.json` and `skipped.csv`.

An entry is a dataclass of arrays, in memory and in an `.npz` file, whose name has a hash of the
source files and the settings.
The manifest lists every usable structure with the SHA-256 of its sources and of the cache files
that were prepared (grids; slices and meshes on request), and every skipped one with the reason.
Training with `--cache_dir` uses only structures listed there.
"""

from __future__ import annotations

import csv
import hashlib
import io
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fastlora.errors import DataError
from fastlora.files import atomic_write, read_json, read_npz, write_json
from fastlora.medical.data.generated import digests, sha256
from fastlora.medical.scans.volumes import Case, with_structures

FORMAT = "fastlora-medical-manifest-1"
NAME = "manifest.json"
SKIPPED = "skipped.csv"

log = logging.getLogger(__name__)

Layout = Mapping[str, tuple[str, tuple[int | str, ...]]]
"""Name → (dtype, shape) of each array of an entry, as `read_npz` checks them."""

Entry = TypeVar("Entry")

MEMORY_BYTES = 2 * 1024**3
"""Size limit of the entries that a process keeps in memory; the least recently used are dropped first."""

MEMORY: dict[str, Any] = {}
"""File name → entry, the most recently used last."""


def load_entry(
    path: Path,
    layout: Layout,
    make: Callable[..., Entry],
    compute: Callable[[], Entry],
    on_disk: bool = True,
    keep: bool = True,
) -> Entry:
    """An entry from memory or its file; if it is in neither, or the file is damaged, computed.

    Then it is written if it has no usable file. A damaged file is logged. make: makes an entry from
    the arrays of `layout` by name. on_disk: False neither reads nor writes the file. keep: in memory.
    """
    entry: Entry | None = MEMORY.pop(path.name, None)
    unwritten = on_disk and not path.is_file()
    if entry is None and on_disk and not unwritten:
        try:
            entry = make(**read_npz(path, layout))
        except (OSError, ValueError) as error:
            log.warning("%s: damaged cache entry is recomputed (%s)", path, error)
            unwritten = True
    if entry is None:
        entry = compute()
    if unwritten:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Atomic, because another process may be reading or writing the same entry.
        atomic_write(path, lambda file: np.savez(file, **vars(entry)))
    if keep:
        MEMORY[path.name] = entry
    while len(MEMORY) > 1 and _memory_bytes() > MEMORY_BYTES:
        del MEMORY[next(iter(MEMORY))]
    return entry


def _memory_bytes() -> int:
    return sum(array.nbytes for entry in MEMORY.values() for array in vars(entry).values())


@dataclass(frozen=True)
class Outcome:
    """The result of preprocessing one structure; `problem` is the reason if it cannot be used.

    volume_ml: measured on the fine grid. regions: their number. shape, spacing (mm): of
    the box that slices are cut from. slices: number of samples along each axis; all three are empty
    without slices. sources: digest of each path read. files: digest of each cache file.
    """

    subject: str
    structure: str
    problem: str | None = None
    shape: tuple[int, ...] = ()
    spacing: tuple[float, ...] = ()
    volume_ml: float = 0.0
    slices: tuple[int, ...] = ()
    regions: int = 0
    sources: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)


def digest(path: Path) -> str:
    """SHA-256 of a file, or of the names and digests of all files below a folder.

    Raises: DataError if the path does not exist.
    """
    if path.is_dir():
        lines = [f"{name} {value}\n" for name, value in digests(path).items()]
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    if not path.is_file():
        raise DataError(f"{path}: expected a file, got nothing at that path")
    return sha256(path)


def write_manifest(
    cache_dir: Path, settings: dict[str, Any], outcomes: Sequence[Outcome], problems: Sequence[str]
) -> None:
    """Write both files atomically, replacing those of an earlier run.

    settings: of the run, JSON-serialisable. problems: of cases that could not be listed.
    """
    ready = [asdict(outcome) for outcome in outcomes if outcome.problem is None]
    for entry in ready:
        del entry["problem"]
    columns = ("subject", "structure", "reason")
    rows = [(o.subject, o.structure, o.problem) for o in outcomes if o.problem is not None]
    table = [columns, *rows, *((None, None, problem) for problem in problems)]
    skipped = [dict(zip(columns, row, strict=True)) for row in table[1:]]
    atomic_write(cache_dir / SKIPPED, csv_bytes(table))
    content = {"format": FORMAT, "settings": settings, "structures": ready, "skipped": skipped}
    write_json(cache_dir / NAME, content)


def csv_bytes(table: Iterable[Iterable[object]]) -> bytes:
    """Rows as CSV in UTF-8. Text that a spreadsheet would take for a formula (`=…`, `+…`, `-…`, `@…`) begins with an apostrophe."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([_safe(cell) for cell in row] for row in table)
    return text.getvalue().encode(errors="backslashreplace")  # a file's name may not be UTF-8


def _safe(cell: object) -> object:
    if not isinstance(cell, str):
        return cell
    quote = "'" if cell.startswith(("=", "+", "-", "@", "\t", "\r")) else ""
    return quote + cell.replace(
        "\r", " "
    )  # the writer does not quote it, and readers end the row there


def read_manifest(cache_dir: Path) -> dict[str, Any]:
    """The manifest's content.

    Raises: DataError if it is missing or was not written by `write_manifest`.
    """
    path = cache_dir / NAME
    try:
        content = read_json(path)
    except FileNotFoundError as error:
        raise DataError(
            f"cache_dir: expected {path}, which `fastlora-medical preprocess` writes, got nothing there"
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected a manifest, got {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(f"{path}: expected a manifest of format {FORMAT!r}, got another file")
    listed = content.get("structures")
    if not isinstance(listed, list) or not all(_is_entry(entry) for entry in listed):
        raise DataError(
            f"{path}: expected subject, structure, and digests of sources and files in each of 'structures'"
        )
    return content


def _is_entry(entry: object) -> bool:
    match entry:
        case {"subject": str(), "structure": str(), "sources": dict(a), "files": dict(b)}:
            return all(isinstance(value, str) for value in (*a.values(), *b.values()))
    return False


def usable_cases(cases: Sequence[Case], cache_dir: Path) -> list[Case]:
    """The cases, reduced to the structures that the manifest lists as usable.

    Raises: DataError as `read_manifest`, or if it lists none of them.
    """
    listed = {(s["subject"], s["structure"]) for s in read_manifest(cache_dir)["structures"]}
    kept = with_structures(cases, lambda case, name: (case.subject, name) in listed)
    if not kept:
        raise DataError(
            f"{cache_dir / NAME}: expected structures of {cases[0].subject}, …, got those of "
            f"{', '.join(sorted({subject for subject, _ in listed})[:3]) or 'none'}: "
            "the cache is of another data set"
        )
    return kept


def verify(cache_dir: Path) -> list[str]:
    """One line for each listed source or cache file whose digest differs from the manifest.

    Raises: DataError as `read_manifest`.
    """
    wanted: dict[Path, str] = {}
    for entry in read_manifest(cache_dir)["structures"]:
        wanted |= {Path(name): value for name, value in entry["sources"].items()}
        wanted |= {cache_dir / name: value for name, value in entry["files"].items()}
    differences = []
    for path, value in wanted.items():
        try:
            found = digest(path)
        except (DataError, OSError) as error:  # OSError: a name too long for a file
            differences.append(str(error))
        else:
            if found != value:
                differences.append(f"{path}: expected SHA-256 {value[:12]}…, got {found[:12]}…")
    return differences
