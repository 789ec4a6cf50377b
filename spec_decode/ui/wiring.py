"""What happens on the page: every event, and the function behind it.

In: the components of a page and its engine. A press of Run goes in three steps: `check` (at once) validates the form
and issues a ticket; the ticket's change starts `stream` in Gradio's queue, one at a time for the device; `rest` puts
the buttons back whatever happened. There are two buttons Stop, of which the style sheet shows one: while a visitor
waits it leaves the queue, once the race runs it ends within one round and keeps what came. Where the source plays a
recording, Run plays that and the form counts for nothing.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from ..errors import PromptError, UserError
from ..loading.embedded import NAME as TINY
from ..request import Request
from ..session.branch import branch
from ..session.caption import on_place
from ..session.device import Engine, Status
from ..session.feed import Feeds, idle
from ..session.stream import run
from .branch import Rounds, drafting, read
from .controls import Panel, help_updates
from .form import CONTROLS, drafter_help, named, problem, settings_from_form
from .linked import ADDRESS, wanted
from .terms import marked

DEVICE = "device"  # concurrency id: one race at a time
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
AT_ONCE: dict[str, Any] = {"queue": False, **QUIET}
TINY_ON_PURPOSE = (
    "This model is tiny on purpose, 135 million parameters, so that it runs anywhere. Its answers are often wrong; "
    "look at the speed, and at whether both texts are the same. There are larger pairs."
)


@dataclass(frozen=True, eq=False)
class Page:
    """The components that events read or write."""

    prompt: gr.Textbox
    panel: Panel
    go: gr.Button
    leave: gr.Button
    stop: gr.Button
    clear: gr.Button
    retry: gr.Button
    truncate: gr.Button
    note: gr.HTML
    status: gr.HTML
    view: gr.HTML
    link: gr.Textbox  # of the page's address, see `share`
    ticket: gr.State
    timer: gr.Timer
    asked: gr.HTML


def wire(engine: Engine, feeds: Feeds, page: Page, blocks: gr.Blocks) -> None:
    """Connect everything."""
    outcomes, rounds = Outcomes(), Rounds(engine)
    panel, form = page.panel, list(page.panel.controls.values())
    hidden, shown = gr.update(visible=False), gr.update(visible=True)

    def poll(fragment: str = "") -> dict[Any, Any]:
        now = engine.status()
        out = {
            page.status: status_html(now),
            page.go: gr.update(interactive=now.phase == "ready"),
            page.retry: gr.update(visible=now.phase == "failed"),
            page.timer: gr.update(active=now.phase == "loading"),
        }
        if now.phase == "absent":
            out[page.prompt] = gr.update(interactive=False, placeholder="There is no model here to ask.")
        if now.phase == "ready":
            own, thinking = wanted(fragment, now.drafters, bool(now.thinking))
            out[page.status] = status_html(now, drafter=own)
            out[panel.drafter] = gr.update(choices=named(now.drafters), value=own, info=drafter_help(own))
            out[panel.thinking] = gr.update(visible=now.thinking is not None, value=thinking)
            if now.recording:
                out[page.prompt] = gr.update(value=now.recording.request.prompt, interactive=False)
        return out

    def again() -> dict[Any, Any]:
        engine.start()
        return {page.timer: gr.update(active=True), page.retry: hidden, page.status: status_html(engine.status())}

    def chosen(drafter: str, shown: str) -> dict[Any, Any]:
        # while a race waits or runs, the status goes on naming the drafter of that race
        status = gr.skip() if 'data-state="busy"' in shown else status_html(engine.status(), drafter=drafter)
        return {page.status: status, panel.drafter: gr.update(info=drafter_help(drafter))}

    def check(truncate: bool, text: str | None, drafter: str, *values: Any) -> dict[Any, Any]:
        named = dict(zip(CONTROLS, values, strict=True))
        now = engine.status()
        wrong = None if now.recording else problem(named, engine.limits)
        out: dict[Any, Any] = dict(zip(form, help_updates(named, wrong), strict=True))
        if wrong:
            out[page.note] = note_html("See the settings: " + str(wrong))
        elif not now.recording and (unusable := _unusable(text)):
            out[page.note] = note_html(unusable)
        else:
            out |= {
                page.ticket: {"id": secrets.token_hex(8), "truncate": truncate},
                **busy(drafter),
            }
        return out

    def busy(drafter: str) -> dict[Any, Any]:
        return {
            page.note: hidden,
            page.truncate: hidden,
            page.go: hidden,
            page.leave: shown,
            page.stop: shown,
            page.status: status_html(engine.status(), busy=True, drafter=drafter),
        }

    def stream(
        request: gr.Request,
        ticket: dict[str, Any],
        text: str,
        system: str,
        keep_system: bool,
        drafter: str,
        thinking: bool,
        *values: Any,
    ) -> Iterator[str]:
        if not isinstance(ticket, dict) or "id" not in ticket:  # no page sends this: `check` gives the ticket out
            raise gr.Error("There is no race to run; press Run first.", print_exception=False)

        def made() -> Request:
            if recording := engine.status().recording:
                return recording.request
            return Request(
                text,
                settings_from_form(dict(zip(CONTROLS, values, strict=True))),
                system=system or None,
                drafter=drafter or None,
                truncate=bool(ticket.get("truncate")),
                thinking=bool(thinking),
            )

        yield from race(str(request.session_hash), made, keep_system)

    def stream_branch(request: gr.Request, asked: str, keep_system: bool) -> Iterator[str]:
        yield from race(str(request.session_hash), lambda: branch(read(asked), engine.limits), keep_system)

    def race(visitor: str, wanted: Callable[[], Request], keep_system: bool) -> Iterator[str]:
        outcomes.put(visitor, Outcome())
        try:
            for view in run(engine, visitor, wanted(), feeds.open(), keep_system=bool(keep_system)):
                if view.trace:
                    outcomes.put(visitor, Outcome(view.problem or view.notice))
                yield view.batch
        except PromptError as error:
            outcomes.put(visitor, Outcome(str(error), truncate=error.limit > 0))
        except UserError as error:
            outcomes.put(visitor, Outcome(str(error)))

    def rest(request: gr.Request, drafter: str) -> dict[Any, Any]:
        now, outcome = engine.status(), outcomes.take(str(request.session_hash))
        return {
            page.leave: hidden,
            page.stop: hidden,
            page.go: gr.update(visible=True, interactive=now.phase == "ready"),
            page.status: status_html(now, drafter=drafter),
            page.note: note_html(outcome.problem) if outcome.problem else hidden,
            page.truncate: gr.update(visible=outcome.truncate),
        }

    def leave_round(request: gr.Request, asked: str) -> None:
        rounds.leave(drafting(request), asked)
        engine.stop(drafting(request))

    def stop(request: gr.Request) -> None:
        for visitor in (str(request.session_hash), drafting(request)):
            engine.stop(visitor)

    def wipe(request: gr.Request) -> dict[Any, Any]:
        stop(request)
        recording = engine.status().recording
        return {
            page.prompt: recording.request.prompt if recording else "",
            page.view: idle(),
            page.note: hidden,
            page.truncate: hidden,
        }

    watched = [page.status, page.go, page.retry, panel.drafter, panel.thinking, page.timer, page.prompt]
    blocks.load(poll, page.link, watched, js=ADDRESS, **AT_ONCE)
    page.timer.tick(poll, page.link, watched, js=ADDRESS, **AT_ONCE)
    page.retry.click(again, None, [page.timer, page.retry, page.status], **AT_ONCE)

    panel.drafter.input(chosen, [panel.drafter, page.status], [page.status, panel.drafter], preprocess=False, **AT_ONCE)
    asked = [page.prompt, panel.drafter, *form]
    checked = [page.ticket, page.note, page.truncate, page.go, page.leave, page.stop, page.status, *form]
    # a changed gr.State wakes its listeners only when the event went through the queue; this one never waits there
    page.go.click(
        lambda *asked: check(False, *asked), asked, checked, preprocess=False, concurrency_limit=None, **QUIET
    )
    page.truncate.click(
        lambda *asked: check(True, *asked), asked, checked, preprocess=False, concurrency_limit=None, **QUIET
    )
    resting = [page.leave, page.stop, page.go, page.status, page.note, page.truncate]
    # One output, taken as it is: Gradio builds a component anew for every update of a property, several times a
    # second, and even for outputs that are skipped. All that can wait for the end of the race waits for `rest`.
    racing: dict[str, Any] = {
        "preprocess": False,
        "postprocess": False,
        "concurrency_id": DEVICE,
        "concurrency_limit": 1,
        "show_progress": "minimal",
        "show_progress_on": page.status,
        "api_visibility": "private",
    }
    running = page.ticket.change(
        stream,
        [page.ticket, page.prompt, panel.system, panel.keep_system, panel.drafter, panel.thinking, *form],
        page.view,
        **racing,
    )
    running.then(rest, panel.drafter, resting, preprocess=False, **AT_ONCE)
    # What the page asks stands in the value of a component, which is sent again with every event.
    held = [page.note, page.truncate, page.go, page.leave, page.stop, page.status]
    branching = page.asked.submit(busy, panel.drafter, held, preprocess=False, **AT_ONCE).then(
        stream_branch,
        [page.asked, panel.keep_system],
        page.view,
        **racing,
    )
    branching.then(rest, panel.drafter, resting, preprocess=False, **AT_ONCE)
    page.asked.input(
        rounds.draft_round,
        page.asked,
        page.asked,
        trigger_mode="multiple",  # a question after one that was taken back, which has not been answered yet
        preprocess=False,
        postprocess=False,
        concurrency_id=DEVICE,
        concurrency_limit=1,
        **QUIET,
    )
    page.asked.clear(leave_round, page.asked, None, preprocess=False, **AT_ONCE)
    page.leave.click(rest, panel.drafter, resting, preprocess=False, cancels=[running, branching], **AT_ONCE)
    page.stop.click(stop, None, None, **AT_ONCE)
    page.clear.click(wipe, None, [page.prompt, page.view, page.note, page.truncate], **AT_ONCE)
    blocks.unload(stop)


def status_html(now: Status, busy: bool = False, drafter: str | None = None) -> str:
    """What is loaded and on what, or what is happening; `drafter` is the one this visitor chose. A recording is marked
    as one, with its machine and date. Whether a visitor who asked for a race still waits for it is known to the token
    view, which tells the style sheet, and adds the place in the queue."""
    tiny = ""
    if now.phase != "ready" or not now.pair:
        line = escape(now.message)
    else:
        ran = on_place(now.pair | {"drafter": drafter or now.pair.get("drafter")})
        waits = "<b class='sd-waits'>Waiting for the device<span class='sd-place'></span>.</b>"
        runs, rests = ("Playing the recording.", "Recording.") if now.recording else ("Racing.", "Ready.")
        recorded = f", {escape(str(now.recording))}{'' if busy else '. Press Run to play it.'}" if now.recording else ""
        doing = f"{waits}<b class='sd-runs'>{runs}</b>" if busy else f"<b>{rests}</b>"
        line = f"{doing} <span>{marked(ran)}{recorded}</span>"
        if now.pair.get("target") == TINY and not now.recording:
            tiny = f'<p class="sd-tiny">{marked(TINY_ON_PURPOSE)}</p>'
    state = "busy" if busy and now.phase == "ready" else now.phase
    mark = " data-recording" if now.recording else ""
    return f'<p role="status" data-state="{state}"{mark}><i></i><span>{line}</span></p>{tiny}'


def _unusable(text: object) -> str | None:
    """What is wrong with a prompt, as far as can be told without the model."""
    if text is None or (isinstance(text, str) and not text.strip()):
        return "Write a prompt first, or take one of the examples."
    try:
        Request(text)  # type: ignore[arg-type]  # what a page sends may be anything
    except PromptError as error:
        return str(error)
    return None


def note_html(message: str) -> Any:
    """A message under the prompt."""
    return gr.update(value=f'<p role="alert">{escape(message)}</p>', visible=True)


@dataclass(frozen=True)
class Outcome:
    """What a race leaves for the page: a message, and whether truncating would help."""

    problem: str | None = None
    truncate: bool = False


class Outcomes:
    """Outcomes of races by visitor, until the page asks. Only the last few are kept, for a program never asks."""

    def __init__(self, keep: int = 64) -> None:
        self._outcomes: OrderedDict[str, Outcome] = OrderedDict()
        self._keep = keep

    def __len__(self) -> int:
        return len(self._outcomes)

    def put(self, visitor: str, outcome: Outcome) -> None:
        self._outcomes[visitor] = outcome
        self._outcomes.move_to_end(visitor)
        while len(self._outcomes) > self._keep:
            self._outcomes.popitem(last=False)

    def take(self, visitor: str) -> Outcome:
        """What is known, once; an empty outcome when nothing is."""
        return self._outcomes.pop(visitor, Outcome())
