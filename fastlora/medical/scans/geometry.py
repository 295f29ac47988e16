"""Volumes, signed distances, meshes and affines.

A volume is an array (X, Y, Z); its affine (4, 4) maps a voxel's index to millimetres, `[x, y, z, 1]
= affine @ [i, j, k, 1]`, with voxel centres at integer indices. A signed distance field (SDF) is
negative inside. An affine may be oblique, anisotropic and of either handedness, but not sheared,
because distances are computed per axis.
"""

from __future__ import annotations

import math

import numpy as np
import trimesh
from nibabel.affines import apply_affine, from_matvec, voxel_sizes
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from skimage import measure

from fastlora.errors import ConfigError, DataError

Array = NDArray[np.float32]
FloatArray = NDArray[np.float64]
Mask = NDArray[np.bool_]
MAX_VOXELS = 2**29  # limit for any volume read, 512 × 512 × 2048: 2 GiB as float32
SHEAR_TOLERANCE = 1e-3  # largest cosine between two axes that still counts as a right angle


def check_affine(affine: ArrayLike, name: str = "affine") -> FloatArray:
    """The affine as float64 (4, 4). Raises: DataError if it is not finite, singular or sheared."""
    matrix = np.asarray(affine, dtype=np.float64)
    if matrix.shape != (4, 4):
        raise DataError(f"{name}: expected a (4, 4) matrix, got {matrix.shape}")
    if not np.isfinite(matrix).all() or not np.array_equal(matrix[3], (0.0, 0.0, 0.0, 1.0)):
        raise DataError(
            f"{name}: expected finite numbers, the last row 0 0 0 1, got {matrix.tolist()}"
        )
    lengths = voxel_sizes(matrix)
    if (lengths <= 0).any():
        raise DataError(
            f"{name}: expected a positive spacing on each axis, got {lengths.tolist()} mm"
        )
    axes = matrix[:3, :3] / lengths
    shear = np.abs(axes.T @ axes - np.eye(3)).max()
    if shear > SHEAR_TOLERANCE:
        raise DataError(
            f"{name}: expected axes at right angles, got a cosine of {shear:.3g} between two "
            "(a sheared volume, such as a CT with gantry tilt, has to be resampled first)"
        )
    return matrix


def check_spacing(spacing: ArrayLike) -> FloatArray:
    """The spacing as float64 (3,). Raises: DataError unless all three are positive and finite."""
    steps = np.asarray(spacing, dtype=np.float64)
    if steps.shape != (3,) or not (np.isfinite(steps) & (steps > 0)).all():
        raise DataError(f"spacing: expected three positive lengths in mm, got {steps.tolist()}")
    return steps


def shifted(affine: FloatArray, start: ArrayLike) -> FloatArray:
    """The affine of an array that starts at index `start` (3,) of the array with `affine`."""
    moved = affine.copy()
    moved[:3, 3] += affine[:3, :3] @ np.asarray(start, dtype=np.float64)
    return moved


def sdf_from_mask(mask: Mask, spacing: ArrayLike) -> Array:
    """Signed distance in mm to a mask's surface, negative inside, its zero level between voxels.

    A distance transform measures from a voxel's centre to the nearest centre on the other side, at
    least one voxel away. The surface lies half a voxel before that centre, so with n the length of
    the offset in indices the distance is `± d (1 − ½ / n)`.

    mask: (X, Y, Z) bool; voxels beyond the array count as neither side. spacing: (3,) mm.
    Raises: DataError if the mask is empty or full, since it has no surface then.
    """
    mask, steps = np.asarray(mask), check_spacing(spacing)
    if mask.ndim != 3 or mask.dtype != np.bool_:
        raise DataError(f"mask: expected (X, Y, Z) bool, got {mask.shape} {mask.dtype}")
    if not mask.any():
        raise DataError("mask: expected a surface, got an empty mask")
    if mask.all():
        raise DataError("mask: expected a surface, got a mask that fills the whole array")
    distance = _to_surface(mask, steps) + _to_surface(~mask, steps)
    return np.where(mask, -distance, distance).astype(np.float32)


