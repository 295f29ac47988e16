"""`save_pretrained` and `from_pretrained`: save and load a model's adapters in PEFT's folder format, without peft.

The rules by which a folder's config finds layers are PEFT's, not those of `inject_lora`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.config import KINDS, LoRAConfig
from fastlora.errors import CheckpointError, ConfigError, FastLoRAWarning, first_few
from fastlora.io.adapter_file import LoadResult, match_keys, raise_or_warn
from fastlora.io.adapter_state import AdapterState, adapter_state
from fastlora.io.base_state import base_state_dict
from fastlora.io.safetensors_format import PEFT_PREFIX
from fastlora.layers.banks import ExpertBank
from fastlora.layers.base import LoRALayer, named_lora_layers
from fastlora.layers.experts import LoRAExperts
from fastlora.layers.kinds import kind_of, layer_class, why_unsuitable
from fastlora.layers.offload import execution_device
from fastlora.model.adapter_registry import (
    inactive_adapters,
    none_active,
    record_peft,
    recorded_peft,
)
from fastlora.model.adapters import inject_as, list_adapters
from fastlora.model.heads import head_tensors, record_heads, warn_of_changed_base
from fastlora.model.inject import freeze_base_params, inject_lora
from fastlora.model.peft_rules import TASK_TYPES, PeftConfig, base_modules
from fastlora.model.selection import attention_projections, fast_path_layers, nearest_names
from fastlora.model.sharded import copy_whole
from fastlora.model.wrappers import plain_names, unwrapped
from fastlora.peft.bank_format import from_peft, in_present_order
from fastlora.peft.config import WEIGHTS_FILE, check_matching, overlap
from fastlora.peft.folder_format import (
    PEFT_NAMES,
    heads_of,
    peft_config,
    read_tensors,
    why_peft_differs,
    write_folder,
)
from fastlora.peft.hub import local_folder
from fastlora.peft.ties import check_ties, refuse_tied_targets


def save_pretrained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    include_trainable: bool = True,
    *,
    task_type: str | None = None,
) -> None:
    """Write the adapters, and by default the trained heads, as a folder that PEFT and `from_pretrained` load.

    Layers may differ in rank, alpha and use_rslora. PEFT stores one dropout: if layers differ, the highest is written, with a
    warning. After PiSSA or OLoRA the subtracted initial product becomes part of the factors, whose rank doubles, so that the
    folder fits the unchanged base model. A model card, `README.md`, is added, so that the folder can be uploaded as it is; one that
    fastlora did not write, or that was changed since, is kept, like all other files. All files are written before the first is
    moved into place. Layers whose weight other code reads instead of calling them warn: in PEFT that weight is the base's. FSDP as in
    `get_lora_state_dict`.

    model: with adapters. folder: created if missing.
    include_trainable: also save in full every module with a head, as in `get_lora_state_dict` (`modules_to_save`).
    task_type: PEFT's name for what the model is used for, such as "CAUSAL_LM". None means that of the `LoraConfig` or the folder from
        which the adapter came. If there is none, the class of the model is written, from which `peft.AutoPeftModel` builds the base.

    Raises: CheckpointError if there is nothing to save, if the format cannot store a layer or a trained parameter (one that
    belongs to an adapted layer or to the model itself), or if a file cannot be written.
    """
    if task_type is not None and task_type not in TASK_TYPES:
        raise ConfigError(
            f"task_type: expected one of {', '.join(TASK_TYPES)} or None, got {task_type!r}"
        )
    files = peft_folder(model, include_trainable, task_type=task_type)
    warn_of_changed_base(model, "save_pretrained", files.whole)
    _warn_of_reads(model)
    files.write(Path(folder))


@dataclass(frozen=True, eq=False)
class PeftFolder:
    """What a PEFT folder holds. whole: the modules that are saved in full."""

    state: AdapterState
    config: PeftConfig
    whole: list[nn.Module]

    def write(self, folder: Path) -> None:
        """Write the files. Raises: CheckpointError if one cannot be written."""
        write_folder(folder, self.state, self.config)


def peft_folder(
    model: nn.Module,
    include_trainable: bool = True,
    values: Mapping[str, Tensor] | None = None,
    task_type: str | None = None,
) -> PeftFolder:
    """The PEFT folder of the model's adapters and heads.

    values: a state dict of the model, to take the tensors from instead of the model. Without it, under FSDP2 every process must call it.

    Raises: as `save_pretrained`.
    """
    plain = plain_names(model)
    layers = {plain(path): layer for path, layer in named_lora_layers(model)}
    if not layers:
        raise CheckpointError(f"{none_active(model)}, so there is nothing to save")
    _refuse_shared(model, layers.values())
    given = {plain(key): value for key, value in (values or {}).items()}
    state = adapter_state(model).replaced(given).whole().folded()
    heads: dict[str, Tensor] = {}
    try:
        trained = _trained_modules(model, layers) if include_trainable else []
        config = peft_config(state, trained)
        whole = config.heads(model)
        for path, module in whole.items():
            heads |= {f"{path}.{name}": value for name, value in module.state_dict().items()}
        heads_of(heads, layers)  # PEFT's rule for heads may find more than the trained ones
        config = _with_short_targets(model, config, layers)
    except CheckpointError as error:
        raise CheckpointError(f"model: {error}; use save_adapter") from None
    config = replace(config, **_about_the_base(unwrapped(model), task_type))
    state = replace(state, others=heads).replaced(given).whole()
    return PeftFolder(state, config, list(whole.values()))


def _about_the_base(model: nn.Module, task_type: str | None) -> dict[str, Any]:
    """The fields that say how PEFT builds the base model: like PEFT, its class unless the task is known, and its name or path."""
    recorded = recorded_peft(model)
    names = [getattr(model, "name_or_path", None)]
    names += [getattr(getattr(model, "config", None), "_name_or_path", None)]  # diffusers
    names += [recorded.get("base_model_name_or_path")]
    found = (os.fspath(name) for name in names if isinstance(name, (str, os.PathLike)))
    name = next((name for name in found if name), None)
    task = task_type or recorded.get("task_type")
    # FSDP and parametrizations replace the class by one of torch that is derived from it.
    kinds = [kind for kind in type(model).__mro__ if issubclass(kind, nn.Module)]
    own = next((kind for kind in kinds if not kind.__module__.startswith("torch.")), kinds[0])
    mapping = {"base_model_class": own.__name__, "parent_library": own.__module__}
    same = name == recorded.get("base_model_name_or_path")
    return {
        "task_type": task,
        "auto_mapping": mapping if task is None else None,
        "base_model_name_or_path": name,
        "revision": recorded.get("revision") if same else None,
    }


def from_pretrained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    adapter: str | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    subfolder: str | None = None,
) -> LoadResult:
    """Load the adapters and heads of a folder in PEFT's format into a plain `model`, in place.

    Afterwards the adapters and the saved heads train and everything else is frozen; the heads are saved again with the adapters, whether they
    still train or not. Parameters of the base in the file (such as resized embeddings) are loaded too.

    model: without adapters. folder: as PEFT's or fastlora's `save_pretrained` writes it, or the id "organisation/name" of a repository on the Hugging
        Face Hub that holds such a folder, which needs huggingface_hub; only safetensors are read. A local folder of that name wins.
    adapter: load the folder as one of several adapters under this name, without activating it (`set_adapter` does). If the
        model has no other adapter, the heads in the file are loaded too and stay, whichever adapter is active later. Otherwise
        only the new adapter's parameters change, and heads or base parameters in the file are refused.
    revision, token, cache_dir: for the Hub, as in `huggingface_hub.hf_hub_download`. subfolder: of the folder or repository.
    Returns the keys that were loaded, as in the file.

    Raises: CheckpointError if a file is missing or damaged, if fastlora saved the weights with another config, if the config names
    something that fastlora does not support (biases, init_lora_weights='pissa', …), or if names or shapes do not fit, with the
    nearest candidates. With `adapter`, also as `add_adapter`. The model is unchanged then.
    """
    path = local_folder(
        folder, revision=revision, token=token, cache_dir=cache_dir, subfolder=subfolder
    )
    if adapter is None:
        return _load(model, path, alone=True)
    alone = not list_adapters(model)
    with inject_as(model, adapter) as plain:
        return _load(plain, path, alone)


def _load(model: nn.Module, folder: Path, alone: bool) -> LoadResult:
    """alone: whether the model has no other adapters, so that heads and base parameters in the folder become the model's."""
    if dict(named_lora_layers(model)):
        raise CheckpointError(
            'model: already has adapters; load into the plain base model, or pass adapter="name"'
        )
    inactive = inactive_adapters(model)
    if inactive:
        raise CheckpointError(
            f'model: has the inactive adapters {", ".join(map(repr, inactive))}; pass adapter="name"'
        )
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and execution_device(module, name).type == "meta":
                where = f"{path}.{name}".lstrip(".")
                raise CheckpointError(
                    f"model: {where} is on the meta device and cannot store a value"
                )
    config, tensors, _ = read_tensors(folder)
    check_matching(config, [path for path, _ in base_modules(model)])
    files, targets = list(tensors), config.targets(model) | config.banks(model)
    layer_configs = {path: LoRAConfig(**config.layer(path)) for path in targets}
    _check_targets(model, config, targets, layer_configs)
    tensors = in_present_order(from_peft(config, tensors), targets)
    if config.ensure_weight_tying:
        refuse_tied_targets(model, targets)
    heads = config.heads(model)
    for path in heads:
        adapted = overlap(path, layer_configs)
        if adapted:
            raise CheckpointError(
                f"modules_to_save: {path} contains or is part of the target {adapted}"
            )
    plain = plain_names(model)
    own = {plain(name): value for name, value in model.state_dict().items()}
    keys = _check_keys(own, tensors, targets, layer_configs, heads)
    # PEFT also writes the weight of an adapted output head or embedding.
    bases = {
        f"{PEFT_PREFIX}{path}.base_layer.{name}": f"{path}.{name}"
        for path, module in targets.items()
        for name in module.state_dict()
    }
    check_ties(model, tensors, heads, bases)
    # PEFT writes the weight of an adapted head or embedding even if it did not change.
    unchanged = {k for k, n in bases.items() if k in tensors and torch.equal(own[n], tensors[k])}
    others = [key for key in tensors if key not in keys and key not in unchanged]
    if others and not alone:
        raise CheckpointError(
            f"adapter: the file also holds {others[0]}, which all adapters of the model would share; "
            "load it into a separate model"
        )
    chosen = LoRAConfig(lambda path, _: layer_configs.get(plain(path), False), kinds=KINDS)
    inject_lora(model, chosen)
    origin = {n: getattr(config, n) for n in ("task_type", "base_model_name_or_path", "revision")}
    record_peft(unwrapped(model), origin)
    record_heads(model, [p for head in heads.values() for p in head.parameters()])
    now = base_state_dict(model) | adapter_state(model).tensors()
    for key, value in tensors.items():
        copy_whole(now[keys.get(key) or bases.get(key) or key.removeprefix(PEFT_PREFIX)], value)
    if alone:
        freeze_base_params(model)
    return LoadResult(files, [], [])


