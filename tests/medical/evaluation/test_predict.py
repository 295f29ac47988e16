"""From an image and a mask to a mesh: its position, its coordinates, and invalid input."""

from __future__ import annotations

import csv
import itertools
import json
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import trimesh
from PIL import Image
from scipy.spatial.transform import Rotation

from fastlora.errors import ConfigError, DataError
from fastlora.medical.commands.predict import main
from fastlora.medical.data.grids import FineGrid, fine_grid, truncated_sdf
from fastlora.medical.evaluation.mesh_files import distinct_colours, write_mesh
from fastlora.medical.evaluation.pictures import overlay_picture
from fastlora.medical.evaluation.predict import (
    LOW_DICE,
    SMALLEST_MM,
    predict_fields,
    predict_structures,
    surface_facts,
)
from fastlora.medical.models.decoder import load_base_model
from fastlora.medical.scans.geometry import mesh_from_sdf, voxelise
from fastlora.medical.scans.scan import Part, Scan
from fastlora.medical.scans.single import open_files, read_label_names, stem
from fastlora.medical.scans.volumes import Case, Source, Volume, load_png, load_volume, save_volume
from tests.support.eval_run import shared_home
from tests.support.tolerance import (
    assert_near,
    assert_same_centre,
    assert_same_field,
    assert_same_place,
)


@dataclass(frozen=True)
class Phantom:
    """A bright structure in a grey image: the image, and the structure's mask on its grid."""

    image: Volume
    mask: np.ndarray

    def predict(self, model, batch_size: int = 8) -> tuple[FineGrid, np.ndarray]:
        grid = fine_grid(self.image, Part.of(self.mask), (0.0, 1.0))
        ((_, _, field),) = predict_fields(model, [("", grid)], batch_size)
        return grid, field

    def surface(self, model) -> tuple[trimesh.Trimesh, dict]:
        grid, field = self.predict(model)
        mesh = mesh_from_sdf(field, grid.affine)
        return mesh, surface_facts(mesh, self.image, Part.of(self.mask))


def phantom(inside, affine: np.ndarray, shape=(40, 36, 30)) -> Phantom:
    """inside: of positions (X, Y, Z, 3) in mm -> mask."""
    places = np.moveaxis(np.indices(shape), 0, -1) @ affine[:3, :3].T + affine[:3, 3]
    mask = inside(places)
    return Phantom(Volume(np.where(mask, 0.7, 0.3).astype(np.float32), affine), mask)


def ball_subject(
    affine: np.ndarray, shape=(40, 36, 30), centre=(19, 17, 14), radius=22.0
) -> Phantom:
    """A ball of a radius in mm around an index."""
    middle = affine[:3, :3] @ centre + affine[:3, 3]
    return phantom(lambda x: np.linalg.norm(x - middle, axis=-1) < radius, affine, shape)


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
    mesh, facts = subject.surface(load_base_model())
    assert facts["dice_with_mask"] > 0.95 and facts["watertight"] and mesh.volume > 0
    middle = affine[:3, :3] @ (19, 17, 14) + affine[:3, 3]
    assert np.linalg.norm(mesh.center_mass - middle) < 0.6
    assert mesh.volume == pytest.approx(4 / 3 * np.pi * 22**3, rel=0.06)
    png = overlay_picture(subject.image, (0.0, 1.0), Part.of(subject.mask), mesh)
    assert png.startswith(b"\x89PNG")


def test_regions_blend_without_seams_and_do_not_depend_on_the_batch():
    subject = ball_subject(affine_of((1.5, 1.5, 1.5)), (70, 50, 40), (35, 25, 20), 26.0)
    model = load_base_model()
    grid, field = subject.predict(model)
    assert field.shape == grid.image.shape and np.isfinite(field).all()
    assert_same_field(field, subject.predict(model, batch_size=3)[1])
    truth = truncated_sdf(grid.mask)
    near = np.abs(truth) < 3
    assert np.abs(field - truth)[near].max() < 2.0  # a misplaced region would differ by more


