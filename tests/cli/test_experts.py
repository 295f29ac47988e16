"""The command line takes adapters of experts in fastlora's and PEFT's formats."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastlora import LoRAConfig, adapt, load_adapter, save_adapter, save_pretrained
from fastlora.cli.commands import main
from tests.support.experts import IDS, build
from tests.support.models import randomise_adapters
from tests.support.tolerance import assert_close

pytest.importorskip("transformers", minversion="5.0")
TARGETS = ["o_proj", "gate_up_proj", "experts.down_proj"]


def adapted(name, targets=TARGETS, dtype=torch.float32, **settings):
    model = build(name, dtype)
    adapt(model, LoRAConfig(targets, rank=3, alpha=6.0, **settings))
    randomise_adapters(model)
    return model


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Writes an adapter as own.safetensors and as the folder peft, and its base as base.safetensors."""
    monkeypatch.chdir(tmp_path)

    def write(name, targets=TARGETS):
        model = adapted(name, targets)
        save_adapter(model, "own.safetensors")
        save_pretrained(model, "peft")
        base = {key: value.clone() for key, value in build(name).state_dict().items()}
        save_file(base, "base.safetensors")
        return model

    return write


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_inspect_convert_and_diff(name, files, capsys):
    model = files(name)
    for path in ("own.safetensors", "peft"):
        assert main(["inspect", path]) == 0
        printed = capsys.readouterr().out
        assert "experts.down_proj" in printed and "4x3x48" in printed and "4x32x3" in printed
        layer = model.get_submodule("model.layers.0.mlp.experts.down_proj")
        assert f"{layer.delta(torch.float64).norm():.4g}" in printed  # |dW|
    assert main(["convert", "peft", "converted.safetensors", "--to", "fastlora"]) == 0
    assert main(["convert", "own.safetensors", "again", "--to", "peft"]) == 0
    assert main(["diff", "own.safetensors", "converted.safetensors"]) == 0
    ours, again = (load_file(f"{f}/adapter_model.safetensors") for f in ("peft", "again"))
    assert ours.keys() == again.keys()
    assert all(torch.equal(again[key], value) for key, value in ours.items())
    if name == "mixtral":  # the folder does not tell how gpt-oss stores its weights
        other = build(name)
        adapt(other, LoRAConfig(TARGETS, rank=3, alpha=6.0))
        load_adapter(other, "converted.safetensors")
        assert torch.equal(other(IDS).logits, model(IDS).logits)
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.experts.down_proj").lora_B[2] += 1
    save_adapter(model, "changed.safetensors")
    assert main(["diff", "own.safetensors", "changed.safetensors"]) == 1


@pytest.mark.parametrize("adapter", ["own.safetensors", "peft"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_merge_into_a_file_with_the_stacked_weights(name, adapter, files):
    targets = ["gate_up_proj", "experts.down_proj"]
    model = files(name, targets)
    assert main(["merge", "base.safetensors", adapter, "merged.safetensors"]) == 0
    merged = build(name)
    merged.load_state_dict(load_file("merged.safetensors"))
    wide = adapted(name, targets, torch.float64)
    assert_close(merged(IDS).logits, model(IDS).logits.detach(), wide(IDS).logits.detach())


def test_a_square_bank_of_a_folder_is_not_guessed(tmp_path, monkeypatch, capsys):
    import transformers

    monkeypatch.chdir(tmp_path)
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads))
    save_file({k: v.clone() for k, v in model.state_dict().items()}, "base.safetensors")
    adapt(model, LoRAConfig("experts.down_proj", rank=2))
    randomise_adapters(model)
    save_pretrained(model, "peft")
    save_adapter(model, "own.safetensors")
    assert main(["merge", "base.safetensors", "peft", "merged.safetensors"]) == 1
    assert "square weight is stored transposed is unknown" in capsys.readouterr().err
    assert not (tmp_path / "merged.safetensors").exists()
    assert main(["merge", "base.safetensors", "own.safetensors", "merged.safetensors"]) == 0
