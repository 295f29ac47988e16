"""Slice samples: one slice of one structure of one subject, with the whole structure's 3-D shape.

A slice is cut from the data that `slice_source` computes. Augmentation applies one random similarity to
image, mask, distances, canonical cube and mesh alike.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nibabel.affines import apply_affine, from_matvec, voxel_sizes
from scipy import ndimage
from torch.nn.functional import pad
from torch.utils.data import Dataset, default_collate

from fastlora.errors import ConfigError, DataError
from fastlora.medical.data.slice_source import (
    Prepared,
    SliceConfig,
    cache_path,
    load_prepared,
    to_canonical,
)
from fastlora.medical.data.splits import select_structures
from fastlora.medical.scans.geometry import (
    Array,
    FloatArray,
    Mask,
    other_axes,
    plane_points,
    pointmap,
)
from fastlora.medical.scans.volumes import Case

AXES = {"sagittal": 0, "coronal": 1, "axial": 2}  # of a volume in RAS order

log = logging.getLogger(__name__)


class TS_SAM3D_Dataset(Dataset[dict[str, Any]]):
    """Slices of the structures of some cases.

    What is not in the cache yet is prepared when the data set is built, and written there;
    `fastlora-medical preprocess --slices` does so in advance.

    cases: from `find_cases`; split them by subject first (`split_by_subject`). classes: names or
    kinds of structures, None for all. axes: among sagittal, coronal, axial or 0, 1, 2.
    extract_mesh: whether samples carry the mesh. augment: move each sample at random, depending on
    (seed, epoch, index) alone and not on the worker. cache_dir: of preprocessing; None caches a few
    structures in memory only.
    Raises: ConfigError if an axis is unknown; DataError if no case has one of the classes or
    a file cannot be used.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        classes: Sequence[str] | None = None,
        axes: Sequence[str | int] = ("sagittal", "coronal", "axial"),
        config: SliceConfig | None = None,
        extract_mesh: bool = False,
        augment: bool = False,
        seed: int = 0,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        self.config = config or SliceConfig()
        self.extract_mesh = extract_mesh
        self.augment = augment
        self.seed = seed
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        # Shared memory: workers that outlive an epoch see the next one's number.
        self._epoch = torch.zeros((), dtype=torch.int64)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]
        selected = select_structures(cases, classes)
        self.structures = [(case, name) for case in selected for name in case.structures]
        if self.cache_dir is not None:
            paths = [cache_path(c, s, self.config, self.cache_dir) for c, s in self.structures]
            if missing := sum(not path.is_file() for path in paths):
                log.info("%s: preparing slices of %d structures", self.cache_dir, missing)
        self.slices: list[tuple[int, int, int]] = []  # (structure, axis, index along it)
        for number in range(len(self.structures)):
            mask = self._prepared(number).mask
            for axis in parse_axes(axes):
                found = slice_indices(mask, axis, self.config.min_area_px)
                self.slices += [(number, axis, index) for index in found]
        if not self.slices:
            raise DataError(
                f"cases: expected a slice of {self.config.min_area_px} pixels, got none"
            )

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's random moves, also for workers that are already running."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.slices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample.

        image (1, H, W) float32 in [0, 1]; mask (1, H, W) float32 of 0 and 1; pointmap (3, H, W)
        float32 mm; affine (4, 4) float64, index to mm, in whose index space slice_idx counts;
        axis; gt_sdf (D, D, D) float32 mm of the whole structure, and canonical_to_mm (4, 4)
        float64; subject, structure; with extract_mesh vertices (V, 3) float32 mm, faces (F, 3).
        """
        number, axis, slice_idx = self.slices[index]
        case, structure = self.structures[number]
        item = self._prepared(number)
        move = np.eye(4)
        if self.augment:
            rng = np.random.default_rng((self.seed, int(self._epoch), index))
            move = random_move(rng, item.affine, item.mask, axis, slice_idx)
        image, mask, gt_sdf, to_mm = _moved(item, move, axis, slice_idx)
        points = pointmap(item.affine, item.mask.shape, axis, slice_idx)
        sample: dict[str, Any] = {
            "image": torch.from_numpy(image)[None],
            "mask": torch.from_numpy(mask)[None],
            "pointmap": torch.from_numpy(points).permute(2, 0, 1).contiguous(),
            "affine": torch.from_numpy(item.affine.copy()),
            "slice_idx": slice_idx,
            "axis": axis,
            "gt_sdf": torch.from_numpy(gt_sdf),
            "canonical_to_mm": torch.from_numpy(to_mm),
            "subject": case.subject,
            "structure": structure,
        }
        if self.extract_mesh:
            mirrored = np.linalg.det(move[:3, :3]) < 0  # and with it the winding
            vertices = apply_affine(move, item.vertices).astype(np.float32)
            sample["vertices"] = torch.from_numpy(vertices)
            sample["faces"] = torch.from_numpy(item.faces[:, :: -1 if mirrored else 1].copy())
        return sample

    def _prepared(self, number: int) -> Prepared:
        return load_prepared(*self.structures[number], self.config, self.cache_dir)


def parse_axes(axes: Sequence[str | int]) -> list[int]:
    """Axis numbers from names or numbers. Raises: ConfigError if there is none or one is unknown."""
    numbers = {str(number): number for number in AXES.values()} | AXES
    unknown = [axis for axis in axes if str(axis) not in numbers]
    if unknown or not axes:
        raise ConfigError(f"axes: expected some of {', '.join(AXES)} or 0, 1, 2, got {list(axes)}")
    return sorted({numbers[str(axis)] for axis in axes})


def slice_indices(mask: Mask, axis: int, min_area_px: int) -> list[int]:
    """The indices along an axis where a mask's cross-section has at least `min_area_px` pixels."""
    area = mask.sum(axis=other_axes(axis))
    return [int(index) for index in np.flatnonzero(area >= min_area_px)]


