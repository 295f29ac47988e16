"""Training on several ranks (gloo, on a CPU) equals training in one process, and outlives ranks that die."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fastlora import load_adapter
from fastlora.errors import ConfigError, TrainingError
from fastlora.medical import checkpointing
from fastlora.medical.distributed import Ranks, local_device
from fastlora.medical.finetuned import trainable_parameters
from fastlora.medical.run_folder import RunFolder
from fastlora.medical.trainer import MedicalTrainer
from tests.ranks import run_ranks
from tests.test_medical_resume import flatten
from tests.tiny_run import TinyRegions, tiny_model, tiny_trainer

PLAIN = {"lora_dropout": 0.0}
"""Dropout aside: what each rank draws is its own."""


def train(folder: str, changes: dict[str, Any]) -> list[dict[str, Any]]:
    """A run to its end; the history. A rank that must not write finds that it cannot."""
    trainer = tiny_trainer(folder, **changes)
    if dist.is_initialized() and dist.get_rank():

        def refuse(*_: Any) -> None:
            raise AssertionError("only the first rank may write")

        checkpointing.atomic_write = checkpointing.write_checkpoint = refuse  # type: ignore
        RunFolder.open = RunFolder.write = refuse  # type: ignore
    return trainer.train()


@pytest.fixture(scope="module", params=["lora", "full"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run in one process."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    train(str(folder), {**PLAIN, "finetune": request.param})
    return folder


def assert_same_to_rounding(run: Path, whole: Path) -> None:
    """Figures of every epoch, and the weights and the optimizer at the end."""
    for which in ("last", "best"):
        got, want = (
            flatten(checkpointing.read_checkpoint(RunFolder(folder).find(which)))
            for folder in (run, whole)
        )
        for side in (got, want):
            for name in [n for n in side if n.split("/")[1] in ("config", "seconds", "rng")]:
                del side[name]
        assert got.keys() == want.keys()
        for name, value in want.items():
            if isinstance(value, torch.Tensor):
                assert type(got[name]) is torch.Tensor
                torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-5)
            elif isinstance(value, float):
                assert got[name] == pytest.approx(value, rel=1e-4), name
            else:
                assert got[name] == value, name
