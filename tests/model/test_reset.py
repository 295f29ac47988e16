"""`reset_lora_parameters`: new initial values, as after injection, for adapters that were built on meta."""

import pytest
import torch
from torch import nn

import fastlora
from fastlora import (
    ConfigError,
    InjectionError,
    LoRAConfig,
    LoRALinear,
    MergeError,
    add_adapter,
    check,
    freeze_base_params,
    fuse,
    get_lora_params,
    inject_lora,
    load_base_state_dict,
    merge_lora_weights,
    merge_report,
    merged_model,
    named_lora_layers,
    reset_lora_parameters,
    set_adapter,
)
from tests.support.models import Decoder, randomise_adapters
from tests.support.tolerance import assert_close, assert_differs

X = torch.linspace(-1, 1, 24).view(3, 8)
IDS = torch.tensor([[0, 1, 2, 3]])
TARGETS = ("to_qkv", "to_out")
METHODS = ("kaiming", "gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora")


def plain():
    torch.manual_seed(7)
    return Decoder()


def materialised(config):
    """A model built and injected on meta, with memory and the weights of `plain()`, but no values in the adapters."""
    with torch.device("meta"):
        model = Decoder()
    inject_lora(model, config)
    freeze_base_params(model)
    model.to_empty(device="cpu")
    load_base_state_dict(model, plain().state_dict())
    return model


CONFIGS = [LoRAConfig(TARGETS, init_lora_weights=method) for method in METHODS]
CONFIGS.append(LoRAConfig(TARGETS, use_dora=True))
NAMES = [*METHODS, "dora"]


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_a_model_built_on_meta_is_reset_to_what_injection_gives(config):
    model, injected = materialised(config), plain()
    parameters = get_lora_params(model)
    torch.manual_seed(3)
    inject_lora(injected, config)
    torch.manual_seed(3)
    assert reset_lora_parameters(model) == 4
    assert all(p is q for p, q in zip(parameters, get_lora_params(model), strict=True))
    for (path, got), (_, want) in zip(
        named_lora_layers(model), named_lora_layers(injected), strict=True
    ):
        for name in ("lora_A", "lora_B", "lora_magnitude", "initial_A", "initial_B"):
            mine, other = getattr(got, name), getattr(want, name)
            assert (mine is None) == (other is None), f"{path}.{name}"
            assert mine is None or torch.equal(mine, other), f"{path}.{name}"
    assert_close(model(X), plain()(X), plain().double()(X.double()))
    assert all(p.requires_grad for p in get_lora_params(model)) and check(model, X).ok


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_a_model_whose_weights_were_assigned_gets_its_adapters(config):
    with torch.device("meta"):
        model = Decoder()
    inject_lora(model, config)
    freeze_base_params(model)
    state = plain().state_dict()
    for path, _ in named_lora_layers(model):
        for name in ("weight", "bias"):
            state[f"{path}.original_linear.{name}"] = state.pop(f"{path}.{name}")
    model.load_state_dict(state, strict=False, assign=True)
    assert all(p.is_meta and p.requires_grad for p in get_lora_params(model))
    with pytest.raises(ConfigError, match="lora_[aA]: expected .* device cpu, got meta"):
        model(X)
    assert reset_lora_parameters(model) == 4
    assert_close(model(X), plain()(X), plain().double()(X.double()))
    assert all(p.requires_grad for p in get_lora_params(model)) and check(model, X).ok


def test_every_kind_of_layer_is_reset():
    def build():
        return nn.Sequential(nn.Embedding(5, 8), nn.Conv1d(4, 4, 3), nn.Linear(6, 2))

    with torch.device("meta"):
        model = build()
    kinds = ("linear", "conv", "embedding")
    inject_lora(model, LoRAConfig(("0", "1", "2"), match="exact", kinds=kinds))
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    base = build()
    load_base_state_dict(model, base.state_dict())
    assert model(IDS).isnan().all()
    reset_lora_parameters(model)
    assert_close(model(IDS), base(IDS), base.double()(IDS))
    assert model[0].lora_B.any() and model[1].lora_A.any() and model[2].lora_A.any()


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_a_materialised_adapter_that_nothing_reset_is_noticed(config):
    model = materialised(config)
    assert all(p.isnan().all() for p in get_lora_params(model))
    assert model(X).isnan().all()
    assert "after to_empty call reset_lora_parameters" in str(check(model, X))


