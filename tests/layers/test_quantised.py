"""Bases quantised by bitsandbytes or torchao, or stored in float8, through the API. `test_transient.py` has how the product is computed."""

import copy
import warnings

import pytest
import torch
from torch import nn

from fastlora import (
    ConfigError,
    InjectionError,
    LoRAConfig,
    LoRALinear,
    MergeError,
    check,
    disable_adapter,
    estimate,
    explain,
    freeze_base_params,
    get_lora_params,
    inject_lora,
    load_adapter,
    merge_lora_weights,
    save_adapter,
)
from tests.support.models import Tokens, randomise_adapters
from tests.support.tolerance import assert_close, assert_differs

pytestmark = [
    # bitsandbytes multiplies 8 bits in float16; both packages look for libraries that a CPU does not need.
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torchao"),
]


def nf4(linear):
    nn4 = pytest.importorskip("bitsandbytes").nn
    layer = nn4.Linear4bit(linear.in_features, linear.out_features, compute_dtype=torch.float32)
    layer.weight = nn4.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
    layer.bias = linear.bias
    return layer.to("cpu")


def int8(linear):
    nn8 = pytest.importorskip("bitsandbytes").nn
    layer = nn8.Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False)
    layer.weight = nn8.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    layer.bias = linear.bias
    return layer.to("cpu")


def torchao_int8(linear):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization = pytest.importorskip("torchao.quantization")
        model = nn.Sequential(linear)
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model[0]


BASES = {"nf4": nf4, "int8": int8, "torchao": torchao_int8}


@pytest.fixture(params=BASES)
def base(request):
    torch.manual_seed(0)
    return BASES[request.param](nn.Linear(64, 96))


X = torch.linspace(-1, 1, 192).view(3, 64)


def test_the_update_is_added_to_the_packages_product(base):
    before = base(X).detach()
    layer = LoRALinear(base, rank=4, alpha=6.0)
    assert layer.lora_A.dtype == torch.float32
    assert layer.lora_A.shape == (4, 64) and layer.lora_B.shape == (96, 4)
    weight = layer.wrapped_weight().double()
    exact = X.double() @ weight.T + base.bias.detach().double()
    assert_close(layer(X).detach(), before, exact)
    with torch.no_grad():
        layer.lora_B.normal_()
    choice = explain(layer, X)
    assert (choice.backend, choice.plan) == ("torch", "in_place")
    package = "torchao" if type(base) is nn.Linear else "bitsandbytes"
    assert f"the weight is dequantised by {package} for each pass; torch" in choice.reason
    x, x64 = X.clone().requires_grad_(), X.double().requires_grad_()
    a, b = layer.lora_A.detach().requires_grad_(), layer.lora_B.detach().requires_grad_()
    a64, b64 = a.detach().double().requires_grad_(), b.detach().double().requires_grad_()
    same = before + 1.5 * (x @ a.T) @ b.T
    wide = exact + 1.5 * (x64 @ a64.T) @ b64.T
    y = layer(X)
    assert_close(y, same, wide)
    y.sin().sum().backward()
    wants = torch.autograd.grad(wide.sin().sum(), [a64, b64])
    sames = torch.autograd.grad(same.sin().sum(), [a, b])
    for parameter, s, want in zip((layer.lora_A, layer.lora_B), sames, wants, strict=True):
        assert_close(parameter.grad, s, want)
    layer(x).sum().backward()
    assert_differs(x.grad, torch.zeros_like(x))
    layer.disabled = True
    assert torch.equal(layer(X), before)


def test_dropout_keeps_the_input_once(base):
    layer = LoRALinear(base, rank=4, dropout=0.5)
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tuple(tensor.shape)
        return tensor

    own = {p.untyped_storage().data_ptr() for p in (layer.lora_A, layer.lora_B)}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        layer(X.clone().requires_grad_())
    sizes = [shape for place, shape in kept.items() if place not in own]
    assert sizes.count((3, 64)) <= 1 and (3, 4) in sizes and () in sizes


