"""The hash that all noise is made of: constants and integer arithmetic, without torch and without Numba.

Noise is a function of (seed, stream, position, token), and of the start of the round where a rule asks for that. A seed
and a stream make two words of 32 bits (`words`), which may be changed by the start of a round (`start_words`). A word
pair and a position make the two keys of that position (`position_keys`), and keys and a token make 32 bits
(`token_bits`). Words, keys and bits are below 2³².

Every function but `words` takes Python integers, NumPy uint32 arrays and, compiled by Numba, integers up to 64 bits;
results are the same. The arithmetic is modulo 2³² because 32-bit lanes multiply in vector registers everywhere, which
64-bit lanes do not. A torch tensor of int32 needs another spelling, since torch has no uint32 arithmetic: the same
constants as `signed`, and right shifts that do not extend the sign.
"""

from __future__ import annotations

from typing import Any

MASK = 0xFFFFFFFF
MIX_FACTORS = (0x7FEB352D, 0x846CA68B)
MIX_SHIFTS = (16, 15, 16)
STREAM_FACTOR = 0x9E3779B9
POSITION_FACTOR = 0x9E3779B1
START_FACTORS = (0x85EBCA6B, 0xC2B2AE35)


def wrap(x: Any) -> Any:
    """x modulo 2³²."""
    return x & MASK


def mix(x: Any) -> Any:
    """A bijection of 32-bit integers with low bias (C. Wellons, "lowbias32", 2018)."""
    x = x ^ (x >> MIX_SHIFTS[0])
    x = wrap(x * MIX_FACTORS[0])
    x = x ^ (x >> MIX_SHIFTS[1])
    x = wrap(x * MIX_FACTORS[1])
    return x ^ (x >> MIX_SHIFTS[2])


def words(seed: int, stream: int) -> tuple[int, int]:
    """64 bits for a seed, of which the lowest 64 bits count, and a stream ≥ 0, as two words."""
    low = mix(wrap(seed))
    high = mix(wrap((seed >> 32) ^ low ^ (STREAM_FACTOR * (stream + 1))))
    return low, high


def start_words(low: Any, high: Any, start: Any) -> tuple[Any, Any]:
    """The words of a round that starts at position `start` ≥ 0."""
    return mix(wrap((start * START_FACTORS[0]) ^ low)), mix(wrap((start * START_FACTORS[1]) ^ high))


def position_keys(low: Any, high: Any, position: Any) -> tuple[Any, Any]:
    """The two keys of a position ≥ 0."""
    return mix(wrap((position * POSITION_FACTOR) ^ low)), mix(wrap(position ^ high))


def token_bits(key1: Any, key2: Any, token: Any) -> Any:
    """32 bits of noise for a token."""
    return mix(wrap(mix(token ^ key1) + key2))


def signed(x: int) -> int:
    """The int32 with the bits of a 32-bit integer."""
    return x - (1 << 32) if x >= 1 << 31 else x
