"""Results and files of a run: parameters, gradients, schedule, selection, errors, and loading the result."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastlora import LoRALinear, load_adapter, merged_model
from fastlora.errors import CheckpointError, ConfigError, DataError, TrainingError
from fastlora.medical.data.batch import collate_regions
from fastlora.medical.models.decoder import SparseMeshDecoder, load_base_model, save_base_model
from fastlora.medical.models.losses import mesh_losses
from fastlora.medical.sam3d.options import Sam3dOptions
from fastlora.medical.training import checkpointing
from fastlora.medical.training.config import (
    TrainConfig,
    is_resumable,
    option_owners,
    read_yaml,
)
from fastlora.medical.training.data import epoch_order
from fastlora.medical.training.finetuned import load_finetuned, make_trainable, trainable_parameters
from fastlora.medical.training.trainer import MedicalTrainer, inside_dice
from tests.support.paths import ROOT
from tests.support.tiny_run import TinyRegions, tiny_model, tiny_trainer
from tests.support.tolerance import assert_same_gradient


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> MedicalTrainer:
    """A finished LoRA run."""
    trainer = tiny_trainer(tmp_path_factory.mktemp("trainer") / "run", save_every=2)
    trainer.train()
    return trainer


def predict(model: SparseMeshDecoder) -> torch.Tensor:
    data = TinyRegions(3, 1)
    batch = collate_regions([data[index] for index in range(3)])
    with torch.no_grad():
        out: torch.Tensor = model.eval()(batch.tokens, batch.base_vox)
    return out


# -- what is trained


def test_lora_trains_adapters_and_the_output_layer_only(run: MedicalTrainer) -> None:
    fresh = dict(tiny_model().named_modules())
    for name, module in run.model.named_modules():
        if isinstance(module, torch.nn.Linear) and not name.endswith("original_linear"):
            assert torch.equal(module.weight, fresh[name].weight) == (name == "input_layer"), name
        if isinstance(module, LoRALinear):
            assert torch.equal(module.original_linear.weight, fresh[name].weight), name
    adapters = [m for m in run.model.modules() if isinstance(m, LoRALinear)]
    assert len(adapters) == 4 and all(m.lora_B.abs().max() > 0 for m in adapters)
    assert run.history[-1]["train"]["total"] < run.history[1]["train"]["total"]
    assert run.history[-1]["val"]["total"] < run.history[0]["val"]["total"]


def test_setup_lora_follows_the_config(tmp_path: Path) -> None:
    attention = tiny_trainer(
        tmp_path, lora_ffn=False, lora_rank=2, lora_alpha=6.0, lora_dropout=0.5
    )
    adapters = {n: m for n, m in attention.model.named_modules() if isinstance(m, LoRALinear)}
    assert sorted(adapters) == ["blocks.0.attn.to_out", "blocks.0.attn.to_qkv"]
    assert all((m.rank, m.scaling, m.dropout) == (2, 3.0, 0.5) for m in adapters.values())
    heads = sum(p.numel() for p in attention.model.out_layer.parameters())
    assert attention.counts["trainable"] == 2 * (12 + 36 + 12 + 12) + heads
    full = tiny_trainer(tmp_path, finetune="full")
    assert full.counts["trainable"] == full.counts["total"] and full.counts["lora"] == 0


def test_a_step_over_uneven_micro_batches_is_the_step_over_the_whole(tmp_path: Path) -> None:
    """7 regions as 2+2+2+1 accumulated, against all 7 at once."""
    weights = []
    for settings in ({"batch_size": 7, "grad_accum": 1}, {"batch_size": 2, "grad_accum": 4}):
        trainer = tiny_trainer(
            tmp_path / str(settings["batch_size"]), lora_dropout=0.0, epochs=1, **settings
        )
        gradients: dict[str, torch.Tensor] = {}

        def keep(batch: Any, trainer: MedicalTrainer = trainer, into: Any = gradients) -> float:
            into.update(
                {
                    n: p.grad.clone()
                    for n, p in trainable_parameters(trainer.model).items()
                    if p.grad is not None
                }
            )
            return 0.0

        trainer._step = keep  # type: ignore[method-assign]
        trainer.train()
        weights.append(gradients)
    assert weights[0].keys() == weights[1].keys() == trainable_parameters(trainer.model).keys()
    for name, gradient in weights[0].items():
        assert_same_gradient(weights[1][name], gradient)


def test_clipping_and_schedule(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, clip_norm=1e-3, warmup=0.25, epochs=4)
    norms, rates = [], []

    def look(*_: Any) -> None:
        squares = [
            p.grad.square().sum()
            for p in trainable_parameters(trainer.model).values()
            if p.grad is not None
        ]
        norms.append(math.sqrt(sum(s.item() for s in squares)))
        rates.append(trainer.state.optimizer.param_groups[0]["lr"])

    trainer.state.optimizer.register_step_pre_hook(look)
    history = trainer.train()
    assert len(norms) == 8 and max(norms) <= 1.01e-3
    assert all(entry["grad_norm"] > 1e-2 for entry in history[1:])  # before clipping
    cosine = [0.5 * (1 + math.cos(math.pi * k / 6)) for k in range(6)]
    assert rates == pytest.approx([1e-2 * factor for factor in [0.5, 1.0, *cosine]])
    assert [entry["lr"] for entry in history[1:]] == pytest.approx(rates[::2])


def test_order_is_a_function_of_seed_and_epoch() -> None:
    assert sorted(epoch_order(0, 1, 9)) == list(range(9))
    assert epoch_order(0, 1, 9) == epoch_order(0, 1, 9)
    assert len({tuple(epoch_order(seed, epoch, 9)) for seed in (0, 1) for epoch in (1, 2)}) == 4


def test_workers_change_nothing(run: MedicalTrainer, tmp_path: Path) -> None:
    other = tiny_trainer(tmp_path / "run", num_workers=2, epochs=1)
    alone = tiny_trainer(tmp_path / "alone", epochs=1)
    assert other.train() == alone.train()


def test_the_seed_changes_the_result(tmp_path: Path) -> None:
    first, second = (tiny_trainer(tmp_path / str(seed), seed=seed, epochs=1) for seed in (1, 2))
    assert first.train() != second.train()


# -- validation, selection, stopping


def test_validate_averages_over_regions(tmp_path: Path) -> None:
    """3 regions in batches of 2 and 1 count equally; the Dice is that of the insides."""
    trainer = tiny_trainer(tmp_path)
    got = trainer.validate()
    data = trainer.val_data
    batch = collate_regions([data[index] for index in range(3)])
    losses = mesh_losses(trainer.model(batch.tokens, batch.base_vox), batch)
    for name, value in losses.items():
        assert got[name] == pytest.approx(value.item(), rel=1e-5)
    dice = inside_dice(predict(trainer.model), batch.sdf_vox)
    assert dice.shape == (3,) and got["dice"] == pytest.approx(dice.mean().item())


def test_inside_dice_by_hand() -> None:
    inside, outside = -torch.ones(1, 2, 2, 2), torch.ones(1, 2, 2, 2)
    half = torch.cat([inside[:, :1], outside[:, :1]], dim=1)
    assert inside_dice(half, inside).item() == pytest.approx(2 * 4 / 12)
    assert inside_dice(outside, inside).item() == 0.0
    assert inside_dice(outside, outside).item() == 1.0


def scripted(trainer: MedicalTrainer, dices: list[float]) -> MedicalTrainer:
    """Replaces the validation's Dice by given values."""
    validate = trainer.validate
    trainer.validate = lambda: {**validate(), "dice": dices[trainer.epoch]}  # type: ignore[method-assign]
    return trainer


