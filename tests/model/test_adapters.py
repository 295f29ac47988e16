"""Named adapters: each computes what it would as the only adapter, after any switching."""

import copy
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn

import fastlora
from fastlora import (
    CheckpointError,
    ConfigError,
    FastLoRAWarning,
    InjectionError,
    LoRAConfig,
    LoRALinear,
    MergeError,
    active_adapter,
    add_adapter,
    combine_adapters,
    delete_adapter,
    disable_adapter,
    inject_lora,
    list_adapters,
    set_adapter,
    use_adapter,
)
from fastlora.model.activate import match_base
from fastlora.model.adapter_registry import copy_active
from tests.support.models import Decoder, randomise_adapters
from tests.support.tolerance import assert_close, assert_differs

X = torch.linspace(-1, 1, 48).view(2, 3, 8)
TARGETS = {"a": ["to_qkv", "to_out"], "b": ["to_out", "mlp"]}  # only a has to_qkv, only b has mlp


def many(targets=TARGETS, dtype=torch.float32, **options):
    """A decoder with the adapters of `targets`, with different values, none active."""
    torch.manual_seed(3)
    model = Decoder().to(dtype)
    for seed, (name, patterns) in enumerate(targets.items()):
        config = LoRAConfig(patterns, rank=3 + seed, alpha=5.0 + seed, **options)
        add_adapter(model, name, config)
        with use_adapter(model, name):
            randomise_adapters(model, seed)
    return model


def alone(model, name):
    """A copy of a model without an active adapter in which only `name` is installed, by assigning its wrappers."""
    assert active_adapter(model) is None
    twin = copy.deepcopy(model)
    layers = twin.__dict__.pop("_fastlora_adapters").adapters[name]
    for path, layer in layers.items():
        place, _, attribute = path.rpartition(".")
        setattr(twin.get_submodule(place), attribute, layer)
    return twin


def delta(model, name):
    """path → ΔW of the adapter, in float64."""
    with use_adapter(model, name):
        return {
            path: layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
            for path, layer in fastlora.named_lora_layers(model)
        }


def test_each_adapter_computes_what_it_does_as_the_only_one():
    model = many()
    plain = model(X)
    expected = {name: alone(model, name)(X) for name in TARGETS}
    assert_differs(expected["a"], expected["b"])
    assert_differs(expected["a"], plain)
    for name in ("a", "b", "a", None, "b", "b", None):
        set_adapter(model, name)
        assert active_adapter(model) == name
        assert torch.equal(model(X), plain if name is None else expected[name])
        where = {path for path, _ in fastlora.named_lora_layers(model)}
        assert len(where) == {"a": 4, "b": 6, None: 0}[name]
    assert list_adapters(model) == ["a", "b"]


@pytest.mark.parametrize(
    "order", [(0, 1, 2), (1, 0, 2), (2, 0, 1), (1, 2, 0), (0, 2, 1), (2, 1, 0)]
)
def test_overlapping_uses_restore_what_was_active_before_the_first(order):
    model = many()
    expected = {name: alone(model, name)(X) for name in TARGETS} | {None: model(X)}
    names = ["a", None, "b"]
    uses = [use_adapter(model, name) for name in names]
    for use in uses:
        use.__enter__()
    opened = [0, 1, 2]
    for which in order:
        assert torch.equal(model(X), expected[names[opened[-1]]])
        uses[which].__exit__(None, None, None)
        opened.remove(which)
    assert active_adapter(model) is None and torch.equal(model(X), expected[None])


@pytest.mark.parametrize("before", ["a", "b", None])
def test_a_use_that_ends_while_the_adapters_are_disabled_restores_the_one_before(before):
    model = many()
    plain = model(X)
    expected = None if before is None else alone(model, before)(X)
    set_adapter(model, before)
    use, disabled, more = use_adapter(model, "a"), disable_adapter(model), disable_adapter(model)
    use.__enter__()
    disabled.__enter__()
    more.__enter__()
    use.__exit__(None, None, None)  # in another task
    assert active_adapter(model) == before and torch.equal(model(X), plain)
    disabled.__exit__(None, None, None)
    assert torch.equal(model(X), plain)
    more.__exit__(None, None, None)
    assert torch.equal(model(X), plain if before is None else expected)
    for name in TARGETS:
        set_adapter(model, name)
        assert not torch.equal(model(X), plain)  # no layer stays disabled


