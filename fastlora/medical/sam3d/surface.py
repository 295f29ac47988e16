"""The surfaces that SAM 3D Objects' mesh decoder outputs, in fine voxels of their regions, and the fields that they imply."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora.medical.data.grids import FINE, TRUNCATION_VOX

SUBDIVISION = 4
"""Cubes of the decoder's mesh along the edge of one of its voxels."""


def sample_volume(volume: Tensor, points: Tensor) -> Tensor:
    """A volume (X, Y, Z) at index coordinates (N, 3): (N,), trilinear, the border repeated. Differentiable in both."""
    size = torch.tensor(volume.shape, dtype=points.dtype, device=points.device)
    grid = (2 * points / (size - 1) - 1).flip(-1)[
        None, None, None
    ]  # grid_sample's order is z, y, x
    values = F.grid_sample(
        volume[None, None], grid, mode="bilinear", padding_mode="border", align_corners=True
    )
    return values.flatten()


@dataclass(frozen=True, eq=False)
class Surface:
    """The decoder's output for one region; positions are index coordinates of the region's fine voxels, distances in fine voxels.

    points (P, 3), distance (P,): the signed distance at the corners of active voxels' cubes, as displaced by the decoder.
    corners: (P, 3) int64, the corners' places on the grid of 4R + 1. vertices (V, 3), faces (F, 3): of the mesh within active
        voxels, which may be empty. regularisation: the decoder's own `reg_loss`.
    """

    points: Tensor
    distance: Tensor
    corners: Tensor
    vertices: Tensor
    faces: Tensor
    regularisation: Tensor

    @property
    def empty(self) -> bool:
        """Whether the mesh has no face."""
        return len(self.faces) == 0


@dataclass(frozen=True, eq=False)
class Decoded:
    """The decoder's output for a batch: a surface for each region, with the input's base_vox (B, 32, 32, 32) and resolution."""

    surfaces: list[Surface]
    base_vox: Tensor
    resolution: int

    @torch.no_grad()
    def field(self) -> Tensor:
        """Signed distances at the regions' fine voxels, (B, 32, 32, 32), truncated, negative inside; without gradient."""
        return torch.stack(
            [self._field(*pair) for pair in zip(self.surfaces, self.base_vox, strict=True)]
        )

    def _field(self, surface: Surface, base_vox: Tensor) -> Tensor:
        cubes = SUBDIVISION * self.resolution
        edge = FINE / cubes
        axis = torch.arange(cubes + 1, device=base_vox.device) * edge - 0.5
        lattice = torch.cartesian_prod(axis, axis, axis)
        dense = sample_volume(base_vox.float(), lattice).view(3 * [cubes + 1])
        at = tuple(surface.corners.T)
        dense[at] = surface.distance.float()
        # The distance is that of the displaced corner: extrapolate it back along the gradient.
        slope = torch.stack(torch.gradient(dense), dim=-1)[at] / edge
        moved = surface.points - (surface.corners * edge - 0.5)
        dense[at] = surface.distance.float() - (slope * moved).sum(-1)
        centres = (torch.arange(FINE, device=base_vox.device) + 0.5) / edge
        fine = sample_volume(dense, torch.cartesian_prod(centres, centres, centres))
        return fine.view(3 * [FINE]).clamp(-TRUNCATION_VOX, TRUNCATION_VOX)


def no_surface(like: Tensor) -> Surface:
    """The output for a region without an active voxel."""
    none, cells = like.new_zeros(0, 3), torch.zeros(0, 3, dtype=torch.long, device=like.device)
    return Surface(none, none[:, 0], cells, none, cells, like.new_zeros(()))


# FSDP2 hooks the tensors in a block's inputs and outputs. Newer versions of torch look into dataclasses, older ones only into
# registered ones.
for kind in (Surface, Decoded):
    torch.export.register_dataclass(kind)
