"""Data sets on disk: detects the layout of a folder and lists its cases.

docs/quickstart_training.md shows each layout. Structure names are those of `structure_name`, except in TotalSegmentator's
layout, where they are file names. Hidden files, such as `._x` of macOS, are ignored in every layout.
"""

from __future__ import annotations

import csv
import itertools
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from fastlora.errors import DataError
from fastlora.medical.scans import dicom, formats
from fastlora.medical.scans.dataset_json import Found, listed_cases
from fastlora.medical.scans.names import distinct_names
from fastlora.medical.scans.scan import LabelMap
from fastlora.medical.scans.volumes import Case, Source, load_labels
from fastlora.medical.scans.windows import Modality

log = logging.getLogger(__name__)

IMAGE_NAMES: dict[str, Modality] = {"ct": "ct", "mri": "mr"}  # without the extension
_IMAGE = re.compile(r"(?:.*[-_.])?(?:image|img)", re.IGNORECASE)
_LABELS = re.compile(r"(?:(?P<name>.*)[-_.])?(?:labels?|seg|segmentation|mask)", re.IGNORECASE)
IMAGE_FOLDERS = ("images", "image", "imgs", "imagestr", "scans")
LABEL_FOLDERS = ("labels", "label", "masks", "mask", "segmentations", "labelstr")
"""Names of folders, in any case, of which one holds all images and one the label map of each."""
MASK_FOLDERS = ("segmentations", "masks")
"""Names of the folder with one mask for each structure, in the folder of a case."""
DICOM_MODALITIES: dict[str, Modality] = {"CT": "ct", "MR": "mr"}
LAYOUTS = ("TotalSegmentator", "Decathlon", "nnU-Net", "image/label pairs", "DICOM")

Volumes = dict[str, Path]
"""Name without extension → file."""
Placed = tuple[str, Path, Callable[[str], Case]]
"""A layout, the path that names the case, and a function that reads the case of a subject and may raise."""


