"""The kernels as torch operators: autograd, autocast, compilation, checkpointing, and on a GPU CUDA graphs and large sizes.

Without a GPU the tests that are not marked `gpu` run the kernels in Triton's interpreter.
"""

import copy
import dataclasses
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastlora import LoRALinear, fuse, lora_linear, unfuse
from fastlora.ops import dropout
from fastlora.ops.reference import Layer, LowRank
from tests.support.cases import Case, Member, Tensors, formula, make, run_group
from tests.support.tolerance import assert_close

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
SEED = torch.tensor(-1234567890123)
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
pytestmark = pytest.mark.usefixtures("bfloat16")


def _inputs(case: Case, dtype: torch.dtype = torch.float32) -> Tensors:
    t = make(case).to(dtype)
    moved = (
        None if v is None else v.to(DEVICE)
        for v in (t.x, t.weight, t.bias, t.lora_a, t.lora_b, t.dy)
    )
    return Tensors(*moved, t.scaling)


def _run(function, t: Tensors, p: float, **named) -> list[torch.Tensor]:
    x, a, b = (v.detach().requires_grad_() for v in (t.x, t.lora_a, t.lora_b))
    y = function(x, t.weight, t.bias, a, b, t.scaling, p, SEED, backend="triton", **named)
    return [y, *torch.autograd.grad(y, (x, a, b), t.dy)]


def _same(got, expected) -> None:
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_compile_fullgraph_is_one_graph_for_every_number_of_rows(backend, p):
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own compiler imports deprecated modules
        compiled = torch.compile(lora_linear, fullgraph=True, backend=backend, dynamic=True)
        graphs = torch._dynamo.utils.counters["stats"]
        before = None
        for rows in (9, 70, 33, 128):
            t = _inputs(Case((2, rows), 16, 24, 4, p=p))
            _same(_run(compiled, t, p), _run(lora_linear, t, p))
            before = graphs["unique_graphs"] if before is None else before
        assert graphs["unique_graphs"] == before, "another number of rows compiled another graph"


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_the_same_mask(reentrant):
    layer = LoRALinear(nn.Linear(16, 24), 4, dropout=0.5, backend="triton").to(DEVICE)
    nn.init.normal_(layer.lora_B)
    t = _inputs(Case((9,), 16, 24, 4))
    x = t.x.requires_grad_()
    results = []
    for run in (layer, lambda v: checkpoint(layer, v, use_reentrant=reentrant)):
        torch.manual_seed(5)
        results.append(torch.autograd.grad(run(x), (x, *layer.parameters()), t.dy, allow_unused=True)
                       if run is layer else _backward(run(x), x, layer, t.dy))  # fmt: skip
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def _backward(y, x, layer, dy):
    y.backward(dy)
    return [x.grad, *(p.grad for p in layer.parameters())]


@HALVES
def test_autocast_computes_in_its_dtype_and_leaves_float32_gradients(dtype):
    t = _inputs(Case((8,), 16, 24, 4, p=0.1))
    leaves = [v.requires_grad_() for v in (t.x, t.lora_a, t.lora_b)]
    with torch.autocast(DEVICE, dtype):
        y = lora_linear(
            t.x, t.weight, t.bias, t.lora_a, t.lora_b, t.scaling, 0.1, SEED, backend="triton"
        )
    half = _inputs(Case((8,), 16, 24, 4, p=0.1), dtype)
    assert y.dtype == dtype and torch.equal(y, _run(lora_linear, half, 0.1)[0])
    y.backward(t.dy.to(dtype))
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_saves_x_itself_s_and_a_seed(p):
    t = _inputs(Case((64,), 48, 32, 4))
    t.x.requires_grad_(), t.lora_a.requires_grad_(), t.lora_b.requires_grad_()
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: saved.append(v) or v, lambda v: v):
        lora_linear(t.x, t.weight, t.bias, t.lora_a, t.lora_b, 1.0, p, SEED, backend="triton")
    given = {v.untyped_storage().data_ptr() for v in (t.x, t.weight, t.lora_a, t.lora_b)}
    new = [v for v in saved if v.untyped_storage().data_ptr() not in given]
    assert sum(v.numel() * v.element_size() for v in new) == 64 * 4 * 4 + (8 if p else 0)


