"""The reference against autograd and finite differences."""

import pytest
import torch

from fastlora.ops import reference
from fastlora.ops.reference import LowRank
from tests.support.cases import CASES, Case, make


def test_a_dropped_element_is_zero_even_if_it_was_infinite():
    x = torch.full((4, 16), float("inf"))
    low, seed = LowRank(x, x, 1.0), torch.tensor(1)
    dropped = reference.apply_dropout(x, low._replace(p=0.5, seed=seed))
    assert set(dropped.unique().tolist()) == {0.0, float("inf")}
    assert reference.apply_dropout(x, low._replace(seed=seed)) is x
    assert reference.apply_dropout(x, low._replace(p=0.5)) is x
    keep = torch.arange(64).view(4, 16) % 2 == 0
    given = reference.apply_dropout(torch.ones(4, 16), low._replace(p=0.5, seed=seed), keep)
    assert torch.equal(given, 2.0 * keep)


@pytest.mark.parametrize("case", [c for c in CASES if len(c.lead) == 1], ids=str)
def test_backward_equals_autograd(case: Case):
    t = make(case).to(torch.float64)
    leaves = [v.requires_grad_() for v in (t.x, t.lora_a, t.lora_b)]
    low = LowRank(t.lora_a, t.lora_b, t.scaling, case.p, torch.tensor(11))
    y, s = reference.forward(t.x, t.weight, t.bias, low)
    expected = torch.autograd.grad(y, leaves, t.dy)
    got = reference.backward(t.dy, t.x, t.weight, low, s)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_forward_is_the_formula_without_dropout():
    t = make(CASES[3]).to(torch.float64)
    y, s = reference.forward(t.x, t.weight, t.bias, LowRank(t.lora_a, t.lora_b, t.scaling))
    merged = t.weight + t.scaling * t.lora_b @ t.lora_a
    torch.testing.assert_close(y, t.x @ merged.T + t.bias)
    torch.testing.assert_close(s, t.x @ t.lora_a.T)
