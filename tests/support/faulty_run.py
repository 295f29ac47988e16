"""A tiny training run with an injected fault, as a program: `python -m tests.support.faulty_run FOLDER FAULT [VALUE]`.

Its output is that of a normal run, and its exit codes are those of `scripts/train_medical.py`: 0, 2 with one line on stderr, 130 after Ctrl-C.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from fastlora.medical.console import run_command, show_log
from fastlora.medical.models.decoder import SparseMeshDecoder
from tests.support.tiny_run import TinyRegions, tiny_trainer


class DyingRegions(TinyRegions):
    """Kills the process that loads the fourth region of the second epoch."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self.epoch == 2 and index == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


class NaNRegions(TinyRegions):
    """Returns NaN features in the second epoch."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = super().__getitem__(index)
        return {**sample, "feats": sample["feats"] * float("nan") if self.epoch == 2 else sample["feats"]}  # fmt: skip


def no_memory_above(model: SparseMeshDecoder, regions: int) -> None:
    """Make training forward passes of more than `regions` regions allocate an exbibyte, which fails."""
    forward = model.forward

    def limited(tokens: Any, base_vox: torch.Tensor) -> torch.Tensor:
        if len(base_vox) > regions and torch.is_grad_enabled():
            torch.empty(2**60, dtype=torch.uint8)
        return forward(tokens, base_vox)

    model.forward = limited  # type: ignore[method-assign]


def jump(step: int) -> None:
    """Make the wall clock jump back a day or forward a year at every reading."""
    real, readings = time.time, [0]

    def jumping() -> float:
        readings[0] += 1
        return real() + (-86_400 if readings[0] % 2 else 31_536_000) * step

    time.time = jumping


def main(folder: str, fault: str, value: str = "") -> int:
    """Train in `folder` under the fault and return the exit code."""
    show_log()
    options: dict[str, Any] = {"resume": "auto"}
    if fault == "dead worker":
        options["num_workers"] = 1
    elif fault == "halve":
        options |= {"halve_batch": True, "batch_size": 4, "grad_accum": 1}

    def work() -> int:
        trainer = tiny_trainer(folder, **options)
        if fault == "full disk":
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(value), int(value)))
        elif fault == "dead worker":
            trainer.train_data = DyingRegions(7, 0)
        elif fault == "nan":
            trainer.train_data = NaNRegions(7, 0)
        elif fault in ("no memory", "halve"):
            no_memory_above(trainer.model, int(value))
        elif fault == "clock":
            jump(int(value))
        elif fault == "slow":
            step, sign = trainer._step, Path(value)

            def wait(batch: Any) -> float:
                """In the second epoch: create the file `value`, and wait for Ctrl-C or for the file `value`.go."""
                if trainer.epoch == 1:
                    sign.touch()
                    while not (sign.with_suffix(".go").exists() or trainer.interrupted()):
                        time.sleep(0.02)
                return step(batch)

            trainer._step = wait  # type: ignore[method-assign]
        trainer.train()
        return 0

    return run_command(work)


def inject(folder: str, run: str, fault: str, value: str) -> None:
    """Call `main` with its output in the files `out` and `err` of a folder; the target of a process."""
    for number, name in ((1, "out"), (2, "err")):
        with open(Path(folder, name), "wb") as file:
            os.dup2(file.fileno(), number)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    warnings.simplefilter("default")
    torch.set_num_threads(1)
    sys.exit(main(run, fault, value))


if __name__ == "__main__":
    warnings.simplefilter("default")
    sys.exit(main(*sys.argv[1:]))
