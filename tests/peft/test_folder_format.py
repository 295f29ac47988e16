"""PEFT's folder format: equal outputs in both directions, PEFT's matching rules, and errors that name the cause."""

import copy
import json
import os

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fastlora import (
    CheckpointError,
    FastLoRAWarning,
    LoRAConfig,
    LoRALinear,
    add_adapter,
    freeze_base_params,
    from_pretrained,
    inject_lora,
    load_adapter,
    named_lora_layers,
    save_pretrained,
    set_adapter,
)
from fastlora.cli.commands import main
from fastlora.cli.convert import read_adapter
from fastlora.files import check_regexes
from tests.support.models import Decoder, Reader, randomise_adapters
from tests.support.tolerance import assert_close, assert_differs

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
CARD = "README.md"


def base(seed=7, make=Decoder):
    torch.manual_seed(seed)
    return make().eval()


def adapted(targets=("to_qkv", "to_out"), **options):
    """A fastlora model with trained-looking adapters and a frozen base."""
    model = base()
    inject_lora(model, LoRAConfig(list(targets), **{"rank": 4, **options}))
    freeze_base_params(model)
    randomise_adapters(model)
    return model


def peft_adapted(make=Decoder, seed=5, **options):
    """A PEFT model whose B is not zero."""
    model = peft.get_peft_model(base(make=make), peft.LoraConfig(**{"r": 4, **options})).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def in_peft(folder, make=Decoder):
    return peft.PeftModel.from_pretrained(base(make=make), folder).eval()


def same(left, right, x):
    torch.testing.assert_close(left(x), right(x))
    assert_differs(left(x), base()(x))  # the adapters do something


X = torch.linspace(-1, 1, 24).view(3, 8)


# fastlora → PEFT


def test_pefts_output_equals_ours_after_saving(tmp_path):
    model = adapted()
    save_pretrained(model, tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert sorted(os.listdir(folder)) == [CARD, CONFIG, WEIGHTS]
    same(in_peft(folder), model, X)
    config = json.loads((folder / CONFIG).read_text())
    assert config["target_modules"] == ["to_out", "to_qkv"]
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 8, "LORA")
    keys = set(load_file(folder / WEIGHTS))
    assert "base_model.model.blocks.0.attn.to_qkv.lora_A.weight" in keys and len(keys) == 8


@pytest.mark.parametrize(
    ("targets", "options"),
    [
        (["to_qkv", "to_out"], {"rank_pattern": {"blocks.1": 2}, "alpha_pattern": {"to_out": 3.5}}),
        (["to_qkv", "mlp"], {"use_rslora": True, "dropout": 0.25}),
        (["blocks.0.attn"], {}),
        (["out_layer"], {"match": "exact"}),
    ],
    ids=["patterns", "rslora", "one block", "a name that is a suffix"],
)
def test_different_layers_are_written_exactly(targets, options, tmp_path):
    model = adapted(targets, **options)
    save_pretrained(model, tmp_path)
    theirs = in_peft(tmp_path)
    same(theirs, model, X)
    found = {n for n, m in theirs.base_model.model.named_modules() if hasattr(m, "base_layer")}
    assert found == {path for path, _ in named_lora_layers(model)}
    mine = base()
    from_pretrained(mine, tmp_path)
    assert torch.equal(mine(X), model(X))
    for (_, got), (_, want) in zip(named_lora_layers(mine), named_lora_layers(model), strict=True):
        assert (got.rank, got.alpha, got.dropout, got.use_rslora) == (
            want.rank,
            want.alpha,
            want.dropout,
            want.use_rslora,
        )


def test_mixed_rslora_is_written_as_alphas(tmp_path):
    model = base()
    inject_lora(
        model,
        lambda path, _: (
            LoRAConfig(rank=4, use_rslora=path == "blocks.0.attn.to_out")
            if "attn" in path
            else False
        ),
    )
    freeze_base_params(model)
    randomise_adapters(model)
    save_pretrained(model, tmp_path)
    same(in_peft(tmp_path), model, X)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # torch's own
