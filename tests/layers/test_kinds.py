"""Adapters of layers that are not `nn.Linear`: convolutions, embeddings, transformers' Conv1D."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastlora import (
    BackendError,
    ConfigError,
    InjectionError,
    LoRAConfig,
    LoRAConv,
    LoRAEmbedding,
    LoRATransposedLinear,
    add_adapter,
    base_state_dict,
    check,
    combine_adapters,
    count_parameters,
    disable_adapter,
    estimate,
    explain,
    freeze_base_params,
    from_pretrained,
    get_lora_state_dict,
    inject_lora,
    load_adapter,
    merge_lora_weights,
    merge_report,
    merged_model,
    named_lora_layers,
    preview,
    save_adapter,
    save_pretrained,
    set_adapter,
)
from tests.support.tolerance import assert_close, assert_differs

KINDS = ("linear", "conv", "embedding")

CONVS = {
    "1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    "strided": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), bias=False), (2, 4, 9, 8)),
    "dilated": (lambda: nn.Conv2d(4, 6, 3, dilation=(1, 2), padding="same"), (2, 4, 9, 8)),
    "circular": (lambda: nn.Conv2d(4, 6, 3, padding=2, padding_mode="circular"), (2, 4, 9, 8)),
    "reflect": (lambda: nn.Conv1d(4, 6, 5, padding=4, padding_mode="reflect"), (4, 9)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding_mode="replicate"), (2, 4, 9, 8)),
    "depthwise": (lambda: nn.Conv1d(4, 8, 3, groups=4), (2, 4, 9)),
    "3d": (lambda: nn.Conv3d(4, 6, (1, 3, 3), padding=(0, 1, 1)), (2, 4, 3, 5, 5)),
}


def randomised(layer):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for factor in (layer.lora_A, layer.lora_B):
            factor.copy_(torch.randn(factor.shape, generator=generator) * 0.3)
    return layer


@pytest.mark.parametrize("name", CONVS)
def test_a_convolution_computes_what_its_merged_weight_does(name):
    make, shape = CONVS[name]
    conv, x = make(), torch.randn(shape)
    layer = LoRAConv(conv, rank=4, alpha=6.0)
    assert torch.equal(layer(x), conv(x))
    randomised(layer)
    merged = layer.merge_weights()
    assert type(merged) is type(conv) and merged.weight.shape == conv.weight.shape
    wide = copy.deepcopy(layer).double()
    assert_close(layer(x), merged(x), wide(x.double()))
    assert_close(wide(x.double()), wide.merge_weights()(x.double()), wide(x.double()))
    assert_differs(layer(x), conv(x))
    assert torch.equal(layer.weight, merged.weight)
    for own in conv.__constants__:  # other code may read its stride and other arguments
        if own not in ("transposed", "output_padding"):
            assert getattr(layer, own) == getattr(conv, own), own
    report = merge_report(nn.Sequential(layer))
    assert report.ok and report.layers[0].skipped is None


def test_a_convolutions_update_is_two_convolutions():
    conv = nn.Conv2d(4, 6, 3, padding=1)
    layer = randomised(LoRAConv(conv, rank=2, alpha=6.0)).double()
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    update = F.conv2d(F.conv2d(x, layer.lora_A, padding=1), layer.lora_B)
    assert_close(layer(x), conv(x) + 3 * update, conv(x) + 3 * update)


def test_dropout_of_a_convolution_is_on_the_update_only():
    layer = LoRAConv(nn.Conv1d(4, 6, 3), dropout=0.5)
    x = torch.randn(2, 4, 9)
    assert torch.equal(layer(x), layer.original_layer(x))
    randomised(layer)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


@pytest.mark.parametrize("padding_idx", [None, 1])
def test_an_embedding_computes_what_its_merged_weight_does(padding_idx):
    embedding = nn.Embedding(11, 6, padding_idx=padding_idx)
    ids = torch.tensor([[0, 1, 10], [4, 4, 1]])
    layer = LoRAEmbedding(embedding, rank=3, alpha=6.0, dropout=0.5)
    assert layer.dropout == 0.0
    assert torch.equal(layer(ids), embedding(ids)) and not layer.lora_A.any()
    layer(ids).square().sum().backward()
    assert layer.lora_A.grad.any() and (layer.lora_A.grad[:, 2] == 0).all()
    assert (layer.num_embeddings, layer.embedding_dim, layer.padding_idx) == (11, 6, padding_idx)
    if padding_idx is not None:
        assert not layer.lora_A.grad[:, padding_idx].any()
    randomised(layer)
    wide = copy.deepcopy(layer).double()
    rows = wide.lora_A.T[ids] @ wide.lora_B.T
    reference = wide.original_layer(ids) + 2 * rows
    assert_close(layer(ids), layer.merge_weights()(ids), reference)
    assert merge_report(nn.Sequential(layer)).ok


def conv1d():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    layer = transformers.pytorch_utils.Conv1D(6, 4)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer


def test_conv1d_of_transformers_uses_the_fused_path_and_keeps_its_orientation():
    base = conv1d()
    layer = LoRATransposedLinear(base, rank=2, alpha=4.0, dropout=0.3)
    assert (layer.in_features, layer.out_features) == (4, 6)
    x = torch.randn(2, 5, 4)
    assert explain(layer, x).plan == "in_place"
    same = base(x)
    assert_close(layer(x), same, copy.deepcopy(base).double()(x.double()))
    randomised(layer).eval()
    merged = layer.merge_weights()
    assert type(merged) is type(base) and merged.weight.shape == (4, 6)
    assert merged.weight.is_contiguous()  # safetensors refuses to save anything else
    wide = copy.deepcopy(layer).double()(x.double())
    assert_close(layer(x), merged(x), wide)
    assert_close(x @ layer.weight + layer.bias, merged(x), wide)
    assert merge_report(nn.Sequential(layer)).ok
    hook = base.register_forward_hook(lambda *_: None)
    assert explain(layer, x).plan == "wrapped"
    assert_close(layer(x), merged(x), wide)
    hook.remove()
    layer.train()
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    linear = nn.Linear(4, 6)
    linear.load_state_dict({"weight": base.weight.T, "bias": base.bias})
    from fastlora import LoRALinear

    twin = LoRALinear(linear, rank=2, alpha=4.0, dropout=0.3)
    twin.lora_A, twin.lora_B = layer.lora_A, layer.lora_B
    torch.manual_seed(1)
    assert_close(y, twin(x), y.double())


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(13, 4)
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.proj = nn.Linear(4, 5)

    def forward(self, ids):
        x = self.embed(ids).transpose(-1, -2)
        return self.proj(self.conv(x).transpose(-1, -2))


IDS = torch.arange(24).view(2, 12) % 13
EVERY = LoRAConfig(["embed", "conv", "proj"], rank=2, kinds=KINDS)


def mixed():
    torch.manual_seed(0)
    model = Mixed()
    assert inject_lora(model, EVERY) == 3
    for _, layer in named_lora_layers(model):
        randomised(layer)
    freeze_base_params(model)
    return model


def test_kinds_limit_what_patterns_may_match():
    model = Mixed()
    assert inject_lora(copy.deepcopy(model), "all-linear") == 1
    with pytest.raises(InjectionError, match="It matches the Conv1d conv, if kinds has 'conv'"):
        inject_lora(model, LoRAConfig(["conv"]))
    assert inject_lora(model, EVERY) == 3
    assert [type(layer).__name__ for _, layer in named_lora_layers(model)] == [
        "LoRAEmbedding",
        "LoRAConv",
        "LoRALinear",
    ]
    statuses = [row.status for row in explain(model).rows]
    assert statuses == ["adapted"] * 3


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # torch's own, while it traces
def test_every_function_supports_all_kinds(tmp_path):
    model = mixed()
    y, base = (
        model(IDS),
        Mixed().requires_grad_(False),
    )  # frozen like the model, so that the same algorithms run
    base.load_state_dict(base_state_dict(model))
    with disable_adapter(model):
        assert torch.equal(model(IDS), base(IDS))
    assert_differs(y, base(IDS))
    _, trainable = freeze_base_params(model)
    planned = estimate(base, 24, EVERY)
    assert estimate(model, 24).trainable_bytes == planned.trainable_bytes == 4 * trainable
    assert planned.uncounted == 2 and planned.layers == 3
    assert sum(row.trainable for row in preview(base, EVERY).rows) == trainable
    assert count_parameters(model)["lora"] == trainable
    assert check(model, IDS).ok
    wide = copy.deepcopy(model).double()(IDS)
    assert_close(y, merged_model(model)(IDS), wide)
    save_adapter(model, tmp_path / "adapter.safetensors")
    twin = copy.deepcopy(base)
    inject_lora(twin, EVERY)
    load_adapter(twin, tmp_path / "adapter.safetensors")
    assert torch.equal(twin(IDS), y)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(IDS), y)
    assert torch.equal(torch.compile(model, fullgraph=True, backend="eager")(IDS), y)
    merge_lora_weights(model)
    assert [type(m) for m in model.children()] == [nn.Embedding, nn.Conv1d, nn.Linear]


def test_a_check_finds_an_embedding_that_is_not_used():
    model = mixed()
    model.forward = lambda ids: model.proj(model.embed.original_layer(ids))
    assert {f.path for f in check(model, IDS).findings} == {"embed", "conv"}


def test_peft_reads_and_writes_all_kinds(tmp_path):
    peft = pytest.importorskip("peft")
    model = mixed()
    y, base = model(IDS), Mixed()
    base.load_state_dict(base_state_dict(model))
    wide = copy.deepcopy(model).double()(IDS)
    save_pretrained(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert_close(theirs(IDS), y, wide)
    theirs.save_pretrained(tmp_path / "theirs")
    from_pretrained(base, tmp_path / "theirs")
    assert get_lora_state_dict(base).keys() == get_lora_state_dict(model).keys()
    assert torch.equal(base(IDS), y)


class Own(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Scaled(nn.Embedding):
    def forward(self, ids):
        return 2 * super().forward(ids)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.ConvTranspose1d(2, 2, 3), "expected an nn.Conv1d, Conv2d or Conv3d, got ConvTranspose"),
        (nn.LazyConv2d(2, 3), "LazyConv2d has no weight yet"),
        (Own(2, 2, 3), "Own has a custom forward"),
        (nn.Conv1d(6, 6, 3, groups=3), "rank 4 is not a multiple of its groups=3"),
        (Scaled(4, 2), "Scaled has a custom forward"),
        (nn.Embedding(4, 2, max_norm=1.0), "max_norm=1.0, which changes the weight"),
    ],
)
def test_what_cannot_be_adapted_correctly_is_refused_by_name(layer, message):
    model = nn.Sequential(nn.Identity(), layer)
    config = LoRAConfig(["1"], kinds=KINDS)
    with pytest.raises(InjectionError, match=f"cannot adapt 1: .*{message}"):
        inject_lora(model, config)
    assert model[1] is layer
    assert preview(model, config).problems != ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora is for linear layers, not for a Conv1d"),
        ({"init_lora_weights": "pissa"}, "'pissa' is for linear layers, not for a Conv1d"),
        ({"init_lora_weights": "orthogonal"}, "'orthogonal' is for linear layers, not for a Conv"),
    ],
)
def test_what_only_linear_layers_have_is_refused_for_others(change, message):
    with pytest.raises(InjectionError, match=message):
        inject_lora(Mixed(), LoRAConfig(["conv"], kinds=KINDS, **change))


def test_invalid_arguments_are_named():
    with pytest.raises(BackendError, match="there is no kernel for Conv1d"):
        LoRAConv(nn.Conv1d(2, 2, 1), backend="triton")
    with pytest.raises(ConfigError, match="use_dora: is for linear layers, got Embedding"):
        LoRAEmbedding(nn.Embedding(2, 2), use_dora=True)
    with pytest.raises(ConfigError, match="rank: expected a multiple of groups=2, got 3"):
        LoRAConv(nn.Conv1d(2, 2, 1, groups=2), rank=3)
    with pytest.raises(InjectionError, match="expected an nn.Embedding, got Linear"):
        LoRAEmbedding(nn.Linear(2, 2))
    for invalid in ((), "conv", ["convs"]):
        with pytest.raises(ConfigError, match="kinds: expected some of linear, conv, embedding"):
            LoRAConfig(kinds=invalid)


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_named_adapters_go_with_every_kind(method):
    model = mixed()
    first = model(IDS)
    add_adapter(model, "b", EVERY, activate=True)
    for _, layer in named_lora_layers(model):
        randomised(layer)
    assert torch.equal(model(IDS), first)  # the same values in the same places
    rank = 4 if method == "svd" else None
    assert combine_adapters(model, {"default": 0.25, "b": 0.75}, "mean", method, rank) == 3
    set_adapter(model, "mean")
    assert_close(model(IDS), first, copy.deepcopy(model).double()(IDS))
    set_adapter(model, None)
    assert not list(named_lora_layers(model))


def test_gaussian_initialisation_works_on_meta():
    with torch.device("meta"):
        model = Mixed()
    assert inject_lora(model, LoRAConfig(["proj"], init_lora_weights="gaussian")) == 1
