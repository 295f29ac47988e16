"""Copies of the checkout, as a user without this environment or without symbolic links has it."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.support.paths import ROOT

_IGNORED = shutil.ignore_patterns("__pycache__", "*.py[cod]", "*.egg-info", "build", "dist")


def copy_checkout(target: Path, instead_of_link: str | None, *names: str) -> None:
    """Copy the files and folders `names` of the checkout to `target`, a new folder, with no symbolic link fastlora/kernels.

    instead_of_link: the text of a file in its place, or None for nothing.
    """
    target.mkdir(parents=True)
    for name in names:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=_IGNORED)
        else:
            shutil.copy(ROOT / name, target / name)
    link = target / "fastlora" / "kernels"
    link.unlink(missing_ok=True)
    if instead_of_link is not None:
        link.write_text(instead_of_link)
