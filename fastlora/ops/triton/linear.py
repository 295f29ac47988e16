"""The two torch operators behind the Triton path: each launches all kernels of one direction.

    fastlora::lora_forward    (y, S)            S includes no factor of the low-rank path, see `kernels.forward`
    fastlora::lora_backward   [dx, dA, dB]      only those that are needed

torch.compile sees an operator, not kernels, so it neither breaks the graph nor recompiles for another shape: the operator chooses
plan and tiles when the sizes are known. Importing this module imports Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastlora.kernels.backward import dy_pass, mask_pass, x_pass
from fastlora.kernels.config import DY_RANK, START_RANK, Tiles
from fastlora.kernels.dropout import NO_MASK, Mask
from fastlora.kernels.forward import decode, down_project, start
from fastlora.kernels.gemm import rank_gemm
from fastlora.kernels.recording import empty, library, repeat
from fastlora.kernels.reduce import sum_both, sum_partials
from fastlora.kernels.update import rank_product, rank_update_
from fastlora.ops import dispatch, reference
from fastlora.ops.dispatch import Choice, product_precision
from fastlora.ops.dropout import dropout_threshold
from fastlora.ops.products import (
    add_backward,
    add_forward,
    contiguous,
    db_product,
    ds_product,
    is_loadable,
    loadable,
)
from fastlora.ops.reference import LowRank

OPERATORS = torch.ops.fastlora
_LIBRARY = torch.library.Library("fastlora", "FRAGMENT")  # type: ignore[no-untyped-call]
# The fields of `LowRank`, which an operator's schema must list one by one.
_PATH = "Tensor lora_a, Tensor lora_b, float scaling, float p, Tensor? seed"
_LIBRARY.define(  # type: ignore[no-untyped-call]
    f"lora_forward(Tensor x, Tensor weight, Tensor? bias, {_PATH}, str? plan=None) -> (Tensor, Tensor)"
)
_LIBRARY.define(  # type: ignore[no-untyped-call]
    f"lora_backward(Tensor dy, Tensor x, Tensor weight, Tensor s, {_PATH}, "
    "bool needs_x, bool needs_a, bool needs_b, str? plan=None) -> Tensor[]"
)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    p: float,
    seed: Tensor | None,
    plan: str | None = None,
) -> tuple[Tensor, Tensor]:
    """y (M, N) and S = (keep ∘ x) Aᵀ (M, R), for x (M, K). plan: one of `dispatch.TRITON_PLANS`, or None to choose."""
    low = LowRank(lora_a, lora_b, scaling, p, seed)
    choice = dispatch.launch_choice(x, weight, low.rank(), seed is not None, plan)
    with current(x):
        if choice.config is None:
            return run_forward(choice, x, weight, bias, low)
        y, s = repeat(
            (choice,), (scaling, p), (x, weight, bias, lora_a, lora_b, seed),
            lambda: run_forward(choice, x, weight, bias, low),
        )  # fmt: skip
    return y, s


def lora_forward() -> Callable[..., tuple[Tensor, Tensor]]:
    """The operator of the forward pass, without torch's dispatcher where nothing else would see the call."""
    return OPERATORS.lora_forward if _is_observed() else _forward


def lora_backward() -> Callable[..., list[Tensor]]:
    """The operator of the backward pass, as `lora_forward`."""
    return OPERATORS.lora_backward if _is_observed() else _backward


