"""The options of a training run, in one table, and the models that `--model` names."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from fastlora import files
from fastlora.errors import ConfigError, nearest
from fastlora.medical.models.decoder import DecoderOptions
from fastlora.medical.models.losses import LOSS_WEIGHTS
from fastlora.medical.models.options import (
    AT_LEAST_ONE,
    FINITE,
    NOT_EMPTY,
    NOT_NEGATIVE,
    POSITIVE,
    PROBABILITY,
    check_options,
    declared,
    one_of,
    option,
)
from fastlora.medical.models.trainee import ModelOptions
from fastlora.medical.sam3d.options import Sam3dOptions

MODELS: Mapping[str, type[Any]] = {"compact": DecoderOptions, "sam3d": Sam3dOptions}
"""The `ModelOptions` of each value of `--model`: this is the only module of training and evaluation that imports SAM 3D."""

PATHS = (
    *("checkpoint_dir", "resume", "data_root", "cache_dir"),
    *("base_weights", "sam3d_dir", "latents_dir"),
)
"""The options that name a place on the machine; an adapter file, which may be passed on, does not hold them."""

_data, _model = partial(option, "data"), partial(option, "model")
_optim = partial(option, "optimisation")
_run = partial(option, "run", resumable=True)


@dataclass(frozen=True, init=False)
class TrainConfig:
    """Everything that determines a run of `MedicalTrainer`.

    The options of the model are arguments as well; they are kept in `options`, an instance of `MODELS[model]`. A resumed run may
    change resumable options. None of them changes what an epoch computes (another number of samples or another base is refused
    separately), except that `epochs` changes the remaining learning-rate schedule, and that `threads`, `device`, `parallel` and the number of
    processes change the rounding.

    Raises: ConfigError if a name is unknown, a value has the wrong type or breaks its rule, or two options contradict each other;
        the message names the option, the expected and the given value.
    """

    use_dataset: bool = _data(
        False, "train on the volumes under --data_root, which implies this flag", resumable=True
    )
    data_root: str | None = _data(
        None,
        "data set in one of the layouts of docs/quickstart_training.md "
        "(default: the bundled cases, built in data/bundled)",
        resumable=True,
    )
    cache_dir: str | None = _data(
        None,
        "cache written by `fastlora-medical preprocess`; restricts the data to the structures that it found usable (default: no cache)",
        resumable=True,
    )
    demo: str | None = _data(None, "train on generated synthetic data", one_of("synthetic"))
    classes: tuple[str, ...] | None = _data(
        None,
        "names of the structures to train on, or kinds of structures such as vertebra (default: all)",
        NOT_EMPTY,
    )
    modality: str = _data("ct", "modality of images named *-image.nii.gz", one_of("ct", "mr"))
    channel: int | None = _data(
        None,
        "number of the image's channel: in dataset.json (default there: 0), or of 4-D files",
        NOT_NEGATIVE,
    )
    intercept: float | None = _data(
        None,
        "added to the values of CT images, if their files lack it, such as -1024; 0 takes values that are no Hounsfield units as they are",
        FINITE,
    )
    grid_tolerance: float | None = _data(
        None,
        "largest distance in mm between a voxel of a mask and the image's (default: half a voxel)",
        NOT_NEGATIVE,
        resumable=True,
    )
    split: str = _data(
        "auto",
        "what the test set holds out: structures, patients, or the cases that meta.csv lists (file); auto: structure for the bundled cases, otherwise patient",
        one_of("auto", "structure", "patient", "file"),
    )
    augment: bool = _data(
        True,
        "shift the training regions, mirror and exchange their axes, and vary their intensities, all at random",
    )
    samples_per_region: int = _data(4, "samples of each training region per epoch", AT_LEAST_ONE)
    num_workers: int = _data(
        0, "data loader processes; does not change the result", NOT_NEGATIVE, resumable=True
    )

    model: str = _model(
        "compact",
        "model to fine-tune: compact, the packaged decoder, or sam3d, a part of SAM 3D Objects; see docs/sam3d.md",
        one_of("compact", "sam3d"),
    )
    finetune: str = _model(
        "lora", "weights to train: lora, adapters; full, all of them", one_of("lora", "full")
    )
    lora_rank: int | None = _model(
        None,
        f"LoRA rank (default: {DecoderOptions.default_rank} with the default of lora_ranks for the packaged decoder, {Sam3dOptions.default_rank} for sam3d)",
        AT_LEAST_ONE,
    )
    lora_ranks: tuple[str, ...] | None = _model(
        None,
        "other ranks for some layers, as name=rank, with the same LoRA scaling; the packaged decoder's out_layer is trained in full "
        f"if not named (default: {' '.join(DecoderOptions.default_ranks)} if lora_rank is not given, otherwise none)",
    )
    lora_alpha: float | None = _model(
        None, "the LoRA update is scaled by alpha / rank (default: twice the rank)", POSITIVE
    )
    lora_dropout: float = _model(
        0.0, "dropout probability of the input of the LoRA layers", PROBABILITY
    )
    lora_ffn: bool = _model(True, "adapt the feed-forward layers in addition to the attention")
    base_weights: str | None = _model(
        None, "safetensors file of the base model (default: the packaged one)", resumable=True
    )
    epochs: int = _optim(16, "passes over the training samples", AT_LEAST_ONE, resumable=True)
    batch_size: int = _optim(8, "regions per micro-batch, summed over all processes", AT_LEAST_ONE)
    grad_accum: int = _optim(1, "micro-batches per optimizer step", AT_LEAST_ONE)
    halve_batch: bool = _optim(
        False,
        "if memory runs out, restart the epoch with smaller micro-batches and more of them per optimizer step",
        resumable=True,
    )
    lr: float | None = _optim(
        None,
        "peak learning rate of AdamW (default: 1e-2 for lora and 1e-3 for full; 1e-3 and 1e-4 with sam3d)",
        POSITIVE,
    )
    weight_decay: float = _optim(0.01, "weight decay of AdamW", NOT_NEGATIVE)
    warmup: float = _optim(
        0.05,
        "fraction of all steps in which the learning rate rises, before it decays as a cosine",
        PROBABILITY,
    )
    clip_norm: float = _optim(1.0, "clip gradients to this norm; 0 disables clipping", NOT_NEGATIVE)
    early_stopping: int = _optim(
        0,
        "stop after this many epochs without improvement on the validation set; 0 disables early stopping",
        NOT_NEGATIVE,
        resumable=True,
    )
    loss_sdf: float = _optim(
        LOSS_WEIGHTS["sdf"], "loss weight of the distance error near the surface", NOT_NEGATIVE
    )
    loss_occupancy: float = _optim(
        LOSS_WEIGHTS["occupancy"], "loss weight of the inside / outside error", NOT_NEGATIVE
    )
    loss_normal: float = _optim(
        LOSS_WEIGHTS["normal"], "loss weight of the error of the distance gradient", NOT_NEGATIVE
    )
    amp: str = _optim(
        "off", "mixed precision, on CUDA only; without a value bf16", one_of("off", "bf16", "fp16")
    )
    seed: int = _optim(
        0, "random seed of weights, data order, dropout and augmentation", NOT_NEGATIVE
    )

    checkpoint_dir: str = _run("runs/medical", "folder of the run")
    save_every: int = _run(
        0, "also keep checkpoints/epoch_NNN.pt every N epochs; 0 disables this", NOT_NEGATIVE
    )
    resume: str | None = _run(
        None,
        "continue from a checkpoint or run folder; auto (also without a value): from the last checkpoint in --checkpoint_dir, if any",
    )
    overwrite: bool = _run(False, "delete the run in --checkpoint_dir and start from the beginning")
    device: str = _run("auto", "device: auto, cpu, cuda or cuda:N")
    parallel: str = _run(
        "ddp",
        "parallel training with torchrun: with ddp each process holds the whole model, with fsdp a shard of each weight",
        one_of("ddp", "fsdp"),
    )
    threads: int = _run(0, "CPU threads of torch; 0 keeps torch's setting", NOT_NEGATIVE)
    progress: bool = _run(True, "show a progress bar on a terminal")

    options: ModelOptions = dataclasses.field(kw_only=True)

    def __init__(self, *, options: ModelOptions | None = None, **values: Any) -> None:
        if options is not None:  # from dataclasses.replace
            values = {**vars(options), **values}
        known = option_owners()
        for name in values:
            if name not in known:
                raise ConfigError(f"{name}: unknown key{nearest(name, known)}")
        vars(self).update({n: values.get(n, s.default) for n, s in declared(TrainConfig).items()})
        check_options(self)
        self._check()
        for model, kind in MODELS.items():
            section = kind(**{name: values[name] for name in declared(kind) if name in values})
            if model == self.model:
                vars(self)["options"] = section
                continue
            for name, spec in declared(kind).items():
                if getattr(section, name) != spec.default:
                    raise ConfigError(
                        f"{name}: expected model {model!r} with it, got {self.model!r}"
                    )
        self._resolve()
        self.options.check(vars(self))
        if not any(self.loss_weights.values()):
            names = ", ".join(f"loss_{name}" for name in self.loss_weights)
            raise ConfigError(f"{names}: expected at least one positive weight, got all zero")

    def _check(self) -> None:
        """Refuses options that contradict each other."""
        if self.resume is not None and self.overwrite:
            raise ConfigError("resume, overwrite: expected at most one of them, got both")
        if self.demo and (self.data_root or self.use_dataset):
            raise ConfigError("demo: expected neither data_root nor use_dataset with it, got both")
        if self.amp == "fp16" and self.parallel == "fsdp":
            raise ConfigError("amp, parallel: expected bf16 with 'fsdp', got 'fp16'")
        for entry in self.lora_ranks or ():
            if not re.fullmatch(r"[\w.]+=[1-9]\d{0,4}", entry):
                raise ConfigError(f"lora_ranks: expected name=rank with a rank >= 1, got {entry!r}")

    def _resolve(self) -> None:
        """Fills in the model's defaults, so that the run's folder states them."""
        own = self.data_root or self.demo
        ranks = self.options.default_ranks if self.lora_rank is None else ()
        rank = self.options.default_rank if self.lora_rank is None else self.lora_rank
        vars(self).update(
            lora_ranks=ranks if self.lora_ranks is None else self.lora_ranks,
            lora_rank=rank,
            lora_alpha=2.0 * rank if self.lora_alpha is None else self.lora_alpha,
            split=("patient" if own else "structure") if self.split == "auto" else self.split,
        )

    @property
    def adapters(self) -> dict[str, Any]:
        """The arguments of `Trainee.adapt`."""
        pairs = [entry.partition("=") for entry in self.lora_ranks or ()]
        return {
            "rank": self.lora_rank,
            "alpha": self.lora_alpha,
            "dropout": self.lora_dropout,
            "ffn": self.lora_ffn,
            "rank_pattern": {name: int(rank) for name, _, rank in pairs},
        }

    @property
    def peak_lr(self) -> float:
        """`lr`, or the default of the model and the kind of fine-tuning."""
        return self.lr if self.lr is not None else self.options.peak_lr[self.finetune]

    @property
    def loss_weights(self) -> dict[str, float]:
        """The weight of each loss term of the model."""
        values = self.to_dict()
        return {name: values[f"loss_{name}"] for name in self.options.loss_weights}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Builds a config from names and values. Raises: as the class."""
        return cls(**{str(name): value for name, value in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """All options, of every model, as values that YAML, JSON and `torch.load(weights_only=True)` hold."""
        values = {**vars(self), **vars(self.options)}
        for name, owner in option_owners().items():
            value = values.get(name, declared(owner)[name].default)
            values[name] = list(value) if isinstance(value, tuple) else value
        del values["options"]
        return values


@cache
def option_owners() -> dict[str, type[Any]]:
    """All options by name, those of the models included, and the dataclass that declares each."""
    owners: tuple[type[Any], ...] = (TrainConfig, *MODELS.values())
    return {name: owner for owner in owners for name in declared(owner)}


def is_resumable(name: str) -> bool:
    """Whether a resumed run may change this option."""
    owner = option_owners().get(name)
    return owner is not None and bool(declared(owner)[name].metadata["resumable"])


def only_paths(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options of PATHS in a configuration."""
    return {name: values[name] for name in PATHS if name in values}


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Reads a file of `name: value` lines. Raises: ConfigError if it is missing, not YAML, or not a mapping of names."""
    try:
        values = files.read_yaml(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"config: cannot read {path}: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"config: {path}: expected lines 'name: value', got {type(values).__name__}"
        )
    return values
