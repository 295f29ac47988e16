"""Low-rank products of a batch whose rows belong to groups, each with its own factors, by Triton kernels.

    S = (keep ∘ x) A_gᵀ          y += scale_g · S B_gᵀ                        forward
    dS = dy B_g                  dB_g = scale_g · dyᵀ S                       backward
    dA_g = scale_g · dSᵀ (keep ∘ x)      dx += scale_g · keep ∘ (dS A_g)

Rows `offsets[g]` … `offsets[g + 1] − 1` of x, y, dy, dx, S and dS belong to group g, which may be empty. Rows before `offsets[0]` and from
`offsets[G]` on belong to none: y and dx stay as they are there, S and dS are undefined. The offsets stay on the device: nothing waits for
it, and one CUDA graph serves all sizes of the groups.

Common arguments:
    a: (G, R, K), b: (G, N, R), any strides, any float dtype, cast to x's. Ranks above a group's own are filled with zeros. R ≤ 128.
    scale: (G,) float32, alpha / rank / (1 − p') with p' the quantised dropout probability; S and dS do not include it.
    offsets: (G + 1,) int32, ascending, from 0 to M. Its values are not checked, since that would wait for the device.
    seed, thresholds: the dropout mask of (seed, row, column) as in `dropout.kernel_mask`; 0-d int64, and (G,) int32 or int64 in units
        of 2⁻¹⁶, 0 for none. Both or neither.

Every function raises ConfigError for other shapes, dtypes, layouts or devices, and BackendError if the device has no kernels. Autograd
does not see them. Importing this module imports Triton.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastlora.errors import BackendError, ConfigError
from fastlora.kernels.config import (
    DY_RANK,
    GROUPED_RANK,
    Architecture,
    GroupedTiles,
    Problem,
    grouped_tiles,
)
from fastlora.kernels.grouped import GroupMask, group_down, group_up_
from fastlora.kernels.grouped_backward import group_dy, group_x
from fastlora.kernels.recording import empty
from fastlora.ops import dispatch
from fastlora.ops.triton.linear import current

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def grouped_s(
    x: Tensor,
    a: Tensor,
    offsets: Tensor,
    *,
    seed: Tensor | None = None,
    thresholds: Tensor | None = None,
) -> Tensor:
    """S = (keep ∘ x) A_gᵀ, newly allocated (M, R), in x's dtype, as the plan `split` keeps it: an operand of 16-bit products.

    x: (M, K), any strides, fp16, bf16 or fp32.
    """
    groups, rank = _sizes("a", a, "x", x, offsets, columns=2)
    mask = _mask(x, groups, seed, thresholds)
    if 0 in (x.shape[0], groups):
        return empty(x.shape[0], rank, dtype=x.dtype, device=x.device)
    with current(x):
        s: Tensor = group_down(
            x, a, offsets, _tiles(x, rank, groups).down, mask=mask, precision=_precision(x)
        )
    return s


def grouped_add_(y: Tensor, s: Tensor, b: Tensor, scale: Tensor, offsets: Tensor) -> Tensor:
    """y += scale_g · S B_gᵀ, in place, added in float32 and rounded once. Returns y.

    y: (M, N), rows contiguous, any row stride, fp16, bf16 or fp32. s: (M, R), contiguous, y's dtype.
    """
    groups, rank = _sizes("b", b, "y", y, offsets, columns=1)
    _rows_contiguous("y", y)
    _low("s", s, y, rank)
    _scale(scale, y, groups)
    if 0 not in (y.shape[0], groups):
        with current(y):
            up = _tiles(y, rank, groups).up
            group_up_(y, s, b, scale, offsets, up, precision=_precision(y))
    return y


def grouped_ds_db(
    dy: Tensor,
    s: Tensor,
    b: Tensor,
    scale: Tensor,
    offsets: Tensor,
    *,
    needs_ds: bool = True,
    needs_db: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """dS = dy B_g (M, R) in dy's dtype and dB_g = scale_g · dyᵀ S (G, N, R) in b's, newly allocated; None for what is not needed.

    dy: (M, N), any strides, fp16, bf16 or fp32. s: (M, R), contiguous, dy's dtype, from `grouped_s`; read for dB only.
    dy is read once up to rank 32, above that once for each result.
    """
    groups, rank = _sizes("b", b, "dy", dy, offsets, columns=1)
    _low("s", s, dy, rank)
    _scale(scale, dy, groups)
    if 0 in (dy.shape[0], groups):
        ds = torch.empty_like(s) if needs_ds else None
        return ds, torch.zeros_like(b, memory_format=torch.contiguous_format) if needs_db else None
    tiles, precision = _tiles(dy, rank, groups), _precision(dy)
    found: tuple[Tensor | None, Tensor | None]
    with current(dy):
        if rank <= DY_RANK and (needs_ds or needs_db):
            found = group_dy(
                dy, b, s, scale, offsets, tiles.dy, needs_ds=needs_ds, needs_db=needs_db, precision=precision
            )  # fmt: skip
            return found
        # The partial sums of one pass would take longer than a second pass.
        ds = group_down(dy, b.mT, offsets, tiles.down, precision=precision) if needs_ds else None
        db = None
        if needs_db:
            named: dict[str, Any] = {"transposed": True, "precision": precision}
            db = group_x(dy, s, scale, offsets, b.dtype, tiles.x, **named)
    return ds, db


def grouped_da_dx_(
    dx: Tensor | None,
    x: Tensor,
    ds: Tensor,
    a: Tensor,
    scale: Tensor,
    offsets: Tensor,
    *,
    seed: Tensor | None = None,
    thresholds: Tensor | None = None,
    needs_da: bool = True,
) -> Tensor | None:
    """dx += scale_g · keep ∘ (dS A_g), in place, added in float32 and rounded once. Returns dA_g = scale_g · dSᵀ (keep ∘ x), newly
    allocated (G, R, K), in a's dtype, or None without `needs_da`.

    dx: (M, K), rows contiguous, any row stride, x's dtype; None if it is not needed. x: (M, K), any strides, fp16, bf16 or fp32; read for
    dA only. ds: (M, R), contiguous, x's dtype, from `grouped_ds_db`.
    """
    groups, rank = _sizes("a", a, "x", x, offsets, columns=2)
    mask = _mask(x, groups, seed, thresholds)
    if dx is not None:
        if dx.shape != x.shape or dx.dtype != x.dtype or dx.device != x.device:
            raise ConfigError(f"dx: expected {_words(x)}, as x, got {_words(dx)}")
        _rows_contiguous("dx", dx)
    _low("ds", ds, x, rank)
    _scale(scale, x, groups)
    if 0 in (x.shape[0], groups):
        return torch.zeros_like(a, memory_format=torch.contiguous_format) if needs_da else None
    tiles, precision = _tiles(x, rank, groups, dx), _precision(x)
    named: dict[str, Any] = {"mask": mask, "precision": precision}
    da: Tensor | None = None
    with current(x):
        if needs_da:
            da = group_x(x, ds, scale, offsets, a.dtype, tiles.x, **named)
        if dx is not None:
            group_up_(dx, ds, a.mT, scale, offsets, tiles.up, **named)
    return da


def _tiles(large: Tensor, rank: int, groups: int, other: Tensor | None = None) -> GroupedTiles:
    """The tiles of a pass over `large`, and over `other` of the same shape."""
    arch = dispatch.device_architecture(large.device)
    if arch is None:
        raise BackendError(f"no kernel was compiled for the GPU of {large.device}")
    m, columns = large.shape
    aligned = dispatch.is_aligned(large) and (other is None or dispatch.is_aligned(other))
    return _cached_tiles(
        arch, dispatch.bucket(m), columns, rank, groups, large.element_size(), _precision(large), aligned
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _cached_tiles(
    arch: Architecture,
    m: int,
    columns: int,
    rank: int,
    groups: int,
    itemsize: int,
    precision: str,
    aligned: bool,
) -> GroupedTiles:
    # Every pass reads one large matrix: its columns are both N and K.
    q = Problem(m, columns, columns, rank, itemsize, False, precision, aligned)
    return grouped_tiles(arch, q, groups)


def _precision(x: Tensor) -> str:
    return dispatch.product_precision(x)


def _words(t: Tensor) -> str:
    return f"{tuple(t.shape)} {t.dtype} on {t.device}"


def _sizes(
    name: str, factor: Tensor, rows: str, large: Tensor, offsets: Tensor, *, columns: int
) -> tuple[int, int]:
    """(G, R) of a factor, after checks. name, rows: of the arguments. columns: the factor's dimension of the size of a row of `large`.

    Raises: ConfigError.
    """
    if large.ndim != 2 or large.shape[1] == 0 or large.dtype not in _DTYPES:
        expected = "two dimensions, 1 or more columns, fp16, bf16 or fp32"
        raise ConfigError(f"{rows}: expected {expected}, got {_words(large)}")
    rank = 3 - columns
    if (
        factor.ndim != 3
        or factor.shape[columns] != large.shape[1]
        or not 1 <= factor.shape[rank] <= GROUPED_RANK
        or not factor.dtype.is_floating_point
        or factor.device != large.device
    ):
        size = str(large.shape[1])
        shape = f"(G, R, {size})" if columns == 2 else f"(G, {size}, R)"
        raise ConfigError(
            f"{name}: expected {shape} of 1 to {GROUPED_RANK} ranks, floating point, on {large.device}, got {_words(factor)}"
        )
    groups = factor.shape[0]
    _vector("offsets", offsets, groups + 1, (torch.int32,), large)
    return groups, factor.shape[rank]


def _vector(
    name: str, vector: Tensor, size: int, dtypes: tuple[torch.dtype, ...], large: Tensor
) -> None:
    fits = vector.shape == (size,) and vector.dtype in dtypes and vector.device == large.device
    if not fits or not vector.is_contiguous():
        wanted = " or ".join(map(str, dtypes))
        raise ConfigError(
            f"{name}: expected ({size},) {wanted} on {large.device}, contiguous, got {_words(vector)}"
        )


def _scale(scale: Tensor, large: Tensor, groups: int) -> None:
    _vector("scale", scale, groups, (torch.float32,), large)


def _low(name: str, low: Tensor, large: Tensor, rank: int) -> None:
    fits = low.shape == (large.shape[0], rank) and low.dtype == large.dtype
    if not fits or low.device != large.device or not low.is_contiguous():
        wanted = f"{(large.shape[0], rank)} {large.dtype} on {large.device}, contiguous"
        raise ConfigError(f"{name}: expected {wanted}, got {_words(low)}")


def _rows_contiguous(name: str, out: Tensor) -> None:
    rows, columns = out.shape
    if (columns > 1 and out.stride(1) != 1) or (rows > 1 and out.stride(0) < columns):
        raise ConfigError(
            f"{name}: expected contiguous rows that do not overlap, got strides {out.stride()}"
        )


def _mask(large: Tensor, groups: int, seed: Tensor | None, thresholds: Tensor | None) -> GroupMask:
    if (seed is None) != (thresholds is None):
        raise ConfigError("seed, thresholds: expected both or neither")
    if seed is None or thresholds is None:
        return GroupMask()
    if seed.shape != () or seed.dtype != torch.int64 or seed.device != large.device:
        raise ConfigError(f"seed: expected () torch.int64 on {large.device}, got {_words(seed)}")
    _vector("thresholds", thresholds, groups, (torch.int32, torch.int64), large)
    return GroupMask(seed, thresholds)
