"""Autograd glue for linear layers that share their input: one pass over x, and one dropout mask, for all their adapters.

For layers i with y_i = x W_iᵀ + bias_i + scaling_i · (D(x) A_iᵀ) B_iᵀ, separate calls read x once for each S_i and once for each dA_i, make
the mask twice for each, and leave the sum of their dx to autograd. Here S is one product with the A_i stacked, dA one with the
dS_i stacked, and every dx is added where it lies. With Triton the same kernels run that run for one layer (`fastlora.ops.triton_ops`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from fastlora.ops import linear, reference


@dataclass(frozen=True)
class GroupMember:
    """One layer of a group. weight: (N, K). bias: (N,) or None. lora_a: (R, K). lora_b: (N, R). scaling: the applied factor."""

    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    scaling: float


def lora_linear_group(
    x: Tensor,
    members: Sequence[GroupMember],
    p: float = 0.0,
    seed: Tensor | None = None,
    spent: list[bool] | None = None,
    triton: bool = False,
) -> list[Tensor]:
    """[`lora_linear(x, …)` for each member], all under the same dropout mask.

    x: (..., K), of the weights' dtype. N and R may differ. p, seed: as in `lora_linear`. Under autocast all take its dtype.
    spent: gets an entry when the backward pass has run, after which the outputs belong to a graph that is gone.
    triton: run kernels, not torch's operations; only for what `dispatch` lets them take, with ranks of MAX_RANK in all and adapters of
        one dtype.
    """
    to = linear.autocast if linear.autocasts(x) else _same
    x = to(x)
    if seed is not None and reference.dropout_threshold(p) == 0:
        seed = None
    tensors: list[Tensor | None] = []
    for m in members:
        bias = None if m.bias is None else to(m.bias)
        a, b = (m.lora_a, m.lora_b) if triton else (m.lora_a.to(x.dtype), m.lora_b.to(x.dtype))
        tensors += [to(m.weight), bias, a, b]
    scalings = tuple(m.scaling for m in members)
    if torch.is_grad_enabled():
        return list(_Group.apply(x, seed, p, scalings, spent, triton, *tensors))  # type: ignore[no-untyped-call]
    return _forward(x, seed, p, scalings, triton, tensors)[0]


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _forward(
    x: Tensor,
    seed: Tensor | None,
    p: float,
    scalings: tuple[float, ...],
    triton: bool,
    tensors: Sequence[Tensor | None],
) -> tuple[list[Tensor], list[Tensor]]:
    """y (..., N) and S (M, R) of each member; the kernels' S holds every factor, torch's none."""
    flat = x.reshape(-1, x.shape[-1])  # [M, K]
    weights, biases, lora_as, lora_bs = (tensors[i::4] for i in range(4))
    if triton:
        made, s = _kernels().group_forward(
            flat, weights, biases, lora_as, lora_bs, scalings, p, seed
        )
        # Not views of what the kernels made: of several outputs, autograd lets nobody write into views.
        shapes = [(*x.shape[:-1], y.shape[-1]) for y in made]
        return [x.new_empty(0).set_(y).resize_(*n) for y, n in zip(made, shapes, strict=True)], s
    stacked = torch.cat([a for a in lora_as if a is not None])  # [ΣR, K]
    ranks = [a.shape[0] for a in lora_as if a is not None]
    s = list(torch.split(linear.down_project(flat, stacked, p, seed), ranks, 1))
    outputs = []
    for s_i, scaling, weight, bias, lora_b in zip(
        s, scalings, weights, biases, lora_bs, strict=True
    ):
        assert weight is not None and lora_b is not None
        y = x.new_empty(*x.shape[:-1], weight.shape[0])  # not a view of the product, as above
        rows = y.view(-1, weight.shape[0])
        if bias is None:
            torch.mm(flat, weight.T, out=rows)  # [M, K] @ [K, N] -> [M, N]
        else:
            torch.addmm(bias, flat, weight.T, out=rows)
        rows.addmm_(s_i, lora_b.T, alpha=scaling)  # [M, R] @ [R, N]
        outputs.append(y)
    return outputs, s


def _kernels() -> Any:
    """The module that launches kernels; Triton is imported when it is first wanted."""
    from fastlora.ops import triton_ops

    return triton_ops


class _Group(torch.autograd.Function):
    """Saves x, S of all members (M, ΣR) and the seed."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        seed: Tensor | None,
        p: float,
        scalings: tuple[float, ...],
        spent: list[bool] | None,
        triton: bool,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        outputs, s = _forward(x, seed, p, scalings, triton, tensors)
        ctx.save_for_backward(x, seed, *s, *tensors)
        ctx.p, ctx.scalings, ctx.spent, ctx.triton = p, scalings, spent, triton
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        x, seed, *rest = ctx.saved_tensors
        s, tensors = rest[: len(dys)], rest[len(dys) :]
        needs_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[6:]
        if ctx.spent is not None:
            ctx.spent.append(True)
        flat = x.reshape(-1, x.shape[-1])
        gradients: list[Tensor | None] = [None] * len(tensors)
        dx: Tensor | None = None
        ds_t, stacked, places = [], [], []
        exact = torch.is_grad_enabled()  # double backward: every product must be seen by autograd
        kernels = ctx.triton and not exact
        dropped = reference.apply_dropout(flat, ctx.p, seed) if exact else None
        used: dict[int, Tensor] = {}
        for i, (dy, scaling) in enumerate(zip(dys, ctx.scalings, strict=True)):
            weight, _, lora_a, lora_b = tensors[4 * i : 4 * i + 4]
            needs_weight, needs_bias, needs_a, needs_b = needs[4 * i : 4 * i + 4]
            if dy is None:  # an output that nothing used
                continue
            dy = dy.reshape(-1, dy.shape[-1])
            if needs_weight:
                gradients[4 * i] = dy.T @ flat
            if needs_bias:
                gradients[4 * i + 1] = dy.sum(0)
            if kernels:
                used[i] = dy.contiguous() if 0 in dy.stride() else dy
                continue
            if needs_x:
                if exact or dx is None:
                    product = dy @ weight  # [M, N] @ [N, K] -> [M, K]
                    dx = product if dx is None else dx + product
                else:
                    dx.addmm_(dy, weight)
            if needs_b:
                s_i = s[i] if dropped is None else dropped @ lora_a.T
                gradients[4 * i + 3] = scaling * (s_i.T @ dy).T  # ([R, M] @ [M, N])ᵀ -> [N, R]
            if needs_x or needs_a:
                ds_t.append(scaling * (lora_b.T.contiguous() @ dy.T))  # [R, N] @ [N, M] -> [R, M]
                stacked.append(lora_a)
                places.append((4 * i + 2, lora_a.shape[0], needs_a))
        if ds_t:
            all_ds, all_a = torch.cat(ds_t), torch.cat(stacked)  # [ΣR, M], [ΣR, K]
            needs_a = any(needed for _, _, needed in places)
            if dropped is None:
                da = linear.up_project(all_ds, flat, all_a, 1.0, ctx.p, seed, dx, needs_a)
            else:
                da = all_ds @ dropped  # [ΣR, M] @ [M, K] -> [ΣR, K]
                if dx is not None:
                    dx = dx + reference.apply_dropout(all_ds.T @ all_a, ctx.p, seed)
            if da is not None:
                for part, (place, _, needed) in zip(
                    torch.split(da, [rank for _, rank, _ in places]), places, strict=True
                ):
                    gradients[place] = part if needed else None
        if used:
            dx = _backward_by_kernels(ctx, flat, seed, s, tensors, used, gradients)
        return None if dx is None else dx.view(x.shape), None, None, None, None, None, *gradients


