"""Merging models: equal outputs, all or nothing, and refusals."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

from fastlora import (
    ConfigError,
    FastLoRAWarning,
    LoRAConfig,
    LoRALinear,
    MergeError,
    export,
    inject_lora,
    merge_lora_weights,
    merge_report,
    merged_model,
)
from tests.support.models import Decoder, randomise_adapters
from tests.support.tolerance import assert_close


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
    with pytest.raises(MergeError, match="is itself an adapted layer"):
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
    # The merged weight is rounded once: the effect of its rounding error on the output is the error of float32 here.
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


def bfloat16_layer(std):
    layer = LoRALinear(nn.Linear(64, 48, dtype=torch.bfloat16), rank=4)
    nn.init.normal_(layer.lora_B, std=std)
    return layer


def test_the_report_counts_what_rounding_loses():
    layer = bfloat16_layer(1e-3)
    (row,) = merge_report(nn.Sequential(layer)).layers
    original = layer.original_linear.weight.detach().double()
    update = layer.scaling * (layer.lora_B.double() @ layer.lora_A.double()).detach()
    merged = layer.merge_weights().weight.detach().double()
    lost = (merged - original - update).norm() / update.norm()
    assert row.path == "0" and row.dtype == torch.bfloat16 and row.ok
    assert row.lost == pytest.approx(float(lost), rel=1e-3)
    assert row.unchanged == float((merged == original).double().mean()) > 0.25
    assert 0 < row.max_error <= row.allowed
    wide = merge_report(layer, torch.float32).layers[0]
    assert wide.max_error is not None and wide.ok
    assert wide.dtype == torch.float32 and wide.unchanged == 0 and wide.lost < 1e-3
    assert (
        str(row) == f"0: torch.bfloat16, {row.lost:.2%} of the update lost, {row.unchanged:.1%} of "
        f"the weights unchanged, error {row.max_error:.2g}, of which rounding explains {row.allowed:.2g}"
    )


def test_a_zero_update_loses_nothing_and_meta_is_not_called():
    (row,) = merge_report(LoRALinear(nn.Linear(5, 3, dtype=torch.float16))).layers
    assert (row.lost, row.unchanged, row.ok) == (0.0, 0.0, True)
    with torch.device("meta"):
        layer = LoRALinear(nn.Linear(5, 3))
    (row,) = merge_report(layer).layers
    assert row.ok and row.skipped == "the weight is on meta" and "not called" in str(row)


@pytest.mark.parametrize("merge", [merge_lora_weights, merged_model])
def test_a_lossy_merge_warns_and_float32_keeps_the_update(merge):
    model = nn.Sequential(bfloat16_layer(1e-3), bfloat16_layer(1.0))
    assert [row.path for row in merge_report(model).lossy] == ["0"]
    with pytest.warns(UserWarning, match=r"more than 10% .* in 1 of 2 layers.*dtype=torch.float32"):
        merge(copy.deepcopy(model))
    exact = copy.deepcopy(model).double()
    first = merge(nn.Sequential(model[0]), dtype=torch.float32)
    x = torch.randn(4, 64)
    assert first[0].weight.dtype == first[0].bias.dtype == torch.float32
    assert_close(first(x), copy.deepcopy(model[0]).float()(x), exact[0](x.double()))


class Normalised(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight / self.weight.norm(), self.bias)


class TokensOnly(nn.Linear):
    def forward(self, tokens):
        return tokens.replace(super().forward(tokens.feats))


class TypedTokens(TokensOnly):
    def forward(self, tokens):
        if isinstance(tokens, torch.Tensor):
            raise TypeError("tokens: expected a token object, got a tensor")
        return super().forward(tokens)


class ThreeDimensional(nn.Linear):
    def forward(self, x):
        return super().forward(x.reshape(-1, 2, 3, self.in_features))


@pytest.mark.parametrize("merge", [merge_lora_weights, merged_model])
@pytest.mark.parametrize("wrong", ["normalised", "hook"])
def test_a_merge_with_a_different_output_is_refused_before_any_change(wrong, merge):
    base = Normalised(8, 8) if wrong == "normalised" else nn.Linear(8, 8)
    if wrong == "hook":
        base.register_forward_hook(lambda _, args, output: output.relu())
    model = nn.Sequential(LoRALinear(nn.Linear(8, 8)), LoRALinear(base))
    randomise_adapters(model)
    with pytest.raises(
        MergeError, match="the output of the merged layer differs: 1: torch.float32, .* error"
    ):
        merge(model)
    assert sum(isinstance(m, LoRALinear) for m in model.modules()) == 2
    assert [row.ok for row in merge_report(model).layers] == [True, False]


def test_layers_that_random_rows_do_not_fit_are_merged_and_named():
    model = nn.Sequential(
        LoRALinear(TokensOnly(8, 8)),
        LoRALinear(TypedTokens(8, 8)),
        LoRALinear(ThreeDimensional(8, 8)),
        LoRALinear(nn.Linear(8, 8), rank=4096, backend="triton"),  # no kernel supports this rank
    )
    randomise_adapters(model)
    model.train()
    rows = merge_report(model).layers
    assert all(row.ok and row.max_error is not None for row in rows[:2])
    assert rows[2].ok and "random rows do not fit it: RuntimeError" in rows[2].skipped
    assert "random rows do not fit it: BackendError" in rows[3].skipped
    assert all(module.training for module in model.modules())
    merged = merged_model(model)
    assert not has_adapters(merged) and all(module.training for module in merged.modules())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 7, 300])
def test_a_correct_merge_is_never_refused(width, dtype):
    for seed, alpha in enumerate((0.0, 1.0, 64.0)):
        torch.manual_seed(seed)
        layer = LoRALinear(nn.Linear(width, 5, dtype=dtype), rank=3, alpha=alpha)
        nn.init.normal_(layer.lora_B)
        (row,) = merge_report(layer).layers
        assert row.ok and row.skipped is None


def test_invalid_dtypes_are_refused():
    for call in (merge_report, lambda m, d: merged_model(m, dtype=d)):
        with pytest.raises(ConfigError, match="dtype: expected a float dtype or None, got"):
            call(adapted(), torch.int8)


KINDS = {
    "linear": lambda: nn.Linear(6, 5),
    "transposed": lambda: Conv1D(5, 6),
    "conv": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "embedding": lambda: nn.Embedding(9, 5),
}


def of_kind(kind, dtype=torch.float32, **config):
    model = nn.Sequential(KINDS[kind](), nn.Identity()).to(dtype)
    inject_lora(model, LoRAConfig(["0"], rank=2, kinds=("linear", "conv", "embedding"), **config))
    randomise_adapters(model)
    return model.eval()


def refused_and_unchanged(model, message, **options):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for call in (merge_report, merged_model, merge_lora_weights):
        with pytest.raises(MergeError, match=message):
            call(model, **options)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(v.nan_to_num(7), after[k].nan_to_num(7)) for k, v in before.items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["lora_A", "lora_B"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_that_is_not_finite_is_not_merged(kind, name, value):
    model = of_kind(kind)
    with torch.no_grad():
        getattr(model[0], name).view(-1)[1] = value
    refused_and_unchanged(
        model, rf"0: \d+ values of W \+ ΔW are not finite in torch.float32 \({name} has"
    )
    with pytest.raises(MergeError, match=f"{name} has values that are not finite"):
        model[0].merge_weights()


def test_a_magnitude_or_an_initial_product_that_is_not_finite_is_not_merged():
    for config, name in (
        ({"use_dora": True}, "lora_magnitude"),
        ({"init_lora_weights": "pissa"}, "initial_B"),
    ):
        model = of_kind("linear", **config)
        with torch.no_grad():
            getattr(model[0], name).view(-1)[0] = float("nan")
        refused_and_unchanged(model, f"{name} has values that are not finite")


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_that_overflows_the_target_dtype_is_refused(kind):
    model = of_kind(kind)
    with torch.no_grad():
        model[0].lora_A.fill_(1), model[0].lora_B.fill_(1e5)
    assert merge_report(model).ok
    refused_and_unchanged(
        model, r"0: \d+ values of .* in torch.float16 \(out of range\)", dtype=torch.float16
    )
    half = of_kind(kind, torch.float16)
    with torch.no_grad():
        half[0].lora_B.fill_(6e4), half[0].lora_A.fill_(6e4)
    refused_and_unchanged(half, r"0: \d+ values of .* in torch.float16 \(out of range\)")


@pytest.mark.filterwarnings("ignore:1.running_var")
def test_heads_and_norms_that_overflow_the_target_dtype_are_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    inject_lora(model, ["0"])
    with torch.no_grad():
        model[1].running_var.fill_(1e6)
        model[2].weight.fill_(7e4)
        model[0].original_linear.bias.fill_(1e5)
    refused_and_unchanged(
        model,
        "0.original_linear.bias: .*2.weight: has .* not finite in torch.float16",
        dtype=torch.float16,
    )
    with torch.no_grad():
        model[0].original_linear.bias.zero_()
        model[2].weight.zero_()
    with pytest.warns(FastLoRAWarning, match="1.running_var: has values that are not finite in"):
        merged_model(model, dtype=torch.float16)
    assert type(merged_model(model, dtype=torch.bfloat16)[0]) is nn.Linear


def test_a_trained_head_that_is_not_finite_is_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    inject_lora(model, ["0"])
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")
    refused_and_unchanged(model, "1.weight: is trained and has values that are not finite")


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_that_is_not_finite_is_merged_where_it_is_finite_and_named(kind):
    model = of_kind(kind)
    expected = merged_model(model)[0].weight.detach().contiguous()
    with torch.no_grad():
        model[0].wrapped.weight.view(-1)[3] = float("nan")
    model[0].wrapped.requires_grad_(False)
    expected.view(-1)[3] = float("nan")
    (row,) = merge_report(model).layers
    assert row.not_finite == 1 and row.ok and row.lost < 1e-3
    assert row.skipped == "1 values of its weight are not finite"
    with pytest.warns(FastLoRAWarning, match="merged_model: 0: 1 values of the weight before"):
        merged = merged_model(model)
    assert torch.equal(merged[0].weight.nan_to_num(99), expected.nan_to_num(99))


def test_an_export_of_an_adapter_that_is_not_finite_is_refused(tmp_path):
    model = of_kind("linear")
    with torch.no_grad():
        model[0].lora_B[0, 0] = float("nan")
    with pytest.raises(MergeError, match="lora_B has values that are not finite"):
        export(model, (torch.randn(3, 6),), tmp_path / "m.pt2")
    assert not list(tmp_path.iterdir())
