"""Low-rank products of a batch whose rows belong to groups, each with an adapter of its own.

    group_down   S = (keep ∘ x) A_gᵀ                   one pass over x; also dS = dy B_g of many ranks
    group_up_    out += scale_g · keep ∘ (low up_gᵀ)   y with S and B_g, dx with dS and A_gᵀ

`grouped_backward` has the passes that sum over the rows of a group.

Rows `offsets[g]` … `offsets[g + 1] − 1` belong to group g. The offsets are read on the device only, so a launch depends on the
numbers of rows and groups, not on the sizes of the groups. A block of rows has one group. Block number n belongs to the last group g with
offsets[g] // size + g ≤ n: these numbers increase with g and leave each group as many blocks as it needs, so M // size + G blocks are
enough, and log₂ G steps find the group. A spare block ends at once.

`scale` includes every factor, S and dS none (see `forward`).
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fastlora.kernels.config import GemmConfig, PassConfig, ceil_div, chunks
from fastlora.kernels.dropout import drop
from fastlora.kernels.forward import store_rows, times_rows
from fastlora.kernels.launch import launch
from fastlora.kernels.rank_term import low_tile, rank_term, up_tile
from fastlora.kernels.recording import empty
from fastlora.kernels.reduce import sum_partials


class GroupMask(NamedTuple):
    """What determines the dropout mask; without a seed there is no dropout.

    seed: 0-d int64. thresholds: (G,) int32 or int64, dropout probabilities in units of 2⁻¹⁶, 0 for none. Both on the operands' device.
    """

    seed: torch.Tensor | None = None
    thresholds: torch.Tensor | None = None

    def arguments(self, unused: torch.Tensor) -> dict[str, Any]:
        """Those of a kernel."""
        return {
            "seed_ptr": unused if self.seed is None else self.seed,
            "thresholds_ptr": unused if self.thresholds is None else self.thresholds,
            "DROPOUT": self.seed is not None,
        }


NO_GROUP_MASK = GroupMask()


@triton.jit
def block_of(offsets_ptr, M, G, number, size):
    """(group, its first row, its end, the first row of the block) of block `number`, for blocks of `size` rows.

    A spare block has a first row at or after the end; only the first block of an empty group begins where the group does.
    """
    group = tl.full([], 0, tl.int32)
    above = group + G
    while above - group > 1:
        middle = (group + above) // 2
        reached = tl.load(offsets_ptr + middle) // size + middle <= number
        group = tl.where(reached, middle, group)
        above = tl.where(reached, above, middle)
    begin = tl.load(offsets_ptr + group)
    end = min(tl.load(offsets_ptr + group + 1), M)
    first = begin + (number - begin // size - group) * size
    # Numbers before those of group 0 have no group.
    return group, begin, end, tl.where(first < begin, 0x7FFFFFFF, first)


@triton.jit(do_not_specialize=["M", "G"])
def _group_down_kernel(
    x_ptr, a_ptr, s_ptr, offsets_ptr, thresholds_ptr, seed_ptr, M, G, K, k_chunk,
    stride_xm, stride_xk, stride_ag, stride_ar, stride_ak,
    R: tl.constexpr, DROPOUT: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Program (block, split): rows of S from one chunk of K. s_ptr: (splits, M, R)."""
    group, _, end, first_m = block_of(offsets_ptr, M, G, tl.program_id(0), BLOCK_M)
    if first_m >= end:
        return
    split = tl.program_id(1)
    first_k = split * k_chunk
    last_k = min(first_k + k_chunk, K)
    threshold = group
    if DROPOUT:
        threshold = tl.load(thresholds_ptr + group)
    s = times_rows(
        x_ptr, a_ptr + group.to(tl.int64) * stride_ag, seed_ptr, end, R, first_k, last_k, threshold,
        stride_xm, stride_xk, stride_ar, stride_ak, first_m, 0, DROPOUT, EVEN_K, PRECISION, BLOCK_M, BLOCK_R, BLOCK_K,
    )  # fmt: skip
    store_rows(s_ptr + split.to(tl.int64) * M * R, s, end, R, first_m, 0)


