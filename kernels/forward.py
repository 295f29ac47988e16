"""The small kernels of the forward pass.

    down_project   S = (keep ∘ x) Aᵀ                      one pass over x, which applies dropout
    start          S, and y₀ = bias + scale · S Bᵀ        the same pass, for a library that adds x Wᵀ to y₀
    decode         y = x Wᵀ + bias + scale · S Bᵀ, and S  for few rows: W is read once, split along K, in two launches

`scale` includes every factor of the low-rank path (alpha / rank, and 1 / (1 − p') of the dropout). S and dS are stored without
it, so that a large factor cannot overflow float16; it multiplies the products made from them, in float32.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fastlora.kernels.config import PassConfig, ceil_div, chunks
from fastlora.kernels.dropout import NO_MASK, Mask, drop
from fastlora.kernels.launch import launch
from fastlora.kernels.recording import empty
from fastlora.kernels.reduce import sum_partials
from fastlora.kernels.tiles import overlaps


@triton.jit
def times_rows(
    x_ptr, rows_ptr, seed_ptr, M, N, first_k, last_k, threshold, stride_xm, stride_xk, stride_n, stride_k, first_m, first_n,
    DROPOUT: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(keep ∘ x) rowsᵀ over the columns first_k … last_k: float32 [BLOCK_M, BLOCK_N]. rows: (N, K)."""
    o_m = (first_m + tl.arange(0, BLOCK_M)).to(tl.int64)
    o_n = (first_n + tl.arange(0, BLOCK_N)).to(tl.int64)
    o_k = (first_k + tl.arange(0, BLOCK_K)).to(tl.int64)
    p_x = x_ptr + tl.where(o_m < M, o_m, 0)[:, None] * stride_xm + o_k[None, :] * stride_xk
    p_rows = rows_ptr + tl.where(o_n < N, o_n, 0)[None, :] * stride_n + o_k[:, None] * stride_k
    step = tl.full([], BLOCK_K, tl.int64)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(first_k, last_k, BLOCK_K):
        if EVEN_K:
            x = tl.load(p_x)  # [BLOCK_M, BLOCK_K]
            rows = tl.load(p_rows)  # [BLOCK_K, BLOCK_N]
        else:
            m_k = k + tl.arange(0, BLOCK_K) < last_k
            x = tl.load(p_x, mask=m_k[None, :], other=0.0)
            rows = tl.load(p_rows, mask=m_k[:, None], other=0.0)
        if DROPOUT:
            x = drop(x, tl.load(seed_ptr), threshold, first_m, k)
        if x.dtype == tl.float32:
            # A sum for each block: one chain of K additions loses more than cuBLAS does. The compiler makes it a chain again unless
            # the factor may be another one.
            one = (last_k > first_k).to(tl.float32)
            acc += tl.dot(x, rows.to(x.dtype), input_precision=PRECISION) * one
        else:
            acc = tl.dot(x, rows.to(x.dtype), acc, input_precision=PRECISION)
        p_x += step * stride_xk
        p_rows += step * stride_k
    return acc


@triton.jit
def store_rows(out_ptr, block, M, N, first_m, first_n):
    """Store `block` at (first_m, first_n) of a row-major (M, N)."""
    o_m = (first_m + tl.arange(0, block.shape[0])).to(tl.int64)
    o_n = first_n + tl.arange(0, block.shape[1])
    mask = (o_m < M)[:, None] & (o_n < N)[None, :]
    tl.store(
        out_ptr + o_m[:, None] * N + o_n[None, :], block.to(out_ptr.dtype.element_ty), mask=mask
    )


