"""The recordings that come with the page: stored in the current format, recorded by a command, and shown where there is
no model."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from gradio_client import Client
from jsonschema import Draft202012Validator
from ui_fakes import FakeSource

import app
from spec_decode import metrics, recording, trace_format
from spec_decode.__main__ import main
from spec_decode.errors import ModelError, UserError
from spec_decode.events import BASELINE, SPECULATIVE, Trace
from spec_decode.request import Request
from spec_decode.session.recordings import shipped
from spec_decode.session.tally import Tally
from spec_decode.sources.replay import ReplaySource, read
from spec_decode.ui import Engine, build, launch_options

SCENES = recording.scenes()
SCHEMA = json.loads((Path(__file__).parents[1] / "docs" / "trace.schema.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.name)
def test_a_shipped_trace_is_one_of_today(scene: recording.Scene) -> None:
    """Where this fails after a change of the format: `python -m spec_decode record`."""
    data = json.loads(gzip.decompress(scene.path().read_bytes()))
    assert data["version"] == trace_format.VERSION and list(Draft202012Validator(SCHEMA).iter_errors(data)) == []
    copies = {"prompt", "settings"}  # that the endpoint `/race` adds
    assert SCHEMA["properties"].keys() - copies == data.keys(), "every field that the format has now"
    assert {key for r in data["rounds"] for key in r} == SCHEMA["$defs"]["round"]["properties"].keys()
    assert {key for r in data["rounds"] for t in r["tokens"] for key in t} == SCHEMA["$defs"]["token"][
        "properties"
    ].keys()
    assert data["costs"].keys() == SCHEMA["$defs"]["costs"]["properties"].keys()
    trace = read(scene.path())
    assert trace == recording.rounded(trace.exported()), "no local path, and no more digits than are stored"
    assert recording.packed(trace) == scene.path().read_bytes()
    assert Request.from_dict(trace.request) == scene.request, "the race that races.jsonl asks for"
    assert trace.identical and trace.date and ReplaySource(trace).recording.machine != "another machine"
    assert scene.path().stat().st_size < 60_000, "it comes with the page"
    assert all(t.target_top and t.p is not None for r in trace.rounds for t in r.tokens)
    assert all(str(i) in trace.pieces for r in trace.rounds for i in r.alternatives)


def test_what_the_page_gets_says_the_same_as_the_trace() -> None:
    assert [data["name"] for data in shipped()] == [scene.name for scene in SCENES] == ["code", "prose", "json"]
    for data, scene in zip(shipped(), SCENES, strict=True):
        trace = read(scene.path())
        assert data["stats"]["speedup"] == pytest.approx(metrics.speedup(trace))
        assert data["stats"]["verdict"] == metrics.race_report(trace)["verdict"]
        assert data["recorded"] == str(ReplaySource(trace).recording) and "recorded on" in data["recorded"]
        assert data["figures"]["final"]["passes"][0] and data["about"]["ran"]["prompt"] == trace.prompt


def test_recording_keeps_the_run_of_median_speedup(tmp_path: Path) -> None:
    source = FakeSource(context=4000)
    raced = source.race

    def race(request: Request) -> Any:
        source.hit = (0.99, 0.2, 0.9, 0.6)[len(source.races) % 4]  # the first run of a scene warms up
        return raced(request)

    source.race = race  # type: ignore[method-assign]
    kept = list(recording.record(source, tmp_path, runs=3))
    assert len(source.races) == 4 * len(SCENES)
    for i, (scene, trace) in enumerate(kept):
        runs = [race.trace for race in source.races[4 * i + 1 : 4 * i + 4]]
        assert read(scene.path(tmp_path)) == trace
        speeds = sorted(metrics.speedup(run) or 0 for run in runs)
        assert metrics.speedup(trace) == pytest.approx(speeds[1], rel=1e-3) and speeds[0] < speeds[1] < speeds[2]
        exact = next(run for run in runs if run.token_ids(SPECULATIVE) and recording.rounded(run) == trace)
        for r, whole in zip(trace.rounds, exact.rounds, strict=True):
            assert r.clock == pytest.approx(whole.clock, rel=1e-5) and r.lane == whole.lane


def test_bad_flags_of_the_command_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (["--runs", "0"], ["--runs", "x"], ["--out", str(tmp_path / "no" / "folder")]):
        assert main(["record", *flags]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_compressed_trace_is_replayed_and_a_damaged_one_refused(tmp_path: Path) -> None:
    assert app.parse(["--replay", str(SCENES[0].path())]).recording.trace == read(SCENES[0].path())
    whole = SCENES[0].path().read_bytes()
    for i, damaged in enumerate((whole[:500], whole[:40] + b"!!!!" + whole[44:], gzip.compress(b"{}"))):
        (tmp_path / f"{i}.gz").write_bytes(damaged)
        with pytest.raises(UserError, match="cannot be replayed"):
            read(tmp_path / f"{i}.gz")


# A server without a model


def test_the_flag_and_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    assert app.parse(["--replay-only"]).replay_only and not app.parse([]).replay_only
    monkeypatch.setenv("SPEC_DECODE_REPLAY_ONLY", "1")
    assert app.parse([]).replay_only
    monkeypatch.setenv("SPEC_DECODE_REPLAY_ONLY", "0")
    assert not app.parse([]).replay_only


@pytest.fixture(scope="module")
def bare() -> Iterator[tuple[str, Engine]]:
    engine = Engine(None)
    page = build(engine)
    _, url, _ = page.launch(prevent_thread_lock=True, **launch_options())
    engine.start()
    yield url, engine
    page.close()


def test_a_server_without_a_model_says_so(bare: Any) -> None:
    url, engine = bare
    assert engine.status().phase == "absent" and "has no model" in engine.status().message
    with pytest.raises(ModelError, match="has no model"):
        engine.open("v", Request("p"))
    health = httpx.get(f"{url}health")
    assert health.status_code == 200 and health.json()["status"] == "absent"
    begun = time.perf_counter()
    with pytest.raises(Exception, match="has no model"):
        Client(url, verbose=False).predict("p", api_name="/race")
    assert time.perf_counter() - begun < 20


def test_the_last_score_board_of_a_recording_is_that_of_its_rounds() -> None:
    for data, scene in zip(shipped(), SCENES, strict=True):
        trace, tally = read(scene.path()), Tally()
        for r in trace.rounds:
            tally.add(r)
        assert json.loads(json.dumps(data["stats"])) == json.loads(json.dumps(tally.to_dict(trace)))
        assert Trace.from_json(trace.to_json()).text(BASELINE) == trace.text(SPECULATIVE)
