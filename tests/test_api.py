"""The endpoint `/race`, called as a program would."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from ui_fakes import FakeSource, fake_load

from spec_decode.events import Trace
from spec_decode.ui import Engine, build, launch_options


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Client, FakeSource, str]]:
    source = FakeSource(context=300)
    engine = Engine(fake_load(source))
    page = build(engine)
    _, url, _ = page.launch(prevent_thread_lock=True, **launch_options())
    engine.start()
    while engine.status().phase != "ready":
        time.sleep(0.05)
    yield Client(url, verbose=False), source, url
    page.close()


def test_a_race_comes_back_as_a_trace(served: Any) -> None:
    client, _, _ = served
    data = client.predict("hello there", max_new_tokens=12, seed=3, draft_length="4", api_name="/race")
    trace = Trace.from_json(json.dumps(data))
    assert trace.prompt == "hello there" and trace.settings["seed"] == 3 and trace.settings["draft_length"] == 4
    assert trace.identical and len(trace.token_ids("baseline")) == 12
    assert data["prompt"] == trace.prompt and data["settings"] == trace.settings, "where they were before"
    assert {"pair", "machine", "prompt_tokens", "rounds", "finish", "costs", "version"} <= set(data)


def test_a_system_prompt_is_used_and_stays_out_of_the_trace(served: Any) -> None:
    client, source, _ = served
    data = client.predict("hello", max_new_tokens=4, system="Be brief.", api_name="/race")
    assert source.races[-1].request.system == "Be brief."
    assert data["request"]["system"] is None and data["omitted"] == ["system"] and "Be brief." not in json.dumps(data)


@pytest.mark.parametrize("policy", ["rate", "threshold"])
def test_the_policy_has_its_name_of_before_too(served: Any, policy: str) -> None:
    client, _, _ = served
    data = client.predict("hello", max_new_tokens=4, draft_length=policy, api_name="/race")
    assert data["settings"]["draft_length"] == "rate"


def test_updates_come_before_the_trace(served: Any) -> None:
    client, source, _ = served
    source.pace = 1.0
    try:
        updates = list(client.submit("hello", max_new_tokens=30, api_name="/race"))
    finally:
        source.pace = 0.0
    assert updates[0]["status"] == "running" and set(updates[0]) == {"status", "baseline", "speculative"}
    assert "rounds" in updates[-1]


def test_errors_are_one_sentence(served: Any) -> None:
    client, _, _ = served
    for arguments, words in (
        ({"prompt": ""}, "prompt"),
        ({"prompt": "word " * 200, "max_new_tokens": 200}, "200 tokens"),
        ({"prompt": "x", "top_p": 2.0}, "Top-p must be a number"),
        ({"prompt": "x", "rule": "nonsense"}, "Unknown rule"),
        ({"prompt": "x", "drafter": "/etc/passwd"}, "Unknown drafter"),
    ):
        with pytest.raises(AppError, match=words):
            client.predict(**arguments, api_name="/race")


def test_only_the_race_is_public_and_it_is_documented(served: Any) -> None:
    client, _, _ = served
    api = client.view_api(return_format="dict")
    assert list(api["named_endpoints"]) == ["/race"] and not api["unnamed_endpoints"]
    names = [p["parameter_name"] for p in api["named_endpoints"]["/race"]["parameters"]]
    assert names[0] == "prompt" and "request" not in names and "max_new_tokens" in names
    assert "trace" in str(api["named_endpoints"]["/race"].get("description"))


def test_one_race_at_a_time(served: Any) -> None:
    _, source, url = served
    source.pace, source.races = 0.5, []
    running: list[int] = []

    def race() -> None:
        Client(url, verbose=False).predict("hello", max_new_tokens=20, api_name="/race")

    threads = [threading.Thread(target=race) for _ in range(3)]
    for thread in threads:
        thread.start()
    while any(t.is_alive() for t in threads):
        running.append(sum(not r.closed and "running" in r.finish.values() for r in source.races))
        time.sleep(0.02)
    source.pace = 0.0
    assert len(source.races) == 3 and max(running) == 1


def test_a_cancelled_call_frees_the_device(served: Any) -> None:
    client, source, _ = served
    source.pace, source.races = 1.0, []
    job = client.submit("hello", max_new_tokens=250, api_name="/race")
    while not source.races:
        time.sleep(0.02)
    job.cancel()
    end = time.monotonic() + 10
    while not source.races[0].closed and time.monotonic() < end:
        time.sleep(0.05)
    source.pace = 0.0
    assert source.races[0].closed
