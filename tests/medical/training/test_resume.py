"""A run that is stopped, killed or continued equals an uninterrupted one, and files are never partly written."""

from __future__ import annotations

import json
import logging
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlora.errors import CheckpointError, ConfigError, TrainingError
from fastlora.files import atomic_write
from fastlora.medical.commands.train import read_config
from fastlora.medical.training import checkpointing
from fastlora.medical.training.run_folder import RunFolder
from fastlora.medical.training.trainer import MedicalTrainer
from tests.support.paths import ROOT
from tests.support.tiny_run import TinyRegions, assert_same_run, tiny_model, tiny_trainer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole_lora(tmp_path_factory: pytest.TempPathFactory) -> MedicalTrainer:
    """A finished, uninterrupted run that kept a checkpoint of every epoch."""
    trainer = tiny_trainer(tmp_path_factory.mktemp("lora") / "run", save_every=1)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def whole_full(tmp_path_factory: pytest.TempPathFactory) -> MedicalTrainer:
    trainer = tiny_trainer(tmp_path_factory.mktemp("full") / "run", finetune="full")
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("kind", "epoch"), [("lora", 0), ("lora", 1), ("lora", 2), ("lora", 3), ("full", 2)]
)
def test_interrupted_after_any_epoch(
    kind: str, epoch: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    whole: MedicalTrainer = request.getfixturevalue(f"whole_{kind}")
    first = tiny_trainer(tmp_path, finetune=kind)
    step = first._step

    def interrupt(batch: Any) -> float:
        if first.epoch == epoch:
            raise KeyboardInterrupt
        return step(batch)

    first._step = interrupt  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        first.train()
    second = tiny_trainer(tmp_path, finetune=kind, resume="auto")
    assert second.epoch == epoch
    second.train()
    assert_same_run(tmp_path, whole.folder.path)


def test_one_checkpoint_continues_in_another_folder(
    whole_lora: MedicalTrainer, tmp_path: Path
) -> None:
    """Each epoch's file holds the best state so far, so `best` is the same without the old folder."""
    for epoch in (1, 4):
        file = shutil.copy(whole_lora.folder.find(f"epoch_{epoch:03d}"), tmp_path / "moved.pt")
        run = tmp_path / f"from_{epoch}"
        tiny_trainer(run, resume=str(file)).train()
        assert_same_run(run, whole_lora.folder.path)


@pytest.mark.parametrize(("moment", "kept"), [("training", 2), ("saving", 2), ("between", 3)])
def test_killed(moment: str, kept: int, whole_lora: MedicalTrainer, tmp_path: Path) -> None:
    """SIGKILL in the 3rd epoch loses at most that epoch, and leaves only files that can be read."""
    run = tmp_path / "run"
    root = ROOT
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.tiny_run", str(run), moment],
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list(run.rglob(".*.tmp"))) == (moment == "saving")  # it was killed while writing
    for file in run.rglob("*.pt"):
        checkpointing.read_checkpoint(file)
    json.loads((run / "history.json").read_text())

    trainer = tiny_trainer(run, resume="auto")
    assert trainer.epoch == kept
    trainer.train()
    assert_same_run(run, whole_lora.folder.path)
    assert not list(run.rglob(".*.tmp"))


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    atomic_write(path, b"old")

    def fail(file: Any) -> None:
        file.write(b"ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        atomic_write(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_more_epochs_stretch_the_schedule(whole_lora: MedicalTrainer, tmp_path: Path) -> None:
    last = whole_lora.folder.find("last")
    longer = tiny_trainer(tmp_path / "run", epochs=6, resume=str(last))
    assert (
        longer.state.optimizer.param_groups[0]["lr"]
        == longer.config.peak_lr * longer.state.lr_factor(8)
        > 0
    )
    history = longer.train()
    assert [record["epoch"] for record in history] == list(range(7))
    assert history[:5] == whole_lora.history[:5]


def test_a_finished_run_is_unchanged(whole_lora: MedicalTrainer, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole_lora.folder.path, run)
    assert tiny_trainer(run, resume="auto").train() == whole_lora.history
    assert_same_run(run, whole_lora.folder.path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_rank": 2}, r"to_qkv.lora_A: expected \(2, 12\), got \(4, 12\)"),
        ({"finetune": "full"}, "lora_A: unexpected.*input_layer.weight: missing"),
        ({"lora_alpha": 9.0}, "lora_alpha was 8.0 in this run, got 9.0"),
        ({"seed": 4}, "seed was 3 in this run, got 4"),
    ],
)
def test_checkpoint_of_another_run(
    change: dict[str, Any], message: str, whole_lora: MedicalTrainer, tmp_path: Path
) -> None:
    trainer = tiny_trainer(tmp_path / "run", **change)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    optimizer, rng = trainer.state.optimizer.state_dict(), torch.get_rng_state()
    with pytest.raises(CheckpointError, match=message):
        trainer.load_checkpoint(whole_lora.folder.find("last"))
    assert all(
        torch.equal(before[name], tensor) for name, tensor in trainer.model.state_dict().items()
    )
    assert trainer.state.optimizer.state_dict() == optimizer and torch.equal(
        torch.get_rng_state(), rng
    )
    assert trainer.epoch == 0 and trainer.history == [] and not (tmp_path / "run").exists()


