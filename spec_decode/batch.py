"""Decoding of a batch: several prompts at once, each a row of its own.

In: a lane, and its prompts as they were read, each into a cache of its own. Out: a generator of `BatchRound`s, of which
each holds a `Round` of every row that was still at work. The rows share every target pass and the draft length. All
else is their own: what is drafted, accepted and rolled back, and where the text ends. A row that has ended leaves the
batch, and the others go on without it. The host reads one copy a round. `decode` has the algorithm and the argument for
one row; single prompts are decoded there.

Every row has a seed. With seed s a row is what the prompt is alone with `Settings.seed` s: under the rules of shared
noise (greedy, coupled) the same tokens, for token t is argmax p_t / E_t, where E_t depends on (s, t) alone. Rows with
different seeds share no noise: two rows with the same prompt draw two independent texts. With one seed for all, rows of
equal length would draw with the same noise, each of them from the target's distribution, and all of them the same way.

Why every row follows the target's distribution under the rules that draw independently (rejection, block), though rows
share a draft length, and fillers stand in the place of drafts that a row lacks (`drafters.rows`). In the argument of
`decode`, draft length and drafted token may depend on everything before the round, and not on the round's own noise.
Here "before" means the past rounds of all rows. The noise of a row's round is keyed by the row's seed and by where the
round starts. No other row has that seed, so given everything before, of all rows, it is fresh; what the others do in
the same round takes noise of their own. A text is cut after a token that ends it or at `max_new_tokens`. Both depend on
the text alone, as they do for a single prompt.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from . import rules
from .clock import Stopwatch
from .decode import Lane, Prefill, decode_round, judge
from .draft_length import Fixed
from .drafters import Draft, Drafter, NoDrafter
from .drafters.rows import RowsDraft, in_rows
from .errors import UserError
from .events import BASELINE, SPECULATIVE, Round
from .narrate import narrate, rows_to_host
from .noise import row_seed_words
from .settings import MAX_DRAFT_LENGTH, MAX_SEED, Settings
from .state import State
from .target import Pass, Target
from .text import TextStream


@dataclass(frozen=True)
class BatchRound:
    """One round of all rows that were still at work.

    rounds: by the row's number, 0 for the first prompt. Their seconds and clocks are those of the batch, and the first
        counts the reading of all prompts.
    seconds: of this round. clock: of the batch so far.
    """

    rounds: dict[int, Round]
    seconds: float
    clock: float

    @property
    def emitted(self) -> int:
        """Tokens of all rows."""
        return sum(len(done.emitted) for done in self.rounds.values())


@dataclass
class _Row:
    """A row that is at work: its number, its text, its length in tokens, and how many more it may have."""

    number: int
    text: TextStream
    length: int
    left: int
    ended: bool = False

    def take(self, tokens: list[int], eos: frozenset[int]) -> list[int]:
        """As many of `tokens` as belong to the text, which ends with them or goes on."""
        end = next((count for count, token in enumerate(tokens, 1) if token in eos), len(tokens))
        taken = tokens[: min(end, self.left)]
        self.length += len(taken)
        self.left -= len(taken)
        self.ended = self.left == 0 or taken[-1] in eos
        return taken


def row_seeds(seed: int, count: int) -> list[int]:
    """Seeds of the rows of a batch with this seed: the first row has `seed` itself, the next one more, and so on."""
    return [(seed + row) % (MAX_SEED + 1) for row in range(count)]


def baseline(target: Target, settings: Settings) -> Lane:
    """The target alone, one token of every row a pass."""
    return Lane(BASELINE, target, NoDrafter(), Fixed(0), rules.default(settings.temperature), settings)


def speculative(target: Target, drafter: Drafter, settings: Settings) -> Lane:
    """The target with a drafter.

    Raises:
        UserError: the draft length in `settings` is not a number.
    """
    length = check_length(settings)
    return Lane(SPECULATIVE, target, drafter, Fixed(length), settings.deciding, settings)


def check_length(settings: Settings) -> int:
    """The draft length of all rows.

    Raises:
        UserError: it is not a number. `adaptive` weighs costs that were measured on single prompts, and `rate` looks at
            the acceptance of one text.
    """
    if not isinstance(settings.draft_length, int):
        raise UserError(
            "A batch has one draft length for all rows and its costs are not those of single prompts; choose a number "
            f"from 1 to {MAX_DRAFT_LENGTH} (--draft-length) instead of {settings.draft_length}."
        )
    return settings.draft_length


def read(target: Target, prompts: Sequence[list[int]], settings: Settings, hidden: bool) -> list[Prefill]:
    """Reads every prompt, with room for its new tokens and for the drafts beyond them. The result can begin several
    batches, one after another, and is the caller's to free.

    Args:
        hidden: a drafter reads the target's hidden states.

    Raises:
        UserError: the target cannot take rows of different lengths in one pass.
    """
    if target.masks is None:
        raise UserError(
            "This target's attention takes no masks that are made for it, so rows of different lengths cannot share a "
            "pass; decode one prompt at a time."
        )
    room = settings.max_new_tokens + MAX_DRAFT_LENGTH
    prefills = [Prefill(target, prompt, len(prompt) + room, hidden) for prompt in prompts]
    for prefill in prefills:
        for _ in prefill:
            pass
    return prefills


def decode(
    lane: Lane, prefills: Sequence[Prefill], texts: Sequence[TextStream], seeds: Sequence[int]
) -> Generator[BatchRound, None, None]:
    """Decodes prompts as the rows of one batch.

    Args:
        prefills: of the prompts, from `read`. They stay as they are.
        texts: one for each row.
        seeds: one for each row, all different.

    Raises:
        UserError: the drafter takes one text at a time, or the target's logits are not finite numbers.
        ValueError: two rows have the same seed.
    """
    if len(set(seeds)) < len(seeds):
        raise ValueError("rows with the same seed would share their noise")
    target, settings = lane.target, lane.settings
    prompts = [prefill.prompt for prefill in prefills]
    capacity = max(prefill.cache.capacity for prefill in prefills)
    clock, index = 0.0, 0
    reading = sum(prefill.seconds for prefill in prefills)
    begun = time.perf_counter() - reading
    with ExitStack() as held:
        drafter = in_rows(lane.drafter, prompts, settings, capacity)
        held.callback(drafter.close)
        state, passed = _joined(prefills, seeds)
        held.callback(lambda: state.cache.free())
        starting = time.perf_counter() - begun - reading
        rows = [
            _Row(number, text, len(prompt), settings.max_new_tokens)
            for number, (text, prompt) in enumerate(zip(texts, prompts, strict=True))
        ]
        while rows:
            watch = Stopwatch(target.device)
            # A row that may have fewer tokens than others drop what it does not need.
            length = min(lane.lengths.choose(), max(row.left for row in rows) - 1) if index > 0 else 0
            made = drafter.draft(state, length) if length > 0 else RowsDraft.whole(Draft.none(state))
            if index > 0:
                outcome = decode_round(lane, state, length, made.draft, watch)
            else:
                watch.mark()
                outcome = judge(lane, state, made.draft, passed)
            hosts = rows_to_host(outcome)
            watch.mark()

            emitted = [
                row.take([*host.ids[: host.accepted], host.own], target.eos)
                for row, host in zip(rows, hosts, strict=True)
            ]
            drafter.extend(emitted)
            told = [
                narrate(host.told(count), tokens, row.text, last=row.ended)
                for row, host, count, tokens in zip(rows, hosts, made.counts, emitted, strict=True)
            ]
            staying = [at for at, row in enumerate(rows) if not row.ended]
            longest = max((rows[at].length for at in staying), default=0)
            if staying and len(staying) < len(rows):
                state = state.select(staying, longest)
                drafter.select(staying)
            elif staying:
                state.advance(longest - state.length)

            now = time.perf_counter()
            laps = watch.laps()
            seconds, begun = now - begun, now
            clock += seconds
            if index == 0:
                laps = [laps[0] + starting, laps[1] + reading]
            yield BatchRound(
                {
                    row.number: Round(
                        lane.name, index, tokens, length, laps[0], laps[1], seconds, clock,
                        host.refused, host.kl, name if count else "", residual,
                    )
                    for row, host, count, name, (tokens, residual) in zip(
                        rows, hosts, made.counts, made.names, told, strict=True
                    )
                },
                seconds,
                clock,
            )  # fmt: skip
            rows = [rows[at] for at in staying]
            index += 1
            begun = time.perf_counter()  # what the reader of rounds does is not this batch's time


def _joined(prefills: Sequence[Prefill], seeds: Sequence[int]) -> tuple[State, Pass]:
    """The prompts as the rows of one state, in new tensors, and the passes of their last tokens as one."""
    device = prefills[0].target.device
    states = [State.after(prefill.prompt, prefill.cache.capacity, prefill.cache, device) for prefill in prefills]
    state = State.join(states)
    state.seed = row_seed_words(seeds).to(device)
    passes = [prefill.passed for prefill in prefills if prefill.passed is not None]
    hidden = [passed.hidden for passed in passes if passed.hidden is not None]
    return state, Pass(
        torch.stack([passed.logits for passed in passes]), torch.stack(hidden) if hidden else None, state.cache
    )
