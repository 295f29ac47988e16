"""Training of SAM 3D's decoder in several processes (gloo, on a CPU) equals training in one, with the small package of `sam3d_package.py`."""

import contextlib
import io
import json
import os
import signal
import sys

import pytest
import torch.distributed as dist

from fastlora.errors import ConfigError, TrainingError
from fastlora.medical.training import checkpointing
from fastlora.medical.training.config import TrainConfig
from fastlora.medical.training.distributed import lost_process_explained
from fastlora.medical.training.finetuned import load_finetuned
from fastlora.medical.training.run_folder import RunFolder
from fastlora.medical.training.trainer import MedicalTrainer
from tests.support.processes import run_processes
from tests.support.tiny_run import TinyRegions

pytest_plugins = "tests.support.sam3d_fixtures"
pytestmark = pytest.mark.slow


def train(home, folder, run, changes, death=None):
    """The history of 3 epochs over 7 regions in micro-batches of 2, in one of several processes or in one; death: the epoch in which the second process dies.

    The learning rate is small: a mesh's triangles come and go, so a rounding error that moves one grows with every step. At 1e-5 the
    third epoch's gradient jumped by 2e-4 of its norm between orders of summation; at 1e-6 it does not.
    """
    if str(home) not in sys.path:
        sys.path.insert(0, str(home))
    values = {"batch_size": 2, "grad_accum": 2, "epochs": 3, "lr": 1e-6, "lora_rank": 4}
    values |= {"model": "sam3d", "sam3d_dir": str(folder), "checkpoint_dir": str(run), "seed": 3}
    config = TrainConfig(**{**values, "progress": False, **changes})
    trainer = MedicalTrainer(config, None, TinyRegions(7, 0), TinyRegions(3, 1))
    if dist.is_initialized() and dist.get_rank():

        def refuse(*_):
            raise AssertionError("only the first rank may write")

        checkpointing.atomic_write = checkpointing.write_checkpoint = refuse
        RunFolder.open = RunFolder.write = refuse
        step = trainer._step

        def die(batch):
            if trainer.epoch + 1 == death:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(batch)

        trainer._step = die
    with contextlib.redirect_stdout(io.StringIO()), lost_process_explained():
        return trainer.train()


def assert_same_history(got, wanted):
    assert len(got) == len(wanted) == 4
    for mine, its in zip(got, wanted, strict=True):
        assert mine["val"] == pytest.approx(its["val"], rel=2e-6, abs=1e-6)
        if "train" in its:
            assert mine["train"] == pytest.approx(its["train"], rel=2e-6, abs=1e-6)
            assert mine["grad_norm"] == pytest.approx(its["grad_norm"], rel=1e-4)


@pytest.fixture(scope="module")
def alone(package, folder, tmp_path_factory):
    """(folder, history) of runs in one process, by what they train."""
    found = {}
    for kind in ("lora", "full"):
        run = tmp_path_factory.mktemp(kind) / "run"
        found[kind] = run, train(package, folder, run, {"finetune": kind})
    return found


@pytest.mark.parametrize(
    ("finetune", "kind", "world"), [("lora", "ddp", 2), ("lora", "fsdp", 3), ("full", "fsdp", 2), ("full", "ddp", 3)]
)  # fmt: skip
def test_several_processes_equal_one(finetune, kind, world, alone, package, folder, tmp_path):
    run = tmp_path / "run"
    changes = {"finetune": finetune, "parallel": kind}
    results = run_processes(world, train, package, folder, run, changes)
    assert results == [results[0]] * world
    assert_same_history(results[0], alone[finetune][1])
    files = [sorted(file.name for file in path.iterdir()) for path in (run, alone[finetune][0])]
    assert files[0] == files[1]
    assert ("adapter.safetensors" in files[0]) == (finetune == "lora")
    load_finetuned(run, which="last")


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_killed_process_ends_the_run_and_a_single_one_continues(kind, alone, package, folder, tmp_path):  # fmt: skip
    run = tmp_path / "run"
    survivor, dead = run_processes(2, train, package, folder, run, {"parallel": kind}, 3)
    assert dead == -signal.SIGKILL and isinstance(survivor, TrainingError)
    assert "another process ended unexpectedly" in str(survivor)
    assert len(json.loads((run / "history.json").read_text())["epochs"]) == 3
    history = train(package, folder, run, {"resume": "auto"})
    assert_same_history(history, alone["lora"][1])


def test_16_bits_are_not_sharded(package, folder, tmp_path):
    for kind, wanted in (("fsdp", ConfigError), ("ddp", list)):
        changes = {"parallel": kind, "sam3d_torso": "fp16", "epochs": 1}
        results = run_processes(2, train, package, folder, tmp_path / kind, changes)
        assert all(isinstance(result, wanted) for result in results)
        if wanted is ConfigError:
            assert str(results[0]).startswith("parallel: expected 'ddp' with 16-bit weights")
