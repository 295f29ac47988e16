"""Save and load the adapter of a model as a state dict or a file; loading is strict, and errors name the nearest keys."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastlora.errors import CheckpointError, ConfigError, FastLoRAWarning, first_few, nearest
from fastlora.files import read_torch, write_files
from fastlora.io.adapter_state import AdapterState, adapter_state
from fastlora.io.safetensors_format import fastlora_bytes, read_safetensors
from fastlora.layers.base import named_lora_layers
from fastlora.model.adapter_registry import inactive_adapters, none_active
from fastlora.model.heads import (
    head_parameters,
    head_tensors,
    persistent_buffers,
    record_heads,
    warn_of_changed_base,
)
from fastlora.model.sharded import copy_whole
from fastlora.model.wrappers import plain_key, plain_names


class LoadResult(NamedTuple):
    """The keys that `load_lora_state_dict` loaded, those that were missing, and those that were unexpected."""

    loaded: list[str]
    missing: list[str]
    unexpected: list[str]


def get_lora_state_dict(model: nn.Module, include_trainable: bool = False) -> dict[str, Tensor]:
    """Copies of the adapter's tensors by name, without wrappers such as DistributedDataParallel and torch.compile.

    `<path>.lora_A` (R, K) and `<path>.lora_B` (N, R); under DoRA also `<path>.lora_magnitude` (N,); after PiSSA or OLoRA also
    `<path>.initial_A` and `<path>.initial_B`, the subtracted initial product, without which the other two are not usable.
    include_trainable: also the heads, under all their own names: every other parameter that trains, or that is recorded because
        fastlora let it train, and the persistent buffers of their modules (running statistics). Otherwise their names are in a warning.
    Under FSDP2 every process must call it, and gets full tensors. The dict is empty if the model has no adapters,
    with a warning if it has inactive ones.

    Raises: CheckpointError under FSDP1 outside of `summon_full_params`, or if a tensor is on the meta device.
    """
    left_out = {} if include_trainable else head_parameters(model, known=True)
    if left_out:
        warnings.warn(
            f"get_lora_state_dict: leaves out {first_few(list(left_out))}, which train too; pass include_trainable=True",
            FastLoRAWarning,
            stacklevel=2,
        )
    warn_of_changed_base(model, "get_lora_state_dict")
    state = adapter_state(model, include_trainable).whole().tensors()
    if not state and inactive_adapters(model):
        warnings.warn(
            f"get_lora_state_dict: {none_active(model)}, so the dict is empty",
            FastLoRAWarning,
            stacklevel=2,
        )
    for name, tensor in state.items():
        if tensor.is_meta:
            raise CheckpointError(f"{name}: is on the meta device (as offloaded), without a value")
    return {name: tensor.clone() for name, tensor in state.items()}


def load_lora_state_dict(
    model: nn.Module, state: Mapping[str, Tensor], strict: bool = True
) -> LoadResult:
    """Copy adapter tensors, and heads saved with them, into a model that already has its adapters.

    Keys are those of `get_lora_state_dict`. Values are cast to the dtype and moved to the device of the parameter. Loaded heads become
    heads of the model: they are saved again, and `freeze_base_params` keeps them trainable. Under FSDP2 every process must call it.
    strict: every adapter parameter must be present with the right shape, and no unknown key; if the state has any head, it must
        have every head of the model, a tied one under any of its names, with equal values. On failure nothing is changed.
        False loads what fits and warns about the other keys.

    Warns if the state lacks what the model trains: its heads, if it has none, or their running statistics.

    Raises: CheckpointError naming each missing, unexpected and wrongly shaped key with the nearest candidate, and also if
    strict is False but nothing would be loaded.
    """
    own = adapter_state(model)
    if not own.layers:
        raise CheckpointError(f"{none_active(model)}; call inject_lora with the saved rank first")
    adapters = own.tensors()
    plain = plain_names(model)
    parameters = {plain(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    others = {name: p for name, p in parameters.items() if name not in adapters}
    buffers = {plain(name): buffer for name, _, buffer in persistent_buffers(model)}
    known: dict[str, Tensor] = {**adapters, **others, **buffers}
    state = {plain_key(key, known): value for key, value in state.items()}
    heads: dict[int, list[str]] = {}  # the names of each; one is enough for a tied one
    for name, tensor in head_tensors(model, known=True).items():
        heads.setdefault(id(tensor), []).append(plain(name))
    absent = [names[0] for names in heads.values() if not any(name in state for name in names)]
    wanted = list(adapters)
    if any(key in others for key in state):
        wanted += [name for name in absent if name in others]
    result, problems = match_keys(state, wanted, known)
    names: dict[int, list[str]] = {}
    for name, tensor in {**others, **buffers}.items():
        names.setdefault(id(tensor), []).append(name)
    problems += conflicts({key: state[key] for key in result.loaded}, names.values())
    for path, layer in own.layers.items():
        keys = AdapterState({path: layer}, {}).tensors().keys()
        # With DoRA or a subtracted initial product, a part of the tensors is not usable without the others.
        if not strict and len(keys) > 2 and 0 < len(keys & set(result.loaded)) < len(keys):
            where = path or "the layer"
            raise CheckpointError(
                f"state: only a part of the adapter of {where} fits, which is not usable without the other tensors"
            )
    raise_or_warn("state", problems, result.loaded, strict)
    lacking = [name for name in absent if name not in result.missing]
    if lacking:
        warnings.warn(
            f"state: does not hold {first_few(lacking)}, which the model trains too; they keep their values",
            FastLoRAWarning,
            stacklevel=2,
        )
    for key in result.loaded:
        copy_whole(known[key], state[key])
    heads_loaded = [others[key] for key in result.loaded if key in others]
    adapted = {id(layer.wrapped.weight) for _, layer in named_lora_layers(model)}
    if not adapted.issubset(map(id, heads_loaded)):  # else of a model that was not frozen
        record_heads(model, heads_loaded)
    return result


def conflicts(state: Mapping[str, Tensor], groups: Iterable[Iterable[str]]) -> list[str]:
    """A line for each two keys of the state that differ, of one tensor in the model. groups: the keys of each tensor."""
    lines = []
    for group in groups:
        keys = sorted(key for key in group if key in state)
        for other in keys[1:]:
            a, b = state[keys[0]], state[other]
            if not (a is b or a.is_meta or b.is_meta or torch.equal(a, b.to(a))):
                lines.append(
                    f"{keys[0]}: differs from {other}, which is the same tensor in the model"
                )
    return lines


def match_keys(
    state: Mapping[str, Any], wanted: list[str], known: Mapping[str, Tensor | torch.Size]
) -> tuple[LoadResult, list[str]]:
    """The keys of `state` that fit `known`, and for each problem a line with the nearest candidates.

    wanted: the required keys. known: every allowed key with its tensor, or the shape of a real tensor.
    """
    missing = [key for key in wanted if key not in state]
    unexpected = [key for key in state if key not in known]
    loadable = []
    problems = [f"missing {key}{nearest(key, unexpected)}" for key in missing]
    problems += [f"unexpected {key}{nearest(key, missing or wanted)}" for key in unexpected]
    for key, value in state.items():
        if key not in known:
            continue
        own = known[key]
        shape = tuple(own.shape if isinstance(own, Tensor) else own)
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        if got != shape:
            problems.append(f"{key}: expected shape {shape}, got {got}")
        elif (isinstance(own, Tensor) and own.is_meta) or value.is_meta:
            where = "in the state" if value.is_meta else "in the model"
            problems.append(f"{key}: is on the meta device {where}, where it has no value")
        elif value.is_complex() and not (isinstance(own, Tensor) and own.is_complex()):
            problems.append(f"{key}: expected real numbers, got {value.dtype}")
        else:
            loadable.append(key)
    return LoadResult(loadable, missing, unexpected), problems


def raise_or_warn(what: str, problems: list[str], loadable: list[str], strict: bool) -> None:
    """Raises: CheckpointError if there are problems and `strict`, or if nothing is loadable. Otherwise warns about them."""
    lines = "".join(f"\n  {problem}" for problem in problems)
    if problems and (strict or not loadable):
        raise CheckpointError(
            f"{what} does not fit the model: {len(problems)} problems, nothing was changed:{lines}"
        )
    if not loadable:
        raise CheckpointError(f"{what}: is empty, so nothing would be loaded")
    if problems:
        text = f"{what}: loaded {len(loadable)} tensors; problems:{lines}"
        warnings.warn(text, FastLoRAWarning, stacklevel=3)


def save_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    include_trainable: bool = True,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the adapter, and by default the heads as in `get_lora_state_dict`, to one safetensors file, atomically.

    Kind, rank, alpha, dropout, use_rslora and use_dora of every layer are stored in the file's metadata. FSDP as in
    `get_lora_state_dict`.

    metadata: further entries of the file's metadata, text by name, for the caller's own use.

    Raises: CheckpointError if the model has no adapters or the file cannot be written; an existing file is unchanged then.
        ConfigError if `metadata` is not text by name, or uses the names `fastlora` or `format`.
    """
    _check_metadata(metadata or {})
    state = adapter_state(model, include_trainable)
    if not state.layers:
        raise CheckpointError(f"{none_active(model)}, so there is nothing to save")
    warn_of_changed_base(model, "save_adapter")
    write_files({Path(path): fastlora_bytes(state.whole(), metadata)})


