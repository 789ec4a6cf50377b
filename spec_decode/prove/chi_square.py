"""Pearson's chi-square: the statistic, its p-value, and the smallest bias that a test can see.

In: counts and what was expected of them. Out: numbers. Knows nothing of decoding. The distribution functions are
torch's incomplete gamma functions in float64 (tests/test_prove.py compares them with SciPy).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

LEAST = 5.0  # expected count below which the chi-square distribution does not describe a cell


class Fit(NamedTuple):
    """statistic: Σ (observed − expected)² / expected. freedom: degrees of freedom, cells − 1. p_value: the probability
    of a statistic at least as large if the expectation is right."""

    statistic: float
    freedom: int
    p_value: float


def groups(expected: np.ndarray) -> np.ndarray:
    """The group of every cell, int `[cells]`: cells expected fewer than `LEAST` times are pooled, rarest first, until a
    pool is expected `LEAST` times. Cells of probability 0 are in group −1. It depends on what is expected alone, so
    pooling cannot favour a result."""
    found = np.full(len(expected), -1)
    order = [int(i) for i in np.argsort(expected, kind="stable") if expected[i] > 0]
    group, mass, members = 0, 0.0, 0
    for i in order:
        found[i], mass, members = group, mass + float(expected[i]), members + 1
        if mass >= LEAST:
            group, mass, members = group + 1, 0.0, 0
    if members and group:  # the last pool fell short: it joins the one before it
        found[found == group] = group - 1
    return found


def chi_square(observed: np.ndarray, expected: np.ndarray) -> Fit:
    """The fit of counts `[cells]` to expected counts of the same sum. A count in a cell of probability 0 contradicts
    the expectation outright: the p-value is 0. With fewer than two groups there is nothing to compare, and it is 1."""
    group = groups(expected)
    if observed[group < 0].any():
        return Fit(math.inf, max(int(group.max()), 0), 0.0)
    freedom = int(group.max())
    if freedom < 1:
        return Fit(0.0, 0, 1.0)
    seen, due = (
        np.bincount(group[group >= 0], observed[group >= 0]),
        np.bincount(group[group >= 0], expected[group >= 0]),
    )
    statistic = float(((seen - due) ** 2 / due).sum())
    return Fit(statistic, freedom, survival(statistic, freedom))


def survival(x: float, freedom: int, noncentrality: float = 0.0) -> float:
    """P(X > x) for X of the chi-square distribution, central or not: a Poisson mixture of central ones."""
    half = torch.tensor(x / 2, dtype=torch.float64)
    if noncentrality == 0:
        return float(torch.special.gammaincc(torch.tensor(freedom / 2, dtype=torch.float64), half))
    mean = noncentrality / 2
    j = torch.arange(0, int(mean + 12 * math.sqrt(mean) + 40), dtype=torch.float64)
    weights = (j * math.log(mean) - mean - torch.lgamma(j + 1)).exp()
    return float((weights * torch.special.gammaincc(freedom / 2 + j, half.expand_as(j))).sum())


def detectable(count: int, freedom: int, level: float, power: float) -> float:
    """The smallest Cohen's w = √(Σ (p' − p)² / p) that `count` draws show with probability `power` in a test at
    `level`, by the noncentral chi-square distribution with noncentrality count · w² (Cohen 1988, chapter 7).

    A bias of total-variation distance d = ½ Σ |p' − p| has w ≥ 2 d (Cauchy–Schwarz), so every bias of distance w / 2
    or more is seen at least as often, whatever its form.
    """
    if freedom < 1:
        return math.inf
    edge = _root(lambda x: survival(x, freedom) - level, 0.0, 10.0 * freedom + 2000)
    return math.sqrt(_root(lambda size: power - survival(edge, freedom, size), 1e-9, 1e5) / count)


def _root(falling: object, low: float, high: float) -> float:
    """Where a function that falls from above 0 to below 0 between `low` and `high` is 0, by bisection."""
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > 0 else (low, middle)  # type: ignore[operator]
    return (low + high) / 2


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values of several tests: whichever are at most α may be refuted at once, and the probability of even
    one false refutation among them stays at most α (Holm 1979), however the tests depend on each other."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted
