"""What drafters have in common that draw one token after another from a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..draft_length import EarlyStop
from ..sampling import Drawn
from . import Draft


def joined(drawn: Sequence[Drawn], device: torch.device | None, drafter: str) -> Draft:
    """The draft made of tokens from `sampling.draw`, one after another, on `device`."""

    def stacked(parts: Iterable[Tensor]) -> Tensor:
        return torch.stack(list(parts), 1).to(device)

    q = None if drawn[0].q is None else stacked(token.q for token in drawn if token.q is not None)
    top = stacked(token.top[0] for token in drawn), stacked(token.top[1] for token in drawn)
    ids, confidence = stacked(token.ids for token in drawn), stacked(token.confidence for token in drawn)
    return Draft(ids, q, confidence, drafter=drafter, top=top)


def as_rows(drafts: Sequence[Draft]) -> Draft:
    """Drafts of one row and of equal length as the rows of one."""

    def rows(parts: Iterable[Tensor | None]) -> Tensor | None:
        given = [part for part in parts if part is not None]
        return torch.cat(given) if given else None

    first, ids = drafts[0], torch.cat([draft.ids for draft in drafts])
    tops = [draft.top for draft in drafts if draft.top is not None]
    top = (torch.cat([top[0] for top in tops]), torch.cat([top[1] for top in tops])) if tops else None
    q, confidence = rows(draft.q for draft in drafts), rows(draft.confidence for draft in drafts)
    return Draft(ids, q, confidence, drafter=first.drafter, top=top)


def go_on(drawn: Sequence[Drawn], stop: EarlyStop | None) -> bool:
    """What `stop` says of tokens from `sampling.draw`, which must be on the CPU."""
    return stop is None or stop.go_on([float(token.confidence) for token in drawn])
