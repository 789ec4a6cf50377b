"""Rates, the speedup with its interval, and the speedup model: pure functions of rounds, each figure defined once.

In: `Round`s of one lane, or a `Trace`. Out: numbers, or None where there is nothing to divide by. Knows nothing of
models or of torch.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from .events import BASELINE, SPECULATIVE, Costs, Round, Token, Trace
from .parting import parting
from .student import quantile


def rate(tokens: int, seconds: float) -> float | None:
    """Tokens per second."""
    return tokens / seconds if seconds > 0 else None


def ratio(of: float | None, to: float | None) -> float | None:
    """One figure ÷ another: accepted ÷ drafted tokens is the acceptance rate, a lane's rate ÷ the other's the speedup.
    None where one is missing or the second is 0."""
    return of / to if of is not None and to else None


class LaneCounts:
    """What the figures of a lane are made of, counted round by round, the prefill first: every figure that does not
    need the single rounds follows from these counts. They cost the same however long the lane is."""

    def __init__(self, rounds: Iterable[Round] = ()) -> None:
        self.tokens = self.first_tokens = self.rounds = self.passes = self.accepted = self.drafted = self.refused = 0
        self.first_clock = self.clock = self.kl = 0.0
        self.time_to_first_token: float | None = None  # seconds from the start of the prefill to the first token
        self.lossy_rounds = 0
        for r in rounds:
            self.add(r)

    def add(self, r: Round) -> tuple[Token, ...]:
        """Counts the lane's next round, and returns the tokens that it emitted."""
        emitted = r.emitted
        if self.rounds == 0:
            self.first_tokens, self.first_clock = len(emitted), r.clock
        if self.time_to_first_token is None and emitted:
            self.time_to_first_token = r.clock
        self.rounds += 1
        self.passes += r.index > 0
        self.tokens += len(emitted)
        self.clock = r.clock
        self.accepted += r.accepted
        self.drafted += r.drafted
        if r.kl is not None:
            self.refused += r.refused or 0
            self.kl += r.kl
            self.lossy_rounds += 1
        return emitted

    @property
    def tokens_per_second(self) -> float | None:
        """Decoding rate: (emitted − 1) / time since the first token; prefill is not in it. Where the prefill emitted no
        token (`Drafter.drafts_first`): emitted / time since the prefill."""
        return rate(self.tokens - self.first_tokens, self.clock - self.first_clock) if self.rounds > 1 else None

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted / drafted tokens (vLLM's draft acceptance rate)."""
        return ratio(self.accepted, self.drafted)

    @property
    def tokens_per_pass(self) -> float | None:
        """1 + accepted / rounds, the mean tokens a target pass emits, rounds of γ = 0 included (EAGLE: τ). vLLM's mean
        acceptance length counts speculative steps only. The prefill is no round of it."""
        return 1 + self.accepted / self.passes if self.passes else None

    @property
    def refused_share(self) -> float | None:
        """Tokens that a lossy rule let through and the exact rule would have refused, of all after the prefill."""
        return self.refused / max(1, self.tokens - self.first_tokens) if self.lossy_rounds else None

    @property
    def mean_kl(self) -> float | None:
        """Mean over rounds of KL(emitted ‖ target), in nats; None for exact rules."""
        return self.kl / self.lossy_rounds if self.lossy_rounds else None


def tokens_per_second(rounds: Iterable[Round]) -> float | None:
    """`LaneCounts.tokens_per_second` of a lane's rounds, the prefill first."""
    return LaneCounts(rounds).tokens_per_second


def time_to_first_token(rounds: Iterable[Round]) -> float | None:
    """`LaneCounts.time_to_first_token` of a lane's rounds, the prefill first."""
    return LaneCounts(rounds).time_to_first_token


def acceptance_rate(rounds: Iterable[Round]) -> float | None:
    """`LaneCounts.acceptance_rate` of these rounds."""
    return LaneCounts(rounds).acceptance_rate


def tokens_per_pass(rounds: Iterable[Round]) -> float | None:
    """`LaneCounts.tokens_per_pass` of these rounds."""
    return LaneCounts(rounds).tokens_per_pass


def tokens_per_pass_histogram(rounds: Sequence[Round]) -> dict[int, int]:
    """How many rounds emitted 1, 2, 3, … tokens (the prefill is not counted)."""
    histogram: dict[int, int] = defaultdict(int)
    for r in rounds:
        if r.index > 0:
            histogram[len(r.emitted)] += 1
    return dict(sorted(histogram.items()))


class Drafting(Protocol):
    """What acceptance needs of a round: tokens that were drafted and verified, and those of them that were accepted."""

    @property
    def drafted(self) -> int: ...

    @property
    def accepted(self) -> int: ...


def mean_acceptance_length(rounds: Iterable[Drafting]) -> float | None:
    """1 + accepted / rounds with a draft, as vLLM defines it; `tokens_per_pass` counts the other rounds too."""
    drafts = [r.accepted for r in rounds if r.drafted]
    return 1 + sum(drafts) / len(drafts) if drafts else None


def acceptance_per_position(rounds: Iterable[Drafting]) -> list[float]:
    """Accepted drafts of position i = 1, 2, … ÷ rounds with a draft, as far as any was drafted, as vLLM defines it:
    cumulative, and a draft that was too short to reach the position counts as not accepted there."""
    drafts = [r for r in rounds if r.drafted]
    longest = max((r.drafted for r in drafts), default=0)
    return [sum(r.accepted >= i for r in drafts) / len(drafts) for i in range(1, longest + 1)]


def per_position_acceptance(rounds: Iterable[Drafting]) -> list[float]:
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


def speedup(trace: Trace) -> float | None:
    """Speculative tokens/s ÷ baseline tokens/s, same prompt, same process, same weights."""
    return ratio(tokens_per_second(trace.lane(SPECULATIVE)), tokens_per_second(trace.lane(BASELINE)))


LEVEL = 0.95  # nominal coverage of the interval
REPLICATES = 400
BLOCKS = 6  # at least, so that their spread can be told
_NORMAL = 1.959964  # 97.5 % quantile


class Lane(NamedTuple):
    """What an interval needs of a lane: tokens and seconds of every round after the prefill, float `[n]`, and the
    tokens and seconds of the prefill."""

    tokens: np.ndarray
    seconds: np.ndarray
    first_tokens: int
    first_seconds: float

    @classmethod
    def of(cls, rounds: Sequence[Round]) -> Lane:
        """From a lane's rounds, the prefill first. Seconds are differences of the lane's clock."""
        clock = np.array([r.clock for r in rounds])
        tokens = np.array([len(r.emitted) for r in rounds[1:]], float)
        first = (len(rounds[0].emitted), rounds[0].clock) if rounds else (0, 0.0)
        return cls(tokens, np.diff(clock), *first)

    @property
    def rate(self) -> float:
        """Tokens per second after the first token."""
        return float(self.tokens.sum() / self.seconds.sum())

    @property
    def end_to_end_rate(self) -> float:
        """Tokens per second, the prefill included."""
        return float((self.first_tokens + self.tokens.sum()) / (self.first_seconds + self.seconds.sum()))


@dataclass(frozen=True, slots=True)
class Speedup:
    """Speedups with the ends of their intervals; `end_to_end` counts the prefill in both lanes."""

    value: float
    low: float
    high: float
    end_to_end: float
    end_to_end_low: float
    end_to_end_high: float


def speedup_with_interval(baseline: Lane, speculative: Lane) -> Speedup | None:
    """The speedup and its 95 % interval by a block bootstrap over rounds, None before two rounds of each lane.

    Neighbouring rounds are alike (text that is easy to draft, a machine that is busy for a while), so each lane's
    rounds are drawn again in circular blocks (Politis and Romano 1992) and not one by one. Blocks hold a sixth of the
    lane's rounds, at most 2·√n: few and long ones, because a block that is shorter than the correlation makes the
    interval too narrow, which is worse than one a little too wide. The uncertainty that few blocks leave is corrected
    twice: the spread is divided by √(1 − block / n), the known bias of the circular bootstrap's variance, and widened
    from the normal to Student's t quantile with Welch's degrees of freedom. Percentiles are of the logarithm of the
    ratio.

    The lanes are drawn apart: numerator and denominator are their own rounds. What differs between two runs of the
    same race (frequency, placement in memory, other processes) is not in it.
    """
    lanes = (speculative, baseline)
    if any(len(lane.seconds) < 2 or lane.seconds.sum() <= 0 or lane.tokens.sum() <= 0 for lane in lanes):
        return None
    noise = np.random.default_rng(0)
    spread = np.zeros((2, REPLICATES))  # decoding, end to end: log of replicate / estimate
    variances, freedoms = [], []
    for sign, lane in zip((1, -1), lanes, strict=True):
        n = len(lane.seconds)
        block = math.ceil(min(n / BLOCKS, 2 * math.sqrt(n)))
        tokens, seconds = _resampled(lane, block, noise)
        scale = 1 / math.sqrt(1 - block / n)
        decoding = scale * np.log(np.maximum(tokens, 0.5) / np.maximum(seconds, 1e-12) / lane.rate)
        whole = (lane.first_tokens + tokens) / (lane.first_seconds + np.maximum(seconds, 1e-12))
        spread += sign * np.stack([decoding, scale * np.log(whole / lane.end_to_end_rate)])
        variances.append(float(decoding.var()))
        freedoms.append(max(n / block - 1, 1.0))
    total = sum(variances)
    freedom = total**2 / sum(v * v / f for v, f in zip(variances, freedoms, strict=True)) if total > 0 else math.inf
    wider = quantile((1 + LEVEL) / 2, max(freedom, 2.0)) / _NORMAL
    ends = np.quantile(spread, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=1) * wider
    (low, whole_low), (high, whole_high) = np.exp(ends).tolist()
    value = speculative.rate / baseline.rate
    whole_value = speculative.end_to_end_rate / baseline.end_to_end_rate
    return Speedup(
        value, value * min(low, 1.0), value * max(high, 1.0),
        whole_value, whole_value * min(whole_low, 1.0), whole_value * max(whole_high, 1.0),
    )  # fmt: skip


def _resampled(lane: Lane, block: int, noise: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and seconds `[REPLICATES]` of as many rounds as the lane has, drawn in circular blocks.

    The blocks' sum is scaled to n rounds, since ⌈n / block⌉ blocks hold a few more.
    """
    n = len(lane.seconds)
    count = -(-n // block)
    at = noise.integers(n, size=(REPLICATES, count))

    def totals(values: np.ndarray) -> np.ndarray:
        sums = np.concatenate([[0.0], np.cumsum(np.concatenate([values, values[:block]]))])
        return np.asarray((sums[at + block] - sums[at]).sum(1) * (n / (count * block)))

    return totals(lane.tokens), totals(lane.seconds)


def verdict(drafted: int, estimate: Speedup | None) -> str | None:
    """What may be said of a race that is over: "nothing drafted", "faster", "slower", or "no difference" where the
    interval holds 1. None before there is an interval."""
    if estimate is None:
        return None
    if drafted == 0:
        return "nothing drafted"
    return "faster" if estimate.low > 1 else "slower" if estimate.high < 1 else "no difference"


REPEATED = 24  # tokens
LOOPING = 0.3  # share of repeated n-grams from which a text counts as looping


class Repetition:
    """The share of a growing text's n-grams (n = `REPEATED` tokens) that occurred before in the same text.

    24 tokens are about two sentences, more than what lists, tables, code and JSON repeat from one entry to the next:
    with n = 8 half of an HTML list counts as repeated, with n = 24 a twentieth. The share stays below a quarter even
    for a song with a chorus, and in a looping text most n-grams are repeated; `LOOPING` lies between. A loop is found
    once it fills some four tenths of the text.
    """

    def __init__(self) -> None:
        self._last: list[int] = []
        self._seen: set[int] = set()
        self._grams = self._repeats = 0

    def add(self, token: int) -> None:
        self._last.append(token)
        if len(self._last) < REPEATED:
            return
        gram = hash(tuple(self._last))
        del self._last[0]
        self._grams += 1
        self._repeats += gram in self._seen
        self._seen.add(gram)

    @property
    def share(self) -> float:
        """In [0, 1]; 0 for a text shorter than one n-gram."""
        return self._repeats / self._grams if self._grams else 0.0

    @property
    def looping(self) -> bool:
        """A drafter finds such a text easier than any other, so its speedup says little about other texts."""
        return self.share >= LOOPING


def repeated_share(tokens: Iterable[int]) -> float:
    """`Repetition.share` of a whole text."""
    repetition = Repetition()
    for token in tokens:
        repetition.add(token)
    return repetition.share


def race_report(trace: Trace) -> dict[str, Any]:
    """The object `python -m spec_decode race --json` prints: both lanes, their rates, and whether they agree. With
    synthetic acceptance the texts mean nothing, and "identical" is never true."""
    speculative = trace.lane(SPECULATIVE)
    synthetic = trace.settings.get("synthetic_acceptance")
    counts = LaneCounts(speculative)
    estimate = speedup_with_interval(Lane.of(trace.lane(BASELINE)), Lane.of(speculative))
    lanes = {lane: _lane_report(trace, lane) for lane in (BASELINE, SPECULATIVE)}
    return {
        "pair": trace.pair,
        "settings": trace.settings,
        "machine": trace.machine,
        "versions": trace.versions,
        "date": trace.date,
        "prompt_tokens": trace.prompt_tokens,
        "baseline": lanes[BASELINE],
        "speculative": {
            **lanes[SPECULATIVE],
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
            "drafted": counts.drafted,
            "accepted": counts.accepted,
            "acceptance_rate": counts.acceptance_rate,
            "tokens_per_pass": counts.tokens_per_pass,
        },
        "speedup": speedup(trace),
        "speedup_interval": [estimate.low, estimate.high] if estimate else None,
        "end_to_end_speedup": estimate.end_to_end if estimate else None,
        "end_to_end_interval": [estimate.end_to_end_low, estimate.end_to_end_high] if estimate else None,
        "verdict": verdict(counts.drafted, estimate),
        "looping": any(report["repeated_share"] >= LOOPING for report in lanes.values()),
        "synthetic_acceptance": synthetic,
        "identical": trace.identical and synthetic is None,
        "parting": parting(trace),
    }


def _lane_report(trace: Trace, lane: str) -> dict[str, Any]:
    counts = LaneCounts(trace.lane(lane))
    return {
        "text": trace.text(lane),
        "token_ids": trace.token_ids(lane),
        "prefill_seconds": counts.time_to_first_token,
        "seconds": counts.clock,
        "tokens_per_second": counts.tokens_per_second,
        "finish": trace.finish.get(lane, "running"),
        "repeated_share": repeated_share(trace.token_ids(lane)),
    }
