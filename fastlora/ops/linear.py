"""Autograd glue: `lora_linear`, the function behind `LoRALinear`.

What autograd would save for `x Wᵀ + scaling · (D(x) Aᵀ) Bᵀ` is x, D(x) and the dropout mask, besides the small S. The
function here saves x (which the caller holds anyway), S (M, R) and a seed of 8 bytes, and makes the mask again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastlora.errors import ConfigError
from fastlora.ops import reference
from fastlora.ops.cpu_dropout import keep_blocks, zero_dropped
from fastlora.ops.dispatch import choose


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
) -> Tensor:
    """y = x Wᵀ + bias + scaling · (dropout(x) Aᵀ) Bᵀ, differentiable in every tensor argument.

    x: (..., K), any float dtype, any strides, empty allowed. weight: (N, K) and bias: (N,) or None, of x's dtype.
    lora_a: (R, K) and lora_b: (N, R), any float dtype: they are cast to x's dtype, x never is.
    scaling: the applied factor, alpha / rank. p: dropout probability, 0 ≤ p < 1, used only if `seed` is given.
    seed: 0-d int64 tensor on x's device or the CPU; the mask is `reference.keep_mask(seed, p, M, K)`.
    Returns y (..., N) in x's dtype, newly allocated. Under autocast all of them take the autocast dtype.

    Raises: ConfigError if shapes, dtypes or devices do not fit; BackendError if `backend` cannot run.
    """
    if autocasts(x):
        x, weight = autocast(x), autocast(weight)
        bias = None if bias is None else autocast(bias)
    _check(x, weight, bias, lora_a, lora_b)
    if seed is not None and reference.dropout_threshold(p) == 0:
        seed = None
    choice = choose(
        x, weight, lora_a.shape[0], dropout=seed is not None, backend=backend, with_plan=False
    )
    triton = choice.backend == "triton"
    if not triton and (lora_a.dtype != x.dtype or lora_b.dtype != x.dtype):
        lora_a, lora_b = lora_a.to(x.dtype), lora_b.to(x.dtype)  # kernels cast as they load
    if choice.plan == "composed":
        flat, _ = reference.forward(as_rows(x), weight, bias, lora_a, lora_b, scaling, p, seed)
        return _shaped_as(x, flat)
    if not torch.is_grad_enabled():
        return _forward(x, weight, bias, lora_a, lora_b, scaling, p, seed, triton)[0]
    y: Tensor = _LoRALinear.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, lora_a, lora_b, scaling, p, seed, triton
    )
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
    """
    if autocasts(y):  # y's dtype is the wrapped layer's choice; autocast would make another of it
        with torch.autocast(y.device.type, enabled=False):
            return lora_update(y, x, lora_a, lora_b, scaling, p, seed)
    x, lora_a, lora_b = x.to(y.dtype), lora_a.to(y.dtype), lora_b.to(y.dtype)
    if torch.is_grad_enabled() and (
        torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active()
    ):
        z: Tensor = _LoRAUpdate.apply(y, x, lora_a, lora_b, scaling, p, seed)  # type: ignore[no-untyped-call]
        return z
    flat = x.reshape(-1, x.shape[-1])
    s = reference.apply_dropout(flat, p, seed) @ lora_a.T  # [M, K] @ [K, R] -> [M, R]
    return y + (scaling * (s @ lora_b.T)).view(y.shape)


