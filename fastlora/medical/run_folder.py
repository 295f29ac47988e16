"""The folder of one training run: where its files lie, who may write there, what is written after an epoch.

config.yaml  history.json  tb/  adapter.safetensors (LoRA only)  checkpoints/{last,best,epoch_NNN}.pt
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fastlora.errors import CheckpointError, ConfigError
from fastlora.medical.checkpointing import atomic_write, write_checkpoint, write_json


class RunFolder:
    """A run's folder; nothing is created before `open`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.history = self.path / "history.json"
        self.board = self.path / "tb"
        self.adapter = self.path / "adapter.safetensors"
        self.checkpoints = self.path / "checkpoints"

    @staticmethod
    def split(path: str | Path) -> tuple[Path, str]:
        """A run folder and which checkpoint: `best`, unless the path is `<run>/checkpoints/<which>.pt`."""
        path = Path(path)
        if path.is_file() and path.parent.name == "checkpoints":
            return path.parent.parent, path.stem
        return path, "best"

    def checkpoint(self, which: str) -> Path:
        """The file of `last`, `best` or `epoch_NNN`."""
        return self.checkpoints / f"{which}.pt"

    def find(self, which: str) -> Path:
        """The same, which must exist. Raises CheckpointError, naming the checkpoints that do."""
        path = self.checkpoint(which)
        if not path.is_file():
            there = ", ".join(sorted(file.stem for file in self.checkpoints.glob("*.pt"))) or "none"
            raise CheckpointError(f"{self.path}: no checkpoint {which!r}; there are: {there}")
        return path

    def resume_from(self, resume: str | None) -> Path | None:
        """The checkpoint that `--resume` means: a file, a run folder's `last`, or with 'auto' this run's `last` if any."""
        if resume is None:
            return None
        if resume == "auto":
            return self.checkpoint("last") if self.checkpoint("last").is_file() else None
        path = Path(resume)
        return RunFolder(path).find("last") if path.is_dir() else path

    def check_free(self, resume: Path | None, auto: bool, overwrite: bool) -> None:
        """Refuses to mix two runs.

        Raises:
            ConfigError: the folder holds something, and the run neither continues it nor may overwrite it.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"checkpoint_dir: expected a folder, got the file {self.path}")
        continued = auto or (
            resume is not None and resume.resolve().parent == self.checkpoints.resolve()
        )
        if self.path.is_dir() and any(self.path.iterdir()) and not (continued or overwrite):
            raise ConfigError(
                f"checkpoint_dir: {self.path} is not empty; continue its run with --resume, replace it with "
                "--overwrite, or choose another folder"
            )

    def open(self, config: Mapping[str, Any], overwrite: bool) -> None:
        """Creates the folder, without the files of a run that is to be overwritten, and writes config.yaml."""
        if overwrite:
            for file in (self.config, self.history, self.adapter):
                file.unlink(missing_ok=True)
            for folder in (self.board, self.checkpoints):
                shutil.rmtree(folder, ignore_errors=not folder.exists())
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"checkpoint_dir: cannot create {self.checkpoints}: {error.strerror}"
            ) from error
        for pattern in (".*.tmp", ".*.partial"):  # of a run killed while it wrote
            for leftover in self.path.rglob(pattern):
                leftover.unlink()
        text = yaml.safe_dump(dict(config), sort_keys=False)
        atomic_write(self.config, lambda file: file.write(text.encode()))

    def write(
        self, last: Mapping[str, Any], best: Mapping[str, Any] | None, history: object
    ) -> None:
        """Writes `last` first, then what can be made again from it: `best` (if given) and history.json."""
        write_checkpoint(self.checkpoint("last"), last)
        if best is not None:
            write_checkpoint(self.checkpoint("best"), best)
        write_json(self.history, history)
