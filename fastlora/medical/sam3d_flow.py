"""The flow-matching loss of SAM 3D Objects' generators on cached latents and conditioning, for a training loop of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlora.errors import DataError


def flow_matching_loss(
    model: nn.Module,
    latents: Tensor | Mapping[str, Tensor],
    condition: Tensor,
    coords: Tensor | None = None,
    *,
    sigma_min: float = 0.0,
    time_scale: float = 1000.0,
) -> Tensor:
    """Mean squared error of the flow from noise to latents, 0-d: a fresh time for each sample, fresh noise, torch's generator.

        x_t = (1 - (1 - σ) t) x_0 + t x_1,    v = x_1 - (1 - σ) x_0,    loss = mean |model(x_t, scale · t) - v|²

    Args:
        model: a part "slat" or "structure" of `sam3d.load_part`, with or without adapters. A shortcut model is asked for steps of
            length zero, which is its flow.
        latents: x_1, normalised as the generator gives them. Of "slat" (1, T, C), one sample a call; of "structure" each latent's
            (B, N, C) by name, whose errors are added.
        condition: (B, L, D), what the condition embedder made of the image.
        coords: of "slat" (T, 4) int, `[0, i, j, k]` of each voxel.
        sigma_min, time_scale: σ and scale, of the generator's YAML (`module.generator.backbone`).

    Raises:
        DataError: the latents are not those of the model, or the samples are not as many as the conditions.

    Source: Lipman et al., Flow Matching for Generative Modeling, 2023, eq. 22 and 23; the times are log-normal as in Esser et al., Scaling
    Rectified Flow Transformers, 2024.
    """
    target = dict(latents) if isinstance(latents, Mapping) else {"": latents}
    names = set(getattr(model, "input_latent_mappings", [""]))
    if target.keys() != names:
        raise DataError(f"latents: expected {sorted(names)}, got {sorted(target)}")
    if ("" in names) != (coords is not None):
        raise DataError("coords: expected the voxels of 'slat', and none of 'structure'")
    counts = {len(condition), *(len(x) for x in target.values())}
    if len(counts) > 1 or (coords is not None and counts != {1}):
        wanted = "1" if coords is not None else "one number"
        raise DataError(f"condition: expected {wanted} of samples everywhere, got {sorted(counts)}")
    time = torch.randn(len(condition)).sigmoid().to(condition.device)
    noised, velocity = {}, {}
    for name in sorted(target):
        end = target[name]
        start = torch.randn(end.shape, device=end.device, dtype=end.dtype)
        at = time.view(-1, *[1] * (end.ndim - 1))
        noised[name] = (1 - (1 - sigma_min) * at) * start + at * end
        velocity[name] = end - (1 - sigma_min) * start
    more: dict[str, Any] = {}
    if getattr(model, "is_shortcut_model", False):
        more["d"] = torch.zeros_like(time)
    if coords is None:
        predicted = model(noised, time * time_scale, condition, **more)
    else:
        flow = model(noised[""], time * time_scale, condition, coords.cpu().numpy(), **more)
        predicted = {"": flow}
    losses = [F.mse_loss(predicted[name], velocity[name]) for name in sorted(target)]
    return torch.stack(losses).sum()