def test_a_use_that_ends_while_a_part_is_disabled_leaves_that_part_disabled():
    model = many({"a": ["to_out"], "b": ["to_out"]})
    set_adapter(model, "a")
    with disable_adapter(model.blocks[0]):
        expected = model(X)
    use, disabled = use_adapter(model, "b"), disable_adapter(model.blocks[0])
    use.__enter__()
    disabled.__enter__()
    use.__exit__(None, None, None)
    assert torch.equal(model(X), expected)
    disabled.__exit__(None, None, None)
    assert not torch.equal(model(X), expected)


@pytest.mark.parametrize(
    "call",
    [
        lambda m, f: fastlora.save_adapter(m, f / "a.safetensors"),
        lambda m, f: fastlora.save_pretrained(m, f / "a"),
        lambda m, f: fastlora.load_lora_state_dict(m, {}),
        lambda m, f: fastlora.freeze_base_params(m),
        lambda m, f: fastlora.reset_lora_parameters(m),
        lambda m, f: fastlora.check(m, X),
        lambda m, f: fastlora.estimate(m, 4),
        lambda m, f: disable_adapter(m).__enter__(),
    ],
)
def test_inactive_adapters_are_named_where_an_active_one_is_missing(call, tmp_path):
    model = many()
    with pytest.raises(fastlora.FastLoRAError, match=r"has only the inactive adapters a, b \(see"):
        call(model, tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.warns(FastLoRAWarning, match="inactive adapters a, b .* so the dict is empty"):
        assert fastlora.get_lora_state_dict(model) == {}
    with pytest.warns(FastLoRAWarning, match="inactive adapters a, b .* so the copy is the base"):
        assert torch.equal(fastlora.merged_model(model)(X), model(X))
    with pytest.raises(fastlora.FastLoRAError, match="has no adapters"):
        call(Decoder(), tmp_path)


def test_without_an_active_adapter_the_model_is_plain():
    original = Decoder()
    model = copy.deepcopy(original)
    modules = dict(model.named_modules())
    assert add_adapter(model, "a", ["to_out"]) == 2
    assert add_adapter(model, "b", ["to_out", "mlp"], activate=True) == 6
    set_adapter(model, None)
    assert dict(model.named_modules()) == modules
    assert list(model.state_dict()) == list(original.state_dict())
    assert list(model.parameters()) == [p for m in modules.values() for p in m._parameters.values()]


def test_the_injected_adapter_is_called_default_and_stays_active():
    model = Decoder()
    assert (active_adapter(model), list_adapters(model)) == (None, [])
    inject_lora(model, ["to_out"])
    randomise_adapters(model)
    before = model(X)
    assert (active_adapter(model), list_adapters(model)) == ("default", ["default"])
    add_adapter(model, "b", ["mlp"])
    assert (active_adapter(model), list_adapters(model)) == ("default", ["default", "b"])
    assert torch.equal(model(X), before)
    with pytest.raises(ConfigError, match="already has an adapter 'default'"):
        add_adapter(model, "default", ["mlp"])


def test_a_context_restores_the_adapter_after_an_exception_too():
    model = many()
    set_adapter(model, "a")
    with pytest.raises(ZeroDivisionError), use_adapter(model, "b"):
        with use_adapter(model, None):
            assert active_adapter(model) is None
        assert active_adapter(model) == "b"
        _ = 1 / 0
    assert active_adapter(model) == "a"


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("active", [None, "a"])
def test_copies_keep_the_inactive_adapters_and_share_the_base_as_the_model_does(duplicate, active):
    model = many()
    set_adapter(model, active)
    twin = duplicate(model)
    assert (active_adapter(twin), list_adapters(twin)) == (active, ["a", "b"])
    for name in ("b", "a", None):
        set_adapter(model, name)
        set_adapter(twin, name)
        assert torch.equal(model(X), twin(X))
    with torch.no_grad():
        twin.blocks[0].attn.to_out.weight.zero_()
    mine = {id(p) for p in model.parameters()}
    for name in ("a", "b"):
        set_adapter(twin, name)
        assert not twin.blocks[0].attn.to_out.original_linear.weight.any()
        assert mine.isdisjoint(id(p) for p in twin.parameters())


def test_an_optimizer_continues_after_switching_away_and_back():
    def step(model, optimizer):
        model(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    model = many()
    set_adapter(model, "a")
    fastlora.freeze_base_params(model)
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.Adam(fastlora.get_lora_params(m), lr=0.1) for m in (model, twin)]
    other = None
    for _ in range(3):
        for m, optimizer in zip((model, twin), optimizers, strict=True):
            step(m, optimizer)
        set_adapter(model, "b")
        other = other or torch.optim.Adam(fastlora.get_lora_params(model), lr=0.1)
        step(model, other)
        set_adapter(model, "a")
    states = fastlora.get_lora_state_dict(model), fastlora.get_lora_state_dict(twin)
    assert len(states[0]) == 8 and all(torch.equal(v, states[1][k]) for k, v in states[0].items())
    for m in (model, twin):
        set_adapter(m, "b")
    assert_differs(model(X), twin(X))  # b was trained in one of them


def test_the_training_mode_follows_the_model_and_requires_grad_stays_with_the_adapter():
    model = many(dropout=0.5)
    set_adapter(model, "a")
    model.eval()
    for parameter in fastlora.get_lora_params(model):
        parameter.requires_grad_(False)
    set_adapter(model, "b")
    assert not any(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in fastlora.get_lora_params(model))
    model.train()
    set_adapter(model, "a")
    assert all(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in fastlora.get_lora_params(model))
    fastlora.freeze_base_params(model)
    set_adapter(model, "b")
    assert sum(p.requires_grad for p in model.parameters()) == 12


def test_hooks_of_the_base_layer_run_under_every_adapter():
    model = many()
    calls = []
    model.blocks[0].attn.to_out.register_forward_hook(lambda *_: calls.append(None))
    for i, name in enumerate(("a", "b", None)):
        set_adapter(model, name)
        model(X)
        assert len(calls) == i + 1


def test_a_module_under_two_names_is_switched_under_both():
    model = Decoder()
    model.alias = model.blocks[0].attn.to_out
    model.again = model.blocks[0]  # and a parent under two names
    plain = model.alias
    inject_lora(model, ["to_out"])
    assert add_adapter(model, "b", ["to_out", "mlp"]) == 6
    for name, kind in (("b", LoRALinear), (None, nn.Linear), ("default", LoRALinear)):
        set_adapter(model, name)
        assert model.alias is model.blocks[0].attn.to_out is model.again.attn.to_out
        assert type(model.alias) is kind
    assert model.alias.original_linear is plain


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # torch's own, while it traces
def test_a_compiled_model_follows_and_is_accepted_as_the_model():
    torch.compiler.reset()
    model = many().eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for name in ("a", None, "b", "a"):
        set_adapter(compiled, name)
        assert active_adapter(model) == active_adapter(compiled) == name
        torch.testing.assert_close(compiled(X), model(X))
    assert list_adapters(compiled) == ["a", "b"]


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_wrappers_are_accepted_as_the_model(wrap):
    model = Decoder()
    add_adapter(wrap(model), "a", LoRAConfig(["blocks.0.attn.to_out"], match="exact"))
    assert list_adapters(wrap(nn.DataParallel(model))) == list_adapters(model) == ["a"]
    set_adapter(wrap(model), "a")
    assert isinstance(model.blocks[0].attn.to_out, LoRALinear)
    with pytest.raises(InjectionError, match="is itself a Linear"):
        add_adapter(wrap(nn.Linear(4, 4)), "a", "all-linear")


def test_attention_projections_and_the_roots_children():
    model = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    plain = model(x, x, x)[0]
    add_adapter(model, "a", ["out_proj"], activate=True)
    randomise_adapters(model)
    assert_differs(model(x, x, x)[0], plain)
    set_adapter(model, None)
    assert torch.equal(model(x, x, x)[0], plain)


def test_a_wrapper_follows_its_base_layer_to_another_device():
    layer = LoRALinear(nn.Linear(4, 3), 2)
    layer(torch.randn(2, 4)).sum().backward()
    layer.original_linear.to("meta")  # available on every machine
    match_base(layer)
    assert all(p.is_meta and p.grad.is_meta for p in (layer.lora_A, layer.lora_B))


@pytest.mark.gpu
def test_an_inactive_adapter_moves_to_the_models_device():
    model = many()
    set_adapter(model, "b")
    parameters = fastlora.get_lora_params(model)
    set_adapter(model, "a")
    model.cuda()
    set_adapter(model, "b")
    assert all(p.is_cuda for p in model.parameters())
    assert all(p is q for p, q in zip(parameters, fastlora.get_lora_params(model), strict=True))
    assert model(X.cuda()).is_cuda


def test_moving_to_or_from_meta_is_refused():
    model = many()
    weight = alone(model, "b").blocks[0].attn.to_out.lora_B
    set_adapter(model, "a")
    model.to("meta")
    with pytest.raises(InjectionError, match=r"to_out: the layer or the adapter 'b' is on"):
        set_adapter(model, "b")
    assert active_adapter(model) == "a"
    model.to_empty(device="cpu")  # and back, uninitialised
    set_adapter(model, "b")
    assert torch.equal(model.blocks[0].attn.to_out.lora_B, weight)


def test_switching_and_adding_inside_disable_adapter_are_refused():
    model = many()
    set_adapter(model, "a")
    tree = dict(model.named_modules())
    with disable_adapter(model):
        for call in (
            lambda: set_adapter(model, "b"),
            lambda: set_adapter(model, None),
            lambda: add_adapter(model, "c", ["mlp"]),
            lambda: delete_adapter(model, "a"),
        ):
            with pytest.raises(InjectionError, match=r"'a' is disabled.* outside of disable_adap"):
                call()
        delete_adapter(model, "b")
    assert dict(model.named_modules()) == tree and list_adapters(model) == ["a"]


def replace_base(model):
    model.blocks[0].attn.to_out.original_linear = nn.Linear(16, 16)


def replace_wrapper(model):
    model.blocks[0].attn.to_out = nn.Linear(16, 16)


def replace_other_base(model):
    model.blocks[0].mlp.mlp[0] = nn.Linear(16, 32)


def replace_parent(model):
    model.blocks[0].attn = nn.Identity()


@pytest.mark.parametrize(
    "replace, message",
    [
        (replace_base, r"attn\.to_out: the layer under 'b' was replaced by another Linear"),
        (replace_wrapper, r"attn\.to_out: the wrapper of 'a' was replaced by another Linear"),
        (replace_other_base, r"mlp\.0: the layer under 'b' was replaced by another Linear"),
        (replace_parent, r"attn\.to_out: the wrapper of 'a' was replaced by nothing"),
    ],
)
def test_a_module_that_was_replaced_in_between_is_named_and_not_undone(replace, message):
    model = many()
    set_adapter(model, "a")
    replace(model)
    tree = dict(model.named_modules())
    with pytest.raises(InjectionError, match=message):
        set_adapter(model, "b")
    assert dict(model.named_modules()) == tree and active_adapter(model) == "a"
    delete_adapter(model, "a")  # the replaced module stays
    assert active_adapter(model) is None
    theirs = {path: m for path, m in tree.items() if not path.endswith("original_linear")}
    mine = dict(model.named_modules())
    assert all(mine[p] is m for p, m in theirs.items() if not isinstance(m, LoRALinear))
    assert not any(isinstance(module, LoRALinear) for module in model.modules())


@pytest.mark.parametrize("active", [None, "a", "b"])
def test_a_deleted_adapter_is_freed(active):
    model = many()
    others = alone(model, "b")(X)
    set_adapter(model, active)
    layers = [layer for layer in model.__dict__["_fastlora_adapters"].adapters["a"].values()]
    watched = [weakref.ref(x) for layer in layers for x in (layer, layer.lora_A, layer.lora_B)]
    del layers
    delete_adapter(model, "a")
    assert [ref() for ref in watched] == [None] * 12
    assert (active_adapter(model), list_adapters(model)) == (
        active if active == "b" else None,
        ["b"],
    )
    set_adapter(model, "b")
    assert torch.equal(model(X), others)


def test_deleting_the_last_adapter_restores_the_model():
    model = Decoder()
    attributes, keys = set(model.__dict__), list(model.state_dict())
    add_adapter(model, "a", ["to_out"], activate=True)
    delete_adapter(model, "a")
    assert set(model.__dict__) == attributes and list(model.state_dict()) == keys
    assert inject_lora(model, ["to_out"]) == 2 and list_adapters(model) == ["default"]


def test_the_cost_of_switching_does_not_grow_with_the_model(monkeypatch):
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(*[nn.Linear(2, 2) for _ in range(2000)]))
    for name in ("a", "b"):
        add_adapter(model, name, LoRAConfig(["0"], match="exact", exclude=["1.0"]))
    set_adapter(model, "a")

    def walk(*args, **kwargs):
        raise AssertionError("all modules of the model were visited")

    for name in ("named_modules", "modules", "children", "named_children"):
        monkeypatch.setattr(nn.Module, name, walk)
    for name in ("b", None, "a"):
        set_adapter(model, name)
        assert active_adapter(model) == name


