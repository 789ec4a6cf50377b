"""Target: a causal language model, one forward pass at a time.

In: token ids and a cache. Out: logits for every position of the pass, and the last hidden state where a drafter needs
it. Uses only the public forward and cache interface of transformers, so any decoder-only model works. Independent of
drafts and rules; a draft model is a `Target` too.

A pass follows the cache's lengths on the device: positions and masks are made from them, and nothing of the host's
enters but the number of tokens and the bucket.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .cache import ARGUMENT, BUCKET, LONGEST_ROUND, PADDED_ROUND, RollbackCache, layer_kinds
from .clock import finish
from .cpu.llama import Int8Llama
from .masks import Masks

# Possible chunk sizes of the prefill in tokens, all multiples of `kernels.products.MAX_ROWS`.
CHUNKS = (6, 24, 96, 384, 1536)
AIM = 0.8  # upper bound of the time of a chunk, in seconds
FAR = 4096  # position at which chunks are timed a second time
ANYWHERE = 1 << 30  # a position beyond every text


@dataclass(frozen=True)
class Pass:
    """The result of a forward pass. Without a row dimension in the tokens, logits and hidden have none either.

    Attributes:
        logits: `[rows, k, V]`, at the last k positions of the pass.
        hidden: `[rows, k, H]`, hidden states at these positions after the final norm, or None.
        cache: the cache that the pass wrote to; an MTP drafter reads its keys and values.
    """

    logits: Tensor
    hidden: Tensor | None
    cache: RollbackCache

    @torch.inference_mode()
    def copy(self) -> Pass:
        """A copy in new buffers on the same device."""
        return Pass(self.logits.clone(), None if self.hidden is None else self.hidden.clone(), self.cache.copy())


class Target:
    """A causal language model with two operations, `prefill` and `verify`. Tokens are int64 `[rows, n]`, or `[n]` for
    a single row.

    Attributes:
        context: the model's context length in tokens.
        vocabulary: width V of the logits.
        kinds: `full_attention` or `sliding_attention` for every layer.
        eos: ids that end a text, from the generation config.
        chunks: (size, position) pairs, the largest size first: a prefill pass reads `size` tokens where at most
            `position` tokens precede them; see `choose_chunks`.
        masks: makes the masks of passes over a cache that holds something; None where transformers makes them.
        batched_experts: whether passes over few tokens run a mixture of experts as one batch, with no shape that
            depends on which experts were chosen. On a CPU transformers' own way is faster.
        padded: passes over a draft are batch-invariant, see `verify`.

    Raises:
        ValueError: the model has layers whose state cannot roll back (recurrent, chunked attention).
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval()
        self.device = model.device
        self.config = model.config.get_text_config(decoder=True)
        self.context = int(getattr(self.config, "max_position_embeddings", None) or 8192)
        self.vocabulary = int(self.config.vocab_size)
        self.kinds = layer_kinds(model.config)
        eos = model.generation_config.eos_token_id if model.generation_config else None
        eos = self.config.eos_token_id if eos is None else eos
        self.eos = frozenset([] if eos is None else [eos] if isinstance(eos, int) else eos)
        self.chunks: tuple[tuple[int, int], ...] = ((CHUNKS[-1], ANYWHERE),)
        self.masks = Masks.of(model, self.kinds)
        self.batched_experts = self.device.type != "cpu"
        self.padded = False
        # How transformers runs a mixture of experts; None for a model without, or whose experts it cannot choose for.
        mixture = any(hasattr(module, "has_gate") for module in model.modules())
        self._experts = self.config._experts_implementation if mixture else None
        self._fused = isinstance(model.base_model, Int8Llama)  # it knows its positions and masks from the cache

    def new_cache(self, capacity: int, rows: int = 1) -> RollbackCache:
        """A cache for `rows` sequences of up to `capacity` positions."""
        if not self._pads:
            return RollbackCache(self.model.config, capacity, rows, self.device)
        cache = RollbackCache(self.model.config, capacity + PADDED_ROUND, rows, self.device)
        cache.whole = True
        return cache

    def prefill(self, tokens: Tensor, cache: RollbackCache, hidden: bool = False) -> Pass:
        """Reads the prompt into an empty cache. The pass has the last position only (k = 1)."""
        return self._forward(tokens, cache, hidden, keep=1)

    def read(self, tokens: Tensor, cache: RollbackCache, hidden: bool = False) -> Iterator[Pass]:
        """Chunked `prefill`: yields a pass (k = 1) for every chunk once the device has finished it, so that the caller
        can stop between chunks. The last pass is the result of `prefill` and the only one with hidden states.

        With kernels whose rows are independent (`cpu.Int8Llama`) the result is bitwise the same for all chunk sizes.
        Other models sum in an order that depends on the width of the pass, so the last bits, and occasionally a token,
        may differ between two values of `chunks`. A race reads its prompt once, so both lanes start from the same
        bits."""
        count, start = tokens.shape[-1], 0
        while start < count:
            end = start + self._chunk(cache.length)
            passed = self._forward(tokens[..., start:end], cache, hidden and end >= count, keep=1)
            finish(passed.logits.device)
            start = end
            yield passed

    def _chunk(self, position: int) -> int:
        """Chunk size where `position` tokens precede the chunk; the smallest size where none is fast enough."""
        return next((size for size, furthest in self.chunks if position <= furthest), self.chunks[-1][0])

    def verify(self, tokens: Tensor, cache: RollbackCache, hidden: bool = False) -> Pass:
        """One pass over k tokens after the cached ones; position i has the logits of the token after token i.

        With `padded` the pass is batch-invariant: a token has the same bits in a pass over one token and in a pass over
        a draft. Libraries choose a kernel, and with it the order of a sum, by the shape of its operands. So every pass
        gets the same shape: `PADDED_ROUND` tokens, of which those after the k are padding, and a cache that is read to
        its end. Given the shape, a product of matrices, a norm and attention with a mask compute each row from that row
        alone, in an order that depends on neither its neighbours nor its place. Padding stands after the k tokens, so
        no mask shows it to them, and the next pass writes over its keys and values. Rows must be treated alike
        wherever they stand, which a row in an incomplete tile of a kernel may not be (MKL's float32 products do the
        17th of 17 rows otherwise), hence a number that tiles divide. The libraries promise none of this: `check gpu`
        and tests/test_batch_invariant.py compare bits. Kernels of our own (`cpu.Int8Llama`) need no padding. Sums over
        the vocabulary that top-p makes after the pass are not padded.
        """
        k = tokens.shape[-1]
        if not self._pads or k > LONGEST_ROUND:
            return self._forward(tokens, cache, hidden, keep=k)
        passed = self._forward(torch.nn.functional.pad(tokens, (0, PADDED_ROUND - k)), cache, hidden, PADDED_ROUND)
        cache.retreat(PADDED_ROUND - k)
        return Pass(passed.logits[..., :k, :], None if passed.hidden is None else passed.hidden[..., :k, :], cache)

    @property
    def _pads(self) -> bool:
        return self.padded and not self._fused

    @torch.inference_mode()
    def _forward(self, tokens: Tensor, cache: RollbackCache, hidden: bool, keep: int) -> Pass:
        count = tokens.shape[-1]
        out = self.model(
            input_ids=tokens.view(-1, count),
            use_cache=True,
            logits_to_keep=keep,
            output_hidden_states=hidden,
            **{ARGUMENT: cache},
            **({} if self._fused else self._placed(cache, count)),
        )
        cache.advance(count)
        states = out.hidden_states[-1][:, -keep:] if hidden else None
        if tokens.dim() == 1:
            return Pass(out.logits[0], None if states is None else states[0], cache)
        return Pass(out.logits, states, cache)

    def _placed(self, cache: RollbackCache, count: int) -> dict[str, Any]:
        """Positions and masks of a pass over `count` tokens, as arguments of the model's forward."""
        self._choose_experts(count * len(cache.lengths))
        positions = cache.positions(count)
        if cache.length == 0 or self.masks is None:
            # From an empty cache transformers makes the masks too: none, where it is faster without.
            return {"position_ids": positions}
        return {"position_ids": positions, "attention_mask": self.masks(positions, cache.width(count))}

    def _choose_experts(self, tokens: int) -> None:
        """Before a pass over so many `tokens`. A batch copies the weights of every expert of every token: the fewest
        operations for few tokens, too much memory for a prompt."""
        if not self.batched_experts or self._experts not in ("eager", "grouped_mm"):
            return
        wanted = "batched_mm" if tokens <= (PADDED_ROUND if self._pads else LONGEST_ROUND) else self._experts
        if self.config._experts_implementation != wanted:
            self.model.set_experts_implementation(wanted)


