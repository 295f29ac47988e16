"""Time batches in which each sample has an adapter of its own, against PEFT's `adapter_names`.

    python benchmarks/mixed_batch.py [--reps 30] --output benchmarks/results/mixed-batch-cpu.json
    python benchmarks/mixed_batch.py --device cuda           # writes benchmarks/results/mixed-batch-<gpu>.json

The model is transformers' Llama with random weights, in eval mode and without gradients, with 8 adapters of rank 8 on all its linear layers; float32
on a CPU and bfloat16 on a GPU. In the order "runs" the samples of an adapter are neighbours, in "alternating" they never are. fastlora's time includes
entering and leaving `use_adapters`. Calls of all implementations are interleaved; they share the base weights.

Every implementation is checked first against each sample alone in float64, with its adapter as the only active one of PEFT's. One that fails is
recorded as absent.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from step_models import LLAMA_LAYERS, llama
from torch import Tensor, nn

import fastlora
from fastlora.benchmark.case_run import failures
from fastlora.benchmark.checks import Wrong
from fastlora.benchmark.implementations import NotApplicable
from fastlora.benchmark.record import (
    Record,
    environment,
    gpu_file_name,
    without_folders,
    write,
)
from fastlora.benchmark.timing import interleave, quantiles, sampler
from fastlora.benchmark.workload import Round

RESULTS = Path(__file__).resolve().parent / "results"
ADAPTERS = tuple(f"adapter{number}" for number in range(8))
RANK, ALPHA = 8, 16
CONTESTANTS = ("base", "fastlora", "peft", "peft-accelerated")
Call = Callable[[Tensor, list[str]], Tensor]


@dataclass(frozen=True)
class Size:
    """A Llama. hidden, intermediate, layers, heads, key_heads: its configuration. lengths: tokens of a sample in each case."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_heads: int
    lengths: tuple[int, ...]


SIZES = {
    "tiny": Size(32, 64, 1, 4, 2, (3,)),
    "cpu": Size(512, 1536, 4, 8, 4, (1, 64)),
    "cuda": Size(4096, 11008, 4, 32, 8, (1, 512)),
}


