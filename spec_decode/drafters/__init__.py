"""Drafters: whatever proposes the next γ tokens cheaply.

A drafter is asked for a draft after the text of a `State`. It never sees the target's verdict except through what was
emitted. Where `Draft.q` is given, the ids were drawn from it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `kinds` must import without torch
    from torch import Tensor

    from ..draft_length import EarlyStop
    from ..events import Reading
    from ..settings import Settings
    from ..state import State


@dataclass(frozen=True)
class Draft:
    """ids: int64 `[rows, n]`, n ≤ γ, on the target's device.
    q: float32 `[rows, n, V]`, which the ids were drawn from, or None when they were not drawn (lookup, argmax), or
        where it was not computed because the rule does not ask for it (coupled).
    confidence: float32 `[rows, n]`, the drafter's probability of each id.
    stopped_early: whether an `EarlyStop` ended the draft; None where none was asked, so that its length was certain.
    drafter: name of the drafter that made it.
    top: the drafter's likeliest tokens at each position, ids int64 and probabilities float32 `[rows, n, TOP]`; None
        where it has no probabilities.
    """

    ids: Tensor
    q: Tensor | None = None
    confidence: Tensor | None = None
    stopped_early: bool | None = None
    drafter: str = ""
    top: tuple[Tensor, Tensor] | None = None

    @classmethod
    def none(cls, state: State) -> Draft:
        """No tokens."""
        return cls(state.tokens[:, :0])


class Drafter:
    """What decoding asks of a drafter. One instance serves one lane at a time; `start` begins a new sequence.

    name: as shown.
    needs_hidden: `State.hidden` is wanted.
    needs_text: the next draft depends on what `extend` tells. Where it does not, it depends on the `State` alone, and
        can be made before the host has read the round before.
    drafts_first: its first draft comes right after the given text, before the target has emitted a token. The reading
        of the text then emits none.
    recordable: what `draft` reads and writes lies in the `State` and in weights alone, at addresses that stay, so that
        a graph can repeat it (`graphs`).
    """

    name: str = ""
    needs_hidden: bool = False
    needs_text: bool = True
    drafts_first: bool = False
    recordable: bool = False

    def start(self, prompt: list[int], settings: Settings, capacity: int) -> Iterable[Reading] | None:
        """A new sequence begins with `prompt`; it will not grow beyond `capacity` positions. A drafter with a cache of
        its own returns the reading of the prompt, a chunk at a time. Where nobody iterates over that, it reads the
        prompt when it is first asked for a draft."""
        return None

    def extend(self, tokens: list[int]) -> None:
        """`tokens` were emitted. The next draft continues after the last of them."""

    def draft_on_host(self, state: State, length: int, stop: EarlyStop | None) -> Draft | None:
        """Up to `length` ≥ 1 tokens from a drafter that works on the host, or may end a draft early since it knows its
        confidences there; None from one that is to be asked by `draft`, on the device."""
        return None

    def draft(self, state: State, length: int) -> Draft:
        """`length` ≥ 1 tokens for every row, without a wait for the device. Its operations depend on `length` and on
        the bucket of `state.length + length` alone."""
        raise NotImplementedError(f"{self.name} drafts on the host")

    def close(self) -> None:
        """The sequence is over; its memory can go."""

    @property
    def measured(self) -> Drafter:
        """The drafter whose cost counts where this one is a combination."""
        return self


class NoDrafter(Drafter):
    """The baseline's: there is no draft."""

    needs_text = False

    def draft_on_host(self, state: State, length: int, stop: EarlyStop | None) -> Draft:
        return Draft.none(state)


def early(draft: Draft, stop: EarlyStop | None, most: int) -> Draft:
    """The draft with word of whether `stop` ended it before `most` tokens. It could end none that is empty, or that
    could have had one token only."""
    count = draft.ids.shape[1]
    return draft if stop is None or count == 0 or most == 1 else replace(draft, stopped_early=count < most)
