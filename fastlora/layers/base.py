"""`LoRALayer`: the base class of all adapted layers."""

from __future__ import annotations

import copy
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastlora.config import BACKENDS, check_hyperparameters, computes_in, scaling_divisor
from fastlora.errors import BackendError, ConfigError, FastLoRAWarning, InjectionError, MergeError
from fastlora.layers.base_keys import add_wrapped_name, name_remedy
from fastlora.layers.deferred import can_defer, defer
from fastlora.layers.offload import execution_device, offload_hook
from fastlora.layers.plain import attribute
from fastlora.layers.quantised import dequantised, quantisation, why_unreadable
from fastlora.layers.recomputed import merged_from
from fastlora.layers.usage import Usage, note_compiled_read
from fastlora.ops.dispatch import Choice
from fastlora.ops.linear import no_autocast

Shape = tuple[int, ...]
# The parameters and buffers of an adapter.
ADAPTER_TENSORS = ("lora_A", "lora_B", "lora_magnitude", "initial_A", "initial_B")


class LoRALayer(nn.Module, ABC):
    """A frozen layer with a trainable update ΔW = scaling · B A of its weight; base of `LoRALinear`, `LoRAConv`, `LoRAEmbedding`.

    After an initialisation with B A ≠ 0 (PiSSA, OLoRA) the buffers `initial_A` and `initial_B` hold A₀ and B₀, and
    ΔW = scaling · (B A − B₀ A₀): the wrapped weight never changes, and ΔW starts at zero.

    original_layer: the layer to adapt. Other arguments as in `LoRALinear`.
    """

    wrapped_name: ClassVar[str]  # the attribute with the wrapped layer
    has_kernels: ClassVar[bool] = False  # whether kernels and DoRA support it
    has_dropout: ClassVar[bool] = True  # whether dropout applies to the input
    operations: ClassVar[str]  # how torch computes a layer without kernels
    kind: ClassVar[str]  # "linear", "transposed", "conv" or "embedding"; written to adapter files
    disabled: bool = False  # set within `fastlora.disable_adapter`
    init_lora_weights: str = "kaiming"  # as in `LoRAConfig`, for `reset_lora_parameters(model)`
    initial_A: Tensor | None
    initial_B: Tensor | None
    lora_magnitude: nn.Parameter | None
    usage: Usage

    def __init__(
        self,
        original_layer: nn.Module,
        rank: int = 4,
        alpha: float = 8.0,
        dropout: float = 0.0,
        *,
        adapter_dtype: torch.dtype | None = None,
        backend: str = "auto",
        use_rslora: bool = False,
        use_dora: bool = False,
    ) -> None:
        super().__init__()
        reason = self.why_unsuitable(original_layer)
        if reason is not None:
            raise InjectionError(f"{self.wrapped_name}: {reason}")
        check_hyperparameters(rank, alpha, dropout)
        for name, value in (("use_rslora", use_rslora), ("use_dora", use_dora)):
            if not isinstance(value, bool):
                raise ConfigError(f"{name}: expected True or False, got {value!r}")
        if backend not in BACKENDS:
            raise ConfigError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
        if use_dora and self.has_kernels and (why := why_unreadable(original_layer)) is not None:
            raise ConfigError(f"use_dora: reads the weight, but {why}")
        if not self.has_kernels:
            what = type(original_layer).__name__
            if use_dora:
                raise ConfigError(f"use_dora: is for linear layers, got {what}")
            if backend == "triton":
                raise BackendError(f"backend='triton' cannot run: there is no kernel for {what}")
        if adapter_dtype is None:
            adapter_dtype = default_adapter_dtype(original_layer)
        if not computes_in(adapter_dtype):
            raise ConfigError(f"adapter_dtype: expected a float dtype, got {adapter_dtype}")
        self.add_module(self.wrapped_name, original_layer)
        self.rank = rank
        self.alpha = float(alpha)
        self.dropout = float(dropout) if self.has_dropout else 0.0
        self.backend = backend
        self.use_rslora = use_rslora
        shape_a, shape_b = self.factor_shapes(original_layer, rank)
        device = execution_device(original_layer)
        self.lora_A = nn.Parameter(torch.empty(shape_a, dtype=adapter_dtype, device=device))
        self.lora_B = nn.Parameter(torch.empty(shape_b, dtype=adapter_dtype, device=device))
        self.register_parameter("lora_magnitude", None)
        self.register_buffer("initial_A", None)
        self.register_buffer("initial_B", None)
        self.usage = Usage()
        self.reset_lora_parameters()
        self.train(original_layer.training)

    @classmethod
    @abstractmethod
    def why_unsuitable(cls, layer: object) -> str | None:
        """Why a layer cannot be wrapped, or None if it can."""

    @staticmethod
    @abstractmethod
    def factor_shapes(original: nn.Module, rank: int) -> tuple[Shape, Shape]:
        """The shapes of lora_A and lora_B around `original`."""

    def reset_lora_parameters(self) -> None:
        """Reset lora_A to Kaiming-uniform values (as the weight of `nn.Linear`) and lora_B to zero, so ΔW = 0."""
        self.initial_A = self.initial_B = None
        self.init_lora_weights = "kaiming"
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    @property
    def wrapped(self) -> nn.Module:
        """The adapted layer."""
        module = self._modules[self.wrapped_name]
        assert module is not None
        return module

    @property
    def scaling(self) -> float:
        """The applied factor: alpha / rank, or alpha / √rank under rsLoRA."""
        return self.alpha / scaling_divisor(self.rank, self.use_rslora)

    @property
    def weight(self) -> Tensor:
        """The wrapped weight + ΔW, in its shape, computed once for each access, when an operation needs its value.

        Summed in float32 or wider and rounded once to the weight's dtype (that of `wrapped_weight`). Differentiable, so code
        that multiplies by `.weight` itself (`nn.MultiheadAttention`) uses and trains the adapter, without dropout. While the
        adapter is disabled, the wrapped weight. Reading the dtype, device or shape computes nothing. The value is that at the
        access; `.detach().clone()` keeps it beyond a change of the wrapped weight or the adapter. Parts of it and `.data` are
        plain temporary tensors: writing them does not reach the layer.

        Raises: MergeError in an operation that writes it, or that first needs its value after such a change, if torch's version counter
        shows the change (`p.data.add_()` does not count).
        """
        weight = self.wrapped_weight()
        if self.disabled:
            return weight
        if torch.compiler.is_compiling():
            note_compiled_read(self.lora_A)
        else:
            own = self._parameters | self._buffers
            tensors = (weight, *own.values())
            # Replicas of DataParallel and layers with parametrised factors have them elsewhere.
            if own.keys() >= set(ADAPTER_TENSORS) and can_defer(tensors):
                compute = partial(merged_from, type(self), self.__dict__.copy(), tuple(own))
                return defer(compute, tensors, self._note_weight_read)
            self._note_weight_read()
        with no_autocast(weight):
            return self._merged_weight(weight).to(weight.dtype)

    @property
    def only_read(self) -> bool:
        """Whether other code was seen to read `weight` and not to call the layer."""
        return self.usage.with_compiled(self.lora_A).only_read

    @property
    def bias(self) -> nn.Parameter | None:
        """The wrapped layer's bias, or None."""
        return cast("nn.Parameter | None", getattr(self.wrapped, "bias", None))

    def wrapped_weight(self) -> Tensor:
        """The weight of the wrapped layer, in floating point even if it is quantised, loaded even if it is offloaded.

        Raises: MergeError if its values are unknown.
        """
        return dequantised(self.wrapped)

    @property
    def wrapped_device(self) -> torch.device:
        """The device on which the wrapped layer computes, which is not its weight's while accelerate offloads it."""
        return execution_device(self.wrapped)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B with ΔW = scaling · B A: lora_A and lora_B, with initial_A and initial_B folded in if there are any."""
        if "_hf_hook" in self.__dict__ and torch.is_grad_enabled():
            self._warn_if_offloaded()
        initial_a, initial_b = self._buffers["initial_A"], self._buffers["initial_B"]
        if initial_a is None or initial_b is None:
            return attribute(self, "lora_A"), attribute(self, "lora_B")
        return fold_initial(self.lora_A, self.lora_B, initial_a, initial_b)

    def factors_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """`factors()`. Raises: ConfigError if they are on another device."""
        a, b = self.factors()
        for name, factor in (("lora_A", a), ("lora_B", b)):
            if factor.device != device:
                raise ConfigError(
                    f"{name}: expected the layer's device {device}, got {factor.device}"
                )
        return a, b

    def misplaced(self) -> str | None:
        """Which parameter of the adapter is not on the device on which the layer computes, or None if all are."""
        device = self.wrapped_device
        for name, parameter in self.lora_parameters().items():
            if parameter.device != device:
                return f"{name} is on {parameter.device}, but the layer computes on {device}"
        return None

    def lora_parameters(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters by name: lora_A, lora_B and, under DoRA, lora_magnitude."""
        return {
            name: parameter
            for name in ("lora_A", "lora_B", "lora_magnitude")
            if (parameter := self._parameters[name]) is not None
        }

    def delta(self, dtype: torch.dtype, *, magnitude: bool = False) -> Tensor:
        """ΔW in the weight's shape, computed in `dtype`.

        magnitude: return the sum of the magnitudes of its terms instead, which bounds rounding errors.
        """
        a, b = (factor.to(dtype) for factor in self.factors_on(self.wrapped_device))
        if magnitude:
            return self._product(a.abs(), b.abs()) * abs(self.scaling)
        return self._product(a, b) * self.scaling

    @abstractmethod
    def apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The output of the wrapped layer for `x` with the given weight and bias."""

    @abstractmethod
    def sample_input(self, rows: int, generator: torch.Generator) -> Tensor:
        """A small random input for the wrapped layer, on the CPU."""

    @property
    def terms(self) -> int:
        """How many products one output of the wrapped layer sums."""
        return self.lora_A[0].numel()

    def sample_rest(self, x: Tensor) -> tuple[Any, ...]:
        """What a call with the `sample_input` x needs after x."""
        return ()

    def choose(self, x: Tensor) -> Choice:
        """The backend and plan that a call with the tensor `x` uses, and the reason."""
        if self.disabled:
            return Choice("torch", "base", "the adapter is disabled; the wrapped layer alone runs")
        return Choice("torch", "wrapped", self.operations)

    def merge_weights(self, dtype: torch.dtype | None = None) -> nn.Module:
        """A new layer of the wrapped class with the weight W + ΔW. This layer does not change.

        The sum is computed in float32 or wider and rounded once. Device, bias (a copy), training mode and requires_grad are kept.

        dtype: of the merged weight; None keeps the wrapped weight's.

        Raises: MergeError if the wrapped weight is parametrised (merging would discard the parametrisation) or quantised, the adapter
        is disabled, or the merged weight is not finite somewhere where the wrapped weight is.
        """
        reason = self.why_unmergeable()
        if reason is not None:
            raise MergeError(f"cannot merge: {reason}")
        original = cast(nn.Parameter, self.wrapped.weight)
        with torch.no_grad(), no_autocast(original):
            merged = self._merged_weight(original).to(dtype or original.dtype)
        self.check_finite(merged, original)
        parameter = nn.Parameter(merged, requires_grad=original.requires_grad)
        # The memo makes deepcopy use the merged weight instead of copying the original.
        fresh: nn.Module = copy.deepcopy(self.wrapped, {id(original): parameter})
        return fresh

    def check_finite(self, merged: Tensor, original: Tensor) -> None:
        """Raises: MergeError if `merged` has values that are not finite where those of the weight `original` are."""
        spoiled = 0 if merged.is_meta else int((not_finite(merged) & ~not_finite(original)).sum())
        if not spoiled:
            return
        tensors = {name: getattr(self, name) for name in ADAPTER_TENSORS}
        named = [n for n, t in tensors.items() if t is not None and bool(not_finite(t).any())]
        reason = f"{', '.join(named)} has values that are not finite" if named else "out of range"
        raise MergeError(
            f"cannot merge: {spoiled} values of W + ΔW are not finite in {merged.dtype} ({reason})"
        )

    def why_unmergeable(self) -> str | None:
        """Why the update cannot be merged into the wrapped weight, or None if it can."""
        if self.disabled:
            return "the adapter is disabled; merge outside of disable_adapter"
        package = quantisation(self.wrapped)
        if package is not None:
            return f"the weight is quantised by {package}, which would round the update away; merge into the unquantised model"
        if offload_hook(self.wrapped) is not None:
            return "the weight is offloaded by accelerate, which would discard the merged one; merge a model loaded without offload"
        misplaced = self.misplaced()
        if misplaced is not None:
            return misplaced
        if parametrize.is_parametrized(self.wrapped, "weight"):
            return "the weight is parametrised; remove the parametrisation first"
        if "weight" not in self.wrapped._parameters:
            return "the weight is computed by a hook, not a parameter"
        return None

    def _note_weight_read(self) -> None:
        """Note that an operation uses the value of `weight`; warn if LoRA dropout has no effect for that reason."""
        usage = self.usage
        usage.read = True
        if not self.training:
            return
        # The first read may precede the first call, as in a penalty on the weight.
        if usage.read_in_training and self.only_read and self.dropout and not usage.dropout_warned:
            usage.dropout_warned = True
            warnings.warn(
                f"dropout has no effect on a {type(self).__name__}({self.extra_repr()}): its weight is read in training "
                "mode and its forward was not seen to be called",
                FastLoRAWarning,
                stacklevel=2,
            )
        usage.read_in_training = True

    def extra_repr(self) -> str:
        return (
            f"r={self.rank}, alpha={self.alpha:g}, dropout={self.dropout:g}"
            + (", use_rslora=True" if self.use_rslora else "")
            + (", use_dora=True" if self.lora_magnitude is not None else "")
            + (", disabled" if self.disabled else "")
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoRALayer:
        was_meta = self.lora_A.is_meta
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if was_meta and not self.lora_A.is_meta:  # by `to_empty`, which leaves what the memory held
            with torch.no_grad():
                for tensor in (*self.lora_parameters().values(), self.initial_A, self.initial_B):
                    if tensor is not None:
                        tensor.fill_(math.nan)
        return self

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        own = {*ADAPTER_TENSORS, *self._parameters, *self._buffers, *self._modules}
        old = add_wrapped_name(state, prefix, self.wrapped_name, own)
        super()._load_from_state_dict(state, prefix, *rest)
        if old:
            name_remedy(rest[2], [prefix + name for name in self.lora_parameters()])

    def __getstate__(self) -> dict[str, Any]:
        self.usage.with_compiled(self.lora_A)  # which is another tensor in a copy
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        # A copy made inside disable_adapter would stay disabled.
        self.__dict__.pop("disabled", None)
        self.__dict__.setdefault("usage", Usage())  # of a pickle from before it existed

    @abstractmethod
    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        """B A in the weight's shape."""

    def _warn_if_offloaded(self) -> None:
        if offload_hook(self) is not None and self.lora_A.requires_grad:
            warnings.warn(
                "accelerate offloads lora_A and lora_B, so training does not change them; offload the model before "
                "inject_lora, which keeps them in memory",
                FastLoRAWarning,
                stacklevel=3,
            )

    def _accumulate_dtype(self, weight: Tensor) -> torch.dtype:
        """The dtype in which weights are summed: float32 or wider."""
        # Not torch.promote_types, which exporters of torch 2.6 record as an operation of the model.
        both = (weight.dtype, self.lora_A.dtype)
        return torch.float64 if torch.float64 in both else torch.float32

    def _merged_weight(self, weight: Tensor) -> Tensor:
        wide = self._accumulate_dtype(weight)
        return weight.to(wide) + self.delta(wide)


