"""The manifest of preprocessing: its content, its use in training, and --verify."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from fastlora.errors import DataError
from fastlora.medical.commands.preprocess import main
from fastlora.medical.data import grids, manifest
from fastlora.medical.data.manifest import (
    FORMAT,
    Outcome,
    digest,
    read_manifest,
    usable_cases,
    verify,
    write_manifest,
)
from fastlora.medical.data.phantom import write_phantom_dataset
from fastlora.medical.scans.layouts import find_cases
from fastlora.medical.scans.volumes import load_volume, save_volume
from fastlora.medical.training.config import TrainConfig
from fastlora.medical.training.data import load_splits


@pytest.fixture
def prepared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[Path, Path]:
    """A data set of two phantoms, one mask of which is empty, and its cache."""
    root, cache = tmp_path / "data", tmp_path / "cache"
    write_phantom_dataset(root, subjects=2, seed=0)
    (root / "manifest.json").unlink()  # else the folder would be rebuilt
    mask = root / "phantom_001" / "segmentations" / "tube.nii.gz"
    volume = load_volume(mask)
    save_volume(mask, np.zeros(volume.shape, np.uint8), volume.affine)
    flags = ["--data_root", root, "--cache_dir", cache, "--classes", "blob", "tube"]
    assert main([*map(str, flags), "--skip_invalid"]) == 0
    assert "skipped, reasons in" in capsys.readouterr().out
    return root, cache


def test_it_lists_what_is_usable_and_what_is_not(prepared):
    root, cache = prepared
    content = read_manifest(cache)
    names = [(s["subject"], s["structure"]) for s in content["structures"]]
    assert names == [("phantom_000", "blob"), ("phantom_000", "tube"), ("phantom_001", "blob")]
    entry = content["structures"][0]
    assert entry["regions"] >= 1 and entry["volume_ml"] > 0
    for name, value in entry["files"].items():
        assert digest(cache / name) == value
    assert str(root / "phantom_000" / "ct.nii.gz") in entry["sources"]
    (skipped,) = content["skipped"]
    assert skipped["structure"] == "tube" and "empty mask" in skipped["reason"]
    with (cache / "skipped.csv").open() as file:
        assert list(csv.DictReader(file)) == [skipped]


def test_training_takes_what_is_listed_and_reads_the_cache(prepared, monkeypatch):
    root, cache = prepared
    config = TrainConfig(data_root=str(root), classes=("blob", "tube"), split="file")
    with pytest.raises(DataError, match="empty mask .*--skip_invalid` lists the usable structures"):
        load_splits(config)
    manifest.MEMORY.clear()
    monkeypatch.setattr(grids.StructureGrid, "read", lambda *a: pytest.fail("not from the cache"))
    cached = TrainConfig(**{**config.to_dict(), "cache_dir": str(cache)})
    subsets = load_splits(cached)
    assert {spec.structure for spec in subsets["train"]} == {"blob", "tube"}
    assert {spec.structure for spec in subsets["val"]} == {"blob"}


def test_verify_finds_changed_files(prepared, capsys):
    root, cache = prepared
    assert verify(cache) == []
    assert main(["--cache_dir", str(cache), "--verify"]) == 0
    assert "3 structures" in capsys.readouterr().out
    entry = next(cache.glob("*-grid-*.npz"))
    entry.write_bytes(entry.read_bytes()[:-1] + b"x")
    (root / "phantom_001" / "segmentations" / "blob.nii.gz").unlink()
    assert main(["--cache_dir", str(cache), "--verify"]) == 1
    out = capsys.readouterr().out
    assert f"{entry}: expected SHA-256" in out and "blob.nii.gz: expected a file" in out
    assert "2 files differ" in out


def test_a_damaged_grid_is_logged_and_recomputed(prepared, caplog):
    root, cache = prepared
    case = find_cases(root)[0]
    path = grids.grid_path(case, "blob", cache)
    whole = path.read_bytes()
    path.write_bytes(whole[:500])
    manifest.MEMORY.clear()
    grids.StructureGrid.load(case, "blob", cache)
    assert "damaged cache entry is recomputed" in caplog.text
    assert len(path.read_bytes()) == len(whole)


def test_memory_is_bounded(prepared, monkeypatch):
    root, _ = prepared
    manifest.MEMORY.clear()
    monkeypatch.setattr(manifest, "MEMORY_BYTES", 1)
    case = find_cases(root)[0]
    for structure in ("blob", "tube"):
        grids.StructureGrid.load(case, structure)
    assert len(manifest.MEMORY) == 1


def test_invalid_manifests_are_named(tmp_path, prepared):
    root, cache = prepared
    cases = find_cases(root)
    with pytest.raises(DataError, match="cache_dir: expected .*preprocess. writes"):
        usable_cases(cases, tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="expected a manifest, got"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"format": "x"}))
    with pytest.raises(DataError, match="expected a manifest of format"):
        read_manifest(tmp_path)
    write_manifest(tmp_path, {}, [Outcome("other", "blob")], ["unusable case"])
    with pytest.raises(DataError, match="got those of other: the cache is of another data set"):
        usable_cases(cases, tmp_path)
    assert read_manifest(tmp_path)["skipped"][0]["reason"] == "unusable case"
    one, other = digest(root / "phantom_000"), digest(root / "phantom_001")
    assert one != other and len(one) == 64


@pytest.mark.parametrize(
    "entry",
    [
        None,
        7,
        {"subject": 1, "structure": "blob", "sources": {}, "files": {}},
        {"subject": "a", "structure": "blob", "files": {}},
        {"subject": "a", "structure": "blob", "sources": [], "files": {}},
        {"subject": "a", "structure": "blob", "sources": {}, "files": {"x": 3}},
    ],
    ids=str,
)
def test_invalid_entries_are_refused(tmp_path, entry):
    content = {"format": FORMAT, "structures": [entry] if entry is not None else "none"}
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    for read in (read_manifest, verify, lambda cache: usable_cases([], cache)):
        with pytest.raises(DataError, match="manifest.json: expected subject, structure"):
            read(tmp_path)


def test_a_name_that_no_file_can_have_differs(tmp_path):
    outcome = Outcome("s1", "blob", sources={"a" * 400: "0"}, files={})
    write_manifest(tmp_path, {}, [outcome], [])
    (line,) = verify(tmp_path)
    assert "too long" in line
