"""Multi-token prediction with a Gemma 4 assistant: a drafter that attends to the target's K/V cache and has none of its
own.

It needs no prefill either. Each step takes the target's embedding of the last token and a hidden state
(the target's last one at first, its own afterwards), and its attention has queries only: keys and values are those of
the target's last layer of each kind, read in place. Its position stays at the last token for the whole round.
Ours to run (`Gemma4AssistantForCausalLM`, `Gemma4UnifiedAssistantForCausalLM` hold the weights) so that drafts can be
drawn from q rather than be the argmax, that nothing waits for the host, and that shapes do not change.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..cpu import assistant as fused
from ..draft_length import EarlyStop
from ..errors import ModelError
from ..noise import TARGET, position_keys
from ..sampling import TOP, Drawn, draw, likeliest
from ..settings import Settings
from ..state import State
from ..target import Target
from . import Draft, Drafter, early
from .drawn import as_rows, go_on, joined

if TYPE_CHECKING:
    from ..loading.drafter import LoadContext


class MTPDrafter(Drafter):
    """Drafts with a Gemma 4 assistant of `target`.

    The assistant's config may name the target layers it reads, `target_kv_layers = {"full_attention": 29, …}`; without
    that it is the last layer of each kind that has keys and values of its own, as for Google's. With
    `shares_target_head` its head is the target's own, and need not be in the checkpoint.

    Args:
        int8: run `model`, which is in float32 on the CPU, in 8 bits and in one call a step.

    Raises:
        ModelError: the assistant was made for another target.
    """

    needs_hidden = True
    needs_text = False
    recordable = True

    def __init__(self, model: PreTrainedModel, target: Target, name: str = "mtp", int8: bool = False) -> None:
        self.model: Any = model.eval()
        self.name = name
        self.device = model.device
        self.vocabulary = target.vocabulary
        self.embed = target.model.get_input_embeddings()
        self.config = model.config.get_text_config()
        width = target.config.hidden_size
        if model.config.backbone_hidden_size != width:
            raise ModelError(
                f"The drafter {name} was made for a target {model.config.backbone_hidden_size} wide, and this one is "
                f"{width}; choose the drafter that belongs to the target."
            )
        if self.config.vocab_size != target.vocabulary:
            raise ModelError(
                f"The drafter {name} knows {self.config.vocab_size} tokens and the target {target.vocabulary}; choose "
                "the drafter that belongs to the target."
            )
        self.sources = _sources(model, target)
        if getattr(model.config, "shares_target_head", False):
            self.model.lm_head = target.model.get_output_embeddings()
        self.rows = getattr(self.model.lm_head, "weight", self.embed.weight)  # an int8 head shows no rows
        self.ordering: Tensor | None = None
        if model.config.use_ordered_embeddings:
            self.ordering = self.model.masked_embedding.token_ordering.long().view(model.config.num_centroids, -1)
        listed = self.rows if self.ordering is not None else None
        self.fused = fused.FusedAssistant(model, self.embed, listed) if int8 else None

    def start(self, prompt: list[int], settings: Settings, capacity: int) -> None:
        self.settings = settings

    def draft_on_host(self, state: State, length: int, stop: EarlyStop | None) -> Draft | None:
        if self.device.type != "cpu":
            return None  # asking for a confidence would wait for the device
        made = self._draft_row(state, 0, length, stop) if self.fused else self._draft(state, length, stop)
        return early(made, stop, length)

    def draft(self, state: State, length: int) -> Draft:
        if self.fused is None:
            return self._draft(state, length, None)
        return as_rows([self._draft_row(state.row(row), row, length, None) for row in range(len(state.lengths))])

    def _draft_row(self, state: State, row: int, length: int, stop: EarlyStop | None) -> Draft:
        """The draft of one row in 8 bits. `state` is the row's, with the cache of all."""
        assert self.fused is not None
        self.fused.begin(state.cache, self.sources, self.config.sliding_window, row)
        if self.ordering is not None and not self.settings.draws_q:
            return self._at_once(state, length, stop)
        return self._draft(state, length, stop)

    @torch.inference_mode()
    def _draft(self, state: State, length: int, stop: EarlyStop | None) -> Draft:
        assert state.hidden is not None
        hidden, token = state.hidden.to(self.device), state.last[:, 0]
        places = state.lengths.to(self.device) - 1  # of the last tokens, which the target has not read yet
        shared = {} if self.fused else self._shared(state, length)
        masks = self._masks(shared, places)
        drawn = []
        for i in range(1, length + 1):
            if self.fused:
                out, hidden, chosen, logits = self.fused.step(int(token), hidden)
                if self.ordering is None:
                    drawn.append(self._draw(out, places + i, places + 1, state.seed))
                else:
                    ids = self.ordering[torch.from_numpy(chosen)].view(1, -1)
                    drawn.append(
                        self._draw_listed(ids, torch.from_numpy(logits)[None], places + i, places + 1, state.seed)
                    )
            else:
                embedded = self.embed(token).to(self.device)
                out = self.model.model(
                    inputs_embeds=self.model.pre_projection(torch.cat([embedded, hidden], -1))[:, None],
                    attention_mask=masks,
                    position_ids=places[:, None],
                    shared_kv_states=shared,
                    use_cache=False,
                ).last_hidden_state[:, 0]
                hidden = self.model.post_projection(out)
                drawn.append(self._draw(out, places + i, places + 1, state.seed))
            if not go_on(drawn, stop):
                break
            token = drawn[-1].ids.to(token.device)
        return joined(drawn, self.embed.weight.device, self.name)

    def close(self) -> None:
        if self.fused:
            self.fused.end()

    def _shared(self, state: State, length: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
        """The target's keys and values of each kind, up to the bucket of a round of `length` tokens, read in place."""
        shared = {kind: state.cache.read(layer, state.length + length) for kind, layer in self.sources.items()}
        return {kind: (k.to(self.device), v.to(self.device)) for kind, (k, v) in shared.items()}

    def _masks(self, shared: dict[str, tuple[Tensor, Tensor]], lengths: Tensor) -> dict[str, Tensor]:
        """Which of them are the first `lengths` `[rows]` and inside the window, `[rows, 1, 1, bucket]`, additive."""
        masks = {}
        for kind, (keys, _) in shared.items():
            # How far before the last one read, [rows, bucket].
            back = lengths[:, None] - 1 - torch.arange(keys.shape[2], device=self.device)
            visible = back >= 0
            if kind == "sliding_attention":
                visible &= back <= self.config.sliding_window
            mask = torch.zeros_like(back, dtype=keys.dtype).masked_fill_(~visible, -torch.inf)
            masks[kind] = mask[:, None, None]
        return masks

    def _draw(self, out: Tensor, place: Tensor, start: Tensor, seed: Tensor | None) -> Drawn:
        """Tokens from the assistant's output `[rows, width]`, as `sampling.draw` gives them."""
        if self.ordering is None:
            return draw(self.model.lm_head(out), place, start, self.settings, seed)
        # The tokens in the chosen centroids' lists; all others have no logit.
        embedder = self.model.masked_embedding
        chosen = embedder.centroids(out).topk(embedder.centroid_intermediate_top_k).indices
        ids = self.ordering[chosen].flatten(1)
        return self._draw_listed(ids, (self.rows[ids] @ out[..., None])[..., 0], place, start, seed)

    def _draw_listed(self, ids: Tensor, logits: Tensor, place: Tensor, start: Tensor, seed: Tensor | None) -> Drawn:
        """As `_draw`, from ids and their logits, both `[rows, n]`."""
        if self.settings.temperature == 0:
            best, p = logits.argmax(-1, keepdim=True), logits.float().softmax(-1)
            at, values = likeliest(p, TOP)
            return Drawn(ids.gather(1, best)[:, 0], None, p.gather(1, best)[:, 0], (ids.gather(1, at), values))
        everywhere = logits.new_full((len(ids), self.vocabulary), -torch.inf).scatter_(-1, ids, logits)
        return draw(everywhere, place, start, self.settings, seed)

    def _at_once(self, state: State, length: int, stop: EarlyStop | None) -> Draft:
        """The whole draft in one call. Nobody asks for q under these rules: a draft is accepted if it is the target's
        own token, however it came about."""
        assert self.fused is not None and state.hidden is not None
        keys = np.zeros((length, 2), np.uint32)
        if self.settings.temperature > 0:
            seed = self.settings.seed if state.seed is None else state.seed
            keys = position_keys(seed, state.length + np.arange(length), TARGET)
        made = self.fused.draft(int(state.last), state.hidden, length, stop, self.settings.temperature, keys)
        ids, confidence, top_ids, top_p = (torch.from_numpy(x)[None] for x in made)
        return Draft(ids, None, confidence, drafter=self.name, top=(top_ids.clamp_min(0), top_p))


def _sources(model: PreTrainedModel, target: Target) -> dict[str, int]:
    """Which target layer each kind of attention reads.

    Raises:
        ModelError: the target has no such layer.
    """
    wanted = set(model.config.get_text_config().layer_types)
    named = getattr(model.config, "target_kv_layers", None)
    kinds = list(target.kinds)
    own = len(kinds) - (getattr(target.config, "num_kv_shared_layers", 0) or 0)
    last = {kind: i for i, kind in enumerate(kinds[:own])} | (named or {})
    missing = {kind for kind in wanted if not 0 <= last.get(kind, -1) < own}
    if missing:
        raise ModelError(
            f"The drafter reads {', '.join(sorted(missing))} keys and values, which this target does not have; choose "
            "the drafter that belongs to the target."
        )
    return {kind: last[kind] for kind in sorted(wanted)}


def load(context: LoadContext) -> MTPDrafter:
    """The drafter of a checkpoint; see `kinds.Kind.load`.

    Raises:
        ModelError: it cannot be loaded, belongs to another target, or is on another device than the head it shares.
    """
    choice, plan = context.choice, context.plan
    if plan.drafter_device != plan.device and getattr(choice.config, "shares_target_head", False):
        raise ModelError("This drafter uses the target's head, so it must be on the target's device.")
    name = Path(choice.name).name
    return MTPDrafter(context.assistant(), context.target, name, int8=plan.dtype == "int8")
