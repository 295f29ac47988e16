"""Fixture for tests of benchmarks/."""

import importlib
from types import SimpleNamespace

import pytest

from tests.support.paths import ROOT

NAMES = (
    "cases",
    "gpu_tables",
    "implementations",
    "mixed_batch",
    "model_step",
    "model_tables",
    "overhead",
    "plots",
    "report",
    "run",
    "scaling",
    "step_models",
)
SHARED = ("case_run", "checks", "record", "timing", "workload")


@pytest.fixture
def bench(monkeypatch):
    """The modules of benchmarks/, imported as the scripts see them, and those of fastlora.benchmark that they share."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    shared = {name: importlib.import_module(f"fastlora.benchmark.{name}") for name in SHARED}
    return SimpleNamespace(**shared, **{name: importlib.import_module(name) for name in NAMES})
