"""DoRA, PiSSA, OLoRA, LoRA+, and parameters that train besides the adapters."""

import copy

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F

from fastlora import (
    CheckpointError,
    ConfigError,
    InjectionError,
    LoRAConfig,
    LoRALinear,
    add_adapter,
    base_state_dict,
    check,
    count_parameters,
    disable_adapter,
    estimate,
    explain,
    freeze_base_params,
    from_pretrained,
    get_lora_params,
    get_lora_state_dict,
    inject_lora,
    load_adapter,
    load_lora_state_dict,
    loraplus_groups,
    merge_report,
    merged_model,
    save_adapter,
    save_pretrained,
)
from tests.support.models import Decoder, randomise_adapters
from tests.support.tolerance import assert_close, assert_differs

X = torch.linspace(-1, 1, 24).view(3, 8)
METHODS = ("pissa", "pissa_niter_8", "olora")


def dora(p=0.0, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(8, 6, bias=bias).to(dtype), 2, 6.0, p, use_dora=True)
    with torch.no_grad():
        layer.lora_B.normal_()
        layer.lora_magnitude.mul_(torch.linspace(0.5, 2, 6))
    return layer


def dora_reference(layer, x):
    """The paper's expression in float64, the norm constant in the backward pass; dropout is already applied to x."""
    w, b = layer.original_linear.weight.double(), layer.original_linear.bias
    a64, b64 = layer.lora_A.double(), layer.lora_B.double()
    merged = w + layer.scaling * b64 @ a64
    g = layer.lora_magnitude.double() / merged.norm(dim=1).detach()
    return F.linear(x, g[:, None] * merged, None if b is None else b.double())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("wrapped", [False, True])
def test_dora_is_the_papers_expression_and_so_are_its_gradients(bias, wrapped):
    layer = dora(bias=bias)
    if wrapped:
        layer.original_linear.register_forward_hook(lambda *_: None)
    x, x64 = X.clone().requires_grad_(), X.double().requires_grad_()
    y, y64 = layer(x), dora_reference(layer, x64)
    layer.original_linear.requires_grad_(False)
    plain = copy.deepcopy(layer)
    x32 = X.clone().requires_grad_()
    merged = plain.original_linear.weight + plain.scaling * plain.lora_B @ plain.lora_A
    g = plain.lora_magnitude / merged.norm(dim=1).detach()
    y32 = F.linear(x32, g[:, None] * merged, plain.original_linear.bias)
    assert_close(y, y32, y64)
    parameters = list(layer.lora_parameters().values())
    wanted = torch.autograd.grad(y64.sin().sum(), [x64, *parameters])
    same = torch.autograd.grad(y32.sin().sum(), [x32, *plain.lora_parameters().values()])
    got = torch.autograd.grad(y.sin().sum(), [x, *parameters])
    for name, g32, s32, w64 in zip(("x", *layer.lora_parameters()), got, same, wanted, strict=True):
        assert_close(g32, s32, w64.double(), name)


def test_dora_initially_equals_the_base_and_merges_into_it():
    layer = LoRALinear(nn.Linear(8, 6), 2, use_dora=True)
    base = layer.original_linear
    wide = copy.deepcopy(base).double()(X.double())
    assert_close(layer(X), base(X), wide)
    layer = dora()
    merged = layer.merge_weights()
    assert_close(layer(X), merged(X), dora_reference(layer, X.double()).detach())
    assert torch.equal(merged.weight, layer.weight)
    report = merge_report(nn.Sequential(layer))
    assert report.ok and report.layers[0].lost < 1e-5
    assert "use_dora=True" in repr(layer)
    assert "DoRA scales the output" in explain(layer, X).reason


def test_dora_leaves_the_base_path_out_of_dropout():
    layer = dora(p=0.5)
    with torch.no_grad():
        layer.lora_B.zero_()
    assert torch.equal(layer(X), layer.eval()(X))
    layer = dora(p=0.5)
    assert_differs(layer(X), layer.eval()(X))


