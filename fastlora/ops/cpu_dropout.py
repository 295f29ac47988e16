"""The dropout mask of a call on a CPU, from NumPy's Philox-4x64-10, which is written in C.

A row of x (M, K) owns G = ⌈K / 16⌉ steps of the counter, and a step gives four 64-bit words, that is sixteen 16-bit lanes, least
significant first. Element (i, j) is kept if lane j % 16 of counter i · G + ⌊j / 16⌋ + 1 under the key `seed` mod 2⁶⁴, read as an
unsigned number, is at least `reference.dropout_threshold(p)`.

So the mask depends on nothing but (seed, p, i, j, K): neither on threads nor on how the rows are cut into blocks, and NumPy
keeps the stream of its bit generators across versions. It is another mask than `reference.keep_mask`, which the kernels
compute, since 32-bit words are what a GPU multiplies fast.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastlora.ops.reference import dropout_threshold

_LANES = 16
# Lanes in a block of rows: its mask takes 128 KiB and its scratch 512 KiB in float32, so both stay in a core's cache.
_BLOCK_LANES = 128 * 1024
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Scratch:
    """A generator and the buffers of a block. They outlive the call: fresh memory is handed out page by page, which costs more than
    the work in it, and a new generator costs 20 times as much as a new state.
    """

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        self.philox = np.random.Philox(key=0)
        self.keep = torch.empty(lanes, dtype=torch.bool, device="cpu")
        self.keep_array = self.keep.numpy()
        self.work = torch.empty(lanes * 8, dtype=torch.uint8, device="cpu")  # of any dtype


# Taken while a mask is in use and given back, so that threads and nested calls never share one.
_idle: list[_Scratch] = []


def _take(lanes: int) -> _Scratch:
    try:
        scratch = _idle.pop()
    except IndexError:
        return _Scratch(max(lanes, _BLOCK_LANES))
    return scratch if scratch.lanes >= lanes else _Scratch(lanes)


def keep_blocks(x: Tensor, p: float, seed: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(which rows, their mask, scratch) for consecutive blocks of the rows of x (M, K), whose values are not read.

    The mask (block, K) bool and the scratch (block, K) of x's dtype are views of buffers that the next block, and
    the next caller, overwrite.
    """
    rows, cols = x.shape
    steps = -(-cols // _LANES)
    width = steps * _LANES
    block = max(1, min(rows, _BLOCK_LANES // max(1, width)))
    threshold = np.uint16(dropout_threshold(p))
    scratch = _take(block * width)
    scratch.philox.state = _state(int(seed))  # type: ignore[assignment]  # NumPy's stub asks for arrays
    work = scratch.work.view(x.dtype)
    try:
        for first in range(0, rows, block):
            count = min(block, rows - first)
            lanes = scratch.philox.random_raw(count * steps * 4).view(np.uint16)
            np.greater_equal(lanes, threshold, out=scratch.keep_array[: len(lanes)])
            yield (
                slice(first, first + count),
                scratch.keep.as_strided((count, cols), (width, 1)),
                work.as_strided((count, cols), (cols, 1)),
            )
    finally:
        _idle.append(scratch)


def _state(seed: int) -> dict[str, Any]:
    """The state of a Philox generator with this key whose next words are those of counter 1."""
    state = {"counter": (0, 0, 0, 0), "key": (seed & (2**64 - 1), 0)}
    empty = {"buffer": (0, 0, 0, 0), "buffer_pos": 4, "has_uint32": 0, "uinteger": 0}
    return {"bit_generator": "Philox", "state": state, **empty}


def zero_dropped(x: Tensor, keep: Tensor, out: Tensor) -> Tensor:
    """x where keep is true and 0 elsewhere, written to `out`, which may be x, and returned. All three have one shape, x and out one dtype.

    The product of the bits as integers: exact for infinities and NaN too, and a third of the time of `torch.where` or less.
    """
    integer = _INTEGERS[x.element_size()]
    torch.mul(x.view(integer), keep.view(torch.int8), out=out.view(integer))
    return out


@torch.library.custom_op("fastlora::cpu_keep", mutates_args=(), device_types="cpu")
def keep_mask(seed: Tensor, p: float, rows: int, cols: int) -> Tensor:
    """The whole mask (rows, cols) bool, as one operator: torch.compile and functorch see a node, not NumPy.

    seed: 0-d int64 on the CPU; under vmap it may have a value of its own for each sample.
    """
    mask = torch.empty(rows, cols, dtype=torch.bool, device="cpu")
    for block, keep, _ in keep_blocks(mask, p, seed):
        mask[block] = keep
    return mask


@keep_mask.register_fake
def _(seed: Tensor, p: float, rows: int, cols: int) -> Tensor:
    return seed.new_empty((rows, cols), dtype=torch.bool)


@keep_mask.register_vmap
def _(info: Any, in_dims: Any, seed: Tensor, p: float, rows: int, cols: int) -> tuple[Tensor, int]:
    return torch.stack([keep_mask(one, p, rows, cols) for one in seed.unbind(in_dims[0])]), 0
