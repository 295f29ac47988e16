"""State of a model outside its module tree: its named adapters, and what PEFT's format says of the model besides them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fastlora.layers.base import LoRALayer
from fastlora.layers.several import Samples, SeveralAdapters

_KEY = "_fastlora_adapters"
_PEFT = "_fastlora_peft"


@dataclass(frozen=True)
class Active:
    """Which adapters of a model are active.

    names: none, one, or several, whose updates are summed unless there are samples. samples: the adapter of each sample of a mixed batch.
    """

    names: tuple[str, ...] = ()
    samples: Samples | None = None

    @property
    def together(self) -> bool:
        """Whether layers may have several adapters at once, so that `SeveralAdapters` are in the module tree."""
        return self.samples is not None or len(self.names) > 1

    def __str__(self) -> str:
        names = " + ".join(map(repr, self.names)) or "None"
        return names if self.samples is None else f"a mixed batch of {names.replace(' +', ',')}"


@dataclass(eq=False)
class Use:
    """An open context. before, several: what is active and in the module tree again when it ends, as in `AdapterRegistry`."""

    before: Active
    several: dict[str, SeveralAdapters] = field(default_factory=dict)


@dataclass(eq=False)
class AdapterRegistry:
    """The named adapters of one model.

    adapters: name → its wrappers by path, under every path of a shared module, in the order of adding.
    active: the adapters whose wrappers are in the module tree.
    uses: the open contexts of `use_adapter` and `use_adapters`, the latest last.
    several: path → what is in the module tree instead of the wrappers of several active adapters. spare: the last such modules, to be used again.
    """

    adapters: dict[str, dict[str, LoRALayer]]
    active: Active = field(default_factory=Active)
    uses: list[Use] = field(default_factory=list)
    several: dict[str, SeveralAdapters] = field(default_factory=dict)
    spare: dict[str, SeveralAdapters] = field(default_factory=dict)

    def layers(self) -> list[LoRALayer]:
        """The wrappers of the active adapters."""
        return [layer for name in self.active.names for layer in self.adapters[name].values()]

    def installed(self) -> dict[str, LoRALayer | SeveralAdapters]:
        """Path → what the active adapters have in the module tree."""
        found: dict[str, LoRALayer | SeveralAdapters] = {}
        for name in self.active.names:
            found |= self.adapters[name]
        return found | self.several

    def __setstate__(self, state: dict[str, Any]) -> None:
        if not isinstance(
            state["active"], Active
        ):  # of a pickle from before several could be active
            name = state["active"]
            state = {**state, "active": Active(() if name is None else (name,))}
        self.__dict__.update({"several": {}, "spare": {}} | state)


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
    return [name for _, r in registries(model) for name in r.adapters if name not in r.active.names]


def none_active(model: nn.Module) -> str:
    """The start of a message about a model without an active adapter: "model: has no adapters", or with the names of the inactive ones."""
    inactive = inactive_adapters(model)
    if not inactive:
        return "model: has no adapters"
    return f"model: has only the inactive adapters {', '.join(inactive)} (see set_adapter)"


def why_not_one(model: nn.Module) -> str | None:
    """Why `model` is not that of one adapter, as some functions require, or None: several are active at once."""
    active = [str(r.active) for _, r in registries(model) if r.active.together]
    if not active and not any(isinstance(module, SeveralAdapters) for module in model.modules()):
        return None
    return (
        f"model: has several active adapters ({', '.join(active) or 'of the model that it is a part of'}), expected one; "
        "use it inside `with fastlora.use_adapter(model, name):`"
    )


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
