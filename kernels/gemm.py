"""The main GEMM of both directions, which adds the rank-R term before the result leaves the registers:

    out = x Wᵀ + bias + scale · keep ∘ (low upᵀ)

Forward: low = S, up = B. Gradient of x: x is dy, W is read transposed, low = dS, up = Aᵀ, and `keep` is the dropout mask,
read as the bits that the pass over dy wrote.
With FUSED the kernel also computes S = x Aᵀ with the base tile: x is read once, and S is recomputed for every tile of
columns.

Both kernels accumulate in float32 and round once. `_pointer_kernel` supports any strides and sizes. `_descriptor_kernel`
is for Hopper and newer: persistent, with tiles loaded by the tensor memory accelerator.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from fastlora.kernels.config import GemmConfig, ceil_div
from fastlora.kernels.launch import launch
from fastlora.kernels.rank_term import bias_tile, bits_tile, low_tile, rank_term, up_tile
from fastlora.kernels.recording import empty
from fastlora.kernels.steps import Descriptor
from fastlora.kernels.tiles import halves, overlaps, tile_of


@triton.jit
def _store_s(s_ptr, s, M, R, first_m, BLOCK_R: tl.constexpr):
    o_m = (first_m + tl.arange(0, s.shape[0])).to(tl.int64)
    o_r = tl.arange(0, BLOCK_R)
    m_s = (o_m < M)[:, None] & (o_r < R)[None, :]
    tl.store(s_ptr + o_m[:, None] * R + o_r[None, :], s, mask=m_s)


@triton.jit(do_not_specialize=["M"])
def _pointer_kernel(
    x_ptr, w_ptr, bias_ptr, a_ptr, low_ptr, up_ptr, out_ptr, bits_ptr,
    M, N, K, scale,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_ar, stride_ak, stride_un, stride_ur, stride_bits,
    R: tl.constexpr, HAS_BIAS: tl.constexpr, FUSED: tl.constexpr, DROPOUT: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One tile [BLOCK_M, BLOCK_N] of out per program; operands by pointers, pipelined with asynchronous copies."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    num_m, num_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tile_m, tile_n = tile_of(tl.program_id(0), num_m, num_n, GROUP_M)
    first_m, first_n = tile_m * BLOCK_M, tile_n * BLOCK_N
    o_m = (first_m + tl.arange(0, BLOCK_M)).to(tl.int64)
    o_n = (first_n + tl.arange(0, BLOCK_N)).to(tl.int64)
    o_k = tl.arange(0, BLOCK_K).to(tl.int64)
    o_r = tl.arange(0, BLOCK_R).to(tl.int64)
    # Rows past the end read row 0 and are not stored, so the loop needs no row mask.
    p_x = x_ptr + tl.where(o_m < M, o_m, 0)[:, None] * stride_xm + o_k[None, :] * stride_xk
    p_w = w_ptr + o_n[None, :] * stride_wn + o_k[:, None] * stride_wk
    p_a = a_ptr + o_r[None, :] * stride_ar + o_k[:, None] * stride_ak
    step = tl.full([], BLOCK_K, tl.int64)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    s = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    # Otherwise Triton 3.6 sets the sums to zero in a path around the loop, for which ptxas serialises the loop's matrix instructions.
    tl.assume(K > 0)
    for first_k in range(0, K, BLOCK_K):
        m_k = o_k < K - first_k
        if EVEN_K:
            x = tl.load(p_x)  # [BLOCK_M, BLOCK_K]
        else:
            x = tl.load(p_x, mask=m_k[None, :], other=0.0)
        if EVEN_N and EVEN_K:
            w = tl.load(p_w)  # [BLOCK_K, BLOCK_N]
        else:
            w = tl.load(p_w, mask=m_k[:, None] & (o_n < N)[None, :], other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        if FUSED:
            m_a = m_k[:, None] & (o_r < R)[None, :]
            a = tl.load(p_a, mask=m_a, other=0.0)  # [BLOCK_K, BLOCK_R]
            s = tl.dot(x, a, s, input_precision=PRECISION)
            p_a += step * stride_ak
        p_x += step * stride_xk
        p_w += step * stride_wk
    if FUSED:
        low = s.to(DTYPE)
        if tile_n == 0:
            _store_s(low_ptr, low, M, R, first_m, BLOCK_R)
    else:
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
    p_out = out_ptr + o_m[:, None] * N + o_n[None, :]
    tl.store(p_out, acc.to(DTYPE), mask=(o_m < M)[:, None] & (o_n < N)[None, :])


@triton.jit
def _operands(
    low_ptr, up_ptr, bits_ptr, M, N, stride_un, stride_ur, stride_bits, first_m, first_n,
    R: tl.constexpr, DTYPE: tl.constexpr, FUSED: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """low, up and bits of a tile; up stands for those that it does not need, and for low, which FUSED computes."""
    up = up_tile(up_ptr, N, stride_un, stride_ur, first_n, 0, R, DTYPE, BLOCK_R, BLOCK_N)
    low, bits = up, up
    if not FUSED:
        low = low_tile(low_ptr, M, first_m, 0, R, BLOCK_M, BLOCK_R)
    if DROPOUT:
        bits = bits_tile(bits_ptr, M, N, stride_bits, first_m, first_n, BLOCK_M, BLOCK_N)
    return low, up, bits


@triton.jit
def _finish(
    out_desc, acc, low, up, bits, bias_ptr, low_ptr, up_ptr, bits_ptr, M, N, scale, stride_un, stride_ur, stride_bits, first_m, first_n,
    R: tl.constexpr, DTYPE: tl.constexpr, HAS_BIAS: tl.constexpr, FUSED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, PREFETCHED: tl.constexpr, SUBTILES: tl.constexpr,
):  # fmt: skip
    """Add the rank-R term and the bias to `acc` and store it, in SUBTILES consecutive column strips.

    PREFETCHED: up and bits hold the tile's; otherwise each strip loads its own. low is the tile's in any case.
    """
    if SUBTILES > 1:
        left, right = halves(acc)
        up_left, up_right = up, up
        bits_left, bits_right = bits, bits
        if PREFETCHED:
            up_left, up_right = halves(up)
            if DROPOUT:
                bits_left, bits_right = halves(bits)
        _finish(
            out_desc, left, low, up_left, bits_left, bias_ptr, low_ptr, up_ptr, bits_ptr, M, N, scale, stride_un, stride_ur, stride_bits,
            first_m, first_n, R, DTYPE, HAS_BIAS, FUSED, DROPOUT, PRECISION, BLOCK_R, PREFETCHED, SUBTILES // 2,
        )  # fmt: skip
        _finish(
            out_desc, right, low, up_right, bits_right, bias_ptr, low_ptr, up_ptr, bits_ptr, M, N, scale, stride_un, stride_ur, stride_bits,
            first_m, first_n + acc.shape[1] // 2, R, DTYPE, HAS_BIAS, FUSED, DROPOUT, PRECISION, BLOCK_R, PREFETCHED, SUBTILES // 2,
        )  # fmt: skip
    else:
        if not PREFETCHED:
            more, up, bits = _operands(
                low_ptr, up_ptr, bits_ptr, M, N, stride_un, stride_ur, stride_bits, first_m, first_n,
                R, DTYPE, FUSED, DROPOUT, acc.shape[0], acc.shape[1], BLOCK_R,
            )  # fmt: skip
            if not FUSED:
                low = more
        out = rank_term(
            acc, low, up, bits, low_ptr, up_ptr, M, N, scale, stride_un, stride_ur, first_m, first_n,
            R, DTYPE, DROPOUT, PRECISION, BLOCK_R,
        )  # fmt: skip
        if HAS_BIAS:
            out += bias_tile(bias_ptr, N, first_n, acc.shape[1])
        out_desc.store([first_m, first_n], out.to(DTYPE))


@triton.jit(do_not_specialize=["M"])
def _descriptor_kernel(
    x_desc, w_desc, a_desc, out_desc, bias_ptr, low_ptr, up_ptr, bits_ptr,
    M, N, K, scale, stride_un, stride_ur, stride_bits,
    R: tl.constexpr, HAS_BIAS: tl.constexpr, FUSED: tl.constexpr, DROPOUT: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
    SUBTILES: tl.constexpr, PREFETCH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Tiles [BLOCK_M, BLOCK_N] of out; each of P programs computes every P-th tile. TRANSPOSED: W is (K, N), not (N, K).

    PREFETCH: low, up and the mask are loaded before the loop, which hides the latency; R must not exceed BLOCK_R. OVERLAP: the pass that
    writes low and the mask may be running; before the wait its results are not read and nothing is stored, so PREFETCH must be off.
    """
    DTYPE: tl.constexpr = x_desc.dtype
    num_m, num_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        tile_m, tile_n = tile_of(tile, num_m, num_n, GROUP_M)
        first_m, first_n = tile_m * BLOCK_M, tile_n * BLOCK_N
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        s = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        low, up, bits = s, s, s
        if PREFETCH:
            low, up, bits = _operands(
                low_ptr, up_ptr, bits_ptr, M, N, stride_un, stride_ur, stride_bits, first_m, first_n,
                R, DTYPE, FUSED, DROPOUT, BLOCK_M, BLOCK_N, BLOCK_R,
            )  # fmt: skip
        for first_k in range(0, K, BLOCK_K):
            x = x_desc.load([first_m, first_k])  # [BLOCK_M, BLOCK_K]
            if TRANSPOSED:
                w = w_desc.load([first_k, first_n])  # [BLOCK_K, BLOCK_N]
            else:
                w = w_desc.load([first_n, first_k]).T
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
            if FUSED:
                a = a_desc.load([0, first_k]).T  # [BLOCK_K, BLOCK_R]; ranks from R on are 0
                s = tl.dot(x, a, s, input_precision=PRECISION)
        if OVERLAP:
            gdc_wait()  # after the loop: inside, the pipelined loads would be wrong
        if FUSED:
            low = s.to(DTYPE)
            if tile_n == 0:
                _store_s(low_ptr, low, M, R, first_m, BLOCK_R)
        _finish(
            out_desc, acc, low, up, bits, bias_ptr, low_ptr, up_ptr, bits_ptr, M, N, scale, stride_un, stride_ur, stride_bits,
            first_m, first_n, R, DTYPE, HAS_BIAS, FUSED, DROPOUT, PRECISION, BLOCK_R, PREFETCH, SUBTILES,
        )  # fmt: skip


