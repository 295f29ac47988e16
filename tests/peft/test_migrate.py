"""The code of docs/migrate.md runs section by section with the stated results."""

import importlib.util
import json
import re

import pytest
import torch
import transformers
from safetensors.torch import save_file

import fastlora
from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "migrate.md").read_text()
PREAMBLE, *SECTIONS = re.split(r"^## From ", PAGE, flags=re.M)
BY_NAME = {section.split("\n", 1)[0]: section for section in SECTIONS}

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def blocks(text):
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.M | re.S)


def run(section, tmp_path, monkeypatch):
    """The variables of the section's blocks; skips if a package that they import is not installed."""
    code = blocks(PREAMBLE) + blocks(BY_NAME[section])
    for package in re.findall(r"^import (\w+)", "\n".join(code), flags=re.M):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in code:
        exec(compile(block, "docs/migrate.md", "exec"), names)
    return names


def test_the_page_has_these_sections():
    assert list(BY_NAME) == ["PEFT", "Unsloth", "loralib", "torchtune"]
    assert [len(blocks(section)) for section in SECTIONS] == [5, 1, 2, 1]


def test_from_peft(tmp_path, monkeypatch, capsys):
    names = run("PEFT", tmp_path, monkeypatch)
    printed = capsys.readouterr().out
    assert "4 of 4 LoRA layers use the fused path (4 changed)" in printed
    lines = [line for line in printed.splitlines() if line.startswith("trainable params")]
    assert len(lines) == 2 and lines[0] == lines[1]  # PEFT's line and ours
    assert fastlora.list_adapters(names["mine"]) == list(names["theirs"].peft_config)
    assert fastlora.list_adapters(names["plain"]) == ["default", "mixed"]
    assert fastlora.active_adapter(names["plain"]) == "mixed"
    assert torch.equal(names["reference"], names["base_model"]()(names["tokens"]).logits)
    tokens = names["tokens"]
    torch.testing.assert_close(names["merged"](tokens).logits, names["model"](tokens).logits)
    theirs = names["peft"].PeftModel.from_pretrained(names["base_model"](), "from_fastlora")
    mine = names["base_model"]()
    fastlora.from_pretrained(mine, "from_fastlora")
    torch.testing.assert_close(theirs(tokens).logits, mine(tokens).logits)


def test_from_unsloth(tmp_path, monkeypatch):
    names = run("Unsloth", tmp_path, monkeypatch)
    fresh = names["base_model"]()
    assert len(fastlora.from_pretrained(fresh, "like_unsloth").loaded) == 8


def test_from_loralib(tmp_path, monkeypatch):
    names = run("loralib", tmp_path, monkeypatch)
    torch.testing.assert_close(names["before"], names["after"])
    assert (tmp_path / "adapter.safetensors").is_file()


def test_from_torchtune(tmp_path, monkeypatch):
    """torchtune cannot be imported with the pinned torchao, so its files are written here in its layout."""
    down, up = torch.randn(4, 16), torch.randn(32, 4)
    torch.save({"0.lora_a.weight": down, "0.lora_b.weight": up}, tmp_path / "adapter_0.pt")
    base = torch.nn.Sequential(torch.nn.Linear(16, 32, bias=False), torch.nn.Linear(32, 2))
    torch.save(base.state_dict(), tmp_path / "base.pt")
    x = torch.ones(1, 16)
    hidden = base[0](x) + 8.0 / 4 * (x @ down.T) @ up.T  # torchtune.modules.peft.LoRALinear.forward
    torch.testing.assert_close(run("torchtune", tmp_path, monkeypatch)["after"], base[1](hidden))


def test_a_folder_from_torchtune(tmp_path):
    """Its config has these keys only, and its file no metadata."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    path = "base_model.model.model.layers.0.self_attn.q_proj"
    down, up = torch.randn(4, 32), torch.randn(32, 4)
    save_file(
        {f"{path}.lora_A.weight": down, f"{path}.lora_B.weight": up},
        tmp_path / "adapter_model.safetensors",
    )
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    fastlora.from_pretrained(model, tmp_path)
    (layer,) = (layer for _, layer in fastlora.named_lora_layers(model))
    assert layer.scaling == 2.0
    assert torch.equal(layer.lora_A, down) and torch.equal(layer.lora_B, up)


def test_the_readmes_block_about_peft(tmp_path, monkeypatch, capsys):
    readme = (ROOT / "README.md").read_text()
    (code,) = blocks(readme[readme.index("**You use PEFT") : readme.index("**You want to leave?")])
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"torch": torch, "fastlora": fastlora})
    assert "1 of 1 LoRA layers use the fused path" in capsys.readouterr().out
