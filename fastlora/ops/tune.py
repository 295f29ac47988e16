"""Measure every plan and many tiles on this machine's GPU, and store the fastest for `dispatch`.

    python -m fastlora.tune --shapes 8192,4096,4096,16,0.1 32768,1024,1024,16,0 [--dtype bfloat16] [--dry-run]

A shape is M,K,N,R,p: x (M, K), weight (N, K), rank R, dropout p. Each kernel is timed alone with each of its candidate
tiles and a cold L2; then each plan is timed with the best tiles of its kernels, on sm_90 and newer also with
overlapping launches. A kernel with a wrong result is not timed: results are compared with float64 by the rule of the tests. The
measurements are stored in the file of `fastlora.ops.tuning_file`; they are valid for this GPU, these versions and these kernels only.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastlora.errors import BackendError, ConfigError
from fastlora.kernels.config import GemmConfig, PassConfig, Problem, Tiles
from fastlora.ops import cost, dispatch, reference, tuning_file
from fastlora.ops.dispatch import Choice
from fastlora.ops.dropout import dropout_threshold
from fastlora.ops.reference import LowRank

Timer = Callable[[Callable[[], object]], float]
Needs = tuple[bool, bool, bool]  # of dx, dA, dB
Config = TypeVar("Config", GemmConfig, PassConfig)


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


def candidates(config: Config) -> Iterator[Config]:
    """`config` itself first, then its neighbours: other blocks, warps, stages, splits, one or two changed at a time."""
    yield config
    seen = {config}
    changes: dict[str, list[int]] = {
        "num_stages": [2, 3, 4, 5],
        "num_warps": [4, 8],
        "block_m": [32, 64, 128, 256],
        "block_n": [32, 64, 128, 256],
        "block_k": [32, 64, 128],
        "group_m": [4, 8, 16],
        "subtiles": [1, 2, 4],
        "splits": [1, 2, 4, 8, 16],
    }
    own = {field.name for field in fields(config)}
    singles: list[dict[str, Any]] = [
        {name: value}
        for name, values in changes.items()
        if name in own and getattr(config, name) > 0  # 0: the kernel has no such block
        for value in values
    ]
    for first in singles:
        for second in ({}, *singles):
            changed = replace(config, **(first | second))
            if changed not in seen and _sensible(changed):
                seen.add(changed)
                yield changed


def _sensible(config: GemmConfig | PassConfig) -> bool:
    """Whether an accumulator of a tile fits its registers: at most 128 float32 per thread."""
    wide = max(config.block_n, 1)
    if isinstance(config, PassConfig):
        wide = max(config.block_n, config.block_k, config.block_r)
    return config.block_m * wide <= 128 * 32 * config.num_warps


class Bench:
    """The tensors of one shape, the exact results, and a way to run each kernel with given tiles."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        from fastlora.ops import triton_ops  # imports Triton

        self.ops, self.shape, self.dtype = triton_ops, shape, dtype
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
        precision = dispatch.product_precision(self.x)
        self.problem = Problem(m, n, k, r, self.x.element_size(), dropout, precision)
        self.exact, self.plain = self._results(torch.float64), self._results(dtype)

    def _results(self, dtype: torch.dtype) -> list[Tensor]:
        x, weight, bias, dy = (t.to(dtype) for t in (self.x, self.weight, self.bias, self.dy))
        low = self.low.to(self.dtype).to(dtype)  # the kernels cast the adapters to x's dtype
        y, s = reference.forward(x, weight, bias, low)
        return [y, *reference.backward(dy, x, weight, low, s)]

    def forward(self, choice: Choice) -> tuple[Tensor, Tensor]:
        return self.ops.run_forward(choice, self.x, self.weight, self.bias, self.low)

    def backward(self, choice: Choice, s: Tensor, needs: Needs) -> list[Tensor]:
        return self.ops.run_backward(choice, self.dy, self.x, self.weight, s, self.low, needs)

    def is_correct(self, choice: Choice) -> bool:
        """Whether every result of the choice is as close to float64 as the tests require."""
        y, s = self.forward(choice)
        got = [y, *self.backward(choice, s, (True, True, True))]
        for mine, plain, exact in zip(got, self.plain, self.exact, strict=True):
            error = (mine.double() - exact).abs().max().item()
            allowed = 2 * (plain.double() - exact).abs().max().item()
            allowed += 4 * torch.finfo(self.dtype).eps * exact.abs().max().item()
            if not error <= allowed:  # a NaN is wrong too
                return False
        return True


