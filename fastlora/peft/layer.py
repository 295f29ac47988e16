"""The subclass of PEFT's `lora.Linear` that `accelerate` assigns. It imports peft, so it is imported lazily."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn

from fastlora.layers.plain import computes_linear, has_hooks, is_transposed_linear
from fastlora.ops.linear import lora_linear, low_rank
from fastlora.ops.mixed import Segment, lora_linear_mixed, neighbours

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class FastLinear(Linear):  # type: ignore[misc]
    """PEFT's `lora.Linear` with the fused forward if it computes the same, else PEFT's forward.

    It adds nothing to the state dict: keys, saving, merging and switching of adapters are PEFT's. Dropout masks come from
    torch's generator, as PEFT's do, but differ from those that PEFT draws from the same seed.
    """

    forward_called = False  # read by the report of `accelerate`; not noted under torch.compile
    # `fastlora.export` reads it: the fused forward does not trace to plain operations.
    why_not_exportable = "has accelerated PEFT layers; call fastlora.restore(model) first"

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not torch.compiler.is_compiling():
            self.__dict__["forward_called"] = True  # a tenth of the time of setattr
        samples = kwargs.get("adapter_names")
        own = args or (kwargs and (samples is None or len(kwargs) > 1 or x.ndim < 2))
        names = active_adapters(self) if samples is None else adapters_of(self, samples)
        if own or why_slow(self, names) is not None or not _fits(x, self.base_layer.weight):
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        weight, bias = self.base_layer.weight, self.base_layer.bias
        if self.fan_in_fan_out:
            weight = weight.T  # transformers' Conv1D stores (K, N)
        if len(names) == 1 and samples is None:
            return lora_linear(x, weight, bias, *self._path(names[0], x))
        self._check_forward_args(x, **kwargs)
        lows = [low_rank(*self._path(name, x)) for name in names]
        rows = x.shape[:-1].numel()
        if samples is None:
            segments = [Segment(0, rows, place) for place in range(len(names))]
        else:
            rows //= len(samples)
            runs = neighbours(samples, names)
            segments = [Segment(first * rows, end * rows, place) for first, end, place in runs]
        return lora_linear_mixed(x, weight, bias, lows, segments)

    def _path(self, name: str, x: Tensor) -> tuple[Tensor, Tensor, float, float, Tensor | None]:
        """(A, B, scaling, p, seed) of the adapter in a call with x."""
        dropout = self.lora_dropout[name]
        p, seed = 0.0, None
        if dropout.training and isinstance(dropout, nn.Dropout) and dropout.p > 0.0:
            p = dropout.p
            seed = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=x.device)
        return self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name], p, seed

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.pop("forward_called", None)  # a copy has not been called

    def _get_name(self) -> str:  # what repr prints
        return "Linear"


def active_adapters(layer: Linear) -> list[str]:
    """The names of the active adapters that this layer has."""
    return [name for name in layer.active_adapters if name in layer.lora_A]


def adapters_of(layer: Linear, samples: Sequence[str]) -> list[str]:
    """The adapters in PEFT's `adapter_names` that this layer has."""
    return [name for name in dict.fromkeys(samples) if name in layer.lora_A]


def why_slow(layer: Linear, names: Sequence[str]) -> str | None:
    """Why the layer in its current state needs PEFT's forward with these adapters, or None if the fused forward computes the same."""
    if "forward" in layer.__dict__:
        return "its forward was replaced on the instance (as hooks of the package accelerate do)"
    if layer.disable_adapters:
        return "the adapters are disabled"
    if layer.merged:
        return f"{', '.join(layer.merged_adapters)} is merged into the base weight"
    if not names:
        return "no adapter is active"
    reason = _why_not_linear("the base layer", layer.base_layer, layer.fan_in_fan_out)
    for name in names:
        reason = reason or _why_not_plain(layer, name)
    return reason


def _why_not_plain(layer: Linear, name: str) -> str | None:
    if name in layer.lora_variant:
        return f"{type(layer.lora_variant[name]).__name__} is not plain LoRA"
    lora_a, lora_b = layer.lora_A[name], layer.lora_B[name]
    if lora_b.bias is not None:
        return "lora_bias=True"
    reason = _why_not_linear("lora_A", lora_a) or _why_not_linear("lora_B", lora_b)
    return reason or _why_dropout(layer, name)


def _why_not_linear(label: str, module: nn.Module, transposed: bool = False) -> str | None:
    if not computes_linear(module) or is_transposed_linear(module) != transposed:
        return f"{label} is a {type(module).__name__} with a custom forward"
    if has_hooks(module):
        return f"{label} has hooks"
    weight = module.weight
    if type(weight) not in (nn.Parameter, Tensor) or weight.dtype not in _DTYPES:
        return f"{label} holds a {weight.dtype} {type(weight).__name__}"
    return None


def _why_dropout(layer: Linear, name: str) -> str | None:
    dropout = layer.lora_dropout[name]
    if type(dropout) not in (nn.Dropout, nn.Identity) or "forward" in dropout.__dict__:
        return f"the dropout is a {type(dropout).__name__}"
    if has_hooks(dropout):
        return "the dropout has hooks"
    if isinstance(dropout, nn.Dropout) and dropout.p >= 1.0:
        return f"the dropout's p is {dropout.p}"
    return None


def _fits(x: object, weight: Tensor) -> bool:
    """Whether the fused forward supports this input; if dtypes differ, PEFT's forward raises its own error."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return False
    if x.layout != torch.strided or x.is_nested:
        return False
    return x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type)
