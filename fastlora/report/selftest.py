"""A self-test of a model with adapters: which of them change nothing, or learn nothing, and why."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastlora.errors import CheckError, InjectionError
from fastlora.layers.base import LoRALayer, named_lora_layers

Modes = list[tuple[nn.Module, bool]]

_SHOWN = 4  # paths in a line of the report
_SHARE = 0.1  # norm of a tried update relative to the weight's


@dataclass(frozen=True)
class Finding:
    """What is wrong with one adapter. path: its layer. reason: what was seen, and what usually causes it."""

    path: str
    reason: str


@dataclass(frozen=True)
class CheckReport:
    """What `check` found. layers: the paths of all adapters. findings: at most one for each; none means that all is well.
    `str(report)` has a line for each reason.
    """

    layers: tuple[str, ...]
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether every adapter changes the output and gets a gradient."""
        return not self.findings

    def raise_if_failed(self) -> None:
        """Raises: CheckError that holds the whole report, if there are findings."""
        if self.findings:
            raise CheckError(str(self))

    def __str__(self) -> str:
        if self.ok:
            return f"all {len(self.layers)} adapters change the output and get a gradient"
        head = f"{len(self.findings)} of {len(self.layers)} adapters do not work as they should"
        alike: dict[str, list[str]] = {}
        for finding in self.findings:
            alike.setdefault(finding.reason, []).append(finding.path or "the layer")
        lines = [
            ", ".join(paths[:_SHOWN])
            + (f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else "")
            + f": {reason}"
            for reason, paths in alike.items()
        ]
        return "\n  ".join([head, *lines])


def check(model: nn.Module, *args: Any, **kwargs: Any) -> CheckReport:
    """Run `model(*args, **kwargs)` and find adapters that do not change the output or get no gradient.

    Three runs: forward and backward in training mode (in the model's own mode if it is in training), the same in eval mode,
    and eval without gradients, where fast paths are taken. All parameters that train are replaced for the time by others on
    the same storage, and lora_B by itself plus random values that make the update a tenth of the weight. A run for each
    layer follows only where these leave a doubt. It finds an adapter
        whose weight is read elsewhere, so that its forward is not called or its result is not used;
        that a fast path leaves out in eval mode;
        behind reentrant checkpointing whose inputs need no gradient (a frozen embedding), torch.no_grad() or detach();
        that is frozen, whose alpha is 0, or whose lora_A and lora_B are both zero.
    A layer that the sample does not reach, such as an expert that is not chosen, is a finding too.

    Parameters, their gradients and hooks, buffers, training modes and the random states of torch, Python and numpy are as before
    afterwards, also if the model raises. Attributes that a forward sets are not undone, and module hooks run.

    args, kwargs: what the model is called with; tensors in lists, tuples and dicts are copied before each run. The output
        may be a tensor, or tensors in mappings, sequences, dataclasses or objects with `.feats`.

    Raises: InjectionError if the model has no adapters or is wrapped for distributed training; CheckError if the output holds no
    floating-point tensor; whatever the model raises.
    """
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise InjectionError(f"model: is a {type(model).__name__}; give model.module")
    layers = list(named_lora_layers(model))
    if not layers:
        raise InjectionError("model: has no adapters, so there is nothing to check")
    modes = [(module, module.training) for module in model.modules()]
    with torch.inference_mode(False), _restored(model, modes) as rewind:

        def run(grad: bool) -> list[Tensor]:
            rewind()
            with torch.set_grad_enabled(grad):
                return _outputs(model(*_copied(args), **_copied(kwargs)))

        findings = {
            path: reason
            for path, layer in layers
            if (reason := _why_it_cannot_learn(layer)) is not None
        }
        with _stand_ins(model, layers):
            learning = [(p, layer) for p, layer in layers if p not in findings]
            _to_training(modes)
            no_gradient = _without_gradient(run, learning)
            for module, _ in modes:
                module.training = False  # not `eval()`, which may be overridden to do more
            silent = _unseen(run, layers)
            if no_gradient or silent:
                suspects = {
                    path: layer for path, layer in layers if path in no_gradient or path in silent
                }
                _to_training(modes)
                calls = _watch(run, suspects)
                for path in suspects:
                    findings.setdefault(
                        path, _reason(path in no_gradient, path in silent, calls[path])
                    )
    found = tuple(Finding(path, findings[path]) for path, _ in layers if path in findings)
    return CheckReport(tuple(path for path, _ in layers), found)


