"""From a finished race to its figures: a `Trace` and what the gauges tell, as a `LaneFigures` for each lane.

In: a trace, or the answer of a peer. Out: `LaneFigures`. The definitions stand in `metrics` and `measurement`. Imports
no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..events import Round, Trace
from ..metrics import (
    LaneCounts,
    acceptance_per_position,
    mean_acceptance_length,
    per_position_acceptance,
    rate,
    repeated_share,
)
from .gauges import Reading
from .measurement import LaneFigures, ModelSize, Percentiles, RoundFigures

_TICK = 7  # decimals of seconds that are kept: a tenth of a microsecond
_P = 5  # decimals of probabilities


def round_figures(rounds: Sequence[Round]) -> tuple[RoundFigures, ...]:
    """The rounds of a lane, the prefill first, as a measurement keeps them."""
    found, before = [], 0.0
    for r in rounds:
        draft, verify = round(r.draft_seconds, _TICK), round(r.verify_seconds, _TICK)
        other = max(round(r.clock - before - draft - verify, _TICK), 0.0)
        kl = None if r.kl is None else round(r.kl, 9)
        figures = (r.draft_length, r.drafted, r.accepted, len(r.emitted), draft, verify, other, round(r.clock, _TICK))
        p = tuple(round(token.p, _P) for token in r.emitted if token.p is not None)
        found.append(RoundFigures(*figures, r.drafter, r.refused, kl, p if len(p) == len(r.emitted) else ()))
        before = r.clock
    return tuple(found)


def lane_figures(
    trace: Trace,
    lane: str,
    reading: Reading | None = None,
    target: ModelSize | None = None,
    fastest: float | None = None,
) -> LaneFigures:
    """The figures of a lane of a finished race.

    Args:
        reading: of the gauges, during this lane.
        target: its size, for the bandwidth.
        fastest: bytes per second that this machine reads.
    """
    rounds, counts, ids = trace.lane(lane), LaneCounts(trace.lane(lane)), trace.token_ids(lane)
    figures = round_figures(rounds)
    passes = figures[1:]
    seconds = np.diff([r.clock for r in rounds]) if rounds else np.empty(0)
    emitted = np.array([r.emitted for r in passes], int)
    verify = _mean([r.verify_seconds for r in passes])
    bandwidth = target.read / verify if target and target.read and verify else None
    return LaneFigures(
        token_ids=tuple(ids),
        text=trace.text(lane),
        finish=trace.finish.get(lane, ""),
        rounds=figures,
        time_to_first_token=counts.time_to_first_token,
        tokens_per_second=counts.tokens_per_second,
        end_to_end_tokens_per_second=rate(counts.tokens, counts.clock),
        time_per_output_token=_percentiles(np.repeat(seconds / np.maximum(emitted, 1), emitted)),
        inter_token_latency=_percentiles(seconds),
        drafted=counts.drafted,
        accepted=counts.accepted,
        acceptance_rate=counts.acceptance_rate,
        mean_acceptance_length=mean_acceptance_length(passes),
        tokens_per_pass=counts.tokens_per_pass,
        acceptance_per_position=tuple(acceptance_per_position(passes)),
        conditional_acceptance=tuple(per_position_acceptance(passes)),
        draft_seconds=_mean([r.draft_seconds for r in passes]),
        verify_seconds=verify,
        other_seconds=_mean([r.other_seconds for r in passes]),
        bandwidth=bandwidth,
        bandwidth_share=bandwidth / fastest if bandwidth and fastest else None,
        cpu_utilization=reading.cpu_utilization if reading else None,
        gpu_utilization=reading.gpu_utilization if reading else None,
        peak_memory=reading.peak_memory if reading else None,
        energy=reading.energy if reading else None,
        refused_share=counts.refused_share,
        mean_kl=counts.mean_kl,
        repeated_share=repeated_share(ids),
    )


def peer_figures(answer: dict[str, Any]) -> LaneFigures:
    """The figures of a peer's run: {"ids", "first", "seconds", "tokens_per_second"}, and {"drafted", "accepted"} where
    it tells them, as `engines.Run`."""
    ids, first, seconds = answer["ids"], answer["first"], answer["seconds"]
    drafted, accepted = answer.get("drafted") or 0, answer.get("accepted") or 0
    return LaneFigures(
        token_ids=tuple(ids),
        time_to_first_token=first,
        tokens_per_second=answer["tokens_per_second"],
        end_to_end_tokens_per_second=rate(len(ids), first + seconds),
        drafted=drafted,
        accepted=accepted,
        acceptance_rate=accepted / drafted if drafted else None,
        repeated_share=repeated_share(ids),
    )


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _percentiles(values: np.ndarray) -> Percentiles | None:
    if not len(values):
        return None
    return Percentiles(float(values.mean()), *np.percentile(values, [50, 95, 99]).tolist())
