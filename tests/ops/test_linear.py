"""`lora_linear` against the reference in float64, over the table of cases; what it saves; and autocast, compilation and other contexts."""

import warnings

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastlora import lora_linear
from fastlora.errors import BackendError, ConfigError
from fastlora.ops import dropout, linear
from tests.support.cases import CASES, Case, Tensors, formula, make
from tests.support.tolerance import assert_close, assert_same_product

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SEED = torch.tensor(-1234567890123)


def _run(function, t: Tensors, case: Case) -> list[Tensor]:
    names = ("x", "lora_a", "lora_b", "weight", "bias")
    leaves = [
        getattr(t, name).detach().requires_grad_() for name in names if getattr(t, name) is not None
    ]
    x, lora_a, lora_b, weight, *bias = leaves
    y = function(x, weight, bias[0] if bias else None, lora_a, lora_b, t.scaling, case.p, SEED)
    return [y, *torch.autograd.grad(y, leaves, t.dy)]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_backward_match_the_reference(case, dtype):
    _assert_matches(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", [case for case in CASES if case.p > 0], ids=str)
def test_dropout_in_blocks_matches_the_reference(case, dtype, monkeypatch):
    """These cases have few elements, which are otherwise not processed in blocks."""
    monkeypatch.setattr(linear, "FEW_ELEMENTS", 0)
    _assert_matches(case, dtype)


def _assert_matches(case: Case, dtype: torch.dtype) -> None:
    t = make(case)
    got = _run(lora_linear, t.to(dtype), case)
    same = _run(formula, t.to(dtype), case)
    exact = _run(formula, t.to(torch.float64), case)
    for name, g, s, e in zip(
        ("y", "dx", "dA", "dB", "dW", "dbias"), got, same, exact, strict=False
    ):
        assert_close(g, s, e, name)


def test_dropout_in_blocks_is_dropout_at_once(monkeypatch):
    case = Case((70,), 24, 16, 4, p=0.3)
    monkeypatch.setattr(linear, "FEW_ELEMENTS", 0)
    at_once = _run(lora_linear, make(case).to(torch.float64), case)
    monkeypatch.setattr(dropout, "_BLOCK_LANES", 9 * 32)
    blocks = _run(lora_linear, make(case).to(torch.float64), case)
    for a, b in zip(at_once, blocks, strict=True):
        torch.testing.assert_close(a, b)


def test_infinite_factors_do_not_reach_unrelated_gradients():
    t = make(Case((9,), 6, 7, 3))
    t.lora_b.fill_(float("nan"))
    lora_b = t.lora_b.requires_grad_()
    y = lora_linear(t.x, t.weight, t.bias, t.lora_a, lora_b, 0.7)
    (got,) = torch.autograd.grad(y, lora_b, t.dy)
    assert_same_product(got, 0.7 * t.dy.T @ (t.x @ t.lora_a.T))


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_gradcheck_and_double_backward(p):
    t = make(Case((5,), 6, 7, 3)).to(torch.float64)
    leaves = [v.requires_grad_() for v in (t.x, t.weight, t.bias, t.lora_a, t.lora_b)]

    def function(*tensors):
        return lora_linear(*tensors, 0.7, p, SEED)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_only_requested_gradients_are_computed():
    t = make(CASES[1])
    t.lora_b.requires_grad_()
    y = lora_linear(t.x, t.weight, t.bias, t.lora_a, t.lora_b, t.scaling, 0.1, SEED)
    y.backward(t.dy)
    assert t.lora_b.grad is not None
    assert t.x.grad is None and t.lora_a.grad is None and t.weight.grad is None


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_saves_x_itself_s_and_a_seed(p):
    case = Case((64,), 48, 32, 4, p=p)
    t = make(case)
    t.x.requires_grad_(), t.lora_a.requires_grad_(), t.lora_b.requires_grad_()
    saved: list[Tensor] = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        lora_linear(t.x, t.weight, t.bias, t.lora_a, t.lora_b, t.scaling, p, SEED)
    given = {v.untyped_storage().data_ptr() for v in (t.x, t.weight, t.lora_a, t.lora_b)}
    new = [v for v in saved if v.untyped_storage().data_ptr() not in given]
    assert sum(v.numel() * v.element_size() for v in new) == 64 * 4 * 4 + (8 if p else 0)


@pytest.mark.parametrize("adapter", [torch.float32, torch.float64, torch.bfloat16])
def test_adapters_of_another_dtype_are_cast_and_get_gradients_in_their_dtype(adapter):
    t = make(CASES[3]).to(torch.bfloat16)
    lora_a, lora_b = t.lora_a.to(adapter).requires_grad_(), t.lora_b.to(adapter).requires_grad_()
    y = lora_linear(t.x, t.weight, t.bias, lora_a, lora_b, t.scaling)
    y.backward(t.dy)
    assert y.dtype == torch.bfloat16
    assert lora_a.grad.dtype == adapter and lora_b.grad.dtype == adapter


def test_autocast_behaves_as_for_linear():
    t = make(Case((8,), 16, 24, 4, p=0.1))
    leaves = [v.requires_grad_() for v in (t.x, t.lora_a, t.lora_b)]
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(t.x, t.weight, t.bias, t.lora_a, t.lora_b, t.scaling, 0.1, SEED)
    half = t.to(torch.bfloat16)
    expected = lora_linear(
        half.x, half.weight, half.bias, half.lora_a, half.lora_b, t.scaling, 0.1, SEED
    )
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)
    y.backward(t.dy.bfloat16())
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves)
    with torch.autocast("cpu", torch.bfloat16):
        wide = t.to(torch.float64)
        assert (
            lora_linear(wide.x, wide.weight, None, wide.lora_a, wide.lora_b, 1.0).dtype
            == torch.float64
        )


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("lead", [(9,), (2, 9)])
def test_compile_fullgraph_gives_the_eager_result(backend, p, lead):
    case = Case(lead, 16, 24, 4, p=p)
    t = make(case)
    torch.compiler.reset()
    with warnings.catch_warnings():
        # torch's own compiler imports deprecated modules of torch and of the standard library.
        warnings.simplefilter("ignore")
        compiled = torch.compile(lora_linear, fullgraph=True, backend=backend)
        got = _run(compiled, t, case)
    for mine, eager in zip(got, _run(lora_linear, t, case), strict=True):
        assert_close(mine, eager, eager.double())


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_a_traced_forward_pass_changes_no_tensor_in_place(p):
    """Torch 2.11 gives no gradient to a result that is."""
    t, graphs = make(Case((9,), 16, 24, 4, p=p)), []

    def backend(graph, _):
        graphs.extend(part for name, part in graph.named_modules() if name.startswith("fwd_body"))
        return graph.forward

    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _run(
            torch.compile(lora_linear, fullgraph=True, backend=backend),
            t,
            Case((9,), 16, 24, 4, p=p),
        )
    methods = [
        node.target for body in graphs for node in body.graph.nodes if node.op == "call_method"
    ]
    functions = [
        node.target.__name__
        for body in graphs
        for node in body.graph.nodes
        if node.op == "call_function"
    ]
    assert "addmm" in functions and not [
        name for name in (*methods, *functions) if name.endswith("_")
    ]


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_recomputes_the_same_mask(reentrant):
    t = make(Case((9,), 16, 24, 4, p=0.5))
    t.x.requires_grad_(), t.lora_a.requires_grad_()

    def block(x):
        seed = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64)
        return lora_linear(x, t.weight, t.bias, t.lora_a, t.lora_b, t.scaling, 0.5, seed)

    torch.manual_seed(5)
    expected = torch.autograd.grad(block(t.x), [t.x, t.lora_a], t.dy)
    torch.manual_seed(5)
    y = checkpoint(block, t.x, use_reentrant=reentrant)
    y.backward(t.dy)
    assert torch.equal(t.x.grad, expected[0]) and torch.equal(t.lora_a.grad, expected[1])


