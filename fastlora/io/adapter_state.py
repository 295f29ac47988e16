"""`AdapterState`: the in-memory form of an adapter, independent of file format and model.

A format maps files to an `AdapterState` and back; `adapter_state` reads one from a model. Rank, alpha, rsLoRA and the initial product
that PiSSA and OLoRA subtract are defined by `LayerState`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.config import LoRAConfig, check_hyperparameters, computes_in, scaling_divisor
from fastlora.errors import CheckpointError
from fastlora.layers.banks import ExpertBank
from fastlora.layers.base import (
    ADAPTER_TENSORS,
    LoRALayer,
    fold_initial,
    named_lora_layers,
    not_finite,
)
from fastlora.layers.conv import LoRAConv
from fastlora.layers.kinds import wrap
from fastlora.model.adapter_registry import why_not_one
from fastlora.model.heads import adapter_parameters, head_tensors, record_unfrozen
from fastlora.model.sharded import in_parts, whole
from fastlora.model.wrappers import plain_names

_MATRICES = ("linear", "transposed")
BANKS = ("experts", "transposed_experts")
_KINDS = (*_MATRICES, *BANKS, "conv", "embedding")
_CONVOLUTIONS: dict[int, Any] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
_SETTINGS = ("kind", "alpha", "use_rslora", "dropout")
_CONV_SETTINGS = (*_SETTINGS, "dilation", "padding_mode")
_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
PLACES = ("shared_with", "tied_to")


@dataclass(frozen=True, eq=False)
class LayerState:
    """The adapter of one layer, ΔW = scaling · (B A − B₀ A₀); under DoRA the rows of W + ΔW are scaled to the norms `lora_magnitude`.

    kind: "linear", "transposed" (the weight is stored as (K, N)), "experts" (the weight is (G, N, K)), "transposed_experts" ((G, K, N)), "conv" or
        "embedding"; a guess if the file does not store it.
    tensors: by the names of `ADAPTER_TENSORS`. lora_A: (R, K); experts: (G, R, K); conv: (R, in_channels / groups, *kernel_size); embedding: (R, num_embeddings).
        lora_B: (N, R); experts: (G, N, R); conv: (out_channels, R / groups, 1, …); embedding: (embedding_dim, R). lora_magnitude: (N,), experts: (G, N), the norms
        under DoRA. initial_A, initial_B: A₀ and B₀ of PiSSA and OLoRA, shaped as lora_A and lora_B.
    alpha: None if the file does not store it. use_rslora, dropout: as in `LoRALinear`.
    dilation, padding_mode: of a convolution; None if the file does not store them.
    shared_with: the other paths of the same layer in its model. tied_to: the names of other parameters that are its weight.
    """

    kind: str
    tensors: Mapping[str, Tensor]
    alpha: float | None = None
    use_rslora: bool = False
    dropout: float = 0.0
    dilation: Sequence[int] | None = None
    padding_mode: str | None = None
    shared_with: Sequence[str] = ()
    tied_to: Sequence[str] = ()

    @classmethod
    def of_layer(cls, layer: LoRALayer) -> LayerState:
        """The state of an adapted layer; tensors are detached and share storage."""
        held = {name: getattr(layer, name) for name in ADAPTER_TENSORS}
        tensors = {name: tensor.detach() for name, tensor in held.items() if tensor is not None}
        names = _CONV_SETTINGS if isinstance(layer, LoRAConv) else _SETTINGS
        return cls(tensors=tensors, **{name: getattr(layer, name) for name in names})

    @classmethod
    def from_file(
        cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any] | None
    ) -> LayerState:
        """The state that a file describes; every value is checked.

        tensors: including lora_A and lora_B. settings: as `settings()` returns them; None if the file has only tensors.

        Raises: CheckpointError or ConfigError if shapes, dtypes or settings do not fit together.
        """
        given = {"kind": _guessed_kind(tensors["lora_A"], tensors["lora_B"])} | dict(settings or {})
        stored = {name: given[name] for name in (*_CONV_SETTINGS, *PLACES) if name in given}
        state = cls(tensors=tensors, **stored)
        state._check_tensors()
        if settings is not None:
            state._check_settings(given)
        return state

    @property
    def lora_a(self) -> Tensor:
        """A."""
        return self.tensors["lora_A"]

    @property
    def lora_b(self) -> Tensor:
        """B."""
        return self.tensors["lora_B"]

    @property
    def use_dora(self) -> bool:
        """Whether there is a magnitude (DoRA)."""
        return "lora_magnitude" in self.tensors

    @property
    def subtracts_init(self) -> bool:
        """Whether an initial product is subtracted."""
        return "initial_A" in self.tensors

    @property
    def rank(self) -> int:
        """R."""
        return self.lora_a.shape[1 if self.kind in BANKS else 0]

    @property
    def groups(self) -> int:
        """The groups of the convolution, 1 for other kinds."""
        return self.rank // self.lora_b.shape[1] if self.kind == "conv" else 1

    @property
    def scaling(self) -> float:
        """The applied factor. Raises: CheckpointError if alpha is unknown."""
        if self.alpha is None:
            raise CheckpointError("alpha: the file does not store it; pass it with --alpha")
        return self.alpha / scaling_divisor(self.rank, self.use_rslora)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the weight that the adapter belongs to."""
        if self.kind in BANKS:
            (groups, n, _), k = self.lora_b.shape, self.lora_a.shape[2]
            return (groups, n, k) if self.kind == "experts" else (groups, k, n)
        n, inside = self.lora_b.shape[0], tuple(self.lora_a.shape[1:])
        return (n, *inside) if self.kind in ("linear", "conv") else (*inside, n)

    def settings(self) -> dict[str, Any]:
        """The settings that a file must store in addition to the tensors, as JSON values."""
        names = _SETTINGS if self.dilation is None else _CONV_SETTINGS
        own = {name: getattr(self, name) for name in ("rank", "use_dora", *names)}
        return own | self.places()

    def places(self) -> dict[str, list[str]]:
        """`shared_with` and `tied_to`, if there are any."""
        return {name: list(paths) for name in PLACES if (paths := getattr(self, name))}

    def folded(self) -> LayerState:
        """The same update as one product: initial_A and initial_B become part of the factors, with rank 2R and the same scaling."""
        if not self.subtracts_init:
            return self
        tensors = dict(self.tensors)
        initial = tensors.pop("initial_A"), tensors.pop("initial_B")
        a, b = fold_initial(self.lora_a, self.lora_b, *initial)
        alpha = self.alpha
        if alpha is not None:
            alpha = self.scaling * scaling_divisor(a.shape[0], self.use_rslora)
        return replace(self, tensors=tensors | {"lora_A": a, "lora_B": b}, alpha=alpha)

    def merge(self, weight: Tensor) -> tuple[Tensor, float]:
        """(the merged weight, the share ‖rounding‖ / ‖ΔW‖ that rounding lost), computed by `LoRALayer.merge_weights`.

        weight: of shape `weight_shape`. The sum is computed in float32 or wider and rounded once to its dtype. Its values that are
            not finite do not count in the share.

        Raises: MergeError if the merged weight is not finite somewhere where `weight` is.
        """
        stored = weight.T if self.kind == "transposed" else weight
        layer = self._layer_around(stored)
        both = torch.promote_types(weight.dtype, self.lora_a.dtype)
        wide = torch.promote_types(both, torch.float32)
        exact = layer.merge_weights(wide).weight
        assert isinstance(exact, Tensor)
        merged = exact.to(weight.dtype)
        layer.check_finite(merged, stored)
        with torch.no_grad():
            change = float(torch.linalg.vector_norm(layer.delta(wide), dtype=torch.float64))
        rounding = (merged.to(wide) - exact).masked_fill_(not_finite(stored), 0)
        off = float(torch.linalg.vector_norm(rounding, dtype=torch.float64))
        return merged.T if self.kind == "transposed" else merged, off / change if change else 0.0

    def _layer_around(self, weight: Tensor) -> LoRALayer:
        """A layer with `weight` and this adapter. Built on the meta device, so that nothing is allocated and no random number drawn."""
        n, k = self.lora_b.shape[0], self.lora_a.shape[1]
        base: nn.Module
        if self.kind == "conv":
            sizes = {"kernel_size": tuple(self.lora_a.shape[2:]), "groups": self.groups}
            convolution = _CONVOLUTIONS[self.lora_a.ndim]
            base = convolution(k * self.groups, n, **sizes, bias=False, device="meta")
        elif self.kind in BANKS:
            empty = nn.Parameter(torch.empty(self.weight_shape, device="meta"))
            base = ExpertBank(empty, self.kind == "transposed_experts")
        elif self.kind == "embedding":
            base = nn.Embedding(k, n, device="meta")
        else:
            base = nn.Linear(k, n, bias=False, device="meta")
        assert self.alpha is not None
        config = LoRAConfig(
            rank=self.rank, alpha=self.alpha, use_rslora=self.use_rslora, use_dora=self.use_dora
        )
        layer = wrap(base, config)
        base.weight = nn.Parameter(weight, requires_grad=False)
        for name, tensor in self.tensors.items():
            buffer = name.startswith("initial")
            setattr(layer, name, tensor if buffer else nn.Parameter(tensor, requires_grad=False))
        return layer

    def _check_tensors(self) -> None:
        """Raises: CheckpointError if the kind is unknown or the tensors do not fit it."""
        if self.kind not in _KINDS:
            raise CheckpointError(f"kind: expected one of {', '.join(_KINDS)}, got {self.kind!r}")
        a, b = tuple(self.lora_a.shape), tuple(self.lora_b.shape)
        fits = min((*a, *b), default=0) > 0
        if self.kind == "conv":
            form = "(R, C/groups, *kernel) and (N, R/groups, 1, …)"
            fits &= 3 <= len(a) == len(b) <= 5 and set(b[2:]) == {1}
            fits = fits and a[0] % b[1] == 0 and b[0] % self.groups == 0
        elif self.kind in BANKS:
            form = "(G, R, K) and (G, N, R)"
            fits &= len(a) == len(b) == 3 and a[0] == b[0] and a[1] == b[2]
        else:
            form = "(R, K) and (N, R)"
            fits &= len(a) == len(b) == 2 and a[0] == b[1]
        if not fits:
            raise CheckpointError(f"expected lora_A and lora_B as {form}, got {a} and {b}")
        for name, tensor in self.tensors.items():
            if not computes_in(tensor.dtype):
                raise CheckpointError(f"{name}: expected a float tensor, got {tensor.dtype}")
        bank = self.kind in BANKS
        wanted = {"lora_magnitude": b[: 2 if bank else 1], "initial_A": a, "initial_B": b}
        extra = {n: tuple(t.shape) for n, t in self.tensors.items() if n in wanted}
        allowed = wanted if self.kind in _MATRICES else ["lora_magnitude"] * bank
        refused = [name for name in extra if name not in allowed]
        if refused:
            raise CheckpointError(f"{', '.join(refused)}: not supported for kind {self.kind!r}")
        for name, shape in extra.items():
            if shape != wanted[name]:
                raise CheckpointError(f"{name}: expected shape {wanted[name]}, got {shape}")
        if ("initial_A" in extra) != ("initial_B" in extra):
            raise CheckpointError("expected both of initial_A and initial_B, or neither")

    def _check_settings(self, given: Mapping[str, Any]) -> None:
        """Raises: CheckpointError or ConfigError if the values in `given` are invalid or do not fit the tensors."""
        check_hyperparameters(self.rank, self.alpha, self.dropout)  # type: ignore[arg-type]
        for name in ("rank", "use_dora"):
            mine, stored = getattr(self, name), given.get(name, getattr(self, name))
            if stored != mine:
                raise CheckpointError(
                    f"{name} is {stored!r} in the settings, {mine} in the tensors"
                )
        if not isinstance(self.use_rslora, bool):
            raise CheckpointError(f"use_rslora: expected true or false, got {self.use_rslora!r}")
        for name in PLACES:
            paths = getattr(self, name)
            if not isinstance(paths, (list, tuple)) or not all(isinstance(p, str) for p in paths):
                raise CheckpointError(f"{name}: expected a list of names, got {paths!r}")
        if self.dilation is None and self.padding_mode is None:
            return
        types = [int] * (self.lora_a.ndim - 2)
        plain = isinstance(self.dilation, list) and [type(d) for d in self.dilation] == types
        if self.kind != "conv" or not plain or self.padding_mode not in _PADDING_MODES:
            raise CheckpointError(
                f"dilation, padding_mode: expected {len(types)} integers and one of {', '.join(_PADDING_MODES)} "
                f"for a convolution, got {self.dilation!r} and {self.padding_mode!r}"
            )


