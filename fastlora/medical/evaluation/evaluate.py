"""Held-out evaluation: every method on the same regions, with a row of metrics for each.

`compare_runs` evaluates runs; `results` summarises the `Evaluation`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastlora import count_parameters
from fastlora.errors import CheckpointError, ConfigError, DataError
from fastlora.medical.data.batch import RegionBatch, collate_regions
from fastlora.medical.data.regions import RegionDataset
from fastlora.medical.data.splits import SPLIT_NOTES
from fastlora.medical.evaluation.metrics import (
    TOLERANCE_MM,
    baseline,
    region_status,
    surface_metrics,
    tune_threshold,
)
from fastlora.medical.models.trainee import Trainee
from fastlora.medical.scans.geometry import Array
from fastlora.medical.training.checkpointing import check_history
from fastlora.medical.training.config import TrainConfig
from fastlora.medical.training.data import load_splits
from fastlora.medical.training.distributed import resolve_device
from fastlora.medical.training.finetuned import Finetuned, load_base, predict
from fastlora.medical.training.run_folder import RunFolder

log = logging.getLogger(__name__)

Row = dict[str, Any]
Method = Callable[[RegionBatch], torch.Tensor]
"""A way to predict: from a batch of B regions to signed distances (B, X, Y, Z)."""

LABELS = {
    "baseline": "Coarse segmentation, upsampled",
    "base": "Base model, frozen",
    "lora": "LoRA",
    "merged": "LoRA, merged",
    "full": "Full fine-tuning",
}
"""The methods, in the order of every table."""

SAME_IN_BOTH_RUNS = (
    *("data_root", "demo", "classes", "modality", "channel", "intercept", "split"),
    *("model", "base_weights"),
)


@dataclass(frozen=True)
class Evaluation:
    """Predictions on held-out regions, and one row of metrics for each region and method.

    samples: the regions, from `RegionDataset`.
    predictions: method -> a level set (X, Y, Z) for each sample, negative inside.
    rows: `meta` of the region, `index` among the samples, `method`, `spacing_mm`, `status`
        and the metrics.
    """

    samples: list[dict[str, Any]]
    predictions: dict[str, list[Array]]
    rows: list[Row]
    tolerance_mm: float


@dataclass(frozen=True)
class Run:
    """A fine-tuned model that is compared. history: an entry for each epoch, as far as known. facts: configuration, cost and size; None where unknown."""

    trained: Finetuned
    history: list[dict[str, Any]]
    facts: dict[str, Any]

    @property
    def config(self) -> TrainConfig:
        """The run's configuration."""
        return self.trained.config

    @property
    def regions(self) -> list[str]:
        """Fingerprints of the regions of training and validation; none in files of older versions."""
        return list(self.trained.content["regions"])

    @classmethod
    def read(cls, path: str | Path, finetune: str, **paths: str | None) -> Run:
        """Reads a run folder, whose best checkpoint is used, a checkpoint or an adapter file. paths: as in `Finetuned.read`.

        Raises: CheckpointError if it cannot be read, is not of that kind of fine-tuning, or its model makes no mesh. ConfigError if its
            configuration cannot be used.
        """
        trained = Finetuned.read(path, "best", **paths)
        config, content = trained.config, trained.content
        if config.finetune != finetune:
            raise CheckpointError(
                f"{path}: expected a run with finetune {finetune!r}, got {config.finetune!r}"
            )
        config.options.check_makes_mesh(path)
        if trained.folder is not None:
            about = RunFolder(trained.folder).read_history()
        else:
            about = {"epochs": content["history"]}  # up to the checkpoint
            check_history(about["epochs"], [], str(path), "dice")
        whole = trained.folder is not None
        counts = about.get("counts") or content.get("counts") or count_parameters(trained.model())
        base_parameters = counts["total"] - counts["lora"]
        facts = {
            "config": config.to_dict(),
            "checkpoint": trained.name,
            "used_epoch": content["epoch"],
            "epochs": len(about["epochs"]) - 1 if whole else None,
            "seconds": round(sum(about["seconds"]), 1) if whole else None,
            "base_parameters": base_parameters,
            "trainable": counts["trainable"],
            "trainable_share": counts["trainable"] / base_parameters,
            "weights_bytes": sum(tensor.nbytes for tensor in trained.weights.values()),
            "checkpoint_bytes": None if trained.is_adapter else trained.file.stat().st_size,
        }
        return cls(trained, about["epochs"], facts)


def baseline_method(threshold: float) -> Method:
    """The upsampled coarse segmentation, thresholded at `threshold`; it does not use the image."""

    def predict(batch: RegionBatch) -> torch.Tensor:
        return torch.from_numpy(np.stack([baseline(c, threshold) for c in batch.coarse.numpy()]))

    return predict


def model_method(model: Trainee, device: torch.device | str = "cpu") -> Method:
    """A decoder, put in eval mode and on `device`."""
    model.eval().to(device)
    return lambda batch: predict(model, batch.to(device)).float().cpu()


