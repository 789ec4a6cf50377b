# ruff: noqa: F811 (fixtures of another file are imported, and named again where they are asked for)
"""Share, open and run again in a real browser; skipped without one, as tests/test_browser.py."""

from __future__ import annotations

import gzip
import json
from base64 import b64encode
from dataclasses import replace
from pathlib import Path
from typing import Any

import hostile
import pytest
from test_browser import CHROMIUM, SPOKEN, Visitor, browser, fake_app, served  # noqa: F401
from test_share import LOCAL, REQUESTS, SCENES, accepted

from spec_decode.events import BASELINE, SPECULATIVE, Promises, Trace
from spec_decode.session.caption import about
from spec_decode.session.curves import Curves, final
from spec_decode.session.tally import Tally
from spec_decode.share import compare, image, link, saved
from spec_decode.sources.replay import ReplaySource, read

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")]

# files in base64 → for each whether it was read, what was said, and whether a refusal was one of ours
READ = """async (files) => {
  const { SpecDecode, player } = document.querySelector("#sd-token-view .sd-race").view;
  const { tables } = document.querySelector(".sd-share"), out = [];
  for (const file of files) {
    const bytes = Uint8Array.from(atob(file), (c) => c.charCodeAt(0));
    try {
      const recording = await SpecDecode.read(new File([bytes], "x"), tables);
      await player.open(recording, true);
      const { view } = document.querySelector("#sd-token-view .sd-race");
      const { rounds } = recording.data, last = rounds[rounds.length - 1];
      view.inspect(last.lane, last.index);
      view.inspector.close();
      SpecDecode.compared(SpecDecode.compare(recording.data, recording.data));
      const card = SpecDecode.image(recording.stats, recording.data, tables);
      const broken = new DOMParser().parseFromString(card, "image/svg+xml").querySelector("parsererror, img, script");
      out.push([true, broken ? "card" : "", true]);
    } catch (error) {
      out.push([false, String(error.message), error instanceof SpecDecode.Refused]);
    }
  }
  return out;
}"""
DROP = """([name, text]) => {
  const data = new DataTransfer();
  data.items.add(new File([text], name));
  for (const kind of ["dragover", "drop"]) {
    const event = new DragEvent(kind, { dataTransfer: data, bubbles: true, cancelable: true });
    document.querySelector("#sd-prompt").dispatchEvent(event);
  }
}"""
# what the browser says of a trace
SAID = """(text) => {
  const { SpecDecode } = document.querySelector("#sd-token-view .sd-race").view;
  const { tables } = document.querySelector(".sd-share");
  const trace = SpecDecode.checked(text, tables), stats = SpecDecode.stats(trace);
  return { trace, stats, about: SpecDecode.about(trace, tables), recorded: SpecDecode.recorded(trace),
    series: SpecDecode.series(trace), image: SpecDecode.image(stats, trace, tables) };
}"""
LINK = """async ([form, run]) => {
  const { SpecDecode } = document.querySelector("#sd-token-view .sd-race").view;
  const { tables } = document.querySelector(".sd-share");
  return SpecDecode.linkOf(form, tables, run);
}"""


def ready(browser: Any, url: str) -> Visitor:
    visitor = Visitor(browser, url).ready()
    visitor.page.wait_for_selector(".sd-share button")
    return visitor


def shared(visitor: Visitor) -> str:
    """The address that Copy link gives now."""
    visitor.page.click('.sd-share >> text="Copy link"')
    visitor.page.wait_for_selector(".sd-share-text:not([hidden])")
    return str(visitor.page.input_value(".sd-share-text"))


def lanes(page: Any) -> list[str]:
    return [page.eval_on_selector(f".sd-{lane} .sd-text", SPOKEN) for lane in (BASELINE, SPECULATIVE)]


