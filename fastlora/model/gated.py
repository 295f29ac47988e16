"""Find the gated MLPs of a model, y = down(act(gate(x)) ∘ up(x)), by running its modules."""

from __future__ import annotations

import inspect
import itertools
import random
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastlora.layers.gated import (
    GatedBlock,
    Precision,
    own_class,
    precision_of,
    settings_of,
    why_not_gated,
)
from fastlora.layers.linear import LoRALinear
from fastlora.layers.plain import is_transposed_linear
from fastlora.model.region import region
from fastlora.ops.gated import ACTIVATIONS

# Root mean squares of gate(x) or up(x) for the random inputs that are tried, and that of the gradients.
_SIZES, _GRADIENT = (2.0, 200.0, 1e4), 100.0
_AUTOCASTS = (None, torch.bfloat16, torch.float16)

Roles = tuple[str, str, str]
Match = tuple[tuple[str, str], str]  # (gate, up), activation


class NotGated(Exception):
    """Why a module does not compute a gated MLP."""


class _Mode(NamedTuple):
    """How a module is run."""

    training: bool
    gradients: bool

    def __str__(self) -> str:
        name = "training mode" if self.training else "eval mode"
        if self.training == self.gradients:
            return name
        return f"{name} {'with' if self.gradients else 'without'} gradients"


_EVAL, _TRAINING = _Mode(False, False), _Mode(True, True)
_MODES = (_EVAL, _TRAINING, _Mode(False, True), _Mode(True, False))


class _Call(NamedTuple):
    """A call of a linear layer.

    x: the input. y: the output. given: what the module received for it: y, or a copy. versions: of x and `given` at the call.
    state: of autocast, gradients and checkpointing. number: in the order of all calls.
    """

    x: Any
    y: Tensor
    given: Tensor
    versions: tuple[int, int]
    state: tuple[Any, ...]
    number: int


@dataclass
class _Run:
    """A run of a module's own forward: its input, its output, the state in which it began, and the calls of each layer."""

    x: Tensor
    y: Any
    mode: _Mode
    state: tuple[Any, ...]
    calls: dict[str, list[_Call]]


def candidates(model: nn.Module) -> dict[str, nn.Module]:
    """By path, the modules with exactly three linear layers, some of them adapted, and no other parameters or buffers."""
    return {path: module for path, module in model.named_modules() if _is_candidate(module)}


def why_no_block(module: nn.Module) -> str | None:
    """Why a candidate cannot become a block whatever it computes, or None if it can."""
    kind = own_class(module)
    if "forward" in module.__dict__:
        return "another package has set its forward"
    standard = object.__reduce__, object.__reduce_ex__
    if (kind.__reduce__, kind.__reduce_ex__) != standard:
        return "its class has a way of its own to be pickled"
    for name, layer in _linear_children(module).items():
        reason = why_not_gated(layer)
        if reason is not None:
            return f"{name}: {reason}"
    return None


def find_block(
    module: nn.Module, args: Sequence[Any], named: Mapping[str, Any], obstacle: str | None
) -> GatedBlock | None:
    """The block that a candidate computes, from a call of its forward with these arguments; None if it does not look like a gated MLP.

    The module's own forward is run in eval and in training mode, with and without gradients, on its input and on random ones: moderate, large, with an infinite
    number, and with other numbers of rows. Each time the input of down must equal act(gate(x)) ∘ up(x) exactly, with its gradients, and the module must
    return down's output. Modes, attributes and random states are restored. obstacle: what `why_no_block` said.

    Raises: NotGated if it looks like one, but does more than a block computes, cannot become one or cannot be run so.
    """
    argument = _first_parameter(module)
    given = [*args, *(named[name] for name in named if name == argument)]
    if argument is None or len(given) != 1 or len(args) + len(named) != 1:
        return None
    x = given[0]
    plain = type(x) is Tensor and x.is_floating_point() and not (x.is_nested or x.is_meta)
    if not plain or x.numel() == 0:
        return None
    with torch.inference_mode(False), _undisturbed(module):
        return _search(module, x.detach().clone(), argument, obstacle)