def split_by_subject(
    cases: Sequence[Case], val_fraction: float = 0.2, seed: int = 0
) -> tuple[list[Case], list[Case]]:
    """Training and validation cases that share no subject.

    If cases carry a split (meta.csv), subjects of split "train" train and the others validate;
    otherwise `val_fraction` of the subjects is drawn at random.
    Raises: DataError if one subset would be empty, as with a single subject.
    """
    if any(case.split for case in cases):
        chosen = {case.subject for case in cases if case.split != "train"}
    else:
        subjects = sorted({case.subject for case in cases})
        count = max(1, round(val_fraction * len(subjects)))
        chosen = set(np.random.default_rng(seed).permutation(subjects)[:count].tolist())
    train = [case for case in cases if case.subject not in chosen]
    val = [case for case in cases if case.subject in chosen]
    if not train or not val:
        raise DataError(
            f"cases: expected subjects for both training and validation, got {len(train)} cases "
            f"and {len(val)}"
        )
    return train, val


def random_move(
    rng: np.random.Generator, affine: FloatArray, mask: Mask, axis: int, slice_idx: int
) -> FloatArray:
    """A random similarity (4, 4) in mm that maps a slice's plane to itself.

    It rotates by up to 20°, scales by 0.85 to 1.18 and flips with probability ½, about the normal
    through the centroid of the structure's cross-section.
    """
    plane = other_axes(axis)
    local = np.eye(3)  # in mm along the volume's axes
    angle = np.radians(rng.uniform(-20, 20))
    cos, sin = np.cos(angle), np.sin(angle)
    local[np.ix_(plane, plane)] = (cos, -sin), (sin, cos)
    if rng.random() < 0.5:
        local[:, plane[0]] *= -1
    local *= np.exp(rng.uniform(-1, 1) * np.log(1.18))
    centre = np.insert(np.argwhere(mask.take(slice_idx, axis)).mean(0), axis, slice_idx)
    axes = affine[:3, :3] / voxel_sizes(affine)
    turn = axes @ local @ axes.T
    middle = apply_affine(affine, centre)
    move: FloatArray = from_matvec(turn, middle - turn @ middle)
    return move


