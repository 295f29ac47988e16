"""Repeated calls: what they compute, when a call is not the repetition of an earlier one, and what a recording keeps."""

import gc
import itertools
import threading
import weakref

import pytest
import torch

from fastlora.kernels import native, recording
from fastlora.kernels.config import DY_RANK
from fastlora.kernels.recording import Recorder, empty, library, repeat
from fastlora.kernels.steps import Address, Descriptor
from fastlora.ops import dispatch
from fastlora.ops.dispatch import TRITON_PLANS
from fastlora.ops.reference import Layer, LowRank
from fastlora.ops.triton import group as triton_group
from fastlora.ops.triton import linear as triton_linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
M, K, N = 40, 48, 32


def _tensors(rank=4, adapters=torch.float32, dtype=torch.float16, rows=M, drops=True, bias=True):
    """x, weight, bias, lora_a, lora_b and a seed, new ones at each call."""
    shapes = (rows, K), (N, K), (N,), (rank, K), (N, rank)
    x, weight, b, *factors = (torch.randn(shape, device=DEVICE) for shape in shapes)
    seed = torch.randint(2**62, (), device=DEVICE) if drops else None
    one = [t.to(adapters) for t in factors]
    return [x.to(dtype), weight.to(dtype), b.to(dtype) if bias else None, *one, seed]


def _call(tensors, plan=None, needs=(True, True, True), scaling=0.5, p=0.25):
    """y, S and the gradients by the operators."""
    x, weight, bias, a, b, seed = tensors
    y, s = triton_linear._forward(x, weight, bias, a, b, scaling, p, seed, plan)
    dy = torch.ones_like(y) + y
    return [y, s, *triton_linear._backward(dy, x, weight, s, a, b, scaling, p, seed, *needs, plan)]


