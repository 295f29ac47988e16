"""`eval_medical.py` and the modules it uses, end to end on tiny runs over phantom volumes."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
import yaml

from fastlora.errors import CheckpointError, ConfigError, DataError
from fastlora.medical.commands.evaluate import main
from fastlora.medical.commands.preprocess import main as preprocess_main
from fastlora.medical.data.batch import collate_regions
from fastlora.medical.data.regions import RegionDataset
from fastlora.medical.evaluation.evaluate import (
    LABELS,
    Evaluation,
    Run,
    baseline_method,
    compare_runs,
    evaluate,
    largest_difference,
    model_method,
)
from fastlora.medical.evaluation.metrics import (
    METRIC_KEYS,
    baseline,
    surface_metrics,
    tune_threshold,
)
from fastlora.medical.evaluation.results import (
    compact_record,
    document,
    environment,
    is_worse,
    structure_means,
    summarise,
    worse_than,
    write_csv,
    write_meshes,
)
from fastlora.medical.models.decoder import save_base_model
from fastlora.medical.training.finetuned import load_finetuned
from tests.support.eval_run import evaluate_home, read_runs, shared_home, train_tiny
from tests.support.tiny_run import TinyRegions, tiny_model
from tests.support.tolerance import assert_near, assert_same_distances

SHAPES = ["blob", "superquadric", "tree", "tube"]
METHODS = ["baseline", "base", "lora", "merged", "full"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_home(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def output(home: Path) -> Path:
    """The script's output with every kind of file."""
    out = home / "out"
    flags = ["--checkpoint", str(home / "lora"), "--full", str(home / "full/checkpoints/last.pt")]
    flags += ["--output_dir", str(out), "--save_predictions", "--visualize", "--device", "cpu"]
    flags += ["--record", str(home / "records" / "medical.json")]
    assert main(flags) == 0
    return out


@pytest.fixture(scope="module")
def content(output: Path) -> dict:
    return json.loads((output / "eval.json").read_text())


# ---------------------------------------------------------------------------------------- the script


def test_every_method_meets_every_region(content):
    records = content["records"]
    assert list(content["methods"]) == METHODS
    assert sorted({r["structure"] for r in records}) == SHAPES
    assert {r["subject"] for r in records} == {"phantom_001"}  # the one that meta.csv holds out
    pairs = [(r["index"], r["method"]) for r in records]
    assert len(pairs) == len(set(pairs)) == len(METHODS) * content["split"]["held_out_regions"]
    for record in records:
        for key in METRIC_KEYS:
            assert record[key] is None or np.isfinite(record[key])


def test_json_states_its_provenance(content, home):
    assert content["split"]["kind"] == "file"
    assert content["split"]["held_out_side"] == "val"
    assert content["split"]["train_regions"] == 4
    assert content["split"]["notes"]
    assert content["seed"] == 0
    assert str(home / "lora") in content["command"]
    assert content["environment"]["numpy"] == np.__version__
    assert {"python", "numpy", "monai", "git"} <= content["environment"].keys()
    for key, metric in content["metrics"].items():
        assert metric["source"] and metric["definition"], key
    lora, full = content["runs"]["lora"], content["runs"]["full"]
    assert full["trainable"] == full["base_parameters"] == lora["base_parameters"]
    assert lora["trainable_share"] < 1
    assert lora["seconds"] > 0 and lora["epochs"] == 2
    assert full["weights_bytes"] == 4 * full["base_parameters"]
    assert full["checkpoint_bytes"] > full["weights_bytes"]


def test_merged_lora_is_lora(content):
    assert content["merged_difference_vox"] < 1e-4
    means = content["summary"]
    assert means["merged"]["all"]["dice"]["mean"] == pytest.approx(
        means["lora"]["all"]["dice"]["mean"], abs=1e-3
    )


def test_training_changed_the_models(content):
    by = {(r["index"], r["method"]): r["chamfer_mm"] for r in content["records"]}
    assert any(by[i, "lora"] != by[i, "base"] for i in range(content["split"]["held_out_regions"]))
    assert any(by[i, "full"] != by[i, "base"] for i in range(content["split"]["held_out_regions"]))


