"""SAM 3D's decoder on regions: geometry, losses, training, evaluation and prediction, with a small package with the same paths (`sam3d_package.py`)."""

import contextlib
import io
import json

import numpy as np
import pytest
import torch
import trimesh
from safetensors.torch import load_file, save_file

import fastlora
from fastlora.errors import ConfigError, DataError
from fastlora.medical.commands.evaluate import main as evaluate_main
from fastlora.medical.commands.predict import main as predict_main
from fastlora.medical.data.batch import RegionBatch, collate_regions
from fastlora.medical.data.phantom import write_phantom_dataset
from fastlora.medical.data.regions import RegionDataset, base_distance, coarse_segmentation
from fastlora.medical.data.splits import make_splits
from fastlora.medical.sam3d.decoder import active_voxels, voxel_features
from fastlora.medical.sam3d.loading import load_part
from fastlora.medical.sam3d.options import Sam3dOptions
from fastlora.medical.sam3d.surface import (
    LOSS_WEIGHTS,
    Decoded,
    Surface,
    sample_volume,
    surface_losses,
    true_points,
)
from fastlora.medical.training.checkpointing import read_checkpoint
from fastlora.medical.training.config import TrainConfig
from fastlora.medical.training.data import load_cases
from fastlora.medical.training.finetuned import load_finetuned, predict
from fastlora.medical.training.trainer import MedicalTrainer
from tests.support.tiny_run import TinyRegions, assert_same_run
from tests.support.tolerance import assert_follows, assert_same_distances

pytest_plugins = "tests.support.sam3d_fixtures"


# --------------------------------------------------------------------------- geometry and encoder


GRID = np.stack(np.meshgrid(*3 * [np.arange(32.0)], indexing="ij"), axis=-1)
CENTRE = np.array([15.0, 16.5, 14.0])


def sphere_sdf(points, radius=9.0):
    """Signed distance to a sphere in fine voxels, of index coordinates (..., 3)."""
    return (points - torch.as_tensor(CENTRE, dtype=points.dtype)).norm(dim=-1) - radius


def sphere_batch():
    """A batch of one region: a sphere, and its brightness in the image."""
    sdf = sphere_sdf(torch.from_numpy(GRID).float()).clamp(-4, 4)
    mask = (sdf < 0).numpy()
    sample = TinyRegions(1, 0)[0]
    coarse = coarse_segmentation(mask)
    sample |= {"sdf_vox": sdf.numpy(), "coarse": coarse, "base_vox": base_distance(coarse)}
    sample["image"] = np.where(mask, 0.7, 0.3).astype(np.float32)
    return collate_regions([sample])


def sphere_surface(batch, resolution=8, moved=0.0, sign=1.0, seed=0):
    """The output of a perfect decoder for the sphere: corners moved at random, distances there, a mesh."""
    generator = torch.Generator().manual_seed(seed)
    voxels = active_voxels(batch.base_vox, resolution)[:, 1:]
    steps = torch.arange(5)
    corners = torch.unique(
        (voxels[:, None] * 4 + torch.cartesian_prod(steps, steps, steps)).reshape(-1, 3), dim=0
    )
    edge = 32 / (4 * resolution)
    shift = moved * edge * (torch.rand(corners.shape, generator=generator) - 0.5)
    points = corners * edge - 0.5 + shift
    ball = trimesh.creation.icosphere(4, 9.0)
    return Surface(
        points,
        (sign * sphere_sdf(points)).requires_grad_(),
        corners,
        torch.tensor(ball.vertices + CENTRE, dtype=torch.float32, requires_grad=True),
        torch.tensor(ball.faces[:, :: int(sign)].copy()),
        torch.zeros(()),
    )


def test_a_volume_is_read_along_its_own_axes_with_its_border_repeated():
    weights = torch.tensor([1.0, -2.0, 0.5])
    volume = (torch.from_numpy(GRID).float()[:8, :9, :10] * weights).sum(-1)
    points = torch.tensor([[1.25, 2.5, 3.75], [6.9, 7.1, 8.2]], requires_grad=True)
    values = sample_volume(volume, points)
    torch.testing.assert_close(values, (points * weights).sum(-1))
    (gradient,) = torch.autograd.grad(values.sum(), points)
    torch.testing.assert_close(gradient, weights.expand(2, 3))
    assert sample_volume(volume, torch.tensor([[-3.0, 0, 99]])) == volume[0, 0, 9]


