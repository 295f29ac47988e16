"""Cases and volumes: reading, checking and windowing.

Every volume is reoriented to the closest RAS orientation, with its affine. Images are read from
NIfTI, MGH, MetaImage, NRRD, a folder of one DICOM series, and PNG; masks from these and DICOM SEG.
"""

from __future__ import annotations

import gzip
import itertools
import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine, voxel_sizes
from numpy.typing import ArrayLike, NDArray

from fastlora.errors import DataError
from fastlora.files import atomic_write
from fastlora.medical.scans import dicom
from fastlora.medical.scans.formats import from_array, read_png, read_volume
from fastlora.medical.scans.geometry import (
    FloatArray,
    Mask,
    check_spacing,
)
from fastlora.medical.scans.windows import Modality, check_hounsfield

log = logging.getLogger(__name__)

LABEL_TOLERANCE = 1e-3

Found = TypeVar("Found")


@dataclass(frozen=True)
class Volume:
    """An image or a label map.

    array: (X, Y, Z) in RAS order, float32 (image) or integers up to int32 (label map). affine: (4, 4) index to mm.
    oriented: False if the file states no orientation, so that the affine is an assumption.
    """

    array: NDArray[Any]
    affine: FloatArray
    oriented: bool = True

    @property
    def spacing(self) -> FloatArray:
        """(3,) mm."""
        lengths: FloatArray = voxel_sizes(self.affine)
        return lengths

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape


@dataclass(frozen=True)
class Source:
    """A structure's mask: the voxels of `path` whose value is `label`, or one of several labels.

    None: all nonzero voxels. In a DICOM SEG the label is a segment's number. spacing: three
    mm, only for PNG (see `load_png`). title: the structure's name in the file, if it has one.
    """

    path: Path
    label: int | tuple[int, ...] | None = None
    spacing: Sequence[float] | None = None
    title: str | None = None


@dataclass(frozen=True)
class Case:
    """One image of one subject with its structures' masks, as paths; nothing is read yet.

    image_path: a file with one of `formats.ENDINGS`, or a folder with a DICOM series. component: the channel of a 4-D file, or
    the UID of a series in the folder; None if there is only one. spacing: three mm, only for PNG (see `load_png`).
    intercept: added to the values of a CT that was stored without it; then they are not checked to be Hounsfield units.
    tolerance_mm: largest distance between a voxel of a mask and of the image; None: half the smallest edge of a voxel.
    """

    subject: str
    modality: Modality
    image_path: Path
    structures: dict[str, Source]
    split: str | None = None
    component: int | str | None = None
    spacing: Sequence[float] | None = None
    intercept: float | None = None
    tolerance_mm: float | None = None

    def load_image(self) -> Volume:
        """The image, float32. Raises: DataError as `load_volume`, or if a CT has no Hounsfield units."""
        if self.spacing is not None:
            return load_png(self.image_path, self.spacing)
        image = load_volume(self.image_path, self.component)
        if self.modality == "ct" and self.intercept is None:
            check_hounsfield(image.array, str(self.image_path))
        elif self.modality == "ct" and self.intercept:
            image = replace(image, array=image.array + np.float32(self.intercept))
        return image

    def source(self, structure: str) -> Source:
        """The structure's mask. Raises: DataError if the case has no such structure."""
        if structure not in self.structures:
            raise DataError(
                f"{self.subject}: expected a structure among "
                f"{', '.join(sorted(self.structures))}, got {structure!r}"
            )
        return self.structures[structure]

    def stamp(self, structure: str) -> tuple[object, ...]:
        """A key that changes with the files of the image or of a structure's mask; nothing is read.

        Raises: DataError as `source`, or if a file is missing.
        """
        source = self.source(structure)
        files = file_stamps(self.image_path), file_stamps(source.path)
        changed: tuple[object, ...] = () if self.intercept is None else (self.intercept,)
        if self.tolerance_mm is not None:
            changed += (("tolerance_mm", self.tolerance_mm),)
        return (self.modality, self.component, structure, source.label, *changed, *files)

    def load_mask(self, structure: str, image: Volume) -> Mask:
        """The structure's mask on the image's grid, (X, Y, Z) bool.

        Raises: DataError as `source`, or as the function `load_mask`.
        """
        return load_mask(self.source(structure), image, self.image_path.name, self.tolerance_mm)


def with_structures(cases: Sequence[Case], keep: Callable[[Case, str], bool]) -> list[Case]:
    """The cases, reduced to the structures that `keep` accepts, without those that have none left."""
    reduced = [
        replace(case, structures={n: s for n, s in case.structures.items() if keep(case, n)})
        for case in cases
    ]
    return [case for case in reduced if case.structures]