def test_saving_and_loading_are_of_the_active_adapter(tmp_path):
    model = many()
    for name in TARGETS:
        set_adapter(model, name)
        fastlora.freeze_base_params(model)
        fastlora.save_adapter(model, tmp_path / f"{name}.safetensors")
        fastlora.save_pretrained(model, tmp_path / name)
    fresh = many()
    for name in TARGETS:
        set_adapter(fresh, name)
        randomise_adapters(fresh, 9)
        assert len(fastlora.load_adapter(fresh, tmp_path / f"{name}.safetensors").loaded) in (8, 12)
        with use_adapter(model, name):
            assert torch.equal(fresh(X), model(X))
    other = {"a": "b", "b": "a"}[name]
    with pytest.raises(CheckpointError, match="rank is 3 in the file, 4 in"):
        fastlora.load_adapter(fresh, tmp_path / f"{other}.safetensors")


def test_folders_are_loaded_under_their_names(tmp_path):
    model = many()
    for name in TARGETS:
        with use_adapter(model, name):
            fastlora.save_pretrained(model, tmp_path / name, include_trainable=False)
    loaded = copy.deepcopy(model)
    set_adapter(loaded, None)
    for name in TARGETS:
        delete_adapter(loaded, name)
    fastlora.from_pretrained(loaded, tmp_path / "a")
    with pytest.raises(CheckpointError, match="already has adapters.* pass adapter="):
        fastlora.from_pretrained(loaded, tmp_path / "b")
    set_adapter(loaded, None)
    with pytest.raises(CheckpointError, match="inactive adapters 'default'; pass adapter="):
        fastlora.from_pretrained(loaded, tmp_path / "b")
    loaded.out_layer.requires_grad_(True)
    assert len(fastlora.from_pretrained(loaded, tmp_path / "b", adapter="b").loaded) == 12
    assert loaded.out_layer.weight.requires_grad  # only the new adapter is touched
    assert (active_adapter(loaded), list_adapters(loaded)) == (None, ["default", "b"])
    for mine, theirs in (("default", "a"), ("b", "b")):
        with use_adapter(loaded, mine), use_adapter(model, theirs):
            assert torch.equal(loaded(X), model(X))


