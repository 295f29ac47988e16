"""Capture of a call as a CUDA graph, for the tuner and the benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

WARM_UP = 3


def capture(run: Callable[[], object], pool: Any = None) -> Callable[[], None]:
    """Capture the run as a CUDA graph, after three warm-up runs on a side stream, and return its replay.

    pool: `torch.cuda.graph_pool_handle()`, for memory that graphs share; None: memory of its own. A pool is of no use after a failure.

    Raises: what the run raises, and torch's error for an operation that no graph can contain; the present stream is then as before.
    """
    before, stream = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool):
            run()
    except Exception:
        _leave_capture(before)
        raise
    replay: Callable[[], None] = graph.replay
    return replay


def _leave_capture(stream: torch.cuda.Stream) -> None:
    """After a capture that failed: torch's random generator and present stream are still those of the capture."""
    torch.cuda.set_stream(stream)
    # A capture that succeeds leaves the generator as it should be. The caller must see why the first one failed.
    with suppress(Exception), torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device="cuda")
    torch.cuda.set_stream(stream)
