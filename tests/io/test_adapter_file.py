"""State dicts and files: round trips, strict loading with suggestions, no partial changes."""

import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fastlora import (
    CheckpointError,
    ConfigError,
    FastLoRAWarning,
    LoRAConfig,
    get_lora_state_dict,
    inject_lora,
    load_adapter,
    load_lora_state_dict,
    merged_model,
    save_adapter,
    setup_lora_for_medical_finetuning,
)
from tests.support.models import Decoder, randomise_adapters
from tests.support.processes import TIME_LIMIT_S


def adapted(rank=4, alpha=8.0, seed=1, use_rslora=False):
    torch.manual_seed(7)
    model = Decoder()
    inject_lora(model, LoRAConfig(["to_"], rank=rank, alpha=alpha, use_rslora=use_rslora))
    randomise_adapters(model, seed)
    return model.eval()


def snapshot(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def unchanged(model, before):
    return all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_state_dict_has_the_adapters_and_on_request_the_heads():
    model = Decoder()
    setup_lora_for_medical_finetuning(model)
    keys = {
        f"blocks.{i}.attn.{n}.lora_{s}" for i in (0, 1) for n in ("to_qkv", "to_out") for s in "AB"
    }
    with pytest.warns(FastLoRAWarning, match="leaves out out_layer.weight, out_layer.bias, which"):
        state = get_lora_state_dict(model)
    assert set(state) == keys and not any(v.requires_grad for v in state.values())
    assert set(get_lora_state_dict(model, include_trainable=True)) == keys | {
        "out_layer.weight",
        "out_layer.bias",
    }
    assert get_lora_state_dict(Decoder()) == {}


def test_round_trip():
    source, target = adapted(), adapted(seed=2)
    x = torch.randn(3, 8)
    assert not torch.equal(source(x), target(x))
    result = load_lora_state_dict(target, get_lora_state_dict(source))
    assert torch.equal(source(x), target(x))
    assert len(result.loaded) == 8 and result.missing == [] and result.unexpected == []


def test_tensors_on_meta_are_neither_loaded_nor_loaded_into_nor_written(tmp_path):
    model, source = adapted(), adapted(seed=2)
    state, before = get_lora_state_dict(source), snapshot(model)
    key = "blocks.0.attn.to_qkv.lora_A"
    for strict in (True, False):
        with pytest.raises(CheckpointError, match=f"{key}: is on the meta device in the state"):
            load_lora_state_dict(model, {k: v.to("meta") for k, v in state.items()}, strict)
    assert unchanged(model, before)
    one = state | {key: state[key].to("meta")}
    with pytest.raises(CheckpointError, match="1 problems, nothing was changed"):
        load_lora_state_dict(model, one)
    assert unchanged(model, before)
    model.to("meta")
    with pytest.raises(CheckpointError, match=f"{key}: is on the meta device in the model"):
        load_lora_state_dict(model, state)
    with pytest.raises(CheckpointError, match=f"{key}: is on the meta device, so it has no value"):
        save_adapter(model, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_strict_names_every_problem_with_the_nearest_candidate_and_changes_nothing():
    model = adapted()
    state = get_lora_state_dict(adapted(seed=2))
    state["blocks.0.attn.to_qvk.lora_A"] = state.pop("blocks.0.attn.to_qkv.lora_A")
    state["blocks.1.attn.to_out.lora_B"] = torch.zeros(16, 9)
    before = snapshot(model)
    with pytest.raises(CheckpointError) as raised:
        load_lora_state_dict(model, state)
    text = str(raised.value)
    assert "3 problems, nothing was changed" in text
    assert "missing blocks.0.attn.to_qkv.lora_A (nearest: blocks.0.attn.to_qvk.lora_A)" in text
    assert "unexpected blocks.0.attn.to_qvk.lora_A (nearest: blocks.0.attn.to_qkv.lora_A)" in text
    assert "blocks.1.attn.to_out.lora_B: expected shape (16, 4), got (16, 9)" in text
    assert unchanged(model, before)


def test_not_strict_loads_what_fits_and_warns_but_never_loads_nothing():
    model, source = adapted(), adapted(seed=2)
    state = get_lora_state_dict(source)
    del state["blocks.0.attn.to_qkv.lora_B"]
    state["other"] = torch.zeros(1)
    with pytest.warns(
        UserWarning, match=r"loaded 7 tensors; problems:\n  missing blocks.0.attn.to_qkv.lora_B"
    ):
        result = load_lora_state_dict(model, state, strict=False)
    assert result.missing == ["blocks.0.attn.to_qkv.lora_B"] and result.unexpected == ["other"]
    assert torch.equal(model.blocks[1].attn.to_out.lora_B, source.blocks[1].attn.to_out.lora_B)
    renamed = {f"net.{k}": v for k, v in get_lora_state_dict(source).items()}
    before = snapshot(model)
    with pytest.raises(CheckpointError, match="unexpected net.blocks"):
        load_lora_state_dict(model, renamed, strict=False)
    for strict in (True, False):
        with pytest.raises(CheckpointError):
            load_lora_state_dict(model, {}, strict=strict)
    assert unchanged(model, before)


def test_other_refusals():
    with pytest.raises(CheckpointError, match="has no adapters"):
        load_lora_state_dict(Decoder(), {"x": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"lora_A: expected shape \(4, 16\), got int"):
        state = get_lora_state_dict(adapted()) | {"blocks.0.attn.to_qkv.lora_A": 1}
        load_lora_state_dict(adapted(), state)
    model = Decoder()
    setup_lora_for_medical_finetuning(model)
    state = get_lora_state_dict(model, include_trainable=True)
    adapters = {key: value for key, value in state.items() if "lora_" in key}
    with pytest.warns(FastLoRAWarning, match="does not hold out_layer.weight, out_layer.bias"):
        load_lora_state_dict(model, adapters)  # without heads it is complete
    del state["out_layer.bias"]
    with pytest.raises(CheckpointError, match="missing out_layer.bias"):
        load_lora_state_dict(model, state)


def test_file_round_trip_with_heads(tmp_path):
    model, twin = Decoder(), Decoder()
    for m in (model, twin):
        setup_lora_for_medical_finetuning(m, rank=2)
    randomise_adapters(model)
    twin.load_state_dict(model.state_dict() | get_lora_state_dict(twin, include_trainable=True))
    save_adapter(model, tmp_path / "adapter.safetensors")
    assert os.listdir(tmp_path) == ["adapter.safetensors"]
    load_adapter(twin, tmp_path / "adapter.safetensors")
    x = torch.randn(3, 8)
    assert torch.equal(model(x), twin(x))
    torch.save(get_lora_state_dict(model, include_trainable=True), tmp_path / "adapter.pt")
    assert len(load_adapter(twin, tmp_path / "adapter.pt").loaded) == 10


def test_equal_adapters_are_saved_as_equal_bytes(tmp_path):
    model = adapted()
    for number in range(8):
        save_adapter(model, tmp_path / f"{number}.safetensors")
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_rank_and_alpha_are_stored_in_the_file(tmp_path):
    file = tmp_path / "a.safetensors"
    save_adapter(adapted(alpha=16.0), file)
    model = adapted(alpha=8.0)
    before = snapshot(model)
    with pytest.raises(
        CheckpointError, match=r"blocks.0.attn.to_qkv: alpha is 16.0 in the file, 8.0 in the model"
    ):
        load_adapter(model, file)
    assert unchanged(model, before)
    with pytest.warns(UserWarning, match="alpha is 16.0 in the file"):
        load_adapter(model, file, strict=False)
    with pytest.raises(CheckpointError, match="rank is 4 in the file, 2 in the model"):
        load_adapter(adapted(rank=2, alpha=16.0), file)


def test_rslora_is_stored_in_the_file_and_checked(tmp_path):
    file = tmp_path / "a.safetensors"
    source = adapted(use_rslora=True)
    save_adapter(source, file)
    with pytest.raises(CheckpointError, match="use_rslora is True in the file, False in the model"):
        load_adapter(adapted(), file)
    twin = adapted(seed=2, use_rslora=True)
    load_adapter(twin, file)
    x = torch.randn(3, 8)
    assert torch.equal(twin(x), source(x)) and not torch.equal(adapted()(x), source(x))
    layers = {"blocks.0.attn.to_qkv": {"rank": 4, "alpha": 8.0}}  # a file older than rsLoRA
    metadata = {"fastlora": json.dumps({"version": 1, "layers": layers})}
    save_file(get_lora_state_dict(source), file, metadata)
    with pytest.raises(CheckpointError, match="use_rslora is False in the file, True in the model"):
        load_adapter(twin, file)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # torch, about the damaged file
def test_invalid_files_raise_one_clear_error(tmp_path):
    model = adapted()
    before = snapshot(model)
    save_adapter(model, tmp_path / "good.safetensors")
    data = (tmp_path / "good.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "noise.pt").write_bytes(b"\x80\x05not a pickle")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.pt")
    save_file(
        {k: v.contiguous() for k, v in get_lora_state_dict(model).items()},
        tmp_path / "meta.safetensors",
        {"fastlora": "[]"},
    )
    for name in (
        "cut.safetensors",
        "empty.safetensors",
        "noise.pt",
        "empty.pt",
        "list.pt",
        "meta.safetensors",
        "none.safetensors",
    ):
        with pytest.raises(CheckpointError, match=name):
            load_adapter(model, tmp_path / name)
    assert unchanged(model, before)


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("pwned",))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # torch, about the damaged file
def test_a_pickle_that_runs_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"a": Evil()}))
    torch.save({"a": Evil()}, tmp_path / "evil2.pt")
    for name in ("evil.pt", "evil2.pt"):
        with pytest.raises(CheckpointError, match="not a readable state dict"):
            load_adapter(adapted(), tmp_path / name)
    assert not (tmp_path / "pwned").exists()


