"""The exactness lab of the page: one exactness test on the device's thread, as a stream of what to show.

In: an `Engine` and a `Setup`. Out: JSON texts, a few a second, with counts so far, their fit and in the end the
verdict. A test takes the device as a race does, so it never slows one that is measured. It is bounded in texts and,
where the engine's limits say so, in time. PyTorch is loaded when a test runs.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..errors import SettingsError, UserError
from ..prove.setup import LEVEL, Setup
from .device import Engine
from .feed import dumps

if TYPE_CHECKING:
    from ..prove.experiment import Experiment

SLICE = 0.15  # seconds of work between two updates
MOST = 20_000  # texts of a test
FAMILY = 20  # tests that the family-wise rate is stated for
TEST_LEVEL = LEVEL / FAMILY  # of one test, so that `FAMILY` of them keep LEVEL between them (Bonferroni)


def idle() -> str:
    """The view before the first test."""
    return dumps({"phase": "idle"})


def waiting() -> str:
    """The view of a test that waits for the device."""
    return dumps({"phase": "waiting"})


def stopped() -> str:
    """What a stopped test adds to what is shown of it."""
    return dumps({"phase": "stopped"})


def run(engine: Engine, setup: Setup) -> Iterator[str]:
    """Runs one test and yields what to show. Closing the iterator ends it.

    Raises:
        SettingsError: more texts than `MOST`, or a server without the lab.
    """
    try:
        for test, done in steps(engine, setup):
            yield _view(test, done)
    except UserError:
        raise
    except Exception as error:  # the page must outlive whatever a library throws
        traceback.print_exc(file=sys.stderr)
        yield dumps({"phase": "failed", "words": f"The test broke off ({type(error).__name__}: {error})."})


def steps(engine: Engine, setup: Setup) -> Iterator[tuple[Experiment, bool]]:
    """The test, a few times a second, with True at its end. Closing the iterator ends it.

    Raises:
        SettingsError: more texts than `MOST`, or a server without the lab.
    """
    if not engine.limits.lab:
        raise SettingsError("lab", "The exactness lab is switched off on this server.")
    if setup.seeds > MOST:
        raise SettingsError("seeds", f"A test here has at most {MOST:,} texts.")
    with engine.turns.shared():
        test = engine.submit(lambda: _open(setup)).result()
        texts = test.run()
        limit = engine.limits.seconds
        began = time.perf_counter()
        done = False
        yield test, False
        while not done:
            done = engine.submit(lambda: _advance(texts)).result()
            done = done or (limit is not None and time.perf_counter() - began > limit)
            yield test, done


def proved(test: Experiment) -> dict[str, Any]:
    """The result of a test that has ended, as `Result.to_dict` has it, without its cells; "words" is the verdict in a
    sentence or two, "level" the p-value at which a rule is refuted."""
    from ..prove.experiment import words

    result = test.result(TEST_LEVEL)
    data = {key: value for key, value in result.to_dict().items() if key not in ("cells", "adjusted_p_value")}
    return {"status": "done", **data, "level": TEST_LEVEL, "words": words(result)}


def _open(setup: Setup) -> Experiment:
    from ..prove.experiment import Experiment

    return Experiment(setup)


def _advance(steps: Iterator[None]) -> bool:
    """Works for a slice; True at the end."""
    end = time.perf_counter() + SLICE
    while time.perf_counter() < end:
        try:
            next(steps)
        except StopIteration:
            return True
    return False


def _view(test: Experiment, done: bool) -> str:
    """What to show: `words` is the verdict, while `phase` is "done"."""
    from ..prove.experiment import number, smallest_bias, words
    from ..prove.trials import cells

    setup, now = test.setup, test.progress
    view: dict[str, Any] = {
        "phase": "running",
        "broken": setup.broken,
        "greedy": setup.greedy,
        "count": now.count,
        "of": now.of,
        "cells": cells(setup),
        "chances": [round(float(chance), 6) for chance in test.chances],
        "observed": now.observed,
        "statistic": round(now.fit.statistic, 1) if now.fit.statistic < 1e300 else None,
        "freedom": now.fit.freedom,
        "p": number(now.fit.p_value),
        "small": now.fit.p_value <= TEST_LEVEL,
        "smallest": smallest_bias(setup, TEST_LEVEL),
    }
    if done:
        result = test.result(TEST_LEVEL)
        view |= {"phase": "done", "verdict": result.verdict, "words": words(result)}
    return dumps(view)
