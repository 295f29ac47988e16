"""The subclass of PEFT's `lora.Linear` that `accelerate` assigns. It imports peft, so it is imported lazily."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn

from fastlora.layers.plain import computes_linear, has_hooks, is_transposed_linear
from fastlora.ops.linear import lora_linear

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
        if args or kwargs or why_slow(self) is not None or not _fits(x, self.base_layer.weight):
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        (name,) = active_adapters(self)
        dropout = self.lora_dropout[name]
        p, seed = 0.0, None
        if dropout.training and isinstance(dropout, nn.Dropout) and dropout.p > 0.0:
            p = dropout.p
            seed = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=x.device)
        weight = self.base_layer.weight
        return lora_linear(
            x,
            weight.T if self.fan_in_fan_out else weight,  # transformers' Conv1D stores (K, N)
            self.base_layer.bias,
            self.lora_A[name].weight,
            self.lora_B[name].weight,
            self.scaling[name],
            p,
            seed,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.pop("forward_called", None)  # a copy has not been called

    def _get_name(self) -> str:  # what repr prints
        return "Linear"


def active_adapters(layer: Linear) -> list[str]:
    """The names of the active adapters that this layer has."""
    return [name for name in layer.active_adapters if name in layer.lora_A]


def why_slow(layer: Linear) -> str | None:
    """Why the layer in its current state needs PEFT's forward, or None if the fused forward computes the same."""
    if "forward" in layer.__dict__:
        return "its forward was replaced on the instance (as hooks of the package accelerate do)"
    if layer.disable_adapters:
        return "the adapters are disabled"
    if layer.merged:
        return f"{', '.join(layer.merged_adapters)} is merged into the base weight"
    names = active_adapters(layer)
    if len(names) != 1:
        return f"{len(names)} adapters are active; the fused forward needs exactly one"
    (name,) = names
    if name in layer.lora_variant:
        return f"{type(layer.lora_variant[name]).__name__} is not plain LoRA"
    if layer.lora_B[name].bias is not None:
        return "lora_bias=True"
    reason = _why_not_linear("the base layer", layer.base_layer, layer.fan_in_fan_out)
    reason = reason or _why_not_linear("lora_A", layer.lora_A[name])
    return reason or _why_not_linear("lora_B", layer.lora_B[name]) or _why_dropout(layer, name)


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
