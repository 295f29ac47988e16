"""The regions that a `TrainConfig` names: which cases, which structures, which side of the split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from fastlora.errors import ConfigError
from fastlora.medical.bundled import build_bundled
from fastlora.medical.phantom import write_phantom_dataset
from fastlora.medical.regions import RegionDataset
from fastlora.medical.splits import RegionSpec, kind_of, make_splits
from fastlora.medical.train_config import TrainConfig, nearest
from fastlora.medical.layouts import find_cases
from fastlora.medical.volumes import Case, Modality

BUNDLED = Path("data/bundled")
SYNTHETIC = Path("data/synthetic")


def load_cases(config: TrainConfig) -> list[Case]:
    """The cases that `config` names, with the structures of `config.classes`; made on first use if they are ours.

    Raises:
        DataError: a folder is missing or holds no cases. ConfigError: a class that no case has.
    """
    if config.demo == "synthetic":
        cases = write_phantom_dataset(SYNTHETIC, seed=config.seed)
    elif config.data_root:
        cases = find_cases(config.data_root, cast(Modality, config.modality))
    else:
        cases = build_bundled(BUNDLED)
    return cases if config.classes is None else _only(cases, config.classes)


def _only(cases: Sequence[Case], classes: Sequence[str]) -> list[Case]:
    """The cases with the structures whose name or kind (`vertebra` of `vertebra_22`) is among `classes`."""
    structures = {name for case in cases for name in case.structures}
    known = structures | {kind_of(name) for name in structures}
    for name in classes:
        if name not in known:
            raise ConfigError(
                f"classes: no case has {name!r}{nearest(name, known)}; there are: {', '.join(sorted(structures))}"
            )
    wanted = set(classes)
    kept = [
        replace(
            case, structures={n: s for n, s in case.structures.items() if {n, kind_of(n)} & wanted}
        )
        for case in cases
    ]
    return [case for case in kept if case.structures]


def load_splits(config: TrainConfig) -> dict[str, list[RegionSpec]]:
    """The regions of every side of the split that `config` names. Raises as `load_cases` and `make_splits`."""
    return make_splits(load_cases(config), config.split)


def load_train_data(config: TrainConfig) -> tuple[RegionDataset, RegionDataset]:
    """The training regions, and those of the training side that choose the best epoch."""
    splits = load_splits(config)
    train = RegionDataset(
        splits["train"],
        augment=config.augment,
        seed=config.seed,
        samples_per_region=config.samples_per_region,
    )
    return train, RegionDataset(splits["val"])
