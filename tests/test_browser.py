"""The app in a real browser: once on the embedded model, once on a fake source that says what a test needs it to say.

Needs Chromium (its path in CHROMIUM, else the usual ones) and the package playwright; skipped without.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ui_fakes import FakeSource, fake_load

from spec_decode.events import BASELINE, Promises, Trace
from spec_decode.request import Request
from spec_decode.settings import Settings
from spec_decode.sources import Source
from spec_decode.sources.replay import ReplaySource
from spec_decode.ui.terms import TERMS

playwright = pytest.importorskip("playwright.sync_api")

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
EVIL = [
    "<img src=x onerror=\"document.title='owned'\">",
    "</span>",
    "<script>document.title='owned'</script>",
    " fine",
    "\n",
    "{{value}}",
    "${1+1}",
]
# makes the next six batches arrive without their rounds
LOSE_SIX = """() => {
  const parse = JSON.parse;
  window.dropped = 0;
  JSON.parse = (...args) => {
    const value = parse(...args);
    if (!value || !value.rounds || value.phase !== "running" || window.dropped === 6) return value;
    window.dropped++;
    return { run: value.run, from: 0, rounds: [] };
  };
}"""

FOCUSED = """() => {
  const e = document.activeElement;
  return e.id || (e.tagName + " " + (e.getAttribute("aria-label") || e.textContent).slice(0, 30)).trim();
}"""
# what the badge said about the texts while the speculative pane was empty
EARLY = """() => {
  window.early = new Set();
  const race = document.querySelector(".sd-race"), badge = race.querySelector('[data-k="identical"]');
  const look = () => { if (!race.querySelector(".sd-speculative .sd-text .t")) window.early.add(badge.textContent); };
  new MutationObserver(look).observe(race, { subtree: true, childList: true, attributes: true });
}"""
# how many races have ended, however short they were
ENDS = """() => {
  window.ends = 0;
  const count = (all) => all.forEach((change, i) => {
    const now = i + 1 < all.length ? all[i + 1].oldValue : document.body.dataset.sdPhase;
    window.ends += change.oldValue === "running" && now !== "running";
  });
  new MutationObserver(count).observe(document.body, { attributeFilter: ["data-sd-phase"], attributeOldValue: true });
}"""
FALLS = """() => {
  window.fell = 0;
  setInterval(() => { window.fell += document.activeElement === document.body; }, 60);
}"""
MARKS = """() => ["a", "r", "c", "b", "t0"].map((role) => {
  const style = getComputedStyle(document.querySelector(".sd-text ." + role));
  return style.textDecorationLine + " " + style.textDecorationStyle;
})"""
# how much of a lane's text is out of sight within its pane, and by how much its last token stands out below the lane
CUT = """e => {
  const pane = e.querySelector(".sd-text"), last = [...pane.querySelectorAll(".t")].at(-1);
  const bottom = (node) => node.getBoundingClientRect().bottom;
  return [pane.scrollHeight - pane.clientHeight, bottom(last) - bottom(e)];
}"""
# the product of the opacities over an element and all around it
OPACITY = "e => { let o = 1; for (; e; e = e.parentElement) o *= getComputedStyle(e).opacity; return o; }"
# the outline of the element with the focus, or of the frame that Gradio draws around it
RING = """() => {
  for (let e = document.activeElement, i = 0; e && i < 4; e = e.parentElement, i++) {
    const s = getComputedStyle(e);
    if (s.outlineStyle === "solid" && parseFloat(s.outlineWidth) >= 2) {
      return s.outlineColor !== getComputedStyle(document.body).backgroundColor;
    }
  }
  return false;
}"""
SPOKEN = "e => [...e.querySelectorAll('.t:not(.r)')].map(t => t.textContent).join('')"

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def real_app() -> Iterator[str]:
    """`python app.py` on the embedded model."""
    port = free_port()
    process = subprocess.Popen([sys.executable, "app.py", "--port", str(port)], cwd=ROOT)
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.terminate()
        process.wait(20)


@contextmanager
def serving(load: Any, recordings: bool = True) -> Iterator[str]:
    """The address of a page over the source that `load` returns."""
    from spec_decode.ui import Engine, build, launch_options

    engine = Engine(load)
    page = build(engine, recordings=recordings)
    _, url, _ = page.launch(server_port=free_port(), prevent_thread_lock=True, **launch_options())
    engine.start()
    yield url
    page.close()


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, FakeSource]]:
    source = FakeSource()
    with serving(fake_load(source)) as url:
        yield url, source


@pytest.fixture
def fake_app(served: tuple[str, FakeSource]) -> Any:
    """A function that lends the page of a fake source with these traits: `fake_app(pace=1)` is (address, source)."""
    url, source = served

    def lend(**traits: Any) -> tuple[str, FakeSource]:
        vars(source).update(vars(FakeSource(**traits)))
        return url, source

    return lend


class Visitor:
    """A page that remembers every console error and every request that left this machine."""

    def __init__(
        self, browser: Any, url: str, width: int = 1280, height: int = 900, theme: str = "light", **options: Any
    ) -> None:
        """`before` is a script to run first; the other `options` are those of a browser context."""
        self.errors: list[str] = []
        self.outside: list[str] = []
        before = options.pop("before", None)
        self.page = browser.new_page(viewport={"width": width, "height": height}, **options)
        if before:
            self.page.add_init_script(before)
        self.page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        self.page.on("pageerror", lambda e: self.errors.append(str(e)))
        self.requests: list[str] = []
        self.page.on("request", self._request)
        self.page.goto(f"{url}?__theme={theme}")

    def _request(self, request: Any) -> None:
        self.requests.append(request.url)
        if not request.url.startswith(("data:", "blob:", "http://127.0.0.1:", "http://localhost:")):
            self.outside.append(request.url)

    def ready(self) -> Visitor:
        self.page.wait_for_selector("#sd-run:not([disabled])", timeout=180_000)
        return self

    def run(self, prompt: str, **numbers: float) -> None:
        for name, value in numbers.items():
            self.page.fill(f"#sd-{name.replace('_', '-')} input", str(value))
        self.page.fill("#sd-prompt textarea", prompt)
        self.page.click("#sd-run")

    def phase(self, name: str, timeout: float = 120) -> None:
        self.page.wait_for_selector(f'.sd-race[data-phase="{name}"]', timeout=1000 * timeout)

    def text(self, selector: str) -> str:
        return str(self.page.inner_text(selector))

    def focused(self) -> str:
        """The id of what has the focus, else its tag and label."""
        return str(self.page.evaluate(FOCUSED))

    def choose(self, control: str, option: str) -> None:
        """Picks an option of a drop-down."""
        self.page.click(f"{control} input")
        self.page.click(f'{control} [role="option"] >> text="{option}"')

    def count(self, selector: str) -> int:
        return int(self.page.locator(selector).count())

    def violations(self) -> list[str]:
        """axe-core's serious and critical findings, as "rule: selector"."""
        from axe_playwright_python.sync_playwright import Axe

        found = Axe().run(self.page).response["violations"]
        return [
            f"{v['id']}: {node['target']}"
            for v in found
            if v["impact"] in ("serious", "critical")
            for node in v["nodes"]
        ]


