"""Check the structures of a data set and fill the cache, case by case."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
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
from fastlora.medical.data.splits import regions_of
from fastlora.medical.scans.names import file_stem
from fastlora.medical.scans.scan import Scan
from fastlora.medical.scans.volumes import Case

log = logging.getLogger(__name__)


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
    """Prepare all structures of the cases and yield an outcome for each, in order and as soon as it is known.

    A case's image and label maps are read once each, and not at all if the cache is complete, so an interrupted run can be
    continued; meshes are recomputed unless slices are cached too. The log has a line with the times of each case.

    num_workers: processes, each working on one case at a time; 0 uses the calling process.
    Raises: ConfigError if it is negative; DataError at the first structure that cannot be used,
    unless the config skips those, or if a worker process dies.
    """
    if num_workers < 0:
        raise ConfigError(f"num_workers: expected 0 or more processes, got {num_workers}")
    if num_workers == 0:
        for case in cases:
            yield from _outcomes(config, case, log.info)
        return
    context = multiprocessing.get_context()
    queue, stop = context.SimpleQueue(), context.Event()
    ready: dict[int, list[Outcome | str]] = {number: [] for number in range(len(cases))}
    with ProcessPoolExecutor(
        num_workers, context, initializer=_start_worker, initargs=(queue, stop)
    ) as pool:
        with _signals_held():  # an exception of a handler during a fork would be lost
            futures = [pool.submit(_work, config, n, case) for n, case in enumerate(cases)]
        try:
            for number, future in enumerate(futures):
                finished = False
                while not finished:
                    finished = bool(wait([future], timeout=0.1).done)
                    while not queue.empty():
                        of, item = queue.get()
                        ready[of].append(item)
                    yield from _told(ready[number])
                future.result()  # raises what the worker raised
        except BrokenProcessPool as error:
            raise DataError(
                f"num_workers: one of {num_workers} processes died; expected enough memory for a case in each (fewer need less)"
            ) from error
        finally:
            stop.set()  # the workers end after the current structure
            while not queue.empty():
                queue.get()
            pool.shutdown(cancel_futures=True)


@contextmanager
def _signals_held() -> Iterator[None]:
    """Context manager: Ctrl-C and SIGTERM are delivered at its end."""
    if os.name != "posix":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _told(items: list[Outcome | str]) -> Iterator[Outcome]:
    """Removes the items, logs the lines, and yields the outcomes."""
    while items:
        item = items.pop(0)
        if isinstance(item, Outcome):
            yield item
        else:
            log.info(item)


_worker: dict[str, Any] = {}
"""In a worker process: the queue to the parent, and the event that stops the work."""


def _start_worker(queue: Any, stop: Any) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # they reach the parent, which sets `stop`
        signal.signal(number, signal.SIG_IGN)
    _worker.update(queue=queue, stop=stop)


def _work(config: PreprocessConfig, number: int, case: Case) -> None:
    queue, stop = _worker["queue"], _worker["stop"]
    for outcome in _outcomes(config, case, lambda line: queue.put((number, line))):
        queue.put((number, outcome))
        if stop.is_set():
            return


def _outcomes(
    config: PreprocessConfig, case: Case, tell: Callable[[str], None]
) -> Iterator[Outcome]:
    skipped = (DataError,) if config.skip_invalid else ()
    scan, hashed = Scan(case), cache(digest)
    for structure in case.structures:
        try:
            with scan.watch.step("cache"):
                outcome = _outcome(config, scan, structure, hashed)
        except skipped as error:
            outcome = Outcome(case.subject, structure, str(error))
        yield outcome
    tell(f"{case.subject}: {scan.watch}")


def _outcome(
    config: PreprocessConfig, scan: Scan, structure: str, hashed: Callable[[Path], str]
) -> Outcome:
    case, cache_dir = scan.case, config.cache_dir
    facts: dict[str, Any] = {}
    with scan.watch.step("grids"):
        grid = StructureGrid.load(case, structure, cache_dir, scan, keep=False)
        regions = regions_of(grid, case, structure)
    files = [grid_path(case, structure, cache_dir)]
    mask_path = case.structures[structure].path
    if config.slices or config.meshes:
        entries = cache_dir if config.slices else None
        with scan.watch.step("slices"):
            prepared = load_prepared(case, structure, config.slice_config, entries, scan, False)
        if config.slices:
            files.append(cache_path(case, structure, config.slice_config, cache_dir))
            least = config.slice_config.min_area_px
            facts = {
                "shape": prepared.mask.shape,
                "spacing": tuple(voxel_sizes(prepared.affine).tolist()),
                "slices": tuple(len(slice_indices(prepared.mask, a, least)) for a in config.axes),
            }
        if config.meshes:
            files.append(cache_dir / "meshes" / f"{file_stem(case.subject, structure)}.ply")
            files[-1].parent.mkdir(exist_ok=True)
            mesh = trimesh.Trimesh(prepared.vertices, prepared.faces, process=False)
            atomic_write(files[-1], mesh.export(file_type="ply"))
    with scan.watch.step("checksums"):
        sources = {str(path): hashed(path) for path in (case.image_path, mask_path)}
        written = {str(file.relative_to(cache_dir)): digest(file) for file in files}
    return Outcome(
        case.subject,
        structure,
        volume_ml=float((grid.sdf_vox < 0).sum() * SPACING_MM**3 / 1000),
        regions=len(regions),
        sources=sources,
        files=written,
        **facts,
    )
