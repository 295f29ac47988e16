"""Procedural phantoms: images of shapes without anatomy, as varied as medical images.

`make_phantom` draws pretraining samples, from a bright object on a dark background to a textured
one among similar neighbours. `write_phantom_dataset` writes CT-like volumes with oblique affines in
TotalSegmentator layout, for tests and for `--demo synthetic`.

A shape is a field over points, negative inside and zero on the surface; its values only approximate
distances. All randomness comes from the generator passed in.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
from nibabel.affines import from_matvec
from numpy.random import Generator
from scipy import ndimage
from scipy.spatial.transform import Rotation

from fastlora.errors import ConfigError
from fastlora.medical.data.generated import generate_folder
from fastlora.medical.scans.geometry import Array, FloatArray, Mask
from fastlora.medical.scans.layouts import find_cases
from fastlora.medical.scans.volumes import Case, save_volume

Branch = tuple[FloatArray, FloatArray, float, float]  # start, end, their radii
LAYOUT_VERSION = 1  # raise it when the output of write_phantom_dataset changes


def superquadric(rng: Generator, points: Array) -> Array:
    """A diamond, ellipsoid or box: `(Σ |pᵢ / rᵢ|ᵉ)^(1/e) − 1`.

    points: (3, X, Y, Z), roughly in [−1, 1]; the same for every shape.
    """
    radii = rng.uniform(0.35, 0.95, size=(3, 1, 1, 1)).astype(np.float32)
    exponent = float(rng.choice([1.2, 2.0, 2.0, 3.0, 6.0]))
    norm: Array = np.linalg.norm(_posed(rng, points) / radii, exponent, axis=0)
    return norm - np.float32(1)


def blob(rng: Generator, points: Array) -> Array:
    """An ellipsoid with bumps of smooth noise."""
    radii = rng.uniform(0.45, 0.8, size=(3, 1, 1, 1)).astype(np.float32)
    bumps = smooth_noise(rng, points.shape[1:], rng.uniform(0.04, 0.16))
    norm: Array = np.linalg.norm(_posed(rng, points) / radii, axis=0)
    return norm - np.float32(1) + np.float32(rng.uniform(0.05, 0.3)) * bumps


def tube(rng: Generator, points: Array) -> Array:
    """A bent tube of varying width that ends inside or outside the volume."""
    bend = np.cumsum(rng.normal(0, 0.35, size=(5, 2)), axis=0)
    path = np.column_stack([bend - bend.mean(0), np.linspace(-1, 1, 5) * rng.uniform(0.5, 1.2)])
    radii = rng.uniform(0.15, 0.4) * rng.uniform(0.7, 1.3, size=5)
    branches = list(zip(path[:-1], path[1:], radii[:-1], radii[1:], strict=True))
    return _capsules(_posed(rng, points), branches)


def tree(rng: Generator, points: Array) -> Array:
    """A trunk that forks three times, thinner with each fork, like vessels or airways."""
    branches: list[Branch] = []
    tips = [(np.array([0.0, 0.0, -0.9]), np.array([0.0, 0.0, 1.0]), rng.uniform(0.2, 0.34))]
    for length in (0.8, 0.6, 0.45):
        grown = []
        for start, direction, radius in tips:
            end = start + direction * length
            branches.append((start, end, radius, radius * 0.8))
            for _ in range(2):
                turn = direction + rng.normal(0, 0.5, size=3)
                grown.append((end, turn / np.linalg.norm(turn), radius * rng.uniform(0.6, 0.8)))
        tips = grown
    return _capsules(_posed(rng, points), branches)


def sheets(rng: Generator, points: Array) -> Array:
    """Folded sheets or a labyrinth: thresholded noise of one or two scales, like cortex."""
    noise = smooth_noise(rng, points.shape[1:], rng.uniform(0.04, 0.12))
    if rng.random() < 0.5:
        noise += np.float32(0.7) * smooth_noise(rng, points.shape[1:], rng.uniform(0.12, 0.25))
    if rng.random() < 0.5:
        noise = np.abs(noise)
        return noise - np.float32(rng.uniform(0.3, 0.7))
    return noise + np.float32(rng.uniform(-0.4, 0.6))


def shell(rng: Generator, points: Array) -> Array:
    """A layer of random thickness around the surface of a blob: a hollow organ or a cortex."""
    distance: Array = np.abs(blob(rng, points))
    return distance - np.float32(rng.uniform(0.08, 0.25))


def compound(rng: Generator, points: Array) -> Array:
    """The union or the difference of two solids: bones with processes and foramina."""
    solids = [superquadric, blob, tube]
    first, second = (solids[i](rng, points) for i in rng.integers(0, 3, size=2))
    if rng.random() < 0.6:
        joined: Array = np.minimum(first, second)
    else:
        joined = np.maximum(first, -(second + np.float32(0.2)))
    return joined


Shape = Callable[[Generator, Array], Array]
SHAPES: dict[str, Shape] = {
    shape.__name__: shape for shape in (superquadric, blob, tube, tree, sheets, shell, compound)
}


def _posed(rng: Generator, points: Array) -> Array:
    """The points in the frame of a shape that is rotated and slightly shifted at random."""
    turn = Rotation.from_quat(rng.normal(size=4)).as_matrix().astype(np.float32)
    shift = rng.normal(0, 0.15, size=(3, 1)).astype(np.float32)
    posed: Array = (turn @ (points.reshape(3, -1) - shift)).reshape(points.shape)
    return posed


def _capsules(points: Array, branches: list[Branch]) -> Array:
    """Distance to the nearest segment minus its radius, which varies linearly along it."""
    field = np.full(points.shape[1:], np.inf, dtype=np.float32)
    for start, end, start_radius, end_radius in branches:
        along = (end - start).astype(np.float32)
        offset = points - start.astype(np.float32)[:, None, None, None]
        t = np.clip(np.tensordot(along, offset, 1) / (along @ along), 0, 1)
        radius = np.float32(start_radius) + t * np.float32(end_radius - start_radius)
        distance = np.linalg.norm(offset - t * along[:, None, None, None], axis=0)
        np.minimum(field, distance - radius, out=field)
    return field


def smooth_noise(rng: Generator, shape: tuple[int, ...], scale: float) -> Array:
    """Noise of mean 0 and standard deviation 1, smoothed by `scale` times the longest side."""
    noise = rng.standard_normal(shape, dtype=np.float32)
    noise = ndimage.gaussian_filter(noise, scale * max(shape), mode="wrap", truncate=3.0)
    standard: Array = (noise - noise.mean()) / np.float32(max(float(noise.std()), 1e-6))
    return standard


def make_phantom(rng: Generator, size: int = 32) -> tuple[Array, Mask]:
    """One random object and its image.

    Returns: image (size, size, size) float32 in [0, 1] and mask, the same shape, bool, which fills
    3 to 70 % of it. About 6 ms at size 32. Raises: ConfigError if size is below 8.
    """
    if size < 8:
        raise ConfigError(f"size: expected at least 8 voxels, got {size}")
    shapes = list(SHAPES.values())
    while True:
        shape = shapes[rng.choice(len(shapes), p=(0.12, 0.16, 0.08, 0.08, 0.26, 0.12, 0.18))]
        mask = shape(rng, _cube(size)) < 0
        if 0.03 <= mask.mean() <= 0.7:
            return _paint(rng, mask), mask


@lru_cache(maxsize=4)
def _cube(size: int) -> Array:
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    return np.stack(np.meshgrid(axis, axis, axis, indexing="ij"))


def _paint(rng: Generator, mask: Mask) -> Array:
    """An image of the mask: grey levels, rim, neighbours, texture, blur, bias field, noise."""
    shape = mask.shape
    ground, contrast = rng.uniform(0.15, 0.85), rng.uniform(0.12, 0.7)
    bright = rng.random() > ground  # so that the contrast is not clipped
    level = np.clip(ground + contrast if bright else ground - contrast, 0, 1)
    image = np.full(shape, ground, dtype=np.float32)
    for _ in range(rng.integers(0, 3)):  # neighbours, some of the object's grey level
        neighbour = (superquadric, blob, sheets)[rng.integers(0, 3)](rng, _cube(shape[0]))
        other = neighbour < rng.uniform(-0.4, 0)
        image[other] = level + rng.normal(0, 0.05) if rng.random() < 0.3 else rng.uniform(0, 1)
    near = ndimage.uniform_filter(mask.astype(np.float32), 5)
    if rng.random() < 0.6:  # a gap around the object, so that its edge is visible
        image[near > 0.05] = ground
    image[mask] = level
    if rng.random() < 0.35:  # a rim, like cortical bone around marrow
        image[mask & (near < rng.uniform(0.5, 0.85))] = np.clip(level + rng.normal(0, 0.3), 0, 1)
    if rng.random() < 0.6:
        texture = smooth_noise(rng, shape, rng.uniform(0.02, 0.08))
        strengths = rng.uniform(0, 0.25 * contrast, size=2).astype(np.float32)
        image += np.where(mask, *strengths) * texture
    image = ndimage.gaussian_filter(image, rng.uniform(0.3, 1.1), truncate=3.0)
    if rng.random() < 0.4:
        image *= 1 + np.float32(rng.uniform(0.05, 0.2)) * smooth_noise(rng, shape, 0.25)
    noise = rng.standard_normal(shape, dtype=np.float32)
    image += noise * np.float32(rng.uniform(0, 0.3) * contrast)
    painted: Array = np.clip(image, 0, 1)
    return painted


GROUND_HU = -70.0  # fat
# Each shape is in one quadrant of the volume.
STRUCTURES_HU = {"superquadric": 60.0, "blob": 110.0, "tube": 170.0, "tree": 210.0}


def write_phantom_dataset(
    root: str | os.PathLike[str], subjects: int = 3, seed: int = 0
) -> list[Case]:
    """CT-like volumes of four shapes each, in TotalSegmentator layout.

    The last of several subjects is for validation (meta.csv). Spacing, obliqueness, order and
    direction of the axes differ between subjects. A folder that is complete is reused.
    Raises: ConfigError if subjects is below 1; DataError if the folder holds anything else.
    """
    if subjects < 1:
        raise ConfigError(f"subjects: expected at least 1, got {subjects}")

    def write(folder: Path) -> None:
        lines = ["image_id;image_type;split\n"]
        for number in range(subjects):
            subject = f"phantom_{number:03d}"
            _write_subject(folder / subject, np.random.default_rng((seed, number)))
            held_out = subjects > 1 and number == subjects - 1
            lines.append(f"{subject};ct;{'val' if held_out else 'train'}\n")
        (folder / "meta.csv").write_text("".join(lines), encoding="utf-8")

    recipe = {"phantom_version": LAYOUT_VERSION, "subjects": subjects, "seed": seed}
    return find_cases(generate_folder(root, recipe, write))


def _write_subject(folder: Path, rng: Generator) -> None:
    shape = tuple(int(n) for n in rng.integers((56, 56, 24), (72, 72, 36)))
    spacing = rng.uniform((1.0, 1.0, 1.4), (1.4, 1.4, 2.2))
    affine = _oblique_affine(rng, spacing)
    image = np.full(shape, GROUND_HU, dtype=np.float32)
    half = [n // 2 for n in shape[:2]]
    for number, (name, level) in enumerate(STRUCTURES_HU.items()):
        i, j = divmod(number, 2)
        box = np.s_[i * half[0] : (i + 1) * half[0], j * half[1] : (j + 1) * half[1], :]
        mask = np.zeros(shape, dtype=np.bool_)
        mask[box] = _solid_shape(rng, SHAPES[name], image[box].shape, spacing)
        image[mask] = level
        save_volume(folder / "segmentations" / f"{name}.nii.gz", mask.astype(np.uint8), affine)
    image += 15 * smooth_noise(rng, shape, 0.05)
    image = ndimage.gaussian_filter(image, 0.5) + rng.normal(0, 12, shape).astype(np.float32)
    save_volume(folder / "ct.nii.gz", np.rint(image).astype(np.int16), affine)


def _solid_shape(rng: Generator, shape: Shape, size: tuple[int, ...], spacing: FloatArray) -> Mask:
    """A shape that fills 2 to 50 % of a box of voxels, undistorted by their spacing."""
    axes = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(size, spacing, strict=True)]
    reach = min(float(axis[-1]) for axis in axes)
    points = (np.stack(np.meshgrid(*axes, indexing="ij")) / reach).astype(np.float32)
    while True:
        mask = shape(rng, points) < 0
        if 0.02 <= mask.mean() <= 0.5:
            return mask


def _oblique_affine(rng: Generator, spacing: FloatArray) -> FloatArray:
    """Axes tilted by 5 to 20°, in random order and direction."""
    axes = np.eye(3)[:, rng.permutation(3)] * rng.choice([-1.0, 1.0], size=3)
    tilt = rng.normal(size=3)
    tilt *= np.radians(rng.uniform(5, 20)) / np.linalg.norm(tilt)
    turned = Rotation.from_rotvec(tilt).as_matrix() @ axes * spacing
    affine: FloatArray = from_matvec(turned, rng.uniform(-100, 100, size=3))
    return affine
