"""The page in Firefox and in WebKit: it loads, plays a recording, races, and opens a round by the keyboard.

Firefox is driven by Mozilla's own client (package marionette-driver), WebKit by WebKitWebDriver (Debian:
webkit2gtk-driver) through the package selenium, on a display of Xvfb where there is none. Each is skipped where
something of this is missing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from glob import glob
from typing import Any

import pytest
from test_browser import free_port, serving
from ui_fakes import FakeSource, fake_load

pytestmark = [pytest.mark.long, pytest.mark.browser]

FIREFOX = next(filter(None, map(shutil.which, ("firefox-esr", "firefox"))), None)
MINI_BROWSER = sorted(glob("/usr/lib/*/webkit2gtk-4*/MiniBrowser"))
# what went wrong on the page, from its first script on
LISTEN = """
window.wrong = [];
window.addEventListener("error", (e) => window.wrong.push(String(e.message)));
window.addEventListener("unhandledrejection", (e) => window.wrong.push(String(e.reason)));
"""
WALK = """
const pane = document.querySelector(".sd-speculative .sd-text");
const press = (key) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
pane.focus();
press("Home");
for (let i = 0; i < 99 && !pane.querySelector(".cur.a"); i++) press("ArrowRight");
press("Enter");
"""  # noqa: E501


@contextmanager
def firefox() -> Iterator[Any]:
    """A function that evaluates a script in Firefox, and one that opens an address."""
    driver = pytest.importorskip("marionette_driver.marionette", reason="needs the package marionette-driver")
    if FIREFOX is None:
        pytest.skip("no Firefox")
    client = driver.Marionette(bin=FIREFOX, headless=True, port=free_port(), gecko_log=os.devnull)
    client.start_session()
    try:
        client.set_window_rect(width=1280, height=900)
        yield client.navigate, lambda script: client.execute_script(script, sandbox=None)
    finally:
        client.cleanup()


@contextmanager
def webkit() -> Iterator[Any]:
    """As `firefox`, in WebKitGTK's MiniBrowser."""
    selenium = pytest.importorskip("selenium.webdriver", reason="needs the package selenium")
    if shutil.which("WebKitWebDriver") is None or not MINI_BROWSER:
        pytest.skip("no WebKitWebDriver or no MiniBrowser")
    display = None
    if not os.environ.get("DISPLAY"):
        if shutil.which("Xvfb") is None:
            pytest.skip("no display and no Xvfb")
        display = subprocess.Popen(["Xvfb", ":97", "-screen", "0", "1400x1000x24"], stderr=subprocess.DEVNULL)
        os.environ["DISPLAY"] = ":97"
        time.sleep(1)
    try:
        options = selenium.WebKitGTKOptions()
        options.binary_location = MINI_BROWSER[0]
        options.add_argument("--automation")
        driver = selenium.WebKitGTK(options, selenium.WebKitGTKService(shutil.which("WebKitWebDriver")))
        try:
            driver.set_window_size(1280, 900)
            yield driver.get, driver.execute_script
        finally:
            driver.quit()
    finally:
        if display:
            display.terminate()
            del os.environ["DISPLAY"]


def until(evaluate: Any, condition: str, seconds: float = 60) -> None:
    """Waits until a JavaScript expression holds."""
    end = time.monotonic() + seconds
    while not evaluate(f"return Boolean({condition})"):
        assert time.monotonic() < end, condition
        time.sleep(0.1)


@pytest.mark.parametrize("started", [firefox, webkit])
def test_the_page_works(started: Any) -> None:
    with serving(fake_load(FakeSource())) as url, started() as (go, evaluate):
        go(url)
        evaluate(LISTEN)
        until(evaluate, "document.querySelector('.sd-race')?.dataset.recording === 'playing'")
        until(evaluate, "document.querySelectorAll('.sd-baseline .sd-text .t').length > 8")
        until(evaluate, "document.querySelector('#sd-run:not([disabled])')")
        evaluate(
            "const t = document.querySelector('#sd-prompt textarea'); t.value = 'hello';"
            "t.dispatchEvent(new Event('input', { bubbles: true }));"
        )
        time.sleep(0.3)
        evaluate("document.querySelector('#sd-run').click()")
        until(evaluate, "document.body.dataset.sdPhase === 'done'")
        panes = evaluate(
            "return ['baseline', 'speculative'].map(lane =>"
            " [...document.querySelectorAll(`.sd-${lane} .sd-text .t:not(.r)`)].map(t => t.textContent).join(''))"
        )
        assert panes[0] == panes[1] and len(panes[0]) > 500
        assert evaluate("return document.querySelector('[data-k=identical]').textContent") == "✓ identical"
        until(evaluate, "document.querySelector('[data-plot=model][data-state=drawn] .main-svg')")
        evaluate(WALK)
        until(evaluate, "/^Round \\d+$/.test(document.querySelector('.sd-inspector h2')?.textContent)")
        assert evaluate("return document.documentElement.scrollWidth <= window.innerWidth"), "no sideways scrolling"
        assert evaluate("return window.wrong") == []
