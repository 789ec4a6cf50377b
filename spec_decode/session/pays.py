"""Does it pay? The benchmark on the page: prompts at every draft length, between the races of other visitors.

In: an `Engine`, prompts and a request that says what is the same for all. Out: `View`s, one after each measurement:
JSON for the page with a row for each draft length, and in the end the advisor's paragraph, its figure and the reports.
The method is that of `python -m spec_decode bench`: interleaved, shuffled by a seed, warmed up, paired with the
baseline.

A measurement is one race of both lanes. It has the device alone (`device.Turns`), and gives it back afterwards: whoever
waits for a race waits for one measurement, not for the job. Tables are made before it is given back, so that their
making disturbs no race. PyTorch is not touched here.
"""

from __future__ import annotations

import json
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import TimeoutError as TooLong
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from ..errors import PromptError, SettingsError, UserError
from ..request import Request
from .caption import caption
from .device import Engine
from .feed import dumps
from .held import Held
from .pays_prompts import MOST_PROMPT_TOKENS, Prompt
from .pays_tables import baseline, categories, notes, row

if TYPE_CHECKING:
    from ..bench.measurement import Measurement
    from ..bench.method import Bench
    from ..bench.record import Contents
    from ..bench.reports import Reports

LENGTHS: tuple[int | str, ...] = (1, 2, 4, 8, "adaptive")  # γ = 0 is the baseline lane, which is in every race
REPEATS = 3
MOST_TOKENS = 256  # new tokens a lane
USUAL_TOKENS = 96
MOST_SECONDS = 3_600  # of a whole job
PATIENCE = 1.0  # seconds that a job waits for a turn at a stretch
RAW = "spec-decode-measurements.jsonl"
OFF = "Measuring draft lengths is switched off on this server."
NO_MODEL = "This page plays a recording; draft lengths are measured where a model runs."


@dataclass(frozen=True)
class Wanted:
    """What is to be measured.

    prompts: {"id", "category", "prompt"} each.
    request: whose settings, drafter and system prompt hold for all; its own prompt and draft length do not count.
    reports: whether reports are made in the end.
    """

    prompts: tuple[Prompt, ...]
    request: Request
    reports: bool = False

    @classmethod
    def of_race(cls, data: object) -> Wanted:
        """The prompt of a finished race, as its `Request.to_dict`.

        Raises:
            UserError: it is no request.
        """
        asked = Request.from_dict(data)
        few = replace(asked.settings, max_new_tokens=min(asked.settings.max_new_tokens, MOST_TOKENS))
        prompt = {"id": "this prompt", "category": "prompts", "prompt": asked.prompt}
        return cls((prompt,), replace(asked, settings=few))

    def shape(self, request: Request) -> Request:
        """A request of the benchmark, asked as this one is."""
        asked = self.request
        return replace(
            request,
            system=asked.system,
            thinking=asked.thinking,
            truncate=asked.truncate,
            prefix=asked.prefix,
            drafter=request.drafter or asked.drafter,
        )

    def check(self, engine: Engine) -> None:
        """Raises UserError where this server does not measure it."""
        settings = self.request.settings
        if not engine.limits.measure:
            raise SettingsError("measure", OFF)
        if settings.max_new_tokens > MOST_TOKENS:
            raise SettingsError(
                "max_new_tokens", f"At most {MOST_TOKENS} new tokens are measured, not {settings.max_new_tokens:,}."
            )
        if settings.max_new_tokens < 8:
            raise SettingsError("max_new_tokens", "Fewer than 8 new tokens are too few for a rate.")
        engine.limits.check(settings)
        if engine.status().recording:
            raise SettingsError("measure", NO_MODEL)


@dataclass(frozen=True)
class View:
    """One update of the page: JSON for the view, and in the end the reports by the name of their file."""

    text: str
    reports: dict[str, str] = field(default_factory=dict)


class Desk:
    """The jobs of a page's visitors. One runs at a time, which Gradio's queue sees to."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._running: dict[str, Job] = {}
        self._lock = threading.Lock()

    def run(self, visitor: str, wanted: Wanted) -> Iterator[View]:
        """Measures for `visitor` and yields what to show. Closing the iterator ends the job. A source that fails on the
        way, and `stop`, end it too: what was measured is kept, and told in the last `View`.

        Raises:
            UserError: it could not begin.
        """
        wanted.check(self.engine)
        job = Job(self.engine, wanted)
        with self._lock:
            self._running[visitor] = job
        try:
            yield from job.run()
        finally:
            job.stop()
            with self._lock:
                if self._running.get(visitor) is job:
                    del self._running[visitor]

    def stop(self, visitor: str) -> bool:
        """Stop this visitor's job within a round; False when there is none. May be called from any thread."""
        with self._lock:
            job = self._running.get(visitor)
        if job:
            job.stop()
        return job is not None


