"""`LoRAConfig`: which layers get adapters, and with which rank, alpha and dropout."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from fastlora.errors import ConfigError
from fastlora.layer import check_hyperparameters

DEFAULT_TARGETS = ("to_qkv", "to_q", "to_kv", "to_out")
ALL_LINEAR = "all-linear"

Match = Literal["contains", "exact", "glob", "regex"]
Selector = Callable[[str, nn.Module], "bool | LoRAConfig"]
Targets = str | re.Pattern[str] | Sequence[str | re.Pattern[str]] | Selector

_MODES = ("contains", "exact", "glob", "regex")


@dataclass(frozen=True)
class LoRAConfig:
    """What `inject_lora` does, in one value.

    target_modules: patterns, or "all-linear" (every linear layer but the model's output embeddings), or a callback
        `(path, module) -> bool | LoRAConfig`, where a returned config gives that layer its rank, alpha and dropout.
    match: how a string pattern is compared with a layer's dotted path, such as `blocks.0.attn.to_qkv`:
        "contains"  it is contained in any component; a pattern with dots matches a run of whole components
        "exact"     it is the whole path, or a dotted suffix of it (PEFT's rule for a list)
        "glob"      fnmatch on the whole path (`*` also crosses dots)
        "regex"     re.fullmatch on the whole path (PEFT's rule for a string)
        A compiled `re.Pattern` is always matched in full against the path.
    exclude: patterns of layers to leave alone, compared in the same way.
    rank_pattern, alpha_pattern, dropout_pattern: pattern → value for the layers that match; the first match wins.
    adapter_dtype, backend, use_rslora: as in `LoRALinear`.

    Under a config every pattern must match at least one layer; `inject_lora` raises otherwise.

    Raises: ConfigError that names the field.
    """

    target_modules: Targets = DEFAULT_TARGETS
    rank: int = 4
    alpha: float = 8.0
    dropout: float = 0.0
    match: Match = "contains"
    exclude: Sequence[str | re.Pattern[str]] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    dropout_pattern: Mapping[str, float] = field(default_factory=dict)
    adapter_dtype: torch.dtype | None = None
    backend: str = "auto"
    use_rslora: bool = False

    def __post_init__(self) -> None:
        check_hyperparameters(self.rank, self.alpha, self.dropout)
        if not isinstance(self.use_rslora, bool):
            raise ConfigError(f"use_rslora: expected True or False, got {self.use_rslora!r}")
        if self.match not in _MODES:
            raise ConfigError(f"match: expected one of {', '.join(_MODES)}, got {self.match!r}")
        if not callable(self.target_modules):
            self._check_patterns("target_modules", self.targets)
        if isinstance(self.exclude, str):
            raise ConfigError(f"exclude: expected a list of patterns, got {self.exclude!r}")
        self._check_patterns("exclude", self.exclude)
        for name in ("rank_pattern", "alpha_pattern", "dropout_pattern"):
            self._check_patterns(name, tuple(getattr(self, name)))
        for rank in self.rank_pattern.values():
            check_hyperparameters(rank, self.alpha, self.dropout)
        for alpha in self.alpha_pattern.values():
            check_hyperparameters(self.rank, alpha, self.dropout)
        for dropout in self.dropout_pattern.values():
            check_hyperparameters(self.rank, self.alpha, dropout)

    @property
    def targets(self) -> tuple[str | re.Pattern[str], ...]:
        """The target patterns as a tuple; empty for a callback."""
        if callable(self.target_modules):
            return ()
        if isinstance(self.target_modules, (str, re.Pattern)):
            return (self.target_modules,)
        return tuple(self.target_modules)

    def matches(self, pattern: str | re.Pattern[str], path: str) -> bool:
        """Whether `pattern` takes the layer at `path` under this config's `match`."""
        if isinstance(pattern, re.Pattern):
            return pattern.fullmatch(path) is not None
        if self.match == "regex":
            return re.fullmatch(pattern, path) is not None
        if self.match == "glob":
            return fnmatch.fnmatchcase(path, pattern)
        if self.match == "exact":
            return path == pattern or path.endswith("." + pattern)
        if "." in pattern:
            return f".{pattern}." in f".{path}."
        return any(pattern in component for component in path.split("."))

    def _check_patterns(self, name: str, patterns: Sequence[str | re.Pattern[str]]) -> None:
        if name == "target_modules" and not patterns:
            raise ConfigError("target_modules: expected at least one pattern, got none")
        for pattern in patterns:
            if isinstance(pattern, re.Pattern):
                continue
            if not isinstance(pattern, str) or not pattern:
                raise ConfigError(
                    f"{name}: expected non-empty strings or patterns, got {pattern!r}"
                )
            if self.match == "regex":
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ConfigError(f"{name}: {pattern!r} is no regex: {error}") from None
            if self.match in ("contains", "exact") and any(c in pattern for c in "*?["):
                raise ConfigError(
                    f'{name}: {pattern!r} looks like a glob or a regex; say so with match="glob" or "regex"'
                )
