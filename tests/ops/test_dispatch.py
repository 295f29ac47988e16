"""The choice of backend, plan and tiles: `explain` must show what runs, and why."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from fastlora import BackendError, ConfigError, LoRALinear, explain
from fastlora.kernels.config import ARCHITECTURES, DY_RANK, Problem, architecture, rank_block, tiles
from fastlora.ops import cost, dispatch, tuning_file
from fastlora.ops.reference import LowRank
from fastlora.ops.triton import linear as triton_linear
from tests.support.cases import CASES, Case, make
from tests.support.paths import ROOT
from tests.support.processes import TIME_LIMIT_S

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# What each plan launches, in order, and the name of its tiles in the configuration.
FORWARD = {
    "fused": [("rank_gemm", "fused")],
    "split": [("down_project", "down"), ("rank_gemm", "split")],
    "accumulate": [("start", "start")],
    "in_place": [("down_project", "down"), ("rank_update_", "update")],
    "decode": [("decode", "decode")],
}
BACKWARD = {
    "split": [("x_pass", "x"), ("rank_gemm", "dx")],
    "accumulate": [("x_pass", "x")],
    "in_place": [("x_pass", "x"), ("rank_update_", "update")],
}


def _spy(monkeypatch) -> list[tuple[str, object]]:
    """Every kernel launcher that the operators call from now on, with the tiles it was given."""
    launched: list[tuple[str, object]] = []
    names = ("decode", "down_project", "start", "rank_gemm", "rank_update_", "dy_pass", "x_pass")
    for name in (*names, "mask_pass"):
        function = getattr(triton_linear, name)

        def spy(*arguments, _name=name, _function=function, **named):
            named_configs = ("GemmConfig", "PassConfig")
            (config,) = [a for a in arguments if type(a).__name__ in named_configs] or [None]
            launched.append((_name, config))
            return _function(*arguments, **named)

        monkeypatch.setattr(triton_linear, name, spy)
    return launched


def _layer(case: Case, backend: str) -> tuple[LoRALinear, torch.Tensor, torch.Tensor]:
    t = make(case)
    layer = LoRALinear(
        nn.Linear(case.k, case.n, bias=case.bias), case.rank, dropout=case.p, backend=backend
    )
    return layer.to(DEVICE), t.x.to(DEVICE), t.dy.to(DEVICE)


@pytest.mark.filterwarnings("ignore:Initializing zero-element:UserWarning")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_explain_shows_what_runs_on_triton(case, training, monkeypatch):
    layer, x, dy = _layer(case, "triton")
    layer.train(training)
    if case.empty:
        with pytest.raises(BackendError, match="an empty tensor has nothing to launch"):
            explain(layer, x)
        return
    choice = explain(layer, x)
    launched = _spy(monkeypatch)
    y = layer(x.requires_grad_())
    expected = [(name, getattr(choice.config, field)) for name, field in FORWARD[choice.plan]]
    assert choice.backend == "triton" and launched == expected
    launched.clear()
    y.backward(dy)
    expected = [(name, getattr(choice.config, field)) for name, field in BACKWARD[choice.dx_plan]]
    # Above DY_RANK cuBLAS computes dS and dB, so the mask needs a kernel of its own.
    first = ("dy_pass", choice.config.dy) if case.rank <= DY_RANK else ("mask_pass", None)
    assert launched == [first, *expected]


@pytest.mark.filterwarnings("ignore:Initializing zero-element:UserWarning")
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_explain_shows_what_runs_on_torch(case, backend, monkeypatch):
    if GPU and backend == "auto":
        pytest.skip("auto is Triton here")
    layer, x, dy = _layer(case, backend)
    choice = explain(layer, x)
    launched = _spy(monkeypatch)
    layer(x).backward(dy)
    assert (choice.backend, choice.plan) == ("torch", "in_place") and launched == []
    assert choice.config is None and choice.dx_plan is None


def _forced(x, rank=4, **named):
    return dispatch.choose(
        x, torch.zeros(8, x.shape[-1], dtype=x.dtype), rank, backend="triton", **named
    )


@pytest.mark.skipif(GPU, reason="reasons of the interpreter")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(3, 16).double()}, "no kernel for torch.float64"),
        ({"x": torch.zeros(3, 16).bfloat16()}, "interpreter multiplies bfloat16 wrongly"),
        ({"x": torch.zeros(3, 16), "rank": 257}, "rank 257 is above 256"),
        ({"x": torch.zeros(0, 16)}, "an empty tensor has nothing to launch"),
        ({"x": torch.zeros(3, 16, device="meta")}, "the device is neither a CPU nor CUDA"),
        ({"x": torch.zeros(3, 16), "plain_base": False}, "hooks or a custom forward"),
    ],
)
def test_a_forced_triton_that_cannot_run_raises_with_the_reason(arguments, message):
    with pytest.raises(BackendError, match=f"backend='triton' cannot run: .*{message}"):
        _forced(**arguments)


@pytest.mark.skipif(GPU, reason="pretends that the CPU is the device")
def test_what_has_no_kernel_runs_on_torch_with_the_reason(monkeypatch):
    x, weight = torch.zeros(3, 16), torch.zeros(8, 16)
    monkeypatch.setattr(dispatch, "device_architecture", lambda device: None)
    monkeypatch.setattr(dispatch, "_capability", lambda device: (7, 5))
    choice = dispatch.launch_choice(x, weight, 4, False)
    assert choice.backend == "torch" and "compute capability (7, 5)" in choice.reason
    monkeypatch.setattr(dispatch, "_HAS_TRITON", False)
    with pytest.raises(BackendError, match=r"needs Triton 3\.4 or newer"):
        _forced(x)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_operators_compute_the_same_where_there_is_no_kernel(p, monkeypatch):
    """Under torch.compile the operator is chosen before the device's generation is known."""
    case = Case((9,), 16, 24, 4, p=p)
    t = make(case)
    x, weight, bias, lora_a, lora_b, dy = (
        v.to(DEVICE) for v in (t.x, t.weight, t.bias, t.lora_a, t.lora_b, t.dy)
    )
    seed = torch.tensor(5) if p else None
    low = LowRank(lora_a, lora_b, 2.0, p, seed)

    def run():
        y, s = triton_linear._forward(x, weight, bias, *low)
        return [y, s, *triton_linear._backward(dy, x, weight, s, *low, True, True, True)]

    kernels = run()
    monkeypatch.setattr(
        dispatch, "launch_choice", lambda *a, **k: dispatch.Choice("torch", "in_place", "none")
    )
    for one, other in zip(kernels, run(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_tensor_subclass_keeps_its_own_operators():
    class Own(torch.Tensor):
        pass

    with pytest.raises(BackendError, match="a tensor subclass"):
        _forced(torch.zeros(3, 16).as_subclass(Own))


@pytest.mark.parametrize("m", [1, 15, 16, 17, 32, 33, 63, 64, 65, 1000, 8191, 8192, 100_003])
def test_rows_are_rounded_up_to_few_sizes(m):
    rounded = dispatch.bucket(m)
    assert m <= rounded < 1.125 * m + 1 and dispatch.bucket(rounded) == rounded
    assert (rounded <= 64) == (m <= 64) and (rounded <= 32) == (m <= 32)


def test_triton_is_found_under_both_names(monkeypatch):
    def version(name):
        if name == "pytorch-triton":
            return "3.6.0+git1"
        raise tuning_file.PackageNotFoundError(name)

    monkeypatch.setattr(tuning_file, "version", version)
    assert tuning_file.triton_version() == "3.6.0+git1" and dispatch._has_triton()
    monkeypatch.setattr(tuning_file, "version", lambda name: version("triton"))
    assert tuning_file.triton_version() is None and not dispatch._has_triton()


def test_functorch_and_unknown_names_are_refused_under_a_forced_backend():
    weight = torch.zeros(8, 16)
    with pytest.raises(BackendError, match="functorch"):
        torch.func.vmap(lambda x: dispatch.choose(x, weight, 4, backend="triton") and x)(
            torch.zeros(2, 16)
        )
    with pytest.raises(
        ConfigError, match="backend: expected one of auto, torch, triton, got 'cuda'"
    ):
        dispatch.choose(torch.zeros(1, 16), weight, 4, backend="cuda")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("torch", "torch/in_place"),
        ("triton", "BackendError: backend='triton' cannot run"),
        ("fast", "ConfigError: FASTLORA_BACKEND: expected one of auto, torch, triton, got 'fast'"),
    ],
)
def test_the_environment_forces_a_backend(value, expected):
    program = """
import sys, torch, fastlora
try:
    print(fastlora.explain(fastlora.LoRALinear(torch.nn.Linear(8, 8)), torch.zeros(2, 8)))
except fastlora.FastLoRAError as error:
    print(f"{type(error).__name__}: {error}")
"""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env={"PATH": "", "FASTLORA_BACKEND": value, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT_S,
    )
    assert run.stdout.startswith(expected), run.stdout + run.stderr


