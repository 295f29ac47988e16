"""The oracle itself: against published Philox vectors, against autograd, and against finite differences."""

import pytest
import torch

from fastlora.ops import cpu_dropout, reference
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
    dropped = reference.apply_dropout(x, 0.5, 1)
    assert set(dropped.unique().tolist()) == {0.0, float("inf")}
    assert reference.apply_dropout(x, 0.0, 1) is x
    assert reference.apply_dropout(x, 0.5, None) is x


@pytest.mark.parametrize("case", [c for c in CASES if len(c.lead) == 1], ids=str)
def test_backward_equals_autograd(case: Case):
    t = make(case).to(torch.float64)
    leaves = [v.requires_grad_() for v in (t.x, t.lora_a, t.lora_b)]
    y, s = reference.forward(t.x, t.weight, t.bias, t.lora_a, t.lora_b, t.scaling, case.p, 11)
    expected = torch.autograd.grad(y, leaves, t.dy)
    got = reference.backward(t.dy, t.x, t.weight, t.lora_a, t.lora_b, s, t.scaling, case.p, 11)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_forward_is_the_formula_without_dropout():
    t = make(CASES[3]).to(torch.float64)
    y, s = reference.forward(t.x, t.weight, t.bias, t.lora_a, t.lora_b, t.scaling)
    merged = t.weight + t.scaling * t.lora_b @ t.lora_a
    torch.testing.assert_close(y, t.x @ merged.T + t.bias)
    torch.testing.assert_close(s, t.x @ t.lora_a.T)


@pytest.mark.parametrize(
    "shape", [(1, 1), (5, 8), (70, 21), (0, 8), (33, 768), (683, 768), (2500, 768)]
)
@pytest.mark.parametrize("seed", [3, -1, -(2**63)])
def test_the_blockwise_mask_of_the_cpu_is_the_same(shape, seed):
    blocks = [keep.clone() for _, keep, _ in cpu_dropout.keep_blocks(seed, 0.3, *shape)]
    whole = torch.cat(blocks) if blocks else torch.empty(shape, dtype=torch.bool)
    assert torch.equal(whole, reference.keep_mask(seed, 0.3, *shape))


def test_masks_made_at_the_same_time_do_not_share_buffers():
    first, second = (cpu_dropout.keep_blocks(seed, 0.3, 90, 24) for seed in (1, 2))
    for (_, one, work), (_, other, _) in zip(first, second, strict=True):
        work.fill_(float("nan"))
        assert torch.equal(one, reference.keep_mask(1, 0.3, 90, 24))
        assert torch.equal(other, reference.keep_mask(2, 0.3, 90, 24))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_scratch_of_a_block_has_its_shape_and_dtype(dtype):
    ((_, keep, work),) = cpu_dropout.keep_blocks(1, 0.3, 5, 21, dtype)
    assert keep.shape == (5, 21) and work.shape == (2, 5, 21) and work.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dropped_elements_are_zero_whatever_they_were_and_kept_ones_are_unchanged(dtype):
    x = torch.tensor([[1.5, -2.0, 3.0, -0.0], [float("inf"), -float("inf"), float("nan"), 7.0]])
    x = torch.cat([x, x], 1).to(dtype)[:, ::2].repeat(1, 2)
    x = torch.stack([x, x], 2).view(2, -1)[:, ::2]  # not contiguous, as rows of an input may be
    keep = torch.tensor([[True, False] * 4, [False, True] * 4])
    out = torch.full(x.shape, 5.0, dtype=dtype)
    assert cpu_dropout.zero_dropped(x, keep, out) is out
    assert torch.equal(out.isnan(), x.isnan() & keep)
    expected = torch.where(keep, x, 0.0)
    assert torch.equal(out.nan_to_num(), expected.nan_to_num())
    assert not out[~keep].signbit().any()
