"""Autograd function of a gated MLP, y = down(act(gate(x)) ∘ up(x)), whose three layers may each have an adapter.

Separate layers save x, gate(x), act(gate(x)), up(x) and their product, 4N + K numbers for each row. This function saves x, g = gate(x) and u = up(x),
2N + K, beside each layer's S and seed, and computes h = act(g) ∘ u again in the backward pass:

    dh = gradient of down's input           du = dh ∘ act(g)          dg = dh ∘ u ∘ act'(g)

Source: Shazeer, GLU variants improve transformer, arXiv 2002.05202.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastlora.ops import linear
from fastlora.ops.group import backward_rows, forward_rows
from fastlora.ops.reference import Layer, LowRank

_TENSORS = 4  # of a layer
_ATEN = torch.ops.aten


class Activation(NamedTuple):
    """forward: act(g). backward_: replaces d, the gradient of act(g), by that of g, in place."""

    forward: Callable[[Tensor], Tensor]
    backward_: Callable[[Tensor, Tensor], Tensor]


def _silu_backward_(d: Tensor, g: Tensor) -> Tensor:
    found: Tensor = _ATEN.silu_backward.grad_input(d, g, grad_input=d)
    return found


def _gelu_backward_(approximate: str, d: Tensor, g: Tensor) -> Tensor:
    found: Tensor = _ATEN.gelu_backward.grad_input(d, g, approximate=approximate, grad_input=d)
    return found


def _gelu(approximate: str) -> Activation:
    return Activation(
        partial(F.gelu, approximate=approximate), partial(_gelu_backward_, approximate)
    )


ACTIVATIONS = {
    "silu": Activation(F.silu, _silu_backward_),
    "gelu": _gelu("none"),
    "gelu_tanh": _gelu("tanh"),
}


class _Settings(NamedTuple):
    """What a call needs besides tensors. scalings, ps: of gate, up and down. one_mask: whether up's seed is gate's."""

    activation: str
    scalings: tuple[float, ...]
    ps: tuple[float, ...]
    one_mask: bool
    triton: bool


def gated_mlp(
    x: Tensor, gate: Layer, up: Layer, down: Layer, activation: str, *, triton: bool = False
) -> Tensor:
    """down(act(gate(x)) ∘ up(x)), differentiable in every tensor.

    x: (..., K), of the weights' dtype. Under autocast all are cast to its dtype. gate, up: weights (N, K). down: weight (P, N). Each has its own
    rank, 0 without an adapter, scaling, dropout and seed; gate and up with one p and one seed tensor have one mask.
    activation: a key of ACTIVATIONS. triton: run kernels; only if `dispatch` allows them.
    Returns y (..., P), newly allocated.
    """
    casts = linear.autocasts(x)
    x = linear.autocast(x) if casts else x
    layers, tensors = (gate, up, down), []
    for weight, bias, low in layers:
        if casts:
            weight, bias = linear.autocast(weight), None if bias is None else linear.autocast(bias)
        # Kernels cast the adapters as they load them.
        tensors += [weight, bias, *(low if triton else low.to(x.dtype))[:2]]
    lows = [layer.low for layer in layers]
    settings = _Settings(
        activation,
        tuple(low.scaling for low in lows),
        tuple(low.p for low in lows),
        lows[0].seed is lows[1].seed,
        triton,
    )
    seeds = [low.seed for low in lows]
    if not torch.is_grad_enabled():
        return _forward(x, settings, seeds, tensors)[0]
    y: Tensor = _APPLY(x, settings, *seeds, *tensors)
    return y


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        settings: _Settings,
        seed_gate: Tensor | None,
        seed_up: Tensor | None,
        seed_down: Tensor | None,
        *tensors: Tensor | None,
    ) -> Tensor:
        seeds = (seed_gate, seed_up, seed_down)
        y, g, u, s = _forward(x, settings, seeds, tensors)
        ctx.save_for_backward(x, g, u, *s, *seeds, *tensors)
        ctx.settings = settings
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> linear.Gradients:
        with linear.no_autocast(dy):  # the dtypes are those of the forward pass
            return _GatedMLP._gradients(ctx, dy)

    @staticmethod
    def _gradients(ctx: Any, dy: Tensor) -> linear.Gradients:
        x, g, u, *rest = ctx.saved_tensors
        s, seeds, tensors = rest[:3], rest[3:6], rest[6:]
        settings: _Settings = ctx.settings
        needs = ctx.needs_input_grad[0], *ctx.needs_input_grad[5:]
        if torch.is_grad_enabled():

            def output(x: Tensor, *tensors: Tensor | None) -> list[Tensor]:
                return [_composed(x, settings, _layers(settings, seeds, tensors))]

            dx, *found = linear.exact_gradients(output, (x, *tensors), needs, [dy])
        else:
            layers, rows = _layers(settings, seeds, tensors), linear.gradient_rows(dy)
            dx, found = _backward(rows, linear.as_rows(x), g, u, s, settings, layers, needs)
            dx = None if dx is None else linear.shaped_as(x, dx)
        return dx, None, None, None, None, *found


# As in `fastlora.ops.linear`: the callers exclude functorch's transforms.
_APPLY: Callable[..., Any] = super(torch.autograd.Function, _GatedMLP).apply


def triton_gated() -> Any:
    """The module that launches kernels for the middle of the MLP; Triton is imported at the first call."""
    from fastlora.ops.triton import gated

    return gated


def _layers(
    settings: _Settings, seeds: Sequence[Tensor | None], tensors: Sequence[Any]
) -> list[Layer]:
    """Gate, up and down."""
    seeds = [seeds[0], seeds[0] if settings.one_mask else seeds[1], seeds[2]]
    fours = zip(*(tensors[i::_TENSORS] for i in range(_TENSORS)), strict=True)
    return [
        Layer(weight, bias, LowRank(a, b, scaling, p, seed))
        for (weight, bias, a, b), scaling, p, seed in zip(
            fours, settings.scalings, settings.ps, seeds, strict=True
        )
    ]


def _composed(x: Tensor, settings: _Settings, layers: Sequence[Layer]) -> Tensor:
    """`gated_mlp` as torch operations, for autograd."""
    gate, up, down = layers
    g, u = (linear.composed(x, *layer, settings.triton) for layer in (gate, up))
    return linear.composed(ACTIVATIONS[settings.activation].forward(g) * u, *down, settings.triton)


def _forward(
    x: Tensor, settings: _Settings, seeds: Sequence[Tensor | None], tensors: Sequence[Any]
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """y (..., P), g and u (M, N), and S (M, R) of each layer, without a factor."""
    gate, up, down = _layers(settings, seeds, tensors)
    (g, u), s = forward_rows(linear.as_rows(x), [gate, up], settings.triton)
    if settings.triton:
        y, s_down = triton_gated().down_forward(g, u, down, settings.activation)
    else:
        (y,), (s_down,) = forward_rows(_product(g, u, settings), [down], False)
    return linear.shaped_as(x, y), g, u, [*s, s_down]


def _backward(
    dy: Tensor,
    x: Tensor,
    g: Tensor,
    u: Tensor,
    s: Sequence[Tensor],
    settings: _Settings,
    layers: Sequence[Layer],
    needs: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """dx (M, K) and the gradient of each layer's tensors. needs: of x and of these."""
    gate, up, down = layers
    needs_x, *rest = needs
    # Of the weight, the bias, A and B; of rank 0 there are none.
    of_gate, of_up, of_down = (
        [
            needed and (layer.low.rank() > 0 or at < 2)
            for at, needed in enumerate(rest[i : i + _TENSORS])
        ]
        for i, layer in zip((0, 4, 8), layers, strict=True)
    )
    h: Tensor | None
    if not (needs_x or any(of_gate) or any(of_up)):
        h = _product(g, u, settings)
        _, (da,), (db,) = backward_rows(
            [dy], h, [down], s[2:], False, of_down[2:3], of_down[3:], settings.triton
        )
        return None, [None] * 2 * _TENSORS + _of_layer(dy, h, of_down, da, db)
    down_backward = triton_gated().down_backward if settings.triton else _down_backward
    dg, du, h, da, db = down_backward(
        dy, g, u, down, s[2], settings.activation, (of_down[0], of_down[2], of_down[3])
    )
    of_end = _of_layer(dy, h, of_down, da, db)
    del h
    dx, das, dbs = backward_rows(
        [dg, du],
        x,
        [gate, up],
        s[:2],
        needs_x,
        [of_gate[2], of_up[2]],
        [of_gate[3], of_up[3]],
        settings.triton,
    )
    of_start = _of_layer(dg, x, of_gate, das[0], dbs[0])
    of_start += _of_layer(du, x, of_up, das[1], dbs[1])
    return dx, of_start + of_end


