"""The tour of the page: what it offers at the end. What it shows is assets/tour.js.

In: an `Engine` and components of the page. Out: hidden buttons that the script presses, one for each next step, which
fills the form and runs nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from ..request import Request
from ..session.device import Engine
from ..settings import Settings
from .components import asset
from .controls import Panel
from .form import drafter_help
from .linked import form_values
from .wiring import AT_ONCE

TOKENS = 160  # new tokens of a next step


@dataclass(frozen=True)
class Step:
    """Something to try after the tour: `says` what to look for. `example` is the id of the prompt, `settings`
    are fields of `Settings` that are not the default, `drafter` is the name that is preferred."""

    name: str
    title: str
    says: str
    example: str
    settings: dict[str, Any] = field(default_factory=dict)
    drafter: str = ""

    @property
    def button(self) -> str:
        """The id of the hidden button."""
        return f"sd-next-{self.name}"


STEPS = (
    Step(
        "repeats",
        "Text that repeats",
        "Press Run, and look for long runs of accepted tokens: the answer repeats words of the prompt, and prompt "
        "lookup guesses them at almost no cost.",
        "numbered-steps",
        drafter="lookup",
    ),
    Step(
        "loses",
        "Make it lose: γ = 16",
        "Press Run, and look for long runs of rejected tokens: each round drafts and verifies 16 guesses at prose, and "
        "few are accepted. Below 1× drafting costs more time than it saves; the text is still the same.",
        "harbour",
        {"draft_length": 16, "temperature": 0.8},
    ),
    Step(
        "samples",
        "Sample at T = 1",
        "Press Run, and look at “texts”: tokens are drawn now, and still both lanes show the same text, since the "
        "coupled rule draws with the same noise. Guesses are accepted less often. Another seed gives another text.",
        "rainbow",
        {"temperature": 1.0},
    ),
)
BREAK = {
    "id": "sd-next-breaks",
    "title": "Break exactness",
    "says": "Press Run test: thousands of short texts are decoded with a rule that is wrong on purpose. Look for bars "
    "far from their marks, and for a verdict that refutes the rule.",
    "focus": "sd-lab-run",
}


def offered(lab: bool) -> list[dict[str, str]]:
    """The next steps for the script: {"id": of the button to press, "title", "says", "focus": id of the button that the
    visitor presses next}. Exactness is only broken where there is a `lab`."""
    steps = [{"id": s.button, "title": s.title, "says": s.says, "focus": "sd-run"} for s in STEPS]
    return [*steps, BREAK] if lab else steps


def prompts() -> dict[str, str]:
    """The prompts of the next steps by id: the examples of the page, and the prose that a recording has too."""
    rows = [json.loads(line) for line in asset("examples.jsonl").splitlines() if line.strip()]
    scenes = [json.loads(line) for line in asset("replays/races.jsonl").splitlines() if line.strip()]
    prose = next(scene["request"]["prompt"] for scene in scenes if scene["name"] == "prose")
    return {row["id"]: row["prompt"] for row in rows} | {"harbour": prose}


def wire_tour(engine: Engine, prompt: gr.Textbox, panel: Panel, lab: tuple[gr.Tabs, gr.Checkbox] | None) -> None:
    """The hidden buttons. `lab` is the tabs of the page, and the switch that breaks the rule."""
    texts, form = prompts(), [prompt, panel.drafter, *panel.controls.values()]

    def filling(step: Step) -> Callable[[], dict[Any, Any]]:
        def fill() -> dict[Any, Any]:
            now, most = engine.status(), engine.limits.new_tokens or TOKENS
            settings = Settings(**{"max_new_tokens": min(TOKENS, most), **step.settings})
            wanted = Request(texts[step.example], settings)
            values = {"draft_length": 4, "lenience": settings.lenience, **form_values(wanted)}
            out: dict[Any, Any] = {panel.controls[name]: value for name, value in values.items()}
            if now.drafters:
                name = step.drafter if step.drafter in now.drafters else now.drafters[0]
                out[panel.drafter] = gr.update(value=name, info=drafter_help(name))
            return {**out, prompt: wanted.prompt}

        return fill

    for step in STEPS:
        gr.Button(step.title, visible="hidden", elem_id=step.button).click(filling(step), None, form, **AT_ONCE)
    if lab:
        tabs, broken = lab
        gr.Button(BREAK["title"], visible="hidden", elem_id=BREAK["id"]).click(
            lambda: {tabs: gr.update(selected="lab"), broken: True}, None, [tabs, broken], **AT_ONCE
        )
