"""What drafters have in common that find matches in the text, on the host, at no cost beside a target pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..draft_length import EarlyStop
from ..state import State
from . import Draft, Drafter


class MatchingDrafter(Drafter):
    """A drafter on the host that finds what followed the end of the text before.

    device: of the target, where drafts go.
    sizes: lengths of matches, in tokens, which are judged separately where another drafter stands beside this one.
    """

    device: torch.device
    sizes: Sequence[int]

    def match(self, length: int) -> tuple[int, list[int]]:
        """The size of the match, 0 if there is none, and up to `length` tokens that would come next."""
        raise NotImplementedError

    def drafted(self, ids: list[int]) -> Draft:
        """The draft of these ids."""
        return Draft(torch.tensor([ids], dtype=torch.long, device=self.device), drafter=self.name)

    def draft_on_host(self, state: State, length: int, stop: EarlyStop | None) -> Draft:
        return self.drafted(self.match(length)[1])
