"""What happens on the page: every event, and the function behind it.

In: the components of a page and its engine. A press of Run goes in three steps: `check` (at once)
validates the form and issues a ticket; the ticket's change starts `stream` in Gradio's queue, one at a time for the
device; `rest` puts the buttons back whatever happened. While a visitor waits, the button Stop leaves the queue; once
the race runs, another Stop ends it within one round and keeps what was generated.
"""

from __future__ import annotations

import secrets
import tempfile
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from ..errors import ModelError, PromptError
from .controls import help_updates
from .engine import Engine, Status
from .feed import Feeds, idle
from .form import CONTROLS, problem, settings_from_form
from .run import Asked, run

DEVICE = "device"  # concurrency id: one race at a time
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
AT_ONCE: dict[str, Any] = {"queue": False, **QUIET}


@dataclass(frozen=True, eq=False)
class Page:
    """The components that events read or write; `controls` has one for each of `form.CONTROLS`."""

    prompt: gr.Textbox
    system: gr.Textbox
    drafter: gr.Dropdown
    controls: dict[str, Any]
    go: gr.Button
    leave: gr.Button
    stop: gr.Button
    clear: gr.Button
    retry: gr.Button
    truncate: gr.Button
    note: gr.HTML
    status: gr.HTML
    view: gr.HTML
    plots: gr.HTML
    download: gr.DownloadButton
    ticket: gr.State
    timer: gr.Timer


def wire(engine: Engine, feeds: Feeds, page: Page, blocks: gr.Blocks) -> None:
    """Connect everything."""
    traces = TraceFiles()
    form = list(page.controls.values())
    hidden, shown = gr.update(visible=False), gr.update(visible=True)

    def poll() -> dict[Any, Any]:
        now = engine.status()
        out = {
            page.status: status_html(now),
            page.go: gr.update(interactive=now.phase == "ready"),
            page.retry: gr.update(visible=now.phase == "failed"),
            page.timer: gr.update(active=now.phase == "loading"),
        }
        if now.phase == "ready":
            out[page.drafter] = gr.update(choices=list(now.drafters), value=now.drafters[0])
        return out

    def again() -> dict[Any, Any]:
        engine.start()
        return {page.timer: gr.update(active=True), page.retry: hidden, page.status: status_html(engine.status())}

    def check(truncate: bool, text: str | None, values: tuple[Any, ...]) -> dict[Any, Any]:
        named = dict(zip(CONTROLS, values, strict=True))
        wrong = problem(named)
        out: dict[Any, Any] = dict(zip(form, help_updates(named, wrong), strict=True))
        if wrong:
            out[page.note] = note_html("See the settings: " + str(wrong))
        elif not (text or "").strip():
            out[page.note] = note_html("Write a prompt first, or take one of the examples.")
        else:
            out |= {
                page.ticket: {"id": secrets.token_hex(8), "truncate": truncate},
                page.note: hidden,
                page.truncate: hidden,
                page.go: hidden,
                page.leave: shown,
                page.status: status_html(engine.status(), "Waiting for the device."),
            }
        return out

    def stream(
        request: gr.Request, ticket: dict[str, Any], text: str, system: str, drafter: str, *values: Any
    ) -> Iterator[dict[Any, Any]]:
        settings = settings_from_form(dict(zip(CONTROLS, values, strict=True)))
        wanted = Asked(str(request.session_hash), text or "", settings, system, drafter, ticket["truncate"])
        yield {page.leave: hidden, page.stop: shown, page.status: status_html(engine.status(), "Racing.")}
        try:
            for view in run(engine, wanted, feeds.open()):
                out: dict[Any, Any] = {page.view: view.tokens}
                if view.figures:
                    out[page.plots] = view.figures
                if view.problem:
                    out[page.note] = note_html(view.problem)
                if view.trace:
                    out[page.download] = gr.update(value=traces.write(view.trace.to_json()), interactive=True)
                yield out
        except PromptError as error:
            yield {page.note: note_html(str(error)), page.truncate: gr.update(visible=error.limit > 0)}
        except ModelError as error:
            yield {page.note: note_html(str(error))}

    def rest() -> dict[Any, Any]:
        now = engine.status()
        ready = gr.update(visible=True, interactive=now.phase == "ready")
        return {page.leave: hidden, page.stop: hidden, page.go: ready, page.status: status_html(now)}

    def stop(request: gr.Request) -> None:
        engine.stop(str(request.session_hash))

    def wipe(request: gr.Request) -> dict[Any, Any]:
        engine.stop(str(request.session_hash))
        return {
            page.prompt: "",
            page.view: idle(),
            page.plots: "",
            page.note: hidden,
            page.truncate: hidden,
            page.download: gr.update(value=None, interactive=False),
        }

    watched = [page.status, page.go, page.retry, page.drafter, page.timer]
    blocks.load(poll, None, watched, **AT_ONCE)
    page.timer.tick(poll, None, watched, **AT_ONCE)
    page.retry.click(again, None, [page.timer, page.retry, page.status], **AT_ONCE)

    asked = [page.prompt, *form]
    checked = [page.ticket, page.note, page.truncate, page.go, page.leave, page.status, *form]
    # a changed gr.State wakes its listeners only when the event went through the queue; this one never waits there
    page.go.click(
        lambda text, *v: check(False, text, v), asked, checked, preprocess=False, concurrency_limit=None, **QUIET
    )
    page.truncate.click(
        lambda text, *v: check(True, text, v), asked, checked, preprocess=False, concurrency_limit=None, **QUIET
    )
    resting = [page.leave, page.stop, page.go, page.status]
    running = page.ticket.change(
        stream,
        [page.ticket, page.prompt, page.system, page.drafter, *form],
        [page.view, page.plots, page.note, page.truncate, page.download, page.leave, page.stop, page.status],
        preprocess=False,
        concurrency_id=DEVICE,
        concurrency_limit=1,
        show_progress="minimal",
        show_progress_on=page.status,
        api_visibility="private",
    )
    running.then(rest, None, resting, **AT_ONCE)
    page.leave.click(rest, None, resting, cancels=[running], **AT_ONCE)
    page.stop.click(stop, None, None, **AT_ONCE)
    cleared = [page.prompt, page.view, page.plots, page.note, page.truncate, page.download]
    page.clear.click(wipe, None, cleared, **AT_ONCE)
    blocks.unload(stop)


