"""An adapted layer's output behaves like that of the layer it replaces: in-place operations, autocast, forward-mode AD, nested tensors."""

import copy
import functools
import pickle
import warnings

import peft
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from fastlora import (
    ConfigError,
    LoRAConfig,
    LoRAConv,
    LoRAEmbedding,
    LoRALinear,
    LoRATransposedLinear,
    accelerate,
    disable_adapter,
    fuse,
    inject_lora,
)
from tests.support.tolerance import assert_close

X = torch.linspace(-1, 1, 48).view(2, 3, 8)
MASK = torch.arange(48).view(2, 3, 8) % 3 == 0
# torch's own, when forward-mode AD is first used
script_warning = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")


class Scaled(nn.Linear):
    """Takes an argument that `nn.Linear` does not have."""

    def forward(self, input, scale=1.0):
        return scale * super().forward(input)


class Two(nn.Sequential):
    """Two layers with the same input, of which the first has a gradient."""

    def forward(self, x):
        return [layer(x) for layer in self][0]


def layer_of(kind: str) -> nn.Module:
    """A trained layer that takes (..., 8) and returns (..., 8), in float32."""
    torch.manual_seed(0)
    if kind == "peft":
        config = peft.LoraConfig(r=2, target_modules=["0"])
        model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), config)
        nn.init.normal_(model.base_model.model[0].lora_B["default"].weight)
        accelerate(model)
        return model
    if kind == "group":
        model = Two(nn.Linear(8, 8), nn.Linear(8, 8))
        inject_lora(model, LoRAConfig(["0", "1"], rank=2))
        for layer in model:
            nn.init.normal_(layer.lora_B)
        fuse(model, X)
        assert model[0].group is not None
        return model
    if kind == "transposed":
        layer = LoRATransposedLinear(Conv1D(8, 8), rank=2)
    else:
        layer = LoRALinear(nn.Linear(8, 8), rank=2, use_dora=kind == "dora")
    if kind == "wrapped":
        layer.original_linear.register_forward_hook(lambda *_: None)
    nn.init.normal_(layer.lora_B)
    return layer


KINDS = ("plain", "wrapped", "transposed", "dora", "group", "peft")
# In place and out of place.
CHANGES = {
    "relu": (F.relu_, F.relu),
    "add": (lambda y: y.add_(X), lambda y: y + X),
    "scale": (lambda y: y.mul_(3.0), lambda y: y * 3.0),
    "masked": (lambda y: y.masked_fill_(MASK, 2.0), lambda y: y.masked_fill(MASK, 2.0)),
    "indexed": (lambda y: _assigned(y), lambda y: torch.where(MASK, 0.5, y)),
}


def _assigned(y):
    y[MASK] = 0.5
    return y


def gradients(layer, change, call=None):
    """[changed output, gradients of x and of every parameter that trains]. call: how the layer is called."""
    x = X.clone().requires_grad_()
    layer.zero_grad()
    y = change((call or layer)(x))
    y.sin().sum().backward()
    return [y, x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", KINDS)
def test_an_output_may_be_changed_in_place(kind, change):
    layer = layer_of(kind)
    in_place, out_of_place = CHANGES[change]
    got, want = gradients(layer, in_place), gradients(layer, out_of_place)
    assert len(got) == len(want) > 2
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 3, 8), (2, 1, 3, 8)])
def test_an_output_of_any_number_of_dimensions_may_be_changed_in_place(shape):
    layer, x = layer_of("plain"), torch.randn(shape)
    y = layer(x)
    F.relu_(y)
    (got,) = torch.autograd.grad(y.sum(), layer.lora_B)
    (want,) = torch.autograd.grad(F.relu(layer(x)).sum(), layer.lora_B)
    assert torch.equal(got, want)


@pytest.mark.parametrize("reentrant", [True, False])
def test_an_output_may_be_changed_in_place_under_checkpointing(reentrant):
    layer = layer_of("plain")
    want = gradients(layer, F.relu)
    got = gradients(layer, F.relu_, lambda x: checkpoint(layer, x, use_reentrant=reentrant))
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # torch's own, while it traces
@pytest.mark.parametrize("kind", ["plain", "wrapped", "dora"])
def test_an_output_may_be_changed_in_place_in_compiled_code(kind):
    layer = layer_of(kind)
    torch.compiler.reset()
    compiled = torch.compile(lambda x: layer(x).relu_(), backend="aot_eager", fullgraph=True)
    got = gradients(layer, lambda y: y, compiled)
    want = gradients(layer, F.relu)
    wide = copy.deepcopy(layer).double()
    exact = gradients(wide, F.relu, lambda x: wide(x.double()))
    for mine, eager, e in zip(got, want, exact, strict=True):
        assert_close(mine, eager, e.double())


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_backward_pass_under_autocast_has_the_dtypes_of_the_forward_pass(kind, create_graph):
    """A float32 island in an autocast region."""
    layer = layer_of(kind)

    def run(enabled):
        x = X.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            with torch.autocast("cpu", enabled=False):
                loss = layer(x).sin().sum()
            # A wrapped layer computes its part of dx by torch's own functions, which autocast applies to.
            leaves = [] if kind == "wrapped" else [x]
            leaves += [p for n, p in layer.named_parameters() if "lora" in n and "1." not in n]
            return torch.autograd.grad(loss, leaves, create_graph=create_graph)

    for inside, outside in zip(run(True), run(False), strict=True):
        assert inside.dtype == torch.float32 and torch.equal(inside, outside)


