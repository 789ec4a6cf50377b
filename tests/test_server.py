"""What a server that strangers can reach must withstand, over HTTP on this machine."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from gradio import queueing
from ui_fakes import FakeSource, fake_load

import app
from spec_decode.errors import ModelError, UserError
from spec_decode.events import Trace
from spec_decode.request import Request
from spec_decode.settings import Settings
from spec_decode.ui import Engine, Limits, build, launch_options
from spec_decode.ui import server as server_module
from spec_decode.ui.form import CONTROLS
from spec_decode.ui.wiring import Outcome, Outcomes

ROOT = Path(__file__).resolve().parents[1]
VALUES = {"policy": "adaptive", "draft_length": 4, "rule": "auto", "lenience": 0.3, "temperature": 0, "top_p": 1}
VALUES |= {"top_k": 0, "max_new_tokens": 8, "seed": 0}
FORM = [VALUES[name] for name in CONTROLS]
MOST = {"new_tokens": 2000, "seconds": 60.0}


def wait(true: Callable[[], Any], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():  # asked once a turn: what was true may be so no longer
        assert time.monotonic() < end, "this did not come true"
        time.sleep(0.02)


class Served:
    """An app over a fake source, and a client that speaks plain HTTP with it."""

    def __init__(self, load: Any, source: FakeSource, max_queue: int = 12) -> None:
        self.source = source
        self.engine = Engine(load, limits=Limits(**MOST))
        self.page = build(self.engine, max_queue)
        _, self.url, _ = self.page.launch(prevent_thread_lock=True, **launch_options())
        self.port = int(httpx.URL(self.url).port or 0)
        self.http = httpx.Client(base_url=self.url, timeout=30)
        functions = self.http.get("/config").json()["dependencies"]
        self.names = {f["api_name"]: f for f in functions}

    def join(self, session: str, name: str = "race", data: list[Any] | None = None, **headers: str) -> httpx.Response:
        """A call that nobody listens to."""
        data = arguments() if data is None else data
        body = json.dumps({"data": data, "fn_index": self.names[name]["id"], "session_hash": session})
        headers = {"content-type": "application/json", **headers}
        return self.http.post("/gradio_api/queue/join", content=body, headers=headers)

    def listen(self, session: str) -> dict[str, Any]:
        """The last output of a session's call."""
        with self.http.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as stream:
            for line in stream.iter_lines():
                message = json.loads(line.removeprefix("data:")) if line else {}
                if message.get("msg") == "process_completed":
                    return dict(message["output"])
        raise AssertionError("the stream ended early")

    def call(self, session: str, name: str = "race", data: list[Any] | None = None) -> dict[str, Any]:
        assert self.join(session, name, data).status_code == 200
        return self.listen(session)

    @property
    def waiting(self) -> int:
        return int(self.http.get("/gradio_api/queue/status").json()["queue_size"])

    @property
    def calls(self) -> int:
        """Those that wait, those that run, and those that pass from the one to the other, which `waiting` misses."""
        return len(self.page._queue.event_ids_to_events)

    def close(self) -> None:
        self.http.close()
        self.page.close()


def arguments(
    prompt: Any = "hello", system: Any = "", tokens: int = 8, length: Any = "4", drafter: Any = ""
) -> list[Any]:
    """Those of `/race`, in order."""
    return [prompt, length, 0, 1, 0, tokens, 0, "auto", 0.3, drafter, system, False, False, "auto"]


@pytest.fixture(scope="module")
def running() -> Iterator[Served]:
    source = FakeSource(context=3000)
    served = Served(fake_load(source), source)
    served.engine.start()
    wait(lambda: served.engine.status().phase == "ready")
    yield served
    served.close()


