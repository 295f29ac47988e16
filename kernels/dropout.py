"""The dropout mask in a kernel.

    keep(i, j) = int16(lane j % 8 of Philox(seed; j // 8, i, 0, 0)) ≥ threshold − 2¹⁵

is the mask of `fastlora.ops.dropout.kernel_mask`, bit for bit. One Philox call serves eight neighbouring columns.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Mask(NamedTuple):
    """Where a kernel gets the dropout mask from; without seed and packed there is no dropout.

    seed: 0-d int64 on the operands' device. threshold: dropout probability in units of 2⁻¹⁶.
    packed: (M, ⌈N / 8⌉) uint8, rows contiguous, as `backward.x_pass` writes it; seed and threshold are then not read.
    """

    seed: torch.Tensor | None = None
    threshold: int = 0
    packed: torch.Tensor | None = None

    @property
    def drops(self) -> bool:
        return self.seed is not None or self.packed is not None


NO_MASK = Mask()


@triton.jit
def keep_bits(seed, threshold, o_row, o_group):
    """The mask of a tile, eight columns packed into a number.

    seed: int64. threshold: int32, the dropout probability in units of 2^-16.
    o_row: [BLOCK_M] row numbers. o_group: [BLOCK_G] column numbers divided by 8.
    Returns int32 [BLOCK_M, BLOCK_G], bit j for column 8 * o_group + j.
    """
    zero = tl.zeros([o_row.shape[0], o_group.shape[0]], tl.uint32)
    c0 = zero + o_group.to(tl.uint32)[None, :]  # [BLOCK_M, BLOCK_G]
    c1 = zero + o_row.to(tl.uint32)[:, None]  # [BLOCK_M, BLOCK_G]
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, zero, zero)
    least = threshold - 32768
    return _two(w0, least) | _two(w1, least) << 2 | _two(w2, least) << 4 | _two(w3, least) << 6


@triton.jit
def _two(word, least):
    """Bits 0 and 1: whether the low and the high half of `word`, as signed numbers, reach `least`."""
    word = word.to(tl.int32, bitcast=True)
    return ((word << 16) >> 16 >= least).to(tl.int32) | ((word >> 16 >= least).to(tl.int32) << 1)


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
    return drop_bits(block, keep_bits(seed, threshold, o_row, o_group))