def test_float32_products_follow_torchs_switch():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert dispatch.float32_precision() == "ieee"
        torch.set_float32_matmul_precision("high")
        assert dispatch.float32_precision() == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)


def test_architectures_are_found_by_capability():
    assert architecture((9, 0)).capability == 90
    assert architecture((8, 6)).capability == 89 and architecture((10, 3)).capability == 100
    assert architecture((7, 5)) is None and architecture((12, 0)) is None


@pytest.mark.parametrize(("rank", "block"), [(1, 16), (16, 16), (17, 32), (200, 256), (256, 256)])
def test_ranks_are_padded_to_a_power_of_two(rank, block):
    assert rank_block(rank) == block


H100 = ARCHITECTURES[90]
LLM = Problem(8192, 4096, 4096, 16, 2, True)


def test_the_cost_model_follows_the_published_threshold():
    """Without epilogues our GEMM kernel is faster than cuBLAS and an update if and only if eta exceeds T / (T + u)."""
    u = 2 * 2 * 8192 * 4096 / (H100.tbps * 1e12)
    base = 2 * 8192 * 4096 * 4096 / (H100.tflops * 1e12)
    threshold = base / (base + u)
    for eta, better in ((threshold - 0.03, "in_place"), (threshold + 0.03, "split")):
        seconds = cost.forward_seconds(replace(H100, eta=eta, epilogues=(0.0, 0.0)), LLM)
        assert min(("in_place", "split"), key=seconds.get) == better