def test_functorch_transforms_use_the_composed_plan():
    t = make(Case((5,), 8, 6, 2))

    def loss(lora_b, x):
        return lora_linear(x, t.weight, t.bias, t.lora_a, lora_b, t.scaling).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(t.lora_b, t.x)
    t.lora_b.requires_grad_()
    (total,) = torch.autograd.grad(loss(t.lora_b, t.x), t.lora_b)
    torch.testing.assert_close(per_sample.sum(0), total)


def test_lora_update_adds_what_lora_linear_would():
    case = Case((2, 7), 16, 24, 4, p=0.3)
    t = make(case)
    base = torch.nn.functional.linear(t.x, t.weight, t.bias)
    got = linear.lora_update(base, t.x, t.lora_a, t.lora_b, t.scaling, 0.3, SEED)
    expected = lora_linear(t.x, t.weight, t.bias, t.lora_a, t.lora_b, t.scaling, 0.3, SEED)
    assert_close(got, expected, formula(*_double(t), 0.3, SEED))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.zeros(3, 6).int()}, "y: expected a floating-point dtype, got torch.int32"),
        (
            {"y": torch.zeros(3, 6).to(torch.float8_e5m2)},
            "y: expected a floating-point dtype, got torch.float8_e5m2",
        ),
        ({"x": torch.tensor(1.0)}, r"x: expected \(\.\.\., K\) for y \(3, 6\), got \(\)"),
        ({"x": torch.zeros(4, 8)}, r"x: expected \(\.\.\., K\) for y \(3, 6\), got \(4, 8\)"),
        ({"x": torch.zeros(8)}, r"x: expected \(\.\.\., K\) for y \(3, 6\), got \(8,\)"),
        ({"lora_a": torch.zeros(2, 5)}, r"lora_a: expected \(R, K=8\), got \(2, 5\)"),
        ({"lora_b": torch.zeros(6, 3)}, r"lora_b: expected \(N=6, R=2\), got \(6, 3\)"),
        ({"x": torch.zeros(3, 8, device="meta")}, "x: expected y's device cpu, got meta"),
        ({"lora_a": torch.zeros(2, 8, device="meta")}, "lora_a: expected y's device cpu, got meta"),
        ({"lora_b": torch.zeros(6, 2, device="meta")}, "lora_b: expected y's device cpu, got meta"),
    ],
)
def test_invalid_arguments_of_lora_update_are_named(change, message):
    arguments = {
        "y": torch.zeros(3, 6),
        "x": torch.zeros(3, 8),
        "lora_a": torch.zeros(2, 8),
        "lora_b": torch.zeros(6, 2),
    }
    with pytest.raises(ConfigError, match=message):
        linear.lora_update(**arguments | change, scaling=1.0)