class _LoRALinear(torch.autograd.Function):
    """Plan `in_place`. `forward(ctx, …)` rather than `setup_context`, which costs tens of microseconds a call."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        scaling: float,
        p: float,
        seed: Tensor | None,
        triton: bool,
    ) -> Tensor:
        y, s = _forward(x, weight, bias, lora_a, lora_b, scaling, p, seed, triton)
        ctx.save_for_backward(x, weight, lora_a, lora_b, s, seed)
        ctx.scaling, ctx.p, ctx.triton = scaling, p, triton
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_a, lora_b, s, seed = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_a, needs_b = ctx.needs_input_grad[:5]
        scaling, p = ctx.scaling, ctx.p
        flat, dy = as_rows(x), as_rows(dy)
        # An expanded gradient would be copied by each GEMM below; older compilers trace no question about strides.
        if not torch.compiler.is_compiling() and 0 in dy.stride():
            dy = dy.contiguous()
        dx = dlora_a = dlora_b = None
        if torch.is_grad_enabled():
            # Double backward: every product must be seen by autograd, S included, which was made out of its sight.
            a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
            s = reference.apply_dropout(flat, p, seed) @ a.T
            dx, dlora_a, dlora_b = reference.backward(dy, flat, weight, a, b, s, scaling, p, seed)
        elif ctx.triton:
            needs = (needs_x, needs_a, needs_b)
            made = iter(
                _triton().lora_backward(
                    dy, flat, weight, lora_a, lora_b, s, scaling, p, seed, *needs
                )
            )
            dx, dlora_a, dlora_b = (next(made) if needed else None for needed in needs)
        else:
            if needs_b:
                dlora_b = _scaled_product(s.T, dy, scaling, lora_b.T).T
            if needs_x:
                dx = dy @ weight  # [M, N] @ [N, K] -> [M, K]
            if needs_x or needs_a:
                ds_t = lora_b.T @ dy.T  # [R, N] @ [N, M] -> [R, M]
                dlora_a = up_project(ds_t, flat, lora_a, scaling, p, seed, dx, needs_a)
        dweight = dy.T @ flat if needs_weight else None  # [N, M] @ [M, K] -> [N, K]
        dbias = dy.sum(0) if needs_bias else None
        dx = None if dx is None else _shaped_as(x, dx)
        return dx, dweight, dbias, dlora_a, dlora_b, None, None, None, None


class _LoRAUpdate(torch.autograd.Function):
    """`lora_update`, saving what `_LoRALinear` saves."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        scaling: float,
        p: float,
        seed: Tensor | None,
    ) -> Tensor:
        s = down_project(as_rows(x), lora_a, p, seed)  # [M, R]
        ctx.save_for_backward(x, lora_a, lora_b, s, seed)
        ctx.scaling, ctx.p = scaling, p
        # [M, N] + [M, R] @ [R, N]
        return _shaped_as(y, torch.addmm(as_rows(y), s, lora_b.T, alpha=scaling))

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        x, lora_a, lora_b, s, seed = ctx.saved_tensors
        _, needs_x, needs_a, needs_b = ctx.needs_input_grad[:4]
        flat, dy = as_rows(x), as_rows(dz)
        dx = dlora_a = dlora_b = None
        if torch.is_grad_enabled():  # double backward, as in `_LoRALinear`
            dropped = reference.apply_dropout(flat, ctx.p, seed)
            ds = ctx.scaling * (dy @ lora_b)  # [M, N] @ [N, R] -> [M, R]
            dx = reference.apply_dropout(ds @ lora_a, ctx.p, seed)
            dlora_a, dlora_b = ds.T @ dropped, ctx.scaling * (dy.T @ (dropped @ lora_a.T))
        else:
            if needs_b:
                dlora_b = _scaled_product(s.T, dy, ctx.scaling, lora_b.T).T
            if needs_x or needs_a:
                dx = torch.zeros_like(flat) if needs_x else None
                ds_t = lora_b.T @ dy.T  # [R, N] @ [N, M] -> [R, M]
                dlora_a = up_project(ds_t, flat, lora_a, ctx.scaling, ctx.p, seed, dx, needs_a)
        return dz, None if dx is None else _shaped_as(x, dx), dlora_a, dlora_b, None, None, None


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    p: float,
    seed: Tensor | None,
    triton: bool,
) -> tuple[Tensor, Tensor]:
    """y (..., N) and S (M, R); the kernels' S holds every factor, torch's none."""
    flat = as_rows(x)  # [M, K]
    if triton:
        y, s = _triton().lora_forward(flat, weight, bias, lora_a, lora_b, scaling, p, seed)
        return _shaped_as(x, y), s
    s = down_project(flat, lora_a, p, seed)  # [M, R]
    y = F.linear(flat, weight, bias)  # [M, K] @ [K, N] -> [M, N]
    y.addmm_(s, lora_b.T, alpha=scaling)  # [M, R] @ [R, N] -> [M, N]
    return _shaped_as(x, y), s


def _triton() -> Any:
    """The namespace of the Triton operators; Triton is imported when they are first wanted."""
    import fastlora.ops.triton_ops  # noqa: F401

    return torch.ops.fastlora


