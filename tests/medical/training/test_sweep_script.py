"""scripts/sweep_medical.py trains every setting once and writes one JSON file, one table and one plot."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from fastlora.medical.data.phantom import write_phantom_dataset
from fastlora.medical.models.decoder import save_base_model
from tests.support.paths import ROOT
from tests.support.tiny_run import tiny_model


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("sweep", ROOT / "scripts" / "sweep_medical.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_settings(script: Any) -> None:
    found = script.settings([1, 8], [0.1])
    assert list(found) == ["rank_1", "rank_8", "rank_8_no_ffn", "rank_8_dropout_0.1", "full"]
    assert found["rank_8_no_ffn"] == {
        "finetune": "lora",
        "lora_ranks": [],
        "lora_rank": 8,
        "lora_alpha": 16.0,
        "lora_ffn": False,
    }


@pytest.mark.slow
def test_sweep(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_phantom_dataset(tmp_path / "volumes", subjects=2, seed=0)
    save_base_model(tiny_model(), tmp_path / "base.safetensors", {})
    Path("shared.yaml").write_text(
        "{data_root: volumes, base_weights: base.safetensors, classes: [blob], split: file, epochs: 2, lr: 1e-2}"
    )
    command = ["--config", "shared.yaml", "--ranks", "1", "2", "--dropouts", "--output_dir", "out"]
    assert script.main(command) == 0
    record = json.loads(Path("out/sweep.json").read_text())
    rows = {row["run"]: row for row in record["rows"]}
    assert list(rows) == ["rank_1", "rank_2", "rank_2_no_ffn", "full"]
    sizes = [rows[name]["trained_parameters"] for name in ("rank_1", "rank_2", "full")]
    assert sizes == sorted(set(sizes))
    assert all(0 < row["dice"] <= 1 and row["best_epoch"] > 0 for row in rows.values())
    assert len({row["dice"] for row in rows.values()}) > 1
    table = Path("out/sweep.md").read_text()
    assert table.count("\n") == 6 and f"| rank_1 | {sizes[0]:,} |" in table
    assert table in capsys.readouterr().out
    assert Path("out/sweep.png").read_bytes().startswith(b"\x89PNG")
    assert record["command"] == "python scripts/sweep_medical.py " + " ".join(command)


def test_shared_settings_may_not_be_swept(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "shared.yaml").write_text("lora_rank: 4\n")
    assert script.main(["--config", str(tmp_path / "shared.yaml")]) == 2
    assert (
        "expected none of the options that the sweep sets, got ['lora_rank']"
        in capsys.readouterr().err
    )


def test_the_documented_table_is_that_of_the_record(script: Any) -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "sweep" / "ranks.json").read_text())
    page = (ROOT / "docs" / "medical_experiments.md").read_text()
    assert script.table(record["rows"]) in page
