"""Modules that compute a gated MLP, y = down(act(gate(x)) ∘ up(x)), in one call: `fastlora.fuse` finds them, `install_gated` changes their class.

The class is a subclass with a forward of its own, so copies, replicas, pickles and hooks of the module work as before. What the forward needs are
names of the children in the module's `__dict__`: a copy reads its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastlora.layers.linear import LoRALinear
from fastlora.layers.plain import attribute, has_hooks, is_plain, is_transposed_linear
from fastlora.ops.dispatch import Choice, choose_gated, transformed
from fastlora.ops.gated import gated_mlp
from fastlora.ops.linear import autocast, autocasts, low_rank
from fastlora.ops.reference import Layer, LowRank

_BLOCK = "_fastlora_gated"
_PLAIN = (torch.Tensor, nn.Parameter)


class GatedBlock(NamedTuple):
    """How a module computes. gate, up, down: names of its children. activation: a key of `ACTIVATIONS`. argument: the name of its forward's input."""

    gate: str
    up: str
    down: str
    activation: str
    argument: str

    def paths(self, path: str) -> tuple[str, str, str]:
        """The paths of gate, up and down of the module at this path."""
        start = f"{path}." if path else ""
        return start + self.gate, start + self.up, start + self.down

    def layers_of(self, module: nn.Module) -> list[nn.Module | None]:
        """Gate, up and down."""
        return [module._modules.get(name) for name in (self.gate, self.up, self.down)]


class _Gated(nn.Module):
    """The first base of the classes of `_gated_class`."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            block: GatedBlock | None = self.__dict__.get(_BLOCK)
            if block is not None and len(args) + len(kwargs) == 1:
                x = args[0] if args else kwargs.get(block.argument)
                y = None if x is None else _output(self, block, x)
                if y is not None:
                    return y
        return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        if not _is_own(type(self)):
            return reduced
        _, (_, *arguments), *rest = reduced
        return _new, (_original(type(self)), *arguments), *rest


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _gated_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `kind` with the forward of `_Gated`, under the name of `kind`, by which other packages find modules."""
    if kind not in _CLASSES:
        names = ("__module__", "__qualname__", "__doc__")
        own = {name: getattr(kind, name) for name in names}
        _CLASSES[kind] = type(kind.__name__, (_Gated, kind), own)
    return _CLASSES[kind]


def _is_own(kind: type[nn.Module]) -> bool:
    """Whether `_gated_class` made the class; other packages make subclasses of it."""
    return kind.__mro__[1] is _Gated


def _original(kind: type[nn.Module]) -> type[nn.Module]:
    return kind.__mro__[2]  # after itself and _Gated


def _new(kind: type[nn.Module], *arguments: Any) -> nn.Module:
    made = _gated_class(kind)
    module: nn.Module = made.__new__(made, *arguments)
    return module


def install_gated(module: nn.Module, block: GatedBlock) -> None:
    """Let the module compute the block by `gated_mlp` wherever that computes what its children do."""
    module.__class__ = _gated_class(type(module))
    module.__dict__[_BLOCK] = block


def layers_in_blocks(model: nn.Module) -> set[nn.Module]:
    """Gate, up and down of every block of a model."""
    blocks = ((m, m.__dict__[_BLOCK]) for m in model.modules() if _BLOCK in m.__dict__)
    return {la for module, block in blocks for la in block.layers_of(module) if la is not None}


def restore_gated(model: nn.Module) -> int:
    """Undo every `install_gated`. Returns how many adapted layers were in a block."""
    count = 0
    for module in model.modules():
        block: GatedBlock | None = module.__dict__.pop(_BLOCK, None)
        if block is None:
            continue
        count += sum(isinstance(layer, LoRALinear) for layer in block.layers_of(module))
        if _is_own(type(module)):
            module.__class__ = _original(type(module))
    return count


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


def _output(module: nn.Module, block: GatedBlock, x: Any) -> Tensor | None:
    """The output for x (..., K); None if the children must run separately."""
    if type(x) not in _PLAIN or x.is_nested or transformed() or _has_any_global_hook():  # type: ignore[no-untyped-call]
        return None
    layers = block.layers_of(module)
    if any(why_not_gated(layer) is not None for layer in layers):
        return None
    if len(module._modules) > len(layers) and any(map(has_hooks, _others(module, layers))):
        return None  # the hooks of an activation would not run
    adapted = [la if isinstance(la, LoRALinear) and not la.disabled else None for la in layers]
    bases = [_base(layer) for layer in layers]
    if autocasts(x):
        x, bases = autocast(x), [(autocast(weight), bias) for weight, bias in bases]
    weights = [weight for weight, _ in bases]
    choice = _choose(x, weights, adapted) if _fit(x, weights) else None
    if choice is None:
        return None
    gate, up, down = (
        _with_adapter(base, layer, x, seed)
        for base, layer, seed in zip(bases, adapted, _seeds(adapted, x), strict=True)
    )
    return gated_mlp(x, gate, up, down, block.activation, triton=choice.backend == "triton")


def _others(module: nn.Module, layers: Sequence[nn.Module | None]) -> Iterator[nn.Module]:
    return (m for m in module._modules.values() if m is not None and m not in layers)


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
    x: Tensor, weights: Sequence[Tensor], adapted: Sequence[LoRALinear | None]
) -> Choice | None:
    """The backend of the block, as its adapted layers want it; None if they differ or none is adapted."""
    some = [layer for layer in adapted if layer is not None]
    if len({layer.backend for layer in some}) != 1:
        return None
    ranks = [0 if layer is None else layer.factors()[0].shape[0] for layer in adapted]
    dropout = any(layer.training and layer.dropout for layer in some)
    return choose_gated(x, weights, ranks, dropout=dropout, backend=some[0].backend)


def _seeds(adapted: Sequence[LoRALinear | None], x: Tensor) -> list[Tensor | None]:
    """The dropout seed of each layer. Gate and up with one probability have one mask."""
    gate, up, down = adapted
    first = None if gate is None else gate._draw_seed(x)
    if gate and up and (gate.training, gate.dropout) == (up.training, up.dropout):
        second = first
    else:
        second = None if up is None else up._draw_seed(x)
    return [first, second, None if down is None else down._draw_seed(x)]


def _with_adapter(
    base: tuple[Tensor, Tensor | None], layer: LoRALinear | None, x: Tensor, seed: Tensor | None
) -> Layer:
    weight, bias = base
    if layer is None:
        n, k = weight.shape
        return Layer(weight, bias, LowRank(x.new_empty(0, k), x.new_empty(n, 0), 1.0))
    layer.usage.called = True
    factors = layer.factors_on(x.device)
    return Layer(weight, bias, low_rank(*factors, layer.scaling, layer.dropout, seed))
