"""Adapter state: dicts, strict loading with hints, and files that cannot run code."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from fastlora.errors import CheckpointError, FastLoRAWarning, nearest
from fastlora.files import read_torch, write_files
from fastlora.layers.base import named_lora_layers

_METADATA_KEY = "fastlora"


class LoadResult(NamedTuple):
    """What `load_lora_state_dict` did: the keys it loaded, those it missed, those it did not know."""

    loaded: list[str]
    missing: list[str]
    unexpected: list[str]


def get_lora_state_dict(model: nn.Module, include_trainable: bool = False) -> dict[str, Tensor]:
    """The adapter's tensors by name: `<path>.lora_A` (R, K) and `<path>.lora_B` (N, R), detached, sharing storage.

    Under DoRA also `<path>.lora_magnitude` (N,), and after PiSSA or OLoRA `<path>.initial_A` and `<path>.initial_B`, the start that
    is taken off; without it the rest means nothing.
    include_trainable: also every other parameter that trains (unfrozen heads), under its own name.
    A merged or adapter-free model gives an empty dict.
    """
    return {name: tensor.detach() for name, tensor in _adapter_tensors(model).items()} | (
        {name: p.detach() for name, p in _other_parameters(model).items() if p.requires_grad}
        if include_trainable
        else {}
    )


def load_lora_state_dict(
    model: nn.Module, state: Mapping[str, Tensor], strict: bool = True
) -> LoadResult:
    """Copy adapter tensors, and heads saved with them, into a model that already has its adapters.

    Keys are those of `get_lora_state_dict`. Values are cast to the dtype and moved to the device of the parameter.
    strict: every adapter parameter must be there with the right shape, and nothing unknown; if the state holds any head,
        it must hold every parameter that trains. On failure nothing is changed.
        False loads what fits and warns about the rest.

    Raises: CheckpointError naming each missing, unexpected and wrongly shaped key with the nearest candidate, and also when
    strict is False but nothing at all would be loaded.
    """
    adapters, others = _adapter_tensors(model), _other_parameters(model)
    known: dict[str, Tensor] = {**adapters, **others}
    if not adapters:
        raise CheckpointError("model: has no adapters; call inject_lora with the saved rank first")
    bad_type = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if bad_type:
        raise CheckpointError(
            f"state: expected tensors, got {type(state[bad_type[0]]).__name__} at {bad_type[0]!r}"
        )
    wanted = dict(adapters)
    if any(key in others for key in state):
        wanted |= {name: p for name, p in others.items() if p.requires_grad}
    shapes = {name: parameter.shape for name, parameter in known.items()}
    loadable, missing, unexpected, problems = compare(state, list(wanted), shapes)
    if problems and (strict or not loadable):
        summary = f"{len(problems)} problems, nothing was changed:\n  "
        raise CheckpointError("state does not fit the model: " + summary + "\n  ".join(problems))
    if not loadable:
        raise CheckpointError("state: is empty, so nothing would be loaded")
    mixed = _mixed_layers(model, loadable)
    if mixed:
        raise CheckpointError(
            f"state: holds only a part of the adapter of {mixed[0]} that fits; its tensors mean nothing without each other"
        )
    refuse_complex({key: state[key] for key in loadable}, known)
    if problems:
        warnings.warn(
            f"load_lora_state_dict: loaded {len(loadable)} tensors, and not:\n  "
            + "\n  ".join(problems),
            FastLoRAWarning,
            stacklevel=2,
        )
    with torch.no_grad():
        for key in loadable:
            known[key].copy_(state[key])
    return LoadResult(loadable, missing, unexpected)


def _mixed_layers(model: nn.Module, loadable: list[str]) -> list[str]:
    """Layers with a start that is taken off, or with DoRA, of whose tensors only a part would be loaded."""
    found, given = [], set(loadable)
    for path, layer in named_lora_layers(model):
        keys = {f"{path}.{name}".lstrip(".") for name in layer.lora_state()}
        if len(keys) > 2 and keys & given and not keys <= given:
            found.append(path or "the layer")
    return found


def refuse_complex(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Raises: CheckpointError if copying a tensor of `state` into that of `own` would drop an imaginary part."""
    for key, value in state.items():
        if value.is_complex() and not (key in own and own[key].is_complex()):
            raise CheckpointError(f"{key}: expected real numbers, got {value.dtype}")


