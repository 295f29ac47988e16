"""SAM 3D Objects' generators on cached latents and conditions: the flow-matching loss, and the model that the trainer trains.

A generator makes the latents of a region out of noise and what the condition embedder made of an image. Here both are cached, so
that neither the embedder nor the encoders are needed.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlora import freeze_base_params, inject_lora
from fastlora.errors import ConfigError, DataError
from fastlora.medical.data.batch import RegionBatch
from fastlora.medical.sam3d.decoder import set_torso
from fastlora.medical.sam3d.folder import (
    TARGETS,
    GeneratorSettings,
    latent_scale,
    load_part,
    read_generator,
)

VALIDATION_DRAWS = 4
"""Times and noises of each region in eval mode, the same in every epoch."""


def flow_matching_loss(
    model: nn.Module,
    latents: Tensor | Mapping[str, Tensor],
    condition: Tensor,
    coords: Tensor | None = None,
    *,
    sigma_min: float = 0.0,
    time_scale: float = 1000.0,
    time_mean: float = 0.0,
    time_std: float = 1.0,
    loss_weights: Mapping[str, float] | None = None,
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
        sigma_min, time_scale, time_mean, time_std: σ, scale, and the normal distribution whose logistic t is; `sam3d.read_generator` gives
            them as the generator's YAML has them.
        loss_weights: factor of each latent's error, by name ("feats" for "slat"); 1 without it.

    Raises:
        DataError: the latents are not those of the model, or the samples are not as many as the conditions.

    Source: Lipman et al., Flow Matching for Generative Modeling, 2023, eq. 22 and 23; the times are log-normal as in Esser et al., Scaling
    Rectified Flow Transformers, 2024.
    """
    target = dict(latents) if isinstance(latents, Mapping) else {"feats": latents}
    names = set(getattr(model, "input_latent_mappings", ["feats"]))
    if target.keys() != names:
        raise DataError(f"latents: expected {sorted(names)}, got {sorted(target)}")
    dense = hasattr(model, "input_latent_mappings")
    if dense == (coords is not None):
        raise DataError("coords: expected the voxels of 'slat', and none of 'structure'")
    counts = {len(condition), *(len(x) for x in target.values())}
    if len(counts) > 1 or (coords is not None and counts != {1}):
        wanted = "1" if coords is not None else "one number"
        raise DataError(f"condition: expected {wanted} of samples everywhere, got {sorted(counts)}")
    time = (torch.randn(len(condition)) * time_std + time_mean).sigmoid().to(condition.device)
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
        voxels = coords.cpu().numpy()
        predicted = {"feats": model(noised["feats"], time * time_scale, condition, voxels, **more)}
    weights = loss_weights or {}
    losses = [
        weights.get(name, 1.0) * F.mse_loss(predicted[name], velocity[name])
        for name in sorted(target)
    ]
    return torch.stack(losses).sum()


class Sam3dFlow(nn.Module):
    """A generator, and how its loss is made of a region's cached latents and condition.

    flow: as `sam3d.load_part` gives it. settings: of its YAML. scale: mean and standard deviation by which cached latents of "slat" are
    normalised; None leaves them as they are. drop_condition: probability that a region is trained without its condition, so that the
    generator's guidance keeps what it compares with.
    """

    def __init__(
        self,
        flow: nn.Module,
        settings: GeneratorSettings,
        scale: tuple[list[float], list[float]] | None = None,
        drop_condition: float = 0.1,
    ) -> None:
        super().__init__()
        self.flow, self.settings, self.drop_condition = flow, settings, drop_condition
        self.scale = None if scale is None else [torch.tensor(values) for values in scale]

    @property
    def base(self) -> nn.Module:
        """What a run starts from and never changes."""
        return self.flow

    def adapt(self, rank: int, alpha: float, dropout: float, include_ffn: bool) -> None:
        """Puts adapters into the attention, and with `include_ffn` the feed-forward layers; freezes the rest."""
        targets = [name for name in TARGETS if include_ffn or name != "mlp"]
        inject_lora(self.flow, targets, rank=rank, alpha=alpha, dropout=dropout)
        freeze_base_params(self.flow)

    def inputs(self, batch: RegionBatch) -> tuple[Any, Tensor, list[int]]:
        """What `forward` takes of a batch. Raises: ConfigError if it has no cached latents of this generator."""
        latents = batch.slat if self.settings.resolution is not None else batch.latents
        if latents is None or batch.condition is None:
            raise ConfigError("latents_dir: expected cached latents and conditions, got none")
        names = [f"{meta['subject']}-{meta['region']}" for meta in batch.meta]
        return latents, batch.condition, [zlib.crc32(name.encode()) for name in names]

    def forward(self, latents: Any, condition: Tensor, seeds: list[int]) -> Tensor:
        """The loss of each region, (B,).

        latents: `SparseTokens` of all regions, or for "structure" (B, N, C) by name. condition: (B, L, D). seeds: in eval mode a region's
        times and noises are drawn from its own.
        """
        return torch.stack(
            [self._loss(latents, condition, index, seed) for index, seed in enumerate(seeds)]
        )

    def _loss(self, latents: Any, condition: Tensor, index: int, seed: int) -> Tensor:
        own, coords = self._sample(latents, index)
        cond = condition[index : index + 1]
        if self.training:
            if float(torch.rand(())) < self.drop_condition:
                cond = torch.zeros_like(cond)
            return self._flow_loss(own, cond, coords)
        with _own_draws(seed, condition.device):
            losses = [self._flow_loss(own, cond, coords) for _ in range(VALIDATION_DRAWS)]
        return torch.stack(losses).mean()

    def _sample(self, latents: Any, index: int) -> tuple[Any, Tensor | None]:
        """The latents of one region, normalised, and their voxels."""
        if isinstance(latents, Mapping):
            return {name: x[index : index + 1] for name, x in latents.items()}, None
        own = latents.coords[:, 0] == index
        feats, coords = latents.feats[own], latents.coords[own].clone()
        coords[:, 0] = 0
        if self.scale is not None:
            mean, std = (values.to(feats) for values in self.scale)
            feats = (feats - mean) / std
        return feats[None], coords

    def _flow_loss(self, latents: Any, condition: Tensor, coords: Tensor | None) -> Tensor:
        about = self.settings
        return flow_matching_loss(
            self.flow,
            latents,
            condition,
            coords,
            sigma_min=about.sigma_min,
            time_scale=about.time_scale,
            time_mean=about.time_mean,
            time_std=about.time_std,
            loss_weights=about.loss_weights,
        )


@contextmanager
def _own_draws(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's generators start at `seed` inside, and go on outside as if nothing had been drawn."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


def load_flow(
    sam3d_dir: str, part: str, torso: str, checkpointing: bool, drop_condition: float
) -> Sam3dFlow:
    """The user's generator "slat" or "structure", frozen. Arguments as of `sam3d_model.load_sam3d` and `Sam3dFlow`.

    Raises: as `sam3d.load_part`, `sam3d.read_generator` and `sam3d.latent_scale`.
    """
    settings = read_generator(sam3d_dir, part)
    flow = load_part(sam3d_dir, part)
    set_torso(flow, torso, checkpointing)
    scale = latent_scale(sam3d_dir) if part == "slat" else None
    if scale is not None and len(scale[0]) != settings.latents["feats"][1]:
        raise ConfigError(
            f"sam3d_dir: slat_mean, slat_std: expected {settings.latents['feats'][1]} numbers, got {len(scale[0])}"
        )
    return Sam3dFlow(flow, settings, scale, drop_condition)
