"""`adapter_config.json`: reading and writing it, and PEFT's rules for which layers of a model it means."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from fastlora.config import ALL_LINEAR, LoRAConfig, check_hyperparameters, scaling_divisor
from fastlora.errors import CheckpointError, ConfigError
from fastlora.files import check_regexes, read_json
from fastlora.io.adapter_state import LayerState
from fastlora.layers.base import LoRALayer
from fastlora.layers.kinds import kind_of
from fastlora.model.selection import nearest_names, output_embeddings

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

# Fields that do not change what the saved adapter computes.
_IGNORED = frozenset(
    [
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
    ]
)
_INITIALISATIONS = (True, False, None, "gaussian", "orthogonal", "eva")  # those that keep W


@dataclass(frozen=True)
class PeftConfig:
    """The fields of `adapter_config.json` that fastlora acts on, under PEFT's names and with PEFT's defaults."""

    target_modules: str | list[str]
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

    def targets(self, model: nn.Module) -> dict[str, nn.Module]:
        """The modules that PEFT would adapt, by path."""
        paths = dict(base_modules(model))
        if isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR:
            head = output_embeddings(model)
            return {
                path: module
                for path, module in paths.items()
                if kind_of(module) == "linear" and module is not head and not self._excludes(path)
            }
        return {path: module for path, module in paths.items() if self._takes(path)}

    def layer(self, path: str) -> LoRAConfig:
        """Rank, alpha and the other settings of the layer at `path`."""
        rank = _by_pattern(self.rank_pattern, path, self.r)
        alpha = _by_pattern(self.alpha_pattern, path, self.lora_alpha)
        return LoRAConfig(
            rank=int(rank),
            alpha=alpha,
            dropout=self.lora_dropout,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
        )

    def no_match(self, model: nn.Module) -> str:
        """The error message if no layer of the model is a target, with the nearest names."""
        wanted = self.target_modules
        first = wanted if isinstance(wanted, str) else wanted[0]
        paths = [path for path, module in model.named_modules() if kind_of(module) is not None]
        return f"{wanted!r} matches no layer of the model{nearest_names(first, paths)}"

    def heads(self, model: nn.Module) -> dict[str, nn.Module]:
        """The modules that PEFT would train whole: those whose path ends with a name, with or without a dot before it."""
        names = tuple(self.modules_to_save or ())
        return {path: module for path, module in base_modules(model) if path.endswith(names)}

    def _takes(self, path: str) -> bool:
        if self._excludes(path):
            return False
        if isinstance(self.target_modules, str):
            return re.fullmatch(self.target_modules, path) is not None
        return _has_suffix(path, self.target_modules) and self._takes_index(path)

    def _excludes(self, path: str) -> bool:
        excluded = self.exclude_modules or []
        if isinstance(excluded, str):
            by_name = re.fullmatch(excluded, path) is not None
        else:
            by_name = _has_suffix(path, excluded)
        heads = self.modules_to_save or []
        return by_name or any(re.match(_head_regex(head), path) for head in heads)

    def _takes_index(self, path: str) -> bool:
        """Whether the first index in the path (or the first after a pattern) is one of layers_to_transform."""
        indices = self.layers_to_transform
        if indices is None or indices == []:
            return True
        for regex in self._index_regexes():
            match = re.match(regex, path)
            if match:
                wanted = [indices] if isinstance(indices, int) else indices
                return int(match["index"]) in wanted
        return False

    def _index_regexes(self) -> list[str]:
        patterns = self.layers_pattern or [r"[^.]*"]
        anywhere = r".*?\." if not self.layers_pattern else r"(?:^|.*?\.)"
        return [
            rf"{anywhere}{pattern}\.(?P<index>\d+)\."
            for pattern in ([patterns] if isinstance(patterns, str) else patterns)
        ]

    def check_matching(self, paths: Iterable[str]) -> None:
        """Raises: CheckpointError if matching a regex of the file against one of these paths does not end."""
        regexes = [v for v in (self.target_modules, self.exclude_modules) if isinstance(v, str)]
        for key in {**self.rank_pattern, **self.alpha_pattern}:
            regexes += [_key_regex(key)] if _repeats(key) else []
        for head in self.modules_to_save or ():
            regexes += [_head_regex(head)] if _repeats(head) else []
        if self.layers_pattern:
            regexes += self._index_regexes()
        try:
            check_regexes(regexes, paths)
        except ValueError as error:
            raise CheckpointError(f"{CONFIG_FILE}: {error}") from None


def config_for(layers: Mapping[str, LayerState], heads: list[str]) -> PeftConfig:
    """The config that matches exactly these layers, with their settings; the highest dropout where they differ.

    layers: by path, folded. heads: paths of the modules that are saved whole.
    """
    use_rslora = all(layer.use_rslora for layer in layers.values())

    def alpha_of(layer: LayerState) -> float:
        """alpha under the divisor that all layers of the config share."""
        if layer.alpha is not None and layer.use_rslora == use_rslora:
            return layer.alpha
        return layer.scaling * scaling_divisor(layer.rank, use_rslora)

    alphas = {path: alpha_of(layer) for path, layer in layers.items()}
    ranks = {path: layer.rank for path, layer in layers.items()}
    rank, alpha = _most_common(ranks.values()), _most_common(alphas.values())
    return PeftConfig(
        "|".join(re.escape(path) for path in layers),
        r=int(rank),
        lora_alpha=alpha,
        lora_dropout=max(layer.dropout for layer in layers.values()),
        use_rslora=use_rslora,
        use_dora=any(layer.use_dora for layer in layers.values()),
        fan_in_fan_out=any(layer.kind == "transposed" for layer in layers.values()),
        modules_to_save=heads or None,
        rank_pattern={f"^{re.escape(p)}": r for p, r in ranks.items() if r != rank},
        alpha_pattern={f"^{re.escape(p)}": a for p, a in alphas.items() if a != alpha},
    )


def as_json(config: PeftConfig, base_name: str | None) -> dict[str, Any]:
    """The content of `adapter_config.json`, with every field that PEFT expects. base_name: the base model's name, if known."""

    def whole(value: float) -> float:
        return int(value) if float(value).is_integer() else value

    return vars(config) | {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "bias": "none",
        "init_lora_weights": True,
        "lora_alpha": whole(config.lora_alpha),
        "alpha_pattern": {key: whole(value) for key, value in config.alpha_pattern.items()},
    }