@pytest.mark.parametrize("kind", ["ply", "stl", "obj", "glb"])
def test_files_state_their_coordinates(kind, tmp_path):
    box = trimesh.creation.box((10, 20, 30))
    box.apply_translation((100, 200, 300))
    for space, sign in (("ras", 1), ("lps", -1)):
        path = tmp_path / f"{space}.{kind}"
        write_mesh(box, path, space, {"volume_ml": 6.0})
        again = trimesh.load(path, force="mesh")
        assert_same_place(again.center_mass, (sign * 100, sign * 200, 300))
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


def write_pair(folder: Path, subject: Phantom) -> tuple[Path, Path]:
    image, mask = folder / "image.nii.gz", folder / "mask.nii.gz"
    save_volume(image, (subject.image.array * 1000).astype(np.int16), subject.image.affine)
    save_volume(mask, subject.mask.astype(np.uint8), subject.image.affine)
    return image, mask


def test_subjects_are_read_and_missing_arguments_are_named(tmp_path):
    subject = ball_subject(AFFINES["flipped"])
    image, mask = write_pair(tmp_path, subject)
    scan = open_files(image, mask, modality="mr")
    assert (list(scan.case.structures), scan.case.modality) == (["mask"], "mr")
    assert scan.part("mask").mask.sum() == subject.mask.sum()
    with pytest.raises(ConfigError, match="modality: expected ct or mr, since .* does not state"):
        open_files(image, mask)
    with pytest.raises(ConfigError, match="spacing: expected three lengths in mm for PNG"):
        open_files(image, mask, modality="mr", spacing=(1, 1, 1))
    labels = subject.mask.astype(np.uint8)
    labels[:20] *= 2
    save_volume(mask, labels, subject.image.affine)
    with pytest.raises(
        ConfigError, match=r"label: expected one of the values .*\[1, 2\], or --all .*, got none"
    ):
        open_files(image, mask, modality="mr")
    half = open_files(image, mask, modality="mr", label=2, structure="half")
    assert 0 < half.part("half").mask.sum() == (labels == 2).sum() < subject.mask.sum()
    assert stem(image) == "image" and stem(tmp_path) == tmp_path.name
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "m.png")
    with pytest.raises(DataError, match="m.png: expected at least one voxel, got an empty mask"):
        open_files(tmp_path / "m.png", tmp_path / "m.png", spacing=(1, 1, 1)).part("m")
    with pytest.raises(ConfigError, match="modality: expected none, since .*m.png is PNG, got ct"):
        open_files(tmp_path / "m.png", mask, modality="ct", spacing=(1, 1, 1))
    with pytest.raises(DataError, match="m.png: expected the shape of image.nii.gz"):
        open_files(image, tmp_path / "m.png", modality="mr", spacing=(1, 1, 1)).part("m")


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
    assert_near(mesh.center_mass[:2], (-33, -30), voxel=1.0)
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
        (
            ["--image", "nix.nii.gz", "--mask", "m.nii.gz"],
            "nix.nii.gz: expected a file or a folder",
        ),
        (["--data_root", "x", "--coordinates", "world"], "invalid choice: 'world'"),
        (
            ["--checkpoint", "no", "--data_root", "x"],
            "no: expected a run folder, a checkpoint (.pt) or an adapter file",
        ),
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
        open_files(tmp_path / "image.png", tmp_path / "mask.png", label=2, spacing=(1, 1, 1))


# ------------------------------------------------------------------------------ any size of structure


@pytest.mark.slow
@pytest.mark.parametrize("parts", ["a large ball", "two parts far apart"])
def test_regions_without_surface_are_part_of_a_prediction(parts):
    size, affine = (64, 64, 64), np.diag([2.0, 2.0, 2.0, 1.0])
    middle = np.array([64.0, 64.0, 64.0])

    def ball(x):  # its inside has regions that are full, its corners regions that are empty
        return np.linalg.norm(x - middle, axis=-1) < 60

    def two(x):
        return np.minimum(
            *(np.linalg.norm(x - middle - (0, 0, side * 45), axis=-1) for side in (-1, 1))
        ) < 12  # fmt: skip

    subject = phantom(ball if parts == "a large ball" else two, affine, size)
    mesh, facts = subject.surface(load_base_model())
    assert facts["dice_with_mask"] > 0.95 and facts["watertight"] and "warning" not in facts
    assert facts["mask_volume_ml"] == pytest.approx(subject.mask.sum() * 8 / 1000)
    assert facts["volume_ml"] == pytest.approx(facts["mask_volume_ml"], rel=0.06)
    assert len(mesh.split()) == (1 if parts == "a large ball" else 2)


