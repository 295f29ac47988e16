"""Set-up for all tests."""

import os
import signal
import sys
from collections.abc import Iterator

# A job that a shell runs in the background, or under nohup, ignores Ctrl-C, and so would the processes that tests start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# One thread per process: sums then have a fixed order, which the tests of bit-for-bit equality need, and the workers of
# pytest-xdist and the ranks of distributed tests share the cores. OpenMP reads it when torch is imported. An inherited value is replaced.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

# Read when a Triton kernel is decorated, so it must be set before the first import of `fastlora.kernels`.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


# The kernels need Triton 3.4; before that the library runs torch, and `explain` shows this. Single tests of other files skip themselves.
try:
    import triton.tools.tensor_descriptor  # noqa: F401
except ImportError:
    collect_ignore_glob = [
        *("kernels/*", "ops/triton/*", "ops/test_compile.py", "ops/test_dispatch.py"),
        *("ops/test_tune.py", "model/test_on_device.py"),
    ]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    """Each test begins with the same random numbers, and repeats no launches of another one, whose kernels it may have replaced."""
    torch.manual_seed(0)
    recording = sys.modules.get("fastlora.kernels.recording")
    if recording is not None:
        recording.forget()


@pytest.fixture
def bfloat16() -> Iterator[None]:
    """Without a GPU, bfloat16 in Triton's interpreter, which computes wrongly in it."""
    from tests.support import interpreter  # imports Triton

    with interpreter.bfloat16():
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped without a device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
