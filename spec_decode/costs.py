"""Cost of a round: a posterior with the figures measured at load as prior and the rounds of a race as evidence.

In: `Costs` and the rounds of a race. Out: the posterior of the cost of a round for every draft length, in baseline
steps, and `Costs` for the next race to start from. Independent of models and of torch.

The logarithms of the costs without the draft have a Gaussian prior around the load-time figures and Gaussian evidence,
so the posterior is in closed form, and evidence for one draft length moves its neighbours. The standard deviations of
the prior grow with `Costs.doubt`, the scatter of the load-time samples: `AT_ZERO` for a plain step of the speculative
lane; `DRAFTED` for what drafting adds, shared by all lengths, since load on the machine while costs are measured
affects all of them; `NEIGHBOURS` between one length and the next; and where samples scattered more than on an idle
machine, an independent part for each length. The costs of drafts have one common factor over the load-time figures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from .events import BASELINE, Costs, Round
from .settings import MAX_DRAFT_LENGTH

AT_ZERO = 0.03
DRAFTED, NEIGHBOURS = 0.05, 0.016  # plus the shares of the doubt below
DRAFTED_DOUBT, NEIGHBOURS_DOUBT, EACH_DOUBT = 1.0, 0.25, 0.6
IDLE = 0.05  # the greatest doubt on an idle machine
TRIMMED = 0.2  # share of the rounds that is left out at either end: a virtual machine pauses occasionally
NEAR = 15  # the median of so many baseline steps around a round is the speed of the machine at that time
CORRELATED = 2.0  # variance factor of a mean, since consecutive rounds are correlated
LEAST_SCATTER = 0.03  # lower bound of the standard deviation of single rounds
DRAFT_PRIOR = 0.1  # standard deviation of the logarithm of the cost of a draft, plus the doubt


@dataclass(frozen=True)
class RoundCosts:
    """Posterior of the cost of a round, in baseline steps, for draft lengths 0…`MAX_DRAFT_LENGTH`.

    The cost of the draft is separate from the rest of the round. With two drafters the share of each depends on the
    draft length, and a common cost would mix them.

    Attributes:
        mean: `[17]`, of the logarithm of the cost without the draft.
        covariance: `[17, 17]`, of the same.
        draft: `[17]`, the cost of the draft, averaged over drafters.
        draft_error: its relative standard error.
        drafters: the cost of each drafter's drafts ÷ that average, by name, for those that made any.
        monotone: a longer draft is never cheaper; costs without the draft are made so by isotonic regression, weighted
            by precision.
    """

    mean: np.ndarray
    covariance: np.ndarray
    draft: np.ndarray
    draft_error: float
    drafters: dict[str, float]
    monotone: bool

    @property
    def ratios(self) -> np.ndarray:
        """The costs `[17]`, in baseline steps."""
        return self._ordered(np.exp(self.mean)) + self.draft

    @property
    def passes(self) -> np.ndarray:
        """The costs without the draft `[17]`, in baseline steps."""
        return self._ordered(np.exp(self.mean))

    def draws(self, count: int, noise: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Samples from the posterior: the costs without the draft and those of the draft, `[count, 17]` each."""
        drawn = np.exp(noise.multivariate_normal(self.mean, self.covariance, count, method="eigh"))
        drafts = self.draft * np.exp(self.draft_error * noise.standard_normal((count, 1)))
        return np.stack([self._ordered(values) for values in drawn]), drafts

    def _ordered(self, values: np.ndarray) -> np.ndarray:
        return isotonic(values, 1 / np.diag(self.covariance)) if self.monotone else values


def round_costs(prior: Costs, rounds: Sequence[Round], monotone: bool = True) -> RoundCosts:
    """The posterior after these rounds of both lanes, in chronological order.

    Each round is divided by the median of the baseline steps around it, so that changes in the speed of the machine
    cancel. Rounds with the same number of drafted tokens give a trimmed mean. The last round of a lane is left out:
    where it ends the text, more tokens were verified than it holds.
    """
    lengths = np.arange(MAX_DRAFT_LENGTH + 1)
    drafts = np.array([prior.draft(int(n)) for n in lengths])
    mean = np.log([prior.round(int(n)) for n in lengths] - drafts)
    covariance = np.full((len(lengths), len(lengths)), AT_ZERO**2)
    drafted, neighbours = DRAFTED + DRAFTED_DOUBT * prior.doubt, NEIGHBOURS + NEIGHBOURS_DOUBT * prior.doubt
    covariance[1:, 1:] += drafted**2 + neighbours**2 * np.minimum.outer(lengths[1:], lengths[1:])
    covariance[1:, 1:] += (EACH_DOUBT * max(prior.doubt - IDLE, 0.0)) ** 2 * np.eye(len(lengths) - 1)
    evidence = _Evidence.of(rounds)
    if evidence.passes:
        at = np.array(sorted(evidence.passes))
        values, variances = (np.array([evidence.passes[n][i] for n in at]) for i in range(2))
        gain = np.linalg.solve(covariance[np.ix_(at, at)] + np.diag(variances), covariance[at]).T
        mean = mean + gain @ (values - mean[at])
        covariance = covariance - gain @ covariance[at]
    scales = {name: (len(drafting), *_draft_scale(prior, drafting)) for name, drafting in evidence.drafts.items()}
    scale, error = _average(list(scales.values()))
    relative = {name: own / scale for name, (_, own, _) in scales.items()}
    return RoundCosts(mean, covariance, scale * drafts, error, relative, monotone)


