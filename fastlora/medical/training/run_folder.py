"""The folder of one training run: the paths of its files, its lock, and the writing of an epoch.

config.yaml  history.json  tb/  adapter.safetensors (LoRA only)  checkpoints/{last,previous,best,epoch_NNN}.pt  .lock
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from fastlora.errors import CheckpointError, ConfigError, FastLoRAWarning, TrainingError
from fastlora.files import (
    LEFTOVERS,
    atomic_write,
    move_into_place,
    read_json,
    temporary_name,
    write_json,
)
from fastlora.medical.training.checkpointing import check_history, read_checkpoint, write_checkpoint
from fastlora.medical.training.config import read_yaml

LOCK = ".lock"
MARK = b"fastlora-medical run"
"""The content of the lock, by which a run's folder is recognised."""

_CHECKPOINT = re.compile(r"(last|previous|best|epoch_\d+)\.pt")
_HELD: set[Path] = set()
"""The folders that this process has locked."""


class RunFolder:
    """A run's folder; `open` creates it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.history = self.path / "history.json"
        self.board = self.path / "tb"
        self.adapter = self.path / "adapter.safetensors"
        self.checkpoints = self.path / "checkpoints"
        self._lock: BinaryIO | None = None
        self._epoch: int | None = None  # of the `last` written by this object
        self._last = self._state_of_last()  # as found or written by this object

    @classmethod
    def of(cls, file: Path) -> RunFolder | None:
        """The run folder that a checkpoint or an adapter file lies in; None for a file elsewhere."""
        file = file.absolute()
        in_run = file.name == "adapter.safetensors" or file.parent.name == "checkpoints"
        run = cls(file.parent if file.name == "adapter.safetensors" else file.parent.parent)
        return run if in_run and run.config.is_file() and run._is_run() else None

    def checkpoint(self, which: str) -> Path:
        """The file of `last`, `previous` (the epoch before it), `best` or `epoch_NNN`."""
        return self.checkpoints / f"{which}.pt"

    def find(self, which: str) -> Path:
        """The file of a checkpoint that exists. Raises: CheckpointError, naming the existing ones."""
        path = self.checkpoint(which)
        if not self.checkpoints.is_dir():
            kept = f"; name its {self.adapter.name} instead" if self.adapter.is_file() else ""
            raise CheckpointError(
                f"{self.path}: expected a run folder, got one without checkpoints/{kept}"
            )
        if not path.is_file():
            there = ", ".join(sorted(file.stem for file in self.checkpoints.glob("*.pt"))) or "none"
            raise CheckpointError(f"{self.path}: no checkpoint {which!r}; there are: {there}")
        return path

    def read_history(self) -> dict[str, Any]:
        """The content of history.json of a mesh model: `epochs` (an entry each), `seconds`, `best_epoch` and `counts` of parameters.

        Raises: CheckpointError if it is not such a file.
        """
        try:
            history = read_json(self.history)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.history}: not a history file: {error}") from error
        kinds = {"epochs": list, "seconds": list, "counts": dict}
        missing = kinds.keys() - (history.keys() if isinstance(history, dict) else set())
        if missing:
            raise CheckpointError(f"{self.history}: lacks {', '.join(sorted(missing))}")
        for name, kind in kinds.items():
            if not isinstance(history[name], kind) or not history[name]:
                raise CheckpointError(
                    f"{self.history}: {name}: expected a non-empty {kind.__name__}"
                )
        counts = history["counts"]
        if not all(type(counts.get(name)) is int for name in ("total", "trainable", "lora")):
            raise CheckpointError(f"{self.history}: counts: expected total, trainable and lora")
        check_history(history["epochs"], history["seconds"], str(self.history), "dice")
        return dict(history)

    def resume_from(self, resume: str | None) -> Path | None:
        """The checkpoint that `--resume` names: a file, the latest of a run folder, or with 'auto' that of this run, if it has one.

        The latest is `last`; if that is missing or damaged `previous`, then `best`, with a warning.
        Raises: CheckpointError if none of them can be read, but something of a run is there.
        """
        if resume is None:
            return None
        folder = self if resume == "auto" else RunFolder(resume)
        if resume != "auto" and not folder.path.is_dir():
            return folder.path
        problems: list[str] = []
        for which in ("last", "previous", "best"):
            path = folder.checkpoint(which)
            if not path.is_file():
                problems.append(f"there is no {which}.pt")
                continue
            try:
                epoch = read_checkpoint(path)["epoch"]
            except CheckpointError as error:
                problems.append(str(error))
                continue
            if problems:
                text = f"{'; '.join(problems)}; resuming from {path}, epoch {epoch}"
                warnings.warn(text, FastLoRAWarning, stacklevel=2)
            return path
        left = [*folder.checkpoints.glob("*.pt"), *filter(Path.is_file, [folder.history])]
        if resume == "auto" and not left:
            return None
        there = ", ".join(sorted(path.name for path in left)) or "none"
        raise CheckpointError(
            f"{folder.path}: no checkpoint to continue from ({'; '.join(problems)}); there are: {there}; name one with --resume FILE, "
            + (
                "or start again with --overwrite"
                if folder._is_run()
                else "or choose another folder"
            )
        )

    def check_free(self, resume: Path | None, auto: bool, overwrite: bool) -> None:
        """Refuses to mix two runs, or a run and files of others.

        Raises: ConfigError if the folder is not empty, and the run neither continues nor may overwrite it, or if a file that the
            run would write is there and not of a run.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"checkpoint_dir: expected a folder, got the file {self.path}")
        continued = resume is not None and resume.resolve().parent == self.checkpoints.resolve()
        if self.path.is_dir() and any(self.path.iterdir()) and not (continued or auto or overwrite):
            raise ConfigError(
                f"checkpoint_dir: {self.path} is not empty; continue its run with --resume, replace it with "
                "--overwrite, or choose another folder"
            )
        foreign = [path for path in self._own_paths() if path.exists()]
        if foreign and not continued and not self._is_run():
            raise ConfigError(
                f"checkpoint_dir: {foreign[0]} exists and is not of a training run; choose another folder"
            )

    def _own_paths(self) -> tuple[Path, ...]:
        """What a run writes in its folder, apart from the lock."""
        return (self.config, self.history, self.adapter, self.board, self.checkpoints)

    def _is_run(self) -> bool:
        """Whether the folder was written by a run: its lock says so, or config.yaml has a run's options."""
        if self.path.resolve() in _HELD:  # closing the lock's file would release the lock
            return True
        try:
            if (self.path / LOCK).read_bytes().startswith(MARK):
                return True
            config = read_yaml(self.config)
        except (OSError, ConfigError):
            return False
        return {"checkpoint_dir", "finetune", "lora_rank"} <= config.keys()

    def _remove_run(self) -> None:
        """Removes the files of a run, and nothing else; folders that are then empty."""
        epochs = [p for p in self.checkpoints.glob("*.pt") if _CHECKPOINT.fullmatch(p.name)]
        events = self.board.glob("events.out.tfevents.*")
        for file in (self.config, self.history, self.adapter, *epochs, *events):
            file.unlink(missing_ok=True)
        for folder in (self.board, self.checkpoints):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def _remove_leftovers(self) -> None:
        """Removes the temporary files of a run that was killed while writing."""
        names = {path.name for path in self._own_paths()}
        for folder in (self.path, self.checkpoints):
            for leftover in folder.glob(LEFTOVERS):
                written = leftover.name[1:].rsplit(".", 3)[0]  # see `temporary_name`
                if leftover.is_file() and (written in names or _CHECKPOINT.fullmatch(written)):
                    leftover.unlink()

    def open(self, config: Mapping[str, Any], overwrite: bool) -> None:
        """Creates and locks the folder, removes the files of a run to be overwritten, and writes config.yaml.

        The lock lasts until `close`. Raises: ConfigError if the folder cannot be written. TrainingError if another process holds the
        lock, or wrote to the folder since this object was created: its work would be lost.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self.path / LOCK)
            if not overwrite and self._state_of_last() != self._last:
                self.close()
                raise TrainingError(
                    f"checkpoint_dir: another run wrote to {self.path} since this one was set up; restart this one to continue from there"
                )
            if overwrite:
                self._remove_run()
            self.checkpoints.mkdir(exist_ok=True)
        except OSError as error:
            self.close()
            raise ConfigError(
                f"checkpoint_dir: cannot write to {self.path}: {error.strerror or error}"
            ) from error
        self._remove_leftovers()
        text = yaml.safe_dump(dict(config), sort_keys=False)
        atomic_write(self.config, text.encode())

    def _state_of_last(self) -> tuple[int, int, int] | None:
        """Identifies the file `last`, new whenever it is written; None without it."""
        try:
            state = self.checkpoint("last").stat()
        except OSError:
            return None
        return state.st_ino, state.st_mtime_ns, state.st_size

    def close(self) -> None:
        """Releases the lock."""
        if self._lock is not None:
            _HELD.discard(self.path.resolve())
            self._lock.close()
            self._lock = None

    def write(
        self, last: Mapping[str, Any], best: Mapping[str, Any] | None, history: object
    ) -> None:
        """Writes `last` first, then the files that follow from it: `best` (if given) and history.json.

        The old `last` becomes `previous` if it is of another epoch.
        """
        if self._epoch not in (None, last["epoch"]):
            _keep(self.checkpoint("last"), self.checkpoint("previous"))
        self._epoch = last["epoch"]
        write_checkpoint(self.checkpoint("last"), last)
        self._last = self._state_of_last()
        if best is not None:
            write_checkpoint(self.checkpoint("best"), best)
        write_json(self.history, history)


def _locked(path: Path) -> BinaryIO:
    """Opens, locks and marks a file, until it is closed or the process ends."""
    busy = f"checkpoint_dir: another run is writing to {path.parent}; wait for it or choose another folder"
    folder = path.parent.resolve()
    if (
        folder in _HELD
    ):  # the lock is the process's, which loses it when any file object of it is closed
        raise TrainingError(busy)
    file = path.open("a+b")
    if os.name == "posix":
        import fcntl

        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.close()
                raise TrainingError(busy) from None
            warnings.warn(
                f"{path}: this file system does not support locks ({error}); do not start a second run in this folder",
                FastLoRAWarning,
                stacklevel=3,
            )
    _HELD.add(folder)
    if not file.tell():
        file.write(MARK)
        file.flush()
    return file


def _keep(last: Path, previous: Path) -> None:
    """Keeps `last` as `previous`, before a new one replaces it."""
    second = temporary_name(previous)
    try:
        try:
            os.link(last, second)
        except OSError:  # a file system without hard links
            shutil.copyfile(last, second)
        move_into_place({second: previous})
    finally:
        second.unlink(missing_ok=True)
