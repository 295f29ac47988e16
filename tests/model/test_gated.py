"""A gated MLP that `fuse` found computes and behaves as its own forward does. `test_gated_search.py` has what is found."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fastlora.layers.gated as module
from fastlora import (
    add_adapter,
    delete_adapter,
    disable_adapter,
    explain,
    fuse,
    get_lora_params,
    merge_lora_weights,
    merged_model,
    set_adapter,
    unfuse,
)
from tests.support.gated import BLOCKS, MLP, K, N, Net, X, net, step
from tests.support.models import randomise_adapters
from tests.support.processes import run_processes
from tests.support.tolerance import assert_close, assert_differs, assert_same_training
from tests.support.versions import needs_torch


def assert_same_step(fused, plain, x=X):
    for got, same, want in zip(
        step(fused, x), step(plain, x), step(copy.deepcopy(plain).double(), x.double()), strict=True
    ):
        assert_close(got, same, want)


@pytest.fixture
def calls(monkeypatch):
    """A list that grows with each block that runs in one call."""
    found, original = [], module.gated_mlp

    def counted(*args, **named):
        found.append(args)
        return original(*args, **named)

    monkeypatch.setattr(module, "gated_mlp", counted)
    return found


@pytest.mark.parametrize(
    "act", [nn.SiLU(), nn.SiLU(inplace=True), nn.GELU(), nn.GELU("tanh")], ids=str
)
@pytest.mark.parametrize("bias", [False, True])
def test_a_fused_mlp_computes_the_same(act, bias, calls):
    plain = net(model=Net(act=act, bias=bias))
    fused = copy.deepcopy(plain)
    report = fuse(fused, X)
    assert report.blocks == BLOCKS and not report.groups and not report.refused
    assert list(report.alone) == ["head"]
    assert str(report).startswith(
        "6 of 7 layers in 0 groups and 2 gated MLPs\n  gated MLP  blocks.0"
    )
    assert_same_step(fused, plain)
    assert len(calls) == 2
    assert calls[0][4] == {"SiLU": "silu"}.get(
        type(act).__name__, "gelu" + "_tanh" * (getattr(act, "approximate", "") == "tanh")
    )
    assert fused.state_dict().keys() == plain.state_dict().keys()
    assert unfuse(fused) == 6 and unfuse(fused) == 0
    assert all(torch.equal(a, b) for a, b in zip(step(fused), step(plain), strict=True))
    assert len(calls) == 2 and type(fused.blocks[0]) is MLP


@pytest.mark.parametrize(
    "targets", [["gate_proj"], ["up_proj"], ["down_proj"], ["up_proj", "down_proj"]], ids=str
)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_adapters_may_be_on_some_layers(targets, dropout, calls):
    plain = net(targets=targets, dropout=dropout)
    fused = copy.deepcopy(plain)
    assert fuse(fused, X).blocks == BLOCKS
    assert_same_step(fused, plain)  # the layers draw their seeds in the same order
    assert len(calls) == 2


def test_gate_and_up_have_one_mask():
    plain = net(dropout=0.5, model=Net(blocks=1))
    fused = copy.deepcopy(plain)
    fuse(fused, X)
    mlp = fused.blocks[0]
    assert_differs(step(fused)[0], step(plain)[0])
    torch.manual_seed(3)
    y = mlp(X)
    own = plain.blocks[0]
    torch.manual_seed(3)
    gate = own.gate_proj(X)
    torch.manual_seed(3)
    h = F.silu(gate) * own.up_proj(X)
    assert_close(y, own.down_proj(h), own.down_proj(h).double())


def test_layers_with_different_dropout_have_masks_of_their_own():
    plain = net(dropout=0.5)
    for block in plain.blocks:
        block.up_proj.dropout = 0.25
    fused = copy.deepcopy(plain)
    assert fuse(fused, X).blocks == BLOCKS
    assert_same_step(fused, plain)


def kept_bytes(model, x):
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = model(x)
    assert y.requires_grad
    return sum(kept.values())


def test_a_fused_mlp_keeps_half_of_the_wide_tensors():
    model = net(model=Net(blocks=1))
    before = kept_bytes(model.blocks[0], X)
    fuse(model, X)
    rows, ranks = X.numel() // K, 3 * 3
    assert before == 4 * rows * (4 * N + K + ranks)
    assert kept_bytes(model.blocks[0], X) == 4 * rows * (2 * N + K + ranks)


class Two(MLP):
    def forward(self, x, scale=None):
        y = super().forward(x)
        return y if scale is None else scale * y


def test_an_optional_argument_runs_the_modules_own_forward(calls):
    model = net(Two)
    plain = copy.deepcopy(model)
    assert fuse(model, X).blocks == BLOCKS
    own = plain.blocks[0]
    wide = copy.deepcopy(own).double()(X.double())
    assert_close(model.blocks[0](X, scale=2.0), own(X, scale=2.0), 2 * wide)
    assert_close(model.blocks[0](X, 2.0), own(X, 2.0), 2 * wide)
    assert not calls
    assert_close(model.blocks[0](x=X), own(X), wide)
    assert len(calls) == 1
    with pytest.raises(TypeError, match="unexpected keyword argument 'y'"):
        model.blocks[0](y=X)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
        model.blocks[0]()


def test_a_second_fuse_finds_the_same(calls):
    model = net()
    first = fuse(model, X)
    assert fuse(model, X) == first
    model(X)
    assert len(calls) == 2
    assert unfuse(model) == 6 and type(model.blocks[0]) is MLP


def test_a_sample_that_fails_leaves_the_model_as_it_was(calls):
    model = net()
    fuse(model, X)
    with pytest.raises(TypeError):
        fuse(model)
    model(X)
    assert len(calls) == 2


def copies(model):
    yield copy.deepcopy(model)
    yield pickle.loads(pickle.dumps(model))
    yield copy.deepcopy(pickle.loads(pickle.dumps(model)))


def test_copies_compute_with_their_own_parameters(calls):
    model = net()
    fuse(model, X)
    for twin in copies(model):
        calls.clear()
        before = model(X)
        assert torch.equal(twin(X), before) and len(calls) == 4
        with torch.no_grad():
            for layer in get_lora_params(twin):
                layer.add_(1.0)
        assert torch.equal(model(X), before)
        unfuse(twin)
        assert type(twin.blocks[0]) is MLP
        assert_differs(twin(X), before)


def test_a_replica_computes_with_its_own_parameters(calls):
    """As in `nn.DataParallel`: a shallow copy whose children are replicas too."""
    model = net(model=Net(blocks=1))
    fuse(model, X)
    mlp = model.blocks[0]
    replica = mlp._replicate_for_data_parallel()
    replica._modules = dict(mlp._modules)
    up = copy.copy(mlp.up_proj)
    up._parameters = mlp.up_proj._parameters | {"lora_B": nn.Parameter(2 * mlp.up_proj.lora_B)}
    replica._modules["up_proj"] = up
    y = replica(X)
    assert len(calls) == 1
    with torch.no_grad():
        mlp.up_proj.lora_B.mul_(2)
    assert torch.equal(y, mlp(X))


def test_the_class_is_that_of_the_module_for_other_packages():
    model = net()
    fuse(model, X)
    kind = type(model.blocks[0])
    assert isinstance(model.blocks[0], MLP) and type(model.blocks[1]) is kind
    assert (kind.__name__, kind.__module__) == ("MLP", MLP.__module__)
    assert list(inspect.signature(kind.__init__).parameters) == ["self", "act", "bias"]
    assert "MLP(" in repr(model)


def test_hooks_of_the_layers_and_of_the_module_run(calls):
    model = net()
    fuse(model, X)
    expected = model(X)
    wide = copy.deepcopy(model).double()(X.double())
    seen = []
    mlp = model.blocks[0]
    for layer in (mlp.gate_proj, mlp.act_fn, mlp.down_proj.original_linear, mlp):
        calls.clear()
        seen.clear()
        handle = layer.register_forward_hook(lambda *_: seen.append(1))
        y = model(X)
        handle.remove()
        assert seen == [1] and len(calls) == (2 if layer is mlp else 1)
        assert_close(y, expected, wide)
    hooks = nn.modules.module
    for register in (
        hooks.register_module_forward_pre_hook,
        hooks.register_module_forward_hook,
        hooks.register_module_full_backward_pre_hook,
        hooks.register_module_full_backward_hook,
    ):
        calls.clear()
        handle = register(lambda *_: None)
        model(X)
        handle.remove()
        assert not calls
        model(X)
        assert len(calls) == 2


def test_layers_that_changed_run_separately(calls):
    model = net()
    fuse(model, X)
    model.blocks[0].down_proj = nn.Sequential(model.blocks[0].down_proj)
    parametrize = nn.utils.parametrizations.weight_norm
    parametrize(model.blocks[1].gate_proj.original_linear)
    model(X)
    assert not calls
    model = net()
    fuse(model, X)
    model.blocks[0].gate_proj.backend = "torch"  # the others' is "auto"
    model(X)
    assert len(calls) == 1


def test_a_disabled_adapter_is_left_out(calls):
    model = net()
    fuse(model, X)
    base = copy.deepcopy(model)
    unfuse(base)
    with torch.no_grad():
        for name, p in base.named_parameters():
            if name.endswith("lora_B"):
                p.zero_()
        with disable_adapter(model):
            y = model(X)
        assert not calls  # no adapter is left
        with disable_adapter(model.blocks[0].gate_proj), disable_adapter(model.blocks[1]):
            some = model(X)
        assert len(calls) == 1
    wide = copy.deepcopy(base).double()(X.double())
    assert_close(y, base(X), wide)
    assert_differs(some, y)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # in `fuse`
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_checkpointing_gives_the_same_gradients(reentrant, dropout, calls):
    class Regions(Net):
        def forward(self, x):
            for block in self.blocks:
                x = x + checkpoint(block, x, use_reentrant=reentrant)
            return self.head(x)

    plain = net(dropout=dropout)
    fuse(plain, X)
    regions = net(model=Regions(), dropout=dropout)
    regions.load_state_dict(plain.state_dict())
    assert fuse(regions, X).blocks == BLOCKS
    for got, want in zip(step(regions), step(plain), strict=True):
        assert torch.equal(got, want)
    assert len(calls) == 2 * 2 + 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # torch's own, while it traces
def test_under_a_compiler_and_functorch_the_layers_run(calls):
    model = net()
    plain = copy.deepcopy(model)
    fuse(model, X)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")(X)
    mapped = torch.func.vmap(model)(X)
    assert not calls
    with torch.inference_mode():
        inferred = model(X.clone())
    assert len(calls) == 2
    wide = copy.deepcopy(plain).double()(X.double())
    for got in (compiled, mapped, inferred):
        assert_close(got, plain(X), wide)


def test_autocast(calls):
    model = net()
    plain = copy.deepcopy(model)
    fuse(model, X)
    with torch.autocast("cpu", torch.bfloat16):
        got, same = step(model), step(plain)
    assert len(calls) == 2
    want = step(copy.deepcopy(plain).double(), X.double())
    for g, s, w in zip(got, same, want, strict=True):
        assert_close(g, s, w, eps=torch.finfo(torch.bfloat16).eps)


def test_named_adapters_and_merging(calls):
    model = net()
    fuse(model, X)
    y = model(X)
    add_adapter(model, "other", ["up_proj"], activate=True)
    randomise_adapters(model)
    calls.clear()
    other = model(X)
    assert len(calls) == 2  # with the adapters that are active now
    assert_differs(other, y)
    set_adapter(model, "default")
    assert torch.equal(model(X), y)
    wide = copy.deepcopy(model).double()(X.double())
    merged = merged_model(model)
    assert type(merged.blocks[0]) is MLP
    assert_close(merged(X), y, wide)
    delete_adapter(model, "other")
    assert type(model.blocks[0]) is not MLP
    merge_lora_weights(model)
    assert type(model.blocks[0]) is MLP
    assert_close(model(X), y, wide)


def test_deleting_the_last_adapter_restores_the_class():
    model = net()
    fuse(model, X)
    delete_adapter(model, "default")
    assert type(model.blocks[0]) is MLP


def test_explain_names_the_layers_of_a_block():
    model = net()
    fuse(model, X)
    rows = {row.path: row.reason for row in explain(model, rows=8).rows}
    assert rows["blocks.0.up_proj"].endswith("fused in a gated MLP")
    assert "gated" not in rows["head"]


def test_initial_factors_and_a_trainable_base(calls):
    plain = net(init_lora_weights="olora")
    for p in plain.parameters():
        p.requires_grad_(True)
    fused = copy.deepcopy(plain)
    fuse(fused, X)

    def full(model, x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(model(x).sin().sum(), [x, *model.parameters()])

    want = full(copy.deepcopy(plain).double(), X.double())
    for got, same, exact in zip(full(fused, X), full(plain, X), want, strict=True):
        assert_close(got, same, exact)
    assert len(calls) == 2


def test_inputs_that_a_block_does_not_take(calls):
    model = net()
    plain = copy.deepcopy(model)
    fuse(model, X)
    mlp, own = model.blocks[0], plain.blocks[0]
    with pytest.raises(RuntimeError, match="must have the same dtype|expected m1 and m2"):
        own.up_proj.original_linear(X.double())
    for bad in (X.double(), X[..., :3]):
        with pytest.raises(Exception) as want:
            own(bad)
        with pytest.raises(type(want.value)) as got:
            mlp(bad)
        assert str(got.value) == str(want.value)
    assert mlp(X[:0]).shape == (0, 40, K)
    assert mlp(X[0, 0]).shape == (K,)
    calls.clear()
    nested = torch.nested.nested_tensor([X[0, :3], X[0]], layout=torch.jagged)
    assert mlp(nested).is_nested and not calls


def train(rank, world):
    """The losses of three steps on a half of X for each of two processes, or on all of it."""
    model = net()
    fuse(model, X)
    run = model if world == 1 else nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(get_lora_params(model), 0.05)
    rows = X if world == 1 else X[rank : rank + 1]
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = run(rows).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train_of_a_rank():
    return train(torch.distributed.get_rank(), 2)


@pytest.mark.slow
def test_two_processes_train_as_one_does_on_the_whole_batch():
    whole, (one, other) = train(0, 1), run_processes(2, train_of_a_rank)
    for loss, first, second in zip(whole, one, other, strict=True):
        assert_same_training(torch.tensor((first + second) / 2), torch.tensor(loss))
    assert whole[2] < whole[0]


@pytest.mark.parametrize("again", ["unfuse", "merge", "fuse"])
def test_a_forward_that_another_package_keeps_runs_without_the_block(again):
    """As accelerate's hooks, which keep the bound forward."""
    model = net(model=Net(blocks=1))
    want = model(X)
    wide = copy.deepcopy(model).double()(X.double())
    fuse(model, X)
    mlp = model.blocks[0]
    own = mlp.forward
    mlp.forward = lambda x: own(x)
    if again == "unfuse":
        unfuse(model)
    elif again == "merge":
        merge_lora_weights(model)
    else:
        assert fuse(model, X).refused == {"blocks.0": "another package has set its forward"}
    assert_close(model(X), want, wide)


