"""`DoRALayer`: what layers with DoRA have in common."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from fastlora.layers.base import LoRALayer


class DoRALayer(LoRALayer):
    """A layer whose output, without the bias, DoRA scales by g = lora_magnitude / ‖W + scaling · B A‖ by rows of W."""

    def reset_lora_parameters(self) -> None:
        super().reset_lora_parameters()
        if self.lora_magnitude is not None:
            self.reset_magnitude()

    def scales_nothing(self) -> bool:
        """Whether DoRA's magnitudes equal the current norms of the rows, so that g is 1."""
        magnitude = self.lora_magnitude
        if magnitude is None or magnitude.is_meta:
            return False
        return torch.equal(magnitude, self._row_norms().to(magnitude.dtype))

    @torch.no_grad()
    def reset_magnitude(self) -> None:
        """Set DoRA's magnitudes to the current norms of the rows."""
        assert self.lora_magnitude is not None
        self.lora_magnitude.copy_(self._row_norms())

    def delta(self, dtype: torch.dtype, *, magnitude: bool = False) -> Tensor:
        update = super().delta(dtype, magnitude=magnitude)
        if self.lora_magnitude is None:
            return update
        weight = self.wrapped_weight().to(dtype)
        scale = self._as_weight_layout(self._dora_scale().to(dtype)[..., None])
        if magnitude:
            return (scale - 1).abs() * weight.abs() + scale.abs() * update
        return (scale - 1) * weight + scale * update

    @abstractmethod
    def _row_norms(self) -> Tensor:
        """The norms of the rows, in the shape of `lora_magnitude`, in float32 or wider."""

    @abstractmethod
    def _as_weight_layout(self, matrix: Tensor) -> Tensor:
        """Convert a matrix from the stored orientation to (…, N, K), or back."""

    def _dora_scale(self) -> Tensor:
        """g, in float32 or wider."""
        assert self.lora_magnitude is not None
        norms = self._row_norms()
        return self.lora_magnitude.to(norms.dtype) / norms

    def _draw_seed(self, x: Tensor) -> Tensor | None:
        # Drawn by torch's generator outside the operator, so `torch.manual_seed`, recomputation and compiled graphs apply to it.
        if not self.training or self.dropout == 0.0:
            return None
        return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=x.device)