@torch.inference_mode()
def evaluate(
    dataset: RegionDataset, methods: Mapping[str, Method], tolerance_mm: float, batch_size: int = 8
) -> Evaluation:
    """Every method on every region. methods: by name, as in `LABELS`.

    Raises: DataError if there is no region, or a prediction is not finite (the method and region are named).
    """
    samples = [dataset[index] for index in range(len(dataset))]
    if not samples:
        raise DataError("dataset: expected at least one held-out region, got none")
    predictions: dict[str, list[Array]] = {key: [] for key in methods}
    for start in range(0, len(samples), batch_size):
        batch = collate_regions(samples[start : start + batch_size])
        for key, method in methods.items():
            predictions[key] += list(method(batch).numpy())
    rows = []
    for index, sample in enumerate(samples):
        for key in methods:
            pred, true = predictions[key][index], sample["sdf_vox"]
            try:
                values = surface_metrics(pred, true, sample["spacing"], tolerance_mm)
            except DataError as error:
                where = f"{sample['meta']['subject']}/{sample['meta']['region']}"
                raise DataError(f"{LABELS.get(key, key)}, {where}: {error}") from error
            row = {**sample["meta"], "index": index, "spacing_mm": float(sample["spacing"])}
            row |= {"method": key, "status": region_status(pred, true), **values}
            rows.append(row)
    return Evaluation(samples, predictions, rows, tolerance_mm)


def compare_runs(
    lora: Run,
    full: Run | None = None,
    *,
    data_root: str | None = None,
    cache_dir: str | None = None,
    tolerance_mm: float = TOLERANCE_MM,
    batch_size: int = 8,
    device: str = "auto",
) -> tuple[Evaluation, dict[str, Any]]:
    """Evaluates the trivial baseline, the base model, LoRA, merged LoRA and, if given, full fine-tuning.

    The subset `test` of the runs' split is used, or `val` if the split has no `test`.
    data_root: read the cases from here instead of where the run found them. cache_dir: the preprocessing cache of the cases; default:
        the run's own, none with a data_root.

    Returns the evaluation and the facts of the comparison: the split and what its subsets share, the
    baseline's threshold (tuned on the training regions), and the largest difference between LoRA and merged LoRA.

    Raises: DataError, CheckpointError or ConfigError, naming the mismatch.
    """
    config = replace(lora.config, device=device, amp="off")
    if full is not None:
        _check_same(lora, full, data_root)
    unnamed = "data_root" in lora.trained.content.get("paths", ()) and config.data_root is None
    if data_root is None and unnamed:
        raise ConfigError(
            f"data_root: {lora.trained.file} was trained on a data set that it does not name; expected its folder, got none"
        )
    if data_root is not None:
        split = config.split if lora.regions else "auto"  # of a file that states none
        config = replace(config, data_root=data_root, demo=None, cache_dir=None, split=split)
    if cache_dir is not None:
        config = replace(config, cache_dir=cache_dir)
    models = _load_models(config, lora, full)

    splits = load_splits(config)
    subset = "test" if "test" in splits else "val"
    training = RegionDataset(splits["train"], cache_dir=config.cache_dir)
    now = [training.identity(), RegionDataset(splits["val"]).identity()]
    for run in filter(None, (lora, full)):
        if run.regions and run.regions != now:
            text = f"{run.trained.file}: was trained on regions that differ from those of its data now, so a training region could be in the test set"
            if data_root is None or unnamed:
                cached = "cache_dir" in run.trained.content.get("paths", ()) and cache_dir is None
                raise DataError(
                    f"{text}; restore the data, or train again{', or name its cache with --cache_dir' if cached else ''}"
                )
            log.warning("%s, unless no patient of %s was trained on", text, data_root)
    threshold = tune_threshold(training)
    where = resolve_device(config)
    methods = {"baseline": baseline_method(threshold)}
    methods |= {key: model_method(model, where) for key, model in models.items()}
    held_out = config.options.regions(RegionDataset(splits[subset], cache_dir=config.cache_dir))
    evaluation = evaluate(held_out, methods, tolerance_mm, batch_size)
    facts = {
        "split": {
            "kind": config.split,
            "held_out_side": subset,
            "train_regions": len(training),
            "held_out_regions": len(evaluation.samples),
            "notes": SPLIT_NOTES[config.split],
        },
        "baseline_threshold": threshold,
        "merged_difference_vox": largest_difference(evaluation, "lora", "merged"),
        "device": str(where),
    }
    return evaluation, facts


def _check_same(lora: Run, full: Run, data_root: str | None) -> None:
    """Refuses runs that differ in what makes them comparable. data_root: if given, it is used for both. Raises: ConfigError."""
    mine, others = lora.config.to_dict(), full.config.to_dict()
    unnamed = {*lora.trained.content.get("paths", ()), *full.trained.content.get("paths", ())}
    skipped = {"data_root", "demo"} if data_root is not None else set()
    for name in (*SAME_IN_BOTH_RUNS, *lora.config.options.same_to_compare):
        # The channel was 0 by default in older versions.
        same = mine[name] == others[name] or (
            name == "channel" and not (mine[name] or others[name])
        )
        if not same and name not in skipped | unnamed:
            raise ConfigError(
                f"full: expected a run with {name} {mine[name]!r}, got {others[name]!r}"
            )
    if lora.regions and full.regions and lora.regions != full.regions:
        raise ConfigError("full: expected a run on the same regions, got one on others")


def _load_models(config: TrainConfig, lora: Run, full: Run | None) -> dict[str, Trainee]:
    """The models by method; the base alone, or within the rest of the LoRA run if it cannot predict alone."""
    trained = lora.trained.model
    alone = config.options.standalone_base
    models = {
        "base": load_base(config) if alone else trained(adapters=False),
        "lora": trained(),
        "merged": trained(merged=True),
    }
    if full is not None:
        models["full"] = full.trained.model()
    return models


def largest_difference(evaluation: Evaluation, one: str, other: str) -> float:
    """Largest |difference| between two methods' predictions over all regions, in fine voxels."""
    pairs = zip(evaluation.predictions[one], evaluation.predictions[other], strict=True)
    return max(float(np.abs(a - b).max()) for a, b in pairs)
