"""SAM 3D's generators on cached latents and conditions, with the small package of `sam3d_package.py`."""

import contextlib
import io
import zlib

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

import fastlora
from fastlora.errors import CheckpointError, ConfigError, DataError
from fastlora.medical.data.batch import collate_regions
from fastlora.medical.data.phantom import write_phantom_dataset
from fastlora.medical.data.regions import RegionDataset
from fastlora.medical.data.splits import make_splits
from fastlora.medical.evaluation.evaluate import Run
from fastlora.medical.sam3d.decoder import active_voxels
from fastlora.medical.sam3d.generator import VALIDATION_DRAWS, Sam3dFlow, flow_matching_loss
from fastlora.medical.sam3d.latents import read_latents
from fastlora.medical.sam3d.loading import (
    FlowSettings,
    PartSettings,
    latent_scale,
    load_part,
    read_settings,
)
from fastlora.medical.training.checkpointing import read_checkpoint
from fastlora.medical.training.config import TrainConfig
from fastlora.medical.training.data import load_cases, micro_batches
from fastlora.medical.training.finetuned import load_base, load_finetuned
from fastlora.medical.training.trainer import MedicalTrainer
from tests.support.processes import run_processes

pytest_plugins = "tests.support.sam3d_fixtures"
GENERATORS = ("slat", "structure")


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    """Three phantom subjects of one structure each: two for training, one for validation."""
    path = tmp_path_factory.mktemp("data") / "volumes"
    write_phantom_dataset(path, subjects=3, seed=4)
    return path


@pytest.fixture(scope="module")
def latents(volumes, tmp_path_factory):
    """By generator, a folder with a file for each region, whose latents follow from its condition and can be learned."""
    folders = {part: tmp_path_factory.mktemp(part) for part in GENERATORS}
    generator = torch.Generator().manual_seed(1)
    splits = make_splits(load_cases(TrainConfig(data_root=str(volumes))), "file")
    for specs in splits.values():
        dataset = RegionDataset(specs)
        for sample in (dataset[index] for index in range(len(dataset))):
            stem = f"{sample['meta']['subject']}-{sample['meta']['region']}"
            coords = active_voxels(torch.from_numpy(sample["base_vox"])[None], 16)[:, 1:]
            condition = torch.randn(11, 48, generator=generator)
            level = condition.mean()
            feats = level + 0.1 * torch.randn(len(coords), 8, generator=generator)
            np.savez(
                folders["slat"] / f"{stem}.npz",
                coords=coords.int().numpy(),
                feats=feats.numpy(),
                condition=condition.numpy(),
            )
            shape = level + 0.1 * torch.randn(64, 8, generator=generator)
            save_file(
                {"shape": shape, "pose": level + torch.zeros(4, 8), "condition": condition.half()},
                folders["structure"] / f"{stem}.safetensors",
            )
    return folders


def config_for(folder, volumes, latents, part, run, **changes):
    values = {"model": "sam3d", "sam3d_dir": str(folder), "sam3d_part": part, "epochs": 3}
    values |= {"latents_dir": str(latents[part]), "augment": False, "split": "file", "lr": 1e-2}
    values |= {"data_root": str(volumes), "checkpoint_dir": str(run), "samples_per_region": 2}
    values |= {"lora_rank": 4, "lora_alpha": 8.0, "batch_size": 2, "seed": 3, "progress": False}
    return TrainConfig(**{**values, **changes})


def quiet(call, *arguments):
    with contextlib.redirect_stdout(io.StringIO()):
        return call(*arguments)


@pytest.fixture(scope="module")
def runs(folder, volumes, latents, tmp_path_factory):
    """A run of each generator."""
    found = {}
    for part in GENERATORS:
        config = config_for(folder, volumes, latents, part, tmp_path_factory.mktemp(part) / "run")
        found[part] = MedicalTrainer(config)
        quiet(found[part].train)
    return found


@pytest.mark.parametrize("part", GENERATORS)
def test_training_lowers_the_loss_and_keeps_adapters_only(runs, folder, part):
    run = runs[part]
    first, last = run.history[0]["val"], run.history[-1]["val"]
    assert first.keys() == {"flow", "total"} and last["total"] < 0.9 * first["total"]
    names = set(read_checkpoint(run.folder.find("best"))["model"])
    assert names and all(name.endswith(("lora_A", "lora_B")) for name in names)
    assert any("mlp" in name for name in names) and any("to_kv" in name for name in names)
    frozen = load_part(folder, part).state_dict()
    kept = fastlora.base_state_dict(run.model.flow)
    assert all(torch.equal(kept[key], frozen[key]) for key in frozen)


