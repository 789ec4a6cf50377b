"""Draft-length controllers: how many tokens to draft in the next round.

In: finished rounds and the measured costs of the pair. Out: γ for the next round, 0…γmax, where 0 is a plain step.
Deterministic given the rounds. Independent of torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from .events import DRAFTED, Costs, Round
from .settings import MAX_DRAFT_LENGTH, Settings

# What is chosen among where every length takes a recording (`graphs`). Dense where γ usually is: the expected tokens of
# a round change little from one length to the next, so the best of these is within a few percent of the best of all.
RECORDED = (0, 1, 2, 3, 4, 6, 8, 16)


class EarlyStop:
    """Decides by the confidences of the tokens drafted so far whether one more is worth its cost. A drafted token stays
    in the draft whatever the answer, so the answer may depend on it and every rule stays exact.

    The decision is a table, so that compiled code can make it too: drafting continues while the product of the
    acceptance probabilities of the tokens so far is above `least[n]`, where n is their number.

    Args:
        chances: acceptance probability of a draft whose confidence lies in the i-th of equal ranges of [0, 1].
        least: thresholds by number of drafted tokens; the last entry holds for all larger numbers.
    """

    def __init__(self, chances: Sequence[float], least: Sequence[float]) -> None:
        self.chances = np.array(chances, np.float32)
        self.least = np.array(least, np.float32)

    def go_on(self, confidences: Sequence[float]) -> bool:
        """Whether to draft another token after those with these confidences."""
        reach = np.float32(1.0)  # probability that all of them are accepted
        for confidence in confidences:
            reach *= self.chances[bin_of(confidence, len(self.chances))]
        return bool(reach > self.least[min(len(confidences), len(self.least) - 1)])

    @classmethod
    def never(cls) -> EarlyStop:
        """A table that ends no draft early."""
        return cls([1.0], [-1.0])


def bin_of(confidence: float, bins: int) -> int:
    """The index of the range that holds `confidence`, of `bins` equal ranges of [0, 1]."""
    return min(int(confidence * bins), bins - 1) if confidence == confidence else 0  # NaN: broken weights


class Controller(Protocol):
    """Chooses γ before a round and observes the finished round."""

    @property
    def early_stop(self) -> EarlyStop | None:
        """What may end the next draft before γ; None if drafts always have γ tokens."""

    def choose(self) -> int:
        """γ of the next round."""

    def observe(self, round: Round, stopped_early: bool | None) -> None:
        """Updates the estimates with a finished round; `stopped_early` as in `Draft`."""


class Fixed:
    """Always the same γ."""

    early_stop: EarlyStop | None = None

    def __init__(self, length: int) -> None:
        self.length = length

    def choose(self) -> int:
        return self.length

    def observe(self, round: Round, stopped_early: bool | None = None) -> None:
        pass


class Rate:
    """γ from the acceptance rate of recent rounds: above 0.9 → 6, above 0.7 → 4, else 2."""

    early_stop: EarlyStop | None = None

    def __init__(self, decay: float = 0.9) -> None:
        self.decay = decay
        self.accepted = self.drafted = 0.0

    def choose(self) -> int:
        rate = self.accepted / self.drafted if self.drafted else 0.8
        return 6 if rate > 0.9 else 4 if rate > 0.7 else 2

    def observe(self, round: Round, stopped_early: bool | None = None) -> None:
        if round.drafted:
            self.accepted = self.decay * self.accepted + round.accepted
            self.drafted = self.decay * self.drafted + round.drafted


class Adaptive:
    """The γ that maximizes modelled tokens per second.

    Expected tokens of a round: 1 + Σ of products of per-position acceptance. Each acceptance is a decayed average of
    the observed outcomes, optimistic where none was observed. Seconds of a round: measured costs, corrected by the
    observed seconds of rounds with that γ. While plain steps are faster, a short draft is tried at intervals that
    double, up to a limit, as long as drafting stays slower. Exploration therefore takes a small share of the time, and
    a change is still detected.

    Where the host knows the drafter's confidences, γ is only an upper bound: a draft ends when the expected gain of
    another token is below its cost (dynamic draft length, as in EAGLE-2, arXiv:2406.16858). The acceptance probability
    for a given confidence is estimated too, with the confidence itself as prior. The number of tokens emitted depends
    on where the draft ended. Drafting is therefore compared with plain steps by the number of tokens that the
    confidences predict, which has the same expectation as the number emitted and lower variance. Drafting stops only
    where it is slower by more than the uncertainty of that comparison, which is large after few rounds: stopping too
    early costs more than a few slow rounds, since most drafters pay.

    Args:
        costs: measured before, None where nothing was.
        longest: γmax.
        among: the lengths to choose among, 0 one of them; None for all up to `longest`. No output depends on it: γ is a
            function of past rounds alone, which is all that the rules ask of it (`decode`).
    """

    BINS = 8  # ranges of confidence
    MEMORY = 0.97  # decay of the average that compares drafting with plain steps: the last 33 rounds or so
    SCATTER = 0.2  # uncertainty of that comparison after one round; it falls with the root of the rounds remembered
    AHEAD = 4  # positions whose mean acceptance is expected of a token not drafted yet

    def __init__(
        self,
        costs: Costs | None,
        longest: int = MAX_DRAFT_LENGTH,
        decay: float = 0.92,
        among: Sequence[int] | None = None,
    ) -> None:
        self.longest = longest
        self.among = range(longest + 1) if among is None else [length for length in among if length <= longest]
        self.decay = decay
        # An optimistic prior with the weight of two trials, so that the first rounds draft.
        self.taken = [1.4] * longest
        self.tried = [2.0] * longest
        if costs is None:
            costs = Costs(1.0, tuple(1 + 0.05 * g for g in range(longest + 1)), 0.05)
        self.modelled = [costs.step_seconds * costs.round(g) for g in range(longest + 1)]
        self.scale = [1.0] * (longest + 1)  # measured ÷ modelled seconds, 1 until measured
        self.seen = [False] * (longest + 1)
        self.all_taken = self.all_modelled = self.modelled[0]  # seconds of all rounds, decayed
        self.since_draft = 0
        self.patience = 8
        self.probe = False
        self.weighed = 0  # drafts that could end early
        self.predicted = self.took = 0.0  # predicted tokens and seconds of these rounds, decayed
        self.confidence_taken = [6.0 * (i + 0.5) / self.BINS for i in range(self.BINS)]
        self.confidence_tried = [6.0] * self.BINS

    def choose(self) -> int:
        rates = self._rates()
        best = max(self.among, key=rates.__getitem__)
        if self.weighed:
            best = max(self.among) if self.predicted / self.took > self._doubt() * rates[0] else 0
        self.probe = best == 0 and self.since_draft >= self.patience
        return within(4 if self.weighed else self._cheap_probe(), self.longest, self.among) if self.probe else best

    @property
    def early_stop(self) -> EarlyStop:
        """Ends a draft where the expected gain of the next token is below its cost. The token only counts if all tokens
        before it are accepted."""
        rate = max(self._plain_rate(), self.predicted / self.took if self.took else 0.0)
        pace = self.all_taken / self.all_modelled
        costs = [(self.modelled[n + 1] - self.modelled[n]) * pace for n in range(self.longest)]
        # the mean of the first positions, since later ones are seldom reached and therefore hardly known
        chance = sum(self.taken[: self.AHEAD]) / sum(self.tried[: self.AHEAD])
        least = [rate * cost / chance for cost in costs]
        chances = [taken / tried for taken, tried in zip(self.confidence_taken, self.confidence_tried, strict=True)]
        return EarlyStop(chances, [*least, np.inf])

    def observe(self, round: Round, stopped_early: bool | None = None) -> None:
        drafted, accepted = round.drafted, round.accepted
        for i in range(min(accepted + 1, drafted, self.longest)):
            self.tried[i] = self.decay * self.tried[i] + 1
            self.taken[i] = self.decay * self.taken[i] + (i < accepted)
        could_stop = stopped_early is not None
        if could_stop:
            confidences = [token.q for token in round.tokens if token.role in DRAFTED and token.q is not None]
            predicted = reach = 1.0
            for i, confidence in enumerate(confidences):
                reach *= self._acceptance(confidence)
                predicted += reach
                if i <= accepted:
                    bin = bin_of(confidence, self.BINS)
                    self.confidence_tried[bin] = 0.98 * self.confidence_tried[bin] + 1
                    self.confidence_taken[bin] = 0.98 * self.confidence_taken[bin] + (i < accepted)
            self.weighed += 1
            # The estimate before a probe is old, so it gets less weight.
            decay = 0.5 if self.probe else self.MEMORY
            self.predicted = decay * self.predicted + (predicted if confidences else len(round.emitted))
            self.took = decay * self.took + round.seconds
        if drafted <= self.longest and round.seconds > 0:
            # The first round of a length sets its scale, since kernel time may jump between two widths. A length that
            # was never used has the scale of the nearest one that was. The scales of lengths not in use drift towards
            # the latest observation, so that a single slow round does not exclude a length for ever.
            error = min(max(round.seconds / self.modelled[drafted], 0.1), 10.0)
            for g in range(self.longest + 1):
                if g == drafted:
                    self.scale[g] += (0.2 if self.seen[g] else 1.0) * (error - self.scale[g])
                elif self.seen[g]:
                    self.scale[g] += 0.005 * (error - self.scale[g])
            self.seen[drafted] = True
            # A plain step that was never measured is assumed to be faster than modelled if drafts are. If drafts are
            # slower than modelled, the plain step keeps its modelled time, so that it is tried.
            known = [g for g in range(1, self.longest + 1) if self.seen[g]]
            for g in range(self.longest + 1) if known else ():
                if not self.seen[g]:
                    nearest = self.scale[min(known, key=lambda k: abs(k - g))]
                    self.scale[g] = nearest if g else min(nearest, 1.0)
            self.all_taken = self.decay * self.all_taken + round.seconds
            self.all_modelled = self.decay * self.all_modelled + self.modelled[drafted]
        if drafted == 0:
            self.since_draft += 1
        else:
            if self.probe:
                # A probe that may end early costs about a tenth of a step.
                first, last = (4, 64) if could_stop else (8, 256)
                self.patience = first if accepted else min(self.patience * 2, last)
            self.since_draft = 0

    def _acceptance(self, confidence: float) -> float:
        """Estimated acceptance probability of a draft with this confidence."""
        bin = bin_of(confidence, self.BINS)
        return self.confidence_taken[bin] / self.confidence_tried[bin]

    def _doubt(self) -> float:
        """The share of the rate of plain steps below which drafting is taken to be slower."""
        return 1 - self.SCATTER / math.sqrt(min(self.weighed, 1 / (1 - self.MEMORY)))

    def _plain_rate(self) -> float:
        """Tokens per second of plain steps."""
        return 1 / (self.modelled[0] * self.scale[0])

    def expected_tokens(self) -> list[float]:
        """Expected number of emitted tokens of a round with draft length 0, 1, …"""
        expected, reach = [1.0], 1.0
        for taken, tried in zip(self.taken, self.tried, strict=True):
            reach *= taken / tried
            expected.append(expected[-1] + reach)
        return expected

    def _rates(self) -> list[float]:
        """Expected tokens per second with draft length 0, 1, … Computed every round, within the round's time."""
        tokens = self.expected_tokens()
        return [n / (cost * scale) for n, cost, scale in zip(tokens, self.modelled, self.scale, strict=True)]

    def _cheap_probe(self) -> int:
        """The draft length of a probe: 2 where a draft of 2 costs less than 1.25 plain steps, else 1."""
        return 2 if self.modelled[2] * self.scale[2] < 1.25 * self.modelled[0] * self.scale[0] else 1


def controller(settings: Settings, costs: Costs | None, among: Sequence[int] | None = None) -> Controller:
    """The controller that `settings.draft_length` names; an adaptive one chooses `among` these."""
    if settings.draft_length == "adaptive":
        return Adaptive(costs, among=among)
    if settings.draft_length == "rate":
        return Rate()
    return Fixed(int(settings.draft_length))


def within(length: int, most: int, among: Sequence[int] | None) -> int:
    """A draft length of at most `most`: `length` where it is no longer, else the longest of `among` that is not, or
    `most` itself where they are None.

    Near the end of a text γ is limited, to lengths that occur once in a text. Those of `among` are recorded already. A
    shorter draft costs the text a round at most, where a new recording costs several; a draft that is filled up instead
    would compute tokens that cannot be emitted.
    """
    if length <= most:
        return length
    return most if among is None else max((n for n in among if n <= most), default=0)
