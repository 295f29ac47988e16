"""The compared implementations: the frozen layer, fastlora's backends and other libraries, each a module built by one function.

A builder takes the case, the frozen `nn.Linear` and the adapter weights, which it copies, and raises `NotApplicable` with the
reason if the implementation does not support the case. Every module has its trainable parameters in the order A, B.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cases import BASELINE, Case
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

import fastlora

ALPHA_PER_RANK = 2.0  # alpha = 2 · rank, so every implementation scales its update by 2


class NotApplicable(Exception):
    """The implementation does not support the case; the message is the reason."""


class ImportFailed(Exception):
    """A published library cannot be imported; the message names its module and the reason."""


Builder = Callable[[Case, nn.Linear, Tensor, Tensor], nn.Module]


class _Addmm(torch.autograd.Function):
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


class _LoRAFusion(torch.autograd.Function):
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


class _Unsloth(torch.autograd.Function):
    """Unsloth's order of matrix products: only x is saved, so x Aᵀ is recomputed and dy B computed twice. No dropout, no bias.

    Source: the published description of Unsloth's LoRA layers.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: None,
        lora_a: Tensor,
        lora_b: Tensor,
        scaling: float,
        p: float,
    ) -> Tensor:
        y, _ = _base_and_update(x, x, weight, bias, lora_a, lora_b, scaling)
        ctx.save_for_backward(x, weight, lora_a, lora_b)
        ctx.scaling = scaling
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_a, lora_b = ctx.saved_tensors
        scaling = ctx.scaling
        dlora_a = ((dy @ lora_b).T @ x).mul_(scaling)  # ([M, N] @ [N, R])ᵀ @ [M, K] -> [R, K]
        dlora_b = (dy.T @ (x @ lora_a.T)).mul_(scaling)  # [N, M] @ [M, R] -> [N, R]
        dx = dy @ weight  # [M, N] @ [N, K] -> [M, K]
        dx.addmm_(dy @ lora_b, lora_a, alpha=scaling)  # [M, R] @ [R, K] -> [M, K]
        return dx, None, None, dlora_a, dlora_b, None, None


class HandWritten(nn.Module):
    """A module that calls one of the functions above, with the adapters cast to x's dtype, as fastlora does."""

    def __init__(
        self,
        function: Callable[..., Tensor],
        frozen: nn.Linear,
        lora_a: Tensor,
        lora_b: Tensor,
        p: float,
    ) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(lora_a.clone())
        self.lora_B = nn.Parameter(lora_b.clone())
        self.frozen = frozen
        self.function = function
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return self.function(
            x,
            self.frozen.weight,
            self.frozen.bias,
            self.lora_A.to(x.dtype),
            self.lora_B.to(x.dtype),
            ALPHA_PER_RANK,
            self.p if self.training else 0.0,
        )


def _dropout(x: Tensor, p: float) -> tuple[Tensor, Tensor | None]:
    return torch.native_dropout(x, p, True) if p > 0 else (x, None)


def _masked(tensor: Tensor, mask: Tensor | None, p: float) -> Tensor:
    """mask ∘ tensor / (1 − p), in one pass."""
    if mask is None:
        return tensor
    return torch.ops.aten.native_dropout_backward(tensor, mask, 1 / (1 - p))


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


def _linear(case: Case, frozen: nn.Linear, lora_a: Tensor, lora_b: Tensor) -> nn.Module:
    return frozen


def _fastlora(backend: str, *, float32_adapters: bool = True) -> Builder:
    def build(case: Case, frozen: nn.Linear, lora_a: Tensor, lora_b: Tensor) -> nn.Module:
        _require_distinct(float32_adapters, frozen, "fastlora")
        layer = fastlora.LoRALinear(
            frozen,
            case.rank,
            ALPHA_PER_RANK * case.rank,
            case.p,
            adapter_dtype=torch.float32 if float32_adapters else frozen.weight.dtype,
            backend=backend,
        )
        with torch.no_grad():
            layer.lora_A.copy_(lora_a)
            layer.lora_B.copy_(lora_b)
        try:
            fastlora.explain(layer, frozen.weight.new_empty(case.m, case.k))
        except fastlora.BackendError as error:
            raise NotApplicable(str(error)) from error
        return layer

    return build


