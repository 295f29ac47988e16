"""The data of a run: its cases, the regions of each subset of the split, and the micro-batches of an epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch.utils.data import DataLoader

from fastlora.errors import DataError
from fastlora.medical.data.batch import RegionBatch, collate_regions
from fastlora.medical.data.bundled import build_bundled
from fastlora.medical.data.manifest import usable_cases
from fastlora.medical.data.phantom import write_phantom_dataset
from fastlora.medical.data.regions import RegionDataset
from fastlora.medical.data.splits import RegionSpec, make_splits, select_structures
from fastlora.medical.scans.layouts import find_cases
from fastlora.medical.scans.volumes import Case
from fastlora.medical.scans.windows import Modality
from fastlora.medical.training.config import TrainConfig
from fastlora.medical.training.distributed import Processes
from fastlora.medical.training.faults import ignore_interrupts

BUNDLED = Path("data/bundled")
SYNTHETIC = Path("data/synthetic")


class RegionData(Protocol):
    """A dataset for the trainer, such as `RegionDataset`."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    def set_epoch(self, epoch: int) -> None: ...


def load_cases(config: TrainConfig) -> list[Case]:
    """The cases of a configuration, with the structures of `config.classes`; bundled and synthetic ones are built on first use.

    Raises: DataError if a folder is missing or holds no cases, the cache is of other data, or no case has one of the classes.
    """
    if config.demo == "synthetic":
        cases = write_phantom_dataset(SYNTHETIC, seed=config.seed)
    elif config.data_root:
        # With a cache, only the cases of its manifest are used, so unusable cases that it leaves out are not errors.
        problems: list[str] | None = None if config.cache_dir is None else []
        modality = cast(Modality, config.modality)
        cases = find_cases(
            *(config.data_root, modality, problems, config.channel),
            intercept=config.intercept,
            tolerance_mm=config.grid_tolerance,
        )
    else:
        cases = build_bundled(BUNDLED)
    if config.cache_dir is not None:
        cases = usable_cases(cases, Path(config.cache_dir))
    return select_structures(cases, config.classes)


def load_splits(config: TrainConfig) -> dict[str, list[RegionSpec]]:
    """The regions of each subset of the configuration's split. Raises: as `load_cases` and `make_splits`."""
    cases = load_cases(config)
    try:
        return make_splits(cases, config.split, cache_dir=config.cache_dir)
    except DataError as error:
        if config.data_root is None or config.cache_dir is not None:
            raise
        raise DataError(
            f"{error} (`fastlora-medical preprocess --skip_invalid` lists the usable structures, and --cache_dir "
            "restricts training to them)"
        ) from error


def load_train_data(config: TrainConfig) -> tuple[RegionData, RegionData]:
    """The training regions, and the validation regions, which select the best epoch. Raises: as `load_splits`."""
    splits = load_splits(config)
    train = RegionDataset(
        splits["train"],
        augment=config.augment,
        seed=config.seed,
        samples_per_region=config.samples_per_region,
        cache_dir=config.cache_dir,
    )
    val = RegionDataset(splits["val"], cache_dir=config.cache_dir)
    return config.options.regions(train), config.options.regions(val)


def epoch_order(seed: int, epoch: int, size: int) -> list[int]:
    """The order of `size` regions in an epoch: a permutation that is a pure function of the arguments."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(size, generator=generator).tolist()


def micro_batches(
    data: RegionData, order: Sequence[int], size: int, processes: Processes, workers: int = 0
) -> Iterator[tuple[RegionBatch, int, int]]:
    """This process's share of each micro-batch of `size` regions, the number of its regions that count, and that of all processes.

    A process without a share computes the first region with a count of 0: the others wait for its shards of the weights and for
    its gradients.
    """
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    shares = [processes.share(batch) for batch in batches]
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
