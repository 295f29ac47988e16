"""Train once for each setting (ranks, without FFN, dropout, full fine-tuning), and compare them in a table and a plot on the same held-out regions."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from fastlora.errors import ConfigError, FastLoRAError
from fastlora.files import atomic_write, write_json
from fastlora.medical.console import show_log
from fastlora.medical.data.regions import RegionDataset
from fastlora.medical.evaluation.evaluate import evaluate, model_method
from fastlora.medical.evaluation.metrics import TOLERANCE_MM
from fastlora.medical.evaluation.results import environment, summarise
from fastlora.medical.training.config import TrainConfig, read_yaml
from fastlora.medical.training.data import load_splits
from fastlora.medical.training.finetuned import load_finetuned
from fastlora.medical.training.trainer import MedicalTrainer

LORA_LR = 5e-3  # at every rank, unless --config sets lr
METRICS = {"dice": "Dice", "hd95_mm": "HD95 mm", "nsd": f"NSD@{TOLERANCE_MM:g} mm"}


def settings(ranks: Sequence[int], dropouts: Sequence[float]) -> dict[str, dict[str, Any]]:
    """The settings of each run by its name: one rank for all layers, alpha twice the rank, the output layer trained in full."""

    def lora(rank: int, **more: Any) -> dict[str, Any]:
        same = {"finetune": "lora", "lora_ranks": []}
        return {**same, "lora_rank": rank, "lora_alpha": 2.0 * rank, **more}

    middle = 8 if 8 in ranks else ranks[len(ranks) // 2]
    return {
        **{f"rank_{rank}": lora(rank) for rank in ranks},
        f"rank_{middle}_no_ffn": lora(middle, lora_ffn=False),
        **{f"rank_{middle}_dropout_{p:g}": lora(middle, lora_dropout=p) for p in dropouts},
        "full": {"finetune": "full"},
    }


def train(name: str, change: dict[str, Any], common: dict[str, Any], folder: Path) -> TrainConfig:
    """Trains one setting, or continues it if it is unfinished; returns its configuration."""
    own = {"lr": LORA_LR} if change["finetune"] == "lora" else {}
    values = {**own, **common, **change, "checkpoint_dir": str(folder / name), "resume": "auto"}
    config = TrainConfig.from_dict(values)
    print(f"== {name}", flush=True)
    MedicalTrainer(config).train()
    return config


def measure(names: Sequence[str], config: TrainConfig, folder: Path) -> list[dict[str, Any]]:
    """A row for each run: its size, its cost and its means over the held-out regions."""
    splits = load_splits(config)
    data = RegionDataset(splits["test" if "test" in splits else "val"])
    methods = {name: model_method(load_finetuned(folder / name)) for name in names}
    summary = summarise(evaluate(data, methods, TOLERANCE_MM, config.batch_size).rows)
    rows = []
    for name in names:
        history = json.loads((folder / name / "history.json").read_text())
        file = folder / name / "adapter.safetensors"
        rows.append(
            {
                "run": name,
                "trained_parameters": history["counts"]["trainable"],
                "adapter_bytes": file.stat().st_size if file.is_file() else None,
                "seconds_per_epoch": round(sum(history["seconds"][1:]) / config.epochs, 3),
                "best_epoch": history["best_epoch"],
                "regions": summary[name]["all"]["regions"],
                **{metric: summary[name]["all"][metric]["mean"] for metric in METRICS},
            }
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows in markdown."""

    def figure(value: float | None) -> str:
        return "undefined" if value is None else f"{value:.3f}"

    head = ["run", "trained parameters", "adapter bytes", "s / epoch", *METRICS.values()]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        size = "–" if row["adapter_bytes"] is None else f"{row['adapter_bytes']:,}"
        lines.append(
            [row["run"], f"{row['trained_parameters']:,}", size, f"{row['seconds_per_epoch']:.1f}"]
            + [figure(row[metric]) for metric in METRICS]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Held-out Dice over the number of trained parameters, every run with its name."""
    figure, axes = plt.subplots(figsize=(8, 5))
    for row in rows:
        if row["dice"] is not None:
            axes.plot(row["trained_parameters"], row["dice"], "o")
            axes.annotate(row["run"], (row["trained_parameters"], row["dice"]), fontsize=8)
    axes.set(xscale="log", xlabel="trained parameters", ylabel="Dice, mean over held-out regions")
    figure.tight_layout()
    atomic_write(path, lambda file: figure.savefig(file, format="png"))
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 after one line on stderr. After an interruption the same command continues."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file of train_medical.py's settings that all runs share",
    )
    parser.add_argument(
        "--ranks",
        type=int,
        nargs="+",
        metavar="N",
        default=[1, 2, 4, 8, 16, 32, 64],
        help="LoRA ranks, one run for each (default: %(default)s)",
    )
    parser.add_argument(
        "--dropouts",
        type=float,
        nargs="*",
        metavar="P",
        default=[0.1],
        help="dropout probabilities, one run for each at rank 8 or the middle rank (default: %(default)s)",
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        metavar="DIR",
        default=Path("runs/sweep"),
        help="folder of the runs, the table and the plot (default: %(default)s)",
    )
    arguments = parser.parse_args(argv)
    folder: Path = arguments.output_dir
    show_log()
    try:
        common = read_yaml(arguments.config) if arguments.config else {}
        changes = settings(arguments.ranks, arguments.dropouts)
        if clash := sorted(common.keys() & {key for c in changes.values() for key in c}):
            raise ConfigError(
                f"config: expected none of the options that the sweep sets, got {clash}"
            )
        configs = [train(name, change, common, folder) for name, change in changes.items()]
        rows = measure(list(changes), configs[0], folder)
    except FastLoRAError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    record = {
        "command": " ".join(["python scripts/sweep_medical.py", *(argv or sys.argv[1:])]),
        "shared_settings": common,
        "environment": environment(),
        "rows": rows,
    }
    write_json(folder / "sweep.json", record)
    atomic_write(folder / "sweep.md", table(rows).encode())
    plot(rows, folder / "sweep.png")
    print(table(rows) + f"written to {folder}: sweep.json, sweep.md, sweep.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