def test_a_folder_with_heads_needs_a_separate_model(tmp_path):
    model = many()
    set_adapter(model, "a")
    fastlora.freeze_base_params(model)
    model.out_layer.requires_grad_(True)
    fastlora.save_pretrained(model, tmp_path)
    tree = dict(model.named_modules())
    with pytest.raises(
        CheckpointError, match=r"also holds base_model\.model\.out_layer\.\w+, which"
    ):
        fastlora.from_pretrained(model, tmp_path, adapter="c")
    assert dict(model.named_modules()) == tree and list_adapters(model) == ["a", "b"]
    first = Decoder()
    fastlora.from_pretrained(first, tmp_path, adapter="c")
    assert torch.equal(first.out_layer.weight, model.out_layer.weight)
    assert (active_adapter(first), list_adapters(first)) == (None, ["c"])


def test_merging_in_place_is_refused_with_other_adapters_and_a_copy_has_only_the_active_one():
    model = many()
    set_adapter(model, "a")
    expected = model(X)
    for active in ("a", None):
        set_adapter(model, active)
        with pytest.raises(MergeError, match=r"inactive adapters .*'b' would lose.*merged_model"):
            fastlora.merge_lora_weights(model)
    set_adapter(model, "a")
    for merged in (fastlora.merged_model(model), fastlora.merge_lora_weights(model, False)):
        torch.testing.assert_close(merged(X), expected)
        assert list_adapters(merged) == [] and "_fastlora_adapters" not in merged.__dict__
    assert list_adapters(model) == ["a", "b"] and torch.equal(model(X), expected)
    delete_adapter(model, "b")
    torch.testing.assert_close(fastlora.merge_lora_weights(model)(X), expected)
    assert (active_adapter(model), list_adapters(model)) == (None, [])


