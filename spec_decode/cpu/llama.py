"""int8 on the CPU: fast, and a row's result never depends on the rows beside it.

In: a float32 transformers model. Out: the same model, in place, with 8-bit linear layers and an attention that treats
every row alike. The base of a Llama-family model becomes one call of `kernels`: for one row, starting small operations
costs as much as reading the weights.

Why rows must be independent: verification feeds the target γ + 1 rows where the baseline feeds it one. With float
kernels the two differ in the last bit, with per-tensor activation scales by far more, and either can turn a near-tie
into another token. Here every row has its own scale, the sums are over integers (exact in any order), and attention
runs one row at a time. So both lanes emit the same tokens, always.
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

from ..cache import ARGUMENT, RollbackCache, bucket
from . import kernels
from .kernels.arguments import LlamaCache, LlamaPass, LlamaScratch, LlamaShape, LlamaWeights, Matrix, Rope

ROWWISE = "rowwise_sdpa"
READ = 64  # keys and values are read up to a multiple of this many positions
MAX_ROWS = 32  # a pass over more rows is a prefill, which is the same in both lanes


def quantize(model: PreTrainedModel) -> PreTrainedModel:
    """Makes `model` (float32, on the CPU) int8 in place, every linear layer and the output head; returns it."""
    base, config = model.base_model, model.config
    if (
        type(base) is LlamaModel
        and config.hidden_act == "silu"
        and not (config.attention_bias or config.mlp_bias)
        and getattr(model.get_output_embeddings(), "bias", None) is None
        and base.layers[0].self_attn.head_dim % 8 == 0
        and base.rotary_emb.rope_type in ("default", "linear", "llama3", "yarn")  # independent of the length
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
    """The model's forward in fewer Python calls: logits `[sequences, logits_to_keep, V]`, of all tokens for 0."""
    hidden, logits, cache = decoder.run(input_ids, kwargs.get(ARGUMENT), head, logits_to_keep or input_ids.shape[1])
    states = (hidden,) if output_hidden_states else None
    return CausalLMOutputWithPast(logits=logits, hidden_states=states, **{ARGUMENT: cache})


