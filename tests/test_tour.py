# ruff: noqa: F811 (fixtures of another file are imported, and named again where they are asked for)
"""The tour in a real browser: its captions find their rounds, say what is in the trace, and are remembered; skipped
without a browser, as tests/test_browser.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from test_browser import CHROMIUM, Visitor, browser, fake_app, served, serving  # noqa: F401
from test_inspector import SCENES, bare, state  # noqa: F401

from spec_decode.events import SPECULATIVE, Round, Token, Trace
from spec_decode.request import Request
from spec_decode.settings import Settings
from spec_decode.ui.components import asset
from spec_decode.ui.linked import form_values
from spec_decode.ui.tour import STEPS, prompts

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")]

TOURED = "[...document.querySelectorAll('.sd-speculative .sd-text .toured')].map((t) => t.textContent)"
BARS = "[...document.querySelectorAll('.sd-tour-bars data')].map((d) => Number(d.value))"
# A race of these rounds in the view, with what is known of it changed.
SHOW = """([rounds, changes]) => {
  const view = document.querySelector(".sd-race").view, { about, costs, constructor: Race } = view.race;
  view.reset(new Race({ ...about, ...changes }, costs));
  view.add(rounds);
}"""
STOPS = f"""(rounds) => {{
  {asset("trace.js")}
  {asset("tour.js")}
  const race = new SpecDecode.Race();
  rounds.forEach((round) => race.add(round));
  const stops = SpecDecode.tourStops(race);
  return Object.fromEntries(Object.entries(stops).map(([name, at]) => [name, at && at.round.index]));
}}"""


def bones(trace: Trace) -> list[dict[str, Any]]:
    """The rounds of the speculative lane without alternatives."""
    lean = [
        replace(r, tokens=tuple(replace(t, target_top=(), drafter_top=()) for t in r.tokens), residual=None)
        for r in trace.lane(SPECULATIVE)
    ]
    return [r.to_dict() for r in lean]


def rounds(*kept: tuple[int, int]) -> list[dict[str, Any]]:
    """Rounds of the speculative lane, after the prefill: (drafted, accepted) each."""
    made, place = [Round(SPECULATIVE, 0, (Token(1, "one", "target"),), 0, 0.0, 0.1, 0.1, 0.1)], 1
    for index, (drafted, accepted) in enumerate(kept, 1):
        tokens = [Token(place + i, f" yes{i}", "accepted", 0.5, 0.5, i + 1) for i in range(accepted)]
        tokens += [Token(900 + i, f" no{i}", "rejected", 0.1, 0.5, i + 1) for i in range(accepted, drafted)]
        role: Any = "target" if not drafted else "bonus" if accepted == drafted else "correction"
        tokens.append(Token(place + accepted, " own", role, 0.5))
        place += accepted + 1
        made.append(Round(SPECULATIVE, index, tuple(tokens), drafted, 0.001, 0.01, 0.011, 0.1 + index * 0.011))
    return [r.to_dict() for r in made]


ACCEPTED, REFUSED, PLAIN = (
    rounds((1, 1), (2, 2), (4, 4), (5, 5)),
    rounds((1, 0), (3, 0), (2, 0)),
    rounds((0, 0), (0, 0)),
)


def test_every_caption_finds_its_round(browser: Any) -> None:
    page = browser.new_page()
    for trace in SCENES.values():
        lane = [r for r in trace.lane(SPECULATIVE) if r.index]
        stops = page.evaluate(STOPS, bones(trace))
        at = {name: next(r for r in lane if r.index == index) for name, index in stops.items()}
        assert at["guess"] == next(r for r in lane if r.drafted >= 2)
        assert at["pass"].drafted >= 2 and at["pass"].accepted == at["pass"].drafted and at["cost"] == at["pass"]
        assert at["mistake"] == next(r for r in lane if r.accepted < r.drafted)
        assert at["mistake"].tokens[-1].role == "correction"
    for made, expected in (
        (ACCEPTED, (2, 3, None)),
        (REFUSED, (2, 1, 1)),
        (PLAIN, (1, 1, None)),
        (rounds((1, 0), (0, 0), (1, 1)), (1, 3, 1)),
        (rounds((4, 2), (4, 3), (4, 3)), (1, 2, 1)),
        (rounds(), (None, None, None)),
    ):
        stops = page.evaluate(STOPS, made)
        assert (stops["guess"], stops["pass"], stops["mistake"]) == expected and stops["cost"] == stops["pass"]
    page.close()


def told(visitor: Visitor) -> tuple[str, str]:
    """The title and the text of the caption that is shown."""
    return visitor.text(".sd-tour h2"), " ".join(visitor.text(".sd-tour-body").split())


def test_four_captions_on_a_recording_then_next_steps(browser: Any, fake_app: Any) -> None:
    url, source = fake_app(pace=8.0, context=4000)
    visitor = Visitor(browser, url, width=1280).ready()
    page, trace, panel = visitor.page, SCENES["code"], visitor.page.locator(".sd-tour")
    state(visitor, "playing")
    page.wait_for_selector(".sd-tour-open >> text=New here?")
    page.focus(".sd-tour-open")
    page.keyboard.press("Enter")
    page.wait_for_selector(".sd-tour")
    assert page.get_attribute(".sd-race", "data-recording") == "ended", "the whole recording is there at once"
    assert visitor.text(".sd-tour-open") == "Tour" and visitor.focused().startswith("sd-tour-title")
    by = {r.index: r for r in trace.lane(SPECULATIVE)}
    stops = page.evaluate(STOPS, bones(trace))

    seen = []
    for name, key in (("guess", "Enter"), ("pass", "ArrowRight"), ("mistake", "ArrowRight"), ("cost", "")):
        r = by[stops[name]]
        title, text = told(visitor)
        seen.append(title)
        assert page.evaluate(TOURED) == [
            t.text.replace("\n", "↵") if t.role == "rejected" else t.text for t in r.tokens
        ]
        assert f"Round {r.index}" in text and "recorded on" in visitor.text(".sd-tour-place")
        token, pane = (
            page.locator(".toured").first.bounding_box(),
            page.locator(".sd-speculative .sd-text").bounding_box(),
        )
        assert pane["y"] <= token["y"] and token["y"] + token["height"] <= panel.bounding_box()["y"], "in sight"
        shown = page.eval_on_selector_all(".sd-tour-tokens .t", "all => all.map((t) => t.className)")
        if name == "guess":
            assert shown == ["t t0"] * r.drafted and f"{1000 * r.draft_seconds:.2f} ms" in text
        if name == "pass":
            assert shown == ["t a"] * r.accepted + ["t b"] and f"{len(r.emitted)} tokens from one pass" in text
        if name == "mistake":
            wrong = next(t for t in r.tokens if t.role == "rejected")
            assert f"“{wrong.text}” is not accepted" in text and f"“{r.tokens[-1].text}”" in text
            assert "the one that the target alone writes" in text
        if name == "cost":
            assert page.evaluate(BARS) == [trace.costs.verify_ratio[n - 1] for n in (1, 2, 4, 8)]
            assert "machine of the recording" in text and f"{1000 * r.seconds:.2f} ms" in text
        if key:
            page.keyboard.press(key)
    assert seen == ["A guess", "One pass checks all", "The first mistake, corrected", "Why it is cheap"]
    page.wait_for_timeout(250)
    assert visitor.violations() == []
    page.keyboard.press("ArrowLeft")
    assert told(visitor)[0] == seen[2]
    term = page.locator('.sd-tour .sd-term >> text="correction"')
    term.click()
    assert "in place of the first rejected token" in visitor.text(".sd-tip")
    page.keyboard.press("Escape")
    assert panel.count() == 1 and page.locator(".sd-tip").is_hidden(), "the card goes first"
    page.keyboard.press("Escape")
    assert panel.count() == 0 and visitor.focused() == "BUTTON Tour" and page.evaluate(TOURED) == []

    page.reload()
    visitor.ready()
    assert visitor.text(".sd-tour-open") == "Tour" and page.is_hidden(".sd-tour-refuse"), "offered once"

    def ending() -> list[str]:
        page.click(".sd-tour-open")
        for _ in range(4):
            page.click(".sd-tour-next")
        return list(page.locator(".sd-tour-chip").all_inner_texts())

    assert ending() == [*(step.title for step in STEPS), "Break exactness"]
    assert visitor.focused().startswith("sd-tour-title")
    raced = len(source.races)
    for i, step in enumerate(STEPS):
        if i:
            ending()
        page.click(f".sd-tour-chip >> text={step.title}")
        page.wait_for_function(
            "text => document.querySelector('#sd-prompt textarea').value === text", arg=prompts()[step.example]
        )
        wanted = form_values(Request("a", Settings(**step.settings)))
        page.wait_for_function(
            "t => Number(document.querySelector('#sd-temperature input').value) === t", arg=wanted["temperature"]
        )
        page.wait_for_function(
            "p => document.querySelector('#sd-policy input:checked').value === p", arg=wanted["policy"]
        )
        if wanted["policy"] == "fixed":
            page.wait_for_function("document.querySelector('#sd-length input')?.value === '16'")
        assert page.input_value("#sd-drafter input") == (step.drafter or "fake-drafter")
        assert step.says in told(visitor)[1]
        page.wait_for_function("document.activeElement.id === 'sd-run'")
        page.click(".sd-tour .sd-tip-close")
    assert len(source.races) == raced, "nothing is run"

    ending()
    page.click(".sd-tour-chip >> text=Make it lose")
    page.wait_for_function("document.querySelector('#sd-length input')?.value === '16'")
    page.wait_for_function("document.activeElement.id === 'sd-run'")
    page.keyboard.press("Enter")
    visitor.phase("running")
    assert "Press Run" in told(visitor)[1], "what to look for stays"
    page.wait_for_function("document.querySelectorAll('.sd-speculative .sd-text .t').length > 20")
    assert source.races[-1].request.settings.draft_length == 16
    page.keyboard.press("Escape")
    page.click(".sd-tour-open")
    for _ in range(3):
        page.click(".sd-tour-next")
    assert "come when the race is over" in told(visitor)[1]
    page.keyboard.press("Escape")
    assert panel.count() == 0 and page.get_attribute(".sd-race", "data-phase") == "running", "the tour goes first"
    page.keyboard.press("Escape")
    visitor.phase("done", 20)
    page.click(".sd-tour-open")
    assert "on your race" in visitor.text(".sd-tour-place")
    for _ in range(3):
        page.click(".sd-tour-next")
    assert page.evaluate(BARS) == [source.costs.verify_ratio[n - 1] for n in (1, 2, 4, 8)]
    assert "Measured on this machine." in told(visitor)[1]
    page.click(".sd-tour-next")
    page.click(".sd-tour-chip >> text=Break exactness")
    page.wait_for_selector("#sd-lab-broken input:checked")
    page.wait_for_function("document.activeElement.id === 'sd-lab-run'")
    assert "Press Run test" in told(visitor)[1]
    page.click(".sd-tour-open")
    page.wait_for_selector(".sd-tour h2 >> text=A guess")
    assert page.is_visible(".sd-race"), "the tour is on the race"
    page.click(".sd-speculative .sd-text .t >> nth=3")
    assert panel.count() == 0 and page.is_visible(".sd-inspector"), "a round that is opened ends the tour"
    assert visitor.errors == [] and visitor.outside == []
    page.close()


@pytest.mark.long
def test_a_phone_has_a_sheet_and_a_race_without_the_round_of_a_caption_says_so(browser: Any, bare: str) -> None:
    visitor = Visitor(
        browser, bare, width=390, height=844, theme="dark", has_touch=True, is_mobile=True, reduced_motion="reduce"
    )
    page, panel = visitor.page, visitor.page.locator(".sd-tour")
    state(visitor, "ended")
    page.tap(".sd-tour-refuse")
    assert visitor.text(".sd-tour-open") == "Tour" and visitor.focused() == "BUTTON Tour" and panel.count() == 0
    page.reload()
    state(visitor, "ended")
    page.tap(".sd-tour-open")
    for _ in range(4):
        at, token = panel.bounding_box(), page.locator(".toured").first.bounding_box()
        assert at["y"] + at["height"] == pytest.approx(844, abs=1) and at["width"] == 390, "at the bottom edge"
        assert token["y"] >= 0 and token["y"] + token["height"] <= at["y"], "the token stays in sight above it"
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "no sideways scrolling"
        page.tap(".sd-tour-next")
    assert page.locator(".sd-tour-chip").count() == 0 and "Press any token" in told(visitor)[1], "there is no form here"
    assert visitor.violations() == [] and visitor.errors == []
    page.set_viewport_size({"width": 320, "height": 700})
    offer = page.locator(".sd-tour-offer").bounding_box()
    assert offer["x"] + offer["width"] <= 320

    def captions(made: list[dict[str, Any]], **about: Any) -> list[str]:
        page.evaluate(SHOW, [made, about])
        page.click(".sd-tour-open")
        texts = []
        for _ in range(4):
            texts.append(told(visitor)[1])
            page.click(".sd-tour-next")
        page.keyboard.press("Escape")
        return texts

    guess, checks, mistake, _ = captions(ACCEPTED)
    assert (
        "guesses the next 2 tokens" in guess and "All 4 are accepted" in checks and "5 tokens from one pass" in checks
    )
    assert mistake.startswith("No guess was rejected in this race.")
    guess, checks, mistake, _ = captions(REFUSED)
    assert "guesses the next 3 tokens" in guess and "None is accepted here" in checks and "“ no0” is not" in mistake
    guess, checks, mistake, cost = captions(PLAIN)
    assert guess.startswith("Nothing was drafted in this race") and "where nothing is drafted" in checks
    assert mistake.startswith("Nothing was drafted") and "over 8 tokens" in cost.lower() and "Round" not in cost
    _, _, mistake, _ = captions(ACCEPTED, rejected="nothing")
    assert "does not tell which guesses it rejected" in mistake
    for about, words in (
        ({"same_text": False}, "follows the target’s own distribution"),
        ({"exact": False, "same_text": False}, "rule of this race is lossy"),
        ({"exact": False, "synthetic": True}, "verdicts were drawn"),
    ):
        assert words in captions(REFUSED, **about)[2]
    page.evaluate("document.querySelector('.sd-race').view.race.costs = null")
    page.click(".sd-tour-open")
    for _ in range(3):
        page.click(".sd-tour-next")
    assert "How much was not measured" in told(visitor)[1] and page.evaluate(BARS) == []
    assert visitor.errors == []
    page.close()