def test_a_class_whose_forward_is_replaced_runs_that(calls, monkeypatch):
    """As Liger's patches of transformers' classes."""
    model = net()
    fuse(model, X)
    monkeypatch.setattr(MLP, "forward", lambda self, x: torch.zeros_like(x))
    assert not model.blocks[0](X).any() and not calls
    assert fuse(model, X).blocks == ()


class Checkpointing(MLP):
    def __init__(self):
        super().__init__()
        self.checkpointing = False

    def forward(self, x):
        if self.checkpointing:
            return checkpoint(super().forward, x, use_reentrant=False)
        return super().forward(x)


def test_settings_that_changed_run_the_modules_own_forward(calls):
    model = net(Checkpointing)
    fuse(model, X)
    model.blocks[1].checkpointing = True
    step(model)
    assert len(calls) == 1
    model.blocks[1].checkpointing = False
    step(model)
    assert len(calls) == 3


class Twice(MLP):
    """Its activation and one of its layers have two names."""

    def __init__(self):
        super().__init__()
        self.act = self.act_fn
        self.w1 = self.gate_proj

    def forward(self, x):
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # torch's own, while it traces
def test_children_with_two_names_and_a_module_that_was_compiled(calls):
    model = net(Twice)
    model.blocks[0].compile(backend="eager")
    assert [block[0] for block in fuse(model, X).blocks] == ["blocks.1.gate_proj"]
    model.blocks[0]._compiled_call_impl = None
    assert fuse(model, X).blocks == BLOCKS
    model.blocks[0].compile(backend="eager")
    model(X)
    assert len(calls) == 1
    copy.deepcopy(model)(X)  # torch compiles no copy
    assert len(calls) == 3


