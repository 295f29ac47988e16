"""Memory of a fine-tuning run, computed from shapes: parameters, gradients, optimizer, saved activations (docs/design.md)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import cast

import torch
from torch import Tensor, nn

from fastlora.config import LoRAConfig, Targets
from fastlora.errors import ConfigError, InjectionError
from fastlora.layers.banks import ExpertBank
from fastlora.layers.base import default_adapter_dtype, named_lora_layers
from fastlora.layers.kinds import kind_of, layer_class
from fastlora.layers.linear import LoRALinear
from fastlora.layers.quantised import compute_dtype, quantisation, stored_bytes
from fastlora.layers.transient import why_own_product
from fastlora.model.adapter_registry import none_active
from fastlora.model.selection import (
    attention_projections,
    extra_trainable,
    select_layers,
    to_config,
    unmatched_pattern,
)

# optimizer -> (tensors like the parameter, bytes of its step counter), for each trainable parameter
OPTIMIZERS: Mapping[str, tuple[int, int]] = MappingProxyType(
    {"adamw": (2, 4), "adam": (2, 4), "adagrad": (1, 4), "momentum": (1, 0), "sgd": (0, 0)}
)


@dataclass(frozen=True)
class LayerShape:
    """The sizes and settings of one adapted layer that determine its memory.

    rank: of the computation, twice that of lora_A after PiSSA or OLoRA.
    adapter_dtype: of lora_A and lora_B.
    weight_read: the layer is never called, because its parent multiplies by the merged weight (`nn.MultiheadAttention`).
    dora: whether the output is scaled.
    joined: whether each call concatenates the factors with those of the subtracted initial product.
    dequantised: whether the weight is quantised, and dequantised for each pass.
    """

    in_features: int
    out_features: int
    rank: int
    dropout: bool
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    device: str
    weight_read: bool = False
    dora: bool = False
    joined: bool = False
    dequantised: bool = False

    def saved_bytes(self, rows: int) -> int:
        """Bytes that fastlora saves for the backward pass of `rows` rows, including x and excluding parameters.

        Casts of the adapters to x's dtype are included; kernels cast as they load and save none.
        """
        return rows * self.in_features * self.dtype.itemsize + self.saved_beyond_input_bytes(rows)

    def saved_beyond_input_bytes(self, rows: int) -> int:
        """`saved_bytes` without x, which the caller may keep alive anyway: S, the seed, casts of the adapters, DoRA's tensors."""
        size = self.dtype.itemsize
        if self.weight_read:
            return self.in_features * self.out_features * size  # the merged weight
        saved = rows * self.rank * size
        # The product saves the factors that it reads: casts, or concatenations.
        if self.adapter_dtype != self.dtype or self.joined:
            saved += self.rank * (self.in_features + self.out_features) * size
        if self.dora:  # the output before it is scaled, g, and the norms
            wide = max(self.adapter_dtype.itemsize, 4)
            saved += (rows + 1) * self.out_features * size + self.out_features * wide
        return saved + (8 if self.dropout else 0)

    def transient_bytes(self) -> int:
        """Bytes of the dequantised weight, which exists while one pass of the layer runs; DoRA's norms read it in float32."""
        size = max(self.dtype.itemsize, 4) if self.dora else self.dtype.itemsize
        return self.in_features * self.out_features * size if self.dequantised else 0

    def peft_saved_bytes(self, rows: int) -> int:
        """Bytes that PEFT saves for the same rows: x in the adapters' dtype, or D(x) and the mask, and S.

        The mask has one byte per element on CUDA (and on meta, treated as CUDA), and the size of x on a CPU.
        """
        size = max(self.dtype.itemsize, self.adapter_dtype.itemsize)
        mask = (size if self.device == "cpu" else 1) if self.dropout else 0
        return rows * (self.in_features * (size + mask) + self.rank * size)


