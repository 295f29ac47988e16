"""Start the kernels of a repeated call by one call of C.

Triton's launcher reads thirty arguments in Python and encodes each tensor map, for every kernel. What a repeated call launches is known: `prepare`
lays the parameters out as CUDA takes them, and `start` fills in the addresses. `launches.c` is compiled at first use, as Triton compiles its launcher.
"""

from __future__ import annotations

import functools
import inspect
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.backends.nvidia import driver as nvidia
from triton.runtime.build import compile_module_from_src
from triton.runtime.driver import driver

_SOURCE = Path(__file__).with_name("launches.c")
# The versions of Triton whose launches were compared with these (tests/kernels/test_driver.py); others launch all kernels themselves.
_COMPARED = (("3", "5"), ("3", "6"), ("3", "7"), ("3", "8"))
_WARP = 32  # threads
# Of scalars, as Triton's launcher stores them.
_FORMATS = {
    **{"i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q"},
    **{"u1": "B", "u8": "B", "u16": "H", "u32": "I", "u64": "Q", "fp32": "f", "fp64": "d"},
}


class Parameter(NamedTuple):
    """Of a kernel, as CUDA takes it. content: bytes, or a tensor map; position: that of the value whose address belongs there, or None."""

    content: Any
    position: int | None


class Prepared(NamedTuple):
    """A launch without its addresses. shared: bytes of shared memory; overlaps: whether it may begin before the launch before it ends."""

    device: int
    function: int
    grid: tuple[int, int, int]
    threads: int
    shared: int
    overlaps: bool
    parameters: list[Parameter]


def prepared(
    compiled: Any, grid: tuple[int, ...], device: int, values: Sequence[Any]
) -> Prepared | None:
    """The launch of a compiled kernel; None if it uses what only Triton's launcher offers.

    values: all arguments in the kernel's order, tensors and descriptors as they were launched.
    """
    if tuple(triton.__version__.split(".")[:2]) not in _COMPARED:
        return None
    metadata, launcher = compiled.metadata, compiled.run
    if (
        getattr(metadata, "num_ctas", 1) != 1
        or getattr(metadata, "instrumentation_mode", "")
        or metadata.launch_cooperative_grid
        or metadata.global_scratch_size
        or metadata.profile_scratch_size
        or not isinstance(launcher, nvidia.CudaLauncher)
    ):
        return None
    maps = iter(getattr(metadata, "tensordesc_meta", None) or ())
    parameters: list[Parameter] = []
    for position, (kind, value) in enumerate(
        zip(compiled.src.signature.values(), values, strict=True)
    ):
        if kind == "constexpr":
            continue
        if not isinstance(kind, str):
            return None
        if kind.startswith("*"):
            parameters.append(Parameter(bytes(8), position))
        elif kind.startswith("tensordesc"):
            meta = next(maps, None)
            if meta is None:  # no tensor memory accelerator
                return None
            tensor_map, *numbers = _described(value, meta)
            sizes, strides = numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :]
            parameters.append(Parameter(tensor_map, position))
            parameters += [Parameter(struct.pack("i", size), None) for size in sizes]
            parameters += [Parameter(struct.pack("q", stride), None) for stride in strides]
        elif kind in _FORMATS:
            parameters.append(Parameter(struct.pack(_FORMATS[kind], value), None))
        else:
            return None
    scratch = Parameter(bytes(8), None)
    warps, _, shared = compiled.packed_metadata[:3]
    x, y, z = (*grid, 1, 1)[:3]
    return Prepared(
        device,
        compiled.function,
        (x, y, z),
        _WARP * warps,
        shared,
        bool(metadata.launch_pdl),
        [*parameters, scratch, scratch],
    )


def _described(descriptor: Any, meta: Any) -> list[Any]:
    """The tensor map, the sizes and the strides that Triton's launcher passes."""
    describe = nvidia.make_tensordesc_arg
    unused = len(inspect.signature(describe).parameters) - 2  # one since Triton 3.8
    found: list[Any] = describe(descriptor, meta, *[None] * unused)
    return found


class Program:
    """Launches on one device that follow each other, each with the slots and the offsets in bytes of its addresses, by the value's position."""

    def __init__(
        self, launches: Sequence[tuple[Prepared | None, dict[int, tuple[int, int]]]]
    ) -> None:
        described = []
        for launch, places in launches:
            assert launch is not None
            self._device, *rest, parameters = launch
            slots = [
                (content, *((-1, 0) if position is None else places[position]))
                for content, position in parameters
            ]
            described.append((*rest, slots))
        self._program, self._start = _module().prepare(described), _module().start

    def start(self, addresses: list[int]) -> None:
        """Launch on the device's current stream. addresses: by slot."""
        stream = driver.active.get_current_stream(self._device)
        self._start(self._program, addresses, stream, self._device)


def is_profiled() -> bool:
    """Whether a profiler listens to Triton's launches, which it would not see."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


@functools.cache
def _module() -> Any:
    return compile_module_from_src(
        src=_SOURCE.read_text(), name="fastlora_launches", include_dirs=nvidia.include_dirs
    )