def status_html(now: Status, doing: str | None = None) -> str:
    """One line: what is loaded and on what, or what is happening."""
    pair = now.pair or {}
    if now.phase != "ready":
        line = escape(now.message)
    else:
        names = " + ".join(escape(str(pair[key])) for key in ("target", "drafter") if pair.get(key))
        place = ", ".join(escape(str(pair[key])) for key in ("device", "dtype") if pair.get(key))
        line = f"{escape(doing or 'Ready.')} <span>{names} on {place}</span>"
    state = "busy" if doing and now.phase == "ready" else now.phase
    return f'<p role="status" data-state="{state}"><i></i><span>{line}</span></p>'


def note_html(message: str) -> Any:
    """A message under the prompt."""
    return gr.update(value=f'<p role="alert">{escape(message)}</p>', visible=True)


class TraceFiles:
    """Finished traces as files for the download button; only the last few are kept."""

    def __init__(self, keep: int = 16) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="spec-decode-")
        self._files: deque[Path] = deque()
        self._keep = keep

    def write(self, text: str) -> str:
        """The path of a new file with this text."""
        path = Path(self._folder.name) / secrets.token_hex(4) / "spec-decode-trace.json"
        path.parent.mkdir()
        path.write_text(text, encoding="utf-8")
        self._files.append(path)
        while len(self._files) > self._keep:
            old = self._files.popleft()
            old.unlink(missing_ok=True)
            old.parent.rmdir()
        return str(path)
