"""The mathematics of a LoRA linear layer in plain torch: the oracle that every faster path must match.

    y  = x Wᵀ + bias + scaling · S Bᵀ        S  = D(x) Aᵀ          D(x) = keep ∘ x / (1 − p')
    dS = scaling · dy B                      dB = scaling · dyᵀ S
    dA = dSᵀ D(x)                            dx = dy W + keep ∘ (dS A) / (1 − p')

`keep` is the dropout mask of `fastlora.ops.dropout`, which the backward pass recomputes. By default it is `kernel_mask`.

Every function works for any float dtype and device and is differentiable by autograd. Nothing here is optimised.

Source: Hu et al., LoRA, arXiv 2106.09685.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastlora.ops.dropout import dropout_threshold, keep_scale, kernel_mask


class LowRank(NamedTuple):
    """The low-rank path of one call: scaling · (D(x) Aᵀ) Bᵀ.

    a: (R, K). b: (N, R). scaling: the applied factor, alpha / rank. p: dropout probability, 0 ≤ p < 1, quantised to multiples of 2⁻¹⁶.
    seed: 0-d int64 tensor, or None for no dropout.
    """

    a: Tensor
    b: Tensor
    scaling: float
    p: float = 0.0
    seed: Tensor | None = None

    # Methods rather than properties: torch 2.6 does not trace properties of a named tuple.
    def rank(self) -> int:
        return self.a.shape[0]

    def keep_scale(self) -> float:
        """1 / (1 − p') where there is dropout, else 1."""
        return 1.0 if self.seed is None else keep_scale(self.p)

    def scale(self) -> float:
        """Every factor of the path."""
        return self.scaling * self.keep_scale()

    def to(self, dtype: torch.dtype) -> LowRank:
        """The same with both factors in `dtype`."""
        return LowRank(self.a.to(dtype), self.b.to(dtype), self.scaling, self.p, self.seed)


class Layer(NamedTuple):
    """A layer in a call. weight: (N, K). bias: (N,) or None. A `low` of rank 0 is none."""

    weight: Tensor
    bias: Tensor | None
    low: LowRank


def stacked(lows: Sequence[LowRank]) -> LowRank:
    """One path with every A_i (ΣR, K), for the products of x, which do not use B; its scaling is 1."""
    return lows[0]._replace(a=torch.cat([low.a for low in lows]), scaling=1.0)


def apply_dropout(x: Tensor, low: LowRank, keep: Tensor | None = None) -> Tensor:
    """D(x) for x (M, K). A dropped element is exactly 0, even if it was infinite or NaN. Without a seed, or with p' = 0, D(x) is x itself.

    keep: (M, K) bool, the mask to apply; None applies `kernel_mask`.
    """
    if low.seed is None or dropout_threshold(low.p) == 0:
        return x
    if keep is None:
        keep = kernel_mask(low.seed, low.p, x.shape[0], x.shape[1], device=x.device)
    return torch.where(keep, x, 0.0) * keep_scale(low.p)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, low: LowRank, keep: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y = x Wᵀ + bias + scaling · (D(x) Aᵀ) Bᵀ.

    x: (M, K). weight: (N, K). bias: (N,) or None. low: of x's dtype and device. keep: as in `apply_dropout`.
    Returns y (M, N) and S = D(x) Aᵀ (M, R), which the backward pass needs.
    """
    s = apply_dropout(x, low, keep) @ low.a.T  # [M, K] @ [K, R] -> [M, R]
    y = torch.nn.functional.linear(x, weight, bias)  # [M, K] @ [K, N] -> [M, N]
    return y + low.scaling * (s @ low.b.T), s


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, low: LowRank, s: Tensor, keep: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients (dx, dA, dB) of `forward` for dy (M, N); `s` is what `forward` returned."""
    ds = low.scaling * (dy @ low.b)  # [M, N] @ [N, R] -> [M, R]
    dlora_b = low.scaling * (dy.T @ s)  # [N, M] @ [M, R] -> [N, R]
    dlora_a = ds.T @ apply_dropout(x, low, keep)  # [R, M] @ [M, K] -> [R, K]
    # D is linear and diagonal, so the same mask applies to dS A.
    dx = dy @ weight + apply_dropout(ds @ low.a, low, keep)  # [M, N] @ [N, K] + [M, R] @ [R, K]
    return dx, dlora_a, dlora_b
