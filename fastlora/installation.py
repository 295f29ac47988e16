"""How this package is installed: its name on PyPI, the folder of its kernels, and other modules of the same name."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
import warnings
from importlib.machinery import ModuleSpec
from pathlib import Path

from fastlora.errors import FastLoRAWarning

DISTRIBUTION = "fastlora-torch"  # on PyPI, `fastlora` is another project

_OTHER = "fastlora"
_OTHER_FILE = "fastlora.py"


def install_hint(extra: str) -> str:
    """The command that installs an extra, for messages: "pip install 'fastlora-torch[yaml]', in a checkout pip install '.[yaml]'"."""
    return f"pip install '{DISTRIBUTION}[{extra}]', in a checkout pip install '.[{extra}]'"


def provide_kernels(package: Path) -> None:
    """Make the folder kernels/ beside `package` importable as `fastlora.kernels`, if `package`/kernels is no folder.

    A wheel contains the folder, and in a checkout it is a symbolic link. Where links are off (Windows, `core.symlinks=false`), git
    writes a text file instead, and an sdist contains neither.

    package: the folder of `fastlora/__init__.py`.
    """
    folder = package.parent / "kernels"
    if (package / "kernels").is_dir() or not (folder / "recording.py").is_file():
        return  # the second: Hugging Face's package `kernels` may be the neighbour
    spec = ModuleSpec("fastlora.kernels", None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.modules["fastlora"].kernels = module  # type: ignore[attr-defined]


def warn_of_namesakes(package: Path) -> None:
    """Warn about each `fastlora.py` on sys.path, which Python may import instead of this package.

    Looks for one file in each folder of sys.path; nothing else is read unless there is one. A module that was imported instead of this
    package cannot be noticed, because then nothing of this package runs.

    package: the folder of `fastlora/__init__.py`.
    """
    for folder in dict.fromkeys(entry for entry in sys.path if isinstance(entry, str)):
        file = os.path.join(folder, _OTHER_FILE)
        if not os.path.isfile(file):
            continue
        version = _other_version(folder)
        if version is None:
            advice = "Rename or remove it."
        else:
            advice = (
                f"It belongs to the distribution {_OTHER} {version}, another project than {DISTRIBUTION}: "
                f"run `pip uninstall {_OTHER}`, and use that project in an environment of its own."
            )
        warnings.warn(
            f"{os.path.abspath(file)} has the name of the package {package}. `import fastlora` and the command fastlora get "
            f"whichever comes first on sys.path. {advice}",
            FastLoRAWarning,
            stacklevel=3,  # the line that imports fastlora
        )


def _other_version(folder: str) -> str | None:
    """The version of PyPI's `fastlora` if it is installed in `folder` with its module, otherwise None."""
    for found in importlib.metadata.distributions(name=_OTHER, path=[folder or os.curdir]):
        if any(str(file) == _OTHER_FILE for file in found.files or ()):
            return found.version
    return None
