"""Coupled sampling: draft and target draw with the same noise, and a draft is accepted if both drew the same token."""

from __future__ import annotations

from torch import Tensor

from ..sampling import argmax
from . import Case, Verdict, match


def verify(case: Case) -> Verdict:
    return coupled(case.draft, case.p, case.noise.shared())


def coupled(draft: Tensor, p: Tensor, noise: Tensor) -> Verdict:
    """Accept while the draft is the token the target itself draws with this noise (arXiv:2408.07978).

    The output is the target's own sample for this noise whatever was drafted; a drafter that draws with the same
    noise is accepted with probability at least (1 − TV(p, q)) / (1 + TV(p, q)).

    Args:
        draft: int64 `[..., γ]`.
        p: `[..., γ + 1, V]`.
        noise: `noise.exponential` of the same shape, the same that the drafter drew with.
    """
    scores = p / noise
    return match(draft, argmax(scores), scores)