def compare(
    state: Mapping[str, Tensor], wanted: list[str], shapes: Mapping[str, torch.Size]
) -> tuple[list[str], list[str], list[str], list[str]]:
    """(loadable, missing, unexpected, problems): what fits, and a line with the nearest candidate for each key that does not.

    wanted: the keys that must be there. shapes: every key that may be there.
    """
    missing = [key for key in wanted if key not in state]
    unexpected = [key for key in state if key not in shapes]
    misshapen = [k for k, v in state.items() if k in shapes and v.shape != shapes[k]]
    loadable = [k for k in state if k in shapes and k not in misshapen]
    problems = (
        [f"missing {key}{nearest(key, unexpected)}" for key in missing]
        + [f"unexpected {key}{nearest(key, missing or wanted)}" for key in unexpected]
        + [
            f"{key}: expected shape {tuple(shapes[key])}, got {tuple(state[key].shape)}"
            for key in misshapen
        ]
    )
    return loadable, missing, unexpected, problems


def save_adapter(
    model: nn.Module, path: str | os.PathLike[str], include_trainable: bool = True
) -> None:
    """Write the adapter (and by default the trained heads) to one safetensors file, atomically.

    Kind, rank, alpha, dropout, use_rslora and use_dora of every layer go into the file's metadata; loading checks what
    changes the result.

    Raises: CheckpointError if the model has no adapters or the file cannot be written; an older file is left as it was.
    """
    layers = {
        layer_path: {
            "rank": layer.rank,
            "alpha": layer.alpha,
            "dropout": layer.dropout,
            "use_rslora": layer.use_rslora,
            "use_dora": layer.lora_magnitude is not None,
            "kind": layer.kind,
        }
        for layer_path, layer in named_lora_layers(model)
    }
    if not layers:
        raise CheckpointError("model: has no adapters, so there is nothing to save")
    state = get_lora_state_dict(model, include_trainable)
    metadata = {"format": "pt", _METADATA_KEY: json.dumps({"version": 1, "layers": layers})}
    write_files({Path(path): safetensors_bytes(state, metadata)})


def safetensors_bytes(state: Mapping[str, Tensor], metadata: dict[str, str]) -> bytes:
    """The safetensors file of `state`. Tensors that share storage are written once for each name."""
    owners: dict[int, str] = {}
    tensors = {}
    for key, value in state.items():
        value = value.contiguous().cpu()
        if owners.setdefault(value.untyped_storage().data_ptr(), key) != key:
            value = value.clone()
        tensors[key] = value
    return bytes(save(tensors, metadata))


def load_adapter(model: nn.Module, path: str | os.PathLike[str], strict: bool = True) -> LoadResult:
    """Load an adapter file into a model that already has its adapters.

    path: a `.safetensors` file, or a `.pt`, `.pth` or `.bin` file holding a state dict (read with weights_only=True, sizes checked).
    strict: as in `load_lora_state_dict`. Rank, alpha and use_rslora stored in the file must equal the model's;
        not strict warns.

    Raises: CheckpointError if the file is missing, unreadable or does not fit. The model is unchanged then.
    """
    file = Path(path)
    if not file.is_file():
        raise CheckpointError(f"path: no such file: {file}")
    state, layers = (
        read_safetensors(file) if file.suffix == ".safetensors" else (_read_torch(file), {})
    )
    problems = []
    for layer_path, layer in named_lora_layers(model):
        if layer_path not in layers:
            continue
        stored = {"use_rslora": False} | layers[layer_path]
        for name in ("rank", "alpha", "use_rslora"):
            mine = getattr(layer, name)
            saved = stored.get(name, mine)
            if saved != mine:
                problems.append(f"{layer_path}: {name} is {saved} in the file, {mine} in the model")
    if problems and strict:
        raise CheckpointError(f"{file.name} does not fit the model:\n  " + "\n  ".join(problems))
    if problems:
        warnings.warn(
            f"load_adapter: {file.name}:\n  " + "\n  ".join(problems), FastLoRAWarning, stacklevel=2
        )
    return load_lora_state_dict(model, state, strict)


def _adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{path}.{name}".lstrip("."): tensor
        for path, layer in named_lora_layers(model)
        for name, tensor in layer.lora_state().items()
    }


def _other_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    adapters = _adapter_tensors(model)
    return {name: p for name, p in model.named_parameters() if name not in adapters}


def read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, dict[str, float]]]:
    """(tensors, what fastlora's metadata says of each layer). Raises: CheckpointError if it is damaged."""
    try:
        with safe_open(file, framework="pt") as opened:
            state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            metadata = opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a readable safetensors file: {error}") from None
    if _METADATA_KEY not in metadata:
        return state, {}
    try:
        layers = json.loads(metadata[_METADATA_KEY])["layers"]
        return state, {path: dict(values) for path, values in layers.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file}: damaged fastlora metadata: {error!r}") from None


def _read_torch(file: Path) -> dict[str, Tensor]:
    try:
        state = read_torch(file)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: not a readable state dict: {error}") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{file}: expected a state dict, got {type(state).__name__}")
    return state
