"""Adapters of experts are exchanged with PEFT, which stores them as `target_parameters`."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from fastlora import (
    CheckpointError,
    ConfigError,
    InjectionError,
    LoRAConfig,
    adapt,
    from_pretrained,
    get_lora_params,
    named_lora_layers,
    save_pretrained,
)
from fastlora.layers.experts import LoRAExperts
from tests.support.experts import IDS, MODELS, build
from tests.support.models import randomise_adapters
from tests.support.tolerance import assert_close, assert_differs
from tests.support.versions import installed

pytest.importorskip("transformers", minversion="5.0")
pytestmark = [
    pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*`:FutureWarning"),
    # PEFT looks for the keys among modules only, and applies them to parameters too.
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match"),
]
# Older versions replace a method of PEFT in the whole process, which then exchanges the dimensions of every bank.
patched = pytest.mark.skipif(
    installed("transformers") < (5, 13), reason="transformers before 5.13 changes PEFT"
)
every = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[patched] * (name == "gpt_oss")) for name in MODELS]
)
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


def trained(model):
    """The model after three steps, in which no adapter stays as it was."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    return model.eval()


def exact(name, folder):
    """The logits in float64 of the model with the adapter of a folder."""
    model = build(name, torch.float64)
    from_pretrained(model, folder)
    return model(IDS).logits.detach()


@every
def test_what_fastlora_trains_peft_loads(name, tmp_path):
    model = build(name)
    plain = model(IDS).logits.detach()
    adapt(model, LoRAConfig(["o_proj", "gate_up_proj", "experts.down_proj"], rank=3, alpha=5.0))
    randomise_adapters(model)
    before = [p.detach().clone() for p in get_lora_params(model)]
    trained(model)
    assert all(not torch.equal(p, q) for p, q in zip(get_lora_params(model), before, strict=True))
    want = model(IDS).logits.detach()
    save_pretrained(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_parameters"] == sorted(BOTH)
    assert config["target_modules"] == ["o_proj"]
    theirs = peft.PeftModel.from_pretrained(build(name), tmp_path).eval()
    assert_close(theirs(IDS).logits.detach(), want, exact(name, tmp_path))
    assert_differs(want, plain)
    mine = build(name)
    from_pretrained(mine, tmp_path)
    assert torch.equal(mine(IDS).logits, want)


@every
@pytest.mark.parametrize("parameters", [BOTH, BOTH[:1], BOTH[1:]], ids=["both", "first", "last"])
def test_what_peft_trains_fastlora_loads(name, parameters, tmp_path):
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["o_proj"],
        target_parameters=parameters,
        rank_pattern={"layers.1.*down_proj": 2, "experts.gate_up_proj": 4},
    )
    torch.manual_seed(0)
    theirs = peft.get_peft_model(build(name), config)
    trained(theirs)
    want = theirs(IDS).logits.detach()
    theirs.save_pretrained(tmp_path)
    model = build(name)
    plain = model(IDS).logits.detach()
    loaded = from_pretrained(model, tmp_path)
    assert sorted(loaded.loaded) == sorted(load_file(tmp_path / "adapter_model.safetensors"))
    assert_close(model(IDS).logits.detach(), want, exact(name, tmp_path))
    assert_differs(want, plain)
    banks = [p for p, layer in named_lora_layers(model) if isinstance(layer, LoRAExperts)]
    assert len(banks) == 2 * len(parameters)
    save_pretrained(model, tmp_path / "again")
    ours, again = (
        load_file(f / "adapter_model.safetensors") for f in (tmp_path, tmp_path / "again")
    )
    assert ours.keys() == again.keys()
    assert all(torch.equal(again[key], value) for key, value in ours.items())


