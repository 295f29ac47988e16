"""The tables and plots match the records; scaling and the cost of a call are measured as documented."""

import json
import shutil

import pytest
import torch

from fastlora.benchmark.cases import FORWARD, FORWARD_BACKWARD, STEP
from tests.support.paths import ROOT

pytest_plugins = "tests.support.bench_fixtures"
CPU = torch.device("cpu")


# Tables


def invented_record(bench):
    """A GPU record of invented figures, in which the frozen layer takes 1 ms."""
    ms = {"linear": 1.0, "fastlora": 1.05, "peft": 4.2, "peft-bf16": 2.1, "peft-compiled": 1.26}
    rows = [
        {"case": case.name, "mode": mode, "timing": timing, "backend": backend, "ms_p50": value}
        for case in bench.cases.CUDA_CASES
        if case.quick and not case.overhead
        for mode in case.modes
        for timing in ("graph", "eager")
        for backend, value in ms.items()
    ]
    for row in rows:
        if (
            row["backend"] == "fastlora"
            and row["case"].startswith("32x")
            and row["timing"] == "eager"
        ):
            row["ms_p50"] = 1.5
    facts = dict.fromkeys(["driver", "cuda", "torch", "triton", "peft", "command"], "invented")
    facts |= {"device": "cuda", "gpu": "Invented GPU", "reps": 1, "git_sha": "0" * 40}
    facts |= {"dirty": True, "date": "2000-01-01T00:00:00+00:00"}
    absent = {"case": rows[0]["case"], "mode": None, "timing": None, "backend": "unsloth"}
    call = {
        "case": "1x64->64 r4 p0 bfloat16",
        "mode": "forward",
        "backend": "linear",
        "us_p50": 5.0,
    }
    return {
        "environment": facts,
        "results": rows,
        "absent": [absent | {"kind": "absent", "reason": "its fast path has no dropout"}],
        "call_overhead": [call],
        "eta": [{"case": rows[0]["case"], "timing": "graph", "eta": 0.9}],
        "not_run": ["another"],
    }


def test_the_targets_are_listed_with_the_measurements(bench):
    empty = bench.gpu_tables.targets_table([])
    assert empty.count("not measured") == 15 and "graph" not in empty
    record = invented_record(bench)
    table = bench.gpu_tables.targets_table([record]).splitlines()
    assert table[2].split(" | ")[1:] == [
        "≤ 1.08: 1.05 graph, 1.05 eager",
        "≤ 1.11: 1.05 graph, 1.05 eager",
        "≥ 1.55: 2.00 graph, 2.00 eager",
        "≥ 1.40: 1.20 graph, 1.20 eager, missed |",
    ]
    # Decoding: the worst M counts, and the forward pass only.
    assert "≤ 1.08: 1.05 graph, 1.50 eager, missed | – | ≥ 2.50: 2.00 graph, 1.40 eager" in table[5]
    assert "commit 000000000000 with changes" in table[7] and "Not run: another." in table[7]
    assert "Not timed" not in "\n".join(table)
    record["results"] = [r for r in record["results"] if not r["case"].startswith("8x")]
    wrong = {"kind": "wrong", "reason": "fastlora: y is off by 1, allowed 0\nmore"}
    record["absent"].append(record["absent"][0] | {"backend": "fastlora"} | wrong)
    lines = bench.gpu_tables.targets_table([record]).splitlines()
    assert lines[-1] == "- fastlora, 1 case: wrong: fastlora: y is off by 1, allowed 0"
    assert "≤ 1.08: not measured" in bench.gpu_tables.targets_table([record]).splitlines()[5]


def test_a_quick_run_fills_every_target_within_eight_minutes(bench, monkeypatch, tmp_path):
    """With a clock on which every case takes 39 s, compilation included."""
    quick = bench.run._cases(True, True)
    now = [0.0]
    budget = bench.record.Budget(bench.run.QUICK_BUDGET_SECONDS, lambda: now[0])
    ran = []
    for case in quick:
        if budget.begin_case():
            now[0] += 39.0
            budget.end_case()
            ran.append(case)
    assert ran == quick and now[0] <= 480
    wanted = {case for target in bench.cases.TARGETS for case in target.cases}
    assert wanted <= set(quick[: len(wanted)])
    record = invented_record(bench)
    record["results"] = [r for r in record["results"] if r["case"] in {c.name for c in wanted}]
    assert "not measured" not in bench.gpu_tables.targets_table([record])


