"""Everything that a GPU must prove, in one command, within minutes: results, passes, tiles, targets, models.

    python benchmarks/gpu_proof.py --out DIR [--minutes 9] [--stages smoke,tests:90] [--git-sha SHA]
    python benchmarks/gpu_proof.py --out DIR --rehearse      # the same stages on a CPU, in Triton's interpreter, tiny shapes

Each stage is a process of its own, with its own time limit and log, because an illegal access ends a process. It writes its JSON
file after every case, so that a stage that is stopped leaves what it has. The summary is printed last.

    facts     versions, clocks, the memory bandwidth and the speed of a matrix product
    smoke     every kernel at several shapes in every dtype against float64
    gated     gated MLPs in every dtype against float64, and their times beside separate layers
    experts   banks of experts in every dtype against float64, and their times beside what adds W and dW
    grouped   the kernels of rows in groups in every dtype against float64, and their times beside torch's products
    tests     the tests of the kernels, operators, dispatch and tuner, in several processes
    tune      for each target shape: the base products of cuBLAS, every kernel alone with several tiles, every plan
    profile   the kernels of one forward and backward pass of each target shape, as torch's profiler sees them
    targets   `run.py --quick`, with the tiles that `tune` found if it ran
    calls     `eager_calls.py`: the CPU's time of a call, in autograd's thread and in one
    models    `model_step.py`: training steps of whole models, with the same tiles
    moe       the same of a mixture of experts
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import math
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
# Share of the minutes that a stage may take at most.
STAGES = {
    **{"facts": 0.12, "smoke": 0.2, "gated": 0.12, "experts": 0.12, "grouped": 0.12},
    **{"tests": 0.4, "tune": 0.6, "profile": 0.2, "calls": 0.12, "targets": 0.7},
    **{"models": 0.3, "moe": 0.2},
}
DTYPES = ("bfloat16", "float16", "float32", "tf32")
SMOKE = (  # M, K, N, R, p: several tiles, odd sizes, many ranks, few rows
    "600,512,768,16,0.1",
    "600,512,768,4,0",
    "303,264,520,12,0.3",
    "777,1023,1025,8,0.1",
    "520,1040,528,64,0.1",
    "520,1040,528,200,0.1",
    "8,512,768,16,0",
    "40,1024,520,64,0.1",
)
TUNE = (
    "8192,4096,4096,16,0.1",
    "32768,1024,1024,16,0",
    "4096,768,768,4,0",
    "32,4096,4096,16,0",
    "1,4096,4096,16,0",
)
TESTS = (
    "tests/kernels",
    "tests/ops/triton/test_gated.py",
    "tests/ops/triton/test_experts.py",
    "tests/ops/triton/test_mixed.py",
    "tests/ops/triton/test_linear.py",
    "tests/ops/test_dispatch.py",
    "tests/ops/test_tune.py",
    "tests/ops/test_linear.py",
    "tests/ops/test_dropout.py",
    "tests/ops/test_routing.py",
    "tests/layers/test_linear.py",
    "tests/layers/test_kinds_on_device.py",
    "tests/model/test_fusion.py",
    "tests/model/test_on_device.py",
    "tests/model/test_adapters.py",
    "tests/layers/test_offload.py",
)
# The torch path on CUDA is no contender, and the forced kernels are what `fastlora` chooses.
CONTESTANTS = "fastlora,fastlora-bf16,peft,peft-bf16,peft-compiled,addmm,lorafusion,unsloth"
REHEARSAL_SHAPES = ("20,32,48,4,0.1",)


def main(argv: list[str] | None = None) -> int:
    arguments = _arguments(argv)
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    if arguments.stage is not None:
        globals()[f"_{arguments.stage}"](arguments)
        return 0
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    if arguments.rehearse:
        environment["TRITON_INTERPRET"] = "1"
    begin, outcomes = time.monotonic(), {}
    for stage, limit in arguments.stages.items():
        seconds = 60 * arguments.minutes * STAGES[stage] if limit is None else limit
        left = 60 * arguments.minutes - (time.monotonic() - begin)
        outcomes[stage] = _run_stage(stage, arguments, environment, min(seconds, left))
        if stage == "tests":
            _write(out / "tests.json", test_outcomes((out / "tests.log").read_text()))
        _write(out / "stages.json", outcomes)
    print(_summary(out, outcomes))
    return int(any(outcome["status"] != 0 for outcome in outcomes.values()))


def _run_stage(
    stage: str, arguments: argparse.Namespace, environment: dict[str, str], seconds: float
) -> dict[str, Any]:
    if seconds < 1:
        return {"status": "no time left", "seconds": 0.0}
    command = [
        sys.executable,
        "benchmarks/gpu_proof.py",
        "--stage",
        stage,
        "--out",
        str(arguments.out),
    ]
    command += ["--jobs", str(arguments.jobs), "--seconds", f"{seconds:.0f}"]
    command += ["--rehearse"] if arguments.rehearse else []
    command += ["--candidates", str(arguments.candidates)]
    command += ["--git-sha", arguments.git_sha] if arguments.git_sha else []
    begin, status = time.monotonic(), 0
    with (arguments.out / f"{stage}.log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, cwd=ROOT, start_new_session=True
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            status = "stopped at its time limit"  # type: ignore[assignment]
    took = round(time.monotonic() - begin, 1)
    print(f"{stage}: {status or 'ended'} in {took} s", flush=True)
    return {"status": status, "seconds": took}


def _facts(arguments: argparse.Namespace) -> None:
    import torch

    from fastlora.benchmark.record import environment

    facts: dict[str, Any] = environment(_device(arguments), 0, arguments.git_sha)
    facts["numpy"] = importlib.metadata.version("numpy")
    size, rounds = (64, 1) if arguments.rehearse else (8192, 20)
    x, w = (torch.randn(size, size, device=_device(arguments)).bfloat16() for _ in range(2))
    y = torch.empty(size * size * 16, dtype=torch.uint8, device=x.device)
    z = torch.empty_like(y)
    facts["matmul_tflops"] = round(2e-12 * size**3 / _seconds(lambda: x @ w, rounds), 1)
    facts["copy_tbps"] = round(2e-12 * y.numel() / _seconds(lambda: z.copy_(y), rounds), 3)
    _write(arguments.out / "facts.json", facts)


def _seconds(call: Any, rounds: int) -> float:
    import torch

    def clock() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    for _ in range(3):
        call()
    begin = clock()
    for _ in range(rounds):
        call()
    return (clock() - begin) / rounds


def _smoke(arguments: argparse.Namespace) -> None:
    shapes = REHEARSAL_SHAPES if arguments.rehearse else SMOKE
    # The interpreter multiplies bfloat16 wrongly and knows no TF32.
    dtypes = ("float16", "float32") if arguments.rehearse else DTYPES
    cases = [(dtype, shape) for dtype in dtypes for shape in shapes]
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(arguments.jobs, get_context("spawn")) as pool:
        for part in pool.map(_smoke_case, *zip(*cases, strict=True)):
            rows += part
            _write(arguments.out / "smoke.json", rows)
    if any(map(is_wrong, rows)):
        raise SystemExit("not every result is right: see smoke.json")


def is_wrong(row: dict[str, Any]) -> bool:
    """Whether a kernel or plan failed, or a result is further off than allowed; a NaN is."""
    return "failed" in row or any(not error <= 1 for error in row["errors"].values())


def _smoke_case(dtype: str, text: str) -> list[dict[str, Any]]:
    """A row for each kernel, and for forward and backward by each plan: its error over the allowed one."""
    import torch
    from proofs import reason

    from fastlora.ops import cost, dispatch
    from fastlora.ops.bench import Bench, Shape
    from fastlora.ops.tune import kernels_of

    torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench = Bench(
        Shape.parse(text), torch.float32 if dtype == "tf32" else getattr(torch, dtype), device
    )
    choice = dispatch.launch_choice(
        bench.x, bench.weight, bench.shape.rank, bench.problem.dropout, "in_place"
    )
    arch = dispatch.device_architecture(device)
    assert arch is not None and choice.config is not None
    plans = list(cost.forward_seconds(arch, bench.problem))
    rows = []

    def add(name: str, run: Any) -> None:
        row: dict[str, Any] = {"dtype": dtype, "shape": text, "what": name}
        try:
            row["errors"] = bench.errors(run())
        except Exception as error:
            row["failed"] = reason(error)
        rows.append(row)

    for kernel in kernels_of(bench.shape, plans):
        add(kernel, lambda kernel=kernel: bench.run(kernel, getattr(choice.config, kernel)))
    for plan in plans:
        add(f"plan {plan}", lambda plan=plan: bench.run_plan(plan, choice.config))
    return rows


def _grouped(arguments: argparse.Namespace) -> None:
    _prove("grouped", arguments)


def _gated(arguments: argparse.Namespace) -> None:
    _prove("gated", arguments)


def _experts(arguments: argparse.Namespace) -> None:
    _prove("experts", arguments)


def _prove(stage: str, arguments: argparse.Namespace) -> None:
    """Check the cases of `<stage>_proof.py` in every dtype, and time what it names."""
    import torch
    from proofs import reason

    from fastlora.ops.tune import cuda_seconds

    proof = importlib.import_module(f"{stage}_proof")
    cases = proof.REHEARSED if arguments.rehearse else proof.CASES
    dtypes = ("float16", "float32") if arguments.rehearse else DTYPES
    jobs = [(dtype, case) for case in cases for dtype in dtypes]
    if not arguments.rehearse:  # first, since they compile what is timed
        jobs = [("bfloat16", case) for case in proof.TIMED] + jobs
    content: dict[str, Any] = {"results": [], "times": []}
    with ProcessPoolExecutor(arguments.jobs, get_context("spawn")) as pool:
        for done in as_completed([pool.submit(proof.check, *job) for job in jobs]):
            content["results"].append(done.result())
            _write(arguments.out / f"{stage}.json", content)
    timer = (lambda call: _seconds(call, 1)) if arguments.rehearse else cuda_seconds
    dtype = torch.float32 if arguments.rehearse else torch.bfloat16
    for case in cases if arguments.rehearse else proof.TIMED:
        for what, call in proof.timed(case, dtype, _device(arguments)).items():
            row = {"shape": case.name, "what": what}
            try:
                row["us"] = round(1e6 * timer(call), 2)
                if not arguments.rehearse:  # from Python, one call after another
                    row["us_called"] = round(1e6 * _seconds(call, 50), 2)
            except Exception as error:  # the others are still worth their time
                row["failed"] = reason(error)
            content["times"].append(row)
            _write(arguments.out / f"{stage}.json", content)
    if any(map(is_wrong, content["results"])) or any("failed" in t for t in content["times"]):
        raise SystemExit(f"not every result is right: see {stage}.json")


def _tests(arguments: argparse.Namespace) -> None:
    # Verbose, so that the log of a run that is stopped names what failed.
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:benchmark", "-W", "default"]
    command += ["-n", str(arguments.jobs), f"--junitxml={arguments.out}/tests.xml", "-rf"]
    files = ["tests/ops/test_dispatch.py"] if arguments.rehearse else list(TESTS)
    subprocess.run([*command, *files], cwd=ROOT, check=True)


def test_outcomes(log: str) -> dict[str, Any]:
    """How many tests passed and were skipped, and the names of the others, from pytest's verbose log, complete or not."""
    pairs = re.findall(r"\] (PASSED|FAILED|ERROR|SKIPPED) (.+?) *$", log, re.MULTILINE)
    found = {name: outcome for outcome, name in pairs}
    outcomes = list(found.values())
    failed = sorted(name for name, outcome in found.items() if outcome in ("FAILED", "ERROR"))
    return {
        "passed": outcomes.count("PASSED"),
        "skipped": outcomes.count("SKIPPED"),
        "failed": failed,
    }


