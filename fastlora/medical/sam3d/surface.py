"""The surfaces that SAM 3D Objects' mesh decoder outputs, the fields that they imply, and their losses, computed without rendering.

With `s` the decoder's distances at its corners and `t` the ground truth (fine voxels, negative inside, truncated at `τ`):

    sdf             mean |s - t| at the corners where |t| < τ; elsewhere only a distance that does not reach ±τ on the side of `t` counts
    vertex          mean |t| at the mesh's vertices
    chamfer         mean distance from vertices to the true surface's points, plus that from those to the vertices
    normal          mean 1 - cos(normal, ∇t) over the faces near the true surface
    regularisation  the decoder's own: agreement of neighbouring voxels on their corners, FlexiCubes' weights and deviation

Each is a mean over the batch's regions. An empty mesh gives 0 in `vertex`, `chamfer` and `normal`, and is counted in `empty`; its
`sdf` and `regularisation` still reach every weight, so a mesh can reappear.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from skimage import measure
from torch import Tensor

from fastlora.errors import DataError
from fastlora.medical.data.grids import FINE, TRUNCATION_VOX

if TYPE_CHECKING:
    from fastlora.medical.data.batch import RegionBatch

SUBDIVISION = 4
"""Cubes of the decoder's mesh along the edge of one of its voxels."""

CHAMFER_POINTS = 2048
"""Points of each surface that are compared, taken at equal steps from its list of points."""


def sample_volume(volume: Tensor, points: Tensor) -> Tensor:
    """A volume (X, Y, Z) at index coordinates (N, 3): (N,), trilinear, the border repeated. Differentiable in both."""
    size = torch.tensor(volume.shape, dtype=points.dtype, device=points.device)
    grid = (2 * points / (size - 1) - 1).flip(-1)[None, None, None]  # in the order z, y, x
    volume = volume[None, None]
    return F.grid_sample(volume, grid, padding_mode="border", align_corners=True).flatten()


@dataclass(frozen=True, eq=False)
class Surface:
    """The decoder's output for one region; positions are index coordinates of the region's fine voxels, distances in fine voxels.

    points (P, 3), distance (P,): the signed distance at the corners of active voxels' cubes, as displaced by the decoder.
    corners: (P, 3) int64, the corners' indices on the grid of 4R + 1. vertices (V, 3), faces (F, 3): of the mesh within active
        voxels, which may be empty. regularisation: the decoder's own `reg_loss`.
    """

    points: Tensor
    distance: Tensor
    corners: Tensor
    vertices: Tensor
    faces: Tensor
    regularisation: Tensor


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


# For FSDP2: see distributed.py.
for kind in (Surface, Decoded):
    torch.export.register_dataclass(kind)


LOSS_WEIGHTS: Mapping[str, float] = {
    "sdf": 1.0,
    "vertex": 0.2,
    "chamfer": 0.1,
    "normal": 0.05,
    "regularisation": 0.1,
}
"""The default weights of `surface_losses`."""


def surface_losses(
    decoded: Decoded, batch: RegionBatch, weights: Mapping[str, float] = LOSS_WEIGHTS
) -> dict[str, Tensor]:
    """The terms above, their weighted sum `total`, and `empty`, the fraction of regions without a mesh; all 0-d.

    Raises: DataError if a region's ground truth has no surface, or none near the decoder's corners.
    """
    terms: list[dict[str, Tensor]] = []
    for surface, true, meta in zip(
        decoded.surfaces, batch.sdf_vox.float(), batch.meta, strict=True
    ):
        if not bool((true < 0).any() and (true > 0).any()):
            raise DataError(f"batch.sdf_vox: expected a surface in each region, got none in {meta}")
        term = {"sdf": _corner_loss(surface, true, meta), "regularisation": surface.regularisation}
        terms.append({**term, **_mesh_terms(surface, true)})
    means = {name: torch.stack([term[name] for term in terms]).mean() for name in terms[0]}
    weighted = [weight * means[name] for name, weight in weights.items()]
    return {**means, "total": torch.stack(weighted).sum()}


def _corner_loss(surface: Surface, true_vox: Tensor, meta: dict[str, str]) -> Tensor:
    """Term `sdf` of one region; the ground truth is sampled at the displaced corners, without a gradient to them."""
    true = sample_volume(true_vox, surface.points.detach())
    near = true.abs() < TRUNCATION_VOX - 1e-3  # a margin for rounding on the plateau
    if not bool(near.any()):
        raise DataError(f"batch: expected active voxels near the true surface, got none in {meta}")
    beyond = F.relu(TRUNCATION_VOX - true.sign() * surface.distance)
    error = torch.where(near, (surface.distance - true).abs(), beyond)
    return error.sum() / near.sum()


def _mesh_terms(surface: Surface, true_vox: Tensor) -> dict[str, Tensor]:
    """Terms `vertex`, `chamfer` and `normal` of one region, and whether it was `empty`."""
    zero = true_vox.new_zeros(())
    if len(surface.faces) == 0:
        return {"vertex": zero, "chamfer": zero, "normal": zero, "empty": zero + 1}
    points = _thinned(surface.vertices)
    distances = torch.cdist(points, _thinned(true_points(true_vox)))
    # Not vertices[faces]: on several CPU threads its backward adds in an order that varies from run to run.
    triangles = F.embedding(surface.faces, surface.vertices)
    normals = torch.linalg.cross(
        triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0], dim=1
    )
    centres = triangles.detach().mean(1)
    # Faces far from the true surface have no counterpart on it.
    near = sample_volume(true_vox, centres).abs() < TRUNCATION_VOX / 2
    slopes = true_gradient(true_vox, centres)
    bent = 1 - F.cosine_similarity(normals, slopes, dim=1, eps=1e-6)
    return {
        "vertex": sample_volume(true_vox, surface.vertices).abs().mean(),
        "chamfer": distances.amin(1).mean() + distances.amin(0).mean(),
        "normal": (bent * near).sum() / near.sum().clamp(min=1),
        "empty": zero,
    }


def true_points(true_vox: Tensor) -> Tensor:
    """Points (N, 3) on the zero level of (X, Y, Z), in index coordinates; the level set is open at the volume's border."""
    vertices, *_ = measure.marching_cubes(true_vox.cpu().numpy(), 0.0)
    return torch.from_numpy(vertices.copy()).to(true_vox)


def true_gradient(true_vox: Tensor, points: Tensor) -> Tensor:
    """∇t (N, 3) at index coordinates, from differences of one voxel; it points outwards."""
    half = 0.5 * torch.eye(3, dtype=points.dtype, device=points.device)
    return torch.stack(
        [sample_volume(true_vox, points + h) - sample_volume(true_vox, points - h) for h in half],
        dim=1,
    )


def _thinned(points: Tensor) -> Tensor:
    """At most CHAMFER_POINTS of the points."""
    return points[:: -(-len(points) // CHAMFER_POINTS)]
