"""A case that is named by its files: one image, and a mask or a label map of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from fastlora.errors import ConfigError, DataError
from fastlora.files import read_json
from fastlora.medical.scans import dicom, formats
from fastlora.medical.scans.layouts import DICOM_MODALITIES, IMAGE_NAMES
from fastlora.medical.scans.names import distinct_names, structure_name
from fastlora.medical.scans.scan import Scan
from fastlora.medical.scans.volumes import Case, Source, png_files, slice_numbers
from fastlora.medical.scans.windows import Modality


def open_files(
    image_path: Path,
    mask_path: Path,
    *,
    modality: Modality | None = None,
    structure: str | None = None,
    label: int | None = None,
    every_label: bool = False,
    names: Mapping[int, str] | None = None,
    spacing: Sequence[float] | None = None,
    channel: int | None = None,
    subject: str | None = None,
    intercept: float | None = None,
    tolerance_mm: float | None = None,
) -> Scan:
    """The case of an image and its mask, each a volume, PNG (one, or a folder as a stack) or DICOM.

    modality: needed for a NIfTI file whose name does not state it. structure: its name, which selects the
    CT intensity window; default: that of the label, or the mask's file name if it has one label. label: of a label map with several values, or
    of a SEG with several segments. every_label: all of them, each a structure. names: of labels, as `read_label_names`;
    default: those of a DICOM SEG or of 3D Slicer's `.seg.nrrd`, otherwise `label_1`, …. spacing: three mm, for PNG (see `load_png`). channel: of a 4-D image.
    subject: its name; default: the image's file name. intercept, tolerance_mm: see `Case`.

    Raises: DataError if a file cannot be used or they are not on one grid; ConfigError if an argument
        is needed and missing, or has no effect.
    """
    _check_files(image_path, mask_path)
    pngs = [path for path in (image_path, mask_path) if _is_png(path)]
    if bool(pngs) != (spacing is not None):
        raise ConfigError(
            "spacing: expected three lengths in mm for PNG, and none for other formats; "
            f"got {spacing} with {image_path.name} and {mask_path.name}"
        )
    if every_label and (label is not None or structure is not None):
        raise ConfigError("all: expected neither label nor structure with it, got one")
    if _is_png(mask_path) and (label is not None or every_label):
        raise ConfigError(
            f"label: expected none, since {mask_path} is PNG, whose pixels above 0 are the structure, got {label}"
        )
    grey = _is_png(image_path)
    if grey and modality is not None:
        raise ConfigError(f"modality: expected none, since {image_path} is PNG, got {modality}")
    if intercept is not None and (grey or modality == "mr"):
        raise ConfigError(f"intercept: expected it with a CT only, got {intercept:g}")
    kind: Modality = "grey" if grey else modality or _modality(image_path)
    scan = Scan(
        Case(
            *(subject or stem(image_path), kind, image_path, {}, None, channel),
            spacing=spacing if grey else None,
            intercept=intercept,
            tolerance_mm=tolerance_mm,
        )
    )
    source = Source(mask_path, label, spacing if _is_png(mask_path) else None)
    found = {n: (names or {}).get(n) or title for n, title in _names_of(scan, source).items()}
    if every_label:
        labels = [(title or f"label {n}", n) for n, title in found.items()]
        named = zip(distinct_names(labels, mask_path), labels, strict=True)
        structures = {name: replace(source, label=n, title=text) for name, (text, n) in named}
    else:
        if label is None and len(found) > 1:
            raise ConfigError(
                f"label: expected one of the values of {mask_path}, {list(found)}, or --all for each of them, got none"
            )
        only = label if label is not None else next(iter(found), None)
        own = structure_name(found.get(only or 0) or ("" if len(found) > 1 else stem(mask_path)))
        title = structure or own or f"label_{label}"
        structures = {title: replace(source, label=only) if dicom.is_dicom(mask_path) else source}
    scan.case = replace(scan.case, structures=structures)
    return scan


def _check_files(image_path: Path, mask_path: Path) -> None:
    """Raises: DataError if a path does not exist, or the files of two stacks have different numbers."""
    for path in (image_path, mask_path):
        if not path.exists():
            raise DataError(f"{path}: expected a file or a folder, got nothing at that path")
    if not all(path.is_dir() and _is_png(path) for path in (image_path, mask_path)):
        return
    images, masks = png_files(image_path), png_files(mask_path)
    wanted, got = slice_numbers(images), slice_numbers(masks)
    if wanted and got and wanted != got and len(wanted) == len(got):
        raise DataError(
            f"{masks[0]}: expected the slices of {image_path}, {wanted[0]} to {wanted[-1]}, got {got[0]} to {got[-1]}"
        )


def _names_of(scan: Scan, source: Source) -> dict[int, str | None]:
    """The labels of a mask's file, with their names if it has some; none for PNG."""
    if source.spacing is not None:
        return {}
    if dicom.is_dicom(source.path):
        return dict(dicom.read_segmentation(source.path).segments)
    names = formats.label_names(source.path)
    return {n: names.get(n) for n in scan.labels(source).boxes}


def read_label_names(path: Path) -> dict[int, str]:
    """Value → name of the labels in a file.

    JSON: an object of values and names, either way round, or with one under `labels` (nnU-Net's dataset.json). Text: a line for each
    label that begins with its value, then its name, which may have blanks, and perhaps a colour of three or more numbers, as 3D Slicer and
    FreeSurfer write them; or with its name in quotes, as ITK-SNAP does. Other lines are ignored.
    Raises: DataError if the file is unreadable, or names no label.
    """
    try:
        if path.suffix.lower() == ".json":
            content = read_json(path)
            table = content.get("labels", content) if isinstance(content, dict) else {}
            pairs = [(a, b) if str(a).isdecimal() else (b, a) for a, b in table.items()]
            found = {int(n): str(name) for n, name in pairs}
        else:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
            found = dict(filter(None, map(_label_line, lines)))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: expected the names of labels, got {error}") from error
    found.pop(0, None)
    if not found:
        raise DataError(f"{path}: expected lines of a label's value and its name, got none")
    return found


def _label_line(line: str) -> tuple[int, str] | None:
    match = re.fullmatch(r"\s*(\d+)[\s,]+(\S.*?)\s*", line)
    if match is None:
        return None
    value, rest = match.groups()
    quoted = re.search(r'"([^"]+)"', rest)
    name = quoted[1] if quoted else re.sub(r"([\s,]+[\d.]+){3,}$", "", rest).rstrip(" ,")
    return None if re.fullmatch(r"[\d.,\s]*", name) else (int(value), name)


def stem(path: Path) -> str:
    """A file's name without its extension; `.nii.gz` counts as one."""
    return path.name.removesuffix(formats.ending(path) or (path.suffix if path.is_file() else ""))


def _is_png(path: Path) -> bool:
    files = path.iterdir() if path.is_dir() else [path]
    return any(file.suffix.lower() == ".png" for file in files)


def _modality(path: Path) -> Modality:
    if path.is_dir() or dicom.is_dicom(path):
        kinds = {s.modality for s in dicom.list_series(path) if s.modality in DICOM_MODALITIES}
        if len(kinds) == 1:
            return DICOM_MODALITIES[kinds.pop()]
    elif stem(path) in IMAGE_NAMES:
        return IMAGE_NAMES[stem(path)]
    raise ConfigError(f"modality: expected ct or mr, since {path} does not state it, got none")
