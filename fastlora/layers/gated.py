"""Modules that compute a gated MLP, y = down(act(gate(x)) ∘ up(x)), in one call: `fastlora.fuse` finds them, `install_gated` changes their class.

The class is a subclass with a forward of its own, so copies, replicas, pickles and hooks of the module work as before. What the forward needs are
names of the children in the module's `__dict__`: a copy reads its own.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Iterable, Mapping, Sequence
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastlora.layers.linear import LoRALinear
from fastlora.layers.plain import (
    attribute,
    has_global_hooks,
    has_hooks,
    is_plain,
    is_transposed_linear,
)
from fastlora.ops.dispatch import Choice, choose_gated, transformed
from fastlora.ops.gated import gated_mlp
from fastlora.ops.linear import autocast, autocasts, low_rank
from fastlora.ops.reference import Layer, LowRank

_BLOCK = "_fastlora_gated"
_PLAIN = (torch.Tensor, nn.Parameter)
_NO_SETTINGS = frozenset({*nn.Module().__dict__, "_compiled_call_impl"})
_SETTINGS = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    enum.Enum,
    torch.dtype,
    torch.device,
    FunctionType,
    BuiltinFunctionType,
    type,
)
_MISSING = object()

Precision = tuple[torch.dtype, "torch.dtype | None"]  # of the input, and of autocast


class GatedBlock(NamedTuple):
    """What was found of a module that computes a gated MLP.

    gate, up, down: names of its children. up_first: whether it calls up before gate. others: the names and classes of its other children.
    settings: as `settings_of`. activation: a key of `ACTIVATIONS`. argument: the name of its forward's input, the first parameter.
    precisions: those in which it was checked.
    """

    gate: str
    up: str
    down: str
    up_first: bool
    others: tuple[tuple[str, type], ...]
    settings: dict[tuple[str, str], Any]
    activation: str
    argument: str
    precisions: frozenset[Precision]

    def paths(self, path: str) -> tuple[str, str, str]:
        """The paths of gate, up and down of the module at this path."""
        start = f"{path}." if path else ""
        return start + self.gate, start + self.up, start + self.down

    def layers_of(self, module: nn.Module) -> list[nn.Module | None]:
        """Gate, up and down."""
        return [module._modules.get(name) for name in (self.gate, self.up, self.down)]

    def input_of(self, args: Sequence[Any], named: Mapping[str, Any]) -> Any:
        """The input of a call, or None if it has other arguments."""
        if len(args) + len(named) != 1:
            return None
        return args[0] if args else named.get(self.argument)


class _Gated(nn.Module):
    """The first base of the classes of `_gated_class`."""

    def __init_subclass__(cls, **named: Any) -> None:
        """Nothing: what a class does for its subclasses is not for this one."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        if not _is_own(type(self)):
            return reduced
        _, (_, *arguments), *rest = reduced
        return _new, (_original(type(self)), *arguments), *rest


_CLASSES: dict[tuple[type[nn.Module], Any], type[nn.Module]] = {}


def _gated_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `kind` that computes blocks, under the name of `kind`, by which other packages find modules."""
    checked = kind.forward  # which another package may replace later
    made = _CLASSES.get((kind, checked))
    if made is None:

        @functools.wraps(checked)
        def forward(self: nn.Module, *args: Any, **named: Any) -> Any:
            block: GatedBlock | None = self.__dict__.get(_BLOCK)
            if block is not None and kind.forward is checked and not torch.compiler.is_compiling():
                y = _output(self, block, block.input_of(args, named))
                if y is not None:
                    return y
            return kind.forward(self, *args, **named)

        own = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
        made = type(kind.__name__, (_Gated, kind), own | {"forward": forward})
        _CLASSES[kind, checked] = made
    return made


def _is_own(kind: type[nn.Module]) -> bool:
    """Whether `_gated_class` made the class; other packages make subclasses of it."""
    return kind.__mro__[1] is _Gated


def _original(kind: type[nn.Module]) -> type[nn.Module]:
    """The class that a class of `_gated_class`, or a subclass of one, was made of; any other class itself."""
    order = kind.__mro__
    return order[order.index(_Gated) + 1] if _Gated in order else kind


def _new(kind: type[nn.Module], *arguments: Any) -> nn.Module:
    made = _gated_class(kind)
    module: nn.Module = made.__new__(made, *arguments)
    return module


def own_class(module: nn.Module) -> type[nn.Module]:
    """The module's class without `install_gated`."""
    return _original(type(module))


