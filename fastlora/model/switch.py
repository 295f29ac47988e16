"""Context managers: `disable_adapter` turns the adapters off, `eval_mode` switches to eval mode; both restore the model afterwards."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fastlora.errors import InjectionError
from fastlora.layers.base import LoRALayer, named_lora_layers
from fastlora.model.adapter_registry import none_active


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Context manager: every adapted layer calls only the layer that it wraps.

    The model then computes the base model's output, bit for bit, and draws no dropout seeds: a reference model (DPO, distillation)
    without a second copy. Trained heads are not affected. Contexts may nest or overlap: the adapters are back when the last one
    ends, also after an exception. Inside, saving and loading work, merging and exporting are refused, and a copy of the model has its
    adapters enabled.

    The switch is of the model: other threads and async tasks that call it meanwhile get the base model's output too. A switch of the
    task alone would be a lookup in each forward, on which compiled code cannot guard.

    A forward pass inside must not be recomputed outside: with activation checkpointing use `torch.no_grad()` too.

    Raises: InjectionError if the model has no adapters.
    """
    layers = [layer for _, layer in named_lora_layers(model)]
    if not layers:
        raise InjectionError(f"{none_active(model)}, so there is nothing to disable")
    # Compilers cannot trace a lock; a context within a graph nests.
    setting = _attribute_set_in_graph if torch.compiler.is_compiling() else _attribute_set
    with setting(layers, "disabled", True):
        yield


@contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Context manager: every module of `models` is in eval mode, without a call of `eval()`, which may be overridden."""
    with _attribute_set((m for model in models for m in model.modules()), "training", False):
        yield


def disable_alike(old: Iterable[LoRALayer], new: Iterable[LoRALayer]) -> None:
    """Disable `new` layers until the contexts of `disable_adapter` end that disable the `old` ones, which they replace in a model.

    A context that disables only some of the old layers disables the new ones around the same wrapped layers.
    """
    with _LOCK:
        opened, old = _OPEN["disabled"], set(old)
        contexts = {id(c): c for layer in old if layer in opened for c in opened[layer].contexts}
        for context in contexts.values():
            bases = {layer.wrapped for layer in old.intersection(context.held)}
            whole = old.issubset(context.held)
            alike = [layer for layer in set(new) if whole or layer.wrapped in bases]
            _hold(context, alike, "disabled", True)


@dataclass(eq=False)
class _Context:
    """An open context: the modules whose attribute it sets."""

    held: list[nn.Module] = field(default_factory=list)


@dataclass
class _Open:
    """The open contexts that set an attribute of a module, and its value before the first of them."""

    before: Any
    contexts: list[_Context] = field(default_factory=list)


# Re-entrant, because the garbage collector may close an unfinished context in the thread that holds the lock.
_LOCK = threading.RLock()
_OPEN: dict[str, weakref.WeakKeyDictionary[nn.Module, _Open]] = {
    name: weakref.WeakKeyDictionary() for name in ("disabled", "training")
}


@contextmanager
def _attribute_set(modules: Iterable[nn.Module], name: str, value: bool) -> Iterator[None]:
    """Contexts may overlap without nesting: the last one that ends restores the value."""
    context, opened = _Context(), _OPEN[name]
    try:
        with _LOCK:
            _hold(context, modules, name, value)
        yield
    finally:
        with _LOCK:
            for module in context.held:
                state = opened[module]
                state.contexts.remove(context)
                if not state.contexts:
                    setattr(module, name, state.before)
                    del opened[module]


def _hold(context: _Context, modules: Iterable[nn.Module], name: str, value: bool) -> None:
    """Let the context set the attribute of more modules."""
    for module in modules:
        _OPEN[name].setdefault(module, _Open(getattr(module, name))).contexts.append(context)
        context.held.append(module)
        setattr(module, name, value)


@contextmanager
def _attribute_set_in_graph(modules: Iterable[nn.Module], name: str, value: bool) -> Iterator[None]:
    before = [(module, getattr(module, name)) for module in modules]
    try:
        for module, _ in before:
            setattr(module, name, value)
        yield
    finally:
        for module, old in before:
            setattr(module, name, old)
