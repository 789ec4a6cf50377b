"""The endpoints, called as a program would."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from ui_fakes import FakeSource, fake_load

from spec_decode.errors import ModelError
from spec_decode.events import Trace
from spec_decode.request import Request
from spec_decode.session import advise
from spec_decode.session.device import ABSENT
from spec_decode.settings import Settings
from spec_decode.sources.replay import ReplaySource
from spec_decode.ui import Engine, build, launch_options

DOCUMENT = (Path(__file__).resolve().parents[1] / "docs" / "api.md").read_text(encoding="utf-8")


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


def test_three_endpoints_are_public_and_documented(served: Any) -> None:
    client, _, _ = served
    api = client.view_api(return_format="dict")
    assert list(api["named_endpoints"]) == ["/race", "/advise", "/prove"] and not api["unnamed_endpoints"]
    names = [p["parameter_name"] for p in api["named_endpoints"]["/race"]["parameters"]]
    assert names[0] == "prompt" and "request" not in names and "max_new_tokens" in names
    assert all(api["named_endpoints"][name].get("description") for name in api["named_endpoints"])


def test_a_summary_is_given_where_it_is_asked_for(served: Any) -> None:
    client, _, _ = served
    told = client.predict("hello there", max_new_tokens=40, detail="summary", api_name="/race")
    trace = client.predict("hello there", max_new_tokens=40, detail="trace", api_name="/race")
    whole = Trace.from_json(json.dumps(trace))
    assert told["baseline"]["text"] == whole.text("baseline") and told["identical"] is whole.identical
    assert told["speculative"]["drafted"] == sum(r.drafted for r in whole.lane("speculative"))
    assert len(told["rounds"]) + told["rounds_left_out"] == len(whole.lane("speculative"))


def test_the_other_endpoints_stream_and_answer(served: Any) -> None:
    client, _, _ = served
    updates = list(client.submit("hello there", max_new_tokens=16, repeats=1, api_name="/advise"))
    assert updates[0] == {"status": "running", "races": 0, "of": 5}
    assert updates[-1]["races"] == 5 and updates[-1]["draft_length"] is None, "one repeat of one prompt cannot tell"
    assert "cannot tell" in updates[-1]["advice"]
    updates = list(client.submit(rule="greedy", texts=20, api_name="/prove"))
    assert updates[0] == {"status": "running", "texts": 0, "of": 20}
    assert updates[-1]["temperature"] == 0 and updates[-1]["verdict"] == "cannot tell" and updates[-1]["p_value"] == 1


def test_a_measurement_for_advice_ends_at_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(advise, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    source = FakeSource()
    engine = loaded(source)
    race = source.race
    measured: list[Request] = []

    def late(request: Request) -> Any:
        if request.settings.max_new_tokens == 60:
            measured.append(request)
        if len(measured) == 1 + 5:  # the prompt's check, and four races
            now[0], source.pace = 1e6, 10.0
        return race(request)

    monkeypatch.setattr(source, "race", late)
    steps = list(advise.ask(engine, advise.Question(("hello",), Settings(max_new_tokens=60))))
    answer = steps[-1].to_dict()
    assert answer["races"] == 4 and answer["planned"] == 15 and len(measured) == 6
    assert answer["notice"] == "Stopped by the time limit: 4 of 15 races were measured."
    assert source.races[-1].closed and set(source.races[-1].finish.values()) == {"time"}


def test_a_measurement_that_nobody_waits_for_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    source = FakeSource(pace=0.01)
    engine = loaded(source)
    steps = advise.ask(engine, advise.Question(("hello",), Settings(max_new_tokens=200)))
    while (step := next(steps)).done < 1:
        pass
    source.pace = 10.0
    begun = len(source.races)
    while len(source.races) == begun:  # the next race, which would take minutes
        next(steps)
    steps.close()
    engine.submit(lambda: None).result(60)
    assert step.of == 15 and len(source.races) == begun + 1
    assert source.races[-1].closed and "time" in source.races[-1].finish.values()


def test_advice_needs_a_model() -> None:
    trace = FakeSource().race(Request("hello", Settings(max_new_tokens=4)))
    list(trace.steps())
    for engine, words in (
        (loaded(ReplaySource(trace.trace)), "This server plays a recording; advice needs a model to measure."),
        (Engine(None), ABSENT),
    ):
        with pytest.raises(ModelError) as error:
            next(advise.ask(engine, advise.Question(("hello",), Settings(max_new_tokens=4))))
        assert str(error.value) == words


# docs/api.md


def documented(language: str) -> str:
    """The first block of code in this language."""
    return str(re.findall(rf"^```{language}\n(.*?)^```$", DOCUMENT, re.M | re.S)[0])


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_the_commands_of_the_documents_race(served: Any) -> None:
    _, _, url = served
    script = documented("sh").replace("http://127.0.0.1:7860/", url)
    assert url in script
    told = subprocess.run(["bash", "-c", script], text=True, capture_output=True, timeout=120, check=True).stdout
    *_, event, data = [line for line in told.splitlines() if line]
    assert event == "event: complete"
    (answer,) = json.loads(data.removeprefix("data: "))
    assert answer["status"] == "done" and answer["baseline"]["tokens"] == 64 and answer["rounds"]


def test_the_python_of_the_documents_runs(served: Any, capsys: pytest.CaptureFixture[str]) -> None:
    _, _, url = served
    capsys.readouterr()
    exec(compile(documented("python").replace("http://127.0.0.1:7860", url), "docs/api.md", "exec"), {})
    told = capsys.readouterr().out.splitlines()
    assert told[-1].startswith("refuted ") and told[-2].startswith(("None ", "adaptive ", "1 ", "2 ", "4 ", "8 "))
    assert any(line.endswith(" rounds") for line in told) and "45 of 45" in told


def test_the_javascript_of_the_documents_names_what_there_is(served: Any, tmp_path: Path) -> None:
    client, _, _ = served
    endpoints = client.view_api(return_format="dict")["named_endpoints"]
    script = documented("js")
    calls = re.findall(r'"(/\w+)", \{ (.*?) \}', script)
    assert len(calls) == 2
    for name, given in calls:
        known = {p["parameter_name"] for p in endpoints[name]["parameters"]}
        assert set(re.findall(r"(\w+): ", re.sub(r'"[^"]*"', "", given))) <= known
    if node := shutil.which("node"):
        (tmp_path / "call.mjs").write_text(script, encoding="utf-8")
        subprocess.run([node, "--check", tmp_path / "call.mjs"], check=True, timeout=60)


@pytest.mark.long
@pytest.mark.skipif(shutil.which("npm") is None, reason="no npm")
def test_the_javascript_of_the_documents_runs(served: Any, tmp_path: Path) -> None:
    """With Gradio's JavaScript client, from npm's registry."""
    _, _, url = served
    if subprocess.run(["npm", "install", "@gradio/client@2"], cwd=tmp_path, timeout=120, check=False).returncode:
        pytest.skip("npm's registry is not reached")
    (tmp_path / "call.mjs").write_text(documented("js").replace("http://127.0.0.1:7860", url), encoding="utf-8")
    ran = subprocess.run(["node", "call.mjs"], cwd=tmp_path, text=True, capture_output=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    speedup, low, high, same = re.findall(r"^([\d.]+) \[ ([\d.]+), ([\d.]+) \] (true)$", ran.stdout, re.M)[0]
    assert 0 < float(low) < float(speedup) < float(high) and same == "true"
    assert "status: 'done'" in ran.stdout and "status: 'running'" in ran.stdout


def loaded(source: Any) -> Engine:
    engine = Engine(lambda progress: source)
    engine.start()
    engine.submit(lambda: None).result(60)
    return engine


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
