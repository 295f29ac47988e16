"""`fastlora merge` of folders of several architectures: what AutoModel loads computes what PEFT's `merge_and_unload` does."""

import copy
import os
from pathlib import Path

import pytest
import torch

import fastlora
from fastlora.cli.commands import main
from tests.support.tolerance import assert_close, assert_differs

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")  # of PEFT, about Conv1D and tied weights
SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
DECODER = SMALL | {"num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0}
T5 = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
IDS = {"input_ids": torch.tensor([[1, 5, 2, 9]])}
# name -> (config, auto class, targets, inputs)
MODELS = {
    "llama": ("LlamaConfig", DECODER, "AutoModelForCausalLM", ["q_proj", "down_proj"], IDS),
    "qwen3": ("Qwen3Config", DECODER, "AutoModelForCausalLM", ["q_proj", "down_proj"], IDS),
    "gemma": ("GemmaConfig", DECODER, "AutoModelForCausalLM", ["q_proj", "down_proj"], IDS),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": 32, "n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2},
        *("AutoModelForCausalLM", ["c_attn", "c_fc"], IDS),
    ),
    "t5": (
        *("T5Config", T5 | {"decoder_start_token_id": 0}, "AutoModelForSeq2SeqLM", ["q", "wo"]),
        IDS | {"decoder_input_ids": torch.tensor([[0, 3]])},
    ),
    "bert": (
        *("BertConfig", SMALL | {"num_labels": 3}, "AutoModelForSequenceClassification"),
        *(["query", "dense"], IDS),
    ),
    "vit": (
        "ViTConfig",
        {k: v for k, v in SMALL.items() if k != "vocab_size"}
        | {"image_size": 8, "patch_size": 4, "num_labels": 3},
        *("AutoModelForImageClassification", ["q_proj"]),
        {"pixel_values": torch.linspace(-1, 1, 192).view(1, 3, 8, 8)},
    ),
}
HEADS = {"bert": "classifier", "vit": "classifier"}


def build(name):
    torch.manual_seed(0)
    config, settings, auto, *_ = MODELS[name]
    made = getattr(transformers, config)(**settings)
    return getattr(transformers, auto).from_config(made).eval()


def adapted(name, **options):
    config = peft.LoraConfig(
        r=2,
        lora_alpha=6,
        target_modules=MODELS[name][3],
        modules_to_save=[HEADS[name]] if name in HEADS else None,
        fan_in_fan_out=name == "gpt2",
        **options,
    )
    model = peft.get_peft_model(build(name), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return model.eval()


def logits(model, name):
    inputs = dict(MODELS[name][4])
    dtype = next(model.parameters()).dtype
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_auto_model_loads_what_peft_merges(name, shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = build(name)
    # transformers 5 renames the weights of a ViT as it loads them, and back as it saves them.
    size = "4KB" if shards else "1GB"
    base.save_pretrained("base", max_shard_size=size, save_original_format=name != "vit")
    assert (len(list(Path("base").glob("*.safetensors"))) > 1) == shards
    for extra in ("modeling_own.py", "chat_template.jinja", "tokenizer.model"):
        Path("base", extra).write_text(f"content of {extra}")
    options = {"use_dora": shards, "rank_pattern": {MODELS[name][3][0]: 3}}
    theirs = adapted(name, **options)
    theirs.save_pretrained("by_peft")
    ours = build(name)
    fastlora.from_pretrained(ours, "by_peft")
    fastlora.save_pretrained(ours, "by_fastlora")
    fastlora.save_adapter(ours, "adapter.safetensors")
    merged = copy.deepcopy(theirs).merge_and_unload()
    want = logits(merged, name)
    exact = logits(theirs.double().merge_and_unload(), name)
    assert_differs(want, logits(base, name))
    for adapter in ("by_peft", "by_fastlora", "adapter.safetensors"):
        assert main(["merge", "base", adapter, f"to_{adapter}"]) == 0
        assert sorted(os.listdir(f"to_{adapter}")) == sorted(os.listdir("base"))
        assert Path(f"to_{adapter}", "modeling_own.py").read_text() == "content of modeling_own.py"
        auto = getattr(transformers, MODELS[name][2])
        loaded, info = auto.from_pretrained(f"to_{adapter}", output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys"))
        assert_close(logits(loaded, name), want, exact, adapter)
        tied = base.get_output_embeddings()
        if tied is not None and tied.weight is base.get_input_embeddings().weight:
            assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def test_a_folder_with_names_that_transformers_changes_is_refused_by_name(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    build("vit").save_pretrained("base")
    adapted("vit").save_pretrained("by_peft")
    capsys.readouterr()
    assert main(["merge", "base", "by_peft", "merged"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and not Path("merged").exists()
    assert "no vit.layers.0.attention.q_proj.weight (nearest: " in err
