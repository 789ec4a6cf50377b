"""Draft lengths measured on the page: under a finished race, and in the tab "Does it pay?" for a list of prompts.

In: a `Desk` of `session.pays`. Out: the components, wired. A job waits in Gradio's queue for its turn, one at a time,
and shares the device with races as `session.device.Turns` says. There are two buttons Stop, of which the style sheet
shows one: while a job waits it leaves the queue, once it runs it ends within a round and keeps what was measured. The
view is a `gr.HTML` with a template and script of ours, as in `components`; its value is JSON of `session.pays`.
"""

from __future__ import annotations

import json
import secrets
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from ..errors import SettingsError, UserError
from ..request import Request
from ..session import pays
from ..session.device import Engine
from ..session.pays import Desk, View, Wanted
from ..session.pays_prompts import MOST_BYTES, MOST_PROMPT_TOKENS, MOST_PROMPTS, read_prompts
from ..trace_format import portable
from .components import asset, script
from .controls import Panel
from .form import CONTROLS, settings_from_form
from .wiring import AT_ONCE, QUIET

MEASURE = "measure"  # concurrency id: one job at a time
NO_RACE = "There is no finished race to measure; press Run first."
REFUSED = "The server has too much to do just now; try again in a minute."
# what was raced, as the final batch of a race tells it
ASKED = "() => [JSON.stringify(document.querySelector('.sd-race').view.race.head || null)]"
FORMATS = {
    "spec-decode-report.html": "HTML report",
    "spec-decode-report.md": "Markdown",
    "spec-decode-report.json": "JSON",
    pays.RAW: "Raw (JSON Lines)",
}


def measure_panel(desk: Desk, blocks: gr.Blocks) -> None:
    """Makes and wires what stands under a finished race."""
    with gr.Column(elem_id="sd-measure"):
        with gr.Row(elem_classes="sd-pays-buttons"):
            go = gr.Button("Measure draft lengths", size="sm", elem_id="sd-measure-run", min_width=0, scale=0)
            leave, stop = _stops("sd-measure")
        asked = gr.Textbox("", visible="hidden", elem_id="sd-measure-asked")
        view = _view("sd-measure-view", "race")

    def measure_stream(request: gr.Request, asked: str) -> Iterator[str]:
        for made in _views(desk, _visitor(request, "race"), lambda: _of_race(desk.engine, asked)):
            yield made.text

    _wire(desk, blocks, "race", (go, leave, stop, view), measure_stream, [asked], js=ASKED)


def pays_tab(desk: Desk, blocks: gr.Blocks, panel: Panel, examples: Sequence[dict[str, str]]) -> None:
    """Makes and wires the contents of the tab; the settings are those of the race's form, `panel`."""
    with gr.Row(elem_id="sd-pays"):
        with gr.Column(elem_id="sd-pays-rail", min_width=280, scale=0):
            prompts = gr.Textbox(
                label="Prompts, one a line",
                info=f"Or JSON Lines of id, category and prompt. At most {MOST_PROMPTS} prompts, "
                f"{MOST_BYTES // 1024} KiB, {MOST_PROMPT_TOKENS:,} tokens each.",
                lines=9,
                max_lines=16,
                elem_id="sd-pays-prompts",
            )
            gr.HTML(
                "",
                html_template=asset("pays_file.html"),
                js_on_load=script("pays_file.js"),
                apply_default_css=False,
                most=MOST_BYTES,
                elem_id="sd-pays-file",
            )
            shipped = "\n".join(json.dumps(row, ensure_ascii=False) for row in examples)
            fill = gr.Button("Use the example prompts", size="sm", elem_id="sd-pays-examples")
            fill.click(None, None, prompts, js=f"() => {json.dumps(shipped)}", **QUIET)
            most = min(pays.MOST_TOKENS, desk.engine.limits.new_tokens or pays.MOST_TOKENS)
            tokens = gr.Slider(
                8,
                most,
                min(pays.USUAL_TOKENS, most),
                step=8,
                label="Max new tokens",
                info="Of each lane. Other settings are those of the tab Race.",
                elem_id="sd-pays-tokens",
            )
            with gr.Row(elem_classes="sd-pays-buttons"):
                go = gr.Button("Measure", variant="primary", elem_id="sd-pays-run", min_width=80)
                leave, stop = _stops("sd-pays")
        with gr.Column(elem_id="sd-pays-main", min_width=320):
            view = _view("sd-pays-view", "list")
            with gr.Row(elem_id="sd-pays-files"):
                files = [
                    gr.DownloadButton(label, size="sm", interactive=False, min_width=0, scale=0)
                    for label in FORMATS.values()
                ]
    kept = Reports()

    def pays_stream(
        request: gr.Request, text: str, tokens: Any, drafter: str, system: str, thinking: bool, *values: Any
    ) -> Iterator[str]:
        def wanted() -> Wanted:
            settings = settings_from_form(dict(zip(CONTROLS, values, strict=True)) | {"max_new_tokens": tokens})
            asked = Request("prompts", settings, system or None, drafter or None, thinking=bool(thinking))
            return Wanted(tuple(read_prompts(text)), asked, reports=True)

        visitor = _visitor(request, "list")
        kept.forget(visitor)
        for made in _views(desk, visitor, wanted):
            if made.reports:
                kept.write(visitor, made.reports)
            yield made.text

    def pays_files(request: gr.Request) -> list[Any]:
        paths = kept.paths(_visitor(request, "list"))
        return [gr.update(value=paths.get(name), interactive=name in paths) for name in FORMATS]

    form = [prompts, tokens, panel.drafter, panel.system, panel.thinking, *panel.controls.values()]
    ended = _wire(desk, blocks, "list", (go, leave, stop, view), pays_stream, form)
    ended.then(pays_files, None, files, **AT_ONCE)


