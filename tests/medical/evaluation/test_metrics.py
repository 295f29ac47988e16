"""Metrics against shapes whose values are known, hand-counted arrays, MONAI, and empty masks."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from monai.metrics import (
    compute_average_surface_distance,
    compute_hausdorff_distance,
    compute_surface_dice,
)

from fastlora.errors import ConfigError, DataError
from fastlora.medical.evaluation.metrics import (
    METRIC_KEYS,
    METRICS,
    baseline,
    mean_defined,
    overlap,
    region_status,
    surface_metrics,
    tune_threshold,
)

SIZE = 32
INDEX = np.moveaxis(np.indices((SIZE,) * 3), 0, -1).astype(float)
EMPTY = np.full((SIZE,) * 3, 3.0)
FULL = -EMPTY
DIAGONAL = SIZE * math.sqrt(3)


def sphere(radius: float, centre: tuple[float, float, float] = (16, 16, 16)) -> np.ndarray:
    return np.linalg.norm(INDEX - centre, axis=-1) - radius


def box(low: tuple[int, int, int], high: tuple[int, int, int]) -> np.ndarray:
    """-1 inside low <= index < high, 1 outside."""
    return np.where(((low <= INDEX) & (high > INDEX)).all(-1), -1.0, 1.0)


def half_space(height: float) -> np.ndarray:
    """Filled below `height` on the first axis: it leaves the cube through five faces."""
    return INDEX[..., 0] - height


def test_identical_surfaces_are_perfect():
    values = surface_metrics(sphere(10), sphere(10), spacing=1.5)
    assert {key: values[key] for key in ("dice", "iou", "nsd")} == {"dice": 1, "iou": 1, "nsd": 1}
    for key in ("hd95_mm", "asd_mm", "chamfer_mm", "volume_error"):
        assert values[key] == pytest.approx(0.0, abs=1e-9)


def test_hand_counted_boxes():
    # 2x2x2 against 2x2x4 voxels, one end shared: 8 common, 8 and 16 filled.
    pred, true = box((4, 4, 4), (6, 6, 6)), box((4, 4, 4), (6, 6, 8))
    values = surface_metrics(pred, true, spacing=2.0)
    assert values["dice"] == pytest.approx(2 * 8 / 24)
    assert values["iou"] == pytest.approx(8 / 16)
    assert values["volume_error"] == pytest.approx(-0.5)
    # All voxels are boundary voxels: 16 lie on the other box, 4 are one voxel and 4 are two away.
    assert values["asd_mm"] == pytest.approx((4 * 2.0 + 4 * 4.0) / 24)
    assert values["hd95_mm"] == pytest.approx(4.0)


@pytest.mark.parametrize("spacing", [0.5, 1.0, 3.0])
def test_concentric_spheres_lie_their_radii_apart(spacing):
    values = surface_metrics(sphere(13), sphere(10), spacing, tolerance_mm=spacing)
    assert values["chamfer_mm"] == pytest.approx(3 * spacing, rel=0.01)
    assert values["asd_mm"] == pytest.approx(3 * spacing, rel=0.06)
    assert values["hd95_mm"] == pytest.approx(3 * spacing, abs=0.7 * spacing)
    assert values["volume_error"] == pytest.approx(1.3**3 - 1, rel=0.02)
    assert values["nsd"] == 0.0


@pytest.mark.parametrize("shift", [2.0, 4.0])
def test_shifted_spheres_follow_the_formula(shift):
    pred, true, radius = sphere(10, (16 + shift, 16, 16)), sphere(10), 10.0
    values = surface_metrics(pred, true, spacing=1.0, tolerance_mm=2.0)
    lens = math.pi * (4 * radius + shift) * (2 * radius - shift) ** 2 / 12
    assert values["dice"] == pytest.approx(lens / (4 / 3 * math.pi * radius**3), abs=0.01)
    # A point at angle t is |sqrt(r² + d² + 2rd cos t) - r| from the other sphere; cos t is uniform.
    cosines = np.linspace(-1, 1, 2001)
    distances = np.abs(np.sqrt(radius**2 + shift**2 + 2 * radius * shift * cosines) - radius)
    assert values["chamfer_mm"] == pytest.approx(distances.mean(), rel=0.03)
    assert values["asd_mm"] == pytest.approx(distances.mean(), rel=0.1)
    assert values["hd95_mm"] == pytest.approx(np.percentile(distances, 95), abs=0.5)
    # Distances between voxel corners are discrete, which affects a threshold.
    within = float((distances <= 2.0).mean())
    assert values["nsd"] == pytest.approx(within, abs=0.12)


def test_tolerance_is_in_millimetres():
    pred, true = sphere(10, (18, 16, 16)), sphere(10)
    fine, coarse = (surface_metrics(pred, true, s, tolerance_mm=1.5)["nsd"] for s in (0.5, 2.0))
    assert fine == 1.0
    assert coarse < 0.9


@pytest.mark.parametrize(
    ("pred", "true"),
    [
        (sphere(9, (15, 16, 18)), sphere(8)),
        (box((5, 5, 5), (20, 9, 12)), box((6, 4, 5), (18, 11, 14))),
        (np.minimum(sphere(4, (8, 8, 8)), sphere(5, (22, 20, 20))), sphere(7, (20, 20, 20))),
    ],
)
def test_away_from_the_cubes_faces_monai_agrees(pred, true):
    values = surface_metrics(pred, true, spacing=1.5, tolerance_mm=2.0)
    masks = [torch.from_numpy(f < 0)[None, None] for f in (pred, true)]
    grid = [1.5, 1.5, 1.5]
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # MONAI calls a deprecated function of its own
        hd95 = compute_hausdorff_distance(
            *masks, include_background=True, percentile=95, spacing=grid
        )
        asd = compute_average_surface_distance(
            *masks, include_background=True, symmetric=True, spacing=grid
        )
        nsd = compute_surface_dice(
            *masks, [2.0], include_background=True, spacing=grid, use_subvoxels=True
        )
    assert values["hd95_mm"] == pytest.approx(hd95.item(), rel=1e-6)
    assert values["asd_mm"] == pytest.approx(asd.item(), rel=1e-6)
    assert values["nsd"] == pytest.approx(nsd.item(), rel=1e-6)


def test_the_cubes_faces_are_not_a_surface():
    # Two cuts of one slab, 4 voxels apart; the five shared faces must not count as agreement.
    values = surface_metrics(half_space(15.5), half_space(11.5), spacing=1.0, tolerance_mm=2.0)
    assert values["nsd"] == 0.0
    for key in ("hd95_mm", "asd_mm", "chamfer_mm"):
        assert values[key] == pytest.approx(4.0, rel=1e-5)


def test_an_empty_prediction_gets_the_diagonal_as_distance():
    values = surface_metrics(EMPTY, sphere(8), spacing=1.5)
    assert values["dice"] == values["iou"] == values["nsd"] == 0.0
    assert values["volume_error"] == -1.0
    for key in ("hd95_mm", "asd_mm", "chamfer_mm"):
        assert values[key] == pytest.approx(1.5 * DIAGONAL)


def test_a_prediction_that_fills_the_cube_has_no_surface_either():
    values = surface_metrics(FULL, sphere(8), spacing=1.0)
    share = float((sphere(8) < 0).mean())
    assert values["dice"] == pytest.approx(2 * share / (1 + share))
    assert values["nsd"] == 0.0
    assert values["hd95_mm"] == pytest.approx(DIAGONAL)


@pytest.mark.parametrize("pred", [EMPTY, FULL, sphere(8)], ids=["empty", "full", "sphere"])
def test_an_empty_ground_truth_leaves_everything_undefined(pred):
    assert surface_metrics(pred, EMPTY, spacing=1.0) == dict.fromkeys(METRIC_KEYS)


def test_a_ground_truth_that_fills_the_cube_leaves_surfaces_undefined():
    values = surface_metrics(sphere(8), FULL, spacing=1.0)
    assert values["dice"] > 0
    assert values["volume_error"] < 0
    assert [values[key] for key in ("hd95_mm", "asd_mm", "nsd", "chamfer_mm")] == [None] * 4


@pytest.mark.parametrize(
    ("pred", "true", "status"),
    [
        (sphere(8), sphere(8), "ok"),
        (EMPTY, sphere(8), "empty_prediction"),
        (FULL, sphere(8), "full_prediction"),
        (sphere(8), EMPTY, "empty_truth"),
        (EMPTY, EMPTY, "empty_truth"),
        (sphere(8), FULL, "full_truth"),
    ],
)
def test_status_states_the_reason(pred, true, status):
    assert region_status(pred, true) == status


def test_zeros_count_as_outside_for_masks_and_surfaces():
    field = np.where(sphere(8) < 0, -1.0, 0.0)  # the zero level is a whole region, not a surface
    values = surface_metrics(field, sphere(8), spacing=1.0)
    assert values["dice"] == 1.0
    assert values["chamfer_mm"] < 1.0


def test_results_repeat_exactly():
    pred, true = sphere(9, (15, 16, 17)), sphere(8)
    assert surface_metrics(pred, true, 1.5) == surface_metrics(pred, true, 1.5)


@pytest.mark.parametrize(
    ("args", "error", "text"),
    [
        ((EMPTY[:-1], EMPTY, 1.0), DataError, "pred_sdf_vox: expected (32, 32, 32) .* got (31,"),
        ((EMPTY[0], EMPTY[0], 1.0), DataError, "true_sdf_vox: expected (X, Y, Z), got (32, 32)"),
        ((EMPTY * np.nan, EMPTY, 1.0), DataError, "pred_sdf_vox: expected finite .* got 32768"),
        ((EMPTY, EMPTY, 0.0), ConfigError, "spacing: expected a positive number of mm, got 0.0"),
        ((EMPTY, EMPTY, 1.0, -2.0), ConfigError, "tolerance_mm: expected a positive number"),
    ],
)
def test_invalid_input_is_refused_by_name(args, error, text):
    with pytest.raises(error, match=text.replace("(", r"\(").replace(")", r"\)")):
        surface_metrics(*args)


def test_overlap_of_disjoint_and_nested_masks():
    a, b = box((0, 0, 0), (4, 4, 4)) < 0, box((8, 8, 8), (12, 12, 12)) < 0
    assert overlap(a, b) == {"dice": 0.0, "iou": 0.0}
    assert overlap(a, a | b) == pytest.approx({"dice": 2 / 3, "iou": 0.5})


def test_means_count_what_they_leave_out():
    assert mean_defined([1.0, None, 3.0]) == {"mean": 2.0, "n": 2, "undefined": 1}
    assert mean_defined([None]) == {"mean": None, "n": 0, "undefined": 1}


def test_every_metric_is_described():
    assert tuple(surface_metrics(sphere(8), sphere(9), 1.0)) == METRIC_KEYS
    for metric in METRICS:
        assert metric.better in ("higher", "lower", "zero")
        assert metric.label and metric.definition and metric.source


def region(true: np.ndarray) -> dict[str, np.ndarray]:
    coarse = (true < 0).reshape(8, 4, 8, 4, 8, 4).mean((1, 3, 5))
    return {"coarse": coarse.astype(np.float32), "sdf_vox": true.astype(np.float32)}


def test_baseline_is_negative_inside_and_shrinks_with_the_threshold():
    coarse = region(sphere(11))["coarse"]
    volumes = [int((baseline(coarse, t) < 0).sum()) for t in (0.2, 0.5, 0.8)]
    assert volumes == sorted(volumes, reverse=True)
    assert baseline(coarse, 0.5)[16, 16, 16] < 0 < baseline(coarse, 0.5)[0, 0, 0]
    assert surface_metrics(baseline(coarse, 0.5), sphere(11), 1.0)["dice"] > 0.93


def test_threshold_tuning_finds_the_best_mean_dice():
    regions = [region(sphere(6)), region(sphere(9, (14, 17, 16))), region(EMPTY)]
    grid = (0.2, 0.3, 0.4, 0.5, 0.6)
    means = [
        np.mean(
            [
                surface_metrics(baseline(r["coarse"], t), r["sdf_vox"], 1.0)["dice"]
                for r in regions[:2]
            ]
        )
        for t in grid
    ]
    assert tune_threshold(regions, grid) == grid[int(np.argmax(means))]


def test_threshold_tuning_needs_a_structure():
    with pytest.raises(
        DataError, match="regions: expected a structure in at least one of 1, got none"
    ):
        tune_threshold([region(EMPTY)])
