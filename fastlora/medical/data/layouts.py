"""Data sets on disk: detects the layout of a folder and lists its cases.

docs/quickstart_training.md shows each layout. Structure names are those of `structure_name`, except in TotalSegmentator's
layout, where they are file names. Hidden files, such as `._x` of macOS, are ignored in every layout.
"""

from __future__ import annotations

import csv
import logging
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from fastlora.errors import DataError
from fastlora.files import read_json
from fastlora.medical.data import dicom, formats
from fastlora.medical.data.scan import LabelMap
from fastlora.medical.data.volumes import Case, Source, load_labels
from fastlora.medical.data.windows import Modality

log = logging.getLogger(__name__)

IMAGE_NAMES: dict[str, Modality] = {"ct": "ct", "mri": "mr"}  # without the extension
DICOM_MODALITIES: dict[str, Modality] = {"CT": "ct", "MR": "mr"}
LAYOUTS = ("TotalSegmentator", "Decathlon", "nnU-Net", "image/label pairs", "DICOM")

Files = tuple[str, Path, Path]  # subject, image and label map
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
    """The name of a structure from its label, with letters and digits of any script: `Left Kidney` → `left_kidney`, `Größe` → `größe`."""
    label = unicodedata.normalize("NFC", unicodedata.normalize("NFC", label).lower())
    kept = (c if c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in label)
    return "_".join("".join(kept).split())


def distinct_names(labels: Sequence[tuple[str, object]], where: Path) -> list[str]:
    """The names of structures from their labels; if several are equal, as of `T1` and `T1+`, each gets its number.

    labels: text and number of each. where: for errors. Raises: DataError if names are equal even so.
    """
    plain = [structure_name(text) or "label" for text, _ in labels]
    count = Counter(plain)
    names = [
        name if count[name] == 1 and structure_name(text) else f"{name}_{number}"
        for name, (text, number) in zip(plain, labels, strict=True)
    ]
    twice = [text for name, (text, _) in zip(names, labels, strict=True) if names.count(name) > 1]
    if twice:
        raise DataError(f"{where}: expected labels with different names, got {twice[0]!r} twice")
    return names


def _subject_folders(root: Path, modality: Modality) -> list[Found]:
    splits = _read_splits(root / "meta.csv")
    found: list[Found] = []
    for folder in sorted(p for p in root.iterdir() if p.is_dir() and p.name[0] != "."):
        split = splits.get(folder.name)
        if (folder / "segmentations").is_dir() or any(
            _volumes(folder, name) for name in IMAGE_NAMES
        ):
            found.append(("TotalSegmentator", partial(_totalsegmentator_case, folder, split)))
        elif _volumes(folder, "*-image") or _volumes(folder, "*-label"):
            found.append(("image/label pairs", partial(_pair_case, folder, modality, split)))
        elif dicom.holds_dicom(folder):
            found.append(("DICOM", partial(_dicom_case, folder, split)))
    return found


def _totalsegmentator_case(folder: Path, split: str | None) -> Case:
    images = _volumes(folder, "ct") | _volumes(folder, "mri")
    if len(images) != 1:
        raise DataError(
            f"{folder}: expected one of ct.nii.gz, mri.nii.gz, got {', '.join(images) or 'none'}"
        )
    ((name, image),) = images.items()
    structures = {n: Source(p) for n, p in _volumes(folder / "segmentations", "*").items()}
    if not structures:
        raise DataError(f"{folder}: expected masks in segmentations/<structure>.nii.gz, got none")
    return Case(folder.name, IMAGE_NAMES[name], image, structures, split)


