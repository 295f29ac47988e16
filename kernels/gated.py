"""The middle of a gated MLP, h = act(g) ∘ u, and its gradient.

gated_product      h = act(g) ∘ u
gated_down         h, and S = (keep ∘ h) Aᵀ of the layer after it
gated_gradients_   dg = dh ∘ u ∘ act'(g)  and  du = dh ∘ act(g)  for  dh = base + scale · keep ∘ (dS A); on request h again

All compute in float32 and round each result once; S is that of the rounded h. Of dh only the base is stored: the rank-R term, which `update.rank_update_`
would add to it in a pass of its own, is added in registers.
"""

import torch
import triton
import triton.language as tl

from fastlora.kernels.config import GemmConfig, PassConfig, ceil_div, chunks
from fastlora.kernels.dropout import NO_MASK, Mask, drop
from fastlora.kernels.forward import store_rows
from fastlora.kernels.launch import launch
from fastlora.kernels.rank_term import bits_tile, low_tile, rank_term, up_tile
from fastlora.kernels.recording import empty
from fastlora.kernels.reduce import sum_partials

_BLOCK = 2048  # elements of a program of `_gated_product_kernel`


@triton.jit
def _activation(g, ACTIVATION: tl.constexpr):
    """act(g) and act'(g) of a float32 tile."""
    if ACTIVATION == "gelu":
        cumulative = 0.5 + 0.5 * tl.erf(g * 0.7071067811865476)
        density = 0.3989422804014327 * tl.exp(-0.5 * g * g)
        return g * cumulative, cumulative + g * density
    if ACTIVATION == "gelu_tanh":  # (1 + tanh z) / 2 is the sigmoid of 2 z
        z = 1.5957691216057308 * (g + 0.044715 * g * g * g)
        slope = 1.5957691216057308 * (1 + 0.134145 * g * g)
    else:
        z, slope = g, 1.0
    e = tl.exp(-tl.abs(z))  # cannot overflow
    inverse = 1 / (1 + e)
    sigmoid = tl.where(z < 0, e, 1.0) * inverse
    return g * sigmoid, sigmoid + g * (e * inverse * inverse) * slope


