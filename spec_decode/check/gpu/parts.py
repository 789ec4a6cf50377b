"""The parts of `check gpu` in the order of their worth, with how long each takes.

In: a session. Out: `Part`s. Estimates are for one data-centre GPU, and are what a part must still find of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from . import correct, others, rivals, speed
from .report import Part, Result
from .session import Session


def parts(session: Session) -> Iterator[Part]:
    """All of them. Parts of one pair follow each other, so that its weights are made once."""

    def part(name: str, told: str, estimate: float, body: Callable[..., Result], *given: str) -> Part:
        seconds = 0.0 if session.tiny else estimate
        return Part(name, told, seconds, lambda: body(session, *given))

    names = session.options.pairs
    yield part("tokens", "greedy and coupled texts of tiny models equal the CPU's, token for token", 60, correct.tokens)
    yield part("distribution", "rejection and block by chi-square, in recorded rounds", 40, correct.distribution)
    yield part("bandwidth", "of the device's memory", 5, speed.bandwidth)
    for i, name in enumerate(names):
        yield part(f"round {name}", "a baseline step and a round", 25, speed.round_of, name)
        yield part(f"idle {name}", "idle share of a round, and a profile", 8, speed.idle, name)
        yield part(f"transformers {name}", "plain and assisted generation", 30, rivals.rivals, name)
        if i == 0:
            yield part(f"interference {name}", "a race against each lane alone", 15, speed.interference, name)
            yield part(f"batch-invariant {name}", "bits and cost", 20, speed.invariant, name)
            yield part(f"batch {name}", "speedup by batch size", 40, others.batch, name)
    yield part("races", "tiny pairs in every precision", 40, correct.races)
    for how in session.options.bitsandbytes if names else ():
        yield part(f"bitsandbytes {how} {names[0]}", "a quantized pair", 30, others.quantized, names[0], how)
    if names:
        yield part(f"elsewhere {names[0]}", "the drafter on another device", 20, others.elsewhere, names[0])
    yield part("recipe", "texts and training of the embedded drafter", 60, others.recipe)
    if names:
        yield part(f"compiled {names[0]}", "transformers' compiled generation", 90, rivals.compiled, names[0])
