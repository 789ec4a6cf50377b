"""Two drafters in one: prompt lookup where the text repeats itself, another where it does not.

A match that lookup finds costs nothing to find and nothing to judge: what the target went on to say tells whether it
was right, used or not. So each round goes to whichever of the two has lately been right more often, lookup's matches
of every length judged apart. Whole drafts come from one or the other, so every rule stays exactly what it was. How far
a match is followed depends on how often it lately held, and how often it then went on to hold.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from ..draft_length import GoOn
from ..events import Reading
from ..settings import Settings
from ..target import Pass
from . import Draft, Drafter
from .lookup import LookupDrafter

DECAY = 0.9
# Share of first drafts expected to be right before any was seen, and the rounds that this counts for.
AT_FIRST: dict[str | int, float] = {"other": 0.5, "going on": 0.85, 2: 0.4, 3: 0.6}
LONG_MATCH = 0.75
WEIGHT = 3.0
FREE = 0.05  # by how much a draft that costs nothing may be the worse one


class EitherDrafter:
    """Drafts with `lookup` or with `other`, whichever is likelier to be right now."""

    def __init__(self, other: Drafter, lookup: LookupDrafter) -> None:
        self.other = other
        self.lookup = lookup
        self.name = f"{other.name}+{lookup.name}"
        self.needs_hidden = other.needs_hidden

    def start(self, prompt: list[int], settings: Settings, capacity: int) -> Iterable[Reading] | None:
        self.lookup.start(prompt, settings, capacity)
        sources: list[str | int] = ["other", "going on", *self.lookup.sizes]
        self.right = {source: WEIGHT * AT_FIRST.get(source, LONG_MATCH) for source in sources}
        self.tried = dict.fromkeys(sources, WEIGHT)
        self.asked = False  # the other made the latest draft
        return self.other.start(prompt, settings, capacity)

    def extend(self, tokens: list[int], target: Pass) -> None:
        size, continuation = self.lookup.match(len(tokens))
        if size:
            held = [a == b for a, b in zip(continuation, tokens, strict=True)]
            self._learn(size, held[0])
            for before, now in pairwise(held):
                if not before:
                    break
                self._learn("going on", now)
        if self.asked:
            self._learn("other", len(tokens) > 1)  # known without waiting for the device
            self.asked = False
        self.lookup.extend(tokens, target)
        self.other.extend(tokens, target)

    def draft(self, length: int, go_on: GoOn | None = None) -> Draft:
        size, _ = self.lookup.match(1)
        if size and self.rate(size) >= self.rate("other") - FREE:
            sure = [self.rate(size)]
            while len(sure) < length and (go_on is None or go_on(sure)):
                sure.append(self.rate("going on"))
            return self.lookup.draft(len(sure) if go_on else length)
        self.asked = True
        return self.other.draft(length, go_on)

    def close(self) -> None:
        self.lookup.close()
        self.other.close()

    def rate(self, source: str | int) -> float:
        """Share of its latest drafts whose first token was right; `source` is "other" or the length of a match. Of
        "going on": of a match's later tokens, where the one before was right."""
        return self.right[source] / self.tried[source]

    def _learn(self, source: str | int, right: bool) -> None:
        self.right[source] = DECAY * self.right[source] + right
        self.tried[source] = DECAY * self.tried[source] + 1
