"""What sampling does to every token of the vocabulary, see `sampling`."""

from __future__ import annotations

from typing import Any

import numpy as np

from .compiled import kernel
from .rows import best, noise, odds
from .sharing import next_chunk, then, together


@kernel
def _softmax(x: Any, heat: Any, out: Any) -> None:
    """`odds` of every row."""
    for r in range(x.shape[0]):
        odds(x[r], heat, out[r])


@kernel
def _argmax(x: Any, out: Any) -> None:
    """`best` of every row."""
    for r in range(x.shape[0]):
        out[r] = best(x[r])


@kernel
def _exponential(tickets: Any, keys: Any, tokens: Any, out: Any) -> None:
    """out[r, i] = noise of tokens[i] with the keys[r]."""
    parts = 4  # of a row
    size = (tokens.shape[0] + parts - 1) // parts
    c = next_chunk(tickets, 0, keys.shape[0] * parts)
    while c >= 0:
        r, begin = c // parts, c % parts * size
        for i in range(begin, min(begin + size, tokens.shape[0])):
            out[r, i] = noise(keys[r, 0], keys[r, 1], tokens[i])
        c = then(tickets, 0, keys.shape[0] * parts)


def softmax(x: np.ndarray, heat: float) -> np.ndarray:
    """softmax(x / heat) of float32 rows; see `odds`."""
    out = np.empty_like(x)
    _softmax(x, np.float32(heat), out)
    return out


def argmax(x: np.ndarray) -> np.ndarray:
    """Where each row of float32 is largest, int64, the first place if there are several."""
    out = np.empty(len(x), np.int64)
    _argmax(x, out)
    return out


def exponential(keys: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Noise float32 `[rows, n]` from uint32 keys `[rows, 2]` and tokens `[n]`; see `sampling.exponential`."""
    out = np.empty((len(keys), len(tokens)), np.float32)
    # One row is done before a helper has woken up; so are the other two functions.
    together(_exponential, 1, keys, tokens, out, most_threads=1 if len(keys) == 1 else None)
    return out
