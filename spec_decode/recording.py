"""The recordings that come with the page: which races they are, how they are recorded, and how they are stored.

In: assets/replays/races.jsonl, and a source that races. Out: one trace a race, compressed by gzip, beside it. Reading
them imports no torch.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from . import metrics
from .events import Token, Trace
from .paths import ASSETS
from .request import Request
from .sources import Source

FOLDER = ASSETS / "replays"
DIGITS = 6  # significant digits of the numbers that are stored
TOP_DIGITS = 4


@dataclass(frozen=True)
class Scene:
    """A race that comes with the page.

    name: of its file. title: of the button that plays it. request: what is raced.
    """

    name: str
    title: str
    request: Request

    def path(self, folder: Path = FOLDER) -> Path:
        """The file of its trace."""
        return folder / f"{self.name}.json.gz"


def scenes() -> tuple[Scene, ...]:
    """The races of assets/replays/races.jsonl, in order; the first is the one that plays by itself."""
    lines = (FOLDER / "races.jsonl").read_text(encoding="utf-8").splitlines()
    rows = (json.loads(line) for line in lines if line.strip())
    return tuple(Scene(row["name"], row["title"], Request.from_dict(row["request"])) for row in rows)


def record(source: Source, folder: Path, runs: int) -> Iterator[tuple[Scene, Trace]]:
    """Races every scene once to warm up and `runs` times more, and stores the run whose speedup is the median.

    Raises:
        OSError: a file cannot be written. UserError: as the source's races.
    """
    for scene in scenes():
        traces = [_raced(source, scene.request) for _ in range(runs + 1)][1:]
        traces.sort(key=lambda trace: metrics.speedup(trace) or 0.0)
        trace = rounded(traces[len(traces) // 2].exported())
        scene.path(folder).write_bytes(packed(trace))
        yield scene, trace


def packed(trace: Trace) -> bytes:
    """The trace as it is stored: the same bytes for the same trace."""
    return gzip.compress(trace.to_json().encode(), 9, mtime=0)


def rounded(trace: Trace, digits: int = DIGITS) -> Trace:
    """The trace with probabilities, seconds and what was compared to so many significant digits: with six, clocks below
    ten seconds are kept to 10 µs. Of alternatives, most of a trace, they are kept to `TOP_DIGITS`."""

    def to(digits: int) -> Callable[[float], float]:
        return lambda x: float(f"{x:.{digits}g}")

    def fewer(token: Token) -> Token:
        tops = _mapped((token.target_top, token.drafter_top), to(min(digits, TOP_DIGITS)))
        return replace(token, target_top=tops[0], drafter_top=tops[1])

    rounds = (_mapped(r, to(digits)) for r in trace.rounds)
    return replace(trace, rounds=tuple(replace(r, tokens=tuple(map(fewer, r.tokens))) for r in rounds))


def _raced(source: Source, request: Request) -> Trace:
    race = source.race(request)
    for _ in race.steps():
        pass
    race.close()
    return race.trace


def _mapped(value: Any, change: Callable[[float], float]) -> Any:
    """`value` with every float in it changed, in dataclasses and tuples, named ones included."""
    if isinstance(value, float):
        return change(value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _mapped(getattr(value, f.name), change) for f in fields(value)})
    if isinstance(value, tuple):
        items = [_mapped(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value
