"""Write the tables of README.md and of the pages in docs/, and the plots, from the records in `benchmarks/results/` alone.

python benchmarks/report.py            # rewrite the tables between their markers, draw missing and outdated plots
python benchmarks/report.py --check    # exit 1 if a file or a plot differs from the records
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import plots
from gpu_tables import calls_table, case_tables, speed_table, targets_table
from model_tables import mixed_table, model_table, step_table

from fastlora.benchmark.cases import readable

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
METHODS = {
    "baseline": "upsampled coarse segmentation",
    "base": "frozen base",
    "lora": "LoRA",
    "full": "full fine-tuning",
}


def cpu_table(record: dict[str, Any]) -> str:
    """Forward + backward of each case: milliseconds, ratios, and the share of bytes saved for the backward pass."""
    facts = record["environment"]
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for result in record["results"]:
        if result["mode"] == "forward+backward":
            rows.setdefault(result["case"], {})[result["backend"]] = result
    lines = [
        "| M×K → N, rank, dropout | frozen linear | fastlora | PEFT | PEFT / fastlora | saved for the backward pass: fastlora / PEFT |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    ratios = []
    for case, row in rows.items():
        ratios.append(row["peft"]["ms_p50"] / row["fastlora"]["ms_p50"])
        times = " | ".join(
            f"{row[name]['ms_p50']:.1f} ms" for name in ("linear", "fastlora", "peft")
        )
        saved = row["fastlora"]["saved_bytes"] / row["peft"]["saved_bytes"]
        lines.append(f"| {readable(case)} | {times} | {ratios[-1]:.2f}× | {saved:.0%} |")
    lines.append(
        f"\nMedian {statistics.median(ratios):.2f}× over PEFT {facts['peft']}; float32, {facts['threads']} threads, "
        f"{facts['cpu']}, torch {facts['torch']}, medians of {facts['reps']} interleaved runs "
        f"(`{facts['command']}`, `benchmarks/results/cpu.json`)."
    )
    calls = ", ".join(
        f"{row['backend']} {row['us_p50']:.0f}"
        for row in record.get("call_overhead", [])  # records before this field have none
        if row["mode"] == "forward+backward" and row["case"].endswith("p0")
    )
    if calls:
        lines.append(f"\nOne tiny layer, forward and backward, microseconds per call: {calls}.")
    return "\n".join(lines)


def scaling_table(records: dict[str, dict[str, Any]]) -> str:
    """For each record the plot, and the milliseconds at both ends of each axis.

    records: by file name without its suffix.
    """
    parts = []
    for name, record in records.items():
        facts, peaks = record["environment"], record["peaks"]
        where = facts.get("gpu", facts["cpu"])
        names = list(dict.fromkeys(row["backend"] for row in record["points"]))
        lines = [
            f"![{where}: forward + backward against M, N, R and layers, and the roofline](../benchmarks/results/{name}.png)\n",
            f"| axis | from, to | {', ms | '.join(names)}, ms | PEFT / fastlora |",
            "| --- | --- |" + " --- |" * (len(names) + 1),
        ]
        for axis in dict.fromkeys(row["axis"] for row in record["points"]):
            values = dict.fromkeys(row["value"] for row in record["points"] if row["axis"] == axis)
            ends = [min(values), max(values)]
            ms = [
                {
                    row["backend"]: row["ms_p50"]
                    for row in record["points"]
                    if (row["axis"], row["value"]) == (axis, value)
                }
                for value in ends
            ]
            cells = [
                ", ".join(f"{end[who]:.3g}" if who in end else "–" for end in ms) for who in names
            ]
            ratios = ", ".join(
                f"{end['peft'] / end['fastlora']:.2f}×"
                if {"peft", "fastlora"} <= end.keys()
                else "–"
                for end in ms
            )
            lines.append(f"| {axis} | {ends[0]}, {ends[1]} | {' | '.join(cells)} | {ratios} |")
        lines.append(
            f"\nRoofline: {peaks['gflops']:,.0f} GFLOP/s of the fastest GEMM, {peaks['gbps']:.1f} GB/s of the fastest copy. "
            f"{where}, {facts['threads']} threads, torch {facts['torch']}, PEFT {facts['peft']}, medians of {facts['reps']} interleaved runs "
            f"(`{facts['command']}`, `benchmarks/results/{name}.json`)."
        )
        parts.append("\n".join(lines))
    return "\n\n".join(parts) or "No record: not measured."


def overhead_table(records: list[dict[str, Any]]) -> str:
    """Microseconds and instructions of one call of a tiny layer, absolute and as a share of PEFT's."""
    if not records:
        return "No record: not measured."
    (record,) = records
    facts, counter = record["environment"], record["counter"]
    rows: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in record["call_overhead"]:
        rows.setdefault((row["case"], row["mode"]), {})[row["backend"]] = row
    lines = [
        "| M×K → N, rank, dropout | mode | | µs per call | instructions per call | share of PEFT's µs | share of PEFT's instructions |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (case, mode), row in rows.items():
        for name, mine in row.items():
            shares = [
                f"{mine[key] / row['peft'][key]:.0%}" if key in mine else "–"
                for key in ("us_p50", "instructions")
            ]
            count = f"{mine['instructions']:,}" if "instructions" in mine else "–"
            lines.append(
                f"| {readable(case)} | {mode} | {name} | {mine['us_p50']:.1f} | {count} | {' | '.join(shares)} |"
            )
    reasons = "; ".join(f"{name}: {reason}" for name, reason in record["no_counter"].items())
    lines.append(
        f"\nInstructions {f'counted by `{counter}`' if counter else 'not counted'}{f' (unavailable: {reasons})' if reasons else ''}. "
        f"{facts['threads']} thread, {facts['cpu']}, torch {facts['torch']}, PEFT {facts['peft']}, medians of {facts['reps']} interleaved runs "
        f"(`{facts['command']}`, `benchmarks/results/overhead-cpu.json`)."
    )
    return "\n".join(lines)


def dice_table(records: list[dict[str, Any]]) -> str:
    """Held-out Dice of each method and group, the mean of the seeds."""
    groups = [group for group in records[0]["means"]["base"] if group != "all"]
    lines = [
        f"| held out, Dice | {' | '.join(METHODS.values())} |",
        "| --- |" + " --- |" * len(METHODS),
    ]
    for group in groups:
        dice = [
            statistics.fmean(record["means"][method][group]["dice"] for record in records)
            for method in METHODS
        ]
        lines.append(f"| {group} | {' | '.join(f'{value:.3f}' for value in dice)} |")
    lora, full = (records[0]["runs"][name]["trainable"] for name in ("lora", "full"))
    lines.append(
        f"\nMeans of {len(records)} seeds. LoRA trains {lora:,} parameters, {lora / full:.2%} of full fine-tuning's "
        f"(`benchmarks/results/medical-structure-seedN.json`)."
    )
    return "\n".join(lines)


def medical_table(records: list[dict[str, Any]]) -> str:
    """Held-out means of each method and group, averaged over the seeds, with the lowest and the highest seed's Dice."""
    groups = [group for group in records[0]["means"]["base"] if group != "all"]
    lines = [
        "| held out | method | trained parameters | Dice (lowest–highest seed) | HD95 mm | NSD@2 mm | volume error |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for group in groups:
        for method, label in METHODS.items():
            means = [record["means"][method][group] for record in records]
            dice = [mean["dice"] for mean in means]
            hd95, nsd, volume = (
                statistics.fmean(mean[key] for mean in means)
                for key in ("hd95_mm", "nsd", "volume_error")
            )
            run = records[0]["runs"].get(method)
            trained = f"{run['trainable']:,}" if run else "–"
            lines.append(
                f"| {group} | {label} | {trained} | {statistics.fmean(dice):.3f} ({min(dice):.3f}–{max(dice):.3f}) "
                f"| {hd95:.2f} | {nsd:.3f} | {volume:+.1%} |"
            )
    worse = [
        f"seed {record['seed']}: {', '.join(record['lora_worse_than']['base']['structures']) or 'none'}"
        for record in records
    ]
    lines.append(
        f"\nStructures where LoRA is worse than the frozen base in Dice, HD95 or NSD: {'; '.join(worse)}."
    )
    lines += ["", *_gains(records)]
    lora, full = ([record["runs"][name] for record in records] for name in ("lora", "full"))
    share = lora[0]["trainable"] / full[0]["trainable"]
    size = max(
        a["checkpoint_bytes"] / b["checkpoint_bytes"] for a, b in zip(lora, full, strict=True)
    )
    lines.append(
        f"\nLoRA trains {share:.2%} of the parameters of full fine-tuning, and its checkpoint, optimizer included, is {size:.1%} of the size. "
        "Mean Dice over structures, and the paired difference, with bootstrap 95 % intervals: "
        + "; ".join(_interval(record) for record in records)
        + "."
    )
    return "\n".join(lines)


def _gains(records: list[dict[str, Any]]) -> list[str]:
    """A table of LoRA minus the frozen base in each group, for each seed."""
    lines = [
        "| held out | seed | LoRA − base: Dice (95 % interval) | HD95 mm | NSD@2 mm | over |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for group in records[0]["statistics"]["groups"]:
        for record in records:
            found = record["statistics"]["groups"][group]
            (pair,) = (p for p in found["pairs"] if (p["one"], p["other"]) == ("lora", "base"))
            over = f"{found['structures']} structures"
            if found["unit"] == "region":
                over = f"{pair['dice']['n']} regions of {over}"
            figures = [
                f"{pair[key]['mean']:+.{digits}f} ({pair[key]['low']:+.{digits}f} to {pair[key]['high']:+.{digits}f})"
                for key, digits in (("dice", 4), ("hd95_mm", 2), ("nsd", 4))
            ]
            lines.append(f"| {group} | {record['seed']} | {' | '.join(figures)} | {over} |")
    return lines


def _interval(record: dict[str, Any]) -> str:
    """Dice of LoRA and of full fine-tuning and their paired difference, for one seed."""

    def text(figures: dict[str, Any], sign: str = "") -> str:
        mean, low, high = (figures[key] for key in ("mean", "low", "high"))
        return f"{mean:{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"

    found = record["statistics"]
    means = {name: found["methods"][name]["dice"] for name in ("lora", "full")}
    (pair,) = (p for p in found["pairs"] if (p["one"], p["other"]) == ("lora", "full"))
    return (
        f"seed {record['seed']}: LoRA {text(means['lora'])}, full {text(means['full'])}, "
        f"LoRA − full {text(pair['dice'], '+')}"
    )


def tables() -> dict[Path, dict[str, str]]:
    """The tables of all records, by file and marker."""
    records = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    overhead = [record for record in records if record.get("kind") == "overhead"]
    mixed = [record for record in records if record.get("kind") == "mixed_batch"]
    # The compile gate's records have no table.
    records = [record for record in records if not {"kernels", "kind"} & record.keys()]
    kinds: dict[str, list[dict[str, Any]]] = {"cpu": [], "cuda": [], "medical": [], "step": []}
    for record in records:
        kind = record["environment"]["device"] if "results" in record else "medical"
        kinds["step" if "settings" in record else kind].append(record)
    return {
        ROOT / "README.md": {
            "speed": speed_table(kinds["cuda"]),
            "step": step_table(kinds["step"]),
            "dice": dice_table(kinds["medical"]),
        },
        ROOT / "docs" / "medical_experiments.md": {"medical": medical_table(kinds["medical"])},
        ROOT / "docs" / "benchmarks.md": {
            "targets": targets_table(kinds["cuda"]),
            "calls": calls_table([json.loads(p.read_text()) for p in RESULTS.glob("*/calls.json")]),
            "cpu": cpu_table(*kinds["cpu"]),
            "models": model_table(kinds["step"]),
            "mixed": mixed_table(mixed),
            "scaling": scaling_table(scaling_records()),
            "overhead": overhead_table(overhead),
            "gpu": case_tables(kinds["cuda"]),
        },
    }


def scaling_records() -> dict[str, dict[str, Any]]:
    """The records that have a plot, by their file name without its suffix, which is also the plot's."""
    return {
        path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("scaling-*.json"))
    }


def fill(text: str, found: dict[str, str], file: str = "README.md") -> str:
    """Return the text with each table written between `<!-- table: name -->` and `<!-- end -->`.

    Raises: ValueError if a marker is missing.
    """
    for name, table in found.items():
        start, end = f"<!-- table: {name} -->", "<!-- end -->"
        before, found_start, rest = text.partition(start)
        _, found_end, after = rest.partition(end)
        if not found_start or not found_end:
            raise ValueError(f"{file}: expected the markers {start} and {end}")
        text = f"{before}{start}\n{table}\n{end}{after}"
    return text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="change nothing, exit 1 if a file or a plot is not up to date",
    )
    arguments = parser.parse_args(argv)
    stale = []
    for path, found in tables().items():
        old = path.read_text()
        new = fill(old, found, path.name)
        if old != new:
            stale.append(path.name)
            if not arguments.check:
                path.write_text(new)
    for name, record in scaling_records().items():
        picture = RESULTS / f"{name}.png"
        if not plots.is_current(record, picture):
            stale.append(picture.name)
            if not arguments.check:
                plots.draw(record, picture)
    if arguments.check and stale:
        print(
            f"{', '.join(stale)}: a table or plot differs from the records; run python benchmarks/report.py",
            file=sys.stderr,
        )
    return int(arguments.check and bool(stale))


if __name__ == "__main__":
    raise SystemExit(main())
