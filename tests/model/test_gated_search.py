"""`fuse` takes a module for a gated MLP only if its forward is one, in values and gradients, in every mode, and leaves it as it was."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastlora import fuse, unfuse
from tests.support.gated import BLOCKS, MLP, N, Net, X, net, step


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


class Detached(MLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)).detach() * self.up_proj(x))


class WithoutGradients(MLP):
    def forward(self, x):
        gate = self.gate_proj(x)
        with torch.no_grad():
            act = self.act_fn(gate)
        return self.down_proj(act * self.up_proj(x))


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return -dy


class Reversed(MLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(Reverse.apply(self.gate_proj(x))) * self.up_proj(x))


class HookOnProduct(MLP):
    def forward(self, x):
        h = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        if h.requires_grad:
            h.register_hook(lambda d: d.clamp(-1, 1))
        return self.down_proj(h)


class HookOnOutput(MLP):
    def forward(self, x):
        y = super().forward(x)
        if y.requires_grad:
            y.register_hook(lambda d: d.clamp(-1, 1))
        return y


class Dropped(MLP):
    """Stochastic depth."""

    def forward(self, x):
        if self.training and torch.rand(()) < 0.01:
            return torch.zeros_like(x)
        return super().forward(x)


class DroppedByPython(MLP):
    def forward(self, x):
        if self.training and random.random() < 0.01:
            return torch.zeros_like(x)
        return super().forward(x)


class Remembering(MLP):
    def forward(self, x):
        h = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        self.last = h.detach()
        return self.down_proj(h)


class Counting(MLP):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(1)
        return super().forward(x)


class CountingInTensor(MLP):
    def __init__(self):
        super().__init__()
        self.count = torch.zeros(())

    def forward(self, x):
        self.count.add_(1)
        return super().forward(x)


class ByRows(MLP):
    def forward(self, x):
        y = super().forward(x)
        return 2 * y if x.shape[0] > 3 else y


class Finite(MLP):
    def forward(self, x):
        return self.down_proj((self.act_fn(self.gate_proj(x)) * self.up_proj(x)).nan_to_num(0.0))


class WidelyClamped(MLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x).clamp(-1e4, 1e4)) * self.up_proj(x))


class OnlyInEvalWithGradients(MLP):
    def forward(self, x):
        if not self.training and torch.is_grad_enabled():
            return 2 * super().forward(x)
        return super().forward(x)


class Autocasting(MLP):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


class Asserting(MLP):
    def forward(self, x):
        assert x.abs().max() < 50, "out of range"
        return super().forward(x)


class BoundedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        return h.clone()

    @staticmethod
    def backward(ctx, dh):
        if dh.abs().max() > 50:
            raise OverflowError("gradient out of range")
        return dh


class AssertingBackward(MLP):
    def forward(self, x):
        h = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(BoundedGradient.apply(h))


class OtherActivationInTraining(MLP):
    def forward(self, x):
        act = F.silu if self.training else F.gelu
        return self.down_proj(act(self.gate_proj(x)) * self.up_proj(x))


class Swapping(MLP):
    def forward(self, x):
        layers = (self.gate_proj, self.up_proj)
        gate, up = layers[::-1] if self.training else layers
        return self.down_proj(self.act_fn(gate(x)) * up(x))


class Returning(MLP):
    def forward(self, x):
        return x if x.flatten()[0] > 1.0 else super().forward(x)


class OtherForm(MLP):
    def forward(self, x):
        if self.training:
            h = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
            return self.down_proj(h.flatten(0, 1)).view(x.shape)
        return super().forward(x)


class PicklesItself(MLP):
    def __reduce__(self):
        return type(self), ()


OTHER = "it computes one product for some inputs that were tried, another for others"
RECEIVES = "down_proj does not receive the product of SiLU or GELU of gate_proj and up_proj"
GRADIENTS = "in training mode the gradients of gate_proj or up_proj are not the product's"
STATE = "its forward checkpoints a layer or changes autocast or gradients"
HOOK = "in training mode its forward registers a hook on a tensor"
REFUSED = {
    Clamped: f"in eval mode {RECEIVES}",
    Dropping: "its forward draws random numbers",
    DroppingLast: "its forward draws random numbers",
    Scaled: "in eval mode its output is not that of down_proj",
    ByRows: "in eval mode its output is not that of down_proj",
    Counting: "its forward changes attributes",
    CountingInTensor: "its forward changes attributes",
    ScaledInPlace: "in eval mode its output is not that of down_proj",
    ScaledGate: f"in eval mode {RECEIVES}",
    Shifted: f"in eval mode {RECEIVES}",
    Parallel: f"in eval mode {RECEIVES}",
    ReLU: f"in eval mode {RECEIVES}",
    Identity: f"in eval mode {RECEIVES}",
    WrittenGELU: f"in eval mode {RECEIVES}",
    Checkpointed: f"in training mode {STATE}",
    Reentrant: f"in training mode {STATE}",
    OnlyInTraining: "in training mode gate_proj and up_proj do not both receive its input",
    InPlaceInput: "in eval mode gate_proj and up_proj do not both receive its input",
    Detached: GRADIENTS,
    WithoutGradients: GRADIENTS,
    Reversed: GRADIENTS,
    HookOnProduct: HOOK,
    HookOnOutput: HOOK,
    Dropped: "its forward draws random numbers",
    DroppedByPython: "its forward draws random numbers",
    Remembering: "its forward changes attributes",
    Finite: f"in eval mode {RECEIVES}",
    WidelyClamped: f"in eval mode {RECEIVES}",
    OnlyInEvalWithGradients: "in eval mode with gradients its output is not that of down_proj",
    Autocasting: f"in eval mode {STATE}",
    Asserting: "its forward raises AssertionError for an input that was tried: out of range",
    AssertingBackward: "its backward raises OverflowError for an input that was tried: gradient out of range",
    OtherActivationInTraining: OTHER,
    Swapping: OTHER,
    Returning: "in eval mode its forward does not call each layer once",
    OtherForm: "in training mode its output is not that of down_proj",
    PicklesItself: "its class has a way of its own to be pickled",
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_a_module_that_does_more_is_refused(kind):
    model = net(kind)
    before = step(model)
    attributes = [set(block.__dict__) for block in model.blocks]
    report = fuse(model, X.clone())
    assert report.blocks == () and report.refused == {
        f"blocks.{i}": REFUSED[kind] for i in range(2)
    }
    assert f"refused    blocks.0: {REFUSED[kind]}" in str(report)
    shared = () if kind is InPlaceInput else tuple(block[:2] for block in BLOCKS)
    assert report.groups == shared  # gate and up still share their input
    assert type(model.blocks[0]) is kind
    if kind is not Remembering:
        assert [set(block.__dict__) for block in model.blocks] == attributes
    unfuse(model)
    for got, want in zip(step(model), before, strict=True):
        assert got is want is None or torch.equal(got, want)


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


def test_an_attribute_that_is_an_inference_tensor_is_no_obstacle():
    model = net()
    with torch.inference_mode():
        model.blocks[0].cache = torch.ones(3)
    assert fuse(model, X).blocks == BLOCKS[:2]


def test_a_fault_of_the_search_is_not_the_modules(monkeypatch):
    model = net(dropout=0.3)
    before = step(model)
    monkeypatch.setattr("fastlora.model.gated._size", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        fuse(model, X)
    assert model.training and model.blocks[0].gate_proj.dropout == 0.3
    for got, want in zip(step(model), before, strict=True):
        assert torch.equal(got, want)


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


def test_attributes_that_the_forward_sets_are_those_of_the_models_own_call():
    model = net(Remembering)
    fuse(model, X)
    last = model.blocks[0].last
    unfuse(model)
    model.eval()
    with torch.no_grad():
        model(X)
    assert torch.equal(last, model.blocks[0].last)


class SecondInput(MLP):
    def forward(self, scale=None, x=None):
        assert scale is None
        return super().forward(x)


class NamedInput(MLP):
    def forward(self, *, x):
        return super().forward(x)


class NamingNet(Net):
    def forward(self, x):
        for block in self.blocks:
            x = x + block(x=x)
        return self.head(x)


@pytest.mark.parametrize("kind", [SecondInput, NamedInput])
def test_an_input_that_is_not_the_first_argument_is_left_alone(kind):
    report = fuse(net(model=NamingNet(kind)), X)
    assert not report.blocks and not report.refused


class Mixed(MLP):
    """As T5 in float16, whose last layer stays in float32."""

    def forward(self, x):
        h = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(h.float()).to(x.dtype)


class Returning(MLP):
    def forward(self, x):
        return super().forward(x).to(x.dtype)


def test_layers_of_different_dtypes_are_not_a_block():
    model = Net(Mixed).half()
    for block in model.blocks:
        block.down_proj.float()
    report = fuse(net(model=model), X.half())
    assert not report.blocks and len(report.groups) == 2


def test_a_block_is_one_only_where_that_was_proved():
    """With autocast the module returns another tensor than down's."""
    model = net(Returning)
    plain = copy.deepcopy(model)
    assert fuse(model, X).blocks == BLOCKS
    precisions = model.blocks[0].__dict__["_fastlora_gated"].precisions
    assert precisions == {(torch.float32, None)}
    with torch.autocast("cpu", torch.bfloat16):
        y = model.blocks[0](X)
        assert y.dtype == torch.float32 and torch.equal(y, plain.blocks[0](X))
    other = net()
    fuse(other, X)
    assert other.blocks[0].__dict__["_fastlora_gated"].precisions == {
        (torch.float32, None),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
    }


