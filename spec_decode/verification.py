"""The verification rules: which drafted tokens stay, and which token the target adds.

In: the draft, the target's distribution p at γ + 1 positions, the drafter's q where it drew from one, and noise.
Out: a `Verdict`. Pure functions of tensors, batched over leading dimensions, with no loop over tokens or vocabulary
and no wait for the device. `settings` chooses among them; nothing here knows what a model is.

Shapes throughout: draft `[..., γ]`, p `[..., γ + 1, V]`, q `[..., γ, V]`. γ may be 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .sampling import largest, race


@dataclass(frozen=True)
class Verdict:
    """accepted: int64 `[...]`, how many drafted tokens stay, 0…γ. token: int64 `[...]`, the target's own token after
    them. Only the lossy rule fills `refused` (int64 `[...]`, accepted tokens the exact rule would have refused with the
    same noise) and `kl` (float32 `[...]`, mean over the visited positions of KL(emitted ‖ target), nats)."""

    accepted: Tensor
    token: Tensor
    refused: Tensor | None = None
    kl: Tensor | None = None


def greedy(draft: Tensor, logits: Tensor) -> Verdict:
    """Temperature 0: accept while the draft is the target's argmax.

    Args:
        draft: int64 `[..., γ]`.
        logits: `[..., γ + 1, V]`; only their order matters.
    """
    return _match(draft, largest(logits))


def coupled(draft: Tensor, p: Tensor, noise: Tensor) -> Verdict:
    """Accept while the draft is the token the target itself draws with this noise (arXiv:2408.07978).

    The output is the target's own sample for this noise whatever was drafted; a drafter that draws with the same
    noise is accepted with probability at least (1 − TV(p, q)) / (1 + TV(p, q)).

    Args:
        draft: int64 `[..., γ]`.
        p: `[..., γ + 1, V]`.
        noise: `sampling.exponential` of the same shape, the same that the drafter drew with.
    """
    return _match(draft, race(p, noise))


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
        noise: `sampling.exponential` `[..., γ + 1, V]`, independent of the draft and of `uniform`.
    """
    px, qx = _at(p, draft), 1.0 if q is None else _at(q, draft)
    accepted = _run(uniform * qx < px)
    return Verdict(accepted, _own_token(draft, p, q, accepted, noise, 1.0))


def threshold(
    draft: Tensor, p: Tensor, q: Tensor | None, uniform: Tensor, noise: Tensor, lenience: float, argmax: bool
) -> Verdict:
    """Lossy: the relaxed test of Leviathan et al. 2023, appendix A.5, with its drift measured.

    Accept x with probability min(1, p(x) / (l · q(x))) for lenience l in (0, 1]; after a rejection draw from
    max(p − l · q, 0), normalized. With `argmax` (temperature 0; p and q then at temperature 1): accept when p(x) ≥
    l · max p, else emit the target's argmax. l = 1 is exact. Arguments and shapes as in `rejection`.
    """
    px = _at(p, draft)
    if argmax:
        best = p.amax(-1)
        ok = px >= lenience * best[..., :-1]
        exact = px >= best[..., :-1]
        accepted = _run(ok)
        token = largest(p).gather(-1, accepted[..., None]).squeeze(-1)
        drift = torch.where(ok, -px.clamp_min(1e-30).log(), -best[..., :-1].log())
    else:
        qx = torch.ones_like(px) if q is None else _at(q, draft)
        ok = uniform * lenience * qx < px
        exact = uniform * qx < px
        accepted = _run(ok)
        token = _own_token(draft, p, q, accepted, noise, lenience)
        drift = _emitted_kl(draft, p, q, lenience)
    kept = torch.arange(draft.shape[-1], device=draft.device) < accepted[..., None]
    visited = torch.arange(draft.shape[-1], device=draft.device) <= accepted[..., None]
    refused = (kept & ~exact).sum(-1)
    # The bonus token is the target's own: its divergence is 0 and it counts as a position.
    kl = torch.where(visited, drift, 0.0).sum(-1) / (accepted + 1)
    return Verdict(accepted, token, refused, kl)


def residual(p: Tensor, q: Tensor) -> Tensor:
    """max(p − q, 0) normalized, `[..., V]`; p itself where nothing is left (p = q up to rounding)."""
    rest = (p - q).clamp_min(0)
    mass = rest.sum(-1, keepdim=True)
    return torch.where(mass > 0, rest / torch.where(mass > 0, mass, 1.0), p)


def _match(draft: Tensor, own: Tensor) -> Verdict:
    accepted = _run(draft == own[..., :-1])
    return Verdict(accepted, own.gather(-1, accepted[..., None]).squeeze(-1))


def _run(ok: Tensor) -> Tensor:
    """Length of the leading run of True, `[..., γ]` → `[...]`."""
    return ok.long().cumprod(-1).sum(-1)


def _at(p: Tensor, draft: Tensor) -> Tensor:
    """Probability of each drafted token: `[..., γ(+1), V]` at `[..., γ]` → `[..., γ]`."""
    return p[..., : draft.shape[-1], :].gather(-1, draft[..., None]).squeeze(-1)


def _own_token(draft: Tensor, p: Tensor, q: Tensor | None, accepted: Tensor, noise: Tensor, lenience: float) -> Tensor:
    """The correction at the first refused position, or the bonus after the last: int64 `[...]`."""
    row = accepted[..., None, None].expand(*accepted.shape, 1, p.shape[-1])
    own_p, own_noise = p.gather(-2, row).squeeze(-2), noise.gather(-2, row).squeeze(-2)
    length = draft.shape[-1]
    if length == 0:
        return race(own_p, own_noise)
    at = accepted.clamp_max(length - 1)[..., None]
    if q is None:
        own_q = torch.zeros_like(own_p).scatter_(-1, draft.gather(-1, at), 1.0)
    else:
        own_q = q.gather(-2, at[..., None].expand(*at.shape, p.shape[-1])).squeeze(-2)
    own_q = torch.where(accepted[..., None] == length, 0.0, own_q)  # the bonus is drawn from p itself
    return race(residual(own_p, lenience * own_q), own_noise)


def _emitted_kl(draft: Tensor, p: Tensor, q: Tensor | None, lenience: float) -> Tensor:
    """KL(emitted ‖ target) `[..., γ]` of one lenient accept-or-redraw step at each drafted position."""
    p = p[..., : draft.shape[-1], :]
    if q is None:
        q = torch.zeros_like(p).scatter_(-1, draft[..., None], 1.0)
    passed = torch.minimum(q, p / lenience)
    emitted = passed + (1 - passed.sum(-1, keepdim=True)).clamp_min(0) * residual(p, lenience * q)
    return torch.where(emitted > 0, emitted * (emitted / p).log(), 0.0).sum(-1)
