"""Injection: which layers are selected or refused; freezing, counting, the medical set-up."""

import json
import logging
import re
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

from fastlora import (
    ConfigError,
    FastLoRAWarning,
    InjectionError,
    LoRAConfig,
    LoRALinear,
    count_parameters,
    freeze_base_params,
    get_lora_params,
    get_lora_state_dict,
    inject_lora,
    load_lora_state_dict,
    named_lora_layers,
    print_trainable_parameters,
    setup_lora_for_medical_finetuning,
)
from tests.support.models import Decoder, MixtureOfTransformers


def paths(model):
    return [path for path, _ in named_lora_layers(model)]


def test_the_documented_call_wraps_the_attention_projections():
    model = Decoder()
    x = torch.randn(4, 8)
    before = model(x)
    assert inject_lora(model) == 4
    assert paths(model) == [f"blocks.{i}.attn.{n}" for i in (0, 1) for n in ("to_qkv", "to_out")]
    layer = model.blocks[0].attn.to_qkv
    assert (layer.rank, layer.alpha, layer.dropout) == (4, 8.0, 0.0)
    assert torch.equal(model(x), before)


def test_the_children_of_a_module_dict_are_found():
    model = MixtureOfTransformers()
    assert inject_lora(model) == 4
    assert set(paths(model)) == {
        f"self_attn.{n}.{k}" for n in ("to_qkv", "to_out") for k in ("shape", "pose")
    }


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["mlp"], ["blocks.0.mlp.mlp.0", "blocks.0.mlp.mlp.2"]),
        ("to_out", ["blocks.0.attn.to_out"]),
        (["attn.to_q"], []),
        (["attn.to_qkv"], ["blocks.0.attn.to_qkv"]),
        (["out_layer"], ["upsample.0.out_layers", "out_layer"]),
        (re.compile(r".*\.to_(qkv|out)"), ["blocks.0.attn.to_qkv", "blocks.0.attn.to_out"]),
        (LoRAConfig("out_layer", match="exact"), ["out_layer"]),
        (
            LoRAConfig(["to_qkv", "mlp.0"], match="exact"),
            ["blocks.0.attn.to_qkv", "blocks.0.mlp.mlp.0"],
        ),
        (
            LoRAConfig("blocks.*.to_*", match="glob"),
            ["blocks.0.attn.to_qkv", "blocks.0.attn.to_out"],
        ),
        (
            LoRAConfig(r"blocks\.\d+\.mlp.*", match="regex"),
            ["blocks.0.mlp.mlp.0", "blocks.0.mlp.mlp.2"],
        ),
        (
            LoRAConfig(["to_", "mlp"], exclude=["to_out", "mlp.2"]),
            ["blocks.0.attn.to_qkv", "blocks.0.mlp.mlp.0"],
        ),
        (lambda path, module: module.out_features == 5, ["out_layer"]),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_patterns_select_exactly(targets, expected):
    model = Decoder(blocks=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if not expected else "error")
        assert inject_lora(model, targets) == len(expected)
    assert paths(model) == expected


def test_all_linear_selects_everything_except_the_output_embeddings():
    model = Decoder(blocks=1)
    assert inject_lora(model, "all-linear") == 7
    model = Decoder(blocks=1)
    model.get_output_embeddings = lambda: model.out_layer
    assert inject_lora(model, "all-linear") == 6
    assert "out_layer" not in paths(model)


def test_rank_alpha_and_dropout_by_pattern_and_by_callback():
    config = LoRAConfig(
        ["to_qkv", "to_out", "mlp"],
        rank=4,
        rank_pattern={"blocks.1": 8, "to_qkv": 2},
        alpha_pattern={"mlp": 32.0},
        dropout_pattern={"to_out": 0.5},
    )
    model = Decoder()
    inject_lora(model, config)
    layers = dict(named_lora_layers(model))
    assert layers["blocks.0.attn.to_qkv"].rank == 2
    assert layers["blocks.1.attn.to_qkv"].rank == 8  # the first pattern that matches wins
    assert (
        layers["blocks.0.mlp.mlp.0"].alpha == 32.0 and layers["blocks.0.attn.to_out"].alpha == 8.0
    )
    assert (
        layers["blocks.0.attn.to_out"].dropout == 0.5
        and layers["blocks.0.mlp.mlp.0"].dropout == 0.0
    )
    model = Decoder()
    inject_lora(model, lambda path, module: LoRAConfig(rank=3) if "mlp" in path else False, rank=5)
    assert {layer.rank for _, layer in named_lora_layers(model)} == {3}


