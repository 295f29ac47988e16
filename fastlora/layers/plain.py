"""What a wrapped layer does beyond `F.linear` with its own weight: nothing in `nn.Linear` and Hugging Face's `Conv1D`, unless it has hooks."""

from __future__ import annotations

from typing import Any, TypeGuard

from torch import nn
from torch.nn.modules import module as _modules

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


def has_hooks(module: nn.Module) -> bool:
    """Whether the layer has forward or backward hooks, or a forward that a package set on the instance."""
    return "forward" in module.__dict__ or bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def has_global_hooks() -> bool:
    """Whether hooks of every module's calls are registered."""
    return bool(
        _modules._global_forward_hooks
        or _modules._global_forward_pre_hooks
        or _modules._global_backward_hooks
        or _modules._global_backward_pre_hooks
    )


def attribute(module: nn.Module, name: str) -> Any:
    """The module's attribute `name`, in a third of the time if it is a registered parameter: `nn.Module` searches for that last."""
    found = None if name in module.__dict__ else module._parameters.get(name)
    return getattr(module, name) if found is None else found
