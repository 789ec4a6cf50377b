"""Sources: whatever can race a prompt. `local` runs a pair on this machine, `replay` plays a trace back.

In: a `Request`. Out: a `Race`, which yields rounds and leaves a trace. The app and the command line know these two
protocols and nothing of models. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from ..errors import ModelError, quoted
from ..events import Note, Promises, Reading, Round, Trace
from ..request import Request


class Race(Protocol):
    """One request on its way through both lanes. Iterate over `steps` once."""

    @property
    def request(self) -> Request:
        """What is raced."""

    def steps(self) -> Iterator[Round | Reading | Note]:
        """Rounds of both lanes as they happen, before the first of a lane how far a long prompt has been read, and what
        the engine says of a lane.

        Raises:
            UserError: the race cannot go on; what came before stands in `trace`.
        """

    def pieces(self, rounds: Iterable[Round]) -> dict[str, str]:
        """The text of every alternative of these rounds, as `Trace.pieces` has it. On the thread that iterates."""

    def stop(self, why: str = "cancelled") -> None:
        """Ends the race soon; may be called from any thread. `why` stands in `Trace.finish` for lanes that had not
        ended."""

    def close(self) -> None:
        """Frees what the race holds. Not while another thread iterates; may be called twice."""

    @property
    def trace(self) -> Trace:
        """The race so far."""


@dataclass(frozen=True, slots=True)
class Recording:
    """What a source plays back: the request that was raced, the machine by its name, and the date as in a trace, None
    where it is not known."""

    request: Request
    machine: str
    date: str | None

    def __str__(self) -> str:
        """In words: recorded on this machine, at this time."""
        when = f", {self.date[:10]} {self.date[11:16]} UTC" if self.date else ", date unknown"
        return f"recorded on {self.machine}{when}"


class Source(Protocol):
    """Something that can race.

    Attributes:
        info: "target", "drafter", "device" and "dtype" as names.
        drafters: what a request may name as its drafter; the first is the source's own.
        can_think: whether `Request.thinking` can be asked for.
        can_branch: whether `Request.prefix` and `Request.draft` can be.
        promises: what the page may claim of its races.
        recording: what is played back whatever the request says, None for a source that runs a model.
    """

    @property
    def info(self) -> dict[str, Any]: ...

    @property
    def drafters(self) -> tuple[str, ...]: ...

    @property
    def can_think(self) -> bool: ...

    @property
    def can_branch(self) -> bool: ...

    @property
    def promises(self) -> Promises: ...

    @property
    def recording(self) -> Recording | None: ...

    def race(self, request: Request) -> Race:
        """A race that is ready to begin.

        Raises:
            PromptError: the prompt does not fit.
            SettingsError: the request asks for something that this source cannot do.
            ModelError: the drafter cannot be used.
        """


def chosen_drafter(request: Request, drafters: tuple[str, ...]) -> str:
    """The drafter that a request names, else the first of `drafters`.

    Raises:
        ModelError: it is not among them. No request can name another, for a name is a download, or a path on the
            machine of the source.
    """
    name = request.drafter or drafters[0]
    if name not in drafters:
        raise ModelError(f"Unknown drafter {quoted(name)}; choose one of {', '.join(drafters)}.")
    return name
