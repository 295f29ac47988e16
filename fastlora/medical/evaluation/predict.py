"""From an image and a coarse segmentation to a surface in patient coordinates (mm).

The input mask is averaged over 6 mm cells; the decoder refines overlapping regions of 32³ fine voxels,
which are blended. The files state their coordinates: RAS (x to the patient's
right is positive; NIfTI's convention) or LPS (to the left; DICOM's, and ITK's).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trimesh
from numpy.typing import NDArray

from fastlora.errors import ConfigError, DataError
from fastlora.files import atomic_write_all, json_bytes
from fastlora.medical.data import dicom
from fastlora.medical.data.batch import collate_regions
from fastlora.medical.data.geometry import Array, mesh_from_sdf, voxelise
from fastlora.medical.data.grids import FINE, SPACING_MM, StructureGrid
from fastlora.medical.data.layouts import (
    DICOM_MODALITIES,
    IMAGE_NAMES,
    NIFTI_ENDINGS,
    structure_name,
)
from fastlora.medical.data.regions import base_distance, coarse_segmentation, region_arrays
from fastlora.medical.data.splits import region_starts
from fastlora.medical.data.volumes import (
    Modality,
    Source,
    Volume,
    load_labels,
    load_mask,
    load_png,
    load_volume,
)
from fastlora.medical.evaluation.metrics import overlap
from fastlora.medical.models.trainee import Trainee
from fastlora.medical.training.finetuned import predict

SPACES = ("ras", "lps")
STRIDE = FINE // 2  # so that neighbouring regions overlap by at least half


@dataclass(frozen=True, eq=False)
class Subject:
    """One image, and the coarse segmentation of one structure on its grid: mask (X, Y, Z) bool."""

    image: Volume
    mask: NDArray[np.bool_]
    modality: Modality
    structure: str


def read_subject(
    image_path: Path,
    mask_path: Path,
    *,
    modality: Modality | None = None,
    structure: str | None = None,
    label: int | None = None,
    spacing: Sequence[float] | None = None,
) -> Subject:
    """Read an image and its mask, each PNG (one, or a folder as a stack), NIfTI or DICOM.

    modality: needed for a NIfTI file whose name does not state it. structure: its name, which selects the
    CT intensity window; default: the mask's file name, or the segment's label. label: of a label map with several
    values, or of a SEG with several segments. spacing: three mm, for PNG (see `load_png`).

    Raises: DataError if a file cannot be used or they are not on one grid; ConfigError if an argument
        is needed and missing.
    """
    pngs = [path for path in (image_path, mask_path) if _is_png(path)]
    if bool(pngs) != (spacing is not None):
        raise ConfigError(
            "spacing: expected three lengths in mm for PNG, and none for other formats; "
            f"got {spacing} with {image_path.name} and {mask_path.name}"
        )
    if _is_png(image_path):
        if modality is not None:
            raise ConfigError(f"modality: expected none, since {image_path} is PNG, got {modality}")
        image, modality = load_png(image_path, spacing or ()), "grey"
    else:
        image, modality = load_volume(image_path), modality or _modality(image_path)
    source, name = _source(mask_path, label, spacing)
    mask = load_mask(source, image, image_path.name)
    return Subject(image, mask, modality, structure or name or structure_name(stem(mask_path)))


def stem(path: Path) -> str:
    """A file's name without its extension; `.nii.gz` counts as one."""
    ending = path.suffix if path.is_file() else ""
    return path.name.removesuffix(next(filter(path.name.endswith, NIFTI_ENDINGS), ending))


def _is_png(path: Path) -> bool:
    return any(path.glob("*.png")) if path.is_dir() else path.suffix.lower() == ".png"


def _modality(path: Path) -> Modality:
    if path.is_dir() or dicom.is_dicom(path):
        kinds = {s.modality for s in dicom.list_series(path) if s.modality in DICOM_MODALITIES}
        if len(kinds) == 1:
            return DICOM_MODALITIES[kinds.pop()]
    elif path.name in IMAGE_NAMES:
        return IMAGE_NAMES[path.name]
    raise ConfigError(f"modality: expected ct or mr, since {path} does not state it, got none")


def _source(
    path: Path, label: int | None, spacing: Sequence[float] | None
) -> tuple[Source, str | None]:
    """The mask, and its name if the file has one."""
    if _is_png(path):
        if label is not None:
            raise ConfigError(
                f"label: expected none, since {path} is PNG, whose pixels above 0 are the structure, got {label}"
            )
        return Source(path, spacing=spacing), None
    if dicom.is_dicom(path):
        segments = dicom.read_segmentation(path).segments
        if label is None and len(segments) != 1:
            raise ConfigError(
                f"label: expected one of the segments of {path}, {segments}, got none"
            )
        number = next(iter(segments)) if label is None else label
        return Source(path, number), structure_name(segments.get(number, ""))
    if label is None:
        values = [int(value) for value in np.unique(load_labels(path).array) if value]
        if len(values) > 1:
            raise ConfigError(f"label: expected one of the values of {path}, {values}, got none")
    return Source(path, label), None