@pytest.mark.parametrize(
    ("shape", "diameter"), [("ball", 6), ("ball", 7), ("tube", 4), ("tube", 6), ("sheet", 3)]
)
def test_the_smallest_structures(shape, diameter):
    """Both sides of SMALLEST_MM: a ball of 7 mm, a tube of 6 mm and a sheet of 3 mm are predicted, smaller ones get a warning."""
    axis, centre = np.array([0.6, 0.0, 0.8]), np.array([30.3, 29.6, 30.1])

    def inside(x):
        along = (x - centre) @ axis
        across = np.linalg.norm(x - centre - along[..., None] * axis, axis=-1)
        if shape == "sheet":
            return (np.abs(along) < diameter / 2) & (across < 20)
        from_axis = np.linalg.norm(x - centre, axis=-1) if shape == "ball" else across
        return (from_axis < diameter / 2) & (np.abs(along) < 22)

    _, facts = phantom(inside, np.eye(4), (60, 60, 60)).surface(load_base_model())
    small = diameter < {"ball": SMALLEST_MM[0], "tube": SMALLEST_MM[1], "sheet": 3}[shape]
    assert (facts["dice_with_mask"] >= 0.8) is not small
    assert ("warning" in facts) == (facts["dice_with_mask"] < LOW_DICE) == small
    if small:
        assert "compact structures below about 7 mm and tubes below about 6 mm" in facts["warning"]


def test_a_structure_that_vanishes_is_named_with_the_reason():
    wire = phantom(lambda x: np.linalg.norm(x[..., :2] - 20.2, axis=-1) < 1.6, np.eye(4))
    scan = scan_of(wire, {"wire": wire.mask})
    model = load_base_model()
    model.config = replace(model.config, fraction_steps=0)  # with them even a wire keeps its volume
    ((name, problem),) = predict_structures(model, scan, ["wire"])
    assert name == "wire" and isinstance(problem, DataError)
    assert "tubes below about 6 mm in diameter shrink or vanish" in str(problem)


# ------------------------------------------------------------------------------ all labels of an image


class _InMemory(Scan):
    """A scan whose files are arrays."""

    def __init__(self, image: Volume, masks: dict[str, np.ndarray]):
        sources = {name: Source(Path(name)) for name in masks}
        super().__init__(Case("s", "grey", Path("image"), sources))
        self._image, self.masks = image, masks

    def part(self, structure):
        return Part.of(self.masks[structure])


def scan_of(subject: Phantom, masks: dict[str, np.ndarray]) -> Scan:
    return _InMemory(subject.image, masks)


def test_structures_share_batches_and_fail_alone():
    model = load_base_model()
    affine = np.diag([1.5, 1.5, 1.5, 1.0])
    subjects = [
        phantom(lambda x, c=c: np.linalg.norm(x - c, axis=-1) < 14, affine, (50, 50, 50))
        for c in ((20, 24, 25), (50, 45, 40), (30, 50, 22))
    ]
    image = Volume(np.max([s.image.array for s in subjects], axis=0), subjects[0].image.affine)
    masks = {f"ball_{n}": s.mask for n, s in enumerate(subjects)}
    masks = {"ball_0": masks["ball_0"], "void": 0 * masks["ball_0"], **masks}
    scan = _InMemory(image, masks)
    for batch_size in (1, 5, 64):
        found = dict(predict_structures(model, scan, masks, batch_size))
        assert set(found) == set(masks)
        assert isinstance(found.pop("void"), DataError)
        for name, surface in found.items():
            ((_, alone),) = predict_structures(model, scan, [name])
            np.testing.assert_allclose(
                surface.mesh.vertices, alone.mesh.vertices, **close_in_mm(image)
            )
            assert surface.facts["dice_with_mask"] > 0.95


