"""Markdown tables of GPU records: the targets beside what was measured, and every case."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cases import BASELINE, FORWARD, FORWARD_BACKWARD, TARGETS, Case, Target

Record = dict[str, Any]
TIMINGS = ("graph", "eager")
EAGER_PEFT = ("peft", "peft-bf16")
NOT_MEASURED = "not measured"


def targets_table(records: list[Record]) -> str:
    """For each record, or once without any, the four targets and the measured figures under CUDA graphs and eagerly.

    Of a target's cases the worst one counts. Of PEFT's two dtypes of adapters the faster one counts. "missed" stands where
    either timing is outside the target.
    """
    return "\n\n".join(_targets_of(record) for record in records or [None])


def case_tables(records: list[Record]) -> str:
    """For each record: all cases, the time to issue a call, Triton's GEMM against cuBLAS, and what has no time and why."""
    if not records:
        return f"No GPU record: {NOT_MEASURED}."
    return "\n\n".join(
        "\n\n".join(
            [f"### {record['environment']['gpu']}", _cases(record), _overhead(record)]
            + [part for part in (_eta(record), _absent(record)) if part]
            + [_origin(record)]
        )
        for record in records
    )


def _targets_of(record: Record | None) -> str:
    lines = [
        "| bf16 | forward / frozen linear | forward + backward / frozen linear | PEFT / fastlora | compiled PEFT / fastlora |",
        "| --- | --- | --- | --- | --- |",
    ]
    times = {} if record is None else _times(record)
    for target in TARGETS:
        lines.append(f"| {target.label} | {' | '.join(_target_cells(target, times))} |")
    if record is not None:
        lines += ["", _origin(record)]
    return "\n".join(lines)


def _target_cells(target: Target, times: dict[tuple[str, ...], float]) -> list[str]:
    trained = target.forward_backward is not None
    versus = FORWARD_BACKWARD if trained else FORWARD

    def over_linear(mode: str) -> Callable[[Case, str], float | None]:
        return lambda case, timing: _ratio(times, case, mode, timing, ("fastlora",), BASELINE)

    def over_fastlora(names: tuple[str, ...]) -> Callable[[Case, str], float | None]:
        return lambda case, timing: _ratio(times, case, versus, timing, names, "fastlora")

    cells = [_cell(target, target.forward, over_linear(FORWARD), at_most=True)]
    if target.forward_backward is None:
        cells.append("–")
    else:
        measured = over_linear(FORWARD_BACKWARD)
        cells.append(_cell(target, target.forward_backward, measured, at_most=True))
    cells.append(_cell(target, target.over_peft, over_fastlora(EAGER_PEFT), at_most=False))
    compiled = over_fastlora(("peft-compiled",))
    cells.append(_cell(target, target.over_compiled, compiled, at_most=False))
    return cells


def _cell(
    target: Target, bound: float, measure: Callable[[Case, str], float | None], *, at_most: bool
) -> str:
    """`≤ 1.08: 1.05 graph, 1.12 eager, missed`."""
    asked = f"≤ {bound:.2f}" if at_most else f"≥ {bound:.2f}"
    found = []
    missed = False
    for timing in TIMINGS:
        values = [measure(case, timing) for case in target.cases]
        if any(value is None for value in values):
            continue
        worst = max(v for v in values if v) if at_most else min(v for v in values if v)
        missed |= worst > bound if at_most else worst < bound
        found.append(f"{worst:.2f} {timing}")
    return f"{asked}: {', '.join(found) or NOT_MEASURED}{', missed' if missed else ''}"


def _ratio(
    times: dict[tuple[str, ...], float],
    case: Case,
    mode: str,
    timing: str,
    above: tuple[str, ...],
    below: str,
) -> float | None:
    """The fastest of `above` over `below`, or None if either has no time."""
    known = [times[key] for name in above if (key := (case.name, mode, timing, name)) in times]
    divisor = times.get((case.name, mode, timing, below))
    return min(known) / divisor if known and divisor is not None else None


def _times(record: Record) -> dict[tuple[str, ...], float]:
    return {
        (row["case"], row["mode"], row["timing"], row["backend"]): row["ms_p50"]
        for row in record["results"]
    }


def _cases(record: Record) -> str:
    """A row for each case and mode: the frozen layer's time, the others' ratios to it; graph / eager."""
    times = _times(record)
    others = [name for name in dict.fromkeys(name for *_, name in times) if name != BASELINE]
    lines = [
        f"| M×K → N, rank, dropout | mode | {BASELINE}, ms | {' | '.join(others)} |",
        "| --- | --- | --- |" + " --- |" * len(others),
    ]
    for case, mode in dict.fromkeys((case, mode) for case, mode, _, _ in times):
        cells = [_both(times, case, mode, name) for name in (BASELINE, *others)]
        lines.append(f"| {case.replace('x', '×')} | {mode} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _both(times: dict[tuple[str, ...], float], case: str, mode: str, name: str) -> str:
    cells = []
    for timing in TIMINGS:
        ms = times.get((case, mode, timing, name))
        if ms is None:
            cells.append("–")
        elif name == BASELINE:
            cells.append(f"{ms:.4g}")
        else:
            cells.append(f"{ms / times[case, mode, timing, BASELINE]:.2f}")
    return " / ".join(cells)


def _overhead(record: Record) -> str:
    lines = ["| call | mode | CPU time to issue it, µs |", "| --- | --- | --- |"]
    cells: dict[tuple[str, str], list[str]] = {}
    for row in record["call_overhead"]:
        cell = f"{row['backend']} {row['us_p50']:.0f}"
        cells.setdefault((row["case"], row["mode"]), []).append(cell)
    lines += [
        f"| {case.replace('x', '×')} | {mode} | {', '.join(row)} |"
        for (case, mode), row in cells.items()
    ]
    return "\n".join(lines)


def _eta(record: Record) -> str:
    graphs = [row for row in record["eta"] if row["timing"] == "graph"]
    if not graphs:
        return ""
    each = "; ".join(f"{row['case']}: {row['eta']:.2f}" for row in graphs)
    return f"Frozen linear / forced Triton, forward, LoRA's work included: {each}."


def _absent(record: Record) -> str:
    """One line for each contestant and reason, with the number of cases."""
    cases: dict[tuple[str, str, str], set[str]] = {}
    for row in record["absent"]:
        where = f" ({row['mode']}, {row['timing']})" if row["mode"] else ""
        reason = row["reason"].splitlines()[0] if row["reason"] else ""
        cases.setdefault((row["backend"] + where, row["kind"], reason), set()).add(row["case"])
    lines = [
        f"- {backend}, {len(names)} case{'s' if len(names) > 1 else ''}: {kind}: {reason}"
        for (backend, kind, reason), names in cases.items()
    ]
    return "\n".join(["Without a time:", "", *lines]) if lines else ""


def _origin(record: Record) -> str:
    facts = record["environment"]
    left = record["not_run"]
    return (
        f"{facts['gpu']}, driver {facts['driver']}, CUDA {facts['cuda']}, torch {facts['torch']}, Triton {facts['triton']}, "
        f"PEFT {facts['peft']}, medians of {facts['reps']} interleaved runs, commit {str(facts['git_sha'])[:12]}"
        f"{' with changes' if facts['dirty'] else ''}, {facts['date'][:10]} (`{facts['command']}`)."
        + (f" Not run: {', '.join(left)}." if left else "")
    )