def rank_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    low: torch.Tensor,
    up: torch.Tensor,
    config: GemmConfig,
    *,
    lora_a: torch.Tensor | None = None,
    scale: float = 1.0,
    bits: torch.Tensor | None = None,
    precision: str = "ieee",
) -> torch.Tensor:
    """out = x Wᵀ + bias + scale · keep ∘ (low upᵀ), newly allocated (M, N), row-major, in x's dtype.

    x: (M, K), any strides. weight: (N, K), any strides, x's dtype; a transposed view for the gradient of x.
    bias: (N,) or None. low: (M, R), contiguous, x's dtype. up: (N, R), any strides, any float dtype.
    config: tiles. With `config.descriptor`, x, out and weight (or its transpose) must fit the tensor memory accelerator:
        rows contiguous, 16-byte aligned, their pitch a multiple of 16 bytes.
    lora_a: (R, K), contiguous, x's dtype. If given, low is not read but written: low = x Aᵀ.
    bits: (M, ⌈N / 8⌉) uint8, rows contiguous, which elements of the rank-R term to keep; None keeps all. precision: of float32 products, "ieee" or "tf32".

    Raises: ValueError if lora_a has more ranks than config.block_r: a fused tile of S holds all of them.
    """
    (m, k), n, r = x.shape, weight.shape[0], low.shape[1]
    if lora_a is not None and r > config.block_r:
        raise ValueError(f"lora_a: expected at most {config.block_r} ranks, got {r}")
    out = empty(m, n, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    a = x if lora_a is None else lora_a
    shared = {
        "bias_ptr": x if bias is None else bias,
        "low_ptr": low,
        "up_ptr": up,
        "bits_ptr": x if bits is None else bits,
        "M": m,
        "N": n,
        "K": k,
        "R": r,
        "scale": scale,
        "stride_un": up.stride(0),
        "stride_ur": up.stride(1),
        "stride_bits": 0 if bits is None else bits.stride(0),
        "HAS_BIAS": bias is not None,
        "FUSED": lora_a is not None,
        "DROPOUT": bits is not None,
        "PRECISION": precision,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "BLOCK_R": config.block_r,
        "GROUP_M": config.group_m,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    tiles = ceil_div(m, config.block_m) * ceil_div(n, config.block_n)
    if not config.descriptor:
        launch(
            _pointer_kernel,
            (tiles,),
            x_ptr=x,
            w_ptr=weight,
            out_ptr=out,
            a_ptr=a,
            stride_ar=a.stride(0),
            stride_ak=a.stride(1),
            stride_xm=x.stride(0),
            stride_xk=x.stride(1),
            stride_wn=weight.stride(0),
            stride_wk=weight.stride(1),
            EVEN_N=n % config.block_n == 0,
            EVEN_K=k % config.block_k == 0,
            **shared,
        )
        return out
    transposed = weight.stride(1) != 1
    stored = weight.T if transposed else weight
    w_block = (config.block_n, config.block_k)
    out_block = (config.block_m, config.block_n // config.subtiles)
    programs = min(tiles, config.programs)
    overlapping = overlaps(config) and lora_a is None  # `fused` follows no pass
    launch(
        _descriptor_kernel,
        (programs,),
        x_desc=Descriptor(x, (config.block_m, config.block_k)),
        w_desc=Descriptor(stored, w_block[::-1] if transposed else w_block),
        a_desc=Descriptor(a, (config.block_r, config.block_k)),
        out_desc=Descriptor(out, out_block),
        TRANSPOSED=transposed,
        SUBTILES=config.subtiles,
        PREFETCH=config.prefetch and not overlapping and r <= config.block_r,
        OVERLAP=overlapping,
        launch_pdl=overlapping,
        **shared,
    )
    return out
