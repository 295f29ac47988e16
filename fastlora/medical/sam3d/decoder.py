"""SAM 3D Objects' mesh decoder on regions: the region fills the decoder's cube, one latent at each voxel that can hold surface.

    image and coarse structure (32³), or cached latents
      → latents (8 channels) at the active voxels of the decoder's grid (R³, R = 64 in the released decoder)
      → SLatMeshDecoder with adapters
      → signed distances at the corners of its 4R grid, and FlexiCubes' mesh of them

The decoder's cube is [-½, ½]³ with distances in edges of it, negative inside, as ours are; here all is in fine voxels of the region.
It takes what is not active to be outside. So its mesh has a wall where the active voxels end inside the structure; faces there
are left out, and the field that this model gives has the coarse structure's sign in the voxels that are not active.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlora import freeze_base_params, inject_lora
from fastlora.errors import ConfigError, DataError
from fastlora.medical.data.batch import RegionBatch, SparseTokens
from fastlora.medical.data.grids import FINE, TRUNCATION_VOX
from fastlora.medical.sam3d.folder import load_part, sparse_tensor

PATCH = 5
"""Points along each axis of what the encoder sees around a voxel."""

UNSURE_VOX = 3.95
"""A voxel at whose centre the coarse distance is smaller is active: where the coarse structure is 1/160 to 159/160 full."""

SUBDIVISION = 4
"""Cubes of the decoder's mesh along the edge of one of its voxels."""


def sample_volume(volume: Tensor, points: Tensor) -> Tensor:
    """A volume (X, Y, Z) read at index coordinates (N, 3), trilinear, its border repeated: (N,). Differentiable in both."""
    size = torch.tensor(volume.shape, dtype=points.dtype, device=points.device)
    grid = (2 * points / (size - 1) - 1).flip(-1)[
        None, None, None
    ]  # grid_sample's order is z, y, x
    values = F.grid_sample(
        volume[None, None], grid, mode="bilinear", padding_mode="border", align_corners=True
    )
    return values.flatten()


def active_voxels(base_vox: Tensor, resolution: int) -> Tensor:
    """The decoder's voxels that can hold surface, (T, 4) int64 `[sample, i, j, k]`: where the coarse structure is unsure.

    base_vox: (B, 32, 32, 32) as `regions.base_distance` gives it. Every coarse cell that is neither empty nor full has active
    voxels, and so has the wall between a full and an empty one.
    """
    centres = F.interpolate(
        base_vox[:, None], size=3 * [resolution], mode="trilinear", align_corners=False
    )
    return torch.nonzero(centres[:, 0].abs() < UNSURE_VOX)


class LatentEncoder(nn.Sequential):
    """Image and coarse structure around each voxel -> its latent: three linear layers, trained beside the adapters."""

    def __init__(self, latent_channels: int, width: int = 128) -> None:
        super().__init__(
            nn.Linear(2 * PATCH**3, width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, latent_channels),
        )


def voxel_features(image: Tensor, base_vox: Tensor, voxels: Tensor, resolution: int) -> Tensor:
    """What the encoder sees of each voxel, (T, 2·PATCH³): grey values in [-2, 2] and coarse distances / cell, in [-1, 1].

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
    """The decoder's `mesh_extractor`, with its distances in eval mode too; shared by copies, on the device of what it is given.

    It is no module and holds a large grid of constants, which `Module.to` would leave behind and a copy would double.
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


@dataclass(frozen=True, eq=False)
class Surface:
    """One region as the decoder sees it; positions are index coordinates of the region's fine voxels, distances in fine voxels.

    points (P, 3), distance (P,): the signed distance at the corners of active voxels' cubes, where the decoder moved them.
    corners: (P, 3) int64, the corners' places on the grid of 4R + 1. vertices (V, 3), faces (F, 3) of the mesh within active
    voxels, perhaps none. regularisation: the decoder's own `reg_loss`.
    """

    points: Tensor
    distance: Tensor
    corners: Tensor
    vertices: Tensor
    faces: Tensor
    regularisation: Tensor

    @property
    def empty(self) -> bool:
        """Whether there is no mesh to compare with anything."""
        return len(self.faces) == 0


@dataclass(frozen=True, eq=False)
class Decoded:
    """What the decoder makes of a batch: a surface for each region; base_vox (B, 32, 32, 32) and resolution are the input's."""

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
        # The distance belongs to the place that the corner was moved to: bring it back along the gradient.
        slope = torch.stack(torch.gradient(dense), dim=-1)[at] / edge
        moved = surface.points - (surface.corners * edge - 0.5)
        dense[at] = surface.distance.float() - (slope * moved).sum(-1)
        centres = (torch.arange(FINE, device=base_vox.device) + 0.5) / edge
        fine = sample_volume(dense, torch.cartesian_prod(centres, centres, centres))
        return fine.view(3 * [FINE]).clamp(-TRUNCATION_VOX, TRUNCATION_VOX)


