"""The rank-R term of a tile, out = base + scale · keep ∘ (low upᵀ), for the kernels that end with it: loads of its operands, and the term.

It has an accumulator of its own and a factor that is known at run time only: added to the accumulator of the loop, or with a constant
factor, it makes ptxas wait for each matrix instruction of the loop before it issues the next.
"""

import triton
import triton.language as tl

from fastlora.kernels.dropout import drop_bits


@triton.jit
def low_tile(
    low_ptr, M, first_m, first_r, R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr
):
    """[BLOCK_M, BLOCK_R] of low (M, R) at (first_m, first_r)."""
    o_m = (first_m + tl.arange(0, BLOCK_M)).to(tl.int64)
    o_r = first_r + tl.arange(0, BLOCK_R)
    mask = (o_m < M)[:, None] & (o_r < R)[None, :]
    return tl.load(low_ptr + o_m[:, None] * R + o_r[None, :], mask=mask, other=0.0)


@triton.jit
def up_tile(
    up_ptr, N, stride_un, stride_ur, first_n, first_r,
    R: tl.constexpr, DTYPE: tl.constexpr, BLOCK_R: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """[BLOCK_R, WIDTH] of upᵀ (R, N) at (first_r, first_n)."""
    o_n = (first_n + tl.arange(0, WIDTH)).to(tl.int64)
    o_r = first_r + tl.arange(0, BLOCK_R)
    mask = (o_r < R)[:, None] & (o_n < N)[None, :]
    p_up = up_ptr + o_n[None, :] * stride_un + o_r[:, None] * stride_ur
    return tl.load(p_up, mask=mask, other=0.0).to(DTYPE)


@triton.jit
def bits_tile(
    bits_ptr, M, N, stride_bits, first_m, first_n, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr
):
    """[BLOCK_M, WIDTH / 8] of the mask in bits, for the tile at (first_m, first_n)."""
    o_m = (first_m + tl.arange(0, BLOCK_M)).to(tl.int64)
    o_byte = first_n // 8 + tl.arange(0, WIDTH // 8)
    mask = (o_m < M)[:, None] & (o_byte < tl.cdiv(N, 8))[None, :]
    return tl.load(bits_ptr + o_m[:, None] * stride_bits + o_byte[None, :], mask=mask, other=0)


@triton.jit
def bias_tile(bias_ptr, N, first_n, WIDTH: tl.constexpr):
    """[1, WIDTH] of the bias at first_n, in float32."""
    o_n = first_n + tl.arange(0, WIDTH)
    return tl.load(bias_ptr + o_n, mask=o_n < N, other=0.0).to(tl.float32)[None, :]


@triton.jit
def rank_term(
    acc, low, up, bits, low_ptr, up_ptr, M, N, scale, stride_un, stride_ur, first_m, first_n,
    R: tl.constexpr, DTYPE: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """acc + scale · keep ∘ (low upᵀ) for the tile `acc` [BLOCK_M, BLOCK_N] at (first_m, first_n).

    low: [BLOCK_M, BLOCK_R], up: [BLOCK_R, BLOCK_N]; not read if R exceeds BLOCK_R: then every block of ranks is loaded here.
    bits: the mask, if DROPOUT.
    """
    if R <= BLOCK_R:
        term = tl.dot(low, up, input_precision=PRECISION)
    else:
        term = tl.zeros(acc.shape, tl.float32)
    for first_r in range(0, R if R > BLOCK_R else 0, BLOCK_R):
        low = low_tile(low_ptr, M, first_m, first_r, R, acc.shape[0], BLOCK_R)
        up = up_tile(
            up_ptr, N, stride_un, stride_ur, first_n, first_r, R, DTYPE, BLOCK_R, acc.shape[1]
        )
        term = tl.dot(low, up, term, input_precision=PRECISION)
    if DROPOUT:
        term = drop_bits(term, bits)
    return acc + term * scale
