"""`explain` for models and `preview`: every layer has a reason, and nothing changes."""

import copy

import pytest
import torch
from torch import nn

from fastlora import (
    BackendError,
    Choice,
    ConfigError,
    LayerTable,
    LoRAConfig,
    LoRALinear,
    explain,
    freeze_base_params,
    inject_lora,
    named_lora_layers,
    preview,
    set_adapter,
)
from tests.support.models import Decoder, MixtureOfTransformers

CONFIG = LoRAConfig(
    ["to_qkv", "mlp"], exclude=["mlp.2"], rank_pattern={"mlp": 2}, alpha=6.0, dropout=0.25
)


def by_path(table):
    return {row.path: row for row in table.rows}


def zoo():
    model = Decoder(blocks=1)
    model.conv = nn.Conv1d(3, 3, 1)
    model.table = nn.Embedding(5, 4)
    model.lazy = nn.LazyLinear(3)
    model.norm = nn.LayerNorm(4)
    return model


def test_preview_shows_what_injection_does():
    for targets in (None, ["to_out", "mlp"], "all-linear", CONFIG, lambda path, _: "mlp" in path):
        model = Decoder()
        before = copy.deepcopy(model.state_dict())
        table = preview(model, targets)
        assert all(type(module) is not LoRALinear for module in model.modules())
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert inject_lora(model, targets) == len(table.where("selected"))
        want = {path: (la.rank, la.alpha, la.dropout) for path, la in named_lora_layers(model)}
        got = {row.path: (row.rank, row.alpha, row.dropout) for row in table.where("selected")}
        assert got == want and table.problems == ()


def test_preview_has_a_reason_for_every_layer():
    table = preview(zoo(), CONFIG)
    rows = {path: (row.status, row.pattern, row.reason) for path, row in by_path(table).items()}
    assert rows.pop("blocks.0.mlp") == (
        "container",
        "mlp",
        "a container of 2 layers, which have separate rows",
    )
    assert rows.pop("blocks.0.mlp.mlp")[0] == "container"
    assert rows.pop("blocks.0.attn.to_qkv") == ("selected", "to_qkv", "matches 'to_qkv'")
    assert rows.pop("blocks.0.mlp.mlp.0") == ("selected", "mlp", "matches 'mlp'")
    assert rows.pop("blocks.0.mlp.mlp.2") == ("excluded", "mlp.2", "exclude has 'mlp.2'")
    assert rows.pop("conv") == ("not targeted", None, "kinds has no 'conv'")
    assert rows.pop("table")[2] == "kinds has no 'embedding'"
    assert rows.pop("lazy")[2] == "LazyLinear has no weight yet (lazy): run one forward pass first"
    assert set(rows.values()) == {("not targeted", None, "no target matches its path")}
    assert set(rows) == {
        "input_layer",
        "blocks.0.attn.to_out",
        "upsample.0.out_layers",
        "out_layer",
    }
    assert table.counts == {"to_qkv": 1, "mlp": 1, "mlp.2": 1}
    row = by_path(table)["blocks.0.mlp.mlp.0"]
    assert (row.rank, row.alpha, row.dropout, row.trainable) == (2, 6.0, 0.25, 2 * (16 + 32))


def test_preview_of_a_module_dict_an_index_a_head_and_a_second_name():
    table = preview(MixtureOfTransformers(), ["to_qkv"])
    assert by_path(table)["self_attn.to_qkv"].status == "container"
    assert len(table.where("selected")) == 2
    index = by_path(preview(Decoder(), LoRAConfig(["to_qkv"], layers_to_transform=1)))
    assert index["blocks.0.attn.to_qkv"].reason == "layers_to_transform selects 1 only"
    model = Decoder()
    model.get_output_embeddings = lambda: model.out_layer
    head = by_path(preview(model, "all-linear"))["out_layer"]
    assert head.reason == "all-linear excludes the output embeddings"
    model = Decoder()
    model.alias = model.out_layer
    assert [row.path for row in preview(model, ["alias"]).where("selected")] == ["alias"]


def with_inactive():
    model = Decoder()
    inject_lora(model, ["to_qkv"])
    set_adapter(model, None)
    return model


@pytest.mark.parametrize(
    ("model", "targets", "problem"),
    [
        (Decoder(), ["to_qkv", "to_qvk"], "'to_qvk' matches none of the 11 linear layers"),
        (Decoder(), LoRAConfig(["to_qkv"], exclude=["typo"]), "exclude: 'typo' matches none"),
        (zoo(), ["lazy"], "cannot adapt lazy: LazyLinear has no weight yet"),
        (nn.Sequential(LoRALinear(nn.Linear(2, 2))), ["0"], "already has 1 adapted"),
        (nn.Linear(2, 2), "all-linear", "is itself a Linear; an adapted"),
        (Decoder(), LoRAConfig(["to_qkv"], modules_to_save=["out"]), "'out' is not a module"),
        (with_inactive(), ["to_qkv"], "has the inactive adapters 'default'"),
    ],
    ids=str,
)
def test_preview_shows_what_injection_would_refuse_or_warn_about(model, targets, problem):
    table = preview(model, targets)
    assert any(problem in line for line in table.problems)
    assert f"problem: {table.problems[0]}" in str(table)


