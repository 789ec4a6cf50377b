"""Cost of a round: a posterior with what was known before a race as prior and the rounds of the race as evidence.

In: `Costs` and the rounds of a race. Out: the cost of a round of a later race for every draft length, in baseline
steps, and `Costs` for the next race to start from. Independent of models and of torch.

The costs without the draft are Gaussian in the logarithm. Of each draft length the model has a lasting cost, and on top
of it three differences between one race and another, with these standard deviations: `SHARED` of all rounds with a
drafter; `STATE`, which grows with the draft length up to `KNEE`, since other load on the machine slows arithmetic and
memory reads by different factors, and of which the share `LASTS` is still there in the next race; and `OWN`, of each
length alone. The constants are those of races of the embedded pair in three processes: between races of one process,
costs had standard deviations of 1.5, 3.5, 4 and 6 % at lengths of 1, 2, 3 and more.

What is not known of the lasting costs is said by `Costs.errors`. Where there are none, the costs come from load time:
`AT_ZERO` for all lengths; `DRAFTED` for what drafting adds, shared by all lengths, since load on the machine while
costs are measured affects all of them; `NEIGHBOURS` between one length and the next; `EACH` of each length. They grow
with `Costs.doubt`, the scatter of the load-time samples. Every race makes them smaller (a Kalman filter), so that one
race of a few lengths moves costs that many races before have told less than costs that only load time has told.

The cost of a draft is a line, what it costs to begin and what each token costs, for each drafter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from .events import BASELINE, Costs, Round
from .settings import MAX_DRAFT_LENGTH

SHARED, STATE, OWN = 0.012, 0.04, 0.02
KNEE, LASTS = 4, 0.7
AT_ZERO = 0.02
DRAFTED, NEIGHBOURS, EACH = 0.05, 0.016, 0.03  # plus the shares of the doubt below
DRAFTED_DOUBT, NEIGHBOURS_DOUBT, EACH_DOUBT = 1.0, 0.25, 0.6
IDLE = 0.05  # the greatest doubt on an idle machine
SIMILAR = 0.5  # correlation of the errors of neighbouring lengths after the first race
DRIFT = 0.005  # standard deviation of a lasting cost from race to race
TRIMMED = 0.2  # share of the rounds that is left out at either end: a virtual machine pauses occasionally
NEAR = 15  # the trimmed mean of so many baseline steps around a round is the speed of the machine at that time
CORRELATED = 2.0  # variance factor of a mean, since consecutive rounds are correlated
LEAST_SCATTER = 0.03  # lower bound of the standard deviation of single rounds
DRAFT_PRIOR = 0.15  # relative standard deviation of either part of the cost of a draft, plus the doubt
DRAFT_OWN = 0.03  # of the drafts of one length in one race

_LENGTHS = np.arange(MAX_DRAFT_LENGTH + 1)
_STATE = STATE * np.minimum(_LENGTHS, KNEE) / KNEE  # [17]


class DraftCost(NamedTuple):
    """What drafts of one drafter cost: mean of (to begin, each token), `[2]`, and covariance `[2, 2]`, in baseline
    steps, and from how many drafts."""

    mean: np.ndarray
    covariance: np.ndarray
    drafts: int

    @property
    def costs(self) -> np.ndarray:
        """By draft length, `[17]`."""
        return np.maximum(_design(_LENGTHS) @ self.mean, 0.0)

    def draws(self, count: int, noise: np.random.Generator) -> np.ndarray:
        """Samples of `costs`, `[count, 17]`."""
        drawn = noise.multivariate_normal(self.mean, self.covariance, count, method="eigh")
        return np.maximum(drawn @ _design(_LENGTHS).T, 0.0)


@dataclass(frozen=True)
class RoundCosts:
    """Cost of a round of a later race, in baseline steps, for draft lengths 0…`MAX_DRAFT_LENGTH`.

    The cost of the draft is separate from the rest of the round. With two drafters the share of each depends on the
    draft length, and a common cost would mix them.

    Attributes:
        mean: `[17]`, of the logarithm of the cost without the draft.
        covariance: `[17, 17]`, of the same.
        drafts: the cost of drafts by the name of the drafter; "" where nothing was drafted.
        monotone: a longer draft is never cheaper; costs without the draft are made so by isotonic regression, weighted
            by precision.
    """

    mean: np.ndarray
    covariance: np.ndarray
    drafts: Mapping[str, DraftCost]
    monotone: bool

    @property
    def passes(self) -> np.ndarray:
        """The costs without the draft `[17]`."""
        return _ordered(np.exp(self.mean), self.covariance, self.monotone)

    @property
    def draft(self) -> np.ndarray:
        """The costs of the draft, averaged over the drafts that were made, `[17]`."""
        total = sum(made.drafts for made in self.drafts.values())
        shares = [made.drafts / total if total else 1 / len(self.drafts) for made in self.drafts.values()]
        return np.asarray(sum(share * made.costs for share, made in zip(shares, self.drafts.values(), strict=True)))

    @property
    def ratios(self) -> np.ndarray:
        """The costs of whole rounds `[17]`."""
        return self.passes + self.draft

    def draws(self, count: int, noise: np.random.Generator) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Samples of the costs without the draft, `[count, 17]`, and of those of drafts, by drafter."""
        drawn = np.exp(noise.multivariate_normal(self.mean, self.covariance, count, method="eigh"))
        passes = np.stack([_ordered(values, self.covariance, self.monotone) for values in drawn])
        return passes, {name: made.draws(count, noise) for name, made in self.drafts.items()}


