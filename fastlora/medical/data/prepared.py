"""A structure made ready for slicing: cut out of its volume, measured, meshed, kept on disk.

The image is windowed, image and mask are cut to a box around the structure (and resampled if
asked), its signed distances, its canonical cube and its mesh are computed. The result is kept under
a key of the source files and the parameters.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fastlora import files
from fastlora.errors import ConfigError, DataError
from fastlora.medical.data.geometry import (
    FloatArray,
    apply_affine,
    mesh_from_sdf,
    regrid,
    resample,
    sdf_from_mask,
    spacing_of,
)
from fastlora.medical.data.volumes import Case, Volume, window

log = logging.getLogger(__name__)

CACHE_VERSION = 2  # raise it when what `prepare` computes changes
STORED: Mapping[str, tuple[str, tuple[int | str, ...]]] = {
    **dict.fromkeys(("image", "sdf"), ("float32", ("X", "Y", "Z"))),
    "mask": ("bool", ("X", "Y", "Z")),
    "affine": ("float64", (4, 4)),
    "vertices": ("float32", ("V", 3)),
    "faces": ("int64", ("F", 3)),
    "canonical_sdf": ("float32", ("S", "S", "S")),
    "canonical_to_mm": ("float64", (4, 4)),
}


@dataclass(frozen=True)
class SliceConfig:
    """What is computed once for a structure, and therefore decides the cache's key.

    spacing: mm of the isotropic grid to resample to; None keeps the image's own. crop_size: least
    side in voxels of the box around a structure, where the image reaches that far. margin_mm: least
    room around it. sdf_size: voxels on a side of the canonical cube. min_area_px: the smallest
    cross-section that makes a sample.
    """

    spacing: float | None = None
    crop_size: int = 64
    margin_mm: float = 10.0
    sdf_size: int = 64
    min_area_px: int = 16

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if value is not None and not value > 0:
                raise ConfigError(f"{item.name}: expected a positive number, got {value}")


@dataclass(frozen=True)
class Prepared:
    """A structure in the box around it. Its index space is that of `affine` (4, 4), index to mm.

    image: (X, Y, Z) float32 in [0, 1]. mask: bool. sdf: float32, mm. vertices: (V, 3) float32, mm.
    faces: (F, 3) int64. canonical_sdf, canonical_to_mm: as `to_canonical` gives them.
    """

    image: NDArray[np.float32]
    mask: NDArray[np.bool_]
    sdf: NDArray[np.float32]
    affine: FloatArray
    vertices: NDArray[np.float32]
    faces: NDArray[np.int64]
    canonical_sdf: NDArray[np.float32]
    canonical_to_mm: FloatArray

    @property
    def shape(self) -> tuple[int, int, int]:
        x, y, z = self.mask.shape
        return x, y, z


def prepare(
    case: Case, structure: str, config: SliceConfig, image: Volume | None = None
) -> Prepared:
    """Compute a structure's volumes from its files; an image already read saves reading it again.

    Raises: DataError as `Case.load_image` and `Case.load_mask`.
    """
    image = case.load_image() if image is None else image
    mask = case.load_mask(structure, image)
    box = _box_around(mask, image.spacing, config)
    pixels = window(image.array, case.modality, structure)[box]
    mask = mask[box]
    affine = image.affine.copy()
    affine[:3, 3] = apply_affine(image.affine, [side.start for side in box])
    if config.spacing is not None:
        target, shape = regrid(affine, pixels.shape, config.spacing)
        pixels = resample(pixels, affine, target, shape)
        mask = resample(mask, affine, target, shape) >= 0.5
        affine = target
        if not mask.any():
            raise DataError(
                f"{case.subject}/{structure}: expected voxels left at spacing {config.spacing} mm, "
                "got an empty mask"
            )
    # The image's border counts as outside, so a structure cut off by it has a closed surface.
    sdf = sdf_from_mask(np.pad(mask, 1), spacing_of(affine))[1:-1, 1:-1, 1:-1]
    mesh = mesh_from_sdf(sdf, affine)
    vertices = mesh.vertices.astype(np.float32)
    cube, to_mm = to_canonical(sdf, affine, vertices, config.sdf_size)
    return Prepared(pixels, mask, sdf, affine, vertices, mesh.faces.astype(np.int64), cube, to_mm)


def _box_around(
    mask: NDArray[np.bool_], spacing: FloatArray, config: SliceConfig
) -> tuple[slice, slice, slice]:
    """The mask's bounding box with its margin, grown to crop_size, cut to the image."""
    sides = []
    for axis, extent in enumerate(ndimage.find_objects(mask.astype(np.uint8))[0]):
        wanted = config.crop_size * (config.spacing or spacing[axis]) / spacing[axis]
        grow = max(config.margin_mm / spacing[axis], (wanted - (extent.stop - extent.start)) / 2)
        grow = int(np.ceil(grow))
        sides.append(slice(max(extent.start - grow, 0), min(extent.stop + grow, mask.shape[axis])))
    x, y, z = sides
    return x, y, z


