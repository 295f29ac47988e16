"""Merging an adapter into files of base weights, one layer in memory at a time."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastlora.cli.adapter_files import refuse_existing
from fastlora.errors import CheckpointError, FastLoRAWarning, nearest
from fastlora.files import move_into_place, read_json
from fastlora.io.adapter_state import AdapterState

_INDEX_SUFFIX = ".index.json"
_FLOATS = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class MergedLayer:
    """What merging one layer did: its path, the weight's dtype, and the share ‖rounding‖ / ‖ΔW‖ that was lost."""

    path: str
    dtype: torch.dtype
    lost: float


def merge_files(
    base: Path, adapter: AdapterState, target: Path, *, force: bool
) -> list[MergedLayer]:
    """Write a copy of the `base` weights with the adapter merged, one layer in memory at a time.

    W + ΔW is summed in float32 or wider and rounded once to the dtype of W. Heads saved with the adapter replace those of the
    base. Everything else, metadata included, is copied byte by byte.

    base: a safetensors file, or the `*.index.json` of a sharded one; then `target` is a folder that gets shards and index.

    Raises: CheckpointError if a layer or head is not in the base or does not fit, with the nearest key; if a weight is not
    a float of 16 to 64 bits; if neither file says how a weight is stored; or if the target exists without `force`. Nothing is
    written then.
    """
    sharded = base.name.endswith(_INDEX_SUFFIX)
    names = _shards(base) if sharded else [base.name]
    if sharded and target.exists() and not target.is_dir():
        raise CheckpointError(
            f"{target}: a sharded base needs a folder to write to; this is a file"
        )
    if not sharded and target.is_dir():
        raise CheckpointError(f"{target}: is a folder; expected the name of a file to write")
    places = {name: target / name if sharded else target for name in names}
    if sharded:
        places[base.name] = target / base.name
    refuse_existing(places.values(), force)
    entries: dict[str, _Entry] = {}
    for name in names:
        entries |= _header(base.parent / name)
    state = _settle_kinds(adapter, entries)
    _check_fit(state, entries)
    merged = []
    folder = target if sharded else target.parent
    made = sharded and not folder.exists()
    try:
        if made:
            folder.mkdir()
        with tempfile.TemporaryDirectory(prefix=".merge-", dir=folder) as temporary:
            for name in places:
                copied = Path(temporary) / name
                shutil.copyfile(base.parent / name, copied)
                if name in names:
                    merged += _merge_into(copied, state)
            # The index, if there is one, comes last.
            move_into_place({Path(temporary) / name: place for name, place in places.items()})
    except OSError as error:
        if made and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        raise CheckpointError(f"cannot write {target}: {error}") from error
    return merged


@dataclass(frozen=True)
class _Entry:
    """One tensor of a safetensors file: its dtype as the file writes it, its shape, and where its bytes begin and end."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def _header(file: Path) -> dict[str, _Entry]:
    """The tensors of a file, after safetensors has checked that offsets, shapes and the file's size agree."""
    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a readable safetensors file: {error}") from None
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
    start = 8 + size
    return {
        key: _Entry(
            entry["dtype"],
            tuple(entry["shape"]),
            start + entry["data_offsets"][0],
            start + entry["data_offsets"][1],
        )
        for key, entry in header.items()
        if key != "__metadata__"
    }


def _shards(index: Path) -> list[str]:
    """The file names of a sharded base, each once."""
    try:
        names = read_json(index)["weight_map"].values()
        files = sorted(set(names))
        plain = all(
            name == Path(name).name
            and name.endswith(".safetensors")
            and "\0" not in name
            and len(os.fsencode(name)) <= 255  # what file systems take
            for name in files
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not a readable index: {error!r}") from None
    if not files or not plain:
        raise CheckpointError(
            f"{index}: weight_map: expected names of .safetensors files beside it"
        )
    return files


def _settle_kinds(state: AdapterState, base: Mapping[str, _Entry]) -> AdapterState:
    """`state` with "linear" and "transposed" told apart by the shapes of the base where the adapter's file does not.

    Raises: CheckpointError if a weight is square, and the others show that the file's own hint cannot be trusted.
    """
    settled, square = {}, []
    for path, layer in state.layers.items():
        if layer.kind_known:
            continue
        other = replace(layer, kind="linear" if layer.kind == "transposed" else "transposed")
        entry = base.get(_weight(path))
        if other.weight_shape == layer.weight_shape:
            square.append(path)
        elif entry is not None and entry.shape == other.weight_shape:
            settled[path] = other
    if square and settled:
        raise CheckpointError(
            f"{square[0]}: the adapter's file does not say whether this square weight is stored transposed, "
            f"as that of {min(settled)} shows; merge in Python (merged_model)"
        )
    if square and state.scheme != "peft":  # whose fan_in_fan_out is the guess
        warnings.warn(
            f"{square[0]}: the adapter's file does not say whether this square weight is stored transposed; "
            f"merged as {state.layers[square[0]].kind}",
            FastLoRAWarning,
            stacklevel=2,
        )
    return replace(state, layers=state.layers | settled)


def _check_fit(state: AdapterState, base: Mapping[str, _Entry]) -> None:
    """Raises: CheckpointError naming the tensors that the base lacks, or has in another shape or a dtype that is no float."""
    shapes = {_weight(path): layer.weight_shape for path, layer in state.layers.items()}
    shapes |= {name: tuple(value.shape) for name, value in state.others.items()}
    for path, layer in state.layers.items():
        if (
            abs(layer.scaling) > torch.finfo(torch.float32).max
        ):  # also raises where alpha is unknown
            raise CheckpointError(f"{path}: the scaling {layer.scaling:g} is too large for float32")
    problems = []
    for key, shape in shapes.items():
        if key not in base:
            problems.append(f"no {key}{nearest(key, base)}")
        elif base[key].shape != shape:
            problems.append(f"{key}: expected shape {shape}, got {base[key].shape}")
        elif base[key].dtype not in _FLOATS:
            kinds = ", ".join(_FLOATS)
            problems.append(f"{key}: expected one of {kinds}, got {base[key].dtype}")
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(
            "the base does not fit the adapter: " + "; ".join(problems[:3]) + more
        )


def _merge_into(file: Path, state: AdapterState) -> list[MergedLayer]:
    """Overwrite the adapted weights and the heads in a base file, in place: sizes do not change, so neither do the offsets."""
    header = _header(file)
    merged = []
    with file.open("r+b") as opened:
        for path, layer in state.layers.items():
            entry = header.get(_weight(path))
            if entry is None:
                continue  # in another shard
            dtype = _FLOATS[entry.dtype]
            opened.seek(entry.begin)
            data = bytearray(opened.read(entry.end - entry.begin))
            weight, lost = layer.merge(torch.frombuffer(data, dtype=dtype).view(entry.shape))
            opened.seek(entry.begin)
            opened.write(_bytes(weight))
            merged.append(MergedLayer(path, dtype, lost))
        for name, value in state.others.items():
            if name in header:
                opened.seek(header[name].begin)
                opened.write(_bytes(value.to(_FLOATS[header[name].dtype])))
    return merged


def _weight(path: str) -> str:
    """The key of the weight of the layer at `path`."""
    return f"{path}.weight".lstrip(".")


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
