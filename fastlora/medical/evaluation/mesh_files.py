"""Files of predicted surfaces: meshes and scenes that state their coordinates, each with facts in a JSON file.

The files state their coordinates: RAS (x to the patient's right is positive; NIfTI's convention) or LPS (to the left; DICOM's,
and ITK's).
"""

from __future__ import annotations

import colorsys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import trimesh

from fastlora.errors import ConfigError
from fastlora.files import atomic_write_all, json_bytes, read_json

SPACES = ("ras", "lps")
PROGRAM = "fastlora-medical predict"
"""The entry `made_by` of our JSON files, by which they are recognised."""


def write_mesh(mesh: trimesh.Trimesh, path: Path, space: str, facts: Mapping[str, Any]) -> None:
    """Write a mesh (RAS, mm) in a coordinate system, in the format of the path's extension, and `facts` as JSON in the same folder.

    Both state the coordinate system: the JSON as `coordinates`, the mesh (in the header of STL, a comment in PLY
    and OBJ, `extras` in GLB) as `SPACE=LPS`, which 3D Slicer reads. A GLB is in mm with these axes too,
    although glTF's own unit is the metre and its y points up.

    Raises: ConfigError if the coordinate system or the extension is unknown.
    """
    placed, note = _placed(mesh, space), f"SPACE={space.upper()}"
    kind = path.suffix.removeprefix(".")
    if kind == "stl":
        data = placed.export(file_type="stl")
        data = f"{note} UNIT=mm fastlora".encode().ljust(80) + data[80:]
    elif kind == "ply":
        head, separator, rest = placed.export(file_type="ply").partition(b"\nelement")
        data = head + f"\ncomment {note}\ncomment UNIT=mm".encode() + separator + rest
    elif kind == "obj":
        data = f"# {note}\n# UNIT=mm\n{placed.export(file_type='obj')}".encode()
    elif kind == "glb":
        data = _glb(trimesh.Scene(placed), space)
    else:
        raise ConfigError(f"mesh_format: expected ply, stl, obj or glb, got {path.name!r}")
    _write(path, data, space, facts)


def write_scene(
    meshes: Mapping[str, trimesh.Trimesh], path: Path, space: str, facts: Mapping[str, Any]
) -> None:
    """Write meshes (RAS, mm) as one GLB, each a node with its name and a colour, and `facts` with the colours as JSON.

    Raises: ConfigError if the coordinate system is unknown.
    """
    scene, colours = trimesh.Scene(), distinct_colours(len(meshes))
    for (name, mesh), colour in zip(meshes.items(), colours, strict=True):
        placed = _placed(mesh, space)
        material = trimesh.visual.material.PBRMaterial(
            name=name, baseColorFactor=[*colour, 255], metallicFactor=0.0, roughnessFactor=0.8
        )
        placed.visual = trimesh.visual.TextureVisuals(material=material)
        scene.add_geometry(placed, node_name=name, geom_name=name)
    shown = {
        name: "#{:02x}{:02x}{:02x}".format(*colour)
        for name, colour in zip(meshes, colours, strict=True)
    }
    _write(path, _glb(scene, space), space, {**facts, "colours": shown})


def distinct_colours(count: int) -> list[tuple[int, int, int]]:
    """Red, green and blue, 0 to 255, of `count` colours; neighbours in the list differ most."""
    golden = 0.618034  # of a turn of the hue, which never repeats
    shades = ((0.65, 0.85), (0.85, 0.65), (0.45, 0.95))
    colours = (colorsys.hsv_to_rgb(n * golden % 1, *shades[n % len(shades)]) for n in range(count))
    return [(round(255 * r), round(255 * g), round(255 * b)) for r, g, b in colours]


def check_free(path: Path, source: Mapping[str, Any], overwrite: bool) -> None:
    """Refuses to replace a file that is not ours, or that shows something else.

    path: of a mesh or scene, with a JSON file and perhaps a picture of the same name. source: entries of the JSON file that name the input.
    Raises: ConfigError; not with `overwrite`.
    """
    about = path.with_suffix(".json")
    there = [p for p in (path, about, path.with_suffix(".png")) if p.exists()]
    if overwrite or not there:
        return
    try:
        found = read_json(about)
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or found.get("made_by") != PROGRAM:
        raise ConfigError(
            f"output_dir: {there[0]} exists and was not written by this command; choose another folder, or --overwrite"
        )
    for name, value in source.items():
        if found.get(name) != value:
            raise ConfigError(
                f"output_dir: {path} exists and has the {name} {found.get(name)}, not {value}; choose another folder, "
                "name the files with --subject or --structure, or --overwrite"
            )


def _placed(mesh: trimesh.Trimesh, space: str) -> trimesh.Trimesh:
    if space not in SPACES:
        raise ConfigError(f"coordinates: expected one of {', '.join(SPACES)}, got {space!r}")
    placed = mesh.copy()
    if space == "lps":  # half a turn about z keeps the orientation of the faces
        placed.vertices = placed.vertices * (-1.0, -1.0, 1.0)
    return placed


def _glb(scene: trimesh.Scene, space: str) -> bytes:
    scene.metadata = {"SPACE": space.upper(), "UNIT": "mm"}
    data: bytes = scene.export(file_type="glb")
    return data


def _write(path: Path, data: bytes, space: str, facts: Mapping[str, Any]) -> None:
    words = {"ras": "right, anterior, superior", "lps": "left, posterior, superior"}[space]
    about = {
        "made_by": PROGRAM,
        "mesh": path.name,
        "coordinates": space.upper(),
        "axes": f"x, y, z grow towards the patient's {words}",
        "unit": "mm",
        **facts,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_all({path: data, path.with_suffix(".json"): json_bytes(about)})
