"""Several named adapters on one model: add, switch, delete and combine them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from fastlora.config import LoRAConfig, Targets, check_hyperparameters, is_number
from fastlora.errors import ConfigError, InjectionError, nearest
from fastlora.layers.base import LoRALayer, named_lora_layers, not_finite
from fastlora.layers.offload import execution_device
from fastlora.model.adapter_registry import (
    AdapterRegistry,
    Use,
    get_registry,
    registries,
    set_registry,
)
from fastlora.model.heads import forget_heads
from fastlora.model.inject import inject_lora
from fastlora.model.selection import select_layers, suggest, to_config
from fastlora.model.switch import disable_alike
from fastlora.model.wrappers import unwrapped

DEFAULT_NAME = "default"

Method = Literal["cat", "svd"]
_METHODS = ("cat", "svd")


def add_adapter(
    model: nn.Module,
    name: str,
    target_modules: Targets | LoRAConfig | None = None,
    rank: int = 4,
    alpha: float = 8.0,
    dropout: float = 0.0,
    *,
    activate: bool = False,
) -> int:
    """Add an adapter under a new name to `model`. Returns the number of its layers.

    At most one adapter is active: its wrappers are in the module tree, so training, saving, merging, export and reports use
    it. The wrappers of the others are stored outside the tree, around the same base layers. They are copied and pickled with the
    model, and follow its device and training mode when they become active; their dtype and `requires_grad` do not change. The
    adapter of `inject_lora` and `from_pretrained` is called "default".

    target_modules, rank, alpha, dropout: as in `inject_lora`. The adapters of one model may differ in all of them.
    activate: make it the active one. Otherwise the active adapter does not change.

    Raises: ConfigError if the name is taken, or for `modules_to_save` or `bias` if there are other adapters. InjectionError as
    `inject_lora`, if no layer matches, inside `disable_adapter`, or if a module of the active adapter was replaced. The model is
    unchanged then.
    """
    config = to_config(model, target_modules, rank, alpha, dropout)
    if (config.modules_to_save or config.bias != "none") and list_adapters(model):
        raise ConfigError(
            "modules_to_save, bias: expected none if the model has other adapters: all adapters share its heads and biases, "
            "so training them for one would change the others"
        )
    with inject_as(model, name) as plain:
        if config.target_modules is not None and not select_layers(plain, config):
            raise InjectionError(
                f"model: no layer matches {config.target_modules!r}{suggest(plain, config)}"
            )
        count = inject_lora(plain, target_modules, rank, alpha, dropout)
    if activate:
        set_adapter(model, name)
    return count


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Make the adapter `name` the active one; with None no adapter is active, and the model has its own keys.

    The time is proportional to the layers of the two adapters. Parameters stay the same objects, so an optimizer can continue with
    its adapter after switching away and back. Base layers and wrappers keep their hooks. An alias of an adapted
    layer that was added to the model after injection is not switched.

    Raises: ConfigError if there is no such adapter. InjectionError inside `disable_adapter`, or naming each path whose module was
    replaced (merged, quantised, assigned) since the adapter was installed. The model is unchanged then.
    """
    _activate(model, name)


def active_adapter(model: nn.Module) -> str | None:
    """The name of the active adapter, or None."""
    return _registry(model)[1].active


