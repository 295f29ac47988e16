"""`fastlora bench`: what it prints and writes, what it refuses, and what it does when time or memory is short."""

import getpass
import json
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fastlora.benchmark import command, implementations, plan
from fastlora.benchmark.cases import DEFAULT_CPU, DEFAULT_CUDA, Case
from fastlora.cli import commands as cli
from tests.support.paths import ROOT
from tests.support.processes import TIME_LIMIT_S

TINY = ["bench", "--device", "cpu", "--layers", "24x40,16x16", "--rows", "8", "--rank", "2"]


@pytest.fixture(autouse=True)
def fewest_reps(monkeypatch):
    monkeypatch.setattr(plan, "reps_that_fit", lambda cases, seconds: 1)


def run(output, *options):
    code = cli.main([*TINY, *options, "--output", str(output)])
    return code, json.loads(output.read_text())


def cells(line):
    return re.split(r" {2,}", line.strip())


@pytest.mark.parametrize(("dtype", "p"), [("float32", "0"), ("bfloat16", "0.1")])
def test_the_table_has_the_numbers_of_the_json(tmp_path, capsys, dtype, p):
    pytest.importorskip("peft")
    code, record = run(tmp_path / "bench.json", "--dtype", dtype, "--dropout", p)
    out = capsys.readouterr().out
    assert code == 0 and record["not_run"] == []
    rows = record["comparison"]
    ends = "" if dtype == "float32" else ", bfloat16"
    titles = [f"8×{k} → {n}, rank 2, dropout {p}{ends}, no-bias" for k, n in ((24, 40), (16, 16))]
    table = out[out.index(titles[0]) :].split("\n\n")[0].splitlines()
    assert [table[0], table[3]] == titles and len(table) == 6 and len(rows) == 4
    times = {
        ((r["case"], r["mode"], r["timing"]), r["backend"]): r["ms_p50"] for r in record["results"]
    }
    for line, row in zip(table[1:3] + table[4:6], rows, strict=True):
        key = row["case"], row["mode"], row["timing"]
        pefts = {name: times[key, name] for name in ("peft", "peft-bf16") if (key, name) in times}
        assert len(pefts) == (1 if dtype == "float32" else 2)
        fastest = min(pefts, key=pefts.get)
        assert row["peft_adapters"] == implementations.PEFTS[fastest]
        assert (row["linear_ms"], row["fastlora_ms"]) == (
            times[key, "linear"],
            times[key, "fastlora"],
        )
        assert row["peft_ms"] == pefts[fastest] > 0
        assert row["fastlora_over_linear"] == round(row["fastlora_ms"] / row["linear_ms"], 4)
        assert row["peft_over_fastlora"] == round(row["peft_ms"] / row["fastlora_ms"], 4)
        saved = [row["fastlora_saved_bytes"], row["peft_saved_bytes"]]
        if row["mode"] == "forward":
            assert saved == [None, None]
        else:
            least = 8 * int(row["case"].split("x")[1].split("-")[0])  # elements of x
            assert saved[0] >= least * getattr(torch, dtype).itemsize and saved[1] >= least
        assert cells(line) == [
            f"{row['mode']}, {row['timing']}",
            *(f"{row[name]:.4g}" for name in ("linear_ms", "fastlora_ms", "peft_ms")),
            row["peft_adapters"],
            f"{row['fastlora_over_linear']:.2f}",
            f"{row['peft_over_fastlora']:.2f}",
            *("–" if size is None else f"{size / 2**20:.1f}" for size in saved),
            *("–", "–"),
        ]
    ratios = [row["peft_over_fastlora"] for row in rows if row["mode"] == "forward+backward"]
    assert f"eager, PEFT / fastlora: median {sum(ratios) / 2:.2f} of {ratios[0]:.2f}" in out


