"""How lora_A and lora_B start, besides the Kaiming-uniform start that `LoRALinear` makes itself."""

from __future__ import annotations

import torch
from torch import nn

from fastlora.layer import LoRALinear


def initialise(layer: LoRALinear, how: str) -> None:
    """Set lora_A (R, K) and lora_B (N, R) so that B A = 0; `how` as `init_lora_weights` of `LoRAConfig`.

    "orthogonal" draws Q (R, R) orthogonal, A = 0.1 · Q_evenᵀ G_a and B = 0.1 · G_b Q_odd with Gaussian G: even and odd rows
    of Q are orthogonal, so the product is zero, up to rounding, though neither factor is.

    Source: "Rethinking LoRA initialisation", datta0.github.io; PEFT's init_lora_weights="orthogonal".
    """
    if how == "gaussian":
        nn.init.normal_(layer.lora_A, std=1 / layer.rank)
    elif how == "orthogonal":
        device, half = layer.lora_A.device, layer.rank // 2
        q, _ = torch.linalg.qr(torch.randn(layer.rank, layer.rank, device=device))
        even, odd = q[0::2], q[1::2]  # [R/2, R] each
        with torch.no_grad():
            layer.lora_A.copy_(0.1 * even.T @ torch.randn(half, layer.in_features, device=device))
            layer.lora_B.copy_(0.1 * torch.randn(layer.out_features, half, device=device) @ odd)
