"""What an exactness test is made of: a rule, a drafter, a draft length, sampling parameters and a number of texts.

In: names and numbers from a command line or a page. Out: `Setup`, validated, and `suite`, the tests that are run where
none is named. Imports no torch.

The broken rule, "wrong", is known here alone: it is in no table that a race reads. It judges a draft that is the
drafter's argmax by p / q of the drafter's whole distribution, from which the draft was not drawn. transformers'
assisted generation does so with MTP drafters when it samples (`python -m spec_decode check lossless`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import SettingsError, quoted
from ..rules import RULES
from ..settings import Settings

WRONG = "wrong"
CLAIMED = "argmax, q claimed"  # the drafter of the broken rule
NEW_TOKENS = 3  # tokens of a text whose joint distribution is tested
LEVEL = 0.01  # family-wise false-positive rate
SEEDS = 5500
MOST_SEEDS = 1_000_000
BIAS = 0.05  # total-variation distance that a test must be able to see
POWER = 0.9  # with this probability
DRAFTERS: dict[str, str] = {
    "model": "A smaller model; every draft is drawn from its distribution q.",
    "argmax": "A smaller model’s likeliest token; nothing is drawn, so q is one-hot.",
    "lookup": "Prompt lookup: what followed the same tokens before.",
    "suffix": "Suffix decoding: what most often followed the same tokens before.",
    "model+lookup": "Each round goes to the one of the two that was lately right more often.",
}


@dataclass(frozen=True)
class Setup:
    """One test.

    rule: a name of `rules.RULES`, or "wrong". At temperature 0 every exact rule is the greedy one.
    drafter: a name of `DRAFTERS`; the broken rule has a drafter of its own, `CLAIMED`.
    draft_length, temperature, top_p: as in `Settings`. A controller of the draft length lives as long as the test, so
        that it has something to adapt to.
    seeds: how many texts, one for each seed.
    first: the first seed.

    Raises:
        SettingsError: a value is out of range, or the parts do not go together.
    """

    rule: str = "rejection"
    drafter: str = "model"
    draft_length: int | str = 3
    temperature: float = 1.0
    top_p: float = 1.0
    seeds: int = SEEDS
    first: int = 0

    def __post_init__(self) -> None:
        self.settings(0)
        if self.broken and (self.drafter != CLAIMED or float(self.temperature) == 0):
            raise SettingsError("rule", "The wrong rule brings its own drafter, and needs a temperature above 0.")
        if not self.broken and self.rule not in RULES:
            raise SettingsError("rule", f"Unknown rule {quoted(self.rule)}; choose one of {', '.join(RULES)}.")
        if not self.broken and self.drafter not in DRAFTERS:
            raise SettingsError("drafter", f"Unknown drafter {quoted(self.drafter)}; choose {', '.join(DRAFTERS)}.")
        if isinstance(self.seeds, bool) or not isinstance(self.seeds, int) or not 1 <= self.seeds <= MOST_SEEDS:
            raise SettingsError("seeds", f"Seeds must be a whole number from 1 to {MOST_SEEDS:,}.")

    @property
    def broken(self) -> bool:
        """Whether this is the rule that is wrong on purpose."""
        return self.rule == WRONG

    @property
    def greedy(self) -> bool:
        """Whether the target's own text is a single one, its argmax, so that equality with it is tested."""
        return self.settings(0).temperature == 0

    def settings(self, index: int) -> Settings:
        """The settings of the text with this index. They leave room for a whole draft after the last token tested, so
        that the end of the text cuts no draft short."""
        return Settings(
            draft_length=self.draft_length,
            temperature=self.temperature,
            top_p=self.top_p,
            rule="rejection" if self.broken else self.rule,
            max_new_tokens=NEW_TOKENS + 17,
            seed=self.first + index,
        )


def setup(rule: str, drafter: str | None = None, temperature: float | None = None, **more: object) -> Setup:
    """The test of a rule where not all is said: the drafter is a model, or the broken rule's own, and the temperature
    is 1, or 0 for a rule that does not sample."""
    if temperature is None:
        temperature = 0.0 if rule in RULES and not RULES[rule].samples else 1.0
    own = CLAIMED if rule == WRONG else "model"
    return Setup(rule, drafter or own, temperature=temperature, **more)  # type: ignore[arg-type]


def suite(
    rules: Iterable[str] = (), drafters: Iterable[str] = (), temperature: float | None = None, **more: object
) -> list[Setup]:
    """Every one of `rules` with every one of `drafters`; of none named, all exact rules and all drafters."""
    rules, drafters = list(rules), list(drafters)
    made = []
    for rule in dict.fromkeys(rules or [rule.name for rule in RULES.values() if rule.exact]):
        usual = [CLAIMED] if rule == WRONG else list(DRAFTERS)
        made += [setup(rule, drafter, temperature, **more) for drafter in dict.fromkeys(drafters or usual)]
    return made
