"""The only module that chooses a backend and a plan, and records why. A plan is how one call is computed.

Plans of backend "torch":
    in_place   base GEMM, then the rank-R product added into its output; saves x, S and the dropout seed.
    composed   the reference mathematics under autograd, for functorch transforms (vmap, grad, jvp) and forward-mode AD.
    wrapped    calls the wrapped module, then adds the rank-R product: for a base that is more than F.linear.

Plans of backend "triton":
    fused      one kernel: the base tile and S together.
    split      S by one pass over x, which applies dropout, then a product whose epilogue adds S Bᵀ and the bias.
    accumulate S by the same pass, one kernel that writes S Bᵀ and the bias, then cuBLAS, which adds the base product.
    in_place   S by the same pass, cuBLAS for the base, then one kernel that adds S Bᵀ into it.
    decode     for few rows: W is read once, split along K, in two launches.
    grouped    for a bank of experts: one grouped base product, and the kernels of rows in groups for the low-rank products.
dx has a separate plan, "split", "accumulate" or "in_place"; the rest of the backward pass is the same under every plan.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.autograd import forward_ad

from fastlora.config import BACKENDS
from fastlora.errors import BackendError, ConfigError
from fastlora.kernels.config import (
    GROUPED_RANK,
    MAX_RANK,
    Architecture,
    Problem,
    Tiles,
    architecture,
    tiles,
)
from fastlora.ops import cost, tuning_file

TRITON_PLANS = ("fused", "split", "accumulate", "in_place", "decode")
_OLDEST_TRITON = (3, 4)  # the first with host-side tensor descriptors
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_INTERPRETED = (torch.float16, torch.float32)  # right in Triton's interpreter


@dataclass(frozen=True)
class Choice:
    """How a call runs, and why. `str(choice)` is one line.

    backend: "torch" or "triton". plan: see above. reason: why it was chosen. dx_plan and config: only for Triton, the
    plan of dx and the tiles of every kernel that the call may launch.
    """

    backend: str
    plan: str
    reason: str
    dx_plan: str | None = None
    config: Tiles | None = None

    def __str__(self) -> str:
        dx = "" if self.dx_plan is None else f" (dx {self.dx_plan})"
        return f"{self.backend}/{self.plan}{dx}: {self.reason}"


def _torch(reason: str) -> Choice:
    return Choice("torch", "in_place", reason)


_CPU = _torch("torch runs this on the CPU; Triton kernels are for CUDA")
_OTHER = _torch("the device is neither a CPU nor CUDA")
_REQUESTED = _torch("backend='torch' was requested")
_SUBCLASS = _torch("a tensor subclass (DTensor, quantised) implements its own operators")
_TRANSFORMED = Choice(
    "torch", "composed", "a functorch transform (vmap, grad, jvp) or forward-mode AD is active"
)
_LATER = Choice("triton", "operator", "the operator chooses the plan at run time")
_EMPTY = _torch("an empty tensor has nothing to launch")
_WRAPPED = Choice("torch", "wrapped", "the wrapped layer has hooks or a custom forward")
_GROUPED = Choice("triton", "grouped", "kernels for rows in groups, on one grouped base product")


def choose(
    x: torch.Tensor,
    weight: torch.Tensor,
    rank: int,
    *,
    dropout: bool = False,
    plain_base: bool = True,
    backend: str = "auto",
    with_plan: bool = True,
) -> Choice:
    """Choose how one call runs.

    x: (..., K), the input of the layer, in the dtype of the computation. weight: (N, K). Values are not read.
    rank: R of the adapters. dropout: whether a mask will be applied.
    plain_base: whether the wrapped layer computes `F.linear` and nothing else.
    backend: "auto", "torch" or "triton". "auto" uses the environment variable FASTLORA_BACKEND, if it is set.
    with_plan: False lets the operator choose the plan at run time, unless Triton is forced.

    Raises: ConfigError for an unknown backend, BackendError if "triton" is forced and cannot run.
    """
    wanted = resolve(backend)
    if not plain_base:
        return _or_raise(_WRAPPED, wanted)
    if transformed():
        return _or_raise(_TRANSFORMED, wanted)
    if wanted == "torch":
        return _CPU if x.device.type == "cpu" else _REQUESTED
    if type(x) not in _PLAIN or type(weight) not in _PLAIN:
        return _or_raise(_SUBCLASS, wanted)
    reason = why_not_triton(x.device.type, x.dtype, rank, forced=wanted == "triton")
    if reason is not None:
        return _or_raise(reason, wanted)
    if torch.compiler.is_compiling() or (wanted == "auto" and not with_plan):
        return _LATER
    return _or_raise(launch_choice(x, weight, rank, dropout), wanted)


def choose_experts(
    x: torch.Tensor, rank: int, *, weight: torch.Tensor | None = None, backend: str = "auto"
) -> Choice:
    """`choose` for a bank of experts. x: (M, K). rank: R of the adapters. weight: (G, N, K), if it may be of a subclass or empty.

    Raises: ConfigError for an unknown backend, BackendError if "triton" is forced and cannot run.
    """
    wanted = resolve(backend)
    if transformed():
        return _or_raise(_TRANSFORMED, wanted)
    if wanted == "torch":
        return _CPU if x.device.type == "cpu" else _REQUESTED
    if type(x) not in _PLAIN or (weight is not None and type(weight) not in _PLAIN):
        return _or_raise(_SUBCLASS, wanted)
    reason = why_not_triton(x.device.type, x.dtype, rank, forced=wanted == "triton")
    if reason is None and rank > GROUPED_RANK:
        highest = f"{GROUPED_RANK}, the highest that kernels for groups support"
        reason = _torch(f"rank {rank} is above {highest}")
    if reason is None and (x.numel() == 0 or (weight is not None and weight.numel() == 0)):
        reason = _EMPTY
    # A compiler cannot trace the look-up.
    compiling = torch.compiler.is_compiling()
    if reason is None and not compiling and device_architecture(x.device) is None:
        reason = _torch(f"no kernel was compiled for compute capability {_capability(x.device)}")
    return _GROUPED if reason is None else _or_raise(reason, wanted)


def choose_gated(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    ranks: Sequence[int],
    *,
    dropout: bool,
    backend: str = "auto",
) -> Choice | None:
    """`choose` for a gated MLP in one call, or None if its layers must run separately.

    None: for tensor subclasses, where the plan of gate is `decode`, and where Triton was requested and cannot run, so that the layers raise.
    x: (..., K). weights, ranks: of gate, up and down; rank 0 is no adapter. The ranks of gate and up together are limited as those of one layer.
    """
    wanted = resolve(backend)
    if any(type(tensor) not in _PLAIN for tensor in (x, *weights)):
        return None
    if wanted == "torch":
        return _CPU if x.device.type == "cpu" else _REQUESTED
    gate, up, down = ranks
    reason = why_not_triton(x.device.type, x.dtype, max(gate + up, down), forced=wanted == "triton")
    if reason is None:
        choice = launch_choice(x, weights[0], max(ranks), dropout)
        if choice.config is not None:
            return None if choice.plan == "decode" else choice
        reason = choice
    return None if wanted == "triton" else reason


def resolve(backend: str) -> str:
    """`backend`, or for "auto" the value of FASTLORA_BACKEND. Raises: ConfigError for anything but the three names."""
    wanted = _ENVIRONMENT if backend == "auto" else backend
    if wanted not in BACKENDS:
        name = "FASTLORA_BACKEND" if backend == "auto" else "backend"
        raise ConfigError(f"{name}: expected one of {', '.join(BACKENDS)}, got {wanted!r}")
    return wanted


def transformed() -> bool:
    """Whether an eager functorch transform or forward-mode AD runs, which needs plain operations; a compiler traces the autograd functions."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def why_not_triton(device: str, dtype: torch.dtype, rank: int, *, forced: bool) -> Choice | None:
    """The torch `Choice` if Triton cannot run, decided from what does not change between calls; None if it may run.

    forced: whether Triton was requested by name; its interpreter, if enabled, may then run on a CPU too.
    """
    if device == "cpu" and not (forced and os.environ.get("TRITON_INTERPRET") == "1"):
        return _CPU
    if device not in ("cpu", "cuda"):
        return _OTHER
    if dtype not in _DTYPES:
        return _torch(f"no kernel for {dtype}")
    if device == "cpu" and dtype not in _INTERPRETED:
        return _torch("Triton's interpreter multiplies bfloat16 wrongly")
    if rank > MAX_RANK:
        return _torch(f"rank {rank} is above {MAX_RANK}, the highest that the kernels support")
    if device == "cuda" and torch.version.hip is not None:
        return _torch("the kernels were never compiled for ROCm")
    if not _HAS_TRITON:
        return _torch(f"needs Triton {'.'.join(map(str, _OLDEST_TRITON))} or newer")
    return None