def test_csv_has_the_same_figures(content, output):
    with (output / "eval.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(content["records"])
    for row, record in zip(rows, content["records"], strict=True):
        assert (row["structure"], row["method"]) == (record["structure"], record["method"])
        for key in METRIC_KEYS:
            assert row[key] == ("" if record[key] is None else str(record[key]))


def test_meshes_lie_where_the_subject_is(content, output, home):
    files = sorted(path.name for path in (output / "meshes").iterdir())
    assert len(files) == content["split"]["held_out_regions"] * 5  # no file for merged
    evaluation, _ = evaluate_home(home)
    for sample in evaluation.samples:
        name = f"{sample['meta']['subject']}_{sample['meta']['region']}".replace("@", "_at_")
        head = (output / "meshes" / f"{name}_lora.ply").read_bytes()[:500]
        assert b"property float distance_mm" in head
        mesh = trimesh.load(output / "meshes" / f"{name}_truth.ply")
        inside = np.argwhere(sample["sdf_vox"] < 0)
        centre = sample["affine"][:3, :3] @ inside.mean(0) + sample["affine"][:3, 3]
        assert mesh.is_watertight
        assert_near(mesh.center_mass, centre, sample["spacing"])
        volume = len(inside) * sample["spacing"] ** 3
        assert mesh.volume == pytest.approx(volume, rel=0.2)


def test_record_is_compact_and_complete(content, home):
    record = json.loads((home / "records" / "medical.json").read_text())
    assert "records" not in record
    assert record["means"]["lora"]["all"]["dice"] == pytest.approx(
        content["summary"]["lora"]["all"]["dice"]["mean"], abs=1e-6
    )
    assert record["runs"] == content["runs"]
    assert record["lora_worse_than"]["base"]["regions"] == len(content["worse"]["base"]["regions"])
    assert len(json.dumps(record)) < len(json.dumps(content)) / 2


def test_without_flags_only_the_figures_are_written(home, tmp_path, capsys):
    flags = ["--checkpoint", str(home / "lora" / "checkpoints" / "last.pt")]
    assert main([*flags, "--output_dir", str(tmp_path / "out"), "--device", "cpu"]) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["eval.csv", "eval.json"]
    found = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert list(found["methods"]) == METHODS[:-1]
    assert found["runs"]["lora"]["checkpoint"] == "last"
    printed = capsys.readouterr().out
    assert printed.isascii()
    assert "LoRA, merged" in printed and "NSD@2mm" in printed


@pytest.mark.slow
def test_moved_data_png_images_and_another_mesh_format(home, tmp_path):
    shutil.copytree(home / "volumes", tmp_path / "moved")
    flags = ["--checkpoint", str(home / "lora"), "--data_root", str(tmp_path / "moved")]
    flags += ["--output_dir", str(tmp_path / "out"), "--device", "cpu"]
    flags += ["--visualize", "--visualize_format", "png"]
    assert main([*flags, "--save_predictions", "--mesh_format", "stl"]) == 0
    pictures = list((tmp_path / "out" / "slices").iterdir())
    assert pictures and all(p.read_bytes().startswith(b"\x89PNG") for p in pictures)
    assert {p.suffix for p in (tmp_path / "out" / "meshes").iterdir()} == {".stl"}
    assert not (tmp_path / "out" / "report.html").exists()
    assert main([*flags, "--save_predictions"]) == 0  # the same again, in another format
    assert {p.suffix for p in (tmp_path / "out" / "meshes").iterdir()} == {".ply"}
    (tmp_path / "out" / "meshes" / "my liver.ply").write_text("mine")
    assert main([*flags, "--save_predictions"]) == 2
    assert (tmp_path / "out" / "meshes" / "my liver.ply").read_text() == "mine"


@pytest.mark.parametrize(
    "name", ["eval.json", "eval.csv", "report.html", "meshes/liver_truth.ply", "slices/a.png"]
)
def test_files_of_others_are_never_replaced(name, home, tmp_path, capsys):
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine, not yours")
    flags = ["--checkpoint", str(home / "lora"), "--output_dir", str(tmp_path / "out")]
    assert main([*flags, "--save_predictions", "--visualize"]) == 2
    assert "exists and was not written by an evaluation" in capsys.readouterr().err
    assert path.read_text() == "mine, not yours"
    assert [p for p in (tmp_path / "out").rglob("*") if p.is_file()] == [path]


def test_only_what_a_cache_lists_is_evaluated(home, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(home / "volumes", "moved")
    data = ["--data_root", "moved", "--cache_dir", "cache"]
    assert preprocess_main([*data, "--classes", "blob", "tube"]) == 0
    flags = ["--checkpoint", str(home / "lora"), "--device", "cpu", "--output_dir"]
    assert main([*flags, "out", *data]) == 0
    found = json.loads(Path("out/eval.json").read_text())
    assert sorted({r["structure"] for r in found["records"]}) == ["blob", "tube"]
    capsys.readouterr()
    shutil.copytree(home / "volumes", "other")
    assert main([*flags, "no", "--data_root", "other", "--cache_dir", "nix"]) == 2
    assert "nix" in capsys.readouterr().err and not Path("no").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"checkpoint": "nowhere"},
            "nowhere: expected a run folder, a checkpoint (.pt) or an adapter file",
        ),
        ({"checkpoint": "full"}, "full: expected a run with finetune 'lora', got 'full'"),
        ({"full": "lora"}, "lora: expected a run with finetune 'full', got 'lora'"),
        ({"data_root": "nowhere"}, "nowhere"),
        ({"tolerance_mm": "-1"}, "tolerance_mm: expected a positive number of mm, got -1.0"),
        ({"tolerance_mm": "wide"}, "argument --tolerance_mm: invalid float value: 'wide'"),
        ({"batch_size": "0"}, "batch_size: expected >= 1, got 0"),
        ({"mesh_format": "vrml"}, "argument --mesh_format: invalid choice: 'vrml'"),
        ({"output_dir": "base.safetensors"}, "output_dir: expected a folder, got"),
        ({"record": "lora"}, "record: expected a file, got"),
        ({"device": "tpu"}, "device: expected auto, cpu, cuda or cuda:N, got 'tpu'"),
    ],
)
def test_invalid_input_gets_one_line(home, tmp_path, capsys, monkeypatch, changes, message):
    monkeypatch.chdir(home)
    values = {"checkpoint": "lora", "output_dir": str(tmp_path / "out"), **changes}
    flags = [text for name, value in values.items() for text in (f"--{name}", value)]
    assert main(flags) == 2
    captured = capsys.readouterr()
    assert all("layout TotalSegmentator" in line for line in captured.out.splitlines())
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert message in captured.err
    assert list(tmp_path.iterdir()) == []


