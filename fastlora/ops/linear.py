"""Autograd functions of one layer: `lora_linear`, the function behind `LoRALinear`, and `lora_update`.

For `x Wᵀ + scaling · (D(x) Aᵀ) Bᵀ` autograd would save x, D(x), the dropout mask and the small S. The functions here save x
(which the caller usually keeps alive), S (M, R) and a seed of 8 bytes, and recompute the mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastlora.config import computes_in
from fastlora.errors import ConfigError
from fastlora.ops import reference
from fastlora.ops.dispatch import choose, transformed
from fastlora.ops.dropout import (
    FEW_ELEMENTS,
    dropout_threshold,
    dropped,
    keep_blocks,
    keep_mask,
    zero_dropped,
)
from fastlora.ops.products import with_product
from fastlora.ops.reference import LowRank

Gradients = tuple[Tensor | None, ...]


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    p: float = 0.0,
    seed: Tensor | None = None,
    *,
    backend: str = "auto",
    recompute: Callable[[], Tensor] | None = None,
) -> Tensor:
    """y = x Wᵀ + bias + scaling · (dropout(x) Aᵀ) Bᵀ, differentiable in every tensor argument.

    x: (..., K), any float dtype, any strides, empty allowed. weight: (N, K) and bias: (N,) or None, of x's dtype.
    lora_a: (R, K) and lora_b: (N, R), any float dtype; they are cast to x's dtype.
    scaling: the applied factor, alpha / rank. p: dropout probability, 0 ≤ p < 1, used only if `seed` is given.
    seed: 0-d int64 tensor on x's device or the CPU. One device drops the same elements for the same seed, whether the call is compiled,
    transformed by functorch or neither; `fastlora.ops.dropout.keep_mask` decides which.
    recompute: returns the value of `weight` again, which is then not kept for the backward pass: a pass that needs it calls this once. The
    weight must be a constant in the dtype of the computation.
    Returns y (..., N) in x's dtype, newly allocated. Under autocast all of them are cast to its dtype.

    Raises: ConfigError if shapes, dtypes or devices do not fit; BackendError if `backend` cannot run.
    """
    if autocasts(x):
        x, weight = autocast(x), autocast(weight)
        bias = None if bias is None else autocast(bias)
    check_call(x, weight, bias, lora_a, lora_b)
    if recompute is not None and weight.requires_grad:
        raise ConfigError("weight: expected no requires_grad, since recompute is given")
    low = low_rank(lora_a, lora_b, scaling, p, seed)
    choice = choose(
        x, weight, low.rank(), dropout=low.seed is not None, backend=backend, with_plan=False
    )
    triton = choice.backend == "triton"
    if not triton and (lora_a.dtype != x.dtype or lora_b.dtype != x.dtype):
        low = low.to(x.dtype)  # kernels cast as they load
    if choice.plan == "composed":
        return composed(x, weight, bias, low)
    if not torch.is_grad_enabled():
        return _forward(x, weight, bias, None, low, triton)[0]
    y: Tensor = _apply()(x, weight, bias, None, triton, recompute, *low)
    return y


def lora_update(
    y: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """y + scaling · (dropout(x) Aᵀ) Bᵀ for a base output y (..., N) that another module computed; arguments as in `lora_linear`.

    x is cast to y's dtype. Saved for the backward pass: x, S and the seed, as in `lora_linear`.

    Raises: ConfigError if shapes or devices do not fit, or y is not floating-point.
    """
    check_update(y, x, lora_a, lora_b)
    with no_autocast(y):  # the result keeps y's dtype, which the wrapped layer chose
        x, low = x.to(y.dtype), low_rank(lora_a, lora_b, scaling, p, seed).to(y.dtype)
        if transformed():
            return y + composed(x, None, None, low)
        if not torch.is_grad_enabled():
            return _forward(x, None, None, y, low)[0]
        z: Tensor = _apply()(x, None, None, y, False, None, *low)
    return z


def low_rank(
    lora_a: Tensor, lora_b: Tensor, scaling: float, p: float, seed: Tensor | None
) -> LowRank:
    """The value of these arguments, without a seed if p' is 0."""
    drops = seed is not None and dropout_threshold(p) > 0
    return LowRank(lora_a, lora_b, scaling, p, seed if drops else None)


