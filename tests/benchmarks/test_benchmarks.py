"""The benchmark runs, does not time wrong results, and writes its records atomically."""

import functools
import json
import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn

from fastlora.benchmark.cases import DTYPES
from tests.support.paths import ROOT
from tests.support.processes import TIME_LIMIT_S

pytest_plugins = "tests.support.bench_fixtures"
CPU = torch.device("cpu")


@pytest.fixture
def quick_compile(monkeypatch):
    """torch.compile without its code generator, which takes half a minute."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    yield
    torch.compiler.reset()


def run_one(bench, case, implementations, reps=1):
    record = bench.record.new_record(CPU, reps, [case.name], None)
    builders = {name: bench.implementations.IMPLEMENTATIONS[name] for name in implementations}
    bench.case_run.run_case(case, CPU, builders, reps, record)
    return record


# The CPU's record


@pytest.mark.slow
def test_the_record_of_a_cpu_run_is_complete(tmp_path):
    output = tmp_path / "record.json"
    command = [sys.executable, "-W", "error", "benchmarks/run.py"]
    command += ["--device", "cpu", "--reps", "1", "--output", str(output)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIME_LIMIT_S)
    assert run.returncode == 0, run.stderr
    record = json.loads(output.read_text())
    facts = "cpu threads torch triton peft python git_sha dirty date reps baseline command"
    for key in facts.split():
        assert record["environment"][key] is not None
    assert record["absent"] == record["not_run"] == record["eta"] == []
    assert len(record["results"]) == 5 * 2 * 3
    for result in record["results"]:
        assert 0 < result["ms_p20"] <= result["ms_p50"] <= result["ms_p80"]
        assert result["timing"] == "eager" and result["peak_bytes"] is None
        assert (result["choice"] is not None) == (result["backend"] == "fastlora")
    assert len(record["call_overhead"]) == 2 * 2 * 3
    for result in record["call_overhead"]:
        assert 0 < result["us_p20"] <= result["us_p50"] <= result["us_p80"]
    saved = {
        (r["case"], r["backend"]): r["saved_bytes"]
        for r in record["results"]
        if r["saved_bytes"] is not None
    }
    for case in {case for case, _ in saved if "p0.1" in case}:
        assert saved[case, "fastlora"] < 0.6 * saved[case, "peft"]


# Implementations

CASES = {
    "p0 no-bias": dict(m=33, k=40, n=72, rank=8, bias=False),
    "p0.1 bias": dict(m=33, k=40, n=72, rank=3, p=0.1),
    "p0.1 bfloat16": dict(m=33, k=48, n=48, rank=4, p=0.1, dtype="bfloat16"),
    "p0 float16": dict(m=1, k=64, n=48, rank=16, dtype="float16"),
}
IMPLEMENTATIONS = [
    "linear",
    "fastlora",
    "fastlora-bf16",
    "fastlora-torch",
    "fastlora-triton",
    "peft",
    "peft-bf16",
    "peft-compiled",
    "addmm",
    "lorafusion",
    "unsloth",
    "axolotl",
    "unsloth-library",
    "axolotl-library",
    "lorafusion-library",
]


def test_every_implementation_is_tested_here(bench):
    assert list(bench.implementations.IMPLEMENTATIONS) == IMPLEMENTATIONS


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own imports
@pytest.mark.parametrize("values", CASES.values(), ids=CASES)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_an_implementation_is_correct_or_gives_the_reason_why_it_does_not_apply(
    bench, quick_compile, name, values
):
    case = bench.cases.Case(**values)
    work = bench.workload.Workload(case, CPU)
    try:
        layer = bench.implementations.IMPLEMENTATIONS[name](
            case, work.frozen[0], work.lora_a, work.lora_b
        )
    except bench.implementations.ImportFailed as error:
        assert str(error).startswith(
            f"{bench.implementations.PUBLISHED[name]} cannot be imported: "
        )
        return
    except bench.implementations.NotApplicable as error:
        allowed = {
            "fastlora-triton": "backend='triton' cannot run: ",
            "fastlora-bf16": "the weight is float32: identical to fastlora",
            "peft-bf16": "the weight is float32: identical to peft",
        }
        assert str(error).startswith(allowed[name])
        return
    bench.checks.Oracle(work).check(name, layer)
    assert layer.training
    shapes = [tuple(p.shape) for p in bench.workload.trainable(layer)]
    assert shapes == ([] if name == "linear" else [(case.rank, case.k), (case.n, case.rank)])


def test_each_implementation_adapts_the_same_frozen_layer_in_its_documented_dtype(bench):
    case = bench.cases.Case(4, 24, 40, 2, dtype="bfloat16", bias=False)
    work = bench.workload.Workload(case, CPU)
    expected = dict.fromkeys(("fastlora-bf16", "peft-bf16"), torch.bfloat16)
    float32 = ("fastlora", "peft", "addmm", "lorafusion", "unsloth", "axolotl")
    expected |= dict.fromkeys(float32, torch.float32)
    for name, dtype in expected.items():
        layer = bench.implementations.IMPLEMENTATIONS[name](
            case, work.frozen[0], work.lora_a, work.lora_b
        )
        lora_a, lora_b = bench.workload.trainable(layer)
        assert lora_a.dtype == lora_b.dtype == dtype
        assert torch.equal(lora_a.float(), work.lora_a) and torch.equal(lora_b.float(), work.lora_b)
        assert any(p is work.frozen[0].weight for p in layer.parameters())


HAND_WRITTEN = ("addmm", "lorafusion", "unsloth", "axolotl")


@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_a_hand_written_implementation_has_the_gradients_of_its_dropout(bench, name):
    case = bench.cases.Case(6, 5, 7, 2, 0.4)
    frozen = nn.Linear(5, 7, dtype=torch.float64).requires_grad_(False)
    lora_a, lora_b = torch.randn(2, 5).double(), torch.randn(7, 2).double()
    layer = bench.implementations.IMPLEMENTATIONS[name](case, frozen, lora_a, lora_b)
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)

    def seeded(x, lora_a, lora_b):
        torch.manual_seed(3)
        return torch.func.functional_call(layer, {"lora_A": lora_a, "lora_B": lora_b}, (x,))

    torch.manual_seed(3)
    dropped, mask = torch.native_dropout(x.detach(), 0.4, True)
    assert 0 < mask.sum() < mask.numel()
    expected = frozen(x) + bench.implementations.ALPHA_PER_RANK * (dropped @ lora_a.T) @ lora_b.T
    torch.testing.assert_close(seeded(x, lora_a, lora_b), expected)
    leaves = (x, lora_a.requires_grad_(), lora_b.requires_grad_())
    assert torch.autograd.gradcheck(seeded, leaves)


def test_counting_saved_bytes_keeps_no_graph_alive(bench):
    """A node that saves its own output would hold itself through hooks that return it, until the GPU's memory is full."""

    class Probe:
        pass

    probes = []

    def forward():
        y = torch.randn(4096, requires_grad=True)
        for _ in range(6):  # each is freed before the next but one is computed
            y = y.exp()
        y.grad_fn.metadata["probe"] = Probe()
        probes.append(weakref.ref(y.grad_fn.metadata["probe"]))
        return y

    assert bench.workload.saved_bytes(nn.Identity(), forward) == 6 * 4 * 4096
    assert [probe() for probe in probes] == [None]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_bytes_saved_by_hand_written_implementations(bench, dtype, p):
    case = bench.cases.Case(64, 32, 48, 4, p, dtype)
    work = bench.workload.Workload(case, CPU)
    saved = {}
    for name in HAND_WRITTEN:
        layer = bench.implementations.IMPLEMENTATIONS[name](
            case, work.frozen[0], work.lora_a, work.lora_b
        )
        saved[name] = bench.workload.saved_bytes(layer, functools.partial(layer, work.x[0]))
    size = bench.workload.torch_dtype(case).itemsize
    x, s = size * 64 * 32, size * 64 * 4
    dropped, mask = (x, 64 * 32) if p else (0, 0)
    casts = 0 if dtype == "float32" else size * 4 * (32 + 48)  # of lora_A and lora_B
    assert saved == {
        "addmm": x + mask + s + casts,
        "lorafusion": x + mask + s + casts,  # dropout(x) instead of x
        "unsloth": x + mask,
        "axolotl": x + dropped + mask + casts,
    }


