"""Regions that cover structures, their split into train, val and test, and a check for leaks."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastlora.errors import ConfigError, DataError, nearest
from fastlora.medical.data.grids import FINE, SPACING_MM, StructureGrid
from fastlora.medical.scans.names import structure_name
from fastlora.medical.scans.scan import Scan
from fastlora.medical.scans.volumes import Case, with_structures

Index = tuple[int, ...]

GROUPS = {
    **dict.fromkeys(
        ("vertebra", "vertebra_corpus", "vertebra_posterior_elements", "disc"), "spine"
    ),
    **dict.fromkeys(("white_matter", "grey_matter"), "brain"),
}
"""Table heading of a kind of structure; any other kind is its own heading."""

TEST_STRUCTURES = ("vertebra_22", "vertebra_6", "disc_106")
VAL_STRUCTURES = ("vertebra_21",)
"""Test and validation structures of the split `structure`, with their parts (`…_corpus`)."""

Box = tuple[tuple[float, float], tuple[float, float], tuple[float, float]]
"""Ranges of x, y, z in mm (RAS)."""

_ALL = (-np.inf, np.inf)
BLOCKS: dict[str, dict[str, Box]] = {
    kind: {
        "train": (_ALL, (-np.inf, -30.0), (-np.inf, 20.0)),
        "val": (_ALL, (-np.inf, -30.0), (28.0, np.inf)),
        "test": (_ALL, (0.0, np.inf), _ALL),
    }
    for kind in ("white_matter", "grey_matter")
}
"""Large structures, which the split `structure` divides into blocks of the patient, with gaps between them."""

SPLIT_NOTES = {
    "structure": (
        "Tested on vertebra 22 (CT), vertebra 6 and disc 106 (MR), and the brain in front of y = 0 mm. Trained on "
        "their neighbours in the same two patients and on the brain behind y = -30 mm below z = 20 mm of the same "
        "template; validated on vertebra 21 and the brain behind y = -30 mm above z = 28 mm. Training, validation and test share "
        "patient and scanner, and on the spine image voxels where neighbours touch (never target voxels). The scores "
        "measure adaptation to these images, not generalisation to new patients."
    ),
    "patient": (
        "Tested on subjects that are not trained on; only kinds of structure that both have are used. With the "
        "bundled data that is one patient in CT against one in MR, validated on one vertebra of the former."
    ),
    "file": "The split comes with the data (the split column of meta.csv); no image is in two subsets.",
}
"""What the subsets of each split share, for the report."""

MIN_FILLED = 0.01  # least fraction of a region inside the structure, and outside it


def is_region(grid: StructureGrid, start: Sequence[int]) -> bool:
    """Whether the 32³ crop at `start` has enough voxels inside and outside the structure to be a region."""
    filled = float((grid.crop(start)[1] < 0).mean())
    return MIN_FILLED <= filled <= 1 - MIN_FILLED


def kind_of(structure: str) -> str:
    """The name without its number: `vertebra_22_corpus` → `vertebra_corpus`."""
    return re.sub(r"_\d+(?=_|$)", "", structure)


def select_structures(cases: Sequence[Case], classes: Sequence[str] | None) -> list[Case]:
    """The cases that have structures of the classes, reduced to these structures.

    classes: names, also as in the data set's files, or kinds of structures (`vertebra` for `vertebra_22`); None for all.
    Raises: DataError if no case has one of the classes.
    """
    if classes is None:
        return list(cases)
    wanted = set()
    all_names = [_names(case, name) for case in cases for name in case.structures]
    known = {name for names in all_names for name in names}
    for name in classes:
        found = name if name in known else structure_name(name)
        if found not in known:
            there = ", ".join(sorted({name for case in cases for name in case.structures}))
            raise DataError(
                f"classes: no case has {name!r}{nearest(name, known)}; there are: {there}"
            )
        wanted.add(found)
    return with_structures(cases, lambda case, name: not wanted.isdisjoint(_names(case, name)))


def _names(case: Case, structure: str) -> set[str]:
    """What `--classes` may call a structure: its name, its kind, and its name in the file."""
    title = case.structures[structure].title
    return {structure, kind_of(structure)} | ({title} if title else set())


def group_of(structure: str) -> str:
    """The heading under which tables list a structure."""
    return GROUPS.get(kind_of(structure), kind_of(structure))


@dataclass(frozen=True, eq=False)
class RegionSpec:
    """A 32³ crop of a case's fine grid; augmentation may move `start` between `low` and `high`."""

    case: Case
    structure: str
    start: Index
    low: Index
    high: Index

    @property
    def name(self) -> str:
        """Unique within a case."""
        return f"{self.structure}@{'.'.join(map(str, self.start))}"


