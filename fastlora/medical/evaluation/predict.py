"""From an image and a coarse segmentation to a surface in patient coordinates (mm).

The input mask is averaged over 6 mm cells; the decoder refines overlapping regions of 32³ fine voxels,
which are blended. Regions of all structures share the batches.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
import trimesh

from fastlora.errors import DataError
from fastlora.medical.data.batch import collate_regions
from fastlora.medical.data.grids import CELL, FINE, SPACING_MM, TRUNCATION_VOX, FineGrid, fine_grid
from fastlora.medical.data.regions import region_arrays
from fastlora.medical.data.splits import region_starts
from fastlora.medical.models.trainee import Trainee
from fastlora.medical.scans.geometry import Array, mesh_from_sdf, shifted, voxelise
from fastlora.medical.scans.scan import Part, Scan
from fastlora.medical.scans.volumes import Volume
from fastlora.medical.training.finetuned import predict

STRIDE = FINE // 2  # so that neighbouring regions overlap by at least half
LOW_DICE = 0.8
"""A prediction whose overlap with its mask is smaller gets a warning."""
SMALLEST_MM = (7, 6)
"""Diameters of a ball and of a tube that the packaged base still predicts at a Dice of 0.8; sheets may be 3 mm thin."""

Key = TypeVar("Key")
_TENT = np.minimum(np.arange(FINE) + 0.5, FINE - np.arange(FINE) - 0.5).astype(np.float32)
_WEIGHT = _TENT[:, None, None] * _TENT[:, None] * _TENT


@dataclass(frozen=True, eq=False)
class Surface:
    """A predicted structure.

    part: the input mask. mesh: closed, in RAS mm. facts: see `surface_facts`.
    """

    part: Part
    mesh: trimesh.Trimesh
    facts: dict[str, Any]


def predict_structures(
    model: Trainee, scan: Scan, structures: Iterable[str], batch_size: int = 8
) -> Iterator[tuple[str, Surface | DataError]]:
    """The surfaces of a case's structures, or the errors that prevent them, in any order.

    model: in eval mode, on any device. structures: those of one file should follow each other.
    """
    failed: deque[tuple[str, DataError]] = deque()

    def named(structure: str, error: DataError) -> DataError:
        return DataError(f"{scan.case.subject}: {structure}: {error}")

    def grids() -> Iterator[tuple[tuple[str, Part], FineGrid]]:
        for structure in structures:
            try:
                part = scan.part(structure)
                with scan.watch.step("grids"):
                    grid = fine_grid(scan.image, part, scan.limits(structure))
            except DataError as error:
                failed.append((structure, named(structure, error)))
            else:
                yield (structure, part), grid

    def problems() -> Iterator[tuple[str, DataError]]:
        while failed:
            yield failed.popleft()

    with scan.watch.step("decoder"):
        for (structure, part), grid, field in predict_fields(model, grids(), batch_size):
            yield from problems()
            found: Surface | DataError
            try:
                with scan.watch.step("surfaces"):
                    mesh = _surface(field, grid)
                    found = Surface(part, mesh, surface_facts(mesh, scan.image, part))
            except DataError as error:
                found = named(structure, error)
            yield structure, found
    yield from problems()


def _surface(field: Array, grid: FineGrid) -> trimesh.Trimesh:
    if not np.isfinite(field).all():
        raise DataError(
            f"prediction: expected finite distances, got {np.count_nonzero(~np.isfinite(field))} that are not"
        )
    if not (field < 0).any():
        raise DataError(
            "prediction: expected a surface, got an empty one of a mask of "
            f"{np.count_nonzero(grid.mask) * SPACING_MM**3 / 1000:.2g} ml: {too_small()}"
        )
    return mesh_from_sdf(field, grid.affine)


def too_small() -> str:
    """What a small structure suffers from, as the second half of a sentence."""
    ball, tube = SMALLEST_MM
    return (
        f"the input is averaged over cells of {CELL * SPACING_MM:g} mm, so compact structures below about {ball} mm and tubes below "
        f"about {tube} mm in diameter shrink or vanish"
    )


def surface_facts(mesh: trimesh.Trimesh, image: Volume, part: Part) -> dict[str, Any]:
    """Size and quality of a predicted surface.

    `volume_ml`, `mask_volume_ml`, `surface_cm2`, `watertight`, `vertices`, `faces`, and `dice_with_mask`: the overlap of the
    voxelised mesh with the input mask. `warning`, if that is below `LOW_DICE`.
    """
    inverse = np.linalg.inv(image.affine)
    corners = np.array(list(itertools.product(*mesh.bounds.T)))
    index = corners @ inverse[:3, :3].T + inverse[:3, 3]
    first, size = np.array(part.start), np.array(part.mask.shape)
    low = np.clip(np.floor(index.min(0)), 0, first).astype(np.int64)
    high = np.clip(np.ceil(index.max(0)) + 1, first + size, image.shape).astype(np.int64)
    inside = voxelise(mesh, shifted(image.affine, low), tuple((high - low).tolist()))
    at = tuple(slice(a, a + n) for a, n in zip(first - low, size, strict=True))
    voxels = np.count_nonzero(part.mask)
    common = np.count_nonzero(inside[at] & part.mask)
    dice = 2 * common / (np.count_nonzero(inside) + voxels)
    ml = abs(float(np.linalg.det(image.affine[:3, :3]))) / 1000
    facts: dict[str, Any] = {
        "volume_ml": round(float(mesh.volume) / 1000, 4),
        "mask_volume_ml": round(voxels * ml, 4),
        "surface_cm2": round(float(mesh.area) / 100, 4),
        "dice_with_mask": round(dice, 4),
        "watertight": bool(mesh.is_watertight),
        "vertices": len(mesh.vertices),
        "faces": len(mesh.faces),
    }
    if dice < LOW_DICE:
        share = facts["volume_ml"] / facts["mask_volume_ml"]
        facts["warning"] = (
            f"Dice with the mask {dice:.2f}, {share:.0%} of its volume: {too_small()}"
        )
    return facts


class _Blend(Generic[Key]):
    """The distances of one structure, averaged over overlapping regions."""

    def __init__(self, key: Key, grid: FineGrid) -> None:
        self.key, self.grid = key, grid
        self.waiting = 0  # regions that are in a batch
        self._total = np.zeros(grid.mask.shape, np.float32)
        self._weights = np.zeros(grid.mask.shape, np.float32)

    def regions(self) -> Iterator[tuple[tuple[int, ...], dict[str, Any]]]:
        """Start and sample of each region with surface; the others are blended at once."""
        shape = self.grid.mask.shape
        for start in itertools.product(*(region_starts(0, n, 0, n - FINE, STRIDE) for n in shape)):
            at = tuple(slice(s, s + FINE) for s in start)
            mask = self.grid.mask[at]
            if mask.any() and not mask.all():
                distance = np.where(mask, np.float32(-TRUNCATION_VOX), np.float32(TRUNCATION_VOX))
                about = {"affine": self.grid.affine, "spacing": SPACING_MM, "meta": {}}
                yield start, {**region_arrays(self.grid.image[at], distance), **about}
            else:
                self.add(start, np.float32(-CELL if mask.all() else CELL))

    def add(self, start: Sequence[int], distance: Array | np.float32) -> None:
        at = tuple(slice(s, s + FINE) for s in start)
        self._total[at] += _WEIGHT * distance
        self._weights[at] += _WEIGHT

    def field(self) -> Array:
        average: Array = self._total / self._weights
        return average


@torch.inference_mode()
def predict_fields(
    model: Trainee, grids: Iterable[tuple[Key, FineGrid]], batch_size: int = 8
) -> Iterator[tuple[Key, FineGrid, Array]]:
    """The decoder's distances on each grid, (X, Y, Z) float32 in fine voxels, negative inside.

    grids: read one by one; the regions of several share a batch. Regions of one grid overlap by at least half; there, their distances
    are averaged with weights that decrease towards the faces of a region. A region whose mask is completely full or empty
    has no token and keeps the upsampled coarse segmentation.
    """
    device = next(model.parameters()).device
    batch: list[tuple[_Blend[Key], tuple[int, ...], dict[str, Any]]] = []
    blends: deque[_Blend[Key]] = deque()

    def run() -> None:
        if not batch:
            return
        regions = collate_regions([sample for _, _, sample in batch]).to(device)
        predicted = predict(model, regions).float().cpu().numpy()
        for (blend, start, _), distance in zip(batch, predicted, strict=True):
            blend.add(start, distance)
            blend.waiting -= 1
        batch.clear()

    def finished(last: bool) -> Iterator[tuple[Key, FineGrid, Array]]:
        while blends and not blends[0].waiting and (last or len(blends) > 1):
            blend = blends.popleft()
            yield blend.key, blend.grid, blend.field()

    for key, grid in grids:
        blends.append(_Blend(key, grid))
        for start, sample in blends[-1].regions():
            batch.append((blends[-1], start, sample))
            blends[-1].waiting += 1
            if len(batch) == batch_size:
                run()
                yield from finished(last=False)
    run()
    yield from finished(last=True)
