"""Rejection sampling, the rule of the first papers on speculative sampling."""

from __future__ import annotations

import torch
from torch import Tensor

from . import Case, Verdict, at, leading_run, own_token, reached


def verify(case: Case) -> Verdict:
    return rejection(case.draft, case.p, case.q, case.noise.uniform(), case.noise.residual())


def rejection(draft: Tensor, p: Tensor, q: Tensor | None, uniform: Tensor, noise: Tensor) -> Verdict:
    """Speculative sampling (Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318).

    Accept x with probability min(1, p(x) / q(x)); after a rejection draw from max(p − q, 0), normalized. The draft must
    have been drawn from q. A draft that was not drawn (lookup, argmax) has no q: pass None and q is one-hot, so x is
    accepted with probability p(x), and after a rejection p without x is drawn from.

    Args:
        draft: int64 `[..., γ]`.
        p: `[..., γ + 1, V]`.
        q: `[..., γ, V]`, or None for a draft that was not drawn.
        uniform: `[..., γ]` in (0, 1), independent of the draft.
        noise: `noise.exponential` `[..., γ + 1, V]`, independent of the draft and of `uniform`.
    """
    px = at(p, draft)
    qx = torch.ones_like(px) if q is None else at(q, draft)
    accepted = leading_run(uniform * qx < px)
    token, rest = own_token(draft, p, q, accepted, noise)
    return Verdict(accepted, token, reached(uniform, (px / qx).clamp_max(1.0), accepted), rest)
