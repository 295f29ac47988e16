"""Which of a model's named adapters are active: one, none, the sum of several, or one for each sample of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from fastlora.errors import ConfigError, InjectionError, nearest
from fastlora.layers.base import LoRALayer, named_lora_layers
from fastlora.layers.experts import LoRAExperts
from fastlora.layers.offload import execution_device
from fastlora.layers.plain import has_hooks
from fastlora.layers.several import SeveralAdapters
from fastlora.model.adapter_registry import (
    Active,
    AdapterRegistry,
    Use,
    get_registry,
    registries,
    set_registry,
    why_not_one,
)
from fastlora.model.switch import disable_alike
from fastlora.model.wrappers import unwrapped

DEFAULT_NAME = "default"


def set_adapter(model: nn.Module, name: str | Sequence[str] | None) -> None:
    """Make the adapter `name` the active one; with None no adapter is active, and the model has its own keys.

    The time is proportional to the layers of the adapters. Parameters stay the same objects, so an optimizer can continue with
    its adapter after switching away and back. Base layers and wrappers keep their hooks. An alias of an adapted
    layer that was added to the model after injection is not switched.

    name: with a list of several names their updates are added, and all of them train. A layer that several of them adapt then has its
        parameters under `<path>.adapter_<name>.lora_A`, and the base layer's under each of these. What saves, merges or exports one
        adapter refuses such a model.

    Raises: ConfigError if there is no such adapter, or a list is empty or names one twice. InjectionError inside `disable_adapter`, or
    naming each path whose module was replaced (merged, quantised, assigned) since the adapter was installed, or that should have several
    wrappers of which one has hooks, which would not run. The model is unchanged then.
    """
    owner, registry = registry_of(model)
    switch(owner, registry, _named(registry, name))
    set_registry(owner, registry)


def active_adapter(model: nn.Module) -> str | None:
    """The name of the active adapter, or None. Raises: InjectionError if several are active."""
    active = registry_of(model)[1].active
    if active.together:
        raise InjectionError(
            f"model: has several active adapters ({active}), expected one at most; see active_adapters"
        )
    return active.names[0] if active.names else None


def active_adapters(model: nn.Module) -> list[str]:
    """The names of all active adapters; inside `use_adapters`, of those in the batch."""
    return list(registry_of(model)[1].active.names)


@contextmanager
def use_adapter(model: nn.Module, name: str | Sequence[str] | None) -> Iterator[None]:
    """Context manager: what `set_adapter(model, name)` makes active; what was active before is restored afterwards.

    The switch belongs to the model, not to the thread. Of contexts that overlap without being nested, the one entered last decides
    until it ends, and the last to end restores the adapter from before the first.

    If the adapters are disabled when it ends, by a context that overlaps, so is the one that it restores.

    Raises: as `set_adapter`, on entry and, except for `disable_adapter`, on exit.
    """
    owner, registry = registry_of(model)
    with _used(owner, registry, _named(registry, name)):
        yield


@contextmanager
def use_adapters(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Context manager: each sample of a batch has an adapter of its own; what was active before is restored afterwards.

    The base product is computed once for the whole batch. Results and gradients are those of the samples apart. Adapters may differ in
    rank, alpha, dropout and layers; one that does not adapt a layer leaves its samples to the base layer there.

    names: the adapter of each sample, that is of each index of the first dimension of every adapted layer's input; None for the base
        model. Samples of one adapter that are neighbours are computed together.

    A copy made inside keeps this state. With activation checkpointing the backward pass belongs inside too. In compiled code each new list of
    names compiles the layers again. Contexts overlap as those of `use_adapter`.

    Raises: ConfigError if there is no such adapter or no name; in a call, if the first dimension of a layer's input is not the number of
    names, or other code reads the weight of an adapted layer. BackendError in a call if an adapter forces the kernels. InjectionError
    as `set_adapter`, and on exit as `use_adapter`.
    """
    owner, registry = registry_of(model)
    if isinstance(names, str) or not isinstance(names, Sequence) or not names:
        raise ConfigError(
            f"names: expected a list with the adapter of each sample or None, got {names!r}"
        )
    wanted = {check_exists(registry, name, "names") for name in names if name is not None}
    order = tuple(name for name in registry.adapters if name in wanted)
    with _used(owner, registry, Active(order, tuple(names))):
        yield


