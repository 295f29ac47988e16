"""The sum of partial results in a fixed order, so that two runs agree bit for bit, unlike with atomics."""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

_SPLITS, _BLOCK = 32, 128


@triton.jit(do_not_specialize=["splits"])
def _sum_kernel(
    part_ptr, out_ptr, size, splits, SPLITS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """BLOCK elements of the sum per program: SPLITS partial sums at a time are loaded and added in a fixed tree."""
    if OVERLAP:
        gdc_launch_dependents()
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    o_split = tl.arange(0, SPLITS).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, splits, SPLITS):
        m_part = (first + o_split < splits)[:, None] & (o < size)[None, :]
        p_part = part_ptr + (first + o_split)[:, None] * size + o[None, :]
        total += tl.sum(tl.load(p_part, mask=m_part, other=0.0), axis=0)
    tl.store(out_ptr + o, total.to(out_ptr.dtype.element_ty), mask=o < size)


def sum_partials(part: torch.Tensor, dtype: torch.dtype, *, overlap: bool = False) -> torch.Tensor:
    """part.sum(0) in `dtype`, newly allocated; part: (splits, ...), float32, contiguous. One split is only converted.

    overlap: let the next kernel begin before this one has ended.
    """
    if part.shape[0] == 1:
        return part[0].to(dtype)
    out = torch.empty(part.shape[1:], dtype=dtype, device=part.device)
    _sum_kernel[(triton.cdiv(out.numel(), _BLOCK),)](
        part_ptr=part,
        out_ptr=out,
        size=out.numel(),
        splits=part.shape[0],
        SPLITS=_SPLITS,
        BLOCK=_BLOCK,
        OVERLAP=overlap,
        num_warps=4,
    )
    return out
