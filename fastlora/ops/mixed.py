"""Autograd function of one linear layer with several adapters: rows of x with different ones, or all rows with the sum of several.

For y = x Wᵀ + bias + Σ over segments of scaling_i · (D_i(x) A_iᵀ) B_iᵀ in the rows of each segment. The base product is one for all rows. A segment
is a run of neighbouring rows, so its products read and write slices of x and y, and nothing is gathered. Saved for the backward pass: x, the
S of each segment and the seeds. The dropout mask of an element depends on its row in the whole x, wherever the segments lie.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastlora.errors import BackendError, ConfigError
from fastlora.ops import linear
from fastlora.ops.dispatch import resolve, transformed, why_not_triton
from fastlora.ops.dropout import keep_mask
from fastlora.ops.products import output_without_adapters, without_adapters
from fastlora.ops.reference import LowRank, apply_dropout

# Up to so many rows in each segment, products of stacked copies of the factors take no more time than a loop (measured on a CPU up to
# K = N = 4096), and a fourth for one row and K = N = 64.
_FEW_ROWS = 32
# Scaling, p and the place of the seed among the different seeds of the call.
Constants = tuple[float, float, "int | None"]


class Segment(NamedTuple):
    """The rows start … stop − 1 of x (M, K), which have the adapter of this number. Segments may overlap: their updates add up."""

    start: int
    stop: int
    adapter: int


def neighbours(
    samples: Sequence[str | None], adapters: Sequence[str]
) -> list[tuple[int, int, int]]:
    """(first sample, last + 1, place in `adapters`) of each run of neighbouring samples that have one of the adapters."""
    runs: list[tuple[int, int, int]] = []
    places = {name: place for place, name in enumerate(adapters)}
    for at, name in enumerate(samples):
        place = None if name is None else places.get(name)
        if place is None:
            continue
        if runs and runs[-1][1:] == (at, place):
            runs[-1] = (runs[-1][0], at + 1, place)
        else:
            runs.append((at, at + 1, place))
    return runs


def lora_linear_mixed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lows: Sequence[LowRank],
    segments: Sequence[Segment],
    *,
    backend: str = "auto",
    recompute: Callable[[], Tensor] | None = None,
) -> Tensor:
    """y = x Wᵀ + bias, and in the rows of each segment + scaling · (dropout(x) Aᵀ) Bᵀ of its adapter; differentiable in every tensor.

    x: (..., K); its leading dimensions are flattened to the M rows that segments count. weight, bias, recompute: as in `lora_linear`.
    lows: the adapters, of any rank; one or more. Where kernels run, those with dropout share a seed. backend, autocast: as in `lora_linear`.
    Returns y (..., N) in x's dtype, newly allocated.

    Raises: ConfigError if shapes, dtypes or devices do not fit; BackendError if `backend` cannot run.
    """
    if linear.autocasts(x):
        x, weight = linear.autocast(x), linear.autocast(weight)
        bias = None if bias is None else linear.autocast(bias)
    linear.check_call(x, weight, bias, lows[0].a, lows[0].b)
    n, k = weight.shape
    for low in lows[1:]:
        _check(low, n, k, x.device)
    if recompute is not None and weight.requires_grad:
        raise ConfigError("weight: expected no requires_grad, since recompute is given")
    return _call(x, weight, bias, None, lows, segments, recompute, backend)


def lora_update_mixed(
    y: Tensor,
    x: Tensor,
    lows: Sequence[LowRank],
    segments: Sequence[Segment],
    *,
    backend: str = "auto",
) -> Tensor:
    """`lora_linear_mixed` for a base output y (..., N) that another module computed. x is cast to y's dtype.

    Raises: ConfigError if shapes or devices do not fit, or y is not floating-point; BackendError if `backend` cannot run.
    """
    for low in lows:
        linear.check_update(y, x, low.a, low.b)
    with linear.no_autocast(y):  # the result keeps y's dtype, which the wrapped layer chose
        return _call(x.to(y.dtype), None, None, y, lows, segments, None, backend)


def why_not_kernels(
    device: str, dtype: torch.dtype, ranks: Sequence[int], forced: bool
) -> str | None:
    """Why adapters of these ranks, each for its own rows, run on torch's operations; None if kernels run them. forced: as in `why_not_triton`."""
    reason = why_not_triton(device, dtype, max(ranks), forced=forced)
    if reason is not None:
        return reason.reason
    highest = _triton_mixed().HIGHEST_RANK
    if max(ranks) > highest:
        return f"rank {max(ranks)} is above {highest}, the highest that kernels for several adapters support"
    return None


