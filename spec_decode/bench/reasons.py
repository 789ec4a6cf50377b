"""Why speculation pays or does not: what limits the speedup, where it breaks even, and failures that nothing reports.

In: the races of one setup and their sums by draft length. Out: sentences. The failures are those that engines' users
report as "slower than without": hardly any draft is accepted, the drafter belongs to another target, it is slower than
the target, the text loops, the target is bound by computation, or a round spends its time outside both models. Imports
no torch.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, median, pstdev
from typing import Any

import numpy as np

from ..metrics import LOOPING
from . import intervals, model
from .intervals import Interval, Resampled
from .measurement import Measurement
from .model import Length, Speedups, Sums
from .words import Sentence, gain, named, percent, share, times

# From which value on something is said; the interval must lie beyond it.
FEW_ACCEPTED = 0.15  # of first drafts
COMPUTE_BOUND = 0.5  # plain steps that each drafted token adds to a target pass
OTHER_SHARE = 0.15  # of a round
CLIFF = 0.25  # plain steps a token, and at least three times the slope before
WORTH = 0.03  # a gain that is worth a sentence
UNSURE = 0.04  # relative error of a round's cost, beyond which break-even is not told
NOISY = 0.1  # standard deviation of plain decoding between repeats
TRIED = 100  # first drafts, at least
CLAIMS = 8  # of this module in a paragraph at most, which share its error


def reasons(
    measurements: Sequence[Measurement], sums: Mapping[Length, Sums], length: Length, best: Length, error: float
) -> list[Sentence]:
    """What is behind the speedup of a draft length, and every failure that is recognized.

    Args:
        measurements: of one setup.
        sums: of the same, by draft length.
        length: the one that costs and limits are told of; a policy only where no γ was raced.
        best: the one that was fastest.
        error: probability of at least one false claim, at most.
    """
    found = sums[length]
    if not found.rounds.sum():
        return []
    each = error / CLAIMS
    resampled = Resampled(len(found.prompts))
    counted = max((n for n in sums if isinstance(n, int)), default=length)
    told = [*_first_draft(measurements, sums[counted], each), *_slow_drafter(found, resampled, each)]
    hopeless = bool(told)
    told += _bound(measurements, sums, each)
    told += _outside(found, length, resampled, each)
    if not hopeless:
        told += _limit(found, length, resampled, each) + _break_even(found, sums, length, resampled, each)
    return [*told, *_looping(measurements, best), *_noise(measurements), *_differ(measurements)]


def _first_draft(measurements: Sequence[Measurement], found: Sums, error: float) -> list[Sentence]:
    """Hardly any draft is accepted: by how much, and whether guessing would do as well."""
    if found.tried[:, 0].sum() < TRIED:
        return []
    first = Resampled(len(found.prompts)).ratio(found.taken[:, 0], found.tried[:, 0], error)
    if first is None or first.high >= FEW_ACCEPTED:
        return []
    shown = model.acceptance(found)[0]
    chance = _commonest(measurements)
    figures: dict[str, Any] = {"acceptance": shown.value, "low": shown.low, "high": shown.high, "chance": chance}
    weights = any(m.drafter is not None for m in measurements)
    if weights and chance is not None and first.high < max(chance, 0.01):
        text = (
            f"Only {share(shown)} of first drafts are accepted, no more than always guessing the commonest token would "
            f"reach ({percent(chance)}): this drafter does not belong to this target, or was loaded wrongly."
        )
        return [Sentence("wrong drafter", text, figures, "acceptance")]
    text = f"Hardly any draft is accepted: {share(shown)} of first drafts"
    text += "." if weights else "; this text does not repeat what came before."
    return [Sentence("few accepted", text, figures, "acceptance")]


def _commonest(measurements: Sequence[Measurement]) -> float | None:
    """The share of the commonest token in the target's own texts, each text once; what a drafter that knows nothing of
    the context could reach."""
    texts = {m.prompt: m.baseline.token_ids for m in measurements if m.baseline.repeated_share < LOOPING}
    counts = Counter(token for ids in texts.values() for token in ids[1:])
    return max(counts.values()) / sum(counts.values()) if counts else None


def _slow_drafter(found: Sums, resampled: Resampled, error: float) -> list[Sentence]:
    strict = resampled.ratio(found.draft, found.drafted, error)
    if strict is None or strict.low <= 1:
        return []
    shown = resampled.ratio(found.draft, found.drafted) or strict
    text = (
        f"The drafter is slower than the target: a drafted token takes {times(shown)} as long as a plain step, so that "
        "no acceptance can make it pay."
    )
    return [Sentence("slow drafter", text, _figures(shown), "round time")]


def _bound(measurements: Sequence[Measurement], sums: Mapping[Length, Sums], error: float) -> list[Sentence]:
    """How a target pass grows with the tokens it checks: steeply all along, or in a jump."""
    passes: dict[int, Interval] = {}
    for n in sorted(n for n in sums if isinstance(n, int)):
        if n < sums[n].passes.shape[1] and sums[n].widths[:, n].sum() >= 20:
            found = Resampled(len(sums[n].prompts)).ratio(sums[n].passes[:, n], sums[n].widths[:, n], error / 2)
            if found is not None:
                passes[n] = found
    if not passes:
        return []
    longest = max(passes)
    if passes[longest].low > 1 + COMPUTE_BOUND * longest:
        at = passes[longest]
        text = (
            f"The target is bound by computation, not by memory: a pass over {longest + 1} tokens takes {times(at)} as "
            "long as a plain step, so that checking drafts costs nearly as much as decoding."
        )
        shares = [m.baseline.bandwidth_share for m in measurements if m.baseline.bandwidth_share is not None]
        if shares:
            text += f" Plain decoding uses {percent(median(shares))} of the memory bandwidth."
        figures = {"draft_length": longest, **_figures(at), "bandwidth_share": median(shares) if shares else None}
        return [Sentence("compute bound", text, figures, "round time")]
    before, slope = 0, 0.0
    value = 1.0
    for n, at in passes.items():
        steep = (at.low - value) / (n - before)
        if steep > CLIFF and steep > 3 * slope:
            text = (
                f"Between {'plain steps' if not before else f'γ = {before}'} and γ = {n} a target pass becomes "
                f"{percent(at.value / value - 1)} longer: longer drafts must be worth that."
            )
            figures = {"from": before, "to": n, "passes": [value, at.value]}
            return [Sentence("cliff", text, figures, "round time")]
        slope = max(slope, (at.high - value) / (n - before))
        before, value = n, at.high
    return []


def _outside(found: Sums, length: Length, resampled: Resampled, error: float) -> list[Sentence]:
    total = found.draft + found.verify + found.other
    strict = resampled.ratio(found.other, total, error)
    if strict is None or strict.low <= OTHER_SHARE:
        return []
    shown = resampled.ratio(found.other, total) or strict
    text = f"With {named(length)}, {share(shown)} of a round passes outside both models."
    return [Sentence("other time", text, {"draft_length": length, **_figures(shown)}, "round time")]


def _limit(found: Sums, length: Length, resampled: Resampled, error: float) -> list[Sentence]:
    """Which of four improvements would gain most at this draft length: half of the rejections, a drafter that costs
    nothing, a target pass over many tokens that costs a plain step, and nothing outside the models."""
    if not found.drafting.sum() or not found.accepted.sum():
        return []
    columns = np.concatenate(
        [np.stack([found.draft, found.verify, found.other, found.rounds, found.drafted, found.drafting], axis=1),
         found.tried, found.taken], axis=1,
    )  # fmt: skip
    gains: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "acceptance": lambda sums: np.log(_fewer_rejections(sums)),
        "drafter": lambda sums: -np.log1p(-sums[..., 0] / sums[..., :3].sum(-1)),
        "target": lambda sums: -np.log1p(-np.maximum(sums[..., 1] - sums[..., 3], 0.0) / sums[..., :3].sum(-1)),
        "other": lambda sums: -np.log1p(-sums[..., 2] / sums[..., :3].sum(-1)),
    }
    values = {name: float(gain_of(columns.sum(0))) for name, gain_of in gains.items()}
    first = max(values, key=lambda name: values[name])
    behind = [name for name in values if name != first]
    for name in behind:
        apart = resampled.of(lambda sums, name=name: gains[first](sums) - gains[name](sums), columns, error / 3)  # type: ignore[misc]
        if apart is None or apart.low <= 0:
            return []
    if values[first] < WORTH:
        return []
    each = resampled.ratio(found.draft, found.drafted)
    accepted = resampled.ratio(found.accepted, found.drafted)
    if each is None or accepted is None:
        return []
    more = {name: percent(math.expm1(value)) for name, value in values.items()}
    text = (
        f"With {named(length)} a drafted token costs {share(each)} of a plain step and {share(accepted)} of drafts are "
        f"accepted. {_LIMITS[first]} is the limit: {_IMPROVED[first]} would gain another {more[first]}, "
        f"{_IMPROVED['drafter' if first == 'acceptance' else 'acceptance']} "
        f"{more['drafter' if first == 'acceptance' else 'acceptance']}."
    )
    figures = {
        "draft_length": length, "limit": first, "gains": {name: math.exp(value) for name, value in values.items()},
        "draft_cost": each.value, "acceptance": accepted.value,
    }  # fmt: skip
    return [Sentence("limit", text, figures, "round time")]


_LIMITS = {
    "acceptance": "Acceptance, not cost,",
    "drafter": "The drafter's cost",
    "target": "The cost of checking drafts",
    "other": "What a round spends outside both models",
}
_IMPROVED = {
    "acceptance": "half as many rejections",
    "drafter": "a drafter that takes no time",
    "target": "a target pass as long as a plain step",
    "other": "nothing outside both models",
}


def _fewer_rejections(sums: np.ndarray) -> np.ndarray:
    """Tokens a round with half as many rejections at every position ÷ tokens a round, from the columns of `_limit`."""
    positions = (sums.shape[-1] - 6) // 2
    tried, taken = sums[..., 6 : 6 + positions], sums[..., 6 + positions :]
    rate = np.where(tried > 0, taken / np.maximum(tried, 1), 0.0)
    last = np.maximum(np.cumsum(tried > 0, axis=-1)[..., -1:], 1) - 1
    rate = np.where(tried > 0, rate, np.take_along_axis(rate, last, axis=-1))
    longest = (sums[..., 4] / np.maximum(sums[..., 5], 1))[..., None]  # mean length of a draft
    weight = np.clip(longest - np.arange(positions), 0, 1)
    share_drafting = sums[..., 5] / np.maximum(sums[..., 3], 1)

    def tokens(rates: np.ndarray) -> np.ndarray:
        return np.asarray(1 + share_drafting * (weight * np.cumprod(rates, axis=-1)).sum(-1))

    return tokens(1 - (1 - rate) / 2) / tokens(rate)


def _break_even(
    found: Sums, sums: Mapping[Length, Sums], length: Length, resampled: Resampled, error: float
) -> list[Sentence]:
    """What a round costs and emits, and the acceptance from which that pays."""
    if not isinstance(length, int) or not found.drafting.sum():
        return []
    costs = model.measured_costs(list(sums.values()))
    cost = (found.draft + found.verify + found.other).sum() / found.rounds.sum()
    pays = model.break_even(costs, length)
    tokens = resampled.ratio(found.emitted, found.rounds)
    apart = resampled.of(
        lambda s: s[..., 0] - s[..., 1],
        np.stack([found.emitted, found.draft + found.verify + found.other], axis=1), error,
    )  # fmt: skip
    exact = resampled.ratio(found.draft + found.verify + found.other, found.rounds)
    if tokens is None or apart is None or exact is None or exact.high - exact.low > 2 * UNSURE * cost:
        return []
    figures = {
        "draft_length": length, "cost": float(cost), "tokens": tokens.value, "break_even": pays, "acceptance": None,
    }  # fmt: skip
    text = f"A round of {named(length)} costs {cost:.2f} plain steps and emits {tokens.value:.2f} tokens"
    if pays is None:
        return [Sentence("break even", f"{text}: it pays at no acceptance.", figures, "round time")]
    own = figures["acceptance"] = model.even_acceptance(tokens.value, length)
    sure = apart.low > 0 or apart.high < 0
    text += f"; it pays where {percent(pays)} of drafts are accepted at each position, "
    text += f"and yours are as if {percent(own)} were." if sure else "and yours lie about there."
    return [Sentence("break even", text, figures, "acceptance")]


def _looping(measurements: Sequence[Measurement], length: Length) -> list[Sentence]:
    """Texts that repeat themselves, and the speedup without them."""
    looping = {m.prompt for m in measurements if any(lane.repeated_share >= LOOPING for lane in m.lanes.values())}
    every = {m.prompt for m in measurements}
    if not looping:
        return []
    left = [m for m in measurements if m.prompt not in looping and m.condition.draft_length == length]
    verb = "loops" if len(looping) == 1 else "loop"
    text = f"{len(looping)} of {len(every)} texts {verb}, which flatters the drafter"
    figures: dict[str, Any] = {"looping": sorted(looping), "texts": len(every), "draft_length": length}
    rest = Speedups(left) if left else None
    if rest is not None and len(rest.of(length)) >= intervals.LEAST:
        shown = rest.shown(length)
        figures |= {"speedup": shown.value, "low": shown.low, "high": shown.high}
        text += f"; without {'it' if len(looping) == 1 else 'them'} {named(length)} is "
        text += f"{gain(shown)} {'faster' if shown.value > 1 else 'slower'}" if _aside(shown) else "as fast as plain"
    return [Sentence("looping", f"{text}.", figures, "texts")]


def _aside(shown: Interval) -> bool:
    return shown.low > 1 or shown.high < 1


def _noise(measurements: Sequence[Measurement]) -> list[Sentence]:
    """How much plain decoding of one prompt varies from repeat to repeat."""
    rates: dict[str, list[float]] = defaultdict(list)
    for m in measurements:
        if m.baseline.tokens_per_second:
            rates[m.prompt].append(m.baseline.tokens_per_second)
    several = [pstdev(values) / fmean(values) for values in rates.values() if len(values) > 2]
    if not several or median(several) < NOISY:
        return []
    text = f"The machine was not quiet: plain decoding of one prompt varied by ±{percent(median(several))}."
    return [Sentence("noise", text, {"deviation": median(several), "prompts": len(several)}, "machine")]


def _differ(measurements: Sequence[Measurement]) -> list[Sentence]:
    """Races whose lanes had to have the same text and did not."""
    wrong = [m for m in measurements if m.same_text and m.identical is False]
    if not wrong:
        return []
    text = (
        f"In {len(wrong)} of {len(measurements)} races the two lanes' texts differ although the rule makes them the "
        "same: that is a fault of the engine, and their speedups mean nothing."
    )
    figures = {"races": len(measurements), "prompts": sorted({m.prompt for m in wrong})}
    return [Sentence("texts differ", text, figures, "texts")]


def _figures(found: Interval) -> dict[str, Any]:
    return {"value": found.value, "low": found.low, "high": found.high}
