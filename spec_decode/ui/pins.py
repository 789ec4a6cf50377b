"""Pinned results: rows that a visitor's browser keeps, and the settings of one of them put back into the form.

In: the form. Out: the component, wired. Rows, comparison and export are in assets/pins.js; the server sees a row only
when its settings are to go into the form, where they are validated as any request is.
"""

from __future__ import annotations

import json
from typing import Any

import gradio as gr

from ..errors import UserError
from ..request import Request
from ..session.device import Engine
from .components import asset, script
from .controls import Panel
from .form import CONTROLS
from .linked import form_values
from .wiring import AT_ONCE


def pinned(engine: Engine, prompt: gr.Textbox, panel: Panel) -> None:
    """Makes and wires the pinned results."""
    pins = gr.HTML(
        "",
        html_template=asset("pins.html"),
        js_on_load=script("pins.js"),
        apply_default_css=False,
        elem_id="sd-pins",
    )
    controls = [panel.controls[name] for name in CONTROLS]

    def pins_restore(asked: str) -> list[Any]:
        try:
            data = json.loads(asked)
            wanted = Request.from_dict(data)
        except (UserError, TypeError, ValueError, RecursionError):  # what a page sends may be anything
            wanted = None
        if wanted is None or wanted.settings.synthetic:  # which the form has no place for
            return [gr.skip()] * (4 + len(controls))
        offered = engine.status().drafters
        drafter = wanted.drafter or (offered[0] if offered else None)
        values = form_values(wanted)
        return [
            wanted.prompt,
            drafter if drafter in offered else gr.skip(),
            wanted.thinking,
            (wanted.system or "") if "system" in data else gr.skip(),  # what it was is not always known
            *(values.get(name, gr.skip()) for name in CONTROLS),
        ]

    pins.input(pins_restore, pins, [prompt, panel.drafter, panel.thinking, panel.system, *controls], **AT_ONCE)
