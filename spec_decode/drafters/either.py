"""Two drafters in one: one on the host that finds repetitions, another where the text does not repeat itself.

A match in the text costs nothing to find and nothing to judge: the target's next tokens tell whether it was right, used
or not. So each round goes to whichever of the two has lately been right more often, matches of every length judged
separately. Whole drafts come from one or the other, so every rule stays exactly what it was. How
far a match is followed depends on how often it lately held, and how often it then continued to hold.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from ..draft_length import EarlyStop
from ..events import Reading
from ..settings import Settings
from ..state import State
from . import Draft, Drafter, early
from .matching import MatchingDrafter

DECAY = 0.9
# Share of first drafts expected to be right before any was seen, and the rounds that this counts for.
AT_FIRST: dict[str | int, float] = {"other": 0.5, "going on": 0.85, 1: 0.2, 2: 0.4, 3: 0.6}
LONG_MATCH = 0.75
WEIGHT = 3.0
FREE = 0.05  # by how much a draft that costs nothing may be the worse one


class EitherDrafter(Drafter):
    """Drafts with `lookup` or with `other`, whichever is likelier to be right now."""

    def __init__(self, other: Drafter, lookup: MatchingDrafter) -> None:
        self.other = other
        self.lookup = lookup
        self.name = f"{other.name}+{lookup.name}"
        self.needs_hidden = other.needs_hidden
        self.recordable = other.recordable

    def start(self, prompt: list[int], settings: Settings, capacity: int) -> Iterable[Reading] | None:
        self.lookup.start(prompt, settings, capacity)
        sources: list[str | int] = ["other", "going on", *self.lookup.sizes]
        self.right = {source: WEIGHT * AT_FIRST.get(source, LONG_MATCH) for source in sources}
        self.tried = dict.fromkeys(sources, WEIGHT)
        self.asked = False  # the other made the latest draft
        return self.other.start(prompt, settings, capacity)

    def extend(self, tokens: list[int]) -> None:
        size, continuation = self.lookup.match(len(tokens))
        if size:
            held = [a == b for a, b in zip(continuation, tokens, strict=False)]
            self._observe(size, held[0])
            for before, now in pairwise(held):
                if not before:
                    break
                self._observe("going on", now)
        if self.asked:
            self._observe("other", len(tokens) > 1)
            self.asked = False
        self.lookup.extend(tokens)
        self.other.extend(tokens)

    def draft_on_host(self, state: State, length: int, stop: EarlyStop | None) -> Draft | None:
        match = self.matched(length)
        if match is None:
            return self.other.draft_on_host(state, length, stop)
        size, continuation = match
        confidences = [self.rate(size)]
        while len(confidences) < len(continuation) and (stop is None or stop.go_on(confidences)):
            confidences.append(self.rate("going on"))
        made = self.lookup.drafted(continuation[: len(confidences)])
        return early(made, stop, len(continuation))

    def matched(self, length: int) -> tuple[int, list[int]] | None:
        """The size of a match and up to `length` tokens that would come next; None where the other is to draft."""
        size, continuation = self.lookup.match(length)
        if size and self.rate(size) >= self.rate("other") - FREE:
            return size, continuation
        self.asked = True
        return None

    def draft(self, state: State, length: int) -> Draft:
        return self.other.draft(state, length)

    @property
    def measured(self) -> Drafter:
        return self.other.measured

    def close(self) -> None:
        self.lookup.close()
        self.other.close()

    def rate(self, source: str | int) -> float:
        """Share of its latest drafts whose first token was right; `source` is "other" or the length of a match. Of
        "going on": of a match's later tokens, where the one before was right."""
        return self.right[source] / self.tried[source]

    def _observe(self, source: str | int, right: bool) -> None:
        self.right[source] = DECAY * self.right[source] + right
        self.tried[source] = DECAY * self.tried[source] + 1
