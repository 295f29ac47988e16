"""The dropout mask on a CPU, block by block, in NumPy: the same bits as `reference.keep_mask`.

The words are unsigned 64-bit integers that hold 32 bits, and a round is ten array operations. NumPy does one in less than a
microsecond where torch takes two or three, and a block whose words stay in the cache needs no fresh memory, which is
handed out page by page. One thread of NumPy keeps pace with two of torch even for large masks. Of a small block the words stand
side by side in one Python integer: an operation on it begins sooner than one on a small array.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastlora.ops import reference
from fastlora.ops.reference import KEY_STEPS, LANES, MASK32, MULTIPLIERS, ROUNDS

# Philox calls in a block: its six arrays of words take 3 MiB. Smaller blocks pay for more Python and more parallel operations,
# whose threads meet after each; larger ones leave the cache.
_BLOCK_CALLS = 64 * 1024
# Up to here Python's integers are faster: 24 µs instead of 76 for a row of 64; they are level at about 400 calls
# (python -m timeit -s 'from fastlora.ops.cpu_dropout import keep_blocks' 'for _ in keep_blocks(5, 0.1, 1, 64): pass').
_SMALL_CALLS = 256
# In the first rounds the words depend on the row or the column alone, and are small.
_BROADCAST_ROUNDS = 3

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_Array = np.ndarray[Any, np.dtype[Any]]
_LOW = np.uint64(MASK32)
_HALF = np.uint64(32)
_MULTIPLIERS = (np.uint64(MULTIPLIERS[0]), np.uint64(MULTIPLIERS[1]))


class _Scratch:
    """The buffers of a block. They outlive the call: fresh memory is handed out page by page, which costs more than the work in it."""

    def __init__(self, calls: int) -> None:
        self.calls = calls
        self.words = np.empty((6, calls), np.uint64)
        self.packed = np.empty((calls, 4), np.uint32)
        self.keep = torch.empty(calls * LANES, dtype=torch.bool)
        self.work = torch.empty(2 * calls * LANES * 8, dtype=torch.uint8)  # two blocks of any dtype


# Taken while a mask is made and given back, so that threads and nested calls never share one.
_idle: list[_Scratch] = []


def keep_blocks(
    seed: int, p: float, rows: int, cols: int, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(which rows, their mask, scratch) for consecutive blocks of `reference.keep_mask(seed, p, rows, cols)`.

    The mask (block, cols) bool and the scratch (2, block, cols) of `dtype` are views of buffers that the next block, and
    the next caller, overwrite.
    """
    groups = -(-cols // LANES)
    step = max(1, min(rows, _BLOCK_CALLS // max(1, groups)))
    scratch = _idle.pop() if _idle else _Scratch(_BLOCK_CALLS)
    if scratch.calls < step * groups:
        scratch = _Scratch(step * groups)
    try:
        yield from _blocks(scratch, seed, p, rows, cols, step, dtype)
    finally:
        _idle.append(scratch)


def zero_dropped(x: Tensor, keep: Tensor, out: Tensor) -> Tensor:
    """x where keep is true and 0 elsewhere, written to `out` and returned. All three have one shape, x and out one dtype.

    The product of the bits as integers: exact for infinities and NaN too, and a third of the time of `torch.where` or less.
    """
    integer = _INTEGERS[x.element_size()]
    torch.mul(x.view(integer), keep.view(torch.int8), out=out.view(integer))
    return out


def _blocks(
    scratch: _Scratch, seed: int, p: float, rows: int, cols: int, step: int, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    groups = -(-cols // LANES)
    threshold = np.int16(reference.dropout_threshold(p) - 32768)
    keys = _round_keys(seed)
    work = scratch.work.view(dtype)
    for first in range(0, rows, step):
        count = min(step, rows - first)
        calls, elements = count * groups, count * cols
        packed = scratch.packed[:calls]
        keep = scratch.keep[: calls * LANES]
        if calls <= _SMALL_CALLS:
            _philox_in_integers(packed, count, groups, keys, first)
        else:
            words = [word[:calls].reshape(count, groups) for word in scratch.words]
            _philox_into(packed.reshape(count, groups, 4), words, keys, first)
        np.greater_equal(packed.view(np.int16).reshape(-1), threshold, out=keep.numpy())
        yield (
            slice(first, first + count),
            keep.view(count, groups * LANES)[:, :cols],
            work[: 2 * elements].view(2, count, cols),
        )


def _round_keys(seed: int) -> list[tuple[int, int]]:
    low, high = seed & MASK32, (seed >> 32) & MASK32
    return [
        ((low + i * KEY_STEPS[0]) & MASK32, (high + i * KEY_STEPS[1]) & MASK32)
        for i in range(ROUNDS)
    ]


@lru_cache(maxsize=32)
def _lanes(rows: int, groups: int) -> tuple[int, int, int]:
    """Integers of 64 bits a call: 1 in each, MASK32 in each, and each call's column group; the rows one after the other."""
    ones = int.from_bytes(np.ones(rows * groups, "<u8").tobytes(), "little")
    columns = np.tile(np.arange(groups, dtype="<u8"), rows)
    return ones, ones * MASK32, int.from_bytes(columns.tobytes(), "little")


@lru_cache(maxsize=32)
def _row_numbers(first_row: int, rows: int, groups: int) -> int:
    numbers = np.repeat(np.arange(first_row, first_row + rows, dtype="<u8"), groups)
    return int.from_bytes(numbers.tobytes(), "little")


def _philox_in_integers(
    packed: _Array, rows: int, groups: int, keys: list[tuple[int, int]], first_row: int
) -> None:
    """`_philox_into` with the words of all calls side by side; packed (rows · groups, 4).

    A product of two words has 64 bits, so no call's reaches into the next one's.
    """
    ones, low, c0 = _lanes(rows, groups)
    c1, c2, c3 = _row_numbers(first_row, rows, groups), 0, 0
    for key in keys:
        product_0, product_1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0 = (product_1 >> 32 & low) ^ c1 ^ key[0] * ones
        c2 = (product_0 >> 32 & low) ^ c3 ^ key[1] * ones
        c1, c3 = product_1 & low, product_0 & low
    for index, word in enumerate((c0, c1, c2, c3)):
        packed[:, index] = np.frombuffer(word.to_bytes(8 * len(packed), "little"), "<u8")


def _philox_into(
    packed: _Array, words: list[_Array], keys: list[tuple[int, int]], first_row: int
) -> None:
    """Write the four words of every counter (column group, row, 0, 0) to packed (rows, groups, 4).

    words: six scratch arrays (rows, groups): the new c0 and c2, this round's two products, and those of the round
    before, whose low halves are c3 and c1.
    """
    rows, groups = packed.shape[:2]
    subkeys = [(np.uint64(key[0]), np.uint64(key[1])) for key in keys]
    c0 = np.arange(groups, dtype=np.uint64)[None, :]
    c1 = np.arange(first_row, first_row + rows, dtype=np.uint64)[:, None]
    c2 = c3 = np.zeros((1, 1), np.uint64)
    for key in subkeys[:_BROADCAST_ROUNDS]:
        product_0, product_1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = ((product_1 >> _HALF) ^ c1 ^ key[0]) & _LOW
        c2 = ((product_0 >> _HALF) ^ c3 ^ key[1]) & _LOW
        c1, c3 = product_1, product_0
    new_0, new_2, product_0, product_1, spare_0, spare_1 = words
    for key in subkeys[_BROADCAST_ROUNDS:]:
        np.multiply(c0, _MULTIPLIERS[0], out=product_0)
        np.multiply(c2, _MULTIPLIERS[1], out=product_1)
        for product, other, subkey, new in (
            (product_1, c1, key[0], new_0),
            (product_0, c3, key[1], new_2),
        ):
            np.right_shift(product, _HALF, out=new)
            np.bitwise_xor(new, other, out=new)
            np.bitwise_xor(new, subkey, out=new)
            np.bitwise_and(new, _LOW, out=new)
        c0, c1, c2, c3 = new_0, product_1, new_2, product_0
        product_0, product_1, spare_0, spare_1 = spare_0, spare_1, product_0, product_1
    for index, word in enumerate((c0, c1, c2, c3)):
        packed[..., index] = word
