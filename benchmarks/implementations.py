"""The compared implementations: those of `fastlora.benchmark`, hand-written ones, and other libraries."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hand_written import Addmm, HandWritten, LoRAFusion, Unsloth, axolotl
from torch import Tensor, nn
from torch.nn import functional as F

from fastlora.benchmark import implementations as packaged
from fastlora.benchmark.cases import Case
from fastlora.benchmark.implementations import ALPHA_PER_RANK, Builder, NotApplicable


class ImportFailed(ImportError):
    """A published library cannot be imported; the message names its module and the reason."""


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
    return packaged.is_installed(PUBLISHED[name].partition(".")[0])


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
    **packaged.IMPLEMENTATIONS,
    "addmm": _hand_written(Addmm.apply),
    "lorafusion": _hand_written(LoRAFusion.apply),
    "unsloth": _hand_written(Unsloth.apply, cast=False),
    "axolotl": _hand_written(axolotl),
    "unsloth-library": _unsloth_library,
    "axolotl-library": _axolotl_library,
    "lorafusion-library": _lorafusion_library,
}
