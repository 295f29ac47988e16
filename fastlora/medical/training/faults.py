"""External causes that stop a training run: Ctrl-C, too little memory, a full disk, a killed data loader process."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
from torch import nn

from fastlora import estimate, named_lora_layers
from fastlora.errors import FastLoRAError, TrainingError


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a CPU or a GPU."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


@contextmanager
def explained(last: Path, out_of_memory: Callable[[], str]) -> Iterator[None]:
    """Context manager: turns errors with an external cause into a TrainingError of one line.

    last: the run's checkpoint. out_of_memory: describes the memory needed, called after it ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if isinstance(error, FastLoRAError):
            raise
        if is_out_of_memory(error):
            reason = f"out of memory: {out_of_memory()}"
        elif "DataLoader worker" in str(error):
            reason = f"a data loader process died ({str(error).splitlines()[0]})"
        elif isinstance(error, OSError):
            reason = f"cannot read or write: {error}"
        else:
            raise
        kept = f"{last} is kept; continue with --resume" if last.is_file() else "nothing was saved"
        raise TrainingError(f"{reason}; {kept}") from error


def memory_text(model: nn.Module, rows: int) -> str:
    """The least memory of a step, as text: by `fastlora.estimate`, or from the parameters alone in a model without adapters."""
    if any(True for _ in named_lora_layers(model)):
        mib = estimate(model, max(1, rows)).total_bytes / 2**20
        return f"weights, gradients, optimizer and the activations that adapted layers save for {rows:,} tokens take {mib:.1f} MiB"
    mib = sum(p.nbytes * (4 if p.requires_grad else 1) for p in model.parameters()) / 2**20
    return f"weights, gradients and optimizer take {mib:.1f} MiB, without activations"


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Context manager: the first Ctrl-C sets a flag, so that the run stops where it can save; the second stops it at once.

    So does SIGTERM if it interrupts the process, as in the commands; the KeyboardInterrupt that leaves the context holds its number. A
    signal that is ignored, or that ends the process at once, is unchanged; so are both with several processes, and outside the
    main thread. Yields a function that returns the flag.
    """
    received: list[int] = []
    if dist.is_initialized() or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {n: signal.getsignal(n) for n in numbers if callable(signal.getsignal(n))}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        restore()

    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: bool(received)
    except KeyboardInterrupt as stop:
        if received and not stop.args:
            raise KeyboardInterrupt(received[0]) from None
        raise
    finally:
        restore()


def ignore_interrupts(_: int) -> None:
    """Makes a data loader process ignore Ctrl-C and SIGTERM, which terminals and clusters send to it too: the run still needs its batches."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
