"""Quantised bases on the fused path: the weight is dequantised for each pass, counted, freed, and read by the plans of a plain weight."""

import copy
import gc
import re
import warnings
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastlora import (
    BackendError,
    ConfigError,
    LoRAConfig,
    LoRALinear,
    disable_adapter,
    estimate,
    explain,
    freeze_base_params,
    inject_lora,
)
from fastlora.layers import transient
from fastlora.layers.quantised import reader
from fastlora.layers.several import SeveralAdapters
from fastlora.ops.dropout import keep_mask, keep_scale
from tests.support.models import Tokens
from tests.support.tolerance import assert_close

pytestmark = [
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torchao"),
]

K, N, R = 128, 96, 4


def linear(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(K, N, dtype=dtype).requires_grad_(False)


def four_bits(dtype=torch.float32, compute=None, quant_type="nf4", nested=True):
    bitsandbytes, plain = pytest.importorskip("bitsandbytes").nn, linear(dtype)
    layer = bitsandbytes.Linear4bit(K, N, compute_dtype=compute)
    layer.weight = bitsandbytes.Params4bit(
        plain.weight.data, requires_grad=False, quant_type=quant_type, compress_statistics=nested
    )
    layer.bias = plain.bias
    return layer.to("cpu")


def eight_bits(dtype=torch.float32, threshold=0.0):
    bitsandbytes, plain = pytest.importorskip("bitsandbytes").nn, linear(dtype)
    layer = bitsandbytes.Linear8bitLt(K, N, has_fp16_weights=False, threshold=threshold)
    layer.weight = bitsandbytes.Int8Params(
        plain.weight.data, requires_grad=False, has_fp16_weights=False
    )
    layer.bias = plain.bias
    return layer.to("cpu")


def torchao(dtype=torch.float32, kind="int8"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization = pytest.importorskip("torchao.quantization")
        model = nn.Sequential(linear(dtype))
        groups = quantization.PerGroup(32)
        if kind == "nf4":
            weight = quantization.to_nf4(model[0].weight.detach(), 32, 2)
            model[0].weight = nn.Parameter(weight, requires_grad=False)
            return model[0]
        configs = {
            "int8": quantization.Int8WeightOnlyConfig(),
            "int8 groups": quantization.Int8WeightOnlyConfig(granularity=groups),
            "float8": quantization.Float8WeightOnlyConfig(),
            "int4": quantization.IntxWeightOnlyConfig(torch.int4, groups),
            "dynamic": quantization.Int8DynamicActivationInt8WeightConfig(),
            "dynamic4": quantization.Int8DynamicActivationIntxWeightConfig(torch.int4, groups),
        }
        quantization.quantize_(model, configs[kind])
    return model[0]


BASES = {
    "nf4": four_bits,
    "fp4": partial(four_bits, quant_type="fp4", nested=False),
    "int8": eight_bits,
    "int8 outliers": partial(eight_bits, threshold=6.0),
    **{
        f"torchao {kind}": partial(torchao, kind=kind)
        for kind in ("int8", "int8 groups", "float8", "int4", "nf4")
    },
}
EACH = pytest.mark.parametrize("make", BASES.values(), ids=BASES)


def adapted(base, dropout=0.0, **settings):
    torch.manual_seed(1)
    layer = LoRALinear(base, R, 6.0, dropout, **settings)
    with torch.no_grad():
        layer.lora_B.normal_(0, 0.3)
    return layer


def inputs(dtype=torch.float32, rows=(3, 15)):
    torch.manual_seed(2)
    return torch.randn(*rows, K).to(dtype), torch.randn(*rows, N).to(dtype)


def run(layer, x, dy, seed=3):
    """y, dx, dA, dB."""
    torch.manual_seed(seed)
    x = x.detach().requires_grad_()
    y = layer(x)
    leaves = [x, layer.lora_A, layer.lora_B]
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def own_product(layer, x, dy):
    """`run` with the package's own product, and the low-rank product by autograd."""
    torch.manual_seed(3)
    x = x.detach().requires_grad_()
    a, b = layer.lora_A, layer.lora_B
    y = layer.original_linear(x)
    update = dropped(layer, x) @ a.to(y.dtype).T @ b.to(y.dtype).T
    y = y + layer.scaling * update
    return [y.detach(), *torch.autograd.grad(y, [x, a, b], dy.to(y.dtype))]


def dropped(layer, x):
    seed, flat = layer._draw_seed(x), x.reshape(-1, K)
    if seed is None:
        return x
    keep = keep_mask(flat.detach(), layer.dropout, seed)
    return (torch.where(keep, flat, 0.0) * keep_scale(layer.dropout)).view(x.shape)


def exact(layer, x, dy):
    """`run` in float64 with the dequantised weight."""
    torch.manual_seed(3)
    base = layer.original_linear
    weight = reader(base)(torch.float32).double()
    leaves = [t.detach().double().requires_grad_() for t in (x, layer.lora_A, layer.lora_B)]
    x, a, b = leaves
    y = x @ weight.T + base.bias.double() + layer.scaling * dropped(layer, x) @ a.T @ b.T
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.double())]


