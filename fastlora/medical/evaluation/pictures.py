"""Graphics of the report: charts, slices with outlines, and surfaces.

Charts and surfaces are JSON values that plotly.js draws in the browser.
"""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates

from fastlora.medical.data.geometry import FloatArray, apply_affine, spacing_of
from fastlora.medical.data.grids import Array
from fastlora.medical.evaluation.evaluate import LABELS, Run
from fastlora.medical.evaluation.metrics import zero_level
from fastlora.medical.evaluation.tables import words

Content = Mapping[str, Any]

MARKS = {
    "baseline": ("#767676", "circle-open"),
    "base": ("#D55E00", "square"),
    "lora": ("#0072B2", "circle"),
    "full": ("#009E73", "diamond"),
}
"""Colour and symbol in charts; none for merged LoRA, whose figures equal LoRA's."""


@dataclass(frozen=True)
class Line:
    """Style of a method's outline, distinct in colour, dashes and width."""

    label: str
    color: str
    dashes: tuple[float, ...]
    width: float


OUTLINES: dict[str, Line] = {
    "baseline": Line("Coarse structure, the input", "#FFFFFF", (), 1.2),
    "truth": Line("True outline", "#F0E442", (), 2.2),
    "base": Line(LABELS["base"], "#E8743B", (4.0, 2.0), 1.6),
    "lora": Line(LABELS["lora"], "#56B4E9", (1.2, 1.2), 1.8),
}
"""Colours of the Okabe-Ito palette, safe for colour-blind readers; dashes for printing in grey."""

# plane → sliced axis, horizontal axis, vertical axis of the picture
PLANES = {"axial": (2, 0, 1), "coronal": (1, 0, 2), "sagittal": (0, 1, 2)}
WHITE: dict[str, Any] = {
    "color": "white",
    "path_effects": [withStroke(linewidth=3, foreground="black")],
}
ERROR_RANGE_MM = 4.0
POSITION_UNIT_MM = 0.01
ERROR_UNIT_MM = 0.05


def _layout(title: str, x: str, y: str, **more: Any) -> dict[str, Any]:
    axis = {"gridcolor": "#d8dee4", "zeroline": False, "automargin": True}
    return {
        "title": {"text": title, "font": {"size": 15}, "x": 0, "xref": "paper"},
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": "#1b1f24"},
        "margin": {"l": 50, "r": 15, "t": 40, "b": 100},
        "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0},
        "plot_bgcolor": "#fff",
        "paper_bgcolor": "#fff",
        "xaxis": {"title": {"text": x}, **axis},
        "yaxis": {"title": {"text": y}, **axis},
        **more,
    }


def dice_chart(content: Content) -> dict[str, Any]:
    """Dice of each structure: one row per structure, one mark per method."""
    dice: dict[str, dict[tuple[str, str], float | None]] = {}
    for r in content["structures"]:
        dice.setdefault(r["method"], {})[r["subject"], r["structure"]] = r["dice"]
    lora = [r for r in content["structures"] if r["method"] == "lora"]
    lora.sort(key=lambda r: (r["group"], -(r["dice"] or 0)))
    order = [(r["subject"], r["structure"]) for r in lora]
    names = [f"{words(structure)} ({subject})" for subject, structure in order]
    data: list[dict[str, Any]] = []
    for method in (m for m in MARKS if m in dice):
        color, symbol = MARKS[method]
        line = {"width": 2, "color": color}
        marker = {"color": color, "symbol": symbol, "size": 10, "line": line}
        trace = {"type": "scatter", "mode": "markers", "name": LABELS[method], "marker": marker}
        data.append({**trace, "x": [dice[method][key] for key in order], "y": names})
    layout = _layout(
        "Dice of each structure", "Dice", "", height=150 + 26 * len(names), hovermode="y unified"
    )
    layout["yaxis"]["autorange"] = "reversed"
    return {"data": data, "layout": layout}


