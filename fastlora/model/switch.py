"""Switch adapters off for a while: `disable_adapter`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from fastlora.errors import InjectionError
from fastlora.layers.base import named_lora_layers


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Within `with disable_adapter(model):` every adapted layer calls the layer it wraps and nothing else.

    So the model computes what the base model computes, bit for bit, and draws no dropout seeds for its adapters: a reference
    model (DPO, distillation) without a second copy. Trained heads outside of the adapters stay as they are.
    Contexts may be nested, and what was enabled before is enabled again, after an exception too. Saving and loading are as
    ever; merging and exporting are refused inside. A copy that is made inside has its adapters enabled.

    A forward pass inside must not be recomputed outside: under activation checkpointing use it with `torch.no_grad()`.

    Raises: InjectionError if the model has no adapters.
    """
    layers = [layer for _, layer in named_lora_layers(model)]
    if not layers:
        raise InjectionError("model: has no adapters, so there is nothing to disable")
    before = [layer.disabled for layer in layers]
    try:
        for layer in layers:
            layer.disabled = True
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer.disabled = disabled
