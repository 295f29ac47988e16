"""The code of docs/migrate.md runs, section by section, and says the truth."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

import fastlora

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "migrate.md").read_text()
PREAMBLE, *SECTIONS = re.split(r"^## From ", PAGE, flags=re.M)
BY_NAME = {section.split("\n", 1)[0]: section for section in SECTIONS}

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def blocks(text):
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.M | re.S)


def run(section, tmp_path, monkeypatch):
    """The names that the section's blocks leave behind; skips if a package they import is not there."""
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
    assert list(BY_NAME) == ["PEFT", "Unsloth", "loralib"]
    assert [len(blocks(section)) for section in SECTIONS] == [5, 1, 2]


def test_from_peft(tmp_path, monkeypatch, capsys):
    names = run("PEFT", tmp_path, monkeypatch)
    said = capsys.readouterr().out
    assert "4 of 4 LoRA layers take the fused path (4 changed)" in said
    lines = [line for line in said.splitlines() if line.startswith("trainable params")]
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


def test_the_readmes_block_about_peft(tmp_path, monkeypatch, capsys):
    readme = (Path(__file__).resolve().parent.parent / "README.md").read_text()
    (code,) = blocks(readme[readme.index("## With PEFT") : readme.index("## Speed and memory")])
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"torch": torch, "fastlora": fastlora})
    assert "1 of 1 LoRA layers take the fused path" in capsys.readouterr().out