@triton.jit
def _gated_product_kernel(g_ptr, u_ptr, h_ptr, size, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = o < size
    g = tl.load(g_ptr + o, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + o, mask=mask, other=0.0).to(tl.float32)
    act, _ = _activation(g, ACTIVATION)
    tl.store(h_ptr + o, (act * u).to(h_ptr.dtype.element_ty), mask=mask)


def gated_product(g: torch.Tensor, u: torch.Tensor, activation: str) -> torch.Tensor:
    """h = act(g) ∘ u, newly allocated (M, N). g, u: (M, N), contiguous. activation: a key of `fastlora.ops.gated.ACTIVATIONS`."""
    h = empty(*g.shape, dtype=g.dtype, device=g.device)
    launch(
        _gated_product_kernel,
        (ceil_div(g.numel(), _BLOCK),),
        g_ptr=g,
        u_ptr=u,
        h_ptr=h,
        size=g.numel(),
        ACTIVATION=activation,
        BLOCK=_BLOCK,
        num_warps=4,
    )
    return h


@triton.jit(do_not_specialize=["M", "threshold"])
def _gated_down_kernel(
    g_ptr, u_ptr, h_ptr, a_ptr, s_ptr, seed_ptr, M, N, n_chunk, threshold, stride_ar, stride_an,
    R: tl.constexpr, DROPOUT: tl.constexpr, EVEN_N: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Program (m, split): one chunk of the columns of BLOCK_M rows of h, and their share of S. s_ptr: (splits, M, R)."""
    DTYPE: tl.constexpr = h_ptr.dtype.element_ty
    first_m, split = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    first_n = split * n_chunk
    last_n = min(first_n + n_chunk, N)
    o_m = (first_m + tl.arange(0, BLOCK_M)).to(tl.int64)
    o_r = tl.arange(0, BLOCK_R)
    m_m = o_m < M
    s = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for n in range(first_n, last_n, BLOCK_N):
        o_n = (n + tl.arange(0, BLOCK_N)).to(tl.int64)
        m_n = o_n < last_n
        o = o_m[:, None] * N + o_n[None, :]
        mask = m_m[:, None] if EVEN_N else m_m[:, None] & m_n[None, :]
        g = tl.load(g_ptr + o, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(u_ptr + o, mask=mask, other=0.0).to(tl.float32)
        act, _ = _activation(g, ACTIVATION)
        h = (act * u).to(DTYPE)
        tl.store(h_ptr + o, h, mask=mask)
        if DROPOUT:
            h = drop(h, tl.load(seed_ptr), threshold, first_m, n)
        p_a = a_ptr + o_r.to(tl.int64)[None, :] * stride_ar + o_n[:, None] * stride_an
        a = tl.load(p_a, mask=(o_r < R)[None, :] & m_n[:, None], other=0.0).to(DTYPE)
        if tl.float32 == DTYPE:
            # A sum for each block, as in `forward.times_rows`.
            one = (last_n > first_n).to(tl.float32)
            s += tl.dot(h, a, input_precision=PRECISION) * one
        else:
            s = tl.dot(h, a, s, input_precision=PRECISION)
    store_rows(s_ptr + split.to(tl.int64) * M * R, s, M, R, first_m, 0)


def gated_down(
    g: torch.Tensor,
    u: torch.Tensor,
    activation: str,
    lora_a: torch.Tensor,
    config: PassConfig,
    *,
    mask: Mask = NO_MASK,
    precision: str = "ieee",
) -> tuple[torch.Tensor, torch.Tensor]:
    """h = act(g) ∘ u (M, N) and S = (keep ∘ h) Aᵀ (M, R), newly allocated, in one pass over g and u.

    g, u, activation: as in `gated_product`. lora_a: (R, N), any strides, any float dtype, cast to g's. config.block_k is the tile of N, which
    config.splits divides. mask, precision: as in `forward.down_project`.

    Raises: ValueError for more ranks than the tiles support.
    """
    (m, n), r = g.shape, lora_a.shape[0]
    if r > config.block_r:
        raise ValueError(f"lora_a: expected at most {config.block_r} ranks, got {r}")
    chunk, splits = chunks(n, config.splits, config.block_k)
    h = empty(m, n, dtype=g.dtype, device=g.device)
    s = empty(splits, m, r, dtype=g.dtype if splits == 1 else torch.float32, device=g.device)
    launch(
        _gated_down_kernel,
        (ceil_div(m, config.block_m), splits),
        g_ptr=g,
        u_ptr=u,
        h_ptr=h,
        a_ptr=lora_a,
        s_ptr=s,
        seed_ptr=g if mask.seed is None else mask.seed,
        M=m,
        N=n,
        n_chunk=chunk,
        threshold=mask.threshold,
        stride_ar=lora_a.stride(0),
        stride_an=lora_a.stride(1),
        R=r,
        DROPOUT=mask.drops,
        EVEN_N=n % config.block_k == 0,
        ACTIVATION=activation,
        PRECISION=precision,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_k,
        BLOCK_R=config.block_r,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return h, s[0] if splits == 1 else sum_partials(s, g.dtype)


@triton.jit(do_not_specialize=["M"])
def _gated_gradients_kernel(
    dh_ptr, g_ptr, u_ptr, du_ptr, h_ptr, low_ptr, up_ptr, bits_ptr, M, N, scale, stride_un, stride_ur, stride_bits,
    R: tl.constexpr, NEEDS_H: tl.constexpr, DROPOUT: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One tile. dh_ptr: read as the base of dh, written as dg."""
    DTYPE: tl.constexpr = dh_ptr.dtype.element_ty
    # Tiles that run together cover whole rows, which lie together in memory.
    tile, tiles_n = tl.program_id(0), tl.cdiv(N, BLOCK_N)
    first_m, first_n = (tile // tiles_n) * BLOCK_M, (tile % tiles_n) * BLOCK_N
    o_m = (first_m + tl.arange(0, BLOCK_M)).to(tl.int64)
    o_n = first_n + tl.arange(0, BLOCK_N)
    o = o_m[:, None] * N + o_n[None, :]
    mask = (o_m < M)[:, None] & (o_n < N)[None, :]
    dh = tl.load(dh_ptr + o, mask=mask, other=0.0).to(tl.float32)
    # Before the rank-R term, whose product waits.
    g = tl.load(g_ptr + o, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + o, mask=mask, other=0.0).to(tl.float32)
    if R > 0:
        low = low_tile(low_ptr, M, first_m, 0, R, BLOCK_M, BLOCK_R)
        up = up_tile(up_ptr, N, stride_un, stride_ur, first_n, 0, R, DTYPE, BLOCK_R, BLOCK_N)
        bits = low
        if DROPOUT:
            bits = bits_tile(bits_ptr, M, N, stride_bits, first_m, first_n, BLOCK_M, BLOCK_N)
        dh = rank_term(
            dh, low, up, bits, low_ptr, up_ptr, M, N, scale, stride_un, stride_ur, first_m, first_n,
            R, DTYPE, DROPOUT, PRECISION, BLOCK_R,
        )  # fmt: skip
    act, slope = _activation(g, ACTIVATION)
    tl.store(dh_ptr + o, (dh * u * slope).to(DTYPE), mask=mask)
    tl.store(du_ptr + o, (dh * act).to(DTYPE), mask=mask)
    if NEEDS_H:
        tl.store(h_ptr + o, (act * u).to(DTYPE), mask=mask)


def gated_gradients_(
    dh: torch.Tensor,
    g: torch.Tensor,
    u: torch.Tensor,
    activation: str,
    config: GemmConfig,
    *,
    ds: torch.Tensor | None = None,
    lora_a: torch.Tensor | None = None,
    scale: float = 1.0,
    bits: torch.Tensor | None = None,
    needs_h: bool = True,
    precision: str = "ieee",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """dg (in dh's memory), du and, if needed, h, each (M, N).

    dh: (M, N), contiguous, the gradient of h without the adapter; changed. g, u: (M, N), contiguous. activation: as in `gated_product`.
    ds: dS (M, R), contiguous, dh's dtype, and lora_a: (R, N), any strides, any float dtype, of the adapter of the layer after h; None without one.
    scale: every factor of that adapter's path.
    config: block_m, block_n, block_r, num_warps and num_stages. bits, precision: as in `rank_gemm`.
    """
    m, n = g.shape
    du = empty(m, n, dtype=g.dtype, device=g.device)
    h = empty(m, n, dtype=g.dtype, device=g.device) if needs_h else None
    rank = 0 if ds is None else ds.shape[1]
    launch(
        _gated_gradients_kernel,
        (ceil_div(m, config.block_m) * ceil_div(n, config.block_n),),
        dh_ptr=dh,
        g_ptr=g,
        u_ptr=u,
        du_ptr=du,
        h_ptr=du if h is None else h,
        low_ptr=dh if ds is None else ds,
        up_ptr=dh if lora_a is None else lora_a,
        bits_ptr=dh if bits is None else bits,
        M=m,
        N=n,
        scale=scale,
        stride_un=0 if lora_a is None else lora_a.stride(1),
        stride_ur=0 if lora_a is None else lora_a.stride(0),
        stride_bits=0 if bits is None else bits.stride(0),
        R=rank,
        NEEDS_H=needs_h,
        DROPOUT=bits is not None,
        ACTIVATION=activation,
        PRECISION=precision,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_R=config.block_r,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return dh, du, h