def _guessed_kind(a: Tensor, b: Tensor) -> str:
    """The kind of a layer whose file does not store it."""
    if a.ndim == 2:
        return "linear"
    bank = a.ndim == b.ndim == 3 and a.shape[0] == b.shape[0] and a.shape[1] == b.shape[2] > 1
    return "experts" if bank else "conv"


@dataclass(frozen=True, eq=False)
class AdapterState:
    """An adapter: its layers by path, and the tensors saved with them (trained heads) by name.

    format: the format it was read from, "fastlora", "peft", "loralib", "diffusers", "kohya" or "torchtune".
    ties: name in `others` → the first name of the same tensor, for its other names; None if it is not known.
    partial: a tensor that is not in `others`, of a module of which others are; None if there is none, or if it is not known.
    """

    layers: dict[str, LayerState]
    others: dict[str, Tensor]
    format: str = "fastlora"
    ties: Mapping[str, str] | None = None
    partial: str | None = None

    def tensors(self) -> dict[str, Tensor]:
        """All tensors under the keys of `get_lora_state_dict`."""
        return {
            f"{path}.{name}".lstrip("."): tensor
            for path, layer in self.layers.items()
            for name, tensor in layer.tensors.items()
        } | self.others

    def base_name(self, name: str) -> str:
        """The name in the base model of a tensor in `others`, which may belong to an adapted layer, as `head.original_linear.bias`."""
        owner, _, leaf = name.rpartition(".")
        path, _, wrapped = owner.rpartition(".")
        inside = path in self.layers and wrapped in ("original_linear", "original_layer")
        return f"{path}.{leaf}" if inside else name

    def whole(self) -> AdapterState:
        """With full tensors instead of those that FSDP2 shards; every process must call it."""
        layers = {
            path: replace(layer, tensors={n: whole(tensor) for n, tensor in layer.tensors.items()})
            for path, layer in self.layers.items()
        }
        others = {name: whole(tensor) for name, tensor in self.others.items()}
        return replace(self, layers=layers, others=others)

    def replaced(self, values: Mapping[str, Tensor]) -> AdapterState:
        """With the tensors in `values`, by the names of `tensors()`, instead of its own."""
        layers = {
            path: replace(
                layer, tensors={n: values.get(f"{path}.{n}", t) for n, t in layer.tensors.items()}
            )
            for path, layer in self.layers.items()
        }
        others = {name: values.get(name, tensor) for name, tensor in self.others.items()}
        return replace(self, layers=layers, others=others)

    def folded(self) -> AdapterState:
        """Every layer folded."""
        return replace(self, layers={path: layer.folded() for path, layer in self.layers.items()})


