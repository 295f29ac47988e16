"""The measurements of `python -m fastlora.tune`: a JSON file in which `dispatch` looks up plans and tiles.

The file is at $FASTLORA_TUNING, or else `fastlora/tuning.json` in the user's cache folder. An entry is valid only for the
GPU, the versions of torch and Triton, and the kernels that it was measured with.
"""

from __future__ import annotations

import functools
import hashlib
import os
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_type_hints

import torch

from fastlora.errors import ConfigError
from fastlora.files import read_json, write_json
from fastlora.kernels import config
from fastlora.kernels.config import Problem, Tiles


@dataclass(frozen=True)
class Tuned:
    """The fastest forward plan and the fastest plan of dx, with the tiles under which they were measured."""

    plan: str
    dx_plan: str
    config: Tiles


def path() -> Path:
    """The path of the file, whether or not it exists."""
    if "FASTLORA_TUNING" in os.environ:
        return Path(os.environ["FASTLORA_TUNING"])
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "fastlora" / "tuning.json"


def lookup(device: torch.device, problem: Problem) -> Tuned | None:
    """The entry for a problem, or None. Problems whose m rounds up to the same power of two share one.

    Raises: ConfigError if the file exists and was not written by the tuner.
    """
    entry = _read(path()).get(key(torch.cuda.get_device_name(device), problem))
    return None if entry is None else _parse(entry)


def store(device_name: str, problem: Problem, tuned: Tuned) -> None:
    """Add or replace the entry for a problem; the file is replaced atomically."""
    file = path()
    _read.cache_clear()  # another process may have added entries
    entries = dict(_read(file)) | {key(device_name, problem): asdict(tuned)}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, dict(sorted(entries.items())))
    _read.cache_clear()


def key(device_name: str, q: Problem) -> str:
    """The entry's name: the GPU, the versions and the bucket of problems."""
    rows = 1 << (q.m - 1).bit_length()
    flags = f"{q.itemsize} bytes, {q.precision}{', dropout' if q.dropout else ''}"
    flags += "" if q.aligned else ", unaligned"
    return f"{device_name} | {_versions()} | m<={rows} n={q.n} k={q.k} r={q.rank} | {flags}"


def triton_version() -> str | None:
    """Triton's version, under either of its distribution names; None if it is not installed."""
    for name in ("triton", "pytorch-triton"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


@functools.lru_cache
def _versions() -> str:
    """torch, Triton and a digest of the kernels' source: measurements are valid for these only."""
    folder = Path(config.__file__).parent
    source = b"".join(file.read_bytes() for file in sorted(folder.glob("*.py")))
    digest = hashlib.sha256(source).hexdigest()[:12]
    return f"torch {torch.__version__}, triton {triton_version()}, kernels {digest}"


@functools.lru_cache(maxsize=1)
def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        entries = read_json(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: expected the JSON that fastlora.tune writes: {error}") from None
    if not isinstance(entries, dict):
        raise ConfigError(f"{file}: expected a JSON object, got {type(entries).__name__}")
    return entries


def _parse(entry: dict[str, Any]) -> Tuned:
    kinds = get_type_hints(Tiles)
    try:
        config = {name: kinds[name](**fields) for name, fields in entry["config"].items()}
        return Tuned(entry["plan"], entry["dx_plan"], Tiles(**config))
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path()}: an entry is not what fastlora.tune writes: {error!r}"
        ) from None