def install_gated(module: nn.Module, block: GatedBlock) -> None:
    """Let the module compute the block by `gated_mlp` wherever that computes what its children do."""
    if not isinstance(module, _Gated):
        module.__class__ = _gated_class(type(module))
    module.__dict__[_BLOCK] = block


def layers_in_blocks(model: nn.Module) -> set[nn.Module]:
    """Gate, up and down of every block of a model."""
    blocks = ((m, m.__dict__[_BLOCK]) for m in model.modules() if _BLOCK in m.__dict__)
    return {la for module, block in blocks for la in block.layers_of(module) if la is not None}


def restore_gated(model: nn.Module) -> None:
    """Undo every `install_gated`."""
    for module in model.modules():
        module.__dict__.pop(_BLOCK, None)
        if _is_own(type(module)):
            module.__class__ = _original(type(module))


def why_not_gated(layer: nn.Module | None) -> str | None:
    """Why a block cannot compute this layer, or None if it can."""
    if isinstance(layer, LoRALinear):
        if type(layer).forward is not LoRALinear.forward or has_hooks(layer):
            return "it has hooks or a custom forward"
        if layer._parameters["lora_magnitude"] is not None:
            return "it has DoRA"
        layer = layer.wrapped
    if layer is None or not is_plain(layer):
        return "it has hooks, a custom forward or a quantised weight"
    if "weight" not in layer._parameters:
        return "its weight is recomputed at each access (parametrised)"
    return None


def settings_of(module: nn.Module, others: Iterable[str]) -> dict[tuple[str, str], Any]:
    """(name of the child, or "", and path below it, name) → the attributes of the module and of its other children that are plain values or functions."""
    children = [("", module)]
    for name in others:
        child = module._modules.get(name)
        if child is not None:
            children += child.named_modules(prefix=name)
    return {
        (path, name): value
        for path, one in children
        for name, value in one.__dict__.items()
        if name not in _NO_SETTINGS and _is_setting(value)
    }


def _is_setting(value: object) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_setting, value))
    return value is None or isinstance(value, _SETTINGS)


def _has_settings(module: nn.Module, settings: Mapping[tuple[str, str], Any]) -> bool:
    """Whether each of the settings has its value; others may have been added."""
    at = ""
    one = module
    for (path, name), value in settings.items():
        if path != at:
            at, one = path, module.get_submodule(path)
        now = one.__dict__.get(name, _MISSING)
        if now is not value and now != value:
            return False
    return True


def precision_of(x: Tensor) -> Precision:
    return x.dtype, torch.get_autocast_dtype(x.device.type) if autocasts(x) else None


def _output(module: nn.Module, block: GatedBlock, x: Any) -> Tensor | None:
    """The output for x (..., K); None if the module's own forward must run."""
    if type(x) not in _PLAIN or x.is_nested or transformed() or has_global_hooks():
        return None
    layers = block.layers_of(module)
    if precision_of(x) not in block.precisions or not _as_checked(module, block, layers):
        return None
    if torch.is_grad_enabled() and not (x.requires_grad or any(map(_trains, layers[:2]))):
        return None  # what down needs is less than a block keeps
    adapted = [la if isinstance(la, LoRALinear) and not la.disabled else None for la in layers]
    bases = [_base(layer) for layer in layers]
    if autocasts(x):
        x, bases = autocast(x), [(autocast(weight), bias) for weight, bias in bases]
    weights = [weight for weight, _ in bases]
    if not _fit(x, weights):
        return None
    factors = [None if la is None else la.factors_on(x.device) for la in adapted]
    choice = _choose(x, weights, adapted, factors)
    if choice is None:
        return None
    gate, up, down = (
        _with_adapter(base, layer, pair, x, seed)
        for base, layer, pair, seed in zip(
            bases, adapted, factors, _seeds(block, adapted, x), strict=True
        )
    )
    return gated_mlp(x, gate, up, down, block.activation, triton=choice.backend == "triton")


