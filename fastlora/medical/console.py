"""Shared by the scripts: errors of the command line, and the log on the terminal."""

from __future__ import annotations

import argparse
import logging
import sys
from typing import Any, NoReturn

from tqdm import tqdm

from fastlora.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """Reports an invalid command line like any other error: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (--help lists all flags)")


class LogLines(logging.Handler):
    """Writes messages to stdout as plain lines, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


def add_reading(group: Any) -> None:
    """Add the flags that change how images and masks are read, as `TrainConfig` has them."""
    group.add_argument(
        "--intercept",
        type=float,
        metavar="X",
        help="added to the values of CT images, if their files lack it, such as -1024; 0 takes values that are no Hounsfield units as they are",
    )
    group.add_argument(
        "--grid_tolerance",
        type=float,
        metavar="MM",
        help="largest distance in mm between a voxel of a mask and the image's (default: half a voxel)",
    )


def show_log() -> None:
    """Print the log of `fastlora.medical` to stdout."""
    logger = logging.getLogger("fastlora.medical")
    logger.handlers = [LogLines()]
    logger.setLevel(logging.INFO)
