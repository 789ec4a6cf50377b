"""Share, open and run again: the row of buttons under the panes, the form filled from a link, and the file that saved
replays are made of.

In: an engine and the components of the page. Out: components, events and a route. The work is done in the browser
(assets/share.js); the server checks what a link holds, as it checks the form, and stores nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse
from starlette.routing import Route

from ..errors import quoted
from ..session.device import Engine
from ..share import link, saved
from .components import script
from .form import CONTROLS, drafter_help, named
from .linked import form_values
from .wiring import Page, note_html, status_html

SCRIPTS = ("about.js", "reading.js", "image.js", "link.js", "compare.js", "share.js")
# What is to be put into the form: what the script of this row says, else the link in the page's address.
WANTED = "(_, seen) => [document.querySelector('.sd-share')?.dataset.fill || location.hash.slice(0, 20000), seen]"
FORM = """(...values) => {{
  const detail = Object.fromEntries({names}.map((name, i) => [name, values[i]]));
  document.dispatchEvent(new CustomEvent("sd-form", {{ detail }}));
}}"""
FILLED = '(said) => { document.dispatchEvent(new CustomEvent("sd-filled", { detail: said })); }'


@dataclass(frozen=True, eq=False)
class Share:
    """`link` holds the fragment of the page's address on its way to the server, `said` why the form was not filled."""

    link: gr.Textbox
    said: gr.Textbox
    fill: gr.Button
    form: gr.Button


def ask() -> gr.HTML:
    """Where a link that asks to run a race is answered."""
    return gr.HTML('<div class="sd-ask"></div>', elem_id="sd-ask", apply_default_css=False, js_on_load=None)


def share_row() -> Share:
    """The row, and the components behind it, which nobody sees."""
    joined = script(*SCRIPTS)
    gr.HTML(
        "",
        html_template='<div class="sd-share"></div>',
        js_on_load=f"""const main = (SpecDecode, view) => {{ {joined} }};
const begin = (tries) => {{
  const race = document.querySelector("#sd-token-view .sd-race");
  if (race?.view?.SpecDecode) main(race.view.SpecDecode, race.view);
  else if (tries) setTimeout(begin, 50, tries - 1);
}};
begin(200);""",
        apply_default_css=False,
        tables=saved.tables(),
        elem_id="sd-share",
    )
    with gr.Row(elem_id="sd-unseen"):
        address, said = (gr.Textbox(show_label=False, elem_id=f"sd-{name}") for name in ("link", "said"))
        return Share(address, said, gr.Button(elem_id="sd-fill"), gr.Button(elem_id="sd-form"))


def connect(engine: Engine, share: Share, page: Page) -> None:
    """The events of the row."""
    prompt, panel, note = page.prompt, page.panel, page.note
    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "queue": False}

    def fill(text: str, seen: str) -> dict[Any, Any]:
        """The form as a link asks for it, or a sentence beneath the prompt."""
        text = text if isinstance(text, str) else ""
        try:
            request = link.parse(text) if text.startswith("{") else link.read(text)
            if request is None:
                return {share.said: "no link"}
            if engine.status().recording:
                raise link.LinkError("This page plays a recording; the link asks for a race, which needs a model.")
        except link.LinkError as error:
            return {share.said: str(error), note: note_html(str(error))}
        now, values = engine.status(), form_values(request)
        out: dict[Any, Any] = {
            panel.controls[name]: gr.update(value=values[name]) for name in CONTROLS if name in values
        }
        out |= {prompt: gr.update(value=request.prompt), share.said: ""}
        out[panel.system] = gr.update(value=request.system or "")
        if request.system:
            out[panel.keep_system] = gr.update(value=True)
        if now.thinking is not None:
            out[panel.thinking] = gr.update(value=request.thinking)
        missing = ""
        if now.phase == "ready":
            known = link.offered(request.drafter, now.drafters)
            own = known or now.drafters[0]
            out[panel.drafter] = gr.update(choices=named(now.drafters), value=own, info=drafter_help(own))
            if 'data-state="busy"' not in str(seen):  # else it goes on naming the drafter of the race
                out[page.status] = status_html(now, drafter=own)
            if request.drafter and not known:
                missing = f"This server does not offer the drafter {quoted(request.drafter)}; its own drafts."
        elif now.phase == "absent":
            missing = "This server has no model, so the race of this link cannot run here."
        out[note] = note_html(missing) if missing else gr.update(visible=False)
        return out

    form = {
        "prompt": prompt,
        "drafter": panel.drafter,
        "system": panel.system,
        "keep_system": panel.keep_system,
        "thinking": panel.thinking,
        **panel.controls,
    }
    share.form.click(None, list(form.values()), None, js=FORM.format(names=list(form)), **quiet)
    filled = [*form.values(), note, share.said, page.status]
    filling = share.fill.click(fill, [share.link, page.status], filled, js=WANTED, **quiet)
    filling.then(None, share.said, None, js=FILLED, **quiet)


def routes() -> list[Route]:
    """The file that a saved replay is made of. By itself it shows what is dropped on it, and asks no server."""

    async def send(_: HttpRequest) -> HTMLResponse:
        return HTMLResponse(
            saved.shell(), headers={"cache-control": "max-age=600", "x-content-type-options": "nosniff"}
        )

    return [Route("/replay.html", send)]
