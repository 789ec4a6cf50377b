"""The predicted speedup of every fixed draft length, with a band, from one race of any draft length.

In: a finished `Trace`. Out: for γ = 1…8 the speedup that a race of that draft length on the same prompt would have.
Formula: tokens per round ÷ (γ·c + v(γ)) of Leviathan et al. 2023 (arXiv:2211.17192), both measured in this race.

Costs are the posterior of `costs.round_costs`; where two drafters take turns, a round is assumed to get its draft from
the drafter that this race used at its first token. Tokens per round are not computed from per-position acceptance: in a
race of adaptive draft length a draft ends where the drafter's confidence is low, so the drafted positions are a biased
sample. Instead the decoding of the text is simulated. Where both lanes must emit the same text (`Settings.same_text`),
a draft that begins at a given token is the same for every γ, so a round that began at token t gives the number of
accepted tokens of any round that begins there. Unobserved outcomes are drawn anew in every replicate:

- a token that was drafted in a round with another beginning has the observed outcome with probability `SAME`, since the
  difficulty depends mostly on the token; otherwise it is an independent draw;
- an independent draw, as for a token that was never drafted, has the probability that a logistic regression gives, from
  how likely the token was under the target and whether it is the first of its draft. It is fitted to the drafted tokens
  that this race verified, with Gaussian priors. The tokens that a race leaves undrafted are no random choice, as the
  drafter's confidence chose them, but the target's probabilities are known for all of them. Races that end drafts early
  verify later drafts where the drafter was confident, so there the prior keeps their rate near that of first drafts.

Coefficients are drawn from their posterior (Laplace's approximation), and costs from theirs. Each replicate also has
the scatter between runs: `RUN_TO_RUN`, and the scatter of this race's baseline steps, for either lane. Under rules that
draw independently another run has another text, so every token is an independent draw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .costs import round_costs
from .events import BASELINE, SPECULATIVE, Round, Trace
from .metrics import Lane, tokens_per_second
from .settings import Settings

LENGTHS = range(1, 9)
LEVEL = 0.9
REPLICATES = 300
# Parameters of a Beta distribution of probabilities. Counted over 28 prompts, by the acceptance rate of the text (0.4,
# 0.6, 0.8, 1.0): accepted tokens were accepted again in 84, 88, 96 and 99 % of cases, rejected ones then accepted in 5,
# 17, 19 and 28 %; with probability 0.73 it would be 84, 89, 95, 100 % and 11, 16, 22, 27 %.
SAME = (16.0, 6.0)
# Priors of the regression, mean and standard deviation: of the intercept, at a token with log odds of `USUAL` under the
# target; of the slope; and of what is added for later drafts, where drafts may end early and where they may not.
INTERCEPT, SLOPE = (0.7, 1.5), (0.5, 0.3)
LATER_EARLY, LATER = (0.0, 0.3), (0.0, 1.0)
USUAL = 2.0
MOST_ODDS = 7.0  # log odds beyond it are cut
NEWTON_STEPS = 20
# Standard deviation of the log speedup between two runs, beyond the scatter of rounds and of their costs.
RUN_TO_RUN = 0.03
LONGEST_TEXT = 2048  # tokens that are simulated; longer texts are cut


@dataclass(frozen=True)
class Prediction:
    """Predicted speedups for the draft lengths `lengths`: the median, and the ends of the band. `best` is the draft
    length that is fastest in at least 9 of 10 replicates, None where none is."""

    lengths: tuple[int, ...]
    median: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    best: int | None


class Replicates(NamedTuple):
    """Predicted speedups by draft length and replicate, float `[lengths, REPLICATES]`: of the text and the costs, and
    with the scatter between runs."""

    speedups: np.ndarray
    runs: np.ndarray


def predict(trace: Trace, lengths: Sequence[int] = LENGTHS) -> Prediction | None:
    """The predicted speedups of races with fixed draft lengths; None where nothing was drafted or the costs are
    unknown."""
    found = replicates(trace, lengths)
    if found is None:
        return None
    winners = np.argmax(found.speedups, 0)
    fastest = int(np.argmax(np.bincount(winners, minlength=len(lengths))))
    clear = (winners == fastest).mean() >= LEVEL
    ends = np.quantile(found.runs, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=1)
    low, middle, high = (tuple(row.tolist()) for row in (ends[0], np.median(found.speedups, 1), ends[1]))
    return Prediction(tuple(lengths), middle, low, high, lengths[fastest] if clear else None)


def replicates(trace: Trace, lengths: Sequence[int] = LENGTHS) -> Replicates | None:
    """What `predict` takes its quantiles of; None where it is."""
    base, fast = trace.lane(BASELINE), trace.lane(SPECULATIVE)
    if trace.costs is None or not tokens_per_second(base) or not any(r.drafted for r in fast):
        return None
    noise = np.random.default_rng(0)
    monotone = str(trace.pair.get("device", "cpu")).startswith("cpu")
    found = round_costs(trace.costs, trace.rounds, monotone)
    passes, drafts = found.draws(REPLICATES, noise)
    settings = Settings(**trace.settings)
    seen = _Seen.of(fast)
    accepted, empty = _accepted(seen, settings.same_text, max(lengths), noise)
    limit = trace.finish.get(SPECULATIVE) == "length" and seen.whole
    shares = [max(made.drafts, 1) for made in found.drafts.values()]
    average = np.average(np.stack(list(drafts.values())), axis=0, weights=shares)
    index = {name: i for i, name in enumerate(drafts)} if settings.same_text else {}
    makers = np.array([index.get(name, len(drafts)) for name in seen.makers])
    costs = _Costs(passes, np.stack([*drafts.values(), average]), makers)
    rates = np.stack([_rate(accepted, empty, costs, n, limit) for n in lengths])
    scatter = math.sqrt(RUN_TO_RUN**2 + 2 * _step_variance(Lane.of(base)))
    return Replicates(rates, rates * np.exp(scatter * noise.standard_normal(REPLICATES)))


@dataclass(frozen=True)
class _Seen:
    """What a race shows about the tokens of its text, counted from 0 (the prefill's).

    Attributes:
        right: int `[tokens]`: 1 drafted and accepted, 0 drafted and rejected, −1 never drafted.
        odds: `[tokens]`, the log odds of each token under the target, less `USUAL`; 0 where its probability is unknown.
        starts: (drafted, accepted) by the token at which a round with a draft length above 0 began.
        tried: (token, not the first of its draft, accepted), int `[tried, 3]`, of all drafts that were verified.
        answered: (with a draft, total) of rounds with a draft length above 0; lookup drafts nothing without a match.
        makers: the drafter of the round that emitted each token, "" where there was no draft.
        early: drafts may have ended where the drafter's confidence was low.
        whole: the text was not cut.
    """

    right: np.ndarray
    odds: np.ndarray
    starts: dict[int, tuple[int, int]]
    tried: np.ndarray
    answered: tuple[int, int]
    makers: list[str]
    early: bool
    whole: bool

    @classmethod
    def of(cls, rounds: Sequence[Round]) -> _Seen:
        text = [token for r in rounds for token in r.emitted][:LONGEST_TEXT]
        size = len(text)
        right = np.full(size, -1)
        starts: dict[int, tuple[int, int]] = {}
        tried: list[tuple[int, bool, bool]] = []
        answered = [0, 0]
        makers: list[str] = []
        at, early, last = 0, False, rounds[-1].index
        for r in rounds:
            drafted, accepted = r.drafted, r.accepted
            if r.index > 0 and r.draft_length > 0:
                answered[0] += drafted > 0
                answered[1] += 1
                early |= 0 < drafted < r.draft_length and r.index < last
                for i in range(min(accepted + 1, drafted, size - at)):
                    tried.append((at + i, i > 0, i < accepted))
                    right[at + i] = i < accepted
                if at < size:
                    starts[at] = (drafted, accepted)
            at += len(r.emitted)
            makers += [r.drafter] * len(r.emitted)
        odds = np.array([0.0 if token.p is None else _log_odds(token.p) - USUAL for token in text])
        whole = at == size
        visits = np.array(tried, int).reshape(-1, 3)
        return cls(right, odds, starts, visits, (answered[0], answered[1]), makers[:size], early, whole)


def _log_odds(p: float) -> float:
    p = min(max(p, 1e-9), 1 - 1e-9)
    return min(max(math.log(p / (1 - p)), -MOST_ODDS), MOST_ODDS)


def _chances(seen: _Seen, noise: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The probability that a draft of each token is accepted, `[REPLICATES, tokens]`, where it is the first of its
    round and where it is a later one."""
    at, later, accepted = seen.tried.T
    design = np.stack([np.ones(len(at)), seen.odds[at], later], axis=1)
    priors = np.array([INTERCEPT, SLOPE, LATER_EARLY if seen.early else LATER])
    mean, precision = priors[:, 0], np.diag(priors[:, 1] ** -2)
    found = mean
    for _ in range(NEWTON_STEPS):
        chance = 1 / (1 + np.exp(-design @ found))
        curvature = (design * (chance * (1 - chance))[:, None]).T @ design + precision
        found = found + np.linalg.solve(curvature, design.T @ (accepted - chance) - precision @ (found - mean))
    drawn = noise.multivariate_normal(found, np.linalg.inv(curvature), REPLICATES, method="eigh")
    first = drawn[:, :1] + drawn[:, 1:2] * seen.odds
    return 1 / (1 + np.exp(-first)), 1 / (1 + np.exp(-first - drawn[:, 2:]))


def _accepted(seen: _Seen, same_text: bool, longest: int, noise: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Accepted tokens of a round that begins at each token with a draft of up to `longest`, int `[REPLICATES, tokens]`,
    and whether the drafter drafts nothing there, bool `[REPLICATES, tokens]`."""
    size, shape = len(seen.right), (REPLICATES, len(seen.right))

    first, later = _chances(seen, noise)
    same = noise.beta(*SAME, (REPLICATES, 1)) if same_text else np.zeros((REPLICATES, 1))
    known = (seen.right >= 0) & same_text
    copied, uniform = noise.random(shape) < same, noise.random(shape)

    def drawn(probability: np.ndarray) -> np.ndarray:
        return np.where(known & copied, seen.right == 1, uniform < probability)

    begins, goes_on = drawn(first), drawn(later)
    run = np.zeros((REPLICATES, size + 1), np.int16)  # tokens accepted from here on, if the one before was
    for t in range(size - 1, -1, -1):
        run[:, t] = np.where(goes_on[:, t], np.minimum(run[:, t + 1] + 1, longest), 0)
    accepted = np.where(begins, np.minimum(1 + run[:, 1:], longest), 0)
    answered, asked = seen.answered
    empty = noise.random(shape) >= noise.beta(answered + 0.5, asked - answered + 0.5, (REPLICATES, 1))
    if same_text:
        for t, (drafted, right) in seen.starts.items():
            empty[:, t] = drafted == 0
            accepted[:, t] = right if right < drafted else np.minimum(right + run[:, min(t + right, size)], longest)
    accepted[empty] = 0
    return accepted, empty


class _Costs(NamedTuple):
    """Costs in baseline steps of rounds without the draft, `[REPLICATES, 17]`, and of drafts, `[drafters, REPLICATES,
    17]`; at each token which drafter it is, `[tokens]`."""

    passes: np.ndarray
    drafts: np.ndarray
    makers: np.ndarray


def _rate(accepted: np.ndarray, empty: np.ndarray, costs: _Costs, length: int, limit: bool) -> np.ndarray:
    """Tokens per baseline step, `[REPLICATES]`, when the text is decoded with a fixed draft length.

    limit: the text ends at the limit of new tokens, so that the last drafts are no longer than what is left.
    """
    replicates, size = accepted.shape
    every = np.arange(replicates)
    left = np.zeros((replicates, size + length + 1))  # baseline steps from a round that begins here to the end
    for t in range(size - 1, 0, -1):
        drafted = min(length, size - t - 1) if limit else length
        taken = np.minimum(accepted[:, t], drafted)
        draft = costs.passes[:, drafted] + costs.drafts[costs.makers[t], :, drafted]
        cost = np.where(empty[:, t], costs.passes[:, 0], draft)
        left[:, t] = cost + left[every, t + taken + 1]
    return np.asarray((size - 1) / left[:, 1])


def _step_variance(base: Lane) -> float:
    """The variance of the logarithm of the mean baseline step, from the means of six parts of the lane."""
    if len(base.seconds) < 12:
        return 0.0
    parts = [part.mean() for part in np.array_split(base.seconds, 6)]
    return float(np.var(np.log(parts), ddof=1) / len(parts))
