"""A folder in PEFT's format ↔ `AdapterState`, without peft and without a model.

A folder holds a model card, `adapter_config.json` and `adapter_model.safetensors`, whose keys are `base_model.model.<path>.lora_A.weight` and
`….lora_B.weight`, under DoRA also `….lora_magnitude_vector`, for an embedding `….lora_embedding_A` and `….lora_embedding_B`,
and `base_model.model.<path>.<name>` for modules that are saved in full (`modules_to_save`). In fastlora's folders the metadata of
the weights repeats each layer's settings, which tells whether the config beside them was saved with them.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mode
from typing import Any

from torch import Tensor

from fastlora.config import scaling_divisor
from fastlora.errors import CheckpointError, FastLoRAWarning
from fastlora.files import Content, write_files
from fastlora.io.adapter_state import BANKS, PLACES, AdapterState, LayerState
from fastlora.io.safetensors_format import (
    PEFT_PREFIX,
    group_tensors,
    layer_states,
    read_safetensors,
    safetensors_bytes,
    settings_metadata,
)
from fastlora.layers.banks import PROJECTIONS
from fastlora.model.peft_rules import PeftConfig
from fastlora.peft.bank_format import from_peft, to_peft
from fastlora.peft.config import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    as_json,
    check_matching,
    overlap,
    read_config,
)
from fastlora.peft.model_card import CARD_FILE, may_replace, model_card

# kind of layer -> fastlora's names of its tensors -> PEFT's.
_EMBEDDING = {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}
_LINEAR = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
_LINEAR["lora_magnitude"] = "lora_magnitude_vector"
PEFT_NAMES = dict.fromkeys(("linear", "transposed", "conv", *BANKS), _LINEAR) | {
    "embedding": _EMBEDDING
}
_ADVICE = (
    "; freeze the parameter (freeze_base_params, bias='none') or save with include_trainable=False"
)
_TO_FASTLORA = {peft: own for names in (_EMBEDDING, _LINEAR) for own, peft in names.items()}


def read_folder(folder: Path) -> AdapterState:
    """The adapter in a folder, without a model.

    A folder has one fan_in_fan_out for all layers, so whether a weight is stored transposed is known only if they do not differ. It
    does not store the dilation and padding mode of a convolution: the defaults are assumed, with a warning.

    Raises: CheckpointError if a file is missing, damaged or not supported by fastlora, or config and weights do not fit
    together.
    """
    config, tensors, places = read_tensors(folder)
    file = folder / WEIGHTS_FILE
    foreign = [key for key in tensors if not key.startswith(PEFT_PREFIX)]
    if foreign:
        raise CheckpointError(
            f"{file}: expected keys that start with {PEFT_PREFIX}, got {foreign[0]!r}"
        )
    tensors = from_peft(config, tensors)
    plain = {key.removeprefix(PEFT_PREFIX): value for key, value in tensors.items()}
    # PEFT also writes the weight of an adapted output head or embedding, which replaces the base's.
    plain = {key.replace(".base_layer.", "."): value for key, value in plain.items()}
    layers, others = group_tensors(file, plain, _TO_FASTLORA)
    check_matching(config, layers)
    if config.ensure_weight_tying and any("lora_embedding_A" in key for key in plain):
        raise CheckpointError(
            f"{folder}: ensure_weight_tying with an adapted embedding is not supported by fastlora"
        )
    settings: dict[str, dict[str, Any]] = {}
    for path, found in layers.items():
        settings[path], sizes = config.layer(path), found["lora_A"].ndim - 2
        settings[path] |= places.get(path, {})
        if f"{path}.{_EMBEDDING['lora_A']}" in plain:
            settings[path] |= {"kind": "embedding", "dropout": 0.0}
        elif config.names_parameter(path):
            settings[path]["kind"] = "experts"
        elif sizes:
            settings[path] |= {"dilation": [1] * sizes, "padding_mode": "zeros"}
        elif config.fan_in_fan_out:
            settings[path]["kind"] = "transposed"
    states = layer_states(file, layers, settings)
    convolutions = {path: layer for path, layer in states.items() if layer.kind == "conv"}
    for path, layer in convolutions.items():
        reason = why_peft_differs(layer.groups, layer.dilation, layer.padding_mode)
        if reason is not None:
            raise CheckpointError(f"{folder}: {path}: {reason}")
    unsure = [path for path, layer in convolutions.items() if layer.lora_a[0, 0].numel() > 1]
    if unsure:
        warnings.warn(
            f"{folder}: {unsure[0]}: a PEFT folder does not store the dilation and padding mode of a convolution; if they are "
            "not the default, what PEFT trained is not an update of the weight, and fastlora's output differs",
            FastLoRAWarning,
            stacklevel=2,
        )
    for path, layer in states.items():
        if f"{path}.weight" in others:
            wrapped = (
                "original_linear" if layer.kind in ("linear", "transposed") else "original_layer"
            )
            others[f"{path}.{wrapped}.weight"] = others.pop(f"{path}.weight")
    return AdapterState(states, others, "peft")


def read_tensors(folder: Path) -> tuple[PeftConfig, dict[str, Tensor], dict[str, dict[str, Any]]]:
    """The config, the weights under PEFT's keys, and `LayerState.places` by path, which only fastlora's folders have.

    Raises: CheckpointError if a file is missing or damaged, or if fastlora saved the weights with another config.
    """
    config, file = read_config(folder / CONFIG_FILE), folder / WEIGHTS_FILE
    if not file.is_file():
        raise CheckpointError(f"folder: no such file: {file}; only safetensors are read")
    tensors, saved_with, *_ = read_safetensors(file)
    check_matching(config, saved_with)
    places = {}
    for path, settings in saved_with.items():
        places[path] = {name: settings.pop(name) for name in PLACES if name in settings}
        now = _settings(config, path)
        changed = [n for n in now.keys() | settings.keys() if now.get(n) != settings.get(n)]
        if changed:
            name = min(changed)
            raise CheckpointError(
                f"{folder}: {CONFIG_FILE} and {WEIGHTS_FILE} are not of the same save: {path}: {name} is {now.get(name)!r} in "
                f"the config, and the weights were saved with {settings.get(name)!r}; restore both files, or save again"
            )
    return config, tensors, places


def _settings(config: PeftConfig, path: str) -> dict[str, Any]:
    """What the config says about the layer at `path` and about all layers, as JSON values."""
    shared = {name: getattr(config, name) for name in ("fan_in_fan_out", "modules_to_save")}
    return config.layer(path) | shared


def heads_of(names: Iterable[str], adapted: Iterable[str]) -> list[str]:
    """Paths of the modules that own these parameters, without those inside another of them; PEFT's format saves them in full.

    Raises: CheckpointError if one is the model itself, or is, contains or is part of an adapted layer.
    """
    owners: dict[str, None] = {}
    for name in names:
        owner = name.rpartition(".")[0]
        layer = overlap(owner, adapted) if owner else None
        if not owner or layer:
            raise CheckpointError(
                f"{name} belongs to {owner or 'the model itself'}, which PEFT's format cannot store"
                + (f": it contains or is part of the adapted {layer}{_ADVICE}" if layer else "")
            )
        owners[owner] = None
    return [path for path in owners if not any(path.startswith(f"{p}.") for p in owners)]


def peft_config(state: AdapterState, heads: list[str]) -> PeftConfig:
    """The config of a folder with `state`; its target is a regex of exactly these paths.

    state: folded. heads: paths of the modules that are saved in full.

    Raises: CheckpointError naming what PEFT's format cannot store. Warns if layers differ in dropout; the highest is written.
    """
    layers = state.layers
    if "" in layers:
        raise CheckpointError(
            "the model itself is the adapted layer; PEFT's format needs it to have a name"
        )
    for path, layer in layers.items():
        if layer.shared_with:
            raise CheckpointError(
                f"{layer.shared_with[0]} and {path} are one module, which PEFT would adapt under one name only"
            )
        if layer.kind == "conv":
            reason = why_peft_differs(layer.groups, layer.dilation, layer.padding_mode)
            if reason is not None:
                raise CheckpointError(f"{path}: {reason}")
    banks = _banks(layers)
    use_dora = {layer.use_dora for layer in layers.values()}
    if len(use_dora) > 1:
        raise CheckpointError(
            "some layers have DoRA and some do not, which PEFT's format cannot store"
        )
    # An embedding has no dropout even if the other layers do.
    dropouts = sorted({s.dropout for s in layers.values() if s.kind != "embedding"}) or [0.0]
    if banks and dropouts != [0.0]:
        warnings.warn(
            f"layers have the dropouts {dropouts}, and PEFT allows none with experts; 0 is written",
            FastLoRAWarning,
            stacklevel=3,
        )
        dropouts = [0.0]
    if len(dropouts) > 1:
        warnings.warn(
            f"layers have the dropouts {dropouts}, PEFT's format stores one; {dropouts[-1]} is written",
            FastLoRAWarning,
            stacklevel=3,
        )
    use_rslora = all(layer.use_rslora for layer in layers.values())

    def alpha_of(layer: LayerState) -> float:
        """alpha under the divisor that all layers of the config share."""
        if layer.alpha is not None and layer.use_rslora == use_rslora:
            return layer.alpha
        return layer.scaling * scaling_divisor(layer.rank, use_rslora)

    alphas = {path: alpha_of(layer) for path, layer in layers.items()}
    ranks = {path: layer.rank for path, layer in layers.items()}
    rank, alpha = mode(ranks.values()), mode(alphas.values())
    others = [path for path in layers if path not in banks]
    return PeftConfig(
        "|".join(map(re.escape, others)) if others else [],
        banks or None,
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropouts[-1],
        use_rslora=use_rslora,
        use_dora=use_dora == {True},
        fan_in_fan_out=any(layer.kind == "transposed" for layer in layers.values()),
        modules_to_save=heads or None,
        rank_pattern={f"^{re.escape(p)}": r for p, r in ranks.items() if r != rank},
        alpha_pattern={f"^{re.escape(p)}": a for p, a in alphas.items() if a != alpha},
    )


def _banks(layers: Mapping[str, LayerState]) -> list[str]:
    """The paths of the banks of experts. Raises: CheckpointError for one that PEFT's format cannot store."""
    banks = [path for path, layer in layers.items() if layer.kind in BANKS]
    for path in banks:
        owner, _, name = path.rpartition(".")
        if not owner or name not in PROJECTIONS:
            raise CheckpointError(
                f"{path}: is a bank of experts that PEFT's target_parameters cannot name"
            )
        if layers[path].use_dora:
            raise CheckpointError(f"{path}: is a bank of experts, for which PEFT has no DoRA")
    return banks


