"""`TokenView` on pages that are not the app's: the examples of docs/token_view.md as printed, and several views on one
page, in a real browser."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from test_browser import EVIL, ROOT, SPOKEN, Visitor, browser, free_port, pytestmark  # noqa: F401
from ui_fakes import FakeSource

from spec_decode.events import Trace
from spec_decode.request import Request
from spec_decode.session.feed import Feed
from spec_decode.session.still import still
from spec_decode.settings import Settings
from spec_decode.ui import Engine, TokenView
from spec_decode.ui.view import shown

EXAMPLES = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "token_view.md").read_text("utf-8"), re.M | re.S)
IDS = "[...document.querySelectorAll('[id]')].map(node => node.id).filter(Boolean)"
LABELS = """() => [
  ...document.querySelectorAll(".sd-race :is([aria-labelledby], [aria-describedby])")].every((node) => {
  const named = document.getElementById(node.getAttribute("aria-labelledby") || node.getAttribute("aria-describedby"));
  return named ? named.closest(".sd-race") === node.closest(".sd-race") : node.hidden;
})"""
COLUMNS = "getComputedStyle(document.querySelector('.sd-lanes')).gridTemplateColumns.split(' ').length"


def recorded(name: str) -> bytes:
    return gzip.decompress((ROOT / "assets" / "replays" / f"{name}.json.gz").read_bytes())


def raced(**traits: Any) -> Trace:
    race = FakeSource(**traits).race(Request("hello", Settings(max_new_tokens=60, draft_length=4)))
    list(race.steps())
    return race.trace


@contextmanager
def launched(demo: gr.Blocks) -> Iterator[str]:
    _, url, _ = demo.launch(server_port=free_port(), prevent_thread_lock=True, quiet=True)
    yield url
    demo.close()


@pytest.fixture
def example(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The first example, run as printed in a folder with two traces: its address, and the folder."""
    (tmp_path / "example.py").write_text(EXAMPLES[0], encoding="utf-8")
    (tmp_path / "trace.json").write_bytes(recorded("code"))
    (tmp_path / "other.json").write_bytes(recorded("prose"))
    port = free_port()
    env = {**os.environ, "PYTHONPATH": str(ROOT), "GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "0"}
    process = subprocess.Popen([sys.executable, "example.py"], cwd=tmp_path, env=env, stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(url, timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, "the example ended"
                time.sleep(0.2)
        yield url, tmp_path
    finally:
        process.terminate()
        process.wait(20)


def test_the_ten_lines_show_a_trace_and_the_next_one(browser: Any, example: tuple[str, Path]) -> None:  # noqa: F811
    url, folder = example
    assert len([line for line in EXAMPLES[0].splitlines() if line]) <= 10
    first, second = (Trace.from_json((folder / name).read_text("utf-8")) for name in ("trace.json", "other.json"))
    visitor = Visitor(browser, url, width=1440)
    page = visitor.page
    visitor.phase("done")
    for lane in ("baseline", "speculative"):
        assert page.eval_on_selector(f".sd-{lane} .sd-text", SPOKEN) == first.text(lane)
    assert "recorded on" in visitor.text(".sd-ran-settings") and visitor.text('[data-k="speedup"]').endswith("×")
    assert visitor.count(".sd-timeline canvas") == 1 and not page.is_visible(".sd-cue")
    page.locator(".sd-text .t.r").first.click()
    assert visitor.text(".sd-i-title").startswith("Round") and visitor.count(".sd-i-list li") > 4
    page.set_input_files("input[type=file]", folder / "other.json")
    page.wait_for_function("text => document.querySelector('.sd-ran-prompt').textContent.startsWith(text)",
                           arg=second.prompt[:40])  # fmt: skip
    assert page.eval_on_selector(".sd-speculative .sd-text", SPOKEN) == second.text("speculative")
    assert not page.is_visible(".sd-inspector"), "the round that was open is gone"
    assert visitor.errors == [] and visitor.outside == []
    page.close()


def test_a_race_streams_into_the_second_example(browser: Any) -> None:  # noqa: F811
    source = FakeSource(pace=0.4)
    engine = Engine(lambda progress: source)
    engine.start()
    scope: dict[str, Any] = {}
    exec(compile(EXAMPLES[1], "docs/token_view.md", "exec"), scope)
    with launched(scope["streamed"](engine)) as url:
        visitor = Visitor(browser, url, width=1440)
        page = visitor.page
        page.fill("textarea", "hello there")
        page.press("textarea", "Enter")
        visitor.phase("running")
        page.wait_for_selector(".sd-speculative .sd-text .t.r")
        early = visitor.count(".sd-text .t")
        source.pace = 0.0
        visitor.phase("done")
        assert visitor.count(".sd-text .t") > early
        assert page.eval_on_selector(".sd-speculative .sd-text", SPOKEN) == source.races[0].trace.text("speculative")
        assert visitor.text('[data-k="identical"]') == "✓ identical" and visitor.errors == []
        page.close()


def test_several_views_live_on_one_page(browser: Any) -> None:  # noqa: F811
    with gr.Blocks() as demo:
        with gr.Row():
            for name, trace in (("one", raced()), ("two", raced(texts=EVIL))):
                with gr.Column():
                    TokenView(trace, elem_id=name)
        empty = TokenView(elem_id="three")
        bad, clear = gr.Button("Bad", elem_id="bad"), gr.Button("Clear", elem_id="clear")
        bad.click(lambda: {"version": 2}, None, empty)
        clear.click(lambda: None, None, demo.blocks[next(k for k, b in demo.blocks.items() if b.elem_id == "one")])
    with launched(demo) as url:
        visitor = Visitor(browser, url, width=1440)
        page = visitor.page
        page.wait_for_selector("#two .sd-text .t")
        page.wait_for_selector("#three .sd-timeline canvas")
        ids = page.evaluate(IDS)
        assert len(ids) == len(set(ids)) and page.evaluate(LABELS)
        assert visitor.count("style[data-sd-view]") == 1
        assert page.evaluate("getComputedStyle(document.body).getPropertyValue('--sd-accent')"), "colours are there"
        assert visitor.count("#two .sd-text img, #two .sd-text script") == 0 and "owned" not in page.title()
        page.locator("#two .sd-text .t.r").first.click()
        assert page.is_visible("#two .sd-inspector") and not page.is_visible("#one .sd-inspector")
        page.locator("#one .sd-text .t.r").first.hover()
        assert page.is_visible("#one > .sd-race > .sd-tip, #one .sd-tip") and visitor.count("#two .sd-text .mate") > 0
        assert page.evaluate(COLUMNS) == 1, "in half a page the panes stand one below the other"
        assert page.eval_on_selector("#two .sd-inspector", "e => getComputedStyle(e).position") == "fixed"
        page.keyboard.press("Escape")
        page.keyboard.press("Escape")
        assert not page.is_visible("#two .sd-inspector")
        assert [found for found in visitor.violations() if ".sd-" in found] == []
        page.click("#bad")
        page.wait_for_selector("text=This cannot be shown")
        page.click("#clear")
        page.wait_for_selector("#one .sd-empty")
        assert visitor.count("#one .sd-text .t") == 0 and visitor.count("#two .sd-text .t") > 60
        assert visitor.errors == []
        page.close()


def test_a_value_is_a_trace_in_any_form_or_a_batch() -> None:
    trace = raced()

    def rounds(text: str) -> Any:
        return json.loads(text)["rounds"]

    texts = [shown(value) for value in (trace, trace.to_json(), json.loads(trace.to_json()))]
    assert rounds(texts[0]) == rounds(texts[1]) == rounds(texts[2]) and len(rounds(texts[0])) == len(trace.rounds)
    assert len({json.loads(text)["run"] for text in texts}) == 3, "each value is a race of its own"
    batch = still(trace, Feed())
    assert shown(batch) == batch
    assert json.loads(shown(None))["run"] == json.loads(shown(""))["run"] == ""


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"version": 3}, "not a Spec Decode trace of version 1 or 2"),
        ("{", "it is not JSON"),
        ("<script>alert(1)</script>", "it is not JSON"),
        (b"bytes", "not JSON serializable"),
        (12, "not a Spec Decode trace"),
        ([], "not a Spec Decode trace"),
        ({**json.loads(raced().to_json()), "rounds": []}, "it holds no rounds"),
        ({**json.loads(raced().to_json()), "rounds": 3}, "not a Spec Decode trace"),
        ("[" * 100_000, "This cannot be shown"),
    ],
)
def test_what_is_no_trace_is_refused_in_one_sentence(value: Any, words: str) -> None:
    with pytest.raises(gr.Error) as error:
        shown(value)
    said = str(error.value.message)
    assert words in said and said.startswith("This cannot be shown: ") and said.endswith(".") and len(said) < 300
