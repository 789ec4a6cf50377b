# ruff: noqa: F811 (fixtures of another file are imported, and named again where they are asked for)
"""Branches of a race and drafts of a person: the engine, the session, and the page in a real browser."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from test_browser import CHROMIUM, SPOKEN, Visitor, browser, serving  # noqa: F401
from test_statistics import FALSE_ALARM, enumerate_joint, p_value, table

from spec_decode import decode
from spec_decode.draft_length import Fixed
from spec_decode.drafters import Draft, Drafter
from spec_decode.drafters.lookup import LookupDrafter
from spec_decode.drafters.model import ModelDrafter
from spec_decode.drafters.person import PersonDrafter
from spec_decode.errors import UserError
from spec_decode.events import BASELINE, SPECULATIVE, Round, Trace
from spec_decode.metrics import LaneCounts
from spec_decode.prove.table import SilentText
from spec_decode.prove.table import TableTarget as TableModel
from spec_decode.request import Request
from spec_decode.sampling import distribution
from spec_decode.session import branch
from spec_decode.session.device import Engine, Limits, Status
from spec_decode.session.feed import Feed
from spec_decode.session.stream import run
from spec_decode.settings import Settings
from spec_decode.sources.local import LocalSource, Race
from spec_decode.target import Target

PROMPT = "one two three, one two three, one two"


def small_pair(drafter: str = "lookup") -> Any:
    """A pair of tiny models; drafters: prompt lookup, the target itself, or another model."""
    target = Target(tiny.model("llama"))
    made: Drafter = LookupDrafter()
    if drafter != "lookup":
        model = target if drafter == "itself" else Target(tiny.model("llama", seed=9, num_hidden_layers=1))
        made = ModelDrafter(model, drafter, tiny.VOCABULARY)
    return tiny.PairOf(target, made)


def raced(pair: Any, request: Request) -> Trace:
    race = Race(pair, request)
    for _ in race:
        pass
    return race.trace


# The engine


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("drafter", ["lookup", "itself", "stranger"])
@pytest.mark.parametrize("temperature", [0.0, 0.8], ids=["greedy", "coupled"])
def test_a_branch_at_the_texts_own_token_is_the_text(temperature: float, drafter: str) -> None:
    """A forced prefix of the text's own tokens is followed by the rest of it: the same context, and under coupled the
    same noise at every position."""
    pair, settings = small_pair(drafter), Settings(max_new_tokens=20, temperature=temperature, seed=5, draft_length=3)
    whole = raced(pair, Request(PROMPT, settings)).token_ids(BASELINE)
    for kept in (1, 7):
        rest = raced(pair, Request(PROMPT, replace(settings, max_new_tokens=20 - kept), prefix=tuple(whole[:kept])))
        for lane in (BASELINE, SPECULATIVE):
            assert rest.token_ids(lane) == whole[kept:], (lane, kept)
    other = (*whole[:6], (whole[6] + 1) % tiny.VOCABULARY)
    forced = raced(pair, Request(PROMPT, replace(settings, max_new_tokens=13), prefix=other))
    context = raced(pair, Request(PROMPT + pair.tokenizer.decode(list(other)), replace(settings, max_new_tokens=13)))
    assert forced.identical and forced.token_ids(BASELINE) == context.token_ids(BASELINE)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("drafter", ["lookup", "itself", "stranger"])
@pytest.mark.parametrize("temperature", [0.0, 0.8], ids=["greedy", "coupled"])
def test_a_persons_draft_changes_what_is_accepted_and_not_the_text(temperature: float, drafter: str) -> None:
    pair, settings = small_pair(drafter), Settings(max_new_tokens=16, temperature=temperature, seed=3, draft_length=4)
    plain = raced(pair, Request(PROMPT, settings, prefix="four"))
    text = plain.token_ids(BASELINE)
    wrong = [(token + 1) % tiny.VOCABULARY for token in text]
    drafts = {"right": text, "wrong": wrong, "half": text[:6] + wrong[6:9] + text[9:], "short": [*text[:2], wrong[2]]}
    for name, draft in drafts.items():
        trace = raced(pair, Request(PROMPT, settings, prefix="four", draft=tuple(draft)))
        first, *rounds = trace.lane(SPECULATIVE)
        assert trace.token_ids(SPECULATIVE) == trace.token_ids(BASELINE) == text, name
        assert [t.text for t in first.tokens] == list("four") and not first.emitted and first.index == 0
        assert rounds[0].drafter == "person" and all(t.q is None for t in rounds[0].tokens)
        at = 0
        for r in rounds:  # every token of the draft was judged at its place in the output
            if at < len(draft) and r.drafted:
                proposed = [t.id for t in r.tokens if t.draft_position]
                assert r.drafter == "person" and proposed == draft[at : at + 4][: r.drafted]
            elif r.drafted:
                assert r.drafter == drafter, "after the draft the drafter drafts again"
            at += len(r.emitted)
        counts = LaneCounts(trace.lane(SPECULATIVE))
        assert counts.tokens == 16 and counts.time_to_first_token == rounds[0].clock > first.clock
    right, bad = (
        sum(r.accepted for r in raced(pair, Request(PROMPT, settings, prefix="four", draft=tuple(d))).rounds)
        for d in (text, wrong)
    )
    assert right == 16 - 4 and bad == 0, "16 tokens in 4 rounds, of which each has one token of the target's own"


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("limit", [1, 2, 3, 9])
def test_a_persons_draft_never_overshoots_and_ends_with_the_text(limit: int) -> None:
    pair, settings = small_pair(), Settings(max_new_tokens=limit, draft_length=8)
    text = raced(pair, Request(PROMPT, settings)).token_ids(BASELINE)
    assert raced(pair, Request(PROMPT, settings, draft=(*text, 1, 2, 3))).token_ids(SPECULATIVE) == text
    pair.target.eos = frozenset({text[-1]})
    ended = raced(pair, Request(PROMPT, replace(settings, max_new_tokens=20), draft=(*text, 1, 2)))
    assert ended.token_ids(SPECULATIVE) == ended.token_ids(BASELINE) == text[: text.index(text[-1]) + 1]
    assert ended.finish == {BASELINE: "stop", SPECULATIVE: "stop"}


# Is it exact where the rule draws independently? Joint distributions of three tokens against enumeration, as in
# test_statistics, each at its false-alarm rate: seven tests, so a sound engine fails with probability below 1e-7.

TOKENS = 3
FIXED = (3, 1, 0, 2)  # what the person drafts, whatever comes


class Assigned(PersonDrafter):
    """Wrong: says that the person's tokens were drawn from a distribution, which they were not."""

    def draft_on_host(self, state: Any, length: int, stop: Any) -> Draft | None:
        made = super().draft_on_host(state, length, stop)
        assert made is not None
        q = torch.full((1, made.ids.shape[1], 4), 0.25)
        return replace(made, q=q)


