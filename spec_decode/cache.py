"""A KV cache of fixed buffers with rollback in O(1).

In: keys and values from a transformers model, through its public cache interface. Out: the same, up to a length
bucket. Every buffer is allocated once. Sliding-window layers keep the full length too and apply the window in the mask,
since a ring buffer overwrites what a rollback needs. A rollback moves the cursor and copies nothing.

Reading up to a bucket (512, 1024, 1536, …) and not to the exact length keeps shapes the same from round to round, as a
CUDA graph requires, and attention at a position sums over the same keys in every pass.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

BUCKET = 512
# Name of the cache argument of a model's forward; transformers 5.24 renamed it in every model.
ARGUMENT = "cache" if "cache" in signature(LlamaForCausalLM.forward).parameters else "past_key_values"


def bucket(length: int) -> int:
    """The smallest multiple of `BUCKET` that holds `length` positions."""
    return -(-length // BUCKET) * BUCKET


def layer_kinds(config: PreTrainedConfig) -> list[str]:
    """`full_attention` or `sliding_attention` for every layer.

    Raises:
        ValueError: the model has layers whose state cannot roll back (recurrent, chunked attention).
    """
    config = config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        sliding = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
        kinds = ["sliding_attention" if sliding else "full_attention"] * config.num_hidden_layers
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ValueError(f"{config.model_type} has {', '.join(sorted(unknown))} layers, whose state cannot roll back")
    return list(kinds)


class RollbackLayer(CacheLayerMixin):
    """Keys and values of one layer, `[1, heads, capacity, head_dim]` each, allocated at the first update."""

    is_compileable = True  # transformers then builds masks that cover the whole bucket
    is_croppable = True

    def __init__(self, cache: RollbackCache, is_sliding: bool) -> None:
        super().__init__()
        self.cache = cache
        self.is_sliding = is_sliding

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        def buffer(states: Tensor) -> Tensor:
            # Zeros: masked positions are multiplied by 0, and 0 × NaN is NaN.
            return states.new_zeros(*states.shape[:2], self.cache.capacity, states.shape[3])

        self.keys, self.values = buffer(key_states), buffer(value_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes k new positions at the cursor and returns keys and values up to the bucket."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        start, end = self.cache.length, self.cache.length + key_states.shape[2]
        self.keys[:, :, start:end] = key_states
        self.values[:, :, start:end] = value_states
        return self.keys[:, :, : bucket(end)], self.values[:, :, : bucket(end)]

    def get_seq_length(self) -> int:
        return self.cache.length

    def get_max_length(self) -> int:
        return self.cache.capacity

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return bucket(self.cache.length + query_length), 0

    def crop(self, tokens_to_remove: int) -> None:
        """Called by transformers in assisted generation for every layer: drops the last −`tokens_to_remove` positions
        once."""
        if self.cache.layers[0] is self:
            self.cache.rollback(self.cache.length + tokens_to_remove)


class RollbackCache(Cache):
    """All layers of one sequence, with one shared cursor.

    Args:
        config: of the model.
        capacity: number of positions, rounded up to a whole bucket.
    """

    def __init__(self, config: PreTrainedConfig, capacity: int) -> None:
        self.capacity = bucket(capacity)
        self.length = 0
        kinds = layer_kinds(config)
        super().__init__(layers=[RollbackLayer(self, kind == "sliding_attention") for kind in kinds])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return self.layers[layer_idx].update(key_states, value_states)

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer up to the bucket that holds the cursor, in place."""
        keys, values = self.layers[layer].keys, self.layers[layer].values
        assert keys is not None and values is not None
        end = bucket(self.length)
        return keys[:, :, :end], values[:, :, :end]

    def buffers(self, heads: int, size: int, like: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The whole buffers of keys and values of every layer, `[1, heads, capacity, size]` each, for a caller that
        writes to them directly."""
        for layer in self.layers:
            if not layer.is_initialized:
                none = like.new_empty(1, heads, 0, size)
                layer.lazy_initialization(none, none)
        return [layer.keys for layer in self.layers], [layer.values for layer in self.layers]

    def advance(self, tokens: int) -> None:
        """Moves the cursor past the positions that a pass has written."""
        self.length += tokens

    def rollback(self, length: int) -> None:
        """Drops everything from position `length` on.

        Raises:
            ValueError: `length` is beyond what was written.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot roll back to {length}: the cache holds {self.length} positions")
        self.length = length

    def copy(self) -> RollbackCache:
        """A cache with the same capacity and content in new buffers on the same devices. Only written positions are
        copied; the others are zero."""
        twin: RollbackCache = object.__new__(RollbackCache)
        twin.capacity, twin.length = self.capacity, self.length
        Cache.__init__(twin, layers=[RollbackLayer(twin, layer.is_sliding) for layer in self.layers])
        for ours, theirs in zip(self.layers, twin.layers, strict=True):
            if ours.is_initialized:
                theirs.lazy_initialization(ours.keys, ours.values)
                theirs.keys[:, :, : self.length] = ours.keys[:, :, : self.length]
                theirs.values[:, :, : self.length] = ours.values[:, :, : self.length]
        return twin

    def reset(self) -> None:
        """Drops all positions and keeps the buffers."""
        self.length = 0

    def free(self) -> None:
        """Frees the buffers."""
        self.reset()
        for layer in self.layers:
            layer.keys = layer.values = None
            layer.is_initialized = False
