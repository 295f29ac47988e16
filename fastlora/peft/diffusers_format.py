"""Safetensors files of diffusers' `save_lora_weights` and `save_lora_adapter` ↔ `AdapterState`.

Keys are `<path>.lora_A.weight` (R, K) and `<path>.lora_B.weight` (N, R), under DoRA also `<path>.lora_magnitude_vector`. The paths of a
pipeline's file begin with its model (`unet.`, `transformer.`, `text_encoder.`). The metadata `lora_adapter_metadata` holds the fields
of `adapter_config.json`, each with that prefix. Older files have `.lora.down.weight`, `.lora_linear_layer.down.weight` or
`.processor.to_q_lora.down.weight`, and `.up.` for B; some have alpha as `<path>.alpha`.

Source: diffusers.utils.state_dict_utils, diffusers.loaders.lora_base.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fastlora.errors import CheckpointError
from fastlora.io.adapter_state import AdapterState
from fastlora.io.foreign_formats import (
    Given,
    refuse_for_diffusion,
    scalars,
    states_with_alphas,
)
from fastlora.io.kohya_names import COMPONENTS, is_kohya
from fastlora.io.safetensors_format import group_tensors, safetensors_bytes
from fastlora.model.peft_rules import PeftConfig
from fastlora.peft.config import as_json, check_matching, config_of
from fastlora.peft.folder_format import peft_config

METADATA_KEY = "lora_adapter_metadata"
_NAMES = {"lora_A.weight": "lora_A", "lora_B.weight": "lora_B"}
_NAMES |= dict.fromkeys(("lora_magnitude_vector", "lora_magnitude_vector.weight"), "lora_magnitude")
_SIDES = {"down": "lora_A.weight", "up": "lora_B.weight"}
_OLDER = re.compile(r"\.(?:lora|lora_linear_layer)\.(down|up)\.weight$")
_ORIGINAL = re.compile(r"\.lora_(down|up)\.weight$")
_PROCESSOR = re.compile(r"(\.processor)?\.to_(q|k|v|out)_lora\.(down|up)\.weight$")
_ALPHA = ".alpha"


def read_diffusers(
    file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], given: Given
) -> AdapterState:
    """The adapter in diffusers' file, under the file's paths. Its other tensors are heads.

    alpha: of the metadata, or of the keys `<path>.alpha`; else the given one; else the rank, as in diffusers, with a warning.

    Raises: CheckpointError if the metadata is damaged, describes something that fastlora does not support, or does not fit the tensors;
    or if these do not fit together.
    """
    renamed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if is_kohya(key):
            raise CheckpointError(f"{file}: {key}: is a name of kohya's files, not of diffusers'")
        if renamed.setdefault(_renamed(key), tensor) is not tensor:
            raise CheckpointError(f"{file}: {_renamed(key)} is in the file under two names")
    stored = scalars(
        file,
        {key.removesuffix(_ALPHA): t for key, t in renamed.items() if key.endswith(_ALPHA)},
    )
    rest = {key: tensor for key, tensor in renamed.items() if not key.endswith(_ALPHA)}
    layers, others = group_tensors(file, rest, _NAMES)
    stray = stored.keys() - layers.keys()
    if stray:
        raise CheckpointError(f"{file}: {min(stray)} has alpha without lora_A and lora_B")
    configs = _configs(file, metadata, layers)
    settings: dict[str, dict[str, Any]] = {}
    for path in layers:
        for prefix, config in configs.items():
            if path.startswith(prefix):
                settings[path] = config.layer(path.removeprefix(prefix))
                stored.setdefault(path, settings[path].pop("alpha"))
    states = states_with_alphas(file, layers, stored, given, settings)
    return AdapterState(states, others, "diffusers")


def _renamed(key: str) -> str:
    """A key of an older file as it is in a new one."""
    for pattern in (_OLDER, _ORIGINAL):
        key = pattern.sub(lambda match: f".{_SIDES[match[1]]}", key)
    found = _PROCESSOR.search(key)
    if not found:
        return key
    name = f"to_{found[2]}"
    if not found[1] and ".self_attn." in key:  # of a text encoder
        name = f"{found[2]}_proj"
    elif name == "to_out":
        name = "to_out.0"
    return f"{key[: found.start()]}.{name}.{_SIDES[found[3]]}"


def _configs(
    file: Path, metadata: Mapping[str, str], paths: Mapping[str, Any]
) -> dict[str, PeftConfig]:
    """Prefix of the paths, as `unet.` → the config in the file's metadata; {} if it has none."""
    if METADATA_KEY not in metadata:
        return {}
    try:
        fields = json.loads(metadata[METADATA_KEY])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: damaged {METADATA_KEY}: {error!r}") from None
    if not isinstance(fields, dict):
        raise CheckpointError(
            f"{file}: {METADATA_KEY}: expected a JSON object, got {type(fields).__name__}"
        )
    by_prefix: dict[str, dict[str, Any]] = {}
    for name, value in fields.items():
        prefix, dot, field = name.rpartition(".")
        by_prefix.setdefault(prefix + dot, {})[field] = value
    configs = {}
    for prefix, raw in by_prefix.items():
        configs[prefix] = config_of({"peft_type": "LORA"} | raw, f"{file}: {METADATA_KEY}")
        inside = [p.removeprefix(prefix) for p in paths if p.startswith(prefix)]
        check_matching(configs[prefix], inside)
    return configs


def diffusers_bytes(state: AdapterState) -> bytes:
    """diffusers' file of a folded state, whose paths begin with a component of the pipeline, or all of them not.

    Raises: CheckpointError naming what the format cannot store. Warns as `peft_config`.
    """
    refuse_for_diffusion(state, "diffusers' files", dora=True)
    own = {name: name.partition(".")[0] for name in state.layers}
    inside = {path: name if name in COMPONENTS else "" for path, name in own.items()}
    if len(set(inside.values())) > 1 and "" in inside.values():
        odd = min(path for path, name in inside.items() if not name)
        raise CheckpointError(f"{odd}: begins with no model of a pipeline, while other paths do")
    fields: dict[str, Any] = {}
    for component in sorted(set(inside.values())):
        prefix = f"{component}." if component else ""
        layers = {
            path.removeprefix(prefix): layer
            for path, layer in state.layers.items()
            if inside[path] == component
        }
        config = peft_config(replace(state, layers=layers), [])
        fields |= {prefix + name: value for name, value in as_json(config).items()}
    ends = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
    ends["lora_magnitude"] = "lora_magnitude_vector"
    tensors = {
        f"{path}.{ends[name]}": tensor
        for path, layer in state.layers.items()
        for name, tensor in layer.tensors.items()
    }
    text = json.dumps(fields, indent=2, sort_keys=True)
    return safetensors_bytes(tensors, {"format": "pt", METADATA_KEY: text})
