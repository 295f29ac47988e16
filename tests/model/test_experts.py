"""Adapters for the experts of transformers' mixtures of experts, in whole models."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call

import fastlora
from fastlora import (
    ConfigError,
    InjectionError,
    LoRAConfig,
    base_state_dict,
    freeze_base_params,
    get_lora_params,
    inject_lora,
    load_adapter,
    merge_lora_weights,
    merged_model,
    named_lora_layers,
    save_adapter,
)
from fastlora.layers.banks import ExpertBank
from fastlora.layers.experts import LoRAExperts, LoRATransposedExperts
from tests.support.experts import IDS, MODELS, build, has_bank
from tests.support.models import randomise_adapters
from tests.support.processes import run_processes
from tests.support.tolerance import assert_close, assert_differs, assert_same_training
from tests.support.versions import needs_torch

transformers = pytest.importorskip("transformers", minversion="5.0")

pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*`:FutureWarning")
every = pytest.mark.parametrize("name", MODELS)
CONFIG = LoRAConfig("all-linear", rank=3, alpha=6.0)


def adapted(name, config=CONFIG, dtype=torch.float32):
    model = build(name, dtype)
    inject_lora(model, config)
    freeze_base_params(model)
    randomise_adapters(model)
    return model


def experts(model):
    return {p: layer for p, layer in named_lora_layers(model) if isinstance(layer, LoRAExperts)}


def loss_of(model, weights=None, **kwargs):
    arguments = {"input_ids": IDS, "labels": IDS, **kwargs}
    if weights is None:
        return model(**arguments).loss
    return functional_call(model, weights, (), arguments).loss


@every
def test_all_linear_adapts_both_projections_of_every_experts_module_and_no_router(name):
    model = build(name)
    before, state = model(IDS).logits, copy.deepcopy(model.state_dict())
    inject_lora(model, "all-linear")
    paths = [path for path, _ in named_lora_layers(model)]
    found = experts(model)
    assert len(found) == 4
    assert {path.rpartition(".")[2] for path in found} == {"gate_up_proj", "down_proj"}
    assert {type(layer) for layer in found.values()} == {
        LoRATransposedExperts if name == "gpt_oss" else LoRAExperts
    }
    assert not [path for path in paths if path.endswith(("gate", "router"))]
    assert "lm_head" not in paths
    own = base_state_dict(model)
    assert own.keys() == state.keys()
    assert all(torch.equal(own[key], value) for key, value in state.items())
    wide = build(name, torch.float64)
    assert_close(model(IDS).logits, before, wide(IDS).logits)
    assert model.config._experts_implementation != "fastlora"  # that of the experts alone


@every
def test_outputs_and_gradients_are_those_of_the_models_own_code_with_w_plus_delta(name):
    """The model's own code, in float64, with W + scaling · B A as weights, differentiated by autograd."""
    model, plain = adapted(name), build(name, torch.float64)
    model.train()
    plain.train().requires_grad_(False)
    leaves, weights = {}, {}
    for path, layer in named_lora_layers(model):
        a, b = (f.detach().double().requires_grad_() for f in (layer.lora_A, layer.lora_B))
        leaves[path] = a, b
        name_of_weight = path if path in experts(model) else f"{path}.weight"
        delta = layer.scaling * b @ a
        weight = plain.get_parameter(name_of_weight)
        weights[name_of_weight] = weight + (delta if delta.shape == weight.shape else delta.mT)
    want = loss_of(plain, weights)
    want.backward()
    single = build(name).train().requires_grad_(False)
    rough_leaves = {
        path: [f.detach().float().requires_grad_() for f in ab] for path, ab in leaves.items()
    }
    rough_weights = {}
    for path, (a, b) in rough_leaves.items():
        key = path if path in weights else f"{path}.weight"
        delta, weight = 2.0 * b @ a, single.get_parameter(key)
        rough_weights[key] = weight + (delta if delta.shape == weight.shape else delta.mT)
    rough = loss_of(single, rough_weights)
    rough.backward()
    got = loss_of(model)
    got.backward()
    assert_close(got.detach(), rough.detach(), want.detach())
    # All gradients as one, each relative to its largest value: the errors of two orders of summation are similar only over many numbers.
    found = []
    for path, layer in named_lora_layers(model):
        for three in zip(
            (layer.lora_A, layer.lora_B), rough_leaves[path], leaves[path], strict=True
        ):
            largest = three[2].grad.abs().max()
            assert largest > 0, path
            found.append([(t.grad / largest.to(t.dtype)).flatten() for t in three])
    assert_close(*map(torch.cat, zip(*found, strict=True)))


