"""Volumes as people have them: odd headers, scaled labels, rounded positions, and files that other programs left."""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

from fastlora.errors import DataError
from fastlora.medical.data.splits import select_structures
from fastlora.medical.scans import dicom, formats
from fastlora.medical.scans.geometry import MAX_VOXELS, resample
from fastlora.medical.scans.layouts import find_cases
from fastlora.medical.scans.names import structure_name
from fastlora.medical.scans.scan import Scan
from fastlora.medical.scans.single import open_files
from fastlora.medical.scans.volumes import (
    Case,
    Source,
    load_labels,
    load_png,
    load_volume,
    save_volume,
)
from fastlora.medical.scans.windows import check_hounsfield, window_limits, windowed
from tests.support.layouts import Scan as Written
from tests.support.layouts import write_dicom_scan
from tests.support.tolerance import assert_same_affine, assert_same_geometry

HAS_DICOM = importlib.util.find_spec("highdicom") is not None
NEEDS_DICOM = pytest.mark.skipif(not HAS_DICOM, reason="needs highdicom")
LOG = "fastlora.medical"


# ------------------------------------------------------------------------------ intensities


def ct_with_air() -> np.ndarray:
    """A ball of tissue (40 HU) in air (-1000 HU)."""
    places = np.moveaxis(np.indices((20, 20, 20)), 0, -1) - 9.5
    return np.where(np.linalg.norm(places, axis=-1) < 7, 40, -1000).astype(np.int16)


def noisy(image: np.ndarray, sd: float) -> np.ndarray:
    return image + np.random.default_rng(0).normal(0, sd, image.shape).astype(np.float32)


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
        noisy(ct_with_air() + 1024, 15.0),
        (ct_with_air() - 300.0) / 400.0,
        ct_with_air() / 1024.0,
    ],
    ids=["+1024", "0 to 1", "clipped", "+1024 with noise below 0", "z-scored", "-1 to 1"],
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


def test_a_tolerance_is_part_of_the_cache_key(tmp_path):
    """A mask that a loose tolerance accepted is not taken from the cache under a strict one."""
    write_pair(tmp_path, ct_with_air())
    keys = {find_cases(tmp_path, tolerance_mm=mm)[0].stamp("x") for mm in (None, 0.1, 5.0)}
    assert len(keys) == 3


def test_crops_and_padding_of_a_ct_are_accepted_or_not_by_their_tissue():
    check_hounsfield(ct_with_air().astype(np.float32), "a")
    check_hounsfield(noisy(np.full((20, 20, 20), -90.0), 10.0), "a crop of fat")
    soft = np.clip(noisy(np.full((20, 20, 20), 45.0), 30.0), -160, 240)
    check_hounsfield(soft, "a crop of soft tissue, clipped to its window")
    for dense in (1300, 1500):
        bone = noisy(np.full((20, 20, 20), 30.0), 40.0)
        bone[:, :, :8] = dense  # 40 %
        check_hounsfield(bone, "a crop of dense bone or metal, without air")
    shifted = noisy(ct_with_air() + 1024, 15.0)
    with pytest.raises(
        DataError, match="such as --intercept -1024; .*, --intercept 0; .* --modality mr"
    ):
        check_hounsfield(shifted, "a")
    metal = ct_with_air().astype(np.float32)
    metal[5:15, 5:15, 5:15] = 3000  # an eighth
    check_hounsfield(metal, "metal, and air around it")
    check_hounsfield(np.full((4, 4, 4), -2000.0, np.float32), "padding alone")
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
    assert np.ptp(windowed(image, window_limits(image, "mr"))[50:70, 50:70, 50:70]) > 0.7
    undershoot = image.copy()
    undershoot[:40] = -0.001  # as after an interpolation
    assert window_limits(undershoot, "mr") == pytest.approx((0, high), abs=0.01)
    undershoot[0, 0, 0] = -1
    undershoot[119, 0, 0] = 1e6
    assert window_limits(undershoot, "mr") == pytest.approx((0, high), rel=0.01, abs=0.01)
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
    assert_same_geometry(read.affine, affine)


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


