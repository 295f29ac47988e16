"""Fine-tune the mesh decoder on medical volumes, by default with LoRA on the bundled cases."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastlora.errors import ConfigError, nearest
from fastlora.medical.console import Parser, run_command, show_log
from fastlora.medical.models.options import declared, value_type
from fastlora.medical.training.checkpointing import read_checkpoint
from fastlora.medical.training.config import PATHS, TrainConfig, option_owners, read_yaml
from fastlora.medical.training.distributed import local_device, process_group, resolve_device
from fastlora.medical.training.run_folder import RunFolder
from fastlora.medical.training.trainer import MedicalTrainer

logger = logging.getLogger(__name__)

# Arguments for argparse that do not follow from the type of an option.
EXTRAS: dict[str, dict[str, Any]] = {
    "resume": {"nargs": "?", "const": "auto", "metavar": "PATH|auto"},
    "amp": {"nargs": "?", "const": "bf16"},
    "device": {"metavar": "NAME"},
    "classes": {"nargs": "+", "metavar": "NAME"},
    "lora_ranks": {"nargs": "*", "metavar": "NAME=N"},
}


def build_parser() -> argparse.ArgumentParser:
    """One flag for each option of `TrainConfig` and of the models, in their groups."""
    parser = Parser(
        usage="%(prog)s [flags]",
        description=__doc__,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        epilog="A flag overrides --config, which overrides the checkpoint of --resume, which overrides the defaults.",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file of 'name: value' lines, whose names are those of the flags",
    )
    groups: dict[str, Any] = {}
    for name, owner in option_owners().items():
        field = declared(owner)[name]
        about = field.metadata
        group = groups.get(about["group"]) or groups.setdefault(
            about["group"], parser.add_argument_group(about["group"])
        )
        kind = value_type(owner, name)
        rule = about["rule"].text if about["rule"] else ""
        default = ""
        if field.default is not None and field.default is not False:
            default = f" (default: {'on' if field.default is True else field.default})"
        options: dict[str, Any] = {"help": about["help"] + default}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction if field.default else "store_true"
        elif rule.startswith("one of "):
            options["metavar"] = "|".join(rule.removeprefix("one of ").split(", "))
        else:
            options["metavar"] = {int: "N", float: "X"}.get(kind, "PATH")
        if kind in (int, float):
            options["type"] = kind
        names = [f"--{name}"] + (["--original_nifti_dir"] if name == "data_root" else [])
        group.add_argument(*names, **options | EXTRAS.get(name, {}))
    return parser


def read_config(argv: Sequence[str] | None) -> TrainConfig:
    """The defaults, overridden by the checkpoint to resume, the YAML file and the flags, in this order.

    Raises: ConfigError or CheckpointError, naming the invalid flag, key or file.
    """
    parser = build_parser()
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        raise ConfigError(
            f"unknown argument {unknown[0]}{nearest(unknown[0].split('=')[0], flags)}"
        )
    given = vars(known)
    path = given.pop("config", None)
    given = {**(read_yaml(path) if path else {}), **given}
    folder = RunFolder(given.get("checkpoint_dir", TrainConfig.checkpoint_dir))
    resume = folder.resume_from(given.get("resume"))
    if resume is None:
        return TrainConfig.from_dict(given)
    saved = read_checkpoint(resume)["config"]
    del saved["checkpoint_dir"]  # a path in a file never says where to write
    named = {n: saved[n] for n in PATHS if saved.get(n) is not None and n not in given}
    if named:
        paths = ", ".join(f"{name} {value}" for name, value in named.items())
        logger.info("from the checkpoint %s: %s", resume, paths)
    if resume.parent.name == "checkpoints":
        saved["checkpoint_dir"] = str(resume.parent.parent)
    elif "checkpoint_dir" not in given:
        raise ConfigError(
            f"checkpoint_dir: expected the folder to write to, since {resume} is not in the folder of a run, got none"
        )
    return TrainConfig.from_dict({**saved, **given})


def train(config: TrainConfig) -> None:
    """One run, alone or with other processes; the first one prints."""
    trainer = MedicalTrainer(config)
    counts, world = trainer.counts, trainer.processes.world
    show = print if trainer.processes.first else lambda *_, **__: None
    show(
        f"{config.finetune} fine-tuning of {counts['trainable']:,} of {counts['total']:,} parameters on "
        f"{len(trainer.train_data)} samples ({len(trainer.val_data)} regions choose the best epoch), "
        f"{config.epochs} epochs of {trainer.state.steps_per_epoch} steps on {trainer.device}"
        f"{f' and {world - 1} more ({config.parallel})' if world > 1 else ''} -> {config.checkpoint_dir}",
        flush=True,
    )
    trainer.train()
    ended = "finished" if trainer.epoch >= config.epochs else "stopped early"
    show(
        f"{ended} after epoch {trainer.epoch}; best epoch {trainer.state.best_epoch}: {Path(config.checkpoint_dir, 'checkpoints/best.pt')}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Trains; returns the exit code, as `run_command`."""
    rank = os.environ.get("RANK", "0")

    def work() -> int:
        if rank == "0":  # only the first process prints
            show_log()
        config = read_config(argv)
        with process_group(local_device(resolve_device(config))):
            train(config)
        return 0

    where = "" if rank == "0" else f"process {rank}: "
    return run_command(work, "interrupted: continue with --resume", where)
