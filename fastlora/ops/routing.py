"""Rows of tokens in the order of their experts, and sums over the experts of each token.

Each is the other's gradient, and both only gather. torch's gradient of a gather adds rows instead: on a GPU by atomic operations, in an order that changes
from run to run, and in 16 bits slowly.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora.ops.dispatch import transformed


class Routing(NamedTuple):
    """The rows of T tokens with k experts each, sorted by expert.

    ids: (T k,), the expert of each row. token: the token of each row. place: the row of expert j of token t, at t k + j. offsets: (G + 1,) int32, where the
    rows of each expert begin; rows from offsets[G] on have none of the G experts.
    """

    ids: Tensor
    order: Tensor
    token: Tensor
    place: Tensor
    offsets: Tensor

    def in_rows(self, values: Tensor) -> Tensor:
        """values (T, k), one for each row."""
        return values.reshape(-1).index_select(0, self.order)


def routing_of(experts: Tensor, groups: int) -> Routing:
    """experts: (T, k), numbers of experts; those from `groups` on are none."""
    ids, order = torch.sort(experts.reshape(-1), stable=True)
    numbers = torch.arange(groups + 1, device=ids.device, dtype=ids.dtype)
    offsets = torch.searchsorted(ids, numbers, out_int32=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=order.device)
    return Routing(ids, order, order // experts.shape[1], place, offsets)


def rows_by_expert(tokens: Tensor, routing: Routing) -> Tensor:
    """The row of each token for each of its experts, (T k, K), for tokens (T, K)."""
    if transformed():
        return _rows(tokens, routing.token)
    found: Tensor = _Rows.apply(tokens, routing.token, routing.place)  # type: ignore[no-untyped-call]
    return found


def sums_by_token(rows: Tensor, routing: Routing, tokens: int) -> Tensor:
    """The sum of the rows of each token, (T, K), for rows (T k, K)."""
    if transformed():
        return _sums(rows, routing.place, tokens)
    found: Tensor = _Sums.apply(rows, routing.token, routing.place, tokens)  # type: ignore[no-untyped-call]
    return found


def _rows(tokens: Tensor, token: Tensor) -> Tensor:
    return tokens.index_select(0, token)


def _sums(rows: Tensor, place: Tensor, tokens: int) -> Tensor:
    k = place.numel() // max(1, tokens)
    return rows.index_select(0, place).view(tokens, k, rows.shape[1]).sum(1)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, token: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(token, place)
        ctx.tokens = tokens.shape[0]
        return _rows(tokens, token)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _Sums.apply(dy, *ctx.saved_tensors, ctx.tokens), None, None  # type: ignore[no-untyped-call]


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, token: Tensor, place: Tensor, tokens: int) -> Tensor:
        ctx.save_for_backward(token, place)
        return _sums(rows, place, tokens)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _Rows.apply(dy, *ctx.saved_tensors), None, None, None  # type: ignore[no-untyped-call]
