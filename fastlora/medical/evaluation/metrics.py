"""Metrics of a predicted surface against the ground truth: overlap, distances in mm, volume.

Every metric compares two signed distance fields on the same cube, negative inside, whether of a
model or of the trivial baseline. The sign of a field gives the mask (Dice, IoU, volume, and the
voxel surfaces of HD95, ASD and NSD), its zero level the smooth surface that Chamfer samples.

Three conventions that libraries do not define:

- A block of a large structure (a piece of white matter) ends at the faces of its cube. These cuts
  are not anatomy and would always match, so they are never part of a surface.
- A prediction without a surface has an NSD of 0, and every distance is the cube's diagonal, the
  largest possible one: excluding it would improve the mean.
- A region whose ground truth is empty has no metrics. Each is None and is counted, never averaged.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import trimesh
from numpy.typing import ArrayLike
from scipy.spatial import KDTree

from fastlora.errors import ConfigError, DataError
from fastlora.medical.data.regions import RegionDataset, upsample_coarse
from fastlora.medical.scans.geometry import Array, FloatArray, Mask, zero_level

CHAMFER_POINTS = 4000
CHAMFER_SEED = 0
TOLERANCE_MM = 2.0
THRESHOLDS: tuple[float, ...] = tuple(round(0.1 + 0.02 * i, 2) for i in range(41))


@dataclass(frozen=True)
class Metric:
    """The meaning of a metric.

    better: 'higher', 'lower', or 'zero' for a signed error. digits: decimals shown; smaller
    differences are ignored. source: the package that computes it, with its settings.
    """

    key: str
    label: str
    unit: str
    better: str
    digits: int
    definition: str
    source: str

    def merit(self, value: float) -> float:
        """A number that is larger for a better value, and equal for values that are shown as the same number."""
        shown = round(value, self.digits)
        return {"higher": shown, "lower": -shown, "zero": -abs(shown)}[self.better]


_MASK_SOURCE = "NumPy; a voxel belongs to the structure where the signed distance is below 0"
_EDGE_SOURCE = "MONAI get_mask_edges and get_surface_distance on the boundary voxels' centres"
_SHARE = "fraction of the true volume"

# fmt: off
METRICS: tuple[Metric, ...] = (
    Metric("dice", "Dice", "", "higher", 3,
           "Overlap of the two volumes, 2·|A∩B| / (|A|+|B|); 1 is perfect.", _MASK_SOURCE),
    Metric("iou", "IoU", "", "higher", 3,
           "Overlap of the two volumes, |A∩B| / |A∪B|; 1 is perfect.", _MASK_SOURCE),
    Metric("hd95_mm", "HD95", "mm", "lower", 2,
           "95 % of each surface lies within this distance of the other (the worse direction).",
           f"{_EDGE_SOURCE}, each counted once, linear interpolation "
           "(the definition of MONAI compute_hausdorff_distance, percentile=95)"),
    Metric("asd_mm", "ASD", "mm", "lower", 2,
           "Average distance between the two surfaces, both directions pooled.",
           f"{_EDGE_SOURCE} "
           "(the definition of MONAI compute_average_surface_distance, symmetric=True)"),
    Metric("nsd", "NSD", "", "higher", 3,
           "Normalised surface distance (surface Dice): the fraction of both surfaces that lies within "
           "the tolerance of the other surface; 1 is perfect.",
           "MONAI get_mask_edges and get_surface_distance on sub-voxel surface elements weighted by "
           "area (the definition of MONAI compute_surface_dice, use_subvoxels=True, which is "
           "DeepMind's)"),
    Metric("chamfer_mm", "Chamfer", "mm", "lower", 2,
           "Average distance from points on one smooth surface to the other surface, mean of the two "
           "directions.",
           f"scikit-image marching_cubes; trimesh sample_surface, {CHAMFER_POINTS} points a surface, "
           f"seed {CHAMFER_SEED}; SciPy KDTree to the nearest triangle"),
    Metric("volume_error", "Volume error, signed", _SHARE, "zero", 3,
           "(predicted - true volume) / true volume: +0.10 is 10 % too large, -0.10 too small.",
           _MASK_SOURCE),
    Metric("volume_error_abs", "Volume error, size", _SHARE, "lower", 3,
           "The same without its sign, so that too large and too small do not cancel in a mean.",
           _MASK_SOURCE),
)
# fmt: on
METRIC_KEYS: tuple[str, ...] = tuple(metric.key for metric in METRICS)
METRIC_OF: dict[str, Metric] = {metric.key: metric for metric in METRICS}


def surface_metrics(
    pred_sdf_vox: ArrayLike,
    true_sdf_vox: ArrayLike,
    spacing: float,
    tolerance_mm: float = TOLERANCE_MM,
) -> dict[str, float | None]:
    """All metrics of one region, as defined in `METRICS`.

    pred_sdf_vox, true_sdf_vox: (X, Y, Z), signed distances or any level set, negative inside.
    spacing: mm, the edge of a voxel of the isotropic grid. tolerance_mm: mm, the largest distance
    at which surfaces still match in NSD.

    Returns: a value for each of `METRIC_KEYS`, None where it is undefined for the ground truth: all of
    them if that is empty, those of surfaces if it fills the cube.
    Raises: DataError if the shapes differ or are not 3-D, or a value is not finite; ConfigError if
    spacing or tolerance_mm is not positive.
    """
    pred, true = _check_pair(pred_sdf_vox, true_sdf_vox)
    for name, value in (("spacing", spacing), ("tolerance_mm", tolerance_mm)):
        if not (np.isfinite(value) and value > 0):
            raise ConfigError(f"{name}: expected a positive number of mm, got {value!r}")

    pred_mask, true_mask = pred < 0, true < 0
    values: dict[str, float | None] = dict.fromkeys(METRIC_KEYS)
    if not true_mask.any():
        return values
    values.update(overlap(pred_mask, true_mask))
    error = float(pred_mask.sum() / true_mask.sum()) - 1.0
    values.update(volume_error=error, volume_error_abs=abs(error))
    if true_mask.all():
        return values
    if not pred_mask.any() or pred_mask.all():
        diagonal = float(spacing * np.linalg.norm(true.shape))
        values.update(nsd=0.0, hd95_mm=diagonal, asd_mm=diagonal, chamfer_mm=diagonal)
        return values
    values.update(_voxel_surface_metrics(pred_mask, true_mask, spacing, tolerance_mm))
    values["chamfer_mm"] = _chamfer(pred, true, spacing)
    return values


def region_status(pred_sdf_vox: ArrayLike, true_sdf_vox: ArrayLike) -> str:
    """'ok', 'empty_truth', 'full_truth', 'empty_prediction' or 'full_prediction'.

    A mask that fills the cube has no surface in it.
    """
    pred, true = _check_pair(pred_sdf_vox, true_sdf_vox)
    for name, mask in (("truth", true < 0), ("prediction", pred < 0)):
        if not mask.any():
            return f"empty_{name}"
        if mask.all():
            return f"full_{name}"
    return "ok"


def overlap(pred_mask: Mask, true_mask: Mask) -> dict[str, float]:
    """Dice and IoU of two masks of one shape, which must not both be empty."""
    both = float(np.count_nonzero(pred_mask & true_mask))
    total = float(np.count_nonzero(pred_mask) + np.count_nonzero(true_mask))
    return {"dice": 2 * both / total, "iou": both / (total - both)}


def mean_defined(values: Iterable[float | None]) -> dict[str, float | int | None]:
    """{'mean', 'n', 'undefined'}: the mean of the n defined values, None if there are none."""
    values = list(values)
    defined = [value for value in values if value is not None]
    mean = float(np.mean(defined)) if defined else None
    return {"mean": mean, "n": len(defined), "undefined": len(values) - len(defined)}


def baseline(coarse: ArrayLike, threshold: float) -> Array:
    """The trivial prediction: the upsampled coarse segmentation, thresholded at an occupancy.

    coarse: (8, 8, 8) filled fraction of each cell. Returns: a level set (32, 32, 32), negative
    inside, of occupancies, not distances.
    """
    return np.float32(threshold) - upsample_coarse(np.asarray(coarse, dtype=np.float32))


def tune_threshold(regions: RegionDataset, thresholds: Sequence[float] = THRESHOLDS) -> float:
    """The `baseline` threshold with the best mean Dice over `regions`.

    regions: of training, never the held-out ones. Raises: DataError if all are empty.
    """
    scores = []
    for index in range(len(regions)):
        sample = regions[index]
        true_mask = np.asarray(sample["sdf_vox"]) < 0
        if true_mask.any():
            fine = upsample_coarse(np.asarray(sample["coarse"], dtype=np.float32))
            scores.append([overlap(fine > cut, true_mask)["dice"] for cut in thresholds])
    if not scores:
        raise DataError(
            f"regions: expected a structure in at least one of {len(regions)}, got none"
        )
    return float(thresholds[int(np.argmax(np.mean(scores, axis=0)))])


def _check_pair(pred: ArrayLike, true: ArrayLike) -> tuple[FloatArray, FloatArray]:
    pred, true = np.asarray(pred, dtype=np.float64), np.asarray(true, dtype=np.float64)
    if true.ndim != 3:
        raise DataError(f"true_sdf_vox: expected (X, Y, Z), got {true.shape}")
    if pred.shape != true.shape:
        raise DataError(f"pred_sdf_vox: expected {true.shape} as true_sdf_vox, got {pred.shape}")
    for name, field in (("pred_sdf_vox", pred), ("true_sdf_vox", true)):
        if bad := np.count_nonzero(~np.isfinite(field)):
            raise DataError(f"{name}: expected finite values, got {bad} that are not")
    return pred, true


def _voxel_surface_metrics(
    pred_mask: Mask, true_mask: Mask, spacing: float, tolerance_mm: float
) -> dict[str, float]:
    """HD95, ASD and NSD of two masks that both have a surface inside the cube."""
    # Imported here because MONAI takes seconds to import and overlaps do not need it.
    from monai.metrics.utils import get_mask_edges, get_surface_distance

    # Masks extended beyond the cube have no edge at its faces.
    pred, true = (torch.from_numpy(np.pad(m, 1, mode="edge")) for m in (pred_mask, true_mask))
    grid = (spacing,) * 3
    inner = (slice(1, -1),) * 3

    def both_ways(one: torch.Tensor, other: torch.Tensor) -> list[torch.Tensor]:
        return [get_surface_distance(a, b, spacing=grid) for a, b in ((one, other), (other, one))]

    there, back = both_ways(*(e[inner] for e in get_mask_edges(pred, true, crop=False)))
    hd95 = max(float(torch.quantile(d, 0.95)) for d in (there, back))
    asd = float(torch.cat([there, back]).mean())

    elements = get_mask_edges(pred, true, crop=False, spacing=grid)
    edges_pred, edges_true, area_pred, area_true = elements
    area_pred, area_true = area_pred[edges_pred], area_true[edges_true]
    there, back = both_ways(edges_pred, edges_true)
    matched = area_pred[there <= tolerance_mm].sum() + area_true[back <= tolerance_mm].sum()
    nsd = float(matched / (area_pred.sum() + area_true.sum()))
    return {"hd95_mm": hd95, "asd_mm": asd, "nsd": nsd}


def _chamfer(pred: FloatArray, true: FloatArray, spacing: float) -> float:
    surfaces = [zero_level(field, spacing) for field in (pred, true)]
    samples = [
        trimesh.sample.sample_surface(s, CHAMFER_POINTS, seed=CHAMFER_SEED) for s in surfaces
    ]
    distances = []
    for one, other in ((0, 1), (1, 0)):
        points, (near_points, near_faces) = samples[one][0], samples[other][:2]
        # The nearest sample only identifies the triangle: the distance to the sample itself would
        # be too large by the spacing of the samples, about 0.4 mm here.
        face = near_faces[KDTree(near_points).query(points)[1]]
        closest = trimesh.triangles.closest_point(surfaces[other].triangles[face], points)
        distances.append(np.linalg.norm(points - closest, axis=1).mean())
    return float(np.mean(distances))
