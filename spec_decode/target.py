"""Target: the model that decides, one pass at a time.

In: token ids and a cache. Out: logits for every position of the pass, and the last hidden state where a drafter asks
for it. Talks to transformers only through a model's public forward and cache interface, so any decoder-only model will
do. Knows nothing of drafts or of rules; a draft model is a Target too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .cache import ARGUMENT, RollbackCache, layer_kinds


@dataclass(frozen=True)
class Pass:
    """logits `[k, V]` at the pass's last k positions; hidden `[k, H]` there, after the final norm, or None; the cache
    that the pass wrote to, whose keys and values an MTP drafter reads."""

    logits: Tensor
    hidden: Tensor | None
    cache: RollbackCache


class Target:
    """A causal language model behind two calls, `prefill` and `verify`.

    Attributes:
        context: positions the model was made for.
        vocabulary: width V of its logits.
        kinds: `full_attention` or `sliding_attention` for every layer.
        eos: ids that end a text, from the generation config.

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

    def new_cache(self, capacity: int) -> RollbackCache:
        """A cache for one sequence of up to `capacity` positions."""
        return RollbackCache(self.model.config, capacity)

    def prefill(self, tokens: Tensor, cache: RollbackCache, hidden: bool = False) -> Pass:
        """Reads the prompt, int64 `[n]`, into an empty cache; the pass holds its last position alone (k = 1)."""
        return self._forward(tokens, cache, hidden, keep=1)

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
