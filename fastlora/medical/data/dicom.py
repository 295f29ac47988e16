"""DICOM: the series and segmentations of a folder, and their voxels, read with pydicom and highdicom.

The two packages are the extra `dicom` and imported on first use. Affines are converted from
DICOM's LPS to RAS.
"""

from __future__ import annotations

import sqlite3
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from fastlora.errors import DataError
from fastlora.medical.data.geometry import MAX_VOXELS, Array, FloatArray, Mask

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
HEADER = ("SeriesInstanceUID", "Modality", "SeriesDescription")


def unusable() -> tuple[type[Exception], ...]:
    """What the two packages raise for files that are damaged, of another kind, or not a regular volume."""
    from pydicom import errors

    return (
        *(OSError, EOFError, ValueError, TypeError, KeyError, AttributeError, RuntimeError),
        *(MemoryError, OverflowError, IndexError, struct.error, zlib.error, sqlite3.Error),
        # These derive from Exception only.
        *(errors.BytesLengthException, errors.InvalidDicomError),
    )


@contextmanager
def reading(path: Path, expected: str, unusable: tuple[type[Exception], ...]) -> Iterator[None]:
    """Turn what a reader raises for unusable files into a DataError."""
    try:
        with np.errstate(all="ignore"):  # callers check for values that overflow
            yield
    except DataError:
        raise
    except unusable as error:
        kind = type(error).__name__
        raise DataError(f"{path}: expected {expected}, got {kind}: {error}") from error


@dataclass(frozen=True)
class Series:
    """The files of one series. modality: of DICOM, such as CT, MR or SEG."""

    uid: str
    modality: str
    description: str
    files: list[Path] = field(default_factory=list)


@dataclass(frozen=True)
class Segmentation:
    """A DICOM SEG. segments: number → label. refers_to: UIDs of the series that it segments."""

    path: Path
    segments: dict[int, str]
    refers_to: frozenset[str]


