"""Structures on the fine grid: read once, windowed, resampled, measured, and kept."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastlora.errors import DataError
from fastlora.medical.geometry import regrid, resample, sdf_from_mask
from fastlora.medical.losses import TRUNCATION_VOX
from fastlora.medical.volumes import Case, window

Array = NDArray[np.float32]

SPACING_MM = 1.5
COARSE = 8
CELL = 4
FINE = COARSE * CELL
"""A region has FINE³ fine voxels of SPACING_MM, in COARSE³ cells of CELL³."""

MARGIN = FINE // 2
"""Fine voxels kept around a structure's bounding box."""

_CACHE_VERSION = 1
_MEMORY: dict[str, StructureGrid] = {}


def truncated_sdf(mask: NDArray[np.bool_]) -> Array:
    """Fine-voxel distances, within ±TRUNCATION_VOX; a mask that is all one thing is that far from a surface."""
    if mask.all() or not mask.any():
        return np.full(mask.shape, -TRUNCATION_VOX if mask.all() else TRUNCATION_VOX, np.float32)
    return np.clip(sdf_from_mask(mask, (1.0, 1.0, 1.0)), -TRUNCATION_VOX, TRUNCATION_VOX)


@dataclass(frozen=True, eq=False)
class StructureGrid:
    """One structure of one case on the subject's fine grid, cropped to its surroundings.

    image: (X, Y, Z) in [0, 1]. sdf_vox: (X, Y, Z), truncated. affine: (4, 4) index to mm.
    offset: index of voxel (0, 0, 0) on the subject's whole fine grid. box: (2, 3) extent of the structure there.
    """

    image: Array
    sdf_vox: Array
    affine: NDArray[np.float64]
    offset: NDArray[np.int64]
    box: NDArray[np.int64]

    @classmethod
    def read(cls, case: Case, structure: str) -> StructureGrid:
        """Load, window, resample and measure; the volume is read once and forgotten. Raises DataError."""
        volume = case.load_image()
        mask = case.load_mask(structure, volume)
        whole, shape = regrid(volume.affine, volume.shape, SPACING_MM)
        filled = np.argwhere(mask)
        scale = volume.spacing / SPACING_MM
        box = np.stack(
            [np.floor(filled.min(0) * scale), np.ceil((filled.max(0) + 1) * scale)]
        ).astype(np.int64)
        low = np.maximum(box[0] - MARGIN, 0)
        high = np.maximum(np.minimum(box[1] + MARGIN, shape), low + FINE)
        size = (int(high[0] - low[0]), int(high[1] - low[1]), int(high[2] - low[2]))
        affine = whole.copy()
        affine[:3, 3] += whole[:3, :3] @ low
        image = window(volume.array, case.modality, structure)
        fine_mask = resample(mask, volume.affine, affine, size, cval=0.0) >= 0.5
        if not fine_mask.any():
            raise DataError(
                f"{case.subject}: {structure} vanishes on the {SPACING_MM} mm grid, "
                f"expected a structure of more than {int(mask.sum())} voxels of {volume.spacing} mm"
            )
        return cls(
            resample(image, volume.affine, affine, size), truncated_sdf(fine_mask), affine, low, box
        )

    @classmethod
    def load(cls, case: Case, structure: str, cache_dir: Path | None = None) -> StructureGrid:
        """``read``, kept in memory and, below ``cache_dir``, on disk under a key of the files and the grid."""
        source = case.structures.get(structure)
        files = [case.image_path] + ([source.path] if source else [])
        stamp = [
            (str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.exists()
        ]
        text = repr(
            (_CACHE_VERSION, stamp, source and source.label, structure, case.modality, SPACING_MM)
        )
        key = hashlib.sha256(text.encode()).hexdigest()[:24]
        if key not in _MEMORY:
            path = cache_dir / f"{key}.npz" if cache_dir else None
            if path and path.is_file():
                with np.load(path, allow_pickle=False) as arrays:
                    _MEMORY[key] = cls(**arrays)
            else:
                _MEMORY[key] = cls.read(case, structure)
                if path:
                    _MEMORY[key]._write(path)
        return _MEMORY[key]

    def _write(self, path: Path) -> None:
        """Whole or not at all: another process may be reading or writing the same file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.stem}.{os.getpid()}.npz")
        np.savez(partial, **vars(self))
        os.replace(partial, path)

    def crop(self, start: Sequence[int]) -> tuple[Array, Array]:
        """Image and SDF of the 32³ window that begins at ``start`` of the subject's fine grid."""
        at = tuple(slice(s - o, s - o + FINE) for s, o in zip(start, self.offset, strict=True))
        return self.image[at], self.sdf_vox[at]