def test_samples_of_a_quick_run_leave_time_to_compile(bench):
    """The calculated time of all samples is below 40 % of the budget, at twice the time of the cost model."""
    from fastlora.kernels.config import ARCHITECTURES, Problem
    from fastlora.ops import cost

    arch, timing = ARCHITECTURES[90], bench.timing
    implementations = len(bench.run._default_implementations(True, True))
    reps = bench.run._arguments(["--device", "cuda", "--quick"]).reps
    assert reps == bench.run.QUICK_REPS < bench.run._arguments(["--device", "cuda"]).reps
    seconds = 0.0
    for case in bench.run._cases(True, True):
        samples = (reps + timing.WARM_UP) * implementations
        if case.overhead:
            seconds += samples * 2 * timing.OVERHEAD_CALLS * 0.5e-3  # half a millisecond per call
            continue
        q = Problem(case.m, case.n, case.k, case.rank, 2, case.p > 0)
        forward = 2 * min(cost.forward_seconds(arch, q).values())
        copies = bench.workload.copies_needed(case, 50 * 2**20)
        rounds = {
            FORWARD: copies * forward,
            FORWARD_BACKWARD: copies * 2.5 * forward,
            STEP: bench.workload.STEP_LAYERS * 4 * forward,
        }
        each = [max(2e-3 * timing.SAMPLE_MS, rounds[mode]) for mode in case.modes]
        seconds += 2 * samples * sum(each)  # under CUDA graphs and eagerly
    assert seconds < 0.4 * bench.run.QUICK_BUDGET_SECONDS


def test_every_case_of_a_gpu_record_has_a_row(bench):
    tables = bench.gpu_tables.case_tables([invented_record(bench)])
    assert tables.startswith("### Invented GPU")
    assert (
        "| 4096×768 → 768, rank 4, dropout 0, bfloat16 | training step | 1 / 1 | 1.05 / 1.05 |"
        in tables
    )
    assert "| 1×64 → 64, rank 4, dropout 0, bfloat16 | forward | linear 5 |" in tables
    assert "- unsloth, 1 case: absent: its fast path has no dropout" in tables
    assert "dropout 0.1, bfloat16, no-bias: 0.90." in tables


def test_the_tables_match_the_records(bench):
    assert bench.report.main(["--check"]) == 0


def test_a_gpu_record_reaches_both_files(bench, monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="plots need matplotlib (extra medical)")
    results = tmp_path / "results"
    shutil.copytree(bench.report.RESULTS, results)
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/benchmarks.md", "docs/medical_experiments.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.setattr(bench.report, "RESULTS", results)
    monkeypatch.setattr(bench.report, "ROOT", tmp_path)
    bench.record.write(invented_record(bench), results / "invented-gpu.json")
    assert bench.report.main(["--check"]) == 1
    assert "README.md, benchmarks.md: a table or plot differs" in capsys.readouterr().err
    assert bench.report.main([]) == 0
    assert bench.report.main(["--check"]) == 0
    assert "Invented GPU" in (tmp_path / "README.md").read_text()
    assert "### Invented GPU" in (tmp_path / "docs" / "benchmarks.md").read_text()


def test_the_readmes_gpu_table_has_times_and_ratios_of_training_cases(bench):
    assert bench.gpu_tables.speed_table([]) == "No GPU record: not measured."
    record = invented_record(bench)
    for row in record["results"]:
        row["peak_bytes"] = {"fastlora": 100, "peft": 500, "peft-bf16": 150}.get(row["backend"])
        if row["backend"] == "peft-bf16" and row["timing"] == "eager":
            row["ms_p50"] = 0.84
    lines = bench.gpu_tables.speed_table([record]).splitlines()
    cells = "1 ms | 1.05 ms | 2.00× | 4.00× | 1.20× | 1.50× |"
    assert lines[2:5] == [
        f"| 8192×4096 → 4096, rank 16, dropout 0.1, bfloat16, no-bias | {cells}",
        f"| 32768×1024 → 1024, rank 16, dropout 0, bfloat16 | {cells}",
        f"| 4096×768 → 768, rank 4, dropout 0, bfloat16 | {cells}",
    ]
    record["results"] = [row for row in record["results"] if row["case"].startswith("8192x")]
    assert len(bench.gpu_tables.speed_table([record]).splitlines()) == 5


