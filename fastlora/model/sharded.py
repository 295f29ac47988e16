"""Parameters that FSDP shards over several processes: FSDP2's are DTensors, FSDP1's hold a flat part outside of `summon_full_params`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a DTensor, gathered by all of its processes, each of which must call this; other tensors as they are."""
    sharded: Any = tensor
    full: Tensor = sharded.full_tensor() if is_dtensor(tensor) else tensor
    return full


@torch.no_grad()
def copy_whole(target: Tensor, value: Tensor) -> None:
    """target.copy_(value), where `target` may be a DTensor: then all of its processes must call this, with equal values."""
    if is_dtensor(target) and not is_dtensor(value):
        from torch.distributed.tensor import distribute_tensor

        like: Any = target
        value = value.to(target.device, target.dtype)
        value = distribute_tensor(value, like.device_mesh, like.placements)
    target.copy_(value)


def is_dtensor(tensor: Tensor) -> bool:
    """Whether FSDP2, or tensor parallelism, shards it."""
    return hasattr(tensor, "full_tensor")


def in_parts(model: nn.Module, tensors: Iterable[Tensor]) -> bool:
    """Whether some of these parameters of the model are parts that FSDP1 has left in this process."""
    modules: Iterator[Any] = model.modules()
    idle = any(
        kind.__name__ == "FullyShardedDataParallel"
        and module.training_state.name == "IDLE"
        and module.sharding_strategy.name != "NO_SHARD"
        for module in modules
        for kind in type(module).__mro__
        if kind.__module__.startswith("torch.")
    )
    return idle and any(is_flattened(tensor) for tensor in tensors)


def is_flattened(tensor: Tensor) -> bool:
    """Whether FSDP1 manages it, as a view of a flat parameter."""
    return hasattr(tensor, "_fsdp_flattened")