STATUS_WHEN_DONE = """() => {
  const shown = (b) => getComputedStyle(b).display !== "none";
  const said = () => [...document.querySelectorAll("#sd-status b")].filter(shown).map((b) => b.textContent);
  const look = () => { if (document.body.dataset.sdPhase === "done") window.said = said(); };
  new MutationObserver(look).observe(document.body, { attributeFilter: ["data-sd-phase"] });
}"""


def test_a_race_of_the_embedded_model(browser: Any, real_app: str) -> None:
    visitor = Visitor(browser, real_app)
    page = visitor.page
    page.locator("#sd-main").get_by_text("Baseline").first.wait_for()  # before the model is
    visitor.ready()
    page.evaluate(STATUS_WHEN_DONE)
    visitor.run("Copy this line twice: <img src=x onerror=\"document.title='owned'\"> </span>", max_new_tokens=40)
    visitor.phase("running", 60)
    visitor.phase("done")
    assert page.evaluate("window.said") in (["Racing."], ["Ready."])
    for lane in ("baseline", "speculative"):
        assert 1 <= int(visitor.text(f'[data-k="{lane}.tokens"]')) <= 40
        assert visitor.text(f".sd-{lane} .sd-text").strip()
        assert float(visitor.text(f'[data-k="{lane}.rate"]')) > 0
    assert visitor.text('[data-k="identical"]') == "✓ identical"
    assert visitor.count(".sd-speculative .sd-text .a") > 0, "prompt lookup finds the line it copies"
    assert visitor.count(".sd-text img") == 0 and page.title() == "Spec Decode"
    page.wait_for_selector('[data-plot="model"][data-state="drawn"] .main-svg')
    assert visitor.count(".main-svg") >= 4
    with page.expect_download() as download:
        page.click("#sd-download")
    trace = Trace.from_json(Path(download.value.path()).read_text(encoding="utf-8"))
    assert trace.identical and len(trace.token_ids("baseline")) == int(visitor.text('[data-k="baseline.tokens"]'))
    assert visitor.errors == [] and visitor.outside == []
    assert "tiny on purpose" in visitor.text("#sd-status") and "often wrong" in visitor.text("#sd-status")

    page.click(".sd-chip >> text=numbered steps")
    page.click('#sd-policy >> text="fixed"')  # adaptive drafts as much as pays on the machine: less on a busy one
    page.fill("#sd-max-new-tokens input", "120")
    page.click("#sd-run")
    page.wait_for_selector(".sd-ran >> text=Rewrite these instructions", timeout=30_000)
    visitor.phase("done")
    shown = page.eval_on_selector(".sd-speculative .sd-text", SPOKEN)
    steps = [s.strip() for s in page.input_value("#sd-prompt textarea").split("\n\n")[1].split(".") if s.strip()]
    assert sum(step in shown for step in steps) >= 4, "the answer takes up the steps, which prompt lookup guesses"
    assert visitor.count(".sd-speculative .sd-text .a") > visitor.count(".sd-speculative .sd-text .t:not(.r)") / 3

    visitor.run("Write a long story about a lighthouse.", max_new_tokens=400)
    visitor.phase("running", 60)
    page.wait_for_function("document.querySelectorAll('.sd-baseline .sd-text .t').length > 5")
    page.keyboard.press("Escape")
    visitor.phase("done", 30)
    assert "stopped" in visitor.text(".sd-baseline header")
    assert int(visitor.text('[data-k="baseline.tokens"]')) < 400
    page.wait_for_selector("#sd-run:not([disabled])")
    assert visitor.errors == []
    page.close()


