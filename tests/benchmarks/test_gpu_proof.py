"""The proof on a GPU, rehearsed on the CPU: its stages, what a stopped stage leaves, and the summary."""

import functools
import importlib
import itertools
import json
import math
import re
import subprocess
import sys

import pytest
import torch

from tests.support.paths import ROOT
from tests.support.processes import TIME_LIMIT_S
from tests.support.tolerance import assert_close

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_proof


def _rehearse(out, *arguments):
    command = [sys.executable, "benchmarks/gpu_proof.py", "--out", str(out), "--rehearse"]
    return subprocess.run(
        [*command, "--jobs", "1", "--minutes", "10", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT_S,
    )


@pytest.mark.slow
def test_the_rehearsal_runs_every_kernel_and_plan(tmp_path):
    pytest.importorskip("triton.tools.tensor_descriptor")
    run = _rehearse(
        tmp_path,
        *("--stages", "facts,smoke,gated,experts,grouped,tune,profile,calls,models,moe"),
        *("--candidates", "2"),
    )
    assert run.returncode == 0, run.stdout + run.stderr
    smoke = json.loads((tmp_path / "smoke.json").read_text())
    assert {row["dtype"] for row in smoke} == {"float16", "float32"}
    kernels = {row["what"] for row in smoke}
    assert {"x", "dy", "update", "decode", "plan split", "plan accumulate"} <= kernels
    assert all(error <= 1 for row in smoke for error in row["errors"].values())
    grouped = json.loads((tmp_path / "grouped.json").read_text())
    assert {row["dtype"] for row in grouped["results"]} == {"float16", "float32"}
    for row in grouped["results"]:
        assert {"s", "y", "ds", "db", "da", "dx", "again", "outside"} == row["errors"].keys()
        assert max(row["errors"].values()) <= 1
    of_a_layer = {"y", "dx", "da", "db", "again"}
    of_a_block = {f"{part} {layer}" for part in ("da", "db") for layer in ("gate", "up", "down")}
    for stage, names in (
        ("gated", {"y", "dx", "again"} | of_a_block),
        ("experts", of_a_layer),
    ):
        content = json.loads((tmp_path / f"{stage}.json").read_text())
        assert {row["dtype"] for row in content["results"]} == {"float16", "float32"}
        for row in content["results"]:
            assert row["errors"].keys() == names and max(row["errors"].values()) <= 1
        assert all(row["us"] > 0 for row in content["times"])
    for stage in ("gated", "experts", "grouped"):
        assert f"{stage}: 2 of 2 correct" in run.stdout
    timed = {row["what"]: row["us"] for row in grouped["times"]}
    assert {"linear", "linear, then grouped", "linear, then a loop", "grouped backward"} <= {*timed}
    assert min(timed.values()) > 0
    tuned = [row["what"].strip() for row in json.loads((tmp_path / "tune.json").read_text())]
    assert {"linear", "dy W added", "decode", "y decode", "dx accumulate"} <= set(tuned)
    (entry,) = json.loads((tmp_path / "tuning.json").read_text()).values()
    assert entry["plan"] and entry["config"]["dy"]["block_n"] > 0
    assert f"smoke: {len(smoke)} of {len(smoke)} correct" in run.stdout
    for model in ("llama-tiny", "qwen3-moe-tiny"):
        assert f"{model} eager ms: fastlora " in run.stdout
    calls = json.loads((tmp_path / "calls.json").read_text())
    assert calls["not_run"] == [] and len(calls["results"]) == 3 * 3
    rows = [row for row in calls["results"] if row["backend"] == "fastlora-bf16"]
    assert [row.get("own_thread") for row in rows] == [None, True, False]
    for row in rows[1:]:
        parts = [row["us_to_function"], row["us_in_function"], row["us_back"]]
        assert min(parts) > 0 and sum(parts) < 100 * row["us"]
    assert any("_gradients" in name for name, *_ in rows[2]["functions"])
    assert len(run.stdout.splitlines()) <= 60 + 5


# The kernels need this part of Triton.
def test_what_is_timed_for_groups_computes_the_same():
    pytest.importorskip("triton.tools.tensor_descriptor")
    import grouped_proof

    case = grouped_proof.Case((3, 0, 5), 16, 24, 4)
    named = grouped_proof.timed(case, torch.float32, torch.device("cpu"))
    y = named["linear, then a loop"]()
    assert_close(named["linear, then grouped"](), y, y.double())
    wide = grouped_proof.Groups(case, torch.float32, torch.device("cpu")).expected(torch.float64)
    pairs = zip(("da", "db"), named["grouped backward"](), named["loop backward"](), strict=True)
    for name, one, other in pairs:
        assert_close(one, other, wide[name], name)


def test_what_is_timed_for_gated_mlps_computes_the_same():
    pytest.importorskip("triton.tools.tensor_descriptor")
    import gated_proof

    case = gated_proof.Case(40, 32, 48, (4, 2, 3), 0.3, "gelu", bias=True)
    block = gated_proof.Block(case, torch.float32, torch.device("cpu"))
    named = gated_proof.timed(case, torch.float32, torch.device("cpu"))
    by_torch = functools.partial(block.by, gated_proof._reference)
    plain, wide = (block.results(by_torch, dtype) for dtype in (torch.float32, torch.float64))
    gradients = [name for name in wide if name != "y"]
    for calls in ("three layers", "one call"):
        assert_close(named[calls](), plain["y"], wide["y"])
        found = named[f"{calls}, forward + backward"]()
        for name, gradient in zip(gradients, found, strict=True):
            assert_close(gradient, plain[name], wide[name], name)
    h, s = named["h and S"]()
    assert torch.equal(named["h"](), h) and s.shape == (40, 3)
    _, _, again = named["dg, du and h"]()
    assert torch.equal(again, h)
    assert named["frozen"]().shape == (40, 32)


def test_what_is_timed_for_experts_computes_the_same():
    pytest.importorskip("triton.tools.tensor_descriptor")
    import experts_proof

    case = experts_proof.Case((3, 0, 13), 32, 16, 4)
    bank = experts_proof.Bank(case, torch.float32, torch.device("cpu"))
    named = experts_proof.timed(case, torch.float32, torch.device("cpu"))
    plain, wide = (bank.results(bank.by_torch, d) for d in (torch.float32, torch.float64))
    for calls in ("adapted", "W + ΔW"):
        assert_close(named[calls](), plain["y"], wide["y"])
        found = named[f"{calls}, forward + backward"]()
        for name, gradient in zip(("dx", "da", "db"), found, strict=True):
            assert_close(gradient, plain[name], wide[name], name)


@pytest.mark.parametrize(
    ("module", "class_name", "wrong"),
    [
        ("gated_proof", "Block", ("da down", "dx")),
        ("experts_proof", "Bank", ("db", "y")),
    ],
)
def test_a_proof_notices_a_wrong_result(module, class_name, wrong, monkeypatch):
    pytest.importorskip("triton.tools.tensor_descriptor")
    proof = importlib.import_module(module)
    (case,) = proof.REHEARSED
    kind = getattr(proof, class_name)
    results = kind.results

    def changed(self, run, dtype):
        found = results(self, run, dtype)
        if dtype is None:  # by the kernels
            for name in wrong:
                found[name].view(-1)[0] += 0.05
        return found

    monkeypatch.setattr(kind, "results", changed)
    row = proof.check("float32", case)
    assert {name for name, error in row["errors"].items() if error > 1} == {*wrong}
    assert gpu_proof.is_wrong(row)
    calls = itertools.count()

    def drifting(self, run, dtype):
        found = results(self, run, dtype)
        found["dx"].view(-1)[0] += 1e-6 * next(calls)
        return found

    monkeypatch.setattr(kind, "results", drifting)
    assert proof.check("float32", case)["errors"]["again"] == math.inf
    monkeypatch.setattr(kind, "results", lambda *_: 1 // 0)
    row = proof.check("float32", case)
    assert row["failed"].startswith("ZeroDivisionError") and gpu_proof.is_wrong(row)


@pytest.mark.slow
def test_a_stage_that_is_stopped_leaves_its_log_and_the_others_run(tmp_path):
    run = _rehearse(tmp_path, "--stages", "tests:3,facts")
    assert run.returncode == 1
    stages = json.loads((tmp_path / "stages.json").read_text())
    assert stages["tests"]["status"] == "stopped at its time limit"
    assert stages["facts"]["status"] == 0 and (tmp_path / "facts.json").exists()
    assert json.loads((tmp_path / "tests.json").read_text())["failed"] == []


def test_outcomes_are_read_from_an_incomplete_log():
    log = (
        "tests/a.py::test_one \n"
        "[gw1] [  1%] PASSED tests/a.py::test_one \n"
        "[gw0] [  2%] FAILED tests/a.py::test_two[x y] \n"
        "[gw0] [  3%] SKIPPED tests/a.py::test_three \n"
        "[gw2] [  4%] ERROR tests/b.py::test_four \n"
        "tests/b.py::test_five "
    )
    assert gpu_proof.test_outcomes(log) == {
        "passed": 1,
        "skipped": 1,
        "failed": ["tests/a.py::test_two[x y]", "tests/b.py::test_four"],
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("smoke,nothing", "expected some of .*, got nothing"),
        ("smoke:soon", "seconds: could not convert"),
    ],
)
def test_a_wrong_stage_is_named(text, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu_proof.main(["--out", str(tmp_path), "--stages", text])
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("found", "wrong"),
    [
        ({"errors": {"ds": 0.9, "db": 1.0}}, False),
        ({"errors": {"ds": 0.9, "db": 1.1}}, True),
        ({"errors": {"ds": float("nan")}}, True),
        ({"failed": "OutOfResources"}, True),
    ],
)
def test_a_wrong_result_fails_the_smoke_stage(found, wrong, tmp_path, monkeypatch):
    class Pool:
        __init__ = __exit__ = lambda *a: None

        def __enter__(self):
            return self

        def map(self, function, *cases):
            return [[found]]

    monkeypatch.setattr(gpu_proof, "ProcessPoolExecutor", Pool)
    arguments = gpu_proof._arguments(["--out", str(tmp_path), "--rehearse"])
    if wrong:
        with pytest.raises(SystemExit, match="not every result is right"):
            gpu_proof._smoke(arguments)
    else:
        gpu_proof._smoke(arguments)
    assert gpu_proof.is_wrong(found) == wrong and (tmp_path / "smoke.json").exists()


def test_a_failing_stage_is_a_failure(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu_proof, "_run_stage", lambda *a: {"status": 1, "seconds": 0.1})
    (tmp_path / "smoke.json").write_text(
        json.dumps(
            [
                {"dtype": "bfloat16", "shape": "1,2,3,4", "what": "dy", "errors": {"ds": 2.5}},
                {"dtype": "bfloat16", "shape": "1,2,3,4", "what": "x", "failed": "OutOfResources"},
                {"dtype": "bfloat16", "shape": "1,2,3,4", "what": "x", "errors": {"da": 0.5}},
            ]
        )
    )
    wrong = {"model": "vit-b", "backend": "peft", "kind": "wrong", "reason": "off by 2"}
    fine = wrong | {"backend": "full", "kind": "absent"}
    (tmp_path / "models.json").write_text(json.dumps({"results": [], "absent": [wrong, fine]}))
    assert gpu_proof.main(["--out", str(tmp_path), "--stages", "smoke"]) == 1
    printed = capsys.readouterr().out
    assert "smoke: 1 of 3 correct" in printed and "OutOfResources" in printed
    assert "vit-b peft: wrong: off by 2" in printed and "vit-b full" not in printed