def down_project(x: Tensor, lora_a: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """S = D(x) Aᵀ, [M, K] @ [K, R] -> [M, R]."""
    if seed is None:
        return x @ lora_a.T
    if not _in_blocks(x):
        return reference.apply_dropout(x, p, seed) @ lora_a.T
    s = x.new_empty(x.shape[0], lora_a.shape[0])
    for rows, keep, (kept, _) in keep_blocks(int(seed), p, x.shape[0], x.shape[1], x.dtype):
        torch.mm(zero_dropped(x[rows], keep, kept), lora_a.T, out=s[rows])
    return s.mul_(reference.keep_scale(p))


def up_project(
    ds_t: Tensor,
    x: Tensor,
    lora_a: Tensor,
    scaling: float,
    p: float,
    seed: Tensor | None,
    dx: Tensor | None,
    needs_a: bool,
) -> Tensor | None:
    """Add keep ∘ (dS A) / (1 − p') into dx (unless None) and return dA = dSᵀ D(x) (or None), one mask for both.

    ds_t: dSᵀ / scaling (R, M), the layout in which both products are fast; they apply the factor.
    """
    if seed is None:
        if dx is not None:
            dx.addmm_(ds_t.T, lora_a, alpha=scaling)  # [M, R] @ [R, K] -> [M, K]
        return _scaled_product(ds_t, x, scaling, lora_a) if needs_a else None
    ds_t = ds_t * (scaling * reference.keep_scale(p) if _in_blocks(x) else scaling)
    if not _in_blocks(x):
        if dx is not None:
            dx += reference.apply_dropout(ds_t.T @ lora_a, p, seed)
        return ds_t @ reference.apply_dropout(x, p, seed) if needs_a else None
    ds = ds_t.T.contiguous()  # [M, R]: rows of it make the small products in about half the time
    dlora_a = torch.zeros_like(lora_a) if needs_a else None
    for rows, keep, (product, kept) in keep_blocks(int(seed), p, x.shape[0], x.shape[1], x.dtype):
        if dx is not None:
            torch.mm(ds[rows], lora_a, out=product)
            dx[rows] += zero_dropped(product, keep, kept)
        if dlora_a is not None:
            dlora_a.addmm_(ds_t[:, rows], zero_dropped(x[rows], keep, kept))
    return dlora_a


def _scaled_product(one: Tensor, other: Tensor, scaling: float, shape: Tensor) -> Tensor:
    """scaling · one @ other as one operation; it has the shape of `shape`, whose values are not read."""
    return torch.addmm(shape, one, other, beta=0, alpha=scaling)


def as_rows(x: Tensor) -> Tensor:
    """x (..., K) as (M, K)."""
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


def _shaped_as(x: Tensor, rows: Tensor) -> Tensor:
    """rows (M, N) with the leading dimensions of x."""
    return rows if x.ndim == 2 else rows.view(*x.shape[:-1], rows.shape[-1])


def _in_blocks(x: Tensor) -> bool:
    """Whether dropout works through x in cache-sized blocks: on a CPU, unless a compiler fuses the plain expression."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for x's device."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def autocast(tensor: Tensor) -> Tensor:
    """What autocast does to an argument of a matrix product: float64 and integers are left alone."""
    eligible = tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(torch.get_autocast_dtype(tensor.device.type)) if eligible else tensor


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor) -> None:
    n, k = weight.shape
    if x.ndim == 0 or x.shape[-1] != k:
        raise ConfigError(f"x: expected (..., K={k}), got {tuple(x.shape)}")
    if x.dtype != weight.dtype:
        raise ConfigError(f"x: expected the weight's dtype {weight.dtype}, got {x.dtype}")
    if x.device != weight.device:
        raise ConfigError(f"x: expected the weight's device {weight.device}, got {x.device}")
    if lora_a.ndim != 2 or lora_a.shape[1] != k:
        raise ConfigError(f"lora_a: expected (R, K={k}), got {tuple(lora_a.shape)}")
    if lora_b.shape != (n, lora_a.shape[0]):
        raise ConfigError(
            f"lora_b: expected (N={n}, R={lora_a.shape[0]}), got {tuple(lora_b.shape)}"
        )
    if bias is not None and bias.shape != (n,):
        raise ConfigError(f"bias: expected (N={n},), got {tuple(bias.shape)}")
    for name, tensor in (("lora_a", lora_a), ("lora_b", lora_b), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ConfigError(f"{name}: expected x's device {x.device}, got {tensor.device}")
