"""Refine coarse segmentations to surfaces in patient coordinates (mm): one image, or every case of a data set."""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastlora.errors import ConfigError, DataError, FastLoRAError
from fastlora.files import atomic_write
from fastlora.medical.console import Parser, show_log
from fastlora.medical.data.layouts import find_cases
from fastlora.medical.data.splits import select_structures
from fastlora.medical.data.volumes import Volume, tissue_of, window
from fastlora.medical.evaluation.pictures import overlay_picture
from fastlora.medical.evaluation.predict import (
    SPACES,
    Subject,
    predict_mesh,
    read_subject,
    stem,
    write_mesh,
)
from fastlora.medical.evaluation.results import MESH_FORMATS
from fastlora.medical.training.config import TrainConfig
from fastlora.medical.training.distributed import resolve_device
from fastlora.medical.training.finetuned import load_finetuned
from fastlora.medical.training.run_folder import RunFolder

COLUMNS = ["subject", "structure", "mesh", "volume_ml", "dice_with_mask", "watertight", "problem"]


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
        help="run folder (its best checkpoint is used), or one of its checkpoints/*.pt",
    )
    model.add_argument(
        "--merged",
        action="store_true",
        help="merge LoRA into the base weights first; changes the surface only by rounding",
    )
    model.add_argument(
        "--device",
        default="auto",
        metavar="NAME",
        help="device: auto, cpu, cuda or cuda:N (default: %(default)s)",
    )
    model.add_argument(
        "--batch_size",
        type=int,
        default=8,
        metavar="N",
        help="regions per batch (default: %(default)s)",
    )
    _add_inputs(parser)
    _add_output(parser)
    return parser


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    one = parser.add_argument_group("one image")
    one.add_argument(
        "--image",
        type=Path,
        metavar="PATH",
        help="image: NIfTI, a folder of one DICOM series, or PNG",
    )
    one.add_argument(
        "--mask",
        type=Path,
        metavar="PATH",
        help="coarse segmentation of the image: NIfTI, DICOM SEG, or PNG",
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
        help="name of the structure; it selects the CT intensity window (default: the mask's file name, or the segment's label)",
    )
    one.add_argument(
        "--spacing",
        type=float,
        nargs=3,
        metavar="MM",
        help="for PNG: distance between columns, rows and slices (the thickness of a single slice)",
    )
    many = parser.add_argument_group("a data set, in any layout of docs/quickstart_training.md")
    many.add_argument("--data_root", type=Path, metavar="DIR", help="folder of the data set")
    many.add_argument(
        "--classes",
        nargs="+",
        metavar="NAME",
        help="structures, or kinds of structures such as vertebra (default: all)",
    )
    many.add_argument(
        "--channel",
        type=int,
        default=0,
        metavar="N",
        help="channel number in dataset.json (default: %(default)s)",
    )
    many.add_argument(
        "--skip_invalid",
        action="store_true",
        help="skip unusable cases and structures, and list them in predictions.csv",
    )
    parser.add_argument(
        "--modality",
        choices=("ct", "mr"),
        help="modality of a NIfTI image, if neither its file name nor dataset.json states it",
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
        "--picture",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also write a PNG with the mesh's contours on image slices (default: on)",
    )


def subjects(
    args: argparse.Namespace, problems: list[str]
) -> Iterator[tuple[str, str, Subject | DataError]]:
    """Subject name, structure name, and the `Subject` or the error that prevents reading it."""
    if args.data_root is None:
        keys = ("modality", "structure", "label", "spacing")
        subject = read_subject(args.image, args.mask, **{key: getattr(args, key) for key in keys})
        yield stem(args.image), subject.structure, subject
        return
    cases = find_cases(
        args.data_root, args.modality or "ct", problems if args.skip_invalid else None, args.channel
    )
    for case in select_structures(cases, args.classes):
        image: Volume | None = None
        for structure in case.structures:
            try:
                image = image or case.load_image()
                mask = case.load_mask(structure, image)
                yield case.subject, structure, Subject(image, mask, case.modality, structure)
            except DataError as error:
                yield case.subject, structure, error


def run(args: argparse.Namespace) -> int:
    """Predicts and writes, one structure after the other; prints a line for each."""
    if (args.data_root is None) == (args.image is None) or (args.image is None) != (
        args.mask is None
    ):
        raise ConfigError("expected either --image and --mask, or --data_root")
    if args.data_root is not None:
        for name in ("label", "structure", "spacing"):
            if getattr(args, name) is not None:
                raise ConfigError(f"{name}: expected only with --image, got it with --data_root")
    if args.batch_size < 1:
        raise ConfigError(f"batch_size: expected >= 1, got {args.batch_size}")
    device = resolve_device(TrainConfig(device=args.device))
    folder, which = RunFolder.split(args.checkpoint)
    model = load_finetuned(folder, args.merged, which).to(device)
    about = {"run": str(folder), "checkpoint": which, "merged": args.merged}

    rows: list[dict[str, Any]] = []
    problems: list[str] = []
    for subject, structure, item in subjects(args, problems):
        row: dict[str, Any] = {"subject": subject, "structure": structure}
        try:
            if isinstance(item, DataError):
                raise item
            mesh, facts = predict_mesh(model, item, args.batch_size)
        except DataError as error:
            if not args.skip_invalid:
                raise
            rows.append({**row, "problem": str(error)})
            print(f"{subject} {structure}: skipped: {error}")
            continue
        if item.modality == "ct":
            facts["ct_window"] = tissue_of(structure)
        path = args.output_dir / f"{subject}_{structure}.{args.mesh_format}"
        write_mesh(mesh, path, args.coordinates, {"subject": subject, **facts, **about})
        if args.picture:
            grey = window(item.image.array, item.modality, structure)
            png = overlay_picture(item.image, grey, item.mask, mesh)
            atomic_write(path.with_suffix(".png"), png)
        rows.append({**row, "mesh": path.name, **facts})
        print(
            f"{path}: {facts['volume_ml']:.2f} ml, {facts['faces']} triangles, "
            f"Dice with the mask {facts['dice_with_mask']:.3f}, mm in {args.coordinates.upper()}",
            flush=True,
        )
    for problem in problems:
        rows.append({"problem": problem})
        print(f"skipped: {problem}")
    done = sum("mesh" in row for row in rows)
    if not done:
        raise DataError("expected at least one usable structure, got none")
    if args.data_root is not None:
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        atomic_write(args.output_dir / "predictions.csv", text.getvalue().encode())
        print(f"{done} surfaces, {len(rows) - done} skipped: {args.output_dir / 'predictions.csv'}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Predicts; returns 0, or 2 after one line on stderr, or 130 after Ctrl-C."""
    try:
        args = build_parser().parse_args(argv)
        show_log()
        return run(args)
    except (FastLoRAError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the files written so far are complete", file=sys.stderr)
        return 130
