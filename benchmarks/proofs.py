"""What the stages of `gpu_proof.py` share that compare calls of several kernels with float64: `grouped_proof.py`, `gated_proof.py` and `experts_proof.py`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from fastlora.ops import dispatch
from fastlora.ops.graph import capture

SEED = 1234567
Results = dict[str, Tensor]


class Proof(Protocol):
    """The tensors of a case."""

    def errors(self, eps: float) -> dict[str, float]:
        """For each result its error against float64 in units of the allowed one, and 0, or infinity, for what must be the same bit for bit."""


def check(
    what: str, dtype: str, case: Any, make: Callable[[Any, torch.dtype, torch.device], Proof]
) -> dict[str, Any]:
    """A row with the errors of a case, or with the reason why it failed. dtype: "tf32" too."""
    torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    row: dict[str, Any] = {"dtype": dtype, "shape": case.name, "what": what}
    try:
        of = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
        precision = dispatch.product_precision(torch.empty(0, dtype=of))
        eps = 2.0**-10 if precision == "tf32" else torch.finfo(of).eps
        row["errors"] = make(case, of, device()).errors(eps)
    except Exception as error:
        row["failed"] = reason(error)
    return row


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:500]}"


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def units(got: Results, plain: Results, exact: Results, eps: float) -> dict[str, float]:
    """The largest error of each result in units of the one that the tests allow. plain: torch's results in the dtype of the call."""
    found = {}
    for name, mine in got.items():
        error = largest(mine.double() - exact[name])
        allowed = 2 * largest(plain[name].double() - exact[name])
        found[name] = error / (allowed + 4 * eps * largest(exact[name]))
    return found


def same(pairs: Mapping[str, Iterable[tuple[Tensor, Tensor]]]) -> dict[str, float]:
    """0 where both tensors of every pair are equal bit for bit, otherwise infinity."""
    equal = {name: all(torch.equal(*pair) for pair in these) for name, these in pairs.items()}
    return {name: 0.0 if found else math.inf for name, found in equal.items()}


def repeated(
    run: Callable[[], Results], graph: bool = True
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """The results of a call beside those of later ones, which repeat its launches, and, on a GPU, beside those of a CUDA graph.

    graph: whether there can be one.
    """
    first = run()
    pairs = {"again": [(first[name], t) for _ in range(3) for name, t in run().items()]}
    if graph and device().type == "cuda":
        kept: Results = {}
        replay = capture(lambda: kept.update(run()))
        for t in kept.values():
            t.fill_(math.nan)
        replay()
        pairs["graph"] = [(first[name], t) for name, t in kept.items()]
    return pairs


def passes(
    name: str, run: Callable[[Tensor], Tensor], x: Tensor, factors: Sequence[Tensor], dy: Tensor
) -> dict[str, Callable[[], object]]:
    """What is timed of a function of x: its forward pass, and forward + backward to x and the factors."""

    def forward() -> Tensor:
        with torch.no_grad():
            return run(x)

    def both(leaf: Tensor) -> Sequence[Tensor]:
        return torch.autograd.grad(run(leaf), [leaf, *factors], dy)

    leaf = x.detach().clone().requires_grad_()
    return {name: forward, f"{name}, forward + backward": partial(both, leaf)}


def largest(t: Tensor) -> float:
    return t.abs().max().item() if t.numel() else 0.0
