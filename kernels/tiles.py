"""Jitted helpers that kernels share: the dropout mask, the order of the tiles, the halving of an accumulator.

    keep(i, j) = int16(lane j % 8 of Philox(seed; j // 8, i, 0, 0)) ≥ threshold − 2¹⁵

is the dropout mask of `fastlora.reference.keep_mask`, bit for bit. One Philox call serves eight neighbouring columns.
"""

import triton
import triton.language as tl


@triton.jit
def keep_block(seed, threshold, o_row, o_group):
    """The mask of a tile.

    seed: int64. threshold: int32, dropout probability in units of 2^-16.
    o_row: [BLOCK_M] row numbers. o_group: [BLOCK_G] column numbers divided by 8.
    Returns int1 [BLOCK_M, 8 * BLOCK_G].
    """
    zero = tl.zeros([o_row.shape[0], o_group.shape[0]], tl.uint32)
    c0 = zero + o_group.to(tl.uint32)[None, :]  # [BLOCK_M, BLOCK_G]
    c1 = zero + o_row.to(tl.uint32)[:, None]  # [BLOCK_M, BLOCK_G]
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, zero, zero)
    # join adds a last axis, so w[a, b] below is word 2a + b, and with the halves the lane is 4a + 2b + h.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).to(tl.int32, bitcast=True)
    lanes = tl.join((words << 16) >> 16, words >> 16)  # sign-extended low and high halves
    return tl.reshape(lanes >= threshold - 32768, [o_row.shape[0], 8 * o_group.shape[0]])


@triton.jit
def drop(block, seed, threshold, first_row, first_col):
    """`block` [BLOCK_M, BLOCK_N] with every dropped element 0; its top left corner is (first_row, first_col)."""
    o_row = first_row + tl.arange(0, block.shape[0])
    o_group = first_col // 8 + tl.arange(0, block.shape[1] // 8)
    return tl.where(keep_block(seed, threshold, o_row, o_group), block, 0.0)


@triton.jit
def tile_of(pid, num_m, num_n, GROUP_M: tl.constexpr):
    """(m, n) of the tile number `pid`: bands of GROUP_M tile rows, column by column, so that both operands stay in L2."""
    width = GROUP_M * num_n
    first_m = (pid // width) * GROUP_M
    rows = min(num_m - first_m, GROUP_M)
    return first_m + (pid % width) % rows, (pid % width) // rows


@triton.jit
def halves(block):
    """The left and the right half of `block` [BLOCK_M, BLOCK_N], each [BLOCK_M, BLOCK_N / 2]."""
    pairs = tl.reshape(block, [block.shape[0], 2, block.shape[1] // 2])
    return tl.split(tl.permute(pairs, [0, 2, 1]))
