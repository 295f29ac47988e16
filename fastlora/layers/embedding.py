"""`LoRAEmbedding`: a frozen embedding with a trainable low-rank update."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastlora.layers.base import LoRALayer, Shape, wrapped_attribute
from fastlora.layers.nested import on_rows
from fastlora.layers.quantised import why_not_computable
from fastlora.layers.usage import note_compiled_call


class LoRAEmbedding(LoRALayer):
    """y = W[ids] + scaling · (Aᵀ[ids]) Bᵀ around an `nn.Embedding`.

    `lora_A` (rank, num_embeddings) is initialised to zero and `lora_B` (embedding_dim, rank) to normal values, as in PEFT and
    loralib. The row `padding_idx` gets no gradient. The wrapped layer is `original_layer`. Plain torch operations, on every device.

    Arguments as in `LoRALinear`. Indices have no dropout: `dropout` is set to 0.

    Raises: ConfigError for an invalid value, BackendError for backend="triton", InjectionError if the layer cannot be
    adapted: with max_norm, which changes the weight in every call, or a subclass with a custom forward.
    """

    wrapped_name = "original_layer"
    operations = "an embedding: two look-ups and a product of torch"
    kind = "embedding"
    has_dropout = False
    original_layer: nn.Embedding
    num_embeddings = wrapped_attribute("num_embeddings")
    embedding_dim = wrapped_attribute("embedding_dim")
    padding_idx = wrapped_attribute("padding_idx")

    @classmethod
    def why_unsuitable(cls, layer: object) -> str | None:
        kind = type(layer).__name__
        if not isinstance(layer, nn.Embedding):
            return f"expected an nn.Embedding, got {kind}"
        if type(layer).forward is not nn.Embedding.forward:
            return f"{kind} has a custom forward, which the update would not match"
        if layer.max_norm is not None:
            return f"{kind} has max_norm={layer.max_norm}, which changes the weight in every call"
        return why_not_computable(layer)

    @staticmethod
    def factor_shapes(original: nn.Module, rank: int) -> tuple[Shape, Shape]:
        assert isinstance(original, nn.Embedding)
        return (rank, original.num_embeddings), (original.embedding_dim, rank)

    def reset_lora_parameters(self) -> None:
        """Reset lora_A to zero and lora_B to normal values."""
        self.init_lora_weights = "kaiming"
        nn.init.zeros_(self.lora_A)
        nn.init.normal_(self.lora_B)

    def forward(self, input: Tensor) -> Tensor:
        """input: integers of any shape (...). Returns (..., embedding_dim)."""
        if torch.compiler.is_compiling():
            note_compiled_call(self.lora_A)
        else:
            self.usage.called = True
        embedding = self.original_layer
        y: Tensor = embedding(input)
        if self.disabled:
            return y
        ids = input.to(y.device)  # accelerate's hooks may move the base layer's input
        return on_rows(self._update, y, ids) if ids.is_nested else self._update(y, ids)

    def _update(self, y: Tensor, ids: Tensor) -> Tensor:
        """The layer's output for ids, where y is the output of the wrapped layer, on y's device."""
        embedding = self.original_layer
        a, b = (factor.to(y.dtype) for factor in self.factors_on(y.device))
        s = F.embedding(
            ids, a.T, embedding.padding_idx, scale_grad_by_freq=embedding.scale_grad_by_freq
        )
        return y + (self.scaling * (s @ b.T)).to(y.dtype)  # [..., R] @ [R, N] -> [..., N]

    def apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.embedding(x, weight)

    @property
    def terms(self) -> int:
        return 1

    def sample_input(self, rows: int, generator: torch.Generator) -> Tensor:
        return torch.randint(self.original_layer.num_embeddings, (rows,), generator=generator)

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        return (b @ a).T  # ([N, R] @ [R, V])ᵀ -> [V, N]
