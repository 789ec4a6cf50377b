# ruff: noqa: F811 (fixtures of another file are imported, and named again where they are asked for)
"""Branches of a race and drafts of a person: the engine, the session, and the page in a real browser."""

from __future__ import annotations

import json
import threading
import time
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
from spec_decode.errors import PromptError, UserError
from spec_decode.events import BASELINE, SPECULATIVE, Trace
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
    """A pair of tiny models; drafters: prompt lookup, or another model."""
    made: Drafter = LookupDrafter()
    if drafter != "lookup":
        model = Target(tiny.model("llama", seed=9, num_hidden_layers=1))
        made = ModelDrafter(model, drafter, tiny.VOCABULARY)
    pair: Any = tiny.PairOf(Target(tiny.model("llama")), made)
    pair.can_think = False
    return pair


def raced(pair: Any, request: Request) -> Trace:
    race = Race(pair, request)
    for _ in race:
        pass
    return race.trace


# The engine


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("drafter", ["lookup", "stranger"])
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


def test_nothing_is_raced_after_a_token_that_ends_the_text() -> None:
    pair = small_pair()
    pair.target.eos = frozenset({5})
    with pytest.raises(PromptError, match="holds token 5, with which the text ends"):
        Race(pair, Request(PROMPT, prefix=(1, 5)))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("drafter", ["lookup", "stranger"])
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
# test_statistics, each at its false-alarm rate of 1e-6 / 128: four of a sound engine, which fails below 1e-7.

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


LONGER = [pytest.param(rule, marks=pytest.mark.long) for rule in ("block", "coupled")]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("rule", ["rejection", *LONGER])
def test_texts_after_a_persons_draft_follow_the_target(rule: str) -> None:
    assert fit(texts(rule, range(500))) > FALSE_ALARM


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("rule", ["rejection", LONGER[0]])
def test_a_distribution_that_nobody_drew_from_is_caught(rule: str) -> None:
    assert fit(texts(rule, range(600), Assigned)) < FALSE_ALARM


def knowing(seed: int) -> tuple[int, int]:
    """The draft of a person who saw a round with this seed, and so its first uniform number: 3 where it passes."""
    settings = Settings(temperature=1.0, rule="rejection", max_new_tokens=TOKENS + 1, seed=seed)
    drafter, target = PersonDrafter(FIXED, Silent()), TableModel(table(4, 7))
    rounds = decode.speculative(target, drafter, Fixed(2), [1, 2], SilentText(), settings)  # type: ignore[arg-type]
    _, seen = next(rounds), next(rounds)
    rounds.close()  # type: ignore[attr-defined]
    judged = next(t for t in seen.tokens if t.draft_position == 1)
    assert judged.id == 3 and judged.compared is not None
    return (3, 1) if judged.compared.value < judged.compared.bound else (0, 1)


@pytest.mark.long
@pytest.mark.usefixtures("one_thread")
def test_a_draft_that_knows_its_noise_is_biased_and_an_unused_seed_helps() -> None:
    """Why `session.branch` draws a seed."""
    assert fit(texts("rejection", range(800), draft=knowing)) < FALSE_ALARM
    assert fit(texts("rejection", range(5000, 5800), draft=lambda seed: knowing(seed - 5000))) > FALSE_ALARM


# The session


@pytest.fixture
def engine() -> Any:
    """An engine over a tiny pair, and the pair."""
    pair = small_pair()
    made = Engine(lambda progress: LocalSource(pair))
    made.start()
    made.submit(lambda: torch.set_num_threads(1)).result()
    return made, pair


def asked(**more: Any) -> dict[str, Any]:
    request = Request(PROMPT, Settings(max_new_tokens=24, draft_length=3)).to_dict()
    return {"id": "7", "request": request, "prefix": [], **more}


