"""The sum of split partial results, in a fixed order, so that two runs give the same bits (atomics would not)."""

import torch
import triton
import triton.language as tl

_BLOCK = 1024


@triton.jit(do_not_specialize=["splits"])
def _sum_kernel(part_ptr, out_ptr, size, splits, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < size
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(splits):
        total += tl.load(part_ptr + o, mask=m, other=0.0)
        part_ptr += size
    tl.store(out_ptr + o, total.to(out_ptr.dtype.element_ty), mask=m)


def sum_partials(part: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """part.sum(0) in `dtype`; part: (splits, ...), float32, contiguous. One split is only converted."""
    if part.shape[0] == 1:
        return part[0].to(dtype)
    out = torch.empty(part.shape[1:], dtype=dtype, device=part.device)
    grid = (triton.cdiv(out.numel(), _BLOCK),)
    _sum_kernel[grid](
        part_ptr=part,
        out_ptr=out,
        size=out.numel(),
        splits=part.shape[0],
        BLOCK=_BLOCK,
        num_warps=4,
    )
    return out
