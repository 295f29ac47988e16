"""Weights that torch cannot multiply: quantised by bitsandbytes or torchao, or stored in 8 bits or fewer.

The packages are recognised by the class of the weight or the forward that computes with it, without importing them.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from fastlora.config import computes_in
from fastlora.errors import MergeError
from fastlora.layers.offload import loaded, offload_hook

_PACKAGES = ("bitsandbytes", "torchao")
_CONVOLVES = tuple(conv.forward for conv in (nn.Conv1d, nn.Conv2d, nn.Conv3d))


def quantisation(module: nn.Module) -> str | None:
    """The package that quantises the layer's weight and computes with it, or None.

    For a float8 weight it is the package of the layer's forward: "transformers" (`FP8Linear`), "accelerate" or "diffusers" (a
    hook that casts the weight in every call), or "torch", which cannot compute with it.
    """
    weight = module._parameters.get("weight")
    if weight is None or type(weight) is nn.Parameter:
        if weight is None or computes_in(weight.dtype) or not weight.is_floating_point():
            return None
        forward: Any = module.forward
        return str(getattr(forward, "func", forward).__module__).partition(".")[0]
    package = type(weight).__module__.partition(".")[0]
    return package if package in _PACKAGES else None


def dequantised(module: nn.Module) -> Tensor:
    """The layer's weight in floating point, dequantised if necessary, and loaded if it is offloaded.

    Source: bitsandbytes' `dequantize_4bit` and `int8_vectorwise_dequant`, torchao's `Tensor.dequantize`.

    Raises: MergeError if its values are unknown.
    """
    package = quantisation(module)
    if package is None:
        return loaded(module, "weight")
    reason = why_unreadable(module)
    if reason is not None:
        raise MergeError(f"weight: {reason}")
    weight: Any = module.weight
    if not computes_in(weight.dtype) and weight.is_floating_point():
        return loaded(module, "weight").float()
    if package == "bitsandbytes" and weight.data.is_floating_point():
        return cast(Tensor, weight)  # not quantised yet
    if package == "torchao":
        return cast(Tensor, weight.dequantize())
    from bitsandbytes import functional

    if getattr(weight, "quant_state", None) is not None:
        return cast(Tensor, functional.dequantize_4bit(weight.data, weight.quant_state))
    scale = weight.SCB if weight.SCB is not None else module.state.SCB  # type: ignore[union-attr]
    return cast(Tensor, functional.int8_vectorwise_dequant(weight.data, scale))


def why_unreadable(module: nn.Module) -> str | None:
    """Why the values of the layer's weight are unknown, or None if `dequantised` returns them."""
    weight, package = cast(Tensor, module.weight), quantisation(module)
    if package is None:
        return None
    if type(weight) is not nn.Parameter and offload_hook(module) is not None:
        return f"the weight is quantised by {package} and offloaded, so its values are unknown"
    scaled = type(module).forward not in (nn.Linear.forward, nn.Embedding.forward, *_CONVOLVES)
    if type(weight) is nn.Parameter and scaled:
        return f"the weight is stored in {weight.dtype} with scales that only {package} knows"
    return None


def why_not_computable(layer: nn.Module) -> str | None:
    """Why an adapted layer cannot compute with a weight of this dtype, or None if it can."""
    dtype, kind = cast(Tensor, layer.weight).dtype, type(layer).__name__
    package = quantisation(layer)
    if package == "torch":
        return f"{kind} holds a {dtype} weight, which torch cannot multiply"
    if package is not None or dtype.is_floating_point:
        return None
    if dtype.is_complex:
        return f"{kind} holds a {dtype} weight, expected real numbers"
    return f"{kind} holds a {dtype} weight of an unknown quantisation"


def compute_dtype(module: nn.Module) -> torch.dtype:
    """The expected dtype of the layer's input: the weight's, or the compute dtype of a quantised weight."""
    weight = cast(Tensor, module.weight)
    if computes_in(weight.dtype):
        return weight.dtype
    own = getattr(module, "compute_dtype", None)
    return own if isinstance(own, torch.dtype) else torch.float32