def _peft(*, float32_adapters: bool, compiled: bool = False) -> Builder:
    def build(case: Case, frozen: nn.Linear, lora_a: Tensor, lora_b: Tensor) -> nn.Module:
        _require_distinct(float32_adapters or compiled, frozen, "peft")
        model = nn.ModuleDict({"adapted": frozen})
        config = LoraConfig(
            r=case.rank,
            lora_alpha=int(ALPHA_PER_RANK * case.rank),
            lora_dropout=case.p,
            target_modules=["adapted"],
        )
        get_peft_model(model, config, autocast_adapter_dtype=float32_adapters)
        layer: Any = model["adapted"]
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(lora_a)
            layer.lora_B["default"].weight.copy_(lora_b)
        return torch.compile(layer, dynamic=False) if compiled else layer

    return build


def _require_distinct(float32_adapters: bool, frozen: nn.Linear, other: str) -> None:
    if not float32_adapters and frozen.weight.dtype == torch.float32:
        raise NotApplicable(f"the weight is float32: identical to {other}")


def _hand_written(function: type[torch.autograd.Function]) -> Builder:
    def build(case: Case, frozen: nn.Linear, lora_a: Tensor, lora_b: Tensor) -> nn.Module:
        return HandWritten(function.apply, frozen, lora_a, lora_b, case.p)

    return build


def _unsloth(case: Case, frozen: nn.Linear, lora_a: Tensor, lora_b: Tensor) -> nn.Module:
    if case.p > 0:
        raise NotApplicable("its fast path has no dropout")
    if case.bias:
        raise NotApplicable("its fast path has no bias")
    return HandWritten(_Unsloth.apply, frozen, lora_a, lora_b, case.p)


def import_library(name: str) -> Any:
    """Import the module that holds a published library's layer function.

    Raises: ImportFailed if the import raises: any error, for example without a GPU or with an unsupported torch.
    """
    module = PUBLISHED[name]
    try:
        return importlib.import_module(module)
    except Exception as error:
        kind = type(error).__name__
        raise ImportFailed(f"{module} cannot be imported: {kind}: {error}") from error


def is_installed(name: str) -> bool:
    return importlib.util.find_spec(PUBLISHED[name].partition(".")[0]) is not None


def add_library_paths(folders: list[Path]) -> None:
    """Put these folders first on the import path, so that published libraries are found there."""
    for folder in folders:
        sys.path.insert(0, str(folder.resolve()))
    importlib.invalidate_caches()


def _unsloth_library(case: Case, frozen: nn.Linear, lora_a: Tensor, lora_b: Tensor) -> nn.Module:
    """unsloth's function for one projection; it requires a three-dimensional x."""
    function = import_library("unsloth-library").LoRA_W
    if case.p > 0:
        raise NotApplicable("its fast path has no dropout")
    if case.bias:
        raise NotApplicable("its fast path has no bias")

    def call(
        x: Tensor, weight: Tensor, bias: None, a: Tensor, b: Tensor, scaling: float, p: float
    ) -> Tensor:
        y: Tensor = function.apply(x[None], weight, None, a, b, scaling)
        return y[0]

    return HandWritten(call, frozen, lora_a, lora_b, case.p)


def _lorafusion_library(case: Case, frozen: nn.Linear, lora_a: Tensor, lora_b: Tensor) -> nn.Module:
    """lorafusion's function; it requires a three-dimensional x."""
    function = import_library("lorafusion-library").fused_linear_lora

    def call(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
        p: float,
    ) -> Tensor:
        y: Tensor = function(x[None], weight, a, b, scaling, dropout_p=p, linear_bias=bias)
        return y[0]

    return HandWritten(call, frozen, lora_a, lora_b, case.p)


# Published libraries, timed if installed or found by --library-path, and the module of their function.
PUBLISHED = {
    "unsloth-library": "unsloth.kernels.fast_lora",
    "lorafusion-library": "lorafusion.ops.lora_v1",
}

IMPLEMENTATIONS: dict[str, Builder] = {
    BASELINE: _linear,
    "fastlora": _fastlora("auto"),
    "fastlora-bf16": _fastlora("auto", float32_adapters=False),
    "fastlora-torch": _fastlora("torch"),
    "fastlora-triton": _fastlora("triton"),
    "peft": _peft(float32_adapters=True),
    "peft-bf16": _peft(float32_adapters=False),
    "peft-compiled": _peft(float32_adapters=False, compiled=True),
    "addmm": _hand_written(_Addmm),
    "lorafusion": _hand_written(_LoRAFusion),
    "unsloth": _unsloth,
    "unsloth-library": _unsloth_library,
    "lorafusion-library": _lorafusion_library,
}
