"""A trace as the token view takes it: all of its rounds in one batch, with the figures that belong to it.

In: a `Trace`, and the `Feed` of a view. Out: the batch.
"""

from __future__ import annotations

from ..events import Trace
from ..request import Request
from ..sources.replay import ReplaySource
from .caption import about
from .feed import Feed
from .tally import Tally


def still(trace: Trace, feed: Feed) -> str:
    """The batch.

    Raises:
        UserError: the trace holds no rounds, or its request is of another version of this package.
    """
    source, tally = ReplaySource(trace), Tally()
    for r in trace.rounds:
        tally.add(r)
    feed.add(list(trace.rounds), trace.pieces)
    told = about(Request.from_dict(trace.request), trace.pair, trace.promises, source.recording)
    return feed.batch("done", tally.to_dict(trace), about=told)
