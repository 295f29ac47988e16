"""Geometry of shapes with known formulas."""

from __future__ import annotations

import numpy as np
import pytest
import trimesh
from nibabel.affines import apply_affine, voxel_sizes
from scipy import ndimage
from scipy.spatial.transform import Rotation

from fastlora.errors import ConfigError, DataError
from fastlora.medical.scans.geometry import (
    check_affine,
    mesh_from_sdf,
    pointmap,
    regrid,
    resample,
    sdf_from_mask,
    voxelise,
)
from tests.support.tolerance import assert_same_geometry, assert_same_place

SPACINGS = [(1.0, 1.0, 1.0), (1.5, 1.5, 1.5), (1.0, 1.0, 3.0), (2.0, 1.0, 0.5)]
RADIUS = 10.0


def oblique(spacing=(1.0, 1.0, 1.0), mirrored=False):
    affine = np.eye(4)
    turn = Rotation.from_euler("xyz", (12, -25, 40), degrees=True).as_matrix()
    affine[:3, :3] = turn @ np.diag([-1.0 if mirrored else 1.0, 1, 1]) * spacing
    affine[:3, 3] = (-31.5, 12.25, 80.0)
    return affine


def sphere(spacing):
    """Exact signed distances of a ball on a grid, and the index of its centre."""
    shape = tuple(int(np.ceil(28 / s)) for s in spacing)
    centre = (np.array(shape) - 1) / 2 + (0.13, 0.27, 0.05)
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    return np.linalg.norm((grid - centre) * spacing, axis=-1) - RADIUS, centre


@pytest.mark.parametrize("spacing", SPACINGS)
def test_sdf_has_the_half_voxel_correction(spacing):
    true, _ = sphere(spacing)
    sdf = sdf_from_mask(true < 0, spacing)
    assert sdf.dtype == np.float32
    np.testing.assert_array_equal(sdf < 0, true < 0)
    assert np.abs(sdf).min() == pytest.approx(min(spacing) / 2, rel=1e-5)
    near = np.abs(true) < 4
    error = (sdf - true)[near]
    inside, outside = error[true[near] < 0], error[true[near] > 0]
    # Without the correction both sides are about half a step too far from the surface.
    assert abs(inside.mean()) < 0.15 * np.mean(spacing)
    assert abs(outside.mean()) < 0.15 * np.mean(spacing)
    raw = ndimage.distance_transform_edt(true >= 0, sampling=spacing)
    raw -= ndimage.distance_transform_edt(true < 0, sampling=spacing)
    assert np.abs(error).mean() < 0.75 * np.abs(raw - true)[near].mean()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_sdf_of_a_half_space_is_exact_along_each_axis(axis):
    spacing = np.array((0.7, 1.9, 3.1))
    mask = np.zeros((9, 10, 11), dtype=bool)
    np.moveaxis(mask, axis, 0)[:4] = True
    expected = (np.arange(mask.shape[axis]) - 3.5) * spacing[axis]
    got = np.moveaxis(sdf_from_mask(mask, spacing), axis, 0)[:, 0, 0]
    assert_same_geometry(got, expected)


def test_sdf_refuses_what_has_no_surface():
    ones = np.ones((4, 4, 4), dtype=bool)
    with pytest.raises(DataError, match="mask: expected a surface, got an empty mask"):
        sdf_from_mask(~ones, (1, 1, 1))
    with pytest.raises(DataError, match="fills the whole array"):
        sdf_from_mask(ones, (1, 1, 1))
    with pytest.raises(DataError, match=r"mask: expected \(X, Y, Z\) bool, got \(4, 4, 4\) int64"):
        sdf_from_mask(ones.astype(np.int64), (1, 1, 1))
    with pytest.raises(DataError, match="spacing: expected three positive lengths"):
        sdf_from_mask(ones, (1, 0, 1))


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("mirrored", [False, True])
def test_mesh_of_a_ball_under_any_affine(spacing, mirrored):
    true, centre = sphere(spacing)
    affine = oblique(spacing, mirrored)
    assert (np.linalg.det(affine) < 0) == mirrored
    mesh = mesh_from_sdf(true, affine)
    assert mesh.is_watertight and mesh.is_winding_consistent
    # Positive only if faces wind outwards; the chords of marching cubes lose a little.
    assert mesh.volume == pytest.approx(4 / 3 * np.pi * RADIUS**3, rel=0.03)
    radii = np.linalg.norm(mesh.vertices - apply_affine(affine, centre), axis=1)
    assert np.abs(radii - RADIUS).max() < 0.06 * max(spacing) ** 2


def test_mesh_from_a_mask_keeps_the_volume():
    true, _ = sphere((1.0, 1.0, 1.0))
    mesh = mesh_from_sdf(sdf_from_mask(true < 0, (1, 1, 1)), np.eye(4))
    assert mesh.volume == pytest.approx((true < 0).sum(), rel=0.01)


def test_mesh_is_closed_at_the_border_half_a_voxel_outside():
    mesh = mesh_from_sdf(np.full((6, 7, 8), -3.0), np.diag([1.0, 1.0, 2.0, 1.0]))
    assert mesh.is_watertight
    np.testing.assert_allclose(mesh.bounds, [[-0.5, -0.5, -1.0], [5.5, 6.5, 15.0]])
    assert mesh.volume == pytest.approx(6 * 7 * 16, rel=0.03)


def test_mesh_level_and_values_on_the_level():
    ramp = np.abs(np.arange(-5.0, 6))[:, None, None] * np.ones((1, 6, 6))
    mesh = mesh_from_sdf(ramp, np.eye(4), level=2.0)  # voxels of exactly 2 on both faces
    assert mesh.is_watertight
    assert mesh.bounds[:, 0].tolist() == pytest.approx([3, 7], abs=1e-3)