def close_in_mm(image: Volume) -> dict[str, float]:
    """A hundredth of a voxel: batches of other sizes round differently."""
    return {"rtol": 0.0, "atol": 0.01 * float(image.spacing.min())}


@pytest.fixture(scope="module")
def organs(tmp_path_factory) -> Path:
    """A folder with ct.nii.gz and labels.nii.gz: balls of 12, 15 and 18 mm with the labels 2, 5 and 300, one of 2 mm with 7."""
    folder = tmp_path_factory.mktemp("organs")
    affine = affine_of((1.5, 1.5, 2.0), (0, 0, 20), (-1, 1, 1))
    labels = np.zeros((70, 60, 50), np.int16)
    places = np.moveaxis(np.indices(labels.shape), 0, -1) * (1.5, 1.5, 2.0)
    for value, centre, radius in (
        *((2, (25, 30, 30), 12), (5, (70, 30, 40), 15), (300, (45, 65, 70), 18)),
        (7, (90, 75, 15), 2),
    ):
        labels[np.linalg.norm(places - centre, axis=-1) < radius] = value
    save_volume(folder / "ct.nii.gz", np.where(labels > 0, 60, -90).astype(np.int16), affine)
    save_volume(folder / "labels.nii.gz", labels, affine)
    (folder / "names.txt").write_text('# comment\n2 liver 1 2 3 0\n5 0 0 9 1 1 1 "Left Kidney"\n')
    return folder


def predict_all(home: Path, organs: Path, out: Path, *more: object) -> int:
    flags = ["--checkpoint", home / "lora", "--image", organs / "ct.nii.gz", "--output_dir", out]
    flags += ["--mask", organs / "labels.nii.gz", "--all", "--no-picture", *more]
    return main([str(flag) for flag in flags])


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_all_labels_of_an_image_in_one_call(home, organs, tmp_path, capsys, monkeypatch):
    reads = count_reads(monkeypatch)
    names = ("--label_names", organs / "names.txt", "--skip_invalid", "--coordinates", "lps")
    assert predict_all(home, organs, tmp_path, *names) == 0
    out = capsys.readouterr().out
    assert reads == {"ct.nii.gz": 1, "labels.nii.gz": 1}
    rows = read_rows(tmp_path / "ct_predictions.csv")
    assert [(r["structure"], r["label"]) for r in rows] == [
        *(("liver", "2"), ("left_kidney", "5"), ("label_7", ""), ("label_300", "300"))
    ]
    assert "ct: label_7: " in rows[2]["problem"] and "vanish" in rows[2]["problem"]
    assert "ct label_7: skipped:" in out and "3 surfaces, 1 skipped" in out
    assert "ct: image " in out and "decoder " in out  # the time of each step

    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "ct_predictions.csv").write_text("a,b\n1,2\n")
    assert predict_all(home, organs, tmp_path / "table", *names) == 2
    assert [p.name for p in (tmp_path / "table").iterdir()] == ["ct_predictions.csv"]

    labels = load_volume(organs / "labels.nii.gz")
    scene = trimesh.load(tmp_path / "ct_scene.glb")
    assert set(scene.graph.nodes_geometry) == {"liver", "left_kidney", "label_300"}
    colours = set()
    for row, radius in ((rows[0], 12), (rows[1], 15), (rows[3], 18)):
        ball = 4 / 3 * np.pi * radius**3 / 1000  # the tiny model shrinks it
        assert float(row["volume_ml"]) == pytest.approx(ball, rel=0.2)
        assert float(row["mask_volume_ml"]) == pytest.approx(
            np.count_nonzero(labels.array == int(row["label"])) * 4.5 / 1000, abs=1e-3
        )
        assert float(row["surface_cm2"]) == pytest.approx(4 * np.pi * radius**2 / 100, rel=0.12)
        assert float(row["dice_with_mask"]) > 0.9 and row["watertight"] == "True"
        mesh = trimesh.load(tmp_path / row["mesh"])
        geometry = scene.geometry[scene.graph[row["structure"]][1]]
        transform = scene.graph[row["structure"]][0]
        np.testing.assert_allclose(transform, np.eye(4))
        assert_same_place(geometry.bounds, mesh.bounds)
        mesh.vertices *= (-1, -1, 1)  # from LPS
        place = np.argwhere(labels.array == int(row["label"])).mean(0)
        assert_same_centre(mesh.center_mass, labels.affine[:3, :3] @ place + labels.affine[:3, 3])
        colours.add(tuple(geometry.visual.material.baseColorFactor))
    about = json.loads((tmp_path / "ct_scene.json").read_text())
    assert len(colours) == 3 == len(set(about["colours"].values()))
    assert about["coordinates"] == "LPS" and about["image"] == str(organs / "ct.nii.gz")
    one = json.loads((tmp_path / "ct_liver.json").read_text())
    assert (one["label"], one["mask"]) == (2, str(organs / "labels.nii.gz"))


