"""Safetensors files ↔ `AdapterState`: fastlora's, whose metadata stores each layer's settings, and loralib's, without metadata.

Keys are `<path>.lora_A`, `<path>.lora_B`, `<path>.lora_magnitude`, `<path>.initial_A`, `<path>.initial_B`, and the names of other tensors.
The metadata `fastlora` is JSON: {"version": 1, "layers": {path: `LayerState.settings()`}, "ties": `AdapterState.ties`,
"partial": `AdapterState.partial`}; settings missing from older files are None.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fastlora.errors import CheckpointError, ConfigError, FastLoRAWarning
from fastlora.io.adapter_state import AdapterState, LayerState
from fastlora.layers.base import ADAPTER_TENSORS

PEFT_PREFIX = "base_model.model."
_METADATA_KEY = "fastlora"


class Contents(NamedTuple):
    """The tensors of a file, and what fastlora's metadata says: the settings of each layer, `AdapterState.ties` and `.partial`.

    metadata: all entries, as text by name.
    """

    tensors: dict[str, Tensor]
    layers: dict[str, dict[str, Any]]
    ties: dict[str, str] | None = None
    partial: str | None = None
    metadata: Mapping[str, str] = {}


def read_safetensors(file: Path) -> Contents:
    """The contents of a file. Raises: CheckpointError if it is damaged."""
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            metadata = opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a readable safetensors file: {error}") from None
    if _METADATA_KEY not in metadata:
        return Contents(tensors, {}, metadata=metadata)
    try:
        stored = json.loads(metadata[_METADATA_KEY])
        layers = {path: dict(settings) for path, settings in stored["layers"].items()}
        ties, partial = stored.get("ties"), stored.get("partial")
        return Contents(
            tensors,
            layers,
            None if ties is None else {str(name): str(tie) for name, tie in ties.items()},
            None if partial is None else str(partial),
            metadata,
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file}: damaged fastlora metadata: {error!r}") from None


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The safetensors file of `tensors`, equal bytes for equal input. Tensors that share storage are written once for each name.

    Raises: CheckpointError if a tensor is on the meta device.
    """
    owners: dict[int, str] = {}
    written = {}
    for key, value in tensors.items():
        if value.is_meta:
            raise CheckpointError(f"{key}: is on the meta device, so it has no value to write")
        value = value.contiguous().cpu()
        if owners.setdefault(value.untyped_storage().data_ptr(), key) != key:
            value = value.clone()
        written[key] = value
    data: bytes = save(written)
    size = int.from_bytes(data[:8], "little")
    # `save` writes metadata in a random order.
    header = {"__metadata__": dict(metadata), **json.loads(data[8 : 8 + size])}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def fastlora_bytes(state: AdapterState, metadata: Mapping[str, str] | None = None) -> bytes:
    """fastlora's file of `state`. metadata: further entries."""
    layers = {path: layer.settings() for path, layer in state.layers.items()}
    known = {"ties": state.ties, "partial": state.partial}
    own = settings_metadata(layers, **known)
    return safetensors_bytes(state.tensors(), {**(metadata or {}), **own})


def settings_metadata(layers: Mapping[str, Mapping[str, Any]], **known: Any) -> dict[str, str]:
    """The metadata of a file that stores the settings of each layer, by path, and the other fields of `Contents` unless they are None."""
    stored = {"version": 1, "layers": layers}
    stored |= {name: value for name, value in known.items() if value is not None}
    return {"format": "pt", _METADATA_KEY: json.dumps(stored)}


def read_adapter_file(file: Path, alpha: float | None = None) -> AdapterState:
    """`adapter_of` the contents of a safetensors file. Raises: CheckpointError, also if the file is damaged."""
    return adapter_of(file, read_safetensors(file), alpha)


def adapter_of(file: Path, contents: Contents, alpha: float | None = None) -> AdapterState:
    """The adapter in fastlora's or loralib's file. alpha: for loralib's, which does not store it.

    Raises: CheckpointError if the file has no adapter, or its tensors and settings do not fit together.
    """
    tensors, settings, ties, partial, _ = contents
    if any(key.startswith(PEFT_PREFIX) and ".lora_" in key for key in tensors):
        raise CheckpointError(
            f"{file}: holds PEFT's weights, whose alpha is in adapter_config.json; pass the folder that holds both"
        )
    layers, others = group_tensors(file, tensors, {name: name for name in ADAPTER_TENSORS})
    undescribed = settings.keys() - layers.keys()
    if undescribed:
        raise CheckpointError(
            f"{file}: the metadata describes {min(undescribed)!r}, which has no tensors"
        )
    if settings:
        described = {path: settings.get(path, {}) for path in layers}
        states = layer_states(file, layers, described)
        return AdapterState(states, others, "fastlora", ties, partial)
    known = None if alpha is None else {"alpha": alpha}
    states = layer_states(file, layers, dict.fromkeys(layers, known))
    square = [p for p, s in states.items() if s.kind == "linear" and len({*s.weight_shape}) == 1]
    if square:
        text = f"{file}: {square[0]}: the file does not store whether this square weight is transposed; assuming that it is not"
        warnings.warn(text, FastLoRAWarning, stacklevel=2)
    return AdapterState(states, others, "loralib")


def group_tensors(
    file: Path, tensors: Mapping[str, Tensor], names: Mapping[str, str]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """({path: {name: tensor}} of every adapted layer, in the natural order of the paths; the other tensors).

    names: ending of a key in the file → name in `ADAPTER_TENSORS`.

    Raises: CheckpointError if there is no adapter, if lora_A or lora_B is missing, or for an unknown variant.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    others = {}
    for key, tensor in tensors.items():
        ending = next((end for end in names if f".{key}".endswith(f".{end}")), None)
        if ending is None:
            if "lora_" in key.rpartition(".")[2] or ".lora_" in key:
                raise CheckpointError(
                    f"{file}: {key} belongs to a variant of LoRA that is not supported"
                )
            others[key] = tensor
            continue
        path = key.removesuffix(ending).removesuffix(".")
        if layers.setdefault(path, {}).setdefault(names[ending], tensor) is not tensor:
            raise CheckpointError(f"{file}: {path} has more than one {names[ending]}")
    if not layers:
        raise CheckpointError(f"{file}: holds no lora_A and lora_B, so it is not an adapter")
    for path, found in layers.items():
        for name in ("lora_A", "lora_B"):
            if name not in found:
                raise CheckpointError(f"{file}: {path} has {', '.join(found)} without {name}")
    return {path: layers[path] for path in sorted(layers, key=_natural)}, others


def layer_states(
    file: Path,
    layers: Mapping[str, Mapping[str, Tensor]],
    settings: Mapping[str, Mapping[str, Any] | None],
) -> dict[str, LayerState]:
    """`LayerState.from_file` of every layer. Raises: CheckpointError that names the file and the layer."""
    states = {}
    for path, tensors in layers.items():
        try:
            states[path] = LayerState.from_file(tensors, settings[path])
        except (CheckpointError, ConfigError) as error:
            raise CheckpointError(f"{file}: {path or 'the layer'}: {error}") from None
    return states


def _natural(path: str) -> list[tuple[int, str]]:
    """A sorting key by which `blocks.2` comes before `blocks.10`."""
    return [(len(p), p) if p.isdecimal() else (0, p) for p in path.split(".")]
