"""A fine-tuned model is loaded from a run folder, or from one file of it at any place."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from fastlora import load_lora_state_dict, save_adapter
from fastlora.errors import CheckpointError, ConfigError
from fastlora.files import write_json
from fastlora.medical.commands.evaluate import main as evaluate_main
from fastlora.medical.commands.predict import main as predict_main
from fastlora.medical.data.batch import collate_regions
from fastlora.medical.data.regions import RegionDataset
from fastlora.medical.evaluation.evaluate import Run
from fastlora.medical.training.adapter_run import ENTRY, read_adapter_run, read_metadata
from fastlora.medical.training.config import PATHS
from fastlora.medical.training.finetuned import (
    Finetuned,
    load_finetuned,
    make_trainable,
    predict,
    trainable_parameters,
)
from fastlora.medical.training.trainer import MedicalTrainer
from tests.support.eval_run import shared_home
from tests.support.tiny_run import TinyRegions, tiny_model, tiny_trainer

BATCH = collate_regions([TinyRegions(2, 5)[n] for n in range(2)])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> MedicalTrainer:
    trainer = tiny_trainer(tmp_path_factory.mktemp("lora") / "run")
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_home(tmp_path_factory.getbasetemp())


@torch.no_grad()
def distances(path: Path, **options: object) -> torch.Tensor:
    return predict(load_finetuned(path, model=tiny_model(), **options), BATCH)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["adapter.safetensors", "checkpoints/best.pt"])
def test_a_file_at_any_place_gives_the_model_of_its_run(
    run: MedicalTrainer, tmp_path: Path, name: str
) -> None:
    folder = run.folder.path
    wanted = distances(folder)
    assert not torch.equal(wanted, predict(tiny_model(), BATCH))
    moved = Path(shutil.copy(folder / name, tmp_path / f"moved{Path(name).suffix}"))
    for path in (folder / name, moved):
        assert torch.equal(distances(path), wanted)
        torch.testing.assert_close(distances(path, merged=True), wanted)
    inside, alone = Finetuned.read(folder / name), Finetuned.read(moved)
    assert (inside.folder, alone.folder) == (folder.resolve(), None)
    assert alone.config.adapters == run.config.adapters and alone.name == moved.name
    assert alone.content["history"] == run.history[: alone.content["epoch"] + 1]


@pytest.mark.parametrize(
    "changes", [{}, {"lora_rank": None, "lora_alpha": None}], ids=["head", "adapted"]
)
def test_an_adapter_file_that_says_nothing_of_its_run_is_loaded_by_its_layers(
    tmp_path: Path, changes: dict[str, None], caplog: pytest.LogCaptureFixture
) -> None:
    """As written by earlier versions, or by `save_adapter`. The second has several ranks, also in the output layer."""
    trainer = tiny_trainer(tmp_path / "run", epochs=1, lora_dropout=0.0, **changes)
    trainer.train()
    path = tmp_path / "plain.safetensors"
    save_adapter(trainer.model, path)
    assert ENTRY not in read_metadata(path)
    with torch.no_grad():
        assert torch.equal(distances(path), predict(trainer.model.eval(), BATCH))
    assert "does not say which base, data and split it was trained on" in caplog.text
    content = Finetuned.read(path).content
    assert content["epoch"] is None and content["history"] == content["regions"] == []


def test_an_adapter_file_names_no_place_of_the_machine(home: Path) -> None:
    text = read_metadata(home / "lora" / "adapter.safetensors")[ENTRY]
    assert str(home) not in text
    about = json.loads(text)
    assert about["paths"] == ["checkpoint_dir", "data_root", "base_weights"]
    assert not about["config"].keys() & set(PATHS)


def test_equal_runs_give_equal_adapter_files(run: MedicalTrainer, tmp_path: Path) -> None:
    tiny_trainer(tmp_path / "run").train()
    again = (tmp_path / "run" / "adapter.safetensors").read_bytes()
    assert again == run.folder.adapter.read_bytes()


# -- the checkpoint


def test_lora_state_dict_of_a_checkpoint(run: MedicalTrainer, tmp_path: Path) -> None:
    content = torch.load(run.folder.find("best"), weights_only=True)
    model = tiny_model()
    make_trainable(model, run.config)
    loaded = load_lora_state_dict(model, content["lora_state_dict"])
    assert sorted(loaded.loaded) == sorted(trainable_parameters(model))
    with torch.no_grad():
        assert torch.equal(predict(model.eval(), BATCH), distances(run.folder.path))
    assert "model" not in content  # the weights are there once
    torch.save({**content, "model": content["lora_state_dict"]}, tmp_path / "both.pt")
    with pytest.raises(CheckpointError, match="expected lora_state_dict or model, got both"):
        load_finetuned(tmp_path / "both.pt")
    last = torch.load(run.folder.find("last"), weights_only=True)
    assert last["best"] is None or "lora_state_dict" in last["best"]


def test_a_checkpoint_of_all_weights_has_no_lora_state_dict(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run", finetune="full", epochs=1)
    trainer.train()
    content = torch.load(trainer.folder.find("last"), weights_only=True)
    assert "lora_state_dict" not in content
    assert content["model"].keys() == tiny_model().state_dict().keys()


def test_checkpoints_of_older_versions_are_read(run: MedicalTrainer, tmp_path: Path) -> None:
    folder = shutil.copytree(run.folder.path, tmp_path / "run")
    for file in (folder / "checkpoints").glob("*.pt"):
        content = torch.load(file, weights_only=True)
        for part in filter(None, (content, content["best"])):
            part["model"] = part.pop("lora_state_dict")
        torch.save(content, file)
    assert torch.equal(distances(folder), distances(run.folder.path))
    again = tiny_trainer(folder, resume="auto", epochs=5)
    assert again.epoch == 4 and len(again.train()) == 6


# -- the commands


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "eval.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_eval_of_an_adapter_file_equals_that_of_its_run(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = tmp_path / "elsewhere" / "my adapter.safetensors"
    alone.parent.mkdir()
    shutil.copy(home / "lora" / "adapter.safetensors", alone)
    flags = ["--output_dir", str(tmp_path / "run"), "--checkpoint", str(home / "lora")]
    assert evaluate_main(flags) == 0
    flags = ["--output_dir", str(tmp_path / "file"), "--checkpoint", str(alone), "--visualize"]
    capsys.readouterr()
    assert evaluate_main(flags) == 2
    assert "data_root: " in capsys.readouterr().err  # which base, is asked after the data
    flags += ["--data_root", str(home / "volumes")]
    assert evaluate_main(flags) == 2
    assert "was trained on another base model" in (error := capsys.readouterr().err)
    assert "--base_weights" in error and not (tmp_path / "file").exists()
    flags += ["--base_weights", str(home / "base.safetensors")]
    assert evaluate_main(flags) == 0
    assert rows(tmp_path / "file") == rows(tmp_path / "run")
    one, other = (
        json.loads((tmp_path / name / "eval.json").read_text())["runs"]["lora"]
        for name in ("run", "file")
    )
    assert other["checkpoint"] == "my adapter.safetensors"
    same = ("used_epoch", "base_parameters", "trainable", "weights_bytes")
    assert [one[name] for name in same] == [other[name] for name in same]
    assert (other["seconds"], other["checkpoint_bytes"]) == (None, None)
    assert "<td>–</td>" in (tmp_path / "file" / "report.html").read_text(encoding="utf-8")
    assert sorted(path.name for path in alone.parent.iterdir()) == [alone.name]


def test_eval_of_a_checkpoint_elsewhere(home: Path, tmp_path: Path) -> None:
    """The checkpoint does not state the parameters of its base, which are counted."""
    for kind in ("lora", "full"):
        shutil.copy(home / kind / "checkpoints" / "last.pt", tmp_path / f"{kind}.pt")
        moved, inside = (
            Run.read(path, kind)
            for path in (tmp_path / f"{kind}.pt", home / kind / "checkpoints" / "last.pt")
        )
        assert moved.history == inside.history
        # How long the run went on after the checkpoint is not known.
        unknown = {"epochs": None, "seconds": None}
        assert {**moved.facts, "checkpoint": "last"} == {**inside.facts, **unknown}


def test_predict_takes_an_adapter_file(home: Path, tmp_path: Path) -> None:
    shutil.copy(home / "lora" / "adapter.safetensors", tmp_path / "a.safetensors")
    subject = next(path for path in sorted((home / "volumes").iterdir()) if path.is_dir())
    mask = next((subject / "segmentations").glob("*.nii.gz"))
    meshes = []
    for checkpoint, more in (
        (home / "lora", []),
        (tmp_path / "a.safetensors", ["--base_weights", str(home / "base.safetensors")]),
    ):
        out = tmp_path / f"out{len(meshes)}"
        flags = ["--checkpoint", str(checkpoint), "--image", str(subject / "ct.nii.gz"), *more]
        assert predict_main([*flags, "--mask", str(mask), "--output_dir", str(out)]) == 0
        meshes.append(next(out.glob("*.ply")).read_bytes().split(b"end_header")[1])
    assert meshes[0] == meshes[1]


def test_an_adapter_file_is_compared_with_a_full_run(home: Path, tmp_path: Path) -> None:
    alone = shutil.copy(home / "lora" / "adapter.safetensors", tmp_path / "a.safetensors")
    flags = ["--full", str(home / "full"), "--output_dir", str(tmp_path / "out")]
    data = ["--data_root", str(home / "volumes"), "--base_weights", str(home / "base.safetensors")]
    assert evaluate_main(["--checkpoint", str(alone), *flags, *data]) == 0
    assert {row["method"] for row in rows(tmp_path / "out")} >= {"lora", "merged", "full"}
    # In its run folder it needs nothing.
    inside = str(home / "lora" / "adapter.safetensors")
    assert evaluate_main(["--checkpoint", inside, *flags]) == 0


def test_an_adapter_file_is_not_tested_on_regions_that_it_may_have_been_trained_on(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = shutil.copy(home / "lora" / "adapter.safetensors", tmp_path / "a.safetensors")
    data = ["--data_root", str(home / "volumes"), "--base_weights", str(home / "base.safetensors")]
    out = ["--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(RegionDataset, "identity", lambda _: "another set")
    assert evaluate_main(["--checkpoint", str(alone), *data, *out]) == 2
    assert "so a training region could be in the test set" in capsys.readouterr().err
    # The data of a run folder may be replaced by those of other patients; that is said.
    assert evaluate_main(["--checkpoint", str(home / "lora"), *data, *out]) == 0
    assert "could be in the test set, unless no patient of" in capsys.readouterr().out


def test_what_was_trained_is_stated_by_the_file_and_where_by_its_run_folder(
    home: Path, tmp_path: Path
) -> None:
    """An edited config.yaml, or a checkpoint of another run, changes no prediction."""
    wanted = Finetuned.read(home / "lora").weights
    run = shutil.copytree(home / "lora", tmp_path / "run")
    values = yaml.safe_load((run / "config.yaml").read_text())
    scaling = Finetuned.read(run).config.lora_alpha
    moved = shutil.copy(home / "base.safetensors", tmp_path / "moved.safetensors")
    shutil.copy(home / "base.json", tmp_path / "moved.json")
    values |= {"lora_alpha": 40.0, "base_weights": str(moved)}
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    for file in (run, run / "adapter.safetensors"):
        found = Finetuned.read(file)
        assert found.config.lora_alpha == scaling != 40.0
        assert found.config.base_weights == str(moved)
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.weights.items())
        with torch.no_grad():
            assert torch.equal(
                predict(found.model(), BATCH), predict(load_finetuned(home / "lora"), BATCH)
            )


# -- what is refused


def test_damaged_entries_are_named(run: MedicalTrainer, tmp_path: Path) -> None:
    model = tiny_model()
    make_trainable(model, run.config)
    about = json.loads(read_metadata(run.folder.adapter)[ENTRY])
    path = tmp_path / "a.safetensors"
    for text, message in (
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "expected dict, got list"),
        (json.dumps({"config": {}}), "lacks base_sha256, counts, epoch, history, paths, regions"),
        (json.dumps({**about, "epoch": "two"}), "epoch: expected int, got str"),
        (json.dumps({**about, "counts": {"total": 1}}), "counts: expected the keys"),
        (json.dumps({**about, "history": [{"val": {"total": "low"}}]}), "history.0.val"),
        (
            json.dumps({**about, "config": {"data_root": "/etc"}}),
            "expected no paths, got data_root",
        ),
    ):
        save_adapter(model, path, metadata={ENTRY: text})
        with pytest.raises(CheckpointError, match=rf"a\.safetensors: {ENTRY}: .*{message}"):
            read_adapter_run(path)
    save_adapter(model, path, metadata={ENTRY: json.dumps({**about, "config": {"lr": -1}})})
    with pytest.raises(ConfigError, match="a.safetensors: lr: expected > 0"):
        Finetuned.read(path)
    huge = {**about, "config": {**about["config"], "lora_rank": 20_000_000}}
    save_adapter(model, path, metadata={ENTRY: json.dumps(huge)})
    with pytest.raises(CheckpointError, match="LoRA rank 20000000, but its largest lora_A has"):
        distances(path)


def test_adapters_of_other_settings_are_refused(run: MedicalTrainer, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    model = tiny_model()
    make_trainable(model, run.config)
    model.blocks[0].attn.to_qkv.alpha = 4.0
    save_adapter(model, path)
    with pytest.raises(CheckpointError, match="one alpha / rank for all layers.*, got 1, 2"):
        Finetuned.read(path)
    save_adapter(model, path, metadata={ENTRY: read_metadata(run.folder.adapter)[ENTRY]})
    with pytest.raises(CheckpointError, match="alpha is 4.0 in the file, 8.0 in the model"):
        distances(path)
    with pytest.raises(CheckpointError, match="was trained on another base model.*--base_weights"):
        load_finetuned(run.folder.adapter, model=tiny_model(seed=2))
    for text in ("{", "[]", '{"layers": {"a": {"rank": 0, "alpha": 1}}}', '{"layers": {"a": 4}}'):
        save_file({"a": torch.zeros(1)}, path, {"fastlora": text})
        with pytest.raises(CheckpointError, match="damaged settings of its layers"):
            Finetuned.read(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="one alpha / rank for all layers.*, got none"):
        Finetuned.read(path)
    (tmp_path / "loralib.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        Finetuned.read(tmp_path / "loralib.safetensors")
    with pytest.raises(CheckpointError, match="expected a run folder, a checkpoint"):
        Finetuned.read(tmp_path / "nothing")


def test_an_unrelated_config_beside_the_file_is_not_read(
    run: MedicalTrainer, tmp_path: Path
) -> None:
    shutil.copy(run.folder.adapter, tmp_path)
    (tmp_path / "config.yaml").write_text("model: llama\n")
    write_json(tmp_path / "history.json", {})
    assert torch.equal(distances(tmp_path / "adapter.safetensors"), distances(run.folder.path))
