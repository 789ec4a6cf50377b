"""Drafters of a batch: a draft for every row at once.

In: a drafter as it is loaded, and the prompt of every row. Out: drafts of one length for all rows. What drafts on the
host keeps the text of its row, so there is one of it for every row; what drafts on the device takes all rows in one
pass.

A row whose drafter gave fewer tokens than another's is filled up with `FILLER`. A filler is a draft like any other: it
depends on nothing but the text so far and was not drawn, so its q is one-hot. A rule that is exact for every draft is
exact for it, and it need not know that it is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..cache import RollbackCache
from ..errors import UserError
from ..settings import Settings
from ..state import State
from ..verification import one_hot
from . import Draft, Drafter, NoDrafter
from .either import EitherDrafter
from .matching import MatchingDrafter
from .model import ModelDrafter
from .mtp import MTPDrafter

FILLER = 0
NOT_GIVEN = -1  # a place in a row that the host has no token for


class RowsDraft(NamedTuple):
    """A draft `[rows, n]`; of each row, how many of its tokens the drafter gave, and the drafter's name."""

    draft: Draft
    counts: list[int]
    names: list[str]

    @classmethod
    def whole(cls, draft: Draft) -> RowsDraft:
        """All rows have all tokens, from one drafter."""
        rows, n = draft.ids.shape
        return cls(draft, [n] * rows, [draft.drafter] * rows)


class RowsDrafter:
    """What decoding asks of the drafter of a batch. Rows are numbered as they stand in the batch now.

    skips: it drafts as well after rounds that it was not asked in.
    """

    skips: bool = True

    def draft(self, state: State, length: int) -> RowsDraft:
        """Up to `length` ≥ 1 tokens for every row, without a wait for the device."""
        raise NotImplementedError

    def extend(self, emitted: Sequence[list[int]]) -> None:
        """What every row emitted. The next draft continues after it."""

    def select(self, rows: Sequence[int]) -> None:
        """The batch goes on with these rows, in this order."""

    def close(self) -> None:
        """The batch is over; its memory can go."""


def in_rows(
    drafter: Drafter, prompts: Sequence[list[int]], settings: Settings, capacity: int, alone: bool = True
) -> RowsDrafter:
    """The drafter of a batch that begins with `prompts`, none of which grows beyond `capacity` positions. A drafter
    with a cache of its own reads them. Not `alone`, some of its drafts are replaced by those of another.

    Raises:
        UserError: this drafter takes one text at a time.
    """
    if isinstance(drafter, NoDrafter):
        return RowsDrafter()
    if isinstance(drafter, EitherDrafter):
        return EitherRows(drafter, prompts, settings, capacity)
    if isinstance(drafter, MatchingDrafter):
        return MatchingRows(drafter, prompts, settings, capacity)
    if isinstance(drafter, MTPDrafter):
        return MTPRows(drafter, settings, capacity)
    if isinstance(drafter, ModelDrafter):
        return ModelRows(drafter, prompts, settings, capacity, alone)
    raise UserError(f"The drafter {drafter.name} takes one text at a time, so it cannot draft for a batch.")


def _start(rows: Sequence[Drafter], prompts: Sequence[list[int]], settings: Settings, capacity: int) -> None:
    """Every row's drafter on the host begins with the row's prompt."""
    for row, prompt in zip(rows, prompts, strict=True):
        row.start(prompt, settings, capacity)


class MatchingRows(RowsDrafter):
    """A drafter on the host for every row."""

    def __init__(
        self, drafter: MatchingDrafter, prompts: Sequence[list[int]], settings: Settings, capacity: int
    ) -> None:
        self.drafters = [copy(drafter) for _ in prompts]
        _start(self.drafters, prompts, settings, capacity)

    def draft(self, state: State, length: int) -> RowsDraft:
        found = [drafter.match(length)[1] for drafter in self.drafters]
        names = [drafter.name for drafter in self.drafters]
        return RowsDraft(Draft(_filled(found, state.tokens.device)), [len(ids) for ids in found], names)

    def extend(self, emitted: Sequence[list[int]]) -> None:
        for drafter, tokens in zip(self.drafters, emitted, strict=True):
            drafter.extend(tokens)

    def select(self, rows: Sequence[int]) -> None:
        self.drafters = [self.drafters[row] for row in rows]


class MTPRows(RowsDrafter):
    """An assistant of the target: it has no memory but the target's, so one serves all rows."""

    def __init__(self, drafter: MTPDrafter, settings: Settings, capacity: int) -> None:
        self.drafter = drafter
        drafter.start([], settings, capacity)

    def draft(self, state: State, length: int) -> RowsDraft:
        return RowsDraft.whole(self.drafter.draft(state, length))

    def close(self) -> None:
        self.drafter.close()


