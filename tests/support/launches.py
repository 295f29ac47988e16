"""What Triton's launcher gives the CUDA driver, in a process whose driver is `libcuda.c`: repeated calls against Triton's own launches.

    python -m tests.support.launches     # with the driver's folder in TRITON_LIBCUDA_PATH and LD_LIBRARY_PATH

Kernels are compiled for sm_90, tensors are the CPU's, and nothing runs. Prints one JSON object: the number of compared launches, and the differences.
"""

import ctypes
import json
import os
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
import triton
from triton import knobs
from triton.backends.nvidia import driver as nvidia
from triton.runtime.driver import driver

from fastlora.kernels import backward, forward, gemm, launch, recording
from fastlora.ops import dispatch
from fastlora.ops.reference import LowRank
from fastlora.ops.triton import linear as triton_linear
from fastlora.ops.triton import mixed as triton_mixed

MOST_LAUNCHES, MOST_ARGUMENTS, MOST_HANDLES = 256, 64, 4096
SIZES = {"i32": 4, "fp32": 4, "i64": 8, "*": 8, "map": 128}  # of arguments, in bytes
CASES = (  # M, K, N, R, dropout, dtype of the adapters
    (600, 512, 768, 16, True, torch.float32),
    (600, 512, 768, 4, False, torch.float16),
    (300, 264, 520, 12, True, torch.float32),
    (40, 512, 768, 16, False, torch.float32),
)
MIXED = (  # M, K, N, ranks, segments
    (64, 512, 768, (16, 4), [(0, 20, 0), (30, 64, 1)]),
    (300, 264, 520, (64, 8), [(0, 20, 1), (20, 64, 0), (70, 200, 1)]),
)


class _Launch(ctypes.Structure):
    _fields_ = (
        ("function", ctypes.c_uint64),
        ("stream", ctypes.c_uint64),
        ("grid", ctypes.c_uint * 3),
        ("threads", ctypes.c_uint),
        ("shared", ctypes.c_uint),
        ("overlaps", ctypes.c_uint),
        ("count", ctypes.c_int),
        ("arguments", ctypes.c_uint64 * MOST_ARGUMENTS),
        ("forms", ctypes.c_uint64 * MOST_ARGUMENTS),
    )


library = ctypes.CDLL("libcuda.so.1")
launches = ctypes.c_int.in_dll(library, "launches")
sizes_of = (ctypes.c_ubyte * MOST_ARGUMENTS * MOST_HANDLES).in_dll(library, "sizes_of")
noted = (_Launch * MOST_LAUNCHES).in_dll(library, "noted")


class _Launcher(nvidia.CudaLauncher):
    """Triton's launcher, which tells the driver the sizes of the arguments."""

    kinds_of: ClassVar[dict[int, tuple[str, ...]]] = {}  # of the arguments of a function
    count = 0  # of the launches

    def __init__(self, source: Any, metadata: Any) -> None:
        super().__init__(source, metadata)
        kinds: list[str] = []
        for kind in source.signature.values():
            if str(kind).startswith("tensordesc"):
                kinds += ["map", "i32", "i32", "i64", "i64"]  # its sizes and strides follow
            elif kind != "constexpr":
                kinds.append("*" if kind.startswith("*") else kind)
        self.kinds = (*kinds, "*", "*")  # Triton's scratch memory

    def __call__(self, *arguments: Any) -> None:
        function = arguments[4]
        self.kinds_of[function] = self.kinds
        _Launcher.count += 1
        for position, kind in enumerate(self.kinds):
            sizes_of[function][position] = SIZES[kind]
        super().__call__(*arguments)


def use_driver() -> None:
    """Make the driver Triton's, and let the dispatch choose kernels for tensors of the CPU."""
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    found = nvidia.CudaDriver()
    found.launcher_cls = _Launcher
    found.get_current_device = lambda: 0
    found.get_current_stream = lambda device: 7
    found.get_device_capability = lambda device=0: (9, 0)
    driver.set_active(found)
    os.environ["TRITON_INTERPRET"] = "1"  # read by the dispatch; the kernels are decorated
    for module in (backward, forward, gemm):  # the interpreter cannot overlap
        module.overlaps = lambda config: config.overlap