class Job:
    """One visitor's measurements."""

    def __init__(self, engine: Engine, wanted: Wanted) -> None:
        self._engine, self._wanted = engine, wanted
        self._stopped = threading.Event()
        self._held: Held | None = None
        self._rows: dict[int | str, dict[str, Any]] = {}
        self._left_out: list[str] = []

    def stop(self) -> None:
        """Ends the job within a round."""
        self._stopped.set()
        if self._held:
            self._held.stop()

    def run(self) -> Iterator[View]:
        engine, turns = self._engine, self._engine.turns
        begun: tuple[Bench, Contents] | None = None
        while begun is None:
            yield self._view("warming")
            with turns.alone(self._given_up()) as mine:
                if mine:
                    begun, races = engine.submit(self._begin).result(), turns.races
            if self._stopped.is_set() and begun is None:
                yield self._view("stopped", done=0, of=0)
                return
        bench, contents = begun
        planned = int(contents.header["planned"])
        measuring, began, words = bench.run(), time.perf_counter(), ""
        view = self._view("running", of=planned)
        while True:
            yield view
            if self._stopped.is_set():
                break
            if time.perf_counter() - began > MOST_SECONDS:
                words = f"Stopped after {MOST_SECONDS // 60} minutes, which is as long as this may take."
                break
            with turns.alone(self._given_up()) as mine:
                if not mine:
                    continue
                if turns.races != races:
                    bench.cold()
                    races = turns.races
                try:
                    made = self._next(measuring)
                except UserError as error:
                    words = str(error)
                    break
                except Exception as error:  # the page must outlive whatever a library throws
                    traceback.print_exc(file=sys.stderr)
                    words = f"The measurement broke off ({type(error).__name__}: {error})."
                    break
                if made is None:
                    break
                if "cancelled" in {lane.finish for lane in made.lanes.values()}:
                    continue  # half of a measurement is none
                contents.measurements.append(made)
                self._count(made, contents.measurements)
            done = len(contents.measurements)
            left = (time.perf_counter() - began) / done * (planned - done)
            view = self._view("running", done=done, of=planned, left=round(left, 1))
        if self._stopped.is_set():
            view = self._view("stopping", done=len(contents.measurements), of=planned)
            yield view
        last: View | None = None
        while last is None:
            with turns.alone(self._given_up(stopped=False)) as mine:
                if mine:
                    last = self._last(bench, contents, words)
            yield last or view

    def _given_up(self, stopped: bool = True) -> Callable[[], bool]:
        """Asked by a wait for a turn: it is over after `PATIENCE`, and where a job is not to be `stopped` before it
        has its turn, with the job. Then the iterator can be closed, and a visitor who has gone is noticed."""
        end = time.monotonic() + PATIENCE
        return lambda: (stopped and self._stopped.is_set()) or time.monotonic() > end

    def _begin(self) -> tuple[Bench, Contents]:
        """On the engine's thread: the plan, the prompts counted, everything warmed up."""
        from ..bench.gauges import Gauges, read_bandwidth
        from ..bench.method import Bench, Instruments
        from ..bench.plan import Grid
        from ..bench.record import FORMAT, VERSION, Contents
        from ..bench.reports import header

        wanted, source = self._wanted, self._engine.source
        self._held = held = Held(source, wanted.shape)
        if self._stopped.is_set():
            held.stop()
        settings = wanted.request.settings
        gauges = Gauges(str(held.info.get("device", "cpu")))
        grid = Grid(
            settings=settings,
            draft_lengths=LENGTHS,
            drafters=(wanted.request.drafter or held.drafters[0],),
            rules=(None if settings.synthetic else settings.rule,),
            temperatures=(settings.temperature,),
            repeats=REPEATS,
        )
        instruments = Instruments(gauges)
        bench = Bench(held, grid, wanted.prompts, instruments, say=self._left_out.append)
        for prompt in wanted.prompts:
            tokens = _counted(bench, prompt, len(wanted.prompts))
            if tokens > MOST_PROMPT_TOKENS and len(wanted.prompts) > 1:
                raise PromptError(
                    f"The prompt “{prompt['id']}” has {tokens:,} tokens; at most {MOST_PROMPT_TOKENS:,} are measured."
                )
        bench.check()
        traces = {name: trace.exported() for name, trace in bench.warm_up().items()}
        bandwidth = read_bandwidth(str(held.info.get("device", "cpu")))
        instruments.fastest = bandwidth["bytes_per_second"]
        told = header(bench, traces, {"bandwidth": bandwidth, "missing": gauges.missing}, "python app.py")
        return bench, Contents({"format": FORMAT, "version": VERSION, **told})

    def _next(self, measuring: Iterator[Measurement]) -> Measurement | None:
        """The next measurement; None at the end."""
        limit = self._engine.limits.seconds
        future = self._engine.submit(lambda: next(measuring, None))
        try:
            return future.result(limit)
        except TooLong:
            if future.done() or self._held is None:  # what the measurement itself raised
                raise
            self._held.cut()
            return future.result()

    def _count(self, made: Measurement, all_made: Sequence[Measurement]) -> None:
        """The rows that this measurement belongs to, made anew."""
        from ..bench.summary import result

        told = [m for m in all_made if m.condition == made.condition]
        self._rows[made.condition.draft_length] = row(made.condition, result(made.condition, (), told))
        self._rows[0] = baseline(all_made)

    def _view(self, phase: str, **more: Any) -> View:
        rows = [self._rows[length] for length in (0, *LENGTHS) if length in self._rows]
        asked, pair = self._wanted.request, self._engine.status().pair or {}
        info = pair | {"drafter": asked.drafter or pair.get("drafter")}
        about = caption(asked, info)
        ran = [said for said in about["settings"] if not said.startswith("draft length")]
        count = len(self._wanted.prompts)
        shown = {"phase": phase, "prompts": count, "ran": ran, "rows": rows, **more}
        if not self._wanted.reports:
            shown["prompt"] = about["prompt"]
        return View(dumps(shown))

    def _last(self, bench: Bench, contents: Contents, words: str) -> View:
        """The end: the advisor's paragraph and the figure where anything was measured, and the reports."""
        from ..bench.reports import Reports

        done, planned = len(contents.measurements), int(contents.header["planned"])
        whole = not words and not self._stopped.is_set()
        contents.notes["warm_up"] = bench.warmed
        if whole:
            contents.notes["end"] = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        more: dict[str, Any] = {"done": done, "of": planned, "words": words, "left_out": self._left_out}
        reports: dict[str, str] = {}
        if done:
            made = Reports(contents, RAW)
            more["advice"] = [
                {"text": sentence.text, "refers": sentence.refers}
                for advice in made.advice
                for sentence in advice.sentences
            ]
            more["choice"] = made.advice[0].draft_length if made.advice else None
            more["why"] = made.why[0] if made.why else None
            more["notes"] = notes(made.figures)
            more["categories"] = categories(made.figures)
            if self._wanted.reports:
                reports = _files(made, contents)
        return replace(self._view("done" if whole else "stopped", **more), reports=reports)


