"""The adapted layer class for each kind of module."""

from __future__ import annotations

from torch import nn

from fastlora.config import KINDS, LoRAConfig
from fastlora.layers.banks import ExpertBank
from fastlora.layers.base import LoRALayer
from fastlora.layers.conv import CONVOLUTIONS, LoRAConv
from fastlora.layers.embedding import LoRAEmbedding
from fastlora.layers.experts import LoRAExperts, LoRATransposedExperts
from fastlora.layers.linear import LoRALinear, LoRATransposedLinear
from fastlora.layers.plain import is_transposed_linear
from fastlora.layers.quantised import why_unreadable

# Transposed convolutions are included so that the error for a pattern that matches one names it.
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def kind_of(module: nn.Module) -> str | None:
    """The module's kind as in `LoRAConfig.kinds`, or None if it has none."""
    if isinstance(module, (nn.Linear, ExpertBank)) or is_transposed_linear(module):
        return "linear"
    if isinstance(module, (*CONVOLUTIONS, *_TRANSPOSED)):
        return "conv"
    return "embedding" if isinstance(module, nn.Embedding) else None


def why_unsuitable(module: object, config: LoRAConfig | None = None) -> str | None:
    """Why a module cannot be adapted, or None if it can. config: also check the module's own rank and settings."""
    if isinstance(module, LoRALayer):
        return f"already a {type(module).__name__}"
    kind = kind_of(module) if isinstance(module, nn.Module) else None
    if kind is None or not isinstance(module, nn.Module):
        return f"expected one of {', '.join(KINDS)}, got {type(module).__name__}"
    reason = layer_class(module).why_unsuitable(module)
    if reason is not None or config is None:
        return reason
    if config.use_dora or config.subtracts_init:
        reason = why_unreadable(module)
        if reason is not None:
            setting = "use_dora" if config.use_dora else "init_lora_weights"
            return f"{setting} reads the weight, but {reason}"
    if kind != "linear":
        only_linear = f"is for linear layers, not for a {type(module).__name__}"
        if config.use_dora:
            return f"use_dora {only_linear}"
        if config.subtracts_init or config.init_lora_weights == "orthogonal":
            return f"init_lora_weights={config.init_lora_weights!r} {only_linear}"
    of_weight = config.subtracts_init or config.init_lora_weights == "orthogonal"
    if isinstance(module, ExpertBank) and of_weight:
        return (
            f"init_lora_weights={config.init_lora_weights!r} is not supported for a bank of experts"
        )
    if kind == "conv" and config.rank % module.groups:  # type: ignore[operator]
        return f"rank {config.rank} is not a multiple of its groups={module.groups}"
    if kind == "linear" and config.subtracts_init:
        (_, k), (n, _) = layer_class(module).factor_shapes(module, 1)
        if config.rank > min(n, k):
            return f"init_lora_weights={config.init_lora_weights!r} needs a rank of at most {min(n, k)}, got {config.rank}"
    return None


def layer_class(
    module: nn.Module,
) -> type[LoRALinear] | type[LoRAExperts] | type[LoRAConv] | type[LoRAEmbedding]:
    """The class of the layer that wraps `module`, which must have a kind."""
    kind = kind_of(module)
    if kind == "conv":
        return LoRAConv
    if kind == "embedding":
        return LoRAEmbedding
    if isinstance(module, ExpertBank):
        return LoRATransposedExperts if module.transposed else LoRAExperts
    return LoRATransposedLinear if is_transposed_linear(module) else LoRALinear


def wrap(module: nn.Module, config: LoRAConfig) -> LoRALayer:
    """`module` wrapped in its layer class with its own `config`, in the default initialisation. Raises: as the layer's class."""
    return layer_class(module)(
        module,  # type: ignore[arg-type]
        config.rank,
        config.alpha,
        config.dropout,
        adapter_dtype=config.adapter_dtype,
        backend=config.backend,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
    )
