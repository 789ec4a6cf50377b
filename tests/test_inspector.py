# ruff: noqa: F811 (fixtures of another file are imported, and named again where they are asked for)
"""Recordings, the round inspector and the timeline in a real browser; skipped without one, as tests/test_browser.py."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from test_browser import CHROMIUM, SPOKEN, Visitor, browser, fake_app, served, serving  # noqa: F401

from spec_decode import recording
from spec_decode.events import BASELINE, SPECULATIVE, Round, Token, Trace
from spec_decode.request import Request
from spec_decode.rules import RULES
from spec_decode.session.recordings import prepared, shipped
from spec_decode.settings import Settings
from spec_decode.sources.replay import read

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")]

SCENES = {scene.name: read(scene.path()) for scene in recording.scenes()}
TOKENS = "document.querySelectorAll('.sd-baseline .sd-text .t').length"
# what a recording was ever seen doing, before anything else of the page runs
SEEN = """
window.states = [];
new MutationObserver(() => {
  const state = document.querySelector(".sd-race")?.dataset.recording;
  if (state && state !== window.states.at(-1)) window.states.push(state);
}).observe(document, { subtree: true, childList: true, attributes: true });
"""
STATS = "document.querySelector('.sd-race').view.race.stats()"


@pytest.fixture(scope="module")
def bare() -> Iterator[str]:
    """The address of a page whose server has no model."""
    with serving(None) as url:
        yield url


def state(visitor: Visitor, name: str) -> None:
    visitor.page.wait_for_selector(f'.sd-race[data-recording="{name}"]', timeout=20_000)


def shows(visitor: Visitor, trace: Trace) -> None:
    """Both panes hold the whole text of this trace."""
    for lane in (BASELINE, SPECULATIVE):
        assert visitor.page.eval_on_selector(f".sd-{lane} .sd-text", SPOKEN) == trace.text(lane)


def test_a_recording_plays_by_itself_without_a_model_or_the_server(browser: Any, bare: str) -> None:
    visitor = Visitor(browser, bare, before=SEEN)
    page, now = visitor.page, visitor.page.evaluate
    state(visitor, "playing")
    page.wait_for_selector("#sd-status >> text=has no model")
    page.context.set_offline(True)
    page.wait_for_function(f"{TOKENS} > 8")
    said = visitor.text(".sd-player") + visitor.text(".sd-played")
    assert "Recording" in said and shipped()[0]["recorded"][9:] in said and SCENES["code"].prompt in said
    page.click(".sd-pause")
    held = now(TOKENS)
    page.wait_for_timeout(300)
    assert now(TOKENS) == held and visitor.text(".sd-pause") == "Resume"
    assert page.is_disabled("#sd-run") and page.is_disabled("#sd-prompt textarea")
    assert not page.is_visible("#sd-settings") and not page.is_visible("#sd-examples")
    assert visitor.text(".sd-sr") == "", "a recording is not read out"
    page.select_option(".sd-pace", "1")
    page.click(".sd-pause")
    page.wait_for_function(f"{TOKENS} > {held + 5}")
    page.click(".sd-pick >> text=JSON")
    page.wait_for_selector(".sd-player >> text=could not be loaded")
    page.context.set_offline(False)
    page.click(".sd-pick >> text=JSON")
    state(visitor, "playing")
    page.context.set_offline(True)
    state(visitor, "ended")
    shows(visitor, SCENES["json"])
    final = next(data["stats"] for data in shipped() if data["name"] == "json")
    counted = now(STATS)
    for name in ("speedup", "acceptance", "per_pass", "same", "identical"):
        assert counted[name] == pytest.approx(final[name]), "the browser counts by the same definitions"
    for lane in (BASELINE, SPECULATIVE):
        for name in ("tokens", "rate", "first", "clock"):
            assert counted[lane][name] == pytest.approx(final[lane][name])
    assert visitor.text('[data-k="speedup"]') == f"{final['speedup']:.2f}×"
    assert visitor.text('[data-k="identical"]') == "✓ identical" and "(95 %)" in visitor.text('[data-k="interval"]')
    assert page.get_attribute('.sd-pick >> text="JSON"', "aria-pressed") == "true"
    assert visitor.text(".sd-pause") == "Again" and visitor.text(".sd-sr") == ""
    assert now("window.states") == ["playing", "paused", "playing", "ended"]
    page.close()


@pytest.mark.parametrize(("theme", "width"), [("light", 1440), ("dark", 320)])
def test_without_motion_the_end_is_shown_and_nothing_takes_the_focus(
    browser: Any, bare: str, theme: str, width: int
) -> None:
    visitor = Visitor(browser, bare, width=width, theme=theme, reduced_motion="reduce", before=SEEN)
    page = visitor.page
    state(visitor, "ended")
    page.wait_for_selector("#sd-status >> text=has no model")
    shows(visitor, SCENES["code"])
    assert "playing" not in page.evaluate("window.states").__str__().replace("'playing', 'ended'", "")
    assert visitor.focused().startswith("BODY")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "no sideways scrolling"
    page.wait_for_selector('[data-plot="model"][data-state="drawn"] .main-svg')
    page.wait_for_timeout(200)
    assert visitor.violations() == [] and visitor.errors == [] and visitor.outside == []
    page.close()


def test_run_replaces_the_recording_and_clear_ends_it(browser: Any, fake_app: Any) -> None:
    visitor = Visitor(browser, fake_app(pace=1.0)[0]).ready()
    page = visitor.page
    page.wait_for_selector(".sd-race[data-recording]")
    page.click("#sd-clear")
    page.wait_for_selector(".sd-race:not([data-recording])")
    assert page.evaluate(TOKENS) == 0 and "One token per pass" in visitor.text(".sd-baseline")
    page.click(".sd-pick >> text=prose")
    state(visitor, "playing")
    visitor.run("hello", max_new_tokens=400)
    visitor.phase("running")
    assert page.get_attribute(".sd-race", "data-recording") is None and not page.is_visible(".sd-player-prompt")
    assert page.is_disabled(".sd-pick >> text=prose"), "not while a race runs"
    page.keyboard.press("Escape")
    visitor.phase("done")
    assert "The race is over" in visitor.text(".sd-sr")
    page.wait_for_timeout(400)
    assert str(page.evaluate(TOKENS)) == visitor.text('[data-k="baseline.tokens"]'), "the recording has let go"
    page.click(".sd-pick >> text=prose")
    state(visitor, "playing")
    assert page.is_hidden(".sd-ran") and visitor.errors == []
    page.close()


# The round inspector

PROMPT = "one two three, one two three, one two"
# rule, temperature, drafter: every rule of the table, and what it does where a draft was drawn from no distribution
CASES = {
    "greedy": ("greedy", 0.0, "model"),
    "coupled": ("coupled", 0.5, "model"),
    "rejection": ("rejection", 0.5, "model"),
    "rejection one-hot": ("rejection", 0.4, "lookup"),
    "block": ("block", 0.5, "model"),
    "block one-hot": ("block", 0.4, "lookup"),
    "threshold": ("threshold", 0.5, "model"),
    "threshold at 0": ("threshold", 0.0, "model"),
}
# Every position of every round, as the inspector shows it.
COLLECT = """() => {
  const view = document.querySelector(".sd-race").view, home = document.querySelector(".sd-inspector"), out = [];
  const numbers = (where) => [...home.querySelectorAll(where)].map((d) => [Number(d.value), d.textContent]);
  for (const round of view.race.rounds.speculative) {
    view.inspect("speculative", round.index);
    const places = [];
    for (let i = 0; i < Math.max(1, home.querySelectorAll("thead button").length); i++) {
      home.querySelectorAll("thead button")[i]?.click();
      places.push({
        rule: home.querySelector(".sd-i-rule").textContent, numbers: numbers(".sd-i-rule data"),
        card: document.querySelector(".sd-i-dock .sd-tip").textContent,
        lists: Object.fromEntries([...home.querySelectorAll(".sd-i-list")].map((list) => [list.firstChild.textContent,
          [...list.querySelectorAll("li")].map((li) => [li.querySelector(".sd-i-token").textContent,
            Number(li.querySelector("data").value), li.querySelector("data").textContent])])),
      });
    }
    const texts = (row) => [...row.querySelectorAll("td")].map((td) => td.textContent);
    const cells = [...home.querySelectorAll("tbody tr")].map(texts);
    out.push({ title: home.querySelector("h2").textContent, places, cells, times: numbers(".sd-i-strip li data") });
  }
  return out;
}"""


def raced(rule: str, temperature: float, drafter: str) -> Trace:
    """A race of tiny models under this rule. The drafter draws from a model near the target, or guesses what the target
    is likeliest to say without drawing it, as prompt lookup would."""
    import tiny
    import torch

    from spec_decode.drafters.model import ModelDrafter
    from spec_decode.sources.local import Race
    from spec_decode.target import Target

    torch.set_num_threads(1)  # the models are too small for more
    target, near = tiny.model("llama"), tiny.model("llama")

    def likeliest(tokens: list[int], length: int) -> list[int]:
        out = list(tokens)
        for _ in range(length):
            out.append(int(target(torch.tensor([out])).logits[0, -1].argmax()))
        return out[len(tokens) :]

    with torch.inference_mode():
        for weights in near.parameters():
            weights += 0.004 * torch.randn_like(weights)
        guessing = tiny.ScriptedDrafter(likeliest)
        guessing.name = "lookup"
        pair = tiny.PairOf(
            Target(target), guessing if drafter == "lookup" else ModelDrafter(Target(near), "h", tiny.VOCABULARY)
        )
        settings = Settings(rule=rule, temperature=temperature, max_new_tokens=30, draft_length=4, seed=1)
        race = Race(pair, Request(PROMPT, settings))
        for _ in race:
            pass
    return race.trace


@pytest.fixture(scope="module")
def rules(request: pytest.FixtureRequest) -> Iterator[tuple[str, dict[str, Trace]]]:
    """A page without a model whose recordings are one race for each of `CASES`, and those races."""
    traces = {name: raced(*case) for name, case in CASES.items()}
    made = [prepared(name, name, recording.packed(trace), trace) for name, trace in traces.items()]
    patch = pytest.MonkeyPatch()
    patch.setattr("spec_decode.ui.layout.shipped", lambda: made)
    with serving(None) as url:
        patch.undo()
        yield url, traces


def shown(text: str) -> str:
    return text.replace("\n", "↵") if text else "…"


def rounds_to(value: float, text: str, digits: int = 4) -> bool:
    return float(text) == float(f"{value:.{digits}g}")


def alternatives(trace: Trace, top: Any) -> list[tuple[str, float]]:
    return [(shown(trace.pieces[str(a.id)]), a.p) for a in top]


def test_the_inspector_agrees_with_the_trace_to_the_digit_under_every_rule(browser: Any, rules: Any) -> None:
    url, traces = rules
    assert {case[0] for case in CASES.values()} == set(RULES), "every rule of the table"
    visitor = Visitor(browser, url, width=1440, reduced_motion="reduce")
    page = visitor.page
    state(visitor, "ended")
    for name, trace in traces.items():
        page.click(f'.sd-pick >> text="{name}"')
        page.wait_for_function(
            "([name]) => document.querySelector('.sd-pick[aria-pressed=true]').textContent === name"
            " && document.querySelector('.sd-race').dataset.recording === 'ended'",
            arg=[name],
        )
        seen = page.evaluate(COLLECT)
        fast = trace.lane(SPECULATIVE)
        assert [s["title"] for s in seen] == ["Prefill", *(f"Round {r.index}" for r in fast[1:])]
        verdicts = set()
        for r, s in zip(fast, seen, strict=True):
            rest = max(0.0, r.seconds - r.draft_seconds - r.verify_seconds)
            for (value, text), seconds in zip(s["times"], (r.draft_seconds, r.verify_seconds, rest), strict=True):
                assert value == seconds and text == f"{1000 * value:.{2 if value < 0.1 else 1}f} ms"
            if r.index == 0:
                continue
            drafted = [t for t in r.tokens if t.draft_position]
            own = next((t for t in r.tokens if t.role in ("correction", "bonus", "target")), None)
            assert s["cells"][0][: len(drafted)] == [shown(t.text) for t in drafted]
            if own:
                assert shown(own.text) in s["cells"][1]
            for i, place in enumerate(s["places"]):
                token = drafted[i] if i < len(drafted) else own
                assert token is not None
                verdicts.add(checked(name, trace, r, token, own, place))
        assert {"accepted", "rejected"} <= verdicts, f"{name}: both were seen"
    assert visitor.errors == []
    page.close()


def checked(name: str, trace: Trace, r: Round, token: Token, own: Token | None, place: dict[str, Any]) -> str:
    """Compares what the inspector says of a position with the trace, and returns the token's role."""
    rule, sampled = trace.settings["rule"], trace.settings["temperature"] > 0
    for title, top in (("target p", token.target_top), ("drafter q", token.drafter_top)):
        listed = place["lists"].get(title, [])
        assert [(text, value) for text, value, _ in listed[: len(top)]] == alternatives(trace, top), title
        assert all(rounds_to(value, said) for _, value, said in listed)
    extra = {value for _, value, _ in place["lists"]["target p"]}
    assert token.p in extra, "the token itself is there, among the likeliest or below them"
    (told,) = re.findall(r"target p([\d.e-]+?)(?=draft q|round|$)", place["card"])
    assert rounds_to(token.p or 0.0, told)
    said, numbers = place["rule"], [value for value, _ in place["numbers"]]
    assert all(rounds_to(value, text) for value, text in place["numbers"])
    first = next((t for t in r.tokens if t.role == "rejected"), None)
    corrected = token is first and own is not None
    if token.compared is None:
        assert token.role in ("bonus", "target") or "Not judged" in said
        return str(token.role)
    value, bound = token.compared
    if rule == "greedy":
        assert numbers == ([bound] if token.role == "accepted" else [value, bound])
        assert bound == token.target_top[0].p and (token.role == "accepted") == ("the very token" in said)
    elif rule == "coupled":
        assert numbers == ([bound] if token.role == "accepted" else [value, bound]) and "same noise" in said
    elif rule == "threshold" and not sampled:
        assert numbers == [trace.settings["lenience"], value, bound] and value == token.p
        assert bound == pytest.approx(trace.settings["lenience"] * token.target_top[0].p, rel=1e-5)
        exact = token.role == "accepted" and token.id != token.target_top[0].id
        assert ("exact rule would refuse" in said) == exact
    else:
        lenience = trace.settings["lenience"] if rule == "threshold" else 1.0
        assert bound in numbers and value in numbers and token.p in numbers
        one_hot = trace.pair["drafter"] == "lookup"
        assert ("counts as q = 1" in said) == one_hot and (token.q in numbers) == (not one_hot)
        if rule != "block":
            q = 1.0 if one_hot else token.q
            assert bound == pytest.approx(min(1.0, token.p / (lenience * q)), rel=1e-4), "the numbers add up"
            assert (value < bound) == (token.role == "accepted")
            assert ("which is below: accepted" in said) == (token.role == "accepted")
        if corrected and r.residual and r.residual.mass:
            (title,) = (key for key in place["lists"] if key.startswith("residual"))
            listed = place["lists"][title]
            assert [(t, v) for t, v, _ in listed] == alternatives(trace, r.residual.top)
            assert r.residual.mass in numbers and "Drew again from the residual" in said
        else:
            assert not any(key.startswith("residual") for key in place["lists"])
    return str(token.role)


