"""Autograd function of linear layers that share their input: one pass over x and one dropout mask for all their adapters.

For layers i with y_i = x W_iᵀ + bias_i + scaling_i · (D(x) A_iᵀ) B_iᵀ, separate calls read x once for each S_i and once for each dA_i, compute
the mask twice for each, and let autograd sum the dx. Here S is one product with the stacked A_i, dA one with the stacked dS_i, and
every dx is added in place. With Triton the kernels are those of single layers (`fastlora.ops.triton_ops`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastlora.ops import linear
from fastlora.ops.reference import Layer, LowRank, stacked

_TENSORS = 4  # of a layer


def lora_linear_group(
    x: Tensor, layers: Sequence[Layer], freed: list[bool] | None = None, triton: bool = False
) -> list[Tensor]:
    """[`lora_linear(x, …)` for each layer], all with the same dropout mask.

    x: (..., K), of the weights' dtype. Under autocast all are cast to its dtype. layers: N, R and scaling may differ.
    freed: gets an entry when the backward pass runs, after which the graph of the outputs is freed.
    triton: run kernels instead of torch operations; only if `dispatch` allows them, with at most MAX_RANK ranks in total and adapters
        of one dtype.
    """
    casts = linear.autocasts(x)
    x = linear.autocast(x) if casts else x
    tensors: list[Tensor | None] = []
    for weight, bias, low in layers:
        if casts:
            weight, bias = linear.autocast(weight), None if bias is None else linear.autocast(bias)
        # Kernels cast the adapters as they load them.
        tensors += [weight, bias, *(low if triton else low.to(x.dtype))[:2]]
    scalings = tuple(layer.low.scaling for layer in layers)
    p, seed = layers[0].low.p, layers[0].low.seed
    if not torch.is_grad_enabled():
        return _forward(x, _layers(tensors, scalings, p, seed), triton)[0]
    return list(_Group.apply(x, seed, p, scalings, freed, triton, *tensors))  # type: ignore[no-untyped-call]


class _Group(torch.autograd.Function):
    """Saves x, S of all layers (M, ΣR) and the seed."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        seed: Tensor | None,
        p: float,
        scalings: tuple[float, ...],
        freed: list[bool] | None,
        triton: bool,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        outputs, s = _forward(x, _layers(tensors, scalings, p, seed), triton)
        ctx.save_for_backward(x, seed, *s, *tensors)
        ctx.p, ctx.scalings, ctx.freed, ctx.triton = p, scalings, freed, triton
        ctx.kept, ctx.waiting = None, set(range(len(outputs)))
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> linear.Gradients:
        if ctx.freed is not None:
            ctx.freed.append(True)
        saved = _saved(ctx, [i for i, dy in enumerate(dys) if dy is not None])
        with linear.no_autocast(saved[0]):  # the dtypes are those of the forward pass
            return _Group._gradients(ctx, dys, saved)

    @staticmethod
    def _gradients(
        ctx: Any, dys: Sequence[Tensor | None], saved: Sequence[Any]
    ) -> linear.Gradients:
        x, seed, *rest = saved
        s, tensors = rest[: len(dys)], rest[len(dys) :]
        needs_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[6:]
        used = {i: dy for i, dy in enumerate(dys) if dy is not None}
        if not used:
            return (None,) * (6 + len(tensors))
        dx: Tensor | None
        if torch.is_grad_enabled():

            def outputs(x: Tensor, *tensors: Tensor | None) -> list[Tensor]:
                layers = _layers(tensors, ctx.scalings, ctx.p, seed)
                return [linear.composed(x, *layers[i], ctx.triton) for i in used]

            dx, *gradients = linear.exact_gradients(
                outputs, (x, *tensors), (needs_x, *needs), list(used.values())
            )
            return dx, None, None, None, None, None, *gradients
        flat, layers = linear.as_rows(x), _layers(tensors, ctx.scalings, ctx.p, seed)
        rows = [linear.gradient_rows(dy) for dy in used.values()]
        needs_a, needs_b = ([needs[_TENSORS * i + at] for i in used] for at in (2, 3))
        backward = linear.triton_group().group_backward if ctx.triton else _backward
        chosen = [layers[i] for i in used]
        dx, das, dbs = backward(
            rows, flat, chosen, [s[i] for i in used], (needs_x, any(needs_a)), needs_b
        )
        gradients = [None] * len(tensors)
        for i, dy, da, db in zip(used, rows, das, dbs, strict=True):
            needs_weight, needs_bias, needed, _ = needs[_TENSORS * i : _TENSORS * (i + 1)]
            gradients[_TENSORS * i : _TENSORS * (i + 1)] = (
                dy.T @ flat if needs_weight else None,  # [N, M] @ [M, K] -> [N, K]
                dy.sum(0) if needs_bias else None,
                da if needed else None,
                db,
            )
        dx = None if dx is None else dx.view(x.shape)
        return dx, None, None, None, None, None, *gradients


