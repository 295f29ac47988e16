"""Volumes as people have them: odd headers, scaled labels, rounded positions, and files that other programs left."""

from __future__ import annotations

import importlib.util
import json
import logging
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from fastlora.errors import DataError
from fastlora.medical.data import dicom
from fastlora.medical.data.geometry import MAX_VOXELS, resample
from fastlora.medical.data.layouts import find_cases, structure_name
from fastlora.medical.data.scan import Scan
from fastlora.medical.data.single import open_files
from fastlora.medical.data.splits import select_structures
from fastlora.medical.data.volumes import (
    Case,
    Source,
    load_labels,
    load_png,
    load_volume,
    save_volume,
)
from fastlora.medical.data.windows import check_hounsfield, window, window_limits
from tests.support.layouts import Scan as Written
from tests.support.layouts import write_dicom_scan

HAS_DICOM = importlib.util.find_spec("highdicom") is not None
NEEDS_DICOM = pytest.mark.skipif(not HAS_DICOM, reason="needs highdicom")
LOG = "fastlora.medical"


# ------------------------------------------------------------------------------ intensities


def ct_with_air() -> np.ndarray:
    """A ball of tissue (40 HU) in air (-1000 HU)."""
    places = np.moveaxis(np.indices((20, 20, 20)), 0, -1) - 9.5
    return np.where(np.linalg.norm(places, axis=-1) < 7, 40, -1000).astype(np.int16)


def write_pair(folder: Path, image: np.ndarray, affine: np.ndarray | None = None) -> Path:
    affine = np.diag([2.0, 2.0, 2.0, 1.0]) if affine is None else affine
    save_volume(folder / "s" / "ct.nii.gz", image, affine)
    save_volume(
        folder / "s" / "segmentations" / "x.nii.gz", (image > image.min()).astype(np.uint8), affine
    )
    return folder


@pytest.mark.parametrize(
    "stored",
    [
        ct_with_air() + 1024,
        (ct_with_air() + 1024).astype(np.float32) / 4095,
        np.maximum(ct_with_air(), 0),
    ],
    ids=["+1024", "0 to 1", "clipped"],
)
def test_a_ct_without_hounsfield_units_is_refused_and_the_intercept_mends_it(stored, tmp_path):
    write_pair(tmp_path, stored)
    (case,) = find_cases(tmp_path)
    with pytest.raises(
        DataError, match="ct.nii.gz: expected Hounsfield units in a CT.*--intercept"
    ):
        case.load_image()
    (case,) = find_cases(tmp_path, intercept=0.0)
    np.testing.assert_array_equal(case.load_image().array, stored.astype(np.float32))


def test_an_intercept_is_added_and_is_part_of_the_cache_key(tmp_path):
    write_pair(tmp_path, ct_with_air() + 1024)
    (shifted,) = find_cases(tmp_path, intercept=-1024.0)
    np.testing.assert_array_equal(shifted.load_image().array, ct_with_air())
    assert shifted.stamp("x") != replace(shifted, intercept=None).stamp("x")
    grey = open_files(
        tmp_path / "s" / "ct.nii.gz", tmp_path / "s/segmentations/x.nii.gz", intercept=-1024.0
    ).image
    np.testing.assert_array_equal(grey.array, ct_with_air())


def test_crops_and_padding_of_a_ct_are_accepted_or_not_by_their_tissue():
    check_hounsfield(ct_with_air().astype(np.float32), "a")
    fat = np.full((4, 4, 4), -90.0, np.float32)
    check_hounsfield(fat, "a crop without air")
    padded = np.full((4, 4, 4), -2000.0, np.float32)  # outside the circle of the scanner
    padded[1:3] = 1024
    with pytest.raises(
        DataError, match="a: expected Hounsfield units in a CT, got values from 1024"
    ):
        check_hounsfield(padded, "a")


def test_an_mr_image_in_a_large_empty_margin_keeps_its_contrast():
    rng = np.random.default_rng(0)
    tissue = rng.uniform(200, 800, (20, 20, 20)).astype(np.float32)
    image = np.zeros((120, 120, 120), np.float32)
    image[50:70, 50:70, 50:70] = tissue  # 0.46 % of the voxels
    low, high = window_limits(image, "mr")
    assert low == 0 and high == pytest.approx(np.percentile(tissue, 99.5))
    assert np.ptp(window(image, "mr")[50:70, 50:70, 50:70]) > 0.7
    ordinary = np.zeros((40, 40, 40), np.float32)
    ordinary[10:30, 10:30, 10:30] = tissue  # 12.5 %: as before
    expected = tuple(np.percentile(ordinary, (0.5, 99.5)))
    assert window_limits(ordinary, "mr") == pytest.approx(expected)
    with pytest.raises(DataError, match="expected an MR image with contrast"):
        window_limits(np.full((5, 5, 5), 3, np.float32), "mr")


