"""What is sent to the token view: each batch holds only what is new.

In: rounds and the score board. Out: JSON text `{run, phase, from, rounds, stats, …}`, where `from` is the index of
the batch's first round in the race. A batch repeats the one before it, so that one lost or merged update costs
nothing; the view asks `missing` for anything older. Rounds are encoded once, as short arrays, and `<`, `>` and `&`
are escaped, so that model output is never taken for markup.
"""

from __future__ import annotations

import json
import secrets
from collections import OrderedDict
from typing import Any

from ..events import BASELINE, Round

ROLES = {"target": "t", "accepted": "a", "rejected": "r", "correction": "c", "bonus": "b", "prompt": "p"}
_ESCAPES = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})


def dumps(value: Any) -> str:
    """Compact JSON that is safe inside HTML."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).translate(_ESCAPES)


def encode_round(r: Round, pieces: dict[str, str] | None = None) -> str:
    """One round as JSON, with every number as the trace has it, and the texts of alternatives that are new with it:

    [lane 0|1, index, γ asked for, refused, kl,
     [[text, role, p, q, draft position, id, target's alternatives, drafter's, compared], …],
     [draft, verify, whole seconds, clock], drafter, residual, pieces]
    """
    tokens = [
        [t.text, ROLES[t.role], t.p, t.q, t.draft_position, t.id, t.target_top, t.drafter_top, t.compared]
        for t in r.tokens
    ]
    times = [r.draft_seconds, r.verify_seconds, r.seconds, r.clock]
    lane = int(r.lane != BASELINE)
    return dumps([lane, r.index, r.draft_length, r.refused, r.kl, tokens, times, r.drafter, r.residual, pieces or {}])


class Feed:
    """The rounds of one race on their way to one page."""

    def __init__(self) -> None:
        self.run = secrets.token_hex(6)
        self._rounds: list[str] = []
        self._sent = self._resend = 0
        self._told: set[str] = set()  # alternatives whose texts went with an earlier round

    def add(self, rounds: list[Round], pieces: dict[str, str] | None = None) -> None:
        """More rounds, and the texts of their alternatives by id."""
        for r in rounds:
            fresh = {key: pieces[key] for key in map(str, r.alternatives) if key in pieces} if pieces else {}
            fresh = {key: text for key, text in fresh.items() if key not in self._told}
            self._told.update(fresh)
            self._rounds.append(encode_round(r, fresh))

    def batch(self, phase: str, stats: dict[str, Any], **more: Any) -> str:
        """What is new since the last batch, and the last batch again."""
        start, self._resend, self._sent = self._resend, self._sent, len(self._rounds)
        return self._text(start, {"phase": phase, "stats": stats, **more})

    def since(self, start: int) -> str:
        """Every round from index `start` on."""
        return self._text(max(0, start), {})

    def _text(self, start: int, head: dict[str, Any]) -> str:
        body = ",".join(self._rounds[start:])
        return f'{dumps({"run": self.run, "from": start, **head})[:-1]},"rounds":[{body}]}}'


class Feeds:
    """The last feeds of this process, for pages that missed something."""

    def __init__(self, keep: int = 16) -> None:
        self._feeds: OrderedDict[str, Feed] = OrderedDict()
        self._keep = keep

    def open(self) -> Feed:
        feed = Feed()
        self._feeds[feed.run] = feed
        while len(self._feeds) > self._keep:
            self._feeds.popitem(last=False)
        return feed

    def missing(self, request: str) -> str:
        """Answers the view's `{"run": id, "from": index}` with those rounds, or with "" when they are gone."""
        try:
            asked = json.loads(request)
            feed = self._feeds.get(asked["run"])
            return feed.since(int(asked["from"])) if feed else ""
        except (ValueError, TypeError, KeyError):
            return ""


def idle() -> str:
    """The batch that empties the view."""
    return dumps({"run": "", "from": 0, "phase": "idle", "stats": {}, "rounds": []})
