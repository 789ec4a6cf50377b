"""A whole draft of a Gemma 4 assistant in one call."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from .arguments import AssistantScratch, AssistantWeights, DraftRequest, DraftResult, Quantized
from .compiled import kernel
from .floats import ieee
from .noise import noise
from .passes import CHUNK, multiply
from .products import levels, partial_sums, products
from .rows import argmax, attend, attention_weights, exponentials, gate, largest, quantize_row, rms_norm, rotate, top
from .sharing import TICKETS, finish_chunk, next_chunk, team

TOP = 5  # likeliest tokens that are told of each step
MIN_TEMPERATURE = np.float32(1e-30)  # above 0; lower temperatures are raised to it


@njit
def _quantized_row(x: Any, w: Any) -> Any:
    """x as one quantized row, padded for w."""
    row = Quantized(np.zeros((1, w.values.shape[1]), np.int16), np.empty(1, np.float32))
    row.scales[0] = quantize_row(x, levels(x.shape[0]), row.values[0])
    return row


@njit
def _project(tickets: Any, phase: Any, x: Any, w: Any, out: Any, sums: Any) -> None:
    """A phase: the products of w with one row x, in the row of `out`. Every thread quantizes x itself."""
    multiply(tickets, phase, w, _quantized_row(x, w), CHUNK, out, sums)


@ieee
def _draft_token(step: Any, lists: Any, request: Any, result: Any) -> None:
    """Drafts a token out of the listed ones from `result.logits` and writes it, its probability and the likeliest
    tokens: the argmax at temperature 0, whose probabilities are those at temperature 1, else the winner of the
    exponential race that the target will run at that position (`sampling`)."""
    logits = result.logits.reshape(-1)
    n, size = logits.shape[0], lists.shape[1]
    tokens = np.empty(n, np.int64)
    for i in range(result.lists.shape[0]):
        tokens[i * size : i * size + size] = lists[result.lists[i]]
    weights = np.empty(n, np.float32)
    drafted = argmax(logits)
    sampled = request.temperature > np.float32(0.0)
    inverse = np.float32(1.0) / (max(request.temperature, MIN_TEMPERATURE) if sampled else np.float32(1.0))
    total = exponentials(logits, n, logits[drafted], inverse, weights)
    if sampled:
        key1, key2 = request.keys[step, 0], request.keys[step, 1]
        scores = np.empty(n, np.float32)
        for i in range(n):
            scores[i] = weights[i] / noise(key1, key2, np.uint32(tokens[i]))
        drafted = argmax(scores)
    result.ids[step + 1], result.confidence[step] = tokens[drafted], weights[drafted] / total
    places, ranks = np.empty(TOP, np.int64), np.empty(TOP, np.int32)
    top(logits, places, ranks)
    for i in range(TOP):
        place = places[i]
        result.top_ids[step, i] = tokens[place] if place >= 0 else -1
        result.top_p[step, i] = weights[place] / total if place >= 0 else np.float32(0.0)


def assistant_phases(layers: int, lists: bool) -> int:
    """Phases of a step of `_assistant`: one before the layers, five for each, two after them, and four that choose a
    token where there are lists."""
    return 1 + 5 * layers + 2 + (4 if lists else 0)


@kernel
def _assistant(
    tickets: Any,
    step_phases: Any,
    weights: AssistantWeights,
    request: DraftRequest,
    result: DraftResult,
    scratch: AssistantScratch,
) -> Any:
    """A draft. Returns how many tokens were drafted and how many phases a step has, which are to be `step_phases`.

    Every thread computes norms and activations itself; projections, heads of attention and lists are shared. Without
    lists there is one step, and no token is drafted.
    """
    lists = weights.lists
    width, fed_back = weights.final_norm.shape[0], request.hidden.shape[0]
    embedded = weights.embeddings.shape[1]
    steps = request.keys.shape[0]
    sums = partial_sums()
    inputs = np.empty(embedded + fed_back, np.float32)
    x, normed = np.empty(width, np.float32), np.empty(width, np.float32)
    chance = np.float32(1.0)
    phase = 0
    for step in range(steps):
        drawn = tickets[step * step_phases * TICKETS : (step + 1) * step_phases * TICKETS]
        phase = 0
        embedding = weights.embeddings[result.ids[step]]
        for i in range(embedded):
            inputs[i] = embedding[i] * weights.embedding_scale
        inputs[embedded:] = request.hidden if step == 0 else scratch.hidden[step - 1]
        _project(drawn, phase, inputs, weights.before, scratch.before[step : step + 1], sums)
        phase += 1
        x[:] = scratch.before[step]
        for i in range(len(weights.layers)):
            layer, target = weights.layers[i], request.target[i]
            kv_heads, _, size = target.keys.shape
            # Attention. A chunk is a head.
            rms_norm(x, layer.attention_norm, weights.epsilon, normed)
            query, attended = scratch.query[step, i], scratch.attended[step, i, : weights.heads * size]
            _project(drawn, phase, normed, layer.query, scratch.query[step, i : i + 1], sums)
            phase += 1
            straight, rotated = np.empty(size, np.float32), np.empty(size, np.float32)
            attention = np.empty(attention_weights(target.begin, target.end), np.float32)
            head = next_chunk(drawn, phase, weights.heads)
            while head >= 0:
                at = slice(head * size, head * size + size)
                rms_norm(query[at], layer.query_norm, weights.epsilon, straight)
                rotate(straight, target.cos, target.sin, rotated)
                kv = head // (weights.heads // kv_heads)
                keys, values = target.keys[kv], target.values[kv]
                scaling = layer.attention_scaling
                attend(rotated, keys, values, target.begin, target.end, scaling, attention, attended[at])
                head = finish_chunk(drawn, phase, weights.heads)
            phase += 1
            _project(drawn, phase, attended, layer.attention_out, scratch.attention_out[step, i : i + 1], sums)
            phase += 1
            rms_norm(scratch.attention_out[step, i], layer.post_attention_norm, weights.epsilon, normed)
            x += normed
            rms_norm(x, layer.mlp_norm, weights.epsilon, normed)
            _project(drawn, phase, normed, layer.gate_up, scratch.gate_up[step, i : i + 1], sums)
            phase += 1
            gated = np.empty(layer.gate_up.values.shape[0] // 2, np.float32)
            wide, gate_up = gated.shape[0], scratch.gate_up[step, i]
            gate(gate_up[:wide], gate_up[wide : 2 * wide], weights.gelu, gated)
            _project(drawn, phase, gated, layer.down, scratch.down[step, i : i + 1], sums)
            phase += 1
            rms_norm(scratch.down[step, i], layer.post_mlp_norm, weights.epsilon, normed)
            for j in range(width):
                x[j] = (x[j] + normed[j]) * layer.output_scale
        rms_norm(x, weights.final_norm, weights.epsilon, normed)
        _project(drawn, phase, normed, weights.after, scratch.hidden[step : step + 1], sums)
        phase += 1
        if next_chunk(drawn, phase, 1) == 0:
            scratch.output[step] = normed
            finish_chunk(drawn, phase, 1)
        phase += 1
        if lists.tokens.shape[0] == 0:
            return 1, phase
        _project(drawn, phase, normed, lists.centroids, scratch.scores[step : step + 1], sums)
        phase += 1
        if next_chunk(drawn, phase, 1) == 0:
            largest(scratch.scores[step], result.lists)
            finish_chunk(drawn, phase, 1)
        phase += 1
        row = _quantized_row(normed, lists.rows)
        count, size = result.logits.shape
        c = next_chunk(drawn, phase, count)
        while c >= 0:
            begin = result.lists[c] * size
            products(lists.rows, row, begin, begin + size, result.logits[c : c + 1], sums)
            c = finish_chunk(drawn, phase, count)
        phase += 1
        if next_chunk(drawn, phase, 1) == 0:
            _draft_token(step, lists.tokens, request, result)
            finish_chunk(drawn, phase, 1)
        phase += 1
        chances, least = request.stop.chances, request.stop.least
        bins, confidence = chances.shape[0], result.confidence[step]
        chance *= chances[max(min(int(confidence * bins), bins - 1), 0)]  # the confidence may be NaN
        if chance <= least[min(step + 1, least.shape[0] - 1)]:
            return step + 1, phase
    return steps, phase


def assistant(weights: AssistantWeights, request: DraftRequest, result: DraftResult, scratch: AssistantScratch) -> int:
    """Runs `_assistant` in all threads; returns how many tokens were drafted."""
    expected = assistant_phases(len(weights.layers), len(weights.lists.tokens) > 0)
    steps = len(request.keys)
    drafted, phases = team.run(_assistant, steps * expected, expected, weights, request, result, scratch)
    assert phases == expected, f"_assistant has {phases} phases a step, not {expected}"
    return int(drafted)
