"""A pass over a whole Llama decoder in one call, and a linear layer.

At one row a pass is bound by reading the weights, so they are read in one stream, and nothing returns to Python between
the first layer and the last.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic

from .compiled import kernel
from .products import MOST, Weights, levels, products, steps
from .rows import LANES, attend, gate, norm, round_row, turn
from .sharing import next_chunk, then, together

CHUNK = 48  # outputs a thread takes at a time: fewer, and drawing tickets costs more than it evens out


@intrinsic
def at_address(context: Any, address: Any) -> Any:
    """A pointer to the float32 at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float32)(types.int64), generate


@njit
def _round_rows(tickets: Any, phase: Any, x: Any, most: Any, out: Any, steps: Any) -> None:
    """A phase: `round_row` of every row."""
    r = next_chunk(tickets, phase, x.shape[0])
    while r >= 0:
        steps[r] = round_row(x[r], most, out[r])
        r = then(tickets, phase, x.shape[0])


@njit
def _norm_rows(
    tickets: Any, phase: Any, x: Any, weight: Any, epsilon: Any, most: Any, normed: Any, out: Any, steps: Any
) -> None:
    """A phase: `norm` of every row, then `round_row`."""
    r = next_chunk(tickets, phase, x.shape[0])
    while r >= 0:
        norm(x[r], weight, epsilon, normed[r])
        steps[r] = round_row(normed[r], most, out[r])
        r = then(tickets, phase, x.shape[0])


@njit
def _add_products(
    tickets: Any, phase: Any, w: Any, scale: Any, rounded: Any, steps: Any, x: Any, out: Any, sums: Any
) -> None:
    """A phase: `products`, added to x."""
    rows, outputs = x.shape
    chunks = (outputs + CHUNK - 1) // CHUNK
    c = next_chunk(tickets, phase, chunks)
    while c >= 0:
        begin, end = c * CHUNK, min(c * CHUNK + CHUNK, outputs)
        products(w, scale, rounded, steps, begin, end, out[:, begin:end], sums)
        for r in range(rows):
            for i in range(begin, end):
                x[r, i] += out[r, i]
        c = then(tickets, phase, chunks)


@kernel
def _linear(tickets: Any, x: Any, w: Any, scale: Any, most: Any, rounded: Any, size: Any, out: Any) -> None:
    """x `[rows, in]` → out `[rows, outputs]`; `rounded` and `size` are room for x in steps."""
    sums = np.empty((LANES, MOST, LANES), np.int32)
    outputs = w.shape[0]
    _round_rows(tickets, 0, x, most, rounded, size)
    chunks = (outputs + CHUNK - 1) // CHUNK
    c = next_chunk(tickets, 1, chunks)
    while c >= 0:
        begin, end = c * CHUNK, min(c * CHUNK + CHUNK, outputs)
        products(w, scale, rounded, size, begin, end, out[:, begin:end], sums)
        c = then(tickets, 1, chunks)


def linear(x: np.ndarray, weights: Weights, threads: int | None = None) -> np.ndarray:
    """float32 `[rows, in]` → `[rows, outputs]`."""
    values, scales = weights.values[0], weights.scales[0]
    rows, inputs = x.shape
    out = np.empty((rows, len(values)), np.float32)
    rounded = steps(rows, values.shape[1])
    most = np.float32(levels(inputs))
    size = np.empty(rows, np.float32)
    together(_linear, 2, x, values, scales, most, rounded, size, out, most_threads=threads)
    return out


