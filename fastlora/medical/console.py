"""What the scripts print on the way."""

from __future__ import annotations

import logging
import sys


def show_log() -> None:
    """Send the package's messages to stdout as plain lines: which layout was found, what is made anew."""
    logger = logging.getLogger("fastlora.medical")
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