@pytest.mark.slow
def test_best_is_the_highest_validation_dice(tmp_path: Path) -> None:
    trainer = scripted(tiny_trainer(tmp_path / "run"), [0.1, 0.5, 0.9, 0.9, 0.2])
    trainer.train()
    assert checkpointing.read_checkpoint(trainer.folder.find("best"))["epoch"] == 2
    assert checkpointing.read_checkpoint(trainer.folder.find("last"))["epoch"] == 4
    assert json.loads(trainer.folder.history.read_text())["best_epoch"] == 2


@pytest.mark.slow
def test_early_stopping(tmp_path: Path) -> None:
    script = [0.1, 0.5, 0.4, 0.5, 0.9]
    trainer = scripted(tiny_trainer(tmp_path / "run", early_stopping=2), script)
    assert [record["epoch"] for record in trainer.train()] == [0, 1, 2, 3]
    longer = scripted(tiny_trainer(tmp_path / "longer", early_stopping=3), script)
    assert len(longer.train()) == 5


# -- what is written


def test_run_folder(run: MedicalTrainer) -> None:
    folder = run.folder.path
    files = {
        str(f.relative_to(folder))
        for f in folder.rglob("*")
        if f.is_file() and f.parent.name != "tb"
    }
    names = ("best", "last", "previous", "epoch_002", "epoch_004")
    checkpoints = {f"checkpoints/{name}.pt" for name in names}
    assert files == checkpoints | {"config.yaml", "history.json", "adapter.safetensors", ".lock"}
    history = json.loads(run.folder.history.read_text())
    assert history["epochs"] == run.history
    assert [entry["epoch"] for entry in history["epochs"]] == [0, 1, 2, 3, 4]
    assert set(history["epochs"][1]) == {"epoch", "lr", "grad_norm", "train", "val"}
    assert set(history["epochs"][1]["val"]) == {"sdf", "occupancy", "normal", "total", "dice"}
    assert len(history["seconds"]) == 5 and history["counts"] == run.counts
    assert TrainConfig.from_dict(yaml.safe_load(run.folder.config.read_text())) == run.config


