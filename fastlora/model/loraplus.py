"""LoRA+: a higher learning rate for lora_B than for lora_A."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from fastlora.errors import ConfigError, InjectionError
from fastlora.layers.base import named_lora_layers
from fastlora.layers.embedding import LoRAEmbedding


def loraplus_groups(
    model: nn.Module, lr: float, lr_ratio: float = 16.0, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameter groups for any torch optimizer: lora_B with lr · lr_ratio, all other trainable parameters with lr.

    Both factors of an embedding, whose lora_A is initialised to zero instead of lora_B, have lr.

    lr: above 0; lower than for plain LoRA.
    lr_ratio: 1 or more; about 16 in the paper.
    weight_decay: of both groups.

    Source: LoRA+, arXiv 2402.12354.

    Raises: ConfigError for an invalid value, InjectionError if no lora_B trains.
    """
    for name, value, least in (("lr", lr, 0.0), ("lr_ratio", lr_ratio, 1.0)):
        number = isinstance(value, (int, float)) and math.isfinite(value)
        if not number or value < least or not value:
            bound = "above 0" if least == 0 else f"≥ {least:g}"
            raise ConfigError(f"{name}: expected a finite number {bound}, got {value!r}")
    fast = {
        id(layer.lora_B): layer.lora_B
        for _, layer in named_lora_layers(model)
        if layer.lora_B.requires_grad and not isinstance(layer, LoRAEmbedding)
    }
    if not fast:
        raise InjectionError("model: has no lora_B that trains; inject adapters first")
    slow = [p for p in model.parameters() if p.requires_grad and id(p) not in fast]
    return [
        {"params": slow, "lr": lr, "weight_decay": weight_decay},
        {"params": list(fast.values()), "lr": lr * lr_ratio, "weight_decay": weight_decay},
    ]
