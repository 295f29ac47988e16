"""The phantom: the pretraining stream and the synthetic data set."""

from __future__ import annotations

import time

import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import voxel_sizes

from fastlora.errors import ConfigError, DataError
from fastlora.medical.data import phantom
from fastlora.medical.data.phantom import SHAPES, make_phantom, smooth_noise, write_phantom_dataset
from fastlora.medical.scans.geometry import mesh_from_sdf, sdf_from_mask
from tests.support.tolerance import assert_same_means

MASK_MEANS = (0.3216, 0.107, 0.1099, 0.1251, 0.0931, 0.2775)  # of the first six samples of seed 0
IMAGE_MEANS = (0.4673, 0.4423, 0.4794, 0.2276, 0.5134, 0.4062)


@pytest.fixture(scope="module")
def stream():
    rng = np.random.default_rng(3)
    return [make_phantom(rng, 32) for _ in range(150)]


def test_samples_are_images_with_an_object(stream):
    for image, mask in stream:
        assert image.shape == mask.shape == (32, 32, 32)
        assert image.dtype == np.float32 and mask.dtype == np.bool_
        assert image.min() >= 0 and image.max() <= 1 and np.isfinite(image).all()
        assert 0.03 <= mask.mean() <= 0.7
    mesh = mesh_from_sdf(sdf_from_mask(stream[0][1], (1, 1, 1)), np.eye(4))
    assert mesh.is_watertight


def test_the_stream_is_as_varied_as_its_task(stream):
    contrast = np.array([image[mask].mean() - image[~mask].mean() for image, mask in stream])
    assert 0.25 < (contrast > 0).mean() < 0.75  # bright on dark, and dark on bright
    assert np.percentile(np.abs(contrast), 10) < 0.12 < 0.3 < np.percentile(np.abs(contrast), 90)
    noise = [np.abs(np.diff(image[~mask])).mean() for image, mask in stream]
    assert np.percentile(noise, 10) < 0.03 < 0.07 < np.percentile(noise, 90)
    # From compact solids to folded sheets: surface voxels per voxel.
    faces = [sum(np.diff(m, axis=a).sum() for a in range(3)) / m.sum() for _, m in stream]
    assert np.percentile(faces, 10) < 0.5 and np.percentile(faces, 90) > 1.0


def test_an_edge_shows_where_the_mask_ends(stream):
    """The image shows the surface: it changes more across it than within either side."""
    seen = 0
    for image, mask in stream:
        across = np.abs(np.diff(image, axis=0))
        edge = np.diff(mask, axis=0)
        seen += across[edge].mean() > across[~edge].mean()
    assert seen > 0.85 * len(stream)


def test_the_stream_is_a_function_of_its_generator(stream):
    rng = np.random.default_rng(3)
    for image, mask in stream[:5]:
        again, again_mask = make_phantom(rng, 32)
        np.testing.assert_array_equal(again, image)
        np.testing.assert_array_equal(again_mask, mask)


def test_the_stream_stays_what_the_shipped_weights_were_trained_on():
    rng = np.random.default_rng(0)
    samples = [make_phantom(rng, 32) for _ in range(6)]
    masks = [float(m.mean()) for _, m in samples]
    images = [float(i.mean()) for i, _ in samples]
    assert_same_means(masks, MASK_MEANS)
    assert_same_means(images, IMAGE_MEANS)


def test_a_sample_takes_milliseconds():
    rng = np.random.default_rng(0)
    times = []
    for _ in range(40):
        start = time.process_time()
        make_phantom(rng, 32)
        times.append(time.process_time() - start)
    assert np.median(times) < 0.05  # seconds of this process; about 6 ms


@pytest.mark.parametrize("name", sorted(SHAPES))
@pytest.mark.parametrize("size", [16, 40])
def test_every_shape_has_an_inside_and_an_outside(name, size):
    points = np.stack(np.meshgrid(*[np.linspace(-1, 1, size)] * 3, indexing="ij"))
    for seed in range(8):
        field = SHAPES[name](np.random.default_rng(seed), points.astype(np.float32))
        assert field.shape == (size,) * 3 and field.dtype == np.float32
        assert np.isfinite(field).all() and (field < 0).any() and (field > 0).any()


def test_small_sizes_are_refused():
    with pytest.raises(ConfigError, match="size: expected at least 8 voxels, got 4"):
        make_phantom(np.random.default_rng(0), 4)


def test_smooth_noise_is_standard_and_as_smooth_as_requested():
    rng = np.random.default_rng(0)
    rough, smooth = (smooth_noise(rng, (32, 32, 32), scale) for scale in (0.03, 0.1))
    for noise in (rough, smooth):
        assert noise.mean() == pytest.approx(0, abs=1e-5)
        assert noise.std() == pytest.approx(1, rel=1e-4)
    assert np.abs(np.diff(smooth, axis=0)).mean() < 0.5 * np.abs(np.diff(rough, axis=0)).mean()


def test_dataset_is_ct_like_oblique_and_anisotropic(tmp_path):
    cases = write_phantom_dataset(tmp_path / "p", subjects=4, seed=1)
    assert [c.subject for c in cases] == [f"phantom_{n:03d}" for n in range(4)]
    assert [c.split for c in cases] == ["train", "train", "train", "val"]
    handedness, orders = set(), set()
    for case in cases:
        stored = nib.load(case.image_path).affine
        handedness.add(np.linalg.det(stored[:3, :3]) > 0)
        orders.add(nib.aff2axcodes(stored))
        assert np.abs(stored[:3, :3] / voxel_sizes(stored)).max() < 0.999  # oblique
        assert np.ptp(voxel_sizes(stored)) > 0.05
        image = case.load_image()
        ground = np.median(image.array)
        assert -100 < ground < -40
        masks = [case.load_mask(name, image) for name in case.structures]
        assert sorted(case.structures) == ["blob", "superquadric", "tree", "tube"]
        assert np.sum(masks, axis=0).max() == 1  # none overlaps another
        for mask in masks:
            assert mask.sum() > 200 and image.array[mask].mean() > ground + 80
    assert handedness == {True, False} and len(orders) > 1


def test_dataset_is_written_once_and_follows_its_seed(tmp_path):
    root = tmp_path / "p"
    write_phantom_dataset(root, subjects=1, seed=0)
    path = root / "phantom_000" / "ct.nii.gz"
    first, stamp = path.read_bytes(), path.stat().st_mtime_ns
    (case,) = write_phantom_dataset(root, subjects=1, seed=0)
    assert path.stat().st_mtime_ns == stamp and case.split == "train"
    write_phantom_dataset(root, subjects=1, seed=5)
    assert path.read_bytes() != first
    write_phantom_dataset(root, subjects=1, seed=0)
    assert path.read_bytes() == first
    (root / "mine.txt").write_text("keep")
    with pytest.raises(DataError, match="got mine.txt in it"):
        write_phantom_dataset(root, subjects=2, seed=0)
    with pytest.raises(ConfigError, match="subjects: expected at least 1, got 0"):
        write_phantom_dataset(root, subjects=0)


def test_shapes_are_not_stretched_by_anisotropic_voxels():
    ball = lambda rng, points: np.sqrt((points**2).sum(0)) - 0.8  # noqa: E731
    spacing = np.array((1.0, 1.0, 2.0))
    mask = phantom._solid_shape(np.random.default_rng(0), ball, (40, 40, 20), spacing)
    extent = np.ptp(np.argwhere(mask), axis=0) * spacing
    assert np.ptp(extent) <= 2.0
