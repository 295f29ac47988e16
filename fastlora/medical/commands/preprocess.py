"""Check a data set of medical volumes and prepare it for training.

By default it builds the three bundled cases from installed packages. The layout of a data set
is detected and logged. Each structure is checked (readable, three-dimensional, finite, mask not
empty and on the image's grid, large enough for a training region), and what training reads of it is
written to the cache, where manifest.json lists it with checksums. Slices for TS_SAM3D_Dataset and
meshes are prepared on request (--slices, --extract_mesh). An interrupted run continues where it
stopped. If a case or structure cannot be used, the exit code is 2 with one line on stderr; with
--skip_invalid it is skipped, and listed in skipped.csv with the reason.
"""

from __future__ import annotations

import argparse
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from fastlora.errors import DataError, FastLoRAWarning
from fastlora.medical.console import Parser, add_reading, run_command, show, show_log
from fastlora.medical.data.bundled import build_bundled
from fastlora.medical.data.manifest import (
    NAME,
    SKIPPED,
    Outcome,
    read_manifest,
    verify,
    write_manifest,
)
from fastlora.medical.data.phantom import write_phantom_dataset
from fastlora.medical.data.preprocess import PreprocessConfig, preprocess
from fastlora.medical.data.slice_source import SliceConfig
from fastlora.medical.data.slices import AXES, parse_axes
from fastlora.medical.data.splits import select_structures
from fastlora.medical.scans.layouts import find_cases
from fastlora.medical.scans.volumes import Case
from fastlora.medical.training.data import BUNDLED, SYNTHETIC

HEADER = f"{'subject':16} {'structure':34} {'volume ml':>10} {'regions':>7}"
SLICE_HEADER = f" {'box':12} {'spacing mm':15} "
SLICE_OPTIONS = ("axes", "spacing", "preprocess_crop_size")


def build_parser() -> argparse.ArgumentParser:
    """The command-line parser."""
    parser = Parser(description=__doc__, allow_abbrev=False)
    source = parser.add_argument_group("data").add_mutually_exclusive_group()
    source.add_argument(
        "--data_root",
        "--original_nifti_dir",
        type=Path,
        metavar="DIR",
        help="a data set in one of the layouts of docs/quickstart_training.md "
        "(default: the bundled cases)",
    )
    source.add_argument("--demo", choices=["synthetic"], help="generate and use synthetic data")
    _add_settings(parser)
    _add_run(parser)
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what to prepare")
    what.add_argument(
        "--modality",
        choices=["ct", "mr"],
        default="ct",
        help="modality of *-image.nii.gz files (default: %(default)s)",
    )
    what.add_argument(
        "--channel",
        type=int,
        metavar="N",
        help="number of the image's channel: in dataset.json (default there: 0), or of 4-D files",
    )
    add_reading(what)
    what.add_argument(
        "--slices",
        action="store_true",
        help="also cache 2-D slices for TS_SAM3D_Dataset (otherwise prepared on first use)",
    )
    what.add_argument(
        "--extract_mesh",
        action="store_true",
        help="also write the surfaces of the structures as PLY files (mm)",
    )
    what.add_argument(
        "--axes",
        nargs="+",
        metavar="AXIS",
        default=list(AXES),
        help="slice axes to count: sagittal, coronal, axial or 0, 1, 2 (default: all)",
    )
    what.add_argument(
        "--spacing",
        type=float,
        metavar="MM",
        help="resample slices and meshes to this spacing (default: that of the image)",
    )
    what.add_argument(
        "--preprocess_crop_size",
        type=int,
        metavar="VOXELS",
        default=SliceConfig.crop_size,
        help="minimum edge length of the crop around a structure, for slices and meshes (default: %(default)s)",
    )
    what.add_argument(
        "--skip_invalid",
        action="store_true",
        help="skip unusable cases and structures, and list them in skipped.csv",
    )


def _add_run(parser: argparse.ArgumentParser) -> None:
    run = parser.add_argument_group("run")
    run.add_argument(
        "--cache_dir",
        "--output_dir",
        type=Path,
        metavar="DIR",
        default=Path("data/cache"),
        help="folder of the cache (default: %(default)s)",
    )
    run.add_argument(
        "--num_workers",
        type=int,
        metavar="N",
        default=0,
        help="worker processes; 0 uses this process only (default: %(default)s)",
    )
    run.add_argument(
        "--verify",
        action="store_true",
        help="only compare the cache and its source files with the checksums in the manifest",
    )
    run.add_argument(
        "--seed",
        type=int,
        metavar="N",
        default=0,
        help="random seed of the synthetic data (default: %(default)s)",
    )


