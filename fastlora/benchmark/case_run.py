"""Run one case: build and check the implementations, time them, and add their rows to the record."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from fastlora.benchmark.cases import BASELINE, FORWARD, FORWARD_BACKWARD, Case
from fastlora.benchmark.checks import Oracle, Wrong
from fastlora.benchmark.implementations import Builder, NotApplicable
from fastlora.benchmark.record import Record, without_folders
from fastlora.benchmark.timing import call_overhead, interleave, quantiles, rounds_for, sampler
from fastlora.benchmark.workload import (
    Round,
    Workload,
    calls_in_round,
    copies_needed,
    peak_bytes,
    round_of,
    saved_bytes,
)
from fastlora.errors import FastLoRAError
from fastlora.layers.linear import LoRALinear
from fastlora.ops.graph import capture
from fastlora.report.layer_table import explain


def failures() -> tuple[type[Exception], ...]:
    """What keeps an implementation from being timed and does not end the run: RuntimeError is torch's and CUDA's, the last ones come from building a kernel."""
    triton = sys.modules.get("triton.errors")  # only an imported Triton raises its errors
    kernel: tuple[type[Exception], ...] = () if triton is None else (triton.TritonError,)
    plain = (
        NotApplicable,
        Wrong,
        RuntimeError,
        ImportError,
        AssertionError,
        LookupError,
        TypeError,
        ValueError,
    )
    return (*plain, FastLoRAError, *kernel)


class CaseRun:
    """The implementations of one case, built and checked by the constructor, then timed in every mode."""

    def __init__(self, work: Workload, builders: Mapping[str, Builder], record: Record) -> None:
        self.work = work
        self.record = record
        self.layers: dict[str, list[nn.Module]] = {}
        self.saved: dict[str, int] = {}
        oracle = Oracle(work)
        for name, build in builders.items():
            try:
                layers = [
                    build(work.case, frozen, work.lora_a, work.lora_b) for frozen in work.frozen
                ]
                oracle.check(name, layers[0])
                self.saved[name] = saved_bytes(layers[0], partial(layers[0], work.x[0]))
            except failures() as error:
                self._absent(name, error)
            else:
                self.layers[name] = layers

    def time_all(self, reps: int) -> None:
        """Time every mode eagerly and, on a GPU, also as CUDA graphs."""
        for mode in self.work.case.modes:
            runs = {name: round_of(mode, each, self.work) for name, each in self.layers.items()}
            peaks = self._keep_running(runs, lambda run: peak_bytes(run, self.work.device), mode)
            self._time({name: runs[name] for name in peaks}, mode, "eager", reps, peaks)
            if self.work.device.type == "cuda":
                graphs = self._keep_running({name: runs[name] for name in peaks}, capture, mode)
                self._time(graphs, mode, "graph", reps, peaks)

    def time_calls(self, reps: int) -> None:
        """Time how long the CPU takes to issue a call, in microseconds."""
        for mode in (FORWARD, FORWARD_BACKWARD):
            runs = {name: round_of(mode, each, self.work) for name, each in self.layers.items()}
            for name, values in call_overhead(runs, reps, self.work.device).items():
                p20, p50, p80 = (round(value, 2) for value in quantiles(values))
                row: dict[str, Any] = {"case": self.work.case.name, "mode": mode, "backend": name}
                row |= {"us_p20": p20, "us_p50": p50, "us_p80": p80}
                self.record["call_overhead"].append(row)

    def _time(
        self, runs: dict[str, Round], mode: str, timing: str, reps: int, peaks: dict[str, Any]
    ) -> None:
        if BASELINE not in runs:  # it failed, as the record says, and ratios refer to it
            return
        case, sample = self.work.case, sampler(self.work.device)
        on_gpu = self.work.device.type == "cuda"
        rounds = rounds_for(runs[BASELINE], sample) if on_gpu else 1
        calls = calls_in_round(mode, self.work)
        rows = {}
        for name, values in interleave(runs, reps, sample, rounds).items():
            p20, p50, p80 = (value / calls for value in quantiles(values))
            rows[name] = {
                "op": "lora_linear",
                "case": case.name,
                "mode": mode,
                "timing": timing,
                "backend": name,
                "ms_p20": round(p20, 6),
                "ms_p50": round(p50, 6),
                "ms_p80": round(p80, 6),
                "saved_bytes": self.saved[name] if mode == FORWARD_BACKWARD else None,
                "peak_bytes": peaks[name],
                "choice": self._choice(name),
            }
        for row in rows.values():
            row["ratio_to_linear"] = round(row["ms_p50"] / rows[BASELINE]["ms_p50"], 4)
        self.record["results"] += rows.values()
        if mode == FORWARD and "fastlora-triton" in rows:
            triton = rows["fastlora-triton"]
            eta = round(rows[BASELINE]["ms_p50"] / triton["ms_p50"], 4)
            row = {"case": case.name, "timing": timing, "eta": eta, "choice": triton["choice"]}
            self.record["eta"].append(row)

    def _choice(self, name: str) -> str | None:
        layer = self.layers[name][0]
        if not isinstance(layer, LoRALinear):
            return None
        return str(explain(layer, self.work.x[0]))

    def _keep_running(
        self, runs: dict[str, Round], action: Callable[[Round], Any], mode: str
    ) -> dict[str, Any]:
        """Apply `action` to each run and return the results; a run that fails is recorded as absent in this mode."""
        done = {}
        for name, run in runs.items():
            try:
                done[name] = action(run)
            except failures() as error:
                self._absent(name, error, mode, "graph" if action is capture else "eager")
        return done

    def _absent(
        self, name: str, error: Exception, mode: str | None = None, timing: str | None = None
    ) -> None:
        add_absent(self.record, self.work.case, name, error, mode, timing)


def add_absent(
    record: Record,
    case: Case,
    name: str,
    error: Exception,
    mode: str | None = None,
    timing: str | None = None,
) -> None:
    """Record that an implementation has no time, and why."""
    kind = {NotApplicable: "absent", Wrong: "wrong"}.get(type(error), type(error).__name__)
    # A compiler error can have hundreds of lines; the first ones give the reason.
    reason = without_folders("\n".join(str(error).splitlines()[:5]))
    row = {"case": case.name, "mode": mode, "timing": timing, "backend": name}
    record["absent"].append({**row, "kind": kind, "reason": reason})
    if kind != "absent":
        print(f"{case.name}: {name} is not timed: {kind}: {reason}", file=sys.stderr)


def run_case(
    case: Case, device: torch.device, builders: Mapping[str, Builder], reps: int, record: Record
) -> None:
    """Run one case and add its results to the record."""
    on_gpu = device.type == "cuda"
    tf32_before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = case.dtype == "tf32"
    copies = 1
    if on_gpu and not case.overhead:
        copies = copies_needed(case, torch.cuda.get_device_properties(device).L2_cache_size)
    try:
        work = Workload(case, device, copies)
    except RuntimeError as error:  # its tensors do not fit in memory
        for name in builders:
            add_absent(record, case, name, error)
    else:
        run = CaseRun(work, builders, record)
        if case.overhead:
            run.time_calls(reps)
        else:
            run.time_all(reps)
        del run, work
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32_before
    if on_gpu:
        torch.compiler.reset()  # each case compiles for its own shape
        torch.cuda.empty_cache()