def _as_checked(module: nn.Module, block: GatedBlock, layers: Sequence[nn.Module | None]) -> bool:
    """Whether the module has the children and settings that were checked, and no child has hooks."""
    if any(why_not_gated(layer) is not None for layer in layers):
        return False
    children = {name: child for name, child in module._modules.items() if child is not None}
    if len(children) != len(layers) + len(block.others):
        return False
    for name, kind in block.others:
        other = children.get(name)
        if other is None or type(other) is not kind or any(map(has_hooks, other.modules())):
            return False
    return _has_settings(module, block.settings)


def _trains(layer: nn.Module | None) -> bool:
    return layer is not None and any(p.requires_grad for p in layer.parameters())


def _base(layer: nn.Module | None) -> tuple[Tensor, Tensor | None]:
    """The weight (N, K) and the bias of a layer without its adapter."""
    linear = layer.wrapped if isinstance(layer, LoRALinear) else layer
    assert linear is not None
    weight: Tensor = attribute(linear, "weight")
    return weight.T if is_transposed_linear(linear) else weight, attribute(linear, "bias")


def _fit(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether the tensors can be multiplied; otherwise the layers raise their own errors."""
    gate, up, down = (weight.shape for weight in weights)
    same = all(weight.dtype == x.dtype and weight.device == x.device for weight in weights)
    return same and x.shape[-1:] == gate[1:] and gate == up and gate[:1] == down[1:]


def _choose(
    x: Tensor,
    weights: Sequence[Tensor],
    adapted: Sequence[LoRALinear | None],
    factors: Iterable[tuple[Tensor, Tensor] | None],
) -> Choice | None:
    """The backend of the block, as its adapted layers want it; None if they differ or none is adapted."""
    some = [layer for layer in adapted if layer is not None]
    if len({layer.backend for layer in some}) != 1:
        return None
    ranks = [0 if pair is None else pair[0].shape[0] for pair in factors]
    dropout = any(layer.training and layer.dropout for layer in some)
    return choose_gated(x, weights, ranks, dropout=dropout, backend=some[0].backend)


def share_a_mask(gate: nn.Module | None, up: nn.Module | None) -> bool:
    """Whether gate and up of a block have one mask, if they drop anything. Then `fuse` makes them a group too, so that the module's own forward draws
    the same seeds: under checkpointing it may run for a call that the block computed.
    """
    return (
        isinstance(gate, LoRALinear)
        and isinstance(up, LoRALinear)
        and gate.dropout == up.dropout
        and gate.lora_A.dtype == up.lora_A.dtype
        and gate.backend == up.backend
    )


def _seeds(
    block: GatedBlock, adapted: Sequence[LoRALinear | None], x: Tensor
) -> list[Tensor | None]:
    """The dropout seed of gate, up and down, drawn in the order in which the module's own forward draws them."""
    gate, up, _ = adapted
    first, second = (1, 0) if block.up_first else (0, 1)
    shared = gate and up and gate.training == up.training and share_a_mask(gate, up)
    seeds: list[Tensor | None] = [None, None, None]
    for i in (first, second, 2):
        layer = adapted[i]
        if i == second and shared:
            seeds[i] = seeds[first]
        elif layer is not None:
            seeds[i] = layer._draw_seed(x)
    return seeds


def _with_adapter(
    base: tuple[Tensor, Tensor | None],
    layer: LoRALinear | None,
    factors: tuple[Tensor, Tensor] | None,
    x: Tensor,
    seed: Tensor | None,
) -> Layer:
    weight, bias = base
    if layer is None or factors is None:
        n, k = weight.shape
        return Layer(weight, bias, LowRank(x.new_empty(0, k), x.new_empty(n, 0), 1.0))
    layer.usage.called = True
    return Layer(weight, bias, low_rank(*factors, layer.scaling, layer.dropout, seed))