def calls_of(run: Callable[[], Any]) -> tuple[Any, list[Any]]:
    """What it returns, and its launches: function and configuration, and (kind, value, form) of each argument."""
    launches.value = 0
    result = run()
    found = []
    for one in noted[: launches.value]:
        kinds = _Launcher.kinds_of[one.function]
        arguments = zip(kinds, one.arguments[: one.count], one.forms[: one.count], strict=True)
        configuration = (one.stream, tuple(one.grid), one.threads, one.shared, one.overlaps)
        found.append(((one.function, *configuration), list(arguments)))
    return result, found


def by_triton(
    kept: list[Any], choices: Any, settings: Any, inputs: Any, run: Callable[[], Any]
) -> Any:
    """`repeat` without repetitions or a table of kernels. What it allocates is kept, so that no two have one address."""
    launch._compiled.clear()
    recorder = recording.Recorder(inputs)
    kept.append(recorder)
    recording._local.recorder = recorder
    try:
        return run()
    finally:
        recording._local.recorder = None


def differences(
    got: list[Any], want: list[Any], names: dict[int, str], other_names: dict[int, str]
) -> list[str]:
    """Where two lists of launches differ. names: those of the known tensors, by address.

    Other addresses are arrays of the call: each must be at one place, and those of one launch at different ones.
    """
    if len(got) != len(want):
        return [f"{len(got)} launches for {len(want)}"]
    found = []
    places: dict[int, int] = {}
    for number, (one, other) in enumerate(zip(got, want, strict=True)):
        if one[0] != other[0] or len(one[1]) != len(other[1]):
            found.append(f"launch {number}: {one[0]} for {other[0]}")
        used: dict[int, int] = {}
        for position, ((kind, value, form), (_, expected, expected_form)) in enumerate(
            zip(one[1], other[1], strict=False)
        ):
            name, expected_name = names.get(value), other_names.get(expected)
            if kind not in ("*", "map") or name or expected_name:
                same = (name or value) == (expected_name or expected)
            else:
                same = places.setdefault(expected, value) == value
                same &= used.setdefault(value, expected) == expected
            if not same or form != expected_form:
                text = f"{name or value} for {expected_name or expected}"
                found.append(f"launch {number}, argument {position}: {text}")
    return found


class Call:
    """One forward and backward pass of new tensors, by a plan."""

    def __init__(self, case: tuple[Any, ...], plan: str) -> None:
        m, k, n, r, drops, dtype = case
        shapes = {
            "x": (m, k),
            "weight": (n, k),
            "bias": (n,),
            "a": (r, k),
            "b": (n, r),
            "dy": (m, n),
        }
        self.tensors: dict[str, torch.Tensor | None] = {
            name: torch.randn(shape).to(dtype if name in "ab" else torch.float16)
            for name, shape in shapes.items()
        }
        self.tensors["seed"] = torch.tensor(1) if drops else None
        self.plan = plan

    def forward(self) -> Any:
        x, weight, bias, a, b, seed = map(
            self.tensors.get, ("x", "weight", "bias", "a", "b", "seed")
        )
        y, s = triton_linear._forward(x, weight, bias, a, b, 0.5, 0.1, seed, self.plan)
        self.tensors.setdefault("s", s)
        return y, s

    def backward(self) -> Any:
        dy, x, weight, s, a, b, seed = map(
            self.tensors.get, ("dy", "x", "weight", "s", "a", "b", "seed")
        )
        needs = (True, True, True)
        return triton_linear._backward(dy, x, weight, s, a, b, 0.5, 0.1, seed, *needs, self.plan)


