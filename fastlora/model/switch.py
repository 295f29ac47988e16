"""Context managers: `disable_adapter` turns the adapters off, `eval_mode` switches to eval mode; both restore the model afterwards."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import nn

from fastlora.errors import InjectionError
from fastlora.layers.base import named_lora_layers


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Context manager: every adapted layer calls only the layer that it wraps.

    The model then computes the base model's output, bit for bit, and draws no dropout seeds: a reference model (DPO, distillation)
    without a second copy. Trained heads are not affected. Inside, saving and loading work, merging and exporting are refused, and a
    copy of the model has its adapters enabled.

    Contexts may be nested or overlap in any order, in threads or asynchronous tasks: the adapters are back when the last one ends, also
    after an exception. The switch belongs to the model, not to the thread: meanwhile every thread that calls the model gets the base
    model's output.

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


@dataclass
class _Held:
    """An attribute that contexts have set: how many of them are open, and the value before the first."""

    contexts: int
    before: bool


_held: dict[str, WeakKeyDictionary[nn.Module, _Held]] = {
    "disabled": WeakKeyDictionary(),
    "training": WeakKeyDictionary(),
}
_lock = threading.Lock()


@contextmanager
def _attribute_set(modules: Iterable[nn.Module], name: str, value: bool) -> Iterator[None]:
    """The attribute has this value until the last of all open contexts for it ends, which restores the value before the first."""
    modules, held = list(modules), _held[name]
    with _lock:
        for module in modules:
            held.setdefault(module, _Held(0, getattr(module, name))).contexts += 1
            setattr(module, name, value)
    try:
        yield
    finally:
        with _lock:
            for module in modules:
                held[module].contexts -= 1
                if held[module].contexts == 0:
                    setattr(module, name, held.pop(module).before)
