"""The inputs of the models: tokens at active cells, and batches of regions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import default_collate

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
        moved = {name: x.to(device) for name, x in vars(self).items() if hasattr(x, "to")}
        latents = self.latents and {name: x.to(device) for name, x in self.latents.items()}
        return replace(self, **moved, latents=latents)


DENSE = {"coarse", "base_vox", "sdf_vox", "image", "affine", "spacing", "latents", "condition"}
"""What has one shape in all samples."""


def collate_regions(samples: Sequence[dict[str, Any]]) -> RegionBatch:
    """Samples of `RegionDataset`, with or without latents → one batch."""
    names = DENSE & samples[0].keys()
    fields = default_collate([{name: sample[name] for name in names} for sample in samples])
    if "slat_coords" in samples[0]:
        fields["slat"] = _tokens(samples, "slat_feats", "slat_coords")
    tokens = _tokens(samples, "feats", "coords")
    return RegionBatch(tokens=tokens, meta=[s["meta"] for s in samples], **fields)


def _tokens(samples: Sequence[dict[str, Any]], feats: str, coords: str) -> SparseTokens:
    """The tokens of all samples, the sample's number in front of the cells (T, 3) of each."""
    cells = [torch.as_tensor(sample[coords]) for sample in samples]
    numbered = [pad(cell, (1, 0), value=number) for number, cell in enumerate(cells)]
    return SparseTokens(
        torch.cat([torch.as_tensor(sample[feats]) for sample in samples]), torch.cat(numbered)
    )
