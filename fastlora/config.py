"""`LoRAConfig`: which layers get adapters, and with which rank, alpha and dropout."""

from __future__ import annotations

import fnmatch
import functools
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import nn

from fastlora.errors import ConfigError, nearest
from fastlora.files import import_yaml, read_json, read_yaml, write_files

BACKENDS = ("auto", "torch", "triton")
DEFAULT_TARGETS = ("to_qkv", "to_q", "to_kv", "to_out")
ALL_LINEAR = "all-linear"

Match = Literal["contains", "exact", "glob", "regex"]
Kind = Literal["linear", "conv", "embedding"]
Bias = Literal["none", "all", "lora_only"]
Selector = Callable[[str, nn.Module], "bool | LoRAConfig"]
Patterns = Sequence[str | re.Pattern[str]] | AbstractSet[str | re.Pattern[str]]
Targets = str | re.Pattern[str] | Patterns | Selector

KINDS: tuple[Kind, ...] = get_args(Kind)
_CHOICES = {"match": get_args(Match), "backend": BACKENDS, "bias": get_args(Bias)}
_INITIALISATIONS = ("kaiming", "gaussian", "orthogonal", "pissa", "olora")
_PISSA_STEPS = re.compile(r"pissa_niter_[1-9][0-9]{0,2}")
PATTERNS = ("rank_pattern", "alpha_pattern", "dropout_pattern")
PEFT_KEY = r"(.*\.)?({})$"  # how PEFT reads a key of its patterns
_ALIASES = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "exclude_modules": "exclude",
}