def fold_initial(
    a: Tensor, b: Tensor, initial_a: Tensor, initial_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Factors of rank 2R whose product is B A − B₀ A₀."""
    return torch.cat([a, initial_a]), torch.cat([b, -initial_b], 1)


def not_finite(tensor: Tensor) -> Tensor:
    """Where `tensor` is infinite or NaN."""
    wide = tensor.float() if tensor.element_size() == 1 else tensor  # torch has no test for float8
    return ~wide.detach().isfinite()


def wrapped_attribute(name: str) -> Any:
    """A read-only property that returns the wrapped layer's attribute `name`."""
    return property(lambda layer: getattr(layer.wrapped, name), doc=f"The wrapped layer's {name}.")


def default_adapter_dtype(original: nn.Module) -> torch.dtype:
    """The weight's dtype, but float32 for a 16-bit weight, in which small updates would vanish, and for a quantised one."""
    if quantisation(original) is not None:
        return torch.float32
    return torch.promote_types(cast(Tensor, original.weight).dtype, torch.float32)


def named_lora_layers(
    model: nn.Module, remove_duplicate: bool = True
) -> Iterator[tuple[str, LoRALayer]]:
    """(path, layer) of every adapted layer, each once under its first name, or under all its names if `remove_duplicate` is False."""
    for path, module in model.named_modules(remove_duplicate=remove_duplicate):
        if isinstance(module, LoRALayer):
            yield path, module