# ------------------------------------------------------------------------------ geometry of NIfTI


@pytest.mark.parametrize(
    ("unit", "factor"), [("mm", 1), ("meter", 1e-3), ("micron", 1e3), ("unknown", 1)]
)
def test_the_unit_of_the_header_is_converted_to_mm(unit, factor, tmp_path):
    affine = np.diag([2.0, 1.5, 3.0, 1.0])
    affine[:3, 3] = (10, -20, 30)
    stored = affine.copy()
    stored[:3] *= factor
    image = nib.Nifti1Image(ct_with_air(), stored)
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path / "v.nii.gz")
    read = load_volume(tmp_path / "v.nii.gz")
    np.testing.assert_allclose(read.affine, affine, rtol=1e-6)


def test_a_grid_too_large_for_memory_is_one_line_and_the_other_cases_go_on(tmp_path):
    """A header that claims metres for values in mm: 40 m of patient."""
    image = nib.Nifti1Image(ct_with_air(), np.diag([2.0, 2.0, 2.0, 1.0]))
    image.header.set_xyzt_units("meter")
    write_pair(tmp_path, ct_with_air())
    nib.save(image, tmp_path / "s" / "ct.nii.gz")
    mask = nib.Nifti1Image((ct_with_air() > 0).astype(np.uint8), image.affine)
    mask.header.set_xyzt_units("meter")
    nib.save(mask, tmp_path / "s" / "segmentations" / "x.nii.gz")
    from fastlora.medical.data.grids import StructureGrid

    (case,) = find_cases(tmp_path)
    with pytest.raises(
        DataError, match=f"s: x: grid: expected at most {MAX_VOXELS:,} voxels.*map to mm"
    ):
        StructureGrid.read(Scan(case), "x")
    with pytest.raises(DataError, match="grid: expected at most"):
        resample(np.zeros((2, 2, 2)), np.eye(4), np.eye(4), (10_000, 10_000, 10_000))


def test_an_assumed_orientation_is_said(tmp_path, caplog):
    image = nib.Nifti1Image(ct_with_air(), np.diag([2.0, 2.0, 2.0, 1.0]))
    image.set_qform(None, 0)
    image.set_sform(None, 0)
    nib.save(image, tmp_path / "ct.nii.gz")
    with caplog.at_level(logging.WARNING, LOG):
        assert not load_volume(tmp_path / "ct.nii.gz").oriented
    assert "ct.nii.gz: the header states no orientation" in caplog.text
    image.set_sform(np.diag([2.0, 2.0, 2.0, 1.0]), 1)
    nib.save(image, tmp_path / "ct.nii.gz")
    assert load_volume(tmp_path / "ct.nii.gz").oriented


def test_affines_that_differ_a_little_are_said_and_those_that_matter_are_refused(tmp_path, caplog):
    affine = np.diag([0.8, 0.8, 1.5, 1.0])
    image = np.full((300, 20, 20), -5, np.int16)
    image[100:110, 5:15, 5:15] = 40
    save_volume(tmp_path / "s" / "ct.nii.gz", image, affine)
    label = tmp_path / "s" / "segmentations" / "x.nii.gz"

    def mask_with(difference: float, **changes: float) -> np.ndarray:
        other = affine.copy()
        other[0, 0] += difference  # 299 times that in the far corner
        save_volume(label, (image > 0).astype(np.uint8), other)
        (case,) = find_cases(tmp_path, **changes)
        part = Scan(case).part("x")
        return np.argwhere(part.mask) + part.start

    expected = np.argwhere(image > 0)
    for difference, said in ((1e-6, False), (1e-3, True)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, LOG):
            np.testing.assert_array_equal(mask_with(difference), expected)
        assert (
            "x.nii.gz: its affine differs from that of ct.nii.gz, by 0.3 mm" in caplog.text
        ) is said
    with pytest.raises(DataError, match=r"0.598 mm apart, more than --grid_tolerance 0.4"):
        mask_with(2e-3)
    np.testing.assert_array_equal(mask_with(2e-3, tolerance_mm=1.0), expected)
    with pytest.raises(DataError, match=r"0.299 mm apart, more than --grid_tolerance 0.1"):
        mask_with(1e-3, tolerance_mm=0.1)