def group_down(
    x: torch.Tensor,
    a: torch.Tensor,
    offsets: torch.Tensor,
    config: PassConfig,
    *,
    mask: GroupMask = NO_GROUP_MASK,
    precision: str = "ieee",
) -> torch.Tensor:
    """S = (keep ∘ x) A_gᵀ, newly allocated (M, R), in x's dtype; rows without a group are not initialised.

    x: (M, K), any strides. a: (G, R, K), any strides, any float dtype, cast to x's. offsets: (G + 1,) int32, contiguous, ascending, from
    0 to M. config.splits divides K. precision: of float32 products, "ieee" or "tf32".

    Raises: ValueError for more ranks than the tiles support.
    """
    (m, k), (groups, r, _) = x.shape, a.shape
    if r > config.block_r:
        raise ValueError(f"a: expected at most {config.block_r} ranks, got {r}")
    chunk, splits = chunks(k, config.splits, config.block_k)
    s = empty(splits, m, r, dtype=x.dtype if splits == 1 else torch.float32, device=x.device)
    launch(
        _group_down_kernel,
        (m // config.block_m + groups, splits),
        x_ptr=x,
        a_ptr=a,
        s_ptr=s,
        offsets_ptr=offsets,
        M=m,
        G=groups,
        K=k,
        R=r,
        k_chunk=chunk,
        stride_xm=x.stride(0),
        stride_xk=x.stride(1),
        stride_ag=a.stride(0),
        stride_ar=a.stride(1),
        stride_ak=a.stride(2),
        EVEN_K=k % config.block_k == 0,
        PRECISION=precision,
        BLOCK_M=config.block_m,
        BLOCK_K=config.block_k,
        BLOCK_R=config.block_r,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **mask.arguments(x),
    )
    return s[0] if splits == 1 else sum_partials(s, x.dtype)


@triton.jit(do_not_specialize=["M", "G"])
def _group_up_kernel(
    out_ptr, low_ptr, up_ptr, scale_ptr, offsets_ptr, thresholds_ptr, seed_ptr, M, G, N,
    stride_om, stride_ug, stride_un, stride_ur,
    R: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Program (block, n): a tile of out. Neighbouring programs read the same columns of the factors of few groups."""
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    group, _, end, first_m = block_of(offsets_ptr, M, G, tl.program_id(0), BLOCK_M)
    if first_m >= end:
        return
    first_n = tl.program_id(1) * BLOCK_N
    o_m = (first_m + tl.arange(0, BLOCK_M)).to(tl.int64)
    o_n = first_n + tl.arange(0, BLOCK_N)
    p_out = out_ptr + o_m[:, None] * stride_om + o_n[None, :]
    mask = (o_m < end)[:, None] & (o_n < N)[None, :]
    out = tl.load(p_out, mask=mask, other=0.0)
    up_ptr += group.to(tl.int64) * stride_ug
    low = low_tile(low_ptr, end, first_m, 0, R, BLOCK_M, BLOCK_R)
    up = up_tile(up_ptr, N, stride_un, stride_ur, first_n, 0, R, DTYPE, BLOCK_R, BLOCK_N)
    term = rank_term(
        tl.zeros([BLOCK_M, BLOCK_N], tl.float32), low, up, low, low_ptr, up_ptr, end, N, tl.load(scale_ptr + group),
        stride_un, stride_ur, first_m, first_n, R, DTYPE, False, PRECISION, BLOCK_R,
    )  # fmt: skip
    if DROPOUT:
        term = drop(term, tl.load(seed_ptr), tl.load(thresholds_ptr + group), first_m, first_n)
    tl.store(p_out, (out.to(tl.float32) + term).to(DTYPE), mask=mask)


def group_up_(
    out: torch.Tensor,
    low: torch.Tensor,
    up: torch.Tensor,
    scale: torch.Tensor,
    offsets: torch.Tensor,
    config: GemmConfig,
    *,
    mask: GroupMask = NO_GROUP_MASK,
    precision: str = "ieee",
) -> None:
    """out += scale_g · keep ∘ (low up_gᵀ), in place; rows without a group stay as they are.

    out: (M, N), rows contiguous. low: (M, R), contiguous, out's dtype. up: (G, N, R), any strides, any float dtype. scale: (G,) float32,
    contiguous. config: block_m, block_n, block_r, num_warps and num_stages. offsets, precision: as in `group_down`.
    """
    (m, n), (groups, _, r) = out.shape, up.shape
    launch(
        _group_up_kernel,
        (m // config.block_m + groups, ceil_div(n, config.block_n)),
        out_ptr=out,
        low_ptr=low,
        up_ptr=up,
        scale_ptr=scale,
        offsets_ptr=offsets,
        M=m,
        G=groups,
        N=n,
        R=r,
        stride_om=out.stride(0),
        stride_ug=up.stride(0),
        stride_un=up.stride(1),
        stride_ur=up.stride(2),
        PRECISION=precision,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_R=config.block_r,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **mask.arguments(out),
    )
