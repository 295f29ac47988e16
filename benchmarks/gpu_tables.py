"""Markdown tables of GPU records: the targets with the measurements, and every case."""

from __future__ import annotations

from typing import Any

from cases import TARGETS, Target

from fastlora.benchmark.cases import BASELINE, FORWARD, FORWARD_BACKWARD, Case, readable
from fastlora.benchmark.record import gpu_file_name

Record = dict[str, Any]
Times = dict[tuple[str, ...], float]  # (case, mode, timing, implementation) -> ms per call
TIMINGS = ("graph", "eager")
EAGER_PEFT = ("peft", "peft-bf16")
AT_MOST, AT_LEAST = "≤", "≥"
NOT_MEASURED = "not measured"


def targets_table(records: list[Record]) -> str:
    """For each record, the targets and the ratios measured under CUDA graphs and eagerly; without a record, the targets alone.

    A ratio is that of the worst of a target's cases, with the faster of PEFT's two adapter dtypes. "missed" marks a target
    that either timing does not reach.
    """
    return "\n\n".join(_targets_of(record) for record in records) or _targets_of(None)


def speed_table(records: list[Record]) -> str:
    """For each record, the training cases of the targets: milliseconds as CUDA graphs, and ratios to PEFT.

    PEFT's figure is the smaller one of its two adapter dtypes. A case that was not timed has no row.
    """
    return "\n\n".join(map(_speed_of, records)) or f"No GPU record: {NOT_MEASURED}."


def _speed_of(record: Record) -> str:
    lines = [
        "| M×K → N, rank, dropout | frozen linear | fastlora | PEFT / fastlora | the same, PEFT's default adapters | compiled PEFT / fastlora | peak memory, PEFT / fastlora |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    times, peaks = _times(record), _times(record, "peak_bytes")
    for target in TARGETS:
        for case in target.cases if target.forward_backward is not None else ():
            key = (case.name, FORWARD_BACKWARD, "graph")
            if (*key, "fastlora") not in times:
                continue
            cells = [f"{times[(*key, name)]:.3g} ms" for name in (BASELINE, "fastlora")]
            for found, timing, above in (
                (times, "graph", EAGER_PEFT),
                (times, "graph", ("peft",)),
                (times, "graph", ("peft-compiled",)),
                (peaks, "eager", EAGER_PEFT),
            ):
                ratio = _ratio(found, case, FORWARD_BACKWARD, timing, above, "fastlora")
                cells.append("–" if ratio is None else f"{ratio:.2f}×")
            lines.append(f"| {readable(case.name)} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", _short_origin(record)])


def calls_table(records: list[Record]) -> str:
    """The time in which the CPU issues a call, for each record of `eager_calls.py`."""
    return "\n\n".join(map(_calls, records)) or f"No GPU record: {NOT_MEASURED}."


