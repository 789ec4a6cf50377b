"""Decoding: a prompt goes in, `Round`s come out. The whole algorithm is `_decode`.

In: a Target, perhaps a Drafter and a controller of draft length, the prompt's ids, a text stream, settings. Out: a
generator of rounds; closing it ends the lane and frees its cache. A lane reads the prompt itself, or begins behind one
that was read for both lanes of a race (`Prefill`). Baseline is the same loop with no drafter, so both lanes run the
same arithmetic on the same noise. Knows nothing of clocks across lanes, of chat, or of who watches.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from copy import copy

import torch
from torch import Tensor

from . import verification
from .clock import Stopwatch, finish
from .draft_length import Controller
from .drafters import Draft, Drafter
from .errors import UserError
from .events import BASELINE, SPECULATIVE, Reading, Role, Round, Token
from .sampling import ACCEPT, RESIDUAL, TARGET, degenerate, distribution, exponential, softmax, uniform
from .settings import Settings
from .target import Pass, Target
from .text import TextStream
from .verification import Verdict


class Prefill:
    """A prompt on its way into a cache with room for `capacity` positions. Iterating reads it, chunk by chunk (see
    `Target.read`), and once it is read a lane may begin.

    Two lanes need not read it twice: what one reading leaves is the keys and values of the prompt and, of its last
    position, logits and hidden state (an MTP drafter is given no others). `copy` gives another lane the same bits,
    which are the bits it would have computed: the same function of the same tokens.

    Attributes:
        cache: where the prompt goes.
        passed: the pass of its last chunk, None before there is one.
        seconds: that reading took, without what happened between chunks. It is the time that each lane of a race would
            have needed on its own, so it counts as each lane's own. Making a copy is on no lane's clock: a lane on its
            own makes none.
    """

    def __init__(self, target: Target, prompt: list[int], capacity: int, hidden: bool = False) -> None:
        self.target, self.prompt, self.hidden = target, prompt, hidden
        self.cache = target.new_cache(capacity)
        self.passed: Pass | None = None
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Reading]:
        """Reads what is still to be read; yields after every chunk but the last."""
        begun = time.perf_counter()
        tokens = torch.tensor(self.prompt[self.cache.length :], device=self.target.device)
        for passed in self.target.read(tokens, self.cache, self.hidden):
            self.passed = passed
            self.seconds += time.perf_counter() - begun
            if self.cache.length < len(self.prompt):
                yield Reading(self.cache.length, len(self.prompt))
            begun = time.perf_counter()

    def copy(self) -> Prefill:
        """The same, for another lane: no buffer that either lane writes to is shared. Only when all is read."""
        assert self.passed is not None
        twin = copy(self)
        twin.passed = self.passed.copy()
        twin.cache = twin.passed.cache
        return twin

    def free(self) -> None:
        """Gives the memory back."""
        self.cache.free()
        self.passed = None


Lane = Generator[Round | Reading, None, None]


def baseline(target: Target, prompt: list[int], text: TextStream, settings: Settings) -> Iterator[Round]:
    """The target alone, one token a pass."""
    return _rounds(_decode(BASELINE, target, None, None, prompt, text, settings, None))


def speculative(
    target: Target, drafter: Drafter, lengths: Controller, prompt: list[int], text: TextStream, settings: Settings
) -> Iterator[Round]:
    """The target with a drafter, one round at a time."""
    return _rounds(_decode(SPECULATIVE, target, drafter, lengths, prompt, text, settings, None))


def lanes(
    prefill: Prefill, drafter: Drafter, lengths: Controller, texts: Sequence[TextStream], settings: Settings
) -> dict[str, Lane]:
    """Both lanes of a race behind one reading of the prompt, which is theirs from now on.

    Args:
        prefill: read to the end, with room for `max_new_tokens` more, and with hidden states if the drafter needs them.
        texts: one for each lane.

    Returns:
        BASELINE and SPECULATIVE. A drafter with a cache of its own reads the prompt in the speculative lane, which
        yields a `Reading` between the chunks.
    """
    target, prompt, twin = prefill.target, prefill.prompt, prefill.copy()
    finish(target.device)  # copying is on no lane's clock
    return {
        BASELINE: _decode(BASELINE, target, None, None, prompt, texts[0], settings, prefill),
        SPECULATIVE: _decode(SPECULATIVE, target, drafter, lengths, prompt, texts[1], settings, twin),
    }


def _rounds(lane: Lane) -> Iterator[Round]:
    with closing(lane):
        for step in lane:
            if isinstance(step, Round):
                yield step


def _decode(
    lane: str,
    target: Target,
    drafter: Drafter | None,
    lengths: Controller | None,
    prompt: list[int],
    text: TextStream,
    settings: Settings,
    prefill: Prefill | None,
) -> Lane:
    hidden = drafter is not None and drafter.needs_hidden
    capacity = len(prompt) + settings.max_new_tokens
    prefill = prefill or Prefill(target, prompt, capacity, hidden)
    cache = prefill.cache
    left = settings.max_new_tokens
    position = len(prompt)  # of the next token to be drawn
    clock, index = 0.0, 0
    with ExitStack() as held:
        held.callback(cache.free)
        yield from prefill
        passed, prefill.passed = prefill.passed, None
        assert passed is not None
        # From here on the lane's time goes as if it had read the prompt itself just now.
        begun = time.perf_counter() - prefill.seconds
        if drafter is not None:
            held.callback(drafter.close)
            for reading in drafter.start(prompt, settings, capacity) or ():
                paused = time.perf_counter()
                yield reading
                begun += time.perf_counter() - paused
        starting = time.perf_counter() - begun - prefill.seconds  # the drafter's own prefill
        feed = torch.empty(0, dtype=torch.long, device=target.device)
        draft = Draft(feed)
        length, ended = 0, False
        while left > 0 and not ended:
            watch = Stopwatch(target.device)
            if index > 0 and drafter is not None and lengths is not None:
                # A round emits at most γ + 1 tokens, so the last ones are drafted no further than they may go.
                length = min(lengths.choose(), left - 1)
                draft = drafter.draft(length, lengths.go_on) if length > 0 else Draft(feed[:0])
            watch.mark()
            if index > 0:
                passed = target.verify(torch.cat([feed, draft.ids]), cache, hidden)
            verdict, shown = _verify(draft, passed.logits, position, settings, alone=drafter is None)
            ids, accepted, own, p, q, refused, kl = _to_host(draft, passed.logits, verdict, shown)
            watch.mark()

            emitted = [*ids[:accepted], own]
            for count, token in enumerate(emitted, 1):
                if token in target.eos:
                    emitted, ended = emitted[:count], True
                    break
            if drafter is not None:
                drafter.extend(emitted, passed)
            position += len(emitted)
            left -= len(emitted)
            cache.rollback(position - 1)  # the last token has not been read yet
            feed = verdict.token.reshape(1)

            role: Role = "target" if not ids else "bonus" if accepted == len(ids) else "correction"
            tokens = _tokens(text, ids, emitted, accepted, own, role, p, q, flush=ended or left == 0)
            now = time.perf_counter()
            seconds, begun = now - begun, now
            clock += seconds
            laps = watch.laps()
            if index == 0:
                laps = [laps[0] + starting, laps[1] + prefill.seconds]
            done = Round(lane, index, tokens, length, laps[0], laps[1], seconds, clock, refused, kl)
            if lengths is not None and index > 0:
                lengths.observe(done)
            index += 1
            yield done
            begun = time.perf_counter()  # what the reader of rounds does is not this lane's time


def _verify(draft: Draft, logits: Tensor, position: int, settings: Settings, alone: bool) -> tuple[Verdict, Tensor]:
    """The verdict of the rule in `settings`, and the target's probabilities `[γ + 1, V]` worth showing.

    Args:
        position: of the first token that this round may emit: the round's start.
        alone: the lane has no drafter. Its text is the target's own sample for the seed, whatever the rule.

    Why the output follows the target's distribution, though a controller chooses γ by what it saw of past rounds
    (tokens, confidences and seconds, those of refused drafts included), and may end a draft early:

    Coupled: token t is argmax p_t / E_t, where the noise E_t depends on (seed, t) alone and p_t on the tokens before t.
    The draft appears nowhere in it, so nothing that decides the draft can change the output. Noise may be met again.

    Rejection: a round that starts at s takes all its noise (draft, acceptance, residual) from (seed, s, position,
    stream). Starts increase strictly, so no two rounds share noise, and given everything before the round its noise
    is fresh. Whether position t of a round is drafted was decided before the noise at t was used: by past rounds, and
    by drafted tokens before t that the verdict visits first. Given that, and given that t is reached, a drafted token
    is accepted or replaced so that the result follows p_t (Leviathan et al. 2023, theorem 1), and a token without a
    draft is drawn from p_t. By induction over positions the text follows the target. Were noise keyed by position
    alone, a round after a rejection at t would draw t + 1 with the noise of the refused draft, of which the
    controller has seen the outcome: whether t + 1 is drafted would depend on the noise it is drafted with.
    """
    seed, vocabulary = settings.seed, logits.shape[-1]
    if settings.temperature == 0:
        p = softmax(logits.float())
        if settings.rule == "threshold" and not alone:
            u = noise = p  # neither is used
            return verification.threshold(draft.ids, p, None, u, noise, settings.lenience, argmax=True), p
        return verification.greedy(draft.ids, logits), p  # every exact rule is the greedy one at temperature 0
    places = torch.arange(position, position + logits.shape[0], device=logits.device)
    p = distribution(logits, settings)
    if settings.rule == "coupled" or alone:
        return verification.coupled(draft.ids, p, exponential(seed, places, vocabulary, TARGET)), p
    start = places[:1]
    u = uniform(seed, places[:-1], ACCEPT, start)
    noise = exponential(seed, places, vocabulary, RESIDUAL, start)
    if settings.rule == "rejection":
        return verification.rejection(draft.ids, p, draft.probabilities, u, noise), p
    return verification.threshold(draft.ids, p, draft.probabilities, u, noise, settings.lenience, argmax=False), p


def _to_host(
    draft: Draft, logits: Tensor, verdict: Verdict, p: Tensor
) -> tuple[list[int], int, int, list[float], list[float | None], int | None, float | None]:
    """Everything the host needs of a round, in one copy. Ids below 2^24 are exact in float32.

    Raises:
        UserError: the logits are NaN, +inf, or −inf throughout.
    """
    n = draft.ids.shape[0]
    own_p = p.reshape(-1).gather(0, (verdict.accepted * p.shape[-1] + verdict.token).reshape(1))
    parts = [
        degenerate(logits).any().reshape(1),
        verdict.accepted.reshape(1),
        verdict.token.reshape(1),
        own_p,
        draft.ids,
        p[:n].gather(-1, draft.ids[:, None])[:, 0],
    ]
    if draft.confidence is not None:
        parts.append(draft.confidence)
    if verdict.refused is not None and verdict.kl is not None:
        parts += [verdict.refused.reshape(1), verdict.kl.reshape(1)]
    values = torch.cat([part.float() for part in parts]).tolist()
    if values[0]:
        raise UserError(
            "The target produced logits that are not finite numbers; try another dtype or check its weights."
        )
    accepted, own = int(values[1]), int(values[2])
    ids = [int(x) for x in values[4 : 4 + n]]
    target_p = [*values[4 + n : 4 + 2 * n], values[3]]
    rest = values[4 + 2 * n :]
    confidence: list[float | None] = [None] * n
    if draft.confidence is not None:
        confidence, rest = rest[:n], rest[n:]
    return ids, accepted, own, target_p, confidence, int(rest[0]) if rest else None, rest[1] if rest else None


def _tokens(
    text: TextStream,
    ids: list[int],
    emitted: list[int],
    accepted: int,
    own: int,
    role: Role,
    p: list[float],
    q: list[float | None],
    flush: bool,
) -> tuple[Token, ...]:
    """The round's tokens in display order. One that ends the text early keeps only the drafts up to its end."""
    tokens = [
        Token(ids[i], text.push(ids[i]), "accepted", p[i], q[i], i + 1) for i in range(min(accepted, len(emitted)))
    ]
    if len(emitted) > accepted:
        aside = text.fork()
        tokens += [Token(ids[i], aside.push(ids[i]), "rejected", p[i], q[i], i + 1) for i in range(accepted, len(ids))]
        tokens.append(Token(own, text.push(own), role, p[-1]))
    if flush and (tail := text.flush()):
        last = tokens[-1]
        tokens[-1] = Token(last.id, last.text + tail, last.role, last.p, last.q, last.draft_position)
    return tuple(tokens)