def test_model_output_is_text_never_markup(browser: Any, fake_app: Any) -> None:
    visitor = Visitor(browser, fake_app(texts=EVIL)[0]).ready()
    visitor.run("hello", max_new_tokens=60)
    visitor.phase("done")
    shown = visitor.page.eval_on_selector(".sd-baseline .sd-text", "e => e.textContent")
    assert "".join((EVIL * 9)[:60]) == shown
    assert visitor.count(".sd-text img, .sd-text script") == 0
    assert visitor.page.title() == "Spec Decode" and visitor.errors == []
    visitor.page.close()


def test_two_thousand_tokens_arrive_whole_and_are_walked_by_keys(browser: Any, fake_app: Any) -> None:
    visitor = Visitor(browser, fake_app(context=40_000)[0]).ready()
    page = visitor.page
    visitor.run("hello", max_new_tokens=2000)
    visitor.phase("done")
    assert visitor.count(".sd-baseline .sd-text .t") == 2000
    texts = [
        page.eval_on_selector(
            f".sd-{lane} .sd-text", "e => [...e.querySelectorAll('.t:not(.r)')].map(t => t.textContent).join('')"
        )
        for lane in ("baseline", "speculative")
    ]
    assert texts[0] == texts[1]
    for role in ("a", "r", "c", "b", "t0"):
        assert visitor.count(f".sd-speculative .sd-text .{role}") > 0
    styles = page.evaluate(
        "['a','r','c','b'].map(c => { const s = getComputedStyle(document.querySelector('.sd-text .' + c));"
        " return [s.backgroundColor, s.textDecorationLine + s.textDecorationStyle + s.boxShadow] })"
    )
    assert len({s[0] for s in styles}) == 4 and len({s[1] for s in styles}) == 4, "told apart by colour and by mark"
    assert page.evaluate(
        "(e => e.scrollHeight - e.scrollTop - e.clientHeight < 30)(document.querySelector('.sd-baseline .sd-text'))"
    )

    page.focus(".sd-speculative .sd-text")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    tip = visitor.text(".sd-tip")
    assert "target p" in tip and "round" in tip
    assert "target p" in page.inner_text(".sd-sr")
    page.locator(".sd-speculative .sd-text .a").first.hover()
    assert "draft q" in visitor.text(".sd-tip") and "1 of" in visitor.text(".sd-tip")
    page.uncheck(".sd-toggle input")
    assert not page.locator(".sd-speculative .sd-text .r").first.is_visible()
    assert visitor.errors == []
    page.close()