@pytest.mark.parametrize("part", GENERATORS)
@torch.no_grad()
def test_the_adapter_goes_into_the_generator_itself(runs, folder, part):
    """It can be loaded without the trainer's wrapper, as in the user's own pipeline."""
    run = runs[part]
    model = load_base(run.config)
    batch = next(iter(micro_batches(run.val_data, [0], 1, run.processes)))[0]
    base = model.eval()(*model.inputs(batch))
    targets = ["to_qkv", "to_q", "to_kv", "to_out", "mlp"]
    fastlora.inject_lora(model.flow, targets, rank=4, alpha=8.0)
    fastlora.load_adapter(model.flow, run.folder.adapter)
    best = read_checkpoint(run.folder.find("best"))["model"]
    assert all(torch.equal(p, best[n]) for n, p in model.named_parameters() if n in best)
    assert float(model(*model.inputs(batch))) < float(base)
    merged = fastlora.merged_model(model)
    assert float(merged(*merged.inputs(batch))) == pytest.approx(
        float(model(*model.inputs(batch))), rel=1e-4
    )


@pytest.mark.slow
@pytest.mark.parametrize("part", GENERATORS)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    runs, folder, volumes, latents, part, tmp_path
):
    run = tmp_path / "run"
    trainer = MedicalTrainer(config_for(folder, volumes, latents, part, run, epochs=3))
    trainer._stalled = lambda: trainer.epoch >= 1
    quiet(trainer.train)
    quiet(
        MedicalTrainer(
            config_for(folder, volumes, latents, part, run, epochs=3, resume="auto")
        ).train
    )
    histories = [MedicalTrainer(config_for(folder, volumes, latents, part, path, resume=str(path)))
                 for path in (run, runs[part].folder.path)]  # fmt: skip
    assert histories[0].history == histories[1].history
    last = [read_checkpoint(trainer.folder.find("last"))["model"] for trainer in histories]
    assert all(torch.equal(last[0][name], last[1][name]) for name in last[1])


@pytest.mark.parametrize("part", GENERATORS)
def test_validation_draws_the_same_each_time_and_moves_no_generator(runs, part):
    run = runs[part]
    torch.manual_seed(7)
    first = run.validate()
    drawn = torch.rand(())
    torch.manual_seed(7)
    assert torch.rand(()) == drawn
    torch.manual_seed(8)
    assert run.validate() == first
    # The mean over the regions of the mean over each region's own draws, one region at a time.
    run.model.eval()
    losses = []
    for batch, _, _ in micro_batches(run.val_data, range(len(run.val_data)), 2, run.processes):
        for index, meta in enumerate(batch.meta):
            with torch.random.fork_rng(), torch.no_grad():
                torch.manual_seed(zlib.crc32(f"{meta['subject']}-{meta['region']}".encode()))
                losses += [one_loss(run.model, batch, index) for _ in range(VALIDATION_DRAWS)]
    assert first["total"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)


def one_loss(model, batch, index, condition=None):
    """The loss of one region of a batch by the public function, with the current state of torch's generator."""
    condition = batch.condition[index : index + 1] if condition is None else condition
    if batch.latents is not None:
        own = {name: x[index : index + 1] for name, x in batch.latents.items()}
        return flow_matching_loss(model.flow, own, condition)
    mine = batch.slat.coords[:, 0] == index
    coords = batch.slat.coords[mine] * torch.tensor([0, 1, 1, 1])
    feats = (batch.slat.feats[mine] - 0.5) / 2.0  # slat_mean and slat_std of the folder
    return flow_matching_loss(model.flow, feats[None], condition, coords)


