"""From logits to a distribution, and draws from it with noise that anyone can compute again.

In: logits of any leading shape over a vocabulary. Out: float32 probabilities, and token ids. Nothing here looks at
a model, a cache or a drafter, and nothing waits for the device (but for one short cut on the CPU, where there is
nothing to wait for).

A draw is an exponential race: with independent E ~ Exp(1), argmax p / E is distributed as p. It is the Gumbel-max
trick without the logarithms (log p + g with g = −log E). The noise is a hash of (seed, position, token, stream), so a
lane that reaches a position by other rounds meets the same noise there (Daliri et al. 2024, arXiv:2408.07978). Rules
that draw independently of the draft add the round's start to the hash: every round has noise of its own. `decode` has
the argument for both.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from . import kernels
from .settings import Settings

# Streams keep the independent uses of noise at one position apart.
TARGET, DRAFT, ACCEPT, RESIDUAL = 0, 1, 2, 3
STREAMS = 4

_MASK32 = 0xFFFFFFFF
_CPU_SHORTLIST = 256
_COLDEST = 1e-30  # float32 would round a temperature far below this to 0


def distribution(logits: Tensor, settings: Settings) -> Tensor:
    """The distribution that `settings` make of logits: temperature, then top-k, then top-p.

    Args:
        logits: `[..., V]`, any float dtype; −inf bars a token.

    Returns:
        float32 `[..., V]`, rows summing to 1; one-hot at temperature 0. A row that holds NaN or +inf, or nothing but
        −inf, comes back as NaN throughout, for the caller to refuse after its copy to the host. Tokens as likely as
        the last one kept are kept too, so the result does not depend on an order among ties.
    """
    logits = logits.float()
    if settings.temperature == 0:
        p = torch.zeros_like(logits).scatter_(-1, largest(logits)[..., None], 1.0)
        return torch.where(degenerate(logits)[..., None], torch.nan, p)
    heat = max(settings.temperature, _COLDEST)
    p = softmax(logits, heat)
    if 0 < settings.top_k < p.shape[-1]:
        logits = logits.masked_fill(p < p.topk(settings.top_k).values[..., -1:], -torch.inf)
        p = softmax(logits, heat)
    if settings.top_p < 1:
        logits = logits.masked_fill(p < _nucleus_edge(p, settings), -torch.inf)
        p = softmax(logits, heat)
    return p


def softmax(logits: Tensor, heat: float = 1.0) -> Tensor:
    """softmax(logits / heat) over float32 `[..., V]`; degenerate rows come back as NaN throughout.

    A row's bits do not depend on its neighbours, and so not on how long a draft is.
    """
    if _compiled(logits):
        rows = logits.detach().reshape(-1, logits.shape[-1]).contiguous().numpy()
        return torch.from_numpy(kernels.softmax(rows, heat)).view(logits.shape)
    if heat != 1:  # subtracting the maximum first keeps a small temperature from overflowing
        logits = (logits - logits.amax(-1, keepdim=True)) / heat
    return logits.softmax(-1)


def largest(x: Tensor) -> Tensor:
    """Where `[..., V]` is largest, int64 `[...]`."""
    if _compiled(x):
        rows = x.detach().reshape(-1, x.shape[-1]).contiguous().numpy()
        return torch.from_numpy(kernels.argmax(rows)).view(x.shape[:-1])
    return x.argmax(-1)


def degenerate(logits: Tensor) -> Tensor:
    """bool `[...]`: rows of `[..., V]` that define no distribution (NaN, +inf, or −inf throughout)."""
    top = logits.amax(-1)  # NaN wins over everything
    return ~top.isfinite()


def _nucleus_edge(p: Tensor, settings: Settings) -> Tensor:
    """`[..., 1]`: the smallest probability inside the top-p nucleus of every row."""
    width = p.shape[-1]
    if 0 < settings.top_k < width:
        # Ties at the edge of top-k can leave more than k tokens; their mass is equal, so k + 1 values do not suffice.
        width = min(width, settings.top_k * 2 + 16)
    elif p.device.type == "cpu":
        width = min(width, _CPU_SHORTLIST)
    ranked = p.topk(width).values
    mass = ranked.cumsum(-1)
    if width < p.shape[-1] and p.device.type == "cpu" and not bool((mass[..., -1] >= settings.top_p).all()):
        ranked = p.sort(-1, descending=True).values
        mass = ranked.cumsum(-1)
    # A token stays when the mass before it is below top-p; the most likely one always does.
    last = ((mass - ranked) < settings.top_p).sum(-1, keepdim=True).clamp_min(1) - 1
    return ranked.gather(-1, last)


def get_ready() -> None:
    """Compiles what a CPU needs, where that was never done, so that the first race need not."""
    noise = exponential(0, torch.zeros(1, dtype=torch.long), 2)
    race(softmax(noise), noise)


def _compiled(x: Tensor) -> bool:
    """Whether `kernels` takes it: on the CPU PyTorch would make ten passes over memory of what is one."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.int32)


