"""Predicted time of each plan on a GPU, from bytes and FLOPs, used until a plan has been measured.

The time of a product of (m, k) and (k, n) is that of its arithmetic or of its traffic, whichever is longer, and that of its epilogue;
that of a pass is that of its traffic; a launch costs a fixed time. docs/design.md derives the formulas and compares them with an
H100, to which the constants were fitted.
"""

from __future__ import annotations

from fastlora.kernels.config import Architecture, Problem, fused_rank, rank_block

_LAUNCH = 2.5e-6  # seconds between dependent kernels
# A pass that multiplies what it reads reaches this share of the bandwidth that a copy reaches.
_PASS = 0.75
# S in the loop of `fused`: a narrow product is limited by the reading of x from shared memory, whatever its rank, then by arithmetic.
_NARROW, _PER_RANK = 0.14, 1 / 512
# An output that is added to is read too. The more steps the loop has, the less of that shows.
_ADDED_STEPS = 600
# Speed of a float32 product relative to a 16-bit one on tensor cores: (cuBLAS, ours).
_FLOAT_SPEED = {"ieee": (0.08, 0.04), "tf32": (0.5, 0.45)}


def forward_seconds(arch: Architecture, q: Problem) -> dict[str, float]:
    """Predicted seconds of y by each forward plan that can run the problem."""
    base, ours = _gemm(arch, q, q.m, q.n, q.k)
    low = _bytes(arch, q, q.m * q.k + q.m * q.rank) / _PASS + _LAUNCH
    update = _bytes(arch, q, 2 * q.m * q.n + q.m * q.rank) + _LAUNCH
    added = _gemm(arch, q, q.m, q.n, q.k, adds=True)[0]
    # S and y₀ in one launch, of programs that take the time of 32 rows each
    programs = -(-q.m // 32)
    traffic = _bytes(arch, q, 32 * programs * q.k) / _PASS + _bytes(arch, q, 32 * programs * q.n)
    started = traffic / min(1.0, programs / arch.sms) + _LAUNCH
    seconds = {
        "in_place": low + base + update,
        "accumulate": started + added,
        "split": low + ours,
    }
    all_ranks = q.rank <= fused_rank(q.itemsize, q.precision)
    if not q.dropout and all_ranks:
        share = _NARROW + rank_block(q.rank) * _PER_RANK
        seconds["fused"] = (ours - _LAUNCH) * (1 + share) + 2 * _LAUNCH  # A is cast before
    if q.m <= arch.decode_rows and all_ranks:
        # float32, about four splits, written and read
        partial = 8 * 4 * q.m * q.n / (arch.tbps * 1e12)
        seconds["decode"] = _bytes(arch, q, q.n * q.k) + partial + 2 * _LAUNCH
    return seconds


def dx_seconds(arch: Architecture, q: Problem) -> dict[str, float]:
    """Predicted seconds of dx = dy W + keep ∘ (dS A) by each plan for it, after the pass over x or, in `accumulate`, with it."""
    base, ours = _gemm(arch, q, q.m, q.k, q.n)
    update = _bytes(arch, q, 2 * q.m * q.k + q.m * q.rank) + _LAUNCH
    write = _bytes(arch, q, q.m * q.k + q.m * q.rank) + _LAUNCH
    added = _gemm(arch, q, q.m, q.k, q.n, adds=True)[0]
    return {"in_place": base + update, "accumulate": write - _LAUNCH + added, "split": ours}


def _gemm(
    arch: Architecture, q: Problem, m: int, n: int, k: int, *, adds: bool = False
) -> tuple[float, float]:
    """Seconds of a product in cuBLAS and in our GEMM kernel. adds: whether it is added to its output, which is then read too."""
    cublas, ours = (1.0, arch.eta) if q.itemsize == 2 else _FLOAT_SPEED[q.precision]
    arithmetic = 2 * m * n * k / (arch.tflops * 1e12)
    traffic = _bytes(arch, q, m * k + n * k + m * n)
    added = min(1.0, _ADDED_STEPS / k) * _bytes(arch, q, m * n) if adds else 0.0
    theirs, own = (1e-12 * picoseconds * m * n for picoseconds in arch.epilogues)
    # cuBLAS splits the inner dimension when there are fewer tiles than SMs; in our kernel some SMs are idle.
    filled = min(1.0, -(-m // 128) * -(-n // 128) / arch.sms)
    return (
        max(arithmetic / cublas, traffic) + theirs + added + _LAUNCH,
        (max(arithmetic / ours, traffic) + own) / filled + _LAUNCH,
    )


def _bytes(arch: Architecture, q: Problem, elements: int) -> float:
    return q.itemsize * elements / (arch.tbps * 1e12)