def test_dora_norms_are_exact_under_autocast_and_for_16_bits():
    layer = dora(dtype=torch.bfloat16)
    assert layer.lora_magnitude.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        inside = layer._row_norms()
    merged = layer.original_linear.weight.double() + layer.scaling * (
        layer.lora_B.double() @ layer.lora_A.double()
    )
    assert_close(inside, merged.norm(dim=1).float(), merged.norm(dim=1))


@pytest.mark.parametrize("ratio", [1.0, 1e-2, 1e-4, 1e-6])
def test_dora_norms_are_exact_where_the_update_cancels_the_weight(ratio):
    """‖W + scaling · B A‖ = ratio · ‖W‖, for which the expanded square would lose all digits."""
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(64, 48), 8, 8.0, use_dora=True)
    with torch.no_grad():
        layer.lora_B.normal_()
        rest = torch.randn(48, 64) * ratio
        layer.original_linear.weight.copy_(rest - layer.scaling * layer.lora_B @ layer.lora_A)
    w, a, b = layer.original_linear.weight, layer.lora_A, layer.lora_B
    exact = (w.double() + layer.scaling * b.double() @ a.double()).norm(dim=1)
    assert_close(layer._row_norms(), (w + layer.scaling * b @ a).norm(dim=1), exact)


def adapted(**settings):
    torch.manual_seed(0)
    model = Decoder()
    inject_lora(model, LoRAConfig(["to_qkv", "mlp"], rank=4, alpha=6.0, **settings))
    freeze_base_params(model)
    return model


def with_dora():
    model = adapted(use_dora=True)
    randomise_adapters(model)
    with torch.no_grad():
        for parameter in get_lora_params(model):
            if parameter.ndim == 1:
                parameter.mul_(1.5)
    return model


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # torch's own, while it traces
def test_dora_goes_through_every_function(tmp_path):
    model = with_dora()
    y = model(X)
    base = Decoder()
    base.load_state_dict(base_state_dict(model))
    assert "blocks.0.attn.to_qkv.lora_magnitude" in get_lora_state_dict(model)
    _, trainable = freeze_base_params(model)
    assert trainable == sum(p.numel() for p in get_lora_params(model))
    assert sum(p.ndim == 1 for p in get_lora_params(model)) == 6
    config = LoRAConfig(["to_qkv", "mlp"], rank=4, alpha=6.0, use_dora=True)
    assert estimate(base, 3, config).trainable_bytes == 4 * trainable
    assert estimate(base, 3, config).saved_bytes == estimate(model, 3).saved_bytes
    assert check(model, X).ok
    assert_close(merged_model(model)(X), y, copy.deepcopy(model).double()(X.double()))
    save_adapter(model, tmp_path / "dora.safetensors")
    twin = copy.deepcopy(base)
    inject_lora(twin, config)
    load_adapter(twin, tmp_path / "dora.safetensors")
    assert torch.equal(twin(X), y)
    with pytest.raises(CheckpointError, match="unexpected .*lora_magnitude"):
        load_adapter(adapted(), tmp_path / "dora.safetensors")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(X), y, copy.deepcopy(model).double()(X.double()))
    with disable_adapter(model):
        assert torch.equal(model(X), base(X))


def test_dora_counts_what_it_saves():
    layer = dora(p=0.5)
    layer.original_linear.requires_grad_(False)
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    x = X.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        layer(x)
    counted = sum(size for place, size in kept.items() if place not in own)
    assert counted == estimate(nn.Sequential(layer), 3).saved_bytes


