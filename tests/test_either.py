"""Lookup beside an MTP drafter: each round from whichever has been right, and exact whichever it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import tiny

from spec_decode import decode
from spec_decode.draft_length import Adaptive, EarlyStop, Fixed
from spec_decode.drafters.either import EitherDrafter
from spec_decode.drafters.lookup import LookupDrafter
from spec_decode.drafters.mtp import MTPDrafter
from spec_decode.events import Round
from spec_decode.settings import Settings
from spec_decode.target import Target
from spec_decode.text import TextStream

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = [5, 6, 7, 8, 9, 10, 11, 12] * 3
ALWAYS = 33  # what the other drafter drafts


def drafter() -> EitherDrafter:
    return EitherDrafter(tiny.ScriptedDrafter(lambda tokens, n: [ALWAYS] * n), LookupDrafter())


def started() -> EitherDrafter:
    either = drafter()
    either.start(PROMPT, Settings(), 100)
    return either


def test_a_match_drafts_where_the_text_repeats_itself() -> None:
    either = started()
    assert tiny.ids(tiny.drafted(either, 3)) == [5, 6, 7]
    either.extend([5, 6, 40])
    assert tiny.ids(tiny.drafted(either, 3)) == [ALWAYS] * 3, "nothing like it was seen before"


def test_matches_that_are_wrong_lose_their_turn_and_win_it_back() -> None:
    either = started()
    rounds = 0
    while tiny.ids(tiny.drafted(either, 1)) != [ALWAYS]:
        # A long match, and the text goes elsewhere every time
        either.extend([41 + rounds])
        either.lookup.extend([5, 6, 7, 8])
        rounds += 1
        assert rounds < 20
    before = either.rate(4)
    for _ in range(20):  # not asked, and right all the same
        size, continuation = either.lookup.match(1)
        assert size == 4
        either.extend(continuation)
        if tiny.ids(tiny.drafted(either, 1)) != [ALWAYS]:
            break
    else:
        pytest.fail("lookup never got its turn back")
    assert either.rate(4) > before


def test_each_is_judged_by_its_own_drafts() -> None:
    """What came true of a draft that was looked up says nothing of the other drafter, and the other way round."""
    either = started()
    at_first = either.rate("other")
    for _ in range(10):
        continuation = tiny.ids(tiny.drafted(either, 3))
        assert continuation[0] in PROMPT
        either.extend(continuation)
    assert either.rate("other") == at_first
    assert either.rate(4) > 0.8
    looked_up = {size: either.rate(size) for size in (2, 3, 4)}
    for token in range(50, 60):
        either.extend([token])
        assert tiny.ids(tiny.drafted(either, 3)) == [ALWAYS] * 3, "nothing like it was seen before"
        assert either.rate("other") <= at_first
    assert either.rate("other") < 0.3, "ten rounds of the other, none of them right"
    assert either.rate(3) == looked_up[3] and either.rate(2) == looked_up[2]
    tiny.drafted(either, 3)
    either.extend([5, 6, 7, 8])
    then = either.rate("other")
    assert tiny.ids(tiny.drafted(either, 3)) == [9, 10, 50], "looked up again: what followed the latest match"
    either.extend([9, 10, 11, 12])
    assert either.rate("other") == then


def test_how_long_a_match_holds_is_estimated_from_where_it_first_fails() -> None:
    """A match that was wrong at its second token says nothing of its third."""
    either = started()
    before = either.rate("going on")
    either.extend([5, 40, 7, 8])
    once = either.rate("going on")
    assert once < before
    either = started()
    either.extend([5, 40])
    assert either.rate("going on") == once
    either = started()
    either.extend([40, 6, 7])
    assert either.rate("going on") == before


def test_a_match_is_followed_as_far_as_the_controller_says() -> None:
    either = started()
    assert tiny.ids(tiny.drafted(either, 6, EarlyStop([0.9], [0.0, 0.9, 0.0, 0.0]))) == [5], "0.9 is not above 0.9"
    assert tiny.ids(tiny.drafted(either, 6, EarlyStop([0.9], [0.0, 0.8, 0.8, 0.8]))) == [5, 6, 7]
    assert (
        tiny.ids(tiny.drafted(either, 6, EarlyStop.never())) == tiny.ids(tiny.drafted(either, 6)) == [5, 6, 7, 8, 9, 10]
    )


@pytest.mark.parametrize("rule", ["greedy", "coupled"])
def test_both_lanes_say_the_same(rule: str) -> None:
    model, assistant = tiny.gemma4("dense", vocab_size=8, seed=3)
    target = Target(model)
    either = EitherDrafter(MTPDrafter(assistant, target), LookupDrafter())
    prompt = [token % 8 for token in PROMPT]
    temperature = 0.0 if rule == "greedy" else 0.8

    def ids(rounds: Iterator[Round]) -> list[int]:
        return [token.id for r in rounds for token in r.emitted]

    sources = set()
    for seed in range(3):
        settings = Settings(temperature=temperature, seed=seed, max_new_tokens=40)
        baseline = ids(decode.baseline(target, prompt, TextStream(tiny.Characters(), prompt), settings))
        for lengths in (Fixed(3), Adaptive(None)):
            text = TextStream(tiny.Characters(), prompt)
            rounds = list(decode.speculative(target, either, lengths, prompt, text, settings))
            # a draft that was looked up has no probabilities
            sources |= {r.tokens[0].q is None for r in rounds if r.drafted}
            assert ids(iter(rounds)) == baseline
    assert sources == {True, False}, "both of them drafted"


def test_costs_are_measured_of_the_drafter_that_has_some() -> None:
    """A match is free, so a combination costs what its other drafter does."""
    other = tiny.ScriptedDrafter(lambda tokens, n: [ALWAYS] * n)
    assert EitherDrafter(EitherDrafter(other, LookupDrafter()), LookupDrafter()).measured is other
    assert LookupDrafter().measured.name == "lookup"