def _unrecorded(*arguments, **named):
    """`_call` without repetitions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_linear, "repeat", lambda choices, settings, inputs, run: run())
        return _call(*arguments, **named)


def _assert_same(got, expected):
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype and one.stride() == other.stride()
        assert torch.equal(one, other)


@pytest.fixture
def launches(monkeypatch):
    """The names of the passes that Python launches; a repeated call launches none by name."""
    names: list[str] = []
    for name in ("decode", "down_project", "start", "rank_gemm", "dy_pass", "x_pass"):
        function = getattr(triton_linear, name)

        def spy(*arguments, _name=name, _function=function, **named):
            names.append(_name)
            return _function(*arguments, **named)

        monkeypatch.setattr(triton_linear, name, spy)
    return names


@pytest.mark.parametrize("rank", [4, DY_RANK + 8])
@pytest.mark.parametrize("plan", TRITON_PLANS)
def test_a_repeated_call_computes_what_the_first_did_with_its_own_tensors(plan, rank, launches):
    drops = plan != "fused"
    for adapters in (torch.float32, torch.float16):
        for number in range(4):
            tensors = _tensors(rank, adapters, drops=drops)
            launches.clear()
            got = _call(tensors, plan)
            assert bool(launches) == (number < 2), "the third call repeats the second"
            _assert_same(got, _unrecorded(tensors, plan))


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3)), ids=str)
def test_gradients_that_are_not_needed_are_not_repeated(needs, launches):
    for _ in range(3):
        tensors = _tensors()
        launches.clear()
        got = _call(tensors, "split", needs)
        _assert_same(got, _unrecorded(tensors, "split", needs))
    assert len(got) == 2 + sum(needs)


def _group(scalings=(0.5, 0.5, 0.5), needs=(True, True), needs_b=(True, True, True), rank=4):
    """The results of a group of three layers, and of the same group without repetitions."""
    x, seed = torch.randn(M, K, device=DEVICE).half(), torch.tensor(7, device=DEVICE)
    layers = []
    for scaling in scalings:
        _, weight, bias, a, b, _ = _tensors(rank)
        layers.append(Layer(weight, bias, LowRank(a, b, scaling, 0.25, seed)))

    def run():
        y, s = triton_group.group_forward(x, layers)
        dys = [torch.ones_like(one) + one for one in y]
        dx, das, dbs = triton_group.group_backward(dys, x, layers, s, needs, needs_b)
        return [t for t in (*y, *s, dx, *das, *dbs) if t is not None]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_group, "repeat", lambda choices, settings, inputs, run: run())
        expected = run()
    return run, expected


@pytest.mark.parametrize(
    "named",
    [
        {},
        {"scalings": (0.5, 1.0, 0.25)},
        {"needs": (False, True)},
        {"needs": (True, False), "needs_b": (False, False, False)},
        {"needs": (False, False), "needs_b": (False, True, False)},
        {"rank": DY_RANK + 8},
    ],
    ids=str,
)
def test_a_repeated_group_computes_what_the_first_did(named, launches):
    for number in range(4):
        run, expected = _group(**named)
        launches.clear()
        _assert_same(run(), expected)
        assert bool(launches) == (number < 2), "the third call repeats the second"


def test_a_group_with_other_factors_or_needs_is_not_a_repetition(launches):
    for _ in range(3):
        _group()[0]()
    for named in (
        {"scalings": (0.5, 1.0, 0.25)},
        {"needs": (False, True)},
        {"needs_b": (True, False, True)},
    ):
        run, expected = _group(**named)
        launches.clear()
        _assert_same(run(), expected)
        assert launches


def _shifted(t: torch.Tensor) -> torch.Tensor:
    """The same values at an address that is no multiple of 16."""
    room = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
    return room[1:].view(t.shape).copy_(t)


CHANGES = {
    "rows": lambda t: _tensors(rows=M + 3),
    "rank": lambda t: _tensors(rank=6),
    "no bias": lambda t: _tensors(bias=False),
    "no dropout": lambda t: _tensors(drops=False),
    "dtype": lambda t: _tensors(dtype=torch.float32),
    "adapters": lambda t: _tensors(adapters=torch.float16),
    "strides": lambda t: [t[0].T.contiguous().T, *t[1:]],
    "address of x": lambda t: [_shifted(t[0]), *t[1:]],
    "address of W": lambda t: [t[0], _shifted(t[1]), *t[2:]],
    "address of A": lambda t: [*t[:3], _shifted(t[3]), *t[4:]],
    "strided bias": lambda t: [*t[:2], t[2].repeat_interleave(2)[::2], *t[3:]],
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_call_of_another_form_is_not_a_repetition(change, launches):
    for _ in range(3):
        _call(_tensors(), "split")
    other = CHANGES[change](_tensors())
    launches.clear()
    got = _call(other, "split")
    assert launches
    _assert_same(got, _unrecorded(other, "split"))


@pytest.mark.parametrize("named", [{"scaling": 0.75}, {"p": 0.5}, {"plan": "in_place"}], ids=str)
def test_other_settings_are_not_a_repetition(named, launches):
    for _ in range(3):
        _call(_tensors(), plan="split")
    tensors = _tensors()
    launches.clear()
    arguments = {"plan": "split"} | named
    got = _call(tensors, **arguments)
    assert launches
    _assert_same(got, _unrecorded(tensors, **arguments))


def test_another_choice_is_not_a_repetition(monkeypatch, launches):
    for _ in range(3):
        _call(_tensors())
    choose = dispatch.launch_choice
    monkeypatch.setattr(
        dispatch, "launch_choice", lambda *args: choose(*args[:4], "in_place", *args[5:])
    )
    tensors = _tensors()
    launches.clear()
    got = _call(tensors)
    assert "down_project" in launches
    _assert_same(got, _unrecorded(tensors))


def test_a_call_with_two_tensors_at_one_address_is_repeated(launches):
    for number in range(4):
        x, weight, bias, a, _, seed = _tensors(rank=N)
        tensors = [x, weight, bias, a, a[:, :N].T, seed]  # B at the address of A
        launches.clear()
        got = _call(tensors, "split")
        assert bool(launches) == (number < 2)
        _assert_same(got, _unrecorded(tensors, "split"))


def test_tensors_that_were_at_one_address_are_told_apart_in_later_calls():
    x, y, z = (torch.full((3,), value) for value in (1.0, 10.0, 100.0))
    for inputs in [(x, x, z), (x, y, x), (x, y, y), (x, y, z), (x, x, x)]:
        for _ in range(3):

            def run(inputs=inputs):
                one, two, three = inputs
                return [library(torch.sub, library(torch.sub, one, two), three)]

            (result,) = repeat(["choice"], (), inputs, run)
            assert torch.equal(result, inputs[0] - inputs[1] - inputs[2])


def test_a_recording_keeps_no_tensor():
    references = []
    for _ in range(4):
        tensors = _tensors()
        results = _call(tensors, "split")
        references += [weakref.ref(t) for t in (*tensors, *results)]
    del tensors, results
    gc.collect()
    assert [r() for r in references if r() is not None] == []


def test_threads_record_beside_each_other():
    """Each thread has a recorder of its own: a step of one call is none of another's."""
    meeting, failures, recorders = threading.Barrier(2), [], {2.0: [], 3.0: []}

    def work(factor: float) -> None:
        def run(x):
            meeting.wait(60)
            recorders[factor].append(recording.active())
            y = library(lambda t: factor * t, x)
            meeting.wait(60)
            return [library(torch.Tensor.copy_, empty(3, dtype=x.dtype, device=x.device), y)]

        for number in range(4):
            x = torch.full((3,), float(number))
            (y,) = repeat(["choice"], factor, (x,), lambda x=x: run(x))
            failures.extend([] if torch.equal(y, factor * x) else [(factor, number, y)])

    threads = [threading.Thread(target=work, args=(factor,)) for factor in (2.0, 3.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    (first, one), (other, two) = recorders.values()  # the second call is recorded
    assert first is other is None and one is not None and two not in (None, one)


@pytest.mark.parametrize("form", ["contiguous", "transposed", "double"])
def test_outputs_are_contiguous_and_have_their_dtype_whatever_the_inputs_form(form):
    """An output of the shape of an input is allocated like it only if that gives what `empty` gave."""
    for number in range(4):
        x = torch.arange(9.0).reshape(3, 3) + number
        x = {"contiguous": x, "transposed": x.T, "double": x.double()}[form]

        def run(x=x):
            y = empty(3, 3, dtype=torch.float32, device=x.device)
            return [library(torch.Tensor.copy_, y, x)]

        (y,) = repeat(["choice"], (), (x,), run)
        assert y.dtype == torch.float32 and y.stride() == (3, 1) and torch.equal(y, x.float())
        assert y.data_ptr() != x.data_ptr()


def test_a_tensor_of_unknown_origin_is_never_repeated():
    calls = []

    def run():
        calls.append(1)
        made = torch.zeros(3)  # not by `empty`
        return [library(torch.Tensor.add_, empty(3, dtype=x.dtype, device=x.device).zero_(), made)]

    for number in range(4):
        x = torch.ones(3)
        repeat(["choice"], (), (x,), run)
        assert len(calls) == number + 1


def test_torchs_operations_are_repeated_in_order():
    def run(x):
        y = empty(3, dtype=x.dtype, device=x.device)
        y = library(torch.Tensor.copy_, y, x)
        z = library(torch.add, x, y)
        return [library(torch.Tensor.mul_, z, y), y]

    for number in range(4):
        x = torch.full((3,), float(number))
        z, y = repeat(["choice"], (), (x,), lambda x=x: run(x))
        assert torch.equal(y, x) and torch.equal(z, 2 * x * x)


def columns_of(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return torch.cat([one, other]).contiguous()


def test_torchs_operations_take_views():
    runs = []

    def run(x):
        runs.append(x)
        y = empty(2, 3, dtype=x.dtype, device=x.device)
        y = library(torch.Tensor.copy_, y, x)
        return [library(torch.sub, y[1], y[0]), library(columns_of, y.T[1:], x.T)]

    for _ in range(4):
        x = torch.randn(2, 3)
        difference, total = repeat(["choice"], (), (x,), lambda x=x: run(x))
        assert torch.equal(difference, x[1] - x[0]) and torch.equal(total, columns_of(x.T[1:], x.T))
    assert len(runs) == 2


def test_a_missing_input_is_not_the_next_one():
    def run(x, one, other):
        return [library(torch.neg, x if one is None else one)]

    x, y = torch.ones(3), torch.full((3,), 5.0)
    for inputs in [(x, None, y)] * 3 + [(x, y, None)] * 3:
        (result,) = repeat(["choice"], (), inputs, lambda inputs=inputs: run(*inputs))
        assert torch.equal(result, -(x if inputs[1] is None else y))


def test_old_recordings_are_forgotten(monkeypatch):
    monkeypatch.setattr(recording, "_MOST", 5)
    for size in range(1, 20):
        for _ in range(3):
            x = torch.ones(size)
            (y,) = repeat(["choice"], (), (x,), lambda x=x: [library(torch.neg, x)])
            assert torch.equal(y, -x)
        assert len(recording._recordings) <= 5


def test_calls_that_come_once_do_not_displace_recordings(monkeypatch):
    monkeypatch.setattr(recording, "_MOST", 5)
    calls = []

    def call(size):
        x = torch.ones(size)

        def run():
            calls.append(size)
            return [library(torch.neg, x)]

        (y,) = repeat(["choice"], (), (x,), run)
        assert torch.equal(y, -x)

    for size in (3, 3, *range(10, 40), 3):
        call(size)
        assert len(recording._seen) <= 5
    assert calls.count(3) == 2


def _noted(sizes, steps):
    """A recorder of launches on arrays of `sizes` bytes; steps: the arrays that each launch uses."""
    recorder = Recorder([torch.zeros(1)])
    made = [torch.empty(size, dtype=torch.uint8) for size in sizes]
    for one in made:
        recorder.empty(one)
    for used in steps:
        recorder.kernel(lambda values: None, [made[i] for i in used], interpreted=False)
    return recorder


def test_arrays_share_the_workspace_only_if_no_two_steps_need_them_together():
    generator = torch.Generator().manual_seed(1)

    def pick(most, count):
        return torch.randint(0, most, (count,), generator=generator).tolist()

    for _ in range(50):
        sizes = [1 + size for size in pick(5000, 6)]
        steps = [sorted({*pick(6, 2)}) for _ in range(8)]
        recorder = _noted(sizes, steps)
        offsets, total = recorder._pack({i + 1: size for i, size in enumerate(sizes)})
        lives = {
            i: [n for n, used in enumerate(steps) if i in used]
            for i in range(6)
            if i + 1 in offsets
        }
        for one, other in itertools.combinations(lives, 2):
            together = min(lives[one][-1], lives[other][-1]) >= max(lives[one][0], lives[other][0])
            first, second = offsets[one + 1], offsets[other + 1]
            apart = first + sizes[one] <= second or second + sizes[other] <= first
            assert apart or not together
        assert all(offset % 256 == 0 for offset in offsets.values())
        assert all(offsets[i + 1] + sizes[i] <= total for i in lives)


def test_arrays_that_follow_each_other_share_their_memory():
    recorder = _noted([1024, 1024, 1024], [(0,), (0, 1), (1, 2), (2,)])
    assert recorder._pack({1: 1024, 2: 1024, 3: 1024}) == ({1: 0, 2: 1024, 3: 0}, 2048)


def test_triton_encodes_our_descriptors(monkeypatch):
    """Triton's launcher reads attributes of a descriptor; which ones depends on its version."""
    from triton.runtime.driver import driver

    seen = []

    class Utils:
        def __getattr__(self, name):
            return lambda *arguments: seen.append(arguments) or "map"

    monkeypatch.setattr(driver, "_active", type("Active", (), {"utils": Utils()})())
    x = torch.zeros(64, 32, dtype=torch.float16)
    metadata = {
        "swizzle": 3,
        "elem_size": 2,
        "elem_type": 6,
        "block_size": [16, 32],
        "fp4_padded": False,
    }
    for described in (
        Descriptor(x, (16, 32)),
        Descriptor(Address(4096), (16, 32), (64, 32), (32, 1)),
    ):
        assert [*native._described(described, metadata)] == ["map", 64, 32, 32, 1]
    assert seen[0][0] == x.data_ptr() and seen[1][0] == 4096
    assert seen[0][1:] == seen[1][1:]
