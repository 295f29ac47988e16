"""State of a model outside its module tree: its named adapters, and what PEFT's format says of the model besides them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fastlora.layers.base import LoRALayer

_KEY = "_fastlora_adapters"
_PEFT = "_fastlora_peft"


@dataclass(eq=False)
class Use:
    """An open context of `use_adapter`. before: the adapter that is active again when it ends."""

    before: str | None


@dataclass(eq=False)
class AdapterRegistry:
    """The named adapters of one model.

    adapters: name → its wrappers by path, under every path of a shared module, in the order of adding.
    active: the adapter whose wrappers are in the module tree, or None.
    uses: the open contexts of `use_adapter`, the latest last.
    """

    adapters: dict[str, dict[str, LoRALayer]]
    active: str | None
    uses: list[Use] = field(default_factory=list)

    def layers(self, name: str | None) -> dict[str, LoRALayer]:
        """The wrappers of one adapter by path; none for None."""
        return {} if name is None else self.adapters[name]


def get_registry(module: nn.Module) -> AdapterRegistry | None:
    """The registry stored on `module` itself, or None."""
    registry: AdapterRegistry | None = module.__dict__.get(_KEY)
    return registry


def set_registry(module: nn.Module, registry: AdapterRegistry | None) -> None:
    """Store `registry` on `module` as a plain attribute; None or an empty registry removes it."""
    if registry is not None and registry.adapters:
        module.__dict__[_KEY] = registry
    else:
        module.__dict__.pop(_KEY, None)


def record_peft(module: nn.Module, fields: Mapping[str, Any]) -> None:
    """Store the fields of PEFT's config that say what the model is and is used for, for `save_pretrained`; None keeps the value there is."""
    given = {name: value for name, value in fields.items() if value is not None}
    if given:
        module.__dict__[_PEFT] = recorded_peft(module) | given


def recorded_peft(module: nn.Module) -> dict[str, Any]:
    """What `record_peft` stored on `module` itself."""
    return dict(module.__dict__.get(_PEFT, {}))


def forget_peft(module: nn.Module) -> None:
    """Remove what `record_peft` stored on `module`."""
    module.__dict__.pop(_PEFT, None)


def registries(model: nn.Module) -> Iterator[tuple[str, AdapterRegistry]]:
    """(path, registry) of the model and of every submodule that has one."""
    for path, module in model.named_modules():
        registry = get_registry(module)
        if registry is not None:
            yield path, registry


def inactive_adapters(model: nn.Module) -> list[str]:
    """Names of the adapters of the model or a submodule that are not in the module tree."""
    return [name for _, r in registries(model) for name in r.adapters if name != r.active]


def none_active(model: nn.Module) -> str:
    """The start of a message about a model without an active adapter: "model: has no adapters", or with the names of the inactive ones."""
    inactive = inactive_adapters(model)
    if not inactive:
        return "model: has no adapters"
    return f"model: has only the inactive adapters {', '.join(inactive)} (see set_adapter)"


def drop_registries(model: nn.Module) -> None:
    """Remove all registries; the module tree does not change."""
    for module in model.modules():
        set_registry(module, None)


def copy_active(model: nn.Module, memo: Mapping[int, Any] | None = None) -> nn.Module:
    """A deep copy of the module tree, without inactive adapters.

    memo: id → replacement of that object in the copy, as in `copy.deepcopy`.
    """
    skipped: dict[int, Any] = {id(registry): None for _, registry in registries(model)}
    twin = copy.deepcopy(model, {**(memo or {}), **skipped})
    drop_registries(twin)
    return twin