class MixedCall:
    """The same of a batch in which rows have different adapters; there are no plans for it."""

    def __init__(self, m: int, k: int, n: int, ranks: tuple[int, ...], segments: Any) -> None:
        shapes = {"x": (m, k), "weight": (n, k), "bias": (n,), "dy": (m, n)}
        named = {name: torch.randn(shape).half() for name, shape in shapes.items()}
        self.tensors: dict[str, torch.Tensor | None] = {**named, "seed": torch.tensor(1)}
        self.lows = []
        for i, rank in enumerate(ranks):
            a, b = torch.randn(rank, k), torch.randn(n, rank)
            self.tensors |= {f"a{i}": a, f"b{i}": b}
            seed = None if i else self.tensors["seed"]
            self.lows.append(LowRank(a, b, 0.5, 0.0 if i else 0.1, seed))
        self.segments = segments
        groups = triton_mixed._groups(named["x"].device, self.lows, segments)
        tables = groups.offsets, groups.scale, groups.thresholds
        self.tensors |= dict(zip(("offsets", "scale", "thresholds"), tables, strict=True))

    def forward(self) -> Any:
        x, weight, bias = map(self.tensors.get, ("x", "weight", "bias"))
        y, s = triton_mixed.mixed_forward(x, weight, bias, None, self.lows, self.segments)
        self.tensors.setdefault("s", s)
        return y, s

    def backward(self) -> Any:
        dy, x, weight, s = map(self.tensors.get, ("dy", "x", "weight", "s"))
        needs = [True] * (2 * len(self.lows))
        dx, _ = triton_mixed.mixed_backward(dy, x, weight, s, self.lows, self.segments, True, needs)
        return [dx]  # the gradients of the factors are parts of arrays of the call


def compare(module: Any, make: Callable[..., Any], *given: Any) -> tuple[int, list[str]]:
    """The launches of the fourth call, which is a repetition, against Triton's own of the same call. module: the one that repeats."""
    recording.forget()
    for _ in range(3):
        earlier = make(*given)
        earlier.forward(), earlier.backward()
    call = make(*given)
    before = _Launcher.count
    repeated = [(run, *calls_of(run)) for run in (call.forward, call.backward)]
    by_launcher = _Launcher.count - before
    kept: list[Any] = []
    found: list[str] = []
    known = {t.data_ptr(): name for name, t in call.tensors.items() if t is not None}
    plain, module.repeat = module.repeat, partial(by_triton, kept)
    for run, results, calls in repeated:
        own, own_calls = calls_of(run)
        names, own_names = (
            known | {t.data_ptr(): f"result {i}" for i, t in enumerate(each)}
            for each in (results, own)
        )
        found += differences(calls, own_calls, names, own_names)
    module.repeat = plain
    kinds = [type(value[1]) for value in recording._recordings.values()]
    found += [] if kinds == [recording.Recording] * 2 else ["the call was not repeated"]
    found += [f"{by_launcher} launches by Triton's launcher"] if by_launcher else []
    return sum(len(calls) for _, _, calls in repeated), found


def unseen_by_a_profiler(case: tuple[Any, ...], plan: str) -> list[str]:
    """Whether a hook on Triton's launches misses any of a repeated call."""
    recording.forget()
    for _ in range(3):
        Call(case, plan).forward()
    seen: list[Any] = []
    knobs.runtime.launch_enter_hook = seen.append
    try:
        _, calls = calls_of(Call(case, plan).forward)
    finally:
        knobs.runtime.launch_enter_hook = None
    return [] if calls and len(seen) == len(calls) else [f"a profiler saw {len(seen)} launches"]


def main() -> None:
    use_driver()
    compared, found = 0, unseen_by_a_profiler(CASES[0], "split")
    for case in CASES:
        for plan in dispatch.TRITON_PLANS:
            if (plan == "fused" and case[4]) or (plan == "decode" and case[0] > 64):
                continue
            launched, differing = compare(triton_linear, Call, case, plan)
            compared += launched
            found += [f"{case} {plan}: {one}" for one in differing]
    for mixed in MIXED:
        launched, differing = compare(triton_mixed, MixedCall, *mixed)
        compared += launched
        found += [f"{mixed}: {one}" for one in differing]
    result = {"triton": triton.__version__, "compared": compared, "differences": found}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