def _search(module: nn.Module, x: Tensor, argument: str, obstacle: str | None) -> GatedBlock | None:
    run = _run(module, x, _EVAL)
    roles = _roles(run)
    if roles is None:
        return None
    if obstacle is not None:
        raise NotGated(obstacle)
    found: set[Match] = set(itertools.product(_orders(roles), ACTIVATIONS))
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), device="cpu").to(x)
    size = _size(_called_once(_run(module, noise, _EVAL)), roles)
    infinite = noise.clone()
    infinite.view(-1)[0] = torch.inf
    # Other numbers of rows.
    resized = [noise[:1], torch.cat([noise, noise])] if noise.ndim > 1 else []
    for sample, mode in itertools.chain(
        itertools.product((x, noise), _MODES),
        itertools.product([noise * (s / size) for s in _SIZES], (_EVAL, _TRAINING)),
        itertools.product([infinite, *resized], (_EVAL, _TRAINING)),
    ):
        found &= _matches(_run(module, sample, mode, copied=roles[:2]), roles)
    if not found:
        raise NotGated(
            "it computes one product for some inputs that were tried, another for others"
        )
    if len(found) > 1:
        raise NotGated("SiLU and GELU have the same values for all inputs that were tried")
    (((gate, up), activation),) = found
    numbers = {name: calls[0].number for name, calls in run.calls.items()}
    others = [(n, c) for n, c in module._modules.items() if c is not None and n not in roles]
    return GatedBlock(
        gate,
        up,
        roles[2],
        up_first=numbers[up] < numbers[gate],
        others=tuple((name, type(child)) for name, child in others),
        settings=settings_of(module, [name for name, _ in others]),
        activation=activation,
        argument=argument,
        precisions=frozenset(_precisions(module, noise, roles, found)),
    )


@contextmanager
def _or_not_gated(direction: str) -> Iterator[None]:
    """Around the module's own code, which may raise anything for an input that it was not written for."""
    try:
        yield
    except Exception as error:
        line = next(iter(str(error).splitlines()), "")
        raise NotGated(
            f"its {direction} raises {type(error).__name__} for an input that was tried: {line}"
        ) from error


def _precisions(
    module: nn.Module, x: Tensor, roles: Roles, found: set[Match]
) -> Iterator[Precision]:
    """The present precision, and those with and without autocast in which the module computes the same."""
    yield precision_of(x)
    device = x.device.type
    for dtype in _AUTOCASTS if torch.amp.is_autocast_available(device) else ():
        # Where it is no gated MLP, the module's own forward will run.
        with suppress(NotGated), torch.autocast(device, dtype, enabled=dtype is not None):
            if (precision := precision_of(x)) and all(
                found <= _matches(_run(module, x, mode, copied=roles[:2]), roles)
                for mode in (_EVAL, _TRAINING)
            ):
                yield precision


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


def _first_parameter(module: nn.Module) -> str | None:
    """The name of the first parameter of the module's own forward, if it may be given by position."""
    _, *parameters = inspect.signature(own_class(module).forward).parameters.values()
    if not parameters or parameters[0].kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
        return None
    return parameters[0].name


@contextmanager
def _undisturbed(module: nn.Module) -> Iterator[None]:
    """Restores random states, the dropout of adapters, which is 0 within, and the attributes of modules other than linear layers."""
    layers = [la for la in module.modules() if isinstance(la, LoRALinear)]
    before = _attributes(module), _random_state(), [la.dropout for la in layers]
    try:
        for layer in layers:
            layer.dropout = 0.0
        yield
    finally:
        attributes, states, dropout = before
        for one, held in attributes:
            one.__dict__.clear()
            one.__dict__.update(held)
        for layer, p in zip(layers, dropout, strict=True):
            layer.dropout = p
        _set_random_state(states)


def _attributes(module: nn.Module) -> list[tuple[nn.Module, dict[str, Any]]]:
    inside = {m for layer in _linear_children(module).values() for m in layer.modules()}
    return [(m, dict(m.__dict__)) for m in module.modules() if m not in inside]


def _contents(attributes: Sequence[tuple[nn.Module, dict[str, Any]]]) -> list[tuple[Any, ...]]:
    """What tells whether an attribute, or a tensor or container that it is, was changed."""
    found: list[tuple[Any, ...]] = []
    for one, held in attributes:
        now = one.__dict__
        found.append((now.keys() == held.keys(), *(now.get(name) is held[name] for name in held)))
        for value in held.values():
            if isinstance(value, Tensor) and not value.is_inference():
                found.append((value._version,))
            elif isinstance(value, (list, set, dict, deque)):
                found.append((len(value), *map(id, value)))
    return found


def _random_state() -> tuple[Any, ...]:
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    gpus = torch.cuda.get_rng_state_all() if cuda else []
    return torch.get_rng_state(), gpus, random.getstate(), np.random.get_state()


def _set_random_state(states: tuple[Any, ...]) -> None:
    cpu, gpus, python, numpy = states
    torch.set_rng_state(cpu)
    torch.cuda.set_rng_state_all(gpus)
    random.setstate(python)
    np.random.set_state(numpy)