def test_nothing_matched_warns_when_plain_and_raises_under_a_config():
    model = Decoder()
    with pytest.warns(UserWarning, match="no layer matches.*to_kqv.*nearest: to_qkv"):
        assert inject_lora(model, ["to_kqv"]) == 0
    with pytest.raises(
        InjectionError,
        match="target_modules: 'to_kqv' matches none of the 11 linear layers .nearest: to_qkv",
    ):
        inject_lora(model, LoRAConfig(["to_out", "to_kqv"]))
    for field in ("exclude", "rank_pattern", "alpha_pattern", "dropout_pattern"):
        value = ["typo"] if field == "exclude" else {"typo": 1 if field == "rank_pattern" else 0.5}
        with pytest.raises(InjectionError, match=f"{field}: 'typo' matches none"):
            inject_lora(model, LoRAConfig(["to_out"], **{field: value}))
    with pytest.raises(InjectionError, match="no layer was selected"):
        inject_lora(model, LoRAConfig(lambda *_: False))
    assert paths(model) == []


def test_a_second_injection_raises_and_changes_nothing():
    model = Decoder()
    inject_lora(model, ["to_qkv"])
    with pytest.raises(InjectionError, match="already has 2 adapted layers"):
        inject_lora(model, ["to_out"])
    assert len(paths(model)) == 2
    with pytest.raises(
        InjectionError, match="already has 1 adapted layers .first: the model itself"
    ):
        inject_lora(LoRALinear(nn.Linear(2, 2)), "all-linear")


def test_a_shared_module_is_wrapped_once_under_all_its_names():
    model = Decoder()
    model.blocks[1].attn.to_qkv = model.blocks[0].attn.to_qkv
    model.alias = model.blocks[0].attn.to_qkv
    assert inject_lora(model) == 3
    first = model.blocks[0].attn.to_qkv
    assert isinstance(first, LoRALinear)
    assert model.blocks[1].attn.to_qkv is first and model.alias is first
    assert len(get_lora_params(model)) == 6
    assert len(paths(model)) == 3
    every = dict(named_lora_layers(model, remove_duplicate=False))
    assert len(every) == 5 and every["alias"] is every["blocks.1.attn.to_qkv"] is first


def test_an_unsuitable_layer_is_named_and_nothing_is_changed():
    model = Decoder()
    model.blocks[1].attn.to_out = nn.LazyLinear(16)
    with pytest.raises(
        InjectionError, match=r"cannot adapt blocks.1.attn.to_out: LazyLinear has no weight yet"
    ):
        inject_lora(model)
    assert paths(model) == []
    with pytest.raises(InjectionError, match="is itself a Linear; .* use LoRALinear"):
        inject_lora(nn.Linear(2, 2), "all-linear")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoRAConfig([]), "target_modules: expected at least one pattern, got none"),
        (
            lambda: LoRAConfig([""]),
            "target_modules: expected non-empty strings or patterns, got ''",
        ),
        (
            lambda: LoRAConfig(["a"], match="fuzzy"),
            "match: expected one of contains, exact, glob, regex, got 'fuzzy'",
        ),
        (lambda: LoRAConfig(["a*"]), "looks like a glob or a regex"),
        (lambda: LoRAConfig("(", match="regex"), r"target_modules: '\(' is not a regex"),
        (lambda: LoRAConfig(exclude="to_q"), "exclude: expected a list of patterns, got 'to_q'"),
        (lambda: LoRAConfig(use_rslora=None), "use_rslora: expected True or False, got None"),
        (lambda: LoRAConfig(rank_pattern={"a": 0}), "rank: expected an integer"),
        (lambda: LoRAConfig(alpha_pattern={"a": float("inf")}), "alpha: expected a finite number"),
        (lambda: LoRAConfig(dropout_pattern={"a": 1}), "dropout: expected a probability"),
        (lambda: inject_lora(Decoder(), LoRAConfig(), rank=8), "set them in the LoRAConfig"),
        (
            lambda: inject_lora(Decoder(), lambda *_: 1),
            "the callback must return a bool or a LoRAConfig, got 1 for input_layer",
        ),
    ],
)
def test_invalid_configurations_are_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_freeze_and_count():
    model = Decoder()
    total = count_parameters(model)["total"]
    assert count_parameters(model) == {"total": total, "trainable": total, "lora": 0}
    inject_lora(model, rank=4)
    lora = 2 * (4 * (16 + 48) + 4 * (16 + 16))
    assert freeze_base_params(model) == (total, lora)
    assert count_parameters(model) == {"total": total + lora, "trainable": lora, "lora": lora}
    assert all(p.requires_grad for p in get_lora_params(model))
    with pytest.raises(InjectionError, match="has no adapters, so everything would be frozen"):
        freeze_base_params(plain := nn.Linear(2, 2))
    assert plain.weight.requires_grad


