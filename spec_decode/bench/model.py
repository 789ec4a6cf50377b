"""The speedup model against measurement: per-position acceptance, the costs of a round, break-even, and both beside the
measured speedups.

In: measurements of one setup (`setups`). Out: an `Explanation`: for every draft length the measured speedup with its
interval, the predicted one with its band, tokens per target pass, the cost of a round in plain steps and where it goes,
and the acceptance from which it pays. The model is that of Leviathan et al. 2023 (arXiv:2211.17192), speedup = tokens
per round ÷ (γ·c + v(γ)); its mathematics is in `metrics` and `prediction`. Imports no torch.

A plain step is the mean round of the baseline lane of the same race, so that changes in the machine's speed cancel.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median as middle
from typing import NamedTuple

import numpy as np

from .. import metrics, prediction
from ..events import BASELINE, SPECULATIVE, Costs, Role, Round, Token, Trace
from ..settings import MAX_DRAFT_LENGTH, Settings
from . import intervals
from .estimate import estimate
from .intervals import Interval, Resampled
from .measurement import LaneFigures, Measurement

Length = int | str  # γ, or a policy
RACES = 48  # that the band is predicted from at most; evenly chosen


class Setup(NamedTuple):
    """What stays the same while draft lengths are compared."""

    drafter: str
    rule: str
    temperature: float
    synthetic_acceptance: float | None = None
    batch_size: int = 1


def setups(measurements: Iterable[Measurement]) -> dict[Setup, list[Measurement]]:
    """Our races by setup, in the order in which they were measured; peers are left out."""
    found: dict[Setup, list[Measurement]] = {}
    for m in sorted(measurements, key=lambda m: m.order):
        c = m.condition
        if not c.peer and m.speedup and m.baseline.rounds and m.speculative.rounds:
            setup = Setup(c.drafter, c.rule, c.temperature, c.synthetic_acceptance, c.batch_size)
            found.setdefault(setup, []).append(m)
    return found


def unswept(measurements: Sequence[Measurement]) -> list[Measurement]:
    """Those whose context was left as it is, outside of conversations; all where there are none."""
    plain = [m for m in measurements if m.condition.context is None and m.condition.turn is None]
    return plain or list(measurements)


def _general(measurements: Sequence[Measurement]) -> bool:
    return len({m.prompt for m in measurements}) >= intervals.LEAST


def _units(measurements: Sequence[Measurement]) -> list[tuple[str, int]]:
    """What counts as one observation of each: the prompt, or the repeat where there are too few prompts."""
    general = _general(measurements)
    return [(m.prompt, -1 if general else m.repeat) for m in measurements]


class Speedups:
    """Logarithms of the speedup, a row for every draft length and a column for every prompt.

    A prompt's value is the median over its repeats, NaN where it was not measured. With fewer prompts than an interval
    needs, repeats of a prompt are columns of their own; what is found then holds for these prompts alone (`general`).

    Attributes:
        lengths: draft lengths, numbers first.
        prompts, categories: of the columns.
        logs: float `[lengths, prompts]`.
    """

    def __init__(self, measurements: Sequence[Measurement]) -> None:
        self.general = _general(measurements)
        self._measurements = measurements
        self._shown: dict[tuple[Length, str | None], Interval] = {}
        cells: dict[tuple[Length, tuple[str, int]], list[float]] = defaultdict(list)
        columns: dict[tuple[str, int], str] = {}
        for m, column in zip(measurements, _units(measurements), strict=True):
            columns[column] = m.category
            cells[m.condition.draft_length, column].append(math.log(m.speedup or math.nan))
        self.lengths: list[Length] = sorted({length for length, _ in cells}, key=lambda n: (isinstance(n, str), n))
        self.prompts = [prompt for prompt, _ in columns]
        self.categories = list(columns.values())
        self.logs = np.array([[middle(cells.get((n, column), [math.nan])) for column in columns] for n in self.lengths])

    def of(self, length: Length, category: str | None = None) -> np.ndarray:
        """The values of a draft length, of all prompts or of those of a category, missing ones left out."""
        row = self.logs[self.lengths.index(length)]
        if category is not None:
            row = row[[name == category for name in self.categories]]
        return row[~np.isnan(row)]

    def between(self, length: Length, other: Length, category: str | None = None) -> np.ndarray:
        """Log of the speedup with one draft length ÷ that with another, of prompts that have both."""
        rows = self.logs[self.lengths.index(length)] - self.logs[self.lengths.index(other)]
        if category is not None:
            rows = rows[[name == category for name in self.categories]]
        return rows[~np.isnan(rows)]

    @property
    def means(self) -> dict[Length, float]:
        """Mean logarithm of the speedup by draft length, over the prompts that were measured with all of them; in a
        run that was cut short before there were enough of these, over those of each."""
        whole = ~np.isnan(self.logs).any(axis=0)
        rows = self.logs[:, whole] if whole.sum() >= intervals.LEAST else self.logs
        return dict(zip(self.lengths, np.nanmean(rows, axis=1).tolist(), strict=True))

    @property
    def kinds(self) -> list[str]:
        """The categories, in order of appearance."""
        return list(dict.fromkeys(self.categories))

    def shown(self, length: Length, category: str | None = None) -> Interval:
        """The speedup as tables show it: the median of prompts with its interval, without ends where there is none."""
        if (length, category) not in self._shown:
            groups: dict[str, list[float]] = defaultdict(list)
            for m in self._measurements:
                if m.condition.draft_length == length and category in (None, m.category):
                    groups[m.prompt].append(m.speedup or math.nan)
            found = estimate(groups)
            self._shown[length, category] = (
                Interval(math.nan, 0.0, math.inf) if found is None
                else Interval(found.median, found.low or 0.0, found.high or math.inf, found.prompts)
            )  # fmt: skip
        return self._shown[length, category]


@dataclass(frozen=True)
class Sums:
    """What was counted in the races of one draft length, by prompt; times in plain steps. The first and the last round
    of a lane are left out: the prefill, and a round that ends the text within its draft.

    rounds, drafting, drafted, accepted, emitted: of the speculative lane, `[prompts]`; `drafting` are the rounds with a
        draft.
    draft, verify, other: times, `[prompts]`.
    tried, taken: drafts of position i = 1… that were reached, and those accepted, `[prompts, 16]`.
    passes, widths: time of target passes by number of drafted tokens 0…16, and how many there were, `[prompts, 17]`.
    step: seconds of a plain step, mean over races.
    """

    prompts: tuple[str, ...]
    rounds: np.ndarray
    drafting: np.ndarray
    drafted: np.ndarray
    accepted: np.ndarray
    emitted: np.ndarray
    draft: np.ndarray
    verify: np.ndarray
    other: np.ndarray
    tried: np.ndarray
    taken: np.ndarray
    passes: np.ndarray
    widths: np.ndarray
    step: float

    @classmethod
    def of(cls, measurements: Sequence[Measurement]) -> Sums:
        units = _units(measurements)
        at = {unit: i for i, unit in enumerate(dict.fromkeys(units))}
        names = tuple(name for name, _ in at)
        top = MAX_DRAFT_LENGTH
        flat = np.zeros((8, len(names)))
        tried, taken = np.zeros((2, len(names), top))
        passes, widths = np.zeros((2, len(names), top + 1))
        steps = []
        for m, unit in zip(measurements, units, strict=True):
            i, step = at[unit], plain_step(m.baseline)
            steps.append(step)
            rows = np.array([r[1:7] for r in m.speculative.rounds[1:-1]], float)
            if not len(rows) or not step > 0:
                continue
            rows[:, 3:] /= step
            drafted, accepted, _, _, verify, _ = rows.T
            flat[:, i] += (len(rows), (drafted > 0).sum(), *rows.sum(0))
            position = np.arange(1, top + 1)
            reached = (position <= drafted[:, None]) & (position <= accepted[:, None] + 1)
            tried[i] += reached.sum(0)
            taken[i] += (reached & (position <= accepted[:, None])).sum(0)
            width = np.minimum(drafted, top).astype(int)
            passes[i] += np.bincount(width, verify, top + 1)
            widths[i] += np.bincount(width, minlength=top + 1)
        rounds, drafting, drafted, accepted, emitted, draft, verify, other = flat
        return cls(
            names, rounds, drafting, drafted, accepted, emitted, draft, verify, other, tried, taken, passes, widths,
            float(np.mean(steps)),
        )  # fmt: skip


def plain_step(lane: LaneFigures) -> float:
    """Mean seconds of a round after the prefill; 0 where there is none."""
    rounds = lane.rounds
    return (rounds[-1].clock - rounds[0].clock) / (len(rounds) - 1) if len(rounds) > 1 else 0.0


@dataclass(frozen=True)
class LengthFigures:
    """One draft length against measurement.

    measured: speedup, median of prompts with its interval; None for a γ that was not raced.
    predicted: speedup with the ends of its band, from races of `Explanation.source`; None for a policy, and where it
        could not be predicted.
    tokens_per_pass: mean tokens of a round; draft, verify, other: its mean times in plain steps. None where not raced.
    break_even: the acceptance a token from which this γ pays at these costs, None where it never does.
    """

    length: Length
    measured: Interval | None = None
    predicted: Interval | None = None
    tokens_per_pass: Interval | None = None
    draft: float | None = None
    verify: float | None = None
    other: float | None = None
    break_even: float | None = None


@dataclass(frozen=True)
class Explanation:
    """Why speculation pays or does not, in one setup.

    acceptance: P(draft i accepted given that i − 1 was), i = 1…, as far as one was tried in `counted`.
    counted: the draft length that per-position acceptance was counted in: the longest γ that was raced, since a policy
        may end a draft where it doubts it.
    costs: of a round in plain steps, measured in these races.
    source: the draft length of the races that the band is predicted from.
    lengths: γ from 1 to the longest of interest, then policies.
    """

    setup: Setup
    acceptance: tuple[Interval, ...]
    counted: Length
    costs: Costs
    source: Length
    lengths: tuple[LengthFigures, ...]

    def of(self, length: Length) -> LengthFigures:
        """Raises KeyError for a length that is not there."""
        for figures in self.lengths:
            if figures.length == length:
                return figures
        raise KeyError(length)


def explain(measurements: Sequence[Measurement], device: str = "cpu", band: bool = True) -> Explanation:
    """The model and the measurements of one setup.

    Args:
        measurements: of one setup, at least one race.
        device: of the pair; on the CPU a longer draft is never cheaper.
        band: predict, which takes some milliseconds a race.
    """
    plain = unswept(measurements)
    (setup,) = setups(plain)
    speedups = Speedups(plain)
    by_length = {n: [m for m in plain if m.condition.draft_length == n] for n in speedups.lengths}
    fixed = [n for n in speedups.lengths if isinstance(n, int)]
    sums = {n: Sums.of(by_length[n]) for n in speedups.lengths}
    counted: Length = fixed[-1] if fixed else speedups.lengths[0]
    costs = measured_costs(list(sums.values()))
    source: Length = "adaptive" if "adaptive" in by_length else counted
    shown = list(range(1, max(prediction.LENGTHS[-1], *fixed, 1) + 1))
    bands = _bands(by_length[source], shown, device) if band else {}
    rows: list[LengthFigures] = []
    every: list[Length] = [*shown, *(n for n in speedups.lengths if isinstance(n, str))]
    for n in every:
        even = break_even(costs, n) if isinstance(n, int) else None
        if n not in sums:
            rows.append(LengthFigures(n, predicted=bands.get(n), break_even=even))
            continue
        found, all_rounds = sums[n], max(float(sums[n].rounds.sum()), 1.0)
        tokens = Resampled(len(found.prompts)).ratio(found.emitted, found.rounds)
        draft, verify, other = (float(part.sum()) / all_rounds for part in (found.draft, found.verify, found.other))
        rows.append(LengthFigures(n, speedups.shown(n), bands.get(n), tokens, draft, verify, other, even))
    return Explanation(setup, acceptance(sums[counted]), counted, costs, source, tuple(rows))


def acceptance(sums: Sums, error: float = 1 - intervals.LEVEL) -> tuple[Interval, ...]:
    """Per-position acceptance, as `metrics.per_position_acceptance`, with intervals over prompts."""
    resampled = Resampled(len(sums.prompts))
    found = [resampled.ratio(sums.taken[:, i], sums.tried[:, i], error) for i in range(sums.tried.shape[1])]
    return tuple(e._replace(low=max(e.low, 0.0), high=min(e.high, 1.0)) for e in found if e is not None)


def measured_costs(every: Sequence[Sums]) -> Costs:
    """The costs of rounds as the races had them: v(γ) at every number of drafted tokens that occurred often enough,
    straight lines between and beyond; the draft's start and c by least squares over draft lengths."""
    count, passes = (sum(getattr(s, name).sum(0) for s in every) for name in ("widths", "passes"))
    often = np.flatnonzero(count >= max(1.0, min(20.0, count.max() / 4)))
    mean = passes[often] / count[often]
    if 0 not in often:
        often, mean = np.concatenate([[0], often]), np.concatenate([[1.0], mean])
    verify = np.interp(np.arange(MAX_DRAFT_LENGTH + 1), often, mean)
    if len(often) > 1:
        slope = max(float((mean[-1] - mean[0]) / (often[-1] - often[0])), 0.0)
        beyond = np.arange(often[-1] + 1, MAX_DRAFT_LENGTH + 1)
        verify[beyond] = mean[-1] + slope * (beyond - often[-1])
    drafting = [s for s in every if s.drafting.sum() > 0]
    weight = np.array([s.drafting.sum() for s in drafting])
    length = np.array([s.drafted.sum() / s.drafting.sum() for s in drafting])
    draft = np.array([s.draft.sum() / s.drafting.sum() for s in drafting])
    start = each = 0.0
    if len(drafting):
        centred = length - np.average(length, weights=weight)
        scatter = float((weight * centred**2).sum())
        each = float((weight * centred * draft).sum()) / scatter if scatter > 0.01 * weight.sum() else math.inf
        each = min(max(each, 0.0), float(np.average(draft, weights=weight) / np.average(length, weights=weight)))
        start = max(float(np.average(draft - each * length, weights=weight)), 0.0)
    rounds = sum(float(s.rounds.sum()) for s in every)
    other = sum(float(s.other.sum()) for s in every) / max(rounds, 1.0)
    step = float(np.mean([s.step for s in every]))
    return Costs(step, tuple(verify.tolist()), each, start, other)


