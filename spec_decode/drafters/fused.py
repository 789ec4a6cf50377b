"""A draft step of an assistant on the CPU, in as few operations as it takes.

In: a `Gemma4AssistantForCausalLM` whose linear layers are `cpu.OneRowLinear`. Out: what its own forward would give for
one token, in less time: at one row, small operations cost as much as the weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import cpu


def fits(model: Any) -> bool:
    """True for an assistant that was loaded beside an int8 target."""
    return isinstance(model.pre_projection, cpu.OneRowLinear)


class FusedAssistant:
    """Begin a round with `begin`, then call `step` for each draft."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.config = model.config.get_text_config()
        self.layers = [_Layer(layer) for layer in model.model.layers]
        self.norm = model.model.norm

    def begin(self, shared: dict[str, tuple[Tensor, Tensor]], length: int, window: int) -> None:
        """Takes the target's keys and values `[1, heads, n, d]`, of which the first `length` are real."""
        place = torch.full((1, 1), length)
        self.kv, self.turn = {}, {}
        for kind, (keys, values) in shared.items():
            first = max(length - 1 - window, 0) if kind == "sliding_attention" else 0
            self.kv[kind] = keys[:, :, first:length], values[:, :, first:length]
            cos, sin = self.model.model.rotary_emb(keys, place, kind)
            cos, sin = cos[0], sin[0].clone()
            sin[..., : sin.shape[-1] // 2].neg_()  # so that rotating takes one swap of halves
            self.turn[kind] = cos, sin

    def step(self, embedded: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """`[1, H]` twice → the assistant's output `[1, width]` and the hidden state it feeds back `[1, H]`."""
        x = self.model.pre_projection(torch.cat([embedded, hidden], -1))
        for layer in self.layers:
            x = layer(x, *self.kv[layer.kind], *self.turn[layer.kind])
        x = F.rms_norm(x, x.shape[-1:], self.norm.weight, self.norm.eps)
        return x, self.model.post_projection(x)


class _Layer:
    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.kind = attention.layer_type
        self.q, self.out = attention.q_proj, attention.o_proj
        self.gate, self.up, self.down, self.act = mlp.gate_proj, mlp.up_proj, mlp.down_proj, mlp.act_fn
        self.q_norm = attention.q_norm
        self.head_dim, self.scaling = attention.head_dim, attention.scaling
        self.norms = (
            layer.input_layernorm,
            layer.post_attention_layernorm,
            layer.pre_feedforward_layernorm,
            layer.post_feedforward_layernorm,
        )
        self.scalar = float(layer.layer_scalar)

    def __call__(self, x: Tensor, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        before, after, before_mlp, after_mlp = self.norms
        q = self.q(_normed(x, before)).view(-1, self.head_dim)
        q = _normed(q, self.q_norm)
        q = torch.addcmul(q * cos, q.roll(self.head_dim // 2, -1), sin)
        groups = q.view(1, keys.shape[1], -1, self.head_dim)
        mixed = F.scaled_dot_product_attention(groups, keys, values, scale=self.scaling)
        x = x + _normed(self.out(mixed.reshape(1, -1)), after)
        inner = _normed(x, before_mlp)
        inner = self.down(self.act(self.gate(inner)) * self.up(inner))
        x = x + _normed(inner, after_mlp)
        return x if self.scalar == 1.0 else x * self.scalar


def _normed(x: Tensor, norm: Any) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)
