"""Drafts of an assistant on the CPU, in one call.

In: a `Gemma4AssistantForCausalLM` in float32. Out: what its own forward would draft, in less time: at one row, small
operations cost as much as the weights. Linear layers and lists are held in 8 bits, as the target's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import kernels
from ..cache import RollbackCache, bucket
from ..cpu import array
from ..draft_length import GoOn
from ..settings import MAX_DRAFT_LENGTH

NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
    "self_attn.q_norm",
)
PROJECTIONS = (("self_attn.q_proj",), ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))


class FusedAssistant:
    """Begin a round with `begin`, then call `draft`, or `step` for each token.

    Args:
        model: the assistant.
        embed: the target's embeddings.
        rows: of the head, `[V, width]`, if it looks at lists of them.
    """

    def __init__(self, model: Any, embed: Any, rows: Tensor | None) -> None:
        config = model.config.get_text_config()
        self.rotary = model.model.rotary_emb
        self.tables: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self.layers = list(model.model.layers)
        parameters = [dict(layer.named_parameters()) for layer in self.layers]
        matrices = [model.pre_projection.weight]
        for layer in parameters:
            matrices += [torch.cat([layer[f"{name}.weight"] for name in names]) for names in PROJECTIONS]
        matrices.append(model.post_projection.weight)
        self.widest = max(len(matrix) for matrix in matrices)  # of what threads hand to each other
        self.table = array(embed.weight)
        self.ordering = np.empty((0, 0), np.int64)
        self.chosen = 0
        if rows is not None:
            embedder = model.masked_embedding
            self.chosen = embedder.centroid_intermediate_top_k
            ordering = embedder.token_ordering.long().cpu()
            # A list's rows side by side: reading them so takes a third of the time.
            matrices += [embedder.centroids.weight, rows[ordering]]
            self.ordering = ordering.view(len(embedder.centroids.weight), -1).numpy()
            self.widest = max(self.widest, len(self.ordering))
        weights = [kernels.Weights([array(matrix)]) for matrix in matrices]
        self.values, self.scales = tuple(w.values[0] for w in weights), tuple(w.scales[0] for w in weights)
        self.norms = tuple(array(layer[f"{name}.weight"]) for layer in parameters for name in NORMS)
        self.norms += (array(model.model.norm.weight),)
        self.numbers = (
            np.float32(model.model.norm.eps),
            config.hidden_activation != "silu",  # GELU in its tanh form
            np.array([layer.self_attn.scaling for layer in self.layers], np.float32),
            np.array([float(layer.layer_scalar) for layer in self.layers], np.float32),
            np.float32(getattr(embed, "scalar_embed_scale", 1.0)),
        )
        self.heads = config.num_attention_heads
        self.kinds = [layer.self_attn.layer_type for layer in self.layers]
        self.held: RollbackCache | None = None
        self.outs = np.empty((MAX_DRAFT_LENGTH, 5 * len(self.layers) + 7, self.widest), np.float32)
        self.width, self.hidden = len(model.pre_projection.weight), len(model.post_projection.weight)

    def begin(self, cache: RollbackCache, sources: dict[str, int], window: int) -> None:
        """Takes the target's cache, as far as it is filled, and which of its layers each kind of attention reads."""
        length = cache.length
        if self.held is not cache:
            self.held = cache  # the kernel knows but addresses
            self.reads = np.array([self._addresses(cache.layers[sources[kind]]) for kind in self.kinds])
        for read, kind in zip(self.reads, self.kinds, strict=True):
            read[-2] = max(length - 1 - window, 0) if kind == "sliding_attention" else 0
            read[-1] = length
        self.turns = tuple(table[length] for kind in self.kinds for table in self._turns(kind, length))

    def end(self) -> None:
        """The cache can go."""
        self.held = None

    def _addresses(self, layer: Any) -> tuple[int, ...]:
        _, heads, capacity, size = layer.keys.shape
        return (self.heads, size, heads, layer.keys.data_ptr(), layer.values.data_ptr(), capacity, 0, 0)

    def _turns(self, kind: str, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Tables of cos and sin, `[n, head size]` each with n > `length`, made for a while ahead."""
        known = self.tables.get(kind)
        if known is None or len(known[0]) <= length:
            frequencies = array(getattr(self.rotary, f"{kind}_inv_freq"))
            scaling = getattr(self.rotary, f"{kind}_attention_scaling")
            known = self.tables[kind] = kernels.rope_table(frequencies, bucket(length + 1), scaling)
        return known

    def step(self, token: int, hidden: Tensor) -> tuple[Tensor, Tensor, np.ndarray, np.ndarray]:
        """The token before and a hidden state `[1, H]` → the assistant's output `[1, width]`, the hidden state it feeds
        back `[1, H]`, and if it looks at lists, which ones `[chosen]`, and their tokens' logits `[chosen · size]`."""
        ids = np.array([token, 0])
        chosen, logits, outs, _ = self._run(ids, hidden, GoOn.always(), np.float32(0.0), np.zeros((1, 2), np.uint32))
        # Copies: the next step writes to the same rows while it still reads these.
        output, fed_back = outs[0, -2:-1, : self.width].copy(), outs[0, -1:, : self.hidden].copy()
        return torch.from_numpy(output), torch.from_numpy(fed_back), chosen, logits.reshape(-1)

    def draft(
        self, token: int, hidden: Tensor, length: int, go_on: GoOn | None, temperature: float, keys: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Up to `length` tokens out of the lists and their probabilities among them: the most likely ones, or at a
        temperature those that win with the noise of `keys`, uint32 `[length, 2]`."""
        ids = np.zeros(length + 1, np.int64)  # a draft that was given up looks tokens up that nobody chose
        ids[0] = token
        go_on = go_on or GoOn.always()
        go_on.asked = go_on.asked or length > 1
        *_, sure = self._run(ids, hidden, go_on, np.float32(temperature), keys)
        return ids[1 : len(sure) + 1], sure

    def _run(
        self, ids: np.ndarray, hidden: Tensor, go_on: GoOn, heat: np.float32, keys: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        steps = len(keys)
        outs = self.outs[:steps]
        chosen = np.zeros(self.chosen, np.int64)  # broken weights choose nothing
        logits = np.empty((self.chosen, self.ordering.shape[1]), np.float32)
        sure = np.empty(steps, np.float32)
        weights = (self.values, self.scales, self.norms, self.numbers)
        goes = (go_on.chances, go_on.least)
        drafted = kernels.assistant(
            outs,
            self.table,
            *weights,
            self.reads,
            self.turns,
            self.ordering,
            heat,
            keys,
            goes,
            array(hidden[0]),
            ids,
            sure,
            chosen,
            logits,
        )
        return chosen, logits, outs, sure[:drafted]
