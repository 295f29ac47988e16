"""benchmarks/test_layers.py runs under pytest-benchmark, and fails where a result is wrong."""

import importlib
import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import fastlora
from tests.support.paths import ROOT
from tests.support.processes import TIME_LIMIT_S

pytest_plugins = "tests.support.bench_fixtures"


@pytest.mark.slow
def test_the_benchmarks_are_collected_timed_and_written_as_json(tmp_path):
    pytest.importorskip("pytest_benchmark")
    output = tmp_path / "times.json"
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only"]
    command += ["-q", "-p", "no:cacheprovider", "-k", "512x256 and fastlora"]
    command += ["--benchmark-max-time=0.01", "--benchmark-min-rounds=1"]
    command += [f"--benchmark-json={output}", f"--benchmark-storage={tmp_path}"]
    # In a worker of pytest-xdist its variables would disable the plugin.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIME_LIMIT_S
    )
    assert run.returncode == 0, run.stdout + run.stderr
    timed = {row["name"].split("[")[0]: row for row in json.loads(output.read_text())["benchmarks"]}
    assert timed.keys() == {"test_forward", "test_forward_and_backward", "test_merge"}
    assert all(row["stats"]["median"] > 0 for row in timed.values())
    assert timed["test_merge"]["group"].startswith("merge, 512x256->768")
    assert timed["test_forward_and_backward"]["extra_info"]["saved_bytes"] > 0


class Once:
    """In place of the fixture `benchmark`: one call, not timed."""

    def __init__(self):
        self.extra_info = {}

    def __call__(self, function):
        return function()

    def pedantic(self, function, setup, **rounds):
        arguments, keywords = setup()
        return function(*arguments, **keywords)


@pytest.fixture
def layers(bench):
    """The module with the benchmarks."""
    return importlib.import_module("test_layers")


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("name", ["linear", "fastlora", "peft"])
def test_a_right_implementation_passes(bench, layers, name, p):
    case = bench.cases.Case(16, 24, 40, 2, p)
    benchmark = Once()
    layers.test_forward(benchmark, "cpu", case, name)
    layers.test_forward_and_backward(benchmark, "cpu", case, name)
    assert (benchmark.extra_info["saved_bytes"] > 0) == (name != "linear")
    layers.test_merge(benchmark, "cpu", case, "torch" if name == "linear" else name)


class Faulty(nn.Module):
    """A right layer in evaluation mode only; in training mode its output is scaled, or dropout is left out."""

    def __init__(self, layer, fault):
        super().__init__()
        self.layer, self.fault = layer, fault

    def forward(self, x):
        if self.training and self.fault == "scaled":
            return self.layer(x) * 1.001
        self.layer.train(self.training and self.fault != "no dropout")
        return self.layer(x)


@pytest.mark.parametrize(("p", "fault"), [(0.0, "scaled"), (0.1, "no dropout")])
@pytest.mark.parametrize("mode", ["test_forward", "test_forward_and_backward"])
def test_a_timed_result_that_is_wrong_fails(bench, layers, monkeypatch, mode, p, fault):
    right = layers.IMPLEMENTATIONS["peft"]
    monkeypatch.setitem(layers.IMPLEMENTATIONS, "peft", lambda *all: Faulty(right(*all), fault))
    case = bench.cases.Case(16, 24, 40, 2, p)
    with pytest.raises(AssertionError if p else bench.checks.Wrong):
        getattr(layers, mode)(Once(), "cpu", case, "peft")


def test_a_wrong_merge_fails(bench, layers, monkeypatch):
    merge = fastlora.merge_lora_weights

    def wrong(model):
        merged = merge(model)
        with torch.no_grad():
            merged[0].weight[3, 4] += 1e-3
        return merged

    monkeypatch.setattr(fastlora, "merge_lora_weights", wrong)
    with pytest.raises(AssertionError):
        layers.test_merge(Once(), "cpu", bench.cases.Case(16, 24, 40, 2), "fastlora")
