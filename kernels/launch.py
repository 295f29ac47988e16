"""Launch a kernel with little work for the CPU.

`kernel[grid](...)` binds the arguments, describes each of them, and builds the text of a key, at every call: 20 to 100 microseconds, longer
than many kernels run. Here the compiled kernel is looked up by a tuple, and started as `JITFunction.run` starts it.
"""

from collections.abc import Iterable
from typing import Any

import torch
from triton import knobs
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

_INT32 = 2**31
# By the kernel, the device, the options and the traits of the arguments.
_compiled: dict[tuple[Any, ...], Any] = {}
_parameters: dict[int, tuple[tuple[str, bool, bool], ...]] = {}  # name, constant, specialised


class Descriptor:
    """A tensor and the tile of it that a kernel loads or stores by the tensor memory accelerator: what Triton's `TensorDescriptor` is,
    without its checks. `dispatch` has checked alignment and strides.
    """

    __slots__ = ("base", "block_shape", "padding", "shape", "strides")

    def __init__(self, base: torch.Tensor, block_shape: tuple[int, int]) -> None:
        self.base, self.block_shape, self.padding = base, block_shape, "zero"
        self.shape, self.strides = base.shape, base.stride()


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *,
    num_warps: int,
    num_stages: int = 3,
    launch_pdl: bool = False,
    **arguments: Any,
) -> None:
    """Run `kernel` on the current device and stream.

    grid: one to three numbers of programs. num_warps, num_stages, launch_pdl: Triton's options. arguments: those of the kernel, all by
    name, tensors with tiles as `Descriptor`.
    """
    if not isinstance(kernel, JITFunction):  # Triton's interpreter
        kernel[grid](**_with_checks(arguments))
        return
    number = id(kernel)  # kernels live as long as their module; hashing one takes longer
    parameters = _parameters.get(number)
    if parameters is None:
        parameters = _parameters[number] = tuple(
            (p.name, p.is_constexpr, not p.do_not_specialize) for p in kernel.params
        )
    values = [arguments[name] for name, _, _ in parameters]
    device = driver.active.get_current_device()
    key = (number, device, num_warps, num_stages, launch_pdl, *_traits(parameters, values))
    compiled = _compiled.get(key)
    if compiled is None:
        options: dict[str, Any] = {"num_warps": num_warps, "num_stages": num_stages}
        if launch_pdl:
            options["launch_pdl"] = True
        compiled = kernel[grid](**_with_checks(arguments), **options)
        if compiled is not None:  # nothing was launched, if a test compiles only
            _compiled[key] = compiled
        return
    stream = driver.active.get_current_stream(device)
    x, y, z = (*grid, 1, 1)[:3]
    compiled.run(
        x, y, z, stream, compiled.function, compiled.packed_metadata,
        compiled.launch_metadata(grid, stream, *values),
        knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook, *values,
    )  # fmt: skip


def _traits(parameters: Iterable[tuple[str, bool, bool]], values: list[Any]) -> list[Any]:
    """What Triton distinguishes: constants by value; tensors by dtype and alignment to 16 bytes; descriptors by dtype and tile; integers by
    width, and unless the kernel says otherwise by whether they are 1 or a multiple of 16.
    """
    traits: list[Any] = []
    append = traits.append
    for (_, is_constant, specialised), value in zip(parameters, values, strict=True):
        kind = type(value)
        if is_constant:
            append(value)
        elif kind is int:
            wide = value >= _INT32
            append((value == 1, value % 16 == 0, wide) if specialised else wide)
        elif kind is Descriptor:
            append(value.base.dtype)
            append(value.block_shape)
        elif kind is not float:
            append(value.dtype)
            append(value.data_ptr() % 16 == 0)
    return traits


def _with_checks(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments for Triton's own path, which recognises its own descriptors only."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return {
        name: TensorDescriptor.from_tensor(value.base, list(value.block_shape))
        if type(value) is Descriptor
        else value
        for name, value in arguments.items()
    }
