"""`check`: find adapters that do not change a model's output or get no gradient."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastlora.errors import CheckError, InjectionError, first_few
from fastlora.layers.base import LoRALayer, named_lora_layers
from fastlora.layers.offload import offload_hook
from fastlora.layers.quantised import why_unreadable
from fastlora.layers.usage import Usage
from fastlora.model.adapter_registry import none_active
from fastlora.model.switch import eval_mode

Layers = Mapping[str, LoRALayer]

_ONLY_READ = (
    "works, but its forward is not called, since other code multiplies by its weight: dropout has no effect there, and in PEFT "
    "the adapter has none"
)
_SHARE = 0.1  # norm of the trial update relative to the weight's


@dataclass(frozen=True)
class Finding:
    """A problem of one adapter. path: its layer. reason: the observation and its usual cause."""

    path: str
    reason: str


@dataclass(frozen=True)
class CheckReport:
    """The result of `check`. `str(report)` has a line for each reason.

    layers: the paths of all adapters.
    findings: at most one for each adapter; empty if all work.
    notes: adapters that work, but in a way that a user should know.
    """

    layers: tuple[str, ...]
    findings: tuple[Finding, ...]
    notes: tuple[Finding, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every adapter changes the output and gets a gradient."""
        return not self.findings

    def raise_if_failed(self) -> None:
        """Raises: CheckError with the report if there are findings."""
        if self.findings:
            raise CheckError(str(self))

    def __str__(self) -> str:
        head = f"{len(self.findings)} of {len(self.layers)} adapters do not work"
        if self.ok:
            head = f"all {len(self.layers)} adapters change the output and get a gradient"
        alike: dict[str, list[str]] = {}
        for finding in (*self.findings, *self.notes):
            alike.setdefault(finding.reason, []).append(finding.path or "the layer")
        lines = [f"{first_few(paths)}: {reason}" for reason, paths in alike.items()]
        return "\n  ".join([head, *lines])


def check(model: nn.Module, *args: Any, **kwargs: Any) -> CheckReport:
    """Run `model(*args, **kwargs)` and find adapters that do not change the output or get no gradient.

    Three runs: forward and backward in eval mode, eval without gradients, where fast paths run, and forward and backward in
    training mode (in the model's own modes if it is in training). Meanwhile trainable parameters are replaced by leaves on the same storage,
    and random values that make the update a tenth of the weight are added to lora_B. Layers for which these runs are not
    conclusive are tested one by one. Findings are adapters
        whose weight is read elsewhere, so that their forward is not called or its result not used;
        that a fast path ignores in eval mode;
        behind reentrant checkpointing whose inputs need no gradient (a frozen embedding), torch.no_grad() or detach();
        on another device than their layer computes on (then nothing is run), or with values that are not finite;
        that are frozen, have alpha 0, or have lora_A and lora_B both zero.
    A layer that the sample does not use, such as an expert that is not selected, is a finding too. A layer that works, but whose
    forward is not called because other code multiplies by its `weight`, is a note: it has no dropout.

    Parameters, their gradients and hooks, buffers, training modes and the random states of torch, Python and numpy are restored,
    also if the model raises. Attributes that a forward sets are not restored, and module hooks run.

    args, kwargs: the model's inputs; tensors in lists, tuples and dicts are copied before each run. The output may be a tensor,
        or tensors in mappings, sequences, dataclasses or objects with `.feats`.

    Raises: InjectionError if the model has no adapters or is wrapped for distributed training; CheckError if the output has no
    floating-point tensor; whatever the model raises.
    """
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise InjectionError(f"model: is a {type(model).__name__}; pass model.module")
    layers = dict(named_lora_layers(model))
    if not layers:
        raise InjectionError(f"{none_active(model)}, so there is nothing to check")
    modes = [(module, module.training) for module in model.modules()]
    with torch.inference_mode(False), eval_mode(model), _restored(model) as rewind:

        def run(grad: bool) -> list[Tensor]:
            rewind()
            with torch.set_grad_enabled(grad):
                output = model(*_copied(args), **_copied(kwargs))
            found = list(_tensors(output))
            if not found:
                raise CheckError(
                    f"model: expected an output with floating-point tensors, got {type(output).__name__}"
                )
            return found

        findings = {
            path: reason
            for path, layer in layers.items()
            if (reason := _why_untrainable(layer)) is not None
        }
        if any(_misplaced(layer) for layer in layers.values()):  # the model cannot run
            return _report(layers, findings)
        with _replaced_parameters(model, layers.values()):
            ineffective = _ineffective(run, layers)
            for module, mode in modes:  # if the model is in training, modules in eval mode stay so
                module.training = mode or not modes[0][1]
            no_gradient = _without_gradient(run(True), layers)
            suspects = {
                path: layer
                for path, layer in layers.items()
                if path not in findings and path in ineffective | no_gradient
            }
            calls = _gradient_modes(run, suspects) if suspects else {}
        for path, call in calls.items():
            read = layers[path].usage.read
            findings[path] = _reason(path in no_gradient, path in ineffective, call, read)
        read_only = {path for path, layer in layers.items() if layer.only_read}
    return _report(layers, findings, read_only)


