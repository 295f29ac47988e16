"""The sum of partial results in a fixed order, so that two runs agree bit for bit, unlike with atomics."""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from fastlora.kernels.config import ceil_div, next_power_of_2
from fastlora.kernels.launch import launch
from fastlora.kernels.recording import empty

_SPLITS, _ELEMENTS = 32, 4096  # of a tile


@triton.jit
def _sum_block(part_ptr, out_ptr, block, size, splits, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK elements of the sum: SPLITS partial sums at a time are loaded and added in a fixed tree."""
    o = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    o_split = tl.arange(0, SPLITS).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, splits, SPLITS):
        m_part = (first + o_split < splits)[:, None] & (o < size)[None, :]
        p_part = part_ptr + (first + o_split)[:, None] * size + o[None, :]
        total += tl.sum(tl.load(p_part, mask=m_part, other=0.0), axis=0)
    tl.store(out_ptr + o, total.to(out_ptr.dtype.element_ty), mask=o < size)


@triton.jit(do_not_specialize=["splits_1", "splits_2"])
def _sum_kernel(
    part_1, out_1, size_1, splits_1, part_2, out_2, size_2, splits_2,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One block of the first sum, or, for the programs after those, of the second."""
    if OVERLAP:
        gdc_launch_dependents()
    block, blocks_1 = tl.program_id(0), tl.cdiv(size_1, BLOCK)
    if block < blocks_1:
        _sum_block(part_1, out_1, block, size_1, splits_1, SPLITS, BLOCK)
    else:
        _sum_block(part_2, out_2, block - blocks_1, size_2, splits_2, SPLITS, BLOCK)


def sum_partials(part: torch.Tensor, dtype: torch.dtype, *, overlap: bool = False) -> torch.Tensor:
    """part.sum(0) in `dtype`; part: (splits, ...), contiguous, float32, or with one split in any dtype, which is only converted.

    overlap: let the next kernel begin before this one has ended.
    """
    if part.shape[0] == 1:
        return part[0].to(dtype)
    out = empty(*part.shape[1:], dtype=dtype, device=part.device)
    _launch(part, out, None, None, overlap)
    return out


def sum_both(
    one: torch.Tensor, other: torch.Tensor, dtypes: tuple[torch.dtype, torch.dtype]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sum_partials` of two tensors, in one launch if both need one."""
    if one.shape[0] == 1 or other.shape[0] == 1:
        return sum_partials(one, dtypes[0]), sum_partials(other, dtypes[1])
    first, second = (
        empty(*part.shape[1:], dtype=dtype, device=part.device)
        for part, dtype in zip((one, other), dtypes, strict=True)
    )
    _launch(one, first, other, second, False)
    return first, second


def _launch(
    one: torch.Tensor,
    first: torch.Tensor,
    other: torch.Tensor | None,
    second: torch.Tensor | None,
    overlap: bool,
) -> None:
    splits = one.shape[0], 1 if other is None else other.shape[0]
    sizes = first.numel(), 0 if second is None else second.numel()
    # As many partial sums beside each other as there are, at most 32, and as many elements as fill the tile.
    beside = min(_SPLITS, next_power_of_2(max(splits)))
    block = _ELEMENTS // beside
    launch(
        _sum_kernel,
        (ceil_div(sizes[0], block) + ceil_div(sizes[1], block),),
        part_1=one,
        out_1=first,
        size_1=sizes[0],
        splits_1=splits[0],
        part_2=one if other is None else other,
        out_2=first if second is None else second,
        size_2=sizes[1],
        splits_2=splits[1],
        SPLITS=beside,
        BLOCK=block,
        OVERLAP=overlap,
        num_warps=4,
    )
