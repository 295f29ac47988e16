"""Region samples: geometry, determinism, splits without leaks, and errors that name invalid data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nibabel.affines import apply_affine
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from fastlora.errors import ConfigError, DataError
from fastlora.medical.data import grids, manifest
from fastlora.medical.data.batch import collate_regions
from fastlora.medical.data.bundled import build_bundled
from fastlora.medical.data.grids import FINE, SPACING_MM, TRUNCATION_VOX
from fastlora.medical.data.regions import (
    TOKEN_CHANNELS,
    RegionDataset,
    active_cells,
    coarse_segmentation,
    token_features,
    upsample_coarse,
)
from fastlora.medical.data.splits import (
    SPLIT_NOTES,
    check_no_leak,
    group_of,
    kind_of,
    make_splits,
    region_specs,
    region_starts,
)
from fastlora.medical.scans.layouts import find_cases
from fastlora.medical.scans.scan import Scan
from fastlora.medical.scans.volumes import Case, save_volume

CENTRE_MM = np.array([7.0, -5.0, 11.0])
RADIUS_MM = 17.0


def write_ball(
    root: Path, subject: str, names: dict[str, float], affine: NDArray[Any] | None = None
) -> None:
    """A CT volume with one ball for each name, so many mm to the right of CENTRE_MM."""
    affine = np.diag([2.0, 1.25, 2.5, 1.0]) if affine is None else affine
    shape = (60, 80, 40)
    if np.allclose(affine[:3, 3], 0):
        affine = affine.copy()
        affine[:3, 3] = CENTRE_MM - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    points = apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1))
    image = np.full(shape, -300.0, np.float32)
    for name, right in names.items():
        mask = np.linalg.norm(points - CENTRE_MM - [right, 0, 0], axis=-1) < RADIUS_MM
        image[mask] = 100.0
        save_volume(
            root / subject / "segmentations" / f"{name}.nii.gz", mask.astype(np.uint8), affine
        )
    save_volume(root / subject / "ct.nii.gz", image, affine)


@pytest.fixture
def ball(tmp_path: Path) -> Case:
    write_ball(tmp_path, "s1", {"liver": 0.0})
    return find_cases(tmp_path)[0]


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    return build_bundled(tmp_path_factory.mktemp("bundled") / "cases")


def test_coarse_active_cells_and_upsampling() -> None:
    mask = np.zeros((FINE, FINE, FINE), bool)
    mask[8:24, 8:24, 8:24] = True
    mask[8:10, 8:24, 8:24] = False
    coarse = coarse_segmentation(mask)
    assert coarse.shape == (8, 8, 8)
    assert coarse[2, 3, 3] == 0.5 and coarse[3, 3, 3] == 1 and coarse[1, 3, 3] == 0
    cells = active_cells(coarse)
    active = np.zeros((8, 8, 8), bool)
    active[tuple(cells.T)] = True
    assert active[1, 3, 3] and active[2, 3, 3] and active[5, 5, 5]
    assert not active[0, 0, 0] and not active[7, 3, 3]
    up = upsample_coarse(coarse)
    assert up.shape == mask.shape and up.min() == 0 and up.max() == 1
    np.testing.assert_allclose(
        up[:, 14, 14], np.interp((np.arange(32) - 1.5) / 4, np.arange(8), coarse[:, 3, 3])
    )
    ramp = np.broadcast_to(np.arange(8, dtype=np.float32)[:, None, None] / 7, (8, 8, 8))
    assert np.allclose(np.diff(upsample_coarse(ramp)[2:-2, 5, 5]), 1 / 28)


def test_a_token_carries_its_own_patch_and_neighbourhood() -> None:
    rng = np.random.default_rng(0)
    image = rng.random((FINE, FINE, FINE), dtype=np.float32)
    coarse = rng.random((8, 8, 8), dtype=np.float32)
    feats = token_features(image, coarse, np.array([[2, 3, 4], [0, 0, 0]]))
    assert feats.shape == (2, TOKEN_CHANNELS) and feats.dtype == np.float32
    np.testing.assert_array_equal(feats[0, :512], 4 * (image[6:14, 10:18, 14:22].ravel() - 0.5))
    np.testing.assert_array_equal(feats[0, 512:], 2 * (coarse[1:4, 2:5, 3:6].ravel() - 0.5))
    assert feats[1, 0] == pytest.approx(
        4 * (image[0, 0, 0] - 0.5), rel=1e-5
    )  # repeated beyond the cube


@pytest.mark.parametrize("turn", [0.0, 0.3])
@pytest.mark.parametrize("augment", [False, True])
def test_the_surface_lies_where_it_is_in_the_patient(
    tmp_path: Path, turn: float, augment: bool
) -> None:
    affine = np.diag([-2.0, 1.25, 2.5, 1.0])  # left-handed, and oblique where turned
    cos, sin = np.cos(turn), np.sin(turn)
    affine[:3, :3] = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]]) @ affine[:3, :3]
    write_ball(tmp_path, "s1", {"liver": 0.0}, affine)
    specs = region_specs(find_cases(tmp_path)[0], "liver")
    dataset = RegionDataset(specs, augment=augment, seed=3, samples_per_region=8)
    for sample in (dataset[i] for i in range(len(dataset))):
        points = apply_affine(sample["affine"], np.moveaxis(np.indices((FINE, FINE, FINE)), 0, -1))
        distance = (np.linalg.norm(points - CENTRE_MM, axis=-1) - RADIUS_MM) / SPACING_MM
        near = np.abs(distance) < 3
        assert (
            np.abs(sample["sdf_vox"] - distance)[near].mean() < 0.45
        )  # the mask's voxels are up to 2.5 mm
        assert np.corrcoef(sample["image"].ravel(), -sample["sdf_vox"].ravel())[0, 1] > 0.8
        inside = sample["sdf_vox"] < 0
        np.testing.assert_allclose(sample["coarse"], coarse_segmentation(inside))
        assert (
            2
            * (inside & (sample["base_vox"] < 0)).sum()
            / (inside.sum() + (sample["base_vox"] < 0).sum())
            > 0.85
        )


def test_a_sample_is_as_documented(ball: Case) -> None:
    specs = region_specs(ball, "liver")
    sample = RegionDataset(specs)[0]
    count = len(sample["coords"])
    assert sample["coords"].shape == (count, 3) and sample["coords"].dtype == np.int64
    assert sample["feats"].shape == (count, TOKEN_CHANNELS)
    for name in ("base_vox", "sdf_vox", "image"):
        assert sample[name].shape == (FINE, FINE, FINE) and sample[name].dtype == np.float32
    assert np.abs(sample["sdf_vox"]).max() == TRUNCATION_VOX
    assert 0 <= sample["image"].min() < sample["image"].max() <= 1
    assert sample["affine"].shape == (4, 4) and sample["affine"].dtype == np.float64
    assert sample["spacing"] == SPACING_MM
    meta = {"subject": "s1", "structure": "liver", "modality": "ct", "group": "liver"}
    assert sample["meta"] == {**meta, "region": specs[0].name}


def test_regions_cover_the_structure_and_stay_within_bounds(bundled: list[Case]) -> None:
    case = next(c for c in bundled if c.subject == "spine_ct")
    specs = region_specs(case, "vertebra_22")
    grid = grids.StructureGrid.load(case, "vertebra_22")
    covered = np.zeros(grid.image.shape, bool)
    for spec in specs:
        assert all(lo <= s <= hi for lo, s, hi in zip(spec.low, spec.start, spec.high, strict=True))
        covered[
            tuple(slice(s - o, s - o + FINE) for s, o in zip(spec.start, grid.offset, strict=True))
        ] = True
    inside = grid.sdf_vox < 0
    assert (covered & inside).sum() > 0.97 * inside.sum()
    assert inside.sum() == case.load_mask("vertebra_22", case.load_image()).sum()  # 1.5 mm already


@pytest.mark.parametrize("stride", [FINE, FINE // 2])
def test_regions_are_evenly_spaced_and_as_few_as_their_stride_allows(stride: int) -> None:
    assert region_starts(0, FINE, 0, 0, stride) == [0]
    assert region_starts(10, 20, 0, 90, stride) == [0]  # centred, within the limits
    assert region_starts(50, 60, 0, 90, stride) == [39]
    for length in range(FINE + 1, 200):
        starts = region_starts(0, length, 0, length - FINE, stride)
        steps = np.diff(starts)
        assert (starts[0], starts[-1]) == (0, length - FINE)
        assert steps.max() <= stride and np.ptp(steps) <= 1
        assert stride * (len(starts) - 2) < length - FINE  # one region less would leave a gap


def test_samples_depend_on_seed_epoch_and_index_alone(ball: Case) -> None:
    specs = region_specs(ball, "liver")

    def run(seed: int, epoch: int, workers: int) -> torch.Tensor:
        np.random.seed(workers)
        dataset = RegionDataset(specs, augment=True, seed=seed, samples_per_region=4)
        dataset.set_epoch(epoch)
        loader = DataLoader(dataset, batch_size=3, num_workers=workers, collate_fn=collate_regions)
        return torch.cat([torch.cat([b.sdf_vox, b.image], 1) for b in loader])

    reference = run(0, 1, 0)
    assert torch.equal(reference, run(0, 1, 2))
    assert not torch.equal(reference, run(0, 2, 0))
    assert not torch.equal(reference, run(1, 1, 0))
    assert not torch.equal(reference[0], reference[1])


def test_augmentation_moves_turns_and_mirrors_but_keeps_distances(ball: Case) -> None:
    specs = region_specs(ball, "liver")
    plain = RegionDataset(specs)[0]
    dataset = RegionDataset(specs, augment=True, samples_per_region=16)
    samples = [dataset[i] for i in range(16)]
    turns = {np.sign(s["affine"][:3, :3]).tobytes() for s in samples}
    orders = {tuple(np.argmax(np.abs(s["affine"][:3, :3]), axis=0)) for s in samples}
    assert len(turns) > 8 and len(orders) > 3
    assert len({s["affine"][:3, 3].tobytes() for s in samples}) > 8
    for sample in samples:
        assert set(np.unique(sample["sdf_vox"])) <= set(np.unique(plain["sdf_vox"]))
        assert sample["image"].min() > -0.2 and sample["image"].max() < 1.2
    assert len({float(np.median(s["image"])) for s in samples}) == 16


def test_collate_joins_tokens_and_stacks_the_rest(ball: Case) -> None:
    dataset = RegionDataset(region_specs(ball, "liver"), augment=True, samples_per_region=3)
    samples = [dataset[i] for i in range(3)]
    batch = collate_regions(samples).to("cpu")
    assert len(batch) == 3 and [m["subject"] for m in batch.meta] == 3 * ["s1"]
    counts = [len(s["coords"]) for s in samples]
    assert torch.bincount(batch.tokens.coords[:, 0]).tolist() == counts
    np.testing.assert_array_equal(
        batch.tokens.coords[counts[0] : counts[0] + counts[1], 1:], samples[1]["coords"]
    )
    np.testing.assert_array_equal(
        batch.tokens.feats[counts[0] : counts[0] + counts[1]], samples[1]["feats"]
    )
    assert batch.sdf_vox.shape == batch.base_vox.shape == batch.image.shape == (3, FINE, FINE, FINE)
    assert batch.coarse.shape == (3, 8, 8, 8)
    assert batch.affine.dtype == torch.float64 and batch.spacing.tolist() == 3 * [SPACING_MM]


def test_the_disk_cache_gives_the_same_and_follows_the_files(ball: Case, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    fresh = grids.StructureGrid.read(Scan(ball), "liver")
    manifest.MEMORY.clear()
    grids.StructureGrid.load(ball, "liver", cache)
    assert len(list(cache.glob("*.npz"))) == 1
    manifest.MEMORY.clear()
    cached = grids.StructureGrid.load(ball, "liver", cache)
    for name, value in vars(fresh).items():
        np.testing.assert_array_equal(vars(cached)[name], value)
    write_ball(ball.image_path.parent.parent, "s1", {"liver": 4.0})
    moved = grids.StructureGrid.load(ball, "liver", cache)
    assert not np.array_equal(moved.sdf_vox, fresh.sdf_vox)
    assert len(list(cache.iterdir())) == 2


@pytest.mark.slow
def test_structure_split_of_the_bundled_cases(bundled: list[Case]) -> None:
    splits = make_splits(bundled)
    names = {k: {(s.case.subject, s.structure) for s in specs} for k, specs in splits.items()}
    brain = {("brain_mni", "white_matter"), ("brain_mni", "grey_matter")}
    parts = ("", "_corpus", "_posterior_elements")
    assert names["test"] == brain | {("spine_mr", "disc_106")} | {
        (subject, f"vertebra_{number}{part}")
        for subject, number in (("spine_ct", 22), ("spine_mr", 6))
        for part in parts
    }
    assert names["val"] == brain | {("spine_ct", f"vertebra_21{part}") for part in parts}
    assert not (names["train"] & (names["test"] | names["val"])) - brain
    assert {kind_of(name) for _, name in names["train"]} == {
        kind_of(name) for _, name in names["test"]
    }

    train = RegionDataset(
        [s for s in splits["train"] if s.case.subject == "brain_mni"], augment=True
    )
    test = RegionDataset([s for s in splits["test"] if s.case.subject == "brain_mni"])
    ends = np.array([[0.0, 0, 0, 1], [FINE - 1, FINE - 1, FINE - 1, 1]])
    for epoch in range(3):
        train.set_epoch(epoch)
        for index in range(len(train)):
            corners = (train[index]["affine"] @ ends.T)[:3]
            assert corners[1].max() <= -30 and corners[2].max() <= 20
    assert all((test[i]["affine"] @ ends.T)[1].min() >= 0 for i in range(len(test)))


@pytest.mark.parametrize(("test", "train"), [("spine_mr", "spine_ct"), ("spine_ct", "spine_mr")])
def test_patient_split_both_ways(bundled: list[Case], test: str, train: str) -> None:
    splits = make_splits(bundled, "patient", test_subjects=[test])
    assert {s.case.subject for s in splits["test"]} == {test}
    assert {s.case.subject for s in splits["train"] + splits["val"]} == {train}
    assert not {s.structure for s in splits["train"]} & {s.structure for s in splits["val"]}
    kinds = {kind_of(s.structure) for s in splits["test"]}
    assert kinds == {"vertebra", "vertebra_corpus", "vertebra_posterior_elements"}
    assert kinds == {kind_of(s.structure) for s in splits["train"]}


def test_patient_split_of_several_subjects(tmp_path: Path) -> None:
    for subject in "abcd":
        write_ball(tmp_path, subject, {"liver": 0.0})
    subsets = make_splits(find_cases(tmp_path), "patient")
    assert {k: {s.case.subject for s in v} for k, v in subsets.items()} == {
        "train": {"a", "b"},
        "val": {"c"},
        "test": {"d"},
    }


def test_file_split_follows_meta_csv(tmp_path: Path) -> None:
    for subject in "abc":
        write_ball(tmp_path, subject, {"liver": 0.0})
    (tmp_path / "meta.csv").write_text("image_id;split\na;train\nb;val\nc;test\n")
    subsets = make_splits(find_cases(tmp_path), "file")
    assert {k: {s.case.subject for s in v} for k, v in subsets.items()} == {
        "train": {"a"},
        "val": {"b"},
        "test": {"c"},
    }
    (tmp_path / "meta.csv").write_text("image_id;split\na;train\nb;val\n")
    with pytest.raises(
        DataError, match=r"c: expected split train, val or test in meta\.csv, got None"
    ):
        make_splits(find_cases(tmp_path), "file")


def test_leaks_are_found(tmp_path: Path) -> None:
    write_ball(tmp_path, "s1", {"liver": 0.0, "tumour": 20.0, "spleen": 2 * RADIUS_MM + 2})
    case = find_cases(tmp_path)[0]
    liver, tumour, spleen = (region_specs(case, n) for n in ("liver", "tumour", "spleen"))
    check_no_leak({"train": liver, "test": spleen})  # regions overlap, targets do not
    with pytest.raises(
        DataError, match=r"s1: test tumour@.* and train liver@.*no common target voxel"
    ):
        check_no_leak({"train": liver, "test": tumour})
    with pytest.raises(DataError, match=r"no common target voxel"):
        check_no_leak({"train": liver, "val": liver})
    with pytest.raises(DataError, match=r"expected a subject in one subset only"):
        check_no_leak({"train": liver, "test": spleen}, whole_subjects=["test"])
    first, second = liver[0], replace(liver[0], low=(99, 99, 99), high=(99, 99, 99))
    check_no_leak({"train": [first], "val": [second]})  # one structure, regions that never overlap
    with pytest.raises(DataError, match=r"no common target voxel"):
        make_splits([case], test_structures=["tumour"], val_structures=["spleen"])


def test_invalid_requests_and_data_are_named(tmp_path: Path, ball: Case) -> None:
    with pytest.raises(
        ConfigError, match=r"split: expected one of \['file', 'patient', 'structure'\], got 'slice'"
    ):
        make_splits([ball], "slice")
    with pytest.raises(DataError, match=r"expected regions to val on, got none among s1: liver"):
        make_splits([ball])
    with pytest.raises(DataError, match=r"test_subjects: expected some of \['s1'\], got \['s9'\]"):
        make_splits([ball], "patient", test_subjects=["s9"])
    with pytest.raises(DataError, match="specs: expected at least one region"):
        RegionDataset([])
    with pytest.raises(ConfigError, match="samples_per_region: expected >= 1, got 0"):
        RegionDataset(region_specs(ball, "liver"), samples_per_region=0)
    with pytest.raises(IndexError, match="expected 0 to 0, got 1"):
        RegionDataset(region_specs(ball, "liver"))[1]
    with pytest.raises(DataError, match=r"s1: liver: no region of 32 voxels fits the box"):
        region_specs(ball, "liver", ((0, 9), (0, 9), (0, 9)))

    affine = np.diag([0.4, 0.4, 0.4, 1.0])
    mask = np.zeros((60, 60, 60), np.uint8)
    mask[30, 30, 30] = 1
    save_volume(tmp_path / "s2" / "segmentations" / "nodule.nii.gz", mask, affine)
    save_volume(tmp_path / "s2" / "ct.nii.gz", mask.astype(np.float32) - 1, affine)
    tiny = next(c for c in find_cases(tmp_path) if c.subject == "s2")
    with pytest.raises(
        DataError, match=r"s2: nodule: (mask: vanishes on the 1\.5 mm grid|no region)"
    ):
        region_specs(tiny, "nodule")


def test_names_of_structures() -> None:
    assert (
        kind_of("vertebra_22") == "vertebra" and kind_of("vertebra_22_corpus") == "vertebra_corpus"
    )
    assert kind_of("white_matter") == "white_matter"
    assert (
        group_of("disc_105") == "spine"
        and group_of("grey_matter") == "brain"
        and group_of("liver") == "liver"
    )
    assert set(SPLIT_NOTES) == {"structure", "patient", "file"}
