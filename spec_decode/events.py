"""A race as data, which sources write and everything else reads: `Token`, `Round`, `Trace`.

In: `trace_format` alone. Out: frozen dataclasses that are written as JSON and read back, without torch, so that a
finished race can be stored, sent and replayed without a model. The format of a trace is docs/trace.schema.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple

from . import trace_format

Role = Literal["prompt", "target", "accepted", "rejected", "correction", "bonus"]

DRAFTED: frozenset[str] = frozenset({"accepted", "rejected"})
EMITTED: frozenset[str] = frozenset({"target", "accepted", "correction", "bonus"})

BASELINE = "baseline"
SPECULATIVE = "speculative"


class Alternative(NamedTuple):
    """A token that might have stood at a position, and its probability there. Its text is in `Trace.pieces`."""

    id: int
    p: float


class Comparison(NamedTuple):
    """The two numbers that a rule compared for a drafted token; what they are is said by the rule (`rules.Rule`).

    Rules that draw a uniform number: it is `value`, and the token passes if it is below `bound`. Others: the token's
    `value` is compared with the `bound` of the target's own choice, and passes if it reaches it. A draft is accepted up
    to the first token that does not pass, or under block verification up to the last that does.
    """

    value: float
    bound: float


class Residual(NamedTuple):
    """What the target's own token was drawn from after a rejection: the `mass` of the residual (max(p − q, 0) under
    rejection) before it was normalized, and its likeliest tokens with their normalized probabilities. Without mass, p =
    q up to rounding, it was drawn from p."""

    mass: float
    top: tuple[Alternative, ...]


@dataclass(frozen=True, slots=True)
class Token:
    """One token as it is shown.

    `text` is what the token adds to the text before it (for a rejected token: to the text it was drafted after).
    A character split over several tokens belongs whole to the last of them; the others have an empty text.
    `p` and `q` are probabilities in [0, 1] under target and drafter, None where the model gave none.
    `draft_position` counts 1…γ within the round's draft, None for the target's own tokens. `target_top` and
    `drafter_top` are the likeliest tokens under either at this position, most likely first, as far as they were
    recorded; `compared` is what the rule compared, None where it compared nothing (the target's own tokens, and drafted
    ones that verification did not reach).
    """

    id: int
    text: str
    role: Role
    p: float | None = None
    q: float | None = None
    draft_position: int | None = None
    target_top: tuple[Alternative, ...] = ()
    drafter_top: tuple[Alternative, ...] = ()
    compared: Comparison | None = None

    @property
    def emitted(self) -> bool:
        """True when the token is part of the output (a rejected one is not, nor is the prompt)."""
        return self.role in EMITTED

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Token:
        """The token that `Round.to_dict` made a dictionary of, in this process or in JSON.

        Raises:
            TypeError: a field is missing or unknown.
        """
        fields = dict(data)
        for name in ("target_top", "drafter_top"):
            if name in data:
                fields[name] = _alternatives(data[name])
        compared = data.get("compared")
        fields["compared"] = Comparison(*compared) if compared else None
        return cls(**fields)


def _shallow(instance: Any) -> dict[str, Any]:
    """The fields of a dataclass. `asdict` would copy every alternative of every token, one by one."""
    return {name: getattr(instance, name) for name in instance.__dataclass_fields__}


def _alternatives(rows: Iterable[Iterable[Any]]) -> tuple[Alternative, ...]:
    return tuple(Alternative(*row) for row in rows)


@dataclass(frozen=True, slots=True)
class Reading:
    """`read` of the prompt's `total` tokens have been read, and no lane has a token yet. Not part of a trace: it
    tells a waiting visitor how far it is."""

    read: int
    total: int


@dataclass(frozen=True, slots=True)
class Note:
    """What the engine says of a lane while it runs, in one sentence; `lasting` where it holds for the whole race, as
    that rounds are not recorded. A trace keeps the sentences."""

    lane: str
    text: str
    lasting: bool = False

    def __str__(self) -> str:
        return f"{self.lane}: {self.text}"


@dataclass(frozen=True, slots=True)
class Round:
    """One draft and one target pass of a lane; round 0 is the prefill, which emits the first token, or none where a
    person drafts what comes first. Its `verify_seconds` are the target's reading of the prompt, its `draft_seconds` the
    drafter's, if it reads one.

    `tokens` stand in display order: accepted, rejected, then the target's own (correction, bonus, or target when
    nothing was drafted). `draft_length` is the γ that was asked for; a drafter may have proposed fewer tokens, and
    a round that ends the text keeps only the drafts up to the end. `seconds` is the whole round, `clock` the lane's
    own busy time after it, both in seconds. `refused` counts tokens a lossy rule let through that the exact rule
    would have refused, `kl` is the mean divergence KL(emitted ‖ target) in nats over the round's positions;
    both are None for exact rules. `drafter` names the one that made the draft, empty where nothing was drafted.
    `residual` is what the correction was drawn from, for rules that draw it from a residual.
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
    drafter: str = ""
    residual: Residual | None = None

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

    @property
    def alternatives(self) -> set[int]:
        """The ids of the tokens that were recorded as alternatives."""
        tops = [top for t in self.tokens for top in (t.target_top, t.drafter_top)]
        tops += [self.residual.top] if self.residual else []
        return {alternative.id for top in tops for alternative in top}

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `Round.from_dict` is its inverse."""
        return {**_shallow(self), "tokens": [_shallow(token) for token in self.tokens]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Round:
        """The round `to_dict` was made from.

        Raises:
            TypeError: a field is missing or unknown.
        """
        residual = data.get("residual")
        return cls(
            **{
                **data,
                "tokens": tuple(Token.from_dict(token) for token in data["tokens"]),
                "residual": Residual(residual[0], _alternatives(residual[1])) if residual else None,
            }
        )


@dataclass(frozen=True, slots=True)
class Costs:
    """Measured costs of the pair on its device, the inputs of the speedup model (arXiv:2211.17192).

    `step_seconds` is a target pass over one token; `verify_ratio[γ]` is v(γ), a target pass over γ + 1 tokens in
    units of it (so v(0) = 1); `draft_ratio` is c, one drafted token in the same unit, and `draft_start` what the first
    of a draft costs beyond that (its weights come from memory, those of the next ones do not). `other_ratio` is what
    else a round takes where there is a drafter, measured in races, see `costs.learned`. `doubt` is the relative scatter
    of the load-time samples. `errors` are the relative standard errors of v(γ), empty before the first race.
    """

    step_seconds: float
    verify_ratio: tuple[float, ...]
    draft_ratio: float
    draft_start: float = 0.0
    other_ratio: float = 0.0
    doubt: float = 0.1
    errors: tuple[float, ...] = ()

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
        return cls(**{**data, "verify_ratio": tuple(data["verify_ratio"]), "errors": tuple(data.get("errors", ()))})


@dataclass(frozen=True, slots=True)
class Promises:
    """What a source can promise of every race, beyond what the rule says (`Settings.exact`, `Settings.same_text`).

    exact: the output of an exact rule follows the target's own distribution.
    same_text: both lanes emit the same tokens under a rule that makes them.
    rejected: what it tells of a rejected token: its probabilities too, the token alone, or nothing at all.
    """

    exact: bool = True
    same_text: bool = True
    rejected: Literal["probabilities", "tokens", "nothing"] = "probabilities"


@dataclass(frozen=True)
class Trace:
    """A race as it happened: enough to run it again, and to replay it without a model.

    Attributes:
        request: `Request.to_dict()`.
        pair: "target", "drafter", "device" and "dtype" as names; "revisions" where they are known.
        machine: what it ran on.
        prompt_tokens: tokens that were read before the first new one, a forced prefix included.
        rounds: of both lanes, in the order in which they happened.
        finish: per lane why it ended: "stop" for an end-of-sequence token, "length", "cancelled", "time" for a limit of
            the server, or "running".
        costs: what the draft lengths were chosen by at first, None where nothing was measured.
        versions: of this package, of Python and of the libraries, by name.
        date: when the race was begun, UTC, as 2026-01-31T12:00:00Z; None in a trace of format version 1.
        promises: those of the source that ran it.
        pieces: the text of every token that occurs as an alternative, by itself, by its id in decimal.
        omitted: the fields of the request that were left out when the trace was exported.
        notes: what the engine said of its lanes, in order (`Note`).
        version: of the format.
    """

    request: dict[str, Any]
    pair: dict[str, Any]
    machine: dict[str, Any]
    prompt_tokens: int
    rounds: tuple[Round, ...]
    finish: dict[str, str] = field(default_factory=dict)
    costs: Costs | None = None
    versions: dict[str, str] = field(default_factory=dict)
    date: str | None = None
    promises: Promises = Promises()
    pieces: dict[str, str] = field(default_factory=dict)
    omitted: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    version: int = trace_format.VERSION

    @property
    def prompt(self) -> str:
        """The prompt that was asked for."""
        return str(self.request["prompt"])

    @property
    def settings(self) -> dict[str, Any]:
        """`Settings.to_dict()`."""
        settings: dict[str, Any] = self.request["settings"]
        return settings

    def lane(self, name: str) -> tuple[Round, ...]:
        """The rounds of one lane, in order."""
        return tuple(r for r in self.rounds if r.lane == name)

    def text(self, lane: str) -> str:
        """The output of one lane, after the prefix if one was forced."""
        return "".join(r.text for r in self.lane(lane))

    def token_ids(self, lane: str) -> list[int]:
        """The output of one lane as token ids, after the prefix if one was forced."""
        return [t.id for r in self.lane(lane) for t in r.emitted]

    @property
    def identical(self) -> bool:
        """True when both lanes emitted the same token ids."""
        return self.token_ids(BASELINE) == self.token_ids(SPECULATIVE)

    def exported(self, system: bool = False) -> Trace:
        """The trace as it may leave this machine: of local paths the last component is left, and the system prompt is
        left out, unless `system`; `omitted` then says so."""
        request = {**self.request, "drafter": trace_format.portable(self.request.get("drafter"))}
        omitted = self.omitted
        if request.get("system") and not system:
            request["system"] = None
            omitted = (*omitted, "system")
        pair, machine = trace_format.portable(self.pair), trace_format.portable(self.machine)
        return replace(self, request=request, pair=pair, machine=machine, omitted=omitted)

    def to_json(self) -> str:
        """One JSON object; `Trace.from_json` is its inverse."""
        data = {**_shallow(self), "rounds": [r.to_dict() for r in self.rounds], "promises": asdict(self.promises)}
        data["costs"] = self.costs.to_dict() if self.costs else None
        return json.dumps(data, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Trace:
        """The trace `to_json` was made from. One of format version 1 comes back in the fields of this version.

        Raises:
            ValueError: in one sentence: the text is not JSON, or not a trace of a version that is known, or a field is
                missing, unknown, or of the wrong type.
        """
        data = trace_format.read(text)
        try:
            costs = data.pop("costs", None)
            return cls(
                **{
                    **data,
                    "rounds": tuple(Round.from_dict(r) for r in data["rounds"]),
                    "costs": Costs.from_dict(costs) if costs is not None else None,
                    "promises": Promises(**data.get("promises", {})),
                    "omitted": tuple(data.get("omitted", ())),
                    "notes": tuple(data.get("notes", ())),
                }
            )
        except (KeyError, TypeError) as error:
            said = f"there is no {error}" if isinstance(error, KeyError) else str(error)
            raise trace_format.refused(said) from error
