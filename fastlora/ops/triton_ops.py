"""The two torch operators behind the Triton path: each launches all kernels of one direction.

    fastlora::lora_forward    (y, S)            S holds every factor of the low-rank path, see `kernels.forward`
    fastlora::lora_backward   [dx, dA, dB]      only those that are asked for

torch.compile sees an operator, not kernels, so it neither breaks the graph nor compiles again for another shape: plan and
tiles are chosen inside, when the sizes are known. Importing this module imports Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastlora.kernels.backward import dy_pass, x_pass
from fastlora.kernels.config import DY_RANK
from fastlora.kernels.forward import decode, down_project
from fastlora.kernels.gemm import rank_gemm, rank_update_
from fastlora.ops import dispatch, reference
from fastlora.ops.dispatch import Choice

_LIBRARY = torch.library.Library("fastlora", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "lora_forward(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, float scaling, float p, "
    "Tensor? seed, str? plan=None) -> (Tensor, Tensor)"
)
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "lora_backward(Tensor dy, Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor s, float scaling, float p, "
    "Tensor? seed, bool needs_x, bool needs_a, bool needs_b, str? plan=None) -> Tensor[]"
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
    """y (M, N) and S = scale · (keep ∘ x) Aᵀ (M, R), for x (M, K). plan: one of `dispatch.TRITON_PLANS`, or None to choose."""
    choice = dispatch.launch_choice(x, weight, lora_a.shape[0], seed is not None, plan)
    with _current(x):
        return run_forward(choice, x, weight, bias, lora_a, lora_b, scaling, p, seed)


def run_forward(
    choice: Choice,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    p: float,
    seed: Tensor | None,
    s: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y (M, N) and S (M, R) by the plan and the tiles of `choice`. s: S for `split` or `in_place`, if it is made already."""
    scale, mask = _factors(x, scaling, p, seed)
    if choice.config is None:  # a shape or device without kernels
        s = (_kept(x, p, seed) @ lora_a.to(x.dtype).T) * scale
        return F.linear(x, weight, bias) + s @ lora_b.to(x.dtype).T, s
    config = choice.config
    precision = _precision(x)
    bias = None if bias is None else bias.contiguous()
    if choice.plan == "decode":
        y, s = decode(
            x, weight, bias, lora_a, lora_b, config.decode, scale=scale, precision=precision, **mask
        )
        return y, s
    if choice.plan == "fused":
        s = x.new_empty(x.shape[0], lora_a.shape[0])
        # A is read once for every tile of columns, next to W: cast before, it streams as W does.
        lora_a = lora_a.to(x.dtype)
        y = rank_gemm(
            x,
            weight,
            bias,
            s,
            lora_b,
            config.fused,
            lora_a=lora_a,
            scale=scale,
            precision=precision,
        )
        return y, s
    if s is None:
        s = down_project(x, lora_a, config.down, scale=scale, precision=precision, **mask)
    if choice.plan == "split":
        return rank_gemm(x, weight, bias, s, lora_b, config.split, precision=precision), s
    y = F.linear(x, weight, bias)
    return rank_update_(y, s, lora_b, config.update, precision=precision), s


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    s: Tensor,
    scaling: float,
    p: float,
    seed: Tensor | None,
    needs_x: bool,
    needs_a: bool,
    needs_b: bool,
    plan: str | None = None,
) -> list[Tensor]:
    """Those of dx (M, K), dA (R, K), dB (N, R) that are needed, in this order; `s` is what `_forward` returned."""
    choice = dispatch.launch_choice(x, weight, lora_a.shape[0], seed is not None, plan, dy)
    needs = (needs_x, needs_a, needs_b)
    with _current(x):
        return run_backward(choice, dy, x, weight, lora_a, lora_b, s, scaling, p, seed, needs)