@dataclass(frozen=True)
class LoRAConfig:
    """The settings of `inject_lora`.

    target_modules: None for the attention projections, by the rules of docs/targets.md; or patterns, or "all-linear" (every layer of `kinds`, by default linear ones, except the model's output
        embeddings), or a callback `(path, module) -> bool | LoRAConfig`; a returned config sets that layer's rank, alpha and dropout.
    match: how a string pattern is compared with a layer's dotted path, such as `blocks.0.attn.to_qkv`:
        "contains"  it is contained in any component; a pattern with dots matches consecutive components in full
        "exact"     it is the path, or a dotted suffix of it (PEFT's rule for a list); the keys of rank_pattern, alpha_pattern and
                    dropout_pattern are regexes of the path or of a dotted suffix (PEFT's rule for keys)
        "glob"      fnmatch on the full path (`*` also crosses dots)
        "regex"     re.fullmatch on the full path
        A compiled `re.Pattern` is always matched in full against the path.
        Under the keyword, `LoRAConfig(target_modules=…)`, the default is "exact", and a string instead of a list, also as exclude, is
        compiled, so that all fields mean the same as in PEFT.
    exclude: patterns of layers to skip, compared in the same way. Sets of patterns are accepted and sorted.
    rank_pattern, alpha_pattern, dropout_pattern: pattern → value for the layers that match; the first match wins.
    adapter_dtype, backend, use_rslora, use_dora: as in `LoRALinear`.
    kinds: the kinds of layers to consider: "linear" (`nn.Linear` and transformers' `Conv1D`), "conv" (`nn.Conv1d` to `Conv3d`)
        and "embedding" (`nn.Embedding`). Layers of other kinds are skipped even if their name matches.
    layers_to_transform: an index or indices; only layers whose path has one of them as its first number are selected
        (`blocks.0.attn.to_qkv` has 0). None selects all, with or without a number. Under "exact" a full path in
        target_modules is selected whatever its number, as in PEFT.
    init_lora_weights: initial values of lora_A and lora_B. A new layer always computes the output of the wrapped one.
        "kaiming"     lora_A Kaiming-uniform, lora_B zero
        "gaussian"    lora_A normal with standard deviation 1 / rank, lora_B zero
        "orthogonal"  both random with B A = 0; the rank must be even
        "pissa"       the principal singular vectors of W; "pissa_niter_4" finds them by 4 subspace iterations, which is faster
        "olora"       the first columns and rows of the QR decomposition of W
        PEFT subtracts the initial product B₀ A₀ of the last two from W; fastlora keeps it and subtracts it in the computation,
        at twice the rank. W does not change, and disabling, merging and loading base weights stay exact.
    bias: which biases also train: "none", "all" of the model, or "lora_only", those of adapted layers.
    modules_to_save: names of modules that also train, such as a new head: a path, or a dotted suffix of one. Like biases they
        are marked by `inject_lora`, left trainable by `freeze_base_params` and saved by `save_adapter`; `save_pretrained` saves
        modules and refuses biases, which PEFT's format cannot store.

    PEFT's names r, lora_alpha, lora_dropout and exclude_modules are accepted for rank, alpha, dropout and exclude.
    Every pattern, index and name must match at least one layer; `inject_lora` raises otherwise.

    Raises: ConfigError naming the field if a value is invalid.
    """

    target_modules: Targets | None = None
    rank: int = 4
    alpha: float = 8.0
    dropout: float = 0.0
    match: Match = "contains"
    exclude: Patterns = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    dropout_pattern: Mapping[str, float] = field(default_factory=dict)
    adapter_dtype: torch.dtype | None = None
    backend: str = "auto"
    use_rslora: bool = False
    layers_to_transform: int | Sequence[int] | None = None
    init_lora_weights: str = "kaiming"
    use_dora: bool = False
    kinds: Sequence[Kind] = ("linear",)
    bias: Bias = "none"
    modules_to_save: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_hyperparameters(self.rank, self.alpha, self.dropout)
        for name in ("use_rslora", "use_dora"):
            if not isinstance(value := getattr(self, name), bool):
                raise ConfigError(f"{name}: expected True or False, got {value!r}")
        for name, choices in _CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise ConfigError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
        dtype = self.adapter_dtype
        if dtype is not None and not (isinstance(dtype, torch.dtype) and computes_in(dtype)):
            raise ConfigError(f"adapter_dtype: expected a float dtype or None, got {dtype!r}")
        if isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR:
            object.__setattr__(self, "target_modules", ALL_LINEAR)  # PEFT ignores case
        if self.target_modules is not None and not callable(self.target_modules):
            if not isinstance(self.target_modules, (str, re.Pattern)):
                self._freeze("target_modules", self.target_modules)
            self._check_patterns("target_modules", self.targets)
        self._freeze("exclude", self.exclude)
        self._check_patterns("exclude", self.exclude)
        for name in PATTERNS:
            self._check_pattern_values(name)
        self._check_indices()
        method = self.init_lora_weights
        if method not in _INITIALISATIONS and not (
            isinstance(method, str) and _PISSA_STEPS.fullmatch(method)
        ):
            raise ConfigError(
                f"init_lora_weights: expected one of {', '.join(_INITIALISATIONS)} or pissa_niter_<steps>, "
                f"got {method!r}"
            )
        if method == "orthogonal" and self.rank % 2:
            raise ConfigError(f"init_lora_weights: orthogonal needs an even rank, got {self.rank}")
        if self.subtracts_init and self.alpha == 0:
            raise ConfigError(f"init_lora_weights: {method!r} needs an alpha other than 0")
        kinds = self.kinds
        if not _is_list(kinds) or not kinds or any(kind not in KINDS for kind in kinds):
            raise ConfigError(f"kinds: expected some of {', '.join(KINDS)}, got {kinds!r}")
        object.__setattr__(self, "kinds", _ordered(kinds))
        names = () if self.modules_to_save is None else self.modules_to_save  # PEFT writes None
        if not _is_list(names) or not all(isinstance(n, str) and n for n in names):
            raise ConfigError(f"modules_to_save: expected a list of names, got {names!r}")
        object.__setattr__(self, "modules_to_save", _ordered(names))

    @property
    def subtracts_init(self) -> bool:
        """Whether lora_A and lora_B have a non-zero initial product, which the computation subtracts."""
        return self.init_lora_weights.startswith(("pissa", "olora"))

    @property
    def targets(self) -> tuple[str | re.Pattern[str], ...]:
        """The target patterns as a tuple; empty for None and for a callback."""
        targets = self.target_modules
        if targets is None or callable(targets):
            return ()
        return (targets,) if isinstance(targets, (str, re.Pattern)) else tuple(targets)

    def matches(self, pattern: str | re.Pattern[str], path: str, *, key: bool = False) -> bool:
        """Whether `pattern` matches the layer at `path` under this config's `match`. key: it is a key of rank_pattern or the like."""
        if isinstance(pattern, re.Pattern):
            return pattern.fullmatch(path) is not None
        if self.match == "regex":
            return re.fullmatch(pattern, path) is not None
        if self.match == "glob":
            return fnmatch.fnmatchcase(path, pattern)
        if self.match == "exact" and key:
            return re.match(PEFT_KEY.format(pattern), path) is not None
        if self.match == "exact":
            return path == pattern or path.endswith("." + pattern)
        if "." in pattern:
            return f".{pattern}." in f".{path}."
        return any(pattern in component for component in path.split("."))

    @property
    def indices(self) -> tuple[int, ...]:
        """`layers_to_transform` as a tuple; empty for None."""
        return cast("tuple[int, ...]", self.layers_to_transform or ())  # see _check_indices

    def to_dict(self) -> dict[str, Any]:
        """Every field as a JSON value: a dtype by its name, a compiled pattern as {"regex": …}.

        Raises: ConfigError for a callback, or a compiled pattern with flags, which JSON cannot represent.
        """
        if callable(self.target_modules):
            raise ConfigError("target_modules: a callback cannot be written to a file")
        return {f.name: _json_value(f.name, getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoRAConfig:
        """The config whose `to_dict` is `values`; missing fields have their defaults, and PEFT's names are accepted.

        Raises: ConfigError naming a field that does not exist (with the nearest names) or has an invalid value.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"values: expected a mapping of fields, got {type(values).__name__}")
        known = [f.name for f in fields(cls)] + list(_ALIASES)
        for name in values:
            if name not in known:
                raise ConfigError(f"{name}: no such field{nearest(str(name), known)}")
        given = dict(values)
        for name in ("target_modules", "exclude", "exclude_modules"):
            if name in given:
                given[name] = _compiled(name, given[name])
        dtype = given.get("adapter_dtype")
        if isinstance(dtype, str):
            given["adapter_dtype"] = getattr(torch, dtype, dtype)
        return cls(**given)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_dict()` to a .json, .yaml or .yml file, atomically.

        Raises: ConfigError for another suffix, or without pyyaml; CheckpointError if the file cannot be written.
        """
        if _format(path) == "yaml":
            text = str(import_yaml().safe_dump(self.to_dict(), sort_keys=False))
        else:
            text = json.dumps(self.to_dict(), indent=2) + "\n"
        write_files({Path(path): text.encode()})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LoRAConfig:
        """Read what `save` wrote, or a file written by hand.

        Raises: ConfigError if the suffix is neither JSON's nor YAML's, or the file is damaged or has an invalid field.
        """
        kind = _format(path)
        try:
            values = read_json(path) if kind == "json" else read_yaml(path)
        except ValueError as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{path}: not readable as {kind}: {error}") from None
        return cls.from_dict(values)

    def _freeze(self, name: str, value: Any) -> None:
        """Store the sequence as a tuple, so that the config does not change with the caller's list."""
        if not _is_list(value):
            raise ConfigError(f"{name}: expected a list of patterns, got {value!r}")
        object.__setattr__(self, name, _ordered(value))

    def _check_pattern_values(self, name: str) -> None:
        patterns = getattr(self, name)
        if not isinstance(patterns, Mapping):
            raise ConfigError(f"{name}: expected a mapping of pattern → value, got {patterns!r}")
        object.__setattr__(self, name, dict(patterns))
        self._check_patterns(name, tuple(patterns))
        own: dict[str, Any] = {"rank": self.rank, "alpha": self.alpha, "dropout": self.dropout}
        for pattern, value in patterns.items():
            try:
                check_hyperparameters(**own | {name.removesuffix("_pattern"): value})
            except ConfigError as error:
                raise ConfigError(f"{name}[{pattern!r}]: {error}") from None

    def _check_indices(self) -> None:
        wanted = self.layers_to_transform
        if wanted is None:
            return
        many = [wanted] if isinstance(wanted, int) else wanted
        if (
            isinstance(many, (str, bytes))
            or not isinstance(many, Sequence)
            or not many
            or any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in many)
        ):
            raise ConfigError(f"layers_to_transform: expected indices ≥ 0 or None, got {wanted!r}")
        object.__setattr__(self, "layers_to_transform", tuple(many))

    def _check_patterns(self, name: str, patterns: Patterns) -> None:
        if name == "target_modules" and not patterns:
            raise ConfigError("target_modules: expected at least one pattern, got none")
        for pattern in patterns:
            if isinstance(pattern, re.Pattern):
                continue
            if not isinstance(pattern, str) or not pattern:
                raise ConfigError(
                    f"{name}: expected non-empty strings or patterns, got {pattern!r}"
                )
            key = self.match == "exact" and name in PATTERNS
            if self.match == "regex" or key:
                try:
                    re.compile(PEFT_KEY.format(pattern) if key else pattern)
                except re.error as error:
                    raise ConfigError(f"{name}: {pattern!r} is not a regex: {error}") from None
            elif self.match != "glob" and any(c in pattern for c in "*?["):
                raise ConfigError(
                    f'{name}: {pattern!r} looks like a glob or a regex; set match="glob" or "regex"'
                )


def layer_index(path: str) -> int | None:
    """The first number among the path's components, or None: 3 for `blocks.3.mlp.0`."""
    return next((int(part) for part in path.split(".") if part.isdecimal()), None)


def _with_aliases(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def __init__(self: LoRAConfig, *args: Any, **kwargs: Any) -> None:
        for alias, name in _ALIASES.items():
            if alias not in kwargs:
                continue
            position = [f.name for f in fields(LoRAConfig)].index(name)
            if name in kwargs or position < len(args):
                raise ConfigError(f"{alias}: is an alias of {name}; pass one of them")
            kwargs[name] = kwargs.pop(alias)
        if "target_modules" in kwargs and "match" not in kwargs:
            kwargs |= _pefts_meaning(kwargs)
        init(self, *args, **kwargs)

    return __init__


def _pefts_meaning(given: dict[str, Any]) -> dict[str, Any]:
    """The fields under which target_modules and exclude mean the same as in PEFT, where a string is a regex."""
    fields: dict[str, Any] = {"match": "exact"}
    targets, exclude = given["target_modules"], given.get("exclude", ())
    if isinstance(targets, str) and targets and targets.lower() != ALL_LINEAR:
        fields["target_modules"] = _compiled("target_modules", {"regex": targets})
    if isinstance(exclude, str) and exclude:
        fields["exclude"] = (_compiled("exclude", {"regex": exclude}),)
    return fields


def _is_list(value: object) -> bool:
    """Whether it is a list, tuple or set, and not a string or an iterator, which checking would exhaust."""
    return isinstance(value, (Sequence, AbstractSet)) and not isinstance(value, (str, bytes))


def _ordered(values: Iterable[Any]) -> tuple[Any, ...]:
    """The values as a tuple; those of a set sorted, since their order differs from process to process."""
    return tuple(sorted(values, key=str) if isinstance(values, AbstractSet) else values)


LoRAConfig.__init__ = _with_aliases(LoRAConfig.__init__)  # type: ignore[method-assign]


def _json_value(name: str, value: Any) -> Any:
    if isinstance(value, tuple):
        return [_json_value(name, item) for item in value]
    if isinstance(value, dict):
        compiled = [key for key in value if not isinstance(key, str)]
        if compiled:
            raise ConfigError(f"{name}: the compiled pattern {compiled[0]!r} cannot be written")
        return dict(value)
    if isinstance(value, re.Pattern):
        if value.flags != re.compile(value.pattern).flags:
            raise ConfigError(
                f"{name}: the flags of {value!r} cannot be written; use inline flags such as (?i)"
            )
        return {"regex": value.pattern}
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def _compiled(name: str, value: Any) -> Any:
    """The reverse of `_json_value` for patterns."""
    if isinstance(value, list):
        return [_compiled(name, v) for v in value]
    if not isinstance(value, Mapping):
        return value
    if set(value) != {"regex"} or not isinstance(value["regex"], str):
        raise ConfigError(f'{name}: expected strings or {{"regex": …}}, got {value!r}')
    try:
        return re.compile(value["regex"])
    except re.error as error:
        raise ConfigError(f"{name}: {value['regex']!r} is not a regex: {error}") from None


def _format(path: str | os.PathLike[str]) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in (".json", ".yaml", ".yml"):
        raise ConfigError(f"path: expected a .json, .yaml or .yml file, got {os.fspath(path)!r}")
    return "json" if suffix == ".json" else "yaml"


def scaling_divisor(rank: int, use_rslora: bool) -> float:
    """The divisor of alpha: the rank, or its root under rsLoRA."""
    return math.sqrt(rank) if use_rslora else rank


def computes_in(dtype: torch.dtype) -> bool:
    """Whether torch computes in the dtype: it is floating-point, and not float8 or float4, which torch only stores."""
    return dtype.is_floating_point and dtype.itemsize > 1


def is_number(value: object) -> bool:
    """Whether the value is an int or a float, and not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_hyperparameters(rank: int, alpha: float, dropout: float) -> None:
    """Raises: ConfigError naming the argument, the expected value and the given one."""
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ConfigError(f"rank: expected an integer ≥ 1, got {rank!r}")
    if not is_number(alpha) or not abs(alpha) <= sys.float_info.max:
        raise ConfigError(f"alpha: expected a finite number, got {alpha!r}")
    if not is_number(dropout) or not 0.0 <= dropout < 1.0:
        raise ConfigError(f"dropout: expected a probability with 0 ≤ p < 1, got {dropout!r}")