@pytest.mark.parametrize(
    ("shape", "measured"),
    [
        (LLM, {"in_place": 431.8, "accumulate": 416.9, "split": 415.4}),
        (
            Problem(32768, 1024, 1024, 16, 2, False),
            {"in_place": 179.9, "accumulate": 168.5, "split": 150.0, "fused": 140.4},
        ),
        (
            Problem(4096, 768, 768, 4, 2, False),
            {"in_place": 20.9, "accumulate": 20.3, "split": 18.1, "fused": 16.4},
        ),
    ],
    ids=["8192x4096", "32768x1024", "4096x768"],
)
def test_the_cost_model_is_within_seven_percent_of_an_h100(shape, measured):
    """Microseconds of `benchmarks/results/h100/tune.json`, less 5 for the events of a sample; the order of the plans is right too."""
    predicted = cost.forward_seconds(H100, shape)
    for plan, time in measured.items():
        assert abs(1e6 * predicted[plan] / time - 1) < 0.07, (plan, 1e6 * predicted[plan])
    assert sorted(measured, key=measured.get) == sorted(measured, key=predicted.get)


def test_the_cost_model_offers_only_plans_that_run():
    assert set(cost.forward_seconds(H100, LLM)) == {"in_place", "accumulate", "split"}
    assert "fused" in cost.forward_seconds(H100, replace(LLM, dropout=False))
    assert "fused" not in cost.forward_seconds(H100, replace(LLM, dropout=False, rank=128))
    few = replace(LLM, m=H100.decode_rows)
    assert "decode" in cost.forward_seconds(H100, few)
    assert "decode" not in cost.forward_seconds(H100, replace(few, m=H100.decode_rows + 1))


@pytest.mark.parametrize("m", [1, 16, 64])
def test_few_rows_use_the_decode_plan(m):
    seconds = cost.forward_seconds(H100, replace(LLM, m=m, dropout=False))
    assert min(seconds, key=seconds.get) == "decode"


def test_exact_float32_uses_cublas_for_the_main_gemm():
    q = replace(LLM, itemsize=4)
    for seconds in (cost.forward_seconds(H100, q), cost.dx_seconds(H100, q)):
        assert min(seconds, key=seconds.get) in ("in_place", "accumulate")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    file = tmp_path / "deep" / "tuning.json"
    monkeypatch.setenv("FASTLORA_TUNING", str(file))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Some GPU")
    tuning_file._read.cache_clear()
    yield file
    tuning_file._read.cache_clear()


