"""Drafts of a Gemma 4 assistant on the CPU, each in one call.

In: a `Gemma4AssistantForCausalLM` in float32. Out: the drafts of its own forward in less time: for one row, starting
small operations costs as much as reading the weights. Linear layers and lists are held in 8 bits, as the target's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..cache import RollbackCache, bucket
from ..draft_length import EarlyStop
from ..settings import MAX_DRAFT_LENGTH
from . import kernels
from .kernels.arguments import (
    AssistantLayer,
    AssistantScratch,
    AssistantWeights,
    DraftRequest,
    DraftResult,
    Matrix,
    Rope,
    StopTable,
    TargetLayer,
    TokenLists,
)
from .llama import array

NEVER_STOPS = StopTable(np.array([1.0], np.float32), np.array([-1.0], np.float32))


class Drafted(NamedTuple):
    """A draft of n tokens.

    ids: int64 `[n]`.
    confidence: float32 `[n]`, the probability of each id among the tokens of the lists looked at, at the temperature of
        the draft; at temperature 0 it is that at temperature 1.
    top_ids: int64 `[n, 5]`, the likeliest tokens among them, most likely first, −1 where there are fewer.
    top_p: float32 `[n, 5]`, their probabilities, 0 where there are fewer.
    """

    ids: np.ndarray
    confidence: np.ndarray
    top_ids: np.ndarray
    top_p: np.ndarray


class FusedAssistant:
    """Begin a round with `begin`, then call `draft`, or `step` for each token.

    Args:
        model: the assistant.
        embed: the target's embeddings.
        rows: of the head, `[V, width]`, if it looks at lists of tokens only.
    """

    def __init__(self, model: Any, embed: Any, rows: Tensor | None) -> None:
        config = model.config.get_text_config()
        self.rotary = model.model.rotary_emb
        self.tables: dict[str, Rope] = {}
        self.kinds = [layer.self_attn.layer_type for layer in model.model.layers]
        lists, self.chosen = _lists(model, rows)
        self.weights = AssistantWeights(
            embeddings=array(embed.weight),
            embedding_scale=np.float32(getattr(embed, "scalar_embed_scale", 1.0)),
            before=_matrix(model.pre_projection.weight),
            layers=tuple(_layer(layer) for layer in model.model.layers),
            final_norm=array(model.model.norm.weight),
            after=_matrix(model.post_projection.weight),
            lists=lists,
            heads=config.num_attention_heads,
            epsilon=np.float32(model.model.norm.eps),
            gelu=config.hidden_activation != "silu",
        )
        self.scratch = _scratch(self.weights, MAX_DRAFT_LENGTH)
        self.held: RollbackCache | None = None
        self.buffers: list[tuple[np.ndarray, ...]] = []  # keys and values of all rows that each layer reads, in place
        self.target: tuple[TargetLayer, ...] = ()

    def begin(self, cache: RollbackCache, sources: dict[str, int], window: int, row: int = 0) -> None:
        """Takes a row of the target's cache, as far as it is filled.

        Args:
            sources: the target layer that each kind of attention reads.
            window: positions before the last one that sliding attention reads.
        """
        length = cache.length if len(cache.lengths) == 1 else int(cache.lengths[row])
        if self.held is not cache:
            self.held = cache
            layers = [cache.layers[sources[kind]] for kind in self.kinds]
            self.buffers = [tuple(x.detach().numpy() for x in (layer.keys, layer.values)) for layer in layers]
        self.target = tuple(
            TargetLayer(
                keys[row],
                values[row],
                max(length - 1 - window, 0) if kind == "sliding_attention" else 0,
                length,
                *self._rope(kind, length),
            )
            for kind, (keys, values) in zip(self.kinds, self.buffers, strict=True)
        )

    def end(self) -> None:
        """Lets the cache go."""
        self.held, self.buffers, self.target = None, [], ()

    def _rope(self, kind: str, position: int) -> tuple[np.ndarray, np.ndarray]:
        """The row of the RoPE table at a position. Tables are made a bucket at a time."""
        known = self.tables.get(kind)
        if known is None or len(known.cos) <= position:
            frequencies = array(getattr(self.rotary, f"{kind}_inv_freq"))
            scaling = getattr(self.rotary, f"{kind}_attention_scaling")
            known = self.tables[kind] = kernels.rope_table(frequencies, bucket(position + 1), scaling)
        return known.cos[position], known.sin[position]

    def step(self, token: int, hidden: Tensor) -> tuple[Tensor, Tensor, np.ndarray, np.ndarray]:
        """One step of the assistant.

        Args:
            token: the last token.
            hidden: `[1, H]`, the target's last hidden state at first, then the one fed back.

        Returns:
            The assistant's output `[1, width]` and the hidden state it feeds back `[1, H]`; if it looks at lists, which
            ones, int64 `[chosen]`, and their tokens' logits, float32 `[chosen · size]`.
        """
        ids = np.array([token, 0])
        _, result = self._run(ids, hidden, NEVER_STOPS, 0.0, np.zeros((1, 2), np.uint32))
        # Copies: the next step writes to these rows, and reads the hidden state.
        output, fed_back = self.scratch.output[:1].copy(), self.scratch.hidden[:1].copy()
        return torch.from_numpy(output), torch.from_numpy(fed_back), result.lists, result.logits.reshape(-1)

    def draft(
        self, token: int, hidden: Tensor, length: int, stop: EarlyStop | None, temperature: float, keys: np.ndarray
    ) -> Drafted:
        """Drafts out of the lists: the most likely token of each step or, at a temperature, the one that wins the
        exponential race.

        Args:
            token: the last token.
            hidden: `[1, H]`, the target's last hidden state.
            length: of the draft, at most.
            stop: may end it earlier.
            keys: noise keys, uint32 `[length, 2]`.

        Raises:
            ValueError: `keys` are for more tokens than a draft may have.
        """
        # Zeros: if a thread fails, the others still look up the tokens that were not drafted.
        ids = np.zeros(length + 1, np.int64)
        ids[0] = token
        table = NEVER_STOPS if stop is None else StopTable(stop.chances, stop.least)
        n, result = self._run(ids, hidden, table, temperature, keys)
        return Drafted(ids[1 : n + 1], result.confidence[:n], result.top_ids[:n], result.top_p[:n])

    def _run(
        self, ids: np.ndarray, hidden: Tensor, stop: StopTable, temperature: float, keys: np.ndarray
    ) -> tuple[int, DraftResult]:
        steps = len(keys)
        if steps > MAX_DRAFT_LENGTH:  # the kernel would write beyond its scratch
            raise ValueError(f"a draft has at most {MAX_DRAFT_LENGTH} tokens, not {steps}")
        result = DraftResult(
            ids=ids,
            confidence=np.empty(steps, np.float32),
            top_ids=np.empty((steps, kernels.TOP), np.int64),
            top_p=np.empty((steps, kernels.TOP), np.float32),
            lists=np.zeros(self.chosen, np.int64),  # zeros for the same reason as `ids`
            logits=np.empty((self.chosen, self.weights.lists.tokens.shape[1]), np.float32),
        )
        request = DraftRequest(array(hidden[0]), self.target, np.float32(temperature), keys, stop)
        return kernels.assistant(self.weights, request, result, self.scratch), result


def _matrix(weight: Tensor) -> Matrix:
    return kernels.Weights([array(weight)]).single


def _layer(layer: Any) -> AssistantLayer:
    attention, mlp = layer.self_attn, layer.mlp
    return AssistantLayer(
        attention_norm=array(layer.input_layernorm.weight),
        query_norm=array(attention.q_norm.weight),
        query=_matrix(attention.q_proj.weight),
        attention_scaling=np.float32(attention.scaling),
        attention_out=_matrix(attention.o_proj.weight),
        post_attention_norm=array(layer.post_attention_layernorm.weight),
        mlp_norm=array(layer.pre_feedforward_layernorm.weight),
        gate_up=_matrix(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])),
        down=_matrix(mlp.down_proj.weight),
        post_mlp_norm=array(layer.post_feedforward_layernorm.weight),
        output_scale=np.float32(float(layer.layer_scalar)),
    )


def _lists(model: Any, rows: Tensor | None) -> tuple[TokenLists, int]:
    """The lists of the head whose rows are given, and how many of them a step looks at; none without rows."""
    if rows is None:
        nothing = _matrix(torch.empty(0, 1))
        return TokenLists(nothing, nothing, np.empty((0, 0), np.int64)), 0
    embedder = model.masked_embedding
    ordering = embedder.token_ordering.long().cpu()
    # The rows of a list lie side by side, which takes a third of the time to read.
    tokens = ordering.view(len(embedder.centroids.weight), -1).numpy()
    lists = TokenLists(_matrix(embedder.centroids.weight), _matrix(rows[ordering]), tokens)
    return lists, embedder.centroid_intermediate_top_k


def _scratch(weights: AssistantWeights, steps: int) -> AssistantScratch:
    layers, width = len(weights.layers), len(weights.final_norm)

    def room(*shape: int) -> np.ndarray:
        return np.empty((steps, *shape), np.float32)

    queries = max(len(layer.query.values) for layer in weights.layers)
    return AssistantScratch(
        before=room(width),
        query=room(layers, queries),
        attended=room(layers, queries),
        attention_out=room(layers, width),
        gate_up=room(layers, max(len(layer.gate_up.values) for layer in weights.layers)),
        down=room(layers, width),
        output=room(width),
        hidden=room(len(weights.after.values)),
        scores=room(len(weights.lists.centroids.values)),
    )
