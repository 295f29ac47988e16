"""Preprocess the data, fine-tune with LoRA, fine-tune all weights, and write one report that compares both on held-out data.

All other flags are those of `fastlora-medical train`, and are passed to both trainings. The flags that select and read the data are also passed to
the preprocessing, --device also to the evaluation. The default data are the bundled cases. All flags are checked before the
first step. If the pipeline is interrupted, the same command continues it; --overwrite starts from the beginning.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fastlora.medical.commands import evaluate, preprocess, train
from fastlora.medical.console import Parser, run_command, show

DATA = ("data_root", "demo", "modality", "channel", "intercept", "grid_tolerance")
"""Flags with one value that go to the preprocessing and to both trainings."""


def build_parser() -> argparse.ArgumentParser:
    """The command-line parser; it leaves the flags of the training."""
    parser = Parser(usage="%(prog)s [--out DIR] [--seed N] [flags of train]", description=__doc__)
    parser.allow_abbrev = False
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/pipeline"),
        metavar="DIR",
        help="folder of the cache, the runs and the report (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", default="0", metavar="N", help="random seed of both trainings (default: 0)"
    )
    parser.add_argument("--data_root", "--original_nifti_dir", metavar="DIR", help="the data set")
    for name in DATA[1:]:
        parser.add_argument(f"--{name}", metavar="X", help="as in preprocess and train")
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="as in preprocess and train")
    parser.add_argument("--device", metavar="NAME", help="as in train and eval")
    parser.add_argument(
        "--skip_invalid", action="store_true", help="passed to the preprocessing only"
    )
    parser.add_argument("--overwrite", action="store_true", help="start from the beginning")
    return parser


def steps(argv: Sequence[str] | None) -> tuple[dict[str, list[str]], Path]:
    """Title → arguments of each step, and the report. Raises: ConfigError or DataError if a flag is invalid."""
    args, rest = build_parser().parse_known_args(argv)
    out, seed = args.out, ["--seed", args.seed]
    data = [f"--{n}={getattr(args, n)}" for n in DATA if getattr(args, n) is not None]
    data += ["--classes", *args.classes] if args.classes else []
    device = ["--device", args.device] if args.device else []
    cache = ["--cache_dir", str(out / "cache")]
    again = ["--overwrite"] if args.overwrite else ["--resume", "auto"]
    training = [*rest, *data, *device, *again, *seed, *cache]
    found = {
        "1/4 preprocess": [
            *data,
            *seed,
            *cache,
            *(["--skip_invalid"] if args.skip_invalid else []),
        ],
        "2/4 train lora": [*training, "--finetune", "lora", "--checkpoint_dir", str(out / "lora")],
        "3/4 train full": [*training, "--finetune", "full", "--checkpoint_dir", str(out / "full")],
        "4/4 evaluate": [
            *("--checkpoint", str(out / "lora"), "--full", str(out / "full")),
            *("--output_dir", str(out / "eval"), "--save_predictions", "--visualize", *device),
        ],
    }
    preprocess.build_parser().parse_args(found["1/4 preprocess"])
    for title in ("2/4 train lora", "3/4 train full"):
        train.read_config(found[title])
    evaluate.build_parser().parse_args(found["4/4 evaluate"])
    return found, out / "eval" / "report.html"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the steps; returns the exit code of the first that fails, otherwise 0."""
    programs = (preprocess.main, train.main, train.main, evaluate.main)

    def work() -> int:
        arguments, report = steps(argv)
        for (title, given), program in zip(arguments.items(), programs, strict=True):
            show(f"\n== {title}")
            if code := program(given):
                return code
        show(f"\nreport: {report}")
        return 0

    return run_command(work)
