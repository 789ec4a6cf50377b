"""The figures of a running race, kept up to date round by round.

In: rounds as they come. Out: the small dictionary the score board shows. `metrics` defines every figure; this module
only avoids counting all rounds again ten times a second, and a test holds the two equal.
"""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np

from ..events import BASELINE, SPECULATIVE, Round, Trace
from ..metrics import Lane, Repetition, speedup_with_interval, verdict

LANES = (BASELINE, SPECULATIVE)


class LaneTally:
    """One lane: tokens, clock, and what became of its drafts."""

    def __init__(self) -> None:
        self.tokens = self.first_tokens = self.rounds = self.accepted = self.drafted = self.refused = 0
        self.first_clock = self.clock = self.kl = 0.0
        self.lossy_rounds = 0
        self.ids: list[int] = []
        self.repetition = Repetition()
        self._round_tokens, self._round_seconds = array("d"), array("d")  # after the prefill

    def add(self, r: Round) -> None:
        emitted = r.emitted
        if self.rounds == 0:
            self.first_tokens, self.first_clock = len(emitted), r.clock
        else:
            self._round_tokens.append(len(emitted))
            self._round_seconds.append(r.clock - self.clock)
        self.rounds += 1
        self.clock = r.clock
        self.tokens += len(emitted)
        for token in emitted:
            self.ids.append(token.id)
            self.repetition.add(token.id)
        self.accepted += r.accepted
        self.drafted += r.drafted
        self.refused += r.refused or 0
        if r.kl is not None:
            self.kl += r.kl
            self.lossy_rounds += 1

    @property
    def rate(self) -> float | None:
        """Tokens per second after the first token."""
        seconds = self.clock - self.first_clock
        return (self.tokens - self.first_tokens) / seconds if self.rounds > 1 and seconds > 0 else None

    @property
    def lane(self) -> Lane:
        """What the interval of the speedup needs."""
        return Lane(np.array(self._round_tokens), np.array(self._round_seconds), self.first_tokens, self.first_clock)

    def to_dict(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "rate": self.rate,
            "first": self.first_clock if self.rounds else None,
            "clock": self.clock,
        }


class Tally:
    """Both lanes and what compares them."""

    def __init__(self) -> None:
        self.lanes = {name: LaneTally() for name in LANES}
        self.same = 0  # leading tokens both lanes agree on
        self.differ = False

    def add(self, r: Round) -> None:
        self.lanes[r.lane].add(r)
        base, fast = self.lanes[BASELINE].ids, self.lanes[SPECULATIVE].ids
        while not self.differ and self.same < min(len(base), len(fast)):
            if base[self.same] == fast[self.same]:
                self.same += 1
            else:
                self.differ = True

    def to_dict(self, trace: Trace | None = None) -> dict[str, Any]:
        """The score board; with the finished `trace`, also why each lane ended and whether lengths agree."""
        base, fast = self.lanes[BASELINE], self.lanes[SPECULATIVE]
        passes = fast.rounds - 1
        e = speedup_with_interval(base.lane, fast.lane)  # half a millisecond, and on no lane's clock
        stats: dict[str, Any] = {
            BASELINE: base.to_dict(),
            SPECULATIVE: fast.to_dict(),
            "speedup": fast.rate / base.rate if base.rate and fast.rate else None,
            "interval": [e.low, e.high] if e else None,
            "end_to_end": e.end_to_end if e else None,
            "end_to_end_interval": [e.end_to_end_low, e.end_to_end_high] if e else None,
            "looping": base.repetition.looping or fast.repetition.looping,
            "acceptance": fast.accepted / fast.drafted if fast.drafted else None,
            "per_pass": 1 + fast.accepted / passes if passes > 0 else None,
            "same": self.same,
            "identical": not self.differ,
            # tokens a lossy rule let through, as a share of all it emitted after the prefill
            "refused": fast.refused / max(1, fast.tokens - fast.first_tokens) if fast.lossy_rounds else None,
            "kl": fast.kl / fast.lossy_rounds if fast.lossy_rounds else None,
        }
        if trace is not None:
            for lane in LANES:
                stats[lane]["finish"] = trace.finish.get(lane, "running")
            cut = not {"cancelled", "time"}.isdisjoint(trace.finish.values())
            stats["verdict"] = verdict(fast.drafted, e)
            stats["identical"] = not self.differ and (cut or len(base.ids) == len(fast.ids))
        return stats