@script_warning
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("wrapped", [True, False])
def test_forward_mode_ad_has_the_tangent_of_the_whole_layer(p, grad, wrapped):
    layer = LoRALinear(nn.Linear(8, 6), rank=3, dropout=p).double()
    nn.init.normal_(layer.lora_B)
    if wrapped:
        layer.original_linear.register_forward_hook(lambda *_: None)
    x, t = X.double(), X.double().flip(0)

    def call(value):
        torch.manual_seed(3)  # the same mask
        return layer(value)

    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(call(forward_ad.make_dual(x, t))).tangent
    # The layer is affine, so a difference of outputs is its tangent.
    torch.testing.assert_close(tangent, call(x + t) - call(x))


@script_warning
def test_doras_norms_are_constants_in_forward_mode_ad_too():
    layer = LoRALinear(nn.Linear(8, 6), rank=3, use_dora=True).double()
    nn.init.normal_(layer.lora_B)
    x = X.double()
    with forward_ad.dual_level():
        plain = layer.lora_B
        del layer.lora_B
        layer.lora_B = forward_ad.make_dual(plain, torch.ones_like(plain))
        tangent = forward_ad.unpack_dual(layer(x)).tangent
    layer.lora_B = plain
    merged = layer.original_linear.weight + layer.scaling * plain @ layer.lora_A
    scale = layer.lora_magnitude / merged.norm(dim=1)
    want = layer.scaling * scale * (x @ layer.lora_A.T @ torch.ones_like(plain).T)
    torch.testing.assert_close(tangent, want)


LAYOUTS = [torch.jagged, torch.strided]
nested_warning = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")


@nested_warning
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_nested_tensor_gives_what_its_parts_give(kind, layout):
    layer = layer_of(kind)
    parts = [X[0], X[1, :1], X.flatten(0, 1)]
    x = torch.nested.nested_tensor(parts, layout=layout, requires_grad=True)
    y = layer(x)
    assert y.is_nested and y.layout == layout
    assert (y + x).is_nested  # the structure of x: residual connections work
    leaf = torch.cat(parts).requires_grad_()
    want = layer(leaf)
    wide = copy.deepcopy(layer).double()
    leaf64 = leaf.detach().double().requires_grad_()
    want64 = wide(leaf64)
    got = torch.cat(y.unbind())
    assert_close(got, want, want64)
    (dx,) = torch.autograd.grad(got.sin().sum(), x)
    (same,) = torch.autograd.grad(want.sin().sum(), leaf)
    (exact,) = torch.autograd.grad(want64.sin().sum(), leaf64)
    assert_close(torch.cat(dx.unbind()), same, exact)


@nested_warning
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_an_adapted_embedding_takes_nested_ids(layout):
    model = nn.Sequential(nn.Embedding(6, 4))
    inject_lora(model, LoRAConfig(["0"], rank=2, kinds=("embedding",)))
    nn.init.normal_(model[0].lora_A)
    parts = [torch.tensor([1, 2, 3]), torch.tensor([4, 0])]
    y = model(torch.nested.nested_tensor(parts, layout=layout))
    assert y.is_nested and torch.equal(torch.cat(y.unbind()), model(torch.cat(parts)))


def test_a_nested_tensor_with_holes_is_refused_by_name():
    holes = torch.nested.nested_tensor_from_jagged(
        torch.randn(10, 8), torch.tensor([0, 4, 10]), lengths=torch.tensor([3, 5])
    )
    with pytest.raises(ConfigError, match="input: expected a contiguous nested tensor"):
        layer_of("plain")(holes)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_arguments_of_a_custom_forward_are_passed_on(dropout):
    layer = LoRALinear(Scaled(8, 6), rank=2, dropout=dropout).eval()
    nn.init.normal_(layer.lora_B)
    update = layer.scaling * (X @ layer.lora_A.T @ layer.lora_B.T)
    for got in (layer(X, 3.0), layer(X, scale=3.0)):
        torch.testing.assert_close(got, 3.0 * layer.original_linear(X) + update)
    with disable_adapter(layer):
        assert torch.equal(layer(X, 3.0), layer.original_linear(X, 3.0))
    with pytest.raises(TypeError, match="positional argument"):
        LoRALinear(nn.Linear(8, 6))(X, 3.0)