def test_only_adapters_change_in_training():
    model = Decoder()
    inject_lora(model)
    freeze_base_params(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(get_lora_params(model), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().sum().backward()
        optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora_" in name}


def test_print_trainable_parameters_has_pefts_format(capsys):
    model = Decoder()
    inject_lora(model)
    freeze_base_params(model)
    print_trainable_parameters(model)
    counts = count_parameters(model)
    assert capsys.readouterr().out == (
        f"trainable params: {counts['trainable']:,} || all params: {counts['total']:,} "
        f"|| trainable%: {100 * counts['trainable'] / counts['total']:.4f}\n"
    )


def test_medical_setup_adapts_freezes_and_unfreezes_the_head():
    model = Decoder()
    counts = setup_lora_for_medical_finetuning(model, rank=2, alpha=4.0, dropout=0.1)
    assert counts == count_parameters(model)
    assert counts["trainable"] == counts["lora"] + 16 * 5 + 5
    trainable = {
        name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name
    }
    assert trainable == {"out_layer.weight", "out_layer.bias"}  # not upsample.0.out_layers
    assert {layer.dropout for _, layer in named_lora_layers(model)} == {0.1}


def test_medical_setup_options():
    model = Decoder()
    counts = setup_lora_for_medical_finetuning(
        model, unfreeze_output_layers=False, include_ffn=True
    )
    assert counts["trainable"] == counts["lora"]
    assert len(paths(model)) == 8
    model = Decoder()
    setup_lora_for_medical_finetuning(model, output_layer_names=["upsample", "out_layer"])
    assert model.upsample[0]["out_layers"].weight.requires_grad


def test_medical_setup_sets_ranks_by_layer():
    model = Decoder()
    counts = setup_lora_for_medical_finetuning(
        model, rank=2, alpha=4.0, rank_pattern={"to_qkv": 3, "out_layer": 8}
    )
    assert counts["trainable"] == counts["lora"]  # the output layer does not train in full
    layers = dict(named_lora_layers(model))
    assert "out_layer" in layers and not any("out_layers" in path for path in layers)
    for path, layer in layers.items():
        own = 3 if "to_qkv" in path else 8 if path == "out_layer" else 2
        assert (layer.rank, layer.scaling) == (own, 2.0), path
    model = Decoder()
    with pytest.raises(InjectionError, match="rank_pattern: 'mlp' matches none of the 4 adapted"):
        setup_lora_for_medical_finetuning(model, rank_pattern={"mlp": 3})
    with pytest.raises(ConfigError, match="rank"):
        setup_lora_for_medical_finetuning(model, rank_pattern={"to_qkv": 0})
    assert paths(model) == [] and all(p.requires_grad for p in model.parameters())


def test_medical_setup_refuses_before_it_changes_anything():
    model = Decoder()
    for arguments, message in (
        (
            {"output_layer_names": ["out_layr"]},
            "'out_layr' is not a module of the model .nearest: out_layer",
        ),
        (
            {"output_layer_names": ["blocks"]},
            "output_layer_names: blocks is or contains blocks.0.attn.to_out, which gets an adapter",
        ),
        ({"output_layer_names": ["to_out"]}, "to_out, which gets an adapter"),
    ):
        with pytest.raises(InjectionError, match=message):
            setup_lora_for_medical_finetuning(model, **arguments)
    with pytest.raises(ConfigError, match="rank"):
        setup_lora_for_medical_finetuning(model, rank=0)
    with pytest.raises(InjectionError, match="no layer matches"):
        setup_lora_for_medical_finetuning(nn.Sequential(nn.Linear(2, 2)))
    assert paths(model) == [] and all(p.requires_grad for p in model.parameters())


def test_what_medical_setup_unfreezes_is_saved_and_restored():
    model, twin = Decoder(), Decoder()
    for m in (model, twin):
        setup_lora_for_medical_finetuning(m)
    with torch.no_grad():
        model.out_layer.weight.fill_(3.0)
    state = get_lora_state_dict(model, include_trainable=True)
    load_lora_state_dict(twin, state)
    assert torch.equal(twin.out_layer.weight, model.out_layer.weight)


def test_one_unmatched_pattern_of_a_plain_list_warns_and_the_rest_is_wrapped():
    model = Decoder()
    with pytest.warns(UserWarning, match="'to_qvk' matches none of the 11 .* .nearest: to_qkv"):
        assert inject_lora(model, ["to_out", "to_qvk"]) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert inject_lora(Decoder()) == 4  # the defaults name layers of several architectures
        setup_lora_for_medical_finetuning(Decoder(), include_ffn=True)


def test_dropout_that_multihead_attention_would_ignore_warns():
    for adapt in (
        lambda model: inject_lora(model, ["out_proj", "linear1"], dropout=0.1),
        lambda model: inject_lora(model, LoRAConfig(["out_proj"], dropout=0.1)),
    ):
        model = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        with pytest.warns(
            UserWarning, match="dropout has no effect on self_attn.out_proj: nn.Multi"
        ):
            adapt(model)
    inject_lora(nn.TransformerEncoderLayer(16, 4, 32), ["linear1", "linear2"], dropout=0.1)
    inject_lora(nn.MultiheadAttention(16, 4), ["out_proj"])


def test_the_names_in_an_error_are_not_empty():
    config = LoRAConfig(["to_qkv"], modules_to_save=["zzz"])
    with pytest.raises(InjectionError, match=r"is not a module of the model; there are \w+, \w+"):
        inject_lora(Decoder(), config)


@pytest.mark.parametrize("first", ["to_q", "head"])
@pytest.mark.parametrize("wanted", ["out_layer", "head"])
def test_a_shared_layer_is_not_adapted_and_trained_under_its_other_name(first, wanted):
    layer, head, model = nn.Linear(8, 8), nn.Module(), nn.Module()
    head.out_layer = layer
    for name in (first, {"to_q": "head", "head": "to_q"}[first]):
        model.add_module(name, layer if name == "to_q" else head)
    with pytest.raises(InjectionError, match="which gets an adapter"):
        inject_lora(model, LoRAConfig(["to_q", "head"], modules_to_save=[wanted]))
    with pytest.raises(InjectionError, match="which gets an adapter"):
        setup_lora_for_medical_finetuning(model, output_layer_names=[wanted])
    assert model.to_q is layer and layer.weight.requires_grad


def test_a_pattern_that_matches_a_layer_of_no_kind_names_its_class():
    class QuantLinear(nn.Module):  # as of GPTQ and AWQ: packed integers, not an nn.Linear
        def __init__(self):
            super().__init__()
            self.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))

    model = nn.ModuleDict(
        {"q_proj": QuantLinear(), "fc": nn.Linear(4, 4), "norm": nn.Conv1d(4, 4, 1)}
    )
    kinds = "linear, conv, embedding"
    with pytest.raises(InjectionError, match=f"the QuantLinear q_proj, which is none of {kinds}"):
        inject_lora(model, LoRAConfig(["q_proj"]))
    with pytest.raises(InjectionError, match="It matches the Conv1d norm, if kinds has 'conv'"):
        inject_lora(model, LoRAConfig(["norm"]))