class Sam3dModel(nn.Module):
    """The frozen decoder, and the encoder that makes its latents; without an encoder they come with the batch.

    decoder: as `sam3d.load_part` gives it. encoder: None for cached latents.
    """

    def __init__(self, decoder: nn.Module, encoder: LatentEncoder | None) -> None:
        super().__init__()
        self.decoder = decoder
        self.encoder = encoder
        self.resolution: int = int(decoder.resolution)  # type: ignore[arg-type]
        decoder.mesh_extractor = MeshExtractor(decoder.mesh_extractor)  # type: ignore[assignment]
        self._sparse_tensor = sparse_tensor()

    @property
    def base(self) -> nn.Module:
        """What a run starts from and never changes."""
        return self.decoder

    def adapt(self, rank: int, alpha: float, dropout: float, include_ffn: bool) -> None:
        """Puts adapters into the decoder's attention, and with `include_ffn` its feed-forward layers; freezes the rest of it."""
        targets = ["to_qkv", "to_out", *(["mlp"] if include_ffn else [])]
        inject_lora(self.decoder, targets, rank=rank, alpha=alpha, dropout=dropout)
        freeze_base_params(self.decoder)

    def inputs(self, batch: RegionBatch) -> tuple[Tensor, Tensor, SparseTokens | None]:
        """What `forward` takes of a batch. Raises: ConfigError if latents are missing, or come beside an encoder."""
        if (batch.slat is None) != (self.encoder is not None):
            wanted, got = ("none beside an encoder", "some") if batch.slat else ("some", "none")
            raise ConfigError(f"latents_dir: expected cached latents: {wanted}, got {got}")
        return batch.image, batch.base_vox, batch.slat

    def forward(self, image: Tensor, base_vox: Tensor, slat: SparseTokens | None) -> Decoded:
        """Decodes a batch of regions.

        Args:
            image: (B, 32, 32, 32) grey values in [0, 1]. base_vox: (B, 32, 32, 32), distances of the coarse structure.
            slat: feats (T, latent channels), coords (T, 4) of the decoder's voxels, samples in ascending order; None: the
                encoder's, at `active_voxels`.

        A region without an active voxel keeps its coarse structure and has no surface.

        Raises:
            DataError: the decoder's grid is not the one described above.
        """
        if slat is None:
            assert self.encoder is not None
            voxels = active_voxels(base_vox, self.resolution)
            seen = voxel_features(image, base_vox, voxels, self.resolution)
            slat = SparseTokens(self.encoder(seen), voxels)
        surfaces = [_no_surface(base_vox)] * len(image)
        present, number = torch.unique(slat.coords[:, 0], return_inverse=True)
        if len(present):  # the decoder counts samples by their voxels
            coords = torch.cat([number[:, None], slat.coords[:, 1:]], dim=1).int()
            results = self.decoder(self._sparse_tensor(feats=slat.feats, coords=coords))
            for sample, result in zip(present.tolist(), results, strict=True):
                voxels = slat.coords[slat.coords[:, 0] == sample, 1:]
                surfaces[sample] = self._surface(result, voxels)
        return Decoded(surfaces, base_vox, self.resolution)

    def _surface(self, result: Any, voxels: Tensor) -> Surface:
        """A mesh result of the decoder in the region's coordinates."""
        cubes = SUBDIVISION * self.resolution
        steps = torch.arange(SUBDIVISION + 1, device=voxels.device)
        inner = torch.cartesian_prod(steps, steps, steps)
        corners = torch.unique((voxels[:, None] * SUBDIVISION + inner).reshape(-1, 3), dim=0)
        points, place = result.tsdf_v.float(), corners / cubes - 0.5
        # A corner may be moved by half a cube, and rounded in 16 bits.
        if len(points) != len(corners) or bool(((points - place).abs() > 0.51 / cubes).any()):
            raise DataError(
                f"model: expected the corners of {SUBDIVISION}³ cubes in each of {len(voxels)} voxels, in order, "
                f"got {len(points)} points elsewhere; this version of sam3d_objects is not known"
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


def _no_surface(like: Tensor) -> Surface:
    none, cells = like.new_zeros(0, 3), torch.zeros(0, 3, dtype=torch.long, device=like.device)
    return Surface(none, none[:, 0], cells, none, cells, like.new_zeros(()))


def _to_index(points: Tensor) -> Tensor:
    """The decoder's cube [-½, ½]³ -> index coordinates of the region's fine voxels."""
    return (points + 0.5) * FINE - 0.5


def load_sam3d(
    sam3d_dir: str, torso: str = "config", checkpointing: bool = False, encoder: bool = True
) -> Sam3dModel:
    """The user's decoder, frozen, with a fresh encoder drawn from torch's generator, or none.

    torso: "fp32", "fp16", or as the decoder's "config" says. checkpointing: make each block's activations again in the backward
    pass instead of keeping them. Raises: as `sam3d.load_part`.
    """
    decoder: Any = load_part(sam3d_dir, "decoder")
    set_torso(decoder, torso, checkpointing)
    return Sam3dModel(decoder, LatentEncoder(int(decoder.in_channels)) if encoder else None)


def set_torso(model: Any, torso: str, checkpointing: bool) -> None:
    """Precision and checkpointing of a part's blocks; arguments as of `load_sam3d`."""
    if torso != "config":
        half = torso == "fp16"
        (model.convert_to_fp16 if half else model.convert_to_fp32)()
        model.dtype = torch.float16 if half else torch.float32
    for block in model.blocks:
        block.use_checkpoint = checkpointing
