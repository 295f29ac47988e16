"""`AdapterState`: the state of a layer, old files, folding and merging."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import fastlora
from fastlora import LoRAConfig
from fastlora.cli.commands import main
from fastlora.config import KINDS
from fastlora.io.adapter_state import AdapterState, LayerState, adapter_state
from fastlora.io.safetensors_format import fastlora_bytes, read_adapter_file
from tests.support.models import Decoder, randomise_adapters
from tests.support.paths import ROOT
from tests.support.tolerance import assert_close

GOLDEN = ROOT / "tests" / "golden" / "adapter_v1"


class Net(nn.Module):
    """The model of the golden file."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1, groups=2)
        self.plain = nn.Linear(6, 5)
        self.dora = nn.Linear(5, 6)
        self.pissa = nn.Linear(6, 6)
        self.gpt = pytest.importorskip("transformers").pytorch_utils.Conv1D(4, 6)
        self.head = nn.Linear(4, 3)


VARIANTS = {
    "plain": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
}


def golden():
    """(base weights, merged weights, a model with adapters of the same settings)."""
    expected = load_file(GOLDEN / "expected.safetensors")
    base, merged = (
        {k.removeprefix(start): v for k, v in expected.items() if k.startswith(start)}
        for start in ("base.", "merged.")
    )
    model = Net()
    model.load_state_dict(base)

    def settings(path, _):
        chosen = LoRAConfig(rank=2, alpha=3.0, dropout=0.1, **VARIANTS.get(path, {}))
        return path != "head" and chosen

    fastlora.inject_lora(model, LoRAConfig(settings, kinds=KINDS))
    fastlora.freeze_base_params(model)
    model.head.requires_grad_(True)
    return base, merged, model


def assert_merged(got, want, model):
    """want: merged by the version that wrote the files."""
    wide = fastlora.merged_model(copy.deepcopy(model).double()).state_dict()
    assert got.keys() == want.keys()
    for key in want:
        assert_close(got[key], want[key], wide[key], key)


def test_a_file_of_the_first_version_loads_in_python():
    _, merged, model = golden()
    fastlora.load_adapter(model, GOLDEN / "adapter.safetensors")
    assert_merged(fastlora.merged_model(model).state_dict(), merged, model)


def test_a_file_of_the_first_version_merges_by_the_command(tmp_path):
    base, merged, model = golden()
    fastlora.load_adapter(model, GOLDEN / "adapter.safetensors")
    file, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    save_file(base, file)
    assert main(["merge", str(file), str(GOLDEN / "adapter.safetensors"), str(out)]) == 0
    assert_merged(load_file(out), merged, model)


def test_files_converted_by_the_first_version_are_read():
    state = read_adapter_file(GOLDEN / "converted.safetensors")
    assert [(p, s.rank, s.alpha) for p, s in state.layers.items()] == [("0", 2, 3.0), ("1", 1, 3.0)]
    assert {layer.kind for layer in state.layers.values()} == {
        "linear"
    }  # the file does not store it
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    config = LoRAConfig(["0", "1"], rank=2, alpha=3.0, rank_pattern={"1": 1})
    fastlora.inject_lora(model, config)
    fastlora.load_adapter(model, GOLDEN / "converted.safetensors")
    assert torch.equal(model[0].lora_A, state.layers["0"].lora_a)


def test_written_files_have_the_keys_and_settings_of_the_first_version(tmp_path):
    """So that an older fastlora loads it."""
    _, _, model = golden()
    fastlora.load_adapter(model, GOLDEN / "adapter.safetensors")
    fastlora.save_adapter(model, tmp_path / "new.safetensors")
    old, new = load_file(GOLDEN / "adapter.safetensors"), load_file(tmp_path / "new.safetensors")
    assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)
    metadata = []
    for file in (GOLDEN / "adapter.safetensors", tmp_path / "new.safetensors"):
        with safe_open(file, "pt") as opened:
            metadata.append(json.loads(opened.metadata()["fastlora"]))
    assert metadata[0]["version"] == metadata[1]["version"] == 1
    for path, settings in metadata[0]["layers"].items():
        assert settings.items() <= metadata[1]["layers"][path].items()
    new_settings = metadata[1]["layers"]["conv"]
    assert (new_settings["dilation"], new_settings["padding_mode"]) == ([1], "zeros")


