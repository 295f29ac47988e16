"""A gated MLP in one call computes what its three layers compute, and keeps less."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastlora import lora_linear
from fastlora.ops import reference
from fastlora.ops.dropout import keep_mask
from fastlora.ops.gated import ACTIVATIONS, gated_mlp
from fastlora.ops.linear import low_rank
from fastlora.ops.reference import Layer
from tests.support.tolerance import assert_close

K, N, P = 24, 40, 32
NAMES = [f"{layer} {part}" for layer in ("gate", "up", "down") for part in ("W", "b", "A", "B")]
PLAIN = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda g: F.gelu(g, approximate="tanh"),
}


def tensors(ranks, dtype=torch.float64, bias=True, seed=0):
    """Weight, bias, A and B of gate, up and down, of values that every dtype represents."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, size=1.0):
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * size
        return values.bfloat16().to(dtype).requires_grad_()

    found = []
    for (n, k), r in zip(((N, K), (N, K), (P, N)), ranks, strict=True):
        found += [
            draw(n, k, size=k**-0.5),
            draw(n) if bias else None,
            draw(r, k, size=k**-0.5),
            draw(n, r),
        ]
    return found


def layers_of(parts, ps, seeds):
    return [
        Layer(*parts[i : i + 2], low_rank(*parts[i + 2 : i + 4], 0.5 + i / 4, p, seed))
        for i, p, seed in zip((0, 4, 8), ps, seeds, strict=True)
    ]


def block(x, parts, ps, seeds, activation):
    return gated_mlp(x, *layers_of(parts, ps, seeds), activation)


def separate(x, parts, ps, seeds, activation):
    """The three layers as three calls."""
    gate, up, down = (
        lambda x, weight=weight, bias=bias, low=low: (
            lora_linear(x, weight, bias, *low) if low.rank() else F.linear(x, weight, bias)
        )
        for weight, bias, low in layers_of(parts, ps, seeds)
    )
    return down(PLAIN[activation](gate(x)) * up(x))


def oracle(x, parts, ps, seeds, activation):
    """The mathematics in float64, for autograd."""

    def linear(x, weight, bias, low):
        rows = x.flatten(0, -2)
        keep = keep_mask(rows, low.p, low.seed)
        y, _ = reference.forward(rows, weight, bias, low, keep)
        return y.view(*x.shape[:-1], weight.shape[0])

    gate, up, down = layers_of(parts, ps, seeds)
    g, u = linear(x, *gate), linear(x, *up)
    gated = {
        "silu": g / (1 + torch.exp(-g)),
        "gelu": g * (1 + torch.erf(g / 2**0.5)) / 2,
        "gelu_tanh": g * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (g + 0.044715 * g**3))) / 2,
    }[activation]
    return linear(gated * u, *down)


def wide(values):
    return [None if t is None else t.detach().double().requires_grad_() for t in values]


def gradients(y, x, parts):
    inputs = [x, *(t for t in parts if t is not None)]
    return torch.autograd.grad(y.sin().sum(), inputs, allow_unused=True)


