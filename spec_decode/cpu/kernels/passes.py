"""A pass over a whole Llama decoder in one call, and a linear layer.

A pass over one row is bound by reading the weights. So they are read in one stream, and nothing returns to Python
between the first layer and the last.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic

from .arguments import LlamaCache, LlamaPass, LlamaScratch, LlamaShape, LlamaWeights, Matrix, Quantized
from .compiled import kernel
from .products import Weights, levels, matrix_of, partial_sums, products, quantized
from .rows import attend, attention_weights, gate, quantize_row, rms_norm, rotate
from .sharing import finish_chunk, next_chunk, team

CHUNK = 48  # outputs in a chunk; with fewer, drawing tickets costs more than the even distribution saves
HEAD_CHUNK = 4 * CHUNK  # the output head has many outputs


@intrinsic
def at_address(context: Any, address: Any) -> Any:
    """A pointer to the float32 at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float32)(types.int64), generate


@njit
def chunks_of(outputs: Any, size: Any) -> Any:
    """How many chunks of `size` outputs there are, the last of them perhaps smaller."""
    return (outputs + size - 1) // size


@njit
def multiply(tickets: Any, phase: Any, w: Any, rows: Any, size: Any, out: Any, sums: Any) -> None:
    """A phase: the products of w with `rows`, in chunks of `size` outputs."""
    outputs = w.values.shape[0]
    chunks = chunks_of(outputs, size)
    c = next_chunk(tickets, phase, chunks)
    while c >= 0:
        begin, end = c * size, min(c * size + size, outputs)
        products(w, rows, begin, end, out[:, begin:end], sums)
        c = finish_chunk(tickets, phase, chunks)


@njit
def _quantize_rows(tickets: Any, phase: Any, x: Any, out: Any) -> None:
    """A phase: quantizes every row of x."""
    r = next_chunk(tickets, phase, x.shape[0])
    while r >= 0:
        out.scales[r] = quantize_row(x[r], levels(x.shape[1]), out.values[r])
        r = finish_chunk(tickets, phase, x.shape[0])


@njit
def _norm_rows(tickets: Any, phase: Any, x: Any, weight: Any, epsilon: Any, row: Any, out: Any) -> None:
    """A phase: RMS norm and quantization of every row of x. `row` is the thread's own, one row."""
    r = next_chunk(tickets, phase, x.shape[0])
    while r >= 0:
        rms_norm(x[r], weight, epsilon, row)
        out.scales[r] = quantize_row(row, levels(x.shape[1]), out.values[r])
        r = finish_chunk(tickets, phase, x.shape[0])


@njit
def _add_products(tickets: Any, phase: Any, w: Any, rows: Any, part: Any, x: Any, sums: Any) -> None:
    """A phase: x += products of w with `rows`. `part` is the thread's own, `[rows, CHUNK]`."""
    outputs = x.shape[1]
    chunks = chunks_of(outputs, CHUNK)
    c = next_chunk(tickets, phase, chunks)
    while c >= 0:
        begin, end = c * CHUNK, min(c * CHUNK + CHUNK, outputs)
        products(w, rows, begin, end, part, sums)
        for r in range(x.shape[0]):
            for i in range(begin, end):
                x[r, i] += part[r, i - begin]
        c = finish_chunk(tickets, phase, chunks)


LINEAR_PHASES = 2


@kernel
def _linear(tickets: Any, x: Any, w: Matrix, rows: Quantized, out: Any) -> Any:
    """x `[rows, in]` → out `[rows, outputs]`; `rows` is room for x, quantized. Returns the number of phases."""
    sums = partial_sums()
    phase = 0
    _quantize_rows(tickets, phase, x, rows)
    phase += 1
    multiply(tickets, phase, w, rows, CHUNK, out, sums)
    phase += 1
    return phase


def linear(x: np.ndarray, weights: Weights, threads: int | None = None) -> np.ndarray:
    """A linear layer without bias, float32 `[rows, in]` → `[rows, outputs]`."""
    matrix = weights.single
    outputs, padded = matrix.values.shape
    out = np.empty((len(x), outputs), np.float32)
    phases = team.run(_linear, LINEAR_PHASES, x, matrix, quantized(len(x), padded), out, threads=threads)
    assert phases == LINEAR_PHASES, f"_linear has {phases} phases, not {LINEAR_PHASES}"
    return out


def llama_phases(layers: int) -> int:
    """Phases of `_llama`: nine for each layer, the last norm and the output head."""
    return 9 * layers + 2