def _in_blocks(x: Tensor) -> bool:
    """Whether dropout processes x in cache-sized blocks: on a CPU, but not in a graph, where the mask is one operator."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


class _LoRALinear(torch.autograd.Function):
    """`lora_linear`, or `lora_update` of `base`, where weight and bias are None.

    `forward(ctx, …)` rather than `setup_context`, which costs tens of microseconds a call.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        base: Tensor | None,
        triton: bool,
        recompute: Callable[[], Tensor] | None,
        *path: Any,
    ) -> Tensor:
        low = LowRank(*path)
        y, s = _forward(x, weight, bias, base, low, triton)
        kept = weight if recompute is None else None
        ctx.save_for_backward(x, kept, low.a, low.b, s, low.seed)
        ctx.scaling, ctx.p, ctx.triton, ctx.recompute = low.scaling, low.p, triton, recompute
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        if not autocasts(dy):
            return _LoRALinear._gradients(ctx, dy)
        with no_autocast(dy):  # the dtypes are those of the forward pass
            return _LoRALinear._gradients(ctx, dy)

    @staticmethod
    def _gradients(ctx: Any, dy: Tensor) -> Gradients:
        x, weight, a, b, s, seed = ctx.saved_tensors
        scaling, p, triton = ctx.scaling, ctx.p, ctx.triton
        needs_x, needs_w, needs_bias, needs_base, _, _, needs_a, needs_b = ctx.needs_input_grad[:8]
        if ctx.recompute is not None:
            weight = weight_again(ctx.recompute, x, b, needs_x)
        if torch.is_grad_enabled():

            def output(x: Tensor, weight: Tensor | None, a: Tensor, b: Tensor) -> list[Tensor]:
                return [composed(x, weight, None, LowRank(a, b, scaling, p, seed), triton)]

            needs = (needs_x, needs_w, needs_a, needs_b)
            dx, dweight, da, db = exact_gradients(output, (x, weight, a, b), needs, [dy])
        else:
            low, flat, rows = LowRank(a, b, scaling, p, seed), as_rows(x), gradient_rows(dy)
            if triton:
                wanted = (needs_x, needs_a, needs_b)
                found = iter(triton_linear().lora_backward()(rows, flat, weight, s, *low, *wanted))
                dx, da, db = (next(found) if one else None for one in wanted)
            else:
                dx = da = db = None
                if needs_x:  # [M, N] @ [N, K] -> [M, K]
                    dx = torch.zeros_like(flat) if weight is None else rows @ weight
                if needs_b:
                    db = b_gradient(rows, s, low)
                if needs_x or needs_a:
                    da = up_project(b.T @ rows.T, flat, low, dx, needs_a)
            dx = None if dx is None else shaped_as(x, dx)
            dweight = rows.T @ flat if needs_w else None  # [N, M] @ [M, K] -> [N, K]
        dbias = as_rows(dy).sum(0) if needs_bias else None
        return dx, dweight, dbias, dy if needs_base else None, None, None, da, db, None, None, None


def weight_again(recompute: Callable[[], Tensor], x: Tensor, b: Tensor, needs_x: bool) -> Tensor:
    """The weight (N, K) in a backward pass; only dx reads its values. Raises: ConfigError if it does not fit."""
    shape = (b.shape[0], x.shape[-1])
    if not needs_x and not torch.is_grad_enabled():
        return x.new_empty(shape)
    weight = recompute().detach()
    if weight.shape != shape or weight.dtype != x.dtype:
        got = f"{tuple(weight.shape)} in {weight.dtype}"
        raise ConfigError(f"recompute: expected {shape} in {x.dtype}, got {got}")
    return weight


# Without the search for functorch's transforms in every argument, which takes longer than a small product: `transformed` excludes them.
_APPLY: Callable[..., Any] = super(torch.autograd.Function, _LoRALinear).apply


def _apply() -> Callable[..., Any]:
    return _LoRALinear.apply if torch.compiler.is_compiling() else _APPLY


def exact_gradients(
    function: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    needs: Sequence[bool],
    dys: Sequence[Tensor],
) -> list[Tensor | None]:
    """The gradients of `function(*inputs)` for dys, with respect to the inputs that `needs` marks, from a computation that autograd records.

    They are differentiable if gradients are enabled, as in a double backward pass.
    """
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, so that the gradient of one input does not flow through another that was computed from it.
        views = [None if t is None else t.view_as(t) for t in inputs]
        outputs = function(*views)
    wanted = [v for v, needed in zip(views, needs, strict=True) if v is not None and needed]
    found = iter(
        torch.autograd.grad(outputs, wanted, dys, create_graph=differentiable, allow_unused=True)
    )
    return [next(found) if needed else None for needed in needs]