UNSLOTH = """
import torch
class LoRA_W(torch.autograd.Function):
    @staticmethod
    def forward(ctx, X, W, W_quant, A, B, S, dropout_p=None, bias=None):
        assert X.dim() == 3 and W_quant is None and bias is None
        keep = torch.nn.functional.dropout(torch.ones_like(X), dropout_p or 0.0)
        ctx.save_for_backward(X, keep, W, A, B)
        ctx.S = S
        return X @ W.T + S * (keep * X @ A.T) @ B.T
    @staticmethod
    def backward(ctx, dY):
        X, keep, W, A, B = ctx.saved_tensors
        dY, X, keep = dY[0], X[0], keep[0]
        dS = ctx.S * dY @ B
        dX = dY @ W + keep * (dS @ A)
        dB = ctx.S * dY.T @ (keep * X @ A.T)
        return dX[None], None, None, dS.T @ (keep * X), dB, None, None, None
"""
AXOLOTL = """
from torch.nn.functional import linear
class LoRA_O:
    @staticmethod
    def apply(X, X_drop, W, b, W_quant, A, B, s, lora_bias, magnitude):
        assert X.dim() == 3 and W_quant is lora_bias is magnitude is None
        return linear(X, W, b) + s * ((X if X_drop is None else X_drop) @ A.T) @ B.T
"""
LORAFUSION = """
from torch.nn.functional import dropout, linear
def fused_linear_lora(x, w, a, b, alpha, seed=None, dropout_p=0.0, linear_bias=None):
    return linear(x, w, linear_bias) + alpha * (dropout(x, dropout_p) @ a.T) @ b.T
"""


