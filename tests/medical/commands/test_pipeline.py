"""`fastlora-medical pipeline`: the order of its steps, where its flags go, and that nothing runs before all are checked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastlora.medical.commands import evaluate, preprocess, train
from fastlora.medical.commands.pipeline import main
from tests.support.paths import ROOT


@pytest.fixture
def calls(monkeypatch, tmp_path) -> list[str]:
    """The steps that were run, with their arguments; none of them does anything."""
    monkeypatch.chdir(tmp_path)
    made: list[str] = []
    for name, module in (("preprocess", preprocess), ("train", train), ("eval", evaluate)):
        monkeypatch.setattr(
            module, "main", lambda argv, name=name: made.append(" ".join([name, *argv])) or 0
        )
    return made


def test_all_steps_run_in_order(calls, capsys) -> None:
    assert main(["--out", "my run", "--seed", "3", "--epochs", "2"]) == 0
    assert capsys.readouterr().out.split("\n")[-2] == "report: my run/eval/report.html"
    training = "train --epochs 2 --resume auto --seed 3 --cache_dir my run/cache --finetune"
    assert calls == [
        "preprocess --seed 3 --cache_dir my run/cache",
        f"{training} lora --checkpoint_dir my run/lora",
        f"{training} full --checkpoint_dir my run/full",
        "eval --checkpoint my run/lora --full my run/full --output_dir my run/eval --save_predictions --visualize",
    ]


def test_flags_go_where_they_belong(calls) -> None:
    flags = ["--data_root", "d", "--classes", "a", "b", "--device", "cpu", "--overwrite"]
    flags += ["--channel", "1", "--skip_invalid", "--intercept", "-1024"]
    assert main(flags) == 0
    data = "--data_root=d --channel=1 --intercept=-1024 --classes a b"
    assert calls[0] == f"preprocess {data} --seed 0 --cache_dir runs/pipeline/cache --skip_invalid"
    assert calls[1].startswith(f"train {data} --device cpu --overwrite --seed 0 --cache_dir")
    assert calls[3].endswith("--visualize --device cpu")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--epocs", "2"], "unknown argument --epocs (nearest: --epochs,"),
        (["--epochs", "x"], "argument --epochs: invalid int value: 'x'"),
        (["--lora_rank", "0"], "lora_rank: expected >= 1, got 0"),
        (["--modality", "pet"], "argument --modality: invalid choice: 'pet'"),
        (["--device", "tpu", "--nope"], "unknown argument --nope"),
        (["--out"], "argument --out: expected one argument"),
    ],
)
def test_an_invalid_flag_is_one_line_before_the_first_step(calls, capsys, flags, message) -> None:
    assert main(flags) == 2
    printed = capsys.readouterr()
    assert calls == [] and printed.out == "" and list(Path().iterdir()) == []
    assert message in printed.err and printed.err.count("\n") == 1


def test_the_first_failure_ends_it(calls, capsys, monkeypatch) -> None:
    monkeypatch.setattr(train, "main", lambda argv: 130)
    assert main([]) == 130
    assert len(calls) == 1 and capsys.readouterr().out.endswith("== 2/4 train lora\n")


@pytest.mark.slow
def test_the_script_is_the_command(tmp_path: Path) -> None:
    script = ROOT / "scripts" / "run_medical_pipeline.sh"
    done = subprocess.run(
        ["bash", str(script), "--nope"],
        env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "") and "unknown argument --nope" in done.stderr
