"""The command `fastlora-medical`: one sub-command for each step, and the pipeline of all."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import fastlora
from fastlora.errors import nearest
from fastlora.installation import install_hint

COMMANDS = {
    "preprocess": ("preprocess", "check a data set and prepare it for training"),
    "train": ("train", "fine-tune the mesh decoder, by default with LoRA on the bundled cases"),
    "eval": (
        "evaluate",
        "compare a run with the base model on held-out regions, and write a report",
    ),
    "predict": ("predict", "surfaces of structures in patient coordinates"),
    "pipeline": ("pipeline", "preprocess, train with LoRA and in full, and evaluate"),
}
USAGE = "\n".join(
    [
        "usage: fastlora-medical COMMAND [flags]",
        "",
        *(f"  {name:12}{about}" for name, (_, about) in COMMANDS.items()),
        "",
        "fastlora-medical COMMAND --help lists the flags of a command.",
    ]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sub-command; returns its exit code, and 2 after one line on stderr if there is none of this name."""
    name, *arguments = (sys.argv[1:] if argv is None else list(argv)) or [""]
    if name in ("-h", "--help"):
        print(USAGE)
        return 0
    if name == "--version":
        print(fastlora.__version__)
        return 0
    if name not in COMMANDS:
        known = ", ".join(COMMANDS)
        print(
            f"error: expected a command among {known}, got {name!r}{nearest(name, COMMANDS)} (fastlora-medical --help)",
            file=sys.stderr,
        )
        return 2
    sys.argv[0] = f"fastlora-medical {name}"
    try:
        module = importlib.import_module(f"fastlora.medical.commands.{COMMANDS[name][0]}")
    except ModuleNotFoundError as error:
        if str(error.name).startswith("fastlora"):
            raise
        print(
            f"error: {error.name} is not installed; install the extra 'medical' ({install_hint('medical')})",
            file=sys.stderr,
        )
        return 2
    code: int = module.main(arguments)
    return code
