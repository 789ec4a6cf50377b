"""A recorded race, played back without a model.

In: a `Trace`. Out: its rounds in the order and at the pace in which they happened, and a trace that in the end equals
the recorded one. Imports no torch.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..events import Promises, Round, Trace
from ..request import Request
from ..share.unpack import trace_text
from . import Recording


def read(path: str | Path) -> Trace:
    """The trace in a file: plain, compressed by gzip, or a saved replay (`share.saved`).

    Raises:
        UserError: the file cannot be read, or holds no trace.
    """
    try:
        return Trace.from_json(trace_text(Path(path).read_bytes()))
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"{path} cannot be replayed: {error}.") from error


class ReplaySource:
    """Plays one trace back, whatever is asked for.

    Args:
        speed: how many times as fast as it was recorded; infinity does not wait.

    Raises:
        UserError: the trace holds no rounds, or its request is of another version of this package.
    """

    can_think = False
    can_branch = False

    def __init__(self, trace: Trace, speed: float = 1.0) -> None:
        if not trace.rounds:
            raise UserError("The trace cannot be replayed: it holds no rounds.")
        if not speed > 0:
            raise UserError(f"A recording is played at a speed above 0, not {speed:g}.")
        try:
            request = Request.from_dict(trace.request)
        except UserError as error:
            raise UserError(f"The trace cannot be replayed: {error}") from error
        self.trace = trace
        self.speed = speed
        machine = trace.machine.get("gpu") or trace.machine.get("processor") or "another machine"
        self.recording = Recording(request, str(machine), trace.date)

    @property
    def info(self) -> dict[str, Any]:
        return self.trace.pair

    @property
    def drafters(self) -> tuple[str, ...]:
        return (self.trace.pair["drafter"],)

    @property
    def promises(self) -> Promises:
        return self.trace.promises

    def race(self, request: Request) -> ReplayRace:
        """The recorded race, which is that of the recorded request."""
        return ReplayRace(self.trace, self.recording.request, self.speed)


class ReplayRace:
    """The rounds of a trace, each after as much time as it took. The prompt was read once for both lanes, so the second
    lane waits for it no more."""

    def __init__(self, trace: Trace, request: Request, speed: float) -> None:
        self.request = request
        self._recorded = trace
        self._speed = speed
        self._played: list[Round] = []
        self._stopped = threading.Event()
        self._why = "running"

    def __iter__(self) -> Iterator[Round]:
        """Rounds as they happened."""
        return self.steps()

    def steps(self) -> Iterator[Round]:
        """Rounds as they happened."""
        clocks: dict[str, float] = {}
        prefill = 0.0
        for r in self._recorded.rounds:
            seconds = max(r.clock - clocks.get(r.lane, prefill), 0.0)
            if self._stopped.wait(min(seconds / self._speed, threading.TIMEOUT_MAX)):
                return
            prefill = prefill or r.clock
            clocks[r.lane] = r.clock
            self._played.append(r)
            yield r

    def pieces(self, rounds: Iterable[Round]) -> dict[str, str]:
        """The texts of the alternatives of these rounds, as far as they were recorded."""
        known = self._recorded.pieces
        return {key: known[key] for r in rounds for key in map(str, r.alternatives) if key in known}

    def stop(self, why: str = "cancelled") -> None:
        """Ends the playback at once; may be called from any thread. `why` stands in `finish` for lanes that had not
        ended."""
        if not self._stopped.is_set():
            self._why = why
        self._stopped.set()

    def close(self) -> None:
        """As `stop`: there is nothing to free."""
        self.stop()

    @property
    def trace(self) -> Trace:
        """The recorded trace as far as it was played."""
        recorded, played = self._recorded, tuple(self._played)
        left = {r.lane for r in recorded.rounds[len(played) :]}
        finish = {lane: self._why if lane in left else why for lane, why in recorded.finish.items()}
        return replace(recorded, rounds=played, finish=finish)
