"""How branches and a person's drafts reach the device: what the page asks, and the answer to a round.

In: JSON that assets/branch.js sends through a component without a look of its own. Out: data for `session.branch`, and
its answers. The events are in `wiring`, as those of every race.
"""

from __future__ import annotations

import json
from collections import deque
from typing import Any

import gradio as gr

from ..session.branch import one_round
from ..session.device import Engine

# A question becomes the component's value, which both of a branch's events read; an answer comes back as its value.
_WIRE = """
const ask = ({ detail }) => {
  if (!element.isConnected) return document.removeEventListener("sd-ask", ask);
  if (detail.leave) return trigger("clear");
  props.value = JSON.stringify(detail);
  setTimeout(() => trigger(detail.round ? "input" : "submit"), 0);
};
document.addEventListener("sd-ask", ask);
watch("value", () => {
  const said = JSON.parse(props.value || "{}");
  if (said.answer) document.dispatchEvent(new CustomEvent("sd-answer", { detail: said }));
});
"""


def asked() -> gr.HTML:
    """The component that carries questions and answers."""
    return gr.HTML("", html_template="", js_on_load=_WIRE, apply_default_css=False, elem_id="sd-asked")


def read(text: object) -> Any:
    """What the page asks, which may be anything; None for what is no JSON."""
    try:
        return json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return None


def drafting(request: gr.Request) -> str:
    """By which name a visitor's rounds can be stopped."""
    return f"{request.session_hash}/draft"


class Rounds:
    """Answers to questions of one round with a person's draft, of which the page may take one back while it waits for
    the device or runs. Only the last few that were taken back are kept."""

    def __init__(self, engine: Engine, keep: int = 256) -> None:
        self._engine = engine
        self._left: deque[tuple[str, str]] = deque(maxlen=keep)

    def leave(self, visitor: str, asked: object) -> None:
        """The page no longer waits for the answer to this question."""
        self._left.append((visitor, _id(read(asked))))

    def draft_round(self, request: gr.Request, asked: str) -> str:
        """One round, as `session.branch.one_round`."""
        visitor, question = drafting(request), read(asked)
        mine = (visitor, _id(question))
        return one_round(self._engine, visitor, question, gone=lambda: mine in self._left)


def _id(question: object) -> str:
    return str(question.get("id"))[:64] if isinstance(question, dict) else ""
