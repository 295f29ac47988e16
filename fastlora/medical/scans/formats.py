"""Files of volumes: their voxels and affine, in RAS order."""

from __future__ import annotations

import math
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.orientations import OrientationError
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError
from numpy.typing import NDArray
from PIL import Image

from fastlora.errors import DataError
from fastlora.medical.scans.dicom import LPS_TO_RAS, reading
from fastlora.medical.scans.geometry import MAX_VOXELS, Array, FloatArray, check_affine

ENDINGS = (".nii.gz", ".nii", ".hdr", ".mgz", ".mgh", ".mha", ".mhd", ".nrrd", ".nhdr")
"""The extensions of volumes. A `.hdr` has its voxels in an `.img`, a `.mhd` and a `.nhdr` in the file that they name."""

KINDS = {
    **dict.fromkeys((".mgz", ".mgh"), "MGH"),
    **dict.fromkeys((".mha", ".mhd"), "MetaImage"),
    **dict.fromkeys((".nrrd", ".nhdr"), "NRRD"),
}
ITK_READERS = {"MetaImage": "MetaImageIO", "NRRD": "NrrdImageIO"}
DATA_FILE = {
    # MetaIO accepts both separators, and a field anywhere in a line.
    "MetaImageIO": re.compile(r"ElementDataFile\s*[=:]\s*([^\r\n]*)", re.IGNORECASE),
    "NrrdImageIO": re.compile(r"^\s*data ?file\s*:\s*([^\r\n]*)", re.IGNORECASE | re.MULTILINE),
}
"""The field of a header that names the file of the voxels, by ITK's reader."""
HEADER_END = {
    "MetaImageIO": re.compile(r"^ElementDataFile\s*[=:]\s*LOCAL", re.MULTILINE),
    "NrrdImageIO": re.compile(r"\n\r?\n"),
}
HEADER_BYTES = 2**20

DEFLATE_RATIO = 1032  # the largest possible of a gzip file
UNREADABLE = (
    *(ImageFileError, OSError, EOFError, ValueError, TypeError, KeyError, zlib.error),
    *(OverflowError, MemoryError, SyntaxError, struct.error, Image.DecompressionBombError),
    *(WrapStructError, HeaderDataError, OrientationError, RuntimeError),  # the last: of ITK
)


Read = tuple[NDArray[Any], FloatArray, bool]
"""Voxels (X, Y, Z), affine (4, 4) to mm, and whether the file states it."""

UNIT_MM = {"meter": 1000.0, "micron": 0.001}
"""Length in mm of the units that a NIfTI header may state; any other is mm."""


def from_array(array: NDArray[Any], affine: FloatArray, path: Path) -> Read:
    """Voxels and affine of another format, reoriented to RAS. path: for errors."""
    with reading(path, "a usable affine", UNREADABLE):
        return canonical(nib.Nifti1Image(array, affine), path)


def read_png(path: Path, slices: int) -> Array:
    """(rows, columns) in [0, 1]. slices: the number of files in the stack, for the size limit."""
    # Unrestricted, Pillow opens any format, some of them through external programs.
    opened = reading(path, "a readable PNG", UNREADABLE)
    with opened, Image.open(path, formats=("PNG",)) as picture:
        if math.prod(picture.size) * slices > MAX_VOXELS:
            raise ValueError(
                f"{slices} of {picture.size} pixels; expected at most {MAX_VOXELS:,} in total"
            )
        pixels = np.asarray(picture.convert("RGB") if picture.mode == "P" else picture)
    if pixels.ndim == 3:
        colours = pixels[..., :3] if pixels.shape[2] in (3, 4) else pixels[..., :1]
        if (colours != colours[..., :1]).any():
            raise DataError(f"{path}: expected a greyscale image, got a colour image")
        pixels = colours[..., 0]
    most = 1 if pixels.dtype == np.bool_ else 255 if pixels.dtype == np.uint8 else 65535
    return pixels.astype(np.float32) / np.float32(most)


def ending(path: Path) -> str:
    """The extension of a volume's file as it is written, one of ENDINGS; empty for another file."""
    lower = path.name.lower()
    length = next((len(known) for known in ENDINGS if lower.endswith(known)), 0)
    return path.name[len(path.name) - length :]


CHANNELS = "channels, choose one with --channel"


def read_volume(path: Path, component: int | str | None = None, several: str = CHANNELS) -> Read:
    """A file with one of ENDINGS. component: see `Case`. several: what the error says of a fourth axis. Raises: DataError if it cannot be read."""
    if not path.is_file():
        raise DataError(f"{path}: expected a file, got nothing at that path")
    suffix = ending(path).lower()
    kind = KINDS.get(suffix, "NIfTI")
    itk = ITK_READERS.get(kind)
    with reading(path, f"a readable {kind} file", UNREADABLE):
        if itk:
            stored = _read_itk(path, itk)
        else:
            stored = nib.load(path)
            check_size(path, stored)
        return canonical(stored, path, component, several)


