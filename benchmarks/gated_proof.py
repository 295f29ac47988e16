"""Gated MLPs through the kernels (`fastlora.ops.gated`) against float64 and in time: the stage `gated` of `gpu_proof.py`.

Timed beside each other, in bfloat16 with adapters in float32: the three frozen layers, the three adapted layers one after the other, and one
call for all; then the kernels of that call alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import proofs
import torch
from proofs import SEED, Results
from torch import Tensor
from torch.nn import functional as F

from fastlora.kernels.config import gated_config, gated_down_config
from fastlora.kernels.gated import gated_down, gated_gradients_, gated_product
from fastlora.ops import dispatch
from fastlora.ops.dropout import kernel_mask
from fastlora.ops.gated import ACTIVATIONS, gated_mlp
from fastlora.ops.linear import lora_linear
from fastlora.ops.reference import Layer, LowRank, forward
from fastlora.ops.triton.linear import dy_products, mask_of

SCALING = 2.0


@dataclass(frozen=True)
class Case:
    """x (m, k), gate and up (n, k), down (k, n), each with its own rank; p: of all adapters, of which gate and up share a mask."""

    m: int
    k: int
    n: int
    ranks: tuple[int, int, int]
    p: float = 0.0
    activation: str = "silu"
    bias: bool = False

    @property
    def name(self) -> str:
        ranks = ",".join(map(str, self.ranks))
        return f"{self.m}x{self.k}->{self.n}->{self.k} r{ranks} p{self.p:g} {self.activation}"


CASES = (
    Case(600, 512, 1536, (16, 16, 16), 0.1),
    Case(303, 264, 520, (8, 4, 12), 0.3, "gelu", bias=True),
    Case(777, 200, 1025, (8, 8, 8), 0.1, "gelu_tanh"),
    Case(520, 512, 1040, (64, 64, 64), 0.1),
    Case(256, 256, 512, (0, 8, 0), 0.2),
    Case(256, 256, 512, (0, 0, 8), 0.2, bias=True),
)
TIMED = (Case(4096, 2048, 8192, (8, 8, 8), 0.1), Case(4096, 2048, 8192, (16, 16, 16)))
REHEARSED = (Case(80, 32, 48, (4, 4, 4), 0.3),)


class Block:
    """The tensors of a case, and its results by one call and by torch."""

    def __init__(self, case: Case, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def draw(*size: int, scale: float = 1.0) -> Tensor:
            return scale * torch.randn(*size, generator=generator, device=device)

        self.case, self.dtype = case, dtype
        self.x, self.dy = draw(case.m, case.k).to(dtype), draw(case.m, case.k).to(dtype)
        masks = [torch.tensor(SEED + i, device=device) if case.p else None for i in range(2)]
        self.seeds = (masks[0], masks[0], masks[1])
        self.weights: dict[str, Tensor] = {}
        self.factors: dict[str, Tensor] = {}
        wide, narrow = case.n, case.k
        for name, n, k, r in zip(
            ("gate", "up", "down"), (wide, wide, narrow), (narrow, narrow, wide), case.ranks,
            strict=True,
        ):  # fmt: skip
            self.weights[name] = draw(n, k, scale=k**-0.5).to(dtype)
            if case.bias:
                self.weights[f"{name} bias"] = draw(n).to(dtype)
            a, b = draw(r, k, scale=k**-0.5), draw(n, r, scale=max(1, r) ** -0.5)
            for part, factor in (
                ("da", a),
                ("db", b),
            ):  # in float32, of values that the kernels need not round
                self.factors[f"{part} {name}"] = factor.to(dtype).float().requires_grad_(r > 0)

    def layers(self, factors: Mapping[str, Tensor], dtype: torch.dtype) -> list[Layer]:
        """Gate, up and down with weights in `dtype`."""
        found = []
        for name, seed in zip(("gate", "up", "down"), self.seeds, strict=True):
            a, b = factors[f"da {name}"], factors[f"db {name}"]
            low = LowRank(a, b, SCALING, self.case.p, seed if a.shape[0] else None)
            bias = self.weights.get(f"{name} bias")
            bias = None if bias is None else bias.to(dtype)
            found.append(Layer(self.weights[name].to(dtype), bias, low))
        return found

    def call(self, x: Tensor, factors: Mapping[str, Tensor]) -> Tensor:
        gate, up, down = self.layers(factors, x.dtype)
        return gated_mlp(x, gate, up, down, self.case.activation, triton=True)

    def by(
        self, linear: Callable[[Layer, Tensor], Tensor], x: Tensor, factors: Mapping[str, Tensor]
    ) -> Tensor:
        """With a function for each of the three layers, in x's dtype."""
        gate, up, down = (partial(linear, layer) for layer in self.layers(factors, x.dtype))
        return down(ACTIVATIONS[self.case.activation].forward(gate(x)) * up(x))

    def results(
        self, run: Callable[[Tensor, Mapping[str, Tensor]], Tensor], dtype: torch.dtype | None
    ) -> Results:
        """y, dx and the gradients of the factors. dtype: of everything; None: as they are."""
        x = self.x.to(dtype or self.dtype, copy=True).requires_grad_()
        factors = {
            name: t.detach().to(dtype or t.dtype).requires_grad_(t.requires_grad)
            for name, t in self.factors.items()
        }
        y = run(x, factors)
        trained = {name: t for name, t in factors.items() if t.requires_grad}
        made = torch.autograd.grad(y, [x, *trained.values()], self.dy.to(y.dtype))
        return {"y": y.detach(), **dict(zip(("dx", *trained), made, strict=True))}

    def errors(self, eps: float) -> dict[str, float]:
        run = partial(self.results, self.call, None)
        by_torch = partial(self.by, _reference)
        plain, exact = (self.results(by_torch, dtype) for dtype in (self.dtype, torch.float64))
        return proofs.units(run(), plain, exact, eps) | proofs.same(proofs.repeated(run))


