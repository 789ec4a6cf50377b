"""The device of the page: loads its source in the background, then runs one race at a time on one thread.

In: a loader of a `Source`. Out: `status()` for the page, `open`, `advance`, `close` for a race, and `turns` for what
must not run beside one. The source is called on one worker thread alone, since thread-local state (inference mode, CUDA
context, thread teams) must not change under a race. A race advances only while `advance` waits for it, so sending and
drawing never run on a lane's clock.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from ..errors import ModelError, SettingsError, UserError
from ..events import Note, Promises, Reading, Round, Trace
from ..request import Request
from ..settings import Settings
from ..sources import Race, Recording, Source

T = TypeVar("T")
Progress = Callable[[str], None]
LOOK = 0.2  # seconds between two looks of those who wait for a turn at whether they still should

ABSENT = (
    "This server has no model: it shows recordings. To race your own prompts, run Spec Decode on your machine: "
    "python app.py."
)


@dataclass(frozen=True)
class Status:
    """Where the engine stands: `message` is one sentence for the visitor; "absent" says that there is no model and will
    be none. Once ready, `pair` is `Source.info`, the
    fields below it are those of the source, and `thinking` says how its switch stands at first, None where there is
    none."""

    phase: Literal["loading", "ready", "failed", "absent"]
    message: str
    pair: dict[str, Any] | None = None
    drafters: tuple[str, ...] = ()
    promises: Promises = field(default_factory=Promises)
    recording: Recording | None = None
    thinking: bool | None = None
    branches: bool = False  # `Source.can_branch`


@dataclass(frozen=True)
class Limits:
    """What one visitor may take of a device that is shared: new tokens a lane, and seconds of a race or a test, where
    None sets no limit; whether there is an exactness lab (`lab`), and whether draft lengths can be measured, which
    takes minutes (`measure`)."""

    new_tokens: int | None = None
    seconds: float | None = None
    lab: bool = True
    measure: bool = True

    def check(self, settings: Settings) -> None:
        """Raises SettingsError where these settings ask for more."""
        if self.new_tokens is not None and settings.max_new_tokens > self.new_tokens:
            raise SettingsError(
                "max_new_tokens",
                f"This server writes at most {self.new_tokens:,} new tokens a lane, not {settings.max_new_tokens:,}.",
            )


class Gone(BaseException):
    """Whoever waited for a turn no longer wants it. No error of theirs: nobody is left to be told."""


class Turns:
    """Whose turn it is: of races, or of one measurement that takes minutes as a whole and must not be disturbed.

    A measurement has the device alone, once no race is open and none waits; so a race waits for one measurement at
    most, never for the whole of them. Between two races it is the turn of a measurement: Gradio begins the next race a
    moment after the last. Races among themselves are kept apart by Gradio's queue.

    A call that is cancelled leaves a thread behind, whose race may stay open for as long as something holds it. No
    measurement waits for that.

    Attributes:
        races: how many were begun so far.
        caller: asked by whoever begins a race, in its own thread; what it returns tells whether that caller has gone.
    """

    def __init__(self) -> None:
        self.races = 0
        self.caller: Callable[[], Callable[[], bool]] = lambda: lambda: False
        self._changed = threading.Condition()
        self._open: dict[object, Callable[[], bool]] = {}  # races → whether their callers have gone
        self._waiting = 0
        self._measuring = False

    def begin_race(self) -> Callable[[], None]:
        """Waits until no measurement runs. Returns what is to be called when the race is over; once is enough.

        Raises:
            Gone: the caller has gone meanwhile.
        """
        race, gone = object(), self.caller()
        with self._changed:
            self._waiting += 1
            try:
                while self._measuring and not gone():
                    self._changed.wait(LOOK)
            finally:
                self._waiting -= 1
                self._changed.notify_all()
            if gone():
                raise Gone
            self._open[race] = gone
            self.races += 1

        def end() -> None:
            with self._changed:
                self._open.pop(race, None)
                self._changed.notify_all()

        return end

    @contextmanager
    def shared(self) -> Iterator[None]:
        """The turn of something that takes the device as a race does; raises as `begin_race`."""
        end = self.begin_race()
        try:
            yield
        finally:
            end()

    @contextmanager
    def alone(self, given_up: Callable[[], bool] = lambda: False) -> Iterator[bool]:
        """Waits until nothing else uses the device, and keeps races waiting. False once it was given up before that,
        which is asked a few times a second."""
        with self._changed:
            while not (free := self._free()) and not given_up():
                self._changed.wait(LOOK)
            self._measuring = self._measuring or free
        try:
            yield free
        finally:
            if free:
                with self._changed:
                    self._measuring = False
                    self._changed.notify_all()

    def _free(self) -> bool:
        return not (self._measuring or self._waiting) and all(gone() for gone in self._open.values())


class Engine:
    """The device, its source and its queue of one. What is loaded, and what fails, also goes to standard error."""

    def __init__(
        self, load: Callable[[Progress], Source] | None, thinking: bool = False, limits: Limits | None = None
    ) -> None:
        """`load(progress)` returns the source, None stands for a server that has none; `thinking` is how the switch
        stands at first, where there is one."""
        self._load = load
        self._thinking = thinking
        self.limits = limits or Limits()
        self.turns = Turns()
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self._status = Status("loading", "Starting.") if load else Status("absent", ABSENT)
        self._lock = threading.Lock()
        self._source: Source | None = None
        self._loading = False
        self._running: dict[str, OpenRace] = {}
        threading.Thread(target=self._work, name="engine", daemon=True).start()

    def start(self) -> None:
        """Load the source in the background; does nothing while it is loading or loaded."""
        load = self._load
        if load is None:
            return
        with self._lock:
            if self._source is not None or self._loading:
                return
            self._loading = True
            self._status = Status("loading", "Loading PyTorch and the model.")
        self.submit(lambda: self._load_now(load))

    def status(self) -> Status:
        """The state for the page; cheap, callable from any thread."""
        return self._status

    @property
    def source(self) -> Source:
        """The source, whose methods run on the engine's thread alone (`submit`).

        Raises:
            ModelError: it is not loaded.
        """
        if self._source is None:
            absent = self._status.phase == "absent"
            raise ModelError(ABSENT if absent else f"The model is not ready: {self._status.message}")
        return self._source

    def open(self, visitor: str, request: Request) -> OpenRace:
        """A race ready to advance. `visitor` is the session that may stop it.

        Raises:
            PromptError: too long. ModelError: not loaded, or the drafter cannot be used. SettingsError: more than
                `limits` allow, or something that the source cannot do.
        """
        self.limits.check(request.settings)
        source = self.source
        end = self.turns.begin_race()
        try:
            opened = OpenRace(self.submit(lambda: source.race(request)).result(), self.submit, end)
        except BaseException:
            end()
            raise
        self._running[visitor] = opened
        return opened

    def close(self, visitor: str, race: OpenRace) -> None:
        """End a race and free its memory; safe to call twice."""
        if self._running.get(visitor) is race:
            del self._running[visitor]
        race.close()

    def stop(self, visitor: str) -> bool:
        """Stop this visitor's race within one round, or one chunk of the prompt; False when there is none."""
        race = self._running.get(visitor)
        if race:
            race.stop()
        return race is not None

    def _load_now(self, load: Callable[[Progress], Source]) -> None:
        def progress(message: str) -> None:
            self._status = Status("loading", message)
            _log(message)

        try:
            source = load(progress)
            thinking = self._thinking if source.can_think else None
            self._source = source
            self._status = Status(
                "ready",
                "Ready.",
                source.info,
                source.drafters,
                source.promises,
                source.recording,
                thinking,
                source.can_branch,
            )
        except UserError as error:
            self._status = Status("failed", str(error))
        except Exception as error:  # whatever a library threw must reach the page as a sentence
            traceback.print_exc(file=sys.stderr)
            self._status = Status("failed", f"The model could not be loaded ({type(error).__name__}: {error}).")
        finally:
            self._loading = False
        if self._status.phase == "failed":
            _log(f"loading failed: {self._status.message}")

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """Runs a job on the engine's thread, after those before it."""
        future: Future[T] = Future()
        self._jobs.put((future, job))
        return future

    def _work(self) -> None:
        while True:
            future, job = self._jobs.get()
            try:
                future.set_result(job())
            except BaseException as error:  # handed to whoever waits on the future
                future.set_exception(error)
            del future, job  # else the last race would stay alive until the next job


