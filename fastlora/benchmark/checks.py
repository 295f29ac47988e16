"""Check an implementation's output and gradients against the float64 reference before it is timed.

The bound is that of the tests, `max|got − ref64| ≤ 2·max|plain − ref64| + 4·eps·max|ref64|`, where plain is the same formula
in the case's dtype and eps belongs to that dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastlora.benchmark.implementations import ALPHA_PER_RANK
from fastlora.benchmark.workload import Workload, trainable
from fastlora.layers.linear import LoRALinear
from fastlora.ops import reference
from fastlora.ops.dropout import keep_mask
from fastlora.ops.linear import lora_linear, low_rank

NAMES = ("y", "dx", "dlora_a", "dlora_b")
SEED = 0x5EED
Results = dict[str, Tensor]


class Wrong(Exception):
    """A result is outside the bound; the message names it."""


class Oracle:
    """Exact results and those of plain torch for the first copy of a workload, computed on first use."""

    def __init__(self, work: Workload) -> None:
        self.work = work
        self._known: dict[Any, tuple[Results, Results]] = {}

    def check(self, name: str, layer: nn.Module) -> None:
        """Check the layer in evaluation mode and, in a case with dropout, fastlora's function under a known mask.

        Raises: Wrong if a result is outside the bound.
        """
        work, was_training = self.work, layer.training
        adapted = bool(trainable(layer))
        layer.eval()
        got = _results(lambda x, *_: layer(x), work.x[0], trainable(layer), work.dy[0])
        layer.train(was_training)
        self.compare(name, got, adapted)
        if work.case.p > 0 and isinstance(layer, LoRALinear):
            seed = torch.tensor(SEED, device=work.device)
            base, backend = work.frozen[0], layer.backend

            def function(x: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
                scaling, p = ALPHA_PER_RANK, work.case.p
                return lora_linear(
                    x, base.weight, base.bias, lora_a, lora_b, scaling, p, seed, backend=backend
                )

            got = _results(function, work.x[0], _leaves(work, torch.float32), work.dy[0])
            self.compare(f"{name} with dropout", got, True, seed, backend == "triton")

    def compare(
        self,
        name: str,
        got: Results,
        adapted: bool,
        seed: Tensor | None = None,
        triton: bool = False,
    ) -> None:
        """Compare results for the first copy's x and dy; those that are not in `got` are not checked.

        adapted: False for the frozen layer. seed: of the dropout mask; None is without dropout.
        triton: whether the Triton kernels ran; their mask differs from the CPU's, in Triton's interpreter too.

        Raises: Wrong if a result is outside the bound.
        """
        key = (adapted, seed is not None, triton)
        if key not in self._known:
            self._known[key] = (
                self._formula(adapted, seed, triton, torch.float64),
                self._formula(adapted, seed, triton, self.work.x[0].dtype),
            )
        exact, plain = self._known[key]
        eps = torch.finfo(self.work.x[0].dtype).eps
        for tensor, value in got.items():
            error = (value.double() - exact[tensor]).abs().max().item()
            allowed = 2 * (plain[tensor].double() - exact[tensor]).abs().max().item()
            allowed += 4 * eps * exact[tensor].abs().max().item()
            if not error <= allowed:
                raise Wrong(f"{name}: {tensor} is off by {error:.3e}, allowed {allowed:.3e}")

    def _formula(
        self, adapted: bool, seed: Tensor | None, triton: bool, dtype: torch.dtype
    ) -> Results:
        work, base = self.work, self.work.frozen[0]
        weight = base.weight.to(dtype)
        bias = None if base.bias is None else base.bias.to(dtype)

        def formula(x: Tensor, *adapters: Tensor) -> Tensor:
            if not adapters:
                return F.linear(x, weight, bias)
            lora_a, lora_b = (adapter.to(dtype) for adapter in adapters)
            low = low_rank(lora_a, lora_b, ALPHA_PER_RANK, work.case.p, seed)
            return reference.forward(x, weight, bias, low, keep_mask(x, low.p, low.seed, triton))[0]

        adapters = _leaves(work, torch.promote_types(dtype, torch.float32)) if adapted else []
        return _results(formula, work.x[0].to(dtype), adapters, work.dy[0].to(dtype))


def _leaves(work: Workload, dtype: torch.dtype) -> list[Tensor]:
    return [t.detach().to(dtype).requires_grad_() for t in (work.lora_a, work.lora_b)]


def _results(
    function: Callable[..., Tensor], x: Tensor, adapters: Sequence[Tensor], dy: Tensor
) -> Results:
    """y = function(x, *adapters) and its gradients for dy."""
    x = x.detach().requires_grad_()
    y = function(x, *adapters)
    gradients = torch.autograd.grad(y, [x, *adapters], dy)
    return dict(zip(NAMES, (y.detach(), *gradients), strict=False))