def exponential(
    seed: int, positions: Tensor, vocabulary: int, stream: int = TARGET, start: Tensor | None = None
) -> Tensor:
    """Independent Exp(1) noise, a function of (seed, position, token, stream) alone, and of `start` where it is given.

    Args:
        positions: integer `[k]`, absolute positions in the sequence, on the device the noise is wanted on.
        start: integer `[1]` or `[k]`, the position at which the round starts, for noise that no other round meets.

    Returns:
        float32 `[k, vocabulary]`, positive.
    """
    tokens = torch.arange(vocabulary, dtype=torch.int32, device=positions.device)
    return _exponential_at(seed, positions, tokens, stream, start)


def uniform(seed: int, positions: Tensor, stream: int = ACCEPT, start: Tensor | None = None) -> Tensor:
    """Independent U(0, 1) noise `[k]` for integer `positions` `[k]`; see `exponential`."""
    zero = torch.zeros(1, dtype=torch.int32, device=positions.device)
    return (-_exponential_at(seed, positions, zero, stream, start)).exp().clamp_max(1 - 2.0**-24).squeeze(-1)


def race(p: Tensor, noise: Tensor) -> Tensor:
    """Token ids int64 `[...]` drawn from `p` `[..., V]` with `exponential` noise of the same shape.

    A token of probability 0 is never drawn.
    """
    return largest(p / noise)


def draw(logits: Tensor, positions: Tensor, start: Tensor, settings: Settings) -> tuple[Tensor, Tensor | None, Tensor]:
    """One drafted token for every row, as the rule in `settings` wants it drawn.

    At temperature 0 it is the argmax and there is no q. Otherwise it is drawn from q: under the coupled rule with the
    noise that the target will use at that position, under the others with noise of this round alone.

    Args:
        logits: `[k, V]`, the drafter's.
        positions: integer `[k]`, where the tokens would stand.
        start: integer `[1]` or `[k]`, the position of the first token of the draft.

    Returns:
        ids int64 `[k]`; q float32 `[k, V]` or None; the drafter's probability of each id, float32 `[k]`.
    """
    if settings.temperature == 0:
        ids = largest(logits)
        return ids, None, softmax(logits.float()).gather(-1, ids[:, None])[:, 0]
    q = distribution(logits, settings)
    if settings.rule == "coupled":
        noise = exponential(settings.seed, positions, logits.shape[-1], TARGET)
    else:
        noise = exponential(settings.seed, positions, logits.shape[-1], DRAFT, start)
    ids = race(q, noise)
    return ids, q, q.gather(-1, ids[:, None])[:, 0]


def _exponential_at(seed: int, positions: Tensor, tokens: Tensor, stream: int, start: Tensor | None) -> Tensor:
    if _compiled(tokens):
        keys = position_keys(seed, positions.numpy(), stream, None if start is None else start.numpy())
        return torch.from_numpy(kernels.exponential(keys, tokens.numpy().view(np.uint32)))
    begin = None if start is None else start.to(torch.int32)[:, None]
    key1, key2 = _keys(seed, positions.to(torch.int32)[:, None], stream, begin)
    bits = _mix(_mix(tokens[None, :] ^ key1) + key2)
    # v uniform in (0, 1) with its finest steps near 0, where the winners of a race lie.
    v = bits.to(torch.float32).mul_(2.0**-32)
    v = torch.where(v < 0, v + 1.0, v).add_(2.0**-33).clamp_(max=1 - 2.0**-24)
    return -torch.log1p(-v)


def position_keys(seed: int, positions: np.ndarray, stream: int, start: np.ndarray | None = None) -> np.ndarray:
    """The keys `[k, 2]` as uint32, which kernels make noise from; arguments as in `exponential`."""
    return kernels.keys(*_words(seed, stream), positions, start)


def _words(seed: int, stream: int) -> tuple[int, int]:
    """64 bits for a seed and a stream, as two words of 32."""
    low = _mix_int(seed & _MASK32)
    return low, _mix_int((seed >> 32) ^ low ^ (0x9E3779B9 * (stream + 1) & _MASK32))


def _keys(seed: int, place: Tensor, stream: int, start: Tensor | None) -> tuple[Tensor, Tensor]:
    # 64 bits of key for each position, which a 32-bit hash of the token is mixed with in two rounds. 32-bit lanes
    # because they multiply in vector registers everywhere, which 64-bit ones do not. `kernels.keys` is the same.
    words = _words(seed, stream)
    low: Tensor | int = _signed(words[0])
    high: Tensor | int = _signed(words[1])
    if start is not None:
        low = _mix(start * _signed(0x85EBCA6B) ^ low)
        high = _mix(start * _signed(0xC2B2AE35) ^ high)
    return _mix(place * _signed(0x9E3779B1) ^ low), _mix(place ^ high)


def _mix(x: Tensor) -> Tensor:
    """A 32-bit finalizer with low bias (C. Wellons, "lowbias32", 2018), on int32 lanes that wrap."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * _signed(0x7FEB352D)
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * _signed(0x846CA68B)
    return x ^ ((x >> 16) & 0xFFFF)


def _mix_int(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D & _MASK32
    x ^= x >> 15
    x = x * 0x846CA68B & _MASK32
    return x ^ (x >> 16)


def _signed(x: int) -> int:
    return x - (1 << 32) if x >= 1 << 31 else x