def test_a_missed_batch_is_fetched(browser: Any, fake_app: Any) -> None:
    visitor = Visitor(browser, fake_app(pace=0.5)[0]).ready()
    visitor.page.evaluate(LOSE_SIX)
    visitor.run("hello", max_new_tokens=80)
    visitor.phase("done")
    visitor.page.wait_for_function("document.querySelectorAll('.sd-baseline .sd-text .t').length === 80")
    assert visitor.page.evaluate("window.dropped") == 6
    visitor.page.close()


def test_bad_settings_and_prompts_are_told_where_they_are(browser: Any, fake_app: Any) -> None:
    visitor = Visitor(browser, fake_app(context=100)[0]).ready()
    page = visitor.page
    visitor.run("hello", top_p=7)
    page.wait_for_selector("#sd-top-p.sd-wrong")
    assert "Top-p must be a number from 0 to 1" in visitor.text("#sd-top-p")
    visitor.run("", top_p=1, max_new_tokens=60)
    page.wait_for_selector("#sd-note p >> text=prompt")
    assert visitor.count("#sd-top-p.sd-wrong") == 0
    visitor.run("word " * 50)
    page.wait_for_selector("#sd-truncate")
    assert "50 tokens" in visitor.text("#sd-note")
    page.click("#sd-truncate")
    visitor.phase("done")
    assert visitor.errors == []
    page.close()


def test_the_second_visitor_waits_and_a_closed_tab_frees_the_device(browser: Any, fake_app: Any) -> None:
    url, source = fake_app(pace=1.0)
    first, second = Visitor(browser, url).ready(), Visitor(browser, url).ready()
    first.run("hello", max_new_tokens=2)
    first.phase("done")
    first.page.wait_for_selector("#sd-run:not([disabled])")
    first.run("hello", max_new_tokens=400)
    first.phase("running")
    second.run("me too", max_new_tokens=4)
    second.page.wait_for_selector("#sd-leave")
    second.page.wait_for_function(
        "document.querySelector('#sd-status').innerText.includes('place 1 of 1 in the queue')"
    )
    assert "result in about" in second.text("#sd-status")
    assert second.page.eval_on_selector("#sd-status .sd-waits", OPACITY) == 1
    assert len(source.races) == 2
    first.page.close()
    second.phase("done", 30)
    assert source.races[1].stopped and source.races[1].closed
    assert second.errors == []
    second.page.close()


def test_leaving_the_queue(browser: Any, fake_app: Any) -> None:
    url, source = fake_app(pace=1.0)
    first, second = Visitor(browser, url).ready(), Visitor(browser, url).ready()
    first.run("hello", max_new_tokens=400)
    first.phase("running")
    second.run("me too", max_new_tokens=4)
    second.page.wait_for_selector("#sd-leave")
    second.page.click("#sd-leave")
    second.page.wait_for_selector("#sd-run:not([disabled])")
    first.page.click("#sd-stop")
    first.phase("done", 20)
    time.sleep(0.5)
    assert len(source.races) == 1
    first.page.close()
    second.page.close()


def test_out_of_memory_is_told_and_the_app_goes_on(browser: Any, fake_app: Any) -> None:
    url, source = fake_app(memory=10)
    visitor = Visitor(browser, url).ready()
    visitor.run("hello", max_new_tokens=40)
    visitor.phase("failed")
    assert "out of memory" in visitor.text("#sd-note")
    assert visitor.count(".sd-baseline .sd-text .t") == 10
    source.memory = None
    visitor.page.wait_for_selector("#sd-run:not([disabled])")
    visitor.run("hello", max_new_tokens=40)
    visitor.phase("done")
    visitor.page.close()


