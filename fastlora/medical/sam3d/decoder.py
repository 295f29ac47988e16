"""SAM 3D Objects' mesh decoder on regions: a region fills the decoder's cube, with one latent at each voxel that may contain surface.

    image and coarse segmentation (32³), or cached latents
      → latents (8 channels) at the active voxels of the decoder's grid (R³, R = 64 in the released decoder)
      → SLatMeshDecoder with adapters
      → signed distances at the corners of its 4R grid, and FlexiCubes' mesh of them

The decoder's cube is [-½, ½]³ with distances in units of its edge, negative inside; this module uses fine voxels of the region.
The decoder treats inactive voxels as outside, so its mesh has a wall where the active voxels end inside the structure. Faces there
are removed, and the field of this model has the coarse segmentation's sign in inactive voxels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlora.errors import ConfigError, DataError
from fastlora.medical.data.batch import RegionBatch, SparseTokens
from fastlora.medical.data.grids import FINE, TRUNCATION_VOX
from fastlora.medical.sam3d.loading import sparse_tensor
from fastlora.medical.sam3d.part import Sam3dPart
from fastlora.medical.sam3d.surface import (
    SUBDIVISION,
    Decoded,
    Surface,
    no_surface,
    sample_volume,
    surface_losses,
)

PATCH = 5
"""Points along each axis of the encoder's neighbourhood of a voxel."""

UNSURE_VOX = 3.95
"""A voxel at whose centre the coarse distance is smaller is active: where the coarse segmentation is 1/160 to 159/160 full."""


def active_voxels(base_vox: Tensor, resolution: int) -> Tensor:
    """The decoder's voxels that may contain surface, (T, 4) int64 `[sample, i, j, k]`: those near the coarse segmentation's surface.

    base_vox: (B, 32, 32, 32), from `regions.base_distance`. Every coarse cell that is neither empty nor full has active voxels,
        and so has the wall between a full and an empty cell.
    """
    centres = F.interpolate(
        base_vox[:, None], size=3 * [resolution], mode="trilinear", align_corners=False
    )
    return torch.nonzero(centres[:, 0].abs() < UNSURE_VOX)


class LatentEncoder(nn.Sequential):
    """Image and coarse segmentation around each voxel -> its latent: three linear layers, trained together with the adapters."""

    def __init__(self, latent_channels: int, width: int = 128) -> None:
        super().__init__(
            nn.Linear(2 * PATCH**3, width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, latent_channels),
        )


def voxel_features(image: Tensor, base_vox: Tensor, voxels: Tensor, resolution: int) -> Tensor:
    """The encoder's input for each voxel, (T, 2·PATCH³): grey values in [-2, 2] and coarse distances / cell, in [-1, 1].

    image, base_vox: (B, 32, 32, 32). The points are a fine voxel apart, or half a voxel of a coarser decoder.
    """
    edge = FINE / resolution
    steps = torch.arange(PATCH, device=image.device) - PATCH // 2
    offsets = torch.cartesian_prod(steps, steps, steps) * max(1.0, edge / 2)
    seen = []
    for sample in range(len(image)):
        own = voxels[voxels[:, 0] == sample, 1:]
        points = ((own + 0.5) * edge - 0.5)[:, None] + offsets
        grey, coarse = (
            sample_volume(volume[sample], points.reshape(-1, 3)).view(len(own), PATCH**3)
            for volume in (image, base_vox)
        )
        seen.append(torch.cat([4 * (grey - 0.5), coarse / TRUNCATION_VOX], dim=1))
    return torch.cat(seen)