def run_backward(
    choice: Choice,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    s: Tensor,
    scaling: float,
    p: float,
    seed: Tensor | None,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> list[Tensor]:
    """Those of dx, dA and dB that `needs` asks for, by the plan and the tiles of `choice`."""
    needs_x, needs_a, needs_b = needs
    scale, mask = _factors(x, scaling, p, seed)
    gradients: list[Tensor] = []
    ds: Tensor | None = None
    if choice.config is None:  # a shape or device without kernels
        ds = (dy @ lora_b.to(dy.dtype)) * scale
        if needs_x:
            gradients.append(dy @ weight + _kept(ds @ lora_a.to(dy.dtype), p, seed))
        if needs_a:
            gradients.append((ds.T @ _kept(x, p, seed)).to(lora_a.dtype))
        if needs_b:
            gradients.append((dy.T @ s).to(lora_b.dtype))
        return gradients
    dx: Tensor | None = None
    dlora_a: Tensor | None = None
    ds, dlora_b = _dy_products(choice, dy, lora_b, s, scale, needs_x or needs_a, needs_b)
    if needs_a:
        dlora_a, mask = _a_product(choice, x, ds, lora_a.dtype, mask)
    if needs_x:
        dx = _x_product(choice, dy, weight, ds, lora_a, mask)
    made = ((needs_x, dx), (needs_a, dlora_a), (needs_b, dlora_b))
    return [gradient for needed, gradient in made if needed and gradient is not None]


def _dy_products(
    choice: Choice,
    dy: Tensor,
    lora_b: Tensor,
    s: Tensor,
    scale: float,
    needs_ds: bool,
    needs_db: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """dS = scale · dy B (M, R) and dB = dyᵀ S (N, R); None for what is not needed."""
    assert choice.config is not None
    if lora_b.shape[1] <= DY_RANK:
        both: tuple[Tensor | None, Tensor | None] = dy_pass(
            dy,
            lora_b,
            s,
            choice.config.dy,
            scale=scale,
            needs_ds=needs_ds,
            needs_db=needs_db,
            precision=_precision(dy),
        )
        return both
    # Two products of cuBLAS read dy twice, which is less than the parts of one pass would be.
    ds = dlora_b = None
    if needs_ds:
        # dS = scale * dy @ B  # [M, N] @ [N, R] -> [M, R]; with beta=0 what `s` holds is not read
        ds = torch.addmm(s, dy, lora_b.to(dy.dtype), beta=0, alpha=scale)
    if needs_db:
        dlora_b = (dy.T @ s).to(lora_b.dtype)  # [N, M] @ [M, R] -> [N, R]
    return ds, dlora_b


def _a_product(
    choice: Choice, x: Tensor, ds: Tensor | None, dtype: torch.dtype, mask: dict[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    """dA = dSᵀ (keep ∘ x) (R, K) in `dtype`, and the mask as bits, so that dx need not make it once more."""
    assert choice.config is not None
    dlora_a, packed = x_pass(x, ds, dtype, choice.config.x, precision=_precision(x), **mask)
    return dlora_a, mask and {"packed": packed}


def _x_product(
    choice: Choice,
    dy: Tensor,
    weight: Tensor,
    ds: Tensor | None,
    lora_a: Tensor,
    mask: dict[str, Any],
) -> Tensor:
    """dx = dy W + keep ∘ (dS A)  # [M, N] @ [N, K] + [M, R] @ [R, K] -> [M, K]"""
    assert choice.config is not None and ds is not None
    precision = _precision(dy)
    if choice.dx_plan == "split":
        config = choice.config.dx
        dx: Tensor = rank_gemm(
            dy, weight.T, None, ds, lora_a.T, config, precision=precision, **mask
        )
    else:
        config = choice.config.update
        dx = rank_update_(dy @ weight, ds, lora_a.T, config, precision=precision, **mask)
    return dx


def group_forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scalings: Sequence[float],
    p: float,
    seed: Tensor | None,
) -> tuple[list[Tensor], list[Tensor]]:
    """[y (M, N)] and [S (M, R)] of layers that share x (M, K) and the mask, each by its own plan.

    Those whose plan makes S in a pass of its own share that pass where their scaling is the same.
    """
    choices = [
        dispatch.launch_choice(x, weight, lora_a.shape[0], seed is not None)
        for weight, lora_a in zip(weights, lora_as, strict=True)
    ]
    made: dict[int, Tensor] = {}
    with _current(x):
        sharing: dict[float, list[int]] = {}
        for i, choice in enumerate(choices):
            if choice.config is not None and choice.plan in ("split", "in_place"):
                sharing.setdefault(scalings[i], []).append(i)
        for scaling, group in sharing.items():
            stacked = torch.cat([lora_as[i] for i in group])  # [ΣR, K]
            first = weights[group[0]]
            config = dispatch.launch_choice(x, first, stacked.shape[0], seed is not None).config
            assert config is not None
            scale, mask = _factors(x, scaling, p, seed)
            s = down_project(x, stacked, config.down, scale=scale, precision=_precision(x), **mask)
            ranks = [lora_as[i].shape[0] for i in group]
            made |= {i: part.contiguous() for i, part in zip(group, s.split(ranks, 1), strict=True)}
        pairs = [
            run_forward(
                choice,
                x,
                weights[i],
                biases[i],
                lora_as[i],
                lora_bs[i],
                scalings[i],
                p,
                seed,
                made.get(i),
            )
            for i, choice in enumerate(choices)
        ]
    return [y for y, _ in pairs], [s for _, s in pairs]


def group_backward(
    dys: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    ss: Sequence[Tensor],
    scalings: Sequence[float],
    p: float,
    seed: Tensor | None,
    needs_x: bool,
    needs_a: bool,
    needs_b: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """dx (M, K), [dA (R, K)] and [dB (N, R)] of layers that share x: one pass over x for every dA, and dx summed where it lies."""
    dropout = seed is not None
    dx: Tensor | None = None
    products = []
    with _current(x):
        for i, dy in enumerate(dys):
            choice = dispatch.launch_choice(x, weights[i], lora_as[i].shape[0], dropout, None, dy)
            scale, _ = _factors(x, scalings[i], p, seed)
            products.append(
                _dy_products(choice, dy, lora_bs[i], ss[i], scale, needs_x or needs_a, needs_b[i])
            )
        dlora_as: list[Tensor | None] = [None] * len(dys)
        if needs_x or needs_a:
            ds = torch.cat([part for part, _ in products if part is not None], 1)  # [M, ΣR]
            stacked = torch.cat(list(lora_as))  # [ΣR, K]
            rank = stacked.shape[0]
            choice = dispatch.launch_choice(x, weights[0], rank, dropout, None, dys[0])
            _, mask = _factors(x, 1.0, p, seed)
            if needs_a:
                dlora_a, mask = _a_product(choice, x, ds, stacked.dtype, mask)
                dlora_as = list(torch.split(dlora_a, [a.shape[0] for a in lora_as]))
            if needs_x:
                dx = _x_product(choice, dys[0], weights[0], ds, stacked, mask)
                for dy, weight in zip(dys[1:], weights[1:], strict=True):
                    dx.addmm_(dy, weight)  # [M, N] @ [N, K] -> [M, K]
    return dx, dlora_as, [dlora_b for _, dlora_b in products]


def _current(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, whatever the tensors' device is: make it x's."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _factors(
    x: Tensor, scaling: float, p: float, seed: Tensor | None
) -> tuple[float, dict[str, Any]]:
    """The factor of the low-rank path, and the arguments that make kernels drop elements out."""
    if seed is None:
        return scaling, {}
    mask = {"seed": seed.to(x.device), "threshold": reference.dropout_threshold(p)}
    return scaling * reference.keep_scale(p), mask


def _kept(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """keep ∘ x, without the factor 1 / (1 − p')."""
    if seed is None:
        return x
    keep = reference.keep_mask(seed.to(x.device), p, x.shape[0], x.shape[1], device=x.device)
    return torch.where(keep, x, 0.0)


def _precision(x: Tensor) -> str:
    return dispatch.float32_precision() if x.dtype == torch.float32 else "ieee"


def _forward_shapes(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, *others: Any, **named: Any
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], lora_a.shape[0])


def _backward_shapes(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    s: Tensor,
    scaling: float,
    p: float,
    seed: Tensor | None,
    needs_x: bool,
    needs_a: bool,
    needs_b: bool,
    plan: str | None = None,
) -> list[Tensor]:
    wanted = ((needs_x, x), (needs_a, lora_a), (needs_b, lora_b))
    return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for needed, t in wanted if needed]


for _key in ("CUDA", "CPU"):  # the CPU only under Triton's interpreter, which `dispatch` sees to
    _LIBRARY.impl("lora_forward", _forward, _key)  # type: ignore[no-untyped-call]
    _LIBRARY.impl("lora_backward", _backward, _key)  # type: ignore[no-untyped-call]
_LIBRARY.impl("lora_forward", _forward_shapes, "Meta")  # type: ignore[no-untyped-call]
_LIBRARY.impl("lora_backward", _backward_shapes, "Meta")  # type: ignore[no-untyped-call]
