"""One measurement of the benchmark as data: one prompt under one condition, once.

In: figures. Out: frozen dataclasses, written as JSON and read back. A file of measurements is JSON Lines: a header,
then one `Measurement` a line. Every analysis (summaries, the advisor, reports) works on these alone. Imports no torch.

Units: seconds, bytes, tokens, tokens per second, joules, nats; shares and rates in [0, 1]; None where a figure does not
exist or could not be measured. Rounds are counted as in `events.Round`: the first of a lane is the prefill, which emits
the first token, and no mean or percentile of rounds counts it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

from ..events import BASELINE, SPECULATIVE, Costs

OURS = "spec-decode"
PEER = "peer"  # the lane of a measurement of another engine


@dataclass(frozen=True, slots=True)
class Condition:
    """What is compared. Two measurements with equal conditions differ in prompt, repeat and time only. Hashable.

    draft_length: γ from 1 to 16, or a policy, "adaptive" or "rate"; 0 for other engines, whose facts tell how they
        draft.
    drafter: its name, as `Source.drafters` has it; empty for other engines.
    rule: name of the verification rule that decides at this temperature (`Settings.deciding`); empty for other engines.
    temperature: 0 is greedy decoding.
    context: tokens that the prompt was extended to, None where it was left as it is.
    turn: of a conversation, from 1; None outside of one.
    synthetic_acceptance: conditional acceptance probability of every position that verdicts were drawn with, None for
        real verdicts. With it, texts mean nothing and no exactness is claimed.
    batch_size: sequences that are decoded at once.
    engine: `OURS`, or the name of a peer.
    """

    draft_length: int | str = "adaptive"
    drafter: str = ""
    rule: str = "greedy"
    temperature: float = 0.0
    context: int | None = None
    turn: int | None = None
    synthetic_acceptance: float | None = None
    batch_size: int = 1
    engine: str = OURS

    @property
    def peer(self) -> bool:
        """Whether another engine ran."""
        return self.engine != OURS

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `Condition(**d)` is its inverse."""
        return asdict(self)


