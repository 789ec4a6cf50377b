"""Lookup beside an MTP drafter: each round from whichever has been right, and exact whichever it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import tiny

from spec_decode import decode
from spec_decode.draft_length import Adaptive, Fixed
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
    assert either.draft(3).ids.tolist() == [5, 6, 7]
    either.extend([5, 6, 40], None)  # type: ignore[arg-type]
    assert either.draft(3).ids.tolist() == [ALWAYS] * 3, "nothing like it was seen before"


def test_matches_that_are_wrong_lose_their_turn_and_win_it_back() -> None:
    either = started()
    rounds = 0
    while either.draft(1).ids.tolist() != [ALWAYS]:
        # A long match, and the text goes elsewhere every time
        either.extend([41 + rounds], None)  # type: ignore[arg-type]
        either.lookup.extend([5, 6, 7, 8], None)  # type: ignore[arg-type]
        rounds += 1
        assert rounds < 20
    before = either.rate(4)
    for _ in range(20):  # not asked, and right all the same
        size, continuation = either.lookup.match(1)
        assert size == 4
        either.extend(continuation, None)  # type: ignore[arg-type]
        if either.draft(1).ids.tolist() != [ALWAYS]:
            break
    else:
        pytest.fail("lookup never got its turn back")
    assert either.rate(4) > before


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
