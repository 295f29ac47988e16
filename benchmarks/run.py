"""Time `LoRALinear` against PEFT and against the frozen layer alone, and write one JSON record.

    python benchmarks/run.py --device cpu [--reps 30] [--output benchmarks/results/cpu.json]

Correctness comes first: a layer whose output or gradients are wrong gets no time. The contestants run interleaved, one
after the other in every repetition, so that a slow spell of the machine meets all of them; ratios are of medians.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from cases import CPU_CASES, Case
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora.config import LoraConfig as PeftConfig
from torch import Tensor, nn

from fastlora import LoRALinear, reference

MODES = ("forward", "forward+backward")
BASELINE = "linear"


def build(case: Case) -> dict[str, nn.Module]:
    """The frozen layer, and the same layer under fastlora and under PEFT with equal adapter weights."""
    torch.manual_seed(0)
    frozen = nn.Linear(case.k, case.n).requires_grad_(False)
    fast = LoRALinear(frozen, case.rank, alpha=2.0 * case.rank, dropout=case.p)
    nn.init.normal_(fast.lora_B, std=0.02)
    config = PeftConfig(r=case.rank, lora_alpha=2 * case.rank, lora_dropout=case.p)
    peft = PeftLinear(frozen, "default", config=config, r=case.rank, lora_alpha=2 * case.rank)
    with torch.no_grad():
        peft.lora_A["default"].weight.copy_(fast.lora_A)
        peft.lora_B["default"].weight.copy_(fast.lora_B)
    return {BASELINE: frozen, "fastlora": fast, "peft": peft}


def check(layers: dict[str, nn.Module], x: Tensor, dy: Tensor) -> None:
    """Output and gradients of fastlora's layer against the reference in float64, without dropout.

    The bound is that of the tests: twice the error of plain torch in float32 plus four units in the last place.
    Raises: RuntimeError naming what is wrong.
    """
    fast = layers["fastlora"].eval()
    names = ("x", "lora_a", "lora_b")
    frozen = fast.original_linear

    def results(
        function: Callable[[Tensor, Tensor, Tensor], Tensor], dtype: torch.dtype
    ) -> dict[str, Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, fast.lora_A, fast.lora_B)]
        y = function(*leaves)
        gradients = torch.autograd.grad(y, leaves, dy.to(dtype))
        return {
            "y": y.detach(),
            **{f"d{name}": g for name, g in zip(names, gradients, strict=True)},
        }

    def formula(x: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        weight, bias = frozen.weight.to(x.dtype), frozen.bias.to(x.dtype)
        return reference.forward(x, weight, bias, lora_a, lora_b, fast.scaling)[0]

    def layer(x: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        return torch.func.functional_call(fast, {"lora_A": lora_a, "lora_B": lora_b}, (x,))

    exact, plain = results(formula, torch.float64), results(formula, torch.float32)
    for name, got in results(layer, torch.float32).items():
        error = (got.double() - exact[name]).abs().max().item()
        allowed = 2 * (plain[name].double() - exact[name]).abs().max().item()
        allowed += 4 * torch.finfo(got.dtype).eps * exact[name].abs().max().item()
        if not error <= allowed:
            raise RuntimeError(f"fastlora: {name} is off by {error:.3e}, allowed {allowed:.3e}")
    fast.train()


def step(layer: nn.Module, x: Tensor, dy: Tensor, mode: str) -> Callable[[], None]:
    if mode == "forward":

        def forward() -> None:
            with torch.no_grad():
                layer(x)

        return forward

    def forward_backward() -> None:
        layer(x).backward(dy)
        x.grad = None
        for parameter in layer.parameters():
            parameter.grad = None

    return forward_backward


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Bytes of distinct storage that one forward pass keeps for the backward pass, parameters not counted."""
    owned = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    del y
    return sum(storages.values())


def measure(case: Case, reps: int) -> list[dict[str, Any]]:
    layers = build(case)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(case.m, case.k, generator=generator, requires_grad=True)
    dy = torch.randn(case.m, case.n, generator=generator)
    check(layers, x.detach(), dy)
    memory = {name: saved_bytes(layer, x) for name, layer in layers.items()}
    records = []
    for mode in MODES:
        steps = {name: step(layer, x, dy, mode) for name, layer in layers.items()}
        times: dict[str, list[float]] = {name: [] for name in steps}
        for repetition in range(reps + 3):
            for name, run in steps.items():
                start = time.perf_counter()
                run()
                if repetition >= 3:  # the first rounds warm caches and allocators
                    times[name].append(1e3 * (time.perf_counter() - start))
        baseline = statistics.median(times[BASELINE])
        for name, values in times.items():
            p20, p50, p80 = (sorted(values)[int(q * (len(values) - 1))] for q in (0.2, 0.5, 0.8))
            records.append(
                {
                    "op": "lora_linear",
                    "case": case.name,
                    "mode": mode,
                    "backend": name,
                    "ms_p20": round(p20, 4),
                    "ms_p50": round(p50, 4),
                    "ms_p80": round(p80, 4),
                    "ratio_to_linear": round(statistics.median(values) / baseline, 4),
                    "saved_bytes": memory[name] if mode == "forward+backward" else None,
                }
            )
    return records


def environment(reps: int) -> dict[str, Any]:
    def git(*arguments: str) -> str:
        run = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True)
        return run.stdout.strip()

    model = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "device": "cpu",
        "cpu": model[0] if model else platform.processor(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "triton", "peft")},
        "git_sha": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "reps": reps,
        "baseline": BASELINE,
        "command": "python " + " ".join(sys.argv),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu"], default="cpu", help="where to run")
    parser.add_argument(
        "--reps",
        type=int,
        default=30,
        help="counted repetitions of each case and mode (default 30)",
    )
    parser.add_argument("--output", type=Path, help="write the record here as JSON")
    arguments = parser.parse_args(argv)
    record = {"environment": environment(arguments.reps), "results": []}
    for case in CPU_CASES:
        record["results"] += measure(case, arguments.reps)
        print_case(case, record["results"])
    ratios = speedups(record["results"])
    print(
        f"forward+backward, PEFT / fastlora: median {statistics.median(ratios):.2f}, {[round(r, 2) for r in ratios]}"
    )
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def speedups(results: list[dict[str, Any]], mode: str = "forward+backward") -> list[float]:
    """PEFT's median time over fastlora's, case by case."""
    times = {(r["case"], r["backend"]): r["ms_p50"] for r in results if r["mode"] == mode}
    return [
        times[case, "peft"] / ms for (case, backend), ms in times.items() if backend == "fastlora"
    ]


def print_case(case: Case, results: list[dict[str, Any]]) -> None:
    for mode in MODES:
        rows = {r["backend"]: r for r in results if r["case"] == case.name and r["mode"] == mode}
        cells = [
            f"{name} {r['ms_p50']:8.2f} ms ({r['ratio_to_linear']:.2f}x)"
            for name, r in rows.items()
        ]
        saved = {name: r["saved_bytes"] for name, r in rows.items() if r["saved_bytes"] is not None}
        kept = (
            "  saved "
            + ", ".join(f"{n} {b / 2**20:.2f} MiB" for n, b in saved.items() if n != BASELINE)
            if saved
            else ""
        )
        print(f"{case.name:28s} {mode:17s} {'  '.join(cells)}{kept}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
