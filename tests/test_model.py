"""The speedup model against measurement, its figure, and the intervals that the advisor decides on."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import plotly.graph_objects
import pytest
import scipy.stats

from spec_decode import metrics
from spec_decode.bench import intervals, model
from spec_decode.bench.advice import SAME, advise
from spec_decode.bench.chart import THEMES, figure
from spec_decode.bench.measurement import Measurement
from spec_decode.events import SPECULATIVE, Costs
from spec_decode.student import quantile
from tests.worlds import Text, World, cliff, even, measured

WORLD = World({"code": Text(even(0.85)), "chat": Text(even(0.7))}, verify=cliff(4, 0.5, 0.06), draft=0.07, start=0.05)

# Intervals


@pytest.mark.parametrize("freedom", [1, 2, 2.5, 3, 5.7, 7, 30, 151.2, 1000, 1e6])
def test_quantiles_of_students_t_are_scipys(freedom: float) -> None:
    for p in (0.6, 0.9, 0.975, 0.999, 0.99995):
        near = 1e-5 if freedom >= 1e5 else 1e-8  # the normal distribution stands in from 100,000 on
        assert quantile(p, freedom) == pytest.approx(scipy.stats.t.ppf(p, freedom), rel=near)
    assert quantile(0.975, 0.5) == math.inf


@pytest.mark.parametrize(("prompts", "error"), [(4, 0.05), (8, 0.05), (8, 0.005), (30, 0.05)])
def test_intervals_hold_the_truth_as_often_as_they_say(prompts: int, error: float) -> None:
    """2000 draws: of a mean of normals, and of a ratio of sums whose parts are skewed. The ratio may miss by half more
    often than it says, since its interval is an approximation; 3 standard errors are allowed."""
    noise, missed = np.random.default_rng(0), np.zeros(2)
    runs = 2000
    for _ in range(runs):
        held = intervals.mean(0.3 + noise.standard_normal(prompts), error)
        missed[0] += not held.low <= 0.3 <= held.high
        below = noise.gamma(4, size=prompts)
        ratio = intervals.Resampled(prompts).ratio(0.5 * below + 0.3 * noise.standard_normal(prompts), below, error)
        assert ratio is not None
        missed[1] += not ratio.low <= 0.5 <= ratio.high
    allowed = runs * error + 3 * math.sqrt(runs * error)
    assert missed[0] <= allowed and missed[1] <= 1.5 * runs * error + 3 * math.sqrt(runs * error), missed


def test_without_two_prompts_an_interval_has_no_ends() -> None:
    assert intervals.mean([0.2]).high == math.inf
    ratio = intervals.Resampled(1).ratio(np.ones(1), np.ones(1))
    assert ratio is not None and ratio.value == 1 and ratio.high == math.inf
    assert intervals.Resampled(3).ratio(np.ones(3), np.zeros(3)) is None


def test_as_many_more_prompts_as_were_asked_for_narrow_the_interval() -> None:
    """In 10 runs with the number of prompts that the advisor named, the interval of the change in speed is ±3 %, and at
    most a third wider, in 8."""
    world = World({"text": Text(even(0.4), between=0.15, within=0.3)}, draft=0.15, lengths=(1,), prompts=8, tokens=120)
    narrow = []
    for seed in range(10):
        (advice,) = advise(measured(world, seed))
        told = [s.figures for s in advice.sentences if s.kind == "cannot tell"]
        more = told[0]["more_prompts"] if told else 40
        values = model.Speedups(measured(world, seed + 100, world.prompts + more)).of(1)
        found = intervals.mean(values, 0.015 / 2)
        narrow.append((found.high - found.low) / 2 <= SAME * 4 / 3)
    assert sum(narrow) >= 8


# The model


def test_acceptance_by_position_is_that_of_metrics() -> None:
    races = [m for m in measured(WORLD, 1) if m.condition.draft_length == 8]
    rounds = [r for m in races for r in model.trace_of(m).lane(SPECULATIVE)[1:-1]]
    found = model.explain(races, band=False).acceptance
    assert [e.value for e in found] == pytest.approx(metrics.per_position_acceptance(rounds))
    assert all(e.low <= e.value <= e.high for e in found)


def test_a_trace_without_texts_has_the_figures_of_the_race() -> None:
    race = measured(WORLD, 1)[-1]
    trace = model.trace_of(race)
    assert metrics.speedup(trace) == pytest.approx(race.speedup)
    lane = metrics.LaneCounts(trace.lane(SPECULATIVE))
    assert (lane.accepted, lane.drafted) == (race.speculative.accepted, race.speculative.drafted)


def test_costs_are_those_of_the_world() -> None:
    costs = model.explain(measured(WORLD, 2), band=False).costs
    assert costs.step_seconds == pytest.approx(WORLD.step, rel=0.05)
    assert costs.draft_ratio == pytest.approx(WORLD.draft, rel=0.05)
    assert costs.draft_start == pytest.approx(WORLD.start, abs=0.01)
    assert costs.other_ratio == pytest.approx(WORLD.other, rel=0.05)
    assert [costs.verify_ratio[n] for n in (1, 2, 4, 8)] == pytest.approx(
        [WORLD.verify[n] for n in (1, 2, 4, 8)], rel=0.03
    )


@pytest.mark.parametrize("seed", range(3))
def test_measured_speedups_lie_near_the_prediction(seed: int) -> None:
    """For every γ that was raced, from adaptive races of the same prompts."""
    found = model.explain(measured(WORLD, seed))
    assert found.source == "adaptive" and [f.length for f in found.lengths] == [*range(1, 9), "adaptive"]
    for f in found.lengths:
        if f.measured is not None and f.predicted is not None:
            assert f.predicted.low < f.predicted.value < f.predicted.high
            assert f.predicted.low / 1.1 < f.measured.value < f.predicted.high * 1.1, f.length


@pytest.mark.parametrize("length", [1, 2, 4, 8])
def test_at_break_even_a_round_costs_what_it_emits(length: int) -> None:
    costs = Costs(0.01, tuple(1 + 0.1 * n for n in range(17)), 0.1, 0.05, 0.02)
    least = model.break_even(costs, length)
    assert least is not None
    assert metrics.predicted_speedup([least], costs, length) == pytest.approx(1)
    assert model.even_acceptance(costs.round(length), length) == pytest.approx(least)
    assert model.break_even(replace(costs, draft_ratio=1.0), length) is None


def test_setups_are_kept_apart_and_peers_left_out() -> None:
    races = measured(World({"text": Text(1.0)}, lengths=(2,), prompts=3), 0)
    hot = [replace(m, condition=replace(m.condition, temperature=1.0, rule="coupled")) for m in races]
    peer = replace(races[0], condition=replace(races[0].condition, engine="llama.cpp"))
    found = model.setups([*races, *hot, peer])
    assert [(setup.temperature, len(group)) for setup, group in found.items()] == [(0.0, 6), (1.0, 6)]
    assert len(advise([*races, *hot, peer])) == 2 and advise([peer]) == ()


def test_with_one_prompt_its_repeats_count_and_nothing_is_said_of_others() -> None:
    races = measured(World({"text": Text(even(0.9))}, prompts=1, repeats=4), 0)
    assert not model.Speedups(races).general
    (advice,) = advise(races)
    assert "this prompt" in advice.text and "your prompts" not in advice.text
    (single,) = advise(m for m in races if m.repeat == 0 and m.condition.draft_length == 4)
    assert "Fewer than three prompts" in single.text and single.draft_length is None


def test_draft_lengths_are_compared_on_the_prompts_that_have_all_of_them() -> None:
    """In a run that was cut short, γ = 8 was measured on the easy prompts alone."""
    races = measured(World({"easy": Text(even(0.97)), "hard": Text(even(0.3))}, draft=0.1, lengths=(1, 8)), 0)
    cut = [m for m in races if m.condition.draft_length == 1 or m.category == "easy"]
    means = model.Speedups(cut).means
    assert means[1] == pytest.approx(float(np.mean(model.Speedups(cut).of(1, "easy"))))
    assert means[8] == pytest.approx(float(np.mean(model.Speedups(cut).of(8))))


@pytest.mark.parametrize("repeats", [1, 2, 3])
def test_few_races_of_one_prompt_are_plain_json(repeats: int) -> None:
    (advice,) = advise(measured(World({"text": Text(even(0.8))}, prompts=1, repeats=repeats, contexts=(128, 512)), 0))
    json.dumps(advice.to_dict(), allow_nan=False)


def test_races_that_ended_at_once_do_no_harm() -> None:
    """A text of one token has no round after the prefill."""
    races = measured(World({"text": Text(1.0)}, lengths=(2,), prompts=4), 0)
    lane = races[0].speculative
    empty = replace(lane, rounds=lane.rounds[:1], tokens_per_second=None)
    short: list[Measurement] = [replace(races[0], lanes={**races[0].lanes, SPECULATIVE: empty}, speedup=None)]
    assert advise(short) == ()
    assert len(advise([*short, *races[1:]])) == 1


def test_differing_texts_and_synthetic_acceptance_are_said() -> None:
    races = measured(World({"text": Text(1.0)}, lengths=(2,), prompts=4), 0)
    (advice,) = advise([replace(races[0], identical=False), *races[1:]])
    assert "fault" in next(s.text for s in advice.sentences if s.kind == "texts differ")
    (advice,) = advise([replace(m, condition=replace(m.condition, synthetic_acceptance=0.8)) for m in races])
    assert advice.sentences[-1].kind == "synthetic"


# The figure and the paragraph as data


@pytest.mark.parametrize("theme", THEMES)
def test_the_figure_is_plotlys_and_plain_json(theme: str) -> None:
    found = model.explain(measured(WORLD, 0))
    made = json.loads(json.dumps(figure(found, theme), allow_nan=False))
    drawn = plotly.graph_objects.Figure(made)  # refuses a property that Plotly does not know
    names = [trace.name for trace in drawn.data]
    assert (
        "measured, median with 95 % interval" in names and "adaptive, measured" in names and "tokens a round" in names
    )
    assert drawn.layout.paper_bgcolor == THEMES[theme]["paper"]
    (points,) = [trace for trace in drawn.data if str(trace.name).startswith("measured, median")]
    assert list(points.x) == [1, 2, 4, 8]
    assert list(points.y) == pytest.approx([f.measured.value for f in found.lengths[:8] if f.measured])


def test_the_figure_needs_no_prediction() -> None:
    races = [replace(m, costs=None) for m in measured(WORLD, 0) if m.condition.draft_length == 2]
    drawn = plotly.graph_objects.Figure(figure(model.explain(races)))
    assert not [trace for trace in drawn.data if "predicted" in str(trace.name)]


def test_the_advice_is_plain_json_and_every_sentence_names_its_figure() -> None:
    (advice,) = advise(measured(WORLD, 0))
    found = json.loads(json.dumps(advice.to_dict(), allow_nan=False))
    assert found["text"] == " ".join(s["text"] for s in found["sentences"])
    assert all(s["figures"] and s["refers"] for s in found["sentences"])