@pytest.mark.parametrize(("theme", "width"), [("light", 1440), ("dark", 390)])
def test_accessible_before_and_after_a_race(browser: Any, fake_app: Any, theme: str, width: int) -> None:
    visitor = Visitor(browser, fake_app()[0], width=width, theme=theme).ready()
    page = visitor.page
    page.wait_for_timeout(300)
    assert visitor.violations() == []
    page.fill("#sd-prompt textarea", "hello")
    page.keyboard.press("Control+Enter")
    visitor.phase("done")
    page.wait_for_selector('[data-plot="model"][data-state="drawn"] .main-svg')
    page.wait_for_selector("#sd-download:not([disabled])")
    page.wait_for_timeout(300)  # its colour changes slowly
    assert visitor.violations() == []
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "no sideways scrolling"
    assert visitor.errors == [] and visitor.outside == []
    page.close()


def test_a_tapped_token_keeps_its_card_until_it_is_dismissed(browser: Any, fake_app: Any) -> None:
    visitor = Visitor(browser, fake_app()[0], width=390, has_touch=True, is_mobile=True).ready()
    page, card = visitor.page, visitor.page.locator(".sd-tip")
    visitor.run("hello")
    visitor.phase("done")
    token = page.locator(".sd-speculative .sd-text .a").first
    ways = [lambda: page.tap(".sd-header h1"), lambda: page.keyboard.press("Escape"), lambda: page.tap(".sd-tip-close")]
    for dismiss in ways:
        token.tap()
        page.wait_for_timeout(150)
        assert card.is_visible() and "draft q" in card.inner_text()
        dismiss()
        card.wait_for(state="hidden", timeout=1000)
        assert not visitor.focused().startswith("BODY") or dismiss is ways[0]
    page.locator('.sd-speculative .sd-text .t >> text="The"').first.tap()
    token.tap()
    assert card.is_visible() and "accepted" in card.inner_text(), "a tap on another token shows that one"
    page.tap("#sd-status .sd-term >> text=int8")
    assert card.is_visible() and TERMS["int8"] in card.inner_text()
    assert visitor.errors == []
    page.close()


def test_a_result_says_what_was_run_and_the_status_which_drafter_is_used(browser: Any, fake_app: Any) -> None:
    url, _ = fake_app(pace=0.3)
    visitor = Visitor(browser, url).ready()
    page = visitor.page
    assert page.is_hidden(".sd-ran")
    page.evaluate(EARLY)
    visitor.choose("#sd-drafter", "mtp")
    page.wait_for_selector("#sd-status >> text=fake-target + mtp on cpu, int8")
    assert TERMS["mtp"] in visitor.text("#sd-drafter")
    page.fill("#sd-temperature input[type=number]", "0.8")
    page.fill("#sd-prompt textarea", "a <b>first</b> prompt")
    page.fill("#sd-max-new-tokens input", "120")
    page.focus("#sd-run")
    page.keyboard.press("Enter")
    visitor.phase("running")
    page.wait_for_function("document.activeElement.id === 'sd-stop'")
    visitor.choose("#sd-drafter", "lookup")
    assert "fake-target + mtp on" in visitor.text("#sd-status"), "the race goes on with the one it began with"
    visitor.phase("done")
    assert visitor.focused() == "INPUT Drafter", "who moved the focus keeps it"
    page.wait_for_selector("#sd-status >> text=fake-target + lookup on")
    page.fill("#sd-prompt textarea", "another")
    page.fill("#sd-temperature input[type=number]", "0")
    ran = visitor.text(".sd-ran")
    for said in (
        "a <b>first</b> prompt",
        "fake-target + mtp on cpu, int8",
        "temperature 0.8",
        "coupled",
        "120",
        "seed 0",
    ):
        assert said in ran
    assert set(page.evaluate("[...window.early]")) <= {"–"}, "no verdict on the texts before there are two"
    page.click("#sd-clear")
    page.wait_for_selector(".sd-ran", state="hidden")
    assert visitor.errors == []
    page.close()


