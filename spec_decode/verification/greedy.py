"""Temperature 0: accept while the draft is the target's argmax."""

from __future__ import annotations

from torch import Tensor

from ..sampling import argmax
from . import Case, Verdict, match


def verify(case: Case) -> Verdict:
    return greedy(case.draft, case.logits, case.p)


def greedy(draft: Tensor, logits: Tensor, p: Tensor | None = None) -> Verdict:
    """Accept while the draft is the target's argmax.

    Args:
        draft: int64 `[..., γ]`.
        logits: `[..., γ + 1, V]`; they decide, since two that differ may have the same probability in float32.
        p: their probabilities, to show; the logits themselves if None.
    """
    return match(draft, argmax(logits), logits if p is None else p)