# ------------------------------------------------------------------------------ labels


def scaled(path: Path, values: np.ndarray, slope: float, inter: float = 0.0) -> Path:
    """A NIfTI file of stored values with a scaling."""
    image = nib.Nifti1Image(values, np.eye(4))
    image.header.set_slope_inter(slope, inter)
    nib.save(image, path)
    return path


def test_labels_changed_by_a_scaling_are_rounded(tmp_path):
    stored = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    path = scaled(tmp_path / "l.nii.gz", stored, 1.00001)
    np.testing.assert_array_equal(load_labels(path).array, stored)
    nib.save(nib.Nifti1Image(stored + 1e-5, np.eye(4)), path)
    np.testing.assert_array_equal(load_labels(path).array, stored)
    mask = (stored > 11).astype(np.uint8)
    for slope in (1 / 255, 255.0, 0.37):  # 0 and one other value: a mask
        labels = load_labels(scaled(path, mask, slope)).array
        np.testing.assert_array_equal(labels != 0, mask == 1)


def test_values_that_are_no_labels_are_named(tmp_path):
    values = np.zeros((4, 4, 4), np.float32)
    values[0, 0] = (0.25, 0.5, 0.75, 2)
    nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / "p.nii.gz")
    with pytest.raises(
        DataError, match=r"got 3 voxels of 3 other values \(0.25, 0.5, 0.75\); probabilities"
    ):
        load_labels(tmp_path / "p.nii.gz")


# ------------------------------------------------------------------------------ stacks of PNG


def stack(folder: Path, names: list[str]) -> Path:
    folder.mkdir()
    for n, name in enumerate(names):
        Image.fromarray(np.full((4, 5), 10 * n, np.uint8)).save(folder / name)
    return folder


@pytest.mark.parametrize("pattern", ["slice{}.png", "{}.png", "a1_{}_x.PNG", "s{:03d}.png"])
def test_the_slices_of_a_stack_are_sorted_by_number(pattern, tmp_path, caplog):
    folder = stack(tmp_path / "s", [pattern.format(n) for n in range(12)])
    (folder / "._slice1.png").write_bytes(b"of macOS")
    with caplog.at_level(logging.WARNING, LOG):
        volume = load_png(folder, (1, 1, 2))
    np.testing.assert_allclose(volume.array[0, 0] * 255, 10 * np.arange(12), atol=1e-4)
    assert not caplog.text


def test_a_gap_in_a_stack_is_said(tmp_path, caplog):
    folder = stack(tmp_path / "s", [f"s{n}.png" for n in (1, 2, 3, 7, 8)])
    with caplog.at_level(logging.WARNING, LOG):
        assert load_png(folder, (1, 1, 1)).shape == (5, 4, 5)
    assert "got s7.png after s3.png" in caplog.text


def test_an_image_and_a_mask_of_other_slices_are_refused(tmp_path):
    image = stack(tmp_path / "i", [f"s{n}.png" for n in (1, 2, 3)])
    mask = stack(tmp_path / "m", [f"mask_{n}.png" for n in (2, 3, 4)])
    with pytest.raises(
        DataError, match=r"mask_2.png: expected the slices of .*i, 1 to 3, got 2 to 4"
    ):
        open_files(image, mask, spacing=(1, 1, 1))


# ------------------------------------------------------------------------------ DICOM


@pytest.fixture
def series(tmp_path) -> tuple[Path, Written]:
    """A subject's folder with a CT series and its SEG."""
    grid = ct_with_air()[:, :, :8]
    written = Written("s1", "ct", grid, np.diag([2.0, 2.0, 2.0, 1.0]), {"ball": grid > 0})
    write_dicom_scan(tmp_path / "s1", written)
    return tmp_path, written


def edit(folder: Path, change) -> None:
    """Rewrites every slice of a series after change(dataset, number)."""
    import pydicom

    for number, path in enumerate(sorted((folder / "s1" / "images").iterdir())):
        item = pydicom.dcmread(path)
        change(item, number)
        item.save_as(path)


