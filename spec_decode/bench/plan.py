"""The plan of a benchmark: what is compared, and the order in which it is measured.

In: the values of every setting that is varied. Out: conditions without repetitions, and a shuffled order of tasks that
the same seed gives again. Imports no torch.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, NamedTuple

from ..errors import SettingsError
from ..settings import Settings
from .measurement import Condition

# What a user says in the second turn of a conversation, in the third, and so on, from the first again after the last.
FOLLOW_UPS = (
    "Please go into more detail on the part that matters most.",
    "Give me a concrete example of that.",
    "Now say the same in simpler words, for a child of ten.",
    "Which of your points is the weakest, and why?",
    "Summarize our conversation so far in five short sentences.",
)


class Task(NamedTuple):
    """One measurement to make. `prompt` is an index, `order` the place in the order of all."""

    order: int
    prompt: int
    condition: Condition
    repeat: int


@dataclass(frozen=True)
class Grid:
    """What is compared: every combination of these values that makes sense.

    settings: what is the same for all: top-p, top-k, lenience, synthetic acceptance, new tokens, seed.
    draft_lengths: numbers from 1 to 16, or policies.
    drafters: names.
    rules: names; None takes the default of each temperature.
    temperatures: from 0 to 5.
    contexts: tokens that prompts are extended to; empty leaves them as they are.
    turns: of a conversation; None asks each prompt alone.
    peers: other engines. They run once for each temperature, context and turn.
    repeats: how often everything is measured. Repeat r draws with the seed `settings.seed` + r.
    order_seed: of the shuffled order.
    """

    settings: Settings
    draft_lengths: tuple[int | str, ...] = ("adaptive",)
    drafters: tuple[str, ...] = ("",)
    rules: tuple[str | None, ...] = (None,)
    temperatures: tuple[float, ...] = (0.0,)
    contexts: tuple[int, ...] = ()
    turns: int | None = None
    peers: tuple[str, ...] = ()
    repeats: int = 3
    order_seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        data = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return {**data, "settings": self.settings.to_dict()}

    def settings_of(self, condition: Condition, repeat: int) -> Settings:
        """The settings of a race."""
        return replace(
            self.settings,
            draft_length=condition.draft_length or self.settings.draft_length,
            temperature=condition.temperature,
            rule=None if self.settings.synthetic else condition.rule or None,
            seed=self.settings.seed + repeat,
        )

    def conditions(self) -> list[Condition]:
        """Every condition once. At temperature 0 all exact rules are one condition, and rules that need it are left out
        above it.

        Raises:
            SettingsError: a value is out of range, or no temperature allows one of the rules.
        """
        found: dict[Condition, None] = {}
        refused: SettingsError | None = None
        sweep = list(product(self.contexts or (None,), range(1, self.turns + 1) if self.turns else (None,)))
        for temperature, rule in product(self.temperatures, self.rules):
            for length, drafter in product(self.draft_lengths, self.drafters):
                try:
                    used = replace(self.settings, draft_length=length, temperature=temperature, rule=rule)
                except SettingsError as error:
                    if error.field != "rule" or rule is None or temperature == 0:
                        raise
                    refused = error
                    continue
                for context, turn in sweep:
                    made = (used.draft_length, drafter, used.deciding.name, used.temperature, context, turn)
                    found[Condition(*made, synthetic_acceptance=used.synthetic_acceptance)] = None
        if refused and 0 not in self.temperatures:
            raise refused
        for name, temperature, (context, turn) in product(
            self.peers, list(dict.fromkeys(c.temperature for c in found)), sweep
        ):
            found[Condition(0, "", "", temperature, context, turn, engine=name)] = None
        return list(found)

    def order(self, prompts: int) -> list[Task]:
        """Every condition for every prompt, `repeats` times, shuffled.

        One repeat follows the other, so that each prompt is met at different times of the run. Within a repeat prompts
        are shuffled, and for each prompt the conditions, drafter by drafter, since another drafter has to be loaded.
        Turns of a conversation follow each other.
        """
        return [Task(order, *task) for order, task in enumerate(self._tasks(prompts))]

    def _tasks(self, prompts: int) -> Iterator[tuple[int, Condition, int]]:
        noise, conditions = random.Random(self.order_seed), self.conditions()
        for repeat in range(self.repeats):
            for prompt in _shuffled(range(prompts), noise):
                for turn in sorted({c.turn or 0 for c in conditions}):
                    here = [c for c in conditions if (c.turn or 0) == turn]
                    for load in _shuffled(sorted({(c.engine, c.drafter) for c in here}), noise):
                        for condition in _shuffled([c for c in here if (c.engine, c.drafter) == load], noise):
                            yield prompt, condition, repeat


def _shuffled(items: Sequence[Any], noise: random.Random) -> list[Any]:
    found = list(items)
    noise.shuffle(found)
    return found
