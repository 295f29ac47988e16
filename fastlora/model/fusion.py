"""`fuse` and `unfuse`: adapted layers that share their input (q, k and v) are computed in one pass over it, gated MLPs in one call."""

from __future__ import annotations

import itertools
import threading
import weakref
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastlora.errors import InjectionError
from fastlora.layers.base import named_lora_layers
from fastlora.layers.gated import (
    GatedBlock,
    install_gated,
    layers_in_blocks,
    restore_gated,
    share_a_mask,
)
from fastlora.layers.linear import LoRALinear
from fastlora.layers.plain import is_plain
from fastlora.model.adapter_registry import why_not_one
from fastlora.model.gated import NotGated, candidates, find_block, why_no_block
from fastlora.model.region import region
from fastlora.model.switch import eval_mode
from fastlora.ops.dispatch import why_not_triton
from fastlora.ops.group import lora_linear_group
from fastlora.ops.linear import autocast, autocasts, low_rank
from fastlora.ops.reference import Layer


@dataclass(frozen=True)
class FusionReport:
    """The result of `fuse`.

    groups: the paths of each group outside of gated MLPs, in call order. blocks: the paths of gate, up and down of each gated MLP.
    alone: path → why a layer is in neither. refused: path → why a module that looks like a gated MLP is not computed as one.
    """

    groups: tuple[tuple[str, ...], ...]
    alone: dict[str, str]
    blocks: tuple[tuple[str, str, str], ...] = ()
    refused: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        layers = [*itertools.chain(*self.groups, *self.blocks), *self.alone]
        lines = [
            f"{len(layers) - len(self.alone)} of {len(layers)} layers in {len(self.groups)} groups and {len(self.blocks)} gated MLPs"
        ]
        lines += [f"together   {', '.join(group)}" for group in self.groups]
        lines += [f"gated MLP  {', '.join(block)}" for block in self.blocks]
        lines += [f"refused    {path}: {reason}" for path, reason in self.refused.items()]
        lines += [f"alone      {path}: {reason}" for path, reason in self.alone.items()]
        return "\n  ".join(lines)


def fuse(model: nn.Module, *args: Any, **kwargs: Any) -> FusionReport:
    """Run `model(*args, **kwargs)` once, find gated MLPs and adapted linear layers of one parent module that receive the same tensor, and fuse them.

    A gated MLP is a module whose forward is down(act(gate(x)) ∘ up(x)) of three linear layers, some of them adapted, with act SiLU or GELU (exact or
    tanh), and nothing else. Afterwards it is computed by one call that keeps x, gate(x) and up(x) for the backward pass, and not act(gate(x)) and the product
    too. The module becomes an instance of a subclass of its class.

    Of other layers of one parent with one input, the first that is called computes all of them by `lora_linear_group`: one pass over x for every S, one for
    every dA, one dropout mask, and dx summed in place. The others return the cached output. An output is reused only in the thread and the checkpointed
    region that computed it, and each may have a backward pass of its own.

    Results are those of separate calls up to rounding, except that layers with one input and one dropout probability have one mask. Layers keep their
    parameters, state dicts and hooks. They run separately where one call cannot compute the same:
    a group, if the input is not its own or its layers differ in training mode or dropout, one of them is disabled, and under inference mode;
    a gated MLP, while one of its layers has hooks, in a dtype that was not tried, and after a change of its settings, until `fuse` is called again;
    both, with Triton under the plan `decode` or with more than 256 ranks in total, and under torch.compile and functorch.

    On a CPU groups are faster with dropout, whose mask is computed once for the group; without dropout they gain little, and below a few hundred rows the checks
    cost more than they save (docs/notebook.md has figures). Gated MLPs save memory; a call costs some tens of microseconds more.

    The model runs once, in eval mode and without gradients. Within that call each candidate for a gated MLP also runs alone, about thirty times, in both
    modes, with and without gradients. Modes, attributes and random states are restored. Calling `fuse` again replaces groups and gated MLPs.

    Raises: InjectionError if the model has no adapted linear layer or several active adapters; whatever the model raises, with the model unchanged.
    """
    several = why_not_one(model)
    if several is not None:
        raise InjectionError(several)
    layers = {path: la for path, la in named_lora_layers(model) if isinstance(la, LoRALinear)}
    if not layers:
        raise InjectionError("model: has no adapted linear layers, so there is nothing to fuse")
    modules = candidates(model)
    seen, found = _run_sample(model, layers, modules, args, kwargs)
    blocks = {path: block for path, block in found.items() if isinstance(block, GatedBlock)}
    refused = {path: reason for path, reason in found.items() if isinstance(reason, str)}
    inside = {id(la) for path, block in blocks.items() for la in block.layers_of(modules[path])}
    rest = {path: layer for path, layer in layers.items() if id(layer) not in inside}
    groups, alone = _grouped(rest, seen)
    unfuse(model)
    together = [[layers[path] for path in group] for group in groups]
    for path, block in blocks.items():
        install_gated(modules[path], block)
        gate, up, _ = block.layers_of(modules[path])
        if share_a_mask(gate, up):
            together.append([cast(LoRALinear, layer) for layer in (gate, up)])
    for members in together:
        group = _Group(members)
        for layer in members:
            layer.group = group
    named = tuple(block.paths(path) for path, block in blocks.items())
    return FusionReport(tuple(groups), alone, named, refused)


