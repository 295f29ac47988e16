"""Nested tensors: their rows as one matrix, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlora.errors import ConfigError


def on_rows(function: Callable[..., Tensor], first: Tensor, *others: Tensor) -> Tensor:
    """function(rows of each), where all are nested tensors of one structure, in that structure.

    A jagged tensor keeps its offsets, so that the result still fits other tensors that have them.

    Raises: ConfigError for a jagged tensor with holes or transposed, which `F.linear` does not support either.
    """
    nested: tuple[Any, ...] = (first, *others)
    if first.layout == torch.jagged:
        if any(t.lengths() is not None or t._ragged_idx != 1 for t in nested):
            raise ConfigError("input: expected a contiguous nested tensor, got one that is not")
        rows = function(*(t.values() for t in nested))
        return torch.nested.nested_tensor_from_jagged(rows, nested[0].offsets())
    rows = function(*(torch.cat(t.unbind()) for t in nested))
    lengths = [part.shape[0] for part in first.unbind()]
    return torch.nested.as_nested_tensor(torch.split(rows, lengths), layout=torch.strided)
