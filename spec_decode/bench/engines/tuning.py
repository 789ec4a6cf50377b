"""The search for the fastest settings of an engine.

In: an engine, numbers of threads, prompts. Out: a `Tuning`, with every trial. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from . import Engine, Option

_WARM_UP = 8  # tokens
_TRIAL = (8, 48)  # tokens of a trial, at least and at most
_TRIAL_SECONDS = 1.0


@dataclass(frozen=True)
class Tuning:
    """The fastest settings of an engine, and all trials with their rates in tokens/s."""

    threads: int
    option: Option
    trials: list[dict[str, Any]] = field(default_factory=list)


def tune(engine: Engine, counts: Sequence[int], prompts: Sequence[list[int]]) -> Tuning:
    """Finds the number of threads, out of `counts`, and the option that decode fastest. Leaves `engine` warm with them.

    First all numbers of threads with all options are run, with the first setting of the draft, then all settings of the
    draft with the best of them.
    """
    first, *others = engine.drafts()
    bases = [(threads, option) for option in engine.options(prompts[0]) for threads in counts]
    trials = _tried(engine, [(threads, option | first) for threads, option in bases], prompts)
    best = max(range(len(bases)), key=lambda index: trials[index][1])
    threads, option = trials[best][0]
    if others:
        # Trials of one block meet the same machine: the choice is made among those of the second search.
        drafting = _tried(engine, [(threads, bases[best][1] | draft) for draft in (first, *others)], prompts)
        (threads, option), _ = max(drafting, key=lambda trial: trial[1])
        trials += drafting
    engine.use(threads, option)
    engine.run(prompts[0], _WARM_UP, stop=False)
    return Tuning(threads, option, [{"threads": n, **used, "tokens_per_second": rate} for (n, used), rate in trials])


def _tried(
    engine: Engine, combinations: Sequence[tuple[int, Option]], prompts: Sequence[list[int]]
) -> list[tuple[tuple[int, Option], float]]:
    """Every combination with its rate: the harmonic mean over prompts of the median of a prompt's runs.

    All combinations are run in two blocks, the second in reverse order, so that a temporary slowdown of the machine
    does not affect only one of them. In a block, each has a warm-up and a run of every prompt, two of a single one. An
    engine that starts slowly has one block.
    """
    seconds: list[list[list[float]]] = [[[] for _ in prompts] for _ in combinations]
    orders = (range(len(combinations)), reversed(range(len(combinations))))
    for order in orders[: 1 if engine.starts_slowly else 2]:
        for index in order:
            threads, option = combinations[index]
            engine.use(threads, option)
            warm = engine.run(prompts[0], _WARM_UP, stop=False).rate or 0.0
            tokens = int(min(max(warm * _TRIAL_SECONDS, _TRIAL[0]), _TRIAL[1]))
            for found, ids in list(zip(seconds[index], prompts, strict=True)) * (2 if len(prompts) == 1 else 1):
                if rate := engine.run(ids, tokens, stop=False).rate:
                    found.append(1 / rate)
    rates = []
    for of_prompts in seconds:
        middles = [median(found) for found in of_prompts if found]
        rates.append(len(middles) / sum(middles) if middles else 0.0)
    return list(zip(combinations, rates, strict=True))
