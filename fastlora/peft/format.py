"""PEFT's folder format both ways, without peft: `save_pretrained` and `from_pretrained`.

A folder holds `adapter_config.json` and `adapter_model.safetensors`, whose keys are `base_model.model.<path>.lora_A.weight`,
`….lora_B.weight` (`….lora_embedding_A` and `_B` without `.weight` for an embedding, `….lora_magnitude_vector` besides under DoRA), and `base_model.model.<path>.<name>` for whole modules that train (`modules_to_save`). The rules by which
the config finds layers are PEFT's, not those of `inject_lora`.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.config import KINDS, LoRAConfig, scaling_divisor
from fastlora.errors import CheckpointError, FastLoRAWarning
from fastlora.files import write_files
from fastlora.io.checkpoint import (
    LoadResult,
    compare,
    read_safetensors,
    refuse_complex,
    safetensors_bytes,
)
from fastlora.layers.base import LoRALayer, named_lora_layers
from fastlora.layers.embedding import LoRAEmbedding
from fastlora.layers.kinds import kind_of, layer_class, why_unsuitable
from fastlora.model.adapter_registry import inactive_adapters
from fastlora.model.adapters import inject_as, list_adapters
from fastlora.model.inject import freeze_base_params, inject_lora
from fastlora.peft.config import (
    CONFIG_FILE,
    PREFIX,
    WEIGHTS_FILE,
    PeftConfig,
    as_json,
    base_modules,
    config_for,
    overlap,
    read_config,
)


def save_pretrained(
    model: nn.Module, folder: str | os.PathLike[str], include_trainable: bool = True
) -> None:
    """Write the adapters, and by default the trained heads, as a folder that PEFT and `from_pretrained` load.

    Layers may differ in rank, alpha and use_rslora; PEFT holds one dropout, so where layers differ the highest is written,
    with a warning. After PiSSA or OLoRA the start that is taken off is written as part of the adapter, which has twice the rank
    then: the folder goes with the base model as it was. Other files in the folder are left alone. Both files are written before the first takes its place.

    model: with adapters. folder: made if it is not there.
    include_trainable: also save every module that has a trained parameter of its own (`modules_to_save`), whole.

    Raises: CheckpointError if there is nothing to save, if a trained parameter cannot be said in this format (it belongs
    to an adapted layer or to the model itself), or if a file cannot be written.
    """
    layers = dict(named_lora_layers(model))
    if not layers:
        raise CheckpointError("model: has no adapters, so there is nothing to save")
    if "" in layers:
        raise CheckpointError(
            "model: is itself an adapted layer; PEFT's format needs it to have a name"
        )
    for path, layer in layers.items():
        reason = _why_peft_differs(layer.wrapped)
        if reason is not None:
            raise CheckpointError(f"model: {path}: {reason}; use save_adapter")
    _refuse_shared(model, layers.values())
    heads = _trained_modules(model, layers) if include_trainable else []
    config = _describe(model, layers, heads)
    state = {
        f"{PREFIX}{path}.{key}": tensor.detach()
        for path, layer in layers.items()
        for key, tensor in _saved_tensors(layer).items()
    }
    for path, module in config.heads(model).items():
        _refuse_adapted(path, layers)
        state |= {f"{PREFIX}{path}.{name}": v for name, v in module.state_dict().items()}
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"folder: cannot make {target}: {error}") from error
    text = json.dumps(as_json(config, model), indent=2, sort_keys=True) + "\n"
    weights = safetensors_bytes(state, {"format": "pt"})
    write_files({target / WEIGHTS_FILE: weights, target / CONFIG_FILE: text.encode()})


def from_pretrained(
    model: nn.Module, folder: str | os.PathLike[str], adapter: str | None = None
) -> LoadResult:
    """Give a plain `model` the adapters and heads of a folder in PEFT's format, in place.

    Afterwards the adapters and the saved heads train and everything else is frozen. Parameters of the base that the file
    holds besides (PEFT adds resized embeddings) are loaded too.

    model: without adapters. folder: as PEFT's or fastlora's `save_pretrained` writes it; only safetensors are read.
    adapter: a name, under which the folder is loaded beside the adapters that the model has, without activating it (`set_adapter`
        does). If it is the only one, heads in the file become the
        model's, whichever adapter is active later. If there are others, only the new adapter's parameters change, and heads or base parameters in the file are refused.
    Returns the keys that were loaded, as they stand in the file.

    Raises: CheckpointError if a file is missing or damaged, if the config asks for what fastlora does not do (biases,
    a PiSSA start, …, by name), or if names or shapes do not fit, with the nearest candidates. With `adapter`, also what
    `add_adapter` raises about the name and the active adapter. The model is unchanged then.
    """
    if adapter is None:
        return _load(model, folder, alone=True)
    alone = not list_adapters(model)
    with inject_as(model, adapter) as plain:
        return _load(plain, folder, alone)


def _load(model: nn.Module, folder: str | os.PathLike[str], alone: bool) -> LoadResult:
    """alone: whether the model has no other adapters, so that what the folder holds besides is the model's."""
    if any(True for _ in named_lora_layers(model)):
        raise CheckpointError(
            "model: already has adapters; load into the plain base model, or give adapter="
        )
    inactive = inactive_adapters(model)
    if inactive:
        raise CheckpointError(
            f"model: has the inactive adapters {', '.join(map(repr, inactive))}; give adapter="
        )
    meta = next((name for name, p in model.named_parameters() if p.is_meta), None)
    if meta is not None:
        raise CheckpointError(f"model: {meta} is on the meta device and cannot take a value")
    source = Path(folder)
    config = read_config(source / CONFIG_FILE)
    if not (source / WEIGHTS_FILE).is_file():
        raise CheckpointError(
            f"folder: no such file: {source / WEIGHTS_FILE}; only safetensors are read"
        )
    state, _ = read_safetensors(source / WEIGHTS_FILE)
    config.check_matching([path for path, _ in base_modules(model)])
    targets = config.targets(model)
    if not targets:
        raise CheckpointError(f"target_modules: {config.no_match(model)}")
    plan = {path: config.layer(path) for path in targets}
    reasons = {
        path: why_unsuitable(module, plan[path]) or _why_peft_differs(module)
        for path, module in targets.items()
    }
    refused = [f"{path}: {reason}" for path, reason in reasons.items() if reason is not None]
    if refused:
        raise CheckpointError("target_modules: cannot adapt " + "; ".join(refused[:3]))
    _refuse_shared(model, targets.values())
    heads = config.heads(model)
    for path in heads:
        both = overlap(path, plan)
        if both:
            raise CheckpointError(f"modules_to_save: {path} holds or is part of the target {both}")
    _check_keys(model, state, targets, plan, heads)
    _check_ties(model, state, heads)
    adapted = tuple(f"{PREFIX}{path}." for path in plan)
    besides = [key for key in state if not key.startswith(adapted)]
    if besides and not alone:
        raise CheckpointError(
            f"adapter: the file also holds {besides[0]}, which all adapters of the model would share; "
            "load it into a model of its own"
        )
    own = model.state_dict()
    refuse_complex({k.removeprefix(PREFIX): v for k, v in state.items()}, own)
    inject_lora(model, LoRAConfig(lambda path, _: plan.get(path, False), kinds=KINDS))
    if alone:
        freeze_base_params(model)
    for head in heads.values():
        head.requires_grad_(True)
    own = model.state_dict(keep_vars=True)
    for path, layer in named_lora_layers(model):
        names = _names(type(layer))
        own |= {f"{path}.{names[n]}": p for n, p in layer.lora_parameters().items()}
    with torch.no_grad():
        for key, value in state.items():
            own[key.removeprefix(PREFIX)].copy_(value)
    return LoadResult(list(state), [], [])