def composed(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, low: LowRank, triton: bool = False
) -> Tensor:
    """`lora_linear` as torch operations, for autograd and functorch; only the low-rank product if weight is None."""
    flat, low = as_rows(x), low.to(x.dtype)
    keep = keep_mask(flat, low.p, low.seed, triton)
    if weight is not None:
        return shaped_as(x, reference.forward(flat, weight, bias, low, keep)[0])
    s = reference.apply_dropout(flat, low, keep) @ low.a.T  # [M, K] @ [K, R] -> [M, R]
    return shaped_as(x, low.scaling * (s @ low.b.T))


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
    low: LowRank,
    triton: bool = False,
) -> tuple[Tensor, Tensor]:
    """y (..., N) and S (M, R), which includes no factor."""
    flat = as_rows(x)  # [M, K]
    if triton:
        y, s = triton_linear().lora_forward()(flat, weight, bias, *low)
        return shaped_as(x, y), s
    s = down_project(flat, low)  # [M, R]
    if base is not None:  # [M, N] + [M, R] @ [R, N]
        return shaped_as(x, torch.addmm(as_rows(base), s, low.b.T, alpha=low.scale())), s
    assert weight is not None
    y = F.linear(flat, weight, bias)  # [M, K] @ [K, N] -> [M, N]
    y = with_product(y, s, low.b.T, low.scale())
    return shaped_as(x, y), s


def triton_group() -> Any:
    """The module that launches kernels for a group of layers."""
    from fastlora.ops.triton import group

    return group


def triton_linear() -> Any:
    """The module that launches kernels; Triton is imported at the first call."""
    from fastlora.ops.triton import linear

    return linear


def down_project(x: Tensor, low: LowRank, first_row: int = 0) -> Tensor:
    """S = (keep ∘ x) Aᵀ, [M, K] @ [K, R] -> [M, R]. first_row: as in `keep_mask`."""
    if low.seed is None:
        return x @ low.a.T
    if not _in_blocks(x):
        return zeroed(x, keep_mask(x, low.p, low.seed, first_row=first_row)) @ low.a.T
    if 0 < x.numel() <= FEW_ELEMENTS:
        return x.masked_fill(dropped(x, low.p, low.seed, first_row), 0) @ low.a.T
    s = x.new_empty(x.shape[0], low.rank())
    for rows, keep, work in keep_blocks(x, low.p, low.seed, first_row):
        torch.mm(zero_dropped(x[rows], keep, work), low.a.T, out=s[rows])
    return s


def up_project(
    ds_t: Tensor, x: Tensor, low: LowRank, dx: Tensor | None, needs_a: bool, first_row: int = 0
) -> Tensor | None:
    """Add scale · keep ∘ (dS A) into dx (unless None) and return dA = scale · dSᵀ (keep ∘ x) (or None), one mask for both.

    ds_t: dSᵀ (R, M) without a factor, the layout in which both products are fast.
    """
    scale = low.scale()
    if low.seed is None:
        if dx is not None:
            dx.addmm_(ds_t.T, low.a, alpha=scale)  # [M, R] @ [R, K] -> [M, K]
        return scaled_product(ds_t, x, scale, low.a) if needs_a else None
    if not _in_blocks(x):
        keep = keep_mask(x, low.p, low.seed, first_row=first_row)
        if dx is not None:
            dx += scale * zeroed(ds_t.T @ low.a, keep)  # inductor ignores `alpha` of `add_` here
        return scaled_product(ds_t, zeroed(x, keep), scale, low.a) if needs_a else None
    if 0 < x.numel() <= FEW_ELEMENTS:
        none = dropped(x, low.p, low.seed, first_row)
        if dx is not None:
            dx.add_((ds_t.T @ low.a).masked_fill_(none, 0), alpha=scale)
        return scaled_product(ds_t, x.masked_fill(none, 0), scale, low.a) if needs_a else None
    ds = ds_t.T.contiguous()  # [M, R]: in this layout the small products need about half the time
    da = torch.zeros_like(low.a) if needs_a else None
    for rows, keep, work in keep_blocks(x, low.p, low.seed, first_row):
        if dx is not None:
            torch.mm(ds[rows], low.a, out=work)
            dx[rows].add_(zero_dropped(work, keep, work), alpha=scale)
        if da is not None:
            da.addmm_(ds_t[:, rows], zero_dropped(x[rows], keep, work), alpha=scale)
    return da


def zeroed(x: Tensor, keep: Tensor | None) -> Tensor:
    """keep ∘ x; a dropped element is exactly 0, even if it was infinite or NaN."""
    return x if keep is None else torch.where(keep, x, 0.0)