@pytest.mark.parametrize("compiled", [False, True])
def test_saving_warns_of_layers_that_peft_would_compute_as_the_base(compiled, tmp_path):
    torch.manual_seed(0)
    plain = Reader()
    model = copy.deepcopy(plain)
    inject_lora(model, LoRAConfig(["called", "read"]))
    freeze_base_params(model)
    randomise_adapters(model)
    save_pretrained(model, tmp_path)  # nothing is known before a call
    y = torch.compile(model, backend="eager")(X) if compiled else model(X)
    model.called.weight.sum()  # a penalty, outside of the compiled code
    with pytest.warns(FastLoRAWarning, match="PEFT computes the base model at read: other"):
        save_pretrained(model, tmp_path)
    mine = copy.deepcopy(plain)
    from_pretrained(mine, tmp_path)
    assert torch.equal(mine(X), y)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    assert_differs(theirs(X), y)
    assert torch.equal(
        theirs(X), nn.functional.linear(theirs.base_model.model.called(X), plain.read.weight)
    )


@pytest.mark.parametrize(
    ("batch_first", "named"),
    [(True, "self_attn.out_proj, linear1, linear2"), (False, "self_attn.out_proj")],
)
def test_saving_warns_of_what_torchs_own_modules_read(batch_first, named, tmp_path):
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)
    inject_lora(model, LoRAConfig("all-linear"))
    freeze_base_params(model)
    with pytest.warns(FastLoRAWarning, match=f"PEFT computes the base model at {named}: other"):
        save_pretrained(model, tmp_path)