def launch_choice(
    x: torch.Tensor,
    weight: torch.Tensor,
    rank: int,
    dropout: bool,
    plan: str | None = None,
    dy: torch.Tensor | None = None,
) -> Choice:
    """The plan and tiles of a call that `why_not_triton` admits, or torch where this device or shape has no kernels.

    plan: one of TRITON_PLANS to force it. dy: (M, N) in the backward pass, whose tiles depend on its alignment.

    Raises: BackendError if the forced plan cannot run this problem, ConfigError if the tuner's file is damaged.
    """
    n, k = weight.shape
    m = x.numel() // k if k else 0
    if m == 0 or n == 0 or k == 0:
        return _EMPTY
    if device_architecture(x.device) is None:
        return _torch(f"no kernel was compiled for compute capability {_capability(x.device)}")
    # The main GEMM reads x or dy, and its output has rows of n or k elements.
    large, width = (x, n) if dy is None else (dy, k)
    aligned = width % 16 == 0 and is_aligned(large) and is_aligned(weight)
    precision = product_precision(x)
    itemsize = x.element_size()
    return _plan(x.device, plan, bucket(m), n, k, rank, itemsize, dropout, precision, aligned)


def bucket(m: int) -> int:
    """m rounded up by less than an eighth, so that varying sequence lengths share few choices; exact up to 16."""
    step = 1 << max(0, m.bit_length() - 4)
    return -(-m // step) * step


@functools.lru_cache(maxsize=4096)
def _plan(device: torch.device, forced: str | None, *numbers: Any) -> Choice:
    """The choice for `Problem(*numbers)`; plain numbers are hashed and compared faster than the problem."""
    problem = Problem(*numbers)
    arch = device_architecture(device)
    assert arch is not None  # the caller has checked
    if forced is not None:
        forward = cost.forward_seconds(arch, problem)
        if forced not in forward:
            raise BackendError(
                f"plan={forced!r} cannot run {problem}: expected one of {sorted(forward)}"
            )
        dx_plan = {"fused": "split", "decode": "in_place"}.get(forced, forced)
        return Choice("triton", forced, "the plan was requested", dx_plan, tiles(arch, problem))
    measured = tuning_file.lookup(device, problem) if device.type == "cuda" else None
    if measured is not None:
        return Choice(
            "triton", measured.plan, "measured by fastlora.tune", measured.dx_plan, measured.config
        )
    return predicted_choice(device, problem)


def predicted_choice(device: torch.device, problem: Problem) -> Choice:
    """The plans with the least predicted time and the table's tiles, whatever was measured; torch where there are no kernels."""
    arch = device_architecture(device)
    if arch is None:
        return _torch(f"no kernel was compiled for compute capability {_capability(device)}")
    forward, dx = cost.forward_seconds(arch, problem), cost.dx_seconds(arch, problem)
    ranking = sorted(forward, key=forward.__getitem__)
    times = ", ".join(f"{plan} {1e6 * forward[plan]:.0f}" for plan in ranking)
    reason = f"least predicted time, not measured (microseconds: {times})"
    return Choice("triton", ranking[0], reason, min(dx, key=dx.__getitem__), tiles(arch, problem))


def product_precision(x: torch.Tensor) -> str:
    """The precision of products of x's dtype; only for float32 is there more than one."""
    return float32_precision() if x.dtype == torch.float32 else "ieee"


def float32_precision() -> str:
    """How float32 products are computed, following torch's switch: "tf32" if it allows that, else "ieee"."""
    matmul = torch.backends.cuda.matmul
    # Since torch 2.9 there are two switches, and the old one cannot be read once the new one was set.
    if hasattr(matmul, "fp32_precision"):
        return "tf32" if matmul.fp32_precision == "tf32" else "ieee"
    return "tf32" if matmul.allow_tf32 else "ieee"


def device_architecture(device: torch.device) -> Architecture | None:
    """The table row of a CUDA device, with its own number of SMs; under the interpreter, on a CPU, that of sm_90."""
    return architecture((9, 0)) if device.type == "cpu" else _cuda_architecture(device)


@functools.lru_cache
def _cuda_architecture(device: torch.device) -> Architecture | None:
    row = architecture(_capability(device))
    if row is None:
        return None
    return replace(row, sms=torch.cuda.get_device_properties(device).multi_processor_count)


@functools.lru_cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def is_aligned(matrix: torch.Tensor) -> bool:
    """Whether a tensor, once its leading dimensions are flattened into rows, is as `Problem.aligned` requires."""
    pitch = matrix.stride(-2) if matrix.ndim > 1 else matrix.shape[-1]
    return (
        matrix.stride(-1) == 1
        and pitch >= matrix.shape[-1]
        and pitch % 16 == 0
        and matrix.data_ptr() % 16 == 0
    )


def _or_raise(choice: Choice, wanted: str) -> Choice:
    if wanted == "triton" and choice.backend != "triton":
        raise BackendError(f"backend='triton' cannot run: {choice.reason}")
    return choice


def _has_triton() -> bool:
    installed = tuning_file.triton_version()
    return installed is not None and tuple(map(int, installed.split(".")[:2])) >= _OLDEST_TRITON


# Read once: a compiler can trace a constant, but no access to the file system or the environment.
_HAS_TRITON = _has_triton()
_ENVIRONMENT = os.environ.get("FASTLORA_BACKEND", "auto")
