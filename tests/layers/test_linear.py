"""`LoRALinear`: construction, every kind of input, merging one layer, copying and pickling."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from fastlora import ConfigError, InjectionError, LoRALinear, MergeError, explain
from fastlora.errors import BackendError
from fastlora.layers.kinds import why_unsuitable
from tests.support.cases import formula
from tests.support.models import TokenLinear, Tokens
from tests.support.tolerance import assert_close


class DoublingLinear(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


def trained(linear: nn.Linear, **kwargs) -> LoRALinear:
    layer = LoRALinear(linear, **kwargs)
    nn.init.normal_(layer.lora_B)
    return layer


def expected(layer: LoRALinear, x, dtype=torch.float64):
    w, a, b = (
        v.detach().to(dtype) for v in (layer.original_linear.weight, layer.lora_A, layer.lora_B)
    )
    bias = None if layer.bias is None else layer.bias.detach().to(dtype)
    return F.linear(x.to(dtype), w, bias) + layer.scaling * (x.to(dtype) @ a.T @ b.T)


def test_a_new_layer_computes_what_the_wrapped_one_does_and_has_its_shape():
    linear = nn.Linear(12, 20)
    layer = LoRALinear(linear, rank=4, alpha=8.0, dropout=0.1)
    x = torch.randn(3, 12)
    assert torch.equal(layer(x), linear(x))
    assert layer.lora_A.shape == (4, 12) and layer.lora_B.shape == (20, 4)
    assert layer.lora_B.abs().max() == 0
    bound = 12**-0.5  # Kaiming-uniform with a = √5
    assert 0.5 * bound < layer.lora_A.abs().max() <= bound
    assert (layer.in_features, layer.out_features, layer.scaling) == (12, 20, 2.0)
    assert layer.original_linear is linear and layer.bias is linear.bias


def test_the_update_is_scaled_by_alpha_over_rank():
    layer = trained(nn.Linear(12, 20), rank=4, alpha=6.0)
    x = torch.randn(2, 5, 12)
    assert_close(layer(x), expected(layer, x, torch.float32), expected(layer, x))


def test_rslora_divides_by_the_root_of_the_rank():
    layer = trained(nn.Linear(3, 5), rank=4, alpha=6.0, use_rslora=True)
    assert layer.scaling == 3.0 and "use_rslora=True" in repr(layer)
    x = torch.randn(2, 3)
    y, exact = layer(x).detach(), expected(layer, x)
    assert_close(y, expected(layer, x, torch.float32), exact)
    assert_close(layer.merge_weights()(x).detach(), expected(layer, x, torch.float32), exact)
    with pytest.raises(ConfigError, match="use_rslora: expected True or False, got 1"):
        LoRALinear(nn.Linear(3, 5), use_rslora=1)


def test_repr_lists_the_settings():
    text = repr(LoRALinear(nn.Linear(3, 5, bias=False), rank=2, alpha=16, dropout=0.25))
    assert "3, 5, r=2, alpha=16, dropout=0.25, bias=False, backend=auto" in text


def test_reset_restores_a_new_layer():
    layer = trained(nn.Linear(4, 4))
    before = layer.lora_A.clone()
    layer.reset_lora_parameters()
    assert layer.lora_B.abs().max() == 0 and not torch.equal(layer.lora_A, before)


def test_dropout_acts_in_training_only_follows_the_generator_and_can_be_reproduced():
    layer = trained(nn.Linear(16, 8), dropout=0.5)
    x = torch.randn(6, 16)
    torch.manual_seed(3)
    first, second = layer(x), layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first) and not torch.equal(first, second)
    torch.manual_seed(3)
    seed = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64)
    weight, factors = layer.original_linear.weight, (layer.lora_A, layer.lora_B)
    y = formula(x, weight, layer.bias, *factors, layer.scaling, 0.5, seed)
    torch.testing.assert_close(first, y)
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_token_objects_are_returned_as_token_objects():
    layer = trained(TokenLinear(6, 5), rank=2)
    x = torch.randn(7, 6)
    out = layer(Tokens(x))
    assert isinstance(out, Tokens)
    assert_close(out.feats, expected(layer, x, torch.float32), expected(layer, x))
    assert type(layer.merge_weights()) is TokenLinear
    torch.testing.assert_close(layer.merge_weights()(Tokens(x)).feats, out.feats)


def test_a_plain_layer_accepts_token_objects_too():
    layer = trained(nn.Linear(6, 5))
    x = torch.randn(7, 6)
    assert torch.equal(layer(Tokens(x)).feats, layer(x))


def test_a_custom_forward_is_called_and_the_update_added():
    layer = trained(DoublingLinear(6, 5), rank=2)
    x = torch.randn(7, 6)
    low_rank = layer.scaling * (x @ layer.lora_A.T @ layer.lora_B.T)
    torch.testing.assert_close(layer(x), layer.original_linear(x) + low_rank)
    assert explain(layer, x).plan == "wrapped"


@pytest.mark.parametrize("tokens", [False, True])
def test_hooks_on_the_wrapped_layer_run(tokens):
    layer = trained(TokenLinear(6, 5) if tokens else nn.Linear(6, 5))
    x = torch.randn(7, 6)
    call = (lambda: layer(Tokens(x)).feats) if tokens else (lambda: layer(x))
    plain = call()
    seen = []
    handle = layer.original_linear.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(call(), plain)
    assert seen == [1]
    handle.remove()
    assert torch.equal(call(), plain) and seen == [1]


def test_anything_else_is_refused():
    with pytest.raises(TypeError, match="input: expected a tensor or an object with .feats"):
        LoRALinear(nn.Linear(2, 2))([1.0, 2.0])


def test_explain_names_backend_plan_and_reason(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    layer = LoRALinear(nn.Linear(2, 2))
    assert str(explain(layer, torch.zeros(1, 2))).startswith(
        "torch/in_place: torch runs this on the CPU"
    )
    forced = LoRALinear(nn.Linear(2, 2), backend="triton")
    with pytest.raises(BackendError, match="cannot run"):
        forced(torch.zeros(1, 2))
    layer = LoRALinear(DoublingLinear(2, 2), backend="triton")
    with pytest.raises(BackendError, match="custom forward"):
        layer(torch.zeros(1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_merge_weights_returns_a_new_layer_of_the_same_class(dtype, bias):
    linear = nn.Linear(32, 24, bias=bias, dtype=dtype)
    linear.weight.requires_grad_(False)
    layer = trained(linear, rank=4).eval()
    before = linear.weight.clone()
    merged = layer.merge_weights()
    assert type(merged) is nn.Linear and merged is not linear and not merged.training
    assert merged.weight.dtype == dtype and not merged.weight.requires_grad
    assert torch.equal(linear.weight, before)
    assert (merged.bias is None) is not bias
    if bias:
        assert torch.equal(merged.bias, linear.bias) and merged.bias is not linear.bias
    x = torch.randn(10, 32).to(dtype)
    assert_close(merged(x), layer(x), expected(layer, x))


def test_merge_rounds_once():
    layer = trained(nn.Linear(64, 64, dtype=torch.bfloat16), rank=8)
    exact = layer.original_linear.weight.double() + layer.scaling * (
        layer.lora_B.double() @ layer.lora_A.double()
    )
    wide = layer.merge_weights(torch.float32).weight.detach()
    assert wide.dtype == torch.float32
    assert_close(wide, exact.float(), exact)
    assert torch.equal(layer.merge_weights().weight, wide.bfloat16())


def test_weight_is_the_merged_weight_and_differentiable():
    layer = trained(nn.Linear(6, 5))
    assert torch.equal(layer.weight, layer.merge_weights().weight)
    layer.weight.sum().backward()
    assert layer.lora_A.grad.abs().max() > 0


def test_merging_a_parametrised_weight_is_refused_but_training_it_works():
    layer = trained(parametrizations.weight_norm(nn.Linear(6, 5)))
    x = torch.randn(3, 6)
    assert_close(layer(x), expected(layer, x, torch.float32), expected(layer, x))
    with pytest.raises(MergeError, match="parametrised"):
        layer.merge_weights()


def test_a_parametrised_bias_is_read():
    linear = parametrizations.weight_norm(nn.Linear(6, 5), "bias", dim=None)
    layer = LoRALinear(linear)
    assert torch.equal(layer.bias, linear.bias) and "bias=True" in repr(layer)


def test_sixteen_bit_weights_get_float32_adapters_by_default():
    linear = nn.Linear(4, 4, dtype=torch.bfloat16)
    assert LoRALinear(linear).lora_A.dtype == torch.float32
    assert LoRALinear(linear, adapter_dtype=torch.bfloat16).lora_B.dtype == torch.bfloat16
    assert LoRALinear(nn.Linear(4, 4).double()).lora_A.dtype == torch.float64


def test_deepcopy_pickle_and_state_dict_round_trip():
    layer = trained(nn.Linear(6, 5), dropout=0.1).eval()
    x = torch.randn(3, 6)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x)) and twin.lora_A is not layer.lora_A
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other = LoRALinear(nn.Linear(6, 5)).eval()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(x), layer(x))


def test_it_works_in_multihead_attention_and_the_encoder_fast_path():
    encoder = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    base = encoder(x)
    encoder.linear1 = trained(encoder.linear1).eval()
    encoder.self_attn.out_proj = trained(encoder.self_attn.out_proj).eval()
    slow = encoder(x)
    with torch.no_grad():
        fast = encoder(x)
    assert not torch.allclose(base, slow)
    torch.testing.assert_close(fast, slow)


def test_meta_device_and_no_grad():
    layer = LoRALinear(nn.Linear(8, 4, device="meta"))
    assert layer(torch.empty(3, 8, device="meta")).shape == (3, 4)
    real = trained(nn.Linear(8, 4))
    with torch.no_grad():
        assert not real(torch.randn(2, 8)).requires_grad
    with torch.inference_mode():
        real(torch.randn(2, 8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank: expected an integer ≥ 1, got 0"),
        ({"rank": 2.0}, "rank: expected an integer ≥ 1, got 2.0"),
        ({"rank": True}, "rank: expected an integer ≥ 1, got True"),
        ({"alpha": float("nan")}, "alpha: expected a finite number, got nan"),
        ({"dropout": 1.0}, "dropout: expected a probability with 0 ≤ p < 1, got 1.0"),
        ({"dropout": -0.1}, "dropout: expected a probability"),
        ({"backend": "cuda"}, "backend: expected one of auto, torch, triton, got 'cuda'"),
        ({"adapter_dtype": torch.int8}, "adapter_dtype: expected a float dtype, got torch.int8"),
    ],
)
def test_invalid_values_are_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        LoRALinear(nn.Linear(4, 4), **arguments)


def test_unsuitable_layers_are_refused_with_the_reason():
    integer = nn.Linear(4, 4)
    integer.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    packed = nn.Linear(4, 4)
    packed.weight = nn.Parameter(torch.zeros(8, 1))
    for layer, reason in (
        (nn.Conv1d(2, 2, 1), "expected an nn.Linear or a subclass, got Conv1d"),
        (nn.LazyLinear(4), "no weight yet"),
        (integer, "torch.int8 weight of an unknown quantisation"),
        (packed, r"weight of shape \(8, 1\), expected \(4, 4\)"),
        (LoRALinear(nn.Linear(4, 4)), "expected an nn.Linear or a subclass, got LoRALinear"),
    ):
        with pytest.raises(InjectionError, match=reason):
            LoRALinear(layer)
    assert why_unsuitable(nn.Linear(4, 4)) is None