class Named(nn.Linear):
    """Calls its input otherwise than `nn.Linear`."""

    def forward(self, x, scale=1.0):
        return scale * super().forward(x)


class Caller(nn.Module):
    """Calls its layer by the name of the argument, with another argument and without."""

    def __init__(self, layer):
        super().__init__()
        self.fc = layer

    def forward(self, h):
        return self.fc(x=h) + self.fc(scale=2.0, x=h)


@pytest.mark.parametrize("use_dora", [False, True])
def test_the_input_has_the_name_of_the_wrapped_layers_forward(use_dora):
    trained = LoRALinear(Named(8, 6), rank=2, dropout=0.5, use_dora=use_dora)
    nn.init.normal_(trained.lora_B)

    def run(layer, *args, run=lambda layer, *args, **named: layer(*args, **named), **named):
        torch.manual_seed(0)
        return run(layer, *args, **named)

    recomputed = functools.partial(checkpoint, use_reentrant=False)
    for layer in (trained, copy.deepcopy(trained).eval(), pickle.loads(pickle.dumps(trained))):
        assert torch.equal(run(layer, x=X), run(layer, X))
        assert torch.equal(run(layer, input=X), run(layer, X))
        assert torch.equal(run(layer, scale=3.0, x=X), run(layer, X, 3.0))
        assert torch.equal(run(layer, x=X, run=recomputed), run(layer, X))
        with disable_adapter(layer):
            assert torch.equal(layer(x=X), layer.original_linear(X))
    with pytest.raises(TypeError, match="forward: expected the argument input or x, got hidden"):
        layer(hidden=X)
    with pytest.raises(TypeError, match="forward: expected the argument input, got x"):
        LoRALinear(nn.Linear(8, 6))(x=X)
    with pytest.raises(TypeError, match="multiple values for argument 'x'"):
        layer(X, x=X)
    with pytest.raises(TypeError, match="input: expected a tensor"):
        layer()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # torch's own, while it traces
def test_an_input_by_name_compiles_and_exports():
    torch.compiler.reset()
    model = Caller(LoRALinear(Named(8, 6), rank=2)).eval()
    nn.init.normal_(model.fc.lora_B)
    expected = model(X)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), expected)
    torch.testing.assert_close(torch.export.export(model, (X,)).module()(X), expected)


def test_every_adapted_layer_takes_its_input_by_the_name_of_the_wrapped_one():
    conv1d = Conv1D(6, 8)
    decorated = nn.Linear(8, 6)
    decorated.forward = functools.wraps(decorated.forward)(
        lambda *args, **kwargs: nn.Linear.forward(decorated, *args, **kwargs)
    )
    ids = torch.arange(3)
    for wrapped, layer, x, name in (
        (decorated, LoRALinear(decorated), X, "input"),
        (conv1d, LoRATransposedLinear(conv1d), X, "x"),
        ((conv := nn.Conv1d(3, 4, 2)), LoRAConv(conv), X, "input"),
        ((table := nn.Embedding(4, 6)), LoRAEmbedding(table), ids, "input"),
    ):
        nn.init.normal_(layer.lora_A)
        nn.init.normal_(layer.lora_B)
        assert torch.equal(layer(**{name: x}), layer(x))
        assert layer(x).shape == wrapped(**{name: x}).shape
        with pytest.raises(TypeError, match="hidden"):
            layer(hidden=x)


def test_an_output_of_another_type_is_refused_by_name():
    class Pair(nn.Linear):
        def forward(self, input, both=False):
            y = super().forward(input)
            return (y, self.bias) if both else y

    layer = LoRALinear(Pair(8, 6), rank=2)
    assert layer(X).shape == (2, 3, 6)
    with pytest.raises(TypeError, match="Pair: expected its output to be of the input's type"):
        layer(X, both=True)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize(("k", "n"), [(8, 0), (0, 8), (0, 0)])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 0)])
def test_a_layer_without_rows_or_columns_has_the_shape_of_linear(lead, k, n, use_dora):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's: initialising an empty tensor
        linear = nn.Linear(k, n)
        layer = LoRALinear(linear, rank=2, dropout=0.5, use_dora=use_dora)
    x = torch.randn(*lead, k, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (*lead, n) and x.grad.shape == x.shape
    if not use_dora:
        assert torch.equal(y, linear(x))
