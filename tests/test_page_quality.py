# ruff: noqa: F811 (fixtures of another file are imported, and named again where they are asked for)
"""What holds in every state of the page: axe finds nothing serious, keys reach all, names are told, nothing moves.

A state of the page is one entry of `STATES`, a function which brings a visitor's page there. The matrix of states and
settings of the browser is under the marker `long`; one page of each kind is in the default suite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import page_budget
import pytest
from test_branch import small  # noqa: F401
from test_browser import CHROMIUM, Visitor, browser, fake_app, served, serving  # noqa: F401

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")]


def idle(visitor: Visitor) -> None:
    visitor.page.wait_for_selector(".sd-race[data-recording]")
    visitor.page.click(".sd-pause")


def running(visitor: Visitor) -> None:
    visitor.run("hello")
    visitor.phase("running")
    visitor.page.wait_for_selector(".sd-speculative .sd-text .a")


def done(visitor: Visitor) -> None:
    running(visitor)
    visitor.page.keyboard.press("Escape")
    visitor.phase("done")
    visitor.page.wait_for_selector('[data-plot="rate"][data-state="drawn"] .main-svg')
    visitor.page.wait_for_selector("#sd-download:not([disabled])")


def inspector(visitor: Visitor) -> None:
    done(visitor)
    visitor.page.locator(".sd-speculative .sd-text .a").first.click()
    visitor.page.wait_for_selector(".sd-inspector h2")


def error(visitor: Visitor) -> None:
    visitor.page.click("#sd-run")
    visitor.page.wait_for_selector("#sd-note p")


def queue(visitor: Visitor) -> None:
    address = visitor.page.url.split("?")[0]
    first = Visitor(visitor.page.context.browser, address).ready()
    visitor.page.on("close", lambda _: first.page.close())
    running(first)
    visitor.page.fill("#sd-prompt textarea", "me too")
    visitor.page.click("#sd-run")
    visitor.page.wait_for_selector("#sd-status .sd-waits", state="visible")


def pressed(
    button: str, shows: str, before: Callable[[Visitor], None] = lambda visitor: None
) -> Callable[[Visitor], None]:
    """Brings a page to where a press on `button` shows an element, from the state `before`."""

    def reach(visitor: Visitor) -> None:
        before(visitor)
        visitor.page.click(button)
        visitor.page.wait_for_selector(shows, state="visible")

    return reach


def over(visitor: Visitor) -> None:
    if not visitor.page.is_visible("#sd-max-new-tokens input"):  # folded on a phone
        visitor.page.click("#sd-settings > button")
    visitor.run("def fair(shares):", max_new_tokens=24)
    visitor.phase("done")
    visitor.page.wait_for_selector(".sd-b-draft:not([disabled])")


def person(visitor: Visitor) -> None:
    over(visitor)
    visitor.page.click(".sd-b-draft")
    visitor.page.fill(".sd-person textarea", "abcd")
    visitor.page.keyboard.press("Enter")
    visitor.page.wait_for_selector(".sd-p-round b")


def branch(visitor: Visitor) -> None:
    over(visitor)
    visitor.page.locator(".sd-baseline .sd-text .t").nth(5).click()
    visitor.page.locator(".sd-i-picks button").first.click()
    visitor.page.wait_for_selector(".sd-b-list button[aria-pressed=true] >> nth=0", state="visible")
    visitor.phase("done")
    visitor.page.wait_for_selector(".sd-b-list button:not([disabled])")


# Whatever else the page can show, one line each.
STATES: dict[str, Callable[[Visitor], None]] = {
    "idle": idle,
    "running": running,
    "done": done,
    "inspector open": inspector,
    "error": error,
    "queue": queue,
    "lab": pressed("button[role=tab]:has-text('Exactness lab')", "#sd-lab-run"),
    "tour": pressed(".sd-tour-open", ".sd-tour .sd-tour-next", done),
    "share": pressed(".sd-share button:text-is('Share')", ".sd-share button:has-text('Copy link')", done),
    "pinned": pressed(".sd-pin", ".sd-pins-table tbody tr", done),
    "does it pay": pressed("button[role=tab]:has-text('Does it pay?')", "#sd-pays-run"),
}
# Those that need a model: a tiny pair of random weights.
ASKING: dict[str, Callable[[Visitor], None]] = {"person drafts": person, "branch": branch}
SETTINGS: dict[str, dict[str, Any]] = {
    "light, wide": {"width": 1440},
    "dark, wide": {"width": 1440, "theme": "dark"},
    "light, phone": {"width": 390, "has_touch": True},
    "dark, phone": {"width": 390, "theme": "dark", "has_touch": True},
    "320 px": {"width": 320},
    "forced colours": {"width": 1280, "forced_colors": "active"},
    "reduced motion": {"width": 1280, "reduced_motion": "reduce"},
}
FITS = "document.documentElement.scrollWidth <= window.innerWidth"
# what moves although motion is unwanted
MOVING = """() => document.getAnimations()
  .filter((a) => a.playState === "running" && a.effect.target.closest(".gradio-container"))
  .map((a) => a.effect.target.className + " " + (a.animationName || a.transitionProperty))"""
# controls that can be seen; terms and drawings are told from the text around them by nothing but the pointer
CONTROLS = """() => [...document.querySelectorAll("button, input, select, textarea, [role=slider]")]
  .filter((e) => e.checkVisibility({ visibilityProperty: true, opacityProperty: true }) && e.getClientRects().length
    && !e.matches(".sd-how, .sd-term, .sd-t-box")).map((e) => e.id || e.className || e.tagName)"""
# in forced colours backgrounds are gone: buttons that have no edge
EDGES = """() => [...document.querySelectorAll("#sd-run, #sd-clear, .sd-pick, .sd-chip, .sd-i-head button:not(.sd-tip-close), .sd-t-zoom button")]
  .filter((e) => e.getClientRects().length && (getComputedStyle(e).borderTopStyle === "none" || parseFloat(getComputedStyle(e).borderTopWidth) < 1))
  .map((e) => e.id || e.className)"""  # noqa: E501


@pytest.mark.long
@pytest.mark.parametrize("setting", SETTINGS)
def test_every_state_in_every_setting(browser: Any, fake_app: Any, small: tuple[str, Any], setting: str) -> None:
    for name, reach in (STATES | ASKING).items():
        url = small[0] if name in ASKING else fake_app(pace=0.4, context=4000)[0]
        options = dict(SETTINGS[setting])
        visitor = Visitor(browser, url, **options).ready()
        page, where = visitor.page, f"{name}, {setting}"
        reach(visitor)
        page.wait_for_timeout(400)  # colours of buttons change slowly
        assert visitor.violations() == [], where
        assert page.evaluate(FITS), f"{where}: no sideways scrolling"
        if "reduced_motion" in options:
            assert page.evaluate(MOVING) == [], where
        if "forced_colors" in options:
            assert page.evaluate(EDGES) == [], where
        assert visitor.errors == [] and visitor.outside == [], where
        page.close()


@pytest.mark.long
def test_paper_shows_no_controls_in_any_state(browser: Any, fake_app: Any, small: tuple[str, Any]) -> None:
    for name, reach in (STATES | ASKING).items():
        url = small[0] if name in ASKING else fake_app(pace=0.4, context=4000)[0]
        visitor = Visitor(browser, url).ready()
        reach(visitor)
        visitor.page.emulate_media(media="print")
        assert visitor.page.evaluate(CONTROLS) == [], name
        visitor.page.close()


# Names as a screen reader gets them: controls of these roles, and those of them that have none.
ROLES = {
    "button",
    "link",
    "textbox",
    "slider",
    "checkbox",
    "combobox",
    "tab",
    "radio",
    "spinbutton",
    "dialog",
    "img",
}


def tree(visitor: Visitor) -> list[tuple[str, str]]:
    """Role and name of everything in the accessibility tree that is not ignored."""
    session = visitor.page.context.new_cdp_session(visitor.page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    session.detach()
    return [
        (str(n.get("role", {}).get("value")), str(n.get("name", {}).get("value", "")))
        for n in nodes
        if not n.get("ignored")
    ]


def tab_to(visitor: Visitor, selector: str, most: int = 60) -> None:
    """Presses Tab until what matches has the focus."""
    for _ in range(most):
        if visitor.page.evaluate("s => document.activeElement.matches(s)", selector):
            return
        visitor.page.keyboard.press("Tab")
    raise AssertionError(f"{selector} is not reached by Tab")


def test_keys_alone_go_from_the_prompt_to_a_round_and_back_and_everything_has_a_name(
    browser: Any, fake_app: Any
) -> None:
    visitor = Visitor(browser, fake_app()[0], width=320, reduced_motion="reduce").ready()
    page, keys = visitor.page, visitor.page.keyboard
    tab_to(visitor, "#sd-prompt textarea")
    keys.type("hello")
    tab_to(visitor, "#sd-run")
    keys.press("Enter")
    visitor.phase("done")
    assert "The race is over" in page.inner_text(".sd-sr")
    tab_to(visitor, ".sd-speculative .sd-text")
    keys.press("Home")
    while not page.evaluate("document.querySelector('.sd-speculative .sd-text .cur')?.matches('.a')"):
        keys.press("ArrowRight")
    assert "accepted" in page.inner_text(".sd-sr"), "the token under the keys is read out"
    keys.press("Enter")
    page.wait_for_selector(".sd-inspector h2")
    assert page.evaluate("document.querySelector('.sd-inspector').contains(document.activeElement)")
    first = page.inner_text(".sd-inspector h2")
    keys.press("ArrowRight")
    assert page.inner_text(".sd-inspector h2") != first
    named = tree(visitor)
    assert [(role, name) for role, name in named if role in ROLES and not name.strip()] == []
    assert ("dialog", page.inner_text(".sd-inspector h2")) in named
    assert {"Baseline output. Arrow keys walk through the tokens.", "Recordings", "Close"} <= {n for _, n in named}
    assert page.evaluate(MOVING) == [], "nothing moves where motion is unwanted"
    assert page.evaluate(FITS), "no sideways scrolling at 320 px"
    keys.press("Escape")
    assert page.is_hidden(".sd-inspector")
    assert page.evaluate("document.activeElement.matches('.sd-speculative .sd-text')"), "the focus is back in the pane"
    assert visitor.errors == []
    page.close()


@pytest.fixture(scope="module")
def fast() -> Iterator[str]:
    """The address of a page that replays a long synthetic race quickly."""
    source = page_budget.replayed(page_budget.synthetic(400), 1600)
    with serving(lambda _: source) as url:
        yield url


@pytest.mark.parametrize("width", [390, pytest.param(1440, marks=pytest.mark.long)])
def test_nothing_moves_at_load_or_in_a_race_and_the_page_is_small(browser: Any, fast: str, width: int) -> None:
    page = browser.new_page(viewport={"width": width, "height": 844})
    page.add_init_script(page_budget.SHIFTS)
    wire = page_budget.Wire(page)
    page.goto(fast)
    page.wait_for_selector("#sd-run:not([disabled])")
    page.wait_for_selector(".sd-speculative .sd-text .t >> nth=8")
    page.wait_for_function("window.Plotly")
    loaded = page_budget.shifts(page)
    page.click("#sd-run")
    page.wait_for_function("document.body.dataset.sdPhase === 'running'")
    page.wait_for_function("document.body.dataset.sdPhase === 'done'")
    page.wait_for_selector('[data-plot="model"][data-state="drawn"] .main-svg')
    raced = page_budget.shifts(page)
    assert loaded.all < 0.05 and raced.all < 0.05, (loaded, raced)
    assert 200_000 < sum(wire.sizes.values()) < 400_000
    page.close()
