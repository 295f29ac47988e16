"""Cases on disk and volumes in memory: finding, reading, checking and windowing.

Every volume is brought to the RAS orientation closest to its own axes; its affine follows. Two
layouts are read:

- TotalSegmentator: ``<root>/<subject>/{ct,mri}.nii.gz``,
  ``<root>/<subject>/segmentations/<structure>.nii.gz`` and optionally ``<root>/meta.csv``
  (``;``-separated, columns ``image_id`` and ``split``);
- the original project's: one folder a case with ``*-image.nii.gz`` and a label map
  ``*-label.nii.gz``, whose values become the structures ``label_1``, ``label_2``, ….
"""

from __future__ import annotations

import csv
import math
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.orientations import OrientationError
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError
from numpy.typing import ArrayLike, NDArray

from fastlora.errors import ConfigError, DataError
from fastlora.medical.geometry import FloatArray, check_affine, spacing_of

MAX_VOXELS = 2**29  # 512 × 512 × 2048; as float32 it takes 2 GiB
DEFLATE_RATIO = 1032  # no gzip file expands by more
_UNREADABLE = (
    *(ImageFileError, OSError, EOFError, ValueError, TypeError, KeyError, zlib.error),
    *(OverflowError, MemoryError, struct.error),
    *(WrapStructError, HeaderDataError, OrientationError),
)

Modality = Literal["ct", "mr"]
IMAGE_NAMES: dict[str, Modality] = {"ct.nii.gz": "ct", "mri.nii.gz": "mr"}

# Hounsfield windows by tissue; a structure that no word below names gets the soft-tissue window.
CT_WINDOWS = {"soft": (-160.0, 240.0), "bone": (-500.0, 1300.0), "lung": (-1350.0, 150.0)}
CT_TISSUES = {
    "bone": (
        "vertebra",
        "rib",
        "bone",
        "skull",
        "sternum",
        "sacrum",
        "hip",
        "femur",
        "humerus",
        "scapula",
        "clavicula",
    ),
    "lung": ("lung", "trachea"),
}
MR_PERCENTILES = (0.5, 99.5)


@dataclass(frozen=True)
class Volume:
    """array (X, Y, Z) in RAS order, float32 (image) or int32 (label map); affine (4, 4) index to mm;
    spacing (3,) mm.
    """

    array: NDArray[Any]
    affine: FloatArray
    spacing: FloatArray = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "spacing", spacing_of(self.affine))

    @property
    def shape(self) -> tuple[int, int, int]:
        x, y, z = self.array.shape
        return x, y, z


@dataclass(frozen=True)
class Source:
    """A structure's mask: the voxels of ``path`` equal to ``label``, or not zero if it is None."""

    path: Path
    label: int | None = None


@dataclass(frozen=True)
class Case:
    """One image of one subject with its structures' masks, as paths: nothing is read yet."""

    subject: str
    modality: Modality
    image_path: Path
    structures: dict[str, Source]
    split: str | None = None

    def load_image(self) -> Volume:
        """The image, float32. Raises: DataError as `load_volume`."""
        return load_volume(self.image_path)

    def load_mask(self, structure: str, image: Volume) -> NDArray[np.bool_]:
        """The structure's mask on the image's grid, (X, Y, Z) bool.

        Raises: DataError if the case has no such structure, if the label map's shape or affine
        differ from the image's, or if the mask is empty.
        """
        if structure not in self.structures:
            raise DataError(
                f"{self.subject}: expected a structure among "
                f"{', '.join(sorted(self.structures))}, got {structure!r}"
            )
        source = self.structures[structure]
        labels = load_labels(source.path)
        if labels.shape != image.shape:
            raise DataError(
                f"{source.path}: expected the shape of {self.image_path.name}, {image.shape}, "
                f"got {labels.shape}"
            )
        if not same_grid(labels.affine, image.affine, image.shape):
            raise DataError(
                f"{source.path}: expected the affine of {self.image_path.name}, "
                f"{image.affine.round(4).tolist()}, got {labels.affine.round(4).tolist()}"
            )
        mask: NDArray[np.bool_] = (
            labels.array != 0 if source.label is None else labels.array == source.label
        )
        if not mask.any():
            of_label = "" if source.label is None else f" of label {source.label}"
            raise DataError(
                f"{source.path}: expected at least one voxel{of_label}, got an empty mask"
            )
        return mask


