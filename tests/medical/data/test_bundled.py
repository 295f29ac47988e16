"""The bundled cases, and generated folders."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from fastlora.errors import DataError
from fastlora.medical.data import bundled
from fastlora.medical.data.bundled import REQUIREMENTS, SHA256, SOURCES, build_bundled, locate
from fastlora.medical.data.generated import MANIFEST, generate_folder
from tests.support.paths import ROOT
from tests.support.tolerance import assert_same_geometry

VERTEBRAE = {"spine_ct": (21, 22, 23), "spine_mr": (5, 6, 7)}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "bundled"
    return root, {case.subject: case for case in build_bundled(root)}


def contents(root):
    files = (p for p in sorted(root.rglob("*")) if p.is_file())
    return {p.relative_to(root).as_posix(): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


def test_three_cases_of_two_modalities(built):
    _, cases = built
    assert {name: case.modality for name, case in cases.items()} == {
        "spine_ct": "ct",
        "spine_mr": "mr",
        "brain_mni": "mr",
    }
    assert sorted(cases["brain_mni"].structures) == ["grey_matter", "white_matter"]
    for subject, numbers in VERTEBRAE.items():
        whole = {f"vertebra_{n}" for n in numbers}
        parts = {f"{v}_{part}" for v in whole for part in ("corpus", "posterior_elements")}
        discs = {"disc_105", "disc_106"} if subject == "spine_mr" else set()
        assert set(cases[subject].structures) == whole | parts | discs


def test_masks_are_anatomy_in_place(built):
    _, cases = built
    for subject, numbers in VERTEBRAE.items():
        case, image = cases[subject], cases[subject].load_image()
        assert_same_geometry(image.spacing, 1.5)

        def middle(name, case=case, image=image):
            return np.argwhere(case.load_mask(name, image)).mean(0)

        tops = [middle(f"vertebra_{n}")[2] for n in numbers]
        assert tops == sorted(tops, reverse=True)  # higher numbers lie lower, in RAS
        for n in numbers:
            whole = case.load_mask(f"vertebra_{n}", image)
            corpus = case.load_mask(f"vertebra_{n}_corpus", image)
            arch = case.load_mask(f"vertebra_{n}_posterior_elements", image)
            assert not (corpus & arch).any() and ((corpus | arch) <= whole).all()
            assert (corpus | arch).sum() >= 0.99 * whole.sum()
            assert middle(f"vertebra_{n}_corpus")[1] > middle(f"vertebra_{n}_posterior_elements")[1]
        if subject == "spine_mr":
            assert middle("vertebra_6")[2] > middle("disc_106")[2] > middle("vertebra_7")[2]
    brain = cases["brain_mni"]
    image = brain.load_image()
    white, grey = (brain.load_mask(n, image) for n in ("white_matter", "grey_matter"))
    assert (white.sum(), grey.sum()) == (632004, 1079599)  # probability of one half and more
    assert not (white & grey).any()
    assert image.array[white].mean() > image.array[grey].mean() > image.array[~white & ~grey].mean()


def test_the_readme_states_licences_and_complete_structures_are_complete(built):
    root, cases = built
    readme = (root / "README.txt").read_text()
    for text in ("Apache-2.0", "BSD-3-Clause", "Louis Collins", "cut off", "1.1.0", "0.14.1"):
        assert text in readme
    for subject, case in cases.items():
        image = case.load_image()
        for name in ("vertebra_22", "vertebra_6", "disc_105", "disc_106"):
            if name in case.structures:
                mask = case.load_mask(name, image)
                assert mask.sum() == mask[1:-1, 1:-1, 1:-1].sum(), (subject, name)


def test_building_again_changes_nothing(built):
    root, _ = built
    before = contents(root)
    build_bundled(root)
    assert contents(root) == before


def test_a_damaged_folder_is_rebuilt(built, tmp_path):
    root = tmp_path / "bundled"
    build_bundled(root)
    whole = {name: data for name, (data, _) in contents(root).items()}
    mask = root / "spine_ct" / "segmentations" / "vertebra_22.nii.gz"
    mask.write_bytes(mask.read_bytes()[:100])
    (root / "meta.csv").unlink()
    build_bundled(root)
    assert {name: data for name, (data, _) in contents(root).items()} == whole
    assert [p.name for p in tmp_path.iterdir()] == ["bundled"]


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("five years of work")
    with pytest.raises(DataError, match="got thesis.txt in it"):
        build_bundled(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(DataError, match="expected a folder or nothing, got a file"):
        build_bundled(tmp_path / "thesis.txt")


def test_a_missing_package_is_named_with_its_version(tmp_path, monkeypatch):
    monkeypatch.setattr(bundled.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install --no-deps TPTBox==1\.1\.0"):
        build_bundled(tmp_path / "bundled")
    assert not list(tmp_path.iterdir())


def test_another_version_of_a_file_is_refused(monkeypatch):
    monkeypatch.setitem(SHA256, "white_matter", "0" * 64)
    with pytest.raises(
        DataError, match=r"with SHA-256 000+…, got 382d92812de4….*nilearn==0\.14\.1"
    ):
        locate("white_matter")
    monkeypatch.setitem(SOURCES, "white_matter", "nilearn/datasets/data/gone.nii.gz")
    with pytest.raises(DataError, match=r"got a nilearn without it: .*nilearn==0\.14\.1"):
        locate("white_matter")


@pytest.mark.slow
def test_packages_are_found_without_being_imported(tmp_path):
    code = (
        "import sys; from fastlora.medical.data.bundled import build_bundled; build_bundled(sys.argv[1]);"
        f"print([m for m in sys.modules if m.split('.')[0] in {list(REQUIREMENTS)}])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "b")],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert out.stdout.strip() == "[]"


def test_generate_folder_follows_its_recipe(tmp_path):
    calls = []

    def write(folder):
        calls.append(folder)
        (folder / "sub").mkdir()
        (folder / "sub" / "n.txt").write_text(str(len(calls)))

    root = tmp_path / "out"
    for _ in range(2):
        assert generate_folder(root, {"seed": 1, "sizes": (1, 2)}, write) == root
    assert len(calls) == 1
    assert json.loads((root / MANIFEST).read_text())["recipe"] == {"seed": 1, "sizes": [1, 2]}
    generate_folder(root, {"seed": 2}, write)
    assert (root / "sub" / "n.txt").read_text() == "2"


def test_an_interrupted_write_leaves_nothing_and_keeps_the_old(tmp_path):
    def write(folder):
        (folder / "a.txt").write_text("whole")

    def stop(folder):
        (folder / "a.txt").write_text("half")
        raise KeyboardInterrupt

    root = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        generate_folder(root, {"n": 1}, stop)
    assert not list(tmp_path.iterdir())
    generate_folder(root, {"n": 1}, write)
    with pytest.raises(KeyboardInterrupt):
        generate_folder(root, {"n": 2}, stop)
    assert (root / "a.txt").read_text() == "whole"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_generate_folder_rebuilds_after_a_lost_manifest_only_if_nothing_else_is_there(tmp_path):
    root = tmp_path / "out"
    generate_folder(root, {"n": 1}, lambda folder: None)
    (root / MANIFEST).write_text('{"recipe": ')
    generate_folder(root, {"n": 1}, lambda folder: None)
    assert json.loads((root / MANIFEST).read_text())["recipe"] == {"n": 1}
