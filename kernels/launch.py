"""Launch a kernel with little work for the CPU.

`kernel[grid](...)` binds the arguments, describes each of them, and builds the text of a key, at every call: 20 to 100 microseconds, longer
than many kernels run. Here the compiled kernel is looked up by a tuple, and started as `JITFunction.run` starts it.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

from triton import knobs
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from fastlora.kernels import native, recording
from fastlora.kernels.steps import Descriptor

_INT32 = 2**31
# By the kernel, the device, the options and the traits of the arguments.
_compiled: dict[tuple[Any, ...], Any] = {}
_parameters: dict[int, tuple[tuple[str, bool, bool], ...]] = {}  # name, constant, specialised


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
    recorder = recording.active()
    if not isinstance(kernel, JITFunction):  # Triton's interpreter
        interpret = partial(_interpret, kernel, grid, list(arguments))
        interpret(list(arguments.values()))
        if recorder is not None:
            recorder.kernel(interpret, list(arguments.values()), interpreted=True)
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
        if compiled is None:  # nothing was launched: a test compiles only
            return
        _compiled[key] = compiled
    else:
        _start(compiled, grid, device, values)
    if recorder is not None:
        recorder.kernel(
            partial(_start, compiled, grid, device), values, interpreted=False,
            prepared=native.prepared(compiled, grid, device, values),
        )  # fmt: skip


def _start(compiled: Any, grid: tuple[int, ...], device: int, values: list[Any]) -> None:
    """Launch on the device's current stream. values: all arguments in the kernel's order, tensors also by their addresses."""
    stream = driver.active.get_current_stream(device)
    x, y, z = (*grid, 1, 1)[:3]
    metadata = enter = leave = None
    if native.is_profiled():
        enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        metadata = compiled.launch_metadata(grid, stream, *values)
    compiled.run(
        x, y, z, stream, compiled.function, compiled.packed_metadata, metadata, enter, leave, *values
    )  # fmt: skip


def _interpret(kernel: Any, grid: tuple[int, ...], names: list[str], values: list[Any]) -> None:
    kernel[grid](**_with_checks(dict(zip(names, values, strict=True))))


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
