"""int8 on the CPU: fast, and a row's result never depends on the rows beside it.

In: a float32 transformers model. Out: the same model, in place, with 8-bit linear layers and an attention that treats
every row alike. Of a Llama-family model the whole base becomes one call of `kernels`, since at one row small operations
cost as much as the weights.

Why rows must not mix: verification feeds the target γ + 1 rows where the baseline feeds it one. With float kernels the
two differ in the last bit, with per-tensor activation scales by far more, and either can turn a near-tie into another
token. Here every row has its own scale, the sums are over integers (exact in any order), and attention runs one row at
a time. So both lanes emit the same tokens bit for bit, not almost always.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaModel

from . import kernels
from .cache import ARGUMENT, RollbackCache, bucket
from .kernels import sharing

ROWWISE = "rowwise_sdpa"
READ = 64  # positions; keys and values are read in steps of it
MOST_THREADS = sharing.threads = torch.get_num_threads()  # what PyTorch would use; see `models.choose_threads`
MOST_ROWS = 32  # a pass of more is a prefill, which both lanes make alike


def quantize(model: PreTrainedModel) -> PreTrainedModel:
    """Makes `model` (float32, on the CPU) int8 in place: every linear layer, the output head included."""
    base, config = model.base_model, model.config
    if (
        type(base) is LlamaModel
        and config.hidden_act == "silu"
        and not (config.attention_bias or config.mlp_bias)
        and getattr(model.get_output_embeddings(), "bias", None) is None
        and base.layers[0].self_attn.head_dim % 8 == 0
        and base.rotary_emb.rope_type in ("default", "linear", "llama3", "yarn")  # the same whatever the length
    ):
        decoder = Int8Llama(base)
        setattr(model, model.base_model_prefix, decoder)
        quantize_linears(model)
        model.forward = partial(_forward, decoder, model.get_output_embeddings())
    else:
        model.set_attn_implementation(ROWWISE)
        quantize_linears(model)
    return model


def _forward(
    decoder: Int8Llama,
    head: Int8Linear,
    input_ids: Tensor,
    logits_to_keep: int = 0,
    output_hidden_states: bool = False,
    **kwargs: Any,
) -> CausalLMOutputWithPast:
    """As the model's own forward, without what that does beside the work."""
    hidden, logits, cache = decoder.run(input_ids, kwargs.get(ARGUMENT), head, logits_to_keep or input_ids.shape[1])
    states = (hidden,) if output_hidden_states else None
    return CausalLMOutputWithPast(logits=logits, hidden_states=states, **{ARGUMENT: cache})


