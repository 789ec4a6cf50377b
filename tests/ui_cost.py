"""What showing a race costs: `PYTHONPATH=. python tests/ui_cost.py [--tokens 2000] [--pace 0.2]`.

Serves the page over a fake source, lets Chromium watch a long race, and reports shares of the wall time: drawing
(series for the figures computed on the server), everything between two slices of engine work (drawing included), and
the browser's own script time a batch and a drawing. The engine sleeps for its simulated steps, so that what it waits
for is the app alone. At pace 0.2 a target pass takes 6 ms.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from playwright.sync_api import sync_playwright
from test_browser import CHROMIUM, FLAGS, Visitor
from ui_fakes import FakeSource, fake_load

from spec_decode.session import stream as run_module
from spec_decode.session.curves import Throttle
from spec_decode.ui import Engine, build, launch_options

SCRIPTS = """() => {
  const race = document.querySelector('.sd-race'), plots = document.querySelector('.sd-plots');
  return { batches: race.flushes, ms_a_batch: race.spent / race.flushes, drawings: plots.draws || 0,
           ms_a_drawing: plots.spent / plots.draws, tokens: document.querySelectorAll('.sd-text .t').length,
           longest_ms_and_when: window.long.map(e => [Math.round(e.duration), Math.round(e.startTime)])
             .sort((a, b) => b[0] - a[0]).slice(0, 4) };
}"""
WATCH = "window.long = []; new PerformanceObserver(l => window.long.push(...l.getEntries()))"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--pace", type=float, default=0.2)
    flags = parser.parse_args()
    spent, races = [], []

    class Counted(Throttle):
        def drawn(self, seconds: float) -> None:
            spent.append(seconds)
            super().drawn(seconds)

    class Watched(Engine):
        def open(self, *args: Any, **options: Any) -> Any:
            races.append((time.perf_counter(), super().open(*args, **options)))
            return races[-1][1]

        def close(self, visitor: str, race: Any) -> None:
            races[-1] = (time.perf_counter() - races[-1][0], race)
            super().close(visitor, race)

    run_module.Throttle = Counted  # type: ignore[misc]
    engine = Watched(fake_load(FakeSource(flags.pace, context=100_000)))
    page = build(engine)
    _, url, _ = page.launch(prevent_thread_lock=True, **launch_options())
    engine.start()
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        visitor = Visitor(browser, url).ready()
        visitor.page.evaluate(WATCH + ".observe({ type: 'longtask' })")
        cpu = time.process_time()
        visitor.run("hello", max_new_tokens=flags.tokens)
        visitor.phase("done", 600)
        cpu = time.process_time() - cpu
        visitor.page.wait_for_selector('[data-plot="model"][data-state="drawn"] .main-svg')
        scripts = visitor.page.evaluate(SCRIPTS)
        browser.close()
    wall, race = races[-1]
    print(f"{flags.tokens} tokens a lane in {wall:.1f} s")
    drawing = sum(spent)
    print(f"drawing on the server: {len(spent)} times, {drawing * 1e3:.1f} ms, {drawing / wall:.2%} of the wall time")
    print(f"engine waiting for the app, drawing included: {1 - race.busy / wall:.1%} of the wall time")
    batches = scripts["batches"]
    print(f"app and this script: {cpu:.2f} s of processor time, {cpu / batches * 1e3:.1f} ms an update")
    print("browser:", {k: round(v, 2) if isinstance(v, float) else v for k, v in scripts.items()})


if __name__ == "__main__":
    main()
