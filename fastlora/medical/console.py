"""Shared by the commands: how they run and end, errors of the command line, and the log on the terminal."""

from __future__ import annotations

import argparse
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from fastlora.errors import ConfigError, FastLoRAError
from fastlora.files import drop_output

PROGRAM = "fastlora-medical"


def run_command(work: Callable[[], int], interrupted: str = "interrupted", where: str = "") -> int:
    """Run a command and return its exit code; what stops it becomes one line on stderr.

    An error of ours or of a file gives 2, Ctrl-C 130, SIGTERM 143, both with the line `interrupted`, and a closed pipe on stdout
    141 without a line. Names that stdout cannot encode are escaped. where: written before an error.
    """
    _usable_streams()
    code = 2
    try:
        with _sigterm_interrupts():
            try:
                code = work()
            finally:
                sys.stdout.flush()  # here an error can still be reported
    except BrokenPipeError:
        code = 128 + signal.SIGPIPE
        drop_output()
    except (FastLoRAError, OSError) as error:
        code = 2
        drop_output()
        _tell(f"error: {where}{' '.join(str(error).split())}")
    except KeyboardInterrupt as stop:
        code = 128 + (stop.args[0] if stop.args else signal.SIGINT)
        _tell(interrupted)
    return code


def _tell(line: str) -> None:
    with suppress(OSError):  # stderr may be a full device too
        print(line, file=sys.stderr, flush=True)


def _usable_streams() -> None:
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Within this context SIGTERM, which clusters send before they kill, ends the process like Ctrl-C.

    It is left alone under torchrun, which sends it to processes that wait for another one, and where it has a handler.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    main_thread = threading.current_thread() is threading.main_thread()
    if several or not main_thread or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def stop(number: int, _: object) -> NoReturn:
        raise KeyboardInterrupt(number)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def command_line(script: str, name: str) -> list[str]:
    """How this process was called: as a script of the repository, or as a command of the installed package."""
    installed = Path(sys.argv[0]).name.startswith(PROGRAM)
    return [PROGRAM, name] if installed else ["python", f"scripts/{script}"]


class Parser(argparse.ArgumentParser):
    """Reports an invalid command line like any other error: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (--help lists all flags)")

    def print_help(self, file: Any = None) -> None:
        """Prints all flags; argparse's own method ignores that a device is full."""
        print(self.format_help(), end="", file=file)


class LogLines(logging.Handler):
    """Writes messages to stdout as plain lines, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        show(self.format(record))


def show(line: str) -> None:
    """Print a line, above a progress bar if there is one."""
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


def add_model_call(group: Any) -> None:
    """Add the flags of a model's call."""
    group.add_argument(
        "--device",
        default="auto",
        metavar="NAME",
        help="device: auto, cpu, cuda or cuda:N (default: %(default)s)",
    )
    group.add_argument(
        "--batch_size",
        type=int,
        default=8,
        metavar="N",
        help="regions per batch (default: %(default)s)",
    )
    group.add_argument(
        "--base_weights",
        metavar="FILE",
        help="base model that the run started from (default: as the run says)",
    )
    group.add_argument(
        "--sam3d_dir",
        metavar="DIR",
        help="model folder of SAM 3D Objects, for a run of it (default: as the run says)",
    )


def add_reading(group: Any) -> None:
    """Add the flags that choose structures and change how images and masks are read, as `TrainConfig` has them."""
    group.add_argument(
        "--classes",
        nargs="+",
        metavar="NAME",
        help="structures, or kinds of structures such as vertebra (default: all)",
    )
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
