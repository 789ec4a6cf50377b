"""Draft lengths measured on the page: the job on the device's thread, its bounds, and whose turn it is."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from ui_fakes import FakeRace, FakeSource, fake_load

from spec_decode.bench import gauges, record
from spec_decode.bench.method import WARM_UP
from spec_decode.errors import ModelError, PromptError, SettingsError, UserError
from spec_decode.events import Trace
from spec_decode.request import Request
from spec_decode.session import pays
from spec_decode.session.caption import head
from spec_decode.session.device import Engine, Gone, Limits, Turns
from spec_decode.session.pays import LENGTHS, RAW, REPEATS, Desk, View, Wanted
from spec_decode.session.pays_prompts import MOST_BYTES, MOST_PROMPTS, read_prompts
from spec_decode.settings import Settings
from spec_decode.sources import Recording
from spec_decode.ui.form import settings_from_form
from spec_decode.ui.linked import form_values
from spec_decode.ui.pays import Reports, _of_race, _views

ALL = len(LENGTHS) * REPEATS


@pytest.fixture(autouse=True)
def no_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading 256 MB again and again would take most of the time of these tests."""
    monkeypatch.setattr(gauges, "read_bandwidth", lambda device: {"bytes_per_second": 1e10, "how": "not measured"})


def ready(source: FakeSource, limits: Limits | None = None) -> Engine:
    engine = Engine(fake_load(source), limits=limits)
    engine.start()
    while engine.status().phase != "ready":
        time.sleep(0.01)
    return engine


def wanted(*prompts: str, tokens: int = 24, reports: bool = False, **settings: Any) -> Wanted:
    asked = Request("prompts", Settings(max_new_tokens=tokens, **settings))
    return Wanted(tuple(read_prompts("\n".join(prompts or ("a rainbow",)))), asked, reports)


def told(view: View) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(view.text)
    return found


def own(source: FakeSource) -> list[FakeRace]:
    """The races that were run and counted."""
    return [race for race in source.races if race.rounds and race.request.prompt != WARM_UP]


def test_every_prompt_runs_at_every_draft_length_in_shuffled_order_beside_its_baseline() -> None:
    source = FakeSource()
    views = list(Desk(ready(source)).run("v", wanted("a rainbow", "a short story", reports=True)))
    assert [told(view)["phase"] for view in views] == ["warming", *["running"] * (2 * ALL + 1), "done"]
    assert [told(view)["done"] for view in views[2:-1]] == list(range(1, 2 * ALL + 1))
    assert told(views[-2])["left"] == 0 and told(views[2])["left"] > 0
    races = [(race.request.prompt, race.settings.draft_length, race.settings.seed) for race in own(source)]
    assert sorted(races, key=str) == sorted(
        ((p, n, r) for p in ("a rainbow", "a short story") for n in LENGTHS for r in range(REPEATS)), key=str
    )
    per_repeat = 2 * len(LENGTHS)
    assert [seed for *_, seed in races] == [r for r in range(REPEATS) for _ in range(per_repeat)], "repeat by repeat"
    assert len({tuple(races[i : i + per_repeat]) for i in range(0, len(races), per_repeat)}) == REPEATS, "shuffled anew"
    last = told(views[-1])
    rows = {row["length"]: row for row in last["rows"]}
    assert list(rows) == [0, *LENGTHS] and rows[0]["count"] == 2 * ALL and rows[0]["speedup"] == 1
    for length in LENGTHS:
        assert rows[length]["count"] == 2 * REPEATS == rows[length]["identical"]
        assert rows[length]["low"] is None or rows[length]["low"] <= rows[length]["speedup"] <= rows[length]["high"]
    assert rows[8]["draft_ms"] > rows[1]["draft_ms"] > 0 and rows[1]["acceptance"] > rows[8]["acceptance"]
    assert last["advice"] and all(sentence["refers"] for sentence in last["advice"])
    assert set(last["why"]) == {"light", "dark"} and not any("draft length" in said for said in last["ran"])


