"""`fuse` finds gated MLPs by running them, and a fused one computes and behaves as its own forward does."""

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
    LoRAConfig,
    add_adapter,
    delete_adapter,
    disable_adapter,
    explain,
    freeze_base_params,
    fuse,
    get_lora_params,
    inject_lora,
    merge_lora_weights,
    merged_model,
    set_adapter,
    unfuse,
)
from tests.support.models import randomise_adapters
from tests.support.tolerance import assert_close, assert_differs

K, N = 16, 24


class MLP(nn.Module):
    def __init__(self, act=None, bias=False):
        super().__init__()
        self.gate_proj = nn.Linear(K, N, bias=bias)
        self.up_proj = nn.Linear(K, N, bias=bias)
        self.down_proj = nn.Linear(N, K, bias=bias)
        self.act_fn = nn.SiLU() if act is None else act

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Net(nn.Module):
    def __init__(self, kind=MLP, blocks=2, **settings):
        super().__init__()
        self.blocks = nn.ModuleList(kind(**settings) for _ in range(blocks))
        self.head = nn.Linear(K, 4)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


X = torch.randn(2, 40, K, generator=torch.Generator().manual_seed(0))
BLOCKS = tuple(
    tuple(f"blocks.{i}.{name}_proj" for name in ("gate", "up", "down")) for i in range(2)
)


def net(kind=MLP, targets="all-linear", *, model=None, **settings):
    torch.manual_seed(0)
    model = Net(kind) if model is None else model
    inject_lora(model, LoRAConfig(targets, rank=3, **settings))
    randomise_adapters(model)
    freeze_base_params(model)
    return model


def step(model, x=X, seed=3):
    """The output and the gradients of x and of the trainable parameters."""
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.sin().sum().backward()  # reentrant checkpointing allows no torch.autograd.grad
    return y, x.grad, *(p.grad for p in get_lora_params(model))


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


class Clamped(MLP):
    def forward(self, x):
        gate = self.gate_proj(x).clamp(max=50.0)
        return self.down_proj(self.act_fn(gate) * self.up_proj(x))


class Dropping(MLP):
    def forward(self, x):
        h = F.dropout(self.act_fn(self.gate_proj(x)) * self.up_proj(x), 0.1, self.training)
        return self.down_proj(h)


class DroppingLast(MLP):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.1, self.training)


class Scaled(MLP):
    def forward(self, x):
        return 1.5 * super().forward(x)


class ScaledInPlace(MLP):
    def forward(self, x):
        return super().forward(x).mul_(1.5)


class ScaledGate(MLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(2 * self.gate_proj(x)) * self.up_proj(x))


class Shifted(MLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * (self.up_proj(x) + 1))


class Parallel(MLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x) * self.up_proj(x)))


class ReLU(MLP):
    def __init__(self):
        super().__init__(nn.ReLU())


class Identity(MLP):
    def __init__(self):
        super().__init__(nn.Identity())


class WrittenGELU(MLP):
    def forward(self, x):
        g = self.gate_proj(x)
        gelu = 0.5 * g * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (g + 0.044715 * g**3)))
        return self.down_proj(gelu * self.up_proj(x))


class Checkpointed(MLP):
    def forward(self, x):
        run = super().forward
        if self.training and torch.is_grad_enabled():
            return checkpoint(run, x, use_reentrant=False)
        return run(x)


class Reentrant(MLP):
    def forward(self, x):
        run = super().forward
        if self.training and torch.is_grad_enabled():
            return checkpoint(run, x, use_reentrant=True)
        return run(x)


class OnlyInTraining(MLP):
    def forward(self, x):
        if self.training:
            x = x * 0.5
        return super().forward(x)


class InPlaceInput(MLP):
    def forward(self, x):
        gate = self.gate_proj(x)
        if not torch.is_grad_enabled():
            x.mul_(0.5)
        return self.down_proj(self.act_fn(gate) * self.up_proj(x))