def load_mask(
    source: Source, image: Volume, name: str = "the image", tolerance_mm: float | None = None
) -> Mask:
    """A mask on an image's grid, (X, Y, Z) bool. name: of the image, for errors. tolerance_mm: see `Case`.

    A DICOM SEG may have other slices than the image, but its voxels must coincide with the image's.
    Raises: DataError if the mask is unreadable, empty, or not on the image's grid.
    """
    if dicom.is_dicom(source.path):
        if not isinstance(source.label, int):
            raise DataError(f"{source.path}: expected a segment's number, got {source.label}")
        where = image.affine, image.shape
        mask = dicom.read_segment(
            source.path, source.label, *where, largest_offset(image, tolerance_mm)
        )
    else:
        labels = load_on_grid(source, image, name, tolerance_mm)
        mask = labels != 0 if source.label is None else np.isin(labels, source.label)
    return check_not_empty(mask if mask.any() else None, source)


def load_on_grid(
    source: Source, image: Volume, name: str, tolerance_mm: float | None = None
) -> NDArray[Any]:
    """The values (X, Y, Z) of a mask's file other than DICOM. name: of the image, for errors. tolerance_mm: see `Case`.

    An affine that differs noticeably is logged. Raises: DataError if the file is unreadable or not on the image's grid.
    """
    spacing = source.spacing
    labels = load_png(source.path, spacing) if spacing else load_labels(source.path)
    if labels.shape != image.shape:
        raise DataError(
            f"{source.path}: expected the shape of {name}, {image.shape}, got {labels.shape}"
        )
    apart = grids_apart(labels.affine, image.affine, image.shape)
    most = largest_offset(image, tolerance_mm)
    if apart > most:
        raise DataError(
            f"{source.path}: expected the affine of {name}, {image.affine.round(4).tolist()}, got "
            f"{labels.affine.round(4).tolist()}: up to {apart:.3g} mm apart, more than --grid_tolerance {most:.3g}"
        )
    if apart > 0.01 * image.spacing.min():
        log.warning(
            "%s: its affine differs from that of %s, by %.2g mm in the farthest corner; that of the image is used",
            *(source.path, name, apart),
        )
    return labels.array


def largest_offset(image: Volume, tolerance_mm: float | None) -> float:
    """The largest distance in mm between a voxel of a mask and that of the image: by default, half the smallest edge of a voxel."""
    return 0.5 * float(image.spacing.min()) if tolerance_mm is None else tolerance_mm


def check_not_empty(mask: Found | None, source: Source) -> Found:
    """The mask itself. Raises: DataError if there is none."""
    if mask is None:
        of_label = "" if source.label is None else f" of label {source.label}"
        raise DataError(f"{source.path}: expected at least one voxel{of_label}, got an empty mask")
    return mask


def file_stamps(path: Path) -> tuple[tuple[str, int, int], ...]:
    """Path, size and modification time of a file, or of every file below a folder.

    Raises: DataError if a file is missing.
    """
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    try:
        stats = [(str(file.absolute()), file.stat()) for file in files]
    except OSError as error:
        raise DataError(f"{error.filename}: expected a file, got {error.strerror}") from error
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def grids_apart(a: ArrayLike, b: ArrayLike, shape: Sequence[int]) -> float:
    """The largest distance in mm between the positions of a voxel of a volume by two affines: that in a corner."""
    corners = list(itertools.product(*((0, n - 1) for n in shape)))
    return float(np.linalg.norm(apply_affine(np.subtract(a, b), corners), axis=1).max())


def load_volume(path: str | os.PathLike[str], component: int | str | None = None) -> Volume:
    """Read a 3-D image as float32 in RAS order.

    path: a file with one of `formats.ENDINGS`, a folder with a DICOM series, or a multi-frame DICOM file. component: see `Case`.
    Raises: DataError, naming the file, if it cannot be read, is not 3-D, holds NaN or infinity, or
    has a singular or sheared affine.
    """
    path = Path(path)
    if path.is_dir() or dicom.is_dicom(path):
        uid = component if isinstance(component, str) else None  # a channel is of a 4-D file
        stored, matrix = dicom.read_series(path, uid)
        data, affine, oriented = from_array(stored, matrix, path)
    else:
        data, affine, oriented = read_volume(path, component)
    if not oriented:
        log.warning(
            "%s: the header states no orientation (qform_code and sform_code are 0), so left and right, front and back, and the origin "
            "are assumed",
            path,
        )
    with np.errstate(over="ignore"):
        array = data.astype(np.float32)
    if bad := np.count_nonzero(~np.isfinite(array)):
        raise DataError(
            f"{path}: expected finite values, got NaN or infinity in {bad} of {array.size} voxels"
        )
    return Volume(array, affine, oriented)


