"""Data sets in every layout: they are found, give the same volumes, and pass through all four commands."""

from __future__ import annotations

import csv
import importlib.util
import json
import logging
import shutil
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import trimesh

from fastlora.errors import DataError
from fastlora.medical.commands import evaluate, predict, preprocess, train
from fastlora.medical.data.manifest import read_manifest
from fastlora.medical.evaluation.metrics import overlap
from fastlora.medical.scans import dicom
from fastlora.medical.scans.geometry import voxelise
from fastlora.medical.scans.layouts import find_cases
from fastlora.medical.scans.names import structure_name
from fastlora.medical.scans.volumes import Source, load_mask, load_volume, save_volume
from tests.support.layouts import FLAGS, WRITERS, Scan, scans, write_dicom_scan
from tests.support.tolerance import assert_same_place

HAS_DICOM = importlib.util.find_spec("highdicom") is not None
NEEDS_DICOM = pytest.mark.skipif(not HAS_DICOM, reason="needs the extra dicom (highdicom)")
LAYOUTS = [pytest.param(name, marks=NEEDS_DICOM if name == "DICOM" else ()) for name in WRITERS]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Scan, ...]:
    return scans(tmp_path_factory.getbasetemp() / "bundled")


@pytest.fixture(scope="module")
def roots(tmp_path_factory, found) -> Callable[[str], Path]:
    """The folder of a layout, written on first use."""
    home = tmp_path_factory.mktemp("layouts")

    def root(layout: str) -> Path:
        folder = home / layout.replace("/", "-").replace(" ", "-")
        if not folder.exists():
            WRITERS[layout](folder, found)
        return folder

    return root