@pytest.fixture
def library_folder(bench, monkeypatch, tmp_path):
    """A folder with stand-ins for the functions of published libraries that the harness calls."""
    sources = {"unsloth": UNSLOTH, "axolotl": AXOLOTL, "lorafusion": LORAFUSION}
    for name, source in sources.items():
        name = f"{name}-library"
        file = tmp_path.joinpath(*bench.implementations.PUBLISHED[name].split(".")).with_suffix(
            ".py"
        )
        file.parent.mkdir(parents=True)
        file.write_text(source)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in [n for n in sys.modules if n.split(".")[0] in sources]:
        del sys.modules[name]


def run_with_libraries(bench, monkeypatch, folder, case):
    monkeypatch.setattr(bench.run, "CPU_CASES", (case,))
    output = folder / "record.json"
    bench.run.main(["--library-path", str(folder), "--reps", "1", "--output", str(output)])
    record = json.loads(output.read_text())
    return {row["backend"] for row in record["results"]}, record["absent"]


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_published_libraries_are_timed_from_a_library_path(bench, monkeypatch, library_folder, p):
    timed, absent = run_with_libraries(
        bench, monkeypatch, library_folder, bench.cases.Case(16, 8, 12, 2, p, bias=False)
    )
    assert timed == {"linear", "fastlora", "peft", *bench.implementations.PUBLISHED}
    assert absent == []


@pytest.mark.parametrize(
    ("p", "bias", "reason"),
    [
        (0.1, False, "the fast path of this version has no dropout"),
        (0.0, True, "its fast path leaves a layer with a bias to PEFT"),
    ],
)
def test_what_the_fast_path_of_unsloth_leaves_to_peft_is_not_timed(
    bench, monkeypatch, library_folder, p, bias, reason
):
    file = library_folder / "unsloth" / "kernels" / "fast_lora.py"
    file.write_text(UNSLOTH.replace(", dropout_p=None, bias=None", ""))  # as before dropout
    timed, (absent,) = run_with_libraries(
        bench, monkeypatch, library_folder, bench.cases.Case(16, 8, 12, 2, p, bias=bias)
    )
    assert timed == {"linear", "fastlora", "peft", "axolotl-library", "lorafusion-library"}
    assert (absent["backend"], absent["kind"]) == ("unsloth-library", "absent")
    assert absent["reason"] == reason


