"""A recording: it plays as the race went, needs no torch, and the page and the command line take it for a source."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from gradio_client import Client
from ui_fakes import FakeSource

import app
from spec_decode.__main__ import main
from spec_decode.errors import UserError
from spec_decode.events import BASELINE, SPECULATIVE, Promises, Trace
from spec_decode.metrics import race_report
from spec_decode.request import Request
from spec_decode.session.caption import INDEPENDENT, LOSSY, NOT_EXACT, NOT_SAME, about
from spec_decode.session.feed import Feed
from spec_decode.session.stream import run
from spec_decode.settings import Settings
from spec_decode.sources.replay import ReplaySource, read
from spec_decode.ui import Engine, build, launch_options
from spec_decode.ui.wiring import status_html

ROOT = Path(__file__).resolve().parents[1]
ANY = Request("something else", Settings(max_new_tokens=3))


def recorded(stop_after: int | None = None, **settings: Any) -> Trace:
    race = FakeSource().race(Request("hello", Settings(**{"max_new_tokens": 12, "draft_length": 3, **settings})))
    for i, _ in enumerate(race, 1):
        if i == stop_after:
            race.stop()
    return race.trace


def started(source: ReplaySource) -> Engine:
    engine = Engine(lambda _: source)
    engine.start()
    while engine.status().phase == "loading":
        time.sleep(0.02)
    return engine


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "race.json"
    path.write_text(recorded().to_json(), encoding="utf-8")
    return path


@pytest.mark.parametrize("stop_after", [None, 9])
def test_a_replay_is_the_race_that_was_recorded(stop_after: int | None) -> None:
    trace = recorded(stop_after)
    race = ReplaySource(trace, speed=math.inf).race(ANY)
    assert race.request == Request.from_dict(trace.request), "whatever was asked for"
    assert race.trace.rounds == () and set(race.trace.finish.values()) == {"running"}
    assert tuple(race) == trace.rounds, "both lanes, in the recorded order"
    race.close()
    assert race.trace == trace
    assert race_report(race.trace) == race_report(trace)


def test_a_round_comes_after_as_long_as_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = recorded()
    race, waits = ReplaySource(trace, speed=2.0).race(ANY), []
    monkeypatch.setattr(race._stopped, "wait", lambda seconds: waits.append(seconds))
    assert tuple(race) == trace.rounds
    # The prompt was read once: the second lane waits only for what it needed beyond the first one's prefill.
    first, second = (trace.lane(lane)[0].clock for lane in (BASELINE, SPECULATIVE))
    prefill = {BASELINE: first, SPECULATIVE: second - first}
    assert waits == [pytest.approx((r.seconds if r.index else prefill[r.lane]) / 2.0) for r in trace.rounds]


def test_a_replay_takes_the_time_of_the_race() -> None:
    trace = recorded()
    begun = time.perf_counter()
    list(ReplaySource(trace, speed=2.0).race(ANY))
    last = {r.lane: r.clock for r in trace.rounds}
    whole = (sum(last.values()) - trace.rounds[0].clock) / 2.0
    assert whole - 0.01 <= time.perf_counter() - begun < whole + 1


def test_stop_ends_a_wait_at_once_and_says_why() -> None:
    trace = recorded()
    slow = replace(trace, rounds=tuple(replace(r, clock=r.clock + 600 * (i > 4)) for i, r in enumerate(trace.rounds)))
    race = ReplaySource(slow).race(ANY)
    threading.Timer(1.5, race.stop, ("time",)).start()
    begun = time.perf_counter()
    assert len(list(race)) == 5 and time.perf_counter() - begun < 5
    race.stop()
    assert race.trace.finish == {BASELINE: "time", SPECULATIVE: "time"} and len(race.trace.rounds) == 5


def test_a_lane_that_was_played_to_its_end_ended_as_recorded() -> None:
    trace = recorded()
    last = max(i for i, r in enumerate(trace.rounds) if r.lane == SPECULATIVE)
    assert last < len(trace.rounds) - 1
    race = ReplaySource(trace, speed=math.inf).race(ANY)
    steps = race.steps()
    for _ in range(last + 1):
        next(steps)
    race.close()
    assert race.trace.finish == {BASELINE: "cancelled", SPECULATIVE: "length"}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"rounds": ()}, "it holds no rounds"),
        ({"request": {"prompt": "p", "settings": {"rule": "of tomorrow"}}}, "Unknown rule 'of tomorrow'"),
        ({"request": {"prompt": " ", "settings": {}}}, "The prompt is empty"),
    ],
)
def test_what_cannot_be_replayed_says_why(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match="cannot be replayed") as caught:
        ReplaySource(replace(recorded(), **change))
    assert sentence in str(caught.value)


def test_a_file_that_holds_no_trace_is_refused_before_anything_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "no.json").write_text("{}")
    (tmp_path / "latin.json").write_bytes("é".encode("latin-1"))
    for name, sentence in (("none", "Cannot read"), ("no.json", "not a Spec Decode trace"), ("latin.json", "decode")):
        path = str(tmp_path / name)
        with pytest.raises(UserError, match=sentence):
            read(path)
        assert main(["race", "--replay", path]) == 2
        line = capsys.readouterr().err.strip()
        assert line.startswith("spec_decode: ") and sentence in line and "\n" not in line
        with pytest.raises(SystemExit) as caught:
            app.parse(["--replay", path])
        assert caught.value.code == 2 and sentence in capsys.readouterr().err
    for bad in ("0", "-1", "nan", "inf", "fast"):
        with pytest.raises(SystemExit):
            app.parse([f"--speed={bad}"])


# The command line


def test_race_replay_prints_the_report_of_the_race(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["race", "--replay", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(race_report(recorded())))
    copy = file.with_name("copy.json")
    assert main(["race", "--replay", str(file), "--trace", str(copy)]) == 0
    said = capsys.readouterr().out
    assert "fake-target + fake-drafter on cpu, int8" in said and "lanes identical" in said
    assert Trace.from_json(copy.read_text(encoding="utf-8")) == recorded()
    for arguments in ([], ["--replay", str(file), "--prompt", "x"]):
        with pytest.raises(SystemExit) as caught:
            main(["race", *arguments])
        assert caught.value.code == 2


NO_TORCH = "; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"


def test_the_command_line_replays_without_torch(file: Path) -> None:
    code = f"import sys; from spec_decode.__main__ import main; assert main(['race', '--replay', {str(file)!r}]) == 0"
    done = subprocess.run([sys.executable, "-c", code + NO_TORCH], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


PAGE = """
import sys
import app
from gradio_client import Client
from spec_decode.ui.server import Server
Server.block_thread = lambda page: print(Client(page.local_url, verbose=False).predict("x", api_name="/race")["prompt"])
assert app.main(["--replay", sys.argv[1], "--speed", "1000"]) == 0
sys.exit('torch' in sys.modules or 'transformers' in sys.modules)
"""


def test_the_app_replays_without_torch(file: Path) -> None:
    """`python app.py --replay FILE` in a process of its own, which a client asks for the race before it ends."""
    command = [sys.executable, "-c", PAGE, str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().splitlines()[-1] == "hello"


# The page


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, Engine]]:
    engine = started(ReplaySource(recorded(), speed=50.0))
    page = build(engine)
    _, url, _ = page.launch(prevent_thread_lock=True, **launch_options())
    yield url, engine
    page.close()


def test_the_status_line_marks_a_recording_with_machine_and_date(served: Any) -> None:
    now = served[1].status()
    line = status_html(now)
    assert "data-recording" in line and "<b>Recording.</b>" in line and "Press Run to play it." in line
    assert "recorded on a fake machine, 2026-01-31 12:00 UTC" in line
    busy = status_html(now, busy=True)
    assert "Playing the recording." in busy and "Press Run" not in busy and "Racing" not in busy
    old = ReplaySource(replace(recorded(), date=None, machine={"gpu": "<b>H100"})).recording
    assert str(old) == "recorded on <b>H100, date unknown" and "&lt;b&gt;H100" in status_html(
        replace(now, recording=old)
    )


def test_a_call_of_the_page_plays_the_recording(served: Any) -> None:
    url, _ = served
    data = Client(url, verbose=False).predict("another prompt", max_new_tokens=500, api_name="/race")
    assert Trace.from_json(json.dumps(data)) == recorded()
    assert data["prompt"] == "hello" and data["settings"] == recorded().settings
    assert httpx.get(f"{url}health").json()["status"] == "ready"


def test_the_caption_says_that_it_is_a_recording() -> None:
    *_, last = run(started(ReplaySource(recorded(), speed=math.inf)), "v", ANY, Feed())
    what = json.loads(last.batch)["about"]
    assert what["ran"]["prompt"] == "hello" and what["limit"] == 12
    assert what["ran"]["settings"][-1] == "recorded on a fake machine, 2026-01-31 12:00 UTC"
    assert last.trace == recorded()


def test_the_page_claims_no_more_than_rule_and_source_promise() -> None:
    greedy, lossy = Request("p"), Request("p", Settings(rule="threshold", temperature=1.0))
    free = Request("p", Settings(rule="rejection", temperature=1.0))
    pair = {"target": "t", "drafter": "d"}
    for request, promises, exact, same_text, why in (
        (greedy, Promises(), True, True, ""),
        (free, Promises(), True, False, INDEPENDENT.format("rejection")),
        (lossy, Promises(), False, False, LOSSY.format("threshold")),
        (greedy, Promises(same_text=False), True, False, NOT_SAME),
        (greedy, Promises(exact=False), False, True, NOT_EXACT),
        (lossy, Promises(exact=False, same_text=False), False, False, LOSSY.format("threshold")),
    ):
        what = about(request, pair, promises)
        assert (what["exact"], what["same_text"], what["why"]) == (exact, same_text, why)
    assert about(greedy, pair, Promises(rejected="nothing"))["rejected"] == "nothing"
    less = replace(recorded(), promises=Promises(same_text=False))
    assert ReplaySource(less).promises == started(ReplaySource(less)).status().promises == less.promises