def world_sums(volume_affine, mask) -> np.ndarray:
    """Mean and spread of a mask's positions in mm, which do not depend on the order of the voxels."""
    places = np.argwhere(mask) @ volume_affine[:3, :3].T + volume_affine[:3, 3]
    return np.concatenate([places.mean(0), places.std(0)])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_named_and_gives_the_same_volumes(layout, roots, found, caplog):
    channel = 1 if layout == "Decathlon" else 0
    with caplog.at_level(logging.INFO):
        cases = find_cases(roots(layout), "mr", channel=channel)
    assert f"layout {layout} (2 cases)" in caplog.text
    assert [case.subject for case in cases] == ["spine_ct", "spine_mr"]
    for case, scan in zip(cases, found, strict=True):
        stated = layout in ("TotalSegmentator", "DICOM")
        assert case.modality == (scan.modality if stated else "mr")
        image = case.load_image()
        assert sorted(image.shape) == sorted(scan.array.shape)
        assert image.array.sum(dtype=np.float64) == pytest.approx(scan.array.sum(dtype=np.float64))
        for name, mask in scan.masks.items():
            if layout == "image/label pairs":
                name = f"label_{[n for s in found for n in s.masks].index(name) + 1}"
            read = case.load_mask(name, image)
            assert read.sum() == mask.sum()
            assert image.array[read].mean() == pytest.approx(scan.array[mask].mean())
            assert_same_place(world_sums(image.affine, read), world_sums(scan.affine, mask))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_goes_from_files_to_meshes(layout, roots, found, tmp_path, capsys, monkeypatch):
    """The commands of docs/quickstart_training.md, with little training."""
    monkeypatch.chdir(tmp_path)
    root, flags = str(roots(layout)), FLAGS.get(layout, [])
    cache = ["--cache_dir", "cache"]
    data = ["--data_root", root, *flags]
    training = ["--checkpoint_dir", "run", "--epochs", "1", "--samples_per_region", "1"]
    assert preprocess.main([*data, *cache, "--skip_invalid"]) == 0
    assert train.main([*data, *cache, *training, "--no-progress"]) == 0
    assert evaluate.main(["--checkpoint", "run", "--output_dir", "eval"]) == 0
    out = ["--output_dir", "predicted", "--mesh_format", "ply", "--skip_invalid"]
    pictures = layout == "TotalSegmentator"  # one layout is enough
    out += [] if pictures else ["--no-picture"]
    assert predict.main(["--checkpoint", "run", *data, *out]) == 0
    printed = capsys.readouterr().out
    assert printed.count(f"layout {layout} (2 cases)") == 4
    manifest = read_manifest(Path("cache"))
    assert len(manifest["structures"]) == 4
    # One label map names all structures, and each spine lacks those of the other.
    absent = 4 if layout in ("Decathlon", "nnU-Net") else 0
    assert len(manifest["skipped"]) == absent and f"{absent} skipped" in printed
    assert json.loads(Path("eval/eval.json").read_text())["split"]["kind"] == "patient"

    with open("predicted/predictions.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["mesh"]]
    assert len(rows) == 4
    channel = 1 if layout == "Decathlon" else 0
    images = {case.subject: case for case in find_cases(root, "mr", channel=channel)}
    for row in rows:
        case = images[row["subject"]]
        image = case.load_image()
        mask = case.load_mask(row["structure"], image)
        mesh = trimesh.load(Path("predicted") / row["mesh"])
        dice = overlap(voxelise(mesh, image.affine, image.shape), mask)["dice"]
        # The cut through the pedicles is not an edge in the image, so the body is not matched everywhere.
        assert dice > 0.8 and dice == pytest.approx(float(row["dice_with_mask"]), abs=1e-3)
        middle = world_sums(image.affine, mask)[:3]
        assert np.linalg.norm(mesh.center_mass - middle) < 2.5  # mm, in a body of 30
        assert mesh.is_watertight and mesh.volume > 0
        assert Path("predicted", row["mesh"]).with_suffix(".png").is_file() == pictures


# ---------------------------------------------------------------------------- single layouts


def test_names_of_structures_are_words():
    assert structure_name("Left Kidney (cyst)") == "left_kidney_cyst"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"training": 7}, "expected a list in 'training', got int"),
        ({"training": [7]}, "expected the paths 'image' and 'label' in each of 'training', got 7"),
        ({"training": [{"image": "a.nii", "label": 3}]}, "expected the paths 'image' and 'label'"),
        ({"training": [{"image": "/a.nii", "label": "b.nii"}]}, "expected paths within .*'/a.nii'"),
        ({"training": [{"image": "a.nii", "label": "x/../../b.nii"}]}, "expected paths within"),
        ({"training": [{"image": "a\0.nii", "label": "b.nii"}]}, "expected paths within"),
        (
            {"training": [{"image": "a" * 400, "label": "b.nii"}]},
            "expected paths within .*too long",
        ),
        ({"labels": {"liver": 1e999}}, "expected integer labels, got 'liver': inf"),
        ({"labels": {"1": None}}, "expected integer labels, got '1': None"),
        (
            {"modality": {"0": 1, "1": {}}, "labels": {}},
            "expected a label other than the background",
        ),
        ({"modality": [1]}, "expected 'channel_names' or 'modality'"),
    ],
)
def test_invalid_entries_of_a_list_of_cases_are_named(tmp_path, change, message):
    content = {"modality": {"0": "CT"}, "labels": {"1": "liver"}, "training": [], **change}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        find_cases(tmp_path)


@NEEDS_DICOM
def test_a_deflated_file_is_refused_before_it_is_inflated(tmp_path):
    import pydicom

    mask = np.zeros((6, 5, 3), bool)
    mask[1:4, 1:4] = True
    grid = np.zeros(mask.shape, np.int16)
    write_dicom_scan(tmp_path / "s1", Scan("s1", "ct", grid, np.eye(4), {"liver": mask}))
    (path, *_) = sorted((tmp_path / "s1" / "images").iterdir())
    item = pydicom.dcmread(path)
    item.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    item.save_as(path, enforce_file_format=True)
    with pytest.raises(DataError, match="expected a transfer syntax other than Deflated"):
        dicom.list_series(tmp_path / "s1")
    path.write_bytes(path.read_bytes()[132:])  # also without the preamble
    with pytest.raises(DataError, match="expected a transfer syntax other than Deflated"):
        dicom.list_series(tmp_path / "s1")
    segmentation = tmp_path / "s1" / "segmentation.dcm"
    item = pydicom.dcmread(segmentation)
    item.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    item.save_as(segmentation, enforce_file_format=True)
    with pytest.raises(DataError, match="expected a transfer syntax other than Deflated"):
        dicom.read_segmentation(segmentation)


