"""The 3-D data of a structure that slice samples are cut from: computed once, cached on disk.

The image is windowed, image and mask are cropped to a box around the structure (and optionally
resampled); the signed distances, the canonical cube and the mesh are computed from them.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from nibabel.affines import from_matvec, voxel_sizes
from numpy.typing import NDArray

from fastlora.errors import ConfigError, DataError
from fastlora.medical.data.manifest import Layout, load_entry
from fastlora.medical.scans.geometry import (
    Array,
    FloatArray,
    Mask,
    mesh_from_sdf,
    regrid,
    resample,
    sdf_from_mask,
    shifted,
)
from fastlora.medical.scans.names import file_stem
from fastlora.medical.scans.scan import Part, Scan
from fastlora.medical.scans.volumes import Case, Volume
from fastlora.medical.scans.windows import windowed

CACHE_VERSION = 2  # raise it when what `prepare` computes changes
STORED: Layout = {
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
    """Settings of `prepare`, part of the cache key.

    spacing: mm of the isotropic grid to resample to; None keeps the image's own. crop_size: minimum
    side in voxels of the box around a structure, within the image. margin_mm: minimum distance from
    the structure to the box. sdf_size: voxels along each side of the canonical cube. min_area_px:
    the smallest cross-section that becomes a sample. Raises: ConfigError if one is not positive.
    """

    spacing: float | None = None
    crop_size: int = 64
    margin_mm: float = 10.0
    sdf_size: int = 64
    min_area_px: int = 16

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not value > 0:
                raise ConfigError(f"{name}: expected a positive number, got {value}")


@dataclass(frozen=True)
class Prepared:
    """A structure in the box around it; `affine` (4, 4) maps the box's indices to mm.

    image: (X, Y, Z) float32 in [0, 1]. mask: bool. sdf: float32, mm. vertices: (V, 3) float32, mm.
    faces: (F, 3) int64. canonical_sdf, canonical_to_mm: see `to_canonical`.
    """

    image: Array
    mask: Mask
    sdf: Array
    affine: FloatArray
    vertices: Array
    faces: NDArray[np.int64]
    canonical_sdf: Array
    canonical_to_mm: FloatArray


def prepare(case: Case, structure: str, config: SliceConfig, scan: Scan | None = None) -> Prepared:
    """Compute a structure's volumes and mesh from its files.

    scan: of the case, if it is open. Raises: DataError as `Scan.image` and `Scan.part`, or if the mask is empty at the
    config's spacing.
    """
    scan = Scan(case) if scan is None else scan
    image, part = scan.image, scan.part(structure)
    box = _box_around(part, image, config)
    pixels = windowed(image.array[box], scan.limits(structure))
    around = [(p.start - b.start, b.stop - p.stop) for p, b in zip(part.box, box, strict=True)]
    mask = np.pad(part.mask, around)
    affine = shifted(image.affine, [side.start for side in box])
    if config.spacing is not None:
        target, shape = regrid(affine, pixels.shape, config.spacing)
        pixels = resample(pixels, affine, target, shape)
        mask = resample(mask, affine, target, shape) >= 0.5
        affine = target
        if not mask.any():
            raise DataError(
                f"{case.subject}/{structure}: expected a mask with voxels at spacing {config.spacing} mm, "
                "got an empty mask"
            )
    # The image's border counts as outside, so a structure cut off by it has a closed surface.
    sdf = sdf_from_mask(np.pad(mask, 1), voxel_sizes(affine))[1:-1, 1:-1, 1:-1]
    mesh = mesh_from_sdf(sdf, affine)
    vertices = mesh.vertices.astype(np.float32)
    cube, to_mm = to_canonical(sdf, affine, vertices, config.sdf_size)
    return Prepared(pixels, mask, sdf, affine, vertices, mesh.faces.astype(np.int64), cube, to_mm)


def _box_around(part: Part, image: Volume, config: SliceConfig) -> tuple[slice, ...]:
    """The part's bounding box with its margin, at least crop_size wide, clipped to the image."""
    sides = []
    for extent, spacing, size in zip(part.box, image.spacing, image.shape, strict=True):
        wanted = config.crop_size * (config.spacing or spacing) / spacing
        grow = max(config.margin_mm / spacing, (wanted - (extent.stop - extent.start)) / 2)
        grow = int(np.ceil(grow))
        sides.append(slice(max(extent.start - grow, 0), min(extent.stop + grow, size)))
    return tuple(sides)


def cache_path(case: Case, structure: str, config: SliceConfig, cache_dir: Path) -> Path:
    """The cache file of a structure; its name changes with the source files and the settings."""
    key = {"version": CACHE_VERSION, "files": case.stamp(structure), **asdict(config)}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache_dir / f"{file_stem(case.subject, structure)}-{digest[:16]}.npz"


def load_prepared(
    case: Case,
    structure: str,
    config: SliceConfig,
    cache_dir: Path | None = None,
    scan: Scan | None = None,
    keep: bool = True,
) -> Prepared:
    """`prepare`, cached in memory and, if `cache_dir` is given, on disk; see `load_entry`."""
    path = cache_path(case, structure, config, cache_dir or Path())
    compute = partial(prepare, case, structure, config, scan)
    return load_entry(path, STORED, Prepared, compute, on_disk=cache_dir is not None, keep=keep)


def to_canonical(
    sdf: Array, affine: FloatArray, vertices: Array, size: int
) -> tuple[Array, FloatArray]:
    """A structure's signed distances in the canonical cube [−1, 1]³, and the map from there to mm.

    The cube is aligned with the patient's axes, centred on the structure and 10 % larger than its
    longest side; voxel n of a side lies at `−1 + (2n + 1) / size`. Distances are interpolated
    inside the given volume and measured in the cube beyond it.

    sdf: (X, Y, Z) mm. vertices: (V, 3) mm, of the surface. Returns: (size, size, size) float32 in
    mm, and canonical → mm (4, 4). Raises: DataError if no voxel of the cube lies inside the structure.
    """
    low, high = vertices.min(0).astype(np.float64), vertices.max(0).astype(np.float64)
    half = 0.55 * float((high - low).max())
    centre, step = (low + high) / 2, 2 * half / size
    cube_affine = from_matvec(step * np.eye(3), centre - half + step / 2)
    cube = resample(sdf, affine, cube_affine, (size, size, size), cval=np.inf)
    inside = cube < 0
    if not inside.any():
        raise DataError(f"sdf_size: expected a cube finer than {step:.3g} mm for this structure")
    beyond = ~np.isfinite(cube)
    if beyond.any():
        cube[beyond] = sdf_from_mask(inside, np.full(3, step))[beyond]
    return cube, from_matvec(half * np.eye(3), centre)