class MeshExtractor:
    """The decoder's `mesh_extractor`, returning distances in eval mode too; shared by copies, on the device of its input.

    The extractor is not a module: `Module.to` would not move its large grid of constants, and a copy would duplicate it.
    """

    def __init__(self, extractor: Any) -> None:
        self._extractor = extractor

    def __call__(self, features: Any, training: bool = False) -> Any:
        old, device = self._extractor, features.feats.device
        if torch.device(old.device) != device:
            self._extractor = type(old)(res=old.res, use_color=old.use_color, device=str(device))
        return self._extractor(features, training=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> MeshExtractor:
        return self


class Sam3dModel(Sam3dPart):
    """The frozen decoder and the encoder of its latents; without an encoder the latents come with the batch.

    decoder: from `loading.load_part`. encoder: whether to add one, initialised from torch's generator.
    """

    def __init__(self, decoder: nn.Module, encoder: bool) -> None:
        super().__init__()
        self.decoder = decoder
        self.resolution: int = int(decoder.resolution)  # type: ignore[arg-type]
        channels: int = int(decoder.in_channels)  # type: ignore[arg-type]
        self.encoder = LatentEncoder(channels) if encoder else None
        decoder.mesh_extractor = MeshExtractor(decoder.mesh_extractor)  # type: ignore[assignment]
        self._sparse_tensor = sparse_tensor()

    @property
    def base(self) -> nn.Module:
        """The decoder."""
        return self.decoder

    def inputs(self, batch: RegionBatch) -> tuple[Tensor, Tensor, SparseTokens | None]:
        """See `Trainee`. Raises: ConfigError if cached latents are missing, or given in addition to an encoder."""
        if (batch.slat is None) != (self.encoder is not None):
            wanted, got = ("none with an encoder", "some") if batch.slat else ("some", "none")
            raise ConfigError(f"latents_dir: expected cached latents: {wanted}, got {got}")
        return batch.image, batch.base_vox, batch.slat

    def losses(
        self, output: Decoded, batch: RegionBatch, weights: Mapping[str, float]
    ) -> dict[str, Tensor]:
        """See `surface_losses`."""
        return surface_losses(output, batch, weights)

    def distances(self, output: Decoded) -> Tensor:
        """See `Decoded.field`."""
        return output.field()

    def forward(self, image: Tensor, base_vox: Tensor, slat: SparseTokens | None) -> Decoded:
        """Decodes a batch of regions.

        image: (B, 32, 32, 32) grey values in [0, 1]. base_vox: (B, 32, 32, 32), distances of the coarse segmentation.
        slat: feats (T, latent channels), coords (T, 4) of the decoder's voxels, samples in ascending order; None: the
            encoder's, at `active_voxels`.
        A region without an active voxel has the field of its coarse segmentation and no mesh.

        Raises: DataError if the decoder's grid is not the one described above.
        """
        if slat is None:
            assert self.encoder is not None
            voxels = active_voxels(base_vox, self.resolution)
            seen = voxel_features(image, base_vox, voxels, self.resolution)
            slat = SparseTokens(self.encoder(seen), voxels)
        surfaces = [no_surface(base_vox)] * len(image)
        present, number = torch.unique(slat.coords[:, 0], return_inverse=True)
        if len(present):  # the decoder numbers only samples that have voxels
            coords = torch.cat([number[:, None], slat.coords[:, 1:]], dim=1).int()
            results = self.decoder(self._sparse_tensor(feats=slat.feats, coords=coords))
            for sample, result in zip(present.tolist(), results, strict=True):
                voxels = slat.coords[slat.coords[:, 0] == sample, 1:]
                surfaces[sample] = self._surface(result, voxels)
        return Decoded(surfaces, base_vox, self.resolution)

    def _surface(self, result: Any, voxels: Tensor) -> Surface:
        """Converts a mesh result of the decoder to the region's coordinates."""
        cubes = SUBDIVISION * self.resolution
        steps = torch.arange(SUBDIVISION + 1, device=voxels.device)
        inner = torch.cartesian_prod(steps, steps, steps)
        corners = torch.unique((voxels[:, None] * SUBDIVISION + inner).reshape(-1, 3), dim=0)
        points, place = result.tsdf_v.float(), corners / cubes - 0.5
        # The decoder displaces a corner by up to half a cube, and 16 bits round it.
        if len(points) != len(corners) or bool(((points - place).abs() > 0.51 / cubes).any()):
            raise DataError(
                f"model: expected the corners of {SUBDIVISION}³ cubes in each of {len(voxels)} voxels, in order, "
                f"got {len(points)} others; this version of sam3d_objects is not supported"
            )
        active = torch.zeros(3 * [self.resolution], dtype=torch.bool, device=voxels.device)
        active[tuple(voxels.T)] = True
        vertices, faces = result.vertices.float(), result.faces
        place = ((vertices.detach() + 0.5) * self.resolution).long()
        here = active[tuple(place.clamp(0, self.resolution - 1).T)]
        faces = faces[here[faces].all(dim=1)]
        used, faces = torch.unique(faces, return_inverse=True)
        return Surface(
            points=_to_index(points),
            distance=result.tsdf_s.float() * FINE,
            corners=corners,
            vertices=_to_index(vertices[used]),
            faces=faces.view(-1, 3),
            regularisation=result.reg_loss,
        )


def _to_index(points: Tensor) -> Tensor:
    """The decoder's cube [-½, ½]³ -> index coordinates of the region's fine voxels."""
    return (points + 0.5) * FINE - 0.5