def test_a_model_on_a_quantised_base_goes_through_the_api(base, tmp_path):
    model = nn.Sequential(base, nn.ReLU(), nn.Linear(96, 5))
    planned = estimate(copy.deepcopy(model), 3, LoRAConfig("all-linear"))
    assert inject_lora(model, "all-linear") == 2
    freeze_base_params(model)
    assert estimate(model, 3).saved_bytes == planned.saved_bytes
    assert check(model, X).ok
    with torch.no_grad():
        y = model(X)
    with pytest.raises(MergeError, match="0: the weight is quantised by .* round the update away"):
        merge_lora_weights(model)
    optimizer = torch.optim.SGD(get_lora_params(model), 0.05)
    losses = []
    for _ in range(5):
        loss = model(X).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    with disable_adapter(model), torch.no_grad():
        assert_close(model(X), y, y.double())
    randomise_adapters(model)
    save_adapter(model, tmp_path / "adapter.safetensors")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        y = model(X)
        for parameter in get_lora_params(twin):
            parameter.zero_()
        load_adapter(twin, tmp_path / "adapter.safetensors")
        assert torch.equal(twin(X), y)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_variants_read_the_dequantised_weight(base, settings):
    with torch.no_grad():
        y = base(X)
        identity = base(torch.eye(64)) - base.bias
    model = nn.Sequential(base)
    inject_lora(model, LoRAConfig(["0"], rank=4, **settings))
    layer = model[0]
    # 8-bit weights are multiplied in float16, which rounds differently.
    unit = 2**-10 if "8bit" in type(base).__name__ else 2**-20
    assert (layer.wrapped_weight().T - identity).abs().max() <= unit * identity.abs().max() * 4
    assert (layer(X) - y).abs().max() <= 4 * 2**-20 * y.abs().max()
    with torch.no_grad():
        layer.lora_B.add_(0.1)
        delta = layer.weight.float() - layer.wrapped_weight().float()
    assert (delta - layer.delta(torch.float32)).abs().max() < 1e-5
    assert delta.abs().max() > 1e-2


def test_an_unknown_quantisation_is_refused():
    linear = nn.Linear(4, 4)
    linear.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(InjectionError, match="torch.int8 weight of an unknown quantisation"):
        LoRALinear(linear)


STORED = [
    dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize == 1
]


def stored(module, dtype):
    value = torch.zeros(module.weight.shape, dtype=torch.uint8).view(dtype)
    module.weight = nn.Parameter(value, requires_grad=False)
    return module


@pytest.mark.parametrize("dtype", STORED, ids=str)
def test_a_weight_that_torch_cannot_multiply_is_refused_whatever_the_kind(dtype):
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    layers = {
        "linear": nn.Linear(4, 6),
        "transposed": conv1d(6, 4),
        "conv": nn.Conv2d(4, 6, 3),
        "embedding": nn.Embedding(6, 4),
    }
    model = nn.ModuleDict({name: stored(layer, dtype) for name, layer in layers.items()})
    for name, layer in layers.items():
        message = rf"{name}: {type(layer).__name__} holds a (quantised )?{dtype} weight, which"
        for adapter_dtype in (None, torch.float32):
            config = LoRAConfig(
                [name], kinds=("linear", "conv", "embedding"), adapter_dtype=adapter_dtype
            )
            with pytest.raises(InjectionError, match=message):
                inject_lora(model, config)


@pytest.mark.parametrize(
    ("dtype", "reason"),
    [
        (torch.complex64, "torch.complex64 weight, expected real numbers"),
        (torch.uint8, "torch.uint8 weight of an unknown quantisation"),
    ],
)
def test_weights_of_other_dtypes_are_refused_whatever_the_kind(dtype, reason):
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    for layer in (nn.Linear(4, 6), conv1d(6, 4), nn.Conv2d(4, 6, 3), nn.Embedding(6, 4)):
        layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
        model = nn.Sequential(layer)
        config = LoRAConfig(["0"], kinds=("linear", "conv", "embedding"))
        with pytest.raises(InjectionError, match=f"{type(layer).__name__} holds a {reason}"):
            inject_lora(model, config)


