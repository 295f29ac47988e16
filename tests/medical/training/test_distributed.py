"""Training in several processes (gloo, on a CPU) equals training in one, and can be resumed after one is killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fastlora import load_adapter
from fastlora.errors import ConfigError, TrainingError
from fastlora.medical.data.phantom import write_phantom_dataset
from fastlora.medical.models.decoder import save_base_model
from fastlora.medical.training import checkpointing
from fastlora.medical.training.distributed import (
    Processes,
    local_device,
    lost_process_explained,
)
from fastlora.medical.training.finetuned import load_finetuned, trainable_parameters
from fastlora.medical.training.progress import RunReport
from fastlora.medical.training.run_folder import RunFolder
from fastlora.medical.training.trainer import MedicalTrainer
from tests.support.paths import ROOT
from tests.support.processes import TIME_LIMIT_S, run_processes
from tests.support.tiny_run import TinyRegions, flatten, tiny_model, tiny_trainer
from tests.support.tolerance import assert_same_training

pytestmark = pytest.mark.slow

PLAIN = {"lora_dropout": 0.0}
"""Without dropout, whose masks differ between processes."""


def train(folder: str, changes: dict[str, Any]) -> list[dict[str, Any]]:
    """Trains to the end; returns the history. Processes other than the first cannot write."""
    trainer = tiny_trainer(folder, **changes)
    if dist.is_initialized() and dist.get_rank():

        def refuse(*_: Any) -> None:
            raise AssertionError("only the first rank may write")

        checkpointing.atomic_write = checkpointing.write_checkpoint = refuse  # type: ignore
        RunFolder.open = RunFolder.write = refuse  # type: ignore
    return trainer.train()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of runs in one process, by kind of fine-tuning."""
    folders = {kind: tmp_path_factory.mktemp(kind) / "run" for kind in ("lora", "full")}
    for kind, folder in folders.items():
        train(str(folder), {**PLAIN, "finetune": kind})
    return folders


def assert_same_to_rounding(run: Path, whole: Path) -> None:
    """Compares the values of every epoch, and the weights and the optimizer of the last and of the best one."""
    for which in ("last", "best"):
        got, want = (
            flatten(checkpointing.read_checkpoint(RunFolder(folder).find(which)))
            for folder in (run, whole)
        )
        for state in (got, want):
            for name in [n for n in state if n.split("/")[1] in ("config", "seconds", "rng")]:
                del state[name]
        assert got.keys() == want.keys()
        for name, value in want.items():
            if isinstance(value, torch.Tensor):
                assert type(got[name]) is torch.Tensor and got[name].shape == value.shape
                if not name.endswith(
                    "to_qkv.bias"
                ):  # the gradient of a key's bias is only rounding
                    assert_same_training(got[name], value)
            elif isinstance(value, float):
                assert got[name] == pytest.approx(value, rel=1e-5), name
            else:
                assert got[name] == value, name
    histories = [json.loads((folder / "history.json").read_text()) for folder in (run, whole)]
    for got, want in zip(*(history["epochs"] for history in histories), strict=True):
        for part in {"train", "val"} & want.keys():
            assert got[part] == pytest.approx(want[part], rel=1e-6)


@pytest.mark.parametrize(
    ("finetune", "kind", "world"), [("lora", "ddp", 2), ("lora", "fsdp", 3), ("full", "fsdp", 2)]
)
def test_several_processes_equal_one(
    finetune: str, kind: str, world: int, whole: dict[str, Path], tmp_path: Path
) -> None:
    """7 regions in micro-batches of 2: the last one, of one region, leaves a rank without a share, and a third rank never has any."""
    run = tmp_path / "run"
    changes = {**PLAIN, "parallel": kind, "finetune": finetune}
    results = run_processes(world, train, str(run), changes)
    assert results == [results[0]] * world and len(results[0]) == 5
    assert_same_to_rounding(run, whole[finetune])
    files = [sorted(f.name for f in folder.iterdir()) for folder in (run, whole[finetune])]
    assert files[0] == files[1]


def test_elastic_resume(whole: dict[str, Path], tmp_path: Path) -> None:
    """An epoch in 2 processes with FSDP2, one in 3 with DDP, the rest in one process."""
    run = str(tmp_path / "run")
    for epoch, (world, kind) in enumerate([(2, "fsdp"), (3, "ddp")], 1):
        settings = {**PLAIN, "parallel": kind, "resume": "auto"}
        assert run_processes(world, train_until, run, settings, epoch) == [epoch] * world
    train(run, {**PLAIN, "resume": "auto"})
    assert_same_to_rounding(Path(run), whole["lora"])


def train_until(folder: str, changes: dict[str, Any], epoch: int) -> int:
    """A run that stops after `epoch`, with the learning-rate schedule of the whole run."""
    trainer = tiny_trainer(folder, **changes)
    trainer._stalled = lambda: trainer.epoch >= epoch  # type: ignore[method-assign]
    trainer.train()
    return trainer.epoch