def _same_random_state(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    (cpu, gpus, python, numpy), (cpu_2, gpus_2, python_2, numpy_2) = one, other
    same = all(map(torch.equal, [cpu, *gpus], [cpu_2, *gpus_2])) and python == python_2
    return same and np.array_equal(numpy[1], numpy_2[1]) and numpy[2:] == numpy_2[2:]


def _state(x: Tensor) -> tuple[Any, ...]:
    return precision_of(x)[1], torch.is_grad_enabled(), region(random=False)


def _run(module: nn.Module, x: Tensor, mode: _Mode, copied: Sequence[str] = ()) -> _Run:
    """Run the module's own forward on a copy of x. copied: layers of whose outputs the module receives copies, which it may change.

    Raises: NotGated if the forward draws random numbers or sets attributes.
    """
    layers = _linear_children(module)
    x = x.clone().requires_grad_(mode.gradients)
    attributes, states, numbers = _attributes(module), _random_state(), itertools.count()
    contents = _contents(attributes)
    with ExitStack() as stack, _switched(module, mode.training):
        stack.enter_context(torch.set_grad_enabled(mode.gradients))
        run = _Run(x, None, mode, _state(x), {name: [] for name in layers})

        def note(name: str, _: nn.Module, inputs: tuple[Any, ...], y: Any) -> Any:
            taken = inputs[0] if inputs else None
            if not isinstance(taken, Tensor) or not isinstance(y, Tensor):
                return y
            given = y.clone() if name in copied else y
            versions = taken._version, given._version
            run.calls[name].append(_Call(taken, y, given, versions, _state(x), next(numbers)))
            return given

        for name, layer in layers.items():
            stack.enter_context(layer.register_forward_hook(partial(note, name)))
        with _or_not_gated("forward"):
            run.y = own_class(module).forward(module, x)
    if not _same_random_state(states, _random_state()):
        raise NotGated("its forward draws random numbers")
    if _contents(attributes) != contents:
        raise NotGated("its forward changes attributes")
    return run


@contextmanager
def _switched(module: nn.Module, training: bool) -> Iterator[None]:
    """Every module below in this mode. Unlike `eval_mode` it may be nested in another mode."""
    before = [(one, one.training) for one in module.modules()]
    try:
        for one, _ in before:
            one.training = training
        yield
    finally:
        for one, was in before:
            one.training = was


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
    shapes = [getattr(calls[name].y, "shape", None) for name in first]
    alike = shapes == [getattr(down.x, "shape", None)] * 2
    return (first[0], first[1], last[0]) if alike else None


def _orders(roles: Roles) -> tuple[tuple[str, str], tuple[str, str]]:
    """What may be (gate, up)."""
    one, other, _ = roles
    return (one, other), (other, one)


def _size(run: _Run, roles: Roles) -> Tensor:
    """The larger root mean square of gate(x) and up(x)."""
    values = [run.calls[name][0].y.float() for name in roles[:2]]
    return torch.stack([value.square().mean().sqrt() for value in values]).max()


def _called_once(run: _Run) -> _Run:
    if any(len(calls) != 1 for calls in run.calls.values()):
        raise NotGated(f"in {run.mode} its forward does not call each layer once")
    return run


def _matches(run: _Run, roles: Roles) -> set[Match]:
    """What explains the input of down and its gradients.

    Raises: NotGated if there is nothing.
    """
    mode = _called_once(run).mode
    one, other, down = (run.calls[name][0] for name in roles)
    if any(call.state != run.state for call in (one, other, down)):
        raise NotGated(
            f"in {mode} its forward checkpoints a layer or changes autocast or gradients"
        )
    if any(call.x is not run.x for call in (one, other)) or run.x._version:
        raise NotGated(f"in {mode} {roles[0]} and {roles[1]} do not both receive its input")
    if run.y is not down.given or down.given._version != down.versions[1]:
        raise NotGated(f"in {mode} its output is not that of {roles[2]}")
    tensors = (run.x, one.given, other.given, down.x, run.y)
    if any(tensor._backward_hooks for tensor in tensors):
        raise NotGated(f"in {mode} its forward registers a hook on a tensor")
    values: set[Match] = set()
    found: set[Match] = set()
    v = _GRADIENT * torch.randn_like(down.x)
    received: Sequence[Tensor | None] = [None, None]
    if mode.gradients and down.x.requires_grad:
        with _or_not_gated("backward"):
            received = torch.autograd.grad(down.x, (one.y, other.y), v, allow_unused=True)
    for (gate, up), activation in itertools.product(_orders(roles), ACTIVATIONS):
        leaves = {n: run.calls[n][0].y.detach().requires_grad_(mode.gradients) for n in roles[:2]}
        h = ACTIVATIONS[activation].forward(leaves[gate]) * leaves[up]
        if not _equal(down.x.detach(), h.detach()):
            continue
        match: Match = (gate, up), activation
        values.add(match)
        wanted = torch.autograd.grad(h, [*leaves.values()], v) if mode.gradients else ()
        if not mode.gradients or all(map(_equal, received, wanted)):
            found.add(match)
    if not values:
        raise NotGated(
            f"in {mode} {roles[2]} does not receive the product of SiLU or GELU of {roles[0]} and {roles[1]}"
        )
    if not found:
        raise NotGated(f"in {mode} the gradients of {roles[0]} or {roles[1]} are not the product's")
    return found


def _equal(one: Tensor | None, other: Tensor) -> bool:
    """Whether two tensors are equal, NaN to NaN, in one dtype and on one device."""
    return (
        one is not None
        and (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
        and torch.allclose(one, other, 0.0, 0.0, equal_nan=True)
    )
