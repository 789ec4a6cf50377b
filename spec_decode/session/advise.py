"""Does speculation pay for these prompts? A bounded measurement on the device, by the benchmark's method.

In: an `Engine` and a `Question`. Out: `Progress` while it measures, then an `Answer`: the advisor's sentences, the
draft length it recommends, and what was measured, with intervals. Each race is one job of the device's thread. A
measurement that takes too long is stopped, and the advice is that of the races that were finished.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar

from ..bench import advice
from ..bench.datasets import Prompt
from ..bench.estimate import Estimate, estimate
from ..bench.measurement import Measurement
from ..bench.method import Bench
from ..bench.plan import Grid
from ..errors import ModelError, SettingsError, UserError
from ..request import Request
from ..settings import Settings
from ..sources import Source
from .device import Engine
from .held import Held
from .summary import names

T = TypeVar("T")

DRAFT_LENGTHS: tuple[int | str, ...] = (1, 2, 4, 8, "adaptive")  # beside 0, the baseline lane of every race
PROMPTS = 8  # of a question, at most
CHARACTERS = 20_000  # of a prompt, at most
NEW_TOKENS = 256  # of a lane, at most
REPEATS = 5  # of every race, at most
SECONDS = 120.0  # of a measurement, at most; the engine's limits may allow less
LOOK = 0.5  # seconds between two looks at the clock, and at whether anyone still listens


@dataclass(frozen=True)
class Question:
    """What is to be measured: these prompts, at these settings, whose draft length counts for nothing.

    Raises:
        SettingsError, PromptError: more than may be asked for, or a prompt that is none.
    """

    prompts: tuple[str, ...]
    settings: Settings
    drafter: str = ""
    repeats: int = 3

    def __post_init__(self) -> None:
        if not 1 <= len(self.prompts) <= PROMPTS:
            raise SettingsError("prompts", f"Ask about 1 to {PROMPTS} prompts, not {len(self.prompts)}.")
        for prompt in self.prompts:
            Request(prompt)
            if len(prompt) > CHARACTERS:
                raise SettingsError("prompts", f"A prompt has at most {CHARACTERS:,} characters here.")
        if self.settings.max_new_tokens > NEW_TOKENS:
            raise SettingsError(
                "max_new_tokens", f"Advice is measured on at most {NEW_TOKENS} new tokens a lane; ask for fewer."
            )
        if isinstance(self.repeats, bool) or not isinstance(self.repeats, int) or not 1 <= self.repeats <= REPEATS:
            raise SettingsError("repeats", f"Repeats must be a whole number from 1 to {REPEATS}.")


@dataclass(frozen=True)
class Progress:
    """`done` of `of` races are measured."""

    done: int
    of: int


@dataclass(frozen=True)
class Answer:
    """What was measured, and what the advisor says of it; `of` races were planned."""

    question: Question
    pair: dict[str, Any]
    measurements: tuple[Measurement, ...]
    of: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary. "draft_length" is the one to set, 0 for decoding without a drafter, None where the
        measurements cannot tell; "sentences" are `bench.words.Sentence`s; speeds in "measured" are medians over prompts
        with the ends of their 95 % intervals, None where there are too few figures for one."""
        found = self.measurements
        (said,) = advice.advise(found)
        judged = [m.identical for m in found if m.same_text and m.identical is not None]
        cut = len(found) < self.of
        return {
            "status": "done",
            "advice": said.text,
            "draft_length": said.draft_length,
            "best_fixed": said.fixed,
            "sentences": [sentence.to_dict() for sentence in said.sentences],
            "measured": [_baseline(found), *(_measured(n, found) for n in DRAFT_LENGTHS if _of(n, found))],
            "identical": all(judged) if judged else None,
            "pair": names(self.pair),
            "settings": {**self.question.settings.to_dict(), "draft_length": None},
            "prompts": len(self.question.prompts),
            "repeats": self.question.repeats,
            "races": len(found),
            "planned": self.of,
            "seconds": round(self.seconds, 1),
            "notice": f"Stopped by the time limit: {len(found)} of {self.of} races were measured." if cut else None,
        }