def test_focus_is_never_lost(browser: Any, fake_app: Any) -> None:
    visitor = Visitor(browser, fake_app(context=40, pace=0.3)[0]).ready()
    page = visitor.page
    page.fill("#sd-max-new-tokens input", "20")
    page.fill("#sd-prompt textarea", "word " * 50)
    page.evaluate(FALLS)
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#sd-truncate")
    assert visitor.focused() == "TEXTAREA"
    page.focus("#sd-truncate")
    page.keyboard.press("Enter")
    page.wait_for_function("['sd-stop', 'sd-leave'].includes(document.activeElement.id)")
    visitor.phase("running")
    page.wait_for_function("document.activeElement.id === 'sd-stop'")
    page.keyboard.press("Enter")
    visitor.phase("done")
    page.wait_for_function("document.activeElement.id === 'sd-run'")
    assert page.evaluate("window.fell") == 0
    page.focus("#sd-rule input")
    page.keyboard.press("ArrowDown")
    assert visitor.count("#sd-rule .options") == 1
    page.keyboard.press("Tab")
    page.wait_for_selector("#sd-rule .options", state="detached", timeout=2000)
    assert page.get_attribute("#sd-rule input", "aria-expanded") == "false"
    assert "Temperature" in visitor.focused()
    page.focus("#sd-rule input")
    for key in ("ArrowDown", "ArrowDown", "Enter"):
        page.keyboard.press(key)
    page.wait_for_selector("#sd-rule .options", state="detached", timeout=2000)
    page.wait_for_timeout(150)
    assert visitor.focused() == "INPUT Rule" and page.input_value("#sd-rule input") != "auto"
    page.click("#sd-rule input")
    assert visitor.count("#sd-rule .options") == 1, "a click opens it, though it has the focus already"
    assert visitor.errors == []
    page.close()


def test_whatever_has_the_focus_shows_it(browser: Any, fake_app: Any) -> None:
    visitor = Visitor(browser, fake_app()[0]).ready()
    page = visitor.page
    visitor.run("hello", max_new_tokens=80)
    visitor.phase("done")
    page.wait_for_selector("#sd-download:not([disabled])")
    for theme, forced in [("light", "none"), ("dark", "none"), ("dark", "active")]:
        page.emulate_media(forced_colors=forced)
        page.evaluate("theme => document.body.classList.toggle('dark', theme === 'dark')", theme)
        page.focus("#sd-prompt textarea")
        seen: list[str] = []
        bare: list[str] = []
        while not visitor.focused().startswith("BODY") and len(seen) < 80:
            seen.append(visitor.focused())
            if not page.evaluate(RING):
                bare.append(seen[-1])
            page.keyboard.press("Tab")
        assert bare == [], theme
        assert len(seen) > 25 and "sd-run" in seen and any("API" in name for name in seen)
    assert len(set(page.evaluate(MARKS))) == 5, "forced colours take backgrounds and shadows, and roles stay apart"
    page.close()


def test_copied_text_leaves_out_what_was_rejected(browser: Any, fake_app: Any) -> None:
    visitor = Visitor(browser, fake_app()[0]).ready()
    page = visitor.page
    visitor.run("hello", max_new_tokens=60)
    visitor.phase("done")
    whole = page.eval_on_selector(".sd-speculative .sd-text", SPOKEN)
    assert visitor.count(".sd-speculative .sd-text .r") > 3 and "guess" not in whole

    def copied(select: str) -> str:
        page.evaluate(select)
        page.keyboard.press("Control+c")
        page.fill("#sd-prompt textarea", "")
        page.focus("#sd-prompt textarea")
        page.keyboard.press("Control+v")
        return str(page.input_value("#sd-prompt textarea"))

    page.click(".sd-speculative h2")
    pane = "getSelection().selectAllChildren(document.querySelector('.sd-speculative .sd-text'))"
    assert copied(pane) == whole
    everything = copied("document.activeElement.blur(); getSelection().selectAllChildren(document.body)")
    assert "Speculative" in everything and "guess wrong" not in everything and " guess guess" not in everything
    page.close()


