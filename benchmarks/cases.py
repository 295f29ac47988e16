"""The shapes that are timed, and their targets."""

from __future__ import annotations

from dataclasses import dataclass

from fastlora.benchmark.cases import Case

RANKS = (4, 8, 16, 64, 128)


@dataclass(frozen=True)
class Target:
    """One row of the table of targets, which is met if all of its cases meet it.

    forward, forward_backward: upper bounds of the time of fastlora over that of the frozen linear layer.
    over_peft, over_compiled: lower bounds of the time of PEFT and of compiled PEFT over that of fastlora, in
    forward + backward, or in forward where forward + backward has no bound.
    """

    label: str
    cases: tuple[Case, ...]
    forward: float
    forward_backward: float | None
    over_peft: float
    over_compiled: float


def _llm(m: int, k: int, n: int, rank: int, p: float = 0.0, **more: bool) -> Case:
    return Case(m, k, n, rank, p, "bfloat16", bias=False, **more)


def _sam(m: int, k: int, n: int, rank: int, p: float = 0.0, **more: bool) -> Case:
    return Case(m, k, n, rank, p, "bfloat16", **more)


CPU_CASES = (
    Case(512, 256, 768, 4),
    Case(1024, 384, 1152, 8, 0.1),
    Case(4096, 768, 768, 8),
    Case(4096, 768, 2304, 8, 0.1),
    Case(2048, 1024, 4096, 16),
    Case(1, 64, 64, 4, overhead=True),
    Case(1, 64, 64, 4, 0.1, overhead=True),
)

_TRAIN_4096 = _llm(8192, 4096, 4096, 16, 0.1, quick=True, step=True)
_TRAIN_1024 = _sam(32768, 1024, 1024, 16, quick=True, step=True)
_TRAIN_768 = _sam(4096, 768, 768, 4, quick=True, step=True)
_DECODE = tuple(_llm(m, 4096, 4096, 16, quick=True) for m in (1, 8, 32))

TARGETS = (
    Target("M 8192, K = N = 4096, R 16, p 0.1", (_TRAIN_4096,), 1.08, 1.11, 1.55, 1.4),
    Target("M 32768, K = N = 1024, R 16, p 0", (_TRAIN_1024,), 1.10, 1.32, 2.9, 2.3),
    Target("M 4096, K = N = 768, R 4, p 0", (_TRAIN_768,), 1.15, 1.6, 2.8, 2.0),
    Target("decode M ≤ 32, K = N = 4096, R 16, p 0", _DECODE, 1.08, None, 2.5, 1.3),
)

# The targets come first, so that a run cut short by its budget has them. One quick case has an odd M, and a K and an N
# that no tile divides: powers of two alone would give results that are too good.
CUDA_CASES = (
    _TRAIN_4096,
    _TRAIN_1024,
    _TRAIN_768,
    *_DECODE,
    _sam(1, 64, 64, 4, quick=True, overhead=True),
    _sam(1, 64, 64, 4, 0.1, quick=True, overhead=True),
    _llm(8192, 4096, 14336, 16, quick=True),
    _sam(5003, 1000, 3000, 8, 0.1, quick=True),
    _llm(8192, 4096, 4096, 64, 0.1, quick=True),
    # language models
    _llm(8192, 4096, 4096, 16),
    _llm(8192, 4096, 4096, 128),
    _llm(8192, 4096, 11008, 16, 0.1),
    _llm(8191, 4096, 11008, 8),
    _llm(8192, 4096, 14336, 64, 0.1),
    _llm(8192, 8192, 8192, 16),
    _llm(8192, 8192, 8192, 64, 0.1),
    # SAM 3D
    _sam(4096, 768, 3072, 4, 0.1),
    _sam(16384, 1024, 4096, 8),
    _sam(16384, 4096, 1024, 8, 0.1),
    _sam(32768, 1024, 3072, 16, 0.1),
    # decoding with a large rank, and with dropout left on
    _llm(8, 4096, 4096, 64),
    _llm(8, 4096, 4096, 16, 0.1),
    # other dtypes
    Case(8192, 4096, 4096, 16, 0.1, "float16", bias=False),
    Case(4096, 768, 768, 4, 0.0, "float16"),
    Case(4096, 1024, 4096, 16, 0.1, "float32"),
    Case(4096, 1024, 4096, 16, 0.1, "tf32"),
)
