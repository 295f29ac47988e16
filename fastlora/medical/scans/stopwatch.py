"""The time that each step of a longer computation takes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Adds up the time of named steps; a step within another one counts for itself only."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._step: str | None = None
        self._since = 0.0

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Adds the time of the block to the step `name`."""
        outer = self._start(name)
        try:
            yield
        finally:
            self._start(outer)

    def _start(self, name: str | None) -> str | None:
        now = time.perf_counter()
        outer = self._step
        if outer is not None:
            self.seconds[outer] = self.seconds.get(outer, 0.0) + now - self._since
        self._step, self._since = name, now
        return outer

    def __str__(self) -> str:
        return ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())