class Beta(nn.Module):
    def __init__(self):
        super().__init__()
        self.beta = 1.0

    def forward(self, g):
        return F.silu(g) if self.beta == 1.0 else g * torch.sigmoid(self.beta * g)


class ByFunction(MLP):
    def __init__(self):
        super().__init__(Beta())
        self.inner, self.sizes = F.silu, (1, 2)

    def forward(self, x):
        g = self.gate_proj(x)
        act = self.act_fn(g) if self.inner is F.silu else self.inner(g)
        return self.down_proj(act * self.up_proj(x))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m.act_fn, "beta", 2.0),
        lambda m: setattr(m, "inner", F.gelu),
        lambda m: setattr(m, "sizes", (3, 4)),
        lambda m: delattr(m, "sizes") or setattr(m, "sizes", [1, 2]),
    ],
)
def test_settings_of_any_plain_kind_that_changed_are_noticed(change, calls):
    model = net(ByFunction)
    assert fuse(model, X).blocks == BLOCKS
    model.blocks[0]._is_initialised = True  # a new attribute changes nothing
    model(X)
    assert len(calls) == 2
    change(model.blocks[0])
    own = copy.deepcopy(model)
    unfuse(own)
    assert_close(model(X), own(X), own.double()(X.double()))
    assert len(calls) == 3