@every
def test_an_adapter_is_saved_and_loaded_and_the_base_by_its_own_keys(name, tmp_path):
    model = adapted(name)
    want = model(IDS).logits
    save_adapter(model, tmp_path / "a.safetensors")
    other = build(name, seed=1)
    inject_lora(other, CONFIG)
    base = build(name).state_dict()
    other.load_state_dict(base | {k: v for k, v in other.state_dict().items() if "lora_" in k})
    load_adapter(other, tmp_path / "a.safetensors")
    assert torch.equal(other(IDS).logits, want)
    fresh = build(name, seed=1)
    inject_lora(fresh, CONFIG)
    load_adapter(fresh, tmp_path / "a.safetensors")
    fastlora.load_base_state_dict(fresh, base)
    assert torch.equal(fresh(IDS).logits, want)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(IDS).logits, want)
        randomise_adapters(copied, seed=5)
        assert_differs(copied(IDS).logits, want)
    assert torch.equal(model(IDS).logits, want)


@every
def test_a_merge_gives_the_models_own_class_parameters_and_code(name):
    model, plain = adapted(name), build(name)
    wide = adapted(name, dtype=torch.float64)
    want, names = model(IDS).logits, list(plain.state_dict())
    report = fastlora.merge_report(model)
    assert report.ok and all(layer.skipped is None for layer in report.layers)
    assert len(report.layers) == len(list(named_lora_layers(model)))
    copied = merged_model(model)
    merge_lora_weights(model)
    for merged in (model, copied):
        assert list(merged.state_dict()) == names
        assert not any(isinstance(module, ExpertBank) for module in merged.modules())
        module = next(m for m in merged.modules() if has_bank(m))
        assert isinstance(module._parameters["down_proj"], nn.Parameter)
        assert module.config is merged.config
        assert_close(merged(IDS).logits, want, wide(IDS).logits)
    assert inject_lora(model, CONFIG) > 0  # and again


@every
def test_checkpointing_and_dropout_give_the_gradients_of_one_pass(name):
    config = LoRAConfig("all-linear", rank=3, dropout=0.3)
    model = adapted(name, config).train()
    losses, gradients = [], []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        torch.manual_seed(3)
        loss = loss_of(model, use_cache=False)
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad.clone() for p in get_lora_params(model)])
    assert losses[0] == losses[1]
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    torch.manual_seed(4)
    assert loss_of(model, use_cache=False).item() != losses[0]
    model.eval()
    assert loss_of(model).item() == loss_of(model).item()


@every
def test_dora_scales_the_rows_of_each_expert(name):
    model = adapted(name, LoRAConfig("down_proj", rank=3, use_dora=True))
    plain, wide = (
        build(name),
        adapted(name, LoRAConfig("down_proj", rank=3, use_dora=True), torch.float64),
    )
    with torch.no_grad():
        for layers in (named_lora_layers(model), named_lora_layers(wide)):
            for number, (_, layer) in enumerate(layers):
                layer.lora_magnitude *= 1.5 + number
    results = []
    for dtype, source in ((torch.float32, model), (torch.float64, wide)):
        weights = {}
        own = plain if dtype == torch.float32 else build(name, dtype)
        for path, layer in named_lora_layers(source):
            key = path if isinstance(layer, LoRAExperts) else f"{path}.weight"
            weight = own.get_parameter(key)
            turned = isinstance(layer, LoRATransposedExperts)
            merged = (weight.mT if turned else weight) + layer.scaling * layer.lora_B @ layer.lora_A
            scaled = merged * (layer.lora_magnitude / merged.norm(dim=-1))[..., None]
            weights[key] = scaled.mT if turned else scaled
        results.append(functional_call(own, weights, (IDS,)).logits.detach())
    assert_close(model(IDS).logits.detach(), *results)
    assert_differs(results[0], plain(IDS).logits)
    merged = merged_model(model)
    assert_close(merged(IDS).logits.detach(), *results)