SEED, OTHER, THIRD = torch.tensor(5), torch.tensor(-7), torch.tensor(2**40)
VARIANTS = {
    "plain": ((4, 4, 4), (0.0, 0.0, 0.0), (None, None, None)),
    "ranks": ((8, 1, 3), (0.0, 0.0, 0.0), (None, None, None)),
    "dropout": ((4, 2, 3), (0.3, 0.3, 0.3), (SEED, SEED, OTHER)),
    "other dropout": ((4, 2, 3), (0.3, 0.1, 0.5), (SEED, OTHER, THIRD)),
    "dropout of one": ((4, 2, 3), (0.3, 0.3, 0.0), (SEED, None, None)),
    "up": ((0, 4, 0), (0.0, 0.2, 0.0), (None, SEED, None)),
    "down": ((0, 0, 4), (0.0, 0.0, 0.2), (None, None, SEED)),
    "gate and down": ((4, 0, 2), (0.2, 0.0, 0.2), (SEED, None, OTHER)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_gated_mlp_equals_its_layers(variant, activation, dtype):
    ranks, *settings = VARIANTS[variant]
    parts = tensors(ranks, dtype, bias=variant != "ranks")
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 70, K, generator=generator).bfloat16().to(dtype).requires_grad_()
    wide_x, wide_parts = wide([x])[0], wide(parts)
    runs = [
        (block, x, parts),
        (separate, x, parts),
        (oracle, wide_x, wide_parts),
    ]
    outputs = [run(x, parts, *settings, activation) for run, x, parts in runs]
    assert_close(*outputs)
    found = [gradients(y, x, parts) for y, (_, x, parts) in zip(outputs, runs, strict=True)]
    names = ["x", *(name for name, t in zip(NAMES, parts, strict=True) if t is not None)]
    for name, got, same, want in zip(names, *found, strict=True):
        if want is not None and want.numel():
            assert_close(got, same, want, name)
    with torch.no_grad():
        assert torch.equal(block(x, parts, *settings, activation), outputs[0])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_gated_mlp_has_second_derivatives(activation):
    parts = [None if t is None else t.detach() for t in tensors((2, 2, 1))]
    x = torch.randn(3, K, dtype=torch.float64)
    _, ps, seeds = VARIANTS["dropout"]

    def function(x, gate_a, up_b, down_a, weight):
        mine = list(parts)
        mine[2], mine[7], mine[10], mine[4] = gate_a, up_b, down_a, weight
        return block(x, mine, ps, seeds, activation)

    arguments = [t.detach().requires_grad_() for t in (x, parts[2], parts[7], parts[10], parts[4])]
    assert torch.autograd.gradcheck(function, arguments)
    assert torch.autograd.gradgradcheck(function, arguments)


def test_it_keeps_x_gate_and_up():
    parts, x = tensors((4, 2, 3), torch.float32), torch.randn(6, K, requires_grad=True)
    own = {t.untyped_storage().data_ptr() for t in parts}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    _, *settings = VARIANTS["dropout"]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        y = block(x, parts, *settings, "silu")
    assert sorted(kept.values()) == [
        8,
        8,
        6 * 3 * 4,
        6 * (4 + 2) * 4,
        *[6 * K * 4],
        *2 * [6 * N * 4],
    ]
    assert y.grad_fn is not None


@pytest.mark.parametrize("trained", [[i] for i in range(12)] + [[2, 3, 10], [6, 11], []])
@pytest.mark.parametrize("with_x", [False, True])
def test_only_what_is_needed_has_a_gradient(trained, with_x):
    _, *settings = VARIANTS["dropout"]
    full = tensors((4, 2, 3), torch.float32)
    x = torch.randn(5, K)
    leaf = x.clone().requires_grad_()
    want = gradients(block(leaf, full, *settings, "gelu"), leaf, full)
    parts = [t.detach().requires_grad_(i in trained) for i, t in enumerate(full)]
    x.requires_grad_(with_x)
    y = block(x, parts, *settings, "gelu")
    assert y.requires_grad == (with_x or bool(trained))
    if not y.requires_grad:
        return
    y.sin().sum().backward()
    for got, expected in zip([x, *parts], want, strict=True):
        assert (got.grad is not None) == got.requires_grad
        if got.grad is not None:
            torch.testing.assert_close(got.grad, expected)


def test_autocast_casts_as_separate_layers_do():
    _, *settings = VARIANTS["dropout"]
    parts = tensors((4, 2, 3), torch.float32)
    x = torch.randn(70, K).bfloat16().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [run(x, parts, *settings, "silu") for run in (block, separate)]
        found = [gradients(y, x, parts) for y in outputs]
    wide_x, wide_parts = wide([x])[0], wide(parts)
    y = oracle(wide_x, wide_parts, *settings, "silu")
    assert outputs[0].dtype == torch.bfloat16
    assert_close(*outputs, y)
    for name, got, same, want in zip(
        ["x", *NAMES], *found, gradients(y, wide_x, wide_parts), strict=True
    ):
        assert got.dtype == torch.float32
        assert_close(got, same, want, name, torch.finfo(torch.bfloat16).eps)


def test_a_second_backward_pass_and_an_expanded_gradient():
    _, *settings = VARIANTS["dropout"]
    parts, x = tensors((4, 2, 3), torch.float32), torch.randn(5, K, requires_grad=True)
    y = block(x, parts, *settings, "silu")
    inputs = [x, *parts]
    first = torch.autograd.grad(y.sum(), inputs, retain_graph=True)
    second = torch.autograd.grad(y, inputs, torch.ones_like(y))
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


def test_parameters_that_changed_before_the_backward_pass_are_an_error():
    _, *settings = VARIANTS["plain"]
    parts, x = tensors((4, 4, 4), torch.float32), torch.randn(5, K, requires_grad=True)
    y = block(x, parts, *settings, "silu")
    with torch.no_grad():
        parts[11].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_activations_are_torchs():
    g = torch.linspace(-30, 30, 999, dtype=torch.float64, requires_grad=True)
    for name, activation in ACTIVATIONS.items():
        y = PLAIN[name](g)
        assert torch.equal(activation.forward(g), y)
        d = torch.linspace(1, 2, 999, dtype=torch.float64)
        (want,) = torch.autograd.grad(y, g, d)
        got = activation.backward_(mine := d.clone(), g.detach())
        assert got is mine and torch.equal(got, want)
    assert nn.GELU("tanh")(g).equal(ACTIVATIONS["gelu_tanh"].forward(g))
