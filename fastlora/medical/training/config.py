"""What a training run can be told, in one table.

Each field of `TrainConfig` declares its group, its help, its unit and the rule its value keeps. The command line, the YAML
file and the checks are all made from that table, so they cannot disagree.
"""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlora import files
from fastlora.errors import ConfigError, nearest

# Fields that may differ between a run and its continuation. None changes what an epoch computes (another number of samples
# or another base is refused on its own), except that `epochs` stretches the schedule of the epochs still to come and that
# `threads`, `device`, `parallel` and the number of processes change the rounding.
RESUMABLE_CHANGES = frozenset(
    {
        "data_root",
        "cache_dir",
        "use_dataset",
        "base_weights",
        "sam3d_dir",
        "sam3d_checkpointing",
        "latents_dir",
        "checkpoint_dir",
        "resume",
        "overwrite",
        "epochs",
        "save_every",
        "early_stopping",
        "halve_batch",
        "num_workers",
        "threads",
        "device",
        "parallel",
        "progress",
    }
)


@dataclass(frozen=True)
class Rule:
    """A condition on a value and the words that state it in an error."""

    text: str
    holds: Callable[[Any], bool]


POSITIVE = Rule("> 0", lambda value: value > 0)
NOT_NEGATIVE = Rule(">= 0", lambda value: value >= 0)
AT_LEAST_ONE = Rule(">= 1", lambda value: value >= 1)
PROBABILITY = Rule(">= 0 and < 1", lambda value: 0 <= value < 1)
NOT_EMPTY = Rule("not empty", lambda value: len(value) > 0)


def one_of(*names: str) -> Rule:
    return Rule("one of " + ", ".join(names), lambda value: value in names)


def option(default: Any, group: str, text: str, rule: Rule | None = None, unit: str = "") -> Any:
    """Declares a field: `group` and `text` for --help, `rule` for its check, `unit` for both."""
    return dataclasses.field(
        default=default, metadata={"group": group, "help": text, "rule": rule, "unit": unit}
    )


RANK, RANKS = 2, ("to_qkv=3", "out_layer=32")
"""LoRA in the packaged decoder where no rank is asked for: 2.86 % of its parameters (docs/medical_experiments.md)."""

SAM3D_RANK = 4

PEAK_LR = {
    ("compact", "lora"): 1e-2,
    ("compact", "full"): 1e-3,
    ("sam3d", "lora"): 1e-3,
    ("sam3d", "full"): 1e-4,
}

