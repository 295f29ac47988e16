"""Mixed batches are timed for every implementation that is right, and the others are recorded with the reason."""

import json

import pytest
import torch

import fastlora

pytest_plugins = "tests.support.bench_fixtures"
pytest.importorskip("peft")
# PEFT's
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture
def mixed(bench, tmp_path):
    """Runs the program on the tiny model. Returns its exit status and its record."""
    output = tmp_path / "mixed.json"

    def run(*arguments):
        status = bench.mixed_batch.main(
            ["--size=tiny", "--reps=1", f"--output={output}", *arguments]
        )
        return status, json.loads(output.read_text()) if output.exists() else None

    return run


@pytest.mark.slow
def test_every_implementation_computes_each_samples_adapter(bench, mixed, capsys):
    status, record = mixed()
    assert status == 0 and record["absent"] == record["not_run"] == []
    assert record["kind"] == "mixed_batch" and record["environment"]["reps"] == 1
    found = [(row["samples"], row["order"], row["backend"]) for row in record["results"]]
    batches = [(8, "runs"), (16, "runs"), (16, "alternating")]
    assert found == [(*batch, name) for batch in batches for name in bench.mixed_batch.CONTESTANTS]
    assert all(0 < row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"] for row in record["results"])
    assert " 16 samples of    3 tokens, alternating peft-accelerated " in capsys.readouterr().out


def test_orders_of_a_batch(bench):
    runs = bench.mixed_batch.Batch(16, 3, "runs").names
    assert runs == sorted(runs) and len(set(runs)) == 8
    alternating = bench.mixed_batch.Batch(16, 3, "alternating").names
    assert sorted(alternating) == runs and alternating[:8] == list(bench.mixed_batch.ADAPTERS)


@pytest.mark.parametrize("name", ["fastlora", "peft"])
def test_an_implementation_that_computes_something_else_is_not_timed(
    bench, mixed, monkeypatch, capsys, name
):
    calls_of = bench.mixed_batch.calls_of

    def broken(*models):
        builders = calls_of(*models)
        call = builders[name]()
        # The adapters of other samples.
        return builders | {name: lambda: lambda ids, names: call(ids, names[::-1])}

    monkeypatch.setattr(bench.mixed_batch, "calls_of", broken)
    one = [bench.mixed_batch.Batch(8, 2, "runs")]
    monkeypatch.setattr(bench.mixed_batch, "batches", lambda size: one)
    status, record = mixed("--implementations=fastlora,peft")
    assert {(row["backend"], row["kind"]) for row in record["absent"]} == {(name, "wrong")}
    assert "the output is off by" in record["absent"][0]["reason"]
    assert name not in {row["backend"] for row in record["results"]}
    assert len(record["results"]) == 1 and status == (name != "peft")
    assert f"{name} fails: wrong" in capsys.readouterr().err


def test_the_models_share_the_weights_of_the_base(bench):
    base = bench.step_models.llama(32, 64, 1, 4, 2).eval().requires_grad_(False)
    theirs = bench.mixed_batch.peft_model(base)
    mine = bench.mixed_batch.fastlora_model(base, theirs)
    assert fastlora.list_adapters(mine) == list(bench.mixed_batch.ADAPTERS)
    shared = {p.data_ptr() for p in base.parameters()}
    assert {p.data_ptr() for p in mine.parameters()} == shared
    assert shared < {p.data_ptr() for p in theirs.parameters()}
    with fastlora.use_adapter(mine, "adapter3"):
        layer = mine.layers[0].mlp.up_proj
    twin = theirs.base_model.model.layers[0].mlp.up_proj
    assert torch.equal(layer.lora_B, twin.lora_B["adapter3"].weight)
    assert layer.scaling == twin.scaling["adapter3"] == 2.0


def test_an_unknown_contestant_is_named(bench, capsys):
    with pytest.raises(SystemExit):
        bench.mixed_batch.main(["--implementations=fastlora,nothing"])
    assert "got nothing" in capsys.readouterr().err


def test_the_table_says_how_many_times_as_long_peft_takes(bench):
    assert bench.model_tables.mixed_table([]) == "No record: not measured."
    record = json.loads((bench.report.RESULTS / "mixed-batch-cpu.json").read_text())
    ms = {"base": 1.0, "fastlora": 2.0, "peft-accelerated": 2.5, "peft": 5.0}
    record["results"] = [
        {"samples": 8, "length": 1, "order": "runs", "backend": name, "ms_p50": value}
        for name, value in ms.items()
    ]
    line = bench.model_tables.mixed_table([record]).splitlines()[2]
    assert line == ("| 8 × 1, in runs | 1.0 ms | 2.0 ms | 2.5 ms | 5.0 ms | 2.50× | 2.00× |")
