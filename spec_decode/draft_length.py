"""How many tokens to draft: controllers that learn from rounds.

In: finished rounds and the pair's measured costs. Out: γ for the next round, 0…γmax, where 0 is a plain step.
Deterministic given the rounds; plain Python, no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from .events import DRAFTED, Costs, Round
from .settings import MAX_DRAFT_LENGTH, Settings


class GoOn:
    """Told the confidences of the tokens drafted so far: is one more worth its cost? A drafted token stays in the draft
    whatever the answer, so the answer may depend on it and every rule stays exact.

    A table, so that compiled code can do without asking: yes while the product of the chances of the confidences so far
    is above `least` of their number.

    Args:
        chances: how often a draft whose confidence lies in the i-th of equal ranges of [0, 1] is accepted.
        least: after n tokens, the last entry for all numbers beyond.
    """

    def __init__(self, chances: Sequence[float], least: Sequence[float]) -> None:
        self.chances = np.array(chances, np.float32)
        self.least = np.array(least, np.float32)
        self.asked = False

    def __call__(self, sure: Sequence[float]) -> bool:
        self.asked = True
        chance = np.float32(1.0)
        for confidence in sure:
            chance *= self.chances[bin_of(confidence, len(self.chances))]
        return bool(chance > self.least[min(len(sure), len(self.least) - 1)])

    @classmethod
    def always(cls) -> GoOn:
        """Never ends a draft."""
        return cls([1.0], [-1.0])


def bin_of(confidence: float, bins: int) -> int:
    """Which of the equal ranges of [0, 1] a confidence lies in."""
    return min(int(confidence * bins), bins - 1)


class Controller(Protocol):
    """Chooses γ before a round, and is told how the round went. `go_on` may end a draft early, see `GoOn`."""

    @property
    def go_on(self) -> GoOn | None: ...

    def choose(self) -> int:
        """γ of the next round."""

    def observe(self, round: Round) -> None:
        """The round is over."""


class Fixed:
    """Always the same γ."""

    go_on: GoOn | None = None

    def __init__(self, length: int) -> None:
        self.length = length

    def choose(self) -> int:
        return self.length

    def observe(self, round: Round) -> None:
        pass


class Threshold:
    """γ from the acceptance rate of recent rounds: above 0.9 → 6, above 0.7 → 4, else 2."""

    go_on: GoOn | None = None

    def __init__(self, decay: float = 0.9) -> None:
        self.decay = decay
        self.accepted = self.drafted = 0.0

    def choose(self) -> int:
        rate = self.accepted / self.drafted if self.drafted else 0.8
        return 6 if rate > 0.9 else 4 if rate > 0.7 else 2

    def observe(self, round: Round) -> None:
        if round.drafted:
            self.accepted = self.decay * self.accepted + round.accepted
            self.drafted = self.decay * self.drafted + round.drafted


class Adaptive:
    """The γ that maximizes modelled tokens per second.

    Tokens a round brings: 1 + Σ of products of per-position acceptance, each a decayed average of what was seen,
    hopeful where nothing was. Seconds a round takes: measured costs, corrected by what rounds of that γ really took.
    When a plain step wins, every now and then a short draft is tried, at intervals that double while drafting goes on
    losing, so that the exploration costs a vanishing share and a change is still noticed.

    Where the drafter's confidences are at hand, γ is only where a draft ends at the latest: it ends as soon as the next
    token is likelier to cost time than to save it (dynamic draft length, as in EAGLE-2, arXiv:2406.16858). How often a
    draft of what confidence is accepted is learnt as well, beginning with what the drafter says. What a round then
    brings depends on when it ended, so drafting as a whole is weighed against plain steps by what rounds took and what
    their confidences promised, which says the same as what they brought and is less a matter of luck.
    """

    BINS = 8  # of confidence
    FIRST = 6  # drafted rounds before their measured rate counts
    DOUBT = 0.96  # of the rate of plain steps, below which drafting stops: both are measured, neither is exact

    def __init__(self, costs: Costs | None, longest: int = MAX_DRAFT_LENGTH, decay: float = 0.92) -> None:
        self.longest = longest
        self.decay = decay
        # Optimistic at first, with the weight of two trials: the first rounds try a real draft.
        self.taken = [1.4] * longest
        self.tried = [2.0] * longest
        if costs is None:
            costs = Costs(1.0, tuple(1 + 0.05 * g for g in range(longest + 1)), 0.05)
        self.modelled = [costs.step_seconds * costs.round(g) for g in range(longest + 1)]
        self.scale = [1.0] * (longest + 1)  # measured over modelled seconds, 1 until measured
        self.seen = [False] * (longest + 1)
        self.all_taken = self.all_modelled = self.modelled[0]  # seconds of all rounds, decayed
        self.since_draft = 0
        self.patience = 8
        self.probe = False
        self.latest: GoOn | None = None  # of the latest draft
        self.weighed = 0  # drafts that could end early
        self.brought = self.took = 0.0  # tokens and seconds of theirs, decayed
        self.sure_taken = [6.0 * (i + 0.5) / self.BINS for i in range(self.BINS)]
        self.sure_tried = [6.0] * self.BINS

    def choose(self) -> int:
        best = max(range(self.longest + 1), key=self._rate)
        if self.weighed >= self.FIRST:
            best = self.longest if self.brought / self.took > self.DOUBT * self._rate(0) else 0
        self.probe = best == 0 and self.since_draft >= self.patience
        self.latest = None
        return (4 if self.weighed else self._cheap_probe()) if self.probe else best

    @property
    def go_on(self) -> GoOn:
        """Ends a draft where the next token, that has to be reached first, is likelier to cost time than to save it."""
        rate = max(self._rate(0), self.brought / self.took if self.took else 0.0)
        pace = self.all_taken / self.all_modelled
        costs = [(self.modelled[n + 1] - self.modelled[n]) * pace for n in range(self.longest)]
        least = [rate * cost * tried / taken for cost, tried, taken in zip(costs, self.tried, self.taken, strict=True)]
        chances = [taken / tried for taken, tried in zip(self.sure_taken, self.sure_tried, strict=True)]
        self.latest = GoOn(chances, [*least, np.inf])
        return self.latest

    def observe(self, round: Round) -> None:
        drafted, accepted = round.drafted, round.accepted
        for i in range(min(accepted + 1, drafted, self.longest)):
            self.tried[i] = self.decay * self.tried[i] + 1
            self.taken[i] = self.decay * self.taken[i] + (i < accepted)
        asked = self.latest is not None and self.latest.asked
        if asked:
            sure = [token.q for token in round.tokens if token.role in DRAFTED and token.q is not None]
            promised = reach = 1.0
            for i, confidence in enumerate(sure):
                reach *= self._chance(confidence)
                promised += reach
                if i <= accepted:
                    bin = bin_of(confidence, self.BINS)
                    self.sure_tried[bin] = 0.98 * self.sure_tried[bin] + 1
                    self.sure_taken[bin] = 0.98 * self.sure_taken[bin] + (i < accepted)
            self.weighed += 1
            # What a probe tells is news, and what was known before it is old.
            decay = 0.5 if self.probe else self.decay
            self.brought = decay * self.brought + (promised if sure else len(round.emitted))
            self.took = decay * self.took + round.seconds
        if drafted <= self.longest and round.seconds > 0:
            # A length's first round sets its scale, so every length is judged by what it took itself (a kernel may fall
            # off a cliff between two widths), and one that never was by the nearest that was. Those not in use drift
            # towards what is seen now, so that one unlucky round is not held against a length for ever.
            error = min(max(round.seconds / self.modelled[drafted], 0.1), 10.0)
            for g in range(self.longest + 1):
                if g == drafted:
                    self.scale[g] += (0.2 if self.seen[g] else 1.0) * (error - self.scale[g])
                elif self.seen[g]:
                    self.scale[g] += 0.005 * (error - self.scale[g])
            self.seen[drafted] = True
            # Where drafts are faster than modelled, so is a plain step that was never seen; where they are slower, it
            # is taken to be as modelled, and will be tried.
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
                # A probe that may end early costs a tenth of a step or so.
                first, last = (4, 64) if asked else (8, 256)
                self.patience = first if accepted else min(self.patience * 2, last)
            self.since_draft = 0

    def _chance(self, confidence: float) -> float:
        """How often a draft of this confidence is accepted."""
        bin = bin_of(confidence, self.BINS)
        return self.sure_taken[bin] / self.sure_tried[bin]

    def expected_tokens(self, length: int) -> float:
        """Tokens a round of draft length `length` is expected to emit."""
        expected = reach = 1.0
        for i in range(length):
            reach *= self.taken[i] / self.tried[i]
            expected += reach
        return expected

    def _rate(self, length: int) -> float:
        return self.expected_tokens(length) / (self.modelled[length] * self.scale[length])

    def _cheap_probe(self) -> int:
        """The draft that costs little more than a step and still tells something."""
        return 2 if self.modelled[2] * self.scale[2] < 1.25 * self.modelled[0] * self.scale[0] else 1


def controller(settings: Settings, costs: Costs | None) -> Controller:
    """The controller that `settings.draft_length` names."""
    if settings.draft_length == "adaptive":
        return Adaptive(costs)
    if settings.draft_length == "threshold":
        return Threshold()
    return Fixed(int(settings.draft_length))
