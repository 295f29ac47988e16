"""The middle of a gated MLP on the Triton path: h = act(g) ∘ u forward; backward from dy to dg and du, through the layer after h and its adapter.

A repeated call takes the steps of an earlier one, as a single layer's does (`fastlora.kernels.recording`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastlora.kernels.config import gated_config, gated_down_config
from fastlora.kernels.gated import gated_down, gated_gradients_, gated_product
from fastlora.kernels.recording import library, repeat
from fastlora.kernels.reduce import sum_partials
from fastlora.ops import dispatch
from fastlora.ops.dispatch import product_precision
from fastlora.ops.reference import Layer
from fastlora.ops.triton.linear import a_product, current, dy_products, mask_of, run_forward


def product(g: Tensor, u: Tensor, activation: str) -> Tensor:
    """h = act(g) ∘ u (M, N), for contiguous g and u."""
    with current(g):
        (h,) = repeat((), ("gated", activation), (g, u), lambda: [gated_product(g, u, activation)])
    return h


def down_forward(g: Tensor, u: Tensor, down: Layer, activation: str) -> tuple[Tensor, Tensor]:
    """y (M, P) and S (M, R) of `down` for h = act(g) ∘ u; where its plan has a pass for S, that pass computes h too."""
    weight, bias, low = down
    if not low.rank():
        h = product(g, u, activation)
        return F.linear(h, weight, bias), low.a.new_empty(g.shape[0], 0)
    choice = dispatch.launch_choice(g, weight, low.rank(), low.seed is not None)
    config = choice.config
    assert config is not None  # as `choose_gated` has found for gate

    def run() -> Sequence[Tensor]:
        if choice.plan in ("fused", "decode"):  # which compute S themselves
            return run_forward(choice, gated_product(g, u, activation), weight, bias, low)
        tiles = gated_down_config(config.down)
        named: Any = {"mask": mask_of(g, low), "precision": product_precision(g)}
        h, s = gated_down(g, u, activation, low.a, tiles, **named)
        # An overlapping product would read h before it is complete.
        after = replace(choice, config=replace(config, split=replace(config.split, overlap=False)))
        return run_forward(after, h, weight, bias, low, s)

    with current(g):
        settings = "gated", activation, low.scaling, low.p
        inputs = (g, u, weight, bias, low.a, low.b, low.seed)
        y, s = repeat((choice,), settings, inputs, run)
    return y, s


def down_backward(
    dy: Tensor,
    g: Tensor,
    u: Tensor,
    down: Layer,
    s: Tensor,
    activation: str,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """dg, du and h (M, N), dA (R, N) and dB (P, R), for dy (M, P) and S (M, R) of `down`. needs: of h by the caller, of dA and of dB.

    Raises: what `dispatch.launch_choice` raises.
    """
    weight, _, low = down
    needs_h, needs_a, needs_b = needs
    rank = low.rank()
    choice = dispatch.launch_choice(g, weight, max(1, rank), low.seed is not None, None, dy)
    assert choice.config is not None  # as in the forward pass
    config = choice.config

    def run() -> list[Tensor]:
        ds = db = bits = da = None
        if rank:
            ds, db, bits = dy_products(config, dy, g, s, low, True, needs_b)
        dh = library(torch.mm, dy, weight)
        dg, du, h = gated_gradients_(
            dh, g, u, activation, gated_config(config.update, g.element_size()),
            ds=ds, lora_a=low.a if rank else None, scale=low.scale(), bits=bits,
            needs_h=needs_h or needs_a, precision=product_precision(g),
        )  # fmt: skip
        if needs_a:
            assert h is not None and ds is not None
            da, _ = a_product(config, h, ds, low, bits, False)
        sums = [
            None if part is None else sum_partials(part, factor.dtype)
            for part, factor in ((da, low.a), (db, low.b))
        ]
        found = [dg, du, h if needs_h else None, *sums]
        return [tensor for tensor in found if tensor is not None]

    with current(g):
        settings = "gated", activation, low.scaling, low.p, needs
        inputs = (dy, g, u, weight, s, low.a, low.b, low.seed)
        found = iter(repeat((choice,), settings, inputs, run))
    dg, du = next(found), next(found)
    h, da, db = (next(found) if needed else None for needed in (needs_h, needs_a, needs_b))
    return dg, du, h, da, db
