"""A gated MLP in one call through the kernels against float64, in Triton's interpreter or on a GPU."""

import copy
import dataclasses
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastlora.layers.gated as module
from fastlora import LoRAConfig, freeze_base_params, fuse, get_lora_params, inject_lora
from fastlora.errors import BackendError
from fastlora.kernels import recording
from fastlora.ops import dispatch
from fastlora.ops.dispatch import choose_gated
from fastlora.ops.dropout import kernel_mask
from fastlora.ops.gated import gated_mlp
from fastlora.ops.linear import low_rank
from fastlora.ops.reference import Layer, forward
from fastlora.ops.triton import gated as triton_gated
from fastlora.ops.triton.linear import run_forward
from tests.support.models import randomise_adapters
from tests.support.tolerance import assert_close

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
K, N, P = 32, 48, 40
SEED, OTHER, THIRD = (torch.tensor(n, device=DEVICE) for n in (5, -7, 2**40))
CASES = {  # ranks, p and seeds of gate, up and down
    "plain": ((4, 4, 4), (0.0, 0.0, 0.0), (None, None, None)),
    "dropout": ((4, 2, 3), (0.3, 0.3, 0.3), (SEED, SEED, OTHER)),
    "other dropout": ((4, 2, 3), (0.3, 0.1, 0.5), (SEED, OTHER, THIRD)),
    "ranks above those of a pass over dy": ((40, 36, 40), (0.3, 0.3, 0.2), (SEED, SEED, OTHER)),
    "up": ((0, 4, 0), (0.0, 0.2, 0.0), (None, SEED, None)),
    "down": ((0, 0, 4), (0.0, 0.0, 0.2), (None, None, SEED)),
    "gate and down": ((4, 0, 2), (0.2, 0.0, 0.2), (SEED, None, OTHER)),
}
NAMES = [f"{layer} {part}" for layer in ("gate", "up", "down") for part in ("W", "b", "A", "B")]
pytestmark = pytest.mark.usefixtures("bfloat16")


def make(case, dtype, factors=None):
    """x, dy, and weight, bias, A and B of gate, up and down, some of them None."""
    generator = torch.Generator().manual_seed(4)

    def draw(*shape, size=1.0, dtype=dtype):
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * size
        return values.bfloat16().to(DEVICE, dtype).requires_grad_()

    parts = []
    for (n, k), rank in zip(((N, K), (N, K), (P, N)), CASES[case][0], strict=True):
        parts += [draw(n, k, size=k**-0.5), draw(n)]
        parts += [draw(rank, k, size=k**-0.5, dtype=factors or dtype)]
        parts += [draw(n, rank, dtype=factors or dtype)]
    return draw(2, 40, K), draw(2, 40, P).detach(), parts  # with fewer rows the plan is `decode`


def layers_of(case, parts):
    _, ps, seeds = CASES[case]
    return [
        Layer(*parts[i : i + 2], low_rank(*parts[i + 2 : i + 4], 1.5, p, seed))
        for i, p, seed in zip((0, 4, 8), ps, seeds, strict=True)
    ]


def formula(case, x, parts, activation):
    def linear(x, layer):
        weight, bias, low = layer
        rows, low = x.flatten(0, -2), low.to(x.dtype)
        keep = None
        if low.seed is not None:
            keep = kernel_mask(low.seed, low.p, *rows.shape, device=x.device)
        return forward(rows, weight, bias, low, keep)[0].view(*x.shape[:-1], -1)

    gate, up, down = layers_of(case, parts)
    act = {"silu": nn.SiLU(), "gelu": nn.GELU(), "gelu_tanh": nn.GELU("tanh")}[activation]
    return linear(act(linear(x, gate)) * linear(x, up), down)


def gradients(y, dy, x, parts):
    return torch.autograd.grad(y, [x, *parts], dy.to(y.dtype), allow_unused=True)


@pytest.fixture(autouse=True)
def _forgotten():
    recording._recordings.clear()
    recording._seen.clear()


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_the_output_and_all_gradients(case, dtype, activation):
    x, dy, parts = make(case, dtype, torch.float32 if case == "dropout" else None)
    wide_x, *wide = (t.detach().double().requires_grad_() for t in (x, *parts))
    want = formula(case, wide_x, wide, activation)
    same = formula(case, x, parts, activation)
    wants, sames = gradients(want, dy, wide_x, wide), gradients(same, dy, x, parts)
    for _ in range(4):  # later calls take the steps of an earlier one
        got = gated_mlp(x, *layers_of(case, parts), activation, triton=True)
        assert_close(got, same, want)
        found = gradients(got, dy, x, parts)
        for name, g, s, w in zip(["x", *NAMES], found, sames, wants, strict=True):
            if w is not None and w.numel():
                assert_close(g, s, w, name)
    with torch.no_grad():
        again = gated_mlp(x, *layers_of(case, parts), activation, triton=True)
    assert torch.equal(again, got)


def force(monkeypatch, change):
    """Let `change` replace the choice for down: change(launch_choice, arguments)."""
    original = dispatch.launch_choice

    def forced(x, weight, *rest):
        return (
            change(original, x, weight, *rest)
            if weight.shape == (P, N)
            else original(x, weight, *rest)
        )

    monkeypatch.setattr(dispatch, "launch_choice", forced)