def _check_targets(
    model: nn.Module, config: PeftConfig, targets: Mapping[str, Any], configs: dict[str, LoRAConfig]
) -> None:
    """Raises: CheckpointError if there are no targets, or one cannot be adapted or has a different output in PEFT."""
    foreign = config.other_parameters(model)
    if foreign:
        raise CheckpointError(
            f"target_parameters: {foreign[0]} is no bank of experts that fastlora adapts"
        )
    if not targets:
        wanted = config.target_modules or config.target_parameters or ""
        paths = [path for path, module in model.named_modules() if kind_of(module) is not None]
        first = wanted if isinstance(wanted, str) else wanted[0]
        raise CheckpointError(
            f"target_modules: {wanted!r} matches no layer of the model{nearest_names(first, paths)}"
        )
    refused = []
    for path, module in targets.items():
        reason = why_unsuitable(module, configs[path])
        if reason is None and kind_of(module) == "conv":
            reason = why_peft_differs(module.groups, module.dilation, module.padding_mode)
        refused += [f"{path}: {reason}"] if reason is not None else []
    if refused:
        raise CheckpointError("target_modules: cannot adapt " + "; ".join(refused[:3]))
    _refuse_shared(model, targets.values())


def _check_keys(
    base: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    targets: Mapping[str, nn.Module],
    layer_configs: Mapping[str, LoRAConfig],
    heads: Mapping[str, nn.Module],
) -> dict[str, str]:
    """Key in the file -> key in the adapted model, for the tensors of the adapters.

    Raises: CheckpointError if a tensor is missing, unexpected or wrongly shaped.
    """
    known: dict[str, Tensor | torch.Size] = {}
    keys = {}
    for path, chosen in layer_configs.items():
        module = targets[path]
        kind = layer_class(module)
        shape_a, shape_b = kind.factor_shapes(module, chosen.rank)
        shapes = {"lora_A": shape_a, "lora_B": shape_b}
        if chosen.use_dora:
            shapes["lora_magnitude"] = shape_b[:1]
        for name, shape in shapes.items():
            key = f"{PEFT_PREFIX}{path}.{PEFT_NAMES[kind.kind][name]}"
            known[key], keys[key] = torch.Size(shape), f"{path}.{name}"
    required = list(known)
    for path, head in heads.items():
        required += [f"{PEFT_PREFIX}{path}.{name}" for name in head.state_dict()]
    adapted = tuple(f"{path}." for path in layer_configs)
    for name, value in base.items():
        if not name.startswith(adapted) and name not in layer_configs:
            known[PEFT_PREFIX + name] = value
    for path, module in targets.items():
        for name, value in module.state_dict().items():
            if not isinstance(module, ExpertBank):  # whose weight PEFT never writes
                known[f"{PEFT_PREFIX}{path}.base_layer.{name}"] = value
    result, problems = match_keys(tensors, required, known)
    raise_or_warn(WEIGHTS_FILE, problems, result.loaded, strict=True)
    return keys


