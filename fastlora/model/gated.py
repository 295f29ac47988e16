"""Find the gated MLPs of a model, y = down(act(gate(x)) ∘ up(x)), by running its modules."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from fastlora.layers.gated import GatedBlock, why_not_gated
from fastlora.layers.linear import LoRALinear
from fastlora.layers.plain import is_transposed_linear
from fastlora.model.switch import eval_mode, train_mode
from fastlora.ops.gated import ACTIVATIONS

_MODERATE, _LARGE = (
    2.0,
    200.0,
)  # root mean squares of gate(x) and up(x) for the inputs that are tried
# Not in torch 2.6.
_TOP_HOOKS = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)

Roles = tuple[str, str, str]
Match = tuple[tuple[str, str], str]  # (gate, up), activation


class NotGated(Exception):
    """Why a module does not compute a gated MLP."""


@dataclass
class _Call:
    """A call of a linear layer: its input and output, their versions at the call, the value of the output then.

    in_region: whether checkpointing ran it.
    """

    x: Any
    y: Any
    versions: tuple[int, int]
    value: Tensor
    in_region: bool


@dataclass
class _Run:
    """A run of a module's own forward: its input, its output, and the calls of each layer."""

    x: Tensor
    y: Any
    calls: dict[str, list[_Call]]


def candidates(model: nn.Module) -> dict[str, nn.Module]:
    """By path, the modules with exactly three linear layers, some of them adapted, and no other parameters or buffers."""
    return {path: module for path, module in model.named_modules() if _is_candidate(module)}


def find_block(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> GatedBlock | None:
    """The block that a candidate computes, from a call of its forward with these arguments; None if it does not look like a gated MLP.

    The module is run in eval and in training mode, on its input and on random ones of the same shape, moderate and large. Each time the input of
    down must be act(gate(x)) ∘ up(x), bit for bit, and down's output what the module returns. Modes and torch's random state are restored.

    Raises: NotGated if it looks like one, but does more than a block computes or has a layer that no block computes.
    """
    given = [*args, *kwargs.values()]
    if len(given) != 1 or not _is_input(given[0]):
        return None
    x, layers = given[0].detach(), _linear_children(module)
    with torch.inference_mode(False), torch.random.fork_rng([x.device] if x.is_cuda else []):
        roles = _roles(_run(module, layers, x, False))
        if roles is None:
            return None
        _check_layers(module, layers)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
        size = _size(_run(module, layers, noise, False), roles)
        samples = [x, noise, noise * (_MODERATE / size), noise * (_LARGE / size)]
        orders = roles[:2], (roles[1], roles[0])
        names: set[Match] = set(itertools.product(orders, ACTIVATIONS))
        for training, sample in itertools.product((False, True), samples):
            names &= _matches(_run(module, layers, sample, training), roles, training)
    if len(names) > 1:
        raise NotGated("SiLU and GELU have the same values for all inputs that were tried")
    (((gate, up), activation),) = names
    _, argument, *_ = inspect.signature(type(module).forward).parameters
    return GatedBlock(gate, up, roles[2], activation, argument)


def _is_candidate(module: nn.Module) -> bool:
    layers = _linear_children(module)
    if len(layers) != 3 or not any(isinstance(la, LoRALinear) for la in layers.values()):
        return False
    own = {id(tensor) for layer in layers.values() for tensor in _tensors(layer)}
    return all(id(tensor) in own for tensor in _tensors(module))


def _linear_children(module: nn.Module) -> dict[str, nn.Module]:
    """By name; a layer under two names once."""
    return {
        name: child
        for name, child in module.named_children()
        if isinstance(child, (LoRALinear, nn.Linear)) or is_transposed_linear(child)
    }


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return itertools.chain(module.parameters(), module.buffers())


def _is_input(x: object) -> TypeGuard[Tensor]:
    return type(x) is Tensor and x.is_floating_point() and not x.is_nested and x.numel() > 0


def _run(module: nn.Module, layers: Mapping[str, nn.Module], x: Tensor, training: bool) -> _Run:
    """Run the module's own forward on a copy of x; in training mode with gradients, since a forward may ask for either."""
    x = x.clone().requires_grad_(training)
    run = _Run(x, None, {name: [] for name in layers})

    def note(name: str, _: nn.Module, inputs: tuple[Any, ...], y: Any) -> None:
        given = inputs[0] if inputs else None
        if isinstance(given, Tensor) and isinstance(y, Tensor):
            region = torch.is_grad_enabled() != training or (
                _TOP_HOOKS is not None and _TOP_HOOKS(True) is not None
            )
            versions = given._version, y._version
            run.calls[name].append(_Call(given, y, versions, y.detach().clone(), region))

    mode = train_mode if training else eval_mode
    with ExitStack() as hooks, mode(module), torch.set_grad_enabled(training):
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_hook(partial(note, name)))
        run.y = type(module).forward(module, x)
    return run


def _roles(run: _Run) -> Roles | None:
    """The names of the two layers that receive the module's input and of the third, if it receives a tensor of the form of their outputs."""
    if any(len(calls) != 1 for calls in run.calls.values()):
        return None
    calls = {name: found for name, (found,) in run.calls.items()}
    first = [name for name, call in calls.items() if call.x is run.x]
    last = [name for name in calls if name not in first]
    if len(first) != 2:
        return None
    down = calls[last[0]]
    alike = all(down.x.shape == calls[name].y.shape for name in first)
    return (first[0], first[1], last[0]) if alike and down.y is run.y else None


def _check_layers(module: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    if "forward" in module.__dict__:
        raise NotGated("another package has set its forward")
    for name, layer in layers.items():
        reason = why_not_gated(layer)
        if reason is not None:
            raise NotGated(f"{name}: {reason}")


def _size(run: _Run, roles: Roles) -> Tensor:
    """The larger root mean square of gate(x) and up(x)."""
    values = [run.calls[name][0].value.float() for name in roles[:2]]
    return torch.stack([value.square().mean().sqrt() for value in values]).max()


def _matches(run: _Run, roles: Roles, training: bool) -> set[Match]:
    """What explains the input of down.

    Raises: NotGated if there are none.
    """
    mode = "training" if training else "eval"
    if any(len(calls) != 1 for calls in run.calls.values()):
        raise NotGated(f"in {mode} mode its forward does not call each layer once")
    one, other, down = (run.calls[name][0] for name in roles)
    if any(call.in_region for call in (one, other, down)):
        raise NotGated("its forward checkpoints a layer")
    if any(call.x is not run.x or call.versions[0] for call in (one, other)):
        raise NotGated(f"in {mode} mode {roles[0]} and {roles[1]} do not both receive its input")
    if run.y is not down.y or down.y._version != down.versions[1]:
        raise NotGated(f"in {mode} mode its output is not that of {roles[2]}")
    found: set[Match] = set()
    for names in (roles[:2], (roles[1], roles[0])):
        gate, up = (run.calls[name][0] for name in names)
        for activation, (act, _) in ACTIVATIONS.items():
            h = act(gate.value) * up.value
            if torch.allclose(down.x, h, 0.0, 0.0, equal_nan=True):
                found.add((names, activation))
    if not found:
        raise NotGated(
            f"in {mode} mode {roles[2]} does not receive the product of SiLU or GELU of {roles[0]} and {roles[1]}"
        )
    return found
