"""A person's draft: tokens that were typed, drafted at their places in the output.

In: token ids, and the drafter that drafts after the last of them. Out: drafts with `q` None. No weights, and nothing
that waits for the person: the whole text is there before the lane begins.

Why the output stays what it is. Under greedy and coupled the draft appears nowhere in what is emitted (`decode`), so
the text is the same as without it, token for token. Under rules that draw independently the tokens were not drawn from
a distribution that anyone knows, so q is one-hot: x is accepted with probability p(x), and after a rejection p without
x is drawn from, which together is p (Leviathan et al. 2023, arXiv:2211.17192, with q = 1 at x). A q that the tokens
were not drawn from, such as another drafter's probability of them, would make x too likely or too rare. The argument
needs a draft that does not depend on the noise it is verified with. A person who saw a round knows some of that noise,
so whoever asks for a person's draft under such a rule gives it a seed that has not been used (`session.branch`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from ..draft_length import EarlyStop
from ..events import Reading
from ..settings import Settings
from ..state import State
from . import Draft, Drafter
from .kinds import PERSON


class PersonDrafter(Drafter):
    """Drafts `tokens`, the i-th of them as the i-th token of the output, whatever was emitted before it; where there
    are no more of them, `other` drafts."""

    name = PERSON
    drafts_first = True

    def __init__(self, tokens: Sequence[int], other: Drafter) -> None:
        self.tokens = list(tokens)
        self.other = other
        self.needs_hidden = other.needs_hidden
        self.at = 0

    def start(self, prompt: list[int], settings: Settings, capacity: int) -> Iterable[Reading] | None:
        self.at = 0
        return self.other.start(prompt, settings, capacity)

    def extend(self, tokens: list[int]) -> None:
        self.at += len(tokens)
        self.other.extend(tokens)

    def draft_on_host(self, state: State, length: int, stop: EarlyStop | None) -> Draft | None:
        ids = self.tokens[self.at : self.at + length]
        if not ids:
            return self.other.draft_on_host(state, length, stop)
        return Draft(torch.tensor([ids], dtype=torch.long, device=state.tokens.device), drafter=self.name)

    def draft(self, state: State, length: int) -> Draft:
        return self.other.draft(state, length)

    @property
    def measured(self) -> Drafter:
        return self.other.measured

    def close(self) -> None:
        self.other.close()
