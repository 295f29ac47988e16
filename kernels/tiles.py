"""Helpers of several kernels: the order of tiles, splitting an accumulator into halves, launch options."""

import triton
import triton.language as tl
from triton import knobs

from fastlora.kernels.config import GemmConfig, PassConfig


@triton.jit
def tile_of(pid, num_m, num_n, GROUP_M: tl.constexpr):
    """(m, n) of the tile number `pid`: bands of GROUP_M tile rows, each column by column, so that both operands stay in L2."""
    width = GROUP_M * num_n
    first_m = (pid // width) * GROUP_M
    rows = min(num_m - first_m, GROUP_M)
    return first_m + (pid % width) % rows, (pid % width) // rows


@triton.jit
def halves(block):
    """The left and the right half of `block` [BLOCK_M, BLOCK_N], each [BLOCK_M, BLOCK_N / 2]."""
    pairs = tl.reshape(block, [block.shape[0], 2, block.shape[1] // 2])
    return tl.split(tl.permute(pairs, [0, 2, 1]))


def overlaps(config: GemmConfig | PassConfig) -> bool:
    """Whether a kernel with this configuration overlaps; Triton's interpreter does not support it."""
    return config.overlap and not knobs.runtime.interpret
