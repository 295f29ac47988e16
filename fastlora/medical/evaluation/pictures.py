"""Charts, slices with outlines, and surfaces for the report and for predictions.

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
import trimesh
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from mpl_toolkits.mplot3d.art3d import Poly3DCollection
from nibabel.affines import apply_affine, voxel_sizes
from numpy.typing import NDArray

from fastlora.medical.evaluation.evaluate import LABELS, Run
from fastlora.medical.evaluation.results import distance_to_truth
from fastlora.medical.evaluation.tables import Content, words
from fastlora.medical.scans.geometry import Array, FloatArray, Mask, other_axes, zero_level
from fastlora.medical.scans.scan import Part
from fastlora.medical.scans.volumes import Volume
from fastlora.medical.scans.windows import Limits, windowed

MARKS = {
    "baseline": ("#767676", "circle-open"),
    "base": ("#D55E00", "square"),
    "lora": ("#0072B2", "circle"),
    "full": ("#009E73", "diamond"),
}
"""Colour and symbol in charts; none for merged LoRA, whose results equal those of LoRA."""


@dataclass(frozen=True)
class Line:
    """Style of a method's outline, distinct in colour, dashes and width."""

    label: str
    color: str
    dashes: tuple[float, ...]
    width: float


OUTLINES: dict[str, Line] = {
    "baseline": Line("Coarse segmentation (input)", "#FFFFFF", (), 1.2),
    "truth": Line("Ground truth", "#F0E442", (), 2.2),
    "base": Line(LABELS["base"], "#E8743B", (4.0, 2.0), 1.6),
    "lora": Line(LABELS["lora"], "#56B4E9", (1.2, 1.2), 1.8),
}
MASK = Line("input mask", "#F0E442", (), 1.2)
MESH = Line("section of the mesh", "#56B4E9", (), 1.4)
"""Colours of the Okabe-Ito palette, safe for colour-blind readers; dashes for printing in grey."""

# plane → sliced axis, horizontal axis, vertical axis of the image
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
        epochs = run.history
        color = MARKS[key][0]
        for subset, dash in (("train", "solid"), ("val", "dash")):
            points = [(e["epoch"], e[subset]["total"]) for e in epochs if subset in e]
            name = f"{LABELS[key]}, {'training' if subset == 'train' else 'validation'}"
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
    outlines = [key for key in OUTLINES if key != "baseline"]
    begin = 1.5 * float(voxel_sizes(affine)[0])
    for ax, plane, drawn in zip(
        axes, ("axial", *PLANES), (["baseline"], *3 * [outlines]), strict=True
    ):
        index = largest_slice(fields["truth"] < 0, PLANES[plane][0])
        draw_grey(ax, image, affine, plane, index, smooth=True)
        for key in drawn:
            draw_outline(ax, fields[key], affine, plane, index, OUTLINES[key])
        ax.plot([begin, begin + 10.0], [begin, begin], linewidth=2, **WHITE)
        ax.text(begin + 5.0, 1.4 * begin, "10 mm", fontsize=8, ha="center", **WHITE)
        ax.set_title(plane if drawn is outlines else f"{plane}: the input", fontsize=10)
    return png_bytes(figure)


def overlay_picture(image: Volume, limits: Limits, part: Part, mesh: trimesh.Trimesh) -> bytes:
    """PNG: outlines of the mask and of the mesh on three slices of the image, then the mesh in 3-D.

    image: defines the grid. limits: of its window. part: the mask. mesh:
    RAS mm; it is mapped by the image's affine, so that a misplaced mesh is visible.
    """
    figure = Figure(figsize=(13.0, 3.6), dpi=100, layout="constrained")
    in_index = apply_affine(np.linalg.inv(image.affine), mesh.vertices)
    in_mm = trimesh.Trimesh(in_index * image.spacing, mesh.faces, process=False)
    for n, (plane, (axis, across, up)) in enumerate(PLANES.items(), 1):
        ax = figure.add_subplot(1, 4, n)
        row = largest_slice(part.mask, axis)
        index = part.start[axis] + row
        slab = tuple(slice(index, index + 1) if a == axis else slice(None) for a in range(3))
        grey = windowed(image.array[slab], limits)
        signed = np.ones(grey.shape, np.int8)  # like distances: zero half way between voxels
        inside = tuple(slice(0, 1) if a == axis else part.box[a] for a in range(3))
        signed[inside][part.mask.take([row], axis)] = -1
        draw_grey(ax, grey, image.affine, plane, 0)
        draw_outline(ax, signed, image.affine, plane, 0, MASK)
        normal = np.eye(3)[axis]
        origin = normal * image.spacing * index + 1e-6  # so that no vertex lies in the plane
        cut = trimesh.intersections.mesh_plane(in_mm, normal, origin)[:, :, [across, up]]
        ax.add_collection(LineCollection(cut, colors=MESH.color, linewidths=MESH.width))
        ax.set_title(f"{plane}, slice {index}", fontsize=10)
    space = figure.add_subplot(1, 4, 4, projection="3d")
    triangles = mesh.vertices[mesh.faces]
    space.add_collection3d(
        Poly3DCollection(triangles, facecolors=MESH.color, shade=True, linewidth=0)
    )
    low, high = mesh.bounds
    middle, half = (low + high) / 2, float((high - low).max()) / 2
    for name, centre in zip("xyz", middle, strict=True):
        getattr(space, f"set_{name}lim")(centre - half, centre + half)
        getattr(space, f"set_{name}label")(f"{name} (mm, RAS)", fontsize=8)
    space.tick_params(labelsize=7)
    handles = [Line2D([], [], color=line.color, label=line.label) for line in (MASK, MESH)]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=9)
    return png_bytes(figure)