@pytest.mark.parametrize("resolution", [8, 16, 64])
def test_active_voxels_hold_the_surface_and_not_everything(resolution):
    batch = sphere_batch()
    voxels = active_voxels(batch.base_vox, resolution)
    near = torch.zeros(3 * [resolution], dtype=torch.bool)
    near[tuple(voxels[:, 1:].T)] = True
    place = ((true_points(batch.sdf_vox[0]) + 0.5) * resolution / 32).long()
    assert near[tuple(place.T)].all() and near.float().mean() < 0.5


@pytest.mark.parametrize("resolution", [8, 16, 64])
def test_active_voxels_hold_the_surface_of_phantoms(volumes, resolution):
    splits = make_splits(load_cases(TrainConfig(data_root=str(volumes))), "file")
    dataset = RegionDataset([spec for specs in splits.values() for spec in specs])
    for sample in (dataset[index] for index in range(len(dataset))):
        near = torch.zeros(3 * [resolution], dtype=torch.bool)
        base = torch.from_numpy(sample["base_vox"])[None]
        near[tuple(active_voxels(base, resolution)[:, 1:].T)] = True
        place = (true_points(torch.from_numpy(sample["sdf_vox"])) + 0.5) * resolution / 32
        assert near[tuple(place.long().clamp(0, resolution - 1).T)].all()


def test_the_encoder_gets_the_image_and_the_segmentation_around_each_voxel():
    batch = sphere_batch()
    slope = torch.from_numpy(GRID[..., 1] / 31).float()[None]
    voxels = active_voxels(batch.base_vox, 16)
    seen = voxel_features(slope, batch.base_vox, voxels, 16).view(len(voxels), 2, 5, 5, 5)
    centre = (voxels[:, 2] + 0.5) * 2 - 0.5  # along the second axis, in fine voxels
    steps = (centre[:, None] + torch.arange(-2, 3)).clamp(0, 31)  # a fine voxel apart
    assert_follows(seen[:, 0, 2, :, 2], 4 * (steps / 31 - 0.5))
    assert seen[:, 1].abs().max() <= 1 and seen[:, 1, 2, 2, 2].abs().max() < 3.95 / 4
    assert seen[:, 1].std() > 0.1


@pytest.mark.parametrize(("resolution", "moved"), [(8, 0.0), (8, 1.0), (16, 1.0)])
def test_the_field_undoes_the_corners_moves_and_keeps_the_inside(resolution, moved):
    batch = sphere_batch()
    surface = sphere_surface(batch, resolution, moved)
    field = Decoded([surface], batch.base_vox, resolution).field()[0]
    near = batch.sdf_vox[0].abs() < 2.5
    error = (field - batch.sdf_vox[0])[near].abs()
    # The error is less than a tenth of the displacements (up to half a cube, half a fine voxel at 8³).
    assert error.mean() < 0.06 * moved + 0.03
    assert (
        torch.equal(field < 0, batch.sdf_vox[0] < 0)
        or moved
        and (((field < 0) != (batch.sdf_vox[0] < 0)).float().mean() < 0.005)
    )
    assert field[15, 16, 14] < 0 and field[0, 0, 0] == 4  # where no voxel is active


# ----------------------------------------------------------------------------------------- losses


def test_the_losses_are_small_on_the_true_surface_and_right_in_sign():
    batch = sphere_batch()
    losses = surface_losses(Decoded([sphere_surface(batch)], batch.base_vox, 8), batch)
    assert losses["sdf"] < 0.1 and losses["vertex"] < 0.05 and losses["normal"] < 0.01
    assert (
        losses["chamfer"] < 0.8 and losses["empty"] == 0
    )  # points of two samplings, a voxel apart
    inverted = surface_losses(Decoded([sphere_surface(batch, sign=-1)], batch.base_vox, 8), batch)
    assert inverted["sdf"] > 3 and inverted["normal"] > 1.9 and inverted["vertex"] < 0.05