def train_and_die(folder: str, kind: str) -> None:
    """The second process dies in the third epoch."""
    trainer = tiny_trainer(folder, **PLAIN, parallel=kind)
    step = trainer._step

    def die(batch: Any) -> float:
        if trainer.epoch == 2 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(batch)

    trainer._step = die  # type: ignore[method-assign]
    with lost_process_explained():
        trainer.train()


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_killed_process_ends_the_run_and_a_resume_continues(
    kind: str, whole: dict[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    survivor, dead = run_processes(2, train_and_die, str(run), kind)
    assert dead == -signal.SIGKILL  # and the other one did not hang
    assert isinstance(survivor, TrainingError)
    assert "another process ended unexpectedly" in str(survivor) and "--resume" in str(survivor)
    assert checkpointing.read_checkpoint(run / "checkpoints" / "last.pt")["epoch"] == 2
    results = run_processes(2, train, str(run), {**PLAIN, "parallel": kind, "resume": "auto"})
    assert results[0] == results[1] and len(results[0]) == 5
    assert_same_to_rounding(run, whole["lora"])


def dropout_draws(folder: str) -> list[float]:
    """Random numbers of torch's generator at each forward pass of an epoch."""
    trainer = tiny_trainer(folder, lora_dropout=0.5, epochs=1)
    drawn: list[float] = []
    forward = trainer._forward

    def look(batch: Any, where: str) -> Any:
        drawn.append(torch.rand(()).item())
        return forward(batch, where)

    trainer._forward = look  # type: ignore[method-assign]
    trainer.train()
    return drawn[2:6]  # of the epoch, between two validations


def test_each_process_draws_its_own_dropout(tmp_path: Path) -> None:
    first, second = run_processes(2, dropout_draws, str(tmp_path / "run"))
    assert len(first) == len(second) == 4 and not set(first) & set(second)


def disagree(folder: str, what: str) -> None:
    rank = dist.get_rank()
    if what == "seed":
        tiny_trainer(folder, seed=rank)
    else:
        config = tiny_trainer(folder).config
        MedicalTrainer(config, tiny_model(seed=rank), TinyRegions(7 - rank, 0), TinyRegions(3, 1))


@pytest.mark.parametrize(
    ("what", "message"),
    [("seed", r"seed: \[0, 1\]"), ("data", r"base model: .*training samples: \[7, 6\]")],
)
def test_processes_that_disagree_are_refused(what: str, message: str, tmp_path: Path) -> None:
    for error in run_processes(2, disagree, str(tmp_path / "run"), what):
        assert isinstance(error, ConfigError)
        assert re.search("expected the same in all 2 processes, got .*" + message, str(error))
    assert not (tmp_path / "run").exists()


def no_loss_of_mine(folder: str) -> float:
    """An epoch in which the second process never has a region; returns its largest gradient."""
    trainer = tiny_trainer(folder, **PLAIN, parallel="ddp", batch_size=1, grad_accum=1)
    largest = 0.0

    def step(batch: Any) -> float:
        nonlocal largest
        gradients = [p.grad for p in trainable_parameters(trainer.model).values()]
        assert all(g is not None for g in gradients)
        largest = max(largest, *(float(g.abs().max()) for g in gradients if g is not None))
        trainer.state.optimizer.zero_grad()
        return 0.0

    trainer._step = step  # type: ignore[method-assign]
    trainer._train_epoch(RunReport(trainer.state, Path(folder), active=False))
    return largest


def test_a_process_without_regions_uses_every_parameter(tmp_path: Path) -> None:
    first, second = run_processes(2, no_loss_of_mine, str(tmp_path / "run"))
    assert first == second > 0


def share() -> tuple[list[list[int]], dict[str, float], str]:
    processes = Processes.current()
    made = processes.first_alone(lambda: str(processes.rank))
    parts = [processes.share(list(range(size))) for size in (5, 1)]
    return (
        parts,
        processes.sum({"a": processes.rank + 1.0, **({"b": 5.0} if processes.first else {})}),
        made,
    )


def test_shares_and_sums() -> None:
    results = run_processes(2, share)
    assert [result[0] for result in results] == [[[0, 2, 4], [0]], [[1, 3], []]]
    assert all(result[1] == {"a": 3.0, "b": 5.0} for result in results)
    assert [result[2] for result in results] == ["0", "1"]
    assert Processes().share([3, 4]) == [3, 4] and Processes().sum({"a": 1.0}) == {"a": 1.0}


def test_invalid_process_settings_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="parallel: expected torchrun around 'fsdp', got one"):
        tiny_trainer(tmp_path / "run", parallel="fsdp")
    with monkeypatch.context() as two:
        two.setattr(Processes, "current", lambda: Processes(0, 2))
        with pytest.raises(ConfigError, match="halve_batch: expected one process, got 2"):
            tiny_trainer(tmp_path / "run", halve_batch=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="2 processes were started, expected a process group"):
        tiny_trainer(tmp_path / "run")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert local_device(torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(ConfigError, match="device: expected 'cuda' for 2 processes, got 'cuda:0'"):
        local_device(torch.device("cuda", 0))


def test_torchrun(tmp_path: Path) -> None:
    """The script under torchrun: a complete run, and its adapter file."""
    write_phantom_dataset(tmp_path / "volumes", subjects=2, seed=0)
    save_base_model(tiny_model(), tmp_path / "base.safetensors", {})
    script = str(ROOT / "scripts" / "train_medical.py")
    flags = (
        "--data_root volumes --base_weights base.safetensors --classes blob --split file --epochs 1"
    )
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", script]
        + [*flags.split(), "--batch_size", "3", "--checkpoint_dir", "run", "--parallel", "fsdp"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(script).parent.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT_S,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\nepoch ") == 2 and "on cpu and 1 more (fsdp)" in done.stdout
    model = load_finetuned(tmp_path / "run", model=tiny_model())
    load_adapter(model, tmp_path / "run" / "adapter.safetensors")