def shape_of(layer: LoRALinear, weight_read: bool = False) -> LayerShape:
    """The shape of a LoRALinear in training: dropout is included in any mode."""
    return LayerShape(
        layer.in_features,
        layer.out_features,
        layer.rank if layer.initial_A is None else 2 * layer.rank,
        layer.dropout > 0,
        compute_dtype(layer.original_linear),
        layer.lora_A.dtype,
        layer.lora_A.device.type,
        weight_read,
        layer.lora_magnitude is not None,
        layer.initial_A is not None,
        _dequantised(layer.original_linear),
    )


def _dequantised(linear: nn.Module) -> bool:
    return quantisation(linear) is not None and why_own_product(linear) is None


@dataclass(frozen=True)
class MemoryEstimate:
    """The result of `estimate`, in bytes. `str(estimate)` is a small table.

    layers: number of adapted layers.
    uncounted: how many of them are convolutions, embeddings or banks of experts, of which only the parameters are counted.
    saved_bytes: saved for the backward pass by the adapted linear layers, each with its own input: an upper bound, since layers
        that share their input (q, k and v) save it once, which shapes do not show.
    saved_beyond_input_bytes: the same without inputs: a lower bound, reached if other layers save every x anyway.
    peft_saved_bytes: the upper bound for PEFT's layers, with float32 adapters on a 16-bit base, as is PEFT's default.
    transient_bytes: the largest dequantised weight of the adapted layers; one exists at a time, while its layer runs.
    """

    rows: int
    layers: int
    uncounted: int
    optimizer: str
    trainable_bytes: int
    frozen_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    saved_bytes: int
    saved_beyond_input_bytes: int
    peft_saved_bytes: int
    transient_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """The sum, with the upper bound of saved bytes and without activations of other layers."""
        parameters = self.trainable_bytes + self.frozen_bytes + self.transient_bytes
        return parameters + self.gradient_bytes + self.optimizer_bytes + self.saved_bytes

    def __str__(self) -> str:
        lines = [
            ("frozen parameters", self.frozen_bytes, ""),
            ("trainable parameters", self.trainable_bytes, ""),
            ("gradients", self.gradient_bytes, ""),
            (f"optimizer ({self.optimizer})", self.optimizer_bytes, ""),
            (
                f"saved by {self.layers - self.uncounted} adapted layers, {self.rows:,} rows",
                self.saved_bytes,
                f"at most; {format_bytes(self.saved_beyond_input_bytes)} beyond their inputs; "
                f"PEFT at most {format_bytes(self.peft_saved_bytes)}",
            ),
            *[("the largest dequantised weight", self.transient_bytes, "one at a time")]
            * (self.transient_bytes > 0),
            ("total", self.total_bytes, "without the activations of other layers"),
        ]
        width = max(len(name) for name, _, _ in lines)
        rows = (f"{n:<{width}}  {format_bytes(b):>10}  {note}".rstrip() for n, b, note in lines)
        return "\n".join(rows)


