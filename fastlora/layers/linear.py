"""`LoRALinear`: a linear layer with a trainable low-rank update of its frozen weight."""

from __future__ import annotations

from dataclasses import replace
from inspect import Parameter, signature
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastlora.layers.base import Shape, wrapped_attribute
from fastlora.layers.dora import DoRALayer
from fastlora.layers.nested import on_rows
from fastlora.layers.offload import loaded
from fastlora.layers.plain import attribute, has_hooks, is_plain, is_transposed_linear
from fastlora.layers.quantised import quantisation, why_not_computable
from fastlora.layers.transient import note_compute_dtype, stand_ins, transient, why_own_product_of
from fastlora.layers.usage import note_compiled_call
from fastlora.ops.dispatch import Choice, choose, resolve
from fastlora.ops.dropout import dropout_threshold
from fastlora.ops.linear import autocast, autocasts, lora_linear, lora_update, no_autocast

_NORM_ROWS = 1024


class LoRALinear(DoRALayer):
    """y = x Wᵀ + bias + scaling · (dropout(x) Aᵀ) Bᵀ around an `nn.Linear` or a subclass of it.

    The wrapped layer is kept as `original_linear`; its weight is shared and never changed. `lora_A` (rank, in_features)
    is initialised Kaiming-uniform and `lora_B` (out_features, rank) to zero, so a new layer computes what the wrapped one does.

    The input is a tensor (..., in_features), or a token object with `.feats` (T, in_features) and `.replace(feats)`
    (such as SAM 3D's SparseTensor); the output is of the same type.

    A weight quantised by bitsandbytes or torchao is dequantised for each pass, if its package multiplies by the dequantised weight too.
    The wrapped layer is called, and the low-rank product added to its output, for other quantised weights, and if it has hooks, or a
    custom forward and a plain tensor as input. On a token object a custom forward is assumed to be F.linear on `.feats`.
    `fastlora.explain(layer, x)` shows which of these runs.

    original_linear: the layer to adapt; its weight (out_features, in_features) is floating-point or quantised.
    rank: 1 or more.
    alpha: the update is scaled by alpha / rank, or by alpha / √rank if use_rslora (rank-stabilised LoRA).
    dropout: probability in [0, 1) on the input of the LoRA path, in training mode only; quantised to multiples of 2⁻¹⁶.
    adapter_dtype: dtype of lora_A and lora_B, which are cast to the input's dtype in the computation. None: the weight's dtype, but
        float32 for 16 bits or fewer, in which small updates vanish.
    backend: "auto", "torch" or "triton".
    use_dora: weight-decomposed LoRA. `lora_magnitude` (out_features,) is initialised to the norms of the rows of W, and the layer
        computes y = g ∘ (x Wᵀ + scaling · (dropout(x) Aᵀ) Bᵀ) + bias with g = lora_magnitude / ‖W + scaling · B A‖ by rows; the
        norms are constants in the backward pass. Unlike in PEFT, dropout does not affect the product with W.

    Source: rsLoRA, arXiv 2312.03732. DoRA, arXiv 2402.09353, section 4.3 for the constant norms.

    Raises: ConfigError for an invalid value, InjectionError if the layer cannot be adapted.
    """

    wrapped_name = "original_linear"
    kind = "linear"
    has_kernels = True
    original_linear: nn.Linear
    in_features = wrapped_attribute("in_features")
    out_features = wrapped_attribute("out_features")
    input_name: str = "input"  # what the wrapped layer's forward calls its input
    group: Any = None  # set by `fastlora.fuse`: the layers that share this one's input

    def __init__(
        self,
        original_linear: nn.Linear,
        rank: int = 4,
        alpha: float = 8.0,
        dropout: float = 0.0,
        *,
        adapter_dtype: torch.dtype | None = None,
        backend: str = "auto",
        use_rslora: bool = False,
        use_dora: bool = False,
    ) -> None:
        super().__init__(
            original_linear,
            rank,
            alpha,
            dropout,
            adapter_dtype=adapter_dtype,
            backend=backend,
            use_rslora=use_rslora,
            use_dora=use_dora,
        )
        first = next(iter(signature(original_linear.forward).parameters.values()), None)
        if first is not None and first.kind is Parameter.POSITIONAL_OR_KEYWORD:
            self.input_name = first.name
        if use_dora:
            self.lora_magnitude = nn.Parameter(self._row_norms().to(self.lora_A.dtype))

    @classmethod
    def why_unsuitable(cls, layer: object) -> str | None:
        kind = type(layer).__name__
        if not isinstance(layer, nn.Linear):
            return f"expected an nn.Linear or a subclass, got {kind}"
        weight = layer.weight
        if isinstance(weight, nn.parameter.UninitializedParameter):
            return f"{kind} has no weight yet (lazy): run one forward pass first"
        reason = why_not_computable(layer)
        if reason is not None or quantisation(layer) is not None:
            return reason
        if weight.shape != (layer.out_features, layer.in_features):
            expected = (layer.out_features, layer.in_features)
            return f"{kind} holds a weight of shape {tuple(weight.shape)}, expected {expected}"
        return None

    @staticmethod
    def factor_shapes(original: nn.Module, rank: int) -> tuple[Shape, Shape]:
        linear = cast(nn.Linear, original)
        return (rank, linear.in_features), (linear.out_features, rank)

    @property
    def matrix(self) -> Tensor:
        """The wrapped weight as (out_features, in_features)."""
        return self._as_weight_layout(self.original_linear.weight)

    def dequantised_matrix(self) -> Tensor:
        """The wrapped weight as (out_features, in_features), in floating point even if it is quantised."""
        return self._as_weight_layout(self.wrapped_weight())

    def forward(self, input: Any = None, *args: Any, **kwargs: Any) -> Any:
        """input: a tensor (..., in_features), or a token object with `.feats` and `.replace`. Returns the same type.

        args, kwargs: passed on to the custom forward of the wrapped layer. The input may have its name there.

        Raises: TypeError for an input of another type or without either name.
        """
        if torch.compiler.is_compiling():
            note_compiled_call(self.lora_A)
        else:
            self.usage.called = True
        if args or kwargs:
            if input is None and not args:
                input, kwargs = self._input_by_name(kwargs)
            if args or kwargs:
                return self._forward_custom(input, args, kwargs)
        if isinstance(input, Tensor):
            return self.original_linear(input) if self.disabled else self._forward_tensor(input)
        if not (hasattr(input, "feats") and hasattr(input, "replace")):
            raise TypeError(
                "input: expected a tensor or an object with .feats and .replace, "
                f"got {type(input).__name__}"
            )
        plain_class = type(self.original_linear).forward is nn.Linear.forward
        hooked = plain_class and has_hooks(self.original_linear)
        if hooked or quantisation(self.original_linear) is not None:
            x = input.feats
            return input.replace(
                self.original_linear(x) if self.disabled else self._forward_tensor(x)
            )
        if self.disabled:
            if self._is_plain():
                return input.replace(self.original_linear(input.feats))
            return self.original_linear(input)
        if has_hooks(self.original_linear):
            base = self.original_linear(input)
            return base.replace(self._update(base.feats, input.feats))
        return input.replace(self._fused(input.feats))

    def choose(self, x: Tensor) -> Choice:
        if self.disabled:
            return super().choose(x)
        dropout = self.training and dropout_threshold(self.dropout) > 0
        package = quantisation(self.original_linear)
        if package is not None and (own := self._why_own_product(x)) is not None:
            reason = f"the weight is quantised by {package}, which computes the product: {own}"
            return replace(self._choose(x, dropout), reason=reason)
        if package is not None:
            x, weight = stand_ins(self.original_linear, x)
            choice = self._choose(x, dropout, weight)
            reason = f"the weight is dequantised by {package} for each pass; {choice.reason}"
        else:
            choice = self._choose(autocast(x) if autocasts(x) else x, dropout)
            reason = choice.reason
        if self.lora_magnitude is not None:
            reason += "; DoRA scales the output in a separate pass"
        elif self.group is not None and (choice.backend, choice.plan) == ("torch", "in_place"):
            reason += f"; fused in a group of {len(self.group.layers)} layers with the same input"
        return replace(choice, reason=reason)

    def apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self._as_weight_layout(weight), bias)

    def sample_input(self, rows: int, generator: torch.Generator) -> Tensor:
        return torch.randn(rows, self.in_features, generator=generator)

    def extra_repr(self) -> str:
        features, rest = f"{self.in_features}, {self.out_features}", super().extra_repr()
        return f"{features}, {rest}, bias={self.bias is not None}, backend={self.backend}"

    def _forward_tensor(self, x: Tensor) -> Tensor:
        if self._is_plain():
            return on_rows(lambda rows: self._fused(rows, x), x) if x.is_nested else self._fused(x)
        if quantisation(self.original_linear) is not None and self._why_own_product(x) is None:
            dequantised = self._with_dequantised
            return on_rows(dequantised, x) if x.is_nested else dequantised(x)
        self._choose(x, False)  # raises if a backend is forced
        y = self.original_linear(x)
        return on_rows(self._update, y, x) if x.is_nested else self._update(y, x)

    def _input_by_name(self, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The input, given under the name of the wrapped layer's forward, and the other arguments."""
        if self.input_name not in given:
            names = " or ".join(dict.fromkeys(("input", self.input_name)))
            raise TypeError(f"forward: expected the argument {names}, got {', '.join(given)}")
        others = {name: value for name, value in given.items() if name != self.input_name}
        return given[self.input_name], others

    def _forward_custom(self, input: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """forward with more arguments, which only the wrapped layer understands."""
        y = self.original_linear(input, *args, **kwargs)
        if self.disabled:
            return y
        if isinstance(input, Tensor) and isinstance(y, Tensor):
            return on_rows(self._update, y, input) if input.is_nested else self._update(y, input)
        if hasattr(input, "feats") and hasattr(y, "feats") and hasattr(y, "replace"):
            return y.replace(self._update(y.feats, input.feats))
        raise TypeError(
            f"{type(self.original_linear).__name__}: expected its output to be of the input's type, "
            f"{type(input).__name__}, got {type(y).__name__}"
        )

    def _fused(self, x: Tensor, nested: Tensor | None = None) -> Tensor:
        """The layer's output for x. nested: the nested tensor whose rows are x."""
        if self.group is not None and not torch.compiler.is_compiling():
            shared: Tensor | None = self.group.output(self, x, x if nested is None else nested)
            if shared is not None:
                return shared
        linear = self.wrapped
        bias = attribute(linear, "bias")
        dora = self._parameters["lora_magnitude"] is not None
        y = lora_linear(
            x,
            self._as_weight_layout(attribute(linear, "weight")),
            None if dora else bias,
            *self.factors(),
            self.scaling,
            self.dropout,
            self._draw_seed(x),
            backend=self.backend,
        )
        return self._scaled(y, bias) if dora else y

    def _with_dequantised(self, x: Tensor) -> Tensor:
        """The layer's output for x. The weight is dequantised for this pass, and again for the backward pass."""
        linear = self.original_linear
        note_compute_dtype(linear, x)
        call, dora = transient(linear, x), self.lora_magnitude is not None
        y = lora_linear(
            call.x,
            call.weight(),
            None if dora or call.bias_after else call.bias,
            *self.factors(),
            self.scaling,
            self.dropout,
            self._draw_seed(x),
            backend=self.backend,
            recompute=call.weight,
        )
        if dora:
            y = self._scaled(y, call.bias)
        elif call.bias_after:
            y = y + cast(Tensor, call.bias)
        return y.to(call.dtype)

    def _why_own_product(self, x: Tensor) -> str | None:
        """Why the package of a quantised layer computes the product with x, or None if the weight is dequantised."""
        return why_own_product_of(self.original_linear, x, resolve(self.backend) == "triton")

    def _scaled(self, y: Tensor, bias: Tensor | None) -> Tensor:
        """DoRA's output for the output y without its scale and bias."""
        scale = self._dora_scale().to(y.dtype)
        return y * scale if bias is None else torch.addcmul(bias.to(y.dtype), y, scale)

    def _update(self, y: Tensor, x: Tensor) -> Tensor:
        """The layer's output for x, where y is the output of the wrapped layer."""
        if self.lora_magnitude is None:
            return self._add_product(y, x)
        scale = self._dora_scale().to(y.dtype)
        if self.original_linear.bias is None:
            return scale * self._add_product(y, x)
        bias = loaded(self.original_linear, "bias").to(y.dtype)
        return torch.addcmul(bias, self._add_product(y - bias, x), scale)

    def _add_product(self, y: Tensor, x: Tensor) -> Tensor:
        x = x.to(y.device)  # accelerate's hooks may move the base layer's input
        return lora_update(y, x, *self.factors(), self.scaling, self.dropout, self._draw_seed(x))

    @torch.no_grad()
    def _row_norms(self) -> Tensor:
        """‖W + scaling · B A‖ of each of the N rows, of a block of rows at a time.

        The squared norm expanded into products with A and B would be no cheaper, and cancels where the update cancels W.
        """
        weight = self.dequantised_matrix().detach()
        wide = self._accumulate_dtype(weight)
        a, b = (factor.detach().to(wide) for factor in self.factors_on(weight.device))
        norms = []
        with no_autocast(weight):
            for w, rows in zip(
                torch.split(weight, _NORM_ROWS), torch.split(b, _NORM_ROWS), strict=True
            ):
                # [rows, K] + [rows, R] @ [R, K]
                block = torch.addmm(w.to(wide), rows, a, alpha=self.scaling)
                norms.append(torch.linalg.vector_norm(block, dim=1))
        return torch.cat(norms).clamp_(min=torch.finfo(wide).tiny ** 0.5)

    def _as_weight_layout(self, matrix: Tensor) -> Tensor:
        """Convert a matrix from the stored orientation to (N, K), or back."""
        return matrix

    def _stored_factors(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The factors whose product is B A in the stored orientation."""
        return b, a  # [N, R] @ [R, K] -> [N, K]

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        left, right = self._stored_factors(a, b)
        return left @ right

    def _choose(self, x: Tensor, dropout: bool, dequantised: Tensor | None = None) -> Choice:
        return choose(
            x,
            self.matrix if dequantised is None else dequantised,
            self.factors()[0].shape[0],
            dropout=dropout,
            plain_base=dequantised is not None or self._is_plain(),
            backend=self.backend,
        )

    def _is_plain(self) -> bool:
        return is_plain(self.wrapped)

    def _merged_weight(self, weight: Tensor) -> Tensor:
        if self.lora_magnitude is not None:
            return super()._merged_weight(weight)
        wide = self._accumulate_dtype(weight)
        a, b = (factor.to(wide) for factor in self.factors_on(weight.device))
        left, right = self._stored_factors(a, b)
        return torch.addmm(weight.to(wide), left, right, alpha=self.scaling)


class LoRATransposedLinear(LoRALinear):
    """`LoRALinear` around Hugging Face's `Conv1D` (GPT-2), whose weight is stored as (in_features, out_features).

    The products read its transpose as a view, so nothing is copied. `weight` and the merged layer keep the stored
    orientation. Arguments as in `LoRALinear`.
    """

    kind = "transposed"
    in_features = property(lambda layer: layer.wrapped.weight.shape[0])
    out_features = property(lambda layer: layer.wrapped.weight.shape[1])

    @classmethod
    def why_unsuitable(cls, layer: object) -> str | None:
        kind = type(layer).__name__
        if not is_transposed_linear(layer):
            return f"expected transformers' Conv1D or a subclass, got {kind}"
        if quantisation(layer) is not None:
            dtype = cast(Tensor, layer.weight).dtype
            return f"{kind} holds a quantised {dtype} weight, which is not supported for this layer"
        return why_not_computable(layer)

    @staticmethod
    def factor_shapes(original: nn.Module, rank: int) -> tuple[Shape, Shape]:
        k, n = cast(Tensor, original.weight).shape
        return (rank, k), (n, rank)

    def _as_weight_layout(self, matrix: Tensor) -> Tensor:
        return matrix.T

    def _stored_factors(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a.T, b.T  # [K, R] @ [R, N] -> [K, N]