def overlap(path: str, adapted: Iterable[str]) -> str | None:
    """The first adapted layer that is, holds, or is held by the module at `path`."""
    for other in adapted:
        if f"{path}.".startswith(f"{other}.") or other.startswith(f"{path}."):
            return other
    return None


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) as in the plain model, without the submodules of adapted layers."""
    inside: str | None = None
    for path, module in model.named_modules():
        if inside is not None and path.startswith(inside):
            continue
        inside = f"{path}." if isinstance(module, LoRALayer) else None
        if path:
            yield path, module


def _has_suffix(path: str, names: Iterable[str]) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in names)


def _by_pattern(patterns: Mapping[str, float], path: str, default: float) -> float:
    return next((v for key, v in patterns.items() if re.match(_key_regex(key), path)), default)


def _key_regex(key: str) -> str:
    return rf"(.*\.)?({key})$"


def _head_regex(head: str) -> str:
    return rf"(^|.*\.){head}($|\..*)"


def _repeats(pattern: str) -> bool:
    return any(character in pattern for character in "*+?{|")


def _most_common(values: Iterable[float]) -> float:
    return Counter(values).most_common(1)[0][0]


def read_config(file: Path) -> PeftConfig:
    """Raises: CheckpointError with one line that names the file and the field."""
    if not file.is_file():
        raise CheckpointError(f"folder: no such file: {file}")
    try:
        raw = read_json(file)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: not a readable JSON file: {error}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file}: expected a JSON object, got {type(raw).__name__}")
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
    for key, (expected, fits) in _CHECKS.items():
        if not fits(given[key]) if key in given else key == "target_modules":
            raise CheckpointError(f"{file}: {key}: expected {expected}, got {raw.get(key)!r}")
    config = PeftConfig(**given)
    _check_values(file, config)
    return config


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def _is_regex_or_names(value: object) -> bool:
    return isinstance(value, str) or _is_names(value)


def _is_indices(value: object) -> bool:
    indices = value if isinstance(value, list) else [value]
    return all(isinstance(i, int) and not isinstance(i, bool) for i in indices)


def _is_pattern(value: object, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, dict) and all(isinstance(v, kind) for v in value.values())


_FLAG: tuple[str, Callable[[Any], bool]] = ("true or false", lambda v: isinstance(v, bool))
_CHECKS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "target_modules": ("a list or a regex", lambda v: bool(v) and _is_regex_or_names(v)),
    "exclude_modules": ("a list or a regex", _is_regex_or_names),
    "modules_to_save": ("a list of names", _is_names),
    "layers_pattern": ("names", _is_regex_or_names),
    "layers_to_transform": ("indices", _is_indices),
    "rank_pattern": ("pattern → rank", lambda v: _is_pattern(v, int)),
    "alpha_pattern": ("pattern → alpha", lambda v: _is_pattern(v, (int, float))),
    "use_rslora": _FLAG,
    "use_dora": _FLAG,
    "fan_in_fan_out": _FLAG,
}


def _check_values(file: Path, config: PeftConfig) -> None:
    if isinstance(config.target_modules, str) and config.layers_to_transform is not None:
        raise CheckpointError(f"{file}: layers_to_transform: needs a list of target_modules")
    try:
        for rank in (config.r, *config.rank_pattern.values()):
            check_hyperparameters(rank, config.lora_alpha, config.lora_dropout)
        for alpha in config.alpha_pattern.values():
            check_hyperparameters(config.r, alpha, config.lora_dropout)
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from None
    regexes = [v for v in (config.target_modules, config.exclude_modules) if isinstance(v, str)]
    layers = config.layers_pattern or []
    regexes += [*config.rank_pattern, *config.alpha_pattern, *(config.modules_to_save or [])]
    regexes += [layers] if isinstance(layers, str) else layers
    for regex in regexes:
        try:
            re.compile(regex)
        except re.error as error:
            raise CheckpointError(f"{file}: {regex!r} is no regex: {error}") from None
