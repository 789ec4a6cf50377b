"""A finished race in few words, for a reader with little room: a program that shows a line, or a language model.

In: a `Trace`. Out: a JSON-ready dictionary of bounded size with texts, figures and the first rounds. What it leaves out
it counts, and the trace has it.
"""

from __future__ import annotations

from typing import Any, Literal

from ..events import BASELINE, SPECULATIVE, Round, Trace
from ..trace_format import portable
from .tally import Tally

Detail = Literal["summary", "rounds"]
ROUNDS: dict[str, int] = {"summary": 8, "rounds": 100}  # rounds of the speculative lane, by how much is asked for
TEXT: dict[str, int] = {"summary": 2_000, "rounds": 8_000}  # characters of each lane's text
WORD = 200  # characters of a token or a round's text; byte-level vocabularies have no longer tokens


def summary(trace: Trace, detail: Detail = "summary") -> dict[str, Any]:
    """The race at this detail.

    "baseline" and "speculative" hold the lane's text and figures, as the score board shows them; "interval" is the 95 %
    interval of the speedup; "identical" says whether both lanes emitted the same tokens. A round has the texts that
    were drafted, how many of them were accepted, the target's own token after them, and its milliseconds.
    "rounds_left_out" and "characters_left_out" count what is not shown.
    """
    tally = Tally()
    for r in trace.rounds:
        tally.add(r)
    stats = tally.to_dict(trace)
    told = trace.lane(SPECULATIVE)
    passes = tally.lanes[SPECULATIVE]
    shown = told[: ROUNDS[detail]]
    return {
        "status": "done",
        "pair": names(trace.pair),
        "machine": trace.machine.get("gpu") or trace.machine.get("processor"),
        "settings": trace.settings,
        "prompt_tokens": trace.prompt_tokens,
        "speedup": _rounded(stats["speedup"]),
        "interval": [_rounded(end) for end in stats["interval"]] if stats["interval"] else None,
        "verdict": stats["verdict"],
        "end_to_end_speedup": _rounded(stats["end_to_end"]),
        "identical": stats["identical"],
        "looping": stats["looping"],
        BASELINE: _lane(trace, BASELINE, stats, detail),
        SPECULATIVE: _lane(trace, SPECULATIVE, stats, detail)
        | {
            "target_passes": passes.rounds,
            "drafted": passes.drafted,
            "accepted": passes.accepted,
            "acceptance_rate": _rounded(stats["acceptance"]),
            "tokens_per_pass": _rounded(stats["per_pass"]),
        },
        "rounds": [_round(r) for r in shown],
        "rounds_left_out": len(told) - len(shown),
        "notes": [note[:500] for note in trace.notes[:8]],
    }


def names(pair: dict[str, Any]) -> dict[str, Any]:
    """Of a pair its names alone, without revisions and sums of weights, and without directories of this machine."""
    return {key: portable(pair[key]) for key in ("target", "drafter", "device", "dtype") if key in pair}


def _lane(trace: Trace, lane: str, stats: dict[str, Any], detail: Detail) -> dict[str, Any]:
    text = trace.text(lane)
    figures = stats[lane]
    return {
        "text": text[: TEXT[detail]],
        "characters_left_out": max(0, len(text) - TEXT[detail]),
        "tokens": figures["tokens"],
        "tokens_per_second": _rounded(figures["rate"]),
        "seconds_to_first_token": _rounded(figures["first"]),
        "seconds": _rounded(figures["clock"]),
        "finish": figures["finish"],
    }


def _round(r: Round) -> dict[str, Any]:
    own = next((t for t in r.tokens if t.role in ("target", "correction", "bonus")), None)
    return {
        "round": r.index,
        "drafter": r.drafter,
        "drafted": [t.text[:WORD] for t in r.tokens if t.role in ("accepted", "rejected")],
        "accepted": r.accepted,
        "target": own.text[:WORD] if own else "",
        "milliseconds": _rounded(1000 * r.seconds),
    }


def _rounded(value: float | None) -> float | None:
    """Four significant digits."""
    return None if value is None else float(f"{value:.4g}")
