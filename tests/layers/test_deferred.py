"""`.weight` of an adapted layer: what it is costs nothing, its value and gradients are the product's, nothing is lost silently."""

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from fastlora import (
    FastLoRAWarning,
    LoRAConfig,
    LoRAConv,
    LoRAEmbedding,
    LoRALinear,
    LoRATransposedLinear,
    MergeError,
    disable_adapter,
    freeze_base_params,
    inject_lora,
)
from fastlora.layers.deferred import DeferredTensor
from fastlora.layers.initialise import initialise
from fastlora.layers.usage import Usage
from tests.support.tolerance import assert_close, assert_differs
from tests.support.versions import needs_torch


def conv1d():
    return pytest.importorskip("transformers").pytorch_utils.Conv1D(6, 7)


LAYERS = {
    "linear": lambda: LoRALinear(nn.Linear(7, 6), rank=2),
    "dora": lambda: LoRALinear(nn.Linear(7, 6), rank=2, use_dora=True),
    "pissa": lambda: LoRALinear(nn.Linear(7, 6), rank=2),
    "transposed": lambda: LoRATransposedLinear(conv1d(), rank=2),
    "conv": lambda: LoRAConv(nn.Conv2d(4, 6, 3, groups=2), rank=2),
    "embedding": lambda: LoRAEmbedding(nn.Embedding(7, 6), rank=2),
}


def adapted(name="linear", dtype=torch.float64):
    torch.manual_seed(0)
    layer = LAYERS[name]().to(dtype)
    if name == "pissa":
        initialise(layer, "pissa")
    for parameter in layer.lora_parameters().values():
        nn.init.normal_(parameter)
    layer.wrapped.requires_grad_(False)
    return layer


def product(layer):
    """The merged weight, computed at once."""
    weight = layer.wrapped_weight()
    return layer._merged_weight(weight).to(weight.dtype)


def gradients(layer, loss):
    parameters = list(layer.lora_parameters().values())
    return torch.autograd.grad(loss, parameters)


class Times(torch.autograd.Function):
    """x · w in a function of autograd, as in fused losses: it sees the tensor itself."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        return dy * weight, dy * x


class Reader(nn.Module):
    """A module that asks for the dtype of its layer's weight and multiplies by it, as T5 and fused projections do."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return F.linear(x.to(self.layer.weight.dtype), self.layer.weight)


@pytest.fixture
def computed(monkeypatch):
    """A list that grows by one for each product."""
    calls = []
    for kind in (LoRALinear, LoRAConv, LoRAEmbedding):
        real = kind._merged_weight

        def counted(self, weight, real=real):
            calls.append(type(self))
            return real(self, weight)

        monkeypatch.setattr(kind, "_merged_weight", counted)
    return calls


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("name", LAYERS)
def test_what_a_weight_is_costs_no_product_and_its_value_one(name, grad, computed):
    layer = adapted(name)
    original = layer.wrapped.weight
    with torch.set_grad_enabled(grad):
        weight = layer.weight
    assert (weight.dtype, weight.device, weight.layout) == (
        torch.float64,
        original.device,
        torch.strided,
    )
    assert weight.shape == weight.size() == original.shape and weight.stride() == original.stride()
    assert len(weight) == len(original) and weight.ndim == weight.dim() == original.ndim
    assert weight.numel() == original.numel() and weight.element_size() == 8
    assert weight.is_floating_point() and weight.is_contiguous() and not weight.is_meta
    assert weight.requires_grad == grad and weight.is_leaf != grad and not weight.is_cuda
    assert isinstance(weight, Tensor) and not isinstance(weight, nn.Parameter)
    assert weight.to(torch.float64) is weight and weight.grad_fn is None or grad
    assert computed == []
    doubled, tripled = weight * 2, 3 * weight
    assert len(computed) == 1 and type(doubled) is type(tripled) is Tensor
    assert torch.equal(doubled, product(layer) * 2) and torch.equal(tripled, product(layer) * 3)


def square(weight):
    return weight.square().sum()


