"""A lane between two rounds, on the device.

In: a prompt that has been read. Out: the tensors that a round starts from and leaves. A row is one sequence; rows may
differ in length. Lengths are a tensor, one for every row, since how many drafted tokens stay is known on the device
first: where a round reads and writes follows from them, so the next one could begin before the host knew. The host's
own `length` serves what works on the host, drafters and int8 kernels, and bounds how far attention has to read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .cache import RollbackCache
from .settings import MAX_DRAFT_LENGTH


@dataclass
class State:
    """Attributes:
    tokens: int64 `[rows, capacity]`, prompt and output; what stands after a row's length are drafts that were refused.
    lengths: int64 `[rows]`, tokens of prompt and output of each row.
    length: what the host has read of it: of one row its length, of several rows no less than the longest.
    cache: keys and values of all of them but the last, between rounds.
    hidden: the target's last hidden state at the position that predicted the last token, `[rows, H]`; None where no
        drafter asks for it.
    seed: words of the seed on the device (`noise.seed_words`), where recorded rounds read them, or of every row's own
        (`noise.row_seed_words`); None where rounds take it from the settings.
    """

    tokens: Tensor
    lengths: Tensor
    length: int
    cache: RollbackCache
    hidden: Tensor | None = None
    seed: Tensor | None = None

    @classmethod
    def after(cls, prompt: list[int], capacity: int, cache: RollbackCache, device: torch.device) -> State:
        """The state after `prompt` was read into `cache`; it will not grow beyond `capacity` tokens."""
        tokens = torch.zeros(1, capacity + MAX_DRAFT_LENGTH + 1, dtype=torch.long)
        tokens[0, : len(prompt)] = torch.tensor(prompt)
        return cls(tokens.to(device), torch.full((1,), len(prompt), device=device), len(prompt), cache)

    @classmethod
    def join(cls, states: Sequence[State]) -> State:
        """The rows of several states in one, in new tensors. All have hidden states, or none has; of their seeds, which
        are not those of rows, it knows nothing."""
        width = max(state.tokens.shape[1] for state in states)
        padded = [torch.nn.functional.pad(state.tokens, (0, width - state.tokens.shape[1])) for state in states]
        hidden = [state.hidden for state in states if state.hidden is not None]
        return cls(
            torch.cat(padded),
            torch.cat([state.lengths for state in states]),
            max(state.length for state in states),
            RollbackCache.join([state.cache for state in states]),
            torch.cat(hidden) if hidden else None,
        )

    def select(self, rows: Sequence[int], length: int) -> State:
        """Some of the rows, in this order, in new tensors; the cache of this state is freed.

        Args:
            length: of the longest of them.
        """
        index = torch.tensor(rows, device=self.tokens.device)
        return State(
            self.tokens[index],
            self.lengths[index],
            length,
            self.cache.select(index, length - 1),
            None if self.hidden is None else self.hidden[index],
            None if self.seed is None else self.seed[..., index],
        )

    def row(self, row: int) -> State:
        """One row, in place, with the cache of all. Reads its length on the host."""
        at, length = slice(row, row + 1), int(self.lengths[row])
        hidden = None if self.hidden is None else self.hidden[at]
        seed = None if self.seed is None else self.seed[..., at]
        return State(self.tokens[at], self.lengths[at], length, self.cache, hidden, seed)

    @property
    def last(self) -> Tensor:
        """The last token of each row, int64 `[rows, 1]`, which the target has not read yet."""
        return self.tokens.gather(1, self.lengths[:, None] - 1)

    def propose(self, draft: Tensor) -> Tensor:
        """Puts a draft, int64 `[rows, γ]`, after the text; returns what the target is to read: the last token and the
        draft, int64 `[rows, γ + 1]`."""
        if draft.shape[1] == 0:
            return self.last
        places = self.lengths[:, None] + torch.arange(-1, draft.shape[1], device=draft.device)
        self.tokens.scatter_(1, places[:, 1:], draft)
        return self.tokens.gather(1, places)

    def accept(self, accepted: Tensor, token: Tensor, hidden: Tensor | None) -> None:
        """Puts the target's own token, int64 `[rows]`, after `accepted` `[rows]` tokens of the draft, forgets what the
        cache holds beyond it, and keeps the hidden state that predicted it out of the pass's `[rows, γ + 1, H]`. Waits
        for nothing: the host moves on with `advance` once it knows how many tokens there are."""
        last = accepted + self.lengths
        self.tokens.scatter_(1, last[:, None], token[:, None])
        self.lengths.copy_(last + 1)
        self.cache.keep(last)  # the last token has not been read yet
        if hidden is not None:
            at = accepted[:, None, None].expand(-1, 1, hidden.shape[-1])
            predicted = hidden.gather(1, at)[:, 0]
            # In place from the second time on: a graph finds it where it was when it was recorded.
            self.hidden = predicted if self.hidden is None else self.hidden.copy_(predicted)

    def unread(self) -> None:
        """Forgets what the cache holds of each row's last token, so that the next pass begins with it: a text that has
        been read to its end gets a draft before the target's own token. The host must know the lengths."""
        self.cache.keep(self.lengths - 1)
        self.cache.settle(self.length - 1)

    def advance(self, emitted: int) -> None:
        """The host has read that the row, or the row with the most of them, got `emitted` tokens."""
        self.bound(self.length + emitted)

    def bound(self, length: int) -> None:
        """No row has more than `length` tokens, as far as the host knows."""
        self.length = length
        self.cache.settle(length - 1)