def _check_keys(
    model: nn.Module,
    state: Mapping[str, Tensor],
    targets: Mapping[str, nn.Module],
    plan: Mapping[str, LoRAConfig],
    heads: Mapping[str, nn.Module],
) -> None:
    shapes = {}
    for path, module in targets.items():
        kind = layer_class(module)
        names, (shape_a, shape_b) = _names(kind), kind.factor_shapes(module, plan[path].rank)
        shapes[f"{PREFIX}{path}.{names['lora_A']}"] = torch.Size(shape_a)
        shapes[f"{PREFIX}{path}.{names['lora_B']}"] = torch.Size(shape_b)
        if plan[path].use_dora:
            shapes[f"{PREFIX}{path}.{names['lora_magnitude']}"] = torch.Size(shape_b[:1])
    wanted = list(shapes)
    for path, head in heads.items():
        wanted += [f"{PREFIX}{path}.{name}" for name in head.state_dict()]
    adapted = tuple(f"{path}." for path in plan)
    for name, value in model.state_dict().items():
        if not name.startswith(adapted):
            shapes[PREFIX + name] = value.shape
    _, _, _, problems = compare(state, wanted, shapes)
    if problems:
        summary = f"{len(problems)} problems, nothing was changed:\n  "
        raise CheckpointError(
            f"{WEIGHTS_FILE} does not fit the model: {summary}" + "\n  ".join(problems)
        )


def _why_peft_differs(module: nn.Module) -> str | None:
    """Why an adapter of the same tensors computes something else in PEFT, or None if it does not."""
    if kind_of(module) != "conv":
        return None
    plain: dict[str, Any] = {"groups": 1, "padding_mode": "zeros"}
    plain["dilation"] = tuple(1 for _ in module.dilation)  # type: ignore[union-attr]
    others = [
        f"{name}={value}" for name in plain if (value := getattr(module, name)) != plain[name]
    ]
    if not others:
        return None
    return f"PEFT's adapter of a {type(module).__name__} with {', '.join(others)} is no update of its weight"


def _names(kind: type[LoRALayer]) -> dict[str, str]:
    """fastlora's names of an adapter's parameters -> those of PEFT's files."""
    if issubclass(kind, LoRAEmbedding):
        return {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}
    return {
        "lora_A": "lora_A.weight",
        "lora_B": "lora_B.weight",
        "lora_magnitude": "lora_magnitude_vector",
    }


