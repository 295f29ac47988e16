"""Slice samples of analytic ellipsoids: every quantity is compared with a formula."""

from __future__ import annotations

import functools
import logging
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
import trimesh
from nibabel.affines import apply_affine, voxel_sizes
from scipy import ndimage
from torch.utils.data import DataLoader

from fastlora.errors import ConfigError, DataError
from fastlora.medical.data import manifest, slice_source
from fastlora.medical.data.slice_source import (
    SliceConfig,
    cache_path,
    load_prepared,
    prepare,
    to_canonical,
)
from fastlora.medical.data.slices import (
    TS_SAM3D_Dataset,
    collate_slices,
    parse_axes,
    random_move,
    slice_indices,
    split_by_subject,
)
from fastlora.medical.data.splits import select_structures
from fastlora.medical.scans.layouts import find_cases
from fastlora.medical.scans.volumes import save_volume
from tests.medical.scans.test_geometry import oblique
from tests.support.tolerance import (
    assert_exact_geometry,
    assert_same_pixels,
    assert_same_points,
    assert_same_steps,
)

RADII = np.array((17.0, 12.0, 9.0))  # mm, along the volume's axes
SHAPE = (44, 40, 20)
SPACING = (1.0, 1.2, 2.5)
SMALL = SliceConfig(crop_size=8, margin_mm=5.0, sdf_size=32)


def ellipsoid_distance(points, affine, centre):
    """Signed mm of the order of the distance to the surface (exact where it is zero)."""
    axes = affine[:3, :3] / voxel_sizes(affine)
    local = (points - centre) @ axes
    scaled = np.linalg.norm(local / RADII, axis=-1)
    return (scaled - 1) * scaled / np.linalg.norm(local / RADII**2, axis=-1).clip(1e-6)


