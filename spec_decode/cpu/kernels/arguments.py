"""Arguments of the kernels: named tuples of arrays and numbers, which Numba compiles for as they are.

They lie in a module that can be imported, since Numba's on-disk cache refers to them by name. Arrays are C-contiguous.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Matrix(NamedTuple):
    """8-bit weights, each row with a scale of its own. A stack of matrices has one more dimension in front.

    values: int8 `[outputs, in]`, `in` padded with zeros to a multiple of `products.BLOCK`.
    scales: float32 `[outputs]`.
    """

    values: np.ndarray
    scales: np.ndarray


class Quantized(NamedTuple):
    """Rows of activations in 14 bits, each with a scale of its own.

    values: int16 `[rows, in]`, padded as the weights they meet.
    scales: float32 `[rows]`.
    """

    values: np.ndarray
    scales: np.ndarray


class Rope(NamedTuple):
    """cos and sin of rotary positions, float32 `[positions, head size]` each."""

    cos: np.ndarray
    sin: np.ndarray


class LlamaShape(NamedTuple):
    """What a Llama's attention and norms are told beside their weights."""

    heads: int
    kv_heads: int
    head_size: int
    epsilon: np.float32
    attention_scaling: np.float32


class LlamaWeights(NamedTuple):
    """Weights of all layers, stacked: norms float32 `[layers, width]`, projections `Matrix` with `[layers, …]`; and of
    the last norm, `[width]`. q, k and v are one matrix, gate and up another."""

    attention_norm: np.ndarray
    qkv: Matrix
    attention_out: Matrix
    mlp_norm: np.ndarray
    gate_up: Matrix
    down: Matrix
    final_norm: np.ndarray


class LlamaCache(NamedTuple):
    """Addresses, int64 `[layers]` each, of every layer's keys and values, float32 `[sequences, kv heads, capacity, head
    size]`."""

    keys: np.ndarray
    values: np.ndarray
    sequences: int
    capacity: int


class LlamaPass(NamedTuple):
    """The rows of one pass: tokens of one sequence or of several.

    hidden: float32 `[rows, width]`; embeddings at first, at the end what follows the last norm.
    sequences: int64 `[rows]`, which one each row belongs to.
    positions: int64 `[rows]`, of each row in its sequence.
    end: above all positions.
    rope: of the rows' positions.
    head: the output head, with no rows where logits are not wanted.
    logits: float32 `[kept rows, outputs of head]`, to be filled: those of the last rows.
    """

    hidden: np.ndarray
    sequences: np.ndarray
    positions: np.ndarray
    end: int
    rope: Rope
    head: Matrix
    logits: np.ndarray


class LlamaScratch(NamedTuple):
    """What the threads of a pass hand to each other, with a row for each row of the pass. All layers use the
    same buffers: a phase begins when the phase before it is done.

    normed: what a norm gave.
    query, attended, quantized_attended: of attention.
    gated, quantized_gated: of the MLP.
    last: the kept rows after the last norm.
    """

    normed: Quantized
    query: np.ndarray
    attended: np.ndarray
    quantized_attended: Quantized
    gated: np.ndarray
    quantized_gated: Quantized
    last: Quantized


class AssistantLayer(NamedTuple):
    """One layer of an assistant: norms float32 `[width]`, of queries `[head size]`; attention has queries only.

    output_scale: what the layer's output is multiplied with.
    """

    attention_norm: np.ndarray
    query_norm: np.ndarray
    query: Matrix
    attention_scaling: np.float32
    attention_out: Matrix
    post_attention_norm: np.ndarray
    mlp_norm: np.ndarray
    gate_up: Matrix
    down: Matrix
    post_mlp_norm: np.ndarray
    output_scale: np.float32


class TokenLists(NamedTuple):
    """A head that computes logits of the tokens in a few lists only, those whose centroids have the highest scores.

    centroids: a row for each list; no rows where there are no lists.
    rows: of the head, list by list.
    tokens: int64 `[lists, size]`.
    """

    centroids: Matrix
    rows: Matrix
    tokens: np.ndarray


class AssistantWeights(NamedTuple):
    """An assistant and the target's embeddings, float32 `[V, H]`, which are multiplied with `embedding_scale`.

    before, after: the projections between the target's width and the assistant's.
    gelu: the activation is GELU in its tanh form, not SiLU.
    """

    embeddings: np.ndarray
    embedding_scale: np.float32
    before: Matrix
    layers: tuple[AssistantLayer, ...]
    final_norm: np.ndarray
    after: Matrix
    lists: TokenLists
    heads: int
    epsilon: np.float32
    gelu: bool


class TargetLayer(NamedTuple):
    """What one layer of an assistant attends to: keys and values of a layer of the target, float32 `[kv heads,
    capacity, head size]`, from position `begin` to `end`; and the row of the RoPE table at the position of the queries,
    `[head size]`."""

    keys: np.ndarray
    values: np.ndarray
    begin: int
    end: int
    cos: np.ndarray
    sin: np.ndarray


class StopTable(NamedTuple):
    """When a draft ends: as soon as the product of its tokens' chances is at most `least` of their number.

    chances: float32 `[bins]`, of a confidence in each of equal ranges of [0, 1].
    least: float32 `[n]`, after 0, 1, … tokens; the last entry counts for all numbers beyond.
    """

    chances: np.ndarray
    least: np.ndarray


class DraftRequest(NamedTuple):
    """What is to be drafted.

    hidden: the target's last hidden state, float32 `[H]`.
    target: what each layer attends to.
    temperature: 0 for the most likely tokens.
    keys: uint32 `[steps, 2]`, the noise keys of the positions to be drafted.
    """

    hidden: np.ndarray
    target: tuple[TargetLayer, ...]
    temperature: np.float32
    keys: np.ndarray
    stop: StopTable


class DraftResult(NamedTuple):
    """What a draft fills in.

    ids: int64 `[steps + 1]`, given the last token in front. Of a draft that ended early the rest keeps its values.
    confidence: float32 `[steps]`, the probability of each drafted token among the listed ones.
    top_ids, top_p: int64 and float32 `[steps, n]`, the likeliest listed tokens and their probabilities.
    lists: int64 `[n]`, the lists the latest step looked at, by index.
    logits: float32 `[n, size]`, of their tokens.
    """

    ids: np.ndarray
    confidence: np.ndarray
    top_ids: np.ndarray
    top_p: np.ndarray
    lists: np.ndarray
    logits: np.ndarray


class AssistantScratch(NamedTuple):
    """Intermediate results of a draft, shared by its threads. Every step and layer has rows of its own, since a slow
    thread still reads them when others are steps ahead.

    before: float32 `[steps, width]`.
    query, attended, gate_up: float32 `[steps, layers, widest]`.
    attention_out, down: float32 `[steps, layers, width]`.
    output: float32 `[steps, width]`, what follows the last norm.
    hidden: float32 `[steps, H]`, the hidden state that the next step is given.
    scores: float32 `[steps, lists]`, of the centroids.
    """

    before: np.ndarray
    query: np.ndarray
    attended: np.ndarray
    attention_out: np.ndarray
    gate_up: np.ndarray
    down: np.ndarray
    output: np.ndarray
    hidden: np.ndarray
    scores: np.ndarray