@NEEDS_DICOM
def test_monochrome1_keeps_the_hounsfield_units(series):
    root, written = series

    def invert(item, number):
        item.PhotometricInterpretation = "MONOCHROME1"

    edit(root, invert)
    (case,) = find_cases(root)
    np.testing.assert_array_equal(case.load_image().array, expected_in_ras(written))


def expected_in_ras(written: Written) -> np.ndarray:
    image = nib.as_closest_canonical(nib.Nifti1Image(written.array, written.affine))
    return np.asarray(image.dataobj)


@NEEDS_DICOM
def test_monochrome1_of_mr_is_bright_where_it_is_shown_bright(tmp_path):
    grid = np.where(ct_with_air()[:, :, :6] > 0, 100, 700).astype(np.int16)
    written = Written("s1", "mr", grid, np.diag([2.0, 2.0, 2.0, 1.0]), {"ball": grid < 200})
    write_dicom_scan(tmp_path / "s1", written)
    edit(tmp_path, lambda item, number: setattr(item, "PhotometricInterpretation", "MONOCHROME1"))
    (case,) = find_cases(tmp_path)
    scan = Scan(case)
    grey = window(scan.image.array, "mr")
    part = scan.part("ball")
    assert grey[part.box][part.mask].min() > 0.9 and grey.min() < 0.1


@NEEDS_DICOM
def test_rounded_orientations_and_positions_are_one_series_with_its_seg(series):
    root, written = series

    def jitter(item, number):
        noise = np.random.default_rng(number).uniform(-0.03, 0.03, 3)
        item.ImagePositionPatient = [
            f"{x + d:.5f}" for x, d in zip(item.ImagePositionPatient, noise, strict=True)
        ]
        item.ImageOrientationPatient = [
            f"{x + 1e-6 * number:.8f}" for x in item.ImageOrientationPatient
        ]

    edit(root, jitter)
    (case,) = find_cases(root)
    scan = Scan(case)
    np.testing.assert_array_equal(scan.image.array, expected_in_ras(written))
    part = scan.part("ball")
    inside = np.zeros(scan.image.shape, bool)
    inside[part.box] = part.mask
    np.testing.assert_array_equal(inside, expected_in_ras(written) > 0)


@NEEDS_DICOM
@pytest.mark.parametrize("moved", ["position", "orientation"])
def test_what_exceeds_the_tolerances_is_refused(series, moved):
    root, _ = series

    def move(item, number):
        if number == 3 and moved == "position":
            x, y, z = map(float, item.ImagePositionPatient)
            item.ImagePositionPatient = [f"{x:.4f}", f"{y:.4f}", f"{z + 0.9:.4f}"]
        elif number == 3:
            item.ImageOrientationPatient = ["0.99995", "0.01", "0", "-0.01", "0.99995", "0"]

    edit(root, move)
    (case,) = find_cases(root)
    with pytest.raises(DataError, match="expected a series of parallel slices at equal distances"):
        case.load_image()


@NEEDS_DICOM
def test_files_without_preamble_are_part_of_their_series(series, caplog):
    root, written = series
    for path in sorted((root / "s1" / "images").iterdir())[::2]:
        data = path.read_bytes()
        assert data[128:132] == b"DICM"
        path.write_bytes(data[132:])  # group 0002 first
    import pydicom

    path = sorted((root / "s1" / "images").iterdir())[1]
    item = pydicom.dcmread(path)
    item.preamble = None
    del item.file_meta
    pydicom.dcmwrite(path, item, implicit_vr=True, little_endian=True)  # group 0008 first
    assert path.read_bytes()[:2] == b"\x08\x00"
    (root / "s1" / "images" / "README").write_text("notes " * 60)
    with caplog.at_level(logging.WARNING, LOG):
        (case,) = find_cases(root)
        np.testing.assert_array_equal(case.load_image().array, expected_in_ras(written))
    assert "1 files are not DICOM and are ignored, such as README" in caplog.text


def test_other_files_are_not_taken_for_dicom(tmp_path):
    for name, head in (
        ("a.txt", b"text " * 99),
        ("b.json", b'{"a": 1}' * 40),
        ("c", b"\x08\x00" * 99),
    ):
        (tmp_path / name).write_bytes(head)
        assert not dicom.is_dicom(tmp_path / name)


