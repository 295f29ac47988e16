"""A folder in PEFT's format ↔ `AdapterState`, without peft and without a model.

A folder holds `adapter_config.json` and `adapter_model.safetensors`, whose keys are `base_model.model.<path>.lora_A.weight` and
`….lora_B.weight`, under DoRA also `….lora_magnitude_vector`, for an embedding `….lora_embedding_A` and `….lora_embedding_B`,
and `base_model.model.<path>.<name>` for modules that are saved whole (`modules_to_save`).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fastlora.errors import CheckpointError, FastLoRAWarning
from fastlora.io.adapter_state import AdapterState
from fastlora.io.format import (
    PEFT_PREFIX,
    group_tensors,
    layer_states,
    read_safetensors,
    safetensors_bytes,
)
from fastlora.peft.config import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    PeftConfig,
    as_json,
    config_for,
    read_config,
)

# fastlora's names of an adapter's tensors -> PEFT's.
_EMBEDDING = {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}
_OTHER_KINDS = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "lora_magnitude": "lora_magnitude_vector",
}
_TO_FASTLORA = {peft: own for names in (_EMBEDDING, _OTHER_KINDS) for own, peft in names.items()}


def read_folder(folder: Path) -> AdapterState:
    """The adapter in a folder, without a model.

    A folder does not say of each layer whether its weight is stored transposed (fan_in_fan_out is one value for all, so
    `kind_known` is False), nor the dilation and padding mode of a convolution (taken to be the default, with a warning).

    Raises: CheckpointError if a file is missing or damaged, holds what fastlora does not support, or config and weights do
    not fit together.
    """
    config, tensors = read_tensors(folder)
    file = folder / WEIGHTS_FILE
    foreign = [key for key in tensors if not key.startswith(PEFT_PREFIX)]
    if foreign:
        raise CheckpointError(
            f"{file}: expected keys that start with {PEFT_PREFIX}, got {foreign[0]!r}"
        )
    plain = {key.removeprefix(PEFT_PREFIX): value for key, value in tensors.items()}
    layers, others = group_tensors(file, plain, _TO_FASTLORA)
    config.check_matching(layers)
    settings: dict[str, dict[str, Any]] = {}
    for path in layers:
        chosen = config.layer(path)
        names = ("rank", "alpha", "dropout", "use_rslora", "use_dora")
        settings[path] = {name: getattr(chosen, name) for name in names}
        if f"{path}.{_EMBEDDING['lora_A']}" in plain:
            settings[path] |= {"kind": "embedding", "dropout": 0.0}
    states = layer_states(file, layers, settings)
    for path, layer in states.items():
        if layer.kind == "conv":
            reason = why_peft_differs(layer.groups)
            if reason is not None:
                raise CheckpointError(f"{folder}: {path}: {reason}")
            plain_dilation = (1,) * (layer.lora_a.ndim - 2)
            states[path] = replace(layer, dilation=plain_dilation, padding_mode="zeros")
        if not layer.kind_known and config.fan_in_fan_out:
            states[path] = replace(layer, kind="transposed")
    unsure = [p for p, s in states.items() if s.kind == "conv" and s.lora_a[0, 0].numel() > 1]
    if unsure:
        warnings.warn(
            f"{folder}: {unsure[0]}: a PEFT folder does not hold the dilation and padding mode of a convolution; if they are "
            "not the default, what PEFT trained is no update of the weight, and fastlora computes something else",
            FastLoRAWarning,
            stacklevel=2,
        )
    return AdapterState(states, others, "peft")


def read_tensors(folder: Path) -> tuple[PeftConfig, dict[str, Tensor]]:
    """The config and the weights under PEFT's keys. Raises: CheckpointError if a file is missing or damaged."""
    config, file = read_config(folder / CONFIG_FILE), folder / WEIGHTS_FILE
    if not file.is_file():
        raise CheckpointError(f"folder: no such file: {file}; only safetensors are read")
    return config, read_safetensors(file)[0]


def peft_config(state: AdapterState, heads: list[str]) -> PeftConfig:
    """The config of a folder that holds `state`, the target a regex of the paths themselves, which means no other layers.

    Raises: CheckpointError naming what PEFT's format cannot hold. Warns if layers differ in dropout.
    """
    for path, layer in state.layers.items():
        if layer.kind != "conv":
            continue
        if layer.dilation is None or layer.padding_mode is None:
            raise CheckpointError(
                f"{path}: the file does not hold the convolution's dilation and padding mode, with some of which PEFT "
                "computes something else; load it with load_adapter and save it again"
            )
        reason = why_peft_differs(layer.groups, layer.dilation, layer.padding_mode)
        if reason is not None:
            raise CheckpointError(f"{path}: {reason}")
    if len({layer.use_dora for layer in state.layers.values()}) > 1:
        raise CheckpointError(
            "some layers have DoRA and some do not, which PEFT's format cannot hold"
        )
    # An embedding has no dropout, whatever the others have.
    dropouts = sorted({s.dropout for s in state.layers.values() if s.kind != "embedding"})
    if len(dropouts) > 1:
        warnings.warn(
            f"layers have the dropouts {dropouts}, PEFT's format holds one; {dropouts[-1]} is written",
            FastLoRAWarning,
            stacklevel=3,
        )
    return config_for(state.layers, heads)


def folder_files(
    folder: Path, state: AdapterState, config: PeftConfig, base_name: str | None = None
) -> dict[Path, bytes]:
    """The two files of a folder, by path. state: folded. base_name: the base model's name, if known."""
    tensors = {
        f"{PEFT_PREFIX}{path}.{peft_names(layer.kind)[name]}": tensor
        for path, layer in state.layers.items()
        for name, tensor in layer.tensors.items()
    } | {PEFT_PREFIX + name: tensor for name, tensor in state.others.items()}
    text = json.dumps(as_json(config, base_name), indent=2, sort_keys=True) + "\n"
    return {
        folder / WEIGHTS_FILE: safetensors_bytes(tensors, {"format": "pt"}),
        folder / CONFIG_FILE: text.encode(),
    }


def why_peft_differs(
    groups: int, dilation: Sequence[int] = (), padding_mode: str = "zeros"
) -> str | None:
    """Why PEFT computes something else with the adapter of such a convolution, or None if it does not."""
    differing = [f"groups={groups}"] if groups != 1 else []
    differing += [f"dilation={tuple(dilation)}"] if any(d != 1 for d in dilation) else []
    differing += [f"padding_mode={padding_mode}"] if padding_mode != "zeros" else []
    if not differing:
        return None
    return f"PEFT's adapter of a convolution with {', '.join(differing)} is no update of its weight"


def peft_names(kind: str) -> dict[str, str]:
    """fastlora's names of an adapter's tensors -> PEFT's, for a layer of this kind."""
    return _EMBEDDING if kind == "embedding" else _OTHER_KINDS
