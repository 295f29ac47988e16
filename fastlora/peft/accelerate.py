"""`accelerate` and `restore`: the fused forward in PEFT's LoRA layers. peft is imported only when they are called."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fastlora.errors import InjectionError
from fastlora.model.selection import attention_projections, fast_path_layers


@dataclass(frozen=True)
class LayerPath:
    """Whether one PEFT layer uses the fused forward pass, and why."""

    path: str
    fast: bool
    reason: str

    def __str__(self) -> str:
        return f"{'fast' if self.fast else 'PEFT'}  {self.path}: {self.reason}"


@dataclass(frozen=True)
class AccelerationReport:
    """The result of `accelerate`. `str(report)` is a summary and a line for each layer.

    layers: every LoRA layer of the model, in module order. changed: how many of them this call changed.
    """

    layers: tuple[LayerPath, ...]
    changed: int

    def __str__(self) -> str:
        fast = sum(layer.fast for layer in self.layers)
        head = f"{fast} of {len(self.layers)} LoRA layers use the fused path"
        return "\n  ".join([f"{head} ({self.changed} changed)", *map(str, self.layers)])


def accelerate(peft_model: nn.Module) -> AccelerationReport:
    """Use fastlora's forward in every `peft.tuners.lora.Linear` of the model, in place.

    Only the class of a layer changes, to a subclass: parameters, state-dict keys, optimizers, `isinstance`, saving, merging
    and switching of adapters do not. Several active adapters, and `adapter_names`, which gives each sample its own in eval mode, take
    the fused path too. A layer uses PEFT's forward while it is merged or disabled, has DoRA or another variant, a LoRA bias,
    hooks, or a base that is not a plain `nn.Linear`; the report has the reason in the current state of each layer. A second call changes only layers that PEFT has added since.
    A layer whose weight other code reads instead of calling it is not reported as fast: the weight is the base's in PEFT. Those in
    `nn.MultiheadAttention` and `nn.TransformerEncoderLayer` are known, others from the calls since the first `accelerate`.

    peft_model: a `PeftModel`, or any module that contains PEFT's LoRA layers.

    Raises: InjectionError if it has no LoRA layer of PEFT, or peft is not installed or too old.
    """
    layers = _lora_layers(peft_model)
    from peft.tuners.lora import Linear

    from fastlora.peft.layer import FastLinear, active_adapters, why_slow

    read_by = _read_by_parent(peft_model)
    any_called = any(isinstance(layer, FastLinear) and layer.forward_called for _, layer in layers)
    changed, report = 0, []
    for path, layer in layers:
        if type(layer) is Linear:
            layer.__class__ = FastLinear
            changed += 1
        if isinstance(layer, FastLinear):
            names = active_adapters(layer)
            reason = read_by.get(layer) or why_slow(layer, names)
            if reason is None and any_called and not layer.forward_called:
                reason = (
                    "its forward has not been called, while that of others has; if other code multiplies by its weight, "
                    "the base's, the adapter has no effect"
                )
        else:
            names = []
            reason = f"is a lora.{type(layer).__name__}; only lora.Linear itself is supported"
        count = "one adapter" if len(names) == 1 else f"the sum of {len(names)} adapters"
        report.append(LayerPath(path, reason is None, reason or f"{count} on a plain nn.Linear"))
    return AccelerationReport(tuple(report), changed)


def restore(peft_model: nn.Module) -> int:
    """Undo `accelerate`: every changed layer becomes PEFT's `lora.Linear` again. Returns how many were changed back.

    Raises: InjectionError if it has no LoRA layer of PEFT, or peft is not installed or too old.
    """
    layers = _lora_layers(peft_model)
    from peft.tuners.lora import Linear

    from fastlora.peft.layer import FastLinear

    changed = [layer for _, layer in layers if type(layer) is FastLinear]
    for layer in changed:
        layer.__class__ = Linear
        layer.__dict__.pop("forward_called", None)
    return len(changed)


def _read_by_parent(model: nn.Module) -> dict[nn.Module, str]:
    """The layers whose weight a module around them reads instead of calling them, each with a reason for the report."""
    from peft.tuners.lora.layer import MultiheadAttention

    base = "the weight, in PEFT the base's, and does not call it: the adapter has no effect"
    reasons = {
        layer: f"in eval mode nn.TransformerEncoderLayer reads {base} there"
        for layer in fast_path_layers(model)
    }
    for layer in attention_projections(model):
        reasons[layer] = f"nn.MultiheadAttention reads {base}"
    for module in model.modules():
        if isinstance(module, MultiheadAttention):
            reasons[module.base_layer.out_proj] = (
                "PEFT's MultiheadAttention merges it for each call"
            )
    return reasons


def _lora_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    try:
        import peft
        from peft.tuners.lora import LoraLayer
    except ImportError as error:
        raise InjectionError(
            f"peft_model: needs the package peft (pip install peft): {error}"
        ) from error
    found = [(path, layer) for path, layer in model.named_modules() if isinstance(layer, LoraLayer)]
    if not found:
        raise InjectionError(
            "peft_model: expected a model with peft's LoRA layers (peft.get_peft_model creates one), "
            f"got a {type(model).__name__} without any"
        )
    if not hasattr(found[0][1], "lora_variant"):
        raise InjectionError(
            f"peft_model: needs peft 0.16 or newer, whose layers have `lora_variant`; got {peft.__version__}"
        )
    return found
