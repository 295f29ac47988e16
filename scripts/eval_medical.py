"""Compare trivial baseline, base model, LoRA, merged LoRA and full fine-tuning on held-out regions."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastlora.errors import ConfigError, FastLoRAError
from fastlora.files import atomic_write, write_json
from fastlora.medical.console import Parser, show_log
from fastlora.medical.evaluation.evaluate import LABELS, Run, compare_runs
from fastlora.medical.evaluation.metrics import TOLERANCE_MM
from fastlora.medical.evaluation.report import examples, render, slices_png
from fastlora.medical.evaluation.results import (
    EVERYTHING,
    MESH_FORMATS,
    compact_record,
    document,
    write_csv,
    write_meshes,
)
from fastlora.medical.evaluation.tables import number


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
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
        help="run folder of a LoRA fine-tuning (its best checkpoint is used), or one of its checkpoints/*.pt",
    )
    runs.add_argument(
        "--full", metavar="RUN", help="the same of a full fine-tuning on the same data"
    )
    runs.add_argument(
        "--data_root",
        metavar="DIR",
        help="read the cases from here (default: from where the run found them)",
    )
    runs.add_argument(
        "--cache_dir",
        metavar="DIR",
        help="cache of preprocess_medical.py for these cases: only the structures that it found usable are used (default: the run's, "
        "none with --data_root)",
    )
    figures = parser.add_argument_group("figures")
    figures.add_argument(
        "--tolerance_mm",
        type=float,
        default=TOLERANCE_MM,
        metavar="X",
        help="how far surfaces may lie apart and still match in NSD (mm; default: %(default)g)",
    )
    figures.add_argument(
        "--batch_size",
        type=int,
        default=8,
        metavar="N",
        help="regions at a time (default: %(default)d)",
    )
    figures.add_argument(
        "--device",
        default="auto",
        metavar="NAME",
        help="auto, cpu, cuda or cuda:N (default: %(default)s)",
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output_dir", metavar="DIR", required=True, help="folder for eval.json and eval.csv"
    )
    output.add_argument(
        "--save_predictions",
        action="store_true",
        help="also meshes/: truth and predictions in the patient's mm (RAS)",
    )
    output.add_argument(
        "--mesh_format",
        choices=MESH_FORMATS,
        default=MESH_FORMATS[0],
        help="format of the meshes (default: %(default)s)",
    )
    output.add_argument("--visualize", action="store_true", help="also pictures")
    output.add_argument(
        "--visualize_format",
        choices=("html", "png"),
        default="html",
        help="html: report.html, one file with everything; png: slices/*.png (default: %(default)s)",
    )
    output.add_argument("--record", metavar="FILE", help="also a compact JSON record of the result")
    return parser


def run(args: argparse.Namespace, command: str) -> list[str]:
    """Evaluates, then writes; returns the lines to print. Nothing is written before all is computed."""
    output = Path(args.output_dir)
    for name, path in (("output_dir", output), ("record", args.record and Path(args.record))):
        if path and path.exists() and path.is_dir() != (name == "output_dir"):
            raise ConfigError(
                f"{name}: expected a {'folder' if name == 'output_dir' else 'file'}, got {path}"
            )
    if args.batch_size < 1:
        raise ConfigError(f"batch_size: expected >= 1, got {args.batch_size}")
    runs = {"lora": Run.read(args.checkpoint, "lora")}
    if args.full is not None:
        runs["full"] = Run.read(args.full, "full")
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
    page = pictures = None
    if args.visualize and args.visualize_format == "html":
        page = render(content, evaluation, runs).encode()
    elif args.visualize:
        pictures = {index: slices_png(evaluation, index) for index, _ in examples(evaluation)}

    output.mkdir(parents=True, exist_ok=True)
    written = ["eval.json", "eval.csv"]
    write_csv(output / "eval.csv", evaluation.records)
    if args.save_predictions:
        count = write_meshes(output / "meshes", evaluation, args.mesh_format)
        written.append(f"meshes/ ({count} files)")
    if pictures:
        (output / "slices").mkdir(exist_ok=True)
        for index, png in pictures.items():
            meta = evaluation.samples[index]["meta"]
            path = output / "slices" / f"{meta['subject']}_{meta['region']}.png"
            atomic_write(path, png)
        written.append(f"slices/ ({len(pictures)} files)")
    if page:
        atomic_write(output / "report.html", page)
        written.append("report.html")
    if args.record:
        Path(args.record).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(args.record), compact_record(content))
    write_json(output / "eval.json", content)
    return [*summary_lines(content), f"written to {output}: {', '.join(written)}"]


def summary_lines(content: Mapping[str, Any]) -> list[str]:
    """The headline as text."""
    keys = {"dice": "Dice", "nsd": f"NSD@{content['tolerance_mm']:g}mm", "hd95_mm": "HD95 mm"}
    keys["volume_error"] = "volume error"
    lines = []
    for group in content["summary"]["lora"]:
        title = "all regions" if group == EVERYTHING else group
        count = content["summary"]["lora"][group]["regions"]
        lines.append(f"{title + f' ({count})':<30}" + "".join(f"{k:>14}" for k in keys.values()))
        for method, groups in content["summary"].items():
            values = (ascii_number(key, groups[group][key]["mean"]) for key in keys)
            lines.append(f"  {LABELS[method]:<28}" + "".join(f"{v:>14}" for v in values))
    worse = content["worse"]["base"]["structures"]
    names = ", ".join(f"{w['subject']}/{w['structure']}" for w in worse)
    lines.append(
        f"structures where LoRA is worse than base in Dice, HD95 or NSD: {names or 'none'}"
    )
    lines.append(f"merged against unmerged: at most {content['merged_difference_vox']:.1e} voxel")
    return lines


def ascii_number(key: str, value: float | None) -> str:
    """A metric as text that every terminal can print."""
    return number(key, value).replace("\N{MINUS SIGN}", "-").replace("\N{EN DASH}", "-")


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluates; returns 0, or 2 after one line on stderr, or 130 after Ctrl-C."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        args = build_parser().parse_args(arguments)
        show_log()
        lines = run(args, shlex.join(["python", "scripts/eval_medical.py", *arguments]))
    except (FastLoRAError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
