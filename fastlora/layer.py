"""`LoRALinear`: a linear layer with a trainable low-rank update beside its frozen weight."""

from __future__ import annotations

import copy
import math
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastlora import ops, reference
from fastlora.dispatch import BACKENDS, Choice, choose
from fastlora.errors import ConfigError, InjectionError, MergeError


class LoRALinear(nn.Module):
    """y = x Wᵀ + bias + scaling · (dropout(x) Aᵀ) Bᵀ around an `nn.Linear` or a subclass of it.

    The wrapped layer is kept as `original_linear`, its weight shared and never changed. `lora_A` (rank, in_features)
    starts Kaiming-uniform and `lora_B` (out_features, rank) at zero, so a new layer computes what the wrapped one does.

    The input may be a tensor (..., in_features), or a token object with `.feats` (T, in_features) and `.replace(feats)`
    (as SAM 3D's SparseTensor); what comes back is of the same kind.

    A subclass with a forward of its own is trusted to be F.linear on `.feats` when it is given a token object. On a
    plain tensor, and wherever the wrapped layer has forward or backward hooks, it is called as it is and the low-rank
    product is added to its output. `fastlora.explain(layer, x)` says which of these runs.

    original_linear: the layer to adapt; its weight must be a floating-point (out_features, in_features).
    rank: 1 or more. alpha: the update is scaled by alpha / rank, or by alpha / √rank
    if use_rslora (rank-stabilised LoRA). dropout: probability in [0, 1) on the LoRA path's input,
    in training mode only; quantised to multiples of 2⁻¹⁶.
    adapter_dtype: dtype of lora_A and lora_B. None takes the weight's, but float32 for a 16-bit weight, because small
    updates vanish in 16 bits. They are cast to the input's dtype in the computation.
    backend: "auto", "torch" or "triton".

    Source: rsLoRA, arXiv 2312.03732.

    Raises: ConfigError for a value that cannot work, InjectionError if the layer cannot be adapted.
    """

    disabled: bool = False  # set by `fastlora.disable_adapter` for as long as it lasts

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
    ) -> None:
        super().__init__()
        check_hyperparameters(rank, alpha, dropout)
        if not isinstance(use_rslora, bool):
            raise ConfigError(f"use_rslora: expected True or False, got {use_rslora!r}")
        if backend not in BACKENDS:
            raise ConfigError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
        reason = why_unsuitable(original_linear)
        if reason is not None:
            raise InjectionError(f"original_linear: {reason}")
        weight = original_linear.weight
        if adapter_dtype is None:
            adapter_dtype = torch.promote_types(weight.dtype, torch.float32)
        if not adapter_dtype.is_floating_point:
            raise ConfigError(f"adapter_dtype: expected a float dtype, got {adapter_dtype}")
        self.original_linear = original_linear
        self.rank = rank
        self.alpha = float(alpha)
        self.dropout = float(dropout)
        self.backend = backend
        self.use_rslora = use_rslora
        self.lora_A = nn.Parameter(
            torch.empty(rank, self.in_features, dtype=adapter_dtype, device=weight.device)
        )
        self.lora_B = nn.Parameter(
            torch.empty(self.out_features, rank, dtype=adapter_dtype, device=weight.device)
        )
        self.reset_lora_parameters()
        self.train(original_linear.training)

    def reset_lora_parameters(self) -> None:
        """Make lora_A Kaiming-uniform (as `nn.Linear` does its weight) and lora_B zero."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    @property
    def in_features(self) -> int:
        """K, the size of the input's last dimension."""
        return self.original_linear.in_features

    @property
    def out_features(self) -> int:
        """N, the size of the output's last dimension."""
        return self.original_linear.out_features

    @property
    def scaling(self) -> float:
        """The applied factor: alpha / rank, or alpha / √rank under rsLoRA."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    @property
    def weight(self) -> Tensor:
        """W + scaling · B A, (out_features, in_features), computed anew at each access.

        Summed in float32 or wider and rounded once to the weight's dtype. Differentiable, so code that reads `.weight`
        and multiplies by itself (`nn.MultiheadAttention` does) still sees and trains the adapter, without dropout.
        W itself while the adapter is disabled.
        """
        if self.disabled:
            return self.original_linear.weight
        return self._merged_weight().to(self.original_linear.weight.dtype)

    @property
    def bias(self) -> nn.Parameter | None:
        """The wrapped layer's bias, (out_features,) or None."""
        return self.original_linear.bias

    def forward(self, input: Any) -> Any:
        """input: a tensor (..., in_features), or a token object with `.feats` and `.replace`. Gives back the same kind."""
        if isinstance(input, Tensor):
            return self.original_linear(input) if self.disabled else self._forward_tensor(input)
        if not (hasattr(input, "feats") and hasattr(input, "replace")):
            raise TypeError(
                "input: expected a tensor or an object with .feats and .replace, "
                f"got {type(input).__name__}"
            )
        if self.disabled:
            if self._is_plain():
                return input.replace(self.original_linear(input.feats))
            return self.original_linear(input)
        if self._has_hooks():
            base = self.original_linear(input)
            return base.replace(self._update(base.feats, input.feats))
        return input.replace(self._fused(input.feats))

    def choose(self, x: Tensor) -> Choice:
        """The backend and plan that a call with the tensor `x` takes, and the reason."""
        if self.disabled:
            return Choice("torch", "base", "the adapter is disabled; the wrapped layer alone runs")
        dropout = self.training and reference.dropout_threshold(self.dropout) > 0
        return self._choose(ops.autocast(x) if ops.autocasts(x) else x, dropout)

    def merge_weights(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A fresh layer of the wrapped class whose weight is W + scaling · B A; this layer is left as it is.

        dtype: dtype of the merged weight; None keeps the wrapped weight's. The sum is made in float32 or wider and rounded
        once. Device, bias (a copy), training mode and requires_grad are kept.

        Raises: MergeError if the wrapped weight is parametrised (the parametrisation would be lost) or the adapter is disabled.
        """
        reason = self.why_unmergeable()
        if reason is not None:
            raise MergeError(f"cannot merge: {reason}")
        original = self.original_linear.weight
        with torch.no_grad():
            merged = self._merged_weight().to(dtype or original.dtype)
        parameter = nn.Parameter(merged, requires_grad=original.requires_grad)
        # Telling deepcopy that the weight is already copied builds the new layer without a second copy of it.
        fresh: nn.Linear = copy.deepcopy(self.original_linear, {id(original): parameter})
        return fresh

    def why_unmergeable(self) -> str | None:
        """Why folding the update into the wrapped weight would be wrong, or None if it would not."""
        if self.disabled:
            return "the adapter is disabled; merge outside of disable_adapter"
        if parametrize.is_parametrized(self.original_linear, "weight"):
            return "the weight is parametrised; remove the parametrisation first"
        if "weight" not in self.original_linear._parameters:
            return "the weight is computed by a hook, not a parameter"
        return None

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, r={self.rank}, alpha={self.alpha:g}, "
            f"dropout={self.dropout:g}, bias={self.bias is not None}, backend={self.backend}"
            + (", use_rslora=True" if self.use_rslora else "")
            + (", disabled" if self.disabled else "")
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        # A copy made inside disable_adapter would never be enabled again.
        self.__dict__.pop("disabled", None)

    def _forward_tensor(self, x: Tensor) -> Tensor:
        if self._is_plain():
            return self._fused(x)
        self._choose(x, False)  # raises if a backend is forced
        return self._update(self.original_linear(x), x)

    def _fused(self, x: Tensor) -> Tensor:
        base = self.original_linear
        return ops.lora_linear(
            x,
            base.weight,
            base.bias,
            self.lora_A,
            self.lora_B,
            self.scaling,
            self.dropout,
            self._draw_seed(x),
            backend=self.backend,
        )

    def _update(self, y: Tensor, x: Tensor) -> Tensor:
        return ops.lora_update(
            y, x, self.lora_A, self.lora_B, self.scaling, self.dropout, self._draw_seed(x)
        )

    def _draw_seed(self, x: Tensor) -> Tensor | None:
        # From torch's generator, outside the op: checkpointing, `torch.manual_seed` and compiled graphs all see it.
        if not self.training or self.dropout == 0.0:
            return None
        return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=x.device)

    def _choose(self, x: Tensor, dropout: bool) -> Choice:
        return choose(
            x,
            self.original_linear.weight,
            self.rank,
            dropout=dropout,
            plain_base=self._is_plain(),
            backend=self.backend,
        )

    def _is_plain(self) -> bool:
        return is_plain(self.original_linear)

    def _has_hooks(self) -> bool:
        return has_hooks(self.original_linear)

    def _merged_weight(self) -> Tensor:
        weight = self.original_linear.weight
        wide = torch.promote_types(
            torch.promote_types(weight.dtype, self.lora_A.dtype), torch.float32
        )
        return torch.addmm(
            weight.to(wide), self.lora_B.to(wide), self.lora_A.to(wide), alpha=self.scaling
        )


def is_plain(linear: nn.Linear) -> bool:
    """Whether calling the layer is `F.linear` and nothing else."""
    return type(linear).forward is nn.Linear.forward and not has_hooks(linear)


def has_hooks(linear: nn.Linear) -> bool:
    """Whether the layer has forward or backward hooks of its own."""
    return bool(
        linear._forward_hooks
        or linear._forward_pre_hooks
        or linear._backward_hooks
        or linear._backward_pre_hooks
    )


def check_hyperparameters(rank: int, alpha: float, dropout: float) -> None:
    """Raises: ConfigError that names the argument, what was expected and what came."""
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ConfigError(f"rank: expected an integer ≥ 1, got {rank!r}")
    if (
        isinstance(alpha, bool)
        or not isinstance(alpha, (int, float))
        or not abs(alpha) <= sys.float_info.max
    ):
        raise ConfigError(f"alpha: expected a finite number, got {alpha!r}")
    if (
        isinstance(dropout, bool)
        or not isinstance(dropout, (int, float))
        or not 0.0 <= dropout < 1.0
    ):
        raise ConfigError(f"dropout: expected a probability with 0 ≤ p < 1, got {dropout!r}")


def why_unsuitable(linear: object) -> str | None:
    """Why a layer cannot be wrapped, or None if it can."""
    kind = type(linear).__name__
    if isinstance(linear, LoRALinear):
        return "already a LoRALinear"
    if not isinstance(linear, nn.Linear):
        return f"expected an nn.Linear or a subclass, got {kind}"
    weight = linear.weight
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return f"{kind} has no weight yet (lazy): run one forward pass first"
    if not weight.dtype.is_floating_point:
        return f"{kind} holds a {weight.dtype} weight; quantised bases are not supported"
    if weight.shape != (linear.out_features, linear.in_features):
        expected = (linear.out_features, linear.in_features)
        return f"{kind} holds a weight of shape {tuple(weight.shape)}, expected {expected}"
    return None
