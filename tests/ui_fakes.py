"""A source and a race with no model: deterministic rounds at a chosen pace, for the tests of the app.

`FakeSource` and `FakeRace` are a `sources.Source` and its `Race`. Texts come from a word list, or from `texts` where a
test wants particular tokens; every figure derives from the seed, so two runs are equal.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from spec_decode.errors import ModelError, OutOfMemory, PromptError
from spec_decode.events import BASELINE, SPECULATIVE, Costs, Promises, Reading, Round, Token, Trace
from spec_decode.request import Request
from spec_decode.sources import chosen_drafter

WORDS = (
    "The light of the sun enters a drop of rain , bends , and comes back in every colour at once . "
    "A second drop sends another angle to the eye \n\n and so the arc is drawn by millions of them . "
    "Each step 🌈 is small ; together they fill half of the sky \n def rainbow ( n ) : return sorted ( n )"
).split(" ")

STEP = 0.030  # seconds of a simulated target pass
DRAFT = 0.002  # seconds of a simulated draft step


class FakeSource:
    """Drafters by name, a context of 512 words, no weights."""

    promises = Promises()
    recording = None
    can_think = False
    can_branch = False

    def __init__(
        self,
        pace: float = 0.0,
        texts: list[str] | None = None,
        context: int = 512,
        memory: int | None = None,
        chunks: int = 0,
        chunk_seconds: float = 0.2,
        hit: float = 0.72,
        silent: bool = False,
        others: tuple[str, ...] = ("lookup", "mtp"),
    ) -> None:
        """`pace` scales simulated seconds to slept ones; `memory` is the round at which the memory runs out. A prompt
        takes `chunks` times `chunk_seconds` to read. `hit` is the chance of a draft, which a `silent` drafter never
        makes. Of the `others`, drafters besides its own, "broken" cannot be loaded."""
        self.chunks, self.chunk_seconds = chunks, chunk_seconds
        self.pace, self.texts, self.context, self.memory = pace, texts, context, memory
        self.hit, self.silent = hit, silent
        self.drafter, self.drafters = "fake-drafter", ("fake-drafter", *others)
        self.races: list[FakeRace] = []
        self.costs = Costs(STEP, (1.0, 1.03, 1.05, 1.08, 1.12, 1.18, 1.24, 1.3, 1.36), DRAFT / STEP)

    @property
    def info(self) -> dict[str, Any]:
        return {"target": "fake-target", "drafter": self.drafter, "device": "cpu", "dtype": "int8"}

    def race(self, request: Request) -> FakeRace:
        self.drafter = chosen_drafter(request, self.drafters)
        if self.drafter == "broken":
            raise ModelError("The drafter 'broken' has another tokenizer than the target.")
        return FakeRace(self, request)


class FakeRace:
    """Iterating yields rounds of both lanes, the lane whose clock is behind first."""

    def __init__(self, source: FakeSource, request: Request) -> None:
        tokens, limit = len(request.prompt.split()), source.context - request.settings.max_new_tokens
        if tokens > limit and not request.truncate:
            raise PromptError(f"The prompt has {tokens} tokens; {max(limit, 0)} fit beside the output.", tokens, limit)
        self.source, self.request, self.settings, self.tokens = source, request, request.settings, min(tokens, limit)
        self.info = source.info
        self.rounds: list[Round] = []
        self.finish = {BASELINE: "running", SPECULATIVE: "running"}
        self.stopped = self.closed = False
        source.races.append(self)

    def stop(self, why: str = "cancelled") -> None:
        self.stopped, self.why = True, why

    def close(self) -> None:
        self.closed = True

    def pieces(self, rounds: Iterable[Round]) -> dict[str, str]:
        return {}

    @property
    def trace(self) -> Trace:
        return Trace(
            request=self.request.to_dict(),
            pair=self.info,
            machine={"processor": "a fake machine"},
            prompt_tokens=self.tokens,
            rounds=tuple(self.rounds),
            finish=dict(self.finish),
            costs=self.source.costs,
            versions={"spec_decode": "0"},
            date="2026-01-31T12:00:00Z",
        )

    def steps(self) -> Iterator[Round | Reading]:
        """The prompt in `source.chunks` chunks, then the rounds."""
        for i in range(self.source.chunks):
            if self.stopped:
                break
            time.sleep(self.source.chunk_seconds)
            if i + 1 < self.source.chunks:
                yield Reading(i + 1, self.source.chunks)
        yield from self._rounds()

    def __iter__(self) -> Iterator[Round]:
        return (step for step in self.steps() if isinstance(step, Round))

    def _rounds(self) -> Iterator[Round]:
        lanes = {BASELINE: self._baseline(), SPECULATIVE: self._speculative()}
        clocks = dict.fromkeys(lanes, 0.0)
        while lanes:
            if self.stopped:
                self.finish.update(dict.fromkeys(lanes, self.why))
                return
            lane = min(lanes, key=lambda name: clocks[name])
            r = next(lanes[lane], None)
            if r is None:
                del lanes[lane]
                self.finish[lane] = "length"
                continue
            if self.source.memory is not None and r.index >= self.source.memory:
                raise OutOfMemory("The device ran out of memory; ask for fewer new tokens.")
            if self.source.pace:
                time.sleep((r.clock - clocks[lane]) * self.source.pace)
            clocks[lane] = r.clock
            self.rounds.append(r)
            yield r

    def _text(self, position: int) -> str:
        if self.source.texts is not None:
            return self.source.texts[position % len(self.source.texts)]
        word = WORDS[(position + self.settings.seed) % len(WORDS)]
        return word if word.strip() != word or position == 0 else " " + word

    def _token(self, position: int, role: Any, p: float, q: float | None = None, draft: int | None = None) -> Token:
        place = position % len(self.source.texts) if self.source.texts else position
        return Token(1000 + place, self._text(position), role, round(p, 4), q, draft)

    def _baseline(self) -> Iterator[Round]:
        noise, clock = random.Random(self.settings.seed), 0.12
        for i in range(self.settings.max_new_tokens):
            seconds = 0.12 if i == 0 else STEP * noise.uniform(0.9, 1.2)
            clock = seconds if i == 0 else clock + seconds
            token = self._token(i, "target", noise.uniform(0.3, 1))
            yield Round(BASELINE, i, (token,), 0, 0.0, seconds, seconds, clock)

    def _speculative(self) -> Iterator[Round]:
        settings, noise = self.settings, random.Random(self.settings.seed + 1)
        lossy = not settings.exact
        yield Round(SPECULATIVE, 0, (self._token(0, "target", 0.9),), 0, 0.0, 0.125, 0.125, 0.125)
        clock, done, index = 0.125, 1, 1
        while done < settings.max_new_tokens:
            fixed = settings.draft_length if isinstance(settings.draft_length, int) else noise.choice((0, 2, 4, 6))
            left = settings.max_new_tokens - done
            drafted = 0 if self.source.silent else min(fixed, left)
            accepted = 0
            while accepted < drafted and noise.random() < self.source.hit:
                accepted += 1
            tokens = [
                self._token(done + i, "accepted", noise.uniform(0.5, 1), round(noise.uniform(0.4, 1), 4), i + 1)
                for i in range(accepted)
            ]
            if accepted < left:
                tokens += [
                    Token(9000 + i, " wrong" if i % 2 else " guess", "rejected", 0.02, 0.4, accepted + i + 1)
                    for i in range(drafted - accepted)
                ]
                role = "target" if not drafted else "bonus" if accepted == drafted else "correction"
                tokens.append(self._token(done + accepted, role, noise.uniform(0.4, 1)))
            emitted = min(accepted + 1, left)
            draft, verify = DRAFT * drafted, STEP * (1 + 0.03 * drafted) * noise.uniform(0.9, 1.2)
            clock += draft + verify
            yield Round(
                SPECULATIVE, index, tuple(tokens), fixed, draft, verify, draft + verify, clock,
                noise.choice((0, 0, 1)) if lossy else None, round(noise.uniform(0, 0.1), 4) if lossy else None,
            )  # fmt: skip
            done, index = done + emitted, index + 1


def fake_load(source: FakeSource, seconds: float = 0.0) -> Callable[[Callable[[str], None]], FakeSource]:
    """A loader for `ui.Engine` that reports two steps and returns `source`."""

    def load(progress: Callable[[str], None]) -> FakeSource:
        progress("Reading weights")
        time.sleep(seconds)
        progress("Measuring the pair")
        return source

    return load