@pytest.mark.parametrize("options", [{}, {"init_lora_weights": "olora"}])
def test_peft_and_fastlora_agree_on_dora(options, tmp_path):
    peft = pytest.importorskip("peft")
    model = with_dora() if not options else adapted(use_dora=True, **options)
    randomise_adapters(model)
    model.eval()
    base = Decoder()
    base.load_state_dict(base_state_dict(model))
    wide = copy.deepcopy(model).double()(X.double())
    save_pretrained(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    same = merged_model(model)(X)
    assert_close(theirs(X), same, wide)
    theirs.save_pretrained(tmp_path / "theirs")
    from_pretrained(base, tmp_path / "theirs")
    assert_close(base.eval()(X), same, wide)
    assert_differs(same, base_output(base))


def base_output(model):
    with disable_adapter(model):
        return model(X)


def test_a_folder_cannot_store_dora_on_some_layers_only(tmp_path):
    model = nn.Sequential(LoRALinear(nn.Linear(2, 2)), LoRALinear(nn.Linear(2, 2), use_dora=True))
    freeze_base_params(model)
    with pytest.raises(CheckpointError, match="some layers have DoRA and some do not"):
        save_pretrained(model, tmp_path)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_initialisation_from_the_weight_leaves_the_output_unchanged(method, use_rslora):
    model = adapted(init_lora_weights=method, use_rslora=use_rslora)
    base = Decoder()
    base.load_state_dict(base_state_dict(model))
    assert_close(model(X), base(X), copy.deepcopy(base).double()(X.double()))
    for _, layer in model.named_modules():
        if isinstance(layer, LoRALinear):
            assert layer.lora_A.any() and layer.lora_B.any()
            delta = layer.delta(torch.float64)
            assert delta.abs().max() < 1e-6 * layer.original_linear.weight.abs().max()


def test_pissa_uses_the_principal_part_of_the_weight():
    layer = adapted(init_lora_weights="pissa").blocks[0].attn.to_qkv
    weight = layer.original_linear.weight.double()
    taken = layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    sigma = torch.linalg.svdvals(weight)
    assert_close((weight - taken).norm().float(), sigma[4:].norm().float(), sigma[4:].norm())
    fast = adapted(init_lora_weights="pissa_niter_16").blocks[0].attn.to_qkv
    found = fast.scaling * fast.lora_B.double() @ fast.lora_A.double()
    assert (weight - found).norm() < 1.01 * (weight - taken).norm()


def test_olora_uses_orthogonal_columns():
    layer = adapted(init_lora_weights="olora").blocks[0].attn.to_qkv
    b = layer.lora_B.double()
    assert (b.T @ b - torch.eye(4)).abs().max() < 1e-6
    weight = layer.original_linear.weight.double()
    assert ((b.T @ weight) - layer.lora_A.double()).abs().max() < 1e-5  # A is Qᵀ W


@pytest.mark.parametrize("method", METHODS)
def test_a_step_equals_that_of_a_residual_weight(method):
    """PEFT's computation on one layer: W − s B₀ A₀ is frozen and B A added."""
    layer = adapted(init_lora_weights=method).blocks[0].attn.to_qkv
    x, bias = torch.randn(5, 16), layer.bias.detach()
    a, b = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
    weight = layer.original_linear.weight.detach()

    def three_steps(forward, a, b, x):
        for _ in range(3):
            gradients = torch.autograd.grad(forward(x, a, b).sin().sum(), [a, b])
            with torch.no_grad():
                for parameter, gradient in zip((a, b), gradients, strict=True):
                    parameter -= 0.1 * gradient
        return a, b, forward(x, a, b)

    def by_hand(dtype):
        a0, b0, w = a.to(dtype), b.to(dtype), weight.to(dtype)
        residual = w - layer.scaling * b0 @ a0

        def forward(x, a, b):
            return F.linear(x, residual + layer.scaling * b @ a, bias.to(dtype))

        leaves = a0.clone().requires_grad_(), b0.clone().requires_grad_()
        return three_steps(forward, *leaves, x.to(dtype))

    layer.double()
    mine = three_steps(lambda x, *_: layer(x), layer.lora_A, layer.lora_B, x.double())
    for got, same, want in zip(mine, by_hand(torch.float32), by_hand(torch.float64), strict=True):
        assert_close(got.float(), same, want)
    assert_differs(mine[2], layer.original_linear(x.double()))


def test_the_initial_product_is_saved_with_the_adapter(tmp_path):
    model = adapted(init_lora_weights="pissa")
    with torch.no_grad():
        for parameter in get_lora_params(model):
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    y = model(X)
    base = Decoder()
    base.load_state_dict(base_state_dict(model))
    assert_differs(y, base(X))
    save_adapter(model, tmp_path / "pissa.safetensors")
    with safe_open(tmp_path / "pissa.safetensors", "pt") as file:
        assert "blocks.0.attn.to_qkv.initial_A" in set(file.keys())
    with pytest.raises(CheckpointError, match="unexpected .*initial_A"):
        load_adapter(adapted(), tmp_path / "pissa.safetensors")
    twin = copy.deepcopy(base)
    inject_lora(twin, LoRAConfig(["to_qkv", "mlp"], 4, 6.0, init_lora_weights="olora"))
    load_lora_state_dict(twin, get_lora_state_dict(model))  # replaces the initialisation
    assert torch.equal(twin(X), y)
    assert_close(merged_model(model)(X), y, copy.deepcopy(model).double()(X.double()))
    save_pretrained(model, tmp_path / "folder")
    plain = copy.deepcopy(base)
    from_pretrained(plain, tmp_path / "folder")
    layer = plain.blocks[0].attn.to_qkv
    assert (layer.rank, layer.scaling) == (8, 1.5)
    assert torch.equal(plain(X), y)


def test_initialisation_from_the_weight_needs_a_rank_that_it_has():
    with pytest.raises(InjectionError, match="'pissa' needs a rank of at most 5, got 6"):
        inject_lora(Decoder(), LoRAConfig(["out_layer"], rank=6, init_lora_weights="pissa"))
    with pytest.raises(ConfigError, match="needs an alpha other than 0"):
        LoRAConfig(alpha=0, init_lora_weights="olora")
    for invalid in ("pissa_niter_0", "pissa_niter_", None):
        with pytest.raises(ConfigError, match="init_lora_weights: expected one of"):
            LoRAConfig(init_lora_weights=invalid)
    with pytest.raises(ConfigError, match="use_dora: expected True or False, got 1"):
        LoRAConfig(use_dora=1)
    with pytest.raises(ConfigError, match="use_dora: expected True or False, got 1"):
        LoRALinear(nn.Linear(2, 2), use_dora=1)


def test_loraplus_groups_hold_every_trained_parameter_once():
    model = adapted()
    freeze_base_params(model)
    model.out_layer.requires_grad_(True)
    slow, fast = loraplus_groups(model, 1e-3, lr_ratio=8, weight_decay=0.1)
    assert (slow["lr"], fast["lr"], fast["weight_decay"]) == (1e-3, 8e-3, 0.1)
    b = [layer.lora_B for _, layer in model.named_modules() if isinstance(layer, LoRALinear)]
    assert {id(p) for p in fast["params"]} == {id(p) for p in b}
    together = [*slow["params"], *fast["params"]]
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for p in together} == trained and len(together) == len(trained)
    optimizer = torch.optim.SGD(loraplus_groups(model, 1e-3, 8.0))
    before = [p.detach().clone() for p in b]
    model(X).sum().backward()
    optimizer.step()
    for old, parameter in zip(before, b, strict=True):
        assert torch.equal(parameter, old - 8e-3 * parameter.grad)


