"""A draft step of an assistant on the CPU, in one call.

In: a `Gemma4AssistantForCausalLM` in float32. Out: what its own forward would give for one token, in less time: at one
row, small operations cost as much as the weights. Linear layers and lists are held in 8 bits, as the target's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import cpu, kernels
from ..cache import bucket
from ..cpu import array

NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
    "self_attn.q_norm",
)
PROJECTIONS = (("self_attn.q_proj",), ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))


class FusedAssistant:
    """Begin a round with `begin`, then call `step` for each draft.

    Args:
        model: the assistant.
        rows: of the head, `[V, width]`, if it looks at lists of them.
    """

    def __init__(self, model: Any, rows: Tensor | None) -> None:
        config = model.config.get_text_config()
        self.rotary = model.model.rotary_emb
        self.tables: dict[str, list[np.ndarray]] = {}
        self.layers = list(model.model.layers)
        parameters = [dict(layer.named_parameters()) for layer in self.layers]
        matrices = [model.pre_projection.weight]
        for layer in parameters:
            matrices += [torch.cat([layer[f"{name}.weight"] for name in names]) for names in PROJECTIONS]
        matrices.append(model.post_projection.weight)
        self.widest = max(len(matrix) for matrix in matrices)  # of what threads hand to each other
        self.ordering: np.ndarray | None = None
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
        )
        self.heads = config.num_attention_heads
        self.width, self.hidden = len(model.pre_projection.weight), len(model.post_projection.weight)

    def begin(self, shared: dict[str, tuple[Tensor, Tensor]], length: int, window: int) -> None:
        """Takes the target's keys and values `[1, heads, n, d]`, of which the first `length` are real."""
        self.held = shared  # the kernel knows but addresses
        reads, turns = [], []
        for layer in self.layers:
            kind, size = layer.self_attn.layer_type, layer.self_attn.head_dim
            keys, values = shared[kind]
            first = max(length - 1 - window, 0) if kind == "sliding_attention" else 0
            capacity = keys.stride(1) // keys.stride(2)
            where = (keys.shape[1], keys.data_ptr(), values.data_ptr(), capacity, first, length)
            reads.append((self.heads, size, *where))
            turns += [table[length] for table in self._turns(kind, length)]
        self.reads, self.turns = np.array(reads), tuple(turns)

    def _turns(self, kind: str, length: int) -> list[np.ndarray]:
        """Tables of cos and sin, `[n, head size]` each with n > `length`, made for a while ahead."""
        known = self.tables.get(kind)
        if known is None or len(known[0]) <= length:
            places = torch.arange(bucket(length + 1))[None]
            known = self.tables[kind] = [array(part[0]) for part in self.rotary(self.held[kind][0], places, kind)]
        return known

    def step(self, embedded: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, np.ndarray, np.ndarray]:
        """`[1, H]` twice → the assistant's output `[1, width]`, the hidden state it feeds back `[1, H]`, and if it
        looks at lists, which ones `[chosen]` and the logits of their tokens `[chosen · size]`."""
        inputs = array(torch.cat([embedded[0], hidden[0]]))
        layers = len(self.layers)
        outs = np.empty((5 * layers + 6, self.widest), np.float32)
        chosen = np.empty(self.chosen, np.int64)
        logits = np.empty(0 if self.ordering is None else self.chosen * self.ordering.shape[1], np.float32)
        weights = (self.values, self.scales, self.norms, self.numbers)
        kernels.assistant(cpu.threads, layers, inputs, *weights, self.reads, self.turns, chosen, logits, outs)
        output, fed_back = torch.from_numpy(outs[-2:-1, : self.width]), torch.from_numpy(outs[-1:, : self.hidden])
        return output, fed_back, chosen, logits
