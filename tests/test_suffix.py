"""Suffix decoding: its trie against counts by hand, exact with every rule, and nothing kept between sequences."""

from __future__ import annotations

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from spec_decode import decode
from spec_decode.draft_length import Adaptive, EarlyStop, Fixed
from spec_decode.drafters.either import EitherDrafter
from spec_decode.drafters.suffix import SuffixDrafter
from spec_decode.rules import RULES
from spec_decode.settings import Settings
from spec_decode.target import Target
from spec_decode.text import TextStream

pytestmark = pytest.mark.usefixtures("one_thread")


def started(text: str, **options: float) -> SuffixDrafter:
    drafter = SuffixDrafter(**options)  # type: ignore[arg-type]
    drafter.start([ord(c) for c in text], Settings(), 1000)
    return drafter


def said(drafter: SuffixDrafter, length: int, stop: EarlyStop | None = None) -> str:
    return "".join(chr(i) for i in tiny.ids(tiny.drafted(drafter, length, stop)))


@pytest.mark.parametrize(
    ("text", "length", "draft"),
    [
        ("abcdX_abcdX-abcdY,abcd", 1, "X"),  # the more frequent continuation
        ("abcdX abcdY abcdX abcd", 1, "Y"),  # a longer match that leaves no doubt
        ("abcdX_abcdY,abcd", 1, "Y"),  # of equals the latest
        ("abcd efgh, abcd", 8, " efgh, a"),  # a match of four is followed for eight
        ("abcdefghi-cd", 8, "efgh"),  # and one of two for four
        ("xa1 ya2 za3 qa", 4, ""),  # three continuations, of which none is likely enough, and one token of match
        ("ababababab", 6, "ababab"),  # round and round
        ("abc", 3, ""),  # nothing was there before
    ],
)
def test_drafts_follow_what_was_most_frequent(text: str, length: int, draft: str) -> None:
    assert said(started(text, least=0.5), length) == draft


@given(st.lists(st.integers(0, 2), min_size=1, max_size=60), st.integers(1, 6), st.integers(2, 8))
def test_the_trie_counts_every_sequence(tokens: list[int], cut: int, depth: int) -> None:
    """However the tokens come in, the count of each sequence is how often it occurs, and a draft's first token the most
    frequent after its match."""
    drafter = SuffixDrafter(depth=depth, least=0.0)
    drafter.start(tokens[:cut], Settings(), 1000)
    drafter.extend(tokens[cut:])
    for n in range(1, depth + 1):
        for start in range(len(tokens) - n + 1):
            node, sequence = drafter.root, tokens[start : start + n]
            for token in sequence:
                node = node.children[token]
            assert node.count == sum(tokens[i : i + n] == sequence for i in range(len(tokens) - n + 1))
    size, ids, shares = drafter.follow(3)
    if ids:
        after = [tokens[i] for i in range(size, len(tokens)) if tokens[i - size : i] == tokens[-size:]]
        assert after.count(ids[0]) == max(after.count(token) for token in after)
        assert shares[0] == pytest.approx(after.count(ids[0]) / len(after))
    assert len(drafter.ends) <= depth + 1


def test_a_draft_ends_where_the_early_stop_says() -> None:
    drafter = started("abcdX_abcdX_abcdY,abc")
    whole = tiny.drafted(drafter, 4)
    assert whole.confidence is not None and whole.confidence[0].tolist() == pytest.approx([1, 2 / 3, 1, 1])
    assert said(drafter, 4) == "dX_a" and whole.stopped_early is None
    ended = tiny.drafted(drafter, 4, EarlyStop([i / 16 for i in range(1, 17)], [0.7]))
    assert tiny.ids(ended) == [ord(c) for c in "dX"] and ended.stopped_early, "a token it is unsure of stays"


@pytest.mark.parametrize("closed", [True, False])
def test_nothing_is_kept_of_an_earlier_text(closed: bool) -> None:
    drafter = started("secret words, secret")
    assert said(drafter, 3) == " wo"
    if closed:
        drafter.close()
        assert not drafter.root.children
    drafter.start([ord(c) for c in "no secret"], Settings(), 100)
    assert said(drafter, 3) == ""


def test_of_a_prompt_only_the_end_is_remembered() -> None:
    assert said(started("abX.ab", remembered=6), 1) == "X"
    assert said(started("abX.ab", remembered=5), 1) == "X", "b was followed by X"
    assert said(started("abX.ab", remembered=4), 1) == ""


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("either", [False, True], ids=["alone", "beside another"])
def test_lanes_agree_where_the_rule_says_so(rule: str, either: bool) -> None:
    target = Target(tiny.model("llama", vocab_size=8))
    prompt = [1, 2, 3, 4] * 6
    drafted = 0
    for seed in range(3):
        temperature = 0.7 if RULES[rule].samples else 0.0
        settings = Settings(temperature=temperature, rule=rule, seed=seed, max_new_tokens=30)
        base = [t.id for r in decode.baseline(target, prompt, stream(prompt), settings) for t in r.emitted]
        for lengths in (Fixed(3), Adaptive(None)):
            drafter = SuffixDrafter()
            used = EitherDrafter(tiny.ScriptedDrafter(lambda tokens, n: [7] * n), drafter) if either else drafter
            rounds = list(decode.speculative(target, used, lengths, prompt, stream(prompt), settings))
            drafted += sum(r.drafted for r in rounds if r.drafter == "suffix")
            ids = [t.id for r in rounds for t in r.emitted]
            assert len(ids) == 30 and (ids == base or not settings.same_text)
    assert drafted > 0


def stream(prompt: list[int]) -> TextStream:
    return TextStream(tiny.Characters(), prompt)
