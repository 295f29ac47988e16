"""The one place where a backend and a plan are chosen, and the reason is kept.

Plans:
    in_place   base GEMM, then the rank-R product added into its output; saves x, S and the dropout seed.
    composed   the reference mathematics under autograd, for functorch transforms (vmap, grad, jvp).
    around     the wrapped module is called, then the rank-R product is added: for a base that is more than F.linear.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastlora.errors import BackendError, ConfigError

BACKENDS = ("auto", "torch", "triton")


@dataclass(frozen=True)
class Choice:
    """What will run, and why. `str(choice)` is one line for people."""

    backend: str
    plan: str
    reason: str

    def __str__(self) -> str:
        return f"{self.backend}/{self.plan}: {self.reason}"


_CPU = Choice("torch", "in_place", "torch runs this on the CPU; Triton kernels are for CUDA")
_CUDA = Choice("torch", "in_place", "this version has no Triton kernels for the linear layer")
_OTHER = Choice("torch", "in_place", "the device is neither a CPU nor CUDA")
_FUNCTORCH = Choice("torch", "composed", "a functorch transform (vmap, grad, jvp) is active")
_AROUND = Choice("torch", "around", "the wrapped layer has hooks or a forward of its own")


def choose(x: torch.Tensor, *, plain_base: bool = True, backend: str = "auto") -> Choice:
    """Choose how one call runs.

    x: the input of the layer; only its device is looked at.
    plain_base: whether the wrapped layer computes `F.linear` and nothing else.
    backend: "auto", "torch" or "triton".

    Raises: ConfigError for an unknown backend, BackendError if "triton" is forced and cannot run.
    """
    choice = _automatic(x, plain_base)
    if backend in ("auto", "torch"):
        return choice
    if backend == "triton":
        raise BackendError(f"backend='triton' cannot run: {choice.reason}")
    raise ConfigError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")


def _automatic(x: torch.Tensor, plain_base: bool) -> Choice:
    if not plain_base:
        return _AROUND
    # While compiling, the tracer handles the autograd function; the query below is for eager transforms.
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return _FUNCTORCH
    if x.device.type == "cpu":
        return _CPU
    return _CUDA if x.device.type == "cuda" else _OTHER