def ask(engine: Engine, question: Question) -> Iterator[Progress | Answer]:
    """Measures, and yields how far it is a few times a second, and in the end the answer. Closing the iterator ends the
    race that runs.

    Raises:
        SettingsError: a server without such measurements, or more than its limits allow. PromptError: a prompt is too
        long. ModelError: there is no model, or the drafter cannot be used. UserError: not one race was finished.
    """
    limits = engine.limits
    if not limits.measure:
        raise SettingsError("measure", "Measurements for advice are switched off on this server.")
    limits.check(question.settings)
    source = Held(engine.source)
    if source.recording:
        raise ModelError("This server plays a recording; advice needs a model to measure.")
    began = time.perf_counter()
    end = began + min(SECONDS, limits.seconds or SECONDS)
    bench = Bench(source, _grid(question, source), _prompts(question))
    of = len(bench.left())
    found: list[Measurement] = []

    def wait(job: Callable[[], T]) -> Generator[Progress, None, T]:
        """Runs a job on the device's thread, and returns its result."""
        future: Future[T] = engine.submit(job)
        while True:
            try:
                return future.result(LOOK)
            except TimeoutError:
                if future.done():
                    raise
            if time.perf_counter() > end:
                source.stop("time")
            yield Progress(len(found), of)

    races = bench.run()
    try:
        with engine.turns.shared():
            yield Progress(0, of)
            yield from wait(bench.check)
            yield from wait(bench.warm_up)
            while len(found) < of and not source.stopped and time.perf_counter() < end:
                measured = yield from wait(lambda: next(races, None))
                if measured is None or source.stopped:  # what was stopped is no measurement
                    break
                found.append(measured)
                yield Progress(len(found), of)
    finally:
        source.stop("time")
    if not found:
        raise UserError("The time was up before a race was finished; ask for fewer new tokens.")
    yield Answer(question, source.info, tuple(found), of, time.perf_counter() - began)


def _grid(question: Question, source: Source) -> Grid:
    settings = question.settings
    return Grid(
        settings,
        draft_lengths=DRAFT_LENGTHS,
        drafters=(question.drafter or source.drafters[0],),
        rules=(settings.rule,),
        temperatures=(settings.temperature,),
        repeats=question.repeats,
    )


def _prompts(question: Question) -> list[Prompt]:
    return [{"id": f"prompt {i + 1}", "category": "prompts", "prompt": text} for i, text in enumerate(question.prompts)]


def _of(length: int | str, found: Sequence[Measurement]) -> list[Measurement]:
    return [m for m in found if m.condition.draft_length == length]


def _baseline(found: Sequence[Measurement]) -> dict[str, Any]:
    """The row of draft length 0, which is the baseline lane: its speedup is 1 by definition."""
    speed = _estimated(found, lambda m: m.baseline.tokens_per_second)
    return {"draft_length": 0, "races": len(found), "speedup": None, "tokens_per_second": speed}


def _measured(length: int | str, found: Sequence[Measurement]) -> dict[str, Any]:
    here = _of(length, found)
    return {
        "draft_length": length,
        "races": len(here),
        "speedup": _estimated(here, lambda m: m.speedup),
        "tokens_per_second": _estimated(here, lambda m: m.speculative.tokens_per_second),
        "acceptance_rate": _middle([m.speculative.acceptance_rate for m in here]),
        "tokens_per_pass": _middle([m.speculative.tokens_per_pass for m in here]),
    }


def _estimated(found: Sequence[Measurement], pick: Callable[[Measurement], float | None]) -> dict[str, Any] | None:
    groups: dict[str, list[float]] = {}
    for m in found:
        if (value := pick(m)) is not None:
            groups.setdefault(m.prompt, []).append(value)
    made: Estimate | None = estimate(groups)
    return {"median": made.median, "low": made.low, "high": made.high} if made else None


def _middle(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None
