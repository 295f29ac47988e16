"""The mathematics of a LoRA linear layer in plain torch: the oracle that every faster path must match.

    y  = x Wᵀ + bias + scaling · S Bᵀ        S  = D(x) Aᵀ          D(x) = keep ∘ x / (1 − p')
    dS = scaling · dy B                      dB = scaling · dyᵀ S
    dA = dSᵀ D(x)                            dx = dy W + keep ∘ (dS A) / (1 − p')

`keep` is not stored anywhere. It is a pure function of (seed, row, column), computed with Philox-4x32-10, so it does
not depend on how the work is tiled, and a kernel can make the same bits again in the backward pass.

Every function works for any float dtype and device and is differentiable by autograd. Nothing here is tuned.

Source: Hu et al., LoRA (2106.09685); Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011) for Philox.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Philox-4x32-10.
MASK32 = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
LANES = 8  # one call gives four 32-bit words, that is eight 16-bit lanes

Key = tuple[Tensor | int, Tensor | int]


def dropout_threshold(p: float) -> int:
    """`p` in units of 2⁻¹⁶, rounded to nearest: a 16-bit lane below it is dropped. 0 ≤ p < 1 gives 0 … 65535."""
    return min(round(p * 65536), 65535)


def keep_scale(p: float) -> float:
    """1 / (1 − p') with p' the quantised probability that is really applied."""
    return 65536 / (65536 - dropout_threshold(p))


def philox_4x32(
    seed: Tensor | int, c0: Tensor, c1: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32-10 of the counter (c0, c1, 0, 0) under the 64-bit key `seed`.

    c0, c1: int64 tensors with values in [0, 2³²), broadcast against each other.
    Returns four int64 tensors whose low 32 bits are the random words; the bits above are undefined.
    """
    return philox_rounds(c0, c1, (seed & MASK32, (seed >> 32) & MASK32), ROUNDS)[:4]


def philox_rounds(
    c0: Tensor, c1: Tensor, key: Key, rounds: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Key]:
    """The first `rounds` rounds from the counter (c0, c1, 0, 0): the four words, and the key of the next round."""
    # 32-bit unsigned words live in int64. A product of two of them wraps to the right 64 bits, and `>>` being an
    # arithmetic shift only soils bits that the next `& MASK32` clears. Early rounds stay small by broadcasting.
    c2 = c3 = torch.zeros_like(c0)
    for _ in range(rounds):
        product_0, product_1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0 = ((product_1 >> 32) ^ c1 ^ key[0]) & MASK32
        c2 = ((product_0 >> 32) ^ c3 ^ key[1]) & MASK32
        c1, c3 = product_1, product_0
        key = ((key[0] + KEY_STEPS[0]) & MASK32, (key[1] + KEY_STEPS[1]) & MASK32)
    return c0, c1, c2, c3, key


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


def apply_dropout(x: Tensor, p: float, seed: Tensor | int | None) -> Tensor:
    """D(x) for x (M, K). A dropped element is exactly 0, whatever it was. `seed` None or p 0 returns x itself."""
    if seed is None or dropout_threshold(p) == 0:
        return x
    keep = keep_mask(seed, p, x.shape[0], x.shape[1], device=x.device)
    return torch.where(keep, x, 0.0) * keep_scale(p)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    p: float = 0.0,
    seed: Tensor | int | None = None,
) -> tuple[Tensor, Tensor]:
    """y = x Wᵀ + bias + scaling · (D(x) Aᵀ) Bᵀ.

    x: (M, K). weight: (N, K). bias: (N,) or None. lora_a: (R, K). lora_b: (N, R). All of one float dtype and device.
    Returns y (M, N) and S = D(x) Aᵀ (M, R), which the backward pass needs.
    """
    s = apply_dropout(x, p, seed) @ lora_a.T  # [M, K] @ [K, R] -> [M, R]
    y = torch.nn.functional.linear(x, weight, bias)  # [M, K] @ [K, N] -> [M, N]
    return y + scaling * (s @ lora_b.T), s


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    s: Tensor,
    scaling: float,
    p: float = 0.0,
    seed: Tensor | int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients (dx, dlora_a, dlora_b) of `forward` for dy (M, N); `s` is what `forward` returned."""
    ds = scaling * (dy @ lora_b)  # [M, N] @ [N, R] -> [M, R]
    dlora_b = scaling * (dy.T @ s)  # [N, M] @ [M, R] -> [N, R]
    dlora_a = ds.T @ apply_dropout(x, p, seed)  # [R, M] @ [M, K] -> [R, K]
    # The mask of D acts on dS A just as it did on x: D is linear and diagonal.
    dx = dy @ weight + apply_dropout(
        ds @ lora_a, p, seed
    )  # [M, N] @ [N, K] + [M, R] @ [R, K] -> [M, K]
    return dx, dlora_a, dlora_b
