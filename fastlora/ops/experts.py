"""Autograd function of a bank of experts: rows sorted by group, each group with its own weight and factors.

For y = x W_gᵀ + scaling · (D(x) A_gᵀ) B_gᵀ in the rows of each group g. On the torch path every group is a slice, so nothing is gathered
and the offsets are read once; kernels for rows in groups leave the offsets on the device (`fastlora.ops.triton.experts`). Saved for the
backward pass: x, S (M, R), the seed, the offsets and the parameters. No ΔW and no copy of W is made. The dropout mask of an element depends
on its row in the whole x. To torch.compile and to dispatch modes each direction is one operator, which they cannot see into.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastlora.errors import ConfigError
from fastlora.ops import linear
from fastlora.ops.dispatch import choose_experts, transformed
from fastlora.ops.dropout import keep_blocks, keep_mask, zero_dropped
from fastlora.ops.products import grouped_product, groups_of, has_grouped_mm
from fastlora.ops.reference import LowRank, apply_dropout

# Up to so many rows for each group, the loops over the groups are torch's own on a CPU: half the time for 16 rows and K = N = 128.
_FEW_ROWS = 64
# The adapters of all groups: a (G, R, K) and b (G, N, R) of each `LowRank`, whose rank is not that of one matrix.
_LIBRARY = torch.library.Library("fastlora", "FRAGMENT")  # type: ignore[no-untyped-call]
_PATH = "Tensor? lora_a, Tensor? lora_b, float scaling, float p, Tensor? seed, bool triton"
Groups = Sequence[tuple[int, int, int]]  # group, first row, last + 1


def lora_experts(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    offsets: Tensor,
    scaling: float,
    p: float = 0.0,
    seed: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """y = x W_gᵀ + scaling · (dropout(x) A_gᵀ) B_gᵀ in the rows of each group g, differentiable in x, weight, lora_a and lora_b.

    x: (M, K), any float dtype, any strides, its rows sorted by group, empty allowed. weight: (G, N, K), x's dtype, any strides: a bank that
    is stored as (G, K, N) is passed as `.mT`. lora_a: (G, R, K) and lora_b: (G, N, R), any float dtype; they are cast to x's dtype.
    offsets: (G + 1,) int32 on x's device, ascending from 0 to at most M: rows offsets[g] … offsets[g + 1] − 1 belong to group g, which may be
    empty. Rows from offsets[G] on belong to none; their y and dx are zeros. On a GPU the values are not checked if kernels run.
    scaling, p, seed, backend, autocast: as in `lora_linear`; the mask counts the rows of the sorted x.
    Returns y (M, N) in x's dtype, newly allocated.

    On a GPU nothing waits for the offsets if kernels run and torch has a grouped product of the dtype (`products.has_grouped_mm`) and weight
    needs no gradient; otherwise each direction waits once.

    Raises: ConfigError if shapes, dtypes or devices do not fit; BackendError if `backend` cannot run.
    """
    if linear.autocasts(x):
        x, weight = linear.autocast(x), linear.autocast(weight)
    _check(x, weight, offsets)
    _check_factors(x, weight, lora_a, lora_b)
    low = linear.low_rank(lora_a, lora_b, scaling, p, seed)
    choice = choose_experts(x, lora_a.shape[1], weight=weight, backend=backend)
    triton = choice.backend == "triton"
    if not triton:
        low = low.to(x.dtype)  # kernels cast as they load
    if choice.plan == "composed":
        return _composed(x, weight, offsets, low)
    return _call(x, weight, offsets, low.a, low.b, low.scaling, low.p, low.seed, triton)


def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """y = x W_gᵀ in the rows of each group g, differentiable in x and weight; arguments and autocast as in `lora_experts`.

    On a GPU where torch has a grouped product (`products.has_grouped_mm`) nothing waits for the offsets unless weight needs a gradient, and their values are
    not checked.

    Raises: ConfigError if shapes, dtypes or devices do not fit.
    """
    if linear.autocasts(x):
        x, weight = linear.autocast(x), linear.autocast(weight)
    _check(x, weight, offsets)
    if transformed():
        return _composed(x, weight, offsets, None)
    return _call(x, weight, offsets, None, None, 1.0, 0.0, None, False)


def _check(x: Tensor, weight: Tensor, offsets: Tensor) -> None:
    if weight.ndim != 3 or weight.shape[0] == 0:
        raise ConfigError(f"weight: expected (G ≥ 1, N, K), got {tuple(weight.shape)}")
    groups, _, k = weight.shape
    if x.ndim != 2 or x.shape[1] != k:
        raise ConfigError(f"x: expected (M, K={k}), got {tuple(x.shape)}")
    if x.dtype != weight.dtype:
        raise ConfigError(f"x: expected the weight's dtype {weight.dtype}, got {x.dtype}")
    if x.device != weight.device:
        raise ConfigError(f"x: expected the weight's device {weight.device}, got {x.device}")
    if offsets.shape != (groups + 1,) or offsets.dtype != torch.int32:
        wanted = f"(G + 1 = {groups + 1},) torch.int32"
        raise ConfigError(f"offsets: expected {wanted}, got {tuple(offsets.shape)} {offsets.dtype}")
    if offsets.device != x.device:
        raise ConfigError(f"offsets: expected x's device {x.device}, got {offsets.device}")


def _check_factors(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> None:
    groups, n, k = weight.shape
    if lora_a.ndim != 3 or lora_a.shape[0] != groups or lora_a.shape[2] != k:
        raise ConfigError(f"lora_a: expected (G={groups}, R, K={k}), got {tuple(lora_a.shape)}")
    r = lora_a.shape[1]
    if lora_b.shape != (groups, n, r):
        wanted = f"(G={groups}, N={n}, R={r})"
        raise ConfigError(f"lora_b: expected {wanted}, got {tuple(lora_b.shape)}")
    for name, tensor in (("lora_a", lora_a), ("lora_b", lora_b)):
        if tensor.device != x.device:
            raise ConfigError(f"{name}: expected x's device {x.device}, got {tensor.device}")


def _call(x: Tensor, weight: Tensor, offsets: Tensor, *path: Any) -> Tensor:
    y: Tensor
    if not torch.is_grad_enabled():
        y = _direction("experts_forward", x)(x, weight, offsets, *path)[0]
        return y
    apply: Callable[..., Any] = _Experts.apply if torch.compiler.is_compiling() else _APPLY
    y = apply(x, weight, offsets, *path)
    return y


class _Experts(torch.autograd.Function):
    """`lora_experts`, or `grouped_linear` without factors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, offsets: Tensor, *path: Any) -> Tensor:
        a, b, scaling, p, seed, triton = path
        y, *s = _direction("experts_forward", x)(x, weight, offsets, *path)
        ctx.save_for_backward(x, weight, offsets, a, b, seed, *s)
        ctx.scaling, ctx.p, ctx.triton = scaling, p, triton
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> linear.Gradients:
        with linear.no_autocast(dy):  # the dtypes are those of the forward pass
            return _Experts._gradients(ctx, dy)

    @staticmethod
    def _gradients(ctx: Any, dy: Tensor) -> linear.Gradients:
        x, weight, offsets, a, b, seed, *s = ctx.saved_tensors
        scaling, p, triton = ctx.scaling, ctx.p, ctx.triton
        needs_x, needs_w, _, needs_a, needs_b = ctx.needs_input_grad[:5]
        needs = (needs_x, needs_w, needs_a, needs_b)
        if torch.is_grad_enabled():

            def output(
                x: Tensor, weight: Tensor, a: Tensor | None, b: Tensor | None
            ) -> list[Tensor]:
                low = None if a is None or b is None else LowRank(a, b, scaling, p, seed)
                return [_composed(x, weight, offsets, low, triton)]

            found = iter(linear.exact_gradients(output, (x, weight, a, b), needs, [dy]))
            dx, dweight, da, db = found
        else:
            run = _direction("experts_backward", x)
            s_or_none = s[0] if s else None
            path = (a, b, scaling, p, seed, triton)
            rows = linear.gradient_rows(dy)
            made = iter(run(rows, x, weight, offsets, s_or_none, *path, *needs))
            dx, dweight, da, db = (next(made) if needed else None for needed in needs)
        return dx, dweight, None, da, db, None, None, None, None


