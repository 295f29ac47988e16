"""`inject_lora` and the reports under a `peft.LoraConfig`: PEFT's layers, settings and initial values, or one error naming every field."""

import pytest
import torch
from torch import nn

import fastlora
from fastlora import (
    ConfigError,
    FastLoRAWarning,
    InjectionError,
    add_adapter,
    freeze_base_params,
    inject_lora,
    named_lora_layers,
    preview,
)
from tests.support.models import Decoder

peft = pytest.importorskip("peft")


def base(make=Decoder):
    torch.manual_seed(7)
    return make().eval()


def pefts_layers(model):
    """path → (rank, scaling, dropout, DoRA) of the layers of a PEFT model."""
    return {
        path: (
            layer.r["default"],
            layer.scaling["default"],
            getattr(layer.lora_dropout["default"], "p", 0.0),
            layer.use_dora["default"],
        )
        for path, layer in model.base_model.model.named_modules()
        if hasattr(layer, "lora_dropout")
    }


def our_layers(model):
    return {
        path: (layer.rank, layer.scaling, layer.dropout, layer.lora_magnitude is not None)
        for path, layer in named_lora_layers(model)
    }


OPTIONS = [
    {"target_modules": ["to_qkv", "blocks.0.mlp.mlp.0"]},
    {"target_modules": r".*\.(to_out|mlp\.2)"},
    {"target_modules": "all-linear"},
    {"target_modules": "All-Linear", "exclude_modules": ["out_layer"]},
    {"target_modules": ["to_qkv", "to_out"], "exclude_modules": r"blocks\.0.*qkv"},
    {"target_modules": ["to_qkv"], "layers_to_transform": [1], "layers_pattern": ["x", "blocks"]},
    {"target_modules": ["to_qkv"], "layers_to_transform": 0, "layers_pattern": "blocks"},
    {"target_modules": ["to_qkv", "to_out"], "rank_pattern": {"to_qkv": 2, "1.attn.to_out": 3}},
    {"target_modules": ["to_out"], "alpha_pattern": {"^blocks.0.attn.to_out": 32}},
    {"target_modules": ["to_out"], "use_rslora": True, "lora_alpha": 3, "lora_dropout": 0.25},
    {"target_modules": ["to_qkv", "to_out"], "use_dora": True},
    {"target_modules": ["to_qkv", "out_layer"], "modules_to_save": ["out_layer"]},
    {"target_modules": ["to_qkv"], "bias": "all"},
    {"target_modules": ["to_qkv"], "bias": "lora_only", "fan_in_fan_out": True},
]


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_layers_and_what_trains_are_pefts(options):
    theirs = peft.get_peft_model(base(), peft.LoraConfig(**{"r": 4, **options}))
    mine = base()
    count = inject_lora(mine, peft.LoraConfig(**{"r": 4, **options}))
    assert our_layers(mine) == pefts_layers(theirs) and count > 0
    freeze_base_params(mine)

    def trained(model):
        parts = {"base_model.model.": "", "base_layer.": "", ".modules_to_save.default": ""}
        parts |= {"original_linear.": "", "original_layer.": ""}
        found = set()
        for name, parameter in model.named_parameters():
            for part in parts:
                name = name.replace(part, "")
            if parameter.requires_grad and "lora_" not in name:
                found.add(name)
        return found

    assert trained(mine) == trained(theirs)
    table = preview(base(), peft.LoraConfig(**{"r": 4, **options}))
    assert str(table).count("the LoraConfig selected it") == count


@pytest.mark.parametrize("value", [True, "gaussian", "GAUSSIAN", "orthogonal", "pissa", "olora"])
def test_the_initial_values_are_pefts(value):
    """Equal where nothing is drawn, else of the same spread."""

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(512, 512)

    config = {"target_modules": ["proj"], "init_lora_weights": value, "r": 8}
    theirs = peft.get_peft_model(base(Wide), peft.LoraConfig(**config)).base_model.model.proj
    mine = base(Wide)
    inject_lora(mine, peft.LoraConfig(**config))
    a, b = mine.proj.lora_A.detach(), mine.proj.lora_B.detach()
    their_a, their_b = (getattr(theirs, f"lora_{n}")["default"].weight.detach() for n in "AB")
    if value in ("pissa", "olora"):
        torch.testing.assert_close(b @ a, their_b @ their_a)
        return
    assert (b == 0).all() == (their_b == 0).all()
    for own, other in ((a, their_a), (b, their_b)):
        assert float(own.std()) == pytest.approx(float(other.std()), rel=0.1)
        assert float(own.abs().max()) == pytest.approx(float(other.abs().max()), rel=0.35)


