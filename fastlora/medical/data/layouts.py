"""Data sets on disk: detects the layout of a folder and lists its cases.

docs/quickstart_training.md shows each layout. Structure names are converted to lower case with `_`
for anything but letters and digits, except in TotalSegmentator's layout, where they are file names.
"""

from __future__ import annotations

import csv
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fastlora.errors import DataError
from fastlora.files import read_json
from fastlora.medical.data import dicom
from fastlora.medical.data.scan import LabelMap
from fastlora.medical.data.volumes import Case, Source, load_labels
from fastlora.medical.data.windows import Modality

log = logging.getLogger(__name__)

IMAGE_NAMES: dict[str, Modality] = {"ct.nii.gz": "ct", "mri.nii.gz": "mr"}
DICOM_MODALITIES: dict[str, Modality] = {"CT": "ct", "MR": "mr"}
NIFTI_ENDINGS = (".nii.gz", ".nii")
LAYOUTS = ("TotalSegmentator", "Decathlon", "nnU-Net", "image/label pairs", "DICOM")

Found = tuple[str, Callable[[], Case]]  # a layout, and a function that reads the case and may raise


def find_cases(
    root: str | os.PathLike[str],
    modality: Modality = "ct",
    problems: list[str] | None = None,
    channel: int = 0,
    intercept: float | None = None,
    tolerance_mm: float | None = None,
) -> list[Case]:
    """All cases below a folder, sorted by subject; its layout is logged.

    modality: of image/label pairs, whose names do not state it. channel: for images with several, its
    number in `dataset.json`. intercept, tolerance_mm: see `Case`. problems: if given, a case that cannot be used is skipped and
    described there instead of raising.
    Raises: DataError if the folder is missing, has no case or an unreadable table, or if a case
    lacks image or masks.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: expected a folder of cases, got nothing at that path")
    listed = (root / "dataset.json").is_file()
    found = _listed_cases(root, channel) if listed else _subject_folders(root, modality)
    cases, layouts = [], Counter[str]()
    for layout, make in found:
        try:
            case = make()
        except DataError as error:
            if problems is None:
                raise
            problems.append(str(error))
        else:
            cases.append(replace(case, intercept=intercept, tolerance_mm=tolerance_mm))
            layouts[layout] += 1
    if not cases:
        raise DataError(
            f"{root}: expected a data set in one of the layouts {', '.join(LAYOUTS)} "
            "(docs/quickstart_training.md shows each), got none"
            + "".join(f"; {problem}" for problem in problems or ())
        )
    named = ", ".join(f"{name} ({count} cases)" for name, count in layouts.items())
    log.info("%s: layout %s", root, named)
    return cases


def structure_name(label: str) -> str:
    """The name of a structure from its label: `Left Kidney` → `left_kidney`."""
    return re.sub(r"[^0-9a-z]+", "_", label.lower()).strip("_")


def _subject_folders(root: Path, modality: Modality) -> list[Found]:
    splits = _read_splits(root / "meta.csv")
    found: list[Found] = []
    for folder in sorted(p for p in root.iterdir() if p.is_dir() and p.name[0] != "."):
        split = splits.get(folder.name)
        if (folder / "segmentations").is_dir() or any((folder / n).is_file() for n in IMAGE_NAMES):
            found.append(("TotalSegmentator", partial(_totalsegmentator_case, folder, split)))
        elif any(folder.glob("*-image.nii.gz")) or any(folder.glob("*-label.nii.gz")):
            found.append(("image/label pairs", partial(_pair_case, folder, modality, split)))
        elif dicom.holds_dicom(folder):
            found.append(("DICOM", partial(_dicom_case, folder, split)))
    return found


def _totalsegmentator_case(folder: Path, split: str | None) -> Case:
    images = [name for name in IMAGE_NAMES if (folder / name).is_file()]
    if len(images) != 1:
        raise DataError(
            f"{folder}: expected one of {', '.join(IMAGE_NAMES)}, got {', '.join(images) or 'none'}"
        )
    masks = sorted((folder / "segmentations").glob("*.nii.gz"))
    structures = {
        p.name.removesuffix(".nii.gz"): Source(p) for p in masks if not p.name.startswith(".")
    }
    if not structures:
        raise DataError(f"{folder}: expected masks in segmentations/<structure>.nii.gz, got none")
    return Case(folder.name, IMAGE_NAMES[images[0]], folder / images[0], structures, split)


def _pair_case(folder: Path, modality: Modality, split: str | None) -> Case:
    images, labels = sorted(folder.glob("*-image.nii.gz")), sorted(folder.glob("*-label.nii.gz"))
    if len(images) != 1 or len(labels) != 1:
        raise DataError(
            f"{folder}: expected one *-image.nii.gz and one *-label.nii.gz, "
            f"got {len(images)} and {len(labels)}"
        )
    values = sorted(LabelMap(load_labels(labels[0]).array).boxes)
    structures = {f"label_{value}": Source(labels[0], value) for value in values}
    if not structures:
        raise DataError(f"{labels[0]}: expected at least one label, got an empty label map")
    return Case(folder.name, modality, images[0], structures, split)


def _dicom_case(folder: Path, split: str | None) -> Case:
    series = {s.uid: s for s in dicom.list_series(folder)}
    files = [path for s in series.values() if s.modality == "SEG" for path in s.files]
    segmentations = [dicom.read_segmentation(path) for path in files]
    if not segmentations:
        raise DataError(f"{folder}: expected a DICOM SEG in the folder of the images, got none")
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
    structures: dict[str, Source] = {}
    for seg in segmentations:
        if uid not in seg.refers_to:
            continue
        for number, label in seg.segments.items():
            structures[_new_name(structures, label, seg.path)] = Source(seg.path, number)
    # The cache key follows the files of this folder: other series should not invalidate it.
    parents = {path.parent for path in series[uid].files}
    image = parents.pop() if len(parents) == 1 else folder
    return Case(folder.name, DICOM_MODALITIES[kind], image, structures, split, component=uid)


def _new_name(known: Collection[str], label: str, where: Path) -> str:
    name = structure_name(label)
    if not name or name in known:
        raise DataError(
            f"{where}: expected labels whose names differ in letters and digits, got {label!r}"
            + (" twice" if name else "")
        )
    return name


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


def _listed_cases(root: Path, channel: int) -> list[Found]:
    """The cases of a Decathlon or nnU-Net folder."""
    path = root / "dataset.json"
    content = _read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("labels"), dict):
        raise DataError(f"{path}: expected an object with 'labels', got none")
    nnunet = "channel_names" in content
    channels = content.get("channel_names" if nnunet else "modality")
    if not isinstance(channels, dict) or not channels:
        raise DataError(f"{path}: expected 'channel_names' or 'modality', got neither")
    number = str(channel)
    if number not in channels:
        raise DataError(f"channel: {path} has {channels}, expected one of them, got {number}")
    name = str(channels[number])
    if len(channels) > 1:
        log.info(
            "%s: channel %s (%s) of %s", root, number, name, ", ".join(map(str, channels.values()))
        )
    modality: Modality = "ct" if name.upper() == "CT" else "mr"
    labels = _labels(content["labels"], path)
    splits = _folds(root / "splits_final.json")
    listed = _nnunet_files(root, content, channel) if nnunet else _decathlon_files(root, content)

    def make(subject: str, image: Path, label: Path) -> Case:
        if not image.is_file() and not nnunet:  # nnU-Net 1 lists images without the channel number
            end = _ending(image)
            image = image.with_name(f"{image.name.removesuffix(end)}_{channel:04d}{end}")
        for needed in (image, label):
            if not needed.is_file():
                raise DataError(f"{subject}: expected {needed}, got nothing at that path")
        structures = {n: Source(label, value) for n, value in labels.items()}
        return Case(subject, modality, image, structures, splits.get(subject), channel)

    layout = "nnU-Net" if nnunet else "Decathlon"
    return [(layout, partial(make, *files)) for files in sorted(listed)]


def _ending(path: Path) -> str:
    return next((ending for ending in NIFTI_ENDINGS if path.name.endswith(ending)), "")


def _nnunet_files(
    root: Path, content: Mapping[str, Any], channel: int
) -> list[tuple[str, Path, Path]]:
    ending = content.get("file_ending", NIFTI_ENDINGS[0])
    if ending not in NIFTI_ENDINGS:
        raise DataError(
            f"{root / 'dataset.json'}: expected file_ending {' or '.join(NIFTI_ENDINGS)}, got {ending!r}"
        )
    labels = {p.name.removesuffix(ending): p for p in (root / "labelsTr").glob(f"[!.]*{ending}")}
    images, number = root / "imagesTr", f"_{channel:04d}{ending}"
    return [(subject, images / f"{subject}{number}", label) for subject, label in labels.items()]


def _decathlon_files(root: Path, content: Mapping[str, Any]) -> list[tuple[str, Path, Path]]:
    path, found = root / "dataset.json", []
    listed = content.get("training", ())
    if not isinstance(listed, (list, tuple)):
        raise DataError(f"{path}: expected a list in 'training', got {type(listed).__name__}")
    for entry in listed:
        pair = [entry.get(key) for key in ("image", "label")] if isinstance(entry, dict) else []
        names = [name for name in pair if isinstance(name, str) and name]
        if len(names) != 2:
            raise DataError(
                f"{path}: expected the paths 'image' and 'label' in each of 'training', got {entry}"
            )
        image, label = (_below(root, name, path) for name in names)
        found.append((label.name.removesuffix(_ending(label)), image, label))
    return found


def _below(root: Path, name: str, path: Path) -> Path:
    """The file `name` of the data set. Raises: DataError if it lies outside its folder."""
    if "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise DataError(f"{path}: expected paths within {root}, got {name!r}")
    try:
        (root / name).is_file()
    except OSError as error:  # such as a name too long
        raise DataError(f"{path}: expected paths within {root}, got {name!r}: {error}") from error
    return root / name


def _labels(labels: Mapping[str, Any], path: Path) -> dict[str, int | tuple[int, ...]]:
    """Structure → value or values, from `{value: name}` or `{name: value}`.

    Without the background, and without `ignore`, which marks unlabelled voxels in nnU-Net.
    """
    found: dict[str, int | tuple[int, ...]] = {}
    for key, entry in labels.items():
        label, value = (entry, key) if isinstance(entry, str) else (key, entry)
        several = isinstance(value, (list, tuple))
        try:
            values = tuple(int(v) for v in (value if several else [value]))
        except (TypeError, ValueError, OverflowError) as error:
            raise DataError(f"{path}: expected integer labels, got {key!r}: {entry!r}") from error
        if label.lower() in ("background", "ignore") or values == (0,):
            continue
        found[_new_name(found, label, path)] = values if several else values[0]
    if not found:
        raise DataError(f"{path}: expected a label other than the background, got none")
    return found


def _folds(path: Path) -> dict[str, str]:
    """Subject → `train` or `val` in the first fold of nnU-Net's splits_final.json; empty without it."""
    if not path.is_file():
        return {}
    content = _read_json(path)
    try:
        return {str(s): subset for subset in ("train", "val") for s in content[0][subset]}
    except (KeyError, IndexError, TypeError) as error:
        raise DataError(
            f"{path}: expected a list of folds with 'train' and 'val', got none"
        ) from error


def _read_json(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected readable JSON, got {error}") from error