def test_copies_that_are_merged_or_exported_do_not_copy_the_others():
    model = many()
    set_adapter(model, "b")
    model.blocks[0].attn.to_out.lock = threading.Lock()  # cannot be copied
    set_adapter(model, "a")
    with pytest.raises(TypeError, match="lock"):
        copy.deepcopy(model)
    shared = {id(p): p for p in model.parameters()}
    twin = copy_active(model, shared)
    assert "_fastlora_adapters" not in twin.__dict__ and torch.equal(twin(X), model(X))
    assert all(p is q for p, q in zip(twin.parameters(), model.parameters(), strict=True))
    fastlora.merged_model(model)
    fastlora.merge_lora_weights(model, inplace=False)


def test_merging_a_part_is_found_when_switching():
    model = many()
    set_adapter(model, "a")
    fastlora.merge_lora_weights(model.blocks[1])
    with pytest.raises(
        InjectionError, match=r"blocks\.1\.attn\.to_qkv: the wrapper of 'a' was repl"
    ):
        set_adapter(model, "b")


@pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning")
def test_an_export_has_only_the_active_adapter():
    model = many().eval()
    set_adapter(model, "b")
    for merged in (True, False):
        program = fastlora.export(model, (X,), merged=merged)
        torch.testing.assert_close(program.module()(X), model(X))
    assert list_adapters(model) == ["a", "b"]