class WithHeads(nn.Module):
    def __init__(self, **heads):
        super().__init__()
        self.to_out, self.decode_head = nn.Linear(4, 4), nn.Linear(4, 4)
        self.inner = nn.Module()
        for name, module in heads.items():
            (self.inner if name == "head" else self).add_module(name, module)


@pytest.mark.parametrize("name", ["out_layer", "output_layer", "head"])
def test_the_setup_unfreezes_the_common_output_layers_at_any_depth_and_says_which(name, caplog):
    model = WithHeads(**{name: nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))})
    with caplog.at_level(logging.INFO, "fastlora"):
        setup_lora_for_medical_finetuning(model)
    found = {n for n, p in model.named_parameters() if p.requires_grad and "lora" not in n}
    path = f"inner.{name}" if name == "head" else name
    assert found == {f"{path}.{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")}
    assert f"output layers that train: {path}.0.weight" in caplog.text


def test_the_setup_without_an_output_layer_is_refused():
    for heads in ({}, {"head": nn.Identity()}):
        model = WithHeads(**heads)
        with pytest.raises(InjectionError, match=r"no module with parameters .*unfreeze_output"):
            setup_lora_for_medical_finetuning(model)
        assert not paths(model)
    with pytest.raises(ConfigError, match="output_layer_names: expected a list of names, got 'he"):
        setup_lora_for_medical_finetuning(model, output_layer_names="head")
    with pytest.raises(InjectionError, match="'haed' is not a module"):
        setup_lora_for_medical_finetuning(model, output_layer_names=["haed"])
    assert setup_lora_for_medical_finetuning(model, unfreeze_output_layers=False)["lora"] == 32