def test_each_loss_has_the_expected_gradient():
    batch = sphere_batch()
    surface = sphere_surface(batch)
    larger = torch.tensor(CENTRE).float() + 1.15 * (
        surface.vertices.detach() - torch.tensor(CENTRE).float()
    )
    surface = Surface(
        **{
            **vars(surface),
            "vertices": larger.requires_grad_(),
            "distance": (surface.distance.detach() + 0.7).requires_grad_(),
        }
    )
    losses = surface_losses(Decoded([surface], batch.base_vox, 8), batch)
    out = larger.detach() - torch.tensor(CENTRE).float()
    assert abs(losses["vertex"].item() - 1.35) < 0.1  # 15 % of 9 voxels
    for name in ("vertex", "chamfer"):
        (pull,) = torch.autograd.grad(losses[name], surface.vertices, retain_graph=True)
        assert ((pull * out).sum(1) >= -1e-6).float().mean() > 0.95 and pull.abs().sum() > 0
    (pull,) = torch.autograd.grad(losses["sdf"], surface.distance, retain_graph=True)
    # Where the ground truth is truncated at 4 voxels, it is interpolated across the kink.
    assert (pull >= 0).float().mean() > 0.95 and abs(losses["sdf"].item() - 0.7) < 0.2
    (pull,) = torch.autograd.grad(losses["normal"], surface.vertices)
    assert torch.isfinite(pull).all()


def test_the_gradient_of_the_normals_is_the_same_each_time_on_several_threads():
    """For bit-for-bit resumption: the backward pass of indexing adds in an order that depends on the load."""
    batch, threads = sphere_batch(), torch.get_num_threads()
    surface = sphere_surface(batch)
    torch.set_num_threads(4)
    try:
        pulls = set()
        for _ in range(30):
            losses = surface_losses(Decoded([surface], batch.base_vox, 8), batch)
            (pull,) = torch.autograd.grad(losses["normal"], surface.vertices)
            pulls.add(pull.numpy().tobytes())
    finally:
        torch.set_num_threads(threads)
    assert len(pulls) == 1