@triton.jit(do_not_specialize=["M", "threshold"])
def _down_kernel(
    x_ptr, a_ptr, s_ptr, seed_ptr, M, K, k_chunk, threshold, stride_xm, stride_xk, stride_ar, stride_ak,
    R: tl.constexpr, DROPOUT: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program (m, split): rows of S from one chunk of K. s_ptr: (splits, M, R)."""
    if OVERLAP:
        gdc_launch_dependents()
    first_m, split = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    first_k = split * k_chunk
    last_k = min(first_k + k_chunk, K)
    s = times_rows(
        x_ptr, a_ptr, seed_ptr, M, R, first_k, last_k, threshold, stride_xm, stride_xk, stride_ar, stride_ak, first_m, 0,
        DROPOUT, EVEN_K, PRECISION, BLOCK_M, BLOCK_R, BLOCK_K,
    )  # fmt: skip
    store_rows(s_ptr + split.to(tl.int64) * M * R, s, M, R, first_m, 0)


def down_project(
    x: torch.Tensor,
    lora_a: torch.Tensor,
    config: PassConfig,
    *,
    mask: Mask = NO_MASK,
    precision: str = "ieee",
) -> torch.Tensor:
    """S = (keep ∘ x) Aᵀ, newly allocated (M, R), in x's dtype.

    x: (M, K), any strides. lora_a: (R, K), any strides, any float dtype, cast to x's. config.splits divides K.
    mask: which elements of x to keep. precision: of float32 products, "ieee" or "tf32".
    """
    (m, k), r = x.shape, lora_a.shape[0]
    chunk, splits = chunks(k, config.splits, config.block_k)
    s = empty(splits, m, r, dtype=x.dtype if splits == 1 else torch.float32, device=x.device)
    overlapping = overlaps(config)
    launch(
        _down_kernel,
        (ceil_div(m, config.block_m), splits),
        x_ptr=x,
        a_ptr=lora_a,
        s_ptr=s,
        seed_ptr=x if mask.seed is None else mask.seed,
        M=m,
        K=k,
        R=r,
        k_chunk=chunk,
        threshold=mask.threshold,
        stride_xm=x.stride(0),
        stride_xk=x.stride(1),
        stride_ar=lora_a.stride(0),
        stride_ak=lora_a.stride(1),
        DROPOUT=mask.drops,
        EVEN_K=k % config.block_k == 0,
        PRECISION=precision,
        BLOCK_M=config.block_m,
        BLOCK_K=config.block_k,
        BLOCK_R=config.block_r,
        OVERLAP=overlapping,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return s[0] if splits == 1 else sum_partials(s, x.dtype, overlap=overlapping)


@triton.jit(do_not_specialize=["M", "threshold"])
def _start_kernel(
    x_ptr, a_ptr, b_ptr, bias_ptr, s_ptr, y_ptr, seed_ptr, M, N, K, scale, threshold,
    stride_xm, stride_xk, stride_ar, stride_ak, stride_bn, stride_br,
    R: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of S and y₀ per program: x is read along K, then y₀ is written along N."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    first_m = tl.program_id(0) * BLOCK_M
    o_r = tl.arange(0, BLOCK_R)
    s = times_rows(
        x_ptr, a_ptr, seed_ptr, M, R, 0, K, threshold, stride_xm, stride_xk, stride_ar, stride_ak, first_m, 0,
        DROPOUT, EVEN_K, PRECISION, BLOCK_M, BLOCK_R, BLOCK_K,
    )  # fmt: skip
    # The columns from R on repeat the first, and may be infinite.
    low = tl.where((o_r < R)[None, :], s, 0.0).to(DTYPE)
    store_rows(s_ptr, low, M, R, first_m, 0)
    for first_n in range(0, N, BLOCK_N):
        o_n = (first_n + tl.arange(0, BLOCK_N)).to(tl.int64)
        m_b = (o_r < R)[:, None] & (o_n < N)[None, :]
        p_b = b_ptr + o_n[None, :] * stride_bn + o_r[:, None] * stride_br
        b = tl.load(p_b, mask=m_b, other=0.0).to(DTYPE)  # [BLOCK_R, BLOCK_N]
        y = tl.dot(low, b, input_precision=PRECISION) * scale
        if HAS_BIAS:
            y += tl.load(bias_ptr + o_n, mask=o_n < N, other=0.0).to(tl.float32)[None, :]
        store_rows(y_ptr, y, M, N, first_m, first_n)


def start(
    x: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    bias: torch.Tensor | None,
    config: PassConfig,
    *,
    scale: float = 1.0,
    mask: Mask = NO_MASK,
    precision: str = "ieee",
) -> tuple[torch.Tensor, torch.Tensor]:
    """y₀ = bias + scale · S Bᵀ (M, N) and S = (keep ∘ x) Aᵀ (M, R), newly allocated, in x's dtype.

    x: (M, K). lora_a: (R, K), lora_b: (N, R), R ≤ config.block_r: any strides; the adapters in any float dtype. bias: (N,), contiguous,
    or None. mask, precision: as in `down_project`.

    Raises: ValueError for more ranks than the tiles support.
    """
    (m, k), n, r = x.shape, lora_b.shape[0], lora_a.shape[0]
    if r > config.block_r:
        raise ValueError(f"lora_a: expected at most {config.block_r} ranks, got {r}")
    y, s = empty(m, n, dtype=x.dtype, device=x.device), empty(m, r, dtype=x.dtype, device=x.device)
    launch(
        _start_kernel,
        (ceil_div(m, config.block_m),),
        x_ptr=x,
        a_ptr=lora_a,
        b_ptr=lora_b,
        bias_ptr=x if bias is None else bias,
        s_ptr=s,
        y_ptr=y,
        seed_ptr=x if mask.seed is None else mask.seed,
        M=m,
        N=n,
        K=k,
        R=r,
        scale=scale,
        threshold=mask.threshold,
        stride_xm=x.stride(0),
        stride_xk=x.stride(1),
        stride_ar=lora_a.stride(0),
        stride_ak=lora_a.stride(1),
        stride_bn=lora_b.stride(0),
        stride_br=lora_b.stride(1),
        HAS_BIAS=bias is not None,
        DROPOUT=mask.drops,
        EVEN_K=k % config.block_k == 0,
        PRECISION=precision,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        BLOCK_R=config.block_r,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return y, s


@triton.jit(do_not_specialize=["M", "threshold"])
def _stream_kernel(
    x_ptr, w_ptr, a_ptr, base_ptr, s_ptr, seed_ptr, M, N, K, k_chunk, threshold,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_ar, stride_ak,
    R: tl.constexpr, DROPOUT: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program (tile, split): one chunk of K of x Wᵀ, or, for the tiles after those of W, of (keep ∘ x) Aᵀ.

    base_ptr: (splits, M, N) and s_ptr: (splits, M, R), float32.
    """
    if OVERLAP:
        gdc_launch_dependents()
    tile, split = tl.program_id(0), tl.program_id(1)
    first_k = split * k_chunk
    last_k = min(first_k + k_chunk, K)
    w_tiles = tl.cdiv(N, BLOCK_N)
    if tile < w_tiles:
        base = times_rows(
            x_ptr, w_ptr, seed_ptr, M, N, first_k, last_k, threshold, stride_xm, stride_xk, stride_wn, stride_wk,
            0, tile * BLOCK_N, False, EVEN_K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        store_rows(base_ptr + split.to(tl.int64) * M * N, base, M, N, 0, tile * BLOCK_N)
    else:
        first_r = (tile - w_tiles) * BLOCK_N
        s = times_rows(
            x_ptr, a_ptr, seed_ptr, M, R, first_k, last_k, threshold, stride_xm, stride_xk, stride_ar, stride_ak,
            0, first_r, DROPOUT, EVEN_K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        store_rows(s_ptr + split.to(tl.int64) * M * R, s, M, R, 0, first_r)


@triton.jit(do_not_specialize=["M", "splits"])
def _combine_kernel(
    base_ptr, s_part_ptr, bias_ptr, b_ptr, y_ptr, s_ptr, M, N, splits, scale, stride_bn, stride_br,
    R: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Sum the partial results of a tile of columns, then add the rank-R term and the bias."""
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    first_n = tl.program_id(0) * BLOCK_N
    o_m = tl.arange(0, BLOCK_M)
    o_n = (first_n + tl.arange(0, BLOCK_N)).to(tl.int64)
    o_r = tl.arange(0, BLOCK_R)
    m_y = (o_m < M)[:, None] & (o_n < N)[None, :]
    m_s = (o_m < M)[:, None] & (o_r < R)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    s = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    if OVERLAP:
        gdc_wait()
    for _ in range(splits):
        acc += tl.load(base_ptr + o_m[:, None] * N + o_n[None, :], mask=m_y, other=0.0)
        s += tl.load(s_part_ptr + o_m[:, None] * R + o_r[None, :], mask=m_s, other=0.0)
        base_ptr += M * N
        s_part_ptr += M * R
    low = s.to(DTYPE)
    if tl.program_id(0) == 0:
        store_rows(s_ptr, low, M, R, 0, 0)
    m_b = (o_r < R)[:, None] & (o_n < N)[None, :]
    p_b = b_ptr + o_n[None, :] * stride_bn + o_r[:, None] * stride_br
    b = tl.load(p_b, mask=m_b, other=0.0).to(DTYPE)  # [BLOCK_R, BLOCK_N]
    acc += tl.dot(low, b, input_precision=PRECISION) * scale
    if HAS_BIAS:
        acc += tl.load(bias_ptr + o_n, mask=o_n < N, other=0.0).to(tl.float32)[None, :]
    store_rows(y_ptr, acc, M, N, 0, first_n)


def decode(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    config: PassConfig,
    *,
    scale: float = 1.0,
    mask: Mask = NO_MASK,
    precision: str = "ieee",
) -> tuple[torch.Tensor, torch.Tensor]:
    """y = x Wᵀ + bias + scale · S Bᵀ (M, N) and S = (keep ∘ x) Aᵀ (M, R), in x's dtype, in two launches.

    x: (M, K) with M ≤ config.block_m. weight: (N, K). lora_a: (R, K), lora_b: (N, R), R ≤ config.block_r: any strides; the
    adapters in any float dtype. config.splits divides K. mask: which elements of x to keep. precision: of float32 products, "ieee" or "tf32".

    Raises: ValueError for more rows or ranks than the tiles support.
    """
    (m, k), n, r = x.shape, weight.shape[0], lora_a.shape[0]
    if m > config.block_m or r > config.block_r:
        most = (config.block_m, config.block_r)
        raise ValueError(f"x, lora_a: expected at most {most} rows and ranks, got {(m, r)}")
    chunk, splits = chunks(k, config.splits, config.block_k)
    base_part = empty(splits, m, n, dtype=torch.float32, device=x.device)
    s_part = empty(splits, m, r, dtype=torch.float32, device=x.device)
    y, s = empty(m, n, dtype=x.dtype, device=x.device), empty(m, r, dtype=x.dtype, device=x.device)
    overlapping = overlaps(config)
    tiles = ceil_div(n, config.block_n) + ceil_div(r, config.block_n)
    launch(
        _stream_kernel,
        (tiles, splits),
        x_ptr=x,
        w_ptr=weight,
        a_ptr=lora_a,
        base_ptr=base_part,
        s_ptr=s_part,
        seed_ptr=x if mask.seed is None else mask.seed,
        M=m,
        N=n,
        K=k,
        R=r,
        k_chunk=chunk,
        threshold=mask.threshold,
        stride_xm=x.stride(0),
        stride_xk=x.stride(1),
        stride_wn=weight.stride(0),
        stride_wk=weight.stride(1),
        stride_ar=lora_a.stride(0),
        stride_ak=lora_a.stride(1),
        DROPOUT=mask.drops,
        EVEN_K=k % config.block_k == 0,
        PRECISION=precision,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        OVERLAP=overlapping,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    launch(
        _combine_kernel,
        (ceil_div(n, config.block_n),),
        base_ptr=base_part,
        s_part_ptr=s_part,
        bias_ptr=x if bias is None else bias,
        b_ptr=lora_b,
        y_ptr=y,
        s_ptr=s,
        M=m,
        N=n,
        R=r,
        splits=splits,
        scale=scale,
        stride_bn=lora_b.stride(0),
        stride_br=lora_b.stride(1),
        HAS_BIAS=bias is not None,
        PRECISION=precision,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_R=config.block_r,
        OVERLAP=overlapping,
        num_warps=config.num_warps,
        launch_pdl=overlapping,
    )
    return y, s
