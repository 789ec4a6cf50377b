"""The method of the benchmark: every prompt under every condition, in shuffled order, each lane beside its baseline.

In: a source, a grid of conditions, prompts, instruments. Out: a `Measurement` after each race, or run of a peer. The
two lanes of a race take turns round by round, so their ratio meets one machine; conditions, prompts and repeats are
interleaved, so that a machine that changes changes for all of them. Warm-up races are discarded. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol

from ..errors import PromptError, UserError
from ..events import BASELINE, SPECULATIVE, Round, Trace
from ..metrics import ratio
from ..request import Request
from ..settings import Settings
from ..sources import Race, Source
from .background import extended
from .datasets import Prompt
from .figures import lane_figures, peer_figures
from .gauges import Gauges
from .measurement import PEER, Condition, Measurement, ModelSize
from .plan import FOLLOW_UPS, Grid, Task

WARM_UP = "Warm up."
WARM_UP_TOKENS = 8

Sizes = Callable[[], tuple[ModelSize | None, ModelSize | None]]


class Others(Protocol):
    """The peers, as `peers.Peers`."""

    def run(self, name: str, ids: list[int], settings: Settings) -> dict[str, Any] | None: ...


@dataclass
class Instruments:
    """What measures beside the lanes' clocks.

    gauges: of the machine; None for a source that runs on another one.
    sizes: of the target and of the drafter that was raced last.
    fastest: bytes per second that this machine reads.
    """

    gauges: Gauges | None = None
    sizes: Sizes = lambda: (None, None)
    fastest: float | None = None


@dataclass
class Bench:
    """A benchmark of a source.

    Attributes:
        peers: other engines, tuned and warm; None where the grid names none.
        say: is told in one line what is left out, and why.
        warmed: races that were run and discarded.
    """

    source: Source
    grid: Grid
    prompts: Sequence[Prompt]
    instruments: Instruments = field(default_factory=Instruments)
    peers: Others | None = None
    say: Callable[[str], None] = lambda line: None
    warmed: int = 0

    def __post_init__(self) -> None:
        self._texts: dict[tuple[int, int | None], str] = {}  # by prompt and context
        self._answers: dict[tuple[Any, ...], str] = {}  # of the target, by conversation and turn
        self._ids: dict[tuple[int, int | None], list[int]] = {}
        self._loaded: str | None = None

    def check(self) -> None:
        """Extends the prompts to the contexts that are asked for, and asks whether each one fits.

        Raises:
            PromptError: a prompt is too long.
            UserError: a prompt cannot be extended to a context.
        """
        for number, prompt in enumerate(self.prompts):
            for context in self.grid.contexts or (None,):
                text = prompt["prompt"]
                if context is not None:
                    text = extended(text, context, self.tokens)
                self._texts[number, context] = text
                self.tokens(text)

    def tokens(self, text: str) -> int:
        """Tokens of a prompt, its chat template included.

        Raises:
            PromptError: it is too long.
        """
        race = self.source.race(Request(text, self.grid.settings))
        try:
            return race.trace.prompt_tokens
        finally:
            race.close()

    def warm_up(self) -> dict[str, Trace]:
        """Races a few tokens under each drafter, draft length, rule and temperature, which nobody counts, and returns
        the last of these races for each drafter.

        Raises:
            UserError: the source refuses one of the conditions.
        """
        traces = {}
        for drafter in self.grid.drafters:
            for condition in dict.fromkeys(
                Condition(c.draft_length, drafter, c.rule, c.temperature)
                for c in self.grid.conditions()
                if c.drafter == drafter and not c.peer
            ):
                traces[drafter] = self._warm(self.grid.settings_of(condition, 0), drafter)
        return traces

    def _warm(self, settings: Settings, drafter: str) -> Trace:
        short = Settings(**{**settings.to_dict(), "max_new_tokens": WARM_UP_TOKENS})
        race = self.source.race(Request(WARM_UP, short, drafter=drafter))
        try:
            for _ in race.steps():
                pass
        finally:
            race.close()
        self.warmed += 1
        self._loaded = drafter
        return race.trace

    def cold(self) -> None:
        """Somebody else has used the source: the next race is warmed up for."""
        self._loaded = None

    def left(self, done: Collection[Measurement] = ()) -> list[Task]:
        """The tasks that are not among these measurements, in their order."""
        keys = {m.key for m in done}
        tasks = self.grid.order(len(self.prompts))
        return [t for t in tasks if (t.condition, self.prompts[t.prompt]["id"], t.repeat) not in keys]

    def run(self, done: Collection[Measurement] = ()) -> Iterator[Measurement]:
        """Measures what is left, after `check` and `warm_up`. What a source or a peer refuses is left out, which `say`
        is told.

        Raises:
            UserError: the source cannot go on.
        """
        for made in done:
            self._remember(made)
        for task in self.left(done):
            measurement = self._peer(task) if task.condition.peer else self._race(task)
            if measurement is not None:
                self._remember(measurement)
                yield measurement

    def _race(self, task: Task) -> Measurement | None:
        condition = task.condition
        settings = self.grid.settings_of(condition, task.repeat)
        history = self._history(task)
        if history is None:
            return None
        text = self._question(task)
        if condition.drafter != self._loaded:
            self._warm(settings, condition.drafter)
        try:
            race = self.source.race(Request(text, settings, drafter=condition.drafter, history=history))
        except PromptError as error:
            self._left_out(task, error)
            return None
        return self._measured(task, race, settings)

    def _measured(self, task: Task, race: Race, settings: Settings) -> Measurement:
        if race.request.settings != settings:
            race.close()
            raise UserError("This source plays a recording of other settings; benchmark it under those it has.")
        tools, gauges = self.instruments, self.instruments.gauges
        begun = _now()
        try:
            if gauges:
                gauges.begin()
            for step in race.steps():
                if gauges:
                    gauges.lap(step.lane if isinstance(step, Round) and step.index > 0 else None)
        finally:
            race.close()
        trace, (target, drafter) = race.trace, tools.sizes()
        lanes = {
            lane: lane_figures(trace, lane, gauges.reading(lane) if gauges else None, target, tools.fastest)
            for lane in (BASELINE, SPECULATIVE)
        }
        base, fast = lanes[BASELINE], lanes[SPECULATIVE]
        return Measurement(
            condition=task.condition,
            prompt=self.prompts[task.prompt]["id"],
            category=self.prompts[task.prompt]["category"],
            repeat=task.repeat,
            order=task.order,
            date=trace.date or begun,
            prompt_tokens=trace.prompt_tokens,
            lanes=lanes,
            speedup=ratio(fast.tokens_per_second, base.tokens_per_second),
            end_to_end_speedup=ratio(fast.end_to_end_tokens_per_second, base.end_to_end_tokens_per_second),
            identical=None if trace.settings.get("synthetic_acceptance") is not None else trace.identical,
            same_text=settings.same_text and self.source.promises.same_text,
            costs=trace.costs,
            target=target,
            drafter=drafter,
            **({"machine": gauges.state()} if gauges else {}),
        )

    def _peer(self, task: Task) -> Measurement | None:
        assert self.peers is not None
        history = self._history(task)
        if history is None:
            return None
        try:
            ids = self._ids_of(task, history)
        except PromptError as error:
            self._left_out(task, error)
            return None
        begun, gauges = _now(), self.instruments.gauges
        if gauges:
            gauges.begin()
        settings = self.grid.settings_of(task.condition, task.repeat)
        answer = self.peers.run(task.condition.engine, ids, settings)
        if answer is None:
            return None
        prompt = self.prompts[task.prompt]
        lanes = {PEER: peer_figures(answer)}
        return Measurement(
            task.condition, prompt["id"], prompt["category"], task.repeat, task.order, begun, len(ids), lanes
        )  # fmt: skip

    def ids(self, prompt: int, context: int | None = None) -> list[int]:
        """The token ids of a prompt, its chat template included, which peers are given too.

        Raises:
            UserError: the source does not tell them.
        """
        if (prompt, context) not in self._ids:
            self._ids[prompt, context] = self._encoded(self._texts[prompt, context])
        return self._ids[prompt, context]

    def room(self) -> int:
        """Tokens that later turns may add to a prompt, at most: answers, and questions with their templates."""
        more = (self.grid.turns or 1) - 1
        return more and more * (self.grid.settings.max_new_tokens + max(self.tokens(text) for text in FOLLOW_UPS))

    def _ids_of(self, task: Task, history: tuple[tuple[str, str], ...]) -> list[int]:
        if not history:
            return self.ids(task.prompt, task.condition.context)
        return self._encoded(self._question(task), history)

    def _encoded(self, text: str, history: tuple[tuple[str, str], ...] = ()) -> list[int]:
        race = self.source.race(Request(text, self.grid.settings, drafter=self._loaded, history=history))
        race.close()
        ids: list[int] | None = getattr(race, "ids", None)
        if ids is None:
            raise UserError("Peers run beside a pair on this machine only, since they are given its prompt ids.")
        return ids

    def _question(self, task: Task) -> str:
        """What is asked in this turn."""
        turn = task.condition.turn or 1
        first = self._texts[task.prompt, task.condition.context]
        return first if turn == 1 else FOLLOW_UPS[(turn - 2) % len(FOLLOW_UPS)]

    def _left_out(self, task: Task, error: PromptError) -> None:
        self.say(f"{self.prompts[task.prompt]['id']}, turn {task.condition.turn or 1}, is left out: {error}")

    def _history(self, task: Task) -> tuple[tuple[str, str], ...] | None:
        """The turns before this one, with the answers that the target gave; None where one is missing."""
        last = task.condition.turn or 1
        asked = [self._texts[task.prompt, task.condition.context], *(FOLLOW_UPS * last)[: last - 1]]
        turns = []
        for turn in range(1, last):
            answer = self._answers.get((*self._conversation(self.prompts[task.prompt]["id"], task), turn))
            if not answer:
                self.say(f"{self.prompts[task.prompt]['id']}, turn {last}, is left out: turn {turn} has no answer.")
                return None
            turns.append((asked[turn - 1], answer))
        return tuple(turns)

    def _remember(self, measurement: Measurement) -> None:
        """Keeps the target's own answer, which is the same in every race with this seed."""
        if measurement.condition.turn and not measurement.condition.peer:
            key = (*self._conversation(measurement.prompt, measurement), measurement.condition.turn)
            self._answers.setdefault(key, measurement.baseline.text)

    @staticmethod
    def _conversation(prompt: str, what: Task | Measurement) -> tuple[Any, ...]:
        return prompt, what.condition.temperature, what.condition.context, what.repeat


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
