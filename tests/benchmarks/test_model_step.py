"""Whole training steps are timed for every contestant that is right, and the others are recorded with the reason."""

import json

import pytest
import torch

import fastlora

pytest_plugins = "tests.support.bench_fixtures"
# PEFT's
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
TINY = ("--only=llama-tiny", "--reps=1")


@pytest.fixture
def step(bench, tmp_path, monkeypatch):
    """Runs the program on the tiny model, compiled without a code generator. Returns its exit status and its record."""
    monkeypatch.setattr(bench.step_models, "COMPILER", "aot_eager")
    output = tmp_path / "step.json"

    def run(*arguments):
        status = bench.model_step.main([*TINY, f"--output={output}", *arguments])
        return status, json.loads(output.read_text()) if output.exists() else None

    return run


def test_every_implementation_trains_the_model_and_fastlora_saves_less(bench, step, capsys):
    status, record = step()
    rows = {row["backend"]: row for row in record["results"]}
    assert status == 0 and record["absent"] == record["not_run"] == []
    assert tuple(rows) == bench.step_models.CPU_CONTESTANTS
    assert all(row["ms_p50"] > 0 for row in rows.values())
    # Of each of two gated MLPs neither the activation nor the product: 2 × 64 numbers for each of 16 tokens.
    assert (
        rows["fastlora"]["saved_bytes"] - rows["fastlora-fused"]["saved_bytes"]
        >= 2 * 2 * 64 * 16 * 4
    )
    assert rows["fastlora"]["saved_bytes"] < rows["peft"]["saved_bytes"]
    assert rows["fastlora"]["trainable"] == rows["peft"]["trainable"] < rows["full"]["trainable"]
    table = bench.model_tables.model_table([record])
    assert "| llama-tiny | fastlora, `fuse` |" in table and "rank 8, dropout 0.1" in table
    assert "ms per step" in capsys.readouterr().out
    assert bench.model_tables.model_table([]) == "No record: not measured."


def test_experts_are_trained_by_both_libraries_without_dropout(bench, step):
    status, record = step("--only=qwen3-moe-tiny")
    rows = {row["backend"]: row for row in record["results"]}
    assert status == 0 and record["absent"] == record["not_run"] == []
    assert record["settings"]["dropout"] == 0.0
    assert rows["fastlora"]["trainable"] == rows["peft"]["trainable"] < rows["full"]["trainable"]
    # PEFT keeps W + ΔW of all experts.
    assert rows["fastlora"]["saved_bytes"] < 0.6 * rows["peft"]["saved_bytes"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")  # Dynamo's
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_in_bfloat16_every_contestant_runs_with_the_adapters_that_its_name_says(bench, step):
    names = tuple(bench.step_models.CONTESTANTS)
    status, record = step("--dtype=bfloat16", f"--implementations={','.join(names)}")
    rows = {row["backend"]: row for row in record["results"]}
    assert status == 0 and record["absent"] == []
    assert tuple(rows) == names  # what compiles comes last
    narrow = {name for name, row in rows.items() if row["trained_dtype"] == "bfloat16"}
    assert narrow == {"fastlora-bf16", "peft-bf16", "peft-compiled", "full"}
    compiled = {name for name, row in rows.items() if row["compile_seconds"] is not None}
    assert compiled == {"fastlora-compiled", "peft-compiled"}
    assert rows["fastlora"]["saved_bytes"] < rows["peft"]["saved_bytes"]
    assert list(record["seconds"]) == ["llama-tiny plain", "llama-tiny compiled"]


def test_the_same_contestant_twice_is_recorded_as_absent(step):
    status, record = step("--implementations=peft-bf16,peft")
    (absent,) = record["absent"]
    assert status == 0 and [row["backend"] for row in record["results"]] == ["peft"]
    assert (absent["backend"], absent["kind"]) == ("peft-bf16", "absent")
    assert absent["reason"] == "the weights are float32: identical to peft"


def test_full_fine_tuning_that_does_not_fit_is_not_built(bench, step, monkeypatch):
    small = bench.step_models.MODELS["llama-tiny"]
    unfit = bench.step_models.Model(**vars(small) | {"full_on_cpu": False})
    monkeypatch.setitem(bench.step_models.MODELS, "llama-tiny", unfit)
    status, record = step("--implementations=full,fastlora")
    assert status == 0 and [row["backend"] for row in record["results"]] == ["fastlora"]
    assert "full fine-tuning of llama-tiny (weights" in bench.model_tables.model_table([record])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["fastlora", "peft"])
def test_an_implementation_that_computes_something_else_is_not_timed(
    bench, step, monkeypatch, capsys, name, dtype
):
    adapted = bench.model_step.adapted

    def broken(contestant, *arguments):
        model = adapted(contestant, *arguments)
        if contestant == name:
            with torch.no_grad():
                for parameter in fastlora.get_trainable_params(model):
                    parameter.fill_(0.02)
        return model

    monkeypatch.setattr(bench.model_step, "adapted", broken)
    status, record = step(f"--dtype={dtype}", "--implementations=fastlora,peft,full")
    (absent,) = record["absent"]
    assert (absent["backend"], absent["kind"]) == (name, "wrong")
    assert "the output is off by" in absent["reason"]
    assert name not in {row["backend"] for row in record["results"]}
    assert len(record["results"]) == 2 and status == (name == "fastlora")
    assert f"{name} fails: wrong" in capsys.readouterr().err


