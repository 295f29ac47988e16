"""Random calls against float64: shapes, strides, dtypes, ranks, dropout, autocast and grad modes, one case for each seed.

The checks raise AssertionError if a case is wrong; tests run few seeds, `tests/support/soak.py` many.
"""

from __future__ import annotations

import random
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastlora import lora_linear
from fastlora.kernels.config import fused_rank
from fastlora.ops import reference
from fastlora.ops.dispatch import TRITON_PLANS
from fastlora.ops.reference import LowRank
from tests.support.cases import formula
from tests.support.tolerance import assert_close

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NAMES = ("x", "weight", "bias", "lora_a", "lora_b")


@dataclass
class Call:
    """The arguments of one call, the autocast dtype, the grad mode, and the arguments whose gradients are computed."""

    tensors: dict[str, Tensor | None]
    dy: Tensor
    scaling: float
    p: float
    seed: Tensor
    autocast: torch.dtype | None
    mode: str
    wanted: tuple[str, ...]

    def __str__(self) -> str:
        shapes = {
            n: (tuple(t.shape), t.stride(), str(t.dtype)[6:])
            for n, t in self.tensors.items()
            if t is not None
        }
        return f"{shapes}, scaling {self.scaling}, p {self.p}, autocast {self.autocast}, {self.mode}, gradients {self.wanted}"


def strided(rng: random.Random, value: Tensor) -> Tensor:
    """The same values with random strides: a transposed view, every second column, a row offset, or contiguous."""
    kind = rng.choice(["plain", "transposed", "columns", "offset"])
    if kind == "transposed" and value.ndim > 1:
        return value.movedim(-1, 0).contiguous().movedim(0, -1)
    if kind == "columns":
        wide = value.new_full((*value.shape[:-1], 2 * value.shape[-1]), float("nan"))
        wide[..., ::2] = value
        return wide[..., ::2]
    if kind == "offset":
        longer = torch.cat([value.new_full((1, *value.shape[1:]), float("nan")), value])
        return longer[1:]
    return value


def draw_call(number: int) -> Call:
    """The case of a seed. Values are representable in bfloat16, so that every dtype gets the same ones."""
    rng, generator = random.Random(number), torch.Generator().manual_seed(number)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16().double()

    lead = tuple(rng.choice([0, 1, 2, 3, 5, 17, 40]) for _ in range(rng.choice([1, 1, 2, 3])))
    k, n = rng.choice([1, 2, 7, 16, 33, 64, 96]), rng.choice([1, 3, 8, 31, 64, 80])
    rank = rng.choice([1, 2, 4, 8, 17, 32])
    dtype = rng.choice(DTYPES)
    adapters = rng.choice([dtype, dtype, torch.float32, torch.float64])
    autocast = rng.choice([None, None, torch.bfloat16, torch.float16])
    tensors: dict[str, Tensor | None] = {
        "x": strided(rng, draw(*lead, k).to(dtype)),
        "weight": strided(rng, draw(n, k).to(dtype)),
        "bias": draw(n).to(dtype) if rng.random() < 0.6 else None,
        "lora_a": strided(rng, draw(rank, k).to(adapters)),
        "lora_b": strided(rng, draw(n, rank).to(adapters)),
    }
    present = [name for name in NAMES if tensors[name] is not None]
    return Call(
        tensors,
        draw(*lead, n),
        rng.choice([1.0, 0.25, -2.0, 1.75, 0.0]),
        rng.choice([0.0, 0.0, 0.1, 0.5, 0.97]),
        torch.tensor(rng.randrange(-(2**63), 2**63)),
        autocast,
        rng.choice(["grad", "grad", "grad", "no_grad", "inference"]),
        tuple(rng.sample(present, rng.randint(1, len(present)))),
    )


def _plain(tensors: dict[str, Tensor | None], call: Call) -> Tensor:
    """The plain formula in the dtype of the given tensors."""
    arguments = [tensors[name] for name in NAMES]
    return formula(*arguments, call.scaling, call.p, call.seed)  # type: ignore[arg-type]


def _close(got: Tensor, same: Tensor, exact: Tensor, magnitude: Tensor, name: str) -> None:
    """Compare by the rule of tests/support/tolerance.py, or allow 4 roundings of the same sums over absolute values.

    The latter is for cases in which plain torch happens to be exact, as in float64 always; in 16 bits it is allowed for a
    few values only.
    """
    try:
        assert_close(got, same, exact, name)
    except AssertionError:
        eps = torch.finfo(got.dtype).eps
        half = got.dtype in (torch.float16, torch.bfloat16)
        if half and got.numel() > 16:
            raise
        allowed = 4 * eps * magnitude
        if not bool(((got.double() - exact).abs() <= allowed).all()):
            raise


