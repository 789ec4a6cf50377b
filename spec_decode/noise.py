"""Noise that anyone can compute again: a hash of (seed, position, token, stream), and of the round's start where asked.

A draw is an exponential race: with independent E ~ Exp(1), argmax p / E is distributed as p. It is the Gumbel-max trick
without the logarithms (log p + g with g = −log E). A lane that reaches a position by other rounds meets the same noise
there (Daliri et al. 2024, arXiv:2408.07978). Rules that draw independently of the draft add the round's start to the
hash: every round has noise of its own. `decode` has the argument for both.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .cpu import kernels
from .noise_hash import MIX_FACTORS, MIX_SHIFTS, POSITION_FACTOR, START_FACTORS, signed, words

# Streams keep the independent uses of noise at one position apart.
TARGET, DRAFT, ACCEPT, RESIDUAL = 0, 1, 2, 3
STREAMS = 4


@dataclass(frozen=True)
class RoundNoise:
    """The noise of one round of one row, made when it is asked for.

    Args:
        seed: of the settings.
        start: position of the first token that the round may emit.
        count: positions from there on, γ + 1.
        vocabulary: V.
        device: where the noise is wanted.
    """

    seed: int
    start: int
    count: int
    vocabulary: int
    device: torch.device

    @property
    def _positions(self) -> Tensor:
        return torch.arange(self.start, self.start + self.count, device=self.device)

    def shared(self) -> Tensor:
        """Exponential noise `[1, γ + 1, V]` of the target's own sample, the same in every round."""
        return exponential(self.seed, self._positions, self.vocabulary, TARGET)[None]

    def uniform(self) -> Tensor:
        """Uniform numbers `[1, γ]`, of this round alone, that drafts are accepted with."""
        positions = self._positions
        return uniform(self.seed, positions[:-1], ACCEPT, positions[:1])[None]

    def residual(self) -> Tensor:
        """Exponential noise `[1, γ + 1, V]`, of this round alone, that the target's own token is drawn with."""
        positions = self._positions
        return exponential(self.seed, positions, self.vocabulary, RESIDUAL, positions[:1])[None]


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


def position_keys(seed: int, positions: np.ndarray, stream: int, start: np.ndarray | None = None) -> np.ndarray:
    """The keys `[k, 2]` as uint32, which kernels make noise from; arguments as in `exponential`."""
    return kernels.keys(*words(seed, stream), positions, start)


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


def _compiled(x: Tensor) -> bool:
    """Whether `kernels` takes it: on the CPU PyTorch would make ten passes over memory of what is one."""
    return x.device.type == "cpu"


def _keys(seed: int, position: Tensor, stream: int, start: Tensor | None) -> tuple[Tensor, Tensor]:
    """`noise_hash.position_keys` for int32 tensors, which wrap as unsigned integers do."""
    low, high = (signed(word) for word in words(seed, stream))
    first: Tensor | int = low
    second: Tensor | int = high
    if start is not None:
        first = _mix(start * signed(START_FACTORS[0]) ^ low)
        second = _mix(start * signed(START_FACTORS[1]) ^ high)
    return _mix(position * signed(POSITION_FACTOR) ^ first), _mix(position ^ second)


def _mix(x: Tensor) -> Tensor:
    """`noise_hash.mix` for int32 tensors."""
    for shift, factor in zip(MIX_SHIFTS, MIX_FACTORS, strict=False):
        x = (x ^ _shifted(x, shift)) * signed(factor)
    return x ^ _shifted(x, MIX_SHIFTS[-1])


def _shifted(x: Tensor, by: int) -> Tensor:
    """A right shift that does not extend the sign."""
    return (x >> by) & ((1 << (32 - by)) - 1)
