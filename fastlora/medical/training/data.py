"""The regions that a `TrainConfig` names: which cases, which structures, which side of the split."""

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
from fastlora.medical.sam3d.folder import latent_shape, read_generator
from fastlora.medical.sam3d.latents import CachedRegions, slat_reader, structure_reader
from fastlora.medical.training.config import TrainConfig

BUNDLED = Path("data/bundled")
SYNTHETIC = Path("data/synthetic")


def load_cases(config: TrainConfig) -> list[Case]:
    """The cases that `config` names, with the structures of `config.classes`; made on first use if they are ours.

    Raises:
        DataError: a folder is missing or holds no cases, or the cache is of other data. ConfigError: a class that no case has.
    """
    if config.demo == "synthetic":
        cases = write_phantom_dataset(SYNTHETIC, seed=config.seed)
    elif config.data_root:
        # With a cache, what its manifest does not list is left out: broken cases need not stop here.
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
    """The regions of every side of the split that `config` names. Raises as `load_cases` and `make_splits`."""
    cases = load_cases(config)
    try:
        return make_splits(cases, config.split, cache_dir=config.cache_dir)
    except DataError as error:
        if config.data_root is None or config.cache_dir is not None:
            raise
        raise DataError(
            f"{error} (preprocess_medical.py --skip_invalid finds out what can be used, and --cache_dir "
            "takes nothing else)"
        ) from error


def with_latents(regions: RegionDataset, config: TrainConfig) -> RegionDataset | CachedRegions:
    """The regions, with the cached latents of `config.latents_dir` if it names them. Raises: DataError if one lacks them."""
    if config.latents_dir is None:
        return regions
    folder = str(config.sam3d_dir)
    if config.sam3d_part == "decoder":
        return CachedRegions(regions, config.latents_dir, slat_reader(*latent_shape(folder)))
    about = read_generator(folder, config.sam3d_part)
    if about.resolution is not None:
        channels = about.latents["feats"][1]
        read = slat_reader(about.resolution, channels, about.condition_channels)
    else:
        read = structure_reader(about.latents, about.condition_channels)
    return CachedRegions(regions, config.latents_dir, read)


def load_train_data(
    config: TrainConfig,
) -> tuple[RegionDataset | CachedRegions, RegionDataset | CachedRegions]:
    """The training regions, and those of the training side that choose the best epoch."""
    splits = load_splits(config)
    train = RegionDataset(
        splits["train"],
        augment=config.augment,
        seed=config.seed,
        samples_per_region=config.samples_per_region,
        cache_dir=config.cache_dir,
    )
    val = RegionDataset(splits["val"], cache_dir=config.cache_dir)
    return with_latents(train, config), with_latents(val, config)