def write_folder(folder: Path, state: AdapterState, config: PeftConfig) -> None:
    """Write the files of a folder, which is created if missing. A model card that fastlora did not write, or that was changed, is kept.

    Raises: CheckpointError if the folder or a file cannot be written; no file has changed then.
    """
    tensors = {
        f"{PEFT_PREFIX}{path}.{PEFT_NAMES[layer.kind][name]}": tensor
        for path, layer in state.layers.items()
        for name, tensor in layer.tensors.items()
    }
    for name, tensor in state.others.items():
        inside = state.base_name(name) != name
        key = (
            f"{state.base_name(name).removesuffix('.weight')}.base_layer.weight" if inside else name
        )
        tensors[PEFT_PREFIX + key] = tensor
    tensors = to_peft(tensors, [p for p, layer in state.layers.items() if layer.kind in BANKS])
    text = json.dumps(as_json(config), indent=2, sort_keys=True) + "\n"
    # The weights are moved first: the new ones know whether the config is the old one.
    metadata = settings_metadata(
        {path: _settings(config, path) | layer.places() for path, layer in state.layers.items()}
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"folder: cannot create {folder}: {error}") from error
    contents: dict[Path, Content] = {
        folder / WEIGHTS_FILE: safetensors_bytes(tensors, metadata),
        folder / CONFIG_FILE: text.encode(),
    }
    card = folder / CARD_FILE
    try:
        replaced = may_replace(card)
    except OSError as error:
        raise CheckpointError(f"folder: cannot read {card}: {error}") from error
    if replaced:
        contents[card] = model_card(config)
    write_files(contents)


def why_peft_differs(
    groups: int, dilation: Sequence[int] | None, padding_mode: str | None
) -> str | None:
    """Why the output of PEFT with the adapter of such a convolution differs, or None if it does not. Arguments: None if unknown."""
    if dilation is None or padding_mode is None:
        return (
            "the file does not store the convolution's dilation and padding mode, on which it depends whether PEFT's "
            "output is the same; load it with load_adapter and save it again"
        )
    differing = [f"groups={groups}"] if groups != 1 else []
    differing += [f"dilation={tuple(dilation)}"] if any(d != 1 for d in dilation) else []
    differing += [f"padding_mode={padding_mode}"] if padding_mode != "zeros" else []
    if not differing:
        return None
    return f"PEFT's adapter of a convolution with {', '.join(differing)} is not an update of its weight"