RECEIVES = "down_proj does not receive the product of SiLU or GELU of gate_proj and up_proj"
REFUSED = {
    Clamped: f"in eval mode {RECEIVES}",
    Dropping: f"in training mode {RECEIVES}",
    DroppingLast: "in training mode its output is not that of down_proj",
    ScaledInPlace: "in eval mode its output is not that of down_proj",
    ScaledGate: f"in eval mode {RECEIVES}",
    Shifted: f"in eval mode {RECEIVES}",
    Parallel: f"in eval mode {RECEIVES}",
    ReLU: f"in eval mode {RECEIVES}",
    Identity: f"in eval mode {RECEIVES}",
    WrittenGELU: f"in eval mode {RECEIVES}",
    Checkpointed: "its forward checkpoints a layer",
    Reentrant: "its forward checkpoints a layer",
    OnlyInTraining: "in training mode gate_proj and up_proj do not both receive its input",
    InPlaceInput: "in eval mode gate_proj and up_proj do not both receive its input",
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_a_module_that_does_more_is_refused(kind, calls):
    model = net(kind)
    before = step(model)
    report = fuse(model, X.clone())
    assert report.blocks == () and report.refused == {
        f"blocks.{i}": REFUSED[kind] for i in range(2)
    }
    assert f"refused    blocks.0: {REFUSED[kind]}" in str(report)
    shared = () if kind is InPlaceInput else tuple(block[:2] for block in BLOCKS)
    assert report.groups == shared  # gate and up still share their input
    assert type(model.blocks[0]) is kind and not calls
    unfuse(model)
    for got, want in zip(step(model), before, strict=True):
        assert torch.equal(got, want)


def test_a_module_with_another_output_is_not_taken_for_one():
    report = fuse(net(Scaled), X)
    assert not report.blocks and not report.refused and report.groups[0] == BLOCKS[0][:2]


class Extra(MLP):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(N)

    def forward(self, x):
        return self.down_proj(self.norm(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))


class Two(MLP):
    def forward(self, x, scale=None):
        y = super().forward(x)
        return y if scale is None else scale * y


class WithScale(Net):
    def forward(self, x):
        for block in self.blocks:
            x = x + block(x, scale=torch.ones(()))
        return self.head(x)


def test_other_modules_are_left_alone():
    report = fuse(net(Extra), X)
    assert not report.blocks and not report.refused
    report = fuse(net(model=WithScale(Two)), X)
    assert not report.blocks and not report.refused


def test_an_optional_argument_runs_the_modules_own_forward(calls):
    model = net(Two)
    plain = copy.deepcopy(model)
    assert fuse(model, X).blocks == BLOCKS
    own = plain.blocks[0]
    assert torch.equal(model.blocks[0](X, scale=2.0), own(X, scale=2.0)) and not calls
    assert torch.equal(model.blocks[0](X, 2.0), own(X, 2.0)) and not calls
    assert_close(model.blocks[0](x=X), own(X), copy.deepcopy(own).double()(X.double()))
    assert len(calls) == 1
    with pytest.raises(TypeError, match="unexpected keyword argument 'y'"):
        model.blocks[0](y=X)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
        model.blocks[0]()


def test_zero_weights_prove_nothing():
    model = net()
    with torch.no_grad():
        for block in model.blocks:
            for layer in (block.gate_proj, block.up_proj):
                layer.original_linear.weight.zero_()
                layer.lora_B.zero_()
    report = fuse(model, X)
    assert (
        report.refused["blocks.0"]
        == "SiLU and GELU have the same values for all inputs that were tried"
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_blocks_are_found_in_other_dtypes(dtype):
    for act, name in ((nn.SiLU(), "silu"), (nn.GELU(), "gelu"), (nn.GELU("tanh"), "gelu_tanh")):
        model = net(model=Net(act=act).to(dtype))
        assert fuse(model, X.to(dtype)).blocks == BLOCKS
        assert model.blocks[0].__dict__["_fastlora_gated"].activation == name


def test_the_search_leaves_modes_random_numbers_and_gradients_as_they_were():
    model = net(dropout=0.3)
    model.blocks[1].eval()
    torch.manual_seed(7)
    fuse(model, X)
    drawn = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(3))
    assert model.blocks[0].up_proj.training and not model.blocks[1].up_proj.training
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


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
    calls.clear()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: seen.append(1))
    model(X)
    handle.remove()
    assert not calls


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


def test_what_a_block_cannot_compute_is_refused():
    report = fuse(net(use_dora=True), X)
    assert report.refused["blocks.0"] == "gate_proj: it has DoRA"
    model = net()
    model.blocks[0].down_proj.original_linear.register_forward_hook(lambda *_: None)
    nn.utils.parametrizations.weight_norm(model.blocks[1].up_proj.original_linear)
    refused = fuse(model, X).refused
    assert refused["blocks.0"].startswith("down_proj: it has hooks, a custom forward or")
    assert refused["blocks.1"].startswith("up_proj: its weight is recomputed at each access")
    model = net()
    own = model.blocks[0].forward
    model.blocks[0].forward = lambda x: own(x)
    assert fuse(model, X).refused == {"blocks.0": "another package has set its forward"}
    assert "forward" in model.blocks[0].__dict__


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