def _counted(bench: Bench, prompt: Prompt, prompts: int) -> int:
    """Tokens of a prompt."""
    try:
        return bench.tokens(prompt["prompt"])
    except PromptError as error:
        if prompts == 1:
            raise
        raise PromptError(f"The prompt “{prompt['id']}” cannot be measured: {error}") from error


def _files(made: Reports, contents: Contents) -> dict[str, str]:
    """The reports, and the raw measurements as `bench --report` reads them."""
    lines: list[dict[str, Any]] = [{"header": contents.header}, *(m.to_dict() for m in contents.measurements)]
    lines += [{"note": {name: value}} for name, value in contents.notes.items()]
    raw = "".join(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n" for line in lines)
    return {
        "spec-decode-report.html": made.html,
        "spec-decode-report.md": made.markdown,
        "spec-decode-report.json": made.json,
        RAW: raw,
    }


def idle() -> str:
    """The view before the first measurement."""
    return dumps({"phase": "idle"})


def waiting() -> str:
    """The view of a job that waits for its turn."""
    return dumps({"phase": "waiting"})


def left() -> str:
    """What is said of a job that has left the queue."""
    return dumps({"phase": "left"})


def failed(words: str) -> str:
    """The view of a job that could not begin."""
    return dumps({"phase": "failed", "words": words})