def test_loraplus_names_invalid_arguments():
    with pytest.raises(InjectionError, match="has no lora_B that trains"):
        loraplus_groups(Decoder(), 1e-3)
    for settings, message in (
        ({"lr": 0.0}, "lr: expected a finite number above 0, got 0.0"),
        ({"lr": 1e-3, "lr_ratio": 0.5}, "lr_ratio: expected a finite number ≥ 1, got 0.5"),
        ({"lr": float("nan")}, "lr: expected a finite number"),
    ):
        with pytest.raises(ConfigError, match=message):
            loraplus_groups(adapted(), **settings)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"bias": "lora_only"}, {"blocks.0.attn.to_qkv.original_linear.bias"}),
        ({"bias": "all"}, {"blocks.0.attn.to_qkv.original_linear.bias", "out_layer.bias"}),
        ({"modules_to_save": ["out_layer"]}, {"out_layer.weight", "out_layer.bias"}),
        ({"modules_to_save": ["blocks.0.mlp"]}, {"blocks.0.mlp.mlp.0.weight"}),
    ],
)
def test_what_the_config_lets_train_stays_trainable_and_is_saved(settings, expected, tmp_path):
    model = Decoder()
    inject_lora(model, LoRAConfig(["blocks.0.attn.to_qkv"], match="exact", **settings))
    twin = copy.deepcopy(model)
    freeze_base_params(twin)  # the copy has the marks too
    training = {n for n, p in twin.named_parameters() if p.requires_grad}
    assert expected <= training
    others = {n for n in training if "lora_" not in n}
    biases = {n for n in training if n.endswith("bias")}
    if settings.get("bias") == "lora_only":
        assert others == expected
    elif "bias" in settings:
        assert others == biases == {n for n, _ in twin.named_parameters() if n.endswith("bias")}
    else:
        name = settings["modules_to_save"][0]
        assert others and all(n.startswith(name) for n in others)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if name in others:
                parameter.add_(1.0)
    save_adapter(twin, tmp_path / "adapter.safetensors")
    freeze_base_params(model)
    load_adapter(model, tmp_path / "adapter.safetensors")
    assert torch.equal(model(X), twin(X))
    assert count_parameters(model)["trainable"] == count_parameters(twin)["trainable"]