def _backward_by_kernels(
    ctx: Any,
    x: Tensor,
    seed: Tensor | None,
    s: Sequence[Tensor],
    tensors: Sequence[Tensor],
    dys: dict[int, Tensor],
    gradients: list[Tensor | None],
) -> Tensor | None:
    """dx, from the outputs' gradients by member; the adapters' gradients go to their places in `gradients`."""
    needs = ctx.needs_input_grad[6:]
    needs_a, needs_b = [needs[4 * i + 2] for i in dys], [needs[4 * i + 3] for i in dys]
    dx, dlora_as, dlora_bs = _kernels().group_backward(
        list(dys.values()),
        x,
        [tensors[4 * i] for i in dys],
        [tensors[4 * i + 2] for i in dys],
        [tensors[4 * i + 3] for i in dys],
        [s[i] for i in dys],
        [ctx.scalings[i] for i in dys],
        ctx.p,
        seed,
        ctx.needs_input_grad[0],
        any(needs_a),
        needs_b,
    )
    for i, needed, dlora_a, dlora_b in zip(dys, needs_a, dlora_as, dlora_bs, strict=True):
        gradients[4 * i + 2] = dlora_a if needed else None
        gradients[4 * i + 3] = dlora_b
    return None if dx is None else cast(Tensor, dx)
