"""The dropout mask in a kernel.

    keep(i, j) = lane j % 8 of Philox(seed; j // 8, i, 0, 0) ≥ threshold,   lane 4 h + w: half h of word w

is the mask of `fastlora.ops.dropout.kernel_mask`, bit for bit. One Philox call serves eight neighbouring columns. The forward
pass computes the mask where it reads x; the backward pass computes it once, in bits (`store_bits`), mostly while it reads dy.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastlora.kernels.config import ceil_div
from fastlora.kernels.recording import empty

ROUNDS = tl.constexpr(7)


class Mask(NamedTuple):
    """What determines the dropout mask; without a seed, or with a threshold of 0, there is no dropout.

    seed: 0-d int64 on the operands' device. threshold: dropout probability in units of 2⁻¹⁶.
    """

    seed: torch.Tensor | None = None
    threshold: int = 0

    @property
    def drops(self) -> bool:
        return self.seed is not None and self.threshold > 0


NO_MASK = Mask()


def empty_bits(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """A mask in bits, (rows, ⌈columns / 8⌉) uint8, not initialised. Its pitch, a multiple of 16 bytes, allows vectorised loads."""
    pitch = ceil_div(columns, 128) * 16
    bits = empty(rows, pitch, dtype=torch.uint8, device=device)
    return bits[:, : ceil_div(columns, 8)]


@triton.jit
def _words(seed, o_row, o_group):
    """The four uint32 words of Philox-4x32-7 for the counters (group, row, 0, 0), each [BLOCK_M, BLOCK_G].

    Unlike `tl.philox`, one 64-bit product yields both halves of a round's product: one instruction instead of two.
    """
    zero = tl.zeros([o_row.shape[0], o_group.shape[0]], tl.uint32)
    c0 = zero + o_group.to(tl.uint32)[None, :]
    c1 = zero + o_row.to(tl.uint32)[:, None]
    c2, c3 = zero, zero
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(ROUNDS):
        wide_0 = c0.to(tl.uint64) * 0xD2511F53
        wide_1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (wide_1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (wide_0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = wide_1.to(tl.uint32), wide_0.to(tl.uint32)
        k0 += tl.full([], 0x9E3779B9, tl.uint32)
        k1 += tl.full([], 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def keep_bits(seed, threshold, o_row, o_group):
    """The mask of a tile, eight columns packed into a number.

    seed: int64. threshold: int32, the dropout probability in units of 2^-16, 1 or more.
    o_row: [BLOCK_M] row numbers. o_group: [BLOCK_G] column numbers divided by 8.
    Returns uint32 [BLOCK_M, BLOCK_G], bit j for column 8 * o_group + j; the bits above are 0.
    """
    w0, w1, w2, w3 = _words(seed, o_row, o_group)
    least = (65536 - threshold).to(tl.uint32)
    least = least | least << 16
    bits = (
        _reach(w0, least) >> 3 | _reach(w1, least) >> 2 | _reach(w2, least) >> 1 | _reach(w3, least)
    )
    return bits >> 12 & 0xF | bits >> 24 & 0xF0


@triton.jit
def _reach(word, least):
    """Bit 15 and bit 31: whether the low and the high half of `word`, plus that of `least`, carry out of their 16 bits. Other bits are 0."""
    carry_in = (word & 0x7FFF7FFF) + (least & 0x7FFF7FFF)
    return (word & least | (word | least) & carry_in) & 0x80008000


@triton.jit
def store_bits(
    bits_ptr, stride, seed, threshold, M, K, o_row, first_group, EVEN: tl.constexpr, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Store the mask of the rows `o_row` and of GROUPS groups of eight columns in bits, BLOCK_G groups at a time.

    bits_ptr: (M, ⌈K / 8⌉) uint8, its rows `stride` apart. EVEN: whether all groups are within K.
    """
    for first in tl.static_range(0, GROUPS, BLOCK_G):
        o_group = first_group + first + tl.arange(0, BLOCK_G)
        bits = keep_bits(seed, threshold, o_row, o_group)
        p_bits = bits_ptr + o_row.to(tl.int64)[:, None] * stride + o_group[None, :]
        mask = (o_row < M)[:, None]
        # Without a column mask, neighbouring bytes are stored together.
        if not EVEN:
            mask = mask & (o_group < tl.cdiv(K, 8))[None, :]
        tl.store(p_bits, bits.to(tl.uint8), mask=mask)


@triton.jit
def drop_bits(block, bits):
    """`block` [BLOCK_M, BLOCK_N] with 0 where the bit is 0; bits: [BLOCK_M, BLOCK_N / 8], from `keep_bits`."""
    eights = (bits.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.where(tl.reshape(eights, block.shape) != 0, block, 0.0)


@triton.jit
def drop(block, seed, threshold, first_row, first_col):
    """`block` [BLOCK_M, BLOCK_N] with every dropped element 0; its top left element is (first_row, first_col) of the matrix."""
    o_row = first_row + tl.arange(0, block.shape[0])
    o_group = first_col // 8 + tl.arange(0, block.shape[1] // 8)
    w0, w1, w2, w3 = _words(seed, o_row, o_group)  # [BLOCK_M, BLOCK_N / 8]
    # The lanes in the order of the columns, each in the high half of a number.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [BLOCK_M, BLOCK_N / 8, word // 2, word % 2]
    words = tl.reshape(words, [block.shape[0], block.shape[1] // 8, 4])
    lanes = tl.permute(tl.join(words << 16, words), [0, 1, 3, 2])  # [.., half, word]
    return tl.where(tl.reshape(lanes, block.shape) >= threshold.to(tl.uint32) << 16, block, 0.0)
