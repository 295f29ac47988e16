"""LoRA layers of other projects as plain torch operations, written from what those projects publish.

Each has its project's matrix products, and saves for the backward pass what the project saves; it has not the project's kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class HandWritten(nn.Module):
    """A module that calls one of the functions below, or one of a published library with the same arguments.

    cast: whether it casts the adapters to x's dtype, as fastlora does; False gives the function the parameters.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        frozen: nn.Linear,
        lora_a: Tensor,
        lora_b: Tensor,
        scaling: float,
        p: float,
        cast: bool = True,
    ) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(lora_a.clone())
        self.lora_B = nn.Parameter(lora_b.clone())
        self.frozen = frozen
        self.function = function
        self.scaling = scaling
        self.p = p
        self.cast = cast

    def forward(self, x: Tensor) -> Tensor:
        return self.function(
            x,
            self.frozen.weight,
            self.frozen.bias,
            self.lora_A.to(x.dtype) if self.cast else self.lora_A,
            self.lora_B.to(x.dtype) if self.cast else self.lora_B,
            self.scaling,
            self.p if self.training else 0.0,
        )


class Addmm(torch.autograd.Function):
    """cuBLAS base, then the rank-R product added into y by `addmm_`; saves x, S and the dropout mask, one byte per element.

    The fastest formulation in plain torch: no temporary of y's size, one dropout pass whose result is not saved.
    """

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
    ) -> Tensor:
        dropped, mask = _dropout(x, p)
        y, s = _base_and_update(x, dropped, weight, bias, lora_a, lora_b, scaling)
        ctx.save_for_backward(x, weight, lora_a, lora_b, s, mask)
        ctx.scaling, ctx.p = scaling, p
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_a, lora_b, s, mask = ctx.saved_tensors
        dropped = _masked(x, mask, ctx.p)
        return _gradients(dy, dropped, weight, lora_a, lora_b, s, mask, ctx.scaling, ctx.p)


class LoRAFusion(torch.autograd.Function):
    """LoRAFusion's split into passes: dropout(x) is written to memory and saved, with its mask and S.

    Its passes are three kernels forward (dropout, S, base GEMM with rank-R epilogue) and three backward (dS with dB, dA,
    dx with a masked rank-R epilogue). Here each pass is a torch operation: memory is
    representative, time is not, because their Triton GEMM may be slower or faster than cuBLAS and `addmm_`.
    Source: LoRAFusion (2510.00206).
    """

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
    ) -> Tensor:
        dropped, mask = _dropout(x, p)
        y, s = _base_and_update(x, dropped, weight, bias, lora_a, lora_b, scaling)
        ctx.save_for_backward(dropped, weight, lora_a, lora_b, s, mask)
        ctx.scaling, ctx.p = scaling, p
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dropped, weight, lora_a, lora_b, s, mask = ctx.saved_tensors
        return _gradients(dy, dropped, weight, lora_a, lora_b, s, mask, ctx.scaling, ctx.p)


class Unsloth(torch.autograd.Function):
    """Unsloth's order of matrix products: saves x, the dropout mask and the adapters themselves, which it casts in each pass.

    x Aᵀ and dropout(x) are computed again in the backward pass. The bias is that of `F.linear`: Unsloth leaves a layer with a bias to PEFT.
    Source: `LoRA_W` of `unsloth.kernels.fast_lora`, unsloth 2026.10.9.
    """

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
    ) -> Tensor:
        dropped, mask = _dropout(x, p)
        a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        y, _ = _base_and_update(x, dropped, weight, bias, a, b, scaling)
        ctx.save_for_backward(x, weight, lora_a, lora_b, mask)
        ctx.scaling, ctx.p = scaling, p
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_a, lora_b, mask = ctx.saved_tensors
        scaling, a, b = ctx.scaling, lora_a.to(x.dtype), lora_b.to(x.dtype)
        dy_b = dy @ b  # [M, N] @ [N, R] -> [M, R]
        dropped = _masked(x, mask, ctx.p)
        dlora_a, dlora_b = _adapter_gradients(dy, dy_b, dropped, a, b, scaling)
        dx = dy @ weight  # [M, N] @ [N, K] -> [M, K]
        if mask is None:
            dx.addmm_(dy_b, a, alpha=scaling)  # [M, R] @ [R, K] -> [M, K]
        else:
            dx += _masked(dy_b @ a, mask, ctx.p, scaling)
        return dx, None, None, dlora_a, dlora_b, None, None


