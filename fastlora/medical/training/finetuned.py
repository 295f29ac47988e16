"""The fine-tuned model: the base that a run names, which weights train, and the model of a run read back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn

from fastlora import merged_model, named_lora_layers, setup_lora_for_medical_finetuning
from fastlora.errors import CheckpointError, ConfigError
from fastlora.files import check_tensors
from fastlora.medical.data.batch import RegionBatch
from fastlora.medical.models.decoder import SparseMeshDecoder, load_base_model
from fastlora.medical.sam3d.decoder import Decoded, Sam3dModel, load_sam3d
from fastlora.medical.sam3d.generator import Sam3dFlow, load_flow
from fastlora.medical.training.checkpointing import model_sha256, read_checkpoint
from fastlora.medical.training.config import TrainConfig
from fastlora.medical.training.run_folder import RunFolder

MeshModel: TypeAlias = SparseMeshDecoder | Sam3dModel


def load_base(config: TrainConfig) -> MeshModel | Sam3dFlow:
    """The model that `config` names, untrained. Raises: CheckpointError or ConfigError, naming what cannot be used."""
    if config.is_generator:
        return load_flow(
            str(config.sam3d_dir),
            config.sam3d_part,
            config.sam3d_torso,
            config.sam3d_checkpointing,
            config.drop_condition,
        )
    if config.model == "sam3d":
        return load_sam3d(
            str(config.sam3d_dir),
            config.sam3d_torso,
            config.sam3d_checkpointing,
            encoder=config.latents_dir is None,
        )
    return load_base_model(config.base_weights)


def distances(output: Tensor | Decoded) -> Tensor:
    """The signed distances (B, 32, 32, 32) in what a model gave for a batch: fine voxels, negative inside."""
    return output.field() if isinstance(output, Decoded) else output


def predict(model: MeshModel, batch: RegionBatch) -> Tensor:
    """A model's signed distances (B, 32, 32, 32) of a batch on its device."""
    return distances(model(*model.inputs(batch)))


def make_trainable(model: nn.Module, config: TrainConfig) -> None:
    """Leaves trainable what `config.finetune` says: adapters, put in here, and the output layer where it has none; or everything.

    Of SAM 3D adapters in the decoder, and the encoder, or adapters in a generator.

    Raises:
        ConfigError: all weights are to train, and some have 16 bits.
    """
    if config.finetune == "full":
        if any(p.dtype == torch.float16 for p in model.parameters()):
            raise ConfigError(
                "sam3d_torso: expected 'fp32' where all weights train, got 16-bit blocks, as the checkpoint folder says"
            )
        model.requires_grad_(True)
    elif isinstance(model, (Sam3dModel, Sam3dFlow)):
        model.adapt(config.rank, config.alpha, config.lora_dropout, config.lora_ffn)
    else:
        setup_lora_for_medical_finetuning(
            model,
            config.rank,
            config.alpha,
            config.lora_dropout,
            include_ffn=config.lora_ffn,
            rank_pattern=config.rank_pattern,
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
    model: MeshModel | None = None,
    adapters: bool = True,
) -> MeshModel:
    """The fine-tuned model of a run, on the CPU and in eval mode.

    Args:
        run_dir: a run folder.
        merged: fold the LoRA weights into plain layers.
        which: `best`, `last` or `epoch_NNN`.
        model: the base it was trained on, adapted in place; default: the one its config names.
        adapters: False leaves them without effect, so that what else was trained works with the base.

    Raises:
        CheckpointError: no such checkpoint, it does not fit the base, or it is a generator's, which makes no mesh.
    """
    path = RunFolder(run_dir).find(which)
    content = read_checkpoint(path)
    config = TrainConfig.from_dict(content["config"])
    if config.is_generator:
        raise CheckpointError(
            f"{path}: expected a run of a mesh decoder, got the generator {config.sam3d_part!r}; "
            "fastlora.load_adapter puts the run's adapter.safetensors into it"
        )
    model = cast(MeshModel, load_base(config)) if model is None else model
    if model_sha256(model.base) != content["base_sha256"]:
        raise CheckpointError(f"{path}: was trained on another base model (its weights differ)")
    make_trainable(model, config)
    check_tensors(content["model"], trainable_parameters(model), str(path))
    load_tensors(model, content["model"])
    if not adapters:
        for _, layer in named_lora_layers(model):
            layer.reset_lora_parameters()
    model.eval()
    if merged and config.finetune == "lora":
        return cast(MeshModel, merged_model(model))
    return model