def _stops(name: str) -> tuple[gr.Button, gr.Button]:
    """Stop while a job waits, and while it runs."""
    leave = gr.Button("Stop", elem_id=f"{name}-leave", visible=False, min_width=80, scale=0)
    stop = gr.Button("Stop", elem_id=f"{name}-stop", visible=False, min_width=80, scale=0)
    return leave, stop


# The script comes once: with the view under the race, which hands it to the one in the tab.
_CALL = "window.sdPays(element, props, watch);"
_LATER = f"""const begin = (tries) => {{
  if (window.sdPays) {_CALL}
  else if (tries) setTimeout(begin, 50, tries - 1);
}};
begin(200);"""


def _view(elem_id: str, kind: str) -> gr.HTML:
    first = f"window.sdPays = (element, props, watch) => {{ {script('pays.js')} }};\n{_CALL}"
    return gr.HTML(
        pays.idle(),
        html_template=asset("pays.html"),
        js_on_load=first if kind == "race" else _LATER,
        apply_default_css=False,
        kind=kind,
        lengths=[0, *pays.LENGTHS],
        repeats=pays.REPEATS,
        elem_id=elem_id,
    )


def _wire(
    desk: Desk,
    blocks: gr.Blocks,
    kind: str,
    parts: tuple[gr.Button, gr.Button, gr.Button, gr.HTML],
    stream: Any,
    inputs: list[Any],
    js: str | None = None,
) -> Any:
    """Run, Stop and their ends; returns the event after which a job is over."""
    go, leave, stop, view = parts
    hidden, shown = gr.update(visible=False), gr.update(visible=True)

    def measure_begin() -> dict[Any, Any]:
        return {view: pays.waiting(), go: hidden, leave: shown, stop: shown}

    def measure_rest() -> dict[Any, Any]:
        return {go: shown, leave: hidden, stop: hidden}

    def measure_leave() -> dict[Any, Any]:
        return {view: pays.left(), go: shown, leave: hidden, stop: hidden}

    def measure_halt(request: gr.Request) -> None:
        desk.stop(_visitor(request, kind))

    every = [view, go, leave, stop]
    running = go.click(measure_begin, None, every, concurrency_limit=None, **QUIET).then(
        stream,
        inputs,
        view,
        js=js,
        preprocess=False,
        postprocess=False,
        concurrency_id=MEASURE,
        concurrency_limit=1,
        **QUIET,
    )
    running.failure(lambda: pays.failed(REFUSED), None, view, **AT_ONCE)  # by the queue, which is full
    leave.click(measure_leave, None, every, cancels=[running], **AT_ONCE)
    stop.click(measure_halt, None, None, **AT_ONCE)
    blocks.unload(measure_halt)
    return running.then(measure_rest, None, [go, leave, stop], **AT_ONCE)


def _views(desk: Desk, visitor: str, wanted: Any) -> Iterator[View]:
    """The views of a job; what cannot be measured ends in a sentence. What a page sends may be anything."""
    try:
        yield from desk.run(visitor, wanted())
    except (UserError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        said = str(error) if isinstance(error, UserError) else "This is nothing that can be measured."
        yield View(pays.failed(said))


def _of_race(engine: Engine, asked: str) -> Wanted:
    """What the page holds of its finished race."""
    head = json.loads(asked) if isinstance(asked, str) else None
    if not isinstance(head, dict) or "request" not in head:
        raise SettingsError("race", NO_RACE)
    here, there = engine.status().pair or {}, head.get("pair") or {}
    if here and there.get("target") != portable(here.get("target")):  # a page gets no directory of this machine
        raise SettingsError("race", "This race was run on another model; race the prompt again first.")
    return Wanted.of_race(head["request"])


def _visitor(request: gr.Request, kind: str) -> str:
    return f"{request.session_hash}/{kind}"


class Reports:
    """The reports of the last few jobs, as files by visitor."""

    def __init__(self, keep: int = 6) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="spec-decode-")
        self._paths: OrderedDict[str, dict[str, str]] = OrderedDict()
        self._keep = keep

    def write(self, visitor: str, reports: dict[str, str]) -> None:
        """Writes these texts to files of these names."""
        self.forget(visitor)
        folder = Path(self._folder.name) / secrets.token_hex(4)
        folder.mkdir()
        for name, text in reports.items():
            (folder / name).write_text(text, encoding="utf-8")
        self._paths[visitor] = {name: str(folder / name) for name in reports}
        while len(self._paths) > self._keep:
            self.forget(next(iter(self._paths)))

    def forget(self, visitor: str) -> None:
        """Deletes the files of a visitor."""
        for path in list(self._paths.pop(visitor, {}).values())[:1]:
            shutil.rmtree(Path(path).parent, ignore_errors=True)

    def paths(self, visitor: str) -> dict[str, str]:
        """The files of a visitor by name."""
        return dict(self._paths.get(visitor, {}))
