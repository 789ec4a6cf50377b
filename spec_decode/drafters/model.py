"""A smaller causal model with the same tokenizer as drafter.

It keeps a cache of its own in step with the sequence: what was emitted and already read stays, what was refused is
rolled back, and only tokens it has not read are fed, so none is computed twice. On an accelerator it is fed two tokens
at the start of every draft, of which it may have read the first: which it has depends on how many were accepted, and
the operations of a round may not. After rounds that it did not draft it is fed their tokens as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from ..draft_length import EarlyStop
from ..errors import ModelError
from ..events import Reading
from ..sampling import draw
from ..settings import Settings
from ..state import State
from ..target import Target
from . import Draft, Drafter, early
from .drawn import go_on, joined

if TYPE_CHECKING:
    from ..loading.drafter import LoadContext


class ModelDrafter(Drafter):
    """Drafts γ tokens one after another with `model`, drawn as `sampling.draw` says."""

    def __init__(self, model: Target, name: str, vocabulary: int, device: torch.device | None = None) -> None:
        """`device`: of the target, where drafts go."""
        self.model = model
        self.device = device
        self.name = name
        self.vocabulary = vocabulary
        self.needs_text = model.device.type == "cpu"  # on the device a draft takes its place from the state

    def start(self, prompt: list[int], settings: Settings, capacity: int) -> Iterator[Reading]:
        self.settings = settings
        self.length = self.known = len(prompt)  # of the text, and what the cache holds of it, as the host knows
        self.ahead = False  # the latest draft was asked for before `extend` told of the round before it
        self.cache = self.model.new_cache(capacity)
        self.reading = self._read(torch.tensor(prompt, device=self.model.device))
        return self.reading

    def _read(self, prompt: torch.Tensor) -> Iterator[Reading]:
        for _ in self.model.read(prompt, self.cache):
            if self.cache.length < len(prompt):
                yield Reading(self.cache.length, len(prompt))

    def extend(self, tokens: list[int]) -> None:
        # Read so far: all of the old sequence and the draft but its last token. What was emitted agrees with the draft
        # up to the target's own token, which the drafter has not read.
        self.length += len(tokens)
        self.cache.rollback(min(self.cache.length, self.length - 1))
        if not self.ahead:
            self.known = min(self.known, self.length - 1)
        self.ahead = False

    def draft_on_host(self, state: State, length: int, stop: EarlyStop | None) -> Draft | None:
        if self.model.device.type != "cpu":
            return None  # asking for a confidence would wait for the device
        feed = state.tokens[:, self.cache.length : state.length]
        return early(self._draft(state, feed, length, stop), stop, length)

    def draft(self, state: State, length: int) -> Draft:
        for _ in self.reading:
            pass  # where nobody has read the prompt
        # Of a draft that was accepted whole, the last token was never fed. Of rounds that another drafter drafted, or
        # none, no token was.
        unread = max(2, self.length - self.known)
        self.ahead, self.known = state.length > self.length, state.length + length - 1
        return self.draft_after(state, unread, length)

    def draft_after(self, state: State, unread: int, length: int) -> Draft:
        """A draft of every row, of which the cache holds at least all but the last `unread` tokens."""
        self.cache.keep(state.lengths.to(self.model.device) - unread)
        self.cache.settle(state.length - unread, through=state.length + length)
        places = state.lengths[:, None] - unread + torch.arange(unread, device=state.lengths.device)
        return self._draft(state, state.tokens.gather(1, places), length, None)

    @torch.inference_mode()
    def _draft(self, state: State, feed: torch.Tensor, length: int, stop: EarlyStop | None) -> Draft:
        """A draft after `feed`, int64 `[rows, n]`, the end of the text, which follows what the cache holds."""
        feed, start = feed.to(self.model.device), state.lengths.to(self.model.device)
        drawn = []
        for i in range(length):
            logits = self.model.prefill(feed, self.cache).logits[:, -1, : self.vocabulary]
            if logits.shape[1] < self.vocabulary:
                logits = torch.nn.functional.pad(logits, (0, self.vocabulary - logits.shape[1]), value=-torch.inf)
            drawn.append(draw(logits, start + i, start, self.settings, state.seed))
            if not go_on(drawn, stop):
                break
            feed = drawn[-1].ids[:, None]
        return joined(drawn, self.device, self.name)

    def close(self) -> None:
        self.cache.free()


def check_same_vocabulary(target: object, drafter: object) -> None:
    """Refuses two tokenizers that do not give every id the same meaning.

    Args:
        target, drafter: transformers tokenizers.

    Raises:
        ModelError: they differ; the message names the first entries that do.
    """
    ours = {i: t for t, i in target.get_vocab().items()}  # type: ignore[attr-defined]
    theirs = {i: t for t, i in drafter.get_vocab().items()}  # type: ignore[attr-defined]
    differing = [i for i in sorted(ours.keys() | theirs.keys()) if ours.get(i) != theirs.get(i)]
    if differing:
        shown = "; ".join(
            f"id {i} is {ours.get(i)!r} for the target, {theirs.get(i)!r} for the drafter" for i in differing[:3]
        )
        raise ModelError(
            f"The drafter does not share the target's tokenizer ({len(differing)} of {len(ours | theirs)} entries "
            f"differ: {shown}); choose a drafter of the same model family."
        )


def load(context: LoadContext) -> ModelDrafter:
    """The drafter of a checkpoint; see `kinds.Kind.load`.

    Raises:
        ModelError: it cannot be loaded, or has another tokenizer than the target.
    """
    check_same_vocabulary(context.tokenizer, context.own_tokenizer())
    target = context.target
    return ModelDrafter(context.causal_model(), context.choice.name, target.vocabulary, target.device)
