"""Faults of a training run: kills, Ctrl-C, a full disk, a folder that is read-only or in use, too little memory, NaN, a killed loader process."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from fastlora.errors import ConfigError, TrainingError
from fastlora.medical.training import checkpointing, faults
from fastlora.medical.training.run_folder import RunFolder
from tests.support.endurance import kill_runs, repeated_runs
from tests.support.faulty_run import inject
from tests.support.paths import ROOT
from tests.support.processes import TIME_LIMIT_S
from tests.support.tiny_run import assert_same_run, tiny_trainer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an uninterrupted run of the script."""
    run = tmp_path_factory.mktemp("whole") / "run"
    code, _, err = faulty(run, "none")
    assert code == 0, err
    return run


class Fault(NamedTuple):
    """A run in a child process, and its output."""

    process: Any
    folder: Path

    def end(self) -> tuple[int, str, str]:
        """Its exit code, stdout and stderr."""
        self.process.join(TIME_LIMIT_S)
        assert self.process.exitcode is not None, "it did not end"
        return self.process.exitcode, *((self.folder / n).read_text() for n in ("out", "err"))


def start(run, fault, value=""):
    folder = Path(tempfile.mkdtemp(dir=run.parent))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.endurance", "tests.support.faulty_run"])
    process = context.Process(target=inject, args=(str(folder), str(run), fault, str(value)))
    process.start()
    return Fault(process, folder)


def faulty(run, fault, value=""):
    return start(run, fault, value).end()


def assert_it_continues(run, whole):
    code, _, err = faulty(run, "none")
    assert code == 0, err
    assert_same_run(run, whole)
    assert not list(run.rglob(".*.tmp"))


def refused(run, fault, value=""):
    """The error line of a run with this fault."""
    code, _, err = faulty(run, fault, value)
    return the_line(code, err)


def the_line(code, err):
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


def wait_for(sign, fault):
    while not sign.exists():
        assert fault.process.is_alive(), fault.end()
        time.sleep(0.02)


def test_kills_at_random_moments(tmp_path):
    ended, lost = kill_runs(tmp_path, 3)
    assert ended >= 1 and lost == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_save_the_step_and_exit_130_or_143(whole, tmp_path, number):
    run, sign = tmp_path / "run", tmp_path / "sign"
    fault = start(run, "slow", sign)
    wait_for(sign, fault)
    os.kill(fault.process.pid, number)
    code, _, err = fault.end()
    assert code == 128 + number, err
    content = checkpointing.read_checkpoint(RunFolder(run).find("last"))
    assert content["epoch"] == 1 and 0 < content["within"]["seen"] < 7
    assert_it_continues(run, whole)


