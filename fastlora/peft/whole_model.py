"""`save_pretrained` of a transformers model with adapters: the whole model, with the adapters beside it as a PEFT folder.

The weights have the keys of the model without adapters, so `AutoModel.from_pretrained` finds them, and loads the adapters with PEFT. The
adapters' own tensors are in the file of weights too: from it transformers' Trainer resumes and restores its best model.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fastlora.errors import CheckpointError, ConfigError, FastLoRAWarning
from fastlora.files import write_files
from fastlora.io.adapter_state import adapter_state
from fastlora.io.safetensors_format import fastlora_bytes
from fastlora.layers.base import ADAPTER_TENSORS, named_lora_layers
from fastlora.layers.experts import LoRAExperts
from fastlora.model.adapter_registry import why_not_one
from fastlora.model.heads import adapter_parameters
from fastlora.model.pretrained import METHODS, plain_layers
from fastlora.model.sharded import in_parts
from fastlora.model.wrappers import plain_names
from fastlora.peft.pretrained import PeftFolder, peft_folder

# Attribute of a model while `FastLoRACallback` trains it: its checkpoints hold the adapters alone.
ADAPTERS_ONLY = "_fastlora_adapters_only"


def save_whole_model(
    model: Any,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: Mapping[str, Any] | None = None,
    push_to_hub: bool = False,
    **kwargs: Any,
) -> None:
    """What `model.save_pretrained` does while the model has adapters; arguments as in transformers.

    While it runs, the wrapped layers are in the places of the adapted ones, so the model must not be called in another thread.
    state_dict: of the model with adapters, as the Trainer passes it under FSDP; the adapters are then taken from it.

    Warns if the adapters cannot be stored in PEFT's format; then only the Trainer and `load_state_dict` load them.
    Raises: ConfigError for push_to_hub. CheckpointError if several adapters are active or a file of the adapters cannot be written.
    """
    if push_to_hub:
        raise ConfigError(
            "push_to_hub: would upload the model without its adapters; call model.push_to_hub(repo_id), which uploads both"
        )
    several = why_not_one(model)
    if several is not None:
        raise CheckpointError(several)
    folder = _adapter_folder(model, state_dict)
    if model.__dict__.get(ADAPTERS_ONLY):
        if is_main_process:
            _save_adapters(model, Path(save_directory), folder, state_dict)
        return
    plain = plain_names(model)
    layers = list(named_lora_layers(model, remove_duplicate=False))
    adapters = {
        f"{path}.{name}": tensor.detach()
        for path, layer in layers
        for name in ADAPTER_TENSORS
        if (tensor := getattr(layer, name)) is not None
    }
    if state_dict is not None:
        wrapped = {
            f"{plain(path)}.{layer.wrapped_name}.weight": plain(path)
            for path, layer in layers
            if isinstance(layer, LoRAExperts)
        } | {f"{plain(path)}.{layer.wrapped_name}.": f"{plain(path)}." for path, layer in layers}
        state_dict = {_base_key(key, wrapped): value for key, value in state_dict.items()}
    with plain_layers(model):
        # A hook, because some quantisers of transformers take the state dict themselves.
        hook = model.register_state_dict_post_hook(
            lambda module, state, prefix, metadata: state.update(
                {prefix + name: tensor for name, tensor in adapters.items()}
            )
        )
        try:
            type(model).save_pretrained(
                model, save_directory, is_main_process, state_dict, **kwargs
            )
        finally:
            hook.remove()
    if folder is not None and is_main_process:
        folder.write(Path(save_directory))


def _adapter_folder(model: nn.Module, values: Mapping[str, Any] | None) -> PeftFolder | None:
    """The files of the adapters, without what PEFT's format cannot store, which warns. Under FSDP2 a collective without `values`."""
    problem, left = None, "loads the adapters without them into another base model"
    if values is not None and in_parts(model, adapter_parameters(model)):
        problem = "FSDP1 shards the model, and this process holds only parts"
        include: tuple[bool, ...] = ()
    else:
        include = (True, False)
    folder = None
    for include_trainable in include:
        try:
            folder = peft_folder(model, include_trainable, values)
            break
        except CheckpointError as error:
            problem = problem or str(error).removesuffix("; use save_adapter")
    if folder is None:
        left = "loads only the base model; save fastlora.merged_model(model) for AutoModel"
    if problem is not None:
        warnings.warn(
            f"save_pretrained: {problem}. The whole model is saved, for the Trainer and load_state_dict, but PEFT {left}",
            FastLoRAWarning,
            stacklevel=4,
        )
    return folder


def _save_adapters(
    model: nn.Module, path: Path, folder: PeftFolder | None, values: Mapping[str, Any] | None
) -> None:
    """The files of the adapters, and one of their tensors, and the heads', under their own names, for the Trainer."""
    state = adapter_state(model, include_trainable=True).replaced(values or {})
    path.mkdir(parents=True, exist_ok=True)
    write_files({path / "model.safetensors": fastlora_bytes(state.whole())})
    if folder is not None:
        folder.write(path)


def _base_key(key: str, wrapped: Mapping[str, str]) -> str:
    """The key without the name of the wrapped layer."""
    start = next((start for start in wrapped if key.startswith(start)), None)
    return key if start is None else wrapped[start] + key[len(start) :]


METHODS["save_pretrained"] = save_whole_model