def region_specs(
    case: Case,
    structure: str,
    box_mm: Box | None = None,
    cache_dir: Path | None = None,
    scan: Scan | None = None,
) -> list[RegionSpec]:
    """Evenly spaced regions that cover a structure, or what of it lies within `box_mm`.

    cache_dir, scan: as in `StructureGrid.load`. Raises: DataError as it, if no region contains enough of the structure, or if a
    box is given and the volume is oblique.
    """
    grid = StructureGrid.load(case, structure, cache_dir, scan)
    return regions_of(grid, case, structure, box_mm)


def regions_of(
    grid: StructureGrid, case: Case, structure: str, box_mm: Box | None = None
) -> list[RegionSpec]:
    """`region_specs` of a structure whose grid is at hand."""
    low, high = grid.offset.copy(), grid.offset + grid.image.shape  # regions lie in [low, high)
    box = grid.box.copy()
    if box_mm is not None:
        first, stop = _box_voxels(grid, case, box_mm)
        low, high = np.maximum(low, first), np.minimum(high, stop)
        box = np.clip(box, low, high)
        if (high - low < FINE).any():
            raise DataError(
                f"{case.subject}: {structure}: no region of {FINE} voxels fits the box {box_mm} mm"
            )
    last = high - FINE
    starts = [region_starts(box[0, axis], box[1, axis], low[axis], last[axis]) for axis in range(3)]
    bounds = tuple(low.tolist()), tuple(last.tolist())
    usable = (start for start in itertools.product(*starts) if is_region(grid, start))
    found = [RegionSpec(case, structure, start, *bounds) for start in usable]
    if not found:
        raise DataError(
            f"{case.subject}: {structure}: no region of {FINE * SPACING_MM:g} mm is filled by "
            f"{MIN_FILLED:.0%} to {1 - MIN_FILLED:.0%}"
        )
    return found


def region_starts(begin: int, end: int, low: int, last: int, stride: int = FINE) -> list[int]:
    """Evenly spaced starts, within low to last, of the fewest regions that cover begin to end.

    stride: the largest distance between two starts.
    """
    count = max(1, 1 + int(np.ceil((end - begin - FINE) / stride)))
    spread = np.linspace(begin, end - FINE, count) if count > 1 else [(begin + end - FINE) / 2]
    return [int(s) for s in np.unique(np.clip(np.round(spread), low, last).astype(np.int64))]


