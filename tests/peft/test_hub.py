"""Folders that are whole: the fields and the model card that PEFT, transformers and the Hub read; and ids of repositories on the Hub."""

import builtins
import json
import shutil

import pytest
import torch

from fastlora import (
    CheckpointError,
    ConfigError,
    LoRAConfig,
    delete_adapter,
    freeze_base_params,
    from_pretrained,
    inject_lora,
    named_lora_layers,
    save_pretrained,
)
from fastlora.peft.hub import is_hub_id
from tests.support.models import Decoder, randomise_adapters

peft = pytest.importorskip("peft")
huggingface_hub = pytest.importorskip("huggingface_hub")

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
X = torch.linspace(-1, 1, 24).view(3, 8)
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def base():
    torch.manual_seed(7)
    return Decoder().eval()


def adapted(name=None, **options):
    model = base()
    if name is not None:
        model.name_or_path = name
    inject_lora(model, LoRAConfig(["to_qkv", "to_out"], **options))
    freeze_base_params(model)
    randomise_adapters(model)
    return model


def config_of(folder):
    return json.loads((folder / CONFIG).read_text())


def card_of(folder):
    return huggingface_hub.ModelCard.load(folder / CARD)


# the fields of the config


@pytest.mark.filterwarnings("ignore:Could not find a config file")
def test_the_class_of_the_model_is_written_as_peft_writes_it(tmp_path):
    name = str(tmp_path)  # PEFT asks the Hub for an id
    save_pretrained(adapted(name), tmp_path / "ours")
    theirs = base()
    theirs.name_or_path = name
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(target_modules=["to_qkv"]))
    theirs.save_pretrained(tmp_path / "theirs")
    names = ("auto_mapping", "base_model_name_or_path", "task_type", "revision")
    ours, expected = config_of(tmp_path / "ours"), config_of(tmp_path / "theirs")
    assert [ours[n] for n in names] == [expected[n] for n in names]
    assert ours["auto_mapping"] == {
        "base_model_class": "Decoder",
        "parent_library": "tests.support.models",
    }


def test_the_task_is_kept_from_the_argument_the_lora_config_and_the_folder(tmp_path):
    model = adapted()
    save_pretrained(model, tmp_path / "a", task_type="CAUSAL_LM")
    assert (config_of(tmp_path / "a")["task_type"], config_of(tmp_path / "a")["auto_mapping"]) == (
        "CAUSAL_LM",
        None,
    )
    raw = config_of(tmp_path / "a") | {"base_model_name_or_path": "org/base", "revision": "v2"}
    (tmp_path / "a" / CONFIG).write_text(json.dumps(raw))
    from_pretrained(again := base(), tmp_path / "a")
    save_pretrained(again, tmp_path / "b")
    kept = ("task_type", "base_model_name_or_path", "revision")
    assert [config_of(tmp_path / "b")[n] for n in kept] == ["CAUSAL_LM", "org/base", "v2"]
    again.name_or_path = "org/other"  # its revisions are others
    save_pretrained(again, tmp_path / "c", task_type="SEQ_CLS")
    assert [config_of(tmp_path / "c")[n] for n in kept] == ["SEQ_CLS", "org/other", None]
    injected = base()
    inject_lora(injected, peft.LoraConfig(target_modules=["to_qkv"], task_type="TOKEN_CLS"))
    freeze_base_params(injected)
    save_pretrained(injected, tmp_path / "d")
    assert config_of(tmp_path / "d")["task_type"] == "TOKEN_CLS"
    delete_adapter(injected, "default")
    inject_lora(injected, ["to_qkv"])
    freeze_base_params(injected)
    save_pretrained(injected, tmp_path / "d")  # nothing is left of the deleted adapter
    assert config_of(tmp_path / "d")["task_type"] is None
    with pytest.raises(ConfigError, match="task_type: expected one of SEQ_CLS, .* got 'CAUSAL'"):
        save_pretrained(model, tmp_path / "e", task_type="CAUSAL")
    assert not (tmp_path / "e").exists()


# the model card


def test_the_cards_metadata_is_what_the_hub_reads(tmp_path):
    save_pretrained(adapted("org/base"), tmp_path, task_type="CAUSAL_LM")
    data = card_of(tmp_path).data.to_dict()
    assert data == {
        "base_model": "org/base",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["base_model:adapter:org/base", "fastlora", "lora", "transformers"],
    }
    text = card_of(tmp_path).text
    assert 'AutoPeftModelForCausalLM.from_pretrained("the path or id of this folder")' in text
    assert "AutoModelForCausalLM.from_pretrained('org/base')" in text
    assert "| rank | 4 |" in text and "`to_out`, `to_qkv`" in text
    assert sorted(p.name for p in tmp_path.iterdir()) == [CARD, CONFIG, WEIGHTS]


@pytest.mark.parametrize("name", ["/data/my base", "./base", 'a"b\\ü\U0001f600', None], ids=ascii)
def test_a_local_base_is_not_in_the_metadata_because_the_hub_refuses_it(name, tmp_path):
    save_pretrained(adapted(name), tmp_path)
    card = card_of(tmp_path)
    assert card.data.to_dict() == {"library_name": "peft", "tags": ["fastlora", "lora"]}
    assert config_of(tmp_path)["base_model_name_or_path"] == name
    assert ("unknown" if name is None else ascii(name)) in card.text


