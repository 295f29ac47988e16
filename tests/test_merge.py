"""Merging whole models: equality, atomicity, and the refusals."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from fastlora import LoRALinear, MergeError, inject_lora, merge_lora_weights, merged_model
from tests.models import Decoder, randomise_adapters
from tests.tolerance import assert_close


def adapted(**kwargs):
    model = Decoder()
    inject_lora(model, **kwargs)
    randomise_adapters(model)
    return model.eval()


def has_adapters(model):
    return any(isinstance(m, LoRALinear) for m in model.modules())


def test_merged_equals_unmerged():
    model = adapted()
    x = torch.randn(6, 8)
    exact = copy.deepcopy(model).double()(x.double())
    unmerged = model(x)
    keys = set(Decoder().state_dict())
    merged = merged_model(model)
    assert_close(merged(x), unmerged, exact)
    assert has_adapters(model) and not has_adapters(merged)
    assert set(merged.state_dict()) == keys
    assert not {p.data_ptr() for p in merged.parameters()} & {
        p.data_ptr() for p in model.parameters()
    }
    assert merge_lora_weights(model) is model
    assert_close(model(x), unmerged, exact)
    assert set(model.state_dict()) == keys


def test_not_in_place_leaves_the_model():
    model = adapted()
    before = copy.deepcopy(model.state_dict())
    copy_ = merge_lora_weights(model, inplace=False)
    assert copy_ is not model and not has_adapters(copy_)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_shared_layer_stays_shared():
    model = Decoder()
    model.alias = model.blocks[0].attn.to_qkv
    inject_lora(model)
    merge_lora_weights(model)
    assert model.alias is model.blocks[0].attn.to_qkv and type(model.alias) is nn.Linear


def test_a_single_layer():
    layer = LoRALinear(nn.Linear(3, 3))
    assert type(merged_model(layer)) is nn.Linear
    assert type(merge_lora_weights(layer, inplace=False)) is nn.Linear
    with pytest.raises(MergeError, match="is itself a LoRALinear"):
        merge_lora_weights(layer)


@pytest.mark.parametrize("merge", [merge_lora_weights, merged_model])
def test_tied_and_parametrised_weights_are_refused_by_name_before_any_change(merge):
    model = adapted()
    model.tied = nn.Linear(16, 48)
    model.tied.weight = model.blocks[1].attn.to_qkv.original_linear.weight
    parametrizations.weight_norm(model.blocks[1].attn.to_out.original_linear)
    with pytest.raises(MergeError) as raised:
        merge(model)
    assert "blocks.1.attn.to_qkv: the weight is tied to tied.weight" in str(raised.value)
    assert "blocks.1.attn.to_out: the weight is parametrised" in str(raised.value)
    assert sum(isinstance(m, LoRALinear) for m in model.modules()) == 4


@settings(max_examples=25, deadline=None)
@given(
    k=st.integers(1, 40),
    n=st.integers(1, 40),
    rank=st.integers(1, 12),
    alpha=st.floats(-32, 32),
    seed=st.integers(0, 2**31),
)
def test_merged_is_unmerged_for_any_layer(k, n, rank, alpha, seed):
    torch.manual_seed(seed)
    layer = LoRALinear(nn.Linear(k, n), rank, alpha).eval()
    nn.init.normal_(layer.lora_B)
    x = torch.randn(5, k)
    exact = copy.deepcopy(layer).double()(x.double())
    # The merged weight is rounded once: its own error, seen through x, is what float32 costs here.
    weight = layer.merge_weights().weight
    rounded = nn.functional.linear(x, weight, layer.bias)
    assert_close(layer.merge_weights()(x), rounded, exact)
    slack = 2**-22 * (
        x.abs()
        @ (
            layer.original_linear.weight.abs().T
            + (layer.lora_B.abs() @ layer.lora_A.abs()).T * abs(layer.scaling)
        )
        + 1
    )
    assert ((layer(x).double() - rounded.double()).abs() <= slack * 4).all()
