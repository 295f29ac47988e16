"""The frozen layer, fastlora's backends and PEFT, each a module built by one function.

A builder takes the case, the frozen `nn.Linear` and the adapter weights, which it copies, and raises `NotApplicable` with the
reason if the implementation does not support the case. Every module has its trainable parameters in the order A, B.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.benchmark.cases import BASELINE, Case
from fastlora.errors import BackendError
from fastlora.layers.linear import LoRALinear
from fastlora.report.layer_table import explain

ALPHA_PER_RANK = 2.0  # alpha = 2 · rank, so every implementation scales its update by 2


class NotApplicable(Exception):
    """The implementation does not support the case; the message is the reason."""


Builder = Callable[[Case, nn.Linear, Tensor, Tensor], nn.Module]


def _linear(case: Case, frozen: nn.Linear, lora_a: Tensor, lora_b: Tensor) -> nn.Module:
    return frozen


def _fastlora(backend: str, *, float32_adapters: bool = True) -> Builder:
    def build(case: Case, frozen: nn.Linear, lora_a: Tensor, lora_b: Tensor) -> nn.Module:
        _require_distinct(float32_adapters, frozen, "fastlora")
        layer = LoRALinear(
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
            explain(layer, frozen.weight.new_empty(case.m, case.k))
        except BackendError as error:
            raise NotApplicable(str(error)) from error
        return layer

    return build


def _peft(*, float32_adapters: bool, compiled: bool = False) -> Builder:
    def build(case: Case, frozen: nn.Linear, lora_a: Tensor, lora_b: Tensor) -> nn.Module:
        _require_distinct(float32_adapters or compiled, frozen, "peft")
        if not is_installed("peft"):
            raise NotApplicable("PEFT is not installed")
        from peft import LoraConfig, get_peft_model

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
        built: Any = torch.compile(layer, dynamic=False) if compiled else layer
        return built  # type: ignore[no-any-return]

    return build


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _require_distinct(float32_adapters: bool, frozen: nn.Linear, other: str) -> None:
    if not float32_adapters and frozen.weight.dtype == torch.float32:
        raise NotApplicable(f"the weight is float32: identical to {other}")


PEFTS = {"peft": "float32", "peft-bf16": "the model's"}  # name -> dtype of PEFT's adapters
IMPLEMENTATIONS: dict[str, Builder] = {
    BASELINE: _linear,
    "fastlora": _fastlora("auto"),
    "fastlora-bf16": _fastlora("auto", float32_adapters=False),
    "fastlora-torch": _fastlora("torch"),
    "fastlora-triton": _fastlora("triton"),
    "peft": _peft(float32_adapters=True),
    "peft-bf16": _peft(float32_adapters=False),
    "peft-compiled": _peft(float32_adapters=False, compiled=True),
}