def _reference(layer: Layer, x: Tensor) -> Tensor:
    low, keep = layer.low, None
    if low.seed is not None:
        keep = kernel_mask(low.seed, low.p, x.shape[0], x.shape[1], device=x.device)
    return forward(x, layer.weight, layer.bias, low, keep)[0]


def _adapted(layer: Layer, x: Tensor) -> Tensor:
    """By the kernels."""
    weight, bias, low = layer
    path = (low.a, low.b, low.scaling, low.p, low.seed)
    return lora_linear(x, weight, bias, *path, backend="triton")


def _frozen(layer: Layer, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


def check(dtype: str, case: Case) -> dict[str, Any]:
    """A row with the errors of a case."""
    return proofs.check("gated", dtype, case, Block)


def timed(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    block = Block(case, dtype, device)
    factors = [*block.factors.values()]
    calls: dict[str, Callable[[], object]] = {}
    for name, run, trained in (
        ("frozen", partial(block.by, _frozen), []),
        ("three layers", partial(block.by, _adapted), factors),
        ("one call", block.call, factors),
    ):
        given = partial(run, factors=block.factors)
        calls |= proofs.passes(name, given, block.x, trained, block.dy)
    return calls | _kernels(block)


def _kernels(block: Block) -> dict[str, Callable[[], object]]:
    """The kernels of `fastlora.kernels.gated` as a call launches them."""
    gate, up, down = block.layers(block.factors, block.dtype)
    act, low = block.case.activation, down.low
    g, u = (F.linear(block.x, layer.weight, layer.bias) for layer in (gate, up))
    plan = "split" if g.device.type == "cpu" else None
    choice = dispatch.launch_choice(
        g, down.weight, low.rank(), low.seed is not None, plan, block.dy
    )
    config = choice.config
    assert config is not None
    tiles = gated_down_config(config.down)
    precision, mask = dispatch.product_precision(g), mask_of(g, low)
    h, s = gated_down(g, u, act, low.a, tiles, mask=mask, precision=precision)
    ds, _, bits = dy_products(config, block.dy, g, s, low, True, True)
    named: dict[str, Any] = {"ds": ds, "lora_a": low.a, "scale": low.scale(), "bits": bits}
    to = gated_config(config.update, g.element_size())
    dh = block.dy @ down.weight
    return {
        "h": lambda: gated_product(g, u, act),
        "h and S": lambda: gated_down(g, u, act, low.a, tiles, mask=mask, precision=precision),
        # dh is read and replaced by dg, whatever its values.
        "dg, du and h": lambda: gated_gradients_(dh, g, u, act, to, precision=precision, **named),
        "copy of h": lambda: dh.copy_(h),
    }
