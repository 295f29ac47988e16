"""The mathematics of a LoRA linear layer in plain torch: the oracle that every faster path must match.

    y  = x Wᵀ + bias + scaling · S Bᵀ        S  = D(x) Aᵀ          D(x) = keep ∘ x / (1 − p')
    dS = scaling · dy B                      dB = scaling · dyᵀ S
    dA = dSᵀ D(x)                            dx = dy W + keep ∘ (dS A) / (1 − p')

`keep` is not stored: it is a pure function of (seed, row, column), so it does not depend on how the work is tiled, and the backward
pass computes the same bits again. `keep_mask` below uses Philox-4x32-10, as the kernels do. Calls on a CPU have a mask of their
own (`fastlora.ops.cpu_dropout`), which `forward` and `backward` take as an argument.

Every function works for any float dtype and device and is differentiable by autograd. Nothing here is tuned.

Source: Hu et al., LoRA (2106.09685); Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011) for Philox.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Philox-4x32-10.
MASK32 = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
LANES = 8  # one call gives four 32-bit words, that is eight 16-bit lanes


def dropout_threshold(p: float) -> int:
    """`p` in units of 2⁻¹⁶, rounded to nearest: a 16-bit lane below it is dropped. 0 ≤ p < 1 gives 0 … 65535."""
    return min(round(p * 65536), 65535)


def keep_scale(p: float) -> float:
    """1 / (1 − p') with p' the quantised probability that is really applied."""
    return 65536 / (65536 - dropout_threshold(p))


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

    def scale(self) -> float:
        """Every factor of the path: `scaling`, and 1 / (1 − p') where there is dropout."""
        return self.scaling if self.seed is None else self.scaling * keep_scale(self.p)

    def to(self, dtype: torch.dtype) -> LowRank:
        """The same with both factors in `dtype`."""
        return LowRank(self.a.to(dtype), self.b.to(dtype), self.scaling, self.p, self.seed)


class Layer(NamedTuple):
    """A layer in a call. weight: (N, K). bias: (N,) or None. In a group every `low` has the same p and seed."""

    weight: Tensor
    bias: Tensor | None
    low: LowRank


def stacked(lows: Sequence[LowRank]) -> LowRank:
    """One path with every A_i (ΣR, K), for the products of x, which read neither B nor the scalings; those are in S_i and dS_i."""
    return lows[0]._replace(a=torch.cat([low.a for low in lows]), scaling=1.0)


def philox_4x32(
    seed: Tensor | int, c0: Tensor, c1: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32-10 of the counter (c0, c1, 0, 0) under the 64-bit key `seed`.

    c0, c1: int64 tensors with values in [0, 2³²), broadcast against each other.
    Returns four int64 tensors whose low 32 bits are the random words; the bits above are undefined.
    """
    # 32-bit unsigned words live in int64. A product of two of them wraps to the right 64 bits, and what the arithmetic
    # shift `>>` leaves in the high bits is cleared by the next `& MASK32`. Early rounds stay small by broadcasting.
    key_0, key_1 = seed & MASK32, (seed >> 32) & MASK32
    c2 = c3 = torch.zeros_like(c0)
    for _ in range(ROUNDS):
        product_0, product_1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0 = ((product_1 >> 32) ^ c1 ^ key_0) & MASK32
        c2 = ((product_0 >> 32) ^ c3 ^ key_1) & MASK32
        c1, c3 = product_1, product_0
        key_0, key_1 = (key_0 + KEY_STEPS[0]) & MASK32, (key_1 + KEY_STEPS[1]) & MASK32
    return c0, c1, c2, c3


def keep_mask(
    seed: Tensor | int,
    p: float,
    rows: int,
    cols: int,
    first_row: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Which elements of x the dropout keeps: a pure function of (seed, row, column).

    Element (i, j) uses the Philox counter (j // 8, i, 0, 0). Its lane j % 8, counted from the least significant half of
    the first word, is read as a SIGNED 16-bit number, and the element is kept if lane ≥ threshold − 2¹⁵.

    seed: int64, a 0-d tensor or an int. p: 0 ≤ p < 1, quantised to multiples of 2⁻¹⁶.
    rows, cols: the shape of the part wanted; it starts at row `first_row` of x.
    Returns (rows, cols) bool on `device`.
    """
    groups = -(-cols // LANES)
    column_group = torch.arange(groups, device=device)[None, :]
    row = torch.arange(first_row, first_row + rows, device=device)[:, None]
    words = philox_4x32(seed, column_group, row)
    # A conversion to int32 keeps the low 32 bits; viewing the words as int16 splits each into its two lanes, low half
    # first on the little-endian machines that torch runs on.
    lanes = torch.stack([word.to(torch.int32) for word in words], dim=-1).view(torch.int16)
    return (lanes.view(rows, groups * LANES) >= dropout_threshold(p) - 32768)[:, :cols]


def apply_dropout(x: Tensor, low: LowRank, keep: Tensor | None = None) -> Tensor:
    """D(x) for x (M, K). A dropped element is exactly 0, whatever it was. Without a seed, or with p' = 0, D(x) is x itself.

    keep: (M, K) bool, the mask to apply; None applies `keep_mask`.
    """
    if low.seed is None or dropout_threshold(low.p) == 0:
        return x
    if keep is None:
        keep = keep_mask(low.seed, low.p, x.shape[0], x.shape[1], device=x.device)
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