def count_reads(monkeypatch) -> dict[str, int]:
    """How often nibabel's `load` opens each file, by name."""
    reads: dict[str, int] = {}
    original = nib.load

    def load(path, **options):
        reads[Path(path).name] = reads.get(Path(path).name, 0) + 1
        return original(path, **options)

    monkeypatch.setattr(nib, "load", load)
    return reads


def test_a_structure_that_fails_keeps_the_table_of_the_others(home, organs, tmp_path, capsys):
    assert predict_all(home, organs, tmp_path) == 2
    assert "vanish" in capsys.readouterr().err
    rows = read_rows(tmp_path / "ct_predictions.csv")
    written = {row["mesh"] for row in rows if row["mesh"]}
    assert written and written == {path.name for path in tmp_path.glob("*.ply")}


def test_flags_that_contradict_are_named(home, organs, tmp_path, capsys):
    names = ["--label_names", organs / "names.txt"]
    for more, message in (
        (["--label", 2], "all: expected neither label nor structure with it"),
        (["--classes", "liver"], "classes: expected only with --data_root"),
        (["--label_names", organs / "no.txt"], "no.txt: expected the names of labels"),
    ):
        assert predict_all(home, organs, tmp_path / "out", *more) == 2
        assert message in capsys.readouterr().err
    flags = ["--checkpoint", home / "lora", "--output_dir", tmp_path / "out", *names]
    flags += ["--image", organs / "ct.nii.gz", "--mask", organs / "labels.nii.gz"]
    assert main([str(flag) for flag in flags]) == 2
    assert "label_names: expected it with --all or --label" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_another_image_never_replaces_a_mesh(home, tmp_path, capsys, monkeypatch):
    """Files of equal names in the folders of several subjects, predicted one by one into one folder."""
    first = ball_subject(AFFINES["isotropic"])
    second = ball_subject(AFFINES["isotropic"], radius=16.0)
    for name, subject in (("p0", first), ("p1", second)):
        (tmp_path / name).mkdir()
        write_pair(tmp_path / name, subject)

    def predict(name: str, *more: str) -> int:
        files = ["--image", f"{name}/image.nii.gz", "--mask", f"{name}/mask.nii.gz"]
        flags = ["--checkpoint", home / "lora", "--output_dir", "out", "--modality", "mr"]
        return main([*map(str, flags), *files, *more])

    monkeypatch.chdir(tmp_path)
    assert predict("p0") == 0
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    assert {path.name for path in before} == {f"image_mask.{e}" for e in ("ply", "json", "png")}
    assert predict("p1") == 2
    err = capsys.readouterr().err
    assert "image_mask.ply exists and has the image" in err and "--subject" in err
    assert {path: path.read_bytes() for path in Path("out").iterdir()} == before
    assert predict("p0") == 0  # the same again
    assert predict("p1", "--subject", "p1") == 0
    assert trimesh.load("out/p1_mask.ply").volume < trimesh.load("out/image_mask.ply").volume
    assert predict("p1", "--overwrite") == 0
    assert trimesh.load("out/image_mask.ply").volume == trimesh.load("out/p1_mask.ply").volume
    Path("out/q_mask.ply").write_text("mine")
    assert predict("p1", "--subject", "q") == 2
    assert "q_mask.ply exists and was not written by this command" in capsys.readouterr().err
    assert Path("out/q_mask.ply").read_text() == "mine"
    for name in ("r_mask.png", "r_mask.json"):
        Path("out", name).write_text("mine")
        assert predict("p1", "--subject", "r") == 2
        assert "was not written by this command" in capsys.readouterr().err
        assert Path("out", name).read_text() == "mine"
        Path("out", name).unlink()