class GuardedInHalf(MLP):
    def forward(self, x):
        h = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(h.clamp(-9, 9) if h.dtype == torch.float16 else h)


def test_a_dtype_that_was_not_tried_runs_the_modules_own_forward():
    model = net(GuardedInHalf)
    assert fuse(model, X).blocks == BLOCKS
    own = copy.deepcopy(model)
    unfuse(own)
    x = 20 * X.half()
    assert torch.equal(model.half()(x), own.half()(x))
    assert fuse(model, X.half()).refused["blocks.0"] == f"in eval mode {RECEIVES}"


def test_the_search_needs_no_default_device_and_leaves_other_random_numbers():
    model = net(dropout=0.3)
    random.seed(3)
    np.random.seed(3)
    with torch.device("meta"):
        assert fuse(model, X).blocks == BLOCKS
    drawn = random.random(), np.random.rand()
    random.seed(3)
    np.random.seed(3)
    assert drawn == (random.random(), np.random.rand())
    assert [block.up_proj.dropout for block in model.blocks] == [0.3, 0.3]


def test_a_model_on_the_meta_device_has_no_blocks():
    report = fuse(net().to("meta"), X.to("meta"))
    assert not report.blocks and report.groups


def test_it_is_found_within_saved_tensor_hooks():
    with torch.autograd.graph.save_on_cpu():
        assert fuse(net(), X).blocks == BLOCKS


def test_tied_layers_are_not_a_block():
    model = Net()
    for block in model.blocks:
        block.up_proj = block.gate_proj
    report = fuse(net(model=model), X)
    assert not report.blocks and not report.refused