def test_the_reports_are_those_of_the_benchmark(tmp_path: Path) -> None:
    *_, last = Desk(ready(FakeSource())).run("v", wanted("one", "two", "three", reports=True))
    raw = tmp_path / RAW
    raw.write_text(last.reports[RAW], encoding="utf-8")
    contents = record.read(raw)
    assert len(contents.measurements) == 3 * ALL and contents.ended and contents.notes["warm_up"] >= len(LENGTHS)
    schema = json.loads((Path(__file__).parents[1] / "docs" / "bench.schema.json").read_text(encoding="utf-8"))
    report = json.loads(last.reports["spec-decode-report.json"])
    jsonschema.validate(report, schema)
    jsonschema.validate(contents.header, {**schema["$defs"]["header"], "$defs": schema["$defs"]})
    shown = {row["length"]: row["speedup"] for row in told(last)["rows"] if row["length"]}
    assert shown == {c["condition"]["draft_length"]: c["speedup"]["median"] for c in report["conditions"]}
    assert "# Benchmark of fake-target" in last.reports["spec-decode-report.md"]
    assert last.reports["spec-decode-report.html"].startswith("<!doctype html>")


def test_a_race_of_another_visitor_waits_for_one_measurement_and_not_for_the_job() -> None:
    source = FakeSource()
    engine = ready(source)
    job = Desk(engine).run("v", wanted())
    for _ in range(3):
        next(job)
    race = engine.open("w", Request("another visitor", Settings(max_new_tokens=8)))
    seen: list[View] = []
    worker = threading.Thread(target=lambda: seen.extend(job))
    worker.start()
    mark = len(source.races)
    while not race.advance(0.001)[1]:
        assert len(source.races) == mark, "nothing is measured while a race is open"
    assert not seen and worker.is_alive()
    engine.close("w", race)
    worker.join(60)
    assert told(seen[-1])["phase"] == "done" and told(seen[-1])["done"] == ALL
    assert source.races[mark].request.prompt == WARM_UP, "the visitor may have had another drafter"


def test_a_race_that_waits_goes_before_the_next_measurement() -> None:
    source = FakeSource()
    engine = ready(source)
    order: list[str] = []
    turns = engine.turns

    def race() -> None:
        with turns.shared():
            order.append("race")

    with turns.alone() as mine:
        assert mine
        waiting = threading.Thread(target=race)
        waiting.start()
        while not turns._waiting:
            time.sleep(0.001)
        order.append("measurement")
    with turns.alone():
        order.append("measurement")
    waiting.join(10)
    assert order == ["measurement", "race", "measurement"]
    with turns.shared(), turns.alone(lambda: True) as mine:
        assert not mine, "who gives up gets no turn, and takes none from others"
    with turns.alone() as mine:
        assert mine


def test_a_race_whose_caller_has_gone_keeps_nobody_waiting() -> None:
    turns, here = Turns(), True
    turns.caller = lambda: lambda: not here
    end = turns.begin_race()
    with turns.alone(lambda: True) as mine:
        assert not mine
    here = False
    with turns.alone(lambda: True) as mine:
        assert mine
    with pytest.raises(Gone), turns.shared():
        raise AssertionError("nobody is there to run this")
    here = True
    for _ in range(2):
        end()
    with turns.shared(), turns.alone(lambda: True) as mine:
        assert not mine, "a race that is ended twice ends no other"


def test_stop_keeps_what_was_measured() -> None:
    desk = Desk(ready(FakeSource()))
    job = desk.run("v", wanted(reports=True))
    for _ in range(2 + 4):
        view = next(job)
    assert told(view)["done"] == 4 and not desk.stop("w") and desk.stop("v")
    rest = list(job)
    assert [told(v)["phase"] for v in rest] == ["stopping", "stopped"]
    last = told(rest[-1])
    assert last["done"] == 4 and last["of"] == ALL and last["advice"] and not desk.stop("v")
    assert len(rest[-1].reports[RAW].splitlines()) == 1 + 4 + 1, "header, measurements and the note on the warm-up"


def test_stop_ends_the_race_under_way_and_does_not_count_its_half() -> None:
    source = FakeSource(pace=0.02)
    desk = Desk(ready(source))
    job = desk.run("v", wanted(tokens=200))
    for _ in range(3):
        next(job)
    rest: list[View] = []
    worker = threading.Thread(target=lambda: rest.extend(job))
    mark = len(source.races)
    worker.start()
    while len(source.races) == mark or not source.races[-1].rounds:
        time.sleep(0.001)
    desk.stop("v")
    worker.join(30)
    assert set(source.races[-1].finish.values()) == {"cancelled"}
    assert told(rest[-1])["phase"] == "stopped" and told(rest[-1])["done"] == 1 and rest[-1].reports == {}


def test_a_visitor_who_leaves_ends_the_job() -> None:
    source = FakeSource()
    engine = ready(source)
    job = Desk(engine).run("v", wanted())
    next(job)
    next(job)
    job.close()
    mark = len(source.races)
    race = engine.open("w", Request("hello", Settings(max_new_tokens=4)))
    engine.close("w", race)
    assert len(source.races) == mark + 1


