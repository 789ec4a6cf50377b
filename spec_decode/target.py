"""Target: the model that decides, one pass at a time.

In: token ids and a cache. Out: logits for every position of the pass, and the last hidden state where a drafter asks
for it. Talks to transformers only through a model's public forward and cache interface, so any decoder-only model will
do. Knows nothing of drafts or of rules; a draft model is a Target too.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .cache import ARGUMENT, BUCKET, RollbackCache, layer_kinds
from .clock import finish

# Tokens of a prompt that are read at a time: one of these, all of them multiples of `kernels.products.MOST`.
CHUNKS = (6, 24, 96, 384, 1536)
AIM = 0.8  # seconds that a chunk may take
FAR = 4096
ANYWHERE = 1 << 30


@dataclass(frozen=True)
class Pass:
    """logits `[k, V]` at the pass's last k positions; hidden `[k, H]` there, after the final norm, or None; the cache
    that the pass wrote to, whose keys and values an MTP drafter reads."""

    logits: Tensor
    hidden: Tensor | None
    cache: RollbackCache

    @torch.inference_mode()
    def copy(self) -> Pass:
        """The same in buffers of its own. Stays on the device."""
        return Pass(self.logits.clone(), None if self.hidden is None else self.hidden.clone(), self.cache.copy())


class Target:
    """A causal language model behind two calls, `prefill` and `verify`.

    Attributes:
        context: positions the model was made for.
        vocabulary: width V of its logits.
        kinds: `full_attention` or `sliding_attention` for every layer.
        eos: ids that end a text, from the generation config.
        chunks: (size, position) pairs, the largest size first: `read` gives that many tokens of a prompt to one pass
            where no more than `position` tokens stand before them; see `choose_chunks`.

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

    def new_cache(self, capacity: int) -> RollbackCache:
        """A cache for one sequence of up to `capacity` positions."""
        return RollbackCache(self.model.config, capacity)

    def prefill(self, tokens: Tensor, cache: RollbackCache, hidden: bool = False) -> Pass:
        """Reads the prompt, int64 `[n]`, into an empty cache; the pass holds its last position alone (k = 1)."""
        return self._forward(tokens, cache, hidden, keep=1)

    def read(self, tokens: Tensor, cache: RollbackCache, hidden: bool = False) -> Iterator[Pass]:
        """`prefill`, a chunk at a time: yields a pass for each, k = 1, when the device is done with it, so that a
        prompt can be left half read. The last one is what `prefill` gives, and alone has hidden states.

        With kernels that treat every row alike (`cpu.Int8Llama`) it is the same to the bit however the prompt is cut.
        Other models add up in another order when a pass has another width, so that the last bits, and now and then a
        token, may differ between two choices of `chunks`. A race has one and reads its prompt once, so its lanes never
        differ for that reason."""
        count, start = tokens.shape[0], 0
        while start < count:
            end = start + self._chunk(cache.length)
            passed = self._forward(tokens[start:end], cache, hidden and end >= count, keep=1)
            finish(passed.logits.device)
            start = end
            yield passed

    def _chunk(self, position: int) -> int:
        """Tokens to read at a time where `position` stand before them; the smallest size where none was fast enough."""
        return next((size for size, furthest in self.chunks if position <= furthest), self.chunks[-1][0])

    def verify(self, tokens: Tensor, cache: RollbackCache, hidden: bool = False) -> Pass:
        """One pass over int64 `[k]` tokens after what the cache holds; row i gives the distribution after token i."""
        return self._forward(tokens, cache, hidden, keep=tokens.shape[0])

    @torch.inference_mode()
    def _forward(self, tokens: Tensor, cache: RollbackCache, hidden: bool, keep: int) -> Pass:
        start = cache.length
        position = torch.arange(start, start + tokens.shape[0], device=self.device)[None]
        out = self.model(
            input_ids=tokens[None],
            position_ids=position,
            use_cache=True,
            logits_to_keep=keep,
            output_hidden_states=hidden,
            **{ARGUMENT: cache},
        )
        cache.advance(tokens.shape[0])
        return Pass(out.logits[0], out.hidden_states[-1][0, -keep:] if hidden else None, cache)


def choose_chunks(target: Target) -> tuple[tuple[int, int], ...]:
    """Chooses the sizes of the chunks in which `target` reads prompts, sets and returns `target.chunks`: anywhere the
    largest of `CHUNKS` that is expected to take no longer than `AIM`.

    What attention takes grows with the positions before it, so the seconds of a chunk are a line in that number: each
    size is timed at the start of a text and after `FAR` positions (or as many as the context has). A size that the two
    before it let expect to take too long is not timed, and nor are those beyond it.

    Few sizes that lie far apart, and positions in whole buckets, so that one machine rarely chooses differently from
    load to load: for most models a seed stands for one text only while the choice stays the same (see `Target.read`).
    """
    room = min(target.context, FAR)
    cache = target.new_cache(room)
    tokens = torch.arange(min(CHUNKS[-1], room), device=target.device) % target.vocabulary

    def seconds(size: int, position: int) -> float:
        cache.reset()
        cache.advance(position)  # zeros are as good as any keys and values
        begun = time.perf_counter()
        finish(target.prefill(tokens[:size], cache).logits.device)
        return time.perf_counter() - begun

    seconds(1, 0)  # buffers are made, kernels compiled
    known = [(1, seconds(1, 0), seconds(1, room - 1))]  # size, seconds at the start, seconds at the end
    chosen: list[tuple[int, int]] = []
    for size in CHUNKS:
        near, far = (_expected([(known_size, both[at]) for known_size, *both in known], size) for at in (0, 1))
        if size > room or near > AIM:
            break
        near = seconds(size, 0)
        if far <= 2 * AIM:  # else what is expected tells well enough where it begins to be too slow
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
    """Seconds that `size` rows will take: on the line through the last two measurements, or as long as the only one."""
    last, took = known[-1]
    if len(known) == 1:
        return took
    before, less = known[-2]
    return took + (size - last) * max(took - less, 0.0) / (last - before)
