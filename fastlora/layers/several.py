"""`SeveralAdapters`: one layer with several adapters at once, summed or one for each sample of the batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fastlora.errors import ConfigError
from fastlora.layers.base import ADAPTER_TENSORS, LoRALayer, wrapped_attribute
from fastlora.layers.conv import LoRAConv
from fastlora.layers.deferred import can_defer, defer, defer_refusal, is_deferrable_here
from fastlora.layers.linear import LoRALinear
from fastlora.layers.nested import on_rows
from fastlora.layers.plain import attribute
from fastlora.layers.quantised import quantisation
from fastlora.layers.recomputed import with_tensors
from fastlora.layers.transient import note_compute_dtype, transient
from fastlora.layers.usage import note_compiled_call, note_compiled_read
from fastlora.ops.dispatch import Choice, resolve
from fastlora.ops.linear import low_rank, no_autocast
from fastlora.ops.mixed import (
    Segment,
    lora_linear_mixed,
    lora_update_mixed,
    neighbours,
    why_not_kernels,
)
from fastlora.ops.reference import LowRank

Samples = tuple["str | None", ...]


class SeveralAdapters(nn.Module):
    """One layer with the wrappers of several adapters around it, which are its children; it takes the place of a wrapper.

    Until `route` is called, every sample gets the sum of the updates. With DoRA the update of an adapter is its output less the layer's.

    path: where the layer is, for messages. wrappers: adapter → its wrapper; all have the same wrapped layer.
    """

    in_features = wrapped_attribute("in_features")
    out_features = wrapped_attribute("out_features")
    in_channels = wrapped_attribute("in_channels")
    out_channels = wrapped_attribute("out_channels")
    kernel_size = wrapped_attribute("kernel_size")
    stride = wrapped_attribute("stride")
    padding = wrapped_attribute("padding")
    padding_mode = wrapped_attribute("padding_mode")
    dilation = wrapped_attribute("dilation")
    groups = wrapped_attribute("groups")
    num_embeddings = wrapped_attribute("num_embeddings")
    embedding_dim = wrapped_attribute("embedding_dim")
    padding_idx = wrapped_attribute("padding_idx")

    def __init__(self, path: str, wrappers: Mapping[str, LoRALayer]) -> None:
        super().__init__()
        self.path, self.names = path, tuple(wrappers)
        for name, layer in wrappers.items():
            self.add_module(_child_name(name), layer)
        self.training = self.layers[0].wrapped.training
        self.route(None)

    @property
    def layers(self) -> list[Any]:
        """The wrappers, in the order of `names`."""
        return list(self._modules.values())

    @property
    def wrapped(self) -> nn.Module:
        """The adapted layer."""
        layer: LoRALayer = self.layers[0]
        return layer.wrapped

    def route(self, samples: Samples | None) -> None:
        """Set the adapter of each sample of the batch, the first dimension of the input; without samples the adapters are summed.

        None in `samples`, and an adapter that does not adapt this layer, leave a sample as the wrapped layer computes it.
        """
        self.samples = samples
        self.runs = neighbours(samples or (), self.names)

    @property
    def weight(self) -> Tensor:
        """The wrapped weight + the sum of every ΔW, with the properties of `LoRALayer.weight`.

        Raises: ConfigError in an operation that needs its value while samples have different adapters. MergeError as `LoRALayer.weight`.
        """
        layers = self._enabled()
        if not layers:
            return self.layers[0].wrapped_weight()  # type: ignore[no-any-return]
        if len(layers) == 1 and self.samples is None:
            return layers[0].weight  # type: ignore[no-any-return]
        weight: Tensor = layers[0].wrapped_weight()
        own = [layer._parameters | layer._buffers for layer in layers]
        tensors = [weight, *(tensor for named in own for tensor in named.values())]
        if self.samples is not None:
            if is_deferrable_here():
                return defer_refusal(tensors, self._refuse_weight)
            self._refuse_weight(
                "; compiled, traced or transformed code cannot read its dtype either"
            )
        note = partial(_note_reads, layers)
        plain = all(named.keys() >= set(ADAPTER_TENSORS) for named in own)
        if not torch.compiler.is_compiling() and plain and can_defer(tensors):
            parts = [
                (type(layer), layer.__dict__.copy(), tuple(named))
                for layer, named in zip(layers, own, strict=True)
            ]
            return defer(partial(_summed_from, parts), tensors, note)
        note()
        return _summed(layers, weight)

    @property
    def bias(self) -> nn.Parameter | None:
        """The wrapped layer's bias, or None."""
        return self.layers[0].bias  # type: ignore[no-any-return]

    def forward(self, input: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As the wrappers' forward. With `samples`, input: (len(samples), …) and no token object.

        Raises: ConfigError if the first dimension is another, or the input is no plain tensor while samples have different adapters.
        BackendError if an adapter forces the kernels.
        """
        layers, enabled = self.layers, self._enabled()
        first = layers[0]
        if not enabled:
            return first(input, *args, **kwargs)
        if self.samples is None and len(enabled) == 1:
            return enabled[0](input, *args, **kwargs)
        for layer in layers:
            if torch.compiler.is_compiling():
                note_compiled_call(layer.lora_A)
            else:
                layer.usage.called = True
        if input is None and kwargs and not args and isinstance(first, LoRALinear):
            input, kwargs = first._input_by_name(kwargs)
        if self.samples is not None:
            self._check_samples(input)
        if isinstance(input, Tensor) and not args and not kwargs:
            return self._forward_tensor(input)
        plain_class = type(self.wrapped).forward is nn.Linear.forward
        on_feats = plain_class or quantisation(self.wrapped) is not None
        if on_feats and hasattr(input, "feats") and hasattr(input, "replace"):
            return input.replace(self._forward_tensor(input.feats))
        y = self.wrapped(input, *args, **kwargs)
        if isinstance(input, Tensor) and isinstance(y, Tensor):
            return self._updated(y, input)
        if all(hasattr(tokens, "feats") and hasattr(tokens, "replace") for tokens in (input, y)):
            return y.replace(self._updated(y.feats, input.feats))
        raise TypeError(
            f"input: expected a tensor or an object with .feats and .replace, and an output of its type, got {type(input).__name__} "
            f"and {type(y).__name__}"
        )

    def choose(self) -> Choice:
        """How a call runs, whatever its input, and why."""
        first, backend = self.layers[0], self._backend()
        fast = isinstance(first, LoRALinear) and first._is_plain() and not self._has_dora()
        if self.samples is None:
            reason = f"{len(self.names)} adapters, summed, on one base product; there is no kernel for the sum"
        elif not fast:
            reason = f"{len(self.names)} adapters, for one sample each, on the layer's output"
        else:
            reason = f"{len(self.names)} adapters, for one sample each, on one base product"
            weight, ranks = (
                attribute(first.wrapped, "weight"),
                [layer.rank for layer in self.layers],
            )
            forced = backend == "triton"
            why: str | None = "backend='torch' was requested"
            if backend != "torch":
                why = why_not_kernels(weight.device.type, weight.dtype, ranks, forced)
            if why is None:
                return Choice("triton", "operator", reason)
            reason += f"; {why}"
        return Choice("torch", "in_place" if fast else "wrapped", reason)

    def extra_repr(self) -> str:
        what = "summed" if self.samples is None else f"for {len(self.samples)} samples"
        return f"{', '.join(self.names)}: {what}"

    def _enabled(self) -> list[Any]:
        return [layer for layer in self._modules.values() if not layer.disabled]  # type: ignore[union-attr]

    def _has_dora(self) -> bool:
        return any(la._parameters["lora_magnitude"] is not None for la in self.layers)

    def _check_samples(self, x: object) -> None:
        assert self.samples is not None
        count, where = len(self.samples), f"input of {self.path or 'the layer'}"
        if not isinstance(x, Tensor) or x.is_nested:
            kind = "a nested tensor" if isinstance(x, Tensor) else f"a {type(x).__name__}"
            raise ConfigError(
                f"{where}: expected a plain tensor ({count}, …) inside use_adapters, got {kind}, whose rows belong to no sample"
            )
        layer = self.layers[0]
        dims = len(layer.kernel_size) + 2 if isinstance(layer, LoRAConv) else None
        least = 2 if isinstance(layer, LoRALinear) else 1
        if x.ndim < least or x.shape[0] != count or (dims is not None and x.ndim != dims):
            raise ConfigError(
                f"{where}: expected ({count}, …), one sample for each name given to use_adapters, got {tuple(x.shape)}; a model that "
                "folds heads, beams or experts into the first dimension cannot have an adapter for each sample there"
            )

    def _forward_tensor(self, x: Tensor) -> Tensor:
        first = self.layers[0]
        if isinstance(first, LoRALinear) and not self._has_dora():
            if first._is_plain():
                return on_rows(self._plain, x) if x.is_nested else self._plain(x)
            if quantisation(self.wrapped) is not None and first._why_own_product(x) is None:
                dequantised = self._with_dequantised
                return on_rows(dequantised, x) if x.is_nested else dequantised(x)
        return self._updated(self.wrapped(x), x)

    def _plain(self, x: Tensor) -> Tensor:
        linear = self.wrapped
        weight = self.layers[0]._as_weight_layout(attribute(linear, "weight"))
        bias, backend = attribute(linear, "bias"), self._backend()
        return lora_linear_mixed(x, weight, bias, *self._paths(x), backend=backend)

    def _with_dequantised(self, x: Tensor) -> Tensor:
        note_compute_dtype(self.wrapped, x)
        call = transient(self.wrapped, x)
        bias = None if call.bias_after else call.bias
        lows, segments = self._paths(x)
        y = lora_linear_mixed(
            call.x, call.weight(), bias, lows, segments,
            backend=self._backend(), recompute=call.weight,
        )  # fmt: skip
        return (y + call.bias if call.bias_after and call.bias is not None else y).to(call.dtype)

    def _updated(self, y: Tensor, x: Tensor) -> Tensor:
        """The output for x, where y is the output of the wrapped layer."""
        if x.is_nested:
            return on_rows(self._updated, y, x)
        x = x.to(y.device)  # accelerate's hooks may move the base layer's input
        if isinstance(self.layers[0], LoRALinear) and not self._has_dora():
            return lora_update_mixed(y, x, *self._paths(x), backend=self._backend())
        if self.samples is not None:
            return self._sample_by_sample(y, x)
        total = y
        for layer in self._enabled():
            # What DoRA adds depends on the base output, so it is computed from that and not from the sum.
            dora = layer.lora_magnitude is not None
            total = total + (layer._update(y, x) - y) if dora else layer._update(total, x)
        return total

    def _sample_by_sample(self, y: Tensor, x: Tensor) -> Tensor:
        """The samples of each adapter are gathered, computed, and put back in their places."""
        layers = self.layers
        places: dict[int | None, list[int]] = {}
        for at in range(x.shape[0]):
            index = next((i for first, end, i in self.runs if first <= at < end), None)
            disabled = index is None or layers[index].disabled
            places.setdefault(None if disabled else index, []).append(at)
        parts = []
        for index, own in places.items():
            chosen = torch.tensor(own, device=y.device)
            part = y.index_select(0, chosen)
            if index is not None:
                part = layers[index]._update(part, x.index_select(0, chosen))
            parts.append(part)
        order = [at for group in places.values() for at in group]
        back = sorted(range(len(order)), key=order.__getitem__)
        return torch.cat(parts).index_select(0, torch.tensor(back, device=y.device))

    def _paths(self, x: Tensor) -> tuple[list[LowRank], list[Segment]]:
        """The adapters that are not disabled, and their rows in x (..., K).

        Samples share one seed, because their rows differ; adapters that are summed have one each.
        """
        layers = self.layers
        lows: list[LowRank] = []
        index_of: dict[int, int] = {}
        seed: Tensor | None = None
        for index, layer in enumerate(layers):
            if layer.disabled:
                continue
            drops = layer.training and layer.dropout > 0
            if drops and (seed is None or self.samples is None):
                seed = layer._draw_seed(x)
            own = seed if drops else None
            index_of[index] = len(lows)
            a, b = layer.factors()
            lows.append(low_rank(a, b, layer.scaling, layer.dropout, own))
        rows = x.shape[:-1].numel()
        if self.samples is None:
            return lows, [Segment(0, rows, at) for at in range(len(lows))]
        rows //= len(self.samples)
        runs = [run for run in self.runs if run[2] in index_of]
        return lows, [Segment(a * rows, b * rows, index_of[i]) for a, b, i in runs]

    def _backend(self) -> str:
        """ "triton" if it is forced for any adapter, "torch" if it is for all, else "auto"."""
        wanted = {resolve(layer.backend) for layer in self._enabled()}
        return "triton" if "triton" in wanted else "torch" if wanted == {"torch"} else "auto"

    def _refuse_weight(self, more: str = "") -> NoReturn:
        raise ConfigError(
            f"weight of {self.path or 'the layer'}: inside use_adapters each sample has its own, but other code multiplies by one (as "
            f"nn.MultiheadAttention and, in eval mode, nn.TransformerEncoderLayer do){more}"
        )


def _child_name(adapter: str) -> str:
    """The name of an adapter's wrapper: a name of a module may have no dot, nor be that of an attribute."""
    return "adapter_" + adapter.replace("%", "%25").replace(".", "%2E")


def _note_reads(layers: Sequence[LoRALayer]) -> None:
    for layer in layers:
        if torch.compiler.is_compiling():
            note_compiled_read(layer.lora_A)
        else:
            layer._note_weight_read()


def _summed(layers: Sequence[Any], weight: Tensor) -> Tensor:
    """W + Σ ΔW, summed in float32 or wider and rounded once to the weight's dtype."""
    wide = torch.float32
    for layer in layers:
        wide = torch.promote_types(wide, layer._accumulate_dtype(weight))
    with no_autocast(weight):
        total = weight.to(wide)
        for layer in layers:
            total = total + layer.delta(wide)
        return total.to(weight.dtype)


def _summed_from(
    parts: Sequence[tuple[type[LoRALayer], dict[str, Any], tuple[str, ...]]],
    weight: Tensor,
    *tensors: Tensor | None,
) -> Tensor:
    """`_summed` of layers that had these classes, attributes, and parameters and buffers of these names."""
    given = iter(tensors)
    layers = [
        with_tensors(kind, attributes, {name: next(given) for name in names}, weight)
        for kind, attributes, names in parts
    ]
    return _summed(layers, weight)