def test_one_round_of_a_person_is_verified_and_leaves_nothing_behind(engine: Any) -> None:
    made, pair = engine
    text = raced(pair, Request(PROMPT, Settings(max_new_tokens=24))).token_ids(BASELINE)
    wrong = (text[5] + 1) % tiny.VOCABULARY
    typed = pair.tokenizer.decode([*text[2:5], wrong, 1])
    said = json.loads(branch.one_round(made, "me", asked(prefix=text[:2], draft=typed)))
    assert said["answer"] == "7" and said["ended"] is None
    tokens = [(token[1], token[5]) for token in said["round"][5]]
    assert tokens == [("a", text[2]), ("a", text[3]), ("a", text[4]), ("r", wrong), ("r", 1), ("c", text[5])]
    assert said["round"][7] == "person" and str(text[5]) in said["round"][9], "the texts of alternatives come along"
    assert not made._running and len(branch.one_round(made, "me", asked(draft="abc"))) > 99
    pair.target.eos = frozenset({text[5]})
    said = json.loads(branch.one_round(made, "me", asked(prefix=text[:2], draft=typed)))
    assert said["ended"] == "stop" and [token[5] for token in said["round"][5]][-1] == text[5]
    for left, ended in ((23, None), (3, "length")):
        question = asked(prefix=text[: 24 - left], draft=pair.tokenizer.decode(text[24 - left :]))
        pair.target.eos = frozenset()
        assert json.loads(branch.one_round(made, "me", question))["ended"] == ended
    assert not made._running


def test_a_branch_keeps_the_seed_only_where_the_text_is_the_seeds() -> None:
    def seed(rule: str) -> int:
        settings = Settings(temperature=0.7, rule=rule, seed=11, max_new_tokens=24)
        question = asked(request=Request(PROMPT, settings).to_dict(), prefix=[1, "x"])
        made = branch.branch(question, Limits())
        assert made.prefix == (1, "x") and made.settings.max_new_tokens == 22
        assert replace(made.settings, seed=11, max_new_tokens=24) == settings
        return made.settings.seed

    assert seed("coupled") == 11
    for rule in ("rejection", "block", "threshold"):
        assert len({11, seed(rule), seed(rule)}) == 3, "nobody has seen its noise"
    whole = branch.branch(asked(draft="what follows", length=8), Limits())
    assert whole.draft == ("what follows",) and whole.settings.draft_length == 8