def is_dicom(path: Path) -> bool:
    """Whether a file has DICOM's magic bytes (after a preamble of 128 bytes)."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def holds_dicom(folder: Path) -> bool:
    """Whether a DICOM file lies anywhere below a folder."""
    return any(is_dicom(path) for path in folder.rglob("*"))


def list_series(folder: Path) -> list[Series]:
    """Every series below a folder (or in one file), sorted by UID; only headers are read.

    Raises: DataError if a file cannot be read or the packages are missing.
    """
    _packages(folder)
    found: dict[str, Series] = {}
    for path in filter(is_dicom, [folder] if folder.is_file() else sorted(folder.rglob("*"))):
        with reading(path, "a readable DICOM file", unusable()):
            header = _header(path, specific_tags=list(HEADER))
            uid, modality, description = (str(header.get(name, "")) for name in HEADER)
        if uid:  # a DICOMDIR has no series
            found.setdefault(uid, Series(uid, modality, description)).files.append(path)
    return [found[uid] for uid in sorted(found)]


def read_series(folder: Path, uid: str | None = None) -> tuple[Array, FloatArray]:
    """The voxels of one series (X, Y, Z), float32 (CT in Hounsfield units), and their affine, RAS mm.

    uid: of the series; None for the only one in the folder that is not a segmentation.
    Raises: DataError if there is not exactly one such series, or it is not a regular volume.
    """
    series = [s for s in list_series(folder) if s.modality != "SEG" and uid in (None, s.uid)]
    if len(series) != 1:
        names = "; ".join(f"{s.modality} {s.description!r}, {len(s.files)} files" for s in series)
        wanted = "one image series" if uid is None else f"the series {uid}"
        raise DataError(f"{folder}: expected {wanted}, got {names or 'none'}")
    pydicom, highdicom = _packages(folder)
    files = series[0].files
    kind = f"{series[0].modality} {series[0].description!r}"
    expected = f"a series of parallel slices at equal distances in {len(files)} files of {kind}"
    with reading(folder, expected, unusable()):
        for path in files:
            _check_size(_header(path), len(files))
        if len(files) == 1:
            volume = highdicom.imread(files[0]).get_volume(dtype=np.float32)
        else:
            datasets = [pydicom.dcmread(path) for path in files]
            volume = highdicom.get_volume_from_series(datasets, dtype=np.float32)
    if volume.array.ndim != 3:
        raise DataError(f"{folder}: expected grey values, got an array {volume.array.shape}")
    return volume.array, LPS_TO_RAS @ volume.affine


def read_segmentation(path: Path) -> Segmentation:
    """The segments of a DICOM SEG. Raises: DataError if it cannot be read."""
    _packages(path)
    with reading(path, "a readable DICOM file", unusable()):
        header = _header(path)
        if header.Modality != "SEG":
            raise DataError(f"{path}: expected a DICOM SEG, got {header.Modality}")
        segments = {int(s.SegmentNumber): str(s.SegmentLabel) for s in header.SegmentSequence}
        references = header.get("ReferencedSeriesSequence", [])
        refers_to = frozenset(str(item.SeriesInstanceUID) for item in references)
    return Segmentation(path, segments, refers_to)


def read_segment(path: Path, number: int, affine: FloatArray, shape: Sequence[int]) -> Mask:
    """One segment of a DICOM SEG on an image's grid, (X, Y, Z) bool; False where it has no voxels.

    affine: (4, 4) index to RAS mm, of the image. A fractional segmentation is thresholded at ½.
    Raises: DataError if there is no such segment, if its voxels do not coincide with the image's,
    or if part of it lies outside the image.
    """
    _, highdicom = _packages(path)
    segments = read_segmentation(path).segments
    if number not in segments:
        raise DataError(f"{path}: expected a segment among {segments}, got {number}")
    expected = f"segment {number} on the voxels of the image, {tuple(shape)}"
    with reading(path, expected, unusable()):
        _check_size(_header(path), 1)
        # Segments may overlap: only one is read.
        volume = highdicom.seg.segread(path).get_volume(
            segment_numbers=[number], skip_overlap_checks=True, dtype=np.float32
        )
        volume = volume.with_array(volume.array[..., 0])
        like = highdicom.VolumeGeometry(LPS_TO_RAS @ affine, list(shape), "PATIENT")
        placed: Mask = volume.match_geometry(like, tol=1e-3).array >= 0.5
    lost = int((volume.array >= 0.5).sum()) - int(placed.sum())
    if lost:
        raise DataError(
            f"{path}: expected segment {number} within the image, got {lost} voxels outside it"
        )
    return placed


def _header(path: Path, **options: Any) -> Any:
    """The header. Raises: ValueError if it is compressed too, which hides the size of the file."""
    pydicom, _ = _packages(path)
    meta = pydicom.filereader.read_file_meta_info(path)
    if str(meta.get("TransferSyntaxUID", "")) == "1.2.840.10008.1.2.1.99":
        raise ValueError(
            "expected a transfer syntax other than Deflated Explicit VR, which hides its size"
        )
    return pydicom.dcmread(path, stop_before_pixels=True, **options)


def _check_size(header: Any, files: int) -> None:
    """Check the declared size, gaps between frames included. Raises: ValueError above the limit."""
    rows, columns = int(header.Rows), int(header.Columns)
    frames = int(header.get("NumberOfFrames", 1) or 1)
    shared = header.get("SharedFunctionalGroupsSequence")
    spacing = 0.0
    if shared and shared[0].get("PixelMeasuresSequence"):
        measures = shared[0].PixelMeasuresSequence[0]
        between = measures.get("SpacingBetweenSlices", measures.get("SliceThickness", 0))
        spacing = float(between or 0)
    positions = [
        [float(x) for x in group.PlanePositionSequence[0].ImagePositionPatient]
        for group in header.get("PerFrameFunctionalGroupsSequence", [])
        if group.get("PlanePositionSequence")
    ]
    planes = float(frames * files)
    if positions and spacing > 0:
        reach = np.ptp(np.asarray(positions), axis=0)
        planes = max(planes, float(np.linalg.norm(reach)) / spacing + 1)
    if not rows * columns * planes <= MAX_VOXELS:
        raise ValueError(
            f"expected at most {MAX_VOXELS:,} voxels, the header declares {rows}×{columns} in {planes:,.0f} planes"
        )


def _packages(path: Path) -> tuple[ModuleType, Any]:
    try:
        import highdicom
        import pydicom
    except ImportError as error:
        raise DataError(
            f"{path}: DICOM is read by pydicom and highdicom, expected both, got: {error} "
            "(pip install highdicom pydicom)"
        ) from error
    return pydicom, highdicom