def test_the_table_of_calls_has_those_with_autograds_own_thread(bench):
    assert bench.gpu_tables.calls_table([]) == "No GPU record: not measured."
    record = json.loads((bench.report.RESULTS / "h100" / "calls.json").read_text())
    rows = record["results"] = [r for r in record["results"] if r["case"].startswith("256x")]
    for row in rows:
        own = row.get("own_thread", True)
        row["us"] = {"linear": 10, "fastlora-bf16": 20, "peft-bf16": 50}[row["backend"]] if own else 1  # fmt: skip
    lines = bench.gpu_tables.calls_table([record]).splitlines()
    assert [line.split("bfloat16 ")[1] for line in lines[2:4]] == [
        "| forward | 10 µs | 20 µs | 50 µs | 2.50× |",
        "| forward+backward | 10 µs | 20 µs | 50 µs | 2.50× |",
    ]


def test_the_readmes_medical_table_has_the_mean_of_the_seeds(bench):
    means = {method: {"all": {}, "spine": {"dice": 0.5}} for method in bench.report.METHODS}
    first = {"means": means, "runs": {"lora": {"trainable": 25}, "full": {"trainable": 1000}}}
    other = first | {"means": means | {"lora": {"all": {}, "spine": {"dice": 0.75}}}}
    lines = bench.report.dice_table([first, other]).splitlines()
    assert lines[2] == "| spine | 0.500 | 0.500 | 0.625 | 0.500 |"
    assert "Means of 2 seeds. LoRA trains 25 parameters, 2.50% of" in lines[-1]


def test_the_readme_reaches_its_first_table_of_speed_in_1200_words():
    before, table, _ = (ROOT / "README.md").read_text().partition("<!-- table: ")
    assert table and len(before.split()) <= 1200


def test_the_cpu_table_reads_records_with_and_without_call_overhead(bench):
    record = json.loads((bench.report.RESULTS / "cpu.json").read_text())
    record.pop("call_overhead", None)
    assert "microseconds per call" not in bench.report.cpu_table(record)
    row = {"case": "1x64->64 r4 p0", "mode": "forward+backward", "backend": "linear", "us_p50": 7.0}
    record["call_overhead"] = [row]
    assert "microseconds per call: linear 7." in bench.report.cpu_table(record)


def test_a_missing_marker_is_an_error(bench):
    with pytest.raises(ValueError, match="expected the markers <!-- table: cpu -->"):
        bench.report.fill("no markers", {"cpu": "table"})


@pytest.mark.gpu
def test_a_gpu_run_times_eagerly_and_as_graphs(bench, tmp_path):
    output = tmp_path / "record.json"
    command = [
        "--device",
        "cuda",
        "--quick",
        "--only",
        "1x",
        "--reps",
        "2",
        "--output",
        str(output),
    ]
    assert bench.run.main([*command, "--implementations", "fastlora,peft,addmm"]) == 0
    record = json.loads(output.read_text())
    timed = {(r["backend"], r["timing"]) for r in record["results"]}
    assert {
        (name, timing) for name in ("linear", "fastlora") for timing in ("eager", "graph")
    } <= timed
    assert all(row["peak_bytes"] is not None for row in record["results"])
    assert record["environment"]["gpu"] and record["call_overhead"]


# Scaling and the cost of a call


@pytest.mark.slow
def test_the_scaling_command_measures_its_points_and_the_machines_peaks(
    bench, monkeypatch, tmp_path
):
    pytest.importorskip("matplotlib", reason="plots need matplotlib (extra medical)")
    small = bench.scaling.Sweep(
        bench.cases.Case(16, 8, 12, 2),
        bench.cases.Case(4, 8, 8, 2),
        {"M": (1, 4), "N": (8, 16), "R": (2, 4), "layers": (1, 3)},
        (256,),
        2**20,
    )
    monkeypatch.setitem(bench.scaling.SWEEPS, "cpu", small)
    output = tmp_path / "scaling-cpu.json"
    assert bench.scaling.main(["--reps", "2", "--output", str(output)]) == 0
    record = json.loads(output.read_text())
    assert record["peaks"]["gflops"] > 0 and record["peaks"]["gbps"] > 0
    measured = {(r["axis"], r["value"], r["backend"]) for r in record["points"]}
    axes = small.values.items()
    assert measured == {
        (axis, value, name)
        for axis, values in axes
        for value in values
        for name in bench.scaling.TIMED
    }
    assert all(0 < r["ms_p20"] <= r["ms_p50"] <= r["ms_p80"] for r in record["points"])
    table = bench.report.scaling_table({"scaling-cpu": record})
    assert "(../benchmarks/results/scaling-cpu.png)" in table and "| layers | 1, 3 |" in table
    assert bench.report.scaling_table({}) == "No record: not measured."
    picture = tmp_path / "scaling-cpu.png"
    assert not bench.plots.is_current(record, picture)
    bench.plots.draw(record, picture)
    assert bench.plots.is_current(record, picture)
    record["points"][0]["ms_p50"] *= 1.01
    assert not bench.plots.is_current(record, picture)


