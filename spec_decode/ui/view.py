"""`TokenView`: the two lanes of a race with their score board, inspector and timeline, for any Gradio page.

In: a trace, or batches of a race that runs. Out: a component. docs/token_view.md has examples. Loads no model.
"""

from __future__ import annotations

import json
from typing import Any

import gradio as gr

from ..errors import UserError
from ..events import Trace
from ..session.feed import Feed, Feeds, idle
from ..session.still import still
from .components import SCRIPTS, asset, given, script
from .terms import TERMS

PAGE = ("branch.js", "tour.js", "page.js")  # scripts of the app's own page
GUEST = [*(name for name in SCRIPTS if name not in PAGE and name != "token_view.js"), "guest.js", "token_view.js"]


def TokenView(value: Any = None, **options: Any) -> gr.HTML:  # noqa: N802  # used like the class of a component
    """A view of a race, to be placed in `gr.Blocks` and to be the output of events. Several may stand on a page.

    A function and not a subclass, for Gradio writes a stub file beside the module of a subclass.

    Args:
        value: what is shown, or what an event returns: a `Trace`, its JSON as a dictionary or text, a batch of
            `session.feed.Feed`, which adds to what is shown, or None for an empty view.
        options: of `gr.HTML`: `elem_id`, `visible`, `scale` and others.

    Returns:
        The component. Its method `feed()` gives a `Feed` for a race that is streamed; see docs/token_view.md.

    Raises:
        gr.Error: in one sentence, the value is no trace and no batch.
    """
    feeds = Feeds()

    def missing(asked: str) -> str:
        return feeds.missing(asked)

    view = gr.HTML(
        shown(value),
        html_template=asset("token_view.html"),
        js_on_load=given(terms=TERMS, sheet=asset("app.css")) + script(*GUEST),
        apply_default_css=False,
        server_functions=[missing],
        elem_classes=["sd-guest", *_classes(options.pop("elem_classes", None))],
        **options,
    )
    view.postprocess = shown  # type: ignore[method-assign]
    view.feed = feeds.open  # type: ignore[attr-defined]
    return view


def shown(value: Any) -> str:
    """The text that the view gets for a value; see `TokenView`.

    Raises:
        gr.Error: the value is no trace and no batch.
    """
    if value is None or value == "":
        return idle()
    if isinstance(value, str) and _is_batch(value):
        return value
    try:
        trace = value if isinstance(value, Trace) else Trace.from_json(_text(value))
        return still(trace, Feed())
    except (UserError, ValueError, TypeError, RecursionError) as error:
        raise gr.Error(f"This cannot be shown: {error}.".replace("..", "."), print_exception=False) from error


def _is_batch(text: str) -> bool:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(data, dict) and {"run", "from", "rounds"} <= data.keys()


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _classes(given: list[str] | str | None) -> list[str]:
    return [given] if isinstance(given, str) else list(given or ())
