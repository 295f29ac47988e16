"""What a model remembers beside its module tree: its named adapters, and what trains beside adapters."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastlora.layers.base import LoRALayer

_KEY = "_fastlora_adapters"
# On a module: names of its own parameters that `bias` and `modules_to_save` of a config let train.
TRAINED = "_trained_beside_lora"


@dataclass(eq=False)
class AdapterRecord:
    """adapters: name → its wrappers by path, under every path of a shared module, in the order of adding.
    active: the one whose wrappers stand in the module tree, or None.
    """

    adapters: dict[str, dict[str, LoRALayer]]
    active: str | None


def get_record(module: nn.Module) -> AdapterRecord | None:
    """The record that `module` itself keeps."""
    record: AdapterRecord | None = module.__dict__.get(_KEY)
    return record


def set_record(module: nn.Module, record: AdapterRecord | None) -> None:
    """Keep `record` in `module`, as a plain attribute; None, or a record without adapters, takes it away."""
    if record is not None and record.adapters:
        module.__dict__[_KEY] = record
    else:
        module.__dict__.pop(_KEY, None)


def records(model: nn.Module) -> Iterator[tuple[str, AdapterRecord]]:
    """(path, record) of the model and of every part of it that keeps one."""
    for path, module in model.named_modules():
        record = get_record(module)
        if record is not None:
            yield path, record


def inactive_adapters(model: nn.Module) -> list[str]:
    """Names of the adapters that are kept for the model or a part of it and do not stand in the module tree."""
    return [name for _, r in records(model) for name in r.adapters if name != r.active]


def forget_trained(model: nn.Module) -> None:
    """Forget what trains beside adapters that are gone."""
    for module in model.modules():
        module.__dict__.pop(TRAINED, None)


def drop_records(model: nn.Module) -> None:
    """Forget all named adapters; what stands in the module tree stays there."""
    for module in model.modules():
        set_record(module, None)


def copy_without_records(model: nn.Module, memo: Mapping[int, Any] | None = None) -> nn.Module:
    """A deep copy of the module tree as it stands; inactive adapters are not copied.

    memo: id → what stands for the object in the copy, as `copy.deepcopy` takes it.
    """
    skipped: dict[int, Any] = {id(record): None for _, record in records(model)}
    twin = copy.deepcopy(model, {**(memo or {}), **skipped})
    drop_records(twin)
    return twin