def test_explain_without_a_tensor_is_a_table_of_the_model():
    model = zoo()
    del model.lazy
    inject_lora(model, CONFIG)
    freeze_base_params(model)
    model.out_layer.weight.requires_grad_(True)
    rows = by_path(explain(model, rows=64))
    adapted = rows["blocks.0.attn.to_qkv"]
    layer = model.blocks[0].attn.to_qkv
    assert adapted.status == "adapted" and adapted.kind == "Linear"
    assert adapted.choice == explain(layer, torch.zeros(64, 16))
    assert adapted.reason == str(adapted.choice)
    assert (adapted.rank, adapted.alpha, adapted.dropout) == (4, 6.0, 0.25)
    assert adapted.trainable == 4 * (16 + 48)
    assert adapted.saved_bytes == 64 * (16 + 4) * 4 + 8
    assert rows["input_layer"].status == "no adapter" and rows["input_layer"].trainable == 0
    assert rows["out_layer"].trainable == 16 * 5
    assert rows["conv"].status == "no adapter"
    assert not any("original_linear" in path for path in rows)
    assert explain(model).rows[1].choice is None and explain(model).rows[1].saved_bytes is None


def test_explain_with_the_config_distinguishes_not_targeted_from_excluded():
    model = Decoder()
    inject_lora(model, CONFIG)
    table = explain(model, config=CONFIG)
    assert by_path(table)["blocks.0.mlp.mlp.2"].status == "excluded"
    assert by_path(table)["out_layer"].status == "not targeted"
    assert table.counts == {"to_qkv": 2, "mlp": 2, "mlp.2": 2}


def test_only_layers_that_could_have_an_adapter_are_listed():
    class LinearAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.to_q = nn.Linear(2, 2)

    class PackedLinear(nn.Module):
        """A linear layer whose weight is not a parameter, as in quantised layers."""

    model = nn.ModuleList([LinearAttention(), PackedLinear()])
    assert [row.path for row in explain(model).rows] == ["0.to_q", "1"]
    inject_lora(model, ["to_q"])
    asked = []
    explain(model, config=lambda path, _: bool(asked.append(path)))
    assert asked == []


def test_explain_of_one_layer_keeps_its_two_forms():
    layer = LoRALinear(nn.Linear(8, 8))
    assert isinstance(explain(layer, torch.zeros(2, 8)), Choice)
    table = explain(layer, rows=2)
    assert isinstance(table, LayerTable) and [row.status for row in table.rows] == ["adapted"]
    assert "(the model)" in str(table)


def test_a_backend_that_cannot_run_is_the_rows_reason():
    model = nn.Sequential(LoRALinear(nn.Linear(8, 8), rank=4096, backend="triton"))
    with pytest.raises(BackendError):
        explain(model[0], torch.zeros(2, 8))
    (row,) = explain(model, rows=2).rows
    assert row.choice is None and "backend='triton' cannot run" in row.reason


def test_the_projection_of_multihead_attention_is_named():
    model = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    planned = by_path(preview(model, ["out_proj"], dropout=0.1))
    assert "merged weight itself" in planned["self_attn.out_proj"].reason
    assert "dropout has no effect" in planned["self_attn.out_proj"].reason
    inject_lora(model, ["out_proj"])
    row = by_path(explain(model, rows=8))["self_attn.out_proj"]
    assert row.choice is None and "merged weight itself" in row.reason


def test_the_table_is_readable():
    text = str(preview(Decoder(blocks=1), CONFIG, rows=64)).splitlines()
    assert text[0] == "4 not targeted, 2 selected, 2 container, 1 excluded"
    assert text[1].split() == [
        *("layer", "class", "status", "r", "alpha", "dropout", "trains", "saved", "why")
    ]
    (line,) = [line for line in text if line.startswith("blocks.0.attn.to_qkv")]
    assert line.split()[:9] == [
        *("blocks.0.attn.to_qkv", "Linear", "selected", "4", "6", "0.25", "256", "5.008", "KiB")
    ]
    assert "pattern 'to_qkv': 1 layers" in text
    assert text[-1].startswith("saved for backward, 64 rows: at most 9.")
    assert str(explain(nn.ReLU())) == "no layers"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: explain(Decoder(), torch.zeros(1)),
            "x: expected only with an adapted layer, got",
        ),
        (lambda: explain(LoRALinear(nn.Linear(2, 2)), torch.zeros(1, 2), rows=1), "rows, config"),
        (lambda: explain(Decoder(), rows=0), "rows: expected an integer ≥ 1 or None, got 0"),
        (lambda: preview(Decoder(), rows=True), "rows: expected an integer"),
        (lambda: preview(Decoder(), CONFIG, rank=8), "set them in the LoRAConfig"),
    ],
)
def test_invalid_arguments_are_named(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