def test_tensorboard_events(run: MedicalTrainer) -> None:
    board = EventAccumulator(str(run.folder.board)).Reload()
    assert {"train/total", "train/sdf", "val/total", "val/dice", "lr", "grad_norm"} <= set(
        board.Tags()["scalars"]
    )
    values = {event.step: event.value for event in board.Scalars("val/dice")}
    assert values == pytest.approx(
        {record["epoch"]: record["val"]["dice"] for record in run.history}
    )


def test_checkpoint_holds_trained_weights_only(run: MedicalTrainer) -> None:
    content = checkpointing.read_checkpoint(run.folder.find("last"))
    assert set(content) == set(checkpointing.KEYS)
    layers = ["attn.to_qkv", "attn.to_out", "mlp.mlp.0", "mlp.mlp.2"]
    adapters = {f"blocks.0.{layer}.{part}" for layer in layers for part in ("lora_A", "lora_B")}
    assert set(content["model"]) == adapters | {"out_layer.weight", "out_layer.bias"}
    assert set(content["rng"]) == {"python", "numpy", "torch", "cuda"}
    assert content["config"] == run.config.to_dict()


def test_save_and_load_checkpoint(run: MedicalTrainer, tmp_path: Path) -> None:
    run.save_checkpoint(tmp_path / "copy.pt")
    other = tiny_trainer(tmp_path / "run")
    other.load_checkpoint(tmp_path / "copy.pt")
    assert other.epoch == 4 and other.history == run.history
    assert torch.equal(predict(other.model), predict(run.model))


def test_a_line_per_epoch_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fastlora.medical")
    tiny_trainer(tmp_path, epochs=2).train()
    lines = caplog.messages
    assert len(lines) == 3 and lines[0].startswith("epoch   0/2  before training  val ")
    assert all(f"epoch   {n}/2  train " in lines[n] and " dice " in lines[n] for n in (1, 2))


# -- using the result