def _by_kernels(
    x: Tensor, lows: Sequence[LowRank], segments: Sequence[Segment], backend: str
) -> bool:
    """Whether the call runs kernels. Raises: BackendError if they are forced and cannot."""
    wanted = resolve(backend)
    if wanted == "torch":
        return False
    forced, reason = wanted == "triton", None
    ascending = all(one.stop <= other.start for one, other in pairwise(segments))
    if not ascending or not segments or x.numel() == 0:
        reason = "there is no kernel for the sum of several adapters, nor for no rows"
    elif _have_several_seeds(lows):
        reason = "the adapters have seeds of their own"
    elif torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        reason = (
            "a compiler or a dispatch mode handles several adapters at once as torch's operations"
        )
    else:
        ranks = [low.rank() for low in lows]
        reason = why_not_kernels(x.device.type, x.dtype, ranks, forced)
    if reason is not None and forced:
        raise BackendError(f"backend='triton' cannot run: {reason}")
    return reason is None


def _have_several_seeds(lows: Sequence[LowRank]) -> bool:
    seeds = [low.seed for low in lows if low.seed is not None]
    return any(seed is not seeds[0] for seed in seeds)  # compiled code has no id() of a tensor


def _triton_mixed() -> Any:
    """The module that launches kernels; Triton is imported at the first call."""
    from fastlora.ops.triton import mixed

    return mixed


def _check(low: LowRank, n: int, k: int, device: torch.device) -> None:
    """`check_call` for one more adapter."""
    linear.check_factors(low.a, low.b, n, k)
    for name, factor in (("lora_a", low.a), ("lora_b", low.b)):
        if factor.device != device:
            raise ConfigError(f"{name}: expected x's device {device}, got {factor.device}")


def _in_dtype(lows: Sequence[LowRank], dtype: torch.dtype) -> list[LowRank]:
    return [low if low.a.dtype == low.b.dtype == dtype else low.to(dtype) for low in lows]


def _call(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
    lows: Sequence[LowRank],
    segments: Sequence[Segment],
    recompute: Callable[[], Tensor] | None,
    backend: str,
) -> Tensor:
    if transformed():
        return _composed(x, weight, bias, base, _in_dtype(lows, x.dtype), segments)
    triton = _by_kernels(x, lows, segments, backend)
    if not triton or len({tensor.dtype for low in lows for tensor in (low.a, low.b)}) > 1:
        lows = _in_dtype(lows, x.dtype)  # kernels cast as they load, if all have one dtype
    if not torch.is_grad_enabled():
        if not triton and _alike(lows, segments):
            return _batched(x, weight, bias, base, lows, segments)
        return _forward(x, weight, bias, base, lows, segments, triton)[0]
    factors = [tensor for low in lows for tensor in (low.a, low.b)]
    seeds: list[Tensor] = []  # each once, because Dynamo supports no tensor that is passed twice
    constants: list[Constants] = []
    for low in lows:
        if low.seed is None:
            constants.append((low.scaling, low.p, None))
            continue
        if not seeds or low.seed is not seeds[-1]:
            seeds.append(low.seed)
        constants.append((low.scaling, low.p, len(seeds) - 1))
    apply: Callable[..., Any] = _Mixed.apply if torch.compiler.is_compiling() else _APPLY
    y: Tensor = apply(
        x,
        weight,
        bias,
        base,
        recompute,
        triton,
        tuple(constants),
        tuple(segments),
        *factors,
        *seeds,
    )
    return y


