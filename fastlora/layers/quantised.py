"""Weights quantised by bitsandbytes or torchao, recognised by their class without importing either."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

_PACKAGES = ("bitsandbytes", "torchao")


def quantisation(module: nn.Module) -> str | None:
    """The package that quantises the layer's weight, or None."""
    weight = module._parameters.get("weight")
    if weight is None or type(weight) is nn.Parameter:
        return None
    package = type(weight).__module__.partition(".")[0]
    return package if package in _PACKAGES else None


def dequantised(module: nn.Module) -> Tensor:
    """The layer's weight in floating point, dequantised if necessary.

    Source: bitsandbytes' `dequantize_4bit` and `int8_vectorwise_dequant`, torchao's `Tensor.dequantize`.
    """
    weight: Any = module.weight
    package = quantisation(module)
    if package is None or (package == "bitsandbytes" and weight.data.is_floating_point()):
        return cast(Tensor, weight)  # including a layer of bitsandbytes that is not quantised yet
    if package == "torchao":
        return cast(Tensor, weight.dequantize())
    from bitsandbytes import functional

    if getattr(weight, "quant_state", None) is not None:
        return cast(Tensor, functional.dequantize_4bit(weight.data, weight.quant_state))
    scale = weight.SCB if weight.SCB is not None else module.state.SCB  # type: ignore[union-attr]
    return cast(Tensor, functional.int8_vectorwise_dequant(weight.data, scale))


def compute_dtype(module: nn.Module) -> torch.dtype:
    """The expected dtype of the layer's input: the weight's, or the compute dtype of a quantised weight."""
    weight = cast(Tensor, module.weight)
    if weight.is_floating_point():
        return weight.dtype
    own = getattr(module, "compute_dtype", None)
    return own if isinstance(own, torch.dtype) else torch.float32
