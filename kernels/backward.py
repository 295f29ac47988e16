"""The two small kernels of the backward pass; its main GEMM is `gemm.rank_gemm`.

    dy_pass   dS = dy B   and   dB = scale · dyᵀ S        one pass over dy
    x_pass    dA = scale · dSᵀ (keep ∘ x)                 one pass over x, which recomputes the dropout mask
                                                         and writes it as bits for the product of dx

`scale` includes every factor, S and dS none (see `forward`). Sums over many rows are split into float32 partial sums, which
`sum_partials` adds in a fixed order.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from fastlora.kernels.config import PassConfig, chunks
from fastlora.kernels.dropout import NO_MASK, Mask, drop_bits, keep_bits
from fastlora.kernels.reduce import sum_partials
from fastlora.kernels.tiles import overlaps


@triton.jit(do_not_specialize=["M"])
def _dy_kernel(
    dy_ptr, b_ptr, s_ptr, ds_ptr, db_ptr, M, N, m_chunk, scale, stride_dm, stride_dn, stride_bn, stride_br,
    R: tl.constexpr, NEEDS_DS: tl.constexpr, NEEDS_DB: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Program (n, split): BLOCK_N columns and one chunk of the rows of dy; B and the sum of dB stay in registers.

    ds_ptr: (tiles of N, M, R), each over BLOCK_N columns. db_ptr: (splits, N, R), each over a chunk of rows.
    """
    DTYPE: tl.constexpr = dy_ptr.dtype.element_ty
    tile, split = tl.program_id(0), tl.program_id(1)
    o_n = (tile * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    o_r = tl.arange(0, BLOCK_R)
    m_n, m_r = o_n < N, o_r < R
    m_nr = m_n[:, None] & m_r[None, :]
    b = tl.load(
        b_ptr + o_n[:, None] * stride_bn + o_r[None, :] * stride_br, mask=m_nr, other=0.0
    ).to(DTYPE)
    db = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    first_m = split * m_chunk
    ds_ptr += tile.to(tl.int64) * M * R
    for m in range(first_m, min(first_m + m_chunk, M), BLOCK_M):
        o_m = (m + tl.arange(0, BLOCK_M)).to(tl.int64)
        o_row = o_m[:, None] * R + o_r[None, :]
        m_m = o_m < M
        m_row = m_m[:, None] & m_r[None, :]
        m_dy = m_m[:, None] if EVEN_N else m_m[:, None] & m_n[None, :]
        p_dy = dy_ptr + o_m[:, None] * stride_dm + o_n[None, :] * stride_dn
        dy = tl.load(p_dy, mask=m_dy, other=0.0)  # [BLOCK_M, BLOCK_N]
        if NEEDS_DS:
            ds = tl.dot(dy, b, input_precision=PRECISION)  # [BLOCK_M, BLOCK_R]
            tl.store(ds_ptr + o_row, ds.to(ds_ptr.dtype.element_ty), mask=m_row)
        if NEEDS_DB:
            s = tl.load(s_ptr + o_row, mask=m_row, other=0.0)  # [BLOCK_M, BLOCK_R]
            db += tl.dot(tl.trans(dy), s, input_precision=PRECISION)  # [BLOCK_N, BLOCK_R]
    if NEEDS_DB:
        p_db = db_ptr + split.to(tl.int64) * N * R + o_n[:, None] * R + o_r[None, :]
        tl.store(p_db, (db * scale).to(db_ptr.dtype.element_ty), mask=m_nr)


def dy_pass(
    dy: torch.Tensor,
    lora_b: torch.Tensor,
    s: torch.Tensor,
    config: PassConfig,
    *,
    scale: float,
    needs_ds: bool = True,
    needs_db: bool = True,
    precision: str = "ieee",
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """dS = dy B (M, R) in dy's dtype, and dB = scale · dyᵀ S (N, R) in lora_b's; None for what is not needed.

    dy: (M, N), any strides. lora_b: (N, R), any strides, any float dtype, cast to dy's. s: (M, R), contiguous, dy's dtype.
    config.splits divides M.

    Raises: ValueError for more ranks than the tiles support.
    """
    (m, n), r = dy.shape, s.shape[1]
    if r > config.block_r:
        raise ValueError(f"s: expected at most {config.block_r} ranks, got {r}")
    chunk, splits = chunks(m, config.splits, config.block_m)
    tiles = triton.cdiv(n, config.block_n)
    ds_dtype = dy.dtype if tiles == 1 else torch.float32
    db_dtype = lora_b.dtype if splits == 1 else torch.float32
    ds = torch.empty(tiles, m, r, dtype=ds_dtype, device=dy.device) if needs_ds else None
    db = torch.empty(splits, n, r, dtype=db_dtype, device=dy.device) if needs_db else None
    _dy_kernel[(tiles, splits)](
        dy_ptr=dy,
        b_ptr=lora_b,
        s_ptr=s,
        ds_ptr=s if ds is None else ds,
        db_ptr=s if db is None else db,
        M=m,
        N=n,
        m_chunk=chunk,
        scale=scale,
        stride_dm=dy.stride(0),
        stride_dn=dy.stride(1),
        stride_bn=lora_b.stride(0),
        stride_br=lora_b.stride(1),
        R=r,
        NEEDS_DS=needs_ds,
        NEEDS_DB=needs_db,
        EVEN_N=n % config.block_n == 0,
        PRECISION=precision,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_R=config.block_r,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return (
        None if ds is None else sum_partials(ds, dy.dtype),
        None if db is None else sum_partials(db, lora_b.dtype),
    )


@triton.jit(do_not_specialize=["M", "threshold"])
def _x_kernel(
    x_ptr, ds_ptr, da_ptr, seed_ptr, packed_ptr, M, K, m_chunk, scale, threshold, stride_xm, stride_xk, stride_pm,
    R: tl.constexpr, DROPOUT: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program (k, split): BLOCK_K columns of dA from one chunk of the rows of x. da_ptr: (splits, R, K)."""
    if OVERLAP:
        gdc_launch_dependents()
    first_k, split = tl.program_id(0) * BLOCK_K, tl.program_id(1)
    o_k = (first_k + tl.arange(0, BLOCK_K)).to(tl.int64)
    o_byte = first_k // 8 + tl.arange(0, BLOCK_K // 8)
    o_r = tl.arange(0, BLOCK_R)
    m_k, m_r = o_k < K, o_r < R
    da = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    first_m = split * m_chunk
    for m in range(first_m, min(first_m + m_chunk, M), BLOCK_M):
        o_m = (m + tl.arange(0, BLOCK_M)).to(tl.int64)
        m_m = o_m < M
        p_x = x_ptr + o_m[:, None] * stride_xm + o_k[None, :] * stride_xk
        p_ds = ds_ptr + o_m[None, :] * R + o_r[:, None]
        m_x = m_m[:, None] if EVEN_K else m_m[:, None] & m_k[None, :]
        x = tl.load(p_x, mask=m_x, other=0.0)  # [BLOCK_M, BLOCK_K]
        ds_t = tl.load(p_ds, mask=m_r[:, None] & m_m[None, :], other=0.0)  # [BLOCK_R, BLOCK_M]
        if DROPOUT:
            bits = keep_bits(tl.load(seed_ptr), threshold, m + tl.arange(0, BLOCK_M), o_byte)
            x = drop_bits(x, bits)
            p_byte = packed_ptr + o_m[:, None] * stride_pm + o_byte[None, :]
            # Without a column mask, neighbouring bytes are stored together.
            m_byte = m_m[:, None] if EVEN_K else m_m[:, None] & (o_byte < tl.cdiv(K, 8))[None, :]
            tl.store(p_byte, bits.to(tl.uint8), mask=m_byte)
        da = tl.dot(ds_t, x, da, input_precision=PRECISION)
    p_da = da_ptr + split.to(tl.int64) * R * K + o_r.to(tl.int64)[:, None] * K + o_k[None, :]
    tl.store(p_da, (da * scale).to(da_ptr.dtype.element_ty), mask=m_r[:, None] & m_k[None, :])


def x_pass(
    x: torch.Tensor,
    ds: torch.Tensor,
    dtype: torch.dtype,
    config: PassConfig,
    *,
    scale: float = 1.0,
    mask: Mask = NO_MASK,
    precision: str = "ieee",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """dA = scale · dSᵀ (keep ∘ x), newly allocated (R, K), in `dtype`, and the mask as bits (M, ⌈K / 8⌉) uint8, None without dropout.

    x: (M, K), any strides. ds: (M, R), contiguous, x's dtype. config.splits divides M.
    mask, precision: as in `rank_gemm`.
    """
    (m, k), r = x.shape, ds.shape[1]
    chunk, splits = chunks(m, config.splits, config.block_m)
    da_dtype = dtype if splits == 1 else torch.float32
    da = torch.empty(splits, r, k, dtype=da_dtype, device=x.device)
    overlapping = overlaps(config)
    packed = None
    if mask.drops:
        # A pitch of a multiple of 16 bytes allows vectorised loads.
        pitch = triton.cdiv(k, 128) * 16
        packed = torch.empty(m, pitch, dtype=torch.uint8, device=x.device)[:, : triton.cdiv(k, 8)]
    _x_kernel[(triton.cdiv(k, config.block_k), splits)](
        x_ptr=x,
        ds_ptr=ds,
        da_ptr=da,
        seed_ptr=x if mask.seed is None else mask.seed,
        packed_ptr=x if packed is None else packed,
        M=m,
        K=k,
        R=r,
        m_chunk=chunk,
        scale=scale,
        stride_pm=0 if packed is None else packed.stride(0),
        threshold=mask.threshold,
        stride_xm=x.stride(0),
        stride_xk=x.stride(1),
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
    return sum_partials(da, dtype, overlap=overlapping), packed
