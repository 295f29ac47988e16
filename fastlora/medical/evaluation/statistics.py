"""Uncertainty of means and of differences between methods: bootstrap intervals and paired tests.

The unit is a structure of a subject (the mean of its regions): regions of one structure are not
independent and would make an interval too narrow. Structures of one subject share patient and
scanner, so an interval is valid for structures like these, not for new patients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import bootstrap, wilcoxon

RESAMPLES = 10_000
SEED = 0
LEAST = 3  # the smallest number of structures for an interval or a test
COMPARED = ("dice", "hd95_mm", "nsd")  # these also decide whether a method is worse than another
PAIRS = (("lora", "base"), ("full", "base"), ("lora", "full"))

Row = Mapping[str, Any]


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % percentile interval of the mean, from RESAMPLES resamples with a fixed seed.

    None for fewer than LEAST values. Source: Efron and Tibshirani, An Introduction to the Bootstrap.
    """
    if len(values) < LEAST:
        return None
    settings = {"n_resamples": RESAMPLES, "random_state": np.random.default_rng(SEED)}
    low, high = bootstrap((values,), np.mean, method="percentile", **settings).confidence_interval
    return float(low), float(high)


def mean_with_interval(values: Sequence[float | None]) -> dict[str, Any]:
    """{'mean', 'low', 'high', 'n'} of the defined values; None if there are too few."""
    defined = [value for value in values if value is not None]
    interval = bootstrap_interval(defined) or (None, None)
    mean = float(np.mean(defined)) if defined else None
    return {"mean": mean, "low": interval[0], "high": interval[1], "n": len(defined)}


def paired_difference(one: Sequence[float | None], other: Sequence[float | None]) -> dict[str, Any]:
    """The mean of one − other, its interval, and p of a two-sided Wilcoxon signed-rank test.

    Pairs with an undefined value are excluded. p is 1 if no pair differs, None for fewer than LEAST.
    """
    both = zip(one, other, strict=True)
    differences = [a - b for a, b in both if a is not None and b is not None]
    result = mean_with_interval(differences)
    p: float | None = None
    if len(differences) >= LEAST:
        p = float(wilcoxon(differences).pvalue) if any(differences) else 1.0
    return {**result, "p": p}


def statistics(structures: Sequence[Row]) -> dict[str, Any]:
    """Means with intervals and paired tests over structures, and each subject's means.

    structures: from `results.structure_means`. Returns: `methods` (method → metric), `pairs` (a list
    of one, other and the metrics), `subjects` (subject → method → metric).
    """
    ordered = sorted(structures, key=lambda row: (row["subject"], row["structure"]))
    names = list(dict.fromkeys(row["method"] for row in structures))

    def column(method: str, key: str, subject: str | None = None) -> list[float | None]:
        mine = (row for row in ordered if row["method"] == method)
        return [row[key] for row in mine if subject in (None, row["subject"])]

    def means(subject: str | None = None) -> dict[str, Any]:
        return {m: {k: mean_with_interval(column(m, k, subject)) for k in COMPARED} for m in names}

    return {
        "unit": "a structure of a subject",
        "resamples": RESAMPLES,
        "methods": means(),
        "pairs": [
            {"one": a, "other": b}
            | {k: paired_difference(column(a, k), column(b, k)) for k in COMPARED}
            for a, b in PAIRS
            if a in names and b in names
        ],
        "subjects": {
            subject: means(subject) for subject in sorted({r["subject"] for r in ordered})
        },
    }
