"""Check the structures of a data set and prepare them, case by case, for slices and for regions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import trimesh

from fastlora.errors import ConfigError, DataError
from fastlora.files import atomic_write
from fastlora.medical.data.geometry import spacing_of
from fastlora.medical.data.grids import StructureGrid, grid_path
from fastlora.medical.data.manifest import Outcome, digest
from fastlora.medical.data.prepared import Prepared, SliceConfig, cache_path, load_prepared
from fastlora.medical.data.slices import slice_indices
from fastlora.medical.data.splits import region_specs
from fastlora.medical.data.volumes import Case, Volume

__all__ = ["Outcome", "Plan", "preprocess"]


@dataclass(frozen=True)
class Plan:
    """What to do with each structure. mesh_dir: where PLY files go, None for none."""

    axes: Sequence[int]
    config: SliceConfig
    cache_dir: Path
    mesh_dir: Path | None = None
    skip_invalid: bool = False


def preprocess(
    selected: Sequence[tuple[Case, str]], plan: Plan, num_workers: int = 0
) -> Iterator[Outcome]:
    """Prepare (case, structure) pairs, yielding one outcome each; a case's image is read once.

    What already lies in the cache is not computed again, so a run that was stopped goes on.
    num_workers: processes, each with a case at a time; 0 works in this one.
    Raises: ConfigError on a negative number; DataError at the first structure that cannot be used,
        unless the plan skips those.
    """
    if num_workers < 0:
        raise ConfigError(f"num_workers: expected 0 or more processes, got {num_workers}")
    cases: dict[tuple[Path, object], tuple[Case, list[str]]] = {}
    for case, structure in selected:
        cases.setdefault((case.image_path, case.part), (case, []))[1].append(structure)
    work = partial(_case_outcomes, plan)
    if num_workers == 0:
        for item in cases.values():
            yield from work(item)
        return
    with ProcessPoolExecutor(num_workers) as pool:
        for outcomes in pool.map(work, cases.values()):
            yield from outcomes


def _case_outcomes(plan: Plan, item: tuple[Case, list[str]]) -> list[Outcome]:
    case, structures = item
    try:
        image = case.load_image()
        image_digest = digest(case.image_path)
    except DataError as error:
        if not plan.skip_invalid:
            raise
        return [Outcome(case.subject, structure, str(error)) for structure in structures]
    outcomes = []
    for structure in structures:
        try:
            outcomes.append(_outcome(plan, case, structure, image, image_digest))
        except DataError as error:
            if not plan.skip_invalid:
                raise
            outcomes.append(Outcome(case.subject, structure, str(error)))
    return outcomes


def _outcome(plan: Plan, case: Case, structure: str, image: Volume, image_digest: str) -> Outcome:
    prepared = load_prepared(case, structure, plan.config, plan.cache_dir, image)
    StructureGrid.load(case, structure, plan.cache_dir, image)
    regions = region_specs(case, structure, cache_dir=plan.cache_dir)
    files = [
        cache_path(case, structure, plan.config, plan.cache_dir),
        grid_path(case, structure, plan.cache_dir),
    ]
    if plan.mesh_dir is not None:
        files.append(plan.mesh_dir / f"{case.subject}-{structure}.ply")
        _write_mesh(prepared, files[-1])
    mask_path = case.structures[structure].path
    spacing = spacing_of(prepared.affine)
    slices = [len(slice_indices(prepared.mask, a, plan.config.min_area_px)) for a in plan.axes]
    return Outcome(
        case.subject,
        structure,
        None,
        prepared.shape,
        tuple(spacing.tolist()),
        float(prepared.mask.sum() * np.prod(spacing) / 1000),
        tuple(slices),
        len(regions),
        {str(case.image_path): image_digest, str(mask_path): digest(mask_path)},
        {str(file.relative_to(plan.cache_dir)): digest(file) for file in files},
    )


def _write_mesh(prepared: Prepared, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    mesh = trimesh.Trimesh(prepared.vertices, prepared.faces, process=False)
    atomic_write(path, mesh.export(file_type="ply"))
