"""From logits to a distribution, and draws from it.

In: logits of any leading shape over a vocabulary. Out: float32 probabilities, and token ids. Nothing here looks at
a model, a cache or a drafter, and nothing waits for the device (but for one short cut on the CPU, where there is
nothing to wait for).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import noise
from .cpu import kernels
from .settings import Settings

TOP = 5  # alternatives of every position
_CPU_SHORTLIST = 256
_LOWEST_TEMPERATURE = 1e-30  # float32 would round a temperature far below this to 0


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
        p = torch.zeros_like(logits).scatter_(-1, argmax(logits)[..., None], 1.0)
        return torch.where(degenerate(logits)[..., None], torch.nan, p)
    temperature = max(settings.temperature, _LOWEST_TEMPERATURE)
    p = softmax(logits, temperature)
    if 0 < settings.top_k < p.shape[-1]:
        logits = logits.masked_fill(p < p.topk(settings.top_k).values[..., -1:], -torch.inf)
        p = softmax(logits, temperature)
    if settings.top_p < 1:
        logits = logits.masked_fill(p < _nucleus_edge(p, settings), -torch.inf)
        p = softmax(logits, temperature)
    return p


def softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """softmax(logits / temperature) over float32 `[..., V]`; degenerate rows come back as NaN throughout.

    A row's bits do not depend on its neighbours, and so not on how long a draft is.
    """
    if _compiled(logits):
        rows = logits.detach().reshape(-1, logits.shape[-1]).contiguous().numpy()
        return torch.from_numpy(kernels.softmax(rows, temperature)).view(logits.shape)
    if temperature != 1:  # subtracting the maximum first keeps a small temperature from overflowing
        logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    return logits.softmax(-1)


def argmax(x: Tensor) -> Tensor:
    """The argmax of `[..., V]`, int64 `[...]`; the lowest id among equals on the CPU."""
    if _compiled(x):
        rows = x.detach().reshape(-1, x.shape[-1]).contiguous().numpy()
        return torch.from_numpy(kernels.argmax(rows)).view(x.shape[:-1])
    return x.argmax(-1)


def degenerate(logits: Tensor) -> Tensor:
    """bool `[...]`: rows of `[..., V]` that define no distribution (NaN, +inf, or −inf throughout)."""
    top = logits.amax(-1)  # NaN wins over everything
    return ~top.isfinite()


def likeliest(p: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest entries of `[..., V]`, largest first: ids int64 and values float32, both `[..., count]`.

    Where V < count, id 0 with value 0 fills the rest.
    """
    if _compiled(p):
        rows = p.detach().reshape(-1, p.shape[-1]).contiguous().numpy()
        ids, values = (torch.from_numpy(x).view(*p.shape[:-1], count) for x in kernels.top(rows, count))
        return ids.clamp_min(0), values.clamp_min(0.0)
    most = min(count, p.shape[-1])
    top = p.topk(most)
    pad = (0, count - most)
    return torch.nn.functional.pad(top.indices, pad), torch.nn.functional.pad(top.values.float(), pad)


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
    drawn = noise.exponential(0, torch.zeros(1, dtype=torch.long), 2)
    p = softmax(drawn)
    exponential_argmax(p, drawn)
    likeliest(p, TOP)


def _compiled(x: Tensor) -> bool:
    """Whether `kernels` takes it: on the CPU PyTorch would make ten passes over memory of what is one."""
    return x.device.type == "cpu" and x.dtype == torch.float32


def exponential_argmax(p: Tensor, exponential: Tensor) -> Tensor:
    """Token ids int64 `[...]` drawn from `p` `[..., V]` with `noise.exponential` of the same shape: argmax p / E.

    A token of probability 0 is never drawn.
    """
    return argmax(p / exponential)


class Drawn(NamedTuple):
    """One drafted token for every row.

    ids: int64 `[k]`. q: what they were drawn from, float32 `[k, V]`, None at temperature 0. confidence: the drafter's
    probability of each id, float32 `[k]`. top: its likeliest tokens, ids int64 and probabilities float32 `[k, TOP]`.
    """

    ids: Tensor
    q: Tensor | None
    confidence: Tensor
    top: tuple[Tensor, Tensor]


def draw(logits: Tensor, positions: Tensor, start: Tensor, settings: Settings, words: Tensor | None = None) -> Drawn:
    """One drafted token for every row, as the rule in `settings` wants it drawn.

    At temperature 0 it is the argmax and there is no q. Otherwise it is drawn from q: under a rule of shared noise with
    the noise that the target will use at that position, under the others with noise of this round alone.

    Args:
        logits: `[k, V]`, the drafter's.
        positions: integer `[k]`, where the tokens would stand.
        start: integer `[1]` or `[k]`, the position of the first token of each draft.
        words: of the seed (`State.seed`), instead of the one in `settings`.
    """
    if settings.temperature == 0:
        ids, p = argmax(logits), softmax(logits.float())
        return Drawn(ids, None, p.gather(-1, ids[:, None])[:, 0], likeliest(p, TOP))
    q = distribution(logits, settings)
    seed = settings.seed if words is None else words
    if settings.deciding.noise == "shared":
        drawn = noise.exponential(seed, positions, logits.shape[-1], noise.TARGET)
    else:
        drawn = noise.exponential(seed, positions, logits.shape[-1], noise.DRAFT, start)
    ids = exponential_argmax(q, drawn)
    return Drawn(ids, q, q.gather(-1, ids[:, None])[:, 0], likeliest(q, TOP))