@pytest.mark.parametrize("inject", [inject_lora, fastlora.setup_lora_for_medical_finetuning])
def test_injection_with_inactive_adapters_is_refused(inject):
    model = many()
    with pytest.raises(InjectionError, match="inactive adapters 'a', 'b'.* fastlora.add_adapter"):
        inject(model)
    fastlora.preview(model, ["mlp"])  # reports work


def test_a_refused_adapter_changes_nothing(tmp_path):
    model = many()
    set_adapter(model, "a")
    tree = dict(model.named_modules())
    for error, message, name, arguments in (
        (ConfigError, "name: expected a non-empty string, got ''", "", (["mlp"],)),
        (ConfigError, "name: the model already has an adapter 'b'", "b", (["mlp"],)),
        (ConfigError, "rank: expected an integer", "c", (["mlp"], 0)),
        (InjectionError, "no layer matches .* .nearest: to_out", "c", (["to_uot"],)),
        (InjectionError, "'to_uot' matches none", "c", (LoRAConfig(["mlp", "to_uot"]),)),
    ):
        with pytest.raises(error, match=message):
            add_adapter(model, name, *arguments)
        assert list_adapters(model) == ["a", "b"] and active_adapter(model) == "a"
        assert dict(model.named_modules()) == tree

    def fails(path, module):
        if path == "out_layer":
            raise ZeroDivisionError
        return True

    with pytest.raises(ZeroDivisionError):
        add_adapter(model, "c", fails)
    assert dict(model.named_modules()) == tree and list_adapters(model) == ["a", "b"]


