"""Launches from the table of compiled kernels: the same arguments as Triton's own, and a new entry whenever Triton would compile again.

A driver that only records replaces the GPU's; the kernel is compiled for sm_90 as it would be on a device.
"""

import itertools

import pytest
import torch
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from fastlora.kernels import launch as launching
from fastlora.kernels import native
from fastlora.kernels.launch import Descriptor, launch


def _scale(x_ptr, out_ptr, tile, M, width, factor, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + o * width, tl.load(x_ptr + o, mask=o < M, other=0.0) * factor, mask=o < M)
    tile.store([0, 0], tile.load([0, 0]))


class _Driver:
    """Compiles for sm_90, launches nothing, and records what it was asked to launch."""

    def __init__(self):
        self.calls = []
        recorded = self.calls

        class Launcher:
            def __init__(self, source, metadata):
                pass

            def __call__(self, *arguments):
                recorded.append(arguments)

        class Utils:
            load_binary = staticmethod(lambda *a: (1, 2, 0, 0, 1024))
            get_device_properties = staticmethod(lambda device: {"max_shared_mem": 232_448})

        self.launcher_cls, self.utils = Launcher, Utils

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 77

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


# As they were imported, before a test ran a kernel in the interpreter.
_LANGUAGE = [(owner, dict(vars(owner))) for owner in (tl, tl.core, tl.math, tl.core.tensor, tl.core.dtype, tl.core.tensor_descriptor_base)]  # fmt: skip


@pytest.fixture(autouse=True)
def _own_language(monkeypatch):
    """Triton's interpreter replaces functions of its language, and leaves those replaced that a function of the language itself has called for."""
    for owner, held in _LANGUAGE:
        for name, value in held.items():
            if vars(owner).get(name) is not value:
                monkeypatch.setattr(owner, name, value)


@pytest.fixture
def device(monkeypatch):
    recording = _Driver()
    monkeypatch.setattr(driver, "_active", recording)
    monkeypatch.setattr(launching, "_compiled", {})
    monkeypatch.setattr(launching, "_parameters", {})
    assert driver.active is recording
    return recording


@pytest.fixture
def kernel():
    return JITFunction(_scale, do_not_specialize=["M"])


def _arguments(dtype=torch.float16, offset=0, m=100, width=1, factor=0.5, block=64, rows=32):
    x = torch.zeros(256, dtype=dtype)[offset:]
    tile = Descriptor(torch.zeros(rows, 64, dtype=torch.float16), (16, 32))
    return {
        "x_ptr": x,
        "out_ptr": torch.zeros(256, dtype=dtype),
        "tile": tile,
        "M": m,
        "width": width,
        "factor": factor,
        "BLOCK": block,
    }