def load_cases(args: argparse.Namespace, problems: list[str]) -> list[Case]:
    if args.demo == "synthetic":
        return write_phantom_dataset(SYNTHETIC, seed=args.seed)
    if args.data_root is None:
        return build_bundled(BUNDLED)
    return find_cases(
        *(args.data_root, args.modality, problems if args.skip_invalid else None, args.channel),
        intercept=args.intercept,
        tolerance_mm=args.grid_tolerance,
    )


def row(outcome: Outcome) -> str:
    name = f"{outcome.subject:16} {outcome.structure:34}"
    if outcome.problem:
        return f"{name} skipped: {outcome.problem}"
    line = f"{name} {outcome.volume_ml:10.1f} {outcome.regions:7}"
    if outcome.slices:
        shape = "×".join(str(n) for n in outcome.shape)
        spacing = "×".join(f"{s:.2f}" for s in outcome.spacing)
        line += f" {shape:12} {spacing:15} {'/'.join(str(n) for n in outcome.slices)}"
    return line


def settings(args: argparse.Namespace) -> dict[str, object]:
    """The settings that are stored in the manifest."""
    excluded = ("num_workers", "verify", "cache_dir")
    values = {name: value for name, value in vars(args).items() if name not in excluded}
    return {n: str(v) if isinstance(v, Path) else v for n, v in values.items()}


def check(cache_dir: Path) -> int:
    """Print the files that differ from the manifest; 0 if there are none, otherwise 1."""
    differences = verify(cache_dir)
    for difference in differences:
        print(difference)
    count = len(read_manifest(cache_dir)["structures"])
    print(f"{count} structures in {cache_dir / NAME}, {len(differences)} files differ")
    return 1 if differences else 0


def configure(args: argparse.Namespace) -> PreprocessConfig:
    config = PreprocessConfig(
        args.cache_dir,
        args.slices,
        args.extract_mesh,
        parse_axes(args.axes),
        SliceConfig(spacing=args.spacing, crop_size=args.preprocess_crop_size),
        args.skip_invalid,
    )
    parser = build_parser()
    unused = [name for name in SLICE_OPTIONS if getattr(args, name) != parser.get_default(name)]
    if unused and not (args.slices or args.extract_mesh):
        message = f"{', '.join(unused)}: no effect without --slices or --extract_mesh"
        warnings.warn(message, FastLoRAWarning, stacklevel=2)
    return config


def main(argv: Sequence[str] | None = None) -> int:
    """Preprocesses; returns the exit code, as `run_command`."""

    def work() -> int:
        args = build_parser().parse_args(argv)
        show_log()
        return check(args.cache_dir) if args.verify else run(args)

    return run_command(
        work, "interrupted: the cache is complete so far, and the same command continues"
    )


def run(args: argparse.Namespace) -> int:
    """Prepares all structures, with a line for each, and writes the manifest."""
    config = configure(args)
    problems: list[str] = []
    selected = select_structures(load_cases(args, problems), args.classes)
    names = "/".join(name for name, axis in AXES.items() if axis in config.axes)
    print(HEADER + (SLICE_HEADER + names if config.slices else ""))
    outcomes = []
    total = sum(len(case.structures) for case in selected)
    with tqdm(total=total, desc="prepared", unit="structure", disable=None) as progress:
        for outcome in preprocess(selected, config, args.num_workers):
            show(row(outcome))
            outcomes.append(outcome)
            progress.update()
    args.cache_dir.mkdir(parents=True, exist_ok=True)
    write_manifest(args.cache_dir, settings(args), outcomes, problems)
    for problem in problems:
        print(f"skipped: {problem}")
    ready = [outcome for outcome in outcomes if outcome.problem is None]
    if not ready:
        raise DataError("expected at least one usable structure, got none")
    subjects = {outcome.subject for outcome in ready}
    left_out = len(outcomes) - len(ready) + len(problems)
    print(f"{len(ready)} structures of {len(subjects)} subjects ready, {left_out} skipped")
    if left_out:
        skipped = Counter(outcome.structure for outcome in outcomes if outcome.problem)
        often = ", ".join(f"{name} ({count})" for name, count in skipped.most_common(10))
        print(f"skipped, reasons in {args.cache_dir / SKIPPED}: {often or 'whole cases'}")
    print(f"cache: {args.cache_dir}, listed in {NAME}")
    return 0