def test_unknown_names_get_the_nearest_suggestion():
    model = many({"english": ["to_out"], "french": ["to_out"]})
    for call in (set_adapter, delete_adapter):
        with pytest.raises(ConfigError, match=r"no adapter 'frnch' .nearest: french.$"):
            call(model, "frnch")
    with pytest.raises(ConfigError, match="weights: the model has no adapter 'frnch'"):
        combine_adapters(model, {"frnch": 1.0}, "c")
    with pytest.raises(ConfigError, match="no adapters, so none is called 'x'"):
        set_adapter(Decoder(), "x")


def test_functions_need_the_module_that_has_the_registry():
    wrapper = LoRALinear(nn.Linear(4, 4))
    with pytest.raises(InjectionError, match="is itself an adapted layer"):
        add_adapter(wrapper, "a", "all-linear")
    outer = nn.ModuleDict({"left": many(), "right": Decoder()})
    with pytest.raises(InjectionError, match="submodule left has the adapters 'a', 'b'; pass that"):
        add_adapter(outer, "c", ["mlp"])
    with pytest.raises(MergeError, match="inactive adapters 'a', 'b'"):
        fastlora.merge_lora_weights(outer)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", [{"a": 1.0, "b": 1.0}, {"a": 0.7, "b": -1.5}, {"b": 2}])
def test_a_combination_by_concatenation_is_exact(weights, dtype):
    model = many(dtype=dtype, use_rslora=True, backend="torch")
    wide = torch.promote_types(dtype, torch.float32)
    deltas = {name: delta(model, name) for name in weights}
    assert combine_adapters(model, weights, "c") == (8 if len(weights) == 2 else 6)
    assert (active_adapter(model), list_adapters(model)) == (None, ["a", "b", "c"])
    combined = delta(model, "c")
    assert combined.keys() == {path for d in deltas.values() for path in d}
    for path, got in combined.items():
        want = sum(w * deltas[name][path] for name, w in weights.items() if path in deltas[name])
        single = sum(
            w * deltas[name][path].to(wide) for name, w in weights.items() if path in deltas[name]
        )
        assert_close(got.to(wide), single, want, path)
    with use_adapter(model, "c"):
        layers = [layer for _, layer in fastlora.named_lora_layers(model)]
        assert {(layer.lora_A.dtype, layer.backend) for layer in layers} == {(wide, "torch")}
        ranks = {layer.rank for layer in layers}
        assert ranks == ({3, 4, 7} if len(weights) == 2 else {4})


def test_a_combination_is_independent_of_its_parts_and_trains():
    model = many()
    combine_adapters(model, {"a": 1.0}, "c")
    set_adapter(model, "a")
    before = model(X)
    with torch.no_grad():
        for parameter in fastlora.get_lora_params(model):
            parameter.zero_()
    set_adapter(model, "c")
    torch.testing.assert_close(model(X), before)
    model(X).sum().backward()
    assert all(p.requires_grad and p.grad.any() for p in fastlora.get_lora_params(model))
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("rank", [None, 1, 5, 100])
def test_the_svd_is_the_best_of_its_rank(rank):
    model = many()
    weights = {"a": 0.7, "b": -1.5}
    deltas = {name: delta(model, name) for name in weights}
    combine_adapters(model, weights, "c", "svd", rank)
    set_adapter(model, "c")
    for path, layer in fastlora.named_lora_layers(model):
        parts = {name: d[path] for name, d in deltas.items() if path in d}
        want = sum(weights[name] * d for name, d in parts.items())
        ranks = {"a": 3, "b": 4}
        highest = max(ranks[name] for name in parts) if rank is None else rank
        kept = min(highest, sum(ranks[name] for name in parts))
        assert layer.rank == kept and layer.scaling == 1.0
        best = {}
        for dtype in (torch.float64, torch.float32):
            u, s, vh = torch.linalg.svd(want.to(dtype), full_matrices=False)
            best[dtype] = u[:, :kept] @ (s[:kept, None] * vh[:kept])
        got = layer.lora_B @ layer.lora_A
        assert_close(got, best[torch.float32], best[torch.float64], path)