@pytest.mark.parametrize("plan", ["split", "in_place", "accumulate", "fused", "decode"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_plan_of_down(plan, dtype, monkeypatch):
    case = "plain" if plan == "fused" else "dropout"
    x, dy, parts = make(case, dtype)
    if plan == "decode":
        x, dy = x.detach()[:, :20].requires_grad_(), dy[:, :20]
    wide_x, *wide = (t.detach().double().requires_grad_() for t in (x, *parts))
    want, same = formula(case, wide_x, wide, "silu"), formula(case, x, parts, "silu")
    wants, sames = gradients(want, dy, wide_x, wide), gradients(same, dy, x, parts)

    def change(original, x, weight, rank, dropout, _=None, *dy):
        return original(x, weight, rank, dropout, plan, *dy)

    force(monkeypatch, change)
    passes = mock.Mock(wraps=triton_gated.gated_down)
    monkeypatch.setattr(triton_gated, "gated_down", passes)
    got = gated_mlp(x, *layers_of(case, parts), "silu", triton=True)
    assert passes.call_count == (plan not in ("fused", "decode"))
    assert_close(got, same, want)
    found = gradients(got, dy, x, parts)
    for name, g, s, w in zip(["x", *NAMES], found, sames, wants, strict=True):
        assert_close(g, s, w, name)


def test_the_product_does_not_overlap_the_pass_that_computes_its_input(monkeypatch):
    """A launch that overlaps the one before it reads x at once."""
    x, _, parts = make("dropout", torch.float16)

    def change(original, x, weight, rank, dropout, *_):
        choice = original(x, weight, rank, dropout, "split")
        return dataclasses.replace(choice, config=choice.config.overlapped())

    force(monkeypatch, change)
    used = []

    def run(choice, *arguments):
        used.append(choice)
        return run_forward(choice, *arguments)

    monkeypatch.setattr(triton_gated, "run_forward", run)
    gated_mlp(x, *layers_of("dropout", parts), "silu", triton=True)
    assert [choice.config.split.overlap for choice in used] == [False]


@pytest.mark.parametrize("case", ["dropout", "up"])
def test_a_recording_serves_one_activation(case):
    x, dy, parts = make(case, torch.float32)
    want = {}
    for _ in range(3):
        for activation in ("silu", "gelu", "gelu_tanh"):
            y = gated_mlp(x, *layers_of(case, parts), activation, triton=True)
            found = [y, *gradients(y, dy, x, parts)]
            for one, other in zip(found, want.setdefault(activation, found), strict=True):
                assert one is other is None or torch.equal(one, other)
    assert len({y.sum().item() for y, *_ in want.values()}) == 3


@pytest.mark.parametrize("trained", [[i] for i in range(12)] + [[2, 3, 10], [6, 11]])
@pytest.mark.parametrize("with_x", [False, True])
def test_only_what_is_needed_has_a_gradient(trained, with_x):
    x, dy, full = make("dropout", torch.float32)
    want = gradients(gated_mlp(x, *layers_of("dropout", full), "silu", triton=True), dy, x, full)
    parts = [t.detach().requires_grad_(i in trained) for i, t in enumerate(full)]
    x = x.detach().requires_grad_(with_x)
    gated_mlp(x, *layers_of("dropout", parts), "silu", triton=True).backward(dy)
    for got, expected in zip([x, *parts], want, strict=True):
        assert (got.grad is not None) == got.requires_grad
        if got.grad is not None:
            torch.testing.assert_close(got.grad, expected)


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(K, N), nn.Linear(K, N), nn.Linear(N, K)

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def adapted(dropout):
    torch.manual_seed(0)
    model = nn.ModuleDict({"mlp": MLP()})
    config = LoRAConfig("all-linear", rank=3, dropout=dropout, backend="triton")
    inject_lora(model, config)
    randomise_adapters(model)
    freeze_base_params(model)
    return model["mlp"].to(DEVICE)


@pytest.mark.filterwarnings(
    "ignore:invalid value encountered:RuntimeWarning"
)  # NumPy's, for infinite inputs
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_model_through_the_kernels_with_checkpointing(reentrant, monkeypatch):
    calls, original = [], gated_mlp
    monkeypatch.setattr(
        module, "gated_mlp", lambda *a, **named: calls.append(named) or original(*a, **named)
    )
    x = torch.randn(80, K).to(DEVICE)
    plain = adapted(0.4)
    assert fuse(plain, x).blocks == (("gate", "up", "down"),)
    found = []
    for run in (plain, lambda v: checkpoint(plain, v, use_reentrant=reentrant)):
        leaf = x.clone().requires_grad_()
        plain.zero_grad()
        torch.manual_seed(3)
        run(leaf).sin().sum().backward()
        found.append([leaf.grad, *(p.grad for p in get_lora_params(plain))])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    assert calls == [{"triton": True}] * 3


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_few_rows_and_refused_ranks_run_separately(monkeypatch):
    called = []
    monkeypatch.setattr(module, "gated_mlp", lambda *_, **__: called.append(1))
    model = adapted(0.0)
    twin = copy.deepcopy(model)
    assert fuse(model, torch.randn(80, K).to(DEVICE)).blocks
    x = torch.randn(4, K).to(DEVICE)  # the plan is `decode`
    assert torch.equal(model(x), twin(x)) and not called
    weights = [layer.matrix for layer in (model.gate, model.up, model.down)]
    choice = choose_gated(
        x.new_empty(80, K), weights, (200, 56, 256), dropout=False, backend="triton"
    )
    assert choice.backend == "triton" and choice.config is not None
    for ranks in ((200, 57, 4), (4, 4, 257)):
        assert choose_gated(x, weights, ranks, dropout=False, backend="triton") is None
    with pytest.raises(BackendError, match="backend='triton' cannot run"):
        model.double().gate(x.double())
