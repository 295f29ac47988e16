"""Groups of adapted layers that share their input compute what separate calls compute."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from fastlora import (
    InjectionError,
    LoRAConfig,
    add_adapter,
    explain,
    freeze_base_params,
    fuse,
    get_lora_params,
    inject_lora,
    lora_linear,
    merged_model,
    set_adapter,
    unfuse,
)
from fastlora.model.heads import adapter_parameters
from fastlora.ops.group import lora_linear_group
from tests.support.cases import Member, run_group
from tests.support.models import randomise_adapters
from tests.support.tolerance import assert_close, assert_differs

K, NS, RS = 16, (16, 8, 24), (4, 2, 3)
NAMES = ("weight", "bias", "lora_a", "lora_b")


def members(dtype=torch.float32, bias=True):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return (
            torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        )

    return [
        Member(draw(n, K), draw(n) if bias else None, draw(r, K), draw(n, r), 0.5 + r)
        for n, r in zip(NS, RS, strict=True)
    ]


def as_wide(group):
    return [Member(*(None if t is None else leaf(t) for t in parts(m)), m.scaling) for m in group]


def leaf(tensor):
    return tensor.detach().double().requires_grad_()


def parts(member):
    return [getattr(member, name) for name in NAMES]


def alone(x, group, p=0.0, seed=None):
    return [lora_linear(x, *parts(m), m.scaling, p, seed) for m in group]


def gradients(outputs, x, group, skip=None):
    inputs = [x] + [t for m in group for t in parts(m) if t is not None]
    loss = sum(y.sin().sum() for i, y in enumerate(outputs) if i != skip)
    return torch.autograd.grad(loss, inputs, allow_unused=True)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("skip", [None, 1])
def test_a_group_equals_separate_calls(p, dtype, skip):
    group, seed = members(dtype, bias=skip is None), torch.tensor(5) if p else None
    x = torch.randn(2, 5, K).to(dtype).requires_grad_()
    got, same = run_group(x, group, p, seed), alone(x, group, p, seed)
    wide_x, wide = leaf(x), as_wide(group)
    want = alone(wide_x, wide, p, seed)
    for g, s, w in zip(got, same, want, strict=True):
        assert_close(g, s, w)
    compared = zip(
        gradients(got, x, group, skip),
        gradients(same, x, group, skip),
        gradients(want, wide_x, wide, skip),
        strict=True,
    )
    found = 0
    for g, s, w in compared:
        assert (g is None or not g.any()) == (w is None or not w.any())
        if w is not None and g is not None:
            assert_close(g, s, w.double())
            found += 1
    assert found >= (13 if skip is None else 7)
    with torch.no_grad():
        for g, y in zip(run_group(x, group, p, seed), got, strict=True):
            assert torch.equal(g, y)


def test_a_group_has_second_derivatives():
    group = members(torch.float64)
    x = torch.randn(3, K, dtype=torch.float64, requires_grad=True)
    seed = torch.tensor(3)

    def function(x, a, b):
        first = Member(group[0].weight, group[0].bias, a, b, 2.0)
        return tuple(run_group(x, [first, group[1]], 0.3, seed))

    arguments = (x, group[0].lora_a, group[0].lora_b)
    assert torch.autograd.gradcheck(function, arguments)
    assert torch.autograd.gradgradcheck(function, arguments)


def test_a_group_saves_x_once():
    group, x = members(), torch.randn(6, K, requires_grad=True)
    own = {t.untyped_storage().data_ptr() for m in group for t in parts(m)}
    kept = {}

    def note(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        run_group(x, group, 0.5, torch.tensor(1))
    assert sorted(kept.values()) == [8, 6 * sum(RS) * 4, 6 * K * 4]


class Attention(nn.Module):
    def __init__(self, width=K):
        super().__init__()
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width // 2)
        self.v_proj = nn.Linear(width, width // 2, bias=False)
        self.o_proj = nn.Linear(width // 2, width)
        self.cross_k = nn.Linear(width, width)

    def forward(self, x, memory):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        mixed = torch.softmax(q[..., :8] @ k.mT, -1) @ v
        return self.o_proj(mixed) + self.cross_k(memory)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(2))
        self.gate, self.up = nn.Linear(K, 12), nn.Linear(K, 12)
        self.unused = nn.Linear(K, 4)

    def forward(self, x, memory):
        for layer in self.layers:
            x = torch.tanh(layer(x, memory))
        return F.silu(self.gate(x)) * self.up(x)


X, MEMORY = torch.randn(2, 2, 5, K, generator=torch.Generator().manual_seed(0))


def net(**settings):
    torch.manual_seed(0)
    model = Net()
    inject_lora(model, LoRAConfig("all-linear", rank=3, **settings))
    randomise_adapters(model)
    freeze_base_params(model)
    return model


ALONE = "no other adapted layer of its parent with these settings receives the same tensor"


def test_fuse_finds_the_groups_by_the_inputs_of_the_layers():
    model = net()
    report = fuse(model, X, memory=MEMORY)
    assert report.groups == (
        ("layers.0.q_proj", "layers.0.k_proj", "layers.0.v_proj"),
        ("layers.1.q_proj", "layers.1.k_proj", "layers.1.v_proj"),
        ("gate", "up"),
    )
    assert report.alone == {
        **{f"layers.{i}.{name}": ALONE for i in (0, 1) for name in ("o_proj", "cross_k")},
        "unused": "its forward is not called on this sample",
    }
    text = str(report)
    assert text.startswith("8 of 13 layers in 3 groups and 0 gated MLPs")
    assert "together   gate, up" in text and "alone      unused: its forward" in text
    assert explain(model.gate, X).reason.endswith(
        "fused in a group of 2 layers with the same input"
    )
    assert model.training and all(m.training for m in model.modules())
    assert unfuse(model) == 8 and unfuse(model) == 0
    assert "fused" not in explain(model.gate, X).reason


def step(model, x=X, memory=MEMORY):
    x = x.clone().requires_grad_()
    y = model(x, memory)
    return y, torch.autograd.grad(y.sin().sum(), [x, *get_lora_params(model)][:-2])


def assert_same_step(fused, plain):
    """On many rows: the largest errors of two orders of summation are similar only over many elements."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(8, 64, K, generator=generator) for _ in range(2)]
    wide = copy.deepcopy(plain).double()
    x, memory = (value.double() for value in inputs)
    y = wide(x.requires_grad_(), memory)
    wants = torch.autograd.grad(y.sin().sum(), [x, *get_lora_params(wide)][:-2])
    (got, gots), (same, sames) = step(fused, *inputs), step(plain, *inputs)
    assert_close(got, same, y)
    for g, s, w in zip(gots, sames, wants, strict=True):
        assert_close(g, s, w)