def test_the_svd_of_zero_is_zero_and_can_be_trained():
    model = Decoder()
    inject_lora(model, ["to_out"])  # lora_B is zero
    combine_adapters(model, {"default": 1.0}, "c", method="svd", rank=2)
    set_adapter(model, "c")
    layer = model.blocks[0].attn.to_out
    assert not layer.lora_B.any() and torch.isfinite(layer.lora_A).all()
    model(X).sum().backward()
    assert layer.lora_B.grad.any()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (({}, "c"), "weights: expected a mapping"),
        ((["a", "b"], "c"), "weights: expected a mapping"),
        (({"a": True}, "c"), r"weights\['a'\]: expected a finite number, got True"),
        (({"a": float("nan")}, "c"), r"weights\['a'\]: expected a finite number, got nan"),
        (({"a": 1e200}, "c"), "weights: the sum has values that are not finite in torch.float32"),
        (({"a": 1e308, "b": 1e308}, "c", "svd"), "weights: the sum has values that are not finite"),
        (({"a": 1.0}, "b"), "new_name: the model already has an adapter 'b'"),
        (({"a": 1.0}, "c", "ties"), "method: expected one of cat, svd, got 'ties'"),
        (({"a": 1.0}, "c", "cat", 3), "rank: the ranks add up"),
        (({"a": 1.0}, "c", "svd", 0), "rank: expected an integer"),
    ],
)
def test_an_invalid_combination_is_refused_and_changes_nothing(arguments, message):
    model = many()
    with pytest.raises(ConfigError, match=message):
        combine_adapters(model, *arguments)
    assert list_adapters(model) == ["a", "b"]


def test_what_does_not_combine_is_refused():
    model = many()
    delete_adapter(model, "a")
    add_adapter(model, "a", LoRAConfig(["to_out"], use_dora=True))
    with pytest.raises(InjectionError, match=r"'a' has DoRA, whose update"):
        combine_adapters(model, {"b": 1.0, "a": 1.0}, "c")
    model = many()
    set_adapter(model, "a")
    replace_base(model)
    with pytest.raises(InjectionError, match=r"to_out the adapter 'b' wraps a different layer"):
        combine_adapters(model, {"a": 1.0, "b": 1.0}, "c")
    assert list_adapters(model) == ["a", "b"]


def test_combinations_are_those_of_peft(tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    theirs = Decoder().eval()
    model = copy.deepcopy(theirs)
    theirs = peft.PeftModel(theirs, peft_config(peft, ["to_qkv", "to_out"], 3))
    theirs.add_adapter("other", peft_config(peft, ["to_out", "mlp.0"], 4))
    theirs.save_pretrained(tmp_path)
    fastlora.from_pretrained(model, tmp_path)
    fastlora.from_pretrained(model, tmp_path / "other", adapter="other")
    weights = {"default": 0.7, "other": 0.4}
    for method, rank in (("cat", None), ("svd", 2)):
        given = {"combination_type": method, "svd_rank": rank}
        theirs.add_weighted_adapter(list(weights), list(weights.values()), method, **given)
        combine_adapters(model, weights, method, method, rank)
        theirs.set_adapter(method)
        set_adapter(model, method)
        torch.testing.assert_close(model(X), theirs(X))
        with disable_adapter(model):
            assert_differs(model(X), theirs(X))


def peft_config(peft, targets, rank):
    return peft.LoraConfig(r=rank, target_modules=targets, init_lora_weights=False)