def test_checkpoint_of_another_model_base_or_data(
    whole_lora: MedicalTrainer, tmp_path: Path
) -> None:
    config, last = tiny_trainer(tmp_path).config, whole_lora.folder.find("last")
    data = TinyRegions(7, 0), TinyRegions(3, 1)
    with pytest.raises(CheckpointError, match=r"to_qkv.lora_A: expected \(4, 16\), got \(4, 12\)"):
        MedicalTrainer(config, tiny_model(channels=16), *data).load_checkpoint(last)
    with pytest.raises(CheckpointError, match="another base model"):
        MedicalTrainer(config, tiny_model(seed=2), *data).load_checkpoint(last)
    with pytest.raises(CheckpointError, match="trained on 7 samples, the data now has 6"):
        MedicalTrainer(config, tiny_model(), TinyRegions(6, 0), data[1]).load_checkpoint(last)


def test_unreadable_checkpoints(whole_lora: MedicalTrainer, tmp_path: Path) -> None:
    data = whole_lora.folder.find("last").read_bytes()
    (tmp_path / "half.pt").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.pt").write_text("not a checkpoint")
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.pt")
    content = checkpointing.read_checkpoint(whole_lora.folder.find("last"))
    del content["rng"]
    torch.save(content, tmp_path / "lacking.pt")
    for name, message in {
        "half.pt": "cannot be read as a checkpoint",
        "text.pt": "cannot be read as a checkpoint",
        "other.pt": "not a checkpoint of this trainer",
        "lacking.pt": "lacks rng",
        "missing.pt": "no such checkpoint",
    }.items():
        with pytest.raises(CheckpointError, match=f"{name}.*{message}"):
            checkpointing.read_checkpoint(tmp_path / name)


def test_two_runs_do_not_mix(whole_lora: MedicalTrainer, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole_lora.folder.path, run)
    (run / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="run is not empty; continue its run with --resume"):
        tiny_trainer(run)
    with pytest.raises(ConfigError, match="is not empty"):
        tiny_trainer(run, resume=str(whole_lora.folder.path))  # another run's checkpoint
    with pytest.raises(ConfigError, match="expected a folder, got the file"):
        tiny_trainer(run / "notes.txt")
    tiny_trainer(run, epochs=1, overwrite=True).train()
    assert len(json.loads((run / "history.json").read_text())["epochs"]) == 2
    assert (run / "notes.txt").read_text() == "mine"


def test_resume_finds_its_checkpoint(whole_lora: MedicalTrainer, tmp_path: Path) -> None:
    folder = whole_lora.folder
    assert folder.resume_from("auto") == folder.resume_from(str(folder.path)) == folder.find("last")
    assert RunFolder(tmp_path).resume_from("auto") is RunFolder(tmp_path).resume_from(None) is None
    with pytest.raises(
        CheckpointError,
        match="no checkpoint 'epoch_009'; there are: best, epoch_001, epoch_002, epoch_003, epoch_004, last, previous",
    ):
        folder.find("epoch_009")


# ------------------------------------------------------------------------------ files of others


OWN_NAMES = ("config.yaml", "history.json", "adapter.safetensors", "checkpoints/last.pt", "tb/x")


@pytest.mark.parametrize("name", OWN_NAMES)
@pytest.mark.parametrize("options", [{"resume": "auto"}, {"overwrite": True}], ids=str)
def test_a_folder_with_files_of_others_is_refused(name: str, options: dict, tmp_path: Path) -> None:
    path = tmp_path / "mine" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"mine")
    with pytest.raises((ConfigError, CheckpointError), match="mine"):
        tiny_trainer(tmp_path / "mine", **options)
    assert path.read_bytes() == b"mine"
    assert [p for p in (tmp_path / "mine").rglob("*") if p.is_file()] == [path]


