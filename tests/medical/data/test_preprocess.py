"""The preprocessing command: its output and its errors."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import trimesh

from fastlora.errors import ConfigError, DataError, FastLoRAWarning
from fastlora.medical.commands.preprocess import main
from fastlora.medical.data import grids, manifest
from fastlora.medical.data.manifest import read_manifest, verify
from fastlora.medical.data.phantom import write_phantom_dataset
from fastlora.medical.data.preprocess import PreprocessConfig, preprocess
from fastlora.medical.data.slice_source import SliceConfig
from fastlora.medical.data.slices import TS_SAM3D_Dataset
from fastlora.medical.data.splits import select_structures
from fastlora.medical.scans.layouts import find_cases
from fastlora.medical.scans.volumes import Case, load_volume, save_volume
from fastlora.medical.training.config import TrainConfig
from fastlora.medical.training.data import load_train_data
from tests.support.paths import ROOT

SCRIPT = ROOT / "scripts" / "preprocess_medical.py"


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    root = tmp_path_factory.mktemp("phantom") / "data"
    write_phantom_dataset(root, subjects=2, seed=0)
    return root


@pytest.fixture
def copy_of_data(phantom, tmp_path):
    """A copy to corrupt, and the path of one of its masks."""
    root = tmp_path / "data"
    shutil.copytree(phantom, root)
    return root, root / "phantom_001" / "segmentations" / "tube.nii.gz"


def run(capsys, *argv):
    code = main([str(a) for a in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_slices_and_meshes_are_prepared_on_request(phantom, tmp_path, capsys, monkeypatch):
    cache = tmp_path / "cache"
    code, out, err = run(
        capsys, "--data_root", phantom, "--cache_dir", cache, "--classes", "blob", "tube",
        "--slices", "--axes", "axial", "--spacing", 2.0, "--preprocess_crop_size", 20,
        "--extract_mesh",
    )  # fmt: skip
    assert code == 0 and not err
    assert "4 structures of 2 subjects ready, 0 skipped" in out
    assert out.splitlines()[0] == f"{phantom}: layout TotalSegmentator (2 cases)"
    assert out.splitlines()[1].endswith("regions box          spacing mm      axial")
    assert out.count(" 2.00×2.00×2.00 ") == 4
    entries = read_manifest(cache)["structures"]
    assert [len(entry["files"]) for entry in entries] == [3] * 4 and verify(cache) == []
    manifest.MEMORY.clear()
    monkeypatch.setattr(
        "fastlora.medical.data.slice_source.prepare", lambda *a: pytest.fail("not cached")
    )
    data = TS_SAM3D_Dataset(
        find_cases(phantom),
        classes=["blob", "tube"],
        axes=["axial"],
        config=SliceConfig(spacing=2.0, crop_size=20),
        cache_dir=cache,
    )
    rows = [line for line in out.splitlines() if line.startswith("phantom_") and ":" not in line]
    counts = [int(line.split()[-1]) for line in rows]
    assert sum(counts) == len(data)
    meshes = sorted((cache / "meshes").iterdir())
    assert [p.name for p in meshes] == [
        f"phantom_00{n}-{s}.ply" for n in (0, 1) for s in ("blob", "tube")
    ]
    assert trimesh.load(meshes[0]).volume == pytest.approx(
        float(rows[0].split()[2]) * 1000, rel=0.05
    )
    next(cache.glob("*[!-]-blob-[!g]*.npz")).write_bytes(b"")
    meshes[0].unlink()
    assert len(verify(cache)) == 2


def test_a_default_run_prepares_what_training_reads_and_no_more(
    phantom, tmp_path, capsys, monkeypatch
):
    cache = tmp_path / "cache"
    classes = ("blob", "tube")
    code, out, err = run(
        capsys, "--data_root", phantom, "--cache_dir", cache, "--classes", *classes
    )
    assert code == 0 and not err
    assert out.splitlines()[1].split() == ["subject", "structure", "volume", "ml", "regions"]
    found = sorted(path.name for path in cache.iterdir())
    assert sum("-grid-" in name for name in found) == 4
    assert [n for n in found if "-grid-" not in n] == ["manifest.json", "skipped.csv"]
    for entry in read_manifest(cache)["structures"]:
        assert [name in found for name in entry["files"]] == [True]
        assert entry["volume_ml"] > 0 and entry["regions"] >= 1
        assert entry["shape"] == entry["spacing"] == entry["slices"] == []
    assert verify(cache) == []

    config = TrainConfig(
        data_root=str(phantom), classes=classes, cache_dir=str(cache), split="file"
    )
    manifest.MEMORY.clear()
    with monkeypatch.context() as patch:
        patch.setattr(grids.StructureGrid, "read", lambda *a: pytest.fail("not from the cache"))
        for data in load_train_data(config)[:2]:
            assert [data[n]["sdf_vox"].shape for n in range(len(data))] == [(32,) * 3] * len(data)
    assert sorted(path.name for path in cache.iterdir()) == found


def test_a_data_set_prepares_what_a_default_cache_lacks(phantom, tmp_path, capsys, caplog):
    base = ["--data_root", phantom, "--classes", "blob"]
    assert run(capsys, *base, "--cache_dir", tmp_path / "default")[0] == 0
    assert run(capsys, *base, "--cache_dir", tmp_path / "slices", "--slices")[0] == 0
    caplog.set_level("INFO", logger="fastlora.medical")

    def build(cache):
        caplog.clear()
        return TS_SAM3D_Dataset(find_cases(phantom), ["blob"], extract_mesh=True, cache_dir=cache)

    lacking = build(tmp_path / "default")
    assert f"{tmp_path / 'default'}: preparing slices of 2 structures" in caplog.text
    ready = build(tmp_path / "slices")
    assert "preparing" not in caplog.text
    assert len(lacking) == len(ready) > 50
    for index in range(0, len(ready), 7):
        one, other = lacking[index], ready[index]
        assert one.keys() == other.keys()
        for name, value in one.items():
            same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
            assert same(value, other[name]), name
    names = [sorted(p.name for p in (tmp_path / d).glob("*.npz")) for d in ("default", "slices")]
    assert names[0] == names[1] and len(names[0]) == 4
    build(tmp_path / "default")
    assert "preparing" not in caplog.text


def test_meshes_alone_leave_no_slices(phantom, tmp_path, capsys):
    cache = tmp_path / "cache"
    flags = ["--data_root", phantom, "--cache_dir", cache, "--classes", "blob", "--extract_mesh"]
    assert run(capsys, *flags)[0] == 0
    assert all("-grid-" in path.name for path in cache.glob("*.npz"))
    files = [sorted(entry["files"]) for entry in read_manifest(cache)["structures"]]
    assert [names[0] for names in files] == [f"meshes/phantom_00{n}-blob.ply" for n in (0, 1)]
    assert verify(cache) == []


def test_settings_of_slices_without_slices_warn(phantom, tmp_path, capsys):
    flags = ["--data_root", phantom, "--cache_dir", tmp_path / "c", "--classes", "blob"]
    with pytest.warns(FastLoRAWarning, match="axes, spacing: no effect without --slices or"):
        assert run(capsys, *flags, "--axes", "axial", "--spacing", 2)[0] == 0


def test_workers_give_the_same_table(phantom, tmp_path, capsys):
    one = run(capsys, "--data_root", phantom, "--cache_dir", tmp_path / "c")
    two = run(capsys, "--data_root", phantom, "--cache_dir", tmp_path / "c", "--num_workers", 2)
    tables = [re.sub(r"\d+\.\d s(, )?|[a-z]+ (?=\d+\.\d s)", "", out) for _, out, _ in (one, two)]
    assert tables[0] == tables[1] and one[0] == two[0] == 0 and one[2] == two[2]


def test_without_a_source_it_builds_the_bundled_cases(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, "--classes", "disc")
    assert code == 0 and "2 structures of 1 subjects ready" in out
    assert len(list((tmp_path / "data" / "cache").glob("spine_mr-disc_10*.npz"))) == 2
    code, out, _ = run(capsys, "--demo", "synthetic", "--classes", "tree")
    assert code == 0 and "3 structures of 3 subjects ready" in out
    assert (tmp_path / "data" / "synthetic" / "phantom_002").is_dir()


def corrupt_missing(root, mask):
    shutil.rmtree(root)


def corrupt_no_image(root, mask):
    (root / "phantom_001" / "ct.nii.gz").unlink()


def corrupt_empty(root, mask):
    volume = load_volume(mask)
    save_volume(mask, np.zeros(volume.shape, dtype=np.uint8), volume.affine)


def corrupt_shape(root, mask):
    volume = load_volume(mask)
    save_volume(mask, volume.array[1:].astype(np.uint8), volume.affine)


def corrupt_affine(root, mask):
    volume = load_volume(mask)
    save_volume(mask, volume.array.astype(np.uint8), volume.affine @ np.diag([1, 1, 1.1, 1]))


def corrupt_nan(root, mask):
    path = root / "phantom_001" / "ct.nii.gz"
    volume = load_volume(path)
    volume.array[3, 3, 3] = np.nan
    save_volume(path, volume.array, volume.affine)


def corrupt_file(root, mask):
    mask.write_bytes(mask.read_bytes()[:200])


CORRUPTIONS = {
    corrupt_missing: "data: expected a folder of cases, got nothing at that path",
    corrupt_no_image: "phantom_001: expected one of ct.nii.gz, mri.nii.gz, or one other image, got none",
    corrupt_empty: "tube.nii.gz: expected at least one voxel, got an empty mask",
    corrupt_shape: "tube.nii.gz: expected the shape of ct.nii.gz",
    corrupt_affine: "tube.nii.gz: expected the affine of ct.nii.gz",
    corrupt_nan: "ct.nii.gz: expected finite values, got NaN or infinity in 1 of",
    corrupt_file: "tube.nii.gz: expected a readable NIfTI file",
}
CASES = [(corrupt, message, 0) for corrupt, message in CORRUPTIONS.items()]
CASES += [
    (corrupt_shape, CORRUPTIONS[corrupt_shape], 1),
    (corrupt_nan, CORRUPTIONS[corrupt_nan], 1),
]


@pytest.mark.parametrize(("corrupt", "message", "workers"), CASES)
def test_invalid_input_is_one_line_and_exit_code_2(
    copy_of_data, tmp_path, capsys, corrupt, message, workers
):
    root, mask = copy_of_data
    corrupt(root, mask)
    cache = tmp_path / "cache"
    code, _, err = run(
        capsys, "--data_root", root, "--cache_dir", cache, "--num_workers", workers,
        "--classes", "tube",
    )  # fmt: skip
    assert code == 2
    assert err.startswith("error: ") and message in err
    assert err.count("\n") == 1 and "Traceback" not in err
    # Every entry is complete.
    for entry in cache.glob("*"):
        assert entry.suffix == ".npz" and not entry.name.startswith(".")
        with np.load(entry) as stored:
            assert {name: stored[name] for name in stored}


@pytest.mark.parametrize("corrupt", [s for s in CORRUPTIONS if s is not corrupt_missing])
def test_unusable_cases_can_be_skipped_and_are_listed(copy_of_data, tmp_path, capsys, corrupt):
    root, mask = copy_of_data
    corrupt(root, mask)
    code, out, err = run(
        capsys, "--data_root", root, "--cache_dir", tmp_path / "c", "--skip_invalid",
        "--classes", "tube", "blob",
    )  # fmt: skip
    assert code == 0 and not err
    lines = [line for line in out.splitlines() if "skipped: " in line]
    assert lines and all(CORRUPTIONS[corrupt] in line for line in lines)
    whole_case = corrupt in (corrupt_no_image, corrupt_nan)
    assert f"{2 if whole_case else 3} structures of" in out


def test_no_usable_structure_is_an_error(copy_of_data, tmp_path, capsys):
    root, mask = copy_of_data
    corrupt_empty(root, mask)
    shutil.rmtree(root / "phantom_000")
    code, _, err = run(
        capsys, "--data_root", root, "--cache_dir", tmp_path, "--classes", "tube", "--skip_invalid"
    )
    assert (code, err) == (2, "error: expected at least one usable structure, got none\n")


def test_invalid_arguments(phantom, tmp_path, capsys):
    for extra, message in (
        (["--axes", "up"], "axes: expected some of sagittal"),
        (["--classes", "liver"], "classes: no case has 'liver'; there are: blob"),
        (["--spacing", "-1"], "spacing: expected a positive number"),
        (["--num_workers", "-1"], "num_workers: expected 0 or more"),
    ):
        code, _, err = run(capsys, "--data_root", phantom, "--cache_dir", tmp_path / "c", *extra)
        assert code == 2 and err.startswith(f"error: {message}") and err.count("\n") == 1
    (tmp_path / "file").write_text("")
    code, _, err = run(capsys, "--data_root", phantom, "--cache_dir", tmp_path / "file")
    assert code == 2 and err.count("\n") == 1
    code, _, err = run(capsys, "--data_root", "x", "--demo", "synthetic")
    assert code == 2 and "not allowed with argument" in err and err.count("\n") == 1


@pytest.mark.slow
def test_the_script_runs_as_a_command(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--data_root", str(tmp_path / "nix")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])},
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.endswith("nix: expected a folder of cases, got nothing at that path\n")


def test_preprocess_yields_outcomes_and_raises(copy_of_data, tmp_path):
    root, mask = copy_of_data
    corrupt_empty(root, mask)
    selected = select_structures(find_cases(root), ["tube"])
    config = PreprocessConfig(tmp_path / "c", slices=True, axes=[0, 2])
    with pytest.raises(DataError, match="empty mask"):
        list(preprocess(selected, config))
    with pytest.raises(ConfigError, match="num_workers"):
        list(preprocess(selected, config, -1))
    usable, invalid = preprocess(selected, replace(config, skip_invalid=True))
    assert usable.problem is None and len(usable.slices) == 2 and usable.volume_ml > 0
    assert "empty mask" in invalid.problem and invalid.slices == ()


def test_a_complete_cache_is_not_read_again(phantom, tmp_path, capsys, monkeypatch):
    flags = ["--data_root", phantom, "--cache_dir", tmp_path / "c"]
    code, first, _ = run(capsys, *flags)
    assert (
        code == 0 and "image " in first and "grids " in first
    )  # a line with the times of each case
    monkeypatch.setattr(Case, "load_image", lambda case: pytest.fail("read again"))
    code, again, _ = run(capsys, *flags)
    assert code == 0 and "image " not in again
    rows = [[line for line in out.splitlines() if ":" not in line] for out in (first, again)]
    assert rows[0] == rows[1]


def _die(config, number, case):
    os._exit(1)


def test_a_worker_that_dies_is_one_line(phantom, tmp_path, monkeypatch):
    monkeypatch.setattr("fastlora.medical.data.preprocess._work", _die)
    with pytest.raises(
        DataError, match="num_workers: one of 2 processes died; expected enough memory"
    ):
        list(preprocess(find_cases(phantom), PreprocessConfig(tmp_path / "c"), 2))


def test_workers_stop_after_the_current_structure(phantom, tmp_path):
    """A consumer that stops early, as after Ctrl-C, leaves no process and only complete entries."""
    outcomes = preprocess(find_cases(phantom), PreprocessConfig(tmp_path / "c"), 2)
    next(outcomes)
    outcomes.close()
    assert not multiprocessing.active_children()
    for path in (tmp_path / "c").iterdir():
        assert path.suffix == ".npz" and not path.name.startswith(".")
        np.load(path).close()