@kernel
def _llama(
    tickets: Any,
    weights: LlamaWeights,
    shape: LlamaShape,
    cache: LlamaCache,
    rows: LlamaPass,
    scratch: LlamaScratch,
) -> Any:
    """A pass: `rows.hidden` in place, keys and values of the new positions in the cache, and the logits of the last
    rows. Returns the number of phases."""
    heads, kv_heads, size = shape.heads, shape.kv_heads, shape.head_size
    x, sequences, positions = rows.hidden, rows.sequences, rows.positions
    count = x.shape[0]
    gated_width = scratch.gated.shape[1]
    group = heads // kv_heads
    normed, query, attended = scratch.normed, scratch.query, scratch.attended
    buffer = (cache.sequences, kv_heads, cache.capacity, size)
    sums = partial_sums()
    attention = np.empty(attention_weights(0, rows.end), np.float32)
    # The products of a chunk stay in the thread's own memory, which is in its core's cache.
    one_head, row = np.empty((count, size), np.float32), np.empty(x.shape[1], np.float32)
    left, right = np.empty((count, CHUNK), np.float32), np.empty((count, CHUNK), np.float32)
    phase = 0
    for layer in range(weights.attention_norm.shape[0]):
        _norm_rows(tickets, phase, x, weights.attention_norm[layer], shape.epsilon, row, normed)
        phase += 1
        # q, k and v. A chunk is a head.
        keys = carray(at_address(cache.keys[layer]), buffer)
        values = carray(at_address(cache.values[layer]), buffer)
        w = matrix_of(weights.qkv, layer)
        head = next_chunk(tickets, phase, heads + 2 * kv_heads)
        while head >= 0:
            begin, end = head * size, head * size + size
            products(w, normed, begin, end, one_head, sums)
            for r in range(count):
                if head >= heads + kv_heads:
                    values[sequences[r], head - heads - kv_heads, positions[r], :] = one_head[r]
                elif head >= heads:
                    place = keys[sequences[r], head - heads, positions[r]]
                    rotate(one_head[r], rows.rope.cos[r], rows.rope.sin[r], place)
                else:
                    rotate(one_head[r], rows.rope.cos[r], rows.rope.sin[r], query[r, begin:end])
            head = finish_chunk(tickets, phase, heads + 2 * kv_heads)
        phase += 1
        # Attention. A chunk is one query of one head.
        c = next_chunk(tickets, phase, count * heads)
        while c >= 0:
            r, head = c // heads, c % heads
            at = slice(head * size, head * size + size)
            k, v = keys[sequences[r], head // group], values[sequences[r], head // group]
            attend(query[r, at], k, v, 0, positions[r] + 1, shape.attention_scaling, attention, attended[r, at])
            c = finish_chunk(tickets, phase, count * heads)
        phase += 1
        _quantize_rows(tickets, phase, attended, scratch.quantized_attended)
        phase += 1
        w = matrix_of(weights.attention_out, layer)
        _add_products(tickets, phase, w, scratch.quantized_attended, left, x, sums)
        phase += 1
        _norm_rows(tickets, phase, x, weights.mlp_norm[layer], shape.epsilon, row, normed)
        phase += 1
        # Gate and up. A chunk is the same outputs of both.
        w = matrix_of(weights.gate_up, layer)
        chunks = chunks_of(gated_width, CHUNK)
        c = next_chunk(tickets, phase, chunks)
        while c >= 0:
            begin, end = c * CHUNK, min(c * CHUNK + CHUNK, gated_width)
            products(w, normed, begin, end, left, sums)
            products(w, normed, gated_width + begin, gated_width + end, right, sums)
            for r in range(count):
                gate(left[r, : end - begin], right[r, : end - begin], False, scratch.gated[r, begin:end])
            c = finish_chunk(tickets, phase, chunks)
        phase += 1
        _quantize_rows(tickets, phase, scratch.gated, scratch.quantized_gated)
        phase += 1
        _add_products(tickets, phase, matrix_of(weights.down, layer), scratch.quantized_gated, left, x, sums)
        phase += 1
    first, last = count - rows.logits.shape[0], scratch.last
    r = next_chunk(tickets, phase, count)
    while r >= 0:
        rms_norm(x[r], weights.final_norm, shape.epsilon, x[r])
        if r >= first:
            last.scales[r - first] = quantize_row(x[r], levels(x.shape[1]), last.values[r - first])
        r = finish_chunk(tickets, phase, count)
    phase += 1
    multiply(tickets, phase, rows.head, last, HEAD_CHUNK, rows.logits, sums)
    phase += 1
    return phase


def llama(weights: LlamaWeights, shape: LlamaShape, cache: LlamaCache, rows: LlamaPass, scratch: LlamaScratch) -> None:
    """Runs `_llama` in all threads."""
    expected = llama_phases(len(weights.attention_norm))
    phases = team.run(_llama, expected, weights, shape, cache, rows, scratch)
    assert phases == expected, f"_llama has {phases} phases, not {expected}"
