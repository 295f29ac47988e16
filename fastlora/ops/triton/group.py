"""Layers that share their input, on the Triton path: one pass over x for every S whose plan has such a pass, one for every dA, and one dx.

A repeated call takes the steps of an earlier one, as a single layer's does (`fastlora.kernels.recording`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastlora.kernels.recording import library, repeat
from fastlora.kernels.reduce import sum_partials
from fastlora.ops import dispatch
from fastlora.ops.dispatch import Choice
from fastlora.ops.products import add_backward, columns, in_columns, in_rows, times
from fastlora.ops.reference import Layer, LowRank
from fastlora.ops.triton.linear import (
    a_product,
    current,
    dy_products,
    joins,
    run_forward,
    s_product,
    x_product,
)


def group_forward(x: Tensor, layers: Sequence[Layer]) -> tuple[list[Tensor], list[Tensor]]:
    """[y (M, N)] and [S (M, R)] of layers that share x (M, K) and the mask, each by its own plan.

    Layers whose plan computes S in a separate pass share that pass.
    """
    choices = [_choice(x, weight, low.rank(), low) for weight, _, low in layers]
    sharing = [
        i
        for i, choice in enumerate(choices)
        if choice.config is not None and choice.plan not in ("fused", "decode")
    ]
    lows = [layers[i].low for i in sharing]
    ranks = [low.rank() for low in lows]
    shared = _choice(x, layers[sharing[0]].weight, sum(ranks), lows[0]) if sharing else None

    def run() -> list[Tensor]:
        computed: dict[int, Tensor] = {}
        if shared is not None:
            assert shared.config is not None
            s = s_product(x, _stacked(lows), shared.config)
            first = 0
            for i, rank in zip(sharing, ranks, strict=True):
                computed[i] = library(partial(columns, first, rank), s)
                first += rank
        pairs = [
            run_forward(choice, x, *layer, computed.get(i))
            for i, (choice, layer) in enumerate(zip(choices, layers, strict=True))
        ]
        return [y for y, _ in pairs] + [s for _, s in pairs]

    with current(x):
        if any(choice.config is None for choice in choices):
            found: Sequence[Tensor] = run()
        else:
            found = repeat((*choices, shared), _settings(layers), (x, *_tensors(layers)), run)
    return [*found[: len(layers)]], [*found[len(layers) :]]


def group_backward(
    dys: Sequence[Tensor],
    x: Tensor,
    layers: Sequence[Layer],
    s: Sequence[Tensor],
    needs: tuple[bool, bool],
    needs_b: Sequence[bool],
) -> tuple[Tensor | None, Sequence[Tensor | None], list[Tensor | None]]:
    """dx (M, K), [dA (R, K)] and [dB (N, R)] of layers that share x: one pass over x for every dA, and dx summed in place.

    needs: of dx and of any dA.
    """
    needs_x, needs_a = needs
    lows = [layer.low for layer in layers]
    ranks = [low.rank() for low in lows]
    choices = [
        _choice(x, layer.weight, rank, layer.low, dy)
        for layer, rank, dy in zip(layers, ranks, dys, strict=True)
    ]
    shared = _choice(x, layers[0].weight, sum(ranks), lows[0], dys[0])

    def run() -> list[Tensor]:
        ds_parts, bits, dbs = [], None, []
        for i, (dy, layer, choice) in enumerate(zip(dys, layers, choices, strict=True)):
            assert choice.config is not None  # as in the forward pass
            needs_ds, first = needs_x or needs_a, i == 0  # the layers have one mask
            ds, db, mask = dy_products(
                choice.config, dy, x, s[i], layer.low, needs_ds, needs_b[i], first
            )
            ds_parts += [] if ds is None else [ds]
            bits = mask if first else bits
            dbs += [] if db is None else [sum_partials(db, layer.low.b.dtype)]
        dx = da = None
        if ds_parts:
            dx, da = _shared_gradients(shared, dys, x, layers, ds_parts, bits, needs)
        return [gradient for gradient in (dx, da, *dbs) if gradient is not None]

    if not (needs_x or needs_a or any(needs_b)):
        return None, [None] * len(dys), [None] * len(dys)
    with current(x):
        inputs = (x, *dys, *s, *_tensors(layers))
        settings = _settings(layers), needs, tuple(needs_b)
        found = iter(repeat((*choices, shared), settings, inputs, run))
    dx = next(found) if needs_x else None
    das = torch.split(next(found), ranks) if needs_a else [None] * len(dys)
    return dx, das, [next(found) if one else None for one in needs_b]


def _shared_gradients(
    choice: Choice,
    dys: Sequence[Tensor],
    x: Tensor,
    layers: Sequence[Layer],
    ds_parts: Sequence[Tensor],
    bits: Tensor | None,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """dx (M, K) and every dA, stacked (ΣR, K)."""
    needs_x, needs_a = needs
    lows = [layer.low for layer in layers]
    low, dx, da = _stacked(lows), None, None
    if len({one.scaling for one in lows}) == 1:
        low = low._replace(scaling=lows[0].scaling)
    else:  # one factor cannot serve all
        ds_parts = [
            library(partial(times, one.scaling), part)
            for one, part in zip(lows, ds_parts, strict=True)
        ]
    ds = library(in_columns, *ds_parts)  # [M, ΣR]
    assert choice.config is not None
    if needs_a:
        with_dx = needs_x and joins(choice, low)
        da, dx = a_product(choice.config, x, ds, low, bits, with_dx)
        da = sum_partials(da, low.a.dtype)
    if needs_x:
        added = 0 if dx is not None else 1
        if dx is None:
            dx = x_product(choice, dys[0], layers[0].weight, ds, low, bits)
        for dy, layer in zip(dys[added:], layers[added:], strict=True):
            dx = library(add_backward, dx, dy, layer.weight)
    return dx, da


def _choice(x: Tensor, weight: Tensor, rank: int, low: LowRank, dy: Tensor | None = None) -> Choice:
    return dispatch.launch_choice(x, weight, rank, low.seed is not None, None, dy)


def _stacked(lows: Sequence[LowRank]) -> LowRank:
    """`reference.stacked` in a call that may be repeated."""
    return lows[0]._replace(a=library(in_rows, *(low.a for low in lows)), scaling=1.0)


def _settings(layers: Sequence[Layer]) -> tuple[Any, ...]:
    return tuple((low.scaling, low.p) for _, _, low in layers)


def _tensors(layers: Sequence[Layer]) -> list[Tensor | None]:
    """The tensors of the layers; the seed, which they share, once."""
    own = [t for weight, bias, low in layers for t in (weight, bias, low.a, low.b)]
    return [layers[0].low.seed, *own]
