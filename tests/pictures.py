"""README's pictures, made from a recording that comes with the page: `python tests/pictures.py [--out FOLDER]`.

In: assets/replays/code.json.gz and the page as it is. Out: assets/screenshots, every picture light and dark, the demo
as an animated WebP with a still beside it. The app runs on the loopback address without a model, and the clock of the
browser is advanced frame by frame, so that the same recording, page, browser and fonts give the same pictures, but for
one level of colour in some pixels, which Chromium rounds one way or the other. Needs the package playwright and a
Chromium (its path in CHROMIUM, else the usual ones). Imports nothing of the app.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "assets" / "screenshots"
RECORDING = ROOT / "assets" / "replays" / "code.json.gz"
THEMES = ("light", "dark")
KINDS = ("demo", "demo-still", "page", "phone")
NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]

FRAME = 100  # milliseconds of a frame of the demo, in which the recording plays at a quarter of its speed
END, OPEN = 1600, 3600  # milliseconds that the finished race is shown, then with a round opened
LIMIT = 12_000  # milliseconds of the demo, at most
DESCRIPTION = 0x010E  # the Exif tag that says which recording a picture shows
RACE, TOKENS = ".sd-race", ".sd-speculative .sd-text .t"
PLAYS, ENDED = '.sd-player[data-state="playing"]', '.sd-player[data-state="ended"]'
# a frame is told the time of the clock that is paused; Playwright tells it another
ONE_CLOCK = """() => {
  const next = window.requestAnimationFrame;
  window.requestAnimationFrame = (act) => next(() => act(performance.now()));
}"""
# the rejected tokens before which the target accepted one, by their place in the text, the longest first
REJECTED = """() => [...document.querySelectorAll(".sd-speculative .sd-text .t")]
  .map((t, i) => [i, t.matches(".a + .r") ? t.textContent.trim().length : 0])
  .filter(([, length]) => length > 1).sort((a, b) => b[1] - a[1]).map(([i]) => i)"""
# whether the round is shown without scrolling sideways
FITS = "e => { while ((e = e.parentElement) && e.scrollWidth <= e.clientWidth); return !e; }"


def digest() -> str:
    """What a picture says of the recording that it shows."""
    return f"{RECORDING.name} sha256 {hashlib.sha256(RECORDING.read_bytes()).hexdigest()}"


def names() -> list[str]:
    """The files that the command writes."""
    return [f"{kind}-{theme}.webp" for kind in KINDS for theme in THEMES]


@contextmanager
def app(*flags: str) -> Iterator[str]:
    """The address of `python app.py` with these flags, on the loopback address."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    command = [sys.executable, "app.py", "--host", "127.0.0.1", "--port", port, *flags]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", int(port))) == 0:
                    break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.terminate()
        process.wait(20)


def shot(page: Any, clip: dict[str, float] | None = None) -> Image.Image:
    """The page as it is, or a part of it, with animations at their ends."""
    return Image.open(BytesIO(page.screenshot(animations="disabled", clip=clip))).convert("RGB")


def open_round(page: Any) -> None:
    """Presses a rejected token, which opens its round: the longest whose round is shown without scrolling."""
    for place in page.evaluate(REJECTED):
        page.locator(TOKENS).nth(place).click()
        page.wait_for_selector(".sd-inspector:not([hidden])")
        if page.eval_on_selector(".sd-i-grid", FITS):
            return
    raise SystemExit("There is no rejected token whose round fits the inspector.")


def demo(browser: Any, url: str, theme: str) -> tuple[list[Image.Image], list[int]]:
    """Frames and their milliseconds: the recording plays, has ended, and a round is opened."""
    page = browser.new_page(viewport={"width": 1440, "height": 1000}, reduced_motion="no-preference")
    page.clock.install(time=datetime(2026, 1, 1, tzinfo=UTC))
    page.goto(f"{url}?__theme={theme}")
    page.wait_for_selector(PLAYS)
    page.clock.pause_at(datetime(2026, 1, 1, 1, tzinfo=UTC))  # from here on, time passes only when it is told to
    page.evaluate(ONE_CLOCK)
    page.locator(".sd-pick").first.click()
    page.mouse.move(0, 0)
    page.wait_for_function("!document.querySelector('.sd-text .t')")
    page.wait_for_selector(PLAYS)
    top, bottom = page.locator(RACE).bounding_box(), page.locator(".sd-legend").bounding_box()
    clip = {"x": top["x"] - 14, "y": top["y"] - 6, "width": top["width"] + 28}
    clip["height"] = bottom["y"] + bottom["height"] + 12 - clip["y"]
    frames, lengths = [shot(page, clip)], [FRAME]
    while not page.locator(ENDED).count():
        page.clock.run_for(FRAME)
        frames.append(shot(page, clip))
        lengths.append(FRAME)
        if sum(lengths) > LIMIT - END - OPEN:
            raise SystemExit(f"{RECORDING.name} plays for too long a demo")
    lengths[-1] = END
    open_round(page)
    page.clock.run_for(1000)
    frames.append(shot(page, clip))
    lengths.append(OPEN)
    page.close()
    return frames, lengths


def still(browser: Any, url: str, theme: str, width: int, height: int, scale: float) -> Image.Image:
    """The page of the recording after its race, with a round opened."""
    page = browser.new_page(
        viewport={"width": width, "height": height}, device_scale_factor=scale, reduced_motion="reduce"
    )
    page.goto(f"{url}?__theme={theme}")
    page.wait_for_selector("#sd-run:not([disabled])")
    page.click("#sd-run")
    page.wait_for_selector(f'{RACE}[data-phase="done"]')
    page.wait_for_selector("#sd-run:not([disabled])")
    open_round(page)
    page.mouse.move(0, 0)
    page.wait_for_timeout(500)
    picture = shot(page)
    page.close()
    return picture


def write(path: Path, frames: list[Image.Image], lengths: list[int] | None = None) -> None:
    """Writes one picture, or an animation that begins anew at its end."""
    exif = Image.Exif()
    exif[DESCRIPTION] = digest()
    options: dict[str, Any] = {"lossless": True, "quality": 80, "method": 4, "exif": exif}
    if lengths:
        options |= {
            "save_all": True,
            "append_images": frames[1:],
            "duration": lengths,
            "loop": 0,
            "minimize_size": True,
        }
    frames[0].save(path, **options)
    print(f"{path.name}  {frames[0].width} × {frames[0].height}  {path.stat().st_size / 1000:.0f} kB", flush=True)


def main(argv: list[str] | None = None) -> None:
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description="Writes README's pictures anew.")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder (default: assets/screenshots)")
    folder = parser.parse_args(argv).out
    chromium = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if not chromium:
        parser.error("There is no Chromium: set the variable CHROMIUM to its path.")
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=FLAGS)
        with app("--replay-only") as url:
            for theme in THEMES:
                frames, lengths = demo(browser, url, theme)
                write(folder / f"demo-{theme}.webp", frames, lengths)
                write(folder / f"demo-still-{theme}.webp", frames[-1:])
        with app("--replay", str(RECORDING), "--speed", "1000") as url:
            for theme in THEMES:
                write(folder / f"page-{theme}.webp", [still(browser, url, theme, 1440, 1000, 1)])
                write(folder / f"phone-{theme}.webp", [still(browser, url, theme, 390, 844, 1.5)])
        browser.close()


if __name__ == "__main__":
    main()
