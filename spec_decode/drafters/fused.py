"""A draft step of an assistant on the CPU, in one call.

In: a `Gemma4AssistantForCausalLM` in float32. Out: what its own forward would give for one token, in less time: at one
row, small operations cost as much as the weights. Linear layers and lists are held in 8 bits, as the target's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import cpu, kernels


class FusedAssistant:
    """Begin a round with `begin`, then call `step` for each draft.

    Args:
        model: the assistant.
        rows: of the head, `[V, width]`, if it looks at lists of them.
    """

    def __init__(self, model: Any, rows: Tensor | None) -> None:
        self.rotary = model.model.rotary_emb
        config = model.config.get_text_config()
        layers = list(model.model.layers)
        attentions = [layer.self_attn for layer in layers]
        self.kinds = [attention.layer_type for attention in attentions]
        embedder = model.masked_embedding if rows is not None else None
        self.ordering = None if embedder is None else embedder.token_ordering.long().view(len(embedder.centroids.weight), -1)
        self.kernel = kernels.Assistant(
            cpu.array(model.pre_projection.weight),
            cpu.array(model.post_projection.weight),
            [{name: cpu.array(parameter) for name, parameter in layer.named_parameters()} for layer in layers],
            cpu.array(model.model.norm.weight),
            config.num_attention_heads,
            [attention.scaling for attention in attentions],
            [float(layer.layer_scalar) for layer in layers],
            model.model.norm.eps,
            config.hidden_activation != "silu",
            None if rows is None else (cpu.array(embedder.centroids.weight), cpu.array(rows[self.ordering.flatten()])),
            0 if embedder is None else embedder.centroid_intermediate_top_k,
        )

    def begin(self, shared: dict[str, tuple[Tensor, Tensor]], length: int, window: int) -> None:
        """Takes the target's keys and values `[1, heads, n, d]`, of which the first `length` are real."""
        place = torch.full((1, 1), length)
        self.held = shared  # the kernel knows but addresses
        buffers, turns = {}, {}
        for kind, (keys, values) in shared.items():
            first = max(length - 1 - window, 0) if kind == "sliding_attention" else 0
            capacity = keys.stride(1) // keys.stride(2)
            buffers[kind] = (keys.shape[1], keys.data_ptr(), values.data_ptr(), capacity, first, length)
            cos, sin = self.rotary(keys, place, kind)
            turns[kind] = cpu.array(cos[0, 0]), cpu.array(sin[0, 0])
        self.kernel.read([buffers[kind] for kind in self.kinds], [turns[kind] for kind in self.kinds])

    def step(self, embedded: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """`[1, H]` twice → the assistant's output `[1, width]`, the hidden state it feeds back `[1, H]`, and if it looks
        at lists the tokens in them `[n]` and their logits `[1, n]`."""
        inputs = torch.cat([embedded[0], hidden[0]])
        out, hidden_array, chosen, logits = self.kernel.step(cpu.array(inputs), cpu.THREADS)
        ids = None if self.ordering is None else self.ordering[torch.from_numpy(chosen)].flatten()
        output, fed_back, products = (torch.from_numpy(array)[None] for array in (out, hidden_array, logits))
        return output, fed_back, ids, products