def _calls(record: Record) -> str:
    lines = [
        "| M×K → N, rank, dropout | pass | frozen linear | fastlora | PEFT | PEFT / fastlora |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    times: dict[tuple[str, str], dict[str, float]] = {}
    for row in record["results"]:
        if row.get("own_thread", True):  # autograd's default
            times.setdefault((row["case"], row["what"]), {})[row["backend"]] = row["us"]
    for (case, what), us in times.items():
        linear, mine, peft = (us[name] for name in (BASELINE, "fastlora-bf16", "peft-bf16"))
        cells = f"{linear:.0f} µs | {mine:.0f} µs | {peft:.0f} µs | {peft / mine:.2f}×"
        lines.append(f"| {readable(case)} | {what} | {cells} |")
    facts = record["environment"]
    lines.append(
        f"\nAdapters in bfloat16. {facts['gpu']}, {facts['cpu']}, torch {facts['torch']}, Triton {facts['triton']}, PEFT {facts['peft']}, "
        f"the least of five means of {facts['reps']} calls (`{facts['command']}`, `benchmarks/results/h100/calls.json`)."
    )
    return "\n".join(lines)


def case_tables(records: list[Record]) -> str:
    """For each record: all cases, the time to issue a call, Triton relative to cuBLAS, and what was not timed and why."""
    if not records:
        return f"No GPU record: {NOT_MEASURED}."
    return "\n\n".join(
        "\n\n".join(
            [f"### {record['environment']['gpu']}", _cases(record)]
            + [p for p in (_overhead(record), _eta(record), _absent(record["absent"])) if p]
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
        ours = [r for r in record["absent"] if r["backend"] == "fastlora"]
        lines += ["", _origin(record), *(["", _absent(ours)] if ours else [])]
    return "\n".join(lines)


def _target_cells(target: Target, times: Times) -> list[str]:
    versus = FORWARD if target.forward_backward is None else FORWARD_BACKWARD
    bounds = (
        (AT_MOST, target.forward, FORWARD, ("fastlora",), BASELINE),
        (AT_MOST, target.forward_backward, FORWARD_BACKWARD, ("fastlora",), BASELINE),
        (AT_LEAST, target.over_peft, versus, EAGER_PEFT, "fastlora"),
        (AT_LEAST, target.over_compiled, versus, ("peft-compiled",), "fastlora"),
    )
    return [
        "–" if bound is None else _cell(times, target.cases, sign, bound, mode, above, below)
        for sign, bound, mode, above, below in bounds
    ]


def _cell(
    times: Times,
    cases: tuple[Case, ...],
    sign: str,
    bound: float,
    mode: str,
    above: tuple[str, ...],
    below: str,
) -> str:
    """A cell such as `≤ 1.08: 1.05 graph, 1.12 eager, missed`: the fastest of `above` divided by `below`, in the worst case."""
    found = []
    missed = False
    for timing in TIMINGS:
        ratios = [_ratio(times, case, mode, timing, above, below) for case in cases]
        known = [ratio for ratio in ratios if ratio is not None]
        if len(known) < len(cases):
            continue
        worst = max(known) if sign == AT_MOST else min(known)
        missed |= worst > bound if sign == AT_MOST else worst < bound
        found.append(f"{worst:.2f} {timing}")
    measured = ", ".join(found) or NOT_MEASURED
    return f"{sign} {bound:.2f}: {measured}{', missed' if missed else ''}"


def _ratio(
    times: Times, case: Case, mode: str, timing: str, above: tuple[str, ...], below: str
) -> float | None:
    known = [times[key] for name in above if (key := (case.name, mode, timing, name)) in times]
    divisor = times.get((case.name, mode, timing, below))
    return min(known) / divisor if known and divisor is not None else None


def _times(record: Record, figure: str = "ms_p50") -> Times:
    """The figure of each row that has it."""
    return {
        (row["case"], row["mode"], row["timing"], row["backend"]): row[figure]
        for row in record["results"]
        if row.get(figure) is not None
    }


def _cases(record: Record) -> str:
    """A row for each case and mode: the frozen layer's time and the ratios of the others to it, graph / eager."""
    times = _times(record)
    others = [name for name in dict.fromkeys(name for *_, name in times) if name != BASELINE]
    lines = [
        f"| M×K → N, rank, dropout | mode | {BASELINE}, ms | {' | '.join(others)} |",
        "| --- | --- | --- |" + " --- |" * len(others),
    ]
    for case, mode in dict.fromkeys((case, mode) for case, mode, _, _ in times):
        cells = [_both(times, case, mode, name) for name in (BASELINE, *others)]
        lines.append(f"| {readable(case)} | {mode} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _both(times: Times, case: str, mode: str, name: str) -> str:
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
    if not record["call_overhead"]:
        return ""
    lines = ["| call | mode | CPU time to issue it, µs |", "| --- | --- | --- |"]
    cells: dict[tuple[str, str], list[str]] = {}
    for row in record["call_overhead"]:
        cell = f"{row['backend']} {row['us_p50']:.0f}"
        cells.setdefault((row["case"], row["mode"]), []).append(cell)
    lines += [
        f"| {readable(case)} | {mode} | {', '.join(row)} |" for (case, mode), row in cells.items()
    ]
    return "\n".join(lines)


def _eta(record: Record) -> str:
    graphs = [row for row in record["eta"] if row["timing"] == "graph"]
    if not graphs:
        return ""
    each = "; ".join(f"{readable(row['case'])}: {row['eta']:.2f}" for row in graphs)
    return (
        f"Time of the frozen linear layer / forced Triton, forward, LoRA update included: {each}."
    )


def _absent(rows: list[dict[str, Any]]) -> str:
    """A line for each implementation and reason, with the number of cases."""
    cases: dict[tuple[str, str, str], set[str]] = {}
    for row in rows:
        where = f" ({row['mode']}, {row['timing']})" if row["mode"] else ""
        reason = row["reason"].partition("\n")[0]
        cases.setdefault((row["backend"] + where, row["kind"], reason), set()).add(row["case"])
    lines = [
        f"- {name}, {len(found)} case{'s' if len(found) > 1 else ''}: {kind}: {reason}"
        for (name, kind, reason), found in cases.items()
    ]
    return "\n".join(["Not timed:", "", *lines]) if lines else ""


def _short_origin(record: Record) -> str:
    facts = record["environment"]
    return (
        f"{facts['gpu']}, torch {facts['torch']}, Triton {facts['triton']}, PEFT {facts['peft']}, medians of {facts['reps']} "
        f"interleaved runs (`benchmarks/results/{gpu_file_name(facts['gpu'])}`)."
    )


def _origin(record: Record) -> str:
    facts = record["environment"]
    left = record["not_run"]
    return (
        f"{facts['gpu']}, driver {facts['driver']}, CUDA {facts['cuda']}, torch {facts['torch']}, Triton {facts['triton']}, "
        f"PEFT {facts['peft']}, medians of {facts['reps']} interleaved runs, commit {str(facts['git_sha'])[:12]}"
        f"{' with changes' if facts['dirty'] else ''}, {facts['date'][:10]} (`{facts['command']}`)."
        + (f" Not run: {', '.join(left)}." if left else "")
    )