# As in `fastlora.ops.linear`: `transformed` excludes functorch's transforms.
_APPLY: Callable[..., Any] = super(torch.autograd.Function, _Experts).apply


def _direction(name: str, x: Tensor) -> Callable[..., Any]:
    """One direction, as an operator where a compiler, a dispatch mode or the meta device would have to read the offsets."""
    if _observed(x):
        return getattr(torch.ops.fastlora, name)  # type: ignore[no-any-return]
    return _forward if name == "experts_forward" else _backward


def _observed(x: Tensor) -> bool:
    if torch.compiler.is_compiling() or x.device.type == "meta":
        return True
    return torch._C._len_torch_dispatch_stack() > 0


def _forward(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    scaling: float,
    p: float,
    seed: Tensor | None,
    triton: bool,
) -> list[Tensor]:
    """y (M, N) and with factors S (M, R), which includes no factor and is undefined in the rows of no group."""
    if a is None or b is None:
        return [grouped_product(x, weight, offsets)]
    low = LowRank(a, b, scaling, p, seed)
    if triton:
        return _triton_experts().experts_forward(x, weight, offsets, low)  # type: ignore[no-any-return]
    groups = groups_of(offsets, x.shape[0])
    y = grouped_product(x, weight, offsets, groups)
    if _has_few_rows(x, low, groups):
        s = grouped_product(_kept(x, low), a, offsets, groups)
        return [y.add_(grouped_product(s, b, offsets, groups), alpha=low.scale()), s]
    s = x.new_empty(x.shape[0], a.shape[1])
    for group, start, stop in groups:
        own = low._replace(a=a[group], b=b[group])
        s[start:stop] = linear.down_project(x[start:stop], own, start)
        y[start:stop].addmm_(s[start:stop], own.b.T, alpha=own.scale())  # [rows, R] @ [R, N]
    return [y, s]


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    s: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    scaling: float,
    p: float,
    seed: Tensor | None,
    triton: bool,
    needs_x: bool,
    needs_w: bool,
    needs_a: bool,
    needs_b: bool,
) -> list[Tensor]:
    """dx (M, K), dW (G, N, K), dA (G, R, K) and dB (G, N, R), those that are needed."""
    dx = da = db = dweight = groups = None
    low = None if a is None or b is None else LowRank(a, b, scaling, p, seed)
    if needs_w or (low is not None and not triton):  # which waits for the offsets
        groups = groups_of(offsets, x.shape[0])
    if triton:
        needs = (needs_x, needs_a, needs_b)
        dx, da, db = _triton_experts().experts_backward(dy, x, weight, offsets, s, low, *needs)
    else:
        if needs_x:
            dx = grouped_product(dy, weight.mT, offsets, groups)
        if low is not None and s is not None and groups is not None:
            few = _has_few_rows(x, low, groups) and has_grouped_mm(dy, low.b.mT)
            run = _gradients_of_few_rows if few else _low_rank_gradients
            da, db = run(dy, x, s, dx, low, offsets, groups, needs_a, needs_b)
    if needs_w and groups is not None:
        dweight = torch.zeros_like(weight)
        for group, start, stop in groups:  # [N, rows] @ [rows, K] -> [N, K]
            torch.mm(dy[start:stop].T, x[start:stop], out=dweight[group])
    return [gradient for gradient in (dx, dweight, da, db) if gradient is not None]