def test_other_labels_and_masks_of_an_image_make_other_files(home, organs, tmp_path, capsys):
    flags = ["--checkpoint", home / "lora", "--image", organs / "ct.nii.gz", "--no-picture"]
    flags = [*map(str, flags), "--output_dir", str(tmp_path / "out")]
    labels = load_volume(organs / "labels.nii.gz")
    for value in (2, 5):
        assert main([*flags, "--mask", str(organs / "labels.nii.gz"), "--label", str(value)]) == 0
        about = json.loads((tmp_path / "out" / f"ct_label_{value}.json").read_text())
        assert about["label"] == value
        voxels = np.count_nonzero(labels.array == value)
        assert about["mask_volume_ml"] == pytest.approx(voxels * 4.5 / 1000, abs=1e-3)
    other = tmp_path / "other" / "label_2.nii.gz"
    save_volume(other, (labels.array == 5).astype(np.uint8), labels.affine)
    assert main([*flags, "--mask", str(other)]) == 2
    err = capsys.readouterr().err
    assert "ct_label_2.ply exists and has the mask" in err and "--structure" in err
    assert main([*flags, "--mask", str(other), "--structure", "better"]) == 0


def test_names_of_subject_and_structure_never_make_one_file(home, tmp_path):
    """`a` with `b_c`, `a_b` with `c`, and `A_B` with `c`: three meshes."""
    subject = ball_subject(AFFINES["isotropic"])
    image, mask = write_pair(tmp_path, subject)
    for name, structure in (("a", "b_c"), ("a_b", "c"), ("A_B", "c")):
        folder = tmp_path / "data" / name
        (folder / "segmentations").mkdir(parents=True)
        (folder / "mri.nii.gz").write_bytes(image.read_bytes())
        (folder / "segmentations" / f"{structure}.nii.gz").write_bytes(mask.read_bytes())
    flags = ["--data_root", tmp_path / "data", "--output_dir", tmp_path / "out", "--no-picture"]
    assert main([str(f) for f in ["--checkpoint", home / "lora", *flags]]) == 0
    rows = read_rows(tmp_path / "out" / "predictions.csv")
    names = {row["mesh"] for row in rows}
    assert len({name.lower() for name in names}) == 3
    assert names == {path.name for path in (tmp_path / "out").glob("*.ply")}
    for row in rows:
        about = json.loads((tmp_path / "out" / row["mesh"]).with_suffix(".json").read_text())
        assert (about["subject"], about["structure"]) == (row["subject"], row["structure"])


def test_a_channel_of_a_4d_image(home, tmp_path):
    subject = ball_subject(AFFINES["isotropic"])
    _, mask = write_pair(tmp_path, subject)
    grey = (subject.image.array * 1000).astype(np.int16)
    both = np.stack([0 * grey + 3, grey], axis=-1)
    nib.save(nib.Nifti1Image(both, subject.image.affine), tmp_path / "both.nii.gz")
    files = {"modality": "mr", "channel": 1}
    scan = open_files(tmp_path / "both.nii.gz", mask, **files)
    np.testing.assert_array_equal(scan.image.array, grey)
    with pytest.raises(DataError, match=r"both.nii.gz: expected a channel below 2, got 2"):
        _ = open_files(tmp_path / "both.nii.gz", mask, modality="mr", channel=2).image


