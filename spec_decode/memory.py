"""How much memory a pair takes, told before it is loaded.

In: configurations. Out: bytes of weights, caches and workspace, and what is free. Weights are counted on a model that
is built without storage, so they are exact for every architecture and precision; caches too, for as many positions as
are asked for; workspace is a rule of thumb. Loads nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from .cache import bucket
from .settings import MAX_DRAFT_LENGTH

ROOM = 4096  # positions a lane is given room for
LANES = 2
GB = 1e9


@dataclass(frozen=True)
class Need:
    """Bytes of weights, of the caches of both lanes at `ROOM` positions, and of workspace."""

    weights: int
    cache: int = 0
    workspace: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.workspace


def empty(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a configuration, without storage."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def need(model: PreTrainedModel, dtype: torch.dtype, precision: str | None = None, caches: bool = True) -> Need:
    """What `model` takes in `dtype`, its linear layers in `precision` (int8, nf4) if one is named.

    Args:
        model: from `empty`.
        caches: it has keys and values of its own; an MTP drafter reads its target's.
    """
    kept = weights(model, dtype, precision)
    if not caches:
        return Need(kept)
    return Need(kept, LANES * bucket(ROOM) * cache_per_token(model, dtype), _workspace(model, dtype))


def weights(model: PreTrainedModel, dtype: torch.dtype, precision: str | None = None) -> int:
    """Bytes of the weights. As transformers and bitsandbytes have it, embeddings, the head and the experts of a mixture
    keep `dtype`: only what is an `nn.Linear` shrinks."""
    total = sum(weight.numel() for weight in model.parameters()) * dtype.itemsize
    if precision is None:
        return total
    head = model.get_output_embeddings()
    for module in model.modules():
        if type(module) is nn.Linear and module is not head:
            total += _quantized(module.weight, precision) - module.weight.numel() * dtype.itemsize
    return total


def _quantized(weight: torch.Tensor, precision: str) -> int:
    if precision == "int8":
        return weight.numel() + 4 * weight.shape[0]  # a float32 scale for every row
    blocks = -(-weight.numel() // 64)
    return -(-weight.numel() // 2) + blocks + 4 * -(-blocks // 256)  # scales of blocks are quantized themselves


def cache_per_token(model: PreTrainedModel, dtype: torch.dtype) -> int:
    """Bytes of keys and values for a position."""
    config: Any = model.config.get_text_config(decoder=True)
    found = [module for module in model.modules() if hasattr(module, "layer_idx") and hasattr(module, "k_proj")]
    if found:
        return sum(2 * module.k_proj.out_features for module in found) * dtype.itemsize
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head * dtype.itemsize


def _workspace(model: PreTrainedModel, dtype: torch.dtype) -> int:
    """A prompt of `ROOM` tokens in flight: some hidden states, the widest MLP, masks of both kinds, logits and what
    sampling makes of them."""
    config: Any = model.config.get_text_config(decoder=True)
    mlp = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    passing = ROOM * (8 * config.hidden_size + 3 * mlp) * dtype.itemsize
    masks = 2 * ROOM * bucket(ROOM) * dtype.itemsize
    return passing + masks + 6 * (MAX_DRAFT_LENGTH + 1) * config.vocab_size * 4


def free(device: torch.device, spread: bool = False) -> int:
    """Bytes free on `device`; with `spread`, on all GPUs together."""
    if device.type == "cuda":
        gpus = range(torch.cuda.device_count()) if spread else [device]
        return sum(torch.cuda.mem_get_info(gpu)[0] for gpu in gpus)
    return int(psutil.virtual_memory().available)


def gigabytes(size: float) -> str:
    """1 GB is 10^9 bytes."""
    return f"{size / GB:.1f} GB"
