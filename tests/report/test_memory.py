"""`estimate`: parameters and optimizer against torch's own numbers, saved bytes against saved-tensor hooks."""

import peft
import pytest
import torch
from torch import nn

from fastlora import (
    ConfigError,
    InjectionError,
    LoRAConfig,
    LoRALinear,
    estimate,
    freeze_base_params,
    get_lora_params,
    inject_lora,
)
from fastlora.report.memory import format_bytes, shape_of
from tests.support.models import Decoder

M, K, N, R = 64, 32, 48, 4


def saved(model, x):
    """Bytes of distinct storage saved for the backward pass, without parameters."""
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            storages[storage.data_ptr()] = (storage.nbytes(), storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(size for size, _ in storages.values())


@pytest.mark.parametrize("hooked", [False, True], ids=["plain", "hooked"])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layers_saved_bytes_are_what_hooks_count(dtype, dropout, hooked):
    layer = LoRALinear(nn.Linear(K, N, dtype=dtype), R, dropout=dropout)
    layer.original_linear.requires_grad_(False)
    if hooked:
        layer.original_linear.register_forward_hook(lambda *_: None)
    x = torch.randn(M, K, dtype=dtype, requires_grad=True)
    shape = shape_of(layer)
    assert shape.saved_bytes(M) == saved(layer, x)
    assert shape.saved_beyond_input_bytes(M) == saved(layer, x) - x.nbytes


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pefts_saved_bytes_are_what_hooks_count(dtype, dropout):
    config = peft.LoraConfig(r=R, lora_dropout=dropout, target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(K, N, dtype=dtype)), config)
    x = torch.randn(M, K, dtype=dtype, requires_grad=True)
    layer = LoRALinear(nn.Linear(K, N, dtype=dtype), R, dropout=dropout)
    assert shape_of(layer).peft_saved_bytes(M) == saved(theirs, x)


def test_a_weight_that_is_read_saves_the_merged_weight():
    layer = LoRALinear(nn.Linear(K, N), R)
    layer.original_linear.requires_grad_(False)
    x = torch.randn(M, K, requires_grad=True)
    read = nn.Module()
    read.layer = layer
    read.forward = lambda x: nn.functional.linear(x, layer.weight, layer.bias)
    assert shape_of(layer, weight_read=True).saved_bytes(M) == saved(read, x)
    attention = nn.MultiheadAttention(K, 4)
    inject_lora(attention, ["out_proj"])
    assert estimate(attention, M).saved_bytes == 4 * (M * K + K * K)


