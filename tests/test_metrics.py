"""Metrics: against figures worked out by hand, and the closed form of the speedup model."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from spec_decode import metrics
from spec_decode.events import BASELINE, SPECULATIVE, Costs, Round, Token, Trace

FREE = Costs(step_seconds=0.02, verify_ratio=(1.0,) * 17, draft_ratio=0.0)


def make(lane: str, pattern: list[tuple[int, int]], pace: float, prefill: float = 0.5) -> list[Round]:
    """A prefill of `prefill` seconds, then a round of `pace` seconds for each (drafted, accepted)."""
    rounds = [Round(lane, 0, (Token(0, "a", "target"),), 0, 0.0, prefill, prefill, prefill)]
    for i, (drafted, accepted) in enumerate(pattern, 1):
        own = "target" if not drafted else "bonus" if accepted == drafted else "correction"
        tokens = [
            Token(10 * i + j, "b", "accepted" if j < accepted else "rejected", draft_position=j + 1)
            for j in range(drafted)
        ]
        tokens.append(Token(i, "c", own))  # type: ignore[arg-type]
        rounds.append(Round(lane, i, tuple(tokens), drafted, 0.1, 0.2, pace, prefill + i * pace))
    return rounds


def race(baseline: list[Round], speculative: list[Round], costs: Costs | None = None) -> Trace:
    return Trace({"target": "t"}, {"seed": 1}, {"cpu": "x"}, "p", 4, (*baseline, *speculative), costs=costs)


# drafted, accepted: 13 of 20 accepted in 6 rounds, two of them without a full draft.
PATTERN = [(4, 4), (4, 2), (4, 0), (4, 3), (0, 0), (4, 4)]


def test_rates_by_hand() -> None:
    rounds = make(SPECULATIVE, PATTERN, pace=0.25)
    assert metrics.time_to_first_token(rounds) == 0.5
    assert metrics.tokens_per_second(rounds) == pytest.approx((13 + 6) / 1.5)
    assert metrics.acceptance_rate(rounds) == pytest.approx(13 / 20)
    assert metrics.tokens_per_pass(rounds) == pytest.approx(1 + 13 / 6)
    assert metrics.tokens_per_pass_histogram(rounds) == {1: 2, 3: 1, 4: 1, 5: 2}
    # Draft 1 was tried 5 times and kept 4; draft 2: 4 of 4; draft 3: 3 of 4; draft 4: 2 of 3.
    assert metrics.per_position_acceptance(rounds) == pytest.approx([4 / 5, 1, 3 / 4, 2 / 3])


def test_prefill_is_not_in_the_rate() -> None:
    slow, fast = (make(BASELINE, [(0, 0)] * 4, 0.1, prefill) for prefill in (9.0, 0.01))
    assert metrics.tokens_per_second(slow) == pytest.approx(10)
    assert metrics.tokens_per_second(fast) == pytest.approx(10)


def test_nothing_to_divide_by() -> None:
    only = make(BASELINE, [], 0.1)
    assert metrics.tokens_per_second([]) is metrics.tokens_per_second(only) is None
    assert metrics.tokens_per_second(make(BASELINE, [(0, 0)], 0.0)) is None
    assert metrics.time_to_first_token([]) is None
    assert metrics.acceptance_rate([]) is metrics.acceptance_rate(make(BASELINE, [(0, 0)], 1.0)) is None
    assert metrics.tokens_per_pass([]) is metrics.tokens_per_pass(only) is None
    assert metrics.tokens_per_pass_histogram(only) == {}
    assert metrics.per_position_acceptance(only) == []
    assert metrics.speedup(race([], [])) is None
    assert metrics.measured_speedup_by_drafted(race([], make(SPECULATIVE, PATTERN, 1.0))) == {}


def test_a_round_that_ended_the_text_early() -> None:
    """An end-of-sequence token inside the accepted draft: no token of the target's own, and no rejections."""
    tokens = (Token(1, "x", "accepted", draft_position=1), Token(2, "", "accepted", draft_position=2))
    rounds = [*make(SPECULATIVE, [], 1.0), Round(SPECULATIVE, 1, tokens, 4, 0.1, 0.2, 0.5, 1.0)]
    assert metrics.tokens_per_second(rounds) == pytest.approx(4)
    assert metrics.acceptance_rate(rounds) == 1
    assert metrics.per_position_acceptance(rounds) == [1, 1]
    assert metrics.tokens_per_pass_histogram(rounds) == {2: 1}