def _to_surface(inside: Mask, steps: FloatArray) -> FloatArray:
    """Distance in mm from each inside voxel to half a voxel before the nearest other one; 0 outside."""
    distance, nearest = ndimage.distance_transform_edt(inside, sampling=steps, return_indices=True)
    nearest -= np.indices(inside.shape, dtype=np.int32)
    squared = np.einsum("n...,n...", nearest, nearest)  # voxels²
    corrected: FloatArray = distance * (1 - 0.5 / np.sqrt(np.maximum(squared, 1)))
    return corrected


def mesh_from_sdf(
    sdf: NDArray[np.floating], affine: ArrayLike, level: float = 0.0
) -> trimesh.Trimesh:
    """The closed surface of `sdf < level` in mm, faces oriented outwards for either handedness.

    A shape that reaches the border of the array is closed at the outer faces of the border voxels,
    which preserves its volume.

    sdf: (X, Y, Z), negative inside, any unit. affine: (4, 4) voxel index to mm.
    Raises: DataError if no value lies below `level` or one is not finite.
    """
    matrix = check_affine(affine)
    field = np.asarray(sdf, dtype=np.float32)
    if field.ndim != 3:
        raise DataError(f"sdf: expected (X, Y, Z), got {field.shape}")
    if bad := np.count_nonzero(~np.isfinite(field)):
        raise DataError(f"sdf: expected finite values, got {bad} that are not")
    field = field - np.float32(level)
    if not (field < 0).any():
        raise DataError(
            f"sdf: expected a surface at level {level:g}, got no value below it (an empty shape)"
        )
    # A layer of mirrored positive values: the surface lies half way between it and the border.
    padded = np.abs(np.pad(field, 1, mode="edge"))
    padded[1:-1, 1:-1, 1:-1] = field
    mesh = zero_level(padded)
    mesh.apply_transform(shifted(matrix, (-1, -1, -1)))  # turns the faces where it mirrors
    return mesh


def zero_level(field: NDArray[np.floating], spacing: float = 1.0) -> trimesh.Trimesh:
    """The surface inside an array, open where a structure meets the array's faces.

    field: (X, Y, Z), negative inside, with both signs. spacing: of the voxels, in the unit of the
    vertices; voxel (0, 0, 0) is the origin.
    """
    # As in the mask, 0 counts as outside; marching cubes would produce degenerate triangles there.
    tiny = 1e-5 * max(float(np.abs(field).max()), 1e-6)
    field = np.where(field < 0, np.minimum(field, -tiny), np.maximum(field, tiny))
    vertices, faces, _, _ = measure.marching_cubes(field, 0.0, spacing=(spacing,) * 3)
    return trimesh.Trimesh(vertices, faces, process=False)


def pointmap(affine: ArrayLike, shape: tuple[int, ...], axis: int, index: int) -> Array:
    """Position in mm of each pixel of a slice: `affine @ (i, j, k, 1)`, (H, W, 3) float32.

    shape: of the volume. axis: 0, 1 or 2, the sliced one; H and W are the other two in order, so
    that entry [h, w] belongs to `volume.take(index, axis)[h, w]`.
    Raises: ConfigError if axis or index lie outside the volume.
    """
    matrix = check_affine(affine)
    if axis not in (0, 1, 2):
        raise ConfigError(f"axis: expected 0, 1 or 2, got {axis}")
    if not 0 <= index < shape[axis]:
        raise ConfigError(f"index: expected 0 to {shape[axis] - 1} on axis {axis}, got {index}")
    return plane_points(matrix, axis, index, *(range(shape[a]) for a in other_axes(axis)))


def plane_points(affine: FloatArray, axis: int, index: int, rows: range, columns: range) -> Array:
    """`pointmap` of a frame of the slice's plane, which may extend beyond the volume."""
    first, second = other_axes(axis)
    grid = np.empty((len(rows), len(columns), 3))
    grid[..., axis] = index
    grid[..., first] = np.array(rows)[:, None]
    grid[..., second] = columns
    points: Array = apply_affine(affine, grid).astype(np.float32)
    return points


def other_axes(axis: int) -> tuple[int, ...]:
    """The axes of a slice's height and width, given the sliced one."""
    return tuple(a for a in range(3) if a != axis)