def test_an_empty_mesh_is_counted_and_still_has_gradients():
    batch = sphere_batch()
    surface = sphere_surface(batch)
    none = {"vertices": torch.zeros(0, 3), "faces": torch.zeros(0, 3, dtype=torch.long)}
    surface = Surface(**{**vars(surface), **none})
    weights = {**LOSS_WEIGHTS, "sdf": 0.0}
    losses = surface_losses(Decoded([surface], batch.base_vox, 8), batch, weights)
    assert losses["empty"] == 1 and losses["vertex"] == losses["chamfer"] == losses["normal"] == 0
    losses["total"].backward()
    assert surface.distance.grad is not None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loss_vertex": -1.0}, "loss_vertex: expected >= 0, got -1"),
        (
            {f"loss_{name}": 0.0 for name in LOSS_WEIGHTS},
            "loss_sdf, loss_vertex, .*: expected at least one positive weight",
        ),
    ],
)
def test_loss_weights_are_checked(values, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(model="sam3d", sam3d_dir="x", **values)


# --------------------------------------------------------------------------------------- training


def config_for(folder, run, **changes):
    values = {"model": "sam3d", "sam3d_dir": str(folder), "checkpoint_dir": str(run), "epochs": 4}
    values |= {
        "lora_rank": 4,
        "lora_alpha": 8.0,
        "batch_size": 1,
        "lr": 4e-3,
        "lora_dropout": 0.1,
        "seed": 3,
        "progress": False,
    }
    return TrainConfig(**{**values, **changes})


def quiet_training(config, train=None, val=None):
    trainer = MedicalTrainer(config, None, train, val)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    return trainer


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """A run on ellipsoids."""
    config = config_for(folder, tmp_path_factory.mktemp("run") / "run")
    return quiet_training(config, TinyRegions(5, 0), TinyRegions(1, 1))


def test_training_lowers_the_losses_and_keeps_adapters_and_encoder_only(run, folder):
    first, last = run.history[0]["val"], run.history[-1]["val"]
    assert last["total"] < 0.8 * first["total"] and last["sdf"] < first["sdf"]
    content = read_checkpoint(run.folder.find("last"))
    names = set(content["model"])
    assert {n.rpartition(".")[2] for n in names if n.startswith("decoder.")} == {"lora_A", "lora_B"}
    assert {n for n in names if not n.startswith("decoder.")} == {
        f"encoder.{n}" for n in run.model.encoder.state_dict()
    }
    assert load_file(run.folder.adapter).keys() == names
    frozen = load_part(folder, "decoder").state_dict()
    kept = fastlora.base_state_dict(run.model.decoder)
    assert all(torch.equal(kept[key], frozen[key]) for key in frozen)
    assert fastlora.count_parameters(run.model)["lora"] == 2 * (
        2 * 4 * (16 + 16) + 4 * (16 + 48) + 4 * (16 + 16)
    )


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(run, folder, tmp_path):
    config = config_for(folder, tmp_path / "run")
    trainer = MedicalTrainer(config, None, TinyRegions(5, 0), TinyRegions(1, 1))
    finish = trainer._finish_epoch

    def stop(record, *rest):
        finish(record, *rest)
        if record["epoch"] == 2:
            raise ArithmeticError

    trainer._finish_epoch = stop
    with contextlib.redirect_stdout(io.StringIO()), pytest.raises(ArithmeticError):
        trainer.train()
    again = config_for(folder, tmp_path / "run", resume="auto", sam3d_checkpointing=True)
    quiet_training(again, TinyRegions(5, 0), TinyRegions(1, 1))
    assert_same_run(tmp_path / "run", run.folder.path)


def test_a_run_is_read_back_merged_and_without_its_adapters(run):
    batch = collate_regions([TinyRegions(2, 1)[index] for index in range(2)])
    model = run.model.eval()
    with torch.inference_mode():
        wanted = predict(model, batch)
        plain, merged, base = (
            predict(load_finetuned(run.folder.path, which="last", **options), batch)
            for options in ({}, {"merged": True}, {"adapters": False})
        )
    assert torch.equal(plain, wanted) and wanted.shape == (2, 32, 32, 32)
    assert (merged - wanted).abs().max() < 1e-3 < (base - wanted).abs().max()
    copied = fastlora.merged_model(model)
    assert copied.decoder.mesh_extractor is model.decoder.mesh_extractor


def test_empty_meshes_are_logged(folder, tmp_path, caplog):
    config = config_for(folder, tmp_path / "run", epochs=1, lr=1e-9)
    trainer = MedicalTrainer(config, None, TinyRegions(1, 0), TinyRegions(1, 1))
    with torch.no_grad():  # all far outside
        trainer.model.decoder.out_layer.bias[0::4] = 1.0
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    assert "gave no mesh for 100% of the regions" in caplog.text
    assert trainer.history[1]["train"]["empty"] == 1
    assert trainer.history[1]["grad_norm"] > 0


def test_all_weights_train_with_finetune_full(folder, tmp_path):
    config = config_for(folder, tmp_path / "run", finetune="full", lr=1e-3, epochs=2)
    assert config_for(folder, "run", finetune="full", lr=None).peak_lr == 1e-4
    trainer = MedicalTrainer(config, None, TinyRegions(5, 0), TinyRegions(1, 1))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    with contextlib.redirect_stdout(io.StringIO()):
        history = trainer.train()
    assert history[-1]["val"]["total"] < history[0]["val"]["total"]
    changed = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == set(before) == set(read_checkpoint(trainer.folder.find("last"))["model"])
    batch = collate_regions([TinyRegions(1, 1)[0]])
    with torch.inference_mode():
        again = predict(load_finetuned(tmp_path / "run", which="last"), batch)
        assert torch.equal(again, predict(trainer.model.eval(), batch))


def test_16_bit_weights_are_not_trained_in_full(own_folder, tmp_path):
    path = own_folder / "slat_decoder_mesh.yaml"
    path.write_text(path.read_text().replace("use_fp16: false", "") + "use_fp16: true\n")
    config = config_for(own_folder, tmp_path / "run", finetune="full")
    with pytest.raises(ConfigError, match="sam3d_torso: expected 'fp32' .* got 16-bit blocks"):
        MedicalTrainer(config, None, TinyRegions(1, 0), TinyRegions(1, 1))


@pytest.mark.slow
def test_a_torso_of_16_bits_trains_with_a_scaled_loss(folder, tmp_path):
    config = config_for(folder, tmp_path / "run", sam3d_torso="fp16", epochs=3)
    trainer = quiet_training(config, TinyRegions(5, 0), TinyRegions(1, 1))
    assert trainer.state.scaler.is_enabled()
    assert trainer.model.decoder.blocks[0].attn.to_qkv.original_linear.weight.dtype == torch.float16
    assert trainer.model.decoder.blocks[0].attn.to_qkv.lora_A.dtype == torch.float32
    assert trainer.history[-1]["val"]["total"] < trainer.history[0]["val"]["total"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"sam3d_dir": None},
            "sam3d_dir: expected a model folder with model 'sam3d', got none",
        ),
        ({"base_weights": "x"}, "base_weights: expected none with model 'sam3d'"),
        (
            {"finetune": "full", "sam3d_torso": "fp16"},
            "sam3d_torso: expected 'fp32' with finetune 'full', got 'fp16'",
        ),
        ({"amp": "bf16"}, "amp: expected 'off' with model 'sam3d'"),
        ({"sam3d_part": "slat"}, "latents_dir: expected cached .* to train 'slat' on, got none"),
        ({"sam3d_part": "colour"}, "sam3d_part: expected one of decoder, slat, structure"),
        ({"latents_dir": "x"}, "augment: expected --no-augment with latents_dir"),
        ({"model": "compact"}, "sam3d_dir: expected model 'sam3d' with it, got 'compact'"),
        (
            {"model": "compact", "sam3d_dir": None, "sam3d_torso": "fp16"},
            "sam3d_torso: expected model",
        ),
        ({"model": "other"}, "model: expected one of compact, sam3d, got 'other'"),
    ],
)
def test_contradicting_options_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        config_for("checkpoints", "run", **changes)


