"""The small kernels of the backward pass; its main GEMM is `gemm.rank_gemm`.

    dy_pass    dS = dy B   and   dB = scale · dyᵀ S       one pass over dy, which also computes the dropout mask, in bits
    mask_pass  the mask alone                             where no pass over dy runs, or x has many more columns than dy
    x_pass     dA = scale · dSᵀ (keep ∘ x)                one pass over x; on request also dx₀ = scale · keep ∘ (dS A),
                                                          for a library that adds dy W to it

`scale` includes every factor, S and dS none (see `forward`). The random numbers of the mask need no memory and the passes little
arithmetic, so the mask costs least beside the reading of dy. Sums over many rows are split into float32 partial sums, which
`sum_both` adds in a fixed order, those of dA and dB in one launch.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from fastlora.kernels.config import PassConfig, ceil_div, chunks, next_power_of_2
from fastlora.kernels.dropout import NO_MASK, Mask, drop_bits, empty_bits, store_bits
from fastlora.kernels.launch import launch
from fastlora.kernels.recording import empty
from fastlora.kernels.reduce import sum_partials
from fastlora.kernels.tiles import overlaps

_MASK_ROWS, _MASK_GROUPS = 64, 32  # a tile of `_mask_kernel`
# A program of `_dy_kernel` computes at most so many groups of the mask: more would spill, and a loop over them would keep dy's from being prefetched.
_MOST_GROUPS = 64


@triton.jit(do_not_specialize=["M", "threshold"])
def _dy_kernel(
    dy_ptr, b_ptr, s_ptr, ds_ptr, db_ptr, bits_ptr, seed_ptr, M, N, K, m_chunk, scale, threshold,
    stride_dm, stride_dn, stride_bn, stride_br, stride_bits,
    R: tl.constexpr, NEEDS_DS: tl.constexpr, NEEDS_DB: tl.constexpr, DROPOUT: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Program (n, split): BLOCK_N columns and one chunk of the rows of dy; B and the sum of dB stay in registers.

    ds_ptr: (tiles of N, M, R), each over BLOCK_N columns. db_ptr: (splits, N, R), each over a chunk of rows.
    DROPOUT: also write the mask of these rows of x, (M, K), for the n-th GROUPS groups of eight columns.
    """
    DTYPE: tl.constexpr = dy_ptr.dtype.element_ty
    tile, split = tl.program_id(0), tl.program_id(1)
    o_n = (tile * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    o_r = tl.arange(0, BLOCK_R)
    m_n, m_r = o_n < N, o_r < R
    m_rn = m_r[:, None] & m_n[None, :]
    b_t = tl.load(
        b_ptr + o_n[None, :] * stride_bn + o_r[:, None] * stride_br, mask=m_rn, other=0.0
    ).to(DTYPE)  # [BLOCK_R, BLOCK_N]
    # With the ranks as rows, both products use the instructions of a warp; those of a warp group need 64 rows and would be waited for.
    db_t = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    first_m = split * m_chunk
    ds_ptr += tile.to(tl.int64) * M * R
    for m in range(first_m, min(first_m + m_chunk, M), BLOCK_M):
        o_m = (m + tl.arange(0, BLOCK_M)).to(tl.int64)
        o_row = o_m[None, :] * R + o_r[:, None]
        m_m = o_m < M
        m_row = m_r[:, None] & m_m[None, :]
        m_dy = m_m[:, None] if EVEN_N else m_m[:, None] & m_n[None, :]
        p_dy = dy_ptr + o_m[:, None] * stride_dm + o_n[None, :] * stride_dn
        dy = tl.load(p_dy, mask=m_dy, other=0.0)  # [BLOCK_M, BLOCK_N]
        if NEEDS_DS:
            ds_t = tl.dot(b_t, tl.trans(dy), input_precision=PRECISION)  # [BLOCK_R, BLOCK_M]
            tl.store(ds_ptr + o_row, ds_t.to(ds_ptr.dtype.element_ty), mask=m_row)
        if NEEDS_DB:
            s_t = tl.load(s_ptr + o_row, mask=m_row, other=0.0)  # [BLOCK_R, BLOCK_M]
            db_t = tl.dot(s_t, dy, db_t, input_precision=PRECISION)
        if DROPOUT:
            store_bits(
                bits_ptr, stride_bits, tl.load(seed_ptr), threshold, M, K, m + tl.arange(0, BLOCK_M), tile * GROUPS,
                EVEN_K, GROUPS, BLOCK_G,
            )  # fmt: skip
    if NEEDS_DB:
        p_db = db_ptr + split.to(tl.int64) * N * R + o_n[None, :] * R + o_r[:, None]
        tl.store(p_db, (db_t * scale).to(db_ptr.dtype.element_ty), mask=m_rn)


def dy_pass(
    dy: torch.Tensor,
    lora_b: torch.Tensor,
    s: torch.Tensor,
    config: PassConfig,
    *,
    scale: float,
    needs_ds: bool = True,
    needs_db: bool = True,
    mask: Mask = NO_MASK,
    columns: int = 0,
    precision: str = "ieee",
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """dS = dy B (M, R) in dy's dtype, parts of dB = scale · dyᵀ S (splits, N, R), and the mask of x in bits; None for what is not needed.

    dy: (M, N), any strides. lora_b: (N, R), any strides, any float dtype, cast to dy's. s: (M, R), contiguous, dy's dtype.
    config.splits divides M; the parts are float32, a single one has lora_b's dtype. mask: that of x (M, columns). The bits: (M, ⌈columns / 8⌉) uint8, bit j of byte i for column 8 i + j.

    Raises: ValueError for more ranks than the tiles support.
    """
    (m, n), r = dy.shape, s.shape[1]
    if r > config.block_r:
        raise ValueError(f"s: expected at most {config.block_r} ranks, got {r}")
    chunk, splits = chunks(m, config.splits, config.block_m)
    tiles = ceil_div(n, config.block_n)
    ds_dtype = dy.dtype if tiles == 1 else torch.float32
    db_dtype = lora_b.dtype if splits == 1 else torch.float32
    ds = empty(tiles, m, r, dtype=ds_dtype, device=dy.device) if needs_ds else None
    db = empty(splits, n, r, dtype=db_dtype, device=dy.device) if needs_db else None
    groups, bits, mask = _mask_of_tiles(m, columns, tiles, mask, dy.device)
    launch(
        _dy_kernel,
        (tiles, splits),
        dy_ptr=dy,
        b_ptr=lora_b,
        s_ptr=s,
        ds_ptr=s if ds is None else ds,
        db_ptr=s if db is None else db,
        bits_ptr=s if bits is None else bits,
        seed_ptr=s if mask.seed is None else mask.seed,
        M=m,
        N=n,
        K=columns,
        m_chunk=chunk,
        scale=scale,
        threshold=mask.threshold,
        stride_dm=dy.stride(0),
        stride_dn=dy.stride(1),
        stride_bn=lora_b.stride(0),
        stride_br=lora_b.stride(1),
        stride_bits=0 if bits is None else bits.stride(0),
        R=r,
        NEEDS_DS=needs_ds,
        NEEDS_DB=needs_db,
        DROPOUT=mask.drops,
        EVEN_N=n % config.block_n == 0,
        EVEN_K=columns == 8 * groups * tiles,
        PRECISION=precision,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_R=config.block_r,
        GROUPS=groups if mask.drops else 0,
        BLOCK_G=min(groups, _MASK_GROUPS),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return None if ds is None else sum_partials(ds, dy.dtype), db, bits


def _mask_of_tiles(
    rows: int, columns: int, tiles: int, mask: Mask, device: torch.device
) -> tuple[int, torch.Tensor | None, Mask]:
    """How many groups of the mask's columns each tile of `_dy_kernel` writes, the bits, and the mask that it computes: none if `mask_pass` did."""
    # Every tile of columns of dy writes an equal share of the columns of the mask, at least the 16 bytes of one store.
    groups = max(16, next_power_of_2(ceil_div(ceil_div(columns, 8), tiles)))
    if mask.drops and groups > _MOST_GROUPS:
        return groups, mask_pass(rows, columns, mask), NO_MASK
    return groups, empty_bits(rows, columns, device) if mask.drops else None, mask


@triton.jit(do_not_specialize=["M", "threshold"])
def _mask_kernel(
    bits_ptr, seed_ptr, M, K, threshold, stride_bits, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_group = tl.program_id(1) * BLOCK_G
    store_bits(
        bits_ptr, stride_bits, tl.load(seed_ptr), threshold, M, K, o_m, first_group, EVEN_K, BLOCK_G, BLOCK_G
    )  # fmt: skip


def mask_pass(rows: int, columns: int, mask: Mask) -> torch.Tensor | None:
    """The mask of x (rows, columns) in bits, as `dy_pass` returns it; None without dropout."""
    if not mask.drops:
        return None
    assert mask.seed is not None
    bits = empty_bits(rows, columns, mask.seed.device)
    launch(
        _mask_kernel,
        (ceil_div(rows, _MASK_ROWS), ceil_div(columns, 8 * _MASK_GROUPS)),
        bits_ptr=bits,
        seed_ptr=mask.seed,
        M=rows,
        K=columns,
        threshold=mask.threshold,
        stride_bits=bits.stride(0),
        EVEN_K=columns % (8 * _MASK_GROUPS) == 0,
        BLOCK_M=_MASK_ROWS,
        BLOCK_G=_MASK_GROUPS,
        num_warps=4,
    )
    return bits


@triton.jit(do_not_specialize=["M"])
def _x_kernel(
    x_ptr, ds_ptr, a_ptr, da_ptr, dx_ptr, bits_ptr, M, K, m_chunk, scale, stride_xm, stride_xk, stride_ar, stride_ak, stride_bits,
    R: tl.constexpr, NEEDS_DX: tl.constexpr, DROPOUT: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program (k, split): BLOCK_K columns of dA from one chunk of the rows of x. da_ptr: (splits, R, K).

    NEEDS_DX: also write these rows and columns of dx₀; A stays in registers.
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    if OVERLAP:
        gdc_launch_dependents()
    first_k, split = tl.program_id(0) * BLOCK_K, tl.program_id(1)
    o_k = (first_k + tl.arange(0, BLOCK_K)).to(tl.int64)
    o_byte = first_k // 8 + tl.arange(0, BLOCK_K // 8)
    o_r = tl.arange(0, BLOCK_R)
    m_k, m_r = o_k < K, o_r < R
    m_rk = m_r[:, None] & m_k[None, :]
    if NEEDS_DX:
        p_a = a_ptr + o_r.to(tl.int64)[:, None] * stride_ar + o_k[None, :] * stride_ak
        a = tl.load(p_a, mask=m_rk, other=0.0).to(DTYPE)  # [BLOCK_R, BLOCK_K]
    da = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    first_m = split * m_chunk
    last_m = min(first_m + m_chunk, M)
    # See `gemm._pointer_kernel`. Exact float32 spilled with it, and TF32 is not serialised without.
    if tl.float32 != DTYPE:
        tl.assume(first_m < last_m)
    for m in range(first_m, last_m, BLOCK_M):
        o_m = (m + tl.arange(0, BLOCK_M)).to(tl.int64)
        m_m = o_m < M
        p_x = x_ptr + o_m[:, None] * stride_xm + o_k[None, :] * stride_xk
        p_ds = ds_ptr + o_m[None, :] * R + o_r[:, None]
        m_x = m_m[:, None] if EVEN_K else m_m[:, None] & m_k[None, :]
        x = tl.load(p_x, mask=m_x, other=0.0)  # [BLOCK_M, BLOCK_K]
        ds_t = tl.load(p_ds, mask=m_r[:, None] & m_m[None, :], other=0.0)  # [BLOCK_R, BLOCK_M]
        if DROPOUT:
            p_byte = bits_ptr + o_m[:, None] * stride_bits + o_byte[None, :]
            m_byte = m_m[:, None] if EVEN_K else m_m[:, None] & (o_byte < tl.cdiv(K, 8))[None, :]
            bits = tl.load(p_byte, mask=m_byte, other=0)
            x = drop_bits(x, bits)
        da = tl.dot(ds_t, x, da, input_precision=PRECISION)
        if NEEDS_DX:
            dx = tl.dot(tl.trans(ds_t), a, input_precision=PRECISION) * scale  # [BLOCK_M, BLOCK_K]
            if DROPOUT:
                dx = drop_bits(dx, bits)
            p_dx = dx_ptr + o_m[:, None] * K + o_k[None, :]
            tl.store(p_dx, dx.to(DTYPE), mask=m_x)
    p_da = da_ptr + split.to(tl.int64) * R * K + o_r.to(tl.int64)[:, None] * K + o_k[None, :]
    tl.store(p_da, (da * scale).to(da_ptr.dtype.element_ty), mask=m_rk)


def x_pass(
    x: torch.Tensor,
    ds: torch.Tensor,
    dtype: torch.dtype,
    config: PassConfig,
    *,
    scale: float = 1.0,
    bits: torch.Tensor | None = None,
    lora_a: torch.Tensor | None = None,
    precision: str = "ieee",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Parts of dA = scale · dSᵀ (keep ∘ x), newly allocated (splits, R, K), in float32, a single one in `dtype`;
    and, if lora_a is given, dx₀ = scale · keep ∘ (dS A) (M, K), in x's dtype, else None.

    x: (M, K), any strides. ds: (M, R), contiguous, x's dtype. config.splits divides M.
    bits: the mask as `dy_pass` returns it; None keeps all. lora_a: (R, K), any strides, any float dtype. precision: as in `rank_gemm`.
    """
    (m, k), r = x.shape, ds.shape[1]
    chunk, splits = chunks(m, config.splits, config.block_m)
    da_dtype = dtype if splits == 1 else torch.float32
    da = empty(splits, r, k, dtype=da_dtype, device=x.device)
    a, dx = (x, None) if lora_a is None else (lora_a, empty(m, k, dtype=x.dtype, device=x.device))
    launch(
        _x_kernel,
        (ceil_div(k, config.block_k), splits),
        x_ptr=x,
        ds_ptr=ds,
        a_ptr=a,
        da_ptr=da,
        dx_ptr=x if dx is None else dx,
        bits_ptr=x if bits is None else bits,
        M=m,
        K=k,
        R=r,
        m_chunk=chunk,
        scale=scale,
        stride_ar=a.stride(0),
        stride_ak=a.stride(1),
        stride_bits=0 if bits is None else bits.stride(0),
        stride_xm=x.stride(0),
        stride_xk=x.stride(1),
        NEEDS_DX=dx is not None,
        DROPOUT=bits is not None,
        EVEN_K=k % config.block_k == 0,
        PRECISION=precision,
        BLOCK_M=config.block_m,
        BLOCK_K=config.block_k,
        BLOCK_R=config.block_r,
        OVERLAP=overlaps(config),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return da, dx
