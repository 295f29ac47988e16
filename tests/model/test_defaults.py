"""Default targets: the layers that rules choose on models of many architectures; `adapt`; docs/targets.md."""

import copy
import re

import pytest
import torch
from torch import nn

import fastlora
from fastlora import ConfigError, InjectionError, LoRAConfig
from fastlora.config import DEFAULT_TARGETS
from fastlora.model.defaults import MULTIHEAD, RULES
from tests.support.models import Decoder, MixtureOfTransformers
from tests.support.paths import ROOT
from tests.support.tolerance import assert_differs
from tests.test_docs import run


def names(prefix, children):
    return [f"{prefix}.{child}" for child in children.split()]


class Named(nn.Module):
    """A module with a linear layer of each name; a dot makes a list in between."""

    def __init__(self, children):
        super().__init__()
        for name in children.split():
            first, dot, _ = name.partition(".")
            layer = nn.Linear(4, 4)
            setattr(self, first, nn.ModuleList([layer, nn.Dropout(0.0)]) if dot else layer)


def selected(model, config=None):
    return sorted(row.path for row in fastlora.preview(model, config).where("selected"))


# The names of an attention's children -> those chosen, and the rule.
NAMINGS = [
    ("to_q to_k to_v to_out.0 ff", "to_q to_k to_v to_out.0", "to_q"),
    ("to_q to_kv to_out", "to_q to_kv to_out", "to_q"),
    ("to_qkv to_out gate", "to_qkv to_out", "to_q"),
    ("q_proj k_proj v_proj output_proj mlp", "q_proj k_proj v_proj output_proj", "q_proj"),
    (
        "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj o_proj gate_proj",
        "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj o_proj",
        "q_proj",
    ),
    ("qkv_proj o_proj up_proj", "qkv_proj o_proj", "qkv_proj"),
    ("query_key_value dense dense_h_to_4h", "query_key_value dense", "query_key_value"),
    ("c_attn c_proj q_attn c_fc", "c_attn c_proj q_attn", "c_attn"),
    ("Wqkv Wo Wi", "Wqkv Wo", "Wqkv"),
    ("qkv proj fc1", "qkv proj", "qkv"),
    ("query key value dense ffn", "query key value dense", "query"),
    ("query_proj key_proj value_proj", "query_proj key_proj value_proj", "query"),
    ("q_lin k_lin v_lin out_lin lin1", "q_lin k_lin v_lin out_lin", "q_lin"),
    ("q k v o wi", "q k v o", "q"),
    ("q kv proj sr", "q kv proj", "q"),
    ("wq wk wv wo w1", "wq wk wv wo", "wq"),
]


@pytest.mark.parametrize(("children", "chosen", "rule"), NAMINGS)
def test_a_rule_chooses_exactly_the_projections(children, chosen, rule):
    model = nn.ModuleDict({"attn": Named(children), "head": nn.Linear(4, 4)})
    table = fastlora.preview(model)
    rows = table.where("selected")
    assert sorted(row.path for row in rows) == sorted(names("attn", chosen))
    assert {row.reason for row in rows} == {f"default targets: rule {rule!r}"}
    assert table.counts == {rule: len(rows)} and not table.problems
    assert fastlora.inject_lora(model) == len(rows)
    assert sorted(p for p, _ in fastlora.named_lora_layers(model)) == sorted(names("attn", chosen))


def test_every_rule_is_tested():
    assert {rule for _, _, rule in NAMINGS} == {rule.name for rule in RULES}


@pytest.mark.parametrize(
    "children", ["q_proj", "to_q to_k", "c_proj", "query value", "proj o_proj"]
)
def test_a_rule_does_not_fire_on_a_part_of_its_names(children):
    assert selected(nn.ModuleDict({"attn": Named(children)})) == []


def test_the_dense_layer_beside_an_intermediate_one_is_no_attention():
    block = nn.ModuleDict({"attention": Named("query key value"), "output": Named("dense")})
    beside = copy.deepcopy(block)
    beside["intermediate"] = nn.Linear(4, 4)
    projections = names("attention", "query key value")
    assert selected(block) == sorted([*projections, "output.dense"])
    assert selected(beside) == sorted(projections)


def test_multihead_attention_gets_an_adapter_on_its_output():
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False
    )
    rows = fastlora.preview(model).where("selected")
    assert [row.path for row in rows] == [f"layers.{i}.self_attn.out_proj" for i in (0, 1)]
    assert all(row.reason.startswith(f"default targets: rule {MULTIHEAD.name!r}") for row in rows)


@pytest.mark.parametrize("make", [Decoder, MixtureOfTransformers])
def test_the_models_of_this_project_keep_their_targets(make):
    model = make()
    named = [name for name in DEFAULT_TARGETS if fastlora.preview(model, [name]).where("selected")]
    assert selected(model) == selected(model, named) != []