def test_a_region_without_active_voxels_keeps_its_coarse_segmentation_and_is_not_trained_on(folder):
    batch = sphere_batch()
    nothing = coarse_segmentation(np.zeros((32, 32, 32), bool))
    sample = {**TinyRegions(1, 0)[0], "coarse": nothing, "base_vox": base_distance(nothing)}
    other = collate_regions([sample])
    both = RegionBatch(
        **{
            **vars(batch),
            **{
                n: torch.cat([getattr(other, n), getattr(batch, n)])
                for n in ("image", "base_vox", "sdf_vox")
            },
            "meta": other.meta + batch.meta,
        }
    )
    model = Sam3dOptions(sam3d_dir=folder).load(None).eval()
    with torch.no_grad():
        together, alone = predict(model, both), predict(model, batch)
        only = predict(model, other)
    assert torch.equal(together[0], other.base_vox[0]) and torch.equal(only, other.base_vox)
    assert_same_distances(together[1].numpy(), alone[0].numpy())
    with pytest.raises(
        DataError, match="expected active voxels near the true surface, got none in"
    ):
        surface_losses(model(*model.inputs(both)), both)


# ------------------------------------------------------------------------------ scripts and latents


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    """Two phantom subjects of one structure each, the second held out."""
    path = tmp_path_factory.mktemp("data") / "volumes"
    write_phantom_dataset(path, subjects=2, seed=4)
    return path