def test_a_lora_config_selects_the_banks_that_peft_adapts():
    settings = {"r": 3, "lora_alpha": 5, "rank_pattern": {"layers.1.*down_proj": 2}}
    for modules, parameters in ((["o_proj"], BOTH), ([], ["down_proj"])):
        config = peft.LoraConfig(target_modules=modules, target_parameters=parameters, **settings)
        model = build("mixtral")
        adapt(model, config)
        theirs = peft.get_peft_model(build("mixtral"), config)
        trained = {n: p.numel() for n, p in theirs.named_parameters() if p.requires_grad}
        layers = dict(named_lora_layers(model))
        assert sum(trained.values()) == sum(p.numel() for p in get_lora_params(model))
        assert layers["model.layers.1.mlp.experts.down_proj"].rank == 2
        assert layers["model.layers.0.mlp.experts.down_proj"].rank == 3
        assert len(layers) == 2 * (len(modules) + len(parameters))
    other = peft.LoraConfig(target_modules=["o_proj"], target_parameters=["gate.weight"])
    with pytest.raises(InjectionError, match=r"mlp.gate.weight: is no bank of experts"):
        adapt(build("mixtral"), other)
    dropped = peft.LoraConfig(target_modules=[], target_parameters=BOTH, lora_dropout=0.1)
    with pytest.raises(ConfigError, match="PEFT allows neither lora_dropout nor use_dora"):
        adapt(build("mixtral"), dropped)
    missing = peft.LoraConfig(target_modules=[], target_parameters=["experts.up_proj"])
    with pytest.raises(InjectionError, match="selects no layer"):
        adapt(build("mixtral"), missing)


def test_a_file_from_before_peft_knew_the_order_of_dimensions(tmp_path):
    """PEFT took every weight for (G, K, N) then, and made W + ΔW by another product."""
    model = build("mixtral")
    adapt(model, LoRAConfig(["gate_up_proj"], rank=3, alpha=6.0))
    randomise_adapters(model)
    save_pretrained(model, tmp_path)
    tensors, old = load_file(tmp_path / "adapter_model.safetensors"), {}
    for key, a in tensors.items():
        if "lora_A" in key:
            key_b = key.replace("lora_A", "lora_B")
            b = tensors[key_b]
            a3, b3 = a.view(4, 3, 32), b.view(96, 3, 4).permute(2, 0, 1)  # [G, R, K], [G, N, R]
            old[key] = b3.mT.reshape(12, 96)  # their A has N columns
            old[key_b] = a3.permute(2, 1, 0).reshape(32, 12)
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "adapter_config.json").write_text((tmp_path / "adapter_config.json").read_text())
    save_file(old, folder / "adapter_model.safetensors", {"format": "pt"})
    other = build("mixtral")
    from_pretrained(other, folder)
    assert torch.equal(other(IDS).logits, model(IDS).logits)


def test_what_cannot_be_stored_or_read_is_named(tmp_path):
    model = build("mixtral")
    adapt(model, LoRAConfig("down_proj", rank=2, use_dora=True))
    with pytest.raises(CheckpointError, match="for which PEFT has no DoRA"):
        save_pretrained(model, tmp_path / "d")
    assert not (tmp_path / "d").exists()
    model = build("mixtral")
    adapt(model, LoRAConfig("down_proj", rank=2, dropout=0.1))
    with pytest.warns(UserWarning, match="PEFT allows none with experts; 0 is written"):
        save_pretrained(model, tmp_path / "p")
    assert peft.PeftConfig.from_pretrained(tmp_path / "p").lora_dropout == 0
    file = tmp_path / "p" / "adapter_config.json"
    good = json.loads(file.read_text())
    cases = {
        "gate.weight is no bank of experts": {
            "target_parameters": ["experts.down_proj", "gate.weight"]
        },
        "matches no layer": {"target_parameters": ["experts.nothing_proj"]},
        "PEFT allows neither lora_dropout nor use_dora": {"lora_dropout": 0.5},
    }
    for message, change in cases.items():
        file.write_text(json.dumps(good | change))
        plain = build("mixtral")
        with pytest.raises(CheckpointError, match=message):
            from_pretrained(plain, tmp_path / "p")
        assert list(plain.state_dict()) == list(build("mixtral").state_dict())
