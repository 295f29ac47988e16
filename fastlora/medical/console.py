"""What the scripts share: how they refuse a command line, and what they print on the way."""

from __future__ import annotations

import argparse
import logging
import sys
from typing import NoReturn

from fastlora.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line as any other error: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (--help lists all flags)")


def show_log() -> None:
    """Send the package's messages to stdout as plain lines: which layout was found, what is made anew."""
    logger = logging.getLogger("fastlora.medical")
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
