"""Losses between a predicted signed distance field and the ground truth. Every term has a gradient.

With `s` the prediction, `t` the ground truth (both in fine voxels, negative inside, `t` truncated at `τ`):

    sdf        mean |s - t| where |t| < τ; elsewhere only a prediction that does not reach ±τ on the side of `t` counts
    occupancy  binary cross-entropy of sigmoid(-s / w) against sigmoid(-t / w)
    normal     mean |∇s - ∇t|² where |t| < τ: direction and length (the eikonal part) of the normal together

Each is a mean over the batch's regions of the region's own mean, so a small structure counts as much as a large one,
and the losses of micro-batches add up to that of the batch. The occupancy target is soft and the normal target is the discrete gradient of `t`, so that
`s = t` is a minimum of each term: with a hard target, or with `|∇s| = 1`, it would not be.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora.errors import DataError
from fastlora.medical.data.batch import RegionBatch
from fastlora.medical.data.grids import TRUNCATION_VOX

OCCUPANCY_WIDTH_VOX = 0.5
"""Width `w` (fine voxels) of the sigmoid that turns a distance into an occupancy."""


LOSS_WEIGHTS: Mapping[str, float] = {"sdf": 1.0, "occupancy": 1.0, "normal": 0.05}
"""The default weights of `mesh_losses`."""


def mesh_losses(
    pred_vox: Tensor, batch: RegionBatch, weights: Mapping[str, float] = LOSS_WEIGHTS
) -> dict[str, Tensor]:
    """Terms `sdf`, `occupancy`, `normal` and their weighted sum `total`, all 0-d.

    pred_vox: (B, X, Y, Z), predicted distances in fine voxels, negative inside.
    batch: its `sdf_vox` (B, X, Y, Z) is the ground truth, truncated at `TRUNCATION_VOX`.
    weights: of each term; a term of weight 0 is reported but does not train.

    Raises: DataError if the shapes differ, or a region has no voxel near a surface.
    """
    pred = pred_vox.float()
    true = batch.sdf_vox.float()
    if pred.shape != true.shape:
        raise DataError(f"pred_vox: expected {tuple(true.shape)}, got {tuple(pred.shape)}")
    volume = (1, 2, 3)
    near = (true.abs() < TRUNCATION_VOX).float()
    count = near.sum(volume)  # (B,)
    if not bool((count > 0).all()):
        empty = [batch.meta[n] for n in torch.nonzero(count == 0).flatten().tolist()]
        raise DataError(f"batch.sdf_vox: expected a surface in each region, got none in {empty}")

    beyond = F.relu(TRUNCATION_VOX - true.sign() * pred)  # 0 if the prediction is far enough too
    sdf = (torch.where(near.bool(), (pred - true).abs(), beyond).sum(volume) / count).mean()

    occupancy = F.binary_cross_entropy_with_logits(
        -pred / OCCUPANCY_WIDTH_VOX, torch.sigmoid(-true / OCCUPANCY_WIDTH_VOX)
    )

    normal = pred.new_zeros(())
    for axis in volume:
        error = pred.diff(dim=axis) - true.diff(dim=axis)
        length = error.shape[axis]
        both = near.narrow(axis, 0, length) * near.narrow(axis, 1, length)
        normal = normal + ((error.square() * both).sum(volume) / count).mean()

    terms = {"sdf": sdf, "occupancy": occupancy, "normal": normal}
    weighted = [weight * terms[name] for name, weight in weights.items()]
    return {**terms, "total": torch.stack(weighted).sum()}