DATA, MODEL, OPTIMISATION, RUN = "data", "model", "optimisation", "run"


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run of `MedicalTrainer`.

    Raises:
        ConfigError: a value of the wrong type or outside its rule, or two fields that contradict each other; the message
            names the field, what was expected and what came.
    """

    use_dataset: bool = option(
        False, DATA, "train on the volumes under --data_root (which implies it)"
    )
    data_root: str | None = option(
        None,
        DATA,
        "data set in one of the layouts of docs/quickstart_training.md; "
        "without it the bundled cases are built in data/bundled",
        NOT_EMPTY,
    )
    cache_dir: str | None = option(
        None,
        DATA,
        "what preprocess_medical.py left there: only structures that it found usable are used",
        NOT_EMPTY,
    )
    demo: str | None = option(None, DATA, "train on made-up data instead", one_of("synthetic"))
    classes: tuple[str, ...] | None = option(
        None, DATA, "structures to train on, by name; all without it", NOT_EMPTY
    )
    modality: str = option("ct", DATA, "of the images named *-image.nii.gz", one_of("ct", "mr"))
    channel: int = option(
        0, DATA, "which of the channels in dataset.json, where there are several", NOT_NEGATIVE
    )
    split: str = option(
        "auto",
        DATA,
        "what is held out for the test; auto: structure for the bundled cases, else patient",
        one_of("auto", "structure", "patient", "file"),
    )
    augment: bool = option(
        True, DATA, "window shifts, mirroring and small intensity changes of the training samples"
    )
    samples_per_region: int = option(
        4, DATA, "augmented samples of each training region in an epoch", AT_LEAST_ONE
    )
    num_workers: int = option(
        0, DATA, "loader processes; the result does not depend on it", NOT_NEGATIVE
    )

    model: str = option(
        "compact",
        MODEL,
        "the decoder: the packaged one, or that of SAM 3D Objects (docs/sam3d.md)",
        one_of("compact", "sam3d"),
    )
    finetune: str = option("lora", MODEL, "what is trained", one_of("lora", "full"))
    lora_rank: int | None = option(
        None,
        MODEL,
        f"rank of the LoRA update; without it {RANK} and the packaged decoder's lora_ranks, {SAM3D_RANK} with sam3d",
        AT_LEAST_ONE,
    )
    lora_ranks: tuple[str, ...] | None = option(
        None,
        MODEL,
        f"ranks of layers by name, as name=rank, at the scaling of the others ({' '.join(RANKS)} where no rank is asked for, else none); "
        "the packaged decoder's out_layer is trained whole where it is not named",
    )
    lora_alpha: float | None = option(
        None, MODEL, "LoRA scaling is alpha / rank; without it alpha is twice the rank", POSITIVE
    )
    lora_dropout: float = option(0.0, MODEL, "dropout on the LoRA path", PROBABILITY, "probability")
    lora_ffn: bool = option(True, MODEL, "adapt the feed-forward layers beside the attention")
    base_weights: str | None = option(
        None, MODEL, "base model's safetensors; the packaged one without it", NOT_EMPTY
    )
    sam3d_dir: str | None = option(
        None, MODEL, "SAM 3D Objects' checkpoint folder, with pipeline.yaml", NOT_EMPTY
    )
    sam3d_part: str = option(
        "decoder",
        MODEL,
        "what of SAM 3D Objects is trained: its mesh decoder, or the generator of structured latents or of the coarse structure",
        one_of("decoder", "slat", "structure"),
    )
    sam3d_torso: str = option(
        "config",
        MODEL,
        "precision of SAM 3D's frozen blocks; config: what its checkpoint folder says",
        one_of("config", "fp32", "fp16"),
    )
    sam3d_checkpointing: bool = option(
        False, MODEL, "make SAM 3D's activations again in the backward pass: less memory, more time"
    )
    latents_dir: str | None = option(
        None,
        MODEL,
        "cached latents of every region for SAM 3D; without it an encoder is trained that makes the decoder's",
        NOT_EMPTY,
    )

    drop_condition: float = option(
        0.1,
        MODEL,
        "how often SAM 3D's generators are trained without their condition, for their guidance",
        PROBABILITY,
        "probability",
    )

    epochs: int = option(16, OPTIMISATION, "passes over the training samples", AT_LEAST_ONE)
    batch_size: int = option(
        8, OPTIMISATION, "regions per micro-batch, over all processes", AT_LEAST_ONE, "regions"
    )
    grad_accum: int = option(1, OPTIMISATION, "micro-batches per optimizer step", AT_LEAST_ONE)
    halve_batch: bool = option(
        False,
        OPTIMISATION,
        "where memory runs out, begin the epoch again in smaller micro-batches, more of them to a step",
    )
    lr: float | None = option(
        None,
        OPTIMISATION,
        "AdamW's peak learning rate; without it 1e-2 for lora and 1e-3 for full; with sam3d 1e-3 and 1e-4",
        POSITIVE,
    )
    weight_decay: float = option(0.01, OPTIMISATION, "AdamW's decay", NOT_NEGATIVE)
    warmup: float = option(
        0.05,
        OPTIMISATION,
        "part of all steps with a rising rate, before the cosine",
        PROBABILITY,
        "fraction",
    )
    clip_norm: float = option(
        1.0, OPTIMISATION, "largest gradient norm; 0 does not clip", NOT_NEGATIVE
    )
    early_stopping: int = option(
        0,
        OPTIMISATION,
        "stop after this long without a better validation; 0 never",
        NOT_NEGATIVE,
        "epochs",
    )
    loss_sdf: float = option(
        1.0, OPTIMISATION, "weight of the distance error near the surface", NOT_NEGATIVE
    )
    loss_occupancy: float = option(
        0.2, OPTIMISATION, "weight of the inside / outside error", NOT_NEGATIVE
    )
    loss_normal: float = option(
        0.05, OPTIMISATION, "weight of the error of the distance's gradient", NOT_NEGATIVE
    )
    loss_vertex: float = option(
        0.2,
        OPTIMISATION,
        "sam3d: weight of the vertices' distance to the true surface",
        NOT_NEGATIVE,
    )
    loss_chamfer: float = option(
        0.1,
        OPTIMISATION,
        "sam3d: weight of the distance between the surfaces' points",
        NOT_NEGATIVE,
    )
    loss_regularisation: float = option(
        0.1, OPTIMISATION, "sam3d: weight of the decoder's own regularisation", NOT_NEGATIVE
    )
    amp: str = option(
        "off", OPTIMISATION, "mixed precision, on CUDA only", one_of("off", "bf16", "fp16")
    )
    seed: int = option(
        0, OPTIMISATION, "seed of weights, data order, dropout and augmentation", NOT_NEGATIVE
    )

    checkpoint_dir: str = option("runs/medical", RUN, "the run's folder", NOT_EMPTY)
    save_every: int = option(
        0, RUN, "also keep checkpoints/epoch_NNN.pt this often; 0 never", NOT_NEGATIVE, "epochs"
    )
    resume: str | None = option(
        None,
        RUN,
        "continue from a checkpoint or run folder; 'auto': from the last one in --checkpoint_dir, if any",
        NOT_EMPTY,
    )
    overwrite: bool = option(False, RUN, "replace the run that lies in --checkpoint_dir")
    device: str = option("auto", RUN, "auto, cpu, cuda or cuda:N", NOT_EMPTY)
    parallel: str = option(
        "ddp",
        RUN,
        "how the processes of torchrun share the model: each holds all of it, or a part of each weight",
        one_of("ddp", "fsdp"),
    )
    threads: int = option(0, RUN, "torch's CPU threads; 0 leaves them as they are", NOT_NEGATIVE)
    progress: bool = option(True, RUN, "show the progress bar on a terminal")

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            value = _coerce(spec.name, getattr(self, spec.name))
            rule: Rule | None = spec.metadata["rule"]
            if rule is not None and value is not None and not rule.holds(value):
                raise ConfigError(f"{spec.name}: expected {rule.text}, got {value!r}")
            object.__setattr__(self, spec.name, value)
        if self.resume is not None and self.overwrite:
            raise ConfigError("resume, overwrite: expected at most one of them, got both")
        if self.demo and (self.data_root or self.use_dataset):
            raise ConfigError(
                "demo: expected neither data_root nor use_dataset beside it, got both"
            )

        if self.amp == "fp16" and self.parallel == "fsdp":
            raise ConfigError("amp, parallel: expected bf16 beside 'fsdp', got 'fp16'")

        self._check_model()
        self._resolve_ranks()
        if self.split == "auto":
            own = self.data_root or self.demo
            object.__setattr__(self, "split", "patient" if own else "structure")

    def _resolve_ranks(self) -> None:
        """Puts in the ranks and alpha that were not given, so that a run's folder says them."""
        compact = self.model == "compact"
        if self.lora_ranks is None:
            recipe = compact and self.lora_rank is None
            object.__setattr__(self, "lora_ranks", RANKS if recipe else ())
        if self.lora_rank is None:
            object.__setattr__(self, "lora_rank", RANK if compact else SAM3D_RANK)
        if self.lora_alpha is None:
            object.__setattr__(self, "lora_alpha", 2.0 * self.rank)
        if self.lora_ranks and not compact:
            raise ConfigError(
                f"lora_ranks: expected none with model 'sam3d', got {list(self.lora_ranks)}"
            )
        for entry in self.lora_ranks or ():
            if not re.fullmatch(r"[\w.]+=[1-9]\d{0,4}", entry):
                raise ConfigError(f"lora_ranks: expected name=rank with a rank >= 1, got {entry!r}")

    @property
    def rank(self) -> int:
        """The rank of layers that `lora_ranks` does not name."""
        assert self.lora_rank is not None
        return self.lora_rank

    @property
    def alpha(self) -> float:
        """LoRA's alpha beside `rank`."""
        assert self.lora_alpha is not None
        return self.lora_alpha

    @property
    def rank_pattern(self) -> dict[str, int]:
        """`lora_ranks` by name."""
        pairs = [entry.partition("=") for entry in self.lora_ranks or ()]
        return {name: int(rank) for name, _, rank in pairs}

    def _check_model(self) -> None:
        """Refuses what belongs to the other model, and what SAM 3D's cannot do."""
        if self.model == "compact":
            for name in (
                "sam3d_dir",
                "sam3d_part",
                "sam3d_torso",
                "sam3d_checkpointing",
                "latents_dir",
            ):
                if getattr(self, name) != getattr(TrainConfig, name):
                    raise ConfigError(f"{name}: expected model 'sam3d' beside it, got 'compact'")
            return
        if self.sam3d_dir is None:
            raise ConfigError(
                "sam3d_dir: expected a checkpoint folder with model 'sam3d', got none"
            )
        if self.base_weights is not None:
            raise ConfigError(
                "base_weights: expected none with model 'sam3d', whose sam3d_dir has them"
            )
        if self.finetune == "full" and self.sam3d_torso == "fp16":
            raise ConfigError("sam3d_torso: expected 'fp32' where all weights train, got 'fp16'")
        if self.amp != "off":
            raise ConfigError(
                f"amp: expected 'off' with model 'sam3d', whose precision sam3d_torso chooses, got {self.amp!r}"
            )
        if self.sam3d_part != "decoder" and self.latents_dir is None:
            raise ConfigError(
                f"latents_dir: expected cached latents and conditions to train {self.sam3d_part!r} on, got none"
            )
        if self.latents_dir is not None and self.augment:
            raise ConfigError(
                "augment: expected --no-augment beside latents_dir: cached latents do not move with their region"
            )

    @property
    def is_generator(self) -> bool:
        """Whether a generator of SAM 3D is trained, which makes no mesh."""
        return self.sam3d_part != "decoder"

    @property
    def peak_lr(self) -> float:
        """`lr`, or the default of the model and the kind of fine-tuning."""
        return self.lr if self.lr is not None else PEAK_LR[self.model, self.finetune]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Builds a config from field names and values.

        Raises:
            ConfigError: a name that is no field (the nearest one is given), or what the class raises.
        """
        known = [spec.name for spec in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise ConfigError(f"{name}: unknown key{nearest(str(name), known)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The fields as values that YAML, JSON and `torch.load(weights_only=True)` hold."""
        values = dataclasses.asdict(self)
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in values.items()
        }


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Reads a file of `name: value` lines.

    Raises:
        ConfigError: the file is missing, is no YAML, or holds something other than a mapping of names.
    """
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


def value_type(name: str) -> type:
    """The type of a field's value (int, float, bool, str or tuple), leaving out None."""
    hint = typing.get_type_hints(TrainConfig)[name]
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    plain = kinds[0] if type(None) in typing.get_args(hint) else hint
    return typing.cast(type, typing.get_origin(plain) or plain)


def _coerce(name: str, value: Any) -> Any:
    """Brings a value that means the right thing to the field's type: YAML reads `1e-3` as text, and gives lists."""
    hint = typing.get_type_hints(TrainConfig)[name]
    if value is None and type(None) in typing.get_args(hint):
        return None
    kind = value_type(name)
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if math.isfinite(number):
            return number
    elif kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    elif (
        kind is tuple
        and isinstance(value, (list, tuple))
        and all(isinstance(v, str) for v in value)
    ):
        return tuple(value)
    elif kind is bool and isinstance(value, bool):
        return value
    elif kind is str and isinstance(value, (str, Path)):
        return str(value)
    wanted = {float: "a finite number", int: "a whole number", tuple: "a list of names"}
    wanted |= {bool: "true or false", str: "text"}
    raise ConfigError(f"{name}: expected {wanted[kind]}, got {value!r}")
