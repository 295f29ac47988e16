"""The state of a run: everything that its checkpoint contains."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from fastlora.errors import CheckpointError, FastLoRAWarning
from fastlora.files import check_tensors
from fastlora.medical.models.trainee import Trainee
from fastlora.medical.training import checkpointing, distributed
from fastlora.medical.training.checkpointing import score
from fastlora.medical.training.config import TrainConfig, is_resumable
from fastlora.medical.training.finetuned import trainable_parameters


class RunState:
    """Weights, optimizer, schedule, random generators, history and position of a run.

    model: with its trainable parameters set, on its device. steps_per_epoch: optimizer steps. facts: `base_sha256`, `samples` and
    `regions`, which a run and its continuation must share, and `sources`, of whose change a continuation warns.

    epoch: finished epochs. within: the progress of an interrupted epoch. best: the snapshot of the best epoch. rng: the
    generators' state from which training continues.
    """

    def __init__(
        self, config: TrainConfig, model: Trainee, steps_per_epoch: int, facts: Mapping[str, Any]
    ) -> None:
        self.config, self.model, self.facts = config, model, dict(facts)
        self.steps_per_epoch = steps_per_epoch
        parameters = trainable_parameters(model).values()
        self.optimizer = torch.optim.AdamW(
            parameters, lr=config.peak_lr, weight_decay=config.weight_decay
        )
        self.scheduler = LambdaLR(self.optimizer, self.lr_factor)
        self.scaler = torch.amp.GradScaler(
            next(iter(parameters)).device.type, enabled=config.amp == "fp16" or model.has_half
        )
        self.epoch = 0
        self.history: list[dict[str, Any]] = []
        self.seconds: list[float] = []
        self.best: dict[str, Any] | None = None
        self.within: dict[str, Any] | None = None
        self.rng = checkpointing.rng_state()

    def lr_factor(self, step: int) -> float:
        """The fraction of the peak rate at an optimizer step: a linear rise, then half a cosine down."""
        total = self.config.epochs * self.steps_per_epoch
        rise = math.ceil(self.config.warmup * total)
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rise) / max(1, total - rise))))

    @property
    def best_epoch(self) -> int | None:
        """The epoch of `best`; None before the first validation."""
        return None if self.best is None else int(self.best["epoch"])

    def finish_epoch(self, entry: dict[str, Any], seconds: float) -> bool:
        """Appends an epoch to the history; returns whether it is the best so far."""
        self.history.append(entry)
        self.rng = checkpointing.rng_state()
        self.seconds.append(round(seconds, 3))
        best = -math.inf if self.best is None else score(self.best["history"][-1]["val"])
        improved = score(entry["val"]) > best
        if improved:
            self.best = self.snapshot()
        return improved

    def saved_config(self) -> dict[str, Any]:
        """The configuration without the options that apply to one call only."""
        return replace(self.config, resume=None, overwrite=False).to_dict()

    def snapshot(self) -> dict[str, Any]:
        """A copy of the state, without `best`; every process must call this."""
        return {
            "format": checkpointing.FORMAT,
            "model": {
                name: distributed.full_tensor(p)
                for name, p in trainable_parameters(self.model).items()
            },
            "optimizer": distributed.full_optimizer_state(self.optimizer),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "history": copy.deepcopy(self.history),
            "seconds": list(self.seconds),
            "rng": self.rng,
            "config": self.saved_config(),
            "within": self.within,
            **self.facts,
        }

    def content(self) -> dict[str, Any]:
        """The content of a checkpoint: the snapshot, and the best one so far if that is another; every process must call this."""
        other = self.best is not None and (self.best["epoch"] != self.epoch or self.within)
        return {**self.snapshot(), "best": self.best if other else None}

    def load(self, path: str | Path) -> None:
        """Continues from a checkpoint of the same run.

        Raises: CheckpointError if it cannot be read, or is of another model, base, LoRA rank, dataset or configuration; the message
            contains names and shapes, and the state is unchanged.
        """
        content, where = checkpointing.read_checkpoint(path), str(path)
        best = content["best"] or content
        chosen_by = "dice" if self.config.options.makes_mesh else "total"
        for state in (content, best):
            check_tensors(state["model"], trainable_parameters(self.model), where)
            checkpointing.check_history(state["history"], state["seconds"], where, chosen_by)
        self._check_same_run(content, where)
        if content["sources"] not in (self.facts["sources"], []):  # [] in files of older versions
            text = f"{where}: the images or masks have changed since (names, sizes or times of their files); training goes on with those of now"
            warnings.warn(text, FastLoRAWarning, stacklevel=2)
        checkpointing.check_optimizer(content["optimizer"], self.optimizer, f"{where}: optimizer")
        for name in ("scheduler", "scaler"):
            wanted = getattr(self, name).state_dict()
            checkpointing.check_like(content[name], wanted, f"{where}: {name}")
        checkpointing.check_rng_state(content["rng"], f"{where}: rng")
        self.restore(content)
        self.history, self.seconds = list(content["history"]), list(content["seconds"])
        self.best = {key: value for key, value in best.items() if key != "best"}

    def restore(self, content: Mapping[str, Any]) -> None:
        """Restores weights, optimizer, schedule, generators and position of a snapshot of this run."""
        parameters = trainable_parameters(self.model)
        weights = {
            n: distributed.sharded_like(parameters[n], t) for n, t in content["model"].items()
        }
        self.model.load_state_dict(weights, strict=False)
        distributed.load_optimizer_state(self.optimizer, content["optimizer"])
        self.scheduler.load_state_dict(content["scheduler"])
        factor = self.lr_factor(self.scheduler.last_epoch)  # differs if `epochs` changed
        for group, rate in zip(self.optimizer.param_groups, self.scheduler.base_lrs, strict=True):
            group["lr"] = rate * factor
        self.scaler.load_state_dict(content["scaler"])
        self.epoch, self.within = content["epoch"], content["within"]
        self.rng = content["rng"]

    def _check_same_run(self, content: Mapping[str, Any], where: str) -> None:
        differences = {
            "base_sha256": "another base model (its weights differ)",
            "samples": f"{content['samples']} samples, the data now has {self.facts['samples']}",
            "regions": "different regions (subjects, structures or positions); the data or its manifest changed",
        }
        for name, words in differences.items():
            if content[name] not in (self.facts[name], []):  # [] in files of older versions
                raise CheckpointError(f"{where}: was trained on {words}")
        now = self.config.to_dict()
        for name, value in content["config"].items():
            unchanged = now.get(name) == value or (name == "channel" and not (now[name] or value))
            if not unchanged and not is_resumable(name):
                raise CheckpointError(
                    f"{where}: {name} was {value!r} in this run, got {now.get(name)!r}"
                )