def _saved(ctx: Any, used: Iterable[int]) -> Sequence[Any]:
    """The saved tensors; kept after a backward pass of some outputs for the others, whose graph autograd would free with it."""
    outputs = len(ctx.scalings)
    if ctx.kept is None or not ctx.waiting.issuperset(used):  # autograd refuses a second pass
        saved: Sequence[Any] = ctx.saved_tensors
        versions = [None if t is None else t._version for t in saved]
    else:
        saved, versions = ctx.kept
        # x, the seed, and what belongs to these outputs: the parameters of the others may have changed.
        read = [0, 1, *(2 + i for i in used)]
        read += [2 + outputs + _TENSORS * i + at for i in used for at in range(_TENSORS)]
        if any(saved[at] is not None and saved[at]._version != versions[at] for at in read):
            raise RuntimeError(
                "a tensor saved for backward was modified by an in-place operation between two backward passes of a group of `fuse`"
            )
    ctx.waiting.difference_update(used)
    ctx.kept = (saved, versions) if ctx.waiting else None
    return saved


def _layers(
    tensors: Sequence[Any], scalings: Sequence[float], p: float, seed: Tensor | None
) -> list[Layer]:
    fours = zip(*(tensors[i::_TENSORS] for i in range(_TENSORS)), strict=True)
    return [
        Layer(weight, bias, LowRank(a, b, scaling, p, seed))
        for (weight, bias, a, b), scaling in zip(fours, scalings, strict=True)
    ]


def _forward(
    x: Tensor, layers: Sequence[Layer], triton: bool
) -> tuple[list[Tensor], Sequence[Tensor]]:
    """y (..., N) and S (M, R) of each layer, S without a factor."""
    flat = linear.as_rows(x)  # [M, K]
    if triton:
        results, s = linear.triton_group().group_forward(flat, layers)
        return [linear.shaped_as(x, y) for y in results], s
    lows = [layer.low for layer in layers]
    s = torch.split(linear.down_project(flat, stacked(lows)), [low.rank() for low in lows], 1)
    outputs = []
    for s_i, (weight, bias, low) in zip(s, layers, strict=True):
        y = F.linear(flat, weight, bias)  # [M, K] @ [K, N] -> [M, N]
        y.addmm_(s_i, low.b.T, alpha=low.scale())  # [M, R] @ [R, N]
        outputs.append(linear.shaped_as(x, y))
    return outputs, s


def _backward(
    dys: Sequence[Tensor],
    x: Tensor,
    layers: Sequence[Layer],
    s: Sequence[Tensor],
    needs: tuple[bool, bool],
    needs_b: Sequence[bool],
) -> tuple[Tensor | None, Sequence[Tensor | None], list[Tensor | None]]:
    """dx (M, K), [dA (R, K)] and [dB (N, R)], None for what is not needed. needs: of dx and of any dA."""
    needs_x, needs_a = needs
    dx: Tensor | None = None
    das: Sequence[Tensor | None] = [None] * len(dys)
    dbs: list[Tensor | None] = []
    ds_t = []
    for dy, (weight, _, low), s_i, needs_db in zip(dys, layers, s, needs_b, strict=True):
        if needs_x:
            # dx += dy @ weight  # [M, N] @ [N, K] -> [M, K]
            dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
        dbs.append(linear.b_gradient(dy, s_i, low) if needs_db else None)
        if needs_x or needs_a:
            ds_t.append(low.scaling * (low.b.T.contiguous() @ dy.T))  # [R, N] @ [N, M] -> [R, M]
    if ds_t:
        lows = [layer.low for layer in layers]
        da = linear.up_project(torch.cat(ds_t), x, stacked(lows), dx, needs_a)
        if da is not None:
            das = torch.split(da, [low.rank() for low in lows])
    return dx, das, dbs