def test_a_race_is_shared_opened_and_run_again(browser: Any, fake_app: Any, tmp_path: Path) -> None:
    url, source = fake_app(texts=[*hostile.STRIKE.split(" "), " fine", "\n"])
    visitor = ready(browser, url)
    page = visitor.page
    page.click('.sd-share >> text="Share"')
    assert "Write a prompt first" in page.evaluate(
        f"({LINK})([{{ prompt: '' }}, false]).then(() => '', (e) => e.message)"
    )

    # a link
    page.click('#sd-policy >> text="fixed"')
    visitor.choose("#sd-drafter", "lookup")
    page.fill("#sd-system textarea", "a secret")
    page.fill("#sd-prompt textarea", "Regen & “Sonne” <b>")
    page.fill("#sd-seed input", "11")
    page.fill("#sd-max-new-tokens input", "40")
    address = shared(visitor)
    asked = link.read(address.partition("#")[2])
    assert asked is not None and asked.prompt == "Regen & “Sonne” <b>" and asked.system is None
    assert (asked.settings.draft_length, asked.settings.seed, asked.settings.max_new_tokens) == (4, 11, 40)
    assert asked.drafter == "lookup" and "left out" in visitor.text(".sd-share-says")
    page.check("#sd-keep-system input")
    assert link.read(shared(visitor).partition("#")[2]) == replace(asked, system="a secret")
    page.uncheck("#sd-keep-system input")

    other = Visitor(browser, url)
    other.page.goto("about:blank")
    other.page.goto(f"{address}&run=1")
    other.page.wait_for_selector(".sd-ask button:not([disabled])")
    other.page.wait_for_function("document.querySelector('#sd-prompt textarea').value.startsWith('Regen')")
    assert other.page.input_value("#sd-drafter input") == "lookup" and other.page.is_visible("#sd-length")
    assert other.page.input_value("#sd-seed input") == "11" and other.page.input_value("#sd-system textarea") == ""
    assert "lookup" in other.text("#sd-status") and source.races == [], "nothing runs before it is asked"
    other.page.click('.sd-ask >> text="Run it"')
    other.phase("done")
    other.page.evaluate("location.hash = 'race=1.AAAA'")
    other.page.wait_for_selector("#sd-note >> text=This link is damaged")
    assert other.errors == [] and other.outside == []
    other.page.close()

    # a saved replay, opened from disk without a network
    page.click("#sd-run")
    visitor.phase("done")
    page.wait_for_selector("#sd-download:not([disabled])")
    with page.expect_download() as held:
        page.click("#sd-download")
    trace = Trace.from_json(Path(held.value.path()).read_text(encoding="utf-8"))
    with page.expect_download() as held:
        page.click('.sd-share >> text="Save replay (HTML)"')
    file = tmp_path / "saved.html"
    held.value.save_as(file)
    assert read(file) == trace and "a secret" not in file.read_text(encoding="utf-8")
    assert file.read_text(encoding="utf-8").split(saved.CLOSE)[-2:] == saved.page(trace).split(saved.CLOSE)[-2:]
    with page.expect_download() as held:
        page.click('.sd-share >> text="PNG"')
    assert Path(held.value.path()).read_bytes()[1:4] == b"PNG"
    both = lanes(page)
    context = browser.new_context(offline=True)
    alone, errors = context.new_page(), []
    alone.on("console", lambda m: errors.append(m.text) if m.type in ("error", "warning") else None)
    alone.on("pageerror", lambda e: errors.append(str(e)))
    alone.goto(file.as_uri())
    alone.wait_for_selector('.sd-race[data-recording="ended"]')
    assert lanes(alone) == both == [trace.text(BASELINE), trace.text(SPECULATIVE)]
    for key in ("speedup", "interval", "verdict", "acceptance", "per_pass", "identical"):
        assert alone.inner_text(f'[data-k="{key}"]') == visitor.text(f'[data-k="{key}"]')
    assert alone.locator(".sd-chart").count() == 4 and alone.title().startswith("Regen & “Sonne” <b>")
    alone.focus(".sd-speculative .sd-text")
    alone.keyboard.press("End")
    alone.keyboard.press("Enter")
    assert alone.is_visible(".sd-inspector") and "target p" in alone.inner_text(".sd-inspector")
    assert errors == [] and alone.evaluate("window.owned") is None and alone.locator("img").count() == 0
    context.close()

    # opened by a drop, and run again
    page.evaluate(DROP, ["x.html", "<html><script>window.owned = 1</script></html>"])
    page.wait_for_selector(".sd-share-says >> text=This page holds no replay")
    page.evaluate(DROP, ["saved.html", file.read_text(encoding="utf-8")])
    page.wait_for_selector(".sd-race[data-recording]")
    page.wait_for_selector(".sd-share-says >> text=sent nowhere")
    page.fill("#sd-prompt textarea", "something else")
    source.hit = 0.2
    page.click('.sd-player >> text="Run this again here"')
    page.wait_for_selector(".sd-compared")
    assert source.races[-1].request.prompt == "Regen & “Sonne” <b>" and source.races[-1].settings.seed == 11
    rows = page.eval_on_selector_all(
        ".sd-compared tbody tr",
        "all => all.map((r) => [r.dataset.same, ...[0, 2, 3].map((i) => r.cells[i].textContent)])",
    )
    wanted = compare.compare(trace, source.races[-1].trace)
    assert rows == [[json.dumps(w.same), w.name, w.recorded, w.here] for w in wanted]
    assert "The same text here" in visitor.text(".sd-compare h2")

    # a link that is opened during a race fills the form and says nothing of the race; what was cleared is not compared
    source.pace = 2.0
    page.evaluate(DROP, ["saved.html", file.read_text(encoding="utf-8")])
    page.wait_for_selector(".sd-race[data-recording]")
    page.wait_for_selector('.sd-player >> text="Run this again here"')
    page.click('.sd-player >> text="Run this again here"')
    visitor.phase("running")
    page.evaluate("(fragment) => { location.hash = fragment; }", address.partition("#")[2])
    page.wait_for_selector(".sd-share-says >> text=The form was filled from the link.")
    assert page.get_attribute("#sd-status p", "data-state") == "busy"
    page.click("#sd-clear")
    visitor.phase("idle")
    source.pace = 0.0
    page.wait_for_selector("#sd-run:not([disabled])")
    visitor.run("Another prompt", max_new_tokens=8)
    visitor.phase("done")
    assert page.is_hidden(".sd-compare")
    assert visitor.violations() == [] and visitor.errors == [] and visitor.outside == []
    page.close()