def break_even(costs: Costs, length: int) -> float | None:
    """The acceptance, the same at every position, from which a round emits as many tokens as it costs plain steps; None
    where it never does."""
    return _acceptance_for(costs.round(length), length)


def even_acceptance(tokens_per_pass: float, length: int) -> float:
    """The acceptance, the same at every position, that gives so many tokens a round."""
    found = _acceptance_for(tokens_per_pass, length)
    return 1.0 if found is None else found


def _acceptance_for(tokens: float, length: int) -> float | None:
    if tokens > length + 1:
        return None
    low, high = 0.0, 1.0
    for _ in range(40):
        half = (low + high) / 2
        short = metrics.expected_tokens_per_pass((half,), length) < tokens
        low, high = (half, high) if short else (low, half)
    return high


def _bands(races: Sequence[Measurement], lengths: Sequence[int], device: str) -> dict[Length, Interval]:
    """Predicted speedups: the median over prompts, by replicate. The first repeat of a prompt is used, of at most
    `RACES` prompts."""
    first = {m.prompt: m for m in reversed(races)}
    chosen = list(first.values())[:: max(1, math.ceil(len(first) / RACES))]
    found = [prediction.replicates(trace_of(m, device), lengths) for m in chosen]
    told = [replicates for replicates in found if replicates is not None]
    if not told:
        return {}
    value = np.median(np.median([r.speedups for r in told], axis=0), axis=1)
    edge = (1 - prediction.LEVEL) / 2
    low, high = np.quantile(np.median([r.runs for r in told], axis=0), [edge, 1 - edge], axis=1)
    rows = zip(lengths, value.tolist(), low.tolist(), high.tolist(), strict=True)
    return {n: Interval(v, a, b, len(told)) for n, v, a, b in rows}


