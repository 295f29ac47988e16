"""Fine-tuning of the mesh decoder on region samples: LoRA or all weights, resumable bit for bit on a CPU.

What one epoch computes depends only on the checkpoint before it: the order of the regions and their augmentation are
pure functions of (seed, epoch), and dropout follows torch's generator, whose state the checkpoint holds.
Under several processes (`distributed.py`) each computes its share; all hold the same figures, and the first one writes.
"""

from __future__ import annotations

import copy
import logging
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from fastlora import count_parameters, save_adapter
from fastlora.errors import CheckpointError, ConfigError, DataError, TrainingError
from fastlora.files import check_tensors
from fastlora.medical.data.batch import RegionBatch, collate_regions
from fastlora.medical.models.losses import LossWeights, mesh_losses
from fastlora.medical.sam3d.decoder import Decoded
from fastlora.medical.sam3d.generator import Sam3dFlow
from fastlora.medical.sam3d.losses import SurfaceLossWeights, surface_losses
from fastlora.medical.training import checkpointing
from fastlora.medical.training.checkpointing import score
from fastlora.medical.training.config import RESUMABLE_CHANGES, TrainConfig
from fastlora.medical.training.data import load_train_data
from fastlora.medical.training.distributed import (
    Ranks,
    load_optimizer_state,
    local_device,
    parallelize,
    sharded_like,
    sync_gradients,
    whole,
    whole_optimizer_state,
)
from fastlora.medical.training.faults import (
    deferred_interrupt,
    explained,
    ignore_interrupts,
    is_out_of_memory,
    memory_in_words,
)
from fastlora.medical.training.finetuned import (
    MeshModel,
    distances,
    load_base,
    load_finetuned,
    load_tensors,
    make_trainable,
    trainable_parameters,
)
from fastlora.medical.training.run_folder import RunFolder

__all__ = ["MedicalTrainer", "TrainConfig", "load_finetuned", "resolve_device"]

log = logging.getLogger(__name__)


