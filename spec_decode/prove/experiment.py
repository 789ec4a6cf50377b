"""One test from its first text to its verdict, and several tests at once.

In: `Setup`s and a level. Out: counts so far (`Progress`), and a `Result` for each test.

Looking at a test while it runs cannot change its false-positive rate: the number of texts is fixed before the first,
and the verdict is given once, at that number. The p-value before it is provisional and decides nothing; a test that is
stopped early has no verdict but "cannot tell", whatever it showed. To stop as soon as a p-value is small enough would
refute an exact rule sooner or later with certainty (Armitage, McPherson and Rowe 1969, "Repeated significance tests on
accumulating data", JRSS A 132). An always-valid test (Howard et al. 2021, arXiv:1810.08240) could stop early, at the
price of more texts for the same power; texts are cheap here and a known end is easier to read.

Several tests are judged together by Holm's method (`chi_square.holm`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import numpy as np

from ..rules import RULES
from . import trials
from .chi_square import Fit, chi_square, detectable, groups, holm
from .setup import BIAS, LEVEL, POWER, Setup

AGREES, REFUTED, CANNOT_TELL = "agrees", "refuted", "cannot tell"
CHUNK = 500  # texts that a process is given at once


@dataclass(frozen=True)
class Progress:
    """Where a test stands after `count` of `of` texts: counts by cell, what is expected of them, and their fit."""

    count: int
    of: int
    observed: list[int]
    expected: list[float]
    fit: Fit


@dataclass(frozen=True)
class Result:
    """What a test found.

    progress: where it ended.
    smallest: the smallest bias that it sees with probability `POWER` at its level, as a total-variation distance; at
        temperature 0 the share of texts that differ.
    adjusted: the p-value after Holm's method over all tests that are judged together.
    verdict: AGREES, REFUTED or CANNOT_TELL.
    """

    setup: Setup
    progress: Progress
    smallest: float
    adjusted: float
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        setup, progress = self.setup, self.progress
        cells = zip(trials.cells(setup), progress.observed, progress.expected, strict=True)
        return {
            "rule": setup.rule,
            "drafter": setup.drafter,
            "draft_length": setup.draft_length,
            "temperature": setup.temperature,
            "top_p": setup.top_p,
            "first_seed": setup.first,
            "texts": progress.count,
            "statistic": progress.fit.statistic if np.isfinite(progress.fit.statistic) else None,
            "degrees_of_freedom": progress.fit.freedom,
            "p_value": progress.fit.p_value,
            "adjusted_p_value": self.adjusted,
            "smallest_bias": self.smallest,
            "verdict": self.verdict,
            "cells": [{"text": name, "observed": seen, "expected": due} for name, seen, due in cells],
        }


class Experiment:
    """A test in this process, text by text."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.chances = trials.probabilities(setup)
        self.observed = np.zeros(len(self.chances), int)

    def run(self) -> Iterator[None]:
        """Makes a text at each step."""
        for cell in trials.drawn(self.setup):
            self.observed[cell] += 1
            yield

    @property
    def progress(self) -> Progress:
        return progress(self.setup, self.observed, self.chances)

    def result(self, level: float, bias: float = BIAS) -> Result:
        """The result of this test alone, at `level`."""
        return judged([self.progress], [self.setup], level, bias)[0]


def progress(setup: Setup, observed: np.ndarray, chances: np.ndarray) -> Progress:
    """Where a test with these counts stands."""
    count = int(observed.sum())
    expected = chances * count
    return Progress(count, setup.seeds, observed.tolist(), expected.tolist(), chi_square(observed, expected))


def smallest_bias(setup: Setup, level: float) -> float:
    """`Result.smallest` of a test at `level`, known before it runs; 1 where it could see none."""
    if setup.greedy:
        return float(1 - (1 - POWER) ** (1 / setup.seeds))
    freedom = int(groups(trials.probabilities(setup) * setup.seeds).max())
    return min(1.0, detectable(setup.seeds, freedom, level, POWER) / 2)


