"""A source whose races can be stopped from another thread than the device's, as a measurement needs it.

In: a source. Out: the same source. It imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..events import Promises
from ..request import Request
from ..sources import Race, Recording, Source


class Held:
    """The source of the device for one job.

    Args:
        shape: what becomes of a request before it is raced.

    Attributes:
        stopped: whether every race ends at once from now on.
    """

    def __init__(self, source: Source, shape: Callable[[Request], Request] = lambda request: request) -> None:
        self._source, self._shape = source, shape
        self._race: Race | None = None
        self.stopped = False

    @property
    def info(self) -> dict[str, Any]:
        return self._source.info

    @property
    def drafters(self) -> tuple[str, ...]:
        return self._source.drafters

    @property
    def can_think(self) -> bool:
        return self._source.can_think

    @property
    def can_branch(self) -> bool:
        return self._source.can_branch

    @property
    def promises(self) -> Promises:
        return self._source.promises

    @property
    def recording(self) -> Recording | None:
        return self._source.recording

    def race(self, request: Request) -> Race:
        race = self._race = self._source.race(self._shape(request))
        if self.stopped:
            race.stop()
        return race

    def stop(self, why: str = "cancelled") -> None:
        """Ends the race under way within a round, and every later one at once."""
        self.stopped = True
        if race := self._race:
            race.stop(why)

    def cut(self) -> None:
        """Ends the race under way alone, which has taken as long as a race may."""
        if race := self._race:
            race.stop("time")
