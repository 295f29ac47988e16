"""Checkpoints of a run, and the state of the random generators.

A checkpoint is one `torch.save` of plain values and tensors. Reading it runs no code, trusts no declared size, and checks the type of every
value. It is written atomically, so a run killed at any moment leaves the previous file in place.
"""

from __future__ import annotations

import hashlib
import io
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import UnionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastlora import files
from fastlora.errors import CheckpointError
from fastlora.files import atomic_write

FORMAT = "fastlora-medical-1"


def score(val: Mapping[str, float]) -> float:
    """The validation score that selects the best epoch, higher is better: Dice, or minus the loss of a model without meshes."""
    return val["dice"] if "dice" in val else -val["total"]


PLAIN = bool | int | float | str | None

KEYS: Mapping[str, Any] = {
    **dict.fromkeys(("optimizer", "scheduler", "scaler", "rng"), dict),
    **dict.fromkeys(("format", "base_sha256"), str),
    **dict.fromkeys(("epoch", "samples"), int),
    "model": {str: Tensor},
    "config": {str: PLAIN | list},
    "history": list,
    "seconds": list,
    "regions": [str, ...],
    "sources": [str, ...],
    "within": dict | None,
    "best": dict | None,
}
"""The entries of a checkpoint and their types, as in `check_like`."""

