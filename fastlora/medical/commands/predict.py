"""Refine coarse segmentations to surfaces in patient coordinates (mm): one image, or every case of a data set."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import trimesh
from tqdm import tqdm

from fastlora.errors import ConfigError, DataError
from fastlora.files import atomic_write
from fastlora.medical.console import (
    Parser,
    add_model_call,
    add_reading,
    run_command,
    show,
    show_log,
)
from fastlora.medical.data.manifest import csv_bytes
from fastlora.medical.data.splits import select_structures
from fastlora.medical.evaluation.mesh_files import SPACES, check_free, write_mesh, write_scene
from fastlora.medical.evaluation.pictures import overlay_picture
from fastlora.medical.evaluation.predict import Surface, predict_structures
from fastlora.medical.evaluation.results import MESH_FORMATS
from fastlora.medical.models.trainee import Trainee
from fastlora.medical.scans.layouts import find_cases
from fastlora.medical.scans.names import file_stem
from fastlora.medical.scans.scan import Scan
from fastlora.medical.scans.single import open_files, read_label_names
from fastlora.medical.scans.volumes import Case
from fastlora.medical.scans.windows import tissue_of
from fastlora.medical.training.config import TrainConfig
from fastlora.medical.training.distributed import resolve_device
from fastlora.medical.training.finetuned import Finetuned

COLUMNS = [
    *("subject", "structure", "label", "mesh", "volume_ml", "mask_volume_ml", "surface_cm2"),
    *("dice_with_mask", "watertight", "warning", "problem"),
]


def build_parser() -> argparse.ArgumentParser:
    """The command-line parser."""
    parser = Parser(
        usage="%(prog)s --checkpoint RUN (--image FILE --mask FILE | --data_root DIR) --output_dir DIR [flags]",
        description=__doc__,
        allow_abbrev=False,
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--checkpoint",
        metavar="RUN",
        required=True,
        help="run folder (its best checkpoint is used), one of its checkpoints/*.pt, or its adapter.safetensors",
    )
    model.add_argument(
        "--merged",
        action="store_true",
        help="merge LoRA into the base weights first; changes the surface only by rounding",
    )
    add_model_call(model)
    _add_files(parser)
    _add_data_set(parser)
    _add_output(parser)
    return parser


def _add_files(parser: argparse.ArgumentParser) -> None:
    one = parser.add_argument_group("one image")
    one.add_argument(
        "--image",
        type=Path,
        metavar="PATH",
        help="image: NIfTI, MGH, MetaImage, NRRD, DICOM (a file or a folder of one series), or PNG",
    )
    one.add_argument(
        "--mask",
        type=Path,
        metavar="PATH",
        help="coarse segmentation of the image, in the same formats or DICOM SEG",
    )
    one.add_argument(
        "--label",
        type=int,
        metavar="N",
        help="label value in the mask, or segment number of a DICOM SEG (default: the only one)",
    )
    one.add_argument(
        "--structure",
        metavar="NAME",
        help="name of the structure; it selects the CT intensity window (default: that of the label, or the mask's file name)",
    )
    one.add_argument(
        "--spacing",
        type=float,
        nargs=3,
        metavar="MM",
        help="for PNG: distance between columns, rows and slices (the thickness of a single slice)",
    )
    one.add_argument(
        "--all",
        action="store_true",
        help="predict every label of the mask, and write a scene and a table of them",
    )
    one.add_argument(
        "--label_names",
        type=Path,
        metavar="FILE",
        help='names of the labels: JSON ({"liver": 1}, or nnU-Net\'s dataset.json) or lines of value and name (3D Slicer, ITK-SNAP)',
    )
    one.add_argument(
        "--subject",
        metavar="NAME",
        help="first part of the files' names (default: the image's file name)",
    )


def _add_data_set(parser: argparse.ArgumentParser) -> None:
    many = parser.add_argument_group("a data set, in any layout of docs/quickstart_training.md")
    many.add_argument("--data_root", type=Path, metavar="DIR", help="folder of the data set")
    both = parser.add_argument_group("reading")
    add_reading(both)
    both.add_argument(
        "--channel",
        type=int,
        metavar="N",
        help="number of the image's channel: in dataset.json (default there: 0), or of a 4-D file",
    )
    both.add_argument(
        "--skip_invalid",
        action="store_true",
        help="skip unusable cases and structures, and list them in predictions.csv",
    )
    both.add_argument(
        "--modality",
        choices=("ct", "mr"),
        help="modality of the image, if neither its file name nor dataset.json states it",
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output_dir", type=Path, metavar="DIR", required=True, help="folder for the meshes"
    )
    output.add_argument(
        "--mesh_format",
        choices=MESH_FORMATS,
        default=MESH_FORMATS[0],
        help="format of the meshes (default: %(default)s)",
    )
    output.add_argument(
        "--coordinates",
        choices=SPACES,
        default=SPACES[0],
        help="coordinate system of the mesh: ras (NIfTI) or lps (DICOM, ITK); written into the files (default: %(default)s)",
    )
    output.add_argument(
        "--scene",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also write a GLB of all structures of an image, if there are several (default: on)",
    )
    output.add_argument(
        "--overwrite",
        action="store_true",
        help="replace files of the same names that show another image",
    )
    output.add_argument(
        "--picture",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also write a PNG with the mesh's contours on image slices (default: on)",
    )


def open_scans(args: argparse.Namespace, problems: list[str]) -> list[Scan]:
    """The cases to predict. problems: receives one line for each case that cannot be used, with `--skip_invalid`."""
    if args.data_root is None:
        keys = ("modality", "structure", "label", "spacing", "channel", "subject", "intercept")
        options = {key: getattr(args, key) for key in keys}
        names = read_label_names(args.label_names) if args.label_names else None
        options |= {"names": names, "tolerance_mm": args.grid_tolerance, "every_label": args.all}
        return [open_files(args.image, args.mask, **options)]
    cases = find_cases(
        args.data_root,
        args.modality or "ct",
        problems if args.skip_invalid else None,
        args.channel,
        intercept=args.intercept,
        tolerance_mm=args.grid_tolerance,
    )
    return [Scan(case) for case in select_structures(cases, args.classes)]


def check_arguments(args: argparse.Namespace) -> None:
    """Raises: ConfigError if flags contradict each other."""
    if (args.data_root is None) == (args.image is None) or (args.image is None) != (
        args.mask is None
    ):
        raise ConfigError("expected either --image and --mask, or --data_root")
    for name in ("label", "structure", "spacing", "label_names", "subject"):
        if args.data_root is not None and getattr(args, name) is not None:
            raise ConfigError(f"{name}: expected only with --image, got it with --data_root")
    if args.data_root is None and args.classes is not None:
        raise ConfigError("classes: expected only with --data_root, got it with --image")
    if args.label_names is not None and not args.all and args.label is None:
        raise ConfigError("label_names: expected it with --all or --label, got neither")
    if args.batch_size < 1:
        raise ConfigError(f"batch_size: expected >= 1, got {args.batch_size}")


class Output:
    """The files of a prediction: meshes, pictures, a scene for each case, and a table.

    Raises: ConfigError if a file would replace one that shows another image.
    """

    def __init__(self, args: argparse.Namespace, scans: Sequence[Scan], about: Mapping[str, Any]):
        self.args, self.about = args, about
        self.rows: list[dict[str, Any]] = []
        taken: set[str] = set()
        self.paths: dict[tuple[str, str], Path] = {}
        self.scenes: dict[str, Path] = {}
        for scan in scans:
            case = scan.case
            for structure in case.structures:
                name = _free_name(file_stem(f"{case.subject}_{structure}"), taken)
                path = args.output_dir / f"{name}.{args.mesh_format}"
                self.paths[case.subject, structure] = path
                check_free(path, self._source(case, structure), args.overwrite)
            if args.scene and len(case.structures) > 1:
                name = _free_name(file_stem(f"{case.subject}_scene"), taken)
                self.scenes[case.subject] = args.output_dir / f"{name}.glb"
                check_free(self.scenes[case.subject], self._source(case), args.overwrite)
        one = "" if args.data_root else f"{file_stem(scans[0].case.subject)}_"
        self.table = args.output_dir / f"{one}predictions.csv"
        if self.table.exists() and not args.overwrite:
            with self.table.open("rb") as file:
                if not file.readline().startswith(",".join(COLUMNS[:4]).encode()):
                    raise ConfigError(
                        f"output_dir: {self.table} exists and was not written by this command; choose another folder, or --overwrite"
                    )

    def _source(self, case: Case, structure: str | None = None) -> dict[str, Any]:
        """What a file shows: of a case, or of one structure. JSON-serialisable."""
        found: dict[str, Any] = {"subject": case.subject, "image": str(case.image_path.absolute())}
        if structure is not None:
            source = case.structures[structure]
            label = list(source.label) if isinstance(source.label, tuple) else source.label
            found |= {"mask": str(source.path.absolute()), "label": label}
        return found

    def write(self, scan: Scan, structure: str, found: Surface) -> None:
        """Writes a structure's mesh and picture, and prints a line."""
        case, args, path = scan.case, self.args, self.paths[scan.case.subject, structure]
        facts = {"structure": structure, "modality": case.modality, **found.facts}
        unit = f"mm in {args.coordinates.upper()}"
        if not scan.image.oriented:
            facts["orientation"] = "assumed, since the image's header states none"
            unit += f", orientation {facts['orientation']}"
        if case.modality == "ct":
            facts["ct_window"] = tissue_of(structure)
        about = {**self._source(case, structure), **facts, **self.about}
        write_mesh(found.mesh, path, args.coordinates, about)
        if args.picture:
            limits = scan.limits(structure)
            atomic_write(
                path.with_suffix(".png"),
                overlay_picture(scan.image, limits, found.part, found.mesh),
            )
        self.rows.append(
            {"subject": case.subject, "mesh": path.name, "label": about["label"], **facts}
        )
        show(
            f"{path}: {facts['volume_ml']:.2f} ml, {facts['faces']} triangles, "
            f"Dice with the mask {facts['dice_with_mask']:.3f}, {unit}"
        )
        if "warning" in facts:
            show(f"warning: {path.name}: {facts['warning']}")

    def write_scene(self, scan: Scan, meshes: Mapping[str, trimesh.Trimesh]) -> None:
        """Writes a case's scene, if it has several structures."""
        path = self.scenes.get(scan.case.subject)
        if path is not None and meshes:
            write_scene(
                meshes, path, self.args.coordinates, {**self._source(scan.case), **self.about}
            )
            show(f"{path}: {len(meshes)} structures in one scene")

    def write_table(self) -> None:
        """Writes the table, in the order of the structures."""
        args = self.args
        if args.data_root is None and not args.all:
            return
        places = {key: n for n, key in enumerate(self.paths)}
        self.rows.sort(key=lambda row: places.get(_key(row), len(places)))
        cells = ([row.get(name) for name in COLUMNS] for row in self.rows)
        atomic_write(self.table, csv_bytes([COLUMNS, *cells]))
        done = sum("mesh" in row for row in self.rows)
        show(f"{done} surfaces, {len(self.rows) - done} skipped: {self.table}")