def _read_itk(path: Path, reader: str) -> nib.Nifti1Image:
    """A MetaImage or NRRD file, whose coordinates are LPS, as a NIfTI image. reader: ITK's class that reads the format."""
    itk = _simpleitk(path)
    _check_data_file(path, reader)
    source = itk.ImageFileReader()
    source.SetImageIO(reader)
    source.SetFileName(str(path))
    source.ReadImageInformation()
    size, channels = source.GetSize(), source.GetNumberOfComponents()
    if len(size) < 3:
        raise ValueError(f"expected three dimensions, the header declares {size}")
    if math.prod(size) * channels > MAX_VOXELS:
        raise ValueError(f"expected at most {MAX_VOXELS:,} voxels, the header declares {size}")
    image = source.Execute()
    array = itk.GetArrayFromImage(image).T  # (X, Y, Z), with channels first
    array = np.moveaxis(array, 0, -1) if channels > 1 else array
    dimensions = image.GetDimension()
    affine = np.eye(4)
    direction = np.reshape(image.GetDirection(), (dimensions, dimensions))[:3, :3]
    affine[:3, :3] = direction * image.GetSpacing()[:3]
    affine[:3, 3] = image.GetOrigin()[:3]
    return nib.Nifti1Image(array, LPS_TO_RAS @ affine, dtype=array.dtype)


def _check_data_file(path: Path, reader: str) -> None:
    """Check that the voxels are in the file itself, or in one of the same folder. Raises: ValueError."""
    with path.open("rb") as file:
        start = file.read(HEADER_BYTES).decode("latin-1")
    names = [name.strip() for name in DATA_FILE[reader].findall(start)]
    if len(start) == HEADER_BYTES and not HEADER_END[reader].search(start):
        raise ValueError(f"expected a header of at most {HEADER_BYTES:,} bytes")
    for name in names:
        if Path(name).name != name or name.upper().startswith("LIST"):  # whose paths follow
            raise ValueError(
                f"expected voxels in one file of the same folder, the header names {name[:200]}"
            )


def _header(path: Path) -> bytes:
    """The lines of a text header, up to the first empty one."""
    with path.open("rb") as file:
        return file.read(HEADER_BYTES).replace(b"\r\n", b"\n").split(b"\n\n")[0]


def label_names(path: Path) -> dict[int, str]:
    """Value → name of the segments that 3D Slicer writes into the header of a NRRD file; empty for any other file."""
    if ending(path).lower() != ".nrrd":
        return {}
    header = _header(path).decode(errors="replace")
    fields = dict(re.findall(r"^Segment(\d+_(?:Name|LabelValue)):=(.*)$", header, re.MULTILINE))
    numbers = {name.partition("_")[0] for name in fields}
    known = ((fields.get(f"{n}_LabelValue", ""), fields.get(f"{n}_Name")) for n in numbers)
    return {int(value): name.strip() for value, name in known if name and value.strip().isdecimal()}


def _simpleitk(path: Path) -> Any:
    try:
        import SimpleITK
    except ImportError as error:
        raise DataError(
            f"{path}: MetaImage and NRRD are read by SimpleITK, expected it, got: {error} (pip install SimpleITK)"
        ) from error
    quiet: Any = SimpleITK.ProcessObject.SetGlobalWarningDisplay
    quiet(False)  # its warnings go to stderr
    return SimpleITK


def canonical(
    image: Any, path: Path, component: int | str | None = None, several: str = CHANNELS
) -> Read:
    """The voxels and the affine of a nibabel image in RAS order. path, several: for errors."""
    if component is not None and len(image.shape) == 4:
        if not (isinstance(component, int) and 0 <= component < image.shape[3]):
            raise DataError(f"{path}: expected a channel below {image.shape[3]}, got {component}")
        image = image.slicer[..., component]
    header = image.header
    oriented, factor = True, 1.0
    if isinstance(image, nib.Nifti1Pair):  # base class of NIfTI-2 and of single files too
        oriented = bool(header["qform_code"] or header["sform_code"])
        factor = UNIT_MM.get(header.get_xyzt_units()[0], 1.0)
    image = nib.as_closest_canonical(image)
    data = np.asanyarray(image.dataobj)
    if data.ndim == 4 and data.shape[3] == 1:
        data = data[..., 0]
    if data.ndim != 3 or data.size == 0 or data.dtype.kind not in "iuf":
        fourth = f": {data.shape[3]} {several}" if data.ndim == 4 else ""
        raise DataError(
            f"{path}: expected a volume (X, Y, Z) of numbers, got {data.shape} {data.dtype}{fourth}"
        )
    affine = image.affine.copy()
    affine[:3] *= factor
    return data, check_affine(affine, f"affine of {path}"), oriented


def check_size(path: Path, image: Any) -> None:
    """Check the size that the header declares, before anything is allocated.

    Raises: ValueError if it exceeds the limit of a volume, or what the file can contain.
    """
    if not isinstance(
        image, (nib.Nifti1Pair, nib.MGHImage)
    ):  # the former: also NIfTI-2 and single files
        raise ValueError(f"the file holds a {type(image).__name__}")
    shape = tuple(int(n) for n in image.shape)
    voxels = math.prod(shape)
    if min(shape, default=0) < 0 or voxels > MAX_VOXELS:
        raise ValueError(f"expected at most {MAX_VOXELS:,} voxels, the header declares {shape}")
    offset = image.dataobj.offset
    declared = offset + voxels * image.get_data_dtype().itemsize
    stored = Path(image.file_map["image"].filename)  # of a pair .hdr and .img, the latter
    most = stored.stat().st_size * (
        DEFLATE_RATIO if stored.suffix.lower() in (".gz", ".mgz") else 1
    )
    if offset < 0 or declared > most:
        raise ValueError(
            f"the header declares {declared:,} bytes, and the file holds at most {most:,}"
        )