def test_label_names_are_read_from_every_common_file(tmp_path):
    lines = {
        "slicer.ctbl": "# Color table\n0 Background 0 0 0 0\n1 liver 10 20 30 255\n2 Linke_Niere 1 2 3 255\n",
        "snap.txt": '1   255    0    0        1  1  1    "liver"\n2 0 0 0 1.0 1 1 "Linke_Niere"\n',
        "FreeSurferColorLUT.txt": "\n#No. Label\n0   Unknown 0 0 0 0\n1  liver  2 3 4 0\n2 Linke_Niere 0 0 0 0\n",
        "plain.txt": "1 liver\n2, Linke_Niere\n",
        "tabs.txt": "1\tliver\n2\tLinke_Niere\t1\t2\t3\n",
        "a.json": '{"1": "liver", "2": "Linke_Niere"}',
        "b.json": '{"liver": 1, "Linke_Niere": 2, "background": 0}',
        "dataset.json": '{"labels": {"background": 0, "liver": 1, "Linke_Niere": "2"}}',
    }
    for name, text in lines.items():
        (tmp_path / name).write_text(text)
        assert read_label_names(tmp_path / name) == {1: "liver", 2: "Linke_Niere"}, name
    (tmp_path / "blanks.txt").write_text(
        "1,Left Lung\n2 L5 vertebra\n3 Rib 5\n14 3rd-Ventricle 204 182 142 0\n5 255 0 0\n6 Left Kidney  1 2 3 255\n"
    )
    assert read_label_names(tmp_path / "blanks.txt") == {
        1: "Left Lung", 2: "L5 vertebra", 3: "Rib 5", 14: "3rd-Ventricle", 6: "Left Kidney"
    }  # fmt: skip
    for name, text in (("x.json", "[1]"), ("y.json", "{"), ("z.txt", "no number"), ("w.txt", "")):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=name):
            read_label_names(tmp_path / name)


def test_labels_of_equal_names_stay_apart(home, organs, tmp_path):
    (tmp_path / "names.json").write_text('{"2": "node", "5": "Node", "300": "node+"}')
    names = read_label_names(tmp_path / "names.json")
    scan = open_files(organs / "ct.nii.gz", organs / "labels.nii.gz", every_label=True, names=names)
    assert {n: s.label for n, s in scan.case.structures.items()} == {
        "node_2": 2, "node_5": 5, "label_7": 7, "node_300": 300
    }  # fmt: skip


def test_colours_differ():
    assert len(set(distinct_colours(120))) == 120
    near = distinct_colours(20)
    assert all(np.abs(np.subtract(a, b)).sum() > 100 for a, b in itertools.pairwise(near))


def test_an_assumed_orientation_is_in_the_output(home, tmp_path, capsys):
    subject = ball_subject(AFFINES["isotropic"])
    files = write_pair(tmp_path, subject)
    for path in files:
        image = nib.load(path)
        plain = nib.Nifti1Image(np.asarray(image.dataobj), None, image.header)
        plain.set_qform(None, 0)
        plain.set_sform(None, 0)
        nib.save(plain, path)
    flags = ["--checkpoint", home / "lora", "--image", files[0], "--mask", files[1]]
    flags += ["--modality", "mr", "--output_dir", tmp_path / "out"]
    assert main([str(flag) for flag in flags]) == 0
    about = json.loads((tmp_path / "out" / "image_mask.json").read_text())
    assert about["orientation"].startswith("assumed")
    out = capsys.readouterr().out
    assert "image.nii.gz: the header states no orientation" in out
    assert "mm in RAS, orientation assumed, since the image's header states none" in out


def test_an_error_names_the_structure_and_flags_without_effect_are_refused(
    home, organs, tmp_path, capsys
):
    assert predict_all(home, organs, tmp_path) == 2
    assert "error: ct: label_7: " in capsys.readouterr().err
    files = organs / "ct.nii.gz", organs / "labels.nii.gz"
    with pytest.raises(ConfigError, match="intercept: expected it with a CT only, got -1024"):
        open_files(*files, modality="mr", label=2, intercept=-1024.0)
    scan = open_files(*files, label=-2)
    assert list(scan.case.structures) == ["label_-2"]
    with pytest.raises(DataError, match="expected at least one voxel of label -2"):
        scan.part("label_-2")