def test_flops_and_bytes_of_a_point(bench):
    case = bench.cases.Case(2, 3, 5, 7)
    products = 2 * 2 * 3 * 5  # y, and as much for dx
    low = 2 * 2 * 7 * (3 + 5)  # S and its product with B; dS, dS A; dA, dB
    assert bench.scaling.flops(case, False) == 2 * products
    assert bench.scaling.flops(case, True) == 2 * products + 3 * low
    base = 4 * (2 * 2 * 3 + 2 * 2 * 5 + 2 * 3 * 5)
    assert bench.scaling.least_bytes(case, False) == base
    assert bench.scaling.least_bytes(case, True) == base + 4 * (2 * 3 + 3 * 7 * 8 + 3 * 2 * 7)


def test_a_stack_of_layers_runs_every_layer(bench):
    case = bench.cases.Case(4, 8, 8, 2)
    work = bench.workload.Workload(case, CPU, 3)
    called = []
    for index, layer in enumerate(work.frozen):
        layer.register_forward_hook(lambda *_, index=index: called.append(index))
    bench.scaling.stack_round(work.frozen, work)()
    assert called == [0, 1, 2]


def test_plots_can_be_read_without_colour(bench):
    pytest.importorskip("matplotlib", reason="plots need matplotlib (extra medical)")
    assert set(bench.plots.STYLES) == set(bench.scaling.TIMED)
    markers, lines = zip(*bench.plots.STYLES.values(), strict=True)
    assert len(set(markers)) == len(set(lines)) == len(bench.plots.STYLES)
    from PIL import Image

    image = Image.open(bench.report.RESULTS / "scaling-cpu.png").convert("RGB")
    assert all(r == g == b for _, (r, g, b) in image.getcolors(maxcolors=2**24))


def test_a_plot_of_another_record_is_stale(bench, monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="plots need matplotlib (extra medical)")
    results = tmp_path / "results"
    shutil.copytree(bench.report.RESULTS, results)
    monkeypatch.setattr(bench.report, "RESULTS", results)
    (results / "scaling-cpu.png").write_bytes(b"")
    assert bench.report.main(["--check"]) == 1
    assert "scaling-cpu.png: a table or plot differs" in capsys.readouterr().err


PERF = """#!/bin/sh
# Writes a million instructions, and a thousand more for every call.
while [ "$1" != -o ]; do shift; done
file=$2 calls=0
while [ $# -gt 0 ]; do [ "$1" = --calls ] && calls=$2; shift; done
echo "$((1000000 + 1000 * calls)),,instructions:u,1,100.00,," > "$file"
"""


@pytest.mark.slow
def test_instructions_are_counted_by_perf_if_available(bench, monkeypatch, tmp_path):
    perf = tmp_path / "perf"
    perf.write_text(PERF)
    perf.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    record = bench.overhead.measure(1)
    bench.overhead.count(record, 10)
    assert record["counter"] == "perf stat -e instructions:u" and record["no_counter"] == {}
    assert [row["instructions"] for row in record["call_overhead"]] == [1000] * 12


@pytest.mark.slow
def test_a_record_without_counters_gives_the_reasons(bench, monkeypatch):
    monkeypatch.setenv("PATH", "")
    record = bench.overhead.measure(1)
    bench.overhead.count(record, 1)
    assert record["counter"] is None
    assert list(record["no_counter"].values()) == [
        "perf is not installed",
        "valgrind is not installed",
    ]
    table = bench.report.overhead_table([record])
    assert "Instructions not counted (unavailable: perf stat" in table and "| – |" in table
    assert bench.report.overhead_table([]) == "No record: not measured."


def test_callgrind_dumps_are_read_by_their_labels(bench, tmp_path):
    dump = "desc: Trigger: Client Request: case|forward|linear\nevents: Ir\ntotals: 5000\n"
    (tmp_path / "out.1").write_text(dump)
    (tmp_path / "out.2").write_text("desc: Trigger: Program termination\ntotals: 7\n")
    found = bench.overhead.read_callgrind(tmp_path, 50)
    assert found == {("case", "forward", "linear"): 100.0}