def _log(message: str) -> None:
    print(f"Spec Decode: {message}", file=sys.stderr, flush=True)


class OpenRace:
    """A race on the engine's thread, advanced slice by slice."""

    def __init__(
        self, race: Race, submit: Callable[[Callable[[], Any]], Future[Any]], ended: Callable[[], None] = lambda: None
    ) -> None:
        """`ended` is called once, when the race is closed."""
        self.request = race.request
        self._race = race
        self._submit = submit
        self._ended = ended
        self._steps = race.steps()
        self.reading: Reading | None = None  # how far a long prompt has been read, while no lane has a token
        self.notes: list[Note] = []  # what the engine said of its lanes so far
        self._error: Exception | None = None
        self.busy = 0.0  # seconds the engine's thread worked on this race
        self._closed = False

    def advance(self, seconds: float) -> tuple[list[Round], bool]:
        """The rounds of the next `seconds` (at least one round, or one chunk of a prompt that is still being read), and
        True when the race has ended.

        Raises:
            OutOfMemory: the device ran out of memory.
        """
        return self._submit(lambda: self._slice(seconds)).result()

    def _slice(self, seconds: float) -> tuple[list[Round], bool]:
        if self._error:
            raise self._error
        rounds: list[Round] = []
        began = time.perf_counter()
        try:
            return self._until(began + seconds, rounds)
        finally:
            self.busy += time.perf_counter() - began

    def _until(self, end: float, rounds: list[Round]) -> tuple[list[Round], bool]:
        while True:
            try:
                step = next(self._steps, None)
            except Exception as error:
                if not rounds:
                    raise
                self._error = error  # raised by the next call, so that the rounds before it are shown
                return rounds, False
            if step is None:
                return rounds, True
            if isinstance(step, Note):
                self.notes.append(step)
                continue
            if isinstance(step, Round):
                rounds.append(step)
            self.reading = None if isinstance(step, Round) else step
            if time.perf_counter() >= end:
                return rounds, False

    def pieces(self, rounds: list[Round]) -> dict[str, str]:
        """The texts of the alternatives of these rounds, by id."""
        return self._submit(lambda: self._race.pieces(rounds)).result()

    def stop(self, why: str = "cancelled") -> None:
        """End the race within one round, or one chunk of the prompt; callable from any thread. `why` stands in the
        trace."""
        self._race.stop(why)

    @property
    def trace(self) -> Trace:
        return self._race.trace

    def close(self) -> None:
        """Stop, and free the race's memory on the engine's thread without waiting for it."""
        if not self._closed:
            self._closed = True
            self._race.stop()
            self._submit(self._race.close)
            self._ended()
