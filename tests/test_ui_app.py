"""The engine behind the page, the form, and the command line of app.py."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Generator
from dataclasses import replace
from typing import Any

import pytest
from ui_fakes import FakeRace, FakeSource, fake_load

import app
from spec_decode.errors import ModelError, OutOfMemory, PromptError, SettingsError
from spec_decode.events import Note, Round
from spec_decode.loading.embedded import NAME as EMBEDDED_NAME
from spec_decode.paths import ASSETS
from spec_decode.request import Request
from spec_decode.session.caption import caption
from spec_decode.session.feed import Feed, Feeds
from spec_decode.session.recordings import shipped
from spec_decode.session.stream import View
from spec_decode.session.stream import run as stream
from spec_decode.settings import Settings
from spec_decode.ui import Engine, Limits, TokenView, components, theme
from spec_decode.ui.components import token_view
from spec_decode.ui.controls import POLICIES, RULES, help_updates
from spec_decode.ui.form import CONTROLS, RULE_HELP, drafter_help, named, problem, settings_from_form
from spec_decode.ui.layout import examples
from spec_decode.ui.terms import TERMS
from spec_decode.ui.wiring import note_html, status_html

FORM = {"policy": "adaptive", "draft_length": 4, "temperature": 0, "top_p": 1, "top_k": 0}
FORM |= {"max_new_tokens": 32, "seed": 0, "rule": "auto", "lenience": 0.3}


def ready(source: FakeSource, **options: Any) -> Engine:
    engine = Engine(fake_load(source), **options)
    engine.start()
    wait(lambda: engine.status().phase != "loading")
    return engine


def wait(true: Any, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not true():  # asked once a turn: what was true may be so no longer
        assert time.monotonic() < end, "this did not come true"
        time.sleep(0.01)


def asked(**more: Any) -> Request:
    return Request(**{"prompt": "hello", "settings": Settings(max_new_tokens=20), **more})


def run(engine: Engine, request: Request, feed: Feed) -> Generator[View]:
    """The stream of a race for the visitor v."""
    views = stream(engine, "v", request, feed)
    assert isinstance(views, Generator)
    return views


def test_the_form_becomes_settings() -> None:
    assert settings_from_form(FORM).draft_length == "adaptive"
    assert settings_from_form(FORM | {"policy": "fixed"}).draft_length == 4
    assert {value for _, value in POLICIES} == {"adaptive", "rate", "fixed"}
    for policy in ("rate", "threshold"):  # what "rate" was called before
        assert settings_from_form(FORM | {"policy": policy}).draft_length == "rate"
    assert settings_from_form(FORM | {"lenience": None}).rule == "greedy", "what is not in use is not judged"
    assert settings_from_form(FORM | {"rule": "threshold", "lenience": 0.5, "temperature": 1}).lenience == 0.5
    for name, value in [
        ("top_p", 7),
        ("top_k", -1),
        ("seed", None),
        ("max_new_tokens", "many"),
        ("temperature", 9),
        ("rule", "x"),
    ]:
        wrong = problem(FORM | {name: value})
        assert isinstance(wrong, SettingsError) and wrong.field == name
        updates = dict(zip(CONTROLS, help_updates(FORM | {name: value}, wrong), strict=True))
        assert str(wrong) in updates[name]["info"] and updates[name]["elem_classes"] == ["sd-wrong"]
        assert all(not u["elem_classes"] for key, u in updates.items() if key != name)
    assert isinstance(problem(FORM | {"rule": ["threshold"]}), SettingsError)
    assert problem(FORM | {"policy": "fixed", "draft_length": 17}).field == "draft_length"  # type: ignore[union-attr]


def test_a_race_ends_in_a_trace_and_frees_its_memory() -> None:
    source = FakeSource()
    views = list(run(ready(source), asked(), Feed()))
    assert views[-1].trace is not None and views[-1].trace.finish == {"baseline": "length", "speculative": "length"}
    assert json.loads(views[-1].batch)["phase"] == "done" and json.loads(views[-1].batch)["figures"]["final"]
    wait(lambda: source.races[0].closed)


def test_a_visitor_who_leaves_frees_the_device() -> None:
    source = FakeSource(pace=1, context=2000)
    views = run(ready(source), asked(settings=Settings(max_new_tokens=1000)), Feed())
    next(views)
    views.close()
    wait(lambda: source.races[0].stopped and source.races[0].closed)


def test_stop_ends_within_a_round_and_keeps_the_text() -> None:
    source = FakeSource(pace=1, context=2000)
    engine = ready(source)
    views = run(engine, asked(settings=Settings(max_new_tokens=1000)), Feed())
    next(views)
    assert engine.stop("v") and not engine.stop("somebody else")
    *_, last = views
    assert last.trace is not None and set(last.trace.finish.values()) == {"cancelled"}
    assert len(last.trace.rounds) < 60
    assert not engine.stop("v"), "a race that is over cannot be stopped"


def test_a_long_prompt_tells_how_far_it_is_read_and_can_be_stopped() -> None:
    source = FakeSource(chunks=500, chunk_seconds=0.05)
    engine = ready(source)
    views = run(engine, asked(), Feed())
    told = [json.loads(next(views).batch) for _ in range(4)]
    assert all(not batch["rounds"] and batch["phase"] == "running" for batch in told)
    read = [batch["reading"] for batch in told[1:]]
    assert [total for _, total in read] == [500] * 3 and 0 < read[0][0] < read[1][0] < read[2][0] < 100
    assert engine.stop("v")
    *_, last = views
    assert last.trace is not None and set(last.trace.finish.values()) == {"cancelled"} and not last.trace.rounds
    assert json.loads(last.batch)["phase"] == "done" and last.problem is None
    views = run(engine, asked(), Feed())
    next(views), next(views)
    views.close()
    wait(lambda: source.races[1].closed)


def test_nothing_is_said_of_the_prompt_once_there_are_tokens() -> None:
    views = list(run(ready(FakeSource(chunks=3, chunk_seconds=0.1)), asked(), Feed()))
    batches = [json.loads(view.batch) for view in views]
    assert any("reading" in batch for batch in batches)
    assert not any("reading" in batch for batch in batches if batch["stats"]["baseline"]["tokens"])
    assert views[-1].trace is not None and views[-1].notice is None


def test_a_race_over_its_time_ends_like_stop_and_says_why() -> None:
    engine = ready(FakeSource(pace=1, context=2000), limits=Limits(seconds=0.5))
    *_, last = run(engine, asked(settings=Settings(max_new_tokens=1000)), Feed())
    assert last.notice is not None and "0.5 seconds" in last.notice and last.problem is None
    assert last.trace is not None and set(last.trace.finish.values()) == {"time"} and len(last.trace.rounds) > 3
    assert json.loads(last.batch)["phase"] == "done"


def test_settings_over_the_limit_are_told_at_their_control() -> None:
    limits = Limits(new_tokens=31)
    wrong = problem(FORM, limits)
    assert isinstance(wrong, SettingsError) and wrong.field == "max_new_tokens" and "at most 31" in str(wrong)
    assert problem(FORM | {"max_new_tokens": 31}, limits) is None
    with pytest.raises(SettingsError, match="at most 31"):
        next(run(ready(FakeSource(), limits=limits), asked(settings=Settings(max_new_tokens=32)), Feed()))


def test_every_touch_of_the_model_is_on_one_thread() -> None:
    threads = set()

    class Watched(FakeRace):
        def __init__(self, *args: Any) -> None:
            threads.add(threading.get_ident())
            super().__init__(*args)

        def steps(self) -> Any:
            for r in super().steps():
                threads.add(threading.get_ident())
                yield r

        def close(self) -> None:
            threads.add(threading.get_ident())
            super().close()

    class WatchedSource(FakeSource):
        def race(self, request: Request) -> Watched:
            return Watched(self, request)

    source = WatchedSource()
    engine = Engine(fake_load(source))
    engine.start()
    wait(lambda: engine.status().phase == "ready")
    list(run(engine, asked(), Feed()))
    wait(lambda: source.races[0].closed)
    assert len(threads) == 1 and threading.get_ident() not in threads


def test_what_the_engine_says_of_a_lane_is_shown() -> None:
    """While it runs beside the lane; what holds for the whole race at its end too."""
    notes = [Note("baseline", "Recorded: verify of 0 tokens"), Note("speculative", "Rounds are not recorded", True)]

    class Noted(FakeRace):
        def steps(self) -> Any:
            for i, r in enumerate(super().steps()):
                yield r
                if i < len(notes):
                    yield notes[i]

    class NotedSource(FakeSource):
        def race(self, request: Request) -> Noted:
            return Noted(self, request)

    *_, last = run(ready(NotedSource()), asked(), Feed())
    assert json.loads(last.batch)["notes"] == {note.lane: note.text for note in notes}
    assert last.notice == "speculative: Rounds are not recorded."
    rounds, done = ready(NotedSource()).open("v", Request("hello")).advance(10)
    assert done and all(isinstance(r, Round) for r in rounds)


def test_out_of_memory_keeps_what_came_before() -> None:
    engine = ready(FakeSource(memory=10))
    views = list(run(engine, asked(), Feed()))
    assert "out of memory" in str(views[-1].problem) and json.loads(views[-1].batch)["phase"] == "failed"
    assert views[-1].trace is not None and len(views[-1].trace.lane("baseline")) == 10
    race = engine.open("v", Request("hello"))
    assert len(race.advance(10)[0]) > 10, "rounds before the failure come first"
    with pytest.raises(OutOfMemory):
        race.advance(10)


def test_prompts_and_drafters_that_cannot_be() -> None:
    engine = ready(FakeSource(context=100, others=("lookup", "broken")))
    with pytest.raises(PromptError) as caught:
        next(run(engine, asked(prompt="word " * 200), Feed()))
    assert (caught.value.tokens, caught.value.limit) == (200, 80)
    assert list(run(engine, asked(prompt="word " * 200, truncate=True), Feed()))[-1].trace
    with pytest.raises(ModelError, match="Unknown drafter"):
        next(run(engine, asked(drafter="/etc"), Feed()))
    with pytest.raises(ModelError, match="another tokenizer"):
        next(run(engine, asked(drafter="broken"), Feed()))
    trace = list(run(engine, asked(drafter="lookup"), Feed()))[-1].trace
    assert trace is not None and trace.pair["drafter"] == "lookup"


def test_a_failed_load_is_told_and_can_be_tried_again() -> None:
    tries = []

    def load(progress: Any) -> FakeSource:
        tries.append(1)
        if len(tries) == 1:
            raise ModelError("The model could not be fetched.")
        if len(tries) == 2:
            raise RuntimeError("boom")
        return FakeSource()

    engine = Engine(load)
    with pytest.raises(ModelError, match="not ready"):
        engine.open("v", Request("hello"))
    for phase, words in (("failed", "could not be fetched"), ("failed", "RuntimeError: boom"), ("ready", "Ready")):
        engine.start()
        wait(lambda phase=phase, words=words: engine.status().phase == phase and words in engine.status().message)
    engine.start()
    assert len(tries) == 3, "a loaded model is not loaded again"


def test_names_from_outside_are_text() -> None:
    engine = Engine(fake_load(FakeSource()))
    assert "<b>" not in status_html(replace(engine.status(), message="<b>x</b>"))
    assert "<img" not in note_html("<img onerror=x>")["value"]


def test_the_status_names_the_drafter_in_use_and_says_that_the_embedded_model_is_tiny() -> None:
    now = ready(FakeSource()).status()
    assert "fake-drafter" in status_html(now)
    chosen = status_html(now, busy=True, drafter="<b>mtp+lookup")
    assert "fake-drafter" not in chosen and "&lt;b&gt;" in chosen and "135 million" not in chosen
    for term in ("mtp", "lookup", "int8"):
        assert f'class="sd-term">{term}</button>' in chosen and term in TERMS
    tiny = status_html(replace(now, pair={**(now.pair or {}), "target": EMBEDDED_NAME}))
    assert "135 million parameters" in tiny and "often wrong" in tiny and "larger pairs" in tiny


def test_help_lines_explain_what_is_chosen() -> None:
    assert TERMS["mtp"] in drafter_help("mtp+lookup") and TERMS["lookup"] in drafter_help("mtp+lookup")
    assert drafter_help("some/model") == drafter_help(None) and drafter_help(None).endswith(".")
    assert RULE_HELP["coupled"] == TERMS["coupled"] and "same noise" in RULE_HELP["auto"]
    assert [name for _, name in RULES] == list(RULE_HELP) and ("threshold (lossy)", "threshold") in RULES
    assert all(help.endswith(".") for help in RULE_HELP.values())
    assert all(len(sentence) < 230 and sentence.endswith(".") for sentence in TERMS.values())


def test_a_batch_says_what_was_run() -> None:
    wanted = asked(prompt="p" * 900, settings=Settings(max_new_tokens=20, temperature=0.7, top_k=9), system="Be brief.")
    about = json.loads(next(run(ready(FakeSource()), wanted, Feed())).batch)["about"]["ran"]
    said = " ".join(about["settings"])
    for part in ("fake-target + fake-drafter on cpu, int8", "rule coupled", "temperature 0.7", "top-k 9", "Be brief."):
        assert part in said
    assert "top-p" not in said and "(900 characters)" in about["prompt"] and len(about["prompt"]) < 900
    local = caption(Request("hello"), {"target": "/home/me/secret/model", "drafter": "./d/assistant", "device": "cpu"})
    assert local["settings"][0] == "model + assistant on cpu", "of a local path the last component"
    assert named(("mtp", "/home/me/secret/assistant")) == [("mtp", "mtp"), ("assistant", "/home/me/secret/assistant")]
    greedy = " ".join(caption(Request("hello", Settings(seed=5)), {"target": "t"})["settings"])
    assert "seed" not in greedy, "what had no effect is not listed"
    assert "lossy" in " ".join(caption(Request("hello", Settings(rule="threshold")), {"target": "t"})["settings"])


def test_examples_are_whole_and_fit_a_small_model() -> None:
    found = examples()
    assert len({e["id"] for e in found}) == len(found) >= 5
    assert all(set(e) == {"id", "category", "prompt"} and 0 < len(e["prompt"]) < 600 for e in found)


def test_bad_flags_and_a_taken_port(capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (["--port", "0"], ["--port", "x"], ["--nonsense"], ["--max-queue", "many"]):
        with pytest.raises(SystemExit) as caught:
            app.main(flags)
        assert caught.value.code == 2
    capsys.readouterr()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert app.main(["--port", str(taken.getsockname()[1])]) == 1
    message = capsys.readouterr().err.strip()
    assert message.startswith("app.py: cannot serve") and "is taken" in message and "\n" not in message


def test_scripts_may_lose_their_indentation_and_comments() -> None:
    """No text in back quotes spans lines, and no line of a script begins with a comment that another part needs."""
    for path in sorted(ASSETS.glob("*.js")):
        if path.name.startswith("plotly"):
            continue
        for line in path.read_text(encoding="utf-8").splitlines():
            if not line.lstrip().startswith("//"):
                assert line.count("`") % 2 == 0 or "[\\\\`" in line, f"{path.name}: {line}"
    short = components.script("trace.js", "view.js")
    assert "SpecDecode.Race = class" in short and "\n//" not in short and "\n " not in short
    assert ".sd-race" in theme.sheet("app.css") and "/*" not in theme.sheet("app.css")


def test_the_token_view_has_no_value_that_is_copied_with_every_batch() -> None:
    """Gradio writes all of a component's `props` as JSON, and copies them, whenever one of them changes."""
    for made in (token_view(Feeds(), shipped()), TokenView()):
        assert made.props == {} and "given" in str(made.js_on_load)
