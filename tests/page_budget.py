"""The budgets of the page, measured: `PYTHONPATH=. python tests/page_budget.py`, with `--tokens`, `--rate`, `--loads`.

Serves the page over the replay of a synthetic trace, so that no model takes the processor, and opens it in Chromium on
a wide and on a narrow screen, each time with an empty cache on a server that has answered before. Prints a table of
what was measured beside its budget, and exits with 1 where one is exceeded. Times depend on the machine and on what
else runs on it; layout shift and bytes do not.

What is measured:

- First contentful paint, as the browser reports it.
- Layout shift: the sum of all that the browser reports, from the start of the page on, and in a race. In a race those
  that follow an input within half a second count too, which the usual measure (CLS) leaves out.
- Bytes of everything that is loaded before plotly.js is asked for, as they were transferred, headers included: the page
  itself, which holds our style sheet, scripts and first recording, and Gradio's files.
- The longest task of the page's main thread after the first contentful paint, in a trace of the browser: by processor
  time, since browser, server and trace may share few cores; by the clock, with and without a trace, it is told beside
  it.
- Main-thread time a frame while tokens of both lanes arrive: all tasks of the main thread by the frames that it drew.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, NamedTuple

from playwright.sync_api import sync_playwright
from test_browser import CHROMIUM, FLAGS, serving
from ui_fakes import FakeSource

from spec_decode.events import BASELINE, SPECULATIVE, Trace
from spec_decode.request import Request
from spec_decode.settings import Settings
from spec_decode.sources.replay import ReplaySource

SCREENS = {"1440 px": (1440, 900), "390 px": (390, 844)}
SHIFTS = """
window.shifts = [];
const name = (node) => {
  const e = node && (node.nodeType === 1 ? node : node.parentElement);
  return e ? e.tagName.toLowerCase() + (e.id ? "#" + e.id : "") + (e.className && e.className.split ? "." + e.className.split(" ")[0] : "") : "gone";
};
new PerformanceObserver((list) => {
  for (const e of list.getEntries()) window.shifts.push({ value: e.value, input: e.hadRecentInput, nodes: e.sources.map((s) => name(s.node)) });
}).observe({ type: "layout-shift", buffered: true });
"""  # noqa: E501
LONG = """
window.long = [];
new PerformanceObserver((list) => {
  for (const e of list.getEntries()) window.long.push([e.startTime, e.duration]);
}).observe({ type: "longtask", buffered: true });
"""
PAINT = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
CATEGORIES = ["toplevel", "devtools.timeline", "disabled-by-default-devtools.timeline", "loading", "blink.user_timing"]


class Row(NamedTuple):
    """One measured figure and its budget, None where it only explains another."""

    name: str
    screen: str
    value: float
    unit: str
    budget: float | None = None

    @property
    def over(self) -> bool:
        return self.budget is not None and self.value >= self.budget


class Shifts(NamedTuple):
    """Layout shift without and with what follows an input, and the elements that moved most."""

    unasked: float
    all: float
    worst: str


def synthetic(tokens: int) -> Trace:
    """A race of so many new tokens a lane, of no model."""
    race = FakeSource(context=10 * tokens).race(Request("a synthetic race", Settings(max_new_tokens=tokens)))
    for _ in race:
        pass
    return race.trace


def replayed(trace: Trace, rate: float) -> ReplaySource:
    """A replay in which both lanes together emit `rate` tokens a second."""
    tokens = sum(len(r.emitted) for r in trace.rounds)
    return ReplaySource(trace, rate * sum(trace.lane(lane)[-1].clock for lane in (BASELINE, SPECULATIVE)) / tokens)


def shifts(page: Any) -> Shifts:
    """What has moved since the last call."""
    found = page.evaluate("window.shifts.splice(0)")
    worst = max(found, key=lambda s: s["value"], default={"nodes": []})
    return Shifts(
        sum(s["value"] for s in found if not s["input"]), sum(s["value"] for s in found), ", ".join(worst["nodes"][:3])
    )


class Wire:
    """Bytes that a page transfers, by address, until `closed`."""

    def __init__(self, page: Any) -> None:
        self.sizes: dict[str, float] = {}
        self._urls: dict[str, str] = {}
        self._closed = False
        session = page.context.new_cdp_session(page)
        session.send("Network.enable")
        session.on("Network.requestWillBeSent", self._sent)
        session.on("Network.loadingFinished", self._finished)

    def _sent(self, event: Any) -> None:
        url = event["request"]["url"]
        self._closed = self._closed or "plotly" in url
        if not self._closed:
            self._urls[event["requestId"]] = url

    def _finished(self, event: Any) -> None:
        if (url := self._urls.get(event["requestId"])) and url.startswith("http"):
            self.sizes[url] = event["encodedDataLength"]


class Tasks(NamedTuple):
    """Tasks of the page's main thread in a trace of the browser, in milliseconds: when each begins, how long it takes
    and how much processor time it has; and when frames were drawn."""

    tasks: list[tuple[float, float, float]]
    frames: list[float]

    def after(self, start: float) -> list[tuple[float, float, float]]:
        return [task for task in self.tasks if task[0] >= start]


def traced(browser: Any, page: Any, act: Callable[[], None]) -> tuple[Tasks, float | None]:
    """What the main thread did during `act`, and when the first contentful paint was, if in it."""
    browser.start_tracing(page=page, categories=CATEGORIES)
    act()
    events = json.loads(browser.stop_tracing())["traceEvents"]
    mains = {
        (e["pid"], e["tid"])
        for e in events
        if e.get("name") == "thread_name" and e["args"].get("name") == "CrRendererMain"
    }
    by_thread = {main: [e for e in events if (e["pid"], e["tid"]) == main] for main in mains}
    own = max(by_thread.values(), key=lambda all_: sum(e["name"] in ("Layout", "FunctionCall") for e in all_))
    tasks = [
        (e["ts"] / 1e3, e["dur"] / 1e3, e.get("tdur", 0) / 1e3) for e in own if e["name"] == "RunTask" and "dur" in e
    ]
    frames = sorted(e["ts"] / 1e3 for e in own if e["name"] == "Commit")
    paint = next((e["ts"] / 1e3 for e in own if e["name"] == "firstContentfulPaint"), None)
    return Tasks(sorted(tasks), frames), paint


def measure(browser: Any, url: str, screen: str) -> list[Row]:
    """Every budget on one screen."""
    width, height = SCREENS[screen]
    page = browser.new_page(viewport={"width": width, "height": height})
    page.add_init_script(SHIFTS)
    wire = Wire(page)

    def load() -> None:
        page.goto(url)
        page.wait_for_selector("#sd-run:not([disabled])", timeout=60_000)
        page.wait_for_function("window.Plotly", timeout=60_000)
        page.wait_for_timeout(1500)

    def race() -> None:
        page.click("#sd-run")
        page.wait_for_function("document.body.dataset.sdPhase === 'running'", timeout=60_000)
        page.wait_for_function("document.body.dataset.sdPhase === 'done'", timeout=300_000)

    loaded, painted = traced(browser, page, load)
    assert painted is not None, "the browser reported no first contentful paint"
    still, paint = shifts(page), page.evaluate(PAINT)
    ran, _ = traced(browser, page, race)
    page.wait_for_timeout(1500)  # the last figures
    moved = shifts(page)
    page.close()

    early = loaded.after(painted)
    frames = len(ran.frames)
    own = sum(size for url_, size in wire.sizes.items() if url_.split("?")[0] == url or "/gradio_api/" in url_)
    print(f"{screen}: moved most at load: {still.worst or 'nothing'}; in the race: {moved.worst or 'nothing'}")
    return [
        Row("first contentful paint", screen, paint, "ms", 1000),
        Row("layout shift at load", screen, still.all, "", 0.05),
        Row("layout shift in the race, after inputs too", screen, moved.all, "", 0.05),
        Row("transferred before plotly.js", screen, sum(wire.sizes.values()) / 1e3, "kB", 400),
        Row("… of which the page itself", screen, own / 1e3, "kB"),
        Row("longest task after the first paint, at load", screen, max(t[2] for t in early), "ms", 200),
        Row("… by the clock", screen, max(t[1] for t in early), "ms"),
        Row("longest task in the race", screen, max(t[2] for t in ran.tasks), "ms", 200),
        Row("… by the clock", screen, max(t[1] for t in ran.tasks), "ms"),
        Row("main thread a frame in the race", screen, sum(t[1] for t in ran.tasks) / frames, "ms", 8),
        Row("… its processor time", screen, sum(t[2] for t in ran.tasks) / frames, "ms"),
        Row("… frames drawn", screen, frames, ""),
    ]


def untraced(browser: Any, url: str, screen: str, loads: int) -> list[Row]:
    """The longest task at load by the clock, without a trace of the browser, which takes processor time itself."""
    width, height = SCREENS[screen]
    longest = []
    for _ in range(loads):
        context = browser.new_context(viewport={"width": width, "height": height})  # an empty cache
        page = context.new_page()
        page.add_init_script(LONG)
        page.goto(url)
        page.wait_for_selector("#sd-run:not([disabled])", timeout=60_000)
        page.wait_for_function("window.Plotly", timeout=60_000)
        page.wait_for_timeout(1000)
        paint = page.evaluate(PAINT)
        longest.append(max((t for begun, t in page.evaluate("window.long") if begun + t > paint), default=0.0))
        context.close()
    name = f"… by the clock, median of {loads} loads without a trace"
    return [
        Row(name, screen, statistics.median(longest), "ms"),
        Row("… the least of them", screen, min(longest), "ms"),
        Row("… the most of them", screen, max(longest), "ms"),
    ]


def main() -> int:
    """Measures and prints; returns the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=1600, help="new tokens a lane (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=500, help="tokens a second, both lanes (default: %(default)s)")
    parser.add_argument("--loads", type=int, default=6, help="loads without a trace (default: %(default)s)")
    flags = parser.parse_args()
    source = replayed(synthetic(flags.tokens), flags.rate)
    rows: list[Row] = []
    with serving(lambda _: source) as url, sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page()  # warms the server up
        page.goto(url)
        page.wait_for_selector("#sd-run:not([disabled])", timeout=60_000)
        page.close()
        for screen in SCREENS:
            rows += measure(browser, url, screen)
            rows += untraced(browser, url, screen, flags.loads) if flags.loads else []
        print(
            f"\nChromium {browser.version}, Gradio {version('gradio')}, Python {platform.python_version()}; "
            f"{flags.tokens} tokens a lane at {flags.rate:g} tokens/s\n"
        )
        print("| what | screen | measured | budget |\n| --- | --- | ---: | ---: |")
        for row in rows:
            digits = 3 if not row.unit and row.budget else 1 if row.unit == "ms" else 0
            unit = f" {row.unit}" if row.unit else ""
            budget = "" if row.budget is None else f"< {row.budget:g}{unit}"
            over = " (over)" if row.over else ""
            print(f"| {row.name} | {row.screen} | {row.value:.{digits}f}{unit}{over} | {budget} |")
        browser.close()
    return int(any(row.over for row in rows))


if __name__ == "__main__":
    sys.exit(main())