def test_a_card_is_replaced_only_if_fastlora_wrote_it_and_nobody_changed_it(tmp_path):
    save_pretrained(adapted(), tmp_path)
    ours = (tmp_path / CARD).read_bytes()
    save_pretrained(adapted(rank=2), tmp_path)
    assert b"| rank | 2 |" in (tmp_path / CARD).read_bytes() != ours
    save_pretrained(adapted(), tmp_path)
    assert (tmp_path / CARD).read_bytes() == ours
    changed = [ours.replace(b"| rank | 4 |", b"| rank | 4, as in the paper |"), ours + b"More.\n"]
    for text in [*changed, b"# Mine\n", b"", b"\xff\xfe", ours.replace(b"\n", b"\r\n")]:
        (tmp_path / CARD).write_bytes(text)
        save_pretrained(adapted(rank=2), tmp_path)
        assert (tmp_path / CARD).read_bytes() == text
        assert config_of(tmp_path)["r"] == 2
    (tmp_path / CARD).unlink()
    (tmp_path / "elsewhere.md").write_bytes(ours)
    (tmp_path / CARD).symlink_to("elsewhere.md")
    save_pretrained(adapted(rank=2), tmp_path)
    assert (tmp_path / CARD).is_symlink() and (tmp_path / "elsewhere.md").read_bytes() == ours


# ids of repositories


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of the Hub with the repository org/name: at "main" and, below "inner", a whole adapter. No network."""
    root = tmp_path / "hub"
    repository = root / "models--org--name"
    for inside, rank in (("", 4), ("inner", 2)):
        save_pretrained(adapted(rank=rank), repository / "snapshots" / COMMIT / inside)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "refs" / "v1").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return root


@pytest.mark.parametrize(
    ("options", "rank"),
    [({}, 4), ({"revision": "v1"}, 4), ({"revision": COMMIT}, 4), ({"subfolder": "inner"}, 2)],
    ids=str,
)
def test_an_id_is_read_from_the_cache(options, rank, cache):
    model = base()
    from_pretrained(model, "org/name", cache_dir=cache, **options)
    assert {layer.rank for _, layer in named_lora_layers(model)} == {rank}
    assert torch.equal(model(X), adapted(rank=rank)(X))


def test_a_local_folder_wins_and_a_path_never_goes_to_the_hub(cache, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: calls.append(a))
    save_pretrained(adapted(rank=3), tmp_path / "org" / "name")
    from_pretrained(model := base(), "org/name")
    assert {layer.rank for _, layer in named_lora_layers(model)} == {3}
    shutil.rmtree(tmp_path / "org" / "name")
    there = ["org/name", "./org/nothing", "../x", "nothing", str(tmp_path / "x"), "~/x", "a/b/c"]
    for path in [*there, tmp_path / "no" / "where", "a\\b"]:
        with pytest.raises(CheckpointError, match=f"no such file: .*{CONFIG}"):
            from_pretrained(base(), path)
    save_pretrained(adapted(rank=3), tmp_path / "org" / "name" / "inner")
    from_pretrained(model := base(), "org/name", subfolder="inner")
    assert {layer.rank for _, layer in named_lora_layers(model)} == {3} and calls == []


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("org/other", {}, "adapter_config.json of the repository org/other from the Hugging"),
        ("org/name", {"revision": "v9"}, "repository org/name at revision 'v9' from"),
        ("org/name", {"subfolder": "x"}, "x/adapter_config.json of the repository org/name"),
    ],
)
def test_what_is_neither_local_nor_in_the_cache_is_one_clear_line(name, options, message, cache):
    model = base()
    with pytest.raises(CheckpointError, match=message) as raised:
        from_pretrained(model, name, cache_dir=cache, token="hf_secret", **options)
    text = str(raised.value)
    assert "to load a local folder, pass a path to one that exists" in text
    assert "\n" not in text and "secret" not in text
    assert not list(named_lora_layers(model))


def test_missing_weights_are_named(cache):
    (cache / "models--org--name" / "snapshots" / COMMIT / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=f"cannot get {WEIGHTS} of the repository org/name"):
        from_pretrained(base(), "org/name", cache_dir=cache)


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch, tmp_path):
    real = builtins.__import__

    def blocked(name, *args, **options):
        if name.partition(".")[0] == "huggingface_hub":
            raise ImportError("No module named 'huggingface_hub'")
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", blocked)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="folder: org/name looks like .*pip install hugging"):
        from_pretrained(base(), "org/name")
    save_pretrained(adapted(), "a/b")  # folders need no package
    from_pretrained(base(), "a/b")


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        *(("org/name", True), ("Org-1/na.me_2", True), ("name", False), ("./name", False)),
        *(("../name", False), ("a/b/c", False), ("/a/b", False), ("~/a", False), ("a/", False)),
        *(("org/na--me", False), ("org/na..me", False), ("org/näme", False), ("C:/name", False)),
        *(("org/" + "n" * 96, False), ("a\\b/c", False), ("org/name\n", False)),
    ],
)
def test_what_is_an_id(name, is_one):
    assert is_hub_id(name) is is_one
