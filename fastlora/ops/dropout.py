"""The dropout mask: which elements of x (M, K) a call keeps, as a pure function of a seed, the row and the column.

So it does not depend on tiles, blocks of rows or threads, and the backward pass recomputes it instead of storing it. There are two
definitions; `keep_mask` chooses between them:

`kernel_mask`, for the Triton kernels and every device except a CPU: Philox-4x32-7, because a GPU multiplies 32-bit words fast.
`kernels/dropout.py` computes the same bits.

`cpu_mask`, for calls on a CPU: NumPy's Philox-4x64-10, which is written in C. A row has G = ⌈K / 16⌉ steps of the counter; a step
yields four 64-bit words, that is sixteen 16-bit lanes, least significant first. Element (i, j) is kept if lane j % 16 of
counter i · G + ⌊j / 16⌋ + 1 under the key `seed` mod 2⁶⁴, read as an unsigned number, is at least `dropout_threshold(p)`. NumPy
guarantees the stream of its bit generators across versions.

Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011) for Philox.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Philox-4x32-7: the fewest rounds that pass BigCrush (Salmon et al., table 2), and those of FlashAttention's dropout
MASK32, MASK64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 7
LANES = 8  # one call yields four 32-bit words, that is eight 16-bit lanes

_CPU_LANES = 16
# Lanes in a block of rows: its mask has 128 KiB and its scratch 512 KiB in float32, so both stay in a core's cache.
_BLOCK_LANES = 128 * 1024
# At most as many elements are masked at once, by fewer and slower operations than a block.
FEW_ELEMENTS = 16 * 1024
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def dropout_threshold(p: float) -> int:
    """`p` in units of 2⁻¹⁶, rounded to nearest: a 16-bit lane below it is dropped. 0 ≤ p < 1 becomes 0 … 65535."""
    return min(round(p * 65536), 65535)


def keep_scale(p: float) -> float:
    """1 / (1 − p') with p' the quantised probability that is applied."""
    return 65536 / (65536 - dropout_threshold(p))


def keep_mask(
    x: Tensor, p: float, seed: Tensor | None, triton: bool = False, first_row: int = 0
) -> Tensor | None:
    """The elements of x (M, K) that a call keeps, (M, K) bool; None without a seed. x's values are not read.

    triton: whether Triton kernels run the call; their mask is `kernel_mask` wherever they run.
    first_row: x is a part of the input of the call, which starts at this row.
    """
    if seed is None:
        return None
    if x.device.type == "cpu" and not triton:
        mask: Tensor = cpu_mask(seed, p, x.shape[0], x.shape[1], first_row)
        return mask
    return kernel_mask(seed, p, x.shape[0], x.shape[1], first_row, x.device)


def philox_4x32(
    seed: Tensor | int, c0: Tensor, c1: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32-7 of the counter (c0, c1, 0, 0) under the 64-bit key `seed`.

    c0, c1: int64 tensors with values in [0, 2³²), broadcast against each other.
    Returns four int64 tensors whose low 32 bits are the random words; the bits above are undefined.
    """
    # 32-bit unsigned words live in int64. A product of two of them wraps to the right 64 bits, and what the arithmetic
    # shift `>>` leaves in the high bits is cleared by the next `& MASK32`. Early rounds stay small by broadcasting.
    key_0, key_1 = seed & MASK32, (seed >> 32) & MASK32
    c2 = c3 = torch.zeros_like(c0)
    for _ in range(ROUNDS):
        product_0, product_1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0 = ((product_1 >> 32) ^ c1 ^ key_0) & MASK32
        c2 = ((product_0 >> 32) ^ c3 ^ key_1) & MASK32
        c1, c3 = product_1, product_0
        key_0, key_1 = (key_0 + KEY_STEPS[0]) & MASK32, (key_1 + KEY_STEPS[1]) & MASK32
    return c0, c1, c2, c3


def kernel_mask(
    seed: Tensor | int,
    p: float,
    rows: int,
    cols: int,
    first_row: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Which elements of x the dropout keeps: a pure function of (seed, row, column).

    Element (i, j) uses the Philox counter (j // 8, i, 0, 0) and its lane j % 8: the low halves of the four words, then their high
    halves. A lane is an unsigned 16-bit number, and the element is kept if it is at least the threshold.

    seed: int64, a 0-d tensor or an int. p: 0 ≤ p < 1, quantised to multiples of 2⁻¹⁶.
    rows, cols: the shape of the requested part of the mask, which starts at row `first_row` of x.
    Returns (rows, cols) bool on `device`.
    """
    groups = -(-cols // LANES)
    column_group = torch.arange(groups, device=device)[None, :]
    row = torch.arange(first_row, first_row + rows, device=device)[:, None]
    words = philox_4x32(seed, column_group, row)
    halves = torch.stack(
        [word & 0xFFFF for word in words] + [(word >> 16) & 0xFFFF for word in words], dim=-1
    )
    return (halves.view(rows, groups * LANES) >= dropout_threshold(p))[:, :cols]


class _Scratch:
    """A generator and the buffers of a block. They are reused: newly allocated memory is mapped page by page, which costs more than
    the computation, and a new generator costs 20 times as much as a new state.
    """

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        self.philox = np.random.Philox(key=0)
        self.keep = torch.empty(lanes, dtype=torch.bool, device="cpu")
        self.keep_array = self.keep.numpy()
        self.work = torch.empty(lanes * 8, dtype=torch.uint8, device="cpu")  # of any dtype


# Removed while a mask is in use and returned afterwards, so that threads and nested calls never share one.
_idle: list[_Scratch] = []


def _take(lanes: int) -> _Scratch:
    try:
        scratch = _idle.pop()
    except IndexError:
        return _Scratch(max(lanes, _BLOCK_LANES))
    return scratch if scratch.lanes >= lanes else _Scratch(lanes)


def keep_blocks(
    x: Tensor, p: float, seed: Tensor, first_row: int = 0
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(rows, their mask, scratch) for consecutive blocks of the rows of x (M, K), whose values are not read. first_row: as in `keep_mask`.

    The mask (block, K) bool and the scratch (block, K) of x's dtype are views of buffers that the next block, and
    the next caller, overwrite.
    """
    rows, cols = x.shape
    steps = -(-cols // _CPU_LANES)
    width = steps * _CPU_LANES
    block = max(1, min(rows, _BLOCK_LANES // max(1, width)))
    threshold = _threshold(p)
    scratch = _take(block * width)
    scratch.philox.state = _state(int(seed), first_row * steps)  # type: ignore[assignment]  # NumPy's stub asks for arrays
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


def dropped(x: Tensor, p: float, seed: Tensor, first_row: int = 0) -> Tensor:
    """The elements of x (M, K) that a call on a CPU drops, (M, K) bool, not to be changed: the complement of `cpu_mask`. x's values are not read."""
    return _dropped(int(seed), p, *x.shape, first_row)


# The backward pass finds the mask of the forward pass: at most 64 of `FEW_ELEMENTS` bytes.
@functools.lru_cache(maxsize=64)
def _dropped(seed: int, p: float, rows: int, cols: int, first_row: int) -> Tensor:
    steps = -(-cols // _CPU_LANES)
    scratch = _take(0)
    philox = scratch.philox
    philox.state = _state(seed, first_row * steps)  # type: ignore[assignment]
    lanes = philox.random_raw(rows * steps * 4)
    _idle.append(scratch)
    mask = (lanes.view(np.uint16) < _threshold(p)).reshape(rows, -1)
    return torch.from_numpy(mask if mask.shape[1] == cols else mask[:, :cols])


@functools.lru_cache(maxsize=64)
def _threshold(p: float) -> np.uint16:
    return np.uint16(dropout_threshold(p))


def _state(seed: int, counter: int = 0) -> dict[str, Any]:
    """The state of a Philox generator with this key whose next words are those of `counter` + 1."""
    return {
        "bit_generator": "Philox",
        "state": {"counter": (counter, 0, 0, 0), "key": (seed & MASK64, 0)},
        "buffer": (0, 0, 0, 0),
        "buffer_pos": 4,
        "has_uint32": 0,
        "uinteger": 0,
    }


def zero_dropped(x: Tensor, keep: Tensor, out: Tensor) -> Tensor:
    """x where keep is true and 0 elsewhere, written to `out`, which may be x, and returned. All three have one shape, x and out one dtype.

    The bits are multiplied as integers: exact for infinities and NaN too, and at least three times as fast as `torch.where`.
    """
    integer = _INTEGERS[x.element_size()]
    torch.mul(x.view(integer), keep.view(torch.int8), out=out.view(integer))
    return out


@torch.library.custom_op("fastlora::cpu_keep", mutates_args=(), device_types="cpu")
def cpu_mask(seed: Tensor, p: float, rows: int, cols: int, first_row: int = 0) -> Tensor:
    """The mask (rows, cols) bool as one operator: torch.compile and functorch see a node, not NumPy.

    seed: 0-d int64 on the CPU; under vmap it may differ between samples.
    """
    mask = torch.empty(rows, cols, dtype=torch.bool, device="cpu")
    for block, keep, _ in keep_blocks(mask, p, seed, first_row):
        mask[block] = keep
    return mask


@cpu_mask.register_fake
def _(seed: Tensor, p: float, rows: int, cols: int, first_row: int = 0) -> Tensor:
    return seed.new_empty((rows, cols), dtype=torch.bool)


@cpu_mask.register_vmap
def _(
    info: Any, in_dims: Any, seed: Tensor, p: float, rows: int, cols: int, first_row: int = 0
) -> tuple[Tensor, int]:
    masks = [cpu_mask(one, p, rows, cols, first_row) for one in seed.unbind(in_dims[0])]
    return torch.stack(masks), 0