def write_ellipsoid(root, subject, seed=0, mirrored=False):
    """One CT case; returns its affine in RAS and the ellipsoid's centre in mm."""
    affine = oblique(SPACING, mirrored)
    grid = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1)
    centre = apply_affine(affine, (np.array(SHAPE) - 1) / 2 + (1.3, -0.6, 0.4))
    mask = ellipsoid_distance(apply_affine(affine, grid), affine, centre) < 0
    rng = np.random.default_rng(seed)
    image = np.where(mask, 150, -50) + rng.normal(0, 10, SHAPE)
    save_volume(root / subject / "ct.nii.gz", image.astype(np.int16), affine)
    folder = root / subject / "segmentations"
    save_volume(folder / "organ_1.nii.gz", mask.astype(np.uint8), affine)
    half = mask & (grid[..., 0] > SHAPE[0] // 2)
    save_volume(folder / "half.nii.gz", half.astype(np.uint8), affine)
    return affine, centre


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ellipsoids")
    for number in range(3):
        write_ellipsoid(folder, f"s{number}", seed=number, mirrored=number == 1)
    return folder


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    return write_ellipsoid(tmp_path_factory.mktemp("truth"), "s0")


def dataset(root, **options):
    return TS_SAM3D_Dataset(find_cases(root), **{"classes": ["organ"], "config": SMALL} | options)


def cube_at(sample, points):
    """The sample's gt_sdf read at points in mm."""
    size = sample["gt_sdf"].shape[0]
    canonical = apply_affine(np.linalg.inv(sample["canonical_to_mm"].numpy()), points)
    index = ((canonical + 1) * size - 1) / 2
    return ndimage.map_coordinates(
        sample["gt_sdf"].numpy(), np.moveaxis(index, -1, 0), order=1, mode="nearest"
    )


def one_per_axis(data):
    chosen = {}
    for index, (number, axis, _) in enumerate(data.slices):
        if number == 0:
            chosen.setdefault(axis, []).append(index)
    return [indices[len(indices) // 3] for indices in chosen.values()]


def test_a_sample_agrees_with_the_formula_on_every_axis(root, truth):
    affine, centre = truth
    data = dataset(root, extract_mesh=True)
    for index in one_per_axis(data):
        sample = data[index]
        _, height, width = sample["image"].shape
        assert sample["mask"].shape == (1, height, width) and sample["mask"].unique().numel() == 2
        assert sample["pointmap"].shape == (3, height, width)
        # pointmap = affine · (i, j, k, 1)
        ijk = np.insert([4.0, 6.0], sample["axis"], sample["slice_idx"])
        assert_same_points(sample["pointmap"][:, 4, 6], sample["affine"].numpy()[:3] @ [*ijk, 1])
        points = sample["pointmap"].permute(1, 2, 0).numpy().astype(np.float64)
        distance = ellipsoid_distance(points, affine, centre)
        clear = np.abs(distance) > 1e-2
        inside = sample["mask"][0].numpy() == 1
        np.testing.assert_array_equal(inside[clear], (distance < 0)[clear])
        # The window is soft tissue's: 150 HU is 0.775, −50 HU is 0.275.
        assert sample["image"][0].numpy()[inside].mean() == pytest.approx(0.775, abs=0.02)
        assert sample["image"][0].numpy()[~inside].mean() == pytest.approx(0.275, abs=0.02)
        near = np.abs(distance) < 3  # where the formula is nearly a distance
        error = np.abs(cube_at(sample, points) - distance)[near]
        assert error.mean() < 0.5 and error.max() < 2.0  # voxels are 1.0 × 1.2 × 2.5 mm
        mesh = trimesh.Trimesh(sample["vertices"], sample["faces"], process=False)
        assert mesh.is_watertight
        assert mesh.volume == pytest.approx(4 / 3 * np.pi * RADII.prod(), rel=0.03)
    assert {data.slices[i][1] for i in one_per_axis(data)} == {0, 1, 2}


def test_the_canonical_cube_holds_the_whole_structure_in_mm(root, truth):
    affine, centre = truth
    sample = dataset(root)[0]
    size = SMALL.sdf_size
    axis = -1 + (2 * np.arange(size) + 1) / size
    canonical = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1)
    points = apply_affine(sample["canonical_to_mm"].numpy(), canonical)
    distance = ellipsoid_distance(points, affine, centre)
    near = np.abs(distance) < 3
    sdf = sample["gt_sdf"].numpy()
    assert np.abs(sdf - distance)[near].mean() < 0.45  # voxels are 1.0 × 1.2 × 2.5 mm
    # Also far beyond the image's margin: at least the distance to the bounding sphere.
    outside = np.linalg.norm(points - centre, axis=-1) - RADII.max()
    assert (sdf >= outside - 2.5).all() and np.isfinite(sdf).all()
    half = sample["canonical_to_mm"][0, 0].item()
    assert (np.abs(sdf[[0, -1]]) > 0.05 * half).all()  # nothing touches the cube's faces


def test_every_slice_of_enough_area_is_a_sample(root):
    data = dataset(root, axes=["axial"])
    mask = prepare(*data.structures[0], SMALL).mask
    areas = mask.sum((0, 1))
    assert [i for n, _, i in data.slices if n == 0] == np.flatnonzero(areas >= 16).tolist()
    assert slice_indices(mask, 2, int(areas.max())) == [int(areas.argmax())]
    few = dataset(root, axes=[2], config=replace(SMALL, min_area_px=int(areas.max())))
    assert 0 < len(few) < len(data)
    with pytest.raises(DataError, match="expected a slice of 99999 pixels"):
        dataset(root, config=replace(SMALL, min_area_px=99999))


@pytest.mark.parametrize("index", range(0, 60, 7))
def test_one_transform_moves_image_mask_distances_and_mesh_together(root, index):
    still, moved = dataset(root, extract_mesh=True), dataset(root, extract_mesh=True, augment=True)
    before, after = still[index], moved[index]
    points = after["pointmap"].permute(1, 2, 0).numpy().astype(np.float64)
    np.testing.assert_array_equal(after["pointmap"], before["pointmap"])  # the pixels stay
    assert not torch.equal(after["mask"], before["mask"])
    inside = after["mask"][0].numpy() == 1
    sdf = cube_at(after, points)
    clear = np.abs(sdf) > 1.3  # half a voxel of the slice
    assert clear.mean() > 0.5
    np.testing.assert_array_equal(inside[clear], (sdf < 0)[clear])
    bright = after["image"][0].numpy() > 0.525
    assert (bright == inside)[clear].mean() > 0.99
    scale = (after["canonical_to_mm"][0, 0] / before["canonical_to_mm"][0, 0]).item()
    mesh, mesh_before = (
        trimesh.Trimesh(s["vertices"], s["faces"], process=False) for s in (after, before)
    )
    factor = mesh.volume / mesh_before.volume  # positive: the winding is right after a flip
    assert 0.85**3 - 1e-3 < factor < 1.18**3 + 1e-3
    assert scale == pytest.approx(factor ** (1 / 3), rel=0.25)  # the cube is scaled with it
    assert np.abs(cube_at(after, mesh.vertices)).mean() < 0.35  # its surface is the mesh
    # Scaled distances: the deepest point is as much deeper as the structure is larger.
    depth = after["gt_sdf"].min() / before["gt_sdf"].min()
    assert depth.item() == pytest.approx(factor ** (1 / 3), rel=0.08)


def test_a_move_is_a_similarity_that_keeps_the_plane():
    affine = oblique(SPACING, mirrored=True)
    mask = np.zeros(SHAPE, dtype=bool)
    mask[10:20, 5:20, 3:9] = True
    flips = 0
    for seed in range(20):
        move = random_move(np.random.default_rng(seed), affine, mask, 1, 7)
        gram = move[:3, :3].T @ move[:3, :3]
        assert_exact_geometry(gram, gram[0, 0] * np.eye(3))
        assert 0.84 < np.sqrt(gram[0, 0]) < 1.19
        flips += np.linalg.det(move[:3, :3]) < 0
        corners = apply_affine(affine, [[0, 7, 0], [30, 7, 0], [0, 7, 15]])
        back = apply_affine(np.linalg.inv(affine), apply_affine(move, corners))
        assert_exact_geometry(back[:, 1], 7)
    assert 4 < flips < 16


def equal(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a
    )


def test_samples_depend_on_seed_epoch_and_index_alone(root):
    data = dataset(root, augment=True, seed=1)
    first = data[5]
    data[9], data[2]
    assert equal(data[5], first)
    assert equal(dataset(root, augment=True, seed=1)[5], first)
    assert not equal(dataset(root, augment=True, seed=2)[5], first)
    data.set_epoch(1)
    assert not equal(data[5], first)
    data.set_epoch(0)
    assert equal(data[5], first)
    assert equal(pickle.loads(pickle.dumps(data))[5], first)
    first["image"].zero_()  # changing a sample does not change the data set
    plain = dataset(root)
    plain[5]["gt_sdf"].zero_()
    assert plain[5]["gt_sdf"].any() and data[5]["image"].any()


def test_workers_give_the_same_and_see_the_epoch(root, tmp_path):
    data = dataset(root, augment=True, axes=["axial"], cache_dir=tmp_path)
    data.slices = data.slices[:6]
    collate = functools.partial(collate_slices, crop_size=24)
    alone = DataLoader(data, batch_size=3, collate_fn=collate)
    workers = DataLoader(
        data, batch_size=3, collate_fn=collate, num_workers=2, persistent_workers=True
    )
    seen = []
    for epoch in (0, 1):
        data.set_epoch(epoch)
        for expected, got in zip(alone, workers, strict=True):
            assert equal(expected, got)
            seen.append(got["image"].clone())
    assert not torch.equal(seen[0], seen[2])


def test_preparation_can_resample(root):
    case, structure = find_cases(root)[0], "organ_1"
    fine = prepare(case, structure, replace(SMALL, spacing=1.5))
    np.testing.assert_allclose(voxel_sizes(fine.affine), 1.5)
    coarse = prepare(case, structure, SMALL)
    assert fine.mask.sum() * 1.5**3 == pytest.approx(coarse.mask.sum() * np.prod(SPACING), rel=0.05)
    # The box has the requested size where the image is large enough, at any spacing.
    wide = prepare(case, structure, replace(SMALL, spacing=1.5, crop_size=26, margin_mm=0.1))
    assert 26 <= wide.mask.shape[0] <= 30
    with pytest.raises(DataError, match="s0/organ_1: expected a mask with voxels at spacing 90"):
        prepare(case, structure, replace(SMALL, spacing=90.0))


def test_a_structure_cut_by_the_image_has_a_closed_surface(tmp_path):
    mask = np.zeros((12, 12, 12), dtype=np.uint8)
    mask[0:6, 3:9, 3:9] = 1
    save_volume(tmp_path / "s" / "ct.nii.gz", mask.astype(np.int16) - 1, np.eye(4))
    save_volume(tmp_path / "s" / "segmentations" / "x.nii.gz", mask, np.eye(4))
    item = prepare(find_cases(tmp_path)[0], "x", SMALL)
    mesh = trimesh.Trimesh(item.vertices, item.faces, process=False)
    assert mesh.is_watertight and mesh.volume == pytest.approx(216, rel=0.05)
    assert item.sdf[0, 6, 6] == pytest.approx(-0.5)


def test_a_cube_too_coarse_for_a_thin_structure_is_refused():
    sdf = np.full((40, 40, 3), 0.3, dtype=np.float32)
    sdf[:, 20, 1] = -0.05
    line = np.array([[0, 19.9, 0.9], [39, 20.1, 1.1]], dtype=np.float32)
    with pytest.raises(DataError, match="sdf_size: expected a cube finer than"):
        to_canonical(sdf, np.eye(4), line, 8)


def test_invalid_settings_are_refused(root):
    with pytest.raises(ConfigError, match="spacing: expected a positive number, got -1"):
        SliceConfig(spacing=-1)
    with pytest.raises(ConfigError, match="crop_size: expected a positive number, got 0"):
        SliceConfig(crop_size=0)
    with pytest.raises(DataError, match="classes: no case has 'liver'; there are: half, organ_1"):
        dataset(root, classes=["organ", "liver"])
    with pytest.raises(ConfigError, match="axes: expected some of sagittal.* got .*'oblique'"):
        dataset(root, axes=["axial", "oblique"])
    with pytest.raises(ConfigError, match="axes: .*got \\[\\]"):
        parse_axes([])
    assert parse_axes(["axial", 0, "1", "sagittal"]) == [0, 1, 2]
    cases = find_cases(root)
    assert select_structures(cases, None) == cases
    assert [list(c.structures) for c in select_structures(cases, ["organ"])] == [["organ_1"]] * 3


def test_cache_is_used_until_a_source_or_a_parameter_changes(root, tmp_path, monkeypatch):
    folder = tmp_path / "data"
    write_ellipsoid(folder, "s0")
    (case,) = find_cases(folder)
    cache = tmp_path / "cache"
    first = load_prepared(case, "organ_1", SMALL, cache)
    (entry,) = cache.iterdir()
    assert entry == cache_path(case, "organ_1", SMALL, cache)
    manifest.MEMORY.clear()
    with monkeypatch.context() as patch:
        patch.setattr(slice_source, "prepare", lambda *a: pytest.fail("the cache was not used"))
        again = load_prepared(case, "organ_1", SMALL, cache)
    for name, value in vars(first).items():
        np.testing.assert_array_equal(getattr(again, name), value)
    others = {
        cache_path(case, "organ_1", replace(SMALL, spacing=1.0), cache),
        cache_path(case, "half", SMALL, cache),
        cache_path(replace(case, modality="mr"), "organ_1", SMALL, cache),
    }
    write_ellipsoid(folder, "s0", seed=9)
    others.add(cache_path(case, "organ_1", SMALL, cache))
    assert entry not in others and len(others) == 4
    case.image_path.unlink()
    with pytest.raises(DataError, match="ct.nii.gz: expected a file"):
        cache_path(case, "organ_1", SMALL, cache)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "another"])
