"""Exponential noise of one token, compiled. The integer hash is `noise_hash`; `noise.exponential` says what for."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numba.extending import overload, register_jitable

from ... import noise_hash
from .floats import log


@overload(noise_hash.wrap, strict=False)
def _wrap(x: Any) -> Any:
    """Modulo 2³² as a type, with which LLVM narrows all arithmetic to 32 bits."""
    return lambda x: np.uint32(x)


for _function in (noise_hash.mix, noise_hash.start_words, noise_hash.position_keys, noise_hash.token_bits):
    register_jitable(_function)
_start_words, _position_keys, _token_bits = noise_hash.start_words, noise_hash.position_keys, noise_hash.token_bits


@njit(inline="always")
def noise_keys(low: Any, high: Any, position: Any, start: Any) -> Any:
    """The two keys of a position, uint32, from the words of a seed. A negative `start` means that the round has no part
    in them."""
    if start >= 0:
        low, high = _start_words(low, high, start)
    key1, key2 = _position_keys(low, high, position)
    return np.uint32(key1), np.uint32(key2)


@njit(inline="always", error_model="numpy")
def noise(key1: Any, key2: Any, token: Any) -> Any:
    """Exp(1) noise float32 > 0 of one token (uint32) with the keys of a position (uint32)."""
    bits = np.uint32(_token_bits(key1, key2, token))
    # v is uniform in (0, 1). Its steps are finest near 0, where the winners of an exponential race lie.
    v = np.float32(np.int32(bits)) * np.float32(2.0**-32)
    v = (v + np.float32(1.0) if v < np.float32(0.0) else v) + np.float32(2.0**-33)
    v = min(v, np.float32(1 - 2.0**-24))
    # −log(1 − v); the factor v / lost corrects for the rounding of 1 − v (W. Kahan's log1p).
    left = np.float32(1.0) - v
    lost = np.float32(1.0) - left
    return -log(left) * (v / lost) if lost > np.float32(0.0) else v
