"""LoRAConfig: PEFT's names, indices, initialisations and files."""

import json
import re
from dataclasses import replace

import pytest
import torch

from fastlora import ConfigError, InjectionError, LoRAConfig, inject_lora, named_lora_layers
from tests.support.models import Decoder


def test_pefts_names_are_accepted():
    theirs = LoRAConfig(["to_out"], r=2, lora_alpha=3.0, lora_dropout=0.5, exclude_modules=["1"])
    assert theirs == LoRAConfig(["to_out"], 2, 3.0, 0.5, exclude=["1"])
    assert replace(theirs, rank=7).rank == 7
    for arguments in ({"rank": 4, "r": 8}, {"alpha": 1.0, "lora_alpha": 1.0}):
        alias = list(arguments)[1]
        with pytest.raises(ConfigError, match=f"{alias}: is an alias of .*; pass one of them"):
            LoRAConfig(["a"], **arguments)
    with pytest.raises(ConfigError, match="r: is an alias of rank"):
        LoRAConfig(["a"], 4, r=4)
    with pytest.raises(TypeError, match="lora_rank"):
        LoRAConfig(["a"], lora_rank=4)


def test_a_config_copies_its_arguments():
    targets, ranks = ["to_out"], {"to_out": 2}
    config = LoRAConfig(targets, rank_pattern=ranks)
    targets.append("x")
    ranks["x"] = 1
    assert config.targets == ("to_out",) and config.rank_pattern == {"to_out": 2}


def test_sets_are_sorted_and_iterators_refused():
    config = LoRAConfig(
        {"b", "a", re.compile("c")}, exclude=frozenset("qp"), modules_to_save={"z", "y", "x"}
    )
    assert config.targets == ("a", "b", re.compile("c"))
    assert (config.exclude, config.modules_to_save) == (("p", "q"), ("x", "y", "z"))
    assert LoRAConfig(kinds={"linear", "embedding", "conv"}).kinds == (
        "conv",
        "embedding",
        "linear",
    )
    assert LoRAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    for name, value in (("target_modules", "a"), ("modules_to_save", "a"), ("kinds", "linear")):
        with pytest.raises(ConfigError, match=f"{name}: expected "):
            LoRAConfig(**{name: iter([value])})  # the check of its values would exhaust it


@pytest.mark.parametrize("indices", [1, [1], (1,)])
def test_layers_to_transform_uses_the_first_number_of_the_path(indices):
    model = Decoder()
    config = LoRAConfig(["to_qkv", "mlp"], layers_to_transform=indices)
    assert inject_lora(model, config) == 3
    assert [path for path, _ in named_lora_layers(model)] == [
        "blocks.1.attn.to_qkv",
        "blocks.1.mlp.mlp.0",
        "blocks.1.mlp.mlp.2",
    ]


def test_an_index_that_does_not_exist_is_refused():
    model = Decoder()
    config = LoRAConfig(["mlp"], layers_to_transform=[0, 2])  # 2 is not a block but a child of mlp
    with pytest.raises(
        InjectionError,
        match=r"layers_to_transform: no adapted layer has the index 2; there are \[0\]",
    ):
        inject_lora(model, config)
    assert list(named_lora_layers(model)) == []


@pytest.mark.parametrize("how", ["kaiming", "gaussian", "orthogonal"])
def test_initialisations_leave_the_output_unchanged_and_have_their_shape(how):
    model = Decoder(width=64)
    x = torch.randn(3, 8)
    before = model(x)
    inject_lora(model, LoRAConfig(["to_qkv"], rank=8, init_lora_weights=how))
    torch.testing.assert_close(model(x), before)
    for _, layer in named_lora_layers(model):
        std = layer.lora_A.std().item()
        if how == "kaiming":
            assert layer.lora_A.abs().max() <= 64**-0.5
        elif how == "gaussian":
            assert abs(std - 1 / 8) < 0.02 and layer.lora_A.abs().max() > 64**-0.5
        assert (layer.lora_B.abs().max() == 0) == (how != "orthogonal")
        if how == "orthogonal":  # each row is a sum of 4 Gaussians weighted by half a row of Q
            assert abs(std - 0.1 * 0.5**0.5) < 0.02
            assert torch.linalg.matrix_rank(layer.lora_A) == 4
            assert (layer.lora_B @ layer.lora_A).abs().max() < 1e-6


def test_orthogonal_needs_even_ranks_everywhere():
    with pytest.raises(
        ConfigError, match="init_lora_weights: orthogonal needs an even rank, got 3"
    ):
        LoRAConfig(["a"], rank=3, init_lora_weights="orthogonal")
    model = Decoder()
    config = LoRAConfig(["to_out"], rank_pattern={"blocks.1": 3}, init_lora_weights="orthogonal")
    with pytest.raises(ConfigError, match="orthogonal needs an even rank, got 3"):
        inject_lora(model, config)
    assert list(named_lora_layers(model)) == []


