"""Prompt lookup: the longest suffix of the sequence that occurred before, and what followed it then.

No weights, no device work (A. Saxena, "Prompt Lookup Decoding", 2023). Cheap because every n-gram is indexed once, as
the sequence grows: a draft is a few dictionary look-ups.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..settings import Settings
from .matching import MatchingDrafter

if TYPE_CHECKING:
    from ..loading.drafter import LoadContext


class LookupDrafter(MatchingDrafter):
    """Drafts by n-gram match, longest first (`longest`…`shortest` tokens), the most recent match winning.

    A match that runs into the end of the sequence goes on with the draft itself, so a repetition of any period is
    continued for as long as asked.
    """

    name = "lookup"

    def __init__(self, device: torch.device | str = "cpu", longest: int = 4, shortest: int = 2) -> None:
        self.device = torch.device(device)
        self.sizes = range(longest, shortest - 1, -1)
        self.tokens: list[int] = []
        self.index: dict[tuple[int, ...], int] = {}

    def start(self, prompt: list[int], settings: Settings, capacity: int) -> None:
        self.tokens, self.index = [], {}
        self.extend(prompt)

    def extend(self, tokens: list[int]) -> None:
        for token in tokens:
            # Index what ends just before the new token, so that a suffix never finds itself.
            end = len(self.tokens)
            for n in self.sizes:
                if end >= n:
                    self.index[tuple(self.tokens[end - n :])] = end
            self.tokens.append(token)

    def match(self, length: int) -> tuple[int, list[int]]:
        """How many tokens of the suffix occurred before, 0 if none, and the `length` that would come next."""
        for n in self.sizes:
            follows = self.index.get(tuple(self.tokens[-n:])) if len(self.tokens) >= n else None
            if follows is not None:
                period = len(self.tokens) - follows
                return n, [self.tokens[follows + i % period] for i in range(length)]
        return 0, []

    def close(self) -> None:
        self.tokens, self.index = [], {}


def load(context: LoadContext) -> LookupDrafter:
    """The drafter beside a target; see `kinds.Kind.load`."""
    return LookupDrafter(context.target.device)