def test_the_browser_says_of_a_trace_what_the_server_says(browser: Any, fake_app: Any) -> None:
    visitor = ready(browser, fake_app()[0])
    page = visitor.page
    lossy = {"rule": "threshold", "temperature": 0.5, "top_k": 5, "top_p": 0.9, "max_new_tokens": 2048}
    settings = SCENES["code"].settings
    made = [
        replace(SCENES["code"], request={**SCENES["code"].request, "settings": settings | more}, promises=promises)
        for more, promises in (
            (lossy, Promises()),
            ({"rule": "rejection", "temperature": 1.0}, Promises(rejected="tokens")),
            ({"rule": "synthetic", "synthetic_acceptance": 0.25}, Promises()),
            ({}, Promises(exact=False, same_text=False)),
        )
    ]
    asked = SCENES["code"].request
    made += [
        replace(SCENES["code"], request={**asked, **given})
        for given in ({"prefix": ["Yes"]}, {"prefix": []}, {"draft": [5, 6]})
    ]
    for trace in [*SCENES.values(), *made]:
        said, source = page.evaluate(SAID, trace.to_json()), ReplaySource(trace)
        tally, curves = Tally(), Curves()
        for r in trace.rounds:
            tally.add(r)
            curves.add(r)
        stats = tally.to_dict(trace)
        assert Trace.from_json(json.dumps(said["trace"])) == trace
        assert said["about"] == json.loads(json.dumps(about(source.recording.request, trace.pair, trace.promises)))
        assert said["recorded"] == str(source.recording)
        plain = {name: (False if name == "looping" else None) for name in saved.EXTRAS}
        got, want = said["stats"], json.loads(json.dumps(stats)) | plain
        for lane in (BASELINE, SPECULATIVE):
            assert got.pop(lane) == pytest.approx(want.pop(lane))
        assert got == pytest.approx(want)
        live = json.loads(json.dumps(curves.live()))
        for lane in (BASELINE, SPECULATIVE):
            for mine, theirs in zip(said["series"]["rate"][lane], live["rate"][lane], strict=True):
                assert mine == pytest.approx(theirs, abs=0.011)
        for mine, theirs in zip(said["series"]["acceptance"], live["acceptance"], strict=True):
            assert mine == pytest.approx(theirs, abs=2e-4)
        assert said["series"]["final"]["passes"] == final(trace)["passes"]
        assert said["image"] == image.svg(image.told(stats | plain, trace))
    for request in REQUESTS:
        fixed = isinstance(request.settings.draft_length, int)
        form = request.settings.to_dict() | {
            "policy": "fixed" if fixed else request.settings.draft_length,
            "prompt": request.prompt, "drafter": request.drafter, "thinking": request.thinking,
        }  # fmt: skip
        assert link.read(page.evaluate(LINK, [form, True])) == request
    for name in LOCAL:
        local = link.read(page.evaluate(LINK, [{"prompt": "p", "drafter": name}, False]))
        assert local is not None and local.drafter == "my-drafter", name
    noise = "".join(chr(0x4E00 + (i * 7919) % 20000) for i in range(9000))
    refused = page.evaluate(f"(a) => ({LINK})(a).then(() => '', (e) => e.message)", [{"prompt": noise}, False])
    assert refused == link.TOO_LONG
    assert visitor.errors == []
    page.close()