def quantize_linears(model: nn.Module) -> None:
    """Makes the linear layers inside `model` int8 in place and leaves the rest."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, Int8Linear(child.weight, child.bias))


class Int8Linear(nn.Module):
    """y = x Wᵀ + b with 8-bit weights, a scale for every row of W, and 14-bit activations, a scale for every row."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weights = kernels.Weights([array(weight)])
        self.bias = None if bias is None else nn.Parameter(bias.detach().float(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        y = torch.from_numpy(kernels.linear(array(rows), self.weights))
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class Int8Llama(nn.Module):
    """A `LlamaModel` as one call of `kernels.llama`. Its cache is a `RollbackCache`."""

    NORMS = ("input_layernorm", "post_attention_layernorm")
    PROJECTIONS = (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    )

    def __init__(self, model: LlamaModel) -> None:
        super().__init__()
        self.config = model.config
        self.embed_tokens = model.embed_tokens
        self.rotary = (array(model.rotary_emb.inv_freq), model.rotary_emb.attention_scaling)
        attention = model.layers[0].self_attn
        heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
        self.shape = (heads, kv_heads, attention.head_dim)
        self.numbers = (np.float32(model.norm.variance_epsilon), np.float32(attention.scaling))
        layers = [dict(layer.named_parameters()) for layer in model.layers]
        self.norms = np.stack([np.stack([array(layer[f"{name}.weight"]) for name in self.NORMS]) for layer in layers])
        self.norm = array(model.norm.weight)
        weights = [
            kernels.Weights([array(torch.cat([layer[f"{name}.weight"] for name in names])) for layer in layers])
            for names in self.PROJECTIONS
        ]
        self.values, self.scales = tuple(w.values for w in weights), tuple(w.scales for w in weights)
        self.nothing = (np.empty((0, len(self.norm)), np.int8), np.empty(0, np.float32))
        self.turns = kernels.rope_table(self.rotary[0], 0)  # cos and sin of the first positions

    def forward(self, input_ids: Tensor, **kwargs: Any) -> BaseModelOutputWithPast:
        hidden, _, cache = self.run(input_ids, kwargs.get(ARGUMENT))
        return BaseModelOutputWithPast(last_hidden_state=hidden, **{ARGUMENT: cache})

    def run(
        self, input_ids: Tensor, cache: RollbackCache | None, head: Int8Linear | None = None, keep: int = 0
    ) -> tuple[Tensor, Tensor, RollbackCache]:
        """int64 `[1, rows]` behind what the cache holds → last hidden states `[1, rows, width]`, logits of the last
        `keep` rows `[1, keep, V]`, and the cache."""
        cache = cache or RollbackCache(self.config, input_ids.shape[1])
        x = self.embed_tokens(input_ids)[0]
        start, end = cache.length, cache.length + len(x)
        if end > cache.capacity:  # the kernel would write beyond its buffers
            raise ValueError(f"the cache has room for {cache.capacity} positions, and the pass ends at {end}")
        if len(self.turns[0]) < end:
            frequencies, scaling = self.rotary
            self.turns = kernels.rope_table(frequencies, bucket(end), scaling)
        cos, sin = (table[start:end] for table in self.turns)
        _, kv_heads, size = self.shape
        buffers = cache.buffers(kv_heads, size, x)
        logits = np.empty((keep, head.out_features if head else 0), np.float32)
        kernels.llama(
            len(self.norms),
            array(x),
            start,
            cos,
            sin,
            self.norms,
            self.norm,
            self.values,
            self.scales,
            self.shape,
            *self.numbers,
            *(np.array([buffer.data_ptr() for buffer in kind]) for kind in buffers),
            cache.capacity,
            self.nothing if head is None else (head.weights.values[0], head.weights.scales[0]),
            logits,
            self._room(len(x)),
        )
        return x[None], torch.from_numpy(logits)[None], cache

    def _room(self, rows: int) -> tuple[np.ndarray, ...]:
        """What the threads of a pass share. Rounded rows end in zeros, where weights have been rounded up."""
        qkv, out, gate, down = self.values
        return (
            np.empty((rows, len(self.norm)), np.float32),
            kernels.steps(rows, qkv.shape[2]),
            kernels.steps(rows, out.shape[2]),
            np.empty(rows, np.float32),
            np.empty((rows, qkv.shape[1]), np.float32),
            np.empty((rows, self.shape[0] * self.shape[2]), np.float32),
            np.empty((rows, gate.shape[1]), np.float32),
            np.empty((rows, gate.shape[1] // 2), np.float32),
            kernels.steps(rows, down.shape[2]),
        )


def array(x: Tensor) -> np.ndarray:
    """The same numbers as a NumPy array, where they are."""
    return x.detach().float().contiguous().numpy()


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, start: int | None = None) -> Tensor:
    """Attention of `[1, heads, rows, d]` over `[1, kv_heads, n, d]` → `[rows, heads, d]`, the same for a row whatever
    stands beside it: rows become the batch (over one copy of keys and values), grouped heads the kernel's rows.

    With the position `start` of the first row known, a row reads no further than the step of `READ` that holds it.
    How far depends on its own position alone, so the sum does too.
    """
    heads, rows = q.shape[1], q.shape[2]
    if rows > MOST_ROWS or mask is None:
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None and rows > 1, scale=scaling, enable_gqa=heads != k.shape[1]
        )
        return out[0].transpose(0, 1)
    group = heads // k.shape[1]
    q = q[0].transpose(0, 1).reshape(rows, k.shape[1], group, -1)
    if spare := -group % 4:
        q = F.pad(q, (0, 0, 0, spare))  # the kernel takes longer over 3 rows than over 4
    mask = mask[0].transpose(0, 1)[:, None]
    if start is None:
        parts = [(slice(0, rows), k.shape[2])]
    else:
        cuts = [0, *range(READ - start % READ, rows, READ), rows]
        parts = [(slice(a, b), -(-(start + b) // READ) * READ) for a, b in pairwise(cuts)]
    # On one thread: the kernel's work buffers are aligned differently from thread to thread, MKL's sums depend on the
    # alignment, and which thread gets a row depends on how many there are.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        outs = [
            F.scaled_dot_product_attention(
                q[part],
                k[:, :, :end].expand(part.stop - part.start, -1, -1, -1),
                v[:, :, :end].expand(part.stop - part.start, -1, -1, -1),
                attn_mask=mask[part, ..., :end],
                scale=scaling,
            )
            for part, end in parts
        ]
    finally:
        torch.set_num_threads(threads)
    mixed = outs[0] if len(outs) == 1 else torch.cat(outs)
    return mixed[:, :, :group].reshape(rows, heads, -1)


def _rowwise_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    scaling = kwargs.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _attend(query, key, value, attention_mask, scaling)[None], None


def _additive_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """As the mask for sdpa, but additive, so that it is not converted anew in every layer."""
    mask = sdpa_mask(*args, **kwargs)
    return None if mask is None else torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)


AttentionInterface.register(ROWWISE, _rowwise_attention)
AttentionMaskInterface.register(ROWWISE, _additive_mask)
