"""Results of an evaluation as plain values and files: means, regressions, eval.json, CSV, meshes.

`document` is the complete result; `compact_record` is its summary for benchmarks.
"""

from __future__ import annotations

import datetime
import platform
import re
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trimesh
from nibabel.affines import apply_affine
from scipy.ndimage import map_coordinates

from fastlora.errors import ConfigError
from fastlora.files import atomic_write, replaced_folder
from fastlora.medical.data.manifest import csv_bytes
from fastlora.medical.evaluation.evaluate import LABELS, Evaluation, Row, Run
from fastlora.medical.evaluation.metrics import METRIC_KEYS, METRIC_OF, METRICS, mean_defined
from fastlora.medical.evaluation.statistics import COMPARED, statistics
from fastlora.medical.scans.geometry import Array, mesh_from_sdf
from fastlora.medical.scans.names import file_stem

PACKAGES = ("torch", "numpy", "scipy", "scikit-image", "trimesh", "monai", "nibabel", "plotly")
MESH_FORMATS = ("ply", "stl", "obj", "glb")
CSV_COLUMNS = (
    *("group", "subject", "modality", "structure", "region", "spacing_mm"),
    *("method", "status", *METRIC_KEYS),
)
"""The first line of eval.csv, which is written first and by which the files of an evaluation are recognised."""

_MESH_NAME = re.compile(rf".+_(truth|{'|'.join(LABELS)})\.({'|'.join(MESH_FORMATS)})")
EVERYTHING = "all"
"""The group that every region belongs to."""


def summarise(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, Any]]]:
    """method -> group (and 'all') -> metric -> {'mean', 'n', 'undefined'} over the regions.

    In addition to the metrics, `regions` and `status` are counts.
    """
    summary: dict[str, dict[str, dict[str, Any]]] = {}
    for method in dict.fromkeys(r["method"] for r in rows):
        of_method = [r for r in rows if r["method"] == method]
        summary[method] = {}
        for group in (*sorted({r["group"] for r in of_method}), EVERYTHING):
            members = [r for r in of_method if group in (r["group"], EVERYTHING)]
            summary[method][group] = {
                **{key: mean_defined(r[key] for r in members) for key in METRIC_KEYS},
                "regions": len(members),
                "status": dict(sorted(Counter(r["status"] for r in members).items())),
            }
    return summary


def structure_means(rows: Sequence[Row]) -> list[Row]:
    """One row for each structure of a subject and each method: the means of its regions.

    `regions` is their number; a metric that is undefined in all of them is None.
    """
    structures: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        key = (row["subject"], row["structure"], row["method"])
        structures.setdefault(key, []).append(row)
    names = ("group", "subject", "modality", "structure", "method")
    return [
        {name: mine[0][name] for name in names}
        | {"regions": len(mine)}
        | {key: mean_defined(r[key] for r in mine)["mean"] for key in METRIC_KEYS}
        for mine in structures.values()
    ]


def is_worse(key: str, value: float | None, reference: float | None) -> bool:
    """Whether a metric is worse than the reference at the digits that are shown, both defined."""
    if value is None or reference is None:
        return False
    return METRIC_OF[key].merit(value) < METRIC_OF[key].merit(reference)


def worse_than(rows: Sequence[Row], method: str, reference: str) -> list[dict[str, Any]]:
    """Where `method` is worse than `reference` in one of `COMPARED`, the largest loss of Dice first.

    rows: of regions, or means of structures. Each entry has the place, `worse` (the metrics that are
    worse), and `values`: for each of `COMPARED` the method's and the reference's value.
    """
    place = ("group", "subject", "structure", "region")
    others = {tuple(r.get(n) for n in place): r for r in rows if r["method"] == reference}
    losses = []
    for row in (r for r in rows if r["method"] == method):
        other = others[tuple(row.get(n) for n in place)]
        worse = [key for key in COMPARED if is_worse(key, row[key], other[key])]
        if worse:
            where = {name: row[name] for name in place if name in row}
            values = {key: [row[key], other[key]] for key in COMPARED}
            losses.append({**where, "worse": worse, "values": values})
    return sorted(losses, key=lambda loss: loss["values"]["dice"][0] - loss["values"]["dice"][1])


def document(
    evaluation: Evaluation, facts: Mapping[str, Any], runs: Mapping[str, Run], command: str
) -> dict[str, Any]:
    """The content of eval.json, as plain JSON values.

    facts: of `compare_runs`. runs: 'lora' and perhaps 'full'.
    """
    rows = evaluation.rows
    structures = structure_means(rows)
    return {
        "format": "fastlora-medical-eval-1",
        "methods": {key: LABELS[key] for key in evaluation.predictions},
        "metrics": {metric.key: asdict(metric) for metric in METRICS},
        "tolerance_mm": evaluation.tolerance_mm,
        **facts,
        "seed": runs["lora"].config.seed,
        "runs": {key: run.facts for key, run in runs.items()},
        "environment": environment(),
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "summary": summarise(rows),
        "statistics": statistics(structures, rows),
        "worse": {
            reference: {
                "structures": worse_than(structures, "lora", reference),
                "regions": worse_than(rows, "lora", reference),
            }
            for reference in ("base", "baseline")
        },
        "structures": structures,
        "records": rows,
    }


