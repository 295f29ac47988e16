"""Installed versions, for tests that older versions cannot pass."""

from importlib.metadata import version

import pytest
import torch

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


def installed(package: str) -> tuple[int, int]:
    """Its major and minor version."""
    major, minor, *_ = version(package).split(".")
    return int(major), int(minor)


def needs_torch(least: tuple[int, int], reason: str) -> pytest.MarkDecorator:
    """Skips a test under older versions of torch. reason: what fails under them."""
    text = f"torch before {'.'.join(map(str, least))}: {reason}"
    return pytest.mark.skipif(least > TORCH, reason=text)
