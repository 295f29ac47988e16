"""Autograd function of linear layers that share their input: one pass over x, and one dropout mask, for all their adapters.

For layers i with y_i = x W_iᵀ + bias_i + scaling_i · (D(x) A_iᵀ) B_iᵀ, separate calls read x once for each S_i and once for each dA_i, compute
the mask twice for each, and leave the sum of their dx to autograd. Here S is one product with the A_i stacked, dA one with the
dS_i stacked, and every dx is added in place. With Triton the kernels are those of single layers (`fastlora.ops.triton_ops`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora.ops import linear, reference
from fastlora.ops.reference import LowRank

_TENSORS = 4  # of a member


class GroupMember(NamedTuple):
    """One layer of a group. weight: (N, K). bias: (N,) or None. lora_a: (R, K). lora_b: (N, R). scaling: the applied factor."""

    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    scaling: float

    def low(self, p: float, seed: Tensor | None) -> LowRank:
        """The low-rank path of this layer under the group's dropout."""
        return LowRank(self.lora_a, self.lora_b, self.scaling, p, seed)


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
    spent: gets an entry when the backward pass has run; the outputs then belong to a graph that is freed.
    triton: run kernels, not torch's operations; only where `dispatch` allows them, with at most MAX_RANK ranks in all and adapters of
        one dtype.
    """
    if linear.autocasts(x):
        x = linear.autocast(x)
        members = [
            m._replace(
                weight=linear.autocast(m.weight),
                bias=None if m.bias is None else linear.autocast(m.bias),
            )
            for m in members
        ]
    if not triton:  # kernels cast as they load
        members = [
            m._replace(lora_a=m.lora_a.to(x.dtype), lora_b=m.lora_b.to(x.dtype)) for m in members
        ]
    if reference.dropout_threshold(p) == 0:
        seed = None
    if not torch.is_grad_enabled():
        return _forward(x, members, p, seed, triton)[0]
    scalings = tuple(m.scaling for m in members)
    tensors = [tensor for m in members for tensor in m[:_TENSORS]]
    return list(_Group.apply(x, seed, p, scalings, spent, triton, *tensors))  # type: ignore[no-untyped-call]


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
        outputs, s = _forward(x, _members(tensors, scalings), p, seed, triton)
        ctx.save_for_backward(x, seed, *s, *tensors)
        ctx.p, ctx.scalings, ctx.spent, ctx.triton = p, scalings, spent, triton
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> linear.Gradients:
        if ctx.spent is not None:
            ctx.spent.append(True)
        x, seed, *rest = ctx.saved_tensors
        s, tensors = rest[: len(dys)], rest[len(dys) :]
        needs_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[6:]
        used = {i: dy for i, dy in enumerate(dys) if dy is not None}
        if not used:
            return (None,) * (6 + len(tensors))
        dx: Tensor | None
        if torch.is_grad_enabled():

            def composed(x: Tensor, *tensors: Tensor | None) -> list[Tensor]:
                members = _members(tensors, ctx.scalings)
                return _composed(x, [members[i] for i in used], ctx.p, seed, ctx.triton)

            dx, *gradients = linear.exact_gradients(
                composed, (x, *tensors), (needs_x, *needs), list(used.values())
            )
        else:
            gradients = [None] * len(tensors)
            flat = linear.as_rows(x)
            rows = {i: linear.gradient_rows(dy) for i, dy in used.items()}
            for i, dy in rows.items():
                at = _TENSORS * i
                if needs[at]:
                    gradients[at] = dy.T @ flat  # [N, M] @ [M, K] -> [N, K]
                if needs[at + 1]:
                    gradients[at + 1] = dy.sum(0)
            members = _members(tensors, ctx.scalings)
            backward = _kernels().group_backward if ctx.triton else _backward
            needs_a = [needs[_TENSORS * i + 2] for i in rows]
            needs_b = [needs[_TENSORS * i + 3] for i in rows]
            dx, das, dbs = backward(
                list(rows.values()), flat, [members[i] for i in rows], [s[i] for i in rows],
                ctx.p, seed, needs_x, any(needs_a), needs_b,
            )  # fmt: skip
            for i, needed, da, db in zip(rows, needs_a, das, dbs, strict=True):
                gradients[_TENSORS * i + 2] = da if needed else None
                gradients[_TENSORS * i + 3] = db
            dx = None if dx is None else dx.view(x.shape)
        return dx, None, None, None, None, None, *gradients


def _members(tensors: Sequence[Any], scalings: Sequence[float]) -> list[GroupMember]:
    return [
        GroupMember._make((*tensors[_TENSORS * i : _TENSORS * (i + 1)], scaling))
        for i, scaling in enumerate(scalings)
    ]


def _kernels() -> Any:
    """The module that launches kernels; Triton is imported at the first call."""
    from fastlora.ops import triton_ops

    return triton_ops


def _composed(
    x: Tensor, members: Sequence[GroupMember], p: float, seed: Tensor | None, triton: bool
) -> list[Tensor]:
    """The outputs (..., N) as torch operations that autograd sees."""
    flat, lows = linear.as_rows(x), [m.low(p, seed).to(x.dtype) for m in members]
    keep = linear.keep_mask(flat, lows[0], triton)
    rows = [
        reference.forward(flat, m.weight, m.bias, low, keep)[0]
        for m, low in zip(members, lows, strict=True)
    ]
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in rows]


def _forward(
    x: Tensor, members: Sequence[GroupMember], p: float, seed: Tensor | None, triton: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """y (..., N) and S (M, R) of each member; the kernels' S holds every factor, torch's none."""
    flat = linear.as_rows(x)  # [M, K]
    if triton:
        made, s = _kernels().group_forward(flat, members, p, seed)
        # Not views of the kernels' results: autograd forbids writing into views when a function has several outputs.
        shapes = [(*x.shape[:-1], y.shape[-1]) for y in made]
        return [x.new_empty(0).set_(y).resize_(*n) for y, n in zip(made, shapes, strict=True)], s
    s = torch.split(linear.down_project(flat, _stacked(members, p, seed)), _ranks(members), 1)
    outputs = []
    for s_i, m in zip(s, members, strict=True):
        y = x.new_empty(*x.shape[:-1], m.weight.shape[0])  # not a view of the product, as above
        rows = y.view(-1, m.weight.shape[0])
        if m.bias is None:
            torch.mm(flat, m.weight.T, out=rows)  # [M, K] @ [K, N] -> [M, N]
        else:
            torch.addmm(m.bias, flat, m.weight.T, out=rows)
        rows.addmm_(s_i, m.lora_b.T, alpha=m.scaling)  # [M, R] @ [R, N]
        outputs.append(y)
    return outputs, list(s)


def _backward(
    dys: Sequence[Tensor],
    x: Tensor,
    members: Sequence[GroupMember],
    s: Sequence[Tensor],
    p: float,
    seed: Tensor | None,
    needs_x: bool,
    needs_a: bool,
    needs_b: Sequence[bool],
) -> tuple[Tensor | None, Sequence[Tensor | None], list[Tensor | None]]:
    """dx (M, K), [dA (R, K)] and [dB (N, R)], None for what is not needed."""
    dx: Tensor | None = None
    das: Sequence[Tensor | None] = [None] * len(dys)
    dbs: list[Tensor | None] = [None] * len(dys)
    ds_t = []
    for i, (dy, m) in enumerate(zip(dys, members, strict=True)):
        if needs_x:
            # dx += dy @ weight  # [M, N] @ [N, K] -> [M, K]
            dx = dy @ m.weight if dx is None else dx.addmm_(dy, m.weight)
        if needs_b[i]:
            # ([R, M] @ [M, N])ᵀ -> [N, R]
            dbs[i] = linear.scaled_product(s[i].T, dy, m.scaling, m.lora_b.T).T
        if needs_x or needs_a:
            # [R, N] @ [N, M] -> [R, M]
            ds_t.append(m.scaling * (m.lora_b.T.contiguous() @ dy.T))
    if ds_t:
        da = linear.up_project(torch.cat(ds_t), x, _stacked(members, p, seed), dx, needs_a)
        if da is not None:
            das = torch.split(da, _ranks(members))
    return dx, das, dbs


def _stacked(members: Sequence[GroupMember], p: float, seed: Tensor | None) -> LowRank:
    """The A_i of all members as one path (ΣR, K), for the products of x, which do not read B; the scalings are in the dS_i."""
    a = torch.cat([m.lora_a for m in members])
    return LowRank(a, members[0].lora_b, 1.0, p, seed)


def _ranks(members: Sequence[GroupMember]) -> list[int]:
    return [m.lora_a.shape[0] for m in members]