def trace_of(m: Measurement, device: str = "cpu") -> Trace:
    """The race as far as rounds and costs go, without texts: what `prediction` and `costs` read."""
    c = m.condition
    settings = Settings(draft_length=c.draft_length, temperature=c.temperature, rule=c.rule or None)
    rounds = [r for name in (BASELINE, SPECULATIVE) for r in _rounds(m.lanes[name], name)]
    rounds.sort(key=lambda r: r.clock - r.seconds)  # the lane whose clock is behind is advanced
    return Trace(
        request={"prompt": "", "settings": settings.to_dict()},
        pair={"device": device},
        machine={},
        prompt_tokens=m.prompt_tokens,
        rounds=tuple(rounds),
        finish={name: lane.finish for name, lane in m.lanes.items()},
        costs=m.costs,
    )


def _rounds(lane: LaneFigures, name: str) -> list[Round]:
    rounds, before = [], 0.0
    for index, r in enumerate(lane.rounds):
        own = r.emitted - min(r.accepted, r.emitted)
        roles: list[tuple[Role, int]] = [
            ("accepted", r.accepted), ("rejected", r.drafted - r.accepted), ("target", own),
        ]  # fmt: skip
        known = iter(r.p)  # of what was emitted, in order
        tokens = tuple(
            Token(0, "", role, None if role == "rejected" else next(known, None))
            for role, count in roles
            for _ in range(count)
        )
        seconds, before = r.clock - before, r.clock
        rounds.append(
            Round(name, index, tokens, r.draft_length, r.draft_seconds, r.verify_seconds, seconds, r.clock,
                  drafter=r.drafter)
        )  # fmt: skip
    return rounds
