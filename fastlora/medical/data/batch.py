"""The inputs of the models: tokens at active cells, and batches of regions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastlora.errors import DataError


@dataclass(frozen=True, eq=False)
class SparseTokens:
    """Features at active cells.

    feats: (T, C), one row per token. coords: (T, 4) int64, `[sample, i, j, k]` of each token's cell,
    sorted by sample. Raises: DataError if the shapes do not match.
    """

    feats: Tensor
    coords: Tensor

    def __post_init__(self) -> None:
        if self.feats.ndim != 2:
            raise DataError(f"feats: expected (T, C), got {tuple(self.feats.shape)}")
        if self.coords.shape != (len(self.feats), 4):
            raise DataError(
                f"coords: expected ({len(self.feats)}, 4), got {tuple(self.coords.shape)}"
            )

    def replace(self, feats: Tensor) -> SparseTokens:
        """Other features at the same cells."""
        return SparseTokens(feats, self.coords)

    def to(self, device: torch.device | str) -> SparseTokens:
        """The same tokens on another device."""
        return SparseTokens(self.feats.to(device), self.coords.to(device))


@dataclass(frozen=True, eq=False)
class RegionBatch:
    """A batch of regions; shapes as in `RegionDataset` with B in front, the tokens concatenated.

    If the data set provides them, slat: cached latents at voxels, of SAM 3D's decoder; latents:
    (B, N, C) by name, of its stage-1 model; condition: (B, L, D), of a generator.
    """

    tokens: SparseTokens
    coarse: Tensor
    base_vox: Tensor
    sdf_vox: Tensor
    image: Tensor
    affine: Tensor
    spacing: Tensor
    meta: list[dict[str, str]]
    slat: SparseTokens | None = None
    latents: dict[str, Tensor] | None = None
    condition: Tensor | None = None

    def __len__(self) -> int:
        return len(self.meta)

    def to(self, device: torch.device | str) -> RegionBatch:
        """The same batch on another device."""
        kept = ("meta", "latents")
        moved = {n: v.to(device) for n, v in vars(self).items() if n not in kept and v is not None}
        latents = self.latents and {name: x.to(device) for name, x in self.latents.items()}
        return RegionBatch(**moved, meta=self.meta, latents=latents)


def collate_regions(samples: Sequence[dict[str, Any]]) -> RegionBatch:
    """Samples of `RegionDataset`, with or without latents → one batch."""
    first = samples[0]
    arrays = ("coarse", "base_vox", "sdf_vox", "image", "affine")
    fields: dict[str, Any] = {
        name: torch.from_numpy(np.stack([s[name] for s in samples])) for name in arrays
    }
    if "slat_coords" in first:
        feats = torch.cat([s["slat_feats"] for s in samples])
        fields["slat"] = SparseTokens(feats, _coords([s["slat_coords"].numpy() for s in samples]))
    if "latents" in first:
        names = first["latents"]
        fields["latents"] = {n: torch.stack([s["latents"][n] for s in samples]) for n in names}
    if "condition" in first:
        fields["condition"] = torch.stack([s["condition"] for s in samples])
    feats = torch.from_numpy(np.concatenate([s["feats"] for s in samples]))
    return RegionBatch(
        tokens=SparseTokens(feats, _coords([s["coords"] for s in samples])),
        spacing=torch.tensor([s["spacing"] for s in samples], dtype=torch.float64),
        meta=[s["meta"] for s in samples],
        **fields,
    )


def _coords(cells: Sequence[NDArray[np.int64]]) -> Tensor:
    """Cells (T, 3) of each sample → (T, 4) of the batch, the sample's number in front."""
    numbers = np.repeat(np.arange(len(cells)), [len(c) for c in cells])
    return torch.from_numpy(np.column_stack([numbers, np.concatenate(cells)]))