def test_double_backward_differentiates_the_gradients():
    t = _inputs(Case((5,), 8, 6, 2))

    def second(function, dtype=torch.float32, **named):
        x, a, b = (v.detach().to(dtype).requires_grad_() for v in (t.x, t.lora_a, t.lora_b))
        weight, bias = t.weight.to(dtype), t.bias.to(dtype)
        y = function(x, weight, bias, a, b, t.scaling, 0.25, SEED, **named)
        first = torch.autograd.grad(y.square().sum(), (x, a, b), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), (x, a, b))

    got = second(lora_linear, backend="triton")
    plain, exact = (second(formula, d, triton=True) for d in (torch.float32, torch.float64))
    for one, same, wide in zip(got, plain, exact, strict=True):
        assert_close(one, same, wide)


def test_a_trainable_base_gets_its_gradients():
    t = _inputs(Case((7,), 16, 24, 4))
    weight, bias = (v.detach().requires_grad_() for v in (t.weight, t.bias))
    results = []
    for backend in ("triton", "torch"):
        y = lora_linear(t.x, weight, bias, t.lora_a, t.lora_b, t.scaling, backend=backend)
        results.append(torch.autograd.grad(y, (weight, bias), t.dy))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    "wanted", [("x",), ("lora_a",), ("lora_b",), ("x", "lora_b"), ("lora_a", "lora_b")]
)
def test_each_gradient_is_the_same_alone_and_with_the_others(wanted):
    t = _inputs(Case((33,), 32, 24, 4))
    everything = dict(zip(("x", "lora_a", "lora_b"), _run(lora_linear, t, 0.2)[1:], strict=True))
    leaves = {name: getattr(t, name).detach().requires_grad_() for name in wanted}
    given = {name: getattr(t, name).detach() for name in ("x", "lora_a", "lora_b")} | leaves
    y = lora_linear(
        weight=t.weight, bias=t.bias, scaling=t.scaling, p=0.2, seed=SEED, backend="triton", **given
    )
    y.backward(t.dy)
    for name, leaf in leaves.items():
        assert leaf.grad.shape == leaf.shape
        torch.testing.assert_close(leaf.grad, everything[name])
    assert all(given[name].grad is None for name in given if name not in wanted)


def test_without_gradients_nothing_is_saved_and_the_result_is_the_same():
    t = _inputs(Case((7,), 16, 24, 4))
    arguments = (t.x, t.weight, t.bias, t.lora_a, t.lora_b, t.scaling)
    with torch.no_grad():
        y = lora_linear(*arguments, backend="triton")
    assert y.grad_fn is None
    t.lora_a.requires_grad_()
    assert torch.equal(y, lora_linear(*arguments, backend="triton"))


def test_one_x_under_q_k_and_v_gets_the_sum_of_their_gradients():
    t = _inputs(Case((33,), 32, 32, 4))
    x = t.x.requires_grad_()
    parts = []
    total = 0.0
    for scale in (1.0, 0.5, 0.25):
        y = lora_linear(x, t.weight, t.bias, t.lora_a, t.lora_b, scale, 0.2, SEED, backend="triton")
        parts.append(torch.autograd.grad(y, x, t.dy, retain_graph=True)[0])
        total = total + y
    (together,) = torch.autograd.grad(total, x, t.dy)
    torch.testing.assert_close(together, sum(parts))


def test_a_model_trains_as_by_the_reference(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 40), nn.GELU(), nn.Linear(40, 5)).to(DEVICE)
    x, target = torch.randn(30, 12, device=DEVICE), torch.randn(30, 5, device=DEVICE)

    def losses():
        wrapped = copy.deepcopy(model)
        for index in (0, 2):
            torch.manual_seed(index)
            wrapped[index] = LoRALinear(wrapped[index], 4, dropout=0.1, backend="triton").to(DEVICE)
        optimizer = torch.optim.AdamW(
            [p for n, p in wrapped.named_parameters() if "lora" in n], lr=1e-2
        )
        torch.manual_seed(7)
        history = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(wrapped(x), target)
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        return history

    kernels = losses()
    monkeypatch.setattr(
        "fastlora.layers.linear.lora_linear", lambda *a, backend: formula(*a, triton=True)
    )
    assert kernels == pytest.approx(losses(), rel=1e-5) and kernels[-1] < kernels[0]


