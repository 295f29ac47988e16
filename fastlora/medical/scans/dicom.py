"""DICOM: the series and segmentations of a folder, and their voxels, read with pydicom and highdicom.

The two packages are the extra `dicom` and imported on first use. Affines are converted from
DICOM's LPS to RAS.
"""

from __future__ import annotations

import itertools
import logging
import re
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
from fastlora.medical.scans.geometry import MAX_VOXELS, Array, FloatArray, Mask

log = logging.getLogger(__name__)

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
DEFLATED = "1.2.840.10008.1.2.1.99"
HEADER = ("SeriesInstanceUID", "Modality", "SeriesDescription")

# Scanners and converters round orientation and position of each slice; both are far below a voxel.
ORIENTATION_TOLERANCE = 1e-4
"""Largest difference of a direction cosine between slices of one series."""
POSITION_TOLERANCE_MM = 0.1
"""Largest difference in mm of a slice's position from that of a regular series, in an image and in a SEG alike."""


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
        kind, text = type(error).__name__, " ".join(str(error).split())
        missing = re.search(r"missing dependencies:.*?(pylibjpeg|gdcm)", text)
        advice = " (pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg)" if missing else ""
        raise DataError(f"{path}: expected {expected}, got {kind}: {text}{advice}") from error


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
    """Whether a file has DICOM's magic bytes after a preamble of 128 bytes, or begins with an element of its first group."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(132)
    return head[128:] == b"DICM" or _lacks_preamble(head)


def _lacks_preamble(head: bytes) -> bool:
    """Whether a file begins, without a preamble, with a plausible element of group 0002 or 0008, in little endian."""
    group, element, length = head[:2], head[2:4], head[4:8]
    if group not in (b"\x02\x00", b"\x08\x00") or len(head) < 132:
        return False
    explicit = length[:2].isalpha() and length[:2].isupper()
    implicit = int.from_bytes(length, "little") <= 64
    return int.from_bytes(element, "little") <= 0x70 and (explicit or implicit)


def holds_dicom(folder: Path) -> bool:
    """Whether a DICOM file lies anywhere below a folder."""
    return any(is_dicom(path) for path in folder.rglob("*"))


def list_series(folder: Path) -> list[Series]:
    """Every series below a folder (or in one file), sorted by UID; only headers are read.

    Raises: DataError if a file cannot be read or the packages are missing.
    """
    _packages(folder)
    found: dict[str, Series] = {}
    others = []
    for path in [folder] if folder.is_file() else sorted(folder.rglob("*")):
        if not is_dicom(path):
            similar = path.suffix.lower() in ("", ".dcm", ".ima") and path.name[0] != "."
            if similar and path.is_file():
                others.append(path.name)
            continue
        with reading(path, "a readable DICOM file", unusable()):
            header = _header(path, specific_tags=list(HEADER))
            uid, modality, description = (str(header.get(name, "")) for name in HEADER)
        if uid:  # a DICOMDIR has no series
            found.setdefault(uid, Series(uid, modality, description)).files.append(path)
    if others and found:
        log.warning(
            "%s: %d files are not DICOM and are ignored, such as %s", folder, len(others), others[0]
        )
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
            header = _header(path)
            if "Rows" not in header or series[0].modality == "RTDOSE":
                raise DataError(f"{path}: expected an image, got {kind}")
            _check_size(header, len(files))
        datasets = [_read(path) for path in files]
        # Without the presentation, which inverts MONOCHROME1: modality values, such as Hounsfield units.
        options = {
            "dtype": np.float32,
            "apply_presentation_lut": False,
            "atol": POSITION_TOLERANCE_MM,
        }
        if len(files) == 1:
            volume = highdicom.Image.from_dataset(datasets[0], copy=False).get_volume(**options)
        else:
            volume = highdicom.get_volume_from_series(
                datasets, orientation_tol=ORIENTATION_TOLERANCE, **options
            )
    if volume.array.ndim != 3:
        raise DataError(f"{folder}: expected grey values, got an array {volume.array.shape}")
    # In MR only the contrast has a meaning, and in MONOCHROME1 the lowest value is the brightest.
    inverted = datasets[0].PhotometricInterpretation == "MONOCHROME1" and series[0].modality != "CT"
    return -volume.array if inverted else volume.array, LPS_TO_RAS @ volume.affine


def read_segmentation(path: Path) -> Segmentation:
    """The segments of a DICOM SEG. Raises: DataError if it cannot be read."""
    _packages(path)
    with reading(path, "a readable DICOM file", unusable()):
        header = _header(path)
        if header.Modality != "SEG":
            contours = ", whose contours have to be exported as a SEG or a label map first"
            raise DataError(
                f"{path}: expected a DICOM SEG, got {header.Modality}{contours if header.Modality == 'RTSTRUCT' else ''}"
            )
        segments = {int(s.SegmentNumber): str(s.SegmentLabel) for s in header.SegmentSequence}
        references = header.get("ReferencedSeriesSequence", [])
        refers_to = frozenset(str(item.SeriesInstanceUID) for item in references)
    return Segmentation(path, segments, refers_to)


def read_segment(
    path: Path, number: int, affine: FloatArray, shape: Sequence[int], tolerance_mm: float
) -> Mask:
    """One segment of a DICOM SEG on an image's grid, (X, Y, Z) bool; False where it has no voxels.

    affine: (4, 4) index to RAS mm, of the image. tolerance_mm: largest distance between a voxel of the segment and the image's
    voxel. A fractional segmentation is thresholded at ½.
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
        dataset = _read(path)
        volume = highdicom.seg.Segmentation.from_dataset(dataset, copy=False).get_volume(
            segment_numbers=[number],
            skip_overlap_checks=True,
            dtype=np.float32,
            atol=POSITION_TOLERANCE_MM,
        )
        inside = volume.array[..., 0] >= 0.5
        # From an index of the segment to one of the image.
        to_index = np.linalg.inv(affine) @ LPS_TO_RAS @ volume.affine
        nearest = np.rint(to_index)
        corners = np.array(
            list(itertools.product(*((0, n - 1) for n in inside.shape))), dtype=float
        )
        off = corners @ (to_index - nearest)[:3, :3].T + (to_index - nearest)[:3, 3]
        apart = float(np.linalg.norm(off @ affine[:3, :3].T, axis=1).max())
        turn = np.abs(nearest[:3, :3])
        if not (turn.sum(0) == 1).all() or not (turn.sum(1) == 1).all() or apart > tolerance_mm:
            raise ValueError(f"its voxels lie up to {apart:.3g} mm from those of the image")
    whole = nearest.astype(np.int64)
    filled = np.argwhere(inside) @ whole[:3, :3].T + whole[:3, 3]
    within = ((filled >= 0) & (filled < shape)).all(axis=1)
    if lost := int(np.count_nonzero(~within)):
        raise DataError(
            f"{path}: expected segment {number} within the image, got {lost} voxels outside it"
        )
    placed: Mask = np.zeros(shape, dtype=bool)
    placed[tuple(filled.T)] = True
    return placed


def _read(path: Path) -> Any:
    """A file with its pixels."""
    pydicom, _ = _packages(path)
    dataset = pydicom.dcmread(path, force=True)
    if "TransferSyntaxUID" not in dataset.file_meta:  # a file without preamble has no meta group
        explicit = not dataset.original_encoding[0]
        syntaxes = pydicom.uid.ImplicitVRLittleEndian, pydicom.uid.ExplicitVRLittleEndian
        dataset.file_meta.TransferSyntaxUID = syntaxes[explicit]
    return dataset


def _header(path: Path, **options: Any) -> Any:
    """The header. Raises: ValueError if it is compressed too, which hides the size of the file."""
    pydicom, _ = _packages(path)
    with path.open("rb") as file:
        head = file.read(4096)
    if head[128:132] == b"DICM":
        meta = pydicom.filereader.read_file_meta_info(path)
        deflated = str(meta.get("TransferSyntaxUID", "")) == DEFLATED
    else:
        deflated = DEFLATED.encode() in head
    if deflated:
        raise ValueError(
            "expected a transfer syntax other than Deflated Explicit VR, which hides its size"
        )
    return pydicom.dcmread(path, stop_before_pixels=True, force=True, **options)


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
