"""Capture of a call as a CUDA graph, for the tuner and the benchmarks."""

from __future__ import annotations

from collections.abc import Callable
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
        torch.cuda.set_stream(before)  # torch leaves that of the capture
        with torch.cuda.graph(torch.cuda.CUDAGraph()):  # and its random generator in the capture
            torch.zeros(1, device="cuda")
        raise
    replay: Callable[[], None] = graph.replay
    return replay
