"""The weight of an adapted layer as a pure function of its tensors, for `fastlora.layers.deferred`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastlora.ops.linear import no_autocast


def merged_from(
    kind: type[Any],
    attributes: dict[str, Any],
    names: tuple[str, ...],
    weight: Tensor,
    *tensors: Tensor | None,
) -> Tensor:
    """`LoRALayer.weight` of a layer that had these attributes, wrapped weight, and parameters and buffers of these names."""
    layer = with_tensors(kind, attributes, dict(zip(names, tensors, strict=True)), weight)
    with no_autocast(weight):
        merged: Tensor = layer._merged_weight(weight).to(weight.dtype)
    return merged


def with_tensors(
    kind: type[Any], attributes: Mapping[str, Any], named: Mapping[str, Any], weight: Tensor
) -> Any:
    """A `LoRALayer` with these attributes, parameters and buffers, around a layer with this weight; only to compute with them."""
    layer = object.__new__(kind)
    # In the instance's __dict__ they take precedence over the parameters and the method.
    own = {"_buffers": named, "wrapped_weight": lambda: weight}
    layer.__dict__ = {**attributes, **named, **own}
    return layer