@torch.inference_mode()
def predict_field(model: Trainee, grid: StructureGrid, batch_size: int = 8) -> Array:
    """The decoder's distances on a grid, (X, Y, Z) float32 in fine voxels, negative inside.

    model: in eval mode, on any device. Regions overlap by at least half; there, their distances are averaged
    with weights that decrease towards the faces of a region. A region whose coarse segmentation is
    completely full or empty has no token and keeps the upsampled coarse segmentation.
    """
    device = next(model.parameters()).device
    shape = grid.image.shape
    tent = np.minimum(np.arange(FINE) + 0.5, FINE - np.arange(FINE) - 0.5).astype(np.float32)
    weight = tent[:, None, None] * tent[:, None] * tent
    total, weights = np.zeros(shape, np.float32), np.zeros(shape, np.float32)

    def blend(start: tuple[int, ...], distance: Array) -> None:
        at = tuple(slice(s, s + FINE) for s in start)
        total[at] += weight * distance
        weights[at] += weight

    def regions() -> Iterator[tuple[tuple[int, ...], dict[str, Any]]]:
        for start in itertools.product(*(region_starts(0, n, 0, n - FINE, STRIDE) for n in shape)):
            image, sdf = grid.crop((grid.offset + start).tolist())
            sample = region_arrays(image, sdf)
            if len(sample["coords"]):
                about = {"affine": grid.affine, "spacing": SPACING_MM, "meta": {}}
                yield start, {**sample, **about}
            else:
                blend(start, base_distance(coarse_segmentation(sdf < 0)))

    waiting = regions()
    while some := list(itertools.islice(waiting, batch_size)):
        batch = collate_regions([sample for _, sample in some]).to(device)
        predicted = predict(model, batch).float().cpu().numpy()
        for (start, _), distance in zip(some, predicted, strict=True):
            blend(start, distance)
    field: Array = total / weights
    if not np.isfinite(field).all():
        raise DataError(
            f"prediction: expected finite distances, got {np.count_nonzero(~np.isfinite(field))} that are not"
        )
    return field


def predict_mesh(
    model: Trainee, subject: Subject, batch_size: int = 8
) -> tuple[trimesh.Trimesh, dict[str, Any]]:
    """The predicted surface, closed, in RAS mm, and facts about it.

    Facts: `volume_ml`, `watertight`, and `dice_with_mask`: the overlap of the voxelised mesh with the
    input mask, which is low if the mesh is misplaced.
    Raises: DataError if the mask cannot be used, or if the prediction is empty.
    """
    grid = StructureGrid.make(subject.image, subject.mask, subject.modality, subject.structure)
    mesh = mesh_from_sdf(predict_field(model, grid, batch_size), grid.affine)
    again = voxelise(mesh, subject.image.affine, subject.image.shape)
    facts = {
        "structure": subject.structure,
        "modality": subject.modality,
        "volume_ml": round(float(mesh.volume) / 1000, 4),
        "watertight": bool(mesh.is_watertight),
        "vertices": len(mesh.vertices),
        "faces": len(mesh.faces),
        "dice_with_mask": round(overlap(again, subject.mask)["dice"], 4),
    }
    return mesh, facts


def write_mesh(mesh: trimesh.Trimesh, path: Path, space: str, facts: dict[str, Any]) -> None:
    """Write a mesh (RAS, mm) in a coordinate system, in the format of the path's extension, and `facts` as JSON in the same folder.

    Both state the coordinate system: the JSON as `coordinates`, the mesh (in the header of STL, a comment in PLY
    and OBJ, `extras` in GLB) as `SPACE=LPS`, which 3D Slicer reads. A GLB is in mm with these axes too,
    although glTF's own unit is the metre and its y points up.

    Raises: ConfigError if the coordinate system or the extension is unknown.
    """
    if space not in SPACES:
        raise ConfigError(f"coordinates: expected one of {', '.join(SPACES)}, got {space!r}")
    kind = path.suffix.removeprefix(".")
    note = f"SPACE={space.upper()}"
    placed = mesh.copy()
    if space == "lps":  # half a turn about z keeps the orientation of the faces
        placed.vertices = placed.vertices * (-1.0, -1.0, 1.0)
    if kind == "stl":
        data = placed.export(file_type="stl")
        data = f"{note} UNIT=mm fastlora".encode().ljust(80) + data[80:]
    elif kind == "ply":
        head, separator, rest = placed.export(file_type="ply").partition(b"\nelement")
        data = head + f"\ncomment {note}\ncomment UNIT=mm".encode() + separator + rest
    elif kind == "obj":
        data = f"# {note}\n# UNIT=mm\n{placed.export(file_type='obj')}".encode()
    elif kind == "glb":
        scene = trimesh.Scene(placed)
        scene.metadata = {"SPACE": space.upper(), "UNIT": "mm"}
        data = scene.export(file_type="glb")
    else:
        raise ConfigError(f"mesh_format: expected ply, stl, obj or glb, got {path.name!r}")
    words = {"ras": "right, anterior, superior", "lps": "left, posterior, superior"}[space]
    about = {
        "mesh": path.name,
        "coordinates": space.upper(),
        "axes": f"x, y, z grow towards the patient's {words}",
        "unit": "mm",
        **facts,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_all({path: data, path.with_suffix(".json"): json_bytes(about)})
