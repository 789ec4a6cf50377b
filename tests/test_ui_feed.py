"""What the app sends: batches that hold only what is new, and figures that agree with `metrics`."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
from ui_fakes import FakeSource

from spec_decode import metrics
from spec_decode.events import BASELINE, SPECULATIVE, Alternative, Comparison, Residual, Round, Token, Trace
from spec_decode.request import Request
from spec_decode.session.curves import POINTS, Curves, Throttle, final, running_acceptance, windowed_rate
from spec_decode.session.feed import Feed, Feeds, dumps, encode_round, idle
from spec_decode.session.tally import Tally
from spec_decode.settings import Settings


def trace(**settings: object) -> Trace:
    race = FakeSource(context=40_000).race(Request("hello", Settings(**settings)))  # type: ignore[arg-type]
    list(race)
    return race.trace


@pytest.mark.parametrize("settings", [{}, {"draft_length": 5}, {"rule": "threshold"}, {"max_new_tokens": 1}])
def test_the_tally_agrees_with_metrics(settings: dict[str, object]) -> None:
    t, tally = trace(**settings), Tally()
    for i, r in enumerate(t.rounds):
        tally.add(r)
        if i % 7 and i < len(t.rounds) - 1:
            continue
        stats = tally.to_dict()
        seen = t.rounds[: i + 1]
        fast = [x for x in seen if x.lane == SPECULATIVE]
        for lane in (BASELINE, SPECULATIVE):
            rounds = [x for x in seen if x.lane == lane]
            assert stats[lane]["rate"] == pytest.approx(metrics.tokens_per_second(rounds))
            assert stats[lane]["first"] == metrics.time_to_first_token(rounds)
        assert stats["acceptance"] == metrics.acceptance_rate(fast)
        assert stats["per_pass"] == metrics.tokens_per_pass(fast)
    stats = tally.to_dict(t)
    assert stats["speedup"] == (pytest.approx(metrics.speedup(t)) if metrics.speedup(t) else None)
    assert stats["identical"] is t.identical
    assert (stats["kl"] is not None) == (settings.get("rule") == "threshold" and len(t.lane(SPECULATIVE)) > 1)


def test_the_tally_finds_the_first_difference() -> None:
    tally = Tally()
    for lane, ids in ((BASELINE, (1, 2, 3, 4)), (SPECULATIVE, (1, 2, 9, 4))):
        for i, token in enumerate(ids):
            tally.add(Round(lane, i, (Token(token, "x", "target"),), 0, 0.0, 0.1, 0.1, 0.1 * (i + 1)))
    assert tally.to_dict()["same"] == 2 and tally.to_dict()["identical"] is False


def test_a_longer_text_is_not_identical_unless_it_was_cut_short() -> None:
    t = trace(max_new_tokens=8)
    shorter = Trace(**{**vars(t), "rounds": tuple(r for r in t.rounds if r.lane == BASELINE or r.index < 1)})
    for finish, same in (("length", False), ("cancelled", True), ("time", True)):
        tally = Tally()
        for r in shorter.rounds:
            tally.add(r)
        ended = Trace(**{**vars(shorter), "finish": {BASELINE: finish, SPECULATIVE: finish}})
        assert tally.to_dict(ended)["identical"] is same


def test_batches_hold_what_is_new_and_repeat_one_batch() -> None:
    rounds, feed = trace(max_new_tokens=30).rounds, Feed()
    seen: dict[int, object] = {}
    for start in range(0, len(rounds), 4):
        feed.add(list(rounds[start : start + 4]))
        batch = json.loads(feed.batch("running", {"speedup": 1.0}))
        assert batch["run"] == feed.run and batch["phase"] == "running"
        assert batch["from"] == max(0, start - 4) and len(batch["rounds"]) <= 8
        seen |= {batch["from"] + i: r for i, r in enumerate(batch["rounds"])}
    assert [seen[i] for i in range(len(rounds))] == [json.loads(encode_round(r)) for r in rounds]


def test_the_wire_grows_linearly() -> None:
    def sent(tokens: int) -> int:
        feed, total = Feed(), 0
        for r in trace(max_new_tokens=tokens).rounds:
            feed.add([r])
            total += len(feed.batch("running", {}))
        return total

    assert sent(800) < 4.5 * sent(200)


def test_a_round_on_the_wire_has_the_numbers_of_the_trace_and_each_text_once() -> None:
    pieces = {"3": "three", "4": "four", "5": "five"}

    def made(index: int, *ids: int) -> Round:
        top = tuple(Alternative(i, 0.1 + 1e-9 * i) for i in ids)
        token = Token(3, "three", "accepted", 1 / 3, 2 / 3, 1, top, top[:1], Comparison(0.1 / 3, 0.7 / 3))
        return Round(
            SPECULATIVE, index, (token,), 2, 0.1 / 7, 0.2 / 7, 0.4 / 7, 5 / 7, 1, 1 / 9, "mtp", Residual(0.3, top)
        )

    feed = Feed()
    feed.add([made(1, 3, 4), made(2, 4, 5)], pieces)
    first, second = json.loads(feed.since(0))["rounds"]
    assert first[:5] == [1, 1, 2, 1, 1 / 9] and first[6:8] == [[0.1 / 7, 0.2 / 7, 0.4 / 7, 5 / 7], "mtp"]
    top = [[3, 0.1 + 3e-9], [4, 0.1 + 4e-9]]
    assert first[5] == [["three", "a", 1 / 3, 2 / 3, 1, 3, top, top[:1], [0.1 / 3, 0.7 / 3]]]
    assert first[8] == [0.3, top] and first[9] == {"3": "three", "4": "four"} and second[9] == {"5": "five"}
    assert json.loads(encode_round(Round(BASELINE, 0, (Token(1, "x", "target"),), 0, 0.0, 0.1, 0.1, 0.1)))[8:] == [
        None,
        {},
    ]


def test_missing_rounds_can_be_asked_for() -> None:
    feeds = Feeds(keep=2)
    first, rounds = feeds.open(), trace(max_new_tokens=9).rounds
    first.add(list(rounds))
    answer = json.loads(feeds.missing(json.dumps({"run": first.run, "from": 3})))
    assert answer["from"] == 3 and len(answer["rounds"]) == len(rounds) - 3 and "phase" not in answer
    for nonsense in ("", "[]", "{}", '{"run": "x", "from": 0}', '{"run": "x", "from": null}', "7"):
        assert feeds.missing(nonsense) == ""
    feeds.open(), feeds.open()
    assert feeds.missing(json.dumps({"run": first.run, "from": 0})) == "", "old feeds are let go"


def test_nothing_on_the_wire_looks_like_markup() -> None:
    evil = "</script><img onerror=x> & <!-- \u2028"
    text = encode_round(Round(BASELINE, 0, (Token(1, evil, "target"),), 0, 0.0, 0.1, 0.1, 0.1))
    assert not set("<>&") & set(text)
    assert json.loads(text)[5][0][0] == evil
    assert json.loads(dumps({evil: evil})) == {evil: evil}
    assert json.loads(idle())["rounds"] == []


def test_windowed_rate() -> None:
    steady = [(0.1 + 0.05 * i, 1 + i) for i in range(400)]
    xs, ys = windowed_rate(steady)
    assert len(xs) == len(ys) <= POINTS and xs[-1] == pytest.approx(steady[-1][0])
    assert all(y == pytest.approx(20) for y in ys)
    assert windowed_rate([]) == windowed_rate(steady[:1]) == [[], []]
    jump = steady + [(steady[-1][0] + 0.01 * i, steady[-1][1] + i) for i in range(1, 400)]
    assert windowed_rate(jump)[1][-1] == pytest.approx(100, rel=0.02)


def test_running_acceptance() -> None:
    xs, shares, means = running_acceptance([(1, 2, 4), (3, 4, 4)])
    assert (xs, shares, means) == ([1, 3], [0.5, 1.0], [0.5, 0.75])
    xs, shares, means = running_acceptance([(i, i % 5, 4 + i % 5) for i in range(3000)])
    assert len(xs) <= POINTS and xs[-1] == 2999
    assert means[-1] == pytest.approx(sum(i % 5 for i in range(3000)) / sum(4 + i % 5 for i in range(3000)), abs=1e-4)
    assert running_acceptance([]) == [[], [], []]


def test_figures_of_a_finished_race() -> None:
    t = trace(max_new_tokens=300)
    curves = Curves()
    for r in t.rounds:
        curves.add(r)
    live = curves.live()
    assert live["rate"][BASELINE][0] and live["acceptance"][2][-1] == pytest.approx(
        metrics.acceptance_rate(t.lane(SPECULATIVE)), abs=1e-4
    )
    figures = json.loads(dumps(final(t)))
    assert sum(figures["passes"][1]) == len(t.lane(SPECULATIVE)) - 1
    model = figures["model"]
    assert model["lengths"] == list(range(1, 9)) and len(model["predicted"]) == 8
    bands = zip(model["low"], model["predicted"], model["high"], strict=True)
    assert all(low < middle < high for low, middle, high in bands)
    assert model["best"] is None or model["predicted"][model["best"] - 1] == max(model["predicted"])
    assert model["measured"] == [[], []] and model["adaptive"] == pytest.approx(metrics.speedup(t), abs=1e-3)
    bare = final(Trace(**{**vars(t), "costs": None}))
    assert bare["model"]["predicted"] == [] and bare["model"]["best"] is None
    fixed = final(trace(max_new_tokens=300, draft_length=5))["model"]
    assert fixed["measured"][0] == [5] and fixed["adaptive"] is None, "one point, the race's own"
    assert fixed["low"][4] < fixed["measured"][1][0] < fixed["high"][4]


def test_the_tally_tells_the_interval_and_the_verdict() -> None:
    t, tally = trace(max_new_tokens=200), Tally()
    for r in t.rounds:
        tally.add(r)
    stats, report = tally.to_dict(t), metrics.race_report(t)
    assert stats["interval"] == pytest.approx(report["speedup_interval"])
    assert stats["end_to_end"] == pytest.approx(report["end_to_end_speedup"])
    assert stats["end_to_end_interval"] == pytest.approx(report["end_to_end_interval"])
    assert stats["verdict"] == report["verdict"] == "faster" and stats["looping"] is report["looping"] is False
    assert "verdict" not in tally.to_dict(), "not before the race is over"


def test_drawing_never_takes_more_than_its_share() -> None:
    throttle = Throttle(interval=0.0, share=0.5)
    assert throttle.due()
    throttle.drawn(0.05)
    assert not throttle.due()
    time.sleep(0.11)
    assert throttle.due()


def test_the_app_imports_no_torch() -> None:
    code = "import sys, app, spec_decode.ui; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=__file__.rsplit("/", 2)[0], check=False).returncode == 0