def test_one_error_names_every_field_that_is_not_supported():
    config = peft.LoraConfig(
        target_modules=["to_qkv"],
        lora_bias=True,
        init_lora_weights=False,
        layer_replication=[[0, 1]],
        trainable_token_indices=[3],
        inference_mode=True,
    )
    model = base()
    for call in (inject_lora, preview, lambda m, c: add_adapter(m, "a", c)):
        with pytest.raises(ConfigError) as raised:
            call(model, config)
        assert str(raised.value) == (
            "target_modules: the LoraConfig has values that fastlora does not support: inference_mode=True, "
            "init_lora_weights=False, layer_replication=[[0, 1]], lora_bias=True, trainable_token_indices=[3]"
        )
    with pytest.raises(ConfigError, match="does not support: inference_mode=True"):
        fastlora.estimate(model, 8, config)
    assert not list(named_lora_layers(model))


def test_what_is_no_lora_config_or_has_no_targets_is_refused():
    cases = [
        (peft.LoHaConfig(target_modules=["to_qkv"]), "got a LoHaConfig .peft_type LOHA"),
        (peft.AdaLoraConfig(target_modules=["q"], total_step=5), "got a AdaLoraConfig .peft_type"),
        (peft.LoraConfig(), "the LoraConfig names no targets"),
        (peft.LoraConfig(target_modules="("), "the LoraConfig is invalid: '.' is not a valid reg"),
        (peft.LoraConfig(target_modules=["to_qkv"], r=4, rank_pattern={"x": 0}), "rank: expected"),
    ]
    for config, message in cases:
        with pytest.raises(ConfigError, match=message):
            inject_lora(base(), config)
    with pytest.raises(ConfigError, match="rank, alpha, dropout: set them in the LoraConfig only"):
        inject_lora(base(), peft.LoraConfig(target_modules=["to_qkv"]), rank=8)
    with pytest.raises(ConfigError, match="model: expected an nn.Module, got str"):
        inject_lora("model", peft.LoraConfig(target_modules=["to_qkv"]))


def test_names_that_match_nothing_or_no_layer():
    model = base()
    with pytest.raises(InjectionError, match=r"selects no layer .nearest: to_qkv"):
        inject_lora(model, peft.LoraConfig(target_modules=["to_qvk"]))
    with pytest.raises(InjectionError, match="blocks.0.attn: expected one of linear, conv, embed"):
        inject_lora(model, peft.LoraConfig(target_modules=["attn", "to_qkv"]))
    with pytest.raises(InjectionError, match="modules_to_save: 'nothing' is not a module"):
        inject_lora(model, peft.LoraConfig(target_modules=["to_qkv"], modules_to_save=["nothing"]))
    assert not list(named_lora_layers(model))
    config = peft.LoraConfig(target_modules=["to_qkv", "q_proj"])
    with pytest.warns(FastLoRAWarning, match="target_modules: 'q_proj' of the LoraConfig matches"):
        assert inject_lora(model, config) == 2
    with pytest.warns(FastLoRAWarning, match="rank_pattern: 'to_out' of the LoraConfig matches no"):
        inject_lora(base(), peft.LoraConfig(target_modules=["mlp.0"], rank_pattern={"to_out": 2}))


def test_a_second_adapter_and_the_estimate_use_the_same_layers():
    model = base()
    inject_lora(model, peft.LoraConfig(target_modules=["to_qkv"], r=2))
    config = peft.LoraConfig(target_modules=["to_qkv", "to_out"], r=3)
    assert add_adapter(model, "second", config, activate=True) == 4
    assert {layer.rank for _, layer in named_lora_layers(model)} == {3}
    plain, same = base(), fastlora.LoRAConfig(target_modules=["to_qkv", "to_out"], rank=3)
    assert fastlora.estimate(plain, 8, config) == fastlora.estimate(plain, 8, same)


@pytest.mark.parametrize("task", ["SEQ_CLS", None])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_all_linear_leaves_out_the_classifier_of_the_task(task):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = transformers.BertConfig(**sizes, num_attention_heads=2, num_labels=3)

    def make():
        return transformers.BertForSequenceClassification(config)

    theirs = peft.get_peft_model(
        make(), peft.LoraConfig(target_modules="all-linear", task_type=task)
    )
    mine = make()
    inject_lora(mine, peft.LoraConfig(target_modules="all-linear", task_type=task))
    assert our_layers(mine).keys() == pefts_layers(theirs).keys()
    assert ("classifier" in our_layers(mine)) == (task is None)