def test_further_metadata_is_kept_beside_our_own(tmp_path):
    model = adapted()
    save_adapter(model, tmp_path / "a.safetensors", metadata={"note": "Größe", "b": "2"})
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        found = file.metadata()
    assert (found["note"], found["b"], found["format"]) == ("Größe", "2", "pt")
    assert load_adapter(adapted(), tmp_path / "a.safetensors").loaded
    before = (tmp_path / "a.safetensors").read_bytes()
    for wrong in ({"fastlora": "{}"}, {"format": "np"}, {"n": 1}, {1: "n"}):
        with pytest.raises(ConfigError, match="metadata: expected"):
            save_adapter(model, tmp_path / "a.safetensors", metadata=wrong)
    assert (tmp_path / "a.safetensors").read_bytes() == before


def test_saving_without_adapters_or_to_a_missing_folder_leaves_nothing(tmp_path):
    with pytest.raises(CheckpointError, match="has no adapters"):
        save_adapter(Decoder(), tmp_path / "a.safetensors")
    old = tmp_path / "b.safetensors"
    save_adapter(adapted(), old)
    before = old.read_bytes()
    with pytest.raises(CheckpointError, match="cannot write"):
        save_adapter(adapted(), tmp_path / "missing" / "a.safetensors")
    assert os.listdir(tmp_path) == ["b.safetensors"] and old.read_bytes() == before