@NEEDS_DICOM
def test_a_number_of_odd_length_is_a_damaged_file(tmp_path):  # found by fuzzing
    mask = np.ones((6, 5, 3), bool)
    grid = np.zeros(mask.shape, np.int16)
    write_dicom_scan(tmp_path / "s1", Scan("s1", "ct", grid, np.eye(4), {"liver": mask}))
    (path, *_) = sorted((tmp_path / "s1" / "images").iterdir())
    data = path.read_bytes()
    rows = data.index(bytes.fromhex("28001000") + b"US") + 6
    path.write_bytes(data[:rows] + b"\x03\x00\x05\x00\x00" + data[rows + 4 :])
    with pytest.raises(DataError, match="expected a series of parallel slices"):
        dicom.read_series(tmp_path / "s1")


@NEEDS_DICOM
def test_an_error_of_highdicoms_database_is_a_damaged_file(
    tmp_path, monkeypatch
):  # found by fuzzing
    import highdicom

    mask = np.ones((6, 5, 3), bool)
    grid = np.zeros(mask.shape, np.int16)
    write_dicom_scan(tmp_path / "s1", Scan("s1", "ct", grid, np.eye(4), {"liver": mask}))

    def broken(*_, **__):
        raise sqlite3.OperationalError("no such column: FrameLUT.ReferencedSegmentNumber")

    monkeypatch.setattr(highdicom.seg.Segmentation, "from_dataset", broken)
    with pytest.raises(DataError, match="expected segment 1 on the voxels .*no such column"):
        dicom.read_segment(tmp_path / "s1" / "segmentation.dcm", 1, np.eye(4), mask.shape, 0.5)


def test_decathlon_lists_what_is_missing_and_reads_the_channel(roots, tmp_path, caplog):
    root = tmp_path / "d"
    shutil.copytree(roots("Decathlon"), root)
    with pytest.raises(DataError, match="channel: .*expected one of them, got 2"):
        find_cases(root, channel=2)
    with caplog.at_level(logging.INFO):
        first = find_cases(root, channel=0)[0]
    assert "channel 0 (nothing) of nothing, MRI" in caplog.text
    assert not first.load_image().array.any()  # the second channel is the image
    (root / "labelsTr" / "spine_ct.nii.gz").unlink()
    with pytest.raises(DataError, match="spine_ct: expected .*labelsTr/spine_ct.nii.gz"):
        find_cases(root)
    problems: list[str] = []
    assert [c.subject for c in find_cases(root, problems=problems)] == ["spine_mr"]
    assert len(problems) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected readable JSON"),
        ("[]", "expected an object with 'labels'"),
        ('{"labels": {"a": 1}}', "expected 'channel_names' or 'modality'"),
        ('{"labels": {"a": "x", "1": "x"}, "modality": {"0": "CT"}}', "expected integer labels"),
        ('{"labels": {"background": 0}, "channel_names": {"0": "CT"}}', "a label other than the"),
        ('{"labels": {"A b": 1, "a_b": 1}, "channel_names": {"0": "CT"}}', "'A b' twice"),
        ('{"labels": {"a": 1}, "channel_names": {"0": "CT"}, "file_ending": ".tif"}', "got '.tif'"),
    ],
)
def test_an_invalid_dataset_json_is_named(tmp_path, content, message):
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(DataError, match=message):
        find_cases(tmp_path)


def test_nnunet_regions_ignore_and_folds(tmp_path):
    labels = np.zeros((4, 4, 4), np.uint8)
    labels[0], labels[1], labels[2] = 1, 2, 3
    for subject in ("a", "b", "c"):
        save_volume(
            tmp_path / f"imagesTr/{subject}_0000.nii.gz", labels.astype(np.int16) - 2, np.eye(4)
        )
        save_volume(tmp_path / f"labelsTr/{subject}.nii.gz", labels, np.eye(4))
    content = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
    channels = {"0": "CT"}
    (tmp_path / "dataset.json").write_text(
        json.dumps({"labels": content, "channel_names": channels})
    )
    folds = [{"train": ["a"], "val": ["b"]}, {"train": ["b"], "val": ["a"]}]
    (tmp_path / "splits_final.json").write_text(json.dumps(folds))
    cases = find_cases(tmp_path)
    assert [(c.subject, c.split, c.modality) for c in cases] == [
        ("a", "train", "ct"),
        ("b", "val", "ct"),
        ("c", None, "ct"),
    ]
    image = cases[0].load_image()
    assert {n: int(cases[0].load_mask(n, image).sum()) for n in cases[0].structures} == {
        "whole": 32,
        "core": 16,
    }
    (tmp_path / "splits_final.json").write_text("{}")
    with pytest.raises(DataError, match="expected a list of folds"):
        find_cases(tmp_path)