@contextmanager
def _used(owner: nn.Module, registry: AdapterRegistry, active: Active) -> Iterator[None]:
    use = Use(registry.active, registry.several)
    switch(owner, registry, active)
    set_registry(owner, registry)
    uses = registry.uses
    uses.append(use)
    try:
        yield
    finally:
        later = uses[uses.index(use) + 1 :]
        uses.remove(use)
        if later:
            later[0].before, later[0].several = use.before, use.several
        else:
            owner, registry = registry_of(owner)
            for name in use.before.names:
                check_exists(registry, name)
            switch(owner, registry, use.before, use.several, disabled_too=True)
            set_registry(owner, registry)


def registry_of(model: nn.Module) -> tuple[nn.Module, AdapterRegistry]:
    """The module that holds the registry of `model`, without wrappers, and the registry; a new one if there is none."""
    owner = unwrapped(model)
    registry = get_registry(owner)
    if registry is not None:
        return owner, registry
    for path, other in registries(owner):
        names = ", ".join(map(repr, other.adapters))
        raise InjectionError(
            f"model: its submodule {path} has the adapters {names}; pass that submodule"
        )
    reason = why_not_one(owner)
    if reason is not None:
        raise InjectionError(reason)
    layers = installed(owner)
    if "" in layers:
        raise InjectionError(
            "model: is itself an adapted layer; pass the model that contains it, or put it inside an nn.Module"
        )
    if not layers:
        return owner, AdapterRegistry({})
    return owner, AdapterRegistry({DEFAULT_NAME: layers}, Active((DEFAULT_NAME,)))


def installed(model: nn.Module) -> dict[str, LoRALayer]:
    """Every wrapper in the module tree by path, under all its paths."""
    return dict(named_lora_layers(model, remove_duplicate=False))


def check_exists(registry: AdapterRegistry, name: object, argument: str = "name") -> str:
    """The name. Raises: ConfigError if there is no such adapter."""
    if isinstance(name, str) and name in registry.adapters:
        return name
    names = list(registry.adapters)
    if not names:
        raise ConfigError(f"{argument}: the model has no adapters, so none is called {name!r}")
    close = nearest(str(name), names) or f"; it has {', '.join(names[:5])}"
    raise ConfigError(f"{argument}: the model has no adapter {name!r}{close}")


def _named(registry: AdapterRegistry, name: str | Sequence[str] | None) -> Active:
    if name is None:
        return Active()
    if isinstance(name, str) or not isinstance(name, Sequence):
        return Active((check_exists(registry, name),))
    names = tuple(check_exists(registry, one) for one in name)
    if not names or len(set(names)) < len(names):
        raise ConfigError(
            f"name: expected an adapter, None, or a list of different ones, got {name!r}"
        )
    return Active(names)


def switch(
    owner: nn.Module,
    registry: AdapterRegistry,
    active: Active,
    known: Mapping[str, SeveralAdapters] | None = None,
    *,
    disabled_too: bool = False,
) -> None:
    """Replace what the active adapters have in the module tree by what `active` has. All paths are checked before the first changes.

    known: `registry.several` from when `active` was active before; these modules are used again.
    disabled_too: if the active adapters are disabled, disable the others as well, instead of raising.
    """
    before = registry.active
    if active == before:
        return
    if not disabled_too:
        refuse_disabled(registry)
    if None not in (active.samples, before.samples) and active.names == before.names:
        for module in registry.several.values():
            module.route(active.samples)
        registry.active = active
        return
    old = registry.installed()
    wrappers: dict[str, dict[str, LoRALayer]] = {}
    for name in active.names:
        for path, layer in registry.adapters[name].items():
            wrappers.setdefault(path, {})[name] = layer
    places, problems = [], []
    for path in old | wrappers:
        parent, attribute, present = look_up(owner, path)
        if attribute == "_orig_mod":
            problems.append(f"{path}: is compiled by itself, and would go on running its old code")
            continue
        if path in old and present is not old[path]:
            problems.append(f"{path}: the wrapper of {before} was replaced by {_describe(present)}")
            continue
        plain = old[path].wrapped if path in old else present
        new = wrappers.get(path, {})
        problems += _misfits(path, new, plain, active)
        places.append((parent, attribute, path, plain))
    if problems:
        raise InjectionError(f"cannot switch from {before} to {active}: " + "; ".join(problems))
    for layer in {layer: None for found in wrappers.values() for layer in found.values()}:
        match_base(layer)
    several = _joined(wrappers, active, known or registry.spare)
    fresh = [layer for found in wrappers.values() for layer in found.values()]
    disable_alike(registry.layers(), fresh)
    for parent, attribute, path, plain in places:
        found = wrappers.get(path)
        one = plain if not found else several.get(path) or next(iter(found.values()))
        setattr(parent, attribute, one)
    registry.active = active
    registry.spare = registry.several or registry.spare
    registry.several = several