@pytest.mark.parametrize("settings", [{}, {"init_lora_weights": "olora"}])
def test_a_fused_model_computes_the_same(settings):
    plain = net(**settings)
    fused = copy.deepcopy(plain)
    fuse(fused, X, MEMORY)
    for model in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        calls = count_group_calls(model)
        assert_same_step(model, plain)
        assert len(calls) == 3
    own = {id(m) for m in fused.modules()}
    twin = copy.deepcopy(fused)
    assert all(id(m) not in own for m in twin.gate.group.layers)
    assert {id(m) for m in twin.gate.group.layers} == {id(twin.gate), id(twin.up)}


def count_group_calls(model):
    """A list that grows with each group product, and the model as it was."""
    import fastlora.model.fusion as module

    calls = []
    original = lora_linear_group

    def counted(*args, **named):
        calls.append(1)
        return original(*args, **named)

    module.lora_linear_group = counted
    return calls


@pytest.fixture(autouse=True)
def _uncounted():
    yield
    import fastlora.model.fusion as module

    module.lora_linear_group = lora_linear_group


def test_dropout_is_one_mask_for_a_group():
    model = net(dropout=0.5)
    fuse(model, X, MEMORY)
    torch.manual_seed(1)
    together = model.gate(X), model.up(X)
    unfuse(model)
    torch.manual_seed(1)
    gate = model.gate(X)
    torch.manual_seed(1)
    up = model.up(X)
    for got, alone in zip(together, (gate, up), strict=True):
        assert_close(got, alone, alone.double())