def quantize_linears(model: nn.Module) -> None:
    """Makes the linear layers inside `model` int8 in place and leaves all other modules."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, Int8Linear(child.weight, child.bias))


class Int8Linear(nn.Module):
    """y = x Wᵀ + b with 8-bit weights, a scale for every row of W, and 14-bit activations, a scale for every row of
    x."""

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

    def __init__(self, model: LlamaModel) -> None:
        super().__init__()
        config = self.config = model.config
        self.embed_tokens = model.embed_tokens
        self.frequencies, self.rope_scaling = array(model.rotary_emb.inv_freq), model.rotary_emb.attention_scaling
        self.rope = kernels.rope_table(self.frequencies, 0)  # of the first positions
        attention = model.layers[0].self_attn
        self.shape = LlamaShape(
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_size=attention.head_dim,
            epsilon=np.float32(model.norm.variance_epsilon),
            attention_scaling=np.float32(attention.scaling),
        )
        layers = [dict(layer.named_parameters()) for layer in model.layers]

        def norms(name: str) -> np.ndarray:
            return np.stack([array(layer[f"{name}.weight"]) for layer in layers])

        def matrices(*names: str) -> Matrix:
            joined = [torch.cat([layer[f"{name}.weight"] for name in names]) for layer in layers]
            return kernels.Weights([array(matrix) for matrix in joined]).stack

        self.weights = LlamaWeights(
            attention_norm=norms("input_layernorm"),
            qkv=matrices("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            attention_out=matrices("self_attn.o_proj"),
            mlp_norm=norms("post_attention_layernorm"),
            gate_up=matrices("mlp.gate_proj", "mlp.up_proj"),
            down=matrices("mlp.down_proj"),
            final_norm=array(model.norm.weight),
        )
        self.no_head = kernels.Weights([np.empty((0, config.hidden_size), np.float32)]).single

    def forward(self, input_ids: Tensor, **kwargs: Any) -> BaseModelOutputWithPast:
        hidden, _, cache = self.run(input_ids, kwargs.get(ARGUMENT))
        return BaseModelOutputWithPast(last_hidden_state=hidden, **{ARGUMENT: cache})

    def run(
        self, input_ids: Tensor, cache: RollbackCache | None, head: Int8Linear | None = None, keep: int = 0
    ) -> tuple[Tensor, Tensor, RollbackCache]:
        """A pass over tokens that follow those in the cache.

        Args:
            input_ids: int64 `[sequences, count]`.
            cache: a new one for one sequence if None.
            head: the output head, if logits are wanted.
            keep: tokens of each sequence whose logits are wanted, the last ones.

        Returns:
            Hidden states after the last norm `[sequences, count, width]`, logits `[sequences, keep, V]`, and the cache.

        Raises:
            ValueError: the cache has no room for the tokens.
        """
        sequences, count = input_ids.shape
        cache = cache or RollbackCache(self.config, count)
        x = self.embed_tokens(input_ids).flatten(0, 1)
        end = cache.length + count
        if end > cache.capacity:  # the kernel would write beyond its buffers
            raise ValueError(f"the cache has room for {cache.capacity} positions, and the pass ends at {end}")
        if len(self.rope.cos) < end:
            self.rope = kernels.rope_table(self.frequencies, bucket(end), self.rope_scaling)
        keys, values = cache.buffers(self.shape.kv_heads, self.shape.head_size, x)
        at: slice | np.ndarray = slice(cache.length, end)
        positions, wanted = np.arange(cache.length, end), keep
        if sequences > 1:  # the last tokens of several do not stand together, so logits are of all
            positions, wanted = cache.positions(count).flatten().numpy(), count
            at = positions
        rows = LlamaPass(
            hidden=array(x),
            sequences=np.repeat(np.arange(sequences), count),
            positions=positions,
            end=end,
            rope=Rope(self.rope.cos[at], self.rope.sin[at]),
            head=self.no_head if head is None else head.weights.single,
            logits=np.empty((sequences * wanted, head.out_features if head else 0), np.float32),
        )
        buffers = LlamaCache(
            keys=np.array([layer.data_ptr() for layer in keys]),
            values=np.array([layer.data_ptr() for layer in values]),
            sequences=sequences,
            capacity=cache.capacity,
        )
        kernels.llama(self.weights, self.shape, buffers, rows, self._scratch(len(x), len(rows.logits)))
        logits = torch.from_numpy(rows.logits).view(sequences, wanted, rows.logits.shape[1])
        return x.view(sequences, count, -1), logits[:, wanted - keep :], cache

    def _scratch(self, rows: int, keep: int) -> LlamaScratch:
        """Room for a pass. Quantized rows end in zeros, where the weights are padded."""
        weights, shape = self.weights, self.shape

        def room(columns: int) -> np.ndarray:
            return np.empty((rows, columns), np.float32)

        return LlamaScratch(
            normed=kernels.quantized(rows, weights.qkv.values.shape[2]),
            query=room(shape.heads * shape.head_size),
            attended=room(shape.heads * shape.head_size),
            quantized_attended=kernels.quantized(rows, weights.attention_out.values.shape[2]),
            gated=room(weights.gate_up.values.shape[1] // 2),
            quantized_gated=kernels.quantized(rows, weights.down.values.shape[2]),
            last=kernels.quantized(keep, weights.qkv.values.shape[2]),
        )


def array(x: Tensor) -> np.ndarray:
    """A float32 NumPy array; of contiguous float32 it shares the memory."""
    return x.detach().float().contiguous().numpy()


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, start: int | None = None) -> Tensor:
    """Attention of `[1, heads, rows, d]` over `[1, kv_heads, n, d]` → `[rows, heads, d]`. A row's result does not
    depend on the rows beside it: rows become the batch (over one copy of keys and values), grouped heads the rows of
    PyTorch's kernel.

    With the position `start` of the first row, a row reads up to the multiple of `READ` after its position. How far
    depends on its own position alone, so the sum does too.
    """
    heads, rows = q.shape[1], q.shape[2]
    if rows > MAX_ROWS or mask is None:
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None and rows > 1, scale=scaling, enable_gqa=heads != k.shape[1]
        )
        return out[0].transpose(0, 1)
    group = heads // k.shape[1]
    q = q[0].transpose(0, 1).reshape(rows, k.shape[1], group, -1)
    if spare := -group % 4:
        q = F.pad(q, (0, 0, 0, spare))  # 3 rows take longer than 4
    mask = mask[0].transpose(0, 1)[:, None]
    if start is None:
        parts = [(slice(0, rows), k.shape[2])]
    else:
        cuts = [0, *range(READ - start % READ, rows, READ), rows]
        parts = [(slice(a, b), -(-(start + b) // READ) * READ) for a, b in pairwise(cuts)]
    # On one thread: buffers of PyTorch's kernel are aligned differently in every thread, MKL's sums depend on the
    # alignment, and which thread gets a row depends on how many threads there are.
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
    if len(query) == 1:
        return _attend(query, key, value, attention_mask, scaling)[None], None
    masks = [None] * len(query) if attention_mask is None else attention_mask.expand(len(query), -1, -1, -1).split(1)
    parts = zip(query.split(1), key.split(1), value.split(1), masks, strict=True)  # one sequence after another
    return torch.stack([_attend(q, k, v, mask, scaling) for q, k, v, mask in parts]), None


def _additive_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask for sdpa, but additive, so that it is not converted again in every layer."""
    mask = sdpa_mask(*args, **kwargs)
    return None if mask is None else torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)


AttentionInterface.register(ROWWISE, _rowwise_attention)
AttentionMaskInterface.register(ROWWISE, _additive_mask)
