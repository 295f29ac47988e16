"""Layers whose call is `F.linear` with their own weight: `nn.Linear`, and Hugging Face's `Conv1D`, which stores it transposed."""

from __future__ import annotations

from typing import Any, TypeGuard

from torch import nn

from fastlora.layers.base import has_hooks
from fastlora.layers.quantised import quantisation


def is_transposed_linear(module: object) -> TypeGuard[nn.Module]:
    """Whether the module is transformers' `Conv1D` or a subclass, found without importing transformers."""
    return isinstance(module, nn.Module) and _conv1d(type(module)) is not None


def is_plain(linear: nn.Module) -> bool:
    """Whether calling the layer is `F.linear` with its own weight and nothing else."""
    return computes_linear(linear) and not has_hooks(linear) and quantisation(linear) is None


def computes_linear(linear: nn.Module) -> bool:
    """Whether the forward of the layer is that of `nn.Linear` or of transformers' `Conv1D`."""
    kind = type(linear)
    if "forward" in linear.__dict__:  # set by hooks of the package accelerate
        return False
    if kind.forward is nn.Linear.forward:
        return True
    conv1d = _conv1d(kind)
    return conv1d is not None and kind.forward is conv1d.forward


def _conv1d(kind: type) -> Any:
    for base in kind.__mro__:  # not in next(), whose default Dynamo of torch 2.6 does not know
        if (base.__module__, base.__name__) == ("transformers.pytorch_utils", "Conv1D"):
            return base
    return None
