"""The code of docs/export.md, docs/integrations.md, docs/peft_folders.md, docs/several_adapters.md and docs/variants.md runs; files, names and tests that a page mentions exist."""

import importlib.util
import pkgutil
import re

import pytest
import torch

import fastlora
from tests.support.paths import ROOT
from tests.support.tolerance import assert_close

DOCS = ROOT / "docs"


def run(code, folder, monkeypatch, names=None):
    """Run the Python blocks of `code` in `folder` and return their variables; skips if a package they import is missing."""
    blocks = re.findall(r"^```python\n(.*?)^```$", code, flags=re.M | re.S)
    assert blocks
    for package in re.findall(r"^(?:import|from) (\w+)", "\n".join(blocks), flags=re.M):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    monkeypatch.chdir(folder)
    names = {} if names is None else names
    for block in blocks:
        exec(compile(block, "docs", "exec"), names)
    return names


def sections(page):
    """The text of a page by heading; the text before the first heading is under ''."""
    text = (DOCS / page).read_text()
    first, *rest = re.split(r"^## ", text, flags=re.M)
    return {"": first} | dict(section.split("\n", 1) for section in rest)


PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
PATH = re.compile(r"\b(?:fastlora|kernels|tests|scripts|benchmarks|docs)/[\w./-]*\w")
# File names with a placeholder, and the files of PEFT's own tests.
OTHERS = re.compile(r"benchmarks/results/[\w-]*(<gpu>|seedN)|cd peft-(.|\n)*?\n\n")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_mentioned_on_a_page_exists(page):
    text = OTHERS.sub("", page.read_text())
    paths = [path.replace("fastlora/kernels", "kernels") for path in PATH.findall(text)]  # a link
    assert not [path for path in paths if not (ROOT / path).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_name_of_fastlora_on_a_page_exists(page):
    for name in set(re.findall(r"(?<![\w./-])fastlora(?:\.[A-Za-z_]\w*)+", page.read_text())):
        pkgutil.resolve_name(name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_mentioned_on_a_page_exists(page):
    sources = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    named = set(re.findall(r"\btest_\w+\b(?!\.py|/)", page.read_text()))
    assert not [name for name in named if f"def {name}(" not in sources]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it exports
@pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning")
def test_export(tmp_path, monkeypatch):
    page = sections("export.md")
    names = run(page[""], tmp_path, monkeypatch)
    names = run(page["torch.export"], tmp_path, monkeypatch, names)
    expected = names["model"](names["x"]).detach()
    torch.testing.assert_close(names["y"], expected)
    names = run(page["Merged or not"], tmp_path, monkeypatch, names)
    names = run(page["TorchScript"], tmp_path, monkeypatch, names)
    torch.testing.assert_close(names["from_script"], expected)
    names = run(page["ONNX"], tmp_path, monkeypatch, names)
    torch.testing.assert_close(torch.from_numpy(names["from_onnx"]), expected)


@pytest.mark.filterwarnings("ignore")  # torchao's, if it is installed
def test_variants(tmp_path, monkeypatch, capsys):
    run((DOCS / "variants.md").read_text(), tmp_path, monkeypatch)
    printed = capsys.readouterr().out
    assert "3 selected" in printed
    assert "all 3 adapters change the output and get a gradient" in printed
    assert "use_dora=True" in printed and "16, 16, r=8" in printed
    assert "['proj.lora_A', 'proj.lora_B', 'proj.original_linear.bias', 'head.weight'" in printed
    if importlib.util.find_spec("torchao"):
        assert "the weight is dequantised by torchao for each pass" in printed


def test_several_adapters(tmp_path, monkeypatch):
    names = run((DOCS / "several_adapters.md").read_text(), tmp_path, monkeypatch)
    both, german, legal, base = (names[name] for name in ("both", "german", "legal", "base"))
    hidden = torch.relu(layer_of(names["model"], "german")(names["x"]))
    exact = hidden @ names["weight"].T + names["model"][2].bias
    assert_close(both, exact, exact.double())
    assert not any(torch.allclose(one, base) for one in (german, legal, both))
    assert names["names"][:2] == ["0.lora_A", "0.lora_B"]
    assert names["names"][2:4] == ["2.adapter_german.lora_A", "2.adapter_german.lora_B"]
    assert (tmp_path / "german.safetensors").exists()
    assert str(names["report"]).startswith("2 of 2 LoRA layers use the fused path")


def layer_of(model, adapter):
    """The first layer with this adapter."""
    with fastlora.use_adapter(model, adapter):
        return model[0]


@pytest.mark.filterwarnings("ignore")  # PEFT's and transformers' own
def test_pefts_folders(tmp_path, monkeypatch):
    names = run((DOCS / "peft_folders.md").read_text(), tmp_path, monkeypatch)
    for found in (
        names["in_peft"],
        names["in_transformers"],
        logits(names["plain"], names["tokens"]),
    ):
        assert torch.equal(found, names["ours"])
    fresh = names["LlamaForCausalLM"].from_pretrained("base").eval()
    assert not torch.equal(logits(fresh, names["tokens"]), names["ours"])


INTEGRATIONS = sections("integrations.md")


def train(section, folder, monkeypatch):
    """Run a section of docs/integrations.md, check that it trained only the adapters of `model`, and return its variables."""
    names = run(INTEGRATIONS[""], folder, monkeypatch)
    untrained = names["make_model"]().state_dict()
    run(INTEGRATIONS[section], folder, monkeypatch, names)
    trained = names["model"].state_dict()
    assert trained.keys() == untrained.keys()
    changed = {key for key in trained if not torch.equal(trained[key].cpu(), untrained[key])}
    assert changed == fastlora.get_lora_state_dict(names["model"]).keys() and len(changed) == 8
    return names


def logits(model, tokens):
    return model.cpu().eval()(input_ids=tokens).logits


def test_every_integration_is_tested():
    tested = [
        "",
        "TRL",
        "Hugging Face Trainer",
        "Hugging Face Accelerate",
        "DPO without TRL",
        "Lightning",
        "timm",
        "diffusers",
    ]
    assert list(INTEGRATIONS) == tested


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of trl, datasets and transformers
def test_trl(tmp_path, monkeypatch, capsys):
    peft = pytest.importorskip("peft")
    names = run(INTEGRATIONS[""], tmp_path, monkeypatch)
    run(INTEGRATIONS["TRL"], tmp_path, monkeypatch, names)
    assert "4 of 4 LoRA layers use the fused path" in capsys.readouterr().out
    tokens, base = names["tokens"], names["base_model"]().eval()
    for kind in ("sft", "dpo"):
        trainer = names[kind]
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert len(losses) == 3 and losses[-1] < losses[0]
        plain = names["base_model"]()
        fastlora.from_pretrained(plain, f"{kind}_adapter")
        # The trainer wraps forward in autocast.
        model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        trained = logits(model, tokens)
        assert_close(logits(plain, tokens), trained, logits(plain.double(), tokens))
        assert not torch.equal(trained, logits(base, tokens))
        fresh = peft.PeftModel.from_pretrained(names["base_model"](), f"{kind}_adapter")
        fastlora.accelerate(fresh)
        assert torch.equal(logits(fresh, tokens), trained)


def test_timm(tmp_path, monkeypatch):
    try:
        import timm
    except (
        ImportError,
        RuntimeError,
    ) as error:  # torchvision's file of PyPI is for CUDA: it fails beside a CPU build of torch
        pytest.skip(f"timm cannot be imported: {error}")
    names = run(INTEGRATIONS[""], tmp_path, monkeypatch)
    run(INTEGRATIONS["timm"], tmp_path, monkeypatch, names)
    model, losses = names["model"], names["losses"]
    assert losses[-1] < losses[0]
    assert len(dict(fastlora.named_lora_layers(model))) == 4
    torch.manual_seed(0)
    fresh = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=3
    )
    fresh.load_state_dict(fastlora.base_state_dict(model))
    fastlora.adapt(fresh, rank=4, modules_to_save=["head"])
    fastlora.load_adapter(fresh, "vit.safetensors")
    images = names["images"]
    assert torch.equal(fresh.eval()(images), model.eval()(images))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of diffusers
def test_diffusers(tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    names = run(INTEGRATIONS[""], tmp_path, monkeypatch)
    run(INTEGRATIONS["diffusers"], tmp_path, monkeypatch, names)
    model, losses = names["model"].eval(), names["losses"]
    assert losses[-1] < losses[0]
    fresh = type(model).from_config(model.config)
    fresh.load_state_dict(fastlora.base_state_dict(model))
    inputs = names["noisy"], 10, names["prompt"]
    with torch.no_grad():
        trained, base = model(*inputs).sample, fresh.eval()(*inputs).sample
        target = "pytorch_lora_weights.safetensors"
        fresh.load_lora_adapter(target, prefix=None, use_safetensors=True)
        torch.testing.assert_close(fresh(*inputs).sample, trained)
        assert not torch.equal(base, trained)


@pytest.mark.filterwarnings("ignore")  # of transformers and torch under the trainer
def test_the_hugging_face_trainer(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    names = train("Hugging Face Trainer", tmp_path, monkeypatch)
    model, tokens = names["model"], names["tokens"]
    plain = names["make_model"]()
    base = LlamaForCausalLM(plain.config)
    fastlora.merge_lora_weights(plain)  # untrained adapters have no effect
    base.load_state_dict(plain.state_dict())
    fastlora.from_pretrained(base, "adapter")
    assert torch.equal(logits(base, tokens), logits(model, tokens))
    assert names["trainer"].state.global_step == 3
    torch.testing.assert_close(logits(names["resumed"], tokens), logits(model, tokens))
    assert not (tmp_path / "run" / "checkpoint-2" / "config.json").exists()
    whole = AutoModelForCausalLM.from_pretrained("whole")
    assert torch.equal(logits(whole, tokens), logits(names["resumed"], tokens))


def reload_adapter(names):
    """Check that adapter.safetensors gives a new model the same output."""
    fresh = names["make_model"]()
    fastlora.load_adapter(fresh, "adapter.safetensors")
    assert torch.equal(logits(fresh, names["tokens"]), logits(names["model"], names["tokens"]))


@pytest.mark.filterwarnings("ignore")
def test_accelerate(tmp_path, monkeypatch):
    # TRL's trainer leaves its mixed precision in the process.
    pytest.importorskip("accelerate").state.AcceleratorState._reset_state(reset_partial_state=True)
    reload_adapter(train("Hugging Face Accelerate", tmp_path, monkeypatch))


def test_dpo(tmp_path, monkeypatch):
    names = train("DPO without TRL", tmp_path, monkeypatch)
    assert names["losses"][-1] < names["losses"][0]
    base = names["log_probability"](names["chosen"])
    with fastlora.disable_adapter(names["model"]):
        assert not torch.equal(names["log_probability"](names["chosen"]), base)
    reload_adapter(names)


@pytest.mark.filterwarnings("ignore")
def test_lightning(tmp_path, monkeypatch):
    names = train("Lightning", tmp_path, monkeypatch)
    reload_adapter(names)
    again = names["Module"].load_from_checkpoint("whole.ckpt")
    assert torch.equal(
        logits(again.model, names["tokens"]), logits(names["model"], names["tokens"])
    )