def axolotl(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    p: float,
) -> Tensor:
    """axolotl's layer: dropout is an operation before the function, which gets x and dropout(x)."""
    dropped = _dropout(x, p)[0] if p > 0 else None
    y: Tensor = _Axolotl.apply(x, dropped, weight, bias, lora_a, lora_b, scaling)  # type: ignore[no-untyped-call]
    return y


class _Axolotl(torch.autograd.Function):
    """axolotl's order of matrix products: saves x, although only its shape is needed, and dropout(x).

    Autograd saves the mask, and adds both parts of dx. x Aᵀ is computed again in the backward pass. The bias is added in a pass over y.
    Source: `LoRA_O` of `axolotl.kernels.lora`, axolotl 0.19.0.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        scaling: float,
    ) -> Tensor:
        x_lora = x if dropped is None else dropped
        y, _ = _base_and_update(x, x_lora, weight, None, lora_a, lora_b, scaling)
        if bias is not None:
            y += bias
        ctx.save_for_backward(x, x_lora, weight, lora_a, lora_b)
        ctx.scaling, ctx.has_dropout = scaling, dropped is not None
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        _, x_lora, weight, lora_a, lora_b = ctx.saved_tensors
        dy_b = dy @ lora_b  # [M, N] @ [N, R] -> [M, R]
        dlora_a, dlora_b = _adapter_gradients(dy, dy_b, x_lora, lora_a, lora_b, ctx.scaling)
        dx = dy @ weight  # [M, N] @ [N, K] -> [M, K]
        ddropped = None
        if ctx.has_dropout:
            ddropped = dy_b @ lora_a * ctx.scaling  # [M, R] @ [R, K] -> [M, K]
        else:
            dx.addmm_(dy_b, lora_a, alpha=ctx.scaling)  # [M, R] @ [R, K] -> [M, K]
        return dx, ddropped, None, None, dlora_a, dlora_b, None


def _dropout(x: Tensor, p: float) -> tuple[Tensor, Tensor | None]:
    return torch.native_dropout(x, p, True) if p > 0 else (x, None)


def _masked(tensor: Tensor, mask: Tensor | None, p: float, factor: float = 1.0) -> Tensor:
    """factor · mask ∘ tensor / (1 − p), in one pass; without a mask `tensor` itself."""
    if mask is None:
        return tensor
    masked: Tensor = torch.ops.aten.native_dropout_backward(tensor, mask, factor / (1 - p))
    return masked


def _base_and_update(
    x: Tensor,
    dropped: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    s = dropped @ lora_a.T  # [M, K] @ [K, R] -> [M, R]
    y = F.linear(x, weight, bias)  # [M, K] @ [K, N] -> [M, N]
    return y.addmm_(s, lora_b.T, alpha=scaling), s  # [M, R] @ [R, N] -> [M, N]


def _gradients(
    dy: Tensor,
    dropped: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    s: Tensor,
    mask: Tensor | None,
    scaling: float,
    p: float,
) -> tuple[Tensor | None, ...]:
    ds = (dy @ lora_b).mul_(scaling)  # [M, N] @ [N, R] -> [M, R]
    dlora_b = (dy.T @ s).mul_(scaling)  # [N, M] @ [M, R] -> [N, R]
    dlora_a = ds.T @ dropped  # [R, M] @ [M, K] -> [R, K]
    dx = dy @ weight  # [M, N] @ [N, K] -> [M, K]
    if mask is None:
        dx.addmm_(ds, lora_a)  # [M, R] @ [R, K] -> [M, K]
    else:
        dx += _masked(ds @ lora_a, mask, p)
    return dx, None, None, dlora_a, dlora_b, None, None


def _adapter_gradients(
    dy: Tensor, dy_b: Tensor, x_lora: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """dA and dB without a saved S. x_lora: (M, K), x or dropout(x). dy_b: (M, R), dy @ lora_b."""
    dlora_a, dlora_b = torch.empty_like(lora_a), torch.empty_like(lora_b)
    # dAᵀ = scaling · x_loraᵀ @ dy_b  # [K, M] @ [M, R] -> [K, R]
    dlora_a.T.addmm_(x_lora.T, dy_b, alpha=scaling, beta=0)
    # dBᵀ = scaling · (lora_a @ x_loraᵀ) @ dy  # [R, M] @ [M, N] -> [R, N]
    dlora_b.T.addmm_(lora_a @ x_lora.T, dy, alpha=scaling, beta=0)
    return dlora_a, dlora_b
