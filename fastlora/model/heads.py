"""What trains besides the adapters: heads, biases, and the buffers that belong to them.

A part that fastlora itself lets train (`modules_to_save`, `bias`, output layers, heads of a loaded file), or sees training in a model that
`freeze_base_params` froze, is recorded on its module, so that it is saved whatever `requires_grad` is at that moment: in a copy for a moving
average, or after freezing.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import cast

from torch import Tensor, nn

from fastlora.errors import FastLoRAWarning, first_few
from fastlora.layers.base import named_lora_layers
from fastlora.layers.quantised import quantisation
from fastlora.model.adapter_registry import forget_peft
from fastlora.model.frozen import (
    changed_since_frozen,
    forget_frozen,
    has_samples,
    nearby_named,
    nearby_parameters,
    owner_of,
    remember_frozen,
    was_frozen,
)
from fastlora.model.pretrained import restore_methods
from fastlora.model.wrappers import plain_names

# Attribute of a module: the names of the recorded parameters of the module (`bias`) and of its direct children (`norm.bias`), for a child
# that has neither a record nor samples of its own, as after a conversion (`fastlora.model.frozen`).
_RECORDED = "_fastlora_extra_trainable"


def record_heads(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Record parameters that train besides the adapters, until the last adapter is deleted or merged."""
    heads = {id(parameter) for parameter in parameters} | recorded_parameters(model)
    for module in model.modules():
        names = [name for name, p in nearby_parameters(module) if id(p) in heads]
        if names:
            module.__dict__[_RECORDED] = tuple(names)


def record_unfrozen(model: nn.Module) -> list[str]:
    """Record the parameters that were unfrozen by hand since `freeze_base_params`. Returns the names of those that were not recorded yet."""
    if not was_frozen(model):
        return []
    recorded = recorded_parameters(model)
    heads = head_parameters(model, known=True)
    unfrozen = {n: p for n, p in heads.items() if p.requires_grad and id(p) not in recorded}
    record_heads(model, unfrozen.values())
    return list(unfrozen)


def forget_heads(model: nn.Module) -> None:
    """Remove all records, once no adapter is left."""
    for module in model.modules():
        module.__dict__.pop(_RECORDED, None)
        forget_peft(module)
    forget_frozen(model)
    restore_methods(model)


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Every parameter of an adapter, each once, in module order."""
    return [p for _, layer in named_lora_layers(model) for p in layer.lora_parameters().values()]


def is_frozen(model: nn.Module) -> bool:
    """Whether the base was frozen: by `freeze_base_params`, and an adapted weight still is, or otherwise most of the adapted weights.

    Before, all parameters of a model usually train. Quantised weights never do: where all adapted ones are, another parameter counts.
    """
    layers = [layer.wrapped for _, layer in named_lora_layers(model)]
    weights = [cast(Tensor, layer.weight) for layer in layers if quantisation(layer) is None]
    if weights:
        trains = [weight.numel() for weight in weights if weight.requires_grad]
        if was_frozen(model):
            return len(trains) < len(weights)
        return 2 * sum(trains) < sum(weight.numel() for weight in weights)
    known = {id(layer.weight) for layer in layers} | recorded_parameters(model)
    known |= {id(parameter) for parameter in adapter_parameters(model)}
    others = [p.requires_grad for p in model.parameters() if id(p) not in known]
    return bool(layers) and (was_frozen(model) or not all(others) or not others)


def recorded_parameters(model: nn.Module) -> set[int]:
    """The ids of the recorded parameters."""
    return {
        id(parameter)
        for module in model.modules()
        for name in module.__dict__.get(_RECORDED, ())
        if not _has_own_record(module, name)
        for parameter in nearby_named(module, name)
    }


def _has_own_record(module: nn.Module, name: str) -> bool:
    owner = owner_of(module, name)
    if owner is None or owner is module:
        return False
    return _RECORDED in owner.__dict__ or has_samples(owner)


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
    """`head_parameters`, and the persistent buffers (running statistics) of modules that own one or of which every parameter is one.

    A tied tensor is there under each of its names.
    """
    heads = head_parameters(model, known=known, remove_duplicate=False)
    return {**heads, **dict(_buffers(model, {id(p) for p in heads.values()}))}


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """(name, module, buffer) of every buffer in the state dict of the model, without those of adapted layers."""
    adapted = {m for _, layer in named_lora_layers(model) for m in layer.modules()}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set and module not in adapted:
                yield f"{path}.{name}".lstrip("."), module, buffer


def remember_base(model: nn.Module, *, unknown: bool = False) -> None:
    """Remember what is not saved with the adapter, so that `warn_of_changed_base` can tell whether it changed.

    unknown: as in `remember_frozen`.
    """
    remember_frozen(model, _saved(model), unknown=unknown)


def warn_of_changed_base(model: nn.Module, caller: str, whole: Iterable[nn.Module] = ()) -> None:
    """Warn of values that changed or were added since `remember_base` and are not saved with the adapter: running statistics, or parameters.

    whole: modules that are saved in full.
    """
    saved = _saved(model) | {
        id(tensor) for module in whole for tensor in (*module.parameters(), *module.buffers())
    }
    plain = plain_names(model)
    names = [plain(name) for name in changed_since_frozen(model, saved)]
    means = [name for name in names if name.rpartition(".")[2] == "running_mean"]
    parameters = [name for name in names if name not in means]
    if means:
        paths = [name.rpartition(".")[0] for name in means]
        warnings.warn(
            f"{caller}: the running statistics of {first_few(paths)} changed since freeze_base_params and are not saved: a frozen "
            "normalisation layer goes on updating them in training mode; keep it in eval mode, or name it in modules_to_save",
            FastLoRAWarning,
            stacklevel=3,
        )
    if parameters:
        warnings.warn(
            f"{caller}: {first_few(parameters)} changed or were added since freeze_base_params, do not train now, and are not saved; "
            "call get_trainable_params while they train, or name their modules in modules_to_save",
            FastLoRAWarning,
            stacklevel=3,
        )


def _saved(model: nn.Module) -> set[int]:
    """The ids of the adapters' parameters, and of what is saved with them."""
    saved = [*adapter_parameters(model), *head_tensors(model).values()]
    return {id(tensor) for tensor in saved}


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