@pytest.mark.parametrize("part", GENERATORS)
def test_conditions_are_dropped_with_the_given_probability(runs, folder, part):
    run, scale = runs[part], latent_scale(folder, 8) if part == "slat" else None
    batch = next(iter(micro_batches(run.val_data, [0], 1, run.processes)))[0]
    model = Sam3dFlow(run.model.flow, run.model.settings, scale, drop_condition=0.3)
    model.train()
    nothing, dropped = torch.zeros_like(batch.condition), 0
    for seed in range(60):
        with torch.no_grad():
            torch.manual_seed(seed)
            got = model(*model.inputs(batch))[0]
            torch.manual_seed(seed)
            drop = bool(torch.rand(()) < 0.3)
            assert torch.equal(got, one_loss(model, batch, 0, nothing if drop else None))
        dropped += drop
    assert 8 < dropped < 30


def train_in_processes(home, folder, volumes, latents, part, run):
    import sys

    sys.path.insert(0, str(home))
    trainer = MedicalTrainer(config_for(folder, volumes, latents, part, run, parallel="fsdp"))
    history = quiet(trainer.train)
    return history[0]["val"], history[-1]["val"]["total"]


@pytest.mark.slow
@pytest.mark.parametrize("part", GENERATORS)
def test_several_processes_start_as_one_does_and_learn(runs, package, folder, volumes, latents, part, tmp_path):  # fmt: skip
    """Each process draws other noise, so only the initial losses equal those of one process."""
    results = run_processes(
        2, train_in_processes, package, folder, volumes, latents, part, tmp_path / "r"
    )
    assert results[0] == results[1]
    first, last = results[0]
    assert first == pytest.approx(runs[part].history[0]["val"], rel=1e-5)
    assert last < 0.9 * first["total"]


def test_all_weights_train_with_finetune_full(folder, volumes, latents, tmp_path):
    config = config_for(folder, volumes, latents, "slat", tmp_path / "run", finetune="full", epochs=1)  # fmt: skip
    trainer = MedicalTrainer(config)
    quiet(trainer.train)
    names = {name for name, _ in trainer.model.named_parameters()}
    assert set(read_checkpoint(trainer.folder.find("last"))["model"]) == names


def test_a_generator_makes_no_mesh(runs):
    path = runs["slat"].folder.path
    for call in (lambda: Run.read(path, "lora"), lambda: load_finetuned(path)):
        with pytest.raises(CheckpointError, match="a mesh decoder, got the generator 'slat'"):
            call()


def edit_generator(folder, name, **changes):
    path = folder / f"{name}.yaml"
    values = yaml.safe_load(path.read_text())
    values["module"]["generator"]["backbone"].update(changes)
    path.write_text(yaml.safe_dump(values))


def test_the_generators_settings_are_read(own_folder):
    about = read_settings(own_folder, "slat")
    assert (about.resolution, about.condition_channels) == (16, 48)
    assert about.latents == {"feats": (None, 8)} and about.flow.loss_weights == {"feats": 1.0}
    sampler = {"_target_": "a.lognorm_sampler", "_partial_": True, "mean": 1, "std": 0.5}
    edit_generator(
        own_folder,
        "ss_generator",
        sigma_min=0.25,
        time_scale=10.0,
        training_time_sampler_fn=sampler,
        loss_weights={"shape": 2.0, "pose": 0.5},
    )
    about = read_settings(own_folder, "structure")
    assert about.latents == {"shape": (64, 8), "pose": (4, 8)} and about.resolution is None
    assert (about.flow.sigma_min, about.flow.time_scale) == (0.25, 10.0)
    assert (about.flow.time_mean, about.flow.time_std) == (1.0, 0.5)
    assert about.flow.loss_weights == {"shape": 2.0, "pose": 0.5}