def test_a_rule_counts_adapted_layers():
    model = nn.ModuleDict({"attn": Named("q_proj v_proj")})
    fastlora.inject_lora(model, ["q_proj"])
    table = fastlora.explain(model, config=LoRAConfig())
    statuses = {row.path: row.status for row in table.rows}
    assert statuses == {"attn.q_proj": "adapted", "attn.v_proj": "selected"}


def test_several_rules_fire_on_one_model_and_other_fields_apply():
    model = nn.ModuleDict(
        {"text": Named("q_proj k_proj v_proj o_proj"), "vision": Named("qkv proj")}
    )
    table = fastlora.preview(model)
    assert table.counts == {"q_proj": 4, "qkv": 2}
    config = LoRAConfig(target_modules=None, exclude=["text.v_proj"], rank_pattern={"qkv": 3})
    ranks = {row.path: row.rank for row in fastlora.preview(model, config).where("selected")}
    expected = dict.fromkeys(names("text", "q_proj k_proj o_proj"), 4)
    assert ranks == expected | {"vision.qkv": 3, "vision.proj": 4}
    assert fastlora.estimate(model, 8, LoRAConfig()).total_bytes > 0
    assert LoRAConfig.from_dict(config.to_dict()) == config


def test_without_a_rule_it_raises_and_says_what_to_do():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    advice = r'no rule for default targets .*"all-linear" \(fastlora.preview\(model, "all-linear"\)'
    before = copy.deepcopy(model.state_dict())
    for call in (
        lambda: fastlora.inject_lora(model),
        lambda: fastlora.inject_lora(model, LoRAConfig()),
        lambda: fastlora.add_adapter(model, "a"),
        lambda: fastlora.estimate(model, 8, LoRAConfig()),
        lambda: fastlora.adapt(model),
    ):
        with pytest.raises(InjectionError, match=advice):
            call()
    (problem,) = fastlora.preview(model).problems
    assert re.search(advice, problem)
    assert model.state_dict().keys() == before.keys() and not fastlora.list_adapters(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_add_adapter_finds_the_defaults_under_another_adapter():
    model = nn.ModuleDict({"attn": Named("q_proj v_proj"), "mlp": Named("fc1")})
    fastlora.inject_lora(model, ["q_proj", "fc1"])
    assert fastlora.add_adapter(model, "b", activate=True) == 2
    assert [p for p, _ in fastlora.named_lora_layers(model)] == names("attn", "q_proj v_proj")


def test_adapt_returns_what_trains():
    model = nn.ModuleDict({"attn": Named("q_proj v_proj"), "head": nn.Linear(4, 2)})
    params = fastlora.adapt(model, r=2, modules_to_save=["head"])
    trained = {name for name, p in model.named_parameters() if any(p is q for q in params)}
    adapters = {f"attn.{n}.lora_{m}" for n in ("q_proj", "v_proj") for m in "AB"}
    assert trained == adapters | {"head.weight", "head.bias"}
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}
    assert model["attn"].q_proj.lora_A.shape == (2, 4)


def test_adapt_takes_targets_as_inject_lora_does():
    def adapted(*arguments, **fields):
        model = nn.ModuleDict({"attn": Named("q_proj v_proj"), "head": nn.Linear(4, 2)})
        fastlora.adapt(model, *arguments, **fields)
        return {path: layer.rank for path, layer in fastlora.named_lora_layers(model)}

    assert adapted("all-linear", rank=3) == {"attn.q_proj": 3, "attn.v_proj": 3, "head": 3}
    assert adapted(["q_"], r=2) == {"attn.q_proj": 2}
    assert adapted(["*.v_proj"], match="glob") == {"attn.v_proj": 4}
    assert adapted(lambda path, _: path == "head") == {"head": 4}
    assert adapted(LoRAConfig("all-linear", exclude=["attn"])) == {"head": 4}


@pytest.mark.parametrize(
    ("arguments", "fields", "error"),
    [
        ((LoRAConfig(),), {"rank": 2}, "rank: set them in the LoRAConfig only"),
        (
            (["q_porj"],),
            {},
            "target_modules: 'q_porj' matches none of the 3 linear .*nearest: q_proj",
        ),
        ((5,), {}, "target_modules: expected a list of patterns, got 5"),
        ((nn.Linear(1, 1),), {}, "target_modules: expected patterns, a callback or .* got Linear"),
        ((), {"rnk": 2}, "rnk: no such field"),
        ((), {"rank": 0}, "rank: expected an integer ≥ 1, got 0"),
        ((), {"modules_to_save": ["had"]}, "modules_to_save: 'had' is not a module"),
    ],
)
def test_adapt_changes_nothing_if_it_raises(arguments, fields, error):
    model = nn.ModuleDict({"attn": Named("q_proj v_proj"), "head": nn.Linear(4, 2)})
    with pytest.raises((ConfigError, InjectionError), match=error):
        fastlora.adapt(model, *arguments, **fields)
    assert not list(fastlora.named_lora_layers(model))
    assert all(parameter.requires_grad for parameter in model.parameters())