def test_a_press_opens_a_round_and_keys_step_through_them(browser: Any, bare: str) -> None:
    visitor = Visitor(browser, bare, width=1440, height=1000, reduced_motion="reduce", theme="dark")
    page, panel = visitor.page, visitor.page.locator(".sd-inspector")
    state(visitor, "ended")
    assert panel.is_hidden()
    token = page.locator(".sd-speculative .sd-text .r").nth(8)
    token.click()
    assert panel.is_visible() and "Round" in visitor.text(".sd-i-title")
    at, lanes = panel.bounding_box(), page.locator(".sd-lanes").bounding_box()
    assert at["x"] >= lanes["x"] + lanes["width"], "beside the panes"
    assert "cur" in token.get_attribute("class") and "rejected" in visitor.text(".sd-i-dock")
    first = int(visitor.text(".sd-i-title").split()[1])
    page.keyboard.press("ArrowRight")
    assert visitor.text(".sd-i-title") == f"Round {first + 1}"
    page.click("[aria-label='Previous round']")
    page.keyboard.press("ArrowLeft")
    assert visitor.text(".sd-i-title") == f"Round {first - 1}"
    page.wait_for_timeout(200)
    assert visitor.violations() == []
    page.locator(".sd-baseline .sd-text .t").nth(100).hover()
    assert "pass100" in visitor.text(".sd-tip").replace("\n", ""), "other tokens still have their card"
    page.keyboard.press("Escape")
    assert panel.is_hidden() and "Speculative output" in visitor.focused()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert panel.is_visible() and visitor.text(".sd-i-title") == "Round 1"
    page.click(".sd-i-slow")
    assert visitor.count(".sd-i-grid[data-replaying]") == 1 and visitor.text(".sd-i-slow") == "Stop"
    page.wait_for_selector(".sd-i-grid:not([data-replaying])", timeout=20_000)
    assert visitor.text(".sd-i-slow") == "Replay slowly"
    page.click(".sd-baseline .sd-text .t >> nth=110")
    assert visitor.text(".sd-i-title") == "Pass 110" and "A plain step" in visitor.text(".sd-i-rule")
    page.click(".sd-tip-close")
    assert panel.is_hidden() and "Baseline output" in visitor.focused()
    assert visitor.errors == []
    page.close()


