"""A bank of experts on the Triton path: a grouped base product of torch, and the kernels of rows in groups for the low-rank products.

The offsets stay on the device. A repeated call takes the steps of an earlier one, whatever the sizes of the groups
(`fastlora.kernels.recording`).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastlora.kernels.recording import library, repeat
from fastlora.ops.dispatch import product_precision
from fastlora.ops.dropout import dropout_threshold
from fastlora.ops.products import grouped_product
from fastlora.ops.reference import LowRank
from fastlora.ops.triton.grouped import grouped_add_, grouped_da_dx_, grouped_ds_db, grouped_s
from fastlora.ops.triton.linear import current


def experts_forward(x: Tensor, weight: Tensor, offsets: Tensor, low: LowRank) -> list[Tensor]:
    """y (M, N) and S (M, R) for x (M, K), weight (G, N, K) and low with a (G, R, K) and b (G, N, R). S of rows of no group is undefined."""
    offsets, scale, mask = _groups(x, offsets, low)

    def run() -> list[Tensor]:
        y = library(grouped_product, x, weight, offsets)
        s = grouped_s(x, low.a, offsets, **mask)
        grouped_add_(y, s, low.b, scale, offsets)
        return [y, s]

    with current(x):
        inputs = (x, weight, offsets, low.a, low.b, scale, *mask.values())
        return [*repeat((), product_precision(x), inputs, run)]


def experts_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    s: Tensor,
    low: LowRank,
    needs_x: bool,
    needs_a: bool,
    needs_b: bool,
) -> list[Tensor | None]:
    """dx (M, K), dA (G, R, K) and dB (G, N, R) for dy (M, N); None for what is not needed. s: from `experts_forward`."""
    needs = (needs_x, needs_a, needs_b)
    if not any(needs):
        return [None] * 3
    offsets, scale, mask = _groups(x, offsets, low)

    def run() -> list[Tensor]:
        ds, db = grouped_ds_db(
            dy, s, low.b, scale, offsets, needs_ds=needs_x or needs_a, needs_db=needs_b
        )
        dx = library(_base_gradient, dy, weight, offsets) if needs_x else None
        da = None
        if ds is not None:
            da = grouped_da_dx_(dx, x, ds, low.a, scale, offsets, **mask, needs_da=needs_a)
        return [gradient for gradient in (dx, da, db) if gradient is not None]

    inputs = (dy, x, weight, offsets, s, low.a, low.b, scale, *mask.values())
    with current(x):
        found = iter(repeat((), (product_precision(x), *needs), inputs, run))
    return [next(found) if needed else None for needed in needs]


def _base_gradient(dy: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """dx of the base product."""
    return grouped_product(dy, weight.mT, offsets)  # [rows, N] @ [N, K] for each group


def _groups(x: Tensor, offsets: Tensor, low: LowRank) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The offsets, the factor of each group and the arguments of the mask as the kernels take them."""
    threshold = dropout_threshold(low.p)
    scale, thresholds = _tables(low.a.shape[0], low.scale(), threshold, x.device)
    mask = {} if low.seed is None else {"seed": low.seed.to(x.device), "thresholds": thresholds}
    return offsets.contiguous(), scale, mask


# So that a repeated call copies nothing to the device.
@functools.lru_cache(maxsize=1024)
def _tables(
    groups: int, scale: float, threshold: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        return (
            torch.full((groups,), scale, dtype=torch.float32, device=device),
            torch.full((groups,), threshold, dtype=torch.int32, device=device),
        )
