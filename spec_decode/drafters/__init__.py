"""Drafters: whatever guesses the next γ tokens cheaply.

A drafter is fed the sequence as it grows and asked for a draft; it never sees the target's verdict but through what
was emitted. Where `Draft.probabilities` holds q, the ids were drawn from it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..draft_length import GoOn
from ..events import Reading
from ..settings import Settings
from ..target import Pass


@dataclass(frozen=True)
class Draft:
    """ids: int64 `[n]`, n ≤ γ, on the target's device. probabilities: q, float32 `[n, V]`, which the ids were drawn
    from, or None when they were not drawn (lookup, argmax) or the rule does not ask (coupled). confidence: float32
    `[n]`, the drafter's probability of each id, for the eye only."""

    ids: Tensor
    probabilities: Tensor | None = None
    confidence: Tensor | None = None


def joined(drawn: list[tuple[Tensor, Tensor | None, Tensor]], device: torch.device | None = None) -> Draft:
    """The draft made of tokens from `sampling.draw`, one row each, on `device`."""
    ids, q, confidence = zip(*drawn, strict=True)
    sampled = None if q[0] is None else torch.cat(q).to(device)
    return Draft(torch.cat(ids).to(device), sampled, torch.cat(confidence).to(device))


def worth_more(drawn: list[tuple[Tensor, Tensor | None, Tensor]], go_on: GoOn | None) -> bool:
    """What `go_on` says of tokens from `sampling.draw`. On an accelerator always yes: asking would wait for it."""
    if go_on is None or drawn[-1][2].device.type != "cpu":
        return True
    return go_on([float(confidence) for _, _, confidence in drawn])


class Drafter(Protocol):
    """What decoding asks of a drafter. One instance serves one lane at a time; `start` begins a new sequence.

    needs_hidden: the target's last hidden states are wanted in `extend`.
    """

    name: str
    needs_hidden: bool

    def start(self, prompt: list[int], settings: Settings, capacity: int) -> Iterable[Reading] | None:
        """A new sequence begins with `prompt`; it will not grow beyond `capacity` positions. A drafter with a cache of
        its own returns the reading of the prompt, a chunk at a time. Where nobody iterates over that, it reads the
        prompt when it is first asked for a draft."""

    def extend(self, tokens: list[int], target: Pass) -> None:
        """`tokens` were emitted by the pass `target`; the next draft continues after the last of them."""

    def draft(self, length: int, go_on: GoOn | None = None) -> Draft:
        """Up to `length` ≥ 1 tokens that may come next; where confidences are on the host anyway, no further than
        `go_on` says."""

    def close(self) -> None:
        """The sequence is over; its memory can go."""