_PROGRESS = {"seen": int, "lr": float, "sums": {str: float}, "norms": [float, ...]}


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Saves a checkpoint with the entries of KEYS; in the file of a LoRA run `model` is called `lora_state_dict`."""
    content = _renamed(content, "model", "lora_state_dict")
    data = io.BytesIO()  # on a full disk torch.save to a file raises other errors than OSError
    torch.save(content, data)
    atomic_write(path, data.getbuffer())


def _renamed(content: Mapping[str, Any], old: str, new: str) -> dict[str, Any]:
    """The content of a LoRA run, and the best one in it, with another name for its weights; that of another run as it is."""
    config, best = content.get("config"), content.get("best")
    if not isinstance(config, dict) or config.get("finetune") != "lora":
        return dict(content)
    if old in content and new in content:
        raise CheckpointError(f"checkpoint: expected {old} or {new}, got both")
    renamed = {new if name == old else name: value for name, value in content.items()}
    return renamed | {"best": _renamed(best, old, new)} if isinstance(best, dict) else renamed


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads an untrusted checkpoint onto the CPU. Raises: CheckpointError if it is missing, truncated, or not a checkpoint of `MedicalTrainer`."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        content = files.read_torch(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as a checkpoint: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of this trainer (no format {FORMAT!r})")
    content = _renamed(content, "lora_state_dict", "model")  # older files call it `model`
    # What files of older versions lack.
    older: dict[str, Any] = {"regions": [], "sources": [], "within": None}
    content = {**older, **content}
    _check_content(content, str(path))
    if content["best"] is not None:
        _check_content({**older, "best": None, **content["best"]}, f"{path}: best")
    return content


def _check_content(content: Mapping[str, Any], where: str) -> None:
    if missing := sorted(KEYS.keys() - content.keys()):
        raise CheckpointError(f"{where}: the checkpoint lacks {', '.join(missing)}")
    for name, wanted in KEYS.items():
        check_like(content[name], wanted, f"{where}: {name}")
    for name, value in content["config"].items():
        check_like(
            value if isinstance(value, list) else [], [PLAIN, ...], f"{where}: config.{name}"
        )
    if content["epoch"] < 0 or len(content["history"]) != content["epoch"] + 1:
        raise CheckpointError(
            f"{where}: expected a history of epoch 0 to {content['epoch']}, got {len(content['history'])} entries"
        )
    check_history(content["history"], content["seconds"], where)
    if content["within"] is not None:
        check_like(content["within"], _PROGRESS, f"{where}: within")
        if not 0 <= content["within"]["seen"] <= content["samples"]:
            raise CheckpointError(f"{where}: within: expected at most {content['samples']} seen")


def check_history(
    history: Sequence[Any], seconds: Sequence[float], where: str, chosen_by: str = "total"
) -> None:
    """Checks the entries and durations of epochs. chosen_by: the validation value that `score` reads. Raises: CheckpointError."""
    check_like(seconds, [float, ...], f"{where}: seconds")
    figures = list(seconds)
    for epoch, entry in enumerate(history):
        check_like(entry, {str: object}, f"{where}: history.{epoch}")
        for name, terms in (("train", entry.get("train", {})), ("val", entry.get("val"))):
            check_like(terms, {str: float}, f"{where}: history.{epoch}.{name}")
            figures += terms.values()
        if chosen_by not in entry["val"]:
            raise CheckpointError(
                f"{where}: history: expected {chosen_by!r} among the validation values of every epoch"
            )
        for name in ("train", "val"):
            if name in entry and "total" not in entry[name]:
                raise CheckpointError(f"{where}: history.{epoch}.{name}: expected the loss 'total'")
        if type(entry.get("epoch")) is not int or entry["epoch"] != epoch:
            raise CheckpointError(
                f"{where}: history.{epoch}: expected epoch {epoch}, got {entry.get('epoch')!r}"
            )
    if not all(map(math.isfinite, figures)):
        raise CheckpointError(f"{where}: history, seconds: expected finite numbers")


def check_like(found: Any, wanted: Any, where: str) -> None:
    """Checks the keys and types of a nested value. Raises: CheckpointError, naming the entry.

    wanted: a type; or an example with the expected keys, types, lengths and shapes; `{str: wanted}` is a mapping with any names,
        `[wanted, ...]` a list of any length.
    """
    kind: Any = wanted if isinstance(wanted, (type, UnionType)) else type(wanted)
    if not isinstance(found, kind):
        name = getattr(kind, "__name__", kind)
        raise CheckpointError(f"{where}: expected {name}, got {type(found).__name__}")
    if isinstance(wanted, dict):
        if str in wanted:
            check_like(list(found), [str, ...], where)
            wanted = dict.fromkeys(found, wanted[str])
        if found.keys() != wanted.keys():
            names = ", ".join(sorted(map(str, found.keys() ^ wanted.keys())))
            raise CheckpointError(f"{where}: expected the keys {list(wanted)}, got others: {names}")
        for key, value in wanted.items():
            check_like(found[key], value, f"{where}.{key}")
    elif isinstance(wanted, (list, tuple)):
        if wanted and wanted[-1] is ...:
            wanted = len(found) * wanted[:1]
        if len(found) != len(wanted):
            raise CheckpointError(f"{where}: expected {len(wanted)} values, got {len(found)}")
        for number, (a, b) in enumerate(zip(found, wanted, strict=True)):
            check_like(a, b, f"{where}.{number}")
    elif isinstance(wanted, Tensor) and (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
        raise CheckpointError(
            f"{where}: expected {tuple(wanted.shape)} {wanted.dtype}, got {tuple(found.shape)} {found.dtype}"
        )


def check_optimizer(found: Mapping[str, Any], optimizer: torch.optim.Optimizer, where: str) -> None:
    """Checks that a saved state is that of AdamW for parameters of these shapes. Raises: CheckpointError."""
    groups = optimizer.state_dict()["param_groups"]
    check_like(found, {"state": dict, "param_groups": groups}, where)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not found["state"].keys() <= set(range(len(parameters))):
        raise CheckpointError(f"{where}: expected a state for each parameter by number")
    for number, entry in found["state"].items():
        like = torch.empty(parameters[number].shape, dtype=parameters[number].dtype)
        moments = {"step": torch.tensor(0.0), "exp_avg": like, "exp_avg_sq": like}
        check_like(entry, moments, f"{where}: state.{number}")


def check_rng_state(state: Mapping[str, Any], where: str) -> None:
    """Checks that `set_rng_state` accepts the state; the generators do not change. Raises: CheckpointError."""
    before = rng_state()
    try:
        set_rng_state(state)
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{where}: not a state of the random generators: {error}") from None
    finally:
        set_rng_state(before)


def model_sha256(model: nn.Module) -> str:
    """A fingerprint of the names, types, shapes and values of a model's parameters and buffers, and of its `fingerprint`, if it has one."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    digest.update(getattr(model, "fingerprint", "").encode())
    return digest.hexdigest()


def seed_everything(seed: int) -> None:
    """Seeds Python's, numpy's and torch's global generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def fixed_order_of_sums(device: torch.device) -> Iterator[None]:
    """On a CPU, sums of one tensor's rows at repeated indices have one order, whatever threads there are; elsewhere nothing changes.

    Otherwise the gradient of `x[index]` is added up by several threads in the order in which they come. Sets torch's deterministic
    algorithms for the block, in the whole process; an operation without one warns.
    """
    if device.type != "cpu":
        yield
        return
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=not enabled or warn_only)
    memory.fill_uninitialized_memory = enabled and fill  # costs time
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        memory.fill_uninitialized_memory = fill


def rng_state() -> dict[str, Any]:
    """The state of the global random generators, as values for a checkpoint."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restores a state from `rng_state`."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