def largest_slice(mask: Mask, axis: int) -> int:
    """The index along an axis where a mask's cross-section is largest."""
    return int(mask.sum(axis=other_axes(axis)).argmax())


def png_bytes(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def draw_outline(
    ax: Axes, field: NDArray[Any], affine: FloatArray, plane: str, index: int, line: Line
) -> None:
    """Draw the zero level of a field (X, Y, Z) in a slice; arguments as of `draw_grey`."""
    axis, across, up = PLANES[plane]
    values = np.take(field, index, axis=axis).T
    if values.min() < 0 < values.max() and min(values.shape) > 1:
        x, y = (voxel_sizes(affine)[n] * np.arange(field.shape[n]) for n in (across, up))
        drawn = ax.contour(x, y, values, [0], colors=line.color, linewidths=line.width)
        drawn.set_linestyle((0, line.dashes) if line.dashes else "solid")


def draw_grey(
    ax: Axes, image: Array, affine: FloatArray, plane: str, index: int, smooth: bool = False
) -> None:
    """Draw a slice of an image (X, Y, Z) in [0, 1] and label the patient's sides.

    Coordinates are mm along the image's axes from the centre of its first voxel. affine: (4, 4)
    index to RAS mm. plane: of `PLANES`. index: of the slice. smooth: interpolate between pixels.
    """
    axis, across, up = PLANES[plane]
    spacing = voxel_sizes(affine)
    low, high = -0.5 * spacing, spacing * (np.array(image.shape) - 0.5)
    extent = (low[across], high[across], low[up], high[up])
    pixels = np.take(image, index, axis=axis).T  # rows run up, columns across
    style: dict[str, Any] = {"cmap": "gray", "vmin": 0, "vmax": 1, "origin": "lower"}
    ax.imshow(pixels, extent=extent, interpolation="bilinear" if smooth else None, **style)
    ax.set_axis_off()
    opposite = dict(zip("RLAPSI", "LRPAIS", strict=True))
    directions = nib.aff2axcodes(affine)
    right, top = directions[across], directions[up]
    if right in "RA":  # the patient's right and front are drawn on the left
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


def outline_legend() -> str:
    """A legend of `OUTLINES` as inline SVG."""
    items = []
    for line in OUTLINES.values():
        dashes = ",".join(f"{d * line.width:g}" for d in line.dashes)
        dash = f' stroke-dasharray="{dashes}"' if dashes else ""
        items.append(
            '<span class="key"><svg width="48" height="16" aria-hidden="true"><line x1="4" y1="8" '
            f'x2="44" y2="8" stroke="{line.color}" stroke-width="{line.width + 0.6:g}"{dash}/></svg>'
            f"{line.label}</span>"
        )
    return "".join(items)


def browser_region(sample: Mapping[str, Any], fields: Mapping[str, Array]) -> dict[str, Any]:
    """A region of the 3-D view: meshes of the ground truth and of `fields` (title → level set), and its box in mm."""
    truth = sample["sdf_vox"]
    meshes = [{"title": "Ground truth", **(browser_mesh(truth, sample, errors=False) or {})}]
    for title, field in fields.items():
        mesh = browser_mesh(field, sample)
        meshes.append({"title": title, **mesh} if mesh else {"title": f"{title} (no surface)"})
    corners = list(itertools.product(*((-0.5, n - 0.5) for n in truth.shape)))
    box = apply_affine(sample["affine"], corners)
    return {"meshes": meshes, "box": np.stack([box.min(0), box.max(0)], axis=1).round(1).tolist()}


def error_axis() -> dict[str, Any]:
    """The colour scale of signed distances to the ground truth: blue inside it, orange outside."""
    colors = ("#0050a0", "#7fb4e6", "#f2f2f2", "#f0a35e", "#a34700")
    return {
        "cmin": -ERROR_RANGE_MM,
        "cmax": ERROR_RANGE_MM,
        "colorscale": [[n / 4, color] for n, color in enumerate(colors)],
        "colorbar": {
            "title": {"text": "distance to<br>ground truth (mm)"},
            "thickness": 14,
            "len": 0.8,
        },
    }


def browser_mesh(
    field: Array, sample: Mapping[str, Any], errors: bool = True
) -> dict[str, Any] | None:
    """A surface as the report's script reads it, base64 of integers; None without a surface.

    It is open where the structure was cut at the cube's faces. sample: of `RegionDataset`. errors:
    include the `distance_to_truth` of each vertex, clipped to the range of int8 (6 mm).
    """
    if not (field.min() < 0 < field.max()):
        return None
    mesh = zero_level(field)
    mesh.apply_transform(sample["affine"])
    origin = mesh.vertices.mean(axis=0)
    steps = np.round((mesh.vertices - origin) / POSITION_UNIT_MM)
    result: dict[str, Any] = {
        "vertices": _base64(steps.clip(-32768, 32767), "<i2"),
        "faces": _base64(mesh.faces, "<u4"),
        "origin": [round(float(x), 3) for x in origin],
        "unit_mm": POSITION_UNIT_MM,
    }
    if errors:
        error = distance_to_truth(mesh, sample)
        result["error"] = _base64(np.round(error / ERROR_UNIT_MM).clip(-127, 127), "<i1")
        result["error_unit_mm"] = ERROR_UNIT_MM
    return result


def _base64(values: NDArray[Any], dtype: str) -> str:
    return base64.b64encode(np.ascontiguousarray(values).astype(dtype).tobytes()).decode()