@NEEDS_DICOM
def test_a_seg_half_a_voxel_off_is_refused_unless_it_is_allowed(series):
    import pydicom

    root, _ = series
    path = root / "s1" / "segmentation.dcm"
    item = pydicom.dcmread(path)
    for group in item.PerFrameFunctionalGroupsSequence:
        place = group.PlanePositionSequence[0]
        place.ImagePositionPatient[0] = float(place.ImagePositionPatient[0]) + 1.2
    item.save_as(path)
    (case,) = find_cases(root)
    with pytest.raises(DataError, match=r"its voxels lie up to 0.8 mm from those|1.2 mm"):
        Scan(replace(case, tolerance_mm=0.5)).part("ball")
    assert Scan(case).part("ball").mask.any()  # moved to the next voxel: 0.8 mm


def test_label_stamps_and_json_stay_as_they_were(tmp_path):
    """A case without the new settings has the cache key of earlier versions."""
    write_pair(tmp_path, ct_with_air())
    (case,) = find_cases(tmp_path)
    assert len(case.stamp("x")) == 6 and json.dumps(case.stamp("x"))
    assert Case("s", "ct", case.image_path, {"x": Source(case.source("x").path)}).stamp(
        "x"
    ) == case.stamp("x")


# ------------------------------------------------------------------------------ names of subjects and structures


