"""Reading and loading the base model's state dict: strict, with tied weights, shared modules, buffers and extra state."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from fastlora import (
    CheckpointError,
    LoRAConfig,
    LoRALinear,
    base_state_dict,
    get_lora_state_dict,
    inject_lora,
    load_base_state_dict,
)
from tests.support.models import Decoder, randomise_adapters
from tests.support.tolerance import assert_close


class Everything(nn.Module):
    """Tied weights, a shared module, a buffer, a parametrised layer and extra state."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.head.weight = self.table.weight
        self.body = nn.Linear(4, 4)
        self.alias = self.body
        self.norm = nn.BatchNorm1d(4)
        self.normed = parametrizations.weight_norm(nn.Linear(4, 4))
        self.note = "fresh"

    def get_extra_state(self):
        return {"note": self.note}

    def set_extra_state(self, state):
        self.note = state["note"]


def injected(make=Decoder, seed=5):
    torch.manual_seed(seed)
    model = make()
    inject_lora(model, "all-linear")
    randomise_adapters(model)
    return model


def same(got, want):
    return list(got) == list(want) and all(
        torch.equal(got[k], want[k]) if isinstance(want[k], torch.Tensor) else got[k] == want[k]
        for k in want
    )


@pytest.mark.parametrize("make", [Decoder, Everything])
def test_the_keys_are_those_before_injection_both_ways(make):
    plain = make()
    plain.note = "kept"
    before = copy.deepcopy(plain.state_dict())
    assert same(base_state_dict(plain), before)  # without adapters: as it is
    inject_lora(plain, "all-linear")
    assert same(base_state_dict(plain), before)
    make().load_state_dict(base_state_dict(plain), strict=True)
    model = injected(make)
    adapters = copy.deepcopy(get_lora_state_dict(model))
    result = load_base_state_dict(model, before)
    assert set(result.loaded) == set(before) and result[1:] == ([], [])
    assert same(base_state_dict(model), before)
    assert same(get_lora_state_dict(model), adapters)
    if make is Everything:
        assert model.note == "kept" and model.head.original_linear.weight is model.table.weight


def test_a_single_layer_and_a_cast():
    layer = LoRALinear(nn.Linear(3, 2))
    assert list(base_state_dict(layer)) == ["weight", "bias"]
    state = nn.Linear(3, 2).to(torch.float64).state_dict()
    load_base_state_dict(layer, state)
    assert torch.equal(layer.original_linear.weight, state["weight"].float())


def test_untrained_dora_magnitudes_follow_the_weights_and_trained_ones_stay():
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    inject_lora(model, LoRAConfig(["0", "1"], use_dora=True))
    with torch.no_grad():
        model[1].lora_magnitude.mul_(1.5)
    trained = model[1].lora_magnitude.clone()
    other = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    load_base_state_dict(model, other.state_dict())
    x = torch.randn(3, 6)
    assert_close(model[0](x), other[0](x), copy.deepcopy(other[0]).double()(x.double()))
    assert torch.equal(model[1].lora_magnitude, trained)


def test_returned_tensors_share_storage():
    model = injected()
    weight = base_state_dict(model)["out_layer.weight"]
    assert weight.data_ptr() == model.out_layer.original_linear.weight.data_ptr()
    assert not weight.requires_grad


def test_one_name_of_a_tied_weight_is_enough_and_two_must_agree():
    state = Everything().state_dict()
    for absent in (["head.weight"], ["table.weight"], ["alias.weight", "alias.bias"]):
        model = injected(Everything)
        partial = {k: v for k, v in state.items() if k not in absent}
        assert load_base_state_dict(model, partial).missing == []
        assert same(base_state_dict(model), state)
    neither = {k: v for k, v in state.items() if k not in ("head.weight", "table.weight")}
    with pytest.raises(CheckpointError, match=r"missing table\.weight.*\n.*missing head\.weight"):
        load_base_state_dict(injected(Everything), neither)
    other = state | {"head.weight": state["head.weight"] + 1}
    with pytest.raises(CheckpointError, match="head.weight: differs from table.weight, which is"):
        load_base_state_dict(injected(Everything), other)


def test_strict_errors_name_every_key_and_change_nothing():
    model = injected()
    before = copy.deepcopy(model.state_dict())
    state = Decoder().state_dict()
    state["out_layr.weight"] = state.pop("out_layer.weight")
    state["input_layer.bias"] = torch.zeros(3)
    with pytest.raises(CheckpointError) as raised:
        load_base_state_dict(model, state)
    text = str(raised.value)
    assert "3 problems, nothing was changed" in text
    assert "missing out_layer.weight (nearest: out_layr.weight)" in text
    assert "unexpected out_layr.weight (nearest: out_layer.weight)" in text
    assert "input_layer.bias: expected shape (16,), got (3,)" in text
    assert same(model.state_dict(), before)
    with pytest.warns(
        UserWarning, match="loaded 20 tensors; problems:\n  missing out_layer.weight"
    ):
        result = load_base_state_dict(model, state, strict=False)
    assert result.missing == ["out_layer.weight"] and result.unexpected == ["out_layr.weight"]
    assert torch.equal(model.out_layer.original_linear.bias, state["out_layer.bias"])
    injected_keys = model.state_dict()
    with pytest.raises(CheckpointError, match=r"unexpected out_layer\.original_linear\.weight"):
        load_base_state_dict(model, injected_keys)


@pytest.mark.parametrize(
    ("state", "strict", "message"),
    [
        ({}, False, "state: is empty|missing"),
        ({"net.out_layer.weight": torch.zeros(5, 16)}, False, "state does not fit the model"),
        (
            {"out_layer.weight": "text"},
            True,
            r"out_layer.weight: expected shape \(5, 16\), got str",
        ),
    ],
)
def test_states_that_load_nothing_are_refused(state, strict, message):
    with pytest.raises(CheckpointError, match=message):
        load_base_state_dict(injected(), state, strict)


def test_missing_extra_state_is_named():
    state = Everything().state_dict()
    del state["_extra_state"]
    with pytest.raises(CheckpointError, match="missing _extra_state"):
        load_base_state_dict(injected(Everything), state)
    with pytest.warns(UserWarning, match="missing _extra_state"):
        assert load_base_state_dict(injected(Everything), state, strict=False).missing == [
            "_extra_state"
        ]
