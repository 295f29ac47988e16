"""Repeat what an earlier call launched, with little work for the CPU.

For one problem a forward or backward pass chooses the same tiles, allocates the same arrays and prepares the same thirty arguments for
each kernel, at every call. `repeat` notes the steps of one call; later calls with tensors of the same dtypes, shapes, strides and
alignment take the same steps with their own addresses.

A pass that is repeated allocates by `empty` and calls torch's operations by `library`. If it launches a kernel on any other tensor than
these and its inputs, it is never repeated.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from fastlora.kernels.native import Prepared
from fastlora.kernels.steps import (
    Descriptor,
    Empty,
    InterpretedKernel,
    Kernel,
    Launches,
    Library,
    Like,
    Place,
    View,
)

_ALIGNMENT = 256  # bytes
_MOST = 2048  # recordings that are kept, and calls that came once
_UNREPEATABLE = "not repeatable"
# By the kind of the call, with its choices, whose identity is a part of it.
_recordings: dict[Hashable, tuple[object, Any]] = {}
_seen: dict[
    Hashable, object
] = {}  # came once; apart, since batches of ever new kinds would displace the recordings
_local = threading.local()

Tensors = Sequence[Tensor | None]


class Recorder:
    """Notes what a call allocates and launches. inputs: the tensors that the call was given.

    A slot is the number of a tensor: first the inputs, then what the call made, last the workspace of a repeated call.
    """

    def __init__(self, inputs: Tensors) -> None:
        self.inputs = inputs
        self.made: list[Tensor] = []  # kept alive, so that no two have one address
        self.results: set[int] = set()  # slots that torch's operations fill
        self.steps: list[Library | Kernel] = []
        self.known = True  # where every tensor comes from

    def empty(self, tensor: Tensor) -> int:
        self.made.append(tensor)
        return len(self.inputs) + len(self.made) - 1

    def library(self, function: Callable[..., Tensor], tensors: Tensors, result: Tensor) -> None:
        arguments = [None if t is None else self._argument(t) for t in tensors]
        slot = self._itself(result)
        if slot is None:
            slot = self.empty(result)
            self.results.add(slot)
        self.steps.append(Library(function, arguments, slot))

    def kernel(
        self,
        start: Callable[[list[Any]], None],
        values: list[Any],
        *,
        interpreted: bool,
        prepared: Prepared | None = None,
    ) -> None:
        places = []
        for position, value in enumerate(values):
            described = isinstance(value, Descriptor)
            tensor, tile = (value.base, value.block_shape) if described else (value, None)
            if isinstance(tensor, Tensor):
                slot, offset = self._find(tensor)
                dtype, shape, strides = tensor.dtype, tensor.shape, tensor.stride()
                places.append(Place(position, slot, offset, dtype, shape, strides, tile))
        kind = InterpretedKernel if interpreted else Kernel
        self.steps.append(kind(start, values.copy(), places, prepared))

    def recording(self, outputs: Sequence[Tensor]) -> Recording | None:
        """What repeats the call, which returned `outputs`; None if that is not possible."""
        found, first = [self._find(t) for t in outputs], len(self.inputs)
        fresh = all(slot >= first and offset == 0 for slot, offset in found)
        if not (self.known and fresh and all(t.is_contiguous() for t in outputs)):
            return None
        shapes = {slot: t.shape for (slot, _), t in zip(found, outputs, strict=True)}
        taken = {
            one.slot if isinstance(one, View) else one
            for step in self.steps
            if isinstance(step, Library)
            for one in step.arguments
        }
        begin: list[Empty | Like] = []
        inside: dict[int, int] = {}  # slots in the workspace, with their sizes in bytes
        for slot, tensor in enumerate(self.made, first):
            if slot in shapes or slot in taken:
                if slot not in self.results:
                    begin.append(self._allocation(slot, shapes.get(slot, tensor.shape), tensor))
            elif slot not in self.results:
                inside[slot] = tensor.untyped_storage().nbytes()
        workspace = first + len(self.made)
        if inside:
            offsets, size = self._pack(inside)
            begin.append(Empty(workspace, (size,), torch.uint8))
            for step in self.steps:
                if isinstance(step, Kernel):
                    step.move(offsets, workspace)
        # What is allocated has the shape of the output; what torch's operations return may have another.
        results = [
            (slot, t.shape if slot in self.results else None)
            for (slot, _), t in zip(found, outputs, strict=True)
        ]
        return Recording([*begin, *self._joined()], workspace + 1 - first, results)

    def _allocation(self, slot: int, shape: Sequence[int], made: Tensor) -> Empty | Like:
        form = shape, made.dtype, made.device
        for model, one in enumerate(self.inputs):
            if one is None or (one.shape, one.dtype, one.device) != form:
                continue
            if one.is_contiguous():
                return Like(slot, model)
        return Empty(slot, shape, made.dtype)

    def _joined(self) -> list[Any]:
        """The steps, with kernels that follow each other in one step where Triton's launcher is not needed."""
        joined: list[Any] = []
        for ready, group in groupby(self.steps, lambda step: step.prepared is not None):
            steps: list[Any] = list(group)
            joined += [Launches(steps)] if ready else steps
        return joined

    def _pack(self, sizes: dict[int, int]) -> tuple[dict[int, int], int]:
        """The offsets of slots in a workspace, and its size, in bytes. Slots that no two steps use at the same time may overlap."""
        lives: dict[int, tuple[int, int]] = {}
        for number, step in enumerate(self.steps):
            if isinstance(step, Kernel):
                for place in step.places:
                    lives[place.slot] = lives.get(place.slot, (number, 0))[0], number
        offsets: dict[int, int] = {}
        total = 0
        for slot in sorted(sizes.keys() & lives.keys(), key=sizes.__getitem__, reverse=True):
            begin, end = lives[slot]
            others = [s for s in offsets if lives[s][0] <= end and begin <= lives[s][1]]
            offset = 0
            for other in sorted(others, key=offsets.__getitem__):
                if offset + sizes[slot] <= offsets[other]:
                    break
                offset = max(offset, _rounded(offsets[other] + sizes[other]))
            offsets[slot] = offset
            total = max(total, _rounded(offset + sizes[slot]))
        return offsets, total

    def _argument(self, tensor: Tensor) -> int | View:
        slot = self._itself(tensor)
        if slot is not None:
            return slot
        slot, offset = self._find(tensor)
        return View(slot, offset // tensor.element_size(), tensor.shape, tensor.stride())

    def _itself(self, tensor: Tensor) -> int | None:
        """The slot of a tensor that is not a view of another one."""
        pairs = enumerate((*self.inputs, *self.made))
        return next((slot for slot, one in pairs if one is tensor), None)

    def _find(self, tensor: Tensor) -> tuple[int, int]:
        """The slot of a tensor, and its offset there in bytes."""
        itself = self._itself(tensor)
        if itself is not None:
            return itself, 0
        address, storage = tensor.data_ptr(), tensor.untyped_storage().data_ptr()
        for slot, one in enumerate(self.inputs):
            if one is not None and one.data_ptr() == address:
                return slot, 0
        for slot, one in enumerate(self.made, len(self.inputs)):
            if one.untyped_storage().data_ptr() == storage:
                return slot, address - one.data_ptr()
        self.known = False
        return 0, 0


def _rounded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


class Recording:
    """The steps of a call. outputs: the slot of each, and its shape if it is a view."""

    def __init__(
        self, steps: Sequence[Any], made: int, outputs: Sequence[tuple[int, Sequence[int] | None]]
    ) -> None:
        self._takes = [step.take for step in steps]
        self._blanks, self._outputs = [None] * made, outputs

    def run(self, inputs: Tensors, addresses: list[int]) -> list[Tensor]:
        tensors: list[Any] = [*inputs, *self._blanks]
        all_addresses: list[Any] = addresses + self._blanks
        for take in self._takes:
            take(tensors, all_addresses)
        return [
            tensors[slot] if shape is None else tensors[slot].view(shape)
            for slot, shape in self._outputs
        ]


def active() -> Recorder | None:
    """The recorder of this thread's call, if it is recorded."""
    return getattr(_local, "recorder", None)


def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.empty` in a pass that may be repeated."""
    made = torch.empty(shape, dtype=dtype, device=device)
    recorder = active()
    if recorder is not None:
        recorder.empty(made)
    return made


def library(function: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
    """`function(*tensors)` in a pass that may be repeated. function: an operation on these tensors, which returns a new one or the one that it changed."""
    result = function(*tensors)
    recorder = active()
    if recorder is not None:
        recorder.library(function, tensors, result)
    return result


def forget() -> None:
    """Forget every recording, as after a change of what a pass launches."""
    _recordings.clear()
    _seen.clear()


def repeat(
    choices: Sequence[object],
    settings: Hashable,
    inputs: Sequence[Any],
    run: Callable[[], Sequence[Tensor]],
) -> Sequence[Tensor]:
    """`run()`, or the steps of an earlier call of it. Returns what `run` returns, contiguous tensors.

    choices, settings: all that decides about the steps besides the forms of the inputs; `choices` by their identity. inputs: the tensors that
    `run` reads, the first one not None. The second call of a kind is recorded: some problems never come again.
    """
    key: list[Any] = [*map(id, choices), settings, inputs[0].device]
    addresses = []
    for tensor in inputs:
        if tensor is None:
            key.append(None)
            addresses.append(0)
        else:
            address = tensor.data_ptr()
            key += (tensor.dtype, tensor.shape, tensor.stride(), address % 16 == 0)
            addresses.append(address)
    if len({*addresses}) < len(addresses):  # inputs at one address are so in every repetition
        key += map(addresses.index, addresses)
    known = tuple(key)
    _, found = _recordings.get(known, (None, None))
    if found.__class__ is Recording:
        return found.run(inputs, addresses)
    if found is _UNREPEATABLE or active() is not None:
        return run()
    if known not in _seen:
        if len(_seen) >= _MOST:
            _seen.clear()
        _seen[known] = choices
        return run()
    if len(_recordings) >= _MOST:
        _recordings.clear()
    recorder = _local.recorder = Recorder(inputs)
    try:
        outputs = run()
    finally:
        _local.recorder = None
    _recordings[known] = choices, recorder.recording(outputs) or _UNREPEATABLE
    _seen.pop(known, None)
    return outputs