def test_other_files_beside_a_run_are_kept(whole_lora: MedicalTrainer, tmp_path: Path) -> None:
    """A job script may write its log into the folder before the run begins, and the user notes later."""
    run = tmp_path / "run"
    shutil.copytree(whole_lora.folder.path, run)
    others = [
        *("log.txt", ".a.tmp", ".x.fastlora.tmp", "sub/.y.0123abcd.fastlora.tmp"),
        *("tb/notes.txt", "checkpoints/mine.pt", "checkpoints/best_of_all.pt"),
    ]
    for name in others:
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("mine")
    ours = run / "checkpoints" / ".last.pt.0123abcd.fastlora.tmp"
    ours.write_text("of a run that was killed")
    tiny_trainer(run, epochs=1, overwrite=True).train()
    assert all((run / name).read_text() == "mine" for name in others) and not ours.exists()
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names == {"last.pt", "previous.pt", "best.pt", "mine.pt", "best_of_all.pt"}
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "log.txt").write_text("mine")
    tiny_trainer(tmp_path / "new", epochs=1, resume="auto").train()
    assert (tmp_path / "new" / "log.txt").read_text() == "mine"


def test_a_run_of_an_earlier_version_is_recognised(
    whole_lora: MedicalTrainer, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole_lora.folder.path, run)
    (run / ".lock").write_bytes(b"")
    tiny_trainer(run, epochs=1, overwrite=True).train()
    assert (run / ".lock").read_bytes() == b"fastlora-medical run"


def test_a_folder_is_opened_once_and_the_lock_lasts(tmp_path: Path) -> None:
    first, second = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    first.open({}, False)
    code = (
        "from fastlora.medical.training.run_folder import RunFolder\n"
        f"RunFolder({str(tmp_path / 'run')!r}).open({{}}, False)"
    )

    def other_process() -> int:
        return subprocess.run(
            [sys.executable, "-c", code], capture_output=True, cwd=ROOT
        ).returncode

    for _ in range(2):
        with pytest.raises(TrainingError, match="another run is writing to"):
            second.open({}, False)
        second.close()
        second.check_free(None, auto=False, overwrite=True)  # reads the lock's file
        assert other_process() == 1  # the lock is still held
    first.close()
    assert other_process() == 0
    third = RunFolder(tmp_path / "run")
    third.open({}, False)
    third.close()


def test_a_folder_that_cannot_be_opened_is_not_locked(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_bytes(b"a file")
    first, second = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    with pytest.raises(ConfigError, match="cannot write"):
        first.open({}, False)
    (tmp_path / "run" / "checkpoints").unlink()
    second.open({}, False)
    second.close()


def test_a_checkpoint_never_says_where_to_write(
    whole_lora: MedicalTrainer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What it says of where to read is printed, unless another place is given."""
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO, "fastlora.medical")
    content = checkpointing.read_checkpoint(whole_lora.folder.find("last"))
    content["config"]["data_root"] = "theirs"
    content["config"]["checkpoint_dir"] = str(tmp_path / "elsewhere")
    checkpointing.write_checkpoint(Path("stranger.pt"), content)
    with pytest.raises(ConfigError, match="checkpoint_dir: expected the folder to write to"):
        read_config(["--resume", "stranger.pt"])
    config = read_config(["--resume", "stranger.pt", "--checkpoint_dir", "mine"])
    assert config.checkpoint_dir == "mine"
    Path("run/checkpoints").mkdir(parents=True)
    shutil.copy("stranger.pt", "run/checkpoints/last.pt")
    assert read_config(["--resume", "run/checkpoints/last.pt"]).checkpoint_dir == "run"
    assert read_config(["--resume", "run"]).checkpoint_dir == "run"
    assert not Path("elsewhere").exists()
    named = "from the checkpoint run/checkpoints/last.pt: data_root theirs"
    assert caplog.messages.count(named) == 2
    assert read_config(["--resume", "run", "--data_root", "mine"]).data_root == "mine"
    assert caplog.messages.count(named) == 2


def test_the_advice_for_a_folder_without_a_checkpoint_can_be_followed(
    whole_lora: MedicalTrainer, tmp_path: Path
) -> None:
    (tmp_path / "history.json").write_text("mine")
    with pytest.raises(CheckpointError, match="or choose another folder"):
        RunFolder(tmp_path).resume_from("auto")
    run = tmp_path / "run"
    shutil.copytree(whole_lora.folder.path, run)
    for path in (run / "checkpoints").iterdir():
        path.unlink()
    with pytest.raises(CheckpointError, match="or start again with --overwrite"):
        RunFolder(run).resume_from("auto")
