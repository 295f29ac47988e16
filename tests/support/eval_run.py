"""Two tiny trained runs on phantom volumes, and their evaluation, computed once for all tests that use it."""

from __future__ import annotations

import contextlib
import io
from functools import lru_cache
from pathlib import Path

from fastlora.medical.data.phantom import write_phantom_dataset
from fastlora.medical.evaluation.evaluate import Evaluation, Run, compare_runs
from fastlora.medical.models.decoder import save_base_model
from fastlora.medical.training.config import TrainConfig
from fastlora.medical.training.trainer import MedicalTrainer
from tests.support.tiny_run import tiny_model


def train_tiny(folder: Path, finetune: str, **changes: object) -> Path:
    """A run of two epochs in folder/<finetune>, on the phantoms in folder/volumes."""
    values: dict[str, object] = {
        "data_root": str(folder / "volumes"),
        "base_weights": str(folder / "base.safetensors"),
        "split": "file",
        "epochs": 2,
        "augment": False,
        "finetune": finetune,
        "checkpoint_dir": str(folder / finetune),
        "progress": False,
    }
    config = TrainConfig(**{**values, **changes})  # type: ignore[arg-type]
    with contextlib.redirect_stdout(io.StringIO()):
        MedicalTrainer(config).train()
    return Path(config.checkpoint_dir)


@lru_cache(maxsize=1)
def shared_home(base: Path) -> Path:
    """volumes (two phantom subjects, the second held out), base.safetensors, runs lora and full."""
    folder = base / "eval_home"
    folder.mkdir()
    write_phantom_dataset(folder / "volumes", subjects=2, seed=4)
    save_base_model(tiny_model(), folder / "base.safetensors", {})
    train_tiny(folder, "lora", lr=1e-2)
    train_tiny(folder, "full", lr=2e-3)
    return folder


def read_runs(home: Path) -> dict[str, Run]:
    """The runs of `home`; the last epoch of full, whose best may be the one before training."""
    return {
        "lora": Run.read(home / "lora", "lora"),
        "full": Run.read(home / "full" / "checkpoints" / "last.pt", "full"),
    }


@lru_cache(maxsize=1)
def evaluate_home(home: Path) -> tuple[Evaluation, dict[str, object]]:
    """The result of `compare_runs` for the runs of `home`."""
    runs = read_runs(home)
    return compare_runs(runs["lora"], runs["full"], device="cpu")