def test_the_settings_reach_the_loss():
    """Each changes it as in the equation: times that are all near one, and one latent's error doubled."""

    class Flow(torch.nn.Module):
        input_latent_mappings = ("a", "b")

        def forward(self, x, t, condition):
            self.time = t
            return {name: torch.zeros_like(value) for name, value in x.items()}

    flow, latents = Flow(), {"a": torch.ones(1, 2, 3), "b": torch.ones(1, 2, 3)}
    losses = []
    for weights in ({"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 1.0}, {"a": 2.0, "b": 3.0}):
        torch.manual_seed(1)
        settings = FlowSettings(time_mean=50.0, time_std=0.1, loss_weights=weights)
        losses.append(flow_matching_loss(flow, latents, torch.zeros(1, 1, 1), settings=settings))
        assert flow.time == 1000
    torch.testing.assert_close(losses[2], 2 * losses[0] + 3 * losses[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"time_scale": True}, "time_scale: expected a number, got True"),
        ({"sigma_min": "a"}, "sigma_min: expected a number, got 'a'"),
        ({"loss_weights": {"feats": None}}, "feats: expected a number, got None"),
        ({"training_time_sampler_fn": {"_target_": "torch.rand"}}, "expected lognorm_sampler"),
        ({"training_time_sampler_fn": ["a"]}, r"expected lognorm_sampler, got \['a'\]"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(own_folder, changes, message):
    edit_generator(own_folder, "slat_generator", **changes)
    with pytest.raises(ConfigError, match=message):
        read_settings(own_folder, "slat")


def test_the_scale_of_latents_is_read(own_folder):
    assert latent_scale(own_folder, 8) == ([0.5] * 8, [2.0] * 8)
    path = own_folder / "pipeline.yaml"
    values = yaml.safe_load(path.read_text())
    for std in ([1.0], [0.0] * 8, "x"):
        path.write_text(yaml.safe_dump({**values, "slat_std": std}))
        with pytest.raises(ConfigError, match="slat_mean, slat_std: expected two lists of 8 numb"):
            latent_scale(own_folder, 8)
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match="expected two lists of 7 numbers"):
        latent_scale(own_folder, 7)
    del values["slat_std"]
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match="needs the package sam3d_objects"):  # has no such module
        latent_scale(own_folder, 8)


GOOD = {"shape": np.ones((64, 8), np.float32), "pose": np.ones((4, 8), np.float32)}
GOOD["condition"] = np.ones((3, 5), np.float16)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"pose": None}, r"expected shape, pose, condition, got condition, shape"),
        (
            {"shape": np.ones((63, 8), np.float32)},
            r"shape: expected \(64, 8\) floats, got \(63, 8\)",
        ),
        ({"pose": np.ones((4, 7), np.float32)}, r"pose: expected \(4, 8\) floats, got \(4, 7\)"),
        (
            {"condition": np.ones((3, 4), np.float32)},
            r"condition: expected \(N, 5\) floats, got \(3, 4\)",
        ),
        (
            {"condition": np.ones((0, 5), np.float32)},
            r"condition: expected \(N, 5\) floats, got \(0, 5\)",
        ),
        (
            {"pose": np.ones((4, 8), np.int64)},
            r"pose: expected \(4, 8\) floats, got \(4, 8\) torch.int64",
        ),
        ({"pose": np.full((4, 8), np.inf, np.float32)}, "pose: expected finite numbers"),
    ],
)
def test_latents_of_the_structure_are_checked(tmp_path, content, message):
    about = PartSettings(None, {"shape": (64, 8), "pose": (4, 8)}, 5)
    values = {name: value for name, value in {**GOOD, **content}.items() if value is not None}
    np.savez(tmp_path / "a.npz", **values)
    with pytest.raises(DataError, match=message):
        read_latents(tmp_path / "a.npz", about)
    np.savez(tmp_path / "a.npz", **GOOD)
    assert {n: len(x) for n, x in read_latents(tmp_path / "a.npz", about).items()} == {
        "shape": 64,
        "pose": 4,
        "condition": 3,
    }


def test_conditions_that_do_not_fit_are_refused(folder, volumes, latents, tmp_path):
    files = sorted(latents["slat"].iterdir())
    for path in files:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = config_for(folder, volumes, {"slat": tmp_path}, "slat", tmp_path / "run")
    content = dict(np.load(files[0]))
    for condition, message in (
        (content["condition"][:, :4], r"condition: expected \(N, 48\) floats, got \(11, 4\)"),
        (content["condition"][:5], "condition: expected the same number of rows in each file"),
        (None, r"expected coords, feats, condition, got coords, feats"),
    ):
        changed = {**content, "condition": condition}
        np.savez(tmp_path / files[0].name, **{k: v for k, v in changed.items() if v is not None})
        with pytest.raises(DataError, match=message):
            MedicalTrainer(config)


def test_a_batch_without_latents_is_refused(runs):
    sample = runs["slat"].train_data.regions[0]
    with pytest.raises(ConfigError, match="latents_dir: expected cached latents and conditions"):
        runs["slat"].model.inputs(collate_regions([sample]))
