"""The comparison of fastlora with the frozen layer and with PEFT: rows from a record, and these rows as text."""

from __future__ import annotations

import statistics
from typing import Any

from fastlora.benchmark.cases import BASELINE, FORWARD_BACKWARD, readable
from fastlora.benchmark.implementations import PEFTS
from fastlora.benchmark.record import Record

Row = dict[str, Any]
COLUMNS = (
    "linear ms",
    "fastlora ms",
    "PEFT ms",
    "PEFT's adapters",
    "fastlora / linear",
    "PEFT / fastlora",
    "saved MiB",
    "PEFT saved",
    "peak MiB",
    "PEFT peak",
)
NOTHING = "–"


def comparison(record: Record) -> list[Row]:
    """One row for each case, mode and timing that the frozen layer has a time of; what was not measured is None.

    Times are medians in milliseconds per call, ratios are of these medians. PEFT is the faster of its implementations; `peft_adapters` says which.
    """
    measured: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in record["results"]:
        key = row["case"], row["mode"], row["timing"]
        measured.setdefault(key, {})[row["backend"]] = row
    rows = []
    for (case, mode, timing), by_name in measured.items():
        linear, ours = by_name[BASELINE], by_name.get("fastlora", {})
        pefts = [by_name[name] for name in PEFTS if name in by_name]
        peft = min(pefts, key=lambda row: float(row["ms_p50"]), default={})
        rows.append(
            {
                "case": case,
                "mode": mode,
                "timing": timing,
                "linear_ms": linear["ms_p50"],
                "fastlora_ms": ours.get("ms_p50"),
                "peft_ms": peft.get("ms_p50"),
                "peft_adapters": PEFTS[peft["backend"]] if peft else None,
                "fastlora_over_linear": _ratio(ours.get("ms_p50"), linear["ms_p50"]),
                "peft_over_fastlora": _ratio(peft.get("ms_p50"), ours.get("ms_p50")),
                "fastlora_saved_bytes": ours.get("saved_bytes"),
                "peft_saved_bytes": peft.get("saved_bytes"),
                "fastlora_peak_bytes": ours.get("peak_bytes"),
                "peft_peak_bytes": peft.get("peak_bytes"),
            }
        )
    return rows


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else round(above / below, 4)


def table(rows: list[Row]) -> str:
    """The rows as text: a line with the layer, and below it a line for each mode and timing."""
    head = ["", *COLUMNS]
    groups: dict[str, list[list[str]]] = {}
    for row in rows:
        groups.setdefault(row["case"], []).append(_cells(row))
    lines = [head, *(cells for group in groups.values() for cells in group)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def text(cells: list[str]) -> str:
        first, *rest = cells
        numbers = (c.rjust(width) for c, width in zip(rest, widths[1:], strict=True))
        return "  ".join([first.ljust(widths[0]), *numbers])

    shown = [text(head)]
    for case, group in groups.items():
        shown += [readable(case), *map(text, group)]
    return "\n".join(shown)


def _cells(row: Row) -> list[str]:
    """The cells of a row, as text."""
    times = [_number(row[f"{name}_ms"], ".4g") for name in ("linear", "fastlora", "peft")]
    ratios = [_number(row[key], ".2f") for key in ("fastlora_over_linear", "peft_over_fastlora")]
    memory = [
        _number(None if size is None else size / 2**20, ".1f")
        for kind in ("saved", "peak")
        for size in (row[f"fastlora_{kind}_bytes"], row[f"peft_{kind}_bytes"])
    ]
    adapters = row["peft_adapters"] or NOTHING
    return [f"  {row['mode']}, {row['timing']}", *times, adapters, *ratios, *memory]


def _number(value: float | None, form: str) -> str:
    return NOTHING if value is None else format(value, form)


def verdict(record: Record) -> str:
    """PEFT's median time divided by fastlora's in forward + backward, for each case, a line for each timing."""
    ratios: dict[str, list[float]] = {}
    for row in comparison(record):
        if row["mode"] == FORWARD_BACKWARD and row["peft_over_fastlora"] is not None:
            ratios.setdefault(row["timing"], []).append(row["peft_over_fastlora"])
    if not ratios:
        return "forward+backward, PEFT / fastlora: not measured"
    return "\n".join(
        f"forward+backward, {timing}, PEFT / fastlora: median {statistics.median(values):.2f} of "
        + ", ".join(f"{value:.2f}" for value in values)
        for timing, values in ratios.items()
    )


def origin(record: Record) -> str:
    """Device, versions and repetitions of a record in one line."""
    facts = record["environment"]
    version = f"fastlora {facts['fastlora']}"
    if facts["git_sha"] is not None:
        changes = " with changes" if facts["dirty"] else ""
        version += f" (commit {facts['git_sha'][:12]}{changes})"
    where = [f"{facts['cpu']}, {facts['threads']} threads"]
    if facts["device"] == "cuda":
        where = [facts["gpu"], f"driver {facts['driver']}", f"CUDA {facts['cuda']}"]
    libraries = {"torch": "torch", "triton": "Triton", "peft": "PEFT"}
    found = [f"{libraries[key]} {facts[key]}" for key in libraries if facts[key] is not None]
    reps = f"medians of {facts['reps']} interleaved runs"
    return ", ".join([version, *where, *found, reps])
