"""Draft lengths measured, and results pinned, in a real browser."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_browser import FALLS, Visitor, browser, pytestmark, serving  # noqa: F401
from ui_fakes import FakeSource, fake_load

from spec_decode.paths import ASSETS

PAYS = "button[role=tab]:has-text('Does it pay?')"
RACE = "button[role=tab]:has-text('Race')"
FORMULA = '=HYPERLINK("https://example.org";"<img src=x onerror=document.title=\'owned\'>")'
# names of what the last figure shows, and its measured points
SHOWN = """() => {
  const all = document.querySelector('[data-plot="model"] .sd-canvas').data;
  const marks = all.find((trace) => trace.name === "measured, 95 % interval");
  return [all.map((trace) => trace.name), marks ? [marks.x, marks.y, marks.error_y.array] : null];
}"""


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, FakeSource]]:
    source = FakeSource()
    with serving(fake_load(source)) as url:
        yield url, source


def measured(visitor: Visitor, panel: str, phase: str = "done") -> None:
    visitor.page.wait_for_selector(f'{panel} .sd-pays[data-phase="{phase}"]', timeout=60_000)


def raced(visitor: Visitor, prompt: str, **numbers: float) -> None:
    visitor.run(prompt, **numbers)
    visitor.page.wait_for_selector(f".sd-ran-prompt >> text={prompt[:12]}")
    visitor.phase("done")
    visitor.page.wait_for_selector("#sd-run:not([disabled])")


def test_draft_lengths_are_measured_under_a_race_and_results_are_pinned(
    browser: Any,  # noqa: F811
    served: tuple[str, FakeSource],
) -> None:
    visitor = Visitor(browser, served[0], width=1440, height=1000).ready()
    page = visitor.page
    assert not page.is_visible("#sd-measure-run"), "nothing has been raced"
    raced(visitor, FORMULA, max_new_tokens=48)
    page.wait_for_selector('[data-plot="model"][data-state="drawn"]')
    page.evaluate(FALLS)
    page.focus("#sd-measure-run")
    page.keyboard.press("Enter")
    measured(visitor, "#sd-measure")
    assert visitor.text("#sd-measure .sd-pays-status") == "Done: 15 of 15 measurements."
    assert page.evaluate("window.fell") == 0, "the focus went from Measure to Stop and back"
    rows = page.eval_on_selector_all(
        "#sd-measure .sd-pays-table >> nth=0 >> tbody tr", "all => all.map(e => e.innerText)"
    )
    assert [row.split("\t")[0].split("\n")[0] for row in rows[1:5]] == ["γ = 1", "γ = 2", "γ = 4", "γ = 8"]
    assert all("3 of 3" in row and "×" in row for row in rows[1:]), rows
    page.wait_for_function(f"({SHOWN})()[1]")
    names, (lengths, medians, ends) = page.evaluate(SHOWN)
    assert {"band", "predicted", "adaptive, measured"} <= set(names) and "this race, γ changing" not in names
    assert lengths == [0, 1, 2, 4, 8] and medians[0] == 1 and all(end > 0 for end in ends[1:])
    assert [f"{y:.2f}×" for y in medians[1:]] == [row.split("\t")[1].split(" ")[0] for row in rows[1:5]]
    assert len(visitor.text("#sd-measure .sd-pays-advice")) > 40
    assert page.title() == "Spec Decode" and visitor.count("#sd-measure img") == 0
    page.wait_for_timeout(300)
    assert visitor.violations() == []

    page.click(".sd-pin")
    raced(visitor, "A second prompt", max_new_tokens=24, temperature=0.5)
    assert page.evaluate(SHOWN)[1] is None and not page.is_visible("#sd-measure .sd-pays-table"), (
        "it was of another race"
    )
    page.click(".sd-pin")
    assert visitor.count(".sd-pins-table tbody tr") == 2
    for box in page.query_selector_all(".sd-pins-table input"):
        box.check()
    difference = visitor.text(".sd-pins-two table")
    assert "speculative tokens/s" in difference and "temperature\t0.5\t0\tdiffers" in difference
    page.wait_for_timeout(300)
    assert visitor.violations() == []
    with page.expect_download() as download:
        page.click(".sd-pins-tools >> text=CSV")
    table = list(csv.DictReader(io.StringIO(Path(download.value.path()).read_text(encoding="utf-8-sig"), newline="")))
    assert [row["prompt"] for row in table] == ["A second prompt", "'" + FORMULA]
    assert float(table[1]["speedup"]) > 1 and table[0]["temperature"] == "0.5" and table[1]["tokens"] == "48"
    with page.expect_download() as download:
        page.click(".sd-pins-tools >> text=Markdown")
    lines = Path(download.value.path()).read_text(encoding="utf-8").splitlines()
    assert len(lines) == 4 and all(line.replace("\\|", "").count("|") == 10 for line in lines)
    # rows that the storage holds and no pin has made
    broken = [None, 7, {}, {"id": "a"}, {"id": "b", "request": {"prompt": "p", "settings": {"rule": "greedy"}}}]
    page.evaluate(
        """(broken) => {
      const key = "spec-decode-pins", rows = JSON.parse(localStorage.getItem(key)), [first] = rows;
      const low = { ...first, figures: { ...first.figures, low: "1" } };
      const wrong = [low, { ...first, pair: null }, { ...first, machine: 3 }];
      localStorage.setItem(key, JSON.stringify([...broken, ...wrong, ...rows]));
    }""",
        broken,
    )
    assert "\\<img" in lines[3] and not re.search(r"(?<!\\)<", lines[3]), "no markup"

    page.reload()
    visitor.ready()
    page.wait_for_selector(".sd-pins-table tbody tr >> nth=1")
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "no sideways scrolling"
    page.click(".sd-pins-show >> nth=1")
    page.wait_for_function("document.querySelector('#sd-prompt textarea').value.startsWith('=HYPER')")
    assert page.input_value("#sd-max-new-tokens input") == "48"
    page.wait_for_selector('.sd-race[data-recording="ended"]')
    assert visitor.text('[data-k="speculative.tokens"]') == "48" and visitor.count(".sd-baseline .sd-text .t") == 48
    assert "Shown again" in visitor.text(".sd-pins-said") and visitor.count(".sd-text img") == 0
    page.click("#sd-clear")
    page.wait_for_function("document.querySelectorAll('.sd-text .t').length === 0")
    page.click(".sd-pins-delete >> nth=0")
    assert visitor.count(".sd-pins-table tbody tr") == 1
    assert visitor.errors == [] and visitor.outside == []
    page.close()


# what the page keeps of pinned results: the rows, and their traces
KEPT = """async () => {
  const got = (asked) => new Promise((done) => { asked.onsuccess = () => done(asked.result); });
  const db = await got(indexedDB.open("spec-decode-pins", 1));
  const all = await got(db.transaction("traces").objectStore("traces").getAll());
  const text = (bytes) => new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  return [localStorage.getItem("spec-decode-pins"), ...await Promise.all(all.map(text))];
}"""


def test_a_pin_keeps_no_system_prompt_and_a_file_brings_no_formula(
    browser: Any,  # noqa: F811
    served: tuple[str, FakeSource],
) -> None:
    visitor = Visitor(browser, served[0], width=1440, height=1000, reduced_motion="reduce").ready()
    page = visitor.page
    page.fill("#sd-system textarea", "A secret of mine")
    page.check("#sd-keep-system input")
    raced(visitor, "A prompt of its own", max_new_tokens=24)
    page.click(".sd-pin")
    page.wait_for_function(f"({KEPT})().then((kept) => kept.length === 2)")
    assert not any("secret" in text for text in page.evaluate(KEPT))

    data = json.loads(gzip.decompress((ASSETS / "replays/code.json.gz").read_bytes()))
    data["pair"]["device"], data["machine"] = ["=1+1"], {"gpu": ["=2+2"]}
    page.set_input_files(
        ".sd-share input[type=file]",
        {"name": "trace.json", "mimeType": "application/json", "buffer": json.dumps(data).encode()},
    )
    page.wait_for_selector('.sd-race[data-recording="ended"]')
    page.click(".sd-pin")
    with page.expect_download() as download:
        page.click(".sd-pins-tools >> text=CSV")
    table = list(csv.reader(io.StringIO(Path(download.value.path()).read_text(encoding="utf-8-sig"), newline="")))
    assert len(table) == 3 and not any(cell.startswith(("=", "@", "+")) for row in table for cell in row), table[1]

    page.fill("#sd-system textarea", "")
    page.click(".sd-pins-show >> nth=1")
    page.wait_for_selector(".sd-player-prompt >> text=A prompt of its own")
    assert "Its system prompt is not kept." in visitor.text(".sd-pins-said")
    assert "secret" not in visitor.text("#sd-main")
    assert visitor.errors == []
    page.close()


@pytest.mark.long
def test_a_list_of_prompts_is_measured_in_the_tab(
    browser: Any,  # noqa: F811
    served: tuple[str, FakeSource],
    tmp_path: Path,
) -> None:
    url, source = served
    visitor = Visitor(browser, url, width=390, height=844, theme="dark").ready()
    page = visitor.page
    page.click(PAYS)
    page.wait_for_selector("#sd-pays-run", state="visible")
    page.click("#sd-pays-run")
    measured(visitor, "#sd-pays", "failed")
    assert "Write a prompt first" in visitor.text("#sd-pays .sd-pays-status")
    big = tmp_path / "big.txt"
    big.write_text("word " * 20_000, encoding="utf-8")
    page.set_input_files("#sd-pays-file input", big)
    page.wait_for_selector(".sd-pays-said >> text=at most 65,536 are read")
    prompts = tmp_path / "prompts.jsonl"
    kinds = [("one", "code"), ("two", "prose"), ("<b>three</b>", "prose")]
    lines = [f'{{"id": "{p}", "category": "{c}", "prompt": "{p}"}}' for p, c in kinds]
    prompts.write_text("\n".join(lines), encoding="utf-8")
    page.set_input_files("#sd-pays-file input", prompts)
    page.wait_for_selector(".sd-pays-said >> text=3 lines read from prompts.jsonl")
    assert not [url for url in visitor.requests if "upload" in url], "read in the browser"
    page.fill("#sd-pays-tokens input[type=number]", "24")
    source.pace = 0.02
    page.click("#sd-pays-run")
    page.wait_for_selector(".sd-pays-progress >> text=/[1-9][0-9]* of 45 measurements, about/")
    page.click("#sd-pays-stop")
    measured(visitor, "#sd-pays", "stopped")
    source.pace = 0
    said = visitor.text("#sd-pays .sd-pays-status")
    assert said.startswith("Stopped after") and said.endswith("of 45 measurements, which are kept.")
    page.wait_for_selector("#sd-pays-run", state="visible")
    page.click("#sd-pays-run")
    measured(visitor, "#sd-pays")
    assert visitor.count("#sd-pays .sd-pays-kinds tbody tr") == 2, "a row for each category"
    page.wait_for_selector("#sd-pays .sd-pays-chart .main-svg")
    found = {}
    for label in ("HTML report", "Markdown", "JSON", "Raw (JSON Lines)"):
        page.wait_for_selector(f"#sd-pays-files button:not([disabled]):text-is('{label}')")
        with page.expect_download() as download:
            page.click(f"#sd-pays-files button:text-is('{label}')")
        found[download.value.suggested_filename] = Path(download.value.path()).read_text(encoding="utf-8")
    assert len(found) == 4 and found["spec-decode-measurements.jsonl"].count("\n") == 1 + 45 + 2
    page.wait_for_timeout(300)
    assert visitor.violations() == []
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "no sideways scrolling"
    assert visitor.errors == [] and visitor.outside == []
    page.close()