def _why_it_cannot_learn(layer: LoRALayer) -> str | None:
    a, b = layer.lora_A, layer.lora_B
    if layer.disabled:
        return "is disabled by disable_adapter"
    if not (a.requires_grad or b.requires_grad):
        return "lora_A and lora_B are frozen (requires_grad is False): nothing here trains"
    if layer.scaling == 0:
        return "alpha is 0, so the update is scaled to nothing"
    if not (a.any() or b.any()):
        return "lora_A and lora_B are both zero, so neither gets a gradient; one must start at random values"
    return None


def _without_gradient(
    run: Callable[[bool], list[Tensor]], layers: list[tuple[str, LoRALayer]]
) -> set[str]:
    """The paths whose lora_A and lora_B both get no gradient, or zeros."""
    _backward(run(True))
    no_gradient = {path for path, layer in layers if not _has_gradient(layer)}
    _forget_gradients(layer for _, layer in layers)
    return no_gradient


def _unseen(run: Callable[[bool], list[Tensor]], layers: list[tuple[str, LoRALayer]]) -> set[str]:
    """The paths whose lora_B changes nothing in eval mode without gradients.

    A layer with a gradient in eval mode changes the output there. If the run without gradients gives the same output bit for bit,
    it changes that one too; if not, or without a gradient, the layer is tried by itself.
    """
    with_gradients = run(True)
    _backward(with_gradients)
    doubtful = {path for path, layer in layers if not _has_gradient(layer)}
    _forget_gradients(layer for _, layer in layers)
    base = run(False)
    if _difference(base, with_gradients) > 0:
        doubtful = {path for path, _ in layers}
    if not doubtful:
        return set()
    noise = _difference(base, run(False))
    unseen = set()
    for path, layer in layers:
        if path not in doubtful:
            continue
        kept = layer.lora_B
        layer.lora_B = nn.Parameter(-2 * kept.detach(), kept.requires_grad)
        if _difference(base, run(False)) <= 2 * noise:
            unseen.add(path)
        layer.lora_B = kept
    return unseen


def _watch(
    run: Callable[[bool], list[Tensor]], suspects: Mapping[str, LoRALayer]
) -> dict[str, bool | None]:
    """For each suspect, whether gradients were on when its forward was called; None if it was not called."""
    calls: dict[str, bool | None] = dict.fromkeys(suspects)

    def watcher(path: str) -> Callable[..., None]:
        def note(*_: Any) -> None:
            calls[path] = calls[path] or torch.is_grad_enabled()

        return note

    handles = [layer.register_forward_pre_hook(watcher(p)) for p, layer in suspects.items()]
    try:
        run(True)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _reason(no_gradient: bool, silent: bool, call: bool | None) -> str:
    if silent and not no_gradient:
        return (
            "gets a gradient, but does not change the output in eval mode without gradients: "
            "a fast path reads the wrapped weight"
        )
    what = "does not change the output and gets no gradient" if silent else "gets no gradient"
    if call is None:
        return f"{what}: its forward is not called on this sample; other code may read its weight"
    if not call:
        return (
            f"{what}: its forward runs with gradients switched off, by torch.no_grad() or by reentrant checkpointing "
            "whose inputs need none (behind a frozen embedding: use_reentrant=False, or enable_input_require_grads())"
        )
    return f"{what}: its forward runs, but its result is detached, replaced or not used"