@pytest.mark.parametrize("name", ["mlp", "ffn", "fc1", "fc2"])
def test_include_ffn_covers_the_common_names(name):
    model = WithHeads(head=nn.Linear(4, 2), **{name: nn.Sequential(nn.Linear(4, 4))})
    setup_lora_for_medical_finetuning(model, include_ffn=True)
    assert paths(model) == ["to_out", f"{name}.0"]
    with pytest.raises(InjectionError, match="include_ffn: no layer matches mlp, ffn, fc1, fc2"):
        setup_lora_for_medical_finetuning(WithHeads(head=nn.Linear(4, 2)), include_ffn=True)


class Experts(nn.Module):
    """As in transformers: the weights of all experts are one parameter."""

    def __init__(self, width=8):
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 64, width))
        self.router = nn.Linear(width, 4)
        self.experts = nn.Module()
        self.experts.gate_up_proj = nn.Parameter(torch.zeros(4, 2 * width, width))
        self.conv = nn.Conv2d(4, 4, 3)


def test_experts_that_all_linear_leaves_out_are_named():
    message = r"leaves out 4\d% of the model's parameters: experts.gate_up_proj are stacked"
    with pytest.warns(FastLoRAWarning, match=message):
        assert inject_lora(Experts(), "all-linear") == 1
    with pytest.raises(InjectionError, match="It matches the parameter experts.gate_up_proj"):
        inject_lora(Experts(), LoRAConfig(["router", "gate_up_proj"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # parametrised and bilinear layers are no experts
        normed = nn.utils.parametrizations.weight_norm(nn.Conv1d(64, 64, 7))
        inject_lora(nn.Sequential(normed, nn.Bilinear(16, 16, 16), nn.Linear(8, 8)), "all-linear")
    small = Experts()
    small.table = nn.Linear(64, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a small share, and other targets
        inject_lora(small, "all-linear")
        inject_lora(Experts(), ["router"])


class Names(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.query, self.q_norm = (nn.Linear(4, 4) for _ in range(3))
        self.attn = nn.ModuleDict({"q": nn.Linear(4, 4)})


@pytest.mark.parametrize("targets", [["q"], ["attn.q"], ["q", "query"], "q", r".*q", "All-Linear"])
def test_the_keyword_target_modules_means_what_it_means_in_peft(targets):
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(Names(), peft.LoraConfig(target_modules=targets))
    wanted = [
        path.removeprefix("base_model.model.")
        for path, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    ]
    model = Names()
    inject_lora(model, LoRAConfig(target_modules=targets))
    assert paths(model) == wanted
    again = Names()
    inject_lora(again, LoRAConfig.from_dict(LoRAConfig(target_modules=targets).to_dict()))
    assert paths(again) == wanted
    positional = Names()
    inject_lora(positional, LoRAConfig(["q"]))
    assert (
        len(paths(positional)) == 4
    )  # contained in any component, as in inject_lora(model, ["q"])
    assert LoRAConfig(target_modules=["q"], match="contains").match == "contains"


PEFTS_OPTIONS = [
    {"target_modules": ".*(q|query)", "exclude_modules": ["attn.q"]},
    {"target_modules": ".*(q|query)", "exclude_modules": "q"},
    {"target_modules": ["q", "query"], "exclude_modules": "attn.*"},
    {"target_modules": {"q", "query", "q_norm"}, "exclude_modules": {"query", "q_norm"}},
    {"target_modules": "all-linear", "exclude_modules": ["q"]},
    {"target_modules": "all-linear", "exclude_modules": "q.*"},
    {"target_modules": ".*q", "rank_pattern": {"q": 3}, "alpha_pattern": {"attn.q": 5}},
    {"target_modules": ".*q", "rank_pattern": {"attn..": 3}, "alpha_pattern": {"^q": 5}},
    {"target_modules": ["q", "query"], "rank_pattern": {"q": 3}, "alpha_pattern": {"query": 5}},
    {"target_modules": ["q", "query"], "rank_pattern": {"at+n.q|query": 3, "q": 2}},
    {"target_modules": "all-linear", "alpha_pattern": {"q": 5}, "rank_pattern": {"q_.*": 6}},
]


@pytest.mark.parametrize("options", PEFTS_OPTIONS)
def test_names_excluded_and_patterns_mean_what_they_mean_in_peft(options, tmp_path):
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(Names(), peft.LoraConfig(**options, r=4, lora_alpha=8))
    wanted = {
        path.removeprefix("base_model.model."): (module.r["default"], module.lora_alpha["default"])
        for path, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    config = LoRAConfig(**options, r=4, lora_alpha=8)
    file = tmp_path / "config.json"
    config.save(file)
    by_hand = tmp_path / "by_hand.json"
    lists = {k: sorted(v) if isinstance(v, set) else v for k, v in options.items()}
    by_hand.write_text(json.dumps({**lists, "r": 4, "lora_alpha": 8}))
    for one in (
        config,
        LoRAConfig.load(file),
        LoRAConfig.load(by_hand),
        replace(config, backend="torch"),
    ):
        model = Names()
        inject_lora(model, one)
        assert {path: (la.rank, la.alpha) for path, la in named_lora_layers(model)} == wanted


def test_a_full_path_is_selected_whatever_its_index():
    model = Decoder()
    targets = ["blocks.1.attn.to_out", "to_qkv"]
    inject_lora(model, LoRAConfig(target_modules=targets, layers_to_transform=0))
    assert paths(model) == ["blocks.0.attn.to_qkv", "blocks.1.attn.to_out"]


def test_a_first_argument_of_the_wrong_kind_is_named():
    peft = pytest.importorskip("peft")
    for wrong in (nn.Linear, nn.Linear(2, 2), peft.LoraConfig):
        with pytest.raises(ConfigError, match="target_modules: expected patterns, a callback or"):
            inject_lora(Names(), wrong)
    with pytest.raises(ConfigError, match="model: expected an nn.Module, got list"):
        inject_lora(["q"], ["q"])
    for wrong in ({"q": 1}, b"q", (n for n in ["q"]), []):
        with pytest.raises(ConfigError, match="target_modules: expected"):
            inject_lora(Names(), wrong)
