"""Attention that reads grouped keys and values in place, and the choice of an implementation by measurement.

In: a model of transformers. Out: the name of its attention, as transformers knows it. With grouped-query attention G
query heads share the keys and values of one head. For a pass over several tokens with a mask, transformers' `sdpa`
copies keys and values once for every query head, in every layer and every round. `GROUPED` makes the queries of a group
rows of one head instead, `[rows, kv_heads, G · k, d]`, which computes the same sums and copies nothing of the cache.
`enable_gqa` of PyTorch would not do: with a mask its fast CUDA kernels refuse it, and what is left copies too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .clock import finish
from .errors import is_out_of_memory
from .masks import GROUPED, Masks

if TYPE_CHECKING:
    from .target import Target

CANDIDATES = ("sdpa", GROUPED, "eager")  # the first is what transformers chooses; others replace it where they win
LENGTHS = (0, 4)  # drafted tokens of the passes that are timed: a plain step and a common draft
POSITIONS = 4096  # in the cache while they are timed, where attention is a noticeable part of a pass
REPEATS = 5
BETTER = 0.98  # share of the time of `sdpa` that another takes at most to be chosen
SAME = 0.05  # largest difference of logits, relative to their spread, in 16 bits; a wrong mask makes more


def grouped(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of queries `[rows, heads, k, d]` over keys and values `[rows, kv_heads, width, d]`, as transformers
    calls it; returns `[rows, k, heads, d]`.

    The mask is what `Masks` makes of a round's pass, the mask of k tokens G times, `[rows, 1, G · k, width]`, or of one
    token `[rows, 1, 1, width]`. For a prompt, of which masks would be G times as large, and with what only
    transformers' own function knows, that function is called.
    """
    rows, heads, count, size = query.shape
    shared = heads // key.shape[1]
    known = all(kwargs.get(name) is None for name in ("softcap", "position_bias"))
    packs = attention_mask is not None and attention_mask.shape[1:3] == (1, 1 if count == 1 else shared * count)
    if shared == 1 or not (known and packs):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    packed = query.reshape(rows, -1, shared * count, size)  # row g · k + i is token i of the g-th head of a group
    out = torch.nn.functional.scaled_dot_product_attention(
        packed, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
    )
    return out.reshape(rows, heads, count, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(GROUPED, grouped)
AttentionMaskInterface.register(GROUPED, sdpa_mask)


def use(model: PreTrainedModel, name: str, targets: Sequence[Target] = ()) -> None:
    """Makes `name` the attention of a model, and of the masks of the `Target`s that hold it."""
    model.set_attn_implementation(name)
    for target in targets:
        if target.masks is not None:
            target.masks = Masks.of(target.model, target.kinds)


def choose(
    target: Target, candidates: Sequence[str] = CANDIDATES, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Times passes of `target` with each candidate and keeps the fastest; ties stay with the first.

    A candidate is left out where it fails, or where its logits are not those of the first. Does nothing where
    transformers makes the masks, which would cost more than attention saves.

    Returns:
        seconds by candidate: the sum over `LENGTHS` of the median of `REPEATS` passes.
    """
    if target.masks is None:
        return {}
    room = max(min(POSITIONS, target.context) - max(LENGTHS) - 1, 1)
    cache = target.new_cache(room + max(LENGTHS) + 1)
    tokens = torch.arange(max(LENGTHS) + 1, device=target.device) % target.vocabulary
    target.prefill(tokens, cache)  # allocates the buffers
    taken: dict[str, float] = {}
    expected: Tensor | None = None
    try:
        for name in candidates:
            try:
                use(target.model, name, [target])
                found, seconds = _timed(target, cache, tokens, room, clock)
            except Exception as error:
                if is_out_of_memory(error) or name == candidates[0]:
                    raise
                continue
            expected = found if expected is None else expected
            if _close(expected, found):
                taken[name] = seconds
    finally:
        cache.free()
    first = candidates[0]
    best = min(taken, key=lambda name: taken[name] / (1.0 if name == first else BETTER))
    use(target.model, best, [target])
    return taken


def _timed(target: Target, cache: Any, tokens: Tensor, room: int, clock: Callable[[], float]) -> tuple[Tensor, float]:
    """Logits of the longest pass, and seconds of a pass of each of `LENGTHS`."""
    total, logits = 0.0, tokens
    for length in LENGTHS:
        samples = []
        for _ in range(REPEATS + 1):  # the first warms up
            cache.reset()
            cache.advance(room)  # what the keys hold does not matter to the time
            finish(target.device)
            begun = clock()
            logits = target.verify(tokens[: length + 1], cache).logits
            finish(target.device)
            samples.append(clock() - begun)
        total += median(samples[1:])
    return logits, total


def _close(expected: Tensor, found: Tensor) -> bool:
    expected, found = expected.float(), found.float()
    spread = (expected - expected.mean(-1, keepdim=True)).norm(dim=-1)
    return bool(((found - expected).norm(dim=-1) / spread).median() <= SAME)