def test_a_second_launch_passes_what_triton_passed(device, kernel, monkeypatch):
    arguments = _arguments()
    launch(kernel, (3,), num_warps=4, **arguments)
    runs = []
    monkeypatch.setattr(JITFunction, "run", lambda *a, **k: runs.append(a))
    reordered = dict(reversed(_arguments(m=200, factor=2.0, rows=48).items()))
    launch(kernel, (3,), num_warps=4, **reordered)
    assert runs == [], "the second launch must not bind the arguments again"
    first, second = device.calls
    assert first[:3] == second[:3] == (3, 1, 1) and first[3] == second[3] == 77
    assert first[4:6] == second[4:6]  # function, metadata
    assert second[6:9] == (None, None, None), "no profiler asks for metadata or has hooks"
    assert len(first) == len(second) == 9 + 7
    described = first[9 + 2], second[9 + 2]
    for one, rows in zip(described, (32, 48), strict=True):
        assert one.base.shape == (rows, 64) and tuple(one.shape) == (rows, 64)
        assert tuple(one.strides) == (64, 1) and one.padding == "zero"
    assert [*second[12:]] == [200, 1, 2.0, 64] and [*first[12:]] == [100, 1, 0.5, 64]


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_a_profiler_sees_every_launch(device, kernel, name):
    launch(kernel, (3,), num_warps=4, **_arguments())
    chain = getattr(knobs.runtime, name)

    def hook(metadata):
        pass

    chain.add(hook)
    try:
        launch(kernel, (3,), num_warps=4, **_arguments())
    finally:
        chain.remove(hook)
    first, second = device.calls
    assert (
        first[7:9]
        == second[7:9]
        == (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
    )
    assert second[6].get()["name"] == first[6].get()["name"]


def test_the_grid_may_have_up_to_three_dimensions(device, kernel):
    for grid in ((5,), (5, 6), (5, 6, 7)):
        for _ in range(2):
            launch(kernel, grid, num_warps=4, **_arguments())
    assert [call[:3] for call in device.calls] == [
        *[(5, 1, 1)] * 2,
        *[(5, 6, 1)] * 2,
        *[(5, 6, 7)] * 2,
    ]


def test_traits_differ_exactly_where_triton_would_compile_again(device, kernel):
    variants = [
        _arguments(dtype, offset, m, width, factor, block)
        for dtype, offset, m, width, factor, block in itertools.product(
            (torch.float16, torch.float32), (0, 1, 8), (1, 16, 100, 2**31), (1, 3, 16, 2**31, 2**32 + 1), (1.0, 0.5), (32, 64)
        )
    ]  # fmt: skip
    *_, backend, binder = kernel.create_binder()
    parameters = [(p.name, p.is_constexpr, not p.do_not_specialize) for p in kernel.params]
    ours_to_theirs, theirs_to_ours = {}, {}
    for variant in variants:
        ours = tuple(launching._traits(parameters, list(variant.values())))
        theirs = str(binder(**launching._with_checks(variant), num_warps=4)[1])
        assert ours_to_theirs.setdefault(ours, theirs) == theirs, "one entry for two kernels"
        assert theirs_to_ours.setdefault(theirs, ours) == ours, "two entries for one kernel"
    assert len(ours_to_theirs) > 50


def test_options_and_tiles_have_entries_of_their_own(device, kernel):
    launch(kernel, (1,), num_warps=4, **_arguments())
    launch(kernel, (1,), num_warps=8, **_arguments())
    launch(kernel, (1,), num_warps=4, num_stages=2, **_arguments())
    launch(kernel, (1,), num_warps=4, launch_pdl=True, **_arguments())
    other = _arguments()
    other["tile"] = Descriptor(other["tile"].base, (32, 32))
    launch(kernel, (1,), num_warps=4, **other)
    other["tile"] = Descriptor(torch.zeros(32, 64), (32, 32))
    launch(kernel, (1,), num_warps=4, **other)
    assert len(launching._compiled) == 6 and len(device.calls) == 6


def test_each_device_has_entries_of_its_own(device, kernel, monkeypatch):
    launch(kernel, (1,), num_warps=4, **_arguments())
    monkeypatch.setattr(device, "get_current_device", lambda: 1)
    for _ in range(2):
        launch(kernel, (1,), num_warps=4, **_arguments())
    assert len(launching._compiled) == 2 and len(device.calls) == 3


def test_a_profilers_hooks_are_called(device, kernel, monkeypatch):
    launch(kernel, (1,), num_warps=4, **_arguments())
    enter, leave = (lambda *a: None), (lambda *a: None)
    monkeypatch.setattr(knobs.runtime, "launch_enter_hook", enter)
    monkeypatch.setattr(knobs.runtime, "launch_exit_hook", leave)
    launch(kernel, (1,), num_warps=4, **_arguments())
    assert device.calls[1][7:9] == (enter, leave) and device.calls[1][6] is not None


def test_a_kernel_that_was_not_launched_gets_no_entry(device, kernel, monkeypatch):
    monkeypatch.setattr(JITFunction, "run", lambda *a, **k: None)
    launch(kernel, (1,), num_warps=4, **_arguments())
    assert launching._compiled == {}


def test_a_triton_that_was_not_compared_launches_itself(monkeypatch):
    monkeypatch.setattr(native.triton, "__version__", "3.99.0")
    assert native.prepared(None, (1,), 0, []) is None
