"""Structures cut out of a case: each file is read once, and a part gives what the whole volume gives."""

from __future__ import annotations

import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from fastlora.errors import DataError
from fastlora.medical.data.grids import FINE, MARGIN, SPACING_MM, fine_grid
from fastlora.medical.data.splits import make_splits
from fastlora.medical.scans.geometry import regrid, resample, shifted
from fastlora.medical.scans.layouts import find_cases
from fastlora.medical.scans.scan import LabelMap, Part, Scan
from fastlora.medical.scans.stopwatch import Stopwatch
from fastlora.medical.scans.volumes import Volume, save_volume
from fastlora.medical.scans.windows import window_limits, windowed
from tests.support.tolerance import assert_same_intensities


def test_a_label_map_gives_the_voxels_of_each_label():
    rng = np.random.default_rng(0)
    plain = rng.integers(0, 4, (9, 8, 7)).astype(np.int32)
    plain[plain == 2] = 0
    for known in ((0, 1, 2, 3), (0, 11, 900, 300), (0, -5, 7, 2**31 - 1), (0, 70_000, 2, -(2**31))):
        labels = np.array(known, dtype=np.int32)[plain]
        found = LabelMap(labels)
        assert set(found.boxes) == {known[1], known[3]}
        for wanted, mask in (
            (known[1], labels == known[1]),
            (known[3], labels == known[3]),
            ((known[1], known[3]), labels != 0),
            ((known[3], 99), labels == known[3]),
            (None, labels != 0),
        ):
            part = found.part(wanted)
            whole = np.zeros_like(mask)
            whole[part.box] = part.mask
            np.testing.assert_array_equal(whole, mask)
        assert found.part(known[2]) is None and found.part((5, known[2])) is None
    assert LabelMap(np.zeros((3, 3, 3), np.int32)).part(None) is None


@pytest.mark.parametrize("spacing", [(0.8, 0.7, 2.5), (1.5, 1.5, 1.5), (3.0, 5.0, 1.0)])
@pytest.mark.parametrize("place", ["inside", "at a corner"])
def test_a_part_gives_the_fine_grid_of_the_whole_volume(spacing, place):
    rng = np.random.default_rng(1)
    affine = np.diag([-spacing[0], spacing[1], spacing[2], 1.0])
    affine[:3, 3] = (7, -3, 11)
    image = Volume(rng.normal(0, 300, (60, 50, 40)).astype(np.float32), affine)
    mask = np.zeros(image.shape, bool)
    at = (slice(22, 40), slice(17, 30), slice(12, 25))
    at = at if place == "inside" else (slice(0, 18), slice(37, 50), slice(0, 13))
    mask[at] = rng.random((18, 13, 13)) < 0.8
    grid = fine_grid(image, Part.of(mask), window_limits(image.array, "ct"))

    whole, shape = regrid(affine, image.shape, SPACING_MM)
    filled, scale = np.argwhere(mask), image.spacing / SPACING_MM
    low = np.maximum(np.floor(filled.min(0) * scale).astype(int) - MARGIN, 0)
    stop = np.ceil((filled.max(0) + 1) * scale).astype(int) + MARGIN
    high = np.maximum(np.minimum(stop, shape), low + FINE)
    np.testing.assert_array_equal(grid.offset, low)
    np.testing.assert_array_equal(grid.affine, shifted(whole, low))
    assert grid.mask.shape == tuple(high - low)
    fine = resample(
        windowed(image.array, window_limits(image.array, "ct")),
        affine,
        grid.affine,
        grid.mask.shape,
    )
    assert_same_intensities(grid.image, fine)
    padded = resample(
        np.pad(mask, 1), shifted(affine, (-1, -1, -1)), grid.affine, grid.mask.shape, cval=0.0
    )
    np.testing.assert_array_equal(grid.mask, padded >= 0.5)


def test_a_window_of_a_part_is_that_of_the_whole():
    image = np.random.default_rng(0).normal(0, 50, (9, 9, 9)).astype(np.float32)
    for modality in ("ct", "mr", "grey"):
        part = windowed(image[2:5], window_limits(image, modality, "liver"))
        np.testing.assert_array_equal(
            part, windowed(image, window_limits(image, modality, "liver"))[2:5]
        )


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """One case as an image/label pair with two blocks."""
    labels = np.zeros((60, 50, 44), np.uint8)
    labels[10:30, 12:30, 10:30] = 1
    labels[34:52, 24:42, 14:34] = 3
    folder = tmp_path / "data" / "s0"
    affine = np.diag([1.5, 1.5, 1.5, 1.0])
    save_volume(folder / "a-image.nii.gz", labels.astype(np.int16) * 60 - 30, affine)
    save_volume(folder / "a-label.nii.gz", labels, affine)
    return folder.parent


def test_each_file_of_a_case_is_read_once(pairs, monkeypatch):
    (case,) = find_cases(pairs)
    reads: list[str] = []
    load = nib.load
    monkeypatch.setattr(
        nib, "load", lambda path, **k: (reads.append(Path(path).name), load(path, **k))[1]
    )
    scan = Scan(case)
    assert reads == []
    assert [int(scan.part(name).mask.sum()) for name in case.structures] == [7200, 6480]
    assert sorted(reads) == ["a-image.nii.gz", "a-label.nii.gz"]
    reads.clear()
    with pytest.raises(DataError, match="one subject|got none among"):
        make_splits([case], "structure", test_structures=["x"], val_structures=["y"])
    assert sorted(reads) == ["a-image.nii.gz", "a-label.nii.gz"]  # for both structures


def test_a_file_that_cannot_be_used_is_named_for_every_structure(pairs, monkeypatch):
    (case,) = find_cases(pairs)
    case.image_path.write_bytes(b"no")
    scan = Scan(case)
    for name in case.structures:
        with pytest.raises(DataError, match="a-image.nii.gz: expected a readable NIfTI"):
            scan.part(name)
    assert "image" in scan.watch.seconds


def test_a_stopwatch_counts_each_moment_once():
    watch, start = Stopwatch(), time.perf_counter()
    with watch.step("outer"):
        time.sleep(0.02)
        with watch.step("inner"):
            time.sleep(0.03)
        with watch.step("inner"):
            time.sleep(0.01)
    total = time.perf_counter() - start
    assert list(watch.seconds) == ["outer", "inner"]
    assert watch.seconds["outer"] >= 0.02 and watch.seconds["inner"] >= 0.04
    assert sum(watch.seconds.values()) <= total
    outer, inner = (f"{watch.seconds[name]:.1f}" for name in ("outer", "inner"))
    assert str(watch).startswith(f"outer {outer} s, inner {inner} s")
