"""A target that is a table of logits, so small that the distribution of its texts can be written out.

In: logits of the next token given the last two. Out: what `decode` asks of a `Target`, of its cache and of a text
stream. Everything else in a test is the engine's own.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..target import Pass


class TableCache:
    """The ids that a `TableTarget` has read."""

    def __init__(self) -> None:
        self.ids: list[int] = []

    @property
    def length(self) -> int:
        return len(self.ids)

    def rollback(self, length: int) -> None:
        assert length <= len(self.ids)
        del self.ids[length:]

    def keep(self, lengths: Tensor) -> None:
        self.rollback(int(lengths))

    def settle(self, length: int) -> None:
        assert length <= len(self.ids)

    def free(self) -> None:
        self.ids = []


class TableTarget:
    """A `Target` whose logits `[V, V, V]` are those of the next token given the last two."""

    device = torch.device("cpu")
    eos: frozenset[int] = frozenset()

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        self.vocabulary = logits.shape[-1]
        self._flat = logits.reshape(-1, self.vocabulary)

    def new_cache(self, capacity: int) -> TableCache:
        return TableCache()

    def prefill(self, tokens: Tensor, cache: TableCache, hidden: bool = False) -> Pass:
        return Pass(self.verify(tokens, cache).logits[..., -1:, :], None, cache)  # type: ignore[arg-type]

    def read(self, tokens: Tensor, cache: TableCache, hidden: bool = False) -> Iterator[Pass]:
        yield self.prefill(tokens, cache)

    def verify(self, tokens: Tensor, cache: TableCache, hidden: bool = False) -> Pass:
        start = len(cache.ids)
        cache.ids += tokens.view(-1).tolist()
        ids = cache.ids
        rows = [ids[max(i - 1, 0)] * self.vocabulary + ids[i] for i in range(start, len(ids))]
        return Pass(self._flat[rows].view(*tokens.shape, -1), None, cache)  # type: ignore[arg-type]


class SilentText:
    """A text stream that says nothing."""

    def push(self, token: int) -> str:
        return ""

    def fork(self) -> SilentText:
        return self

    def flush(self) -> str:
        return ""


def joint(p: Tensor, prompt: tuple[int, ...], tokens: int) -> Tensor:
    """The probability of every text of `tokens` tokens after `prompt`, float64 `[V] * tokens`.

    Args:
        p: of the next token given the last two, `[V, V, V]`; renormalized in float64.
    """
    exact = p.double()
    exact = exact / exact.sum(-1, keepdim=True)
    found = torch.ones((), dtype=torch.float64)
    for i in range(tokens):
        if i == 0:
            step = exact[prompt[-2], prompt[-1]]
        elif i == 1:
            step = exact[prompt[-1]]
        else:
            step = exact
        found = found[..., None] * step
    return found