@dataclass(frozen=True)
class Batch:
    """The adapters of a batch. order: "runs" or "alternating"."""

    samples: int
    length: int
    order: str

    @property
    def names(self) -> list[str]:
        if self.order == "alternating":
            return [ADAPTERS[at % len(ADAPTERS)] for at in range(self.samples)]
        return [ADAPTERS[at * len(ADAPTERS) // self.samples] for at in range(self.samples)]

    def ids(self, device: torch.device) -> Tensor:
        count = self.samples * self.length
        return torch.arange(count, device=device).view(self.samples, self.length) * 7 % 256


def batches(size: Size) -> list[Batch]:
    kinds = ((8, "runs"), (16, "runs"), (16, "alternating"))
    return [Batch(count, length, order) for length in size.lengths for count, order in kinds]


def shared_copy(base: nn.Module) -> nn.Module:
    """A copy that has the same parameters."""
    return copy.deepcopy(base, {id(p): p for p in base.parameters()})


def peft_model(base: nn.Module) -> nn.Module:
    """`base` with all adapters as PEFT's, with random values."""
    import peft

    model: Any = None
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=list(LLAMA_LAYERS), init_lora_weights=False
    )
    for name in ADAPTERS:
        if model is None:
            model = peft.get_peft_model(shared_copy(base), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    return model.eval()  # type: ignore[no-any-return]


def fastlora_model(base: nn.Module, theirs: nn.Module) -> nn.Module:
    """`base` with all adapters as fastlora's, with the values of PEFT's."""
    model = shared_copy(base)
    peft_model: Any = theirs
    layers = dict(peft_model.base_model.model.named_modules())
    dtype = next(base.parameters()).dtype
    for name in ADAPTERS:
        config = fastlora.LoRAConfig(
            list(LLAMA_LAYERS), rank=RANK, alpha=ALPHA, adapter_dtype=dtype, match="exact"
        )
        fastlora.add_adapter(model, name, config)
        with fastlora.use_adapter(model, name), torch.no_grad():
            for path, layer in fastlora.named_lora_layers(model):
                layer.lora_A.copy_(layers[path].lora_A[name].weight)
                layer.lora_B.copy_(layers[path].lora_B[name].weight)
    return model.eval()


def calls_of(base: nn.Module, theirs: nn.Module) -> dict[str, Callable[[], Call]]:
    """Contestant → what builds its call."""

    def plain() -> Call:
        return lambda ids, names: base(ids).last_hidden_state

    def ours() -> Call:
        model = fastlora_model(base, theirs)

        def call(ids: Tensor, names: list[str]) -> Tensor:
            with fastlora.use_adapters(model, names):
                output: Tensor = model(ids).last_hidden_state
            return output

        return call

    def pefts() -> Call:
        return lambda ids, names: theirs(ids, adapter_names=names).last_hidden_state

    def accelerated() -> Call:
        twin = copy.deepcopy(theirs, {id(p): p for p in theirs.parameters()})
        fastlora.accelerate(twin)
        return lambda ids, names: twin(ids, adapter_names=names).last_hidden_state

    return dict(zip(CONTESTANTS, (plain, ours, pefts, accelerated), strict=True))


class MixedRun:
    """The implementations on one model: built by the constructor, then checked and timed for each batch."""

    def __init__(
        self, size: Size, names: tuple[str, ...], device: torch.device, record: Record
    ) -> None:
        torch.manual_seed(0)
        self.device, self.record = device, record
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        sizes = (size.hidden, size.intermediate, size.layers, size.heads, size.key_heads)
        base = llama(*sizes).to(device).eval().requires_grad_(False)
        for parameter in base.parameters():  # buffers, such as rotary frequencies, stay float32
            parameter.data = parameter.data.to(dtype)
        self.base = base
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            theirs = peft_model(base)
            self.exact = copy.deepcopy(theirs).double()
            self.calls: dict[str, Call] = {}
            for name, build in calls_of(base, theirs).items():
                if name in names:
                    self._keep(name, None, partial(self._build, name, build))

    def _build(self, name: str, build: Callable[[], Call]) -> None:
        self.calls[name] = build()

    @torch.no_grad()
    def time(self, batch: Batch, reps: int) -> None:
        """Check the implementations on the batch, and time those that are right."""
        ids, names = batch.ids(self.device), batch.names
        expected, plain = self._expected(ids, names)
        rounding = relative_error(self.base(ids).last_hidden_state, plain)
        allowed = 2 * rounding + (1e-4 if self.device.type == "cpu" else 1e-2)
        runs: dict[str, Round] = {}
        for name, call in self.calls.items():

            def keep(name: str = name, call: Call = call) -> None:
                error = relative_error(call(ids, names), plain if name == "base" else expected)
                if not error <= allowed:
                    raise Wrong(f"the output is off by {error:.2g}, allowed {allowed:.2g}")
                runs[name] = cast(Round, partial(call, ids, names))

            self._keep(name, batch, keep)
        for name, samples in interleave(runs, reps, sampler(self.device)).items():
            p20, p50, p80 = (round(value, 4) for value in quantiles(samples))
            self.record["results"].append(
                {**_case(batch), "backend": name, "ms_p20": p20, "ms_p50": p50, "ms_p80": p80}
                | {"ms_min": round(min(samples), 4), "ms_mean": round(statistics.mean(samples), 4)}
            )

    def _expected(self, ids: Tensor, names: list[str]) -> tuple[Tensor, Tensor]:
        """Each sample alone in float64: with its adapter, and without."""
        model: Any = self.exact
        with_adapter, without = [], []
        for at, name in enumerate(names):
            model.set_adapter(name)
            with_adapter.append(model(ids[at : at + 1]).last_hidden_state)
            with model.disable_adapter():
                without.append(model(ids[at : at + 1]).last_hidden_state)
        return torch.cat(with_adapter), torch.cat(without)

    def _keep(self, name: str, batch: Batch | None, action: Callable[[], None]) -> None:
        """Run `action`; if it fails, the implementation is recorded as absent for the batch."""
        try:
            action()
        except failures() as error:
            kind = {NotApplicable: "absent", Wrong: "wrong"}.get(type(error), type(error).__name__)
            reason = without_folders("\n".join(str(error).splitlines()[:5]))
            case = {} if batch is None else _case(batch)
            self.record["absent"].append({**case, "backend": name, "kind": kind, "reason": reason})
            print(f"{name} fails: {kind}: {reason}", file=sys.stderr)


def _case(batch: Batch) -> dict[str, Any]:
    return {"samples": batch.samples, "length": batch.length, "order": batch.order}


def relative_error(found: Tensor, expected: Tensor) -> float:
    error: float = ((found.double() - expected).norm() / expected.norm()).item()
    return error


def main(argv: list[str] | None = None) -> int:
    arguments = _arguments(argv)
    device, size = torch.device(arguments.device), SIZES[arguments.size or arguments.device]
    record: Record = {
        "kind": "mixed_batch",
        "environment": environment(device, arguments.reps, arguments.git_sha),
        "settings": {"adapters": len(ADAPTERS), "rank": RANK, "alpha": ALPHA, "size": vars(size)},
        "results": [],
        "absent": [],
        "not_run": [],
    }
    output = arguments.output
    if output is None and device.type == "cuda":
        output = RESULTS / f"mixed-batch-{gpu_file_name(record['environment']['gpu'])}"
    run = MixedRun(size, arguments.implementations, device, record)
    for batch in batches(size):
        before = len(record["results"])
        run.time(batch, arguments.reps)
        if output is not None:
            write(record, output)
        print_rows(record["results"][before:])
    failed = [absent["backend"] for absent in record["absent"]]
    return int(any(name in ("fastlora", "peft-accelerated") for name in failed))


def print_rows(rows: list[dict[str, Any]]) -> None:
    """A line for each implementation; the factor says how many times as long PEFT takes."""
    theirs = next((row["ms_p50"] for row in rows if row["backend"] == "peft"), None)
    for row in rows:
        factor = "" if theirs is None else f"  PEFT / this {theirs / row['ms_p50']:.2f}"
        print(
            f"{row['samples']:3} samples of {row['length']:4} tokens, {row['order']:11} {row['backend']:16} "
            f"{row['ms_p50']:9.3f} ms{factor}",
            flush=True,
        )


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="device")
    parser.add_argument(
        "--reps", type=int, default=30, help="timed repetitions (default: %(default)s)"
    )
    parser.add_argument(
        "--size", choices=list(SIZES), help="size of the model (default: that of the device)"
    )
    parser.add_argument(
        "--implementations",
        type=_contestants,
        default=CONTESTANTS,
        metavar="A,B",
        help=f"some of {', '.join(CONTESTANTS)} (default: all)",
    )
    parser.add_argument("--git-sha", help="commit to record, for sources without a git folder")
    parser.add_argument("--output", type=Path, help="JSON file for the record")
    return parser.parse_args(argv)


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
