"""`fastlora merge` of a folder that transformers wrote: what it leaves loads with AutoModel and computes what merged_model does."""

import copy
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastlora
from fastlora import LoRAConfig
from fastlora.cli import commands as cli
from tests.support.models import randomise_adapters
from tests.support.tolerance import assert_close

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
IDS = torch.arange(12).view(2, 6)


def llama(tie=False):
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tie,
    )
    return transformers.LlamaForCausalLM(config).eval()


def gpt2():
    torch.manual_seed(3)
    config = transformers.GPT2Config(
        vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2, tie_word_embeddings=True
    )
    return transformers.GPT2LMHeadModel(config).eval()


def adapt(model, *targets, head=None, kinds=("linear", "conv", "embedding")):
    fastlora.inject_lora(model, LoRAConfig(list(targets), rank=2, alpha=6.0, kinds=kinds))
    randomise_adapters(model)
    fastlora.freeze_base_params(model)
    if head is not None:
        model.get_submodule(head).requires_grad_(True)
        torch.nn.init.normal_(model.get_submodule(head).weight)
    fastlora.save_adapter(model, "adapter.safetensors")
    return fastlora.merged_model(model)


def save(model, folder="base", **options):
    model.save_pretrained(folder, **options)
    transformers.GenerationConfig(max_new_tokens=5).save_pretrained(folder)
    words = {f"w{i}": i for i in range(40)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def merge(capsys, *options, base="base", out="merged"):
    capsys.readouterr()  # the progress bars of transformers
    code = cli.main(["merge", base, "adapter.safetensors", out, *options])
    return code, capsys.readouterr().err


def through_peft(written_by_peft=False):
    """Convert adapter.safetensors to PEFT's format, and back."""
    weights = Path("peft/adapter_model.safetensors")
    cli.main(["convert", "adapter.safetensors", "peft", "--to", "peft", "--force"])
    if written_by_peft:
        save_file(load_file(weights), weights)
    cli.main(["convert", "peft", "adapter.safetensors", "--to", "fastlora", "--force"])


@pytest.mark.parametrize("shards", [False, True])
def test_a_merged_folder_loads_with_auto_model_and_its_tokenizer(capsys, shards):
    save(llama(), max_shard_size="8KB" if shards else "1GB")
    assert (len(list(Path("base").glob("*.safetensors"))) > 1) == shards
    expected = adapt(llama(), "q_proj", "down_proj", head="lm_head")
    assert merge(capsys) == (0, "")
    assert sorted(os.listdir("merged")) == sorted(os.listdir("base"))
    loaded = transformers.AutoModelForCausalLM.from_pretrained("merged")
    assert torch.equal(loaded(IDS).logits, expected(IDS).logits)
    assert loaded.generation_config.max_new_tokens == 5
    tokenizer = transformers.AutoTokenizer.from_pretrained("merged")
    assert tokenizer.convert_tokens_to_ids("w7") == 7


def test_weights_in_other_formats_are_not_copied_and_named(capsys):
    save(llama())
    adapt(llama(), "q_proj")
    for name in ("pytorch_model.bin", "model.fp16.safetensors", "model.gguf", ".gitattributes"):
        Path("base", name).write_bytes(b"weights before the merge")
    Path("base/onnx").mkdir()
    code, err = merge(capsys)
    assert code == 0
    assert err.endswith("not copied: model.fp16.safetensors, model.gguf, onnx, pytorch_model.bin\n")
    assert not {"pytorch_model.bin", "onnx", ".gitattributes"} & set(os.listdir("merged"))


def test_a_folder_without_safetensors_or_of_an_adapter_is_refused_by_name(capsys):
    save(llama())
    adapt(llama(), "q_proj")
    shutil.copytree("base", "adapted")
    Path("adapted/adapter_config.json").write_text("{}")
    Path("base/model.safetensors").rename("base/pytorch_model.bin")
    for base, message in (
        ("base", "pytorch_model.bin is not read, save the model as safetensors"),
        ("adapted", "holds adapter_config.json: expected a base model's folder"),
    ):
        code, err = merge(capsys, base=base)
        assert code == 1 and message in err and not Path("merged").exists()


def test_a_file_that_only_links_to_a_cache_is_copied_as_a_file(capsys):
    save(llama())
    expected = adapt(llama(), "q_proj")
    shutil.copytree("base", "blobs")
    for path in Path("base").iterdir():
        path.unlink()
        path.symlink_to(Path("../blobs") / path.name)
    blobs = {path: path.read_bytes() for path in Path("blobs").iterdir()}
    assert merge(capsys) == (0, "")
    assert not any(path.is_symlink() for path in Path("merged").iterdir())
    loaded = transformers.AutoModelForCausalLM.from_pretrained("merged")
    assert torch.equal(loaded(IDS).logits, expected(IDS).logits)
    assert {path: path.read_bytes() for path in Path("blobs").iterdir()} == blobs


def test_a_weight_that_transformers_ties_is_not_merged_and_the_others_are(capsys):
    save(llama(tie=True))
    assert "lm_head.weight" not in load_file("base/model.safetensors")
    model = llama(tie=True)
    with pytest.raises(fastlora.MergeError, match="is tied to lm_head.weight"):
        adapt(model, "embed_tokens", "q_proj")
    assert "model.embed_tokens.weight: is tied to lm_head.weight" in merge(capsys)[1]
    through_peft()
    assert "model.embed_tokens.weight: is tied to lm_head.weight" in merge(capsys)[1]
    through_peft(written_by_peft=True)  # which does not tell
    code, err = merge(capsys)
    assert code == 1 and "model.embed_tokens.weight: is tied to another weight" in err
    config = json.loads(Path("base/config.json").read_text())
    Path("base/config.json").write_text(json.dumps(config | {"tie_word_embeddings": None}))
    assert "model.embed_tokens.weight: is tied to another weight" in merge(capsys)[1]
    Path("base/config.json").write_text(json.dumps(config))
    code, err = merge(capsys, base="base/model.safetensors", out="m.safetensors")
    assert code == 1 and "model.embed_tokens.weight: is tied to another weight" in err
    expected = adapt(llama(tie=True), "q_proj")
    assert merge(capsys) == (0, "")
    loaded = transformers.AutoModelForCausalLM.from_pretrained("merged")
    assert torch.equal(loaded(IDS).logits, expected(IDS).logits)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_a_base_without_config_warns_of_weights_that_may_be_tied(capsys, target, tie):
    state = llama(tie).state_dict()
    save_file({key: value.clone() for key, value in state.items()}, "base.safetensors")
    if tie:
        with pytest.raises(fastlora.MergeError, match="is tied to"):
            adapt(llama(tie), target, "q_proj")
    else:
        expected = adapt(llama(tie), target, "q_proj")
    through_peft(written_by_peft=True)
    code, err = merge(capsys, base="base.safetensors", out="merged.safetensors")
    assert code == 0
    if tie:
        embed, head = "model.embed_tokens.weight", "lm_head.weight"
        pair = f"{embed} = {head}" if target == "embed_tokens" else f"{head} = {embed}"
        assert f"equal in the base, and only one of them changes: {pair}; if the model ties" in err
    else:
        assert not err
        merged = llama()
        merged.load_state_dict(load_file("merged.safetensors"))
        assert torch.equal(merged(IDS).logits, expected(IDS).logits)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_adapter_of_a_tied_model_is_merged_into_an_untied_base(capsys, target):
    save(llama())
    expected = adapt(llama(), target, "q_proj")
    tied = llama(tie=True)
    tied.load_state_dict(llama().state_dict())
    with pytest.raises(fastlora.MergeError, match="is tied to"):
        adapt(tied, target, "q_proj")
    assert merge(capsys) == (0, "")  # its config.json says that they are not tied
    loaded = transformers.AutoModelForCausalLM.from_pretrained("merged")
    assert torch.equal(loaded(IDS).logits, expected(IDS).logits)


@pytest.mark.parametrize("format", ["fastlora", "peft"])
def test_a_trained_tied_head_is_merged_where_the_base_has_it(capsys, format):
    save(llama(tie=True))
    expected = adapt(llama(tie=True), "q_proj", head="lm_head")
    if format == "peft":
        through_peft(written_by_peft=True)
    code, err = merge(capsys)
    told = "lm_head.weight: not in the base, and equal to other heads that are: taken for tied"
    assert code == 0 and (told in err if format == "peft" else not err)
    loaded = transformers.AutoModelForCausalLM.from_pretrained("merged")
    assert torch.equal(loaded(IDS).logits, expected(IDS).logits)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_an_embedding_that_is_not_tied_is_merged(capsys):
    save(llama())
    expected = adapt(llama(), "embed_tokens", "lm_head")
    assert merge(capsys) == (0, "")
    loaded = transformers.AutoModelForCausalLM.from_pretrained("merged")
    assert torch.equal(loaded(IDS).logits, expected(IDS).logits)


@pytest.mark.parametrize("adapted_class", ["with a head", "without"])
def test_a_prefix_that_transformers_leaves_out_or_adds_does_not_matter(capsys, adapted_class):
    if adapted_class == "with a head":  # the base was saved without it, as GPT-2's was
        save(gpt2().transformer)
        expected = adapt(gpt2(), "c_attn", "c_fc")
        note = "the keys of the adapter fit the base without 'transformer.'"
    else:
        save(gpt2())
        expected = gpt2()
        expected.transformer = adapt(gpt2().transformer, "c_attn", "c_fc")
        note = "the keys of the adapter fit the base with 'transformer.' in front"
    code, err = merge(capsys)
    assert code == 0 and note in err
    loaded = transformers.AutoModelForCausalLM.from_pretrained("merged")
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    exact = copy.deepcopy(expected).double()(IDS).logits
    assert_close(loaded(IDS).logits, expected(IDS).logits, exact)


def test_a_damaged_config_is_refused(capsys):
    save(llama())
    adapt(llama(), "q_proj")
    for text, message in (
        ("{", "config.json: not a readable JSON file"),
        ("[]", "config.json: expected a JSON object, got list"),
    ):
        Path("base/config.json").write_text(text)
        code, err = merge(capsys)
        assert code == 1 and message in err and not Path("merged").exists()
    Path("base/config.json").write_text('{"tie_word_embeddings": [], "vocab_size": {}}')
    assert merge(capsys) == (0, "")


def test_a_single_file_of_the_folder_is_merged_as_before(capsys):
    save(llama())
    expected = adapt(llama(), "q_proj").state_dict()
    assert merge(capsys, base="base/model.safetensors", out="m.safetensors") == (0, "")
    got = load_file("m.safetensors")
    assert all(torch.equal(got[key], expected[key]) for key in got)


def test_a_snapshot_of_links_is_never_a_target(capsys):
    """The layout of transformers' cache."""
    adapt(llama(), "q_proj")
    save(llama())
    blobs = Path("blobs")
    blobs.mkdir()
    snapshot = Path("snapshot")
    snapshot.mkdir()
    for file in list(Path("base").iterdir()):
        shutil.move(file, blobs / file.name)
        (snapshot / file.name).symlink_to(Path("..") / "blobs" / file.name)
    before = (snapshot / "model.safetensors").read_bytes()
    assert cli.main(["merge", "snapshot", "adapter.safetensors", "snapshot", "--force"]) == 1
    assert "is or holds the base's" in capsys.readouterr().err
    assert (snapshot / "model.safetensors").is_symlink()
    assert (snapshot / "model.safetensors").read_bytes() == before