def _product(g: Tensor, u: Tensor, settings: _Settings) -> Tensor:
    """h (M, N)."""
    if settings.triton:
        found: Tensor = triton_gated().product(g, u, settings.activation)
        return found
    return ACTIVATIONS[settings.activation].forward(g).mul_(u)


def _down_backward(
    dy: Tensor,
    g: Tensor,
    u: Tensor,
    down: Layer,
    s: Tensor,
    activation: str,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """dg, du and h (M, N), dA (R, N) and dB (P, R) of `down`, for dy (M, P). needs: of h by the caller, of dA and of dB."""
    needs_h, needs_a, needs_b = needs
    act, backward_ = ACTIVATIONS[activation]
    a = act(g)
    h = a * u if needs_h or needs_a else u  # u for its form; its values are not read
    dh, (da,), (db,) = backward_rows([dy], h, [down], [s], True, [needs_a], [needs_b], False)
    assert dh is not None
    du = a.mul_(dh)
    dg = backward_(dh.mul_(u), g)
    return dg, du, h if needs_h else None, da, db


def _of_layer(
    dy: Tensor, x: Tensor | None, needs: Sequence[bool], da: Tensor | None, db: Tensor | None
) -> list[Tensor | None]:
    """The gradients of a layer's tensors, for x (M, K), if its weight needs one, and dy (M, N)."""
    return [
        dy.T @ x if needs[0] and x is not None else None,  # [N, M] @ [M, K] -> [N, K]
        dy.sum(0) if needs[1] else None,
        da,
        db,
    ]
