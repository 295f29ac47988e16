"""Files of volumes: their voxels and affine, in RAS order."""

from __future__ import annotations

import math
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
from fastlora.medical.data.dicom import reading
from fastlora.medical.data.geometry import MAX_VOXELS, Array, FloatArray, check_affine

DEFLATE_RATIO = 1032  # the largest possible of a gzip file
UNREADABLE = (
    *(ImageFileError, OSError, EOFError, ValueError, TypeError, KeyError, zlib.error),
    *(OverflowError, MemoryError, SyntaxError, struct.error, Image.DecompressionBombError),
    *(WrapStructError, HeaderDataError, OrientationError),
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


def read_nifti(path: Path, component: int | str | None = None) -> Read:
    """A NIfTI file. component: see `Case`. Raises: DataError if it cannot be read."""
    if not path.is_file():
        raise DataError(f"{path}: expected a NIfTI file, got nothing at that path")
    with reading(path, "a readable NIfTI file", UNREADABLE):
        stored = nib.load(path)
        check_size(path, stored)
        return canonical(stored, path, component)


def canonical(image: Any, path: Path, component: int | str | None = None) -> Read:
    """The voxels and the affine of a nibabel image in RAS order. path: for errors."""
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
        several = f": {data.shape[3]} channels, choose one with --channel" if data.ndim == 4 else ""
        raise DataError(
            f"{path}: expected a volume (X, Y, Z) of numbers, got {data.shape} {data.dtype}{several}"
        )
    affine = image.affine.copy()
    affine[:3] *= factor
    return data, check_affine(affine, f"affine of {path}"), oriented


def check_size(path: Path, image: Any) -> None:
    """Check the size that the header declares, before anything is allocated.

    Raises: ValueError if it exceeds the limit of a volume, or what the file can contain.
    """
    if not isinstance(image, nib.Nifti1Pair):  # base class of NIfTI-2 and of single files too
        raise ValueError(f"the file holds a {type(image).__name__}")
    shape = tuple(int(n) for n in image.shape)
    voxels = math.prod(shape)
    if min(shape, default=0) < 0 or voxels > MAX_VOXELS:
        raise ValueError(f"expected at most {MAX_VOXELS:,} voxels, the header declares {shape}")
    offset = image.dataobj.offset
    declared = offset + voxels * image.get_data_dtype().itemsize
    stored = Path(image.file_map["image"].filename)  # of a pair .hdr and .img, the latter
    most = stored.stat().st_size * (DEFLATE_RATIO if stored.suffix.lower() == ".gz" else 1)
    if offset < 0 or declared > most:
        raise ValueError(
            f"the header declares {declared:,} bytes, and the file holds at most {most:,}"
        )