def _tune(arguments: argparse.Namespace) -> None:
    import torch

    from fastlora.ops import dispatch, tune, tuning_file

    os.environ["FASTLORA_TUNING"] = str(arguments.out / "tuning.json")
    device = _device(arguments)
    rows: list[dict[str, Any]] = []
    limit = 2 if arguments.rehearse else arguments.candidates
    shapes = REHEARSAL_SHAPES if arguments.rehearse else TUNE
    if not arguments.rehearse:
        with ThreadPoolExecutor(len(shapes)) as pool:
            jobs = max(1, arguments.jobs // 3)
            list(pool.map(lambda text: _compile(text, limit, jobs), shapes))
        print("compiled", flush=True)
    for text in shapes:
        bench = _bench(text, arguments)
        timer = (lambda call: _seconds(call, 1)) if arguments.rehearse else tune.cuda_seconds
        print(text, flush=True)
        for name, run in _base_products(bench).items():
            rows.append({"shape": text, "what": name, "us": round(1e6 * timer(run), 2)})
            print(rows[-1], flush=True)
        choice = dispatch.predicted_choice(device, bench.problem)

        def row(what: str, seconds: float, config: Any, text: str = text) -> None:
            us = round(1e6 * seconds, 2) if math.isfinite(seconds) else None
            rows.append({"shape": text, "what": what, "us": us, "config": str(config)})
            _write(arguments.out / "tune.json", rows)

        def keep(tuned: tuning_file.Tuned, problem: Any = bench.problem) -> None:
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
            tuning_file.store(name, problem, tuned)

        tune.tune_shape(bench, choice, timer, limit, keep, row)


def _bench(text: str, arguments: argparse.Namespace) -> Any:
    import torch

    from fastlora.ops.bench import Bench, Shape

    dtype = torch.float32 if arguments.rehearse else torch.bfloat16
    return Bench(Shape.parse(text), dtype, _device(arguments))


def _compile(text: str, limit: int, jobs: int) -> None:
    import torch

    from fastlora.ops import bench, cost, dispatch, tune

    shape, device = bench.Shape.parse(text), torch.device("cuda")
    problem = bench.problem_of(shape, torch.bfloat16)
    choice, arch = (
        dispatch.predicted_choice(device, problem),
        dispatch.device_architecture(device),
    )
    assert choice.config is not None and arch is not None
    plans = list(cost.forward_seconds(arch, problem))
    tune.compile_candidates(shape, torch.bfloat16, choice.config, plans, limit - 1, jobs)


def _profile(arguments: argparse.Namespace) -> None:
    import torch
    from torch.profiler import ProfilerActivity, profile

    from fastlora.ops import dispatch

    os.environ["FASTLORA_TUNING"] = str(arguments.out / "tuning.json")
    rows = []
    for text in REHEARSAL_SHAPES if arguments.rehearse else TUNE:
        bench = _bench(text, arguments)
        rank, drops = bench.shape.rank, bench.problem.dropout
        forced = "split" if arguments.rehearse else None
        forward = dispatch.launch_choice(bench.x, bench.weight, rank, drops, forced)
        backward = dispatch.launch_choice(bench.x, bench.weight, rank, drops, forced, bench.dy)

        def run(bench: Any = bench, forward: Any = forward, backward: Any = backward) -> None:
            _, s = bench.forward(forward)
            bench.backward(backward, s)

        activity = ProfilerActivity.CPU if arguments.rehearse else ProfilerActivity.CUDA
        for _ in range(3):
            run()
        with profile(activities=[activity]) as profiler:
            for _ in range(1 if arguments.rehearse else 20):
                run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        for event in profiler.key_averages():
            us = getattr(event, "device_time", 0.0)
            rows.append(
                {
                    "shape": text,
                    "plan": str(forward)[:40],
                    "kernel": event.key[:90],
                    "us": round(us, 2),
                }
            )
        _write(arguments.out / "profile.json", rows)


def _base_products(bench: Any) -> dict[str, Any]:
    """What cuBLAS computes in the plans, and one read and one write of x."""
    from torch.nn import functional as F

    x, dy, weight, bias = bench.x, bench.dy, bench.weight, bench.bias
    y, dx = dy.clone(), x.clone()
    return {
        "linear": lambda: F.linear(x, weight, bias),
        "linear added": lambda: y.addmm_(x, weight.T),
        "dy W": lambda: dy @ weight,
        "dy W added": lambda: dx.addmm_(dy, weight),
        "copy of x": lambda: dx.copy_(x),
    }


def _targets(arguments: argparse.Namespace) -> None:
    if not arguments.rehearse:
        options = ["--device", "cuda", "--quick", "--implementations", CONTESTANTS]
        _benchmark("run.py", options, arguments)


def _calls(arguments: argparse.Namespace) -> None:
    options = ["--device", "cpu", "--rehearse"] if arguments.rehearse else ["--device", "cuda"]
    _benchmark("eager_calls.py", options, arguments)


def _models(arguments: argparse.Namespace) -> None:
    options = ["--device", "cuda"]
    if arguments.rehearse:
        options = ["--only", "llama-tiny", "--reps", "1"]
    _benchmark("model_step.py", options, arguments)


def _moe(arguments: argparse.Namespace) -> None:
    options = ["--device", "cuda", "--only", "qwen3-moe-2b"]
    if arguments.rehearse:
        options = ["--only", "qwen3-moe-tiny", "--reps", "1"]
    _benchmark("model_step.py", options, arguments)


def _benchmark(program: str, options: list[str], arguments: argparse.Namespace) -> None:
    """Run it with the tiles that `tune` found; its record has the stage's name."""
    command = [sys.executable, f"benchmarks/{program}", *options]
    command += ["--git-sha", arguments.git_sha] if arguments.git_sha else []
    command += ["--budget-seconds", f"{arguments.seconds - 10:.0f}"]
    command += ["--output", str(arguments.out / f"{arguments.stage}.json")]
    environment = os.environ | {"FASTLORA_TUNING": str(arguments.out / "tuning.json")}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


def _device(arguments: argparse.Namespace) -> Any:
    import torch

    return torch.device("cpu" if arguments.rehearse else "cuda")


def _summary(out: Path, outcomes: dict[str, Any]) -> str:
    """At most 60 lines."""
    lines = [
        f"{stage}: {outcome['status'] or 'ended'} in {outcome['seconds']} s"
        for stage, outcome in outcomes.items()
    ]
    facts = _read(out / "facts.json", {})
    keys = ("gpu", "torch", "triton", "matmul_tflops", "copy_tbps", "clocks_before")
    lines.append(", ".join(f"{key} {facts.get(key)}" for key in keys))
    smoke = _read(out / "smoke.json", [])
    bad = list(filter(is_wrong, smoke))
    lines.append(f"smoke: {len(smoke) - len(bad)} of {len(smoke)} correct")
    for row in bad[:8]:
        found = row.get("failed") or row["errors"]
        lines.append(f"  {row['dtype']} {row['shape']} {row['what']}: {str(found)[:150]}")
    for stage in ("gated", "experts", "grouped"):
        lines += _proof_lines(stage, _read(out / f"{stage}.json", {"results": [], "times": []}))
    tests = _read(out / "tests.json", None)
    if tests is not None:
        lines.append(f"tests: {tests['passed']} passed, {len(tests['failed'])} failed")
        lines += [name[:160] for name in tests["failed"][:8]]
    best: dict[tuple[str, str], float] = {}
    for row in _read(out / "tune.json", []):
        if row["us"] is not None:
            key = (row["shape"], row["what"].strip())
            best[key] = min(row["us"], best.get(key, math.inf))
    for shape in dict.fromkeys(shape for shape, _ in best):
        cells = [f"{what} {us:.1f}" for (of, what), us in best.items() if of == shape]
        lines.append(f"{shape} us: " + ", ".join(cells))
    for row in _read(out / "profile.json", []):
        if row["us"] >= 1 and "elementwise" not in row["kernel"]:
            lines.append(f"{row['shape']} {row['kernel'][:60]} {row['us']}")
    timed: dict[tuple[str, str], list[str]] = {}
    for row in _read(out / "targets.json", {}).get("results", []):
        if row["timing"] == "graph":
            cell = f"{row['backend']} {row['ratio_to_linear']:.2f}"
            timed.setdefault((row["case"], row["mode"]), []).append(cell)
    for row in _read(out / "calls.json", {"results": []})["results"]:
        thread = {True: "own thread", False: "one thread"}.get(row.get("own_thread"), "")
        lines.append(
            f"{row['case']} {row['backend']} {row['what']} {thread}: {row['us']} us a call"
        )
    for stage in ("models", "moe"):
        models = _read(out / f"{stage}.json", {"results": [], "absent": []})
        for row in models["absent"]:
            if row["kind"] != "absent":
                found = f"{row['kind']}: {row['reason'][:120]}"
                lines.append(f"{row['model']} {row['backend']}: {found}")
        for row in models["results"]:
            cell = f"{row['backend']} {row['ms_p50']:.1f}"
            timed.setdefault((row["model"], f"{row['timing']} ms"), []).append(cell)
    lines += [f"{case} {mode}: {', '.join(cells)}" for (case, mode), cells in timed.items()]
    return "\n".join(lines[:60])


def _proof_lines(stage: str, content: dict[str, Any]) -> list[str]:
    rows, lines = content["results"], []
    bad = list(filter(is_wrong, rows))
    if rows:
        lines.append(f"{stage}: {len(rows) - len(bad)} of {len(rows)} correct")
    for row in bad[:8]:
        found = row.get("failed") or row["errors"]
        lines.append(f"  {row['dtype']} {row['shape']}: {str(found)[:150]}")
    for shape in dict.fromkeys(row["shape"] for row in content["times"]):
        cells = [
            f"{row['what']} " + (f"{row['us']:.1f}" if "us" in row else row["failed"][:60])
            for row in content["times"]
            if row["shape"] == shape
        ]
        lines.append(f"{shape} us: " + ", ".join(cells))
    return lines


def _read(path: Path, otherwise: Any) -> Any:
    return json.loads(path.read_text()) if path.exists() else otherwise


def _write(path: Path, content: Any) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1, default=str) + "\n")
    partial.replace(path)


def _stages(text: str) -> dict[str, float | None]:
    """`smoke,tests:90`: stages, with seconds where a share of the minutes will not do."""
    pairs = [part.partition(":") for part in text.split(",")]
    unknown = sorted({name for name, _, _ in pairs} - set(STAGES))
    if unknown:
        raise argparse.ArgumentTypeError(
            f"expected some of {', '.join(STAGES)}, got {', '.join(unknown)}"
        )
    try:
        return {name: float(seconds) if seconds else None for name, _, seconds in pairs}
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"seconds: {error}") from None


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for logs and JSON files")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all stages (default 9)")
    everything = dict.fromkeys(STAGES)
    stages_help = "stages to run, each with its most seconds if given (default: all)"
    parser.add_argument(
        "--stages", type=_stages, default=everything, metavar="A[:SECONDS],B", help=stages_help
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--candidates", type=int, default=20, help="tiles that `tune` tries")
    parser.add_argument("--git-sha", help="commit to record, for sources without a git folder")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with tiny shapes")
    parser.add_argument("--stage", choices=list(STAGES), help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=0.0, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    arguments.out = arguments.out.resolve()
    return arguments


if __name__ == "__main__":
    raise SystemExit(main())