def cache_path(case: Case, structure: str, config: SliceConfig, cache_dir: Path) -> Path:
    """Where a prepared structure is kept: its name changes with the source files and parameters."""
    key: dict[str, object] = {"version": CACHE_VERSION, "files": case.stamp(structure)}
    key |= {item.name: getattr(config, item.name) for item in fields(config)}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache_dir / f"{case.subject}-{structure}-{digest[:16]}.npz"


def load_prepared(
    case: Case,
    structure: str,
    config: SliceConfig,
    cache_dir: Path | None = None,
    image: Volume | None = None,
) -> Prepared:
    """A structure out of the cache, or computed and written there.

    An entry that cannot be read is said in the log and computed anew. Raises: as `prepare`.
    """
    if cache_dir is None:
        return prepare(case, structure, config, image)
    path = cache_path(case, structure, config, cache_dir)
    if path.is_file():
        try:
            return Prepared(**files.read_npz(path, STORED))
        except (OSError, ValueError) as error:
            log.warning("%s: damaged cache entry is made anew (%s)", path, error)
    prepared = prepare(case, structure, config, image)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.atomic_write(path, lambda file: np.savez(file, **vars(prepared)))
    return prepared


def to_canonical(
    sdf: NDArray[np.float32], affine: FloatArray, vertices: NDArray[np.float32], size: int
) -> tuple[NDArray[np.float32], FloatArray]:
    """A whole structure's distances in the canonical cube [−1, 1]³, and the map from there to mm.

    The cube is aligned with the patient's axes, centred on the structure and a tenth larger than
    its longest side. Voxel n of a side lies at ``−1 + (2n + 1) / size``. Inside the given volume
    the distances are interpolated; beyond it they are measured in the cube.

    sdf: (X, Y, Z) mm. vertices: (V, 3) mm, of the surface. Returns: (size, size, size) float32 in
    mm and canonical → mm (4, 4).
    Raises: DataError if the structure is too thin for the cube to hold a voxel of it.
    """
    low, high = vertices.min(0).astype(np.float64), vertices.max(0).astype(np.float64)
    half = 0.55 * float((high - low).max())
    to_mm = np.diag([half, half, half, 1.0])
    to_mm[:3, 3] = (low + high) / 2
    step = 2 * half / size
    cube_affine = np.diag([step, step, step, 1.0])
    cube_affine[:3, 3] = to_mm[:3, 3] - half + step / 2
    cube = resample(sdf, affine, cube_affine, (size, size, size), cval=np.inf)
    inside = cube < 0
    if not inside.any():
        raise DataError(f"sdf_size: expected a cube finer than {step:.3g} mm for this structure")
    beyond = ~np.isfinite(cube)
    if beyond.any():
        cube[beyond] = sdf_from_mask(inside, np.full(3, step))[beyond]
    return cube, to_mm