def _box_voxels(
    grid: StructureGrid, case: Case, box_mm: Box
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The half-open range of the subject's fine indices whose voxel centres lie within `box_mm`."""
    if not np.allclose(grid.affine[:3, :3], SPACING_MM * np.eye(3), atol=1e-3):
        raise DataError(
            f"{case.subject}: expected axes along the patient's for a block in mm, got an oblique volume"
        )
    ends = np.clip((np.array(box_mm) - grid.affine[:3, 3:]) / SPACING_MM, -1e6, 1e6)  # (3, 2)
    first = np.ceil(ends[:, 0]).astype(np.int64) + grid.offset
    return first, np.floor(ends[:, 1]).astype(np.int64) + 1 + grid.offset


Splits = dict[str, list[RegionSpec]]
Assignment = Callable[[Case, str], Mapping[str, Box | None]]
"""The subset of a case's structure, or the subsets of its blocks; empty if it is not used."""


def make_splits(
    cases: Sequence[Case],
    split: str = "structure",
    *,
    test_structures: Sequence[str] = TEST_STRUCTURES,
    val_structures: Sequence[str] = VAL_STRUCTURES,
    test_subjects: Sequence[str] | None = None,
    cache_dir: str | Path | None = None,
) -> Splits:
    """Regions for training (`train`), model selection (`val`) and the final results (`test`).

    See `SPLIT_NOTES` for what the subsets share.

    split: `structure` tests on the named structures and on the test block of `BLOCKS`; `patient`
    tests on `test_subjects` (default: the last fifth by name, at least one) and validates on as many
    more subjects if enough remain, otherwise on the first structure of each kind; `file` follows
    `Case.split` and may have no `test`. cache_dir: of preprocessing.
    Raises: ConfigError if the split is unknown; DataError if a volume cannot be used, a subset
    is empty, or `check_no_leak` finds a leak.
    """
    cache = Path(cache_dir) if cache_dir is not None else None
    subsets: Splits = {"train": [], "val": [], "test": []}
    whole: tuple[str, ...] = ()
    if split == "structure":
        assign = _by_name(test_structures, val_structures)
    elif split == "patient":
        assign, whole = _by_subject(cases, test_subjects), ("test",)
    elif split == "file":
        assign, whole = _by_file, ("val", "test")
    else:
        raise ConfigError(f"split: expected one of {sorted(SPLIT_NOTES)}, got {split!r}")
    for case in cases:
        scan = Scan(case)
        for structure in sorted(case.structures):
            for subset, box in assign(case, structure).items():
                subsets[subset] += region_specs(case, structure, box, cache, scan)
    if split == "file" and not subsets["test"]:
        del subsets["test"]
    for name, specs in subsets.items():
        if not specs:
            found = "; ".join(f"{c.subject}: {', '.join(sorted(c.structures))}" for c in cases)
            raise DataError(
                f"split {split!r}: expected regions to {name} on, got none among {found or 'no case'}"
            )
    check_no_leak(subsets, whole)
    return subsets


def _by_name(test: Sequence[str], val: Sequence[str]) -> Assignment:
    def assign(case: Case, structure: str) -> Mapping[str, Box | None]:
        if blocks := BLOCKS.get(kind_of(structure)):
            return blocks
        for subset, names in (("test", test), ("val", val)):
            if any(f"{structure}_".startswith(f"{name}_") for name in names):  # itself or a part
                return {subset: None}
        return {"train": None}

    return assign


def _by_subject(cases: Sequence[Case], test_subjects: Sequence[str] | None) -> Assignment:
    kinds = {case.subject: {kind_of(s) for s in case.structures} for case in cases}
    linked = [a for a in sorted(kinds) if any(kinds[a] & kinds[b] for b in kinds if b != a)]
    fifth = max(1, len(linked) // 5)
    test = set(linked[-fifth:] if test_subjects is None else test_subjects)
    if unknown := sorted(test - set(kinds)):
        raise DataError(f"test_subjects: expected some of {sorted(kinds)}, got {unknown}")
    others = [s for s in linked if s not in test]
    val = set(others[-fifth:]) if len(others) > fifth else set()
    train = set(kinds) - test - val
    common = {k for s in test for k in kinds[s]} & {k for s in train for k in kinds[s]}

    def assign(case: Case, structure: str) -> Mapping[str, Box | None]:
        kind = kind_of(structure)
        if kind not in common:
            return {}
        if case.subject in test:
            return {"test": None}
        is_first = structure == min(s for s in case.structures if kind_of(s) == kind)
        return {"val" if case.subject in val or (is_first and not val) else "train": None}

    return assign


def _by_file(case: Case, structure: str) -> Mapping[str, Box | None]:
    if case.split not in ("train", "val", "test"):
        raise DataError(
            f"{case.subject}: expected split train, val or test in meta.csv, got {case.split!r}"
        )
    return {case.split: None}


def check_no_leak(splits: Splits, whole_subjects: Sequence[str] = ()) -> None:
    """Refuse splits whose subsets share data.

    A subset in `whole_subjects` may not share an image with another. Otherwise, within one image,
    regions of one structure in two subsets may not overlap after any augmentation, and no voxel may
    be a target in both. Raises: DataError, naming the pair that leaks.
    """
    for first, second in itertools.combinations(sorted(splits), 2):
        apart = first in whole_subjects or second in whole_subjects
        checked: set[tuple[object, ...]] = set()
        for a, b in itertools.product(splits[first], splits[second]):
            if a.case.image_path != b.case.image_path:
                continue
            pair = f"{a.case.subject}: {first} {a.name} and {second} {b.name}"
            if apart:
                raise DataError(f"{pair}: expected a subject in one subset only")
            key = (a.case.image_path, a.structure, a.low, a.high, b.structure, b.low, b.high)
            if key not in checked and _share_target(a, b):
                raise DataError(f"{pair}: expected no common target voxel")
            checked.add(key)


def _share_target(a: RegionSpec, b: RegionSpec) -> bool:
    """Whether two specs of one image, within their bounds, share a target voxel."""
    low = np.maximum(a.low, b.low)
    high = np.minimum(a.high, b.high) + FINE
    if (low >= high).any():
        return False
    if a.structure == b.structure:
        return True
    masks = []
    for spec in (a, b):
        grid = StructureGrid.load(spec.case, spec.structure)
        at = tuple(slice(s, e) for s, e in zip(low - grid.offset, high - grid.offset, strict=True))
        masks.append(grid.sdf_vox[at] < 0)
    return bool((masks[0] & masks[1]).any())
