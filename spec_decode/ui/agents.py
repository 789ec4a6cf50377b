"""The endpoints as tools for agents, by Gradio's MCP server: `app.py --mcp`.

In: the page. Out: why it cannot serve them, and answers that are JSON.
"""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import gradio as gr

PATH = "gradio_api/mcp/"  # where Gradio serves them
MISSING = "Tools for agents need the package mcp below version 2: pip install -r requirements-mcp.txt"


def unavailable() -> str | None:
    """Why tools cannot be served here, in one sentence; None where they can."""
    return None if importlib.util.find_spec("mcp") else MISSING


def answer_in_json(blocks: gr.Blocks) -> None:
    """Lets the MCP server of this page, where it has one, answer with short JSON. Gradio's own answer to an agent is
    the object as Python prints it."""
    server = blocks.mcp_server_obj
    if server is None:
        return

    def content(data: Any, root_url: str) -> list[Any]:
        texts = [json.dumps(_short(each), ensure_ascii=False) for each in data]
        return [server.types.TextContent(type="text", text=text) for text in texts]

    server.postprocess_output_data = content  # type: ignore[method-assign]


def _short(value: Any) -> Any:
    """The value with five significant digits in each of its numbers that are not whole."""
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_short(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
