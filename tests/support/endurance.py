"""Repeated kills, merges, training steps and injections; each function returns its failures as text.

Tests run few repetitions and expect an empty list; `tests/support/soak.py` runs many and counts the failures.
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
THREADS_APART = 1e-3  # largest relative difference of a validation loss after 8 steps
TOLERATED = 4 * MIB  # of resident memory, which an allocator does not keep constant


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


Refs = list[weakref.ref[torch.Tensor]]


def tensors_alive(outside: Sequence[weakref.ref[torch.Tensor]] = ()) -> Refs:
    """All live tensors except those of `outside`."""
    gc.collect()
    others = {id(reference()) for reference in outside}
    tensors = (o for o in gc.get_objects() if issubclass(type(o), torch.Tensor))
    return [weakref.ref(tensor) for tensor in tensors if id(tensor) not in others]


def train_here(folder: str) -> None:
    """Start or resume the run of the folder and train to its end; the target of a process that is killed."""
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        tiny_trainer(folder, resume="auto").train()


def kill_runs(folder: Path, kills: int, seed: int = 0) -> tuple[int, list[str]]:
    """Kill runs with SIGKILL at random moments and resume them, until `kills` processes were killed.

    Every run must equal the uninterrupted one bit for bit, and every checkpoint must be readable after every kill.
    Returns the number of finished runs, and the failures.
    """
    uninterrupted = folder / "uninterrupted"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        start = time.perf_counter()
        tiny_trainer(uninterrupted).train()
        seconds = time.perf_counter() - start
    finally:
        torch.set_num_threads(threads)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.endurance", "tests.support.faulty_run"])
    rng, hits, ended, failures = random.Random(seed), 0, 0, []
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
                    failures.append(f"kill {hits}: {error}")
            continue
        if process.exitcode != 0:
            failures.append(f"run {ended}: ended with {process.exitcode}")
        try:
            assert_same_run(run, uninterrupted)
        except AssertionError as error:
            failures.append(f"run {ended}: differs from the uninterrupted run: {error}")
        ended += 1
    return ended, failures


def merge_rounds(rounds: int, dtype: torch.dtype) -> list[str]:
    """Merge into a copy and use the adapters again, repeatedly: every merge equals the first bit for bit, and the adapters do not change."""
    torch.manual_seed(0)
    model = Decoder().to(dtype).eval()
    fastlora.inject_lora(model, ["to_qkv", "to_out"], rank=4, alpha=8.0)
    for parameter in fastlora.get_lora_params(model):
        torch.nn.init.normal_(parameter, std=0.2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(4, 8).to(dtype)
    output = model(x)
    first = fastlora.merged_model(model).state_dict()
    failures = []
    for number in range(rounds):
        merged = fastlora.merged_model(model)
        if not all(torch.equal(value, first[name]) for name, value in merged.state_dict().items()):
            failures.append(f"{dtype}, round {number}: the merged weights changed")
        if not torch.equal(model(x), output):
            failures.append(f"{dtype}, round {number}: the unmerged model's output changed")
    if not all(torch.equal(value, before[name]) for name, value in model.state_dict().items()):
        failures.append(f"{dtype}: the model's own weights changed")
    return failures


def training_steps(steps: int) -> list[str]:
    """Steps of AdamW with dropout: neither the number of tensors nor resident memory grows."""
    outside = tensors_alive()
    model = Decoder()
    fastlora.inject_lora(model, ["to_qkv", "to_out"], rank=4, alpha=8.0, dropout=0.1)
    fastlora.freeze_base_params(model)
    optimizer = torch.optim.AdamW(fastlora.get_trainable_params(model), lr=1e-3)
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
    """Inject, run a backward pass, merge: adapters are freed, and neither memory nor the number of open files grows."""
    outside = tensors_alive()
    model = Decoder()
    failures = []

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
                failures.append(f"round {number}: {alive} adapters are still alive")
    if open_files() != files:
        failures.append(f"{rounds} injections: {files} open files became {open_files()}")
    return failures + _growth(f"{rounds} injections", outside, tensors, memory)


def file_rounds(folder: Path, rounds: int) -> list[str]:
    """Save and load an adapter and read damaged ones, repeatedly: no file stays open."""
    model = Decoder()
    fastlora.inject_lora(model, ["to_qkv"], rank=4, alpha=8.0)
    damaged = folder / "damaged.safetensors"
    damaged.write_bytes(b"\xff" * 100)
    torch.save({"a": 1}, folder / "damaged.pt")
    files, failures = open_files(), []
    for _ in range(rounds):
        fastlora.save_adapter(model, folder / "a.safetensors")
        fastlora.load_adapter(model, folder / "a.safetensors")
        for file in (damaged, folder / "damaged.pt"):
            try:
                fastlora.load_adapter(model, file)
                failures.append(f"{file.name} was read")
            except fastlora.CheckpointError:
                pass
    if open_files() != files:
        failures.append(f"{rounds} rounds of files: {files} open files became {open_files()}")
    return failures


def _growth(what: str, outside: Refs, tensors: int, memory: int) -> list[str]:
    """outside: tensors alive before the run, which are not counted, so that freeing them cannot hide a leak."""
    failures = []
    now = len(tensors_alive(outside))
    if now > tensors:
        failures.append(f"{what}: {tensors} tensors became {now}")
    grown = resident_bytes() - memory
    if grown > TOLERATED:
        failures.append(f"{what}: memory grew by {grown / MIB:.1f} MiB")
    return failures


def repeated_runs(folder: Path, threads: tuple[int, ...]) -> list[str]:
    """The same training run twice under each number of threads.

    Runs with the same number must be equal bit for bit; with another number, for which torch splits sums differently,
    the validation losses must agree to `THREADS_APART`.
    """
    before, failures, figures = torch.get_num_threads(), [], []
    try:
        for count in threads:
            runs = [folder / f"{count}_{again}" for again in ("a", "b")]
            histories = [tiny_trainer(run, threads=count).train() for run in runs]
            try:
                assert_same_run(*runs)
            except AssertionError:
                failures.append(f"{count} threads: two runs differ")
            figures.append([record["val"]["total"] for record in histories[0]])
    finally:
        torch.set_num_threads(before)
    for values in figures[1:]:
        apart = max(abs(a - b) / abs(b) for a, b in zip(values, figures[0], strict=True))
        if apart > THREADS_APART:
            failures.append(
                f"validation losses under different numbers of threads differ by {apart:.1e}"
            )
    return failures


def repeated_calls(calls: int) -> list[str]:
    """A layer's forward and backward pass under 1 and 2 threads: the same dropout mask, and results within the rule of `check_call`."""
    before, failures = torch.get_num_threads(), []
    try:
        for number in range(calls):
            results = []
            for count in (1, 2):
                torch.set_num_threads(count)
                results.append((dropped(number), dropped(number)))
                check_call(number)
            if not all(torch.equal(results[0][0], other) for pair in results for other in pair):
                failures.append(f"call {number}: a different mask")
    finally:
        torch.set_num_threads(before)
    return failures


def dropped(number: int) -> torch.Tensor:
    """The dropout that a layer applies: with A = B = identity and W = 0 the output is D(x)."""
    x, eye = torch.ones(300, 96), torch.eye(96)
    seed = torch.tensor(number)
    return fastlora.lora_linear(x, torch.zeros(96, 96), None, eye, eye, 1.0, 0.3, seed)
