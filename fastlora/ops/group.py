"""Autograd function of linear layers that share their input: one pass over x and one dropout mask for all their adapters.

For layers i with y_i = x W_iᵀ + bias_i + scaling_i · (D(x) A_iᵀ) B_iᵀ, separate calls read x once for each S_i and once for each dA_i, compute
the mask twice for each, and let autograd sum the dx. Here S is one product with the stacked A_i, dA one with the stacked dS_i, and
every dx is added in place. With Triton the kernels are those of single layers (`fastlora.ops.triton.linear`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastlora.ops import linear
from fastlora.ops.products import with_product
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
        rows, _ = forward_rows(linear.as_rows(x), _layers(tensors, scalings, p, seed), triton)
        return [linear.shaped_as(x, y) for y in rows]
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
        layers = _layers(tensors, scalings, p, seed)
        rows, s = forward_rows(linear.as_rows(x), layers, triton)
        outputs = [linear.shaped_as(x, y) for y in rows]
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
        chosen = [layers[i] for i in used]
        dx, das, dbs = backward_rows(
            rows, flat, chosen, [s[i] for i in used], needs_x, needs_a, needs_b, ctx.triton
        )
        gradients = [None] * len(tensors)
        for i, dy, da, db in zip(used, rows, das, dbs, strict=True):
            needs_weight, needs_bias, *_ = needs[_TENSORS * i : _TENSORS * (i + 1)]
            gradients[_TENSORS * i : _TENSORS * (i + 1)] = (
                dy.T @ flat if needs_weight else None,  # [N, M] @ [M, K] -> [N, K]
                dy.sum(0) if needs_bias else None,
                da,
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


def forward_rows(
    x: Tensor, layers: Sequence[Layer], triton: bool
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """y (M, N) and S (M, R), which includes no factor, of each layer, for x (M, K). Layers with one p and one seed tensor share a mask.

    A layer of rank 0 has no adapter.
    """
    sets = _by_mask(layers)
    if triton:
        return _triton_forward(x, layers, together=sets == [[*range(len(layers))]])
    s = [x.new_empty(x.shape[0], 0)] * len(layers)
    for members in sets:
        lows = [layers[i].low for i in members]
        product = linear.down_project(x, stacked(lows))
        parts = torch.split(product, [low.rank() for low in lows], 1)
        for i, part in zip(members, parts, strict=True):
            s[i] = part
    outputs = []
    for s_i, (weight, bias, low) in zip(s, layers, strict=True):
        y = F.linear(x, weight, bias)  # [M, K] @ [K, N] -> [M, N]
        if low.rank():
            y = with_product(y, s_i, low.b.T, low.scale())
        outputs.append(y)
    return outputs, s


def backward_rows(
    dys: Sequence[Tensor],
    x: Tensor,
    layers: Sequence[Layer],
    s: Sequence[Tensor],
    needs_x: bool,
    needs_a: Sequence[bool],
    needs_b: Sequence[bool],
    triton: bool,
) -> tuple[Tensor | None, Sequence[Tensor | None], Sequence[Tensor | None]]:
    """dx (M, K), [dA (R, K)] and [dB (N, R)] for the gradients [dy (M, N)] of `forward_rows`, None for what is not needed."""
    sets = _by_mask(layers)
    if triton:
        together = sets == [[*range(len(layers))]]
        return _triton_backward(dys, x, layers, s, needs_x, needs_a, needs_b, together)
    dx: Tensor | None = None
    das: list[Tensor | None] = [None] * len(layers)
    for dy, (weight, _, _) in zip(dys, layers, strict=True):
        if needs_x:
            # dx += dy @ weight  # [M, N] @ [N, K] -> [M, K]
            dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
    for members in sets:
        lows, wanted = [layers[i].low for i in members], any(needs_a[i] for i in members)
        if not (needs_x or wanted):
            continue
        # [R, N] @ [N, M] -> [R, M]
        ds_t = [layers[i].low.b.T.contiguous() @ dys[i].T for i in members]
        scaled = [low.scaling * part for low, part in zip(lows, ds_t, strict=True)]
        da = linear.up_project(torch.cat(scaled), x, stacked(lows), dx, wanted)
        if da is not None:
            parts = torch.split(da, [low.rank() for low in lows])
            for i, part in zip(members, parts, strict=True):
                das[i] = part if needs_a[i] else None
    dbs = [
        linear.b_gradient(dy, s_i, layer.low) if needed else None
        for dy, s_i, layer, needed in zip(dys, s, layers, needs_b, strict=True)
    ]
    return dx, das, dbs


def _by_mask(layers: Sequence[Layer]) -> list[list[int]]:
    """The numbers of the adapted layers, in a list for each mask."""
    sets: dict[tuple[float, int], list[int]] = {}
    for i, (_, _, low) in enumerate(layers):
        if low.rank():
            key = (0.0, 0) if low.seed is None else (low.p, id(low.seed))
            sets.setdefault(key, []).append(i)
    return [*sets.values()]


def _triton_forward(
    x: Tensor, layers: Sequence[Layer], together: bool
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """`forward_rows` by kernels. together: whether the layers are one set of `_by_mask`."""
    if together:
        found: tuple[list[Tensor], list[Tensor]] = linear.triton_group().group_forward(x, layers)
        return found
    forward, none = linear.triton_linear().lora_forward(), x.new_empty(x.shape[0], 0)
    pairs = [
        forward(x, weight, bias, *low) if low.rank() else (F.linear(x, weight, bias), none)
        for weight, bias, low in layers
    ]
    return [y for y, _ in pairs], [s for _, s in pairs]


def _triton_backward(
    dys: Sequence[Tensor],
    x: Tensor,
    layers: Sequence[Layer],
    s: Sequence[Tensor],
    needs_x: bool,
    needs_a: Sequence[bool],
    needs_b: Sequence[bool],
    together: bool,
) -> tuple[Tensor | None, Sequence[Tensor | None], Sequence[Tensor | None]]:
    """`backward_rows` by kernels. together: as in `_triton_forward`."""
    if together:
        needs = needs_x, any(needs_a)
        dx, das, dbs = linear.triton_group().group_backward(dys, x, layers, s, needs, needs_b)
        das = [da if needed else None for da, needed in zip(das, needs_a, strict=True)]
        return dx, das, dbs
    backward, dx = linear.triton_linear().lora_backward(), None
    das, dbs = [], []
    for dy, s_i, (weight, _, low), wants_a, wants_b in zip(
        dys, s, layers, needs_a, needs_b, strict=True
    ):
        if not low.rank():
            added = dy @ weight if needs_x else None
            da = db = None
        else:
            wanted = (needs_x, wants_a, wants_b)
            found = iter(backward(dy, x, weight, s_i, *low, *wanted))
            added, da, db = (next(found) if one else None for one in wanted)
        dx = added if dx is None else dx.add_(added)
        das.append(da)
        dbs.append(db)
    return dx, das, dbs