@pytest.mark.parametrize("seen", [1, 3], ids=["warming", "running"])
def test_a_job_that_waits_for_another_race_can_be_stopped_and_closed(
    seen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pays, "PATIENCE", 0.1)
    source = FakeSource()
    engine = ready(source)
    desk = Desk(engine)
    for end in ("stop", "close"):
        job = desk.run("v", wanted())
        for _ in range(seen):
            view = next(job)
        race, mark = engine.open("w", Request("a long race", Settings(max_new_tokens=8))), len(source.races)
        assert next(job) == next(job) == view, "what was shown stays"
        if end == "stop":
            assert desk.stop("v")
            assert told(next(job))["phase"] == ("stopped" if seen == 1 else "stopping")
        job.close()
        assert not desk.stop("v") and len(source.races) == mark, "nothing runs beside the race"
        engine.close("w", race)


def test_what_fails_on_the_way_ends_in_a_sentence_with_what_there_is() -> None:
    class Breaking(FakeSource):
        def race(self, request: Request) -> FakeRace:
            if len(own(self)) == 2 and request.prompt != WARM_UP:
                raise ModelError("The drafter is gone.")
            return super().race(request)

    last = told(list(Desk(ready(Breaking())).run("v", wanted()))[-1])
    assert last["phase"] == "stopped" and last["words"] == "The drafter is gone." and last["done"] == 2

    class Broken(FakeSource):
        def race(self, request: Request) -> FakeRace:
            if own(self) and request.prompt != WARM_UP:
                raise RuntimeError("boom")
            return super().race(request)

    last = told(list(Desk(ready(Broken())).run("v", wanted()))[-1])
    assert last["phase"] == "stopped" and "RuntimeError: boom" in last["words"] and last["done"] == 1


def test_a_measurement_takes_no_longer_than_a_race_may() -> None:
    source = FakeSource(pace=0.2)
    job = Desk(ready(source, Limits(seconds=0.3))).run("v", wanted(tokens=256))
    for _ in range(3):
        view = next(job)
    assert told(view)["done"] == 1 and "time" in own(source)[0].finish.values()
    job.close()


def test_the_race_that_is_measured_keeps_its_system_prompt_and_drafter() -> None:
    source = FakeSource()
    asked = Request("hello", Settings(max_new_tokens=4000, temperature=0.7), system="Be brief.", drafter="lookup")
    job = Desk(ready(source)).run("v", Wanted.of_race(asked.to_dict()))
    for _ in range(3):
        view = next(job)
    (race,) = own(source)
    assert (race.request.system, race.request.drafter, race.request.prompt) == ("Be brief.", "lookup", "hello")
    assert race.settings.max_new_tokens == 256 and race.settings.temperature == 0.7, "bounded, and otherwise the same"
    assert told(view)["prompt"] == "hello"
    job.close()


@pytest.mark.parametrize(
    ("limits", "settings", "words"),
    [
        (Limits(measure=False), {}, "switched off on this server"),
        (Limits(new_tokens=20), {}, "at most 20 new tokens"),
        (Limits(), {"tokens": 257}, "At most 256 new tokens"),
        (Limits(), {"tokens": 7}, "Fewer than 8"),
    ],
)
def test_what_a_server_does_not_measure(limits: Limits, settings: dict[str, Any], words: str) -> None:
    source = FakeSource()
    with pytest.raises(SettingsError, match=words):
        next(Desk(ready(source, limits)).run("v", wanted(**settings)))
    assert not source.races


def test_a_recording_is_not_measured_and_a_long_prompt_is_named() -> None:
    source = FakeSource()
    source.recording = Recording(Request("p"), "a machine", None)  # type: ignore[assignment]
    with pytest.raises(SettingsError, match="plays a recording"):
        next(Desk(ready(source)).run("v", wanted()))
    with pytest.raises(PromptError, match="“line 2” has 1,025 tokens"):
        list(Desk(ready(FakeSource(context=4000))).run("v", wanted("short", "word " * 1025)))
    with pytest.raises(PromptError, match="“line 2” cannot be measured: The prompt has 600 tokens"):
        list(Desk(ready(FakeSource())).run("v", wanted("short", "word " * 600)))
    last = told(list(Desk(ready(FakeSource())).run("v", wanted("after a refusal")))[-1])
    assert last["phase"] == "done"


