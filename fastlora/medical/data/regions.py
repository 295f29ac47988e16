"""Region samples: the input is an image with a coarse segmentation, the target the fine surface.

A region is a cube of 32³ fine voxels (`SPACING_MM` each) around one structure of one subject, or
around one block of a large structure. The input is the image and an 8³ coarse segmentation (the fraction
of each 4³ cell inside the structure, as from a fast low-resolution model); the target is the signed
distance field (SDF) of the structure on the fine grid. Distances are in fine voxels,
negative inside; the affine maps indices of a region's fine voxels to mm in the patient.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import interpolate
from torch.utils.data import Dataset

from fastlora.errors import ConfigError, DataError
from fastlora.medical.data.grids import CELL, COARSE, FINE, SPACING_MM, StructureGrid
from fastlora.medical.data.splits import RegionSpec, group_of, is_region
from fastlora.medical.scans.geometry import Array, FloatArray, Mask, shifted
from fastlora.medical.scans.volumes import file_stamps

CONTEXT = 2  # image voxels around a cell that its token includes
PATCH = CELL + 2 * CONTEXT
TOKEN_CHANNELS = PATCH**3 + 3**3
"""A token is its cell's image patch with context, and the coarse values of the 3³ cells around it."""

SHIFT_VOX = 8  # the largest shift of a region along each axis in augmentation
GAMMA = 0.3  # the largest |log| of the exponent of grey values in augmentation


def upsample_coarse(coarse: Array) -> Array:
    """(8, 8, 8) fractions → (32, 32, 32), trilinear between cell centres, constant beyond the outer ones."""
    values = torch.tensor(coarse)[None, None]
    return interpolate(values, scale_factor=CELL, mode="trilinear")[0, 0].numpy()


def coarse_segmentation(mask: Mask) -> Array:
    """A mask (32, 32, 32) → (8, 8, 8), the fraction of each cell that is inside."""
    cells = mask.reshape(COARSE, CELL, COARSE, CELL, COARSE, CELL)
    fraction: Array = cells.mean((1, 3, 5), dtype=np.float32)
    return fraction


def active_cells(coarse: Array) -> NDArray[np.int64]:
    """(T, 3) cells that may contain surface: their 3³ neighbourhood is neither empty nor full."""
    around = _neighbourhoods(coarse)
    return np.argwhere((around.max(-1) > 0) & (around.min(-1) < 1))


def _neighbourhoods(coarse: Array) -> Array:
    """(8, 8, 8, 27): the coarse values around each cell, the outer ones repeated beyond the cube."""
    padded = np.pad(coarse, 1, mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3, 3))
    return windows.reshape(COARSE, COARSE, COARSE, 27)


def base_distance(coarse: Array) -> Array:
    """(32, 32, 32) the upsampled coarse segmentation as a distance within ±CELL voxels, zero at one half.

    It is small wherever a cell is partly filled. The distance transform of the upsampled surface would
    be large where that misses a thin sheet, and the model would have to predict the difference.
    """
    return 2 * CELL * (np.float32(0.5) - upsample_coarse(coarse))


def token_features(image: Array, coarse: Array, cells: NDArray[np.int64]) -> Array:
    """(T, TOKEN_CHANNELS): image patches, rescaled to [−2, 2], then coarse values, to [−1, 1].

    image: (32, 32, 32) in [0, 1]; its outer voxels are repeated beyond the cube.
    """
    padded = np.pad(image, CONTEXT, mode="edge")
    patches = np.lib.stride_tricks.sliding_window_view(padded, (PATCH, PATCH, PATCH))
    i, j, k = cells.T
    patch = patches[i * CELL, j * CELL, k * CELL].reshape(len(cells), PATCH**3)
    around = _neighbourhoods(coarse)[i, j, k]
    return np.concatenate([4 * (patch - 0.5), 2 * (around - 0.5)], axis=1).astype(np.float32)


def region_arrays(image: Array, sdf_vox: Array) -> dict[str, Array | NDArray[np.int64]]:
    """The arrays of a sample of `RegionDataset` that follow from its image and SDF, (32, 32, 32) each."""
    coarse = coarse_segmentation(sdf_vox < 0)
    cells = active_cells(coarse)
    return {
        "coarse": coarse,
        "coords": cells,
        "feats": token_features(image, coarse, cells),
        "base_vox": base_distance(coarse),
        "sdf_vox": sdf_vox,
        "image": image,
    }