class Nested(MLP):
    def __init__(self):
        super().__init__(nn.Sequential(nn.SiLU(), nn.Dropout(0.0)))


def test_other_children_that_changed_run_the_modules_own_forward(calls):
    model = net()
    fuse(model, X)
    model.blocks[0].act_fn = nn.ReLU()
    model.blocks[1].extra = nn.Dropout(0.5)
    model(X)
    assert not calls
    model = net(Nested)
    assert fuse(model, X).blocks == BLOCKS
    seen = []
    model.blocks[0].act_fn[0].register_forward_hook(lambda *_: seen.append(1))
    model(X)
    assert seen == [1] and len(calls) == 1
    model.blocks[1].act_fn[1].p = 0.5
    assert_differs(step(model, seed=1)[0], step(model, seed=2)[0])
    assert len(calls) == 1


def test_the_signature_is_the_modules_and_the_argument_stays_known(calls):
    model = net()
    fuse(model, X)
    fuse(model, X)
    mlp = model.blocks[0]
    assert list(inspect.signature(mlp.forward).parameters) == ["x"]
    mlp(x=X)
    assert len(calls) == 1


class Registering(MLP):
    """A base class that its subclasses must call with an argument."""

    def __init_subclass__(cls, *, name):
        raise AssertionError("a subclass was made")


