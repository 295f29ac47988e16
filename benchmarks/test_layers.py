"""One layer under pytest-benchmark: forward, forward + backward and merge, on the CPU and on a GPU if there is one.

    pytest benchmarks --benchmark-only

For comparing two states of the sources; `run.py` writes the records. What is timed is checked against the float64 reference.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CPU_CASES, TARGETS
from torch import Tensor, nn

import fastlora
from fastlora.benchmark.cases import BASELINE, FORWARD, FORWARD_BACKWARD, Case
from fastlora.benchmark.checks import NAMES, Oracle
from fastlora.benchmark.implementations import ALPHA_PER_RANK, IMPLEMENTATIONS
from fastlora.benchmark.workload import Workload, saved_bytes, trainable

SHAPES: dict[str, tuple[Case, ...]] = {"cpu": CPU_CASES[:3]}
TIMED: dict[str, tuple[str, ...]] = {"cpu": (BASELINE, "fastlora", "peft")}
if torch.cuda.is_available():
    SHAPES["cuda"] = tuple(target.cases[0] for target in TARGETS)
    TIMED["cuda"] = (BASELINE, "fastlora", "peft", "peft-bf16")
MERGED = ("torch", "fastlora", "peft")


def _parameters(names: dict[str, tuple[str, ...]]) -> list[Any]:
    return [
        pytest.param(device, case, name, id=f"{device}-{case.name.replace(' ', '-')}-{name}")
        for device, cases in SHAPES.items()
        for case in cases
        for name in names[device]
    ]


def _timed(benchmark: Any, mode: str, work: Workload, run: Callable[[], Any]) -> Any:
    """Time `run`, on a GPU until it is idle again, and return its last result."""

    def call() -> Any:
        result = run()
        if work.device.type == "cuda":
            torch.cuda.synchronize(work.device)
        return result

    call()  # compiles kernels; from a slow first call pytest-benchmark would derive too few rounds
    benchmark.group = f"{mode}, {work.case.name}, {work.device}"
    return benchmark(call)


def _checked_layer(work: Workload, name: str) -> tuple[nn.Module, Oracle]:
    layer = IMPLEMENTATIONS[name](work.case, work.frozen[0], work.lora_a, work.lora_b)
    oracle = Oracle(work)
    oracle.check(name, layer)
    return layer, oracle


def _check_timed(oracle: Oracle, name: str, layer: nn.Module, results: dict[str, Tensor]) -> None:
    """Without dropout the results are right; with it, whose mask is not known, they are finite and not those without."""
    if oracle.work.case.p == 0:
        oracle.compare(name, results, adapted=bool(trainable(layer)))
        return
    assert all(tensor.isfinite().all() for tensor in results.values())
    with torch.no_grad():
        undropped = layer.eval()(oracle.work.x[0])
    assert torch.equal(results["y"], undropped) == (name == BASELINE)


@pytest.mark.parametrize(("device", "case", "name"), _parameters(TIMED))
def test_forward(benchmark: Any, device: str, case: Case, name: str) -> None:
    work = Workload(case, torch.device(device))
    layer, oracle = _checked_layer(work, name)
    with torch.no_grad():
        y = _timed(benchmark, FORWARD, work, lambda: layer(work.x[0]))
    _check_timed(oracle, name, layer, {"y": y})


@pytest.mark.parametrize(("device", "case", "name"), _parameters(TIMED))
def test_forward_and_backward(benchmark: Any, device: str, case: Case, name: str) -> None:
    work = Workload(case, torch.device(device))
    layer, oracle = _checked_layer(work, name)
    leaves = [work.x[0], *trainable(layer)]

    def run() -> dict[str, Tensor]:
        y = layer(work.x[0])
        gradients = torch.autograd.grad(y, leaves, work.dy[0])
        return dict(zip(NAMES, (y.detach(), *gradients), strict=False))

    benchmark.extra_info["saved_bytes"] = saved_bytes(layer, lambda: layer(work.x[0]))
    _check_timed(oracle, name, layer, _timed(benchmark, FORWARD_BACKWARD, work, run))


@pytest.mark.parametrize(("device", "case", "name"), _parameters(dict.fromkeys(SHAPES, MERGED)))
def test_merge(benchmark: Any, device: str, case: Case, name: str) -> None:
    """fastlora's merge also compares the merged layer with the adapted one on random rows; torch's is the sum alone."""
    work = Workload(case, torch.device(device))

    def set_up() -> tuple[tuple[nn.Module], dict[str, Any]]:
        frozen = copy.deepcopy(work.frozen[0])  # PEFT changes it
        if name == "torch":
            return (frozen,), {}
        layer = IMPLEMENTATIONS[name](case, frozen, work.lora_a, work.lora_b)
        return (nn.Sequential(layer),), {}

    def merge(model: Any) -> Any:
        if name == "torch":
            update = torch.mm(work.lora_b, work.lora_a).mul_(ALPHA_PER_RANK)
            weight = (model.weight + update).to(model.weight.dtype)
        elif name == "fastlora":
            merged: Any = fastlora.merge_lora_weights(model)
            weight = merged[0].weight
        else:
            model[0].merge()
            weight = model[0].get_base_layer().weight
        if work.device.type == "cuda":
            torch.cuda.synchronize(work.device)
        return weight

    benchmark.group = f"merge, {case.name}, {device}"
    merged = benchmark.pedantic(merge, setup=set_up, rounds=20, warmup_rounds=2)
    _check_merged(work, merged)


def _check_merged(work: Workload, merged: Tensor) -> None:
    """The bound is that of fastlora/benchmark/checks.py."""
    weight = work.frozen[0].weight
    exact, plain = (
        weight.to(dtype) + ALPHA_PER_RANK * work.lora_b.to(dtype) @ work.lora_a.to(dtype)
        for dtype in (torch.float64, weight.dtype)
    )
    allowed = 2 * (plain.double() - exact).abs().max()
    allowed += 4 * torch.finfo(weight.dtype).eps * exact.abs().max()
    assert merged.dtype == weight.dtype
    assert (merged.double() - exact).abs().max() <= allowed
