"""The two custom components of the page: `gr.HTML` with our own template and script from assets/.

In: JSON text from `session.feed`. Their templates do not mention the value, so Gradio has nothing to render again
when it changes; the scripts append to the page themselves. The style sheet is page-wide (`theme.py`): Gradio writes a
component's own style sheet anew on every update, which would restyle thousands of tokens ten times a second.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import gradio as gr

from ..paths import ASSETS
from ..session.feed import Feeds, idle
from .terms import TERMS


def asset(name: str) -> str:
    """The text of a file in assets/."""
    return (ASSETS / name).read_text(encoding="utf-8")


@cache
def script(*names: str) -> str:
    """The scripts of assets/, one after the other, without indentation and lines of comment, an eighth of what a page
    transfers of them. No text in them spans lines (tests/test_ui_app.py)."""
    return re.sub(r"(?m)^[ \t]+(?://.*\n)?|^//.*\n", "", "\n".join(map(asset, names)))


def given(**data: Any) -> str:
    """A line of script that makes `data` known as `given`, for scripts that need values that never change. They are no
    `props` of `gr.HTML`, for Gradio writes all of those as JSON and copies them whenever one of them changes, which for
    the value of the token view is a dozen times a second."""
    return f"const given = {json.dumps(data, ensure_ascii=False, separators=(',', ':'))};\n"


# of the token view, in this order; all but the last four know nothing of Gradio
SCRIPTS = (
    "trace.js",
    "explain.js",
    "view.js",
    "card.js",
    "inspector.js",
    "timeline.js",
    "player.js",
    "branch.js",
    "tour.js",
    "page.js",
    "token_view.js",
)


def token_view(
    feeds: Feeds, recordings: Sequence[dict[str, Any]] = (), steps: Sequence[dict[str, str]] = ()
) -> gr.HTML:
    """The two lanes and the score board; its value is a batch of `feed.Feed`. It also explains the `terms` of the page,
    and plays the first of `recordings` (`recordings.shipped`) until a race begins. `steps` (`tour.offered`) are what
    its tour offers at the end.

    Where the view missed batches it calls the server function `missing`, which looks them up in `feeds`.
    """

    def missing(asked: str) -> str:
        return feeds.missing(asked)

    return gr.HTML(
        idle(),
        html_template=asset("token_view.html"),
        js_on_load=given(terms=TERMS, steps=list(steps), recordings=[*recordings[:1], *map(_on_demand, recordings[1:])])
        + script(*SCRIPTS),
        apply_default_css=False,
        server_functions=[missing],
        elem_id="sd-token-view",
    )


def _on_demand(recording: dict[str, Any]) -> dict[str, Any]:
    """This recording with the address of its file in place of its trace, which the page then fetches when it is
    picked. One without a file stays as it is."""
    if "path" not in recording:
        return recording
    gr.set_static_paths([recording["path"]])
    return recording | {"trace": "", "address": f"gradio_api/file={recording['path']}"}


def figures() -> gr.HTML:
    """The four figures. Their series (`curves.Curves.live`, `curves.final`) come in batches of the token view, which
    hands them on in the page: one wire, one output for Gradio to process.

    `gr.Plot` builds a figure anew for each update, which flickers and loses the visitor's place, so the figures are
    drawn here by `Plotly.react`, with the basic bundle of plotly.js, which has lines, markers and bars. It is served
    from this machine. The whole plotly.js, which the plotly package ships, has four times its size, and a browser is
    blocked for most of a second while it reads that.
    """
    plotly = ASSETS / "plotly-basic.min.js"
    gr.set_static_paths([plotly])
    return gr.HTML(
        "",
        html_template=asset("figures.html"),
        js_on_load=script("figures.js"),
        apply_default_css=False,
        plotly=f"gradio_api/file={plotly}",
        elem_id="sd-figures",
    )
