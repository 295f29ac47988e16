"""The oracle itself: against published Philox vectors, against autograd, and against finite differences."""

import pytest
import torch

from fastlora.ops import reference
from fastlora.ops.reference import LowRank
from tests.support.cases import CASES, Case, make


# Known answers of Random123 (kat_vectors, philox4x32 10): counter, key -> words.
@pytest.mark.parametrize(
    ("counter", "seed", "words"),
    [
        ((0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ],
)
def test_philox_gives_the_published_words(counter, seed, words):
    c0, c1 = (torch.tensor([[c]]) for c in counter)
    got = reference.philox_4x32(seed, c0, c1)
    assert tuple(int(w) & 0xFFFFFFFF for w in got) == words


def _philox_in_python_integers(seed: int, c0: int, c1: int) -> list[int]:
    counter, key = [c0, c1, 0, 0], [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    for _ in range(10):
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            (b >> 32) ^ counter[1] ^ key[0],
            b & 0xFFFFFFFF,
            (a >> 32) ^ counter[3] ^ key[1],
            a & 0xFFFFFFFF,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return counter


@pytest.mark.parametrize("seed", [0, 1, -1, 2**62 + 12345, -(2**63), 0xDEADBEEFCAFE])
def test_keep_mask_is_the_documented_function_of_seed_row_and_column(seed):
    rows, cols, p = 3, 21, 0.3
    expected = torch.empty(rows, cols, dtype=torch.bool)
    for i in range(rows):
        for j in range(cols):
            word = _philox_in_python_integers(seed, j // 8, i + 5)[(j % 8) // 2]
            lane = (word >> 16) if j % 2 else (word & 0xFFFF)
            signed = lane - 65536 if lane >= 32768 else lane
            expected[i, j] = signed >= round(p * 65536) - 32768
    assert torch.equal(reference.keep_mask(seed, p, rows, cols, first_row=5), expected)
    assert torch.equal(
        reference.keep_mask(torch.tensor(seed), p, rows, cols, first_row=5), expected
    )


def test_keep_mask_does_not_depend_on_how_the_rows_are_cut():
    whole = reference.keep_mask(7, 0.4, 100, 50)
    parts = [reference.keep_mask(7, 0.4, 25, 50, first_row=r) for r in (0, 25, 50, 75)]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_keep_mask_keeps_the_right_share_independently_of_neighbours(p):
    keep = reference.keep_mask(3, p, 1000, 1000).double()
    # Five standard deviations of a mean of 10⁶ Bernoulli trials.
    assert abs(keep.mean().item() - (1 - p)) < 5 * (p * (1 - p) / 1e6) ** 0.5
    centred = keep - keep.mean()
    for shifted in (centred.roll(1, 0), centred.roll(1, 1), centred.roll(8, 1)):
        assert abs((centred * shifted).mean().item()) < 5 * p * (1 - p) / 1e3


def test_dropout_quantises_p_and_keeps_the_expectation():
    assert reference.dropout_threshold(0.1) == 6554
    assert reference.dropout_threshold(0.0) == 0
    assert reference.dropout_threshold(1e-9) == 0
    assert reference.dropout_threshold(0.9999999) == 65535
    assert reference.keep_scale(0.5) == 2.0
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