class RegionData(Protocol):
    """What the trainer asks of a dataset; `RegionDataset` has it."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    def set_epoch(self, epoch: int) -> None: ...


class MedicalTrainer:
    """Trains `model` as `config` says and keeps the run folder `config.checkpoint_dir`.

    The constructor checks everything (values, data, model, the checkpoint to resume from) and writes nothing there.

    Args:
        config: what to do.
        model: the base to fine-tune, in place; default: `load_base(config)`.
        train_data, val_data: both or neither; default: what `config` names. `val_data` chooses `best`, so it must not be
            the data that a report is made on.

    Raises:
        FastLoRAError: ConfigError, DataError or CheckpointError, naming what is wrong.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: MeshModel | Sam3dFlow | None = None,
        train_data: RegionData | None = None,
        val_data: RegionData | None = None,
    ) -> None:
        self.config = config
        self.ranks = Ranks.current()
        if config.halve_batch and self.ranks.world > 1:
            raise ConfigError(
                f"halve_batch: expected one process, got {self.ranks.world}: the others would wait for the one that began "
                "its epoch again"
            )
        self.device = local_device(resolve_device(config))
        self.folder = RunFolder(config.checkpoint_dir)
        resume = self.folder.resume_from(config.resume)
        self.folder.check_free(resume, config.resume == "auto", config.overwrite)
        if config.threads:
            torch.set_num_threads(config.threads)
        if train_data is None or val_data is None:
            train_data, val_data = self.ranks.first_alone(lambda: load_train_data(config))
        for name, data in (("train_data", train_data), ("val_data", val_data)):
            if len(data) == 0:
                raise DataError(f"{name}: expected at least one region, got none")
        self.train_data, self.val_data = train_data, val_data
        sides = [getattr(data, "identity", None) for data in (train_data, val_data)]
        self.regions = [side() for side in sides if side is not None]

        checkpointing.seed_everything(config.seed)
        self.model = load_base(config) if model is None else model
        self.base_sha256 = checkpointing.model_sha256(self.model.base)
        self.counts = self._setup_lora()
        self._adapted = _on_meta(self.model)
        self.model.to(self.device)
        self._call = self._parallelize()
        self.optimizer = torch.optim.AdamW(
            trainable_parameters(self.model).values(),
            lr=config.peak_lr,
            weight_decay=config.weight_decay,
        )
        batches = math.ceil(len(train_data) / config.batch_size)
        self.steps_per_epoch = math.ceil(batches / config.grad_accum)
        self.scheduler = LambdaLR(self.optimizer, self._lr_factor)
        scaled = config.amp == "fp16" or self._half
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)
        self.loss_weights = LossWeights(config.loss_sdf, config.loss_occupancy, config.loss_normal)
        self.surface_weights = SurfaceLossWeights(
            config.loss_sdf,
            config.loss_vertex,
            config.loss_chamfer,
            config.loss_normal,
            config.loss_regularisation,
        )

        self.epoch = 0  # finished epochs
        self.history: list[dict[str, Any]] = []
        self.seconds: list[float] = []
        self.best: dict[str, Any] | None = None
        self.within: dict[str, Any] | None = None  # what the interrupted epoch had done
        self.interrupted: Callable[[], bool] = lambda: False
        self.micro_batch = config.batch_size  # less where memory ran out and `halve_batch` is on
        self.tokens = 0  # of the largest batch so far
        self.rng = checkpointing.rng_state()  # where `train` goes on, whatever draws in between
        if resume is not None:
            self.load_checkpoint(resume)
        self.ranks.check_same(
            {
                **self._saved_config(),
                "epoch": self.epoch,
                "base model": self.base_sha256,
                "training samples": len(train_data),
                "validation samples": len(val_data),
            }
        )

    def _setup_lora(self) -> dict[str, int]:
        """Makes trainable what `config.finetune` says; returns the parameter counts."""
        make_trainable(self.model, self.config)
        return count_parameters(self.model)

    def _parallelize(self) -> nn.Module:
        """What to call in place of the model."""
        if self.config.parallel == "fsdp":
            if not dist.is_initialized():
                raise ConfigError("parallel: expected torchrun around 'fsdp', got one process")
            if self._half:
                raise ConfigError("parallel: expected 'ddp' with 16-bit weights, got 'fsdp'")
        if dist.is_initialized():
            return parallelize(self.model, self.config.parallel, self.device)
        return self.model

    @property
    def _half(self) -> bool:
        """Whether some weights have 16 bits."""
        return any(p.dtype == torch.float16 for p in self.model.parameters())

    # -- training

    def train(self) -> list[dict[str, Any]]:
        """Trains to the last epoch or the early stop; returns the history, one record an epoch, 0 (untrained) first.

        After every epoch the run folder holds all of it, so a run killed at any moment loses only the epoch it was in:
        a new trainer with `resume="auto"` goes on from there. After Ctrl-C it goes on from the very step.

        Raises:
            TrainingError: a loss or a gradient is not finite (the message names the regions), memory or disk is full, a
                process that loads data died, or another run has the folder. The folder keeps the last finished epoch.
            KeyboardInterrupt: after Ctrl-C, when the step is done and saved; after a second one at once.
        """
        last = self.folder.checkpoint("last")
        with explained(last, self._memory), deferred_interrupt() as self.interrupted:
            try:
                return self._train()
            finally:
                self.folder.close()

    def _train(self) -> list[dict[str, Any]]:
        if self.ranks.first:
            self.folder.open(self._saved_config(), self.config.overwrite)
        checkpointing.set_rng_state(self.rng)
        resumed = bool(self.history)
        board = (
            SummaryWriter(str(self.folder.board), purge_step=self.epoch + 1 if resumed else None)
            if self.ranks.first
            else nullcontext()
        )
        bar = tqdm(
            total=self.config.epochs * self.steps_per_epoch,
            initial=self.epoch * self.steps_per_epoch + len((self.within or {}).get("norms", ())),
            desc=f"{self.config.finetune} fine-tuning",
            unit="step",
            # None: shown on a terminal only
            disable=None if self.config.progress and self.ranks.first else True,
        )
        with board as writer, bar:
            if resumed:
                self._write(best_changed=True)
            else:
                self._finish_epoch({"epoch": 0}, time.perf_counter(), writer)
            while self.epoch < self.config.epochs and not self._stalled():
                start = time.perf_counter()
                record = self._epoch_that_fits(bar)
                self.epoch += 1
                self._finish_epoch({"epoch": self.epoch, **record}, start, writer)
        return self.history

    def _epoch_that_fits(self, bar: tqdm[Any]) -> dict[str, Any]:
        """`_train_epoch`; where memory runs out and `halve_batch` is on, again from its start in smaller micro-batches.

        A step is still over `batch_size` regions times `grad_accum`.
        """
        while True:
            start = self._snapshot() if self.config.halve_batch else None
            try:
                return self._train_epoch(bar)
            except (RuntimeError, MemoryError) as error:
                if start is None or self.micro_batch == 1 or not is_out_of_memory(error):
                    raise
            size = self.config.batch_size
            self.micro_batch = max(n for n in range(1, self.micro_batch // 2 + 1) if size % n == 0)
            self.optimizer.zero_grad()
            self._restore(start)
            checkpointing.set_rng_state(self.rng)
            bar.n = self.epoch * self.steps_per_epoch
            tqdm.write(
                f"out of memory: epoch {self.epoch + 1} begins again in micro-batches of {self.micro_batch}",
                file=sys.stdout,
            )

    def _memory(self) -> str:
        alone = ", and --halve_batch does that by itself" if self.ranks.world == 1 else ""
        return (
            f"{memory_in_words(self.model, self.tokens)}; a smaller batch_size than {self.micro_batch} with a larger "
            f"grad_accum trains the same{alone}"
        )

    def _train_epoch(self, bar: tqdm[Any]) -> dict[str, Any]:
        """One pass over the training regions: mean loss terms over regions, mean gradient norm over steps."""
        config, total = self.config, len(self.train_data)
        epoch = self.epoch + 1
        self.model.train()
        self.train_data.set_epoch(epoch)
        self.ranks.seed_dropout(config.seed, epoch)
        order = epoch_order(config.seed, epoch, total)
        group = config.batch_size * config.grad_accum
        sums: defaultdict[str, float] = defaultdict(float)
        norms: list[float] = []
        rate = self.optimizer.param_groups[0]["lr"]  # of the epoch's first step
        seen = 0
        if self.within is not None:  # go on where Ctrl-C came
            seen, rate = self.within["seen"], self.within["lr"]
            if self.ranks.first:
                sums.update(self.within["sums"])
            norms += self.within["norms"]
            self.within = None
        for batch, count, of_all in self._micro_batches(self.train_data, order[seen:]):
            last = (seen + of_all) % group == 0 or seen + of_all == total
            sync_gradients(self._call, last)
            _, losses = self._forward(batch, f"epoch {epoch}, step {len(norms) + 1}")
            # A step's loss is the mean over all its regions, whatever the sizes of its micro-batches and shares.
            in_step = min(group, total - seen // group * group)
            step_loss = losses["total"] * (count * self.ranks.world / in_step)
            self.scaler.scale(step_loss).backward()  # type: ignore[no-untyped-call]
            for name, value in losses.items():
                sums[name] += value.item() * count
            seen += of_all
            if last:
                norms.append(self._step(batch))
                bar.set_postfix(epoch=epoch, loss=f"{losses['total'].item():.4f}")
                bar.update()
                if self.interrupted():
                    self.within = {"seen": seen, "lr": rate, "sums": dict(sums), "norms": norms}
                    self.rng = checkpointing.rng_state()
                    self._write(best_changed=False)
                    raise KeyboardInterrupt
        finite = [norm for norm in norms if math.isfinite(norm)]
        return {
            "lr": rate,
            "grad_norm": sum(finite) / max(1, len(finite)),
            "train": {name: value / total for name, value in self.ranks.sum(sums).items()},
        }

    def _step(self, batch: RegionBatch) -> float:
        """Clips, steps optimizer and schedule, clears the gradients; returns their norm before clipping.

        Where the scaler of a 16-bit run leaves a step out, the schedule waits with it.
        """
        self.scaler.unscale_(self.optimizer)
        limit = self.config.clip_norm or math.inf
        weights = trainable_parameters(self.model).values()
        norm = whole(nn.utils.clip_grad_norm_(weights, limit)).item()
        skipped = self.scaler.is_enabled()  # fp16's scaler leaves out a step that overflows
        if not math.isfinite(norm) and not skipped:
            raise TrainingError(
                f"gradient is not finite in epoch {self.epoch + 1}: {regions_of(batch)}"
            )
        self.scaler.step(self.optimizer)
        scale = self.scaler.get_scale()
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.scaler.get_scale() >= scale:
            self.scheduler.step()
        return norm

    def _forward(
        self, batch: RegionBatch, where: str
    ) -> tuple[Tensor | Decoded, dict[str, Tensor]]:
        """The model's output and loss terms. Raises TrainingError, naming the batch, if one is not finite."""
        self.tokens = max(self.tokens, len(batch.tokens.feats))
        batch = batch.to(self.device)
        kind = torch.float16 if self.config.amp == "fp16" else torch.bfloat16
        with torch.autocast(self.device.type, dtype=kind, enabled=self.config.amp != "off"):
            output = self._call(*self.model.inputs(batch))
        if isinstance(self.model, Sam3dFlow):
            losses = {"flow": output.mean(), "total": output.mean()}
        elif isinstance(output, Decoded):
            losses = surface_losses(output, batch, self.surface_weights)
        else:
            losses = mesh_losses(output, batch, self.loss_weights)
        bad = [name for name, value in losses.items() if not bool(torch.isfinite(value))]
        if bad:
            raise TrainingError(
                f"loss is not finite ({', '.join(bad)}) in {where}: {regions_of(batch)}"
            )
        return output, losses

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean loss terms and, of meshes, mean Dice of the inside (distance < 0) over the validation regions."""
        self.model.eval()
        sums: defaultdict[str, float] = defaultdict(float)
        for batch, count, _ in self._micro_batches(self.val_data, range(len(self.val_data))):
            output, losses = self._forward(batch, f"validation after epoch {self.epoch}")
            if not isinstance(self.model, Sam3dFlow):
                losses["dice"] = inside_dice(distances(output).cpu(), batch.sdf_vox).mean()
            for name, value in losses.items():
                sums[name] += value.item() * count
        return {name: value / len(self.val_data) for name, value in self.ranks.sum(sums).items()}

    def _micro_batches(
        self, data: RegionData, order: Sequence[int]
    ) -> Iterator[tuple[RegionBatch, int, int]]:
        """This rank's share of each micro-batch, how many of its regions count, and how many those of all ranks are.

        A rank without a share computes the first region all the same, counted 0 times: the other ranks wait for its part of
        the weights and for its gradients.
        """
        size = self.micro_batch
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        shares = [self.ranks.share(batch) for batch in batches]
        loader: DataLoader[Any] = DataLoader(
            data,  # type: ignore[arg-type]
            batch_sampler=[
                share or [batch[0]] for share, batch in zip(shares, batches, strict=True)
            ],
            collate_fn=collate_regions,
            num_workers=self.config.num_workers,
            worker_init_fn=ignore_interrupts,
            generator=torch.Generator(),  # its draw for the workers must not move the global generator
        )
        for loaded, share, batch in zip(loader, shares, batches, strict=True):
            yield loaded, len(share), len(batch)

    def _lr_factor(self, step: int) -> float:
        """Part of the peak rate at an optimizer step: a linear rise, then half a cosine down."""
        total = self.config.epochs * self.steps_per_epoch
        rise = math.ceil(self.config.warmup * total)
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rise) / max(1, total - rise))))

    def _stalled(self) -> bool:
        """Whether the validation has not improved for `early_stopping` epochs."""
        best_epoch = 0 if self.best is None else self.best["epoch"]
        return 0 < self.config.early_stopping <= self.epoch - best_epoch

    # -- what is kept

    def _finish_epoch(
        self, record: dict[str, Any], start: float, board: SummaryWriter | None
    ) -> None:
        """Validates, then puts the epoch on the disk, on the board and on stdout (the first rank does)."""
        record["val"] = self.validate()
        self.history.append(record)
        self.rng = checkpointing.rng_state()
        self.seconds.append(round(time.perf_counter() - start, 3))
        best_score = -math.inf if self.best is None else score(self.best["history"][-1]["val"])
        improved = score(record["val"]) > best_score
        if improved:
            self.best = self._snapshot()
        self._write(improved)
        every = self.config.save_every
        if every and self.epoch and self.epoch % every == 0:
            self.save_checkpoint(self.folder.checkpoint(f"epoch_{self.epoch:03d}"))
        if board is None:
            return
        figures = {
            f"{part}/{k}": v for part in ("train", "val") for k, v in record.get(part, {}).items()
        }
        figures |= {name: record[name] for name in ("lr", "grad_norm") if name in record}
        for name, value in figures.items():
            board.add_scalar(name, value, self.epoch)
        board.flush()
        losses = (
            f"train {record['train']['total']:.4f}  " if "train" in record else "before training  "
        )
        empty = max(record.get(part, {}).get("empty", 0.0) for part in ("train", "val"))
        if empty:
            log.warning(
                "epoch %d: the decoder gave no mesh for %.0f%% of the regions: their distances and regularisation are trained "
                "on, and nothing of a mesh",
                self.epoch,
                100 * empty,
            )
        dice = f"dice {record['val']['dice']:.4f}  " if "dice" in record["val"] else ""
        tqdm.write(
            f"epoch {self.epoch:>3}/{self.config.epochs}  {losses}val {record['val']['total']:.4f}  {dice}"
            f"{self.seconds[-1]:.1f} s{'  best' if improved else ''}",
            file=sys.stdout,
        )

    def _write(self, best_changed: bool) -> None:
        """Writes `last`, history.json, and where they changed `best` and the adapter made from it."""
        best = self.best if best_changed else None
        content = self._content()
        if not self.ranks.first:
            return
        self.folder.write(
            content,
            best and {**best, "best": None},
            {
                "epochs": self.history,
                "seconds": self.seconds,
                "best_epoch": self.best and self.best["epoch"],
                "counts": self.counts,
            },
        )
        if best is not None and self.config.finetune == "lora":
            adapted = self._adapted
            adapted.load_state_dict(best["model"], strict=False, assign=True)
            # A generator goes into the user's pipeline, without what is around it here.
            save_adapter(
                adapted.flow if isinstance(adapted, Sam3dFlow) else adapted, self.folder.adapter
            )

    def _snapshot(self) -> dict[str, Any]:
        """The state of the run at the end of an epoch, as copies, without `best`."""
        return {
            "format": checkpointing.FORMAT,
            "model": {name: whole(p) for name, p in trainable_parameters(self.model).items()},
            "optimizer": whole_optimizer_state(self.optimizer),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "history": copy.deepcopy(self.history),
            "seconds": list(self.seconds),
            "rng": self.rng,
            "config": self._saved_config(),
            "base_sha256": self.base_sha256,
            "samples": len(self.train_data),
            "within": self.within,
            "regions": self.regions,
        }

    def _saved_config(self) -> dict[str, Any]:
        return replace(self.config, resume=None, overwrite=False).to_dict()

    def _content(self) -> dict[str, Any]:
        """A checkpoint: the snapshot, and the best one so far if it is another."""
        other = self.best is not None and (self.best["epoch"] != self.epoch or self.within)
        return {**self._snapshot(), "best": self.best if other else None}

    def save_checkpoint(self, path: str | Path) -> None:
        """Saves the run's state, whole or not at all: only trainable weights, and all that resuming needs.

        The best state so far is in it too, so that one file continues a run anywhere. Every rank must call; the first writes.
        """
        content = self._content()
        if self.ranks.first:
            checkpointing.write_checkpoint(Path(path), content)

    def load_checkpoint(self, path: str | Path) -> None:
        """Continues from a checkpoint of the same run.

        Raises:
            CheckpointError: it cannot be read, or is of another model, base, rank, dataset or configuration; names and
                shapes are in the message, and nothing was changed.
        """
        content = checkpointing.read_checkpoint(path)
        best = content["best"] or content
        parameters = trainable_parameters(self.model)
        for state in (content, best):
            check_tensors(state["model"], parameters, str(path))
        self._check_same_run(content, path)
        where = str(path)
        checkpointing.check_optimizer(content["optimizer"], self.optimizer, f"{where}: optimizer")
        for name in ("scheduler", "scaler"):
            wanted = getattr(self, name).state_dict()
            checkpointing.check_like(content[name], wanted, f"{where}: {name}")
        checkpointing.check_rng_state(content["rng"], f"{where}: rng")
        self._restore(content)
        self.history, self.seconds = list(content["history"]), list(content["seconds"])
        self.best = {key: value for key, value in best.items() if key != "best"}

    def _restore(self, content: dict[str, Any]) -> None:
        """Weights, optimizer, schedule, generators and the place in the run."""
        parameters = trainable_parameters(self.model)
        load_tensors(
            self.model,
            {name: sharded_like(parameters[name], t) for name, t in content["model"].items()},
        )
        load_optimizer_state(self.optimizer, content["optimizer"])
        self.scheduler.load_state_dict(content["scheduler"])
        factor = self._lr_factor(self.scheduler.last_epoch)  # another one if `epochs` changed
        for group, rate in zip(self.optimizer.param_groups, self.scheduler.base_lrs, strict=True):
            group["lr"] = rate * factor
        self.scaler.load_state_dict(content["scaler"])
        self.epoch, self.within = content["epoch"], content["within"]
        self.rng = content["rng"]

    def _check_same_run(self, content: dict[str, Any], path: str | Path) -> None:
        if content["base_sha256"] != self.base_sha256:
            raise CheckpointError(f"{path}: was trained on another base model (its weights differ)")
        if content["samples"] != len(self.train_data):
            raise CheckpointError(
                f"{path}: was trained on {content['samples']} samples, the data now has {len(self.train_data)}"
            )
        if content["regions"] and content["regions"] != self.regions:
            raise CheckpointError(
                f"{path}: was trained on other regions (subjects, structures or their places); the data or its manifest changed"
            )
        now = self.config.to_dict()
        for name, value in content["config"].items():
            if name not in RESUMABLE_CHANGES and now.get(name) != value:
                raise CheckpointError(
                    f"{path}: {name} was {value!r} in this run, got {now.get(name)!r}"
                )


def _on_meta(model: nn.Module) -> nn.Module:
    """The model's structure without its values: a copy that takes no memory."""
    tensors = [*model.parameters(), *model.buffers()]
    # Telling deepcopy that the tensors are already copied.
    memo: dict[int, Any] = {
        id(t): nn.Parameter(t.to("meta"), t.requires_grad)
        if isinstance(t, nn.Parameter)
        else t.to("meta")
        for t in tensors
    }
    return copy.deepcopy(model, memo)


def epoch_order(seed: int, epoch: int, size: int) -> list[int]:
    """The order of `size` regions in an epoch: a permutation that is a pure function of the arguments."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(size, generator=generator).tolist()


def inside_dice(pred_vox: Tensor, true_vox: Tensor) -> Tensor:
    """Dice (B,) of the voxels with a negative distance, of two (B, X, Y, Z); 1 where both have none."""
    pred, true = (pred_vox < 0).flatten(1), (true_vox < 0).flatten(1)
    both, either = (pred & true).sum(1), pred.sum(1) + true.sum(1)
    return torch.where(either > 0, 2 * both / either.clamp(min=1), 1.0)


def regions_of(batch: RegionBatch) -> str:
    """The regions of a batch in words, for an error."""
    return ", ".join(f"{m['subject']}/{m['structure']} ({m['region']})" for m in batch.meta)


def resolve_device(config: TrainConfig) -> torch.device:
    """The device that `config.device` means. Raises ConfigError if it is not here, or not for `config.amp`."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device: {name!r} is not here ({torch.cuda.device_count()} CUDA devices)"
        )
    if config.amp != "off" and device.type != "cuda":
        raise ConfigError(
            f"amp: expected 'off' on {name} (mixed precision is for CUDA), got {config.amp!r}"
        )
    return device