def test_lists_of_prompts() -> None:
    assert read_prompts("one\n\n  two \r\n") == [
        {"id": "line 1", "category": "prompts", "prompt": "one"},
        {"id": "line 3", "category": "prompts", "prompt": "two"},
    ]
    assert read_prompts('{"prompt": "a", "id": "x", "category": "code"}\n{"prompt": "b"}') == [
        {"id": "x", "category": "code", "prompt": "a"},
        {"id": "line 2", "category": "prompts", "prompt": "b"},
    ]
    assert len(read_prompts("p\n" * MOST_PROMPTS)) == MOST_PROMPTS


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (" \n ", "Write a prompt first"),
        (None, "must be text"),
        ("p\n" * (MOST_PROMPTS + 1), "51 prompts; at most 50"),
        ("é" * (MOST_BYTES // 2 + 1), "65,538 bytes; at most 65,536"),
        ('{"prompt": "a"}\nplain', "Line 2 is no JSON object"),
        ('{"text": "a"}', "Line 1 is no JSON object"),
        ('{"prompt": 7}', "Line 1: The prompt must be text, not 7"),
        ('{"prompt": "\\ud800"}', "Line 1: .*surrogate"),
        ('{"prompt": "a", "id": "x"}\n{"prompt": "b", "id": "x"}', "Two prompts have the id “x”"),
        ('{"prompt": ' + "[" * 20_000, "Line 1 is no JSON object"),
    ],
)
def test_lists_that_cannot_be(text: Any, words: str) -> None:
    with pytest.raises(PromptError, match=words):
        read_prompts(text)


@pytest.mark.parametrize(
    "asked",
    [
        "null",
        "[]",
        "7",
        '{"request": 7}',
        '{"request": {"prompt": "a", "settings": {"x": 1}}}',
        '{"request": {}}',
        None,
    ],
)
def test_a_race_that_the_page_makes_up_is_refused(asked: Any) -> None:
    with pytest.raises(UserError):
        _of_race(ready(FakeSource()), asked)


def test_a_race_that_is_no_json_ends_in_a_sentence() -> None:
    engine = ready(FakeSource())
    for text in ("[" * 100_000, "{"):
        (view,) = _views(Desk(engine), "v", lambda text=text: _of_race(engine, text))  # type: ignore[misc]
        assert told(view) == {"phase": "failed", "words": "This is nothing that can be measured."}


def test_a_race_of_another_model_is_not_measured_here() -> None:
    head = {"request": Request("a").to_dict(), "pair": {"target": "another"}}
    with pytest.raises(SettingsError, match="another model"):
        _of_race(ready(FakeSource()), json.dumps(head))
    assert _of_race(ready(FakeSource()), json.dumps({**head, "pair": {"target": "fake-target"}})).prompts


def test_a_race_of_a_model_in_a_directory_is_measured_and_the_directory_is_not_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pair = {"target": "/models/mine", "drafter": "fake-drafter", "device": "cpu", "dtype": "int8"}
    monkeypatch.setattr(FakeSource, "info", pair)
    engine = ready(FakeSource())
    told = head(Trace(Request("a").to_dict(), pair, {}, 1, ()))
    wanted = _of_race(engine, json.dumps(told))
    assert told["pair"]["target"] == "mine" and [prompt["prompt"] for prompt in wanted.prompts] == ["a"]
    views = list(Desk(engine).run("a", Wanted(tuple(read_prompts("hello")), wanted.request, reports=True)))
    assert views[-1].reports and not any("/models" in text for text in views[-1].reports.values())


@pytest.mark.parametrize(
    "settings",
    [
        Settings(),
        Settings(draft_length=7, temperature=0.8, top_p=0.9, top_k=40, seed=11, max_new_tokens=99),
        Settings(draft_length="rate", temperature=1, rule="block"),
        Settings(temperature=1, rule="threshold", lenience=0.5),
    ],
)
def test_the_form_takes_the_settings_of_a_pinned_result(settings: Settings) -> None:
    values = {"lenience": 0.3, "draft_length": 4} | form_values(Request("p", settings))
    assert settings_from_form(values) == settings


def test_reports_are_kept_for_the_last_few_visitors_only() -> None:
    kept = Reports(keep=2)
    for visitor in "abc":
        kept.write(visitor, {"r.md": visitor})
    assert kept.paths("a") == {}
    path = Path(kept.paths("c")["r.md"])
    assert path.read_text(encoding="utf-8") == "c"
    kept.forget("c")
    assert not path.exists() and Path(kept.paths("b")["r.md"]).exists()