def tune_shape(bench: Bench, start: Tiles, timer: Timer, limit: int = 60) -> tuning_file.Tuned:
    """The fastest correct plans and tiles for a shape.

    start: the tiles to begin from. timer: seconds of a call. limit: how many tiles are tried for a kernel.
    """
    arch = dispatch.device_architecture(bench.x.device)
    assert arch is not None  # the caller has checked
    plans = list(cost.forward_seconds(arch, bench.problem))
    best: Tiles = start
    # kernel -> a forward plan and a dx plan that run it, and the gradients to compute; no gradients: time the forward pass
    kernels: dict[str, tuple[str, str, Needs | None]] = {
        "down": ("in_place", "in_place", None),
        "dy": ("in_place", "in_place", (False, True, True)),
        "x": ("in_place", "in_place", (False, True, False)),
        # with dA, so that dx reads the mask as bits, as it does in training
        "dx": ("in_place", "split", (True, True, False)),
        "update": ("in_place", "in_place", None),
    }
    kernels |= {p: (p, "in_place", None) for p in ("split", "fused", "decode") if p in plans}
    for name, (plan, dx_plan, needs) in kernels.items():
        options = list(islice(candidates(getattr(best, name)), limit))
        times = [
            _seconds(bench, plan, dx_plan, replace(best, **{name: option}), needs, timer)
            for option in options
        ]
        fastest = min(range(len(options)), key=times.__getitem__)
        best = replace(best, **{name: options[fastest]})
        _print_row(name, times[fastest], options[fastest])
    if arch.capability >= 90:
        best = _with_overlap(bench, best, plans, timer)
    forward = {plan: _seconds(bench, plan, "in_place", best, None, timer) for plan in plans}
    dx = {
        plan: _seconds(bench, "in_place", plan, best, (True, True, False), timer)
        for plan in ("split", "in_place")
    }
    for kind, times_of in (("y", forward), ("dx", dx)):
        for plan, time in times_of.items():
            _print_row(kind, time, plan)
    plan, dx_plan = min(forward, key=forward.__getitem__), min(dx, key=dx.__getitem__)
    if not math.isfinite(forward[plan] + dx[dx_plan]):
        raise BackendError(f"{bench.shape}: no plan has a correct result, so nothing was stored")
    return tuning_file.Tuned(plan, dx_plan, best)


def _with_overlap(bench: Bench, best: Tiles, plans: Sequence[str], timer: Timer) -> Tiles:
    """The tiles, with overlapping launches for each plan that is correct and faster with them."""
    trials: dict[str, tuple[tuple[str, ...], str, str, Needs | None]] = {
        "split": (("down", "split"), "split", "in_place", None),
        "decode": (("decode",), "decode", "in_place", None),
        "dx": (("x", "dx"), "in_place", "split", (True, True, False)),
    }
    for name, (kernels, plan, dx_plan, needs) in trials.items():
        if plan not in plans:
            continue
        changed = {kernel: replace(getattr(best, kernel), overlap=True) for kernel in kernels}
        options = [best, replace(best, **changed)]
        separate, overlapping = (_seconds(bench, plan, dx_plan, o, needs, timer) for o in options)
        best = options[overlapping < separate]
        _print_row(f"{name} pdl", overlapping, f"without {1e6 * separate:.1f} us")
    return best


def _print_row(name: str, seconds: float, what: object) -> None:
    print(f"{name:10s} {1e6 * seconds:9.1f} us  {what}", flush=True)


def _seconds(
    bench: Bench, plan: str, dx_plan: str, tiles: Tiles, needs: Needs | None, timer: Timer
) -> float:
    """Seconds of the forward pass, or of the backward pass for the gradients in `needs`; infinity if it fails or is wrong."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    choice = Choice("triton", plan, "tuning", dx_plan, tiles)
    try:
        if not bench.is_correct(choice):
            return math.inf
        if needs is None:
            return timer(lambda: bench.forward(choice))
        _, s = bench.forward(choice)
        return timer(lambda: bench.backward(choice, s, needs))
    except (OutOfResources, CompilationError, PTXASError):  # the tiles do not fit the GPU
        return math.inf


def _cuda_seconds(call: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return float(do_bench(call, warmup=5, rep=25, return_mode="median")) / 1e3


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastlora.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shapes", nargs="+", required=True, metavar="M,K,N,R[,p]")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    candidates_help = "tiles tried per kernel (default %(default)s)"
    parser.add_argument("--max-candidates", type=int, default=60, help=candidates_help)
    parser.add_argument("--dry-run", action="store_true", help="print the result and store nothing")
    arguments = parser.parse_args(argv)
    try:
        shapes = [Shape.parse(text) for text in arguments.shapes]
        if arguments.max_candidates < 1:
            raise ConfigError(f"--max-candidates: expected ≥ 1, got {arguments.max_candidates}")
        if not torch.cuda.is_available():
            raise BackendError("fastlora.tune measures on a CUDA device, and there is none")
        device = torch.device("cuda")
        for shape in shapes:
            bench = Bench(shape, getattr(torch, arguments.dtype), device)
            choice = dispatch.launch_choice(
                bench.x, bench.weight, shape.rank, bench.problem.dropout, "in_place"
            )
            if choice.config is None:
                raise BackendError(f"nothing to tune: {choice.reason}")
            print(f"{shape} {arguments.dtype}", flush=True)
            result = tune_shape(bench, choice.config, _cuda_seconds, arguments.max_candidates)
            if not arguments.dry_run:
                tuning_file.store(torch.cuda.get_device_name(device), bench.problem, result)
                print(f"stored in {tuning_file.path()}", flush=True)
    except (ConfigError, BackendError) as error:
        parser.exit(2, f"fastlora.tune: {error}\n")
    return 0
