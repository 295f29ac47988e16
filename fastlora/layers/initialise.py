"""Initial values of lora_A and lora_B other than the default of their layer."""

from __future__ import annotations

import torch
from torch import nn

from fastlora.layers.base import LoRALayer
from fastlora.layers.embedding import LoRAEmbedding
from fastlora.layers.linear import LoRALinear
from fastlora.ops.linear import no_autocast


def initialise(layer: LoRALayer, method: str) -> None:
    """Set lora_A (R, K) and lora_B (N, R) so that ΔW = 0.

    method: as `init_lora_weights` of `LoRAConfig`.
        "gaussian": lora_A is normal. An embedding, whose lora_A is zero, does not change.
        "orthogonal": Q (R, R) is orthogonal, A = 0.1 · Q_evenᵀ G_a and B = 0.1 · G_b Q_odd with Gaussian G. Even and odd rows of
        Q are orthogonal, so the product is zero up to rounding, though neither factor is.
        "pissa": from U, σ, V of the R largest singular values of W, A = √(σ/s) Vᵀ and B = U √(σ/s), with s the scaling;
        "pissa_niter_<n>" finds them by n subspace iterations from random vectors. "olora": from W = Q R, B is the first columns of
        Q and A the first rows of R. Both are computed in float32 or wider and copied to `initial_A` and `initial_B`.

    Source: "Rethinking LoRA initialisation", datta0.github.io, and PEFT's init_lora_weights="orthogonal"; PiSSA, arXiv 2404.02948,
    section 3; OLoRA, arXiv 2406.01775, section 3.
    """
    if method == "gaussian":
        if not isinstance(layer, LoRAEmbedding):
            nn.init.normal_(layer.lora_A, std=1 / layer.rank)
    elif method == "orthogonal":
        device, half = layer.lora_A.device, layer.rank // 2
        (_, k), (n, _) = layer.lora_A.shape, layer.lora_B.shape
        q, _ = torch.linalg.qr(torch.randn(layer.rank, layer.rank, device=device))
        even, odd = q[0::2], q[1::2]  # [R/2, R] each
        with torch.no_grad():
            layer.lora_A.copy_(0.1 * even.T @ torch.randn(half, k, device=device))
            layer.lora_B.copy_(0.1 * torch.randn(n, half, device=device) @ odd)
    elif method.startswith(("pissa", "olora")):
        assert isinstance(layer, LoRALinear)
        _initialise_from_weight(layer, method)


@torch.no_grad()
def _initialise_from_weight(layer: LoRALinear, method: str) -> None:
    weight = layer.dequantised_matrix()
    wide = torch.promote_types(weight.dtype, torch.float32)
    weight, rank = weight.to(wide), layer.rank
    with no_autocast(weight):
        if method == "olora":
            q, r = torch.linalg.qr(weight)
            a, b = r[:rank], q[:, :rank]
        else:
            if method == "pissa":
                u, sigma, vt = torch.linalg.svd(weight, full_matrices=False)
            else:
                steps = int(method.rpartition("_")[2])
                u, sigma, v = torch.svd_lowrank(weight, rank, niter=steps)
                vt = v.T
            root = (sigma[:rank] / abs(layer.scaling)).sqrt()
            a, b = root[:, None] * vt[:rank], u[:, :rank] * root
    layer.lora_A.copy_(a)
    layer.lora_B.copy_(b)
    layer.initial_A = layer.lora_A.detach().clone()
    layer.initial_B = layer.lora_B.detach().clone()
