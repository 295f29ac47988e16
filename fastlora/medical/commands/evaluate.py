"""Compare the trivial baseline, the base model, LoRA, merged LoRA and full fine-tuning on held-out regions."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastlora.errors import ConfigError
from fastlora.files import atomic_write, write_json
from fastlora.medical.console import Parser, add_model_call, command_line, run_command, show_log
from fastlora.medical.evaluation.evaluate import LABELS, Run, compare_runs
from fastlora.medical.evaluation.metrics import TOLERANCE_MM
from fastlora.medical.evaluation.report import examples, render, slices_png
from fastlora.medical.evaluation.results import (
    EVERYTHING,
    MESH_FORMATS,
    check_output,
    compact_record,
    document,
    write_csv,
    write_meshes,
)
from fastlora.medical.evaluation.tables import number


def build_parser() -> argparse.ArgumentParser:
    """The command-line parser."""
    parser = Parser(
        usage="%(prog)s --checkpoint RUN --output_dir DIR [flags]",
        description=__doc__,
        allow_abbrev=False,
    )
    runs = parser.add_argument_group("compared runs")
    runs.add_argument(
        "--checkpoint",
        metavar="RUN",
        required=True,
        help="run folder of LoRA fine-tuning (its best checkpoint is used), one of its checkpoints/*.pt, or its adapter.safetensors",
    )
    runs.add_argument(
        "--full",
        metavar="RUN",
        help="run folder or checkpoint of full fine-tuning on the same data",
    )
    runs.add_argument(
        "--data_root",
        metavar="DIR",
        help="folder to read the cases from (default: that of the training run)",
    )
    runs.add_argument(
        "--cache_dir",
        metavar="DIR",
        help="cache written by `fastlora-medical preprocess` for these cases; restricts the evaluation to the structures that it found usable "
        "(default: that of the training run, or none with --data_root)",
    )
    metrics = parser.add_argument_group("evaluation")
    metrics.add_argument(
        "--tolerance_mm",
        type=float,
        default=TOLERANCE_MM,
        metavar="X",
        help="largest distance in mm at which surfaces still match in NSD (default: %(default)g)",
    )
    add_model_call(metrics)
    _add_output(parser)
    return parser


def _add_output(parser: argparse.ArgumentParser) -> None:
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output_dir", metavar="DIR", required=True, help="folder for eval.json and eval.csv"
    )
    output.add_argument(
        "--save_predictions",
        action="store_true",
        help="also write meshes/: ground truth and predictions in patient coordinates (RAS, mm)",
    )
    output.add_argument(
        "--mesh_format",
        choices=MESH_FORMATS,
        default=MESH_FORMATS[0],
        help="format of the meshes (default: %(default)s)",
    )
    output.add_argument(
        "--visualize",
        action="store_true",
        help="also write a report or images; see --visualize_format",
    )
    output.add_argument(
        "--visualize_format",
        choices=("html", "png"),
        default="html",
        help="html: one file report.html with tables, charts and surfaces; png: slices/*.png (default: %(default)s)",
    )
    output.add_argument(
        "--record", metavar="FILE", help="also write a short JSON summary of the results to FILE"
    )


def run(args: argparse.Namespace, command: str) -> list[str]:
    """Evaluates, then writes all files at the end; returns the lines to print."""
    output = Path(args.output_dir)
    for name, path in (("output_dir", output), ("record", args.record and Path(args.record))):
        if path and path.exists() and path.is_dir() != (name == "output_dir"):
            raise ConfigError(
                f"{name}: expected a {'folder' if name == 'output_dir' else 'file'}, got {path}"
            )
    if args.batch_size < 1:
        raise ConfigError(f"batch_size: expected >= 1, got {args.batch_size}")
    check_output(output)
    paths = {"base_weights": args.base_weights, "sam3d_dir": args.sam3d_dir}
    runs = {"lora": Run.read(args.checkpoint, "lora", **paths)}
    if args.full is not None:
        runs["full"] = Run.read(args.full, "full", **paths)
    evaluation, facts = compare_runs(
        runs["lora"],
        runs.get("full"),
        data_root=args.data_root,
        cache_dir=args.cache_dir,
        tolerance_mm=args.tolerance_mm,
        batch_size=args.batch_size,
        device=args.device,
    )
    content = document(evaluation, facts, runs, command)
    page = images = None
    if args.visualize and args.visualize_format == "html":
        page = render(content, evaluation, runs).encode()
    elif args.visualize:
        images = {index: slices_png(evaluation, index) for index, _ in examples(evaluation)}

    output.mkdir(parents=True, exist_ok=True)
    written = ["eval.json", "eval.csv"]
    write_csv(output / "eval.csv", evaluation.rows)
    if args.save_predictions:
        count = write_meshes(output / "meshes", evaluation, args.mesh_format)
        written.append(f"meshes/ ({count} files)")
    if images:
        (output / "slices").mkdir(exist_ok=True)
        for index, png in images.items():
            meta = evaluation.samples[index]["meta"]
            path = output / "slices" / f"{meta['subject']}_{meta['region']}.png"
            atomic_write(path, png)
        written.append(f"slices/ ({len(images)} files)")
    if page:
        atomic_write(output / "report.html", page)
        written.append("report.html")
    if args.record:
        Path(args.record).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(args.record), compact_record(content))
    write_json(output / "eval.json", content)
    return [*summary_lines(content), f"written to {output}: {', '.join(written)}"]


def summary_lines(content: Mapping[str, Any]) -> list[str]:
    """The most important results as lines of text."""
    keys = {"dice": "Dice", "nsd": f"NSD@{content['tolerance_mm']:g}mm", "hd95_mm": "HD95 mm"}
    keys["volume_error"] = "volume error"
    lines = []
    for group in content["summary"]["lora"]:
        title = "all regions" if group == EVERYTHING else group
        count = content["summary"]["lora"][group]["regions"]
        lines.append(f"{title + f' ({count})':<34}" + "".join(f"{k:>14}" for k in keys.values()))
        for method, groups in content["summary"].items():
            values = (ascii_number(key, groups[group][key]["mean"]) for key in keys)
            lines.append(f"  {LABELS[method]:<32}" + "".join(f"{v:>14}" for v in values))
    worse = content["worse"]["base"]["structures"]
    names = ", ".join(f"{w['subject']}/{w['structure']}" for w in worse)
    lines.append(
        f"structures where LoRA is worse than the base model in Dice, HD95 or NSD: {names or 'none'}"
    )
    lines.append(
        f"largest difference between merged and unmerged LoRA: {content['merged_difference_vox']:.1e} voxel"
    )
    return lines


def ascii_number(key: str, value: float | None) -> str:
    """A metric as text that every terminal can print."""
    return number(key, value).replace("\N{MINUS SIGN}", "-").replace("\N{EN DASH}", "-")


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluates; returns the exit code, as `run_command`."""
    arguments = sys.argv[1:] if argv is None else list(argv)

    def work() -> int:
        args = build_parser().parse_args(arguments)
        show_log()
        command = [*command_line("eval_medical.py", "eval"), *arguments]
        print("\n".join(run(args, shlex.join(command))))
        return 0

    return run_command(work)
