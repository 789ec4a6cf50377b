"""What a file of measurements says: every condition's figures with intervals, the machine's spread, and the verdicts.

In: measurements, the header of their file, and its notes. Out: the report as one JSON-ready object, whose schema is
docs/bench.schema.json. Everything that is printed or drawn is read from it. Imports no torch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

import numpy as np

from ..events import BASELINE, SPECULATIVE
from ..metrics import LOOPING, acceptance_per_position, per_position_acceptance
from .estimate import Estimate, estimate, scatter
from .measurement import PEER, Condition, LaneFigures, Measurement, conditions
from .record import Contents

VERSION = 1
# Figures of a lane of which the median is reported.
PLAIN = (
    "time_to_first_token", "tokens_per_second", "end_to_end_tokens_per_second", "acceptance_rate",
    "mean_acceptance_length", "tokens_per_pass", "draft_seconds", "verify_seconds", "other_seconds", "bandwidth",
    "bandwidth_share", "cpu_utilization", "gpu_utilization", "energy", "refused_share", "mean_kl",
)  # fmt: skip
NOISY = 0.1  # relative scatter of the baseline from which a report says so
BUSY = 0.1  # cores that other processes kept busy, from which a report says so

# What a label says of a condition where not all have the same.
_SHOWN = {
    "drafter": "{}",
    "rule": "{}",
    "temperature": "temperature {:g}",
    "context": "context {}",
    "turn": "turn {}",
    "batch_size": "batch {}",
}

Pick = Callable[[Measurement], float | None]


def report(contents: Contents, raw: str) -> dict[str, Any]:
    """The report of a file of measurements.

    Args:
        raw: the name of the file.
    """
    header, found, notes = contents.header, contents.measurements, contents.notes
    ours, peers = [m for m in found if not m.condition.peer], [m for m in found if m.condition.peer]
    told = conditions(ours)
    return {
        "version": VERSION,
        **{key: header.get(key) for key in ("command", "date", "pair", "machine", "versions", "plan", "instruments")},
        "finished": contents.ended,
        "planned": header.get("planned"),
        "measured": len(found),
        "warm_up_races": notes.get("warm_up"),
        "raw": raw,
        "models": _models(ours),
        "costs": {m.condition.drafter: m.costs.to_dict() for m in reversed(ours) if m.costs},
        "conditions": [result(c, told, [m for m in ours if m.condition == c]) for c in told],
        "peers": _peers(peers, ours, notes.get("peers", {})),
        "spread": spread(ours),
        "prompts": _rows(ours),
    }


def label(condition: Condition, among: Sequence[Condition] = ()) -> str:
    """A condition in a few words: its draft length, and what differs among all."""
    length = condition.draft_length
    words = [condition.engine] if condition.peer else [f"γ = {length}" if isinstance(length, int) else length]
    shown = {
        "drafter": "{}",
        "rule": "{}",
        "temperature": "temperature {:g}",
        "context": "context {}",
        "turn": "turn {}",
    }
    for name, text in {**shown, "batch_size": "batch {}"}.items():
        if len({getattr(c, name) for c in among}) > 1 and getattr(condition, name) not in (None, ""):
            words.append(text.format(getattr(condition, name)))
    if condition.synthetic_acceptance is not None:
        words.append(f"synthetic acceptance {condition.synthetic_acceptance:g}")
    return ", ".join(words)


def result(condition: Condition, among: Sequence[Condition], found: Sequence[Measurement]) -> dict[str, Any]:
    """The figures of one condition, `Report["conditions"]` has one for each. `found` are its measurements, at least
    one."""
    speedup = _estimate(found, lambda m: m.speedup)
    between = scatter(_grouped(found, lambda m: m.speedup))
    drafted = sum(m.speculative.drafted for m in found)
    synthetic = condition.synthetic_acceptance is not None
    return {
        "condition": condition.to_dict(),
        "label": label(condition, among),
        "prompts": len({m.prompt for m in found}),
        "measurements": len(found),
        "speedup": speedup.to_dict() if speedup else None,
        "end_to_end_speedup": _dict(_estimate(found, lambda m: m.end_to_end_speedup)),
        "scatter_between_repeats": between,
        "verdict": _verdict(speedup, drafted),
        "words": _words(speedup, drafted, between, max(m.repeat for m in found) + 1),
        "identical": None if synthetic else sum(bool(m.identical) for m in found),
        "same_text": False if synthetic else all(m.same_text for m in found),
        "lanes": {lane: _lane([m.lanes[lane] for m in found], found, lane) for lane in (BASELINE, SPECULATIVE)},
        "categories": {
            category: _category([m for m in found if m.category == category])
            for category in sorted({m.category for m in found})
        },
    }


def _category(found: Sequence[Measurement]) -> dict[str, Any]:
    return {
        "prompts": len({m.prompt for m in found}),
        "speedup": _dict(_estimate(found, lambda m: m.speedup)),
        "baseline": _middle(found, lambda m: m.baseline.tokens_per_second),
        "speculative": _middle(found, lambda m: m.speculative.tokens_per_second),
        "acceptance_rate": _middle(found, lambda m: m.speculative.acceptance_rate),
        "tokens_per_pass": _middle(found, lambda m: m.speculative.tokens_per_pass),
    }


def _lane(lanes: Sequence[LaneFigures], found: Sequence[Measurement], name: str) -> dict[str, Any]:
    """Medians over prompts; percentiles of a request's mean over requests, as vLLM's benchmark has them; acceptance by
    position over all rounds."""
    passes = [r for lane in lanes for r in lane.rounds[1:]]

    def middle(figure: str, at: str | None = None) -> float | None:
        def pick(m: Measurement) -> float | None:
            value = getattr(m.lanes[name], figure)
            return getattr(value, at, None) if at else value

        return _middle(found, pick)

    def times(kind: str) -> dict[str, float | None]:
        return {at: middle(kind, at) for at in ("mean", "p50", "p95", "p99")}

    return {
        **{figure: middle(figure) for figure in PLAIN},
        "time_per_output_token": times("time_per_output_token"),
        "inter_token_latency": times("inter_token_latency"),
        "over_requests": {
            "time_to_first_token": _quantiles(lane.time_to_first_token for lane in lanes),
            "time_per_output_token": _quantiles(
                lane.time_per_output_token.mean if lane.time_per_output_token else None for lane in lanes
            ),
        },
        "tokens": sum(lane.tokens for lane in lanes),
        "drafted": sum(lane.drafted for lane in lanes),
        "accepted": sum(lane.accepted for lane in lanes),
        "acceptance_per_position": acceptance_per_position(passes),
        "conditional_acceptance": per_position_acceptance(passes),
        "peak_memory": max((lane.peak_memory or 0 for lane in lanes), default=0) or None,
        "looping_texts": sum(lane.repeated_share >= LOOPING for lane in lanes),
    }


def _verdict(speedup: Estimate | None, drafted: int) -> str | None:
    if speedup is None or speedup.settled is None:
        return None
    if not drafted:
        return "nothing drafted"
    return {"above": "faster", "below": "slower", "around": "cannot tell"}[speedup.settled]


def _words(speedup: Estimate | None, drafted: int, between: float | None, repeats: int) -> str:
    """The verdict in a sentence, and where there is none, what would be needed."""
    if speedup is None:
        return "No text is long enough for a rate."
    off = percent(abs(speedup.median - 1))
    side = "faster" if speedup.median >= 1 else "slower"
    if not drafted:
        return "Nothing was drafted, so both lanes decode alike."
    if speedup.settled is None:
        return f"{off} {side}, with too few measurements for an interval: at least three prompts or repeats."
    if speedup.settled != "around":
        worst = f"; the worst prompt, {speedup.worst_prompt}, runs at {speedup.worst:.2f}×"
        return f"{off} {side} in the median of {speedup.prompts} prompts{worst}."
    if between is not None and between > abs(speedup.median - 1):
        return (
            f"This run cannot tell: the speedup of one prompt differs by {percent(between)} from repeat to repeat, and "
            f"that drowns a difference of {off}."
        )
    why = "" if repeats > 1 else ", and one repeat does not show the noise of the machine"
    return (
        f"This run cannot tell: prompts differ from {speedup.worst:.2f}× to {speedup.best:.2f}×, and "
        f"{speedup.prompts} are too few to settle a difference of {off}{why}."
    )


def spread(found: Sequence[Measurement]) -> dict[str, Any]:
    """How far the machine was from quiet while measuring, and the sentences that follow from it."""
    load, busy = ([v for m in found if (v := getattr(m.machine, name)) is not None] for name in ("load", "others_busy"))
    clock = [m.machine.frequency for m in found if m.machine.frequency is not None]
    rates: dict[Any, list[float]] = defaultdict(list)
    for m in found:
        if m.baseline.tokens_per_second:
            where = (m.prompt, m.condition.temperature, m.condition.context, m.condition.turn, m.condition.batch_size)
            rates[where].append(m.baseline.tokens_per_second)
    steps = scatter(rates)
    words = []
    if steps is not None and steps > NOISY:
        words.append(
            f"The baseline's own speed differs by {percent(steps)} between measurements of the same prompt. Ratios are "
            "taken within a race and move less than rates, which hold for this run only."
        )
    if busy and median(busy) > BUSY:
        words.append(f"Other processes kept {median(busy):.2f} cores busy in the median, {max(busy):.2f} at most.")
    return {
        "load": {"median": median(load), "highest": max(load)} if load else None,
        "others_busy": {"median": median(busy), "highest": max(busy)} if busy else None,
        "frequency": {"lowest": min(clock), "highest": max(clock)} if clock else None,
        "baseline": steps,
        "words": words,
    }


def agreement(own: Sequence[int], theirs: Sequence[int]) -> dict[str, Any]:
    """A peer's greedy text against the target's own: whether they are "identical", and their "common_prefix" in
    tokens."""
    pairs = enumerate(zip(own, theirs, strict=False))
    same = next((position for position, (one, other) in pairs if one != other), min(len(own), len(theirs)))
    return {"identical": tuple(own) == tuple(theirs), "common_prefix": same}


def _peers(peers: Sequence[Measurement], ours: Sequence[Measurement], facts: dict[str, Any]) -> list[dict[str, Any]]:
    """For each peer and context its rates, the ratios of our lanes to it, paired by prompt and repeat, and how far its
    greedy texts agree with the target's. Peers that were skipped have their reason only."""
    told = conditions(ours)
    found = []
    for condition in conditions(peers):
        its = [m for m in peers if m.condition == condition]
        beside = [m for m in ours if _alike(m.condition, condition)]
        texts = []
        if condition.temperature == 0:
            own = {m.prompt: m.baseline.token_ids for m in beside}
            texts = [agreement(own[m.prompt], m.lanes[PEER].token_ids) for m in its if m.prompt in own]
        found.append({
            "name": condition.engine,
            "condition": condition.to_dict(),
            "label": label(condition, conditions(peers)),
            "measurements": len(its),
            "tokens_per_second": _dict(_estimate(its, lambda m: m.lanes[PEER].tokens_per_second)),
            "time_to_first_token": _middle(its, lambda m: m.lanes[PEER].time_to_first_token),
            "acceptance_rate": _middle(its, lambda m: m.lanes[PEER].acceptance_rate),
            "baseline": _dict(_ratios(beside, its, BASELINE)),
            "speculative": {
                label(c, told): _dict(_ratios([m for m in beside if m.condition == c], its, SPECULATIVE))
                for c in told
                if _alike(c, condition)
            },
            "agreement": {
                "texts": len(texts),
                "identical": sum(text["identical"] for text in texts),
                "common_prefix": float(np.mean([text["common_prefix"] for text in texts])) if texts else None,
            },
            "facts": facts.get(condition.engine, {}),
        })  # fmt: skip
    ran = {peer["name"] for peer in found}
    return found + [{"name": name, "facts": told} for name, told in facts.items() if name not in ran]


