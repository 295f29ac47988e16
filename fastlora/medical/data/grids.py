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
from fastlora.medical.data.manifest import Layout, load_entry
from fastlora.medical.scans.geometry import (
    Array,
    FloatArray,
    Mask,
    regrid,
    resample,
    sdf_from_mask,
    shifted,
)
from fastlora.medical.scans.names import file_stem
from fastlora.medical.scans.scan import Part, Scan
from fastlora.medical.scans.volumes import Case, Volume
from fastlora.medical.scans.windows import Limits, windowed

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
class FineGrid:
    """Image and mask of one structure on the subject's fine grid; the other fields as in `StructureGrid`.

    image: (X, Y, Z) in [0, 1]. mask: (X, Y, Z) bool.
    """

    image: Array
    mask: Mask
    affine: FloatArray
    offset: NDArray[np.int64]
    box: NDArray[np.int64]


def fine_grid(image: Volume, part: Part, limits: Limits) -> FineGrid:
    """Window and resample an image around a structure, and resample the structure's mask.

    Only the voxels around the structure are read. limits: of the window.
    Raises: DataError if the mask vanishes on the fine grid.
    """
    whole, shape = regrid(image.affine, image.shape, SPACING_MM)
    scale = image.spacing / SPACING_MM
    first, size = np.array(part.start), np.array(part.mask.shape)
    box = np.stack([np.floor(first * scale), np.ceil((first + size) * scale)]).astype(np.int64)
    low = np.maximum(box[0] - MARGIN, 0)
    high = np.maximum(np.minimum(box[1] + MARGIN, shape), low + FINE)
    fine = tuple((high - low).tolist())
    affine = shifted(whole, low)
    # The voxels between which the fine grid interpolates; beyond the image its border is repeated.
    ends = (np.stack([low, high - 1]) + 0.5) / scale - 0.5
    begin = np.clip(np.floor(ends[0]).astype(np.int64) - 1, 0, np.array(image.shape) - 1)
    end = np.clip(np.ceil(ends[1]).astype(np.int64) + 2, begin + 1, image.shape)
    crop = image.array[tuple(map(slice, begin, end))]
    pixels = resample(windowed(crop, limits), shifted(image.affine, begin), affine, fine)
    # Zero-padded, the mask ends at the faces of its outer voxels, not at their centres.
    inside = np.zeros(size + 2, dtype=np.float32)
    inside[1:-1, 1:-1, 1:-1] = part.mask
    mask = resample(inside, shifted(image.affine, first - 1), affine, fine, cval=0.0) >= 0.5
    if not mask.any():
        raise DataError(
            f"mask: vanishes on the {SPACING_MM} mm grid, expected a structure of more than "
            f"{np.count_nonzero(part.mask)} voxels of {image.spacing.round(4).tolist()} mm"
        )
    return FineGrid(pixels, mask, affine, low, box)


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
    def read(cls, scan: Scan, structure: str) -> StructureGrid:
        """The grid of a case's structure. Raises: DataError as `Scan.image`, `Scan.part` and `fine_grid`."""
        part = scan.part(structure)
        try:
            fine = fine_grid(scan.image, part, scan.limits(structure))
        except DataError as error:
            raise DataError(f"{scan.case.subject}: {structure}: {error}") from error
        return cls(fine.image, truncated_sdf(fine.mask), fine.affine, fine.offset, fine.box)

    @classmethod
    def load(
        cls,
        case: Case,
        structure: str,
        cache_dir: Path | None = None,
        scan: Scan | None = None,
        keep: bool = True,
    ) -> StructureGrid:
        """`read`, cached in memory and, if `cache_dir` is given, on disk by a key of the files and the grid.

        scan: of the case, if it is open. keep: in memory. A damaged file is logged and recomputed. Raises: DataError as `read`.
        """
        path = grid_path(case, structure, cache_dir or Path())
        compute = partial(cls.read, scan or Scan(case), structure)
        return load_entry(path, STORED, cls, compute, on_disk=cache_dir is not None, keep=keep)

    def crop(self, start: Sequence[int]) -> tuple[Array, Array]:
        """Image and SDF of the 32³ region that starts at index `start` of the subject's fine grid."""
        at = tuple(slice(s - o, s - o + FINE) for s, o in zip(start, self.offset, strict=True))
        return self.image[at], self.sdf_vox[at]


def grid_path(case: Case, structure: str, cache_dir: Path) -> Path:
    """The cache file of a structure's grid; its name changes with the source files and the spacing."""
    key = repr((_CACHE_VERSION, case.stamp(structure), SPACING_MM))
    digest = hashlib.sha256(key.encode()).hexdigest()
    return cache_dir / f"{file_stem(case.subject, structure)}-grid-{digest[:16]}.npz"