class _Mixed(torch.autograd.Function):
    """Several adapters of one layer. Without `base` its weight and bias give the base output."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        base: Tensor | None,
        recompute: Callable[[], Tensor] | None,
        triton: bool,
        constants: tuple[Constants, ...],
        segments: tuple[Segment, ...],
        *tensors: Tensor | None,
    ) -> Tensor:
        y, s = _forward(x, weight, bias, base, _lows(tensors, constants), segments, triton)
        ctx.save_for_backward(x, weight if recompute is None else None, *s, *tensors)
        ctx.recompute, ctx.triton, ctx.saved = recompute, triton, len(s)
        ctx.constants, ctx.segments = constants, segments
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> linear.Gradients:
        with linear.no_autocast(dy):  # the dtypes are those of the forward pass
            return _Mixed._gradients(ctx, dy)

    @staticmethod
    def _gradients(ctx: Any, dy: Tensor) -> linear.Gradients:
        x, weight, *rest = ctx.saved_tensors
        s, tensors = rest[: ctx.saved], rest[ctx.saved :]
        needs_x, needs_w, needs_bias, needs_base = ctx.needs_input_grad[:4]
        needs = ctx.needs_input_grad[8:]
        if ctx.recompute is not None:
            weight = linear.weight_again(ctx.recompute, x, tensors[1], needs_x)
        if torch.is_grad_enabled():

            def output(x: Tensor, weight: Tensor | None, *tensors: Tensor) -> list[Tensor]:
                lows = _lows(tensors, ctx.constants)
                lows = _in_dtype(lows, x.dtype)
                return [_composed(x, weight, None, None, lows, ctx.segments, ctx.triton)]

            inputs, wanted = (x, weight, *tensors), (needs_x, needs_w, *needs)
            dx, dweight, *found = linear.exact_gradients(output, inputs, wanted, [dy])
        else:
            flat, rows = linear.as_rows(x), linear.gradient_rows(dy)
            lows = _lows(tensors, ctx.constants)
            if ctx.triton:
                factors = needs[: 2 * len(lows)]
                dx, found = _triton_mixed().mixed_backward(
                    rows, flat, weight, *s, lows, ctx.segments, needs_x, factors
                )
                found += [None] * (len(needs) - len(factors))  # of the seeds
            else:
                dx = without_adapters(flat, rows, weight) if needs_x else None
                found = _backward(rows, flat, dx, lows, ctx.segments, s, needs)
            dx = None if dx is None else linear.shaped_as(x, dx)
            dweight = rows.T @ flat if needs_w else None  # [N, M] @ [M, K] -> [N, K]
        dbias = linear.as_rows(dy).sum(0) if needs_bias else None
        return dx, dweight, dbias, dy if needs_base else None, None, None, None, None, *found


# As in `fastlora.ops.linear`: `transformed` excludes functorch's transforms.
_APPLY: Callable[..., Any] = super(torch.autograd.Function, _Mixed).apply


def _lows(tensors: Sequence[Tensor | None], constants: Sequence[Constants]) -> list[LowRank]:
    """The adapters of A and B of each, and then the seeds."""
    seeds: Any = tensors[2 * len(constants) :]
    found: Any = zip(tensors[::2], tensors[1::2], constants, strict=False)
    return [
        LowRank(a, b, scaling, p, None if seed is None else seeds[seed])
        for a, b, (scaling, p, seed) in found
    ]


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
    lows: Sequence[LowRank],
    segments: Sequence[Segment],
    triton: bool,
) -> tuple[Tensor, list[Tensor]]:
    """y (..., N) and the S of each segment (rows, R), which includes no factor; with kernels one S of all rows."""
    flat = linear.as_rows(x)  # [M, K]
    rows = None if base is None else linear.as_rows(base)
    if triton:
        y, s = _triton_mixed().mixed_forward(flat, weight, bias, rows, lows, segments)
        return linear.shaped_as(x, y), [s]
    y = output_without_adapters(flat, weight, bias, rows)
    found = []
    for segment in segments:
        low = lows[segment.adapter]
        s = linear.down_project(_rows(flat, segment), low, segment.start)
        _rows(y, segment).addmm_(s, low.b.T, alpha=low.scale())  # [rows, R] @ [R, N]
        found.append(s)
    return linear.shaped_as(x, y), found


def _alike(lows: Sequence[LowRank], segments: Sequence[Segment]) -> bool:
    """Whether the segments follow each other with equally many, few rows, and their adapters differ in A and B only."""
    if len(segments) < 2:
        return False
    start, stop, adapter = segments[0]
    rows, first = stop - start, lows[adapter]
    if not 0 < rows <= _FEW_ROWS:
        return False
    for at, segment in enumerate(segments):
        low = lows[segment.adapter]
        begin = start + at * rows
        if segment.start != begin or segment.stop != begin + rows or low.seed is not None:
            return False
        if low.rank() != first.rank() or low.scaling != first.scaling:
            return False
    return True


def _batched(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
    lows: Sequence[LowRank],
    segments: Sequence[Segment],
) -> Tensor:
    """`_forward` of segments that are `_alike`: as many products of torch for all of them as for one, each row still by its own adapter."""
    flat, (start, stop, _) = linear.as_rows(x), segments[0]
    y = output_without_adapters(flat, weight, bias, None if base is None else linear.as_rows(base))
    shape, end = (len(segments), stop - start), segments[-1].stop
    a = torch.stack([lows[segment.adapter].a for segment in segments])  # (G, R, K)
    b = torch.stack([lows[segment.adapter].b for segment in segments])  # (G, N, R)
    s = torch.bmm(flat[start:end].view(*shape, a.shape[2]), a.mT)  # [G, rows, K] @ [G, K, R]
    y[start:end].view(*shape, b.shape[1]).baddbmm_(s, b.mT, alpha=lows[segments[0].adapter].scaling)
    return linear.shaped_as(x, y)


def _backward(
    dy: Tensor,
    x: Tensor,
    dx: Tensor | None,
    lows: Sequence[LowRank],
    segments: Sequence[Segment],
    s: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of the adapters' tensors, None for what is not needed; the updates' share of dx is added to `dx`, unless it is None.

    dy: (M, N). x: (M, K). needs: of A and B of each adapter, and of the seeds.
    """
    found: list[Tensor | None] = [None] * len(needs)
    for segment, s_rows in zip(segments, s, strict=True):
        low, at = lows[segment.adapter], 2 * segment.adapter
        needs_a, needs_b = needs[at], needs[at + 1]
        dy_rows = _rows(dy, segment)
        if needs_b:
            found[at + 1] = _sum(found[at + 1], linear.b_gradient(dy_rows, s_rows, low))
        if dx is not None or needs_a:
            part = None if dx is None else _rows(dx, segment)
            ds_t = low.b.T @ dy_rows.T  # [R, N] @ [N, rows] -> [R, rows]
            da = linear.up_project(ds_t, _rows(x, segment), low, part, needs_a, segment.start)
            if da is not None:
                found[at] = _sum(found[at], da)
    return found


def _sum(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)


def _rows(matrix: Tensor, segment: Segment) -> Tensor:
    start, stop, _ = segment
    return matrix if stop - start == matrix.shape[0] else matrix[start:stop]


def _composed(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
    lows: Sequence[LowRank],
    segments: Sequence[Segment],
    triton: bool = False,
) -> Tensor:
    """The output as torch operations, for autograd and functorch; only the updates if weight and base are None. triton: as in `keep_mask`."""
    flat = linear.as_rows(x)
    if weight is not None:
        y = F.linear(flat, weight, bias)
    elif base is not None:
        y = linear.as_rows(base)
    else:
        y = flat.new_zeros(flat.shape[0], lows[0].b.shape[0])
    for segment in segments:
        low, rows = lows[segment.adapter], _rows(flat, segment)
        keep = keep_mask(rows, low.p, low.seed, triton, segment.start)
        s = apply_dropout(rows, low, keep) @ low.a.T  # [rows, K] @ [K, R] -> [rows, R]
        update = low.scaling * (s @ low.b.T)  # [rows, R] @ [R, N] -> [rows, N]
        y = y + F.pad(update, (0, 0, segment.start, flat.shape[0] - segment.stop))
    return linear.shaped_as(x, y)
