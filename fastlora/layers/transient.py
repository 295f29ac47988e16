"""Quantised linear layers whose weight is dequantised for one pass, so that every plan of a plain weight applies to them.

These are the kinds whose package multiplies by the dequantised weight itself, so the values are the package's. The product of all others
stays the package's own, and `why_own_product` says why.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fastlora.layers.plain import has_hooks
from fastlora.layers.quantised import quantisation, reader, why_unreadable
from fastlora.ops.linear import autocasts

# bitsandbytes' kernels for 4 bits read N·K/2 bytes. A dequantised 16-bit weight takes 9 times as much: 2·N·K are written and read again.
# With so few rows time is memory traffic; without gradients no second pass follows.
FEW_ROWS = 32

_FOUR_BITS, _EIGHT_BITS = "Linear4bit.forward", "Linear8bitLt.forward"
_TORCHAO = ("Int8Tensor", "Float8Tensor", "IntxUnpackedToInt8Tensor", "NF4Tensor")
# Attributes of torchao's classes that make the product change its input.
_OF_INPUT = ("act_quant_kwargs", "act_quant_scale", "act_pre_scale", "activation_quantization")


class Transient(NamedTuple):
    """One call with the dequantised weight.

    x: the input in the layer's own dtype of the computation. weight: returns the weight (N, K), computed anew in each call.
    bias: (N,) or None, in the dtype of the product unless it is added to its result. bias_after: whether it is.
    dtype: of the output.
    """

    x: Tensor
    weight: Callable[[], Tensor]
    bias: Tensor | None
    bias_after: bool
    dtype: torch.dtype


def why_own_product(linear: nn.Module) -> str | None:
    """Why the product of a quantised layer is its package's in every call, or None if its weight can be dequantised for a pass."""
    weight: Any = linear._parameters["weight"]
    if has_hooks(linear):
        return "the wrapped layer has hooks"
    unreadable = why_unreadable(linear)
    if unreadable is not None:
        return unreadable
    kind = _kind(linear)
    if kind == _FOUR_BITS:
        state = getattr(weight, "quant_state", None)
        if state is None:
            return "it is not quantised yet"
        if tuple(state.shape) != (linear.out_features, linear.in_features):
            return f"it was quantised in another shape, {tuple(state.shape)}"
    elif kind == _EIGHT_BITS:
        if weight.data.is_floating_point():
            return "it is quantised in each call"
    elif kind not in _TORCHAO:
        return f"{kind} is not known to multiply by the dequantised weight"
    elif any(getattr(weight, name, None) is not None for name in _OF_INPUT):
        return f"{kind} quantises or scales its input too"
    return None


def why_own_product_of(linear: nn.Module, x: Tensor, forced: bool) -> str | None:
    """Why the product with x is the package's, or None if the weight is dequantised. forced: whether kernels are requested by name."""
    if torch.compiler.is_compiling():
        return "a compiler would merge the two dequantisations and keep the result"
    reason = why_own_product(linear)
    if reason is not None:
        return reason
    if cast(Tensor, linear.weight).requires_grad:
        return "the weight is trainable"
    kind = _kind(linear)
    if kind == _EIGHT_BITS and not linear.training and not forced:
        return "outside of training mode LLM.int8() quantises its input too"
    if kind in (_FOUR_BITS, "Int8Tensor"):
        dtype = product_dtype(linear, x)
        if dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"{quantisation(linear)} does not dequantise to {dtype}"
    if kind == _FOUR_BITS:
        dtype = _four_bit_dtype(linear, x.dtype)
        if _widens(x.dtype, dtype) and not autocasts(x):
            return f"its compute_dtype {dtype} is wider than its input's {x.dtype}, of which a copy would be saved"
        few = not torch.is_grad_enabled() and x.numel() <= FEW_ROWS * cast(int, linear.in_features)
        if few and x.device.type != "cpu" and not forced:
            return f"for at most {FEW_ROWS} rows without gradients its kernel reads a ninth of the bytes"
    return None


def transient(linear: nn.Module, x: Tensor) -> Transient:
    """The call with x of a layer for which `why_own_product_of` is None."""
    kind, given, product = _kind(linear), x.dtype, product_dtype(linear, x)
    bias = cast("Tensor | None", linear.bias)
    if kind == _FOUR_BITS and not _widens(given, own := _four_bit_dtype(linear, given)):
        x = x.to(own)  # Autocast would narrow a wider copy to its own dtype again.
    output, bias_after = product, False
    if kind in (_FOUR_BITS, "Int8Tensor") or (
        kind == _EIGHT_BITS and x.device.type not in ("cpu", "xpu")
    ):
        output = given
    elif kind in ("Float8Tensor", "NF4Tensor") and bias is not None:
        output = torch.promote_types(product, bias.dtype)
        bias_after = output != product
    if bias is not None and not bias_after:
        bias = bias.to(product)
    return Transient(x, partial(reader(linear), product), bias, bias_after, output)


def product_dtype(linear: nn.Module, x: Tensor) -> torch.dtype:
    """The dtype of the product of a layer for which `why_own_product_of` is None."""
    kind, dtype = _kind(linear), x.dtype
    if kind == _FOUR_BITS:
        dtype = _four_bit_dtype(linear, dtype)
    elif kind in ("Float8Tensor", "IntxUnpackedToInt8Tensor"):
        dtype = cast(Tensor, linear.weight).dtype  # x must have it, as in `F.linear`
    if dtype == torch.float64 or not autocasts(x):
        return dtype
    return torch.get_autocast_dtype(x.device.type)


def stand_ins(linear: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor]:
    """x and the dequantised weight (N, K) as far as a plan depends on them: their values are not set."""
    dtype = product_dtype(linear, x)
    if x.dtype != dtype:
        x = x.new_empty(x.shape, dtype=dtype)
    return x, x.new_empty(linear.out_features, linear.in_features)


def note_compute_dtype(linear: Any, x: Tensor) -> None:
    """Let a `Linear4bit` without a compute dtype choose it by its first input, as its own forward does."""
    if getattr(linear, "compute_type_is_set", True) is False:
        linear.set_compute_type(x)
        linear.compute_type_is_set = True


def _kind(linear: nn.Module) -> str:
    """The name of bitsandbytes' forward, of torchao's class of the weight, or else of the layer's own class."""
    forward = type(linear).forward
    if forward is nn.Linear.forward:
        return type(linear._parameters["weight"]).__name__
    if forward.__module__ == "bitsandbytes.nn.modules":
        return forward.__qualname__
    return type(linear).__name__


def _four_bit_dtype(linear: nn.Module, given: torch.dtype) -> torch.dtype:
    """The dtype in which a `Linear4bit` computes with an input of the dtype `given`."""
    own = getattr(linear, "compute_dtype", None)
    chosen = getattr(linear, "compute_type_is_set", True) or given == torch.float16
    return own if isinstance(own, torch.dtype) and chosen else given


def _widens(narrow: torch.dtype, wide: torch.dtype) -> bool:
    return wide.itemsize > narrow.itemsize
