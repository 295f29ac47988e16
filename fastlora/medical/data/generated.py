"""Folders of data that code writes: whole or not at all, and only once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from fastlora.errors import DataError

MANIFEST = "manifest.json"


def generate_folder(
    root: str | os.PathLike[str], recipe: Mapping[str, object], write: Callable[[Path], None]
) -> Path:
    """The folder that ``write`` makes after ``recipe``, written unless it is there whole already.

    A manifest in it keeps the recipe and each file's SHA-256. A folder of another recipe, or with
    files missing or changed, is made anew; `write` works in a folder beside it that is renamed when
    finished.

    recipe: anything JSON can hold; what decides the contents. write: fills the empty folder it is
    given.
    Raises: DataError if the folder holds files that are not in its manifest: they would be lost.
    """
    root = Path(root).absolute()
    recipe = json.loads(json.dumps(recipe))
    if _is_complete(root, recipe):
        return root
    _refuse_foreign(root)
    root.parent.mkdir(parents=True, exist_ok=True)
    workshop = Path(tempfile.mkdtemp(dir=root.parent, prefix=f".{root.name}-partial-"))
    try:
        new = workshop / "new"
        new.mkdir()
        write(new)
        files = {
            p.relative_to(new).as_posix(): sha256(p) for p in sorted(new.rglob("*")) if p.is_file()
        }
        manifest = json.dumps({"recipe": recipe, "files": files}, indent=1)
        (new / MANIFEST).write_text(manifest + "\n", encoding="utf-8")
        if root.exists():
            os.replace(root, workshop / "old")
        os.replace(new, root)
    except OSError:
        if not _is_complete(root, recipe):  # else another process was faster
            raise
    finally:
        shutil.rmtree(workshop, ignore_errors=True)
    return root


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _manifest(root: Path) -> tuple[object, dict[str, str]]:
    """Recipe and file hashes of a folder; (None, {}) without a manifest that can be read."""
    try:
        manifest = json.loads((root / MANIFEST).read_text(encoding="utf-8"))
        return manifest["recipe"], dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return None, {}


def _is_complete(root: Path, recipe: Mapping[str, object]) -> bool:
    found, files = _manifest(root)
    return found == recipe and all(
        (root / n).is_file() and sha256(root / n) == h for n, h in files.items()
    )


def _refuse_foreign(root: Path) -> None:
    if root.exists() and not root.is_dir():
        raise DataError(f"{root}: expected a folder or nothing, got a file")
    ours = {MANIFEST, *_manifest(root)[1]}
    foreign = [
        p
        for p in sorted(root.rglob("*"))
        if p.is_file() and p.relative_to(root).as_posix() not in ours
    ]
    if foreign:
        raise DataError(
            f"{root}: expected a folder that was generated here, or none, got "
            f"{foreign[0].relative_to(root)} in it, which its {MANIFEST} does not list "
            "(nothing was changed; choose another folder)"
        )
