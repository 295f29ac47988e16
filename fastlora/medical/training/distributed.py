"""Training one model in several processes: their shares of the work, and the reduction of their results.

Every process takes its share of each micro-batch, and its contribution to a mean is weighted by its number of regions. So steps,
schedule, losses and checkpoints equal those of a single process, to rounding, for any number of processes, and a run may be resumed
with another number. Under DDP each process holds the model, under FSDP2 a shard of each weight; checkpoints hold full tensors.
"""

from __future__ import annotations

import copy
import os
import re
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
from fastlora.medical.models.trainee import Trainee
from fastlora.medical.training.config import TrainConfig

T = TypeVar("T")

# FSDP2 hooks the tensors in a block's inputs and outputs. Newer versions of torch find them in any dataclass, older ones only in
# registered ones.
torch.export.register_dataclass(SparseTokens)

TIMEOUT = timedelta(hours=1)
"""How long a process waits for the others, including the first one's preparation of the data."""


@dataclass(frozen=True)
class Processes:
    """The processes that train together, seen from one of them: torch's `rank` of `world`."""

    rank: int = 0
    world: int = 1

    @classmethod
    def current(cls) -> Processes:
        """The processes of torch's process group; without one a single process.

        Raises: ConfigError if the environment is that of several processes, without a process group.
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
        """Whether this is the process that writes."""
        return self.rank == 0

    def share(self, indices: Sequence[int]) -> list[int]:
        """This process's share of a micro-batch; the shares are disjoint, and may be empty."""
        return list(indices[self.rank :: self.world])

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """The sums over all processes, the same in each; a name missing in a process counts as 0 there."""
        everyone = self._gather(dict(values))
        names = dict.fromkeys(name for part in everyone for name in part)
        return {name: sum(part.get(name, 0.0) for part in everyone) for name in names}

    def check_same(self, facts: Mapping[str, object]) -> None:
        """Checks that all processes hold the same facts; a barrier.

        Raises: ConfigError in every process, naming the facts that differ.
        """
        everyone = self._gather(dict(facts))
        different = [name for name in facts if any(f[name] != facts[name] for f in everyone)]
        if different:
            got = "; ".join(f"{name}: {[f[name] for f in everyone]}" for name in different)
            raise ConfigError(f"expected the same in all {self.world} processes, got {got}")

    def first_alone(self, make: Callable[[], T]) -> T:
        """Calls `make` in the first process before all others, which then find the files that it wrote; returns its result."""
        made = make() if self.first else None
        self._gather(None)  # a barrier
        return cast(T, made) if self.first else make()

    def seed_dropout(self, seed: int, epoch: int) -> None:
        """Seeds torch differently in each process except the first for an epoch: equal seeds would give equal dropout masks."""
        if not self.first:
            torch.manual_seed(((seed * 1_000_003 + epoch) * 1_000_003 + self.rank) % 2**63)

    def _gather(self, value: T) -> list[T]:
        everyone: list[Any] = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(everyone, value)
        return everyone


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Context manager: joins the processes that torchrun (or a similar launcher) started; does nothing without them.

    device: of this process, from `local_device`; CUDA uses NCCL, a CPU gloo.

    Raises: TrainingError inside if another process ends while this one waits for it.
    """
    if "WORLD_SIZE" not in os.environ:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        with lost_process_explained():
            yield
    finally:
        dist.destroy_process_group()


@contextmanager
def lost_process_explained() -> Iterator[None]:
    """Context manager: turns the backend's error about a lost process into a TrainingError of one line."""
    try:
        yield
    except RuntimeError as error:
        # gloo raises a bare RuntimeError.
        if not (isinstance(error, dist.DistError) or "gloo/transport" in str(error)):
            raise
        raise TrainingError(
            "another process ended unexpectedly (see its output for the cause); "
            "continue after the last finished epoch with --resume"
        ) from error


def resolve_device(config: TrainConfig) -> torch.device:
    """The device of a configuration. Raises: ConfigError if it is not available, or does not support `config.amp`."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"(cpu|cuda)(:(0|[1-9]\d?))?", name):
        raise ConfigError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device: {name!r} is not available ({torch.cuda.device_count()} CUDA devices)"
        )
    if config.amp != "off" and device.type != "cuda":
        raise ConfigError(
            f"amp: expected 'off' on {name} (mixed precision is for CUDA), got {config.amp!r}"
        )
    return device


def local_device(device: torch.device) -> torch.device:
    """The device of this process: under torchrun each process of a machine has a GPU of its own.

    Raises: ConfigError if there are fewer GPUs than processes on this machine, or `device` has a number.
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


def parallelize(model: Trainee, kind: str, device: torch.device) -> nn.Module:
    """The module to call in place of `model`, which averages gradients over the current process group, if there is one.

    model: on `device`; "fsdp" shards its parameters in place: each of its `shard_units`, then the rest.
    kind: "ddp" or "fsdp".

    Raises: ConfigError if "fsdp" has one process, or a model with 16-bit weights.
    """
    if not dist.is_initialized():
        if kind == "fsdp":
            raise ConfigError("parallel: expected torchrun around 'fsdp', got one process")
        return model
    if kind == "ddp":
        ids = [device] if device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids)
    if model.has_half:
        raise ConfigError("parallel: expected 'ddp' with 16-bit weights, got 'fsdp'")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for unit in model.shard_units:
        fully_shard(unit, mesh=mesh)
    return cast(nn.Module, fully_shard(model, mesh=mesh))


def sync_gradients(model: nn.Module, last: bool) -> None:
    """Sets, before a forward pass, whether its gradients are exchanged; only a step's last micro-batch needs that."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = last
    elif isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)


def full_tensor(tensor: Tensor) -> Tensor:
    """A copy of a tensor on the CPU, unsharded; every process must call this."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().cpu().clone()


def sharded_like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """A full tensor sharded like `parameter`; unchanged if the parameter is not sharded."""
    if not isinstance(parameter, DTensor):
        return tensor
    here = tensor.to(device=parameter.device, dtype=parameter.dtype)
    return distribute_tensor(here, parameter.device_mesh, parameter.placements)


def full_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """AdamW's state dict with full tensors on the CPU; every process must call this."""
    state = optimizer.state_dict()
    full = {
        number: {name: full_tensor(tensor) for name, tensor in entry.items()}
        for number, entry in state["state"].items()
    }
    return {**state, "state": full}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Loads a `full_optimizer_state` in any number of processes; `state` is not modified."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    own = copy.deepcopy(state["state"])  # the optimizer modifies its state
    for number, entry in own.items():
        for moment in ("exp_avg", "exp_avg_sq"):
            entry[moment] = sharded_like(parameters[number], entry[moment])
    optimizer.load_state_dict({**state, "state": own})
