"""A `peft.LoraConfig` as a `LoRAConfig`, field by field, without importing peft."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from enum import Enum
from typing import Any

from torch import nn

from fastlora.config import KINDS, PEFT_KEY, LoRAConfig
from fastlora.errors import ConfigError
from fastlora.layers.base import LoRALayer
from fastlora.layers.kinds import kind_of, why_unsuitable
from fastlora.model.peft_rules import PeftConfig, base_modules

# Fields that change neither the adapter nor its training.
_IGNORED = {
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "runtime_config",
}
_PISSA = re.compile(r"pissa(_niter_[1-9][0-9]{0,2})?")


class PeftTargets:
    """The callback of a `LoRAConfig` that selects the layers of one model that PEFT would adapt under a `LoraConfig`.

    rules: the fields of the LoraConfig. layers: path → the config of that layer.
    foreign: path → why the module cannot be adapted, for those that PEFT adapts or refuses and that are no layer here.
    unused: (field, name) of what matches nothing, which PEFT ignores.
    """

    def __init__(self, model: nn.Module, rules: PeftConfig, shared: Mapping[str, Any]) -> None:
        every = dict(base_modules(model))
        self.rules = rules
        self.layers: dict[str, LoRAConfig] = {}
        self.foreign: dict[str, str] = {}
        for path, module in rules.targets(model).items():
            layer = module.wrapped if isinstance(module, LoRALayer) else module
            if kind_of(layer) is None:
                self.foreign[path] = str(why_unsuitable(layer))
            else:
                self.layers[path] = LoRAConfig(**rules.layer(path), **shared)
        banks = rules.banks(model)
        self.foreign |= dict.fromkeys(rules.other_parameters(model), "is no bank of experts")
        self._configs = {every[path]: own for path, own in self.layers.items()}
        for path, bank in banks.items():
            self._configs[bank] = self.layers[path] = LoRAConfig(**rules.layer(path), **shared)
        self._configs |= {
            module.wrapped: self._configs[module]
            for module in list(self._configs)
            if isinstance(module, LoRALayer)
        }
        self.unused = _unused(rules, [*every, *banks], list(self.layers))

    def __call__(self, path: str, module: nn.Module) -> bool | LoRAConfig:
        return self._configs.get(module, False)

    def __repr__(self) -> str:
        parameters = self.rules.target_parameters
        also = f", target_parameters={parameters!r}" if parameters else ""
        return f"LoraConfig(target_modules={self.rules.target_modules!r}{also})"


def is_pefts(value: object) -> bool:
    """Whether the value is an instance of a configuration class of PEFT, of any method."""
    return any(
        kind.__name__ == "PeftConfigMixin" and kind.__module__.startswith("peft.")
        for kind in type(value).__mro__
    )


def from_peft(model: nn.Module, given: Any) -> LoRAConfig:
    """The config under which `inject_lora` adapts the layers of `model` that PEFT would adapt, with the same settings and initial values.

    given: a `peft.LoraConfig`. Its base model, task type and revision do not change the adapter.

    Raises: ConfigError naming every field that fastlora cannot honour, with its value.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model: expected an nn.Module, got {type(model).__name__}")
    method = _plain(given.peft_type)
    if method != "LORA" or not hasattr(given, "init_lora_weights"):
        raise ConfigError(
            f"target_modules: expected a LoraConfig of PEFT, got a {type(given).__name__} (peft_type {method})"
        )
    raw = {f.name: _plain(getattr(given, f.name)) for f in dataclasses.fields(given)}
    initialisation = _initialisation(raw["init_lora_weights"])
    refused = _refused(given, raw)
    if initialisation is None:
        refused.append(f"init_lora_weights={raw['init_lora_weights']!r}")
    if refused:
        raise ConfigError(
            f"target_modules: the LoraConfig has values that fastlora does not support: {', '.join(sorted(refused))}"
        )
    if not raw["target_modules"] and not raw.get("target_parameters"):
        raise ConfigError(
            "target_modules: the LoraConfig names no targets, and fastlora does not choose them by the model's type as PEFT "
            'does; set them, for example to "all-linear", or inject without a LoraConfig (docs/targets.md)'
        )
    try:
        rules = PeftConfig.from_fields(raw)
    except ValueError as error:
        raise ConfigError(f"target_modules: the LoraConfig is invalid: {error}") from None
    heads = list(rules.heads(model))
    missing = [n for n in rules.modules_to_save or () if not any(p.endswith(n) for p in heads)]
    shared: dict[str, Any] = {
        "init_lora_weights": initialisation,
        "bias": raw["bias"],
        "kinds": KINDS,
        "modules_to_save": [*heads, *missing],
    }
    targets = PeftTargets(model, rules, shared)
    return LoRAConfig(
        targets,
        rank=rules.r,
        alpha=rules.lora_alpha,
        dropout=rules.lora_dropout,
        use_rslora=rules.use_rslora,
        use_dora=rules.use_dora,
        **shared,
    )


def _plain(value: Any) -> Any:
    """The value as `adapter_config.json` stores it."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, AbstractSet):
        return sorted(value, key=str)
    return list(value) if isinstance(value, tuple) else value


def _initialisation(value: object) -> str | None:
    """fastlora's name of PEFT's `init_lora_weights`, or None if it has no such method. PEFT ignores case in two of them."""
    if value is True:
        return "kaiming"
    if not isinstance(value, str):
        return None
    if value.lower() in ("gaussian", "olora"):
        return value.lower()
    return value if value == "orthogonal" or _PISSA.fullmatch(value) else None


def _refused(given: Any, raw: Mapping[str, Any]) -> list[str]:
    """The fields that have an effect in PEFT and none in fastlora, except init_lora_weights, as "name=value"."""
    known = _IGNORED | PeftConfig.__dataclass_fields__.keys() | {"init_lora_weights", "bias"}
    refused = []
    for f in dataclasses.fields(given):
        value = raw[f.name]
        default = f.default
        if f.default_factory is not dataclasses.MISSING:
            default = f.default_factory()
        empty = value is None or value is False or value in ([], {}, "")
        if f.name in ("ensure_weight_tying", "inference_mode"):
            supported = value is False
        else:
            supported = f.name in known or empty or value == default
        if not supported:
            refused.append(f"{f.name}={value!r}")
    custom = getattr(given, "_custom_modules", None)
    if custom:
        names = ", ".join(kind.__name__ for kind in custom)
        refused.append(f"custom modules for {names}")
    return refused


def _unused(rules: PeftConfig, every: list[str], adapted: list[str]) -> list[tuple[str, str]]:
    """(field, name) of each name in a list, and each key of a pattern, that matches nothing."""
    found = []
    for name in ("target_modules", "exclude_modules", "target_parameters"):
        for wanted in getattr(rules, name) or ():
            if isinstance(getattr(rules, name), str):
                break  # a regex, not a list of names
            if not any(f".{path}".endswith(f".{wanted}") for path in every):
                found.append((name, wanted))
    for name in ("rank_pattern", "alpha_pattern"):
        for key in getattr(rules, name):
            if not any(re.match(PEFT_KEY.format(key), path) for path in adapted):
                found.append((name, key))
    return found