def test_load_finetuned(run: MedicalTrainer) -> None:
    folder = run.folder.path
    last = load_finetuned(folder, which="last", model=tiny_model())
    assert torch.equal(predict(last), predict(run.model)) and not last.training
    merged = load_finetuned(folder, merged=True, which="last", model=tiny_model())
    assert not any(isinstance(module, LoRALinear) for module in merged.modules())
    torch.testing.assert_close(predict(merged), predict(merged_model(run.model)))
    assert not torch.equal(
        predict(load_finetuned(folder, which="epoch_002", model=tiny_model())), predict(last)
    )


def test_load_finetuned_full_and_base_from_a_file(tmp_path: Path) -> None:
    save_base_model(tiny_model(), tmp_path / "base.safetensors", {})
    run = tiny_trainer(
        tmp_path / "run", finetune="full", base_weights=str(tmp_path / "base.safetensors")
    )
    run.train()
    for merged in (False, True):
        model = load_finetuned(tmp_path / "run", merged=merged, which="last")
        assert torch.equal(predict(model), predict(run.model))
    assert not run.folder.adapter.exists()
    save_base_model(tiny_model(seed=2), tmp_path / "base.safetensors", {})
    with pytest.raises(CheckpointError, match="another base model"):
        load_finetuned(tmp_path / "run")


def test_adapter_file_is_the_best_epoch(tmp_path: Path) -> None:
    run = scripted(tiny_trainer(tmp_path / "run"), [0.1, 0.5, 0.9, 0.8, 0.2])
    run.train()
    model = tiny_trainer(tmp_path / "other").model
    load_adapter(model, run.folder.adapter)
    best = load_finetuned(tmp_path / "run", model=tiny_model())
    assert torch.equal(predict(model), predict(best))
    assert not torch.equal(predict(best), predict(run.model))


# -- the same bits


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def test_gradients_of_repeated_rows_are_added_in_one_order(two_threads: None) -> None:
    """Two threads would add them up in the order in which they come: in 40 tries there were 10 different sums."""
    rows, values = torch.randint(0, 3, (300_000,)), torch.randn(300_000)
    wanted = np.zeros(3, np.float32)
    np.add.at(wanted, rows.numpy(), values.numpy())  # one after the other
    with checkpointing.fixed_order_of_sums(torch.device("cpu")):
        for _ in range(10):
            x = torch.zeros(3, requires_grad=True)
            (x[rows] * values).sum().backward()
            assert np.array_equal(x.grad, wanted)


