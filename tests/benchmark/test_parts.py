"""The parts that `fastlora bench` and benchmarks/ share: repetitions, provenance, and cases without a frozen layer or memory."""

import subprocess

import pytest
import torch

import fastlora
from fastlora.benchmark import case_run, plan, record, table
from fastlora.benchmark.cases import Case
from fastlora.benchmark.implementations import IMPLEMENTATIONS

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("seconds", "reps"),
    [(1e3, plan.REPS), (75.1, 11), (74.9, 10), (1.0, plan.FEWEST_REPS)],
)
def test_as_many_repetitions_as_fit_are_made(seconds, reps):
    cases = [plan.Expected(2.0, 1.5), plan.Expected(2.0, 2.5)]  # 4 s, and 4 s a repetition
    assert plan.reps_that_fit(cases, seconds) == reps


def test_the_faster_peft_counts():
    rows = [
        {"case": "1x2->3 r1 p0", "mode": "forward+backward", "timing": "graph", "backend": name}
        | {"ms_p50": ms, "saved_bytes": size, "peak_bytes": 2 * size}
        for name, ms, size in (
            ("linear", 2.0, 0),
            ("fastlora", 3.0, 1 << 20),
            ("peft", 9.0, 4 << 20),
            ("peft-bf16", 6.0, 3 << 20),
        )
    ]
    (row,) = table.comparison({"results": rows})
    assert (row["peft_ms"], row["peft_adapters"]) == (6.0, "the model's")
    assert (row["fastlora_over_linear"], row["peft_over_fastlora"]) == (1.5, 2.0)
    last = table.table([row]).splitlines()[-1].split("  ")
    shown = [cell.strip() for cell in last if cell.strip()]
    assert shown[1:] == ["2", "3", "6", "the model's", "1.50", "2.00", "1.0", "3.0", "2.0", "6.0"]
    assert table.verdict({"results": rows}) == (
        "forward+backward, graph, PEFT / fastlora: median 2.00 of 2.00"
    )


def run_one(builders, case=None):
    case = case or Case(8, 16, 8, 2)
    found = record.new_record(CPU, 1, [case.name], None)
    case_run.run_case(case, CPU, builders, 1, found)
    return found


def test_a_case_whose_frozen_layer_fails_has_no_times_and_does_not_end_the_run():
    def fails(*arguments):
        raise RuntimeError("out of something")

    found = run_one({"linear": fails, "fastlora": IMPLEMENTATIONS["fastlora"]})
    assert found["results"] == []
    assert [(row["backend"], row["kind"]) for row in found["absent"]] == [
        ("linear", "RuntimeError")
    ]


def test_a_case_that_does_not_fit_in_memory_is_absent_for_all(monkeypatch):
    def too_large(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(case_run, "Workload", too_large)
    found = run_one(dict.fromkeys(("linear", "fastlora")), Case(8, 16, 8, 2, dtype="tf32"))
    assert [(row["backend"], row["kind"]) for row in found["absent"]] == [
        ("linear", "OutOfMemoryError"),
        ("fastlora", "OutOfMemoryError"),
    ]
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/someone/x/run.py --output=/data/a.json", "run.py --output=a.json"),
        ("cannot open '/etc/pki/key.pem': denied", "cannot open 'key.pem': denied"),
        ("see https://pytorch.org/docs/stable", "see https://pytorch.org/docs/stable"),
        ("PEFT / fastlora, and/or benchmarks/run.py", "PEFT / fastlora, and/or benchmarks/run.py"),
        ("~/.cache/triton/k.so", "k.so"),
    ],
)
def test_absolute_folders_are_left_out(text, expected):
    assert record.without_folders(text) == expected


def test_the_home_folder_is_left_out(monkeypatch):
    monkeypatch.setenv("HOME", "/users/alice")
    assert record.without_folders("no /users/alice here, /users/alice/b") == "no ~ here, b"
    monkeypatch.setenv("HOME", "/")
    assert record.without_folders("a / b") == "a / b"


@pytest.fixture
def foreign_repository(tmp_path, monkeypatch):
    """fastlora as if it were installed below another project's repository, which has a commit."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "theirs"], check=True)
    package = tmp_path / "venv" / "site-packages" / "fastlora"
    package.mkdir(parents=True)
    monkeypatch.setattr(fastlora, "__file__", str(package / "__init__.py"))
    return tmp_path


def test_an_installed_package_has_a_version_and_no_commit(foreign_repository, monkeypatch):
    monkeypatch.chdir(foreign_repository)
    facts = record.environment(CPU, 1)
    assert facts["git_sha"] is facts["dirty"] is None
    assert facts["fastlora"] == fastlora.__version__
    assert table.origin({"environment": facts}).startswith(f"fastlora {fastlora.__version__}, ")


def test_sources_have_their_own_commit_from_any_folder(foreign_repository, monkeypatch):
    (foreign_repository / "fastlora").mkdir()
    monkeypatch.setattr(fastlora, "__file__", str(foreign_repository / "fastlora" / "__init__.py"))
    git = ["git", "-C", str(foreign_repository), "rev-parse", "HEAD"]
    head = subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()
    monkeypatch.chdir("/")
    facts = record.environment(CPU, 1)
    assert (facts["git_sha"], facts["dirty"]) == (head, False)
    assert f"(commit {head[:12]})" in table.origin({"environment": facts})


def test_a_package_that_is_missing_has_no_version(monkeypatch):
    assert record._version("no-such-package-of-fastlora") is None
    monkeypatch.setattr(record, "_version", lambda name: None)
    facts = record.environment(CPU, 1)
    assert facts["peft"] is facts["triton"] is None
    assert "PEFT" not in table.origin({"environment": facts})