def test_what_a_class_does_for_its_subclasses_is_not_done():
    model = net(Registering)
    assert fuse(model, X).blocks == BLOCKS


def test_a_frozen_start_keeps_what_down_needs(calls):
    """gate(x) and up(x) need no gradient, so nothing but h is kept."""
    model = net(targets=["down_proj"], model=Net(blocks=1))
    plain = copy.deepcopy(model)
    fuse(model, X)
    assert kept_bytes(model.blocks[0], X) == kept_bytes(plain.blocks[0], X)
    assert not calls
    with torch.no_grad():
        model(X)
    assert len(calls) == 1


class UpFirst(MLP):
    def forward(self, x):
        up = self.up_proj(x)
        return self.down_proj(self.act_fn(self.gate_proj(x)) * up)


def test_masks_are_drawn_in_the_modules_order(calls):
    plain = net(UpFirst, dropout=0.5)
    for block in plain.blocks:
        block.up_proj.dropout = 0.25
    fused = copy.deepcopy(plain)
    assert fuse(fused, X).blocks == BLOCKS
    assert_same_step(fused, plain)
    assert len(calls) == 2


@pytest.mark.parametrize("first", [True, False])
def test_a_region_that_is_recomputed_by_the_modules_own_forward(first, calls):
    """A global hook, as of a counter of operations, is there in one of the two passes."""
    model = net(dropout=0.4)
    fuse(model, X)
    want = step(model)
    calls.clear()

    def run(hooked, function):
        if not hooked:
            return function()
        handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
        try:
            return function()
        finally:
            handle.remove()

    x = X.clone().requires_grad_()
    model.zero_grad()
    torch.manual_seed(3)
    y = run(first, lambda: checkpoint(model, x, use_reentrant=True))
    run(not first, lambda: y.sin().sum().backward())
    found = [y, x.grad, *(p.grad for p in get_lora_params(model))]
    assert len(calls) == 2
    for got, same in zip(found, want, strict=True):
        assert_same_training(got, same)


@needs_torch((2, 7), "FSDP2 needs a GPU")
def test_dtensors_of_a_sharded_model_are_gathered_where_the_block_is_found():
    for found in run_processes(2, fuse_sharded):
        blocks, errors = found
        assert blocks == [list(block) for block in BLOCKS]
        for got, want in errors:
            assert_same_training(torch.tensor(got), torch.tensor(want))


def fuse_sharded():
    """The blocks that `fuse` finds in a model sharded before, and gradients of it and of the plain model."""
    model, plain = net(), net()
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    for block in model.blocks:
        torch.distributed.fsdp.fully_shard(block, mesh=mesh)
    torch.distributed.fsdp.fully_shard(model, mesh=mesh)
    report = fuse(model, X)
    pairs = []
    for each in (model, plain):
        each(X).sin().sum().backward()
    for got, want in zip(get_lora_params(model), get_lora_params(plain), strict=True):
        pairs.append((got.grad.full_tensor().tolist(), want.grad.tolist()))
    again = fuse(model, X)
    assert again.blocks == report.blocks
    return [list(block) for block in report.blocks], pairs