@pytest.mark.parametrize("a", [0.0, 0.3, 0.8, 0.99])
@pytest.mark.parametrize("length", [0, 1, 4, 16])
def test_expected_tokens_are_the_closed_form(a: float, length: int) -> None:
    """(1 − a^{γ+1}) / (1 − a) where every position is accepted alike (arXiv:2211.17192)."""
    expected = (1 - a ** (length + 1)) / (1 - a)
    for known in (1, 2, 16):
        assert metrics.expected_tokens_per_pass([a] * known, length) == pytest.approx(expected)
    assert metrics.predicted_speedup([a], FREE, length) == pytest.approx(expected)
    costs = Costs(0.02, (1.0, *(1.25,) * 16), 0.05)
    v = 1.25 if length else 1.0
    assert metrics.predicted_speedup([a], costs, length) == pytest.approx(expected / (length * 0.05 + v))
    start = 0.1 if length else 0.0
    slow = replace(costs, draft_start=0.1)
    assert metrics.predicted_speedup([a], slow, length) == pytest.approx(expected / (length * 0.05 + v + start))


def test_expected_tokens_by_hand() -> None:
    assert metrics.expected_tokens_per_pass([], 5) == 1
    assert metrics.expected_tokens_per_pass([1.0], 5) == 6
    assert metrics.expected_tokens_per_pass([0.8, 0.5], 3) == pytest.approx(1 + 0.8 + 0.4 + 0.2)
    assert metrics.predicted_speedup([0.5], Costs(1.0, (1.0, 1.2), 0.1), 3) == pytest.approx(1.875 / 1.5)


@hypothesis_settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(0, 6).flatmap(lambda d: st.tuples(st.just(d), st.integers(0, d))), min_size=1, max_size=30))
def test_figures_agree_with_each_other(pattern: list[tuple[int, int]]) -> None:
    rounds = make(SPECULATIVE, pattern, 0.5)
    histogram = metrics.tokens_per_pass_histogram(rounds)
    assert sum(histogram.values()) == len(pattern)
    mean = sum(k * v for k, v in histogram.items()) / len(pattern)
    assert metrics.tokens_per_pass(rounds) == pytest.approx(mean)
    assert metrics.tokens_per_second(rounds) == pytest.approx(mean / 0.5)
    acceptance = metrics.per_position_acceptance(rounds)
    assert all(0 <= a <= 1 for a in acceptance)
    if len({drafted for drafted, _ in pattern}) == 1:  # one draft length: the model reproduces its own rounds
        assert metrics.expected_tokens_per_pass(acceptance, pattern[0][0]) == pytest.approx(mean)


def test_speedup_and_its_share_by_draft() -> None:
    trace = race(
        make(BASELINE, [(0, 0)] * 10, 0.1), make(SPECULATIVE, [(2, 2)] * 4 + [(0, 0)] * 3 + [(5, 1)] * 2, 0.15)
    )
    assert metrics.speedup(trace) == pytest.approx(((4 * 3 + 3 + 4) / (9 * 0.15)) / 10)
    by = metrics.measured_speedup_by_drafted(trace)
    assert by == pytest.approx({0: (1 / 0.15) / 10, 2: (3 / 0.15) / 10})
    assert list(metrics.measured_speedup_by_drafted(trace, minimum_rounds=2)) == [0, 2, 5]


def test_the_report() -> None:
    trace = race(make(BASELINE, [(0, 0)] * 3, 0.1), make(SPECULATIVE, [(2, 1)], 0.15))
    report = metrics.race_report(trace)
    assert report["pair"] == {"target": "t"} and report["settings"] == {"seed": 1}
    assert report["baseline"]["token_ids"] == [0, 1, 2, 3] and report["baseline"]["text"] == "accc"
    assert report["baseline"]["prefill_seconds"] == 0.5
    assert report["baseline"]["seconds"] == pytest.approx(0.8)
    assert report["baseline"]["tokens_per_second"] == pytest.approx(10)
    speculative = report["speculative"]
    assert speculative["rounds"][1] == {
        "drafted": [10, 11],
        "accepted": 1,
        "emitted": [10, 1],
        "draft_seconds": 0.1,
        "verify_seconds": 0.2,
    }
    assert (speculative["drafted"], speculative["accepted"]) == (2, 1)
    assert speculative["acceptance_rate"] == 0.5 and speculative["tokens_per_pass"] == 2
    assert report["speedup"] == pytest.approx((2 / 0.15) / 10) and report["identical"] is False
    assert metrics.race_report(race([], []))["speedup"] is None