class ModelRows(RowsDrafter):
    """A draft model, with a cache of all rows.

    Args:
        alone: every draft is its own. Then its cache lacks at most the last two tokens of a row, the target's own and
            the last draft, which was never fed. Otherwise it may have read nothing after its last draft began.
    """

    skips = False

    def __init__(
        self, drafter: ModelDrafter, prompts: Sequence[list[int]], settings: Settings, capacity: int, alone: bool
    ) -> None:
        self.drafter, self.alone, self.unread = copy(drafter), alone, 2
        self.lengths = [len(prompt) for prompt in prompts]
        caches = []
        for prompt in prompts:
            for _ in self.drafter.start(prompt, settings, capacity):
                pass
            caches.append(self.drafter.cache)
        self.drafter.cache = RollbackCache.join(caches)
        for cache in caches:
            cache.free()

    def draft(self, state: State, length: int) -> RowsDraft:
        # All rows are fed equally many tokens. A text shorter than that limits them, and another row's draft may miss
        # what it has not read, which costs acceptance.
        made = self.drafter.draft_after(state, min(self.unread, *self.lengths), length)
        self.unread = 2 if self.alone else length + 1
        return RowsDraft.whole(made)

    def extend(self, emitted: Sequence[list[int]]) -> None:
        self.lengths = [length + len(tokens) for length, tokens in zip(self.lengths, emitted, strict=True)]

    def select(self, rows: Sequence[int]) -> None:
        self.lengths = [self.lengths[row] for row in rows]
        cache = self.drafter.cache
        self.drafter.cache = cache.select(torch.tensor(rows, device=cache.lengths.device), cache.length)

    def close(self) -> None:
        self.drafter.close()


class EitherRows(RowsDrafter):
    """Two drafters, of which each row takes the one that is likelier to be right in it. The other than the one that
    finds matches drafts for all rows, unless every row has a match and it `skips` a round without harm."""

    def __init__(self, drafter: EitherDrafter, prompts: Sequence[list[int]], settings: Settings, capacity: int) -> None:
        self.draws_q = settings.draws_q
        self.rows = [EitherDrafter(NoDrafter(), copy(drafter.lookup)) for _ in prompts]
        _start(self.rows, prompts, settings, capacity)
        self.other = in_rows(drafter.other, prompts, settings, capacity, alone=False)
        self.skips = self.other.skips

    def draft(self, state: State, length: int) -> RowsDraft:
        matches = [row.matched(length) for row in self.rows]
        found = [None if match is None else match[1] for match in matches]
        if self.other.skips and all(ids is not None for ids in found):
            given = [ids or [] for ids in found]
            ids = _filled(given, state.tokens.device)
            return RowsDraft(Draft(ids), [len(ids) for ids in given], [row.lookup.name for row in self.rows])
        made = self.other.draft(state, length)
        taken = list(zip(self.rows, found, made.counts, made.names, strict=True))
        return RowsDraft(
            self._merged(found, made.draft),
            [count if ids is None else len(ids) for _, ids, count, _ in taken],
            [name if ids is None else row.lookup.name for row, ids, _, name in taken],
        )

    def _merged(self, found: list[list[int] | None], made: Draft) -> Draft:
        """The drafts of the other drafter, with the matches in their place in the rows that have one."""
        if all(ids is None for ids in found):
            return made
        width = max(made.ids.shape[1], *(len(ids or []) for ids in found))
        host = [[NOT_GIVEN] * width if ids is None else _padded(ids, width) for ids in found]
        ours = torch.tensor(host, device=made.ids.device)
        own, theirs = ours >= 0, F.pad(made.ids, (0, width - made.ids.shape[1]), value=FILLER)
        q = None
        if self.draws_q and made.q is not None:  # a drafter that draws gives drafts of the full length
            q = torch.where(own[..., None], one_hot(ours.clamp_min(0), made.q.shape[-1]), made.q)
        return Draft(
            torch.where(own, ours, theirs),
            q,
            None if made.confidence is None else made.confidence.masked_fill(own, torch.nan),
            top=None if made.top is None else (made.top[0], made.top[1].masked_fill(own[..., None], 0.0)),
        )

    def extend(self, emitted: Sequence[list[int]]) -> None:
        for row, tokens in zip(self.rows, emitted, strict=True):
            row.extend(tokens)
        self.other.extend(emitted)

    def select(self, rows: Sequence[int]) -> None:
        self.rows = [self.rows[row] for row in rows]
        self.other.select(rows)

    def close(self) -> None:
        self.other.close()


def _padded(ids: list[int], width: int) -> list[int]:
    return [*ids, *[FILLER] * (width - len(ids))]


def _filled(rows: Sequence[list[int]], device: torch.device) -> Tensor:
    """Drafts as int64 `[rows, n]`, n tokens of the longest."""
    width = max(map(len, rows))
    return torch.tensor([_padded(ids, width) for ids in rows], dtype=torch.long, device=device)