@pytest.fixture
def _interruptible():
    """Python's own handler of SIGINT, which a process that a shell runs in the background does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
def test_the_second_ctrl_c_stops_at_once():
    with pytest.raises(KeyboardInterrupt), faults.deferred_interrupt() as requested:
        signal.raise_signal(signal.SIGINT)
        assert requested()
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)  # the previous handler is active again


def test_a_signal_that_is_ignored_or_ends_the_process_is_left_alone():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as under nohup
    try:
        with faults.deferred_interrupt() as requested:
            signal.raise_signal(signal.SIGINT)
            assert not requested() and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_the_main_thread_ctrl_c_is_left_alone():
    seen = []

    def look():
        with faults.deferred_interrupt() as requested:
            seen.append((requested(), signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [(False, signal.getsignal(signal.SIGINT))]


def test_a_full_disk(whole, tmp_path):
    run = tmp_path / "run"
    size = RunFolder(whole).find("previous").stat().st_size
    line = refused(run, "full disk", size - 1)  # it cannot write epoch 3, or an earlier one
    assert "cannot read or write" in line and "File too large" in line
    assert "last.pt is kept; continue with --resume" in line
    for file in run.rglob("*.pt"):
        checkpointing.read_checkpoint(file)
    assert not list(run.rglob(".*.tmp"))
    assert_it_continues(run, whole)


def test_a_disk_that_is_full_from_the_start(tmp_path):
    assert "nothing was saved" in refused(tmp_path / "run", "full disk", 9000)


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions")
def test_a_read_only_folder(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    command = [sys.executable, "-m", "tests.support.faulty_run", str(run), "none"]
    if os.geteuid() == 0:  # root may write anyway, unless that capability is taken away
        if shutil.which("setpriv") is None:
            pytest.skip("root, and no setpriv")
        command = ["setpriv", "--bounding-set=-dac_override", *command]
    run.chmod(0o555)
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=TIME_LIMIT_S
        )
    finally:
        run.chmod(0o755)
    line = the_line(done.returncode, done.stderr)
    assert f"checkpoint_dir: cannot write to {run}: Permission denied" in line
    assert not any(run.iterdir())


def test_a_truncated_checkpoint_warns_and_the_previous_epoch_is_used(whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    last = run / "checkpoints" / "last.pt"
    last.write_bytes(last.read_bytes()[:2000])
    code, _, err = faulty(run, "none")
    assert code == 0, err
    assert "last.pt: cannot be read as a checkpoint" in err
    assert "resuming from" in err and "previous.pt, epoch 3" in err
    assert_same_run(run, whole)
    (run / "checkpoints" / "previous.pt").write_bytes(b"")
    last.write_bytes(b"")
    best = (run / "checkpoints" / "best.pt").read_bytes()
    code, _, err = faulty(run, "none")
    assert code == 0 and "previous.pt: cannot be read" in err and "best.pt, epoch" in err
    assert_same_run(run, whole)
    for name in ("last", "previous"):
        (run / "checkpoints" / f"{name}.pt").unlink()
    (run / "checkpoints" / "best.pt").write_bytes(best[:900])
    err = refused(run, "none")
    assert (
        "there is no last.pt; there is no previous.pt; " in err and "best.pt: cannot be read" in err
    )
    assert "--overwrite" in err


@pytest.mark.parametrize("kept", ["previous", "best", "epoch_002"])
def test_a_run_without_its_last_checkpoint_never_starts_again_over_the_others(
    whole, tmp_path, kept
):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for path in (run / "checkpoints").iterdir():
        if path.stem != kept:
            path.unlink()
    if kept == "epoch_002":
        (run / "checkpoints" / "epoch_002.pt").write_bytes(b"kept")
        err = refused(run, "none")
        assert "there are: epoch_002.pt, history.json" in err and "--resume FILE" in err
        assert (run / "checkpoints" / "epoch_002.pt").read_bytes() == b"kept"
        return
    code, _, err = faulty(run, "none")
    assert code == 0 and "there is no last.pt" in err and f"{kept}.pt, epoch" in err
    assert_same_run(run, whole)


def test_previous_without_hard_links(monkeypatch, tmp_path):
    def no_link(*_):
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", no_link)
    trainer = tiny_trainer(tmp_path, epochs=2)
    trainer.train()
    assert checkpointing.read_checkpoint(trainer.folder.find("previous"))["epoch"] == 1


def test_two_runs_in_one_folder(whole, tmp_path):
    run, sign = tmp_path / "run", tmp_path / "sign"
    first = start(run, "slow", sign)
    wait_for(sign, first)
    line = refused(run, "none")
    assert f"checkpoint_dir: another run is writing to {run}" in line
    sign.with_suffix(".go").touch()
    code, _, err = first.end()
    assert code == 0, err
    assert_same_run(run, whole)


def test_a_run_set_up_before_another_one_ended_overwrites_nothing(tmp_path):
    run = tmp_path / "run"
    early = tiny_trainer(run, epochs=2)
    tiny_trainer(run, epochs=1).train()
    for stale in (early, tiny_trainer(run, epochs=2, resume="auto")):
        if stale is not early:  # it read epoch 1; another run continues to 2
            tiny_trainer(run, epochs=2, resume="auto").train()
        before = (run / "checkpoints" / "last.pt").read_bytes()
        with pytest.raises(TrainingError, match="another run wrote to .* since this one was set"):
            stale.train()
        assert (run / "checkpoints" / "last.pt").read_bytes() == before
    fresh = tiny_trainer(run, epochs=3, resume="auto")
    fresh.train()
    assert len(fresh.train()) == 4  # its own writes are not those of another run


def test_nan_keeps_the_previous_epoch(whole, tmp_path):
    run = tmp_path / "run"
    line = refused(run, "nan")
    assert "loss is not finite" in line and "epoch 2, step 1: s1/organ_" in line
    assert checkpointing.read_checkpoint(RunFolder(run).find("last"))["epoch"] == 1
    assert_it_continues(run, whole)


def test_out_of_memory_error_contains_the_estimate(whole, tmp_path):
    run = tmp_path / "run"
    line = refused(run, "no memory", 1)
    assert (
        "out of memory: weights, gradients, optimizer and the activations that adapted layers"
        in line
    )
    assert "MiB; a batch_size below 2" in line and "--halve_batch" in line
    assert_it_continues(run, whole)


def test_out_of_memory_halves_the_batch_with_halve_batch(tmp_path):
    code, out, err = faulty(tmp_path / "halved", "halve", 1)
    assert code == 0, err
    assert out.count("restarts in micro-batches of") == 2  # 4, 2, 1
    plain = tiny_trainer(tmp_path / "plain", batch_size=4, grad_accum=1)
    wanted = plain.train()
    history = json.loads((tmp_path / "halved" / "history.json").read_text())["epochs"]
    assert len(history) == len(wanted)
    for a, b in zip(history, wanted, strict=True):  # differs only in the dropout masks
        assert a["val"]["total"] == pytest.approx(b["val"]["total"], rel=0.1)


def test_what_counts_as_out_of_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert faults.is_out_of_memory(caught.value)
    assert faults.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not faults.is_out_of_memory(RuntimeError("shape mismatch"))
    model = torch.nn.Linear(2**9, 2**9, bias=False)
    assert "take 4.0 MiB, without activations" in faults.memory_text(model, 7)


def test_other_errors_are_left_alone(tmp_path):
    for error in (RuntimeError("shape mismatch"), TrainingError("mine"), ConfigError("mine")):
        with pytest.raises(type(error)) as caught, faults.explained(tmp_path, str):
            raise error
        assert caught.value is error


def test_a_dead_loader_process(whole, tmp_path):
    run = tmp_path / "run"
    line = refused(run, "dead worker")
    assert "a data loader process died" in line and "last.pt is kept" in line
    assert_it_continues(run, whole)


def test_a_clock_that_jumps(whole, tmp_path):
    code, _, err = faulty(tmp_path / "run", "clock", 1)
    assert code == 0, err
    assert_same_run(tmp_path / "run", whole)


def test_a_run_twice_and_under_two_numbers_of_threads(tmp_path):
    assert repeated_runs(tmp_path, (1, 2)) == []