def test_tuned_entries_are_found_for_their_bucket_only(cache):
    config = tiles(H100, LLM)
    entry = tuning_file.Tuned(
        "in_place", "split", replace(config, split=replace(config.split, num_stages=3))
    )
    device = torch.device("cuda:0")
    assert tuning_file.lookup(device, LLM) is None
    tuning_file.store("Some GPU", LLM, entry)
    assert tuning_file.lookup(device, LLM) == entry
    assert tuning_file.lookup(device, replace(LLM, m=8191)) == entry
    others = [replace(LLM, **{f: getattr(LLM, f) + 1}) for f in ("m", "n", "k", "rank")]
    for other in [
        *others,
        replace(LLM, dropout=False),
        replace(LLM, itemsize=4),
        replace(LLM, aligned=False),
    ]:
        assert tuning_file.lookup(device, other) is None
    tuning_file.store("Another GPU", LLM, entry)
    assert len(json.loads(cache.read_text())) == 2


def test_entries_that_another_process_stored_are_kept(cache):
    entry = tuning_file.Tuned("split", "split", tiles(H100, LLM))
    tuning_file.store("Some GPU", LLM, entry)
    both = json.loads(cache.read_text())
    tuning_file.lookup(torch.device("cuda:0"), LLM)  # read before the other process writes
    cache.write_text(json.dumps(both | {"another": both[next(iter(both))]}))
    tuning_file.store("Some GPU", replace(LLM, m=2 * LLM.m), entry)
    assert {"another", *both} < json.loads(cache.read_text()).keys()


def test_the_cache_belongs_to_its_versions_and_kernels(cache, monkeypatch):
    tuning_file.store("Some GPU", LLM, tuning_file.Tuned("split", "split", tiles(H100, LLM)))
    monkeypatch.setattr(tuning_file, "_versions", lambda: "other kernels")
    assert tuning_file.lookup(torch.device("cuda:0"), LLM) is None


@pytest.mark.parametrize("text", ["{", "[]", '{"KEY": {"plan": 1}}', '{"KEY": 3}'])
def test_a_damaged_cache_is_named(cache, text):
    cache.parent.mkdir()
    cache.write_text(text.replace("KEY", tuning_file.key("Some GPU", LLM)))
    with pytest.raises(ConfigError, match=r"tuning\.json: "):
        tuning_file.lookup(torch.device("cuda:0"), LLM)


def test_the_environment_sets_the_path_of_the_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("FASTLORA_TUNING", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning_file.path() == tmp_path / "fastlora" / "tuning.json"


@pytest.mark.skipif(GPU, reason="pretends that a CPU is the device")
def test_a_measured_plan_beats_the_predicted_one(cache, monkeypatch):
    x, weight = torch.zeros(100, 16), torch.zeros(16, 16)
    problem = Problem(100, 16, 16, 4, 4, False)
    config = replace(tiles(H100, problem), dy=replace(tiles(H100, problem).dy, splits=1))
    tuning_file.store("Some GPU", problem, tuning_file.Tuned("split", "in_place", config))
    monkeypatch.setattr(dispatch, "device_architecture", lambda device: H100)

    dispatch._plan.cache_clear()

    class Cuda(torch.Tensor):
        device = torch.device("cuda:0")

    choice = dispatch.launch_choice(x.as_subclass(Cuda), weight, 4, False)
    # The same call on unaligned rows must not get the tiles for aligned rows.
    odd = torch.zeros(100, 17)[:, 1:].as_subclass(Cuda)
    assert dispatch.launch_choice(odd, weight, 4, False).reason != choice.reason
    dispatch._plan.cache_clear()
    assert (choice.plan, choice.dx_plan, choice.config) == ("split", "in_place", config)
    assert choice.reason == "measured by fastlora.tune"


def test_the_designs_table_of_predicted_times_agrees_with_the_cost_model():
    text = (ROOT / "docs" / "design.md").read_text()
    rows = re.findall(
        r"^\| (\d+), (\d+) → (\d+), (\d+), ([\d.]+) \| (.*) \| `(\w+)` \| [^|]* \|$",
        text,
        re.M,
    )
    assert len(rows) == 7
    for m, k, n, rank, p, cells, chosen in rows:
        problem = Problem(int(m), int(n), int(k), int(rank), 2, float(p) > 0)
        seconds = cost.forward_seconds(H100, problem)
        plans = ("in_place", "accumulate", "split", "fused", "decode")
        assert cells.split(" | ") == [
            f"{1e6 * seconds[q]:.0f}" if q in seconds else "–" for q in plans
        ]
        assert chosen == min(seconds, key=seconds.get)