SELF = "q_proj k_proj v_proj o_proj"
OUT = "q_proj k_proj v_proj out_proj"
ARCHITECTURES = {
    "llama": {"self_attn": (SELF, 2)},
    "qwen": {"self_attn": (SELF, 2)},
    "gpt2": {"attn": ("c_attn c_proj", 2)},
    "bert": {"self": ("query key value", 2), "attention.output": ("dense", 2)},
    "clip": {"self_attn": (OUT, 4)},
    "whisper": {"self_attn": (OUT, 2), "encoder_attn": (OUT, 1)},
    "unet": {"attn1": ("to_q to_k to_v to_out.0", 4), "attn2": ("to_q to_k to_v to_out.0", 4)},
    "dit": {"attn1": ("to_q to_k to_v to_out.0", 2)},
    "timm_vit": {"attn": ("qkv proj", 2)},
    "neox": {"attention": ("query_key_value dense", 1)},
    "phi3": {"self_attn": ("qkv_proj o_proj", 1)},
    "t5": {"SelfAttention": ("q k v o", 2), "EncDecAttention": ("q k v o", 1)},
    "distilbert": {"attention": ("q_lin k_lin v_lin out_lin", 1)},
    "modernbert": {"attn": ("Wqkv Wo", 1)},
}
SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def build(name):
    """A model of the architecture, and its inputs."""
    transformers = pytest.importorskip("transformers")
    from tests.peft import test_architectures as others

    torch.manual_seed(0)
    inputs = {"input_ids": others.IDS}
    if name == "neox":
        return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SMALL)), inputs
    if name == "phi3":
        config = transformers.Phi3Config(**SMALL, num_key_value_heads=1)
        return transformers.Phi3ForCausalLM(config), inputs
    if name == "t5":
        sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1}
        config = transformers.T5Config(**sizes, num_heads=2)
        inputs |= {"decoder_input_ids": others.IDS}
        return transformers.T5ForConditionalGeneration(config), inputs
    if name == "distilbert":
        config = transformers.DistilBertConfig(
            vocab_size=32, dim=16, n_layers=1, n_heads=2, hidden_dim=32
        )
        return transformers.DistilBertForSequenceClassification(config), inputs
    if name == "modernbert":
        pytest.importorskip("transformers", minversion="5.13", reason="refuses its own defaults")
        config = transformers.ModernBertConfig(**SMALL, cls_token_id=1, sep_token_id=2)
        return transformers.ModernBertForMaskedLM(config), inputs
    return getattr(others, name)()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers and diffusers
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_trains_its_attention_projections_only(name):
    model, inputs = build(name)
    model.eval()
    parents = ARCHITECTURES[name]
    expected = sorted(
        f"{path}.{child}"
        for path, _ in model.named_modules()
        for suffix, (children, _) in parents.items()
        if f".{path}".endswith(f".{suffix}")
        for child in children.split()
    )
    assert selected(model) == expected
    assert len(expected) == sum(len(children.split()) * n for children, n in parents.values())
    params = fastlora.adapt(model, rank=2)
    assert len(params) == 2 * len(expected)

    def output():
        result = model(**inputs)
        return result if isinstance(result, torch.Tensor) else result[0]

    before = output()
    before.square().mean().backward()
    assert all(parameter.grad is not None for parameter in params)
    torch.optim.Adam(params, lr=0.3).step()  # a step of any gradient has the size lr
    assert_differs(output(), before)


def test_saved_folders_have_the_names(tmp_path):
    model = nn.ModuleDict({"attn": Named("q_proj v_proj"), "mlp": Named("fc1")})
    fastlora.adapt(model)
    fastlora.save_pretrained(model, tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    assert re.search(r'"target_modules": \[\s*"q_proj",\s*"v_proj"\s*\]', text)


def test_the_page_has_every_rule():
    page = (ROOT / "docs/targets.md").read_text()
    rows = re.findall(r"^\| `([\w.]+)` \| (.*) \| (.*) \| (.*) \|$", page, flags=re.M)
    for rule, (name, fires, chooses, found) in zip([*RULES, MULTIHEAD], rows, strict=True):
        alternatives = (" + ".join(f"`{n}`" for n in group) for group in rule.fires_on)
        beside = ", and `output.dense` beside the module" if rule.output_beside else ""
        assert name == rule.name and found == rule.found_in
        assert fires == (" or ".join(alternatives) or "(its class)")
        assert chooses == ", ".join(f"`{n}`" for n in rule.chooses) + beside


def test_the_code_on_the_page_runs(tmp_path, monkeypatch, capsys):
    found = run((ROOT / "docs/targets.md").read_text(), tmp_path, monkeypatch)
    assert "4 selected" in capsys.readouterr().out
    assert len(found["params"]) == 2 * 5 + 2
