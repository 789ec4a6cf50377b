"""A lane between two rounds, on the device.

In: a prompt that has been read. Out: the tensors that a round starts from and leaves. A row is one sequence; all rows
are of one length, and today there is one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .cache import RollbackCache
from .settings import MAX_DRAFT_LENGTH


@dataclass
class State:
    """Attributes:
    tokens: int64 `[rows, capacity]`, prompt and output; what stands after `length` are drafts that were refused.
    length: tokens of prompt and output. The host knows it, for it has read every round.
    cache: keys and values of all of them but the last, between rounds.
    hidden: the target's last hidden state at the position that predicted the last token, `[rows, H]`; None where no
        drafter asks for it.
    """

    tokens: Tensor
    length: int
    cache: RollbackCache
    hidden: Tensor | None = None

    @classmethod
    def after(cls, prompt: list[int], capacity: int, cache: RollbackCache, device: torch.device) -> State:
        """The state after `prompt` was read into `cache`; it will not grow beyond `capacity` tokens."""
        tokens = torch.zeros(1, capacity + MAX_DRAFT_LENGTH + 1, dtype=torch.long)
        tokens[0, : len(prompt)] = torch.tensor(prompt)
        return cls(tokens.to(device), len(prompt), cache)

    @property
    def last(self) -> Tensor:
        """The last token, int64 `[rows, 1]`, which the target has not read yet."""
        return self.tokens[:, self.length - 1 : self.length]

    def propose(self, draft: Tensor) -> Tensor:
        """Puts a draft, int64 `[rows, γ]`, after the text; returns what the target is to read: the last token and the
        draft, int64 `[rows, γ + 1]`."""
        end = self.length + draft.shape[1]
        self.tokens[:, self.length : end] = draft
        return self.tokens[:, self.length - 1 : end]

    def accept(self, accepted: Tensor, token: Tensor, hidden: Tensor | None) -> None:
        """Puts the target's own token, int64 `[rows]`, after `accepted` `[rows]` tokens of the draft, and keeps the
        hidden state that predicted it out of the pass's `[rows, γ + 1, H]`. Waits for nothing: the host moves on with
        `advance` once it knows how many tokens there are."""
        self.tokens.scatter_(1, (accepted + self.length)[:, None], token[:, None])
        if hidden is not None:
            at = accepted[:, None, None].expand(-1, 1, hidden.shape[-1])
            self.hidden = hidden.gather(1, at)[:, 0]

    def advance(self, emitted: int) -> None:
        """`emitted` tokens are part of the text now; what the cache holds beyond them is forgotten."""
        self.length += emitted
        self.cache.rollback(self.length - 1)  # the last token has not been read yet