class Scaled(nn.Module):
    """An implementation whose output is wrong by one per cent."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return 1.01 * self.layer(x)


@pytest.mark.parametrize("name", ["fastlora", "peft"])
def test_a_wrong_result_gets_no_time_and_exit_code_1(tmp_path, monkeypatch, capsys, name):
    pytest.importorskip("peft")
    right = implementations.IMPLEMENTATIONS[name]
    monkeypatch.setitem(
        implementations.IMPLEMENTATIONS, name, lambda *arguments: Scaled(right(*arguments))
    )
    code, record = run(tmp_path / "bench.json")
    assert code == 1
    assert name not in {row["backend"] for row in record["results"]}
    wrong = [row for row in record["absent"] if row["kind"] == "wrong"]
    assert {row["backend"] for row in wrong} == {name} and len(wrong) == 2
    assert all(
        row[f"{name}_ms"] is row["peft_over_fastlora"] is None for row in record["comparison"]
    )
    printed = capsys.readouterr()
    assert f"{name} is not timed: wrong: {name}: y is off by " in printed.err
    assert "PEFT / fastlora: not measured" in printed.out


def test_without_peft_the_others_are_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(implementations, "is_installed", lambda package: package != "peft")
    code, record = run(tmp_path / "bench.json")
    assert code == 0
    assert {row["backend"] for row in record["results"]} == {"linear", "fastlora"}
    assert "PEFT is not installed" in {row["reason"] for row in record["absent"]}
    assert all(row["peft_ms"] is None and row["fastlora_ms"] > 0 for row in record["comparison"])


def test_cases_that_do_not_fit_the_time_are_named_and_not_started(tmp_path, monkeypatch, capsys):
    times = {24: plan.Expected(0.0, 1e3), 16: plan.Expected(0.0, 1e-3)}
    monkeypatch.setattr(plan, "expected", lambda case, *others: times[case.k])
    code, record = run(tmp_path / "bench.json", "--seconds", "60")
    assert code == 0 and record["not_run"] == ["8x24->40 r2 p0 no-bias"]
    assert {row["case"] for row in record["results"]} == {"8x16->16 r2 p0 no-bias"}
    assert "not run, because of --seconds 60: 8x24->40 r2 p0 no-bias" in capsys.readouterr().out
    times[16] = plan.Expected(70.0, 1.0)
    output = tmp_path / "other.json"
    assert cli.main([*TINY, "--seconds", "60", "--output", str(output)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--seconds: no case ends within 60 s, the shortest takes about 74 s" in line
    assert not output.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "4096"], "argument --layers: expected in and out features as 4096x4096,4096x14336, got '4096'"),
        (["--layers", "0x8"], "got '0x8'"),
        (["--layers", "8x8,"], "got '8x8,'"),
        (["--rows", "0"], "argument --rows: expected a whole number ≥ 1, got '0'"),
        (["--rank", "1.5"], "argument --rank: expected a whole number ≥ 1, got '1.5'"),
        (["--dropout", "1"], "argument --dropout: expected 0 ≤ p < 1, got '1'"),
        (["--dropout", "nan"], "argument --dropout: expected 0 ≤ p < 1, got 'nan'"),
        (["--dropout", "x"], "argument --dropout: expected a number, got 'x'"),
        (["--seconds", "inf"], "argument --seconds: expected a number of seconds > 0, got 'inf'"),
        (["--seconds", "0"], "argument --seconds: expected a number of seconds > 0, got '0'"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--dtype", "tf32", "--device", "cpu"], "--dtype: expected float32, bfloat16 or float16 on a CPU, got tf32"),
        (["--bias", "--device", "cpu"], "--bias: expected --layers with it"),
        (["--device", "cuda"], "--device: expected cpu, got cuda: there is no CUDA device"),
        (["--output", "no/such/folder/a.json"], "--output: expected a file in an existing, writable folder, got no/such/folder/a.json"),
    ],
)  # fmt: skip
def test_a_bad_argument_is_refused_in_one_line(monkeypatch, capsys, options, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(command, "run_case", lambda *arguments: pytest.fail("measured"))
    try:
        code = cli.main(["bench", *options])
    except SystemExit as stop:  # argparse's
        code = stop.code
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert code == 2 and message in line and printed.out == ""


@pytest.mark.parametrize("content", ["", "[1]", '{"format": "other"}', '{"results": []}'])
def test_a_file_of_another_kind_is_not_replaced(tmp_path, capsys, content):
    output = tmp_path / "notes.json"
    output.write_text(content)
    assert cli.main([*TINY, "--output", str(output)]) == 2
    assert output.read_text() == content
    assert "was not written by this command and is not replaced" in capsys.readouterr().err


@pytest.mark.slow
def test_a_record_of_the_command_is_replaced(tmp_path):
    output = tmp_path / "bench.json"
    _, first = run(output, "--rank", "3")
    _, second = run(output)
    assert first["format"] == second["format"] == command.FORMAT
    assert "8x16->16 r3 p0 no-bias" in first["seconds"]
    assert list(second["seconds"]) == ["8x24->40 r2 p0 no-bias", "8x16->16 r2 p0 no-bias"]
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]


@pytest.mark.slow
def test_the_record_does_not_tell_who_ran_it_where(tmp_path, monkeypatch):
    def fails(*arguments):
        raise RuntimeError(f"cannot load {tmp_path}/lib.so, {Path.home()}/cache")

    monkeypatch.setitem(implementations.IMPLEMENTATIONS, "peft", fails)
    _, record = run(tmp_path / "bench.json", "--bias")
    facts = record["environment"]
    assert facts["command"] == (
        "python -m fastlora.bench --device cpu --layers 24x40,16x16 --rows 8 --rank 2 --seconds 120 --bias"
    )
    assert {r["reason"] for r in record["absent"] if r["backend"] == "peft"} == {
        "cannot load lib.so, cache"
    }
    text = json.dumps(record)
    for secret in (str(tmp_path), str(ROOT), platform.node(), str(Path.home())):
        assert secret not in text
    assert re.search(rf"\b{re.escape(getpass.getuser())}\b", text) is None
    code = cli.main(re.sub("python -m fastlora.", "", facts["command"]).split())
    assert code == 0  # the command can be repeated


def test_the_upload_hint_is_printed_and_nothing_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(command, "measure", lambda *arguments: pytest.fail("measured"))
    assert cli.main(["bench", "--upload-hint"]) == 0
    out = capsys.readouterr().out
    assert 'an issue with the template "performance"' in out and "No name of a host" in out
    assert (ROOT / ".github" / "ISSUE_TEMPLATE" / "performance.yml").exists()


def test_without_a_gpu_one_line_says_that_the_cpu_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(command, "measure", lambda cases, device, *others: {
        "environment": dict.fromkeys(("fastlora", "git_sha", "cpu", "threads", "device", "torch", "triton", "peft", "reps")),
        "results": [], "comparison": [], "not_run": [], "absent": [],
    })  # fmt: skip
    assert cli.main(["bench"]) == 0
    assert capsys.readouterr().err == "no CUDA device: measuring the CPU\n"


def parsed(*options):
    return cli._parser().parse_args(["bench", *options])


def test_the_default_cases_take_the_options_that_are_given(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert command._cases(parsed(), cpu) == list(DEFAULT_CPU)
    cases = command._cases(parsed("--rank", "64", "--dropout", "0.2", "--rows", "7"), cpu)
    assert {(c.m, c.rank, c.p) for c in cases} == {(7, 64, 0.2)}
    assert len(cases) == 3 == len({c.name for c in cases})  # without the doubles
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert {c.dtype for c in command._cases(parsed(), cuda)} == {"float16"}
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert command._cases(parsed(), cuda) == list(DEFAULT_CUDA)
    given = command._cases(parsed("--layers", "64x32", "--dtype", "float32", "--bias"), cuda)
    assert given == [Case(8192, 64, 32, 16)]


def test_the_expected_seconds_are_those_of_the_products():
    cpu, speeds = torch.device("cpu"), {torch.float64: 4e-9, torch.float32: 1e-9}
    found = plan.expected(Case(10, 20, 50, 4), cpu, 3, speeds.__getitem__)
    product = 2 * 10 * 20 * 50  # operations
    assert found.check == pytest.approx(2 * 2 * product * 5e-9 + 1.5 * 2 * product * 1e-9 * 3)
    assert found.repetition == pytest.approx(1.5 * 3 * 3 * product * 1e-9)
    dropped = plan.expected(Case(10, 20, 50, 4, 0.1), cpu, 3, speeds.__getitem__)
    assert dropped.check - found.check == pytest.approx(2 * product * 5e-9)
    assert plan.Expected(2.0, 0.5).total(7) == 2.0 + 10 * 0.5
    assert 0 < plan.seconds_per_flop(cpu)(torch.float32) < 1e-6


def test_failures_of_fastlora_count_but_a_lack_of_memory_and_absent_ones_do_not():
    def of(name, kind):
        return command.failed({"absent": [{"backend": name, "kind": kind}]})

    assert of("fastlora", "RuntimeError") and of("peft", "wrong") and of("linear", "wrong")
    assert not of("peft", "RuntimeError")
    assert not of("fastlora", "OutOfMemoryError") and not of("peft-bf16", "absent")


@pytest.mark.slow
def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "fastlora.bench", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT_S,
    )
    assert done.returncode == 0 and done.stdout.startswith("usage: fastlora bench")
