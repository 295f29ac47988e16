"""Fold adapters into the weights they adapt: in place, or in a copy."""

from __future__ import annotations

import copy
from collections.abc import Iterator

from torch import nn

from fastlora.errors import MergeError
from fastlora.layer import LoRALinear


def merge_lora_weights(model: nn.Module, inplace: bool = True) -> nn.Module:
    """Replace every `LoRALinear` by a plain layer of the wrapped class with W + scaling · B A.

    The sum is made in float32 or wider and rounded once. All layers are checked before the first is replaced.

    inplace: True changes `model` and returns it. False leaves it as it is and returns a merged copy.

    Raises: MergeError, naming the layers, if a weight is parametrised or shared with another module (merging would
    change that one too, or cut the tie), or if `model` is itself a LoRALinear and inplace is True.
    """
    if isinstance(model, LoRALinear):
        if inplace:
            raise MergeError("model: is itself a LoRALinear; use model.merge_weights()")
        return model.merge_weights()
    if not inplace:
        return merged_model(model)
    check_mergeable(model)
    for layer, places in _layers_and_places(model):
        fresh = layer.merge_weights()
        for parent, name in places:
            setattr(parent, name, fresh)
    return model


def merged_model(model: nn.Module) -> nn.Module:
    """A deep copy of `model` with its adapters merged, sharing nothing with it. Raises: as `merge_lora_weights`."""
    check_mergeable(model)
    if isinstance(model, LoRALinear):
        return model.merge_weights()
    return merge_lora_weights(copy.deepcopy(model))


def check_mergeable(model: nn.Module) -> None:
    """Raises: MergeError naming every layer whose weight cannot be merged rightly, and why."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(parameter), []).append(f"{path}.{name}".lstrip("."))
    problems = []
    for path, module in model.named_modules():
        if not isinstance(module, LoRALinear):
            continue
        where = path or "the layer"
        reason = module.why_unmergeable()
        if reason is None:
            mine = f"{path}.original_linear.weight".lstrip(".")
            tied = [n for n in owners[id(module.original_linear.weight)] if n != mine]
            reason = f"the weight is tied to {', '.join(tied)}" if tied else None
        if reason is not None:
            problems.append(f"{where}: {reason}")
    if problems:
        raise MergeError("cannot merge " + "; ".join(problems))


def _layers_and_places(
    model: nn.Module,
) -> Iterator[tuple[LoRALinear, list[tuple[nn.Module, str]]]]:
    """Each LoRALinear once, with every (parent, attribute) that holds it."""
    places: dict[LoRALinear, list[tuple[nn.Module, str]]] = {}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, LoRALinear):
                places.setdefault(child, []).append((parent, name))
    yield from places.items()
