"""Context managers: `disable_adapter` turns the adapters off, `eval_mode` switches to eval mode; both restore the model afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from fastlora.errors import InjectionError
from fastlora.layers.base import named_lora_layers


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Context manager: every adapted layer calls only the layer that it wraps.

    The model then computes the base model's output, bit for bit, and draws no dropout seeds: a reference model (DPO, distillation)
    without a second copy. Trained heads are not affected. Calls may be nested, and the previous state is restored, also after an
    exception. Inside, saving and loading work, merging and exporting are refused, and a copy of the model has its adapters enabled.

    A forward pass inside must not be recomputed outside: with activation checkpointing use `torch.no_grad()` too.

    Raises: InjectionError if the model has no adapters.
    """
    layers = [layer for _, layer in named_lora_layers(model)]
    if not layers:
        raise InjectionError("model: has no adapters, so there is nothing to disable")
    with _attribute_set(layers, "disabled", True):
        yield


@contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Context manager: every module of `models` is in eval mode, without a call of `eval()`, which may be overridden."""
    with _attribute_set((m for model in models for m in model.modules()), "training", False):
        yield


@contextmanager
def _attribute_set(modules: Iterable[nn.Module], name: str, value: bool) -> Iterator[None]:
    before = [(module, getattr(module, name)) for module in modules]
    try:
        for module, _ in before:
            setattr(module, name, value)
        yield
    finally:
        for module, old in before:
            setattr(module, name, old)
