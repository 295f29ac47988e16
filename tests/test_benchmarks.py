"""The benchmark runs, refuses to time what is wrong, and the README holds what the records say."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def modules(monkeypatch):
    """`run`, `cases` and `report` of benchmarks/, imported as the scripts see them."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return {name: importlib.import_module(name) for name in ("run", "cases", "report")}


def test_a_record_has_everything_needed_to_trust_it(tmp_path):
    output = tmp_path / "record.json"
    command = [
        sys.executable,
        "-W",
        "error",
        "benchmarks/run.py",
        "--device",
        "cpu",
        "--reps",
        "1",
        "--output",
        str(output),
    ]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    record = json.loads(output.read_text())
    for key in (
        "cpu",
        "threads",
        "torch",
        "triton",
        "peft",
        "python",
        "git_sha",
        "dirty",
        "date",
        "reps",
        "baseline",
        "command",
    ):
        assert record["environment"][key] is not None
    assert len(record["results"]) == 5 * 2 * 3
    for result in record["results"]:
        assert 0 < result["ms_p20"] <= result["ms_p50"] <= result["ms_p80"]
    kept = {
        (r["case"], r["backend"]): r["saved_bytes"]
        for r in record["results"]
        if r["saved_bytes"] is not None
    }
    for case in {case for case, _ in kept if "p0.1" in case}:
        assert kept[case, "fastlora"] < 0.6 * kept[case, "peft"]


def test_a_wrong_layer_gets_no_time(modules):
    case = modules["cases"].Case(16, 8, 12, 2)
    layers = modules["run"].build(case)
    x, dy = torch.randn(16, 8), torch.randn(16, 12)
    modules["run"].check(layers, x, dy)
    layers["fastlora"].register_forward_hook(lambda module, inputs, y: y * 1.001)
    with pytest.raises(RuntimeError, match="fastlora: y is off by"):
        modules["run"].check(layers, x, dy)


def test_the_readme_holds_what_the_records_say(modules):
    assert modules["report"].main(["--check"]) == 0


def test_a_missing_marker_is_an_error(modules):
    with pytest.raises(ValueError, match="expected the markers <!-- table: cpu -->"):
        modules["report"].fill("no markers", {"cpu": "table"})