def _alike(ours: Condition, peer: Condition) -> bool:
    return (ours.temperature, ours.context, ours.turn) == (peer.temperature, peer.context, peer.turn)


def _ratios(ours: Sequence[Measurement], peers: Sequence[Measurement], lane: str) -> Estimate | None:
    """Our lane's rate ÷ a peer's, for the same prompt in the same repeat."""
    rates: dict[tuple[str, int], list[float]] = defaultdict(list)
    for m in ours:
        if m.lanes[lane].tokens_per_second:
            rates[m.prompt, m.repeat].append(m.lanes[lane].tokens_per_second or 0.0)
    groups: dict[str, list[float]] = defaultdict(list)
    for m in peers:
        theirs = m.lanes[PEER].tokens_per_second
        if theirs and rates[m.prompt, m.repeat]:
            groups[m.prompt].append(median(rates[m.prompt, m.repeat]) / theirs)
    return estimate(groups)


def _models(ours: Sequence[Measurement]) -> dict[str, Any]:
    """Sizes of the target and of every drafter."""
    drafters = {m.condition.drafter: asdict(m.drafter) if m.drafter else None for m in ours}
    return {"target": next((asdict(m.target) for m in ours if m.target), None), "drafters": drafters}


def _rows(ours: Sequence[Measurement]) -> list[dict[str, Any]]:
    """A row for each prompt and condition, medians over repeats. "condition" is its place in the list of all."""
    told = conditions(ours)
    groups: dict[tuple[str, int], list[Measurement]] = defaultdict(list)
    for m in ours:
        groups[m.prompt, told.index(m.condition)].append(m)
    return [
        {
            "id": prompt,
            "category": its[0].category,
            "condition": at,
            "repeats": len(its),
            "prompt_tokens": its[0].prompt_tokens,
            "tokens": its[0].baseline.tokens,
            "baseline": _middle(its, lambda m: m.baseline.tokens_per_second),
            "speculative": _middle(its, lambda m: m.speculative.tokens_per_second),
            "speedup": _middle(its, lambda m: m.speedup),
            "acceptance_rate": _middle(its, lambda m: m.speculative.acceptance_rate),
            "tokens_per_pass": _middle(its, lambda m: m.speculative.tokens_per_pass),
            "identical": None if any(m.identical is None for m in its) else all(m.identical for m in its),
        }
        for (prompt, at), its in sorted(groups.items())
    ]


def _grouped(found: Iterable[Measurement], pick: Pick) -> dict[str, list[float]]:
    groups: dict[str, list[float]] = defaultdict(list)
    for m in found:
        if (value := pick(m)) is not None:
            groups[m.prompt].append(value)
    return groups


def _estimate(found: Iterable[Measurement], pick: Pick) -> Estimate | None:
    return estimate(_grouped(found, pick))


def _middle(found: Iterable[Measurement], pick: Pick) -> float | None:
    """The median over prompts of the medians over repeats."""
    groups = _grouped(found, pick)
    return median(median(values) for values in groups.values()) if groups else None


def _quantiles(values: Iterable[float | None]) -> dict[str, float] | None:
    present = [value for value in values if value is not None]
    if not present:
        return None
    return dict(zip(("p50", "p95", "p99"), np.percentile(present, [50, 95, 99]).tolist(), strict=True))


def percent(share: float) -> str:
    """A share in words."""
    return f"{100 * share:.0f} %"


def _dict(found: Estimate | None) -> dict[str, Any] | None:
    return found.to_dict() if found else None