def hostility(visitor: Visitor, count: int, seed: int) -> int:
    """How many of these files were read. Nothing is thrown that is not a refusal, nothing executed, and the reader in
    Python takes no other files."""
    files, taken, title = list(hostile.mutated(count, seed)), 0, visitor.page.title()
    for start in range(0, count, 100):
        part = files[start : start + 100]
        for data, (fine, said, ours) in zip(
            part, visitor.page.evaluate(READ, [b64encode(data).decode() for data in part]), strict=True
        ):
            assert ours, said
            assert fine or (said.endswith((".", ".)")) and len(said) < 300), said
            assert not (fine and said), "the share image is well formed"
            assert fine == accepted(data) or STRICTER in said, (said, data[:2000])
            taken += fine
    assert visitor.page.evaluate("window.owned") is None and visitor.page.title() == title
    assert visitor.count("#sd-main img, #sd-main script") == 0
    assert visitor.errors == [] and visitor.outside == []
    return taken


STRICTER = "The replay in this page is damaged."  # the browser reads what stands beside the trace as well


def test_hostile_files_are_refused_in_the_browser(browser: Any, fake_app: Any) -> None:
    visitor = ready(browser, fake_app()[0])
    assert 5 < hostility(visitor, 50, seed=1) < 45
    bomb = b64encode(gzip.compress(b" " * 2_000_000)).decode()
    visitor.page.evaluate("document.querySelector('#sd-token-view .sd-race').view.SpecDecode.UNPACKED = 1e6")
    assert "more than 1 MB after decompression" in visitor.page.evaluate(READ, [bomb])[0][1]
    visitor.page.close()


@pytest.mark.long
def test_a_thousand_hostile_files_are_refused_in_the_browser(browser: Any, fake_app: Any) -> None:
    visitor = ready(browser, fake_app()[0])
    assert 100 < hostility(visitor, 1000, seed=2) < 900
    visitor.page.close()


def test_an_embedded_page_is_the_prompt_and_both_lanes_from_its_top_on(browser: Any, fake_app: Any) -> None:
    visitor = Visitor(browser, fake_app()[0] + "?embed=1&theme=").ready()
    page = visitor.page
    assert page.is_hidden(".sd-header") and page.is_hidden("#sd-after") and page.is_hidden(".sd-timeline")
    assert page.eval_on_selector("#sd-prompt", "e => e.getBoundingClientRect().top") < 40, (
        "no room for what is not there"
    )
    page.fill("#sd-prompt textarea", "hello")
    page.click("#sd-run")
    visitor.phase("done")
    assert page.is_visible(".sd-speculative .sd-text .a") and page.is_visible(".sd-whole")
    assert visitor.errors == []
    page.close()