def load_labels(path: str | os.PathLike[str]) -> Volume:
    """Read a 3-D label map as integers in RAS order: int32, or a smaller type of the file.

    Values within LABEL_TOLERANCE of an integer are rounded: a file's scaling changes them so. Two values, 0 and any other, are
    those of a mask, and become 0 and 1.
    Raises: DataError as `load_volume`, or if other values are not 32-bit integers.
    """
    path = Path(path)
    layers = "layers, expected one: segments that overlap have to be exported as a label map first"
    data, affine, oriented = read_volume(path, several=layers)
    if np.can_cast(data.dtype, np.int32):
        return Volume(data, affine, oriented)
    limits = np.iinfo(np.int32)
    if np.isfinite(data).all() and limits.min <= data.min() and data.max() <= limits.max:
        array = np.rint(data).astype(np.int32)
        wrong = np.abs(data - array) > LABEL_TOLERANCE
        if not wrong.any():
            return Volume(array, affine, oriented)
        values, first = np.unique(data[data != 0]), np.unique(data[wrong])
        if len(values) == 1 and not data.all():
            return Volume((data != 0).astype(np.uint8), affine, oriented)
        some = ", ".join(f"{value:g}" for value in first[:5])
        raise DataError(
            f"{path}: expected integer labels, got {np.count_nonzero(wrong)} voxels of {len(first)} other values ({some}"
            f"{', …' if len(first) > 5 else ''}); probabilities have to be thresholded first"
        )
    raise DataError(
        f"{path}: expected 32-bit integer labels, got other values (stored as {data.dtype})"
    )


def load_png(path: str | os.PathLike[str], spacing: Sequence[float]) -> Volume:
    """Read a greyscale PNG, or a folder of them as a stack, as float32, [0, 1] over its type's range.

    A PNG has no patient coordinates: columns are assumed to run to the patient's left, rows to the
    back, and the stack, in the order of `png_files`, to the head; the first pixel of the first slice is the
    origin.

    spacing: mm between columns, rows and slices (for a single slice its thickness).
    Raises: DataError if a file cannot be read, is in colour, or differs in size from the first.
    """
    path, steps = Path(path), check_spacing(spacing)
    files = png_files(path)
    slices = [read_png(file, len(files)) for file in files]
    for file, grey in zip(files, slices, strict=True):
        if grey.shape != slices[0].shape:
            raise DataError(f"{file}: expected {slices[0].shape} pixels, got {grey.shape}")
    stack = np.stack([grey.T for grey in slices], axis=2)  # (columns, rows, slices)
    affine = np.diag([-steps[0], -steps[1], steps[2], 1.0])
    return Volume(*from_array(stack, affine, path))


def png_files(path: Path) -> list[Path]:
    """A PNG file, or those of a folder in the order of their numbers: `slice2.png` before `slice10.png`. A gap in the numbers is logged.

    Raises: DataError if there are none.
    """
    if not path.is_dir():
        return [path]
    files = [
        file for file in path.iterdir() if file.suffix.lower() == ".png" and file.name[0] != "."
    ]
    if not files:
        raise DataError(f"{path}: expected PNG files, got none")
    files.sort(key=lambda file: (_numbered(file.name), file.name))
    numbers = slice_numbers(files)
    steps = np.diff(numbers) if numbers else np.array([], dtype=np.int64)
    if len(set(steps.tolist())) > 1:
        gap = int(np.argmax(steps != np.bincount(steps[steps >= 0]).argmax()))
        log.warning(
            "%s: expected numbers at equal steps, got %s after %s; the slices are taken as neighbours",
            *(path, files[gap + 1].name, files[gap].name),
        )
    return files


def slice_numbers(files: Sequence[Path]) -> list[int] | None:
    """The last number in each name; None if a name has none, or two names the same."""
    found = [re.findall(r"\d+", file.stem) for file in files]
    numbers = [int(digits[-1]) for digits in found if digits]
    return numbers if len(set(numbers)) == len(files) else None


def _numbered(name: str) -> list[tuple[int, str]]:
    """A key that sorts numbers within names by value."""
    return [
        (int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)
    ]


def save_volume(
    path: str | os.PathLike[str], array: NDArray[np.generic], affine: ArrayLike
) -> None:
    """Write a volume atomically, and create its folder. Raises: DataError if it is not `.nii` or `.nii.gz`."""
    path = Path(path)
    if not path.name.endswith((".nii", ".nii.gz")):
        raise DataError(f"path: expected a .nii or .nii.gz file, got {path.name}")
    data = nib.Nifti1Image(array, np.asarray(affine, dtype=np.float64)).to_bytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, gzip.compress(data, 1, mtime=0) if path.suffix == ".gz" else data)
