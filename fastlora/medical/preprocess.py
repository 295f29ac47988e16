"""Check the structures of a data set and prepare them for `TS_SAM3D_Dataset`, case by case."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import trimesh

from fastlora.errors import ConfigError, DataError
from fastlora.medical.geometry import spacing_of
from fastlora.medical.prepared import Prepared, SliceConfig, load_prepared
from fastlora.medical.slices import slice_indices
from fastlora.medical.volumes import Case


@dataclass(frozen=True)
class Outcome:
    """What became of one structure: its size, or the problem for which it was left out."""

    subject: str
    structure: str
    problem: str | None = None
    shape: tuple[int, ...] = ()
    spacing: tuple[float, ...] = ()
    volume_ml: float = 0.0
    slices: tuple[int, ...] = ()


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

    num_workers: processes, each with a case at a time; 0 works in this one.
    Raises: ConfigError on a negative number; DataError at the first structure that cannot be used,
        unless the plan skips those.
    """
    if num_workers < 0:
        raise ConfigError(f"num_workers: expected 0 or more processes, got {num_workers}")
    cases: dict[Path, tuple[Case, list[str]]] = {}
    for case, structure in selected:
        cases.setdefault(case.image_path, (case, []))[1].append(structure)
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
    except DataError as error:
        if not plan.skip_invalid:
            raise
        return [Outcome(case.subject, structure, str(error)) for structure in structures]
    outcomes = []
    for structure in structures:
        try:
            prepared = load_prepared(case, structure, plan.config, plan.cache_dir, image)
        except DataError as error:
            if not plan.skip_invalid:
                raise
            outcomes.append(Outcome(case.subject, structure, str(error)))
        else:
            if plan.mesh_dir is not None:
                _write_mesh(prepared, plan.mesh_dir / f"{case.subject}-{structure}.ply")
            outcomes.append(_outcome(case.subject, structure, prepared, plan))
    return outcomes


def _outcome(subject: str, structure: str, prepared: Prepared, plan: Plan) -> Outcome:
    spacing = spacing_of(prepared.affine)
    slices = [len(slice_indices(prepared.mask, a, plan.config.min_area_px)) for a in plan.axes]
    return Outcome(
        subject,
        structure,
        None,
        prepared.shape,
        tuple(spacing.tolist()),
        float(prepared.mask.sum() * np.prod(spacing) / 1000),
        tuple(slices),
    )


def _write_mesh(prepared: Prepared, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    mesh = trimesh.Trimesh(prepared.vertices, prepared.faces, process=False)
    partial_path = path.with_name(f".partial-{path.name}")
    mesh.export(partial_path)
    partial_path.replace(path)