class Silent(Drafter):
    """Drafts nothing."""

    name = "silent"

    def draft_on_host(self, state: Any, length: int, stop: Any) -> Draft:
        return Draft.none(state)


def texts(
    rule: str, seeds: range, kind: type[PersonDrafter] = PersonDrafter, draft: Callable[[int], Any] = lambda seed: FIXED
) -> torch.Tensor:
    """The first tokens of `decode` after a person's draft, one text a seed."""
    target, out = TableModel(table(4, 7)), []
    for seed in seeds:
        settings = Settings(temperature=1.0, rule=rule, max_new_tokens=TOKENS + 1, seed=seed)
        drafter = kind(draft(seed), Silent())
        rounds = decode.speculative(target, drafter, Fixed(2), [1, 2], SilentText(), settings)  # type: ignore[arg-type]
        out.append([t.id for r in rounds for t in r.emitted][:TOKENS])
    return torch.tensor(out)


def fit(tokens: torch.Tensor) -> float:
    return p_value(tokens, enumerate_joint(distribution(table(4, 7), Settings(temperature=1.0, rule="rejection"))))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("rule", ["rejection", "block", "coupled"])
def test_texts_after_a_persons_draft_follow_the_target(rule: str) -> None:
    assert fit(texts(rule, range(500))) > FALSE_ALARM


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("rule", ["rejection", "block"])
def test_a_distribution_that_nobody_drew_from_is_caught(rule: str) -> None:
    assert fit(texts(rule, range(600), Assigned)) < FALSE_ALARM