def test_a_published_library_that_cannot_be_imported_is_named(
    bench, monkeypatch, library_folder, capsys
):
    (library_folder / "unsloth" / "kernels" / "fast_lora.py").write_text(
        "raise NotImplementedError('needs a GPU')"
    )
    timed, (absent,) = run_with_libraries(
        bench, monkeypatch, library_folder, bench.cases.Case(16, 8, 12, 2, 0.1)
    )
    assert timed == {"linear", "fastlora", "peft", "axolotl-library", "lorafusion-library"}
    assert (absent["backend"], absent["kind"]) == ("unsloth-library", "ImportFailed")
    reason = "unsloth.kernels.fast_lora cannot be imported: NotImplementedError: needs a GPU"
    assert absent["reason"] == reason and reason in capsys.readouterr().err


def test_a_wrong_published_library_is_not_timed(bench, monkeypatch, library_folder):
    file = library_folder / "lorafusion" / "ops" / "lora_v1.py"
    file.write_text(LORAFUSION.replace("alpha *", "0.99 * alpha *"))
    timed, absent = run_with_libraries(
        bench, monkeypatch, library_folder, bench.cases.Case(16, 8, 12, 2, bias=False)
    )
    assert "lorafusion-library" not in timed
    assert [(a["backend"], a["kind"]) for a in absent] == [("lorafusion-library", "wrong")]


def test_a_library_path_must_be_a_folder(bench, capsys):
    with pytest.raises(SystemExit):
        bench.run.main(["--library-path", "no/such/folder"])
    assert "--library-path: expected a folder, got no/such/folder" in capsys.readouterr().err


def test_published_libraries_are_included_if_installed_or_given_a_path(bench, monkeypatch):
    default = bench.run._default_implementations
    monkeypatch.setattr(bench.run, "is_installed", lambda name: name == "unsloth-library")
    assert default(False, False) == (*bench.run.CPU_IMPLEMENTATIONS, "unsloth-library")
    assert set(default(True, True)) == set(bench.implementations.IMPLEMENTATIONS)


# Wrong results are not timed


def test_a_wrong_layer_is_not_timed(bench, monkeypatch, capsys):
    def build(case, frozen, lora_a, lora_b):
        layer = bench.implementations.IMPLEMENTATIONS["addmm"](case, frozen, lora_a, lora_b)
        layer.register_forward_hook(lambda module, inputs, y: y * 1.001)
        return layer

    monkeypatch.setitem(bench.implementations.IMPLEMENTATIONS, "peft", build)
    record = run_one(bench, bench.cases.Case(16, 8, 12, 2), ("linear", "peft"))
    assert {row["backend"] for row in record["results"]} == {"linear"}
    (absent,) = record["absent"]
    assert absent["backend"] == "peft" and absent["kind"] == "wrong"
    assert absent["reason"].startswith("peft: y is off by ")
    assert "peft is not timed" in capsys.readouterr().err


def test_a_layer_with_a_wrong_dropout_mask_is_not_timed(bench, monkeypatch):
    right = bench.checks.lora_linear

    def wrong(*arguments, backend):
        *others, seed = arguments
        return right(*others, seed + 1, backend=backend)

    monkeypatch.setattr(bench.checks, "lora_linear", wrong)
    record = run_one(bench, bench.cases.Case(16, 8, 12, 2, 0.1), ("linear", "fastlora"))
    (absent,) = record["absent"]
    assert absent["reason"].startswith("fastlora with dropout: y is off by ")


def test_a_missing_update_is_not_mistaken_for_rounding(bench):
    for case in bench.cases.CUDA_CASES:
        small = bench.cases.Case(64, min(case.k, 768), 96, case.rank, dtype="bfloat16")
        work = bench.workload.Workload(small, CPU)
        layer = bench.implementations.IMPLEMENTATIONS["addmm"](
            small, work.frozen[0], work.lora_a, work.lora_b
        )
        with torch.no_grad():
            layer.lora_B.zero_()
        with pytest.raises(bench.checks.Wrong, match="addmm: y is off"):
            bench.checks.Oracle(work).check("addmm", layer)