@NEEDS_DICOM
def test_a_seg_of_some_slices_is_placed_on_them_and_errors_are_named(found, tmp_path, monkeypatch):
    ct = found[0]
    some = slice(5, 30)
    inside = {n: m & np.isin(np.arange(m.shape[2]), range(5, 30)) for n, m in ct.masks.items()}
    write_dicom_scan(tmp_path / "spine_ct", ct, some)
    (case,) = find_cases(tmp_path)
    image = case.load_image()
    for name, mask in inside.items():
        assert case.load_mask(name, image).sum() == mask.sum()
    assert dicom.holds_dicom(tmp_path) and not dicom.holds_dicom(Path(__file__).parent)
    seg = tmp_path / "spine_ct" / "segmentation.dcm"
    assert dicom.read_segmentation(seg).refers_to == {case.component}
    with pytest.raises(DataError, match="expected a segment among .*got 9"):
        load_mask(Source(seg, 9), image)
    with pytest.raises(DataError, match="expected a segment's number, got None"):
        load_mask(Source(seg), image)
    with pytest.raises(DataError, match="expected segment 1 on the voxels of the image"):
        dicom.read_segment(seg, 1, image.affine @ np.diag([1.1, 1, 1, 1]), image.shape, 0.5)
    with pytest.raises(DataError, match="within the image, got .* voxels outside it"):
        dicom.read_segment(seg, 1, image.affine, (20, 20, 20), 0.5)
    with pytest.raises(DataError, match="expected one image series, got none"):
        dicom.read_series(seg)
    with pytest.raises(DataError, match="expected the series 1.2.3, got none"):
        load_volume(seg.parent, "1.2.3")
    slices = sorted((tmp_path / "spine_ct" / "images").iterdir())
    with pytest.raises(DataError, match="expected a DICOM SEG, got CT"):
        dicom.read_segmentation(slices[0])
    slices[len(slices) // 2].unlink()  # a gap, or a short end
    next(p for p in slices if p.name.endswith("-20.dcm") and p.exists()).unlink()
    with pytest.raises(DataError, match="expected a series of parallel slices at equal distances"):
        case.load_image()
    seg.unlink()
    with pytest.raises(
        DataError, match="expected a DICOM SEG in the folder of the images, got none"
    ):
        find_cases(tmp_path)
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(DataError, match="pip install highdicom pydicom"):
        find_cases(tmp_path)


def test_a_dicom_header_that_declares_too_much_is_refused_before_it_is_read():
    from types import SimpleNamespace

    from fastlora.medical.scans import dicom

    def header(rows, frames, positions=()):
        groups = [
            {"PlanePositionSequence": True} | {"it": SimpleNamespace(ImagePositionPatient=p)}
            for p in positions
        ]
        found = {
            "NumberOfFrames": frames,
            "SharedFunctionalGroupsSequence": [_Measures()],
            "PerFrameFunctionalGroupsSequence": [_Group(g["it"]) for g in groups],
        }
        return SimpleNamespace(Rows=rows, Columns=rows, get=lambda n, d=None: found.get(n, d))

    dicom._check_size(header(512, 100), 1)
    dicom._check_size(header(64, 2, [(0, 0, 0), (0, 0, 50)]), 1)
    with pytest.raises(ValueError, match="30000×30000 in 1 planes"):
        dicom._check_size(header(30_000, 1), 1)
    with pytest.raises(ValueError, match="in 30,000,001 planes"):
        dicom._check_size(header(64, 2, [(0, 0, 0), (0, 0, 3e7)]), 1)


class _Measures(dict):
    def __init__(self):
        super().__init__(PixelMeasuresSequence=[self])
        self.PixelMeasuresSequence = [{"SpacingBetweenSlices": 1.0}]


class _Group(dict):
    def __init__(self, position):
        super().__init__(PlanePositionSequence=True)
        self.PlanePositionSequence = [position]
