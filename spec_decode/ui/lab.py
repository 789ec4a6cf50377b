"""The tab "Exactness lab": its form, its view, and what happens on Run and Stop.

In: an `Engine`. Out: the components, wired. A test waits in the device's queue like a race. The view is a `gr.HTML`
with a template and script of ours, as in `components`; its value is JSON of `session.lab`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from ..errors import UserError
from ..prove.setup import DRAFTERS, SEEDS, WRONG, setup
from ..rules import RULES
from ..session import lab
from ..session.device import Engine
from ..session.feed import dumps
from .components import asset, script
from .wiring import AT_ONCE, DEVICE, QUIET

BROKEN = (
    "A draft that is the drafter’s argmax is judged by p / q of a distribution it was not drawn from. A well-known "
    "library samples so. No race can choose this rule."
)
UNUSED = "Not used while the rule is broken."
LENGTHS = [*((str(n), str(n)) for n in range(1, 9)), ("adaptive", "adaptive")]


def lab_tab(engine: Engine) -> gr.Checkbox:
    """Makes and wires the contents of the tab. Returns the switch that breaks the rule."""
    with gr.Row(elem_id="sd-lab"):
        with gr.Column(elem_id="sd-lab-rail", min_width=280, scale=0):
            rule = gr.Dropdown(
                [(rule.label, rule.name) for rule in RULES.values()],
                value="rejection",
                label="Rule",
                info=RULES["rejection"].summary,
                elem_id="sd-lab-rule",
            )
            drafter = gr.Dropdown(
                list(DRAFTERS), value="model", label="Drafter", info=DRAFTERS["model"], elem_id="sd-lab-drafter"
            )
            broken = gr.Checkbox(False, label="Break the rule", info=BROKEN, elem_id="sd-lab-broken")
            length = gr.Dropdown(
                LENGTHS, value="3", label="Draft length γ", info="Tokens drafted a round.", elem_id="sd-lab-length"
            )
            temperature = gr.Slider(
                0.1, 2, 1, step=0.1, label="Temperature", info="The greedy rule is 0.", elem_id="sd-lab-temperature"
            )
            seeds = gr.Slider(
                500,
                lab.MOST,
                SEEDS,
                step=500,
                label="Texts",
                info="One for each seed. More texts see a smaller bias.",
                elem_id="sd-lab-seeds",
            )
            with gr.Row(elem_id="sd-lab-buttons"):
                go = gr.Button("Run test", variant="primary", elem_id="sd-lab-run", min_width=80)
                stop = gr.Button("Stop test", elem_id="sd-lab-stop", visible=False, min_width=80)
        with gr.Column(elem_id="sd-lab-main", min_width=320):
            view = gr.HTML(
                lab.idle(),
                html_template=asset("lab.html"),
                js_on_load=script("lab.js"),
                apply_default_css=False,
                level=lab.TEST_LEVEL,
                family=lab.FAMILY,
                elem_id="sd-lab-view",
            )

    hidden, shown = gr.update(visible=False), gr.update(visible=True)

    def lab_begin() -> dict[Any, Any]:
        return {view: lab.waiting(), go: hidden, stop: shown}

    def lab_stream(
        rule: str, drafter: str, broken: bool, length: str, temperature: float, seeds: float
    ) -> Iterator[str]:
        try:
            if broken is True:
                rule, drafter = WRONG, ""
            cold = not broken and rule in RULES and not RULES[rule].samples
            wanted = setup(
                rule,
                drafter or None,
                0.0 if cold else temperature,
                draft_length=length,
                seeds=int(seeds),
            )
            yield from lab.run(engine, wanted)
        except (UserError, TypeError, ValueError, OverflowError) as error:  # what a page sends may be anything
            said = str(error) if isinstance(error, UserError) else "This is no test that can be run."
            yield dumps({"phase": "failed", "words": said})

    def lab_rest() -> dict[Any, Any]:
        return {go: shown, stop: hidden}

    def lab_halt() -> dict[Any, Any]:
        return {view: lab.stopped(), go: shown, stop: hidden}

    def lab_told(rule: str, drafter: str, broken: bool) -> dict[Any, Any]:
        summary = RULES[rule].summary if rule in RULES else ""
        cold = rule in RULES and not RULES[rule].samples and not broken
        return {
            rule_box: gr.update(info=UNUSED if broken else summary, interactive=not broken),
            drafter_box: gr.update(info=UNUSED if broken else DRAFTERS.get(drafter, ""), interactive=not broken),
            temperature_box: gr.update(interactive=not cold),
        }

    rule_box, drafter_box, temperature_box = rule, drafter, temperature
    for control in (rule, drafter, broken):
        control.change(lab_told, [rule, drafter, broken], [rule, drafter, temperature], preprocess=False, **AT_ONCE)
    form = [rule, drafter, broken, length, temperature, seeds]
    running = go.click(lab_begin, None, [view, go, stop], concurrency_limit=None, **QUIET).then(
        lab_stream,
        form,
        view,
        preprocess=False,
        postprocess=False,
        concurrency_id=DEVICE,
        concurrency_limit=1,
        **QUIET,
    )
    running.then(lab_rest, None, [go, stop], **AT_ONCE)
    stop.click(lab_halt, None, [view, go, stop], cancels=[running], **AT_ONCE)
    return broken
