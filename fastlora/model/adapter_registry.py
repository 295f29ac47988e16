"""What a model remembers beside its module tree: its named adapters, and what trains beside adapters."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastlora.layers.base import LoRALayer

_KEY = "_fastlora_adapters"
# On a module: names of its own parameters that `bias` and `modules_to_save` of a config let train.
EXTRA_TRAINABLE = "_fastlora_extra_trainable"


@dataclass(eq=False)
class AdapterRegistry:
    """adapters: name → its wrappers by path, under every path of a shared module, in the order of adding.
    active: the one whose wrappers stand in the module tree, or None.
    """

    adapters: dict[str, dict[str, LoRALayer]]
    active: str | None


def get_registry(module: nn.Module) -> AdapterRegistry | None:
    """The record that `module` itself keeps."""
    registry: AdapterRegistry | None = module.__dict__.get(_KEY)
    return registry


def set_registry(module: nn.Module, registry: AdapterRegistry | None) -> None:
    """Keep `record` in `module`, as a plain attribute; None, or a record without adapters, takes it away."""
    if registry is not None and registry.adapters:
        module.__dict__[_KEY] = registry
    else:
        module.__dict__.pop(_KEY, None)


def registries(model: nn.Module) -> Iterator[tuple[str, AdapterRegistry]]:
    """(path, record) of the model and of every part of it that keeps one."""
    for path, module in model.named_modules():
        registry = get_registry(module)
        if registry is not None:
            yield path, registry


def inactive_adapters(model: nn.Module) -> list[str]:
    """Names of the adapters that are kept for the model or a part of it and do not stand in the module tree."""
    return [name for _, r in registries(model) for name in r.adapters if name != r.active]


def clear_extra_trainable(model: nn.Module) -> None:
    """Forget what trains beside adapters that are gone."""
    for module in model.modules():
        module.__dict__.pop(EXTRA_TRAINABLE, None)


def drop_registries(model: nn.Module) -> None:
    """Forget all named adapters; what stands in the module tree stays there."""
    for module in model.modules():
        set_registry(module, None)


def copy_active(model: nn.Module, memo: Mapping[int, Any] | None = None) -> nn.Module:
    """A deep copy of the module tree as it stands; inactive adapters are not copied.

    memo: id → what stands for the object in the copy, as `copy.deepcopy` takes it.
    """
    skipped: dict[int, Any] = {id(registry): None for _, registry in registries(model)}
    twin = copy.deepcopy(model, {**(memo or {}), **skipped})
    drop_registries(twin)
    return twin