# ------------------------------------------------------------------------------ other formats


def oblique_affine() -> np.ndarray:
    affine = np.eye(4)
    turn = Rotation.from_euler("xyz", (10, -15, 25), degrees=True).as_matrix()
    affine[:3, :3] = turn @ np.diag([0.8, -1.5, 2.5])
    affine[:3, 3] = (12, -34, 56)
    return affine


def write_as(path: Path, array: np.ndarray, affine: np.ndarray, compress: bool = True) -> Path:
    """A volume in the format of the path's extension; affine: index to RAS mm."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".mgz", ".mgh"):
        nib.save(nib.MGHImage(array, affine), path)
    elif formats.ending(path) in (".nii", ".nii.gz", ".hdr"):
        nib.save(
            (nib.Nifti1Pair if path.suffix == ".hdr" else nib.Nifti1Image)(array, affine), path
        )
    else:
        import SimpleITK

        lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
        spacing = np.linalg.norm(lps[:3, :3], axis=0)
        image = SimpleITK.GetImageFromArray(array.T)
        image.SetSpacing(spacing.tolist())
        image.SetOrigin(lps[:3, 3].tolist())
        image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
        SimpleITK.WriteImage(image, str(path), compress)
    return path


NEEDS_ITK = pytest.mark.skipif(
    importlib.util.find_spec("SimpleITK") is None, reason="needs SimpleITK"
)
OTHERS = [
    *(".mgz", ".mgh", ".hdr", ".nii"),
    *(pytest.param(e, marks=NEEDS_ITK) for e in (".mha", ".mhd", ".nrrd", ".nhdr")),
]


NIBABELS_MGH = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
"""nibabel leaves a `.mgh` file open until it is collected."""


@NIBABELS_MGH
@pytest.mark.parametrize("ending", OTHERS)
def test_every_format_gives_the_voxels_and_positions_of_nifti(ending, tmp_path):
    rng = np.random.default_rng(0)
    image, affine = rng.integers(-900, 900, (5, 6, 7)).astype(np.int16), oblique_affine()
    expected = load_volume(write_as(tmp_path / "a.nii.gz", image, affine))
    for compress in (True, False):
        found = load_volume(write_as(tmp_path / f"b{ending}", image, affine, compress))
        np.testing.assert_array_equal(found.array, expected.array)
        assert_same_affine(found.affine, expected.affine)  # MGH has float32
    labels = load_labels(write_as(tmp_path / f"l{ending}", np.abs(image) // 300, affine))
    np.testing.assert_array_equal(labels.array, np.abs(expected.array) // 300)


@NIBABELS_MGH
@pytest.mark.parametrize("ending", OTHERS)
def test_layouts_and_single_files_take_every_format(ending, tmp_path):
    image, affine = ct_with_air(), oblique_affine()
    mask = (image > 0).astype(np.uint8)
    write_as(tmp_path / "ts" / "s1" / f"ct{ending}", image, affine)
    write_as(tmp_path / "ts" / "s1" / "segmentations" / f"liver{ending}", mask, affine)
    write_as(tmp_path / "nn" / "imagesTr" / f"a_0000{ending}", image, affine)
    write_as(tmp_path / "nn" / "labelsTr" / f"a{ending}", mask, affine)
    content = {"labels": {"liver": 1}, "channel_names": {"0": "CT"}, "file_ending": ending}
    (tmp_path / "nn" / "dataset.json").write_text(json.dumps(content))
    write_as(tmp_path / "pairs" / "s1" / f"x-image{ending}", image, affine)
    write_as(tmp_path / "pairs" / "s1" / f"x-label{ending}", mask, affine)
    for layout in ("ts", "nn", "pairs"):
        (case,) = find_cases(tmp_path / layout)
        ((name, _),) = case.structures.items()
        assert name == ("label_1" if layout == "pairs" else "liver") and case.modality == "ct"
        assert Scan(case).part(name).mask.sum() == mask.sum()
        assert case.subject in ("s1", "a")
    folder = tmp_path / "ts" / "s1"
    scan = open_files(folder / f"ct{ending}", folder / "segmentations" / f"liver{ending}")
    assert list(scan.case.structures) == ["liver"] and scan.case.subject == "ct"
    assert scan.part("liver").mask.sum() == mask.sum()


@NEEDS_ITK
def test_the_segments_of_a_slicer_file_name_its_labels(tmp_path):
    import SimpleITK

    labels = np.zeros((20, 20, 20), np.uint8)
    labels[2:8, 2:8, 2:8], labels[10:18, 10:18, 10:18] = 1, 4
    image = SimpleITK.GetImageFromArray(labels)
    for n, (name, value) in enumerate((("Left Kidney", 1), ("Leber", 4))):
        image.SetMetaData(f"Segment{n}_Name", name)
        image.SetMetaData(f"Segment{n}_LabelValue", str(value))
    SimpleITK.WriteImage(image, str(tmp_path / "x.seg.nrrd"), True)
    image = SimpleITK.GetImageFromArray(labels.astype(np.int16) - 1)
    SimpleITK.WriteImage(image, str(tmp_path / "ct.nrrd"))
    scan = open_files(tmp_path / "ct.nrrd", tmp_path / "x.seg.nrrd", every_label=True)
    assert {n: s.label for n, s in scan.case.structures.items()} == {"left_kidney": 1, "leber": 4}


@NEEDS_ITK
@pytest.mark.parametrize("ending", [".mhd", ".nhdr"])
def test_a_header_never_reads_a_file_of_another_folder(ending, tmp_path):
    path = write_as(tmp_path / "in" / f"v{ending}", ct_with_air(), np.eye(4), compress=False)
    (raw,) = (p for p in path.parent.iterdir() if p != path)
    raw.rename(tmp_path / raw.name)
    plain = path.read_text()
    for named in (f"../{raw.name}", str(tmp_path / raw.name), f"LIST\n{tmp_path / raw.name}"):
        path.write_text(plain.replace(raw.name, named))
        with pytest.raises(DataError, match="expected voxels in one file of the same folder"):
            load_volume(path)
    first, _, rest = plain.replace(raw.name, f"../{raw.name}").partition("\n")
    if ending == ".mhd":  # MetaIO also accepts colons, empty lines, and several fields in a line
        whole = f"{first}\n{rest}"
        field = "ElementDataFile = "
        others = [
            whole.replace(field, "ElementDataFile: "),
            f"{first}\n\n{rest}",
            whole.replace(f"\n{field}", f" {field}"),
        ]
    else:
        others = ["\n".join([first, *["# " + 900 * "x"] * 80, rest])]
    for header in others:
        path.write_text(header)
        with pytest.raises(DataError, match="expected voxels in one file of the same folder"):
            load_volume(path)


@NEEDS_ITK
@pytest.mark.parametrize("ending", [".mhd", ".nhdr"])
def test_a_header_whose_end_is_too_far_is_refused(ending, tmp_path):
    path = write_as(tmp_path / f"v{ending}", ct_with_air(), np.eye(4), compress=False)
    first, _, rest = path.read_text().partition("\n")
    line = f"Note = {900 * 'x'}" if ending == ".mhd" else "# " + 900 * "x"
    path.write_text("\n".join([first, *[line] * 1300, rest]))
    with pytest.raises(DataError, match="expected a header of at most 1,048,576 bytes"):
        load_volume(path)


@NEEDS_ITK
def test_damaged_and_huge_headers_are_one_line(tmp_path):
    path = write_as(tmp_path / "v.mha", ct_with_air(), np.eye(4), compress=False)
    whole = path.read_bytes()
    for data in (
        whole[:200],
        whole.replace(b"DimSize = 20 20 20", b"DimSize = 9999 9999 9999"),
        b"no",
        whole[:-2000],
    ):
        path.write_bytes(data)
        with pytest.raises(DataError, match="v.mha: expected a readable MetaImage file"):
            load_volume(path)
    path = tmp_path / "v.nrrd"
    path.write_bytes(
        b"NRRD0004\ntype: int16\ndimension: 3\nsizes: 9999 9999 9999\nencoding: raw\n\n12"
    )
    with pytest.raises(DataError, match="v.nrrd: expected a readable NRRD file"):
        load_volume(path)
    (tmp_path / "v.mgz").write_bytes(b"no")
    with pytest.raises(DataError, match="v.mgz: expected a readable MGH file"):
        load_volume(tmp_path / "v.mgz")


@NEEDS_ITK
def test_a_channel_of_a_multichannel_file(tmp_path):
    import SimpleITK

    first, second = ct_with_air(), ct_with_air() - 7
    image = SimpleITK.GetImageFromArray(np.stack([first.T, second.T], axis=-1), isVector=True)
    SimpleITK.WriteImage(image, str(tmp_path / "v.mha"))
    lps = nib.as_closest_canonical(nib.Nifti1Image(second, np.diag([-1.0, -1.0, 1.0, 1.0])))
    np.testing.assert_array_equal(load_volume(tmp_path / "v.mha", 1).array, np.asarray(lps.dataobj))
    with pytest.raises(DataError, match="2 channels, choose one with --channel"):
        load_volume(tmp_path / "v.mha")


def test_a_missing_simpleitk_is_named_with_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    (tmp_path / "v.mha").write_bytes(b"ObjectType = Image")
    with pytest.raises(DataError, match="v.mha: .*read by SimpleITK.*pip install SimpleITK"):
        load_volume(tmp_path / "v.mha")


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
    np.testing.assert_array_equal(np.rint(volume.array[0, 0] * 255), 10 * np.arange(12))
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
def test_files_of_dicom_without_an_image_are_named(tmp_path):
    import pydicom.data

    for name, kind in (
        ("rtstruct.dcm", "RTSTRUCT"),
        ("rtdose.dcm", "RTDOSE"),
        ("test-SR.dcm", "SR"),
    ):
        file = Path(pydicom.data.get_testdata_file(name))
        with pytest.raises(DataError, match=f"{name}: expected an image, got {kind} '"):
            load_volume(file)
        with pytest.raises(DataError, match=f"expected a DICOM SEG, got {kind}") as caught:
            dicom.read_segmentation(file)
        assert ("contours" in str(caught.value)) == (kind == "RTSTRUCT")


@NEEDS_DICOM
def test_a_data_set_with_contours_only_is_told_so_and_a_channel_is_no_series(series):
    import pydicom.data

    root, written = series
    seg = next(p for p in (root / "s1").rglob("*.dcm") if p.parent.name != "images")
    image = open_files(root / "s1" / "images", seg, label=1, channel=0).image
    assert image.array.shape == written.array.shape
    seg.unlink()
    (root / "s1" / "rt.dcm").write_bytes(
        Path(pydicom.data.get_testdata_file("rtstruct.dcm")).read_bytes()
    )
    with pytest.raises(DataError, match="got an RTSTRUCT, whose contours"):
        find_cases(root)


@NEEDS_DICOM
def test_a_missing_decoder_is_one_line_that_says_what_to_install(series):
    """JPEG lossless, whose decoders are not among the packages of the tests."""
    from pydicom.encaps import encapsulate
    from pydicom.uid import JPEGLosslessSV1

    if importlib.util.find_spec("pylibjpeg") or importlib.util.find_spec("gdcm"):
        pytest.skip("a decoder is installed")
    root, _ = series

    def compress(item, number):
        item.file_meta.TransferSyntaxUID = JPEGLosslessSV1
        item.PixelData = encapsulate([b"\xff\xd8\xff\xd9"])
        item["PixelData"].VR = "OB"

    edit(root, compress)
    with pytest.raises(DataError, match="pip install pylibjpeg pylibjpeg-libjpeg") as caught:
        load_volume(root / "s1" / "images")
    assert "\n" not in str(caught.value)


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
    grey = windowed(scan.image.array, window_limits(scan.image.array, "mr"))
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
    with pytest.raises(DataError, match="its voxels lie up to 0.8 mm from those of the image"):
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
    with pytest.raises(DataError, match="expected every case once, got .*p0/label.nii.gz twice"):
        find_cases(root)
    problems: list[str] = []
    assert len(find_cases(root, problems=problems)) == 3 and len(problems) == 1


def test_names_that_differ_in_case_or_meet_a_path_are_other_subjects(tmp_path):
    """`splits_final.json` names a case as the files do, if no other has the name."""
    pairs = [(f"i/{n}.nii.gz", f"l/{n}.nii.gz") for n in ("P0", "p0", "l_p0", "q")]
    root = listed(tmp_path, {"1": "liver"}, pairs)
    (root / "splits_final.json").write_text(
        json.dumps([{"train": ["P0", "q"], "val": ["p0", "l_p0"]}])
    )
    cases = find_cases(root)
    assert len({case.subject.lower() for case in cases}) == 4
    by_file = {case.source("liver").path.name: (case.subject, case.split) for case in cases}
    assert by_file["q.nii.gz"] == ("q", "train")
    assert {name: split for name, (_, split) in by_file.items()} == {
        "P0.nii.gz": "train", "p0.nii.gz": "val", "l_p0.nii.gz": "val", "q.nii.gz": "train"
    }  # fmt: skip


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
    save_volume(tmp_path / "ts" / "s1" / "ct.nii", image, eye)
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
    assert caplog.text.count("which is not used") == 2  # each once
    assert "ct.nii.gz: there is also ct.nii, which is not used" in caplog.text
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


@NEEDS_DICOM
def test_an_enhanced_multi_frame_file_is_a_volume(series):
    import highdicom
    import pydicom

    root, written = series
    slices = [pydicom.dcmread(path) for path in sorted((root / "s1" / "images").iterdir())]
    for item in slices:
        item.AcquisitionNumber = 1
    enhanced = highdicom.legacy.LegacyConvertedEnhancedCTImage(
        legacy_datasets=slices,
        series_instance_uid=pydicom.uid.generate_uid(),
        series_number=2,
        sop_instance_uid=pydicom.uid.generate_uid(),
        instance_number=1,
    )
    enhanced.save_as(root / "frames.dcm")
    volume = load_volume(root / "frames.dcm")
    np.testing.assert_array_equal(volume.array, expected_in_ras(written))
    (case,) = find_cases(root)
    assert_same_affine(volume.affine, case.load_image().affine)


@NEEDS_DICOM
@pytest.mark.parametrize(
    "name",
    [
        "MR_small_RLE.dcm",
        "MR_small_jp2klossless.dcm",
        "MR_small_jpeg_ls_lossless.dcm",
        "CT_small.dcm",
    ],
)
def test_compressed_files_have_the_voxels_of_pydicom_or_name_the_missing_package(name):
    import pydicom
    from pydicom.data import get_testdata_file

    path = Path(str(get_testdata_file(name, download=False)))
    try:
        volume = load_volume(path)
    except DataError as error:
        assert "jpeg_ls" in name and "pylibjpeg" in str(error) and "\n" not in str(error)
        return
    item = pydicom.dcmread(path)
    plain = pydicom.dcmread(str(get_testdata_file("MR_small.dcm"))) if "MR" in name else item
    pixels = plain.pixel_array.astype(np.float32)
    pixels = pixels * float(item.get("RescaleSlope", 1)) + float(item.get("RescaleIntercept", 0))
    axes = np.array(item.ImageOrientationPatient, float).reshape(2, 3)
    assert (
        axes == [[1, 0, 0], [0, 1, 0]]
    ).all()  # columns to the left, rows to the back: both reversed in RAS
    np.testing.assert_array_equal(volume.array[:, :, 0], pixels.T[::-1, ::-1])