def list_adapters(model: nn.Module) -> list[str]:
    """The names of the model's adapters, active or not, in the order of adding."""
    return list(_registry(model)[1].adapters)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Delete an adapter; its memory is freed once nothing else (an optimizer) holds its parameters.

    Deleting the active one restores the plain layers and leaves no adapter active. Modules that have been replaced since are kept.

    Raises: ConfigError if there is no such adapter. InjectionError if it is the active one inside `disable_adapter`.
    """
    owner, registry = _registry(model)
    _check_exists(registry, name)
    if name == registry.active:
        _refuse_disabled(registry)
        _uninstall(owner, registry.adapters[name])
        registry.active = None
    del registry.adapters[name]
    if not registry.adapters:
        forget_heads(owner)
    set_registry(owner, registry)


@contextmanager
def use_adapter(model: nn.Module, name: str | None) -> Iterator[None]:
    """Context manager: the adapter `name` is active, or none with None; the previous one is restored afterwards.

    The switch belongs to the model, not to the thread. Of contexts that overlap without being nested, the one entered last decides
    until it ends, and the last to end restores the adapter from before the first.

    If the adapters are disabled when it ends, by a context that overlaps, so is the one that it restores.

    Raises: as `set_adapter`, on entry and, except for `disable_adapter`, on exit.
    """
    use = Use(active_adapter(model))
    set_adapter(model, name)
    uses = _registry(model)[1].uses
    uses.append(use)
    try:
        yield
    finally:
        later = uses[uses.index(use) + 1 :]
        uses.remove(use)
        if later:
            later[0].before = use.before
        else:
            _activate(model, use.before, disabled_too=True)


def combine_adapters(
    model: nn.Module,
    weights: Mapping[str, float],
    new_name: str,
    method: Method = "cat",
    rank: int | None = None,
) -> int:
    """Add the adapter ΔW = Σ w · ΔW_name over `weights`, for every layer that has one of them, without activating it.

    weights: name → w, any finite number; a negative one subtracts the adapter.
    method: "cat" concatenates the factors: exact, and the ranks of a layer add up. "svd" is the best approximation of a
        lower rank; no (out_features, in_features) matrix is formed.
    rank: for "svd" only, the highest rank of a layer; None uses the highest among its adapters.
    Returns the number of its layers. The new adapter has scaling 1, no dropout, new parameters in float32 or wider, and the
    backends of its sources. Training those later does not change it.

    Source: "Editing models with task arithmetic", arXiv 2212.04089; PEFT's add_weighted_adapter.

    Raises: ConfigError for an unknown or taken name, for an invalid weight, method or rank, and for a sum that is not finite. InjectionError if the adapters wrap
    different base layers, have DoRA, or adapt a convolution with groups.
    """
    owner, registry = _registry(model)
    _check_new(registry, new_name, "new_name")
    if not isinstance(weights, Mapping) or not weights:
        raise ConfigError(f"weights: expected a mapping of adapter name → weight, got {weights!r}")
    for name, weight in weights.items():
        _check_exists(registry, name, "weights")
        if not is_number(weight) or not math.isfinite(weight):
            raise ConfigError(f"weights[{name!r}]: expected a finite number, got {weight!r}")
    if method not in _METHODS:
        raise ConfigError(f"method: expected one of {', '.join(_METHODS)}, got {method!r}")
    if rank is not None:
        if method == "cat":
            raise ConfigError('rank: the ranks add up under "cat"; use method="svd"')
        check_hyperparameters(rank, 1.0, 0.0)
    bases: dict[str, nn.Module] = {}
    parts: dict[nn.Module, dict[LoRALayer, float]] = {}
    for name, weight in weights.items():
        for path, layer in registry.adapters[name].items():
            base = layer.wrapped
            if bases.setdefault(path, base) is not base:
                raise InjectionError(
                    f"weights: at {path} the adapter {name!r} wraps a different layer"
                )
            reason = _why_not_combinable(layer)
            if reason is not None:
                raise InjectionError(f"weights: {path} of {name!r} {reason}")
            parts.setdefault(base, {})[layer] = float(weight)
    combined = {base: _combined(layers, method, rank) for base, layers in parts.items()}
    registry.adapters[new_name] = {path: combined[base] for path, base in bases.items()}
    set_registry(owner, registry)
    return len(combined)


@contextmanager
def inject_as(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """Context manager that yields the plain model; the layers injected into it become the inactive adapter `name`.

    The adapter that was active before is active again afterwards. On an exception nothing changes.

    Raises: as `add_adapter`; InjectionError if nothing was injected.
    """
    owner, registry = _registry(model)
    _check_new(registry, name)
    before = registry.active
    _switch(owner, registry, None)
    set_registry(owner, None)
    try:
        yield owner
        added = _installed(owner)
        if not added:
            raise InjectionError("model: no layer was adapted")
        registry.adapters[name] = added
    finally:
        _uninstall(owner, _installed(owner))
        set_registry(owner, registry)
        _switch(owner, registry, before)


def _registry(model: nn.Module) -> tuple[nn.Module, AdapterRegistry]:
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
    layers = _installed(owner)
    if "" in layers:
        raise InjectionError(
            "model: is itself an adapted layer; pass the model that contains it, or put it inside an nn.Module"
        )
    if not layers:
        return owner, AdapterRegistry({}, None)
    return owner, AdapterRegistry({DEFAULT_NAME: layers}, DEFAULT_NAME)


def _installed(model: nn.Module) -> dict[str, LoRALayer]:
    """Every wrapper in the module tree by path, under all its paths."""
    return dict(named_lora_layers(model, remove_duplicate=False))


def _activate(model: nn.Module, name: str | None, *, disabled_too: bool = False) -> None:
    owner, registry = _registry(model)
    existing = None if name is None else _check_exists(registry, name)
    _switch(owner, registry, existing, disabled_too=disabled_too)
    set_registry(owner, registry)


def _switch(
    owner: nn.Module, registry: AdapterRegistry, name: str | None, *, disabled_too: bool = False
) -> None:
    """Replace the wrappers of the active adapter by those of `name`. All paths are checked before the first changes.

    disabled_too: if the active adapter is disabled, disable the other as well, instead of raising.
    """
    if name == registry.active:
        return
    if not disabled_too:
        _refuse_disabled(registry)
    old, new = registry.layers(registry.active), registry.layers(name)
    problems, swaps = [], []
    for path in old | new:
        parent, attribute, present = _look_up(owner, path)
        if attribute == "_orig_mod":
            problems.append(f"{path}: is compiled by itself, and would go on running its old code")
            continue
        if path in old and present is not old[path]:
            problems.append(
                f"{path}: the wrapper of {registry.active!r} was replaced by {_describe(present)}"
            )
            continue
        plain = old[path].wrapped if path in old else present
        if path in new:
            layer = new[path]
            if layer.wrapped is not plain:
                problems.append(
                    f"{path}: the layer under {name!r} was replaced by {_describe(plain)}"
                )
            elif (_device(layer).type == "meta") != (layer.wrapped_device.type == "meta"):
                problems.append(f"{path}: the layer or the adapter {name!r} is on meta")
        swaps.append((parent, attribute, new.get(path, plain)))
    if problems:
        raise InjectionError(
            f"cannot switch from {registry.active!r} to {name!r}: " + "; ".join(problems)
        )
    for layer in new.values():
        _match_base(layer)
    disable_alike(old.values(), new.values())
    for parent, attribute, module in swaps:
        setattr(parent, attribute, module)
    registry.active = name


def _match_base(layer: LoRALayer) -> None:
    """Move the wrapper to its base layer's device and training mode."""
    device = layer.wrapped_device
    if _device(layer) != device:
        layer._apply(lambda t: t.to(device), recurse=False)
    layer.training = layer.wrapped.training


