"""A whole draft of a Gemma 4 assistant in one call."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit

from .compiled import kernel
from .passes import CHUNK, at_address
from .products import MOST, levels, products
from .rows import LANES, attend, best, exponentials, floats, gate, noise, norm, round_row, turn
from .sharing import PLACES, next_chunk, then, together


@njit
def _project(tickets: Any, phase: Any, x: Any, w: Any, scale: Any, outs: Any, sums: Any) -> Any:
    """One row through w, by all threads: outs[phase] is filled, and the part of it that holds the result returned."""
    row = np.zeros((1, w.shape[1]), np.int16)
    size = np.empty(1, np.float32)
    size[0] = round_row(x, levels(x.shape[0]), row[0])
    chunks = (w.shape[0] + CHUNK - 1) // CHUNK
    c = next_chunk(tickets, phase, chunks)
    while c >= 0:
        begin, end = c * CHUNK, min(c * CHUNK + CHUNK, w.shape[0])
        products(w, scale, row, size, begin, end, outs[phase : phase + 1, begin:end], sums)
        c = then(tickets, phase, chunks)
    return outs[phase, : w.shape[0]]


@floats
def _pick(logits: Any, heat: Any, keys: Any, tokens: Any) -> Any:
    """Which of the tokens is drafted, and its probability among them: the most likely one, or at a temperature the
    winner of the race that the target will run at that position (`sampling.race`)."""
    n = logits.shape[0]
    odds = np.empty(n, np.float32)
    chosen = best(logits)
    top = logits[chosen]
    inverse = np.float32(1.0) / (max(heat, np.float32(1e-30)) if heat > np.float32(0.0) else np.float32(1.0))
    total = exponentials(logits, n, top, inverse, odds)
    if heat > np.float32(0.0):
        furthest = np.float32(-1.0)
        for i in range(n):
            lead = odds[i] / noise(keys[0], keys[1], np.uint32(tokens[i]))
            if lead > furthest:
                chosen, furthest = i, lead
    return chosen, odds[chosen] / total


@kernel
def _assistant(
    tickets: Any,
    table: Any,
    weights: Any,
    scales: Any,
    norms: Any,
    numbers: Any,
    reads: Any,
    turns: Any,
    lists: Any,
    heat: Any,
    keys: Any,
    goes: Any,
    hidden: Any,
    ids: Any,
    sure: Any,
    chosen: Any,
    logits: Any,
    outs: Any,
) -> Any:
    """A draft; returns how many tokens. Every thread does the small things itself; projections and heads are shared.
    What a phase gives lies in a row of `outs` that no other phase writes to, so a thread that falls behind still finds
    it.

    Args:
        table: the target's embeddings `[V, H]`, still to be multiplied with the last of `numbers`.
        weights, scales: before the layers; of each layer q, out, gate and up, down; behind the layers; centroids and
            lists, if there are any. Without lists there is one step, and nothing is drawn.
        norms: of each layer the four and the one of q; the last one.
        numbers: epsilon, whether the activation is GELU, for each layer scaling and scalar, scale of embeddings.
        reads: int64 `[layers, 8]`: heads, their size, heads of keys and values, addresses of keys and values, their
            capacity, the first position to be read and the one behind the last.
        turns: of each layer cos and sin.
        lists: int64 `[lists, size]`, the tokens in them.
        heat, keys: temperature, and uint32 `[steps, 2]`, the noise keys of the positions; see `_pick`.
        goes: the two tables of `draft_length.GoOn`.
        hidden: the target's last hidden state.
        ids: int64 `[steps + 1]`: the last token, and room for the draft. sure: room for its probabilities.
        chosen, logits `[chosen, size]`: the lists looked at, and the products with their rows.
        outs: float32 `[steps, 5 · layers + 7, widest]`. Of each step the row before the last gets the output, the last
            the hidden state.
    """
    epsilon, gelu, scalings, scalars, embed_scale = numbers
    chances, least = goes
    layers = reads.shape[0]
    steps, phases, _ = outs.shape
    width, fed_back = weights[0].shape[0], hidden.shape[0]
    behind = 1 + 4 * layers
    sums = np.empty((LANES, MOST, LANES), np.int32)
    inputs = np.empty(table.shape[1] + fed_back, np.float32)
    chance = np.float32(1.0)
    for step in range(steps):
        here = outs[step]
        drawn = tickets[step * phases * PLACES : (step + 1) * phases * PLACES]
        row = table[ids[step]]
        for i in range(row.shape[0]):
            inputs[i] = row[i] * embed_scale
        inputs[row.shape[0] :] = hidden if step == 0 else outs[step - 1, phases - 1, :fed_back]
        x = _project(drawn, 0, inputs, weights[0], scales[0], here, sums).copy()
        normed = np.empty_like(x)
        phase = 1
        for layer in range(layers):
            heads, size, kv_heads, key_at, value_at, capacity, begin, end = reads[layer]
            first = 1 + 4 * layer
            norm(x, norms[5 * layer], epsilon, normed)
            q = _project(drawn, phase, normed, weights[first], scales[first], here, sums)
            phase += 1
            mixed = here[phase, : heads * size]
            held_keys = carray(at_address(key_at), (kv_heads, capacity, size))
            held_values = carray(at_address(value_at), (kv_heads, capacity, size))
            straight, turned = np.empty(size, np.float32), np.empty(size, np.float32)
            odds = np.empty(end - begin + 2 * LANES - 2, np.float32)
            head = next_chunk(drawn, phase, heads)
            while head >= 0:
                at = slice(head * size, head * size + size)
                norm(q[at], norms[5 * layer + 4], epsilon, straight)
                turn(straight, turns[2 * layer], turns[2 * layer + 1], turned)
                kv = head // (heads // kv_heads)
                attend(turned, held_keys[kv], held_values[kv], begin, end, scalings[layer], odds, mixed[at])
                head = then(drawn, phase, heads)
            phase += 1
            y = _project(drawn, phase, mixed, weights[first + 1], scales[first + 1], here, sums)
            norm(y, norms[5 * layer + 1], epsilon, normed)
            x += normed
            phase += 1
            norm(x, norms[5 * layer + 2], epsilon, normed)
            gated = _project(drawn, phase, normed, weights[first + 2], scales[first + 2], here, sums)
            wide = gated.shape[0] // 2
            inner = np.empty(wide, np.float32)
            gate(gated[:wide], gated[wide:], gelu, inner)
            phase += 1
            y = _project(drawn, phase, inner, weights[first + 3], scales[first + 3], here, sums)
            norm(y, norms[5 * layer + 3], epsilon, normed)
            for i in range(width):
                x[i] = (x[i] + normed[i]) * scalars[layer]
            phase += 1
        norm(x, norms[5 * layers], epsilon, normed)
        _project(drawn, phases - 1, normed, weights[behind], scales[behind], here, sums)
        if next_chunk(drawn, phase, 1) == 0:
            here[phases - 2, :width] = normed
            then(drawn, phase, 1)
        if lists.shape[0] == 0:
            return 1
        phase += 1
        scores = _project(drawn, phase, normed, weights[behind + 1], scales[behind + 1], here, sums)
        phase += 1
        if next_chunk(drawn, phase, 1) == 0:
            n = chosen.shape[0]
            least_score = np.partition(scores, scores.shape[0] - n)[scores.shape[0] - n]
            found = 0
            for i in range(scores.shape[0]):
                if scores[i] >= least_score and found < n:
                    chosen[found] = i
                    found += 1
            then(drawn, phase, 1)
        phase += 1
        w, scale = weights[behind + 2], scales[behind + 2]
        size = lists.shape[1]
        rounded, unit = np.zeros((1, w.shape[1]), np.int16), np.empty(1, np.float32)
        unit[0] = round_row(normed, levels(width), rounded[0])
        c = next_chunk(drawn, phase, chosen.shape[0])
        while c >= 0:
            begin = chosen[c] * size
            products(w, scale, rounded, unit, begin, begin + size, logits[c : c + 1], sums)
            c = then(drawn, phase, chosen.shape[0])
        phase += 1
        if next_chunk(drawn, phase, 1) == 0:
            tokens = np.empty(chosen.shape[0] * size, np.int64)
            for i in range(chosen.shape[0]):
                tokens[i * size : i * size + size] = lists[chosen[i]]
            drafted, sure[step] = _pick(logits.reshape(-1), heat, keys[step], tokens)
            ids[step + 1] = tokens[drafted]
            then(drawn, phase, 1)
        chance *= chances[max(min(int(sure[step] * chances.shape[0]), chances.shape[0] - 1), 0)]  # it may be NaN
        if chance <= least[min(step + 1, least.shape[0] - 1)]:
            return step + 1
    return steps


def assistant(outs: np.ndarray, *arguments: Any) -> int:
    """`_assistant` with fresh tickets."""
    steps, phases, _ = outs.shape
    drafted: int = together(_assistant, steps * phases, *arguments, outs)
    return drafted
