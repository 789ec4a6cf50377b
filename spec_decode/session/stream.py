"""One race from prompt to trace, as a stream of what a page has to show.

In: an `Engine` and a `Request`. Out: `View`s, a few a second: a batch of new rounds, now and then with series for the
figures, and the trace at the end. Closing the iterator frees the device: the race is stopped and closed in `finally`.
"""

from __future__ import annotations

import json
import math
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import UserError
from ..events import Trace
from ..request import Request
from .branch import offer
from .caption import about, head
from .curves import Curves, Throttle, final
from .device import Engine
from .feed import Feed
from .tally import Tally

SLICE = 0.08  # seconds of work between two updates of the page, at least
LONGEST = 0.3  # and at most
UNWATCHED = 0.5  # where there is no page
PATIENCE = 12  # a slice lasts this many times as long as the engine just waited for the page


@dataclass(frozen=True)
class View:
    """One update of the page: the batch for the token view, and the trace when finished. `problem` is what it failed
    of, `notice` why it was stopped, or what the engine says of the race as a whole."""

    batch: str
    trace: Trace | None = None
    problem: str | None = None
    counts: dict[str, int] = field(default_factory=dict)  # tokens so far by lane
    notice: str | None = None


def run(
    engine: Engine, visitor: str, request: Request, feed: Feed, draw: bool = True, keep_system: bool = False
) -> Iterator[View]:
    """Races for `visitor`, a session, and yields what to show. A device out of memory ends in a `View` with a
    `problem`, what came before kept.

    Without `draw` there are no figures, and updates are rare: nobody is watching. A race that takes longer than
    `engine.limits` allow is stopped and says so in a `notice`, what came before kept. While a long prompt is read,
    updates without rounds come, each with "reading": [tokens read, of how many]. What the engine says of a lane while
    it runs stands in "notes", the latest sentence of each. The last batch has in "trace" what else the trace says than
    rounds, as it may leave this machine; with `keep_system` the system prompt too.
    The end brings what branches are made of (`branch.offer`).

    Raises:
        PromptError, ModelError, SettingsError: the race could not begin.
    """
    race = engine.open(visitor, request)
    try:
        tally, curves, throttle = Tally(), Curves(), Throttle()
        now = engine.status()
        what = about(race.request, race.trace.pair, now.promises, now.recording)
        began = time.perf_counter()
        yield View(feed.batch("running", tally.to_dict(), about=what), counts=dict.fromkeys(tally.lanes, 0))
        done, problem = False, None
        seconds = SLICE if draw else UNWATCHED
        limit = engine.limits.seconds
        while not done:
            left = math.inf if limit is None else began + limit - time.perf_counter()
            if left <= 0:
                race.stop("time")
            try:
                rounds, done = race.advance(min(seconds, max(left, 0.0)))
            except UserError as error:
                rounds, done, problem = [], True, str(error)
            except Exception as error:  # the page must outlive whatever a library throws
                traceback.print_exc(file=sys.stderr)
                rounds, done, problem = [], True, f"The race broke off ({type(error).__name__}: {error})."
            pause = time.perf_counter()
            for r in rounds:
                tally.add(r)
                curves.add(r)
            feed.add(rounds, race.pieces(rounds) if draw else {})
            trace = race.trace if done else None
            lasting = [str(note) for note in race.notes if note.lasting]
            cut = trace is not None and "time" in trace.finish.values()
            notice = f"Stopped after {limit:g} seconds, which is as long as a race may take here." if cut else None
            notice = notice or (". ".join(lasting) + "." if trace is not None and lasting else None)
            more: dict[str, Any] = {"about": what | offer(now, race.request) if trace else what}
            if draw and (done or throttle.due()):
                start = time.perf_counter()
                more["figures"] = curves.live() | {"final": final(trace) if trace else None}
                throttle.drawn(time.perf_counter() - start)
            if trace:
                more["head"] = head(trace)
            if race.reading:
                more["reading"] = [race.reading.read, race.reading.total]
            if trace and trace.costs:
                more["costs"] = trace.costs.to_dict()
            if race.notes:
                more["notes"] = {note.lane: note.text for note in race.notes}
            if draw and trace:
                more["trace"] = _head(trace.exported(system=keep_system))
            stats = tally.to_dict(trace) | {"wall": time.perf_counter() - began}
            batch = feed.batch("failed" if problem else "done" if done else "running", stats, **more)
            yield View(batch, trace, problem, {name: lane.tokens for name, lane in tally.lanes.items()}, notice)
            if draw:
                waited = time.perf_counter() - pause
                seconds += 0.3 * (min(LONGEST, max(SLICE, PATIENCE * waited)) - seconds)
    finally:
        engine.close(visitor, race)


def _head(trace: Trace) -> dict[str, Any]:
    """All of a trace but its rounds and the texts of their alternatives, which a page that saw the race has."""
    data: dict[str, Any] = json.loads(replace(trace, rounds=(), pieces={}).to_json())
    return {name: value for name, value in data.items() if name not in ("rounds", "pieces")}