class RoundFigures(NamedTuple):
    """What the speedup model needs of a round.

    draft_length: γ that was asked for. A drafter may propose fewer tokens, and 0 is a plain step.
    drafted: drafted tokens that were verified.
    accepted: those of them that were accepted.
    emitted: tokens that the round added to the text. `accepted + 1`, except in a round that ends the text.
    draft_seconds: of the drafter.
    verify_seconds: of the target pass and the verification.
    other_seconds: the rest of the round: the choice of γ, caches, text and events.
    clock: the lane's own busy time after the round, in seconds. Differences of it are the seconds of rounds.
    drafter: who made the draft, empty where nothing was drafted.
    refused: tokens that a lossy rule let through and the exact rule would have refused; None for exact rules.
    kl: mean KL(emitted ‖ target) over the round's positions, in nats; None for exact rules.
    p: the target's probability of each emitted token, in order; empty where one is unknown.
    """

    draft_length: int
    drafted: int
    accepted: int
    emitted: int
    draft_seconds: float
    verify_seconds: float
    other_seconds: float
    clock: float
    drafter: str = ""
    refused: int | None = None
    kl: float | None = None
    p: tuple[float, ...] = ()

    @property
    def seconds(self) -> float:
        """Of the whole round."""
        return self.draft_seconds + self.verify_seconds + self.other_seconds


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of the values of one lane: their mean and percentiles."""

    mean: float
    p50: float
    p95: float
    p99: float


@dataclass(frozen=True, slots=True)
class LaneFigures:
    """One lane of a race, or the run of a peer. Names are vLLM's where the definition is vLLM's.

    token_ids: the output.
    text: the output as text; empty for peers.
    finish: why it ended: "stop", "length", "time", or "" where an engine does not say.
    rounds: the prefill first; empty for peers.

    time_to_first_token: seconds from the start of the prefill to the first token (vLLM: TTFT).
    tokens_per_second: (emitted − tokens of the prefill) / seconds since the first token.
    end_to_end_tokens_per_second: emitted / seconds, the prefill included (vLLM: output token throughput of a request).
    time_per_output_token: seconds per token after the first. Its mean is vLLM's TPOT of a request; the percentiles are
        over tokens, each of which took its round's seconds ÷ the round's tokens. (vLLM's percentiles are over requests;
        reports give both.)
    inter_token_latency: seconds from one output to the next, over rounds: tokens of a round appear together (vLLM: ITL,
        as a stream shows it).

    drafted, accepted: tokens.
    acceptance_rate: accepted / drafted (vLLM: draft acceptance rate).
    mean_acceptance_length: 1 + accepted / rounds with a draft (vLLM's definition).
    tokens_per_pass: 1 + accepted / rounds, those without a draft included.
    acceptance_per_position: accepted drafts of position i ÷ rounds with a draft, i = 1…: cumulative (as vLLM's).
    conditional_acceptance: P(draft i accepted given that i − 1 was), i = 1…, as far as one was tried.

    draft_seconds, verify_seconds, other_seconds: means over rounds.
    bandwidth: `ModelSize.read` of the target ÷ mean `verify_seconds`, bytes per second; keys and values not counted.
    bandwidth_share: of what a read of a large buffer reaches on this machine; see the header of the file.
    cpu_utilization: CPU time of our process ÷ (time · usable cores), after the prefill.
    gpu_utilization: share of the time in which a kernel ran (NVML), of both lanes together.
    peak_memory: bytes after the prefill; on the CPU the resident memory of the process, on a GPU what PyTorch had
        allocated. The other lane's cache is in it.
    energy: joules of the processor or card after the prefill, its idle power included.

    refused_share: tokens a lossy rule let through and the exact rule would have refused ÷ tokens after the prefill.
    mean_kl: mean over rounds of `RoundFigures.kl`, in nats.
    repeated_share: of the text's n-grams that occurred before (`metrics.Repetition`); from `metrics.LOOPING` on, the
        text loops, which flatters the drafter.
    """

    token_ids: tuple[int, ...]
    text: str = ""
    finish: str = ""
    rounds: tuple[RoundFigures, ...] = ()
    time_to_first_token: float | None = None
    tokens_per_second: float | None = None
    end_to_end_tokens_per_second: float | None = None
    time_per_output_token: Percentiles | None = None
    inter_token_latency: Percentiles | None = None
    drafted: int = 0
    accepted: int = 0
    acceptance_rate: float | None = None
    mean_acceptance_length: float | None = None
    tokens_per_pass: float | None = None
    acceptance_per_position: tuple[float, ...] = ()
    conditional_acceptance: tuple[float, ...] = ()
    draft_seconds: float | None = None
    verify_seconds: float | None = None
    other_seconds: float | None = None
    bandwidth: float | None = None
    bandwidth_share: float | None = None
    cpu_utilization: float | None = None
    gpu_utilization: float | None = None
    peak_memory: int | None = None
    energy: float | None = None
    refused_share: float | None = None
    mean_kl: float | None = None
    repeated_share: float = 0.0

    @property
    def tokens(self) -> int:
        """Emitted tokens."""
        return len(self.token_ids)

    @property
    def seconds(self) -> float | None:
        """The lane's busy time, the prefill included."""
        rate = self.end_to_end_tokens_per_second
        return self.rounds[-1].clock if self.rounds else self.tokens / rate if rate else None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary, rounds by columns; `LaneFigures.from_dict` is its inverse."""
        data: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("time_per_output_token", "inter_token_latency"):
            data[name] = asdict(data[name]) if data[name] else None
        for name in ("token_ids", "acceptance_per_position", "conditional_acceptance"):
            data[name] = list(data[name])
        data["rounds"] = {name: [getattr(r, name) for r in self.rounds] for name in RoundFigures._fields}
        data["rounds"]["p"] = [list(p) for p in data["rounds"]["p"]]
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LaneFigures:
        """The lane `to_dict` was made from.

        Raises:
            KeyError, TypeError, ValueError: a field is missing, unknown or of the wrong kind.
        """
        columns = data["rounds"]
        rows = zip(*(columns[name] for name in RoundFigures._fields), strict=True)
        found = {**data, "rounds": tuple(RoundFigures(*row)._replace(p=tuple(row[-1])) for row in rows)}
        for name in ("time_per_output_token", "inter_token_latency"):
            found[name] = Percentiles(**data[name]) if data[name] else None
        for name in ("token_ids", "acceptance_per_position", "conditional_acceptance"):
            found[name] = tuple(data[name])
        return cls(**found)


@dataclass(frozen=True, slots=True)
class ModelSize:
    """A model's parameters, the bytes that they take as it is loaded, and those of them that one pass reads: all but
    the input embeddings, of which a pass reads a row for each token. None where a pass reads some experts only."""

    parameters: int
    bytes: int
    read: int | None = None


@dataclass(frozen=True, slots=True)
class MachineState:
    """The machine during a measurement.

    load: average length of the run queue over the last minute, before the measurement.
    frequency: of the clock in Hz, mean over the cores, after the measurement.
    others_busy: mean number of cores that were busy with other processes.
    """

    load: float | None = None
    frequency: float | None = None
    others_busy: float | None = None


@dataclass(frozen=True)
class Measurement:
    """One prompt under one condition, once.

    condition: what is compared.
    prompt: its id.
    category: of the prompt.
    repeat: from 0. Every prompt is measured under every condition once in each repeat.
    order: its place in the shuffled order in which everything was measured, from 0.
    date: when it began, UTC, as 2026-01-31T12:00:00Z.
    prompt_tokens: tokens that were read before the first new one.
    lanes: `BASELINE` and `SPECULATIVE` of a race, by name; `PEER` alone for another engine. The two lanes of a race are
        advanced in turns, round by round, so that they meet the same machine: their ratio is paired.
    speedup: the speculative lane's `tokens_per_second` ÷ the baseline's, in the same race; None for peers, whose ratio
        to our lanes is taken over measurements of the same prompt.
    end_to_end_speedup: the same of `end_to_end_tokens_per_second`.
    identical: both lanes emitted the same tokens; None for peers, and with synthetic acceptance.
    same_text: both lanes must emit the same tokens under this rule, so that `identical` False is a fault.
    costs: what the draft lengths were chosen by at first (`events.Costs`); None where nothing was measured.
    target: size of the target.
    drafter: size of the drafter; None where it has no weights.
    machine: its state during the measurement.
    """

    condition: Condition
    prompt: str
    category: str
    repeat: int
    order: int
    date: str
    prompt_tokens: int
    lanes: dict[str, LaneFigures]
    speedup: float | None = None
    end_to_end_speedup: float | None = None
    identical: bool | None = None
    same_text: bool = False
    costs: Costs | None = None
    target: ModelSize | None = None
    drafter: ModelSize | None = None
    machine: MachineState = field(default_factory=MachineState)

    @property
    def baseline(self) -> LaneFigures:
        """Raises KeyError for a peer."""
        return self.lanes[BASELINE]

    @property
    def speculative(self) -> LaneFigures:
        """Raises KeyError for a peer."""
        return self.lanes[SPECULATIVE]

    @property
    def key(self) -> tuple[Condition, str, int]:
        """Condition, prompt and repeat: what is measured once in a file."""
        return self.condition, self.prompt, self.repeat

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `Measurement.from_dict` is its inverse."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        data |= {name: asdict(data[name]) if data[name] else None for name in (*_RECORDS, "costs")}
        return {**data, "lanes": {name: lane.to_dict() for name, lane in self.lanes.items()}}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Measurement:
        """The measurement `to_dict` was made from.

        Raises:
            KeyError, TypeError, ValueError: a field is missing, unknown or of the wrong kind.
        """
        found = {**data, "lanes": {name: LaneFigures.from_dict(lane) for name, lane in data["lanes"].items()}}
        for name, kind in _RECORDS.items():
            found[name] = kind(**data[name]) if data[name] else None
        found["costs"] = Costs.from_dict(data["costs"]) if data["costs"] else None
        return cls(**found)


_RECORDS: dict[str, Any] = {
    "condition": Condition,
    "target": ModelSize,
    "drafter": ModelSize,
    "machine": MachineState,
}


def conditions(measurements: Sequence[Measurement]) -> list[Condition]:
    """The conditions that were measured: ours first, then by temperature, rule, drafter and draft length."""
    return sorted({m.condition for m in measurements}, key=_sorted_by)


def _sorted_by(condition: Condition) -> tuple[Any, ...]:
    length = condition.draft_length
    return (
        condition.peer,
        condition.engine,
        condition.synthetic_acceptance or 0.0,
        condition.batch_size,
        condition.context or 0,
        condition.turn or 0,
        condition.temperature,
        condition.rule,
        condition.drafter,
        isinstance(length, str),
        length if isinstance(length, int) else 0,
        str(length),
    )