def _with_short_targets(
    model: nn.Module, config: PeftConfig, layers: Mapping[str, LoRALayer]
) -> PeftConfig:
    """The config with the shortest targets by which PEFT's rules find exactly these layers: names, paths, or a regex of paths."""
    banks = {path for path, layer in layers.items() if isinstance(layer, LoRAExperts)}
    if banks:
        short = sorted({".".join(path.split(".")[-2:]) for path in banks})
        shorter = replace(config, target_parameters=short)
        if {name for name in base_state_dict(model) if shorter.names_parameter(name)} == banks:
            config = shorter
    wanted = layers.keys() - banks
    names = sorted({path.rpartition(".")[2] for path in wanted})
    for targets in (names, sorted(wanted), config.target_modules):
        chosen = replace(config, target_modules=targets)
        if chosen.targets(model).keys() == wanted:
            return chosen
    missed = wanted - config.targets(model).keys()
    raise CheckpointError(
        f"{min(missed)} is inside a module that is saved in full, which PEFT's format cannot store"
    )


def _trained_modules(model: nn.Module, layers: Mapping[str, LoRALayer]) -> list[str]:
    """Paths of the modules that own a head or a buffer of one, without those inside another of them."""
    plain = plain_names(model)
    heads = heads_of(map(plain, head_tensors(model)), layers)
    modules = {plain(path): m for path, m in model.named_modules(remove_duplicate=False)}
    for path in heads:
        module = unwrapped(modules[path])
        if isinstance(module, (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)):
            raise CheckpointError(
                f"{path} trains and is a {type(module).__name__}, which PEFT cannot save in full"
            )
    return heads