def listed(root: Path, labels: dict, training: list[tuple[str, str]], **more) -> Path:
    """A Decathlon folder; each case has its own constant image and one block of each label."""
    for n, (image, label) in enumerate(training):
        save_volume(root / image, np.full((40, 40, 40), -100 * n - 1, np.int16), np.eye(4))
        array = np.zeros((40, 40, 40), np.uint8)
        for value in range(1, 6):
            array[6 * value : 6 * value + 5, 10:30, 10 : 20 + n] = value
        save_volume(root / label, array, np.eye(4))
    entries = [{"image": image, "label": label} for image, label in training]
    content = {"labels": labels, "modality": {"0": "CT"}, "training": entries, **more}
    (root / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    return root


def test_equal_file_names_in_other_folders_are_other_subjects(tmp_path):
    pairs = [(f"{p}/image.nii.gz", f"{p}/label.nii.gz") for p in ("p0", "p1")]
    pairs.append(("imagesTr/p7.nii.gz", "labelsTr/p7.nii.gz"))
    root = listed(tmp_path, {"1": "liver"}, pairs)
    cases = find_cases(root)
    assert [case.subject for case in cases] == ["p0_label", "p1_label", "p7"]
    for n, case in enumerate(cases):
        assert case.load_image().array[0, 0, 0] == -100 * n - 1
        assert Scan(case).part("liver").mask.shape == (5, 20, 10 + n)
    listed(root, {"1": "liver"}, [*pairs, pairs[0]])
    with pytest.raises(DataError, match="expected every label file once, got p0_label twice"):
        find_cases(root)


def test_labels_of_any_script_and_with_signs_are_structures(tmp_path):
    names = {"1": "肝脏", "2": "Gro\u0308ße", "3": "T1", "4": "T1+", "5": "Left Kidney (L)"}
    root = listed(tmp_path, names, [("i/a.nii.gz", "l/a.nii.gz")])
    (case,) = find_cases(root)
    assert {n: s.label for n, s in case.structures.items()} == {
        "肝脏": 1, "größe": 2, "t1_3": 3, "t1_4": 4, "left_kidney_l": 5
    }  # fmt: skip
    for asked, name in (
        *(("肝脏", "肝脏"), ("Größe", "größe"), ("T1+", "t1_4"), ("T1", "t1_3")),
        *(
            ("Left Kidney (L)", "left_kidney_l"),
            ("LEFT kidney l", "left_kidney_l"),
            ("t1_3", "t1_3"),
        ),
    ):
        (chosen,) = select_structures([case], [asked])
        assert list(chosen.structures) == [name], asked
    with pytest.raises(DataError, match="classes: no case has 'T9'"):
        select_structures([case], ["T9"])
    assert (
        structure_name("हिन्दी नाम") == "हिन्दी_नाम"
        and structure_name("Vertebrae L1") == "vertebrae_l1"
    )


def test_files_of_other_programs_are_ignored_in_every_layout(tmp_path, caplog):
    image, mask = ct_with_air(), (ct_with_air() > 0).astype(np.uint8)
    eye = np.eye(4)
    save_volume(tmp_path / "ts" / "s1" / "ct.nii.gz", image, eye)
    save_volume(tmp_path / "ts" / "s1" / "segmentations" / "liver.nii.gz", mask, eye)
    save_volume(tmp_path / "ts" / "s2" / "ct.nii", image, eye)
    save_volume(tmp_path / "ts" / "s2" / "segmentations" / "liver.nii", mask, eye)
    save_volume(tmp_path / "ts" / "s2" / "segmentations" / "liver.nii.gz", mask, eye)
    save_volume(tmp_path / "pairs" / "s1" / "a-image.nii.gz", image, eye)
    save_volume(tmp_path / "pairs" / "s1" / "a-label.nii", mask, eye)
    for name in ("ct.nii.gz", "liver.nii.gz", "a-image.nii.gz", "a-label.nii.gz"):
        for folder in ("ts/s1", "ts/s1/segmentations", "pairs/s1"):
            (tmp_path / folder / f"._{name}").write_bytes(b"of macOS")
    for folder in ("ts/__MACOSX/s1", "pairs/__MACOSX/s1"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "._ct.nii.gz").write_bytes(b"of macOS")
    with caplog.at_level(logging.WARNING, LOG):
        first, second = find_cases(tmp_path / "ts")
    assert caplog.text.count("which is not used") == 1
    assert "liver.nii.gz: there is also liver.nii, which is not used" in caplog.text
    for case in (first, second):
        assert list(case.structures) == ["liver"] and case.modality == "ct"
        assert Scan(case).part("liver").mask.sum() == mask.sum()
    assert second.source("liver").path.name == "liver.nii.gz" and second.image_path.name == "ct.nii"
    (pair,) = find_cases(tmp_path / "pairs")
    assert Scan(pair).part("label_1").mask.sum() == mask.sum()
    save_volume(tmp_path / "ts" / "s1" / "mri.nii", image, eye)
    with pytest.raises(DataError, match="s1: expected one of ct.nii.gz, .*got ct, mri"):
        find_cases(tmp_path / "ts")


def test_nnunets_dataset_key_lists_files_of_any_name(tmp_path):
    root = listed(
        tmp_path,
        {"1": "liver"},
        [("x/one.nii.gz", "y/one.nii.gz"), ("x/two.nii.gz", "y/two.nii.gz")],
    )
    entries = {
        f"case_{n}": {"images": ["x/other.nii.gz", f"x/{n}.nii.gz"], "label": f"y/{n}.nii.gz"}
        for n in ("two", "one")
    }
    content = {
        "labels": {"background": 0, "liver": 1},
        "channel_names": {"0": "MR", "1": "CT"},
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps({**content, "dataset": entries}))
    one, two = find_cases(root, channel=1)
    assert (one.subject, two.subject, one.modality) == ("case_one", "case_two", "ct")
    assert two.load_image().array[0, 0, 0] == -101
    entries["case_one"]["label"] = "../y/one.nii.gz"
    (root / "dataset.json").write_text(json.dumps({**content, "dataset": entries}))
    with pytest.raises(DataError, match="expected paths within"):
        find_cases(root, channel=1)
    entries["case_one"] = {"images": ["x/one.nii.gz"], "label": "y/one.nii.gz"}
    (root / "dataset.json").write_text(json.dumps({**content, "dataset": entries}))
    with pytest.raises(DataError, match="expected 'images' with channel 1 and 'label'"):
        find_cases(root, channel=1)


def test_a_pair_of_header_and_voxels_is_read(tmp_path):
    nib.save(nib.Nifti1Pair(ct_with_air(), np.diag([2.0, 2.0, 2.0, 1.0])), tmp_path / "v.hdr")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v.hdr", "v.img"]
    for name in ("v.hdr", "v.img"):
        volume = load_volume(tmp_path / name)
        np.testing.assert_array_equal(volume.array, ct_with_air())
    nib.save(nib.AnalyzeImage(ct_with_air(), np.eye(4)), tmp_path / "old.hdr")
    with pytest.raises(DataError, match="old.hdr: expected a readable .*the file holds a"):
        load_volume(tmp_path / "old.hdr")


def test_a_4d_image_without_a_channel_says_how_to_choose(tmp_path):
    save_volume(tmp_path / "v.nii.gz", np.zeros((4, 5, 6, 2), np.int16), np.eye(4))
    with pytest.raises(
        DataError, match=r"got \(4, 5, 6, 2\) int16: 2 channels, choose one with --channel"
    ):
        load_volume(tmp_path / "v.nii.gz")
