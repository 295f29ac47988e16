"""Names of subjects, structures and files: distinct, in any script, and of every spelling of a layout."""

from __future__ import annotations

import csv
import io
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from fastlora.errors import DataError
from fastlora.medical.data.manifest import SKIPPED, Outcome, csv_bytes, write_manifest
from fastlora.medical.data.preprocess import PreprocessConfig, preprocess
from fastlora.medical.scans.layouts import find_cases
from fastlora.medical.scans.names import (
    MAX_STEM_BYTES,
    distinct_names,
    file_stem,
)
from fastlora.medical.scans.scan import Scan
from fastlora.medical.scans.volumes import Case, load_labels, save_volume


def write(path: Path, value: int = 1, labels: int = 1) -> None:
    """A label map with a block of 108 voxels for each label from `value` on; without labels an image of air with one voxel of `value`."""
    array = np.full((12, 12, 12), 0 if labels else -1000, np.int16)
    if not labels:
        array[0, 0, 0] = value
    for n in range(labels):
        array[2 + 3 * n : 5 + 3 * n, 3:9, 3:9] = value + n
    save_volume(path, array, np.eye(4))


def list_cases(root: Path, training: list[tuple[str, str]], labels: dict | None = None) -> None:
    """A Decathlon folder of (image, label map) whose images hold 10, 20, …."""
    for n, (image, label) in enumerate(training):
        write(root / image, 10 * (n + 1), labels=0)
        write(root / label)
    entries = [{"image": image, "label": label} for image, label in training]
    labels = labels or {"1": "liver"}
    content = {"modality": {"0": "CT"}, "labels": labels, "training": entries}
    (root / "dataset.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def values(cases: list[Case]) -> dict[str, int]:
    """Subject → the value of its image."""
    return {case.subject: int(case.load_image().array.max()) for case in cases}


# ---------------------------------------------------------------------------- subjects


def test_folders_of_one_name_one_level_deeper_and_through_links(tmp_path):
    for n, site in enumerate(("north", "south"), 1):
        write(tmp_path / "data" / site / "s1" / "ct.nii.gz", n, labels=0)
        write(tmp_path / "data" / site / "s1" / "segmentations" / "liver.nii.gz")
    shutil.copytree(tmp_path / "data/north/s1", tmp_path / "elsewhere")
    (tmp_path / "data" / "s2").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert values(find_cases(tmp_path / "data")) == {"north_s1": 1, "s2": 1, "south_s1": 2}


# ---------------------------------------------------------------------------- structures


# ---------------------------------------------------------------------------- files


def test_file_names_fit_a_file_system():
    assert file_stem("s0001", "liver") == "s0001-liver"
    assert file_stem("a/b", "c") == "a_b-c"
    assert file_stem("a-b", "c") == "a-b-c" != file_stem("a", "b-c")
    first, second = (file_stem("s", "肝" * 100 + end) for end in "ab")
    assert first != second
    assert all(len(stem.encode()) <= MAX_STEM_BYTES for stem in (first, second))


def test_a_long_name_in_another_script_is_cached(tmp_path):
    label = "肝脏" * 50  # 300 bytes
    array = np.zeros((40, 40, 40), np.uint8)
    array[10:30, 10:30, 10:30] = 1
    list_cases(tmp_path / "d", [("i/x.nii.gz", "l/x.nii.gz")], {"1": label})
    save_volume(tmp_path / "d/l/x.nii.gz", array, np.diag([2.0, 2.0, 2.0, 1]))
    image = (np.arange(array.size).reshape(array.shape) % 2000 - 1000).astype(np.int16)
    save_volume(tmp_path / "d/i/x.nii.gz", image, np.diag([2.0, 2.0, 2.0, 1]))
    (outcome,) = preprocess(
        find_cases(tmp_path / "d"), PreprocessConfig(tmp_path / "c", meshes=True)
    )
    assert outcome.structure == label and len(outcome.files) == 2
    assert all((tmp_path / "c" / name).is_file() for name in outcome.files)


# ---------------------------------------------------------------------------- image and label files


@pytest.mark.parametrize("ending", ["_seg", "-seg", "_label", "_mask", "_SEG", "-segmentation"])
def test_images_and_label_maps_side_by_side(tmp_path, ending, caplog):
    for n in (1, 2):
        write(tmp_path / f"case_{n:04d}.nii.gz", n, labels=0)
        write(tmp_path / f"case_{n:04d}{ending}.nii.gz", 3)
    with caplog.at_level(logging.INFO):
        cases = find_cases(tmp_path, "mr")
    assert "layout image/label pairs (2 cases)" in caplog.text
    assert values(cases) == {"case_0001": 1, "case_0002": 2}
    assert [list(case.structures) for case in cases] == [["label_3"]] * 2
    assert cases[0].modality == "mr"


@pytest.mark.parametrize("label", ["label", "seg", "segmentation", "mask"])
@pytest.mark.parametrize(("image", "modality"), [("image", "mr"), ("ct", "ct"), ("scan", "mr")])
def test_a_folder_for_each_case_with_an_image_and_a_label_map(tmp_path, image, label, modality):
    for n in (1, 2):
        write(tmp_path / f"p{n}" / f"{image}.nii.gz", n, labels=0)
        write(tmp_path / f"p{n}" / f"{label}.nii.gz")
    cases = find_cases(tmp_path, "mr")
    assert values(cases) == {"p1": 1, "p2": 2}
    assert {case.modality for case in cases} == {modality}


def test_pairs_one_folder_deeper_are_found(tmp_path):
    for site in ("north", "south"):
        for n in (1, 2):
            write(tmp_path / site / f"c{n}.nii.gz", n, labels=0)
            write(tmp_path / site / f"c{n}_seg.nii.gz")
    assert values(find_cases(tmp_path)) == {
        "north_c1": 1,
        "north_c2": 2,
        "south_c1": 1,
        "south_c2": 2,
    }


@pytest.mark.parametrize(
    ("images", "labels"), [("images", "labels"), ("imagesTr", "labelsTr"), ("Images", "masks")]
)
@pytest.mark.parametrize(
    ("image", "label"),
    [("{}", "{}"), ("{}", "{}_seg"), ("{}_0000", "{}"), ("{}_image", "{}_label")],
)
def test_a_folder_of_images_and_one_of_label_maps(tmp_path, images, labels, image, label, caplog):
    for n in (1, 2):
        write(tmp_path / images / f"{image.format(f'c{n}')}.nii.gz", n, labels=0)
        write(tmp_path / labels / f"{label.format(f'c{n}')}.nii.gz", 3, labels=2)
    caplog.set_level(logging.INFO)
    cases = find_cases(tmp_path, "mr")
    assert "layout image/label pairs (2 cases)" in caplog.text
    assert values(cases) == {image.format("c1"): 1, image.format("c2"): 2}
    assert [list(case.structures) for case in cases] == [["label_3", "label_4"]] * 2
    write(tmp_path / images / "c9.nii.gz", labels=0)
    write(tmp_path / labels / "c8.nii.gz")
    problems: list[str] = []
    assert len(find_cases(tmp_path, "mr", problems)) == 2
    assert problems[0].endswith(f"{labels}/c8.nii.gz, got none of that name")
    assert problems[1].endswith(
        f"expected one label map of {tmp_path / images / 'c9.nii.gz'}, got none"
    )


def test_subject_folders_of_these_names_stay_subjects(tmp_path):
    for n, name in enumerate(("images", "labels")):
        write(tmp_path / name / "image.nii.gz", n, labels=0)
        write(tmp_path / name / "label.nii.gz")
    assert values(find_cases(tmp_path)) == {"images": 0, "labels": 1}
    write(tmp_path / "images" / "b.nii.gz", labels=0)
    with pytest.raises(
        DataError, match="images: expected images, got a label map by its name, label"
    ):
        find_cases(tmp_path)
    for name in ("images", "labels", "masks"):
        write(tmp_path / "three" / name / "a.nii.gz", labels=0)
    with pytest.raises(DataError, match="one folder of images and .*, got images, labels, masks"):
        find_cases(tmp_path / "three")


def test_numbered_channels_of_a_folder_of_images_follow_channel(tmp_path, caplog):
    for n in (0, 1):
        write(tmp_path / "imagesTr" / f"a_{n:04d}.nii.gz", 5 + n, labels=0)
    write(tmp_path / "labelsTr" / "a.nii.gz")
    write(tmp_path / "imagesTr" / "more" / "b.nii.gz", labels=0)
    assert values(find_cases(tmp_path)) == {"a_0000": 5}
    assert values(find_cases(tmp_path, channel=1)) == {"a_0001": 6}
    assert "imagesTr: has folders, which are not read, such as more" in caplog.text
    with pytest.raises(DataError, match="expected the image of .*labelsTr/a.nii.gz, got none"):
        find_cases(tmp_path, channel=2)


def test_a_case_with_a_label_map_keeps_it_beside_a_folder_of_masks(tmp_path):
    """The folder may be a body mask of another tool."""
    write(tmp_path / "pairs" / "c1" / "image.nii.gz", labels=0)
    write(tmp_path / "pairs" / "c1" / "seg.nii.gz", 2, labels=2)
    write(tmp_path / "pairs" / "c1" / "masks" / "body.nii.gz")
    (case,) = find_cases(tmp_path / "pairs")
    assert list(case.structures) == ["label_2", "label_3"]
    write(tmp_path / "ts" / "s1" / "label.nii.gz")
    write(tmp_path / "ts" / "s1" / "segmentations" / "liver.nii.gz")
    with pytest.raises(DataError, match="or one other image, got none"):
        find_cases(tmp_path / "ts", "mr")


@pytest.mark.parametrize("folder", ["segmentations", "masks"])
@pytest.mark.parametrize(("image", "modality"), [("ct", "ct"), ("t2 flair", "mr")])
def test_a_folder_of_masks_in_the_folder_of_a_case(tmp_path, folder, image, modality):
    write(tmp_path / "s1" / f"{image}.nii.gz", 5, labels=0)
    for name in ("liver", "left-lung"):
        write(tmp_path / "s1" / folder / f"{name}.nii.gz")
    (case,) = find_cases(tmp_path, "mr")
    assert (case.modality, sorted(case.structures)) == (modality, ["left-lung", "liver"])
    assert values([case]) == {"s1": 5}
    write(tmp_path / "s1" / "other.nii.gz", labels=0)
    if image == "ct":
        assert values(find_cases(tmp_path)) == {"s1": 5}
    else:
        with pytest.raises(DataError, match=r"or one other image, got other, t2 flair"):
            find_cases(tmp_path)


def test_a_mask_of_several_values_is_said(tmp_path, caplog):
    write(tmp_path / "s1" / "ct.nii.gz", labels=0)
    write(tmp_path / "s1" / "masks" / "organs.nii.gz", 3, labels=2)
    (case,) = find_cases(tmp_path)
    assert Scan(case).part("organs").mask.sum() == 216
    assert "got 2 values (3, 4, …); all of them are taken as organs" in caplog.text


def test_the_channel_of_a_4d_file_in_every_layout(tmp_path):
    """Without --channel none is chosen silently."""
    several = np.stack([np.full((12, 12, 12), value, np.int16) for value in (-7, 8)], axis=3)
    for folder, name in (("ts", "mri"), ("pairs", "image")):
        save_volume(tmp_path / folder / "s1" / f"{name}.nii.gz", several, np.eye(4))
    write(tmp_path / "ts" / "s1" / "segmentations" / "liver.nii.gz")
    write(tmp_path / "pairs" / "s1" / "label.nii.gz")
    for folder in ("ts", "pairs"):
        for channel, value in enumerate((-7, 8)):
            assert values(find_cases(tmp_path / folder, "mr", channel=channel)) == {"s1": value}
        (case,) = find_cases(tmp_path / folder, "mr")
        with pytest.raises(DataError, match="2 channels, choose one with --channel"):
            case.load_image()
        (case,) = find_cases(tmp_path / folder, "mr", channel=2)
        with pytest.raises(DataError, match="expected a channel below 2, got 2"):
            case.load_image()
    save_volume(tmp_path / "label.nii.gz", several, np.eye(4))
    with pytest.raises(DataError, match="2 layers, expected one: segments that overlap"):
        load_labels(tmp_path / "label.nii.gz")


def test_several_images_of_one_label_map_are_named(tmp_path):
    for name in ("t1", "t2", "seg"):
        write(tmp_path / "B1" / f"B1_{name}.nii.gz")
    expected = "B1: expected one .* got 2 and 1: B1_t1.nii.gz, B1_t2.nii.gz, B1_seg.nii.gz"
    with pytest.raises(DataError, match=expected):
        find_cases(tmp_path)


# ---------------------------------------------------------------------------- nnU-Net


def write_nnunet(root: Path, **content: object) -> None:
    root.mkdir(exist_ok=True)
    content = {"labels": {"background": 0, "liver": 1}, "channel_names": {"0": "CT"}, **content}
    (root / "dataset.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("channel", "modality"),
    [("CT", "ct"), ("ct", "ct"), ("noNorm", "mr"), ("zscore", "mr"), ("rescale_to_0_1", "mr")],
)
def test_the_name_of_nnunets_channel_is_the_modality(tmp_path, channel, modality):
    write(tmp_path / "imagesTr/a_0000.nii.gz")
    write(tmp_path / "labelsTr/a.nii.gz")
    (tmp_path / "labelsTr/._a.nii.gz").write_bytes(b"\0\5\x16\7")
    write_nnunet(tmp_path, channel_names={"0": channel})
    assert [case.modality for case in find_cases(tmp_path)] == [modality]


def test_another_number_of_cases_than_numtraining_is_logged_and_a_missing_image_named(
    tmp_path, caplog
):
    write(tmp_path / "imagesTr/a_0000.nii.gz")
    write(tmp_path / "labelsTr/a.nii.gz")
    write_nnunet(tmp_path, numTraining=2)
    find_cases(tmp_path)
    assert "numTraining is 2, but there are 1 label maps" in caplog.text
    write(tmp_path / "labelsTr/b.nii.gz")
    with pytest.raises(DataError, match="b: expected .*b_0000.nii.gz, got nothing at that path"):
        find_cases(tmp_path)


# ---------------------------------------------------------------------------- tables


def test_text_that_is_a_formula_is_escaped_and_numbers_are_not():
    row = ["=1+1", "+a", "-a", "@a", "\ta", "\ra", "a=b", "", None, -1.5, -2, "肝脏", "a\udcff"]
    (read,) = csv.reader(io.StringIO(csv_bytes([row]).decode(), newline=""))
    wanted = ["'=1+1", "'+a", "'-a", "'@a", "'\ta", "' a", "a=b", "", "", "-1.5", "-2", "肝脏"]
    assert read == [*wanted, "a\\udcff"]


def test_a_folders_name_is_no_formula_in_skipped_csv(tmp_path):
    write_manifest(tmp_path, {}, [Outcome("=cmd|' /C calc'!A0", "liver", "bad")], ["-x: missing"])
    with (tmp_path / SKIPPED).open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[1:] == [["'=cmd|' /C calc'!A0", "liver", "bad"], ["", "", "'-x: missing"]]


def test_a_folder_without_cases_is_told_what_it_has(tmp_path):
    write(tmp_path / "b.nii.gz")
    with pytest.raises(DataError, match="got none; it has 1 volumes$"):
        find_cases(tmp_path)
    list_cases(tmp_path / "Task01", [("i/x.nii.gz", "l/x.nii.gz")])
    with pytest.raises(DataError, match="pass the folder of a dataset.json: .*Task01$"):
        find_cases(tmp_path)


def test_an_image_without_its_label_map_is_named(tmp_path):
    for name in ("a", "a_seg", "b"):
        write(tmp_path / f"{name}.nii.gz")
    with pytest.raises(
        DataError, match="expected b.nii.gz and one label map such as b_seg.nii.gz, got b.nii.gz"
    ):
        find_cases(tmp_path)
    problems: list[str] = []
    assert [case.subject for case in find_cases(tmp_path, problems=problems)] == ["a"]


def test_the_archive_folder_of_macos_is_ignored(tmp_path):
    for root in ("", "__MACOSX"):
        write(tmp_path / root / "s1" / "ct.nii.gz", labels=0)
        write(tmp_path / root / "s1" / "segmentations" / "liver.nii.gz")
    assert len(find_cases(tmp_path)) == 1


def test_a_number_that_makes_the_name_of_another_label_is_added_again():
    labels = [("T1", 1), ("T1+", 2), ("t1_1", 3)]
    assert distinct_names(labels, Path("x")) == ["t1_1_1", "t1_2", "t1_1"]
    with pytest.raises(DataError, match="expected labels with different names, got 'A b' twice"):
        distinct_names([("A b", 1), ("a_b", 1)], Path("x"))