def _report(
    layers: Layers, findings: Mapping[str, str], read_only: Collection[str] = ()
) -> CheckReport:
    found = tuple(Finding(path, findings[path]) for path in layers if path in findings)
    notes = (Finding(p, _ONLY_READ) for p in layers if p in read_only and p not in findings)
    return CheckReport(tuple(layers), found, tuple(notes))


def _misplaced(layer: LoRALayer) -> str | None:
    """Why the adapter's parameters are not where the layer computes, or None if they are."""
    if offload_hook(layer) is not None:
        return "lora_A and lora_B are offloaded by accelerate, which discards their gradients; offload the model before injection"
    if layer.wrapped_device.type == "meta":
        return "the layer is on the meta device and has no values"
    return layer.misplaced()


def _why_untrainable(layer: LoRALayer) -> str | None:
    a, b = layer.lora_A, layer.lora_B
    if layer.disabled:
        return "is disabled by disable_adapter"
    misplaced = _misplaced(layer)
    if misplaced is not None:
        return misplaced
    if not (a.requires_grad or b.requires_grad):
        return "lora_A and lora_B are frozen (requires_grad is False)"
    if layer.scaling == 0:
        return "alpha is 0, so the update is zero"
    if not all(bool(p.isfinite().all()) for p in layer.lora_parameters().values()):
        return "its parameters are not finite; after to_empty call reset_lora_parameters(model)"
    if not (a.any() or b.any()):
        return "lora_A and lora_B are both zero, so neither gets a gradient; initialise one with random values"
    return None


def _without_gradient(outputs: list[Tensor], layers: Layers) -> set[str]:
    """The paths whose lora_A and lora_B both get no gradient from `outputs`, or a zero one; gradients are then cleared.

    The sum has fixed random weights, so that symmetric outputs (a softmax) do not cancel.
    """
    generator = torch.Generator().manual_seed(1)
    total = [
        (tensor.float() * torch.randn(tensor.shape, generator=generator).to(tensor.device)).sum()
        for tensor in outputs
        if tensor.requires_grad
    ]
    if total:
        torch.stack([part.to(total[0].device) for part in total]).sum().backward()  # type: ignore[no-untyped-call]
    found = set()
    for path, layer in layers.items():
        gradients = (layer.lora_A.grad, layer.lora_B.grad)
        if not any(g is not None and bool(g.any()) for g in gradients):
            found.add(path)
    for layer in layers.values():
        layer.lora_A.grad = layer.lora_B.grad = None
    return found


def _ineffective(run: Callable[[bool], list[Tensor]], layers: Layers) -> set[str]:
    """The paths whose lora_B changes nothing in eval mode without gradients.

    A layer with a gradient in eval mode changes the output there, and also without gradients if that output is the same bit for
    bit. Other layers are tested one by one.
    """
    with_gradients = run(True)
    uncertain = _without_gradient(with_gradients, layers)
    base = run(False)
    if _difference(base, with_gradients) > 0:
        uncertain = set(layers)
    if not uncertain:
        return set()
    noise = _difference(base, run(False))
    found = set()
    for path, layer in layers.items():
        if path not in uncertain:
            continue
        original = layer.lora_B
        layer.lora_B = nn.Parameter(-2 * original.detach(), original.requires_grad)
        if _difference(base, run(False)) <= 2 * noise:
            found.add(path)
        layer.lora_B = original
    return found


def _gradient_modes(
    run: Callable[[bool], list[Tensor]], suspects: Layers
) -> dict[str, bool | None]:
    """For each suspect, whether gradients were on when its forward was called; None if it was not called."""
    calls: dict[str, bool | None] = dict.fromkeys(suspects)

    def note(path: str, *_: Any) -> None:
        calls[path] = calls[path] or torch.is_grad_enabled()

    with contextlib.ExitStack() as hooks:
        for path, layer in suspects.items():
            hooks.enter_context(layer.register_forward_pre_hook(partial(note, path)))
        run(True)
    return calls