def _moved(
    item: Prepared, move: FloatArray, axis: int, slice_idx: int
) -> tuple[Array, Array, Array, FloatArray]:
    """Image and mask (H, W) on the slice's pixels after moving the structure, and its new cube.

    The pixels stay in place. `move` maps the slice's plane to itself, so the slice is resampled in
    2-D; it multiplies distances by its scale, so the SDF is scaled and resampled in a cube around
    the moved structure.
    """
    image: Array = np.take(item.image, slice_idx, axis)
    mask: Array = np.take(item.mask, slice_idx, axis).astype(np.float32)
    if np.array_equal(move, np.eye(4)):
        return image, mask, item.canonical_sdf.copy(), item.canonical_to_mm.copy()
    moved_affine = move @ item.affine
    back = np.linalg.inv(moved_affine) @ item.affine  # index after → index before the move
    plane = list(other_axes(axis))
    matrix, offset = back[np.ix_(plane, plane)], back[plane, axis] * slice_idx + back[plane, 3]
    image = ndimage.affine_transform(image, matrix, offset, order=1, mode="nearest")
    mask = (ndimage.affine_transform(mask, matrix, offset, order=1) >= 0.5).astype(np.float32)
    scale = np.float32(np.cbrt(abs(np.linalg.det(move[:3, :3]))))
    vertices = apply_affine(move, item.vertices).astype(np.float32)
    cube, to_mm = to_canonical(
        item.sdf * scale, moved_affine, vertices, item.canonical_sdf.shape[0]
    )
    return image, mask, cube, to_mm


def collate_slices(
    samples: Sequence[dict[str, Any]], crop_size: int | None = None
) -> dict[str, Any]:
    """Batch slices of different sizes: each is cropped or padded around its structure to one size.

    The size is crop_size, or by default the largest height and width. Padding is 0 in image and
    mask and False in `valid` (B, 1, H, W) bool; the pointmap is extrapolated there. gt_sdf,
    canonical_to_mm, affine, slice_idx and axis are stacked; the rest (meshes, names) are lists.
    """
    if crop_size is None:
        height, width = (max(s["image"].shape[d] for s in samples) for d in (1, 2))
    else:
        height = width = crop_size
    mesh = [name for name in ("vertices", "faces") if name in samples[0]]  # of different lengths
    cut = [
        {name: value for name, value in sample.items() if name not in mesh}
        | _cut(sample, height, width)
        for sample in samples
    ]
    batch: dict[str, Any] = default_collate(cut)
    return batch | {name: [sample[name] for sample in samples] for name in mesh}


def _cut(sample: dict[str, Any], height: int, width: int) -> dict[str, torch.Tensor]:
    """Image, mask, valid and pointmap of a sample in a frame (height, width) around its mask."""
    mask = sample["mask"]
    top = _frame_start(mask[0].any(dim=1), height)
    left = _frame_start(mask[0].any(dim=0), width)
    _, rows, columns = mask.shape
    grow = (-left, left + width - columns, -top, top + height - rows)  # negative values crop
    place = sample["affine"].numpy(), sample["axis"], sample["slice_idx"]
    points = plane_points(*place, range(top, top + height), range(left, left + width))
    return {
        "image": pad(sample["image"], grow),
        "mask": pad(mask, grow),
        "valid": pad(torch.ones_like(mask), grow).bool(),
        "pointmap": torch.from_numpy(points).permute(2, 0, 1).contiguous(),
    }


def _frame_start(filled: torch.Tensor, size: int) -> int:
    """First pixel of a frame around the filled ones; it never crops one end and pads the other."""
    length = len(filled)
    inside = filled.nonzero()
    middle = int(inside.min() + inside.max() + 1) / 2 if len(inside) else length / 2
    slack = length - size
    return min(max(round(middle - size / 2), min(0, slack)), max(0, slack))
