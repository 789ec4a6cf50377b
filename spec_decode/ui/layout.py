"""The page: what stands where. What happens on a click is in `wiring`.

In: an `Engine`. Out: `gr.Blocks`, and the options its `launch` needs.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from typing import Any

import gradio as gr
from gradio.events import api
from starlette.middleware import Middleware

from ..paths import ASSETS
from ..session.device import Engine
from ..session.feed import Feeds
from ..session.pays import Desk
from ..session.recordings import shipped
from .api import endpoints
from .branch import asked
from .components import asset, figures, token_view
from .controls import settings_panel
from .head import TITLE, Head, routes
from .lab import lab_tab
from .pays import MEASURE, measure_panel, pays_tab
from .pins import pinned
from .server import Guard, Server
from .share import ask, connect, share_row
from .share import routes as replay_file
from .theme import style, theme
from .tour import offered, wire_tour
from .wiring import DEVICE, QUIET, Page, status_html, wire


def launch_options() -> dict[str, Any]:
    """Keyword arguments for `Blocks.launch` (Gradio takes the look of a page there)."""
    return {
        "theme": theme(),
        "head": style(),
        "favicon_path": ASSETS / "icon.png",
        "app_kwargs": {"middleware": [Middleware(Head)], "routes": [*routes(), *replay_file()]},
        "footer_links": ["api", "gradio"],
        "ssr_mode": False,
        "quiet": True,
    }


def examples() -> list[dict[str, str]]:
    """The example prompts: {"id", "category", "prompt"} each."""
    return [json.loads(line) for line in asset("examples.jsonl").splitlines() if line.strip()]


def build(engine: Engine, max_queue: int = 32, recordings: bool = True) -> gr.Blocks:
    """The page over this engine; `max_queue` visitors may wait, the next is told to come back later. With `recordings`
    it plays one of those that come with it until the visitor runs a race."""
    feeds = Feeds()
    with Server(title=TITLE, analytics_enabled=False, fill_width=True, delete_cache=(600, 3600)) as blocks:
        _html(asset("header.html"), "sd-header")
        lab, measure, desk = engine.limits.lab, engine.limits.measure, Desk(engine)
        several = lab or measure
        tabs = gr.Tabs(elem_id="sd-tabs", overflow_behavior="wrap") if several else nullcontext()
        with tabs, gr.Tab("Race", id="race") if several else nullcontext(), gr.Row(elem_id="sd-page"):
            with gr.Column(elem_id="sd-rail", min_width=280, scale=0):
                prompt = gr.Textbox(
                    label="Prompt",
                    lines=5,
                    max_lines=12,
                    elem_id="sd-prompt",
                    placeholder="Ask for something, or take an example below.",
                )
                note = _html("", "sd-note", visible=False)
                truncate = gr.Button("Truncate and run", size="sm", elem_id="sd-truncate", visible=False)
                with gr.Row(elem_id="sd-buttons"):
                    go = gr.Button("Run", variant="primary", elem_id="sd-run", interactive=False, min_width=80, scale=2)
                    leave = gr.Button("Stop", elem_id="sd-leave", visible=False, min_width=80, scale=2)
                    stop = gr.Button("Stop", elem_id="sd-stop", visible=False, min_width=80, scale=2)
                    clear = gr.Button("Clear", elem_id="sd-clear", min_width=80, scale=1)
                ask()
                status = _html("", "sd-status")
                retry = gr.Button("Try again", size="sm", elem_id="sd-retry", visible=False)
                with gr.Row(elem_id="sd-examples"):
                    for example in examples():
                        chip = gr.Button(
                            example["id"].replace("-", " "), size="sm", min_width=0, scale=0, elem_classes="sd-chip"
                        )
                        chip.click(None, None, prompt, js=f"() => {json.dumps(example['prompt'])}", **QUIET)
                with gr.Accordion("Settings", open=False, elem_id="sd-settings"):
                    panel = settings_panel()
                    most = panel.controls["max_new_tokens"]
                    most.value = min(most.value, engine.limits.new_tokens or most.value)
            with gr.Column(elem_id="sd-main", min_width=320):
                view = token_view(feeds, shipped() if recordings else (), offered(lab))
                with gr.Row(elem_id="sd-after"):
                    share = share_row()
                figures()
                if measure:
                    measure_panel(desk, blocks)
                pinned(engine, prompt, panel)
        if measure:
            with tabs, gr.Tab("Does it pay?", id="pays"):
                pays_tab(desk, blocks, panel, examples())
        broken = None
        if lab:
            with tabs, gr.Tab("Exactness lab", id="lab"):
                broken = lab_tab(engine)
        wire(
            engine,
            feeds,
            page := Page(
                prompt=prompt,
                panel=panel,
                go=go,
                leave=leave,
                stop=stop,
                clear=clear,
                retry=retry,
                truncate=truncate,
                note=note,
                status=status,
                view=view,
                link=share.link,
                ticket=gr.State({}),
                timer=gr.Timer(0.5),
                asked=asked(),
            ),
            blocks,
        )
        connect(engine, share, page)
        wire_tour(engine, prompt, panel, (tabs, broken) if broken and isinstance(tabs, gr.Tabs) else None)
        for name, endpoint in endpoints(engine).items():
            api(endpoint, api_name=name, concurrency_id=DEVICE, concurrency_limit=1)
    blocks.queue(max_size=max_queue, api_open=False)
    # Gradio looks for new events a thousand times a second, in the process that decodes; fifty times is soon enough.
    blocks._queue.sleep_when_free = 0.02
    blocks.guard = Guard(engine, blocks, DEVICE, MEASURE)
    blocks.current = {status._id: lambda: status_html(engine.status())}
    return blocks


def _html(value: str, elem_id: str, visible: bool = True) -> gr.HTML:
    return gr.HTML(value, elem_id=elem_id, apply_default_css=False, js_on_load=None, visible=visible)