@kernel
def _llama(
    tickets: Any,
    x: Any,
    start: Any,
    cos: Any,
    sin: Any,
    norms: Any,
    last_norm: Any,
    weights: Any,
    scales: Any,
    shape: Any,
    epsilon: Any,
    scaling: Any,
    key_at: Any,
    value_at: Any,
    capacity: Any,
    last_head: Any,
    logits: Any,
    room: Any,
) -> None:
    """x `[rows, width]` in place, from embeddings to what follows the last norm, and the logits of the last rows. Keys
    and values of the new positions are written behind `start`.

    Args:
        norms: `[layers, 2, width]`.
        weights: of the four projections, `[layers, outputs, in]`: q, k and v; out; gate and up; down.
        scales: `[layers, outputs]` of each.
        shape: heads, heads of keys and values, size of a head.
        key_at, value_at: addresses of each layer's `[kv heads, capacity, head size]`.
        last_head: weights and scales. logits: `[last rows, outputs]`, as many as are wanted.
        room: buffers, see `cpu.Int8Llama`.
    """
    heads, kv_heads, size = shape
    w_qkv, w_out, w_gate, w_down = weights
    s_qkv, s_out, s_gate, s_down = scales
    normed, wide, narrow, steps, qkv, mixed, gated, inner, inner_rounded = room
    rows, width = x.shape
    hidden = inner.shape[1]
    group = heads // kv_heads
    most_x, most_mixed, most_inner = (
        levels(width),
        levels(mixed.shape[1]),
        levels(hidden),
    )
    sums = np.empty((LANES, MOST, LANES), np.int32)
    odds = np.empty(start + rows + LANES - 1, np.float32)
    turned = np.empty(size, np.float32)
    phase = 0
    for layer in range(w_qkv.shape[0]):
        _norm_rows(tickets, phase, x, norms[layer, 0], epsilon, most_x, normed, wide, steps)
        phase += 1
        places = (kv_heads, capacity, size)
        keys = carray(at_address(key_at[layer]), places)
        values = carray(at_address(value_at[layer]), places)
        # A chunk is a head: it is turned and stored while it is at hand.
        head = next_chunk(tickets, phase, heads + 2 * kv_heads)
        while head >= 0:
            begin, end = head * size, head * size + size
            products(w_qkv[layer], s_qkv[layer], wide, steps, begin, end, qkv[:, begin:end], sums)
            for r in range(rows):
                part = qkv[r, begin:end]
                if head >= heads + kv_heads:
                    values[head - heads - kv_heads, start + r, :] = part
                elif head >= heads:
                    turn(part, cos[r], sin[r], keys[head - heads, start + r])
                else:
                    turn(part, cos[r], sin[r], turned)
                    part[:] = turned
            head = then(tickets, phase, heads + 2 * kv_heads)
        phase += 1
        c = next_chunk(tickets, phase, rows * heads)
        while c >= 0:
            r, head = c // heads, c % heads
            at = slice(head * size, head * size + size)
            k, v = keys[head // group], values[head // group]
            attend(qkv[r, at], k, v, 0, start + r + 1, scaling, odds, mixed[r, at])
            c = then(tickets, phase, rows * heads)
        phase += 1
        _round_rows(tickets, phase, mixed, most_mixed, narrow, steps)
        phase += 1
        _add_products(tickets, phase, w_out[layer], s_out[layer], narrow, steps, x, normed, sums)
        phase += 1
        _norm_rows(tickets, phase, x, norms[layer, 1], epsilon, most_x, normed, wide, steps)
        phase += 1
        chunks = (hidden + CHUNK - 1) // CHUNK
        c = next_chunk(tickets, phase, chunks)
        while c >= 0:
            begin, end = c * CHUNK, min(c * CHUNK + CHUNK, hidden)
            left, up = gated[:, begin:end], gated[:, hidden + begin : hidden + end]
            products(w_gate[layer], s_gate[layer], wide, steps, begin, end, left, sums)
            products(w_gate[layer], s_gate[layer], wide, steps, hidden + begin, hidden + end, up, sums)
            for r in range(rows):
                gate(left[r], up[r], False, inner[r, begin:end])
            c = then(tickets, phase, chunks)
        phase += 1
        _round_rows(tickets, phase, inner, most_inner, inner_rounded, steps)
        phase += 1
        _add_products(tickets, phase, w_down[layer], s_down[layer], inner_rounded, steps, x, normed, sums)
        phase += 1
    r = next_chunk(tickets, phase, rows)
    first, last = rows - logits.shape[0], wide[: logits.shape[0]]
    while r >= 0:
        norm(x[r], last_norm, epsilon, x[r])
        if r >= first:
            steps[r - first] = round_row(x[r], most_x, last[r - first])
        r = then(tickets, phase, rows)
    phase += 1
    w, scale = last_head
    piece = 4 * CHUNK  # it is long
    chunks = (w.shape[0] + piece - 1) // piece if len(last) else 0
    c = next_chunk(tickets, phase, chunks)
    while c >= 0:
        begin, end = c * piece, min(c * piece + piece, w.shape[0])
        products(w, scale, last, steps, begin, end, logits[:, begin:end], sums)
        c = then(tickets, phase, chunks)


def llama(layers: int, *arguments: Any) -> None:
    """`_llama` with fresh tickets."""
    together(_llama, 9 * layers + 2, *arguments)
