"""The plugin `tests/support/peft_suite.py` accelerates what PEFT builds, counts fused forwards, and fails a run without any."""

import os
import subprocess
import sys

import pytest

from tests.support.paths import ROOT
from tests.support.processes import TIME_LIMIT_S

TESTS = ROOT / "tests" / "support"

CODE = """
import peft
import torch

def build(**options):
    base = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    return peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0"], **options))

def test_plain():
    model = build()
    model.add_adapter("late", peft.LoraConfig(r=2, target_modules=["1"]))
    model(torch.ones(1, 4))
    model.set_adapter("late")
    model(torch.ones(1, 4))

def test_dora():
    build(use_dora=True)(torch.ones(1, 4))
"""


def run(folder, *options):
    (folder / "test_inner.py").write_text(CODE)
    path = os.pathsep.join([str(TESTS), str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "peft_suite"]
    return subprocess.run(
        [*command, *options],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT_S,
    )


@pytest.mark.slow
def test_the_fused_forwards_are_counted_in_first_and_later_adapters(tmp_path):
    result = run(tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    # DoRA's layer is accelerated too, but uses PEFT's forward.
    line = "2 forwards took the fused path, in 1 tests; 3 layers were accelerated"
    assert line in result.stdout.splitlines()


@pytest.mark.slow
def test_a_run_without_a_fused_forward_fails(tmp_path):
    result = run(tmp_path, "-k", "dora")
    assert result.returncode == 1
    assert "1 passed" in result.stdout
    assert "FAILED: no forward took the fused path" in result.stdout