def test_cached_outputs_are_used_only_for_the_same_call():
    model = net()
    fuse(model, X, MEMORY)
    calls = count_group_calls(model)
    with torch.no_grad():
        x = X.clone()
        model.gate(x)
        up = model.up(x)  # returned from the cache
        assert len(calls) == 1
        again = model.up(x)  # recomputed
        assert len(calls) == 2 and torch.equal(up, again)
        x.mul_(2)
        assert_differs(model.gate(x), model.gate(X))  # the contents changed
        model.gate(x)
        model.up.lora_B.add_(1.0)
        assert_differs(model.up(x), merged_model(net()).up(x))  # a parameter changed
        model.gate(x)
    with_gradient = model.up(x)
    assert with_gradient.requires_grad  # not the output computed without gradients
    model.gate(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.up(x).dtype == torch.bfloat16
    before = len(calls)
    model.gate.eval()
    model.up(x)  # different training modes: separate calls
    assert len(calls) == before


class Projections(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(K, K) for _ in range(3))

    def forward(self, x):
        return self.q(x) + self.k(x) + self.v(x)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_group_is_computed_once_for_a_nested_tensor(layout, dropout):
    torch.manual_seed(0)
    model = Projections()
    inject_lora(model, LoRAConfig(["q", "k", "v"], rank=3, dropout=dropout))
    randomise_adapters(model)
    parts = list(torch.randn(9, K).split([4, 0, 5]))

    def run(model, x):
        torch.manual_seed(1)
        y = model(x)
        rows = torch.cat(y.unbind()) if y.is_nested else y
        return rows, *torch.autograd.grad(rows.sin().sum(), get_lora_params(model))

    def nested(dtype=torch.float32, **options):
        return torch.nested.nested_tensor(parts, layout=layout, dtype=dtype, **options)

    rows = torch.cat(parts)
    assert fuse(model, nested()).groups == (("q", "k", "v"),)
    wide = copy.deepcopy(model).double()
    calls = count_group_calls(model)
    x = nested(requires_grad=True)
    got = run(model, x)
    assert len(calls) == 1
    for value, same, want in zip(got, run(model, rows), run(wide, rows.double()), strict=True):
        assert_close(value, same, want)  # of one mask, that of the plain rows
    y = torch.cat(model.eval()(x).unbind())
    (dx,) = torch.autograd.grad(y.sin().sum(), x)
    leaf = rows.clone().requires_grad_()
    unfuse(model)
    unfuse(wide)
    (want,) = torch.autograd.grad(model(leaf).sin().sum(), leaf)
    wide_leaf = rows.double().requires_grad_()
    (exact,) = torch.autograd.grad(wide.eval()(wide_leaf).sin().sum(), wide_leaf)
    assert_close(torch.cat(dx.unbind()), want, exact)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
def test_a_nested_tensor_that_changed_is_another_input(layout):
    torch.manual_seed(0)
    model = Projections()
    inject_lora(model, LoRAConfig(["q", "k", "v"], rank=3))
    x = torch.nested.nested_tensor(list(torch.randn(9, K).split([4, 5])), layout=layout)
    fuse(model, x)
    calls = count_group_calls(model)
    with torch.no_grad():
        model.q(x)
        x.unbind()[1].zero_()
        changed = torch.cat(model.k(x).unbind())
        assert len(calls) == 2
        assert torch.equal(changed[4:], model.k.bias.expand(5, -1))
        model.k(x.clone())  # equal, but another tensor
        assert len(calls) == 3
    with torch.inference_mode():
        inference = x.clone()
        assert model.q(inference).is_nested
    with torch.no_grad():
        assert model.q(inference).is_nested and len(calls) == 3


def test_outputs_are_freed_once_returned_or_after_the_next_input():
    model = net()
    fuse(model, X, MEMORY)
    group, x = model.gate.group, X.clone()
    model.gate(x)
    kept = weakref.ref(model.up(x))
    gc.collect()
    assert kept() is None and group._last.cached is None
    model.gate(x)
    kept = weakref.ref(group._last.cached.outputs[id(model.up)])
    model.gate(X.clone())
    gc.collect()
    assert kept() is None


def test_a_copy_of_a_layer_runs_separately():
    """Replicas as in `nn.DataParallel`: the same group, different parameters."""
    model = net()
    replica = copy.copy(model.gate)
    replica._parameters = dict(model.gate._parameters) | {
        name: nn.Parameter(2 * parameter)
        for name, parameter in model.gate.lora_parameters().items()
    }
    expected = replica(X)
    fuse(model, X, MEMORY)
    replica.group = model.gate.group
    assert torch.equal(replica(X), expected)


def test_checkpointing_and_repeated_steps_on_one_input():
    model, twin = net(dropout=0.3), net(dropout=0.3)
    fuse(model, X, MEMORY)
    fuse(twin, X, MEMORY)
    runs = []
    for each, use_checkpoint in ((model, True), (twin, False)):
        optimizer = torch.optim.SGD(get_lora_params(each), 0.1)
        torch.manual_seed(4)
        for _ in range(3):
            optimizer.zero_grad()
            if use_checkpoint:
                y = checkpoint(each, X, MEMORY, use_reentrant=False)
            else:
                y = each(X, MEMORY)
            y.square().sum().backward()
            optimizer.step()
        runs.append([p.detach().clone() for p in get_lora_params(each)])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # torch's own, while it traces
def test_under_a_compiler_and_functorch_layers_run_separately():
    model = net()
    plain = copy.deepcopy(model)
    fuse(model, X, MEMORY)
    calls = count_group_calls(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")(X, MEMORY)
    with torch.inference_mode():
        inferred = model(X.clone(), MEMORY)
    mapped = torch.func.vmap(lambda x, m: model(x, m))(X, MEMORY)
    for got in (compiled, inferred, mapped):
        assert_close(
            got, plain(X, MEMORY), copy.deepcopy(plain).double()(X.double(), MEMORY.double())
        )
    assert not calls


def test_groups_follow_named_adapters_and_merging():
    model = net()
    fuse(model, X, MEMORY)
    y = model(X, MEMORY)
    add_adapter(model, "other", ["gate"], activate=True)
    assert not model.gate.group
    set_adapter(model, "default")
    assert torch.equal(model(X, MEMORY), y)
    wide = copy.deepcopy(model).double()(X.double(), MEMORY.double())
    assert_close(merged_model(model)(X, MEMORY), y, wide)


def test_outputs_may_be_changed_in_place():
    model = net()
    fuse(model, X, MEMORY)
    x = X.clone().requires_grad_()
    gate, up = model.gate(x), model.up(x)
    gate.mul_(2)
    (gate + up).sum().backward()
    assert x.grad is not None


def test_what_cannot_be_fused_is_named():
    with pytest.raises(InjectionError, match="no adapted linear layers, so there is nothing to"):
        fuse(Net(), X, MEMORY)
    model = net(use_dora=True)
    report = fuse(model, X, MEMORY)
    assert report.groups == () and report.alone["gate"] == "it has DoRA"
    model = net()
    fuse(model, X, MEMORY)
    model.up.original_linear.register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError):
        fuse(model)
    assert model.gate.group is not None  # as before
    report = fuse(model, X, MEMORY)
    assert report.alone["up"].startswith("the wrapped layer has hooks")
    assert "no other adapted layer" in report.alone["gate"]
    parametrizations.weight_norm(model.gate.original_linear)
    assert "parametrised" in fuse(model, X, MEMORY).alone["gate"]


def test_a_backward_pass_of_one_member_does_not_corrupt_the_others():
    model = net()
    fuse(model, X, MEMORY)
    x = X.clone().requires_grad_()
    model.gate(x).sum().backward()
    model.up(x).sum().backward()  # a new graph: that of the first call is freed
    assert model.up.lora_B.grad is not None


def test_a_changed_bias_and_layers_called_by_name_are_detected():
    model = net()
    fuse(model, X, MEMORY)
    with torch.no_grad():
        model.gate(X)
        stale = model.up(X)
        model.gate(X)
        model.up.original_linear.bias.add_(1.0)
        assert_differs(model.up(X), stale)
    model.forward = lambda x, memory: model.gate(input=x) * model.up(input=x)
    assert fuse(model, X, MEMORY).groups == (("gate", "up"),)
    model = nn.ModuleDict({name: Conv1D(4, K) for name in ("q", "k")})  # calls its input x
    inject_lora(model, ["q", "k"])
    model.forward = lambda h: model.q(x=h) + model.k(x=h)
    assert fuse(model, X).groups == (("q", "k"),)


class Cross(nn.Module):
    """k and v of one context, in one checkpointed region or each in its own."""

    def __init__(self):
        super().__init__()
        self.k, self.v, self.o = (nn.Linear(K, K) for _ in range(3))

    def forward(self, x, context, run):
        k, v = run(self.k, context), run(self.v, context)
        return x + self.o(torch.tanh(x * k) * v)


class Blocks(nn.Module):
    """Blocks that all receive the same context; it is an argument of the region or captured by it."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(K, K)
        self.blocks = nn.ModuleList(Cross() for _ in range(3))

    def forward(self, x, memory, outer=None, inner=None, captured=False):
        context = self.first(memory)
        for block in self.blocks:

            def region(x, context=context, block=block):
                return block(x, context, runner(inner))

            x = runner(outer)(region, x, *([] if captured else [context]))
        return x


def runner(reentrant):
    if reentrant is None:
        return lambda function, *args: function(*args)
    return lambda function, *args: checkpoint(function, *args, use_reentrant=reentrant)


def blocks(dropout):
    torch.manual_seed(0)
    model = Blocks()
    inject_lora(model, LoRAConfig("all-linear", rank=3, dropout=dropout))
    randomise_adapters(model)
    freeze_base_params(model)
    return model


def train(model, steps=2, **regions):
    """The outputs and the gradients of x and of the adapters in several steps, with an evaluation between them."""
    torch.manual_seed(3)
    found, x = [], X.clone().requires_grad_()
    for _ in range(steps):
        y = model(x, MEMORY, **regions)
        y.sin().sum().backward()
        gradients = [x.grad, *(p.grad for p in adapter_parameters(model))]
        found += [y.detach(), *(g.clone() for g in gradients if g is not None)]
        model.eval()
        with torch.no_grad():
            found.append(model(x, MEMORY))
        model.train()
    return found


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("captured", [True, False])
def test_blocks_with_one_context_have_the_same_gradients_in_checkpointed_regions(
    dropout, reentrant, captured
):
    """The reference is the same fused model without checkpointing."""
    model, twin = blocks(dropout), blocks(dropout)
    report = fuse(model, X, MEMORY)
    assert report.groups == tuple((f"blocks.{i}.k", f"blocks.{i}.v") for i in range(3))
    fuse(twin, X, MEMORY)
    for m in (model, twin):  # reentrant checkpointing has no gradients for what it captures
        m.first.requires_grad_(not captured)
    calls = count_group_calls(model)
    got = train(model, outer=reentrant, captured=captured)
    assert calls
    want = train(twin, captured=captured)
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.parametrize("outer", [None, True, False])
def test_members_in_regions_of_their_own_equal_separate_layers(dropout, inner, outer):
    """The reference is the same model without `fuse`, whose layers draw a seed each."""
    fused, plain = blocks(dropout), blocks(dropout)
    fuse(fused, X, MEMORY)
    got, same = (train(m, inner=inner, outer=outer) for m in (fused, plain))
    for g, s in zip(got, same, strict=True):
        torch.testing.assert_close(g, s)


@pytest.mark.parametrize("order", [("gate", "up"), ("up", "gate")])
@pytest.mark.parametrize("retain", [False, True])
def test_each_member_may_have_a_backward_pass_of_its_own(order, retain):
    fused, plain = net(), net()
    fuse(fused, X, MEMORY)
    found = []
    for model in (fused, plain):
        x = X.clone().requires_grad_()
        outputs = {"gate": model.gate(x), "up": model.up(x)}
        for name in order:
            outputs[name].sin().sum().backward(retain_graph=retain)
        if retain:
            outputs["gate"].sin().sum().backward()
        found.append(
            [x.grad, *(p.grad for la in (model.gate, model.up) for p in (la.lora_A, la.lora_B))]
        )
        if not retain:
            with pytest.raises(RuntimeError, match="backward through the graph a second time"):
                outputs["up"].sum().backward()
    for g, s in zip(*found, strict=True):
        torch.testing.assert_close(g, s)


def test_a_step_on_one_member_does_not_disturb_the_loss_of_another():
    model, plain = net(), net()
    fuse(model, X, MEMORY)
    grads = []
    for each in (model, plain):
        gate, up = each.gate(X), each.up(X)
        gate.sum().backward()
        with torch.no_grad():
            each.gate.lora_A.add_(1.0)
        up.sin().sum().backward()
        grads.append(list(each.up.lora_parameters().values()))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got.grad, want.grad)
    gate, up = model.gate(X), model.up(X)
    gate.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        gate.sum().backward()
    up.sum().backward()


def test_a_parameter_changed_between_the_backward_passes_of_members_is_an_error():
    model = net()
    fuse(model, X, MEMORY)
    gate, up = model.gate(X), model.up(X)
    gate.sum().backward()
    with torch.no_grad():
        model.up.lora_B.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an in-place operation between"):
        up.sum().backward()


def test_threads_do_not_share_cached_outputs():
    model = net(dropout=0.5)
    fuse(model, X, MEMORY)
    outputs, threads = {}, []
    x = X.clone().requires_grad_()
    outputs["gate"] = model.gate(x)

    def other():
        outputs["other"] = model.up(x)

    threads = [threading.Thread(target=other)]
    threads[0].start()
    threads[0].join()
    outputs["up"] = model.up(x)
    assert outputs["up"].grad_fn is outputs["gate"].grad_fn
    assert outputs["other"].grad_fn is not outputs["up"].grad_fn
    assert not torch.equal(outputs["other"], outputs["up"])  # a mask of its own
