"""What sampling does to every token of the vocabulary, see `sampling`."""

from __future__ import annotations

from typing import Any

import numpy as np

from .compiled import kernel
from .rows import best, noise, noise_keys, odds
from .sharing import next_chunk, then, together

_NOWHERE = np.array([-1])  # the start of noise that is the same in every round


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
def _keys(low: Any, high: Any, positions: Any, starts: Any, out: Any) -> None:
    """out[i] = the keys of positions[i] in a round that starts at starts[i], the last of them for all beyond."""
    for i in range(positions.shape[0]):
        start = starts[min(i, starts.shape[0] - 1)]
        out[i, 0], out[i, 1] = noise_keys(low, high, positions[i], start)


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


def keys(low: int, high: int, positions: np.ndarray, starts: np.ndarray | None) -> np.ndarray:
    """uint32 `[k, 2]` for int64 positions `[k]`, from the two words of a seed; see `sampling.exponential`."""
    out = np.empty((len(positions), 2), np.uint32)
    starts = _NOWHERE if starts is None else starts.astype(np.int64)
    _keys(np.uint32(low), np.uint32(high), positions.astype(np.int64), starts, out)
    return out


def exponential(keys: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Noise float32 `[rows, n]` from uint32 keys `[rows, 2]` and tokens `[n]`; see `sampling.exponential`."""
    out = np.empty((len(keys), len(tokens)), np.float32)
    # One row is done before a helper has woken up; so are the other two functions.
    together(_exponential, 1, keys, tokens, out, most_threads=1 if len(keys) == 1 else None)
    return out
