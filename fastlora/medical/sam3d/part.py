"""The common base of the trainable parts of SAM 3D Objects: adapters, and the precision of their blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fastlora import setup_lora_for_medical_finetuning
from fastlora.errors import ConfigError
from fastlora.medical.models.trainee import Trainee


class Sam3dPart(Trainee):
    """A part whose `base` is a module of SAM 3D Objects.

    FSDP2 shards a part as one unit, since it does not find the tensors inside the objects that the blocks pass to each other.
    """

    def adapt(
        self, rank: int, alpha: float, dropout: float, ffn: bool, rank_pattern: Mapping[str, int]
    ) -> None:
        """Adapts the base and freezes the rest of it. `rank_pattern` is always empty: see `Sam3dOptions.check`."""
        setup_lora_for_medical_finetuning(
            self.base, rank, alpha, dropout, unfreeze_output_layers=False, include_ffn=ffn
        )

    def train_all(self) -> None:
        """Makes every parameter trainable. Raises: ConfigError if the blocks have 16 bits."""
        if self.has_half:
            raise ConfigError(
                "sam3d_torso: expected 'fp32' with finetune 'full', got 16-bit blocks from the model folder"
            )
        super().train_all()


def set_torso(model: Any, torso: str, recompute: bool) -> None:
    """Sets the precision of a part's blocks: "fp32", "fp16", or "config" to leave it as built.

    recompute: recompute each block's activations in the backward pass instead of saving them.
    """
    if torso != "config":
        half = torso == "fp16"
        (model.convert_to_fp16 if half else model.convert_to_fp32)()
        model.dtype = torch.float16 if half else torch.float32
    for block in model.blocks:
        block.use_checkpoint = recompute