def test_damaged_cache_entries_are_logged_and_recomputed(root, tmp_path, caplog, damage):
    case = find_cases(root)[0]
    first = load_prepared(case, "organ_1", SMALL, tmp_path)
    (entry,) = tmp_path.iterdir()
    whole = bytearray(entry.read_bytes())
    if damage == "truncated":
        entry.write_bytes(whole[: len(whole) // 2])
    elif damage == "flipped":
        whole[5000] ^= 0xFF
        entry.write_bytes(whole)
    elif damage == "empty":
        entry.write_bytes(b"")
    else:
        np.savez(entry, image=first.image)
    manifest.MEMORY.clear()
    with caplog.at_level(logging.WARNING):
        again = load_prepared(case, "organ_1", SMALL, tmp_path)
    assert "damaged cache entry is recomputed" in caplog.text
    np.testing.assert_array_equal(again.sdf, first.sdf)
    caplog.clear()
    manifest.MEMORY.clear()
    load_prepared(case, "organ_1", SMALL, tmp_path)
    assert not caplog.text and list(tmp_path.iterdir()) == [entry]


def test_an_interrupted_cache_write_leaves_nothing(root, tmp_path, monkeypatch):
    def stop(file, **arrays):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", stop)
    with pytest.raises(KeyboardInterrupt):
        load_prepared(find_cases(root)[0], "organ_1", SMALL, tmp_path)
    assert not list(tmp_path.iterdir())


def test_collate_pads_and_keeps_places(root):
    data = dataset(root, extract_mesh=True)
    samples = [data[index] for index in one_per_axis(data)]
    assert len({s["image"].shape for s in samples}) > 1
    batch = collate_slices(samples)
    height, width = (max(s["image"].shape[d] for s in samples) for d in (1, 2))
    assert batch["image"].shape == batch["mask"].shape == (3, 1, height, width)
    assert batch["valid"].dtype == torch.bool and batch["pointmap"].shape == (3, 3, height, width)
    assert batch["gt_sdf"].shape == (3, 32, 32, 32) and batch["affine"].dtype == torch.float64
    assert batch["axis"].tolist() == [0, 1, 2] and batch["subject"] == ["s0"] * 3
    assert [len(v) for v in batch["vertices"]] == [len(s["vertices"]) for s in samples]
    for n, sample in enumerate(samples):
        valid = batch["valid"][n, 0]
        for name in ("image", "mask", "pointmap"):
            assert_same_pixels(batch[name][n][:, valid], sample[name].flatten(1))
        assert not batch["image"][n, 0][~valid].any()
        # Beyond the slice, pointmap continues in even steps.
        steps = batch["pointmap"][n].diff(dim=2)
        assert_same_steps(steps, steps[:, :1, :1].expand_as(steps))


def test_collate_crops_about_the_structure(root):
    data = dataset(root, classes=["half"], config=replace(SMALL, crop_size=40))
    sample = data[len(data) // 6]
    size = 14
    batch = collate_slices([sample], crop_size=size)
    assert batch["image"].shape == (1, 1, size, size) and batch["valid"].all()
    rows, columns = (int(n) for n in sample["mask"][0].nonzero().float().mean(0))
    kept = batch["mask"].sum() / sample["mask"].sum()
    assert kept > 0.5
    middle = sample["pointmap"][:, rows, columns]
    apart = (batch["pointmap"][0] - middle[:, None, None]).norm(dim=0).min()
    assert apart < 1e-3  # the structure's middle is in the frame
    blank = sample | {"mask": torch.zeros_like(sample["mask"])}
    assert collate_slices([blank], crop_size=size)["image"].shape == (1, 1, size, size)


def test_splits_are_by_subject(root):
    cases = find_cases(root)
    train, val = split_by_subject(cases, val_fraction=0.34, seed=3)
    assert len(train) == 2 and len(val) == 1
    assert not {c.subject for c in train} & {c.subject for c in val}
    assert split_by_subject(cases, val_fraction=0.34, seed=3) == (train, val)
    given = [replace(c, split="val" if c.subject == "s1" else "train") for c in cases]
    assert [c.subject for c in split_by_subject(given)[1]] == ["s1"]
    with pytest.raises(DataError, match="both training and validation, got 0 cases and 1"):
        split_by_subject(cases[:1])
