"""A KV cache of fixed buffers with rollback in O(1).

In: keys and values from a transformers model, through its public cache interface. Out: the same, up to a length
bucket. Every buffer is allocated once. Sliding-window layers keep the full length too and apply the window in the mask,
since a ring buffer overwrites what a rollback needs. A rollback moves the cursor and copies nothing.

Reading up to a bucket (512, 1024, 1536, …) and not to the exact length keeps shapes the same from round to round, as a
CUDA graph requires, and attention at a position sums over the same keys in every pass.

Lengths are a tensor on the device, one for every row, since how many drafted tokens were accepted is known there first:
a pass that writes and masks at these lengths waits for nothing, and recorded once as a graph it continues every row
wherever that row stands. The host keeps one number beside them, an upper bound of all rows, which selects the bucket
alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from .settings import MAX_DRAFT_LENGTH

BUCKET = 512
LONGEST_ROUND = MAX_DRAFT_LENGTH + 1  # tokens of a round's pass
PADDED_ROUND = 32  # the same where passes are padded; whole tiles of kernels, see `Target.verify`
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
    """Keys and values of one layer, `[rows, heads, capacity, head_dim]` each, allocated at the first update."""

    is_compileable = True  # transformers then builds masks that cover the whole bucket
    is_croppable = True

    def __init__(self, cache: RollbackCache, is_sliding: bool) -> None:
        super().__init__()
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
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
        """Writes k new positions after the length of each row and returns keys and values up to the bucket."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        rows, _, count, _ = key_states.shape
        if rows == 1 and count > PADDED_ROUND:  # a prompt, of which the host knows where it ends
            start, end = self.cache.length, self.cache.length + count
            self.keys[:, :, start:end] = key_states
            self.values[:, :, start:end] = value_states
        else:
            positions = self.cache.positions(count).to(self.keys.device)
            _write(self.keys, positions, key_states)
            _write(self.values, positions, value_states)
        width = self.cache.width(count)
        return self.keys[:, :, :width], self.values[:, :, :width]

    def free(self) -> None:
        """Frees the buffers."""
        self.keys = self.values = None
        self.is_initialized = False

    def get_seq_length(self) -> int:
        return self.cache.length

    def get_max_length(self) -> int:
        return self.cache.capacity

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.width(query_length), 0

    def crop(self, tokens_to_remove: int) -> None:
        """Called by transformers in assisted generation for every layer: drops the last −`tokens_to_remove` positions
        once."""
        if self.cache.layers[0] is self:
            self.cache.rollback(self.cache.length + tokens_to_remove)


