"""The kernels of a gated MLP against float64, in Triton's interpreter or on a GPU; bfloat16 as in `test_kernels.py`."""

import pytest
import torch
from torch.nn import functional as F

from fastlora.kernels import gated, recording
from fastlora.kernels.backward import mask_pass
from fastlora.kernels.config import (
    ARCHITECTURES,
    GemmConfig,
    PassConfig,
    Problem,
    down_config,
    gated_config,
    gated_down_config,
    next_power_of_2,
    update_config,
)
from fastlora.kernels.dropout import NO_MASK, Mask
from fastlora.ops.dropout import kernel_mask
from tests.support.tolerance import assert_close

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SEED = -1234567890123
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda g: F.gelu(g, approximate="tanh"),
}
SMALL = GemmConfig(16, 32, 0, 16, 4, 2)
# M, N, rank, p; several tiles and blocks of ranks, sizes that fill none.
CASES = [(33, 40, 4, 0.3), (16, 32, 16, 0.0), (5, 65, 40, 0.6), (40, 33, 0, 0.0), (1, 1, 1, 0.0)]
pytestmark = pytest.mark.usefixtures("bfloat16")


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """New memory is filled with NaN, so that reading memory that was not written is detected."""

    def filled(*shape, dtype, device):
        return torch.full(shape, float("nan"), dtype=dtype, device=device)

    monkeypatch.setattr(gated, "empty", filled)
    recording._recordings.clear()


def make(case, dtype):
    """dy W, g, u, dS and A."""
    m, n, rank, _ = case
    generator = torch.Generator().manual_seed(2)
    shapes = (m, n), (m, n), (m, n), (m, rank), (rank, n)
    sizes = 1, 3, 1, 1, 1  # g: where the activations differ
    return [
        (size * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype).to(DEVICE)
        for shape, size in zip(shapes, sizes, strict=True)
    ]


def formula(base, g, u, ds, a, activation, scale, keep):
    """h, dg and du by autograd."""
    g, u = (t.detach().requires_grad_() for t in (g, u))
    h = ACTIVATIONS[activation](g) * u
    term = ds @ a
    if keep is not None:
        term = torch.where(keep, term, 0.0)
    dg, du = torch.autograd.grad(h, (g, u), base + scale * term)
    return h.detach(), dg, du


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernels_equal_the_formula(case, dtype, activation):
    m, n, rank, p = case
    tensors, scale = make(case, dtype), 1.75
    base, g, u, ds, a = tensors
    keep = bits = None
    if p:
        keep = kernel_mask(SEED, p, m, n, device=DEVICE)
        bits = mask_pass(m, n, Mask(torch.tensor(SEED, device=DEVICE), round(p * 65536)))
    wide = formula(*(t.double() for t in tensors), activation, scale, keep)
    same = formula(*tensors, activation, scale, keep)
    h = gated.gated_product(g, u, activation)
    adapter = {"ds": ds, "lora_a": a, "scale": scale, "bits": bits} if rank else {}
    if rank:
        mask = Mask(torch.tensor(SEED, device=DEVICE), round(p * 65536)) if p else NO_MASK
        tiles = gated_down_config(PassConfig(16, 0, 64, next_power_of_2(max(16, rank)), 4, 2, 2))
        found = gated.gated_down(g, u, activation, a, tiles, mask=mask)
        kept = h if keep is None else torch.where(keep, h, 0.0)
        s = kept.double() @ a.double().T
        assert torch.equal(found[0], h)
        assert_close(found[1], s.to(dtype), s)
    dh = base.clone()
    dg, du, again = gated.gated_gradients_(dh, g, u, activation, SMALL, **adapter)
    assert dg is dh and torch.equal(again, h)
    for got, other, want in zip((h, dg, du), same, wide, strict=True):
        assert_close(got, other, want)
    dg, du, none = gated.gated_gradients_(
        base.clone(), g, u, activation, SMALL, needs_h=False, **adapter
    )
    assert none is None
    for got, other, want in zip((dg, du), same[1:], wide[1:], strict=True):
        assert_close(got, other, want)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_values_are_torchs(activation):
    g = torch.tensor([-1e4, -300.0, -90.0, -20.0, 0.0, -0.0, 20.0, 90.0, 300.0, 1e4])[None]
    g, u = g.to(DEVICE), torch.full((1, 10), 2.0, device=DEVICE)
    h, dg, du = formula(
        torch.ones_like(g).double(), g.double(), u.double(), g.new_zeros(1, 0).double(),
        g.new_zeros(0, 10).double(), activation, 1.0, None,
    )  # fmt: skip
    assert_close(gated.gated_product(g, u, activation), h.float(), h)
    found = gated.gated_gradients_(torch.ones_like(g), g, u, activation, SMALL)
    assert_close(found[0], dg.float(), dg)
    assert_close(found[1], du.float(), du)


def test_strides_of_a_and_its_dtype():
    case = (33, 40, 4, 0.0)
    base, g, u, ds, a = make(case, torch.float16)
    wide = formula(*(t.double() for t in (base, g, u, ds, a)), "silu", 1.0, None)
    same = formula(base, g, u, ds, a, "silu", 1.0, None)
    for other in (a.float(), a.T.contiguous().T):
        dg, du, _ = gated.gated_gradients_(base.clone(), g, u, "silu", SMALL, ds=ds, lora_a=other)
        assert_close(dg, same[1], wide[1])
        assert_close(du, same[2], wide[2])


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("rank", [1, 16, 64, 256])
@pytest.mark.parametrize("aligned", [True, False])
def test_the_tables_tiles_are_powers_of_two(itemsize, rank, aligned):
    update = update_config(Problem(4096, 2048, 8192, rank, itemsize, True, aligned=aligned))
    config = gated_config(update, itemsize)
    for size in (config.block_m, config.block_n, config.block_r):
        assert size & (size - 1) == 0 and size >= 16


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("rank", [1, 16, 32, 64, 256])
@pytest.mark.parametrize("aligned", [True, False])
def test_the_tiles_of_the_pass_for_s_hold_all_ranks(arch, itemsize, rank, aligned):
    q = Problem(4096, 2048, 8192, rank, itemsize, True, aligned=aligned)
    config = gated_down_config(down_config(ARCHITECTURES[arch], q))
    assert config.block_r >= rank and not config.overlap
    assert config.block_k >= 16 and config.block_k & (config.block_k - 1) == 0
    assert config.block_m * config.block_k <= 16 * 32 * config.num_warps  # elements of a thread


def test_more_ranks_than_the_tiles_hold_are_refused():
    g = torch.randn(16, 32, device=DEVICE)
    with pytest.raises(ValueError, match="lora_a: expected at most 16 ranks, got 17"):
        gated.gated_down(
            g, g, "silu", torch.randn(17, 32, device=DEVICE), PassConfig(16, 0, 32, 16, 4, 2)
        )
