"""Fused groups: adapted layers that share their input (q, k and v; gate and up) make one pass over it: `fuse` and `unfuse`."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.errors import InjectionError
from fastlora.layers.base import named_lora_layers
from fastlora.layers.linear import LoRALinear, is_plain
from fastlora.ops.dispatch import why_not_triton
from fastlora.ops.group import GroupMember, lora_linear_group
from fastlora.ops.linear import autocast, autocasts


@dataclass(frozen=True)
class FusionReport:
    """What `fuse` did. groups: the paths of each group, in the order in which they are called. alone: path → why it has no group."""

    groups: tuple[tuple[str, ...], ...]
    alone: dict[str, str]

    def __str__(self) -> str:
        fused = sum(map(len, self.groups))
        lines = [
            f"{fused} of {fused + len(self.alone)} adapted layers in {len(self.groups)} groups"
        ]
        lines += [f"together  {', '.join(group)}" for group in self.groups]
        lines += [f"alone     {path}: {reason}" for path, reason in self.alone.items()]
        return "\n  ".join(lines)


def fuse(model: nn.Module, *args: Any, **kwargs: Any) -> FusionReport:
    """Run `model(*args, **kwargs)` once, see which adapted linear layers are given the same tensor, and fuse those.

    From then on the first layer of a group that is called computes all of them by `lora_linear_group`: one pass over x for every
    S, one for every dA, one dropout mask, and dx summed in place. The others hand out what was computed. The results are those of
    separate calls up to rounding, but that one mask serves the whole group; layers keep their parameters, state dicts and hooks.
    A layer that is given another tensor than its group runs by itself, as does every layer while a group's members differ in
    training mode or dropout, are disabled, take few enough rows for the plan `decode` or have ranks of more than 256 in all on Triton, and under torch.compile, functorch and inference mode.
    On a CPU it pays with dropout, whose mask is made once for the group; without, it gains little, and with fewer than some hundred rows
    checking that an output may be handed out costs more than is saved (docs/design.md has figures).

    The run is without gradients and in eval mode, and modes are put back. Calling `fuse` again forms the groups anew.

    Raises: InjectionError if the model has no adapted linear layer; whatever the model raises, with the groups as before.
    """
    layers = {path: la for path, la in named_lora_layers(model) if isinstance(la, LoRALinear)}
    if not layers:
        raise InjectionError("model: has no adapted linear layers, so there is nothing to fuse")
    seen = _watch(model, layers, args, kwargs)
    alone: dict[str, str] = {}
    by_input: dict[tuple[Any, ...], list[str]] = {}
    for path, layer in layers.items():
        reason = _why_alone(layer, seen.get(path, []))
        if reason is not None:
            alone[path] = reason
            continue
        x, version, order = seen[path][0]
        key = (id(x), version, layer.dropout, layer.lora_A.dtype, layer.backend)
        by_input.setdefault(key, []).append(path)
    groups = []
    for paths in by_input.values():
        if len(paths) == 1:
            alone[paths[0]] = "no other adapted layer with these settings is given the same tensor"
        else:
            groups.append(tuple(sorted(paths, key=lambda path: seen[path][0][2])))
    unfuse(model)
    for group in groups:
        members = _Group([layers[path] for path in group])
        for layer in members.layers:
            layer.group = members
    return FusionReport(tuple(groups), alone)


def unfuse(model: nn.Module) -> int:
    """Let every layer run by itself again. Returns how many layers were in a group."""
    fused = [la for _, la in named_lora_layers(model) if isinstance(la, LoRALinear) and la.group]
    for layer in fused:
        layer.group = None
    return len(fused)


@dataclass
class _Ready:
    """What was computed for one input and not handed out yet: outputs by the id of their layer. x is a weak reference."""

    x: Any
    state: tuple[Any, ...]
    outputs: dict[int, Tensor]
    spent: list[bool]  # not empty once the graph that made them has been through its backward pass


class _Group:
    """The layers of a group, and the outputs of the last call that are not handed out yet.

    They are used while the input is that very object and its contents and the parameters are unchanged. An output that nobody fetches
    is kept until the group's next call.
    """

    def __init__(self, layers: list[LoRALinear]) -> None:
        self.layers = layers
        self._ready: _Ready | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers, "_ready": None}

    def output(self, layer: LoRALinear, x: Tensor) -> Tensor | None:
        """What `layer` computes of x (..., K); None if it must run by itself."""
        if torch.is_inference_mode_enabled() or x.is_inference():  # no versions to compare
            return None
        if torch._C._are_functorch_transforms_active():
            return None
        state, ready = self._state(x), self._ready
        if ready is not None and not ready.spent and ready.x() is x and ready.state == state:
            y = ready.outputs.pop(id(layer), None)
            if not ready.outputs:
                self._ready = None
            if y is not None:
                return y
        backend = self._backend(layer, x)
        if backend is None:
            return None
        spent: list[bool] = []
        seed = layer._draw_seed(x)
        outputs = lora_linear_group(
            x,
            [_member(m) for m in self.layers],
            layer.dropout,
            seed,
            spent,
            triton=backend == "triton",
        )
        made = {id(m): y for m, y in zip(self.layers, outputs, strict=True)}
        y = made.pop(id(layer))
        self._ready = _Ready(weakref.ref(x), state, made, spent)
        return y

    def _state(self, x: Tensor) -> tuple[Any, ...]:
        """All that the outputs depend on besides the object x."""
        versions = [
            (id(tensor), tensor.data_ptr(), tensor._version, tensor.requires_grad)
            for m in self.layers
            for held in (m._parameters, m._buffers, m.original_linear._parameters)
            for tensor in held.values()
            if tensor is not None
        ]
        modes = [(m.training, m.disabled, m.dropout, m.scaling) for m in self.layers]
        dtype = autocasts(x) and torch.get_autocast_dtype(x.device.type)
        return x._version, torch.is_grad_enabled(), dtype, versions, modes

    def _backend(self, layer: LoRALinear, x: Tensor) -> str | None:
        """What runs the group on x, "torch" or "triton"; None if `layer` must run by itself."""
        cast = autocast(x) if autocasts(x) else x
        together = any(m is layer for m in self.layers) and all(
            m.group is self
            and not m.disabled
            and m.training == layer.training
            and m.dropout == layer.dropout
            and _why_not_fused(m) is None
            for m in self.layers
        )
        if not together:
            return None
        choices = [m._choose(cast, m.dropout > 0) for m in self.layers]
        if all((choice.backend, choice.plan) == ("torch", "in_place") for choice in choices):
            return "torch"
        ranks = sum(m.factors()[0].shape[0] for m in self.layers)
        launched = all(c.config is not None and c.plan != "decode" for c in choices)
        if not launched or why_not_triton(x.device.type, cast.dtype, ranks, forced=True):
            return None
        return "triton"


def _member(layer: LoRALinear) -> GroupMember:
    a, b = layer.factors()
    return GroupMember(layer.matrix, layer.original_linear.bias, a, b, layer.scaling)


def _why_alone(layer: LoRALinear, calls: list[tuple[Tensor, int, int]]) -> str | None:
    if not calls:
        return "its forward is not called on this sample"
    if len(calls) > 1:
        return f"it is called {len(calls)} times on this sample"
    return _why_not_fused(layer)


def _why_not_fused(layer: LoRALinear) -> str | None:
    if layer.lora_magnitude is not None:
        return "it has DoRA"
    if not is_plain(layer.original_linear):
        return "the wrapped layer has hooks, a forward of its own or a quantised weight"
    if "weight" not in layer.original_linear._parameters:
        return "the wrapped weight is computed anew at each access (parametrised)"
    return None


def _watch(
    model: nn.Module, layers: dict[str, LoRALinear], args: Any, kwargs: Any
) -> dict[str, list[tuple[Tensor, int, int]]]:
    """For each layer the tensors that it was given, with their versions and the order of the calls."""
    seen: dict[str, list[tuple[Tensor, int, int]]] = {}
    handles = []

    def watcher(path: str) -> Any:
        def note(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            given = inputs[0] if inputs else named["input"]
            x = given if isinstance(given, Tensor) else given.feats
            order = sum(map(len, seen.values()))
            seen.setdefault(path, []).append((x, x._version, order))

        return note

    modes = [(module, module.training) for module in model.modules()]
    try:
        handles += [
            la.register_forward_pre_hook(watcher(path), with_kwargs=True)
            for path, la in layers.items()
        ]
        for module, _ in modes:
            module.training = False
        with torch.inference_mode(False), torch.no_grad():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    return seen
