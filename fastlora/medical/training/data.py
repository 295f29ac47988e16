"""The regions of a configuration: cases, structures and sides of the split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from fastlora.errors import ConfigError, DataError, nearest
from fastlora.medical.data.bundled import build_bundled
from fastlora.medical.data.layouts import find_cases
from fastlora.medical.data.manifest import usable_cases
from fastlora.medical.data.phantom import write_phantom_dataset
from fastlora.medical.data.regions import RegionDataset
from fastlora.medical.data.splits import RegionSpec, kind_of, make_splits
from fastlora.medical.data.volumes import Case, Modality
from fastlora.medical.training.batches import RegionData
from fastlora.medical.training.config import TrainConfig

BUNDLED = Path("data/bundled")
SYNTHETIC = Path("data/synthetic")


def load_cases(config: TrainConfig) -> list[Case]:
    """The cases of a configuration, with the structures of `config.classes`; bundled and synthetic ones are built on first use.

    Raises: DataError if a folder is missing or holds no cases, or the cache is of other data. ConfigError if no case has a class.
    """
    if config.demo == "synthetic":
        cases = write_phantom_dataset(SYNTHETIC, seed=config.seed)
    elif config.data_root:
        # With a cache, only the cases of its manifest are used: a broken one that it leaves out is no error.
        problems: list[str] | None = None if config.cache_dir is None else []
        modality = cast(Modality, config.modality)
        cases = find_cases(config.data_root, modality, problems, config.channel)
    else:
        cases = build_bundled(BUNDLED)
    if config.cache_dir is not None:
        cases = usable_cases(cases, Path(config.cache_dir))
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
    """The regions of each side of the configuration's split. Raises: as `load_cases` and `make_splits`."""
    cases = load_cases(config)
    try:
        return make_splits(cases, config.split, cache_dir=config.cache_dir)
    except DataError as error:
        if config.data_root is None or config.cache_dir is not None:
            raise
        raise DataError(
            f"{error} (preprocess_medical.py --skip_invalid lists the usable structures, and --cache_dir "
            "restricts training to them)"
        ) from error


def load_train_data(config: TrainConfig) -> tuple[RegionData, RegionData]:
    """The training regions, and those of the training side that choose the best epoch. Raises: as `load_splits`."""
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
