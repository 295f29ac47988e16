"""Several adapters at once: the sum of several, or one for each sample of a batch, equal to what each computes alone."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import (
    BackendError,
    CheckpointError,
    ConfigError,
    ExportError,
    InjectionError,
    LoRAConfig,
    MergeError,
    active_adapter,
    active_adapters,
    add_adapter,
    delete_adapter,
    disable_adapter,
    get_lora_params,
    set_adapter,
    use_adapter,
    use_adapters,
)
from fastlora.layers.several import SeveralAdapters
from tests.support.models import Tokens
from tests.support.tolerance import assert_close, assert_differs
from tests.support.versions import needs_torch

NAMES = ["a", "a", None, "b", "c", "a"]
RUNS = ["a", "a", "a", "b", "b", "c"]
IDS = torch.randint(0, 20, (6, 5), generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Every kind of layer; samples are the first dimension everywhere."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(20, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.conv = nn.Conv1d(16, 8, 3, padding=1)
        self.out = nn.Linear(8, 4, bias=False)

    def forward(self, ids):
        h = self.emb(ids) if ids.dtype == torch.int64 else ids
        h = h + self.down(torch.relu(self.up(h)))
        h = self.conv(h.transpose(1, 2)).transpose(1, 2)
        return self.out(h)


def net(dtype=torch.float64, dropout=0.0, **options):
    """Adapters a, b and c of different ranks, scalings and layers, c on the embedding and the convolution too; none active."""
    torch.manual_seed(0)
    model = Net().to(dtype)
    linear = {"dropout": dropout, "adapter_dtype": dtype}
    add_adapter(model, "a", LoRAConfig(["up", "down"], rank=3, alpha=5.0, **linear, **options))
    add_adapter(model, "b", LoRAConfig(["down", "out"], rank=4, use_rslora=True, **linear))
    kinds = ["linear", "conv", "embedding"]
    config = LoRAConfig(["emb", "conv", "up"], rank=2, kinds=kinds, adapter_dtype=dtype)
    add_adapter(model, "c", config)
    for seed, name in enumerate("abc"):
        with use_adapter(model, name):
            torch.manual_seed(10 + seed)
            for parameter in get_lora_params(model):
                nn.init.normal_(parameter, std=0.5)
    return model


def factors(model):
    """The parameters of every adapter."""
    adapters = model.__dict__["_fastlora_adapters"].adapters
    return [
        p for layers in adapters.values() for la in layers.values() for p in la.parameters(False)
    ]


def cast(model, dtype):
    """A copy in another dtype, with all adapters."""
    twin = copy.deepcopy(model).to(dtype)
    for layers in twin.__dict__["_fastlora_adapters"].adapters.values():
        for layer in layers.values():
            layer.to(dtype)
    return twin


def apart(model, x, names):
    """Each sample by itself, with its adapter as the only active one."""
    outputs = []
    for at, name in enumerate(names):
        with use_adapter(model, name):
            outputs.append(model(x[at : at + 1]))
    return torch.cat(outputs)


def modules(model):
    return [(path, id(module)) for path, module in model.named_modules()]


@pytest.mark.parametrize("names", [NAMES, RUNS, ["b"] * 6, [None] * 5 + ["c"]], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}],
    ids=["plain", "dora", "pissa"],
)
def test_a_mixed_batch_is_its_samples_apart_and_so_are_the_gradients(names, options):
    model = net(**options)  # of a
    want = apart(model, IDS, names)
    with use_adapters(model, names):
        got = model(IDS)
    assert_close(got, want, want)
    leaves = factors(model)
    gradients = [
        torch.autograd.grad(y.square().sum(), leaves, allow_unused=True) for y in (got, want)
    ]
    assert any(g is not None for g in gradients[1])
    for one, other in zip(*gradients, strict=True):
        if other is None:  # the adapter has no sample
            assert one is None or not one.any()
        else:
            assert_close(one, other, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad", [False, True])
def test_a_mixed_batch_in_a_narrow_dtype(dtype, grad):
    model = net(torch.float64)
    want = apart(model, IDS, NAMES)
    model = cast(model, dtype)
    with torch.set_grad_enabled(grad):
        same = apart(model.eval(), IDS, NAMES)
        with use_adapters(model, NAMES):
            got = model(IDS)
    assert got.requires_grad == grad
    assert_close(got, same, want)


def test_gradients_reach_the_input_of_rows_and_of_sequences():
    model = net()
    for x in (torch.randn(6, 16, dtype=torch.float64), torch.randn(6, 5, 16, dtype=torch.float64)):
        found = []
        for mixed in (True, False):
            leaf = x.clone().requires_grad_()
            if mixed:
                with use_adapters(model, NAMES):
                    y = model.up(leaf)
            else:
                parts = []
                for at, name in enumerate(NAMES):
                    with use_adapter(model, name):
                        parts.append(model.up(leaf[at : at + 1]))
                y = torch.cat(parts)
            found.append([y, *torch.autograd.grad(y.sin().sum(), leaf)])
        for got, want in zip(*found, strict=True):
            assert_close(got, want, want)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_any_layout_of_the_input(mode):
    model = net()
    double = {"dtype": torch.float64}
    for x in (
        torch.randn(6, 0, 16, **double),
        torch.randn(1, 3, 16, **double).expand(6, 3, 16),
        torch.randn(3, 6, 16, **double).transpose(0, 1),
        torch.randn(6, 3, 32, **double)[..., ::2],
        torch.randn(16, 6, **double).T,
    ):
        parts = []
        for at, name in enumerate(NAMES):
            with use_adapter(model, name):
                parts.append(model.up(x[at : at + 1]))
        with mode(), use_adapters(model, NAMES):
            y = model.up(x)
        want = torch.cat(parts)
        assert_close(y.detach(), want, want)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")  # of torch's own forward-mode rules
def test_functorch_sees_the_same_function():
    model = net()
    x, t = torch.randn(2, 2, 6, 16, dtype=torch.float64)
    with use_adapters(model, NAMES):
        y, dy = torch.func.jvp(model.up, (x[0],), (t[0],))
        assert_close(y, model.up(x[0]), model.up(x[0]))
        linear = model.up(t[0]) - model.up(torch.zeros_like(t[0]))
        assert_close(dy, linear, linear)
        mapped = torch.func.vmap(model.up)(x)
        want = torch.stack([model.up(one) for one in x])
        assert_close(mapped, want, want)


@pytest.mark.slow
def test_autocast_and_checkpointing():
    model = net(torch.float32)
    x = torch.randn(6, 5, 16)
    results = []
    for narrow in (True, False):
        with use_adapters(model, NAMES), torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            y = model.up(x)
            again = checkpoint(model.up, x, use_reentrant=False)
            assert torch.equal(y, again)
            leaves = [la.lora_A for la in model.up.layers]
            one, other = (torch.autograd.grad(z.float().sin().sum(), leaves) for z in (y, again))
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            parts = []
            for at, name in enumerate(NAMES):
                with use_adapter(model, name):
                    parts.append(model.up(x[at : at + 1]))
        results.append((y, torch.cat(parts)))
    exact = results[1][1].double()
    for got, same in results:
        assert_close(got, same, exact)


def test_dropout_follows_the_seed_and_differs_between_samples():
    model = net(dropout=0.5).train()
    x = torch.ones(4, 3, 16, dtype=torch.float64)
    with use_adapters(model, ["a", "b", "a", "c"]):
        torch.manual_seed(5)
        first = model.up(x)
        torch.manual_seed(5)
        assert torch.equal(model.up(x), first)
        assert not torch.equal(model.up(x), first)
        assert len({tuple(row.tolist()) for row in first[0]}) == 3  # a mask for each row
        assert not torch.equal(first[0], first[2])
        assert torch.equal(first[3][0], first[3][1])  # c has no dropout
        plain = model.eval().up(x)
    kept = model.up.weight  # no adapter is active now
    assert torch.equal(
        first[1], torch.nn.functional.linear(x[1], kept, model.up.bias)
    )  # b has no up
    assert_differs(first[0], plain[0])


def test_summed_adapters_have_a_mask_each():
    model = nn.Sequential(nn.Linear(4, 4)).double()
    for name in "ab":
        add_adapter(model, name, ["0"], rank=1, dropout=0.5)
        with use_adapter(model, name), torch.no_grad():
            model[0].lora_A.fill_(1.0)
            model[0].lora_B.fill_(1.0 if name == "a" else 100.0)
    x = torch.ones(64, 4, dtype=torch.float64)
    with use_adapter(model, ["a", "b"]):
        update = (model(x) - model[0].wrapped(x))[:, 0] / 8.0 / 2.0  # scaling and 1 / (1 - p)
    kept_b = (update / 100).floor()
    kept_a = (update - 100 * kept_b).round()
    assert not torch.equal(kept_a, kept_b)
    assert kept_a.min() >= 0 and kept_b.min() >= 0 and kept_a.max() <= 4 and kept_b.max() <= 4


def test_the_sum_of_several_adapters_trains_all_of_them():
    model = net()
    base = model.up(x := torch.randn(6, 16, dtype=torch.float64))
    deltas = []
    for name in ("a", "c"):
        with use_adapter(model, name):
            deltas.append(model.up(x) - base)
    before = modules(model)
    with use_adapter(model, ["a", "b", "c"]):
        assert active_adapters(model) == ["a", "b", "c"]
        y = model.up(x)
        assert_close(y, base + deltas[0] + deltas[1], base + deltas[0] + deltas[1])
        weight = model.up.weight
        assert model.up.layers[0].usage.called and not model.up.layers[0].usage.read
        assert weight.dtype == torch.float64 and weight.shape == (32, 16)
        assert_close(x @ weight.T + model.up.bias, y, y)
        assert all(la.usage.read for la in model.up.layers)
        assert_close(x @ weight.detach().clone().T + model.up.bias, y, y)
        assert {id(p) for p in get_lora_params(model)} == {id(p) for p in factors(model)}
        fastlora.freeze_base_params(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        model(IDS).square().sum().backward()
        old = [p.clone() for p in factors(model)]
        optimizer.step()
        assert all(not torch.equal(p, q) for p, q in zip(factors(model), old, strict=True))
    assert modules(model) == before and active_adapter(model) is None


def test_gradients_of_a_read_weight_reach_every_adapter():
    model, x = net(torch.float32), torch.randn(6, 16)

    def gradients(model, x, read):
        y = x @ model.up.weight.T if read else model.up(x) - model.up.bias
        leaves = [p for la in model.up.layers for p in la.parameters(False)]
        return torch.autograd.grad(y.sin().sum(), leaves)

    with use_adapter(model, ["a", "c"]):
        got, same = gradients(model, x, True), gradients(model, x, False)
        exact = gradients(copy.deepcopy(model).double(), x.double(), False)
    assert len(got) == 4
    for g, s, e in zip(got, same, exact, strict=True):
        assert_close(g, s, e)


def test_a_sum_subtracts_the_initial_product_of_pissa():
    model, x = net(init_lora_weights="pissa"), torch.randn(3, 16, dtype=torch.float64)
    want = model.up(x)
    for name in ("a", "c"):
        with use_adapter(model, name):
            want = (
                want
                + model.up(x)
                - torch.nn.functional.linear(x, model.up.wrapped.weight, model.up.bias)
            )
    with use_adapter(model, ["a", "c"]):
        assert_close(model.up(x), want, want)
        assert_close(x @ model.up.weight.T + model.up.bias, want, want)


def test_dora_adds_its_own_change_of_the_output_to_a_sum():
    model = net(use_dora=True)  # of a
    x = torch.randn(3, 32, dtype=torch.float64)
    base, outputs = model.down(x), []
    for name in ("a", "b"):
        with use_adapter(model, name):
            outputs.append(model.down(x))
    want = sum(outputs) - base
    for order in (["a", "b"], ["b", "a"]):
        with use_adapter(model, order):
            assert_close(model.down(x), want, want)
            assert_close(x @ model.down.weight.T + model.down.bias, want, want)


def test_a_list_of_one_is_the_adapter_itself():
    model = net()
    set_adapter(model, "a")
    before = modules(model)
    set_adapter(model, ["a"])
    assert modules(model) == before and active_adapter(model) == "a"
    assert not any(isinstance(module, SeveralAdapters) for module in model.modules())


def test_one_adapter_is_saved_merged_and_exported_out_of_several(tmp_path):
    model = net()
    with use_adapter(model, "b"):
        want, merged = fastlora.get_lora_state_dict(model), fastlora.merged_model(model)(IDS)
    set_adapter(model, ["a", "b", "c"])
    before = modules(model)
    refused = {
        CheckpointError: [
            lambda: fastlora.save_adapter(model, tmp_path / "x.safetensors"),
            lambda: fastlora.save_pretrained(model, tmp_path / "x"),
            lambda: fastlora.get_lora_state_dict(model),
            lambda: fastlora.load_lora_state_dict(model, want),
        ],
        MergeError: [
            lambda: fastlora.merged_model(model),
            lambda: fastlora.merge_lora_weights(model),
            lambda: fastlora.merge_report(model),
        ],
        InjectionError: [lambda: fastlora.fuse(model, IDS), lambda: active_adapter(model)],
        ExportError: [lambda: fastlora.export(model, (IDS,), tmp_path / "x.pt2")],
    }
    for contexts in ((), (use_adapters(model, NAMES),)):
        for context in contexts:
            context.__enter__()
        for kind, calls in refused.items():
            for call in calls:
                with pytest.raises(
                    kind, match="model: has several active adapters .* expected one"
                ):
                    call()
        with use_adapter(model, "b"):
            got = fastlora.get_lora_state_dict(model)
            assert got.keys() == want.keys()
            assert all(torch.equal(got[name], want[name]) for name in want)
            assert torch.equal(fastlora.merged_model(model)(IDS), merged)
        for context in contexts:
            context.__exit__(None, None, None)
    assert modules(model) == before and list(tmp_path.iterdir()) == []


def test_state_dicts_of_several_load_into_the_same_adapters():
    one, other = net(), net()
    for parameter in factors(other):
        nn.init.zeros_(parameter.data)
    for model in (one, other):
        set_adapter(model, ["a", "b"])
    assert "down.adapter_a.lora_A" in one.state_dict() and "up.lora_A" in one.state_dict()
    other.load_state_dict(one.state_dict())
    assert torch.equal(other(IDS), one(IDS))
    base = Net().double()
    base.load_state_dict(fastlora.base_state_dict(one))
    with disable_adapter(one):
        assert torch.equal(base(IDS), one(IDS))
    zeros = {key: torch.zeros_like(value) for key, value in base.state_dict().items()}
    fastlora.load_base_state_dict(one, zeros)
    assert not one.down.weight.equal(other.down.weight) and not one.down.wrapped.weight.any()


def test_samples_that_are_not_the_first_dimension_are_refused():
    model = net(torch.float32)
    with use_adapters(model, NAMES):
        for x in (torch.randn(3, 2, 16), torch.randn(16), torch.randn(7, 16)):
            with pytest.raises(
                ConfigError, match=r"input of up: expected \(6, …\), one sample for"
            ):
                model.up(x)
        with pytest.raises(ConfigError, match="input of conv: expected"):
            model.conv(torch.randn(6, 16))
        with pytest.raises(ConfigError, match="input of emb: expected"):
            model.emb(IDS[:5])
        nested = torch.nested.nested_tensor([torch.randn(2, 16)] * 6, layout=torch.jagged)
        with pytest.raises(ConfigError, match="expected a plain tensor .* got a nested tensor"):
            model.up(nested)
        with pytest.raises(ConfigError, match="expected a plain tensor .* got a Tokens"):
            model.up(Tokens(torch.randn(6, 16)))
        assert model.up.weight.dtype == torch.float32 and model.up.weight.shape == (32, 16)
        with pytest.raises(ConfigError, match="weight of up: inside use_adapters each sample has"):
            torch.randn(6, 16) @ model.up.weight.T
    with use_adapters(model, ["c"] * 16), pytest.raises(ConfigError, match="input of conv: expect"):
        model.conv(torch.randn(16, 6))  # its channels are no samples
    with use_adapter(model, ["a", "c"]):
        assert_close(
            model.up(nested).values(),
            model.up(nested.values()),
            model.up(nested.values()).double(),
        )
        assert torch.equal(model.up(Tokens(nested.values())).feats, model.up(nested.values()))


@pytest.mark.parametrize("form", ["strided", "inference"])
def test_the_form_of_any_weight_can_be_read_in_a_mixed_batch(form):
    """As T5 does, to cast the input of a layer."""
    with torch.inference_mode(form == "inference"):
        model = nn.Sequential(nn.Linear(16, 8)).double()
    model.requires_grad_(False)
    if form == "strided":
        model[0].weight = nn.Parameter(model[0].weight.T.clone().T)
    add_adapter(model, "a", ["0"])
    with use_adapters(model, ["a"] * 6):
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with mode():
                weight = model[0].weight
                assert weight.dtype == torch.float64 and weight.shape == (8, 16)
                assert weight.stride() == model[0].wrapped.weight.stride()
                assert weight.requires_grad == (mode is torch.enable_grad)
                with pytest.raises(ConfigError, match="weight of 0: inside use_adapters"):
                    torch.randn(6, 16).double() @ weight.T
        read = torch.func.vmap(lambda x: x.to(model[0].weight.dtype))
        with pytest.raises(ConfigError, match="transformed code cannot read its dtype either"):
            read(torch.randn(6, 16))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "z"], "names: the model has no adapter 'z'; it has a, b, c"),
        ([], r"names: expected a list with the adapter of each sample or None, got \[\]"),
        ("abc", "names: expected a list with the adapter of each sample or None, got 'abc'"),
        ([["a"]], r"names: the model has no adapter \['a'\]"),
    ],
)
def test_names_of_samples_are_checked(names, message):
    model = net()
    before = modules(model)
    with pytest.raises(ConfigError, match=message), use_adapters(model, names):
        pass
    assert modules(model) == before


@pytest.mark.parametrize("name", [[], ["a", "a"], ["a", "z"], ["a", None], 3])
def test_names_of_active_adapters_are_checked(name):
    model = net()
    set_adapter(model, "b")
    before = modules(model)
    with pytest.raises(ConfigError, match="name: "):
        set_adapter(model, name)
    assert modules(model) == before and active_adapter(model) == "b"


def test_contexts_restore_the_model_exactly():
    model = net()
    set_adapter(model, "a")
    before, y = modules(model), model(IDS)
    want, other = apart(model, IDS, NAMES), apart(model, IDS, RUNS)
    with pytest.raises(ValueError, match="inside"), use_adapters(model, NAMES):
        raise ValueError("inside")
    assert modules(model) == before
    with use_adapters(model, NAMES):
        installed = modules(model)
        assert_close(model(IDS), want, want)
        with use_adapters(model, RUNS):
            assert modules(model) == installed  # of the same adapters: only the samples change
            assert_close(model(IDS), other, other)
            with use_adapter(model, None):
                assert active_adapters(model) == []
        assert_close(model(IDS), want, want)
    assert modules(model) == before and torch.equal(model(IDS), y)
    with use_adapter(model, ["a", "c"]):
        joined = modules(model)
        with use_adapters(model, ["a", "b"] * 3), use_adapter(model, ["a", "b"]):
            assert modules(model) != joined
        assert modules(model) == joined
    first, second = use_adapters(model, NAMES), use_adapters(model, RUNS)
    for context in (first, second):
        context.__enter__()
    first.__exit__(None, None, None)  # overlap without being nested
    assert_close(model(IDS), other, other)
    second.__exit__(None, None, None)
    assert modules(model) == before and torch.equal(model(IDS), y)


def test_a_replaced_layer_is_named_and_nothing_changes():
    model = net()
    message = "cannot switch from a mixed batch of 'a', 'b', 'c' to None: down: the wrapper of"
    with pytest.raises(InjectionError, match=message), use_adapters(model, NAMES):
        model.down = nn.Linear(32, 16)
    model = net()
    model.down = nn.Linear(32, 16)
    before = modules(model)
    with pytest.raises(InjectionError, match="down: the layer under 'a' was replaced"):
        set_adapter(model, ["a", "c"])
    assert modules(model) == before


def test_hooks_of_a_base_layer_run_and_those_of_a_wrapper_are_refused():
    model = net()
    want = apart(model, IDS, NAMES)
    seen = []
    handle = model.down.register_forward_hook(lambda module, args, y: seen.append(y.shape))
    with use_adapters(model, NAMES):
        got = model(IDS)
    assert seen == [(6, 5, 16)]
    handle.remove()
    assert_close(got, want, want)
    with use_adapter(model, "a"):
        handle = model.down.register_forward_hook(lambda *_: None)
    with pytest.raises(InjectionError, match="down: the wrapper of 'a' has hooks, which would not"):
        set_adapter(model, ["a", "b"])
    handle.remove()
    set_adapter(model, ["a", "b"])


def test_copies_and_pickles_keep_the_state_they_were_made_in():
    model = net()
    with use_adapters(model, NAMES):
        want = model(IDS)
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        averaged = AveragedModel(model)
    for twin in (*copies, averaged.module):
        assert torch.equal(twin(IDS), want)
        own = {id(p) for p in factors(twin)}
        assert own.isdisjoint(map(id, factors(model)))
        set_adapter(twin, "a")
        with use_adapter(model, "a"):
            assert torch.equal(twin(IDS), model(IDS))
    set_adapter(model, ["a", "b"])
    averaged = AveragedModel(model)
    nn.init.ones_(factors(model)[0].data)
    averaged.update_parameters(model)
    averaged.update_parameters(model)
    with torch.no_grad():
        mean = averaged.module.up.lora_A
        assert torch.equal(mean, factors(model)[0])
    part = copy.deepcopy(nn.ModuleList([model.down]))
    with pytest.raises(InjectionError, match="of the model that it is a part of"):
        set_adapter(part, None)


def test_a_registry_of_an_older_pickle_is_read():
    model = net()
    set_adapter(model, "b")
    registry = model.__dict__["_fastlora_adapters"]
    state = {"adapters": registry.adapters, "active": "b", "uses": []}
    old = object.__new__(type(registry))
    old.__setstate__(state)
    model.__dict__["_fastlora_adapters"] = old
    assert active_adapter(model) == "b"
    set_adapter(model, ["a", "b"])
    set_adapter(model, None)
    assert isinstance(model.down, nn.Linear)


def test_disabled_adapters_leave_the_base_model():
    model = net()
    plain = model(IDS)
    set_adapter(model, ["a", "b"])
    summed = model(IDS)
    with disable_adapter(model):
        assert torch.equal(model(IDS), plain)
        assert torch.equal(model.down.weight, model.down.wrapped.weight)
        with pytest.raises(InjectionError, match="its adapter 'a' \\+ 'b' is disabled"):
            set_adapter(model, None)
    assert torch.equal(model(IDS), summed)
    with use_adapters(model, NAMES):
        mixed = model(IDS)
        with disable_adapter(model):
            assert torch.equal(model(IDS), plain)
        assert torch.equal(model(IDS), mixed)
    for other in (model, net(use_dora=True)):
        with use_adapters(other, NAMES), disable_adapter(other.down.adapter_a):  # and no other
            got = other.down(x := torch.randn(6, 32, dtype=torch.float64))
            want = other.down.wrapped(x)
            assert_close(got[:3], want[:3], want[:3])
            assert_differs(got[3], want[3])


def test_adapters_are_deleted_out_of_several():
    model = net()
    with use_adapter(model, ["b", "c"]):
        want = model(IDS)
    set_adapter(model, ["a", "b", "c"])
    delete_adapter(model, "a")
    assert active_adapters(model) == ["b", "c"] and torch.equal(model(IDS), want)
    set_adapter(model, None)
    with use_adapters(model, ["b"] * 6):
        with pytest.raises(InjectionError, match="delete 'b' outside of use_adapters"):
            delete_adapter(model, "b")
        delete_adapter(model, "c")  # which no sample has
    assert fastlora.list_adapters(model) == ["b"]


def test_a_deleted_adapter_is_freed():
    model = net()
    with use_adapters(model, NAMES):
        freed = weakref.ref(model.down.adapter_a.lora_A)
    with use_adapter(model, ["a", "b"]):
        pass
    delete_adapter(model, "a")
    gc.collect()
    assert freed() is None


def test_adapters_are_added_and_combined_meanwhile():
    model = net()
    with use_adapters(model, NAMES):
        want = model(IDS)
        add_adapter(model, "new", ["up"], rank=2)
        assert torch.equal(model(IDS), want)
    with use_adapter(model, ["a", "b"]):
        want = model.down(x := torch.randn(3, 32, dtype=torch.float64))
        fastlora.combine_adapters(model, {"a": 1.0, "b": 1.0}, "sum")
    with use_adapter(model, "sum"):
        assert_close(model.down(x), want, want)


def test_a_layer_under_two_names_and_names_with_dots():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model.append(model[0])
    for seed, name in enumerate(("v1.0", "forward", "%2E")):
        add_adapter(model, name, ["0"], rank=2)
        with use_adapter(model, name):
            torch.manual_seed(seed)
            nn.init.normal_(model[0].lora_B)
    x = torch.randn(3, 4)
    names = ["v1.0", "%2E", "forward"]
    want = apart(model, x, names)
    with use_adapters(model, names):
        assert model[0] is model[2] and isinstance(model[0], SeveralAdapters)
        assert_close(model(x), want, want.double())
        assert "0.adapter_v1%2E0.lora_A" in model.state_dict()


def test_modes_follow_the_base_layers():
    model = net(dropout=0.9).eval()
    with use_adapters(model, NAMES):
        assert not any(module.training for module in model.modules())
        assert torch.equal(model(IDS), model(IDS))
        model.train()
        assert not torch.equal(model(IDS), model(IDS))
    model.eval()
    with use_adapter(model, ["a", "b"]):
        assert not any(module.training for module in model.modules())
        assert torch.equal(model(IDS), model(IDS))
    model.train()
    with use_adapters(model, NAMES):
        assert all(module.training for module in model.modules())


def test_the_kernels_cannot_be_forced_for_a_sum():
    model = net(torch.float32, backend="triton")
    with (
        use_adapter(model, ["a", "c"]),
        pytest.raises(BackendError, match="there is no kernel for the sum of several adapters"),
    ):
        model.up(torch.randn(6, 16))


def test_reports_describe_several_adapters():
    model = net(torch.float32)
    with use_adapters(model, NAMES):
        rows = {row.path: row for row in fastlora.explain(model, rows=6).rows}
        assert rows["up.adapter_a"].reason == (
            "torch/in_place: 2 adapters, for one sample each, on one base product; "
            "torch runs this on the CPU; Triton kernels are for CUDA"
        )
        assert rows["up.adapter_c"].rank == 2 and rows["conv.adapter_c"].choice.plan == "wrapped"
        report = fastlora.check(model, IDS)
        assert str(report).startswith("all 7 adapters change the output and get a gradient")
    set_adapter(model, ["a", "b"])
    assert "summed" in str(fastlora.explain(model, rows=6))
    attention = nn.ModuleList([nn.MultiheadAttention(8, 2)])
    for name in "ab":
        add_adapter(attention, name, ["out_proj"], rank=2)
    set_adapter(attention, ["a", "b"])
    rows = {row.path: row.reason for row in fastlora.explain(attention, rows=6).rows}
    assert rows["0.out_proj.adapter_b"].startswith("nn.MultiheadAttention multiplies by the merged")
    assert "SeveralAdapters" in repr(model) and "a, b: summed" in repr(model)
    assert (model.down.in_features, model.down.out_features) == (32, 16)
    assert not hasattr(model.down, "kernel_size")


def test_attention_of_torch_is_called_without_its_fast_path():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    for name, targets in (("a", ["linear1"]), ("b", ["linear1", "linear2"])):
        add_adapter(model, name, targets, rank=2)
        with use_adapter(model, name):
            nn.init.normal_(get_lora_params(model)[1], std=0.3)
    x, names = torch.randn(3, 4, 16), ["a", None, "b"]
    with torch.no_grad(), use_adapters(model, names):
        with pytest.raises(ConfigError, match="weight of linear[12]: inside use_adapters each"):
            model(x)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            got = model(x)
            with use_adapter(model, None):
                want, exact = (
                    apart(m, y, names)
                    for m, y in ((model, x), (cast(model, torch.float64), x.double()))
                )
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
    assert_close(got, want, exact)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_language_model_generates_with_an_adapter_for_each_prompt(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    for seed, name in enumerate("ab"):
        add_adapter(model, name, "all-linear", rank=2 + seed)
        with use_adapter(model, name):
            torch.manual_seed(seed)
            for parameter in get_lora_params(model):
                nn.init.normal_(parameter, std=0.5)
    ids, names = torch.arange(3, 15).view(3, 4), ["a", None, "b"]
    for beams in (1, 2):
        options = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams}
        want = []
        for at, name in enumerate(names):
            with use_adapter(model, name):
                want.append(model.generate(ids[at : at + 1], **options))
        with use_adapters(model, [name for name in names for _ in range(beams)]):
            got = model.generate(ids, **options)
        assert torch.equal(got, torch.cat(want))
    assert len({tuple(row[4:].tolist()) for row in got}) == 3
    set_adapter(model, ["a", "b"])
    with pytest.raises(CheckpointError, match="model: has several active adapters"):
        model.save_pretrained(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
    model.tie_weights()
    model.resize_token_embeddings(70)
    assert model.lm_head.weight.shape == (70, 16)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")  # Dynamo's
@pytest.mark.parametrize(
    "dropout",
    [0.0, pytest.param(0.5, marks=needs_torch((2, 7), "one tensor is passed on only once"))],
)
def test_compiled_code_computes_the_same(dropout):
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)).double()
    for seed, name in enumerate("ab"):
        add_adapter(model, name, ["0", "2"], rank=2 + seed, dropout=dropout)
        with use_adapter(model, name):
            torch.manual_seed(seed)
            for parameter in get_lora_params(model):
                nn.init.normal_(parameter, std=0.3)
    x = torch.randn(4, 3, 8, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for context in (
        use_adapters(model, ["a", "b", None, "a"]),
        use_adapters(model, ["b", "b", "a", "a"]),
        use_adapter(model, ["a", "b"]),
    ):
        with context:
            found = []
            for call in (compiled, model):
                torch.manual_seed(1)
                y = call(x)
                found.append([y, *torch.autograd.grad(y.sin().sum(), [x, *get_lora_params(model)])])
            for got, want in zip(*found, strict=True):
                assert_close(got, want, want)
    torch.compiler.reset()
