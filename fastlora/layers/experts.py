"""`LoRAExperts`: a frozen bank of experts with a trainable low-rank update of each."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastlora.layers.banks import ExpertBank
from fastlora.layers.base import Shape
from fastlora.layers.dora import DoRALayer
from fastlora.layers.plain import attribute
from fastlora.layers.quantised import quantisation, why_not_computable
from fastlora.layers.usage import note_compiled_call
from fastlora.ops.dispatch import Choice, choose_experts
from fastlora.ops.experts import lora_experts
from fastlora.ops.linear import autocast, autocasts, no_autocast


class LoRAExperts(DoRALayer):
    """y = x W_gᵀ + scaling · (dropout(x) A_gᵀ) B_gᵀ for the rows of each expert g, around an `ExpertBank`.

    `lora_A` (G, rank, K) and `lora_B` (G, N, rank) whichever way the weight is stored, initialised for each expert as in `LoRALinear`. ΔW exists
    only in `weight` and while merging. The wrapped bank is `original_layer`; the biases of the experts stay with their module, which adds them.

    Arguments as in `LoRALinear`. use_dora: `lora_magnitude` (G, N) holds the norms of the rows of each expert's W.

    Raises: ConfigError for an invalid value, InjectionError if the bank cannot be adapted.
    """

    wrapped_name = "original_layer"
    kind = "experts"
    has_kernels = True
    original_layer: ExpertBank
    num_experts = property(lambda layer: layer.wrapped.matrices.shape[0])
    in_features = property(lambda layer: layer.wrapped.matrices.shape[2])
    out_features = property(lambda layer: layer.wrapped.matrices.shape[1])
    bias = None

    def __init__(self, original_layer: ExpertBank, *args: Any, **kwargs: Any) -> None:
        super().__init__(original_layer, *args, **kwargs)
        if kwargs.get("use_dora"):
            self.lora_magnitude = nn.Parameter(self._row_norms().to(self.lora_A.dtype))

    @classmethod
    def why_unsuitable(cls, layer: object) -> str | None:
        if not isinstance(layer, ExpertBank):
            return f"expected an ExpertBank, got {type(layer).__name__}"
        package = quantisation(layer)
        if package is not None:
            return f"its weight is quantised by {package}, which is not supported for a bank of experts"
        return why_not_computable(layer)

    @staticmethod
    def factor_shapes(original: nn.Module, rank: int) -> tuple[Shape, Shape]:
        groups, n, k = cast(ExpertBank, original).matrices.shape
        return (groups, rank, k), (groups, n, rank)

    def reset_lora_parameters(self) -> None:
        """Reset the factors of each expert as `LoRALinear` does."""
        self.initial_A = self.initial_B = None
        self.init_lora_weights = "kaiming"
        bound = 1 / math.sqrt(self.in_features)  # of one expert; torch would count all dimensions
        nn.init.uniform_(self.lora_A, -bound, bound)
        nn.init.zeros_(self.lora_B)
        if self.lora_magnitude is not None:
            self.reset_magnitude()

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """x: (M, K), sorted by expert. offsets: (G + 1,) int32 on x's device; rows offsets[g] … offsets[g + 1] − 1 belong to expert g.

        Returns y (M, N). Rows from offsets[G] on belong to no expert; they are zero.

        Raises: ConfigError if shapes, dtypes or devices do not fit; BackendError if a forced backend cannot run.
        """
        if torch.compiler.is_compiling():
            note_compiled_call(self.lora_A)
        else:
            self.usage.called = True
        if self.disabled:
            return cast(Tensor, self.original_layer(x, offsets))
        y = lora_experts(
            x,
            self._matrices(),
            *self.factors(),
            offsets,
            self.scaling,
            self.dropout,
            self._draw_seed(x),
            backend=self.backend,
        )
        return y if self.lora_magnitude is None else self._scaled(y, offsets)

    def choose(self, x: Tensor) -> Choice:
        if self.disabled:
            return super().choose(x)
        choice = choose_experts(
            autocast(x) if autocasts(x) else x,
            self.rank,
            weight=self._matrices(),
            backend=self.backend,
        )
        if self.lora_magnitude is None:
            return choice
        return replace(choice, reason=f"{choice.reason}; DoRA scales the output in a separate pass")

    def apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x: (G · M, K), M rows for each expert. Returns (G · M, N)."""
        rows = x.view(self.num_experts, -1, x.shape[1])
        return (rows @ self._as_weight_layout(weight).mT).flatten(0, 1)  # [G, M, K] @ [G, K, N]

    def sample_input(self, rows: int, generator: torch.Generator) -> Tensor:
        """(G · rows, K), `rows` for each expert."""
        return torch.randn(self.num_experts * rows, self.in_features, generator=generator)

    @property
    def terms(self) -> int:
        return int(self.in_features)

    def sample_rest(self, x: Tensor) -> tuple[Any, ...]:
        """The offsets of equally many rows for each expert."""
        size = x.shape[0] // self.num_experts
        return (torch.arange(0, x.shape[0] + 1, size, dtype=torch.int32, device=x.device),)

    def extra_repr(self) -> str:
        sizes = f"{self.num_experts} × ({self.in_features}, {self.out_features})"
        return f"{sizes}, {super().extra_repr()}, backend={self.backend}"

    def _matrices(self) -> Tensor:
        weight: Tensor = attribute(self.wrapped, "weight")
        return self._as_weight_layout(weight)

    def _as_weight_layout(self, matrices: Tensor) -> Tensor:
        return matrices.mT if self.original_layer.transposed else matrices

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        return self._as_weight_layout(b @ a)  # [G, N, R] @ [G, R, K] -> [G, N, K]

    def _scaled(self, y: Tensor, offsets: Tensor) -> Tensor:
        """DoRA's output for the output y (M, N) without its scale."""
        rows = torch.arange(y.shape[0], device=y.device, dtype=offsets.dtype)
        expert = torch.searchsorted(offsets[1:], rows, right=True)
        scale = self._dora_scale().to(y.dtype)  # [G, N]
        return y * scale[expert.clamp(max=scale.shape[0] - 1)]

    @torch.no_grad()
    def _row_norms(self) -> Tensor:
        """‖W_g + scaling · B_g A_g‖ of each of the N rows of each expert, (G, N), of one expert at a time."""
        weight = self._matrices().detach()
        wide = self._accumulate_dtype(weight)
        a, b = (factor.detach() for factor in self.factors_on(weight.device))
        norms = []
        with no_autocast(weight):
            for w, a_g, b_g in zip(weight, a, b, strict=True):
                merged = torch.addmm(w.to(wide), b_g.to(wide), a_g.to(wide), alpha=self.scaling)
                norms.append(torch.linalg.vector_norm(merged, dim=1))
        return torch.stack(norms).clamp_(min=torch.finfo(wide).tiny ** 0.5)


class LoRATransposedExperts(LoRAExperts):
    """`LoRAExperts` around a bank whose weight is stored as (G, K, N), as those of gpt-oss; its transpose is read as a view."""

    kind = "transposed_experts"