def judged(
    found: Sequence[Progress], setups: Sequence[Setup], level: float = LEVEL, bias: float = BIAS
) -> list[Result]:
    """The results of tests that are judged together: the probability that even one of them refutes a rule that is
    exact is at most `level`. The smallest bias is stated for the level of Holm's first and hardest step."""
    adjusted = holm([each.fit.p_value for each in found])
    results = []
    for each, setup, p in zip(found, setups, adjusted, strict=True):
        smallest = smallest_bias(setup, level / len(found))
        whole = each.count == each.of
        verdict = CANNOT_TELL if not whole else REFUTED if p <= level else AGREES if smallest <= bias else CANNOT_TELL
        results.append(Result(setup, each, smallest, p, verdict))
    return results


def run(
    setups: Sequence[Setup], processes: int, tell: Callable[[int, int], None] = lambda done, of: None
) -> list[Progress]:
    """Runs tests to their ends, in so many processes; one is this process itself. `tell` gets texts done and of how
    many."""
    parts = [(i, at) for i, setup in enumerate(setups) for at in range(0, setup.seeds, CHUNK)]
    chances = [trials.probabilities(setup) for setup in setups]
    counts = [np.zeros(len(each), int) for each in chances]
    done, of = 0, sum(setup.seeds for setup in setups)

    def add(i: int, found: list[int]) -> None:
        nonlocal done
        counts[i] += found
        done += sum(found)
        tell(done, of)

    if processes == 1:
        for i, at in parts:
            add(i, counted(setups[i], at))
    else:
        # Started afresh: threads of this process do not survive a fork.
        with ProcessPoolExecutor(processes, get_context("spawn"), _one_thread) as pool:
            waiting = {pool.submit(counted, setups[i], at): i for i, at in parts}
            try:
                for future in as_completed(waiting):
                    add(waiting[future], future.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return [progress(*each) for each in zip(setups, counts, chances, strict=True)]


def counted(setup: Setup, first: int) -> list[int]:
    """Counts by cell of the next `CHUNK` texts."""
    found = np.zeros(len(trials.cells(setup)), int)
    for cell in trials.drawn(setup, first, CHUNK):
        found[cell] += 1
    return [int(count) for count in found]


def _one_thread() -> None:
    """In a process of its own: tensors of a few numbers are not shared among threads."""
    import torch

    torch.set_num_threads(1)


def words(result: Result, bias: float = BIAS) -> str:
    """The verdict in a sentence or two."""
    progress, smallest, rule = result.progress, percent(result.smallest), result.setup.rule
    if result.verdict == REFUTED:
        lossy = " It is a lossy rule and claims no more." if rule in RULES and not RULES[rule].exact else ""
        if result.setup.greedy:
            return f"{progress.observed[1]:,} of {progress.count:,} texts are not the target’s argmax.{lossy}"
        return (
            "The texts do not follow the target’s distribution: chance alone gives counts so far off with probability "
            f"{number(progress.fit.p_value)}.{lossy}"
        )
    if result.verdict == AGREES and result.setup.greedy:
        return (
            f"All {progress.count:,} texts are the target’s argmax. If {smallest} of all texts were wrong, so many "
            "would show one 9 times in 10."
        )
    if result.verdict == AGREES:
        return (
            f"The texts agree with the target’s distribution. A bias of {smallest} or more (total-variation distance) "
            "would have been refuted 9 times in 10."
        )
    if progress.count < progress.of:
        return f"Stopped after {progress.count:,} of {progress.of:,} texts: a verdict is given at the end only."
    return (
        f"Too few texts: a bias of {smallest} is the smallest that they show 9 times in 10, and {percent(bias)} was "
        "to be seen. More seeds would tell."
    )


def number(p: float) -> str:
    """A p-value as it is shown."""
    return "below 1e-300" if p < 1e-300 else f"{p:.2g}"


def percent(share: float) -> str:
    """A share as it is shown."""
    return f"{100 * share:.2f}".rstrip("0").rstrip(".") + " %"
