"""Weights that torch cannot multiply: quantised by bitsandbytes or torchao, or stored in 8 bits or fewer.

The packages are recognised by the class of the weight or the forward that computes with it, without importing them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastlora.config import computes_in
from fastlora.errors import MergeError
from fastlora.layers.offload import loaded, offload_hook
from fastlora.ops.linear import no_autocast

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
        return reader(module)(weight.dtype)
    state = getattr(weight, "quant_state", None)
    return reader(module)(torch.float32 if state is None else state.dtype)


def reader(module: nn.Module) -> Callable[[torch.dtype], Tensor]:
    """A function that returns the present weight of a quantised layer in a dtype. It refers to the weight, not to the layer.

    Source: bitsandbytes' `MatMul4Bit` and `MatMul8bitFp`, torchao's `F.linear` of each class.
    """
    weight: Any = module.weight
    if quantisation(module) == "torchao":
        return partial(_torchao, weight)
    state = getattr(weight, "quant_state", None)
    if state is not None:  # a copy, since a packed layer changes its own
        return partial(_four_bits, weight.data, copy.copy(state))
    scale = weight.SCB if weight.SCB is not None else cast(Any, module).state.SCB
    return partial(_eight_bits, weight.data, scale)


def _torchao(weight: Any, dtype: torch.dtype) -> Tensor:
    kind = type(weight).__name__
    with no_autocast(weight):
        if kind in ("Int8Tensor", "Float8Tensor"):
            return cast(Tensor, weight.dequantize(dtype))
        value = weight.get_original_weight() if kind == "NF4Tensor" else weight.dequantize()
        return cast(Tensor, value.to(dtype))


def _four_bits(packed: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    from bitsandbytes import functional

    state = copy.copy(state)
    if getattr(state, "packing_format_for_cpu", False):
        # The layer has run on a CPU with AVX512-BF16, without gradients: the bytes have another order, and the scales are transposed.
        state.original_nested = False
        packed, state = functional._convert_weight_packed_for_cpu_inverse(packed, state)
        state.absmax = state.absmax.T.reshape(-1).float()
    state.dtype = dtype
    return cast(Tensor, functional.dequantize_4bit(packed, state))


def _eight_bits(value: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype).mul_(scale.unsqueeze(1).mul(1.0 / 127.0))


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
    if package == "torchao" and type(weight).dequantize is Tensor.dequantize:
        return f"torchao cannot dequantise a {type(weight).__name__}"
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
    """The expected dtype of the layer's input: the weight's, or of a quantised weight the compute dtype, or else the bias's or float32."""
    weight = cast(Tensor, module.weight)
    if computes_in(weight.dtype):
        return weight.dtype
    own = getattr(module, "compute_dtype", None)
    if isinstance(own, torch.dtype):
        return own
    bias = module._parameters.get("bias")
    return torch.float32 if bias is None or not computes_in(bias.dtype) else bias.dtype


def stored_bytes(parameter: Tensor) -> int:
    """The bytes of a parameter as it is stored, with the scales of a quantised one."""
    package = type(parameter).__module__.partition(".")[0]
    quantised: Any = parameter
    if package == "torchao":  # its dtype is that of the values
        names, _ = quantised.__tensor_flatten__()
        return sum(int(getattr(quantised, name).nbytes) for name in names)
    state = getattr(quantised, "quant_state", None)
    scales = [getattr(quantised, "SCB", None)]
    while package == "bitsandbytes" and state is not None:
        scales, state = [*scales, state.absmax], state.state2 if state.nested else None
    return int(parameter.nbytes) + sum(int(t.nbytes) for t in scales if t is not None)