class ScaledLinear(nn.Linear):
    """A float8 weight with one scale, computed in the dtype of the input, as transformers' `FP8Linear`."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features)
        scale = linear.weight.detach().abs().max() / 448
        value = (linear.weight.detach() / scale).to(torch.float8_e4m3fn)
        self.weight = nn.Parameter(value, requires_grad=False)
        self.weight_scale_inv = nn.Parameter(scale, requires_grad=False)
        self.bias = linear.bias

    def forward(self, input):
        weight = self.weight.to(input.dtype) * self.weight_scale_inv.to(input.dtype)
        return nn.functional.linear(input, weight, self.bias)


def test_a_class_that_computes_with_its_float8_weight_is_adapted(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(ScaledLinear(nn.Linear(64, 96)), nn.Linear(96, 3))
    want = model(X)
    inject_lora(model, LoRAConfig(["0"], rank=4, alpha=6.0))
    freeze_base_params(model)
    layer = model[0]
    assert layer.lora_A.dtype == torch.float32
    assert_close(model(X), want, want.double())
    randomise_adapters(model)
    update = 1.5 * X @ layer.lora_A.T @ layer.lora_B.T
    exact = (layer.original_linear(X) + update).double()
    assert_close(layer(X), layer.original_linear(X) + update, exact)
    assert_differs(model(X), want)
    assert torch.equal(layer(Tokens(X)).feats, layer(X))
    model(X).sum().backward()
    assert all(p.grad.any() for p in get_lora_params(model))
    assert check(model, X).ok
    assert "quantised by tests" in explain(layer, X).reason
    with pytest.raises(MergeError, match="0: the weight is quantised by tests, which would round"):
        merge_lora_weights(model)
    with pytest.raises(
        MergeError, match="weight: the weight is stored in torch.float8_e4m3fn with"
    ):
        _ = layer.weight
    with disable_adapter(model):
        assert_close(model(X), want, want.double())
    save_adapter(model, tmp_path / "a.safetensors")
    other = nn.Sequential(copy.deepcopy(layer.original_linear), copy.deepcopy(model[1]))
    inject_lora(other, LoRAConfig(["0"], rank=4, alpha=6.0))
    load_adapter(other, tmp_path / "a.safetensors")
    assert torch.equal(other(X), model(X))
    assert estimate(model, rows=4).total_bytes > 0


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"init_lora_weights": "olora"}])
def test_settings_that_read_a_weight_of_unknown_scale_are_refused(settings):
    linear = ScaledLinear(nn.Linear(64, 96))
    message = "reads the weight, but the weight is stored in torch.float8_e4m3fn with scales that"
    with pytest.raises(InjectionError, match=f"0: {next(iter(settings))} {message}"):
        inject_lora(nn.Sequential(linear), LoRAConfig(["0"], **settings))
    with pytest.raises(ConfigError, match=f"use_dora: {message}"):
        LoRALinear(linear, use_dora=True)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_a_weight_that_a_hook_casts_in_every_call_is_adapted(settings):
    accelerate = pytest.importorskip("accelerate", minversion="1.3")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 3))
    accelerate.big_modeling.attach_layerwise_casting_hooks(
        model[0], torch.float8_e4m3fn, torch.float32
    )
    memory = copy.deepcopy(model)
    accelerate.hooks.remove_hook_from_submodules(memory)
    memory.float()
    with torch.no_grad():
        for m in (model, memory):
            torch.manual_seed(1)
            inject_lora(m, LoRAConfig(["0"], adapter_dtype=torch.float32, **settings))
            randomise_adapters(m)
        want = memory(X)
        assert_close(model(X), want, copy.deepcopy(memory).double()(X.double()))
        assert torch.equal(model[0].weight, memory[0].weight)
    assert model[0].original_linear.weight.dtype == torch.float8_e4m3fn
    with pytest.raises(MergeError, match="0: the weight is quantised by accelerate"):
        merge_lora_weights(model)


def test_a_dtype_that_torch_only_stores_is_no_dtype_for_adapters_or_merging():
    with pytest.raises(ConfigError, match="adapter_dtype: expected a float dtype or None, got"):
        LoRAConfig(["0"], adapter_dtype=torch.float8_e4m3fn)
    with pytest.raises(ConfigError, match="adapter_dtype: expected a float dtype, got"):
        LoRALinear(nn.Linear(4, 4), adapter_dtype=torch.float8_e5m2)
    model = nn.Sequential(nn.Linear(4, 4))
    inject_lora(model, ["0"])
    with pytest.raises(
        ConfigError, match="dtype: expected a float dtype or None, got torch.float8"
    ):
        merge_lora_weights(model, dtype=torch.float8_e4m3fn)


def test_token_objects_go_through_a_quantised_base(base):
    layer = LoRALinear(base, rank=4)
    with torch.no_grad():
        layer.lora_B.normal_()
    x = X.clone().requires_grad_()
    assert torch.equal(layer(Tokens(x)).feats, layer(x))
    layer(Tokens(x)).feats.sum().backward()
    assert layer.lora_B.grad is not None
    layer.disabled = True
    assert torch.equal(layer(Tokens(X)).feats, base(X))
