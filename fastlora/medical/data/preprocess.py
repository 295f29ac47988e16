"""Check the structures of a data set and fill the cache, case by case."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import trimesh
from nibabel.affines import voxel_sizes

from fastlora.errors import ConfigError, DataError
from fastlora.files import atomic_write
from fastlora.medical.data.grids import SPACING_MM, StructureGrid, grid_path
from fastlora.medical.data.manifest import Outcome, digest
from fastlora.medical.data.slice_source import SliceConfig, cache_path, load_prepared
from fastlora.medical.data.slices import slice_indices
from fastlora.medical.data.splits import region_specs
from fastlora.medical.data.volumes import Case, Volume


@dataclass(frozen=True)
class PreprocessConfig:
    """What to prepare for each structure in addition to its grid (training reads only the grid).

    slices: cache what `TS_SAM3D_Dataset` reads. meshes: write PLY files to `meshes/` in the cache.
    axes, slice_config: settings of slices and meshes. skip_invalid: yield an outcome with a problem
    instead of raising.
    """

    cache_dir: Path
    slices: bool = False
    meshes: bool = False
    axes: Sequence[int] = (0, 1, 2)
    slice_config: SliceConfig = SliceConfig()
    skip_invalid: bool = False


def preprocess(
    cases: Sequence[Case], config: PreprocessConfig, num_workers: int = 0
) -> Iterator[Outcome]:
    """Prepare all structures of the cases and yield an outcome for each; a case's image is read once.

    Entries already in the cache are not recomputed, so an interrupted run can be continued; meshes
    are recomputed unless slices are cached too.

    num_workers: processes, each working on one case at a time; 0 uses the calling process.
    Raises: ConfigError if it is negative; DataError at the first structure that cannot be used,
    unless the config skips those.
    """
    if num_workers < 0:
        raise ConfigError(f"num_workers: expected 0 or more processes, got {num_workers}")
    work = partial(_case_outcomes, config)
    if num_workers == 0:
        for case in cases:
            yield from work(case)
        return
    with ProcessPoolExecutor(num_workers) as pool:
        for outcomes in pool.map(work, cases):
            yield from outcomes


def _case_outcomes(config: PreprocessConfig, case: Case) -> list[Outcome]:
    skipped = (DataError,) if config.skip_invalid else ()
    try:
        image = case.load_image()
        image_digest = digest(case.image_path)
    except skipped as error:
        return [Outcome(case.subject, structure, str(error)) for structure in case.structures]
    outcomes = []
    for structure in case.structures:
        try:
            outcomes.append(_outcome(config, case, structure, image, image_digest))
        except skipped as error:
            outcomes.append(Outcome(case.subject, structure, str(error)))
    return outcomes


def _outcome(
    config: PreprocessConfig, case: Case, structure: str, image: Volume, image_digest: str
) -> Outcome:
    cache_dir = config.cache_dir
    facts: dict[str, Any] = {}
    grid = StructureGrid.load(case, structure, cache_dir, image)
    regions = region_specs(case, structure, cache_dir=cache_dir)
    files = [grid_path(case, structure, cache_dir)]
    mask_path = case.structures[structure].path
    if config.slices or config.meshes:
        entries = cache_dir if config.slices else None
        prepared = load_prepared(case, structure, config.slice_config, entries, image)
        if config.slices:
            files.append(cache_path(case, structure, config.slice_config, cache_dir))
            least = config.slice_config.min_area_px
            facts = {
                "shape": prepared.mask.shape,
                "spacing": tuple(voxel_sizes(prepared.affine).tolist()),
                "slices": tuple(len(slice_indices(prepared.mask, a, least)) for a in config.axes),
            }
        if config.meshes:
            files.append(cache_dir / "meshes" / f"{case.subject}-{structure}.ply")
            files[-1].parent.mkdir(exist_ok=True)
            mesh = trimesh.Trimesh(prepared.vertices, prepared.faces, process=False)
            atomic_write(files[-1], mesh.export(file_type="ply"))
    return Outcome(
        case.subject,
        structure,
        volume_ml=float((grid.sdf_vox < 0).sum() * SPACING_MM**3 / 1000),
        regions=len(regions),
        sources={str(case.image_path): image_digest, str(mask_path): digest(mask_path)},
        files={str(file.relative_to(cache_dir)): digest(file) for file in files},
        **facts,
    )
