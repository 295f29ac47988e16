"""A custom `Trainee`: it is trained, saved and exported, and predicts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastlora import freeze_base_params, inject_lora
from fastlora.medical.data.batch import RegionBatch, collate_regions
from fastlora.medical.models.losses import mesh_losses
from fastlora.medical.models.trainee import ModelOptions, Trainee
from fastlora.medical.sam3d.generator import Sam3dFlow
from fastlora.medical.training.config import MODELS, TrainConfig
from fastlora.medical.training.finetuned import load_finetuned, predict
from fastlora.medical.training.trainer import MedicalTrainer
from tests.support.paths import ROOT
from tests.support.tiny_run import TinyRegions, tiny_model


class Scaled(Trainee):
    """The coarse distances, shifted by a learned offset and by a linear layer with adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(32, 32, bias=False)
        nn.init.zeros_(self.inner.weight)
        self.offset = nn.Parameter(torch.full((1,), 2.0))

    @property
    def base(self) -> nn.Module:
        return self.inner

    @property
    def exported(self) -> nn.Module:
        return self.inner

    def adapt(
        self, rank: int, alpha: float, dropout: float, ffn: bool, rank_pattern: Mapping[str, int]
    ) -> None:
        self.inner = nn.Sequential(self.inner)
        inject_lora(self.inner, ["0"], rank=rank, alpha=alpha, dropout=dropout)
        freeze_base_params(self.inner)

    def inputs(self, batch: RegionBatch) -> tuple[Tensor]:
        return (batch.base_vox,)

    def forward(self, base_vox: Tensor) -> dict[str, Tensor]:
        moved: Tensor = self.inner(base_vox)
        return {"field": base_vox + moved + self.offset}

    def losses(self, output: Any, batch: RegionBatch, weights: Any) -> dict[str, Tensor]:
        return mesh_losses(output["field"], batch, weights)

    def distances(self, output: Any) -> Tensor:
        field: Tensor = output["field"]
        return field


def test_a_custom_model_is_trained_exported_and_read_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = TrainConfig(
        checkpoint_dir=str(tmp_path), epochs=20, batch_size=2, lr=0.05, lora_rank=2, progress=False
    )
    trainer = MedicalTrainer(config, Scaled(), TinyRegions(4, 0), TinyRegions(2, 1))
    history = trainer.train()
    assert history[-1]["val"]["total"] < 0.7 * history[0]["val"]["total"]
    assert history[-1]["val"]["dice"] > history[0]["val"]["dice"]
    adapters = load_file(tmp_path / "adapter.safetensors")
    assert set(adapters) == {"0.lora_A", "0.lora_B"}  # of `exported` alone
    batch = collate_regions([TinyRegions(1, 1)[0]])
    again = load_finetuned(tmp_path, which="last", model=Scaled())
    with torch.no_grad():
        assert torch.equal(predict(again, batch), predict(trainer.model.eval(), batch))


def test_the_packaged_decoder_shards_its_blocks_and_others_are_one_piece() -> None:
    model = tiny_model()
    assert list(model.shard_units) == list(model.blocks) and model.exported is model.base is model
    assert list(Scaled().shard_units) == []


def test_a_model_that_makes_no_mesh_has_no_distances() -> None:
    with pytest.raises(NotImplementedError, match="Sam3dFlow makes no mesh"):
        Sam3dFlow.__new__(Sam3dFlow).distances(torch.zeros(1))
    assert not TrainConfig(
        model="sam3d", sam3d_dir="x", sam3d_part="slat", latents_dir="y", augment=False
    ).options.makes_mesh


def test_a_model_name_selects_its_options() -> None:
    assert all(issubclass(kind, ModelOptions) for kind in MODELS.values())
    for name, more in {"compact": {}, "sam3d": {"sam3d_dir": "x"}}.items():
        config = TrainConfig(model=name, **more)
        assert type(config.options) is MODELS[name]
        assert config.loss_weights == MODELS[name].loss_weights
        assert config.peak_lr == MODELS[name].peak_lr["lora"]


def test_only_one_module_of_training_and_evaluation_imports_sam3d() -> None:
    found = {
        str(file.relative_to(ROOT / "fastlora" / "medical"))
        for package in ("training", "evaluation")
        for file in (ROOT / "fastlora" / "medical" / package).glob("*.py")
        if "medical.sam3d" in file.read_text()
    }
    assert found == {"training/config.py"}
