"""What measured prompts say about others: means and ratios of sums with intervals at any error.

In: figures of prompts, one value or one row of sums each. Out: values with the ends of their intervals. The unit is the
prompt, never the round or the repeat: rounds of a text are correlated, and repeats show the machine's noise only.
Medians, which tables show, are in `estimate`; these intervals are for decisions. Independent of models and of torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from ..student import quantile

LEVEL = 0.95  # of the intervals that are shown
REPLICATES = 1000
LEAST = 3  # values, for an interval


class Interval(NamedTuple):
    """A value and the ends of its interval, and how many prompts are behind it."""

    value: float
    low: float
    high: float
    prompts: int = 0


def mean(values: Sequence[float] | np.ndarray, error: float = 1 - LEVEL) -> Interval:
    """The mean of prompts with the interval of Student's t that misses the truth with probability `error`. Infinitely
    wide below two values."""
    data = np.asarray(values, float)
    if len(data) < 2:
        return Interval(float(data.mean()) if len(data) else math.nan, -math.inf, math.inf, len(data))
    middle, half = float(data.mean()), quantile(1 - error / 2, len(data) - 1) * spread(data) / math.sqrt(len(data))
    return Interval(middle, middle - half, middle + half, len(data))


def spread(values: Sequence[float] | np.ndarray) -> float:
    """Standard deviation of single prompts."""
    return float(np.std(np.asarray(values, float), ddof=1))


class Resampled:
    """Bootstrap over prompts for functions of sums: every replicate weighs the rows, one a prompt, anew."""

    def __init__(self, prompts: int, seed: int = 0) -> None:
        self.prompts = prompts
        self._weights = np.random.default_rng(seed).multinomial(prompts, [1 / prompts] * prompts, REPLICATES)

    def of(
        self, figure: Callable[[np.ndarray], np.ndarray], columns: np.ndarray, error: float = 1 - LEVEL
    ) -> Interval | None:
        """A figure of the columns' sums; None where it is not finite.

        The interval has the bootstrap's standard error and Student's t, since percentiles are too narrow for few
        prompts; it misses the truth with probability `error`.

        Args:
            figure: from sums `[…, columns]` to values `[…]`; not finite where there is nothing to divide by.
            columns: float `[prompts, columns]`.
        """
        freedom = self.prompts - 1
        with np.errstate(divide="ignore", invalid="ignore"):
            value = float(figure(columns.sum(0)))
            drawn = figure(self._weights @ columns)
        drawn = drawn[np.isfinite(drawn)]
        if not math.isfinite(value) or not len(drawn):
            return None
        if freedom == 0:
            return Interval(value, -math.inf, math.inf, self.prompts)
        scale = math.sqrt(self.prompts / freedom)  # the bootstrap's variance is (n − 1) / n of the unbiased one
        half = float(drawn.std()) * scale * quantile(1 - error / 2, freedom)
        return Interval(value, value - half, value + half, self.prompts)

    def ratio(self, of: np.ndarray, to: np.ndarray, error: float = 1 - LEVEL) -> Interval | None:
        """Σ of ÷ Σ to, float `[prompts]` each; None where there is nothing to divide by."""
        return self.of(lambda sums: sums[..., 0] / sums[..., 1], np.stack([of, to], axis=1), error)


def prompts_needed(values: Sequence[float] | np.ndarray, half_width: float, error: float) -> int:
    """How many prompts of this kind give an interval of that half-width at that error."""
    return max(LEAST, math.ceil((NormalDist().inv_cdf(1 - error / 2) * spread(values) / half_width) ** 2) + 2)
