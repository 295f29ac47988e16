"""`disable_adapter`, in which adapters have no effect, and `eval_mode`: contexts that restore a model afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from fastlora.errors import InjectionError
from fastlora.layers.base import named_lora_layers


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """A context in which every adapted layer calls only the layer it wraps.

    The model then computes the base model's output, bit for bit, and draws no dropout seeds: a reference model (DPO, distillation)
    without a second copy. Trained heads are not affected. Contexts may be nested, and the previous state is restored, after an
    exception too. Saving and loading work; merging and exporting are refused inside. A copy made inside has its adapters enabled.

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
    """A context in which every module of `models` is in eval mode, without calling `eval()`, which may be overridden."""
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
