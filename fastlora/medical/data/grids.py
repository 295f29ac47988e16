"""Structures on the fine grid: read once, windowed, resampled, measured, and kept."""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastlora import files
from fastlora.errors import DataError
from fastlora.medical.data.geometry import regrid, resample, sdf_from_mask
from fastlora.medical.data.volumes import Case, Volume, window

log = logging.getLogger(__name__)

Array = NDArray[np.float32]

SPACING_MM = 1.5
COARSE = 8
CELL = 4
FINE = COARSE * CELL
"""A region has FINE³ fine voxels of SPACING_MM, in COARSE³ cells of CELL³."""

TRUNCATION_VOX = 4.0
"""Distance (fine voxels) at which the true SDF is truncated: one coarse cell."""

MARGIN = FINE // 2
"""Fine voxels kept around a structure's bounding box."""

MEMORY_BYTES = 2 * 1024**3
"""How much of the grids a process keeps; the ones longest unused go first."""

_CACHE_VERSION = 2
STORED: Mapping[str, tuple[str, tuple[int | str, ...]]] = {
    "image": ("float32", ("X", "Y", "Z")),
    "sdf_vox": ("float32", ("X", "Y", "Z")),
    "affine": ("float64", (4, 4)),
    "offset": ("int64", (3,)),
    "box": ("int64", (2, 3)),
}
_MEMORY: OrderedDict[str, StructureGrid] = OrderedDict()


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
    def make(
        cls, image: Volume, mask: NDArray[np.bool_], modality: str, structure: str = ""
    ) -> StructureGrid:
        """Window, resample and measure.

        mask: (X, Y, Z) on the image's grid. modality, structure: as `window` takes them.
        Raises: DataError if the mask is empty, or vanishes on the fine grid.
        """
        filled = np.argwhere(mask)
        if not len(filled):
            raise DataError("mask: expected at least one voxel, got an empty mask")
        whole, shape = regrid(image.affine, image.shape, SPACING_MM)
        scale = image.spacing / SPACING_MM
        box = np.stack(
            [np.floor(filled.min(0) * scale), np.ceil((filled.max(0) + 1) * scale)]
        ).astype(np.int64)
        low = np.maximum(box[0] - MARGIN, 0)
        high = np.maximum(np.minimum(box[1] + MARGIN, shape), low + FINE)
        size = (int(high[0] - low[0]), int(high[1] - low[1]), int(high[2] - low[2]))
        affine = whole.copy()
        affine[:3, 3] += whole[:3, :3] @ low
        windowed = window(image.array, modality, structure)
        # With a layer of nothing around it the mask ends where its voxels do, not at their centres.
        around = image.affine.copy()
        around[:3, 3] -= image.affine[:3, :3].sum(axis=1)
        fine_mask = resample(np.pad(mask, 1), around, affine, size, cval=0.0) >= 0.5
        if not fine_mask.any():
            raise DataError(
                f"mask: vanishes on the {SPACING_MM} mm grid, "
                f"expected a structure of more than {len(filled)} voxels of {image.spacing} mm"
            )
        return cls(
            resample(windowed, image.affine, affine, size),
            truncated_sdf(fine_mask),
            affine,
            low,
            box,
        )

    @classmethod
    def read(cls, case: Case, structure: str, image: Volume | None = None) -> StructureGrid:
        """`make` from a case's files; an image already read saves reading it again. Raises DataError."""
        image = case.load_image() if image is None else image
        mask = case.load_mask(structure, image)
        try:
            return cls.make(image, mask, case.modality, structure)
        except DataError as error:
            raise DataError(f"{case.subject}: {structure}: {error}") from error

    @classmethod
    def load(
        cls,
        case: Case,
        structure: str,
        cache_dir: Path | None = None,
        image: Volume | None = None,
    ) -> StructureGrid:
        """``read``, kept in memory and, below ``cache_dir``, on disk under a key of the files and the grid.

        A file in the cache that cannot be read is said in the log and made anew. Raises: as ``read``.
        """
        if structure not in case.structures:
            return cls.read(case, structure, image)  # which raises
        key = _key(case, structure)
        path = cache_dir / _file_name(case, structure, key) if cache_dir else None
        grid = _MEMORY.get(key) or (cls._stored(path) if path else None)
        if grid is None:
            grid = cls.read(case, structure, image)
            if path:
                path.unlink(missing_ok=True)  # a damaged one
        if path and not path.is_file():
            grid._write(path)
        _MEMORY[key] = grid
        _MEMORY.move_to_end(key)
        while len(_MEMORY) > 1 and sum(g.nbytes for g in _MEMORY.values()) > MEMORY_BYTES:
            _MEMORY.popitem(last=False)
        return grid

    @classmethod
    def _stored(cls, path: Path) -> StructureGrid | None:
        if not path.is_file():
            return None
        try:
            return cls(**files.read_npz(path, STORED))
        except (OSError, ValueError) as error:
            log.warning("%s: damaged cache entry is made anew (%s)", path, error)
            return None

    @property
    def nbytes(self) -> int:
        """Bytes of its volumes."""
        return self.image.nbytes + self.sdf_vox.nbytes

    def _write(self, path: Path) -> None:
        """Whole or not at all: another process may be reading or writing the same file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        files.atomic_write(path, lambda file: np.savez(file, **vars(self)))

    def crop(self, start: Sequence[int]) -> tuple[Array, Array]:
        """Image and SDF of the 32³ window that begins at ``start`` of the subject's fine grid."""
        at = tuple(slice(s - o, s - o + FINE) for s, o in zip(start, self.offset, strict=True))
        return self.image[at], self.sdf_vox[at]


def grid_path(case: Case, structure: str, cache_dir: Path) -> Path:
    """Where a structure's grid is kept: the name changes with the source files and the grid."""
    return cache_dir / _file_name(case, structure, _key(case, structure))


def _file_name(case: Case, structure: str, key: str) -> str:
    return f"{case.subject}-{structure}-grid-{key[:16]}.npz"


def _key(case: Case, structure: str) -> str:
    text = repr((_CACHE_VERSION, case.stamp(structure), SPACING_MM))
    return hashlib.sha256(text.encode()).hexdigest()