def test_on_a_phone_the_round_is_a_sheet(browser: Any, bare: str) -> None:
    visitor = Visitor(browser, bare, width=390, height=844, has_touch=True, is_mobile=True, reduced_motion="reduce")
    page, panel = visitor.page, visitor.page.locator(".sd-inspector")
    state(visitor, "ended")
    page.locator(".sd-speculative .sd-text .r").nth(8).tap()
    at, token = panel.bounding_box(), page.locator(".sd-text .cur").bounding_box()
    assert at["y"] + at["height"] == 844 and at["width"] == 390, "at the bottom edge"
    assert token["y"] + token["height"] <= at["y"], "the token stays in sight above it"
    page.wait_for_timeout(200)
    assert visitor.violations() == []
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "no sideways scrolling"
    page.tap(".sd-header h1")
    assert panel.is_hidden()
    assert visitor.errors == []
    page.close()


def test_a_race_can_be_inspected_while_it_runs(browser: Any, fake_app: Any) -> None:
    visitor = Visitor(browser, fake_app(pace=1.0)[0], reduced_motion="reduce").ready()
    page = visitor.page
    visitor.run("hello", max_new_tokens=400)
    visitor.phase("running")
    page.wait_for_function("document.querySelectorAll('.sd-speculative .sd-text .a').length > 3")
    page.locator(".sd-speculative .sd-text .a").first.click()
    assert "were not recorded" in visitor.text(".sd-i-rule"), "a number that was not recorded is not invented"
    last = page.evaluate("document.querySelector('.sd-race').view.race.rounds.speculative.length - 1")
    page.evaluate("at => document.querySelector('.sd-race').view.inspect('speculative', at)", last)
    page.wait_for_selector("[aria-label='Next round']:not([disabled])")
    page.keyboard.press("Escape")
    assert page.locator(".sd-inspector").is_hidden()
    held = page.evaluate(TOKENS)
    page.wait_for_function(f"{TOKENS} > {held + 12}")
    assert page.get_attribute(".sd-race", "data-phase") == "running", "Escape closes what is open first"
    page.keyboard.press("Escape")
    visitor.phase("done", 20)
    page.locator(".sd-speculative .sd-text .a").first.click()
    page.click("#sd-clear")
    page.wait_for_selector(".sd-inspector", state="hidden")
    assert visitor.errors == []
    page.close()


