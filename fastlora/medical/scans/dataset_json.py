"""Data sets that a `dataset.json` lists: the Medical Segmentation Decathlon, and nnU-Net."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fastlora.errors import DataError
from fastlora.files import read_json
from fastlora.medical.scans import formats
from fastlora.medical.scans.names import distinct_names
from fastlora.medical.scans.volumes import Case, Source
from fastlora.medical.scans.windows import Modality

log = logging.getLogger(__name__)

Files = tuple[str, Path, Path]  # subject, image and label map
Found = tuple[str, Callable[[], Case]]  # a layout, and a function that reads the case and may raise


def listed_cases(root: Path, channel: int) -> list[Found]:
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
    expected = content.get("numTraining")
    if isinstance(expected, int) and expected != len(listed):
        log.warning(
            "%s: numTraining is %d, but there are %d label maps", path, expected, len(listed)
        )

    def make(subject: str, image: Path, label: Path, subset: str | None) -> Case:
        if not image.is_file() and not nnunet:  # nnU-Net 1 lists images without the channel number
            end = formats.ending(image)
            image = image.with_name(f"{image.name.removesuffix(end)}_{channel:04d}{end}")
        for needed in (image, label):
            if not needed.is_file():
                raise DataError(f"{subject}: expected {needed}, got nothing at that path")
        structures = {n: Source(label, v, title=t) for n, (t, v) in structures_of.items()}
        return Case(subject, modality, image, structures, subset, channel)

    layout = "nnU-Net" if nnunet else "Decathlon"
    count = Counter(subject for subject, _, _ in set(listed))
    found: dict[Files, Found] = {}
    again: list[Found] = []
    for (name, *_), files in zip(listed, _distinct_subjects(root, listed), strict=True):
        subset = splits.get(name if count[name] == 1 else files[0])
        if files in found:
            again.append((layout, partial(_listed_twice, path, files[2])))
        found[files] = layout, partial(make, *files, subset)
    return [found[files] for files in sorted(found)] + again


def _distinct_subjects(root: Path, listed: Sequence[Files]) -> list[Files]:
    """The files with subjects that differ, in upper and lower case too: where base names are equal, the path in the data set is the name.

    A case that is listed twice keeps one subject.
    """
    once = sorted(set(listed))
    count = Counter(subject.lower() for subject, _, _ in once)
    taken: set[str] = set()
    names: dict[Files, str] = {}
    for files in once:
        subject, _, label = files
        if count[subject.lower()] > 1:
            subject = "_".join(label.relative_to(root).parts).removesuffix(formats.ending(label))
        numbered = (subject, *(f"{subject}-{n}" for n in range(2, len(once) + 2)))
        names[files] = next(name for name in numbered if name.lower() not in taken)
        taken.add(names[files].lower())
    return [(names[files], *files[1:]) for files in listed]


def _listed_twice(path: Path, label: Path) -> Case:
    raise DataError(f"{path}: expected every case once, got {label} twice")


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
