"""Rates and the speedup model: pure functions of rounds, each figure defined once.

In: `Round`s of one lane, or a `Trace`. Out: numbers, or None where there is nothing to divide by. Knows nothing of
models or of torch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from .events import BASELINE, SPECULATIVE, Costs, Round, Trace, emitted_tokens


def tokens_per_second(rounds: Sequence[Round]) -> float | None:
    """Decoding rate in tokens/s: (emitted − 1) / time since the first token; prefill is not in it."""
    if len(rounds) < 2:
        return None
    first = len(rounds[0].emitted)
    seconds = rounds[-1].clock - rounds[0].clock
    return (emitted_tokens(rounds) - first) / seconds if seconds > 0 else None


def time_to_first_token(rounds: Sequence[Round]) -> float | None:
    """Seconds from the start of the prefill to the first token."""
    return rounds[0].clock if rounds else None


def acceptance_rate(rounds: Iterable[Round]) -> float | None:
    """Accepted / drafted tokens (vLLM's draft acceptance rate)."""
    accepted, drafted = _counts(rounds)
    return accepted / drafted if drafted else None


def tokens_per_pass(rounds: Sequence[Round]) -> float | None:
    """1 + accepted / rounds, the mean tokens a target pass emits (vLLM: acceptance length; EAGLE: τ)."""
    passes = [r for r in rounds if r.index > 0]
    return 1 + _counts(passes)[0] / len(passes) if passes else None


def tokens_per_pass_histogram(rounds: Sequence[Round]) -> dict[int, int]:
    """How many rounds emitted 1, 2, 3, … tokens (the prefill is not counted)."""
    histogram: dict[int, int] = defaultdict(int)
    for r in rounds:
        if r.index > 0:
            histogram[len(r.emitted)] += 1
    return dict(sorted(histogram.items()))


def per_position_acceptance(rounds: Iterable[Round]) -> list[float]:
    """P(draft i accepted | drafts before it accepted) for i = 1, 2, …, as far as any draft was tried."""
    tried: dict[int, int] = defaultdict(int)
    taken: dict[int, int] = defaultdict(int)
    for r in rounds:
        for i in range(1, r.drafted + 1):
            if i > r.accepted + 1:
                break
            tried[i] += 1
            taken[i] += i <= r.accepted
    return [taken[i] / tried[i] for i in range(1, len(tried) + 1)]


def expected_tokens_per_pass(acceptance: Sequence[float], draft_length: int) -> float:
    """1 + Σ over i ≤ γ of the product of the first i conditional acceptances.

    Positions beyond the measured ones take the last measured value; with nothing measured the answer is 1.
    """
    expected, reach = 1.0, 1.0
    for i in range(draft_length):
        reach *= acceptance[min(i, len(acceptance) - 1)] if acceptance else 0.0
        expected += reach
    return expected


def predicted_speedup(acceptance: Sequence[float], costs: Costs, draft_length: int) -> float:
    """E[tokens per pass] / (γ·c + v(γ)) (Leviathan et al. 2023, arXiv:2211.17192), measured; see `Costs.round`."""
    return expected_tokens_per_pass(acceptance, draft_length) / costs.round(draft_length)


def measured_speedup_by_drafted(trace: Trace, minimum_rounds: int = 3) -> dict[int, float]:
    """For each number of tokens really drafted in a round: tokens/s of those rounds ÷ the baseline's tokens/s.

    Draft lengths seen in fewer than `minimum_rounds` rounds are left out. 0 is a round without a draft.
    """
    base = tokens_per_second(trace.lane(BASELINE))
    groups: dict[int, list[Round]] = defaultdict(list)
    for r in trace.lane(SPECULATIVE):
        if r.index > 0:
            groups[r.drafted].append(r)
    if not base:
        return {}
    return {
        drafted: emitted_tokens(rounds) / sum(r.seconds for r in rounds) / base
        for drafted, rounds in sorted(groups.items())
        if len(rounds) >= minimum_rounds and sum(r.seconds for r in rounds) > 0
    }


def speedup(trace: Trace) -> float | None:
    """Speculative tokens/s ÷ baseline tokens/s, same prompt, same process, same weights."""
    base = tokens_per_second(trace.lane(BASELINE))
    fast = tokens_per_second(trace.lane(SPECULATIVE))
    return fast / base if base and fast else None


def race_report(trace: Trace) -> dict[str, Any]:
    """The object `python -m spec_decode race --json` prints: both lanes, their rates, and whether they agree."""
    speculative = trace.lane(SPECULATIVE)
    accepted, drafted = _counts(speculative)
    return {
        "pair": trace.pair,
        "settings": trace.settings,
        "machine": trace.machine,
        "prompt_tokens": trace.prompt_tokens,
        "baseline": _lane_report(trace, BASELINE),
        "speculative": {
            **_lane_report(trace, SPECULATIVE),
            "rounds": [
                {
                    "drafted": [t.id for t in r.tokens if t.draft_position is not None],
                    "accepted": r.accepted,
                    "emitted": [t.id for t in r.emitted],
                    "draft_seconds": r.draft_seconds,
                    "verify_seconds": r.verify_seconds,
                }
                for r in speculative
            ],
            "drafted": drafted,
            "accepted": accepted,
            "acceptance_rate": acceptance_rate(speculative),
            "tokens_per_pass": tokens_per_pass(speculative),
        },
        "speedup": speedup(trace),
        "identical": trace.identical,
    }


def _lane_report(trace: Trace, lane: str) -> dict[str, Any]:
    rounds = trace.lane(lane)
    return {
        "text": trace.text(lane),
        "token_ids": trace.token_ids(lane),
        "prefill_seconds": time_to_first_token(rounds),
        "seconds": rounds[-1].clock if rounds else 0.0,
        "tokens_per_second": tokens_per_second(rounds),
        "finish": trace.finish.get(lane, "running"),
    }


def _counts(rounds: Iterable[Round]) -> tuple[int, int]:
    accepted = drafted = 0
    for r in rounds:
        accepted += r.accepted
        drafted += r.drafted
    return accepted, drafted