def unfuse(model: nn.Module) -> int:
    """Undo `fuse`. Returns how many adapted layers were in a group or a gated MLP."""
    fused = {layer for layer in layers_in_blocks(model) if isinstance(layer, LoRALinear)}
    for _, layer in named_lora_layers(model):
        if isinstance(layer, LoRALinear) and layer.group:
            layer.group = None
            fused.add(layer)
    restore_gated(model)
    return len(fused)


def _grouped(
    layers: dict[str, LoRALinear], seen: dict[str, list[tuple[Tensor, int]]]
) -> tuple[list[tuple[str, ...]], dict[str, str]]:
    """The paths of each group, and path → why a layer is in none."""
    alone: dict[str, str] = {}
    by_input: dict[tuple[Any, ...], list[str]] = {}
    for path, layer in layers.items():
        calls = seen.get(path, [])
        reason = _why_not_fusable(layer)
        if not calls:
            alone[path] = "its forward is not called on this sample"
        elif len(calls) > 1:
            alone[path] = f"it is called {len(calls)} times on this sample"
        elif reason is not None:
            alone[path] = reason
        else:
            x, version = calls[0]
            # Layers of different parents may be in regions that are recomputed separately.
            parent = path.rpartition(".")[0]
            key = (parent, id(x), version, layer.dropout, layer.lora_A.dtype, layer.backend)
            by_input.setdefault(key, []).append(path)
    groups = []
    for paths in by_input.values():
        if len(paths) == 1:
            alone[paths[0]] = (
                "no other adapted layer of its parent with these settings receives the same tensor"
            )
        else:
            groups.append(tuple(path for path in seen if path in paths))
    return groups, alone


@dataclass
class _Cached:
    """Outputs computed for one input and not returned yet, by the id of their layer."""

    source: Any  # a weak reference to the input
    state: tuple[Any, ...]
    outputs: dict[int, Tensor]
    freed: list[bool]  # not empty after the backward pass of the outputs' graph


class _LastCall(threading.local):
    """The cached outputs of a thread's last call of a group."""

    cached: _Cached | None = None