def _is_observed() -> bool:
    """Whether a compiler or a dispatch mode (fake tensors, selective checkpointing, a counter of operations) handles the operators."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def run_forward(
    choice: Choice,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low: LowRank,
    s: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y (M, N) and S (M, R) by the plan and the tiles of `choice`. s: S, if it is computed already, for a plan that does not compute it with y."""
    config, precision = choice.config, product_precision(x)
    if config is None:  # a shape or device without kernels
        y, s = reference.forward(x, weight, bias, low.to(x.dtype))
        return y, s / low.keep_scale()  # S without a factor, as the kernels leave it
    if bias is not None and not bias.is_contiguous():
        bias = library(contiguous, bias)
    if choice.plan == "decode":
        y, s = decode(
            x, weight, bias, low.a, low.b, config.decode,
            scale=low.scale(), mask=mask_of(x, low), precision=precision,
        )  # fmt: skip
        return y, s
    if choice.plan == "fused":
        s = empty(x.shape[0], low.rank(), dtype=x.dtype, device=x.device)
        lora_a = low.a
        if not is_loadable(lora_a, x.dtype):
            lora_a = library(partial(loadable, x.dtype), lora_a)
        y = rank_gemm(
            x, weight, bias, s, low.b, config.fused, lora_a=lora_a, scale=low.scale(), precision=precision
        )  # fmt: skip
        return y, s
    if choice.plan == "accumulate" and s is None and low.rank() <= START_RANK:
        y, s = start(
            x, low.a, low.b, bias, config.start,
            scale=low.scale(), mask=mask_of(x, low), precision=precision,
        )  # fmt: skip
        return library(add_forward, y, x, weight), s
    if s is None:
        s = s_product(x, low, config)
    if choice.plan == "split":
        y = rank_gemm(
            x, weight, bias, s, low.b, config.split, scale=low.scale(), precision=precision
        )
    elif choice.plan == "accumulate":
        y = rank_product(s, low.b, bias, config.update, scale=low.scale(), precision=precision)
        y = library(add_forward, y, x, weight)
    else:
        y = library(F.linear, x, weight, bias)
        rank_update_(y, s, low.b, config.update, scale=low.scale(), precision=precision)
    return y, s


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    s: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    p: float,
    seed: Tensor | None,
    needs_x: bool,
    needs_a: bool,
    needs_b: bool,
    plan: str | None = None,
) -> list[Tensor]:
    """Those of dx (M, K), dA (R, K), dB (N, R) that are needed, in this order; `s` is what `_forward` returned."""
    low = LowRank(lora_a, lora_b, scaling, p, seed)
    choice = dispatch.launch_choice(x, weight, low.rank(), seed is not None, plan, dy)
    needs = needs_x, needs_a, needs_b
    if not any(needs):
        return []
    with current(x):
        if choice.config is None:
            return run_backward(choice, dy, x, weight, s, low, needs)
        return [*repeat(
                (choice,), (scaling, p, needs), (dy, x, weight, s, lora_a, lora_b, seed),
            lambda: run_backward(choice, dy, x, weight, s, low, needs),
        )]  # fmt: skip


