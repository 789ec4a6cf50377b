"""What a round costs: the load-time figures as a prior, a race's own rounds as the evidence.

In: `Costs` and the rounds of a race. Out: the posterior of the seconds of a round of every draft length, in baseline
steps, and `Costs` to begin the next race with. Knows nothing of models or of torch.

The logarithms of the costs have a Gaussian prior around the load-time figures and Gaussian evidence, so the posterior
is a few lines of linear algebra, and every draft length learns from its neighbours. The weight of the prior is in its
standard deviations, which grow with `Costs.doubt`, the scatter of the load-time samples: `AT_ZERO` for a plain step
of the speculative lane; `DRAFTED` for all that drafting adds, the same for all lengths, since a machine that is busy
while costs are measured is busy for all of them; `NEIGHBOURS` between one length and the next; and where samples
scattered more than on an idle machine, a part for each length alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from .events import BASELINE, Costs, Round
from .settings import MAX_DRAFT_LENGTH

AT_ZERO = 0.03
DRAFTED, NEIGHBOURS = 0.05, 0.012  # and as much of the doubt as below
DRAFTED_DOUBT, NEIGHBOURS_DOUBT, EACH_DOUBT = 1.0, 0.25, 0.6
IDLE = 0.05  # samples of an idle machine scatter no more than this
TRIMMED = 0.2  # of the rounds at either end are left out: a virtual machine pauses now and then
NEAR = 15  # baseline steps that stand for the speed of the machine at the time of a round
CORRELATED = 2.0  # rounds are worth half their number: neighbours are alike
LEAST_SCATTER = 0.03  # of single rounds; no clock is better


@dataclass(frozen=True)
class RoundCosts:
    """Posterior of the logarithm of a round's seconds ÷ a baseline step's, for draft lengths 0…`MAX_DRAFT_LENGTH`.

    `mean` `[17]`, `covariance` `[17, 17]`. `monotone`: a longer draft is never cheaper; where one is out of order,
    what is known well moves less than what is not.
    """

    mean: np.ndarray
    covariance: np.ndarray
    monotone: bool

    @property
    def ratios(self) -> np.ndarray:
        """The costs `[17]`, in baseline steps."""
        return self._ordered(np.exp(self.mean))

    def draws(self, count: int, noise: np.random.Generator) -> np.ndarray:
        """`[count, 17]` from the posterior."""
        drawn = np.exp(noise.multivariate_normal(self.mean, self.covariance, count, method="eigh"))
        return np.stack([self._ordered(values) for values in drawn])

    def _ordered(self, values: np.ndarray) -> np.ndarray:
        return isotonic(values, 1 / np.diag(self.covariance)) if self.monotone else values


def round_costs(prior: Costs, rounds: Sequence[Round], monotone: bool = True) -> RoundCosts:
    """The posterior after these rounds of both lanes, in the order in which they happened.

    Every round is divided by the median of the baseline steps around it, so that a slow minute of the machine counts
    for nothing. Rounds of the same number of drafted tokens give a trimmed mean. The last round of a lane is left out:
    where it ends the text, tokens were verified that it does not hold.
    """
    lengths = np.arange(MAX_DRAFT_LENGTH + 1)
    mean = np.log([prior.round(int(n)) for n in lengths])
    covariance = np.full((len(lengths), len(lengths)), AT_ZERO**2)
    drafted, neighbours = DRAFTED + DRAFTED_DOUBT * prior.doubt, NEIGHBOURS + NEIGHBOURS_DOUBT * prior.doubt
    covariance[1:, 1:] += drafted**2 + neighbours**2 * np.minimum.outer(lengths[1:], lengths[1:])
    covariance[1:, 1:] += (EACH_DOUBT * max(prior.doubt - IDLE, 0.0)) ** 2 * np.eye(len(lengths) - 1)
    seen = _evidence(rounds)
    if seen:
        at = np.array(sorted(seen))
        values, variances = (np.array([seen[n][i] for n in at]) for i in range(2))
        gain = np.linalg.solve(covariance[np.ix_(at, at)] + np.diag(variances), covariance[at]).T
        mean = mean + gain @ (values - mean[at])
        covariance = covariance - gain @ covariance[at]
    return RoundCosts(mean, covariance, monotone)


def learned(prior: Costs, rounds: Sequence[Round], monotone: bool = True) -> Costs:
    """`prior` brought up to date by the rounds of a race: `Costs.round` gives the posterior's ratios.

    Passes and drafts are told apart by the rounds' own draft seconds, shrunk towards the prior like the rest.
    """
    ratios = round_costs(prior, rounds, monotone).ratios
    steps = [r.seconds for r in rounds if r.lane == BASELINE and r.index > 0 and r.seconds > 0]
    step = trimmed_mean(np.array(steps)) if len(steps) >= NEAR else prior.step_seconds
    other = max(float(ratios[0]) - 1, 0.0)
    scale = _draft_scale(prior, rounds, step)
    drafts = np.array([scale * prior.draft(n) for n in range(len(ratios))])
    passes = np.maximum(ratios - other - drafts, 1.0)
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
    """The non-decreasing sequence nearest to `values` in weighted least squares: neighbours that are out of order are
    pooled until none are (pool adjacent violators, Ayer et al. 1955)."""
    pools: list[tuple[float, float, int]] = []  # mean, weight, how many
    for i, value in enumerate(values):
        mean, weight, count = float(value), 1.0 if weights is None else float(weights[i]), 1
        while pools and pools[-1][0] > mean:
            before, heavy, more = pools.pop()
            mean = (before * heavy + mean * weight) / (heavy + weight)
            weight, count = weight + heavy, count + more
        pools.append((mean, weight, count))
    return np.concatenate([np.full(count, mean) for mean, _, count in pools])


def trimmed_mean(values: np.ndarray) -> float:
    """The mean of what is left without the smallest and the largest fifth."""
    cut = int(TRIMMED * len(values))
    return float(np.sort(values)[cut : len(values) - cut].mean())


def _evidence(rounds: Sequence[Round]) -> dict[int, tuple[float, float]]:
    """By number of drafted tokens, where it occurred: the trimmed mean of log(round ÷ baseline step), its variance."""
    decoding = [r for r in rounds if r.index > 0 and r.seconds > 0]
    last = {r.lane: r.index for r in decoding}
    when = np.array([i for i, r in enumerate(decoding) if r.lane == BASELINE])
    steps = np.array([decoding[i].seconds for i in when])
    if len(steps) < 3:
        return {}
    near = min(NEAR, len(steps))
    pace = np.median(np.lib.stride_tricks.sliding_window_view(steps, near), axis=1)
    groups: dict[int, list[float]] = {}
    for i, r in enumerate(decoding):
        if r.lane != BASELINE and r.index != last[r.lane]:
            first = min(max(int(np.searchsorted(when, i)) - near // 2, 0), len(pace) - 1)
            groups.setdefault(min(r.drafted, MAX_DRAFT_LENGTH), []).append(np.log(r.seconds / pace[first]))
    found = {}
    for length, logs in groups.items():
        values = np.array(logs)
        cut = int(TRIMMED * len(values))
        ranked = np.sort(values)
        inner = np.clip(values, ranked[cut], ranked[len(values) - cut - 1])  # winsorized, for the trimmed mean's error
        scatter = max(float(inner.std()) / (1 - 2 * TRIMMED), LEAST_SCATTER if len(values) > 2 else 3 * LEAST_SCATTER)
        found[length] = (trimmed_mean(values), CORRELATED * scatter**2 / len(values))
    return found


def _draft_scale(prior: Costs, rounds: Sequence[Round], step: float) -> float:
    """Draft seconds of these rounds ÷ what the prior says, as if four rounds had agreed with it."""
    ratios = [
        np.log(r.draft_seconds / (step * prior.draft(r.drafted)))
        for r in rounds
        if r.lane != BASELINE and r.index > 0 and r.drafted and r.draft_seconds > 0 and prior.draft(r.drafted) > 0
    ]
    return float(np.exp(len(ratios) / (len(ratios) + 4) * trimmed_mean(np.array(ratios)))) if ratios else 1.0
