"""Fixture for tests of benchmarks/."""

import importlib
from types import SimpleNamespace

import pytest

from tests.support.paths import ROOT

NAMES = (
    "case_run",
    "cases",
    "checks",
    "gpu_tables",
    "implementations",
    "model_step",
    "overhead",
    "plots",
    "record",
    "report",
    "run",
    "scaling",
    "step_models",
    "timing",
    "workload",
)


@pytest.fixture
def bench(monkeypatch):
    """The modules of benchmarks/, imported as the scripts see them."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