def test_a_missing_flag_gets_one_line(capsys):
    assert main([]) == 2
    assert capsys.readouterr().err.startswith("error: the following arguments are required")


def test_a_checkpoint_of_another_base_is_refused(home, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(home / "lora", run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    save_base_model(tiny_model(seed=2), tmp_path / "other.safetensors", {})
    content = torch.load(run / "checkpoints" / "best.pt", weights_only=True)
    content["config"]["base_weights"] = config["base_weights"] = str(tmp_path / "other.safetensors")
    torch.save(content, run / "checkpoints" / "best.pt")
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["--checkpoint", str(run), "--output_dir", str(tmp_path / "out")]) == 2
    assert "another base model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_runs_on_different_data_are_not_compared(home, tmp_path, capsys):
    other = train_tiny(home, "full", classes=("blob",), checkpoint_dir=str(tmp_path / "other"))
    flags = ["--checkpoint", str(home / "lora"), "--full", str(other)]
    assert main([*flags, "--output_dir", str(tmp_path / "out")]) == 2
    assert "full: expected a run with classes None, got ['blob']" in capsys.readouterr().err


def test_an_interrupted_evaluation_leaves_nothing(home, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "fastlora.medical.evaluation.evaluate.surface_metrics",
        lambda *_: (_ for _ in ()).throw(KeyboardInterrupt),
    )
    flags = ["--checkpoint", str(home / "lora"), "--output_dir", str(tmp_path / "out")]
    assert main(flags) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------- its parts


def test_run_reads_its_folder_or_a_checkpoint_in_it(home):
    run = Run.read(home / "lora", "lora")
    assert run.trained.name == "best" and run.config.finetune == "lora"
    last = Run.read(home / "lora" / "checkpoints" / "last.pt", "lora")
    assert (last.trained.folder, last.trained.name) == (run.trained.folder, "last")
    assert last.facts["used_epoch"] == last.facts["epochs"]
    with pytest.raises(CheckpointError, match="expected a run folder"):
        Run.read(home / "lora" / "checkpoints" / "epoch_007.pt", "lora")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{", "not a history file"),
        ("[]", "lacks counts, epochs, seconds"),
        ("{}", "lacks counts, epochs, seconds"),
        ({"epochs": []}, "epochs: expected a non-empty list"),
        ({"epochs": [{"val": {"total": 1.0}}]}, "history: expected 'dice' among the validation"),
        ({"epochs": [7]}, "history.0: expected dict, got int"),
        ({"seconds": ["long"]}, "seconds.0: expected float, got str"),
        ({"counts": {"total": 3}}, "counts: expected total, trainable and lora"),
    ],
    ids=str,
)
def test_an_invalid_history_is_named(home, tmp_path, change, message):
    shutil.copytree(home / "lora", tmp_path / "run")
    file = tmp_path / "run" / "history.json"
    content = json.loads(file.read_text())
    file.write_text(change if isinstance(change, str) else json.dumps({**content, **change}))
    with pytest.raises(CheckpointError, match=rf"history\.json: {message}"):
        Run.read(tmp_path / "run", "lora")