@contextlib.contextmanager
def _restored(model: nn.Module, modes: Modes) -> Iterator[Callable[[], None]]:
    """Give a function that puts buffers and random states back; at the end that is done once more, and modes too."""
    buffers = [
        (module, name, buffer, None if buffer is None else buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count() if cuda else 0)
    states = torch.get_rng_state(), [torch.cuda.get_rng_state(i) for i in devices]
    others = random.getstate(), np.random.get_state()

    def rewind() -> None:
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer
                if buffer is not None and value is not None and not torch.equal(buffer, value):
                    buffer.copy_(value)
        torch.set_rng_state(states[0])
        for index, state in zip(devices, states[1], strict=True):
            torch.cuda.set_rng_state(state, index)
        random.setstate(others[0])
        np.random.set_state(others[1])

    try:
        yield rewind
    finally:
        rewind()
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def _stand_ins(model: nn.Module, layers: list[tuple[str, LoRALayer]]) -> Iterator[None]:
    """Put a leaf of its own in the place of every parameter that trains, and of every lora_A and lora_B. Random values are
    added to lora_B, so that an update which is small, or zero by its start, can be seen; a zero lora_A gets random values.

    Gradients, gradient hooks and `.grad` of the real parameters are out of reach of a backward pass then. A module that holds
    parameters in other ways too (an LSTM does) gets its `.grad` back.
    """
    tried: dict[int, Tensor] = {}
    for _, layer in layers:
        a, b = _tried(layer)
        tried[id(layer.lora_A)] = layer.lora_A.detach() if layer.lora_A.any() else a
        tried[id(layer.lora_B)] = layer.lora_B.detach() + b
    places = [
        (module, name, parameter, parameter.grad)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and (parameter.requires_grad or id(parameter) in tried)
    ]
    others: dict[int, nn.Parameter] = {}
    for _, _, parameter, _ in places:
        if id(parameter) not in others:
            value = tried.get(id(parameter), parameter.detach())
            others[id(parameter)] = nn.Parameter(value, parameter.requires_grad)
    try:
        for module, name, parameter, _ in places:
            module._parameters[name] = others[id(parameter)]
            parameter.grad = None
        yield
    finally:
        for module, name, parameter, gradient in places:
            module._parameters[name] = parameter
            parameter.grad = gradient


def _tried(layer: LoRALayer) -> tuple[Tensor, Tensor]:
    """Random values in the shapes of lora_A and lora_B, the latter so that the update is a tenth of the weight, by norm."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(layer.lora_A.shape, generator=generator) / layer.lora_A[0].numel() ** 0.5
    b = torch.randn(layer.lora_B.shape, generator=generator)
    weight = layer.wrapped_weight().detach()
    norm = float(layer.lora_A.detach().float().norm()) or float(a.norm())
    update = abs(layer.scaling) * float(b.norm()) * norm / layer.rank**0.5
    target = _SHARE * float(weight.float().norm()) or 1.0
    return a.to(layer.lora_A), (b * (target / update if update else 1.0)).to(layer.lora_B)


def _to_training(modes: Modes) -> None:
    """The model's own modes if it is in training, so that what is held in eval stays there; else training for all."""
    for module, mode in modes:
        module.training = mode or not modes[0][1]


def _backward(outputs: list[Tensor]) -> None:
    """Backward from a sum with fixed random weights, so that symmetric outputs (a softmax) do not cancel."""
    generator = torch.Generator().manual_seed(1)
    total = [
        (tensor.float() * torch.randn(tensor.shape, generator=generator).to(tensor.device)).sum()
        for tensor in outputs
        if tensor.requires_grad
    ]
    if total:
        torch.stack([part.to(total[0].device) for part in total]).sum().backward()  # type: ignore[no-untyped-call]


def _has_gradient(layer: LoRALayer) -> bool:
    gradients = [p.grad for p in (layer.lora_A, layer.lora_B)]
    return any(g is not None and bool(g.any()) for g in gradients)


def _forget_gradients(layers: Iterator[LoRALayer]) -> None:
    for layer in layers:
        layer.lora_A.grad = layer.lora_B.grad = None


def _difference(got: list[Tensor], want: list[Tensor]) -> float:
    """The largest difference, NaN and infinities counted as equal to themselves; infinite if the shapes differ."""
    if [t.shape for t in got] != [t.shape for t in want]:
        return float("inf")
    largest = 0.0
    for a, b in zip(got, want, strict=True):
        a, b = a.detach(), b.detach()
        same = (a == b) | (a.isnan() & b.isnan())
        if not same.all():
            gap = torch.where(same, 0.0, (a.double() - b.double()).abs())
            largest = max(largest, float(gap.nan_to_num(nan=float("inf")).max()))
    return largest


def _outputs(output: Any) -> list[Tensor]:
    found = list(_tensors(output))
    if not found:
        raise CheckError(
            f"model: expected an output with floating-point tensors, got {type(output).__name__}"
        )
    return found


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every floating-point tensor in the value, in order."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))
    elif hasattr(value, "feats"):
        yield from _tensors(value.feats)


def _copied(value: Any) -> Any:
    """The value with its tensors copied: neither a run nor its backward pass reaches the caller's."""
    if isinstance(value, Tensor):
        copy = value.detach().clone().requires_grad_(value.requires_grad)
        return copy if value.is_leaf else copy.clone()  # only what is no leaf may be written to
    if type(value) is dict:
        return {key: _copied(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copied(item) for item in value)
    return value