def check_call(number: int) -> None:
    """Check one call of `lora_linear`: its result and the requested gradients.

    Raises: AssertionError with the complete case.
    """
    call = draw_call(number)
    x = call.tensors["x"]
    assert x is not None
    cast = call.autocast is not None and x.dtype != torch.float64  # autocast leaves float64 alone
    dtype = call.autocast if cast and call.autocast is not None else x.dtype

    def leaves(kind: torch.dtype | None) -> dict[str, Tensor | None]:
        result: dict[str, Tensor | None] = {}
        for name, value in call.tensors.items():
            if value is None:
                result[name] = None
                continue
            # Rounded first to the low dtype in which the layer computes.
            given = value.detach() if kind is None else value.detach().to(dtype).to(kind)
            result[name] = given.requires_grad_(name in call.wanted and call.mode == "grad")
        return result

    context = {"no_grad": torch.no_grad, "inference": torch.inference_mode}.get(
        call.mode, nullcontext
    )
    got_leaves, same_leaves, exact_leaves = leaves(None), leaves(dtype), leaves(torch.float64)
    sizes = leaves(torch.float64)
    sizes = {
        n: v if v is None else v.detach().abs().requires_grad_(v.requires_grad)
        for n, v in sizes.items()
    }
    with (
        context(),
        torch.autocast("cpu", call.autocast) if call.autocast is not None else nullcontext(),
    ):
        arguments = [got_leaves[name] for name in NAMES]
        got = lora_linear(*arguments, call.scaling, call.p, call.seed)  # type: ignore[arg-type]
    same, exact = _plain(same_leaves, call), _plain(exact_leaves, call)
    large = _plain(sizes, replace(call, scaling=abs(call.scaling)))
    try:
        assert got.dtype == dtype and got.shape == exact.shape
        _close(got, same, exact, large, "y")
        if call.mode != "grad":
            assert not got.requires_grad
            return
        dy = call.dy.to(dtype)
        gradients = [
            torch.autograd.grad(y, [side[name] for name in call.wanted], dy.to(y.dtype))  # type: ignore[misc]
            for y, side in ((got, got_leaves), (same, same_leaves), (exact, exact_leaves))
        ]
        gradients.append(
            torch.autograd.grad(large, [sizes[n] for n in call.wanted], dy.abs().double())
        )  # type: ignore[misc]
        for name, g, s, e, size in zip(call.wanted, *gradients, strict=True):
            own = call.tensors[name]
            assert own is not None and g.dtype == own.dtype, f"{name}: {g.dtype}"
            # float32 adapters of a float64 layer get float64's gradient, rounded once.
            kind = min(dtype, own.dtype, key=lambda d: torch.finfo(d).bits)
            _close(g.to(kind), s.to(kind), e, size, f"gradient of {name}")
    except AssertionError as error:
        raise AssertionError(f"case {number}: {error}\n{call}") from None


def check_kernels(number: int) -> None:
    """Check one forward and backward pass of the Triton kernels (interpreted without a GPU) with a random plan."""
    from fastlora.ops.triton import linear as triton_linear  # needs Triton 3.4
    from tests.support import interpreter

    rng, generator = random.Random(number), torch.Generator().manual_seed(number)
    m, k, n = rng.randint(1, 70), 8 * rng.randint(1, 12), 8 * rng.randint(1, 12)
    rank, dtype = rng.choice([1, 4, 8, 16]), rng.choice(DTYPES[1:])
    p = rng.choice([0.0, 0.2])
    plan = rng.choice(
        [
            plan
            for plan in TRITON_PLANS
            if not (plan == "fused" and p)
            and not (plan == "decode" and m > 32)
            and not (plan in ("fused", "decode") and rank > fused_rank(dtype.itemsize, "ieee"))
        ]
    )
    x, weight, bias, a, b, dy = (
        torch.randn(*shape, generator=generator).bfloat16().to(dtype)
        for shape in ((m, k), (n, k), (n,), (rank, k), (n, rank), (m, n))
    )
    scaling, seed = 1.75, torch.tensor(number) if p else None
    low = LowRank(a, b, scaling, p, seed)
    with interpreter.bfloat16():
        y, s = triton_linear._forward(x, weight, bias, *low, plan=plan)
        grads = triton_linear._backward(dy, x, weight, s, *low, True, True, True, plan=plan)

    def plain(kind: torch.dtype) -> list[Tensor]:
        x_, w, b_, d = (v.to(kind) for v in (x, weight, bias, dy))
        out, s_ = reference.forward(x_, w, b_, low.to(kind))
        return [out, *reference.backward(d, x_, w, low.to(kind), s_)]

    same, exact = plain(dtype), plain(torch.float64)
    for name, g, one, e in zip(("y", "dx", "dA", "dB"), [y, *grads], same, exact, strict=True):
        assert_close(g.to(dtype), one, e, f"case {number}, {plan}, {(m, k, n, rank)}: {name}")