class _Group:
    """The layers of a group, and the cached outputs of its last call in each thread.

    An output is valid for the same input object while its contents and the parameters are unchanged. Unused outputs are kept until
    the group's next call in the thread.
    """

    def __init__(self, layers: list[LoRALinear]) -> None:
        self.layers = layers
        self._last = _LastCall()

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def output(self, layer: LoRALinear, x: Tensor, source: Tensor) -> Tensor | None:
        """The output of `layer` for x (..., K); None if it must run separately.

        source: x, or the nested tensor whose rows are x, since each call takes them anew.
        """
        versionless = torch.is_inference_mode_enabled() or source.is_inference()
        if versionless or torch._C._are_functorch_transforms_active():
            return None
        state, cached = (source._version, *self._state(x)), self._last.cached
        valid = cached is not None and not cached.freed and cached.state == state
        if cached is not None and valid and cached.source() is source:
            y = cached.outputs.pop(id(layer), None)
            if not cached.outputs:
                self._last.cached = None
            if y is not None:
                return y
        backend = self._backend(layer, x)
        if backend is None:
            return None
        freed: list[bool] = []
        seed = layer._draw_seed(x)
        layers = []
        for m in self.layers:
            low = low_rank(*m.factors_on(x.device), m.scaling, layer.dropout, seed)
            layers.append(Layer(m.matrix, m.original_linear.bias, low))
        outputs = lora_linear_group(x, layers, freed, triton=backend == "triton")
        unused = {id(m): y for m, y in zip(self.layers, outputs, strict=True)}
        y = unused.pop(id(layer))
        self._last.cached = _Cached(weakref.ref(source), state, unused, freed)
        return y

    def _state(self, x: Tensor) -> tuple[Any, ...]:
        """Everything besides the input that the outputs depend on."""
        versions = [
            (id(tensor), tensor.data_ptr(), tensor._version, tensor.requires_grad)
            for m in self.layers
            for held in (m._parameters, m._buffers, m.original_linear._parameters)
            for tensor in held.values()
            if tensor is not None
        ]
        modes = [(m.training, m.disabled, m.dropout, m.scaling) for m in self.layers]
        dtype = autocasts(x) and torch.get_autocast_dtype(x.device.type)
        where = region(any(m.training and m.dropout for m in self.layers))
        return torch.is_grad_enabled(), dtype, versions, modes, where

    def _backend(self, layer: LoRALinear, x: Tensor) -> str | None:
        """The backend of the group for x, "torch" or "triton"; None if `layer` must run separately."""
        cast = autocast(x) if autocasts(x) else x
        together = any(m is layer for m in self.layers) and all(
            m.group is self
            and not m.disabled
            and m.training == layer.training
            and m.dropout == layer.dropout
            and _why_not_fusable(m) is None
            for m in self.layers
        )
        if not together or not all(_fits(cast, m) for m in self.layers):
            return None
        choices = [m._choose(cast, m.dropout > 0) for m in self.layers]
        if all((choice.backend, choice.plan) == ("torch", "in_place") for choice in choices):
            return "torch"
        ranks = sum(m.factors()[0].shape[0] for m in self.layers)
        launched = all(c.config is not None and c.plan != "decode" for c in choices)
        if not launched or why_not_triton(x.device.type, cast.dtype, ranks, forced=True):
            return None
        return "triton"


def _fits(x: Tensor, layer: LoRALinear) -> bool:
    """Whether the layer can multiply x, which autocast may have cast; otherwise it raises its own error."""
    weight = layer.matrix
    same = weight.dtype == x.dtype or autocasts(x)
    return same and weight.device == x.device and weight.shape[1:] == x.shape[-1:]


def _why_not_fusable(layer: LoRALinear) -> str | None:
    if layer.lora_magnitude is not None:
        return "it has DoRA"
    if not is_plain(layer.original_linear):
        return "the wrapped layer has hooks, a custom forward or a quantised weight"
    if "weight" not in layer.original_linear._parameters:
        return "the wrapped weight is recomputed at each access (parametrised)"
    return None


def _run_sample(
    model: nn.Module,
    layers: dict[str, LoRALinear],
    modules: dict[str, nn.Module],
    args: Any,
    kwargs: Any,
) -> tuple[dict[str, list[tuple[Tensor, int]]], dict[str, GatedBlock | str | None]]:
    """For each layer that is called, in the order of first calls, its input tensors and their versions; for each candidate that is called, its block,
    or why it has none, or None if it does not look like one.
    """
    seen: dict[str, list[tuple[Tensor, int]]] = {}
    blocks: dict[str, GatedBlock | str | None] = {}
    obstacles = {path: why_no_block(module) for path, module in modules.items()}
    searching: set[str] = set()

    def note(path: str, _: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        if searching:
            return
        names = ("input", layers[path].input_name)
        given = inputs[0] if inputs else next(named[name] for name in names if name in named)
        x = given if isinstance(given, Tensor) else given.feats
        seen.setdefault(path, []).append((x, x._version))

    def search(path: str, module: nn.Module, inputs: Any, named: Any) -> None:
        # In the model's own call: there its weights are where and as they are used (gathered, on a device, under autocast).
        if path in blocks or searching or torch.compiler.is_compiling():
            return
        searching.add(path)
        try:
            blocks[path] = find_block(module, inputs, named, obstacles[path])
        except NotGated as reason:
            blocks[path] = str(reason)
        finally:
            searching.clear()

    with ExitStack() as hooks, eval_mode(model), torch.inference_mode(False), torch.no_grad():
        for noted, notes in ((layers, note), (modules, search)):
            for path, module in noted.items():
                handle = module.register_forward_pre_hook(partial(notes, path), with_kwargs=True)
                hooks.enter_context(handle)
        model(*args, **kwargs)
    return seen, blocks
