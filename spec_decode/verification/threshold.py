"""Relaxed acceptance: a lossy rule, with its drift measured."""

from __future__ import annotations

import torch
from torch import Tensor

from ..sampling import argmax
from . import Case, Verdict, at, leading_run, one_hot, own_token, reached, residual


def verify(case: Case) -> Verdict:
    if case.temperature == 0:
        return threshold_argmax(case.draft, case.p, case.lenience)
    noise = case.noise
    return threshold(case.draft, case.p, case.q, noise.uniform(), noise.residual(), case.lenience)


def threshold(draft: Tensor, p: Tensor, q: Tensor | None, uniform: Tensor, noise: Tensor, lenience: float) -> Verdict:
    """The relaxed test of Leviathan et al. 2023 (arXiv:2211.17192), appendix A.5.

    Accept x with probability min(1, p(x) / (l · q(x))) for lenience l in (0, 1]; after a rejection draw from
    max(p − l · q, 0), normalized. l = 1 is exact. Arguments and shapes as in `rejection.rejection`.
    """
    px = at(p, draft)
    qx = torch.ones_like(px) if q is None else at(q, draft)
    ok = uniform * lenience * qx < px
    accepted = leading_run(ok)
    token, rest = own_token(draft, p, q, accepted, noise, lenience)
    compared = reached(uniform, (px / (lenience * qx)).clamp_max(1.0), accepted)
    drift = _emitted_kl(draft, p, q, lenience)
    return _with_drift(Verdict(accepted, token, compared, rest), uniform * qx < px, drift)


def threshold_argmax(draft: Tensor, p: Tensor, lenience: float) -> Verdict:
    """The same at temperature 0, with p at temperature 1: accept while p(x) ≥ l · max p, else emit the target's
    argmax."""
    px, best = at(p, draft), p.amax(-1)
    ok = px >= lenience * best[..., :-1]
    accepted = leading_run(ok)
    token = argmax(p).gather(-1, accepted[..., None]).squeeze(-1)
    drift = torch.where(ok, -px.clamp_min(1e-30).log(), -best[..., :-1].log())
    compared = reached(px, lenience * best[..., :-1], accepted)
    return _with_drift(Verdict(accepted, token, compared), px >= best[..., :-1], drift)


def _with_drift(verdict: Verdict, exact: Tensor, drift: Tensor) -> Verdict:
    """The verdict with what it let through: `exact` bool `[..., γ]` is what the exact rule would have accepted with the
    same noise, `drift` `[..., γ]` the divergence of each position in nats."""
    positions = torch.arange(exact.shape[-1], device=exact.device)
    kept, visited = positions < verdict.accepted[..., None], positions <= verdict.accepted[..., None]
    refused = (kept & ~exact).sum(-1)
    # The bonus token is the target's own: its divergence is 0 and it counts as a position.
    kl = torch.where(visited, drift, 0.0).sum(-1) / (verdict.accepted + 1)
    return Verdict(verdict.accepted, verdict.token, verdict.compared, verdict.residual, refused, kl)


def _emitted_kl(draft: Tensor, p: Tensor, q: Tensor | None, lenience: float) -> Tensor:
    """KL(emitted ‖ target) `[..., γ]` of one lenient accept-or-redraw step at each drafted position."""
    p = p[..., : draft.shape[-1], :]
    q = one_hot(draft, p.shape[-1]) if q is None else q
    passed = torch.minimum(q, p / lenience)
    emitted = passed + (1 - passed.sum(-1, keepdim=True)).clamp_min(0) * residual(p, lenience * q)
    return torch.where(emitted > 0, emitted * (emitted / p).log(), 0.0).sum(-1)