def _warn_of_reads(model: nn.Module) -> None:
    """Warn of layers whose weight other code reads instead of calling them: in PEFT that weight is the base's."""
    plain = plain_names(model)
    layers = {plain(path): layer for path, layer in named_lora_layers(model)}
    known = attention_projections(model) | fast_path_layers(model)
    read = [path for path, layer in layers.items() if layer in known or layer.only_read]
    if read:
        warnings.warn(
            f"save_pretrained: PEFT computes the base model at {first_few(read)}: other code reads the weight of these layers, "
            "in PEFT the base's, and was not seen to call them (as nn.MultiheadAttention, and in eval mode nn.TransformerEncoderLayer). "
            "fastlora.from_pretrained loads the folder correctly; for PEFT, merge the adapters and save the model",
            FastLoRAWarning,
            stacklevel=3,
        )


def _refuse_shared(model: nn.Module, modules: Iterable[nn.Module]) -> None:
    """Raises: CheckpointError for a module under two names: PEFT adapts it under the first, fastlora under both."""
    wanted = {id(module) for module in modules}
    places: dict[int, str] = {}
    for path, parent in model.named_modules():
        for name, child in parent._modules.items():
            here = f"{path}.{name}".lstrip(".")
            if id(child) in wanted and places.setdefault(id(child), here) != here:
                raise CheckpointError(
                    f"model: {here} and {places[id(child)]} are one module, which PEFT would adapt under one name only"
                )