def round_costs(prior: Costs, rounds: Sequence[Round], monotone: bool = True) -> RoundCosts:
    """The costs of a later race, after these rounds of both lanes, in chronological order.

    Each round is divided by the trimmed mean of the baseline steps around it, so that changes in the speed of the
    machine cancel. Rounds with the same number of drafted tokens give a trimmed mean. The last round of a lane is left
    out: where it ends the text, more tokens were verified than it holds.
    """
    evidence = _Evidence.of(rounds)
    found = _Lasting.of(prior).after(evidence.passes)
    shown = np.hstack([np.eye(len(_LENGTHS)), LASTS * _STATE[:, None]])  # of a race after this one
    covariance = shown @ found.covariance @ shown.T + (1 - LASTS**2) * np.outer(_STATE, _STATE) + _between(_LENGTHS)
    drafts = {name: _drafting(prior, made) for name, made in evidence.drafts.items()}
    return RoundCosts(shown @ found.mean, covariance, drafts or {"": _drafting(prior, [])}, monotone)


def learned(prior: Costs, rounds: Sequence[Round], monotone: bool = True, drafter: str = "") -> Costs:
    """`prior` updated with the rounds of a race, so that `Costs.round` gives the lasting costs.

    There is one exception: the cost of drafts is that of the drafter whose name is given, as in the prior. Where it
    made none of them it stays as it was, for the next race may use it more often.
    """
    evidence = _Evidence.of(rounds)
    if not evidence.passes:
        return prior
    found = _Lasting.of(prior).after(evidence.passes)
    mean, covariance = found.mean[:-1], found.covariance[:-1, :-1]
    steps = [r.seconds for r in rounds if r.lane == BASELINE and r.index > 0 and r.seconds > 0]
    step = trimmed_mean(np.array(steps)) if len(steps) >= NEAR else prior.step_seconds
    costs = _ordered(np.exp(mean), covariance, monotone)
    other = max(float(costs[0]) - 1, 0.0)
    passes = np.maximum(costs - other, 1.0)
    passes[0] = 1.0
    start, each = _drafting(prior, evidence.drafts.get(drafter, [])).mean
    return replace(
        prior,
        step_seconds=step,
        verify_ratio=tuple((isotonic(passes) if monotone else passes).tolist()),
        draft_ratio=max(float(each), 0.0),
        draft_start=max(float(start), 0.0),
        other_ratio=other,
        errors=tuple(np.sqrt(np.diag(covariance)).round(5).tolist()),
    )