def test_moving_and_casting_keep_the_values():
    model = plain()
    inject_lora(model, LoRAConfig(TARGETS, init_lora_weights="pissa"))
    randomise_adapters(model)
    want = [p.clone() for p in get_lora_params(model)]
    model.to("cpu").double().float()
    assert all(torch.equal(p, q) for p, q in zip(get_lora_params(model), want, strict=True))


def test_resetting_a_trained_adapter_gives_the_base_model_back():
    for config in CONFIGS:
        model = plain()
        inject_lora(model, config)
        randomise_adapters(model)
        assert_differs(model(X), plain()(X))
        reset_lora_parameters(model)
        assert_close(model(X), plain()(X), plain().double()(X.double()))


def test_only_the_active_adapter_is_reset():
    model = plain()
    inject_lora(model, LoRAConfig(TARGETS))
    randomise_adapters(model)
    want = model(X).detach()
    add_adapter(model, "b", LoRAConfig(TARGETS), activate=True)
    randomise_adapters(model)
    reset_lora_parameters(model)
    assert_close(model(X), plain()(X), plain().double()(X.double()))
    set_adapter(model, "default")
    assert torch.equal(model(X), want)


def test_what_cannot_be_reset_is_refused_by_name():
    with pytest.raises(InjectionError, match="has no adapters, so there is nothing to reset"):
        reset_lora_parameters(plain())
    with torch.device("meta"):
        model = Decoder()
    inject_lora(model, LoRAConfig(TARGETS))
    with pytest.raises(InjectionError, match=r"blocks.0.attn.to_qkv: its weight is on the meta"):
        reset_lora_parameters(model)
    model = plain()
    inject_lora(model, LoRAConfig(TARGETS))
    randomise_adapters(model)
    values = [p.clone() for p in get_lora_params(model)]
    layer = model.blocks[1].attn.to_out
    layer.initial_A, layer.initial_B = layer.lora_A.detach(), layer.lora_B.detach()
    with pytest.raises(InjectionError, match=r"blocks.1.attn.to_out: how its initial_A and"):
        reset_lora_parameters(model)
    assert all(torch.equal(p, q) for p, q in zip(get_lora_params(model), values, strict=True))


@pytest.mark.parametrize("base", ["linear", "dora", "conv", "embedding", "hooked"])
def test_a_factor_on_meta_is_refused_by_the_forward(base):
    makers = {
        "conv": lambda: fastlora.LoRAConv(nn.Conv1d(4, 4, 3)),
        "embedding": lambda: fastlora.LoRAEmbedding(nn.Embedding(5, 4)),
        "dora": lambda: LoRALinear(nn.Linear(4, 3), use_dora=True),
    }
    layer = makers.get(base, lambda: LoRALinear(nn.Linear(4, 3)))()
    if base == "hooked":
        layer.original_linear.register_forward_hook(lambda *_: None)
    x = IDS if base == "embedding" else torch.randn(2, 4, 4)
    assert layer(x).isfinite().all()
    for name in ("lora_A", "lora_B"):
        value = getattr(layer, name)
        setattr(layer, name, nn.Parameter(value.detach().to("meta")))
        for mode in (torch.no_grad, torch.enable_grad):
            with (
                mode(),
                pytest.raises(ConfigError, match=r"lora_[abAB]: expected .* device cpu, got meta"),
            ):
                layer(x)
        for read in (lambda: layer.weight, lambda: layer.delta(torch.float32)):
            with pytest.raises(ConfigError, match=f"{name}: expected the layer's device cpu"):
                read()
        for merge in (merge_lora_weights, merged_model, merge_report):
            with pytest.raises(MergeError, match=f"0: {name} is on meta, but the layer computes"):
                merge(nn.Sequential(layer))
        report = check(nn.Sequential(layer), x)
        assert f"{name} is on meta, but the layer computes on cpu" in str(report)
        setattr(layer, name, value)


def test_a_factor_on_meta_is_refused_inside_a_fused_group():
    class Siblings(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(16, 16), nn.Linear(16, 8)

        def forward(self, x):
            return self.q(x).sum() + self.k(x).sum()

    siblings, x = Siblings(), torch.randn(3, 16)
    inject_lora(siblings, ["q", "k"])
    assert fuse(siblings, x).groups == (("q", "k"),)
    for name in ("lora_A", "lora_B"):
        value = getattr(siblings.k, name)
        setattr(siblings.k, name, nn.Parameter(value.detach().to("meta")))
        with pytest.raises(ConfigError, match=f"{name}: expected the layer's device cpu, got meta"):
            siblings(x)
        setattr(siblings.k, name, value)
