"""Several named adapters on one model: add, delete and combine them. `fastlora.model.activate` switches between them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from fastlora.config import LoRAConfig, Targets, check_hyperparameters, is_number
from fastlora.errors import ConfigError, InjectionError
from fastlora.layers.banks import restore_banks
from fastlora.layers.base import LoRALayer, not_finite
from fastlora.layers.experts import LoRAExperts
from fastlora.layers.gated import restore_gated
from fastlora.model.activate import (
    check_exists,
    installed,
    refuse_disabled,
    registry_of,
    set_adapter,
    switch,
    uninstall,
)
from fastlora.model.adapter_registry import Active, AdapterRegistry, set_registry
from fastlora.model.heads import forget_heads
from fastlora.model.inject import inject_lora
from fastlora.model.selection import select_layers, suggest, to_config

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

    The active adapter's wrappers are in the module tree, so training, saving, merging, export and reports use it. The wrappers of the others are stored outside the tree, around the same base layers. They are copied and pickled with the
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


def list_adapters(model: nn.Module) -> list[str]:
    """The names of the model's adapters, active or not, in the order of adding."""
    return list(registry_of(model)[1].adapters)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Delete an adapter; its memory is freed once nothing else (an optimizer) holds its parameters.

    Deleting the active one restores the plain layers and leaves no adapter active. Modules that have been replaced since are kept.
    If several are active, the others stay so.

    Raises: ConfigError if there is no such adapter. InjectionError if it is active inside `disable_adapter` or `use_adapters`.
    """
    owner, registry = registry_of(model)
    check_exists(registry, name)
    active = registry.active
    if active == Active((name,)):
        refuse_disabled(registry)
        uninstall(owner, registry.adapters[name])
        registry.active = Active()
    elif name in active.names:
        if active.samples is not None:
            raise InjectionError(
                f"model: {active} uses it; delete {name!r} outside of use_adapters"
            )
        switch(owner, registry, Active(tuple(other for other in active.names if other != name)))
    del registry.adapters[name]
    registry.spare = {}
    if not registry.adapters:
        restore_banks(owner)
        restore_gated(owner)
        forget_heads(owner)
    set_registry(owner, registry)


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
    owner, registry = registry_of(model)
    _check_new(registry, new_name, "new_name")
    if not isinstance(weights, Mapping) or not weights:
        raise ConfigError(f"weights: expected a mapping of adapter name → weight, got {weights!r}")
    for name, weight in weights.items():
        check_exists(registry, name, "weights")
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
    owner, registry = registry_of(model)
    _check_new(registry, name)
    before, several = registry.active, registry.several
    switch(owner, registry, Active())
    set_registry(owner, None)
    try:
        yield owner
        added = installed(owner)
        if not added:
            raise InjectionError("model: no layer was adapted")
        registry.adapters[name] = added
    finally:
        uninstall(owner, installed(owner))
        set_registry(owner, registry)
        switch(owner, registry, before, several)
        if not registry.adapters:
            restore_banks(owner)
            restore_gated(owner)


def _check_new(registry: AdapterRegistry, name: str, argument: str = "name") -> None:
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{argument}: expected a non-empty string, got {name!r}")
    if name in registry.adapters:
        raise ConfigError(f"{argument}: the model already has an adapter {name!r}; delete it first")


def _why_not_combinable(layer: LoRALayer) -> str | None:
    if layer.lora_magnitude is not None:
        return "has DoRA, whose update is not a product of two factors"
    if isinstance(layer, LoRAExperts):
        return "adapts a bank of experts, which is not supported"
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