def twin(layer, dtype):
    """The same adapter around a plain layer with the dequantised weight."""
    plain = nn.Linear(K, N, dtype=dtype)
    plain.weight.data = reader(layer.original_linear)(dtype)
    plain.bias.data = layer.original_linear.bias.data.to(dtype)
    other = LoRALinear(
        plain.to(layer.lora_A.device),
        R,
        6.0,
        layer.dropout,
        use_dora=layer.lora_magnitude is not None,
    )
    for name, parameter in layer.lora_parameters().items():
        other.lora_parameters()[name].data = parameter.data.clone()
    return other


@pytest.fixture
def counted(monkeypatch):
    """Weak references to every dequantised weight."""
    made = []

    def counting(linear):
        read = reader(linear)

        def value(dtype):
            weight = read(dtype)
            made.append(weakref.ref(weight))
            return weight

        return value

    monkeypatch.setattr(transient, "reader", counting)
    return made


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@EACH
def test_values_and_gradients_are_the_packages(make, dtype, dropout):
    layer = adapted(make(dtype), dropout)
    x, dy = inputs(dtype)
    choice = explain(layer, x)
    assert (choice.backend, choice.plan) == ("torch", "in_place")
    assert "is dequantised by" in choice.reason and "for each pass; torch runs" in choice.reason
    got, own, want = run(layer, x, dy), own_product(layer, x, dy), exact(layer, x, dy)
    for name, g, o, w in zip(("y", "dx", "dA", "dB"), got, own, want, strict=True):
        assert_close(g, o, w, name)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@EACH
def test_the_bits_are_those_of_a_plain_layer_with_the_dequantised_weight(make, dtype, settings):
    layer = adapted(make(torch.float32 if settings else dtype), 0.25, **settings)
    x, dy = inputs(torch.float32 if settings else dtype)
    for mine, plain in zip(run(layer, x, dy), run(twin(layer, x.dtype), x, dy), strict=True):
        assert torch.equal(mine, plain)


@EACH
def test_autocast_sets_the_dtype_of_the_product_and_the_package_that_of_the_output(make):
    layer = adapted(make(), 0.25)
    x, dy = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        own = layer.original_linear(x)
        got = run(layer, x, dy)
        plain = run(twin(layer, torch.float32), x, dy)
    assert got[0].dtype == own.dtype and got[1].dtype == torch.float32
    wide = [t.to(g.dtype) for t, g in zip(plain, got, strict=True)]
    eps = torch.finfo(torch.bfloat16).eps
    for g, p, w in zip(got, wide, exact(layer, x, dy), strict=True):
        assert_close(g, p, w, eps=eps)


@pytest.mark.parametrize("kind", ["float8", "nf4"])
def test_a_bias_wider_than_the_product_is_added_to_it(kind):
    layer, (x, _) = adapted(torchao(kind=kind)), inputs()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        layer.lora_B.zero_()
        assert layer(x).dtype == torch.float32 and torch.equal(layer(x), layer.original_linear(x))


def test_a_weight_is_dequantised_without_autocast():
    layer, (x, _) = adapted(torchao(torch.float16, "nf4")), inputs()
    with torch.autocast("cpu", torch.bfloat16):  # in which torch.stack refuses float16
        assert layer(x).dtype == torch.float32


@pytest.mark.parametrize("compute", [torch.float16, torch.bfloat16], ids=str)
def test_a_compute_dtype_casts_the_input_and_the_output_back(compute):
    layer, (x, dy) = adapted(four_bits(compute=compute)), inputs()
    plain = twin(layer, compute)
    want = run(plain, x.to(compute), dy.to(compute))
    for got, w in zip(run(layer, x, dy), want, strict=True):
        assert got.dtype == torch.float32 and torch.equal(got, w.float())


