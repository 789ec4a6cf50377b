"""Decoding: a prompt goes in, `Round`s come out. The algorithm is `decode_round` and the loop of `_decode`.

In: a Target, a Drafter and a controller of draft length, the prompt's ids, a text stream, settings. Out: a generator of
rounds; closing it ends the lane and frees its cache. A lane reads the prompt itself, or starts from one that was read
for both lanes of a race (`Prefill`). Baseline is the same loop with no drafter, so both lanes run the same arithmetic
on the same noise. Knows nothing of clocks across lanes, of chat, or of who watches.

Each round has two halves. `decode_round` touches only tensors on the device: it reads nothing on the host, and its
operations depend on the draft length and the bucket of the cache alone (tests/test_rounds.py). It takes several rows,
each at a length of its own; the loop decodes one. `narrate` makes text and events of the one copy to the host.

Why the output follows the target's distribution, though a controller chooses γ by what it saw of past rounds (tokens,
confidences and seconds, those of refused drafts included), and may end a draft early:

Rules of shared noise (greedy, coupled): token t is argmax p_t / E_t, where the noise E_t depends on (seed, t) alone and
p_t on the tokens before t. The draft appears nowhere in it, so nothing that decides the draft can change the output.
Noise may be used again.

Rules that draw independently (rejection, block): a round that starts at s takes all its noise (draft, acceptance,
residual) from (seed, s, position, stream). Starts increase strictly, so no two rounds share noise, and given everything
before the round its noise is fresh. Whether position t of a round is drafted was decided before the noise at t was
used: by past rounds, and by drafted tokens before t that the verdict visits first. Given that, and given that t is
reached, a drafted token is accepted or replaced so that the result follows p_t (Leviathan et al. 2023, theorem 1; for
whole blocks Sun et al. 2024, theorem 1). By induction over positions the text follows the target. Were noise keyed by
position alone, a round after a rejection at t would draw t + 1 with the noise of the refused draft, of which the
controller has seen the outcome: whether t + 1 is drafted would depend on the noise it is drafted with.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from copy import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import rules
from .cache import bucket
from .clock import Stopwatch, finish
from .draft_length import RECORDED, Controller, Fixed, within
from .drafters import Draft, Drafter, NoDrafter
from .events import BASELINE, SPECULATIVE, Reading, Round
from .graphs import Recorder
from .narrate import Parts, gathered, narrate, to_host
from .noise import RoundNoise
from .rules import Rule
from .sampling import distribution, softmax
from .settings import Settings
from .state import State
from .target import Pass, Target
from .text import TextStream
from .transfer import Transfer
from .verification import Case, Verdict


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


@dataclass(frozen=True)
class Lane:
    """One way to decode: what stays the same from round to round.

    rule: the one that decides; for the baseline the target's own sample, whatever the settings name.
    recorder: replays rounds from recorded graphs, on devices that have them.
    """

    name: str
    target: Target
    drafter: Drafter
    lengths: Controller
    rule: Rule
    settings: Settings
    recorder: Recorder | None = None


@dataclass(frozen=True)
class Outcome:
    """What a round leaves on the device: the draft, the target's logits and distribution at γ + 1 positions
    `[rows, γ + 1, V]`, the verdict, and what the host will be told where that was gathered already."""

    draft: Draft
    logits: Tensor
    p: Tensor
    verdict: Verdict
    parts: Parts | None = None

    def joined(self) -> Outcome:
        """The same with `parts`, in one tensor."""
        parts = gathered(self)
        return replace(self, parts=replace(parts, joined=parts.join()))


Steps = Generator[Round | Reading, None, None]


def baseline(
    target: Target, prompt: list[int], text: TextStream, settings: Settings, recorder: Recorder | None = None
) -> Iterator[Round]:
    """The target alone, one token a pass."""
    return _rounds(_decode(replace(_baseline(target, settings), recorder=recorder), prompt, text, None))


def speculative(
    target: Target,
    drafter: Drafter,
    lengths: Controller,
    prompt: list[int],
    text: TextStream,
    settings: Settings,
    recorder: Recorder | None = None,
) -> Iterator[Round]:
    """The target with a drafter, one round at a time."""
    lane = Lane(SPECULATIVE, target, drafter, lengths, settings.deciding, settings, recorder)
    return _rounds(_decode(lane, prompt, text, None))


def lanes(
    prefill: Prefill,
    drafter: Drafter,
    lengths: Controller,
    texts: Sequence[TextStream],
    settings: Settings,
    recorders: Mapping[str, Recorder] | None = None,
) -> dict[str, Steps]:
    """Both lanes of a race, starting from one reading of the prompt, which is theirs from now on.

    Args:
        prefill: read to the end, with room for `max_new_tokens` more, and with hidden states if the drafter needs them.
        texts: one for each lane.
        recorders: of rounds, by lane.

    Returns:
        BASELINE and SPECULATIVE. A drafter with a cache of its own reads the prompt in the speculative lane, which
        yields a `Reading` between the chunks.
    """
    target, prompt, twin = prefill.target, prefill.prompt, prefill.copy()
    finish(target.device)  # copying is on no lane's clock
    recorders = recorders or {}
    slow = replace(_baseline(target, settings), recorder=recorders.get(BASELINE))
    fast = Lane(SPECULATIVE, target, drafter, lengths, settings.deciding, settings, recorders.get(SPECULATIVE))
    return {
        BASELINE: _decode(slow, prompt, texts[0], prefill),
        SPECULATIVE: _decode(fast, prompt, texts[1], twin),
    }


def _baseline(target: Target, settings: Settings) -> Lane:
    return Lane(BASELINE, target, NoDrafter(), Fixed(0), rules.default(settings.temperature), settings)


def _rounds(steps: Steps) -> Iterator[Round]:
    with closing(steps):
        for step in steps:
            if isinstance(step, Round):
                yield step


def _decode(lane: Lane, prompt: list[int], text: TextStream, prefill: Prefill | None) -> Steps:
    """The rounds of a lane, which reads the prompt itself where `prefill` is None.

    Where it is None the lane has the device to itself, and on CUDA a round may be launched before the one before it has
    been read (see `_length_ahead`). Its seconds are then those of the host, or of its own work on the device where
    that is more: what the device does while the reader of rounds is at work is not hidden, and a round that nobody
    reads is on no clock.
    """
    may_run_ahead = prefill is None
    target, drafter, settings = lane.target, lane.drafter, lane.settings
    capacity = len(prompt) + settings.max_new_tokens
    prefill = prefill or Prefill(target, prompt, capacity, drafter.needs_hidden)
    left, clock, index = settings.max_new_tokens, 0.0, 0
    with ExitStack() as held:
        held.callback(prefill.cache.free)
        yield from prefill
        passed, prefill.passed = prefill.passed, None
        # From here on the lane's time goes as if it had read the prompt itself just now.
        begun = time.perf_counter() - prefill.seconds
        held.callback(drafter.close)
        for reading in drafter.start(prompt, settings, capacity) or ():
            paused = time.perf_counter()
            yield reading
            begun += time.perf_counter() - paused
        starting = time.perf_counter() - begun - prefill.seconds  # the drafter's own prefill
        state = State.after(prompt, capacity, prefill.cache, target.device)
        recorder = lane.recorder
        if recorder:
            state = recorder.take(lane, state)
            held.callback(recorder.give_back, state)
            if state.cache is not prefill.cache:
                prefill.cache.free()
        transfer = Transfer(target.device)
        if may_run_ahead and transfer.asynchronous:
            # A round that nobody will read must not work in the time of whoever comes next.
            held.push(lambda kind, *_: finish(target.device) if kind in (None, GeneratorExit) else None)
        known, ended = len(prompt), False
        if drafter.drafts_first:
            # The last given token is read once more, with the first draft after it.
            state.unread()
            passed = None
            clock, index = time.perf_counter() - begun, 1
            yield Round(lane.name, 0, (), 0, starting, prefill.seconds, clock, clock)
            begun = time.perf_counter()
        ahead: _Launched | None = None
        while left > 0 and not ended:
            this, ahead, waited = ahead, None, 0.0
            if this is None:
                this = _launch(lane, state, transfer, _length(lane, left) if index > 0 else 0, passed)
            else:
                waited = this.seconds
            passed = None
            if may_run_ahead and transfer.asynchronous:
                length = _length_ahead(lane, known, this.drafted + 1, left)
                if length is not None:
                    state.bound(known + this.drafted + 1)
                    ahead = _launch(lane, state, transfer, length)
                    waited -= ahead.seconds
            host = to_host(this.outcome, this.read())
            if not transfer.asynchronous:
                this.watch.mark()

            emitted = [*host.ids[: host.accepted], host.own]
            for count, token in enumerate(emitted, 1):
                if token in target.eos:
                    emitted, ended = emitted[:count], True
                    break
            drafter.extend(emitted)
            known += len(emitted)
            state.bound(known)
            left -= len(emitted)
            tokens, residual = narrate(host, emitted, text, last=ended or left == 0)

            # Recording is on no lane's clock, and launching on that of the round that was launched.
            now = time.perf_counter()
            laps = [max(lap - spent, 0.0) for lap, spent in zip(this.watch.laps(), this.spent, strict=True)]
            seconds = max(now - begun + waited - sum(this.spent), sum(laps) if may_run_ahead else 0.0)
            clock += seconds
            if index == 0:
                laps = [laps[0] + starting, laps[1] + prefill.seconds]
            maker = this.outcome.draft.drafter if host.ids else ""
            done = Round(
                lane.name, index, tokens, this.length, laps[0], laps[1], seconds, clock,
                host.refused, host.kl, maker, residual,
            )  # fmt: skip
            if index > 0:
                lane.lengths.observe(done, this.outcome.draft.stopped_early)
            index += 1
            yield done
            begun = time.perf_counter()  # what the reader of rounds does is not this lane's time


@dataclass(frozen=True)
class _Launched:
    """A round that the device has been given.

    Attributes:
        read: its numbers, once they are there.
        watch: marks its beginning, the end of its draft and, where the copy is asynchronous, its end.
        length: γ as it was chosen.
        drafted: tokens of the draft.
        seconds: that launching took on the host, recording included.
        spent: seconds of recording, in its draft and in its pass.
    """

    outcome: Outcome
    read: Callable[[], dict[str, list[float]]]
    watch: Stopwatch
    length: int
    drafted: int
    seconds: float
    spent: tuple[float, float]


def _launch(lane: Lane, state: State, transfer: Transfer, length: int, passed: Pass | None = None) -> _Launched:
    """Gives the device a round with a draft of `length`, and the copy of what it tells. The first round is the verdict
    on the pass over the prompt, `passed`."""
    begun, spent = time.perf_counter(), [0.0, 0.0]
    watch = Stopwatch(lane.target.device)
    draft: Draft | None = Draft.none(state)
    if length > 0:
        draft = lane.drafter.draft_on_host(state, length, lane.lengths.early_stop)
    if passed is not None:
        watch.mark()
        outcome = judge(lane, state, Draft.none(state), passed)
    elif lane.recorder:
        outcome = lane.recorder.round(lane, state, length, draft, watch)
        spent = lane.recorder.spent
    else:
        outcome = decode_round(lane, state, length, draft, watch)
    read = transfer.send(outcome.parts or gathered(outcome))
    if transfer.asynchronous:
        watch.mark()
    drafted = outcome.draft.ids.shape[1]
    return _Launched(outcome, read, watch, length, drafted, time.perf_counter() - begun, (spent[0], spent[1]))


def _length(lane: Lane, left: int) -> int:
    """γ of the next round, of a text that may get `left` more tokens. A round emits at most γ + 1, so the last ones are
    drafted no further than they may go."""
    recorded = RECORDED if lane.recorder and not lane.recorder.refused else None
    return within(lane.lengths.choose(), left - 1, recorded)


def _length_ahead(lane: Lane, known: int, most: int, left: int) -> int | None:
    """γ of the round after the one under way, where it can be launched before that one has been read; None where the
    host has to read first.

    Why the text is the same: a round is a function of the state on the device, of γ and of the bucket
    (`decode_round`). The state follows from the round before on the device. γ is fixed, and the text is far enough from
    its end that γ holds however many tokens are emitted. The host knows the length of the text only up to a bound, of
    which the bucket alone is made; where the shortest and the longest text that are possible have different buckets,
    the host reads first. So the same operations meet the same values. Where the round under way turns out to end the
    text, what follows it is never read, and the state, which it has changed, ends with the lane.

    Only a lane that has the device to itself runs ahead. In a race the surplus would stand in the queue before the
    other lane's round and count as its time.

    Args:
        known: tokens of prompt and output that the host has read.
        most: tokens that the round under way emits at most.
        left: tokens that may follow `known`.
    """
    if not isinstance(lane.lengths, Fixed) or lane.drafter.needs_text:
        return None
    length = lane.lengths.length
    same = bucket(known + 1 + length) == bucket(known + most + length)
    return length if same and left - most > length else None


@torch.inference_mode()
def decode_round(
    lane: Lane, state: State, length: int, draft: Draft | None = None, watch: Stopwatch | None = None
) -> Outcome:
    """One draft and one target pass over it, verified; `state` gets the tokens. Reads nothing on the host.

    Args:
        length: γ, for a drafter that drafts on the device.
        draft: made before, by a drafter that drafts on the host.
        watch: is marked between draft and target pass.
    """
    if draft is None:
        draft = lane.drafter.draft(state, length)
    if watch:
        watch.mark()
    return verify_draft(lane, state, draft)


@torch.inference_mode()
def verify_draft(lane: Lane, state: State, draft: Draft) -> Outcome:
    """The second part of `decode_round`: a target pass over a draft, and the verdict."""
    passed = lane.target.verify(state.propose(draft.ids), state.cache, lane.drafter.needs_hidden)
    return judge(lane, state, draft, passed)


@torch.inference_mode()
def judge(lane: Lane, state: State, draft: Draft, passed: Pass) -> Outcome:
    """The verdict on a draft, by the lane's rule, after the target has read it; `state` gets the tokens.

    Args:
        passed: logits at the last token and after every drafted one, `[rows, γ + 1, V]`, and hidden states likewise.
            Without the row dimension it is one row.
    """
    settings, logits, hidden = lane.settings, passed.logits, passed.hidden
    if logits.dim() == 2:
        logits, hidden = logits[None], None if hidden is None else hidden[None]
    p = softmax(logits.float()) if settings.temperature == 0 else distribution(logits, settings)
    seed = settings.seed if state.seed is None else state.seed
    noise = RoundNoise(seed, state.lengths, logits.shape[1], logits.shape[2])
    drawn = settings.synthetic_acceptance
    case = Case(draft.ids, logits, p, draft.q, noise, settings.temperature, settings.lenience, drawn)
    verdict = lane.rule.verify(case)
    state.accept(verdict.accepted, verdict.token, hidden)
    return Outcome(draft, logits, p, verdict)
