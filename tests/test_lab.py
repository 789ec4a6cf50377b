"""The exactness lab in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from test_browser import FALLS, Visitor, browser, pytestmark, serving  # noqa: F401
from ui_fakes import FakeSource, fake_load

LAB = "button[role=tab]:has-text('Exactness lab')"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving(fake_load(FakeSource())) as url:
        yield url


def opened(browser: Any, url: str, **options: Any) -> Visitor:  # noqa: F811
    visitor = Visitor(browser, url, **options).ready()
    visitor.page.click(LAB)
    visitor.page.wait_for_selector("#sd-lab-run", state="visible")
    return visitor


def phase(visitor: Visitor, name: str) -> None:
    visitor.page.wait_for_selector(f'.sd-test[data-phase="{name}"]', timeout=180_000)


@pytest.mark.parametrize(("theme", "width"), [("light", 1440), ("dark", 390)])
def test_an_exact_rule_runs_and_the_broken_one_is_refuted(
    browser: Any,  # noqa: F811
    address: str,
    theme: str,
    width: int,
) -> None:
    visitor = opened(browser, address, width=width, theme=theme)
    page = visitor.page
    page.wait_for_timeout(300)
    assert visitor.violations() == []
    page.fill("#sd-lab-seeds input[type=number]", "500")
    page.focus("#sd-lab-run")
    page.evaluate(FALLS)
    page.keyboard.press("Enter")
    phase(visitor, "done")
    said = page.inner_text(".sd-test-verdict")
    assert said.startswith("Cannot tell.") and "Too few texts" in said
    assert page.inner_text('[data-k="counts"]').endswith("500 of 500")
    assert page.inner_text('[data-k="family"]') == "1 %" and page.inner_text('[data-k="level"]') == "0.05 %"
    assert visitor.count(".sd-cell") == 27 and visitor.count(".sd-cell.sd-off") == 0
    page.wait_for_selector("#sd-lab-run", state="visible")
    page.wait_for_function("document.activeElement.id === 'sd-lab-run'")
    assert page.evaluate("window.fell") == 0, "the focus went from Run to Stop and back"
    page.click("#sd-lab-broken input")
    page.wait_for_selector("#sd-lab-rule input[disabled]")
    page.click("#sd-lab-run")
    page.wait_for_selector('.sd-test[data-phase="done"] [data-verdict="refuted"]', timeout=180_000)
    assert visitor.count(".sd-cell.sd-off") > 3
    page.click(".sd-test-table summary")
    observed = page.eval_on_selector_all(".sd-test-table tbody tr td:nth-child(2)", "all => all.map(e => +e.innerText)")
    assert sum(observed) == 500
    page.wait_for_timeout(300)
    assert visitor.violations() == []
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "no sideways scrolling"
    assert visitor.errors == [] and visitor.outside == []
    page.close()


def test_stop_ends_a_test_without_a_verdict_and_frees_the_device(browser: Any, address: str) -> None:  # noqa: F811
    visitor = opened(browser, address)
    page = visitor.page
    page.fill("#sd-lab-seeds input[type=number]", "20000")
    page.click("#sd-lab-run")
    phase(visitor, "running")
    page.wait_for_function("!document.querySelector('.sd-test [data-k=counts]').innerText.includes(' 0 of')")
    page.click("button[role=tab]:has-text('Race')")
    page.fill("#sd-prompt textarea", "hello")
    page.click("#sd-run")
    page.wait_for_selector(".sd-waits", state="visible")  # the test has the device
    page.click(LAB)
    page.click("#sd-lab-stop")
    phase(visitor, "stopped")
    assert page.inner_text(".sd-test-verdict").startswith("Cannot tell: stopped after")
    page.click("button[role=tab]:has-text('Race')")
    visitor.phase("done")
    assert visitor.errors == []
    page.close()
