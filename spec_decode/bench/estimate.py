"""Medians over prompts with their intervals.

In: positive figures (rates, ratios) by prompt, with the repeats of each. Out: `Estimate`. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median, stdev
from typing import Any

import numpy as np

from ..metrics import LEVEL
from ..student import quantile

REPLICATES = 1000
FEW = 6  # prompts; below, resampling them is no estimate of their spread


@dataclass(frozen=True, slots=True)
class Estimate:
    """The median over prompts of the medians over repeats, the ends of its 95 % interval (None where there are too few
    figures for one), and the worst and the best prompt with their figures."""

    median: float
    low: float | None
    high: float | None
    worst: float
    worst_prompt: str
    best: float
    best_prompt: str
    prompts: int

    @property
    def settled(self) -> str | None:
        """On which side of 1 the interval lies: "above", "below", or "around"; None without an interval."""
        if self.low is None or self.high is None:
            return None
        return "above" if self.low > 1 else "below" if self.high < 1 else "around"

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return asdict(self)


def estimate(groups: Mapping[str, Sequence[float]]) -> Estimate | None:
    """The estimate from the figures of each prompt's repeats, None where there are none.

    From `FEW` prompts on, the interval is that of a hierarchical percentile bootstrap: prompts are drawn with
    replacement, and for each of them its repeats. With fewer prompts it is Student's, of the logarithms of the prompts'
    medians; with a single prompt, of its repeats, and says nothing of other prompts. Both need three figures.
    """
    groups = {prompt: list(values) for prompt, values in groups.items() if len(values)}
    if not groups:
        return None
    middles = {prompt: median(values) for prompt, values in groups.items()}
    value = median(middles.values())
    low: float | None
    high: float | None
    if len(groups) >= FEW:
        low, high = _bootstrapped(list(groups.values()))
    else:
        low, high = _students(list(middles.values()) if len(groups) > 1 else next(iter(groups.values())))
    if low is not None and high is not None:
        low, high = min(low, value), max(high, value)
    worst, best = min(middles, key=middles.__getitem__), max(middles, key=middles.__getitem__)
    return Estimate(value, low, high, middles[worst], worst, middles[best], best, len(groups))


def scatter(groups: Mapping[Any, Sequence[float]]) -> float | None:
    """The standard deviation of the logarithms within groups, pooled: by what share two measurements of the same thing
    differ. None without two figures in any group."""
    squares = freedom = 0.0
    for values in groups.values():
        if len(values) > 1:
            logs = np.log(values)
            squares += float(((logs - logs.mean()) ** 2).sum())
            freedom += len(values) - 1
    return math.sqrt(squares / freedom) if freedom else None


def _bootstrapped(groups: Sequence[Sequence[float]]) -> tuple[float, float]:
    noise = np.random.default_rng(0)
    counts = np.array([len(values) for values in groups])
    table = np.full((len(groups), counts.max()), np.nan)
    for row, values in zip(table, groups, strict=True):
        row[: len(values)] = values
    drawn = noise.integers(len(groups), size=(REPLICATES, len(groups)))
    repeats = (noise.random((*drawn.shape, table.shape[1])) * counts[drawn][..., None]).astype(int)
    values = table[drawn[..., None], repeats]
    beyond = np.arange(table.shape[1]) >= counts[drawn][..., None]  # prompts that were measured less often
    middles = np.nanmedian(np.where(beyond, np.nan, values), -1) if beyond.any() else np.median(values, -1)
    low, high = np.quantile(np.median(middles, -1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _students(values: Sequence[float]) -> tuple[float | None, float | None]:
    if len(values) < 3 or min(values) <= 0:
        return None, None
    logs = [math.log(value) for value in values]
    half = quantile((1 + LEVEL) / 2, len(logs) - 1) * stdev(logs) / math.sqrt(len(logs))
    return math.exp(fmean(logs) - half), math.exp(fmean(logs) + half)