class RegionDataset(Dataset[dict[str, Any]]):
    """Region samples of `specs`, `samples_per_region` of each, determined by (seed, epoch, index).

    `dataset[i]` is a dict: coarse (8, 8, 8) float32, the fraction of each cell that is inside;
    coords (T, 3) int64, the active cells; feats (T, TOKEN_CHANNELS) float32, their tokens;
    base_vox, sdf_vox (32, 32, 32) float32, distances of the upsampled coarse segmentation
    and of the ground truth; image (32, 32, 32) float32 in [0, 1]; affine (4, 4) float64, index to mm; spacing, mm
    per fine voxel; meta: subject, structure, region, modality, group.

    augment: shift the region, mirror and exchange its axes, and vary gamma, contrast, brightness and noise (the image
    may then leave [0, 1]). Image and SDF are moved alike and not resampled, so the SDF stays exact. cache_dir: of preprocessing.
    Raises: DataError if `specs` is empty; ConfigError if `samples_per_region` < 1.
    """

    def __init__(
        self,
        specs: Sequence[RegionSpec],
        *,
        augment: bool = False,
        seed: int = 0,
        samples_per_region: int = 1,
        cache_dir: str | Path | None = None,
    ) -> None:
        if not specs:
            raise DataError("specs: expected at least one region, got none")
        if samples_per_region < 1:
            raise ConfigError(f"samples_per_region: expected >= 1, got {samples_per_region}")
        self.specs = list(specs)
        self.augment = augment
        self.seed = seed
        self.samples_per_region = samples_per_region
        self.cache_dir = Path(cache_dir) if cache_dir is not None else None
        self.epoch = 0

    def identity(self) -> str:
        """A hash of the regions' subjects, structures and positions, not of their voxels."""
        names = sorted(repr((s.case.subject, s.structure, s.name)) for s in self.specs)
        return hashlib.sha256("\n".join(names).encode()).hexdigest()

    def sources(self) -> str:
        """A hash of the names, sizes and times of the files that the regions are read from.

        Raises: DataError if a file is missing.
        """
        paths = {s.case.image_path for s in self.specs}
        paths |= {s.case.structures[s.structure].path for s in self.specs}
        stamps = sorted((Path(n).name, *rest) for path in paths for n, *rest in file_stamps(path))
        return hashlib.sha256(repr(stamps).encode()).hexdigest()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the augmentations."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.specs) * self.samples_per_region

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected 0 to {len(self) - 1}, got {index}")
        spec = self.specs[index % len(self.specs)]
        grid = StructureGrid.load(spec.case, spec.structure, self.cache_dir)
        start = np.array(spec.start)
        rng = np.random.default_rng((self.seed, self.epoch, index))
        if self.augment:
            start = _moved(spec, grid, rng)
        image, sdf = grid.crop(start.tolist())
        affine = shifted(grid.affine, start - grid.offset)
        if self.augment:
            image, sdf, affine = _augmented(image, sdf, affine, rng)
        return {
            **region_arrays(image, sdf),
            "affine": affine,
            "spacing": SPACING_MM,
            "meta": {
                "subject": spec.case.subject,
                "structure": spec.structure,
                "region": spec.name,
                "modality": spec.case.modality,
                "group": group_of(spec.structure),
            },
        }


def _moved(spec: RegionSpec, grid: StructureGrid, rng: np.random.Generator) -> NDArray[np.int64]:
    """A random start within SHIFT_VOX and the spec's bounds whose region still contains a surface."""
    for _ in range(8):
        shift = rng.integers(-SHIFT_VOX, SHIFT_VOX + 1, 3)
        start: NDArray[np.int64] = np.clip(np.array(spec.start) + shift, spec.low, spec.high)
        if is_region(grid, start.tolist()):
            return start
    return np.array(spec.start)


def _augmented(
    image: Array, sdf: Array, affine: FloatArray, rng: np.random.Generator
) -> tuple[Array, Array, FloatArray]:
    """Exchange and mirror the axes of image, SDF and affine at random, then vary gamma, contrast, brightness and noise."""
    order = rng.permutation(3)
    image, sdf = np.transpose(image, order), np.transpose(sdf, order)
    affine = affine[:, [*order, 3]]
    for axis in np.flatnonzero(rng.random(3) < 0.5).tolist():
        image, sdf = np.flip(image, axis), np.flip(sdf, axis)
        affine[:3, 3] += affine[:3, axis] * (FINE - 1)
        affine[:3, axis] *= -1
    gamma = np.exp(rng.uniform(-GAMMA, GAMMA))
    gain, bias = rng.uniform(0.95, 1.05), rng.uniform(-0.03, 0.03)
    noise = rng.normal(0, rng.uniform(0, 0.02), image.shape)
    # Not clipped to [0, 1], which would remove the contrast between bright tissues.
    changed = ((image**gamma - 0.5) * gain + 0.5 + bias + noise).astype(np.float32)
    return changed, np.ascontiguousarray(sdf), affine
