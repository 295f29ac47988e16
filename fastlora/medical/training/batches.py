"""The regions of an epoch: their order, their micro-batches, and each rank's share of these."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader

from fastlora.medical.data.batch import RegionBatch, collate_regions
from fastlora.medical.training.distributed import Ranks
from fastlora.medical.training.faults import ignore_interrupts


class RegionData(Protocol):
    """A dataset for the trainer, such as `RegionDataset`."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    def set_epoch(self, epoch: int) -> None: ...


def epoch_order(seed: int, epoch: int, size: int) -> list[int]:
    """The order of `size` regions in an epoch: a permutation that is a pure function of the arguments."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(size, generator=generator).tolist()


def micro_batches(
    data: RegionData, order: Sequence[int], size: int, ranks: Ranks, workers: int = 0
) -> Iterator[tuple[RegionBatch, int, int]]:
    """This rank's share of each micro-batch of `size` regions, the number of its regions that count, and that of all ranks.

    A rank without a share computes the first region with a count of 0: the other ranks wait for its shards of the weights and
    for its gradients.
    """
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    shares = [ranks.share(batch) for batch in batches]
    loader: DataLoader[Any] = DataLoader(
        data,  # type: ignore[arg-type]
        batch_sampler=[share or [batch[0]] for share, batch in zip(shares, batches, strict=True)],
        collate_fn=collate_regions,
        num_workers=workers,
        worker_init_fn=ignore_interrupts,
        generator=torch.Generator(),  # seeds the workers without advancing the global generator
    )
    for loaded, share, batch in zip(loader, shares, batches, strict=True):
        yield loaded, len(share), len(batch)


def region_names(batch: RegionBatch) -> str:
    """The regions of a batch as text, for an error."""
    return ", ".join(f"{m['subject']}/{m['structure']} ({m['region']})" for m in batch.meta)
