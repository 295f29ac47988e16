"""Generated data folders: written atomically, and only if they are missing, incomplete or outdated."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from fastlora.errors import DataError
from fastlora.files import read_json, replaced_folder, write_json

MANIFEST = "manifest.json"


def generate_folder(
    root: str | os.PathLike[str], recipe: Mapping[str, object], write: Callable[[Path], None]
) -> Path:
    """The folder that `write` generates, reused if it is complete and has the same `recipe`.

    A manifest in it stores the recipe and each file's SHA-256. A folder with another recipe, or with
    missing or changed files, is rebuilt: `write` fills a temporary folder, which then replaces it.

    recipe: JSON-serialisable settings that determine the contents. write: fills an empty folder.
    Raises: DataError if the folder holds files that are not in its manifest, which would be lost.
    """
    root = Path(root).absolute()
    recipe = json.loads(json.dumps(recipe))
    if _is_complete(root, recipe):
        return root
    _refuse_foreign(root)
    try:
        with replaced_folder(root) as new:
            write(new)
            write_json(new / MANIFEST, {"recipe": recipe, "files": digests(new)})
    except OSError:
        if not _is_complete(root, recipe):  # otherwise another process has written it
            raise
    return root


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file below a folder, by its path in it."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256(path) for path in paths}


def _manifest(root: Path) -> tuple[object, dict[str, str]]:
    """Recipe and file hashes of a folder; (None, {}) without a readable manifest."""
    try:
        manifest = read_json(root / MANIFEST)
        return manifest["recipe"], dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return None, {}


def _is_complete(root: Path, recipe: Mapping[str, object]) -> bool:
    found, files = _manifest(root)
    return found == recipe and all(
        (root / name).is_file() and sha256(root / name) == digest for name, digest in files.items()
    )


def _refuse_foreign(root: Path) -> None:
    if root.exists() and not root.is_dir():
        raise DataError(f"{root}: expected a folder or nothing, got a file")
    found = {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}
    if foreign := found - {MANIFEST, *_manifest(root)[1]}:
        raise DataError(
            f"{root}: expected a generated folder or none, got {min(foreign)} in it, which its "
            f"{MANIFEST} does not list (nothing was changed; choose another folder)"
        )