def adapter_state(model: nn.Module, include_trainable: bool = False) -> AdapterState:
    """The active adapter of `model`, under names without wrappers; tensors are detached and share storage.

    include_trainable: also the heads (`fastlora.model.heads`), a tied one under each of its names.

    Raises: CheckpointError if FSDP1 has left only parts of them in this process, or several adapters are active.
    """
    several = why_not_one(model)
    if several is not None:
        raise CheckpointError(several)
    record_unfrozen(model)
    plain = plain_names(model)
    heads = head_tensors(model) if include_trainable else {}
    if in_parts(model, (*adapter_parameters(model), *heads.values())):
        raise CheckpointError(
            "model: FSDP1 shards it, and this process holds only parts; save and load inside FullyShardedDataParallel.summon_full_params"
        )
    paths: dict[LoRALayer, list[str]] = {}
    for path, layer in named_lora_layers(model, remove_duplicate=False):
        paths.setdefault(layer, []).append(plain(path))
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(plain(name))
    layers = {}
    for layer, (path, *more) in paths.items():
        own = {f"{place}.{layer.wrapped_name}.weight".lstrip(".") for place in (path, *more)}
        tied = [name for name in names.get(id(layer.wrapped.weight), ()) if name not in own]
        layers[path] = replace(LayerState.of_layer(layer), shared_with=more, tied_to=tied)
    first: dict[int, str] = {}
    ties = {n: tie for n, value in heads.items() if (tie := first.setdefault(id(value), n)) != n}
    return AdapterState(
        layers,
        {plain(name): value.detach() for name, value in heads.items()},
        ties={plain(name): plain(tie) for name, tie in ties.items()},
        partial=_first_left_out(model, heads, plain),
    )


def _first_left_out(
    model: nn.Module, heads: Mapping[str, Tensor], plain: Callable[[str], str]
) -> str | None:
    """The name of a tensor that is no head, of a module (without adapters) that has one."""
    owners = {name.rpartition(".")[0] for name in heads}
    for path, module in model.named_modules(remove_duplicate=False):
        if path in owners and path:
            state = [f"{path}.{name}" for name in module.state_dict(keep_vars=True)]
            for name in state:
                if name not in heads and name.rpartition(".")[2] not in ADAPTER_TENSORS:
                    return plain(name)
    return None
