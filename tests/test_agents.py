"""The endpoints as tools: a client of the Model Context Protocol over HTTP, and what it is told."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from ui_fakes import FakeSource, fake_load

import app
from spec_decode.session.device import Limits
from spec_decode.ui import Engine, agents, build, launch_options

pytest.importorskip("mcp")
from mcp import ClientSession
from mcp.client.streamable_http import streamable_http_client

FEW = {"max_new_tokens": 24}


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, FakeSource, Engine]]:
    source = FakeSource(context=2000)
    engine = Engine(fake_load(source))
    page = build(engine)
    _, url, _ = page.launch(prevent_thread_lock=True, mcp_server=True, **launch_options())
    assert page.mcp_error is None
    engine.start()
    while engine.status().phase != "ready":
        time.sleep(0.05)
    yield url + agents.PATH, source, engine
    page.close()


def talked(url: str, talk: Callable[[Any], Awaitable[Any]]) -> Any:
    """What `talk` answers, in a session of its own."""

    async def session() -> Any:
        async with streamable_http_client(url) as (read, write, _), ClientSession(read, write) as client:
            await client.initialize()
            return await talk(client)

    return asyncio.run(session())


def called(url: str, tool: str, **arguments: Any) -> Any:
    """The result of a call; an error comes back as its text."""

    async def call(client: Any) -> Any:
        result = await client.call_tool(tool, arguments, read_timeout_seconds=timedelta(seconds=300))
        (content,) = result.content
        return content.text if result.isError else json.loads(content.text)

    return talked(url, call)


def test_the_tools_are_three_and_say_what_they_take(served: Any) -> None:
    url, _, _ = served
    tools = {tool.name: tool for tool in talked(url, lambda client: client.list_tools()).tools}
    assert set(tools) == {"race", "advise", "prove"}, "nothing of the page itself is a tool"
    required = {"race": ["prompt"], "advise": ["prompts"], "prove": []}
    for name, tool in tools.items():
        assert tool.inputSchema.get("required", []) == required[name]
        assert all(p.get("description") for p in tool.inputSchema["properties"].values()), name
        assert "request" not in tool.inputSchema["properties"] and "Returns: " in tool.description
        told = tool.description + json.dumps(tool.inputSchema)
        assert not [word for word in told.split() if word.strip('.,:"').isupper() and "_" in word], (
            "a word was not told"
        )
    assert "coupled" in tools["race"].inputSchema["properties"]["rule"]["description"]
    assert "0.0005" in tools["prove"].description and "20,000" in str(tools["prove"].inputSchema)
    assert "up to 8" in tools["advise"].inputSchema["properties"]["prompts"]["description"]


def test_a_race_is_a_summary_that_does_not_grow_with_the_text(served: Any) -> None:
    url, _, _ = served
    found = called(url, "race", prompt="hello there", max_new_tokens=1500, draft_length=4)
    assert found["identical"] is True and found["speedup"] > 1 and len(found["interval"]) == 2
    assert found["baseline"]["tokens"] == found["speculative"]["tokens"] == 1500
    text = found["baseline"]["text"]
    assert len(text) == 2000 and found["baseline"]["characters_left_out"] > 2000
    assert len(found["rounds"]) == 8 and found["rounds_left_out"] > 200 and len(json.dumps(found)) < 9000
    first = found["rounds"][1]
    assert len(first["drafted"]) == 4 and 0 <= first["accepted"] <= 4 and first["target"]
    more = called(url, "race", prompt="hello there", max_new_tokens=1500, detail="rounds")
    assert len(more["rounds"]) == 100 and len(json.dumps(more)) < 50_000


def test_progress_is_told_while_a_race_runs(served: Any) -> None:
    url, source, _ = served
    heard: list[str | None] = []

    async def listen(progress: float, total: float | None, message: str | None) -> None:
        heard.append(message)

    source.pace = 1.0
    try:
        talked(url, lambda client: client.call_tool("race", {"prompt": "hello", **FEW}, progress_callback=listen))
    finally:
        source.pace = 0.0
    assert "Processing" in heard


def test_advice_names_a_draft_length_and_the_figures_behind_it(served: Any) -> None:
    url, _, _ = served
    found = called(url, "advise", prompts=["hello there", "tell me more", "and then"], max_new_tokens=48, repeats=2)
    assert found["races"] == found["planned"] == 3 * 2 * 5 and found["notice"] is None and found["identical"] is True
    assert [row["draft_length"] for row in found["measured"]] == [0, 1, 2, 4, 8, "adaptive"]
    for row in found["measured"][1:]:
        assert row["races"] == 6 and row["speedup"]["low"] <= row["speedup"]["median"] <= row["speedup"]["high"]
    assert found["draft_length"] in (1, 2, 4, 8, "adaptive") and found["sentences"][0]["kind"] == "pays"
    assert found["sentences"][0]["figures"]["draft_length"] == found["draft_length"]
    assert found["advice"].startswith("Set ") and len(json.dumps(found)) < 12_000


def test_a_test_refutes_the_broken_rule_and_says_what_it_saw(served: Any) -> None:
    url, _, _ = served
    found = called(url, "prove", rule="wrong", texts=300)
    assert found["verdict"] == "refuted" and found["p_value"] < found["level"] == 0.0005
    assert found["texts"] == 300 and found["degrees_of_freedom"] >= 2 and 0 < found["smallest_bias"] <= 1
    few = called(url, "prove", rule="rejection", texts=100)
    assert few["verdict"] == "cannot tell" and few["p_value"] > 0.0005 and "More seeds" in few["words"]


@pytest.mark.parametrize(
    ("tool", "arguments", "words"),
    [
        ("race", {"prompt": " "}, "The prompt is empty; type something for the model to answer."),
        ("race", {"prompt": "x", "top_p": 2.0}, "Top-p must be a number from 0 to 1"),
        ("race", {"prompt": "x", "detail": "trace"}, "A trace is too long for an agent; ask for"),
        ("race", {"prompt": "x", "detail": "all"}, "Unknown detail 'all'; choose auto, summary, rounds, trace."),
        ("race", {"prompt": "x", "max_new_tokens": "many"}, "Input validation error: 'many' is not of type 'integer'"),
        ("race", {}, "Input validation error: 'prompt' is a required property"),
        ("advise", {"prompts": []}, "Ask about 1 to 8 prompts, not 0."),
        ("advise", {"prompts": ["x"], "max_new_tokens": 257}, "Advice is measured on at most 256 new tokens a lane"),
        ("advise", {"prompts": ["x"], "repeats": 6}, "Repeats must be a whole number from 1 to 5."),
        ("advise", {"prompts": "x", "drafter": "/etc/passwd"}, "Unknown drafter '/etc/passwd'; choose one of"),
        ("advise", {"prompts": ["word " * 4001]}, "A prompt has at most 20,000 characters here."),
        ("prove", {"rule": "nonsense"}, "Unknown rule 'nonsense'; choose one of"),
        ("prove", {"texts": 20_001}, "A test here has at most 20,000 texts."),
        ("prove", {"draft_length": 17}, "Draft length must be"),
    ],
)
def test_a_bad_argument_gives_one_sentence(served: Any, tool: str, arguments: dict[str, Any], words: str) -> None:
    url, _, _ = served
    said = called(url, tool, **arguments)
    assert isinstance(said, str) and said.startswith(words) and "\n" not in said and "Traceback" not in said


def test_a_server_without_the_lab_says_so(served: Any) -> None:
    url, _, engine = served
    before, engine.limits = engine.limits, Limits(lab=False, measure=False)
    try:
        assert called(url, "prove") == "The exactness lab is switched off on this server."
        assert called(url, "advise", prompts="x") == "Measurements for advice are switched off on this server."
        assert called(url, "race", prompt="x", **FEW)["identical"] is True
    finally:
        engine.limits = before


def test_the_flag_is_off_unless_asked_and_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("GRADIO_MCP_SERVER", raising=False)
    assert app.parse([]).mcp is False and app.parse(["--mcp"]).mcp is True
    monkeypatch.setattr(agents.importlib.util, "find_spec", lambda name: None)
    assert app.main(["--mcp"]) == 1
    assert capsys.readouterr().err == f"app.py: {agents.MISSING}.\n"
