"""The score board in a real browser: what it says of a speedup, and how sure it is of it."""

from __future__ import annotations

from typing import Any

import pytest
from test_browser import Visitor, browser, fake_app, pytestmark, served  # noqa: F401  fixtures of the page

COLOUR = "getComputedStyle(document.querySelector('.sd-speedup')).color"
STATES = {
    "faster": ({}, "faster than the baseline"),
    "slower": ({"hit": 0.0}, "slower than the baseline"),
    "no difference": ({"hit": 0.28}, "no measurable difference"),
    "nothing drafted": ({"silent": True}, "nothing was drafted"),
}


def test_the_headline_says_no_more_than_it_knows(browser: Any, fake_app: Any) -> None:  # noqa: F811
    colours = {}
    for verdict, (traits, words) in STATES.items():
        visitor = Visitor(browser, fake_app(**traits)[0]).ready()
        page = visitor.page
        visitor.run("hello", max_new_tokens=200)
        visitor.phase("done")
        assert words in visitor.text('[data-k="verdict"]')
        others = {other for other in ("faster", "slower", "no measurable", "nothing") if not words.startswith(other)}
        assert not any(other in visitor.text('[data-k="verdict"]') for other in others)
        assert words in page.inner_text(".sd-sr"), "and says so"
        low, high = (float(x) for x in visitor.text('[data-k="interval"]').split("×")[0].split("–"))
        assert low < float(visitor.text('[data-k="speedup"]').rstrip("×")) < high
        if verdict != "nothing drafted":
            assert ("faster", "no difference", "slower")[(low <= 1) + (high < 1)] == verdict
        assert visitor.text('[data-k="end_to_end"]').endswith("×")
        assert "–" in visitor.text('[data-k="end_to_end_interval"]')
        assert not page.locator(".sd-loops").is_visible()
        colours[verdict] = page.evaluate(COLOUR)
        assert visitor.errors == []
        page.close()
    assert len(set(colours.values())) == 4


def test_the_interval_explains_itself(browser: Any, fake_app: Any) -> None:  # noqa: F811
    visitor = Visitor(browser, fake_app()[0], width=390).ready()
    page = visitor.page
    assert not page.locator(".sd-how").is_visible(), "nothing to explain yet"
    visitor.run("hello")
    visitor.phase("done")
    tip = page.locator("#sd-how")
    assert not tip.is_visible()
    page.locator(".sd-how").focus()
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Tab")
    assert tip.is_visible() and "Run-to-run noise comes on top" in tip.inner_text()
    box = tip.bounding_box()
    assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= 390
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    page.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_looping_text_is_flagged(browser: Any, fake_app: Any, theme: str) -> None:  # noqa: F811
    visitor = Visitor(browser, fake_app(texts=[" a", " lost", " soul", ",\n"])[0], theme=theme).ready()
    visitor.run("hello", max_new_tokens=120)
    visitor.phase("done")
    assert "flatters the drafter" in visitor.text(".sd-loops")
    assert "loops" in visitor.page.inner_text(".sd-sr")
    visitor.page.wait_for_selector('[data-plot="model"]:is([data-state="drawn"], [data-state="none"])')
    visitor.page.wait_for_selector("#sd-download:not([disabled])")
    assert visitor.violations() == [] and visitor.errors == []
    visitor.page.close()