def test_adapters_are_switched_and_the_last_to_go_leaves_the_parameters_as_they_were():
    model = build("qwen3")
    before, names = model(IDS).logits, list(model.state_dict())
    for number, rank in enumerate((2, 4)):
        fastlora.add_adapter(
            model, f"a{number}", LoRAConfig("all-linear", rank=rank), activate=True
        )
        randomise_adapters(model, seed=number)
    outputs = {}
    for name in ("a0", "a1"):
        fastlora.set_adapter(model, name)
        outputs[name] = model(IDS).logits
    assert_differs(outputs["a0"], outputs["a1"])
    fastlora.set_adapter(model, "a0")
    assert torch.equal(model(IDS).logits, outputs["a0"])
    with fastlora.use_adapter(model, None):
        wide = build("qwen3", torch.float64)
        assert_close(model(IDS).logits, before, wide(IDS).logits)
        assert list(base_state_dict(model)) != [] and set(base_state_dict(model)) == set(names)
    with fastlora.disable_adapter(model):
        assert_close(model(IDS).logits, before, wide(IDS).logits)
    with pytest.raises(
        InjectionError, match=r"experts\.\w+: a bank of experts has one active adapter"
    ):
        fastlora.set_adapter(model, ["a0", "a1"])
    with pytest.raises(InjectionError, match="adapts a bank of experts, which is not supported"):
        fastlora.combine_adapters(model, {"a0": 1.0, "a1": 1.0}, "both")
    assert torch.equal(model(IDS).logits, outputs["a0"])
    fastlora.delete_adapter(model, "a1")
    fastlora.delete_adapter(model, "a0")
    assert list(model.state_dict()) == names
    assert torch.equal(model(IDS).logits, before)


def test_one_projection_alone_and_ranks_by_pattern():
    model = build("mixtral")
    config = LoRAConfig(
        ["gate_up_proj", "down_proj"],
        rank=2,
        rank_pattern={"layers.1.mlp.experts.down_proj": 5},
        layers_to_transform=[1],
    )
    inject_lora(model, config)
    ranks = {path: layer.rank for path, layer in named_lora_layers(model)}
    stem = "model.layers.1.mlp.experts"
    assert ranks == {f"{stem}.gate_up_proj": 2, f"{stem}.down_proj": 5}
    assert isinstance(model.model.layers[0].mlp.experts.gate_up_proj, nn.Parameter)
    layer = model.get_submodule(f"{stem}.down_proj")
    assert layer.lora_A.shape == (4, 5, 48) and layer.lora_B.shape == (4, 32, 5)
    bound = 48**-0.5
    assert layer.lora_A.abs().max() <= bound and layer.lora_A.std() > 0.5 * bound
    counts = fastlora.count_parameters(model)
    assert counts["lora"] == 4 * (2 * (32 + 96) + 5 * (48 + 32))
    other = build("mixtral")
    inject_lora(other, ["down_proj"])
    randomise_adapters(other)
    assert_differs(other(IDS).logits, build("mixtral")(IDS).logits)


def test_estimate_and_tables_name_banks_and_count_what_trains():
    model = build("gpt_oss")
    table = fastlora.preview(model, CONFIG)
    rows = {row.path: row for row in table.rows}
    assert rows["model.layers.0.mlp.experts.down_proj"].status == "selected"
    assert rows["model.layers.0.mlp.experts.down_proj"].trainable == 4 * 3 * (48 + 32)
    assert "model.layers.0.mlp.experts" not in rows
    guessed = fastlora.estimate(model, 16, CONFIG)
    inject_lora(model, CONFIG)
    freeze_base_params(model)
    actual = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert guessed.trainable_bytes == actual == fastlora.estimate(model, 16).trainable_bytes
    assert guessed.uncounted == 4
    row = {r.path: r for r in fastlora.explain(model, rows=16).rows}
    assert row["model.layers.0.mlp.experts.down_proj"].choice.backend == "torch"
    report = fastlora.check(model, IDS)
    assert report.ok, str(report)


@pytest.mark.parametrize("method", ["pissa", "olora", "orthogonal"])
def test_initial_values_from_the_weight_are_refused_by_name(method):
    model = build("mixtral")
    names = list(model.state_dict())
    with pytest.raises(InjectionError, match=f"{method}.* is not supported for a bank of experts"):
        inject_lora(model, LoRAConfig("down_proj", rank=4, init_lora_weights=method))
    assert list(model.state_dict()) == names


def test_experts_with_a_forward_of_their_own_are_refused_by_name():
    config = transformers.Llama4TextConfig(
        hidden_size=32,
        intermediate_size=48,
        intermediate_size_mlp=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        vocab_size=64,
    )
    model = transformers.Llama4ForCausalLM(config)
    with pytest.raises(InjectionError, match="the forward of Llama4TextExperts is its own"):
        inject_lora(model, LoRAConfig("gate_up_proj"))
    with pytest.warns(
        fastlora.FastLoRAWarning, match=r"experts.gate_up_proj.* are stacked matrices"
    ):
        inject_lora(model, "all-linear")
    assert not [path for path, _ in named_lora_layers(model) if path.endswith("router")]
    model = build("mixtral")
    module = model.model.layers[0].mlp.experts
    module.forward = type(module).forward.__get__(module)
    assert not [
        p
        for p in fastlora.preview(model, CONFIG).rows
        if p.path.startswith("model.layers.0.mlp.experts.")
    ]


