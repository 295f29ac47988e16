"""Rows of tokens by expert, and their sums, against indexing."""

import pytest
import torch

from fastlora.ops.routing import routing_of, rows_by_expert, sums_by_token
from tests.support.tolerance import assert_close

T, K, GROUPS = 9, 6, 4


def experts(k, seed=0):
    """Numbers of experts (T, k); 3 is none of the first three, and 2 has no token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor([0, 1, 3])[torch.randint(3, (T, k), generator=generator)]


@pytest.mark.parametrize("k", [1, 2, 3])
def test_rows_and_sums(k):
    chosen = experts(k)
    routing = routing_of(chosen, 3)
    assert routing.offsets.dtype == torch.int32 and len(routing.offsets) == 4
    tokens = torch.randn(T, K)
    rows = rows_by_expert(tokens, routing)
    weights = routing.in_rows(torch.arange(T * k).view(T, k))
    for expert in range(3):
        begin, end = routing.offsets[expert : expert + 2].tolist()
        assert (routing.ids[begin:end] == expert).all()
        where = (chosen == expert).nonzero()
        assert torch.equal(rows[begin:end], tokens[where[:, 0]])
        assert torch.equal(weights[begin:end], where[:, 0] * k + where[:, 1])
    assert routing.offsets[3] == (chosen < 3).sum()
    assert_close(sums_by_token(rows, routing, T), k * tokens, k * tokens.double())


def test_each_is_the_others_gradient():
    routing = routing_of(experts(2), 3)
    tokens = torch.randn(T, K, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(2 * T, K, dtype=torch.float64, requires_grad=True)
    for function, value in (
        (lambda t: rows_by_expert(t, routing), tokens),
        (lambda r: sums_by_token(r, routing, T), rows),
    ):
        assert torch.autograd.gradcheck(function, value)
        assert torch.autograd.gradgradcheck(function, value)
    (dx,) = torch.autograd.grad(rows_by_expert(tokens, routing), tokens, rows)
    assert torch.equal(dx, sums_by_token(rows, routing, T))


def test_gradients_are_gathered():
    """No operation adds to rows in an order of its own."""
    routing, seen = routing_of(experts(2), 3), []

    class Counter(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.__name__)
            return func(*args, **(kwargs or {}))

    tokens = torch.randn(T, K, requires_grad=True)
    with Counter():
        rows = rows_by_expert(tokens, routing)
        sums_by_token(rows * 2, routing, T).sum().backward()
    assert not [name for name in seen if "index_add" in name or "index_put" in name]
    torch.testing.assert_close(tokens.grad, torch.full((T, K), 4.0))


def test_functorch_and_no_tokens():
    routing = routing_of(experts(2), 3)
    batch = torch.randn(3, T, K)
    mapped = torch.func.vmap(lambda t: sums_by_token(rows_by_expert(t, routing), routing, T))(batch)
    assert_close(mapped, 2 * batch, 2 * batch.double())
    none = routing_of(torch.zeros(0, 2, dtype=torch.int64), 3)
    assert none.offsets.tolist() == [0, 0, 0, 0]
    assert sums_by_token(rows_by_expert(torch.randn(0, K), none), none, 0).shape == (0, K)
