"""Capture of a call as a CUDA graph, for the tuner and the benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

WARM_UP = 3


def capture(run: Callable[[], object], pool: Any = None) -> Callable[[], None]:
    """Capture the run as a CUDA graph, after three warm-up runs on a side stream, and return its replay.

    pool: `torch.cuda.graph_pool_handle()`, for memory that graphs share; None: memory of its own.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        run()
    replay: Callable[[], None] = graph.replay
    return replay
