"""The fine-tuned model: which weights train, and the model of a run read back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from fastlora import merged_model, setup_lora_for_medical_finetuning
from fastlora.errors import CheckpointError
from fastlora.medical.checkpointing import check_tensors, model_sha256, read_checkpoint
from fastlora.medical.model import SparseMeshDecoder, load_base_model
from fastlora.medical.run_folder import RunFolder
from fastlora.medical.train_config import TrainConfig


def make_trainable(model: nn.Module, config: TrainConfig) -> None:
    """Leaves trainable what `config.finetune` says: adapters, put in here, and the output layer; or everything."""
    if config.finetune == "full":
        model.requires_grad_(True)
    else:
        setup_lora_for_medical_finetuning(
            model,
            config.lora_rank,
            config.lora_alpha,
            config.lora_dropout,
            include_ffn=config.lora_ffn,
        )


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name; a checkpoint holds exactly these."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies tensors into the parameters of their names."""
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        parameters[name].copy_(tensor)


def load_finetuned(
    run_dir: str | Path,
    merged: bool = False,
    which: str = "best",
    model: SparseMeshDecoder | None = None,
) -> SparseMeshDecoder:
    """The fine-tuned decoder of a run, on the CPU and in eval mode.

    Args:
        run_dir: a run folder.
        merged: fold the LoRA weights into plain layers.
        which: `best`, `last` or `epoch_NNN`.
        model: the base it was trained on, adapted in place; default: the one its config names.

    Raises:
        CheckpointError: no such checkpoint, or it does not fit the base.
    """
    path = RunFolder(run_dir).find(which)
    content = read_checkpoint(path)
    config = TrainConfig.from_dict(content["config"])
    model = load_base_model(config.base_weights) if model is None else model
    if model_sha256(model) != content["base_sha256"]:
        raise CheckpointError(f"{path}: was trained on another base model (its weights differ)")
    make_trainable(model, config)
    check_tensors(content["model"], trainable_parameters(model), str(path))
    load_tensors(model, content["model"])
    model.eval()
    if merged and config.finetune == "lora":
        return cast(SparseMeshDecoder, merged_model(model))
    return model