class RollbackCache(Cache):
    """All layers of some sequences, one a row, with the lengths that all layers share.

    Args:
        config: of the model.
        capacity: number of positions, rounded up to a whole bucket.
        rows: number of sequences.
        device: of `lengths`, where passes begin; the CPU if None. Keys and values are where their layer is.

    Attributes:
        lengths: int64 `[rows]`, the positions that each row holds; writes and masks follow it.
        length: upper bound of `lengths` on the host; for one row whose rounds the host has read, its length.
        whole: passes read all positions, and not up to a bucket, so that no two passes differ in how many they read.
    """

    whole = False

    def __init__(
        self, config: PreTrainedConfig, capacity: int, rows: int = 1, device: torch.device | None = None
    ) -> None:
        kinds = layer_kinds(config)
        with torch.inference_mode(False):  # `lengths` changes outside of passes too
            lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self._begin([kind == "sliding_attention" for kind in kinds], capacity, lengths, 0)

    def _begin(self, sliding: Sequence[bool], capacity: int, lengths: Tensor, length: int) -> None:
        self.capacity = bucket(capacity)
        self.lengths, self.length = lengths, length
        self._through = 0  # see `settle`
        self._next: Tensor | None = None  # see `positions`
        super().__init__(layers=[RollbackLayer(self, is_sliding) for is_sliding in sliding])

    @classmethod
    def join(cls, caches: Sequence[RollbackCache]) -> RollbackCache:
        """The rows of caches of one model in one, in new buffers on the same devices. It has the largest capacity of
        them. Only written positions are copied; the others are zero."""
        joined: RollbackCache = object.__new__(RollbackCache)
        with torch.inference_mode(False):
            lengths = torch.cat([cache.lengths for cache in caches])
        capacity, length = max(cache.capacity for cache in caches), max(cache.length for cache in caches)
        joined.whole = any(cache.whole for cache in caches)
        joined._begin([layer.is_sliding for layer in caches[0].layers], capacity, lengths, length)
        for layer, *parts in zip(joined.layers, *(cache.layers for cache in caches), strict=True):
            if not parts[0].is_initialized:
                continue  # it uses the keys and values of another layer
            layer.lazy_initialization(
                torch.cat([part.keys[:, :, :0] for part in parts]), torch.cat([part.values[:, :, :0] for part in parts])
            )
            row = 0
            for part, cache in zip(parts, caches, strict=True):
                rows = slice(row, row := row + len(part.keys))
                layer.keys[rows, :, : cache.length] = part.keys[:, :, : cache.length]
                layer.values[rows, :, : cache.length] = part.values[:, :, : cache.length]
        return joined

    def select(self, rows: Tensor, length: int) -> RollbackCache:
        """A cache with some of the rows, int64 `[kept]`, in new buffers. This one is freed, layer by layer, so that
        there is never more than one layer twice.

        Args:
            length: of the longest of them, or an upper bound.
        """
        chosen: RollbackCache = object.__new__(RollbackCache)
        with torch.inference_mode(False):
            lengths = self.lengths[rows]
        chosen._begin([layer.is_sliding for layer in self.layers], self.capacity, lengths, length)
        for layer, old in zip(chosen.layers, self.layers, strict=True):
            if old.is_initialized:  # otherwise it uses the keys and values of another layer
                at = rows.to(old.keys.device)
                layer.keys, layer.values = old.keys[at], old.values[at]
                layer.dtype, layer.device, layer.is_initialized = old.dtype, old.device, True
                old.free()
        return chosen

    def copy(self) -> RollbackCache:
        """A cache with the same capacity and content, see `join`."""
        return self.join([self])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return self.layers[layer_idx].update(key_states, value_states)

    def positions(self, count: int) -> Tensor:
        """Where the next `count` tokens of every row go, int64 `[rows, count]`; one tensor for all layers of a pass."""
        if self._next is None or self._next.shape[1] != count:
            self._next = self.lengths[:, None] + torch.arange(count, device=self.lengths.device)
        return self._next

    def width(self, count: int = 0) -> int:
        """How many positions a pass over `count` more tokens reads: the bucket that holds them, by what the host
        knows."""
        return self.capacity if self.whole else min(bucket(max(self.length + count, self._through)), self.capacity)

    def read(self, layer: int, end: int = 0) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer up to the bucket that holds `length` and `end`, in place."""
        keys, values = self.layers[layer].keys, self.layers[layer].values
        assert keys is not None and values is not None
        width = self.width(max(end - self.length, 0))
        return keys[:, :, :width], values[:, :, :width]

    def buffers(self, heads: int, size: int, like: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The whole buffers of keys and values of every layer, `[rows, heads, capacity, size]` each, for a caller that
        writes to them directly, at `lengths`."""
        for layer in self.layers:
            if not layer.is_initialized:
                none = like.new_empty(len(self.lengths), heads, 0, size)
                layer.lazy_initialization(none, none)
        return [layer.keys for layer in self.layers], [layer.values for layer in self.layers]

    def advance(self, tokens: int) -> None:
        """Counts the positions that a pass has written in every row."""
        self.length += tokens
        self.lengths += tokens
        self.forget_positions()

    def retreat(self, tokens: int) -> None:
        """Drops the last `tokens` positions that a pass has written in every row."""
        self.length -= tokens
        self.lengths -= tokens
        self.forget_positions()

    def forget_positions(self) -> None:
        """The lengths have changed: `positions` are made anew."""
        self._next = None

    def load(self, other: RollbackCache) -> None:
        """Takes the content of a cache of one row, in place. It must have room for it."""
        for ours, theirs in zip(self.layers, other.layers, strict=True):
            if not theirs.is_initialized:
                continue  # it uses the keys and values of another layer
            if not ours.is_initialized:
                ours.lazy_initialization(theirs.keys[:, :, :0], theirs.values[:, :, :0])
            ours.keys[:, :, : other.length] = theirs.keys[:, :, : other.length]
            ours.values[:, :, : other.length] = theirs.values[:, :, : other.length]
        self.keep(other.lengths)
        self.settle(other.length)

    def keep(self, lengths: Tensor) -> None:
        """Drops what stands after `lengths`, int64 `[rows]`, on the device. `settle` tells the host."""
        self.lengths.copy_(lengths)
        self._next = None

    def settle(self, length: int, through: int = 0) -> None:
        """The host's half of `keep`.

        Args:
            length: of the longest row, or an upper bound.
            through: passes read through this position at least, up to the next `settle`, so that the bucket does not
                change between the steps of a draft.
        """
        self.length, self._through = length, through

    def rollback(self, length: int) -> None:
        """Drops everything from position `length` on, in every row.

        Raises:
            ValueError: `length` is beyond what was written.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot roll back to {length}: the cache holds {self.length} positions")
        self.settle(length)
        self.lengths.fill_(length)
        self._next = None

    def reset(self) -> None:
        """Drops all positions and keeps the buffers."""
        self.rollback(0)

    def free(self) -> None:
        """Frees the buffers."""
        self.reset()
        for layer in self.layers:
            layer.free()


def _write(buffer: Tensor, positions: Tensor, states: Tensor) -> None:
    """Puts states `[rows, heads, k, d]` at positions `[rows, k]` of `[rows, heads, capacity, d]`."""
    if len(positions) == 1:
        buffer.index_copy_(2, positions[0], states)
    else:
        buffer.scatter_(2, positions[:, None, :, None].expand_as(states), states)
