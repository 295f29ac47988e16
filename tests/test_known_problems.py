"""Known problems of LoRA libraries, with a test for each; the numbers only order them."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from fastlora import (
    CheckError,
    CheckpointError,
    ConfigError,
    InjectionError,
    LoRAConfig,
    LoRAConv,
    LoRALinear,
    MergeError,
    add_adapter,
    base_state_dict,
    check,
    explain,
    freeze_base_params,
    from_pretrained,
    get_lora_params,
    get_lora_state_dict,
    inject_lora,
    load_adapter,
    load_base_state_dict,
    load_lora_state_dict,
    merge_lora_weights,
    merge_report,
    merged_model,
    named_lora_layers,
    preview,
    reset_lora_parameters,
    save_adapter,
    set_adapter,
    setup_lora_for_medical_finetuning,
)
from tests.support.models import Decoder, randomise_adapters
from tests.support.tolerance import assert_close, assert_differs
from tests.support.versions import needs_torch

X = torch.linspace(-1, 1, 24).view(3, 8)


def adapted(**options):
    torch.manual_seed(7)
    model = Decoder()
    inject_lora(model, LoRAConfig(["to_qkv", "to_out"], **options))
    freeze_base_params(model)
    randomise_adapters(model)
    return model


def test_01_loading_without_a_matching_key_is_an_error():
    model = adapted()
    renamed = {f"net.{k}": v for k, v in get_lora_state_dict(model).items()}
    for strict in (True, False):
        with pytest.raises(CheckpointError, match=r"nearest: blocks\.0\.attn\.to_qkv\.lora_A"):
            load_lora_state_dict(model, renamed, strict=strict)


@pytest.mark.parametrize("field", [{"alpha": 16.0}, {"rank": 2}, {"use_rslora": True}], ids=str)
def test_02_rank_alpha_and_rslora_are_saved_with_the_weights(field, tmp_path):
    save_adapter(adapted(), tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=f"{next(iter(field))} is .* in the file"):
        load_adapter(adapted(**field), tmp_path / "a.safetensors")


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern", "exclude", "target_modules"])
def test_03_a_pattern_that_matches_nothing_is_an_error(field):
    value = {"to_qvk": 2} if field.endswith("pattern") else ["to_qkv", "to_qvk"]
    with pytest.raises(InjectionError, match=f"{field}: 'to_qvk' matches none .* .nearest: to_qkv"):
        inject_lora(Decoder(), LoRAConfig(**{"target_modules": ["to_qkv"], field: value}))


def test_03_a_list_of_targets_that_match_nothing_warns():
    with pytest.warns(UserWarning, match="'to_qvk' matches none .* .nearest: to_qkv"):
        inject_lora(Decoder(), ["to_qkv", "to_qvk"])


def test_04_preview_shows_all_matches_with_counts_and_explain_gives_reasons():
    model = Decoder()
    table = preview(model, LoRAConfig(["out", "to_qkv"], exclude=["upsample"]))
    taken = {row.path: row.pattern for row in table.where("selected")}
    assert taken.pop("out_layer") == "out"  # an unintended match, visible before it is wrapped
    assert table.counts == {"out": 3, "to_qkv": 2, "upsample": 1}
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    inject_lora(model, ["to_qkv"])
    why = {row.path: row.reason for row in explain(model, config=["to_qkv"]).rows}
    assert why["out_layer"] == "no target matches its path"


def test_05_a_module_under_two_names_is_wrapped_once_and_tied_weights_are_not_merged():
    model = Decoder()
    model.alias = model.blocks[0].attn.to_qkv
    inject_lora(model)
    assert isinstance(model.alias, LoRALinear) and model.alias is model.blocks[0].attn.to_qkv
    tied = Decoder()
    tied.blocks[1].attn.to_out.weight = tied.blocks[0].attn.to_out.weight
    inject_lora(tied, ["to_out"])
    with pytest.raises(MergeError, match="the weight is tied to blocks.1.attn.to_out"):
        merge_lora_weights(tied)


def test_06_attention_that_reads_weights_directly_sees_the_adapter():
    encoder = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    attention = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    for model, call in ((encoder, lambda: encoder(x)), (attention, lambda: attention(x, x, x)[0])):
        before = call()
        inject_lora(model, "all-linear")
        randomise_adapters(model)
        with torch.no_grad():
            fast = call()
        assert_differs(before, fast)
        torch.testing.assert_close(fast, call())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("masked", [False, True], ids=["full", "padded"])
def test_06_the_eval_fast_path_of_the_encoder_equals_the_merged_encoder(masked):
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    inject_lora(model, "all-linear")
    freeze_base_params(model)
    randomise_adapters(model)
    x, padding = torch.randn(3, 5, 16), torch.zeros(3, 5, dtype=torch.bool)
    padding[:, 3:] = masked
    slow = model(x, src_key_padding_mask=padding)  # trainable adapters disable the fast path
    assert slow.requires_grad
    with torch.inference_mode():
        fast = model(x, src_key_padding_mask=padding)
        merged = merged_model(model)(x, src_key_padding_mask=padding)
    real = slice(None, 3 if masked else None)
    torch.testing.assert_close(fast[:, real], merged[:, real])
    torch.testing.assert_close(fast[:, real], slow.detach()[:, real])


def test_06_check_finds_adapters_without_effect():
    model = adapted()
    assert check(model, X).ok
    out = model.blocks[1].attn.to_out
    out.forward = out.original_linear.forward  # as in code that bypasses the adapter
    with pytest.raises(CheckError, match=r"blocks\.1\.attn\.to_out: does not change the output"):
        check(model, X).raise_if_failed()


def test_07_a_16_bit_merge_rounds_once_and_float32_is_offered():
    layer = LoRALinear(nn.Linear(64, 64, dtype=torch.bfloat16), rank=4)
    nn.init.normal_(layer.lora_B, std=1e-3)
    original = layer.original_linear.weight.double()
    exact = original + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    assert torch.equal(layer.merge_weights().weight, exact.to(torch.bfloat16))
    wide = layer.merge_weights(torch.float32).weight
    assert wide.dtype == torch.float32
    assert (wide.double() - exact).abs().max() <= torch.finfo(torch.float32).eps * exact.abs().max()


def test_07_a_lossy_merge_warns_with_the_size_of_the_loss():
    layer = LoRALinear(nn.Linear(64, 64, dtype=torch.bfloat16), rank=4)
    nn.init.normal_(layer.lora_B, std=1e-3)
    with pytest.warns(UserWarning, match=r"of the update lost, .* unchanged.*dtype=torch.float32"):
        merged_model(nn.Sequential(layer))
    merged_model(nn.Sequential(layer), dtype=torch.float32)  # a warning would be an error here


def test_08_merging_checks_the_forward_pass_and_reports_its_error():
    model = adapted()
    assert all(row.max_error is not None and row.ok for row in merge_report(model).layers)
    hooked = model.blocks[0].attn.to_out.original_linear
    hooked.register_forward_hook(lambda _, args, output: output.relu())
    with pytest.raises(
        MergeError,
        match=r"the output of the merged layer differs: blocks\.0\.attn\.to_out: .* error",
    ):
        merge_lora_weights(model)


def saved_for_backward(layer, x):
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return saved


def test_09_float32_adapters_do_not_upcast_the_input():
    layer = LoRALinear(nn.Linear(32, 32, dtype=torch.bfloat16), rank=4)
    assert layer.lora_A.dtype == torch.float32
    x = torch.randn(64, 32, dtype=torch.bfloat16, requires_grad=True)
    saved = saved_for_backward(layer, x)
    assert all(tensor.dtype == torch.bfloat16 for tensor in saved)
    assert layer(x).dtype == torch.bfloat16


def test_10_dropout_saves_the_input_once_s_and_a_seed():
    layer = LoRALinear(nn.Linear(32, 32), rank=4, dropout=0.5)
    layer.original_linear.requires_grad_(False)
    x = torch.randn(64, 32, requires_grad=True)
    weights = {id(p) for p in layer.parameters()}
    saved = [tensor for tensor in saved_for_backward(layer, x) if id(tensor) not in weights]
    sizes = sorted(tensor.numel() for tensor in saved if tensor.data_ptr() != x.data_ptr())
    assert sizes == [1, 64 * 4] and len(saved) == 3


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_11_dropout_and_bias_use_the_fused_plan_and_every_choice_has_a_reason(bias, dropout):
    choice = explain(LoRALinear(nn.Linear(8, 8, bias=bias), dropout=dropout), X)
    assert choice == explain(LoRALinear(nn.Linear(8, 8)), X) and choice.plan != "wrapped"
    assert choice.reason


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # torch's own, while it traces
def test_12_one_graph_and_correct_recomputation():
    torch.compiler.reset()
    model = adapted(dropout=0.5)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    results = []
    for call in (model, compiled, lambda x: checkpoint(model, x, use_reentrant=False)):
        torch.manual_seed(3)
        model.zero_grad()
        y = call(X)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad for p in get_lora_params(model))])
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            torch.testing.assert_close(got, want)


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def test_12_ddp_finds_no_unused_parameter(one_process):
    model, twin = adapted(), adapted()
    parallel = nn.parallel.DistributedDataParallel(model)
    for _ in range(2):  # an unused parameter would fail in the second step
        parallel(X).square().sum().backward()
        twin(X).square().sum().backward()
    for got, want in zip(get_lora_params(model), get_lora_params(twin), strict=True):
        torch.testing.assert_close(got.grad, want.grad)


@needs_torch((2, 7), "FSDP2 supports parameters of one dtype only")
def test_12_fsdp_supports_float32_adapters_on_a_16_bit_base(one_process):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(7)
    model = Decoder().to(torch.bfloat16)
    inject_lora(model)
    freeze_base_params(model)
    randomise_adapters(model)
    twin = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (1,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    x = X.to(torch.bfloat16)
    for m in (model, twin):
        m(x).float().square().sum().backward()
    for got, want in zip(get_lora_params(model), get_lora_params(twin), strict=True):
        assert got.grad.dtype == torch.float32
        torch.testing.assert_close(got.grad.full_tensor(), want.grad)


@needs_torch((2, 7), "FSDP2 supports parameters of one dtype only")
@pytest.mark.filterwarnings("ignore:DTensor random operators may not have complete:UserWarning")
def test_12_fsdp_materialises_and_resets_adapters_built_on_meta(one_process):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    plain = Decoder()
    for settings in ({}, {"init_lora_weights": "gaussian"}, {"use_dora": True}):
        with torch.device("meta"):
            model = Decoder()
        inject_lora(model, LoRAConfig(("to_qkv", "to_out"), **settings))
        freeze_base_params(model)
        for module in (*model.blocks, model):
            fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
        model.to_empty(device="cpu")
        weights = [p for p in model.parameters() if not p.requires_grad]
        for weight, value in zip(weights, plain.parameters(), strict=True):
            weight.data.to_local().copy_(value.data)
        assert model(X).isnan().any()
        if "use_dora" in settings:
            with pytest.raises(InjectionError, match="to_qkv: FSDP shards it, but DoRA"):
                reset_lora_parameters(model)
            continue
        assert reset_lora_parameters(model) == 4
        torch.testing.assert_close(model(X), plain(X))
        model(X).square().sum().backward()
        assert all(layer.lora_B.grad.full_tensor().any() for _, layer in named_lora_layers(model))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_13_checkpointing_behind_a_frozen_embedding_is_detected():
    class Model(nn.Module):
        def __init__(self, reentrant):
            super().__init__()
            self.table, self.body, self.reentrant = nn.Embedding(5, 8), Decoder(), reentrant

        def forward(self, tokens):
            return checkpoint(self.body, self.table(tokens), use_reentrant=self.reentrant)

    for reentrant in (False, True):
        model = Model(reentrant)
        inject_lora(model)
        freeze_base_params(model)
        report = check(model, torch.arange(5))
        assert report.ok != reentrant
    assert len(report.findings) == 4
    with pytest.raises(CheckError, match="reentrant checkpointing whose inputs need none"):
        report.raise_if_failed()


def test_14_unfrozen_heads_are_saved_by_name(tmp_path):
    model, twin = Decoder(), Decoder()
    for m in (model, twin):
        setup_lora_for_medical_finetuning(m)
    with torch.no_grad():
        model.out_layer.weight.fill_(3.0)
    save_adapter(model, tmp_path / "a.safetensors")
    result = load_adapter(twin, tmp_path / "a.safetensors")
    assert "out_layer.weight" in result.loaded
    assert torch.equal(twin.out_layer.weight, model.out_layer.weight)


def test_15_a_second_injection_raises():
    model = adapted()
    expected = model(X)
    with pytest.raises(InjectionError, match="already has 4 adapted layers"):
        inject_lora(model, ["mlp"])
    assert torch.equal(model(X), expected)


def test_15_a_second_adapter_can_be_added_under_another_name():
    model = adapted()
    expected, layer = model(X), model.blocks[0].attn.to_out
    add_adapter(model, "other", ["mlp", "to_out"], activate=True)
    randomise_adapters(model, seed=2)
    assert model.blocks[0].attn.to_out.original_linear is layer.original_linear  # wrapped once
    assert_differs(model(X), expected)
    set_adapter(model, "default")
    assert model.blocks[0].attn.to_out is layer and torch.equal(model(X), expected)
    with pytest.raises(ConfigError, match="already has an adapter 'other'"):
        add_adapter(model, "other", ["mlp"])


def test_16_the_base_models_checkpoints_load_and_save_under_their_own_keys():
    torch.manual_seed(3)
    original = Decoder().state_dict()
    model = adapted()
    load_base_state_dict(model, original)
    assert list(base_state_dict(model)) == list(original)
    plain = Decoder()
    plain.load_state_dict(base_state_dict(model), strict=True)
    assert all(torch.equal(value, original[key]) for key, value in plain.state_dict().items())
    with pytest.raises(CheckpointError, match=r"nearest: blocks\.0\.attn\.to_qkv\.weight"):
        load_base_state_dict(model, {f"net.{k}": v for k, v in original.items()})


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_17_copies_and_pickles_are_independent_models(duplicate):
    model = adapted(dropout=0.5).eval()
    twin = duplicate(model)
    assert torch.equal(twin(X), model(X))
    randomise_adapters(twin, seed=2)
    assert not torch.equal(twin(X), model(X))


def test_18_parametrised_weights_are_not_merged_and_convolutions_keep_all_arguments(
    tmp_path,
):
    model = Decoder()
    parametrizations.weight_norm(model.blocks[0].attn.to_qkv)
    inject_lora(model)
    with pytest.raises(MergeError, match="blocks.0.attn.to_qkv: the weight is parametrised"):
        merge_lora_weights(model)
    conv = nn.Conv1d(4, 4, 3, dilation=2, padding=2, padding_mode="circular")
    layer = LoRAConv(conv)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 4, 9)
    wide = copy.deepcopy(layer).double()(x.double())
    assert_close(layer.merge_weights()(x), layer(x), wide)
    assert not torch.equal(layer(x), conv(x))
    import peft

    root = nn.Sequential(nn.Conv1d(4, 4, 3, dilation=2))
    peft.get_peft_model(root, peft.LoraConfig(target_modules=["0"])).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="PEFT's adapter of a convolution with dilation=.2,."):
        from_pretrained(nn.Sequential(nn.Conv1d(4, 4, 3, dilation=2)), tmp_path)


class Sparse:
    """A sparse tensor: values and coordinates."""

    def __init__(self, feats, coords):
        self.feats, self.coords = feats, coords

    def replace(self, feats):
        return Sparse(feats, self.coords)


def test_19_dropout_applies_to_the_values_of_sparse_inputs():
    layer = LoRALinear(nn.Linear(8, 4), dropout=0.5)
    nn.init.normal_(layer.lora_B)
    torch.manual_seed(1)
    out = layer(Sparse(X, "coordinates"))
    torch.manual_seed(1)
    assert torch.equal(out.feats, layer(X)) and out.coords == "coordinates"
    assert not torch.equal(layer(X), layer.eval()(X))