def test_an_implementation_that_fails_does_not_stop_the_others(bench, monkeypatch):
    def explode(*arguments):
        raise RuntimeError("no such instruction\nat line 2")

    monkeypatch.setitem(bench.implementations.IMPLEMENTATIONS, "peft", explode)
    record = run_one(bench, bench.cases.Case(16, 8, 12, 2), ("linear", "peft", "fastlora"))
    assert {row["backend"] for row in record["results"]} == {"linear", "fastlora"}
    (absent,) = record["absent"]
    assert absent["kind"] == "RuntimeError" and absent["reason"].startswith("no such instruction")


def test_a_run_that_cannot_be_captured_is_absent_from_graphs_only(bench, monkeypatch):
    record = bench.record.new_record(CPU, 1, [], None)
    work = bench.workload.Workload(bench.cases.Case(16, 8, 12, 2), CPU)
    run = bench.case_run.CaseRun(work, {}, record)

    def capture(run):
        if run == "fastlora":
            raise RuntimeError("operation not permitted when stream is capturing")
        return run

    monkeypatch.setattr(bench.case_run, "capture", capture)
    runs = {"linear": "linear", "fastlora": "fastlora"}
    assert run._keep_running(runs, capture, "forward") == {"linear": "linear"}
    (absent,) = record["absent"]
    assert (absent["backend"], absent["mode"], absent["timing"]) == ("fastlora", "forward", "graph")


def test_a_step_trains_the_adapters_of_three_layers_and_nothing_else(bench):
    case = bench.cases.Case(16, 12, 12, 2, step=True)
    work = bench.workload.Workload(case, CPU, copies=4)
    layers = [
        bench.implementations.IMPLEMENTATIONS["fastlora"](case, frozen, work.lora_a, work.lora_b)
        for frozen in work.frozen
    ]
    before = [[p.clone() for p in layer.parameters()] for layer in layers]
    step = bench.workload.round_of("training step", layers, work)
    step()
    for index, layer in enumerate(layers):
        for old, parameter in zip(before[index], layer.parameters(), strict=True):
            trained = index < 3 and parameter.requires_grad
            assert torch.equal(old, parameter) != trained
    assert bench.workload.calls_in_round("training step", work) == 1
    assert bench.workload.calls_in_round("forward", work) == 4
    record = run_one(bench, case, ("linear", "fastlora"))
    assert {row["mode"] for row in record["results"]} == set(case.modes)


def test_tf32_is_allowed_for_its_case_only(bench, monkeypatch):
    seen = []
    monkeypatch.setattr(
        bench.case_run.CaseRun,
        "time_all",
        lambda self, reps: seen.append(torch.backends.cuda.matmul.allow_tf32),
    )
    for dtype in ("tf32", "float32"):
        run_one(bench, bench.cases.Case(4, 8, 8, 2, dtype=dtype), ("linear",))
        assert not torch.backends.cuda.matmul.allow_tf32
    assert seen == [True, False]


# Cases, samples, budget


def test_the_case_tables_are_valid(bench):
    cases = bench.cases
    for table in (cases.CPU_CASES, cases.CUDA_CASES):
        assert len({case.name for case in table}) == len(table)
        for case in table:
            assert min(case.m, case.k, case.n) >= 1 and case.rank in cases.RANKS
            assert case.p in (0.0, 0.1) and case.dtype in DTYPES
            assert not case.step or case.k == case.n
    assert {case.rank for case in cases.CUDA_CASES} == set(cases.RANKS)
    assert {case.dtype for case in cases.CUDA_CASES} == set(DTYPES)
    quick = [case for case in cases.CUDA_CASES if case.quick]
    wanted = [case for target in cases.TARGETS for case in target.cases]
    assert quick[: len(wanted)] == wanted and len(quick) <= 12
    assert any(
        case.m % 128 and case.k % 128 and case.n % 128 and not case.overhead for case in quick
    )
    assert all(case.dtype == "float32" for case in cases.CPU_CASES)