def test_a_compute_dtype_that_is_not_set_is_that_of_the_first_input():
    base = four_bits()
    own = copy.deepcopy(base)
    layer, (x, _) = adapted(base), inputs(torch.bfloat16)
    layer(x), own(x)
    assert base.compute_dtype == own.compute_dtype == torch.bfloat16 and base.compute_type_is_set
    assert layer(x.float()).dtype == torch.float32
    half = adapted(four_bits())
    assert half(x.half()).dtype == torch.float16 and half.original_linear.compute_dtype is None


@EACH
def test_one_dequantisation_a_pass_and_none_survives_it(make, counted):
    layer, (x, dy) = adapted(make(), 0.25), inputs()
    y = layer(x.requires_grad_())
    gc.collect()
    assert [w() for w in counted] == [None]
    y.backward(dy)
    gc.collect()
    assert [w() for w in counted] == [None, None]
    with torch.no_grad():
        layer(x)
    assert len(counted) == 3
    layer(x.detach()).backward(dy)  # dA and dB do not read the weight
    assert len(counted) == 4


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_dequantises_once_more(counted, reentrant):
    layer, (x, dy) = adapted(four_bits(), 0.25), inputs()
    want = run(layer, x, dy)
    counted.clear()

    def checkpointed(x):
        return checkpoint(layer, x, use_reentrant=reentrant)

    torch.manual_seed(3)
    x = x.requires_grad_()
    y = checkpointed(x)
    y.backward(dy)
    assert len(counted) == 3
    got = [y, x.grad, layer.lora_A.grad, layer.lora_B.grad]
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("make", [eight_bits, partial(torchao, kind="nf4")], ids=["int8", "nf4"])
def test_gradcheck_and_double_backward(make, dropout):
    layer = adapted(make(), dropout, adapter_dtype=torch.float64)
    assert "is dequantised" in explain(layer, torch.zeros(2, K).double()).reason
    x = inputs(torch.float64, (2,))[0].requires_grad_()

    def function(x, a, b):
        torch.manual_seed(3)
        return torch.func.functional_call(layer, {"lora_A": a, "lora_B": b}, (x,))

    a, b = (p.detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    assert torch.autograd.gradcheck(function, (x, a, b), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (x, a, b), fast_mode=True)


def test_functorch_transforms_read_the_dequantised_weight():
    layer, (x, dy) = adapted(four_bits()), inputs()
    want = run(layer, x, dy)

    def loss(a, b, x):
        y = torch.func.functional_call(layer, {"lora_A": a, "lora_B": b}, (x,))
        return (y * dy).sum()

    a, b = layer.lora_A.detach(), layer.lora_B.detach()
    got = torch.func.grad(loss, (2, 0, 1))(a, b, x)
    for g, w, e in zip(got, want[1:], exact(layer, x, dy)[1:], strict=True):
        assert_close(g, w, e)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("make", [four_bits, torchao], ids=["nf4", "torchao"])
def test_a_compiled_layer_keeps_the_packages_product(make, backend, counted):
    layer = adapted(make())
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    kept = []
    with (
        warnings.catch_warnings(),
        torch.autograd.graph.saved_tensors_hooks(
            lambda t: (kept.append(t.shape), t)[1], lambda t: t
        ),
        torch._dynamo.config.patch(error_on_recompile=False, recompile_limit=2),
    ):
        warnings.simplefilter("ignore")
        for rows in (5, 9, 33, 64):  # one graph, and one for every number of rows
            x, dy = inputs(rows=(rows,))
            got = run(compiled, x, dy)
            assert not counted
            for g, w, e in zip(got, run(layer, x, dy), exact(layer, x, dy), strict=True):
                assert_close(g, w, e)
            counted.clear()
    assert make is torchao or (N, K) not in kept  # autograd saves torchao's dequantised weight


@pytest.mark.parametrize("hooked", [False, True], ids=["plain", "hooked"])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@EACH
def test_saved_bytes_and_the_transient_weight_are_estimated(make, dropout, hooked):
    base = make()
    if hooked:
        base.register_forward_hook(lambda *_: None)
    model = nn.Sequential(base)
    planned = estimate(model, 45, LoRAConfig(["0"], rank=R, dropout=dropout))
    inject_lora(model, LoRAConfig(["0"], rank=R, dropout=dropout))
    freeze_base_params(model)
    found = estimate(model, 45)
    assert found == planned
    assert found.transient_bytes == (0 if hooked else 4 * N * K)
    parts = (found.trainable_bytes, found.frozen_bytes, found.gradient_bytes, found.optimizer_bytes)
    assert found.total_bytes == sum(parts) + found.saved_bytes + found.transient_bytes
    assert bool(re.search("largest dequantised weight +48 KiB  one at", str(found))) != hooked
    x = inputs()[0].requires_grad_()
    kept = {}
    own = {p.untyped_storage().data_ptr() for p in (model[0].lora_A, model[0].lora_B)}

    def note(tensor):
        if type(tensor) is torch.Tensor or type(tensor) is nn.Parameter:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = (storage.nbytes(), storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        model(x)
    if not hooked:
        assert sum(n for at, (n, _) in kept.items() if at not in own) == found.saved_bytes


def test_the_largest_dequantised_weight_counts_once_and_doras_norms_in_float32():
    model = nn.Sequential(four_bits(compute=torch.bfloat16), nn.Linear(N, 8), four_bits())
    settings = LoRAConfig("all-linear", rank=R)
    assert estimate(model, 1, settings).transient_bytes == 4 * N * K  # float32 by default
    del model[2]
    assert estimate(model, 1, settings).transient_bytes == 2 * N * K
    settings = LoRAConfig("all-linear", rank=R, use_dora=True)
    assert estimate(model, 1, settings).transient_bytes == 4 * N * K
    assert estimate(nn.Sequential(nn.Linear(4, 4)), 1, ["0"]).transient_bytes == 0
    half = eight_bits(torch.bfloat16)  # nothing but its bias tells the dtype of its input
    assert estimate(nn.Sequential(half), 1, ["0"]).transient_bytes == 2 * N * K
    half.bias = None
    assert estimate(nn.Sequential(half), 1, ["0"]).transient_bytes == 4 * N * K


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def doubled():
    base = Doubled(K, N)
    base.weight = torchao().weight
    return base


def hooked():
    base = four_bits()
    base.register_forward_hook(lambda *_: None)
    return base


def trainable():
    base = torchao(kind="nf4")
    base.weight = nn.Parameter(base.weight, requires_grad=True)
    return base


def unquantised():
    return pytest.importorskip("bitsandbytes").nn.Linear4bit(K, N)


def fp16_weights():
    return pytest.importorskip("bitsandbytes").nn.Linear8bitLt(K, N).requires_grad_(False)


def other_shape():
    base = four_bits()
    base.weight.quant_state.shape = torch.Size((K, N))
    return base


OWN = {
    "Doubled is not known to multiply by the dequantised weight": doubled,
    "the wrapped layer has hooks": hooked,
    "the weight is trainable": trainable,
    "it is not quantised yet": unquantised,
    "it is quantised in each call": fp16_weights,
    "it was quantised in another shape, (128, 96)": other_shape,
    "Int8Tensor quantises or scales its input too": partial(torchao, kind="dynamic"),
    "IntxUnpackedToInt8Tensor quantises or scales its input too": partial(torchao, kind="dynamic4"),
}


@pytest.mark.parametrize("reason", OWN)
def test_other_products_stay_the_packages_and_explain_says_why(reason, counted):
    base, (x, _) = OWN[reason](), inputs()
    layer = LoRALinear(base, R)
    choice = explain(layer, x)
    assert (choice.backend, choice.plan) == ("torch", "wrapped")
    package = "torchao" if type(base).__module__[:12] != "bitsandbytes" else "bitsandbytes"
    assert choice.reason == (
        f"the weight is quantised by {package}, which computes the product: {reason}"
    )
    if reason not in ("it is not quantised yet", "it was quantised in another shape, (128, 96)"):
        assert torch.equal(layer(x), base(x)) and not counted


def test_a_compute_dtype_wider_than_the_input_would_keep_a_copy_of_it(counted):
    layer, (x, dy) = adapted(four_bits(compute=torch.float32)), inputs(torch.bfloat16)
    reason = "its compute_dtype torch.float32 is wider than its input's torch.bfloat16"
    assert reason in explain(layer, x).reason
    run(layer, x, dy)
    assert not counted
    with torch.autocast("cpu", torch.bfloat16):  # which narrows the copy again
        assert "is dequantised" in explain(layer, x).reason
        got = run(layer, x, dy)
    want = run(twin(layer, torch.bfloat16), x, dy)
    assert len(counted) == 2 and all(map(torch.equal, got, want))
    wide = inputs(torch.float64)[0]
    for layer in (adapted(four_bits()), adapted(torchao())):
        assert "does not dequantise to torch.float64" in explain(layer, wide).reason


def test_eight_bits_are_llm_int8_outside_of_training_mode(counted):
    layer, (x, _) = adapted(eight_bits()), inputs()
    trained = layer(x)
    layer.eval()
    assert "outside of training mode LLM.int8() quantises its input too" in explain(layer, x).reason
    with torch.no_grad():
        base, a, b = layer.original_linear(x), layer.lora_A.T, layer.lora_B.T
        want = base + layer.scaling * x @ a @ b
        exact = base.double() + layer.scaling * x.double() @ a.double() @ b.double()
    assert_close(layer(x), want, exact)
    assert len(counted) == 1 and not torch.equal(layer(x), trained)
    # A hundredth of the output: the input has 8 bits.
    assert (layer(x) - trained).abs().max() < 0.02 * trained.abs().max()


def test_few_rows_without_gradients_stay_with_the_kernels_for_four_bits():
    layer = adapted(four_bits())
    few, more = (torch.empty(rows, K, device="meta") for rows in (32, 33))
    with torch.no_grad():
        assert "at most 32 rows without gradients" in explain(layer, few).reason
        assert "is dequantised" in explain(layer, more).reason
        assert "is dequantised" in explain(layer, torch.empty(1, K)).reason  # a CPU has none
        assert "is dequantised" in explain(adapted(torchao()), few).reason  # nor has torchao
    assert "is dequantised" in explain(layer, few).reason


@pytest.mark.parametrize("make", [four_bits, eight_bits, torchao], ids=["nf4", "int8", "torchao"])
@pytest.mark.parametrize("training", [True, False])
def test_a_forced_backend_runs_kernels_on_the_dequantised_weight(make, training, counted):
    pytest.importorskip("triton.tools.tensor_descriptor")
    if torch.cuda.is_available():
        pytest.skip("the interpreter is off")
    layer = adapted(make(), 0.25 if training else 0.0, backend="triton").train(training)
    x, dy = inputs()
    choice = explain(layer, x)
    assert choice.backend == "triton" and choice.dx_plan is not None
    assert "is dequantised by" in choice.reason
    plain = twin(layer, torch.float32).train(training)
    plain.backend = "triton"
    want = run(plain, x, dy)
    for calls in (1, 2, 3):  # later calls repeat the launches of the first
        assert all(map(torch.equal, run(layer, x, dy), want))
        gc.collect()
        assert [w() for w in counted] == [None] * 2 * calls
    y = layer(x)  # x needs no gradient, so dA and dB run without the weight
    got = torch.autograd.grad(y, [layer.lora_A, layer.lora_B], dy)
    for g, w in zip(got, run(layer, x, dy)[2:], strict=True):
        assert training or torch.equal(g, w)


@pytest.mark.gpu
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("make", [four_bits, eight_bits, torchao], ids=["nf4", "int8", "torchao"])
def test_on_a_device_the_plans_and_bits_are_those_of_a_plain_layer(make, dropout, counted):
    layer = adapted(make(torch.bfloat16).cuda(), dropout)
    x, dy = (t.cuda() for t in inputs(torch.bfloat16, (2, 64)))
    plain = twin(layer, torch.bfloat16)
    assert explain(layer, x).plan == explain(plain, x).plan
    assert all(map(torch.equal, run(layer, x, dy), run(plain, x, dy)))
    assert [w() for w in counted] == [None, None]
    with torch.no_grad():
        few = "at most 32 rows without gradients" in explain(layer, x[0, :8]).reason
        assert few == (make is four_bits)
        own = layer.original_linear(x[0, :8])
        layer.lora_B.zero_()
        if make is four_bits:
            assert torch.equal(layer(x[0, :8]), own)


def test_a_forced_backend_that_cannot_run_raises():
    layer = adapted(torchao(kind="dynamic"), backend="triton")
    for x in (inputs()[0], Tokens(inputs()[0])):
        with pytest.raises(BackendError, match="backend='triton' cannot run"):
            layer(x)


def test_a_trainable_bias_gets_its_gradient_and_keeps_its_dtype():
    base = four_bits(compute=torch.bfloat16)
    base.bias.requires_grad_(True)
    layer, (x, dy) = adapted(base), inputs()
    layer(x).backward(dy)
    assert base.bias.dtype == base.bias.grad.dtype == torch.float32
    want = dy.reshape(-1, N).double().sum(0)
    assert_close(base.bias.grad, dy.bfloat16().reshape(-1, N).sum(0).float(), want)


@EACH
def test_tokens_and_nested_tensors_take_the_same_path(make, counted):
    layer, (x, _) = adapted(make()), inputs()
    with torch.no_grad():
        want = layer(x[0])
        assert torch.equal(layer(Tokens(x[0])).feats, want)
        nested = torch.nested.nested_tensor([x[0, :7], x[0, 7:]], layout=torch.jagged)
        assert_close(layer(nested).values(), want, want.double())
    assert len(counted) == 3


@pytest.mark.parametrize("nested", [True, False])
def test_a_weight_that_bitsandbytes_packed_for_a_cpu_is_read(nested):
    functional = pytest.importorskip("bitsandbytes").functional
    base = four_bits(nested=nested)
    want = reader(base)(torch.float32)
    layer, (x, dy) = adapted(base), inputs()
    y = layer(x.requires_grad_())
    # As its own forward does in eval mode, on a CPU with AVX512-BF16.
    base.weight.data, base.weight.quant_state = functional._convert_weight_packed_for_cpu(
        base.weight.data, base.weight.quant_state
    )
    assert layer.wrapped_weight().shape == (N, K)
    got = reader(base)(torch.float32)
    assert (got - want).abs().max() <= 2**-8 * want.abs().max()  # its scales are bfloat16 now
    y.backward(dy)  # with the weight of the forward pass
    assert torch.equal(x.grad, run(twin_of(want, layer), x, dy)[1])
    mine, plain = run(layer, x, dy), run(twin(layer, torch.float32), x, dy)
    assert all(map(torch.equal, mine, plain))


def twin_of(weight, layer):
    other = twin(layer, torch.float32)
    other.original_linear.weight.data = weight
    return other


def test_a_disabled_adapter_and_one_without_effect_give_the_packages_output(counted):
    base, (x, _) = four_bits(), inputs()
    layer = LoRALinear(base, R)
    with disable_adapter(layer):
        assert torch.equal(layer(x), base(x)) and not counted
    assert torch.equal(layer(x), base(x)) and len(counted) == 1


def test_an_input_of_another_width_or_device_is_named():
    for base in (four_bits(), eight_bits(), torchao()):
        layer = adapted(base)
        with pytest.raises(ConfigError, match=rf"x: expected \(\.\.\., K={K}\), got \(3, 7\)"):
            layer(torch.zeros(3, 7))
    with pytest.raises(ConfigError, match="x: expected the weight's dtype torch.float32"):
        adapted(torchao(kind="float8"))(torch.zeros(3, K).bfloat16())


def test_frozen_bytes_are_those_that_are_stored():
    blocks = N * K // 64
    stored = {
        four_bits: N * K // 2 + blocks + 4 * (-(-blocks // 256)),
        partial(four_bits, nested=False): N * K // 2 + 4 * blocks,
        eight_bits: N * K + 4 * N,
        torchao: N * K + 4 * N + N,  # int8 zero points
    }
    for make, size in stored.items():
        found = estimate(nn.Sequential(make()), 1, ["0"]).frozen_bytes
        assert found == size + 4 * N


@EACH
@pytest.mark.parametrize("training", [True, False])
def test_several_adapters_share_a_quantised_layer(make, training):
    base = make()
    torch.manual_seed(1)
    wrappers = {"a": adapted(base), "b": LoRALinear(base, 2, 1.0)}
    nn.init.normal_(wrappers["b"].lora_B, std=0.3)
    (x, dy), samples = inputs(rows=(3, 15)), ("b", None, "a")
    layer = SeveralAdapters("layer", wrappers).train(training)
    layer.route(samples)
    leaves = [la.lora_A for la in wrappers.values()] + [la.lora_B for la in wrappers.values()]
    found = []
    for mixed in (True, False):
        whole = x.clone().requires_grad_()
        apart = (
            (wrappers[name] if name else base)(whole[at : at + 1])
            for at, name in enumerate(samples)
        )
        y = layer(whole) if mixed else torch.cat(list(apart))
        found.append([y, *torch.autograd.grad(y, [whole, *leaves], dy.to(y.dtype))])
    for got, want in zip(*found, strict=True):
        assert_close(got.to(want.dtype), want, want.double())
    if training:
        layer.route(None)
        weight = wrappers["a"].wrapped_weight().float()
        for la in wrappers.values():
            weight = weight + la.delta(torch.float32)
        same, exact = x @ weight.T + base.bias, x.double() @ weight.double().T + base.bias
        assert_close(layer(x), same, exact)