def test_several_dropouts_become_the_highest_with_a_warning(tmp_path):
    model = adapted(dropout=0.1, dropout_pattern={"to_out": 0.5})
    with pytest.warns(
        UserWarning, match=r"dropouts \[0.1, 0.5\], PEFT's format stores one; 0.5 is written"
    ):
        save_pretrained(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["lora_dropout"] == 0.5


def test_a_path_that_is_the_end_of_another_is_distinguished(tmp_path):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Sequential(nn.Linear(8, 8))
            self.b = nn.ModuleDict({"a": nn.Sequential(nn.Linear(8, 8))})

        def forward(self, x):
            return self.b["a"](self.a(x))

    model = base(make=Outer)
    inject_lora(model, LoRAConfig(r"a\.0", match="regex"))
    freeze_base_params(model)
    randomise_adapters(model)
    save_pretrained(model, tmp_path)
    theirs = in_peft(tmp_path, Outer)
    torch.testing.assert_close(theirs(X), model(X))
    assert isinstance(theirs.base_model.model.b["a"][0], nn.Linear)


def test_trained_heads_are_saved_and_loaded(tmp_path):
    model = adapted()
    for head in (model.out_layer, model.upsample[0]["out_layers"]):
        head.weight.requires_grad_(True)
        with torch.no_grad():
            head.weight.mul_(0.5)
            head.bias.add_(1.0)  # not trained, but saved: PEFT saves modules in full
    save_pretrained(model, tmp_path / "a")
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert config["modules_to_save"] == ["upsample.0.out_layers", "out_layer"]
    same(in_peft(tmp_path / "a"), model, X)
    mine = base()
    result = from_pretrained(mine, tmp_path / "a")
    assert torch.equal(mine(X), model(X)) and len(result.loaded) == 8 + 4
    trained = {n for n, p in mine.named_parameters() if p.requires_grad and "lora_" not in n}
    assert trained == {
        f"{head}.{kind}"
        for head in ("upsample.0.out_layers", "out_layer")
        for kind in ("weight", "bias")
    }
    save_pretrained(mine, tmp_path / "b")  # what was loaded can be saved again, byte for byte
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with pytest.warns(FastLoRAWarning, match=r"out_layer.bias, upsample.0.out_layers.bias changed"):
        save_pretrained(model, tmp_path / "c", include_trainable=False)
    assert len(load_file(tmp_path / "c" / WEIGHTS)) == 8


class Classifier(nn.Module):
    """`pre_head` ends with `head`, as DistilBERT's pre_classifier does with classifier."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(8, 8)
        self.pre_head = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 5)
        self.head.weight = nn.Parameter(torch.randn(5, 8))

    def forward(self, x):
        return self.head(self.norm(self.pre_head(self.body(x))))


def test_pefts_suffix_rule_for_heads_and_buffers(tmp_path):
    theirs = peft_adapted(Classifier, target_modules=["body"], modules_to_save=["head", "norm"])
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.fill_(0.25)
    theirs.save_pretrained(tmp_path)
    mine = base(make=Classifier)
    from_pretrained(mine, tmp_path)
    torch.testing.assert_close(mine(X), theirs(X))
    assert mine.pre_head.weight.requires_grad and mine.norm.running_mean[0] == 0.25
    save_pretrained(mine, tmp_path / "again")
    torch.testing.assert_close(in_peft(tmp_path / "again", Classifier)(X), theirs(X))
    only = base(make=Classifier)
    inject_lora(only, ["body"])
    freeze_base_params(only)
    only.head.weight.requires_grad_(True)
    save_pretrained(only, tmp_path / "only")  # PEFT will look for pre_head too
    torch.testing.assert_close(in_peft(tmp_path / "only", Classifier)(X), only(X))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, 8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 8)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.body(self.embed(x)))


def test_tied_heads_are_saved_under_both_names(tmp_path):
    model = base(make=Tied)
    inject_lora(model, ["body"])
    freeze_base_params(model)
    randomise_adapters(model)
    model.head.weight.requires_grad_(True)
    with torch.no_grad():
        model.head.weight.mul_(2.0)
    save_pretrained(model, tmp_path)
    torch.testing.assert_close(in_peft(tmp_path, Tied)(X), model(X))
    mine = base(make=Tied)
    from_pretrained(mine, tmp_path)
    assert torch.equal(mine(X), model(X))


@pytest.mark.parametrize("heads", [["head"], ["head", "embed"]], ids=str)
def test_heads_that_peft_untied_are_not_loaded_into_tied_ones(heads, tmp_path):
    theirs = peft_adapted(Tied, target_modules=["body"], modules_to_save=heads)
    theirs.save_pretrained(tmp_path)
    tied = base(make=Tied)
    with pytest.raises(CheckpointError, match=r"modules_to_save: \w+.weight is tied to \w+.weight"):
        from_pretrained(tied, tmp_path)
    assert not any(isinstance(module, LoRALinear) for module in tied.modules())
    tied.head.weight = nn.Parameter(tied.head.weight.detach().clone())
    from_pretrained(tied, tmp_path)
    torch.testing.assert_close(tied(X), theirs(X))


def test_what_the_format_cannot_store_is_refused_when_saving(tmp_path):
    cases = []
    with_base = adapted()
    with_base.blocks[0].attn.to_qkv.original_linear.weight.requires_grad_(True)
    cases.append((with_base, "contains or is part of the adapted blocks.0.attn.to_qkv; freeze the"))
    with_parent = adapted()
    with_parent.blocks[0].attn.gate = nn.Parameter(torch.ones(1))
    cases.append(
        (with_parent, "blocks.0.attn.gate belongs to blocks.0.attn, which .*: it contains")
    )
    with_root = adapted()
    with_root.gate = nn.Parameter(torch.ones(1))
    cases.append((with_root, "model: gate belongs to the model itself, which .*; use save_adapter"))
    with_list = adapted()
    with_list.gates = nn.ParameterList([torch.ones(1)])
    cases.append((with_list, "gates trains and is a ParameterList"))
    shared = base()
    shared.blocks[1].attn.to_qkv = shared.blocks[0].attn.to_qkv
    inject_lora(shared)
    freeze_base_params(shared)
    cases.append((shared, "blocks.1.attn.to_qkv and blocks.0.attn.to_qkv are one module"))
    cases.append((base(), "has no adapters"))
    cases.append((LoRALinear(nn.Linear(2, 2)), "the model itself is the adapted layer"))
    for model, message in cases:
        with pytest.raises(CheckpointError, match=message):
            save_pretrained(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_failed_save_leaves_the_old_folder(tmp_path, monkeypatch):
    save_pretrained(adapted(), tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in (CARD, CONFIG, WEIGHTS)}
    real = type(tmp_path).open

    def full(path, mode="r", **options):
        if CONFIG in path.name and mode == "xb":
            raise OSError("no space left on device")
        return real(path, mode, **options)

    monkeypatch.setattr(type(tmp_path), "open", full)
    with pytest.raises(CheckpointError, match=f"cannot write .*{CONFIG}.*no space left"):
        save_pretrained(adapted(alpha=99.0), tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="folder: cannot create"):
        save_pretrained(adapted(), tmp_path / "file")


# PEFT → fastlora


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["to_qkv", "blocks.0.mlp.mlp.0"]},
        {"target_modules": r".*\.(to_out|mlp\.2)"},
        {"target_modules": "all-linear"},
        {"target_modules": ["to_qkv", "to_out"], "exclude_modules": ["1.attn.to_out"]},
        {"target_modules": ["to_qkv", "to_out"], "exclude_modules": r"blocks\.0.*qkv"},
        {
            "target_modules": ["to_qkv"],
            "layers_to_transform": [1],
            "layers_pattern": ["x", "blocks"],
        },
        {"target_modules": ["to_qkv"], "layers_to_transform": 0, "layers_pattern": "blocks"},
        {"target_modules": ["to_qkv", "to_out"], "rank_pattern": {"to_qkv": 2, "1.attn.to_out": 3}},
        {"target_modules": ["to_out"], "alpha_pattern": {"^blocks.0.attn.to_out": 32}},
        {"target_modules": ["to_out"], "use_rslora": True, "lora_alpha": 3},
        {"target_modules": ["to_qkv"], "lora_dropout": 0.5, "init_lora_weights": "gaussian"},
        {"target_modules": ["to_qkv", "out_layer"], "modules_to_save": ["out_layer"]},
    ],
    ids=str,
)
def test_our_output_equals_pefts_after_loading(options, tmp_path):
    theirs = peft_adapted(**options)
    theirs.save_pretrained(tmp_path)
    mine = base()
    result = from_pretrained(mine, tmp_path)
    same(mine, theirs, X)
    assert set(result.loaded) == set(load_file(tmp_path / WEIGHTS))
    wrapped = {n for n, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert wrapped == {path for path, _ in named_lora_layers(mine)}
    assert all(
        p.requires_grad
        == ("lora_" in n or n.startswith("out_layer.") and "modules_to_save" in options)
        for n, p in mine.named_parameters()
    )


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = Decoder()

    def forward(self, x):
        return self.model(x)


def test_layers_to_transform_uses_the_first_index_below_a_named_parent(tmp_path):
    options = {"target_modules": ["to_qkv", "mlp.0"], "layers_to_transform": [1]}
    theirs = peft_adapted(Nested, **options)
    theirs.save_pretrained(tmp_path)
    mine = base(make=Nested)
    from_pretrained(mine, tmp_path)
    torch.testing.assert_close(mine(X), theirs(X))
    assert [path for path, _ in named_lora_layers(mine)] == [
        "model.blocks.1.attn.to_qkv",
        "model.blocks.1.mlp.mlp.0",
    ]
    refused(tmp_path, "matches no layer of the model")  # PEFT too finds no index in `blocks.1…`


def write(folder, config, state=None):
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text(config if isinstance(config, str) else json.dumps(config))
    if state is not None:
        save_file(state, folder / WEIGHTS, {"format": "pt"})
    return folder


def good(tmp_path):
    """(config, state) of an adapter that loads."""
    save_pretrained(adapted(["to_qkv"]), tmp_path / "good")
    config = json.loads((tmp_path / "good" / CONFIG).read_text())
    return config, load_file(tmp_path / "good" / WEIGHTS)


def refused(folder, message):
    model = base()
    before = copy.deepcopy(model)
    with pytest.raises(CheckpointError, match=message) as raised:
        from_pretrained(model, folder)
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    assert all(torch.equal(v, before.state_dict()[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    return str(raised.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type: expected 'LORA', got 'LOHA'"),
        ({"lora_bias": True}, "lora_bias=True is not supported"),
        ({"bias": "all"}, "bias='all' is not supported"),
        ({"trainable_token_indices": [1]}, r"trainable_token_indices=\[1\] is not supported"),
        ({"layer_replication": [[0, 1]]}, "layer_replication=.* is not supported"),
        ({"alora_invocation_tokens": [3]}, r"alora_invocation_tokens=\[3\] is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not supported"),
        ({"something_new": "x"}, "something_new='x' is not supported"),
        ({"r": 0}, "rank: expected an integer"),
        ({"r": "8"}, "r: expected int, got '8'"),
        ({"lora_alpha": "8"}, "lora_alpha: expected float, got '8'"),
        ({"lora_dropout": 1.5}, "dropout: expected a probability"),
        ({"rank_pattern": {"x": 0}}, "rank: expected an integer"),
        ({"rank_pattern": {"x": "4"}}, r"rank_pattern: expected dict\[str, int\], got"),
        ({"rank_pattern": {"(": 4}}, r"'\(' is not a valid regex"),
        ({"alpha_pattern": [1]}, r"alpha_pattern: expected dict\[str, float\], got"),
        ({"alpha_pattern": {"x": float("inf")}}, "alpha: expected a finite number"),
        ({"use_rslora": "yes"}, "use_rslora: expected bool, got 'yes'"),
        ({"target_modules": None}, "target_modules: expected a list or a regex, got none"),
        ({"target_modules": []}, "target_modules: expected a list or a regex"),
        ({"target_modules": [1]}, r"target_modules: expected str . list\[str\], got \[1\]"),
        ({"target_modules": "("}, r"'\(' is not a valid regex"),
        ({"target_modules": ["to_qvk"]}, "matches no layer of the model .nearest: to_qkv"),
        (
            {"target_modules": ["attn"]},
            "cannot adapt blocks.0.attn: expected one of linear, conv, embedding, got Attention",
        ),
        ({"exclude_modules": 3}, r"exclude_modules: expected str . list\[str\] . None, got 3"),
        (
            {"modules_to_save": "out_layer"},
            r"modules_to_save: expected list\[str\] . None, got 'out",
        ),
        (
            {"modules_to_save": ["qkv"]},
            "modules_to_save: blocks.0.attn.to_qkv contains or is part of",
        ),
        ({"layers_to_transform": ["0"]}, r"layers_to_transform: expected int . list\[int\]"),
        (
            {"layers_to_transform": [0], "target_modules": ".*to_qkv"},
            "layers_to_transform: needs a list",
        ),
        ({"layers_pattern": 1}, r"layers_pattern: expected str . list\[str\] . None, got 1"),
    ],
    ids=str,
)
def test_unsupported_config_values_are_refused(change, message, tmp_path):
    config, state = good(tmp_path)
    refused(write(tmp_path / "invalid", config | change, state), message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a readable JSON file"),
        ('{"peft_type": "LORA", "r": ', "not a readable JSON file"),
        ("[" * 100_000, "not a readable JSON file"),
        ("[1, 2]", "expected a JSON object, got list"),
        ("{}", "peft_type: expected 'LORA', got None"),
    ],
    ids=["empty", "cut", "deep", "list", "no type"],
)
def test_damaged_configs_raise_one_clear_line(text, message, tmp_path):
    _, state = good(tmp_path)
    error = refused(write(tmp_path / "invalid", text, state), message)
    assert "\n" not in error and CONFIG in error


def test_damaged_or_missing_weights(tmp_path):
    config, state = good(tmp_path)
    refused(tmp_path / "nowhere", f"no such file: .*{CONFIG}")
    folder = write(tmp_path / "invalid", config)
    (folder / "adapter_model.bin").write_bytes(b"\x80\x05.")  # a pickle is never opened
    refused(folder, f"no such file: .*{WEIGHTS}; only safetensors are read")
    data = (tmp_path / "good" / WEIGHTS).read_bytes()
    for cut in (b"", data[: len(data) // 2], b"\xff" * 64):
        (folder / WEIGHTS).write_bytes(cut)
        refused(folder, "not a readable safetensors file")


def test_keys_and_shapes_must_fit_and_the_nearest_is_named(tmp_path):
    config, state = good(tmp_path)
    key = "base_model.model.blocks.0.attn.to_qkv.lora_A.weight"
    renamed = {k.replace("base_model.model.", "model."): v for k, v in state.items()}
    assert "8 problems, nothing was changed" in refused(
        write(tmp_path / "a", config, renamed),
        f"missing {key} .nearest: model.blocks.0.attn.to_qkv.lora_A.weight",
    )
    refused(
        write(tmp_path / "b", config | {"r": 5}, state),
        rf"{key}: expected shape \(5, 16\), got \(4, 16\)",
    )
    extra = state | {"base_model.model.blocks.0.attn.to_out.lora_A.weight": torch.zeros(4, 16)}
    refused(
        write(tmp_path / "c", config, extra),
        "unexpected base_model.model.blocks.0.attn.to_out.lora_A.weight .nearest: base_model",
    )
    refused(
        write(tmp_path / "d", config | {"modules_to_save": ["out_layer"]}, state),
        "missing base_model.model.out_layer.weight",
    )
    dora = state | {"base_model.model.blocks.0.attn.to_qkv.lora_magnitude_vector": torch.zeros(48)}
    refused(write(tmp_path / "e", config, dora), "unexpected .*lora_magnitude_vector")


def test_base_parameters_in_the_file_are_loaded(tmp_path):
    """PEFT adds the embeddings when the vocabulary was resized."""
    config, state = good(tmp_path)
    weight = torch.full((16, 8), 0.5)
    write(tmp_path / "x", config, state | {"base_model.model.input_layer.weight": weight})
    mine = base()
    from_pretrained(mine, tmp_path / "x")
    assert torch.equal(mine.input_layer.weight, weight)
    assert not mine.input_layer.weight.requires_grad
    same(mine, in_peft(tmp_path / "x"), X)


def test_a_model_with_adapters_or_a_shared_target_is_refused(tmp_path):
    good(tmp_path)
    with pytest.raises(CheckpointError, match="already has adapters"):
        from_pretrained(adapted(), tmp_path / "good")
    with pytest.raises(CheckpointError, match="input_layer.weight is on the meta device"):
        from_pretrained(base().to("meta"), tmp_path / "good")
    shared = base()
    shared.blocks[1].attn.to_qkv = shared.blocks[0].attn.to_qkv
    with pytest.raises(CheckpointError, match="are one module"):
        from_pretrained(shared, tmp_path / "good")
    assert not any(isinstance(m, LoRALinear) for m in shared.modules())


# a folder whose two files are of different saves


class Killed(BaseException):
    """Nothing catches it, as nothing catches the end of a process."""


def save_killed_between_the_renames(model, folder, monkeypatch):
    """`save_pretrained` that moves one file into place and then ends; returns the name of the file."""
    moved = []

    def replace(source, target, rename=os.replace):
        if moved:
            raise Killed
        moved.append(target.name)
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(Killed):
            save_pretrained(model, folder)
    return moved[0]


def with_head():
    model = adapted()
    model.out_layer.requires_grad_(True)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: adapted(alpha=4.0), "blocks.0.attn.to_(qkv|out): alpha is 8 in the config, .* 4"),
        (lambda: adapted(rank=2), "(alpha|rank) is"),
        (lambda: adapted(use_rslora=True), "use_rslora is False in the config, .* with True"),
        (lambda: adapted(alpha_pattern={"blocks.1": 3.0}), "blocks.1.attn.* alpha is 8 in .* 3.0"),
        (lambda: adapted(dropout=0.5), "dropout is 0.0 in the config, .* saved with 0.5"),
        (with_head, r"modules_to_save is None in the config, .* with \['out_layer'\]"),
    ],
)
@pytest.mark.parametrize("old_by", ["fastlora", "peft"])
def test_new_weights_beside_an_old_config_are_refused(make, message, old_by, tmp_path, monkeypatch):
    if old_by == "fastlora":
        save_pretrained(adapted(), tmp_path)
    else:
        peft_adapted(target_modules=["to_qkv", "to_out"]).save_pretrained(tmp_path)
    assert save_killed_between_the_renames(make(), tmp_path, monkeypatch) == WEIGHTS
    model = base()
    for read in (lambda: from_pretrained(model, tmp_path), lambda: read_adapter(tmp_path)):
        with pytest.raises(CheckpointError, match=f"are not of the same save: .*{message}"):
            read()
    assert not list(named_lora_layers(model))
    save_pretrained(make(), tmp_path)  # saving again mends it
    from_pretrained(model, tmp_path)
    assert torch.equal(model(X), make().eval()(X))


def test_a_save_killed_before_the_first_rename_leaves_the_old_folder(tmp_path, monkeypatch):
    save_pretrained(adapted(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def replace(source, target):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(Killed):
            save_pretrained(adapted(rank=2), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_that_peft_saves_again_has_no_mark_and_loads(tmp_path):
    save_pretrained(adapted(alpha=4.0), tmp_path / "ours")
    theirs = in_peft(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / CONFIG).read_text()) | {"lora_alpha": 2}
    (tmp_path / "theirs" / CONFIG).write_text(json.dumps(config))
    mine = base()
    from_pretrained(mine, tmp_path / "theirs")
    assert {layer.alpha for _, layer in named_lora_layers(mine)} == {2}


def test_a_hostile_path_in_the_mark_is_not_matched_without_a_time_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(check_regexes, "__defaults__", (0.5,))
    save_pretrained(adapted(), tmp_path)
    mark = {"fastlora": json.dumps({"layers": {"a" * 60: {}}}), "format": "pt"}
    save_file(load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS, mark)
    config = json.loads((tmp_path / CONFIG).read_text()) | {"rank_pattern": {r"(\w+\.?)+!": 4}}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="takes more than 0.5 s to match"):
        from_pretrained(base(), tmp_path)


class Language(nn.Module):
    """An embedding, a body and an output head, tied or not."""

    def __init__(self, tied=False):
        super().__init__()
        self.embed_tokens, self.body = nn.Embedding(12, 8), nn.Linear(8, 8)
        self.lm_head = nn.Linear(8, 12, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight

    def get_input_embeddings(self):
        return self.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, ids):
        return self.lm_head(self.body(self.embed_tokens(ids)))


IDS = torch.arange(12).view(2, 6)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "targets", [["lm_head", "body"], ["embed_tokens", "body"], ["embed_tokens", "lm_head"]]
)
@pytest.mark.filterwarnings("ignore::UserWarning:peft")  # about tied weights and embeddings
def test_adapters_of_output_heads_and_embeddings_load_with_the_weights_that_peft_writes(
    targets, tied, tmp_path
):
    theirs = peft_adapted(lambda: Language(tied), target_modules=targets)
    with torch.no_grad():  # as a resized or trained vocabulary
        theirs.base_model.model.get_submodule(targets[0]).base_layer.weight.mul_(1.5)
    theirs.save_pretrained(tmp_path / "theirs")
    keys = load_file(tmp_path / "theirs" / WEIGHTS)
    assert any(".base_layer.weight" in key for key in keys)
    mine = base(make=lambda: Language(tied))
    from_pretrained(mine, tmp_path / "theirs")
    assert torch.equal(mine(IDS), theirs(IDS))
    for name, source in (("own.safetensors", "theirs"), ("back", "own.safetensors")):
        form = "peft" if name == "back" else "fastlora"
        paths = [str(tmp_path / source), str(tmp_path / name)]
        assert main(["convert", *paths, "--to", form]) == 0
    back = load_file(tmp_path / "back" / WEIGHTS)
    assert back.keys() == keys.keys() and all(torch.equal(back[k], keys[k]) for k in keys)
    twin = base(make=lambda: Language(tied))
    kinds = ("linear", "embedding")
    inject_lora(twin, LoRAConfig(target_modules=targets, rank=4, alpha=8.0, kinds=kinds))
    load_adapter(twin, tmp_path / "own.safetensors")
    assert torch.equal(twin(IDS), theirs(IDS))


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_a_merge_keeps_the_update_of_a_head_whose_weight_peft_wrote(tmp_path):
    theirs = peft_adapted(Language, target_modules=["lm_head", "body"])
    with torch.no_grad():
        theirs.base_model.model.lm_head.base_layer.weight.mul_(1.5)
    theirs.save_pretrained(tmp_path / "theirs")
    save_file(base(make=Language).state_dict(), tmp_path / "base.safetensors")
    files = [str(tmp_path / name) for name in ("base.safetensors", "theirs", "out.safetensors")]
    assert main(["merge", *files]) == 0
    merged = Language()
    merged.load_state_dict(load_file(files[2]))
    exact = copy.deepcopy(theirs).double()(IDS)
    assert_close(merged(IDS), theirs(IDS), exact)


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_a_named_adapter_may_bring_the_unchanged_weight_of_a_head(tmp_path):
    model = base(make=Language)
    add_adapter(model, "first", ["body"])
    theirs = peft_adapted(Language, target_modules=["lm_head"])
    theirs.save_pretrained(tmp_path / "same")
    from_pretrained(model, tmp_path / "same", adapter="second")
    set_adapter(model, "second")
    assert torch.equal(model(IDS), theirs(IDS))
    with torch.no_grad():
        theirs.base_model.model.lm_head.base_layer.weight.mul_(1.5)
    theirs.save_pretrained(tmp_path / "changed")
    with pytest.raises(CheckpointError, match="also holds .*lm_head.base_layer.weight"):
        from_pretrained(model, tmp_path / "changed", adapter="third")


@pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore:`is_gradient_ch:FutureWarning")
def test_ensure_weight_tying_is_accepted_where_ties_are_kept(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 12, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=True)

    def make():
        return transformers.LlamaForCausalLM(config)

    def tying(**options):
        return peft_adapted(make, ensure_weight_tying=True, **options)

    theirs = tying(target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    theirs.save_pretrained(tmp_path / "head")
    mine = base(make=make)
    from_pretrained(mine, tmp_path / "head")
    assert torch.equal(mine(IDS).logits, theirs(IDS).logits)
    assert mine.lm_head.weight is mine.model.embed_tokens.weight
    tying(target_modules=["embed_tokens"]).save_pretrained(tmp_path / "target")
    with pytest.raises(CheckpointError, match="ensure_weight_tying: model.embed_tokens is tied"):
        from_pretrained(base(make=make), tmp_path / "target")


def test_a_full_path_is_adapted_whatever_its_index(tmp_path):
    targets = ["blocks.1.attn.to_out", "to_qkv"]
    theirs = peft_adapted(target_modules=targets, layers_to_transform=[0], layers_pattern="blocks")
    theirs.save_pretrained(tmp_path)
    mine = base()
    from_pretrained(mine, tmp_path)
    assert [path for path, _ in named_lora_layers(mine)] == [
        "blocks.0.attn.to_qkv",
        "blocks.1.attn.to_out",
    ]
    same(mine, theirs, X)
