"""Time a whole training step of a model and measure its memory, against PEFT and full fine-tuning.

    python benchmarks/model_step.py [--reps 10] [--only vit-b] [--output benchmarks/results/model-step-cpu.json]
    python benchmarks/model_step.py --device cuda [--budget-seconds 80]    # writes benchmarks/results/model-step-<gpu>.json

The models are transformers' own, with random weights: ViT-B (12 blocks; 4 images of 197 tokens on a CPU, 64 on a GPU), a Llama of 1.2 billion
parameters without its vocabulary (16 blocks, hidden size 2048, MLP size 8192; 128 tokens on a CPU, 4 × 1024 on a GPU), mixtures of experts (`step_models.py`),
and tiny models for the tests. Weights are float32 on a CPU and bfloat16 on a GPU. A step is forward, the mean square of the output, backward, AdamW on the trainable
parameters. Steps are interleaved; implementations that freeze the base share its weights. On a GPU a step is also timed as a CUDA graph.

Every implementation is checked first: untrained adapters must leave the model's output as it is. One that fails is recorded as absent.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from model_tables import gpu_record_name
from step_models import (
    ALPHA,
    CONTESTANTS,
    CPU_CONTESTANTS,
    MODELS,
    RANK,
    adapted,
    base_model,
    without_dense_masks,
)
from torch import Tensor, nn

from fastlora.benchmark.case_run import failures
from fastlora.benchmark.checks import Wrong
from fastlora.benchmark.implementations import NotApplicable
from fastlora.benchmark.record import (
    Budget,
    Record,
    environment,
    without_folders,
    write,
)
from fastlora.benchmark.timing import interleave, sampler
from fastlora.benchmark.workload import Round, peak_bytes, saved_bytes
from fastlora.ops.graph import capture

RESULTS = Path(__file__).resolve().parent / "results"
REPS, GPU_REPS = 10, 8


def output_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    output: Tensor = model(**inputs).last_hidden_state
    return output


def loss_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return output_of(model, inputs).float().square().mean()


def step_of(model: nn.Module, inputs: dict[str, Tensor]) -> Round:
    trained = [p for p in model.parameters() if p.requires_grad]
    on_gpu = trained[0].device.type == "cuda"  # where a CUDA graph must be able to contain the step
    optimizer = torch.optim.AdamW(trained, 1e-5, capturable=on_gpu, fused=True if on_gpu else None)

    def step() -> None:
        loss_of(model, inputs).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return step


class ModelRun:
    """Some contestants on one model: built, checked and run once by the constructor, then timed."""

    def __init__(
        self,
        name: str,
        contestants: tuple[str, ...],
        device: torch.device,
        dtype: torch.dtype,
        record: Record,
    ) -> None:
        torch.manual_seed(0)
        self.name, self.device, self.record = name, device, record
        self.base, self.inputs = base_model(MODELS[name], device, dtype)
        self.steps: dict[str, Round] = {}
        self.rows: dict[str, dict[str, Any]] = {}
        check = self._check()
        for contestant in contestants:
            if contestant == "full" and device.type == "cpu" and not MODELS[name].full_on_cpu:
                reason = "weights, gradients and AdamW state do not fit in memory together with the base model"
                self._absent(contestant, NotApplicable(reason))
                continue
            self._keep(contestant, partial(self._prepare, contestant, check))

    def _check(self) -> Callable[[nn.Module], None]:
        """A function that raises Wrong if a model's output is further from the float32 base model's than rounding explains.

        In training mode, so that what is checked is what is timed: dropout changes nothing while the adapters are untrained.
        """
        dtype = next(self.base.parameters()).dtype
        with torch.no_grad():
            exact = self.base if dtype == torch.float32 else copy.deepcopy(self.base).float()
            inputs = {
                name: t.float() if t.is_floating_point() else t for name, t in self.inputs.items()
            }
            expected = output_of(exact, inputs)
            del exact
            plain = relative_error(output_of(self.base, self.inputs), expected)
        allowed = 2 * plain + max(1e-4, torch.finfo(dtype).eps)

        def check(model: nn.Module) -> None:
            found = relative_error(output_of(model, self.inputs).detach(), expected)
            if not found <= allowed:
                raise Wrong(f"the output is off by {found:.2g}, allowed {allowed:.2g}")

        return check

    def _prepare(self, contestant: str, check: Callable[[nn.Module], None]) -> None:
        mine = adapted(contestant, MODELS[self.name], self.base, self.inputs)
        trained = [p for p in mine.parameters() if p.requires_grad]
        begin = time.perf_counter()
        check(mine)
        step = step_of(mine, self.inputs)
        step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        compiled = CONTESTANTS[contestant].compiled
        self.rows[contestant] = {
            "model": self.name,
            "backend": contestant,
            "trained_dtype": str(trained[0].dtype).removeprefix("torch."),
            "parameters": sum(p.numel() for p in mine.parameters()),
            "trainable": sum(p.numel() for p in trained),
            "compile_seconds": round(time.perf_counter() - begin, 1) if compiled else None,
            "saved_bytes": saved_bytes(mine, lambda: loss_of(mine, self.inputs)),
            "peak_bytes": peak_bytes(step, self.device),
            "state_bytes": 4 * sum(p.nbytes for p in trained),  # weight, gradient, two moments
        }
        self.steps[contestant] = step

    def time_all(self, reps: int, save: Callable[[], None]) -> None:
        """Time the steps eagerly and, on a GPU, also as CUDA graphs; save what there is in between."""
        self._time(self.steps, "eager", reps)
        save()
        if self.device.type != "cuda":
            return
        torch.cuda.empty_cache()
        # One pool for all: graphs are replayed one after the other, and nothing in them outlives a step.
        pool = torch.cuda.graph_pool_handle()
        graphs: dict[str, Round] = {}
        for contestant, step in self.steps.items():

            def keep(contestant: str = contestant, step: Round = step, pool: Any = pool) -> None:
                graphs[contestant] = capture(step, pool)

            self._keep(contestant, keep, "graph")
            if contestant not in graphs:
                pool = torch.cuda.graph_pool_handle()
        self._time(graphs, "graph", reps)

    def _time(self, runs: dict[str, Round], timing: str, reps: int) -> None:
        for contestant, samples in interleave(runs, reps, sampler(self.device)).items():
            times = {
                "timing": timing,
                "ms_p50": round(statistics.median(samples), 2),
                "ms_min": round(min(samples), 2),
                "ms_max": round(max(samples), 2),
            }
            self.record["results"].append(self.rows[contestant] | times)

    def _keep(self, contestant: str, action: Callable[[], None], timing: str | None = None) -> None:
        """Run `action`; if it fails, the contestant is recorded as absent in this timing."""
        try:
            action()
        except failures() as error:
            self._absent(contestant, error, timing)

    def _absent(self, contestant: str, error: Exception, timing: str | None = None) -> None:
        kind = {NotApplicable: "absent", Wrong: "wrong"}.get(type(error), type(error).__name__)
        reason = without_folders("\n".join(str(error).splitlines()[:5]))
        row = {"model": self.name, "backend": contestant, "timing": timing}
        self.record["absent"].append({**row, "kind": kind, "reason": reason})
        if kind != "absent":
            print(f"{self.name}: {contestant} fails: {kind}: {reason}", file=sys.stderr)


def relative_error(found: Tensor, expected: Tensor) -> float:
    error: float = ((found.float() - expected).norm() / expected.norm()).item()
    return error


def parts_of(
    models: list[str], contestants: tuple[str, ...]
) -> list[tuple[str, str, tuple[str, ...]]]:
    """(label, model, contestants) in the order in which they run: what compiles comes last."""
    parts = []
    for label, compiled in (("plain", False), ("compiled", True)):
        some = tuple(c for c in contestants if CONTESTANTS[c].compiled == compiled)
        parts += [(f"{model} {label}", model, some) for model in models if some]
    return parts


def main(argv: list[str] | None = None) -> int:
    arguments = _arguments(argv)
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    models = [arguments.only] if arguments.only else ["vit-b", "llama-1b"]
    parts = parts_of(models, arguments.implementations)
    record: dict[str, Any] = {
        "environment": environment(device, arguments.reps, arguments.git_sha),
        "settings": {
            "rank": RANK,
            "alpha": ALPHA,
            "dropout": MODELS[models[0]].dropout,
            "dtype": arguments.dtype,
            "sizes": {model: MODELS[model].size(device) for model in models},
        },
        "results": [],
        "absent": [],
        "seconds": {},
        "not_run": [label for label, _, _ in parts],
    }
    output = arguments.output
    if output is None and device.type == "cuda":
        output = RESULTS / gpu_record_name(record["environment"]["gpu"], models)

    def save() -> None:
        if output is not None:
            write(record, output)

    budget = Budget(arguments.budget_seconds)
    for label, model, contestants in parts:
        if not budget.begin_case():
            print(f"no time left for {', '.join(record['not_run'])}", file=sys.stderr)
            break
        before = len(record["results"])
        with without_dense_masks():
            ModelRun(model, contestants, device, dtype, record).time_all(arguments.reps, save)
        torch.compiler.reset()
        gc.collect()  # a compiled module refers to itself
        if device.type == "cuda":
            torch.cuda.empty_cache()
        record["seconds"][label] = round(budget.end_case(), 1)
        record["not_run"].remove(label)
        save()
        print_rows(record["results"][before:])
    failed = [a for a in record["absent"] if a["backend"].startswith("fastlora")]
    return int(any(a["kind"] != "absent" for a in failed))


def print_rows(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        peak = row["peak_bytes"]
        print(
            f"{row['model']:10} {row['backend']:17} {row['timing']:5} {row['ms_p50']:9.1f} ms per step, saves "
            f"{row['saved_bytes'] / 2**20:8.1f} MiB, {row['state_bytes'] / 2**20:8.1f} MiB of training state"
            + ("" if peak is None else f", peak {peak / 2**20:8.1f} MiB"),
            flush=True,
        )


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="device")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="dtype of the base weights (default float32, on a GPU bfloat16)",
    )
    parser.add_argument(
        "--reps",
        type=int,
        help=f"timed steps of each implementation (default {REPS}, on a GPU {GPU_REPS})",
    )
    parser.add_argument(
        "--budget-seconds",
        type=float,
        help="start no part of the run that is not expected to end within this time",
    )
    parser.add_argument(
        "--only", choices=list(MODELS), help="run this model only (default: vit-b and llama-1b)"
    )
    parser.add_argument(
        "--implementations",
        type=_contestants,
        metavar="A,B",
        help=f"some of {', '.join(CONTESTANTS)} (default {', '.join(CPU_CONTESTANTS)}, on a GPU all)",
    )
    parser.add_argument("--git-sha", help="commit to record, for sources without a git folder")
    parser.add_argument("--output", type=Path, help="JSON file for the record")
    arguments = parser.parse_args(argv)
    on_gpu = arguments.device == "cuda"
    if arguments.dtype is None:
        arguments.dtype = "bfloat16" if on_gpu else "float32"
    if arguments.reps is None:
        arguments.reps = GPU_REPS if on_gpu else REPS
    if arguments.implementations is None:
        arguments.implementations = tuple(CONTESTANTS) if on_gpu else CPU_CONTESTANTS
    return arguments


def _contestants(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    unknown = set(names) - set(CONTESTANTS)
    if unknown:
        raise argparse.ArgumentTypeError(
            f"expected some of {', '.join(CONTESTANTS)}, got {', '.join(sorted(unknown))}"
        )
    return names


if __name__ == "__main__":
    raise SystemExit(main())
