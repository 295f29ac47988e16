"""Merging an adapter into files of base weights, one layer in memory at a time."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastlora.cli.convert import refuse_existing
from fastlora.errors import CheckpointError, FastLoRAWarning, MergeError, nearest
from fastlora.files import move_into_place, read_json
from fastlora.io.adapter_state import AdapterState

_INDEX_SUFFIX = ".index.json"
_FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
_OTHER_ORIENTATION = {"linear": "transposed", "transposed": "linear"}


class MergedLayer(NamedTuple):
    """The result of merging one layer: its path, the weight's dtype, and the share ‖rounding‖ / ‖ΔW‖ that rounding lost."""

    path: str
    dtype: torch.dtype
    lost: float


class _Entry(NamedTuple):
    """One tensor of a safetensors file: its dtype as in the file, its shape, and where its bytes begin and end."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def merge_files(
    base: Path, adapter: AdapterState, target: Path, *, force: bool
) -> list[MergedLayer]:
    """Write a copy of the `base` weights with the adapter merged, one layer in memory at a time.

    W + ΔW is summed in float32 or wider and rounded once to the dtype of W. Heads saved with the adapter replace those of the
    base. Everything else, metadata included, is copied byte by byte. Whether a matrix is stored transposed is determined by its
    shape in the base, and by the adapter only if it is square.

    base: a safetensors file, or the `*.index.json` of a sharded one; then `target` is a folder for shards and index.

    Raises: CheckpointError if a layer or head is not in the base or does not fit, with the nearest key; if a weight is not
    a float of 16 to 64 bits; if a weight is square and the shapes of other layers contradict the adapter; or if the target exists
    without `force`. MergeError, naming the layer or head, if what would be written is not finite where the base is. Nothing is
    written then.
    """
    sharded = base.name.endswith(_INDEX_SUFFIX)
    if target.exists() and target.is_dir() != sharded:
        problem = "file; a sharded base needs a folder" if sharded else "folder; expected a file"
        raise CheckpointError(f"{target}: is a {problem} to write to")
    names = _shards(base) if sharded else [base.name]
    places = (
        {name: target / name for name in (*names, base.name)} if sharded else {base.name: target}
    )
    refuse_existing(places.values(), force)
    entries = {k: entry for name in names for k, entry in _header(base.parent / name).items()}
    state = _fit(adapter, entries)
    merged = []
    folder = target if target.is_dir() else target.parent
    try:
        with tempfile.TemporaryDirectory(prefix=".merge-", dir=folder) as temporary:
            for name in places:
                copied = Path(temporary) / name
                shutil.copyfile(base.parent / name, copied)
                if name in names:
                    merged += _merge_into(copied, state)
            if sharded:
                target.mkdir(exist_ok=True)
            # The index, if there is one, is moved last.
            move_into_place({Path(temporary) / name: place for name, place in places.items()})
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error}") from error
    return merged


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
    header.pop("__metadata__", None)
    entries = {}
    for key, entry in header.items():
        begin, end = (8 + size + offset for offset in entry["data_offsets"])
        entries[key] = _Entry(entry["dtype"], tuple(entry["shape"]), begin, end)
    return entries


def _shards(index: Path) -> list[str]:
    """The file names of a sharded base, each once."""
    try:
        files = sorted(set(read_json(index)["weight_map"].values()))
        plain = all(name == Path(name).name and name.endswith(".safetensors") for name in files)
        # allowed by file systems
        usable = all("\0" not in name and len(os.fsencode(name)) <= 255 for name in files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not a readable index: {error!r}") from None
    if not (files and plain and usable):
        raise CheckpointError(
            f"{index}: weight_map: expected names of .safetensors files in the same folder"
        )
    return files


def _fit(state: AdapterState, base: Mapping[str, _Entry]) -> AdapterState:
    """`state` with the kind of each matrix, "linear" or "transposed", taken from its shape in the base.

    Raises: CheckpointError naming the tensors that are missing from the base, wrongly shaped or not of a float dtype; a scaling
    that is unknown or too large; or a square weight, if the shape of another layer contradicts the adapter's file.
    """
    reoriented, square = {}, []
    for path, layer in state.layers.items():
        if abs(layer.scaling) > torch.finfo(torch.float32).max:
            raise CheckpointError(f"{path}: the scaling {layer.scaling:g} is too large for float32")
        if layer.kind in _OTHER_ORIENTATION:
            entry, shape = base.get(_weight(path)), layer.weight_shape
            if shape == shape[::-1]:
                square.append(path)
            elif entry is not None and entry.shape == shape[::-1]:
                reoriented[path] = replace(layer, kind=_OTHER_ORIENTATION[layer.kind])
    if square and reoriented:
        raise CheckpointError(
            f"{square[0]}: whether this square weight is stored transposed is unknown, since {min(reoriented)} is not stored "
            "as the adapter's file states; merge in Python (merged_model)"
        )
    layers = state.layers | reoriented
    shapes = {_weight(path): layer.weight_shape for path, layer in layers.items()}
    shapes |= {name: tuple(value.shape) for name, value in state.others.items()}
    problems = []
    for key, shape in shapes.items():
        if key not in base:
            problems.append(f"no {key}{nearest(key, base)}")
        elif base[key].shape != shape:
            problems.append(f"{key}: expected shape {shape}, got {base[key].shape}")
        elif base[key].dtype not in _FLOATS:
            problems.append(f"{key}: expected one of {', '.join(_FLOATS)}, got {base[key].dtype}")
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(
            "the base does not fit the adapter: " + "; ".join(problems[:3]) + more
        )
    return replace(state, layers=layers)


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
            base = torch.frombuffer(data, dtype=dtype).view(entry.shape)
            try:
                weight, lost = layer.merge(base)
            except MergeError as error:
                raise MergeError(f"{path or 'the layer'}: {error}") from None
            spoiled = int((~base.isfinite()).sum())
            if spoiled:
                warnings.warn(
                    f"{_weight(path)}: {spoiled} values of the base are not finite, and stay so",
                    FastLoRAWarning,
                    stacklevel=3,
                )
            _write(opened, entry, weight)
            merged.append(MergedLayer(path, dtype, lost))
        for name in state.others.keys() & header.keys():
            entry, head = header[name], state.others[name]
            if not head.to(_FLOATS[entry.dtype]).isfinite().all():
                raise MergeError(
                    f"{name}: the adapter's values are not all finite in {entry.dtype}"
                )
            _write(opened, entry, head)
    return merged


def _weight(path: str) -> str:
    """The key of the weight of the layer at `path`."""
    return f"{path}.weight".lstrip(".")


def _write(file: BinaryIO, entry: _Entry, tensor: Tensor) -> None:
    """Overwrite the bytes of `entry`."""
    flat = tensor.to(_FLOATS[entry.dtype]).contiguous().reshape(-1)
    file.seek(entry.begin)
    file.write(flat.view(torch.uint8).numpy().tobytes())
