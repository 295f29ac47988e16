"""The compared implementations: the frozen layer, fastlora's backends and other libraries, each a module built by one function.

A builder takes the case, the frozen `nn.Linear` and the adapter weights, which it copies, and raises `NotApplicable` with the
reason if the implementation does not support the case. Every module has its trainable parameters in the order A, B.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cases import BASELINE, Case
from hand_written import Addmm, HandWritten, LoRAFusion, Unsloth, axolotl
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


def _hand_written(function: Callable[..., Tensor], *, cast: bool = True) -> Builder:
    def build(case: Case, frozen: nn.Linear, lora_a: Tensor, lora_b: Tensor) -> nn.Module:
        return HandWritten(function, frozen, lora_a, lora_b, ALPHA_PER_RANK, case.p, cast)

    return build


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
    """unsloth's function for one projection; it requires a three-dimensional x, and has no argument for the layer's bias."""
    function = import_library("unsloth-library").LoRA_W
    if case.bias:
        raise NotApplicable("its fast path leaves a layer with a bias to PEFT")
    if case.p > 0 and "dropout_p" not in inspect.signature(function.forward).parameters:
        raise NotApplicable("the fast path of this version has no dropout")

    def call(
        x: Tensor, weight: Tensor, bias: None, a: Tensor, b: Tensor, scaling: float, p: float
    ) -> Tensor:
        dropout = (p,) if p > 0 else ()
        y: Tensor = function.apply(x[None], weight, None, a, b, scaling, *dropout)
        return y[0]

    return HandWritten(call, frozen, lora_a, lora_b, ALPHA_PER_RANK, case.p, cast=False)


def _axolotl_library(case: Case, frozen: nn.Linear, lora_a: Tensor, lora_b: Tensor) -> nn.Module:
    """axolotl's function for one projection; it requires a three-dimensional x."""
    function = import_library("axolotl-library").LoRA_O

    def call(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
        p: float,
    ) -> Tensor:
        x = x[None]
        dropped = F.dropout(x, p) if p > 0 else None
        y: Tensor = function.apply(x, dropped, weight, bias, None, a, b, scaling, None, None)
        return y[0]

    return HandWritten(call, frozen, lora_a, lora_b, ALPHA_PER_RANK, case.p, cast=False)


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

    return HandWritten(call, frozen, lora_a, lora_b, ALPHA_PER_RANK, case.p)


# Published libraries, timed if installed or found by --library-path, and the module of their function.
PUBLISHED = {
    "unsloth-library": "unsloth.kernels.fast_lora",
    "axolotl-library": "axolotl.kernels.lora",
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
    "addmm": _hand_written(Addmm.apply),
    "lorafusion": _hand_written(LoRAFusion.apply),
    "unsloth": _hand_written(Unsloth.apply, cast=False),
    "axolotl": _hand_written(axolotl),
    "unsloth-library": _unsloth_library,
    "axolotl-library": _axolotl_library,
    "lorafusion-library": _lorafusion_library,
}
