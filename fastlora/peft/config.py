"""`adapter_config.json`: reading and writing it, and PEFT's rules for which layers of a model it selects."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from torch import nn

from fastlora.config import ALL_LINEAR, PEFT_KEY, check_hyperparameters
from fastlora.errors import CheckpointError
from fastlora.files import check_regexes, read_json_object
from fastlora.layers.base import LoRALayer
from fastlora.layers.kinds import kind_of
from fastlora.model.selection import output_embeddings
from fastlora.model.wrappers import plain_names, unwrapped

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

# Fields that do not change what the saved adapter computes.
_IGNORED = {
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "inference_mode",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
# PEFT's regexes around a key of a pattern, a name in modules_to_save, and an entry of layers_pattern.
_HEAD = r"(^|.*\.){}($|\..*)"
_INDEX = r"(?:^|.*?\.){}\.(?P<index>\d+)\."
_ANY_INDEX = r".*?\.[^.]*\.(?P<index>\d+)\."
# Those that do not change W.
_INITIALISATIONS = (True, False, None, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class PeftConfig:
    """The fields of `adapter_config.json` that fastlora uses, under PEFT's names and with PEFT's defaults."""

    target_modules: str | list[str] = ""
    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False  # weights are stored as (K, N); not reliable where layers differ
    exclude_modules: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    ensure_weight_tying: bool = False

    def targets(self, model: nn.Module) -> dict[str, nn.Module]:
        """The modules that PEFT would adapt, by path."""
        wanted = self.target_modules
        every = isinstance(wanted, str) and wanted.lower() == ALL_LINEAR
        head = output_embeddings(model) if every else None
        found = {}
        for path, module in base_modules(model):
            if every:
                taken = kind_of(module) == "linear" and module is not head
            else:
                # A full path is selected whatever its index.
                named = not isinstance(wanted, str) and path in wanted
                taken = named or (_matches(wanted, path) and self._has_index(path))
            if taken and not self._excludes(path):
                found[path] = module
        return found

    def layer(self, path: str) -> dict[str, Any]:
        """Rank, alpha and the other settings of the layer at `path`, under the names of `LoRAConfig`."""
        return {
            "rank": _by_pattern(self.rank_pattern, path, self.r),
            "alpha": _by_pattern(self.alpha_pattern, path, self.lora_alpha),
            "dropout": self.lora_dropout,
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
        }

    def heads(self, model: nn.Module) -> dict[str, nn.Module]:
        """The modules that PEFT would train in full: those whose path ends with a name, with or without a dot before it."""
        names = tuple(self.modules_to_save or ())
        return {path: module for path, module in base_modules(model) if path.endswith(names)}

    def _excludes(self, path: str) -> bool:
        heads = self.modules_to_save or []
        by_head = any(re.match(_HEAD.format(head), path) for head in heads)
        return by_head or _matches(self.exclude_modules or [], path)

    def _has_index(self, path: str) -> bool:
        """Whether the first index in the path (or the first after a pattern) is one of layers_to_transform."""
        indices = self.layers_to_transform
        if indices is None or indices == []:
            return True
        wanted = [indices] if isinstance(indices, int) else indices
        for regex in [_INDEX.format(p) for p in self._layer_patterns()] or [_ANY_INDEX]:
            match = re.match(regex, path)
            if match:
                return int(match["index"]) in wanted
        return False

    def _layer_patterns(self) -> list[str]:
        patterns = self.layers_pattern or []
        return [patterns] if isinstance(patterns, str) else patterns

    def _regexes(self) -> Iterator[tuple[str, str]]:
        """(regex in the file, regex matched against paths) for every regex."""
        for value in (self.target_modules, self.exclude_modules):
            if isinstance(value, str):
                yield value, value
        yield from (
            (key, PEFT_KEY.format(key)) for key in (*self.rank_pattern, *self.alpha_pattern)
        )
        yield from ((head, _HEAD.format(head)) for head in self.modules_to_save or ())
        yield from ((pattern, _INDEX.format(pattern)) for pattern in self._layer_patterns())

    def check_values(self) -> None:
        """Raises: ValueError for a value that PEFT or `LoRAConfig` does not accept, or an invalid regex."""
        if not self.target_modules:
            raise ValueError("target_modules: expected a list or a regex, got none")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("layers_to_transform: needs a list of target_modules")
        for rank in (self.r, *self.rank_pattern.values()):
            check_hyperparameters(rank, self.lora_alpha, self.lora_dropout)
        for alpha in self.alpha_pattern.values():
            check_hyperparameters(self.r, alpha, self.lora_dropout)
        for regex, _ in self._regexes():
            try:
                re.compile(regex)
            except re.error as error:
                raise ValueError(f"{regex!r} is not a valid regex: {error}") from None

    def check_matching(self, paths: Iterable[str]) -> None:
        """Raises: CheckpointError if matching a regex of the file against these paths takes too long."""
        slow = [used for regex, used in self._regexes() if any(c in regex for c in "*+?{|")]
        try:
            check_regexes(slow, paths)
        except ValueError as error:
            raise CheckpointError(f"{CONFIG_FILE}: {error}") from None


def as_json(config: PeftConfig, base_name: str | None) -> dict[str, Any]:
    """The content of `adapter_config.json`, with every field that PEFT expects. base_name: the base model's name, if known."""

    def as_integer(value: float) -> float:
        return int(value) if float(value).is_integer() else value

    # Older versions of PEFT do not know ensure_weight_tying, which has no effect on what is saved.
    known = {name: value for name, value in vars(config).items() if name != "ensure_weight_tying"}
    return known | {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "bias": "none",
        "init_lora_weights": True,
        "lora_alpha": as_integer(config.lora_alpha),
        "alpha_pattern": {key: as_integer(value) for key, value in config.alpha_pattern.items()},
    }