def _volumes(folder: Path, pattern: str) -> dict[str, Path]:
    """Name without extension → file, of a folder's volumes whose name fits a pattern. Of `x.nii.gz` and `x.nii` the former, with a line."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        name = path.name.removesuffix(formats.ending(path))
        if name == path.name or name[:1] == "." or not fnmatchcase(name, pattern):
            continue
        other = found.setdefault(name, path)
        if other != path:
            found[name], unused = sorted(
                (other, path), key=lambda p: formats.ENDINGS.index(formats.ending(p).lower())
            )
            log.warning("%s: there is also %s, which is not used", found[name], unused.name)
    return found


def _pair_case(folder: Path, modality: Modality, split: str | None) -> Case:
    images = list(_volumes(folder, "*-image").values())
    labels = list(_volumes(folder, "*-label").values())
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
    return Case(folder.name, DICOM_MODALITIES[kind], image, structures, split, component=uid)


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
    structures_of = _labels(content["labels"], path)
    splits = _folds(root / "splits_final.json")
    if not nnunet:
        listed = _decathlon_files(root, content)
    elif "dataset" in content:
        listed = _nnunet_listed(root, content, channel)
    else:
        listed = _nnunet_files(root, content, channel)

    def make(subject: str, image: Path, label: Path) -> Case:
        if not image.is_file() and not nnunet:  # nnU-Net 1 lists images without the channel number
            end = formats.ending(image)
            image = image.with_name(f"{image.name.removesuffix(end)}_{channel:04d}{end}")
        for needed in (image, label):
            if not needed.is_file():
                raise DataError(f"{subject}: expected {needed}, got nothing at that path")
        structures = {n: Source(label, v, title=t) for n, (t, v) in structures_of.items()}
        return Case(subject, modality, image, structures, splits.get(subject), channel)

    layout = "nnU-Net" if nnunet else "Decathlon"
    return [(layout, partial(make, *files)) for files in sorted(_distinct_subjects(root, listed))]


def _distinct_subjects(root: Path, listed: Sequence[Files]) -> list[Files]:
    """The files with subjects that differ: where base names are equal, the path in the data set is the name.

    Raises: DataError if a label file is listed twice.
    """
    count = Counter(subject.lower() for subject, _, _ in listed)
    found = []
    for subject, image, label in listed:
        if count[subject.lower()] > 1:
            subject = "_".join(label.relative_to(root).parts).removesuffix(formats.ending(label))
        found.append((subject, image, label))
    again = [name for name, n in Counter(s.lower() for s, _, _ in found).items() if n > 1]
    if again:
        raise DataError(
            f"{root / 'dataset.json'}: expected every label file once, got {again[0]} twice"
        )
    return found


def _nnunet_files(root: Path, content: Mapping[str, Any], channel: int) -> list[Files]:
    ending = content.get("file_ending", formats.ENDINGS[0])
    if ending not in formats.ENDINGS:
        raise DataError(
            f"{root / 'dataset.json'}: expected file_ending among {', '.join(formats.ENDINGS)}, got {ending!r}"
        )
    labels = {p.name.removesuffix(ending): p for p in (root / "labelsTr").glob(f"[!.]*{ending}")}
    images, number = root / "imagesTr", f"_{channel:04d}{ending}"
    return [(subject, images / f"{subject}{number}", label) for subject, label in labels.items()]


def _nnunet_listed(root: Path, content: Mapping[str, Any], channel: int) -> list[Files]:
    """The files under `dataset`: case → images by channel, and label."""
    path, found = root / "dataset.json", []
    entries = content["dataset"]
    for subject, entry in entries.items() if isinstance(entries, dict) else ():
        images = entry.get("images") if isinstance(entry, dict) else None
        label = entry.get("label") if isinstance(entry, dict) else None
        names = [*(images if isinstance(images, list) else []), label]
        if len(names) < channel + 2 or not all(isinstance(name, str) and name for name in names):
            raise DataError(
                f"{path}: expected 'images' with channel {channel} and 'label' for each case of 'dataset', got {entry} for {subject}"
            )
        found.append((subject, _below(root, names[channel], path), _below(root, names[-1], path)))
    return found


def _decathlon_files(root: Path, content: Mapping[str, Any]) -> list[Files]:
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
        found.append((label.name.removesuffix(formats.ending(label)), image, label))
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


def _labels(labels: Mapping[str, Any], path: Path) -> dict[str, tuple[str, int | tuple[int, ...]]]:
    """Structure → its name in the file, and value or values, from `{value: name}` or `{name: value}`.

    Without the background, and without `ignore`, which marks unlabelled voxels in nnU-Net.
    """
    found: list[tuple[str, int | tuple[int, ...]]] = []
    for key, entry in labels.items():
        label, value = (entry, key) if isinstance(entry, str) else (key, entry)
        several = isinstance(value, (list, tuple))
        try:
            values = tuple(int(v) for v in (value if several else [value]))
        except (TypeError, ValueError, OverflowError) as error:
            raise DataError(f"{path}: expected integer labels, got {key!r}: {entry!r}") from error
        if label.lower() not in ("background", "ignore") and values != (0,):
            found.append((label, values if several else values[0]))
    if not found:
        raise DataError(f"{path}: expected a label other than the background, got none")
    numbers = ["_".join(map(str, v)) if isinstance(v, tuple) else v for _, v in found]
    names = distinct_names([(t, n) for (t, _), n in zip(found, numbers, strict=True)], path)
    return dict(zip(names, found, strict=True))


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
