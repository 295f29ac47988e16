"""Shared by the scripts: errors of the command line, and printing the log."""

from __future__ import annotations

import argparse
import logging
import sys
from typing import NoReturn

from fastlora.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line like any other error: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (--help lists all flags)")


def show_log() -> None:
    """Print the log of `fastlora.medical` to stdout as plain lines."""
    logger = logging.getLogger("fastlora.medical")
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
