"""An open case: its image and its masks, each file read once, and every structure cut out of them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fastlora.errors import DataError
from fastlora.medical.scans import dicom
from fastlora.medical.scans.geometry import Mask
from fastlora.medical.scans.stopwatch import Stopwatch
from fastlora.medical.scans.volumes import Case, Source, Volume, check_not_empty, load_on_grid
from fastlora.medical.scans.windows import Limits, window_limits

log = logging.getLogger(__name__)

Box = tuple[slice, ...]


@dataclass(frozen=True, eq=False)
class Part:
    """A structure's voxels in an image.

    mask: (X, Y, Z) bool, cropped to the structure's bounding box. start: the image's voxel at mask (0, 0, 0).
    """

    mask: Mask
    start: tuple[int, ...]

    @classmethod
    def of(cls, mask: Mask) -> Part:
        """The part of a mask (X, Y, Z) on the complete image. Raises: DataError if the mask is empty."""
        extent = _extent(mask)
        if not mask[extent].size:
            raise DataError("mask: expected at least one voxel, got an empty mask")
        return cls(mask[extent], tuple(side.start for side in extent))

    @property
    def box(self) -> Box:
        """The bounding box in the image."""
        return tuple(slice(s, s + n) for s, n in zip(self.start, self.mask.shape, strict=True))


class LabelMap:
    """The labels (X, Y, Z) of an image's voxels; `boxes` has each value other than 0."""

    def __init__(self, labels: NDArray[np.integer] | Mask) -> None:
        extent = _extent(labels)
        filled = labels[extent]
        boxes: dict[int, Box] = {}
        if filled.size:
            low, high = int(filled.min()), int(filled.max())
            if low < 0 or high > np.iinfo(np.uint16).max:
                known, numbers = np.unique(filled, return_inverse=True)
                found = ndimage.find_objects(numbers.reshape(filled.shape).astype(np.int32) + 1)
                boxes = dict(zip(known.tolist(), found, strict=True))
                boxes.pop(0, None)
            else:
                # The smallest type takes the least memory, and C order makes the search fast.
                filled = np.ascontiguousarray(filled, dtype=np.min_scalar_type(high))
                boxes = {n: box for n, box in enumerate(ndimage.find_objects(filled), 1) if box}
        self._labels = filled
        self._first = tuple(side.start for side in extent)
        self.boxes = boxes  # in the array of the labelled part

    def part(self, label: int | tuple[int, ...] | None) -> Part | None:
        """The voxels of a label, of one of several labels, or (None) of all; None if there are none."""
        wanted = set(self.boxes if label is None else (label,) if isinstance(label, int) else label)
        boxes = [box for value, box in self.boxes.items() if value in wanted]
        if not boxes:
            return None
        box = tuple(
            slice(min(side.start for side in sides), max(side.stop for side in sides))
            for sides in zip(*boxes, strict=True)
        )
        cut = self._labels[box]
        if label is None:
            mask = cut != 0
        elif len(wanted) == 1:
            mask = cut == wanted.pop()
        else:
            mask = np.isin(cut, list(wanted))
        first = zip(self._first, box, strict=True)
        return Part(mask, tuple(start + side.start for start, side in first))


def _extent(values: NDArray[Any]) -> Box:
    """The bounding box of the values other than 0; empty if there are none."""
    sides = []
    for axis in range(3):
        found = np.flatnonzero(values.any(axis=tuple(a for a in range(3) if a != axis)))
        sides.append(slice(int(found[0]), int(found[-1]) + 1) if len(found) else slice(0, 0))
    return tuple(sides)


class Scan:
    """The image and the masks of a case, read on first use.

    The image stays in memory, and of the label maps the one used last, so structures of one file should follow
    each other. A file that cannot be used raises the same DataError whenever it is needed.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self._image: Volume | DataError | None = None
        self._limits: dict[str, Limits] = {}
        self._map: tuple[Path, LabelMap | DataError] | None = None
        self.watch = Stopwatch()

    @property
    def image(self) -> Volume:
        """The image, float32. Raises: DataError as `load_volume`."""
        if self._image is None:
            try:
                with self.watch.step("image"):
                    self._image = self.case.load_image()
            except DataError as error:
                self._image = error
        if isinstance(self._image, DataError):
            raise self._image
        return self._image

    def limits(self, structure: str) -> Limits:
        """See `window_limits`; those of MR and grey values are computed once."""
        modality = self.case.modality
        key = structure if modality == "ct" else ""
        if key not in self._limits:
            image = self.image
            with self.watch.step("window"):
                self._limits[key] = window_limits(image.array, modality, structure)
        return self._limits[key]

    def labels(self, source: Source) -> LabelMap:
        """The label map of a mask's file. Raises: DataError if it is unreadable or not on the image's grid."""
        if self._map is None or self._map[0] != source.path:
            self._map = None  # frees its memory before the next one is read
            found: LabelMap | DataError
            try:
                image, name = self.image, self.case.image_path.name
                with self.watch.step("masks"):
                    values = load_on_grid(source, image, name, self.case.tolerance_mm)
                    found = LabelMap(values != 0 if source.spacing else values)
            except DataError as error:
                found = error
            self._map = source.path, found
        labels = self._map[1]
        if isinstance(labels, DataError):
            raise labels
        return labels

    def part(self, structure: str) -> Part:
        """The structure's voxels. Raises: DataError as `load_mask`."""
        source = self.case.source(structure)
        if dicom.is_dicom(source.path):
            image = self.image
            with self.watch.step("masks"):
                return Part.of(self.case.load_mask(structure, image))
        labels = self.labels(source)
        if source.label is None and len(labels.boxes) > 1:
            values = ", ".join(map(str, list(labels.boxes)[:5]))
            log.warning(
                "%s: expected a mask of one structure, got %d values (%s, …); all of them are taken as %s",
                *(source.path, len(labels.boxes), values, structure),
            )
        return check_not_empty(labels.part(source.label), source)