def test_modules_to_save_must_exist_and_have_no_adapter():
    with pytest.raises(
        InjectionError, match="modules_to_save: 'out_lair' is not a module.*out_layer"
    ):
        inject_lora(Decoder(), LoRAConfig(modules_to_save=["out_lair"]))
    model = Decoder()
    with pytest.raises(InjectionError, match="blocks.0 is or contains blocks.0.attn.to_out"):
        inject_lora(model, LoRAConfig(modules_to_save=["blocks.0"]))
    assert not get_lora_params(model)
    for invalid, message in (
        ({"bias": True}, "bias: expected one of none, all, lora_only, got True"),
        ({"modules_to_save": "head"}, "modules_to_save: expected a list of names, got 'head'"),
    ):
        with pytest.raises(ConfigError, match=message):
            LoRAConfig(**invalid)


def test_marks_of_extra_trainable_parameters_are_removed_with_the_last_adapter():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    inject_lora(model, LoRAConfig(["0"], modules_to_save=["1"]))
    model = merged_model(model)
    inject_lora(model, ["0"])
    freeze_base_params(model)
    assert not model[1].weight.requires_grad
    add_adapter(model, "other", ["0"])
    with pytest.raises(ConfigError, match="modules_to_save, bias: expected none .* other adapters"):
        add_adapter(model, "third", LoRAConfig(["0"], modules_to_save=["1"]))


def test_all_biases_are_all_parameters_with_bias_in_their_name():
    model = nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2), nn.LSTM(8, 8))
    inject_lora(model, LoRAConfig(["0"], bias="all"))
    freeze_base_params(model)
    assert model[1].in_proj_bias.requires_grad and model[2].bias_ih_l0.requires_grad
    assert not model[1].in_proj_weight.requires_grad


def test_biases_cannot_be_saved_in_a_folder(tmp_path):
    model = Decoder()
    inject_lora(model, LoRAConfig(["to_qkv"], bias="lora_only"))
    freeze_base_params(model)
    refusal = r"to_qkv\.original_linear\.bias belongs to .* cannot store.*bias='none'.*save_adapter"
    with pytest.raises(CheckpointError, match=refusal):
        save_pretrained(model, tmp_path)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_a_part_of_an_adapter_is_not_loaded_and_a_reset_is_complete(settings):
    model, plain = adapted(**settings), adapted()
    before = model(X)
    with pytest.raises(CheckpointError, match="only a part of the adapter of blocks.0.attn.to_qkv"):
        load_lora_state_dict(model, get_lora_state_dict(plain), strict=False)
    assert torch.equal(model(X), before)
    randomise_adapters(model)
    layer = model.blocks[0].attn.to_qkv
    with torch.no_grad():
        for parameter in layer.lora_parameters().values():
            parameter.add_(0.3)
    layer.reset_lora_parameters()
    x = torch.randn(3, 16)
    base = layer.original_linear
    assert_close(layer(x), base(x), copy.deepcopy(base).double()(x.double()))


def test_a_subtracted_initial_product_is_counted():
    model = nn.Sequential(nn.Linear(16, 16))
    config = LoRAConfig(["0"], rank=4, init_lora_weights="olora")
    planned = estimate(model, 3, config)
    inject_lora(model, config)
    freeze_base_params(model)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def note(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        model(torch.randn(3, 16, requires_grad=True))
    assert sum(kept.values()) == estimate(model, 3).saved_bytes == planned.saved_bytes
