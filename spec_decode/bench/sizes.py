"""Sizes of the models of a pair: parameters, bytes as they are held, and bytes that one target pass reads.

In: a loaded pair. Out: a `ModelSize` for the target, and for the drafter where it has weights. What both share (the
target's embeddings, its head) counts as the target's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ..cpu.kernels import Weights
from ..loading import memory
from .measurement import ModelSize

if TYPE_CHECKING:
    from ..loading.pair import Pair

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def sizes(pair: Pair) -> tuple[ModelSize, ModelSize | None]:
    """The sizes of the target and of the drafter in use; None for a drafter without weights."""
    target, config = pair.target.model, pair.target.config
    held = _held(target)
    total = sum(held.values())
    head = target.get_output_embeddings()
    tied = set(_held(head)) if head is not None else set()
    embeddings = {at: size for at, size in _held(target.get_input_embeddings()).items() if at not in tied}
    mixture = any((getattr(config, name, None) or 1) > 1 for name in _EXPERTS)
    read = None if mixture else total - sum(embeddings.values())
    size = ModelSize(_parameters(target.config), total, read)
    model = pair.drafter_model
    if model is None:
        return size, None
    fused = getattr(pair.drafter, "fused", None) or getattr(getattr(pair.drafter, "other", None), "fused", None)
    own = _held(fused if fused is not None else model)
    return size, ModelSize(_parameters(model.config), sum(n for at, n in own.items() if at not in held))


def _parameters(config: Any) -> int:
    """Of a model without storage: one that is quantized has fewer tensors of its own. A head that is the target's does
    not count."""
    shared = "lm_head." if getattr(config, "shares_target_head", False) else "\0"
    return sum(w.numel() for name, w in memory.empty(config).named_parameters() if not name.startswith(shared))


def _held(part: Any) -> dict[int, int]:
    """Bytes of the weights that a model, or a model in our kernels, holds, by their place in memory."""
    return {at: size for at, size in map(_place, _weights(part)) if size}


def _weights(part: Any) -> Iterator[torch.Tensor | np.ndarray]:
    if isinstance(part, nn.Module):
        for module in part.modules():
            yield from module.parameters(recurse=False)
            yield from _arrays(getattr(module, "weights", None))
    else:
        yield from _arrays(getattr(part, "weights", None))


def _arrays(value: Any) -> Iterator[np.ndarray]:
    """Every array in named tuples and in matrices of our kernels."""
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, Weights):
        yield from (value.values, value.scales)
    elif isinstance(value, tuple):
        for part in value:
            yield from _arrays(part)


def _place(weight: torch.Tensor | np.ndarray) -> tuple[int, int]:
    if isinstance(weight, torch.Tensor):
        return weight.data_ptr(), weight.numel() * weight.element_size()
    return weight.ctypes.data, weight.nbytes
