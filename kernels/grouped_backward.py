"""The passes over dy and x of a batch whose rows belong to groups (see `grouped`), which sum over the rows of each group.

    group_dy   dS = dy B_g   and   dB_g = scale_g · dyᵀ S   one pass over dy
    group_x    dA_g = scale_g · dSᵀ (keep ∘ x)              one pass over x; also dB_g of many ranks

A program has a chunk of rows, which is a block of `block_of`. The sum over a group of one chunk stays in registers; each chunk of a longer
group writes a float32 part, and `_group_sum_kernel` adds the parts in a fixed order. So one group of all rows fills the GPU as many
small ones do, and two runs agree bit for bit.
"""

import torch
import triton
import triton.language as tl

from fastlora.kernels.config import PassConfig, ceil_div, chunks
from fastlora.kernels.dropout import drop
from fastlora.kernels.grouped import NO_GROUP_MASK, GroupMask, block_of
from fastlora.kernels.launch import launch
from fastlora.kernels.recording import empty
from fastlora.kernels.reduce import sum_partials

_PARTS, _ELEMENTS = 8, 512  # of a tile of `_group_sum_kernel`


@triton.jit
def _store_sum(
    out_ptr, part_ptr, total, offsets, mask, group, begin, end, first_m, m_chunk, N, R: tl.constexpr
):
    """Store the sum over a chunk: in the result (G, N, R), or any other order of N and R, if the group has no other chunk, else as a part.

    A stretch of m_chunk rows has at most two chunks of such groups: one that begins a group, and one that does not.
    """
    if end - begin <= m_chunk:
        p_out = out_ptr + group.to(tl.int64) * N * R + offsets
        tl.store(p_out, total.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        part = 2 * (first_m // m_chunk) + (first_m == begin).to(tl.int32)
        tl.store(part_ptr + part.to(tl.int64) * N * R + offsets, total, mask=mask)


@triton.jit(do_not_specialize=["M", "G"])
def _group_dy_kernel(
    dy_ptr, b_ptr, s_ptr, ds_ptr, db_ptr, part_ptr, scale_ptr, offsets_ptr, M, G, N, m_chunk,
    stride_dm, stride_dn, stride_bg, stride_bn, stride_br,
    R: tl.constexpr, NEEDS_DS: tl.constexpr, NEEDS_DB: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Program (chunk, n): BLOCK_N columns of one chunk of the rows of dy; B_g and the sum of dB_g stay in registers.

    ds_ptr: (tiles of N, M, R), each over BLOCK_N columns. db_ptr: (G, N, R), part_ptr: (parts, N, R).
    """
    DTYPE: tl.constexpr = dy_ptr.dtype.element_ty
    tiles = tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0) % tiles
    group, begin, end, first_m = block_of(offsets_ptr, M, G, tl.program_id(0) // tiles, m_chunk)
    if (first_m >= end) & (first_m != begin):
        return
    o_n = (tile * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    o_r = tl.arange(0, BLOCK_R)
    m_n, m_r = o_n < N, o_r < R
    m_rn = m_r[:, None] & m_n[None, :]
    p_b = (
        b_ptr + group.to(tl.int64) * stride_bg + o_n[None, :] * stride_bn + o_r[:, None] * stride_br
    )
    b_t = tl.load(p_b, mask=m_rn, other=0.0).to(DTYPE)  # [BLOCK_R, BLOCK_N]
    # The ranks as rows, as in `backward`.
    db_t = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    ds_ptr += tile.to(tl.int64) * M * R
    last_m = min(first_m + m_chunk, end)
    for m in range(first_m, last_m, BLOCK_M):
        o_m = (m + tl.arange(0, BLOCK_M)).to(tl.int64)
        o_row = o_m[None, :] * R + o_r[:, None]
        m_m = o_m < last_m
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
    if NEEDS_DB:
        db_t *= tl.load(scale_ptr + group)
        _store_sum(
            db_ptr, part_ptr, db_t, o_n[None, :] * R + o_r[:, None], m_rn, group, begin, end, first_m, m_chunk, N, R
        )  # fmt: skip


def group_dy(
    dy: torch.Tensor,
    b: torch.Tensor,
    s: torch.Tensor,
    scale: torch.Tensor,
    offsets: torch.Tensor,
    config: PassConfig,
    *,
    needs_ds: bool = True,
    needs_db: bool = True,
    precision: str = "ieee",
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """dS = dy B_g (M, R) in dy's dtype and dB_g = scale_g · dyᵀ S (G, N, R) in b's; None for what is not needed.

    dy: (M, N), any strides. b: (G, N, R), any strides, any float dtype, cast to dy's. s: (M, R), contiguous, dy's dtype. config.splits
    divides M. scale, offsets, precision: as in `group_up_`. Rows of dS without a group are not initialised; dB_g of an empty group is 0.

    Raises: ValueError for more ranks than the tiles support.
    """
    (m, n), (groups, _, r) = dy.shape, b.shape
    if r > config.block_r:
        raise ValueError(f"b: expected at most {config.block_r} ranks, got {r}")
    chunk, _ = chunks(m, config.splits, config.block_m)
    tiles = ceil_div(n, config.block_n)
    ds_dtype = dy.dtype if tiles == 1 else torch.float32
    ds = empty(tiles, m, r, dtype=ds_dtype, device=dy.device) if needs_ds else None
    db, part = _sums(groups, (n, r), m, chunk, b.dtype, b.device) if needs_db else (None, None)
    launch(
        _group_dy_kernel,
        ((m // chunk + groups) * tiles,),
        dy_ptr=dy,
        b_ptr=b,
        s_ptr=s,
        ds_ptr=s if ds is None else ds,
        db_ptr=s if db is None else db,
        part_ptr=s if part is None else part,
        scale_ptr=scale,
        offsets_ptr=offsets,
        M=m,
        G=groups,
        N=n,
        R=r,
        m_chunk=chunk,
        stride_dm=dy.stride(0),
        stride_dn=dy.stride(1),
        stride_bg=b.stride(0),
        stride_bn=b.stride(1),
        stride_br=b.stride(2),
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
    if db is not None and part is not None:
        _add_parts(db, part, offsets, m, chunk)
    return None if ds is None else sum_partials(ds, dy.dtype), db


@triton.jit(do_not_specialize=["M", "G"])
def _group_x_kernel(
    x_ptr, ds_ptr, da_ptr, part_ptr, scale_ptr, offsets_ptr, thresholds_ptr, seed_ptr, M, G, K, m_chunk,
    stride_xm, stride_xk, stride_or, stride_ok,
    R: tl.constexpr, DROPOUT: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Program (chunk, k): BLOCK_K columns of dA_g from one chunk of the rows of x. da_ptr: (G, R, K), part_ptr: (parts, R, K), both in the
    order of stride_or and stride_ok.
    """
    tiles = tl.cdiv(K, BLOCK_K)
    first_k = tl.program_id(0) % tiles * BLOCK_K
    group, begin, end, first_m = block_of(offsets_ptr, M, G, tl.program_id(0) // tiles, m_chunk)
    if (first_m >= end) & (first_m != begin):
        return
    o_k = (first_k + tl.arange(0, BLOCK_K)).to(tl.int64)
    o_r = tl.arange(0, BLOCK_R)
    m_k, m_r = o_k < K, o_r < R
    if DROPOUT:
        seed, threshold = tl.load(seed_ptr), tl.load(thresholds_ptr + group)
    da = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    last_m = min(first_m + m_chunk, end)
    for m in range(first_m, last_m, BLOCK_M):
        o_m = (m + tl.arange(0, BLOCK_M)).to(tl.int64)
        m_m = o_m < last_m
        m_x = m_m[:, None] if EVEN_K else m_m[:, None] & m_k[None, :]
        p_x = x_ptr + o_m[:, None] * stride_xm + o_k[None, :] * stride_xk
        x = tl.load(p_x, mask=m_x, other=0.0)  # [BLOCK_M, BLOCK_K]
        p_ds = ds_ptr + o_m[None, :] * R + o_r[:, None]
        ds_t = tl.load(p_ds, mask=m_r[:, None] & m_m[None, :], other=0.0)  # [BLOCK_R, BLOCK_M]
        if DROPOUT:
            x = drop(x, seed, threshold, m, first_k)
        da = tl.dot(ds_t, x, da, input_precision=PRECISION)
    da *= tl.load(scale_ptr + group)
    o_da = o_r.to(tl.int64)[:, None] * stride_or + o_k[None, :] * stride_ok
    m_da = m_r[:, None] & m_k[None, :]
    _store_sum(da_ptr, part_ptr, da, o_da, m_da, group, begin, end, first_m, m_chunk, K, R)


def group_x(
    x: torch.Tensor,
    ds: torch.Tensor,
    scale: torch.Tensor,
    offsets: torch.Tensor,
    dtype: torch.dtype,
    config: PassConfig,
    *,
    mask: GroupMask = NO_GROUP_MASK,
    transposed: bool = False,
    precision: str = "ieee",
) -> torch.Tensor:
    """dA_g = scale_g · dSᵀ (keep ∘ x), newly allocated (G, R, K), in `dtype`; with `transposed` (G, K, R). dA_g of an empty group is 0.

    x: (M, K), any strides. ds: (M, R), contiguous, x's dtype. config.splits divides M. mask, scale, offsets, precision: as in `group_up_`.

    Raises: ValueError for more ranks than the tiles support.
    """
    (m, k), r, groups = x.shape, ds.shape[1], scale.shape[0]
    if r > config.block_r:
        raise ValueError(f"ds: expected at most {config.block_r} ranks, got {r}")
    chunk, _ = chunks(m, config.splits, config.block_m)
    shape = (k, r) if transposed else (r, k)
    da, part = _sums(groups, shape, m, chunk, dtype, x.device)
    launch(
        _group_x_kernel,
        ((m // chunk + groups) * ceil_div(k, config.block_k),),
        x_ptr=x,
        ds_ptr=ds,
        da_ptr=da,
        part_ptr=da if part is None else part,
        scale_ptr=scale,
        offsets_ptr=offsets,
        M=m,
        G=groups,
        K=k,
        R=r,
        m_chunk=chunk,
        stride_xm=x.stride(0),
        stride_xk=x.stride(1),
        stride_or=1 if transposed else k,
        stride_ok=r if transposed else 1,
        EVEN_K=k % config.block_k == 0,
        PRECISION=precision,
        BLOCK_M=config.block_m,
        BLOCK_K=config.block_k,
        BLOCK_R=config.block_r,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **mask.arguments(x),
    )
    if part is not None:
        _add_parts(da, part, offsets, m, chunk)
    return da


def _sums(
    groups: int,
    shape: tuple[int, int],
    m: int,
    chunk: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The sums over the rows of each group, of this shape, and their parts, not initialised; no parts if no group can have several chunks."""
    out = empty(groups, *shape, dtype=dtype, device=device)
    if m <= chunk:
        return out, None
    return out, empty(2 * ceil_div(m, chunk), *shape, dtype=torch.float32, device=device)


@triton.jit(do_not_specialize=["M"])
def _group_sum_kernel(
    part_ptr, out_ptr, offsets_ptr, M, size, m_chunk, PARTS: tl.constexpr, BLOCK: tl.constexpr
):
    """Program (group, block): BLOCK elements of the sum of a group of several chunks, PARTS parts at a time in a fixed tree."""
    group = tl.program_id(0)
    begin = tl.load(offsets_ptr + group)
    rows = min(tl.load(offsets_ptr + group + 1), M) - begin
    if rows <= m_chunk:
        return
    o = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    m_o = (o < size)[None, :]
    total = tl.zeros([BLOCK], tl.float32)
    chunks_of_group = tl.cdiv(rows, m_chunk)
    for first in range(0, chunks_of_group, PARTS):
        o_chunk = first + tl.arange(0, PARTS)
        part = 2 * (begin // m_chunk + o_chunk) + (o_chunk == 0).to(tl.int32)  # as in `_store_sum`
        p_part = part_ptr + part.to(tl.int64)[:, None] * size + o[None, :]
        block = tl.load(p_part, mask=(o_chunk < chunks_of_group)[:, None] & m_o, other=0.0)
        total += tl.sum(block, axis=0)
    p_out = out_ptr + group.to(tl.int64) * size + o
    tl.store(p_out, total.to(out_ptr.dtype.element_ty), mask=o < size)


def _add_parts(
    out: torch.Tensor, part: torch.Tensor, offsets: torch.Tensor, m: int, chunk: int
) -> None:
    """Write the results of the groups of several chunks; those of the others stay as they are."""
    size = out[0].numel()
    launch(
        _group_sum_kernel,
        (out.shape[0], ceil_div(size, _ELEMENTS)),
        part_ptr=part,
        out_ptr=out,
        offsets_ptr=offsets,
        M=m,
        size=size,
        m_chunk=chunk,
        PARTS=_PARTS,
        BLOCK=_ELEMENTS,
        num_warps=4,
    )