@pytest.fixture
def served(running: Served, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """The app with nothing running, and little patience."""
    monkeypatch.setattr(server_module, "PATIENCE", 1.0)
    monkeypatch.setattr(server_module, "SWEEP", 0.1)
    running.source.races, running.source.pace, running.source.chunks = [], 0.0, 0
    yield running
    running.source.pace = 0.0
    for race in running.source.races:
        race.stop()
    wait(lambda: not running.calls)  # first, for a call that is about to run has no race yet
    wait(lambda: all(race.closed for race in running.source.races))
    assert running.waiting == 0 and not running.page._queue.get_active_worker_count()


@pytest.fixture
def busy(served: Served) -> Iterator[Served]:
    """The same with a race of somebody who listens and takes long."""
    served.source.pace = 1.0
    assert served.join("busy", data=arguments(tokens=1500)).status_code == 200
    listener = threading.Thread(target=served.listen, args=("busy",))
    listener.start()
    wait(lambda: served.source.races)
    yield served
    served.source.races[0].stop()
    served.source.pace = 0.0
    listener.join(20)
    assert not listener.is_alive()


# Health


def health(port: int) -> int:
    """The exit code of the Dockerfile's health check."""
    lines = (ROOT / "Dockerfile").read_text()
    command = json.loads(re.search(r"HEALTHCHECK [^\[]*CMD (\[.*\])", lines).group(1))  # type: ignore[union-attr]
    assert command[0] == "python" and "7860" in command[-1]
    command = [sys.executable, *command[1:-1], command[-1].replace("7860", str(port))]
    return subprocess.run(command, capture_output=True, check=False).returncode


def test_a_load_that_fails_is_told_to_the_container_and_on_standard_error(capsys: Any) -> None:
    go, tries = threading.Event(), []

    def load(progress: Any) -> FakeSource:
        tries.append(1)
        progress("Reading weights")
        go.wait(30)
        if len(tries) == 1:
            raise ModelError("The disk is full.")
        return FakeSource()

    served = Served(load, FakeSource())
    try:
        served.engine.start()
        wait(lambda: served.engine.status().message == "Reading weights")
        answer = served.http.get("/health")
        assert (answer.status_code, answer.json()) == (200, {"status": "loading", "message": "Reading weights"})
        go.set()
        wait(lambda: served.engine.status().phase == "failed")
        answer = served.http.get("/health")
        assert (answer.status_code, answer.json()) == (503, {"status": "failed", "message": "The disk is full."})
        assert health(served.port) != 0
        said = capsys.readouterr().err
        assert "Reading weights\n" in said and "The disk is full.\n" in said and "Traceback" not in said
        served.engine.start()
        wait(lambda: served.engine.status().phase == "ready")
        assert served.http.get("/health").json()["status"] == "ready" and health(served.port) == 0
    finally:
        served.close()


# What comes in


BAD = [
    ({"prompt": None}, "prompt must be text"),
    ({"prompt": 7}, "prompt must be text, not 7"),
    ({"prompt": ["a"]}, "prompt must be text"),
    ({"prompt": {"a": 1}}, "prompt must be text"),
    ({"prompt": "a\ud800"}, "half of a surrogate pair (character 2)"),
    ({"system": 7}, "system prompt must be text, not 7"),
    ({"system": ["a"]}, "system prompt must be text"),
    ({"system": "\udfff"}, "system prompt holds half"),
    ({"prompt": ["long"] * 5000}, "prompt must be text"),
    ({"length": "long" * 5000}, "Draft length must be"),
    ({"length": [1] * 5000}, "Draft length must be"),
    ({"drafter": "long" * 5000}, "Unknown drafter"),
    ({"drafter": {"a": "long" * 5000}}, "Unknown drafter"),
]


def test_what_is_no_prompt_is_refused_in_a_sentence(served: Served, capsys: Any) -> None:
    for i, (bad, words) in enumerate(BAD):
        error = served.call(f"bad{i}", data=arguments(**bad))["error"]  # type: ignore[arg-type]
        assert error and words in error and len(error) < 250, bad
    assert served.call("good", data=arguments(system=None))["data"]
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out + captured.err


def test_a_call_from_no_page_is_refused_in_a_sentence(served: Served, capsys: Any) -> None:
    for i, ticket in enumerate((None, {}, "x", {"id": "made up", "truncate": True})):
        form = [ticket, "hello", "", False, "", False, *FORM]
        assert "press Run first" in served.call(f"t{i}", "stream", form)["error"]
    for name in ("stream", "race"):
        answer = served.join("few", name, ["hello"])
        assert answer.status_code == 400 and "arguments" in answer.json()["detail"]
    check = next(n for n, f in served.names.items() if f["queue"] and n.startswith("lambda") and len(f["inputs"]) > 8)
    inputs = len(served.names[check]["inputs"])
    note = json.dumps(served.call("note", check, [7, *[None] * (inputs - 10), *FORM]))
    assert "prompt must be text, not 7" in note
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out + captured.err and not served.source.races


def test_a_test_of_the_lab_that_cannot_be_is_refused_in_a_sentence(served: Served, capsys: Any) -> None:
    good = ["rejection", "model", False, "3", 1, 500]
    for place, bad in (
        (0, "x"),
        (0, None),
        (0, ["block"]),
        (1, ["model"]),
        (3, "99"),
        (4, "warm"),
        (5, "many"),
        (5, 10**9),
    ):
        form = [bad if i == place else value for i, value in enumerate(good)]
        view = json.loads(served.call("lab", "lab_stream", form)["data"][0])
        assert view["phase"] == "failed" and view["words"].endswith("."), bad
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out + captured.err


@pytest.mark.parametrize(
    ("prompt", "system", "words"),
    [(7, None, "prompt must be text"), ("a\ud800", None, "surrogate"), ("a", ["b"], "system prompt must be text")],
)
def test_a_request_takes_nothing_but_text(prompt: Any, system: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Request(prompt, Settings(), system=system)


@pytest.mark.parametrize(
    ("path", "kind", "code"),
    [
        ("/gradio_api/upload", "multipart/form-data; boundary=x", 403),
        ("/gradio_api/upload/", "multipart/form-data; boundary=x", 403),
        ("/gradio_api/process_recording", "multipart/form-data; boundary=x", 403),
        ("/gradio_api/component_server", "multipart/form-data; boundary=x", 403),
        ("/gradio_api/queue/join", "application/json", 413),
    ],
)
def test_files_are_refused_before_they_are_read(served: Served, path: str, kind: str, code: int) -> None:
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as s:
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: 300000000\r\n\r\n"
        s.sendall(head.encode() + b"--x\r\n")
        answer = b""
        while part := s.recv(4096):  # until the server has closed
            answer += part
    status, _, body = answer.decode().partition("\r\n")
    assert status.startswith(f"HTTP/1.1 {code} ") and ("no files" in body or "MB" in body)


def test_a_body_of_unknown_length_has_a_limit(served: Served) -> None:
    def body() -> Iterator[bytes]:
        yield b'{"data": ["'
        for _ in range(6):
            yield b"x" * 1_000_000

    answer = served.http.post("/gradio_api/queue/join", content=body(), headers={"content-type": "application/json"})
    assert answer.status_code == 413 and "MB" in answer.text


# Who waits, and who listens


def test_a_race_that_nobody_listens_to_is_dropped(served: Served) -> None:
    served.source.pace = 1.0
    assert served.join("deaf", data=arguments(tokens=1500)).status_code == 200
    wait(lambda: served.source.races)
    wait(lambda: served.source.races[0].closed)
    assert len(served.source.races[0].rounds) < 1500


def test_nobody_waits_who_does_not_listen(busy: Served) -> None:
    assert busy.join("deaf").status_code == 200
    body = json.dumps({"data": arguments()})
    event = busy.http.post("/gradio_api/call/race", content=body, headers={"content-type": "application/json"})
    assert event.status_code == 200 and busy.waiting == 2
    wait(lambda: busy.waiting == 0)
    time.sleep(0.5)
    assert len(busy.source.races) == 1 and not busy.source.races[0].closed, "the race that is heard goes on"


def test_one_who_listens_by_event_is_heard(busy: Served) -> None:
    body = json.dumps({"data": arguments()})
    event = busy.http.post("/gradio_api/call/race", content=body, headers={"content-type": "application/json"}).json()
    with busy.http.stream("GET", f"/gradio_api/call/race/{event['event_id']}") as stream:
        time.sleep(1.6)  # longer than the patience
        assert busy.waiting == 1
        busy.source.races[0].stop()
        busy.source.pace = 0.0
        text = stream.read().decode()
    assert "event: complete" in text and '"finish"' in text


def test_one_who_leaves_while_the_prompt_is_read_frees_the_device(served: Served) -> None:
    served.source.chunks = 300  # a minute
    assert served.join("leaver").status_code == 200
    with served.http.stream("GET", "/gradio_api/queue/data", params={"session_hash": "leaver"}) as stream:
        for line in stream.iter_lines():
            if '"process_generating"' in line:
                break  # closes the connection
    wait(lambda: served.source.races[0].closed, 5)


def test_a_race_that_is_cancelled_twice_is_closed(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.source, "chunk_seconds", 1.0)
    served.source.chunks = 10
    assert served.join("hasty").status_code == 200
    wait(lambda: served.source.races and any(served.page.app.iterators.values()))
    time.sleep(0.2)  # now the race reads its first chunk
    body = {"session_hash": "hasty", "fn_index": served.names["race"]["id"], "event_id": "another"}

    def cancel() -> None:
        assert httpx.post(f"{served.url}gradio_api/cancel", json=body, timeout=30).status_code == 200

    threads = [threading.Thread(target=cancel) for _ in range(2)]
    for thread in threads:
        thread.start()
        time.sleep(0.2)
    for thread in threads:
        thread.join()
    wait(lambda: not served.calls and served.source.races[0].closed, 5)
    assert not served.page.app.iterators


def test_stop_ends_a_round_of_a_person_as_well(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also as the page's end calls it: a round reads the whole conversation first."""
    monkeypatch.setattr(served.source, "chunk_seconds", 0.2)
    served.source.chunks = 100
    question = {"id": "1", "request": Request("hello", Settings(max_new_tokens=24)).to_dict(), "draft": "x"}
    assert served.join("me", "draft_round", [json.dumps(question)]).status_code == 200
    wait(lambda: served.source.races)
    assert served.join("me", "stop", []).status_code == 200
    wait(lambda: not served.calls and served.source.races[0].closed, 5)


@pytest.mark.parametrize("name", ["race", "advise", "prove"])
def test_who_leaves_while_waiting_for_a_measurement_holds_up_no_other(served: Served, name: str) -> None:
    """Such as a visitor who presses Run while draft lengths are measured, and then Stop."""
    turns, calls = served.engine.turns, {"advise": [["a b"], 0, 1, 0, 8, 1, 0, "auto", 0.3, ""]}
    calls |= {"race": arguments(), "prove": ["rejection", "model", "3", 1, 500, 0]}
    with turns.alone() as mine:
        assert mine
        assert served.join("hasty", name, calls[name]).status_code == 200
        wait(lambda: turns._waiting)
        body = {"session_hash": "hasty", "fn_index": served.names[name]["id"], "event_id": "another"}
        assert served.http.post("gradio_api/cancel", json=body).status_code == 200
        wait(lambda: not turns._waiting, 5)
    end = time.monotonic() + 5
    with turns.alone(lambda: time.monotonic() > end) as mine:
        assert mine and not served.source.races, "what nobody waits for any more was not begun"


def test_a_race_that_is_cancelled_before_it_begins_gives_its_place_back(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = queueing.set_task_name

    def cancelled(task: Any, session: str, *more: Any) -> None:
        name(task, session, *more)
        if session == "hasty":
            task.cancel()  # as `/cancel` does when it comes between the making of a task and its first step

    monkeypatch.setattr(queueing, "set_task_name", cancelled)
    assert served.join("hasty").status_code == 200
    wait(lambda: not served.calls, 5)
    assert served.call("next")["data"] and len(served.source.races) == 1


def test_a_look_that_fails_is_not_the_last(served: Served, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    clean, calls = served.page._queue.clean_events, []

    async def fails_once(**call: Any) -> None:
        calls.append(call)
        if len(calls) == 1:
            raise RuntimeError("only once")
        await clean(**call)

    monkeypatch.setattr(served.page._queue, "clean_events", fails_once)
    served.source.pace = 1.0
    assert served.join("deaf", data=arguments(tokens=1500)).status_code == 200
    wait(lambda: served.source.races and served.source.races[0].closed)
    assert len(calls) > 1 and "only once" in capsys.readouterr().err


def test_a_session_has_two_races_waiting_at_most(busy: Served) -> None:
    answers = [busy.join("greedy") for _ in range(3)]
    assert [a.status_code for a in answers] == [200, 200, 429]
    assert "2 races waiting already" in answers[-1].json()["detail"]
    assert busy.join("modest").status_code == 200
    wait(lambda: busy.waiting == 0)  # nobody listened
    assert busy.join("greedy").status_code == 200


def test_an_address_has_a_quarter_of_the_places_at_most(busy: Served) -> None:
    def join(session: str, address: str | None) -> int:
        return busy.join(session, **({"x-forwarded-for": f"8.8.8.8, {address}"} if address else {})).status_code

    assert [join(f"a{i}", "203.0.113.7") for i in range(4)] == [200, 200, 200, 429]
    assert [join(f"b{i}", "203.0.113.8") for i in range(2)] == [200, 200], "another address"
    assert [join(f"c{i}", None) for i in range(4)] == [200] * 4, "on this machine there is one user"


def test_what_is_kept_of_sessions_is_bounded(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "MEMORY", 1.5)
    queue = served.page._queue
    for i in range(5):
        assert served.join(f"gone{i}").status_code == 200
    served.call("page")
    wait(lambda: not queue.pending_event_ids_session and not queue.pending_messages_per_session)
    assert served.page.state_session_capacity <= 1000
    assert "error" not in served.call("page"), "and may come again"


def test_outcomes_that_nobody_asks_for_are_bounded() -> None:
    outcomes = Outcomes(keep=2)
    for i in range(5):
        outcomes.put(str(i), Outcome(str(i)))
    assert len(outcomes) == 2 and outcomes.take("4").problem == "4" and outcomes.take("0") == Outcome()
    assert len(outcomes) == 1


# Limits


def test_a_race_over_the_limits_is_refused_or_ends_like_stop(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "at most 2,000 new tokens a lane, not 2,001" in served.call("more", data=arguments(tokens=2001))["error"]
    monkeypatch.setattr(served.engine, "limits", Limits(seconds=1.0))
    served.source.pace = 1.0
    data = served.call("long", data=arguments(tokens=1500))["data"][0]
    trace = Trace.from_json(json.dumps(data))
    assert trace.finish == {"baseline": "time", "speculative": "time"} and 5 < len(trace.rounds) < 300


@pytest.mark.parametrize(
    ("flags", "environment", "expected"),
    [
        ([], {}, Limits()),
        (["--host", "localhost"], {}, Limits()),
        (["--host", "::1"], {}, Limits()),
        (["--host", "0.0.0.0"], {}, app.PUBLIC),
        (["--host", "::"], {}, app.PUBLIC),
        (["--host", "my-machine"], {}, app.PUBLIC),
        (["--share"], {}, app.PUBLIC),
        ([], {"GRADIO_SERVER_NAME": "0.0.0.0"}, app.PUBLIC),
        ([], {"GRADIO_SHARE": "True"}, app.PUBLIC),
        ([], {"SYSTEM": "spaces"}, app.PUBLIC),
        (
            ["--host", "0.0.0.0", "--max-seconds", "0", "--max-new-tokens-limit", "0"],
            {},
            Limits(lab=False, measure=False),
        ),
        (["--host", "0.0.0.0", "--measure"], {}, replace(app.PUBLIC, measure=True)),
        (["--no-measure", "--no-lab"], {}, Limits(lab=False, measure=False)),
        (["--max-seconds", "9", "--max-new-tokens-limit", "8"], {}, Limits(8, 9)),
    ],
)
def test_limits_stand_where_others_can_reach_the_page(
    flags: list[str], environment: dict[str, str], expected: Limits, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GRADIO_SERVER_NAME", "GRADIO_SHARE", "SYSTEM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert app.parse(flags).limits == expected
    assert app.PUBLIC.new_tokens and app.PUBLIC.seconds


@pytest.mark.parametrize("flag", ["--max-seconds", "--max-new-tokens-limit"])
@pytest.mark.parametrize("value", ["-1", "x", "1.5", "٣"])
def test_limits_that_are_none(flag: str, value: str) -> None:
    with pytest.raises(SystemExit) as caught:
        app.parse([f"{flag}={value}"])
    assert caught.value.code == 2