EXTREMES = (float("inf"), float("-inf"), float("nan"), 1e-40, -1e-40, 1e30, -1e30, 0.0, -0.0, 6e4)


def check_extreme(number: int) -> None:
    """Check a call in which one argument has some or only extreme values: inf, nan, subnormal, huge or zero.

    Results and gradients must have nan and the same infinities where the plain formula in the same dtype has them, and
    finite values within rounding of it.
    """
    rng, generator = random.Random(number), torch.Generator().manual_seed(number)
    m, k, n, rank = rng.randint(1, 9), rng.randint(1, 20), rng.randint(1, 20), rng.randint(1, 5)
    dtype = rng.choice([torch.float64, torch.float32, torch.bfloat16])
    shapes = {"x": (m, k), "weight": (n, k), "bias": (n,), "lora_a": (rank, k), "lora_b": (n, rank)}
    tensors: dict[str, Tensor | None] = {}
    changed, value, all_of_it = rng.choice(NAMES), rng.choice(EXTREMES), rng.random() < 0.3
    for name, shape in shapes.items():
        tensor = torch.randn(*shape, generator=generator).bfloat16().to(dtype)
        if name == changed:
            where = torch.rand(shape, generator=generator) < (1.0 if all_of_it else 0.1)
            tensor = torch.where(where, value, tensor)
        tensors[name] = tensor
    dy = torch.randn(m, n, generator=generator).bfloat16().to(dtype)
    p, seed, scaling = rng.choice([0.0, 0.4]), torch.tensor(number), 0.5
    call = Call(tensors, dy, scaling, p, seed, None, "grad", NAMES)
    results = []
    for function in (
        lambda t: lora_linear(*t, scaling, p, seed),
        lambda t: _plain(dict(zip(NAMES, t, strict=True)), call),
    ):
        given = [tensors[name].detach().clone().requires_grad_() for name in NAMES]  # type: ignore[union-attr]
        y = function(given)
        results.append([y, *torch.autograd.grad(y, given, dy)])
    where = f"case {number}: {value} in {changed}, {dtype}, p {p}"
    for name, got, plain in zip(("y", *NAMES), *results, strict=True):
        assert torch.equal(got.isnan(), plain.isnan()), f"{where}: nan in {name}"
        infinite = plain.isinf()
        assert torch.equal(got.isinf(), infinite), f"{where}: infinities in {name}"
        assert torch.equal(got[infinite], plain[infinite]), f"{where}: signs in {name}"
        finite = plain.isfinite()
        a, b = got[finite].double(), plain[finite].double()
        largest = b.abs().max().item() if b.numel() else 0.0
        slack = 16 * torch.finfo(dtype).eps * (k + n + rank + m)
        scale = max(largest, abs(value) if abs(value) < float("inf") else 0.0, 1.0)
        assert (a - b).abs().max().item() <= slack * scale if b.numel() else True, (
            f"{where}: {name}"
        )


def check_gradients(number: int) -> None:
    """Run `gradcheck` on a call of random size in float64, for every argument."""
    rng, generator = random.Random(number), torch.Generator().manual_seed(number)
    m, k, n, rank = (rng.randint(1, 5) for _ in range(4))
    shapes = [(m, k), (n, k), (n,), (rank, k), (n, rank)]
    leaves = [
        torch.randn(*s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes
    ]
    p, seed = rng.choice([0.0, 0.3]), torch.tensor(number)
    assert torch.autograd.gradcheck(lambda *t: lora_linear(*t, 0.7, p, seed), leaves)
