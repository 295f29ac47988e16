"""What torch computes in a call of the Triton path: functions of tensors for `fastlora.kernels.recording.library`, which a repeated call calls again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def add_forward(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return y.addmm_(x, weight.T)  # [M, K] @ [K, N] -> [M, N]


def add_backward(dx: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
    return dx.addmm_(dy, weight)  # [M, N] @ [N, K] -> [M, K]


def contiguous(tensor: Tensor) -> Tensor:
    return tensor.contiguous()


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