def test_print_shows_both_panes_whole(browser: Any, fake_app: Any) -> None:
    visitor = Visitor(browser, fake_app(context=4000)[0], theme="dark").ready()
    page = visitor.page
    visitor.run("hello", max_new_tokens=900)
    visitor.phase("done")
    page.emulate_media(media="print")
    for lane in ("baseline", "speculative"):
        inside, below = page.eval_on_selector(f".sd-{lane}", CUT)
        assert inside <= 1 and below < 0, f"{lane} is cut off"
    for control in ("#sd-rail", "#sd-download", "footer", ".sd-toggle"):
        assert not page.is_visible(control)
    assert page.is_visible(".sd-ran")
    channels = page.eval_on_selector("body", "e => getComputedStyle(e).backgroundColor.match(/[\\d.]+/g).map(Number)")
    assert min(channels[:3]) > 200, "paper is white, whatever the theme"
    assert page.pdf().count(b"/Type /Page\n") >= 4, "a pane goes on on the next sheet"
    page.close()


def test_terms_explain_themselves_where_they_stand(browser: Any, fake_app: Any) -> None:
    visitor = Visitor(browser, fake_app()[0], theme="dark").ready()
    page, card = visitor.page, visitor.page.locator(".sd-tip")
    visitor.choose("#sd-drafter", "mtp")
    visitor.choose("#sd-rule", "coupled")
    page.wait_for_function(
        "sentence => document.querySelector('#sd-rule').innerText.includes(sentence)", arg=TERMS["coupled"]
    )
    visitor.choose("#sd-rule", "threshold (lossy)")
    page.fill("#sd-temperature input[type=number]", "0.8")
    visitor.run("hello", max_new_tokens=40)
    visitor.phase("done")
    page.wait_for_selector('[data-plot="model"][data-state="drawn"] .main-svg')
    for term in ("mtp", "int8", "KL", "γ"):
        button = page.locator(f".sd-term:visible >> text={term}").first
        button.hover()
        assert card.is_visible() and TERMS[term] in card.inner_text()
        page.mouse.move(2, 2)
        assert card.is_hidden(), "by the pointer it comes and goes"
        page.keyboard.press("Tab")
        button.focus()
        assert card.is_visible() and TERMS[term] in card.inner_text()
        assert button.get_attribute("aria-description") == TERMS[term]
        page.keyboard.press("Enter")
        page.wait_for_timeout(20)
        page.mouse.move(5, 5)
        assert card.is_visible() and TERMS[term] in card.inner_text()
        if term == "KL":
            assert visitor.violations() == []
        page.keyboard.press("Escape")
        assert card.is_hidden() and visitor.focused() == f"BUTTON {term}"
    assert visitor.errors == []
    page.close()


def test_plotly_is_loaded_when_the_page_is_idle_and_told_when_it_cannot_be(browser: Any, fake_app: Any) -> None:
    url, _ = fake_app()
    waits = "window.idle = []; window.requestIdleCallback = (act) => window.idle.push(act);"
    visitor = Visitor(browser, url, before=waits).ready()
    page = visitor.page
    page.wait_for_timeout(1800)
    assert not [url for url in visitor.requests if "plotly" in url], "the page was never idle"
    page.route("**/plotly-basic.min.js", lambda route: route.abort())
    with page.expect_request("**/plotly-basic.min.js"):
        page.evaluate("window.idle.splice(0).forEach(act => act())")
    visitor.run("hello", max_new_tokens=20)
    visitor.phase("done")
    page.wait_for_selector('.sd-plots[data-state="broken"]')
    said = page.eval_on_selector_all(".sd-canvas", "all => all.map(e => getComputedStyle(e, '::after').content)")
    assert said == ['"The figures could not be loaded."'] * 4
    page.unroute("**/plotly-basic.min.js")
    page.wait_for_selector("#sd-run:not([disabled])")
    visitor.run("hello", max_new_tokens=20)
    page.wait_for_selector('[data-plot="model"][data-state="drawn"] .main-svg')
    assert visitor.count(".sd-plots > *") == 4
    page.close()


def test_a_long_prompt_says_how_far_it_is_read_and_stop_works_meanwhile(browser: Any, fake_app: Any) -> None:
    visitor = Visitor(browser, fake_app(chunks=3000, chunk_seconds=0.05)[0]).ready()
    visitor.run("hello")
    visitor.page.wait_for_function(
        "() => /^reading the prompt, [\\d,]+ of 3,000 tokens$/.test("
        "document.querySelector('[data-k=\"baseline.finish\"]').textContent)"
    )
    visitor.page.click("#sd-stop")
    visitor.phase("done", 10)
    assert visitor.text('[data-k="baseline.finish"]') == "stopped" and not visitor.errors


