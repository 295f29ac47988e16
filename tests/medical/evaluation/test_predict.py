"""From an image and a mask to a mesh: its position, its coordinates, and invalid input."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import trimesh
from PIL import Image
from scipy.spatial.transform import Rotation

from fastlora.errors import ConfigError, DataError
from fastlora.medical.commands.predict import main
from fastlora.medical.data.geometry import voxelise
from fastlora.medical.data.grids import StructureGrid
from fastlora.medical.data.volumes import Volume, load_png, load_volume, save_volume
from fastlora.medical.evaluation.pictures import overlay_picture
from fastlora.medical.evaluation.predict import (
    Subject,
    predict_field,
    predict_mesh,
    read_subject,
    stem,
    write_mesh,
)
from fastlora.medical.models.decoder import load_base_model
from tests.support.eval_run import shared_home


def ball_subject(
    affine: np.ndarray, shape=(40, 36, 30), centre=(19, 17, 14), radius=22.0
) -> Subject:
    """A bright ball of a radius in mm on a grid."""
    places = np.moveaxis(np.indices(shape), 0, -1) @ affine[:3, :3].T + affine[:3, 3]
    middle = affine[:3, :3] @ centre + affine[:3, 3]
    mask = np.linalg.norm(places - middle, axis=-1) < radius
    return Subject(
        Volume(np.where(mask, 0.7, 0.3).astype(np.float32), affine), mask, "grey", "ball"
    )


def affine_of(spacing, degrees=(0, 0, 0), flips=(1, 1, 1)) -> np.ndarray:
    affine = np.eye(4)
    turn = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()
    affine[:3, :3] = turn @ np.diag(np.array(spacing, float) * flips)
    affine[:3, 3] = (-50, 80, 30)
    return affine


AFFINES = {
    "isotropic": affine_of((1.5, 1.5, 1.5)),
    "anisotropic": affine_of((1.2, 1.4, 3.0)),
    "oblique": affine_of((1.5, 1.3, 2.0), (10, -20, 15)),
    "flipped": affine_of((1.5, 1.5, 2.0), (5, 0, 0), (-1, 1, 1)),
}


@pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES)
def test_a_mesh_lies_on_its_mask_whatever_the_affine(affine):
    subject = ball_subject(affine)
    mesh, facts = predict_mesh(load_base_model(), subject)
    assert facts["dice_with_mask"] > 0.95 and facts["watertight"] and mesh.volume > 0
    middle = affine[:3, :3] @ (19, 17, 14) + affine[:3, 3]
    assert np.linalg.norm(mesh.center_mass - middle) < 0.6
    assert mesh.volume == pytest.approx(4 / 3 * np.pi * 22**3, rel=0.06)
    png = overlay_picture(subject.image, subject.image.array, subject.mask, mesh)
    assert png.startswith(b"\x89PNG")


def test_regions_blend_without_seams_and_do_not_depend_on_the_batch():
    subject = ball_subject(affine_of((1.5, 1.5, 1.5)), (70, 50, 40), (35, 25, 20), 26.0)
    grid = StructureGrid.make(subject.image, subject.mask, "grey")
    model = load_base_model()
    field = predict_field(model, grid)
    assert field.shape == grid.image.shape and np.isfinite(field).all()
    np.testing.assert_allclose(field, predict_field(model, grid, batch_size=3), atol=1e-4)
    near = np.abs(grid.sdf_vox) < 3
    assert np.abs(field - grid.sdf_vox)[near].max() < 2.0  # a misplaced region would differ by more


@pytest.mark.parametrize("kind", ["ply", "stl", "obj", "glb"])
def test_files_state_their_coordinates(kind, tmp_path):
    box = trimesh.creation.box((10, 20, 30))
    box.apply_translation((100, 200, 300))
    for space, sign in (("ras", 1), ("lps", -1)):
        path = tmp_path / f"{space}.{kind}"
        write_mesh(box, path, space, {"volume_ml": 6.0})
        again = trimesh.load(path, force="mesh")
        np.testing.assert_allclose(again.center_mass, (sign * 100, sign * 200, 300), atol=1e-3)
        assert again.volume == pytest.approx(6000, rel=1e-4)
        raw = path.read_bytes()
        assert space.upper().encode() in raw and b"SPACE" in raw and b"UNIT" in raw
        about = json.loads(path.with_suffix(".json").read_text())
        assert (about["coordinates"], about["unit"]) == (space.upper(), "mm")
        assert about["axes"].split()[-3:-2] == ["right," if space == "ras" else "left,"]
    with pytest.raises(ConfigError, match="coordinates: expected one of ras, lps, got 'xyz'"):
        write_mesh(box, tmp_path / "a.ply", "xyz", {})
    with pytest.raises(ConfigError, match="mesh_format: expected ply, stl, obj or glb"):
        write_mesh(box, tmp_path / "a.vtk", "ras", {})


def test_a_png_stack_is_axial_and_grey(tmp_path):
    pixels = np.zeros((5, 7), np.uint8)  # 5 rows, 7 columns
    pixels[1, 4] = 255
    for n in range(3):
        Image.fromarray(pixels if n == 2 else 0 * pixels).save(tmp_path / f"{n}.png")
    volume = load_png(tmp_path, (0.5, 2.0, 3.0))
    assert volume.shape == (7, 5, 3) and nib.aff2axcodes(volume.affine) == ("R", "A", "S")
    place = volume.affine @ (*np.argwhere(volume.array == 1)[0], 1)
    np.testing.assert_allclose(place[:3], (-4 * 0.5, -1 * 2.0, 2 * 3.0))  # left, back, head
    assert load_png(tmp_path / "2.png", (1, 1, 1)).array.max() == 1
    wide = Image.fromarray(np.full((5, 7), 65535, np.uint16))
    wide.save(tmp_path / "wide.png")
    assert load_png(tmp_path / "wide.png", (1, 1, 1)).array.min() == 1
    with pytest.raises(DataError, match="spacing: expected three positive"):
        load_png(tmp_path, (1, 1, 0))
    Image.fromarray(np.zeros((4, 7), np.uint8)).save(tmp_path / "3.png")
    with pytest.raises(DataError, match=r"3.png: expected \(5, 7\) pixels, got \(4, 7\)"):
        load_png(tmp_path, (1, 1, 1))
    colour = np.zeros((5, 7, 3), np.uint8)
    colour[..., 0] = 9
    Image.fromarray(colour).save(tmp_path / "colour.png")
    with pytest.raises(DataError, match="expected a greyscale image, got a colour image"):
        load_png(tmp_path / "colour.png", (1, 1, 1))
    (tmp_path / "bad.png").write_bytes(b"no")
    with pytest.raises(DataError, match="bad.png: expected a readable PNG"):
        load_png(tmp_path / "bad.png", (1, 1, 1))


def write_pair(folder: Path, subject: Subject) -> tuple[Path, Path]:
    image, mask = folder / "image.nii.gz", folder / "mask.nii.gz"
    save_volume(image, (subject.image.array * 1000).astype(np.int16), subject.image.affine)
    save_volume(mask, subject.mask.astype(np.uint8), subject.image.affine)
    return image, mask


def test_subjects_are_read_and_missing_arguments_are_named(tmp_path):
    subject = ball_subject(AFFINES["flipped"])
    image, mask = write_pair(tmp_path, subject)
    read = read_subject(image, mask, modality="mr")
    assert (read.structure, read.modality) == ("mask", "mr")
    assert read.mask.sum() == subject.mask.sum()
    with pytest.raises(ConfigError, match="modality: expected ct or mr, since .* does not state"):
        read_subject(image, mask)
    with pytest.raises(ConfigError, match="spacing: expected three lengths in mm for PNG"):
        read_subject(image, mask, modality="mr", spacing=(1, 1, 1))
    labels = subject.mask.astype(np.uint8)
    labels[:20] *= 2
    save_volume(mask, labels, subject.image.affine)
    with pytest.raises(
        ConfigError, match=r"label: expected one of the values .*\[1, 2\], got none"
    ):
        read_subject(image, mask, modality="mr")
    part = read_subject(image, mask, modality="mr", label=2, structure="half")
    assert 0 < part.mask.sum() < subject.mask.sum() and part.structure == "half"
    assert stem(image) == "image" and stem(tmp_path) == tmp_path.name
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "m.png")
    with pytest.raises(DataError, match="m.png: expected at least one voxel, got an empty mask"):
        read_subject(tmp_path / "m.png", tmp_path / "m.png", spacing=(1, 1, 1))
    with pytest.raises(ConfigError, match="modality: expected none, since .*m.png is PNG, got ct"):
        read_subject(tmp_path / "m.png", mask, modality="ct", spacing=(1, 1, 1))
    with pytest.raises(DataError, match="m.png: expected the shape of image.nii.gz"):
        read_subject(image, tmp_path / "m.png", modality="mr", spacing=(1, 1, 1))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_home(tmp_path_factory.getbasetemp())


def test_one_image_merged_and_unmerged(home, tmp_path, capsys):
    image, mask = write_pair(tmp_path, ball_subject(AFFINES["oblique"]))
    flags = ["--image", image, "--mask", mask, "--modality", "mr", "--coordinates", "lps"]
    for out, more in (("plain", []), ("merged", ["--merged"])):
        where = ["--checkpoint", home / "lora", "--output_dir", tmp_path / out]
        assert main([str(f) for f in [*where, *flags, *more, "--mesh_format", "stl"]]) == 0
    assert "mm in LPS" in capsys.readouterr().out
    plain, merged = (trimesh.load(tmp_path / o / "image_mask.stl") for o in ("plain", "merged"))
    assert plain.volume == pytest.approx(merged.volume, rel=1e-4)
    plain.vertices *= (-1, -1, 1)  # back to RAS
    volume = load_volume(mask)
    inside = voxelise(plain, volume.affine, volume.shape)
    assert (inside == (volume.array > 0)).mean() > 0.97
    about = json.loads((tmp_path / "merged" / "image_mask.json").read_text())
    assert about["merged"] is True and about["coordinates"] == "LPS"
    assert (tmp_path / "plain" / "image_mask.png").is_file()


def test_a_png_slice_becomes_a_slab_of_its_thickness(home, tmp_path):
    rows, columns = np.indices((64, 64))
    disc = ((rows - 30) ** 2 + (columns - 33) ** 2 < 20**2).astype(np.uint8)
    Image.fromarray(60 + 120 * disc).save(tmp_path / "slice.png")
    Image.fromarray(255 * disc).save(tmp_path / "disc.png")
    where = ["--checkpoint", home / "lora", "--output_dir", tmp_path / "out", "--no-picture"]
    files = ["--image", tmp_path / "slice.png", "--mask", tmp_path / "disc.png"]
    assert main([str(f) for f in [*where, *files, "--spacing", 1, 1, 6]]) == 0
    mesh = trimesh.load(tmp_path / "out" / "slice_disc.ply")
    assert mesh.extents[2] == pytest.approx(6, abs=2.5)
    np.testing.assert_allclose(mesh.center_mass[:2], (-33, -30), atol=1.5)
    assert not (tmp_path / "out" / "slice_disc.png").exists()


def test_batch_mode_lists_what_it_skipped(home, tmp_path, capsys):
    root = tmp_path / "data"
    image, mask = write_pair(tmp_path, ball_subject(AFFINES["anisotropic"]))
    for subject in ("a", "b"):
        (root / subject / "segmentations").mkdir(parents=True)
        (root / subject / "mri.nii.gz").write_bytes(image.read_bytes())
        (root / subject / "segmentations" / "ball.nii.gz").write_bytes(mask.read_bytes())
    empty = load_volume(mask)
    path = root / "b" / "segmentations" / "void.nii.gz"
    save_volume(path, np.zeros(empty.shape, np.uint8), empty.affine)
    flags = ["--checkpoint", home / "lora", "--data_root", root, "--output_dir", tmp_path / "out"]
    flags = [*map(str, flags), "--no-picture"]
    assert main(flags) == 2
    assert "void.nii.gz: expected at least one voxel" in capsys.readouterr().err
    assert main([*flags, "--skip_invalid"]) == 0
    with (tmp_path / "out" / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["subject"], r["structure"], bool(r["problem"])) for r in rows] == [
        ("a", "ball", False),
        ("b", "ball", False),
        ("b", "void", True),
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "expected either --image and --mask, or --data_root"),
        (["--image", "a.nii.gz"], "expected either --image and --mask, or --data_root"),
        (["--data_root", "x", "--label", "1"], "label: expected only with --image"),
        (["--data_root", "x", "--batch_size", "0"], "batch_size: expected >= 1, got 0"),
        (["--data_root", "nix"], "nix: expected a folder of cases"),
        (["--image", "nix.nii.gz", "--mask", "m.nii.gz"], "nix.nii.gz: expected a NIfTI file"),
        (["--data_root", "x", "--coordinates", "world"], "invalid choice: 'world'"),
        (["--checkpoint", "no", "--data_root", "x"], "no: no checkpoint 'best'"),
    ],
)
def test_invalid_input_is_one_line_and_exit_code_2(
    home, tmp_path, capsys, monkeypatch, flags, message
):
    monkeypatch.chdir(tmp_path)
    base = ["--checkpoint", str(home / "lora"), "--output_dir", "out"]
    assert main([*base, *flags]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert not (tmp_path / "out").exists()


def test_a_file_of_another_format_named_png_is_refused(tmp_path):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "x.tiff")
    (tmp_path / "x.tiff").rename(tmp_path / "x.png")
    with pytest.raises(DataError, match="expected a readable PNG"):
        load_png(tmp_path / "x.png", (1, 1, 1))
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:30])
    with pytest.raises(DataError, match="expected a readable PNG"):
        load_png(tmp_path / "cut.png", (1, 1, 1))
    for spacing in ((1e-200, 1, 1), (1e300, 1, 1)):
        with pytest.raises(DataError):
            load_png(tmp_path / "good.png", spacing)


def test_a_png_mask_takes_no_label(tmp_path):
    for name in ("image.png", "mask.png"):
        Image.fromarray(np.full((8, 8), 2, np.uint8)).save(tmp_path / name)
    with pytest.raises(ConfigError, match="label: expected none, since .*mask.png is PNG"):
        read_subject(tmp_path / "image.png", tmp_path / "mask.png", label=2, spacing=(1, 1, 1))