@pytest.mark.parametrize("before", [False, True])
def test_a_run_adds_in_one_order_and_leaves_the_setting_as_it_was(
    before: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory: Any = torch.utils.deterministic
    seen = []

    class Watched(TinyRegions):
        def __getitem__(self, index: int) -> dict[str, Any]:
            enabled = torch.are_deterministic_algorithms_enabled()
            seen.append((enabled, memory.fill_uninitialized_memory))
            if self.epoch == 2:
                raise RuntimeError("stop")
            return super().__getitem__(index)

    trainer = tiny_trainer(tmp_path / "run")
    trainer.train_data = Watched(7, 0)
    torch.use_deterministic_algorithms(before)
    try:
        with pytest.raises(RuntimeError, match="stop"):
            trainer.train()
        assert len(seen) == 8 and set(seen) == {(True, before)}
        assert torch.are_deterministic_algorithms_enabled() is before
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert memory.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(False)


# -- what stops a run


@pytest.mark.slow
def test_a_loss_that_is_not_finite_names_the_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = tiny_trainer(tmp_path / "run")

    class Broken(TinyRegions):
        def __getitem__(self, index: int) -> dict[str, Any]:
            sample = super().__getitem__(index)
            if self.epoch == 2 and index == 5:
                sample["feats"] = sample["feats"] * math.nan
            return sample

    trainer.train_data = Broken(7, 0)
    with pytest.raises(
        TrainingError, match=r"loss is not finite \(.*total\) in epoch 2, step [12]: .*s1/organ_5"
    ):
        trainer.train()
    assert checkpointing.read_checkpoint(trainer.folder.find("last"))["epoch"] == 1
    resumed = tiny_trainer(tmp_path / "run", resume="auto")
    assert len(resumed.train()) == 5


def test_a_gradient_that_is_not_finite_stops(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run")
    trainer.model.out_layer.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(TrainingError, match="gradient is not finite in epoch 1: s1/organ_"):
        trainer.train()
    assert checkpointing.read_checkpoint(trainer.folder.find("last"))["epoch"] == 0


def test_constructor_writes_nothing_and_refuses(tmp_path: Path) -> None:
    run = tmp_path / "run"
    tiny_trainer(run)
    assert not run.exists()
    with pytest.raises(DataError, match="val_data: expected at least one region, got none"):
        MedicalTrainer(
            TrainConfig(checkpoint_dir=str(run)), tiny_model(), TinyRegions(1, 0), TinyRegions(0, 0)
        )
    for device in ("gpu", "meta"):
        with pytest.raises(ConfigError, match="device: expected auto, cpu, cuda or cuda:N, got"):
            tiny_trainer(run, device=device)
    with pytest.raises(ConfigError, match="device: 'cuda:99' is not available"):
        tiny_trainer(run, device="cuda:99")
    with pytest.raises(ConfigError, match="amp: expected 'off' on cpu .*, got 'bf16'"):
        tiny_trainer(run, device="cpu", amp="bf16")
    assert not run.exists()


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_on_cuda(amp: str, tmp_path: Path) -> None:
    run = tiny_trainer(tmp_path / "run", device="cuda", amp=amp)
    run.train()
    resumed = tiny_trainer(tmp_path / "run", device="cuda", amp=amp, epochs=5, resume="auto")
    assert resumed.state.scaler.state_dict() == run.state.scaler.state_dict()
    assert len(resumed.train()) == 6
    assert run.history[-1]["train"]["total"] < run.history[1]["train"]["total"]


# -- the configuration


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lora_rank": 0}, "lora_rank: expected >= 1, got 0"),
        ({"lora_rank": 2.0}, "lora_rank: expected an integer, got 2.0"),
        ({"epochs": True}, "epochs: expected an integer, got True"),
        ({"lr": -1}, "lr: expected > 0, got -1.0"),
        ({"lr": "fast"}, "lr: expected a finite number, got 'fast'"),
        ({"clip_norm": math.nan}, "clip_norm: expected a finite number, got nan"),
        ({"lora_dropout": 1.0}, "lora_dropout: expected >= 0 and < 1, got 1.0"),
        ({"finetune": "lorra"}, "finetune: expected one of lora, full, got 'lorra'"),
        ({"classes": "liver"}, "classes: expected a list of names, got 'liver'"),
        ({"augment": "yes"}, "augment: expected true or false, got 'yes'"),
        ({"split": 3}, "split: expected text, got 3"),
        ({"lora_rnak": 4}, "lora_rnak: unknown key .nearest: lora_rank"),
        ({"resume": "auto", "overwrite": True}, "resume, overwrite: expected at most one of them"),
        ({"amp": "fp16", "parallel": "fsdp"}, "amp, parallel: expected bf16 with 'fsdp'"),
        (
            {"demo": "synthetic", "data_root": "x"},
            "demo: expected neither data_root nor use_dataset",
        ),
    ],
)
def test_config_errors_name_the_field(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig.from_dict(values)


def test_config_round_trip_and_defaults(tmp_path: Path) -> None:
    config = TrainConfig.from_dict({"classes": ["liver"], "lr": "1e-3", "checkpoint_dir": tmp_path})
    assert (config.classes, config.lr, config.checkpoint_dir) == (("liver",), 1e-3, str(tmp_path))
    assert TrainConfig.from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config
    assert TrainConfig(finetune="lora").peak_lr > TrainConfig(finetune="full").peak_lr
    assert config.peak_lr == 1e-3
    splits = [
        TrainConfig(**source).split for source in ({}, {"data_root": "x"}, {"demo": "synthetic"})
    ]
    assert splits == ["structure", "patient", "patient"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lr = 1.0  # type: ignore[misc]


def test_the_configuration_of_an_old_run_loads_and_stays_the_same() -> None:
    """It was written by an older version; files and checkpoints list the options of all models flat."""
    saved = read_yaml(ROOT / "tests" / "golden" / "medical_run.yaml")
    config = TrainConfig.from_dict(saved)
    saved |= {"intercept": None, "grid_tolerance": None}  # options added since
    assert config.to_dict() == saved
    assert isinstance(config.options, Sam3dOptions) and config.options.sam3d_part == "slat"
    other = dataclasses.replace(config, lr=0.5)
    assert other.options == config.options and other.to_dict() == {**saved, "lr": 0.5}


def test_options_of_another_model_are_refused() -> None:
    assert TrainConfig(sam3d_dir=None, drop_condition=0.1) == TrainConfig()
    for name, value in {"sam3d_dir": "x", "latents_dir": "x", "loss_vertex": 0.3}.items():
        with pytest.raises(ConfigError, match=f"{name}: expected model 'sam3d' with it, got 'com"):
            TrainConfig(**{name: value})


def test_a_resumed_run_may_change_only_resumable_options() -> None:
    changeable = {name for name in option_owners() if is_resumable(name)}
    assert {"epochs", "device", "sam3d_dir", "latents_dir", "checkpoint_dir"} <= changeable
    assert not changeable & {"lr", "seed", "batch_size", "model", "sam3d_part", "lora_rank"}


def test_read_yaml(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("lr: 1e-3\nclasses: [liver]\n")
    assert read_yaml(path) == {"lr": "1e-3", "classes": ["liver"]}
    path.write_text("")
    assert read_yaml(path) == {}
    for text, message in {
        "- a": "expected lines 'name: value', got list",
        "a: [": "cannot read",
    }.items():
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_yaml(path)
    with pytest.raises(ConfigError, match="cannot read .*missing.yaml"):
        read_yaml(tmp_path / "missing.yaml")


def test_default_ranks_are_those_of_the_model() -> None:
    config = TrainConfig()
    for given, rank, alpha, pattern in (
        (config, 2, 4.0, {"to_qkv": 3, "out_layer": 32}),
        (TrainConfig(lora_rank=8), 8, 16.0, {}),
        (TrainConfig(lora_rank=8, lora_alpha=4.0, lora_ranks=["mlp.0=2"]), 8, 4.0, {"mlp.0": 2}),
        (TrainConfig(model="sam3d", sam3d_dir="x"), 4, 8.0, {}),
    ):
        wanted = {"rank": rank, "alpha": alpha, "dropout": 0.0, "ffn": True}
        assert given.adapters == {**wanted, "rank_pattern": pattern}
    assert TrainConfig.from_dict(config.to_dict()) == config
    for entry in ("to_qkv", "to_qkv=0", "to_qkv=x", "=3", "a b=3", "to_qkv=123456"):
        with pytest.raises(ConfigError, match="lora_ranks: expected name=rank with a rank >= 1"):
            TrainConfig(lora_ranks=[entry])
    with pytest.raises(ConfigError, match="lora_ranks: expected none with model 'sam3d'"):
        TrainConfig(model="sam3d", sam3d_dir="x", lora_ranks=["to_qkv=3"])


def test_the_default_ranks_train_less_than_three_percent() -> None:
    model = load_base_model()
    total = sum(p.numel() for p in model.parameters())
    make_trainable(model, TrainConfig())
    trained = trainable_parameters(model)
    assert all(name.endswith(("lora_A", "lora_B")) for name in trained)
    assert sum(p.numel() for p in trained.values()) == 24_832 < 0.03 * total