class Wide(nn.Module):
    """Two adapted layers with separate inputs, and nothing else that saves tensors."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(K, N), nn.Linear(K, N)

    def forward(self, xs):
        return self.first(xs[0]) + self.second(xs[1])


def test_a_models_saved_bytes_are_an_upper_bound_that_separate_inputs_reach():
    model = Wide()
    inject_lora(model, "all-linear", rank=R, dropout=0.25)
    freeze_base_params(model)
    count = estimate(model, M)
    a, b = (torch.randn(M, K, requires_grad=True) for _ in range(2))
    assert count.saved_bytes == saved(model, (a, b))
    assert count.saved_beyond_input_bytes < saved(model, (a, a)) < count.saved_bytes
    assert count.saved_beyond_input_bytes == saved(model, (a, b)) - a.nbytes - b.nbytes


STEPS = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "adagrad": torch.optim.Adagrad,
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
}


@pytest.mark.parametrize("name", STEPS)
def test_parameters_gradients_and_optimizer_are_exact(name):
    model = Decoder().to(torch.bfloat16)
    inject_lora(model)
    freeze_base_params(model)
    model.out_layer.bias.requires_grad_(True)
    trained = [p for p in model.parameters() if p.requires_grad]
    count = estimate(model, M, optimizer=name)
    optimizer = STEPS[name](trained)
    model(torch.randn(3, 8, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    state = [t for values in optimizer.state.values() for t in values.values() if t is not None]
    assert count.trainable_bytes == sum(p.nbytes for p in trained)
    assert count.frozen_bytes == sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    assert count.gradient_bytes == sum(p.grad.nbytes for p in trained)
    assert count.optimizer_bytes == sum(t.nbytes for t in state)
    parts = (count.trainable_bytes, count.frozen_bytes, count.gradient_bytes, count.optimizer_bytes)
    assert count.total_bytes == sum(parts) + count.saved_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_config_counts_as_the_injected_model_does(device, dtype):
    config = LoRAConfig(["to_qkv", "mlp"], rank=8, dropout=0.1, rank_pattern={"mlp": 2})
    with torch.device(device):
        model = Decoder().to(dtype)
        planned = estimate(model, M, config)
        assert not get_lora_params(model)
        inject_lora(model, config)
    freeze_base_params(model)
    assert planned == estimate(model, M)
    assert planned.layers == 6 and planned.rows == M
    listed = estimate(Decoder(), M, ["to_qkv"])
    assert listed.layers == 2


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_a_config_counts_what_trains_besides_the_adapters(bias):
    config = LoRAConfig(["to_qkv"], bias=bias, modules_to_save=["out_layer"])
    model = Decoder()
    planned = estimate(model, M, config)
    inject_lora(model, config)
    freeze_base_params(model)
    assert planned == estimate(model, M)
    with pytest.raises(InjectionError, match="modules_to_save: 'out_lair' is not a module"):
        estimate(Decoder(), M, LoRAConfig(["to_qkv"], modules_to_save=["out_lair"]))


class Own(nn.Linear):
    def forward(self, x):
        return super().forward(x)


def test_a_config_covers_wrapped_calls_and_weights_that_are_read():
    config = LoRAConfig("all-linear", dropout=0.5)
    hooked = nn.Linear(8, 8)
    hooked.register_forward_hook(lambda *_: None)
    for model in (nn.Sequential(Own(8, 8)), nn.Sequential(hooked), nn.MultiheadAttention(8, 2)):
        planned = estimate(model, M, config)
        if isinstance(model, nn.MultiheadAttention):
            with pytest.warns(UserWarning, match="dropout has no effect"):
                inject_lora(model, config)
        else:
            inject_lora(model, config)
        freeze_base_params(model)
        assert estimate(model, M).saved_bytes == planned.saved_bytes
        plain = estimate(nn.Sequential(nn.Linear(8, 8)), M, config).saved_bytes
        assert (planned.saved_bytes == plain) != isinstance(model, nn.MultiheadAttention)


def test_the_text_names_every_part():
    model = Decoder()
    text = str(estimate(model, 4096, ["to_qkv"], "sgd"))
    assert text.splitlines()[0].split() == ["frozen", "parameters", "18.83", "KiB"]
    assert round(sum(p.nbytes for p in model.parameters()) / 1024, 2) == 18.83
    assert "optimizer (sgd)" in text and "saved by 2 adapted layers, 4,096 rows" in text
    assert "at most; 128 KiB beyond their inputs; PEFT at most 640 KiB" in text
    assert [format_bytes(n) for n in (0, 1023, 1536, 3 << 20, 5 << 40)] == [
        *("0 B", "1023 B", "1.5 KiB", "3 MiB", "5 TiB")
    ]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((Decoder(), 0, ["to_qkv"]), ConfigError, "rows: expected an integer ≥ 1, got 0"),
        ((Decoder(), 1, ["to_qkv"], "lion"), ConfigError, "optimizer: expected one of adamw"),
        ((Decoder(), 1), InjectionError, "has no adapters; pass the config"),
        ((Decoder(), 1, ["to_qvk"]), InjectionError, "matches none"),
        ((Decoder(), 1, LoRAConfig(["mlp", "zz"])), InjectionError, "'zz' matches none"),
        (
            (nn.Sequential(nn.LazyLinear(2), nn.Linear(2, 2)), 1, ["1"]),
            InjectionError,
            "0.weight has",
        ),
        ((nn.Sequential(LoRALinear(nn.Linear(2, 2))), 1, ["0"]), InjectionError, "already has 1"),
    ],
)
def test_invalid_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        estimate(*arguments)
