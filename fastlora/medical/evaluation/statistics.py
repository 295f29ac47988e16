"""Uncertainty of means and of differences between methods: bootstrap intervals and paired tests.

The unit is a structure of a subject (the mean of its regions): regions of one structure are not
independent and would make an interval too narrow. Only in a group of fewer than LEAST structures it is the region. Structures of one subject share patient and
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


def statistics(structures: Sequence[Row], regions: Sequence[Row]) -> dict[str, Any]:
    """Means with intervals and paired tests over structures, the paired tests of each group, and each subject's means.

    structures: from `results.structure_means`. regions: the rows that they are the means of. Returns: `methods` (method → metric),
    `pairs` (a list of one, other and the metrics), `groups` (group → unit, and pairs of the group), `subjects` (subject → method → metric).
    """
    names = list(dict.fromkeys(row["method"] for row in structures))
    subjects = sorted({row["subject"] for row in structures})
    return {
        "unit": "a structure of a subject",
        "resamples": RESAMPLES,
        "methods": _means(structures, names),
        "pairs": _pairs(structures, names),
        "groups": {
            group: _group(
                [row for row in structures if row["group"] == group],
                [row for row in regions if row["group"] == group],
                names,
            )
            for group in sorted({row["group"] for row in structures})
        },
        "subjects": {
            subject: _means([row for row in structures if row["subject"] == subject], names)
            for subject in subjects
        },
    }


def _column(rows: Sequence[Row], method: str, key: str) -> list[float | None]:
    """A metric of a method, in an order that is the same for all methods."""
    place = ("subject", "structure", "region")
    ordered = sorted(rows, key=lambda row: tuple(row.get(name, "") for name in place))
    return [row[key] for row in ordered if row["method"] == method]


def _means(rows: Sequence[Row], methods: Sequence[str]) -> dict[str, Any]:
    return {m: {k: mean_with_interval(_column(rows, m, k)) for k in COMPARED} for m in methods}


def _pairs(rows: Sequence[Row], methods: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {"one": a, "other": b}
        | {k: paired_difference(_column(rows, a, k), _column(rows, b, k)) for k in COMPARED}
        for a, b in PAIRS
        if a in methods and b in methods
    ]


def _group(
    structures: Sequence[Row], regions: Sequence[Row], methods: Sequence[str]
) -> dict[str, Any]:
    """The paired tests of one group, over its structures if they are enough, otherwise over its regions."""
    count = len({(row["subject"], row["structure"]) for row in structures})
    enough = count >= LEAST
    return {
        "unit": "structure" if enough else "region",
        "structures": count,
        "pairs": _pairs(structures if enough else regions, methods),
    }