def find_cases(
    root: str | os.PathLike[str],
    modality: Modality = "ct",
    problems: list[str] | None = None,
    channel: int | None = None,
    intercept: float | None = None,
    tolerance_mm: float | None = None,
) -> list[Case]:
    """All cases below a folder, sorted by subject; its layout is logged.

    modality: of image/label pairs, whose names do not state it. channel: for images with several, its
    number in `dataset.json` (default: 0) or in a 4-D file. intercept, tolerance_mm: see `Case`. problems: if given, a case that cannot be used is skipped and
    described there instead of raising.
    Raises: DataError if the folder is missing, has no case or an unreadable table, or if a case
    lacks image or masks.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: expected a folder of cases, got nothing at that path")
    listed = (root / "dataset.json").is_file()
    found = (
        listed_cases(root, channel or 0)
        if listed
        else _subject_folders(root, modality, channel or 0)
    )
    cases, layouts = [], Counter[str]()
    for layout, make in found:
        try:
            case = make()
        except DataError as error:
            if problems is None:
                raise
            problems.append(str(error))
        else:
            dicom_series = case.image_path.is_dir()
            component = case.component if dicom_series or listed else channel
            case = replace(case, component=component, intercept=intercept)
            cases.append(replace(case, tolerance_mm=tolerance_mm))
            layouts[layout] += 1
    if not cases:
        raise DataError(
            f"{root}: expected a data set in one of the layouts {', '.join(LAYOUTS)} "
            f"(docs/quickstart_training.md shows each), got none{_seen(root)}"
            + "".join(f"; {problem}" for problem in problems or ())
        )
    named = ", ".join(f"{name} ({count} cases)" for name, count in layouts.items())
    log.info("%s: layout %s", root, named)
    return cases


def _seen(root: Path) -> str:
    """What a folder without cases has instead, for the error."""
    inner = [str(path) for path in _folders(root) if (path / "dataset.json").is_file()]
    if inner:
        return f"; pass the folder of a dataset.json: {', '.join(inner)}"
    some = itertools.islice(root.rglob("*"), 100_000)  # it may be a whole disk
    count = sum(bool(formats.ending(path)) and path.name[0] != "." for path in some)
    return f"; it has {count} volumes" if count else ""


def _subject_folders(root: Path, modality: Modality, channel: int) -> list[Found]:
    """The cases of a folder that has a folder, or an image and a label map, for each."""
    splits = _read_splits(root / "meta.csv")
    found = _side_by_side(root, modality, splits)
    pair = _image_and_label_folder(root)
    if pair is not None:
        found += _two_folders(*pair, modality, splits, channel)
    for folder in _folders(root):
        if pair is not None and folder in pair:
            continue
        case = _case_of(folder, modality, splits)
        if case is None:
            inner = splits | _read_splits(folder / "meta.csv")
            deeper = (_case_of(path, modality, inner) for path in _folders(folder))
            nested = [f for f in deeper if f is not None] + _side_by_side(folder, modality, inner)
            if not nested and dicom.holds_dicom(folder):
                split = splits.get(folder.name)
                nested = [("DICOM", folder, partial(_dicom_case, folder, split))]
            found += nested
        else:
            found.append(case)
    count = Counter(place.name.lower() for _, place, _ in found)
    return [
        (layout, partial(make, _subject(root, place, count[place.name.lower()])))
        for layout, place, make in sorted(found, key=lambda item: item[1])
    ]


def _subject(root: Path, place: Path, count: int) -> str:
    """The name of a case; if several have it, its path in the data set."""
    return place.name if count == 1 else "_".join(place.relative_to(root).parts)


def _folders(folder: Path) -> list[Path]:
    return sorted(
        p for p in folder.iterdir() if p.is_dir() and p.name[0] != "." and p.name != "__MACOSX"
    )


def _case_of(folder: Path, modality: Modality, splits: Mapping[str, str]) -> Placed | None:
    """The case that a folder is, if it has an image or masks that are named as such."""
    split, volumes = splits.get(folder.name), _volumes(folder)
    images, labels = _images(volumes), _labelled(volumes)
    stated = not volumes.keys().isdisjoint(IMAGE_NAMES)
    masks = _mask_folder(folder)
    if masks == folder / "segmentations" or ((masks or stated) and not labels):
        make = partial(_totalsegmentator_case, folder, volumes, modality, split)
        return "TotalSegmentator", folder, make
    if len(set(labels.values())) <= 1 and (labels or images):
        return "image/label pairs", folder, partial(_pair_case, folder, volumes, modality, split)
    return None


def _mask_folder(folder: Path) -> Path | None:
    """The folder of a case with a mask for each structure, if there is one; `masks` only with volumes in it."""
    found = [folder / name for name in MASK_FOLDERS if (folder / name).is_dir()]
    filled = [path for path in found if _volume_names(path)]
    return next(iter(filled + [path for path in found if path.name == "segmentations"]), None)


def _image_and_label_folder(root: Path) -> tuple[Path, Path] | None:
    """The folder of all images and that of their label maps, if there is one of each. Raises: DataError if there are several."""
    named = {path.name.lower(): path for path in _folders(root)}
    images, labels = (
        [named[name] for name in names if name in named and _volume_names(named[name])]
        for names in (IMAGE_FOLDERS, LABEL_FOLDERS)
    )
    if not images or not labels:
        return None
    if len(images) + len(labels) > 2:
        names = ", ".join(path.name for path in images + labels)
        raise DataError(f"{root}: expected one folder of images and one of label maps, got {names}")
    if labelled := [name for name in _volume_names(images[0]) if _LABELS.fullmatch(name)]:
        if all(len(_volume_names(path)) == 2 for path in (images[0], labels[0])):
            return None  # two subjects, of an image and a label map each
        raise DataError(f"{images[0]}: expected images, got a label map by its name, {labelled[0]}")
    for folder in (images[0], labels[0]):
        if inner := _folders(folder):
            log.warning("%s: has folders, which are not read, such as %s", folder, inner[0].name)
    return images[0], labels[0]


def _two_folders(
    images: Path, labels: Path, modality: Modality, splits: Mapping[str, str], channel: int
) -> list[Placed]:
    """The cases of a folder of images and one of label maps with the same names: `images/x.nii.gz` and `labels/x.nii.gz`, or `x_seg.nii.gz`.

    channel: of images whose names end in its number, `x_0000.nii.gz`; those of other channels are left out.
    """
    files, maps = _volumes(images), _volumes(labels)
    found: dict[str, list[Path]] = {name: [] for name in files}
    for name, path in maps.items():
        match = _LABELS.fullmatch(name)
        stems = [name, *([match["name"]] if match and match["name"] else [])]
        suffixes = ("", "-image", "_image", f"_{channel:04d}")
        image = next((s + end for s in stems for end in suffixes if s + end in files), name)
        found.setdefault(image, []).append(path)
        for stem in stems:
            for other in [n for n in found if re.fullmatch(re.escape(stem) + r"_\d{4}", n)]:
                if not found[other]:
                    del found[other]  # another channel
    return [
        (
            "image/label pairs",
            images / name,
            partial(_same_name, images, labels, files.get(name), mine, modality, splits.get(name)),
        )
        for name, mine in found.items()
    ]


def _same_name(
    images: Path,
    labels: Path,
    image: Path | None,
    maps: Sequence[Path],
    modality: Modality,
    split: str | None,
    subject: str,
) -> Case:
    if image is None:
        raise DataError(f"{images}: expected the image of {maps[0]}, got none of that name")
    if len(maps) != 1:
        got = ", ".join(path.name for path in maps) or "none"
        raise DataError(f"{labels}: expected one label map of {image}, got {got}")
    return _label_map_case(subject, modality, image, maps[0], split)


def _images(volumes: Volumes) -> list[Path]:
    """The volumes that are named as images: `image.nii.gz`, `x-image.nii.gz`."""
    return [path for name, path in volumes.items() if _IMAGE.fullmatch(name)]


def _labelled(volumes: Volumes) -> dict[str, str]:
    """The names of the label maps, with what is before the word: `x_seg` → `x`, `label` → empty."""
    matches = ((name, _LABELS.fullmatch(name)) for name in volumes)
    return {name: match["name"] or "" for name, match in matches if match}


def _side_by_side(folder: Path, modality: Modality, splits: Mapping[str, str]) -> list[Placed]:
    """The cases of a folder that has a label map for each image: `x.nii.gz` and `x_seg.nii.gz`."""
    volumes = _volumes(folder)
    labels = _labelled(volumes)
    if not labels:
        return []
    maps: dict[str, list[Path]] = {name: [] for name in volumes if name not in labels}
    for label, name in labels.items():
        image = next((n for n in (f"{name}-image", f"{name}_image") if n in maps), name)
        maps.setdefault(image, []).append(volumes[label])
    return [
        (
            "image/label pairs",
            folder / name,
            partial(
                _listed_pair, folder / name, volumes.get(name), found, modality, splits.get(name)
            ),
        )
        for name, found in maps.items()
    ]


def _listed_pair(
    place: Path,
    image: Path | None,
    labels: Sequence[Path],
    modality: Modality,
    split: str | None,
    subject: str,
) -> Case:
    if image is None or len(labels) != 1:
        got = ", ".join(path.name for path in ([image] if image else []) + list(labels))
        raise DataError(
            f"{place.parent}: expected {place.name}.nii.gz and one label map such as {place.name}_seg.nii.gz, got {got}"
        )
    return _label_map_case(subject, modality, image, labels[0], split)


def _totalsegmentator_case(
    folder: Path, volumes: Volumes, modality: Modality, split: str | None, subject: str
) -> Case:
    images = {name: volumes[name] for name in IMAGE_NAMES if name in volumes}
    others = {name: path for name, path in volumes.items() if name not in _labelled(volumes)}
    if not images and len(others) == 1:
        images = others  # any name, if it is the only one
    if len(images) != 1:
        raise DataError(
            f"{folder}: expected one of ct.nii.gz, mri.nii.gz, or one other image, got {', '.join(images or others) or 'none'}"
        )
    ((name, image),) = images.items()
    masks = _mask_folder(folder) or folder / MASK_FOLDERS[0]
    structures = {n: Source(p) for n, p in _volumes(masks).items()}
    if not structures:
        raise DataError(f"{folder}: expected masks in {masks.name}/<structure>.nii.gz, got none")
    return Case(subject, IMAGE_NAMES.get(name, modality), image, structures, split)


def _volume_names(folder: Path) -> set[str]:
    """The names of a folder's volumes, without extensions."""
    names = {p.name: p.name.removesuffix(formats.ending(p)) for p in folder.iterdir()}
    return {name for whole, name in names.items() if name != whole and name[:1] != "."}


