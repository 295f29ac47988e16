"""What a fine-tuning run keeps in memory, computed from shapes: parameters, gradients, optimizer state, saved activations.

Nothing is measured, so a model on the meta device will do. For one adapted layer with M rows and elements of b bytes
(docs/design.md, Memory):

    fastlora    b·MK (x itself) + b·MR, and 8 with dropout
    PEFT        a·MK + a·MR, and with dropout a mask of MK elements; a is the larger of b and the adapters' size
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from fastlora.config import LoRAConfig, Targets
from fastlora.errors import ConfigError, InjectionError
from fastlora.layers.base import default_adapter_dtype, named_lora_layers
from fastlora.layers.kinds import kind_of, layer_class
from fastlora.layers.linear import LoRALinear
from fastlora.layers.quantised import compute_dtype
from fastlora.model.selection import (
    attention_projections,
    make_plan,
    to_config,
    trained_beside,
    why_patterns_fail,
)

# optimizer -> (tensors like the parameter, bytes of its step counter), for each parameter that trains
OPTIMIZERS: Mapping[str, tuple[int, int]] = MappingProxyType(
    {"adamw": (2, 4), "adam": (2, 4), "adagrad": (1, 4), "momentum": (1, 0), "sgd": (0, 0)}
)


@dataclass(frozen=True)
class LayerShape:
    """What the estimate needs to know of one adapted layer.

    rank: of the computation: twice that of lora_A after PiSSA or OLoRA.
    adapter_dtype: of lora_A and lora_B.
    weight_read: the layer is never called; its owner multiplies by the merged weight itself (`nn.MultiheadAttention`).
    dora: whether DoRA scales the output.
    joined: whether each call concatenates the factors with the initial ones that it subtracts (PiSSA, OLoRA).
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

    def saved_bytes(self, rows: int) -> int:
        """Bytes that fastlora saves for the backward pass of `rows` rows, x included and parameters excluded.

        Adapters that are cast to x's dtype are counted; the kernels cast as they load and save no copy.
        """
        return self.saved_input_bytes(rows) + self.saved_beyond_input_bytes(rows)

    def saved_input_bytes(self, rows: int) -> int:
        """The part of `saved_bytes` that is x itself, which the surrounding model may save anyway."""
        return rows * self.in_features * self.dtype.itemsize

    def saved_beyond_input_bytes(self, rows: int) -> int:
        """The part of `saved_bytes` that is not x: S, the seed, casts of the adapters, and what DoRA scales."""
        cast = self.adapter_dtype != self.dtype
        size = self.dtype.itemsize
        if self.weight_read:
            return self.in_features * self.out_features * size  # the merged weight
        kept = rows * self.rank * size
        # The product saves the factors it reads: copies, if they were cast or concatenated.
        if cast or self.joined:
            kept += self.rank * (self.in_features + self.out_features) * size
        if self.dora:  # the output before it is scaled, g, and the norms
            wide = max(self.adapter_dtype.itemsize, 4)
            kept += (rows + 1) * self.out_features * size + self.out_features * wide
        return kept + (8 if self.dropout else 0)

    def peft_saved_bytes(self, rows: int) -> int:
        """Bytes that PEFT saves for the same layer: x in the adapters' dtype, or D(x) and the mask, and S.

        The mask takes one byte an element on CUDA (assumed for meta too), and as much as x on a CPU.
        """
        size = max(self.dtype.itemsize, self.adapter_dtype.itemsize)
        mask = (size if self.device == "cpu" else 1) if self.dropout else 0
        return rows * (self.in_features * (size + mask) + self.rank * size)


def shape_of(layer: LoRALinear, weight_read: bool = False) -> LayerShape:
    """The shape of a LoRALinear in training: its dropout counts in eval mode too."""
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
    )


