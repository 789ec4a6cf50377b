"""The figures of a running race, kept up to date round by round.

In: rounds as they come. Out: the small dictionary the score board shows. `metrics` defines every figure; this module
only keeps its counts, so that all rounds are not counted again ten times a second.
"""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np

from ..events import BASELINE, SPECULATIVE, Round, Token, Trace
from ..metrics import Lane, LaneCounts, Repetition, ratio, speedup_with_interval, verdict
from ..parting import parting

LANES = (BASELINE, SPECULATIVE)


class LaneTally(LaneCounts):
    """One lane: its counts, its token ids, and what the interval of the speedup needs of its rounds."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[int] = []
        self.repetition = Repetition()
        self._round_tokens, self._round_seconds = array("d"), array("d")  # after the prefill

    def add(self, r: Round) -> tuple[Token, ...]:
        clock, begun = self.clock, self.rounds > 0
        emitted = super().add(r)
        if begun:
            self._round_tokens.append(len(emitted))
            self._round_seconds.append(r.clock - clock)
        for token in emitted:
            self.ids.append(token.id)
            self.repetition.add(token.id)
        return emitted

    @property
    def lane(self) -> Lane:
        """What the interval of the speedup needs."""
        return Lane(np.array(self._round_tokens), np.array(self._round_seconds), self.first_tokens, self.first_clock)

    def to_dict(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "rate": self.tokens_per_second,
            "first": self.time_to_first_token,
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
        e = speedup_with_interval(base.lane, fast.lane)  # half a millisecond, and on no lane's clock
        stats: dict[str, Any] = {
            BASELINE: base.to_dict(),
            SPECULATIVE: fast.to_dict(),
            "speedup": ratio(fast.tokens_per_second, base.tokens_per_second),
            "interval": [e.low, e.high] if e else None,
            "end_to_end": e.end_to_end if e else None,
            "end_to_end_interval": [e.end_to_end_low, e.end_to_end_high] if e else None,
            "looping": base.repetition.looping or fast.repetition.looping,
            "acceptance": fast.acceptance_rate,
            "per_pass": fast.tokens_per_pass,
            "same": self.same,
            "identical": not self.differ,
            "refused": fast.refused_share,
            "kl": fast.mean_kl,
        }
        if trace is not None:
            for lane in LANES:
                stats[lane]["finish"] = trace.finish.get(lane, "running")
            cut = not {"cancelled", "time"}.isdisjoint(trace.finish.values())
            stats["verdict"] = verdict(fast.drafted, e)
            stats["parting"] = parting(trace)
            stats["identical"] = not self.differ and (cut or len(base.ids) == len(fast.ids))
        return stats
