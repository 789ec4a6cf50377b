"""The recordings that come with the page, as the page plays them: in the browser, without a model or a queue.

In: the stored traces. Out: for each its trace as it is stored, in base64, and what the server works out of a trace:
the caption, the final score board and the figures.
"""

from __future__ import annotations

from base64 import b64encode
from functools import cache
from typing import Any

from .. import recording
from ..events import Trace
from ..request import Request
from ..sources.replay import ReplaySource, read
from .caption import about
from .curves import Curves, final
from .tally import Tally


@cache
def shipped() -> tuple[dict[str, Any], ...]:
    """The recordings in the order of their buttons: {"name", "title", "trace", "about", "recorded", "stats", "figures",
    "path"}.

    Raises:
        UserError: a file is missing, or holds no trace of the current format.
    """
    return tuple(
        prepared(s.name, s.title, s.path().read_bytes(), read(s.path())) | {"path": str(s.path())}
        for s in recording.scenes()
    )


def prepared(name: str, title: str, packed: bytes, trace: Trace) -> dict[str, Any]:
    """What the page gets of a trace, of which `packed` is the JSON compressed by gzip."""
    source = ReplaySource(trace)
    tally, curves = Tally(), Curves()
    for r in trace.rounds:
        tally.add(r)
        curves.add(r)
    return {
        "name": name,
        "title": title,
        "trace": b64encode(packed).decode("ascii"),
        "about": about(Request.from_dict(trace.request), trace.pair, trace.promises)
        | {"recorded": str(source.recording)},
        "recorded": str(source.recording),
        "stats": tally.to_dict(trace),
        "figures": curves.live() | {"final": final(trace)},
    }