def compact_record(content: Mapping[str, Any]) -> dict[str, Any]:
    """A benchmark's summary of `document`: without the regions, each mean as one number."""
    means = {
        method: {
            group: {
                key: round(figures[key]["mean"], 6)
                for key in METRIC_KEYS
                if figures[key]["mean"] is not None
            }
            | {"regions": figures["regions"], "status": figures["status"]}
            for group, figures in groups.items()
        }
        for method, groups in content["summary"].items()
    }
    worse = {
        reference: {
            "structures": [f"{w['subject']}/{w['structure']}" for w in lists["structures"]],
            "regions": len(lists["regions"]),
        }
        for reference, lists in content["worse"].items()
    }
    left_out = ("format", "metrics", "summary", "worse", "structures", "records")
    kept = {key: value for key, value in content.items() if key not in left_out}
    return {"format": "fastlora-medical-record-1", **kept, "means": means, "lora_worse_than": worse}


def environment() -> dict[str, Any]:
    """Versions, machine and, in a git checkout, the commit."""
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "torch_threads": torch.get_num_threads(),
        "git": _git_state(),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _git_state() -> dict[str, Any] | None:
    """The commit, and whether files differ from it; None if this file is not in a git checkout."""

    def git(*arguments: str) -> str:
        command, here = ["git", *arguments], Path(__file__).parent
        return subprocess.run(
            command, cwd=here, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return {"sha": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """One row per region and method; an undefined metric is an empty cell."""
    cells = ([row.get(name) for name in CSV_COLUMNS] for row in rows)
    atomic_write(path, csv_bytes([CSV_COLUMNS, *cells]))


def check_output(folder: Path) -> None:
    """Refuses to replace files that no evaluation wrote. Raises: ConfigError, naming the first one."""
    ours = _first_line(folder / "eval.csv").split(",")[:8] == list(CSV_COLUMNS[:8])
    for name in ("eval.json", "eval.csv", "report.html", "meshes", "slices"):
        if not ours and (folder / name).exists():
            raise ConfigError(
                f"output_dir: {folder / name} exists and was not written by an evaluation; choose another folder"
            )
    if (folder / "meshes").is_dir():
        for path in sorted((folder / "meshes").iterdir()):
            if not _MESH_NAME.fullmatch(path.name):
                raise ConfigError(
                    f"output_dir: {path} was not written by an evaluation, which replaces the folder; choose another folder"
                )


def _first_line(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            return file.readline()
    except (OSError, UnicodeDecodeError):
        return ""


def write_meshes(folder: Path, evaluation: Evaluation, mesh_format: str = "ply") -> int:
    """Ground truth and predictions as meshes in patient coordinates (RAS, mm): `<subject>_<region>_<method>.<ext>`.

    The folder is replaced as a whole. An empty prediction has no file, and neither has merged LoRA,
    whose meshes equal those of LoRA. A predicted PLY carries `distance_mm` at
    each vertex (see `distance_to_truth`). Returns the number of files.

    Raises: ConfigError if the format is not in `MESH_FORMATS`.
    """
    if mesh_format not in MESH_FORMATS:
        raise ConfigError(f"mesh_format: expected one of {MESH_FORMATS}, got {mesh_format!r}")
    count = 0
    with replaced_folder(folder) as new:
        for index, sample in enumerate(evaluation.samples):
            fields = {k: p[index] for k, p in evaluation.predictions.items() if k != "merged"}
            for method, field in {"truth": sample["sdf_vox"], **fields}.items():
                if not (field < 0).any():
                    continue
                meta = sample["meta"]
                region = file_stem(f"{meta['subject']}_{meta['region']}")
                name = f"{region}_{method}"
                mesh = mesh_from_sdf(field, sample["affine"])
                if method != "truth" and mesh_format == "ply":
                    mesh.vertex_attributes["distance_mm"] = distance_to_truth(mesh, sample)
                mesh.export(new / f"{name.replace('@', '_at_')}.{mesh_format}")
                count += 1
    return count


def distance_to_truth(mesh: trimesh.Trimesh, sample: Mapping[str, Any]) -> Array:
    """Signed distance in mm of each vertex (V,) to the ground-truth surface, negative inside it.

    It is limited to the truncation of the sample's field (4 fine voxels, 6 mm).
    """
    index = apply_affine(np.linalg.inv(sample["affine"]), mesh.vertices)
    voxels = map_coordinates(sample["sdf_vox"], index.T, order=1, mode="nearest")
    distance: Array = (voxels * float(sample["spacing"])).astype(np.float32)
    return distance