def test_predictions_do_not_depend_on_the_batch():
    regions = TinyRegions(5, seed=2)
    methods = {"baseline": baseline_method(0.4), "base": model_method(tiny_model())}
    one, all_ = (evaluate(regions, methods, 2.0, batch_size=n) for n in (1, 5))
    for key in ("baseline", "base"):
        for a, b in zip(one.predictions[key], all_.predictions[key], strict=True):
            assert_same_distances(a, b)
    assert [r["structure"] for r in one.rows[::2]] == [f"organ_{i}" for i in range(5)]


def test_baseline_method_is_the_baseline():
    regions = TinyRegions(3, seed=0)
    threshold = tune_threshold(regions)
    predicted = baseline_method(threshold)(collate_regions([regions[i] for i in range(3)]))
    for field, index in zip(predicted.numpy(), range(3), strict=True):
        np.testing.assert_array_equal(field, baseline(regions[index]["coarse"], threshold))


def test_rows_hold_the_metrics_of_their_prediction():
    regions = TinyRegions(2, seed=1)
    evaluation = evaluate(regions, {"base": model_method(tiny_model())}, tolerance_mm=1.0)
    row = evaluation.rows[1]
    expected = surface_metrics(
        evaluation.predictions["base"][1], regions[1]["sdf_vox"], spacing=1.5, tolerance_mm=1.0
    )
    assert {key: row[key] for key in METRIC_KEYS} == expected
    assert row["status"] == "ok" and row["spacing_mm"] == 1.5


def test_no_region_and_no_finite_prediction_are_refused():
    with pytest.raises(DataError, match="at least one held-out region"):
        evaluate(TinyRegions(0, seed=0), {"baseline": baseline_method(0.5)}, 2.0)
    not_finite = {"lora": lambda batch: torch.full_like(batch.sdf_vox, torch.nan)}
    with pytest.raises(DataError, match="LoRA, s1/0: pred_sdf_vox: expected finite"):
        evaluate(TinyRegions(1, seed=0), not_finite, 2.0)


def test_largest_difference_is_over_all_regions():
    fields = [np.zeros((2, 2, 2), np.float32) for _ in range(2)]
    moved = [fields[0], fields[1] - 0.25]
    evaluation = Evaluation([], {"lora": fields, "merged": moved}, [], 2.0)
    assert largest_difference(evaluation, "lora", "merged") == 0.25


def row_of(method: str, dice: float | None, group: str = "brain", **more) -> dict:
    values = dict.fromkeys(METRIC_KEYS, dice) | {"hd95_mm": None if dice is None else 10 - 5 * dice}
    place = {"subject": "s", "structure": "a", "region": "a@0", "modality": "ct", "index": 0}
    status = "ok" if dice is not None else "empty_truth"
    return {**place, "group": group, "method": method, "status": status, **values, **more}


def test_summary_means_by_group_and_counts_the_undefined():
    rows = [row_of("lora", 0.8), row_of("lora", 0.6), row_of("lora", 0.1, "spine")]
    rows += [row_of("lora", None, "spine")]
    summary = summarise(rows)["lora"]
    assert list(summary) == ["brain", "spine", "all"]
    assert summary["brain"]["dice"]["mean"] == pytest.approx(0.7)
    assert summary["spine"]["dice"] == {"mean": 0.1, "n": 1, "undefined": 1}
    assert summary["all"]["regions"] == 4
    assert summary["all"]["status"] == {"empty_truth": 1, "ok": 3}


def test_structures_are_means_of_their_regions():
    rows = [row_of("lora", d, region=f"a@{n}") for n, d in enumerate((0.5, 0.7, None))]
    rows.append(row_of("lora", 0.9, structure="b"))
    means = structure_means(rows)
    assert [(m["structure"], m["regions"]) for m in means] == [("a", 3), ("b", 1)]
    assert means[0]["dice"] == pytest.approx(0.6)


