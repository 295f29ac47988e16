"""Cached latents: for each region a file with the outputs of SAM 3D Objects' encoders and embedders.

`<subject>-<structure>@<i.j.k>.safetensors` or `.npz` (the region's name as in evaluations and errors) contains for the mesh
decoder and for the generator "slat" the structured latent (SLat)

    coords     (T, 3) integers, the active voxels of the decoder's grid, each once; the region fills the grid, axes in its order
    feats      (T, C) floating-point numbers, the latents as the decoder expects them: not normalised

for the generator "structure" each of its latents by name, (N, C), as the generator outputs them, and for both generators

    condition  (L, D), the region's embedded image
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
from fastlora.medical.data.grids import FINE, TRUNCATION_VOX
from fastlora.medical.data.regions import RegionDataset
from fastlora.medical.sam3d.loading import PartSettings

Size = tuple[int | None, int | None]
"""Rows and columns of a table; None for any number."""

KINDS = ("safetensors", "npz")
MIN_SHARE = 0.5
"""Least fraction of the voxels near the region's surface, and of the surface inside voxels."""


def latents_path(folder: Path, meta: Mapping[str, str]) -> Path:
    """The file of a region. Raises: DataError if there is none, or two."""
    stem = f"{meta['subject']}-{meta['region']}"
    found = [path for kind in KINDS if (path := folder / f"{stem}.{kind}").is_file()]
    if len(found) != 1:
        raise DataError(
            f"latents_dir: expected {folder / stem}.safetensors or .npz, got {'both' if found else 'neither'}"
        )
    return found[0]


def read_latents(path: Path, about: PartSettings) -> dict[str, Tensor]:
    """The tables of an untrusted file by name: a part's latents and `condition`, float32; on a grid also `coords`, int64.

    about: the part. A file for the decoder may also hold a condition.

    Raises: DataError if the file cannot be read, or its tables are not those of the part.
    """
    sizes: dict[str, Size] = {} if about.resolution is None else {"coords": (None, 3)}
    sizes |= about.latents
    if about.condition_channels is not None:
        sizes["condition"] = None, about.condition_channels
    try:
        found = load_file(path) if path.suffix == ".safetensors" else _read_npz(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(f"latents_dir: cannot read {path}: {error}") from error
    optional = {"condition"} - sizes.keys()
    if found.keys() - optional != sizes.keys():
        raise DataError(
            f"latents_dir: {path}: expected {', '.join(sizes)}, got {', '.join(sorted(found))}"
        )
    for name, value in found.items():
        size, floats = sizes.get(name, (None, None)), name != "coords"
        fits = value.ndim == 2 and len(value) > 0 and value.is_floating_point() == floats
        if not fits or any(n not in (None, m) for n, m in zip(size, value.shape, strict=True)):
            rows, columns = (n or letter for n, letter in zip(size, "NC", strict=True))
            raise DataError(
                f"latents_dir: {path}: {name}: expected ({rows}, {columns}) {'floats' if floats else 'integers'}, "
                f"got {tuple(value.shape)} {value.dtype}"
            )
        if floats and not bool(torch.isfinite(value).all()):
            raise DataError(f"latents_dir: {path}: {name}: expected finite numbers")
    if "coords" in found and len(found["coords"]) != len(found["feats"]):
        raise DataError(
            f"latents_dir: {path}: feats: expected ({len(found['coords'])}, C) floats, got {tuple(found['feats'].shape)}"
        )
    return {name: x.long() if name == "coords" else x.float() for name, x in found.items()}


def _read_npz(path: Path) -> dict[str, Tensor]:
    """The arrays of an uncompressed `.npz`, of numbers. Raises: as `files.read_arrays`."""
    found = {}
    for name, array in files.read_arrays(path).items():
        if array.dtype.kind not in "iuf":
            raise ValueError(f"{name}: expected numbers, got {array.dtype}")
        kind = np.float32 if array.dtype.kind == "f" else np.int64
        found[name] = torch.from_numpy(array.astype(kind))
    return found


def check_voxels(coords: Tensor, sdf_vox: NDArray[np.float32], resolution: int, where: str) -> None:
    """Checks that the voxels of latents belong to a grid and a region.

    coords: (T, 3) int64. sdf_vox: (32, 32, 32), the region's ground truth. resolution: of the grid. where: prefix of the message.

    Raises: DataError, naming the mismatch; also if the region's surface is elsewhere (another region, mirrored axes).
    """
    if bool((coords < 0).any()) or bool((coords >= resolution).any()):
        raise DataError(
            f"{where}: coords: expected 0 to {resolution - 1}, got {int(coords.min())} to {int(coords.max())}"
        )
    if len(torch.unique(coords, dim=0)) != len(coords):
        raise DataError(f"{where}: coords: expected each voxel once, got duplicates")
    edge = FINE / resolution
    fine = ((coords + 0.5) * edge).long().numpy()
    near = np.abs(sdf_vox) < TRUNCATION_VOX
    share = float(near[tuple(fine.T)].mean())
    crossed = np.argwhere(np.abs(sdf_vox) < 1)
    active = np.zeros(3 * [resolution], bool)
    active[tuple(coords.numpy().T)] = True
    covered = active[tuple(((crossed + 0.5) / edge).astype(np.int64).T)]
    # If the decoder's voxels are smaller than the region's, not all of them at the surface are active: only `share` is meaningful.
    reach = float(covered.mean()) if edge >= 1 and len(crossed) else 1.0
    if share < MIN_SHARE or reach < MIN_SHARE:
        raise DataError(
            f"{where}: expected the latents of this region, got voxels of which {share:.0%} lie within {TRUNCATION_VOX:g} fine "
            f"voxels of its surface, and which cover {reach:.0%} of it"
        )


class CachedRegions:
    """`regions` with the cached latents of each. Samples gain `slat_coords` and `slat_feats`, or `latents`, and `condition`.

    about: the part that the latents are for.

    Raises: DataError if a region lacks its file, the file does not fit it, or conditions differ in length. The constructor checks every
        file, so that training does not fail later.
    """

    def __init__(self, regions: RegionDataset, folder: str | Path, about: PartSettings) -> None:
        self.regions, self.folder, self.about = regions, Path(folder), about
        lengths: dict[int, str] = {}
        for index in range(len(regions.specs)):
            sample = self[index]
            if "condition" in sample:
                lengths[len(sample["condition"])] = sample["meta"]["region"]
        if len(lengths) > 1:
            raise DataError(
                f"latents_dir: {folder}: condition: expected the same number of rows in each file, got {lengths}"
            )

    def identity(self) -> str:
        """As `RegionDataset.identity`."""
        return self.regions.identity()

    def sources(self) -> str:
        """As `RegionDataset.sources`."""
        return self.regions.sources()

    def set_epoch(self, epoch: int) -> None:
        """As `RegionDataset.set_epoch`."""
        self.regions.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.regions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample, about = self.regions[index], self.about
        path = latents_path(self.folder, sample["meta"])
        found = read_latents(path, about)
        if about.condition_channels is not None:
            sample["condition"] = found.pop("condition")
        if about.resolution is None:
            return {**sample, "latents": found}
        check_voxels(found["coords"], sample["sdf_vox"], about.resolution, f"latents_dir: {path}")
        return {**sample, "slat_coords": found["coords"], "slat_feats": found["feats"]}