# The timeline


def test_the_timeline_zooms_and_opens_the_round_that_is_pressed(browser: Any, bare: str) -> None:
    visitor = Visitor(browser, bare, width=1440, height=1200, reduced_motion="reduce")
    page, bounds = visitor.page, "document.querySelector('.sd-race').view.timeline.bounds()"
    state(visitor, "ended")
    trace = SCENES["code"]
    whole = [0, max(r.clock for r in trace.rounds)]
    assert page.evaluate(bounds) == whole
    box = page.locator(".sd-t-box").bounding_box()

    def press(lane: str, seconds: float) -> None:
        """Presses the canvas where this lane is at this time, of which the left 84 pixels are its names."""
        a, b = page.evaluate(bounds)
        x = box["x"] + 84 + (seconds - a) / (b - a) * (box["width"] - 84)
        page.mouse.click(x, box["y"] + (20 if lane == BASELINE else 58))

    for lane, index in ((SPECULATIVE, 30), (BASELINE, 120)):
        r = trace.lane(lane)[index]
        page.focus(".sd-t-box")
        page.keyboard.press("0")
        for _ in range(3):
            page.keyboard.press("+")
        page.evaluate(
            "([a, b]) => document.querySelector('.sd-race').view.timeline.show(a, b)", [r.clock - 0.2, r.clock + 0.2]
        )
        before = page.evaluate(bounds)
        assert before[1] - before[0] == pytest.approx(0.4)
        press(lane, r.clock - r.seconds / 2)
        assert visitor.text(".sd-i-title") == f"{'Round' if lane == SPECULATIVE else 'Pass'} {index}"
        page.keyboard.press("Escape")
        box = page.locator(".sd-t-box").bounding_box()
    page.click("[aria-label='Show the whole race']")
    assert page.evaluate(bounds) == whole
    page.mouse.move(box["x"] + 300, box["y"] + 40)
    page.keyboard.down("Control")
    page.mouse.wheel(0, -300)
    page.keyboard.up("Control")
    page.wait_for_function(f"(([a, b]) => b - a < 0.5 * {whole[1]})({bounds})")
    page.focus(".sd-t-box")
    for key in ("Home", "ArrowDown", "ArrowRight"):
        page.keyboard.press(key)
    told = page.get_attribute(".sd-t-box", "aria-valuetext")
    first = trace.lane(SPECULATIVE)[1]
    assert told.startswith("Speculative, round 1: ") and f"{1000 * first.verify_seconds:.2f} ms" in told
    assert told in visitor.text(".sd-t-says")
    page.keyboard.press("Enter")
    assert visitor.text(".sd-i-title") == "Round 1" and visitor.errors == []
    page.close()
