"""Draw the scaling curves and the roofline of a record in black and white."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from fastlora.files import atomic_write

# Implementations are distinguished by marker and line style, not by colour.
STYLES = {"linear": ("o", ":"), "fastlora": ("s", "-"), "peft": ("^", "--")}
LABELS = {"M": "rows M", "N": "outputs N", "R": "rank R", "layers": "layers"}


def digest(record: dict[str, Any]) -> str:
    """The hash of a record, stored in the plot that is drawn from it."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def is_current(record: dict[str, Any], picture: Path) -> bool:
    """Whether the plot exists and was drawn from this record."""
    return picture.is_file() and digest(record).encode() in picture.read_bytes()


def draw(record: dict[str, Any], picture: Path) -> None:
    """Draw a PNG with the time along each axis, and all points under the machine's roofline."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(2, 3).flat)
    for panel, (axis, label) in zip(panels, LABELS.items(), strict=False):
        _curves(panel, [row for row in record["points"] if row["axis"] == axis])
        panel.set(xlabel=label, ylabel="forward + backward, ms")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
    roofline, notes = panels[4], panels[5]
    _roofline(roofline, record)
    notes.axis("off")
    notes.legend(*panels[0].get_legend_handles_labels(), loc="upper left", frameon=False)
    facts, peaks = record["environment"], record["peaks"]
    notes.text(
        0.02,
        0.4,
        f"{facts.get('gpu', facts['cpu'])}\ntorch {facts['torch']}, PEFT {facts['peft']}\n"
        f"fastest GEMM {peaks['gflops']:,.0f} GFLOP/s\nfastest copy {peaks['gbps']:,.1f} GB/s",
    )
    source = {"Source": digest(record)}
    atomic_write(picture, lambda file: figure.savefig(file, dpi=100, format="png", metadata=source))


def _curves(panel: Any, rows: list[dict[str, Any]]) -> None:
    for name, (marker, line) in STYLES.items():
        mine = [row for row in rows if row["backend"] == name]
        values, times = [r["value"] for r in mine], [r["ms_p50"] for r in mine]
        panel.plot(
            values, times, marker=marker, linestyle=line, color="black", mfc="white", label=name
        )


def _roofline(panel: Any, record: dict[str, Any]) -> None:
    peaks = record["peaks"]
    ridge = peaks["gflops"] / peaks["gbps"]
    intensities = [row["flops"] / row["bytes"] for row in record["points"]]
    low, high = min(*intensities, ridge) / 2, max(*intensities, ridge) * 2
    panel.plot(
        [low, ridge, high], [low * peaks["gbps"], peaks["gflops"], peaks["gflops"]], color="black"
    )
    for name, (marker, _) in STYLES.items():
        mine = [row for row in record["points"] if row["backend"] == name]
        x = [row["flops"] / row["bytes"] for row in mine]
        y = [row["flops"] / row["ms_p50"] / 1e6 for row in mine]
        panel.plot(x, y, marker=marker, linestyle="", color="black", mfc="white")
    panel.set(
        xlabel="FLOP per byte (minimum traffic)", ylabel="GFLOP/s", xscale="log", yscale="log"
    )
