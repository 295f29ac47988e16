"""Long runs in small: kills, merges, steps and injections, many times over; what was lost comes back as text, one line each.

Each function takes how often and returns what went wrong, so `tests/support/soak.py` can count it; tests ask for an empty list.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import time
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch

import fastlora
from fastlora.medical.training import checkpointing
from tests.support.models import Decoder
from tests.support.parity import check_call
from tests.support.tiny_run import assert_same_run, tiny_trainer

MIB = 2**20
THREADS_APART = 1e-3  # of a validation loss, relative, after 8 steps
TOLERATED = 4 * MIB  # of resident memory, which an allocator does not hold still


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


Refs = list[weakref.ref[torch.Tensor]]


def tensors_alive(outside: Sequence[weakref.ref[torch.Tensor]] = ()) -> Refs:
    """All tensors but those of `outside`."""
    gc.collect()
    others = {id(reference()) for reference in outside}
    tensors = (o for o in gc.get_objects() if issubclass(type(o), torch.Tensor))
    return [weakref.ref(tensor) for tensor in tensors if id(tensor) not in others]


def train_here(folder: str) -> None:
    """A run from where the folder stands to its end; the target of a process that will be killed."""
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        tiny_trainer(folder, resume="auto").train()


def kill_runs(folder: Path, kills: int, seed: int = 0) -> tuple[int, list[str]]:
    """SIGKILL at random moments of runs that go on each time, until so many hit. Every run ends as the unbroken one did, bit for
    bit, and after every kill each checkpoint can be read. Returns (the runs that ended, what was lost).
    """
    whole = folder / "whole"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        start = time.perf_counter()
        tiny_trainer(whole).train()
        seconds = time.perf_counter() - start
    finally:
        torch.set_num_threads(threads)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.endurance", "tests.support.faulty_run"])
    rng, hits, ended, lost = random.Random(seed), 0, 0, []
    while hits < kills or ended == 0:
        run = folder / f"run_{ended}"
        process = context.Process(target=train_here, args=(str(run),))
        process.start()
        if hits < kills:
            process.join(rng.uniform(0, 1.2 * seconds))
        else:
            process.join()
        if process.is_alive():
            process.kill()
            process.join()
            hits += 1
            for file in run.rglob("*.pt"):
                try:
                    checkpointing.read_checkpoint(file)
                except fastlora.FastLoRAError as error:
                    lost.append(f"kill {hits}: {error}")
            continue
        if process.exitcode != 0:
            lost.append(f"run {ended}: ended with {process.exitcode}")
        try:
            assert_same_run(run, whole)
        except AssertionError as error:
            lost.append(f"run {ended}: differs from the unbroken run: {error}")
        ended += 1
    return ended, lost


def merge_rounds(rounds: int, dtype: torch.dtype) -> list[str]:
    """Merge into a copy, go back to the adapters, merge again: the first merge, bit for bit, each time, and untouched adapters."""
    torch.manual_seed(0)
    model = Decoder().to(dtype).eval()
    fastlora.inject_lora(model, ["to_qkv", "to_out"], rank=4, alpha=8.0)
    for parameter in fastlora.get_lora_params(model):
        torch.nn.init.normal_(parameter, std=0.2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(4, 8).to(dtype)
    output = model(x)
    first = fastlora.merged_model(model).state_dict()
    lost = []
    for number in range(rounds):
        merged = fastlora.merged_model(model)
        if not all(torch.equal(value, first[name]) for name, value in merged.state_dict().items()):
            lost.append(f"{dtype}, round {number}: the merged weights moved")
        if not torch.equal(model(x), output):
            lost.append(f"{dtype}, round {number}: the unmerged model's output moved")
    if not all(torch.equal(value, before[name]) for name, value in model.state_dict().items()):
        lost.append(f"{dtype}: the model's own weights moved")
    return lost


def training_steps(steps: int) -> list[str]:
    """Steps of AdamW with dropout: no tensor and no memory is left behind by a step."""
    outside = tensors_alive()
    model = Decoder()
    fastlora.inject_lora(model, ["to_qkv", "to_out"], rank=4, alpha=8.0, dropout=0.1)
    fastlora.freeze_base_params(model)
    optimizer = torch.optim.AdamW(fastlora.get_lora_params(model), lr=1e-3)
    x = torch.randn(256, 8)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    for _ in range(max(20, steps // 10)):
        step()
    tensors, memory = len(tensors_alive(outside)), resident_bytes()
    for _ in range(steps):
        step()
    return _growth(f"{steps} steps", outside, tensors, memory)


def injections(rounds: int) -> list[str]:
    """Inject, run a backward pass, merge away: adapters are freed, and neither memory nor open files grow."""
    outside = tensors_alive()
    model = Decoder()
    lost = []

    def one() -> list[weakref.ref[torch.Tensor]]:
        fastlora.inject_lora(model, ["to_qkv", "to_out"], rank=4, alpha=8.0)
        parameters = fastlora.get_lora_params(model)
        model(torch.randn(16, 8)).square().mean().backward()
        fastlora.merge_lora_weights(model)
        model.zero_grad()
        return [weakref.ref(parameter) for parameter in parameters]

    for _ in range(20):
        one()
    tensors, memory, files = len(tensors_alive(outside)), resident_bytes(), open_files()
    for number in range(rounds):
        references = one()
        if number % 50 == 0:
            gc.collect()
            alive = sum(reference() is not None for reference in references)
            if alive:
                lost.append(f"round {number}: {alive} adapters are still alive")
    if open_files() != files:
        lost.append(f"{rounds} injections: {files} open files became {open_files()}")
    return lost + _growth(f"{rounds} injections", outside, tensors, memory)


def file_rounds(folder: Path, rounds: int) -> list[str]:
    """Save and load an adapter, and read a damaged one, again and again: no file stays open."""
    model = Decoder()
    fastlora.inject_lora(model, ["to_qkv"], rank=4, alpha=8.0)
    damaged = folder / "damaged.safetensors"
    damaged.write_bytes(b"\xff" * 100)
    torch.save({"a": 1}, folder / "damaged.pt")
    files, lost = open_files(), []
    for _ in range(rounds):
        fastlora.save_adapter(model, folder / "a.safetensors")
        fastlora.load_adapter(model, folder / "a.safetensors")
        for bad in (damaged, folder / "damaged.pt"):
            try:
                fastlora.load_adapter(model, bad)
                lost.append(f"{bad.name} was read")
            except fastlora.CheckpointError:
                pass
    if open_files() != files:
        lost.append(f"{rounds} rounds of files: {files} open files became {open_files()}")
    return lost


def _growth(what: str, outside: Refs, tensors: int, memory: int) -> list[str]:
    """outside: what was alive before the run; it may die during it, which must not hide what the run leaks."""
    lost = []
    now = len(tensors_alive(outside))
    if now > tensors:
        lost.append(f"{what}: {tensors} tensors became {now}")
    grown = resident_bytes() - memory
    if grown > TOLERATED:
        lost.append(f"{what}: memory grew by {grown / MIB:.1f} MiB")
    return lost


def repeated_runs(folder: Path, threads: tuple[int, ...]) -> list[str]:
    """The same training run under each number of threads, twice: the same bits under the same number, and the same validation up to
    float32 rounding under another (torch's sums over rows are then cut elsewhere).
    """
    before, lost, figures = torch.get_num_threads(), [], []
    try:
        for count in threads:
            runs = [folder / f"{count}_{again}" for again in ("a", "b")]
            histories = [tiny_trainer(run, threads=count).train() for run in runs]
            try:
                assert_same_run(*runs)
            except AssertionError:
                lost.append(f"{count} threads: two runs differ")
            figures.append([record["val"]["total"] for record in histories[0]])
    finally:
        torch.set_num_threads(before)
    for values in figures[1:]:
        apart = max(abs(a - b) / abs(b) for a, b in zip(values, figures[0], strict=True))
        if apart > THREADS_APART:
            lost.append(f"other numbers of threads are {apart:.1e} apart")
    return lost


def repeated_calls(calls: int) -> list[str]:
    """One layer's forward and backward pass under 1 and 2 threads: the dropout mask bit for bit, the rest as parity asks."""
    before, lost = torch.get_num_threads(), []
    try:
        for number in range(calls):
            results = []
            for count in (1, 2):
                torch.set_num_threads(count)
                results.append((dropped(number), dropped(number)))
                check_call(number)
            if not all(torch.equal(results[0][0], other) for pair in results for other in pair):
                lost.append(f"call {number}: another mask")
    finally:
        torch.set_num_threads(before)
    return lost


def dropped(number: int) -> torch.Tensor:
    """The dropout that a layer applies: with A the identity, W zero and B the identity, the output is D(x)."""
    x, eye = torch.ones(300, 96), torch.eye(96)
    seed = torch.tensor(number)
    return fastlora.lora_linear(x, torch.zeros(96, 96), None, eye, eye, 1.0, 0.3, seed)