def training_charts(runs: Mapping[str, Run]) -> dict[str, dict[str, Any]]:
    """Loss, and Dice of the validation regions, by epoch."""
    loss, validation = [], []
    for key, run in runs.items():
        epochs = run.history["epochs"]
        color = MARKS[key][0]
        for part, dash in (("train", "solid"), ("val", "dash")):
            points = [(e["epoch"], e[part]["total"]) for e in epochs if part in e]
            name = f"{LABELS[key]}, {'training' if part == 'train' else 'validation'}"
            loss.append(_curve(name, points, color, dash))
        points = [(e["epoch"], e["val"]["dice"]) for e in epochs]
        validation.append(_curve(LABELS[key], points, color, "solid"))
    return {
        "loss-chart": {"data": loss, "layout": _layout("Loss", "epoch", "loss", height=380)},
        "validation-chart": {
            "data": validation,
            "layout": _layout("Dice on the validation regions", "epoch", "Dice", height=380),
        },
    }


def _curve(name: str, points: Sequence[tuple[int, float]], color: str, dash: str) -> dict[str, Any]:
    x, y = zip(*points, strict=True) if points else ((), ())
    line = {"color": color, "dash": dash, "width": 2}
    return {"type": "scatter", "mode": "lines", "name": name, "x": x, "y": y, "line": line}


def slice_picture(image: Array, fields: Mapping[str, Array], affine: FloatArray) -> bytes:
    """PNG: the input in an axial slice, then axial, coronal and sagittal slices with the outlines.

    image: (X, Y, Z) in [0, 1]. fields: for each of `OUTLINES` (X, Y, Z), negative inside.
    affine: (4, 4) index to mm, isotropic.
    """
    figure = Figure(figsize=(12.0, 3.25), dpi=100, layout="constrained")
    axes = figure.subplots(1, 4)
    inside = fields["truth"] < 0
    inputs = {"baseline": fields["baseline"]}
    outlines = {key: fields[key] for key in OUTLINES if key not in inputs}
    for ax, plane, drawn in zip(axes, ("axial", *PLANES), (inputs, *3 * [outlines]), strict=True):
        axis = PLANES[plane][0]
        rest = tuple(n for n in range(3) if n != axis)
        index = int(inside.sum(axis=rest).argmax())
        _draw_slice(ax, image, drawn, affine, plane, index)
        ax.set_title(f"{plane}: the input" if drawn is inputs else plane, fontsize=10)
    return png_bytes(figure)