def _free_name(name: str, taken: set[str]) -> str:
    """The name, or with a number if another file has it, also where upper and lower case are one."""
    names = itertools.chain([name], (f"{name}-{n}" for n in itertools.count(2)))
    free = next(n for n in names if n.lower() not in taken)
    taken.add(free.lower())
    return free


def _key(row: Mapping[str, Any]) -> tuple[str, str]:
    return row.get("subject", ""), row.get("structure", "")


def run(args: argparse.Namespace) -> int:
    """Predicts and writes, one structure after the other; prints a line for each."""
    check_arguments(args)
    device = resolve_device(TrainConfig(device=args.device))
    trained = Finetuned.read(
        args.checkpoint, base_weights=args.base_weights, sam3d_dir=args.sam3d_dir
    )
    model = trained.model(args.merged).to(device)
    problems: list[str] = []
    scans = open_scans(args, problems)
    folder = trained.folder or trained.file.parent
    about = {"run": str(folder), "checkpoint": trained.name, "merged": args.merged}
    output = Output(args, scans, about)
    total = sum(len(scan.case.structures) for scan in scans)
    try:
        with tqdm(total=total, desc="predicted", unit="structure", disable=None) as progress:
            while scans:
                predict_case(model, scans.pop(0), args, output, progress)
        output.rows += [{"problem": problem} for problem in problems]
        for problem in problems:
            show(f"skipped: {problem}")
    finally:
        if any("mesh" in row for row in output.rows):
            output.write_table()
    if not any("mesh" in row for row in output.rows):
        raise DataError("expected at least one usable structure, got none")
    return 0


def predict_case(
    model: Trainee, scan: Scan, args: argparse.Namespace, output: Output, progress: Any
) -> None:
    """Predicts and writes the structures of a case. Raises: DataError at the first that cannot be used, without `--skip_invalid`."""
    meshes = {}
    subject, structures = scan.case.subject, scan.case.structures
    for structure, found in predict_structures(model, scan, structures, args.batch_size):
        if isinstance(found, Surface):
            with scan.watch.step("files"):
                output.write(scan, structure, found)
            meshes[structure] = found.mesh
        elif args.skip_invalid:
            output.rows.append({"subject": subject, "structure": structure, "problem": str(found)})
            show(f"{subject} {structure}: skipped: {found}")
        else:
            raise found
        progress.update()
    with scan.watch.step("files"):
        output.write_scene(scan, {name: meshes[name] for name in structures if name in meshes})
    if len(structures) > 1:
        show(f"{subject}: {scan.watch}")


def main(argv: Sequence[str] | None = None) -> int:
    """Predicts; returns the exit code, as `run_command`."""

    def work() -> int:
        args = build_parser().parse_args(argv)
        show_log()
        return run(args)

    return run_command(work, "interrupted: the files written so far are complete")