def run_backward(
    choice: Choice,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    s: Tensor,
    low: LowRank,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> list[Tensor]:
    """Those of dx, dA and dB that `needs` marks, by the plan and the tiles of `choice`."""
    needs_x, needs_a, needs_b = needs
    dx = da = db = None
    if choice.config is None:  # a shape or device without kernels
        cast = low.to(dy.dtype)
        ds_cast = cast.scaling * (dy @ cast.b)
        if needs_x:
            dx = dy @ weight + reference.apply_dropout(ds_cast @ cast.a, cast)
        if needs_a:
            da = (ds_cast.T @ reference.apply_dropout(x, cast)).to(low.a.dtype)
        if needs_b:
            db = (low.scale() * (dy.T @ s)).to(low.b.dtype)
    else:
        needs_ds = needs_x or needs_a
        ds, db, bits = dy_products(choice.config, dy, x, s, low, needs_ds, needs_b)
        if ds is not None and needs_a:
            with_dx = needs_x and joins(choice, low)
            da, dx = a_product(choice.config, x, ds, low, bits, with_dx)
        if dx is not None:
            dx = library(add_backward, dx, dy, weight)
        elif ds is not None and needs_x:
            dx = x_product(choice, dy, weight, ds, low, bits)
        da, db = _sums(da, db, low)
    return [gradient for gradient in (dx, da, db) if gradient is not None]


def s_product(x: Tensor, low: LowRank, config: Tiles) -> Tensor:
    """S = (keep ∘ x) Aᵀ (M, R)."""
    s: Tensor = down_project(
        x, low.a, config.down, mask=mask_of(x, low), precision=product_precision(x)
    )
    return s


def dy_products(
    config: Tiles,
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    low: LowRank,
    needs_ds: bool,
    needs_db: bool,
    needs_bits: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dS = dy B (M, R), parts of dB = scale · dyᵀ S (splits, N, R), and the mask of x in bits; None for what is not needed. The mask goes with dS."""
    mask = mask_of(x, low) if needs_ds and needs_bits else NO_MASK
    if low.rank() <= DY_RANK:
        found: tuple[Tensor | None, Tensor | None, Tensor | None] = dy_pass(
            dy, low.b, s, config.dy,
            scale=low.scale(), needs_ds=needs_ds, needs_db=needs_db, mask=mask, columns=x.shape[1],
            precision=product_precision(dy),
        )  # fmt: skip
        return found
    # Two products of cuBLAS read dy twice, which costs less than the partial sums of one pass would.
    ds = db = None
    if needs_ds:
        ds = library(ds_product, dy, low.b)
    if needs_db:
        db = library(partial(db_product, low.b.dtype, low.scale()), dy, s)
    return ds, db, mask_pass(*x.shape, mask)


def joins(choice: Choice, low: LowRank) -> bool:
    """Whether the pass over x writes dx₀ too."""
    return choice.dx_plan == "accumulate" and low.rank() <= START_RANK


def a_product(
    config: Tiles, x: Tensor, ds: Tensor, low: LowRank, bits: Tensor | None, with_dx: bool
) -> tuple[Tensor, Tensor | None]:
    """Parts of dA = scale · dSᵀ (keep ∘ x) (splits, R, K), and with_dx also dx₀ = scale · keep ∘ (dS A) (M, K)."""
    found: tuple[Tensor, Tensor | None] = x_pass(
        x, ds, low.a.dtype, config.x,
        scale=low.scale(), bits=bits, lora_a=low.a if with_dx else None, precision=product_precision(x),
    )  # fmt: skip
    return found


def _sums(
    da: Tensor | None, db: Tensor | None, low: LowRank
) -> tuple[Tensor | None, Tensor | None]:
    """dA (R, K) and dB (N, R) from their parts."""
    if da is not None and db is not None:
        both: tuple[Tensor, Tensor] = sum_both(da, db, (low.a.dtype, low.b.dtype))
        return both
    return (
        None if da is None else sum_partials(da, low.a.dtype),
        None if db is None else sum_partials(db, low.b.dtype),
    )


def x_product(
    choice: Choice, dy: Tensor, weight: Tensor, ds: Tensor, low: LowRank, bits: Tensor | None
) -> Tensor:
    """dx = dy W + scale · keep ∘ (dS A)  # [M, N] @ [N, K] + [M, R] @ [R, K] -> [M, K]"""
    assert choice.config is not None
    up, tiles = low.a.T, choice.config.update
    common: dict[str, Any] = {
        "scale": low.scale(),
        "bits": bits,
        "precision": product_precision(dy),
    }
    if choice.dx_plan == "split":
        dx: Tensor = rank_gemm(dy, weight.T, None, ds, up, choice.config.dx, **common)
    elif choice.dx_plan == "accumulate":
        dx = library(add_backward, rank_product(ds, up, None, tiles, **common), dy, weight)
    else:
        dx = rank_update_(library(torch.mm, dy, weight), ds, up, tiles, **common)
    return dx


def current(x: Tensor) -> AbstractContextManager[object]:
    """Make x's device current, if it is not: Triton launches on the current device, not on the tensors'."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


def mask_of(x: Tensor, low: LowRank) -> Mask:
    """The mask of x (M, K) as the kernels take it."""
    if low.seed is None:
        return NO_MASK
    return Mask(low.seed.to(x.device), dropout_threshold(low.p))


def _forward_shapes(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, *others: Any, **named: Any
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], lora_a.shape[0])


def _backward_shapes(
    dy: Tensor, x: Tensor, weight: Tensor, s: Tensor, lora_a: Tensor, lora_b: Tensor, *others: Any
) -> list[Tensor]:
    needs = others[3:6]  # after the scaling, p and the seed
    pairs = zip(needs, (x, lora_a, lora_b), strict=True)
    return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for needed, t in pairs if needed]


for _name, _run, _shapes in (
    ("lora_forward", _forward, _forward_shapes),
    ("lora_backward", _backward, _backward_shapes),
):
    for _key in ("CUDA", "CPU"):  # the CPU only under Triton's interpreter, which `dispatch` checks
        _LIBRARY.impl(_name, _run, _key)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(_name, _shapes, "Meta")  # type: ignore[no-untyped-call]
