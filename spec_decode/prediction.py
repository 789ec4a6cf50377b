"""The predicted speedup of every fixed draft length, with a band, from one race of any draft length.

In: a finished `Trace`. Out: for γ = 1…8 where a race of that length on the same prompt would come out, 9 times in 10.
Formula: tokens per round ÷ (γ·c + v(γ)) of Leviathan et al. 2023 (arXiv:2211.17192), both measured in this race.

Costs are the posterior of `costs.round_costs`. Tokens are not taken from per-position acceptance: in a race of adaptive
length a draft ends where its drafter is unsure, so the positions that were drafted are the easy ones. Instead the text
is decoded again, on paper. Where both lanes must emit the same text (`Settings.same_text`), a draft from the same place
is the same draft whatever γ is, so a round that began at token t tells how many drafts any race accepts that begins a
round there. Where this race does not know, a replicate draws the answer:

- a token that was drafted from another place is drafted right again, or wrong again, in a share `SAME` of cases, since
  what makes a token hard is mostly the token; else it is a new draw;
- a token that nobody drafted is accepted with the rate of first drafts, which no confidence has chosen. For later
  drafts of races that never end a draft early, their own rate counts; of races that do, the rate of first drafts with
  a standard deviation of `FIRST_TO_NEXT` observations' worth.

Rates are drawn from their Beta posteriors, costs from theirs, and to each replicate comes the scatter of another run:
`RUN_TO_RUN`, and what this race's baseline steps show, for either lane. Under rules that draw independently another
run has another text, so there nothing is known of places and every token is a new draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .costs import round_costs
from .events import BASELINE, SPECULATIVE, Round, Trace
from .metrics import Lane, tokens_per_second
from .settings import Settings

LENGTHS = range(1, 9)
LEVEL = 0.9
REPLICATES = 300
SAME = (8.0, 2.0)  # Beta parameters of a share
FIRST_TO_NEXT = 30.0
NEXT = 4.0  # weight of the rate of first drafts as a prior of the others'
RUN_TO_RUN = 0.02  # standard deviation of the logarithm of a speedup between two runs, beyond what rounds show
LONGEST_TEXT = 2048  # tokens that are decoded again; they stand for the rest


@dataclass(frozen=True)
class Prediction:
    """Predicted speedups for draft lengths `lengths`: the median and the ends of the band. `best` is the draft length
    that is fastest in 9 of 10 replicates, None where there is no such."""

    lengths: tuple[int, ...]
    median: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    best: int | None


def predict(trace: Trace, lengths: Sequence[int] = LENGTHS) -> Prediction | None:
    """What races of fixed draft lengths would come to; None where nothing was drafted or the costs are not known."""
    base, fast = trace.lane(BASELINE), trace.lane(SPECULATIVE)
    if trace.costs is None or not tokens_per_second(base) or not any(r.drafted for r in fast):
        return None
    noise = np.random.default_rng(0)
    monotone = str(trace.pair.get("device", "cpu")).startswith("cpu")
    costs = round_costs(trace.costs, trace.rounds, monotone).draws(REPLICATES, noise)
    settings = Settings(**trace.settings)
    seen = _Seen.of(fast)
    accepted, silent = _accepted(seen, settings.same_text, max(lengths), noise)
    limit = trace.finish.get(SPECULATIVE) == "length" and seen.whole
    rates = np.stack([_rate(accepted, silent, costs, n, limit) for n in lengths])
    share = np.argmax(rates, 0)
    fastest = int(np.argmax(np.bincount(share, minlength=len(lengths))))
    clear = (share == fastest).mean() >= LEVEL
    scatter = np.sqrt(RUN_TO_RUN**2 + 2 * _step_variance(Lane.of(base)))
    band = rates * np.exp(scatter * noise.standard_normal(REPLICATES))
    ends = np.quantile(band, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=1)
    low, middle, high = (tuple(row.tolist()) for row in (ends[0], np.median(rates, 1), ends[1]))
    return Prediction(tuple(lengths), middle, low, high, lengths[fastest] if clear else None)


@dataclass(frozen=True)
class _Seen:
    """What a race tells of its text's tokens, counted from 0 (the prefill's).

    `right` int `[tokens]`: 1 drafted and accepted, 0 drafted and refused, −1 nobody drafted it. `starts`: of each token
    at which a round began and something was asked of the drafter, how many it drafted and how many were accepted.
    `first`, `later`, `spoke`: (yes, of) for first drafts, later ones, and whether the drafter had anything to say.
    `early`: drafts may have ended where the drafter was unsure. `whole`: no token was left out.
    """

    right: np.ndarray
    starts: dict[int, tuple[int, int]]
    first: tuple[int, int]
    later: tuple[int, int]
    spoke: tuple[int, int]
    early: bool
    whole: bool

    @classmethod
    def of(cls, rounds: Sequence[Round]) -> _Seen:
        size = min(sum(len(r.emitted) for r in rounds), LONGEST_TEXT)
        right = np.full(size, -1)
        starts: dict[int, tuple[int, int]] = {}
        first, later, spoke = [0, 0], [0, 0], [0, 0]
        at, early, last = 0, False, rounds[-1].index
        for r in rounds:
            drafted, accepted = r.drafted, r.accepted
            if r.index > 0 and r.draft_length > 0:
                spoke[0] += drafted > 0
                spoke[1] += 1
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
        return cls(right, starts, (first[0], first[1]), (later[0], later[1]), (spoke[0], spoke[1]), early, at == size)


def _accepted(seen: _Seen, same_text: bool, longest: int, noise: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Drafts accepted of up to `longest` by a round that begins at each token, `[REPLICATES, tokens]`, and whether the
    drafter had nothing to say there."""
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
    copied, luck = noise.random(shape) < same, noise.random(shape)

    def drawn(chance: np.ndarray) -> np.ndarray:
        return np.where(known & copied, seen.right == 1, luck < chance)

    begins, goes_on = drawn(first), drawn(later)
    run = np.zeros((REPLICATES, size + 1), np.int16)  # drafts accepted from here on, if the one before was
    for t in range(size - 1, -1, -1):
        run[:, t] = np.where(goes_on[:, t], np.minimum(run[:, t + 1] + 1, longest), 0)
    accepted = np.where(begins, np.minimum(1 + run[:, 1:], longest), 0)
    silent = noise.random(shape) >= rate(seen.spoke[0] + 0.5, seen.spoke[1] + 1.0)
    if same_text:
        for t, (drafted, right) in seen.starts.items():
            silent[:, t] = drafted == 0
            accepted[:, t] = right if right < drafted else np.minimum(right + run[:, min(t + right, size)], longest)
    accepted[silent] = 0
    return accepted, silent


def _rate(accepted: np.ndarray, silent: np.ndarray, costs: np.ndarray, length: int, limit: bool) -> np.ndarray:
    """Tokens per baseline step `[REPLICATES]` of decoding the text with a fixed draft length.

    limit: the text ends because of the limit on its tokens, so that the last drafts are no longer than what is left.
    """
    replicates, size = accepted.shape
    every = np.arange(replicates)
    left = np.zeros((replicates, size + length + 1))  # baseline steps from a round that begins here to the end
    for t in range(size - 1, 0, -1):
        drafted = min(length, size - t - 1) if limit else length
        taken = np.minimum(accepted[:, t], drafted)
        cost = np.where(silent[:, t], costs[:, 0], costs[:, drafted])
        left[:, t] = cost + left[every, t + taken + 1]
    return np.asarray((size - 1) / left[:, 1])


def _step_variance(base: Lane) -> float:
    """Of the logarithm of the mean baseline step, from means of a sixth of the steps each."""
    if len(base.seconds) < 12:
        return 0.0
    parts = [part.mean() for part in np.array_split(base.seconds, 6)]
    return float(np.var(np.log(parts), ddof=1) / len(parts))
