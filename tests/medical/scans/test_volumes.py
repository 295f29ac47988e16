"""Reading, checking and finding cases on disk."""

from __future__ import annotations

import gzip

import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import apply_affine

from fastlora import files
from fastlora.errors import ConfigError, DataError
from fastlora.medical.scans.layouts import find_cases
from fastlora.medical.scans.volumes import (
    Case,
    Source,
    grids_apart,
    load_labels,
    load_volume,
    save_volume,
)
from fastlora.medical.scans.windows import window_limits, windowed
from tests.medical.scans.test_geometry import oblique
from tests.support.tolerance import assert_same_affine, assert_same_window


def blank(value=0, dtype=np.uint8, shape=(4, 5, 6)):
    return np.full(shape, value, dtype=dtype)


def write_case(folder, image=None, masks=None, affine=None, name="ct.nii.gz"):
    affine = np.eye(4) if affine is None else affine
    save_volume(folder / name, blank(-7, np.int16) if image is None else image, affine)
    mask = blank()
    mask[1:3, 1:3, 1:3] = 1
    for structure, array in ({"liver": mask} if masks is None else masks).items():
        save_volume(folder / "segmentations" / f"{structure}.nii.gz", array, affine)


@pytest.mark.parametrize("codes", ["RAS", "PIR", "LPS", "SAL"])
def test_volumes_are_reoriented_to_ras_and_keep_their_positions(tmp_path, codes):
    affine = oblique((1.0, 1.5, 3.0))
    array = np.random.default_rng(0).integers(0, 1000, (4, 5, 6)).astype(np.int16)
    image = nib.Nifti1Image(array, affine)
    to = nib.orientations.axcodes2ornt(codes)
    image = image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(affine), to))
    nib.save(image, tmp_path / "v.nii.gz")
    volume = load_volume(tmp_path / "v.nii.gz")
    assert nib.aff2axcodes(volume.affine) == ("R", "A", "S")
    assert volume.array.dtype == np.float32
    np.testing.assert_allclose(volume.spacing, np.linalg.norm(volume.affine[:3, :3], axis=0))
    # The same value is at the same position in mm as in the file.
    brightest = np.unravel_index(array.argmax(), array.shape)
    again = np.unravel_index(volume.array.argmax(), volume.shape)
    assert_same_affine(apply_affine(volume.affine, again), apply_affine(affine, brightest))


def test_a_fourth_axis_of_one_is_dropped(tmp_path):
    save_volume(tmp_path / "v.nii.gz", blank(shape=(4, 5, 6, 1)), np.eye(4))
    assert load_volume(tmp_path / "v.nii.gz").shape == (4, 5, 6)


def test_files_that_cannot_be_used_are_refused_by_name(tmp_path):
    path = tmp_path / "bad.nii.gz"
    with pytest.raises(DataError, match="bad.nii.gz: expected a file, got nothing"):
        load_volume(path)
    path.write_text("not an image")
    with pytest.raises(DataError, match="bad.nii.gz: expected a readable NIfTI file"):
        load_volume(path)
    save_volume(path, blank(shape=(4, 5, 6, 2)), np.eye(4))
    with pytest.raises(DataError, match=r"bad.nii.gz: expected a volume .* got \(4, 5, 6, 2\)"):
        load_volume(path)
    array = blank(0, np.float32)
    array[1, 2, 3] = np.nan
    save_volume(path, array, np.eye(4))
    with pytest.raises(DataError, match="bad.nii.gz: .*NaN or infinity in 1 of 120 voxels"):
        load_volume(path)
    with pytest.raises(DataError, match="bad.nii.gz: expected 32-bit integer labels"):
        load_labels(path)
    save_volume(path, blank(0.5, np.float32), np.eye(4))
    with pytest.raises(DataError, match=r"expected integer labels, got 120 voxels .* \(0.5\)"):
        load_labels(path)
    sheared = np.eye(4)
    sheared[0, 2] = 0.3
    save_volume(path, blank(), sheared)
    with pytest.raises(DataError, match="affine of .*bad.nii.gz: expected axes at right angles"):
        load_volume(path)


def test_truncated_files_are_refused(tmp_path):
    path = tmp_path / "cut.nii.gz"
    noise = np.random.default_rng(0).integers(0, 255, (30, 30, 30)).astype(np.uint8)
    save_volume(path, noise, np.eye(4))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cut.nii.gz: expected a readable NIfTI file"):
        load_volume(path)
    with gzip.open(path, "wb") as stream:  # a complete gzip of half a NIfTI
        stream.write(gzip.decompress(whole)[:9000])
    with pytest.raises(DataError, match="cut.nii.gz: expected a readable NIfTI file"):
        load_volume(path)


def test_labels_keep_large_values(tmp_path):
    save_volume(tmp_path / "l.nii.gz", blank(1035, np.int32), np.eye(4))
    assert (load_labels(tmp_path / "l.nii.gz").array == 1035).all()