def _double(t: Tensors):
    d = t.to(torch.float64)
    return d.x, d.weight, d.bias, d.lora_a, d.lora_b, d.scaling


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 5)}, r"x: expected \(\.\.\., K=16\), got \(3, 5\)"),
        ({"x": torch.tensor(1.0)}, r"x: expected \(\.\.\., K=16\), got \(\)"),
        (
            {"x": torch.zeros(3, 16).double()},
            "x: expected the weight's dtype torch.float32, got torch.float64",
        ),
        ({"x": torch.zeros(3, 16, device="meta")}, "x: expected the weight's device cpu, got meta"),
        ({"lora_a": torch.zeros(1, 5)}, r"lora_a: expected \(R, K=16\), got \(1, 5\)"),
        ({"lora_b": torch.zeros(16, 2)}, r"lora_b: expected \(N=16, R=1\), got \(16, 2\)"),
        ({"bias": torch.zeros(16, device="meta")}, "bias: expected x's device cpu, got meta"),
        (
            {"lora_a": torch.zeros(1, 16, device="meta")},
            "lora_a: expected x's device cpu, got meta",
        ),
        ({"bias": torch.zeros(3)}, r"bias: expected \(N=16,\), got \(3,\)"),
    ],
)
def test_invalid_arguments_are_named(change, message):
    t = make(CASES[0])
    arguments = {
        name: getattr(t, name) for name in ("x", "weight", "bias", "lora_a", "lora_b")
    } | change
    with pytest.raises(ConfigError, match=message):
        lora_linear(**arguments, scaling=1.0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_recomputed_weight_is_read_once_a_pass_and_not_saved(case):
    t, calls, saved = make(case), [], []
    x, lora_a, lora_b = (v.detach().requires_grad_() for v in (t.x, t.lora_a, t.lora_b))
    weight = t.weight.clone()
    arguments = (x, weight, t.bias, lora_a, lora_b, t.scaling, case.p, SEED)

    def recompute():
        calls.append(True)
        return t.weight.clone()

    with torch.autograd.graph.saved_tensors_hooks(lambda v: (saved.append(v), v)[1], lambda v: v):
        y = lora_linear(*arguments, recompute=recompute)
    assert not calls and all(v is not weight for v in saved)
    want = lora_linear(*arguments)
    got, wants = (torch.autograd.grad(out, (x, lora_a, lora_b), t.dy) for out in (y, want))
    assert len(calls) == 1 and all(map(torch.equal, (y, *got), (want, *wants)))


def test_a_recomputed_weight_that_does_not_fit_is_named():
    t = make(CASES[0])
    arguments = (t.x.requires_grad_(), t.weight, t.bias, t.lora_a, t.lora_b, 1.0)
    for found, message in (
        (t.weight[:3], r"recompute: expected \(16, 16\) in torch.float32, got \(3, 16\) in"),
        (t.weight.half(), r"torch.float32, got \(16, 16\) in torch.float16"),
    ):
        y = lora_linear(*arguments, recompute=lambda found=found: found)
        with pytest.raises(ConfigError, match=message):
            y.sum().backward()
    t.weight.requires_grad_()
    with pytest.raises(ConfigError, match="weight: expected no requires_grad, since recompute"):
        lora_linear(*arguments, recompute=t.weight.clone)


def test_a_forced_backend_that_cannot_run_raises_with_the_reason(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    t = make(CASES[0])
    with pytest.raises(
        BackendError, match="backend='triton' cannot run: torch runs this on the CPU"
    ):
        lora_linear(t.x, t.weight, t.bias, t.lora_a, t.lora_b, 1.0, backend="triton")
    with pytest.raises(
        ConfigError, match="backend: expected one of auto, torch, triton, got 'cuda'"
    ):
        lora_linear(t.x, t.weight, t.bias, t.lora_a, t.lora_b, 1.0, backend="cuda")


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_an_update_keeps_the_dtype_of_the_base_output_under_autocast(p):
    seed = torch.tensor(3) if p else None
    y, x = torch.randn(4, 6, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    a, b = torch.randn(2, 8, requires_grad=True), torch.randn(6, 2, requires_grad=True)
    want = linear.lora_update(y, x, a, b, 0.5, p, seed)
    wants = torch.autograd.grad(want.sin().sum(), [y, x, a, b])
    with torch.autocast("cpu", torch.bfloat16):
        got = linear.lora_update(y, x, a, b, 0.5, p, seed)
        with torch.no_grad():
            assert linear.lora_update(y, x, a, b, 0.5, p, seed).dtype == torch.float32
    assert torch.equal(got, want)
    for g, w in zip(torch.autograd.grad(got.sin().sum(), [y, x, a, b]), wants, strict=True):
        assert torch.equal(g, w)