def same_grid(
    a: ArrayLike, b: ArrayLike, shape: Sequence[int], tolerance_vox: float = 0.01
) -> bool:
    """Whether two affines put every voxel of a volume at the same place, but for a tolerance."""
    corners = np.stack(np.meshgrid(*((0, n - 1) for n in shape), indexing="ij"), -1).reshape(-1, 3)
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    apart = np.linalg.norm(corners @ difference[:3, :3].T + difference[:3, 3], axis=1).max()
    return bool(apart <= tolerance_vox * spacing_of(b).min())


def load_volume(path: str | os.PathLike[str]) -> Volume:
    """Read a 3-D image as float32 in RAS order.

    Raises: DataError, naming the file, if it cannot be read, is not 3-D, holds NaN or infinity, or
    has an affine that is singular or sheared.
    """
    path = Path(path)
    data, affine = _read(path)
    with np.errstate(over="ignore"):
        array = data.astype(np.float32)
    bad = np.count_nonzero(~np.isfinite(array))
    if bad:
        raise DataError(
            f"{path}: expected finite values, got NaN or infinity in {bad} of {array.size} voxels"
        )
    return Volume(array, affine)


def load_labels(path: str | os.PathLike[str]) -> Volume:
    """Read a 3-D label map as int32 in RAS order.

    Raises: DataError as `load_volume`, and if a value is not a whole number.
    """
    path = Path(path)
    data, affine = _read(path)
    limits = np.iinfo(np.int32)
    fits = np.isfinite(data).all() and limits.min <= data.min() and data.max() <= limits.max
    array = data.astype(np.int32) if fits else None
    if array is None or (array != data).any():
        raise DataError(
            f"{path}: expected a label map of whole numbers, got others (stored as {data.dtype})"
        )
    return Volume(array, affine)


def _read(path: Path) -> tuple[NDArray[np.generic], FloatArray]:
    if not path.is_file():
        raise DataError(f"{path}: expected a NIfTI file, got nothing at that path")
    try:
        with np.errstate(all="ignore"):  # what overflows is looked for in the result
            stored = nib.load(path)
            _check_size(path, stored)
            image = nib.as_closest_canonical(stored)
            data = np.asanyarray(image.dataobj)
    except _UNREADABLE as error:
        raise DataError(
            f"{path}: expected a readable NIfTI file, got {type(error).__name__}: {error}"
        ) from error
    if data.ndim == 4 and data.shape[3] == 1:
        data = data[..., 0]
    if data.ndim != 3 or data.size == 0 or data.dtype.kind not in "iuf":
        raise DataError(
            f"{path}: expected a volume (X, Y, Z) of numbers, got {data.shape} {data.dtype}"
        )
    return data, check_affine(image.affine, f"affine of {path}")


def _check_size(path: Path, image: Any) -> None:
    """Raises: ValueError if the header declares more than a volume may hold, or than the file can, before it is read."""
    if not isinstance(image, nib.Nifti1Pair):  # of which NIfTI-2 and single files are kinds
        raise ValueError(f"the file holds a {type(image).__name__}")
    shape = tuple(int(n) for n in image.shape)
    voxels = math.prod(shape)
    if min(shape, default=0) < 0 or voxels > MAX_VOXELS:
        raise ValueError(f"expected at most {MAX_VOXELS:,} voxels, the header declares {shape}")
    offset = image.dataobj.offset
    declared = offset + voxels * image.get_data_dtype().itemsize
    most = path.stat().st_size * (DEFLATE_RATIO if path.suffix.lower() == ".gz" else 1)
    if offset < 0 or declared > most:
        raise ValueError(
            f"the header declares {declared:,} bytes, and the file holds at most {most:,}"
        )


