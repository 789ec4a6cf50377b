"""Noise that anyone can compute again: a hash of (seed, position, token, stream), and of the round's start where asked.

A draw is an exponential race: with independent E ~ Exp(1), argmax p / E is distributed as p. It is the Gumbel-max trick
without the logarithms (log p + g with g = −log E). A lane that reaches a position by other rounds meets the same noise
there (Daliri et al. 2024, arXiv:2408.07978). Rules that draw independently of the draft add the round's start to the
hash: every round has noise of its own. `decode` has the argument for both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .cpu import kernels
from .noise_hash import MASK, MIX_FACTORS, MIX_SHIFTS, POSITION_FACTOR, START_FACTORS, signed, words

# Streams keep the independent uses of noise at one position apart.
TARGET, DRAFT, ACCEPT, RESIDUAL = 0, 1, 2, 3
STREAMS = 4

# A number, or its words on a device (`seed_words`), which a recorded graph reads anew in every race; or the words of a
# seed for every row (`row_seed_words`).
Seed = int | Tensor


def seed_words(seed: int) -> Tensor:
    """The words of a seed for every stream, int32 `[STREAMS, 2]`, on the CPU."""
    return torch.tensor([[signed(word) for word in words(seed, stream)] for stream in range(STREAMS)]).to(torch.int32)


def row_seed_words(seeds: Sequence[int]) -> Tensor:
    """The words of a seed for every row, int32 `[STREAMS, 2, rows]`, on the CPU."""
    return torch.stack([seed_words(seed) for seed in seeds], -1)


@dataclass(frozen=True)
class RoundNoise:
    """The noise of one round, made when it is asked for.

    Args:
        seed: of the settings, or of every row.
        starts: int64 `[rows]`, on the device the noise is wanted on: position of the first token that the round may
            emit in each row.
        count: positions from there on, γ + 1.
        vocabulary: V.
    """

    seed: Seed
    starts: Tensor
    count: int
    vocabulary: int

    @property
    def _positions(self) -> Tensor:
        """`[rows, γ + 1]`"""
        return self.starts[:, None] + torch.arange(self.count, device=self.starts.device)

    def shared(self) -> Tensor:
        """Exponential noise `[rows, γ + 1, V]` of the target's own sample, the same in every round."""
        return exponential(self.seed, self._positions, self.vocabulary, TARGET)

    def uniform(self) -> Tensor:
        """Uniform numbers `[rows, γ]`, of this round alone, that drafts are accepted with."""
        positions = self._positions
        return uniform(self.seed, positions[:, :-1], ACCEPT, positions[:, :1])

    def residual(self) -> Tensor:
        """Exponential noise `[rows, γ + 1, V]`, of this round alone, that the target's own token is drawn with."""
        positions = self._positions
        return exponential(self.seed, positions, self.vocabulary, RESIDUAL, positions[:, :1])


def exponential(
    seed: Seed, positions: Tensor, vocabulary: int, stream: int = TARGET, start: Tensor | None = None
) -> Tensor:
    """Independent Exp(1) noise, a function of (seed, position, token, stream) alone, and of `start` where it is given.

    Args:
        seed: of all positions, or of every row: then the first dimension of `positions` is rows.
        positions: integer `[...]`, absolute positions in the sequence, on the device the noise is wanted on.
        start: integer, broadcastable to `positions`: where the round starts, for noise that no other round meets.

    Returns:
        float32 `[..., vocabulary]`, positive.
    """
    tokens = torch.arange(vocabulary, dtype=torch.int32, device=positions.device)
    return _exponential_at(seed, positions, tokens, stream, start)


def uniform(seed: Seed, positions: Tensor, stream: int = ACCEPT, start: Tensor | None = None) -> Tensor:
    """Independent U(0, 1) noise `[...]` for integer `positions` `[...]`; see `exponential`."""
    zero = torch.zeros(1, dtype=torch.int32, device=positions.device)
    return (-_exponential_at(seed, positions, zero, stream, start)).exp().clamp_max(1 - 2.0**-24).squeeze(-1)


def position_keys(seed: Seed, positions: np.ndarray, stream: int, start: np.ndarray | None = None) -> np.ndarray:
    """The keys `[k, 2]` as uint32, which kernels make noise from; arguments as in `exponential`, of one dimension. With
    a seed for every row, the first k / rows positions are of the first row, and so on."""
    if not isinstance(seed, Tensor):
        return kernels.keys(*words(seed, stream), positions, start)
    rows = [[word & MASK for word in pair] for pair in seed[stream].view(2, -1).T.tolist()]
    parts = np.split(positions, len(rows))
    starts = [None] * len(rows) if start is None else np.split(start, len(rows))
    return np.concatenate([kernels.keys(*row, *part) for row, *part in zip(rows, parts, starts, strict=True)])


def _exponential_at(seed: Seed, positions: Tensor, tokens: Tensor, stream: int, start: Tensor | None) -> Tensor:
    if _compiled(tokens):
        starts = None if start is None else start.expand(positions.shape).reshape(-1).numpy()
        keys = position_keys(seed, positions.reshape(-1).numpy(), stream, starts)
        made = torch.from_numpy(kernels.exponential(keys, tokens.numpy().view(np.uint32)))
        return made.view(*positions.shape, len(tokens))
    begin = None if start is None else start.to(torch.int32)[..., None]
    key1, key2 = _keys(seed, positions.to(torch.int32)[..., None], stream, begin)
    bits = _mix(_mix(tokens ^ key1) + key2)
    # v uniform in (0, 1) with its finest steps near 0, where the winners of a race lie.
    v = bits.to(torch.float32).mul_(2.0**-32)
    v = torch.where(v < 0, v + 1.0, v).add_(2.0**-33).clamp_(max=1 - 2.0**-24)
    return -torch.log1p(-v)


def _compiled(x: Tensor) -> bool:
    """Whether `kernels` takes it: on the CPU PyTorch would make ten passes over memory of what is one."""
    return x.device.type == "cpu"


def _keys(seed: Seed, position: Tensor, stream: int, start: Tensor | None) -> tuple[Tensor, Tensor]:
    """`noise_hash.position_keys` for int32 tensors, which wrap as unsigned integers do."""
    first: Tensor | int
    second: Tensor | int
    low: Tensor | int
    high: Tensor | int
    if isinstance(seed, Tensor):
        low, high = _along(seed[stream], position)
    else:
        low, high = (signed(word) for word in words(seed, stream))
    first, second = low, high
    if start is not None:
        first = _mix(start * signed(START_FACTORS[0]) ^ low)
        second = _mix(start * signed(START_FACTORS[1]) ^ high)
    return _mix(position * signed(POSITION_FACTOR) ^ first), _mix(position ^ second)


def _along(words: Tensor, position: Tensor) -> Iterator[Tensor]:
    """Both words of a seed, or of the seed of every row, so that they broadcast with positions `[rows, …]`."""
    return (word.view(-1, *[1] * (position.dim() - 1)) for word in words)


def _mix(x: Tensor) -> Tensor:
    """`noise_hash.mix` for int32 tensors."""
    for shift, factor in zip(MIX_SHIFTS, MIX_FACTORS, strict=False):
        x = (x ^ _shifted(x, shift)) * signed(factor)
    return x ^ _shifted(x, MIX_SHIFTS[-1])


def _shifted(x: Tensor, by: int) -> Tensor:
    """A right shift that does not extend the sign."""
    return (x >> by) & ((1 << (32 - by)) - 1)
