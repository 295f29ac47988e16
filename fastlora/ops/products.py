"""Products and other functions of tensors that torch computes, most of them in a call of the Triton path: `fastlora.kernels.recording.library` calls them again."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from fastlora.errors import ConfigError

_GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def add_forward(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return y.addmm_(x, weight.T)  # [M, K] @ [K, N] -> [M, N]


def add_backward(dx: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
    return dx.addmm_(dy, weight)  # [M, N] @ [N, K] -> [M, K]


def contiguous(tensor: Tensor) -> Tensor:
    return tensor.contiguous()


def with_product(y: Tensor, one: Tensor, other: Tensor, scale: float) -> Tensor:
    """y + scale · one @ other, (M, N) + (M, R) @ (R, N), in y's memory.

    New in compiled code: torch 2.11 gives no gradient to a result that the forward pass of an autograd function changed in place.
    """
    if torch.compiler.is_compiling():
        return torch.addmm(y, one, other, alpha=scale)
    return y.addmm_(one, other, alpha=scale)


def is_loadable(matrix: Tensor, dtype: torch.dtype) -> bool:
    """Whether a kernel reads the matrix by descriptors: in `dtype`, rows contiguous, its start at a multiple of 16 bytes."""
    return matrix.dtype == dtype and matrix.is_contiguous() and matrix.data_ptr() % 16 == 0


def loadable(dtype: torch.dtype, matrix: Tensor) -> Tensor:
    """A copy for which `is_loadable` holds."""
    return torch.empty(matrix.shape, dtype=dtype, device=matrix.device).copy_(matrix)


def ds_product(dy: Tensor, lora_b: Tensor) -> Tensor:
    return dy @ lora_b.to(dy.dtype)  # [M, N] @ [N, R] -> [M, R]


def db_product(dtype: torch.dtype, scale: float, dy: Tensor, s: Tensor) -> Tensor:
    """[N, M] @ [M, R] -> (1, N, R): the only part of the sum."""
    return (dy.T @ s).to(dtype).mul_(scale)[None]


def columns(first: int, count: int, matrix: Tensor) -> Tensor:
    return matrix[:, first : first + count].contiguous()


def in_rows(*matrices: Tensor) -> Tensor:
    return torch.cat(matrices)


def in_columns(*matrices: Tensor) -> Tensor:
    return torch.cat(matrices, 1)


def times(factor: float, matrix: Tensor) -> Tensor:
    return factor * matrix


def output_without_adapters(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, base: Tensor | None
) -> Tensor:
    """The output of the wrapped layer (M, N), newly allocated; a copy of `base` without a weight."""
    if weight is not None:
        return F.linear(x, weight, bias)  # [M, K] @ [K, N] -> [M, N]
    assert base is not None
    return base.clone()


def without_adapters(x: Tensor, dy: Tensor, weight: Tensor | None) -> Tensor:
    """dx (M, K) of the base product; zeros without a weight."""
    return torch.zeros_like(x) if weight is None else dy @ weight  # [M, N] @ [N, K] -> [M, K]


def stacked_rows(rank: int, places: Sequence[int | None], *matrices: Tensor) -> Tensor:
    """The matrix (r, K) of each place, (G, rank, K), with zeros for rows that it lacks and for None."""
    if None not in places and all(matrix.shape[0] == rank for matrix in matrices):
        return torch.stack([matrices[place] for place in places if place is not None])
    found = matrices[0].new_zeros(len(places), rank, matrices[0].shape[1])
    for group, place in enumerate(places):
        if place is not None:
            found[group, : matrices[place].shape[0]] = matrices[place]
    return found


def stacked_columns(rank: int, places: Sequence[int | None], *matrices: Tensor) -> Tensor:
    """The matrix (N, r) of each place, (G, N, rank), as `stacked_rows`."""
    if None not in places and all(matrix.shape[1] == rank for matrix in matrices):
        return torch.stack([matrices[place] for place in places if place is not None])
    found = matrices[0].new_zeros(len(places), matrices[0].shape[0], rank)
    for group, place in enumerate(places):
        if place is not None:
            found[group, :, : matrices[place].shape[1]] = matrices[place]
    return found


def groups_of(offsets: Tensor, m: int) -> list[tuple[int, int, int]]:
    """(group, first row, last + 1) of each group that has rows, of the m rows of x. Waits for the offsets' device.

    Raises: ConfigError unless the offsets ascend from 0 to at most m.
    """
    bounds = offsets.tolist()
    if bounds[0] != 0 or bounds[-1] > m or any(one > other for one, other in pairwise(bounds)):
        raise ConfigError(
            f"offsets: expected ascending numbers from 0 to at most {m}, got {bounds}"
        )
    pairs = enumerate(pairwise(bounds))
    return [(group, start, stop) for group, (start, stop) in pairs if start < stop]


def grouped_product(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    groups: Sequence[tuple[int, int, int]] | None = None,
) -> Tensor:
    """x W_gᵀ in the rows of each group, zeros in the rows of none: (M, N) for x (M, K) and weight (G, N, K), newly allocated.

    One operation of torch, where it has one (`has_grouped_mm`); on a GPU it waits for nothing. Elsewhere one product for each group; without
    groups, which `groups_of` finds, these wait for the device once.
    """
    m, n = x.shape[0], weight.shape[1]
    if groups is None and x.device.type == "cpu":
        groups = groups_of(offsets, m)
    if has_grouped_mm(x, weight):
        y: Tensor = torch._grouped_mm(x, weight.mT, offs=offsets[1:])
        # It leaves the other rows undefined.
        if groups is not None:
            y[groups[-1][2] if groups else 0 :].zero_()
            return y
        rows = torch.arange(m, dtype=offsets.dtype, device=x.device)
        return y.masked_fill_((rows >= offsets[-1])[:, None], 0)
    y, end = x.new_empty(m, n), 0
    for group, start, end in groups_of(offsets, m) if groups is None else groups:
        torch.mm(x[start:end], weight[group].T, out=y[start:end])  # [rows, K] @ [K, N]
    y[end:].zero_()
    return y


def has_grouped_mm(x: Tensor, weight: Tensor) -> bool:
    """Whether torch multiplies x (M, K) by weight (G, N, K) faster than a loop over the groups.

    On a GPU in bfloat16 on sm_90, and on sm_100 since torch 2.10: one kernel. For other dtypes and GPUs `torch._grouped_mm` is a loop that
    waits for the device, or does not exist. On a CPU since torch 2.10: a loop without Python. All matrices must have rows or columns at
    multiples of 16 bytes.

    Source: torch/nn/functional.py, aten/src/ATen/native/cuda/GroupedBlas.cpp and aten/src/ATen/native/GroupedMMUtils.h of PyTorch 2.10.
    """
    if x.device.type == "cpu":
        supported = hasattr(F, "grouped_mm") and x.dtype in _GROUPED_DTYPES
    elif x.device.type == "cuda" and torch.version.hip is None and x.dtype == torch.bfloat16:
        major, _ = torch.cuda.get_device_capability(x.device)
        supported = hasattr(torch, "_grouped_mm") and (
            major == 9 or (major == 10 and hasattr(F, "grouped_mm"))
        )
    else:
        supported = False
    if not supported or x.shape[0] == 0:
        return False
    groups, n, k = weight.shape
    unit = 16 // x.element_size()
    return groups < 1024 and n % unit == k % unit == 0 and all(map(_is_multiplied, (x, weight)))


def _is_multiplied(matrix: Tensor) -> bool:
    """Whether `torch._grouped_mm` reads it: one of the last dimensions contiguous, everything else at multiples of 16 bytes."""
    *others, pitch, stride = matrix.stride()
    if stride != 1:
        pitch, stride = stride, pitch
    unit = 16 // matrix.element_size()
    aligned = all(one > 0 and one % unit == 0 for one in (pitch, *others))
    return stride == 1 and aligned and matrix.data_ptr() % 16 == 0
