"""scripts/train_medical.py from the command line: help, errors, run folder, Ctrl-C; and the order of the pipeline."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from fastlora.errors import FastLoRAWarning
from fastlora.medical.commands.train import main
from fastlora.medical.data.phantom import write_phantom_dataset
from fastlora.medical.models.decoder import save_base_model
from fastlora.medical.training import checkpointing
from fastlora.medical.training.config import TrainConfig, option_owners, read_yaml
from fastlora.medical.training.finetuned import load_finetuned
from fastlora.medical.training.trainer import MedicalTrainer
from tests.support.tiny_run import tiny_model, tiny_trainer


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with two phantom subjects and a tiny base model."""
    home = tmp_path_factory.mktemp("home")
    write_phantom_dataset(home / "volumes", subjects=2, seed=0)
    save_base_model(tiny_model(), home / "base.safetensors", {})
    return home


@pytest.fixture
def flags(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A run of a second in tmp_path/run."""
    monkeypatch.chdir(tmp_path)
    names = {"data_root": home / "volumes", "base_weights": home / "base.safetensors"}
    values: dict[str, Any] = {
        **names,
        "classes": "blob",
        "split": "file",
        "epochs": 2,
        "lr": 0.01,
        "checkpoint_dir": "run",
    }
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def test_help_groups_every_flag_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert {"lr", "sam3d_dir"} <= option_owners().keys()
    for name in option_owners():
        assert f"--{name}" in text
    for group in ("data:", "model:", "optimisation:", "run:", "sam3d:"):
        assert group in text
    assert "--original_nifti_dir" in text
    assert "--batch_size N regions per micro-batch, summed over all processes (default: 8)" in text


def test_run_resume_and_use(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*flags, "--use_dataset", "--lora_rank", "2"]) == 0
    out = capsys.readouterr().out
    assert "lora fine-tuning of" in out and out.count("\nepoch ") == 3 and "best.pt" in out
    assert len(json.loads(Path("run/history.json").read_text())["epochs"]) == 3
    assert (
        main(["--checkpoint_dir", "run", "--resume", "--epochs", "3"]) == 0
    )  # the rest from the checkpoint
    assert read_yaml("run/config.yaml")["lora_rank"] == 2
    assert main(["--resume", "run/checkpoints/last.pt", "--epochs", "4"]) == 0
    assert len(json.loads(Path("run/history.json").read_text())["epochs"]) == 5
    load_finetuned("run", merged=True)


@pytest.mark.slow
def test_demo_and_yaml(flags: list[str], home: Path) -> None:
    """The file's values apply unless a flag overrides them."""
    Path("config.yaml").write_text(
        f"demo: synthetic\nfinetune: full\nepochs: 5\nlr: 1e-4\nbase_weights: {home / 'base.safetensors'}\n"
    )
    assert main(["--config", "config.yaml", "--epochs", "1", "--checkpoint_dir", "run"]) == 0
    config = TrainConfig.from_dict(read_yaml("run/config.yaml"))
    assert (config.finetune, config.epochs, config.lr) == ("full", 1, 1e-4)
    assert Path("data/synthetic/meta.csv").is_file()


def test_interrupt_keeps_the_last_epoch(
    flags: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    step = MedicalTrainer._step

    def interrupted(self: MedicalTrainer, batch: Any) -> float:
        if self.epoch == 1:
            signal.raise_signal(signal.SIGINT)
        return step(self, batch)

    monkeypatch.setattr(MedicalTrainer, "_step", interrupted)
    assert main(flags) == 130
    assert capsys.readouterr().err.startswith("interrupted: ")
    assert checkpointing.read_checkpoint("run/checkpoints/last.pt")["epoch"] == 1


def with_volume(change: Callable[[Path], None]) -> Callable[[Path], list[str]]:
    """Writes a data set, damages it with `change`, and returns the flags to train on it."""

    def prepare(folder: Path) -> list[str]:
        write_phantom_dataset(folder / "volumes", subjects=2, seed=0)
        change(folder / "volumes" / "phantom_000")
        return ["--data_root", str(folder / "volumes")]

    return prepare


def rewrite(path: Path, change: Callable[[Any], Any]) -> None:
    image = nib.load(path)
    nib.save(nib.Nifti1Image(change(np.asarray(image.dataobj)), image.affine), path)


def nan_image(case: Path) -> None:
    rewrite(
        case / "ct.nii.gz",
        lambda data: np.where(data > data.mean(), np.nan, data).astype(np.float32),
    )


def empty_mask(case: Path) -> None:
    rewrite(case / "segmentations" / "blob.nii.gz", np.zeros_like)


def small_mask(case: Path) -> None:
    rewrite(case / "segmentations" / "blob.nii.gz", lambda data: data[:-1])


def other_model(folder: Path) -> list[str]:
    tiny_trainer(folder / "other", epochs=1).train()
    return ["--resume", str(folder / "other"), "--lora_rank", "3"]


def no_checkpoint(folder: Path) -> list[str]:
    (folder / "damaged.pt").write_bytes(b"PK")
    return ["--resume", str(folder / "damaged.pt")]


def unknown_key(folder: Path) -> list[str]:
    (folder / "config.yaml").write_text("epoch: 3\n")
    return ["--config", str(folder / "config.yaml")]


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda _: ["--data_root", "nowhere"], "nowhere: expected a folder of cases"),
        (with_volume(nan_image), "phantom_000/ct.nii.gz: expected finite values, got NaN"),
        (with_volume(empty_mask), "segmentations/blob.nii.gz: expected at least one voxel"),
        (with_volume(small_mask), "segmentations/blob.nii.gz: expected the shape of ct.nii.gz"),
        (other_model, r"to_qkv.lora_A: expected \(3, 12\), got \(4, 12\)"),
        (no_checkpoint, "damaged.pt: cannot be read as a checkpoint"),
        (unknown_key, "epoch: unknown key .nearest: epochs"),
        (lambda _: ["--config", "nowhere.yaml"], "config: cannot read nowhere.yaml"),
        (lambda _: ["--classes", "bolb"], "classes: no case has 'bolb' .nearest: blob"),
        (lambda _: ["--lora_rank", "0"], "lora_rank: expected >= 1, got 0"),
        (lambda _: ["--lora_rank", "two"], "argument --lora_rank: invalid int value: 'two'"),
        (
            lambda _: ["--lora_rnak", "2"],
            "unknown argument --lora_rnak .nearest: --lora_rank",
        ),
        (lambda _: ["--amp", "--device", "cpu"], "amp: expected 'off' on cpu"),
        (lambda _: ["--base_weights", "no.safetensors"], "base model: no file no.safetensors"),
    ],
)
def test_invalid_input(
    prepare: Callable[[Path], list[str]],
    message: str,
    flags: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line, exit code 2, no run folder."""
    extra = prepare(tmp_path)
    capsys.readouterr()
    assert main([*flags, *extra]) == 2
    out, err = capsys.readouterr()
    assert all("layout TotalSegmentator" in line for line in out.splitlines())
    assert err.startswith("error: ") and err.count("\n") == 1
    assert re.search(message, err)
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*flags, "--lr", "1e30", "--clip_norm", "0", "--warmup", "0"]) == 2
    err = capsys.readouterr().err
    assert (
        err.startswith("error: ")
        and " is not finite" in err
        and re.search(r"phantom_00[01]/blob", err)
    )
    assert checkpointing.read_checkpoint("run/checkpoints/last.pt")["epoch"] == 0


def test_images_that_changed_since_are_said_on_resuming(
    flags: list[str], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "volumes"
    shutil.copytree(home / "volumes", data)
    flags[flags.index("--data_root") + 1] = str(data)
    assert main([*flags, "--epochs", "1", "--checkpoint_dir", "run"]) == 0
    assert main([*flags, "--epochs", "2", "--checkpoint_dir", "run", "--resume"]) == 0
    path = next(data.glob("*/ct.nii.gz"))
    os.utime(path, ns=(1, 1))
    with pytest.warns(FastLoRAWarning, match="last.pt: the images or masks have changed since"):
        assert main([*flags, "--epochs", "3", "--checkpoint_dir", "run", "--resume"]) == 0
    assert main([*flags, "--epochs", "3", "--checkpoint_dir", "run", "--resume"]) == 0