def choose_chunks(target: Target) -> tuple[tuple[int, int], ...]:
    """Chooses the chunk sizes of the prefill; sets and returns `target.chunks`. At every position the size is the
    largest of `CHUNKS` that is expected to take no longer than `AIM`.

    The time of attention grows with the preceding positions, so the time of a chunk is modelled as linear in their
    number. Each size is timed at the start of a text and after `FAR` positions (or the context length, if shorter).
    Sizes that are expected to be too slow, extrapolated from the last two, are not timed.

    Sizes are few and far apart, and positions are whole buckets, so that a machine rarely chooses differently from
    load to load. For most models a seed gives the same text only with the same choice (see `Target.read`).
    """
    room = min(target.context, FAR)
    cache = target.new_cache(room)
    tokens = torch.arange(min(CHUNKS[-1], room), device=target.device) % target.vocabulary

    def seconds(size: int, position: int) -> float:
        cache.reset()
        cache.advance(position)  # the time does not depend on the values of keys and values
        begun = time.perf_counter()
        finish(target.prefill(tokens[:size], cache).logits.device)
        return time.perf_counter() - begun

    seconds(1, 0)  # allocates buffers, compiles kernels
    known = [(1, seconds(1, 0), seconds(1, room - 1))]  # size, seconds at the start, seconds at the end
    chosen: list[tuple[int, int]] = []
    for size in CHUNKS:
        near, far = (_expected([(known_size, both[at]) for known_size, *both in known], size) for at in (0, 1))
        if size > room or near > AIM:
            break
        near = seconds(size, 0)
        if far <= 2 * AIM:  # otherwise the extrapolated time is accurate enough
            far = seconds(size, room - size)
        known.append((size, near, far))
        if near <= AIM:
            slope = max(far - near, 0.0) / max(room - size, 1)
            furthest = ANYWHERE if near + slope * target.context <= AIM else int((AIM - near) / slope)
            chosen.append((size, furthest if furthest == ANYWHERE else furthest // BUCKET * BUCKET))
    cache.free()
    target.chunks = tuple(reversed(chosen)) or ((CHUNKS[0], ANYWHERE),)
    return target.chunks


def _expected(known: list[tuple[int, float]], size: int) -> float:
    """Expected seconds of a pass over `size` rows: linear extrapolation from the last two measurements, or the only
    measurement."""
    last, took = known[-1]
    if len(known) == 1:
        return took
    before, less = known[-2]
    return took + (size - last) * max(took - less, 0.0) / (last - before)