def _misfits(
    path: str, new: Mapping[str, LoRALayer], plain: nn.Module | None, active: Active
) -> list[str]:
    """Why the wrappers of a path cannot be installed around `plain`."""
    problems = []
    together = active.samples is not None or len(new) > 1
    for name, layer in new.items():
        if layer.wrapped is not plain:
            problems.append(f"{path}: the layer under {name!r} was replaced by {_describe(plain)}")
        elif (_device(layer).type == "meta") != (layer.wrapped_device.type == "meta"):
            problems.append(f"{path}: the layer or the adapter {name!r} is on meta")
        elif together and isinstance(layer, LoRAExperts):
            problems.append(f"{path}: a bank of experts has one active adapter at a time")
        elif together and has_hooks(layer):
            problems.append(f"{path}: the wrapper of {name!r} has hooks, which would not run")
    return problems


def _joined(
    wrappers: Mapping[str, Mapping[str, LoRALayer]],
    active: Active,
    known: Mapping[str, SeveralAdapters],
) -> dict[str, SeveralAdapters]:
    """Path → the wrappers there as one module, where there are several, or samples; one for all paths of a shared layer."""
    made: dict[tuple[LoRALayer, ...], SeveralAdapters] = {}
    found = {}
    for path, layers in wrappers.items():
        if active.samples is not None or len(layers) > 1:
            key = tuple(layers.values())
            if key not in made:
                old = known.get(path)
                if old is None or tuple(old.layers) != key:
                    old = SeveralAdapters(path, layers)
                old.training = old.wrapped.training
                old.route(active.samples)
                made[key] = old
            found[path] = made[key]
    return found


def match_base(layer: LoRALayer) -> None:
    """Move the wrapper to its base layer's device and training mode."""
    device = layer.wrapped_device
    if _device(layer) != device:
        layer._apply(lambda t: t.to(device), recurse=False)
    if layer.training != layer.wrapped.training:
        layer.training = layer.wrapped.training


def _device(layer: LoRALayer) -> torch.device:
    """The device on which the adapter's parameters are used, whether they are offloaded or not."""
    return execution_device(layer, "lora_A")


def uninstall(owner: nn.Module, layers: Mapping[str, LoRALayer]) -> None:
    """Restore the wrapped layer at each path that still has the wrapper."""
    for path, layer in layers.items():
        parent, attribute, present = look_up(owner, path)
        if present is layer:
            setattr(parent, attribute, layer.wrapped)


def look_up(owner: nn.Module, path: str) -> tuple[nn.Module, str, nn.Module | None]:
    """(parent, attribute, module) at `path`; the module is None if it or its parent is missing."""
    place, _, attribute = path.rpartition(".")
    try:
        parent = owner.get_submodule(place)
    except AttributeError:
        return owner, attribute, None
    return parent, attribute, parent._modules.get(attribute)


def _describe(module: nn.Module | None) -> str:
    return "nothing" if module is None else f"another {type(module).__name__}"


def refuse_disabled(registry: AdapterRegistry) -> None:
    """Raises: InjectionError if the active adapters are disabled."""
    if any(layer.disabled for layer in registry.layers()):
        raise InjectionError(
            f"model: its adapter {registry.active} is disabled; switch adapters outside of disable_adapter"
        )
