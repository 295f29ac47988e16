"""What the adapter file of a run says of the run, so that the file alone can be evaluated and used for predictions.

It is an entry of the safetensors metadata, JSON: the configuration without paths of the machine, the fingerprints of the base model and
of the regions, the epoch, the history and the counts of parameters. It holds no times, so equal runs give equal files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fastlora.errors import CheckpointError
from fastlora.medical.training.checkpointing import PLAIN, check_history, check_like
from fastlora.medical.training.config import PATHS

ENTRY = "fastlora_medical"

MOST_PARAMETERS = 2**50
_COUNTS = dict.fromkeys(("total", "trainable", "lora"), int)
_KEYS: Mapping[str, Any] = {
    "config": {str: PLAIN | list},
    "paths": [str, ...],
    "base_sha256": str,
    "regions": [str, ...],
    "epoch": int,
    "history": list,
    "counts": _COUNTS,
}
"""The entries and their types, as in `check_like`. paths: names of the options of the run that named a path."""


def adapter_metadata(content: Mapping[str, Any], counts: Mapping[str, int]) -> dict[str, str]:
    """The metadata of an adapter file. content: of the checkpoint with the same weights. counts: of `count_parameters`."""
    config = content["config"]
    about = {
        "config": {name: value for name, value in config.items() if name not in PATHS},
        "paths": [name for name in PATHS if config[name] is not None],
        **{name: content[name] for name in ("base_sha256", "regions", "epoch", "history")},
        "counts": {name: counts[name] for name in _COUNTS},
    }
    return {ENTRY: json.dumps(about, allow_nan=False)}


def read_metadata(file: Path) -> dict[str, str]:
    """The metadata of a safetensors file. Raises: CheckpointError if the file is damaged."""
    try:
        with safe_open(file, framework="pt") as opened:
            return dict(opened.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a readable safetensors file: {error}") from None


def read_adapter_run(file: Path) -> dict[str, Any]:
    """The entry of an untrusted adapter file, checked; in a file without it, only the ranks and the scaling are known.

    Then `base_sha256`, `epoch` and `counts` are None, and `history`, `regions` and `paths` are empty.
    Raises: CheckpointError if the file or the entry is damaged, or the file has no settings of its layers either.
    """
    metadata = read_metadata(file)
    text = metadata.get(ENTRY)
    if text is None:
        unknown: dict[str, Any] = dict.fromkeys(("base_sha256", "epoch", "counts"))
        none: dict[str, Any] = {"history": [], "regions": [], "paths": []}
        return {"config": _settings(file, metadata), **unknown, **none}
    where = f"{file}: {ENTRY}"
    try:
        about = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not JSON: {error}") from None
    check_like(about, dict, where)
    if missing := sorted(_KEYS.keys() - about.keys()):
        raise CheckpointError(f"{where}: lacks {', '.join(missing)}")
    for name, wanted in _KEYS.items():
        check_like(about[name], wanted, f"{where}: {name}")
    if named := sorted(about["config"].keys() & set(PATHS)):
        raise CheckpointError(f"{where}: config: expected no paths, got {', '.join(named)}")
    counts = about["counts"]
    if (
        not 0 <= counts["lora"] < counts["total"] <= MOST_PARAMETERS
        or not 0 <= counts["trainable"] <= counts["total"]
    ):
        raise CheckpointError(f"{where}: counts: expected numbers of parameters, got {counts}")
    check_history(about["history"], [], where)
    if len(about["history"]) != about["epoch"] + 1:
        raise CheckpointError(
            f"{where}: expected a history of epoch 0 to {about['epoch']}, got {len(about['history'])} entries"
        )
    return {name: about[name] for name in _KEYS}


def _settings(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The options that give the packaged decoder the layers of an adapter file, which `save_adapter` states in the metadata."""
    try:
        layers = json.loads(metadata.get("fastlora", '{"layers": {}}'))["layers"]
        ranks = {path: int(layer["rank"]) for path, layer in layers.items()}
        scalings = {float(layer["alpha"]) / ranks[path] for path, layer in layers.items()}
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as e:
        raise CheckpointError(f"{file}: damaged settings of its layers: {e!r}") from None
    if len(scalings) != 1:
        found = ", ".join(f"{scaling:g}" for scaling in sorted(scalings)) or "none"
        raise CheckpointError(
            f"{file}: expected an adapter with one alpha / rank for all layers in its metadata, got {found}"
        )
    first = next(iter(ranks.values()))
    return {
        "lora_rank": first,
        "lora_alpha": scalings.pop() * first,
        "lora_ranks": [f"{path}={rank}" for path, rank in ranks.items()],
        "lora_ffn": any(".mlp." in path for path in ranks),
    }