def png_bytes(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw_slice(
    ax: Axes,
    image: Array,
    fields: Mapping[str, Array],
    affine: FloatArray,
    plane: str,
    index: int,
) -> None:
    axis, across, up = PLANES[plane]
    draw_grey(ax, image, affine, plane, index, "bilinear")
    spacing = float(spacing_of(affine)[0])  # isotropic
    for name, field in fields.items():
        values, line = np.take(field, index, axis=axis).T, OUTLINES[name]
        if values.min() < 0 < values.max():
            y, x = (spacing * np.arange(count) for count in values.shape)
            drawn = ax.contour(x, y, values, [0.0], colors=line.color, linewidths=line.width)
            drawn.set_linestyle((0, line.dashes) if line.dashes else "solid")
    begin = 1.5 * spacing
    ax.plot([begin, begin + 10.0], [begin, begin], linewidth=2, **WHITE)
    ax.text(begin + 5.0, begin + 0.6 * spacing, "10 mm", fontsize=8, ha="center", **WHITE)


def draw_grey(
    ax: Axes,
    image: Array,
    affine: FloatArray,
    plane: str,
    index: int,
    interpolation: str | None = None,
) -> None:
    """Draw a slice of an image (X, Y, Z) in [0, 1] and label the patient's sides.

    Coordinates are mm along the image's axes from the centre of its first voxel. affine: (4, 4)
    index to RAS mm. plane: of `PLANES`. index: of the slice.
    """
    axis, across, up = PLANES[plane]
    spacing = spacing_of(affine)
    low, high = -0.5 * spacing, spacing * (np.array(image.shape) - 0.5)
    extent = (low[across], high[across], low[up], high[up])
    pixels = np.take(image, index, axis=axis).T  # rows run up, columns across
    style: dict[str, Any] = {"cmap": "gray", "vmin": 0, "vmax": 1, "origin": "lower"}
    ax.imshow(pixels, extent=extent, interpolation=interpolation, **style)
    ax.set_axis_off()
    opposite = dict(zip("RLAPSI", "LRPAIS", strict=True))
    directions = nib.aff2axcodes(affine)
    right, top = directions[across], directions[up]
    if right in "RA":  # right and front of the patient are drawn on the left
        ax.invert_xaxis()
        right = opposite[right]
    for letter, x, y, ha, va in (
        (opposite[right], 0.03, 0.5, "left", "center"),
        (right, 0.97, 0.5, "right", "center"),
        (opposite[top], 0.5, 0.03, "center", "bottom"),
        (top, 0.5, 0.97, "center", "top"),
    ):
        ax.text(x, y, letter, transform=ax.transAxes, ha=ha, va=va, fontsize=10, **WHITE)


def png_tag(png: bytes, alt: str) -> str:
    """An <img> with embedded data. alt: plain text without quotes."""
    return f'<img alt="{alt}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def outline_legend(keys: Sequence[str]) -> str:
    """A legend of the outlines as inline SVG."""
    items = []
    for key in keys:
        line = OUTLINES[key]
        dashes = ",".join(f"{d * line.width:g}" for d in line.dashes)
        dash = f' stroke-dasharray="{dashes}"' if dashes else ""
        items.append(
            '<span class="key"><svg width="48" height="16" aria-hidden="true"><line x1="4" y1="8" '
            f'x2="44" y2="8" stroke="{line.color}" stroke-width="{line.width + 0.6:g}"{dash}/></svg>'
            f"{line.label}</span>"
        )
    return "".join(items)


def browser_region(sample: Mapping[str, Any], fields: Mapping[str, Array]) -> dict[str, Any]:
    """A region of the 3-D view: meshes of the truth and of `fields` (title → level set), and its box in mm."""
    truth, affine = sample["sdf_vox"], sample["affine"]
    meshes: list[dict[str, Any]] = [{"title": "Truth", **(browser_mesh(truth, affine) or {})}]
    for title, field in fields.items():
        mesh = browser_mesh(field, affine, truth, float(sample["spacing"]))
        meshes.append({"title": title, **mesh} if mesh else {"title": f"{title} (no surface)"})
    corners = np.array(list(itertools.product(*((-0.5, n - 0.5) for n in truth.shape))))
    box = apply_affine(affine, corners)
    return {"meshes": meshes, "box": np.stack([box.min(0), box.max(0)], axis=1).round(1).tolist()}


def error_axis() -> dict[str, Any]:
    """The colour scale of signed distances to the truth: blue inside it, orange outside."""
    colors = ("#0050a0", "#7fb4e6", "#f2f2f2", "#f0a35e", "#a34700")
    return {
        "cmin": -ERROR_RANGE_MM,
        "cmax": ERROR_RANGE_MM,
        "colorscale": [[n / 4, color] for n, color in enumerate(colors)],
        "colorbar": {"title": {"text": "distance to<br>truth (mm)"}, "thickness": 14, "len": 0.8},
    }


def browser_mesh(
    field: Array,
    affine: FloatArray,
    true_sdf_vox: Array | None = None,
    spacing: float = 1.0,
) -> dict[str, Any] | None:
    """A surface as the report's script reads it, base64 of integers; None without a surface.

    It is open where the structure was cut at the cube's faces. true_sdf_vox: (X, Y, Z) in voxels of
    `spacing` mm; if given, each vertex has its signed distance to the true surface in mm, clipped
    to the range of int8 (6 mm) and to the truncation of the truth.
    """
    if not (field.min() < 0 < field.max()):
        return None
    mesh = zero_level(field)
    vertices = apply_affine(affine, mesh.vertices)
    origin = vertices.mean(axis=0)
    steps = np.round((vertices - origin) / POSITION_UNIT_MM)
    result: dict[str, Any] = {
        "vertices": _base64(steps.clip(-32768, 32767), "<i2"),
        "faces": _base64(mesh.faces, "<u4"),
        "origin": [round(float(x), 3) for x in origin],
        "unit_mm": POSITION_UNIT_MM,
    }
    if true_sdf_vox is not None:
        error = spacing * map_coordinates(true_sdf_vox, mesh.vertices.T, order=1, mode="nearest")
        result["error"] = _base64(np.round(error / ERROR_UNIT_MM).clip(-127, 127), "<i1")
        result["error_unit_mm"] = ERROR_UNIT_MM
    return result


def _base64(values: NDArray[Any], dtype: str) -> str:
    return base64.b64encode(np.ascontiguousarray(values).astype(dtype).tobytes()).decode()