@pytest.mark.slow
def test_evaluation_and_prediction_of_a_run(folder, volumes, tmp_path):
    for name, finetune in (("run", "lora"), ("full", "full")):
        config = config_for(
            folder,
            tmp_path / name,
            finetune=finetune,
            data_root=str(volumes),
            split="file",
            epochs=1,
            samples_per_region=1,
            augment=False,
        )
        quiet_training(config)
    out = tmp_path / "eval"
    arguments = ["--checkpoint", str(tmp_path / "run"), "--full", str(tmp_path / "full")]
    with contextlib.redirect_stdout(io.StringIO()):
        assert evaluate_main([*arguments, "--output_dir", str(out)]) == 0
    content = json.loads((out / "eval.json").read_text())
    assert content["merged_difference_vox"] < 1e-3
    assert set(content["summary"]) == {"baseline", "base", "lora", "merged", "full"}
    case = load_cases(TrainConfig(data_root=str(volumes)))[1]
    structure, source = next(iter(case.structures.items()))
    arguments = ["--checkpoint", str(tmp_path / "run"), "--image", str(case.image_path)]
    arguments += ["--mask", str(source.path), "--structure", structure, "--modality", "ct"]
    arguments += ["--output_dir", str(tmp_path / "meshes"), "--no-picture"]
    if source.label is not None:
        arguments += ["--label", str(source.label)]
    with contextlib.redirect_stdout(io.StringIO()):
        assert predict_main(arguments) == 0
    (mesh,) = (tmp_path / "meshes").glob("*.ply")
    image = case.load_image()
    voxels = np.argwhere(case.load_mask(structure, image))
    mask_mm = voxels @ image.affine[:3, :3].T + image.affine[:3, 3]
    placed = trimesh.load(mesh)
    assert placed.is_watertight
    assert np.abs(placed.bounds - [mask_mm.min(0), mask_mm.max(0)]).max() < 12  # two coarse cells


def write_latents(folder, volumes):
    """A file for every region, of both kinds in turn: seeded latents at its active voxels."""
    folder.mkdir()
    kind = "npz"
    splits = make_splits(load_cases(TrainConfig(data_root=str(volumes))), "file")
    for specs in splits.values():
        dataset = RegionDataset(specs)
        for sample in (dataset[index] for index in range(len(dataset))):
            coords = active_voxels(torch.from_numpy(sample["base_vox"])[None], 8)[:, 1:]
            feats = torch.randn(len(coords), 8, generator=torch.Generator().manual_seed(1))
            stem = folder / f"{sample['meta']['subject']}-{sample['meta']['region']}"
            kind = "safetensors" if kind == "npz" else "npz"
            if kind == "npz":
                np.savez(f"{stem}.npz", coords=coords.int().numpy(), feats=feats.numpy())
            else:
                save_file(
                    {"coords": coords.int().contiguous(), "feats": feats.half()},
                    f"{stem}.safetensors",
                )
    return folder


@pytest.mark.slow
def test_cached_latents_replace_the_encoder(folder, volumes, tmp_path):
    latents = write_latents(tmp_path / "latents", volumes)
    config = config_for(
        folder, tmp_path / "run", data_root=str(volumes), split="file", epochs=2, samples_per_region=1,
        augment=False, latents_dir=str(latents),
    )  # fmt: skip
    trainer = quiet_training(config)
    assert trainer.model.encoder is None
    assert all(
        name.startswith("decoder.")
        for name in read_checkpoint(trainer.folder.find("last"))["model"]
    )
    assert trainer.history[-1]["train"]["total"] < trainer.history[1]["train"]["total"]
    batch = collate_regions([TinyRegions(1, 1)[0]])
    with pytest.raises(ConfigError, match="latents_dir: expected cached latents: some, got none"):
        predict(trainer.model, batch)
    with contextlib.redirect_stdout(io.StringIO()):
        arguments = ["--checkpoint", str(tmp_path / "run"), "--output_dir", str(tmp_path / "eval")]
        assert evaluate_main(arguments) == 0
    path = sorted(latents.iterdir())[0]
    path.unlink()
    again = config_for(
        folder,
        tmp_path / "new",
        data_root=str(volumes),
        split="file",
        augment=False,
        latents_dir=str(latents),
    )
    with pytest.raises(DataError, match="latents_dir: expected .*npz, got neither"):
        MedicalTrainer(again)


def test_an_encoder_is_added_only_without_cached_latents(folder):
    assert Sam3dOptions(sam3d_dir=folder, latents_dir="x").load(None).encoder is None
    assert Sam3dOptions(sam3d_dir=folder).load(None).encoder[-1].out_features == 8