def _low_rank_gradients(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    dx: Tensor | None,
    low: LowRank,
    offsets: Tensor,
    groups: Groups,
    needs_a: bool,
    needs_b: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """dA and dB, those that are needed; the update's share of dx is added to `dx`, unless it is None."""
    da = low.a.new_zeros(low.a.shape) if needs_a else None
    db = low.b.new_zeros(low.b.shape) if needs_b else None
    for group, start, stop in groups:
        own, dy_rows = low._replace(a=low.a[group], b=low.b[group]), dy[start:stop]
        if db is not None:
            db[group] = linear.b_gradient(dy_rows, s[start:stop], own)
        if dx is None and da is None:
            continue
        part = None if dx is None else dx[start:stop]
        ds_t = own.b.T @ dy_rows.T  # [R, N] @ [N, rows] -> [R, rows]
        found = linear.up_project(ds_t, x[start:stop], own, part, needs_a, start)
        if da is not None and found is not None:
            da[group] = found
    return da, db


def _has_few_rows(x: Tensor, low: LowRank, groups: Groups) -> bool:
    on_cpu, rows = x.device.type == "cpu", x.shape[0]
    return on_cpu and 0 < rows <= _FEW_ROWS * len(groups) and has_grouped_mm(x, low.a)


def _gradients_of_few_rows(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    dx: Tensor | None,
    low: LowRank,
    offsets: Tensor,
    groups: Groups,
    needs_a: bool,
    needs_b: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """`_low_rank_gradients` by products that are one operation for all groups."""
    da, db, ends, scale = None, None, offsets[1:], low.scale()
    if needs_b:
        db = torch._grouped_mm(dy.T, s, offs=ends).mul_(scale)  # [N, rows] @ [rows, R] -> [N, R]
    if dx is not None or needs_a:
        ds = grouped_product(dy, low.b.mT, offsets, groups)  # (M, R)
        if needs_a:  # [R, rows] @ [rows, K] -> [R, K]
            da = torch._grouped_mm(ds.T, _kept(x, low), offs=ends).mul_(scale)
        if dx is not None:
            update = grouped_product(ds, low.a.mT, offsets, groups)
            dx.add_(_kept(update, low), alpha=scale)
    return da, db


def _kept(x: Tensor, low: LowRank) -> Tensor:
    """keep ∘ x (M, K), a copy; x itself without dropout."""
    if low.seed is None:
        return x
    out = x.new_empty(x.shape)
    for rows, keep, _ in keep_blocks(x, low.p, low.seed):
        zero_dropped(x[rows], keep, out[rows])
    return out


def _triton_experts() -> Any:
    """The module that launches kernels; Triton is imported at the first call."""
    from fastlora.ops.triton import experts

    return experts


def _composed(
    x: Tensor, weight: Tensor, offsets: Tensor, low: LowRank | None, triton: bool = False
) -> Tensor:
    """The output as torch operations, for autograd and functorch. triton: as in `keep_mask`."""
    weights = weight.unbind()  # one gradient of the whole bank, not one for each group
    if low is not None:
        low = low.to(x.dtype)
        factors = list(zip(low.a.unbind(), low.b.unbind(), strict=True))
    parts, end = [], 0
    for group, start, end in groups_of(offsets, x.shape[0]):
        rows = x[start:end]
        y = F.linear(rows, weights[group])  # [rows, K] @ [K, N] -> [rows, N]
        if low is not None:
            a, b = factors[group]
            keep = keep_mask(rows, low.p, low.seed, triton, start)
            y = y + low.scaling * (apply_dropout(rows, low, keep) @ a.T @ b.T)
        parts.append(y)
    # Zeros that depend on x and weight, which therefore have gradients even if no row has a group.
    parts.append(x[end:, :0] @ weights[0][:, :0].T)
    return torch.cat(parts)


def _forward_shapes(
    x: Tensor, weight: Tensor, offsets: Tensor, a: Tensor | None, *others: Any
) -> list[Tensor]:
    y = x.new_empty(x.shape[0], weight.shape[1])
    return [y] if a is None else [y, x.new_empty(x.shape[0], a.shape[1])]


def _backward_shapes(
    dy: Tensor, x: Tensor, weight: Tensor, offsets: Tensor, s: Tensor | None, *others: Any
) -> list[Tensor]:
    a, b = others[:2]
    needs_x, needs_w, needs_a, needs_b = others[6:]
    return [
        *([x.new_empty(x.shape)] if needs_x else []),
        *([torch.empty_like(weight)] if needs_w else []),
        *(factor.new_empty(factor.shape) for factor, one in ((a, needs_a), (b, needs_b)) if one),
    ]


for _name, _arguments, _run, _shapes in (
    (
        "experts_forward",
        f"Tensor x, Tensor weight, Tensor offsets, {_PATH}",
        _forward,
        _forward_shapes,
    ),
    (
        "experts_backward",
        f"Tensor dy, Tensor x, Tensor weight, Tensor offsets, Tensor? s, {_PATH}, "
        "bool needs_x, bool needs_w, bool needs_a, bool needs_b",
        _backward,
        _backward_shapes,
    ),
):
    _LIBRARY.define(f"{_name}({_arguments}) -> Tensor[]")  # type: ignore[no-untyped-call]
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    _LIBRARY.impl(_name, _shapes, "Meta")  # type: ignore[no-untyped-call]
