"""The series of the four figures: pure functions of rounds, and a throttle for drawing.

In: rounds, or a finished `Trace`. Out: lists of numbers small enough to send every second; how they look is decided
in the browser (assets/figures.js), where the colours of the page are known. No figure has more than `POINTS` points
a series, however long the race.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from .. import metrics
from ..events import BASELINE, SPECULATIVE, Round, Trace
from ..prediction import LENGTHS, predict

POINTS = 160


class Curves:
    """The two live figures, grown round by round."""

    def __init__(self) -> None:
        self._rate: dict[str, list[tuple[float, int]]] = {BASELINE: [], SPECULATIVE: []}
        self._acceptance: list[tuple[int, int, int]] = []  # round, accepted, drafted

    def add(self, r: Round) -> None:
        points = self._rate[r.lane]
        points.append((r.clock, (points[-1][1] if points else 0) + len(r.emitted)))
        if r.lane == SPECULATIVE and r.drafted:
            self._acceptance.append((r.index, r.accepted, r.drafted))

    def live(self) -> dict[str, Any]:
        """Both live figures: rates as {lane: [seconds], [tokens/s]}, acceptance as [round], [share], [mean]."""
        return {
            "rate": {lane: windowed_rate(points) for lane, points in self._rate.items()},
            "acceptance": running_acceptance(self._acceptance),
        }


def windowed_rate(points: Sequence[tuple[float, int]], window: float = 1.0) -> list[list[float]]:
    """[lane seconds], [tokens/s over the last `window` seconds of lane time], from (clock, tokens so far).

    The window widens to a twentieth of a long race, so that the curve stays readable, and the first second shows
    the rate since the first token.
    """
    if len(points) < 2:
        return [[], []]
    window = max(window, (points[-1][0] - points[0][0]) / 20)
    chosen = _thin(range(1, len(points)))
    xs: list[float] = []
    ys: list[float] = []
    start = 0
    for i in chosen:
        clock, tokens = points[i]
        while points[start + 1][0] < clock - window:
            start += 1
        speed = metrics.rate(tokens - points[start][1], clock - points[start][0])
        if speed is not None:
            xs.append(round(clock, 3))
            ys.append(round(speed, 2))
    return [xs, ys]


def running_acceptance(rounds: Sequence[tuple[int, int, int]]) -> list[list[float]]:
    """[round], [acceptance of that round, or of the bucket of rounds it stands for], [running mean]."""
    xs: list[float] = []
    shares: list[float] = []
    means: list[float] = []
    accepted = drafted = 0
    size = -(-len(rounds) // POINTS) or 1
    for start in range(0, len(rounds), size):
        bucket = rounds[start : start + size]
        a, d = sum(x[1] for x in bucket), sum(x[2] for x in bucket)
        accepted, drafted = accepted + a, drafted + d
        xs.append(bucket[-1][0])
        shares.append(round(metrics.ratio(a, d) or 0.0, 4))
        means.append(round(metrics.ratio(accepted, drafted) or 0.0, 4))
    return [xs, shares, means]


def final(trace: Trace) -> dict[str, Any]:
    """The two figures of a finished race.

    `passes` is [tokens], [target passes that emitted so many]. `model` holds the predicted speedups for γ = 1…8 with
    the ends of their band and the best γ, None where the band does not tell; and `measured`, this race's own speedup as
    [γ], [speedup] where γ was fixed, else as `adaptive`: how a race of changing length came out belongs to no γ.
    """
    fast = trace.lane(SPECULATIVE)
    histogram = metrics.tokens_per_pass_histogram(fast)
    speedup = metrics.speedup(trace)
    found = predict(trace)
    fixed = isinstance(length := trace.settings.get("draft_length"), int) and speedup is not None
    return {
        "passes": [list(histogram), list(histogram.values())],
        "model": {
            "lengths": list(LENGTHS),
            "predicted": [round(x, 3) for x in found.median] if found else [],
            "low": [round(x, 3) for x in found.low] if found else [],
            "high": [round(x, 3) for x in found.high] if found else [],
            "best": found.best if found else None,
            "measured": [[length], [round(speedup, 3)]] if fixed and speedup and found else [[], []],
            "adaptive": round(speedup, 3) if speedup and found and not fixed else None,
        },
    }


class Throttle:
    """Tells when the figures may be drawn again: at least `interval` seconds apart, and never costing more than
    `share` of the time that passes."""

    def __init__(self, interval: float = 1.0, share: float = 0.01) -> None:
        self._interval, self._share = interval, share
        self._next = time.perf_counter() + interval
        self.spent = 0.0

    def due(self) -> bool:
        return time.perf_counter() >= self._next

    def drawn(self, seconds: float) -> None:
        """Tell how long the drawing took."""
        self.spent += seconds
        self._next = time.perf_counter() + max(self._interval, seconds / self._share)


def _thin(indices: range) -> list[int]:
    """At most POINTS of these, evenly spread, the last included."""
    if len(indices) <= POINTS:
        return list(indices)
    step = len(indices) / POINTS
    return [indices[int((i + 1) * step) - 1] for i in range(POINTS)]
