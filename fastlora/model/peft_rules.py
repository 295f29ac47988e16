"""PEFT's rules: which layers and heads of a model the fields of a `LoraConfig`, or of `adapter_config.json`, find."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from torch import nn

from fastlora.config import ALL_LINEAR, PEFT_KEY, check_hyperparameters
from fastlora.layers.banks import ExpertBank, named_layers
from fastlora.layers.base import LoRALayer
from fastlora.layers.experts import LoRAExperts
from fastlora.layers.kinds import kind_of
from fastlora.model.wrappers import plain_names, unwrapped

TASK_TYPES = (
    "SEQ_CLS",
    "SEQ_2_SEQ_LM",
    "CAUSAL_LM",
    "TOKEN_CLS",
    "QUESTION_ANS",
    "FEATURE_EXTRACTION",
)
# PEFT's regexes around a key of a pattern, a name in modules_to_save, and an entry of layers_pattern.
_HEAD = r"(^|.*\.){}($|\..*)"
_INDEX = r"(?:^|.*?\.){}\.(?P<index>\d+)\."
_ANY_INDEX = r".*?\.[^.]*\.(?P<index>\d+)\."
_CLASSIFIERS = ("score", "classifier")


@dataclass(frozen=True)
class PeftConfig:
    """The fields of a `LoraConfig` that fastlora uses, under PEFT's names and with PEFT's defaults."""

    target_modules: str | list[str] = ""
    target_parameters: list[str] | None = None
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
    task_type: str | None = None
    auto_mapping: dict[str, str] | None = (
        None  # the base model's class, by which AutoPeftModel builds it
    )
    base_model_name_or_path: str | None = None
    revision: str | None = None  # of the base model on the Hub

    @classmethod
    def from_fields(cls, raw: Mapping[str, Any]) -> PeftConfig:
        """The config with these fields; others are not looked at. Raises: ValueError naming a field that has an invalid value."""
        given = {key: raw[key] for key in cls.__dataclass_fields__ if raw.get(key) is not None}
        hints = get_type_hints(cls)
        for key, value in given.items():
            if not _fits(value, hints[key]):
                expected = cls.__dataclass_fields__[key].type
                raise ValueError(f"{key}: expected {expected}, got {value!r}")
        config = cls(**given)
        config.check_values()
        return config

    @property
    def all_linear(self) -> bool:
        """Whether the target is "all-linear", in any case of letters."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR

    def targets(self, model: nn.Module) -> dict[str, nn.Module]:
        """The modules that PEFT would adapt, by path."""
        wanted = self.target_modules
        every = self.all_linear
        head = self._spared_head(model) if every else None
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

    def banks(self, model: nn.Module) -> dict[str, nn.Module]:
        """The banks of experts whose parameters PEFT would adapt, by path."""
        plain = plain_names(model)
        return {
            plain(path): module
            for path, module in named_layers(model)
            if isinstance(module, ExpertBank) and self.names_parameter(plain(path))
        }

    def other_parameters(self, model: nn.Module) -> list[str]:
        """The parameters that PEFT would adapt and that are no bank of experts, by name."""
        plain, banks = plain_names(model), self.banks(model)
        names = [plain(name) for name, _ in model.named_parameters()]
        return [name for name in names if self.names_parameter(name) and name not in banks]

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

    def _spared_head(self, model: nn.Module) -> nn.Module | None:
        """The output head that "all-linear" leaves out: the output embeddings, or a classifier under one of PEFT's names for it."""
        head = output_embeddings(model)
        if head is None and self.task_type == "SEQ_CLS":
            heads = (getattr(unwrapped(model), name, None) for name in _CLASSIFIERS)
            return next((head for head in heads if head is not None), None)
        return head

    def names_parameter(self, name: str) -> bool:
        """Whether `target_parameters` has this name or a dotted suffix of it."""
        wanted = self.target_parameters or ()
        return any(name == target or name.endswith(f".{target}") for target in wanted)

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

    def regexes(self) -> Iterator[tuple[str, str]]:
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
        if not self.target_modules and not self.target_parameters:
            raise ValueError("target_modules: expected a list or a regex, got none")
        if self.target_parameters and (self.lora_dropout or self.use_dora):
            raise ValueError("target_parameters: PEFT allows neither lora_dropout nor use_dora")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("layers_to_transform: needs a list of target_modules")
        for rank in (self.r, *self.rank_pattern.values()):
            check_hyperparameters(rank, self.lora_alpha, self.lora_dropout)
        for alpha in self.alpha_pattern.values():
            check_hyperparameters(self.r, alpha, self.lora_dropout)
        for regex, _ in self.regexes():
            try:
                re.compile(regex)
            except re.error as error:
                raise ValueError(f"{regex!r} is not a valid regex: {error}") from None


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) as in the plain model, without wrappers and the submodules of adapted layers."""
    plain = plain_names(model)
    inside: str | None = None
    for path, module in model.named_modules():
        if inside is not None and path.startswith(inside):
            continue
        inside = f"{path}." if isinstance(module, LoRALayer) else None
        bank = isinstance(module, (ExpertBank, LoRAExperts))  # a parameter in the plain model
        if plain(path) and unwrapped(module) is module and not bank:
            yield plain(path), module


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """The output head of a model that follows Hugging Face's convention, else None."""
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if callable(getter) else None


def _matches(names: str | list[str], path: str) -> bool:
    """PEFT's rule: a string is a regex of full paths; a list has paths or dotted suffixes of them."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(f".{path}".endswith(f".{name}") for name in names)


def _by_pattern(patterns: Mapping[str, float], path: str, default: float) -> float:
    return next((v for key, v in patterns.items() if re.match(PEFT_KEY.format(key), path)), default)


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
