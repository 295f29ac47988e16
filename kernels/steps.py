"""What a repeated call does: allocations, kernels and torch's operations, each with the tensors of this call.

A slot is the number of a tensor in the call. A step finds its tensors and their addresses by slot, and stores those that it makes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora.kernels.native import Prepared, Program, is_profiled


class Descriptor:
    """A tensor and the tile of it that a kernel loads or stores by the tensor memory accelerator: what Triton's `TensorDescriptor` is,
    without its checks. `dispatch` has checked alignment and strides.
    """

    __slots__ = ("base", "block_shape", "shape", "strides")
    padding, round_f32_to_tf32 = "zero", False

    def __init__(
        self,
        base: Any,
        block_shape: tuple[int, int],
        shape: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
    ) -> None:
        self.base, self.block_shape = base, block_shape
        self.shape = base.shape if shape is None else shape
        self.strides = base.stride() if strides is None else strides


class Address:
    """What Triton reads of a descriptor's tensor."""

    __slots__ = ("address",)

    def __init__(self, address: int) -> None:
        self.address = address

    def data_ptr(self) -> int:
        return self.address


class Empty:
    """Allocate a tensor."""

    def __init__(self, slot: int, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.slot, self.shape, self.dtype = slot, tuple(shape), dtype  # torch reads a tuple faster

    def take(self, tensors: list[Any], addresses: list[int]) -> None:
        made = torch.empty(self.shape, dtype=self.dtype, device=tensors[0].device)
        tensors[self.slot], addresses[self.slot] = made, made.data_ptr()


class Like(NamedTuple):
    """Allocate a tensor of the form of an input, which takes half as long."""

    slot: int
    model: int

    def take(self, tensors: list[Any], addresses: list[int]) -> None:
        made = torch.empty_like(tensors[self.model])
        tensors[self.slot], addresses[self.slot] = made, made.data_ptr()


class View(NamedTuple):
    """A view of the tensor in a slot; offset in elements."""

    slot: int
    offset: int
    shape: Sequence[int]
    strides: Sequence[int]

    def of(self, tensors: list[Any]) -> Tensor:
        base = tensors[self.slot]
        return torch.as_strided(base, self.shape, self.strides, base.storage_offset() + self.offset)


class Library:
    """result = function(*tensors). arguments: the slot of each, a view of one, or None."""

    prepared = None

    def __init__(
        self, function: Callable[..., Tensor], arguments: Sequence[int | View | None], result: int
    ) -> None:
        self.function, self.arguments, self.result = function, arguments, result

    def take(self, tensors: list[Any], addresses: list[int]) -> None:
        made = self.function(
            *[
                None if one is None else one.of(tensors) if isinstance(one, View) else tensors[one]
                for one in self.arguments
            ]
        )
        tensors[self.result], addresses[self.result] = made, made.data_ptr()


class Place(NamedTuple):
    """Where a value of a kernel comes from: its position among them, the slot of its tensor and the offset there in bytes; the shape and
    strides that it has, and the tile of a `Descriptor`.
    """

    position: int
    slot: int
    offset: int
    dtype: torch.dtype
    shape: Sequence[int]
    strides: Sequence[int]
    tile: tuple[int, int] | None


class Kernel:
    """start(values), with the addresses of the tensors of this call. values: the others; those at `places` are not read.

    prepared: the same launch without Triton's launcher, if it can be.
    """

    def __init__(
        self,
        start: Callable[[list[Any]], None],
        values: list[Any],
        places: list[Place],
        prepared: Prepared | None,
    ) -> None:
        self.start, self.values, self.places, self.prepared = start, values, places, prepared
        for place in places:
            values[place.position] = None

    def take(self, tensors: list[Any], addresses: list[int]) -> None:
        values = self.values.copy()
        for position, slot, offset, _, shape, strides, tile in self.places:
            address: Any = addresses[slot] + offset
            if tile is not None:
                address = Descriptor(Address(address), tile, shape, strides)
            values[position] = address
        self.start(values)

    def move(self, offsets: dict[int, int], workspace: int) -> None:
        """Find the slots of `offsets` in the workspace."""
        self.places = [
            place._replace(slot=workspace, offset=place.offset + offsets[place.slot])
            if place.slot in offsets
            else place
            for place in self.places
        ]


class InterpretedKernel(Kernel):
    """The same for Triton's interpreter, which takes tensors."""

    def take(self, tensors: list[Any], addresses: list[int]) -> None:
        values = self.values.copy()
        for position, slot, offset, dtype, shape, strides, tile in self.places:
            base = tensors[slot].view(dtype)
            first = base.storage_offset() + offset // base.element_size()
            view = torch.as_strided(base, shape, strides, first)
            values[position] = view if tile is None else Descriptor(view, tile)
        self.start(values)


class Launches:
    """Kernels that follow each other, started together."""

    def __init__(self, kernels: list[Kernel]) -> None:
        self.kernels = kernels
        self.program = Program(
            [
                (kernel.prepared, {one.position: (one.slot, one.offset) for one in kernel.places})
                for kernel in kernels
            ]
        )

    def take(self, tensors: list[Any], addresses: list[int]) -> None:
        if not is_profiled():
            self.program.start(addresses)
            return
        for kernel in self.kernels:
            kernel.take(tensors, addresses)