def _device(layer: LoRALayer) -> torch.device:
    """The device on which the adapter's parameters are used, whether they are offloaded or not."""
    return execution_device(layer, "lora_A")


def _uninstall(owner: nn.Module, layers: Mapping[str, LoRALayer]) -> None:
    """Restore the wrapped layer at each path that still has the wrapper."""
    for path, layer in layers.items():
        parent, attribute, present = _look_up(owner, path)
        if present is layer:
            setattr(parent, attribute, layer.wrapped)


def _look_up(owner: nn.Module, path: str) -> tuple[nn.Module, str, nn.Module | None]:
    """(parent, attribute, module) at `path`; the module is None if it or its parent is missing."""
    place, _, attribute = path.rpartition(".")
    try:
        parent = owner.get_submodule(place)
    except AttributeError:
        return owner, attribute, None
    return parent, attribute, parent._modules.get(attribute)


def _describe(module: nn.Module | None) -> str:
    return "nothing" if module is None else f"another {type(module).__name__}"


def _refuse_disabled(registry: AdapterRegistry) -> None:
    if any(layer.disabled for layer in registry.layers(registry.active).values()):
        raise InjectionError(
            f"model: its adapter {registry.active!r} is disabled; switch adapters outside of disable_adapter"
        )


def _check_new(registry: AdapterRegistry, name: str, argument: str = "name") -> None:
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{argument}: expected a non-empty string, got {name!r}")
    if name in registry.adapters:
        raise ConfigError(f"{argument}: the model already has an adapter {name!r}; delete it first")