def estimate(
    model: nn.Module,
    rows: int,
    config: LoRAConfig | Targets | None = None,
    optimizer: str = "adamw",
) -> MemoryEstimate:
    """Estimate the memory of fine-tuning `model` before it starts. Nothing is allocated, changed or computed.

    model: on any device, meta included. If it has adapters, `requires_grad` determines which parameters train.
    rows: M, the product of all dimensions of an adapted layer's input except the last (batch × tokens).
    config: for a model without adapters, the adapters to inject (as in `inject_lora`); these train, and the parameters that
        `bias` and `modules_to_save` name.
    optimizer: one of adamw, adam, adagrad, momentum (SGD with momentum) and sgd.

    Raises: ConfigError for an invalid value; InjectionError if there are neither adapters nor a config, or both, if `inject_lora` would
    refuse the config or select nothing, or if a parameter is lazy and has no shape yet.
    """
    if not isinstance(rows, int) or isinstance(rows, bool) or rows < 1:
        raise ConfigError(f"rows: expected an integer ≥ 1, got {rows!r}")
    if optimizer not in OPTIMIZERS:
        raise ConfigError(f"optimizer: expected one of {', '.join(OPTIMIZERS)}, got {optimizer!r}")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise InjectionError(
                f"model: {name} has no shape yet (lazy): run one forward pass first"
            )
    counted = _as_it_is(model) if config is None else _after_injection(model, config)
    adapted, shapes, added, trains = counted
    trainable = added + [p.nbytes for p in model.parameters() if p in trains]
    copies, step = OPTIMIZERS[optimizer]
    return MemoryEstimate(
        rows=rows,
        layers=adapted,
        uncounted=adapted - len(shapes),
        optimizer=optimizer,
        trainable_bytes=sum(trainable),
        frozen_bytes=sum(stored_bytes(p) for p in model.parameters() if p not in trains),
        gradient_bytes=sum(trainable),
        optimizer_bytes=sum(copies * size + step for size in trainable),
        saved_bytes=sum(s.saved_bytes(rows) for s in shapes),
        saved_beyond_input_bytes=sum(s.saved_beyond_input_bytes(rows) for s in shapes),
        peft_saved_bytes=sum(s.peft_saved_bytes(rows) for s in shapes),
        transient_bytes=max((s.transient_bytes() for s in shapes), default=0),
    )


# Number of adapted layers, shapes of the linear ones, bytes of each parameter to add, the model's parameters that train.
_Counted = tuple[int, list[LayerShape], list[int], set[nn.Parameter | None]]


def _as_it_is(model: nn.Module) -> _Counted:
    layers = [layer for _, layer in named_lora_layers(model)]
    if not layers:
        raise InjectionError(f"{none_active(model)}; pass the config to inject")
    read = attention_projections(model)
    shapes = [shape_of(layer, layer in read) for layer in layers if isinstance(layer, LoRALinear)]
    return len(layers), shapes, [], {p for p in model.parameters() if p.requires_grad}


def _after_injection(model: nn.Module, config: LoRAConfig | Targets) -> _Counted:
    settings = to_config(model, config)
    selected = select_layers(model, settings)
    problem = unmatched_pattern(model, settings, selected)
    if problem is not None and (isinstance(config, LoRAConfig) or not selected):
        raise InjectionError(problem)
    read = attention_projections(model)
    shapes = [
        shape_after_injection(module, own, module in read)
        for module, (_, own) in selected.items()
        if kind_of(module) == "linear" and not isinstance(module, ExpertBank)
    ]
    added = [
        size * (own.adapter_dtype or default_adapter_dtype(module)).itemsize
        for module, (_, own) in selected.items()
        for size in adapter_sizes(module, own)
    ]
    return len(selected), shapes, added, set(extra_trainable(model, settings, selected))


def shape_after_injection(
    linear: nn.Module, config: LoRAConfig, weight_read: bool = False
) -> LayerShape:
    """The shape of a linear layer after its injection with its own `config`."""
    (_, k), (n, _) = layer_class(linear).factor_shapes(linear, config.rank)
    return LayerShape(
        k,
        n,
        2 * config.rank if config.subtracts_init else config.rank,
        config.dropout > 0,
        compute_dtype(linear),
        config.adapter_dtype or default_adapter_dtype(linear),
        cast(Tensor, linear.weight).device.type,
        weight_read,
        config.use_dora,
        config.subtracts_init,
        _dequantised(linear),
    )


def adapter_sizes(module: nn.Module, config: LoRAConfig) -> list[int]:
    """Number of elements of each parameter of the adapter that `module` gets with its own `config`."""
    shape_a, shape_b = layer_class(module).factor_shapes(module, config.rank)
    # B ends with the rank, and in a convolution with ones.
    magnitudes = [math.prod(shape_b[:-1])] * config.use_dora
    return [math.prod(shape_a), math.prod(shape_b), *magnitudes]


def format_bytes(count: int) -> str:
    """`count` in the largest binary unit of which it is at least one: 1536 is "1.5 KiB"."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{count} B" if unit == "B" else f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"