def _saved_tensors(layer: LoRALayer) -> dict[str, Tensor]:
    """The adapter under PEFT's names, a start that is taken off being part of it."""
    made: dict[str, Tensor] = {**layer.lora_parameters()}
    made["lora_A"], made["lora_B"] = layer.factors()
    names = _names(type(layer))
    return {names[name]: tensor for name, tensor in made.items()}


def _as_config(layer: LoRALayer) -> LoRAConfig:
    """The rank and alpha of `_saved_tensors`, whose scaling is the layer's own."""
    rank = layer.factors()[0].shape[0]
    alpha = (
        layer.alpha
        if rank == layer.rank
        else layer.scaling * scaling_divisor(rank, layer.use_rslora)
    )
    return LoRAConfig(rank=rank, alpha=alpha, dropout=layer.dropout, use_rslora=layer.use_rslora)


def _check_ties(
    model: nn.Module, state: Mapping[str, Tensor], heads: Mapping[str, nn.Module]
) -> None:
    """A head that PEFT trained was cut loose from the parameters it was tied to; here it is still tied to them."""
    own = model.state_dict(keep_vars=True)
    names: dict[int, list[str]] = {}
    for name, tensor in own.items():
        names.setdefault(id(tensor), []).append(name)
    for path, head in heads.items():
        for name in (f"{path}.{key}" for key in head.state_dict()):
            for other in names[id(own[name])]:
                value = state.get(PREFIX + other)
                if other == name:
                    continue
                if value is None or not torch.equal(value, state[PREFIX + name]):
                    raise CheckpointError(
                        f"modules_to_save: {name} is tied to {other}, which the file gives another "
                        "value; untie them in the model first"
                    )


def _describe(model: nn.Module, layers: dict[str, LoRALayer], heads: list[str]) -> PeftConfig:
    """The config from which PEFT's rules find exactly these layers with these ranks and alphas."""
    use_dora = {layer.lora_magnitude is not None for layer in layers.values()}
    if len(use_dora) > 1:
        raise CheckpointError(
            "model: some layers have DoRA and some do not; PEFT's format cannot say that, use save_adapter"
        )
    settings = {path: _as_config(layer) for path, layer in layers.items()}
    # An embedding has no dropout, whatever the others have.
    dropouts = {
        layer.dropout for layer in layers.values() if not isinstance(layer, LoRAEmbedding)
    } or {0.0}
    if len(dropouts) > 1:
        warnings.warn(
            f"save_pretrained: layers have the dropouts {sorted(dropouts)}, PEFT's format holds one; "
            f"{max(dropouts)} is written",
            FastLoRAWarning,
            stacklevel=3,
        )
    names = sorted({path.rpartition(".")[2] for path in layers})
    regex = "|".join(re.escape(path) for path in layers)
    for targets in (names, sorted(layers), regex):
        config = replace(config_for(targets, settings, heads), use_dora=use_dora == {True})
        if config.targets(model).keys() == layers.keys():
            return config
    missed = layers.keys() - config.targets(model).keys()
    raise CheckpointError(
        f"model: {min(missed)} lies in a part of the model that is saved whole; "
        "PEFT's format cannot say that, use save_adapter"
    )


def _trained_modules(model: nn.Module, layers: Mapping[str, LoRALayer]) -> list[str]:
    """Paths of the modules that own a trained parameter besides the adapters, without those inside another of them."""
    adapters = {id(p) for layer in layers.values() for p in layer.lora_parameters().values()}
    owners: dict[str, None] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad or id(parameter) in adapters:
            continue
        owner = name.rpartition(".")[0]
        if not owner:
            raise CheckpointError(
                f"model: {name} trains and belongs to the model itself, which PEFT's format cannot "
                "say; use save_adapter"
            )
        _refuse_adapted(owner, layers)
        module = model.get_submodule(owner)
        if isinstance(module, (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)):
            raise CheckpointError(
                f"model: {name} trains and belongs to a {type(module).__name__}, which PEFT cannot "
                "save whole; use save_adapter"
            )
        owners[owner] = None
    return [p for p in owners if not any(p.startswith(f"{outer}.") for outer in owners)]


def _refuse_adapted(path: str, layers: Mapping[str, LoRALayer]) -> None:
    adapted = overlap(path, layers)
    if adapted:
        raise CheckpointError(
            f"model: {path} would be saved whole and holds or is part of the adapted {adapted}. "
            "PEFT's format has no biases or weights of adapted layers: freeze them (freeze_base_params, bias='none'), use "
            "include_trainable=False, or save_adapter"
        )


def _refuse_shared(model: nn.Module, modules: Iterable[nn.Module]) -> None:
    """A module under two names: PEFT adapts it under the first, fastlora under both."""
    wanted = {id(module) for module in modules}
    places: dict[int, str] = {}
    for path, parent in model.named_modules():
        for name, child in parent._modules.items():
            here = f"{path}.{name}".lstrip(".")
            if id(child) in wanted and places.setdefault(id(child), here) != here:
                raise CheckpointError(
                    f"model: {here} and {places[id(child)]} are one module; PEFT adapts it under one "
                    "of its names only"
                )
