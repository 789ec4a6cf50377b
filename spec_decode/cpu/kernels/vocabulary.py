"""What sampling does to every token of the vocabulary; see `sampling`."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import rows
from .compiled import kernel
from .floats import ieee, unordered
from .noise import noise, noise_keys
from .sharing import finish_chunk, next_chunk, team

EXPONENTIAL_PHASES = 1
_NO_START = np.array([-1])  # of noise that is the same in every round
_PARTS = 4  # chunks of a row of noise


@kernel
def _softmax(x: Any, temperature: Any, out: Any) -> None:
    for r in range(x.shape[0]):
        rows.softmax_row(x[r], temperature, out[r])


@kernel
def _argmax(x: Any, out: Any) -> None:
    for r in range(x.shape[0]):
        out[r] = rows.argmax(x[r])


@kernel
def _top(x: Any, ids: Any, values: Any) -> None:
    ranks = np.empty(ids.shape[1], np.int32)
    for r in range(x.shape[0]):
        rows.top(x[r], ids[r], ranks)
        for i in range(ids.shape[1]):
            values[r, i] = unordered(ranks[i]) if ids[r, i] >= 0 else np.float32(-np.inf)


@kernel
def _keys(low: Any, high: Any, positions: Any, starts: Any, out: Any) -> None:
    """out[i] = keys of positions[i] in a round that starts at starts[i]; the last start counts for all beyond."""
    for i in range(positions.shape[0]):
        start = starts[min(i, starts.shape[0] - 1)]
        out[i, 0], out[i, 1] = noise_keys(low, high, positions[i], start)


@ieee
def _noise_row(key1: Any, key2: Any, tokens: Any, out: Any) -> None:
    for i in range(out.shape[0]):
        out[i] = noise(key1, key2, tokens[i])


@kernel
def _exponential(tickets: Any, keys: Any, tokens: Any, out: Any) -> None:
    """out[r, i] = noise of tokens[i] with keys[r]."""
    size = (tokens.shape[0] + _PARTS - 1) // _PARTS
    c = next_chunk(tickets, 0, keys.shape[0] * _PARTS)
    while c >= 0:
        r, begin = c // _PARTS, c % _PARTS * size
        end = min(begin + size, tokens.shape[0])
        _noise_row(keys[r, 0], keys[r, 1], tokens[begin:end], out[r, begin:end])
        c = finish_chunk(tickets, 0, keys.shape[0] * _PARTS)


def softmax(x: np.ndarray, temperature: float) -> np.ndarray:
    """softmax(x / temperature) of float32 rows `[n, V]`; see `rows.softmax_row`."""
    out = np.empty_like(x)
    _softmax(x, np.float32(temperature), out)
    return out


def argmax(x: np.ndarray) -> np.ndarray:
    """The argmax of float32 rows `[n, V]`, int64 `[n]`; of equal numbers the first."""
    out = np.empty(len(x), np.int64)
    _argmax(x, out)
    return out


def top(x: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The largest numbers of float32 rows `[n, V]`: ids int64 `[n, count]`, largest first and of equal numbers the
    lowest id first, and values float32 `[n, count]`. Where V < count the ids end in −1 and the values in −inf.

    NaN counts as larger than every number, or with a sign as smaller.

    Raises:
        ValueError: `count` is below 1.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, not {count}")
    ids, values = np.empty((len(x), count), np.int64), np.empty((len(x), count), np.float32)
    _top(x, ids, values)
    return ids, values


def keys(low: int, high: int, positions: np.ndarray, starts: np.ndarray | None) -> np.ndarray:
    """Noise keys uint32 `[k, 2]` of integer positions `[k]`, from the words of a seed (`noise_hash.words`).

    starts: integer `[1]` or `[k]`, where the round starts, for noise of this round alone.
    """
    out = np.empty((len(positions), 2), np.uint32)
    starts = _NO_START if starts is None else starts.astype(np.int64)
    _keys(np.uint32(low), np.uint32(high), positions.astype(np.int64), starts, out)
    return out


def exponential(keys: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Exp(1) noise float32 `[rows, n]` from uint32 keys `[rows, 2]` and tokens `[n]`; see `noise.exponential`."""
    out = np.empty((len(keys), len(tokens)), np.float32)
    # One row is done before a helper has woken up.
    team.run(_exponential, EXPONENTIAL_PHASES, keys, tokens, out, threads=1 if len(keys) == 1 else None)
    return out
