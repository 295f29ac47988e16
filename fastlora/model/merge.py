"""Merge adapters into the weights they adapt, in place or in a copy, and report the rounding error."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import reduce
from types import SimpleNamespace
from typing import cast

import torch
from torch import Tensor, nn

from fastlora.config import computes_in
from fastlora.errors import ConfigError, FastLoRAWarning, MergeError
from fastlora.layers.banks import restore_banks
from fastlora.layers.base import ADAPTER_TENSORS, LoRALayer, named_lora_layers, not_finite
from fastlora.layers.gated import restore_gated
from fastlora.model.adapter_registry import (
    copy_active,
    drop_registries,
    inactive_adapters,
    none_active,
    why_not_one,
)
from fastlora.model.heads import adapter_parameters, forget_heads
from fastlora.model.inject import replace_modules
from fastlora.model.switch import eval_mode

LOST_SHARE = 0.1  # of an update's norm; a merge that loses more causes a warning
_ROWS = 8


@dataclass(frozen=True)
class LayerMerge:
    """The rounding error of merging one layer.

    dtype: of the merged weight.
    unchanged: share of the weights with a non-zero update that rounding leaves unchanged.
    lost: norm of the rounding error relative to the norm of the update (0 without an update).
    max_error: largest difference between the outputs of the merged and the adapted layer, for random x in eval mode.
    allowed: the largest difference that rounding explains. Both are None for a layer that could not be called.
    skipped: why the layer could not be called, or None.
    not_finite: how many values of the wrapped weight, and so of the merged one, are infinite or NaN; the other figures exclude them.
    """

    path: str
    dtype: torch.dtype
    unchanged: float
    lost: float
    max_error: float | None
    allowed: float | None
    skipped: str | None = None
    not_finite: int = 0

    @property
    def ok(self) -> bool:
        """Whether the merged layer computes the same up to rounding, or could not be called."""
        return self.max_error is None or self.allowed is None or self.max_error <= self.allowed

    def __str__(self) -> str:
        error = f"not called: {self.skipped}"
        if self.max_error is not None:
            error = f"error {self.max_error:.2g}, of which rounding explains {self.allowed:.2g}"
        return (
            f"{self.path or 'the layer'}: {self.dtype}, {self.lost:.2%} of the update lost, "
            f"{self.unchanged:.1%} of the weights unchanged, {error}"
        )


@dataclass(frozen=True)
class MergeReport:
    """The rounding error of a merge, layer by layer. `str(report)` has a line for each."""

    layers: tuple[LayerMerge, ...]

    @property
    def ok(self) -> bool:
        """Whether every merged layer computes the same up to rounding."""
        return all(layer.ok for layer in self.layers)

    @property
    def lossy(self) -> tuple[LayerMerge, ...]:
        """The layers whose update loses more than `LOST_SHARE` to rounding."""
        return tuple(layer for layer in self.layers if layer.lost > LOST_SHARE)

    def __str__(self) -> str:
        head = (
            f"{len(self.layers)} layers to merge, {len(self.lossy)} lose more than {LOST_SHARE:.0%}"
        )
        return "\n  ".join([head, *map(str, self.layers)])


def merge_lora_weights(
    model: nn.Module, inplace: bool = True, *, dtype: torch.dtype | None = None
) -> nn.Module:
    """Replace every adapted layer by a plain layer of the wrapped class with W + ΔW.

    The sum is computed in float32 or wider and rounded once. All layers are checked before the first is replaced, and each
    merged layer is compared with its original on random rows. `merge_report` computes the errors without merging.

    inplace: True changes `model` and returns it. False returns a merged copy.
    dtype: of the result; None keeps each weight's. Otherwise all parameters are cast to it after merging, so that the
        layers still fit each other; float32 keeps what a 16-bit weight would lose to rounding.

    Warns if rounding to 16 bits loses more than a tenth of an update (`LOST_SHARE`), if a wrapped weight is not finite, and if a
    buffer is not finite in dtype.
    Raises: MergeError, naming the layers, if a weight is parametrised, quantised or shared with another module (merging would
    change that one too, or untie them), if a merged weight, or another parameter cast to dtype, is not finite where it was
    before, if a trained parameter is not finite, if a merged layer's output differs from its original's, or, if inplace is True,
    if `model` is itself an adapted layer or has inactive adapters, which would lose their base layers. ConfigError if dtype is
    not a float dtype.
    """
    if isinstance(model, LoRALayer) and inplace:
        raise MergeError("model: is itself an adapted layer; use model.merge_weights()")
    inactive = inactive_adapters(model)
    if inactive and inplace:
        raise MergeError(
            f"model: the inactive adapters {', '.join(map(repr, inactive))} would lose their base layers; "
            "delete them first, or merge a copy (merged_model)"
        )
    _raise_or_warn(merge_report(model, dtype), "merge_lora_weights")
    return _merge(model if inplace else copy_active(model), dtype)


def merged_model(model: nn.Module, *, dtype: torch.dtype | None = None) -> nn.Module:
    """A deep copy of `model` with its active adapter merged; otherwise as `merge_lora_weights`. Warns if all adapters are inactive."""
    if inactive_adapters(model) and not adapter_parameters(model):
        warnings.warn(
            f"merged_model: {none_active(model)}, so the copy is the base model",
            FastLoRAWarning,
            stacklevel=2,
        )
    _raise_or_warn(merge_report(model, dtype), "merged_model")
    return _merge(copy_active(model), dtype)


def merge_report(model: nn.Module, dtype: torch.dtype | None = None) -> MergeReport:
    """The rounding error of a merge, without changing the model: each layer is merged separately and discarded.

    dtype: as in `merge_lora_weights`. Random rows come from a separate generator; forward hooks of the layers run.

    Raises: MergeError, naming the layers, if a weight is parametrised or shared, or what would be merged is not finite (as in
    `merge_lora_weights`). ConfigError if dtype is not a float dtype.
    """
    if dtype is not None and not computes_in(dtype):
        raise ConfigError(f"dtype: expected a float dtype or None, got {dtype}")
    check_mergeable(model)
    rows, problems = [], _not_finite_outside(model, dtype)
    for path, layer in named_lora_layers(model):
        try:
            rows.append(_layer_report(path, layer, dtype))
        except MergeError as error:
            reason = str(error).removeprefix("cannot merge: ")
            problems.append(f"{path or 'the layer'}: {reason}")
    if problems:
        raise MergeError("cannot merge " + "; ".join(problems))
    return MergeReport(tuple(rows))


def check_mergeable(model: nn.Module) -> None:
    """Raises: MergeError naming every layer whose weight cannot be merged correctly, and why, or if several adapters are active."""
    several = why_not_one(model)
    if several is not None:
        raise MergeError(f"{several}, or merge the sum that combine_adapters makes")
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(parameter), []).append(f"{path}.{name}".lstrip("."))
    problems = []
    for path, layer in named_lora_layers(model):
        reason = layer.why_unmergeable()
        if reason is None:
            mine = f"{path}.{layer.wrapped_name}.weight".lstrip(".")
            tied = [n for n in owners[id(layer.wrapped.weight)] if n != mine]
            reason = f"the weight is tied to {', '.join(tied)}" if tied else None
        if reason is not None:
            problems.append(f"{path or 'the layer'}: {reason}")
    if problems:
        raise MergeError("cannot merge " + "; ".join(problems))


@torch.no_grad()
def _not_finite_outside(model: nn.Module, dtype: torch.dtype | None) -> list[str]:
    """What is wrong with the parameters outside the adapters and their weights: trained and not finite, or not finite in `dtype`.

    Warns of buffers that are not finite in `dtype`: a mask of large negative numbers may be.
    """
    merged: set[int] = set()
    for _, layer in named_lora_layers(model):
        held = (layer.wrapped.weight, *(getattr(layer, name) for name in ADAPTER_TENSORS))
        merged |= {id(tensor) for tensor in held}
    problems = []
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        plain = type(tensor) in (Tensor, nn.Parameter)  # others may lack these operations
        if id(tensor) in merged or tensor.is_meta or not (plain and tensor.is_floating_point()):
            continue
        before = not_finite(tensor)
        if tensor.requires_grad and bool(before.any()):
            problems.append(f"{name}: is trained and has values that are not finite")
        elif dtype is not None and bool((not_finite(tensor.to(dtype)) & ~before).any()):
            problem = f"{name}: has values that are not finite in {dtype} (out of range)"
            if isinstance(tensor, nn.Parameter):
                problems.append(problem)
            else:
                warnings.warn(problem, FastLoRAWarning, stacklevel=4)
    return problems


def _tokens(feats: Tensor) -> SimpleNamespace:
    """A minimal token object, for layers that accept only token objects."""
    return SimpleNamespace(feats=feats, replace=_tokens)


def _merge(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    if isinstance(model, LoRALayer):
        model = model.merge_weights(dtype)
    else:
        merged: dict[nn.Module, nn.Module] = {
            layer: layer.merge_weights(dtype) for _, layer in named_lora_layers(model)
        }
        replace_modules(model, merged)
        restore_banks(model)
        restore_gated(model)
        drop_registries(model)
    forget_heads(model)
    return model if dtype is None else model.to(dtype)


def _raise_or_warn(report: MergeReport, caller: str) -> None:
    wrong = [str(layer) for layer in report.layers if not layer.ok]
    if wrong:
        raise MergeError(
            "cannot merge; the output of the merged layer differs: " + "; ".join(wrong)
        )
    for layer in report.layers:
        if layer.not_finite:
            warnings.warn(
                f"{caller}: {layer.path or 'the layer'}: {layer.not_finite} values of the weight before the merge are not "
                "finite, and stay so",
                FastLoRAWarning,
                stacklevel=3,
            )
    if report.lossy:
        worst = max(report.lossy, key=lambda layer: layer.lost)
        warnings.warn(
            f"{caller}: rounding loses more than {LOST_SHARE:.0%} of the update in {len(report.lossy)} of "
            f"{len(report.layers)} layers; the worst: {worst}. Merge with dtype=torch.float32 to keep it",
            FastLoRAWarning,
            stacklevel=3,
        )


@torch.no_grad()
def _layer_report(path: str, layer: LoRALayer, dtype: torch.dtype | None) -> LayerMerge:
    fresh = layer.merge_weights(dtype)
    original, merged = layer.wrapped_weight(), cast(Tensor, fresh.weight)
    if original.device.type == "meta":
        return LayerMerge(path, merged.dtype, 0.0, 0.0, None, None, "the weight is on meta")
    dtypes = (original.dtype, merged.dtype, layer.lora_A.dtype)
    wide = reduce(torch.promote_types, dtypes, torch.float32)
    update = layer.delta(wide)
    spoiled = not_finite(original)
    update.masked_fill_(spoiled, 0)
    rounding = (merged.to(wide) - (original.to(wide) + update)).masked_fill_(spoiled, 0)
    touched = update != 0
    stayed = touched & (merged.to(wide) == original.to(wide))
    norm = float(update.norm())
    unchanged = float(stayed.sum()) / max(1, int(touched.sum()))
    lost = float(rounding.norm()) / norm if norm > 0 else 0.0
    count = int(spoiled.sum())
    if count:
        reason = f"{count} values of its weight are not finite"
        return LayerMerge(path, merged.dtype, unchanged, lost, None, None, reason, count)
    error, allowed, skipped = _compare(layer, fresh, wide)
    return LayerMerge(path, merged.dtype, unchanged, lost, error, allowed, skipped)


def _compare(
    layer: LoRALayer, fresh: nn.Module, wide: torch.dtype
) -> tuple[float | None, float | None, str | None]:
    """(the error of the merged output, the error that rounding explains, why the layer was not called), at the worst element.

    wide: the dtype of the comparison. Outputs may differ by 16 units in the last place, for the rounding of the merged weight
    (half a unit) and of the two computations, and by 4 √K units of the sum's precision, relative to the sum of magnitudes.
    """
    weight, merged = layer.wrapped_weight(), cast(Tensor, fresh.weight)
    rows = layer.sample_input(_ROWS, torch.Generator().manual_seed(0)).to(weight.device)
    floats = rows.is_floating_point()
    rows = rows.to(weight.dtype) if floats else rows
    merged_rows = rows.to(merged.dtype) if floats else rows
    try:
        with eval_mode(layer, fresh):
            fresh.to(merged.dtype)  # a bias in a narrower dtype would not fit the weight
            try:
                rest = layer.sample_rest(rows)
                got, want = fresh(merged_rows, *rest), layer(rows, *rest)
            except (AttributeError, TypeError):  # a layer that accepts token objects only
                got, want = fresh(_tokens(merged_rows)).feats, layer(_tokens(rows)).feats
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, TypeError, ValueError, IndexError, RuntimeError) as error:
        # A custom forward on an unsuitable input, or a forced backend that is not available.
        return None, None, f"random rows do not fit it: {type(error).__name__}: {error}"
    x = rows.to(wide).abs() if floats else rows
    bias = None if layer.bias is None else layer.bias.abs().to(wide)
    magnitudes = weight.abs().to(wide) + layer.delta(wide, magnitude=True)
    magnitude = layer.apply_weight(x, magnitudes, bias)
    unit = max(torch.finfo(want.dtype).eps, torch.finfo(merged.dtype).eps)
    summed = torch.finfo(torch.promote_types(want.dtype, torch.float32)).eps
    if weight.device.type == "cuda" and want.dtype == torch.float32:
        summed = 2**-10  # TF32 may be allowed
    allowed = (16 * unit + 4 * layer.terms**0.5 * summed) * magnitude
    difference = (got.to(wide) - want.to(wide)).abs().nan_to_num(nan=float("inf"))
    if difference.numel() == 0:
        return 0.0, 0.0, None
    worst = int((difference - allowed).argmax())
    return float(difference.flatten()[worst]), float(allowed.flatten()[worst]), None
