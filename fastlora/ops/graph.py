"""Capture of a call as a CUDA graph, for the tuner and the benchmarks."""

from __future__ import annotations

from collections.abc import Callable

import torch

WARM_UP = 3


def capture(run: Callable[[], object]) -> Callable[[], None]:
    """Capture the run as a CUDA graph, after three warm-up runs on a side stream, and return its replay."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    replay: Callable[[], None] = graph.replay
    return replay