def save_volume(
    path: str | os.PathLike[str], array: NDArray[np.generic], affine: ArrayLike
) -> None:
    """Write a volume as NIfTI, whole or not at all: under another name first, then renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        nib.save(nib.Nifti1Image(array, np.asarray(affine, dtype=np.float64)), partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def window(image: NDArray[np.floating], modality: str, structure: str = "") -> NDArray[np.float32]:
    """Intensities cut to a window and scaled to [0, 1], float32.

    image: whole volume (MR takes its 0.5 and 99.5 percentiles as the window). modality: "ct"
    (Hounsfield units; the window is the tissue's: bone, lung or soft, by the structure's name) or
    "mr".
    Raises: ConfigError on another modality, DataError on an MR image without contrast.
    """
    if modality == "ct":
        tissue = next(
            (t for t, words in CT_TISSUES.items() if any(w in structure for w in words)), "soft"
        )
        low, high = CT_WINDOWS[tissue]
    elif modality == "mr":
        low, high = (float(p) for p in np.percentile(image, MR_PERCENTILES))
        if not high > low:
            raise DataError(
                f"image: expected an MR image with contrast, got {low:g} at both percentiles"
            )
    else:
        raise ConfigError(f"modality: expected 'ct' or 'mr', got {modality!r}")
    scaled = (np.asarray(image, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    clipped: NDArray[np.float32] = np.clip(scaled, 0.0, 1.0)
    return clipped


def find_cases(
    root: str | os.PathLike[str], modality: Modality = "ct", problems: list[str] | None = None
) -> list[Case]:
    """All cases below a folder, by subject's name, in either layout (see the module).

    modality: of the original project's `*-image.nii.gz`, whose name does not tell it. problems: if
    given, a case that cannot be used is left out and described there instead of raising.
    Raises: DataError if the folder is missing or holds no case, or if a case lacks image or masks.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: expected a folder of cases, got nothing at that path")
    splits = _read_splits(root / "meta.csv")
    cases = []
    for folder in sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")):
        try:
            case = _read_case(folder, modality, splits.get(folder.name))
        except DataError as error:
            if problems is None:
                raise
            problems.append(str(error))
        else:
            cases += [case] if case else []
    if not cases:
        raise DataError(
            f"{root}: expected folders <subject> of ct.nii.gz or mri.nii.gz and segmentations/"
            "<structure>.nii.gz, or of *-image.nii.gz and *-label.nii.gz, got none"
            + "".join(f"; {problem}" for problem in problems or ())
        )
    return cases


def _read_case(folder: Path, modality: Modality, split: str | None) -> Case | None:
    """The case in a folder, None if it holds nothing of either layout."""
    if (folder / "segmentations").is_dir() or any(
        (folder / name).is_file() for name in IMAGE_NAMES
    ):
        return _totalsegmentator_case(folder, split)
    if any(folder.glob("*-image.nii.gz")) or any(folder.glob("*-label.nii.gz")):
        return _original_case(folder, modality, split)
    return None


def _totalsegmentator_case(folder: Path, split: str | None) -> Case:
    images = [name for name in IMAGE_NAMES if (folder / name).is_file()]
    if len(images) != 1:
        raise DataError(
            f"{folder}: expected one of {', '.join(IMAGE_NAMES)}, got {', '.join(images) or 'none'}"
        )
    masks = sorted((folder / "segmentations").glob("*.nii.gz"))
    structures = {
        p.name.removesuffix(".nii.gz"): Source(p) for p in masks if not p.name.startswith(".")
    }
    if not structures:
        raise DataError(f"{folder}: expected masks in segmentations/<structure>.nii.gz, got none")
    return Case(folder.name, IMAGE_NAMES[images[0]], folder / images[0], structures, split)


def _original_case(folder: Path, modality: Modality, split: str | None) -> Case:
    images, labels = sorted(folder.glob("*-image.nii.gz")), sorted(folder.glob("*-label.nii.gz"))
    if len(images) != 1 or len(labels) != 1:
        raise DataError(
            f"{folder}: expected one *-image.nii.gz and one *-label.nii.gz, "
            f"got {len(images)} and {len(labels)}"
        )
    values = np.unique(load_labels(labels[0]).array)
    structures = {f"label_{value}": Source(labels[0], int(value)) for value in values if value != 0}
    if not structures:
        raise DataError(f"{labels[0]}: expected at least one label, got an empty label map")
    return Case(folder.name, modality, images[0], structures, split)


def _read_splits(path: Path) -> dict[str, str]:
    """subject → split from TotalSegmentator's meta.csv; empty without the file or the column."""
    if not path.is_file():
        return {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream, delimiter=";", restkey="more"))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: expected a table in UTF-8, got {error}") from error
    if rows and "image_id" not in rows[0]:
        raise DataError(
            f"{path}: expected a column image_id (separator ';'), got {', '.join(rows[0])}"
        )
    return {row["image_id"]: row["split"] for row in rows if row.get("split")}
