"""int8 on the CPU: fast, and a row's result never depends on the rows beside it.

In: a float32 transformers model. Out: the same model, in place, with 8-bit linear layers and an attention that treats
every row alike; Llama-family layers are fused as well, since at one row small operations cost as much as the weights.

Why rows must not mix: verification feeds the target γ + 1 rows where the baseline feeds it one. With float kernels the
two differ in the last bit, with per-tensor activation scales by far more, and either can turn a near-tie into another
token. Here every row has its own scale, the sums are over integers (exact in any order), and attention runs one row at
a time in a kernel call that covers them all. So both lanes emit the same tokens bit for bit, not almost always.
"""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from .cache import RollbackCache

ROWWISE = "rowwise_sdpa"
READ = 64  # positions; keys and values are read in steps of it
MOST_ROWS = 32  # a pass of more is a prefill, which both lanes make alike
# Without VNNI the kernels add pairs of products in 16 bits, which 255 × 127 × 2 would overflow and 255 × 63 × 2 does
# not. The weights give up the bit: activations, with their outliers, need it more (docs/int8_quality.py).
LEVELS = 127 if getattr(torch.cpu, "_is_vnni_supported", lambda: False)() else 63

# Quantized tensors are to leave PyTorch after 2.13, which requirements.txt stays below. Their successor
# (torch.ops.onednn.qlinear_pointwise) takes 4 times as long without VNNI: see docs/performance.md.
warnings.filterwarnings("ignore", message=".*quantized tensor creation functions.*")


def supported() -> bool:
    """True where PyTorch has the integer kernels this needs (x86)."""
    return "fbgemm" in torch.backends.quantized.supported_engines


def quantize(model: PreTrainedModel) -> PreTrainedModel:
    """Makes `model` (float32, on the CPU) int8 in place: every linear layer, the output head included.

    Raises:
        RuntimeError: this processor has no such kernels; see `supported`.
    """
    if not supported():
        raise RuntimeError("this build of PyTorch has no int8 kernels for this processor")
    torch.backends.quantized.engine = "fbgemm"
    model.set_attn_implementation(ROWWISE)
    llama = all(type(layer) is LlamaDecoderLayer for layer in model.base_model.layers)
    if llama and model.config.hidden_act == "silu" and not model.config.attention_bias:
        layers = model.base_model.layers
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:  # packing a weight takes one thread of PyTorch's
            for i, fused in enumerate(threads.map(FusedLlamaLayer, list(layers))):
                layers[i] = fused
        model.base_model.rotary_emb = _SignedRotary(model.base_model.rotary_emb)
    quantize_linears(model)
    return model


def quantize_linears(model: nn.Module, kind: type[Int8Linear] | type[OneRowLinear] | None = None) -> None:
    """Makes the linear layers inside `model` int8 in place, `Int8Linear` unless said otherwise; leaves the rest."""
    kind = kind or Int8Linear
    torch.backends.quantized.engine = "fbgemm"
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, kind(child.weight, child.bias))


class Int8Linear(nn.Module):
    """y = x Wᵀ + b with a scale for every row of W (8 bits, 7 without VNNI) and for every row of x (8 bits)."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        weight = weight.detach().float()
        self.out_features, self.in_features = weight.shape
        scale = (weight.abs().amax(1) / LEVELS).clamp_min(1e-12).double()
        rows = torch.zeros(len(scale), dtype=torch.long)
        quantized = torch.quantize_per_channel(weight, scale, rows, 0, torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(quantized, None)
        self.bias = None if bias is None else nn.Parameter(bias.detach().float(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        size = _row_size(x)
        y = self.unit(x / size) * size
        return y if self.bias is None else y + self.bias

    def unit(self, x: Tensor) -> Tensor:
        """`[..., in]` in [−1, 1] → `[..., out]`. The scale is fixed, so no row touches another."""
        return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(x, 1 / 127, 128, self.packed)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, weight_levels=±{LEVELS}"


class OneRowLinear(nn.Module):
    """y = x Wᵀ for one row at a time: weights in 8 bits with a scale for every row of W, x in bfloat16.

    At one row as fast as `Int8Linear` and nearer to float32; from two rows on slower, so it is for drafters.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        assert bias is None, "an assistant's layers have none"
        weight = weight.detach().float()
        scale = (weight.abs().amax(1) / 127).clamp_min(1e-12).bfloat16()
        quantized = (weight / scale.float()[:, None]).round().clamp(-128, 127).to(torch.int8)
        self.weight = nn.Parameter(quantized, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch._weight_int8pack_mm(x.bfloat16().view(-1, x.shape[-1]), self.weight, self.scale)
        return y.float().view(*x.shape[:-1], -1)


class FusedLlamaLayer(nn.Module):
    """A `LlamaDecoderLayer` in half as many operations: joined projections, norm and quantization in one go.

    Called by `LlamaModel` as the layer it replaces, cache interface included.
    """

    def __init__(self, layer: LlamaDecoderLayer) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.attention = attention  # for its numbers alone
        self.heads = attention.config.num_attention_heads
        self.kv_heads = attention.config.num_key_value_heads
        self.head_dim = attention.head_dim
        self.eps = layer.input_layernorm.variance_epsilon
        self.norm1, self.norm2 = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        self.qkv = Int8Linear(torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]))
        self.out = Int8Linear(attention.o_proj.weight)
        self.gate_up = Int8Linear(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
        self.down = Int8Linear(mlp.down_proj.weight)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            delattr(attention, name)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        assert position_embeddings is not None
        x = hidden_states[0]  # [rows, width]
        rows, rotating = x.shape[0], self.heads + self.kv_heads
        qkv = self._norm_linear(x, self.norm1, self.qkv).view(rows, rotating + self.kv_heads, self.head_dim)
        cos, sin = position_embeddings
        qk, v = qkv[:, :rotating], qkv[:, rotating:]
        qk = torch.addcmul(qk * cos, qk.roll(self.head_dim // 2, -1), sin)
        k, v = qk[:, self.heads :].transpose(0, 1)[None], v.transpose(0, 1)[None]
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.attention.layer_idx)
        start = past_key_values.length if isinstance(past_key_values, RollbackCache) else None
        q = qk[:, : self.heads].transpose(0, 1)[None]
        mixed = _attend(q, k, v, attention_mask, self.attention.scaling, start).reshape(rows, -1)
        size = _row_size(mixed)
        x = torch.addcmul(x, self.out.unit(mixed / size), size)
        gate, up = self._norm_linear(x, self.norm2, self.gate_up).chunk(2, -1)
        inner = F.silu(gate) * up
        size = _row_size(inner)
        return torch.addcmul(x, self.down.unit(inner / size), size)[None]

    def _norm_linear(self, x: Tensor, weight: Tensor, linear: Int8Linear) -> Tensor:
        """RMS norm and projection: the norm's factor joins the row's scale, since quantization divides it out."""
        weighted = x * weight
        size = _row_size(weighted)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        factor = size * torch.rsqrt(length.square() / x.shape[-1] + self.eps)
        return linear.unit(weighted / size) * factor


class _SignedRotary(nn.Module):
    """cos and sin `[rows, 1, head_dim]`, the first half of sin negated, so that rotating takes one swap of halves."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.rotary(x, position_ids=position_ids)
        cos, sin = cos[0][:, None], sin[0][:, None].clone()
        sin[..., : sin.shape[-1] // 2].neg_()
        return cos, sin


def _row_size(x: Tensor) -> Tensor:
    """Largest magnitude of each row, `[..., 1]`, never 0."""
    return x.abs().amax(-1, keepdim=True).clamp_min(1e-12)


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
