"""Tensors that the package accelerate offloads: on meta between calls, loaded by a hook around the forward of their module.

The hook is recognised by its attributes, without importing accelerate.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn


def offload_hook(module: nn.Module) -> Any | None:
    """The hook (accelerate's `AlignDevicesHook`) that offloads the module's own tensors, or None."""
    return next((h for h in _hooks(module.__dict__.get("_hf_hook")) if _offloads(h)), None)


def execution_device(module: nn.Module, name: str = "weight") -> torch.device:
    """The device on which the module computes with its tensor `name`: meta only if nothing loads it."""
    tensor = cast(Tensor, getattr(module, name))
    hook = offload_hook(module) if tensor.is_meta else None
    # Through a tensor, since a hook may name "cuda" or 0.
    return tensor.device if hook is None else torch.empty(0, device=hook.execution_device).device


def loaded(module: nn.Module, name: str) -> Tensor:
    """The module's tensor `name`, a copy on the execution device if it is offloaded."""
    tensor = cast(Tensor, getattr(module, name))
    hook = offload_hook(module) if tensor.is_meta else None
    if hook is None:
        return tensor
    value: Tensor = hook.weights_map[name]
    return value.detach().to(execution_device(module, name), tensor.dtype)


def loaded_from_above(model: nn.Module) -> dict[nn.Module, str]:
    """Module → path of the module whose hook offloads the tensors of all its submodules by their names, which no layer may change."""
    return {
        inner: path
        for path, module in model.named_modules()
        if getattr(offload_hook(module), "place_submodules", False)
        for inner in module.modules()
    }


def _hooks(hook: Any) -> Iterator[Any]:
    yield hook
    for inner in getattr(hook, "hooks", ()):  # accelerate's `SequentialHook`, which may be nested
        yield from _hooks(inner)


def _offloads(hook: Any) -> bool:
    return getattr(hook, "offload", False) is True