@pytest.mark.parametrize(
    ("question", "sentence"),
    [
        (None, branch.UNREADABLE),
        ([1], branch.UNREADABLE),
        ({}, "A request must be an object, not None."),
        ({"request": {"prompt": "a", "truncate": True}}, branch.CUT),
        ({"request": {"prompt": "a" * 20_001}}, branch.LONG),
        ({"request": {"prompt": "a", "settings": {"max_new_tokens": 99}}}, "This server writes at most 50 new tokens"),
        (asked(prefix=7), branch.UNREADABLE),
        (asked(prefix=[-1]), "The forced prefix must be text or token ids"),
        (asked(prefix=[{}]), "The forced prefix must be text or token ids"),
        (asked(prefix=["x" * 8_001]), "At most 8,000 characters can be typed at once."),
        (asked(prefix=[1] * 24), "The text ends there: its race writes at most 24 tokens."),
        (asked(draft=["x"]), branch.UNREADABLE),
        (asked(draft="x", length="a"), "Draft length must be"),
        (asked(draft="x", length=None), "Draft length must be"),
    ],
)
def test_what_cannot_be_branched_is_refused_in_a_sentence(question: Any, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        branch.branch(question, Limits(new_tokens=50))
    assert str(caught.value).startswith(sentence)


def test_a_round_that_cannot_be_answers_with_a_sentence(engine: Any) -> None:
    made, _ = engine
    for question, sentence in (
        (None, branch.UNREADABLE),
        (asked(), "Type what comes next."),
        (asked(prefix=[1] * 23, draft="x"), "The text ends there"),
        (asked(prefix=[tiny.VOCABULARY], draft="x"), "The forced prefix holds token 96"),
    ):
        assert json.loads(branch.one_round(made, "me", question))["problem"].startswith(sentence)
    assert not made._running


def test_the_end_of_a_race_says_what_branches_are_made_of(engine: Any) -> None:
    made, _ = engine
    request = Request(PROMPT, Settings(max_new_tokens=4))
    *early, last = (json.loads(view.batch)["about"] for view in run(made, "me", request, Feed(), draw=False))
    assert last["request"] == request.to_dict() and not last["unbranched"] and not last["given"]
    assert early and not any("request" in about for about in early)
    for status, wanted, why in (
        (Status("ready", ""), request, branch.FOREIGN),
        (Status("ready", "", branches=True), replace(request, truncate=True), branch.CUT),
        (Status("ready", "", branches=True, recording=object()), request, branch.RECORDED),  # type: ignore[arg-type]
    ):
        assert branch.offer(status, wanted) == {"request": None, "unbranched": why}


# The page

ROWS = ".sd-b-list button"
PRESSED = "() => [...document.querySelectorAll('.sd-b-list button')].map((row) => row.getAttribute('aria-pressed'))"


@pytest.fixture(scope="module")
def small() -> Iterator[tuple[str, Any]]:
    """The address of the page of a tiny pair, and the pair."""
    torch.set_num_threads(1)
    pair = small_pair()
    with serving(lambda progress: LocalSource(pair)) as url:
        yield url, pair


def panes(visitor: Visitor) -> list[str]:
    return [visitor.page.eval_on_selector(f".sd-{lane} .sd-text", SPOKEN) for lane in (BASELINE, SPECULATIVE)]


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_branches_and_drafts_on_the_page(browser: Any, small: tuple[str, Any]) -> None:
    (url, pair), settings = small, Settings(max_new_tokens=24)
    text = raced(pair, Request(PROMPT, settings)).text(BASELINE)
    visitor = Visitor(browser, url, reduced_motion="reduce").ready()
    page = visitor.page
    page.wait_for_selector('.sd-race[data-recording="ended"]')
    assert page.is_disabled(".sd-b-draft") and "This is a recording" in visitor.text(".sd-b-says")
    page.click(".sd-speculative .sd-text .c >> nth=0")
    assert "This is a recording" in visitor.text(".sd-i-if") and not visitor.count(".sd-i-if :is(button, input)")
    visitor.run(PROMPT, max_new_tokens=24)
    visitor.phase("done")
    page.wait_for_selector(".sd-b-draft:not([disabled])")
    assert panes(visitor) == [text, text] and page.is_hidden(".sd-b-list")

    # what if: another token at position 6, typed
    page.click(".sd-baseline .sd-text .t >> nth=5")
    assert visitor.count(".sd-i-picks button") > 2
    page.fill(".sd-i-if input", "xy")
    page.keyboard.press("Enter")
    page.wait_for_selector(f"{ROWS}[aria-pressed=true] >> text=“xy” for")
    visitor.phase("done")
    other = raced(pair, Request(PROMPT, replace(settings, max_new_tokens=18), prefix=(text[:5] + "xy"))).text(BASELINE)
    branched = text[:5] + "xy" + other
    assert panes(visitor) == [branched, branched] and branched[:20] != text[:20]
    for lane in (BASELINE, SPECULATIVE):
        spans = page.locator(f".sd-{lane} .sd-text .p")
        assert "".join(spans.all_text_contents()) == text[:5] + "xy"
        assert visitor.count(f".sd-{lane} .sd-text .sd-forced") == 2 and visitor.count(f".sd-{lane} .sd-fork") == 1
    assert page.is_visible(".sd-legend .sd-forced") and page.evaluate(PRESSED) == ["false", "true"]
    assert visitor.text(".sd-speculative .sd-finish") == "token limit"
    assert "from a given text" in visitor.text(".sd-ran")

    # back to the original by the keyboard, and to the branch
    page.wait_for_selector(f"{ROWS}:not([disabled])")
    for row, shown, forced in ((0, text, 0), (1, branched, 4), (0, text, 0)):
        page.focus(f"{ROWS} >> nth={row}")
        page.keyboard.press("Enter")
        assert panes(visitor) == [shown, shown] and visitor.count(".sd-text .sd-forced") == forced
        assert visitor.text('[data-k="identical"]') == "✓ identical"
        page.wait_for_selector(".sd-pin:not([disabled])")  # what it is made of is still there
        assert page.is_enabled('.sd-share >> text="Save replay (HTML)"')
    assert page.evaluate(PRESSED) == ["true", "false"] and page.is_hidden(".sd-legend .sd-forced")

    # a person's rounds
    page.focus(".sd-b-draft")
    page.keyboard.press("Enter")
    assert visitor.focused().startswith("TEXTAREA")
    page.uncheck(".sd-p-options input")
    wrong = chr(32 + (ord(text[3]) - 31) % tiny.VOCABULARY)
    for typed, verdict in ((text[:3] + wrong, "3 of 4 accepted."), (text[4:8], "4 of 4 accepted.")):
        page.fill(".sd-person textarea", typed)
        page.keyboard.press("Enter")
        page.wait_for_selector(f".sd-p-round b >> text={verdict}", timeout=60_000)
    assert "as a bonus" in visitor.text(".sd-p-round")
    assert page.text_content(".sd-p-text") == text[:9], "the text is the target's, whatever was typed"
    score = visitor.text(".sd-p-score")
    assert "7 of 8 accepted (88 %)" in score and "4.5 in 2 rounds" in score and "where both were judged" in score
    page.wait_for_timeout(100)
    assert visitor.violations() == []
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "no sideways scrolling"

    # a whole text: the rest of it, with one token wrong
    page.fill(".sd-person textarea", text[9:12] + ("!" if text[12] != "!" else "?") + text[13:])
    page.click("text=Race with it as a whole text")
    page.wait_for_selector(f"{ROWS}[aria-pressed=true] >> text=Your draft from token 10")
    visitor.phase("done")
    page.wait_for_selector(f"{ROWS}[aria-pressed=true] >> text=drafted by you accepted", state="attached")
    assert panes(visitor) == [text, text] and visitor.count(".sd-speculative .sd-text .a") >= 8
    page.focus(".sd-person textarea")
    page.keyboard.press("Escape")
    assert page.is_hidden(".sd-person") and visitor.focused().startswith("BUTTON")
    page.click(".sd-speculative .sd-text .a >> nth=0")
    assert "drafted by person" in visitor.text(".sd-inspector") and "Draft from here" in visitor.text(".sd-inspector")
    page.click("[aria-label='Previous round']")
    assert "Prefill" in visitor.text(".sd-inspector")
    page.keyboard.press("Escape")
    visitor.run("another prompt", max_new_tokens=4)
    page.wait_for_selector(".sd-ran >> text=another prompt")
    visitor.phase("done")
    assert page.is_hidden(".sd-b-list") and page.is_hidden(".sd-person"), "another race has no branches yet"
    assert visitor.errors == [] and visitor.outside == []
    page.close()


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_a_round_that_is_taken_back_is_stopped_and_the_next_is_answered(
    browser: Any, small: tuple[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, ended, raced_ = threading.Semaphore(0), threading.Semaphore(0), branch._raced
    holding = True

    def held(engine: Engine, visitor: str, request: Request, gone: Callable[[], bool]) -> Any:
        begun.release()
        end = time.monotonic() + 60
        while holding and not gone():
            assert time.monotonic() < end, "the server does not learn of it"
            time.sleep(0.02)
        try:
            return raced_(engine, visitor, request, gone)
        finally:
            ended.release()

    monkeypatch.setattr(branch, "_raced", held)
    visitor = Visitor(browser, small[0], reduced_motion="reduce").ready()
    page = visitor.page
    visitor.run(PROMPT, max_new_tokens=12)
    visitor.phase("done")
    page.click(".sd-b-draft:not([disabled])")
    page.fill(".sd-person textarea", "abc")
    page.keyboard.press("Enter")
    page.wait_for_selector(".sd-p-go >> text=Cancel")
    assert begun.acquire(timeout=60)
    page.click(".sd-p-go")
    assert "The text is as it was" in visitor.text(".sd-p-round")
    holding = False
    page.fill(".sd-person textarea", "abcd")
    page.keyboard.press("Enter")  # before the round that was taken back has ended
    page.wait_for_selector(".sd-p-round b >> text=of 4 accepted", timeout=60_000)
    assert begun.acquire(timeout=60) and ended.acquire(timeout=60) and ended.acquire(timeout=60)

    holding = True
    page.fill(".sd-person textarea", "abc")
    page.keyboard.press("Enter")
    assert begun.acquire(timeout=60)
    page.keyboard.press("Escape")
    assert ended.acquire(timeout=60), "a panel that is closed takes its question back"
    assert page.is_hidden(".sd-person") and visitor.errors == []
    page.close()


def test_a_question_that_was_taken_back_takes_no_device(engine: Any) -> None:
    made, _ = engine
    answer = json.loads(branch.one_round(made, "me", asked(draft="abc"), gone=lambda: True))
    assert answer == {"answer": "7", "problem": branch.TAKEN_BACK}
    steps = iter([False, False, True])
    answer = json.loads(branch.one_round(made, "me", asked(draft="abc"), gone=lambda: next(steps, True)))
    assert answer == {"answer": "7", "problem": branch.TAKEN_BACK}, "nor does one that runs keep it"
    assert made._running == {}
