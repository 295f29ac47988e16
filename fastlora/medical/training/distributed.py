"""Several processes that train one model: who they are, how they share the work, how their numbers become one.

Every rank takes its share of each micro-batch, and what it adds to a mean is weighted by what it holds of it. So steps, schedule, losses
and checkpoints are those of one process, to rounding, whatever the number of ranks, and a run may go on with another number.
Under DDP each rank holds the model, under FSDP2 a part of each weight; what is saved is always whole.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from fastlora.errors import ConfigError, TrainingError
from fastlora.medical.data.batch import SparseTokens
from fastlora.medical.sam3d.decoder import Decoded, Sam3dModel, Surface
from fastlora.medical.sam3d.generator import Sam3dFlow

T = TypeVar("T")

# FSDP2 hangs its hooks on the tensors that go into and out of a block. Newer versions of torch look into dataclasses, older ones
# into registered ones only.
for kind in (SparseTokens, Surface, Decoded):
    torch.export.register_dataclass(kind)

TIMEOUT = timedelta(hours=1)
"""How long a rank waits for the others, which includes the first rank's preparation of the data."""


@dataclass(frozen=True)
class Ranks:
    """The processes that train together, seen from one of them: `rank` of `world`."""

    rank: int = 0
    world: int = 1

    @classmethod
    def current(cls) -> Ranks:
        """Those of torch's process group; one alone without it.

        Raises:
            ConfigError: the environment is that of several processes, and no group was made.
        """
        if dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        if (world := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
            raise ConfigError(
                f"WORLD_SIZE: {world} processes were started, expected a process group around the trainer "
                "(fastlora.medical.training.distributed.process_group)"
            )
        return cls()

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes."""
        return self.rank == 0

    def share(self, indices: Sequence[int]) -> list[int]:
        """This rank's part of a micro-batch; the parts of all ranks are disjoint and may be empty."""
        return list(indices[self.rank :: self.world])

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """The sums over all ranks, the same on each; a name that a rank lacks counts 0 there."""
        if self.world == 1:
            return dict(values)
        everyone = self._gather(dict(values))
        names = dict.fromkeys(name for part in everyone for name in part)
        return {name: sum(part.get(name, 0.0) for part in everyone) for name in names}

    def check_same(self, facts: Mapping[str, object]) -> None:
        """Checks that all ranks hold the same facts; they wait here for each other.

        Raises:
            ConfigError: on every rank, naming the facts that differ.
        """
        if self.world == 1:
            return
        everyone = self._gather(dict(facts))
        different = [name for name in facts if any(f[name] != facts[name] for f in everyone)]
        if different:
            got = "; ".join(f"{name}: {[f[name] for f in everyone]}" for name in different)
            raise ConfigError(f"expected the same in all {self.world} processes, got {got}")

    def first_alone(self, make: Callable[[], T]) -> T:
        """What `make` gives here, called by the first rank before all others: it may write files that they then find."""
        if self.first:
            made = make()
            self._wait()
            return made
        self._wait()
        return make()

    def seed_dropout(self, seed: int, epoch: int) -> None:
        """Gives each rank but the first a generator of its own for an epoch: equal ones would draw equal masks."""
        if not self.first:
            torch.manual_seed(((seed * 1_000_003 + epoch) * 1_000_003 + self.rank) % 2**63)

    def _wait(self) -> None:
        self._gather(None)

    def _gather(self, value: T) -> list[T]:
        everyone: list[Any] = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(everyone, value)
        return everyone


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Joins the processes that torchrun (or a launcher that sets the same variables) started; alone, joins nothing.

    device: what this process computes on, from `local_device`; CUDA talks through NCCL, a CPU through gloo.

    Raises:
        TrainingError: inside, another process has gone while this one waited for it.
    """
    if "WORLD_SIZE" not in os.environ:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        with peers_needed():
            yield
    finally:
        dist.destroy_process_group()


@contextmanager
def peers_needed() -> Iterator[None]:
    """Says in one line that another process has gone, in place of the backend's own words.

    Raises:
        TrainingError: from what the backend raised.
    """
    try:
        yield
    except RuntimeError as error:
        # gloo has no class of its own for this.
        if not (isinstance(error, dist.DistError) or "gloo/transport" in str(error)):
            raise
        raise TrainingError(
            "another process has gone (its own error, if any, stands in its output); "
            "continue after the last finished epoch with --resume"
        ) from error


def local_device(device: torch.device) -> torch.device:
    """The device of this process: under torchrun each process of a machine has a GPU of its own.

    Raises:
        ConfigError: there are fewer GPUs than processes on this machine, or all were told to use the same one.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device.type != "cuda" or here == 1:
        return device
    if device.index is not None:
        raise ConfigError(f"device: expected 'cuda' for {here} processes, got '{device}'")
    if here > torch.cuda.device_count():
        raise ConfigError(
            f"device: expected a GPU for each of {here} processes, got {torch.cuda.device_count()}"
        )
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]))


def parallelize(model: nn.Module, kind: str, device: torch.device) -> nn.Module:
    """What to call in place of `model` so that its gradients are means over the ranks of the current group.

    Args:
        model: on `device`; "fsdp" shards its parameters in place: each child of an outermost `nn.ModuleList`, then the rest. SAM 3D's
            parts are one piece each: FSDP2 does not see the tensors in what their blocks give each other.
        kind: "ddp" or "fsdp".
    """
    if kind == "ddp":
        ids = [device] if device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in () if isinstance(model, (Sam3dModel, Sam3dFlow)) else _blocks(model):
        fully_shard(block, mesh=mesh)
    return cast(nn.Module, fully_shard(model, mesh=mesh))


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        yield from child if isinstance(child, nn.ModuleList) else _blocks(child)


def sync_gradients(model: nn.Module, last: bool) -> None:
    """Says before a forward pass whether its gradients are exchanged; only those of a step's last micro-batch need to be."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = last
    elif isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)


def whole(tensor: Tensor) -> Tensor:
    """A copy on the CPU of a tensor, unsharded; every rank must call."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().cpu().clone()


def sharded_like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """The part of a whole tensor that belongs beside a sharded parameter; the tensor itself beside a whole one."""
    if not isinstance(parameter, DTensor):
        return tensor
    here = tensor.to(device=parameter.device, dtype=parameter.dtype)
    return distribute_tensor(here, parameter.device_mesh, parameter.placements)


def whole_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state dict with whole tensors on the CPU; every rank must call."""
    state = optimizer.state_dict()
    return {
        "state": {
            index: {k: whole(v) if isinstance(v, Tensor) else v for k, v in values.items()}
            for index, values in state["state"].items()
        },
        "param_groups": [dict(group) for group in state["param_groups"]],
    }


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Loads what `whole_optimizer_state` gave, on any number of ranks; `state` stays as it is."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def placed(index: int, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        parameter = parameters[index]
        # A copy, since the optimizer changes what it is given; AdamW's step counter is never sharded.
        return (
            sharded_like(parameter, value.clone())
            if value.shape == parameter.shape
            else value.clone()
        )

    optimizer.load_state_dict(
        {
            "state": {
                index: {k: placed(index, v) for k, v in values.items()}
                for index, values in state["state"].items()
            },
            "param_groups": [dict(group) for group in state["param_groups"]],
        }
    )