def _check_metadata(metadata: Mapping[str, str]) -> None:
    if not isinstance(metadata, Mapping):
        raise ConfigError(f"metadata: expected text by name, got {type(metadata).__name__}")
    for name, text in metadata.items():
        if not (isinstance(name, str) and isinstance(text, str)):
            raise ConfigError(f"metadata: expected text by name, got {name!r}: {text!r}")
        try:
            (name + text).encode()
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"metadata: expected text that UTF-8 can hold, got {name!r}: {error}"
            ) from None
        if name in ("fastlora", "format"):
            raise ConfigError(f"metadata: expected another name than {name!r}, which is in use")


def load_adapter(model: nn.Module, path: str | os.PathLike[str], strict: bool = True) -> LoadResult:
    """Load an adapter file into a model that already has its adapters.

    path: a `.safetensors` file, or a `.pt`, `.pth` or `.bin` file with a state dict (read with weights_only=True, sizes checked).
    strict: as in `load_lora_state_dict`. Rank, alpha and use_rslora stored in the file must equal the model's;
        strict=False warns about a difference instead.

    Raises: CheckpointError if the file is missing, unreadable or does not fit. The model is unchanged then.
    """
    file = Path(path)
    if not file.is_file():
        raise CheckpointError(f"path: no such file: {file}")
    if file.suffix == ".safetensors":
        state, layers, *_ = read_safetensors(file)
    else:
        state, layers = _read_torch(file), {}
    problems = []
    plain = plain_names(model)
    own = {plain(path): layer for path, layer in named_lora_layers(model)}
    layers = {plain_key(path, own): settings for path, settings in layers.items()}
    for layer_path, layer in own.items():
        saved = {"use_rslora": False} | layers[layer_path] if layer_path in layers else {}
        for name in ("rank", "alpha", "use_rslora"):
            mine = getattr(layer, name)
            if saved.get(name, mine) != mine:
                problems.append(
                    f"{layer_path}: {name} is {saved[name]} in the file, {mine} in the model"
                )
    raise_or_warn(file.name, problems, list(state), strict)
    return load_lora_state_dict(model, state, strict)


def _read_torch(file: Path) -> dict[str, Tensor]:
    try:
        state = read_torch(file)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: not a readable state dict: {error}") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{file}: expected a state dict, got {type(state).__name__}")
    return state
