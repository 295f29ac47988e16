"""Rows of x with different adapters on the Triton path: one base product, and the kernels of rows in groups for the low-rank products.

A repeated call takes the steps of an earlier one, whichever rows have which adapter (`fastlora.kernels.recording`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastlora.kernels.config import GROUPED_RANK
from fastlora.kernels.recording import library, repeat
from fastlora.ops.dispatch import product_precision
from fastlora.ops.dropout import dropout_threshold
from fastlora.ops.products import (
    output_without_adapters,
    stacked_columns,
    stacked_rows,
    without_adapters,
)
from fastlora.ops.reference import LowRank
from fastlora.ops.triton.grouped import grouped_add_, grouped_da_dx_, grouped_ds_db, grouped_s
from fastlora.ops.triton.linear import current

HIGHEST_RANK = GROUPED_RANK
Segments = Sequence[tuple[int, int, int]]


class _Groups(NamedTuple):
    """The segments as the kernels take them. places: the adapter of each group, None between segments, where the factors are zeros."""

    rank: int
    places: tuple[int | None, ...]
    offsets: Tensor
    scale: Tensor
    thresholds: Tensor | None
    seed: Tensor | None

    def mask(self) -> dict[str, Tensor]:
        if self.seed is None or self.thresholds is None:
            return {}
        return {"seed": self.seed, "thresholds": self.thresholds}


def mixed_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
    lows: Sequence[LowRank],
    segments: Segments,
) -> tuple[Tensor, Tensor]:
    """y (M, N) and S (M, R) for x (M, K), whose rows the segments (start, stop, adapter) share out in ascending order.

    Without a weight, base (M, N) is the base output. R is the highest rank; S of rows without an adapter is undefined.
    """
    groups = _groups(x.device, lows, segments)

    def run() -> list[Tensor]:
        a, b = _stacked(groups, lows)
        y = library(output_without_adapters, x, weight, bias, base)
        s = grouped_s(x, a, groups.offsets, **groups.mask())
        grouped_add_(y, s, b, groups.scale, groups.offsets)
        return [y, s]

    with current(x):
        settings = product_precision(x), groups.places
        y, s = repeat((), settings, (x, weight, bias, base, *_tensors(groups, lows)), run)
    return y, s


def mixed_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    s: Tensor,
    lows: Sequence[LowRank],
    segments: Segments,
    needs_x: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """dx (M, K), and the gradients of A and B of each adapter; None for what is not needed.

    dy: (M, N). s: from `mixed_forward`. Without a weight dx is that of the updates. needs: of A and B of each adapter.
    """
    groups = _groups(x.device, lows, segments)
    needs_a, needs_b = any(needs[::2]), any(needs[1::2])

    def run() -> list[Tensor]:
        a, b = _stacked(groups, lows)
        ds, db = grouped_ds_db(
            dy, s, b, groups.scale, groups.offsets, needs_ds=needs_x or needs_a, needs_db=needs_b
        )
        dx = da = None
        if needs_x:
            dx = library(without_adapters, x, dy, weight)
        if ds is not None:
            scale, offsets, mask = groups.scale, groups.offsets, groups.mask()
            da = grouped_da_dx_(dx, x, ds, a, scale, offsets, **mask, needs_da=needs_a)
        return [gradient for gradient in (dx, da, db) if gradient is not None]

    if not (needs_x or needs_a or needs_b):
        return None, [None] * len(needs)
    settings = product_precision(x), groups.places, needs_x, needs_a, needs_b
    with current(x):
        found = iter(repeat((), settings, (dy, x, weight, s, *_tensors(groups, lows)), run))
    dx = next(found) if needs_x else None
    das = next(found) if needs_a else None
    dbs = next(found) if needs_b else None
    gradients: list[Tensor | None] = [None] * len(needs)
    # A part keeps the memory of all groups for as long as the gradient lives.
    copied = len(groups.places) > 2 * max(sum(needs[::2]), sum(needs[1::2]))
    for group, place in enumerate(groups.places):
        if place is None:
            continue
        rank = lows[place].rank()
        for at, part in ((2 * place, das), (2 * place + 1, dbs)):
            if part is None or not needs[at]:
                continue
            own = part[group, :rank] if at % 2 == 0 else part[group, :, :rank]
            total = gradients[at]
            if total is None:
                gradients[at] = own.clone() if copied else own
            else:
                gradients[at] = total + own
    return dx, gradients


def _groups(device: torch.device, lows: Sequence[LowRank], segments: Segments) -> _Groups:
    bounds: list[int] = [segments[0][0]]
    places: list[int | None] = []
    for start, stop, adapter in segments:
        if start > bounds[-1]:
            bounds.append(start)
            places.append(None)
        bounds.append(stop)
        places.append(adapter)
    seed = next((low.seed for low in lows if low.seed is not None), None)
    scales = tuple(1.0 if place is None else lows[place].scale() for place in places)
    thresholds = tuple(_threshold(None if place is None else lows[place]) for place in places)
    offsets, scale, own_thresholds = _tables(tuple(bounds), scales, thresholds, device)
    return _Groups(
        max(low.rank() for low in lows),
        tuple(places),
        offsets,
        scale,
        None if seed is None else own_thresholds,
        None if seed is None else seed.to(device),
    )


def _threshold(low: LowRank | None) -> int:
    return 0 if low is None or low.seed is None else dropout_threshold(low.p)


# So that a repeated call copies nothing to the device.
@functools.lru_cache(maxsize=1024)
def _tables(
    bounds: tuple[int, ...],
    scales: tuple[float, ...],
    thresholds: tuple[int, ...],
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.inference_mode(False):
        return (
            torch.tensor(bounds, dtype=torch.int32, device=device),
            torch.tensor(scales, dtype=torch.float32, device=device),
            torch.tensor(thresholds, dtype=torch.int32, device=device),
        )


def _tensors(groups: _Groups, lows: Sequence[LowRank]) -> list[Tensor | None]:
    factors = [tensor for low in lows for tensor in (low.a, low.b)]
    return [groups.offsets, groups.scale, groups.thresholds, groups.seed, *factors]


def _stacked(groups: _Groups, lows: Sequence[LowRank]) -> tuple[Tensor, Tensor]:
    """A (G, R, K) and B (G, N, R) of each group."""
    a = library(partial(stacked_rows, groups.rank, groups.places), *(low.a for low in lows))
    b = library(partial(stacked_columns, groups.rank, groups.places), *(low.b for low in lows))
    return a, b
