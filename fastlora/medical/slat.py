"""Cached latents: for each region a file with the structured latent (SLat) that SAM 3D Objects made of it.

`<subject>-<structure>@<i.j.k>.safetensors` or `.npz` (the region's name as evaluations and errors give it) holds

    coords  (T, 3) integers, the active voxels of the decoder's grid, each once; the region fills the grid, axes in its order
    feats   (T, C) floating-point numbers, the latents, as the decoder takes them: not normalised
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fastlora import files
from fastlora.errors import DataError
from fastlora.medical.grids import FINE
from fastlora.medical.losses import TRUNCATION_VOX
from fastlora.medical.regions import RegionDataset

KINDS = ("safetensors", "npz")
MIN_SHARE = 0.5
"""Part of the voxels that must lie near the region's surface, and of the surface that must lie in voxels."""


def slat_path(folder: Path, meta: Mapping[str, str]) -> Path:
    """The file of a region. Raises: DataError if there is none, or two."""
    stem = f"{meta['subject']}-{meta['region']}"
    found = [path for kind in KINDS if (path := folder / f"{stem}.{kind}").is_file()]
    if len(found) != 1:
        raise DataError(
            f"slat_dir: expected {folder / stem}.safetensors or .npz, got {'both' if found else 'neither'}"
        )
    return found[0]


def read_slat(path: Path) -> dict[str, Tensor]:
    """`coords` (T, 3) int64 and `feats` (T, C) float32 of a file; nothing in it is run, and no size in it is trusted.

    Raises: DataError if it cannot be read, or holds anything else.
    """
    try:
        found = load_file(path) if path.suffix == ".safetensors" else _read_npz(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(f"slat_dir: cannot read {path}: {error}") from error
    if found.keys() != {"coords", "feats"}:
        raise DataError(f"slat_dir: {path}: expected coords and feats, got {sorted(found)}")
    coords, feats = found["coords"], found["feats"]
    if coords.ndim != 2 or coords.shape[1] != 3 or coords.is_floating_point() or len(coords) == 0:
        raise DataError(
            f"slat_dir: {path}: coords: expected (T, 3) integers, got {tuple(coords.shape)} {coords.dtype}"
        )
    if feats.ndim != 2 or len(feats) != len(coords) or not feats.is_floating_point():
        raise DataError(
            f"slat_dir: {path}: feats: expected ({len(coords)}, C) floats, got {tuple(feats.shape)} {feats.dtype}"
        )
    if not bool(torch.isfinite(feats).all()):
        raise DataError(f"slat_dir: {path}: feats: expected finite numbers")
    return {"coords": coords.long(), "feats": feats.float()}


def _read_npz(path: Path) -> dict[str, Tensor]:
    """The arrays of an uncompressed `.npz`, of numbers. Raises: as `files.read_arrays`."""
    found = {}
    for name, array in files.read_arrays(path).items():
        if array.dtype.kind not in "iuf":
            raise ValueError(f"{name}: expected numbers, got {array.dtype}")
        kind = np.float32 if array.dtype.kind == "f" else np.int64
        found[name] = torch.from_numpy(array.astype(kind))
    return found


def check_slat(
    slat: Mapping[str, Tensor], sdf_vox: NDArray[np.float32], resolution: int, channels: int, where: str
) -> None:  # fmt: skip
    """Checks that latents belong to a decoder and a region.

    sdf_vox: (32, 32, 32), the region's truth. resolution, channels: the decoder's. where: for the message.

    Raises: DataError, saying what does not fit; among it a region whose surface is elsewhere (another window, mirrored axes).
    """
    coords, feats = slat["coords"], slat["feats"]
    if feats.shape[1] != channels:
        raise DataError(f"{where}: feats: expected (T, {channels}), got {tuple(feats.shape)}")
    if bool((coords < 0).any()) or bool((coords >= resolution).any()):
        raise DataError(
            f"{where}: coords: expected 0 to {resolution - 1}, got {int(coords.min())} to {int(coords.max())}"
        )
    if len(torch.unique(coords, dim=0)) != len(coords):
        raise DataError(f"{where}: coords: expected each voxel once, got some again")
    edge = FINE / resolution
    fine = ((coords + 0.5) * edge).long().numpy()
    near = np.abs(sdf_vox) < TRUNCATION_VOX
    share = float(near[tuple(fine.T)].mean())
    crossed = np.argwhere(np.abs(sdf_vox) < 1)
    active = np.zeros(3 * [resolution], bool)
    active[tuple(coords.numpy().T)] = True
    covered = active[tuple(((crossed + 0.5) / edge).astype(np.int64).T)]
    # A voxel smaller than ours is only one of those that a fine voxel of ours spans: then the share of voxels must do.
    reach = float(covered.mean()) if edge >= 1 and len(crossed) else 1.0
    if share < MIN_SHARE or reach < MIN_SHARE:
        raise DataError(
            f"{where}: expected the latents of this region, got voxels of which {share:.0%} lie within {TRUNCATION_VOX:g} fine "
            f"voxels of its surface, and which hold {reach:.0%} of it"
        )


class SlatRegions:
    """`regions` with the cached latents of each: samples gain `slat_coords` and `slat_feats`.

    Raises: DataError if a region lacks its file, or the file does not fit it. All are looked at here, none later for the first time.
    """

    def __init__(
        self, regions: RegionDataset, folder: str | Path, resolution: int, channels: int
    ) -> None:
        self.regions, self.folder = regions, Path(folder)
        self.resolution, self.channels = resolution, channels
        for index in range(len(regions.specs)):
            self[index]

    def identity(self) -> str:
        """As `RegionDataset.identity`."""
        return self.regions.identity()

    def set_epoch(self, epoch: int) -> None:
        """As `RegionDataset.set_epoch`."""
        self.regions.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.regions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.regions[index]
        path = slat_path(self.folder, sample["meta"])
        slat = read_slat(path)
        check_slat(slat, sample["sdf_vox"], self.resolution, self.channels, f"slat_dir: {path}")
        return {**sample, "slat_coords": slat["coords"], "slat_feats": slat["feats"]}