@pytest.mark.slow
@pytest.mark.parametrize(("plan", "rows"), [("split", 200), ("split", 2100), ("decode", 7)])
def test_overlapping_launches_change_no_bit(plan, rows, monkeypatch):
    """On a device thirty times, with NaN in the memory that S, dS and the mask reuse; the interpreter runs launches one by one."""
    from fastlora.ops import dispatch
    from fastlora.ops.triton import linear as triton_linear

    if not GPU and rows > 1000:
        pytest.skip("one size is enough for the interpreter")
    dtype = torch.bfloat16 if GPU else torch.float32
    t = _inputs(Case((rows,), 256, 384, 8, p=0.1), dtype)
    choose, recorded = dispatch.launch_choice, False

    def launch_choice(*arguments):
        choice = choose(*arguments)
        if not recorded:
            return choice
        return dataclasses.replace(choice, config=choice.config.overlapped())

    monkeypatch.setattr(dispatch, "launch_choice", launch_choice)

    def step():
        low = LowRank(t.lora_a, t.lora_b, t.scaling, 0.1, SEED.to(DEVICE))
        y, s = triton_linear._forward(t.x, t.weight, t.bias, *low, plan)
        needs, dx_plan = (True, True, True), plan if plan == "split" else None
        return [y, s, *triton_linear._backward(t.dy, t.x, t.weight, s, *low, *needs, dx_plan)]

    apart = step()
    recorded = True
    for _ in range(30 if GPU else 1):
        corrupted = [torch.full_like(one, float("nan")) for one in apart]
        del corrupted  # their memory is reused
        _same(step(), apart)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_a_cuda_graph_replays_forward_and_backward(dtype, p):
    layer = LoRALinear(nn.Linear(256, 384, dtype=dtype), 8, dropout=p, backend="triton").cuda()
    nn.init.normal_(layer.lora_B, std=0.1)
    x = torch.randn(512, 256, dtype=dtype, device="cuda", requires_grad=True)
    dy = torch.randn(512, 384, dtype=dtype, device="cuda")
    parameters = (x, layer.lora_A, layer.lora_B)

    def step():
        y = layer(x)
        return (y, *torch.autograd.grad(y, parameters, dy))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    outputs = []
    for _ in range(2):  # x is the same each time, so only a mask can differ
        graph.replay()
        outputs.append(captured[0].clone())
        if p == 0:
            _same(captured, step())
    assert torch.equal(*outputs) == (p == 0)
    with torch.no_grad():
        x.normal_()
    graph.replay()
    if p == 0:
        _same(captured, step())


@pytest.mark.gpu
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_inductor_gives_the_eager_result(p):
    t = _inputs(Case((64,), 128, 96, 8, p=p), torch.bfloat16)
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _same(_run(torch.compile(lora_linear, fullgraph=True), t, p), _run(lora_linear, t, p))