def test_mesh_refuses_empty_shapes_and_nan():
    with pytest.raises(DataError, match="got no value below it"):
        mesh_from_sdf(np.ones((4, 4, 4)), np.eye(4))
    with pytest.raises(DataError, match="sdf: expected finite values, got 1 that are not"):
        mesh_from_sdf(np.where(np.arange(8).reshape(2, 2, 2) == 3, np.nan, -1), np.eye(4))
    with pytest.raises(DataError, match=r"sdf: expected \(X, Y, Z\), got \(3, 3\)"):
        mesh_from_sdf(-np.ones((3, 3)), np.eye(4))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_pointmap_is_the_affine_for_every_axis(axis):
    affine, shape, index = oblique((0.8, 1.2, 3.0), mirrored=True), (5, 6, 7), 3
    points = pointmap(affine, shape, axis, index)
    plane = [n for a, n in enumerate(shape) if a != axis]
    assert points.shape == (*plane, 3) and points.dtype == np.float32
    for h, w in ((0, 0), (2, 4), (plane[0] - 1, plane[1] - 1)):
        ijk = np.insert([h, w], axis, index)
        assert_same_geometry(points[h, w], (affine @ [*ijk, 1])[:3])


def test_pointmap_refuses_invalid_slices():
    with pytest.raises(ConfigError, match="axis: expected 0, 1 or 2, got 3"):
        pointmap(np.eye(4), (4, 4, 4), 3, 0)
    with pytest.raises(ConfigError, match="index: expected 0 to 4 on axis 1, got 5"):
        pointmap(np.eye(4), (4, 5, 6), 1, 5)


def test_regrid_shares_the_corner_and_covers_the_box():
    affine, shape = oblique((0.8, 1.2, 3.0)), (11, 12, 5)
    target, target_shape = regrid(affine, shape, 1.5)
    np.testing.assert_allclose(voxel_sizes(target), 1.5)
    np.testing.assert_allclose(apply_affine(target, [-0.5] * 3), apply_affine(affine, [-0.5] * 3))
    assert target_shape == (6, 10, 10)
    same, same_shape = regrid(np.diag([1.5, 1.5, 1.5, 1]), (8, 9, 10), 1.5)
    assert same_shape == (8, 9, 10) and np.array_equal(same, np.diag([1.5, 1.5, 1.5, 1]))
    with pytest.raises(ConfigError, match="spacing: expected a positive length"):
        regrid(affine, shape, 0.0)


def test_resample_reads_the_same_place():
    affine = oblique((1.0, 1.3, 2.0))
    grid = np.stack(np.meshgrid(*map(np.arange, (14, 13, 9)), indexing="ij"), -1)
    slope = np.array((0.3, -0.7, 1.1))
    volume = apply_affine(affine, grid) @ slope  # linear in mm: linear interpolation is exact
    target = oblique((1.1, 1.1, 1.1), mirrored=True)
    target[:3, 3] = apply_affine(affine, [8, 5, 4])
    got = resample(volume, affine, target, (4, 4, 4))
    points = apply_affine(target, np.stack(np.meshgrid(*[np.arange(4)] * 3, indexing="ij"), -1))
    inside = np.stack([apply_affine(np.linalg.inv(affine), points)], 0)[0]
    inside = ((inside >= 0) & (inside <= np.array((13, 12, 8)))).all(-1)
    assert inside.sum() > 30
    assert_same_place(got[inside], (points @ slope)[inside])


def test_resample_beyond_the_volume():
    volume = np.arange(8.0).reshape(2, 2, 2)
    shifted = np.eye(4)
    shifted[0, 3] = 10
    assert (resample(volume, np.eye(4), shifted, (2, 2, 2), cval=-5) == -5).all()
    np.testing.assert_array_equal(
        resample(volume, np.eye(4), shifted, (1, 2, 2))[0], volume[1]
    )  # None repeats the border


def test_voxelise_is_the_inverse_of_meshing():
    true, _ = sphere((1.0, 1.0, 3.0))
    affine = oblique((1.0, 1.0, 3.0), mirrored=True)
    np.testing.assert_array_equal(
        voxelise(mesh_from_sdf(true, affine), affine, true.shape), true < 0
    )


def test_voxelise_large_triangles_that_leave_the_grid():
    box = trimesh.creation.box(extents=(4, 6, 40))
    box.apply_translation((5, 5, 0))
    got = voxelise(box, np.eye(4), (10, 7, 5))
    expected = np.zeros((10, 7, 5), dtype=bool)
    expected[4:7, 3:7] = (
        True  # |i − 5| < 2 and |j − 5| < 3; faces on whole indices may go either way
    )
    np.testing.assert_array_equal(got[4:7, 3:7], expected[4:7, 3:7])
    assert not got[[0, 1, 2, 8, 9]].any() and not got[:, [0, 1]].any()


@pytest.mark.parametrize(
    ("affine", "message"),
    [
        (np.eye(3), r"expected a \(4, 4\) matrix, got \(3, 3\)"),
        (np.full((4, 4), np.nan), "finite"),
        (np.diag([1.0, 0.0, 1.0, 1.0]), "positive spacing"),
        (np.array([[1, 0.2, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]), "right angles"),
    ],
)
def test_affines_that_cannot_work_are_refused(affine, message):
    with pytest.raises(DataError, match=f"volume: .*{message}"):
        check_affine(affine, "volume")