def regrid(
    affine: ArrayLike, shape: tuple[int, ...], spacing: float
) -> tuple[FloatArray, tuple[int, ...]]:
    """Affine and shape of an isotropic grid of `spacing` mm over the same box, with the same axes.

    The boxes share the outer corner of voxel (0, 0, 0); the opposite side is rounded up to whole
    voxels. Raises: ConfigError if the spacing is not positive.
    """
    matrix = check_affine(affine)
    if not spacing > 0:
        raise ConfigError(f"spacing: expected a positive length in mm, got {spacing}")
    scale = spacing / voxel_sizes(matrix)
    origin = apply_affine(matrix, 0.5 * scale - 0.5)  # the corners at −½ coincide
    sides = tuple(int(np.ceil(round(n / s, 6))) for n, s in zip(shape, scale, strict=True))
    return from_matvec(matrix[:3, :3] * scale, origin), sides


def resample(
    volume: NDArray[np.generic],
    affine: ArrayLike,
    target_affine: ArrayLike,
    target_shape: tuple[int, ...],
    order: int = 1,
    cval: float | None = None,
) -> Array:
    """The volume interpolated at the voxel centres of another grid, float32 (target_shape).

    No low-pass filter is applied, so a grid much coarser than the volume aliases.

    volume: (X, Y, Z). order: 0 nearest, 1 linear, 3 cubic. cval: value outside the volume; None
    repeats the nearest border voxel.
    Raises: DataError if the grid is too large for any volume.
    """
    if math.prod(target_shape) > MAX_VOXELS:
        sides = ", ".join(
            f"{n * s:.3g}" for n, s in zip(target_shape, voxel_sizes(target_affine), strict=True)
        )
        raise DataError(
            f"grid: expected at most {MAX_VOXELS:,} voxels, got {target_shape} of {sides} mm: does the affine map to mm?"
        )
    to_source = np.linalg.inv(check_affine(affine)) @ check_affine(target_affine, "target_affine")
    sampled: Array = ndimage.affine_transform(
        np.asarray(volume, dtype=np.float32),
        to_source[:3, :3],
        to_source[:3, 3],
        output_shape=target_shape,
        order=order,
        mode="nearest" if cval is None else "constant",
        cval=0.0 if cval is None else cval,
    )
    return sampled


def voxelise(mesh: trimesh.Trimesh, affine: ArrayLike, shape: tuple[int, ...]) -> Mask:
    """Which voxel centres lie inside a closed mesh, (X, Y, Z) bool: odd number of crossings below."""
    to_index = np.linalg.inv(check_affine(affine))
    # A tiny irregular shift, so that no column of the grid passes through an edge or a vertex.
    shift = (1.93e-6, 2.71e-6, 0.0)
    corners = apply_affine(to_index, mesh.vertices)[mesh.faces] - shift  # (F, 3, 3)
    low = np.clip(np.ceil(corners[:, :, :2].min(1)), 0, None).astype(np.int64)
    high = np.minimum(np.floor(corners[:, :, :2].max(1)).astype(np.int64), np.array(shape[:2]) - 1)
    extent = np.clip(high - low + 1, 0, None)
    count = extent.prod(1)  # grid columns in the box of each triangle
    triangle = np.repeat(np.arange(len(count)), count)
    rank = np.arange(len(triangle)) - np.repeat(np.cumsum(count) - count, count)
    column = low[triangle] + np.stack(np.divmod(rank, extent[triangle, 1]), axis=1)
    flat = corners[triangle, :, :2] - column[:, None]  # (N, 3, 2), from the column to the corners
    one, other = flat[:, [1, 2, 0]], flat[:, [2, 0, 1]]
    # Twice the signed area of the triangle between the column and the side opposite each corner.
    weights = one[..., 0] * other[..., 1] - one[..., 1] * other[..., 0]  # (N, 3)
    area = weights.sum(1)
    hit = (area != 0) & ((weights * area[:, None]).min(1) >= 0)
    height = (weights * corners[triangle, :, 2]).sum(1)[hit] / area[hit]
    first_above = np.clip(np.ceil(height), 0, shape[2]).astype(np.int64)
    crossings = np.zeros((shape[0], shape[1], shape[2] + 1), dtype=np.int32)
    np.add.at(crossings, (column[hit, 0], column[hit, 1], first_above), 1)
    inside: Mask = np.cumsum(crossings, axis=2)[:, :, :-1] % 2 == 1
    return inside