def test_regressions_are_listed_largest_first():
    values = {"a": (0.8, 0.7), "b": (0.5, 0.6), "c": (0.2, 0.6), "d": (None, None)}
    rows = []
    for name, (lora, base) in values.items():
        for method, dice in (("lora", lora), ("base", base)):
            rows.append(row_of(method, dice, structure=name, region=f"{name}@0"))
    losses = worse_than(rows, "lora", "base")
    assert [loss["structure"] for loss in losses] == ["c", "b"]
    assert losses[0]["worse"] == ["dice", "hd95_mm", "nsd"]
    assert losses[0]["values"]["dice"] == [0.2, 0.6]


@pytest.mark.parametrize(
    ("key", "value", "reference", "worse"),
    [
        ("dice", 0.80, 0.81, True),
        ("dice", 0.8001, 0.8004, False),  # shown as the same number
        ("hd95_mm", 2.0, 1.9, True),
        ("hd95_mm", 1.9, 2.0, False),
        ("volume_error", -0.2, 0.1, True),
        ("volume_error", 0.1, -0.2, False),
        ("dice", None, 0.5, False),
        ("dice", 0.5, None, False),
    ],
)
def test_worse_follows_the_metric(key, value, reference, worse):
    assert is_worse(key, value, reference) is worse


def test_csv_writes_undefined_as_empty(tmp_path):
    write_csv(tmp_path / "t.csv", [row_of("lora", None, spacing_mm=1.5)])
    with (tmp_path / "t.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["dice"] == "" and row["status"] == "empty_truth" and row["spacing_mm"] == "1.5"


def test_a_name_is_no_formula_in_the_csv(tmp_path):
    row = row_of("lora", -0.5, spacing_mm=1.5)
    write_csv(tmp_path / "t.csv", [{**row, "structure": "=1+1"}])
    with (tmp_path / "t.csv").open(newline="") as file:
        (read,) = csv.DictReader(file)
    assert read["structure"] == "'=1+1" and "-0.5" in read.values()


def test_meshes_replace_those_of_an_earlier_evaluation(tmp_path):
    regions = TinyRegions(1, seed=0)
    methods = {
        "baseline": baseline_method(0.4),
        "base": lambda batch: torch.ones_like(batch.sdf_vox),
    }
    evaluation = evaluate(regions, methods, 2.0)
    folder = tmp_path / "meshes"
    folder.mkdir()
    (folder / "old.ply").touch()
    assert write_meshes(folder, evaluation, "obj") == 2  # the empty prediction has no mesh
    assert sorted(p.name for p in folder.iterdir()) == ["s1_0_baseline.obj", "s1_0_truth.obj"]
    assert list(tmp_path.iterdir()) == [folder]
    with pytest.raises(ConfigError, match="mesh_format: expected one of"):
        write_meshes(folder, evaluation, "vrml")


def test_environment_names_versions_and_commit(monkeypatch):
    found = environment()
    assert found["numpy"] == np.__version__
    assert found["git"] is None or len(found["git"]["sha"]) == 40
    monkeypatch.setenv("PATH", "")
    assert environment()["git"] is None


def test_document_is_plain_json(home):
    evaluation, facts = evaluate_home(home)
    content = document(evaluation, facts, read_runs(home), "command")
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert json.loads(json.dumps(compact_record(content), allow_nan=False))
    assert content["methods"] == {key: LABELS[key] for key in METHODS}


def test_lora_is_the_loaded_run(home):
    evaluation, _ = evaluate_home(home)
    batch = collate_regions(evaluation.samples)
    with torch.inference_mode():
        again = load_finetuned(home / "lora")(batch.tokens, batch.base_vox).numpy()
    assert_same_distances(np.stack(evaluation.predictions["lora"]), again)


def test_a_run_whose_regions_differ_from_its_data_is_not_compared(home, monkeypatch):
    """After a change of the manifest, training subjects could be in the test set."""
    runs = read_runs(home)
    assert len(runs["lora"].regions) == 2
    monkeypatch.setattr(RegionDataset, "identity", lambda _: "another set")
    with pytest.raises(
        DataError, match="best.pt: was trained on regions that differ from those of its data"
    ):
        compare_runs(runs["lora"], runs["full"], device="cpu")