@dataclass(frozen=True)
class MemoryEstimate:
    """The result of `estimate`, in bytes. `str(estimate)` is a small table.

    layers: how many are adapted.
    uncounted: adapted convolutions and embeddings, of which only the parameters are counted.
    saved_bytes: saved for the backward pass by the adapted linear layers, if each has an input of its own. An upper bound: layers
        that share their input (q, k and v) save it once, which shapes cannot tell.
    saved_beyond_input_bytes: the same without inputs. A lower bound, reached if the surrounding model saves every x anyway.
    peft_saved_bytes: the upper bound for PEFT's layers, with float32 adapters on a 16-bit base as PEFT makes them.
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

    @property
    def total_bytes(self) -> int:
        """The sum, with the upper bound of what is saved. Activations of other layers are not included."""
        kept = self.trainable_bytes + self.frozen_bytes + self.gradient_bytes
        return kept + self.optimizer_bytes + self.saved_bytes

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
    """Estimate the memory that fine-tuning `model` takes. Nothing is allocated, changed or computed.

    model: on any device, meta included. If it has adapters, `requires_grad` says what trains.
    rows: M, the product of all dimensions of an adapted layer's input but the last (batch × tokens).
    config: for a model without adapters, what `inject_lora` would be given. The adapters train, and what its `bias` and
        `modules_to_save` name.
    optimizer: one of adamw, adam, adagrad, momentum (SGD with momentum) and sgd.

    Raises: ConfigError if a value is bad; InjectionError if there are neither adapters nor a config, or both, if `inject_lora` would
    refuse the config or find nothing, or if a parameter is lazy and has no shape yet.
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
    counted = _count(model) if config is None else _count_planned(model, config)
    copies, step = OPTIMIZERS[optimizer]
    return MemoryEstimate(
        rows=rows,
        layers=counted.layers,
        uncounted=counted.layers - len(counted.shapes),
        optimizer=optimizer,
        trainable_bytes=sum(counted.trainable),
        frozen_bytes=counted.frozen,
        gradient_bytes=sum(counted.trainable),
        optimizer_bytes=sum(copies * size + step for size in counted.trainable),
        saved_bytes=sum(s.saved_bytes(rows) for s in counted.shapes),
        saved_beyond_input_bytes=sum(s.saved_beyond_input_bytes(rows) for s in counted.shapes),
        peft_saved_bytes=sum(s.peft_saved_bytes(rows) for s in counted.shapes),
    )


class _Counted(NamedTuple):
    """layers: how many are adapted. shapes: of the linear ones. trainable: bytes of each parameter that trains. frozen: bytes."""

    layers: int
    shapes: list[LayerShape]
    trainable: list[int]
    frozen: int


def _count(model: nn.Module) -> _Counted:
    """The adapters that `model` has; `requires_grad` says what trains. Raises: InjectionError if there are none."""
    layers = [layer for _, layer in named_lora_layers(model)]
    if not layers:
        raise InjectionError("model: has no adapters; give the config that will be injected")
    read = attention_projections(model)
    return _Counted(
        len(layers),
        [shape_of(layer, layer in read) for layer in layers if isinstance(layer, LoRALinear)],
        [p.nbytes for p in model.parameters() if p.requires_grad],
        sum(p.nbytes for p in model.parameters() if not p.requires_grad),
    )


def _count_planned(model: nn.Module, config: LoRAConfig | Targets) -> _Counted:
    """The adapters that `inject_lora(model, config)` would add. Raises: InjectionError if it would refuse or find nothing."""
    settings = to_config(config)
    plan = make_plan(model, settings)
    problem = why_patterns_fail(model, settings, plan)
    if problem is not None and (isinstance(config, LoRAConfig) or not plan):
        raise InjectionError(problem)
    read = attention_projections(model)
    adapters = [
        size * (own.adapter_dtype or default_adapter_dtype(module)).itemsize
        for module, (_, own) in plan.items()
        for size in planned_parameters(module, own)
    ]
    beside = {
        module._parameters[name]
        for module, names in trained_beside(model, settings, plan).items()
        for name in names
    }
    return _Counted(
        len(plan),
        [
            planned_shape(module, own, module in read)
            for module, (_, own) in plan.items()
            if kind_of(module) == "linear"
        ],
        adapters + [p.nbytes for p in beside if p is not None],
        sum(p.nbytes for p in model.parameters() if p not in beside),
    )


def planned_shape(linear: nn.Module, config: LoRAConfig, weight_read: bool = False) -> LayerShape:
    """The shape that a linear layer would have if it were adapted with `config`."""
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
    )


def planned_parameters(module: nn.Module, config: LoRAConfig) -> list[int]:
    """Number of elements of each parameter of the adapter that `module` would have with `config`."""
    shape_a, shape_b = layer_class(module).factor_shapes(module, config.rank)
    return [math.prod(shape_a), math.prod(shape_b)] + [shape_b[0]] * config.use_dora


def format_bytes(count: int) -> str:
    """`count` in the largest binary unit that keeps it at 1 or more: 1536 is "1.5 KiB"."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{count} B" if unit == "B" else f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"
