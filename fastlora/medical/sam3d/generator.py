"""SAM 3D Objects' generators on cached latents and conditions: the flow-matching loss, and the model for the trainer.

A generator maps noise and an embedded image, its condition, to the latents of a region. Latents and conditions are cached here, so
neither the encoders nor the condition embedder are needed.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlora.errors import ConfigError, DataError
from fastlora.medical.data.batch import RegionBatch
from fastlora.medical.sam3d.loading import FlowSettings, PartSettings
from fastlora.medical.sam3d.part import Sam3dPart

VALIDATION_DRAWS = 4
"""Draws of time and noise for each region in eval mode, the same in every epoch."""


def flow_matching_loss(
    model: nn.Module,
    latents: Tensor | Mapping[str, Tensor],
    condition: Tensor,
    coords: Tensor | None = None,
    settings: FlowSettings | None = None,
) -> Tensor:
    """Mean squared error of the flow from noise to latents, 0-d: a time and noise for each sample from torch's generator.

        x_t = (1 - (1 - σ) t) x_0 + t x_1,    v = x_1 - (1 - σ) x_0,    loss = mean |model(x_t, scale · t) - v|²

    model: a part "slat" or "structure" of `loading.load_part`, with or without adapters. A shortcut model is called with step
        length zero, which is its flow.
    latents: x_1, normalised as the generator outputs them. Of "slat" (1, T, C), one sample a call; of "structure" each latent's
        (B, N, C) by name, whose errors are added.
    condition: (B, L, D), the embedded image.
    coords: of "slat" (T, 4) int, `[0, i, j, k]` of each voxel.
    settings: the generator's `PartSettings.flow`; default `FlowSettings()`.

    Raises: DataError if the latents are not those of the model, or the numbers of samples and conditions differ.

    Source: Lipman et al., Flow Matching for Generative Modeling, 2023, eq. 22 and 23; the times are log-normal as in Esser et al., Scaling
    Rectified Flow Transformers, 2024.
    """
    flow = settings or FlowSettings()
    target = dict(latents) if isinstance(latents, Mapping) else {"feats": latents}
    _check_samples(model, target, condition, coords)
    time = (torch.randn(len(condition)) * flow.time_std + flow.time_mean).sigmoid()
    time = time.to(condition.device)
    noised, velocity = {}, {}
    for name in sorted(target):
        end = target[name]
        start = torch.randn(end.shape, device=end.device, dtype=end.dtype)
        at = time.view(-1, *[1] * (end.ndim - 1))
        noised[name] = (1 - (1 - flow.sigma_min) * at) * start + at * end
        velocity[name] = end - (1 - flow.sigma_min) * start
    more = {"d": torch.zeros_like(time)} if getattr(model, "is_shortcut_model", False) else {}
    if coords is None:
        predicted = model(noised, time * flow.time_scale, condition, **more)
    else:
        voxels = coords.cpu().numpy()
        feats = model(noised["feats"], time * flow.time_scale, condition, voxels, **more)
        predicted = {"feats": feats}
    losses = [
        flow.loss_weights.get(name, 1.0) * F.mse_loss(predicted[name], wanted)
        for name, wanted in velocity.items()
    ]
    return torch.stack(losses).sum()


def _check_samples(
    model: nn.Module, target: Mapping[str, Tensor], condition: Tensor, coords: Tensor | None
) -> None:
    names = set(getattr(model, "input_latent_mappings", ["feats"]))
    if target.keys() != names:
        raise DataError(f"latents: expected {sorted(names)}, got {sorted(target)}")
    if hasattr(model, "input_latent_mappings") == (coords is not None):
        raise DataError("coords: expected the voxels of 'slat', and none of 'structure'")
    counts = {len(condition), *(len(x) for x in target.values())}
    if len(counts) > 1 or (coords is not None and counts != {1}):
        wanted = "one sample" if coords is not None else "the same number of samples"
        raise DataError(f"condition: expected {wanted} in every input, got {sorted(counts)}")


class Sam3dFlow(Sam3dPart):
    """A generator and its loss on a region's cached latents and condition.

    flow: from `loading.load_part`. settings: of its YAML. scale: `loading.latent_scale` for "slat"; None leaves cached latents
    unchanged. drop_condition: probability of training a region without its condition, which the generator's guidance needs.
    """

    def __init__(
        self,
        flow: nn.Module,
        settings: PartSettings,
        scale: tuple[list[float], list[float]] | None = None,
        drop_condition: float = 0.1,
    ) -> None:
        super().__init__()
        self.flow, self.settings, self.drop_condition = flow, settings, drop_condition
        self.scale = None if scale is None else [torch.tensor(values) for values in scale]

    @property
    def base(self) -> nn.Module:
        """The generator."""
        return self.flow

    @property
    def exported(self) -> nn.Module:
        """The generator: the adapter file is loaded into the user's own pipeline."""
        return self.flow

    def inputs(self, batch: RegionBatch) -> tuple[Any, Tensor, list[int]]:
        """See `Trainee`. Raises: ConfigError if the batch has no cached latents of this generator."""
        latents = batch.slat if self.settings.resolution is not None else batch.latents
        if latents is None or batch.condition is None:
            raise ConfigError("latents_dir: expected cached latents and conditions, got none")
        names = [f"{meta['subject']}-{meta['region']}" for meta in batch.meta]
        return latents, batch.condition, [zlib.crc32(name.encode()) for name in names]

    def losses(
        self, output: Tensor, batch: RegionBatch, weights: Mapping[str, float]
    ) -> dict[str, Tensor]:
        """The mean over the regions; the weights of the latents are in the generator's settings, not in `weights`."""
        return {"flow": output.mean(), "total": output.mean()}

    def forward(self, latents: Any, condition: Tensor, seeds: list[int]) -> Tensor:
        """The loss of each region, (B,).

        latents: `SparseTokens` of all regions, or for "structure" (B, N, C) by name. condition: (B, L, D). seeds: of each region's
            times and noise in eval mode.
        """
        losses = []
        devices = [condition.device] if condition.is_cuda else []
        for index, seed in enumerate(seeds):
            own, coords = self._sample(latents, index)
            cond = condition[index : index + 1]
            if self.training:
                if float(torch.rand(())) < self.drop_condition:
                    cond = torch.zeros_like(cond)
                losses.append(flow_matching_loss(self.flow, own, cond, coords, self.settings.flow))
                continue
            with torch.random.fork_rng(devices):  # does not advance the generators of training
                torch.manual_seed(seed)
                draws = [
                    flow_matching_loss(self.flow, own, cond, coords, self.settings.flow)
                    for _ in range(VALIDATION_DRAWS)
                ]
            losses.append(torch.stack(draws).mean())
        return torch.stack(losses)

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
