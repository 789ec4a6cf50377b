"""The tables of measured draft lengths, as the page shows them.

In: measurements, and the figures of their report (`bench.summary`). Out: rows as JSON-ready dictionaries. Nothing is
computed here that the report does not have, but for the baseline, which is a lane of every race.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..bench.measurement import Condition, Measurement


def row(condition: Condition, found: dict[str, Any]) -> dict[str, Any]:
    """A draft length as the page shows it, from its figures in the report."""
    fast, speedup = found["lanes"]["speculative"], found["speedup"]
    return {
        "length": condition.draft_length,
        "count": found["measurements"],
        "rate": fast["tokens_per_second"],
        "speedup": speedup["median"] if speedup else None,
        "low": speedup["low"] if speedup else None,
        "high": speedup["high"] if speedup else None,
        "worst": speedup["worst"] if speedup else None,
        "acceptance": fast["acceptance_rate"],
        "per_pass": fast["tokens_per_pass"],
        **_times(fast),
        "identical": found["identical"] if found["same_text"] else None,
        "verdict": found["verdict"],
        "words": found["words"],
    }


def baseline(measurements: Sequence[Measurement]) -> dict[str, Any]:
    """γ = 0: the baseline lanes of all races. Their speedup is 1 by its definition."""
    lanes = [m.baseline for m in measurements]
    rates = [lane.tokens_per_second for lane in lanes if lane.tokens_per_second]
    verify = [lane.verify_seconds for lane in lanes if lane.verify_seconds is not None]
    other = [lane.other_seconds for lane in lanes if lane.other_seconds is not None]
    return {
        "length": 0,
        "count": len(lanes),
        "rate": median(rates) if rates else None,
        "speedup": 1.0,
        "low": None,
        "high": None,
        "worst": None,
        "acceptance": None,
        "per_pass": 1.0,
        "draft_ms": 0.0,
        "verify_ms": 1e3 * median(verify) if verify else None,
        "other_ms": 1e3 * median(other) if other else None,
        "identical": None,
        "verdict": None,
        "words": "",
    }


def _times(lane: dict[str, Any]) -> dict[str, float | None]:
    """Milliseconds of a round."""
    parts = {part: lane[f"{part}_seconds"] for part in ("draft", "verify", "other")}
    return {f"{part}_ms": None if value is None else 1e3 * value for part, value in parts.items()}


def categories(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """The speedups by category, where there are several: a row for each category and draft length."""
    names = sorted({name for c in figures["conditions"] for name in c["categories"]})
    if len(names) < 2:
        return []
    return [
        {
            "category": name,
            "prompts": max(c["categories"][name]["prompts"] for c in figures["conditions"] if name in c["categories"]),
            "speedups": {
                str(c["condition"]["draft_length"]): _ends(c["categories"].get(name, {}).get("speedup"))
                for c in figures["conditions"]
            },
        }
        for name in names
    ]


def notes(figures: dict[str, Any]) -> list[str]:
    """How quiet the machine was, and how many texts loop."""
    found = list(figures["spread"]["words"])
    if not found and figures["spread"]["baseline"] is not None:
        found.append(
            f"The baseline differs by {100 * figures['spread']['baseline']:.1f} % between repeats of a prompt."
        )
    looping = sum(c["lanes"]["speculative"]["looping_texts"] for c in figures["conditions"])
    if looping:
        found.append(f"{looping} of {figures['measured']} texts loop, which flatters the drafter.")
    return found


def _ends(speedup: dict[str, Any] | None) -> list[float | None] | None:
    return [speedup["median"], speedup["low"], speedup["high"]] if speedup else None