def test_save_volume_writes_a_complete_file_or_none(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "v.nii.gz"
    save_volume(path, blank(3), np.eye(4))
    before = path.read_bytes()

    def full(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        save_volume(path, blank(4), np.eye(4))
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["v.nii.gz"]


def test_masks_must_fit_their_image(tmp_path):
    empty, other = blank(), blank(1, shape=(4, 5, 7))
    write_case(tmp_path / "s1", masks={"liver": blank(1), "spleen": empty, "aorta": other})
    moved = np.eye(4)
    moved[2, 3] = 0.6
    save_volume(tmp_path / "s1" / "segmentations" / "heart.nii.gz", blank(1), moved)
    (case,) = find_cases(tmp_path)
    image = case.load_image()
    mask = case.load_mask("liver", image)
    assert mask.dtype == bool and mask.all()
    with pytest.raises(DataError, match="spleen.nii.gz: .*got an empty mask"):
        case.load_mask("spleen", image)
    with pytest.raises(DataError, match=r"shape of ct.nii.gz, \(4, 5, 6\), got \(4, 5, 7\)"):
        case.load_mask("aorta", image)
    with pytest.raises(DataError, match="heart.nii.gz: expected the affine of ct.nii.gz"):
        case.load_mask("heart", image)
    with pytest.raises(DataError, match="s1: expected a structure among aorta, .*got 'brain'"):
        case.load_mask("brain", image)


def test_the_distance_of_two_grids_is_that_in_the_farthest_corner():
    affine = oblique((1.0, 1.0, 2.0))
    turned = affine.copy()
    turned[:3, :3] *= 1.001
    assert grids_apart(turned, affine, (301, 1, 1)) == pytest.approx(0.3)
    assert grids_apart(turned, affine, (1, 1, 301)) == pytest.approx(0.6)
    assert grids_apart(affine, affine, (9, 9, 9)) == 0


def test_totalsegmentator_layout_with_splits(tmp_path):
    write_case(tmp_path / "s0001")
    write_case(tmp_path / "s0002", name="mri.nii.gz")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "meta.csv").write_text("image_id;age;split\ns0001;50;train\ns0002;60;test\n")
    cases = find_cases(tmp_path)
    assert [(c.subject, c.modality, c.split) for c in cases] == [
        ("s0001", "ct", "train"),
        ("s0002", "mr", "test"),
    ]
    assert list(cases[0].structures) == ["liver"]
    (tmp_path / "meta.csv").write_text("image_id;age\ns0001;50\n")
    assert [c.split for c in find_cases(tmp_path)] == [None, None]
    (tmp_path / "meta.csv").write_text("image_id,split\ns0001,train\n")
    with pytest.raises(DataError, match="meta.csv: expected a column image_id"):
        find_cases(tmp_path)


def test_original_layout_reads_its_label_map(tmp_path):
    labels = blank()
    labels[1, 1, 1], labels[2, 2, 2:4] = 3, 7
    save_volume(tmp_path / "c1" / "c1-image.nii.gz", blank(5, np.int16), np.eye(4))
    save_volume(tmp_path / "c1" / "c1-label.nii.gz", labels, np.eye(4))
    (case,) = find_cases(tmp_path, modality="mr")
    assert case.modality == "mr" and list(case.structures) == ["label_3", "label_7"]
    assert case.load_mask("label_7", case.load_image()).sum() == 2
    missing = Case("c1", "ct", case.image_path, {"x": Source(tmp_path / "c1/c1-label.nii.gz", 4)})
    with pytest.raises(DataError, match="at least one voxel of label 4, got an empty mask"):
        missing.load_mask("x", case.load_image())


def test_folders_that_hold_no_cases_are_refused(tmp_path):
    with pytest.raises(DataError, match="nix: expected a folder of cases, got nothing"):
        find_cases(tmp_path / "nix")
    with pytest.raises(DataError, match="got none$"):
        find_cases(tmp_path)
    write_case(tmp_path / "good")
    (tmp_path / "nomask" / "segmentations").mkdir(parents=True)
    save_volume(tmp_path / "nomask" / "ct.nii.gz", blank(1), np.eye(4))
    (tmp_path / "noimage" / "segmentations").mkdir(parents=True)
    save_volume(tmp_path / "half" / "half-image.nii.gz", blank(1), np.eye(4))
    save_volume(tmp_path / "void" / "v-image.nii.gz", blank(1), np.eye(4))
    save_volume(tmp_path / "void" / "v-label.nii.gz", blank(), np.eye(4))
    with pytest.raises(DataError, match="half: expected one .*-label.nii.gz, got 1 and 0"):
        find_cases(tmp_path)
    problems: list[str] = []
    assert [c.subject for c in find_cases(tmp_path, problems=problems)] == ["good"]
    assert len(problems) == 4
    for text in ("got 1 and 0", "noimage: expected one of ct", "nomask: expected masks", "empty"):
        assert sum(text in problem for problem in problems) == 1


def test_window_by_tissue_and_percentile():
    hu = np.array([[[-2000.0, -500, -160, 40, 240, 1300, 3000]]], dtype=np.float32)
    bone, soft = (windowed(hu, window_limits(hu, "ct", name)) for name in ("vertebra_L3", "liver"))
    assert_same_window(bone, ((hu + 500) / 1800).clip(0, 1))
    assert_same_window(soft, ((hu + 160) / 400).clip(0, 1))
    assert windowed(hu, window_limits(hu, "ct", "lung_upper_lobe_left"))[0, 0, 2] > 0.5
    mr = np.arange(1001, dtype=np.float32).reshape(7, 11, 13)
    scaled = windowed(mr, window_limits(mr, "mr"))
    assert scaled.dtype == np.float32 and scaled.min() == 0 and scaled.max() == 1
    assert scaled.ravel()[500] == pytest.approx(0.5, abs=1e-3)
    assert (scaled == 0).sum() == 6 and (scaled == 1).sum() == 6  # half a per cent on each side
    with pytest.raises(ConfigError, match="modality: expected 'ct', 'mr' or 'grey', got 'pet'"):
        window_limits(mr, "pet")
    with pytest.raises(DataError, match="MR image with contrast"):
        window_limits(np.zeros((3, 3, 3)), "mr")
