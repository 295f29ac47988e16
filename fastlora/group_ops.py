"""Autograd glue for linear layers that share their input: one pass over x, and one dropout mask, for all their adapters.

For layers i with y_i = x W_iᵀ + bias_i + scaling_i · (D(x) A_iᵀ) B_iᵀ, separate calls read x once for each S_i and once for each dA_i, make
the mask twice for each, and leave the sum of their dx to autograd. Here S is one product with the A_i stacked, dA one with the
dS_i stacked, and every dx is added where it lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastlora import ops, reference


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
) -> list[Tensor]:
    """[`lora_linear(x, …)` for each member], all under the same dropout mask. Plain torch operations.

    x: (..., K), of the weights' dtype. N and R may differ. p, seed: as in `lora_linear`. Under autocast all take its dtype.
    spent: gets an entry when the backward pass has run, after which the outputs belong to a graph that is gone.
    """
    cast = ops.autocast if ops.autocasts(x) else _same
    x = cast(x)
    if seed is not None and reference.dropout_threshold(p) == 0:
        seed = None
    tensors: list[Tensor | None] = []
    for m in members:
        bias = None if m.bias is None else cast(m.bias)
        tensors += [cast(m.weight), bias, m.lora_a.to(x.dtype), m.lora_b.to(x.dtype)]
    scalings = tuple(m.scaling for m in members)
    if torch.is_grad_enabled():
        return list(_Group.apply(x, seed, p, scalings, spent, *tensors))  # type: ignore[no-untyped-call]
    return _forward(x, seed, p, scalings, tensors)[0]


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _forward(
    x: Tensor,
    seed: Tensor | None,
    p: float,
    scalings: tuple[float, ...],
    tensors: Sequence[Tensor | None],
) -> tuple[list[Tensor], Tensor]:
    flat = x.reshape(-1, x.shape[-1])  # [M, K]
    stacked = torch.cat([a for a in tensors[2::4] if a is not None])  # [ΣR, K]
    s = ops.down_project(flat, stacked, p, seed)  # [M, ΣR]
    outputs, start = [], 0
    for scaling, weight, bias, lora_b in zip(
        scalings, tensors[0::4], tensors[1::4], tensors[3::4], strict=True
    ):
        assert weight is not None and lora_b is not None
        rank = lora_b.shape[1]
        # Not a view of the product: of several outputs, autograd lets nobody write into views.
        y = x.new_empty(*x.shape[:-1], weight.shape[0])
        rows = y.view(-1, weight.shape[0])
        if bias is None:
            torch.mm(flat, weight.T, out=rows)  # [M, K] @ [K, N] -> [M, N]
        else:
            torch.addmm(bias, flat, weight.T, out=rows)
        rows.addmm_(s[:, start : start + rank], lora_b.T, alpha=scaling)  # [M, R] @ [R, N]
        outputs.append(y)
        start += rank
    return outputs, s


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
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        outputs, s = _forward(x, seed, p, scalings, tensors)
        ctx.save_for_backward(x, seed, s, *tensors)
        ctx.p, ctx.scalings, ctx.spent = p, scalings, spent
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        x, seed, s, *tensors = ctx.saved_tensors
        needs_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[5:]
        if ctx.spent is not None:
            ctx.spent.append(True)
        flat = x.reshape(-1, x.shape[-1])
        gradients: list[Tensor | None] = [None] * len(tensors)
        dx: Tensor | None = None
        ds_t, stacked, places = [], [], []
        exact = torch.is_grad_enabled()  # double backward: every product must be seen by autograd
        dropped = reference.apply_dropout(flat, ctx.p, seed) if exact else None
        start = 0
        for i, (dy, scaling) in enumerate(zip(dys, ctx.scalings, strict=True)):
            weight, _, lora_a, lora_b = tensors[4 * i : 4 * i + 4]
            needs_weight, needs_bias, needs_a, needs_b = needs[4 * i : 4 * i + 4]
            s_i = s[:, start : start + lora_b.shape[1]]
            start += lora_b.shape[1]
            if dy is None:  # an output that nothing used
                continue
            dy = dy.reshape(-1, dy.shape[-1])
            if needs_x:
                if exact or dx is None:
                    product = dy @ weight  # [M, N] @ [N, K] -> [M, K]
                    dx = product if dx is None else dx + product
                else:
                    dx.addmm_(dy, weight)
            if needs_weight:
                gradients[4 * i] = dy.T @ flat
            if needs_bias:
                gradients[4 * i + 1] = dy.sum(0)
            if needs_b:
                s_i = s_i if dropped is None else dropped @ lora_a.T
                gradients[4 * i + 3] = scaling * (s_i.T @ dy).T  # ([R, M] @ [M, N])ᵀ -> [N, R]
            if needs_x or needs_a:
                ds_t.append(scaling * (lora_b.T.contiguous() @ dy.T))  # [R, N] @ [N, M] -> [R, M]
                stacked.append(lora_a)
                places.append((4 * i + 2, lora_a.shape[0], needs_a))
        if ds_t:
            all_ds, all_a = torch.cat(ds_t), torch.cat(stacked)  # [ΣR, M], [ΣR, K]
            needs_a = any(needed for _, _, needed in places)
            if dropped is None:
                da = ops.up_project(all_ds, flat, all_a, ctx.p, seed, dx, needs_a)
            else:
                da = all_ds @ dropped  # [ΣR, M] @ [M, K] -> [ΣR, K]
                if dx is not None:
                    dx = dx + reference.apply_dropout(all_ds.T @ all_a, ctx.p, seed)
            if da is not None:
                for part, (place, _, needed) in zip(
                    torch.split(da, [rank for _, rank, _ in places]), places, strict=True
                ):
                    gradients[place] = part if needed else None
        return None if dx is None else dx.view(x.shape), None, None, None, None, *gradients
