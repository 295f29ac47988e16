"""Runs a function in several processes that form a gloo group, on this machine.

The processes are forked off a server that has imported everything once, so that a group starts in a fraction of a second.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch.distributed as dist

TIME_LIMIT_S = 600
"""After which a process counts as hanging: many times what any takes on a busy machine, so that no test depends on spare time."""


def run_processes(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """The result or error of `function(*arguments)` in each process, its exit code if it died, or TimeoutError if it hangs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["tests.support.processes", "tests.support.tiny_run", "torch._dynamo"]
    )
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{Path(folder, 'store')}"
        processes, ends = [], []
        for rank in range(world):
            mine, its = context.Pipe(duplex=False)
            target = (rank, world, store, its, function, arguments)
            processes.append(context.Process(target=_rank, args=target))
            processes[-1].start()
            its.close()
            ends.append(mine)
        hanging = False
        for process in processes:
            process.join(TIME_LIMIT_S)
            if process.is_alive():
                hanging = True
                process.kill()
        if hanging:
            raise TimeoutError(f"a rank was still running after {TIME_LIMIT_S} s")
        # A process that died has sent nothing.
        return [
            process.exitcode if process.exitcode else end.recv()
            for process, end in zip(processes, ends, strict=True)
        ]


def _rank(
    rank: int,
    world: int,
    store: str,
    end: Connection,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    try:
        end.send(function(*arguments))
    except Exception as error:
        traceback.print_exc()
        end.send(error)
    end.close()
    os._exit(0)  # a group with a dead process need not be destroyed