USES = {
    "operation": square,
    "function of autograd": lambda weight: square(Times.apply(torch.ones_like(weight), weight)),
    "both": lambda weight: square(weight) + square(Times.apply(weight.detach(), weight)),
    "cast": lambda weight: square(weight.float().double()),
    "view": lambda weight: square(weight.T if weight.ndim == 2 else weight.flatten()),
    "index": lambda weight: square(weight[1:, 0]),
    "saved": lambda weight: square(torch.tanh(weight) * weight),
    "checkpoint": lambda weight: checkpoint(square, weight, use_reentrant=False),
    "reentrant": lambda weight: checkpoint(square, weight, use_reentrant=True),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_through_a_weight_are_those_through_the_product(name, use):
    layer = adapted(name)
    if use == "reentrant":  # it calls backward itself
        USES[use](layer.weight).backward()
        found = [p.grad for p in layer.lora_parameters().values()]
    else:
        found = gradients(layer, USES[use](layer.weight))
    plain = square if use == "reentrant" else USES[use]
    for got, want in zip(found, gradients(layer, plain(product(layer))), strict=True):
        assert got.any()
        assert_close(got, want, want)


@pytest.mark.parametrize("name", LAYERS)
def test_a_trained_base_weight_gets_its_gradient(name):
    layer = adapted(name)
    layer.wrapped.weight.requires_grad_(True)
    (got,) = torch.autograd.grad(square(layer.weight), layer.wrapped.weight)
    (want,) = torch.autograd.grad(square(product(layer)), layer.wrapped.weight)
    assert_close(got, want, want)


def test_a_convolution_by_the_weight_differentiates_the_input_too():
    layer, x = adapted("conv"), torch.randn(2, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    got, want = (
        torch.autograd.grad(square(F.conv2d(x, weight, groups=2)), (x, layer.lora_A))
        for weight in (layer.weight, product(layer))
    )
    for one, other in zip(got, want, strict=True):
        assert_close(one, other, other)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")  # of torch's own forward-mode rules
def test_first_and_second_derivatives_are_exact():
    model, x = Reader(adapted()), torch.randn(3, 7, dtype=torch.float64)
    factors = (model.layer.lora_A, model.layer.lora_B)

    def output(a, b):
        return functional_call(model, {"layer.lora_A": a, "layer.lora_B": b}, (x,))

    assert torch.autograd.gradcheck(output, factors)
    assert torch.autograd.gradgradcheck(output, factors)
    plain = torch.func.jacrev(output)(*factors)
    assert_close(
        torch.autograd.functional.jacobian(output, factors, vectorize=True)[0], plain, plain
    )
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(factors[0].detach(), torch.ones_like(factors[0]))
        tangent = forward_ad.unpack_dual(output(dual, factors[1])).tangent
    want = model.layer.scaling * x @ (factors[1] @ torch.ones_like(factors[0])).T
    assert_close(tangent, want, want)


def test_functorch_takes_a_weight_that_was_read_outside():
    layer, x = adapted(), torch.randn(3, 7, dtype=torch.float64)
    weight, want = layer.weight, F.linear(x, product(layer))
    assert_close(torch.vmap(lambda row: F.linear(row, weight))(x), want, want)
    slope = torch.func.grad(lambda row: F.linear(row, weight).sum())(x[0])
    assert_close(slope, product(layer).sum(0), product(layer).sum(0))
    assert torch.equal(torch.vmap(lambda row: 2 * row)(weight), 2 * product(layer))
    by_weight = torch.func.grad(lambda w: F.linear(x, w).sum())(weight)
    assert_close(by_weight, x.sum(0).expand(6, 7), x.sum(0).expand(6, 7))
    assert torch.equal(weight, product(layer))  # nothing of the transforms is left in it


def test_hooks_and_gradients_of_the_weight_itself_see_every_use():
    layer, seen = adapted(), []
    weight = layer.weight
    weight.register_hook(seen.append)
    weight.retain_grad()
    ones = torch.ones_like(weight)
    (weight.sum() + Times.apply(ones, weight).sum()).backward()
    assert len(seen) == 1 and torch.equal(weight.grad, 2 * ones)
    (found,) = torch.autograd.grad(layer.weight.sum(), layer.lora_A)
    layer.lora_A.register_hook(lambda grad: grad / 2)  # runs once
    layer.lora_A.grad = None
    layer.weight.sum().backward()
    assert torch.equal(layer.lora_A.grad, found / 2)


def outcome(tensor, name):
    """What a member of a tensor gives without arguments: a value that can be compared, or the class of the error."""
    torch.manual_seed(1)
    try:
        member = getattr(tensor, name)
        value = member() if callable(member) and name != "grad_fn" else member
        if isinstance(value, (torch.UntypedStorage, torch.TypedStorage)):
            return value.tolist()
        if isinstance(value, Tensor):
            value = value if value.layout is torch.strided else value.to_dense()
            return value.shape, value.dtype, value.requires_grad, repr(value.detach().tolist())
        return repr(value.tolist()) if isinstance(value, np.ndarray) else value
    except (
        RuntimeError,
        TypeError,
        ValueError,
        IndexError,
        AttributeError,
        AssertionError,
    ) as error:
        return type(error)


# Members that differ between two plain tensors, or by the class.
OWN = {
    *(
        "__annotations__",
        "__class__",
        "__doc__",
        "__firstlineno__",  # Python 3.13, as is __static_attributes__
        "__getstate__",
        "__hash__",
        "__iter__",
        "__module__",
        "__static_attributes__",
    ),
    *(
        "__dict__",
        "__dir__",
        "__dlpack__",
        "__init_subclass__",
        "__new__",
        "__setitem__",
        "__sizeof__",
    ),
    *(
        "__subclasshook__",
        "__torch_dispatch__",
        "__torch_function__",
        "__weakref__",
        "_cdata",
        "_grad_fn",
    ),
    *(
        "__repr__",
        "__str__",
        "_python_dispatch",
        "const_data_ptr",
        "data_ptr",
        "grad_fn",
        "__dlpack_c_exchange_api__",
    ),
}


@pytest.mark.filterwarnings("ignore")  # deprecations of torch's own members
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
def test_every_member_of_a_tensor_gives_what_a_plain_tensor_gives_or_refuses_to_write(grad):
    layer = adapted()
    refused = set()
    with torch.set_grad_enabled(grad):
        for name in sorted(set(dir(Tensor)) - OWN):
            got, want = outcome(layer.weight, name), outcome(product(layer), name)
            if got is MergeError:
                refused.add(name)
            else:
                assert str(got) == str(want), name
    assert {"zero_", "relu_", "normal_", "t_"} < refused
    assert all(name.endswith("_") and not name.endswith("__") for name in refused)


def test_an_operation_that_returns_its_argument_does_not_return_the_value_itself():
    layer = adapted()
    weight = layer.weight
    same = torch.ops.aten.lift_fresh(weight)
    assert torch.equal(same, product(layer)) and not weight._value.requires_grad
    for got, want in zip(
        gradients(layer, square(same)), gradients(layer, square(product(layer))), strict=True
    ):
        assert_close(got, want, want)


@pytest.mark.parametrize(
    "write",
    [
        lambda weight: weight.copy_(torch.zeros(6, 7)),
        lambda weight: weight.__setitem__(0, 1.0),
        lambda weight: weight.__iadd__(1),
        lambda weight: torch.add(weight, 1, out=weight),
        lambda weight: torch._foreach_mul_([weight], 2.0),
        lambda weight: nn.init.xavier_uniform_(weight),
        lambda weight: setattr(weight, "data", torch.zeros(6, 7, dtype=torch.float64)),
    ],
)
def test_writing_a_weight_raises_instead_of_being_lost(write):
    layer = adapted()
    before = product(layer)
    with torch.no_grad(), pytest.raises(MergeError, match="is computed from .* cannot be written"):
        write(layer.weight)
    assert torch.equal(layer.weight, before)


def test_code_that_reads_its_memory_without_an_operation_gets_an_error():
    with torch.no_grad(), pytest.raises(RuntimeError, match="data"):
        Tensor.data_ptr(adapted().weight)


@pytest.mark.parametrize(
    "copied",
    [
        copy.copy,
        copy.deepcopy,
        lambda weight: pickle.loads(pickle.dumps(weight)),
        lambda weight: load(save({"weight": weight}))["weight"],
        lambda weight: torch.from_numpy(np.asarray(weight).copy()),
        lambda weight: torch.from_numpy(weight.numpy().copy()),
        lambda weight: torch.tensor(weight.tolist(), dtype=weight.dtype),
        lambda weight: torch.from_dlpack(weight).clone(),
        lambda weight: nn.Parameter(weight[:]).data,
        lambda weight: weight.data,
        lambda weight: torch.empty(6, 7, dtype=torch.float64).copy_(weight),
        lambda weight: torch.stack([weight, weight])[1],
    ],
)
def test_copies_hold_the_value(copied):
    layer = adapted()
    with torch.no_grad():
        found = copied(layer.weight)
        assert repr(layer.weight) == repr(product(layer))
    assert type(found) is Tensor and torch.equal(found, product(layer))


def test_torch_save_holds_the_value():
    layer, buffer = adapted(), io.BytesIO()
    torch.save({"weight": layer.weight}, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=True)["weight"], product(layer))


def step(layer):
    layer.lora_A.mul_(2)


def swap(layer):
    layer.lora_B.data = torch.zeros_like(layer.lora_B)


def overwrite_base(layer):
    layer.wrapped.weight.zero_()


@torch.no_grad()
@pytest.mark.parametrize("change", [step, swap, overwrite_base])
def test_a_weight_that_was_read_before_a_change_never_has_the_value_after_it(change):
    layer = adapted()
    before, used, kept = layer.weight, layer.weight, layer.weight.detach().clone()
    value = product(layer)
    assert torch.equal(used, value)
    change(layer)
    with pytest.raises(MergeError, match=r"was read, then .* changed, .*\.detach\(\)\.clone\(\)"):
        before + 1
    assert torch.equal(used, value) and torch.equal(kept, value)  # computed before the change
    assert_differs(layer.weight, value)


def test_a_change_between_forward_and_backward_raises():
    layer = adapted()
    loss = square(layer.weight)
    with torch.no_grad():
        step(layer)
    with pytest.raises(MergeError, match="was read, then the base weight or the adapter changed"):
        loss.backward()


def test_scaling_and_switching_off_after_the_read_do_not_change_what_was_read():
    layer = adapted()
    model, want = Reader(layer), product(layer)
    weight = layer.weight
    layer.alpha *= 2
    with disable_adapter(model):
        assert torch.equal(weight, want)
        assert layer.weight is layer.wrapped.weight
    assert_differs(layer.weight, want)
    layer.alpha /= 2
    (got,), (same,) = (
        torch.autograd.grad(square(w), layer.lora_A) for w in (weight, product(layer))
    )
    assert_close(got, same, same)


def test_the_modes_at_the_read_decide_about_gradients():
    layer, x = adapted(), torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        without = layer.weight
    (dx,) = torch.autograd.grad(F.linear(x, without).sum(), x)
    assert not without.requires_grad
    want = product(layer).detach().sum(0).expand(3, 7)
    assert_close(dx, want, want)
    weight = layer.weight
    with torch.inference_mode():
        used = F.linear(x, weight)
        inside = layer.weight
        assert inside.is_inference() and torch.equal(inside, weight)
    assert torch.equal(F.linear(x, weight), used)
    assert gradients(layer, F.linear(x, weight).sum())[0].any()


def test_autocast_changes_neither_the_product_nor_its_gradients():
    layer = adapted(dtype=torch.float32)
    x, want = torch.randn(3, 7), product(layer)
    with torch.autocast("cpu", torch.bfloat16):
        inside = layer.weight
        y = F.linear(x, inside)
        assert y.dtype == torch.bfloat16 and torch.equal(inside, want)
        found = gradients(layer, inside.sum())
    for got, want in zip(found, gradients(layer, product(layer).sum()), strict=True):
        assert torch.equal(got, want)


def test_saved_tensors_may_be_moved():
    layer, x = adapted(), torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.save_on_cpu():
        loss = square(Times.apply(torch.ones_like(layer.weight), layer.weight)) + square(
            F.linear(x, layer.weight)
        )
    want = square(product(layer)) + square(F.linear(x, product(layer)))
    for got, same in zip(gradients(layer, loss), gradients(layer, want), strict=True):
        assert_close(got, same, same)


def test_a_graph_does_not_keep_the_value():
    layer = adapted()
    weight = layer.weight
    node = weight.sum().grad_fn
    assert isinstance(weight, DeferredTensor) and weight._value is not None
    assert not any(
        isinstance(value, Tensor)
        and value.shape == weight.shape
        and value is not layer.wrapped.weight
        for value in vars(node.next_functions[0][0].recipe).values()
    )


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
@pytest.mark.parametrize("name", ["linear", "dora", "transposed"])
def test_tracers_get_the_product(name):
    layer = adapted(name)
    model = Reader(layer)
    if name == "transposed":
        layer.wrapped.weight.data = layer.wrapped.weight.data[:6, :6].clone()
        layer.lora_A.data = layer.lora_A.data[:, :6].clone()
    x = torch.randn(3, layer.weight.shape[1], dtype=torch.float64)
    want = F.linear(x, product(layer))
    with torch.no_grad():
        traced = torch.jit.trace(model, (x,))
    assert_close(traced(x), want, want)
    assert_close(torch.export.export(model, (x,)).module()(x), want, want)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(layer.weight, FakeTensor)
    graph = make_fx(model)(x)
    assert_close(graph(x), want, want)
    with torch.no_grad():  # they compute it from the parameters, not from a constant
        layer.lora_A.mul_(2)
    want = F.linear(x, product(layer))
    assert_close(traced(x), want, want)
    assert_close(graph(x), want, want)


@pytest.mark.slow
def test_compiled_models_read_the_product_in_one_graph():
    layer = adapted()
    model = Reader(layer)
    x = torch.randn(3, 7, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    want = gradients(layer, square(F.linear(x, product(layer))))
    for got, same in zip(gradients(layer, square(compiled(x))), want, strict=True):
        assert_close(got, same, same)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert not layer.usage.read and not layer.usage.called
        model(x), layer(x)  # the eager calls are noted
        assert layer.usage.read and layer.usage.called
        compiled(x)
    # A compiled function that gets the weight runs its uses outside of the graph.
    compiled = torch.compile(lambda x, weight: F.linear(x, weight), backend="aot_eager")
    for got, same in zip(gradients(layer, square(compiled(x, layer.weight))), want, strict=True):
        assert_close(got, same, same)


@needs_torch((2, 11), "compiled autograd refuses a backward pass inside a backward pass")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("assigned", [False, True])
def test_compiled_autograd_keeps_the_gradients_of_a_weight_that_was_read_outside(assigned):
    layer, x = adapted(), torch.randn(3, 7, dtype=torch.float64)
    if assigned:  # parameters of version 0, as the tensors that stand for them in a trace
        layer.load_state_dict(copy.deepcopy(layer.state_dict()), assign=True)
        layer.wrapped.requires_grad_(False)
    want = gradients(layer, square(F.linear(x, product(layer))))
    loss = square(F.linear(x, layer.weight))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(lambda run: run(), backend="aot_eager")(torch.compiler.disable(loss.backward))
    for parameter, same in zip(layer.lora_parameters().values(), want, strict=True):
        assert_close(parameter.grad, same, same)


def checkpointed(run, x):
    return checkpoint(run, x, use_reentrant=False)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_knows_whether_it_is_called_or_only_read(name):
    layer = adapted(name)
    assert layer.weight.dtype == torch.float64 and not layer.usage.read
    layer.weight.sum()
    assert layer.only_read
    layer(
        layer.sample_input(2, torch.Generator()).to(
            torch.float64 if name != "embedding" else torch.int64
        )
    )
    assert layer.usage.called and layer.usage.read and not layer.only_read
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.usage.called and twin.usage.read  # a copy for a moving average is saved like it


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # torch's own
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("region", [lambda run, x: run(x), checkpointed])
def test_what_compiled_code_does_with_a_layer_is_known(name, region):
    called, read = adapted(name), adapted(name)
    read.load_state_dict(called.state_dict())
    x = called.sample_input(2, torch.Generator())
    x = x if name == "embedding" else x.double()

    def run(x):
        return called(x).sum() + read.weight.sum()

    want = region(run, x)
    for layer in (called, read):
        layer.usage = Usage()
    torch.compiler.reset()  # one lambda for all cases
    compiled = torch.compile(lambda x: region(run, x), fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), want, want)
    called.weight.sum()  # as in a penalty, outside
    assert called.usage.read and not called.usage.called  # not noted in the layer yet
    for one, other in ((called, read), (copy.deepcopy(called), copy.deepcopy(read))):
        assert not one.only_read and other.only_read
    called, read = pickle.loads(pickle.dumps((called, read)))
    assert not called.only_read and read.only_read


def test_dropout_without_effect_warns_once_when_a_layer_is_only_read():
    layer = LoRALinear(nn.Linear(7, 6), dropout=0.5)
    model, x = Reader(layer), torch.randn(2, 7)
    model(x)
    with pytest.warns(
        FastLoRAWarning, match=r"no effect on a LoRALinear\(7, 6, r=4.* not seen to be called"
    ):
        model(x)
    model(x)  # warns once: warnings are errors in tests
    silent = {
        "called": LoRALinear(nn.Linear(7, 6), dropout=0.5),
        "no dropout": LoRALinear(nn.Linear(7, 6)),
        "eval": LoRALinear(nn.Linear(7, 6), dropout=0.5).eval(),
        "penalty": LoRALinear(nn.Linear(7, 6), dropout=0.5),
    }
    for name, layer in silent.items():
        for _ in range(3):
            if name == "called":
                layer(x)
            layer.weight.square().sum()
            if name == "penalty":
                layer(x)


def test_an_attention_warns_of_its_dropout_at_injection_only():
    attention = nn.MultiheadAttention(8, 2)
    with pytest.warns(FastLoRAWarning, match="no effect on out_proj"):
        inject_lora(attention, LoRAConfig(["out_proj"], dropout=0.5))
    x = torch.randn(3, 2, 8)
    for _ in range(3):
        attention(x, x, x)


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")  # torch 2.11
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_encoder_keeps_its_fast_path(training):
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).train(training)
    inject_lora(encoder, LoRAConfig("all-linear"))
    freeze_base_params(encoder)
    with torch.no_grad(), torch.profiler.profile() as profile:
        encoder(torch.randn(2, 3, 8))
    names = {event.key for event in profile.key_averages()}
    assert ("aten::_transformer_encoder_layer_fwd" in names) != training
    assert encoder.linear1.usage.called == training and encoder.linear1.usage.read != training


@pytest.mark.parametrize("where", ["lora_A", "lora_B", "weight"])
def test_parametrised_parts_get_their_gradients(where):
    layer = adapted()
    owner = layer.wrapped if where == "weight" else layer
    parametrizations.weight_norm(owner, where)
    owner.requires_grad_(True)
    parameters = [p for p in layer.parameters() if p is not layer.bias]
    assert len(parameters) == 4
    got, want = (
        torch.autograd.grad(square(weight), parameters) for weight in (layer.weight, product(layer))
    )
    for one, other in zip(got, want, strict=True):
        assert other.any()
        assert_close(one, other, other)


def test_threads_read_the_same_weight():
    layer = adapted()
    weight, want = layer.weight, product(layer).detach()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: (weight * 1, layer.weight * 1), range(32)))
    assert all(torch.equal(one, want) and torch.equal(other, want) for one, other in found)


def test_weights_without_a_version_or_a_plain_layout_are_computed_at_once():
    layer = adapted()
    layer.wrapped.weight.data = layer.wrapped.weight.data.T.contiguous().T
    assert type(layer.weight) is Tensor and torch.equal(layer.weight, product(layer))
    with torch.inference_mode():
        assert type(LoRALinear(nn.Linear(7, 6)).weight) is Tensor
