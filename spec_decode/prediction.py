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
- a token that was never drafted is accepted at the rate of first drafts, which is not subject to selection by
  confidence. Later drafts have their own rate in races that never end a draft early; in races that do, they have the
  rate of first drafts, with the standard deviation of `FIRST_TO_NEXT` observations.

Rates are drawn from their Beta posteriors and costs from theirs. Each replicate also has the scatter between runs:
`RUN_TO_RUN`, and the scatter of this race's baseline steps, for either lane. Under rules that draw independently
another run has another text, so every token is an independent draw.
"""

from __future__ import annotations

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
FIRST_TO_NEXT = 30.0
NEXT = 4.0  # weight of the rate of first drafts as a prior of that of later drafts, in observations
# Standard deviations between two runs, beyond the scatter of rounds: of the log speedup, and of the logarithm of the
# part of a pass that grows with its tokens. Other load on the machine slows arithmetic and memory reads by different
# factors.
RUN_TO_RUN = 0.035
ROWS_RUN_TO_RUN = 0.04
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


def predict(trace: Trace, lengths: Sequence[int] = LENGTHS) -> Prediction | None:
    """The predicted speedups of races with fixed draft lengths; None where nothing was drafted or the costs are
    unknown."""
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
    relative = np.array([found.drafters.get(name, 1.0) if settings.same_text else 1.0 for name in seen.makers])
    costs = _Costs(passes, drafts, relative)
    rates = np.stack([_rate(accepted, empty, costs, n, limit) for n in lengths])
    winners = np.argmax(rates, 0)
    fastest = int(np.argmax(np.bincount(winners, minlength=len(lengths))))
    clear = (winners == fastest).mean() >= LEVEL
    rows = np.array([[ROWS_RUN_TO_RUN * (1 - 1 / found.passes[n])] for n in lengths])
    scatter = np.sqrt(RUN_TO_RUN**2 + 2 * _step_variance(Lane.of(base)) + rows**2)
    band = rates * np.exp(scatter * noise.standard_normal(REPLICATES))
    ends = np.quantile(band, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=1)
    low, middle, high = (tuple(row.tolist()) for row in (ends[0], np.median(rates, 1), ends[1]))
    return Prediction(tuple(lengths), middle, low, high, lengths[fastest] if clear else None)


@dataclass(frozen=True)
class _Seen:
    """What a race shows about the tokens of its text, counted from 0 (the prefill's).

    Attributes:
        right: int `[tokens]`: 1 drafted and accepted, 0 drafted and rejected, −1 never drafted.
        starts: (drafted, accepted) by the token at which a round with a draft length above 0 began.
        first: (accepted, total) of the first drafted tokens of rounds.
        later: the same of the tokens after them.
        answered: (with a draft, total) of rounds with a draft length above 0; lookup drafts nothing without a match.
        makers: the drafter of the round that emitted each token, "" where there was no draft.
        early: drafts may have ended where the drafter's confidence was low.
        whole: the text was not cut.
    """

    right: np.ndarray
    starts: dict[int, tuple[int, int]]
    first: tuple[int, int]
    later: tuple[int, int]
    answered: tuple[int, int]
    makers: list[str]
    early: bool
    whole: bool

    @classmethod
    def of(cls, rounds: Sequence[Round]) -> _Seen:
        size = min(sum(len(r.emitted) for r in rounds), LONGEST_TEXT)
        right = np.full(size, -1)
        starts: dict[int, tuple[int, int]] = {}
        first, later, answered = [0, 0], [0, 0], [0, 0]
        makers: list[str] = []
        at, early, last = 0, False, rounds[-1].index
        for r in rounds:
            drafted, accepted = r.drafted, r.accepted
            if r.index > 0 and r.draft_length > 0:
                answered[0] += drafted > 0
                answered[1] += 1
                early |= 0 < drafted < r.draft_length and r.index < last
                for i in range(min(accepted + 1, drafted)):
                    count = later if i else first
                    count[0] += i < accepted
                    count[1] += 1
                    if at + i < size:
                        right[at + i] = i < accepted
                if at < size:
                    starts[at] = (drafted, accepted)
            at += len(r.emitted)
            makers += [r.drafter] * len(r.emitted)
        return cls(
            right,
            starts,
            (first[0], first[1]),
            (later[0], later[1]),
            (answered[0], answered[1]),
            makers[:size],
            early,
            at == size,
        )


def _accepted(seen: _Seen, same_text: bool, longest: int, noise: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Accepted tokens of a round that begins at each token with a draft of up to `longest`, int `[REPLICATES, tokens]`,
    and whether the drafter drafts nothing there, bool `[REPLICATES, tokens]`."""
    size, shape = len(seen.right), (REPLICATES, len(seen.right))

    def rate(yes: float, of: float) -> np.ndarray:
        return noise.beta(yes, of - yes, (REPLICATES, 1))

    first = rate(seen.first[0] + 1.0, seen.first[1] + 2.0)
    near = first.clip(0.02, 0.98)
    if seen.early:
        later = noise.beta(FIRST_TO_NEXT * near, FIRST_TO_NEXT * (1 - near))
    else:
        yes, of = seen.later
        later = noise.beta(NEXT * near + yes, NEXT * (1 - near) + of - yes)
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
    empty = noise.random(shape) >= rate(seen.answered[0] + 0.5, seen.answered[1] + 1.0)
    if same_text:
        for t, (drafted, right) in seen.starts.items():
            empty[:, t] = drafted == 0
            accepted[:, t] = right if right < drafted else np.minimum(right + run[:, min(t + right, size)], longest)
    accepted[empty] = 0
    return accepted, empty


class _Costs(NamedTuple):
    """Costs in baseline steps: of rounds without the draft and of drafts `[REPLICATES, 17]`, and a factor for the
    latter at each token, `[tokens]`."""

    passes: np.ndarray
    drafts: np.ndarray
    relative: np.ndarray


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
        draft = costs.passes[:, drafted] + costs.relative[t] * costs.drafts[:, drafted]
        cost = np.where(empty[:, t], costs.passes[:, 0], draft)
        left[:, t] = cost + left[every, t + taken + 1]
    return np.asarray((size - 1) / left[:, 1])


def _step_variance(base: Lane) -> float:
    """The variance of the logarithm of the mean baseline step, from the means of six parts of the lane."""
    if len(base.seconds) < 12:
        return 0.0
    parts = [part.mean() for part in np.array_split(base.seconds, 6)]
    return float(np.var(np.log(parts), ddof=1) / len(parts))
