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
from ..rules import default
from ..session.device import Engine
from ..settings import Settings
from .components import asset, script
from .controls import Panel
from .form import CONTROLS
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
            wanted = Request.from_dict(json.loads(asked))
        except (UserError, TypeError, ValueError, RecursionError):  # what a page sends may be anything
            return [gr.skip()] * (3 + len(controls))
        offered = engine.status().drafters
        drafter = wanted.drafter or (offered[0] if offered else None)
        values = form_values(wanted.settings)
        return [
            wanted.prompt,
            drafter if drafter in offered else gr.skip(),
            wanted.thinking,
            *(values[name] for name in CONTROLS),
        ]

    pins.input(pins_restore, pins, [prompt, panel.drafter, panel.thinking, *controls], **AT_ONCE)


def form_values(settings: Settings) -> dict[str, Any]:
    """What the controls show for these settings, by the names in `form.CONTROLS`; `form.settings_from_form` is its
    inverse."""
    fixed = isinstance(settings.draft_length, int)
    values = settings.to_dict()
    values["policy"] = "fixed" if fixed else settings.draft_length
    values["draft_length"] = settings.draft_length if fixed else 4
    if settings.rule == default(settings.temperature).name:
        values["rule"] = "auto"
    return {name: values[name] for name in CONTROLS}
