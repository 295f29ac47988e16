"""The tensors of a case, and one round: a call of an implementation for every copy of them.

Copies are separate layers with separate weights, inputs and output gradients, called one after the other as in a model,
so that no weight stays in the cache until its next call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastlora.benchmark.cases import FORWARD, STEP, Case

STEP_LAYERS = 3
MIN_COPIES, MAX_COPIES = 4, 64
Round = Callable[[], None]


def torch_dtype(case: Case) -> torch.dtype:
    name = "float32" if case.dtype == "tf32" else case.dtype
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def copies_needed(case: Case, cache_bytes: int) -> int:
    """Number of copies whose forward passes read four times the cache size, from MIN_COPIES (enough for a step's three layers) to MAX_COPIES."""
    read = (case.m * case.k + case.n * case.k) * torch_dtype(case).itemsize
    return min(max(MIN_COPIES, -(-4 * cache_bytes // read)), MAX_COPIES)


@dataclass
class Workload:
    """The tensors of a case, drawn from a normal distribution, because zeros need less power and time.

    frozen: layers, x: (M, K), requiring gradients, dy: (M, N), `copies` of each. lora_a: (R, K) and
    lora_b: (N, R), float32, with values that the case's dtype represents exactly, so that casting them changes nothing.
    """

    case: Case
    device: torch.device
    copies: int = 1
    frozen: list[nn.Linear] = field(init=False)
    x: list[Tensor] = field(init=False)
    dy: list[Tensor] = field(init=False)
    lora_a: Tensor = field(init=False)
    lora_b: Tensor = field(init=False)

    def __post_init__(self) -> None:
        case, dtype = self.case, torch_dtype(self.case)
        torch.manual_seed(0)
        with torch.device(self.device):
            self.frozen = [
                nn.Linear(case.k, case.n, bias=case.bias, dtype=dtype).requires_grad_(False)
                for _ in range(self.copies)
            ]
            self.x = [
                torch.randn(case.m, case.k, dtype=dtype).requires_grad_()
                for _ in range(self.copies)
            ]
            self.dy = [torch.randn(case.m, case.n, dtype=dtype) for _ in range(self.copies)]
            # Makes the update about as large as the base output, so that a wrong one cannot pass as rounding.
            self.lora_a = torch.randn(case.rank, case.k, dtype=dtype).float() / 64
            self.lora_b = torch.randn(case.n, case.rank, dtype=dtype).float() / 8


def trainable(layer: nn.Module) -> list[nn.Parameter]:
    """A and B of an implementation, in this order; empty for the frozen layer."""
    return [parameter for parameter in layer.parameters() if parameter.requires_grad]


def round_of(mode: str, layers: Sequence[nn.Module], work: Workload) -> Round:
    """One round: a call for each copy, or one training step of a stack of three layers."""
    if mode == FORWARD:

        def forward() -> None:
            with torch.no_grad():
                for layer, x in zip(layers, work.x, strict=True):
                    layer(x)

        return forward
    if mode == STEP:
        return _training_step(layers[:STEP_LAYERS], work)
    leaves = [[x, *trainable(layer)] for layer, x in zip(layers, work.x, strict=True)]

    def forward_backward() -> None:
        for layer, wanted, dy in zip(layers, leaves, work.dy, strict=True):
            torch.autograd.grad(layer(wanted[0]), wanted, dy)

    return forward_backward


def calls_in_round(mode: str, work: Workload) -> int:
    return 1 if mode == STEP else work.copies


def _training_step(layers: Sequence[nn.Module], work: Workload) -> Round:
    """Three layers with GELU between them, their backward pass and AdamW; the frozen stack has no optimizer."""
    model = nn.Sequential(*[part for layer in layers for part in (layer, nn.GELU())][:-1])
    parameters = trainable(model)
    x, dy = work.x[0], work.dy[0]
    # On a GPU capturable and fused, so that a CUDA graph can contain the step.
    on_gpu = work.device.type == "cuda"
    optimizer = (
        torch.optim.AdamW(parameters, lr=1e-5, capturable=on_gpu, fused=on_gpu)
        if parameters
        else None
    )

    def step() -> None:
        _, *gradients = torch.autograd.grad(model(x), [x, *parameters], dy)
        if optimizer is not None:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.contiguous()  # as a fused optimizer requires
            optimizer.step()

    return step


def saved_bytes(model: nn.Module, forward: Callable[[], object]) -> int:
    """Bytes of distinct storage that a forward pass saves for the backward pass, without the model's parameters and buffers."""
    own = (*model.parameters(), *model.buffers())
    owned = {tensor.untyped_storage().data_ptr() for tensor in own}
    storages: dict[int, torch.UntypedStorage] = {}  # kept, so that no two have one address

    def pack(tensor: Tensor) -> None:
        # The tensor is not kept: a node that held its own output, which holds the node, would never be freed.
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            storages[storage.data_ptr()] = storage

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed):
        forward()
    return sum(storage.nbytes() for storage in storages.values())


def peak_bytes(run: Round, device: torch.device) -> int | None:
    """Peak bytes that one run allocates on the GPU; None on a CPU."""
    if device.type != "cuda":
        return None
    run()  # makes one-off allocations, such as the optimizer's state, which do not count
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
