"""The rank-R term beside a base product of another library: added to it in place, or written for the product to be added to.

rank_update_   out += scale · keep ∘ (low upᵀ)
rank_product   out = bias + scale · keep ∘ (low upᵀ)
"""

import torch
import triton
import triton.language as tl

from fastlora.kernels.config import GemmConfig, ceil_div
from fastlora.kernels.launch import launch
from fastlora.kernels.rank_term import bias_tile, bits_tile, low_tile, rank_term, up_tile
from fastlora.kernels.recording import empty


@triton.jit(do_not_specialize=["M"])
def _update_kernel(
    out_ptr, bias_ptr, low_ptr, up_ptr, bits_ptr, M, N, scale, stride_un, stride_ur, stride_bits,
    R: tl.constexpr, ADD: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One tile of the rank-R term and the bias. ADD: added to out in place; otherwise out is only written."""
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    first_m, first_n = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    o_m = (first_m + tl.arange(0, BLOCK_M)).to(tl.int64)
    o_n = first_n + tl.arange(0, BLOCK_N)
    p_out = out_ptr + o_m[:, None] * N + o_n[None, :]
    mask = (o_m < M)[:, None] & (o_n < N)[None, :]
    if ADD:
        acc = tl.load(p_out, mask=mask, other=0.0).to(tl.float32)
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    low = low_tile(low_ptr, M, first_m, 0, R, BLOCK_M, BLOCK_R)
    up = up_tile(up_ptr, N, stride_un, stride_ur, first_n, 0, R, DTYPE, BLOCK_R, BLOCK_N)
    bits = low
    if DROPOUT:
        bits = bits_tile(bits_ptr, M, N, stride_bits, first_m, first_n, BLOCK_M, BLOCK_N)
    acc = rank_term(
        acc, low, up, bits, low_ptr, up_ptr, M, N, scale, stride_un, stride_ur, first_m, first_n,
        R, DTYPE, DROPOUT, PRECISION, BLOCK_R,
    )  # fmt: skip
    if HAS_BIAS:
        acc += bias_tile(bias_ptr, N, first_n, BLOCK_N)
    tl.store(p_out, acc.to(DTYPE), mask=mask)


def rank_update_(
    out: torch.Tensor,
    low: torch.Tensor,
    up: torch.Tensor,
    config: GemmConfig,
    *,
    scale: float = 1.0,
    bits: torch.Tensor | None = None,
    precision: str = "ieee",
) -> torch.Tensor:
    """out += scale · keep ∘ (low upᵀ), in place, after a base product of another library.

    out: (M, N), contiguous; changed. low: (M, R), contiguous, out's dtype. up: (N, R), any strides, any float dtype.
    config: block_m, block_n, block_r, num_warps and num_stages. bits, precision: as in `rank_gemm`.
    """
    return _launch_update(out, None, low, up, config, scale, bits, precision, add=True)


def rank_product(
    low: torch.Tensor,
    up: torch.Tensor,
    bias: torch.Tensor | None,
    config: GemmConfig,
    *,
    scale: float = 1.0,
    bits: torch.Tensor | None = None,
    precision: str = "ieee",
) -> torch.Tensor:
    """out = bias + scale · keep ∘ (low upᵀ), newly allocated (M, N), for another library to add its base product to.

    low: (M, R), contiguous. up: (N, R), any strides, any float dtype. bias: (N,), contiguous, or None. config, bits, precision: as in
    `rank_update_`.
    """
    out = empty(low.shape[0], up.shape[0], dtype=low.dtype, device=low.device)
    return _launch_update(out, bias, low, up, config, scale, bits, precision, add=False)


def _launch_update(
    out: torch.Tensor,
    bias: torch.Tensor | None,
    low: torch.Tensor,
    up: torch.Tensor,
    config: GemmConfig,
    scale: float,
    bits: torch.Tensor | None,
    precision: str,
    *,
    add: bool,
) -> torch.Tensor:
    (m, n), r = out.shape, low.shape[1]
    launch(
        _update_kernel,
        (ceil_div(m, config.block_m), ceil_div(n, config.block_n)),
        out_ptr=out,
        bias_ptr=out if bias is None else bias,
        low_ptr=low,
        up_ptr=up,
        bits_ptr=out if bits is None else bits,
        M=m,
        N=n,
        R=r,
        scale=scale,
        stride_un=up.stride(0),
        stride_ur=up.stride(1),
        stride_bits=0 if bits is None else bits.stride(0),
        ADD=add,
        HAS_BIAS=bias is not None,
        DROPOUT=bits is not None,
        PRECISION=precision,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_R=config.block_r,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out