def test_a_contestant_that_fails_does_not_end_the_run(bench, step, monkeypatch):
    adapted = bench.model_step.adapted

    def failing(name, *arguments):
        if name == "peft":
            raise torch.OutOfMemoryError("out of memory\n" + "details\n" * 9)
        return adapted(name, *arguments)

    monkeypatch.setattr(bench.model_step, "adapted", failing)
    status, record = step("--implementations=peft,fastlora")
    (absent,) = record["absent"]
    assert status == 0 and absent["kind"] == "OutOfMemoryError"
    assert absent["reason"].count("\n") == 4
    table = bench.model_tables.model_table([record])  # without PEFT there is no ratio
    assert "| llama-tiny | fastlora | " in table and " ms | – | " in table


def test_no_part_is_started_without_time_left(step, capsys):
    status, record = step("--budget-seconds=0")
    assert status == 0 and record is None
    assert "no time left for llama-tiny plain" in capsys.readouterr().err


def test_what_compiles_runs_last(bench):
    names = ("peft-compiled", "fastlora")
    parts = bench.model_step.parts_of(["vit-b", "llama-1b"], names)
    assert [part[:2] for part in parts] == [
        ("vit-b plain", "vit-b"),
        ("llama-1b plain", "llama-1b"),
        ("vit-b compiled", "vit-b"),
        ("llama-1b compiled", "llama-1b"),
    ]
    assert [part[2] for part in parts[1:3]] == [("fastlora",), ("peft-compiled",)]


def test_an_unknown_contestant_is_named(bench, capsys):
    with pytest.raises(SystemExit):
        bench.model_step.main(["--implementations=fastlora,nothing"])
    assert "got nothing" in capsys.readouterr().err


def invented_record():
    row = {"model": "vit-b", "saved_bytes": 2**20, "peak_bytes": 2**21, "state_bytes": 2**22}
    times = [("peft", "eager", 8.0), ("peft-bf16", "eager", 6.0), ("fastlora", "eager", 4.0)]
    times += [("peft", "graph", 6.0), ("fastlora-compiled", "eager", 3.0)]
    return {
        "environment": {
            **{"device": "cuda", "gpu": "Invented GPU", "torch": "0", "peft": "0"},
            **{"reps": 1, "command": "python model_step.py"},
        },
        "settings": {"rank": 8, "dropout": 0.1, "dtype": "bfloat16"},
        "results": [
            row | {"backend": name, "timing": timing, "ms_p50": ms} for name, timing, ms in times
        ],
        "absent": [{"model": "vit-b", "backend": "full", "reason": "out of memory"}],
    }


def test_a_record_of_a_gpu_has_a_table_of_its_own(bench):
    """Speeds are relative to the faster of PEFT's two kinds of adapters."""
    table = bench.model_tables.model_table([invented_record()])
    assert "| vit-b | fastlora, compiled | 3.0 ms | – | 2.00× | 1 MiB | 2 MiB | 4 MiB |" in table
    assert "| vit-b | PEFT | 8.0 ms | 6.0 ms | 0.75×, 1.00× |" in table
    assert "results/model-step-invented-gpu.json" in table
    experts = invented_record()
    for row in experts["results"]:
        row["model"] = "qwen3-moe-2b"
    experts["absent"] = []
    assert "results/model-step-moe-invented-gpu.json" in bench.model_tables.model_table([experts])
    assert "Not run: full fine-tuning of vit-b (out of memory)." in table


def test_the_readmes_table_of_models_has_a_line_for_each_figure(bench):
    cpu = json.loads((bench.report.RESULTS / "model-step-cpu.json").read_text())
    assert bench.model_tables.step_table([]) == "No record: not measured."
    lines = bench.model_tables.step_table([cpu, invented_record()]).splitlines()
    assert lines[0] == "| Invented GPU | | fastlora | PEFT, bf16 adapters | PEFT |"
    assert lines[2:5] == [
        "| vit-b, 64 images | step, eager | 4.0 ms | 6.0 ms | 8.0 ms |",
        "| vit-b, 64 images | step, as a CUDA graph | – | – | 6.0 ms |",
        "| | peak memory of a step | 2 MiB | 2 MiB | 2 MiB |",
    ]
    rows = {row["backend"]: row for row in cpu["results"] if row["model"] == "llama-1b"}
    seconds = f"{rows['fastlora']['ms_p50'] / 1e3:.2f}"
    assert any(line.startswith(f"| llama-1b, 128 tokens | step | {seconds} s |") for line in lines)
    # `fuse` keeps at least a quarter less.
    assert rows["fastlora-fused"]["saved_bytes"] <= 0.75 * rows["fastlora"]["saved_bytes"]


@pytest.mark.gpu
def test_on_a_gpu_steps_are_timed_eagerly_and_as_graphs(step):
    names = ("fastlora", "fastlora-fused", "peft", "peft-bf16", "full")
    status, record = step("--device=cuda", f"--implementations={','.join(names)}")
    assert status == 0 and record["absent"] == []
    timed = {(row["backend"], row["timing"]) for row in record["results"]}
    assert timed == {(name, timing) for name in names for timing in ("eager", "graph")}
    assert all(row["peak_bytes"] > 0 for row in record["results"])
