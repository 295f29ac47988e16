"""Fine-tuning on region samples: LoRA or all weights, resumable bit for bit on a CPU.

An epoch depends only on the checkpoint before it: the order of the regions and their augmentation are pure functions of
(seed, epoch), and dropout follows torch's generator, whose state the checkpoint holds. With several processes
(`distributed.py`) each computes its share; all hold the same values, and the first one writes.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlora import count_parameters, save_adapter
from fastlora.errors import ConfigError, DataError, TrainingError
from fastlora.medical.data.batch import RegionBatch
from fastlora.medical.models.trainee import Trainee
from fastlora.medical.training import checkpointing, distributed, faults
from fastlora.medical.training.adapter_run import adapter_metadata
from fastlora.medical.training.config import TrainConfig
from fastlora.medical.training.data import (
    RegionData,
    epoch_order,
    load_train_data,
    micro_batches,
    region_names,
)
from fastlora.medical.training.distributed import Processes
from fastlora.medical.training.finetuned import (
    load_base,
    make_trainable,
    trainable_parameters,
    without_values,
)
from fastlora.medical.training.progress import RunReport
from fastlora.medical.training.run_folder import RunFolder
from fastlora.medical.training.state import RunState


class MedicalTrainer:
    """Trains a model and writes the run folder `config.checkpoint_dir`.

    The constructor checks everything (values, data, model, the checkpoint to resume from) and writes nothing there.

    model: the base to fine-tune, in place; default `load_base(config)`.
    train_data, val_data: both or neither; default: the data of `config`. `val_data` selects the best epoch, so results on it are biased.

    Raises: FastLoRAError (ConfigError, DataError or CheckpointError), naming the problem.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: Trainee | None = None,
        train_data: RegionData | None = None,
        val_data: RegionData | None = None,
    ) -> None:
        self.config = config
        self.processes = Processes.current()
        if config.halve_batch and self.processes.world > 1:
            raise ConfigError(
                f"halve_batch: expected one process, got {self.processes.world}: the others would wait for the one that restarts "
                "its epoch"
            )
        self.device = distributed.local_device(distributed.resolve_device(config))
        self.folder = RunFolder(config.checkpoint_dir)
        resume = self.folder.resume_from(config.resume)
        self.folder.check_free(resume, config.resume == "auto", config.overwrite)
        if config.threads:
            torch.set_num_threads(config.threads)
        if train_data is None or val_data is None:
            train_data, val_data = self.processes.first_alone(lambda: load_train_data(config))
        for name, data in (("train_data", train_data), ("val_data", val_data)):
            if len(data) == 0:
                raise DataError(f"{name}: expected at least one region, got none")
        self.train_data, self.val_data = train_data, val_data

        checkpointing.seed_everything(config.seed)
        self.model = load_base(config) if model is None else model
        base_sha256 = checkpointing.model_sha256(self.model.base)
        make_trainable(self.model, config)
        self.counts = count_parameters(self.model)
        self._adapted = without_values(self.model)
        self.model.to(self.device)
        self._call = distributed.parallelize(self.model, config.parallel, self.device)
        steps = math.ceil(math.ceil(len(train_data) / config.batch_size) / config.grad_accum)
        regions = [data.identity() for data in (train_data, val_data) if hasattr(data, "identity")]
        sources = [data.sources() for data in (train_data, val_data) if hasattr(data, "sources")]
        facts = {"base_sha256": base_sha256, "samples": len(train_data)}
        facts |= {"regions": regions, "sources": sources}
        self.state = RunState(config, self.model, steps, facts)
        self.interrupted: Callable[[], bool] = lambda: False
        self.micro_batch = config.batch_size  # smaller after memory ran out with `halve_batch`
        self.tokens = 0  # of the largest batch so far
        if resume is not None:
            self.load_checkpoint(resume)
        self.processes.check_same(
            {
                **self.state.saved_config(),
                "epoch": self.state.epoch,
                "base model": base_sha256,
                "training samples": len(train_data),
                "validation samples": len(val_data),
            }
        )

    @property
    def epoch(self) -> int:
        """The number of finished epochs."""
        return self.state.epoch

    @property
    def history(self) -> list[dict[str, Any]]:
        """One entry for each epoch, 0 (untrained) first."""
        return self.state.history

    def train(self) -> list[dict[str, Any]]:
        """Trains to the last epoch or until early stopping; returns the history.

        The run folder is complete after every epoch, so a run killed at any moment loses only the current epoch: a new trainer with
        `resume="auto"` continues from there. After Ctrl-C it continues from the interrupted step.

        Raises: TrainingError if a loss or a gradient is not finite (the message names the regions), memory or disk is full, a
            data loader process died, or another run uses the folder. The folder keeps the last finished epoch.
            KeyboardInterrupt after Ctrl-C, when the step is finished and saved; after a second Ctrl-C at once.
        """
        last = self.folder.checkpoint("last")
        order = checkpointing.fixed_order_of_sums(self.device)
        with (
            faults.explained(last, self._memory),
            faults.deferred_interrupt() as self.interrupted,
            order,
        ):
            try:
                return self._train()
            finally:
                self.folder.close()

    def _train(self) -> list[dict[str, Any]]:
        state, first = self.state, self.processes.first
        if first:
            self.folder.open(state.saved_config(), self.config.overwrite)
        checkpointing.set_rng_state(state.rng)
        with closing(RunReport(state, self.folder.board, first)) as report:
            if state.history:
                self._write(best_changed=True)
            else:
                self._finish_epoch({"epoch": 0}, time.perf_counter(), report)
            while state.epoch < self.config.epochs and not self._stalled():
                start = time.perf_counter()
                entry = self._epoch_that_fits(report)
                state.epoch += 1
                self._finish_epoch({"epoch": state.epoch, **entry}, start, report)
        return state.history

    def _epoch_that_fits(self, report: RunReport) -> dict[str, Any]:
        """`_train_epoch`; if memory runs out with `halve_batch`, restarted with smaller micro-batches.

        A step still averages over `batch_size` times `grad_accum` regions.
        """
        while True:
            start = self.state.snapshot() if self.config.halve_batch else None
            try:
                return self._train_epoch(report)
            except (RuntimeError, MemoryError) as error:
                if start is None or self.micro_batch == 1 or not faults.is_out_of_memory(error):
                    raise
            size = self.config.batch_size
            self.micro_batch = max(n for n in range(1, self.micro_batch // 2 + 1) if size % n == 0)
            self.state.optimizer.zero_grad()
            self.state.restore(start)
            checkpointing.set_rng_state(self.state.rng)
            report.restart_epoch(self.micro_batch)

    def _memory(self) -> str:
        alone = ", and --halve_batch does that automatically" if self.processes.world == 1 else ""
        return (
            f"{faults.memory_text(self.model, self.tokens)}; a batch_size below {self.micro_batch} with a larger "
            f"grad_accum gives the same training{alone}"
        )

    def _train_epoch(self, report: RunReport) -> dict[str, Any]:
        """One pass over the training regions: mean loss terms over regions, mean gradient norm over steps."""
        config, state, total = self.config, self.state, len(self.train_data)
        epoch = state.epoch + 1
        self.model.train()
        self.train_data.set_epoch(epoch)
        self.processes.seed_dropout(config.seed, epoch)
        order = epoch_order(config.seed, epoch, total)
        group = config.batch_size * config.grad_accum
        within = state.within or {}  # of an epoch that Ctrl-C interrupted
        state.within = None
        seen, norms = within.get("seen", 0), list(within.get("norms", ()))
        rate = within.get("lr", state.optimizer.param_groups[0]["lr"])  # of the epoch's first step
        sums = defaultdict(float, within.get("sums", {}) if self.processes.first else {})
        rest = micro_batches(
            self.train_data, order[seen:], self.micro_batch, self.processes, config.num_workers
        )
        for batch, count, of_all in rest:
            last = (seen + of_all) % group == 0 or seen + of_all == total
            distributed.sync_gradients(self._call, last)
            _, losses = self._forward(batch, f"epoch {epoch}, step {len(norms) + 1}")
            # A step's loss is the mean over all its regions, whatever the sizes of its micro-batches and shares.
            in_step = min(group, total - seen // group * group)
            step_loss = losses["total"] * (count * self.processes.world / in_step)
            state.scaler.scale(step_loss).backward()
            for name, value in losses.items():
                sums[name] += value.item() * count
            seen += of_all
            if last:
                norms.append(self._step(batch))
                report.step(losses["total"].item())
                if self.interrupted():
                    state.within = {"seen": seen, "lr": rate, "sums": dict(sums), "norms": norms}
                    state.rng = checkpointing.rng_state()
                    self._write(best_changed=False)
                    raise KeyboardInterrupt
        finite = [norm for norm in norms if math.isfinite(norm)]
        return {
            "lr": rate,
            "grad_norm": sum(finite) / max(1, len(finite)),
            "train": {name: value / total for name, value in self.processes.sum(sums).items()},
        }

    def _step(self, batch: RegionBatch) -> float:
        """Clips, steps optimizer and schedule, clears the gradients; returns their norm before clipping.

        When the scaler of a 16-bit run skips a step, the schedule does not advance.
        """
        state = self.state
        state.scaler.unscale_(state.optimizer)
        limit = self.config.clip_norm or math.inf
        weights = trainable_parameters(self.model).values()
        norm = distributed.full_tensor(nn.utils.clip_grad_norm_(weights, limit)).item()
        if not math.isfinite(norm) and not state.scaler.is_enabled():
            raise TrainingError(
                f"gradient is not finite in epoch {state.epoch + 1}: {region_names(batch)}"
            )
        state.scaler.step(state.optimizer)
        scale = state.scaler.get_scale()
        state.scaler.update()
        state.optimizer.zero_grad()
        if state.scaler.get_scale() >= scale:
            state.scheduler.step()
        return norm

    def _forward(self, batch: RegionBatch, where: str) -> tuple[Any, dict[str, Tensor]]:
        """The model's output and loss terms. Raises: TrainingError, naming the batch, if one is not finite."""
        self.tokens = max(self.tokens, len(batch.tokens.feats))
        batch = batch.to(self.device)
        kind = torch.float16 if self.config.amp == "fp16" else torch.bfloat16
        with torch.autocast(self.device.type, dtype=kind, enabled=self.config.amp != "off"):
            output = self._call(*self.model.inputs(batch))
        losses = self.model.losses(output, batch, self.config.loss_weights)
        invalid = [name for name, value in losses.items() if not bool(torch.isfinite(value))]
        if invalid:
            raise TrainingError(
                f"loss is not finite ({', '.join(invalid)}) in {where}: {region_names(batch)}"
            )
        return output, losses

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean loss terms over the validation regions and, if the model makes a mesh, their mean Dice (distance < 0)."""
        self.model.eval()
        sums: defaultdict[str, float] = defaultdict(float)
        size, total = self.micro_batch, len(self.val_data)
        batches = micro_batches(
            self.val_data, range(total), size, self.processes, self.config.num_workers
        )
        for batch, count, _ in batches:
            output, losses = self._forward(batch, f"validation after epoch {self.epoch}")
            if self.config.options.makes_mesh:
                predicted = self.model.distances(output).cpu()
                losses["dice"] = inside_dice(predicted, batch.sdf_vox).mean()
            for name, value in losses.items():
                sums[name] += value.item() * count
        return {name: value / total for name, value in self.processes.sum(sums).items()}

    def _stalled(self) -> bool:
        """Whether the validation has not improved for `early_stopping` epochs."""
        since = self.state.epoch - (self.state.best_epoch or 0)
        return 0 < self.config.early_stopping <= since

    def _finish_epoch(self, entry: dict[str, Any], start: float, report: RunReport) -> None:
        """Validates, then writes and reports the epoch (the first process does). start: on `time.perf_counter`."""
        entry["val"] = self.validate()
        improved = self.state.finish_epoch(entry, time.perf_counter() - start)
        self._write(improved)
        every, epoch = self.config.save_every, self.state.epoch
        if every and epoch and epoch % every == 0:
            self.save_checkpoint(self.folder.checkpoint(f"epoch_{epoch:03d}"))
        report.epoch(entry, improved)

    def _write(self, best_changed: bool) -> None:
        """Writes `last` and history.json, and if `best` changed, `best` and its adapter file."""
        content = self.state.content()
        if not self.processes.first:
            return
        best = self.state.best if best_changed else None
        history = {
            "epochs": self.state.history,
            "seconds": self.state.seconds,
            "best_epoch": self.state.best_epoch,
            "counts": self.counts,
        }
        self.folder.write(content, best and {**best, "best": None}, history)
        if best is not None and self.config.finetune == "lora":
            self._adapted.load_state_dict(best["model"], strict=False, assign=True)
            about = adapter_metadata(best, self.counts)
            save_adapter(self._adapted.exported, self.folder.adapter, metadata=about)

    def save_checkpoint(self, path: str | Path) -> None:
        """Saves the run's state atomically: only trainable weights, and all that resuming needs.

        It includes the best state so far, so one file continues a run anywhere. Every process must call this; the first writes.
        """
        content = self.state.content()
        if self.processes.first:
            checkpointing.write_checkpoint(Path(path), content)

    def load_checkpoint(self, path: str | Path) -> None:
        """Continues from a checkpoint of the same run. Raises: as `RunState.load`."""
        self.state.load(path)


def inside_dice(pred_vox: Tensor, true_vox: Tensor) -> Tensor:
    """Dice (B,) of the voxels with a negative distance in two fields (B, X, Y, Z); 1 if both have none."""
    pred, true = (pred_vox < 0).flatten(1), (true_vox < 0).flatten(1)
    both, either = (pred & true).sum(1), pred.sum(1) + true.sum(1)
    return torch.where(either > 0, 2 * both / either.clamp(min=1), 1.0)
