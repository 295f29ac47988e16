"""The fine-tuned model: the base of a run, its trainable weights, and the model of a run loaded back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from fastlora import merged_model, named_lora_layers
from fastlora.errors import CheckpointError
from fastlora.files import check_tensors
from fastlora.medical.data.batch import RegionBatch
from fastlora.medical.models.trainee import Trainee
from fastlora.medical.training.checkpointing import model_sha256, read_checkpoint
from fastlora.medical.training.config import TrainConfig
from fastlora.medical.training.run_folder import RunFolder


def load_base(config: TrainConfig) -> Trainee:
    """The model of a configuration, untrained. Raises: CheckpointError or ConfigError, naming the problem."""
    return config.options.load(config.base_weights)


def predict(model: Trainee, batch: RegionBatch) -> Tensor:
    """A mesh model's signed distances (B, 32, 32, 32) for a batch on its device."""
    return model.distances(model(*model.inputs(batch)))


def make_trainable(model: Trainee, config: TrainConfig) -> None:
    """Makes trainable what `config.finetune` names: injected adapters and what the model trains around them, or everything.

    Raises: ConfigError if all weights are to be trained, and some have 16 bits.
    """
    if config.finetune == "full":
        model.train_all()
    else:
        model.adapt(**config.adapters)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name; a checkpoint holds exactly these."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def without_values(model: Trainee) -> Trainee:
    """A copy of a model's structure on the meta device, which takes no memory."""
    # deepcopy takes the tensors from the memo instead of copying them.
    memo: dict[int, Any] = {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    memo |= {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo)


def load_finetuned(
    run_dir: str | Path,
    merged: bool = False,
    which: str = "best",
    model: Trainee | None = None,
    adapters: bool = True,
) -> Trainee:
    """The fine-tuned model of a run, on the CPU and in eval mode.

    run_dir: a run folder.
    merged: fold the LoRA weights into plain layers.
    which: `best`, `last` or `epoch_NNN`.
    model: the base that the run started from, adapted in place; default: that of the run's configuration.
    adapters: False disables them and keeps the other trained weights.

    Raises: CheckpointError if there is no such checkpoint, it does not fit the base, or its model makes no mesh.
    """
    path = RunFolder(run_dir).find(which)
    content = read_checkpoint(path)
    config = TrainConfig.from_dict(content["config"])
    config.options.check_makes_mesh(path)
    model = load_base(config) if model is None else model
    if model_sha256(model.base) != content["base_sha256"]:
        raise CheckpointError(f"{path}: was trained on another base model (its weights differ)")
    make_trainable(model, config)
    check_tensors(content["model"], trainable_parameters(model), str(path))
    model.load_state_dict(content["model"], strict=False)
    if not adapters:
        for _, layer in named_lora_layers(model):
            layer.reset_lora_parameters()
    model.eval()
    if merged and config.finetune == "lora":
        return cast(Trainee, merged_model(model))
    return model