def recorded(**changes: Any) -> Trace:
    race = FakeSource().race(Request("a recorded prompt", Settings(max_new_tokens=40, draft_length=4)))
    list(race)
    return replace(race.trace, **changes)


def replaying(trace: Trace) -> Any:
    source: Source = ReplaySource(trace, speed=10.0)
    return serving(lambda _: source, recordings=False)  # as `app.py --replay` does


def downloaded(page: Any) -> Trace:
    page.wait_for_selector("#sd-run:not([disabled])")
    page.wait_for_selector("#sd-download:not([disabled])")
    with page.expect_download() as download:
        page.click("#sd-download")
    return Trace.from_json(Path(download.value.path()).read_text(encoding="utf-8"))


@pytest.mark.parametrize("width", [1440, 390])
def test_a_recording_is_marked_and_run_plays_it(browser: Any, width: int) -> None:
    trace = recorded()
    with replaying(trace) as url:
        visitor = Visitor(browser, url, width=width).ready()
        page = visitor.page
        page.wait_for_function("document.querySelector('#sd-prompt textarea').value === 'a recorded prompt'")
        assert "Recording." in visitor.text("#sd-status")
        assert "recorded on a fake machine, 2026-01-31 12:00 UTC" in visitor.text("#sd-status")
        for hidden in ("#sd-settings", "#sd-examples", "#sd-clear"):
            assert not page.is_visible(hidden), "what has no effect is not there"
        assert page.is_disabled("#sd-prompt textarea")
        page.evaluate(ENDS)
        for played in (1, 2):
            page.click("#sd-run")
            page.wait_for_function("played => window.ends === played", arg=played)
            assert page.get_attribute(".sd-race", "data-phase") == "done"
            assert page.eval_on_selector(".sd-baseline .sd-text", SPOKEN) == trace.text(BASELINE)
            assert "recorded on a fake machine" in visitor.text(".sd-ran")
            assert visitor.text('[data-k="identical"]') == "✓ identical"
            assert downloaded(page) == trace
        page.wait_for_selector('[data-plot="model"][data-state="drawn"] .main-svg')
        assert visitor.violations() == [] and visitor.errors == []
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        page.close()


def test_the_page_claims_no_more_than_its_source_promises(browser: Any) -> None:
    whole = recorded()
    last = whole.lane(BASELINE)[-1]
    other = replace(last, tokens=(replace(last.tokens[0], id=7, text="!"),))
    rounds = tuple(other if r is last else r for r in whole.rounds)
    for promises, state, words in (
        (Promises(), "differ", ""),
        (Promises(same_text=False, rejected="nothing"), "free", "does not promise that both lanes write the same text"),
    ):
        with replaying(replace(whole, rounds=rounds, promises=promises)) as url:
            visitor = Visitor(browser, url).ready()
            visitor.page.click("#sd-run")
            visitor.phase("done")
            assert visitor.page.get_attribute('[data-k="identical"]', "data-state") == state
            assert words in visitor.text('[data-k="why"]') and bool(words) == bool(visitor.text('[data-k="why"]'))
            assert visitor.page.is_visible(".sd-toggle") == (not words)
            assert visitor.page.is_visible(".sd-legend .r") == (not words)
            visitor.page.close()


def test_the_downloaded_trace_holds_the_system_prompt_where_it_was_chosen(browser: Any, fake_app: Any) -> None:
    visitor = Visitor(browser, fake_app()[0]).ready()
    page = visitor.page
    page.evaluate(ENDS)
    page.fill("#sd-system textarea", "Be brief.")
    for kept in (False, True):
        page.set_checked("#sd-keep-system input", kept)
        visitor.run("hello", max_new_tokens=8)
        page.wait_for_function("races => window.ends === races", arg=1 + kept)
        trace = downloaded(page)
        assert trace.request["system"] == ("Be brief." if kept else None)
        assert trace.omitted == (() if kept else ("system",))
    assert visitor.errors == []
    page.close()
