"""Block verification: the draft is judged as a whole, which accepts on average no fewer tokens than rejection."""

from __future__ import annotations

import torch
from torch import Tensor

from ..sampling import exponential_argmax
from . import Case, Verdict, at, normalized, one_hot, row


def verify(case: Case) -> Verdict:
    return block(case.draft, case.p, case.q, case.noise.uniform(), case.noise.residual())


def block(draft: Tensor, p: Tensor, q: Tensor | None, uniform: Tensor, noise: Tensor) -> Verdict:
    """Block verification (Sun et al. 2024, arXiv:2403.10444, algorithm 2). Arguments as in `rejection.rejection`.

    With r_0 = 1 and r_i = min(1, r_{i−1} · p(x_i) / q(x_i)), and S_i the mass of max(r_i · p − q, 0) after i tokens,
    the draft is accepted up to the last i whose uniform number is below h_i = S_i / (S_i + 1 − r_i), where h_γ = r_γ.
    The target's own token is drawn from max(r_i · p − q, 0), normalized, or from p after the whole draft.

    Why it is exact: given that x_1 … x_i were drafted, at least i tokens are accepted with probability r_i. At the end
    of the draft that is h_γ. Before it, i + 1 or more are accepted with probability Σ_x min(r_i · p(x), q(x)) =
    r_i − S_i, and if they are not, i are with probability h_i; together that is r_i. So x_1 … x_i is emitted with
    probability r_i · Π q(x_j), and the residual adds what is missing of Π p(x_j). Each step of the argument looks at
    one prefix, so γ may depend on the tokens drafted before.
    """
    length = draft.shape[-1]
    if length == 0:
        own = p[..., 0, :]
        nothing = torch.zeros(draft.shape[:-1], dtype=torch.long, device=draft.device)
        return Verdict(nothing, exponential_argmax(own, noise[..., 0, :]), torch.stack([uniform, uniform], -1), own)
    drawn = one_hot(draft, p.shape[-1]) if q is None else q
    gain = (at(p, draft) / at(drawn, draft)).log().cumsum(-1)
    # r_i = min(1, r_{i−1} · ratio): in logarithms a sum that is kept at 0 or below, which is the sum less its maximum
    # so far. NaN, where p or q is none, refuses the token.
    ratio = (gain - _running_max(gain)).exp().nan_to_num(0.0)  # [..., γ], r_1 … r_γ
    rest = ratio[..., :-1, None] * p[..., 1:-1, :]
    mass = rest.sub_(drawn[..., 1:, :]).clamp_min_(0).sum(-1)  # S_1 … S_{γ−1}
    refused = 1 - ratio[..., :-1]
    inner = torch.where(mass + refused == 0, 1.0, mass / (mass + refused)).nan_to_num(0.0)
    bound = torch.cat([inner, ratio[..., -1:]], -1)
    places = torch.arange(1, length + 1, device=draft.device)
    accepted = torch.where(uniform < bound, places, 0).amax(-1)
    # The row that the target's own token comes from: r · p − q after fewer than γ tokens, p after all of them.
    own_p, own_q = row(p, accepted), row(drawn, accepted.clamp_max(length - 1))
    kept = torch.nn.functional.pad(ratio, (1, 0), value=1.0).gather(-1, accepted[..., None])
    whole = (accepted == length)[..., None]
    own = torch.where(whole, own_p, (kept * own_p - own_q).clamp_min(0))
    token = exponential_argmax(normalized(own, own_p), row(noise, accepted))
    return Verdict(accepted, token, torch.stack([uniform, bound], -1), own)


def _running_max(x: Tensor) -> Tensor:
    """The maximum of 0 and of the entries up to each, `[..., γ]`."""
    length = x.shape[-1]
    later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
    return x[..., None, :].expand(*x.shape, length).masked_fill(later, 0.0).amax(-1).clamp_min(0)
