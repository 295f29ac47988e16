"""`FastLoRACallback` for transformers' Trainer. Importing this module imports transformers, so `import fastlora` does not."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from torch import nn

from fastlora.errors import ConfigError
from fastlora.layers.base import ADAPTER_TENSORS, named_lora_layers
from fastlora.model.adapter_registry import none_active, why_not_one
from fastlora.model.heads import adapter_parameters, head_tensors
from fastlora.model.pretrained import is_pretrained
from fastlora.model.wrappers import unwrapped
from fastlora.peft.pretrained import save_pretrained
from fastlora.peft.whole_model import ADAPTERS_ONLY

# By name, because a type checker would read all of transformers.
_TrainerCallback: Any = importlib.import_module("transformers").TrainerCallback


class FastLoRACallback(_TrainerCallback):  # type: ignore[misc]
    """The Trainer's checkpoints hold the adapters and heads alone, instead of the whole model.

    `checkpoint-N/` then is a PEFT folder, and has `model.safetensors` with the same tensors under fastlora's names, from which the Trainer
    resumes and restores the best model. All of it is in the checkpoint's own folder, so `save_total_limit` deletes it together. After
    training `trainer.save_model(folder)` writes the whole model with its adapters (`fastlora.peft.whole_model`).

    For the resumed run, inject the adapters into the same base model and pass the callback again: a base that trains or is loaded
    differently is not in these checkpoints. A model that is not of transformers keeps the Trainer's whole checkpoints, with a PEFT folder
    in each.

    Raises: ConfigError at the start of training if the model has no active adapter of fastlora, or several.
    """

    def __init__(self) -> None:
        self._handle: Any = None

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before a checkpoint is loaded: what it lacks on purpose is not reported as missing."""
        self._watch(kwargs["model"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = unwrapped(kwargs["model"])
        if not adapter_parameters(model):
            raise ConfigError(
                f"FastLoRACallback: {none_active(model)} of fastlora; call inject_lora before training (a PEFT model needs no callback)"
            )
        several = why_not_one(model)
        if several is not None:
            raise ConfigError(f"FastLoRACallback: {several}")
        self._watch(model)
        if is_pretrained(model):
            model.__dict__[ADAPTERS_ONLY] = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        unwrapped(kwargs["model"]).__dict__.pop(ADAPTERS_ONLY, None)
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = unwrapped(kwargs["model"])
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if not is_pretrained(model) and state.is_world_process_zero and folder.is_dir():
            save_pretrained(model, folder)

    def _watch(self, model: nn.Module) -> None:
        inner: Any = unwrapped(model)
        if self._handle is None and is_pretrained(inner):
            self._handle = inner.register_load_state_dict_post_hook(_forgive_base)


def _forgive_base(model: nn.Module, incompatible: Any) -> None:
    """Remove the missing keys if they are all keys of the base model: the state is that of a checkpoint with adapters alone."""
    layers = named_lora_layers(model, remove_duplicate=False)
    saved = {f"{path}.{name}" for path, _ in layers for name in ADAPTER_TENSORS}
    saved |= head_tensors(model, known=True).keys()
    base = model.state_dict().keys() - saved
    if set(incompatible.missing_keys) == base:
        incompatible.missing_keys.clear()