def b_gradient(dy: Tensor, s: Tensor, low: LowRank) -> Tensor:
    """dB = scale · dyᵀ S  # [N, M] @ [M, R] -> [N, R]"""
    if dy.numel() <= FEW_ELEMENTS:
        return scaled_product(dy.T, s, low.scale(), low.b)
    return scaled_product(s.T, dy, low.scale(), low.b.T).T  # reads dy in its own order


def scaled_product(one: Tensor, other: Tensor, scaling: float, shape: Tensor) -> Tensor:
    """scaling · one @ other as one operation; it has the shape of `shape`, whose values are not read."""
    return torch.addmm(shape, one, other, beta=0, alpha=scaling)


def as_rows(x: Tensor) -> Tensor:
    """x (..., K) as (M, K)."""
    if x.ndim == 2:
        return x
    return x.flatten(0, -2) if x.ndim > 2 else x.unsqueeze(0)


def shaped_as(x: Tensor, rows: Tensor) -> Tensor:
    """rows (M, N), just computed, with the leading dimensions of x.

    Not a view: autograd forbids in-place operations on a view that an autograd function returns.
    """
    if x.ndim == 2:
        return rows
    y: Tensor = torch.ops.aten._unsafe_view(rows, [*x.shape[:-1], rows.shape[-1]])
    return y


def gradient_rows(dy: Tensor) -> Tensor:
    """dy (..., N) as (M, N). An expanded gradient is copied once; otherwise every product would copy it."""
    dy = as_rows(dy)
    # Older versions of torch.compile cannot trace stride().
    return dy.contiguous() if not torch.compiler.is_compiling() and 0 in dy.stride() else dy


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for x's device."""
    device = x.device.type  # older versions of torch.compile cannot trace is_meta
    return device != "meta" and torch.is_autocast_enabled(device)


def no_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Context manager: turns autocast off on the tensor's device."""
    if autocasts(tensor):
        return torch.autocast(tensor.device.type, enabled=False)
    return nullcontext()


def autocast(tensor: Tensor) -> Tensor:
    """`tensor` as autocast casts an argument of a matrix product: float64 and integers are unchanged."""
    eligible = tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(torch.get_autocast_dtype(tensor.device.type)) if eligible else tensor


def check_call(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor
) -> None:
    n, k = weight.shape
    if x.ndim == 0 or x.shape[-1] != k:
        raise ConfigError(f"x: expected (..., K={k}), got {tuple(x.shape)}")
    if x.dtype != weight.dtype:
        raise ConfigError(f"x: expected the weight's dtype {weight.dtype}, got {x.dtype}")
    device = x.device
    if device != weight.device:
        raise ConfigError(f"x: expected the weight's device {weight.device}, got {device}")
    check_factors(lora_a, lora_b, n, k)
    if bias is not None and bias.shape != (n,):
        raise ConfigError(f"bias: expected (N={n},), got {tuple(bias.shape)}")
    for name, tensor in (("lora_a", lora_a), ("lora_b", lora_b), ("bias", bias)):
        if tensor is not None and tensor.device != device:
            raise ConfigError(f"{name}: expected x's device {device}, got {tensor.device}")


def check_update(y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor) -> None:
    """`check_call` for `lora_update`, whose weight is unknown: y (..., N) and x (..., K) determine the shapes."""
    if not computes_in(y.dtype):
        raise ConfigError(f"y: expected a floating-point dtype, got {y.dtype}")
    if y.ndim == 0 or x.ndim == 0 or y.shape[:-1] != x.shape[:-1]:
        raise ConfigError(f"x: expected (..., K) for y {tuple(y.shape)}, got {tuple(x.shape)}")
    check_factors(lora_a, lora_b, y.shape[-1], x.shape[-1])
    for name, tensor in (("x", x), ("lora_a", lora_a), ("lora_b", lora_b)):
        if tensor.device != y.device:
            raise ConfigError(f"{name}: expected y's device {y.device}, got {tensor.device}")


def check_factors(lora_a: Tensor, lora_b: Tensor, n: int, k: int) -> None:
    if lora_a.ndim != 2 or lora_a.shape[1] != k:
        raise ConfigError(f"lora_a: expected (R, K={k}), got {tuple(lora_a.shape)}")
    r = lora_a.shape[0]
    if lora_b.shape != (n, r):
        raise ConfigError(f"lora_b: expected (N={n}, R={r}), got {tuple(lora_b.shape)}")
