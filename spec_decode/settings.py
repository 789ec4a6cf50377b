"""Settings: the sampling and speculation parameters of a race, validated once, here.

In: numbers and names from a form, a command line or JSON. Out: a frozen `Settings` that the rest may trust, or a
`SettingsError` that names the field and says in one sentence what it takes.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from .errors import SettingsError, quoted
from .rules import RULES, SYNTHETIC, Rule, deciding, default

POLICIES: tuple[str, ...] = ("adaptive", "rate")
_POLICY_ALIASES = {"threshold": "rate"}  # what "rate" was called before
MAX_DRAFT_LENGTH = 16
LEAST_LENIENCE = 1e-6  # far below it, products with probabilities leave the range of float32
MAX_NEW_TOKENS = 32_768
MAX_SEED = 2**53 - 1  # the integers a browser can hold


@dataclass(frozen=True, slots=True)
class Settings:
    """Parameters of one race.

    draft_length: tokens the drafter proposes a round, 1…16, or a policy, "adaptive" or "rate".
    temperature: 0 is greedy decoding; up to 5.
    top_p: keep the smallest set of most likely tokens whose probability reaches this, in (0, 1]; 1 keeps all.
    top_k: keep the k most likely tokens; 0 keeps all.
    rule: name of a verification rule (`rules.RULES`); None takes "greedy" at temperature 0 and "coupled" above it.
    lenience: for lossy rules only, from 1e-6 to 1; 1 is exact, smaller is faster and further from the target.
    max_new_tokens: the output ends after this many tokens, exactly.
    seed: of the noise that sampling uses.
    synthetic_acceptance: measures time alone: each drafted token is accepted with this probability, from 0 to 1, given
        that those before it were, whatever the target says. It takes the place of a rule. None for a rule's verdicts.

    Raises:
        SettingsError: a value is out of range or of the wrong kind.
    """

    draft_length: int | str = "adaptive"
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    rule: str | None = None
    lenience: float = 0.3
    max_new_tokens: int = 256
    seed: int = 0
    synthetic_acceptance: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.draft_length, str):
            text = self.draft_length.strip().lower()
            text = _POLICY_ALIASES.get(text, text)
            value: int | str = text if text in POLICIES else _integer("draft_length", text, 1, MAX_DRAFT_LENGTH)
        else:
            value = _integer("draft_length", self.draft_length, 1, MAX_DRAFT_LENGTH)
        self._set("draft_length", value)
        self._set("temperature", _number("temperature", self.temperature, 0.0, 5.0))
        self._set("top_p", _number("top_p", self.top_p, 0.0, 1.0))
        if self.top_p == 0.0:
            raise SettingsError("top_p", "Top-p must be above 0; 1 keeps every token.")
        self._set("top_k", _integer("top_k", self.top_k, 0, 1_000_000))
        self._set("lenience", _number("lenience", self.lenience, 0.0, 1.0))
        if self.lenience < LEAST_LENIENCE:
            raise SettingsError("lenience", f"Lenience must be at least {LEAST_LENIENCE:g}; 1 is exact.")
        self._set("max_new_tokens", _integer("max_new_tokens", self.max_new_tokens, 1, MAX_NEW_TOKENS))
        self._set("seed", _integer("seed", self.seed, 0, MAX_SEED))
        if self.synthetic_acceptance is not None:
            self._set("synthetic_acceptance", _number("synthetic_acceptance", self.synthetic_acceptance, 0.0, 1.0))
            if self.rule not in (None, "", "auto", SYNTHETIC.name):
                raise SettingsError("rule", "Synthetic acceptance takes the place of a rule; ask for one of the two.")
            self._set("rule", SYNTHETIC.name)
            return
        if self.rule in (None, "", "auto"):
            self._set("rule", default(self.temperature).name)
        if not isinstance(self.rule, str) or self.rule not in RULES:
            raise SettingsError("rule", f"Unknown rule {quoted(self.rule)}; choose one of {', '.join(RULES)}.")
        if self.temperature > 0 and not RULES[self.rule].samples:
            sampling = " or ".join(rule.name for rule in RULES.values() if rule.samples and rule.exact)
            raise SettingsError("rule", f"The {self.rule} rule needs temperature 0; choose {sampling} to sample.")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def deciding(self) -> Rule:
        """The rule that decides: the one named, or at temperature 0 the greedy one if that is exact."""
        return SYNTHETIC if self.synthetic else deciding(RULES[str(self.rule)], self.temperature)

    @property
    def synthetic(self) -> bool:
        """True when verdicts are drawn and not decided, so that only times mean something."""
        return self.synthetic_acceptance is not None

    @property
    def draws_q(self) -> bool:
        """True when the rule asks for the distribution q that drafts were drawn from."""
        return self.temperature > 0 and self.deciding.noise == "round"

    @property
    def exact(self) -> bool:
        """True when the output follows the target's own distribution."""
        return self.deciding.exact

    @property
    def same_text(self) -> bool:
        """True when both lanes must emit the same tokens, whatever the drafter does."""
        return self.deciding.same_text

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `Settings(**d)` is its inverse."""
        return asdict(self)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The field names, in order."""
        return tuple(f.name for f in fields(cls))


_LABELS = {
    "draft_length": "Draft length",
    "temperature": "Temperature",
    "top_p": "Top-p",
    "top_k": "Top-k",
    "lenience": "Lenience",
    "max_new_tokens": "Max new tokens",
    "seed": "Seed",
    "synthetic_acceptance": "Synthetic acceptance",
}


def _number(field: str, value: object, low: float, high: float) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(value, bool) or not low <= number <= high:
        raise SettingsError(field, f"{_LABELS[field]} must be a number from {low:g} to {high:g}, not {quoted(value)}.")
    return number


def _integer(field: str, value: object, low: int, high: int) -> int:
    try:
        number = float(value)  # type: ignore[arg-type]
        whole = int(value) if isinstance(value, (int, str)) else int(number)
    except (TypeError, ValueError, OverflowError):
        whole, number = low - 1, math.nan
    if isinstance(value, bool) or whole != number or not low <= whole <= high:
        extra = f" or one of {', '.join(POLICIES)}" if field == "draft_length" else ""
        raise SettingsError(
            field, f"{_LABELS[field]} must be a whole number from {low} to {high}{extra}, not {quoted(value)}."
        )
    return whole
