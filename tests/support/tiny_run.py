"""A decoder of a few hundred weights and ellipsoids to train it on: an epoch takes a tenth of a second.

Run as a program, it trains and kills itself with SIGKILL at a named moment (see `main`).
"""

from __future__ import annotations

import json
import os
import signal
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastlora.medical.data.grids import truncated_sdf
from fastlora.medical.data.regions import TOKEN_CHANNELS, region_arrays
from fastlora.medical.models.decoder import DecoderConfig, SparseMeshDecoder
from fastlora.medical.training import checkpointing
from fastlora.medical.training.config import TrainConfig
from fastlora.medical.training.run_folder import RunFolder
from fastlora.medical.training.trainer import MedicalTrainer


@cache
def ellipsoid(seed: int, index: int) -> dict[str, Any]:
    """What a sample of `RegionDataset` derives from its image and mask."""
    rng = np.random.default_rng((seed, index))
    grid = np.moveaxis(np.indices((32, 32, 32)), 0, -1)
    mask = (((grid - rng.uniform(12, 20, 3)) / rng.uniform(4, 11, 3)) ** 2).sum(-1) < 1
    return region_arrays(np.where(mask, 0.7, 0.3).astype(np.float32), truncated_sdf(mask))


class TinyRegions:
    """`size` ellipsoids; each epoch has its own noise, as augmentation would."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed, self.epoch = size, seed, 0

    def __len__(self) -> int:
        return self.size

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = ellipsoid(self.seed, index)
        noise = np.random.default_rng((self.epoch, index)).normal(0, 0.2, sample["feats"].shape)
        meta = {"subject": "s1", "structure": f"organ_{index}", "region": "0", "modality": "ct"}
        return {
            **sample,
            "feats": (sample["feats"] + noise).astype(np.float32),
            "affine": np.eye(4),
            "spacing": 1.5,
            "meta": {**meta, "group": "tiny"},
        }


def tiny_model(channels: int = 12, seed: int = 1) -> SparseMeshDecoder:
    """A decoder with a non-zero output layer, so that gradients reach the other layers."""
    torch.manual_seed(seed)
    model = SparseMeshDecoder(
        DecoderConfig(TOKEN_CHANNELS, channels, blocks=1, heads=2, mlp_ratio=1)
    )
    torch.nn.init.normal_(model.out_layer.weight, std=0.05)
    return model


def tiny_trainer(folder: Path | str, **changes: Any) -> MedicalTrainer:
    """4 epochs over 7 regions in micro-batches of 2, 2 to a step: the last step has 3 regions."""
    values = {
        "batch_size": 2,
        "grad_accum": 2,
        "epochs": 4,
        "lr": 1e-2,
        "lora_rank": 4,
        "lora_alpha": 8.0,
        "lora_dropout": 0.2,
        "seed": 3,
    }
    config = TrainConfig(checkpoint_dir=str(folder), **{**values, **changes})
    return MedicalTrainer(config, tiny_model(), TinyRegions(7, 0), TinyRegions(3, 1))


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    """The leaves of nested dicts and lists by path."""
    if isinstance(value, dict):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, (list, tuple)):
        items = [(str(key), item) for key, item in enumerate(value)]
    else:
        return {path: value}
    return {
        name: leaf for key, item in items for name, leaf in flatten(item, f"{path}/{key}").items()
    }


def assert_same_run(got: Path, wanted: Path) -> None:
    """`last` and `best` equal bit for bit (weights, optimizer, schedule, generators, history), and history.json too.

    Only wall-clock times and the settings that may change between run and continuation are left out.
    """
    for which in ("last", "best"):
        a, b = (
            flatten(checkpointing.read_checkpoint(RunFolder(run).find(which)))
            for run in (got, wanted)
        )
        ignored = ("seconds", "config")
        a, b = (
            {k: v for k, v in side.items() if not any(word in k for word in ignored)}
            for side in (a, b)
        )
        assert a.keys() == b.keys()
        different = [
            name
            for name in a
            if not (
                torch.equal(a[name], b[name])
                if isinstance(a[name], torch.Tensor)
                else a[name] == b[name]
            )
        ]
        assert not different
    histories = [json.loads((run / "history.json").read_text()) for run in (got, wanted)]
    for history in histories:
        assert len(history.pop("seconds")) == 5
    assert histories[0] == histories[1]


def main(folder: str, moment: str) -> None:
    """Trains in `folder` and dies: in the 3rd epoch, in the middle of writing its checkpoint, or after `last`."""
    trainer = tiny_trainer(folder)

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def half_then_die(path: Path, content: Any) -> None:
        def fill_half(file: Any) -> None:
            file.write(content[: len(content) // 2])
            file.flush()
            die()

        atomic(path, fill_half)

    atomic, write = checkpointing.atomic_write, checkpointing.write_checkpoint
    finish = trainer._finish_epoch

    def last_then_die(path: Path, content: Any) -> None:
        write(path, content)
        die()

    def third_epoch(*arguments: Any) -> None:
        if trainer.epoch == 3 and moment == "saving":
            checkpointing.atomic_write = half_then_die
        if trainer.epoch == 3 and moment == "between":
            import fastlora.medical.training.run_folder as run_folder

            run_folder.write_checkpoint = last_then_die
        finish(*arguments)

    trainer._finish_epoch = third_epoch  # type: ignore[method-assign]
    if moment == "training":
        step = trainer._step
        trainer._step = lambda batch: die() if trainer.epoch == 2 else step(batch)  # type: ignore
    trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:])
