"""Entries of the preprocessing cache: one `.npz` file each, its name a hash of the source files and the settings."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastlora import files

log = logging.getLogger(__name__)

Layout = Mapping[str, tuple[str, tuple[int | str, ...]]]
"""Name → (dtype, shape) of each array of an entry, as `files.read_npz` checks them."""


def read_entry(path: Path, layout: Layout) -> dict[str, NDArray[Any]] | None:
    """The arrays of an entry; None if it does not exist, or, with a warning in the log, if it is damaged."""
    if not path.is_file():
        return None
    try:
        return files.read_npz(path, layout)
    except (OSError, ValueError) as error:
        log.warning("%s: damaged cache entry is recomputed (%s)", path, error)
        return None


def write_entry(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write an entry atomically: another process may be reading or writing the same one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.atomic_write(path, lambda file: np.savez(file, **arrays))
