"""Pictures of a mesh on slices of its image, and in 3-D."""

from __future__ import annotations

import numpy as np
import trimesh
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from mpl_toolkits.mplot3d.art3d import Poly3DCollection
from numpy.typing import NDArray

from fastlora.medical.data.geometry import Mask, apply_affine
from fastlora.medical.data.volumes import Volume
from fastlora.medical.evaluation.pictures import PLANES, draw_grey, png_bytes

MASK_COLOR, MESH_COLOR = "#F0E442", "#56B4E9"


def overlay_picture(
    image: Volume, grey: NDArray[np.float32], mask: Mask, mesh: trimesh.Trimesh
) -> bytes:
    """PNG: outlines of the mask and of the mesh on three slices of the image, then the mesh in 3-D.

    image: defines the grid. grey: (X, Y, Z) its windowed voxels in [0, 1]. mask: (X, Y, Z). mesh:
    RAS mm; it is mapped by the image's affine, so a misplaced mesh is visible.
    """
    figure = Figure(figsize=(13.0, 3.6), dpi=100, layout="constrained")
    in_index = apply_affine(np.linalg.inv(image.affine), mesh.vertices)
    in_mm = trimesh.Trimesh(in_index * image.spacing, mesh.faces, process=False)
    for n, plane in enumerate(PLANES):
        ax = figure.add_subplot(1, 4, n + 1)
        axis = PLANES[plane][0]
        index = int(mask.sum(axis=tuple(a for a in range(3) if a != axis)).argmax())
        _draw(ax, image, grey, mask, in_mm, plane, index)
        ax.set_title(f"{plane}, slice {index}", fontsize=10)
    space = figure.add_subplot(1, 4, 4, projection="3d")
    triangles = mesh.vertices[mesh.faces]
    space.add_collection3d(
        Poly3DCollection(triangles, facecolors=MESH_COLOR, shade=True, linewidth=0)
    )
    low, high = mesh.bounds
    middle, half = (low + high) / 2, float((high - low).max()) / 2
    for name, centre in zip("xyz", middle, strict=True):
        getattr(space, f"set_{name}lim")(centre - half, centre + half)
        getattr(space, f"set_{name}label")(f"{name} (mm, RAS)", fontsize=8)
    space.tick_params(labelsize=7)
    lines = [("input mask", MASK_COLOR), ("cut through the mesh", MESH_COLOR)]
    handles = [Axes.plot(ax, [], [], color=color, label=label)[0] for label, color in lines]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=9)
    return png_bytes(figure)


def _draw(
    ax: Axes,
    image: Volume,
    grey: NDArray[np.float32],
    mask: Mask,
    mesh: trimesh.Trimesh,
    plane: str,
    index: int,
) -> None:
    """One slice, in the coordinates of `draw_grey`; the mesh is in the same coordinates."""
    axis, across, up = PLANES[plane]
    draw_grey(ax, grey, image.affine, plane, index)
    drawn = np.take(mask, index, axis=axis).T
    if drawn.any() and not drawn.all() and min(drawn.shape) > 1:
        x, y = (image.spacing[n] * np.arange(image.shape[n]) for n in (across, up))
        ax.contour(x, y, drawn, [0.5], colors=MASK_COLOR, linewidths=1.2)
    normal, origin = np.zeros(3), np.zeros(3)
    normal[axis] = 1.0
    origin[axis] = image.spacing[axis] * index + 1e-6  # avoids vertices in the plane
    cut = trimesh.intersections.mesh_plane(mesh, normal, origin)
    ax.add_collection(LineCollection(cut[:, :, [across, up]], colors=MESH_COLOR, linewidths=1.4))
