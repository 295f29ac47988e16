"""Markdown tables of the records of whole training steps: a short one and one of everything."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastlora.benchmark.record import gpu_file_name

Record = dict[str, Any]
Rows = dict[tuple[str, str], dict[str, dict[str, Any]]]  # (model, implementation) -> timing -> row
NAMES = {
    "fastlora": "fastlora",
    "fastlora-fused": "fastlora, `fuse`",
    "fastlora-bf16": "fastlora, bf16 adapters",
    "fastlora-compiled": "fastlora, compiled",
    "peft": "PEFT",
    "peft-bf16": "PEFT, bf16 adapters",
    "peft-compiled": "PEFT, compiled",
    "full": "full fine-tuning",
}
MODELS = {
    "vit-b": "ViT-B",
    "llama-1b": "a Llama of 1.2 billion parameters without embedding and output head",
    "qwen3-moe": "a Qwen3-MoE of 4 blocks, hidden size 512, 32 experts of size 256, 4 for each token",
    "qwen3-moe-2b": "4 blocks of Qwen3-30B-A3B, which have 128 experts of size 768, 8 for each token",
}
INPUTS = {
    "cpu": {"vit-b": "4 images", "llama-1b": "128 tokens", "qwen3-moe": "4 × 128 tokens"},
    "cuda": {
        "vit-b": "64 images",
        "llama-1b": "4 × 1024 tokens",
        "qwen3-moe-2b": "4 × 1024 tokens",
    },
}
EAGER_PEFT = ("peft", "peft-bf16")
SHORT = ("fastlora", "fastlora-fused", "peft-bf16", "peft", "full")
TIMINGS = {"eager": "step, eager", "graph": "step, as a CUDA graph"}
NOT_MEASURED = "No record: not measured."


def step_table(records: list[Record]) -> str:
    """For each record, GPUs first: time and memory of the main implementations, a line for each model and figure."""
    ordered = sorted(records, key=lambda record: record["environment"]["device"] != "cuda")
    return "\n\n".join(map(_step_table, ordered)) or NOT_MEASURED


def model_table(records: list[Record]) -> str:
    """For each record, a line for each model and implementation.

    Speeds are relative to PEFT with the faster of its two adapter dtypes, eagerly and as a CUDA graph.
    """
    return "\n\n".join(map(_model_table, records)) or NOT_MEASURED


def mixed_table(records: list[Record]) -> str:
    """For each record, the batches whose samples have different adapters: milliseconds, and how many times as long PEFT takes."""
    return "\n\n".join(map(_mixed_table, records)) or NOT_MEASURED


def _mixed_table(record: Record) -> str:
    facts, settings = record["environment"], record["settings"]
    cells: dict[tuple[int, int, str], dict[str, float]] = {}
    for row in record["results"]:
        case = row["samples"], row["length"], row["order"]
        cells.setdefault(case, {})[row["backend"]] = row["ms_p50"]
    lines = [
        "| samples × tokens, order | without adapters | fastlora | PEFT + `accelerate` | PEFT | PEFT / fastlora | PEFT / `accelerate` |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (samples, length, order), ms in cells.items():
        times = [f"{ms[name]:.1f} ms" for name in ("base", "fastlora", "peft-accelerated", "peft")]
        times += [f"{ms['peft'] / ms[name]:.2f}×" for name in ("fastlora", "peft-accelerated")]
        which = "in runs" if order == "runs" else order
        lines.append(f"| {samples} × {length}, {which} | {' | '.join(times)} |")
    size = settings["size"]
    lines.append(
        f"\nA Llama of hidden size {size['hidden']} with {size['layers']} blocks and {settings['adapters']} adapters of rank {settings['rank']} on all linear layers, eval mode, "
        f"no gradients. {_where(record)}, torch {facts['torch']}, PEFT {facts['peft']}, medians of {facts['reps']} interleaved calls (`{facts['command']}`, `benchmarks/results/mixed-batch-{facts['device']}.json`)."
    )
    return "\n".join(lines)


def _step_table(record: Record) -> str:
    rows, on_gpu = _rows(record), record["environment"]["device"] == "cuda"
    names = [name for name in SHORT if any(backend == name for _, backend in rows)]
    lines = [
        f"| {_where(record)} | | {' | '.join(NAMES[name] for name in names)} |",
        "| --- | --- |" + " --- |" * len(names),
    ]
    for model in dict.fromkeys(model for model, _ in rows):
        for timing, label in TIMINGS.items() if on_gpu else [("eager", "step")]:
            cells = [_milliseconds(rows.get((model, name), {}).get(timing)) for name in names]
            lines.append(f"| {_inputs(record, model)} | {label} | {' | '.join(cells)} |")
        figure = "peak_bytes" if on_gpu else "saved_bytes"
        label = "peak memory of a step" if on_gpu else "saved for the backward pass"
        cells = [_mebibytes(rows.get((model, name), {}).get("eager"), figure) for name in names]
        lines.append(f"| | {label} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"{_origin(record)} (`benchmarks/results/{_file(record)}`)."])


def _model_table(record: Record) -> str:
    rows, on_gpu = _rows(record), record["environment"]["device"] == "cuda"
    lines = [
        f"| model | | step | {'as a CUDA graph | ' * on_gpu}speed relative to PEFT | saved for the backward pass | "
        f"{'peak of a step | ' * on_gpu}weights, gradients and AdamW state of trained parameters |",
        "| --- | --- | --- | --- | --- | --- |" + " --- | --- |" * on_gpu,
    ]
    for (model, name), timed in rows.items():
        timings = ("eager", "graph") if on_gpu else ("eager",)
        ratios = [
            f"{min(peft) / timed[t]['ms_p50']:.2f}×"
            for t in timings
            if t in timed and (peft := _peft(rows, model, t))
        ]
        cells = [model, NAMES.get(name, name), *(_milliseconds(timed.get(t)) for t in timings)]
        cells.append(", ".join(ratios) or "–")
        sizes = ("saved_bytes", *(["peak_bytes"] if on_gpu else []), "state_bytes")
        cells += [_mebibytes(timed["eager"], size) for size in sizes]
        lines.append(f"| {' | '.join(cells)} |")
    models = "; ".join(
        f"{model}: {MODELS.get(model, model)}, {INPUTS[record['environment']['device']].get(model, 'tiny inputs')}"
        for model in dict.fromkeys(model for model, _ in rows)
    )
    absent = "; ".join(
        f"{NAMES.get(a['backend'], a['backend'])} of {a['model']} ({a['reason']})"
        for a in record["absent"]
    )
    lines.append(
        f"\n{models}. {_origin(record)} (`{record['environment']['command']}`, `benchmarks/results/{_file(record)}`)."
        + (f" Not run: {absent}." if absent else "")
    )
    return "\n".join(lines)


def _rows(record: Record) -> Rows:
    rows: Rows = {}
    for row in record["results"]:  # records before CUDA graphs name no timing
        rows.setdefault((row["model"], row["backend"]), {})[row.get("timing", "eager")] = row
    return rows


def _peft(rows: Rows, model: str, timing: str) -> list[float]:
    found = [rows.get((model, name), {}).get(timing) for name in EAGER_PEFT]
    return [row["ms_p50"] for row in found if row is not None]


def _milliseconds(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    ms = row["ms_p50"]
    return f"{ms / 1e3:.2f} s" if ms >= 1e3 else f"{ms:.1f} ms"


def _mebibytes(row: dict[str, Any] | None, figure: str) -> str:
    return "–" if row is None else f"{row[figure] / 2**20:,.0f} MiB"


def _where(record: Record) -> str:
    facts = record["environment"]
    return (
        facts["gpu"] if facts["device"] == "cuda" else f"{facts['threads']} threads, {facts['cpu']}"
    )


def _inputs(record: Record, model: str) -> str:
    found = INPUTS[record["environment"]["device"]].get(model, "tiny inputs")
    return f"{model}, {found}"


def gpu_record_name(gpu: str, models: Iterable[str]) -> str:
    """The name of the file of these models: that of mixtures of experts has `moe` in it."""
    moe = "moe-" * all("moe" in model for model in models)
    return f"model-step-{moe}{gpu_file_name(gpu)}"


def _file(record: Record) -> str:
    facts = record["environment"]
    if facts["device"] == "cuda":
        return gpu_record_name(facts["gpu"], [row["model"] for row in record["results"]])
    written = re.search(r"--output[ =](\S+)", facts["command"])
    return Path(written[1]).name if written else "model-step-cpu.json"


def _origin(record: Record) -> str:
    facts, settings = record["environment"], record["settings"]
    on_gpu = facts["device"] == "cuda"
    adapters = " Adapters are float32 where nothing else is said." if on_gpu else ""
    return (
        f"Random weights, {settings['dtype']}, rank {settings['rank']}, dropout {settings['dropout']}.{adapters} {_where(record)}, "
        f"torch {facts['torch']}, PEFT {facts['peft']}, medians of {facts['reps']} interleaved steps"
    )