def _reason(no_gradient: bool, ineffective: bool, call: bool | None, read: bool) -> str:
    if ineffective and not no_gradient:
        return (
            "gets a gradient, but does not change the output in eval mode without gradients: "
            "a fast path reads the wrapped weight"
        )
    what = "does not change the output and gets no gradient" if ineffective else "gets no gradient"
    if call is None:
        use = (
            "its weight is read, but not for the output"
            if read
            else "other code may read its weight"
        )
        return f"{what}: its forward is not called on this sample; {use}"
    if not call:
        return (
            f"{what}: its forward runs with gradients switched off, by torch.no_grad() or by reentrant checkpointing "
            "whose inputs need none (behind a frozen embedding: use_reentrant=False, or enable_input_require_grads())"
        )
    return f"{what}: its forward runs, but its result is detached, replaced or not used"


@contextlib.contextmanager
def _restored(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Yields a function that restores buffers and random states; on exit they and the layers' usage are restored too."""
    usages = [(layer, layer.usage) for _, layer in named_lora_layers(model)]
    buffers = [
        (module, name, buffer, None if buffer is None else buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    states = torch.get_rng_state(), torch.cuda.get_rng_state_all() if cuda else []
    others = random.getstate(), np.random.get_state()

    def rewind() -> None:
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer
                if buffer is not None and value is not None and not torch.equal(buffer, value):
                    buffer.copy_(value)
        torch.set_rng_state(states[0])
        torch.cuda.set_rng_state_all(states[1])
        random.setstate(others[0])
        np.random.set_state(others[1])

    try:
        for layer, _ in usages:
            layer.usage = Usage(dropout_warned=True)  # the report says it
        yield rewind
    finally:
        rewind()
        for layer, usage in usages:
            layer.usage = usage


@contextlib.contextmanager
def _replaced_parameters(model: nn.Module, layers: Iterable[LoRALayer]) -> Iterator[None]:
    """Replace every trainable parameter, lora_A and lora_B by a new leaf, so that a backward pass cannot reach the real ones.

    Random values are added to lora_B, so that a small or zero update becomes visible; a zero lora_A becomes random. `.grad` of
    the real parameters is restored, since some modules (an LSTM) also hold them outside `_parameters`.
    """
    tried: dict[int, Tensor] = {}
    for layer in layers:
        a, b = _trial_values(layer)
        tried[id(layer.lora_A)] = layer.lora_A.detach() if layer.lora_A.any() else a
        tried[id(layer.lora_B)] = layer.lora_B.detach() + b
    places = [
        (module, name, parameter, parameter.grad)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and (parameter.requires_grad or id(parameter) in tried)
    ]
    others = {
        id(p): nn.Parameter(tried.get(id(p), p.detach()), p.requires_grad) for _, _, p, _ in places
    }
    try:
        for module, name, parameter, _ in places:
            module._parameters[name] = others[id(parameter)]
            parameter.grad = None
        yield
    finally:
        for module, name, parameter, gradient in places:
            module._parameters[name] = parameter
            parameter.grad = gradient


def _trial_values(layer: LoRALayer) -> tuple[Tensor, Tensor]:
    """Random values for lora_A and lora_B; with the latter the norm of the update is a tenth of the weight's."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(layer.lora_A.shape, generator=generator) / layer.lora_A[0].numel() ** 0.5
    b = torch.randn(layer.lora_B.shape, generator=generator)
    unreadable = why_unreadable(layer.wrapped) is not None
    weight_norm = 0.0 if unreadable else float(layer.wrapped_weight().detach().float().norm())
    norm = float(layer.lora_A.detach().float().norm()) or float(a.norm())
    update = abs(layer.scaling) * float(b.norm()) * norm / layer.rank**0.5
    target = _SHARE * weight_norm or 1.0
    return a.to(layer.lora_A), (b * (target / update if update else 1.0)).to(layer.lora_B)


def _difference(got: list[Tensor], want: list[Tensor]) -> float:
    """The largest difference, with NaN and infinities equal to themselves; infinite if shapes differ."""
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
    """The value with its tensors copied, so that a run and its backward pass do not affect the caller's."""
    if isinstance(value, Tensor):
        copy = value.detach().clone().requires_grad_(value.requires_grad)
        return copy if value.is_leaf else copy.clone()  # a leaf must not be modified in place
    if type(value) is dict:
        return {key: _copied(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copied(item) for item in value)
    return value