def test_the_state_of_a_model_and_back():
    model = Decoder()
    fastlora.inject_lora(model, LoRAConfig(["to_qkv"], rank=4, alpha=6.0, use_rslora=True))
    randomise_adapters(model)
    fastlora.freeze_base_params(model)
    model.out_layer.requires_grad_(True)
    state = adapter_state(model, include_trainable=True)
    assert list(state.others) == ["out_layer.weight", "out_layer.bias"]
    layer, own = state.layers["blocks.0.attn.to_qkv"], model.blocks[0].attn.to_qkv
    assert (layer.kind, layer.rank, layer.alpha, layer.groups) == ("linear", 4, 6.0, 1)
    assert layer.scaling == own.scaling and layer.weight_shape == (48, 16)
    assert layer.lora_a.data_ptr() == own.lora_A.data_ptr() and not layer.lora_a.requires_grad
    assert state.tensors().keys() == fastlora.get_lora_state_dict(model, True).keys()
    assert adapter_state(Decoder()).layers == {}


def test_a_written_state_is_read_back(tmp_path):
    _, _, model = golden()
    state = adapter_state(model, include_trainable=True)
    file = Path(tmp_path / "a.safetensors")
    file.write_bytes(fastlora_bytes(state))
    read = read_adapter_file(file)
    assert read.format == "fastlora" and read.layers.keys() == state.layers.keys()
    for path, layer in state.layers.items():
        assert read.layers[path].settings() == json.loads(json.dumps(layer.settings()))
    got, want = read.tensors(), state.tensors()
    assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_fold_keeps_the_update_and_the_scaling(use_rslora):
    layer = fastlora.LoRALinear(nn.Linear(6, 5), 2, 3.0, use_rslora=use_rslora)
    with torch.no_grad():
        layer.lora_B.normal_()
        layer.initial_A, layer.initial_B = torch.randn(2, 6), torch.randn(5, 2)
    state = LayerState.of_layer(layer)
    folded = state.folded()
    assert (state.rank, folded.rank, folded.subtracts_init) == (2, 4, False)
    assert folded.scaling == pytest.approx(state.scaling)
    a, b, a0, b0 = (t.detach().double() for t in (*state.tensors.values(),))
    wanted = layer.alpha / (2**0.5 if use_rslora else 2) * (b @ a - b0 @ a0)
    update = folded.scaling * folded.lora_b.double() @ folded.lora_a.double()
    assert_close(update.float(), layer.delta(torch.float32), wanted)
    assert folded.folded() is folded
    both = AdapterState({"x": state}, {}).folded()
    assert both.tensors().keys() == {"x.lora_A", "x.lora_B"}


def test_a_merge_reports_what_rounding_lost():
    layer = fastlora.LoRALinear(nn.Linear(6, 5).to(torch.bfloat16), 2)
    nn.init.normal_(layer.lora_B, std=1e-4)
    state = LayerState.of_layer(layer)
    merged, lost = state.merge(layer.original_linear.weight.detach())
    assert torch.equal(merged, layer.merge_weights().weight)
    assert lost > 0.1
    nothing = torch.zeros_like(state.lora_b)
    still = LayerState("linear", {"lora_A": state.lora_a, "lora_B": nothing}, 1.0)
    assert still.merge(layer.original_linear.weight.detach())[1] == 0.0


def test_a_merge_draws_no_random_numbers():
    layer = fastlora.LoRALinear(nn.Linear(6, 5), 2)
    before = torch.get_rng_state()
    LayerState.of_layer(layer).merge(layer.original_linear.weight.detach())
    assert torch.equal(torch.get_rng_state(), before)


def test_unknown_alpha():
    state = LayerState("linear", {"lora_A": torch.ones(1, 2), "lora_B": torch.ones(2, 1)}, None)
    with pytest.raises(fastlora.CheckpointError, match="alpha: the file does not store it"):
        _ = state.scaling
    assert state.folded() is state