def overlap(path: str, adapted: Iterable[str]) -> str | None:
    """The first adapted layer that is, contains, or is part of the module at `path`."""
    inside = f"{path}."
    return next((o for o in adapted if inside.startswith(f"{o}.") or o.startswith(inside)), None)


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) as in the plain model, without wrappers and the submodules of adapted layers."""
    plain = plain_names(model)
    inside: str | None = None
    for path, module in model.named_modules():
        if inside is not None and path.startswith(inside):
            continue
        inside = f"{path}." if isinstance(module, LoRALayer) else None
        if plain(path) and unwrapped(module) is module:
            yield plain(path), module


def _matches(names: str | list[str], path: str) -> bool:
    """PEFT's rule: a string is a regex of full paths; a list has paths or dotted suffixes of them."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(f".{path}".endswith(f".{name}") for name in names)


def _by_pattern(patterns: Mapping[str, float], path: str, default: float) -> float:
    return next((v for key, v in patterns.items() if re.match(PEFT_KEY.format(key), path)), default)


def read_config(file: Path) -> PeftConfig:
    """Raises: CheckpointError with one line that names the file and the field."""
    raw = read_json_object(file)
    if raw.get("peft_type") != "LORA":
        raise CheckpointError(f"{file}: peft_type: expected 'LORA', got {raw.get('peft_type')!r}")
    fields = PeftConfig.__dataclass_fields__
    defaults = {"bias": ("none",), "init_lora_weights": _INITIALISATIONS}
    for key, value in raw.items():
        if key in _IGNORED or key in fields or value in (None, False, [], {}, ""):
            continue
        if value not in defaults.get(key, ()):
            raise CheckpointError(f"{file}: {key}={value!r} is not supported by fastlora")
    given = {key: raw[key] for key in fields if raw.get(key) is not None}
    hints = get_type_hints(PeftConfig)
    for key, value in given.items():
        if not _fits(value, hints[key]):
            raise CheckpointError(f"{file}: {key}: expected {fields[key].type}, got {value!r}")
    config = PeftConfig(**given)
    try:
        config.check_values()
    except ValueError as error:  # ConfigError is one
        raise CheckpointError(f"{file}: {error}") from None
    return config


def _fits(value: object, hint: Any) -> bool:
    """Whether a JSON value has the type of an annotation."""
    kinds = get_args(hint)
    if get_origin(hint) is UnionType:
        return any(_fits(value, kind) for kind in kinds)
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(v, kinds[0]) for v in value)
    if get_origin(hint) is dict:
        return isinstance(value, dict) and all(_fits(v, kinds[1]) for v in value.values())
    return type(value) in ((int, float) if hint is float else (hint,))