def test_copies_are_larger_than_the_cache(bench):
    for case in bench.cases.CUDA_CASES:
        if not case.overhead:
            copies = bench.workload.copies_needed(case, 50 * 2**20)
            itemsize = bench.workload.torch_dtype(case).itemsize
            assert copies * itemsize * (case.m * case.k + case.n * case.k) >= 4 * 50 * 2**20
            assert 4 <= copies <= 40


def test_samples_are_interleaved_and_warm_up_is_not_counted(bench):
    order = []
    runs = {name: functools.partial(order.append, name) for name in "ab"}

    def sample(run, rounds):
        run()
        return 2.0 * len(order) * rounds

    times = bench.timing.interleave(runs, 2, sample, rounds=5)
    assert order == list("ba" + "ab" + "ba" + "ab" + "ba")
    assert times == {"a": [14.0, 20.0], "b": [16.0, 18.0]}
    assert bench.timing.quantiles([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]) == (2.0, 3.0, 5.0)
    assert bench.timing.rounds_for(None, lambda run, rounds: 0.3) == 7
    assert bench.timing.rounds_for(None, lambda run, rounds: 9.0) == 1
    assert bench.timing.rounds_for(None, lambda run, rounds: 1e-4) == bench.timing.MAX_ROUNDS


def test_the_budget_starts_no_case_that_would_exceed_it(bench):
    now = [100.0]
    budget = bench.record.Budget(10.0, lambda: now[0])
    for seconds in (2.0, 3.0, 1.0, 1.0):
        assert budget.begin_case()
        now[0] += seconds
        budget.end_case()
    assert not budget.begin_case()  # 7 s are spent, and the slowest case took 3
    endless = bench.record.Budget(None, lambda: now[0])
    assert endless.begin_case()


def test_a_run_out_of_time_writes_its_results_and_names_the_other_cases(
    bench, monkeypatch, tmp_path, capsys
):
    output = tmp_path / "new" / "record.json"
    cases = (bench.cases.Case(4, 8, 8, 2), bench.cases.Case(8, 8, 8, 2))
    # The constructor reads the clock twice, then each begin and end once.
    now = iter([0.0, 0.0, 0.0, 6.0, 6.0])

    class Clocked(bench.record.Budget):
        def __init__(self, seconds):
            super().__init__(seconds, lambda: next(now))

    monkeypatch.setattr(bench.run, "Budget", Clocked)
    monkeypatch.setattr(bench.run, "CPU_CASES", cases)
    command = ["--budget-seconds", "10", "--reps", "1", "--output", str(output)]
    assert bench.run.main([*command, "--implementations", "fastlora,peft"]) == 0
    record = json.loads(output.read_text())
    assert record["not_run"] == [cases[1].name] and record["seconds"] == {cases[0].name: 6.0}
    assert {row["case"] for row in record["results"]} == {cases[0].name}
    assert {row["backend"] for row in record["results"]} == {"linear", "fastlora", "peft"}
    assert f"no time left for {cases[1].name}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench.run.main(["--implementations", "fastlora,nobody"])
    assert "got nobody" in capsys.readouterr().err


def test_a_record_is_replaced_completely_or_not_at_all(bench, tmp_path):
    path = tmp_path / "record.json"
    bench.record.write({"results": [1]}, path)
    with pytest.raises(TypeError):
        bench.record.write({"results": [object()]}, path)
    assert json.loads(path.read_text()) == {"results": [1]}
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]


def test_the_command_names_files_but_no_folder_of_this_machine(bench, monkeypatch):
    argv = ["/home/someone/fastlora/benchmarks/run.py", "--reps", "3", "--output", "/data/a.json"]
    monkeypatch.setattr("sys.argv", argv)
    command = bench.record.environment(CPU, 3)["command"]
    assert command == "python run.py --reps 3 --output a.json"


def test_git_and_the_driver_may_be_missing(bench, monkeypatch):
    monkeypatch.setenv("PATH", "")
    facts = bench.record.environment(CPU, 3, git_sha="abc")
    assert facts["git_sha"] == "abc" and facts["dirty"] is None
    assert bench.record.nvidia_smi() is None
    assert bench.record.gpu_file_name("Some GPU 80GB (X)") == "some-gpu-80gb-x.json"