def _volumes(folder: Path) -> Volumes:
    """A folder's volumes. Of `x.nii.gz` and `x.nii` the former, with a line in the log."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        name = path.name.removesuffix(formats.ending(path))
        if name == path.name or name[:1] == ".":
            continue
        other = found.setdefault(name, path)
        if other != path:
            found[name], unused = sorted(
                (other, path), key=lambda p: formats.ENDINGS.index(formats.ending(p).lower())
            )
            log.warning("%s: there is also %s, which is not used", found[name], unused.name)
    return found


def _pair_case(
    folder: Path, volumes: Volumes, modality: Modality, split: str | None, subject: str
) -> Case:
    labels = [volumes[name] for name in _labelled(volumes)]
    images = _images(volumes) or [path for path in volumes.values() if path not in labels]
    if len(images) != 1 or len(labels) != 1:
        got = ", ".join(path.name for path in [*images, *labels])
        raise DataError(
            f"{folder}: expected one *-image.nii.gz and one *-label.nii.gz, "
            f"got {len(images)} and {len(labels)}: {got}"
        )
    return _label_map_case(subject, modality, images[0], labels[0], split)


def _label_map_case(
    subject: str, modality: Modality, image: Path, label: Path, split: str | None
) -> Case:
    values = sorted(LabelMap(load_labels(label).array).boxes)
    structures = {f"label_{value}": Source(label, value) for value in values}
    if not structures:
        raise DataError(f"{label}: expected at least one label, got an empty label map")
    stated = IMAGE_NAMES.get(image.name.removesuffix(formats.ending(image)), modality)
    return Case(subject, stated, image, structures, split)


def _dicom_case(folder: Path, split: str | None, subject: str) -> Case:
    series = {s.uid: s for s in dicom.list_series(folder)}
    files = [path for s in series.values() if s.modality == "SEG" for path in s.files]
    segmentations = [dicom.read_segmentation(path) for path in files]
    if not segmentations:
        contours = any(s.modality == "RTSTRUCT" for s in series.values())
        raise DataError(
            f"{folder}: expected a DICOM SEG in the folder of the images, got "
            + (
                "an RTSTRUCT, whose contours have to be exported as a SEG first"
                if contours
                else "none"
            )
        )
    images = {uid for seg in segmentations for uid in seg.refers_to if uid in series}
    if len(images) != 1:
        raise DataError(
            f"{folder}: expected one series that a DICOM SEG refers to, got {len(images)}; there are: "
            + "; ".join(f"{s.modality} {s.description!r}" for s in series.values())
        )
    (uid,) = images
    kind = series[uid].modality
    if kind not in DICOM_MODALITIES:
        raise DataError(f"{folder}: expected a series of CT or MR, got {kind}")
    segments = [
        (label, Source(seg.path, number, title=label))
        for seg in segmentations
        if uid in seg.refers_to
        for number, label in seg.segments.items()
    ]
    names = distinct_names([(label, n) for n, (label, _) in enumerate(segments, 1)], folder)
    structures = dict(zip(names, (source for _, source in segments), strict=True))
    # The cache key follows the files of this folder: other series should not invalidate it.
    parents = {path.parent for path in series[uid].files}
    image = parents.pop() if len(parents) == 1 else folder
    return Case(subject, DICOM_MODALITIES[kind], image, structures, split, component=uid)


def _read_splits(path: Path) -> dict[str, str]:
    """Subject → split from TotalSegmentator's meta.csv; empty without the file or the column."""
    if not path.is_file():
        return {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream, delimiter=";", restkey="more"))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: expected a table in UTF-8, got {error}") from error
    if rows and "image_id" not in rows[0]:
        raise DataError(
            f"{path}: expected a column image_id (separator ';'), got {', '.join(rows[0])}"
        )
    return {row["image_id"]: row["split"] for row in rows if row.get("split")}
