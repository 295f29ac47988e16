"""Random calls and extreme values against float64, and short forms of the long runs of `make soak`."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import fastlora
from fastlora.ops import reference
from tests.support import endurance
from tests.support.parity import check_call, check_extreme, check_gradients, check_kernels
from tests.support.paths import ROOT
from tests.support.processes import TIME_LIMIT_S

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@pytest.mark.parametrize("first", range(0, 300, 50))
def test_random_calls_match_float64(first):
    for number in range(first, first + 50):
        check_call(number)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in Triton's interpreter
def test_random_kernel_calls_match_float64():
    pytest.importorskip("triton.tools.tensor_descriptor", reason="the kernels need Triton 3.4")
    for number in range(8):
        check_kernels(number)


def test_extreme_values_give_the_same_results_as_plain_torch():
    for number in range(60):
        check_extreme(number)


def test_gradcheck_over_random_sizes():
    for number in range(4):
        check_gradients(number)


@pytest.mark.parametrize("check", [check_call, check_extreme, check_kernels])
def test_the_checks_can_fail(monkeypatch, check):
    """Each of them detects a fused path whose scaling is wrong by a thousandth."""
    if check is check_kernels:
        pytest.importorskip("triton.tools.tensor_descriptor", reason="the kernels need Triton 3.4")
    forward = reference.forward

    def off(x, weight, bias, low, keep=None):
        return forward(x, weight, bias, low._replace(scaling=low.scaling * 1.001 + 1e-3), keep)

    monkeypatch.setattr(reference, "forward", off)
    failures = 0
    for number in range(12):
        try:
            check(number)
        except AssertionError:
            failures += 1
    assert failures >= 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeated_merges_do_not_drift(dtype):
    assert endurance.merge_rounds(20, dtype) == []


@pytest.mark.slow
@linux
def test_steps_injections_and_files_leak_nothing(tmp_path):
    """In a process of its own: the memory of one that has run other tests also grows by what they left to be done."""
    program = (
        "import sys; from pathlib import Path; from tests.support.endurance import *; "
        "print(training_steps(100), injections(30), file_rounds(Path(sys.argv[1]), 20))"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIME_LIMIT_S)
    assert run.stdout.strip() == "[] [] []", run.stdout + run.stderr


@pytest.mark.slow
@linux
def test_a_leak_is_detected_while_more_other_tensors_are_freed(monkeypatch):
    kept, others = [], [torch.zeros(1) for _ in range(50 * 20)]
    inject = fastlora.inject_lora

    def leaky(model, *arguments, **options):
        del others[:20]
        count = inject(model, *arguments, **options)
        kept.append(fastlora.get_lora_params(model))
        return count

    monkeypatch.setattr(fastlora, "inject_lora", leaky)
    failures = " ".join(endurance.injections(30))
    assert "adapters are still alive" in failures and "tensors became" in failures


def test_masks_are_the_same_under_any_number_of_threads():
    assert endurance.repeated_calls(6) == []
