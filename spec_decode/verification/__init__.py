"""What every verification rule works with: the case it decides, its verdict, and the parts that rules share.

A rule is a file of this package with a pure function of tensors and `verify(case)`, which hands it what it needs; the
table of rules is `rules.RULES`. Everything is batched over leading dimensions, with no loop over tokens or vocabulary
and no wait for the device. Nothing here knows what a model is.

Shapes throughout: draft `[..., γ]`, p `[..., γ + 1, V]`, q `[..., γ, V]`. γ may be 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..sampling import exponential_argmax


class Noise(Protocol):
    """Noise for the case, made when it is asked for; see `noise.RoundNoise`."""

    def shared(self) -> Tensor:
        """Exponential `[..., γ + 1, V]` of the target's own sample."""

    def uniform(self) -> Tensor:
        """Uniform `[..., γ]`, independent of the draft."""

    def residual(self) -> Tensor:
        """Exponential `[..., γ + 1, V]`, independent of the draft and of `uniform`."""


@dataclass(frozen=True)
class Case:
    """What a rule decides from.

    draft: int64 `[..., γ]`.
    logits: the target's, `[..., γ + 1, V]`.
    p: the target's distribution, float32 `[..., γ + 1, V]`; at temperature 0 the one at temperature 1.
    q: what the draft was drawn from, float32 `[..., γ, V]`, or None for a draft that was not drawn (lookup, argmax).
    noise: see `Noise`.
    temperature, lenience, acceptance: of the settings; the last is `Settings.synthetic_acceptance`.
    """

    draft: Tensor
    logits: Tensor
    p: Tensor
    q: Tensor | None
    noise: Noise
    temperature: float = 1.0
    lenience: float = 1.0
    acceptance: float | None = None


@dataclass(frozen=True)
class Verdict:
    """accepted: int64 `[...]`, how many drafted tokens stay, 0…γ. token: int64 `[...]`, the target's own token after
    them. compared: float32 `[..., γ, 2]`, the two numbers compared for each drafted token (`rules.Rule.compares`), NaN
    where nothing was.
    residual: float32 `[..., V]`, what the token was drawn from, not normalized, for rules that draw it so. Only a lossy
    rule fills `refused` (int64 `[...]`, accepted tokens the exact rule would have refused with the same noise) and `kl`
    (float32 `[...]`, mean over the visited positions of KL(emitted ‖ target), nats)."""

    accepted: Tensor
    token: Tensor
    compared: Tensor
    residual: Tensor | None = None
    refused: Tensor | None = None
    kl: Tensor | None = None


def match(draft: Tensor, own: Tensor, scores: Tensor) -> Verdict:
    """Accepts while the draft is the target's `own` token, int64 `[..., γ + 1]`; `scores` `[..., γ + 1, V]` are what
    the target's tokens had the largest of."""
    if draft.shape[-1] == 0:  # a plain step: there is nothing to compare
        none = own.new_zeros(own.shape[:-1])
        return Verdict(none, own[..., 0], scores.new_empty(*draft.shape, 2))
    accepted = leading_run(draft == own[..., :-1])
    compared = reached(at(scores, draft), at(scores, own[..., :-1]), accepted)
    return Verdict(accepted, own.gather(-1, accepted[..., None]).squeeze(-1), compared)


def reached(value: Tensor, bound: Tensor, accepted: Tensor) -> Tensor:
    """`Verdict.compared` of a rule that judges one token after another: NaN after the first refused."""
    compared = torch.stack([value, bound], -1)
    positions = torch.arange(value.shape[-1], device=value.device)
    return compared.masked_fill((positions > accepted[..., None])[..., None], torch.nan)


def leading_run(ok: Tensor) -> Tensor:
    """Length of the leading run of True, `[..., γ]` → `[...]`."""
    return ok.long().cumprod(-1).sum(-1)


def at(p: Tensor, draft: Tensor) -> Tensor:
    """Entries of each drafted token: `[..., γ(+1), V]` at `[..., γ]` → `[..., γ]`."""
    return p[..., : draft.shape[-1], :].gather(-1, draft[..., None]).squeeze(-1)


def one_hot(draft: Tensor, vocabulary: int) -> Tensor:
    """q of a draft that was not drawn, float32 `[..., V]` for int64 `[...]`."""
    zeros = torch.zeros(*draft.shape, vocabulary, device=draft.device)
    return zeros.scatter_(-1, draft[..., None], 1.0)


def row(x: Tensor, index: Tensor) -> Tensor:
    """Row `index` `[...]` of `[..., n, V]` → `[..., V]`."""
    return x.gather(-2, index[..., None, None].expand(*index.shape, 1, x.shape[-1])).squeeze(-2)


def normalized(mass: Tensor, otherwise: Tensor) -> Tensor:
    """`[..., V]` divided by its sum; `otherwise` where nothing is left (p = q up to rounding)."""
    total = mass.sum(-1, keepdim=True)
    return torch.where(total > 0, mass / torch.where(total > 0, total, 1.0), otherwise)


def residual(p: Tensor, q: Tensor) -> Tensor:
    """max(p − q, 0) normalized, `[..., V]`; p itself where nothing is left (p = q up to rounding)."""
    return normalized((p - q).clamp_min(0), p)


def own_token(
    draft: Tensor, p: Tensor, q: Tensor | None, accepted: Tensor, noise: Tensor, scale: float | Tensor = 1.0
) -> tuple[Tensor, Tensor]:
    """The correction at the first refused position, drawn from max(p − scale · q, 0), or the bonus after the last,
    drawn from p: int64 `[...]`; and what it was drawn from, not normalized, float32 `[..., V]`."""
    own_p, own_noise = row(p, accepted), row(noise, accepted)
    length = draft.shape[-1]
    if length == 0:
        return exponential_argmax(own_p, own_noise), own_p
    refused = accepted.clamp_max(length - 1)
    drawn = one_hot(draft, p.shape[-1]) if q is None else q
    own_q = row(drawn, refused)
    own_q = torch.where(accepted[..., None] == length, 0.0, own_q)
    rest = (own_p - scale * own_q).clamp_min(0)
    return exponential_argmax(normalized(rest, own_p), own_noise), rest