def _check_exists(registry: AdapterRegistry, name: str, argument: str = "name") -> str:
    if name in registry.adapters:
        return name
    names = list(registry.adapters)
    if not names:
        raise ConfigError(f"{argument}: the model has no adapters, so none is called {name!r}")
    close = nearest(str(name), names) or f"; it has {', '.join(names[:5])}"
    raise ConfigError(f"{argument}: the model has no adapter {name!r}{close}")


def _why_not_combinable(layer: LoRALayer) -> str | None:
    if layer.lora_magnitude is not None:
        return "has DoRA, whose update is not a product of two factors"
    if getattr(layer.wrapped, "groups", 1) != 1:
        return "wraps a convolution with groups, whose factors cannot be concatenated"
    return None


@torch.no_grad()
def _combined(layers: Mapping[LoRALayer, float], method: Method, rank: int | None) -> LoRALayer:
    """A wrapper around the base layer of `layers` whose update is the weighted sum of theirs."""
    first, dtype = next(iter(layers)), torch.float32
    all_a, all_b = [], []
    for layer, weight in layers.items():
        dtype = torch.promote_types(dtype, layer.lora_A.dtype)
        a, b = (f.flatten(1).to(first.wrapped_device, torch.float64) for f in layer.factors())
        all_a.append(a)
        all_b.append(b * (weight * layer.scaling))
    a, b = torch.cat(all_a), torch.cat(all_b, 1)  # [ΣR, K], [N, ΣR]
    _refuse_not_finite(a, b)
    if method == "svd":
        a, b = _truncated(a, b, rank or max(layer.rank for layer in layers))
    total = a.shape[0]
    fresh = type(first)(
        first.wrapped, total, float(total), adapter_dtype=dtype, backend=first.backend
    )
    fresh.lora_A.copy_(a.view_as(fresh.lora_A))
    fresh.lora_B.copy_(b.view_as(fresh.lora_B))
    _refuse_not_finite(fresh.lora_A, fresh.lora_B)
    return fresh


def _refuse_not_finite(*factors: Tensor) -> None:
    for factor in factors:
        if bool(not_finite(factor).any()):
            raise ConfigError(f"weights: the sum has values that are not finite in {factor.dtype}")


def _truncated(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors of the best approximation of b a of at most `rank`: a with orthonormal rows, the singular values in b.

    With a = (Qa Ra)ᵀ and b = Qb Rb, the singular values of b a are those of Rb Raᵀ, which is ΣR×ΣR at most.
    """
    qa, ra = torch.linalg.qr(a.T)  # [K, Q], [Q, ΣR]
    qb, rb = torch.linalg.qr(b)  # [N, P], [P, ΣR]
    u, s, vh = torch.linalg.svd(rb @ ra.T, full_matrices=False)
    kept = slice(min(rank, s.numel()))
    return vh[kept] @ qa.T, qb @ (u[:, kept] * s[kept])
