"""bfloat16 in Triton's interpreter, for tests without a GPU.

The interpreter holds bfloat16 as its bits, in uint16, and "does not support operations on bfloat16 numeric types" (Triton's page "Debugging
Triton"). Loads, stores, selects and changes of shape move the bits, so they are right. Products, and conversions from and to float32, are
replaced here. Everything else stays wrong, and no kernel has it: sums, products of elements, comparisons, conversions of integers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from fastlora.ops import dispatch

_create_dot, _cast_impl = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl


@contextmanager
def bfloat16() -> Iterator[None]:
    """Within this context the interpreter computes in bfloat16, and `dispatch` lets it; on a device nothing changes."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    with (
        mock.patch.multiple(InterpreterBuilder, create_dot=_dot, cast_impl=_cast),
        mock.patch.object(dispatch, "_INTERPRETED", dispatch._DTYPES),
    ):
        yield


def _dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> TensorHandle:
    """a b + d. Fault: the bits are multiplied, as integers. A tensor core multiplies exactly and adds in float32, as here."""
    if a.dtype.scalar != tl.bfloat16:
        return _create_dot(self, a, b, d, *options)
    return TensorHandle(np.matmul(_widened(a.data), _widened(b.data)) + d.data, d.dtype.scalar)


def _cast(self: Any, src: Any, dst_type: Any) -> TensorHandle:
    """Faults: float32 is cut to bfloat16 instead of rounded to the nearest, and subnormal numbers become others in both directions."""
    pair = (src.dtype.scalar, dst_type.scalar)
    if pair == (tl.bfloat16, tl.float32):
        return TensorHandle(_widened(src.data), tl.float32)
    if pair == (tl.float32, tl.bfloat16):
        return TensorHandle(_rounded(src.data), tl.bfloat16)
    return _cast_impl(self, src, dst_type)


def _widened(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The float32 of the same value: bfloat16 is its upper half."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _rounded(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of the nearest bfloat16, of two the even one; a NaN stays one."""
    bits = values.view(np.uint32)
    nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, nearest).astype(np.uint16)
