"""What trains besides the adapters: heads, biases, and the buffers that belong to them.

A part that fastlora itself lets train (`modules_to_save`, `bias`, output layers, heads of a loaded file) is recorded on its module, so that
it is saved whatever `requires_grad` is at that moment: in a copy for a moving average, or after freezing.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import cast

import torch
from torch import Tensor, nn

from fastlora.errors import FastLoRAWarning, first_few
from fastlora.layers.base import named_lora_layers

# Attributes of a module: the names of its direct parameters that are recorded, and its running mean when it was frozen.
_RECORDED = "_fastlora_extra_trainable"
_FROZEN_MEAN = "_fastlora_frozen_mean"


def record_heads(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Record parameters that train besides the adapters, until the last adapter is deleted or merged."""
    heads = {id(parameter) for parameter in parameters} | recorded_parameters(model)
    for module in model.modules():
        names = [name for name, p in module._parameters.items() if id(p) in heads]
        if names:
            module.__dict__[_RECORDED] = tuple(names)


def forget_heads(model: nn.Module) -> None:
    """Remove all records, once no adapter is left."""
    for module in model.modules():
        module.__dict__.pop(_RECORDED, None)
        module.__dict__.pop(_FROZEN_MEAN, None)


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Every parameter of an adapter, each once, in module order."""
    return [p for _, layer in named_lora_layers(model) for p in layer.lora_parameters().values()]


def is_frozen(model: nn.Module) -> bool:
    """Whether the base was frozen, at least in part: not every adapted weight trains. Before, all parameters of a model usually train."""
    return any(
        not cast(Tensor, layer.wrapped.weight).requires_grad
        for _, layer in named_lora_layers(model)
    )


def recorded_parameters(model: nn.Module) -> set[int]:
    """The ids of the recorded parameters."""
    return {
        id(parameter)
        for module in model.modules()
        for name in module.__dict__.get(_RECORDED, ())
        if (parameter := module._parameters.get(name)) is not None  # it may be parametrised since
    }


def head_parameters(
    model: nn.Module, *, known: bool = False, remove_duplicate: bool = True
) -> dict[str, nn.Parameter]:
    """The parameters outside the adapters that train or are recorded, by name.

    known: without those that train only because the base was never frozen.
    remove_duplicate: as in `named_parameters`.
    """
    adapters = {id(parameter) for parameter in adapter_parameters(model)}
    recorded, trains = recorded_parameters(model), not known or is_frozen(model)
    return {
        name: parameter
        for name, parameter in model.named_parameters(remove_duplicate=remove_duplicate)
        if id(parameter) not in adapters
        and (id(parameter) in recorded or (trains and parameter.requires_grad))
    }


def head_tensors(model: nn.Module, *, known: bool = False) -> dict[str, Tensor]:
    """`head_parameters`, and the persistent buffers (running statistics) of modules that own one or of which every parameter is one."""
    heads = head_parameters(model, known=known)
    return {**heads, **dict(_buffers(model, {id(p) for p in heads.values()}))}


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """(name, module, buffer) of every buffer in the state dict of the model, without those of adapted layers."""
    adapted = {m for _, layer in named_lora_layers(model) for m in layer.modules()}
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set and module not in adapted:
                yield f"{path}.{name}".lstrip("."), module, buffer


def remember_statistics(model: nn.Module) -> None:
    """Remember the running means outside the heads, so that `warn_of_changed_statistics` can tell whether they changed."""
    for _, module, _ in _frozen_statistics(model):
        if _FROZEN_MEAN not in module.__dict__:
            # Loading is no change.
            module.register_load_state_dict_post_hook(_remember_mean)  # type: ignore[no-untyped-call]
        _remember_mean(module)


def warn_of_changed_statistics(model: nn.Module, caller: str) -> None:
    """Warn if running statistics that are not saved with the adapter changed since `remember_statistics`."""
    changed = []
    for path, module, mean in _frozen_statistics(model):
        before = module.__dict__.get(_FROZEN_MEAN)
        if before is not None and not torch.equal(mean.detach().cpu(), before.to(mean.dtype)):
            changed.append(path)
    if changed:
        warnings.warn(
            f"{caller}: the running statistics of {first_few(changed)} changed since freeze_base_params and are not saved: a frozen "
            "normalisation layer goes on updating them in training mode; keep it in eval mode, or name it in modules_to_save",
            FastLoRAWarning,
            stacklevel=3,
        )


def _buffers(model: nn.Module, heads: set[int]) -> Iterator[tuple[str, Tensor]]:
    """(name, buffer) of the persistent buffers that belong to these parameters."""
    owners: set[nn.Module] = set()
    for module in model.modules():
        if any(id(p) in heads for p in module.parameters(recurse=False)):
            owners.add(module)
        every = [id(p) for p in module.parameters()]
        if every and heads.issuperset(every):
            owners.update(module.modules())
    for name, module, buffer in persistent_buffers(model):
        if module in owners:
            yield name, buffer


def _remember_mean(module: nn.Module, _: object = None) -> None:
    module.__dict__[_FROZEN_MEAN] = cast(Tensor, module.running_mean).detach().cpu().clone()


def _frozen_statistics(model: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """(path, module, running mean) of the modules whose statistics are not saved with the adapter."""
    saved = {id(tensor) for tensor in head_tensors(model).values()}
    for path, module in model.named_modules():
        mean = module._buffers.get("running_mean")
        if mean is not None and not mean.is_meta and id(mean) not in saved:
            yield path, module, mean