def learned(prior: Costs, rounds: Sequence[Round], monotone: bool = True, drafter: str = "") -> Costs:
    """`prior` updated with the rounds of a race, so that `Costs.round` gives the ratios of the posterior.

    There is one exception: the cost of drafts is that of the drafter whose name is given, as in the prior. Where it
    made none of them it stays as it was, for the next race may use it more often.
    """
    found = round_costs(prior, rounds, monotone)
    steps = [r.seconds for r in rounds if r.lane == BASELINE and r.index > 0 and r.seconds > 0]
    step = trimmed_mean(np.array(steps)) if len(steps) >= NEAR else prior.step_seconds
    other = max(float(found.passes[0]) - 1, 0.0)
    scale, _ = _draft_scale(prior, _Evidence.of(rounds).drafts.get(drafter, []))
    passes = np.maximum(found.passes - other, 1.0)
    passes[0] = 1.0
    passes = isotonic(passes) if monotone else passes
    return replace(
        prior,
        step_seconds=step,
        verify_ratio=tuple(passes.tolist()),
        draft_ratio=scale * prior.draft_ratio,
        draft_start=scale * prior.draft_start,
        other_ratio=other,
    )


def isotonic(values: Sequence[float] | np.ndarray, weights: Sequence[float] | np.ndarray | None = None) -> np.ndarray:
    """The non-decreasing sequence closest to `values` in weighted least squares, by the pool adjacent violators
    algorithm (Ayer et al. 1955)."""
    pools: list[tuple[float, float, int]] = []  # mean, weight, count
    for i, value in enumerate(values):
        mean, weight, count = float(value), 1.0 if weights is None else float(weights[i]), 1
        while pools and pools[-1][0] > mean:
            last_mean, last_weight, last_count = pools.pop()
            mean = (last_mean * last_weight + mean * weight) / (last_weight + weight)
            weight, count = weight + last_weight, count + last_count
        pools.append((mean, weight, count))
    return np.concatenate([np.full(count, mean) for mean, _, count in pools])


def trimmed_mean(values: np.ndarray) -> float:
    """The mean without the smallest and the largest fifth."""
    cut = int(TRIMMED * len(values))
    return float(np.sort(values)[cut : len(values) - cut].mean())


@dataclass(frozen=True)
class _Evidence:
    """Observed costs of the rounds of the speculative lane, in baseline steps.

    Attributes:
        passes: (trimmed mean of the logarithm of the cost without the draft, its variance) by number of drafted tokens,
            for those that occurred.
        drafts: (drafted tokens, cost of the draft) of every round with a draft, by the name of the drafter.
    """

    passes: dict[int, tuple[float, float]]
    drafts: dict[str, list[tuple[int, float]]]

    @classmethod
    def of(cls, rounds: Sequence[Round]) -> _Evidence:
        decoding = [r for r in rounds if r.index > 0 and r.seconds > 0]
        last = {r.lane: r.index for r in decoding}
        when = np.array([i for i, r in enumerate(decoding) if r.lane == BASELINE])
        steps = np.array([decoding[i].seconds for i in when])
        if len(steps) < 3:
            return cls({}, {})
        near = min(NEAR, len(steps))
        pace = np.median(np.lib.stride_tricks.sliding_window_view(steps, near), axis=1)
        drafts: dict[str, list[tuple[int, float]]] = {}
        groups: dict[int, list[float]] = {}
        for i, r in enumerate(decoding):
            if r.lane != BASELINE and r.index != last[r.lane]:
                first = min(max(int(np.searchsorted(when, i)) - near // 2, 0), len(pace) - 1)
                rest = max(r.seconds - r.draft_seconds, 1e-9)
                groups.setdefault(min(r.drafted, MAX_DRAFT_LENGTH), []).append(float(np.log(rest / pace[first])))
                if r.drafted:
                    drafts.setdefault(r.drafter, []).append((r.drafted, r.draft_seconds / pace[first]))
        return cls({count: _trimmed(np.array(values)) for count, values in groups.items()}, drafts)


def _trimmed(values: np.ndarray) -> tuple[float, float]:
    """The trimmed mean and its variance."""
    cut = int(TRIMMED * len(values))
    ranked = np.sort(values)
    inner = np.clip(values, ranked[cut], ranked[len(values) - cut - 1])  # winsorized, for the trimmed mean's error
    scatter = max(float(inner.std()) / (1 - 2 * TRIMMED), LEAST_SCATTER if len(values) > 2 else 3 * LEAST_SCATTER)
    return trimmed_mean(values), CORRELATED * scatter**2 / len(values)


def _average(parts: Sequence[tuple[int, float, float]]) -> tuple[float, float]:
    """(the mean over the rounds of all drafters, its relative standard error) of (rounds, scale, relative standard
    error) of each."""
    rounds = sum(count for count, _, _ in parts)
    if not rounds:
        return 1.0, 0.0
    total = sum(count * scale for count, scale, _ in parts)
    return total / rounds, math.hypot(*(count * scale * error for count, scale, error in parts)) / total


def _draft_scale(prior: Costs, drafting: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """(costs of one drafter's drafts ÷ those of the prior, its relative standard error): the posterior of the
    logarithm, with a Gaussian prior around 0 and a trimmed mean as evidence. A few rounds outweigh the prior where a
    drafter costs a small part of it, as lookup does beside a model.

    Args:
        drafting: (drafted tokens, cost in baseline steps) of every round with a draft of this drafter.
    """
    expected = np.array([prior.draft(count) for count, _ in drafting])
    if not len(expected) or expected.min() <= 0:
        return 1.0, 0.0
    mean, variance = _trimmed(np.log(np.maximum([steps for _, steps in drafting], 1e-6) / expected))
    known = (DRAFT_PRIOR + prior.doubt) ** 2
    gain = known / (known + variance)
    return math.exp(gain * mean), math.sqrt(gain * variance)
