"""Files that are either whole or not there, and the state of every random generator.

A checkpoint is one `torch.save` of plain values and tensors, read back with `weights_only=True`. Every file goes through
`atomic_write`, so a run killed at any moment leaves the previous file in place.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from fastlora.errors import CheckpointError

FORMAT = "fastlora-medical-1"
KEYS = frozenset(
    {"format", "model", "optimizer", "scheduler", "scaler", "epoch", "history", "rng", "config"}
    | {"seconds", "base_sha256", "samples", "best"}
)


def atomic_write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Lets `write` fill a temporary file beside `path`, and puts it in `path`'s place once it is on the disk.

    The temporary name starts with a dot and ends in `.tmp`: no reader of `*.pt` or `*.json` ever sees it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Makes a rename in `folder` survive a power failure; only POSIX can open a folder."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: Path, value: object) -> None:
    """Writes `value` as JSON; NaN and infinity, which JSON does not have, raise ValueError."""
    data = json.dumps(value, indent=1, allow_nan=False).encode() + b"\n"
    atomic_write(path, lambda file: file.write(data))


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Saves a checkpoint; `content` holds what KEYS lists."""
    atomic_write(path, lambda file: torch.save(dict(content), file))


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU, running no code from it.

    Raises:
        CheckpointError: the file is missing, truncated, or not a checkpoint of `MedicalTrainer`.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{path}: cannot be read as a checkpoint: {_first_line(error)}"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of this trainer (no format {FORMAT!r})")
    if missing := sorted(KEYS - content.keys()):
        raise CheckpointError(f"{path}: the checkpoint lacks {', '.join(missing)}")
    return content


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def model_sha256(model: nn.Module) -> str:
    """A fingerprint of a model's parameters and buffers: their names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


def check_tensors(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: str) -> None:
    """Checks that two sets of tensors have the same names and shapes.

    Raises:
        CheckpointError: naming every tensor that is missing, unexpected or of another shape.
    """
    problems = [f"{name}: missing" for name in wanted.keys() - found.keys()]
    problems += [f"{name}: unexpected" for name in found.keys() - wanted.keys()]
    problems += [
        f"{name}: expected {tuple(wanted[name].shape)}, got {tuple(found[name].shape)}"
        for name in wanted.keys() & found.keys()
        if wanted[name].shape != found[name].shape
    ]
    if problems:
        raise CheckpointError(f"{where}: does not fit the model: {'; '.join(sorted(problems))}")


def seed_everything(seed: int) -> None:
    """Seeds Python's, numpy's and torch's global generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """The state of the global generators, as values that a checkpoint holds."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (
            name,
            torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            position,
            has_gauss,
            cached,
        ),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Puts the generators back to what `rng_state` gave."""
    random.setstate(state["python"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
