"""What the engine says and everything else reads: `Token`, `Round`, `Trace`.

In: nothing of ours. Out: frozen dataclasses that go to JSON and come back, with no torch in sight, so a
finished race can be stored, sent and replayed without a model. Who decides what a round holds: `decode`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Role = Literal["prompt", "target", "accepted", "rejected", "correction", "bonus"]

DRAFTED: frozenset[str] = frozenset({"accepted", "rejected"})
EMITTED: frozenset[str] = frozenset({"target", "accepted", "correction", "bonus"})

BASELINE = "baseline"
SPECULATIVE = "speculative"


@dataclass(frozen=True, slots=True)
class Token:
    """One token as it is shown.

    `text` is what the token adds to the text before it (for a rejected token: to the text it was guessed after).
    A character split over several tokens belongs whole to the last of them; the others have an empty text.
    `p` and `q` are probabilities in [0, 1] under target and drafter, None where the model gave none.
    `draft_position` counts 1…γ within the round's draft, None for the target's own tokens.
    """

    id: int
    text: str
    role: Role
    p: float | None = None
    q: float | None = None
    draft_position: int | None = None

    @property
    def emitted(self) -> bool:
        """True when the token is part of the output (a rejected one is not, nor is the prompt)."""
        return self.role in EMITTED


@dataclass(frozen=True, slots=True)
class Reading:
    """`read` of the prompt's `total` tokens have been read, and no lane has a token yet. Not part of a trace: it is
    there so that whoever waits sees how far it is, and may stop."""

    read: int
    total: int


@dataclass(frozen=True, slots=True)
class Round:
    """One draft and one target pass of a lane; round 0 is the prefill, which emits the first token. Its
    `verify_seconds` are the target's reading of the prompt, its `draft_seconds` the drafter's, if it reads one.

    `tokens` stand in display order: accepted, rejected, then the target's own (correction, bonus, or target when
    nothing was drafted). `draft_length` is the γ that was asked for; a drafter may have proposed fewer tokens, and
    a round that ends the text keeps only the drafts up to the end. `seconds` is the whole round, `clock` the lane's
    own busy time after it, both in seconds. `refused` counts tokens a lossy rule let through that the exact rule
    would have refused, `kl` is the mean divergence KL(emitted ‖ target) in nats over the round's positions;
    both are None for exact rules.
    """

    lane: str
    index: int
    tokens: tuple[Token, ...]
    draft_length: int
    draft_seconds: float
    verify_seconds: float
    seconds: float
    clock: float
    refused: int | None = None
    kl: float | None = None

    @property
    def drafted(self) -> int:
        """Number of drafted tokens that were verified."""
        return sum(t.role in DRAFTED for t in self.tokens)

    @property
    def accepted(self) -> int:
        """Number of drafted tokens that were accepted."""
        return sum(t.role == "accepted" for t in self.tokens)

    @property
    def emitted(self) -> tuple[Token, ...]:
        """The tokens this round added to the output, in order."""
        return tuple(t for t in self.tokens if t.emitted)

    @property
    def text(self) -> str:
        """The text this round added to the output."""
        return "".join(t.text for t in self.tokens if t.emitted)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `Round.from_dict` is its inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Round:
        """The round `to_dict` was made from.

        Raises:
            TypeError: a field is missing or unknown.
        """
        return cls(**{**data, "tokens": tuple(Token(**t) for t in data["tokens"])})


@dataclass(frozen=True, slots=True)
class Costs:
    """Measured costs of the pair on its device, the inputs of the speedup model (arXiv:2211.17192).

    `step_seconds` is a target pass over one token; `verify_ratio[γ]` is v(γ), a target pass over γ + 1 tokens in
    units of it (so v(0) = 1); `draft_ratio` is c, one drafted token in the same unit, and `draft_start` what the first
    of a draft costs beyond that (its weights come from memory, those of the next ones do not). `other_ratio` is what
    else a round takes where there is a drafter; a race tells it, see `costs.learned`. `doubt` is the relative scatter
    of the samples that the ratios were measured from.
    """

    step_seconds: float
    verify_ratio: tuple[float, ...]
    draft_ratio: float
    draft_start: float = 0.0
    other_ratio: float = 0.0
    doubt: float = 0.1

    def draft(self, length: int) -> float:
        """A draft of that length, in target passes over one token: length·c, and the start if length > 0."""
        return length * self.draft_ratio + (self.draft_start if length else 0.0)

    def round(self, draft_length: int) -> float:
        """A round of that draft length, in target passes over one token: v(γ), the draft, and the rest."""
        verify = self.verify_ratio[min(draft_length, len(self.verify_ratio) - 1)]
        return verify + self.draft(draft_length) + self.other_ratio

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Costs:
        return cls(**{**data, "verify_ratio": tuple(data["verify_ratio"])})


@dataclass(frozen=True)
class Trace:
    """A race as it happened: enough to replay it with no model.

    `pair` names target, drafter, device and dtype; `settings` is `Settings.to_dict()`; `machine` says what it ran on;
    `finish` says per lane why it ended ("stop" for an end-of-sequence token, "length", "cancelled", "time" for a limit
    of the server, or "running").
    """

    pair: dict[str, Any]
    settings: dict[str, Any]
    machine: dict[str, Any]
    prompt: str
    prompt_tokens: int
    rounds: tuple[Round, ...]
    finish: dict[str, str] = field(default_factory=dict)
    costs: Costs | None = None
    version: int = 1

    def lane(self, name: str) -> tuple[Round, ...]:
        """The rounds of one lane, in order."""
        return tuple(r for r in self.rounds if r.lane == name)

    def text(self, lane: str) -> str:
        """The output of one lane."""
        return "".join(r.text for r in self.lane(lane))

    def token_ids(self, lane: str) -> list[int]:
        """The output of one lane as token ids."""
        return [t.id for r in self.lane(lane) for t in r.emitted]

    @property
    def identical(self) -> bool:
        """True when both lanes emitted the same token ids."""
        return self.token_ids(BASELINE) == self.token_ids(SPECULATIVE)

    def to_json(self) -> str:
        """One JSON object; `Trace.from_json` is its inverse."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Trace:
        """The trace `to_json` was made from.

        Raises:
            ValueError: the text is not JSON, or not a trace of this version.
        """
        data = json.loads(text)
        if not isinstance(data, dict) or data.get("version") != 1:
            raise ValueError("not a Spec Decode trace of version 1")
        try:
            rounds = tuple(Round.from_dict(r) for r in data.pop("rounds"))
            costs = data.pop("costs", None)
            return cls(rounds=rounds, costs=Costs.from_dict(costs) if costs else None, **data)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a Spec Decode trace: {error}") from error


def emitted_tokens(rounds: Iterable[Round]) -> int:
    """How many tokens these rounds added to the output."""
    return sum(len(r.emitted) for r in rounds)