def test_train_save_then_load_in_a_new_process_and_infer_merged(tmp_path):
    torch.manual_seed(3)
    model = Decoder()
    base = {k: v.clone() for k, v in model.state_dict().items()}
    setup_lora_for_medical_finetuning(model, rank=2, include_ffn=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    x, target = torch.randn(8, 8), torch.randn(8, 5)
    first = None
    for _ in range(30):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        first = first or loss.item()
    assert loss.item() < 0.7 * first
    torch.save({"base": base, "x": x}, tmp_path / "inputs.pt")
    save_adapter(model, tmp_path / "adapter.safetensors")
    program = """
import sys, torch
from fastlora import load_adapter, merged_model, setup_lora_for_medical_finetuning
from tests.support.models import Decoder
inputs = torch.load(sys.argv[1] + "/inputs.pt", weights_only=True)
model = Decoder()
model.load_state_dict(inputs["base"])
setup_lora_for_medical_finetuning(model, rank=2, include_ffn=True)
load_adapter(model, sys.argv[1] + "/adapter.safetensors")
torch.save(merged_model(model.eval())(inputs["x"]).detach(), sys.argv[1] + "/out.pt")
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, timeout=TIME_LIMIT_S)
    out = torch.load(tmp_path / "out.pt", weights_only=True)
    torch.testing.assert_close(out, model.eval()(x).detach())
    torch.testing.assert_close(out, merged_model(model)(x).detach())