def test_rows_of_experts_of_other_processes_are_zero():
    """transformers marks them by a number from the count of experts on, with weight 0."""
    model = adapted("gpt_oss", LoRAConfig(["gate_up_proj", "down_proj"], rank=3))
    module = model.model.layers[0].mlp.experts
    module._is_expert_parallel = True
    x = torch.randn(6, 32, requires_grad=True)
    index = torch.tensor([[0, 4], [1, 2], [4, 4], [3, 0], [4, 1], [2, 3]])
    share = torch.rand(6, 2) * (index < 4)
    got = module(x, index, share)
    got.sum().backward()
    assert torch.equal(got[2], torch.zeros(32)) and torch.equal(x.grad[2], torch.zeros(32))
    exact = copy.deepcopy(module).double()
    want = exact(x.detach().double(), index.clamp(max=3), share.double())  # weight 0 leaves nothing
    merged = copy.deepcopy(model)
    merge_lora_weights(merged)
    plain = merged.model.layers[0].mlp.experts
    assert_close(got.detach(), plain(x.detach(), index, share).detach(), want.detach())


def test_bad_arguments_of_a_bank_are_named():
    layer = LoRAExperts(ExpertBank(nn.Parameter(torch.randn(3, 5, 4))), 2)
    offsets = torch.tensor([0, 1, 2, 4], dtype=torch.int32)
    assert layer(torch.randn(6, 4), offsets).shape == (6, 5)
    with pytest.raises(ConfigError, match=r"x: expected \(M, K=4\)"):
        layer(torch.randn(6, 5), offsets)
    with pytest.raises(InjectionError, match="expected an ExpertBank, got Linear"):
        LoRAExperts(nn.Linear(4, 5), 2)


def test_a_whole_model_is_saved_under_the_keys_of_the_plain_one(tmp_path):
    model = adapted("mixtral")
    want = model(IDS).logits
    model.save_pretrained(tmp_path / "m")
    assert torch.equal(model(IDS).logits, want)  # the adapters are in place again
    plain = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "m").eval()
    wide = adapted("mixtral", dtype=torch.float64)
    assert_close(plain(IDS).logits, want, wide(IDS).logits)  # by PEFT


def steps(name, rank, world):
    """The losses of three steps on this process's part of the batch, and lora_B of one bank afterwards; float64."""
    model = adapted(name, dtype=torch.float64).train()
    layer = model.get_submodule(list(experts(model))[-1])
    run = model if world == 1 else nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(get_lora_params(model), lr=0.1)
    ids, losses = IDS.chunk(world)[rank], []
    for _ in range(3):
        optimizer.zero_grad()
        loss = run(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, layer.lora_B.tolist()


def steps_of_a_rank(name):
    return steps(name, torch.distributed.get_rank(), 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "gpt_oss"])
def test_two_processes_train_as_one_does_on_the_whole_batch(name):
    (losses, factor), *others = [steps(name, 0, 1), *run_processes(2, steps_of_a_rank, name)]
    (one, first), (other, second) = others
    assert first == second
    assert_same_training(torch.tensor(first), torch.tensor(factor))
    for whole, part, rest in zip(losses, one, other, strict=True):
        assert_same_training(torch.tensor((part + rest) / 2), torch.tensor(whole))
    assert losses[2] < losses[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")  # Dynamo's
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@needs_torch((2, 7), "transformers' choice of an attention is not traced")
@pytest.mark.parametrize("name", ["qwen3", "gpt_oss"])
def test_blocks_compile_without_a_graph_break_and_drop_the_same_elements(name):
    config = LoRAConfig("all-linear", rank=3, dropout=0.3)
    model, results = adapted(name, config).train(), []
    for compiled in (False, True):
        if compiled:
            for block in model.model.layers:
                block.compile(backend="aot_eager", fullgraph=True)
        model.zero_grad()
        torch.manual_seed(0)
        loss = loss_of(model, use_cache=False)
        loss.backward()
        results.append((loss.item(), get_lora_params(model)[-1].grad.clone()))
    torch._dynamo.reset()
    (eager, gradient), (other, compiled_gradient) = results
    assert_same_training(torch.tensor(other), torch.tensor(eager))
    assert_same_training(compiled_gradient, gradient)
    assert gradient.abs().max() > 0
