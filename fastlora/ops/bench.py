"""One shape on a device: its tensors, the exact results, and a way to run each kernel and each plan with given tiles. For the tuner."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastlora.errors import ConfigError
from fastlora.kernels.config import Problem, Tiles
from fastlora.ops import dispatch, reference
from fastlora.ops.dispatch import Choice
from fastlora.ops.dropout import dropout_threshold, kernel_mask
from fastlora.ops.reference import LowRank

Needs = tuple[bool, bool, bool]  # of dx, dA, dB


@dataclass(frozen=True)
class Shape:
    """x (m, k), weight (n, k), adapters of rank `rank`, dropout probability p."""

    m: int
    k: int
    n: int
    rank: int
    p: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Shape:
        """`M,K,N,R` or `M,K,N,R,p`. Raises: ConfigError for anything else."""
        try:
            numbers = text.split(",")
            shape = cls(*(int(v) for v in numbers[:4]), *(float(v) for v in numbers[4:]))
        except (ValueError, TypeError):
            raise ConfigError(f"shapes: expected M,K,N,R or M,K,N,R,p, got {text!r}") from None
        if min(shape.m, shape.k, shape.n, shape.rank) < 1 or not 0.0 <= shape.p < 1.0:
            raise ConfigError(f"shapes: expected sizes of 1 or more and 0 <= p < 1, got {text!r}")
        return shape


def problem_of(shape: Shape, dtype: torch.dtype) -> Problem:
    """The problem of aligned tensors of this shape."""
    precision = dispatch.product_precision(torch.empty(0, dtype=dtype))
    dropout = dropout_threshold(shape.p) > 0
    return Problem(shape.m, shape.n, shape.k, shape.rank, dtype.itemsize, dropout, precision)


class Bench:
    """The tensors of one shape, the exact results, and a way to run each kernel with given tiles."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        from fastlora.kernels.backward import mask_pass  # imports Triton, as the next line
        from fastlora.ops.triton import linear as triton_linear

        self.ops, self.shape, self.dtype = triton_linear, shape, dtype
        generator = torch.Generator(device).manual_seed(0)

        def draw(*size: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(*size, generator=generator, device=device)).to(dtype)

        m, k, n, r = shape.m, shape.k, shape.n, shape.rank
        self.x, self.dy = draw(m, k), draw(m, n)
        self.weight, self.bias = draw(n, k, scale=k**-0.5), draw(n)
        a, b = draw(r, k, scale=k**-0.5).float(), draw(n, r).float()
        dropout = dropout_threshold(shape.p) > 0
        seed = torch.tensor(1234567, device=device) if dropout else None
        self.low = LowRank(a, b, 2.0, shape.p, seed)
        self.problem = problem_of(shape, dtype)
        self.precision = self.problem.precision
        self.eps = 2.0**-10 if self.precision == "tf32" else torch.finfo(dtype).eps
        self.mask = triton_linear.mask_of(self.x, self.low)
        self.keep = kernel_mask(seed, shape.p, m, k, device=device) if dropout else None  # type: ignore[arg-type]
        self.exact, self.plain = self._results(torch.float64), self._results(dtype)
        self.bits = mask_pass(m, k, self.mask)

    def _results(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The results of every kernel in `dtype`; S and dS without a factor."""
        x, weight, bias, dy = (t.to(dtype) for t in (self.x, self.weight, self.bias, self.dy))
        low = self.low.to(self.dtype).to(dtype)  # the kernels cast the adapters to x's dtype
        y, s = reference.forward(x, weight, bias, low, self.keep)
        dx, da, db = reference.backward(dy, x, weight, low, s, self.keep)
        s = s / low.keep_scale()
        term = bias + low.scale() * (s @ low.b.T)
        return {"y": y, "s": s, "dx": dx, "da": da, "db": db, "ds": dy @ low.b, "term": term}

    def run(self, kernel: str, config: Any) -> dict[str, Tensor]:
        """The results of one kernel with these tiles. kernel: a field of `Tiles`."""
        ops, low, scale = self.ops, self.low, self.low.scale()
        x, dy, weight, bias = self.x, self.dy, self.weight, self.bias
        s, ds, exactness = self.plain["s"], self.plain["ds"], {"precision": self.precision}
        if kernel == "down":
            return {"s": ops.down_project(x, low.a, config, mask=self.mask, **exactness)}
        if kernel == "dy":
            named = {"scale": scale, "mask": self.mask, "columns": x.shape[1], **exactness}
            ds, db, bits = ops.dy_pass(dy, low.b, s, config, **named)
            mask = {} if bits is None else {"bits": bits}
            return {"ds": ds, "db": db.sum(0), **mask}
        if kernel == "x":
            named = {"scale": scale, "bits": self.bits, **exactness}
            da, _ = ops.x_pass(x, ds, low.a.dtype, config, **named)
            return {"da": da.sum(0)}
        if kernel == "start":
            named = {"scale": scale, "mask": self.mask, **exactness}
            term, s = ops.start(x, low.a, low.b, bias, config, **named)
            return {"term": term, "s": s}
        if kernel == "update":
            return {"term": ops.rank_product(s, low.b, bias, config, scale=scale, **exactness)}
        if kernel == "dx":
            named = {"scale": scale, "bits": self.bits, **exactness}
            return {"dx": ops.rank_gemm(dy, weight.T, None, ds, low.a.T, config, **named)}
        if kernel == "decode":
            named = {"scale": scale, "mask": self.mask, **exactness}
            y, s = ops.decode(x, weight, bias, low.a, low.b, config, **named)
            return {"y": y, "s": s}
        named = {"scale": scale, **exactness}
        if kernel == "fused":
            s = torch.empty_like(s)
            named["lora_a"] = low.a.to(x.dtype)
        return {"y": ops.rank_gemm(x, weight, bias, s, low.b, config, **named), "s": s}

    def forward(self, choice: Choice) -> tuple[Tensor, Tensor]:
        return self.ops.run_forward(choice, self.x, self.weight, self.bias, self.low)

    def backward(
        self, choice: Choice, s: Tensor, needs: Needs = (True, True, True)
    ) -> list[Tensor]:
        return self.ops.run_backward(choice, self.dy, self.x, self.weight, s, self.low, needs)

    def run_plan(self, plan: str, tiles: Tiles) -> dict[str, Tensor]:
        """The results of one forward and backward pass. plan: of the forward pass; dx has the plan that goes with it."""
        dx_plan = {"fused": "split", "decode": "in_place"}.get(plan, plan)
        choice = Choice("triton", plan, "tuning", dx_plan, tiles)
        y, s = self.forward(choice)
        gradients = self.backward(choice, s)
        return {"y": y, "s": s} | dict(zip(("dx", "da", "db"), gradients, strict=True))

    def errors(self, got: dict[str, Tensor]) -> dict[str, float]:
        """For each result its largest error against float64, in units of the one that the tests allow."""
        found = {}
        for name, mine in got.items():
            if name == "bits":
                lanes = (mine[:, :, None] >> torch.arange(8, device=mine.device)) & 1
                kept = lanes.flatten(1)[:, : self.shape.k].bool()
                same = self.keep is not None and torch.equal(kept, self.keep)
                found[name] = 0.0 if same else math.inf
                continue
            exact = self.exact[name]
            error = (mine.double() - exact).abs().max().item()
            allowed = 2 * (self.plain[name].double() - exact).abs().max().item()
            allowed += 4 * self.eps * exact.abs().max().item()
            found[name] = error / allowed
        return found

    def attempt(self, run: Callable[[], dict[str, Tensor]]) -> bool:
        """Whether it compiles, fits the GPU and is correct."""
        from triton.compiler.errors import CompilationError
        from triton.runtime.errors import OutOfResources, PTXASError

        try:
            return all(error <= 1 for error in self.errors(run()).values())  # a NaN is wrong too
        except (OutOfResources, CompilationError, PTXASError):
            return False