@dataclass(frozen=True)
class _Lasting:
    """Lasting costs without the draft, in the logarithm, and the state of the machine in a race, in units of `_STATE`:
    mean `[18]` and covariance `[18, 18]`."""

    mean: np.ndarray
    covariance: np.ndarray

    @classmethod
    def of(cls, prior: Costs) -> _Lasting:
        """What is known before a race."""
        size = len(_LENGTHS)
        mean = np.log([prior.round(int(n)) - prior.draft(int(n)) for n in _LENGTHS])
        covariance = np.zeros((size + 1, size + 1))
        covariance[size, size] = 1.0
        if prior.errors:
            errors = np.resize(prior.errors, size)
            apart = np.abs(np.subtract.outer(_LENGTHS, _LENGTHS))
            covariance[:size, :size] = np.outer(errors, errors) * SIMILAR**apart + DRIFT**2 * np.eye(size)
        else:
            drafted, neighbours = DRAFTED + DRAFTED_DOUBT * prior.doubt, NEIGHBOURS + NEIGHBOURS_DOUBT * prior.doubt
            each = EACH + EACH_DOUBT * max(prior.doubt - IDLE, 0.0)
            more = covariance[1:size, 1:size]
            more += drafted**2 + neighbours**2 * np.minimum.outer(_LENGTHS[1:], _LENGTHS[1:])
            more += each**2 * np.eye(size - 1)
            covariance[:size, :size] += AT_ZERO**2
        return cls(np.append(mean, 0.0), covariance)

    def after(self, passes: Mapping[int, tuple[float, float]]) -> _Lasting:
        """What is known after a race in which costs were (mean of the logarithm, variance) by draft length."""
        if not passes:
            return self
        at = np.array(sorted(passes))
        values, variances = (np.array([passes[n][i] for n in at]) for i in range(2))
        seen = np.zeros((len(at), len(self.mean)))
        seen[np.arange(len(at)), at] = 1.0
        seen[:, -1] = _STATE[at]
        spread = seen @ self.covariance @ seen.T + _between(at) + np.diag(variances)
        gain = np.linalg.solve(spread, seen @ self.covariance).T
        return _Lasting(self.mean + gain @ (values - seen @ self.mean), self.covariance - gain @ seen @ self.covariance)


def _between(lengths: np.ndarray) -> np.ndarray:
    """The covariance of what rounds of these draft lengths differ by between races, without the state."""
    return SHARED**2 + OWN**2 * np.diag((lengths > 0).astype(float))


def _ordered(values: np.ndarray, covariance: np.ndarray, monotone: bool) -> np.ndarray:
    return isotonic(values, 1 / np.diag(covariance)) if monotone else values


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
        cut = int(TRIMMED * near)
        windows = np.sort(np.lib.stride_tricks.sliding_window_view(steps, near), axis=1)
        pace = windows[:, cut : near - cut].mean(axis=1)
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


def _design(lengths: np.ndarray) -> np.ndarray:
    """How often a draft of each length pays for its beginning and for a token, `[lengths, 2]`."""
    return np.stack([(lengths > 0).astype(float), lengths.astype(float)], axis=1)


def _drafting(prior: Costs, made: Sequence[tuple[int, float]]) -> DraftCost:
    """The cost of one drafter's drafts, with that of the prior before this race, and trimmed means of drafts of the
    same length as evidence. A few rounds outweigh the prior where a drafter costs a small part of it, as lookup does
    beside a model.

    Args:
        made: (drafted tokens, cost in baseline steps) of every round with a draft of this drafter.
    """
    mean = np.array([prior.draft_start, prior.draft_ratio])
    covariance = np.diag(((DRAFT_PRIOR + prior.doubt) * mean) ** 2)
    if not made or not covariance.any():
        return DraftCost(mean, covariance, len(made))
    costs = {n: np.array([cost for count, cost in made if count == n]) for n in sorted({count for count, _ in made})}
    design = _design(np.array(list(costs)))
    values = np.array([trimmed_mean(x) for x in costs.values()])
    relative = [_trimmed(np.log(np.maximum(x, 1e-6)))[1] + DRAFT_OWN**2 for x in costs.values()]
    spread = design @ covariance @ design.T + np.diag(values**2 * relative + 1e-12)
    gain = np.linalg.solve(spread, design @ covariance).T
    return DraftCost(mean + gain @ (values - design @ mean), covariance - gain @ design @ covariance, len(made))