@pytest.mark.gpu
@pytest.mark.parametrize("plan", ["split", "in_place"])
def test_offsets_beyond_32_bits(plan):
    """x has more than 2³¹ elements: its last rows must be as in a separate call."""
    from fastlora.ops.triton import linear as triton_linear

    m, k, n, r = 2**31 // 4096 + 1024, 4096, 64, 8
    x = torch.randn(1024, k, dtype=torch.bfloat16, device="cuda").repeat(m // 1024 + 1, 1)[:m]
    weight = torch.randn(n, k, dtype=torch.bfloat16, device="cuda") / 64
    a = torch.randn(r, k, dtype=torch.bfloat16, device="cuda") / 64
    b = torch.randn(n, r, dtype=torch.bfloat16, device="cuda")
    low = LowRank(a, b, 1.0, 0.1, SEED.cuda())
    y, s = triton_linear._forward(x, weight, None, *low, plan)
    dy = torch.zeros(m, n, dtype=torch.bfloat16, device="cuda")
    dy[-128:] = torch.randn(128, n, device="cuda")
    dx, da, _ = triton_linear._backward(dy, x, weight, s, *low, True, True, True, plan)
    tail = slice(m - 128, m)
    keep = dropout.kernel_mask(SEED, 0.1, 128, k, first_row=m - 128).cuda()
    kept = torch.where(keep, x[tail], 0.0) * dropout.keep_scale(0.1)

    def formula(dtype):
        s = kept.to(dtype) @ a.to(dtype).T
        y = x[tail].to(dtype) @ weight.to(dtype).T + s @ b.to(dtype).T
        ds = dy[tail].to(dtype) @ b.to(dtype)
        dx = torch.where(keep, ds @ a.to(dtype), 0.0) * dropout.keep_scale(0.1)
        return y, dx + dy[tail].to(dtype) @ weight.to(dtype), ds.T @ kept.to(dtype)

    for got, same, exact in zip(
        (y[tail], dx[tail], da), formula(torch.bfloat16), formula(torch.float64), strict=True
    ):
        assert_close(got, same, exact)


def _group(dtype=torch.float32):
    """x (2, 35, 32), three layers on it of different widths and ranks, the second without a bias, and gradients of the outputs."""
    tensors = [
        _inputs(Case((2, 35), 32, n, r, bias=r != 8), dtype) for n, r in ((24, 4), (40, 8), (48, 3))
    ]
    members = [
        Member(t.weight, t.bias, t.lora_a, t.lora_b, scaling)
        for t, scaling in zip(tensors, (1.75, 1.75, 0.5), strict=True)
    ]
    return tensors[0].x, members, [t.dy for t in tensors]


def _group_step(function, x, members, dys):
    """[y of each member], and the gradients of x and of every lora_a and lora_b."""
    x = x.detach().requires_grad_()
    members = [m._replace(lora_a=_leaf(m.lora_a), lora_b=_leaf(m.lora_b)) for m in members]
    ys = function(x, members)
    leaves = [x] + [t for m in members for t in (m.lora_a, m.lora_b)]
    used = [i for i, dy in enumerate(dys) if dy is not None]
    gradients = torch.autograd.grad(
        [ys[i] for i in used], leaves, [dys[i] for i in used], allow_unused=True
    )
    return ys, gradients


def _leaf(tensor):
    return tensor.detach().requires_grad_()


@pytest.mark.parametrize("unused", [None, 0, 2])
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_a_group_equals_its_separate_layers(p, unused):
    _check_group(p, unused)


def _force(plan, monkeypatch):
    """Every call takes this plan, forward and for dx."""
    from fastlora.ops import dispatch

    choose = dispatch.launch_choice

    def launch_choice(x, weight, rank, dropout, _=None, dy=None):
        return choose(x, weight, rank, dropout, plan, dy)

    monkeypatch.setattr(dispatch, "launch_choice", launch_choice)


@pytest.mark.parametrize("plan", ["split", "accumulate", "in_place"])
def test_a_group_equals_its_separate_layers_under_every_plan(plan, monkeypatch):
    _force(plan, monkeypatch)
    _check_group(0.25, None)


@HALVES
def test_a_group_equals_its_separate_layers_in_16_bits(dtype):
    _check_group(0.25, None, dtype)


@pytest.mark.parametrize("plan", ["split", "accumulate", "in_place"])
def test_a_group_computes_no_dx_that_is_not_needed(plan, monkeypatch):
    from fastlora.ops.triton import group as triton_group

    _force(plan, monkeypatch)
    x, members, dys = _group()
    rows = x.flatten(0, -2)
    layers = [Layer(m.weight, m.bias, LowRank(m.lora_a, m.lora_b, m.scaling)) for m in members]
    _, s = triton_group.group_forward(rows, layers)
    dys = [dy.flatten(0, -2) for dy in dys]
    dx, das, dbs = triton_group.group_backward(dys, rows, layers, s, (False, True), [False] * 3)
    assert dx is None and dbs == [None] * 3
    assert [da.shape for da in das] == [m.lora_a.shape for m in members]


def _check_group(p, unused, dtype=torch.float32):
    x, members, dys = _group(dtype)
    if unused is not None:
        dys[unused] = None

    def alone(x, members):
        return [formula(x, *m, p, SEED, triton=True) for m in members]

    got = _group_step(
        lambda x, members: run_group(x, members, p, SEED, triton=True), x, members, dys
    )
    same = _group_step(alone, x, members, dys)
    wide = [
        Member(*(None if t is None else t.double() for t in _tensors(m)), m.scaling)
        for m in members
    ]
    exact = _group_step(alone, x.double(), wide, [None if d is None else d.double() for d in dys])
    for part, one, reference64 in zip(got, same, exact, strict=True):
        for a, b, c in zip(part, one, reference64, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert_close(a, b, c)
    y = got[0][0]
    y.mul_(2)  # an output is not a view


def _tensors(member):
    return member.weight, member.bias, member.lora_a, member.lora_b


@pytest.mark.parametrize("frozen", ["x", "lora_a", "lora_b"])
def test_a_group_computes_only_requested_gradients(frozen):
    x, members, dys = _group()
    all_gradients = _group_step(
        lambda x, members: run_group(x, members, 0.25, SEED, triton=True), x, members, dys
    )[1]

    def run(x, members):
        if frozen == "x":
            x = x.detach()
        else:
            members = [m._replace(**{frozen: getattr(m, frozen).detach()}) for m in members]
        return run_group(x, members, 0.25, SEED, triton=True)

    names = ["x"] + ["lora_a", "lora_b"] * 3
    for name, got, expected in zip(
        names, _group_step(run, x, members, dys)[1], all_gradients, strict=True
    ):
        if name == frozen:
            assert got is None
        else:
            torch.testing.assert_close(got, expected)


def _projections(ranks, backend="triton", dropout=0.25):
    model = nn.ModuleDict({name: nn.Linear(32, 48) for name in "qkv"}).to(DEVICE)
    for name, rank in zip("qkv", ranks, strict=True):
        layer = LoRALinear(model[name], rank, dropout=dropout, backend=backend).to(DEVICE)
        model[name] = layer
        nn.init.normal_(layer.lora_B)

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = model

        def forward(self, x):
            return [part(x) for part in self.parts.values()]

    return Attention()


@pytest.mark.parametrize(
    ("rows", "ranks", "passes"),
    [(70, (4, 4, 4), (1, 1)), (70, (100, 100, 57), (3, 3)), (8, (4, 4, 4), (0, 3))],
    ids=["one pass over x", "too many ranks", "decode"],
)
def test_a_fused_model_launches_one_pass_over_x(rows, ranks, passes, monkeypatch):
    from fastlora.ops.triton import group as triton_group
    from fastlora.ops.triton import linear as triton_linear

    counts = {"down_project": 0, "start": 0, "x_pass": 0}

    def counted(name, original):
        def call(*args, **named):
            counts[name] += 1
            return original(*args, **named)

        return call

    for name in counts:
        monkeypatch.setattr(triton_linear, name, counted(name, getattr(triton_linear, name)))
    monkeypatch.setattr(triton_group, "repeat", lambda choices, settings, inputs, run: run())
    monkeypatch.setattr(triton_linear, "repeat", lambda choices, settings, inputs, run: run())
    model = _projections(ranks)
    x = torch.randn(rows, 32, device=DEVICE)
    assert len(fuse(model, x).groups) == 1
    counts.update(dict.fromkeys(counts, 0))
    sum(y.sum() for y in model(x)).backward()
    assert (counts["down_project"] + counts["start"], counts["x_pass"]) == passes


def test_a_groups_mask_is_computed_once():
    model = _projections((4, 4, 4), dropout=0.5)
    x = torch.randn(70, 32, device=DEVICE)
    fuse(model, x)
    for part in list(model.parts.values())[1:]:
        part.load_state_dict(model.parts["q"].state_dict())
    q, k, v = model(x)
    assert torch.equal(q, k) and torch.equal(k, v)
    unfuse(model)
    q, k, _ = model(x)
    assert not torch.equal(q, k)