CONFIGS = [
    LoRAConfig(),
    LoRAConfig("all-linear", rank=8, use_rslora=True, adapter_dtype=torch.bfloat16),
    LoRAConfig(
        ["to_out", re.compile(r".*\.mlp\.[02]")],
        alpha=3.5,
        exclude=[re.compile("(?i)HEAD")],
        rank_pattern={"to_out": 2},
        alpha_pattern={"to_out": 1.0},
        dropout_pattern={"to_out": 0.1},
        layers_to_transform=[0, 1],
        init_lora_weights="orthogonal",
        backend="torch",
    ),
    LoRAConfig(re.compile("a|b"), match="exact", layers_to_transform=3),
    LoRAConfig(target_modules="a|b", exclude_modules="b.*", rank_pattern={"a|c.[0-9]": 2}),
    LoRAConfig(target_modules={"b", "a"}, exclude_modules={"d", "c"}),
]


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_dicts_and_files_restore_the_same_config(config, tmp_path):
    assert LoRAConfig.from_dict(config.to_dict()) == config
    for name in ("c.json", "c.yaml", "c.YML"):
        config.save(tmp_path / name)
        assert LoRAConfig.load(tmp_path / name) == config
    assert json.loads((tmp_path / "c.json").read_text()) == config.to_dict()
    assert len(config.to_dict()) == 18


def test_a_file_written_by_hand_may_use_pefts_names(tmp_path):
    file = tmp_path / "lora.yaml"
    file.write_text("target_modules: [q_proj, v_proj]\nr: 16\nlora_alpha: 32\nmatch: exact\n")
    assert LoRAConfig.load(file) == LoRAConfig(["q_proj", "v_proj"], 16, 32, match="exact")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.toml", "", "path: expected a .json, .yaml or .yml file"),
        ("c.json", '{"rank": ', "c.json: not readable as json"),
        ("c.json", "[" * 100_000, "c.json: not readable as json"),
        ("c.yaml", "a: [1", "c.yaml: not readable as yaml"),
        ("c.yaml", "!!python/object/apply:os.mkdir [pwned]", "c.yaml: not readable as yaml"),
        ("c.yaml", "", "values: expected a mapping of fields, got NoneType"),
        ("c.json", '{"rnak": 3}', "rnak: no such field .nearest: rank"),
        ("c.json", '{"adapter_dtype": "float3"}', "adapter_dtype: expected a float dtype"),
        ("c.json", '{"adapter_dtype": "int8"}', "adapter_dtype: expected a float dtype"),
        ("c.json", '{"target_modules": {"glob": "x"}}', "target_modules: expected strings or"),
        ("c.json", '{"exclude": [{"regex": "("}]}', r"exclude: '\(' is not a regex"),
    ],
)
def test_invalid_files_are_named(name, text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        LoRAConfig.load(tmp_path / name)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoRAConfig(lambda *_: True), "target_modules: a callback cannot be written"),
        (LoRAConfig(re.compile("a", re.I)), "target_modules: the flags of .* cannot be written"),
        (LoRAConfig(rank_pattern={re.compile("a"): 2}), "rank_pattern: the compiled pattern"),
    ],
    ids=["callback", "flags", "key"],
)
def test_what_cannot_be_written_is_refused(config, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        config.save(tmp_path / "c.json")
    assert not (tmp_path / "c.json").exists()


def test_without_pyyaml_the_error_names_it(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "yaml", None)
    LoRAConfig().save(tmp_path / "c.json")
    with pytest.raises(ConfigError, match=r"YAML needs the package pyyaml .pip install pyyaml."):
        LoRAConfig().save(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": 5}, "target_modules: expected a list of patterns, got 5"),
        ({"exclude": 5}, "exclude: expected a list of patterns, got 5"),
        ({"target_modules": "("}, r"target_modules: '\(' is not a regex"),
        ({"target_modules": ""}, "target_modules: expected non-empty strings"),
        ({"target_modules": ["a"], "exclude": "("}, r"exclude: '\(' is not a regex"),
        ({"target_modules": ["a"], "exclude": ""}, "exclude: expected a list of patterns, got ''"),
        (
            {"target_modules": ["a"], "rank_pattern": {"*a": 1}},
            r"rank_pattern: '\*a' is not a regex",
        ),
        ({"match": "fuzzy"}, "match: expected one of"),
        ({"rank": 0}, "rank: expected an integer"),
        ({"alpha": "8"}, "alpha: expected a finite number"),
        ({"dropout": 1.0}, "dropout: expected a probability"),
        ({"rank_pattern": [1]}, "rank_pattern: expected a mapping"),
        ({"rank_pattern": {"": 1}}, "rank_pattern: expected non-empty strings"),
        ({"rank_pattern": {"a": 0}}, r"rank_pattern\['a'\]: rank: expected an integer"),
        ({"alpha_pattern": {"a": None}}, r"alpha_pattern\['a'\]: alpha: expected"),
        ({"dropout_pattern": {"a": 2}}, r"dropout_pattern\['a'\]: dropout: expected"),
        (
            {"adapter_dtype": torch.int8},
            "adapter_dtype: expected a float dtype or None, got torch.int8",
        ),
        ({"backend": "tpu"}, "backend: expected one of auto, torch, triton, got 'tpu'"),
        ({"use_rslora": 1}, "use_rslora: expected True or False, got 1"),
        ({"layers_to_transform": []}, "layers_to_transform: expected indices ≥ 0 or None"),
        ({"layers_to_transform": -1}, "layers_to_transform: expected indices ≥ 0 or None, got -1"),
        ({"layers_to_transform": "1"}, "layers_to_transform: expected indices"),
        ({"layers_to_transform": [True]}, "layers_to_transform: expected indices"),
        (
            {"init_lora_weights": "svd"},
            "init_lora_weights: expected one of kaiming, gaussian, ort",
        ),
    ],
    ids=str,
)
def test_every_field_is_checked_and_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        LoRAConfig(**fields)
