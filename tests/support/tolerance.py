"""The rule for comparing results with a float64 reference, and the rule by which results must differ."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TF32_EPS = 2.0**-10  # of a product of float32 operands on tensor cores, which keep 10 bits of each


def assert_close(
    got: Tensor, same_dtype: Tensor, reference64: Tensor, name: str = "", eps: float | None = None
) -> None:
    """max|got − ref64| ≤ 2·max|same_dtype − ref64| + 4·eps·max|ref64|, where eps belongs to got's dtype, if it is not given.

    same_dtype: plain torch's result in got's dtype, whose error is that of the dtype. In float64 it shows none, since the reference itself
    has it: there 8·eps are allowed.
    """
    assert got.shape == reference64.shape, (
        f"{name}: {tuple(got.shape)} != {tuple(reference64.shape)}"
    )
    assert got.dtype == same_dtype.dtype, f"{name}: {got.dtype} != {same_dtype.dtype}"
    if got.numel() == 0:
        return
    error = (got.double() - reference64).abs().max().item()
    allowed = 2 * (same_dtype.double() - reference64).abs().max().item()
    eps = torch.finfo(got.dtype).eps if eps is None else eps
    allowed += (8 if got.dtype == torch.float64 else 4) * eps * reference64.abs().max().item()
    assert error <= allowed, f"{name}: error {error:.3e} > allowed {allowed:.3e}"


def assert_differs(one: Tensor, other: Tensor) -> None:
    """Some |one − other| > 1e-4 + 1e-5·|other|: more than float32 rounding at the size of logits, so an adapter has an effect."""
    assert not torch.allclose(one, other, rtol=1e-5, atol=1e-4), "the two are the same"


def assert_moved(one: Tensor, other: Tensor) -> None:
    """Some |one − other| > 1e-3 + 1e-5·|other| voxels: outputs of a decoder that large changes of its adapters moved."""
    assert not torch.allclose(one, other, rtol=1e-5, atol=1e-3), "the two are the same"


def assert_same_training(got: Tensor, want: Tensor) -> None:
    """|got − want| ≤ 1e-5 + 1e-3·|want|: weights and optimizer moments after steps with a different order of summation."""
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


def assert_same_distances(got: NDArray[np.floating], want: NDArray[np.floating]) -> None:
    """|got − want| ≤ 1e-5 voxels: signed distances that one model predicted twice, in batches of different sizes."""
    np.testing.assert_allclose(got, want, rtol=1e-7, atol=1e-5)


def assert_same_geometry(got: NDArray[np.floating], want: NDArray[np.floating] | float) -> None:
    """|got − want| ≤ 1e-6·|want|: millimetres that were rounded to float32, against an expression for them."""
    np.testing.assert_allclose(got, want, rtol=1e-6)


def assert_same_means(got: Sequence[float], want: Sequence[float]) -> None:
    """|got − want| ≤ 2e-3 + 1e-7·|want|: means over small images, recorded on another machine."""
    np.testing.assert_allclose(got, want, atol=2e-3)


def assert_same_points(got: object, want: NDArray[np.floating]) -> None:
    """|got − want| ≤ 1e-5·|want|: positions in mm that were computed in float32."""
    np.testing.assert_allclose(got, want, rtol=1e-5)  # type: ignore[arg-type]


def assert_exact_geometry(got: NDArray[np.floating], want: NDArray[np.floating] | float) -> None:
    """|got − want| ≤ 1e-9 + 1e-7·|want|: affine maps in float64."""
    np.testing.assert_allclose(got, want, atol=1e-9)


def assert_same_pixels(got: Tensor, want: Tensor) -> None:
    """|got − want| ≤ 1e-5 + 1e-6·|want|: float32 images and positions in mm that were only moved in memory."""
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-5)


def assert_follows(got: Tensor, want: Tensor) -> None:
    """|got − want| ≤ 1e-5 + 1e-6·|want|: float32 results of code, against the equation that it should follow."""
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-5)


def assert_same_steps(got: Tensor, want: Tensor) -> None:
    """|got − want| ≤ 1e-4 mm: differences of positions in float32, of up to some hundred mm."""
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


def assert_same_field(got: NDArray[np.floating], want: NDArray[np.floating]) -> None:
    """|got − want| ≤ 1e-4 + 1e-7·|want| voxels: blended distances from batches of different sizes."""
    np.testing.assert_allclose(got, want, atol=1e-4)


def assert_same_place(
    got: NDArray[np.floating], want: NDArray[np.floating] | Sequence[float]
) -> None:
    """|got − want| ≤ 1e-3 + 1e-7·|want| mm: positions that a file stores in float32 or as text."""
    np.testing.assert_allclose(got, want, atol=1e-3)


def assert_same_centre(got: NDArray[np.floating], want: NDArray[np.floating]) -> None:
    """|got − want| ≤ 1 + 1e-7·|want| mm: the centre of mass of a mesh, against the mean of its label's voxels."""
    np.testing.assert_allclose(got, want, atol=1.0)


def assert_same_window(got: NDArray[np.floating], want: NDArray[np.floating]) -> None:
    """|got − want| ≤ 1e-6 + 1e-7·|want|: intensities in float32, scaled to 0 … 1 in two orders."""
    np.testing.assert_allclose(got, want, atol=1e-6)


def assert_same_gradient(got: Tensor, want: Tensor) -> None:
    """|got − want| ≤ 1e-6 + 1e-4·|want|: float32 gradients of a model from two orders of summation."""
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def assert_same_product(got: Tensor, want: Tensor) -> None:
    """|got − want| ≤ 1e-5 + 1e-5·|want|: small products in float32, in two orders."""
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def assert_same_units(got: NDArray[np.floating], want: NDArray[np.floating], unit: float) -> None:
    """|got − want| ≤ one unit + 1e-7·|want|: values that a page stores as whole numbers of this unit."""
    np.testing.assert_allclose(got, want, atol=unit)


def assert_same_gap(got: NDArray[np.floating], want: float) -> None:
    """|got − want| ≤ 0.15 + 1e-7·|want| mm, a tenth of a voxel: distances between concentric balls that are sampled on voxels of 1.5 mm."""
    np.testing.assert_allclose(got, want, atol=0.15)


def assert_near(
    got: NDArray[np.floating], want: NDArray[np.floating] | Sequence[float], voxel: float
) -> None:
    """|got − want| ≤ 1.5 voxels + 1e-7·|want|, in mm: the centre of a surface, against that of the voxels inside it."""
    np.testing.assert_allclose(got, want, atol=1.5 * voxel)


def assert_same_affine(got: NDArray[np.floating], want: NDArray[np.floating]) -> None:
    """|got − want| ≤ 1e-4 + 1e-7·|want| mm: affine maps, and positions by them, of which a file stores one in float32."""
    np.testing.assert_allclose(got, want, atol=1e-4)


def assert_same_intensities(got: NDArray[np.floating], want: NDArray[np.floating]) -> None:
    """|got − want| ≤ the eps of float32: intensities in [0, 1], resampled in two ways."""
    np.testing.assert_allclose(got, want, rtol=0, atol=np.finfo(np.float32).eps)
