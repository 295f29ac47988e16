"""Structures on the fine grid: image and signed distances, cached in memory and on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastlora.errors import DataError
from fastlora.medical.data.geometry import (
    Array,
    FloatArray,
    Mask,
    regrid,
    resample,
    sdf_from_mask,
    shifted,
)
from fastlora.medical.data.manifest import Layout, load_entry
from fastlora.medical.data.volumes import Case, Volume, window

SPACING_MM = 1.5
COARSE = 8
CELL = 4
FINE = COARSE * CELL  # a region has FINE³ fine voxels of SPACING_MM, in COARSE³ cells of CELL³
TRUNCATION_VOX = 4.0  # distance at which the SDF is truncated: one coarse cell
MARGIN = FINE // 2  # fine voxels around a structure's bounding box
_CACHE_VERSION = 2
STORED: Layout = {
    **dict.fromkeys(("image", "sdf_vox"), ("float32", ("X", "Y", "Z"))),
    "affine": ("float64", (4, 4)),
    "offset": ("int64", (3,)),
    "box": ("int64", (2, 3)),
}


def truncated_sdf(mask: Mask) -> Array:
    """Signed distances in fine voxels, clipped to ±TRUNCATION_VOX; constant for an empty or full mask."""
    if mask.all() or not mask.any():
        return np.full(mask.shape, -TRUNCATION_VOX if mask.all() else TRUNCATION_VOX, np.float32)
    return np.clip(sdf_from_mask(mask, (1.0, 1.0, 1.0)), -TRUNCATION_VOX, TRUNCATION_VOX)


@dataclass(frozen=True, eq=False)
class StructureGrid:
    """One structure of one case on the subject's fine grid, cropped to its surroundings.

    image: (X, Y, Z) in [0, 1]. sdf_vox: (X, Y, Z), truncated. affine: (4, 4) index to mm. offset:
    index of voxel (0, 0, 0) on the subject's complete fine grid. box: (2, 3) extent of the structure there.
    """

    image: Array
    sdf_vox: Array
    affine: FloatArray
    offset: NDArray[np.int64]
    box: NDArray[np.int64]

    @classmethod
    def make(cls, image: Volume, mask: Mask, modality: str, structure: str = "") -> StructureGrid:
        """Window and resample the image, and compute the signed distances.

        mask: (X, Y, Z) on the image's grid. modality, structure: see `window`.
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
        size = tuple((high - low).tolist())
        affine = shifted(whole, low)
        fine = resample(window(image.array, modality, structure), image.affine, affine, size)
        # Zero-padded, the mask ends at the faces of its outer voxels, not at their centres.
        around = shifted(image.affine, (-1, -1, -1))
        fine_mask = resample(np.pad(mask, 1), around, affine, size, cval=0.0) >= 0.5
        if not fine_mask.any():
            raise DataError(
                f"mask: vanishes on the {SPACING_MM} mm grid, "
                f"expected a structure of more than {len(filled)} voxels of {image.spacing} mm"
            )
        return cls(fine, truncated_sdf(fine_mask), affine, low, box)

    @classmethod
    def read(cls, case: Case, structure: str, image: Volume | None = None) -> StructureGrid:
        """`make` from a case's files; image: if it has been read already. Raises: DataError as `make`."""
        image = case.load_image() if image is None else image
        mask = case.load_mask(structure, image)
        try:
            return cls.make(image, mask, case.modality, structure)
        except DataError as error:
            raise DataError(f"{case.subject}: {structure}: {error}") from error

    @classmethod
    def load(
        cls, case: Case, structure: str, cache_dir: Path | None = None, image: Volume | None = None
    ) -> StructureGrid:
        """`read`, cached in memory and, if `cache_dir` is given, on disk by a key of the files and the grid.

        A damaged file is logged and recomputed. Raises: DataError as `read`.
        """
        path = grid_path(case, structure, cache_dir or Path())
        compute = partial(cls.read, case, structure, image)
        return load_entry(path, STORED, cls, compute, on_disk=cache_dir is not None)

    def crop(self, start: Sequence[int]) -> tuple[Array, Array]:
        """Image and SDF of the 32³ region that starts at index `start` of the subject's fine grid."""
        at = tuple(slice(s - o, s - o + FINE) for s, o in zip(start, self.offset, strict=True))
        return self.image[at], self.sdf_vox[at]


def grid_path(case: Case, structure: str, cache_dir: Path) -> Path:
    """The cache file of a structure's grid; its name changes with the source files and the spacing."""
    key = repr((_CACHE_VERSION, case.stamp(structure), SPACING_MM))
    digest = hashlib.sha256(key.encode()).hexdigest()
    return cache_dir / f"{case.subject}-{structure}-grid-{digest[:16]}.npz"
