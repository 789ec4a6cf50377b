"""The controls of the settings panel, one for each of `form.CONTROLS`, and their lines of help.

In: the values of the form and what is wrong with them. Out: Gradio components, and updates that show a message by the
control it is about.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from .. import rules
from ..errors import SettingsError
from ..settings import MAX_DRAFT_LENGTH, Settings
from .form import CONTROLS, HELP, RULE_HELP, drafter_help, lenient

POLICIES = [("adaptive", "adaptive"), ("rate (from recent acceptance)", "rate"), ("fixed", "fixed")]
RULES = [("auto", "auto"), *((rule.label, rule.name) for rule in rules.RULES.values())]


@dataclass(frozen=True, eq=False)
class Panel:
    """The controls of the settings panel; `controls` has one for each of `form.CONTROLS`, in that order."""

    controls: dict[str, Any]
    drafter: gr.Dropdown
    system: gr.Textbox
    keep_system: gr.Checkbox
    thinking: gr.Checkbox


def settings_panel() -> Panel:
    """Makes the controls, in the order in which they stand."""
    start = Settings()
    c: dict[str, Any] = {}
    c["policy"] = gr.Radio(
        POLICIES,
        value="adaptive",
        label="Draft length",
        info=HELP["policy"],
        elem_id="sd-policy",
    )
    c["draft_length"] = gr.Slider(
        1,
        MAX_DRAFT_LENGTH,
        4,
        step=1,
        label="Draft length γ",
        info=HELP["draft_length"],
        visible=False,
        elem_id="sd-length",
    )
    drafter = gr.Dropdown([], label="Drafter", info=drafter_help(None), elem_id="sd-drafter")
    c["rule"] = gr.Dropdown(RULES, value="auto", label="Rule", info=RULE_HELP["auto"], elem_id="sd-rule")
    c["lenience"] = gr.Slider(
        0.05,
        1,
        start.lenience,
        step=0.05,
        label="Lenience (lossy)",
        info=HELP["lenience"],
        visible=False,
        elem_id="sd-lenience",
    )
    c["temperature"] = gr.Slider(
        0, 2, start.temperature, step=0.05, label="Temperature", info=HELP["temperature"], elem_id="sd-temperature"
    )
    with gr.Row():
        c["top_p"] = _number("top_p", "Top-p", start.top_p, step=0.05)
        c["top_k"] = _number("top_k", "Top-k", start.top_k, step=1)
    with gr.Row():
        c["max_new_tokens"] = _number("max_new_tokens", "Max new tokens", start.max_new_tokens, step=16)
        c["seed"] = _number("seed", "Seed", start.seed, step=1)
    system = gr.Textbox(label="System prompt", lines=2, placeholder="The model’s own, if empty.", elem_id="sd-system")
    keep_system = gr.Checkbox(
        False, label="Keep the system prompt in the trace", elem_id="sd-keep-system", container=False
    )
    thinking = gr.Checkbox(False, label="Let the model think first", elem_id="sd-thinking", visible=False)

    c["policy"].change(
        lambda policy: gr.update(visible=policy == "fixed"),
        c["policy"],
        c["draft_length"],
        queue=False,
        api_visibility="private",
        show_progress="hidden",
    )
    c["rule"].change(
        lambda rule: (gr.update(info=RULE_HELP.get(rule, HELP["rule"])), gr.update(visible=lenient(rule))),
        c["rule"],
        [c["rule"], c["lenience"]],
        queue=False,
        api_visibility="private",
        show_progress="hidden",
    )
    return Panel({name: c[name] for name in CONTROLS}, drafter, system, keep_system, thinking)


def help_updates(values: dict[str, Any], wrong: SettingsError | None) -> list[Any]:
    """An update for every control: its message if it is the wrong one, else its help."""
    field = wrong.field if wrong else None
    if field == "draft_length" and values["policy"] != "fixed":
        field = "policy"
    return [
        gr.update(info=f"⚠ {wrong}", elem_classes=["sd-wrong"])
        if wrong and name == field
        else gr.update(
            info=RULE_HELP.get(str(values["rule"]), HELP["rule"]) if name == "rule" else HELP[name], elem_classes=[]
        )
        for name in CONTROLS
    ]


def _number(name: str, label: str, value: float, step: float) -> gr.Number:
    return gr.Number(
        value, label=label, info=HELP[name], step=step, min_width=120, elem_id=f"sd-{name.replace('_', '-')}"
    )
