"""Export for deployment: `export` writes a model for other runtimes, its adapters merged or as separate parameters.

A copy that shares the model's parameters is exported. In it every adapted layer computes
`x Wᵀ + bias + scaling · (x Aᵀ) Bᵀ` as plain torch expressions, without autograd functions, kernels or in-place products, which other
runtimes do not support.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastlora.errors import ExportError
from fastlora.files import move_into_place
from fastlora.layers.base import LoRALayer, named_lora_layers
from fastlora.layers.linear import LoRALinear
from fastlora.model.adapter_registry import copy_active, why_not_one
from fastlora.model.merge import merge_lora_weights

FORMATS = ("torch.export", "onnx", "torchscript")
Save = Callable[[Path], object]


def export(
    model: nn.Module,
    args: tuple[Any, ...],
    path: str | os.PathLike[str] | None = None,
    *,
    format: str = "torch.export",
    merged: bool = True,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_batch: bool = True,
    dynamic_shapes: Any = None,
) -> Any:
    """Export `model` in evaluation mode and write it to a file.

    The model, including its training mode, does not change. The returned program shares unmerged parameters with the model, as
    with torch's own exporters; a file shares nothing.

    args, kwargs: an example call; only its shapes and dtypes matter, and values on which control flow depends.
    path: the file to write, replaced only when the new one is complete; None writes nothing. Usual suffixes: `.pt2`, `.onnx`, `.pt`.
    format: "torch.export", "onnx" (needs the packages onnx and onnxscript), or "torchscript" (by tracing: control flow
        that depends on values is fixed to the branches that the example takes).
    merged: True folds the adapters into the weights; False keeps `lora_A` and `lora_B` as separate parameters.
    dynamic_batch: the first dimension of every tensor in the example may vary; the example's must then be 2 or more.
        A trace has no fixed shapes in any case.
    dynamic_shapes: as in `torch.export.export`, instead of dynamic_batch.
    Returns a `torch.export.ExportedProgram`, a `torch.onnx.ONNXProgram` or a `torch.jit.ScriptModule`.

    Raises: ExportError for an unknown format, a missing package, an unsuitable example, accelerated PEFT layers, disabled adapters or a file
    that cannot be written; MergeError if an adapter cannot be merged. If torch cannot export the model, its error is raised.
    """
    named = dict(kwargs or {})
    _check_arguments(format, args, named, dynamic_shapes)
    if format != "torchscript" and dynamic_shapes is None and dynamic_batch:
        dynamic_shapes = _dynamic_batch(model, args, named)
    plain = _plain_copy(model, merged)
    fast = torch.backends.mha.get_fastpath_enabled()
    # The fused encoder layer of `nn.TransformerEncoder` is an operator that other runtimes do not support.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            if format == "torchscript":
                result: Any = torch.jit.trace(  # type: ignore[no-untyped-call]
                    plain, args or None, example_kwarg_inputs=named or None
                )
                save: Save = result.save
            else:
                # strict=False is the default only since torch 2.7; before, a lone nn.Linear cannot be exported.
                result = torch.export.export(
                    plain, args, named, dynamic_shapes=dynamic_shapes, strict=False
                )
                save = partial(torch.export.save, result)
                if format == "onnx":
                    result = torch.onnx.export(result, dynamo=True, verbose=False)
                    save = result.save
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    if path is not None:
        _write(Path(path), save)
    return result


def _check_arguments(
    format: str, args: object, kwargs: Mapping[str, Any], dynamic_shapes: Any
) -> None:
    """Raises: ExportError for an unknown format, a missing package, or arguments that the format does not accept."""
    if format not in FORMATS:
        raise ExportError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    if not isinstance(args, tuple):
        raise ExportError(f"args: expected a tuple of inputs, got {type(args).__name__}")
    if format == "onnx":
        missing = [
            name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None
        ]
        if missing:
            raise ExportError(
                f"format='onnx' needs {' and '.join(missing)}: pip install {' '.join(missing)}"
            )
    if format == "torchscript":
        if dynamic_shapes is not None:
            raise ExportError("dynamic_shapes: a trace has no fixed shapes; omit it")
        if args and kwargs:
            raise ExportError("kwargs: a trace accepts args or kwargs, not both")


def _dynamic_batch(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Shape specifications by the forward's argument names, in which the first dimension of every tensor is dynamic."""
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise ExportError(f"args, kwargs: do not fit the model's forward: {error}") from None
    return {name: _first_dimension(value, name) for name, value in bound.arguments.items()}


class _Plain(LoRALinear):
    """A `LoRALinear` that computes its update by plain torch expressions, in evaluation mode."""

    def _forward_tensor(self, x: Tensor) -> Tensor:
        return self._update(self.original_linear(x), x)

    def _fused(self, x: Tensor, nested: Tensor | None = None) -> Tensor:
        return self._update(F.linear(x, self.matrix, self.original_linear.bias), x)

    def _add_product(self, y: Tensor, x: Tensor) -> Tensor:
        a, b = self.factors()
        s = F.linear(x.to(y.dtype), a.to(y.dtype))  # [..., K] @ [K, R] -> [..., R]
        return y + self.scaling * F.linear(s, b.to(y.dtype))


def _plain_copy(model: nn.Module, merged: bool) -> nn.Module:
    """A copy in evaluation mode that shares every parameter and buffer, its adapters merged or as plain expressions."""
    for module in model.modules():
        reason: str | None = getattr(module, "why_not_exportable", None)
        if reason is not None:
            raise ExportError(f"model: {reason}")
    several = why_not_one(model)
    if several is not None:
        raise ExportError(several)
    if any(layer.disabled for _, layer in named_lora_layers(model)):
        raise ExportError("model: its adapters are disabled; export outside of disable_adapter")
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    plain = copy_active(model, shared).eval()
    if merged:
        return merge_lora_weights(plain, inplace=not isinstance(plain, LoRALayer))
    for module in plain.modules():
        if isinstance(module, LoRALinear):
            module.__class__ = type("Plain", (_Plain, type(module)), {})
    return plain


def _first_dimension(value: Any, name: str) -> Any:
    """The shape specification in which the first dimension of every tensor in `value` is dynamic."""
    if isinstance(value, Tensor):
        if value.ndim == 0:
            return None
        if value.shape[0] < 2:
            raise ExportError(
                f"{name}: expected a first dimension of 2 or more, because torch.export treats 0 and 1 as constants, "
                f"got {tuple(value.shape)}; or pass dynamic_batch=False"
            )
        return {0: torch.export.Dim.DYNAMIC}
    if isinstance(value, (tuple, list)):
        return type(value)(_first_dimension(v, f"{name}[{i}]") for i, v in enumerate(value))
    if isinstance(value, dict):
        return {key: _first_dimension(v, f"{name}[{key!r}]") for key, v in value.items()}
    return None


def _write(target: Path, save: Save) -> None:
    """Call `save` in a temporary folder, then move the files that it wrote into the target's folder, the target last.

    A process killed in between leaves the old file, the new one, or, if there is a second file with weights, none.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=".export-", dir=target.parent) as folder:
            save(Path(folder) / target.name)
            # Large ONNX models have a second file with the weights.
            written = sorted(Path(folder).iterdir(), key=lambda file: file.name == target.name)
            if len(written) > 1 and target.is_file():
                # Killed between the renames, it would leave new weights beside an old model.
                shutil.copymode(target, written[-1])
                target.unlink()
            move_into_place({file: target.parent / file.name for file in written})
    except OSError as error:
        raise ExportError(f"path: cannot write {target}: {error}") from error
