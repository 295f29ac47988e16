"""Intensity windows: what values of an image become 0 and 1."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fastlora.errors import ConfigError, DataError
from fastlora.medical.scans.geometry import Array

Modality = Literal["ct", "mr", "grey"]
Limits = tuple[float, float]
"""The values that a window maps to 0 and 1."""

# Hounsfield windows by tissue; words in a structure's name select the tissue, by default soft.
CT_WINDOWS = {"soft": (-160.0, 240.0), "bone": (-500.0, 1300.0), "lung": (-1350.0, 150.0)}
CT_WORDS = {
    "bone": "vertebra rib bone skull sternum sacrum hip femur humerus scapula clavicula clavicle mandible",
    "lung": "lung trachea airway bronchus",
}
MR_PERCENTILES = (0.5, 99.5)
MR_FILLED = 0.1
"""If fewer voxels differ from the median, the image is mostly an empty margin, and the percentiles are those of the rest."""
MR_NOISE = 1e-3
"""Share of an image's range by which the margin may vary, as after an interpolation."""
CT_PADDING = -1500.0
"""CT values below this are padding outside the scanner's circle, not tissue."""
CT_LEAST_RANGE = 50.0
"""Range in HU that any CT exceeds by its noise alone: about 10 HU of standard deviation."""
CT_AIR, CT_LEAST_AIR = -200.0, 0.01
"""Below this there is only air and lung; a smaller share counts as none."""
CT_SHIFTED, CT_LEAST_TISSUE = (874.0, 1174.0), 0.1
"""Fat, water and soft tissue (-150 to 150 HU) with 1024 added, and the least share of voxels that are tissue."""


def window_limits(image: NDArray[np.floating], modality: str, structure: str = "") -> Limits:
    """The values that a window maps to 0 and 1.

    image: the complete volume, since the window of MR is its 0.5 and 99.5 percentiles (without
    an empty margin that is larger than nine tenths of it). modality:
    "ct" (Hounsfield units; the window is that of the structure's `tissue_of`), "mr", or "grey" (in
    [0, 1] already).
    Raises: ConfigError if the modality is unknown; DataError if an MR image has no contrast.
    """
    if modality == "ct":
        return CT_WINDOWS[tissue_of(structure)]
    if modality == "grey":
        return 0.0, 1.0
    if modality != "mr":
        raise ConfigError(f"modality: expected 'ct', 'mr' or 'grey', got {modality!r}")
    at = (0.01, MR_PERCENTILES[0], 50.0, MR_PERCENTILES[1], 99.99)
    bottom, low, margin, high, top = (float(p) for p in np.percentile(image, at))
    filled = image[np.abs(image - np.float32(margin)) > MR_NOISE * (top - bottom)]
    if 0 < filled.size < MR_FILLED * image.size:
        inside = np.percentile(filled, MR_PERCENTILES)
        low, high = min(margin, float(inside[0])), float(inside[1])
    if not high > low:
        raise DataError(
            f"image: expected an MR image with contrast, got {low:g} at both percentiles"
        )
    return low, high


def windowed(image: NDArray[np.floating], limits: Limits) -> Array:
    """Intensities of any part of an image, clipped to the limits and scaled to [0, 1], float32."""
    low, high = limits
    scaled = (np.asarray(image, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    clipped: Array = np.clip(scaled, 0.0, 1.0)
    return clipped


def tissue_of(structure: str) -> str:
    """The tissue whose CT window suits a structure: bone, lung or soft, by the words in its name.

    Only whole words match (`rib_left_3`, `ribs`, `vertebrae_L1`): `hip` is not in `hippocampus`.
    """
    words = {word for part in structure.lower().split("_") for word in (part, part[:-1])}
    return next((t for t, known in CT_WORDS.items() if words & set(known.split())), "soft")


def check_hounsfield(image: NDArray[np.floating], name: str) -> None:
    """Refuses a CT whose values cannot be Hounsfield units.

    In Hounsfield units there are values below 0 (air, fat, or noise around water); they are integers or span more than CT_LEAST_RANGE; and
    most of what is not air is not within CT_SHIFTED, where fat, water and soft tissue are if 1024 was added. name: of the image.
    Raises: DataError.
    """
    tissue = np.count_nonzero(image > CT_PADDING)
    if not tissue:
        return
    low = float(np.min(image, where=image > CT_PADDING, initial=np.inf))
    high = float(image.max())
    if low >= 0 or _is_shifted(image):
        why = "if the file lacks the intercept, give it, such as --intercept -1024;"
    elif high - low <= CT_LEAST_RANGE and (image != np.rint(image)).any():
        why = "the image seems to be normalised: give the original;"
    else:
        return
    raise DataError(
        f"{name}: expected Hounsfield units in a CT, got values from {low:g} to {high:g}: {why} if these are Hounsfield units all the same, "
        "--intercept 0; if it is an MR image, --modality mr"
    )


def _is_shifted(image: NDArray[np.floating]) -> bool:
    """Whether there is no air below CT_AIR, and most voxels above CT_AIR + 1024 are within CT_SHIFTED."""
    tissue = np.count_nonzero(image > CT_AIR + 1024)
    if np.count_nonzero((image < CT_AIR) & (image > CT_PADDING)) >= CT_LEAST_AIR * image.size:
        return False
    low, high = CT_SHIFTED
    soft = np.count_nonzero((image > low) & (image < high))
    return bool(2 * soft > tissue > CT_LEAST_TISSUE * image.size)
